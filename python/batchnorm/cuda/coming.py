"""Arrays of other libraries as `DeviceArray`: by DLPack, else by ``__cuda_array_interface__``. Nothing is copied."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchnorm.cuda.array import BFLOAT16, DeviceArray
from batchnorm.cuda.driver import LEGACY_STREAM, module
from batchnorm.cuda.libraries import library_of

_ON_CUDA = (2, 13)  # types of device in DLPack: its memory, and memory that host and device share
_KINDS = {0: "i", 1: "u", 2: "f"}
_BFLOAT, _BOOL = 4, 6


def recognized(name: str, value: Any) -> DeviceArray | None:
    """Give an array on a CUDA device as a `DeviceArray`; None for all else.

    RuntimeError where this build, this machine or its driver cannot compute there, saying which. TypeError or ValueError
    for a dtype that NumPy has no name of, and for an array that its library does not hand over.
    """
    if type(value) is DeviceArray:
        return value
    kind = type(value)
    if kind in (list, tuple, int, float):
        return None
    if hasattr(kind, "__dlpack_device__") and hasattr(kind, "__dlpack__"):
        try:
            device_type, device = value.__dlpack_device__()
        except Exception:  # noqa: BLE001 - of any library: what cannot say where it is, is on no device
            return None
        if device_type in _ON_CUDA:
            return _by_dlpack(name, value, int(device))
        return None
    if isinstance(getattr(value, "__cuda_array_interface__", None), dict):
        return _by_interface(name, value)
    return None


def _by_dlpack(name: str, value: Any, device: int) -> DeviceArray:
    of, library = module(name), library_of(value)
    of.count_devices()  # what is missing on this machine is said before the library says something else
    stream = library.stream(device)
    try:
        try:
            capsule = value.__dlpack__(stream=stream, max_version=(1, 0))
        except TypeError:  # of before version 1
            capsule = value.__dlpack__(stream=stream)
    except (BufferError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} must be an array that DLPack hands over, got: {error}") from error
    address, _, (code, bits, lanes), shape, steps, read_only, keeper = of.from_dlpack(capsule)
    dtype = _dtype(name, code, bits, lanes)
    strides = tuple(s * dtype.itemsize for s in steps)
    return DeviceArray.at_address(
        address, shape, dtype, strides, device, stream, owner=value, library=library, keeps=keeper,
        writeable=library.is_writeable and not read_only,
    )  # fmt: skip


def _dtype(name: str, code: int, bits: int, lanes: int) -> np.dtype[Any]:
    if lanes == 1 and code == _BFLOAT and bits == 16:
        return BFLOAT16
    if lanes == 1 and code == _BOOL and bits == 8:
        return np.dtype(np.bool)
    if lanes == 1 and code in _KINDS and bits in (8, 16, 32, 64) and (code != 2 or bits > 8):
        return np.dtype(f"{_KINDS[code]}{bits // 8}")
    raise TypeError(f"{name} must have a dtype of numbers, got code {code} of {bits} bits in DLPack")


def _by_interface(name: str, value: Any) -> DeviceArray:
    of = module(name)
    of.count_devices()
    interface = value.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise TypeError(f"{name} must not be a masked array, got one by __cuda_array_interface__")
    stream = interface.get("stream")
    if stream == 0:
        raise ValueError(f"{name} must not have stream 0 in __cuda_array_interface__, which could be two, got it")
    address, read_only = interface["data"]
    device = of.device_of(address) if address else 0
    library, dtype = library_of(value), np.dtype(interface["typestr"])
    if stream is None and interface.get("version", 0) < 3:
        stream = LEGACY_STREAM
    return DeviceArray.at_address(
        address, tuple(interface["shape"]), dtype, interface.get("strides"), device, stream, owner=value,
        library=library, keeps=value, writeable=library.is_writeable and not read_only,
    )  # fmt: skip
