"""Memory of a device as an array: shape, dtype and strides, and ways in and out; values stay where they are."""

from __future__ import annotations

import sys
from math import prod
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from batchnorm.cuda.driver import LEGACY_STREAM, Where, module

_CUDA = 2  # the type of device, in DLPack
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}
_BFLOAT = 4
_NO_ADDRESS = 256  # of nothing


class bfloat(np.void):  # type: ignore[misc]  # NumPy does let it
    """Two bytes that are a bfloat16, where ml_dtypes is not there to say so."""


BFLOAT16: np.dtype[Any] = np.dtype((bfloat, 2))


class Memory:
    """Memory of a device that is given back, in the order of the stream it was asked for on, when nobody holds it."""

    __slots__ = ("_address", "_release", "_where")

    def __init__(self, size: int, where: Where) -> None:
        of = module()
        self._where, self._release = where, of.release
        self._address = of.allocate(size, where) if size else 0

    @property
    def address(self) -> int:
        """Where it begins; of no bytes anywhere."""
        return self._address or _NO_ADDRESS

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("memory of a device must be copied as an array")  # it would be given back twice

    def __del__(self) -> None:
        if getattr(self, "_address", 0):
            self._release(self._address, self._where)


class DeviceArray:
    """An array in the memory of a CUDA device.

    What results are where x is of no library that could make more of its kind (PyTorch, CuPy, JAX); other libraries take
    it by DLPack or ``__cuda_array_interface__`` without a copy. It has the shape, dtype and strides of an array, and no
    arithmetic. `to_numpy` and ``np.asarray`` copy it to the host and wait until it has been computed.

    Attributes
    ----------
    device : int, the device's number.
    owner : the array of another library that this is a view of, or itself.
    """

    __slots__ = ("__weakref__", "_at", "_keeps", "_owner", "_stream", "device", "library")

    def __init__(
        self, at: NDArray[Any], device: int, stream: int | None, *, owner: object = None, library: Any = None,
        keeps: object = None,
    ) -> None:  # fmt: skip
        # An array of NumPy's whose address is one of the device: nobody may look at its values.
        self._at = at
        self.device, self._stream, self.library = device, stream, library
        self._owner, self._keeps = owner, keeps

    @classmethod
    def at_address(
        cls, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...] | None, *of: Any,
        writeable: bool = True, **others: Any,
    ) -> Self:  # fmt: skip
        """Give the array at an address; strides in bytes, None for C order."""
        return cls(_stand_in(address, shape, dtype, strides, writeable), *of, **others)

    @property
    def owner(self) -> Any:
        """What this is a view of; itself where it has memory of its own."""
        return self if self._owner is None else self._owner

    @property
    def stream(self) -> int | None:
        """The address of the stream on which its values are computed, None where they are.

        Of a library that orders all by its current stream (PyTorch, CuPy) that one.
        """
        in_order = self.library is not None and self.library.reuses_in_order
        return self.library.stream(self.device) if in_order else self._stream

    # ---- as an array ----

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self._at.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one index of an axis to the next."""
        return self._at.strides

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype; bfloat16 is one of two bytes of that name."""
        return self._at.dtype

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return self._at.ndim

    @property
    def size(self) -> int:
        """How many values there are."""
        return self._at.size

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return self._at.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self._at.nbytes

    @property
    def flags(self) -> Any:
        """How it lies, as NumPy tells: ``c_contiguous``, ``aligned``, ``writeable``."""
        return self._at.flags

    def __len__(self) -> int:
        return len(self._at)

    def __copy__(self) -> DeviceArray:
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: Any) -> DeviceArray:
        from batchnorm.cuda.launch import copied

        return copied(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a DeviceArray must be copied to the host to be pickled: write to_numpy()")

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype.name}, device=cuda:{self.device})"

    def transpose(self, axes: Any) -> Self:
        """Give a view with other axes first."""
        return self._view(self._at.transpose(axes))

    def reshape(self, shape: Any) -> Self:
        """Give a view of another shape. ValueError where that would take a copy."""
        view = self._at.view()
        view.shape = shape
        return self._view(view)

    def broadcast_to(self, shape: tuple[int, ...]) -> Self:
        """Give a view that repeats axes of 1."""
        return self._view(np.broadcast_to(self._at, shape))

    def rows(self, first: int, end: int) -> Self:
        """Give a view of the indices from `first` to `end` of axis 0."""
        return self._view(self._at[first:end])

    def _view(self, at: NDArray[Any]) -> Self:
        return type(self)(at, self.device, self._stream, library=self.library, keeps=(self._keeps, self._owner))

    # ---- to the host and to other libraries ----

    def to_numpy(self) -> NDArray[Any]:
        """Copy to the host; waits until the values have been computed."""
        from batchnorm.cuda.launch import contiguous

        source = contiguous(self)
        values = np.empty(self.shape, self.dtype)
        module().copy_to_host(values, source._at, (self.device, source.stream or LEGACY_STREAM))
        if self.dtype == BFLOAT16 and "ml_dtypes" in sys.modules:
            values = values.view(sys.modules["ml_dtypes"].bfloat16)
        return values

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("an array on a device must be copied to be one of NumPy's, got copy=False")
        return self.to_numpy().astype(self.dtype if dtype is None else dtype, copy=False)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, self.device

    def __dlpack__(
        self, *, stream: int | None = None, max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None, copy: bool | None = None,
    ) -> Any:  # fmt: skip
        if stream == 0:
            raise ValueError("stream must not be 0, which could be two: 1 is the default stream, 2 that of the thread")
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"an array on cuda:{self.device} must stay there, got device {dl_device}")
        if copy:
            raise BufferError("an array is handed over as it lies, got copy=True")
        of = module()
        consumer = LEGACY_STREAM if stream is None else stream
        if consumer != -1 and self.stream is not None and consumer != self.stream:
            of.wait_for(self.stream, (self.device, consumer))
        kind = _BFLOAT if self.dtype.name == "bfloat16" else _KINDS[self.dtype.kind]
        strides = [s // self.itemsize for s in self.strides]
        versioned = max_version is not None and max_version[0] >= 1
        of_type, address = (kind, 8 * self.itemsize), self._address()
        return of.to_dlpack(address, self.device, of_type, list(self.shape), strides, self, versioned)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype.name == "bfloat16":
            raise AttributeError("__cuda_array_interface__ has no bfloat16, which DLPack has")
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self._address() if self.size else 0, not self.flags.writeable),
            "strides": self.strides,
            "stream": self.stream,
            "version": 3,
        }

    def _address(self) -> int:
        address: int = self._at.__array_interface__["data"][0]
        return address


class _Interface:
    """What NumPy makes a view of."""

    def __init__(self, **fields: Any) -> None:
        self.__array_interface__ = {"version": 3, **fields}


def _stand_in(
    address: int, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...] | None, writeable: bool
) -> NDArray[Any]:
    if not prod(shape):
        address, strides = address or _NO_ADDRESS, None
    is_bfloat16 = dtype.kind == "V"
    text = "|V2" if is_bfloat16 else dtype.str
    at = np.asarray(_Interface(shape=shape, typestr=text, strides=strides, data=(address, not writeable)))
    return at.view(dtype) if is_bfloat16 else at
