"""Running statistics: what a layer learns of each batch, by the rate or the pooling that it follows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from batchnorm import _validate, _where
from batchnorm._arrays import Array, PerChannel
from batchnorm._parts import Part
from batchnorm._validate import WeightsAre
from batchnorm.layers import entries
from batchnorm.layers.settings import BatchSettings, LearningSettings
from batchnorm.moments import Moments, merge, of_device_table, table_of
from batchnorm.running import pool_into, update_into, update_running
from batchnorm.saved import Saved

MOST_UPDATES = 2**63 - 1  # that a state file can hold

# A low part is at most 2^-53 of its high part; the rest is room for other ways to normalize a pair.
_LOW_PART = 2.0**-48
# Derived statistics are one division of stored values: this forgives its rounding and no real difference.
_DERIVED_RTOL = 1e-12


@dataclass(slots=True, eq=False)
class Statistics:
    """What training has learned of the data. Never changed, only replaced: one that is held is a snapshot."""

    mean: PerChannel  # (C,)
    var: PerChannel  # (C,); biased or unbiased as the layer's ddof says
    update_count: int
    pooled: Moments | None  # everything seen, where update_rate is None
    set_count: int = 0  # batches, ghosts and segments that updated: the t of debiasing

    @classmethod
    def initial(cls, settings: LearningSettings) -> Self:
        """Give those of no batch."""
        zeros, ones = np.zeros(settings.channels), np.ones(settings.channels)
        return cls(zeros, ones, 0, Moments.empty(settings.channels) if settings.update_rate is None else None)

    # ---- as a state ----

    def arrays(self, settings: LearningSettings) -> dict[str, Array]:
        """Give what a layer of these settings needs to go on, in fresh arrays."""
        state: dict[str, Array] = {
            "running_mean": self.mean.copy(),
            "running_var": self.var.copy(),
            "update_count": np.array(self.update_count, np.int64),
        }
        if self.pooled is not None:
            state["running_moments"] = np.array(self.pooled._table)
            if settings.weights_are == "importance":
                state["running_importance_dof"] = np.array(self.pooled.importance_dof)
        if settings.debias:
            state["set_count"] = np.array(self.set_count, np.int64)
        return state

    @classmethod
    def of_arrays(cls, state: Mapping[str, Array], settings: LearningSettings, strict: bool) -> Self:
        """Give the statistics of such arrays, after refusing values that no training can have left."""
        for name, values in state.items():
            if values.dtype != entries.COUNT:
                _validate.each_channel(name, values, np.isfinite(values), "be finite")
        mean, var = state["running_mean"], state["running_var"]
        _validate.each_channel("running_var", var, var >= 0, "be >= 0")
        count = int(state["update_count"])
        if settings.update_rate is not None:
            return cls(mean, var, count, None, int(state.get("set_count", 0)))
        table = state["running_moments"]
        _check_table(table, count)
        pooled = Moments._from_table(table)
        dof = state.get("running_importance_dof")
        if dof is not None:
            within = (dof >= 0) & (dof <= pooled.count)
            _validate.each_channel("running_importance_dof", dof, within, "be from 0 to the count of running_moments")
            if (dof != pooled.importance_dof).any():
                pooled = Moments._from_table(table, dof)
        now = _pooled_statistics(pooled, count, settings.ddof, settings.weights_are)
        _check_derived("running_mean", mean, now.mean)
        if strict:  # else running_var may be of another ddof
            _check_derived("running_var", var, now.var)
        return cls(now.mean, now.var, count, pooled)


def _check_table(table: PerChannel, update_count: int) -> None:
    """Refuse moments that `update_count` batches cannot have left; count, mean, mean_lo, m2, m2_lo."""
    if update_count == 0:
        _validate.each_channel("running_moments", table, table == 0, "be 0 where update_count is 0")
    else:
        needed = "have counts > 0 where update_count is not 0"
        _validate.each_channel("running_moments", table[:, 0], table[:, 0] > 0, needed)
    check_parts("running_moments", table)


def check_parts(name: str, table: PerChannel) -> None:
    """Refuse a table of moments in whose rows are what no moments are: m2 below 0, low parts that are not low."""
    _, mean, mean_lo, m2, m2_lo = table.T
    _validate.each_channel(name, m2, m2 >= 0, "have m2 >= 0")
    for high, low in ((mean, mean_lo), (m2, m2_lo)):
        good = np.abs(low) <= _LOW_PART * np.abs(high)
        _validate.each_channel(name, low, good, "have low parts below 2**-48 of the high")


def _check_derived(name: str, given: PerChannel, expected: PerChannel) -> None:
    """Refuse a running statistic that says something else than the pooled moments stored beside it."""
    with np.errstate(over="ignore"):  # of a difference that is far too large anyway
        agrees = np.isclose(given, expected, rtol=_DERIVED_RTOL, atol=0)
    _validate.each_channel(name, given, agrees, "be what running_moments and the layer's ddof give")


# Statistics made before what they learn of is known, so that filling them asks for no memory: these, of which mean, var
# and the table of `pooled` are still to be filled; each set that will be known and its rate; and where the core writes.
# A class of its own takes as long to make as the statistics.
Following = tuple[Statistics, Sequence[tuple[PerChannel, float | None]], Any]


def following(now: Statistics, seen: Moments, settings: BatchSettings, room: Any) -> Following | None:
    """Give those after `now` and moments that are still to be known; None where more is to be done than the core does.

    `room` is anything, and arrays for mean and var.
    """
    count, table, channels = now.update_count, table_of(seen, now.mean), settings.channels
    _, mean, var = room
    if count < MOST_UPDATES:
        count += 1
    if seen._dof is not None or settings.renorm is not None:
        return None
    if settings.follows_plainly and len(table) == channels:
        return Statistics(mean, var, count, None), ((table, settings.update_rate),), room
    tables = [table]
    if channels:
        tables = [_where.rows(table, at, at + channels) for at in range(0, len(table), channels)]
    rate = settings.update_rate
    if rate is None:
        if settings.weights_are == "importance" or now.pooled is None or now.pooled._dof is not None:
            return None
        pooled = _where.empty(mean, (channels, 5))
        of_table = Moments._from_table if isinstance(pooled, np.ndarray) else of_device_table
        new = Statistics(mean, var, count, of_table(pooled))
        return new, [(one, None) for one in tables], (pooled, mean, var)
    counts = [min(now.set_count + 1 + t, MOST_UPDATES) for t in range(len(tables))] if settings.debias else []
    rates = [debiased_rate(rate, t) for t in counts] or [rate] * len(tables)
    new = Statistics(mean, var, count, None, counts[-1] if counts else 0)
    return new, list(zip(tables, rates, strict=True)), room


def fill(now: Statistics, after: Following, settings: BatchSettings) -> bool:
    """Fill the statistics after `now`; false where there is nothing to learn, or nothing that may be."""
    new, sets, into = after
    if _where.on_device(now.mean):
        return _fill_on_device(now, after, settings)
    finite, ddof, t = settings.nonfinite != "propagate", settings.ddof, 0
    while t < len(sets):  # without the iterator of a for
        table, rate = sets[t]
        if rate is not None:
            learned: Any = update_into(now.mean, now.var, table, rate, ddof, into, finite)
        else:
            assert now.pooled is not None
            learned = pool_into(now.pooled._table, table, ddof, into, finite)
        if not learned:
            return False
        now, t = new, t + 1
    return True


def _fill_on_device(now: Statistics, after: Following, settings: BatchSettings) -> bool:
    """Queue what `fill` does. What is not finite, or leaves no variance, is then not learned, without a word.

    Where it is to raise, each batch is looked at, which waits for it.
    """
    new, sets, into = after
    finite, of = settings.nonfinite != "propagate", _where.passes(now.mean)
    for table, rate in sets:
        if settings.nonfinite == "raise" and of_device_table(table)._first_nonfinite() >= 0:
            return False
        if rate is not None:
            of.update_running(now.mean, now.var, table, rate, settings.ddof, finite, *into[-2:], 0)
        else:
            assert now.pooled is not None
            of.pool(table_of(now.pooled, now.mean), table, settings.ddof, finite, *into, 0)
        now = new
    return True


def debiased_rate(rate: float, count: int) -> float:
    """Share of the batch that is the `count`-th: what it weighs of all that have been seen."""
    return rate if rate in (0, 1) else rate / -math.expm1(count * math.log1p(-rate))


def merged(seen: Moments, channels: int) -> Moments:
    """Give the moments of all segments or ghosts in one."""
    return seen if seen.channels == channels else merge(Moments.empty(channels), *seen.split(channels))


def first_nonfinite(now: Statistics, batch: Saved | Moments, settings: BatchSettings) -> int:
    """Give the first channel that keeps statistics from learning of a batch; -1 where none does.

    Each set that an average takes in must be finite; where all are pooled, the union with all that has been seen,
    which may be beyond float64 though no set is.
    """
    seen = _moments_of(batch)
    if now.pooled is not None:
        seen = now.pooled | merged(seen, settings.channels)
    at = seen._first_nonfinite()
    return at % settings.channels if at >= 0 else at


def updated(now: Statistics, batch: Saved | Moments, settings: BatchSettings) -> Statistics:
    """Return the statistics after one more batch. Changes none of its arguments."""
    count, are, seen = min(now.update_count + 1, MOST_UPDATES), settings.weights_are, _moments_of(batch)
    if now.pooled is not None:
        seen = merged(seen, settings.channels)
        if are is None and settings.ddof > 0 and seen._dof is not None:
            raise _validate.weights_unsaid("a layer with ddof=1")
        if are != "importance" and seen._dof is not None:
            seen = Moments._from_core(seen._table)  # nothing asks for it, and a state has no place for it
        return _pooled_statistics(now.pooled | seen, count, settings.ddof, are)
    rate = settings.update_rate
    assert rate is not None
    mean, var, sets = now.mean, now.var, now.set_count
    by: dict[str, Any] = {"weights_are": are, "ddof": settings.ddof}
    if isinstance(batch, Saved) and batch.renorm is not None:
        by["ddof"] = None
    at_once = isinstance(batch, Saved) and settings.single_value == "raise" and not settings.debias
    for one in [batch] if at_once else _sets(batch, settings):
        share = rate
        if settings.debias:
            sets = min(sets + 1, MOST_UPDATES)
            share = debiased_rate(rate, sets)
        mean, var = update_running(mean, var, one, update_rate=share, **by)
    return Statistics(mean, var, count, None, sets)


def _moments_of(batch: Saved | Moments) -> Moments:
    seen = batch.moments if isinstance(batch, Saved) else batch
    assert seen is not None
    return seen


def _sets(batch: Saved | Moments, settings: BatchSettings) -> Iterator[Saved | Moments]:
    """Give each set of a batch that is an update of its own: those of one value only where that is an error."""
    seen, channels = _moments_of(batch), settings.channels
    for at, one in enumerate(seen.split(channels) if seen.channels != channels else [seen]):
        if not one.count.any() or (settings.single_value != "raise" and one._has_one_value()):
            continue
        if not isinstance(batch, Saved) or batch.renorm is None:
            yield one
        elif batch.part.offsets is None:
            yield batch
        else:
            rows = int(batch.part.offsets[at + 1] - batch.part.offsets[at])
            yield replace(
                batch, moments=one, part=Part(), renorm=replace(batch.renorm, samples=batch.renorm.samples or rows)
            )


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
