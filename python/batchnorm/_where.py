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
    "DeviceArray", "addresses", "as_flags", "broadcast_to", "contiguous", "copy", "copy_into", "empty", "empty_like", "facts", "given_back", "kept", "on_host", "passes",
    "memory_order", "recognized", "recognized_or_same", "require_host", "require_together",
]  # fmt: skip

_Results = TypeVar("_Results")


class _OnDevice:
    """The passes of `_core` on a device; the threads that they are told are of the host."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: launch.run(name, *arguments[:-1])


_on_device: Any = _OnDevice()


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


def require_host(function: str, **arrays: Any) -> None:
    """Refuse what a function that there is on the host alone would have to take from a device."""
    for name, a in arrays.items():
        if type(a) is DeviceArray:
            raise NotImplementedError(f"{function} must have arrays of the host, got {name} of an x on cuda:{a.device}")


def on_host(a: Any) -> Any:
    """Give the values of an array as one of NumPy's: itself, or a copy that waits for the device; None through."""
    return a.to_numpy() if type(a) is DeviceArray else a


def recognized_or_same(name: str, value: Any) -> Any:
    """Give an array on a device as a `DeviceArray`, and all else as it is."""
    if value is None or isinstance(value, np.ndarray):
        return value
    on_device = recognized(name, value)
    return value if on_device is None else on_device


def kept(a: Any) -> Any:
    """Give what a caller knows an array as, to be kept."""
    return a.owner if type(a) is DeviceArray else a


def given_back(results: _Results) -> _Results:
    """Give results, an array or a tuple of some, as arrays of the library that x is of. Nothing changes on the host."""
    if type(results) is DeviceArray:
        handed: _Results = results.library.handed_over(results)
        return handed
    if not isinstance(results, tuple) or not any(type(a) is DeviceArray for a in results):
        return results
    if hasattr(results, "_fields"):
        fields = {name: given_back(a) for name, a in zip(results._fields, results, strict=True)}
        if getattr(results, "dalpha", None) is not None:
            fields["dalpha"] = given_back(results.dalpha)  # type: ignore[attr-defined]
        replaced: _Results = results._replace(**fields)
        return replaced
    return tuple(map(given_back, results))  # type: ignore[return-value]


def addresses(a: Any) -> Any:
    """Give an array whose memory may be compared with that of others, but not looked at."""
    return a._at if type(a) is DeviceArray else a


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


def contiguous(a: Any) -> Any:
    """Give an array in C order: itself or a copy."""
    return launch.contiguous(a) if type(a) is DeviceArray else np.ascontiguousarray(a)


def copy(a: Any, dtype: Any = None) -> Any:
    """Give a copy in C order, of that dtype."""
    if type(a) is not DeviceArray:
        return np.array(a, dtype, order="C")
    room = launch.empty(a, a.shape, a.dtype if dtype is None else dtype)
    launch.lay_out(a, room)
    return room


def broadcast_to(a: Any, shape: tuple[int, ...]) -> Any:
    """Give a view that repeats axes of 1."""
    return a.broadcast_to(shape) if type(a) is DeviceArray else np.broadcast_to(a, shape)


def as_flags(a: Any) -> Any:
    """Give 1 for what is not 0, of the same dtype."""
    return launch.contiguous(a, as_flags=True) if type(a) is DeviceArray else (a != 0).astype(a.dtype)


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


def memory_order(x: DeviceArray) -> list[int]:
    """Give all axes, outermost first, as they lie."""
    return sorted(range(x.ndim), key=lambda d: (-abs(x.strides[d]), d))
