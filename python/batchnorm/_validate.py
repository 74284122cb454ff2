"""The checks of array arguments, and all their error text: the argument, what was needed, what came.

Sizes, eps and variances of the C++ API are checked by the core too, for those who call it from C++.
Everything here returns its argument in the form the core wants, and changes nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_MOST_DIMENSIONS = 8
_GRADIENTS = ("x", "gamma", "beta")


def array(name: str, a: object) -> Array:
    """Refuse what is not a float32 or float64 ndarray that the core can read as it lies in memory."""
    # Subclasses may mean something else by their values (a masked array does); a memory map does not.
    if type(a) is not np.ndarray and type(a) is not np.memmap:
        raise TypeError(f"{name} must be a numpy.ndarray, got {type(a).__name__}")
    if a.dtype not in _FLOATS:
        if a.dtype.newbyteorder("=") in _FLOATS:
            raise TypeError(f"{name} must be in native byte order, got dtype {a.dtype.str}")
        raise TypeError(f"{name} must have dtype float32 or float64, got {a.dtype}")
    if not a.flags.aligned:
        raise ValueError(
            f"{name} must be aligned to its item size, got an address that is not a multiple of {a.itemsize}"
        )
    if not 1 <= a.ndim <= _MOST_DIMENSIONS:
        raise ValueError(f"{name} must have 1 to {_MOST_DIMENSIONS} dimensions, got {a.ndim}")
    return a


def array_like(name: str, a: object, x: Array) -> Array:
    """Refuse what does not also have the shape and dtype of `x`."""
    checked = array(name, a)
    if checked.shape != x.shape:
        raise ValueError(f"{name} must have shape {x.shape}, got {checked.shape}")
    if checked.dtype != x.dtype:
        raise TypeError(f"{name} must have dtype {x.dtype}, got {checked.dtype}")
    return checked


def axis(value: object, ndim: int) -> int:
    """Give the channel axis as an index from 0."""
    try:
        index = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"axis must be an int, got {_kind(value)}") from None
    if not -ndim <= index < ndim:
        raise ValueError(
            f"axis must be in [{-ndim}, {ndim - 1}] for an array of {ndim} dimensions, got {index}"
        )
    return index % ndim


def eps(value: object) -> float:
    """Give eps as a float, finite and >= 0."""
    if isinstance(value, str | bool) or not hasattr(type(value), "__float__"):
        raise TypeError(f"eps must be a number, got {_kind(value)}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:  # an int beyond float64
        number = math.inf
    if not 0 <= number < math.inf:
        raise ValueError(f"eps must be finite and >= 0, got {number}")
    return number


def channel_values(name: str, values: Any, channels: int) -> Array:
    """Give one value per channel as a contiguous float32 or float64 array; a copy only where that takes one."""
    a = np.asarray(values)
    if a.dtype.kind != "f":
        raise TypeError(f"{name} must have a floating dtype, got {a.dtype}")
    if a.shape != (channels,):
        raise ValueError(f"{name} must have shape ({channels},), got {a.shape}")
    if a.dtype in _FLOATS and a.flags.c_contiguous and a.flags.aligned:
        return a
    return np.array(a, dtype=np.float32 if a.dtype.itemsize <= 4 else np.float64)


def optional_channel_values(name: str, values: Any, channels: int) -> Array | None:
    """Let None through."""
    return None if values is None else channel_values(name, values, channels)


def variances(values: Any, channels: int) -> Array:
    """Refuse negative variances. NaN passes: it stays in its channel."""
    a = channel_values("var", values, channels)
    not_negative("var", a)
    return a


def not_negative(name: str, a: Array) -> None:
    """Refuse a negative value, naming its channel."""
    negative = a < 0
    if negative.any():
        c = int(negative.argmax())
        raise ValueError(f"{name} must be >= 0 in every channel, got {a[c]} in channel {c}")


def batch_values(x: Array, axis: int) -> None:
    """Refuse a batch of one value per channel, which has no variance. An empty one passes."""
    if x.size and x.size == x.shape[axis]:
        raise ValueError(
            f"x must have at least 2 values per channel for batch statistics, got shape {x.shape}"
        )


def num_threads(value: object) -> int:
    """Give the threads asked for, 0 standing for None."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"num_threads must be an int >= 1 or None, got {_kind(value)}")
    if value < 1:
        raise ValueError(f"num_threads must be an int >= 1 or None, got {value}")
    return min(int(value), 2**31 - 1)


def needs(names: Any) -> tuple[bool, bool, bool]:
    """Tell which of x, gamma, beta are named."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"needs must be a tuple of names, got {_kind(names)}")
    asked = tuple(names)
    for name in asked:
        if name not in _GRADIENTS:
            raise ValueError(f"needs must name some of 'x', 'gamma', 'beta', got {name!r}")
    return "x" in asked, "gamma" in asked, "beta" in asked


def output(out: object, x: Array, may_be: dict[str, Array], apart_from: dict[str, Array | None]) -> Array:
    """Refuse an `out` unlike `x`, one that cannot be written, and one that overlaps an input by part.

    `may_be` are the inputs it may be exactly; the first gives its name to the error text.
    """
    checked = array_like("out", out, x)
    if not checked.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    for d in range(checked.ndim):
        if checked.strides[d] == 0 and checked.shape[d] > 1:
            raise ValueError(f"out must have one address per value, got stride 0 on axis {d}")
    for name, a in may_be.items():
        if overlap(checked, a) and not same_memory(checked, a):
            raise ValueError(
                f"out must be {name} itself or share no memory with {name}, got a partial overlap"
            )
    for name, values in apart_from.items():
        if values is not None and overlap(checked, values):
            raise ValueError(f"out must share no memory with {name}, got an overlap")
    return checked


def instance(name: str, value: object, kind: type, text: str) -> None:
    """Refuse what is not an instance of `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {text}, got {_kind(value)}")


def same_memory(a: Array, b: Array) -> bool:
    """Tell whether two arrays of one shape are the same values in the same memory."""
    return a is b or (np.may_share_memory(a, b) and _address(a) == _address(b) and a.strides == b.strides)


def overlap(a: Array, b: Array) -> bool:
    """Tell whether two arrays have a byte in common. Where that is hard to know, they do."""
    if not np.may_share_memory(a, b):
        return False
    try:
        # Two strided views of one buffer are a small integer problem; a hard one counts as an overlap.
        return bool(np.shares_memory(a, b, max_work=100_000))  # type: ignore[arg-type]  # its stub knows 0 and -1
    except np.exceptions.TooHardError:
        return True


def _address(a: Array) -> int:
    return int(a.__array_interface__["data"][0])


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
