"""One training run: stochastic gradient descent on one network from one seed, and what it reached."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.demo.data import Part, Split
from batchnorm.demo.networks import Network, build, cross_entropy

# What a run that failed is credited with: the accuracy of guessing one of ten digits.
CHANCE = 0.1


@dataclass(frozen=True)
class Run:
    """Everything that decides a training run. Equal runs give equal records.

    Runs of one seed share the split of the data and the order of the samples. Those of one network also share
    the initial weights, so plain and normalized networks are compared pair by pair.
    """

    network: str
    normalized: bool
    rate: float
    init_scale: float
    batch: int
    steps: int
    seed: int


@dataclass(frozen=True)
class Record:
    """What a run reached. Accuracies are shares of samples, from inference with running statistics.

    ``validation_curve`` stands at the steps of :func:`evaluation_steps`. ``failed_at`` is the step at which
    the loss was no longer a finite number, None if that never happened; from there on every accuracy is
    chance.
    """

    validation_curve: list[float]
    training: float
    validation: float
    test: float
    failed_at: int | None
    seconds: float


def evaluation_steps(steps: int) -> list[int]:
    """Return the steps after which a run is evaluated, about 20% apart: early and late, differences show."""
    ratio = 1.2
    grid = ratio ** np.arange(int(np.log(steps) / np.log(ratio)) + 1)
    return sorted({*np.rint(grid).astype(int).tolist(), steps})


def accuracy(logits: NDArray[Any], digits: NDArray[Any]) -> float:
    """Return the share of samples whose largest logit is that of their digit."""
    return float((logits.argmax(axis=1) == digits).mean())


def train(run: Run, split: Split, observe: Callable[[int, Network], None] | None = None) -> tuple[Record, Network]:
    """Train one network with plain SGD: parameter -= rate * gradient, no momentum, no decay, float32.

    ``observe(step, network)`` is called at each evaluation, in inference mode. A run stops when its loss is
    not finite; overflow on the way there is expected and silent.
    """
    started = time.perf_counter()
    network = build(run.network, run.normalized, np.random.default_rng([run.seed, 1]), init_scale=run.init_scale)
    evaluated = set(evaluation_steps(run.steps))
    curve: list[float] = []
    failed_at = None
    with np.errstate(all="ignore"):
        for step, (x, digits) in enumerate(batches(run, split.training), start=1):
            network.train()
            loss, dlogits = cross_entropy(network(x), digits)
            if not math.isfinite(loss):
                failed_at = step
                break
            network.backward(dlogits)
            for value, gradient in network.parameters():
                value -= run.rate * gradient
            if step in evaluated:
                network.train(False)
                curve.append(accuracy(network(split.validation.x), split.validation.digits))
                if observe is not None:
                    observe(step, network)
        curve += [CHANCE] * (len(evaluated) - len(curve))
        network.train(False)
        training, validation, test = (CHANCE if failed_at else accuracy(network(part.x), part.digits) for part in split)
    seconds = time.perf_counter() - started
    return Record(curve, training, validation, test, failed_at, seconds), network


def batches(run: Run, training: Part) -> Iterator[Part]:
    """Give ``run.steps`` batches; each pass over the training part is a fresh shuffle of it."""
    rng = np.random.default_rng([run.seed, 2])
    per_pass = len(training.x) // run.batch
    for step in range(run.steps):
        if step % per_pass == 0:
            order = rng.permutation(len(training.x))
        chosen = order[step % per_pass * run.batch :][: run.batch]
        yield Part(training.x[chosen], training.digits[chosen])
