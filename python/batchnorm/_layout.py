"""How an array with a channel axis lies in memory: as three sizes (outer, channels, inner).

The core sees a block of memory in which element (o, c, i) lies at (o*channels + c)*inner + i. Any array whose
elements fill one block in some order of the axes is such a block: NCHW is (N, C, H*W), an NCHW view of NHWC
memory is (N*H*W, C, 1). Other arrays (sliced, strided, broadcast) are copied first.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Sizes = tuple[int, int, int]


def dense(x: Array, axis: int) -> tuple[Array, Sizes]:
    """Give `x`, or a dense copy in its memory order, and its sizes from the axis `axis` (>= 0)."""
    shape = x.shape
    if x.flags.c_contiguous:
        return x, (prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :]))
    order = _memory_order(x)
    if order is None:
        x = np.copy(x, order="K", subok=False)
        order = _memory_order(x)
        assert order is not None
    if axis not in order:  # a single channel has no place of its own
        return x, (1, 1, x.size)
    at = order.index(axis)
    return x, (prod(shape[d] for d in order[:at]), shape[axis], prod(shape[d] for d in order[at + 1 :]))


def order_of_axes(x: Array) -> list[int]:
    """All axes of `x` in the order in which `dense` has them in memory, outermost first."""
    if x.flags.c_contiguous:
        return list(range(x.ndim))
    order = _memory_order(x)
    if order is None:
        order = _memory_order(np.empty_like(x, subok=False))
        assert order is not None
    return [d for d in range(x.ndim) if d not in order] + order


def begins_with_rows(x: Array, axis: int) -> bool:
    """Whether `dense` gives an outer size that is whole steps of axis 0, the outermost of all."""
    if x.flags.c_contiguous:
        return True
    order = [d for d in order_of_axes(x) if x.shape[d] > 1]
    return axis in order[1:] and order[0] == 0


def _memory_order(x: Array) -> list[int] | None:
    """Axes longer than 1, outermost first, where they fill one block; None where there are gaps or repeats."""
    order = sorted((d for d in range(x.ndim) if x.shape[d] != 1), key=lambda d: -x.strides[d])
    block = x.itemsize
    for d in reversed(order):
        if x.strides[d] != block:
            return None
        block *= x.shape[d]
    return order


def same(a: Array, b: Array) -> bool:
    """Whether two arrays of one shape lie in memory in the same way."""
    if a.strides == b.strides:
        return True
    return all(s == t or n == 1 for s, t, n in zip(a.strides, b.strides, a.shape, strict=True))


def like(x: Array, a: Array) -> Array:
    """Give `a`, or a copy that lies in memory as the dense `x` of the same shape does."""
    if same(x, a):
        return a
    copy = np.empty_like(x, subok=False)
    copy[...] = a
    return copy
