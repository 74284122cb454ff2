"""What a state must hold, entry by entry, and the errors that say what it holds instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm import _validate, _where
from batchnorm._arrays import Array
from batchnorm.layers.settings import kind
from batchnorm.state_file import Entry

COUNT = np.dtype(np.int64)  # of all entries that count something, and of no others


def of(arrays: Mapping[str, Array]) -> dict[str, Entry]:
    """Tell what a state like this must hold."""
    return {name: Entry(a.shape, a.dtype) for name, a in arrays.items()}


def checked(values: object, entries: Mapping[str, Entry]) -> dict[str, Array]:
    """Return fresh copies of all entries of a state: exactly the names of `entries`, with their shapes and dtypes.

    What counts must be >= 0, and may be any integer where it has no axes.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"state must be a mapping of names to arrays, got {kind(values)}")
    if set(values) != set(entries):
        raise ValueError(f"state must have the entries {_names(entries)}, got {_names(values)}")
    return {
        name: (_counts if entry.dtype == COUNT else array)(name, values[name], entry) for name, entry in entries.items()
    }


def parameter(name: str, value: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Return a copy of what is assigned to a parameter, where it lies: as `array`, or of a device."""
    there = None if isinstance(value, np.ndarray) else _where.recognized(name, value)
    if there is None:
        return array(name, value, Entry(shape, dtype))
    if there.dtype.name != dtype.name:
        raise TypeError(f"{name} must have dtype {dtype}, got {there.dtype.name}")
    if there.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {there.shape}")
    return _where.given_back(_where.copy(there), there)


def array(name: str, value: object, entry: Entry) -> Array:
    """Return a copy of `value` as a C-contiguous array of the package's own."""
    if not isinstance(value, np.ndarray):
        write = _validate.to_write(name, value, entry.dtype)
        raise TypeError(f"{name} must be a numpy.ndarray of shape {entry.shape}{write}, got {kind(value)}")
    if value.dtype != entry.dtype:
        raise TypeError(f"{name} must have dtype {entry.dtype}, got {value.dtype}")
    if value.shape != entry.shape:
        raise ValueError(f"{name} must have shape {entry.shape}, got {value.shape}")
    return np.array(value, order="C")


def _counts(name: str, value: Any, entry: Entry) -> NDArray[np.int64]:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if isinstance(value, np.ndarray) or entry.shape:
        if np.shape(value) != entry.shape:
            raise ValueError(f"{name} must have shape {entry.shape}, got {np.shape(value)}")
        is_integer = isinstance(value, np.ndarray) and value.dtype.kind in "iu"
    if not is_integer:
        raise TypeError(f"{name} must be an integer, got {kind(value)}")
    for count in np.ravel(value).tolist():
        if not 0 <= count < 2**63:
            raise ValueError(f"{name} must be from 0 to 2**63 - 1, got {count}")
    return np.array(value, np.int64)


def _names(keys: object) -> str:
    return ", ".join(sorted(map(str, keys))) or "none"  # type: ignore[call-overload]
