"""From the records of the runs to the numbers that each claim is about, and to its verdict per network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchnorm.demo import claims
from batchnorm.demo.claims import Claim, Verdict
from batchnorm.demo.experiment import Results, steps_to_target
from batchnorm.demo.networks import NETWORKS
from batchnorm.demo.training import CHANCE, Record


@dataclass(frozen=True)
class Quantity:
    """One number per seed without and with batch norm, None where there is none.

    ``unit`` is "steps" (inf: never), "rate" (0: none), "ratio", or "share" or "points" (both from 0 to 1).
    """

    name: str
    unit: str
    plain: list[float] | None
    normalized: list[float]


@dataclass(frozen=True)
class Finding:
    """What one claim came to on one network."""

    claim: Claim
    network: str
    quantities: list[Quantity]
    verdict: Verdict


def judge(results: Results) -> list[Finding]:
    """Every claim on every network, in the order of ``claims.CLAIMS``."""
    return [
        Finding(claim, network, *measured(results, network))
        for claim, measured in MEASUREMENTS.items()
        for network in NETWORKS
    ]


Measured = tuple[list[Quantity], Verdict]


def fewer_steps(results: Results, network: str) -> Measured:
    """Claim 1: steps to the target, each net at its own best rate, and for people also both at the same."""

    def steps(normalized: bool, rate: float) -> list[float]:
        runs = results.runs(network, normalized, rate)
        return results.of(runs, lambda record: steps_to_target(record, results.settings.steps))

    plain_rate, own_rate = results.best_rates[network, False], results.best_rates[network, True]
    plain, own, same = steps(False, plain_rate), steps(True, own_rate), steps(True, plain_rate)
    quantities = [
        Quantity(f"steps, best rates {plain_rate:g} and {own_rate:g}", "steps", plain, own),
        Quantity(f"steps, both at rate {plain_rate:g}", "steps", plain, same),
    ]
    return quantities, claims.fewer_steps(plain, own)


def higher_rates(results: Results, network: str) -> Measured:
    """Claim 2: the share of seeds that train at each rate and, for people, the highest rate of each seed."""
    rates = results.settings.rates
    shares: list[list[float]] = []
    highest: list[list[float]] = []
    for normalized in (False, True):
        by_rate = [results.of(results.runs(network, normalized, rate), on_validation) for rate in rates]
        trains = np.array(by_rate) >= claims.TRAINED_ACCURACY  # (rates, seeds)
        shares.append(trains.mean(axis=1).tolist())
        highest.append(np.where(trains, np.reshape(rates, (-1, 1)), 0.0).max(axis=0).tolist())
    quantity = Quantity(f"highest rate that trains ({rates[0]:g} to {rates[-1]:g})", "rate", *highest)
    plain_best = results.best_rates[network, False]
    return [quantity], claims.higher_rates(rates, shares[0], shares[1], plain_best)


def init_scale(results: Results, network: str) -> Measured:
    """Claim 3: per seed, the best minus the worst test accuracy over the scales."""
    ranges = []
    for normalized in (False, True):
        scales = results.settings.init_scales
        by_scale = [results.of(results.rescaled(network, normalized, scale), on_test) for scale in scales]
        ranges.append(np.ptp(by_scale, axis=0).tolist())
    return [Quantity("range of test accuracy (points)", "points", *ranges)], claims.init_scale(*ranges)


def regularizes(results: Results, network: str) -> Measured:
    """Claim 4: the gap at the end of training, and how well each net fits."""
    runs = [results.runs(network, normalized) for normalized in (False, True)]
    gaps = [results.of(one, lambda record: record.training - record.test) for one in runs]
    fits = [results.of(one, lambda record: record.training) for one in runs]
    quantities = [
        Quantity("training minus test accuracy (points)", "points", *gaps),
        Quantity("training accuracy", "share", *fits),
        Quantity("test accuracy", "share", *(results.of(one, on_test) for one in runs)),
    ]
    return quantities, claims.regularizes(*gaps, *fits)


def batch_noise(results: Results, network: str) -> Measured:
    """Claim 5: noise and accuracy for each batch size; people see the smallest, a middle and the largest."""
    sizes = results.settings.batch_sizes
    shown = {0: sizes[0], len(sizes) // 2: sizes[len(sizes) // 2], len(sizes) - 1: sizes[-1]}
    noise = [results.inspections[run].noise for run in results.runs(network, True)]
    accuracies = []
    for normalized in (False, True):
        by_size = [results.of(results.rebatched(network, normalized, size), on_test) for size in sizes]
        accuracies.append(np.transpose(by_size).tolist())  # (seeds, sizes)
    quantities = [
        Quantity(f"noise / signal, batch {size}", "ratio", None, [seed[k] for seed in noise if seed])
        for k, size in shown.items()
    ] + [
        Quantity(f"test accuracy, batch {size}", "share", *([seed[k] for seed in net] for net in accuracies))
        for k, size in shown.items()
    ]
    return quantities, claims.batch_noise(noise, *accuracies)


def running_statistics(results: Results, network: str) -> Measured:
    """Claim 6: what the last look into each net with batch norm saw; a failed run has agreed on nothing."""
    found = [results.inspections[run] for run in results.runs(network, True)]
    same = [one.same_digit[-1] if one.steps else 0.0 for one in found]
    running = [one.running_accuracy[-1] if one.steps else CHANCE for one in found]
    population = [one.population_accuracy[-1] if one.steps else CHANCE for one in found]
    quantities = [
        Quantity("test images with the same digit", "share", None, same),
        Quantity("test accuracy, running statistics", "share", None, running),
        Quantity("test accuracy, whole training set", "share", None, population),
    ]
    return quantities, claims.running_statistics(same, running, population)


def on_validation(record: Record) -> float:
    """Return the validation accuracy at the end of a run."""
    return record.validation


def on_test(record: Record) -> float:
    """Return the test accuracy at the end of a run."""
    return record.test


MEASUREMENTS = {
    claims.FEWER_STEPS: fewer_steps,
    claims.HIGHER_RATES: higher_rates,
    claims.INIT_SCALE: init_scale,
    claims.REGULARIZES: regularizes,
    claims.BATCH_NOISE: batch_noise,
    claims.RUNNING_STATISTICS: running_statistics,
}
