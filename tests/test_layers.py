"""The layer: what it adds to the functions is state, and every claim about that state is here.

The oracle is the definition in plain NumPy float64. Inputs are float64 unless the claim is about float32, so
that the bounds only hold the rounding of a few float64 operations: RTOL is 2**10 of them.
"""

import copy
import doctest
import math
import pickle
import re
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batchnorm as bn
from batchnorm import state_file
from batchnorm.layers import batch as batch_module
from batchnorm.layers import layer as layer_module
from batchnorm.layers import statistics as statistics_module
from batchnorm.layers.statistics import updated

RTOL = 2**10 * 2.0**-53
EPS = 1e-5


def normal(*shape, seed=0, mean=3.0, std=2.0):
    return np.random.default_rng(seed).normal(mean, std, shape)


def per_channel(v, x, axis=1):
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.asarray(v, np.float64).reshape(shape)


def other_axes(x, axis=1):
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def batch_statistics(x, ddof, axis=1):
    """Mean and variance of each channel, divided by n - ddof."""
    x = x.astype(np.float64)
    return x.mean(other_axes(x, axis)), x.var(other_axes(x, axis), ddof=ddof)


def forward(x, mean, var, gamma=1.0, beta=0.0, axis=1, eps=EPS):
    mean, var, gamma, beta = (per_channel(v, x, axis) for v in (mean, var, gamma, beta))
    return (x - mean) / np.sqrt(var + eps) * gamma + beta


def backward(dy, x, mean, var, gamma=1.0, axis=1, eps=EPS, frozen=False):
    """Return dx, dgamma, dbeta; with `frozen`, mean and var do not depend on x."""
    axes, n = other_axes(x, axis), x.size / x.shape[axis]
    rstd = 1 / np.sqrt(per_channel(var, x, axis) + eps)
    xhat = (x - per_channel(mean, x, axis)) * rstd
    dgamma, dbeta = (dy * xhat).sum(axes), dy.sum(axes)
    through = 0 if frozen else per_channel(dbeta, x, axis) / n + xhat * per_channel(dgamma, x, axis) / n
    return per_channel(gamma, x, axis) * rstd * (dy - through), dgamma, dbeta


def assert_close(actual, expected, scale=1.0):
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=RTOL * scale)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def trained_layer(channels=3, batches=2, **settings):
    """Return a layer with parameters, statistics, gradients and something kept for backward."""
    layer = bn.BatchNorm(channels, **settings)
    for seed in range(batches):
        x = normal(8, channels, 5, seed=seed).astype(np.float32)
        y = layer(x)
        layer.backward(np.cos(y))
    if layer.gamma is not None:
        layer.gamma += np.arange(channels, dtype=layer.dtype)
    if layer.beta is not None:
        layer.beta -= layer.dbeta
    return layer


def snapshot(layer):
    """Everything about a layer that a failing call could have changed, as comparable values."""
    gradients = [None if g is None else g.tobytes() for g in (layer.dgamma, layer.dbeta)]
    state = {name: (value.dtype, value.shape, value.tobytes()) for name, value in layer.state_dict().items()}
    return state, gradients, layer.training, layer.update_count, repr(layer), id(layer._state.call)


# ---- forward ----------------------------------------------------------------------------------------------


def test_training_normalizes_with_the_biased_statistics_of_the_batch():
    x, layer = normal(4, 3, 5, 6), bn.BatchNorm(3)
    assert_close(layer(x), forward(x, *batch_statistics(x, ddof=0)))


@pytest.mark.parametrize("ddof", [0, 1])
def test_ddof_does_not_change_the_training_output(ddof):
    x = normal(4, 3, 5, 6)
    assert same_bits(bn.BatchNorm(3, ddof=ddof)(x), bn.BatchNorm(3)(x))


def test_training_output_is_that_of_the_function():
    x = normal(4, 3, 5).astype(np.float32)
    layer = trained_layer()
    y, _ = bn.batch_norm(x, layer.gamma, layer.beta, axis=1, eps=EPS)
    assert same_bits(layer(x), y)


def test_evaluation_normalizes_with_the_running_statistics():
    layer, x = trained_layer(), normal(4, 3, 5, seed=9)
    y = layer.eval()(x)
    assert_close(y, forward(x, layer.running_mean, layer.running_var, layer.gamma, layer.beta), scale=10)


def test_evaluation_changes_no_state():
    layer = trained_layer().eval()
    before = layer.state_dict()
    layer(normal(4, 3, 5))
    assert all(same_bits(before[name], value) for name, value in layer.state_dict().items())


def test_evaluation_takes_one_value_a_channel():
    layer = trained_layer().eval()
    x = normal(1, 3)
    assert_close(layer(x), forward(x, layer.running_mean, layer.running_var, layer.gamma, layer.beta), scale=10)


def test_parameters_scale_and_shift_each_channel():
    x, layer = normal(4, 3, 5), bn.BatchNorm(3, dtype=np.float64)
    layer.gamma, layer.beta = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 100.0])
    assert_close(layer(x), forward(x, *batch_statistics(x, 0), layer.gamma, layer.beta), scale=100)


@pytest.mark.parametrize("axis", [-8, 7])
def test_an_axis_may_be_the_first_or_last_of_eight(axis):
    x = normal(2, 2, 1, 2, 1, 1, 2, 2)
    assert_close(bn.BatchNorm(2, axis=axis)(x), forward(x, *batch_statistics(x, 0, axis), axis=axis))


@pytest.mark.parametrize("axis", [-1, -2, 0, 1, 2])
def test_axis_names_the_channels(axis):
    x = normal(4, 5, 6)
    layer = bn.BatchNorm(x.shape[axis], axis=axis)
    assert_close(layer(x), forward(x, *batch_statistics(x, 0, axis), axis=axis))


@pytest.mark.parametrize("training", [True, False])
def test_out_receives_y_and_is_returned(training):
    layer, x = trained_layer().train(training), normal(4, 3, 5)
    out = np.empty_like(x)
    expected = copy.copy(layer)(x)
    assert layer(x, out=out) is out
    assert same_bits(out, expected)


@pytest.mark.parametrize("training", [True, False])
def test_out_may_be_x_itself(training):
    layer, x = trained_layer().train(training), normal(4, 3, 5)
    expected = copy.copy(layer)(x)
    layer(x, out=x)
    assert same_bits(x, expected)


@pytest.mark.parametrize("training", [True, False])
def test_neither_pass_modifies_its_inputs(training):
    layer, x, dy = trained_layer().train(training), normal(4, 3, 5), normal(4, 3, 5, seed=1)
    x_before, dy_before = x.copy(), dy.copy()
    layer(x)
    layer.backward(dy)
    assert same_bits(x, x_before)
    assert same_bits(dy, dy_before)


def test_zero_channels_are_normalized_to_nothing():
    layer, x = bn.BatchNorm(0), np.empty((4, 0, 5), np.float32)
    assert layer(x).shape == layer.backward(x).shape == (4, 0, 5)


# ---- running statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("update_rate", [0.1, 0.0, 1.0, None])
def test_running_statistics_start_at_zero_and_one(update_rate):
    layer = bn.BatchNorm(3, update_rate=update_rate)
    assert layer.running_mean.tolist() == [0, 0, 0]
    assert layer.running_var.tolist() == [1, 1, 1]
    assert layer.update_count == 0


@pytest.mark.parametrize("update_rate", [0.1, 0.5, 0.999])
def test_running_statistics_move_by_the_update_rate(update_rate):
    layer, mean, var = bn.BatchNorm(3, update_rate=update_rate), np.zeros(3), np.ones(3)
    for seed in range(4):
        x = normal(6, 3, seed=seed)
        layer(x)
        batch_mean, batch_var = batch_statistics(x, ddof=1)
        mean = (1 - update_rate) * mean + update_rate * batch_mean
        var = (1 - update_rate) * var + update_rate * batch_var
    assert_close(layer.running_mean, mean)
    assert_close(layer.running_var, var)


def test_running_var_uses_unbiased_variance_by_default():
    x, layer = normal(4, 3), bn.BatchNorm(3, update_rate=1)
    layer(x)
    assert_close(layer.running_var, batch_statistics(x, ddof=1)[1])


def test_ddof_zero_makes_running_var_biased():
    x, layer = normal(4, 3), bn.BatchNorm(3, update_rate=1, ddof=0)
    layer(x)
    assert_close(layer.running_var, batch_statistics(x, ddof=0)[1])


def test_rate_one_stores_exactly_the_batch_value():
    layer, x = trained_layer(update_rate=1), normal(7, 3, 11, mean=1e6)
    layer(x)
    moments = bn.moments(x)
    assert same_bits(layer.running_mean, np.array(moments.mean))
    assert same_bits(layer.running_var, np.array(moments.var(1)))


def test_rate_zero_leaves_the_bits():
    layer = bn.BatchNorm(3, update_rate=0)
    odd = {"running_mean": np.array([-0.0, 0.1, 1e-320]), "running_var": np.array([5e-324, 0.3, 1e300])}
    layer.load_state_dict(layer.state_dict() | odd)
    layer(normal(4, 3))
    assert same_bits(layer.running_mean, odd["running_mean"])
    assert same_bits(layer.running_var, odd["running_var"])


def test_rate_zero_still_counts_the_update():
    layer = bn.BatchNorm(3, update_rate=0)
    layer(normal(4, 3))
    assert layer.update_count == 1


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_update_rate_none_gives_the_exact_pooled_statistics(ddof, mean):
    layer = bn.BatchNorm(2, update_rate=None, ddof=ddof)
    batches = [normal(n, 2, mean=mean, seed=n) for n in (2, 7, 64, 3, 29)]
    for x in batches:
        layer(x)
    for c in range(2):
        # math.fsum rounds once: the oracle's only errors are those of three operations an element.
        seen = [float(v) for x in batches for v in x[:, c]]
        exact_mean = math.fsum(seen) / len(seen)
        off = math.fsum(v - exact_mean for v in seen)  # of the rounded mean
        m2 = math.fsum((v - exact_mean) ** 2 for v in seen) - off**2 / len(seen)
        assert layer.running_mean[c] == pytest.approx(exact_mean, rel=2.0**-51)
        assert layer.running_var[c] == pytest.approx(m2 / (len(seen) - ddof), rel=2.0**-49)


def test_running_statistics_are_float64_whatever_x_is():
    layer = bn.BatchNorm(3, dtype=np.float16)
    layer(normal(4, 3).astype(np.float32))
    assert layer.running_mean.dtype == layer.running_var.dtype == np.float64


def test_each_training_call_counts_one_update():
    layer = bn.BatchNorm(3)
    for _ in range(5):
        layer(normal(4, 3))
    layer.eval()(normal(4, 3))
    assert layer.update_count == 5


@pytest.mark.parametrize("update_rate", [0.1, 1.0, None])
def test_an_empty_batch_leaves_statistics_and_count(update_rate):
    layer = trained_layer(update_rate=update_rate)
    before = layer.state_dict()
    assert layer(np.empty((0, 3, 5), np.float32)).shape == (0, 3, 5)
    assert all(same_bits(before[name], value) for name, value in layer.state_dict().items())


def test_the_gradients_of_an_empty_batch_are_zero():
    layer, x = trained_layer(), np.empty((0, 3, 5), np.float32)
    layer(x)
    assert layer.backward(x).shape == (0, 3, 5)
    assert layer.dgamma.tolist() == layer.dbeta.tolist() == [0, 0, 0]


@pytest.mark.parametrize("update_rate", [0.1, 1.0, None])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_value_stays_in_the_statistics_of_its_channel(update_rate, bad):
    settings = {"update_rate": update_rate, "nonfinite": "propagate"}
    clean, poisoned = bn.BatchNorm(3, **settings), bn.BatchNorm(3, **settings)
    for seed in range(2):
        x = normal(4, 3, seed=seed)
        clean(x)
        if seed == 1:
            x[2, 1] = bad
        poisoned(x)
    assert not np.isfinite(poisoned.running_mean[1])
    assert np.isnan(poisoned.running_var[1])
    for name in ("running_mean", "running_var"):
        assert same_bits(getattr(poisoned, name)[[0, 2]], getattr(clean, name)[[0, 2]])


def test_rate_zero_keeps_a_non_finite_batch_out():
    layer = bn.BatchNorm(1, update_rate=0, nonfinite="propagate")
    layer(np.array([[np.inf], [1.0], [2.0]]))
    assert (layer.running_mean[0], layer.running_var[0]) == (0, 1)


def test_rate_one_forgets_a_non_finite_batch():
    layer, x = bn.BatchNorm(1, update_rate=1, nonfinite="propagate"), np.array([[1.0], [3.0]])
    layer(x + np.inf)
    layer(x)
    assert (layer.running_mean[0], layer.running_var[0]) == (2, 2)


def test_reset_statistics_forgets_all_batches():
    for update_rate in (0.1, None):
        layer = trained_layer(update_rate=update_rate)
        layer.reset_statistics()
        fresh = bn.BatchNorm(3, update_rate=update_rate).state_dict()
        state = layer.state_dict()
        assert all(same_bits(state[name], fresh[name]) for name in fresh if name.startswith(("running", "update")))


def test_reset_statistics_keeps_the_parameters():
    layer = trained_layer()
    gamma, beta = layer.gamma.copy(), layer.beta.copy()
    layer.reset_statistics()
    assert same_bits(layer.gamma, gamma)
    assert same_bits(layer.beta, beta)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("update_rate", [0.0, 0.1, 1.0, None])
def test_running_statistics_are_read_only(name, update_rate):
    layer = trained_layer(update_rate=update_rate)
    with pytest.raises(ValueError, match="read-only"):
        getattr(layer, name)[0] = 7


@pytest.mark.parametrize("update_rate", [0.0, 0.1, 1.0, None])
def test_an_update_leaves_statistics_that_were_handed_out(update_rate):
    layer = trained_layer(update_rate=update_rate)
    held = layer.running_mean
    bits = held.tobytes()
    layer(normal(4, 3, mean=50))
    assert held.tobytes() == bits


# ---- backward ---------------------------------------------------------------------------------------------


def test_training_backward_matches_the_definition():
    layer, x, dy = trained_layer(), normal(4, 3, 5, seed=5), normal(4, 3, 5, seed=6)
    layer(x)
    dx, dgamma, dbeta = backward(dy, x, *batch_statistics(x, 0), layer.gamma)
    assert_close(layer.backward(dy), dx, scale=10)
    assert_close(layer.dgamma, dgamma.astype(np.float32))
    assert_close(layer.dbeta, dbeta.astype(np.float32))


def test_frozen_backward_matches_the_definition():
    layer, x, dy = trained_layer().eval(), normal(4, 3, 5, seed=5), normal(4, 3, 5, seed=6)
    layer(x)
    dx, dgamma, dbeta = backward(dy, x, layer.running_mean, layer.running_var, layer.gamma, frozen=True)
    assert_close(layer.backward(dy), dx, scale=10)
    assert_close(layer.dgamma, dgamma.astype(np.float32))
    assert_close(layer.dbeta, dbeta.astype(np.float32))


def test_frozen_backward_uses_the_statistics_of_the_call_it_belongs_to():
    layer, x, dy = trained_layer().eval(), normal(4, 3, 5), normal(4, 3, 5, seed=6)
    layer(x)
    expected = layer.backward(dy)
    layer.reset_statistics()
    assert same_bits(layer.backward(dy), expected)


@pytest.mark.parametrize("training", [True, False])
def test_backward_uses_the_gamma_of_the_call_it_belongs_to(training):
    layer, x, dy = trained_layer().train(training), normal(4, 3, 5), normal(4, 3, 5, seed=6)
    layer(x)
    expected = layer.backward(dy)
    layer.gamma *= 3
    assert same_bits(layer.backward(dy), expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_switch_between_forward_and_backward_makes_no_difference(training):
    layer, x, dy = trained_layer().train(training), normal(4, 3, 5), normal(4, 3, 5, seed=6)
    layer(x)
    expected = layer.backward(dy)
    layer.train(not training)
    assert same_bits(layer.backward(dy), expected)


@pytest.mark.parametrize("training", [True, False])
def test_backward_belongs_to_the_last_call(training):
    layer, x, dy = trained_layer(), normal(4, 3, 5), normal(4, 3, 5, seed=6)
    layer.train(not training)(normal(2, 3, 7, seed=8))
    other = copy.copy(layer)
    for each in (layer, other):
        each.train(training)(x)
    assert same_bits(layer.backward(dy), other.backward(dy))


NO_CALL = (
    "backward must follow a call of the layer that left its x intact, got no such call: "
    "call the layer first, and without out=x or keep=None"
)


def test_backward_before_any_call_says_so():
    with pytest.raises(RuntimeError, match=f"^{re.escape(NO_CALL)}$"):
        bn.BatchNorm(3).backward(normal(4, 3))


@pytest.mark.parametrize("view", [False, True], ids=["itself", "a_view"])
@pytest.mark.parametrize("training", [True, False])
def test_backward_is_refused_where_out_overwrote_x(training, view):
    layer, x = trained_layer().train(training), normal(4, 3, 5)
    layer(x, out=x[...] if view else x)
    with pytest.raises(RuntimeError, match=f"^{re.escape(NO_CALL)}$"):
        layer.backward(x)


EVERY_KIND = {
    "training": bn.BatchNorm(3),
    "evaluation": bn.BatchNorm(3).eval(),
    "frozen": bn.BatchNorm(3).freeze(),
    "single_value": bn.BatchNorm(3, single_value="skip"),
    "pooled": bn.BatchNorm(3, update_rate=None),
    "ghosts": bn.BatchNorm(3, ghost_size=2),
    "renorm": bn.BatchNorm(3, renorm=bn.RenormSchedule.constant(2.0, 1.0)),
    "relu": bn.BatchNorm(3, activation="relu"),
    "relu_in_evaluation": bn.BatchNorm(3, activation="relu").eval(),
}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_call_with_keep_false_keeps_neither_its_x_nor_that_of_the_call_before(kind):
    layer, samples = copy.copy(EVERY_KIND[kind]), 1 if kind == "single_value" else 4
    first, second, dy = normal(samples, 3), normal(samples, 3, seed=1), normal(samples, 3, seed=2)
    expected = copy.copy(layer)(first), copy.copy(layer)(second)
    layer(first)
    layer.backward(dy)
    kept = weakref.ref(first), weakref.ref(second)
    del first
    assert kept[0]() is not None
    same = kind not in ("renorm", "single_value")  # renorm's y depends on the calls before
    y = layer(second, keep=None)
    assert not same or same_bits(y, expected[1])
    del second
    assert kept[0]() is None
    assert kept[1]() is None
    with pytest.raises(RuntimeError, match=f"^{re.escape(NO_CALL)}$"):
        layer.backward(dy)


@pytest.mark.parametrize("training", [True, False])
def test_keep_is_a_word_of_the_functions(training):
    with pytest.raises(ValueError, match=r"^keep must be 'x' or 'y', got 0$"):
        bn.BatchNorm(3).train(training)(normal(4, 3), keep=0)


def test_a_backward_into_x_that_is_refused_may_be_called_again():
    layer, x, dy = trained_layer(), normal(4, 3, 5), normal(4, 3, 5, seed=6)
    layer(x)
    expected, before = layer.backward(dy), x.copy()
    for wrong in ({"dy": dy[:3]}, {"dy": dy.astype(np.float32)}, {"dy": dy, "needs": ("w",)}):
        with pytest.raises((TypeError, ValueError)):
            layer.backward(**wrong, out=x)
    assert same_bits(x, before)
    assert same_bits(layer.backward(dy, out=x), expected)


def test_backward_is_refused_once_its_own_out_overwrote_x():
    layer, x, dy = trained_layer(), normal(4, 3, 5), normal(4, 3, 5, seed=6)
    layer(x)
    expected = layer.backward(dy)
    assert same_bits(layer.backward(dy, out=x), expected)
    with pytest.raises(RuntimeError, match=f"^{re.escape(NO_CALL)}$"):
        layer.backward(dy)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_backward_that_does_not_compute_dx_leaves_x_and_its_call(kind):
    layer, samples = copy.copy(EVERY_KIND[kind]), 1 if kind == "single_value" else 4
    x, dy = normal(samples, 3), normal(samples, 3, seed=1)
    layer(x)
    expected, before = layer.backward(dy), x.copy()
    for needs in (("gamma",), (), iter(("beta",))):
        assert layer.backward(dy, needs=needs, out=x) is None
        assert same_bits(x, before)
        assert same_bits(layer.backward(dy), expected)
    assert same_bits(layer.backward(dy, needs=iter(("beta", "x")), out=x), expected)
    assert layer.dgamma is None
    with pytest.raises(RuntimeError, match=f"^{re.escape(NO_CALL)}$"):
        layer.backward(dy)


def test_backward_writes_dx_over_dy_where_told_to():
    layer, x, dy = trained_layer(), normal(4, 3, 5), normal(4, 3, 5, seed=6)
    layer(x)
    expected = layer.backward(dy)
    assert layer.backward(dy, out=dy) is dy
    assert same_bits(dy, expected)


def test_gradients_are_none_until_backward():
    layer = bn.BatchNorm(3)
    layer(normal(4, 3))
    assert layer.dgamma is None
    assert layer.dbeta is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs", [("x",), ("gamma",), ("beta",), ("beta", "x")])
def test_needs_names_what_is_computed_and_the_rest_is_none(needs, training):
    layer, dy = trained_layer().train(training), normal(4, 3, 5, seed=6)
    layer(normal(4, 3, 5))
    every = {"x": layer.backward(dy), "gamma": layer.dgamma, "beta": layer.dbeta}
    some = {"x": layer.backward(dy, needs=needs), "gamma": layer.dgamma, "beta": layer.dbeta}
    for name, value in some.items():
        assert (value is not None) == (name in needs)
        assert value is None or same_bits(value, every[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_a_parameter_that_is_left_out_has_no_gradient(name, training):
    layer, x, dy = bn.BatchNorm(3, **{name: False}).train(training), normal(4, 3), normal(4, 3, seed=6)
    layer(x)
    layer.backward(dy)
    assert getattr(layer, name) is None
    assert getattr(layer, f"d{name}") is None


@pytest.mark.parametrize("gamma", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_parameter_gradients_have_the_dtype_of_the_parameters(dtype, gamma):
    layer = bn.BatchNorm(3, gamma=gamma, dtype=dtype)
    layer(normal(4, 3))
    layer.backward(normal(4, 3, seed=6))
    assert layer.dbeta.dtype == dtype
    assert layer.dgamma is None or layer.dgamma.dtype == dtype


def test_a_parameter_gradient_beyond_its_dtype_is_an_infinity():
    layer = bn.BatchNorm(1, dtype=np.float16)
    layer(np.array([[-1.0], [1.0]]))
    layer.backward(np.array([[1e6], [1e6]]))
    assert layer.dbeta.tolist() == [np.inf]


def test_the_layer_holds_x_until_the_next_call():
    layer, x = bn.BatchNorm(3), normal(4, 3)
    layer(x)
    x = weakref.ref(x)
    held = x() is not None
    layer(normal(4, 3))
    assert (held, x()) == (True, None)


# ---- a call that raises -----------------------------------------------------------------------------------

X = normal(4, 3, 5).astype(np.float32)
DY = np.cos(X)
MEMORY = normal(200).astype(np.float32)


def _read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


FAILING_CALLS = {
    "x_is_a_list": lambda layer: layer([[1.0, 2.0, 3.0]]),
    "x_is_none": lambda layer: layer(None),
    "x_is_integer": lambda layer: layer(X.astype(int)),
    "x_is_complex": lambda layer: layer(X.astype(complex)),
    "x_is_object": lambda layer: layer(X.astype(object)),
    "x_is_byte_swapped": lambda layer: layer(X.astype(X.dtype.newbyteorder())),
    "x_has_other_channels": lambda layer: layer(X[:, :2]),
    "x_has_no_such_axis": lambda layer: layer(X[0, 0]),
    "x_is_zero_dimensional": lambda layer: layer(X[0, 0, 0]),
    "x_has_one_value_a_channel": lambda layer: layer(X[:1, :, :1]),
    "out_has_another_shape": lambda layer: layer(X, out=np.empty_like(X[:2])),
    "out_has_another_dtype": lambda layer: layer(X, out=np.empty(X.shape)),
    "out_is_read_only": lambda layer: layer(X, out=_read_only(X)),
    "out_is_a_list": lambda layer: layer(X, out=[0.0]),
    "out_overlaps_x": lambda layer: layer(MEMORY[:60].reshape(4, 3, 5), out=MEMORY[15:75].reshape(4, 3, 5)),
    "unknown_keyword": lambda layer: layer(X, masks=None),
    "dy_has_another_shape": lambda layer: layer.backward(X[:2]),
    "dy_has_another_dtype": lambda layer: layer.backward(X.astype(np.float64)),
    "dy_is_a_list": lambda layer: layer.backward([1.0]),
    "needs_an_unknown_name": lambda layer: layer.backward(X, needs=("x", "delta")),
    "needs_is_none": lambda layer: layer.backward(X, needs=None),
    "dx_out_has_another_shape": lambda layer: layer.backward(X, out=np.empty_like(X[:2])),
    "dx_out_is_read_only": lambda layer: layer.backward(X, out=_read_only(X)),
    "mode_is_a_string": lambda layer: layer.train("eval"),
    "gamma_has_another_shape": lambda layer: setattr(layer, "gamma", np.ones(2, np.float32)),
    "gamma_has_another_dtype": lambda layer: setattr(layer, "gamma", np.ones(3)),
    "beta_is_none": lambda layer: setattr(layer, "beta", None),
    "running_mean_is_assigned": lambda layer: setattr(layer, "running_mean", np.zeros(3)),
    "state_is_a_list": lambda layer: layer.load_state_dict([1]),
    "state_lacks_an_entry": lambda layer: layer.load_state_dict({}),
    "state_ends_in_a_bad_entry": lambda layer: layer.load_state_dict(
        {name: value + 1 for name, value in layer.state_dict().items()} | {"update_count": -1}
    ),
    "file_is_missing": lambda layer: layer.load("/nonexistent/state.npz"),
    "folder_is_missing": lambda layer: layer.save("/nonexistent/state.npz"),
    "path_is_a_number": lambda layer: layer.save(3),
}


@pytest.mark.parametrize("update_rate", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FAILING_CALLS)
def test_a_raised_call_changes_nothing(name, training, update_rate):
    layer = trained_layer(update_rate=update_rate)
    layer.train(training)(X)
    if name == "x_has_one_value_a_channel":
        layer.train()
    dx = layer.backward(DY)
    before = snapshot(layer)
    with pytest.raises((TypeError, ValueError, AttributeError, OSError)):
        FAILING_CALLS[name](layer)
    assert snapshot(layer) == before
    assert same_bits(layer.backward(DY), dx)


@pytest.mark.parametrize("update_rate", [0.1, None])
def test_running_out_of_memory_in_the_update_changes_nothing(update_rate, monkeypatch):
    layer = trained_layer(update_rate=update_rate)
    before = snapshot(layer)

    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr(batch_module, "updated", out_of_memory)
    monkeypatch.setattr(statistics_module, "update_into", out_of_memory)
    monkeypatch.setattr(statistics_module, "pool_into", out_of_memory)
    with pytest.raises(MemoryError):
        layer(X)
    assert snapshot(layer) == before


def test_running_out_of_memory_in_backward_changes_nothing(monkeypatch):
    layer = trained_layer()
    before = snapshot(layer)

    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr(bn.BatchNorm, "_as_gradient", out_of_memory)
    with pytest.raises(MemoryError):
        layer.backward(np.ones((8, 3, 5), np.float32))
    assert snapshot(layer) == before


def test_an_update_changes_none_of_its_arguments():
    layer, batch = trained_layer(update_rate=0.5), bn.moments(normal(4, 3))
    (statistics,) = layer._state.statistics
    before = (statistics.mean.tobytes(), statistics.var.tobytes(), batch.mean.tobytes(), batch.m2.tobytes())
    updated(statistics, batch, layer.settings)
    assert before == (
        statistics.mean.tobytes(),
        statistics.var.tobytes(),
        batch.mean.tobytes(),
        batch.m2.tobytes(),
    )


# ---- parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_an_in_place_change_of_a_parameter_keeps_the_array(name):
    layer = bn.BatchNorm(3)
    held = getattr(layer, name)
    setattr(layer, name, held.__isub__(np.float32(0.5)))
    assert getattr(layer, name) is held


def test_a_gradient_step_is_one_line():
    layer = bn.BatchNorm(3, dtype=np.float64)
    layer(normal(4, 3))
    layer.backward(normal(4, 3, seed=6))
    layer.gamma -= 0.1 * layer.dgamma
    assert same_bits(layer.gamma, 1 - 0.1 * layer.dgamma)


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_assigning_a_parameter_copies_it(name):
    layer, value = bn.BatchNorm(3), np.arange(3, dtype=np.float32)
    setattr(layer, name, value)
    value[:] = 9
    assert getattr(layer, name).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (np.ones(2, np.float32), ValueError, "gamma must have shape (3,), got (2,)"),
        (np.ones((3, 1), np.float32), ValueError, "gamma must have shape (3,), got (3, 1)"),
        (np.ones(3), TypeError, "gamma must have dtype float32, got float64"),
        (np.ones(3, int), TypeError, "gamma must have dtype float32, got int64"),
        (
            [1.0, 1.0, 1.0],
            TypeError,
            "gamma must be a numpy.ndarray of shape (3,) (write np.asarray(gamma, np.float32)), got list",
        ),
        (None, TypeError, "gamma must be a numpy.ndarray of shape (3,), got None"),
    ],
)
def test_an_unfit_parameter_is_refused(value, error, text):
    layer = bn.BatchNorm(3)
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        layer.gamma = value
    assert layer.gamma.tolist() == [1, 1, 1]


def test_a_layer_built_without_gamma_takes_none():
    layer = bn.BatchNorm(3, gamma=False)
    text = "gamma must be None in a layer built with gamma=False, got an array of float64"
    with pytest.raises(ValueError, match=f"^{text}$"):
        layer.gamma = np.ones(3)
    layer.gamma = None
    assert layer.gamma is None


# ---- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"channels": 2.0}, TypeError, "channels must be an int, got float"),
        ({"channels": True}, TypeError, "channels must be an int, got bool"),
        ({"channels": -1}, ValueError, "channels must be >= 0, got -1"),
        ({"axis": None}, TypeError, "axis must be an int, got None"),
        ({"axis": (0, 1)}, TypeError, "axis must be an int, got tuple"),
        ({"axis": 8}, ValueError, "axis must be from -8 to 7, got 8"),
        ({"axis": -9}, ValueError, "axis must be from -8 to 7, got -9"),
        ({"eps": "1e-5"}, TypeError, "eps must be a number, got str"),
        ({"eps": -1e-5}, ValueError, "eps must be finite and >= 0, got -1e-05"),
        ({"eps": math.nan}, ValueError, "eps must be finite and >= 0, got nan"),
        ({"update_rate": 1.5}, ValueError, "update_rate must be from 0 to 1, or None, got 1.5"),
        ({"update_rate": -0.1}, ValueError, "update_rate must be from 0 to 1, or None, got -0.1"),
        ({"update_rate": math.nan}, ValueError, "update_rate must be from 0 to 1, or None, got nan"),
        ({"update_rate": True}, TypeError, "update_rate must be a number from 0 to 1, or None, got bool"),
        ({"ddof": 2}, ValueError, "ddof must be 0 (biased) or 1 (unbiased), got 2"),
        ({"ddof": 1.0}, TypeError, "ddof must be an int, got float"),
        ({"gamma": 1}, TypeError, "gamma must be True or False, got int"),
        ({"beta": np.ones(3)}, TypeError, "beta must be True or False, got an array of float64"),
        ({"dtype": "int32"}, TypeError, "dtype must be float16, float32 or float64, got 'int32'"),
        ({"dtype": ">f4"}, TypeError, "dtype must be float16, float32 or float64, got '>f4'"),
        ({"dtype": None}, TypeError, "dtype must be float16, float32 or float64, got None"),
        ({"dtype": "nonsense"}, TypeError, "dtype must be float16, float32 or float64, got 'nonsense'"),
        ({"num_threads": 0}, ValueError, "num_threads must be an int >= 1 or None, got 0"),
        ({"num_threads": 1.5}, TypeError, "num_threads must be an int >= 1 or None, got float"),
    ],
)
def test_an_unfit_setting_is_refused(settings, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        bn.BatchNorm(**({"channels": 3} | settings))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"channels": 64}, "BatchNorm(64, axis=1, eps=1e-05, update_rate=0.1, ddof=1)"),
        (
            {"channels": np.int64(3), "axis": -1, "eps": np.float32(0.5), "update_rate": None, "ddof": 0},
            "BatchNorm(3, axis=-1, eps=0.5, update_rate=None, ddof=0)",
        ),
        (
            {"channels": 3, "gamma": False, "beta": False, "dtype": np.float64, "num_threads": 2},
            (
                "BatchNorm(3, axis=1, eps=1e-05, update_rate=0.1, ddof=1, gamma=False, beta=False, "
                "dtype='float64', num_threads=2)"
            ),
        ),
    ],
)
def test_repr_is_the_call_that_builds_the_layer(settings, text):
    assert repr(bn.BatchNorm(**settings)) == text
    assert repr(eval(text, {"BatchNorm": bn.BatchNorm})) == text


MODES = {  # what is called on a layer, and how its repr ends
    "frozen": (lambda layer: layer.freeze(), ".freeze()"),
    "frozen_statistics": (lambda layer: layer.freeze(affine=False), ".freeze(affine=False)"),
    "frozen_affine": (lambda layer: layer.freeze(statistics=False), ".freeze(statistics=False)"),
    "evaluation": (lambda layer: layer.eval(), ".eval()"),
    "both": (lambda layer: layer.freeze().eval(), ".freeze().eval()"),
}


@pytest.mark.parametrize("name", MODES)
def test_a_layer_built_from_the_repr_of_another_is_in_its_mode(name):
    change, text = MODES[name]
    layer = change(bn.BatchNorm(3, ddof=0))
    assert repr(layer) == f"BatchNorm(3, axis=1, eps=1e-05, update_rate=0.1, ddof=0){text}"
    other = eval(repr(layer), {"BatchNorm": bn.BatchNorm})
    for mode in ("training", "frozen_statistics", "frozen_affine"):
        assert getattr(other, mode) == getattr(layer, mode)
    change(layer).unfreeze()
    assert "freeze" not in repr(layer)


def test_the_repr_of_a_subclass_has_its_name():
    class Mine(bn.BatchNorm):
        pass

    assert repr(Mine(3)).startswith("Mine(3, ")


EVERY_SETTING = {
    "axis": -1,
    "eps": 0.25,
    "update_rate": 0.5,
    "ddof": 0,
    "gamma": False,
    "beta": False,
    "dtype": np.dtype(np.float16),
    "debias": True,
    "nonfinite": "skip",
    "single_value": "use_running",
    "domains": 2,
    "ghost_size": 4,
    "renorm": bn.RenormSchedule.torchrl(3),
    "parity": "keras",
    "activation": "relu",
    "num_threads": 2,
}


@pytest.mark.parametrize("name", EVERY_SETTING)
def test_a_layer_built_from_the_repr_of_another_has_its_settings(name):
    given = {name: EVERY_SETTING[name]} | ({"renorm": EVERY_SETTING["renorm"]} if name == "parity" else {})
    layer = bn.BatchNorm(3, **given)
    other = eval(repr(layer), vars(bn))
    for setting in EVERY_SETTING:
        if setting not in ("gamma", "beta"):
            assert getattr(other, setting) == getattr(layer, setting)
    assert (other.gamma is None, other.beta is None) == (name == "gamma", name == "beta")
    assert repr(other) == repr(layer)


@pytest.mark.parametrize("name", ["channels", "axis", "eps", "update_rate", "ddof", "dtype", "training"])
def test_settings_are_fixed_at_construction(name):
    layer = bn.BatchNorm(3)
    with pytest.raises(AttributeError):
        setattr(layer, name, getattr(layer, name))


def test_train_and_eval_switch_the_mode_and_return_the_layer():
    layer = bn.BatchNorm(3)
    modes = [layer.training, layer.eval().training, layer.train().training, layer.train(False).training]
    assert modes == [True, False, True, False]
    assert layer.train() is layer


def test_another_number_of_channels_is_named():
    with pytest.raises(ValueError, match=re.escape("x must have 3 channels on axis 1, got shape (4, 2, 5)")):
        bn.BatchNorm(3)(normal(4, 2, 5))


def test_the_channels_are_checked_without_parameters_too():
    layer = bn.BatchNorm(3, gamma=False, beta=False)
    with pytest.raises(ValueError, match=re.escape("x must have 3 channels on axis 1, got shape (4, 2, 5)")):
        layer(normal(4, 2, 5))


# ---- copies -----------------------------------------------------------------------------------------------

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.fixture(params=COPIES)
def copied(request):
    return COPIES[request.param]


@pytest.mark.parametrize("update_rate", [0.1, None])
def test_a_copy_goes_on_bit_for_bit(copied, update_rate):
    layer = trained_layer(update_rate=update_rate)
    twin, x = copied(layer), normal(4, 3, 5)
    assert same_bits(twin(x), layer(x))
    assert same_bits(twin.backward(x), layer.backward(x))
    assert snapshot(twin)[:-1] == snapshot(layer)[:-1]


def test_a_copy_shares_nothing(copied):
    layer = trained_layer()
    twin, before = copied(layer), snapshot(layer)
    twin.gamma += 1
    twin.beta[:] = 7
    twin.eval().reset_statistics()
    assert snapshot(layer) == before


def test_a_copy_has_read_only_running_statistics(copied):
    with pytest.raises(ValueError, match="read-only"):
        copied(trained_layer()).running_mean[0] = 7


def test_a_copy_keeps_nothing_for_backward(copied):
    with pytest.raises(RuntimeError, match=f"^{re.escape(NO_CALL)}$"):
        copied(trained_layer()).backward(normal(8, 3, 5))


def test_a_pickle_does_not_hold_the_activations():
    layer, x = bn.BatchNorm(3), normal(1000, 3)
    layer(x)
    assert len(pickle.dumps(layer)) < x.nbytes / 4


# ---- state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["gamma", "beta", "running_mean", "running_var", "update_count", "settings"]),
        ({"gamma": False}, ["beta", "running_mean", "running_var", "update_count", "settings"]),
        ({"gamma": False, "beta": False}, ["running_mean", "running_var", "update_count", "settings"]),
        (
            {"update_rate": None},
            ["gamma", "beta", "running_mean", "running_var", "update_count", "running_moments", "settings"],
        ),
    ],
)
def test_state_dict_has_the_entries_of_the_layer(settings, names):
    assert list(bn.BatchNorm(3, **settings).state_dict()) == names


def test_state_dict_has_the_documented_shapes_and_dtypes():
    state = trained_layer(update_rate=None, dtype=np.float16).state_dict()
    settings = state.pop("settings")
    assert (settings.shape, settings.dtype.kind) == ((), "U")
    assert {name: (value.shape, value.dtype.name) for name, value in state.items()} == {
        "gamma": ((3,), "float16"),
        "beta": ((3,), "float16"),
        "running_mean": ((3,), "float64"),
        "running_var": ((3,), "float64"),
        "update_count": ((), "int64"),
        "running_moments": ((3, 5), "float64"),
    }


@pytest.mark.parametrize("update_rate", [0.0, 0.1, 1.0, None])
def test_state_dict_gives_fresh_writeable_copies(update_rate):
    layer = trained_layer(update_rate=update_rate)
    before = snapshot(layer)
    for value in layer.state_dict().values():
        value[...] = 7
    assert snapshot(layer) == before


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("update_rate", [0.1, None])
def test_training_resumed_from_a_state_gives_the_same_bits(update_rate, ddof):
    layer = trained_layer(update_rate=update_rate, ddof=ddof, batches=3)
    resumed = bn.BatchNorm(3, update_rate=update_rate, ddof=ddof)
    resumed.load_state_dict(layer.state_dict())
    for seed in range(3):
        x = normal(5, 3, 4, seed=seed, mean=1e3)
        assert same_bits(layer(x), resumed(x))
    ours, theirs = layer.state_dict(), resumed.state_dict()
    assert all(same_bits(ours[name], theirs[name]) for name in ours)


@given(
    batches=st.lists(
        st.lists(st.floats(-1e100, 1e100) | st.sampled_from([0.0, 1.0, -1.0, 1e-300]), min_size=2, max_size=6),
        min_size=1,
        max_size=4,
    )
)
def test_whatever_a_pooled_layer_has_seen_its_state_can_be_loaded(batches):
    layer, resumed = bn.BatchNorm(1, update_rate=None), bn.BatchNorm(1, update_rate=None)
    for batch in batches:
        layer(np.array(batch)[:, None])
    resumed.load_state_dict(layer.state_dict())
    assert snapshot(resumed)[0] == snapshot(layer)[0]


def test_an_untrained_pooled_layer_can_be_resumed():
    layer = bn.BatchNorm(3, update_rate=None)
    layer.load_state_dict(bn.BatchNorm(3, update_rate=None).state_dict())
    assert layer.update_count == 0


def test_loading_copies_the_arrays():
    layer, state = bn.BatchNorm(3), trained_layer().state_dict()
    layer.load_state_dict(state)
    before = snapshot(layer)
    for value in state.values():
        value[...] = 7
    assert snapshot(layer) == before


def test_loaded_running_statistics_are_read_only():
    layer = bn.BatchNorm(3)
    layer.load_state_dict(trained_layer().state_dict())
    with pytest.raises(ValueError, match="read-only"):
        layer.running_var[0] = 7


@pytest.mark.parametrize("count", [7, np.int32(7), np.array(7, np.uint8)])
def test_update_count_may_be_any_integer(count):
    layer = bn.BatchNorm(3)
    layer.load_state_dict(layer.state_dict() | {"update_count": count})
    assert layer.update_count == 7


def test_the_count_of_updates_stays_at_the_most_that_a_state_holds():
    layer = bn.BatchNorm(3)
    for before, after in ((2**63 - 2, 2**63 - 1), (2**63 - 1, 2**63 - 1)):
        layer.load_state_dict(layer.state_dict() | {"update_count": before})
        layer(normal(4, 3))
        assert layer.update_count == after


def test_loading_leaves_gradients_mode_and_backward():
    layer = trained_layer().eval()
    _, *before = snapshot(layer)
    layer.load_state_dict(layer.state_dict())
    assert snapshot(layer)[1:] == tuple(before)


NAN, INF = math.nan, math.inf
UNFIT_ENTRIES = [
    ({"gamma": np.ones(2, np.float32)}, ValueError, "gamma must have shape (3,), got (2,)"),
    ({"gamma": np.ones(3)}, TypeError, "gamma must have dtype float32, got float64"),
    ({"gamma": np.array([1, NAN, 1], np.float32)}, ValueError, "gamma must be finite, got nan in channel 1"),
    ({"beta": np.array([1, 1, -INF], np.float32)}, ValueError, "beta must be finite, got -inf in channel 2"),
    (
        {"beta": [0.0, 0.0, 0.0]},
        TypeError,
        "beta must be a numpy.ndarray of shape (3,) (write np.asarray(beta, np.float32)), got list",
    ),
    (
        {"running_mean": np.array([NAN, 0, 0])},
        ValueError,
        "running_mean must be finite, got nan in channel 0",
    ),
    (
        {"running_mean": np.zeros(3, np.float32)},
        TypeError,
        "running_mean must have dtype float64, got float32",
    ),
    ({"running_mean": np.zeros(3, ">f8")}, TypeError, "running_mean must have dtype float64, got >f8"),
    ({"running_mean": np.zeros((1, 3))}, ValueError, "running_mean must have shape (3,), got (1, 3)"),
    ({"running_var": np.array([1, 1, -1.5])}, ValueError, "running_var must be >= 0, got -1.5 in channel 2"),
    ({"running_var": np.array([1, INF, 1])}, ValueError, "running_var must be finite, got inf in channel 1"),
    ({"running_var": np.ones(3, object)}, TypeError, "running_var must have dtype float64, got object"),
    ({"update_count": -1}, ValueError, "update_count must be from 0 to 2**63 - 1, got -1"),
    ({"update_count": 2**63}, ValueError, f"update_count must be from 0 to 2**63 - 1, got {2**63}"),
    ({"update_count": 1.0}, TypeError, "update_count must be an integer, got float"),
    ({"update_count": True}, TypeError, "update_count must be an integer, got bool"),
    ({"update_count": np.array(1.0)}, TypeError, "update_count must be an integer, got an array of float64"),
    ({"update_count": np.array([1])}, ValueError, "update_count must have shape (), got (1,)"),
    (
        {"num_batches_tracked": 1},
        ValueError,
        (
            "state must have the entries beta, gamma, running_mean, running_var, update_count, "
            "got beta, gamma, num_batches_tracked, running_mean, running_var, update_count"
        ),
    ),
]


@pytest.mark.parametrize(("entry", "error", "text"), UNFIT_ENTRIES)
def test_an_unfit_state_is_refused_and_nothing_is_loaded(entry, error, text):
    layer, other = trained_layer(), bn.BatchNorm(3)
    before = snapshot(layer)
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        layer.load_state_dict(other.state_dict() | entry)
    assert snapshot(layer) == before


def test_a_state_without_an_entry_is_refused():
    state = bn.BatchNorm(3).state_dict()
    del state["gamma"], state["update_count"]
    text = (
        "state must have the entries beta, gamma, running_mean, running_var, update_count, "
        "got beta, running_mean, running_var"
    )
    with pytest.raises(ValueError, match=f"^{text}$"):
        bn.BatchNorm(3).load_state_dict(state)


@pytest.mark.parametrize("domains", [None, 2])
def test_a_state_that_is_no_mapping_is_refused(domains):
    with pytest.raises(TypeError, match=r"^state must be a mapping of names to arrays, got list$"):
        bn.BatchNorm(3, domains=domains).load_state_dict([("gamma", 1)])


def _table(change):
    def changed(state):
        change(state["running_moments"])
        return state

    return changed


def _set(table, where, value):
    table[where] = value


def far_away(table):
    table[:, 1:3] = -1.7e308, 0
    return table


UNFIT_POOLED_STATES = {
    "nan": (
        _table(lambda t: _set(t, (1, 3), NAN)),
        "running_moments must be finite, got nan in channel 1",
    ),
    "negative_m2": (
        _table(lambda t: _set(t, (1, 3), -1)),
        "running_moments must have m2 >= 0, got -1.0 in channel 1",
    ),
    "count_of_one": (
        _table(lambda t: _set(t, (2, 0), 1)),
        "running_var must be what running_moments and the layer's ddof give, got ",
    ),
    "low_part_too_high": (
        _table(lambda t: _set(t, (0, 2), 1)),
        "running_moments must have low parts below 2**-48 of the high, got 1.0 in channel 0",
    ),
    "another_mean": (
        lambda s: s | {"running_mean": s["running_mean"] + [0, 1e-9, 0]},
        "running_mean must be what running_moments and the layer's ddof give, got ",
    ),
    "opposite_mean": (
        lambda s: s | {"running_mean": np.full(3, 1.7e308), "running_moments": far_away(s["running_moments"])},
        "running_mean must be what running_moments and the layer's ddof give, got 1.7e+308 in channel 0",
    ),
    "another_ddof": (
        lambda s: s | {"running_var": s["running_var"] * 0.99},
        "running_var must be what running_moments and the layer's ddof give, got ",
    ),
    "count_without_updates": (
        lambda s: s | {"update_count": 0},
        "running_moments must be 0 where update_count is 0, got 80.0 in channel 0",
    ),
    "updates_without_count": (
        lambda s: s | {"running_moments": np.zeros((3, 5))},
        "running_moments must have counts > 0 where update_count is not 0, got 0.0 in channel 0",
    ),
}


@pytest.mark.parametrize("name", UNFIT_POOLED_STATES)
def test_pooled_moments_that_disagree_are_refused(name):
    change, text = UNFIT_POOLED_STATES[name]
    layer = bn.BatchNorm(3, update_rate=None)
    before = snapshot(layer)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        layer.load_state_dict(change(trained_layer(update_rate=None).state_dict()))
    assert snapshot(layer) == before


# ---- threads and documentation ----------------------------------------------------------------------------


def test_evaluation_in_other_threads_sees_whole_statistics_while_one_thread_changes_them():
    layer, x = bn.BatchNorm(3).eval(), normal(4, 3).astype(np.float32)
    states = [trained_layer(batches=n).state_dict() for n in (1, 2)]
    allowed = set()
    for state in states:
        # Parameters alike: only the pair of mean and var is promised to be whole.
        state |= {"gamma": np.ones(3, np.float32), "beta": np.zeros(3, np.float32)}
        layer.load_state_dict(state)
        allowed.add(layer(x).tobytes())
    seen, done = [set(), set()], threading.Event()

    def evaluate(mine):
        while not done.is_set():
            mine.add(layer(x).tobytes())

    threads = [threading.Thread(target=evaluate, args=(mine,)) for mine in seen]
    for thread in threads:
        thread.start()
    for turn in range(300):
        layer.load_state_dict(states[turn % 2])
    done.set()
    for thread in threads:
        thread.join()
    assert seen[0] | seen[1] <= allowed


@pytest.mark.parametrize("module", [batch_module, layer_module, state_file], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_list_beside_out_is_told_like_one_without(mode):
    layer = getattr(bn.BatchNorm(3), mode)()
    with pytest.raises(TypeError, match=r"x must be a numpy\.ndarray .*got list"):
        layer([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], out=np.empty((2, 3)))
