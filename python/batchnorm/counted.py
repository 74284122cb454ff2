"""What of an array is counted: positions with weights (masks, lengths), or segments of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm import _layout, _validate
from batchnorm._validate import PADDINGS, Padding

Array = NDArray[Any]

# Ids that no row has cost as much memory as others. There may be some (graphs without nodes), in any small batch, and
# several to a row in a large one; beyond that they are names of something else.
_MOST_IDS, _MOST_IDS_A_ROW = 1024, 8


@dataclass(frozen=True, eq=False, slots=True)
class Positions:
    """A weight for each position of an array, that is for each index of its axes but the channel axis.

    Attributes
    ----------
    weights : ndarray, flat, in the memory order of the array; float64 for float64 arrays, else float32.
    padding : "zero", "keep" or "normalize": what the output is where the weight is 0.
    source : "mask", "weights" or "lengths": the argument that told them.
    table : the moments of the call, whose count is the sum of the weights once the core has filled them.
    """

    weights: Array
    padding: Padding
    source: str = "weights"
    table: Array | None = None

    @property
    def total(self) -> float:
        """The sum of the weights; 0 where there are no channels to tell it."""
        return 0.0 if self.table is None or not len(self.table) else float(self.table[0, 0])

    def __repr__(self) -> str:
        return _validate.summary(self)

    @property
    def code(self) -> int:
        """The padding as the core takes it."""
        return PADDINGS.index(self.padding)

    def importance_dof(self, channels: int) -> NDArray[np.float64] | None:
        """Give that of the weights for each channel; None where each is 0 or 1."""
        dof = importance_dof(self.weights) if self.source == "weights" else None
        return None if dof is None else np.full(channels, dof)

    def has_one(self) -> bool:
        """Tell whether just one position has a weight, and all are what weights may be."""
        return np.count_nonzero(self.weights) == 1 and bool(self._are_good().all())

    def require_weights(self) -> None:
        """Refuse what no weight may be, where the core does not look at them."""
        bad = np.flatnonzero(~self._are_good())
        if bad.size:
            raise ValueError(
                f"weights must be finite and >= 0 at every position, got {self.weights[bad[0]]:g} at position {bad[0]}"
            )

    def _are_good(self) -> Array:
        return (self.weights >= 0) & (self.weights < np.inf)


def importance_dof(weights: Array) -> float | None:
    """Give sum(w) - sum(w²)/sum(w), what the variance of importance weights divides by, to float64's digits.

    None for weights of 0 and 1, of which it is their number less one. What no weight may be gives some number or NaN.
    """
    if ((weights == 0) | (weights == 1)).all():
        return None
    with np.errstate(all="ignore"):
        w = weights.astype(np.float64)
        at = int(w.argmax())
        largest, w[at] = float(w[at]), 0.0
        # With the largest L, the others v of sum r, and q the sum of v·v/L: r + (r - q)/(1 + r/L), as q <= r.
        # Nothing cancels, however much of the sum the largest has, and v counts even where v/L is 0.
        shares = w / largest
        others, share = float(w.sum()), float(shares.sum())
        squares = float(np.multiply(w, shares, out=shares).sum())
        return others + (others - squares) / (1.0 + share)


@dataclass(frozen=True, eq=False, slots=True)
class Segments:
    """Rows (indices of axis 0) cut into consecutive segments.

    Attributes
    ----------
    offsets : (S + 1,) int64: segment s is rows offsets[s] to offsets[s + 1] - 1.
    """

    offsets: NDArray[np.int64]

    def __repr__(self) -> str:
        return _validate.summary(self)

    def of_outer(self, sizes: _layout.Sizes, rows: int) -> NDArray[np.int64]:
        """Give the offsets in steps of the core's outer size, which may take several to a row."""
        return self.offsets * (sizes[0] // rows) if rows else self.offsets


Counted = Positions | Segments


def dense(x: Array, axis: int, part: Counted | None) -> tuple[Array, _layout.Sizes]:
    """Give `_layout.dense`, with axis 0 outermost where segments of it are meant (which may cost a copy)."""
    if isinstance(part, Segments) and not _layout.begins_with_rows(x, axis):
        x = np.ascontiguousarray(x)
    return _layout.dense(x, axis)


def counted(
    x: Array,
    axis: int,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    segments: ArrayLike | None = None,
    padding: Padding | None = None,
) -> Counted | None:
    """Give what the arguments of that name count of `x`, whose channel axis is `axis` (>= 0); None for all alike."""
    given = {"mask": mask, "weights": weights, "lengths": lengths, "segments": segments}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(
            f"at most one of mask, weights, lengths and segments must be given, got {' and '.join(names)}"
        )
    if padding is not None:
        _validate.choice("padding", padding, PADDINGS)
    if not names or names == ["segments"]:
        if padding is not None:
            raise ValueError(
                f"padding must be None without mask, weights or lengths, which say what is padding, got {padding!r}"
            )
        return None if not names else _segments(x, axis, segments)
    if mask is not None:
        flags = _spread("mask", _flags(mask), x, axis)
        return Positions(_flat(flags, x, axis), padding or "zero", source="mask")
    if weights is not None:
        values = _numbers("weights", weights, "fiub", "floating")
        return Positions(_flat(_spread("weights", values, x, axis), x, axis), padding or "normalize")
    return Positions(_flat(_before_lengths(x, axis, lengths), x, axis), padding or "zero", source="lengths")


def _numbers(name: str, values: Any, kinds: str, wanted: str) -> Array:
    a = _validate.numbers(name, values)
    if not a.size and "i" in kinds:  # an empty list has no dtype of its own
        return a.astype(np.int64)
    if a.dtype.kind not in kinds:
        raise TypeError(f"{name} must have {_article(wanted)} dtype, got {a.dtype}")
    return a


def _flags(mask: Any) -> Array:
    """Give a mask as bools: also of integers that are 0 and 1."""
    a = _validate.numbers("mask", mask)
    if a.dtype.kind not in "biu":
        hint = " (write mask != 0)" if a.dtype.kind == "f" else ""
        raise TypeError(f"mask must have a bool dtype{hint}, got {a.dtype}")
    if a.dtype.kind == "b":
        return a
    other = a[(a != 0) & (a != 1)]
    if other.size:
        raise ValueError(f"mask must be bools, or integers 0 and 1, got {other[0]}")
    return a.astype(np.bool)


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _spread(name: str, a: Array, x: Array, axis: int) -> Array:
    """Give `a` for every position: as `x` without its channel axis."""
    positions = x.shape[:axis] + x.shape[axis + 1 :]
    values = a
    if a.ndim == x.ndim and a.shape[axis] == 1:
        values = a.reshape(a.shape[:axis] + a.shape[axis + 1 :])
    elif a.ndim != x.ndim - 1:
        values = np.empty((0,) * (x.ndim + 1), np.bool)  # fits nothing
    if values.ndim == len(positions) and all(
        n in (1, m) for n, m in zip(values.shape, positions, strict=True)
    ):
        return np.broadcast_to(values, positions)
    raise ValueError(
        f"{name} must have the shape of x without its channel axis, {positions}, or with 1 there "
        f"(and 1 wherever it is the same along an axis), got {a.shape}"
    )


def _before_lengths(x: Array, axis: int, lengths: Any) -> Array:
    """Tell for every position whether it lies within its sample's length."""
    if x.ndim < 3 or axis == 0:
        raise ValueError(
            "lengths must come with an x of samples (axis 0), steps and channels on other axes, "
            f"got shape {x.shape} with channel axis {axis}"
        )
    counts = _numbers("lengths", lengths, "iu", "integer")
    if counts.shape != (x.shape[0],):
        raise ValueError(f"lengths must have shape ({x.shape[0]},), one per sample, got {counts.shape}")
    step_axis = 2 if axis == 1 else 1
    steps = x.shape[step_axis]
    good = (counts >= 0) & (counts <= steps)
    if not good.all():
        n = int(good.argmin())
        raise ValueError(
            f"lengths must be from 0 to {steps}, the size of axis {step_axis} of x, got {counts[n]} for sample {n}"
        )
    within = np.arange(steps) < counts.reshape(-1, 1)
    positions = x.shape[:axis] + x.shape[axis + 1 :]
    return np.broadcast_to(within.reshape(within.shape + (1,) * (len(positions) - 2)), positions)


def _flat(values: Array, x: Array, axis: int) -> Array:
    """Give values of positions in the order in which `_layout.dense` gives those of x."""
    order = _layout.order_of_axes(x)
    without = [d - (d > axis) for d in order if d != axis]
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):  # a weight beyond float32 is refused by the core, as an infinity
        return np.ascontiguousarray(values.transpose(without)).astype(dtype, copy=False).reshape(-1)


def _segments(x: Array, axis: int, segments: Any) -> Segments:
    if axis == 0:
        raise ValueError("segments must be of rows on axis 0, which must not be the channel axis, got axis 0")
    ids = _numbers("segments", segments, "iu", "integer")
    if ids.shape != (x.shape[0],):
        raise ValueError(f"segments must have shape ({x.shape[0]},), one id per row, got {ids.shape}")
    if not ids.size:
        return Segments(np.zeros(1, np.int64))
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
    return Segments(np.searchsorted(ids, np.arange(ids[-1] + 2)).astype(np.int64, copy=False))
