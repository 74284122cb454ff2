"""Where arrays lie, on the host or on a CUDA device, and what computes there: what the rest of the package knows of it.

An array on a device is a `DeviceArray`, which has the shape, dtype and strides of an array; what asks for its values asks
here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from batchnorm import _core
from batchnorm.cuda import launch
from batchnorm.cuda.array import DeviceArray
from batchnorm.cuda.coming import recognized
from batchnorm.cuda.driver import facts

__all__ = [
    "DeviceArray",
    "as_flags",
    "broadcast_to",
    "contiguous",
    "copy",
    "copy_into",
    "empty",
    "empty_like",
    "facts",
    "fetched",
    "given_back",
    "kept",
    "memory_order",
    "on_device",
    "on_host",
    "overlap",
    "passes",
    "recognized",
    "recognized_or_same",
    "require_host",
    "require_like",
    "require_together",
    "rows",
    "same_memory",
    "uploaded",
]

_Results = TypeVar("_Results")


class _OnDevice:
    """The passes of `_core` on a device; the threads that they are told are of the host."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: launch.run(name, *arguments[:-1])


_on_device: Any = _OnDevice()


def on_device(x: Any) -> bool:
    """Tell whether an array is in the memory of a CUDA device."""
    return type(x) is DeviceArray


def passes(x: Any) -> Any:
    """Give what computes where x is: functions of `_core`, or those of the same names on its device."""
    return _on_device if type(x) is DeviceArray else _core


def require_together(x: Any, **others: Any) -> None:
    """Refuse an array on another device than x. One of the host goes to the device of x, if it has to."""
    for name, a in others.items():
        if type(a) is not DeviceArray:
            continue
        if type(x) is not DeviceArray:
            raise ValueError(f"{name} must be on the host, as x is, got one on cuda:{a.device}")
        if a.device != x.device:
            raise ValueError(f"{name} must be on the device of x (cuda:{x.device}), got cuda:{a.device}")


def require_like(x: Any, **tensors: Any) -> None:
    """Refuse a tensor that is not where x is; None through."""
    require_together(x, **tensors)
    for name, a in tensors.items():
        if type(x) is DeviceArray and a is not None and type(a) is not DeviceArray:
            raise ValueError(f"{name} must be on the device of x (cuda:{x.device}), got one on the host")


def require_host(function: str, **arrays: Any) -> None:
    """Refuse what a function that there is on the host alone would have to take from a device."""
    for name, a in arrays.items():
        if type(a) is DeviceArray:
            raise NotImplementedError(f"{function} must have {name} on the host, got one on cuda:{a.device}")


def on_host(a: Any) -> Any:
    """Give the values of an array as one of NumPy's: itself, or a copy that waits for the device; None through."""
    return a.to_numpy() if type(a) is DeviceArray else a


def recognized_or_same(name: str, value: Any) -> Any:
    """Give an array on a device as a `DeviceArray`, and all else as it is."""
    if value is None or isinstance(value, np.ndarray):
        return value
    on_device = recognized(name, value)
    return value if on_device is None else on_device


def fetched(a: Any) -> Any:
    """Give the values of what may be an array of another library on a device as one of NumPy's; all else as it is."""
    return on_host(recognized_or_same("an array", a))


def kept(a: Any) -> Any:
    """Give what a caller knows an array as, to be kept."""
    return a.owner if type(a) is DeviceArray else a


def given_back(results: _Results, x: Any) -> _Results:
    """Give results, an array or a NamedTuple of some, as arrays of the library that x is of.

    On the host they are that, and no memory is asked for, so that this may follow a call that has written.
    """
    if type(x) is not DeviceArray:
        return results
    handed: _Results = _handed_over(results)
    return handed


def _handed_over(results: Any) -> Any:
    if type(results) is DeviceArray:
        return results.library.handed_over(results)
    if not hasattr(results, "_fields"):
        return results
    fields = {name: _handed_over(getattr(results, name)) for name in results._fields}
    if getattr(results, "dalpha", None) is not None:
        fields["dalpha"] = _handed_over(results.dalpha)
    return results._replace(**fields)


def same_memory(a: Any, b: Any) -> bool:
    """Tell whether two arrays of one shape are the same values in the same memory."""
    a, b = _addresses(a), _addresses(b)
    if a is b or not np.may_share_memory(a, b):
        return a is b
    here, there = (v.__array_interface__["data"][0] for v in (a, b))
    return here == there and all(s == t or n == 1 for s, t, n in zip(a.strides, b.strides, a.shape, strict=True))


def overlap(a: Any, b: Any) -> bool:
    """Tell whether two arrays have a byte in common. Where that is hard to know, they do."""
    a, b = _addresses(a), _addresses(b)
    if not np.may_share_memory(a, b):
        return False
    try:
        # Two strided views of one buffer are a small integer problem; a hard one counts as an overlap.
        return bool(np.shares_memory(a, b, max_work=100_000))  # type: ignore[arg-type]  # its stub knows 0 and -1
    except np.exceptions.TooHardError:
        return True


def _addresses(a: Any) -> Any:
    """Give an array whose memory may be compared with that of others, but not looked at."""
    return a._at if type(a) is DeviceArray else a


def uploaded(values: Any, like: DeviceArray) -> Any:
    """Copy an array of the host to the device of `like`."""
    return launch.uploaded(values, like)


# ---- room and copies, which NumPy makes on the host ----


def empty(x: Any, shape: Any, dtype: Any = np.float64) -> Any:
    """Make room where x is."""
    shape = shape if isinstance(shape, tuple) else (shape,)
    return launch.empty(x, shape, dtype) if type(x) is DeviceArray else np.empty(shape, dtype)


def empty_like(x: Any) -> Any:
    """Make room for what is like x, in its memory order."""
    if type(x) is not DeviceArray:
        return np.empty_like(x, subok=False)
    return launch.empty(x, x.shape, x.dtype, _dense_strides(x))


def contiguous(a: Any, dtype: Any = None) -> Any:
    """Give an array in C order, of that dtype: itself or a copy."""
    return launch.contiguous(a, dtype) if type(a) is DeviceArray else np.ascontiguousarray(a, dtype)


def copy(a: Any, dtype: Any = None) -> Any:
    """Give a copy in C order, of that dtype."""
    if type(a) is not DeviceArray:
        return np.array(a, dtype, order="C")
    return launch.copied(a, dtype)


def broadcast_to(a: Any, shape: tuple[int, ...]) -> Any:
    """Give a view that repeats axes of 1."""
    return a.broadcast_to(shape) if type(a) is DeviceArray else np.broadcast_to(a, shape)


def as_flags(a: Any) -> Any:
    """Give 1 for what is not 0, of the same dtype."""
    return launch.contiguous(a, as_flags=True) if type(a) is DeviceArray else (a != 0).astype(a.dtype)


def rows(a: Any, first: int, end: int) -> Any:
    """Give a view of the indices from `first` to `end` of axis 0."""
    return a.rows(first, end) if type(a) is DeviceArray else a[first:end]


def copy_into(to: Any, a: Any) -> None:
    """Copy values to an array of any strides."""
    if type(to) is DeviceArray:
        launch.lay_out(a, to)
    else:
        to[...] = a


def _dense_strides(x: DeviceArray) -> tuple[int, ...]:
    """Give the strides of an array that fills one block, with its axes in the order in which those of x lie."""
    strides, block = [0] * x.ndim, x.itemsize
    for d in reversed(memory_order(x)):
        strides[d] = block
        block *= x.shape[d]
    return tuple(strides)


def memory_order(x: Any) -> list[int]:
    """Give all axes, outermost first, as they lie."""
    return sorted(range(x.ndim), key=lambda d: (-abs(x.strides[d]), d))
