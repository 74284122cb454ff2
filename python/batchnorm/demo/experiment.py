"""The runs the claims need: a sweep of learning rates, and then all that starts from the best of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

from batchnorm.demo.claims import TARGET_ACCURACY
from batchnorm.demo.data import Part
from batchnorm.demo.inspection import Inspection
from batchnorm.demo.networks import NETWORKS
from batchnorm.demo.training import Record, Run, evaluation_steps
from batchnorm.demo.workers import Progress, Workers, look_inside, train_one

VARIANTS = (False, True)


@dataclass(frozen=True)
class Settings:
    """The size of the experiment. ``jobs`` decides how soon the numbers come, all else the numbers.

    ``QUICK`` and ``FULL`` sweep from the same smallest to the same largest value, so that they answer the
    same questions: a range over the scales, say, grows with the scales that are tried.
    """

    seeds: int
    steps: int
    batch: int
    rates: tuple[float, ...]
    init_scales: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    shuffles: int
    jobs: int = 1


QUICK = Settings(
    seeds=5,
    steps=160,  # ten passes over the training part
    batch=64,
    rates=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    init_scales=(0.1, 0.3, 1.0, 3.0, 10.0),
    batch_sizes=(2, 4, 8, 16, 64, 256),
    shuffles=3,
)
FULL = Settings(
    seeds=10,
    steps=640,
    batch=64,
    rates=(0.03, 0.06, 0.1, 0.2, 0.3, 0.6, 1.0, 2.0, 3.0, 6.0, 10.0),
    init_scales=(0.1, 0.2, 0.3, 0.6, 1.0, 2.0, 3.0, 6.0, 10.0),
    batch_sizes=(2, 4, 8, 16, 32, 64, 128, 256),
    shuffles=8,
)


@dataclass
class Results:
    """Everything measured: a record per run, an inspection per inspected run, and the best learning rates."""

    settings: Settings
    records: dict[Run, Record] = field(default_factory=dict)
    inspections: dict[Run, Inspection] = field(default_factory=dict)
    best_rates: dict[tuple[str, bool], float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def runs(self, network: str, normalized: bool, rate: float | None = None) -> list[Run]:
        """List one run per seed at the default scale and batch size; at the best rate where none is given."""
        s = self.settings
        if rate is None:
            rate = self.best_rates[network, normalized]
        return [Run(network, normalized, rate, 1.0, s.batch, s.steps, seed) for seed in range(s.seeds)]

    def rescaled(self, network: str, normalized: bool, init_scale: float) -> list[Run]:
        """List one run per seed at the best rate, with initial weights of another scale."""
        return [replace(run, init_scale=init_scale) for run in self.runs(network, normalized)]

    def rebatched(self, network: str, normalized: bool, batch: int) -> list[Run]:
        """List one run per seed with another batch size and as many steps: smaller batches see fewer samples.

        With and without batch norm the rate is the same, so that only batch norm makes a difference: the
        lower of the two best ones at the default size, and for smaller batches times
        sqrt(batch / default size), which keeps the variance of an update (Krizhevsky 2014, arXiv:1404.5997).
        """
        rate = min(self.best_rates[network, False], self.best_rates[network, True])
        rate *= math.sqrt(min(1.0, batch / self.settings.batch))
        return [replace(run, batch=batch) for run in self.runs(network, normalized, rate)]

    def of(self, runs: Iterable[Run], quantity: Callable[[Record], float]) -> list[float]:
        """List a quantity of the records of these runs."""
        return [quantity(self.records[run]) for run in runs]


def steps_to_target(record: Record, steps: int) -> float:
    """Return the first evaluated step with the target validation accuracy, inf if there is none."""
    reached = zip(evaluation_steps(steps), record.validation_curve, strict=True)
    return next((float(step) for step, accuracy in reached if accuracy >= TARGET_ACCURACY), math.inf)


def choose_rate(results: Results, network: str, normalized: bool) -> float:
    """Return the rate of the sweep with the fewest steps to the target (median over the seeds).

    Of equal ones, and where no rate reaches the target, the one with the best validation accuracy at the end;
    then the lowest. The rule is the same with and without batch norm, and the test part plays no role.
    """

    def merit(rate: float) -> tuple[float, float, float]:
        runs = results.runs(network, normalized, rate)
        steps = median(results.of(runs, lambda record: steps_to_target(record, results.settings.steps)))
        return steps, -median(results.of(runs, lambda record: record.validation)), rate

    return min(results.settings.rates, key=merit)


def measure(settings: Settings, digits: Part, progress: Progress) -> Results:
    """Do every run of the experiment."""
    results = Results(settings)
    pairs = [(network, normalized) for network in NETWORKS for normalized in VARIANTS]
    with Workers(settings.jobs, digits, progress) as workers:
        sweep = [run for pair in pairs for rate in settings.rates for run in results.runs(*pair, rate)]
        results.records |= workers.do("learning rates", train_one, sweep)
        results.best_rates = {pair: choose_rate(results, *pair) for pair in pairs}

        sweep = [run for pair in pairs for s in settings.init_scales for run in results.rescaled(*pair, s)]
        sweep += [run for pair in pairs for b in settings.batch_sizes for run in results.rebatched(*pair, b)]
        new = [run for run in dict.fromkeys(sweep) if run not in results.records]
        results.records |= workers.do("initial scales, batch sizes", train_one, new)

        inspect_one = partial(look_inside, batch_sizes=settings.batch_sizes, shuffles=settings.shuffles)
        normalized = [run for network in NETWORKS for run in results.runs(network, True)]
        results.inspections |= workers.do("statistics inside", inspect_one, normalized)
    results.seconds = workers.seconds
    return results
