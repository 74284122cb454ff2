"""keep="y": y may overwrite x, and derivatives take xhat from y. keep=None: there are none."""

import dataclasses

import numpy as np
import pytest

import batchnorm as bn
from tolerances import UNIT_ROUNDOFF, inverted_xhat


def in_place(x, gamma=None, beta=None, **options):
    return bn.batch_norm(x, gamma, beta, keep="y", out=x, **options)


def parameters(channels, dtype, *, ratio=1.0):
    """Give gammas of both signs and betas of up to ratio times them."""
    rng = np.random.default_rng(3)
    gamma = rng.uniform(0.5, 2, channels) * np.where(np.arange(channels) % 2, -1, 1)
    return gamma.astype(dtype), (ratio * 0.999 * gamma * rng.uniform(-1, 1, channels)).astype(dtype)


def across(values, layout):
    shape = [1] * len(layout.shape)
    shape[layout.axis] = -1
    return np.asarray(values).reshape(shape)


def assert_like_those_from_x(got, expected, x, dy, gamma, beta, saved, layout):
    """Hold gradients from y against those from x: twice their own bound (4u), and what xhat's error brings."""
    axes = tuple(d for d in range(x.ndim) if d != layout.axis % x.ndim)
    u = UNIT_ROUNDOFF[x.dtype.name]
    wide, g = x.astype(np.float64), np.abs(dy.astype(np.float64))
    xhat = np.abs((wide - across(saved.moments.mean, layout)) * across(saved.rstd, layout))
    e = across(inverted_xhat(x.dtype, xhat.max(axes), np.abs(beta / gamma.astype(np.float64))), layout)
    n = x.size // layout.channels
    dot = (g * xhat).sum(axes, keepdims=True)
    total = g.sum(axes, keepdims=True)
    dgamma_bound = (8 * u * dot + e * total).reshape(-1)
    dx_bound = np.abs(across(gamma * saved.rstd, layout)) * (
        8 * u * (g + total / n + xhat * dot / n) + e * dot / n + (xhat + e) * e * total / n
    )
    assert (np.abs(got.dgamma.astype(np.float64) - expected.dgamma) <= dgamma_bound).all()
    assert (np.abs(got.dbeta.astype(np.float64) - expected.dbeta) <= 8 * u * total.reshape(-1)).all()
    assert (np.abs(got.dx.astype(np.float64) - expected.dx) <= dx_bound).all()


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1024.0])
def test_gradients_from_y_are_those_from_x(layout, dtype, ratio):
    x, dy = layout.normal(dtype), layout.normal(dtype, seed=1)
    gamma, beta = parameters(layout.channels, dtype, ratio=ratio)
    _, from_x = bn.batch_norm(x.copy(), gamma, beta, axis=layout.axis)
    expected = bn.backward(dy, from_x)
    _, saved = in_place(x.copy(), gamma, beta, axis=layout.axis)
    got = bn.backward(dy, saved)
    assert got.dgamma.dtype == got.dbeta.dtype == gamma.dtype
    assert_like_those_from_x(got, expected, x, dy, gamma, beta, from_x, layout)


def test_y_is_x_and_has_the_bits_of_batch_norm(layout, dtype):
    x = layout.normal(dtype)
    gamma, beta = parameters(layout.channels, dtype)
    expected, from_x = bn.batch_norm(x.copy(), gamma, beta, axis=layout.axis)
    y, saved = in_place(x, gamma, beta, axis=layout.axis)
    assert y is x
    assert (y == expected).all()
    assert (saved.moments.mean == from_x.moments.mean).all() and (saved.rstd == from_x.rstd).all()


def test_any_number_of_threads_gives_the_same_bits(layout, dtype, threads):
    dy = layout.normal(dtype, seed=1)
    gamma, beta = parameters(layout.channels, dtype)
    results = []
    for n in (1, threads):
        _, saved = in_place(layout.normal(dtype), gamma, beta, axis=layout.axis, num_threads=n)
        results.append(bn.backward(dy, saved, num_threads=n)[:3])
    for a, b in zip(*results, strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("place", ["dy", "y"])
def test_dx_may_take_the_place_of_dy_or_y(layout, dtype, place):
    dy = layout.normal(dtype, seed=1)
    y, saved = in_place(layout.normal(dtype), axis=layout.axis)
    expected = bn.backward(dy, saved)
    out = dy if place == "dy" else y
    got = bn.backward(dy, saved, out=out)
    assert got.dx is out
    for a, b in zip(got[:3], expected[:3], strict=True):
        assert (a == b).all()


def test_y_may_have_moved(layout, dtype):
    dy = layout.normal(dtype, seed=1)
    y, saved = in_place(layout.normal(dtype), axis=layout.axis)
    expected = bn.backward(dy, saved)
    moved = y.copy()
    y[...] = np.nan
    for a, b in zip(bn.backward(dy, dataclasses.replace(saved, y=moved))[:3], expected[:3], strict=True):
        assert (a == b).all()


def test_a_later_change_of_gamma_and_beta_does_not_count(dtype):
    gamma, beta = parameters(3, dtype)
    x, dy = np.random.default_rng(0).normal(size=(2, 8, 3)).astype(dtype)
    _, saved = in_place(x, gamma, beta)
    expected = bn.backward(dy, saved)
    gamma[:], beta[:] = 7, 7
    for a, b in zip(bn.backward(dy, saved)[:3], expected[:3], strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("bad", [0.0, 2.0**-11, np.nan, np.inf])
def test_a_gamma_that_cannot_be_inverted_is_refused_by_its_channel_and_nothing_is_written(dtype, bad):
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(dtype)
    before = x.copy()
    with pytest.raises(ValueError, match=r"^gamma must .* in channel 2$"):
        in_place(x, np.array([1, -1, bad]), np.array([0.0, 0.0, 1.0]))
    assert (x == before).all()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("end", ["least", "most"])
def test_gamma_is_taken_up_to_the_ends_of_its_range_and_not_beyond(dtype, end, sign):
    exponent = {"float32": 126, "float64": 150}[dtype.name]
    last = sign * 2.0 ** (exponent if end == "most" else -exponent)
    beyond = np.nextafter(last, sign * np.inf if end == "most" else 0.0)
    x = np.random.default_rng(0).normal(size=(8, 1)).astype(dtype)
    before = x.copy()
    with pytest.raises(ValueError, match=r"^gamma must have absolute values from .* got .* in channel 0$"):
        in_place(x, np.array([beyond]))
    assert (x == before).all()
    y, saved = in_place(x, np.array([last]))
    assert np.isfinite(y).all()
    dy = np.random.default_rng(1).normal(size=(8, 1)).astype(dtype)
    expected = bn.backward(dy, bn.batch_norm(before)[1])  # dgamma does not depend on gamma
    np.testing.assert_allclose(bn.backward(dy, saved).dgamma, expected.dgamma, rtol=64 * UNIT_ROUNDOFF[dtype.name])


def test_beta_is_taken_up_to_1024_times_gamma_and_not_beyond():
    x = np.random.default_rng(0).normal(size=(8, 2))
    gamma, beta = np.array([1.0, -0.5]), np.array([-1024.0, 512.0])
    in_place(x.copy(), gamma, beta)
    for c in range(2):
        far = beta.copy()
        far[c] = np.nextafter(far[c], np.sign(far[c]) * np.inf)
        with pytest.raises(ValueError, match=rf"^gamma must be at least abs\(beta\)/1024 .* in channel {c}$"):
            in_place(x, gamma, far)


def test_values_of_16_bits_are_refused_as_their_y_has_lost_too_much():
    x = np.ones((4, 2), np.float16)
    with pytest.raises(TypeError, match=r"^x must have dtype float32 or float64 for keep='y'"):
        in_place(x)


def test_a_read_only_x_is_refused():
    x = np.zeros((4, 2))
    x.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out must be writeable, got a read-only array$"):
        in_place(x)


def test_nothing_is_kept_for_a_call_without_derivatives():
    x = np.random.default_rng(0).normal(size=(4, 2))
    _, saved = bn.batch_norm(x, keep=None)
    assert saved.x is None
    assert saved.y is None
    with pytest.raises(ValueError, match=r"^saved must hold x, got that of a call with out=x.* or with keep=None$"):
        bn.backward(x, saved)
    assert bn.batch_norm(x, keep=None, activation="relu")[1].relu is None
    mean, _ = bn.update_running(np.zeros(2), np.ones(2), saved)
    assert (mean != 0).all()


@pytest.mark.parametrize("word", ["z", "X", True, 1])
def test_other_words_are_refused(word):
    with pytest.raises(ValueError, match=r"^keep must be 'x' or 'y', got "):
        bn.batch_norm(np.ones((4, 2)), keep=word)


@pytest.mark.parametrize("follows", ["residual", "activation"])
def test_y_tells_nothing_after_a_residual_or_an_activation(follows):
    x = np.ones((4, 2))
    value = {"residual": x, "activation": "relu"}[follows]
    with pytest.raises(ValueError, match=f"^keep must be 'x' with {follows}, after which y does not tell"):
        bn.batch_norm(x, keep="y", **{follows: value})


def test_only_wanted_gradients_come():
    dy = np.ones((4, 2))
    _, saved = in_place(np.random.default_rng(0).normal(size=(4, 2)))
    dx, dgamma, dbeta, _ = bn.backward(dy, saved, needs=("beta",))
    assert dx is None and dgamma is None
    assert (dbeta == 4).all()


@pytest.mark.parametrize("view", ["strided", "transposed", "fortran"])
def test_any_memory_order_is_taken(dtype, view):
    values, dy = np.random.default_rng(0).normal(size=(2, 6, 4, 10)).astype(dtype)
    x = {
        "strided": lambda: np.repeat(values, 2, axis=2)[:, :, ::2],
        "transposed": lambda: np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 1, -1)), -1, 1),
        "fortran": lambda: np.asfortranarray(values),
    }[view]()
    y, from_x = bn.batch_norm(values.copy(), axis=1)
    expected = bn.backward(dy, from_x)
    got_y, saved = in_place(x)
    dx, dgamma, dbeta, _ = bn.backward(dy, saved)
    # Other orders sum in another order: beyond the last digits nothing differs.
    close = 100 * UNIT_ROUNDOFF[np.dtype(dtype).name]
    assert got_y is x
    for a, b in ((got_y, y), (dx, expected.dx), (dgamma, expected.dgamma), (dbeta, expected.dbeta)):
        assert np.abs(a - b).max() <= close * max(1, np.abs(b).max())


@pytest.mark.parametrize("exponent", [-100, 100])
@pytest.mark.parametrize("spread", [-400, 400])
def test_a_gamma_far_from_1_overflows_nothing(exponent, spread):
    x = np.random.default_rng(0).normal(size=(50, 1)) * 2.0**spread
    dy = np.random.default_rng(1).normal(size=(50, 1))
    gamma = np.array([-(2.0**exponent)])
    _, from_x = bn.batch_norm(x.copy(), gamma, eps=0.0)
    expected = bn.backward(dy, from_x)
    _, saved = in_place(x, gamma, eps=0.0)
    got = bn.backward(dy, saved)
    for a, b in zip(got[:3], expected[:3], strict=True):
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= 1e-13 * np.abs(b).max()


def test_an_empty_batch_has_gradients_of_zero(dtype):
    _, saved = in_place(np.zeros((0, 2), dtype), beta=np.ones(2))
    dx, dgamma, dbeta, _ = bn.backward(np.zeros((0, 2), dtype), saved)
    assert dx.shape == (0, 2)
    assert (dgamma == 0).all() and (dbeta == 0).all()


def test_each_mode_tells_the_bytes_of_the_tensor_that_it_keeps(dtype):
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(dtype)
    assert bn.batch_norm(x)[1].saved_bytes == x.nbytes
    assert bn.batch_norm(x, out=x)[1].saved_bytes == 0
    assert in_place(x)[1].saved_bytes == 0
