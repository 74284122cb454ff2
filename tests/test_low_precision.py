"""float16 and bfloat16: every result is that of the same values in float32, rounded once more."""

import os
import subprocess
import sys
from itertools import product

import ml_dtypes
import numpy as np
import pytest

import batchnorm as bn
import frozen

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
LAYOUTS = {  # the same 65,536 values, on 16 channels
    "planar": ((16, 16, 256), 1, "C"),
    "planar_tails": ((3, 16, 1365), 1, "C"),
    "interleaved": ((4096, 16), 1, "C"),
    "uneven_rows": ((5957, 11), 1, "C"),
    "short_runs": ((819, 16, 5), 1, "C"),
    "channels_last": ((16, 16, 256), 1, "last"),
    "one_channel": ((65536, 1), 1, "C"),
    "fortran": ((128, 16, 32), 1, "F"),
    "gaps": ((16, 16, 256), 1, "gaps"),
}

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def every_value(dtype):
    return np.arange(65536, dtype=np.uint16).view(dtype)


def laid_out(values, layout):
    shape, axis, order = LAYOUTS[layout]
    x = values[: int(np.prod(shape))].reshape(shape)
    if order == "F":
        return np.asfortranarray(x), axis
    if order == "last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1), axis
    if order == "gaps":
        wide = np.zeros((*shape[:-1], 2 * shape[-1]), x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2], axis
    return x, axis


def finite(values):
    return values[np.isfinite(values.astype(np.float32))]


def random_values(dtype, shape, seed, scale=1.0, shift=0.0):
    x = scale * np.random.default_rng(seed).standard_normal(shape) + shift
    return x.astype(np.float32).astype(dtype)


def same(a, b):
    """Check equal bits, NaNs being one."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    bits = f"u{a.dtype.itemsize}"
    a_bits, b_bits = np.ascontiguousarray(a).view(bits), np.ascontiguousarray(b).view(bits)
    if np.array_equal(a_bits, b_bits):
        return  # most often, and at a tenth of the time
    a_nan, b_nan = np.isnan(a.astype(np.float32)), np.isnan(b.astype(np.float32))
    np.testing.assert_array_equal(a_nan, b_nan)
    np.testing.assert_array_equal(a_bits[~a_nan], b_bits[~b_nan])


def rounded(a, dtype):
    with np.errstate(all="ignore"):
        return a.astype(dtype)


def same_table(a, b):
    np.testing.assert_array_equal(a._table, b._table)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scaling", ["identity", "scaled"])
def test_normalize_of_every_value_is_the_rounded_float32_result(dtype, layout, scaling):
    x, axis = laid_out(every_value(dtype), layout)
    channels = x.shape[axis]
    mean, var, gamma, beta = np.zeros(channels), np.ones(channels), None, None
    if scaling == "scaled":
        rng = np.random.default_rng(3)
        mean, var = rng.standard_normal(channels), rng.uniform(0.1, 3, channels)
        gamma, beta = rng.standard_normal((2, channels))
    y = bn.normalize(x, mean, var, gamma, beta, axis=axis, eps=0.0)
    same(y, rounded(bn.normalize(x.astype(np.float32), mean, var, gamma, beta, axis=axis, eps=0.0), dtype))
    if scaling == "identity":
        negative_zero = (x.astype(np.float32) == 0) & np.signbit(x.astype(np.float32))  # (-0 - 0)*1 + 0 is 0
        same(y[~negative_zero], x[~negative_zero])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_statistics_over_every_finite_value_are_those_of_float32(dtype, layout):
    values = finite(every_value(dtype))
    x, axis = laid_out(np.resize(values, 65536), layout)
    same_table(bn.moments(x, axis=axis), bn.moments(x.astype(np.float32), axis=axis))
    y, saved = bn.batch_norm(x, axis=axis)
    wanted, saved_32 = bn.batch_norm(x.astype(np.float32), axis=axis)
    same(y, rounded(wanted, dtype))
    same_table(saved.moments, saved_32.moments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_the_rounded_float32_gradients(dtype, layout):
    # Values of every size in dy; an x whose variance is of ordinary size.
    dy, axis = laid_out(np.resize(finite(every_value(dtype)), 65536), layout)
    x = random_values(dtype, dy.shape, 5, shift=0.5)
    channels = x.shape[axis]
    gamma = np.random.default_rng(6).standard_normal(channels).astype(np.float32)
    x_32, dy_32 = x.astype(np.float32), dy.astype(np.float32)
    saved, saved_32 = (bn.batch_norm(a, gamma, axis=axis)[1] for a in (x, x_32))
    got, wanted = bn.backward(dy, saved), bn.backward(dy_32, saved_32)
    same(got.dx, rounded(wanted.dx, dtype))
    same(got.dgamma, wanted.dgamma)
    same(got.dbeta, wanted.dbeta)
    sums, sums_32 = bn.grad_sums(dy, saved), bn.grad_sums(dy_32, saved_32)
    same_table(sums, sums_32)
    same(bn.grad_input(dy, saved, sums), got.dx)
    mean, var = saved.moments.mean, saved.moments.var()
    got = frozen.backward(dy, x, mean, var, gamma, axis=axis)
    wanted = frozen.backward(dy_32, x_32, mean, var, gamma, axis=axis)
    same(got.dx, rounded(wanted.dx, dtype))
    same(got.dgamma, wanted.dgamma)
    same(got.dbeta, wanted.dbeta)


@pytest.mark.parametrize("shape", [(300, 5, 7, 7), (3000, 67), (65, 40, 3), (7, 3, 4099), (2, 1030), (1, 1, 31)])
@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1e-2, 100), (3e-6, 0), (0, 0.3), (1e-3, 1e-7)])
def test_any_spread_and_mean_gives_the_rounded_float32_result(dtype, shape, scale, shift):
    x = random_values(dtype, shape, 7, scale, shift)
    dy = random_values(dtype, shape, 8)
    for threads in (1, 2, 5):
        y, saved = bn.batch_norm(x, num_threads=threads)
        wanted, saved_32 = bn.batch_norm(x.astype(np.float32))
        same(y, rounded(wanted, dtype))
        same_table(saved.moments, saved_32.moments)
        got = bn.backward(dy, saved, num_threads=threads)
        wanted = bn.backward(dy.astype(np.float32), saved_32)
        same(got.dx, rounded(wanted.dx, dtype))
        same(got.dgamma, wanted.dgamma)


def test_large_tensors_stored_around_the_caches_are_rounded_alike(dtype):
    for shape in ((40, 64, 97, 97), (200_000, 67)):
        # A million values, again and again: as many of their own take longer than all that is tried.
        whole = np.resize(random_values(dtype, 1_000_003, 9), int(np.prod(shape)) + 3)
        x = whole[3:].reshape(shape)  # not at the begin of a line of memory
        y, saved = bn.batch_norm(x)
        wanted, saved_32 = bn.batch_norm(x.astype(np.float32))
        same(y, rounded(wanted, dtype))
        same(bn.batch_norm(x, out=x)[0], y)  # in place: ordinary stores
        dx = bn.backward(y, bn.batch_norm(y)[1]).dx
        y_32 = y.astype(np.float32)
        same(dx, rounded(bn.backward(y_32, bn.batch_norm(y_32)[1]).dx, dtype))
        del saved, saved_32


def test_nan_and_infinity_stay_in_their_channel(dtype):
    x = random_values(dtype, (50, 4, 9), 10)
    clean = bn.batch_norm(x)[0]
    x[3, 1, 2], x[4, 2, 5] = np.nan, np.inf
    y, _ = bn.batch_norm(x)
    assert y.dtype == dtype
    assert np.isnan(y[:, 1:3].astype(np.float32)).all()
    same(y[:, [0, 3]], clean[:, [0, 3]])


def test_coefficients_beyond_float32_are_applied_in_float64_as_for_float32(dtype):
    x = random_values(dtype, (64, 3, 20), 11)
    for a in (x, np.ascontiguousarray(np.moveaxis(x, 1, -1)).reshape(-1, 3)):
        mean, var, gamma = [0.1, 0.2, 0.3], [1.0, 1.0, 1.0], [1e-42, 2.0, 1e30]
        got = bn.normalize(a, mean, var, gamma)
        same(got, rounded(bn.normalize(a.astype(np.float32), mean, var, gamma), dtype))
        dx = frozen.backward(a, a, mean, var, gamma).dx
        a_32 = a.astype(np.float32)
        same(dx, rounded(frozen.backward(a_32, a_32, mean, var, gamma).dx, dtype))


def test_gamma_may_be_of_either_type(dtype):
    x = random_values(np.dtype(np.float32), (40, 6), 12)
    gamma = random_values(dtype, 6, 13)
    y, saved = bn.batch_norm(x, gamma, gamma)
    wide = gamma.astype(np.float32)
    wanted, saved_32 = bn.batch_norm(x, wide, wide)
    same(y, wanted)
    got, wanted = bn.backward(x, saved), bn.backward(x, saved_32)
    same(got.dgamma, rounded(wanted.dgamma, dtype))
    same(got.dx, wanted.dx)


def test_out_and_layer_keep_the_dtype_of_x(dtype):
    x = random_values(dtype, (32, 4, 5), 14)
    layer = bn.BatchNorm(4)
    out = np.empty_like(x)
    assert layer(x, out=out) is out
    same(out, bn.batch_norm(x)[0])
    assert layer.backward(out).dtype == dtype
    assert layer.eval()(x).dtype == dtype
    with pytest.raises(TypeError, match=f"out must have dtype {dtype}, got float32"):
        bn.batch_norm(x, out=np.empty(x.shape, np.float32))
    with pytest.raises(TypeError, match=f"dy must have dtype {dtype}, got float32"):
        layer.train()(x)
        layer.backward(np.empty(x.shape, np.float32))


def test_uint16_and_swapped_bytes_are_refused(dtype):
    x = random_values(dtype, (8, 2), 15)
    with pytest.raises(
        TypeError, match=r"x must have dtype float16, bfloat16, float32 or float64 \(write .*\), got uint16"
    ):
        bn.moments(x.view(np.uint16))
    if dtype == np.float16:
        with pytest.raises(TypeError, match=r"x must be in native byte order \(write .*\), got dtype >f2"):
            bn.moments(x.astype(">f2"))


def test_importing_batchnorm_does_not_import_ml_dtypes():
    program = "import sys, batchnorm; sys.exit('ml_dtypes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


BITS = """
import zlib
import ml_dtypes
import numpy as np
import batchnorm as bn
for dtype in (np.float16, ml_dtypes.bfloat16):
    every = np.arange(65536, dtype=np.uint16).view(dtype)
    for shape in ((64, 16, 64), (4096, 16), (5957, 11), (3, 16, 1365)):
        x = every[: np.prod(shape)].reshape(shape)
        n = shape[1]
        y = bn.normalize(x, np.linspace(-1, 1, n), np.linspace(0.5, 2, n), np.linspace(-2, 2, n))
        given = np.zeros(n), np.ones(n)
        dx = bn.backward(x, bn.Saved(x, None, np.linspace(-2, 2, n), 1, 1e-5, given=given)).dx
        z = np.random.default_rng(1).standard_normal(shape).astype(np.float32).astype(dtype)
        w, saved = bn.batch_norm(z)
        for a in (y, dx, w, bn.backward(w, saved).dx, np.asarray(saved.moments._table)):
            wide = a.astype(np.float64)
            print(zlib.crc32(np.where(np.isnan(wide), 12345.0, wide).tobytes()))
"""


def test_every_instruction_set_gives_the_same_bits():
    def bits(isa):
        environment = {**os.environ, "BATCHNORM_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", BITS],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    isas = bn.available_isas()
    results = {isa: bits(isa) for isa in isas}
    assert len(set(results.values())) == 1, {isa: hash(text) for isa, text in results.items()}
    assert results[isas[0]].count("\n") == len(list(product(range(2), range(4), range(5))))


COUNTED = {
    "mask": lambda rng: {"mask": rng.random((6, 40)) < 0.6},
    "keep": lambda rng: {"mask": rng.random((6, 40)) < 0.6, "padding": "keep"},
    "weights": lambda rng: {"weights": rng.integers(0, 3, (6, 40)) * 0.75},
    "lengths": lambda rng: {"lengths": [3, 40, 0, 7, 9, 1]},
    "segments": lambda rng: {"segments": [0, 0, 1, 1, 1, 2]},
}


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("kind", COUNTED)
def test_parts_of_a_batch_give_the_rounded_float32_results(dtype, kind, axis):
    rng = np.random.default_rng(0)
    x, dy = (np.ascontiguousarray(np.moveaxis(random_values(dtype, (6, 5, 40), k), 1, axis)) for k in (1, 2))
    gamma, counted = rng.normal(size=5).astype(np.float32), COUNTED[kind](rng)
    y, saved = bn.batch_norm(x, gamma, axis=axis, **counted)
    wide_y, wide_saved = bn.batch_norm(x.astype(np.float32), gamma, axis=axis, **counted)
    same(y, rounded(wide_y, dtype))
    assert saved.moments == wide_saved.moments
    got, wide = bn.backward(dy, saved), bn.backward(dy.astype(np.float32), wide_saved)
    same(got.dx, rounded(wide.dx, dtype))
    assert (got.dgamma == wide.dgamma).all()


def test_derivatives_are_the_rounded_float32_derivatives(dtype):
    x, dy, v = (random_values(dtype, (6, 5, 40), k) for k in range(3))
    gamma = np.linspace(-1, 2, 5).astype(np.float32)
    _, saved = bn.batch_norm(x, gamma)
    _, wide = bn.batch_norm(x.astype(np.float32), gamma)
    jvp = bn.jvp(v, saved, gamma_dot=gamma)
    same(jvp, rounded(bn.jvp(v.astype(np.float32), wide, gamma_dot=gamma), dtype))
    second = bn.double_backward(v, dy, saved, v_dgamma=gamma)
    wide_second = bn.double_backward(v.astype(np.float32), dy.astype(np.float32), wide, v_dgamma=gamma)
    same(second.ddy, rounded(wide_second.ddy, dtype))
    same(second.dx, rounded(wide_second.dx, dtype))
    assert (second.dgamma == wide_second.dgamma).all()


def test_a_backward_from_y_wants_more_digits_than_16_bits_have(dtype):
    x = random_values(dtype, (6, 5), 0)
    before = x.copy()
    with pytest.raises(TypeError, match="x must have dtype float32 or float64 for keep='y', got"):
        bn.batch_norm(x, np.ones(5), keep="y")
    same(x, before)
