"""What of an array counts, and what shares statistics: of masks, weights, lengths, segments and ghosts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from batchnorm import _validate, _where
from batchnorm._arrays import Array, Axis, Layout, PerChannel, others_than
from batchnorm._passes import Call
from batchnorm._validate import PADDINGS, WEIGHTS_ARE, Padding, WeightsAre

# Ids that no row has cost as much memory as others. There may be some (graphs without nodes), in any small batch, and
# several to a row in a large one; beyond that they are names of something else.
_MOST_IDS, _MOST_IDS_A_ROW = 1024, 8

About = Literal["mean", "zero"]
ABOUTS: tuple[About, ...] = get_args(About)
Grouping = Literal["contiguous", "strided"]
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)


class Part(NamedTuple):
    """What of x counts, and which rows (indices of axis 0) share statistics.

    Attributes
    ----------
    weights : ndarray or None, one for each position (each index of the axes but the channel axis), flat, in the memory
        order of x; float64 for float64 arrays, else float32. None: all count alike.
    padding : "zero", "keep" or "normalize": what the output is where the weight is 0.
    source : "mask", "weights" or "lengths": the argument that told the weights.
    weights_are : "counts", "importance" or None: what they are, where that was said.
    offsets : (S + 1,) int64 or None: segment s is rows offsets[s] to offsets[s + 1] - 1. None: all rows are one.
    width : channels that share statistics.
    table : the moments of the call, whose count is the sum of the weights once the core has filled them.
    each_position : whether `width` channels of each position share statistics, and no two positions: of `layer_norm` and
        `rms_norm`, whose weights are 0 and 1.
    about : "mean" or "zero": what values are taken from, 0 in `rms_norm`.
    alpha : (C,) or None, what of the mean they are taken from, in `graph_norm`.
    strided : whether channels that share statistics are not neighbours, but every (C/width)-th.
    """

    weights: Array | None = None
    padding: Padding = "normalize"
    source: str = "weights"
    weights_are: WeightsAre | None = None
    offsets: NDArray[np.int64] | None = None
    table: PerChannel | None = None
    width: int = 1
    each_position: bool = False
    about: About = "mean"
    alpha: Array | None = None
    strided: bool = False

    def __repr__(self) -> str:
        return _validate.summary(self)

    @property
    def sets(self) -> int:
        """How many sets of statistics there are."""
        return 1 if self.offsets is None else len(self.offsets) - 1

    @property
    def is_of_channels(self) -> bool:
        """Tell whether statistics are those of a channel, about its mean."""
        return self.has_own_statistics and self.about == "mean" and self.alpha is None

    @property
    def has_own_statistics(self) -> bool:
        """Tell whether a channel shares its statistics with no other."""
        return self.width == 1 and not self.each_position

    @property
    def sums_an_entry(self) -> int:
        """How many sums of gradients there are to an entry of the moments."""
        return 1 if self.each_position else self.width

    def spread(self, values: Array) -> Array:
        """Give each channel, or sum of gradients, what its entry of the moments has: values (entries, ...)."""
        if not self.strided:
            return np.repeat(values, self.sums_an_entry, 0)
        of_sets = values.reshape(self.sets, 1, -1, *values.shape[1:])
        return np.repeat(of_sets, self.width, 1).reshape(-1, *values.shape[1:])

    def entries(self, layout: Layout) -> int:
        """How many entries moments have."""
        outer, channels, inner = layout.sizes
        return (outer * inner if self.each_position else self.sets) * (channels // self.width)

    def importance_dof(self, layout: Layout) -> PerChannel | None:
        """Give that of the weights for each set and channel; None where each weight is 0 or 1, or counts."""
        if self.weights is None or self.source != "weights" or self.weights_are == "counts":
            return None
        if _where.on_device(self.weights):
            return self._replace(weights=_where.on_host(self.weights)).importance_dof(layout)
        if ((self.weights == 0) | (self.weights == 1)).all():
            return None
        of_sets = [importance_dof(w, self.width) for w in self.of_each_set(layout)]
        return np.repeat(np.array(of_sets, np.float64), layout.sizes[1] // self.width)

    def of_each_set(self, layout: Layout) -> list[Array]:
        """Give the weights of each set."""
        assert self.weights is not None
        if self.offsets is None:
            return [self.weights]
        of_row = self.weights.size // max(layout.shape[0], 1)
        return np.split(self.weights, self.offsets[1:-1] * of_row) if self.sets else []

    def require(self, layout: Layout) -> None:
        """Refuse what does not fit x: of a Saved whose fields may have been replaced."""
        (outer, channels, inner), rows, width = layout.sizes, layout.shape[0], self.width
        if type(width) is not int or width < 1 or channels % width:
            raise ValueError(f"saved.part.width must be an int >= 1 that divides {channels} channels, got {width!r}")
        _validate.choice("saved.part.padding", self.padding, PADDINGS)
        _validate.choice("saved.part.about", self.about, ABOUTS)
        if self.alpha is not None:
            _validate.channel_values("saved.part.alpha", self.alpha, channels)
        if self.each_position and self.offsets is not None:
            raise ValueError("saved.part.offsets must be None where each position has statistics of its own")
        if type(self.strided) is not bool or (self.strided and self.each_position):
            raise ValueError(
                f"saved.part.strided must be True or False, and False beside each_position, got {self.strided!r}"
            )
        offsets = self.offsets
        if offsets is not None and not (
            offsets.dtype == np.int64 and offsets.ndim == 1 and offsets.size > 0
            and offsets[0] == 0 and offsets[-1] == rows and (offsets[1:] >= offsets[:-1]).all()
        ):  # fmt: skip
            raise ValueError(f"saved.part.offsets must begin with 0, never fall and end with {rows}, the rows of x")
        if self.weights is not None and self.weights.shape != (outer * inner,):
            raise ValueError(f"saved.part.weights must have shape ({outer * inner},), got {self.weights.shape}")

    def has_one(self) -> bool:
        """Tell whether just one position has a weight, and all are what weights may be."""
        assert self.weights is not None
        if _where.on_device(self.weights):
            return False
        return np.count_nonzero(self.weights) == 1 and bool(self._are_good().all())

    def require_weights(self) -> None:
        """Refuse what no weight may be, where the core does not look at them before it writes."""
        if _where.on_device(self.weights):
            return  # which is not looked at
        if self.weights is not None and self.source == "weights" and not self._are_good().all():
            at = int(self._are_good().argmin())
            raise ValueError(
                f"weights must be finite and >= 0 at every position, got {self.weights[at]:g} at position {at}"
            )

    def _are_good(self) -> NDArray[np.bool]:
        assert self.weights is not None
        good: NDArray[np.bool] = (self.weights >= 0) & (self.weights < np.inf)
        return good

    def counts(self, layout: Layout) -> PerChannel:
        """Give the sum of the weights of each set and channel."""
        outer, channels, inner = layout.sizes
        if self.table is not None:
            return self.spread(_where.on_host(self.table)[:, 0])
        assert self.weights is None
        if self.each_position:
            return np.full(self.entries(layout), float(self.width))
        rows = np.array([outer]) if self.offsets is None else np.diff(self.in_outer(layout))
        return np.repeat(rows * float(inner * self.width), channels)

    def call(self, layout: Layout, scale: Array | None, shift: Array | None, eps: float, given: bool = False) -> Call:
        """Give the call that counts so; `given`: by statistics that are given."""
        offsets = None if self.offsets is None else self.in_outer(layout)
        # By given statistics weights say no more than where there is padding.
        weights = None if given and self.padding == "normalize" else self.weights
        call = Call(layout.sizes, offsets, self.width, weights, PADDINGS.index(self.padding), scale, shift, eps)
        call = call._replace(each_position=self.each_position, about_zero=self.about == "zero")
        return call._replace(alpha=self.alpha, strided=self.strided)

    def in_outer(self, layout: Layout) -> NDArray[np.int64]:
        """Give the offsets in steps of the core's outer size, which may take several to a row."""
        assert self.offsets is not None
        rows = layout.shape[0]
        return self.offsets * (layout.sizes[0] // rows) if rows else self.offsets


ALL = Part()


@functools.lru_cache(256)
def shared_by(shares: int, channels: int) -> Part:
    """Give the part of which so many channels share statistics, as the core is told it (`try_batch_norm`)."""
    if shares < 0:
        return Part(width=channels, each_position=True, about="mean" if shares == -1 else "zero")
    return Part(width=channels // (shares or channels))


def importance_dof(weights: Array, times: int) -> float:
    """Give sum(w) - sum(w²)/sum(w), what the variance of importance weights divides by, to float64's digits.

    Each of `weights` is there `times` times, once for each channel that shares it. What no weight may be gives some
    number or NaN; no weight at all gives 0.
    """
    if not weights.any():
        return 0.0
    with np.errstate(all="ignore"):
        w = weights.astype(np.float64)
        at = int(w.argmax())
        largest, w[at] = float(w[at]), 0.0
        # With the largest L, the others v of sum r, and q the sum of v·v/L: r + (r - q)/(1 + r/L), as q <= r.
        # Nothing cancels, however much of the sum the largest has, and v counts even where v/L is 0.
        shares = w / largest
        others, share = float(w.sum()), float(shares.sum())
        squares = float(np.multiply(w, shares, out=shares).sum())
        return others + (others - squares) / (1.0 + share) + (times - 1) * (largest + others)


def parts(x: Array, axis: Axis, given: Mapping[str, Any]) -> tuple[Layout, Part]:
    """Give how `x` lies, and what the options of a call count of it, checked.

    given : mask, weights, lengths, segments, ghost_size, num_groups, grouping, padding, weights_are, about, where a call
        has them. `axis` is >= 0; of several axes each position, of the others, has statistics of its own.
    """
    told = [name for name in ("mask", "weights", "lengths") if given.get(name) is not None]
    if len(told) > 1:
        raise ValueError(
            f"at most one of mask, weights and lengths must be given, which say what counts, got {' and '.join(told)}"
        )
    padding, weights_are = given.get("padding"), given.get("weights_are")
    if padding is not None:
        _validate.choice("padding", padding, PADDINGS)
        if not told:
            raise ValueError(
                f"padding must be None without mask, weights or lengths, which say what is padding, got {padding!r}"
            )
    if weights_are is not None:
        _validate.choice("weights_are", weights_are, WEIGHTS_ARE)
        if told != ["weights"]:
            raise ValueError(f"weights_are must be None without weights, got {weights_are!r}")
    offsets, width = None, 1
    if isinstance(axis, int):
        offsets = _offsets(x, axis, given.get("segments"), given.get("ghost_size"))
    if given.get("num_groups") is not None and isinstance(axis, int):
        if offsets is not None:
            raise ValueError("segments and ghost_size must be None beside num_groups, which are of each sample")
        offsets, width = np.arange(len(x) + 1, dtype=np.int64), width_of_groups(x, axis, given["num_groups"])
    grouping = given.get("grouping")
    if grouping is not None:
        _validate.choice("grouping", grouping, GROUPINGS)
        if given.get("num_groups") is None:
            raise ValueError(f"grouping must be None without num_groups, got {grouping!r}")
    layout = Layout.of(x, axis, by_rows=offsets is not None)
    each = isinstance(axis, tuple)
    if each:
        width = max(layout.sizes[1], 1)
    shared: dict[str, Any] = {
        "offsets": offsets,
        "width": width,
        "each_position": each,
        "about": given.get("about", "mean"),
        "alpha": given.get("alpha"),
        "strided": grouping == "strided",
    }
    if not told:
        is_all = offsets is None and not each and shared["alpha"] is None
        return layout, ALL if is_all else Part(**shared)
    source = told[0]
    values = _positions(source, given[source], x, axis)
    weights = layout.positions(values, axis, np.dtype(np.float64 if x.dtype == np.float64 else np.float32))
    otherwise: Padding = "normalize" if source == "weights" else "zero"
    part = Part(weights, padding or otherwise, source, weights_are, **shared)
    if each:  # of a position by itself a weight says no more than whether it counts
        part.require_weights()
        part = part._replace(weights=_where.as_flags(weights))
    return layout, part


def require_values(x: Array, axis: Axis, layout: Layout, part: Part, given: Mapping[str, Any]) -> None:
    """Refuse a batch, or a ghost of one, of a single value a channel, which has no variance. An empty one passes."""
    if isinstance(axis, tuple):
        return  # of one value y is beta
    if part.weights is None:
        if part.offsets is None and x.size and x.size == x.shape[axis]:
            raise ValueError(f"x must have at least 2 values per channel for batch statistics, got shape {x.shape}")
    elif part.offsets is not None:  # else the core looks before it writes
        part.require_weights()
        one_is_enough = given.get("segments") is not None or part.width > 1
        if _where.on_device(part.weights):
            return
        for weights in () if one_is_enough else part.of_each_set(layout):
            _validate.several_positions(part.source, weights)


def width_of_groups(x: Array, axis: int, num_groups: object) -> int:
    """Give how many channels each of so many groups of a sample has."""
    if axis == 0:
        raise ValueError("axis must not be 0, which holds the samples, got 0")
    groups, channels = _validate.int_at_least("num_groups", num_groups, 1), x.shape[axis]
    if channels % groups:
        raise ValueError(f"num_groups must divide the channels of x, {channels}, got {num_groups}")
    return channels // groups or 1


def require_values_of_samples(x: Array, axis: int, width: int) -> None:
    """Refuse samples of which `width` channels have one value alone."""
    if x.size and x.size * width == x.shape[0] * x.shape[axis]:
        of = "channel" if width == 1 else "group"
        raise ValueError(
            f"x must have at least 2 values in each sample and {of} for their statistics, got shape {x.shape}"
        )


def _offsets(x: Array, axis: int, segments: Any, ghost_size: Any) -> NDArray[np.int64] | None:
    if ghost_size is None:
        return None if segments is None else _segments(x, axis, segments)
    size = _validate.int_at_least("ghost_size", ghost_size, 1)
    if segments is not None:
        raise ValueError(
            "at most one of segments and ghost_size must be given, which say what shares statistics, got both"
        )
    _validate.ghost_values(x, axis, size)
    return np.append(np.arange(0, len(x), size, dtype=np.int64), np.int64(len(x)))


def _positions(source: str, values: Any, x: Array, axis: Axis) -> Array:
    """Give the weight of each position, as `x` without its channel axis."""
    if source == "mask":
        return _spread("mask", _flags(values), x, axis)
    if source == "weights":
        return _spread("weights", _numbers("weights", values, "fiub", "a floating"), x, axis)
    return _before_lengths(x, axis, values)


def _numbers(name: str, values: Any, kinds: str, wanted: str) -> Array:
    a = _validate.numbers(name, values)
    if _where.on_device(a) and name != "weights":  # they say how work is cut
        raise ValueError(f"{name} must be on the host, got one on cuda:{a.device} (np.asarray copies and waits)")
    if not a.size and "i" in kinds:  # an empty list has no dtype of its own
        return a.astype(np.int64)
    if a.dtype.kind not in kinds:
        raise TypeError(f"{name} must have {wanted} dtype, got {a.dtype}")
    return a


def _flags(mask: Any) -> Array:
    """Give a mask as bools: also of integers that are 0 and 1."""
    a = _validate.numbers("mask", mask)
    if a.dtype.kind not in "biu":
        hint = " (write mask != 0)" if a.dtype.kind == "f" else ""
        raise TypeError(f"mask must have a bool dtype{hint}, got {a.dtype}")
    if a.dtype.kind == "b":
        return a
    if _where.on_device(a):
        raise TypeError(f"mask must have a bool dtype on a device (write mask != 0), got {a.dtype}")
    other = a[(a != 0) & (a != 1)]
    if other.size:
        raise ValueError(f"mask must be bools, or integers 0 and 1, got {other[0]}")
    return a.astype(np.bool)


def _spread(name: str, a: Array, x: Array, axis: Axis) -> Array:
    """Give `a` for every position: as `x` without its channel axis."""
    others = others_than(axis, x.ndim)
    positions = tuple(x.shape[d] for d in others)
    values, named = a, "its channel axis" if isinstance(axis, int) else "the axes that are normalized"
    if a.ndim == x.ndim and all(a.shape[d] == 1 for d in range(x.ndim) if d not in others):
        values = a.reshape(tuple(a.shape[d] for d in others))
    elif a.ndim != len(others):
        values = np.empty((0,) * (x.ndim + 1), np.bool)  # fits nothing
    if values.ndim == len(positions) and all(n in (1, m) for n, m in zip(values.shape, positions, strict=True)):
        spread: Array = _where.broadcast_to(values, positions)
        return spread
    raise ValueError(
        f"{name} must have the shape of x without {named}, {positions}, or with 1 there "
        f"(and 1 wherever it is the same along an axis), got {a.shape}"
    )


def _before_lengths(x: Array, axis: Axis, lengths: Any) -> Array:
    """Tell for every position whether it lies within its sample's length."""
    others = others_than(axis, x.ndim)
    if isinstance(axis, tuple) and (len(others) < 2 or others[0] != 0):
        raise ValueError(
            "lengths must come with an x of samples (axis 0) and steps, on axes that are not normalized, "
            f"got shape {x.shape} with axes {axis}"
        )
    if x.ndim < 3 or axis == 0:
        raise ValueError(
            "lengths must come with an x of samples (axis 0), steps and channels on other axes, "
            f"got shape {x.shape} with channel axis {axis}"
        )
    counts = _numbers("lengths", lengths, "iu", "an integer")
    if counts.shape != (x.shape[0],):
        raise ValueError(f"lengths must have shape ({x.shape[0]},), one per sample, got {counts.shape}")
    step_axis = others[1]
    steps = x.shape[step_axis]
    good = (counts >= 0) & (counts <= steps)
    if not good.all():
        n = int(good.argmin())
        raise ValueError(
            f"lengths must be from 0 to {steps}, the size of axis {step_axis} of x, got {counts[n]} for sample {n}"
        )
    within = np.arange(steps) < counts.reshape(-1, 1)
    positions = tuple(x.shape[d] for d in others)
    return np.broadcast_to(within.reshape(within.shape + (1,) * (len(positions) - 2)), positions)


def _segments(x: Array, axis: int, segments: Any) -> NDArray[np.int64]:
    if axis == 0:
        raise ValueError("segments must be of rows on axis 0, which must not be the channel axis, got axis 0")
    ids = _numbers("segments", segments, "iu", "an integer")
    if ids.shape != (x.shape[0],):
        raise ValueError(f"segments must have shape ({x.shape[0]},), one id per row, got {ids.shape}")
    if not ids.size:
        return np.zeros(1, np.int64)
    falls = np.flatnonzero(ids[1:] < ids[:-1])
    if ids[0] < 0 or falls.size:
        at = 0 if ids[0] < 0 else int(falls[0]) + 1
        raise ValueError(f"segments must be ids from 0 that never fall, got {ids[at]} for row {at}")
    most = max(_MOST_IDS, _MOST_IDS_A_ROW * ids.size)
    if ids[-1] >= most:
        raise ValueError(
            f"segments must be ids below {most} with {ids.size} rows, since each up to the largest has statistics, "
            f"got {ids[-1]} for row {ids.searchsorted(most)}; np.unique(segments, return_inverse=True)[1] are ids "
            "without gaps"
        )
    ids = ids.astype(np.int64, copy=False)
    return np.searchsorted(ids, np.arange(ids[-1] + 2)).astype(np.int64, copy=False)
