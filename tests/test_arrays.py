"""Arrays as they come: each computes as its contiguous copy does, bit for bit, or is refused by name."""

import mmap

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import batchnorm as bn
import frozen

N, C, L = 6, 3, 5
BASE = np.random.default_rng(7).normal(size=(N, C, L)).astype(np.float32)


class Sub(np.ndarray):
    """A subclass that does other things than an ndarray wherever it can."""

    def __array_finalize__(self, obj):
        self.unit = getattr(obj, "unit", "m")

    def __array_function__(self, *_):
        raise AssertionError("a function of NumPy was asked about x")

    def __array_ufunc__(self, *_, **__):
        raise AssertionError("x was computed with")

    def __getitem__(self, _):
        raise AssertionError("x was indexed")


class Unwilling(np.ndarray):
    __array_ufunc__ = None


def within(shape, dtype, offset):
    """Give an array that begins so many bytes behind an address that is aligned to 64."""
    room = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 64 + offset, np.uint8)
    start = -room.__array_interface__["data"][0] % 64 + offset
    return np.ndarray(shape, dtype, buffer=room, offset=start)


def filled(a):
    np.ndarray.__setitem__(a, ..., np.resize(BASE, a.shape))
    return a


def record(*fields):
    table = np.zeros((N, C, L), list(fields))
    filled(table["x"])
    return table


def mapped():
    return filled(np.ndarray(BASE.shape, np.float32, buffer=mmap.mmap(-1, BASE.nbytes)))


def read_only(a):
    a.flags.writeable = False
    return a


# Each gives an array of 3 dimensions, channels on axis 1.
COMPUTED = {
    "plain": lambda: BASE.copy(),
    "float64": lambda: BASE.astype(np.float64),
    "float16": lambda: BASE.astype(np.float16),
    "bfloat16": lambda: BASE.astype(ml_dtypes.bfloat16),
    "read_only": lambda: read_only(BASE.copy()),
    "of_bytes": lambda: np.frombuffer(BASE.tobytes(), np.float32).reshape(BASE.shape),
    "of_a_bytearray": lambda: np.frombuffer(bytearray(BASE.tobytes()), np.float32).reshape(BASE.shape),
    "of_mapped_memory": mapped,
    # subclasses
    "subclass": lambda: BASE.copy().view(Sub),
    "subclass_strided": lambda: BASE.repeat(2, 2)[..., ::2].view(Sub),
    "subclass_read_only": lambda: read_only(BASE.copy()).view(Sub),
    "subclass_without_ufuncs": lambda: BASE.copy().view(Unwilling),
    "recarray": lambda: BASE.copy().view(np.recarray),
    # fields of records
    "field_alone": lambda: record(("x", "f4"))["x"],
    "field_aligned": lambda: record(("x", "f4"), ("n", "i4"))["x"],
    "field_behind_a_byte": lambda: record(("n", "i1"), ("x", "f4"))["x"],
    "field_before_a_byte": lambda: record(("x", "f4"), ("n", "i1"))["x"],
    "field_of_doubles": lambda: record(("n", "i1"), ("x", "f8"))["x"],
    "field_of_halves": lambda: record(("n", "i1"), ("x", "f2"))["x"],
    "field_of_bfloat16": lambda: record(("n", "i1"), ("x", ml_dtypes.bfloat16))["x"],
    "field_of_a_recarray": lambda: record(("n", "i1"), ("x", "f4")).view(np.recarray).x,
    "field_reversed": lambda: record(("n", "i1"), ("x", "f4"))["x"][::-1],
    # alignment
    **{f"float32_at_{k}": lambda k=k: filled(within((N, C, L), "f4", k)) for k in (1, 2, 3, 4, 60)},
    **{f"float64_at_{k}": lambda k=k: filled(within((N, C, L), "f8", k)) for k in (1, 2, 4, 7, 8)},
    "float16_at_1": lambda: filled(within((N, C, L), "f2", 1)),
    "float32_at_1_transposed": lambda: filled(within((L, C, N), "f4", 1)).T,
    "float32_at_1_strided": lambda: filled(within((N, C, 2 * L), "f4", 1))[..., ::2],
    "subclass_at_1": lambda: filled(within((N, C, L), "f4", 1)).view(Sub),
    # orders, gaps, repeats
    "fortran": lambda: np.asfortranarray(BASE),
    "channels_last": lambda: BASE.transpose(0, 2, 1).copy().transpose(0, 2, 1),
    "channels_first": lambda: BASE.transpose(1, 0, 2).copy().transpose(1, 0, 2),
    "samples_last": lambda: BASE.transpose(2, 1, 0).copy().transpose(2, 1, 0),
    **{f"reversed_axis_{d}": lambda d=d: np.flip(BASE, d) for d in range(3)},
    "reversed_whole": lambda: BASE[::-1, ::-1, ::-1],
    "reversed_channels_last": lambda: BASE.transpose(0, 2, 1).copy()[:, ::-1].transpose(0, 2, 1),
    **{f"every_second_of_axis_{d}": lambda d=d: BASE.repeat(2, d)[(slice(None),) * d + (slice(None, None, 2),)]
       for d in range(3)},
    "backwards_by_2": lambda: BASE[::-2],
    "cut_out": lambda: np.pad(BASE, 2)[2:-2, 2:-2, 2:-2],
    "real_part": lambda: (BASE + 1j * BASE).real,
    "imaginary_part": lambda: (BASE + 1j * BASE).imag,
    "one_sample_repeated": lambda: np.broadcast_to(BASE[:1], BASE.shape),
    "one_position_repeated": lambda: np.broadcast_to(BASE[..., :1], BASE.shape),
    "one_channel_repeated": lambda: np.broadcast_to(BASE[:, :1], BASE.shape),
    "one_value_repeated": lambda: np.broadcast_to(BASE[0, 0, 0], BASE.shape),
    "overlapping_windows": lambda: as_strided(BASE.ravel().copy(), (N, C, L), (4, 8, 12)),
    # sizes
    "no_samples": lambda: BASE[:0],
    "no_positions": lambda: BASE[..., :0],
    "no_samples_at_1": lambda: within((0, C, L), "f4", 1),
    "no_samples_of_a_subclass": lambda: BASE[:0].view(Sub),
    "one_position": lambda: BASE[..., :1],
    "one_sample": lambda: BASE[:1],
    "one_sample_with_an_odd_stride": lambda: as_strided(BASE.copy(), (1, C, L), (999, 4 * L, 4)),
}  # fmt: skip

REFUSED = {
    "masked": lambda: np.ma.array(BASE),
    "big_endian": lambda: BASE.astype(">f4"),
    "big_endian_subclass": lambda: BASE.astype(">f8").view(Sub),
    "big_endian_field": lambda: record(("x", ">f4"))["x"],
    "big_endian_halves": lambda: BASE.astype(">f2"),
    "long_double": lambda: BASE.astype(np.longdouble),
    "integers": lambda: BASE.astype(np.int32),
    "bools": lambda: BASE > 0,
    "complex": lambda: BASE.astype(np.complex64),
    "objects": lambda: BASE.astype(object),
    "texts": lambda: BASE.astype(str),
    "dates": lambda: BASE.astype(int).astype("M8[s]"),
    "records": lambda: record(("x", "f4")),
    "float8": lambda: BASE.astype(ml_dtypes.float8_e4m3fn),
    "no_dimension": lambda: np.float32(1) + np.zeros((), np.float32)[...],
    "nine_dimensions": lambda: np.ones((1,) * 9, np.float32),
    "memory": lambda: memoryview(BASE),
}


GAMMA, BETA = np.array([1.5, -0.5, 2.0], np.float32), np.array([0.1, 0.2, -0.3], np.float32)
MEAN, VAR = np.array([0.5, -0.25, 0.0]), np.array([1.0, 0.5, 2.0])


def plain_functions(x):
    y, saved = bn.batch_norm(x, GAMMA, BETA)
    backward = bn.backward(x, saved)
    halves = bn.grad_input(x, saved, bn.grad_sums(x, saved))
    second = bn.double_backward(x, x, saved) if x.dtype.itemsize > 2 else ()
    return [y, *backward, halves, bn.moments(x)._table, *second]


def masked_functions(x):
    mask = np.arange(x.shape[0] * x.shape[2]).reshape(x.shape[0], x.shape[2]) % 4 > 0
    y, saved = bn.batch_norm(x, GAMMA, BETA, mask=mask, padding="keep")
    return [y, *bn.backward(x, saved)[:3]]


def functions_of_segments(x):
    y, saved = bn.batch_norm(x, GAMMA, BETA, segments=np.arange(len(x)) // 4)
    return [y, *bn.backward(x, saved)[:3]]


def functions_of_constants(x):
    y = bn.normalize(x, MEAN, VAR, GAMMA, BETA)
    return [y, *frozen.backward(x, x, MEAN, VAR, GAMMA)[:3]]


def functions_of_relu(x):
    y, saved = bn.batch_norm(x, GAMMA, BETA, residual=x, activation="relu")
    z, other = bn.normalize(x, MEAN, VAR, GAMMA, BETA, residual=x, activation="relu", save=True)
    return [y, *bn.backward(x, saved), z, *bn.backward(x, other)]


def functions_of_small_batches(x):
    y, saved = bn.batch_norm(x, GAMMA, BETA, ghost_size=4)
    z, other = bn.batch_norm(x, GAMMA, BETA, renorm=bn.Renorm(MEAN, VAR, 2.0, 1.0))
    return [y, *bn.backward(x, saved)[:3], z, *bn.backward(x, other)[:3]]


def a_layer(x):
    layer = bn.BatchNorm(C)
    y = layer(x)
    dx = layer.backward(x)
    z = layer.eval()(x)
    return [y, dx, layer.dgamma, z, layer.backward(x), layer.running_mean, layer.running_var]


def a_layer_with_relu(x):
    layer = bn.BatchNorm(C, activation="relu")
    y = layer(x, residual=x)
    return [
        y,
        layer.backward(x),
        layer.dresidual,
        layer.eval()(x, residual=x),
        layer.backward(x),
        layer.dresidual,
    ]


CALLS = [
    plain_functions,
    masked_functions,
    functions_of_segments,
    functions_of_constants,
    functions_of_relu,
    functions_of_small_batches,
    a_layer,
    a_layer_with_relu,
]


@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED.keys())
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_an_array_computes_as_its_contiguous_copy_does(call, make):
    x = make()
    copy = np.array(np.asarray(x), order="K")
    assert type(copy) is np.ndarray
    before = copy.copy()
    for got, expected in zip(call(x), call(copy), strict=True):
        assert type(got) is type(expected)
        if got is not None:
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got.astype(np.float64), expected.astype(np.float64))
    np.testing.assert_array_equal(np.asarray(x), before)


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize(
    "call",
    [bn.moments, bn.batch_norm, bn.instance_norm, lambda x: bn.group_norm(x, 1), bn.BatchNorm(C)],
    ids=lambda call: getattr(call, "__name__", "layer"),
)
def test_what_is_no_array_of_floats_is_refused_by_name(call, make):
    with pytest.raises((TypeError, ValueError), match=r"^x must (be|have) .*, got "):
        call(make())


@pytest.mark.parametrize(
    "make",
    [
        lambda: GAMMA.view(Sub),
        lambda: np.array([(0, g) for g in GAMMA], [("n", "i1"), ("x", "f4")])["x"],
        lambda: GAMMA[::-1].copy()[::-1],
        lambda: read_only(GAMMA.copy()),
        lambda: GAMMA.astype(">f4"),
        lambda: GAMMA.tolist(),
        lambda: GAMMA.astype(np.longdouble),
    ],
    ids=["subclass", "field", "reversed", "read_only", "big_endian", "list", "long_double"],
)
def test_gamma_may_be_any_array_of_floats(make):
    y, saved = bn.batch_norm(BASE, GAMMA)
    z, other = bn.batch_norm(BASE, make())
    np.testing.assert_array_equal(z, y)
    dgamma = bn.backward(BASE, other).dgamma
    np.testing.assert_array_equal(dgamma.astype(np.float32), bn.backward(BASE, saved).dgamma)


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint16])
def test_a_gamma_of_integers_computes_as_one_of_float64_and_has_gradients_of_float64(dtype):
    gamma = np.array([1, 2, 3])
    whole, floats = gamma.astype(dtype), gamma.astype(np.float64)
    y, saved = bn.batch_norm(BASE, floats, floats)
    z, other = bn.batch_norm(BASE, whole, whole)
    np.testing.assert_array_equal(z, y)
    for got, expected in zip(bn.backward(BASE, other)[:3], bn.backward(BASE, saved)[:3], strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(bn.normalize(BASE, whole, whole, whole), bn.normalize(BASE, floats, floats, floats))
    gradients = frozen.backward(BASE, BASE, whole, whole, whole)
    assert gradients.dgamma.dtype == np.float64
    x = BASE.copy()
    kept = bn.batch_norm(x, whole, whole, keep="y", out=x)[1]
    assert bn.backward(BASE, kept).dgamma.dtype == np.float64


def test_out_is_no_subclass_whose_assignment_may_mean_something_else():
    out = np.zeros_like(BASE).view(Sub)
    text = r"^out must be a numpy\.ndarray \(write out\.view\(np\.ndarray\)\), got Sub$"
    with pytest.raises(TypeError, match=text):
        bn.batch_norm(BASE, GAMMA, out=out)
    assert not np.asarray(out).any()
    view = out.view(np.ndarray)
    assert bn.batch_norm(BASE, GAMMA, out=view)[0] is view


def test_in_place_a_subclass_and_an_array_that_is_not_aligned_are_refused_as_any_out():
    x = BASE.copy().view(Sub)
    with pytest.raises(TypeError, match=r"^out must be a numpy\.ndarray \(write out\.view\(np\.ndarray\)\), got Sub$"):
        bn.batch_norm(x, GAMMA, keep="y", out=x)
    np.testing.assert_array_equal(np.asarray(x), BASE)
    y, saved = bn.batch_norm(x, GAMMA, keep="y", out=x.view(np.ndarray))
    assert saved.y is y
    np.testing.assert_array_equal(np.asarray(x), bn.batch_norm(BASE, GAMMA)[0])
    x = filled(within((N, C, L), "f4", 1))
    with pytest.raises(ValueError, match=r"^out must be aligned to its item size, got an address"):
        bn.batch_norm(x, keep="y", out=x)
