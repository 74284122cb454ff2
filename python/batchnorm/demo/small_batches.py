"""Batches of four samples: plain batch norm and Batch Renormalization against batch norm on large batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

import batchnorm as bn
from batchnorm.demo.data import Part, Split, split
from batchnorm.demo.networks import EPS, NETWORKS, Layer, Network, build, cross_entropy
from batchnorm.demo.training import CHANCE, Run, accuracy, batches

PLAIN, RENORM, LARGE = "batch norm, batch {small}", "batch renorm, batch {small}", "batch norm, batch {large}"
VARIANTS = (PLAIN, RENORM, LARGE)


@dataclass(frozen=True)
class Settings:
    """The size of the experiment: all variants see every training sample `passes` times."""

    seeds: int = 5
    passes: int = 10
    small: int = 4
    large: int = 64
    rate: float = 0.3  # at the large batch; times sqrt(small / large) at the small, as in the rest of the demo
    update_rate: float = 0.01  # at the small batch, with and without renorm (the paper's); 0.1 at the large
    samples: int = 1024  # the training part


def schedule_of(steps: int) -> bn.RenormSchedule:
    """Give the paper's schedule with its 80000 steps, about those of its training, shrunk to `steps`."""
    start, r_end, d_end = (max(1, steps * s // 80_000) for s in (5_000, 40_000, 25_000))
    return bn.RenormSchedule(((start, 1.0), (max(r_end, start + 1), 3.0)), ((start, 0.0), (max(d_end, start + 1), 5.0)))


def train_one(settings: Settings, network_name: str, variant: str, seed: int, parts: Split) -> float:
    """Train with plain SGD; give the test accuracy with running statistics, chance where the loss failed."""
    batch = settings.large if variant == LARGE else settings.small
    rate = settings.rate * (batch / settings.large) ** 0.5
    steps = settings.passes * (settings.samples // batch)
    network = build(network_name, True, np.random.default_rng([seed, 1]))
    if variant != LARGE:
        network = Network([_small(layer, variant, steps, settings) for layer in network.layers])
    with np.errstate(all="ignore"):  # a run that diverges is credited with chance
        for x, digits in batches(Run(network_name, True, rate, 1.0, batch, steps, seed), parts.training):
            loss, dlogits = cross_entropy(network(x), digits)
            if not np.isfinite(loss):
                return CHANCE
            network.backward(dlogits)
            for value, gradient in network.parameters():
                value -= rate * gradient
        network.train(False)
        return accuracy(network(parts.test.x), parts.test.digits)


def measure(
    settings: Settings, digits: Part, progress: Callable[[Sequence[Any]], Iterable[Any]]
) -> dict[tuple[str, str], list[float]]:
    """Give the test accuracies of every network and variant, one a seed."""
    from threadpoolctl import threadpool_limits

    runs = [(n, v, s) for s in range(settings.seeds) for n in NETWORKS for v in VARIANTS]
    parts = [split(digits, seed) for seed in range(settings.seeds)]
    found: dict[tuple[str, str], list[float]] = {(n, v): [] for n in NETWORKS for v in VARIANTS}
    with threadpool_limits(1):
        for network, variant, seed in progress(runs):
            found[network, variant].append(train_one(settings, network, variant, seed, parts[seed]))
    return found


def table(settings: Settings, found: dict[tuple[str, str], list[float]]) -> str:
    """Give the accuracies as text, and in how many seeds renorm was closer to the large batch."""
    return "\n".join(_lines(settings, found))


def _lines(settings: Settings, found: dict[tuple[str, str], list[float]]) -> Iterator[str]:
    s = settings
    yield f"Test accuracy after {s.passes} passes: median over {s.seeds} seeds [smallest, largest], in percent."
    yield f"SGD at rate {s.rate:g} for batches of {s.large}, times sqrt(batch / {s.large}) below; update rates 0.1 and"
    yield f"{s.update_rate:g}. The schedule of r and d is the paper's, shrunk to the steps of a run."
    for network in NETWORKS:
        for variant in VARIANTS:
            values = [100 * value for value in found[network, variant]]
            name = variant.format(small=s.small, large=s.large)
            yield f"   {network:9}{name:26}{median(values):5.1f} [{min(values):.1f}, {max(values):.1f}]"
        plain, renorm, large = (found[network, variant] for variant in VARIANTS)
        triples = list(zip(plain, renorm, large, strict=True))
        closer = sum(abs(r - g) < abs(p - g) for p, r, g in triples)
        further = sum(abs(r - g) > abs(p - g) for p, r, g in triples)
        yield f"   {network:9}renorm is closer to the large batch in {closer} seeds, further in {further}, of {s.seeds}"


def _small(layer: Layer, variant: str, steps: int, settings: Settings) -> Layer:
    """Replace a batch norm layer by that of the variant."""
    if not isinstance(layer, bn.BatchNorm):
        return layer
    return bn.BatchNorm(
        layer.channels,
        axis=-1,
        eps=EPS,
        update_rate=settings.update_rate,
        renorm=schedule_of(steps) if variant == RENORM else None,
        num_threads=1,
    )
