"""Batch Renormalization: the formula, its gradients with r and d constant, and the rules of those it is compared with."""

import dataclasses

import numpy as np
import pytest

import batchnorm as bn
import reference
from differences import complex_step, each_derivative
from tolerances import assert_within

EPS = 1e-3
LIMITS = {"r_max": 1.5, "d_max": 0.5}
OF_RENORM = ("r_max", "d_max", "weight", "r_min", "parity", "samples")


def batch_renorm(x, mean, var, gamma=None, beta=None, **options):
    limits = {name: options.pop(name) for name in OF_RENORM if name in options}
    return bn.batch_norm(x, gamma, beta, renorm=bn.Renorm(mean, var, **limits), **options)


def problem(layout, dtype):
    rng = np.random.default_rng(51)
    gamma, beta = rng.uniform(-2, 2, layout.channels), rng.normal(size=layout.channels)
    mean, var = rng.normal(0, 3, layout.channels), rng.uniform(0.2, 4, layout.channels)
    return layout.normal(dtype), gamma.astype(dtype), beta.astype(dtype), mean, var


def assert_close(got, expected):
    """Both in float64, on well-conditioned data."""
    assert_within("oracles", "float64", got, expected, scale=np.abs(expected).max())


@pytest.mark.parametrize("has_affine", [False, True], ids=["no_affine", "affine"])
def test_y_is_the_formula_within_the_contract(layout, dtype, has_affine):
    x, gamma, beta, mean, var = problem(layout, dtype)
    gamma, beta = (gamma, beta) if has_affine else (None, None)
    options = {"axis": layout.axis, "eps": EPS}
    y, saved = batch_renorm(x, mean, var, gamma, beta, **LIMITS, **options)
    r, d = reference.renorm_correction(x, mean, var, r_min=1 / 1.5, **LIMITS, **options)
    assert_close(saved.r, r)
    assert_close(saved.d, d)
    expected = reference.renorm_forward(x, r, d, gamma, beta, **options)
    exact = reference.exact_forward(x, gamma, beta, **options)
    scale, shift = (1.0, 0.0) if gamma is None else (gamma.astype(np.float64), beta.astype(np.float64))
    scales = reference.forward_scales(x, scale * r, shift + scale * d, exact, axis=layout.axis)
    if dtype == np.float32:  # in float64 the oracle itself is no better than the bound
        assert_within("y", dtype, y, expected, scale=scales.y, at=np.maximum(abs(expected), scales.y_at))
    else:
        assert_close(y, expected)


def test_limits_of_one_and_zero_are_batch_norm(layout, dtype):
    x, gamma, beta, mean, var = problem(layout, dtype)
    y, saved = batch_renorm(x, mean, var, gamma, beta, r_max=1, d_max=0, axis=layout.axis, eps=EPS)
    exact = reference.exact_forward(x, gamma, beta, axis=layout.axis, eps=EPS)
    scales = reference.forward_scales(x, gamma, beta, exact, axis=layout.axis)
    assert_within("y", dtype, y, exact.y, scale=scales.y, at=scales.y_at)
    np.testing.assert_array_equal(saved.r, 1)
    np.testing.assert_array_equal(saved.d, 0)


def test_without_clipping_training_is_evaluation(layout):
    x, gamma, beta, mean, var = problem(layout, np.float64)
    options = {"axis": layout.axis, "eps": EPS}
    y, _ = batch_renorm(x, mean, var, gamma, beta, r_max=np.inf, d_max=np.inf, **options)
    assert_close(y, bn.normalize(x, mean, var, gamma, beta, **options))


def test_a_mean_far_above_the_spread_costs_no_accuracy():
    x = 1e8 + np.random.default_rng(0).normal(size=(50, 2))
    y, _ = batch_renorm(x, x.mean(0), x.var(0), r_max=1, d_max=0)
    expected = reference.exact_forward(x, axis=1, eps=1e-5)
    scales = reference.forward_scales(x, None, None, expected, axis=1)
    assert_within("y", "float64", y, expected.y, scale=scales.y, at=scales.y_at)


def test_a_running_spread_of_zero_leaves_batch_norm():
    x = np.array([[1.0, 2.0], [3.0, 2.0]])
    y, saved = batch_renorm(x, [0.0, 0.0], [0.0, 0.0], **LIMITS, eps=0.0)
    np.testing.assert_array_equal(y, [[-1, 0], [1, 0]])
    np.testing.assert_array_equal([saved.r, saved.d], [[1, 1], [0, 0]])


def test_nan_stays_in_its_channel():
    x = np.random.default_rng(1).normal(size=(4, 3))
    x[0, 0] = np.nan
    y, saved = batch_renorm(x, [0.0, np.nan, 0.0], np.ones(3), **LIMITS)
    np.testing.assert_array_equal(np.isnan(y).all(0), [True, True, False])
    mean, var = bn.update_running([0.0, np.nan, 0.0], np.ones(3), saved)
    np.testing.assert_array_equal(np.isnan(mean), [True, True, False])
    np.testing.assert_array_equal(np.isnan(var), [True, False, False])


@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0), (4, 0)])
def test_no_values_give_no_values_and_leave_running_statistics(shape):
    x = np.empty(shape)
    mean, var = np.full(shape[1], 2.0), np.full(shape[1], 3.0)
    for parity in ("paper", "keras", "torchrl"):
        y, saved = batch_renorm(x, mean, var, **LIMITS, parity=parity)
        dx, dgamma, dbeta, _ = bn.backward(x, saved)
        assert y.shape == dx.shape == shape
        for gradient in (dgamma, dbeta):
            np.testing.assert_array_equal(gradient, np.zeros(shape[1]))
        if x.shape[0]:
            new = bn.update_running(mean, var, saved)
            np.testing.assert_array_equal(new, (mean, var))


# ---- backward ----

SHAPE = (4, 3, 2)


def gradient_problem():
    rng = np.random.default_rng(61)
    x, gamma, beta, weights = rng.normal(1, 2, SHAPE), *rng.normal(size=(2, 3)), rng.normal(size=SHAPE)
    _, saved = batch_renorm(x, [0.5, 2.0, 1.0], [1.0, 9.0, 4.0], gamma, beta, **LIMITS, eps=EPS)
    return x, gamma, beta, weights, saved


def test_backward_equals_the_complex_step_with_r_and_d_constant():
    x, gamma, beta, weights, saved = gradient_problem()

    def loss(x, gamma, beta):
        return (weights * reference.renorm_forward(x, saved.r, saved.d, gamma, beta, axis=1, eps=EPS)).sum()

    expected = each_derivative(loss, (x, gamma, beta), complex_step)
    for got, derivative in zip(bn.backward(weights, saved)[:3], expected, strict=True):
        assert_within("complex step", "float64", got, derivative, scale=np.abs(derivative).max())


@pytest.mark.parametrize("gamma_dtype", [None, "float16", "float32", "float64"])
def test_gradients_have_the_dtype_of_gamma_and_only_what_is_needed(dtype, gamma_dtype):
    x = np.random.default_rng(2).normal(size=(5, 3)).astype(dtype)
    gamma = None if gamma_dtype is None else np.ones(3, gamma_dtype)
    _, saved = batch_renorm(x, np.zeros(3), np.ones(3), gamma, **LIMITS)
    everything = bn.backward(x, saved)
    assert everything.dgamma.dtype == everything.dbeta.dtype == np.dtype(gamma_dtype or "float64")
    for position, name in enumerate(("x", "gamma", "beta")):
        some = bn.backward(x, saved, needs=[name])
        assert [value is None for value in some[:3]] == [k != position for k in range(3)]
        np.testing.assert_array_equal(some[position], everything[position])


@pytest.mark.parametrize("target", ["new", "input"])
def test_out_holds_the_same_bits(layout, dtype, target):
    x, gamma, beta, mean, var = problem(layout, dtype)
    dy = x[::-1].copy()
    y, saved = batch_renorm(x, mean, var, gamma, beta, **LIMITS, axis=layout.axis)
    dx = bn.backward(dy, saved).dx
    out = np.empty_like(x) if target == "new" else dy
    assert bn.backward(dy, saved, out=out).dx is out
    np.testing.assert_array_equal(out, dx)
    out = np.empty_like(x) if target == "new" else x
    given, saved = batch_renorm(x, mean, var, gamma, beta, **LIMITS, axis=layout.axis, out=out)
    assert given is out
    assert (saved.x is None) == (target == "input")
    np.testing.assert_array_equal(out, y)


# ---- parity: one layer each, as its source computes it, over several steps ----


def test_parity_paper_is_algorithm_1():
    rng, schedule = np.random.default_rng(3), bn.RenormSchedule(((0, 1.0), (4, 3.0)), ((0, 0.0), (2, 5.0)))
    mean, var, mu, sigma = np.zeros(3), np.full(3, 1 - EPS), np.zeros(3), np.ones(3)
    for step in range(6):
        x = rng.normal(1, 2, (4, 3))
        limits = schedule(step)
        y, saved = batch_renorm(x, mean, var, **limits._asdict(), eps=EPS)
        mean, var = bn.update_running(mean, var, saved, update_rate=0.2)
        mu_b, sigma_b = x.mean(0), np.sqrt(EPS + x.var(0))
        r = np.clip(sigma_b / sigma, 1 / limits.r_max, limits.r_max)
        d = np.clip((mu_b - mu) / sigma, -limits.d_max, limits.d_max)
        assert_close(y, (x - mu_b) / sigma_b * r + d)
        mu, sigma = mu + 0.2 * (mu_b - mu), sigma + 0.2 * (sigma_b - sigma)
        assert_close(bn.normalize(x, mean, var, eps=EPS), (x - mu) / sigma)


@pytest.mark.parametrize("clip", [(0.0, np.inf, np.inf), (0.8, 1.25, 0.3)], ids=["no_clip", "clip"])
def test_parity_keras_is_its_formula_with_two_averages(clip):
    rng, (r_min, r_max, d_max) = np.random.default_rng(4), clip
    start = np.zeros(3), np.full(3, 1 - EPS)  # a stddev of 1, which Keras starts from without eps
    train, evaluate = start, start
    renorm_mean, renorm_std, moving_mean, moving_std = np.zeros(3), np.ones(3), np.zeros(3), np.ones(3)
    for _ in range(6):
        x = rng.normal(1, 2, (4, 3))
        limits = {"r_min": r_min, "r_max": r_max, "d_max": d_max}
        y, saved = batch_renorm(x, *train, **limits, parity="keras", eps=EPS)
        train = bn.update_running(*train, saved, update_rate=0.3)
        evaluate = bn.update_running(*evaluate, saved, update_rate=0.1)
        mean, std = x.mean(0), np.sqrt(x.var(0) + EPS)
        floor = np.maximum(renorm_std, np.sqrt(EPS))
        r = np.minimum(np.maximum(std / floor, r_min), r_max)
        d = np.clip((mean - renorm_mean) / floor, -d_max, d_max)
        assert_close(y, (x - mean) / std * r + d)
        renorm_mean, renorm_std = renorm_mean * 0.7 + mean * 0.3, renorm_std * 0.7 + std * 0.3
        moving_mean, moving_std = moving_mean * 0.9 + mean * 0.1, moving_std * 0.9 + std * 0.1
        moving_var = np.maximum(moving_std**2 - EPS, 0)
        assert_close(bn.normalize(x, *evaluate, eps=EPS), (x - moving_mean) / np.sqrt(moving_var + EPS))


@pytest.mark.parametrize("smooth", [False, True], ids=["hard", "smooth"])
def test_parity_torchrl_is_its_formula_until_the_warm_up_ends(smooth):
    rng, warmup = np.random.default_rng(5), 3
    schedule = bn.RenormSchedule.torchrl(warmup, smooth=smooth)
    mean, var, running_mean, running_var = np.zeros(3), np.ones(3), np.zeros(3), np.ones(3)
    for step in range(8):
        x = rng.normal(1, 2, (4, 3, 2))
        weight = step / warmup if smooth else step // warmup
        limits = schedule(step)
        assert limits.weight == pytest.approx(min(weight, 1))
        # Past the warm-up its weight goes on growing: that is asked for by hand.
        y, saved = batch_renorm(x, mean, var, **(limits._asdict() | {"weight": weight}), parity="torchrl", eps=EPS)
        mean, var = bn.update_running(mean, var, saved, update_rate=0.2)
        b_mean, b_var = x.mean((0, 2)), x.var((0, 2))
        b_std, std = np.sqrt(b_var + EPS), np.sqrt(running_var + EPS)
        r = 1 + (np.clip(b_std / std, 1 / 3, 3) - 1) * weight
        d = np.clip((b_mean - running_mean) / std, -5, 5) * weight
        shape = (1, 3, 1)
        expected = (x - b_mean.reshape(shape)) / b_std.reshape(shape) * r.reshape(shape) + d.reshape(shape)
        assert_close(y, expected)
        running_var = running_var + 0.2 * (b_var * 4 / 3 - running_var)
        running_mean = running_mean + 0.2 * (b_mean - running_mean)
        assert_close(mean, running_mean)
        assert_close(var, running_var)


@pytest.mark.parametrize("parity", ["paper", "keras", "torchrl"])
def test_rates_of_zero_and_one_are_exact(parity):
    x = np.random.default_rng(6).normal(size=(4, 2))
    mean, var = np.array([0.1, 0.2]), np.array([0.3, 0.4])
    _, saved = batch_renorm(x, mean, var, **LIMITS, parity=parity)
    np.testing.assert_array_equal(bn.update_running(mean, var, saved, update_rate=0), (mean, var))
    new = bn.update_running(mean, var, saved, update_rate=1)
    batch = saved.moments.var() * (4 / 3 if parity == "torchrl" else 1)
    np.testing.assert_allclose(new, (saved.moments.mean, batch), rtol=1e-15)


def test_r_and_d_follow_replaced_moments():
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (8, 3))
    limits = {"r_max": 3.0, "d_max": 5.0, "weight": 0.5}
    given = np.ones(3), np.full(3, 4.0)
    _, whole = batch_renorm(x, *given, **limits)
    _, part = batch_renorm(x[:5], *given, **limits)
    merged = dataclasses.replace(part, moments=part.moments | bn.moments(x[5:]))
    np.testing.assert_allclose([merged.r, merged.d], [whole.r, whole.d], rtol=1e-14)
    given[0][:] = 7  # what was saved is a copy
    assert (dataclasses.replace(whole, moments=whole.moments).d == whole.d).all()


def test_a_running_variance_of_zero_is_never_rounded_below_it():
    # sigma is sqrt(eps) before and after, so that sigma^2 - eps is what rounding leaves, of either sign.
    x, rates = np.ones((4, 2)), np.linspace(0.05, 0.95, 19)
    below = 0
    for eps in (1e-5, 3e-4, 1e-3, 0.7):
        _, saved = batch_renorm(x, [1.0, 1.0], [0.0, 0.0], **LIMITS, eps=eps)
        for rate in rates:
            sigma = (1 - rate) * np.sqrt(eps) + rate * np.sqrt(eps)
            below += sigma * sigma < eps
            _, var = bn.update_running([1.0, 1.0], [0.0, 0.0], saved, update_rate=rate)
            assert (var == max(sigma * sigma - eps, 0.0)).all()
    assert below > 0


def test_a_correction_beyond_float64_raises_nothing_whatever_numpy_is_told():
    x = np.array([[-1e10], [1e10]])
    options = {
        "gamma": np.array([1e300]),
        "beta": np.array([1.0]),
        "r_max": np.inf,
        "d_max": np.inf,
        "eps": 0.0,
    }
    with np.errstate(all="raise"):
        y, saved = batch_renorm(x, [0.0], [1e-20], **options)  # r is 1e20, gamma * r beyond float64
        bn.backward(np.ones_like(x), saved)
    assert not np.isfinite(y).any()


# ---- schedules ----


def test_the_papers_schedule_has_the_papers_corners():
    schedule = bn.RenormSchedule.paper()
    steps = [0, 5_000, 15_000, 25_000, 40_000, 10**9]
    assert [schedule(s).d_max for s in steps] == [0, 0, 2.5, 5, 5, 5]
    assert [schedule(s).r_max for s in steps] == pytest.approx([1, 1, 1 + 4 / 7, 1 + 8 / 7, 3, 3])
    assert {schedule(s).weight for s in steps} == {1.0}


def test_a_constant_schedule_is_constant():
    schedule = bn.RenormSchedule.constant(np.inf, 2)
    assert schedule(0) == schedule(10**20) == (np.inf, 2.0, 1.0)
    assert schedule == bn.RenormSchedule.constant(np.inf, 2.0)


def test_a_warm_up_of_no_steps_is_over():
    assert bn.RenormSchedule.torchrl(0)(0).weight == 1


# ---- errors ----


class Arrays:
    def __init__(self):
        rng = np.random.default_rng(71)
        self.x, self.dy, self.out = rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), np.full((4, 3), 7.0)
        self.mean, self.var, self.short = np.zeros(3), np.ones(3), np.ones(2)
        self.saved = batch_renorm(self.x, self.mean, self.var, self.var, **LIMITS)[1]

    def bytes(self):
        return {name: value.tobytes() for name, value in vars(self).items() if isinstance(value, np.ndarray)}


def forward(a, x=None, mean=None, var=None, **options):
    x, mean, var = (v if u is None else u for u, v in ((x, a.x), (mean, a.mean), (var, a.var)))
    return batch_renorm(x, mean, var, **(LIMITS | {"out": a.out} | options))


def backward(a, saved=None, **options):
    changed = dataclasses.replace(a.saved, **(saved or {}))
    return bn.backward(a.dy, changed, **{"out": a.out} | options)


SCHEDULE = bn.RenormSchedule
MISTAKES = [
    (lambda a: forward(a, r_max=0.9), ValueError, "r_max must be >= 1, got 0.9"),
    (lambda a: forward(a, r_max=np.nan), ValueError, "r_max must be >= 1, got nan"),
    (lambda a: forward(a, r_max="3"), TypeError, "r_max must be a number, got str"),
    (lambda a: forward(a, d_max=-1), ValueError, "d_max must be >= 0, got -1.0"),
    (lambda a: forward(a, weight=np.inf), ValueError, "weight must be finite, got inf"),
    (lambda a: forward(a, r_min=1.5), ValueError, "r_min must be from 0 to 1, got 1.5"),
    (lambda a: forward(a, parity="tf"), ValueError, "parity must be 'paper', 'keras' or 'torchrl', got 'tf'"),
    (lambda a: forward(a, mean=a.short, var=a.short), ValueError, "renorm.mean must have shape (3,), got (2,)"),
    (lambda a: forward(a, var=-a.var), ValueError, "var must be >= 0 in every channel, got -1.0 in channel 0"),
    (lambda a: forward(a, gamma=a.short), ValueError, "gamma must have shape (3,), got (2,)"),
    (lambda a: forward(a, out=a.dy[:2]), ValueError, "out must have shape (4, 3), got (2, 3)"),
    (lambda a: forward(a, var=a.short), ValueError, "var must have shape (3,), got (2,)"),
    (lambda a: bn.Renorm(a.x, a.var, 3, 5), ValueError, "mean must have 1 dimension, got 2"),
    (lambda a: forward(a, samples=1), ValueError, "samples must be an int >= 2 or None, got 1"),
    (lambda a: bn.batch_norm(a.x, renorm=SCHEDULE.paper()), TypeError, "renorm must be a Renorm or None, got RenormSchedule"),
    (lambda a: forward(a, a.x[:1], out=None), ValueError,
     "x must have at least 2 values per channel for batch statistics, got shape (1, 3)"),
    (lambda a: forward(a, a.x[:1, :, None].repeat(2, 2), out=None, parity="torchrl"), ValueError,
     "x must have at least 2 samples on axis 0 (in each segment and ghost) for parity='torchrl', got 1"),
    (lambda a: forward(a, a.x[:3, :, None].repeat(2, 2), out=None, parity="torchrl", ghost_size=2), ValueError,
     "x must have at least 2 samples on axis 0 (in each segment and ghost) for parity='torchrl', got 1"),
    (lambda a: forward(a, axis=0, mean=np.ones(4), var=np.ones(4), parity="torchrl"), ValueError,
     "axis must not be 0, which holds the samples for parity='torchrl', got 0"),
    (lambda a: backward(a, {"x": None}), ValueError,
     "saved must hold x, got that of a call with out=x, which has overwritten it, or with keep=None"),
    (lambda a: backward(a, {"renorm": bn.Renorm(a.short, a.short, 3, 5)}), ValueError,
     "saved.renorm.mean must have shape (3,), got (2,)"),
    (lambda a: backward(a, {"renorm": 1}), TypeError, "saved.renorm must be a Renorm or None, got int"),
    (lambda a: backward(a, needs=["w"]), ValueError, "needs must name some of 'x', 'gamma', 'beta', 'residual', got 'w'"),
    (lambda a: bn.backward(a.dy, None), TypeError,
     "saved must be what a forward call saved, got None"),
    (lambda a: bn.update_running(a.mean, a.var, a.saved, ddof=1), ValueError,
     "ddof must be None after a call with renorm, whose parity says it, got 1"),
    (lambda a: bn.update_running(a.mean, -a.var, a.saved), ValueError,
     "running_var must be >= 0 in every channel, got -1.0 in channel 0"),
    (lambda a: bn.update_running(a.mean, a.var, a.saved, update_rate=2), ValueError,
     "update_rate must be from 0 to 1, got 2.0"),
    (lambda a: SCHEDULE(((0, 0.5),), ((0, 1.0),)), ValueError, "r_max must be >= 1, got 0.5"),
    (lambda a: SCHEDULE((), ((0, 1.0),)), ValueError, "r_max must have at least one point, got none"),
    (lambda a: SCHEDULE(3.0, ((0, 1.0),)), TypeError, "r_max must be a tuple of (step, value), got 3.0"),
    (lambda a: SCHEDULE(((5, 1.0), (5, 2.0)), ((0, 1.0),)), ValueError, "r_max must have rising steps, got 5 before 5"),
    (lambda a: SCHEDULE(((0, 1.0), (5, np.inf)), ((0, 1.0),)), ValueError,
     "r_max must be finite where it has several points, got inf"),
    (lambda a: SCHEDULE.paper()(-1), ValueError, "step must be an int >= 0, got -1"),
    (lambda a: SCHEDULE.torchrl(-1), ValueError, "warmup_steps must be an int >= 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), MISTAKES, ids=[text for _, _, text in MISTAKES])
def test_a_mistake_is_named_and_changes_nothing(call, error, text):
    arrays = Arrays()
    before = arrays.bytes()
    with pytest.raises(error) as raised:
        call(arrays)
    assert str(raised.value) == text
    assert arrays.bytes() == before


def test_moments_that_were_replaced_by_something_else_are_named():
    x = np.random.default_rng(0).normal(size=(4, 3))
    _, saved = batch_renorm(x, np.zeros(3), np.ones(3), **LIMITS)
    _, inplace = bn.batch_norm(x, keep="y")
    for backward, kept in ((bn.backward, saved), (bn.backward, inplace)):
        with pytest.raises(TypeError, match=r"saved\.moments must be Moments, got None"):
            backward(x, dataclasses.replace(kept, moments=None))
