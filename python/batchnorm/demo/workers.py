"""Independent runs, done one after another here or side by side in other processes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from typing import Any, Self, TypeVar

from threadpoolctl import threadpool_limits

from batchnorm.demo.data import Part, Split, split
from batchnorm.demo.inspection import Inspection, inspect
from batchnorm.demo.training import Record, Run, train

T = TypeVar("T", bound=Hashable)

# Shows how far an iterable of known length is and gives back its items: tqdm(iterable, total=..., desc=...).
Progress = Callable[..., Iterable[Any]]

# The images of this process, put there once by `_receive` instead of travelling with every run.
_digits: Part


class Workers:
    """``jobs`` processes, or this one alone where jobs is 1.

    Every process uses one BLAS thread: the matrices are too small for more, and the numbers then do not
    depend on ``jobs``. ``seconds`` tells how long each call of :meth:`do` took.
    """

    def __init__(self, jobs: int, digits: Part, progress: Progress) -> None:
        self.jobs, self.digits, self.progress = jobs, digits, progress
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Self:
        self.cleanup = ExitStack()
        if self.jobs == 1:
            _receive(self.digits)
            self.cleanup.enter_context(threadpool_limits(1))
            self.map: Callable[..., Iterable[Any]] = map
        else:
            # Spawned, not forked: a fork of a process that has used threads may hang in BLAS or OpenMP.
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(self.jobs, spawn, initializer=_start, initargs=(self.digits,))
            self.cleanup.callback(pool.shutdown, cancel_futures=True)
            self.map = pool.map
        return self

    def __exit__(self, *_exception: object) -> None:
        self.cleanup.close()

    def do(self, name: str, work: Callable[[Run], Any], runs: Sequence[Run]) -> dict[Run, Any]:
        """Return ``work`` of every run."""
        return self.do_all(name, work, runs, lambda run: run.batch * run.steps)

    def do_all(
        self, name: str, work: Callable[[T], Any], runs: Sequence[T], cost: Callable[[T], float]
    ) -> dict[T, Any]:
        """Return ``work`` of all. Those of the highest cost come first: no process ends long after the others."""
        started = time.perf_counter()
        runs = sorted(runs, key=cost, reverse=True)
        done = dict(zip(runs, self.progress(self.map(work, runs), total=len(runs), desc=name), strict=True))
        self.seconds[name] = time.perf_counter() - started
        return done


def train_one(run: Run) -> Record:
    """Train on this process's images."""
    return train(run, split_of(run.seed))[0]


def look_inside(run: Run, batch_sizes: Sequence[int], shuffles: int) -> Inspection:
    """Inspect on this process's images."""
    return inspect(run, split_of(run.seed), batch_sizes, shuffles)


def _start(digits: Part) -> None:
    threadpool_limits(1)
    _receive(digits)


def _receive(digits: Part) -> None:
    global _digits
    _digits = digits
    split_of.cache_clear()


@cache
def split_of(seed: int) -> Split:
    """Give this process's images, in the parts of a seed."""
    return split(_digits, seed)
