"""What leaves the range of its arithmetic on the way, although the result does not; and weights of any size."""

import numpy as np
import pytest

import batchnorm as bn
import reference
from tolerances import assert_backward, assert_forward, assert_within

SHAPE = (6, 5, 14)  # (N, C, L)
LAYOUTS = {"planar": 1, "interleaved": 2}
every_layout = pytest.mark.parametrize("axis", LAYOUTS.values(), ids=LAYOUTS.keys())


def in_layout(x, axis):
    return np.ascontiguousarray(np.moveaxis(x, 1, axis))


def steps_above(base, rng):
    """Give values some spacings above base."""
    return base + np.spacing(base) * rng.integers(0, 9, SHAPE)


# float64 data whose squares or sums are beyond float64, and whose deviations are not: |x - mean| is below 1e150.
FAR = {
    "constant_1e200": lambda rng: np.full(SHAPE, 1e200),
    "constant_-1.79e308": lambda rng: np.full(SHAPE, -1.79e308),
    "sum_beyond_float64": lambda rng: np.full(SHAPE, 1.797e307),
    "ulps_at_1e160": lambda rng: steps_above(1e160, rng),
    "mean_1e155_std_1e145": lambda rng: 1e155 + 1e145 * rng.normal(size=SHAPE),
    "std_1e149": lambda rng: 1e149 * rng.normal(size=SHAPE),
    "std_1e152": lambda rng: 1e152 * rng.normal(size=SHAPE),
    "one_far_channel": lambda rng: np.where(
        np.arange(5)[:, None] == 3, steps_above(1e158, rng), rng.normal(size=SHAPE)
    ),
}


@every_layout
@pytest.mark.parametrize("counted", ["all", "mask", "weights"])
@pytest.mark.parametrize("name", FAR)
def test_float64_far_from_zero_keeps_the_contract(name, counted, axis):
    rng = np.random.default_rng(3)
    x = FAR[name](rng)
    gamma, beta = rng.uniform(0.5, 2, 5), rng.normal(size=5)
    exact = reference.exact_forward(x, gamma, beta, axis=1, eps=1e-5)
    scales = reference.forward_scales(x, gamma, beta, exact, axis=1)
    scales, exact = (
        scales._replace(y=np.moveaxis(scales.y, 1, axis), y_at=np.moveaxis(scales.y_at, 1, axis)),
        exact._replace(y=exact.y.moveaxis(1, axis)),
    )
    positions = np.ones((6, 14))
    options = {"all": {}, "mask": {"mask": positions > 0}, "weights": {"weights": positions / 2}}[counted]
    y, saved = bn.batch_norm(in_layout(x, axis), gamma, beta, axis=axis, **options)
    statistics = saved.moments.mean, saved.moments.var(), saved.rstd
    assert_forward(y, statistics, exact, scales, np.float64)
    if name.startswith("constant"):
        np.testing.assert_array_equal(np.moveaxis(y, axis, -1), np.broadcast_to(beta, (6, 14, 5)))


@every_layout
@pytest.mark.parametrize("name", ["ulps_at_1e160", "mean_1e155_std_1e145", "one_far_channel"])
def test_gradients_of_float64_far_from_zero_keep_the_contract(name, axis):
    rng = np.random.default_rng(4)
    x, dy = FAR[name](rng), rng.normal(size=SHAPE)
    exact = reference.exact_forward(x, axis=1, eps=1e-5)
    gradients = reference.exact_backward(dy, x, axis=1, eps=1e-5)
    scales = reference.backward_scales(dy, x, None, exact, gradients, axis=1)
    _, saved = bn.batch_norm(in_layout(x, axis), axis=axis)
    dx, dgamma, dbeta, _ = bn.backward(in_layout(dy, axis), saved)
    assert_backward((np.moveaxis(dx, axis, 1), dgamma, dbeta), gradients, scales, np.float64)


@every_layout
def test_a_variance_beyond_float64_is_infinity_and_y_is_beta(axis):
    x = np.resize([1e200, -1e200], SHAPE)
    y, saved = bn.batch_norm(in_layout(x, axis), beta=np.full(5, 3.0), axis=axis)
    np.testing.assert_array_equal(saved.moments.var(), np.inf)
    np.testing.assert_array_equal(saved.moments.mean, 0.0)
    np.testing.assert_array_equal(y, 3.0)


@every_layout
def test_y_is_beta_beside_an_infinite_variance_whatever_the_mean(axis):
    x = np.resize([1.7e308, 1.7e308, -1.7e308], SHAPE)
    y, saved = bn.batch_norm(in_layout(x, axis), beta=np.full(5, 3.0), axis=axis)
    np.testing.assert_array_equal(saved.moments.var(), np.inf)
    np.testing.assert_array_equal(y, 3.0)


@every_layout
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_no_channel_finite(bad, axis):
    x = np.full(SHAPE, 1e200)
    x[2, 1, 3] = bad
    y, saved = bn.batch_norm(in_layout(x, axis), axis=axis)
    y = np.moveaxis(y, axis, 1)
    assert not np.isfinite(saved.moments.var()[1])
    assert not np.isfinite(y[2, 1, 3])
    np.testing.assert_array_equal(np.delete(y, 1, axis=1), 0.0)


def test_merging_moments_that_are_far_apart_gives_no_nan():
    def pair(mean):
        return bn.Moments(1e8, [mean], [0.0])

    assert (pair(1e149) | pair(-1e149)).var() == pytest.approx(1e298, rel=1e-15)
    both = pair(1e150) | pair(-1e150)  # m2 = 2e308 is beyond float64
    assert both.mean == 0.0
    assert both.m2 == np.inf
    assert both.var() == np.inf
    ends = pair(1.7e308) | pair(-1.7e308)
    assert ends.mean == 0.0
    assert ends.var() == np.inf


@every_layout
@pytest.mark.parametrize("x_dtype", ["float32", "float64"])
def test_a_constant_channel_is_beta_although_gamma_times_rstd_is_beyond_float64(x_dtype, axis):
    y, _ = bn.batch_norm(
        in_layout(np.full(SHAPE, 0.1, x_dtype), axis),
        np.full(5, 1e160),
        np.full(5, 0.5),
        axis=axis,
        eps=1e-300,
    )
    np.testing.assert_array_equal(y, 0.5)


# ---- weights ------------------------------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("k", [0, 3, 5, 8])
def test_weighted_statistics_are_as_good_at_any_mean_over_std(k, dtype, axis):
    rng = np.random.default_rng(7)
    x = (10.0**k + rng.normal(size=(3, 2, 700))).astype(dtype)
    w = rng.uniform(size=(3, 700)).astype(dtype)
    moments = bn.moments(in_layout(x, axis), axis=axis, weights=w)
    mean, var = reference.exact_weighted_moments(x, w, axis=1)
    assert_within("mean", dtype, moments.mean, mean)
    assert_within("var", dtype, moments.var(), var)


@every_layout
@pytest.mark.parametrize("weight", [3e306, 1e-160, 1e-300])
def test_equal_weights_of_any_size_give_the_statistics_without(weight, axis):
    x = np.random.default_rng(8).normal(100, 1, (2, 3, 10))
    without = bn.moments(in_layout(x, axis), axis=axis)
    moments = bn.moments(in_layout(x, axis), axis=axis, weights=np.full((2, 10), weight))
    assert_within("mean", x.dtype, moments.mean, without.mean)
    assert_within("var", x.dtype, moments.var(), without.var())


@pytest.mark.parametrize("weight", [1.0, 1e-280, 1e-299])
def test_a_weighted_sum_that_cancels_keeps_its_mean_for_weights_of_any_size(weight):
    x = np.array([1e40, 1e20, 1.0, -1e40, -1e20, 2.0, 5e18, -5e18])
    assert bn.moments(x[:, None], weights=np.full(8, weight)).mean == 0.375


@pytest.mark.parametrize("least", [1e-20, 1e-28, 1e-30, 1e-37])
def test_float32_gradients_keep_their_bound_where_one_weight_is_far_below_the_others(least):
    x = np.array([[1.0], [2.0], [4.0], [3.0]], np.float32)
    dy = np.array([[1e-15], [2e-15], [1.5e-15], [0.0]], np.float32)
    w, gamma = np.array([1, 1, 1, least], np.float32), np.array([1e10], np.float32)
    options = {"axis": 1, "eps": 1e-5, "padding": "zero"}
    want = reference.weighted_backward(dy, x, w, gamma, **options).dx
    _, saved = bn.batch_norm(x, gamma, weights=w)
    dx = bn.backward(dy, saved).dx
    # At the last position dx is w times what is much the same for all; no term is more than some times the whole.
    assert_within("weighted dx", np.float32, dx[3], want[3], scale=4 * np.abs(want[3]))


def test_weights_whose_sum_is_beyond_float64_are_refused_before_anything_is_written():
    x, out = np.ones((50, 3)), np.full((50, 3), 7.0)
    with pytest.raises(ValueError, match="weights must have a finite sum"):
        bn.batch_norm(x, weights=np.full(50, 1e307), out=out)
    np.testing.assert_array_equal(out, 7.0)


@every_layout
@pytest.mark.parametrize("dy_size", [1e30, 1.0, 1e-30, 1e-38, 1e-43])
@pytest.mark.parametrize("weight", [1e-30, 1.0, 1e20, 1e30, 1e36])
def test_float32_gradients_through_weights_of_any_size_keep_their_bound(weight, dy_size, axis):
    rng = np.random.default_rng(9)
    x = rng.normal(3, 1, (4, 3, 20)).astype(np.float32)
    dy = (dy_size * rng.normal(1, 1, x.shape)).astype(np.float32)
    w = (weight * rng.uniform(0.5, 2, (4, 20))).astype(np.float32)
    options = {"axis": 1, "eps": 1e-5, "padding": "zero"}
    want = reference.weighted_backward(dy, x, w, None, **options).dx
    forward = reference.weighted_forward(x, w, None, None, **options)
    # |a dy| + w/W |a| sum |dy| + w/W |a xhat| sum |dy xhat|
    share = np.expand_dims(w.astype(np.float64) / w.sum(dtype=np.float64), 1)
    size, xhat = np.abs(dy.astype(np.float64)), np.abs(forward.y)
    of_dy, of_xhat = (np.sum(s, (0, 2), keepdims=True) for s in (size, size * xhat))
    scale = reference.per_channel(forward.rstd, x, 1) * (size + share * of_dy + share * xhat * of_xhat)
    _, saved = bn.batch_norm(in_layout(x, axis), axis=axis, weights=w)
    dx = bn.backward(in_layout(dy, axis), saved).dx
    assert_within("weighted dx", np.float32, np.moveaxis(dx, axis, 1), want, scale=scale)
