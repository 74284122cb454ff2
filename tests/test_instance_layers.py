"""InstanceNorm with running statistics: what it learns, and what normalizes then."""

import copy
import pickle

import numpy as np
import pytest

import batchnorm as bn

X, DY = np.random.default_rng(0).normal(3, 2, (2, 4, 3, 5))


def layers(**options):
    return bn.InstanceNorm(3, running=True, **options)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_running_statistics_follow_the_mean_over_samples(rate, ddof):
    layer, mean, var = layers(update_rate=rate, ddof=ddof), np.zeros(3), np.ones(3)
    for x in (X, 2 * DY):
        layer(x)
        mean = (1 - rate) * mean + rate * x.mean(axis=2).mean(axis=0)
        var = (1 - rate) * var + rate * x.var(axis=2, ddof=ddof).mean(axis=0)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-13)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-13)
    assert layer.update_count == 2


def test_training_is_by_samples_and_evaluation_by_running_statistics():
    layer = layers()
    assert layer(X).tobytes() == bn.instance_norm(X, layer.gamma, layer.beta)[0].tobytes()
    now = layer.running_mean, layer.running_var
    for in_mode in (layer.eval, lambda: layer.train().freeze(affine=False)):
        in_mode()
        y, saved = bn.normalize(X, *now, layer.gamma, layer.beta, save=True)
        assert layer(X).tobytes() == y.tobytes()
        assert layer.backward(DY).tobytes() == bn.backward(DY, saved).dx.tobytes()
        np.testing.assert_array_equal(layer.running_mean, now[0])
    assert layer.frozen_statistics
    assert layer.update_count == 1
    layer.unfreeze()(X)
    assert layer.update_count == 2


def test_evaluation_takes_nothing_back_of_what_training_learns_meanwhile():
    layer = layers()
    layer(X)

    class Training:
        def __array__(self, dtype=None, copy=None):
            layer.train()(DY)
            layer.eval()
            return np.ones((4, 5), bool)

    layer.eval()(X, mask=Training())
    assert layer.update_count == 2
    assert layer.backward(DY).shape == X.shape  # of the evaluation, which was the last to end


def test_samples_of_which_nothing_counts_are_left_out():
    layer, other = layers(update_rate=0.5), layers(update_rate=0.5)
    layer(X, lengths=[5, 0, 3, 2])
    kept = [X[0], X[2][:, :3], X[3][:, :2]]
    mean = np.mean([a.mean(axis=1) for a in kept], axis=0)
    var = np.mean([a.var(axis=1, ddof=1) for a in kept], axis=0)
    np.testing.assert_allclose(layer.running_mean, 0.5 * mean, rtol=1e-13)
    np.testing.assert_allclose(layer.running_var, 0.5 + 0.5 * var, rtol=1e-13)
    other(X, mask=np.zeros((4, 5), bool))
    other(X[:0])
    assert other.update_count == 0
    with pytest.raises(ValueError, match="weights_are"):
        other(X, weights=np.full((4, 5), 0.5))
    layers(ddof=0)(X, weights=np.full((4, 5), 0.5))


@pytest.mark.parametrize("in_place", [False, True])
def test_out_holds_y_and_a_call_that_raises_writes_nothing(in_place):
    layer, x = layers(), np.array(X)
    out = x if in_place else np.full_like(x, -77)
    bad = np.array(X)
    bad[0, 1, 2] = np.inf
    target = bad if in_place else out
    before = target.tobytes()
    with pytest.raises(RuntimeWarning, match="nothing was learned of it"):  # warnings are errors in tests
        layer(bad, out=target)
    assert (target.tobytes(), layer.update_count) == (before, 0)
    assert layer(x, out=out) is out
    assert out.tobytes() == bn.instance_norm(X)[0].tobytes()
    assert layer.update_count == 1
    if in_place:
        with pytest.raises(RuntimeError, match="backward must follow a call"):
            layer.backward(DY)
    else:
        layer.backward(DY)
    with pytest.raises(ValueError, match="out must have shape"):
        layer(X, out=np.empty(3))


def test_a_state_goes_on_bit_for_bit(tmp_path):
    layer = layers()
    layer(X)
    layer.save(tmp_path / "layer.npz")
    others = [layers(), layers(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    others[0].load(tmp_path / "layer.npz")
    others[1].load_state_dict(layer.state_dict())
    layer(DY)
    for other in others:
        other(DY)
        assert other.running_var.tobytes() == layer.running_var.tobytes()
        assert other.update_count == 2
    with pytest.raises(ValueError, match="state must have the settings of this layer, running=False"):
        bn.InstanceNorm(3).load_state_dict(layer.state_dict())
    layer.reset_statistics()
    np.testing.assert_array_equal([layer.running_mean, layer.running_var], [np.zeros(3), np.ones(3)])


def test_updates_are_counted_as_far_as_a_state_can_hold():
    layer = layers()
    layer.load_state_dict(layer.state_dict() | {"update_count": np.array(2**63 - 1)})
    layer(X)
    assert int(layer.state_dict()["update_count"]) == 2**63 - 1


def test_without_running_there_are_none():
    layer = bn.InstanceNorm(3)
    layer(X)
    assert (layer.running_mean, layer.running_var, layer.update_count) == (None, None, 0)
    assert layer.eval()(X).tobytes() == layer.train()(X).tobytes()
    assert "running_mean" not in layer.state_dict()
    assert repr(layer) == "InstanceNorm(3, axis=1, eps=1e-05)"
    assert repr(layers().freeze(affine=False).eval()) == (
        "InstanceNorm(3, axis=1, eps=1e-05, running=True).freeze(affine=False).eval()"
    )


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"running": 1}, TypeError, "running must be True or False"),
        ({"update_rate": None}, TypeError, "update_rate must be a number"),
        ({"update_rate": 1.5}, ValueError, "update_rate must be from 0 to 1"),
        ({"ddof": 2}, ValueError, r"ddof must be 0 \(biased\) or 1 \(unbiased\), got 2"),
        ({"momentum": 0.1}, TypeError, "update_rate must be given instead of momentum"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, kind, text):
    with pytest.raises(kind, match=text):
        bn.InstanceNorm(3, **options)
