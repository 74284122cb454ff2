"""Test accuracy over the batch size: batch norm, what was made for small batches, and the norms that know no batch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import batchnorm as bn
from batchnorm.demo.data import Part
from batchnorm.demo.networks import EPS, SHALLOW, Layer, Network, build, cross_entropy
from batchnorm.demo.training import CHANCE, Run, accuracy, batches
from batchnorm.demo.workers import Progress, Workers, split_of


@dataclass(frozen=True)
class Settings:
    """The size of the experiment: each run sees every training sample `passes` times, at any batch size."""

    seeds: int = 5
    passes: int = 10
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    rate: float = 0.3  # at 64 and above; times sqrt(batch / 64) below, as in the rest of the demo
    ghost: int = 16
    samples: int = 1024  # the training part

    def rate_of(self, batch: int) -> float:
        """Give the learning rate at a batch size."""
        return self.rate * math.sqrt(min(1.0, batch / 64))

    def update_rate_of(self, batch: int) -> float:
        """Give the share of a batch in the running statistics: 0.1 of 64, so that all sizes average over as many samples."""
        return -math.expm1(math.log(0.9) * batch / 64)

    def steps_of(self, batch: int) -> int:
        """Count the steps of a run."""
        return self.passes * (self.samples // batch)


@dataclass(frozen=True)
class Trial:
    """What decides a run, beside the settings."""

    network: str
    norm: str
    batch: int
    seed: int


def _batch_norm(channels: int, s: Settings, batch: int, **options: Any) -> Layer:
    rate = s.update_rate_of(batch)
    return bn.BatchNorm(channels, axis=-1, eps=EPS, update_rate=rate, num_threads=1, **options)


def schedule_of(steps: int) -> bn.RenormSchedule:
    """Give the schedule of the renorm paper with its 80000 steps, about those of its training, shrunk to `steps`."""
    start, r_end, d_end = (max(1, steps * s // 80_000) for s in (5_000, 40_000, 25_000))
    return bn.RenormSchedule(((start, 1.0), (max(r_end, start + 1), 3.0)), ((start, 0.0), (max(d_end, start + 1), 5.0)))


# What stands in the place of each batch norm, of so many channels.
NORMS: dict[str, Callable[[int, Settings, int], Layer]] = {
    "batch": _batch_norm,
    "ghost": lambda c, s, batch: _batch_norm(c, s, batch, ghost_size=s.ghost),
    "renorm": lambda c, s, batch: _batch_norm(c, s, batch, renorm=schedule_of(s.steps_of(batch))),
    "group": lambda c, s, batch: bn.GroupNorm(4, c, axis=-1, eps=EPS, num_threads=1),
    # Over channels and places, with a scale of each channel, as it is used on images.
    "layer": lambda c, s, batch: bn.GroupNorm(1, c, axis=-1, eps=EPS, num_threads=1),
    "instance": lambda c, s, batch: bn.InstanceNorm(c, axis=-1, eps=EPS, num_threads=1),
}


def train_one(task: tuple[Settings, Trial]) -> float:
    """Train with plain SGD; give the test accuracy in evaluation, chance where the loss failed."""
    settings, trial = task
    parts, batch = split_of(trial.seed), trial.batch
    rate, steps = settings.rate_of(batch), settings.steps_of(batch)
    network = build(trial.network, True, np.random.default_rng([trial.seed, 1]))
    network = Network([_replaced(layer, settings, trial) for layer in network.layers])
    with np.errstate(all="ignore"):  # a run that diverges is credited with chance
        for x, digits in batches(Run(trial.network, True, rate, 1.0, batch, steps, trial.seed), parts.training):
            loss, dlogits = cross_entropy(network(x), digits)
            if not np.isfinite(loss):
                return CHANCE
            network.backward(dlogits)
            for value, gradient in network.parameters():
                value -= rate * gradient
        network.train(False)
        return accuracy(network(parts.test.x), parts.test.digits)


def _replaced(layer: Layer, settings: Settings, trial: Trial) -> Layer:
    if not isinstance(layer, bn.BatchNorm):
        return layer
    return NORMS[trial.norm](layer.channels, settings, trial.batch)


def is_possible(network: str, norm: str, batch: int) -> bool:
    """Tell whether what shares statistics has more than one value: in the MLP a channel of a sample is one."""
    return network == "conv net" or norm in ("group", "layer") or (norm != "instance" and batch > 1)


def measure(settings: Settings, digits: Part, progress: Progress, jobs: int = 1) -> dict[Trial, float]:
    """Give the test accuracy of every network, norm, batch size and seed, where it is possible."""
    places = [(w, n, b) for w in SHALLOW for n in NORMS for b in settings.sizes if is_possible(w, n, b)]
    trials = [Trial(*place, seed) for place in places for seed in range(settings.seeds)]
    with Workers(jobs, digits, progress) as workers:
        tasks = [(settings, trial) for trial in trials]
        found = workers.do_all("batch sizes", train_one, tasks, lambda task: settings.steps_of(task[1].batch))
    return {trial: found[settings, trial] for trial in trials}


def of(found: dict[Trial, float], settings: Settings, network: str, norm: str, batch: int) -> list[float]:
    """List the accuracies at one place, one a seed: none where it is not possible."""
    trials = [Trial(network, norm, batch, seed) for seed in range(settings.seeds)]
    return [found[trial] for trial in trials if trial in found]


def table(settings: Settings, found: dict[Trial, float]) -> str:
    """Give the medians as text: a line for each norm, a column for each batch size."""
    return "\n".join(_lines(settings, found))


def _lines(s: Settings, found: dict[Trial, float]) -> Iterator[str]:
    yield f"Test accuracy after {s.passes} passes over the digits: median over {s.seeds} seeds, in percent."
    yield f"SGD at rate {s.rate:g} for batches of 64 and more, times sqrt(batch / 64) below; ghosts of {s.ghost} samples."
    for network in SHALLOW:
        yield f"{network + ', batch size':>20}" + "".join(f"{size:>7}" for size in s.sizes)
        for norm in NORMS:
            accuracies = (of(found, s, network, norm, size) for size in s.sizes)
            yield f"{norm:>20}" + "".join(f"{100 * median(a):7.1f}" if a else f"{'-':>7}" for a in accuracies)


def write_json(file: Path, settings: Settings, found: dict[Trial, float]) -> None:
    """Write settings and accuracies."""
    runs = [{**asdict(trial), "test": value} for trial, value in found.items()]
    file.write_text(json.dumps({"settings": asdict(settings), "runs": runs}, indent=1) + "\n", encoding="utf-8")
