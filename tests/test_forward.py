"""Forward: what comes out of batch_norm, normalize and moments, and in which array."""

import dataclasses

import numpy as np
import pytest

import batchnorm as bn
import reference
from tolerances import assert_forward, assert_within

EPS = 1e-3


def statistics(saved):
    return saved.moments.mean, saved.moments.var(), saved.rstd


def affine(layout, dtype):
    rng = np.random.default_rng(7)
    return rng.uniform(-2, 2, layout.channels).astype(dtype), rng.normal(size=layout.channels).astype(dtype)


@pytest.mark.parametrize("has_gamma", [False, True], ids=["no_gamma", "gamma"])
@pytest.mark.parametrize("has_beta", [False, True], ids=["no_beta", "beta"])
def test_batch_norm_keeps_the_contract(layout, dtype, has_gamma, has_beta):
    x, (gamma, beta) = layout.normal(dtype), affine(layout, dtype)
    gamma, beta = gamma if has_gamma else None, beta if has_beta else None
    y, saved = bn.batch_norm(x, gamma, beta, axis=layout.axis, eps=EPS)
    exact = reference.exact_forward(x, gamma, beta, axis=layout.axis, eps=EPS)
    scales = reference.forward_scales(x, gamma, beta, exact, axis=layout.axis)
    assert_forward(y, statistics(saved), exact, scales, dtype)


@pytest.mark.parametrize("statistics_dtype", ["float32", "float64"])
def test_normalize_keeps_the_contract(layout, dtype, statistics_dtype):
    x, (gamma, beta) = layout.normal(dtype), affine(layout, dtype)
    rng = np.random.default_rng(3)
    mean = rng.normal(0, 3, layout.channels).astype(statistics_dtype)
    var = rng.uniform(0, 2, layout.channels).astype(statistics_dtype)
    y = bn.normalize(x, mean, var, gamma, beta, axis=layout.axis, eps=EPS)
    exact = reference.exact_forward(x, gamma, beta, axis=layout.axis, eps=EPS, mean=mean, var=var)
    scales = reference.forward_scales(x, gamma, beta, exact, axis=layout.axis)
    assert_within("y", dtype, y, exact.y, scale=scales.y, at=scales.y_at)


def test_normalize_with_batch_statistics_keeps_the_contract_of_batch_norm(layout, dtype):
    x = layout.normal(dtype)
    moments = bn.moments(x, axis=layout.axis)
    y = bn.normalize(x, moments.mean, moments.var(), axis=layout.axis, eps=EPS)
    exact = reference.exact_forward(x, axis=layout.axis, eps=EPS)
    scales = reference.forward_scales(x, None, None, exact, axis=layout.axis)
    assert_within("y", dtype, y, exact.y, scale=scales.y, at=scales.y_at)


def test_moments_are_those_batch_norm_saves(layout, dtype):
    x = layout.normal(dtype)
    alone, saved = bn.moments(x, axis=layout.axis), bn.batch_norm(x, axis=layout.axis)[1].moments
    for name in ("count", "mean", "m2"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(saved, name))


def test_count_is_the_number_of_values_a_channel(layout, dtype):
    x = layout.normal(dtype)
    np.testing.assert_array_equal(bn.moments(x, axis=layout.axis).count, x.size / layout.channels)


def test_statistics_are_float64_whatever_the_dtype_of_x(layout, dtype):
    saved = bn.batch_norm(layout.normal(dtype), axis=layout.axis)[1]
    m = saved.moments
    assert [a.dtype for a in (m.count, m.mean, m.m2, m.var(), saved.rstd)] == [np.float64] * 5


def test_mean_and_variance_of_exact_data_are_exact(layout, dtype):
    # Pairs around a power of two with few bits: no order of summation rounds (benchdnn's fill).
    rng = np.random.default_rng(5)
    rows = np.moveaxis(np.empty(layout.shape, dtype), layout.axis, 0)
    half = rows[0].size // 2
    steps = rng.integers(-8, 9, (layout.channels, half)) / 8.0
    values = np.concatenate([steps, -steps, np.zeros((layout.channels, rows[0].size - 2 * half))], axis=1)
    mean = 2.0 ** (np.arange(layout.channels) % 7 - 2)
    x = np.moveaxis((values + mean[:, None]).reshape(rows.shape), 0, layout.axis)
    moments = bn.moments(np.ascontiguousarray(x, dtype), axis=layout.axis)
    np.testing.assert_array_equal(moments.mean, mean)
    np.testing.assert_array_equal(moments.m2, (values**2).sum(1))


def test_gamma_and_beta_default_to_one_and_zero(layout, dtype):
    x = layout.normal(dtype)
    ones, zeros = np.ones(layout.channels, dtype), np.zeros(layout.channels, dtype)
    plain = bn.batch_norm(x, axis=layout.axis)[0]
    np.testing.assert_array_equal(plain, bn.batch_norm(x, ones, zeros, axis=layout.axis)[0])


@pytest.mark.parametrize("narrow", ["float16", "float32"])
def test_gamma_and_beta_count_by_their_value_not_their_dtype(layout, dtype, narrow):
    x, (gamma, beta) = layout.normal(dtype), affine(layout, narrow)
    wide = bn.batch_norm(x, gamma.astype(np.float64), beta.astype(np.float64), axis=layout.axis)[0]
    np.testing.assert_array_equal(bn.batch_norm(x, gamma, beta, axis=layout.axis)[0], wide)


def test_gamma_zero_gives_exactly_beta(layout, dtype):
    beta = affine(layout, dtype)[1]
    y, _ = bn.batch_norm(layout.normal(dtype), np.zeros_like(beta), beta, axis=layout.axis)
    np.testing.assert_array_equal(y, np.broadcast_to(reference.per_channel(beta, y, layout.axis), y.shape))


def test_zero_variance_with_zero_eps_gives_exactly_beta(layout, dtype):
    beta = affine(layout, dtype)[1]
    x = np.full(layout.shape, 2.5, dtype)
    y, saved = bn.batch_norm(x, None, beta, axis=layout.axis, eps=0.0)
    np.testing.assert_array_equal(saved.rstd, 0.0)
    np.testing.assert_array_equal(y, np.broadcast_to(reference.per_channel(beta, y, layout.axis), y.shape))


def test_negative_axis_counts_from_the_end(layout, dtype):
    x = layout.normal(dtype)
    axis = layout.axis % x.ndim
    y, saved = bn.batch_norm(x, axis=axis)
    from_the_end, saved_from_the_end = bn.batch_norm(x, axis=axis - x.ndim)
    np.testing.assert_array_equal(y, from_the_end)
    np.testing.assert_array_equal(saved.moments.mean, saved_from_the_end.moments.mean)


def test_channel_axis_is_1_unless_said():
    x = np.random.default_rng(0).normal(size=(4, 3, 5))
    np.testing.assert_array_equal(bn.batch_norm(x)[0], bn.batch_norm(x, axis=1)[0])


@pytest.mark.parametrize("forward", ["batch_norm", "normalize"])
class TestOut:
    def call(self, forward, x, axis, **options):
        if forward == "batch_norm":
            return bn.batch_norm(x, axis=axis, **options)[0]
        channels = x.shape[axis]
        return bn.normalize(x, np.linspace(-1, 1, channels), np.linspace(1, 2, channels), axis=axis, **options)

    def test_out_is_filled_and_returned(self, layout, dtype, forward):
        x = layout.normal(dtype)
        out = np.full_like(x, np.nan)
        assert self.call(forward, x, layout.axis, out=out) is out
        np.testing.assert_array_equal(out, self.call(forward, x, layout.axis))

    def test_out_may_be_x(self, layout, dtype, forward):
        x = layout.normal(dtype)
        expected = self.call(forward, x.copy(), layout.axis)
        assert self.call(forward, x, layout.axis, out=x) is x
        np.testing.assert_array_equal(x, expected)

    def test_out_may_be_another_view_of_all_of_x(self, layout, dtype, forward):
        x = layout.normal(dtype)
        expected = self.call(forward, x.copy(), layout.axis)
        self.call(forward, x, layout.axis, out=x[...])
        np.testing.assert_array_equal(x, expected)

    def test_out_may_have_gaps(self, layout, dtype, forward):
        x = layout.normal(dtype)
        wider = np.full((*x.shape[:-1], 2 * x.shape[-1]), 9, dtype)
        self.call(forward, x, layout.axis, out=wider[..., ::2])
        np.testing.assert_array_equal(wider[..., ::2], self.call(forward, x, layout.axis))
        np.testing.assert_array_equal(wider[..., 1::2], 9)

    def test_out_may_have_another_memory_order(self, layout, dtype, forward):
        x = layout.normal(dtype)
        out = np.empty_like(x, order="F")
        self.call(forward, x, layout.axis, out=out)
        np.testing.assert_array_equal(out, self.call(forward, x, layout.axis))

    def test_out_may_interleave_with_x_when_no_element_is_shared(self, layout, dtype, forward):
        pair = np.repeat(layout.normal(dtype), 2, axis=-1)
        x, out = pair[..., ::2], pair[..., 1::2]
        expected = self.call(forward, x.copy(), layout.axis)
        self.call(forward, x, layout.axis, out=out)
        np.testing.assert_array_equal(out, expected)


def views(x, axis):
    """Give the same values as x, laid out in memory in every way NumPy makes."""
    spread = np.repeat(np.repeat(x, 2, axis=0), 3, axis=-1)
    yield "fortran", np.asfortranarray(x)
    yield (
        "channels_moved_last_in_memory",
        np.moveaxis(np.ascontiguousarray(np.moveaxis(x, axis, -1)), -1, axis),
    )
    yield (
        "channels_moved_first_in_memory",
        np.moveaxis(np.ascontiguousarray(np.moveaxis(x, axis, 0)), 0, axis),
    )
    yield "sliced", spread[::2, ..., ::3]
    yield "reversed", np.flip(np.flip(x).copy())
    read_only = x.copy()
    read_only.flags.writeable = False
    yield "read_only", read_only


def test_memory_order_of_x_does_not_change_the_values(layout, dtype):
    x, (gamma, beta) = layout.normal(dtype), affine(layout, dtype)
    exact = reference.exact_forward(x, gamma, beta, axis=layout.axis, eps=EPS)
    scales = reference.forward_scales(x, gamma, beta, exact, axis=layout.axis)
    for name, view in views(x, layout.axis):
        np.testing.assert_array_equal(view, x, err_msg=name)
        y, saved = bn.batch_norm(view, gamma, beta, axis=layout.axis, eps=EPS)
        assert_forward(y, statistics(saved), exact, scales, dtype)


def test_y_has_the_memory_order_of_x(layout, dtype):
    x = layout.normal(dtype)
    for name, view in views(x, layout.axis):
        y, _ = bn.batch_norm(view, axis=layout.axis)
        assert y.strides == np.empty_like(view).strides, name


def test_a_broadcast_x_counts_every_repeat(dtype):
    x = np.broadcast_to(np.array([1.0, 3.0, 5.0], dtype)[:, None, None], (3, 2, 4))
    m = bn.moments(x)
    np.testing.assert_array_equal(m.count, 12)
    np.testing.assert_array_equal(m.mean, 3)
    np.testing.assert_array_equal(m.m2, 32)


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0), (0, 3), (0, 3, 0)], ids=str)
def test_an_empty_batch_gives_empty_y_and_count_zero(shape, dtype):
    y, saved = bn.batch_norm(np.empty(shape, dtype))
    assert (y.shape, y.dtype) == (shape, dtype)
    np.testing.assert_array_equal(saved.moments.count, np.zeros(3))


@pytest.mark.parametrize("shape", [(4, 0, 5), (4, 0)], ids=str)
def test_zero_channels_give_everything_empty(shape, dtype):
    y, saved = bn.batch_norm(np.empty(shape, dtype))
    assert y.shape == shape
    assert saved.moments.mean.shape == saved.rstd.shape == (0,)


def test_normalize_takes_a_single_value_a_channel(dtype):
    y = bn.normalize(np.array([[3.0, 8.0]], dtype), np.array([1.0, 2.0]), np.array([4.0, 9.0]), eps=0.0)
    np.testing.assert_array_equal(y, [[1.0, 2.0]])


def test_normalize_takes_one_dimension(dtype):
    y = bn.normalize(np.array([3.0, 8.0], dtype), np.array([1.0, 2.0]), np.array([4.0, 9.0]), axis=0, eps=0.0)
    np.testing.assert_array_equal(y, [1.0, 2.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_a_value_that_is_not_finite_stays_in_its_channel(layout, dtype, bad):
    x = layout.normal(dtype)
    expected, expected_saved = bn.batch_norm(x, axis=layout.axis)
    spoiled = x.copy()
    np.moveaxis(spoiled, layout.axis, 0)[1].flat[4] = bad
    y, saved = bn.batch_norm(spoiled, axis=layout.axis)
    rows, expected_rows = np.moveaxis(y, layout.axis, 0), np.moveaxis(expected, layout.axis, 0)
    others = np.arange(layout.channels) != 1
    np.testing.assert_array_equal(rows[others], expected_rows[others])
    np.testing.assert_array_equal(saved.rstd[others], expected_saved.rstd[others])
    assert np.isnan(rows[1].flat[4])
    assert not np.isfinite(saved.moments.mean[1])


def test_saved_holds_what_backward_needs(layout, dtype):
    x, (gamma, beta) = layout.normal(dtype), affine(layout, dtype)
    _, saved = bn.batch_norm(x, gamma, beta, axis=layout.axis, eps=EPS)
    assert saved.x is x
    np.testing.assert_array_equal(saved.gamma, gamma)
    assert saved.eps == EPS
    assert saved.axis % x.ndim == layout.axis % x.ndim


def test_saved_is_frozen(dtype):
    _, saved = bn.batch_norm(np.ones((2, 3), dtype))
    with pytest.raises(dataclasses.FrozenInstanceError):
        saved.eps = 1.0


def test_a_nan_variance_that_is_given_stays_in_its_channel():
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    y = bn.normalize(x, [0, 1, 2.0], [1, np.nan, 2.0])
    assert np.isnan(y[:, 1]).all()
    expected = bn.normalize(x, [0, 1, 2.0], [1, 1, 2.0])
    np.testing.assert_array_equal(y[:, ::2], expected[:, ::2])


def test_out_may_be_x_seen_with_axes_of_length_one():
    x = np.random.default_rng(0).normal(size=(4, 3))
    expected, _ = bn.batch_norm(x)
    bn.batch_norm(x[:, :, None], out=x.reshape(4, 3, 1))
    np.testing.assert_array_equal(x, expected)
