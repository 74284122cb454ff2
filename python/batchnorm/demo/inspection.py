"""The statistics inside one trained network: how noisy those of a batch are, how true the running ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

import batchnorm as bn
from batchnorm.demo.data import Split
from batchnorm.demo.networks import CLASSES, EPS, Array, Network
from batchnorm.demo.training import Run, accuracy, evaluation_steps, train

# Population statistics cost a pass over the training part, so not every evaluation has them.
LOOK_AT_EVERY = 3


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found in the network of one run.

    The first four lists belong together. After each of ``steps``, on the test part: the share of images that
    running and population statistics give the same digit, and the accuracy with each. ``noise`` is
    :func:`companion_noise` of the trained network for each batch size asked for. Of a run that failed there
    is nothing to see: all lists are empty.
    """

    steps: list[int]
    same_digit: list[float]
    running_accuracy: list[float]
    population_accuracy: list[float]
    noise: list[float]


def inspect(run: Run, split: Split, batch_sizes: Sequence[int], shuffles: int) -> Inspection:
    """Train once more, looking at the statistics now and then and, at the end, at their noise."""
    look_after = evaluation_steps(run.steps)[::-LOOK_AT_EVERY][::-1]
    found = Inspection([], [], [], [], [])
    x, digits = split.test

    def compare(step: int, network: Network) -> None:
        if step not in look_after:
            return
        running = network(x)
        population = with_moments(network, x, population_moments(network, split.training.x))
        found.steps.append(step)
        found.same_digit.append(accuracy(running, population.argmax(axis=1)))
        found.running_accuracy.append(accuracy(running, digits))
        found.population_accuracy.append(accuracy(population, digits))

    record, network = train(run, split, compare)
    if record.failed_at is not None:
        return Inspection([], [], [], [], [])
    rng = np.random.default_rng([run.seed, 3])
    for size in batch_sizes:
        found.noise.append(companion_noise(network, split.training.x, size, shuffles, rng))
    return found


def forward(network: Network, x: Array, normalize: Callable[[int, bn.BatchNorm, Array], Array]) -> Array:
    """Return the network's output with ``normalize(k, layer, x)`` as its batch norm layer k, k from 0."""
    position = 0
    for layer in network.layers:
        if isinstance(layer, bn.BatchNorm):
            x = normalize(position, layer, x)
            position += 1
        else:
            x = layer(x)
    return x


def population_moments(network: Network, x: Array, part: int = 128) -> list[bn.Moments]:
    """Return the moments of the whole of x at every batch norm layer.

    Each layer merges the moments of parts of ``part`` samples, which gives those of the whole, and normalizes
    with them before the next layer is reached. The running statistics of the network play no role.
    """
    found: list[bn.Moments] = []

    def pool_then_normalize(_position: int, layer: bn.BatchNorm, x: Array) -> Array:
        starts = range(0, len(x), part)
        parts = (bn.moments(x[start : start + part], axis=-1, num_threads=1) for start in starts)
        found.append(bn.merge(*parts))
        return _normalize(x, found[-1], layer)

    forward(network, x, pool_then_normalize)
    return found


def with_moments(network: Network, x: Array, moments: Sequence[bn.Moments]) -> Array:
    """Return the logits for x with the given statistics, one for each batch norm layer, biased variances."""
    return forward(network, x, lambda position, layer, x: _normalize(x, moments[position], layer))


def _normalize(x: Array, moments: bn.Moments, layer: bn.BatchNorm) -> Array:
    mean, var = moments.mean, moments.var()
    return bn.normalize(x, mean, var, layer.gamma, layer.beta, axis=-1, eps=EPS, num_threads=1)


def companion_noise(network: Network, x: Array, batch: int, shuffles: int, rng: np.random.Generator) -> float:
    """Measure how much the output for a sample depends on the other samples of its batch.

    x is shuffled ``shuffles`` times and passed in batches with their own statistics, as in training, so that
    every sample is seen with that many random sets of companions. A logit then varies between the shuffles of
    one sample (noise, var divides by shuffles - 1) and between the samples (signal, what remains of the
    variance of its means over the shuffles without the noise still in them). Returns, with means over samples
    and classes,

        sqrt(noise variance / signal variance)

    0 means that companions do not matter; at 1 they matter as much as the sample itself.
    """

    def batch_statistics(_position: int, layer: bn.BatchNorm, x: Array) -> Array:
        y, _saved = bn.batch_norm(x, layer.gamma, layer.beta, axis=-1, eps=EPS, num_threads=1)
        return y

    logits = np.empty((shuffles, len(x), CLASSES))
    for shuffled in logits:
        for chosen in np.split(rng.permutation(len(x)), len(x) // batch):
            shuffled[chosen] = forward(network, x[chosen], batch_statistics)
    noise = logits.var(axis=0, ddof=1).mean()
    signal = logits.mean(axis=0).var(axis=0).mean() - noise / shuffles
    return math.sqrt(noise / signal) if signal > 0 else math.inf
