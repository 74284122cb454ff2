"""The demonstration: networks compute what they say, criteria decide as they read, files are whole."""

import argparse
import json
import math
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.demo import add_arguments, batch_sizes, claims, data, run
from batchnorm.demo.command import compare_batch_sizes, demonstrate
from batchnorm.demo.experiment import FULL, QUICK, Settings, measure
from batchnorm.demo.inspection import companion_noise, forward, population_moments
from batchnorm.demo.networks import NETWORKS, SHALLOW, Conv3x3, build, cross_entropy
from batchnorm.demo.training import CHANCE, Run, batches, evaluation_steps, train

TINY = Settings(seeds=2, steps=12, batch=64, rates=(0.1, 30.0), init_scales=(1.0, 3.0), batch_sizes=(2, 64), shuffles=2)


@pytest.fixture(scope="module")
def digits():
    return data.load_digits()


@pytest.fixture(scope="module")
def split(digits):
    return data.split(digits, seed=0)


@pytest.fixture(params=NETWORKS)
def network_name(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def normalized(request):
    return request.param


# ---- the networks ----


def weight_layers(network_name):
    return 12 if network_name == "deep net" else 3


def test_gradients_are_central_differences(network_name, normalized):
    rng = np.random.default_rng(0)
    network = build(network_name, normalized, rng, dtype=np.float64)
    x, digits = rng.normal(size=(12, 8, 8, 1)), rng.integers(0, 10, 12)
    loss, dlogits = cross_entropy(network(x), digits)
    network.backward(dlogits)
    parameters = [(value, gradient.copy()) for value, gradient in network.parameters()]
    depth = weight_layers(network_name)
    assert len(parameters) == (3 * depth - 1 if normalized else 2 * depth)
    for value, gradient in parameters:
        direction = rng.normal(size=value.shape)
        direction /= np.linalg.norm(direction)
        start, step, losses = value.copy(), 1e-6, []
        for sign in (1, -1):
            value[...] = start + sign * step * direction
            losses.append(cross_entropy(network(x), digits)[0])
        value[...] = start
        slope = (losses[0] - losses[1]) / (2 * step)
        # The differences lose 1e-16 * loss / step to rounding and step**2 to the third derivative.
        assert slope == pytest.approx((gradient * direction).sum(), rel=1e-5, abs=1e-9 * max(1, loss))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (5, 4)], ids=["even", "odd"])
def test_conv3x3_is_its_formula_and_backward_its_adjoint(stride, size):
    rng = np.random.default_rng(1)
    x, weight, bias = rng.normal(size=(2, *size, 3)), rng.normal(size=(3, 3, 3, 4)), rng.normal(size=4)
    layer = Conv3x3(weight, bias, stride=stride)
    y = layer(x)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    for p in range(-(-size[0] // stride)):
        for q in range(-(-size[1] // stride)):
            window = padded[:, stride * p : stride * p + 3, stride * q : stride * q + 3]
            np.testing.assert_allclose(y[:, p, q], np.tensordot(window, weight, 3) + bias, atol=1e-12)
    dy = rng.normal(size=y.shape)
    # y is linear in x and in the weight, so <dy, y - bias> is <dx, x> and <dweight, weight>.
    inner = (dy * (y - bias)).sum()
    assert (layer.backward(dy) * x).sum() == pytest.approx(inner)
    assert (layer.dweight * weight).sum() == pytest.approx(inner)
    np.testing.assert_allclose(layer.dbias, dy.sum((0, 1, 2)))


def test_batch_norm_changes_no_initial_weight(network_name):
    plain, norm = (build(network_name, with_norm, np.random.default_rng(3)) for with_norm in (False, True))
    weights = [[layer.weight for layer in net.layers if hasattr(layer, "weight")] for net in (plain, norm)]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_layers_before_batch_norm_have_no_bias(network_name):
    layers = build(network_name, True, np.random.default_rng(0)).layers
    before = [layers[k - 1] for k, layer in enumerate(layers) if isinstance(layer, bn.BatchNorm)]
    assert len(before) == weight_layers(network_name) - 1
    assert all(layer.bias is None for layer in before)


def test_parameters_are_float32_and_stay_so(network_name, normalized, split):
    _, network = train(Run(network_name, normalized, 0.1, 1.0, 8, 3, seed=0), split)
    assert {value.dtype for value, _ in network.parameters()} == {np.dtype(np.float32)}
    assert network(split.test.x).dtype == np.float32


# ---- the runs ----


def test_the_parts_of_a_split_have_no_sample_in_common(digits, split):
    assert [len(part.x) for part in split] == [1024, 256, 517]
    scaled = np.concatenate([part.x.reshape(len(part.x), -1) for part in split])
    assert len(np.unique(scaled, axis=0)) == len(np.unique(digits.x.reshape(len(digits.x), -1), axis=0))
    assert abs(split.training.x.mean()) < 1e-5
    assert split.training.x.std() == pytest.approx(1, abs=1e-5)


def test_a_pass_visits_every_training_sample_once(split):
    marked = split.training._replace(digits=np.arange(1024))
    seen = [batch.digits for batch in batches(Run("MLP", False, 0.1, 1.0, 256, 8, seed=0), marked)]
    np.testing.assert_array_equal(np.sort(np.concatenate(seen[:4])), np.arange(1024))
    assert not np.array_equal(np.concatenate(seen[:4]), np.concatenate(seen[4:]))


def test_the_deep_net_learns_with_batch_norm_alone(split):
    plain, norm = (train(Run("deep net", n, 0.3, 1.0, 64, 160, seed=0), split)[0] for n in (False, True))
    assert (plain.failed_at, norm.failed_at) == (None, None)
    assert plain.test < 0.2
    assert norm.test > 0.8


@pytest.mark.parametrize("network_name", SHALLOW)
def test_a_run_learns(network_name, normalized, split):
    record, _ = train(Run(network_name, normalized, 0.1, 1.0, 64, 60, seed=0), split)
    assert record.failed_at is None
    assert record.test > 0.8
    assert len(record.validation_curve) == len(evaluation_steps(60))


@pytest.mark.parametrize("network_name", SHALLOW)  # sigmoids saturate, and nothing overflows
def test_a_run_that_diverges_is_a_failure_without_a_warning(network_name, split):
    record, _ = train(Run(network_name, False, 1e30, 1.0, 64, 30, seed=0), split)
    assert record.failed_at is not None
    assert [record.training, record.validation, record.test] == [CHANCE] * 3
    assert record.validation_curve[-1] == CHANCE
    assert len(record.validation_curve) == len(evaluation_steps(30))


def test_the_numbers_do_not_depend_on_the_number_of_processes(digits):
    def silent(items, **_):
        return items

    settings = replace(TINY, seeds=1, steps=4)
    one, two = (measure(replace(settings, jobs=jobs), digits, silent) for jobs in (1, 2))

    def numbers(results):
        return {run: replace(record, seconds=0.0) for run, record in results.records.items()}

    assert numbers(one) == numbers(two)
    assert one.inspections == two.inspections
    assert one.best_rates == two.best_rates


# ---- the statistics inside ----


def test_population_moments_are_those_of_one_large_batch(network_name, split):
    x = split.training.x
    _, network = train(Run(network_name, True, 0.1, 1.0, 64, 5, seed=0), split)
    seen = []

    def batch_statistics(position, layer, x):
        y, saved = bn.batch_norm(x, layer.gamma, layer.beta, axis=-1)
        seen.append(saved.moments)
        return y

    forward(network, x, batch_statistics)
    for pooled, whole in zip(population_moments(network, x, part=100), seen, strict=True):
        np.testing.assert_array_equal(pooled.count, whole.count)
        # The second layer sees what the first one rounded to float32.
        np.testing.assert_allclose(pooled.mean, whole.mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(pooled.var(), whole.var(), rtol=1e-5)


def test_population_moments_are_those_a_layer_with_update_rate_none_gathers(split):
    network = build("MLP", True, np.random.default_rng(0))
    first, norm = network.layers[1], bn.BatchNorm(96, axis=-1, update_rate=None, ddof=0)
    # Of the whole, as there: a matrix product of fewer rows may round otherwise.
    for part in np.split(first(split.training.x.reshape(1024, -1)), 8):
        norm(part)
    pooled = population_moments(network, split.training.x, part=128)[0]
    np.testing.assert_allclose(norm.running_mean, pooled.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(norm.running_var, pooled.var(), rtol=1e-12)


def test_the_whole_set_as_one_batch_has_no_noise_and_two_samples_have_most(network_name, split):
    x = split.training.x[:64]
    network = build(network_name, True, np.random.default_rng(0))
    noise = [companion_noise(network, x, size, 4, np.random.default_rng(1)) for size in (2, 16, 64)]
    assert noise[0] > noise[1] > noise[2]
    assert noise[2] < 1e-5


# ---- the criteria ----


def test_fewer_steps_must_be_fewer_in_four_of_five_seeds():
    plain = [50.0] * 5
    assert claims.fewer_steps(plain, [20.0, 20.0, 20.0, 20.0, math.inf]).held
    assert not claims.fewer_steps(plain, [20.0, 20.0, 20.0, 50.0, 50.0]).held


def test_fewer_steps_counts_a_target_never_reached_as_the_most_steps():
    never = [math.inf] * 5
    assert claims.fewer_steps(never, [90.0] * 5).held
    assert not claims.fewer_steps([90.0] * 5, never).held
    assert not claims.fewer_steps(never, never).held


def test_one_seed_is_enough_for_a_verdict():
    assert claims.fewer_steps([50.0], [40.0]) == claims.Verdict(True, "1 of 1 seeds")
    assert claims.fewer_steps([50.0], [60.0]) == claims.Verdict(False, "0 of 1 seeds")


def test_higher_rates_needs_one_rate_where_most_train_and_most_plain_fail():
    rates = [0.1, 1.0, 10.0]
    assert claims.higher_rates(rates, [1, 0.2, 0], [1, 0.8, 0], plain_best=0.1).why == "at rate 1"
    assert not claims.higher_rates(rates, [1, 0.4, 0], [1, 1, 0.6], plain_best=0.1).held


def test_higher_rates_does_not_count_rates_below_the_plain_nets_best():
    assert not claims.higher_rates([0.1, 1.0, 10.0], [0, 1, 0], [1, 1, 0], plain_best=1.0).held


def test_init_scale_must_halve_the_range():
    assert claims.init_scale([0.5] * 5, [0.25] * 5).held
    assert not claims.init_scale([0.5] * 5, [0.3] * 5).held
    assert not claims.init_scale([0.0] * 5, [0.0] * 5).held


def test_init_scale_must_be_smaller_in_most_seeds():
    assert not claims.init_scale([0.5, 0.5, 0.5, 0.1, 0.1], [0.01, 0.01, 0.01, 0.2, 0.2]).held


def test_regularizes_needs_a_smaller_gap_in_most_seeds():
    fit = [1.0] * 5
    assert claims.regularizes([0.03] * 5, [0.02] * 4 + [0.05], fit, fit).held
    assert not claims.regularizes([0.03] * 5, [0.02] * 3 + [0.03] * 2, fit, fit).held


def test_regularizes_compares_no_gap_of_a_net_that_fits_badly():
    good, bad = [0.99] * 5, [0.9] * 5
    assert claims.regularizes([0.03] * 5, [0.0] * 5, good, good).held
    assert not claims.regularizes([0.03] * 5, [0.0] * 5, good, bad).held
    assert not claims.regularizes([0.03] * 5, [0.0] * 5, bad, good).held


def test_batch_noise_must_rise_at_every_smaller_batch():
    flat, falls = [[0.9, 0.9, 0.9]], [[0.8, 0.9, 0.9]]
    assert claims.batch_noise([[3, 2, 1]], flat, falls).held
    assert not claims.batch_noise([[2, 3, 1]], flat, falls).held
    assert not claims.batch_noise([[]], flat, falls).held


def test_batch_noise_must_cost_more_than_the_smaller_batch_costs_a_plain_net():
    noise, flat, falls = [[3, 2, 1]], [[0.9, 0.9, 0.9]], [[0.8, 0.9, 0.9]]
    assert not claims.batch_noise(noise, flat, flat).held
    assert not claims.batch_noise(noise, falls, falls).held
    assert not claims.batch_noise(noise, flat, [[0.89, 0.9, 0.9]]).held


def test_running_statistics_must_give_the_same_digits_and_accuracy():
    assert claims.running_statistics([0.99] * 5, [0.97] * 5, [0.965] * 5).held
    assert not claims.running_statistics([0.98] * 5, [0.97] * 5, [0.97] * 5).held
    assert not claims.running_statistics([0.99] * 5, [0.97] * 5, [0.96] * 5).held


# ---- the command ----


def arguments(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_both_sizes_use_five_seeds_or_more_and_sweep_between_the_same_ends():
    assert QUICK.seeds >= 5
    assert FULL.seeds > QUICK.seeds
    for name in ("rates", "init_scales", "batch_sizes"):
        quick, full = getattr(QUICK, name), getattr(FULL, name)
        assert list(quick) == sorted(quick)
        assert list(full) == sorted(full)
        assert set(quick) < set(full)
        assert (quick[0], quick[-1]) == (full[0], full[-1])


def test_batches_run_from_2_to_256_and_scales_on_both_sides_of_1():
    assert (QUICK.batch_sizes[0], QUICK.batch_sizes[-1]) == (2, 256)
    assert QUICK.init_scales[0] < 1.0 < QUICK.init_scales[-1]


def test_the_demonstration_prints_a_table_and_writes_every_claim(tmp_path, capsys):
    assert demonstrate(TINY, tmp_path / "new" / "folder", plots=True) == 0
    printed = capsys.readouterr()
    written = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert written == [f"{k}_{claim.key}.png" for k, claim in enumerate(claims.CLAIMS, 1)] + ["results.json"]
    for claim in claims.CLAIMS:
        assert claim.title in printed.out
    assert "learning rates: 100%" in printed.err
    assert "learning rates: 100%" not in printed.out

    document = json.loads((tmp_path / "new" / "folder" / "results.json").read_text(encoding="utf-8"))
    judged = [(entry["key"], entry["network"]) for entry in document["claims"]]
    assert judged == [(claim.key, network) for claim in claims.CLAIMS for network in NETWORKS]
    for entry in document["claims"]:
        assert isinstance(entry["held"], bool)
        assert entry["criterion"]
        assert all(len(quantity["normalized"]) == TINY.seeds for quantity in entry["quantities"])
    assert document["settings"] == json.loads(json.dumps(asdict(TINY)))
    assert {"numpy", "python", "scikit-learn"} <= document["versions"].keys()
    assert len(document["runs"]) == len({json.dumps(entry) for entry in document["runs"]})


def test_without_plots_only_the_json_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("batchnorm.demo.experiment.QUICK", replace(TINY, steps=2))
    assert run(arguments("--no-plots", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path))) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("module", "name"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("tqdm", "tqdm")]
)
def test_a_missing_package_is_named_in_one_line_with_its_cure(module, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert run(arguments("--out", str(tmp_path))) == 2
    printed = capsys.readouterr()
    assert printed.err == f"batchnorm demo needs {name}: pip install 'batchnorm[demo]'\n"
    assert printed.out == ""


@pytest.mark.parametrize("words", [("--seeds", "0"), ("--jobs", "none"), ("--quick", "--full")])
def test_arguments_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit) as error:
        arguments(*words)
    assert error.value.code == 2
    assert "error" in capsys.readouterr().err


def test_batch_sizes_print_every_norm_and_write_a_plot(tmp_path, capsys):
    sizes = (64, 256)
    assert compare_batch_sizes(1, tmp_path / "new", 1, plots=True, passes=1, sizes=sizes) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    norms = list(batch_sizes.NORMS)
    assert [words[0] for words in printed] == ["MLP,", *norms, "conv", *norms]
    words = [word for line in printed if line[0] in norms for word in line[1:]]
    assert words.count("-") == len(sizes)  # the MLP has no instance norm
    assert all(0 <= float(word) <= 100 for word in words if word != "-")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["batch_sizes.json", "batch_sizes.png"]
    document = json.loads((tmp_path / "new" / "batch_sizes.json").read_text(encoding="utf-8"))
    runs = {(run["norm"], run["batch"]) for run in document["runs"] if run["network"] == "conv net"}
    assert runs == {(norm, size) for norm in norms for size in sizes}


def test_running_statistics_average_over_as_many_samples_at_every_batch_size():
    settings = batch_sizes.Settings()
    assert settings.update_rate_of(64) == pytest.approx(0.1)
    for size in settings.sizes:
        assert (1 - settings.update_rate_of(size)) ** (64 / size) == pytest.approx(0.9)


def test_ghosts_are_batch_norm_where_a_batch_is_one(digits):
    settings = batch_sizes.Settings(seeds=1, passes=1, sizes=(16,))
    found = batch_sizes.measure(settings, digits, lambda runs, **_: runs)
    for network in SHALLOW:
        ghosts, whole = (found[batch_sizes.Trial(network, norm, 16, 0)] for norm in ("ghost", "batch"))
        assert ghosts == whole
    assert len(set(found.values())) > 2
