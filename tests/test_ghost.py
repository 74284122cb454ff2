"""Ghost batch norm: every ghost is a batch of its own, gamma and beta are shared, running statistics see ghosts in order."""

import dataclasses
import math
import tracemalloc

import numpy as np
import pytest

import batchnorm as bn
import reference
from differences import central_difference, complex_step, each_derivative
from tolerances import assert_forward, assert_within

EPS = 1e-3
# Of 4, 3 or 97 samples: whole ghosts, one smaller at the end, one ghost for all.
SIZES = {"nchw": (1, 2, 3, 4), "nhwc": (2, 3), "nc": (2, 5, 96 // 3, 200), "channel_in_the_middle": (1, 2)}


def layout_and_sizes(layout):
    """Ghost sizes under which every ghost of the layout has two values a channel."""
    return [size for size in SIZES[layout.name] if layout.name != "nc" or layout.shape[0] % size != 1]


def problem(layout, dtype):
    rng = np.random.default_rng(21)
    gamma, beta = rng.uniform(-2, 2, layout.channels), rng.normal(size=layout.channels)
    dy = rng.normal(size=layout.shape).astype(dtype)
    return layout.normal(dtype), dy, gamma.astype(dtype), beta.astype(dtype)


def exact_sum(values):
    """Add (C,) Exacts, each part rounded once."""
    parts = np.array([part for value in values for part in (value.high, value.low)])
    high = np.array([math.fsum(column) for column in parts.T])
    low = np.array([math.fsum([*column, -h]) for column, h in zip(parts.T, high, strict=True)])
    return reference.Exact(high, low)


# ---- forward ----


@pytest.mark.parametrize("has_affine", [False, True], ids=["no_affine", "affine"])
def test_every_ghost_keeps_the_contract_of_batch_norm(layout, dtype, has_affine):
    x, _, gamma, beta = problem(layout, dtype)
    if not has_affine:
        gamma = beta = None
    for size in layout_and_sizes(layout):
        y, saved = bn.batch_norm(x, gamma, beta, ghost_size=size, axis=layout.axis, eps=EPS)
        parts = reference.ghosts(len(x), size)
        of_ghosts = saved.moments.split(layout.channels)
        assert len(of_ghosts) == len(parts)
        for part, moments in zip(parts, of_ghosts, strict=True):
            exact = reference.exact_forward(x[part], gamma, beta, axis=layout.axis, eps=EPS)
            scales = reference.forward_scales(x[part], gamma, beta, exact, axis=layout.axis)
            rstd = bn.Saved(x[part], moments, gamma, layout.axis % x.ndim, EPS).rstd
            statistics = moments.mean, moments.var(), rstd
            assert_forward(y[part], statistics, exact, scales, dtype)


def test_a_ghost_of_the_whole_batch_is_batch_norm_to_the_bit(layout, dtype):
    x, dy, gamma, beta = problem(layout, dtype)
    expected, saved = bn.batch_norm(x, gamma, beta, axis=layout.axis)
    for size in (len(x), len(x) + 1, 10**30):
        y, ghost_saved = bn.batch_norm(x, gamma, beta, ghost_size=size, axis=layout.axis)
        np.testing.assert_array_equal(y, expected)
        assert ghost_saved.moments == saved.moments
        np.testing.assert_array_equal(bn.backward(dy, ghost_saved).dx, bn.backward(dy, saved).dx)


def test_ghosts_are_segments_to_the_bit(layout, dtype):
    x, dy, gamma, beta = problem(layout, dtype)
    for size in layout_and_sizes(layout):
        results = []
        for shared in ({"ghost_size": size}, {"segments": np.arange(len(x)) // size}):
            y, saved = bn.batch_norm(x, gamma, beta, axis=layout.axis, **shared)
            arrays = (y, *bn.backward(dy, saved)[:3], *bn.update_running(beta, gamma**2, saved))
            results.append([a.tobytes() for a in arrays])
            assert bn.moments(x, axis=layout.axis, **shared) == saved.moments
        assert results[0] == results[1]


def test_the_last_ghost_holds_the_samples_that_are_left():
    x = np.random.default_rng(0).normal(size=(10, 3))
    y, saved = bn.batch_norm(x, ghost_size=4)
    assert [m.count[0] for m in saved.moments.split(3)] == [4, 4, 2]
    np.testing.assert_array_equal(y[8:], bn.batch_norm(x[8:])[0])


def test_ghosts_do_not_see_each_other():
    x = np.random.default_rng(1).normal(size=(6, 2, 3))
    other = x.copy()
    other[2:4] = 1e30
    a, b = (bn.batch_norm(values, ghost_size=2)[0] for values in (x, other))
    np.testing.assert_array_equal(np.delete(a, [2, 3], 0), np.delete(b, [2, 3], 0))


def test_nan_stays_in_its_ghost_and_channel():
    x = np.random.default_rng(2).normal(size=(6, 3, 2)).astype(np.float32)
    x[2, 1, 0] = np.nan
    y, saved = bn.batch_norm(x, ghost_size=2)
    dx, dgamma, _, _ = bn.backward(np.ones_like(x), saved)
    hit = np.zeros(x.shape, bool)
    hit[2:4, 1] = True
    for values in (y, dx):
        np.testing.assert_array_equal(np.isnan(values), hit)
    np.testing.assert_array_equal(np.isnan(dgamma), [False, True, False])


def test_merged_moments_are_those_of_the_batch(layout, dtype):
    x, *_ = problem(layout, dtype)
    saved = bn.batch_norm(x, ghost_size=2, axis=layout.axis)[1] if layout.name != "nc" else None
    saved = saved or bn.batch_norm(x, ghost_size=5, axis=layout.axis)[1]
    merged, whole = bn.merge(*saved.moments.split(layout.channels)), bn.moments(x, axis=layout.axis)
    np.testing.assert_array_equal(merged.count, whole.count)
    assert_within("merge", "float64", merged.mean, whole.mean, scale=np.abs(x).max())
    assert_within("merge", "float64", merged.m2, whole.m2, scale=(x.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize(
    "shape", [(0, 3), (0, 3, 4), (4, 0), (4, 3, 0), (1, 0, 1)], ids=lambda shape: "x".join(map(str, shape))
)
def test_no_values_give_no_values(shape):
    x = np.empty(shape, np.float32)
    y, saved = bn.batch_norm(x, ghost_size=2)
    dx, dgamma, dbeta, _ = bn.backward(x, saved)
    assert y.shape == dx.shape == shape
    for gradient in (dgamma, dbeta):
        np.testing.assert_array_equal(gradient, np.zeros(shape[1]))
    mean, var = bn.update_running(np.full(shape[1], 2.0), np.full(shape[1], 3.0), saved)
    np.testing.assert_array_equal(mean, np.full(shape[1], 2.0))
    np.testing.assert_array_equal(var, np.full(shape[1], 3.0))


# ---- running statistics ----


@pytest.mark.parametrize("ddof", [0, 1])
def test_running_statistics_see_the_ghosts_one_after_another(ddof):
    x = np.random.default_rng(3).normal(2, 3, size=(11, 4))
    saved = bn.batch_norm(x, ghost_size=3)[1]
    mean, var = np.full(4, 0.5), np.full(4, 1.5)
    got = bn.update_running(mean, var, saved, update_rate=0.2, ddof=ddof)
    for part in reference.ghosts(11, 3):
        mean = reference.running_update(mean, x[part].mean(0), 0.2)
        var = reference.running_update(var, x[part].var(0, ddof=ddof), 0.2)
    for value, expected in zip(got, (mean, var), strict=True):
        assert_within("oracles", "float64", value, expected, scale=np.abs(expected).max())


def test_the_last_ghost_counts_most():
    # mu = (1 - rate)^k mu + sum of (1 - rate)^(k - i) rate mu_i
    x = np.repeat([1.0, 0.0, 0.0], 2)[:, None]
    first, last = (bn.batch_norm(values, ghost_size=2)[1] for values in (x, x[::-1].copy()))
    assert bn.update_running([0.0], [0.0], first, update_rate=0.5)[0] == [0.125]
    assert bn.update_running([0.0], [0.0], last, update_rate=0.5)[0] == [0.5]


def test_updating_changes_no_argument():
    saved = bn.batch_norm(np.eye(4), ghost_size=2)[1]
    mean, var = np.zeros(4), np.ones(4)
    bn.update_running(mean, var, saved)
    np.testing.assert_array_equal(mean, np.zeros(4))
    np.testing.assert_array_equal(var, np.ones(4))


# ---- backward ----


@pytest.mark.parametrize("has_gamma", [False, True], ids=["no_gamma", "gamma"])
def test_backward_keeps_the_contract_of_batch_norm(layout, dtype, has_gamma):
    x, dy, gamma, _ = problem(layout, dtype)
    gamma, options = gamma if has_gamma else None, {"axis": layout.axis, "eps": EPS}
    for size in layout_and_sizes(layout):
        _, saved = bn.batch_norm(x, gamma, ghost_size=size, **options)
        dx, dgamma, dbeta, _ = bn.backward(dy, saved)
        found = []
        for part in reference.ghosts(len(x), size):
            forward = reference.exact_forward(x[part], gamma, **options)
            exact = reference.exact_backward(dy[part], x[part], gamma, **options)
            scales = reference.backward_scales(dy[part], x[part], gamma, forward, exact, axis=layout.axis)
            assert_within("dx", dtype, dx[part], exact.dx, scale=scales.dx)
            found.append((exact, scales))
        for name, got in (("dgamma", dgamma), ("dbeta", dbeta)):
            exact = exact_sum([getattr(e, name) for e, _ in found])
            assert_within(name, dtype, got, exact, scale=sum(getattr(s, name) for _, s in found))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_thousand_ghosts_add_up_as_exactly_as_one(dtype):
    # Terms of one large ghost and many small ones: a plain float64 sum would lose most of each small one.
    rng = np.random.default_rng(4)
    x, dy = rng.normal(size=(2000, 2)).astype(dtype), rng.normal(size=(2000, 2)).astype(dtype)
    dy[:2] = 1e15, 3e15
    dy[-2:] = -dy[:2]
    dbeta = bn.backward(dy, bn.batch_norm(x, ghost_size=2)[1], needs=["beta"]).dbeta
    pairs = dy.astype(np.float64).reshape(1000, 2, 2).sum(1)  # what each ghost may have rounded
    expected = [math.fsum(column) for column in pairs.T]
    np.testing.assert_allclose(dbeta, expected, rtol=0, atol=2.0**-52 * np.abs(expected).max() + 1e-12)


def test_the_sums_of_ghosts_are_rounded_to_the_dtype_of_gamma_once():
    # The ghosts have sums of 2^24 + 1 and -2^24: each rounded to float32 first, they would add up to 0.
    x = np.tile(np.array([[-1.0], [1.0]], np.float32), (2, 1))
    dy = np.array([[0.0], [2.0**24 + 1], [0.0], [-(2.0**24)]])
    _, saved = bn.batch_norm(x.astype(np.float64), np.ones(1, np.float32), ghost_size=2, eps=0.0)
    _, dgamma, dbeta, _ = bn.backward(dy, saved)
    assert dgamma == dbeta == [1.0]
    assert dgamma.dtype == dbeta.dtype == np.float32


GRADIENT_SHAPE = (5, 3, 2)  # ghosts of 2, 2 and 1 samples


def gradient_problem():
    rng = np.random.default_rng(31)
    shape = GRADIENT_SHAPE
    return rng.normal(1, 2, shape), rng.normal(size=3), rng.normal(size=3), rng.normal(size=shape)


def test_backward_equals_the_complex_step_of_the_formula():
    x, gamma, beta, weights = gradient_problem()

    def loss(x, gamma, beta):
        ghosts = reference.ghost_forward(x, gamma, beta, ghost_size=2, axis=1, eps=EPS)
        return (weights * np.concatenate([ghost.y for ghost in ghosts])).sum()

    expected = each_derivative(loss, (x, gamma, beta), complex_step)
    saved = bn.batch_norm(x, gamma, beta, ghost_size=2, eps=EPS)[1]
    ours = bn.backward(weights, saved)
    oracle = reference.ghost_backward(weights, x, gamma, ghost_size=2, axis=1, eps=EPS)
    for got, written, derivative in zip(ours[:3], oracle, expected, strict=True):
        for value in (got, written):
            assert_within("complex step", "float64", value, derivative, scale=np.abs(derivative).max())


def test_backward_equals_the_central_differences_of_forward():
    x, gamma, beta, weights = gradient_problem()

    def loss(x, gamma, beta):
        return (weights * bn.batch_norm(x, gamma, beta, ghost_size=2, eps=EPS)[0]).sum()

    expected = each_derivative(loss, (x, gamma, beta), central_difference)
    ours = bn.backward(weights, bn.batch_norm(x, gamma, beta, ghost_size=2, eps=EPS)[1])
    for got, derivative in zip(ours[:3], expected, strict=True):
        assert_within("central difference", "float64", got, derivative, scale=np.abs(derivative).max())


@pytest.mark.parametrize("names", [(), ("x",), ("gamma",), ("beta",), ("x", "beta"), ("gamma", "beta")])
def test_only_what_is_needed_is_computed(names):
    x = np.random.default_rng(5).normal(size=(6, 3))
    saved = bn.batch_norm(x, np.ones(3), ghost_size=3)[1]
    everything, some = (bn.backward(x, saved, **o) for o in ({}, {"needs": iter(names)}))
    for name, whole, got in zip(("x", "gamma", "beta"), everything[:3], some[:3], strict=True):
        if name in names:
            np.testing.assert_array_equal(got, whole)
        else:
            assert got is None


@pytest.mark.parametrize("gamma_dtype", ["float16", "float32", "float64"])
def test_gradients_of_gamma_and_beta_have_the_dtype_of_gamma(dtype, gamma_dtype):
    x = np.random.default_rng(5).normal(size=(6, 3)).astype(dtype)
    saved = bn.batch_norm(x, np.ones(3, gamma_dtype), ghost_size=3)[1]
    dx, dgamma, dbeta, _ = bn.backward(x, saved)
    assert [dx.dtype, dgamma.dtype, dbeta.dtype] == [dtype, gamma_dtype, gamma_dtype]


# ---- memory ----


@pytest.mark.parametrize("target", ["new", "x"])
def test_out_holds_the_same_bits(layout, dtype, target):
    x, dy, gamma, beta = problem(layout, dtype)
    options = {"ghost_size": 5 if layout.name == "nc" else 3, "axis": layout.axis}
    y, saved = bn.batch_norm(x, gamma, beta, **options)
    out = np.empty_like(x) if target == "new" else x.copy()
    given, out_saved = bn.batch_norm(x if target == "new" else out, gamma, beta, out=out, **options)
    assert given is out
    assert (out_saved.x is None) == (target == "x")
    np.testing.assert_array_equal(out, y)
    dx = bn.backward(dy, saved).dx
    out = np.empty_like(x) if target == "new" else dy
    assert bn.backward(dy, saved, out=out).dx is out
    np.testing.assert_array_equal(out, dx)


def test_dx_may_overwrite_x():
    x = np.random.default_rng(6).normal(size=(6, 3))
    dy = np.random.default_rng(7).normal(size=(6, 3))
    saved = bn.batch_norm(x, ghost_size=2)[1]
    dx = bn.backward(dy, saved).dx
    bn.backward(dy, saved, out=x)
    np.testing.assert_array_equal(x, dx)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda a: np.asfortranarray(a),
        lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        lambda a: np.repeat(a, 2, 0)[::2],
        lambda a: a[::-1].copy()[::-1],
    ],
    ids=["fortran", "channels_last", "strided", "reversed"],
)
def test_memory_order_changes_no_value(arrange):
    rng = np.random.default_rng(8)
    x, dy = rng.normal(size=(6, 3, 4, 5)), rng.normal(size=(6, 3, 4, 5))
    results = []
    for a, b in ((x, dy), (arrange(x), arrange(dy))):
        y, saved = bn.batch_norm(a, ghost_size=4)
        results.append((y, *bn.backward(b, saved)[:3]))
    assert results[1][0].strides == bn.batch_norm(arrange(x))[0].strides
    for one, other in zip(*results, strict=True):
        assert_within("oracles", "float64", other, one, scale=np.abs(one).max())


def test_a_contiguous_x_is_not_copied():
    x = np.random.default_rng(9).normal(size=(64, 8, 32, 32))
    out = np.empty_like(x)
    tracemalloc.start()
    saved = bn.batch_norm(x, ghost_size=16, out=out)[1]
    bn.backward(x, saved, out=out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 4 / 10  # a tenth of one ghost: room for statistics, not for values


def test_any_number_of_threads_gives_the_same_bits(threads):
    x = np.random.default_rng(10).normal(size=(64, 8, 32, 32)).astype(np.float32)
    results = []
    for n in (1, threads):
        y, saved = bn.batch_norm(x, ghost_size=24, num_threads=n)
        results.append((y, *bn.backward(x, saved, num_threads=n)[:3]))
    for one, many in zip(*results, strict=True):
        np.testing.assert_array_equal(one, many)


# ---- errors ----


class Arrays:
    def __init__(self):
        rng = np.random.default_rng(41)
        self.x, self.dy = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
        self.gamma, self.short, self.one = np.ones(3), np.ones(2), np.ones(1)
        self.out, self.buffer = np.full((5, 3), 7.0), np.arange(18.0)
        self.shifted = [self.buffer[start : start + 15].reshape(5, 3) for start in (0, 3)]
        self.saved = bn.batch_norm(self.x, self.gamma, ghost_size=3)[1]

    def bytes(self):
        return {name: value.tobytes() for name, value in vars(self).items() if isinstance(value, np.ndarray)}


def forward(a, x=None, gamma=None, beta=None, *, ghost_size=3, **options):
    x = a.x if x is None else x
    return bn.batch_norm(x, gamma, beta, ghost_size=ghost_size, **{"out": a.out} | options)


def backward(a, dy=None, **options):
    saved = dataclasses.replace(a.saved, **options.pop("saved", {}))
    return bn.backward(a.dy if dy is None else dy, saved, **{"out": a.out} | options)


TOO_FEW = "ghost_size must leave every ghost at least 2 values per channel, got a ghost of 1 from "
MISTAKES = {
    "ghost of one": (
        lambda a: forward(a, ghost_size=1),
        ValueError,
        TOO_FEW + "ghost_size 1 and shape (5, 3)",
    ),
    "last of one": (
        lambda a: forward(a, ghost_size=4),
        ValueError,
        TOO_FEW + "ghost_size 4 and shape (5, 3)",
    ),
    "one sample": (
        lambda a: forward(a, a.x[:1], out=None),
        ValueError,
        TOO_FEW + "ghost_size 3 and shape (1, 3)",
    ),
    "size 0": (lambda a: forward(a, ghost_size=0), ValueError, "ghost_size must be an int >= 1, got 0"),
    "size float": (
        lambda a: forward(a, ghost_size=2.0),
        TypeError,
        "ghost_size must be an int >= 1, got float",
    ),
    "axis 0": (
        lambda a: forward(a, axis=-2),
        ValueError,
        "axis must not be 0, which holds the samples that ghosts are made of, got 0",
    ),
    "x": (
        lambda a: forward(a, [[1.0]]),
        TypeError,
        "x must be a numpy.ndarray (write np.asarray(x, np.float32)), got list",
    ),
    "gamma": (lambda a: forward(a, gamma=a.short), ValueError, "gamma must have shape (3,), got (2,)"),
    "beta": (lambda a: forward(a, beta=a.short), ValueError, "beta must have shape (3,), got (2,)"),
    "eps": (lambda a: forward(a, eps=-1.0), ValueError, "eps must be finite and >= 0, got -1.0"),
    "threads": (
        lambda a: forward(a, num_threads=0),
        ValueError,
        "num_threads must be an int >= 1 or None, got 0",
    ),
    "out": (lambda a: forward(a, out=a.dy[:4]), ValueError, "out must have shape (5, 3), got (4, 3)"),
    "overlap of a later ghost": (
        lambda a: forward(a, a.shifted[0], out=a.shifted[1]),
        ValueError,
        "out must be x itself or share no memory with x, got a partial overlap",
    ),
    "dy": (lambda a: backward(a, a.dy[:4]), ValueError, "dy must have shape (5, 3), got (4, 3)"),
    "needs": (
        lambda a: backward(a, needs=["w"]),
        ValueError,
        "needs must name some of 'x', 'gamma', 'beta', 'residual', got 'w'",
    ),
    "threads of backward": (
        lambda a: backward(a, num_threads=0),
        ValueError,
        "num_threads must be an int >= 1 or None, got 0",
    ),
    "dx out": (lambda a: backward(a, out=a.dy[:4]), ValueError, "out must have shape (5, 3), got (4, 3)"),
    "x overwritten": (
        lambda a: backward(a, saved={"x": None}),
        ValueError,
        "saved must hold x, got that of a call with out=x, which has overwritten it, or with keep=None",
    ),
    "saved axis": (
        lambda a: backward(a, saved={"axis": -1}),
        ValueError,
        "saved.axis must be >= 0, got -1",
    ),
    "moments of one ghost": (
        lambda a: backward(a, saved={"moments": a.saved.moments.split(3)[0]}),
        ValueError,
        "saved.moments must have 6 channels, got 3",
    ),
    "moments of another kind": (
        lambda a: backward(a, saved={"moments": None}),
        TypeError,
        "saved.moments must be Moments, got None",
    ),
    "saved gamma": (
        lambda a: backward(a, saved={"gamma": a.short}),
        ValueError,
        "gamma must have shape (3,), got (2,)",
    ),
    "running moments": (
        lambda a: bn.update_running(a.gamma, a.gamma, a.saved.moments.split(3)),
        TypeError,
        "batch must be what batch_norm saved, or Moments, got tuple",
    ),
    "running segments": (
        lambda a: bn.update_running(a.gamma, a.gamma, a.saved, segments="all"),
        ValueError,
        "segments must be 'each' or 'pooled', got 'all'",
    ),
    "split": (
        lambda a: a.saved.moments.split(4),
        ValueError,
        "channels must divide 6, the entries there are, got 4",
    ),
    "running shape": (
        lambda a: bn.update_running(a.short, a.gamma, a.saved),
        ValueError,
        "running_mean must have shape (3,), got (2,)",
    ),
    "running rate of no ghosts": (
        lambda a: bn.update_running(a.gamma, a.gamma, forward(a, a.x[:0], out=None)[1], update_rate=2),
        ValueError,
        "update_rate must be from 0 to 1, got 2.0",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_changes_nothing(name):
    call, error, text = MISTAKES[name]
    arrays = Arrays()
    before = arrays.bytes()
    with pytest.raises(error) as raised:
        call(arrays)
    assert str(raised.value) == text
    assert arrays.bytes() == before
