"""What a layer's state takes in: policies, freezing, per-call choices, debiased starts, domains, masks."""

import copy
import pickle
import warnings

import numpy as np
import pytest

import batchnorm as bn
import frozen
from batchnorm import _core
from batchnorm.layers import batch, statistics

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (8, 3, 5)).astype(np.float32)
DY = RNG.normal(size=X.shape).astype(np.float32)


def bits(layer):
    """Give all that a call could change, as bytes."""
    state = layer.state_dict()
    arrays = {**state, "dgamma": layer.dgamma, "dbeta": layer.dbeta}
    flags = layer.training, layer.frozen_statistics, layer.frozen_affine
    return {name: None if a is None else a.tobytes() for name, a in arrays.items()}, flags


def trained(**settings):
    layer = bn.BatchNorm(3, **settings)
    options = {} if layer.domains is None else {"domain": 1}
    layer(X, **options)
    layer.backward(DY)
    return layer


def poisoned(value):
    x = X.copy()
    x[2, 1, 3] = value
    return x


# ---- batches that are not finite ---------------------------------------------------------------------------

every_bad = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
every_rate = pytest.mark.parametrize("update_rate", [0.1, 1.0, None])


@every_bad
@every_rate
def test_a_poisoned_batch_under_skip_leaves_state_and_count_bit_for_bit(bad, update_rate):
    layer = trained(nonfinite="skip", update_rate=update_rate)
    before = bits(layer)
    y = layer(poisoned(bad))
    assert bits(layer) == before
    assert np.isfinite(y[:, [0, 2]]).all()
    layer(X)
    assert layer.update_count == 2


@every_rate
def test_by_default_a_poisoned_batch_is_left_out_with_a_warning(update_rate):
    layer = trained(update_rate=update_rate)
    before = bits(layer)
    with pytest.warns(RuntimeWarning, match=r"got infinity or NaN in channel 1: they are left as they are") as told:
        layer(poisoned(np.nan))
    assert told[0].filename == __file__
    assert bits(layer) == before


def test_a_warning_that_is_an_error_changes_nothing():
    layer = trained()
    before = bits(layer)
    with pytest.raises(RuntimeWarning):
        layer(poisoned(np.nan))
    assert bits(layer) == before
    assert layer.backward(DY).shape == X.shape  # of the call before


@pytest.mark.parametrize("has_out", [False, True])
def test_a_poisoned_batch_under_raise_changes_and_writes_nothing(has_out):
    layer = trained(nonfinite="raise")
    before, out = bits(layer), np.full_like(X, 9)
    expected = layer.backward(DY)
    with pytest.raises(ValueError, match="x must have finite statistics to update the running ones, got infinity"):
        layer(poisoned(np.inf), out=out if has_out else None)
    assert bits(layer) == before
    assert (out == 9).all()
    assert (layer.backward(DY) == expected).all()


def test_a_poisoned_batch_that_updates_nothing_is_nobodys_business():
    layer = trained(nonfinite="raise")
    before = bits(layer)
    layer(poisoned(np.nan), update_stats=False)
    layer.eval()(poisoned(np.nan))
    layer.train()
    assert bits(layer) == before


def test_a_value_too_large_for_a_variance_is_not_finite_either():
    layer = bn.BatchNorm(1, nonfinite="raise")
    with pytest.raises(ValueError, match="channel 0"):
        layer(np.array([[1e200], [-1e200]]))


# The moments of each half are finite, those of the whole are not.
FAR = np.array([[1e160], [1.0000000001e160], [-1e160], [-1.0000000001e160]])


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("target", [None, "out", "x"])
@pytest.mark.parametrize("single_value", ["raise", "skip"])
def test_an_average_takes_in_ghosts_that_are_finite_though_their_union_is_not(single_value, target, debias):
    layer = bn.BatchNorm(1, ghost_size=2, nonfinite="raise", debias=debias, single_value=single_value)
    x = FAR.copy() if single_value == "raise" else np.concatenate([FAR, FAR[:1]])
    layer(x, out={None: None, "out": np.empty_like(x), "x": x}[target])
    assert layer.update_count == 1
    assert np.isfinite(layer.running_mean).all()
    assert np.isfinite(layer.running_var).all()


@pytest.mark.parametrize("kind", ["plain", "weights", "ghosts", "domains"])
@pytest.mark.parametrize("has_out", [False, True])
@pytest.mark.parametrize("policy", ["raise", "warn", "error"])
@pytest.mark.parametrize("use", ["batch", "running"])
def test_what_would_leave_pooled_statistics_that_are_not_finite_is_not_learned(use, policy, has_out, kind):
    settings = {"ghosts": {"ghost_size": 2}, "domains": {"domains": 2}, "weights": {"weights_are": "counts"}}
    call = {"domains": {"domain": 1}, "weights": {"weights": np.array([1.0, 2.0])}}.get(kind, {})
    nonfinite = "raise" if policy == "raise" else "warn"
    layer = bn.BatchNorm(1, update_rate=None, nonfinite=nonfinite, **settings.get(kind, {}))
    layer(FAR[:2], **call)
    before, out = bits(layer), np.full((2, 1), 9.0)
    call |= {} if use == "batch" else {"use_stats": use, "update_stats": True}
    caught = pytest.raises((ValueError, RuntimeWarning), match="got infinity or NaN in channel 0")
    if policy == "warn":
        caught = pytest.warns(RuntimeWarning, match="got infinity or NaN in channel 0")
    with warnings.catch_warnings(), caught:
        if policy == "error":
            warnings.simplefilter("error")
        layer(FAR[2:], out=out if has_out else None, **call)
    assert bits(layer) == before
    assert (out == 9).all() == (policy != "warn" or not has_out)
    layer.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("has_out", [False, True])
def test_pooled_ghosts_are_refused_where_their_union_is_not_finite(has_out):
    for x in (FAR, np.concatenate([FAR[:2], FAR[2:3]])):
        settings = {"update_rate": None, "ghost_size": 2, "single_value": "skip"}
        layer, out = bn.BatchNorm(1, nonfinite="raise", **settings), np.full_like(x, 9)
        with pytest.raises(ValueError, match="x must have finite statistics"):
            layer(x, out=out if has_out else None)
        assert (out == 9).all()
        assert layer.update_count == 0


# ---- one value a channel -----------------------------------------------------------------------------------

ONE = np.array([[1.0, 2.0, 3.0]], np.float32)


def test_one_value_a_channel_raises_by_default():
    with pytest.raises(ValueError, match="x must have at least 2 values per channel"):
        bn.BatchNorm(3)(ONE)


def test_one_value_a_channel_can_use_the_running_statistics():
    layer = trained(single_value="use_running")
    before = bits(layer)[0]["running_mean"], layer.update_count
    y, dx = layer(ONE), layer.backward(ONE)
    same = copy.copy(layer).eval()
    assert (y == same(ONE)).all()
    assert (dx == same.backward(ONE)).all()
    assert (layer.running_mean.tobytes(), layer.update_count) == before


@pytest.mark.parametrize("axis", [0, 1])
def test_one_value_a_channel_can_be_skipped_and_gives_beta(axis):
    layer = bn.BatchNorm(3, single_value="skip", axis=axis)
    layer.beta = np.array([4, 5, 6], np.float32)
    x = ONE if axis == 1 else np.ascontiguousarray(ONE.T)
    y = layer(x)
    assert y.ravel().tolist() == [4, 5, 6]
    assert (layer.backward(x) == 0).all()
    assert layer.dgamma.tolist() == [0, 0, 0]
    assert layer.dbeta.tolist() == [1, 2, 3]
    assert layer.update_count == 0


# ---- per-call choices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use", [None, "batch", "running"])
@pytest.mark.parametrize("update", [None, True, False])
def test_any_choice_of_statistics_and_update_works_in_any_mode(training, use, update):
    layer = trained().train(training)
    before = copy.copy(layer)
    by_batch = training if use is None else use == "batch"
    updates = training if update is None else update
    other = np.float32(2) * X + 1
    y = layer(other, use_stats=use, update_stats=update)
    expected = before.train()(other) if by_batch else before.eval()(other)
    assert y.tobytes() == expected.tobytes()
    assert layer.backward(DY).tobytes() == before.backward(DY).tobytes()
    assert layer.update_count == 1 + updates
    reference = trained()
    if updates:
        reference(other)
    assert layer.running_mean.tobytes() == reference.running_mean.tobytes()
    assert layer.running_var.tobytes() == reference.running_var.tobytes()
    assert layer.training is training


def test_a_step_that_is_run_again_leaves_the_statistics_alone():
    layer = trained()
    first = layer(X)
    before = layer.state_dict()
    again = layer(X, update_stats=False)
    assert again.tobytes() == first.tobytes()
    assert all((layer.state_dict()[name] == before[name]).all() for name in before)


# ---- freezing ----------------------------------------------------------------------------------------------


def test_frozen_statistics_survive_mode_switches_copies_and_pickles():
    layer = trained().freeze(affine=False)
    before = layer.running_mean.tobytes()
    for one in (layer, layer.eval().train(), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        y = one(X)
        assert one.frozen_statistics
        assert not one.frozen_affine
        assert one.running_mean.tobytes() == before
        assert y.tobytes() == trained().eval()(X).tobytes()
        dx = one.backward(DY)
        same = trained().eval()
        same(X)
        assert dx.tobytes() == same.backward(DY).tobytes()
        assert one.dgamma.tobytes() == same.dgamma.tobytes()


def test_a_frozen_affine_has_no_gradients():
    layer = trained().freeze(statistics=False)
    layer(X)
    assert layer.backward(DY) is not None
    assert layer.dgamma is None
    assert layer.dbeta is None
    assert layer.update_count == 2
    layer.unfreeze()
    layer.backward(DY)
    assert layer.dgamma is not None


def test_unfrozen_layers_go_on_as_if_nothing_had_been():
    layer, other = trained(), trained()
    layer.freeze()
    layer(X * 5)
    layer.unfreeze()
    layer(X)
    other(X)
    assert layer.running_var.tobytes() == other.running_var.tobytes()


def test_frozen_statistics_cannot_be_updated_by_a_call():
    layer = trained().freeze()
    with pytest.raises(ValueError, match="update_stats must not be True while the layer's statistics are frozen"):
        layer(X, update_stats=True)
    assert layer.update_count == 1


# ---- a debiased start --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_debiased_statistics_are_the_weighted_average_of_the_batches(rate):
    layer = bn.BatchNorm(3, update_rate=rate, debias=True)
    means, variances = [], []
    for step in range(12):
        batch = X * np.float32(step + 1)
        layer(batch)
        m = bn.moments(batch)
        means.append(m.mean)
        variances.append(m.var(1))
        weights = rate * (1 - rate) ** np.arange(step, -1, -1.0)
        for running, seen in ((layer.running_mean, means), (layer.running_var, variances)):
            expected = np.average(seen, axis=0, weights=weights)
            np.testing.assert_allclose(running, expected, rtol=1e-12)


def test_the_first_debiased_update_stores_the_batch_and_evaluation_before_it_is_defined():
    layer = bn.BatchNorm(3, debias=True)
    assert (layer.eval()(X) == bn.normalize(X, np.zeros(3), np.ones(3), layer.gamma, layer.beta)).all()
    layer.train()(X)
    np.testing.assert_allclose(layer.running_mean, bn.moments(X).mean, rtol=1e-15)


def test_a_saved_debiased_layer_goes_on_bit_for_bit(tmp_path):
    a, b = bn.BatchNorm(3, debias=True), bn.BatchNorm(3, debias=True)
    a(X)
    a.save(tmp_path / "a")
    b.load(tmp_path / "a")
    a(X * 2)
    b(X * 2)
    assert bits(a)[0]["running_var"] == bits(b)[0]["running_var"]


def test_pooled_statistics_have_no_bias_to_correct():
    with pytest.raises(ValueError, match="debias must be False where update_rate is None"):
        bn.BatchNorm(3, update_rate=None, debias=True)


# ---- domains -----------------------------------------------------------------------------------------------


@every_rate
def test_each_domain_has_the_statistics_of_a_layer_of_its_own(update_rate):
    layer = bn.BatchNorm(3, domains=4, update_rate=update_rate)
    alone = [bn.BatchNorm(3, update_rate=update_rate) for _ in range(4)]
    for step in range(9):
        k = step * step % 4
        x = X * np.float32(step + 1)
        assert layer(x, domain=k).tobytes() == alone[k](x).tobytes()
    assert layer.running_mean.tobytes() == np.stack([a.running_mean for a in alone]).tobytes()
    assert layer.running_var.tobytes() == np.stack([a.running_var for a in alone]).tobytes()
    assert layer.update_count.tolist() == [a.update_count for a in alone]
    layer.eval()
    for k in range(4):
        assert layer(X, domain=k).tobytes() == alone[k].eval()(X).tobytes()


def test_one_domain_has_an_axis_of_its_own_too():
    layer, alone = bn.BatchNorm(3, domains=1), bn.BatchNorm(3)
    layer(X, domain=0)
    alone(X)
    assert layer.running_mean.shape == layer.state_dict()["running_mean"].shape == (1, 3)
    assert layer.running_var[0].tobytes() == alone.running_var.tobytes()
    other = bn.BatchNorm(3, domains=1)
    other.load_state_dict(layer.state_dict())
    assert other.running_var.tobytes() == layer.running_var.tobytes()
    assert other.update_count.tolist() == [1]


@every_rate
def test_the_state_of_domains_goes_through_files(tmp_path, update_rate):
    layer = trained(domains=2, update_rate=update_rate)
    layer.save(tmp_path / "state")
    other = bn.BatchNorm(3, domains=2, update_rate=update_rate)
    other.load(tmp_path / "state")
    assert bits(other)[0]["running_var"] == bits(layer)[0]["running_var"]
    assert other.update_count.tolist() == [0, 1]
    with pytest.raises(ValueError, match="domains=3, got domains=2"):
        bn.BatchNorm(3, domains=3, update_rate=update_rate).load(tmp_path / "state")
    with pytest.raises(ValueError, match="domains=3, got domains=2"):
        bn.BatchNorm(3, domains=3, update_rate=update_rate).load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match="running_mean must have shape"):
        bn.BatchNorm(3, domains=3, update_rate=update_rate).load_state_dict(layer.state_dict(), strict=False)


def test_a_bad_domain_of_a_state_changes_nothing():
    layer = trained(domains=2)
    before, state = bits(layer), layer.state_dict()
    state["running_var"][1, 2] = -1
    with pytest.raises(ValueError, match=r"running_var must be >= 0, got -1\.0 in channel 2"):
        layer.load_state_dict(state)
    assert bits(layer) == before


@pytest.mark.parametrize(
    ("domains", "domain", "error", "text"),
    [
        (None, 0, ValueError, "domain must be None in a layer built without domains, got 0"),
        (2, None, TypeError, "domain must be an int from 0 to 1 in a layer of 2 domains, got None"),
        (2, 2, ValueError, "domain must be from 0 to 1, got 2"),
        (2, -1, ValueError, "domain must be from 0 to 1, got -1"),
        (2, "a", TypeError, "domain must be an int, got str"),
    ],
)
def test_a_domain_that_is_not_there_is_named(domains, domain, error, text):
    layer = bn.BatchNorm(3, domains=domains)
    before = bits(layer)
    with pytest.raises(error) as caught:
        layer(X, domain=domain)
    assert str(caught.value) == text
    assert bits(layer) == before


# ---- masks -------------------------------------------------------------------------------------------------

MASK = RNG.random((8, 5)) < 0.5


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_takes_masks_in_both_modes(training):
    layer = trained().train(training)
    mean, var = layer.running_mean, layer.running_var
    y = layer(X, mask=MASK)
    if training:
        expected, saved = bn.batch_norm(X, layer.gamma, layer.beta, mask=MASK)
        assert (layer.running_mean == 0.9 * mean + 0.1 * saved.moments.mean).all()
        gradients = bn.backward(DY, saved)
    else:
        expected = bn.normalize(X, mean, var, layer.gamma, layer.beta, mask=MASK)
        gradients = frozen.backward(DY, X, mean, var, layer.gamma, mask=MASK)
    assert y.tobytes() == expected.tobytes()
    assert layer.backward(DY).tobytes() == gradients.dx.tobytes()
    assert layer.dgamma.tobytes() == gradients.dgamma.tobytes()


@pytest.mark.parametrize("update_rate", [0.1, None])
def test_a_mask_that_is_all_false_updates_nothing(update_rate):
    layer = trained(update_rate=update_rate)
    before = bits(layer)
    y = layer(X, mask=np.zeros((8, 5), bool))
    assert (y == 0).all()
    assert bits(layer) == before


def test_weights_do_not_matter_to_given_statistics_but_where_they_are_padding():
    layer = trained().eval()
    weights = np.where(MASK, 2.0, 0.0)
    assert (layer(X, weights=weights) == layer(X)).all()
    assert (layer(X, weights=weights, padding="zero") == layer(X, mask=MASK)).all()


# ---- small batches -----------------------------------------------------------------------------------------

SCHEDULE = bn.RenormSchedule(((2, 1.0), (6, 3.0)), ((2, 0.0), (6, 5.0)))


def test_a_layer_of_ghosts_is_made_of_the_functions():
    layer = bn.BatchNorm(3, ghost_size=3, update_rate=0.3)
    mean, var = np.zeros(3), np.ones(3)
    for step in range(4):
        x = X * np.float32(step + 1)
        y, saved = bn.batch_norm(x, layer.gamma, layer.beta, ghost_size=3)
        assert layer(x).tobytes() == y.tobytes()
        mean, var = bn.update_running(mean, var, saved, update_rate=0.3)
        gradients = bn.backward(DY, saved)
        assert layer.backward(DY).tobytes() == gradients.dx.tobytes()
        assert layer.dgamma.tobytes() == gradients.dgamma.tobytes()
    assert layer.running_mean.tobytes() == mean.tobytes()
    assert layer.running_var.tobytes() == var.tobytes()
    assert layer.update_count == 4
    assert (layer.eval()(X) == bn.normalize(X, mean, var, layer.gamma, layer.beta)).all()


def test_ghosts_pool_as_their_batch_does():
    layer, plain = bn.BatchNorm(3, ghost_size=3, update_rate=None), bn.BatchNorm(3, update_rate=None)
    layer(X)
    plain(X)
    np.testing.assert_allclose(layer.running_var, plain.running_var, rtol=1e-14)


@pytest.mark.parametrize("parity", ["paper", "keras", "torchrl"])
def test_a_layer_with_renorm_is_made_of_the_functions_and_its_step_is_state(parity, tmp_path):
    settings = {"renorm": SCHEDULE, "parity": parity, "update_rate": 0.3}
    layer = bn.BatchNorm(3, **settings)
    mean, var = np.zeros(3), np.ones(3)
    for step in range(9):
        if step == 5:  # goes on from a file
            layer.save(tmp_path / "state")
            layer = bn.BatchNorm(3, **settings)
            layer.load(tmp_path / "state")
        x = X * np.float32(step + 1)
        renorm = bn.Renorm(mean, var, **SCHEDULE(step)._asdict(), parity=parity)
        y, saved = bn.batch_norm(x, layer.gamma, layer.beta, renorm=renorm)
        assert layer(x).tobytes() == y.tobytes()
        mean, var = bn.update_running(mean, var, saved, update_rate=0.3)
        gradients = bn.backward(DY, saved)
        assert layer.backward(DY).tobytes() == gradients.dx.tobytes()
        assert layer.dgamma.tobytes() == gradients.dgamma.tobytes()
    assert layer.running_mean.tobytes() == mean.tobytes()
    assert layer.running_var.tobytes() == var.tobytes()


@pytest.mark.parametrize("settings", [{"ghost_size": 3}, {"renorm": SCHEDULE}])
def test_policies_and_in_place_calls_hold_for_small_batches(settings):
    layer = trained(nonfinite="skip", **settings)
    before = bits(layer)
    layer(poisoned(np.nan))
    assert bits(layer) == before
    x = X.copy()
    assert layer(x, out=x) is x
    with pytest.raises(RuntimeError, match="backward must follow a call"):
        layer.backward(DY)
    assert copy.copy(layer).running_var.tobytes() == layer.running_var.tobytes()


class LooksLikeASchedule:
    """What a layer could call, and could not save."""

    r_max = 3.0

    def __call__(self, step):
        return SCHEDULE(step)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        (
            {"renorm": SCHEDULE, "update_rate": None},
            ValueError,
            "renorm must be None where update_rate is None",
        ),
        ({"renorm": 3}, TypeError, "renorm must be a RenormSchedule or None, got int"),
        (
            {"renorm": LooksLikeASchedule()},
            TypeError,
            "renorm must be a RenormSchedule or None, got LooksLikeASchedule",
        ),
        ({"parity": "tf"}, ValueError, "parity must be 'paper', 'keras' or 'torchrl', got 'tf'"),
        ({"ghost_size": 0}, ValueError, "ghost_size must be"),
    ],
)
def test_small_batch_settings_that_make_no_sense_are_refused(settings, error, text):
    with pytest.raises(error) as caught:
        bn.BatchNorm(3, **settings)
    assert str(caught.value).startswith(text)


def test_renorm_updates_only_as_it_corrects():
    layer = trained(renorm=SCHEDULE)
    before = bits(layer)
    with pytest.raises(ValueError, match="update_stats must not be True with running statistics"):
        layer(X, use_stats="running", update_stats=True)
    assert bits(layer) == before


# ---- calls that fail ---------------------------------------------------------------------------------------


def points_of_failure():
    """Give the functions that a call of a layer goes through, by the names it knows them by."""
    names = [
        "normalized_by_batch",
        "ordinary_batch_norm",
        "normalize",
        "moments",
        "partial",
        "_new_state",
        "updated",
    ]
    return [(batch, name) for name in names] + [
        (statistics, "update_running"),
        (_core, "first_nonfinite"),
        (statistics, "update_into"),
        (statistics, "pool_into"),
        (warnings, "warn"),
    ]


@pytest.mark.parametrize(("module", "name"), points_of_failure(), ids=lambda p: p if isinstance(p, str) else "")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("use", ["batch", "running"])
@pytest.mark.parametrize("rate", [0.1, None])
def test_a_call_that_fails_anywhere_changes_nothing(monkeypatch, module, name, after, use, rate):
    layer = trained(update_rate=rate)
    before, dx = bits(layer), layer.backward(DY)
    before = bits(layer)
    x = poisoned(np.nan) if name == "warn" else X * 2
    original, calls = getattr(module, name), []

    def fail(*arguments, **options):
        calls.append(name)
        if after:
            original(*arguments, **options)
        raise MemoryError("injected")

    monkeypatch.setattr(module, name, fail)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            layer(x, use_stats=use, update_stats=True)
        except MemoryError:
            assert bits(layer) == before
        else:
            assert not calls  # the call does not go through it
    monkeypatch.undo()
    if calls:
        assert (layer.backward(DY) == dx).all()
        assert bits(layer) == before


def test_a_backward_that_fails_changes_no_gradient(monkeypatch):
    layer = trained()
    before = bits(layer)
    monkeypatch.setattr(layer, "_as_gradient", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer.backward(DY * 3)
    assert bits(layer) == before


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        (
            {"nonfinite": "drop"},
            ValueError,
            "nonfinite must be 'raise', 'skip', 'warn' or 'propagate', got 'drop'",
        ),
        ({"single_value": 1}, ValueError, "single_value must be 'raise', 'use_running' or 'skip', got 1"),
        ({"debias": 1}, TypeError, "debias must be True or False, got int"),
        ({"domains": 0}, ValueError, "domains must be >= 1 or None, got 0"),
        ({"domains": 1.5}, TypeError, "domains must be an int, got float"),
    ],
)
def test_a_mistaken_setting_is_named(settings, error, text):
    with pytest.raises(error) as caught:
        bn.BatchNorm(3, **settings)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("settings", "call", "text"),
    [
        (
            {"renorm": bn.RenormSchedule.paper()},
            {"use_stats": "running", "update_stats": True},
            "update_stats",
        ),
    ],
)
def test_a_refusal_comes_before_any_work(settings, call, text, monkeypatch):
    def work(*_, **__):
        pytest.fail("x was read before the refusal")

    monkeypatch.setattr("batchnorm.layers.batch.moments", work)
    layer = bn.BatchNorm(3, nonfinite="raise", **settings)
    with pytest.raises(ValueError, match=text):
        layer(np.random.default_rng(0).normal(size=(4, 3)), **call)


@pytest.mark.parametrize("single_value", ["use_running", "skip"])
def test_one_value_a_channel_is_masked_as_any_other(single_value):
    layer = bn.BatchNorm(2, single_value=single_value)
    layer.beta += 3
    x, mask = np.array([[5.0, 7.0]]), np.array([False])
    np.testing.assert_array_equal(layer(x, mask=mask), [[0.0, 0.0]])
    np.testing.assert_array_equal(layer(x, mask=mask, padding="keep"), x)
    np.testing.assert_array_equal(layer(x, mask=~mask), layer(x))
    with pytest.raises(TypeError, match=r"mask must have a bool dtype \(write mask != 0\), got float64"):
        layer(x, mask=[1.0])


# ---- one value a channel, by whatever leaves it ------------------------------------------------------------

LEFT = np.array([False, True, False, False])
LEAVES_ONE = {
    "mask": {"mask": LEFT},
    "weights": {"weights": np.where(LEFT, 0.3, 0.0), "padding": "zero"},
    "lengths": {"lengths": np.array([0, 1, 0, 0])},
}


@pytest.mark.parametrize("kind", LEAVES_ONE)
@pytest.mark.parametrize("rate", [0.1, None])
@pytest.mark.parametrize("single_value", ["raise", "use_running", "skip"])
def test_single_value_is_heard_where_one_position_is_left(kind, rate, single_value):
    how = LEAVES_ONE[kind]
    shape = (4, 3, 1) if kind == "lengths" else (4, 3)
    x = np.random.default_rng(1).normal(size=shape)
    dy = np.random.default_rng(2).normal(size=shape)
    layer = trained(update_rate=rate, single_value=single_value, weights_are="importance")
    layer.beta += 3
    before = bits(layer)
    if single_value == "raise":
        with pytest.raises(ValueError, match="2 positions or more"):
            layer(x, **how)
        assert bits(layer) == before
        return
    same = copy.copy(layer).eval()
    y, dx = layer(x, **how), layer.backward(dy)
    if single_value == "use_running":
        assert y.tobytes() == same(x, **how).tobytes()
        assert dx.tobytes() == same.backward(dy).tobytes()
    else:
        assert (y[1] == 3).all()
        assert (dx == 0).all()
    assert (y[[0, 2, 3]] == 0).all()
    assert layer.update_count == 1 + (rate is None)


@pytest.mark.parametrize("single_value", ["use_running", "skip"])
@pytest.mark.parametrize("rate", [0.1, None])
@pytest.mark.parametrize("debias", [False, True])
def test_single_value_is_heard_for_a_last_ghost_of_one(single_value, rate, debias):
    if debias and rate is None:
        return
    x, dy = np.random.default_rng(1).normal(size=(2, 7, 3))
    settings = {"ghost_size": 3, "update_rate": rate, "debias": debias, "single_value": single_value}
    layer = trained(**settings)
    whole, last = copy.copy(layer), copy.copy(layer)
    y, dx = layer(x), layer.backward(dy)
    assert y[:6].tobytes() == whole(x[:6]).tobytes()
    assert dx[:6].tobytes() == whole.backward(dy[:6]).tobytes()
    assert y[6:].tobytes() == last(x[6:]).tobytes()
    assert dx[6:].tobytes() == last.backward(dy[6:]).tobytes()
    np.testing.assert_allclose(layer.dgamma, whole.dgamma + last.dgamma, rtol=1e-6)
    np.testing.assert_allclose(layer.dbeta, whole.dbeta + last.dbeta, rtol=1e-6)
    assert layer.update_count == 2
    if rate is None:
        exact = bn.moments(X) | bn.moments(x)
        np.testing.assert_allclose(layer.running_mean, exact.mean, rtol=1e-14)
        np.testing.assert_allclose(layer.running_var, exact.var(1), rtol=1e-14)
    else:
        assert layer.running_var.tobytes() == whole.running_var.tobytes()
    out = x.copy()
    assert copy.copy(last)(x, out=out).tobytes() == copy.copy(last)(x).tobytes()
    into = dy.copy()
    layer(x)
    assert layer.backward(dy, out=into) is into
    with pytest.raises(ValueError, match="dy must have shape"):
        layer.backward(dy[:6])


@pytest.mark.parametrize("keep", ["x", "y", "y in place"])
@pytest.mark.parametrize("how", ["use_running", "skip"])
def test_what_is_kept_of_a_last_ghost_of_one_is_of_all(how, keep):
    x, dy = np.random.default_rng(1).normal(size=(2, 7, 3))
    layer, other = (bn.BatchNorm(3, ghost_size=3, single_value=how, dtype=np.float64) for _ in range(2))
    y, given = layer(x), x.copy()
    assert other(given, keep=keep[0], out=given if keep == "y in place" else None).tobytes() == y.tobytes()
    np.testing.assert_allclose(other.backward(dy), layer.backward(dy), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(other.dgamma, layer.dgamma, rtol=1e-10)


@pytest.mark.parametrize("how", ["use_running", "skip"])
def test_what_follows_is_of_a_last_ghost_of_one_too(how):
    x, dy, residual = np.random.default_rng(1).normal(size=(3, 7, 3))
    layer = bn.BatchNorm(3, ghost_size=3, single_value=how, activation="relu", dtype=np.float64)
    y = layer(x, residual=residual)
    plain = bn.BatchNorm(3, ghost_size=3, single_value=how, dtype=np.float64)
    s = plain(x) + residual
    assert y.tobytes() == np.maximum(s, 0).tobytes()
    g = np.where(s > 0, dy, 0)
    assert layer.backward(dy).tobytes() == plain.backward(g).tobytes()
    assert layer.dresidual.tobytes() == g.tobytes()
    assert layer.dbeta.tobytes() == plain.dbeta.tobytes()


def test_a_last_ghost_of_one_raises_by_default():
    with pytest.raises(ValueError, match="ghost_size must leave every ghost at least 2 values"):
        bn.BatchNorm(3, ghost_size=3)(np.ones((7, 3)))


# ---- pooling one value after the other ---------------------------------------------------------------------

STREAM = np.random.default_rng(3).normal(5, 2, (101, 3))


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({"single_value": "use_running"}, {}),
        ({"single_value": "skip"}, {}),
        ({}, {"use_stats": "running", "update_stats": True}),
    ],
)
@pytest.mark.parametrize("ddof", [0, 1])
def test_single_observations_are_pooled_whatever_normalizes_them(settings, call, ddof, tmp_path):
    layer = bn.BatchNorm(3, update_rate=None, ddof=ddof, **settings)
    for n, x in enumerate(STREAM, 1):
        layer(x[None], **call)
        assert layer.update_count == n
        if n == 1:  # which has no variance
            assert layer.running_var.tolist() == [1, 1, 1]
            assert np.isfinite(layer.eval()(x[None])).all()
            layer.train().save(tmp_path / "state")
            layer = bn.BatchNorm(3, update_rate=None, ddof=ddof, **settings)
            layer.load(tmp_path / "state")
    exact = bn.moments(STREAM)
    np.testing.assert_allclose(layer.running_mean, exact.mean, rtol=1e-14)
    np.testing.assert_allclose(layer.running_var, exact.var(ddof), rtol=1e-14)


@pytest.mark.parametrize("single_value", ["use_running", "skip"])
def test_a_data_set_pooled_in_tens_keeps_its_last_sample(single_value):
    layer = bn.BatchNorm(3, update_rate=None, single_value=single_value)
    for start in range(0, 101, 10):
        layer(STREAM[start : start + 10])
    exact = bn.moments(STREAM)
    np.testing.assert_allclose(layer.running_mean, exact.mean, rtol=1e-14)
    np.testing.assert_allclose(layer.running_var, exact.var(1), rtol=1e-14)


def test_a_single_observation_that_must_not_update_does_not():
    layer = bn.BatchNorm(3, update_rate=None, single_value="use_running")
    layer(STREAM[:1], update_stats=False)
    assert layer.update_count == 0
    assert layer.running_mean.tolist() == [0, 0, 0]


def test_statistics_that_follow_the_batch_refuse_a_single_observation_or_pass_it_by():
    call = {"use_stats": "running", "update_stats": True}
    for x, how in ((STREAM[:1], {}), (STREAM[:4], {"mask": LEFT})):
        layer = bn.BatchNorm(3, ddof=0)
        with pytest.raises(ValueError, match="x must have at least 2 values per channel"):
            layer(x, **how, **call)
        assert layer.update_count == 0
        layer = bn.BatchNorm(3, ddof=0, single_value="use_running")
        layer(x, **how, **call)
        assert layer.update_count == 0


# ---- debiased ghosts ---------------------------------------------------------------------------------------


def test_each_ghost_is_an_update_of_a_debiased_start():
    spread = np.array([-1.0, 1, -1, 1])
    x = np.concatenate([mean + spread for mean in (1, 2, 3)])[:, None]
    layer = bn.BatchNorm(1, ghost_size=4, debias=True, update_rate=0.1)
    layer(x)
    weights = 0.1 * 0.9 ** np.array([2, 1, 0])
    np.testing.assert_allclose(layer.running_mean, np.average([1, 2, 3], weights=weights), rtol=1e-14)
    assert round(float(layer.running_mean[0]), 3) == 2.07
    assert layer.update_count == 1


@pytest.mark.parametrize("domains", [None, 2])
def test_debiased_ghosts_are_the_average_of_all_ghosts_over_calls_and_files(tmp_path, domains):
    settings = {"ghost_size": 3, "debias": True, "update_rate": 0.3, "domains": domains}
    call = {} if domains is None else {"domain": 1}
    layer, seen = bn.BatchNorm(3, **settings), []
    for step in range(4):
        x = X[: 8 - step % 2 * 2] * np.float32(step + 1)
        layer(x, **call)
        seen += bn.batch_norm(x, ghost_size=3)[1].moments.split(3)
        weights = 0.3 * 0.7 ** np.arange(len(seen) - 1, -1, -1.0)
        for name, values in (
            ("running_mean", [m.mean for m in seen]),
            ("running_var", [m.var(1) for m in seen]),
        ):
            running = np.atleast_2d(getattr(layer, name))[-1]
            np.testing.assert_allclose(running, np.average(values, axis=0, weights=weights), rtol=1e-12)
        layer.save(tmp_path / "state")
        layer = bn.BatchNorm(3, **settings)
        layer.load(tmp_path / "state")


def test_an_update_in_evaluation_is_one_more_among_those_of_debiased_ghosts(tmp_path):
    settings = {"ghost_size": 4, "debias": True, "update_rate": 0.1}
    layer, seen = bn.BatchNorm(3, **settings), []
    for step, use in enumerate(("running", "batch", "running", "batch")):
        x = X + np.float32(step)
        layer(x, use_stats=use, update_stats=True)
        seen += [bn.moments(x)] if use == "running" else bn.batch_norm(x, ghost_size=4)[1].moments.split(3)
        weights = 0.1 * 0.9 ** np.arange(len(seen) - 1, -1, -1.0)
        expected = np.average([m.mean for m in seen], axis=0, weights=weights)
        np.testing.assert_allclose(layer.running_mean, expected, rtol=1e-12)
        assert layer.state_dict()["set_count"] == len(seen)
        layer.save(tmp_path / "state")
        layer = bn.BatchNorm(3, **settings)
        layer.load(tmp_path / "state")


# ---- segments ----------------------------------------------------------------------------------------------

IDS = np.array([0, 0, 0, 2, 2, 3, 3, 3])


def test_each_segment_is_an_update_and_evaluation_knows_none():
    layer = bn.BatchNorm(3, update_rate=0.3)
    _, saved = bn.batch_norm(X, layer.gamma, layer.beta, segments=IDS)
    layer(X, segments=IDS)
    mean, var = np.zeros(3), np.ones(3)
    for one in saved.moments.split(3):
        mean, var = bn.update_running(mean, var, one, update_rate=0.3)
    assert layer.running_mean.tobytes() == mean.tobytes()
    assert layer.running_var.tobytes() == var.tobytes()
    assert layer.update_count == 1
    assert layer.eval()(X, segments=IDS).tobytes() == layer(X).tobytes()


@pytest.mark.parametrize("settings", [{}, {"update_rate": None}, {"debias": True}, {"single_value": "skip"}])
def test_segments_are_learned_alike_whatever_normalizes(settings):
    by_batch, by_running = bn.BatchNorm(3, **settings), bn.BatchNorm(3, **settings)
    by_batch(X, segments=IDS)
    y = by_running(X, segments=IDS, use_stats="running", update_stats=True)
    assert y.tobytes() == bn.normalize(X, np.zeros(3), np.ones(3), np.ones(3), np.zeros(3)).tobytes()
    assert bits(by_running) == bits(by_batch)


def test_segments_are_pooled_as_their_batch():
    layer, whole = bn.BatchNorm(3, update_rate=None), bn.BatchNorm(3, update_rate=None)
    layer(X, segments=IDS)
    whole(X)
    np.testing.assert_allclose(layer.running_var, whole.running_var, rtol=1e-14)


def test_segments_of_a_debiased_layer_count_as_the_batches_that_they_are(tmp_path):
    settings = {"debias": True, "update_rate": 0.3}
    layer, apart = bn.BatchNorm(3, **settings), bn.BatchNorm(3, **settings)
    for step in range(3):
        x = X + np.float32(step)
        layer(x, segments=IDS)
        for rows in (slice(0, 3), slice(3, 5), slice(5, 8)):
            apart(x[rows])
        layer.save(tmp_path / "state")
        layer = bn.BatchNorm(3, **settings)
        layer.load(tmp_path / "state")
    np.testing.assert_allclose(layer.running_mean, apart.running_mean, rtol=1e-14)
    np.testing.assert_allclose(layer.running_var, apart.running_var, rtol=1e-14)


@pytest.mark.parametrize("single_value", ["raise", "skip"])
@pytest.mark.parametrize("has_out", [False, True])
def test_a_segment_of_one_value_is_not_learned_of(single_value, has_out):
    x, out = X[:, :, 0].copy(), np.full((8, 3), 9, X.dtype)
    layer = trained(single_value=single_value)
    before, ids = bits(layer), np.array([0, 0, 0, 1, 2, 2, 2, 2])
    if single_value == "raise":
        with pytest.raises(ValueError):
            layer(x, segments=ids, out=out if has_out else None)
        assert bits(layer) == before
        assert (out == 9).all()
        return
    layer.beta += 3
    y = layer(x, segments=ids, out=out if has_out else None)
    assert (y[3] == 3).all()
    expected = trained()
    for rows in (slice(0, 3), slice(4, 8)):
        expected(x[rows])
    assert layer.running_var.tobytes() == expected.running_var.tobytes()


# ---- warnings that are errors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"ghost_size": 3}, {"ghost_size": 4}, {"renorm": SCHEDULE}, {"activation": "relu"}, {"domains": 2}],
)
@pytest.mark.parametrize("how", [{}, {"mask": np.arange(8) % 4 > 0}])
@pytest.mark.parametrize("target", ["out", "x"])
def test_a_warning_that_is_an_error_writes_nothing(settings, how, target):
    if how and (set(settings) & {"ghost_size", "renorm", "activation"}):
        return
    call = {"domain": 1} if "domains" in settings else {}
    layer = trained(**settings, single_value="skip" if settings.get("ghost_size") == 4 else "raise")
    before, dx = bits(layer), layer.backward(DY)
    before = bits(layer)
    x = np.arange(24.0).reshape(8, 3)
    x[5, 1] = np.inf
    if layer.single_value == "skip":
        x = np.concatenate([x, x[:1]])
    kept = x.copy()
    out = x if target == "x" else np.full_like(x, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="got infinity or NaN in channel 1: they are left as they are"):
            layer(x, out=out, **how, **call)
    assert x.tobytes() == kept.tobytes()
    assert target == "x" or (out == 9).all()
    assert bits(layer) == before
    assert layer.backward(DY).tobytes() == dx.tobytes()


def test_a_warning_comes_once_whatever_filters_say():
    layer, x = trained(), poisoned(np.inf)
    for action in ("always", "error"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if action == "error":
                warnings.filterwarnings("error", message="another text")
            layer(x, out=np.empty_like(x))
        assert [w.filename for w in told] == [__file__]


# ---- a step that is run again ------------------------------------------------------------------------------


def test_a_step_with_renorm_is_run_again_as_the_documentation_says():
    layer = bn.BatchNorm(3, renorm=bn.RenormSchedule.constant(3, 5))
    layer(X)
    held = copy.copy(layer)
    first = layer(X * 2, update_stats=False)
    assert layer(X * 2).tobytes() == first.tobytes()  # the one that learns comes last
    assert held(X * 2, update_stats=False).tobytes() == first.tobytes()  # a copy of before
    assert layer(X * 2, update_stats=False).tobytes() != first.tobytes()
