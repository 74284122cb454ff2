"""Backward: gradients of training and of frozen statistics, its two halves, and the identities they obey."""

import dataclasses

import numpy as np
import pytest

import batchnorm as bn
import frozen
import reference
from tolerances import allowed, assert_backward, assert_within

EPS = 1e-3


def problem(layout, dtype):
    rng = np.random.default_rng(11)
    gamma = rng.uniform(-2, 2, layout.channels).astype(dtype)
    return layout.normal(dtype), rng.normal(size=layout.shape).astype(dtype), gamma


def frozen_statistics(layout):
    rng = np.random.default_rng(12)
    return rng.normal(0, 3, layout.channels), rng.uniform(0, 2, layout.channels)


@pytest.mark.parametrize("has_gamma", [False, True], ids=["no_gamma", "gamma"])
def test_batch_norm_backward_keeps_the_contract(layout, dtype, has_gamma):
    x, dy, gamma = problem(layout, dtype)
    gamma = gamma if has_gamma else None
    _, saved = bn.batch_norm(x, gamma, axis=layout.axis, eps=EPS)
    exact = reference.exact_forward(x, gamma, axis=layout.axis, eps=EPS)
    gradients = reference.exact_backward(dy, x, gamma, axis=layout.axis, eps=EPS)
    scales = reference.backward_scales(dy, x, gamma, exact, gradients, axis=layout.axis)
    assert_backward(bn.backward(dy, saved), gradients, scales, dtype)


@pytest.mark.parametrize("has_gamma", [False, True], ids=["no_gamma", "gamma"])
def test_normalize_backward_keeps_the_contract(layout, dtype, has_gamma):
    x, dy, gamma = problem(layout, dtype)
    gamma, (mean, var) = gamma if has_gamma else None, frozen_statistics(layout)
    options = {"axis": layout.axis, "eps": EPS}
    exact = reference.exact_forward(x, gamma, **options, mean=mean, var=var)
    gradients = reference.exact_backward(dy, x, gamma, **options, mean=mean, var=var)
    scales = reference.backward_scales(dy, x, gamma, exact, gradients, axis=layout.axis, frozen=True)
    assert_backward(frozen.backward(dy, x, mean, var, gamma, **options), gradients, scales, dtype)


@pytest.fixture(params=["batch", "frozen"])
def backward(request, layout, dtype):
    """Give the function of dy and options that is one problem's backward, with batch or frozen statistics."""
    x, _, gamma = problem(layout, dtype)
    if request.param == "batch":
        _, saved = bn.batch_norm(x, gamma, axis=layout.axis, eps=EPS)
        return lambda dy, **options: bn.backward(dy, saved, **options)
    mean, var = frozen_statistics(layout)
    return lambda dy, **options: frozen.backward(dy, x, mean, var, gamma, axis=layout.axis, eps=EPS, **options)


@pytest.mark.parametrize(
    "needs", [("x",), ("gamma",), ("beta",), ("beta", "gamma"), ("gamma", "x"), ("beta", "x")], ids="_".join
)
def test_only_what_is_needed_is_given_with_the_same_bits(layout, dtype, backward, needs):
    dy = problem(layout, dtype)[1]
    everything = dict(zip(("x", "gamma", "beta"), backward(dy)[:3], strict=True))
    for name, got in zip(("x", "gamma", "beta"), backward(dy, needs=needs)[:3], strict=True):
        if name in needs:
            np.testing.assert_array_equal(got, everything[name])
        else:
            assert got is None, name


def test_gradients_have_names(layout, dtype, backward):
    gradients = backward(problem(layout, dtype)[1])
    assert gradients._fields == ("dx", "dgamma", "dbeta", "dresidual")
    assert gradients.dresidual is None


def test_out_is_filled_and_returned(layout, dtype, backward):
    dy = problem(layout, dtype)[1]
    out = np.full_like(dy, np.nan)
    assert backward(dy, out=out).dx is out
    np.testing.assert_array_equal(out, backward(dy).dx)


def test_out_may_be_dy(layout, dtype, backward):
    dy = problem(layout, dtype)[1]
    expected = backward(dy.copy()).dx
    assert backward(dy, out=dy).dx is dy
    np.testing.assert_array_equal(dy, expected)


def test_memory_order_of_dy_may_differ_from_that_of_x(layout, dtype, backward):
    dy = problem(layout, dtype)[1]
    expected = backward(dy)
    for other in (np.asfortranarray(dy), np.repeat(dy, 2, axis=-1)[..., ::2], np.flip(np.flip(dy).copy())):
        for got, value in zip(backward(other), expected, strict=True):
            np.testing.assert_array_equal(got, value)


@pytest.mark.parametrize("gamma_dtype", ["float16", "float32", "float64"])
def test_dgamma_and_dbeta_have_the_dtype_of_gamma(layout, dtype, gamma_dtype):
    x, dy, gamma = problem(layout, dtype)
    gamma = gamma.astype(gamma_dtype)
    _, saved = bn.batch_norm(x, gamma, axis=layout.axis, eps=EPS)
    got = bn.backward(dy, saved)
    assert got.dgamma.dtype == got.dbeta.dtype == gamma.dtype
    exact = reference.exact_forward(x, gamma, axis=layout.axis, eps=EPS)
    gradients = reference.exact_backward(dy, x, gamma, axis=layout.axis, eps=EPS)
    scales = reference.backward_scales(dy, x, gamma, exact, gradients, axis=layout.axis)
    assert_backward(got, gradients, scales, dtype)


def test_dgamma_and_dbeta_are_float64_without_gamma(layout, dtype):
    x, dy, _ = problem(layout, dtype)
    got = bn.backward(dy, bn.batch_norm(x, axis=layout.axis)[1])
    assert got.dgamma.dtype == got.dbeta.dtype == np.float64


def test_dgamma_and_dbeta_do_not_depend_on_gamma(layout, dtype):
    x, dy, gamma = problem(layout, dtype)
    one = bn.backward(dy, bn.batch_norm(x, np.ones_like(gamma), axis=layout.axis)[1])
    other = bn.backward(dy, bn.batch_norm(x, gamma, axis=layout.axis)[1])
    np.testing.assert_array_equal(one.dgamma, other.dgamma)
    np.testing.assert_array_equal(one.dbeta, other.dbeta)


def test_scaling_dy_by_a_power_of_two_scales_every_gradient_exactly(layout, dtype, backward):
    dy = problem(layout, dtype)[1]
    for got, value in zip(backward(dy * 1024)[:3], backward(dy)[:3], strict=True):
        np.testing.assert_array_equal(got, value * 1024)


def test_the_halves_give_the_bits_of_the_whole(layout, dtype):
    x, dy, gamma = problem(layout, dtype)
    _, saved = bn.batch_norm(x, gamma, axis=layout.axis, eps=EPS)
    sums = bn.grad_sums(dy, saved)
    np.testing.assert_array_equal(bn.grad_input(dy, saved, sums), bn.backward(dy, saved).dx)


def test_grad_sums_are_the_sums_of_dy_and_of_dy_times_deviation(layout, dtype):
    x, dy, _ = problem(layout, dtype)
    _, saved = bn.batch_norm(x, axis=layout.axis, eps=EPS)
    sums = bn.grad_sums(dy, saved)
    np.testing.assert_array_equal(sums.count, x.size / layout.channels)
    assert sums.sum_dy.dtype == sums.sum_dy_xmu.dtype == np.float64
    exact = reference.exact_forward(x, axis=layout.axis, eps=EPS)
    gradients = reference.exact_backward(dy, x, axis=layout.axis, eps=EPS)
    scales = reference.backward_scales(dy, x, None, exact, gradients, axis=layout.axis)
    assert_within("dbeta", dtype, sums.sum_dy, gradients.dbeta, scale=scales.dbeta)
    std = 1 / exact.rstd.high
    dgamma = reference.Exact(gradients.dgamma.high * std, gradients.dgamma.low * std)
    # Twice the scale: this expected value is a quotient of two rounded ones.
    assert_within("dgamma", dtype, sums.sum_dy_xmu, dgamma, scale=2 * scales.dgamma * std)


def test_grad_sums_of_parts_about_the_merged_mean_add_up_to_those_of_the_whole(dtype):
    # What ranks of a cluster do: merge moments, then add the sums.
    rng = np.random.default_rng(4)
    x, dy = rng.normal(5, 2, (6, 3, 7)).astype(dtype), rng.normal(size=(6, 3, 7)).astype(dtype)
    _, whole = bn.batch_norm(x)
    expected = bn.grad_sums(dy, whole)
    parts = []
    for part in (slice(0, 2), slice(2, 6)):
        _, own = bn.batch_norm(x[part])
        shared = dataclasses.replace(own, moments=whole.moments)
        parts.append(bn.grad_sums(dy[part], shared))
    np.testing.assert_array_equal(sum(p.count for p in parts), expected.count)
    for name in ("sum_dy", "sum_dy_xmu"):
        total = sum(getattr(p, name) for p in parts)
        assert_within("merge", "float64", total, getattr(expected, name), scale=np.abs(dy).sum() * 4)


def test_adding_sums_loses_nothing_of_the_small_ones():
    # Sums of 1e16 and 1: an addition in float64 alone rounds the 1 away, and the sums would depend on their order.
    x = np.array([[-1.0], [1.0]])
    _, saved = bn.batch_norm(x, eps=0.0)
    large, small, opposite = (bn.grad_sums(np.array([[0.0], [v]]), saved) for v in (1e16, 1.0, -1e16))
    for total in (large + small + opposite, small + (large + opposite), (opposite + small) + large):
        assert total.sum_dy == total.sum_dy_xmu == [1.0]
        assert total.count == [6.0]


def test_adding_sums_keeps_what_float64_could_not_hold_of_each():
    _, saved = bn.batch_norm(np.array([[-1.0], [1.0]]), eps=0.0)
    up, down = (bn.grad_sums(np.array([[v], [1.0]]), saved) for v in (1e16, -1e16))
    assert (up + down).sum_dy == [2.0]
    assert (down + up).sum_dy_xmu == [2.0]


def test_sums_of_other_values_than_the_moments_count_are_refused():
    x, dy = np.random.default_rng(0).normal(size=(2, 6, 2))
    _, whole = bn.batch_norm(x)
    half = bn.grad_sums(dy[:3], dataclasses.replace(whole, x=x[:3]))
    one_channel_less = bn.GradSums(np.array([6.0, 5.0]), bn.grad_sums(dy, whole)._table)
    one_channel = bn.grad_sums(dy[:, :1], bn.batch_norm(x[:, :1])[1])
    out = np.full_like(x, 7)
    for sums in (half, one_channel_less, one_channel):
        with pytest.raises(ValueError, match=r"^sums must count the values that saved\.moments count"):
            bn.grad_input(dy, whole, sums, out=out)
    assert (out == 7).all()
    two_halves = half + bn.grad_sums(dy[3:], dataclasses.replace(whole, x=x[3:]))
    np.testing.assert_allclose(bn.grad_input(dy, whole, two_halves), bn.backward(dy, whole).dx, rtol=1e-12, atol=1e-13)


def test_sums_are_added_to_sums_of_as_many_channels_alone():
    x = np.random.default_rng(0).normal(size=(6, 2))
    sums, narrow = bn.grad_sums(x, bn.batch_norm(x)[1]), bn.grad_sums(x[:, :1], bn.batch_norm(x[:, :1])[1])
    with pytest.raises(ValueError, match=r"^sums must have 2 channels to be added, got 1$"):
        sums + narrow
    with pytest.raises(TypeError, match="unsupported operand"):
        sums + 1
    assert repr(sums) == "GradSums(channels=2)"


def channel_sums(values, axis):
    return values.astype(np.float64).sum(reference.other_axes(values, axis))


def gradient_rounding(layout, dtype):
    """Give the problem, its gradients, and the sum over each channel of what rounding may add to dx."""
    x, dy, gamma = problem(layout, dtype)
    _, saved = bn.batch_norm(x, gamma, axis=layout.axis, eps=EPS)
    exact = reference.exact_forward(x, gamma, axis=layout.axis, eps=EPS)
    gradients = reference.exact_backward(dy, x, gamma, axis=layout.axis, eps=EPS)
    scales = reference.backward_scales(dy, x, gamma, exact, gradients, axis=layout.axis)
    rounding = allowed("dx", dtype, gradients.dx, scale=scales.dx)
    return x, gamma, bn.backward(dy, saved), exact, rounding


def test_dx_sums_to_zero(layout, dtype):
    _, _, got, _, rounding = gradient_rounding(layout, dtype)
    assert (np.abs(channel_sums(got.dx, layout.axis)) <= channel_sums(rounding, layout.axis)).all()


def test_dx_along_xhat_is_what_eps_leaves(layout, dtype):
    # sum(dx * xhat) = gamma * rstd * dgamma * eps / (var + eps)
    x, gamma, got, exact, rounding = gradient_rounding(layout, dtype)
    xhat = reference.exact_forward(x, axis=layout.axis, eps=EPS).y.high
    left = channel_sums(got.dx * xhat, layout.axis)
    right = gamma * exact.rstd.high * got.dgamma * EPS * exact.rstd.high**2
    room = channel_sums(rounding * np.abs(xhat), layout.axis)
    assert (np.abs(left - right) <= 2 * room).all()


def test_a_constant_dy_gives_zero_dx(layout, dtype):
    x, dy, gamma = problem(layout, dtype)
    dy = np.full_like(dy, 0.7)
    _, saved = bn.batch_norm(x, gamma, axis=layout.axis, eps=EPS)
    exact = reference.exact_forward(x, gamma, axis=layout.axis, eps=EPS)
    gradients = reference.exact_backward(dy, x, gamma, axis=layout.axis, eps=EPS)
    scales = reference.backward_scales(dy, x, gamma, exact, gradients, axis=layout.axis)
    assert_within("dx", dtype, bn.backward(dy, saved).dx, np.zeros(x.shape), scale=scales.dx)


def test_zero_variance_with_zero_eps_gives_zero_dx(layout, dtype):
    _, dy, gamma = problem(layout, dtype)
    _, saved = bn.batch_norm(np.full(layout.shape, 2.5, dtype), gamma, axis=layout.axis, eps=0.0)
    got = bn.backward(dy, saved)
    np.testing.assert_array_equal(got.dx, 0)
    np.testing.assert_array_equal(got.dgamma, 0)


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0), (0, 3)], ids=str)
def test_an_empty_batch_gives_empty_dx_and_zero_dgamma_and_dbeta(shape, dtype):
    _, saved = bn.batch_norm(np.empty(shape, dtype))
    got = bn.backward(np.empty(shape, dtype), saved)
    assert got.dx.shape == shape
    np.testing.assert_array_equal(got.dgamma, np.zeros(3))
    np.testing.assert_array_equal(got.dbeta, np.zeros(3))


def test_zero_channels_give_everything_empty(dtype):
    got = bn.backward(np.empty((4, 0, 5), dtype), bn.batch_norm(np.empty((4, 0, 5), dtype))[1])
    assert got.dx.shape == (4, 0, 5)
    assert got.dgamma.shape == got.dbeta.shape == (0,)


def test_a_nan_in_dy_stays_in_its_channel(layout, dtype, backward):
    dy = problem(layout, dtype)[1]
    expected = backward(dy)
    spoiled = dy.copy()
    np.moveaxis(spoiled, layout.axis, 0)[1].flat[4] = np.nan
    got = backward(spoiled)
    others = np.arange(layout.channels) != 1
    rows, expected_rows = np.moveaxis(got.dx, layout.axis, 0), np.moveaxis(expected.dx, layout.axis, 0)
    np.testing.assert_array_equal(rows[others], expected_rows[others])
    np.testing.assert_array_equal(got.dgamma[others], expected.dgamma[others])
    assert np.isnan(rows[1].flat[4])
    assert np.isnan(got.dgamma[1])


def test_an_infinity_in_a_part_stays_in_its_channel_of_the_sums_without_a_warning():
    x, dy = np.random.default_rng(0).normal(size=(2, 6, 2))
    saved = bn.batch_norm(x)[1]
    spoiled = dy.copy()
    spoiled[0, 1] = np.inf
    total = bn.grad_sums(spoiled, saved) + bn.grad_sums(dy, saved)
    np.testing.assert_array_equal(np.isfinite(total.sum_dy), [True, False])
    assert total.sum_dy[0] == 2 * bn.grad_sums(dy, saved).sum_dy[0]


def test_x_and_dy_are_not_changed(layout, dtype):
    x, dy, gamma = problem(layout, dtype)
    before = [a.copy() for a in (x, dy, gamma)]
    bn.backward(dy, bn.batch_norm(x, gamma, axis=layout.axis)[1])
    for now, then in zip((x, dy, gamma), before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("dx_order", ["C", "F"])
def test_dx_has_the_memory_order_of_x(layout, dtype, dx_order):
    x, dy, gamma = problem(layout, dtype)
    x = np.asarray(x, order=dx_order)
    dx = bn.backward(dy, bn.batch_norm(x, gamma, axis=layout.axis)[1]).dx
    assert dx.strides == x.strides


def test_a_batch_that_was_overwritten_has_no_backward(dtype):
    x = np.arange(6, dtype=dtype).reshape(3, 2)
    _, saved = bn.batch_norm(x, out=x)
    text = r"saved must hold x, got that of a call with out=x, which has overwritten it"
    for backward in (bn.backward, bn.grad_sums):
        with pytest.raises(ValueError, match=text):
            backward(x, saved)


def test_a_gradient_that_underflows_its_dtype_raises_nothing_whatever_numpy_is_told():
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    _, saved = bn.batch_norm(x, np.ones(3, np.float16))
    with np.errstate(all="raise"):
        gradients = bn.backward(x * np.float32(1e-9), saved)
    assert gradients.dgamma.dtype == np.float16
