"""Calls of the functions for GPUs: on which stream, after what, with what memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.cuda.array import DeviceArray
from batchnorm.cuda.driver import LEGACY_STREAM, Where, module

_OFFSETS = 1  # the entry of a call that stays on the host

# Arrays that calls read or write, of libraries that may reuse their memory as soon as nobody holds it, and marks behind
# these calls: held until then.
_held: deque[tuple[int, list[DeviceArray]]] = deque()

_stream: ContextVar[int | None] = ContextVar("batchnorm.cuda.stream", default=None)


@contextmanager
def stream(stream: Any) -> Iterator[None]:
    """Launch all calls of this context on a stream; without it, on the current stream of the library of x.

    Work that is queued for the arrays elsewhere comes before, and what their libraries queue from then on comes after.

    stream : int, the address of a cudaStream_t (1 the default stream, 2 that of the thread), or an object that has it:
        ``__cuda_stream__()``, ``ptr`` or ``cuda_stream``. TypeError for others.

    >>> with stream(1):
    ...     pass  # y, saved = batch_norm(x)
    """
    token = _stream.set(_address_of(stream))
    try:
        yield
    finally:
        _stream.reset(token)


def _address_of(stream: Any) -> int:
    if hasattr(stream, "__cuda_stream__"):
        stream = stream.__cuda_stream__()[1]
    else:
        stream = getattr(stream, "ptr", getattr(stream, "cuda_stream", stream))
    if isinstance(stream, bool) or not isinstance(stream, int):
        raise TypeError(f"stream must be an int or a stream of a CUDA library, got {type(stream).__name__}")
    return stream or LEGACY_STREAM


def launch_stream(array: DeviceArray) -> int:
    """Give the stream that a call with this array as its first is launched on."""
    return _stream.get() or array.stream or LEGACY_STREAM


def run(function: str, *arguments: Any) -> None:
    """Call a function of `_cuda` with arrays as addresses; those of the host are copied to the device before."""
    first = next(a for a in _flat(arguments) if type(a) is DeviceArray)
    where = first.device, launch_stream(first)
    here = [_on_device(a, first) for a in arguments]
    arrays = [a for a in _flat(here) if type(a) is DeviceArray]
    others = {a.stream for a in arrays} - {None, where[1]}
    of = module()
    for other in others:
        of.wait_for(other, where)
    getattr(of, function)(*(_address(a) for a in here), where)
    foreign = [a for a in arrays if not a.library.reuses_in_order]
    if foreign:
        _hold(foreign, where)
    for other in others:  # what is queued there next finds what was written, and may reuse what was read
        of.wait_for(where[1], (where[0], other))


def _hold(arrays: list[DeviceArray], where: Where) -> None:
    """Hold arrays until all that has been launched is done; let those go of which it is."""
    of = module()
    _held.append((of.mark(where), arrays))
    for _ in range(len(_held)):
        try:
            mark, others = _held.popleft()
        except IndexError:  # another thread has looked meanwhile
            return
        if not of.is_past(mark):
            _held.append((mark, others))


def _flat(arguments: Any) -> Iterator[Any]:
    for a in arguments:
        if isinstance(a, tuple):
            yield from _flat(a)
        else:
            yield a


def _on_device(a: Any, like: DeviceArray) -> Any:
    if isinstance(a, np.ndarray):
        return uploaded(a, like)
    if isinstance(a, tuple):
        entries = [v if at == _OFFSETS and len(a) > 2 else _on_device(v, like) for at, v in enumerate(a)]
        return tuple(entries)
    return a


def _address(a: Any) -> Any:
    if type(a) is DeviceArray:
        return a._at
    return tuple(map(_address, a)) if isinstance(a, tuple) else a


def empty(like: DeviceArray, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> DeviceArray:
    """Make room for an array of the library of `like`."""
    room: DeviceArray = like.library.empty(shape, np.dtype(dtype), strides, like.device, launch_stream(like))
    return room


def uploaded(values: NDArray[Any], like: DeviceArray) -> DeviceArray:
    """Copy an array of the host to the device of `like`, in C order."""
    values = np.ascontiguousarray(values)
    room = empty(like, values.shape, values.dtype)
    module().copy_to_device(room._at, values, (room.device, room.stream or LEGACY_STREAM))
    return room


def lay_out(source: DeviceArray, to: DeviceArray, *, as_flags: bool = False) -> None:
    """Copy values to an array of other strides or another dtype; `as_flags`: 1 for what is not 0."""
    run("lay_out", source, to, as_flags)


def copied(a: DeviceArray, dtype: Any = None) -> DeviceArray:
    """Give a copy in C order, of that dtype."""
    room = empty(a, a.shape, a.dtype if dtype is None else dtype)
    lay_out(a, room)
    return room


def contiguous(a: DeviceArray, dtype: Any = None, *, as_flags: bool = False) -> DeviceArray:
    """Give `a` in C order and of a dtype: itself, or a copy."""
    wanted = a.dtype if dtype is None else np.dtype(dtype)
    if a.flags.c_contiguous and a.dtype == wanted and not as_flags:
        return a
    room = empty(a, a.shape, wanted)
    lay_out(a, room, as_flags=as_flags)
    return room
