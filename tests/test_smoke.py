"""If only one file is run, this is the one: seconds, on every built wheel."""

import numpy as np

import batchnorm as bn
import reference
from tolerances import assert_backward, assert_forward, assert_within

RNG = np.random.default_rng(1)
X = RNG.normal(3, 2, (4, 3, 5, 6)).astype(np.float32)
DY = RNG.normal(size=X.shape).astype(np.float32)
GAMMA, BETA = RNG.uniform(0.5, 2, 3).astype(np.float32), RNG.normal(size=3).astype(np.float32)


def test_training_forward_and_backward_are_right():
    y, saved = bn.batch_norm(X, GAMMA, BETA)
    exact = reference.exact_forward(X, GAMMA, BETA, axis=1, eps=1e-5)
    scales = reference.forward_scales(X, GAMMA, BETA, exact, axis=1)
    assert_forward(y, (saved.moments.mean, saved.moments.var(), saved.rstd), exact, scales, X.dtype)

    gradients = reference.exact_backward(DY, X, GAMMA, axis=1, eps=1e-5)
    scales = reference.backward_scales(DY, X, GAMMA, exact, gradients, axis=1)
    assert_backward(bn.backward(DY, saved), gradients, scales, X.dtype)


def test_inference_is_right():
    mean, var = np.array([2.5, 3.0, 3.5]), np.array([1.0, 4.0, 9.0])
    y = bn.normalize(X, mean, var, GAMMA, BETA)
    exact = reference.exact_forward(X, GAMMA, BETA, axis=1, eps=1e-5, mean=mean, var=var)
    scales = reference.forward_scales(X, GAMMA, BETA, exact, axis=1)
    assert_within("y", X.dtype, y, exact.y, scale=scales.y, at=scales.y_at)


def test_channels_last_is_right():
    x = np.ascontiguousarray(np.moveaxis(X, 1, -1))
    y, _ = bn.batch_norm(x, GAMMA, BETA, axis=-1)
    exact = reference.exact_forward(x, GAMMA, BETA, axis=-1, eps=1e-5)
    scales = reference.forward_scales(x, GAMMA, BETA, exact, axis=-1)
    assert_within("y", x.dtype, y, exact.y, scale=scales.y, at=scales.y_at)


def test_statistics_of_parts_merge_to_those_of_the_whole():
    merged, whole = bn.moments(X[:1]) | bn.moments(X[1:]), bn.moments(X)
    assert_within("merge", "float64", merged.mean, whole.mean, scale=np.abs(X).max())


def test_layer_trains_then_uses_its_running_statistics():
    layer = bn.BatchNorm(3)
    layer(X)
    batch = reference.forward(X, None, None, axis=1, eps=1e-5)
    count = X.size // 3
    running_mean = reference.running_update(0.0, batch.mean, 0.1)
    running_var = reference.running_update(1.0, batch.var * count / (count - 1), 0.1)
    assert_within("oracles", "float64", layer.running_mean, running_mean, scale=np.abs(running_mean).max())
    assert_within("oracles", "float64", layer.running_var, running_var, scale=running_var.max())

    y = layer.eval()(X)
    expected = bn.normalize(X, layer.running_mean, layer.running_var, layer.gamma, layer.beta)
    np.testing.assert_array_equal(y, expected)


def test_empty_batch_gives_an_empty_result():
    y, saved = bn.batch_norm(X[:0])
    assert y.shape == (0, 3, 5, 6)
    assert (saved.moments.count == 0).all()


def test_a_mistake_raises_instead_of_crashing():
    try:
        bn.batch_norm(X, GAMMA[:2])
    except ValueError as error:
        assert str(error) == "gamma must have shape (3,), got (2,)"
    else:
        raise AssertionError("a gamma of the wrong length was accepted")


def test_this_machine_has_an_instruction_set():
    assert bn.active_isa() in [*bn.available_isas(), "reference"]
