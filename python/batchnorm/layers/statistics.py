"""Running statistics: what a layer learns of each batch, by the rate or the pooling that it follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from batchnorm._validate import WeightsAre
from batchnorm.functional import pool_into, update_into, update_running
from batchnorm.ghost import GhostSaved, ghost_update_running
from batchnorm.layers import entries
from batchnorm.layers.layer import AnySaved
from batchnorm.layers.settings import BatchNormSettings
from batchnorm.moments import Moments, merge
from batchnorm.renorm import RenormSaved, renorm_update_running
from batchnorm.state_file import Entry

MOST_UPDATES = 2**63 - 1  # that a state file can hold

# A low part is at most 2^-53 of its high part; the rest is room for other ways to normalize a pair.
_LOW_PART = 2.0**-48
# Derived statistics are one division of stored values: this forgives its rounding and no real difference.
_DERIVED_RTOL = 1e-12


@dataclass(slots=True, eq=False)
class Statistics:
    """What training has learned of the data. Never changed, only replaced: one that is held is a snapshot."""

    mean: NDArray[np.float64]  # (C,)
    var: NDArray[np.float64]  # (C,); biased or unbiased as the layer's ddof says
    update_count: int
    pooled: Moments | None  # everything seen, where update_rate is None
    ghost_count: int = 0  # updates that the t of debiasing counts, where one call makes several

    @classmethod
    def initial(cls, settings: BatchNormSettings) -> Self:
        """Give those of no batch."""
        zeros, ones = np.zeros(settings.channels), np.ones(settings.channels)
        return cls(zeros, ones, 0, Moments.empty(settings.channels) if settings.update_rate is None else None)

    # ---- as a state ----

    @staticmethod
    def state_entries(settings: BatchNormSettings) -> dict[str, Entry]:
        """Tell what `arrays` gives."""
        per_channel, count = Entry((settings.channels,), np.dtype(np.float64)), Entry((), entries.COUNT)
        names = {"running_mean": per_channel, "running_var": per_channel, "update_count": count}
        if settings.update_rate is None:
            names["running_moments"] = Entry((settings.channels, 5), np.dtype(np.float64))
            if settings.weights_are == "importance":
                names["running_importance_dof"] = per_channel
        if settings.counts_ghosts:
            names["ghost_count"] = count
        return names

    def arrays(self, settings: BatchNormSettings) -> dict[str, NDArray[Any]]:
        """Give what a layer of these settings needs to go on, in fresh arrays."""
        state: dict[str, NDArray[Any]] = {
            "running_mean": self.mean.copy(),
            "running_var": self.var.copy(),
            "update_count": np.array(self.update_count, np.int64),
        }
        if self.pooled is not None:
            state["running_moments"] = np.array(self.pooled._table)
            if settings.weights_are == "importance":
                state["running_importance_dof"] = np.array(self.pooled.importance_dof)
        if settings.counts_ghosts:
            state["ghost_count"] = np.array(self.ghost_count, np.int64)
        return state

    @classmethod
    def of_arrays(cls, state: Mapping[str, NDArray[Any]], settings: BatchNormSettings, strict: bool) -> Self:
        """Give the statistics of such arrays, after refusing values that no training can have left."""
        for name, values in state.items():
            if values.dtype != entries.COUNT:
                entries.finite(name, values)
        mean, var = state["running_mean"], state["running_var"]
        entries.all_channels("running_var", var >= 0, "be >= 0", var)
        count = int(state["update_count"])
        if settings.update_rate is not None:
            return cls(mean, var, count, None, int(state.get("ghost_count", 0)))
        table = state["running_moments"]
        _check_table(table, count)
        pooled = Moments._from_table(table)
        dof = state.get("running_importance_dof")
        if dof is not None:
            within = (dof >= 0) & (dof <= pooled.count)
            entries.all_channels(
                "running_importance_dof", within, "be from 0 to the count of running_moments", dof
            )
            if (dof != pooled.importance_dof).any():
                pooled = Moments._from_table(table, dof)
        now = _pooled_statistics(pooled, count, settings.ddof, settings.weights_are)
        _check_derived("running_mean", mean, now.mean)
        if strict:  # else running_var may be of another ddof
            _check_derived("running_var", var, now.var)
        return cls(now.mean, now.var, count, pooled)


def _check_table(table: NDArray[np.float64], update_count: int) -> None:
    """Refuse moments that `update_count` batches cannot have left; count, mean, mean_lo, m2, m2_lo."""
    count, mean, mean_lo, m2, m2_lo = table.T
    if update_count == 0:
        entries.all_channels("running_moments", table == 0, "be 0 where update_count is 0", table)
    else:
        needed = "have counts > 0 where update_count is not 0"
        entries.all_channels("running_moments", count > 0, needed, count)
    entries.all_channels("running_moments", m2 >= 0, "have m2 >= 0", m2)
    for high, low in ((mean, mean_lo), (m2, m2_lo)):
        good = np.abs(low) <= _LOW_PART * np.abs(high)
        entries.all_channels("running_moments", good, "have low parts below 2**-48 of the high", low)


def _check_derived(name: str, given: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    """Refuse a running statistic that says something else than the pooled moments stored beside it."""
    with np.errstate(over="ignore"):  # of a difference that is far too large anyway
        agrees = np.isclose(given, expected, rtol=_DERIVED_RTOL, atol=0)
    entries.all_channels(name, agrees, "be what running_moments and the layer's ddof give", given)


def debiased_rate(rate: float, count: int) -> float:
    """Share of the batch that is the `count`-th: what it weighs of all that have been seen."""
    return rate if rate == 1 else rate / -math.expm1(count * math.log1p(-rate))


def first_nonfinite(now: Statistics, parts: Sequence[Moments]) -> int:
    """Give the first channel that keeps statistics from learning `parts` one after another; -1 where none does.

    Each part that an average takes in must be finite; where all are pooled, the union with all that has been seen,
    which may be beyond float64 though no part is.
    """
    learned = parts if now.pooled is None else [merge(now.pooled, *parts)]
    return next((channel for part in learned if (channel := part._first_nonfinite()) >= 0), -1)


def learn_into(
    now: Statistics,
    parts: Sequence[Moments],
    rate: float | None,
    ddof: int,
    room: tuple[NDArray[np.float64], ...],
    finite: bool,
) -> bool:
    """Write the statistics after one more batch, its ghosts one after the other, to `room`; tell whether that was done.

    `room` is for mean and variance, and begins with a table for the moments where all are pooled. Not done where there
    is no rate, nothing counts, weights want to be told what they are, or what is learned must be finite and is not. Asks
    for no memory.
    """
    k = 0
    if len(room) == 3:
        assert now.pooled is not None
        table = now.pooled._table
        while k < len(parts) and pool_into(table, parts[k]._table, ddof, room, finite):
            table, k = room[0], k + 1
    elif rate is not None:
        mean, var = now.mean, now.var
        while k < len(parts) and parts[k]._dof is None:
            if not update_into(mean, var, parts[k]._table, rate, ddof, room, finite):
                break
            (mean, var), k = room, k + 1
    return 0 < k == len(parts)


def updated_statistics(
    statistics: Statistics,
    batch: Moments,
    update_rate: float | None,
    ddof: int,
    saved: AnySaved | None = None,
    debias: bool = False,
    counts_ghosts: bool = False,
    weights_are: WeightsAre | None = None,
) -> Statistics:
    """Return the statistics after one more batch, that of `saved`. Changes none of its arguments."""
    count = min(statistics.update_count + 1, MOST_UPDATES)
    if statistics.pooled is not None:
        if weights_are != "importance" and batch._dof is not None:
            batch = Moments._from_core(batch._table)  # nothing asks for it, and a state has no place for it
        return _pooled_statistics(statistics.pooled | batch, count, ddof, weights_are)
    assert update_rate is not None
    mean, var, ghosts = statistics.mean, statistics.var, statistics.ghost_count
    if debias and update_rate > 0:
        if isinstance(saved, GhostSaved):
            for ghost in saved.moments:
                ghosts = min(ghosts + 1, MOST_UPDATES)
                rate = debiased_rate(update_rate, ghosts)
                mean, var = update_running(mean, var, ghost, update_rate=rate, ddof=ddof)
            return Statistics(mean, var, count, None, ghosts)
        if counts_ghosts:  # a whole batch, in evaluation, is one update among those of ghosts
            ghosts = min(ghosts + 1, MOST_UPDATES)
        update_rate = debiased_rate(update_rate, ghosts if counts_ghosts else count)
    if isinstance(saved, RenormSaved):
        mean, var = renorm_update_running(mean, var, saved, update_rate=update_rate)
    elif isinstance(saved, GhostSaved):
        mean, var = ghost_update_running(mean, var, saved.moments, update_rate=update_rate, ddof=ddof)
    elif batch._dof is None:
        mean, var = update_running(mean, var, batch, update_rate=update_rate, ddof=ddof)
    else:
        mean, var = update_running(
            mean, var, batch, update_rate=update_rate, ddof=ddof, weights_are=weights_are
        )
    return Statistics(mean, var, count, None, ghosts)


def _pooled_statistics(
    pooled: Moments, update_count: int, ddof: int, weights_are: WeightsAre | None = None
) -> Statistics:
    if update_count == 0:
        return Statistics(np.zeros(pooled.channels), np.ones(pooled.channels), 0, pooled)
    var = pooled.var(ddof, weights_are=weights_are)
    if (pooled.count < 2).any():
        # One value has no variance, whatever ddof is: it stays as it began. So it does for counts of less than 2.
        none = pooled.count < 2 if ddof else (pooled.count <= 1) & (pooled.m2 == 0)
        var = np.where(none if pooled._dof is None else pooled._dof == 0, 1.0, var)
    return Statistics(pooled.mean.copy(), var, update_count, pooled)
