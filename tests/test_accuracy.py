"""The numerical contract, on every named case: planar and interleaved, float32 and float64, both directions."""

import ctypes
import ctypes.util
import functools
import platform
import sys
from typing import ClassVar

import numpy as np
import pytest

import adversarial
import batchnorm as bn
import reference
from tolerances import UNIT_ROUNDOFF, assert_backward, assert_forward, assert_within

LAYOUTS = {"nchw": 1, "nhwc": 3}


@functools.cache
def expected(name, dtype):
    """Give the case and its exact results, channels at axis 1, computed once for all layouts."""
    case = adversarial.make(name, dtype)
    exact = reference.exact_forward(case.x, case.gamma, case.beta, axis=1, eps=case.eps)
    gradients = reference.exact_backward(case.dy, case.x, case.gamma, axis=1, eps=case.eps)
    return case, exact, gradients


def in_layout(case, exact, gradients, axis):
    """Give the case with its channels moved to `axis`, contiguous."""

    def move(array):
        return np.ascontiguousarray(np.moveaxis(array, 1, axis))

    case = case._replace(x=move(case.x), dy=move(case.dy))
    return (
        case,
        exact._replace(y=exact.y.moveaxis(1, axis)),
        gradients._replace(dx=gradients.dx.moveaxis(1, axis)),
    )


def check_forward(name, dtype, axis):
    case, exact, _ = in_layout(*expected(name, dtype), axis)
    y, saved = bn.batch_norm(case.x, case.gamma, case.beta, axis=axis, eps=case.eps)
    scales = reference.forward_scales(case.x, case.gamma, case.beta, exact, axis=axis)
    assert_forward(y, (saved.moments.mean, saved.moments.var(), saved.rstd), exact, scales, dtype)


def check_backward(name, dtype, axis):
    case, exact, gradients = in_layout(*expected(name, dtype), axis)
    _, saved = bn.batch_norm(case.x, case.gamma, case.beta, axis=axis, eps=case.eps)
    scales = reference.backward_scales(case.dy, case.x, case.gamma, exact, gradients, axis=axis)
    assert_backward(bn.backward(case.dy, saved), gradients, scales, dtype)


def check_every_case():
    """Check all cases in this process, whatever instruction set it runs."""
    for name, dtype in adversarial.CASES:
        for axis in LAYOUTS.values():
            check_forward(name, dtype, axis)
            check_backward(name, dtype, axis)


every_case = pytest.mark.parametrize(
    ("name", "dtype"), adversarial.CASES, ids=["-".join(case) for case in adversarial.CASES]
)
every_layout = pytest.mark.parametrize("axis", LAYOUTS.values(), ids=LAYOUTS.keys())


@every_layout
@every_case
def test_forward_keeps_the_contract(name, dtype, axis):
    check_forward(name, dtype, axis)


@every_layout
@every_case
def test_backward_keeps_the_contract(name, dtype, axis):
    check_backward(name, dtype, axis)


@every_layout
@pytest.mark.parametrize("k", adversarial.RATIOS, ids=lambda k: f"1e{k}")
def test_inference_is_right_at_mean_over_std(k, axis):
    case, _, _ = expected(adversarial.RATIOS[k], "float32")
    x = np.ascontiguousarray(np.moveaxis(case.x, 1, axis))
    mean, var = np.array([10.0**k + 0.3, 0.1, 10.0**k - 0.2]), np.array([1.1, 0.9, 2.0])
    y = bn.normalize(x, mean, var, case.gamma, case.beta, axis=axis)
    exact = reference.exact_forward(x, case.gamma, case.beta, axis=axis, eps=1e-5, mean=mean, var=var)
    scales = reference.forward_scales(x, case.gamma, case.beta, exact, axis=axis)
    assert_within("y", x.dtype, y, exact.y, scale=scales.y, at=scales.y_at)


@every_layout
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("k", adversarial.RATIOS, ids=lambda k: f"1e{k}")
def test_y_is_as_good_at_any_mean_over_std(k, dtype, axis):
    # The same promise without beta or scales in the way: 3u of the channel's largest |y|, and one rounding.
    x = np.ascontiguousarray(np.moveaxis(adversarial.make(adversarial.RATIOS[k], dtype).x, 1, axis))
    y, _ = bn.batch_norm(x, axis=axis)
    exact = reference.exact_forward(x, axis=axis, eps=1e-5)
    largest = np.abs(exact.y.high).max(reference.other_axes(y, axis), keepdims=True)
    assert_within("y", dtype, y, exact.y, scale=np.broadcast_to(largest, y.shape))


def just_below_powers_of_two(rng, dtype, channels):
    """Give x of 7 values a channel, some ulps apart, and gamma and beta whose fold reaches the power above beta."""
    integer = np.dtype(f"i{dtype.itemsize}")
    x = np.repeat(rng.uniform(1, 2, (1, channels)).astype(dtype), 7, axis=0)
    x = (x.view(integer) + rng.integers(-2, 3, x.shape, dtype=integer)).view(dtype)
    gamma = (10.0 ** rng.uniform(-9, 0, channels)).astype(dtype)
    least = np.log10(UNIT_ROUNDOFF[dtype.name])
    beta = 2.0 ** rng.integers(-3, 4, channels) * (1 - 10.0 ** rng.uniform(least, 0, channels))
    return x, gamma, (beta * rng.choice([-1, 1], channels)).astype(dtype)


@pytest.mark.parametrize("planar", [False, True], ids=["interleaved", "planar"])
def test_y_keeps_its_bound_where_beta_lies_just_below_a_power_of_two(planar, dtype):
    # The fold of beta and of what the center leaves of the mean rounds in the binade above that of beta and y.
    x, gamma, beta = just_below_powers_of_two(np.random.default_rng(1), dtype, 1500)
    exact = reference.exact_forward(x, gamma, beta, axis=1, eps=0.0)
    scales = reference.forward_scales(x, gamma, beta, exact, axis=1)
    given = np.ascontiguousarray(x.T[np.newaxis]) if planar else x
    y, _ = bn.batch_norm(given, gamma, beta, eps=0.0)
    assert_within("y", dtype, y[0].T if planar else y, exact.y, scale=scales.y, at=scales.y_at)


@every_layout
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("eps", [0.0, 1e-60, 1e-5, 1.0])
@pytest.mark.parametrize("name", adversarial.CONSTANTS)
def test_a_constant_channel_gives_exactly_beta(name, eps, dtype, axis):
    case = adversarial.make(name, dtype)
    beta = np.array([0.1, -3.0, 1e-30], dtype)
    gamma = np.array([1e10, 1.0, 0.3], dtype)
    y, saved = bn.batch_norm(np.ascontiguousarray(np.moveaxis(case.x, 1, axis)), gamma, beta, axis=axis, eps=eps)
    np.testing.assert_array_equal(saved.moments.m2[[0, 2]], 0.0)
    for channel in (0, 2):
        np.testing.assert_array_equal(np.moveaxis(y, axis, 0)[channel], beta[channel])


@every_layout
@pytest.mark.parametrize("scale", [1e18, 1e30])
def test_scaled_normals_are_normalized_although_their_squares_overflow_float32(scale, axis):
    x = (np.random.default_rng(6).normal(size=(8, 6, 7, 6)) * scale).astype(np.float32)
    y, _ = bn.batch_norm(x, axis=axis)
    exact = reference.exact_forward(x, axis=axis, eps=1e-5)
    scales = reference.forward_scales(x, None, None, exact, axis=axis)
    assert_within("y", x.dtype, y, exact.y, scale=scales.y, at=scales.y_at)
    spread = y.astype(np.float64).std(reference.other_axes(y, axis))
    assert_within("y", x.dtype, spread, np.ones(x.shape[axis]), scale=scales.y.max())


@every_case
def test_finite_input_gives_finite_output(name, dtype):
    case, exact, gradients = expected(name, dtype)
    y, saved = bn.batch_norm(case.x, case.gamma, case.beta, eps=case.eps)
    got = bn.backward(case.dy, saved)
    for value, true in zip((y, *got[:3]), (exact.y, *gradients), strict=True):
        in_range = np.abs(true.high) <= float(np.finfo(value.dtype).max)
        assert np.isfinite(value[in_range]).all()


@every_case
def test_variance_is_never_negative(name, dtype):
    assert (bn.moments(adversarial.make(name, dtype).x).m2 >= 0).all()


# ---- large ------------------------------------------------------------------------------------------------

LARGE = {
    "uniform01": lambda rng, n: rng.uniform(size=n),
    "offset100": lambda rng, n: 100 + rng.normal(size=n),
    "mean_std_1e6": lambda rng, n: 1e6 + rng.normal(size=n),
    "constant_0.1": lambda rng, n: np.full(n, 0.1),
    "sum_cancellation": lambda rng, n: np.resize([1e12, -1e12, 1.0], n),
}


@pytest.mark.parametrize("shape", [(8, 2, 20003), (160003, 2, 1)], ids=["planar", "interleaved"])
@pytest.mark.parametrize("name", LARGE)
def test_many_values_a_channel_keep_the_contract(name, shape):
    rng = np.random.default_rng(8)
    rows = np.stack([LARGE[name](rng, shape[0] * shape[2]), rng.normal(size=shape[0] * shape[2])])
    x = np.ascontiguousarray(rows.reshape(2, shape[0], shape[2]).swapaxes(0, 1), np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    y, saved = bn.batch_norm(x)
    exact = reference.fsum_forward(x, axis=1, eps=1e-5)
    scales = reference.forward_scales(x, None, None, exact, axis=1)
    assert_forward(y, (saved.moments.mean, saved.moments.var(), saved.rstd), exact, scales, x.dtype)
    gradients = reference.fsum_backward(dy, x, axis=1, eps=1e-5)
    scales = reference.backward_scales(dy, x, None, exact, gradients, axis=1)
    assert_backward(bn.backward(dy, saved), gradients, scales, x.dtype)


@pytest.mark.parametrize("shape", [(1, 1, 2**24 + 2), (2**24 + 2, 1)], ids=["planar", "interleaved"])
def test_more_values_than_float32_can_count_keep_their_mean(shape):
    # Twos and ones in turn: mean 1.5 and variance 0.25 exactly. A float32 sum or count stops growing at 2^24.
    x = np.ones(shape, np.float32)
    x.reshape(-1)[::2] = 2
    m = bn.moments(x)
    np.testing.assert_array_equal(m.count, 2.0**24 + 2)
    np.testing.assert_array_equal(m.mean, 1.5)
    np.testing.assert_array_equal(m.var(), 0.25)


# ---- subnormals, and a caller that flushes them ---------------------------------------------------------------


class FloatEnvironment:
    """The calling thread's flush-to-zero state, by way of the C library's floating-point environment."""

    # (bytes of fenv_t, offset of the control word, the bits that flush): MXCSR's FTZ | DAZ, FPCR's FZ.
    _LAYOUT: ClassVar = {"x86_64": (32, 28, 0x8040), "aarch64": (8, 0, 1 << 24)}

    def __init__(self):
        if not sys.platform.startswith("linux") or platform.machine() not in self._LAYOUT:
            pytest.skip("the layout of fenv_t is known here for Linux on x86_64 and aarch64 only")
        size, self._offset, self._flush = self._LAYOUT[platform.machine()]
        self._libm = ctypes.CDLL(ctypes.util.find_library("m"))
        self._buffer = ctypes.create_string_buffer(size)

    def control_word(self):
        self._libm.fegetenv(self._buffer)
        return int.from_bytes(self._buffer.raw[self._offset : self._offset + 4], sys.byteorder)

    def set_control_word(self, word):
        self._libm.fegetenv(self._buffer)
        ctypes.memmove(ctypes.byref(self._buffer, self._offset), word.to_bytes(4, sys.byteorder), 4)
        self._libm.fesetenv(self._buffer)

    def flush(self):
        # x87 exception flags ride along in MXCSR; only the two flush bits are ours.
        self.set_control_word(self.control_word() | self._flush)

    def keep(self):
        self.set_control_word(self.control_word() & ~self._flush)

    def flushes(self):
        return self.control_word() & self._flush == self._flush


@pytest.fixture
def float_environment():
    environment = FloatEnvironment()
    before = environment.control_word()
    yield environment
    environment.set_control_word(before)


SUBNORMAL_CASES = [name for name in adversarial.NAMES if "subnormal" in name or "tiny" in name]


def results(name, axis, num_threads):
    case = adversarial.make(name, "float32")
    x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, axis)) for a in (case.x, case.dy))
    options = {"axis": axis, "eps": case.eps, "num_threads": num_threads}

    def run():
        y, saved = bn.batch_norm(x, case.gamma, case.beta, **options)
        gradients = bn.backward(dy, saved, num_threads=num_threads)
        tensors = (y, saved.moments.mean, saved.moments.m2, saved.rstd, gradients.dx)
        return [a.tobytes() for a in tensors], [gradients.dgamma.tobytes(), gradients.dbeta.tobytes()]

    return run


def kept_and_flushed(run, environment):
    """Give run() as the caller's thread starts, and run() after it has been told to flush subnormals."""
    kept = run()
    environment.flush()
    try:
        flushed = run()
    finally:
        environment.keep()
    return kept, flushed


@every_layout
@pytest.mark.parametrize("name", SUBNORMAL_CASES)
def test_subnormals_in_tensors_are_kept_when_the_caller_flushes_them(name, axis, float_environment):
    kept, flushed = kept_and_flushed(results(name, axis, 1), float_environment)
    assert flushed[0] == kept[0]


@every_layout
@pytest.mark.parametrize("name", SUBNORMAL_CASES)
def test_subnormal_dgamma_and_dbeta_are_kept_when_the_caller_flushes_them(name, axis, float_environment):
    kept, flushed = kept_and_flushed(results(name, axis, 1), float_environment)
    assert flushed[1] == kept[1]


@pytest.mark.parametrize("shape", [(16, 4, 64, 64), (65536, 4)], ids=["planar", "interleaved"])
def test_subnormals_are_kept_in_every_thread_when_the_caller_flushes_them(shape, float_environment):
    x = (np.random.default_rng(2).uniform(-1, 1, shape) * 2.0**-127).astype(np.float32)
    gamma = np.full(4, 1e-3, np.float32)
    serial = bn.batch_norm(x, gamma, num_threads=1)[0].tobytes()
    kept, flushed = kept_and_flushed(lambda: bn.batch_norm(x, gamma, num_threads=2)[0].tobytes(), float_environment)
    assert flushed == kept == serial


@pytest.mark.parametrize("flush", [False, True], ids=["caller_keeps", "caller_flushes"])
def test_the_callers_float_environment_is_not_changed(flush, float_environment):
    run = results("plain_normal", 1, 2)
    if flush:
        float_environment.flush()
    run()
    flushes = float_environment.flushes()
    assert flushes is flush


# ---- the oracle itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_oracles_agree_where_float64_is_enough(axis, dtype):
    rng = np.random.default_rng(9)
    x, dy = rng.normal(2, 1, (5, 4, 6)).astype(dtype), rng.normal(size=(5, 4, 6)).astype(dtype)
    gamma, beta = rng.normal(size=x.shape[axis]), rng.normal(size=x.shape[axis])
    options = {"axis": axis, "eps": 1e-3}
    exact = [
        *reference.exact_forward(x, gamma, beta, **options),
        *reference.exact_backward(dy, x, gamma, **options),
    ]
    formulas = [*reference.forward(x, gamma, beta, **options), *reference.backward(dy, x, gamma, **options)]
    sums = [
        *reference.fsum_forward(x, gamma, beta, **options),
        *reference.fsum_backward(dy, x, gamma, **options),
    ]
    for value, formula, summed in zip(exact, formulas, sums, strict=True):
        scale = np.abs(value.high).max()
        assert_within("oracles", "float64", formula, value, scale=scale)
        assert_within("oracles", "float64", summed.high, value, scale=scale)


def test_the_exact_oracle_rounds_one_third_to_its_nearest_floats():
    mean = reference.exact_forward(np.array([[0.0], [0.0], [1.0]]), axis=1, eps=0.0).mean
    assert mean.high[0] == 1 / 3
    assert mean.low[0] * 2.0**54 == 1 / 3  # 1/3 - fl(1/3) = 2^-54 / 3


def test_the_table_refuses_a_result_one_float32_too_far():
    exact = reference.Exact(np.array([1.0]), np.array([0.0]))
    assert_within("var", "float32", np.array([1 + 2.0**-23]), exact)
    with pytest.raises(AssertionError, match="1 of 1 beyond the bound"):
        assert_within("var", "float32", np.array([1 + 2.0**-23 + 2.0**-50]), exact)
    with pytest.raises(AssertionError, match="1 of 1 beyond the bound"):
        assert_within("var", "float32", np.array([np.nan]), exact)


# ---- other implementations in the list ---------------------------------------------------------------------------


def test_the_reference_kernels_keep_the_contract_on_every_case(python_with_isa):
    code = "import batchnorm as bn, test_accuracy as t; assert bn.active_isa() == 'reference'; t.check_every_case()"
    process = python_with_isa("reference", code)
    assert process.returncode == 0, process.stderr
