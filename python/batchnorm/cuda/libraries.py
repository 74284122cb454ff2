"""The libraries whose arrays come in: their current stream, and more arrays of their kind. None is imported here."""

from __future__ import annotations

import sys
from math import prod
from typing import Any

import numpy as np

from batchnorm.cuda.array import DeviceArray, Memory
from batchnorm.cuda.driver import LEGACY_STREAM


class Library:
    """One of which only the protocols are known: its arrays are ready on the default stream, results are `DeviceArray`."""

    is_writeable = True
    # Whether the library orders all by its current stream, which users keep in order with others themselves: arrays are
    # ready there, and memory that nobody holds is reused there, when what was launched before is done.
    reuses_in_order = False

    def stream(self, device: int) -> int:
        """Give the stream that the library computes on now."""
        return LEGACY_STREAM

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...] | None, device: int, stream: int
    ) -> DeviceArray:
        """Make room for an array that is then written on `stream`; strides in bytes, None for C order."""
        memory = Memory(prod(shape) * dtype.itemsize, (device, stream))
        at = memory.address, shape, dtype, strides
        return DeviceArray.at_address(*at, device, stream, library=self, keeps=memory)

    def handed_over(self, array: DeviceArray) -> Any:
        """Give an array as one of the library, after its values were launched."""
        return array.owner


class Torch(Library):
    """PyTorch."""

    reuses_in_order = True

    def stream(self, device: int) -> int:
        """Give torch.cuda.current_stream()."""
        return sys.modules["torch"].cuda.current_stream(device).cuda_stream or LEGACY_STREAM

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...] | None, device: int, stream: int
    ) -> DeviceArray:
        """Make room by torch.empty_strided, in its caching allocator."""
        torch = sys.modules["torch"]
        steps = _c_order(shape) if strides is None else tuple(s // dtype.itemsize for s in strides)
        tensor = torch.empty_strided(shape, steps, dtype=getattr(torch, dtype.name), device=f"cuda:{device}")
        at = tensor.data_ptr(), shape, dtype, strides
        return DeviceArray.at_address(*at, device, None, owner=tensor, library=self)


class CuPy(Library):
    """CuPy."""

    reuses_in_order = True

    def stream(self, device: int) -> int:
        """Give cupy.cuda.get_current_stream()."""
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(device):
            return cupy.cuda.get_current_stream().ptr or LEGACY_STREAM

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...] | None, device: int, stream: int
    ) -> DeviceArray:
        """Make room by cupy.cuda.alloc, in its memory pool."""
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(device):
            memory = cupy.cuda.alloc(max(prod(shape) * dtype.itemsize, 1))
            array = cupy.ndarray(shape, dtype, memory, strides=strides)
        return DeviceArray.at_address(memory.ptr, shape, dtype, strides, device, None, owner=array, library=self)


class Jax(Library):
    """JAX, whose arrays do not change, so that none is ever written to: results are memory of our own, which it takes."""

    is_writeable = False

    def handed_over(self, array: DeviceArray) -> Any:
        """Give jax.dlpack.from_dlpack() of it."""
        return array.owner if array.owner is not array else sys.modules["jax"].dlpack.from_dlpack(array)


_OTHER, _JAX = Library(), Jax()
_BY_MODULE: dict[str, Library] = {"torch": Torch(), "cupy": CuPy(), "jaxlib": _JAX, "jax": _JAX}


def library_of(value: object) -> Library:
    """Tell whose array it is, by the module of its type."""
    return _BY_MODULE.get(type(value).__module__.partition(".")[0], _OTHER)


def _c_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[d + 1 :]) for d in range(len(shape)))
