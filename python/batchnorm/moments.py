"""Moments: what is known of a set of values, mergeable with what is known of another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import ArrayLike

from batchnorm import _core, _keywords, _parts, _validate, _where
from batchnorm._arrays import Array, Layout, PerChannel
from batchnorm._parts import Grouping, Part
from batchnorm._validate import WeightsAre

_FIELDS = 5  # count, mean, mean_lo, m2, m2_lo


class Moments:
    """Count, mean and sum of squared deviations of each channel; two of them merge into those of the union.

    For the n values x of a channel: mean = sum(x)/n and m2 = sum((x - mean)²). Merging (``a | b``) is the rule of
    Chan, Golub and LeVeque (1979): with δ = mean_b - mean_a and n = n_a + n_b,

        mean = mean_a + δ·n_b/n,    m2 = m2_a + m2_b + δ²·n_a·n_b/n.

    Mean and m2 are held to about twice float64's digits, so merging any number of parts adds no error that could
    be seen, in whatever order.

    Parameters
    ----------
    count : float or (C,) of float; values in each channel, or the sum of their weights, >= 0.
    mean, m2 : (C,) of float; m2 >= 0. A channel of count 0 must have mean and m2 of 0.
    importance_dof : None where nothing but 0 and 1 were weights, and in a subclass; else (C,) of float from 0 to count,
        sum(w) - sum(w²)/sum(w).

    Attributes
    ----------
    count, mean, m2 : (C,) float64, read-only.
    importance_dof : (C,) float64, sum(w) - sum(w²)/sum(w), by which the unbiased variance of importance weights
        divides; count - 1 without weights.
    channels : int, C.

    Instances do not change; they can be compared, copied, pickled, and used from any thread. TypeError or ValueError for
    shapes and values that do not fit.

    Examples
    --------
    >>> a, b = moments(np.array([[1.0], [2.0]])), moments(np.array([[6.0]]))
    >>> (a | b).mean, (a | b).var()
    (array([3.]), array([4.66666667]))
    """

    __slots__ = ("_table",)
    _table: PerChannel
    _dof: PerChannel | None = None  # that is count - 1; else it is a _WeightedMoments

    def __new__(
        cls, count: ArrayLike, mean: ArrayLike, m2: ArrayLike, *, importance_dof: ArrayLike | None = None
    ) -> Self:
        """Give one that has room for importance_dof where there is one."""
        made = cls if importance_dof is None or cls is not Moments else _WeightedMoments
        return object.__new__(made)  # type: ignore[return-value]

    def __init__(
        self, count: ArrayLike, mean: ArrayLike, m2: ArrayLike, *, importance_dof: ArrayLike | None = None
    ) -> None:
        means = np.asarray(mean, np.float64)
        if means.ndim != 1:
            raise ValueError(f"mean must have 1 dimension, got {means.ndim}")
        channels = means.size
        counts = np.asarray(count, np.float64)
        counts = np.full(channels, counts) if counts.ndim == 0 else counts
        counts = _validate.channel_values("count", counts, channels)
        squares = _validate.channel_values("m2", np.asarray(m2, np.float64), channels)
        _validate.not_negative("count", counts)
        _validate.not_negative("m2", squares)
        _validate.each_channel("count", counts, np.isfinite(counts), "be finite")
        for name, values in (("mean", means), ("m2", squares)):
            _validate.each_channel(name, values, (counts > 0) | (values == 0), "be 0 where count is 0")
        table = np.zeros((channels, _FIELDS))
        table[:, 0], table[:, 1], table[:, 3] = counts, means, squares
        table.flags.writeable = False
        if importance_dof is None:
            if isinstance(self, _WeightedMoments):
                _set_dof(self, None)
        elif not isinstance(self, _WeightedMoments):
            raise TypeError(f"importance_dof must be None in a subclass of Moments, got one for {type(self).__name__}")
        else:
            given = _validate.channel_values("importance_dof", importance_dof, channels)
            good = (given >= 0) & (given <= counts)
            _validate.each_channel("importance_dof", given, good, "be from 0 to count")
            dof = np.array(given, np.float64)
            dof.flags.writeable = False
            _set_dof(self, dof)
        _set_table(self, table)

    @staticmethod
    def _from_table(table: PerChannel, dof: PerChannel | None = None) -> Moments:
        """Take over a table. The caller gives up writing to it."""
        table.flags.writeable = False
        return Moments._from_core(table, dof)

    @staticmethod
    def _from_core(table: PerChannel, dof: PerChannel | None = None) -> Moments:
        """Take over a table of the core, which is read-only already."""
        if dof is None:
            self = object.__new__(Moments)
        else:
            self = object.__new__(_WeightedMoments)
            dof.flags.writeable = False
            _set_dof(self, dof)
        _set_table(self, table)
        return self

    @classmethod
    def empty(cls, channels: int) -> Moments:
        """Moments of no values at all: the identity of merging."""
        return cls._from_table(np.zeros((channels, _FIELDS)))

    def split(self, channels: int) -> tuple[Moments, ...]:
        """Give those of each segment or ghost, of so many channels, where there are several; ``merge(*m.split(C))``."""
        if channels < 1 or self.channels % channels:
            raise ValueError(f"channels must divide {self.channels}, the entries there are, got {channels}")
        parts = (slice(at, at + channels) for at in range(0, self.channels, channels))
        return tuple(
            Moments._from_core(self._table[part], None if self._dof is None else self._dof[part]) for part in parts
        )

    @property
    def channels(self) -> int:
        """How many channels there are; with segments and ghosts, these times the channels of x."""
        return int(self._table.shape[0])

    @property
    def count(self) -> PerChannel:
        """How many values each channel has, (C,) float64."""
        return self._table[:, 0]

    @property
    def mean(self) -> PerChannel:
        """Mean of each channel, (C,) float64."""
        return self._table[:, 1]

    @property
    def m2(self) -> PerChannel:
        """Sum of squared deviations from the mean, (C,) float64."""
        return self._table[:, 3]

    @property
    def importance_dof(self) -> PerChannel:
        """sum(w) - sum(w²)/sum(w) of each channel's weights w, (C,) float64; count - 1 without weights."""
        return np.maximum(self.count - 1, 0.0) if self._dof is None else self._dof

    def var(self, ddof: int = 0, *, weights_are: WeightsAre | None = None) -> PerChannel:
        """Variance m2/(count - ddof) of each channel, (C,) float64.

        ddof=0 is the biased variance, which normalizes; ddof=1 the unbiased one. NaN where ddof leaves less than 1. Of no
        values the biased one is infinity: nothing is known, and normalizing by it gives beta, as `batch_norm` does.

        Of weights w other than 0 and 1 the unbiased variance depends on what they are, which must be said:
        "counts" (a weight of 2 is a value that came twice) divides by sum(w) - ddof; "importance" (only their ratios
        matter: probabilities, reliabilities) by sum(w) - ddof·sum(w²)/sum(w), as NumPy's cov does for aweights. NaN
        where only one value has a weight.

        TypeError or ValueError for a ddof that is not an int >= 0, for other words, and where it must be said.
        """
        table, rest = self._divided(_validate.int_at_least("ddof", ddof, 0), weights_are)
        var = _core.variance(table, rest)
        if table is not self._table:
            var[self.count == 0] = np.nan
        return var

    def _divided(self, ddof: int, weights_are: WeightsAre | None) -> tuple[PerChannel, int]:
        """Give a table and a ddof for the core, whose m2/(count - ddof) is the variance."""
        if weights_are is not None:
            _validate.choice("weights_are", weights_are, _validate.WEIGHTS_ARE)
        if self._dof is None or ddof == 0 or weights_are == "counts":
            return self._table, ddof
        if weights_are is None:
            raise _validate.weights_unsaid(f"ddof={ddof}")
        table, count = np.array(self._table), self.count
        left = ddof * self._dof - (ddof - 1) * count
        table[:, 0] = np.where(left > 0, left, np.where(count == 0, 0.0, np.nan))
        return table, 0

    def _has_one_value(self) -> bool:
        """Tell whether just one value a channel has a weight, which leaves no variance."""
        return bool(((self.count > 0) & (self.importance_dof == 0)).any())

    def _first_nonfinite(self) -> int:
        """Give the first channel whose mean or m2 is infinite or NaN; -1 where there is none."""
        return _core.first_nonfinite(self._table)

    def __or__(self, other: Moments) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        return merge(self, other)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        return np.array_equal(self._table, other._table) and (
            self._dof is other._dof or np.array_equal(self.importance_dof, other.importance_dof)
        )

    def __hash__(self) -> int:
        return hash((self._table + 0.0).tobytes())  # -0.0 equals 0.0

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Moments do not change; {name} cannot be set")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (np.array(self._table), None if self._dof is None else np.array(self._dof))

    def __repr__(self) -> str:
        counts = np.unique(self.count)
        values = f"{counts[0]:g}" if counts.size == 1 else "various"
        return f"Moments(channels={self.channels}, count={values})"


def moments_to_be(table: Any, part: Part, layout: Layout) -> tuple[Moments, Any]:
    """Give the moments of a table that is still to be filled, and the table as one that is read alone."""
    if _where.on_device(table):
        return _DeviceMoments(table, part, layout), table
    table[...] = 0
    shown = table.view()
    shown.flags.writeable = False
    return Moments._from_core(shown, part.importance_dof(layout)), shown


def table_of(moments: Moments, x: Any) -> Any:
    """Give the table of moments where x is, or where it can go there from."""
    return moments.at if type(moments) is _DeviceMoments and _where.on_device(x) else moments._table


def moments_at(moments: Moments, like: Any) -> Moments:
    """Give moments where `like` is, or on the host for None; those of weights that are not counts stay there."""
    if like is None:
        return moments._looked_at() if type(moments) is _DeviceMoments else moments
    if moments._dof is not None or (type(moments) is _DeviceMoments and moments.at.device == like.device):
        return moments
    return of_device_table(_where.uploaded(moments._table, like))


def of_device_table(table: Any) -> Moments:
    """Give the moments of a table on a device, of no weights but 0 and 1."""
    return _DeviceMoments(table, _parts.ALL, None)


class _DeviceMoments(Moments):
    """Moments of an array on a device, where they are until somebody looks at them: then they are copied, and waited for."""

    __slots__ = ("_of", "_on_host", "at")
    at: Any  # the table
    _on_host: Moments | None
    _of: tuple[Part, Layout | None]

    def __new__(cls, *_: Any) -> Self:
        """Give one without values."""
        return object.__new__(cls)

    def __init__(self, table: Any, part: Part, layout: Layout | None) -> None:
        for name, value in (("at", table), ("_on_host", None), ("_of", (part, layout))):
            object.__setattr__(self, name, value)

    def _looked_at(self) -> Moments:
        if self._on_host is None:
            part, layout = self._of
            dof = None if layout is None else part.importance_dof(layout)
            known = Moments._from_table(self.at.to_numpy(), dof)
            object.__setattr__(self, "_on_host", known)
        return self._on_host  # type: ignore[return-value]

    @property
    def _table(self) -> PerChannel:  # type: ignore[override]
        return self._looked_at()._table

    @property
    def _dof(self) -> PerChannel | None:  # type: ignore[override]
        part, _ = self._of
        may_have = part.weights is not None and part.source == "weights" and part.weights_are != "counts"
        return self._looked_at()._dof if may_have else None

    def split(self, channels: int) -> tuple[Moments, ...]:
        """Give those of each segment or ghost, as `Moments` does, where they are."""
        if channels < 1 or self.channels % channels or self._dof is not None:
            return self._looked_at().split(channels)
        return tuple(of_device_table(self.at.rows(c, c + channels)) for c in range(0, self.channels, channels))

    @property
    def channels(self) -> int:
        """How many channels there are, as `Moments` has them."""
        return int(self.at.shape[0])


class _WeightedMoments(Moments):
    """Moments of weights other than 0 and 1. A class of its own, so that the others need not carry what they have not."""

    __slots__ = ("_dof",)
    _dof: PerChannel


_set_table = Moments.__dict__["_table"].__set__  # past __setattr__
_set_dof = _WeightedMoments.__dict__["_dof"].__set__


def _restore(table: PerChannel, dof: PerChannel | None = None) -> Moments:
    return Moments._from_table(table, dof)


def merge(*parts: Moments) -> Moments:
    """Moments of the union of all `parts`, Moments of the same number of channels, at least one: ``a | b | c``.

    Returns
    -------
    Moments. Any order of the parts gives the same to within a float64 rounding. TypeError for no parts, or what is not
        Moments; ValueError for different numbers of channels.

    Source: Chan, Golub, LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances".

    >>> x = np.arange(12.0).reshape(6, 2)
    >>> merge(moments(x[:1]), moments(x[1:4]), moments(x[4:])) == moments(x)
    True
    """
    if not parts:
        raise TypeError("merge must have at least 1 Moments, got none")
    for part in parts:
        if not isinstance(part, Moments):
            raise TypeError(f"merge must have Moments, got {type(part).__name__}")
        if part.channels != parts[0].channels:
            raise ValueError(
                f"moments must have {parts[0].channels} channels to merge with the first, got {part.channels}"
            )
    table = reduce(_core.merge, (p._table for p in parts))
    return Moments._from_core(table, _merged_dof(parts))


def _merged_dof(parts: Sequence[Moments]) -> PerChannel | None:
    """Give the importance_dof of the union: W - sum(w²)/W = (D_a·W_a + D_b·W_b + 2·W_a·W_b)/W, W = W_a + W_b."""
    if all(p._dof is None for p in parts):
        return None
    count, dof = parts[0].count, parts[0].importance_dof
    with np.errstate(all="ignore"):
        for p in parts[1:]:
            both = count + p.count
            share, other = count / both, p.count / both
            between = np.minimum(count, p.count) * np.maximum(share, other)  # no share that underflows
            dof = np.where(both == 0, 0.0, dof * share + p.importance_dof * other + 2 * between)
            count = both
    return np.array(dof)


class Counts(_keywords.Counts, total=False):
    """What of x counts, and what shares statistics."""

    ghost_size: int | None
    num_groups: int | None
    grouping: Grouping | None
    axes: int | tuple[int, ...] | None
    weights_are: WeightsAre | None


@_keywords.options(Counts)
def moments(x: Array, *, axis: int = 1, num_threads: int | None = None, **parts: Unpack[Counts]) -> Moments:
    """Count, mean and m2 of each channel of `x`.

    For the n values of a channel: mean = sum(x)/n, m2 = sum((x - mean)²); ``.var()`` is m2/n, biased. TypeError or
    ValueError for an `x` that is no such array (byte order included), an axis out of range. Memory: 40 bytes a channel;
    while it runs, up to 2 KB a channel and a few percent of `x`. Releases the GIL for large `x`.

    Parameters
    ----------
    x : ndarray of float16, bfloat16 (ml_dtypes), float32 or float64, 1 to 8 dimensions, any memory order. An array
        that fills one block of memory (C-contiguous, channels-last, transposed) is read in place; a sliced, strided,
        broadcast or not aligned one costs a copy.
    axis : the channel axis; every other axis is summed over.
    mask, weights, lengths, segments, ghost_size, weights_are : what counts and what shares statistics, as in
        `batch_norm`. With weights w: count = sum(w), mean = sum(w·x)/count, m2 = sum(w·(x - mean)²); the unbiased
        variance needs ``.var(1, weights_are=...)``, which says what they are. With segments and ghosts, one entry for
        each and channel, segment first: ``.split(C)``.
    num_groups : int that divides C, or None: of each sample (index of axis 0) and group of C/num_groups channels, sample
        first, as in `group_norm`.
    grouping : "contiguous" (what None is), or "strided", of num_groups, as in `group_norm`.
    axes : in the place of `axis` the axes to sum over, or None: an entry for each index of the others, in the order of
        memory, as in `layer_norm`.
    num_threads : threads to use at most; None: `set_num_threads`, else OMP_NUM_THREADS, else all. Same bits for any.

    Returns
    -------
    Moments, float64. For float32 `x`, mean and variance are within 1 float32 ulp of the exact ones for every finite
    input. No values: count, mean and m2 are 0. NaN and infinity stay in their channel.

    Examples
    --------
    >>> m = moments(np.array([[1.0, 10.0], [3.0, 10.0]]))
    >>> m.count, m.mean, m.var()
    (array([2., 2.]), array([ 2., 10.]), array([1., 0.]))
    """
    if not parts or _keywords.no_options("moments", parts):
        done = _core.try_moments(x, axis, num_threads)
        if done is not None:
            return Moments._from_core(done)

    x = _validate.array("x", x)
    threads, axes = _validate.num_threads(num_threads), parts.get("axes")
    shared = [n for n in ("segments", "ghost_size", "num_groups", "grouping") if parts.get(n) is not None]
    if axes is not None and shared:
        raise ValueError(f"{shared[0]} must be None beside axes, of which each index of the others is by itself")
    at = _validate.axis(axis, x.ndim) if axes is None else _validate.axes(axes, x.ndim)
    layout, part = _parts.parts(x, at, parts)
    _where.require_together(x, **{part.source: part.weights})
    table = _where.empty(x, (part.entries(layout), _FIELDS))
    results, _ = moments_to_be(table, part, layout)
    _where.passes(x).moments(layout.block(x), part.call(layout, None, None, 0.0), table, threads)
    return results
