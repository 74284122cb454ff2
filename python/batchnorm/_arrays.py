"""How the arrays of a call lie in memory: derived once from x, and used for all that is shaped like it.

The core sees a block of memory in which element (o, c, i) lies at (o*channels + c)*inner + i. Any array whose
elements fill one block in some order of the axes is such a block: NCHW is (N, C, H*W), an NCHW view of NHWC
memory is (N*H*W, C, 1). Other arrays (sliced, strided, broadcast) are copied first.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from batchnorm import _where

Array = NDArray[Any]
PerChannel = NDArray[np.float64]  # one or several values for each channel, or set and channel
Sizes = tuple[int, int, int]
Axis = int | tuple[int, ...]  # the channel axis, or the axes that are normalized: >= 0, rising
ORDERS = [tuple(range(dimensions)) for dimensions in range(9)]  # of the axes of a C-contiguous array


class Layout(NamedTuple):
    """The order of the axes of an array in memory, and the sizes that the core sees.

    Attributes
    ----------
    shape : that of x.
    order : the axes in the order in which they lie in memory, outermost first.
    sizes : (outer, channels, inner).
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    sizes: Sizes

    @classmethod
    def of(cls, x: Array, axis: Axis, *, by_rows: bool = False) -> Self:
        """Tell how `x` lies from its channel axis `axis` (>= 0), or how a copy would.

        With `by_rows`, axis 0 is outermost of all: the outer size is whole steps of it. Several axes are one, of all their
        indices, if they lie side by side in their order: else a copy does, where they are last if need be.
        """
        if isinstance(axis, tuple):
            return cls._of_several(x, axis)
        order = tuple(range(x.ndim)) if x.flags.c_contiguous else _order(x)
        if by_rows and not x.flags.c_contiguous:
            long = [d for d in order if x.shape[d] > 1]
            if axis not in long[1:] or long[0] != 0:
                order = tuple(range(x.ndim))
        at = order.index(axis)
        outer, inner = (prod(x.shape[d] for d in part) for part in (order[:at], order[at + 1 :]))
        return cls(x.shape, order, (outer, x.shape[axis], inner))

    @classmethod
    def _of_several(cls, x: Array, axes: tuple[int, ...]) -> Self:
        others = tuple(d for d in range(x.ndim) if d not in axes)
        orders = [_order(x), tuple(range(x.ndim)), others + axes]
        order = next(o for o in orders if any(o[at : at + len(axes)] == axes for at in range(x.ndim)))
        at = order.index(axes[0])
        parts = order[:at], axes, order[at + len(axes) :]
        outer, channels, inner = (prod(x.shape[d] for d in part) for part in parts)
        return cls(x.shape, order, (outer, channels, inner))

    def block(self, a: Array) -> Array:
        """Give `a`, of that shape, as (outer, channels, inner): a view where it lies so, else a copy."""
        block: Array = _where.contiguous(a.transpose(self.order)).reshape(self.sizes)
        return block

    def array(self, block: Array) -> Array:
        """Give a block as an array of the shape of x."""
        in_memory = block.reshape([self.shape[d] for d in self.order])
        return in_memory.transpose(np.argsort(self.order))

    def positions(self, values: Array, axis: Axis, dtype: np.dtype[Any]) -> Array:
        """Give one value for each index of all axes but `axis`, flat, in the order of memory: a copy, which stays as it is."""
        others = others_than(axis, len(self.shape))
        without = [others.index(d) for d in self.order if d in others]
        with np.errstate(all="ignore"):  # a weight beyond float32 is refused by the core, as an infinity
            flat: Array = _where.copy(values.transpose(without), dtype).reshape(-1)
        return flat


def others_than(axis: Axis, ndim: int) -> list[int]:
    """Give the axes that are not the channel's."""
    axes = (axis,) if isinstance(axis, int) else axis
    return [d for d in range(ndim) if d not in axes]


class Target:
    """Where a result goes: the caller's array or a new one, and the block that is computed; None if not `needed`."""

    array: Any = None
    block: Any = None
    _copied = False

    def __init__(self, layout: Layout, x: Array, out: Array | None, needed: bool = True) -> None:
        """Make room for what is like `x`."""
        if not needed:
            return
        self.array = _where.empty_like(x) if out is None else out
        self._copied = not self.array.transpose(layout.order).flags.c_contiguous
        if self._copied:
            self.block = _where.empty(x, layout.sizes, x.dtype)
            self._from = layout.array(self.block)
        else:
            self.block = layout.block(self.array)

    def deliver(self) -> Array:
        """Copy where that is still to be done, and give the array; asks for no memory."""
        array: Array = self.array
        if self._copied:
            _where.copy_into(array, self._from)
        return array


def _order(x: Array) -> tuple[int, ...]:
    """All axes of `x` in the order in which they, or those of a copy, lie in memory."""
    order = _memory_order(x)
    if order is None:
        order = _where.memory_order(x) if _where.on_device(x) else _memory_order(np.empty_like(x, subok=False))
        order = [d for d in order or [] if x.shape[d] != 1]
    return tuple(d for d in range(x.ndim) if d not in order) + tuple(order)


def _memory_order(x: Array) -> list[int] | None:
    """Axes longer than 1, outermost first, where they fill one block; None where there are gaps or repeats."""
    order = sorted((d for d in range(x.ndim) if x.shape[d] != 1), key=lambda d: -x.strides[d])
    block = x.itemsize
    for d in reversed(order):
        if x.strides[d] != block:
            return None
        block *= x.shape[d]
    return order
