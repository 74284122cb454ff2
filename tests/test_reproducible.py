"""The same bits: for every number of threads, for every instruction set, in place or not, on every run."""

import hashlib
import json

import numpy as np
import pytest

import batchnorm as bn
from frozen import backward as backward_of_given

# (shape, channel axis): planar and interleaved, each with tails, few channels, many channels, small and large.
SHAPES = {
    "planar_tiny": ((2, 3, 5), 1),
    "planar_tail": ((5, 7, 17, 19), 1),
    "planar_small_planes": ((64, 96, 7, 7), 1),
    "planar_two_huge_planes": ((1, 2, 150_001), 1),
    "planar_one_channel": ((3, 1, 70_003), 1),
    "planar_few_channels": ((8, 3, 112, 113), 1),
    "planar_many_channels": ((2, 4099, 33), 1),
    "planar_channel_in_the_middle": ((6, 50, 9, 31, 5), 2),
    "interleaved_tiny": ((7, 5), 1),
    "interleaved_tail": ((4099, 67), 1),
    "interleaved_one_channel": ((200_003, 1), 1),
    "interleaved_three_channels": ((50_021, 3), 1),
    "interleaved_many_channels": ((37, 8195), 1),
    "interleaved_channels_last": ((8, 28, 28, 64), -1),
}
OFFSETS = {"plain": 0.0, "mean_std_1e6": 1e6}  # the second takes the path of ill-conditioned channels


def arrays(name, dtype, offset):
    shape, axis = SHAPES[name]
    rng = np.random.default_rng(21)
    x = rng.standard_normal(shape, np.float32).astype(dtype)
    # Every third channel carries the offset, so that good and bad conditioning meet in one vector.
    np.moveaxis(x, axis, 0)[::3] += dtype.type(offset)
    dy = rng.standard_normal(shape, np.float32).astype(dtype)
    gamma, beta = (rng.standard_normal(shape[axis], np.float32).astype(dtype) for _ in range(2))
    return x, dy, gamma, beta, axis


def sha(value):
    return hashlib.sha256(np.ascontiguousarray(value)).hexdigest()[:16]


def digests(name, dtype, offset, num_threads=None, in_place=False):
    """Give a digest of every result, by name."""
    x, dy, gamma, beta, axis = arrays(name, np.dtype(dtype), offset)
    y, saved = bn.batch_norm(x, gamma, beta, axis=axis, num_threads=num_threads)
    gradients = bn.backward(dy, saved, num_threads=num_threads, out=dy if in_place else None)
    moments = bn.moments(x, axis=axis, num_threads=num_threads)
    mean, var = saved.moments.mean, saved.moments.var()
    frozen_dy = arrays(name, np.dtype(dtype), offset)[1]
    frozen = backward_of_given(
        frozen_dy,
        x,
        mean,
        var,
        gamma,
        axis=axis,
        num_threads=num_threads,
        out=frozen_dy if in_place else None,
    )
    target = x.copy() if in_place else x
    inference = bn.normalize(
        target, mean, var, gamma, beta, axis=axis, num_threads=num_threads, out=target if in_place else None
    )
    if in_place:
        y = x.copy()
        bn.batch_norm(y, gamma, beta, axis=axis, num_threads=num_threads, out=y)
    results = {
        "mean": mean, "var": var, "rstd": saved.rstd, "y": y,
        "moments.mean": moments.mean, "moments.m2": moments.m2,
        "dx": gradients.dx, "dgamma": gradients.dgamma, "dbeta": gradients.dbeta,
        "normalize.y": inference,
        "frozen.dx": frozen.dx, "frozen.dgamma": frozen.dgamma, "frozen.dbeta": frozen.dbeta,
    }  # fmt: skip
    return {key: sha(value) for key, value in results.items()}


def all_digests():
    """Give digests of every shape, dtype and offset, with the process's own number of threads."""
    return {
        f"{name} {dtype} {offset}": digests(name, dtype, OFFSETS[offset])
        for name in SHAPES
        for dtype in ("float32", "float64")
        for offset in OFFSETS
    }


every_shape = pytest.mark.parametrize("shape", SHAPES)
every_offset = pytest.mark.parametrize("offset", OFFSETS)


@every_shape
@every_offset
def test_any_number_of_threads_gives_the_same_bits(shape, dtype, offset):
    one = digests(shape, dtype, OFFSETS[offset], num_threads=1)
    for num_threads in (2, 3, 7):
        assert digests(shape, dtype, OFFSETS[offset], num_threads=num_threads) == one, f"{num_threads} threads"


@every_shape
@every_offset
def test_in_place_gives_the_same_bits(shape, dtype, offset):
    in_place = digests(shape, dtype, OFFSETS[offset], in_place=True)
    assert in_place == digests(shape, dtype, OFFSETS[offset])


@pytest.fixture(scope="module")
def digests_of_isa(python_with_isa):
    """Give all_digests() of a process that was told to use an instruction set, once a name."""
    known = {}

    def of(name):
        if name not in known:
            code = (
                "import json, batchnorm as bn, test_reproducible as t; "
                f"assert bn.active_isa() == {name!r}, bn.active_isa(); print(json.dumps(t.all_digests()))"
            )
            process = python_with_isa(name, code)
            assert process.returncode == 0, process.stderr
            known[name] = json.loads(process.stdout)
        return known[name]

    return of


def test_every_instruction_set_gives_the_same_bits(isa, digests_of_isa):
    expected, got = digests_of_isa(bn.available_isas()[0]), digests_of_isa(isa)
    different = [
        f"{case}: {name}" for case in expected for name in expected[case] if got[case][name] != expected[case][name]
    ]
    assert not different, different


def test_the_number_of_threads_of_the_process_gives_the_same_bits():
    before = bn.get_num_threads()
    try:
        bn.set_num_threads(1)
        one = digests("planar_few_channels", "float32", 0.0)
        bn.set_num_threads(2)
        two = digests("planar_few_channels", "float32", 0.0)
    finally:
        bn.set_num_threads(before)
    assert two == one


@pytest.mark.parametrize("start", range(1, 9))
def test_alignment_of_x_does_not_change_the_bits(start, dtype):
    # Kernels may peel to an aligned address; what they add up must not move with it.
    rng = np.random.default_rng(3)
    values = rng.normal(size=(3, 5, 41)).astype(dtype)
    room = np.empty(values.size + start, dtype)[start:].reshape(values.shape)
    room[...] = values
    y, saved = bn.batch_norm(room)
    expected, expected_saved = bn.batch_norm(values)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(saved.moments.m2, expected_saved.moments.m2)


@pytest.mark.parametrize("axis", [1, -1], ids=["planar", "interleaved"])
def test_a_tensor_beyond_the_caches_has_the_same_bits_wherever_it_is_written(axis):
    # Large outputs are stored around the caches where their address allows it; in place they are not.
    rng = np.random.default_rng(5)
    shape = (8, 32, 160, 160) if axis == 1 else (8, 160, 160, 32)
    x = rng.normal(size=shape).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    y, saved = bn.batch_norm(x, axis=axis)
    dx = bn.backward(dy, saved).dx
    room = np.empty(x.size + 16, np.float32)
    start = 1 + (-room.ctypes.data // 4) % 16  # one value past a line
    unaligned = room[start : start + x.size].reshape(x.shape)
    bn.batch_norm(x, axis=axis, out=unaligned)
    np.testing.assert_array_equal(unaligned, y)
    np.testing.assert_array_equal(bn.backward(dy, saved, out=unaligned).dx, dx)
    bn.backward(dy, saved, out=dy)
    np.testing.assert_array_equal(dy, dx)
    bn.batch_norm(x, axis=axis, out=x)
    np.testing.assert_array_equal(x, y)
