"""The report finds what is wrong with a layer, says where, and finds nothing wrong with a healthy one."""

import copy
import dataclasses
import pickle
import warnings

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.layers import batch, statistics

C = 4


def healthy(batches=200, *, size=64, **settings):
    """Give a layer trained on normals of one distribution: mean 3, standard deviation 2."""
    layer, rng = bn.BatchNorm(C, **settings), np.random.default_rng(1)
    for _ in range(batches):
        layer(rng.normal(3, 2, (size, C)))
    return layer


def with_state(layer, **entries):
    state = layer.state_dict()
    for name, (channel, value) in entries.items():
        state[name][..., channel] = value
    layer.load_state_dict(state)
    return layer


def bits(layer):
    return {name: value.tobytes() for name, value in layer.state_dict().items()}


def kinds(layer):
    return [(finding.kind, finding.channels) for finding in layer.report()]


@pytest.mark.parametrize(
    "settings",
    [{}, {"update_rate": 0.01}, {"update_rate": None}, {"debias": True}, {"ddof": 0}, {"dtype": "float16"}],
    ids=str,
)
def test_a_healthy_layer_has_an_empty_report(settings):
    layer = healthy(1000 if settings.get("update_rate") else 200, **settings)
    assert not layer.report()
    assert len(layer.report()) == 0
    assert str(layer.report()) == "nothing found"


@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("parameters", [True, False])
def test_a_new_layer_has_an_empty_report(channels, parameters):
    assert kinds(bn.BatchNorm(channels, gamma=parameters, beta=parameters)) == []


@pytest.mark.parametrize("domains", [None, 2])
@pytest.mark.parametrize(
    "evaluated",
    [
        lambda layer: layer.eval(),
        lambda layer: layer.freeze(),
        lambda layer: layer.freeze(affine=False).eval(),
    ],
    ids=["eval", "freeze", "both"],
)
@pytest.mark.parametrize("settings", [{}, {"update_rate": None}, {"debias": True}], ids=str)
def test_a_layer_that_evaluates_and_has_never_trained_is_found(settings, evaluated, domains):
    layer = evaluated(bn.BatchNorm(C, domains=domains, **settings))
    found = list(layer.report())
    assert [(f.kind, f.severity, f.channels, f.domain) for f in found] == [
        ("untrained", "warning", (), k) for k in ([None] if domains is None else [0, 1])
    ]
    places = [""] if domains is None else [" of domain 0", " of domain 1"]
    assert [f.text for f in found] == [
        f"the running statistics{place} have seen no batch: evaluation normalizes by mean 0 and variance 1"
        for place in places
    ]
    x = np.random.default_rng(0).normal(size=(64, C))
    layer(x, **({} if domains is None else {"domain": 0}))
    assert len(layer.report()) == len(found)


def test_a_layer_that_evaluates_by_statistics_of_its_own_is_not_untrained():
    assert kinds(healthy().eval()) == []
    given = with_state(bn.BatchNorm(C), running_mean=(1, 0.5)).eval()
    assert given.update_count == 0
    assert kinds(given) == []
    assert kinds(bn.BatchNorm(C)) == []
    assert kinds(bn.BatchNorm(C).freeze(statistics=False)) == []
    assert kinds(bn.BatchNorm(0).eval()) == []


@pytest.mark.parametrize("seed", range(20))
def test_healthy_small_batches_do_not_drift(seed):
    # 2 values a channel: a batch's variance is often 10 times the running one, by chance.
    layer = healthy(size=256)
    layer(np.random.default_rng(seed).normal(3, 2, (2, C)))
    assert {kind for kind, _ in kinds(layer)} == {"few_values", "small_batch"}


def test_chance_reaches_the_drift_threshold_hardly_ever():
    rng, layer = np.random.default_rng(5), bn.BatchNorm(10_000, update_rate=0.01)
    layer.load_state_dict(layer.state_dict() | {"update_count": 10_000})  # of standard normals, exactly
    for n in (2, 3, 8, 100):
        layer(rng.normal(size=(n, 10_000)), use_stats="batch", update_stats=False)
        drifted = [f for f in layer.report() if f.kind.endswith("drift")]
        assert sum(len(f.channels) for f in drifted) <= 1


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_errors(name, bad):
    layer = bn.BatchNorm(C, nonfinite="propagate")
    x = np.random.default_rng(0).normal(size=(64, C))
    x[3, 2] = bad
    layer(x)
    found = [f for f in layer.report() if f.kind == "nonfinite" and name in f.text]
    assert [(f.severity, f.channels) for f in found] == [("error", (2,))]


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_parameters_that_are_not_finite_are_errors(name):
    layer = healthy()
    getattr(layer, name)[1] = np.nan
    found = [f for f in layer.report() if f.kind == "nonfinite"]
    assert [(f.severity, f.channels, f.text) for f in found] == [("error", (1,), f"{name} is not finite in channel 1")]


@pytest.mark.parametrize("use", ["batch", "running"])
def test_an_empty_batch_is_not_the_last_one(use):
    layer = healthy()
    layer(np.full((64, C), 1e3) + np.arange(64)[:, None])
    before = layer.report()
    assert before
    layer(np.empty((0, C)), use_stats=use, update_stats=True)
    assert layer.report() == before


@pytest.mark.parametrize("use", ["batch", "running"])
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("name", ["mask", "weights"])
@pytest.mark.parametrize("settings", [{}, {"update_rate": None}, {"weights_are": "importance"}], ids=str)
def test_a_batch_of_which_nothing_counts_is_not_the_last_one(settings, name, update, use):
    layer = healthy(**settings)
    layer(np.full((64, C), 1e3) + np.arange(64)[:, None])
    before, state = layer.report(), bits(layer)
    assert before
    nothing = {name: np.zeros(256, {"mask": bool, "weights": float}[name])}
    layer(np.ones((256, C)), use_stats=use, update_stats=update, **nothing)
    assert layer.report() == before
    assert bits(layer) == state


def test_a_batch_of_which_nothing_counts_is_not_the_largest_so_far():
    layer = healthy()
    layer(np.ones((4096, C)), mask=np.zeros(4096, bool))
    assert not layer.report()


def test_a_batch_that_was_skipped_is_found():
    layer = healthy(nonfinite="skip")
    x = np.random.default_rng(0).normal(3, 2, (64, C))
    x[0, 1] = np.inf
    layer(x)
    assert kinds(layer) == [("nonfinite_batch", (1,))]


def test_a_batch_whose_variance_alone_is_not_finite_is_found():
    layer = bn.BatchNorm(2, nonfinite="skip")
    layer(np.array([[1e200, 1.0], [-1e200, 2.0]]))
    assert np.isfinite(bn.moments(np.array([[1e200], [-1e200]])).mean).all()
    assert ("nonfinite_batch", (0,)) in kinds(layer)


def test_a_negative_variance_is_an_error():
    layer = healthy()
    var = layer._state.statistics[0].var
    layer._state.statistics[0].var = np.where(np.arange(C) == 2, -1.0, var)  # as no call can leave it
    assert [(f.severity, f.channels) for f in layer.report() if f.kind == "negative_variance"] == [("error", (2,))]


def above(value):
    return float(np.nextafter(value, np.inf))


def below(value):
    return float(np.nextafter(value, -np.inf))


@pytest.mark.parametrize(("var", "found"), [(0.0, True), (1e-5, True), (above(1e-5), False)])
def test_a_variance_of_no_more_than_eps_has_vanished(var, found):
    layer = with_state(healthy(), running_var=(1, var))
    assert (("vanishing_variance", (1,)) in kinds(layer)) == found


def test_a_variance_that_nothing_has_updated_has_not_vanished():
    assert kinds(bn.BatchNorm(C, eps=2)) == []


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ({"running_mean": (1, 7e4)}, "running_mean is beyond"),
        ({"running_var": (1, 9e4)}, "running_var is beyond"),
        ({"gamma": (1, 2e5)}, "scale is beyond"),
        ({"beta": (1, 7e4)}, "offset is beyond"),
        ({"running_mean": (1, -6e4)}, "offset is beyond"),
        ({"gamma": (1, 1e-4)}, "scale is subnormal"),
    ],
)
def test_what_float16_cannot_hold_is_found(entries, what):
    layer = with_state(healthy(), **entries)
    if "running_mean" in entries:
        layer = with_state(layer, running_var=(1, 0.25))
    texts = [f.text for f in layer.report() if f.kind == "float16" and f.channels == (1,)]
    assert any(text.startswith(what) for text in texts)


# Half a spacing beyond the largest float16 is where rounding gives infinity, and below the least normal one is where it
# gives a subnormal.
@pytest.mark.parametrize("value", [65504.0, below(65520.0), 65520.0, 1e300])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["running_mean", "running_var", "scale", "offset"])
def test_what_is_beyond_float16_is_what_float16_makes_infinite(name, value, sign):
    mean, var, gamma, beta = 0.0, 1.0, 1.0, 0.0
    if name == "running_mean":
        mean = sign * value
    elif name == "running_var":
        var = value
    elif name == "scale":
        gamma = sign * value
    else:
        beta = sign * value
    layer = bn.BatchNorm(1, eps=0.0, dtype=np.float64)
    layer.load_state_dict(
        {"gamma": np.array([gamma]), "beta": np.array([beta])}
        | {"running_mean": np.array([mean]), "running_var": np.array([var]), "update_count": 1},
        strict=False,
    )
    with np.errstate(over="ignore"):
        infinite = bool(np.isinf(np.float64(value).astype(np.float16)))
    found = [f.text.split()[0] for f in layer.report() if f.kind == "float16" and "beyond" in f.text]
    assert (name in found) == infinite


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("value", [2.0**-14, 2.0**-14 * (1 - 2.0**-11), below(2.0**-14 * (1 - 2.0**-11)), 0])
def test_a_scale_is_subnormal_where_float16_makes_it_so(value, sign):
    layer = bn.BatchNorm(2, eps=0.0, dtype=np.float64)
    layer.gamma[1] = sign * value
    stored = np.float64(value).astype(np.float16)
    subnormal = bool(0 < stored < np.finfo(np.float16).smallest_normal)
    found = [f.channels for f in layer.report() if f.text.startswith("scale is subnormal")]
    assert found == [(1,)] * subnormal


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("gamma", "found"), [(0.0, True), (below(1e-3), True), (1e-3, False)])
def test_a_gamma_below_a_thousandth_of_the_median_is_dead(gamma, found, sign):
    layer = with_state(bn.BatchNorm(C, dtype=np.float64), gamma=(3, sign * gamma))
    assert (("dead", (3,)) in kinds(layer)) == found


def test_gammas_that_are_all_zero_are_dead_though_none_is_below_the_others():
    layer = bn.BatchNorm(C)
    layer.gamma[...] = 0
    assert kinds(layer) == [("dead", (0, 1, 2, 3))]


@pytest.mark.parametrize(("beta", "found"), [(below(-4.0), True), (-4.0, False)])
@pytest.mark.parametrize("gamma", [1.0, -1.0])
def test_a_channel_that_a_relu_would_silence_is_dead(beta, gamma, found):
    layer = with_state(bn.BatchNorm(C, dtype=np.float64), beta=(0, beta), gamma=(0, gamma))
    assert (("dead_relu", (0,)) in kinds(layer)) == found


@pytest.mark.parametrize(
    ("shift", "scale", "expected"),
    [(0, 1, []), (3, 1, [("mean_drift", (2,))]), (0, 3, [("variance_drift", (2,))]), (0.2, 1, [])],
)
def test_a_batch_unlike_the_running_statistics_has_drifted(shift, scale, expected):
    layer, x = healthy(), np.random.default_rng(9).normal(0, 2, (64, C))
    x[:, 2] = x[:, 2] * scale + shift
    layer(x + 3, update_stats=False)
    assert kinds(layer) == expected


def seen_beside(var, batch, *, update_rate=0.0, update_count=10**6):
    """Give what the report finds of a batch beside a running mean of 0 and that running variance."""
    layer = bn.BatchNorm(1, update_rate=update_rate, ddof=0)
    state = {"running_mean": np.zeros(1), "running_var": np.array([var]), "update_count": update_count}
    layer.load_state_dict(layer.state_dict() | state)
    layer(batch, use_stats="batch", update_stats=False)
    return {finding.kind: finding.text for finding in layer.report()}


def of_mean(mean, n):
    """Give n values, half of them 1 above the mean and half 1 below."""
    return (mean + np.tile([1.0, -1.0], n // 2))[:, None]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("mean", "found"), [(0.5, True), (0.4999, False)])
def test_a_mean_drifts_from_half_a_standard_deviation_on(mean, found, sign):
    assert ("mean_drift" in seen_beside(1.0, of_mean(sign * mean, 400))) == found


@pytest.mark.parametrize(
    ("mean", "n", "found"), [(2.5, 4, True), (2.4999, 4, False), (3.54, 2, True), (3.53, 2, False)]
)
def test_a_mean_drifts_from_five_standard_errors_on(mean, n, found):
    assert ("mean_drift" in seen_beside(1.0, of_mean(mean, n))) == found


@pytest.mark.parametrize(("var", "found"), [(0.5, True), (above(0.5), False), (2.0, True), (below(2.0), False)])
def test_a_variance_drifts_from_a_factor_of_two_on(var, found):
    assert ("variance_drift" in seen_beside(var, of_mean(0.0, 10_000))) == found


@pytest.mark.parametrize(("factor", "found"), [(1.001, True), (0.999, False)])
def test_a_variance_drifts_from_five_standard_errors_on(factor, found):
    share = 2 / (9 * (10 - 1))  # Wilson and Hilferty: the cube root has mean 1 - share and variance share
    ratio = (1 - share + 5 * np.sqrt(share)) ** 3
    assert ratio > 2
    assert ("variance_drift" in seen_beside(1 / (ratio * factor), of_mean(0.0, 10))) == found


def test_drift_allows_for_the_noise_of_the_running_mean():
    # A mean of batches of n with weights r(1 - r)^k has variance r/(2 - r)/n; the batch itself has taken a share of r.
    text = seen_beside(1.0, of_mean(2.0, 4), update_rate=0.5)["mean_drift"]
    assert f"{2 / (1 - 0.5) / np.sqrt((1 + 0.5 / 1.5) / 4):+.3g} standard errors" in text


def test_statistics_that_are_those_of_the_last_batch_cannot_drift():
    layer = bn.BatchNorm(1, update_rate=1.0)
    layer(of_mean(0.0, 400))
    layer(of_mean(9.0, 400), update_stats=False)
    assert kinds(layer) == []


def test_a_running_variance_of_zero_has_no_standard_errors():
    assert not [kind for kind in seen_beside(0.0, of_mean(9.0, 400)) if "drift" in kind]


def test_drift_is_told_in_standard_errors():
    layer, x = bn.BatchNorm(1, update_rate=0), np.tile([[9.0], [11.0]], (50, 1))
    layer(x)  # mean 10 against 0, n = 100: 10 / sqrt(1/100) standard errors
    (finding,) = layer.report()
    assert finding.kind == "mean_drift"
    assert "+100 standard errors" in finding.text


@pytest.mark.parametrize(("rate", "n", "updates"), [(1.0, 200, 1), (1.0, 200, 9), (0.01, 50, 4), (None, 50, 4)])
def test_two_hundred_values_are_enough_and_fewer_are_few(rate, n, updates):
    rng, found = np.random.default_rng(0), []
    for size in (n, n - 1):
        layer = bn.BatchNorm(1, update_rate=rate)
        for _ in range(updates):
            layer(rng.normal(size=(size, 1)))
        found.append("few_values" in dict(kinds(layer)))
    assert found == [False, True]


def test_statistics_that_never_change_do_not_average_few_values():
    layer = bn.BatchNorm(1, update_rate=0.0)
    layer(of_mean(0.0, 4))
    assert "few_values" not in dict(kinds(layer))


@pytest.mark.parametrize(
    ("rate", "size", "found"), [(0.1, 8, True), (0.1, 15, False), (1.0, 64, True), (0.01, 8, False)]
)
def test_few_values_for_the_update_rate_are_found(rate, size, found):
    # n (2 - rate) / rate: 152, 285, 64 and 1592 values
    layer = healthy(1000, size=size, update_rate=rate)
    assert any(f.kind == "few_values" for f in layer.report()) == found


def test_the_running_variance_is_as_noisy_as_the_report_says():
    layer, rng = bn.BatchNorm(4000, update_rate=0.1, ddof=1), np.random.default_rng(2)
    for _ in range(100):
        layer(rng.normal(size=(8, 4000)))
    values = 8 * (2 - 0.1) / 0.1
    # Each value but one of a batch is a degree of freedom; 4000 channels tell the spread within 2 %.
    assert layer.running_var.std() == pytest.approx(np.sqrt(2 / (values * 7 / 8)), rel=0.06)


def test_a_last_batch_much_smaller_than_the_others_is_found():
    layer = healthy()
    layer(np.random.default_rng(3).normal(3, 2, (15, C)))
    assert ("small_batch", ()) in kinds(layer)
    layer(np.random.default_rng(3).normal(3, 2, (16, C)))
    assert ("small_batch", ()) not in kinds(layer)


def test_a_domain_is_named():
    layer = bn.BatchNorm(C, domains=2, nonfinite="propagate")
    x = np.ones((64, C))
    x[0, 1] = np.nan
    layer(x, domain=1)
    assert {f.domain for f in layer.report() if f.kind.startswith("nonfinite")} == {1}
    assert "in channel 1 of domain 1" in str(layer.report())


def test_a_long_list_of_channels_is_cut_in_the_text_alone():
    layer = bn.BatchNorm(100)
    layer.gamma[40:] = 0
    (finding,) = layer.report()
    assert finding.channels == tuple(range(40, 100))
    assert finding.text.endswith("in channels 40, 41, 42, 43, 44, 45, 46, 47 and 52 more")


def test_a_report_changes_nothing_in_the_layer():
    layer = healthy()
    before = pickle.dumps(layer)
    layer.report()
    assert pickle.dumps(layer) == before


def test_a_report_does_not_change():
    report = healthy().report()
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.findings = ()


def test_a_copy_has_the_same_report():
    layer = healthy()
    layer(np.random.default_rng(9).normal(30, 2, (4, C)))
    assert layer.report()
    assert copy.copy(layer).report() == layer.report() == pickle.loads(pickle.dumps(layer)).report()


def test_resetting_the_statistics_forgets_the_last_batch():
    layer = healthy()
    layer(np.full((64, C), 1e3) + np.arange(64)[:, None])
    layer.reset_statistics()
    assert kinds(layer) == []


def test_extreme_statistics_raise_no_warning():
    layer = bn.BatchNorm(C, eps=0, nonfinite="propagate")
    layer.load_state_dict(
        layer.state_dict() | {"running_mean": np.full(C, -1.7e308), "running_var": np.array([5e-324, 0, 1.7e308, 1])}
    )
    layer(np.tile([[1e300], [-1e300], [0.0]], (1, C)), update_stats=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(layer.report())


@pytest.mark.parametrize(
    ("use", "name"),
    [
        ("batch", "Statistics"),
        ("batch", "update_into"),
        ("running", "updated"),
        ("running", "update_running"),
    ],
)
def test_a_call_that_fails_leaves_the_report(monkeypatch, name, use):
    layer = healthy()
    before = (
        layer.report(),
        layer._state.batch,
        layer.state_dict()["running_mean"].tobytes(),
        layer._state.call,
    )

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(batch if name == "updated" else statistics, name, fail)
    with pytest.raises(MemoryError):
        layer(np.full((64, C), 1e3) + np.arange(64)[:, None], use_stats=use, update_stats=True)
    after = (
        layer.report(),
        layer._state.batch,
        layer.state_dict()["running_mean"].tobytes(),
        layer._state.call,
    )
    assert after == before
