"""ReLU and add then ReLU in the same pass: the bits of the steps one after another, and a mask of one bit."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batchnorm as bn
import frozen
from batchnorm import BatchNorm

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
SHAPES = [((4, 7, 5, 3), 1), ((6, 5, 4), -1), ((33, 20), 1), ((3, 70, 2), 1), ((2, 1, 9), 0), ((0, 3), 1)]


def case(shape, axis, dtype, order="C", seed=0):
    rng = np.random.default_rng(seed)
    channels = shape[axis]
    x, dy, residual = (np.asarray(rng.normal(0.2, 2, shape), dtype, order=order) for _ in range(3))
    gamma, beta = rng.normal(size=channels), rng.normal(size=channels)
    return x, dy, residual, gamma, beta


def arithmetic(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("added", [True, False])
def test_training_gives_the_bits_of_the_steps_one_after_another(shape, axis, dtype, order, added):
    x, dy, residual, gamma, beta = case(shape, axis, dtype, order)
    z, plain = bn.batch_norm(x.astype(arithmetic(dtype)), gamma, beta, axis=axis)
    total = z + residual.astype(z.dtype) if added else z
    y, saved = bn.batch_norm(x, gamma, beta, residual=residual if added else None, axis=axis, activation="relu")
    assert same(y, np.maximum(total, 0).astype(dtype))
    assert np.array_equal(saved.relu.to_bool(), total > 0)
    assert np.array_equal(saved.moments.mean, plain.moments.mean)
    assert y.strides == np.empty_like(x).strides

    gate = np.where(total > 0, dy, np.zeros((), dtype))
    wanted = bn.backward(gate, bn.batch_norm(x, gamma, beta, axis=axis)[1])
    got = bn.backward(dy, saved)
    assert same(got.dx, wanted.dx)
    assert same(got.dgamma, wanted.dgamma)
    assert same(got.dbeta, wanted.dbeta)
    assert got.dresidual is None if not added else same(got.dresidual, gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [*SHAPES, ((50,), 0)])
def test_inference_gives_the_bits_of_the_steps_one_after_another(shape, axis, dtype):
    x, dy, residual, gamma, beta = case(shape, axis, dtype)
    mean, var = np.linspace(-1, 1, shape[axis]), np.linspace(0.5, 2, shape[axis])
    z = bn.normalize(x.astype(arithmetic(dtype)), mean, var, gamma, beta, axis=axis)
    total = z + residual.astype(z.dtype)
    options = {"residual": residual, "axis": axis, "activation": "relu"}
    y, saved = bn.normalize(x, mean, var, gamma, beta, **options, save=True)
    assert same(y, np.maximum(total, 0).astype(dtype))
    assert same(y, bn.normalize(x, mean, var, gamma, beta, **options))
    gate = np.where(total > 0, dy, np.zeros((), dtype))
    wanted = frozen.backward(gate, x, mean, var, gamma, axis=axis)
    got = bn.backward(dy, saved)
    assert same(got.dx, wanted.dx)
    assert same(got.dgamma, wanted.dgamma)
    assert same(got.dresidual, gate)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(0, 20), st.booleans())
def test_any_shape_at_any_address(outer, channels, inner, place, last):
    shape = (outer + 1, inner, channels) if last else (outer + 1, channels, inner)
    size = int(np.prod(shape))
    rng = np.random.default_rng(size + place)
    memory = rng.normal(size=(3, size + place)).astype(np.float32)
    x, dy, out = (m[place:].reshape(shape) for m in memory)
    axis = -1 if last else 1
    z, plain = bn.batch_norm(x, axis=axis)
    y, saved = bn.batch_norm(x, axis=axis, out=out, activation="relu")
    assert y is out
    assert same(y, np.maximum(z, 0))
    assert np.array_equal(saved.relu.to_bool(), z > 0)
    got = bn.backward(dy, saved)
    assert same(got.dx, bn.backward(np.where(z > 0, dy, np.float32(0)), plain).dx)


def test_a_mask_is_one_bit_an_element():
    y, saved = bn.batch_norm(np.random.default_rng(0).normal(size=(10, 16, 100)).astype(np.float32), activation="relu")
    assert y.size // 8 <= saved.relu.nbytes <= y.size // 8 + 24
    assert saved.saved_bytes == y.nbytes + saved.relu.nbytes
    assert not saved.relu.data.flags.writeable


def test_threads_and_memory_order_change_no_bit():
    x, dy, residual, gamma, beta = case((40, 64, 30, 30), 1, np.float32)
    y, saved = bn.batch_norm(x, gamma, beta, residual=residual, num_threads=1, activation="relu")
    gradients = bn.backward(dy, saved, num_threads=1)
    for threads in (2, 3):
        again, kept = bn.batch_norm(x, gamma, beta, residual=residual, num_threads=threads, activation="relu")
        assert same(again, y)
        assert np.array_equal(kept.relu.to_bool(), saved.relu.to_bool())
        for a, b in zip(bn.backward(dy, kept, num_threads=threads), gradients, strict=True):
            assert same(a, b)
    turned = np.asarray(residual, order="F")
    assert same(bn.batch_norm(x, gamma, beta, residual=turned, activation="relu")[0], y)


def test_x_and_dy_may_lie_elsewhere_in_another_order_at_backward():
    x, dy, residual, gamma, beta = case((5, 6, 7, 3), 1, np.float32)
    _, saved = bn.batch_norm(x, gamma, beta, residual=residual, activation="relu")
    wanted = bn.backward(dy, saved)
    moved = dataclasses.replace(saved, x=np.asarray(x, order="F"))
    got = bn.backward(np.asarray(dy, order="F"), moved)
    assert np.array_equal(got.dx, wanted.dx)
    assert np.array_equal(got.dresidual, wanted.dresidual)
    assert np.array_equal(got.dgamma, wanted.dgamma)


def test_outputs_may_be_inputs():
    x, dy, residual, gamma, beta = case((8, 6, 50), 1, np.float32)
    y, saved = bn.batch_norm(x, gamma, beta, residual=residual, activation="relu")
    wanted = bn.backward(dy, saved)
    for target in ("x", "residual"):
        given_x, given_residual = x.copy(), residual.copy()
        out = given_x if target == "x" else given_residual
        again, kept = bn.batch_norm(given_x, gamma, beta, residual=given_residual, out=out, activation="relu")
        assert again is out
        assert same(again, y)
        assert (kept.x is None) == (target == "x")
    for first, second in [("dy", None), (None, "dy"), ("x", "dy"), ("dy", "x")]:
        arrays = {"x": x.copy(), "dy": dy.copy(), None: None}
        kept = bn.batch_norm(arrays["x"], gamma, beta, residual=residual, activation="relu")[1]
        got = bn.backward(arrays["dy"], kept, out=(arrays[first], arrays[second]))
        assert same(got.dx, wanted.dx)
        assert same(got.dresidual, wanted.dresidual)
        assert same(got.dgamma, wanted.dgamma)
        assert first is None or got.dx is arrays[first]


@pytest.mark.parametrize("needs", [(), ("x",), ("residual",), ("gamma", "residual"), ("x", "beta")])
def test_only_what_is_asked_for_is_given(needs):
    x, dy, residual, gamma, beta = case((8, 6, 50), 1, np.float32)
    _, saved = bn.batch_norm(x, gamma, beta, residual=residual, activation="relu")
    everything = bn.backward(dy, saved)
    some = bn.backward(dy, saved, needs=needs)
    for name, wanted, got in zip(("x", "gamma", "beta", "residual"), everything, some, strict=True):
        assert got is None if name not in needs else same(got, wanted)


def test_nan_stays_and_lets_its_gradient_through():
    x = np.array([[1.0, np.nan], [3.0, 1.0]], np.float32)
    y, saved = bn.batch_norm(x, activation="relu")
    assert np.isnan(y[:, 1]).all()
    assert saved.relu.to_bool()[:, 1].all()


def error_of(call):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return f"{caught.type.__name__}: {caught.value}"


def test_arguments_that_do_not_fit_are_named():
    x, dy, residual, *_ = case((4, 3, 5), 1, np.float32)
    _, saved = bn.batch_norm(x, residual=residual, activation="relu")
    assert (
        error_of(lambda: bn.batch_norm(x, residual=residual[:2], activation="relu"))
        == "ValueError: residual must have shape (4, 3, 5), got (2, 3, 5)"
    )
    assert (
        error_of(lambda: bn.batch_norm(x, residual=residual.astype(np.float64), activation="relu"))
        == "TypeError: residual must have dtype float32, got float64"
    )
    assert (
        error_of(
            lambda: bn.batch_norm(x[:, :, :4], residual=residual[:, :, :4], out=residual[:, :, 1:], activation="relu")
        )
        == "ValueError: out must be residual itself or share no memory with residual, got a partial overlap"
    )
    assert error_of(lambda: bn.backward(dy, x)).startswith(
        "TypeError: saved must be what a forward call saved, got ndarray"
    )
    assert (
        error_of(lambda: bn.backward(dy, saved, out=(np.empty_like(x),)))
        == "TypeError: out must be a tuple (dx, dresidual) of arrays or None, got tuple"
    )
    assert (
        error_of(lambda: bn.backward(dy, saved, needs=("y",)))
        == "ValueError: needs must name some of 'x', 'gamma', 'beta', 'residual', got 'y'"
    )
    assert (
        error_of(lambda: bn.backward(dy[:2], dataclasses.replace(saved, x=x[:2])))
        == "ValueError: saved.x must have shape (4, 3, 5), got (2, 3, 5)"
    )
    assert error_of(lambda: bn.backward(dy, dataclasses.replace(saved, relu=saved.relu.data))).startswith(
        "TypeError: saved.relu must be a ReluMask or None"
    )
    assert error_of(lambda: bn.batch_norm(x, activation="gelu")) == "ValueError: activation must be 'relu', got 'gelu'"


def test_a_layer_with_relu_is_the_layer_and_relu():
    x, dy, residual, *_ = case((8, 6, 50), 1, np.float32)
    plain, fused = BatchNorm(6), BatchNorm(6, activation="relu")
    for step in range(3):
        z = plain(x + np.float32(step))
        y = fused(x + np.float32(step), residual=residual)
        assert same(y, np.maximum(z + residual, 0))
        gate = np.where(z + residual > 0, dy, np.float32(0))
        assert same(fused.backward(dy), plain.backward(gate))
        assert same(fused.dgamma, plain.dgamma)
        assert same(fused.dbeta, plain.dbeta)
        assert same(fused.dresidual, gate)
    assert np.array_equal(fused.running_var, plain.running_var)
    plain.eval(), fused.eval()
    z, y = plain(x), fused(x)
    assert same(y, np.maximum(z, 0))
    gate = np.where(z > 0, dy, np.float32(0))
    assert same(fused.backward(dy), plain.backward(gate))
    assert same(fused.dgamma, plain.dgamma)
    assert fused.dresidual is None
    assert "activation='relu'" in repr(fused)


def test_evaluation_makes_no_mask_before_backward_asks_for_one(monkeypatch):
    x, dy, residual, *_ = case((8, 6, 50), 1, np.float32)
    made = []

    def counted(*args, save=False, **options):
        made.append(save)
        return bn.normalize(*args, save=save, **options)

    monkeypatch.setattr("batchnorm.layers.batch.normalize", counted)
    layer = BatchNorm(6, activation="relu").eval()
    layer(x, residual=residual)
    layer(x, out=np.empty_like(x))
    layer(x, out=x.copy(), keep=None)
    assert made == [False, False, False]
    layer(x)
    layer.backward(dy)
    assert made[-2:] == [False, True]
    layer.train().freeze()(x)  # fine-tuning: backward is certain
    assert made[-1]


@pytest.mark.parametrize("out", [None, "fresh", "residual"])
@pytest.mark.parametrize("added", [True, False])
def test_backward_of_evaluation_is_that_of_its_call_whatever_changed_since(added, out):
    x, dy, residual, gamma, beta = case((8, 6, 50), 1, np.float32)
    layer = BatchNorm(6, activation="relu")
    layer.gamma[...], layer.beta[...] = gamma, beta
    layer(2 * x + 1)
    mean, var = layer.running_mean.copy(), layer.running_var.copy()
    gamma, beta = layer.gamma.copy(), layer.beta.copy()
    given = residual if added else None
    options = {"residual": given, "activation": "relu", "save": True}
    expected = bn.backward(dy, bn.normalize(x, mean, var, gamma, beta, **options)[1])
    to = {None: None, "fresh": np.empty_like(x), "residual": residual}[out]
    layer.eval()(x, residual=given, out=to)
    layer.beta += 3
    layer.gamma *= -1
    layer.reset_statistics()
    layer.train()
    for _ in range(2):
        assert same(layer.backward(dy), expected.dx)
        assert same(layer.dgamma, expected.dgamma)
        assert same(layer.dbeta, expected.dbeta)
        assert (layer.dresidual is None) != added
        assert not added or same(layer.dresidual, expected.dresidual)


def test_a_layer_with_relu_freezes_its_affine_and_takes_single_values():
    fused = BatchNorm(3, activation="relu", single_value="skip")
    x, dy, residual, *_ = case((4, 3), 1, np.float32)
    fused(x, residual=residual)
    fused.freeze(statistics=False).backward(dy)
    assert fused.dgamma is None
    assert fused.dresidual is not None
    y = fused(x[:1], residual=residual[:1])
    assert same(y, np.maximum(residual[:1], 0))
    assert fused.backward(dy[:1], needs=("x",)) is not None
    assert fused.dresidual is None


def test_a_layer_knows_no_other_activation():
    assert (
        error_of(lambda: BatchNorm(3, activation="gelu")) == "ValueError: activation must be None or 'relu', got 'gelu'"
    )
