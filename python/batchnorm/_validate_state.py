"""The checks of a layer's settings and state, and all their error text: argument, what was needed, what came.

A check returns its argument in the form the layer keeps, or raises before anything has changed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from numbers import Real
from operator import index
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchnorm import _validate
from batchnorm._validate import Activation
from batchnorm.renorm import RenormSchedule

_PARAMETER_DTYPES = ("float16", "float32", "float64")

# A low part is at most 2^-53 of its high part; the rest is room for other ways to normalize a pair.
_LOW_PART = 2.0**-48
# Derived statistics are one division of stored values: this forgives its rounding and no real difference.
_DERIVED_RTOL = 1e-12


class Entry(NamedTuple):
    """What a state must hold under one name."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# ---- settings of a layer ---------------------------------------------------------------------------------


def channels(value: object) -> int:
    """Give the number of channels as an int."""
    number = _integer("channels", value)
    if number < 0:
        raise ValueError(f"channels must be >= 0, got {number}")
    return number


def axis(value: object) -> int:
    """Accept an axis that some array could have; whether x has it is only known when x comes."""
    number = _integer("axis", value)
    if not -8 <= number <= 7:
        raise ValueError(f"axis must be from -8 to 7, got {number}")
    return number


def update_rate(value: Any) -> float | None:
    """Give the update rate as a float from 0 to 1, or None."""
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"update_rate must be a number from 0 to 1, or None, got {_kind(value)}")
    if not 0 <= value <= 1:  # type: ignore[operator]  # all real numbers compare with int
        raise ValueError(f"update_rate must be from 0 to 1, or None, got {value}")
    return float(value)


def ddof(value: object) -> int:
    """Give ddof as an int, 0 or 1."""
    number = _integer("ddof", value)
    if number not in (0, 1):
        raise ValueError(f"ddof must be 0 (biased) or 1 (unbiased), got {number}")
    return number


def flag(name: str, value: object) -> bool:
    """Give a bool, and refuse what merely looks like one."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {_kind(value)}")
    return bool(value)


def debias(value: object, rate: float | None) -> bool:
    """Give the flag, which means nothing for pooled statistics."""
    wanted = flag("debias", value)
    if wanted and rate is None:
        raise ValueError("debias must be False where update_rate is None, whose statistics have no bias")
    return wanted


def domains(value: object) -> int | None:
    """Give the number of domains, or None."""
    if value is None:
        return None
    number = _integer("domains", value)
    if number < 1:
        raise ValueError(f"domains must be >= 1 or None, got {number}")
    return number


def renorm(value: object, ghost_size: int | None, rate: float | None) -> RenormSchedule | None:
    """Give the schedule of batch renormalization, or None."""
    if value is None:
        return None
    if not isinstance(value, RenormSchedule):
        raise TypeError(f"renorm must be a RenormSchedule or None, got {_kind(value)}")
    if ghost_size is not None:
        raise ValueError(f"renorm must be None with a ghost_size, got both (ghost_size={ghost_size})")
    if rate is None:
        raise ValueError(
            "renorm must be None where update_rate is None: it corrects towards an exponential average"
        )
    return value


def activation(value: object, ghost_size: int | None, renorm: object) -> Activation | None:
    """Give None or "relu", which goes with one normalization of the whole batch alone."""
    if value is None:
        return None
    if not isinstance(value, str) or value != "relu":
        raise ValueError(f"activation must be None or 'relu', got {value!r}")
    if ghost_size is not None or renorm is not None:
        other = "ghost_size" if ghost_size is not None else "renorm"
        raise ValueError(f"activation must be None in a layer with {other}, got {value!r}")
    return "relu"


def weights_are(value: object) -> _validate.WeightsAre | None:
    """Give what weights are, or None where that is not said."""
    return None if value is None else _validate.choice("weights_are", value, _validate.WEIGHTS_ARE)


def one_value() -> ValueError:
    """Return the error for one value a channel in statistics that follow the batch."""
    return ValueError(
        "x must have at least 2 values per channel that count, to update running statistics by their variance, got 1"
    )


def parts_with_activation(names: Mapping[str, object]) -> ValueError:
    """Tell that an activation leaves nothing of x out."""
    return ValueError(f"{next(iter(names))} must be None in a layer with an activation")


def residual_without_activation() -> ValueError:
    """Tell which layers take a residual."""
    return ValueError("residual must be None in a layer without activation='relu'")


def parts_of_small_batches(names: Mapping[str, object]) -> ValueError:
    """Return the error for a mask in a layer of ghosts or renormalization."""
    return ValueError(
        f"{', '.join(names)} must be None in training with ghost_size or renorm, which take all of a batch"
    )


def update_without_renorm() -> ValueError:
    """Return the error for statistics that renormalization does not keep."""
    return ValueError(
        "update_stats must not be True with running statistics in a layer with renorm, which updates as it corrects"
    )


def domain(value: object, count: int | None) -> int:
    """Give the index of the set of statistics that a call means."""
    if count is None:
        if value is not None:
            raise ValueError(f"domain must be None in a layer built without domains, got {value!r}")
        return 0
    if value is None:
        raise TypeError(
            f"domain must be an int from 0 to {count - 1} in a layer of {count} domains, got None"
        )
    number = _integer("domain", value)
    if not 0 <= number < count:
        raise ValueError(f"domain must be from 0 to {count - 1}, got {number}")
    return number


def dtype(value: Any) -> np.dtype[Any]:
    """Give a dtype for parameters."""
    try:
        # np.dtype(None) is float64: nobody who writes None means that.
        parsed: np.dtype[Any] | None = None if value is None else np.dtype(value)
    except (TypeError, ValueError, SyntaxError):  # all mean the same: np.dtype cannot make sense of it
        parsed = None
    if parsed is None or not parsed.isnative or parsed.name not in _PARAMETER_DTYPES:
        raise TypeError(f"dtype must be float16, float32 or float64, got {value!r}")
    return parsed


# ---- what a layer is given -------------------------------------------------------------------------------


def x_channels(x: Any, axis: int, needed: int) -> Any:
    """Give x, of a subclass as the array that it is, after refusing another number of channels.

    What else is wrong with x is the functions' to say.
    """
    if type(x) is not np.ndarray and isinstance(x, np.ndarray) and type(x) is not np.memmap:
        x = x if isinstance(x, np.ma.MaskedArray) else np.asarray(x)
    if isinstance(x, np.ndarray) and -x.ndim <= axis < x.ndim and x.shape[axis] != needed:
        raise ValueError(f"x must have {needed} channels on axis {axis}, got shape {x.shape}")
    return x


def parameter(name: str, value: object, present: bool, entry: Entry) -> NDArray[Any] | None:
    """Return a copy of a layer's new gamma or beta; None exactly where the layer was built without it."""
    if not present:
        if value is not None:
            raise ValueError(f"{name} must be None in a layer built with {name}=False, got {_kind(value)}")
        return None
    return _array(name, value, entry)


def update_of_frozen() -> ValueError:
    """Return the error for a call that would update statistics that are frozen."""
    return ValueError("update_stats must not be True while the layer's statistics are frozen, got True")


def nonfinite_batch(channel: int) -> str:
    """Say what is wrong with a batch's statistics."""
    return (
        f"x must have finite statistics to update the running ones, got infinity or NaN in channel {channel}"
    )


def no_forward_call() -> RuntimeError:
    """Return the error for a backward that belongs to no call."""
    return RuntimeError(
        "backward must follow a call of the layer that left its x intact, got no such call: "
        "call the layer first, and without out=x or keep=False"
    )


# ---- state -----------------------------------------------------------------------------------------------


def state(values: object, entries: Mapping[str, Entry]) -> dict[str, NDArray[Any]]:
    """Return fresh copies of all entries of a state, after checking each on its own.

    Exactly the names of `entries`, with their shapes and dtypes; all floats finite; running_var >= 0;
    update_count >= 0, which may also be a plain int.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"state must be a mapping of names to arrays, got {_kind(values)}")
    if set(values) != set(entries):
        raise ValueError(f"state must have the entries {_names(entries)}, got {_names(values)}")
    return {name: _check_entry(name, values[name], entry) for name, entry in entries.items()}


def of_domain(
    values: object, names: Mapping[str, Entry], shared: Mapping[str, Entry], count: int, k: int
) -> dict[str, Any]:
    """Return the entries of domain `k` of a state whose statistics have one row per domain."""
    if not isinstance(values, Mapping):
        raise TypeError(f"state must be a mapping of names to arrays, got {_kind(values)}")
    part = dict(values)
    for name, entry in names.items():
        if name in part and name not in shared:
            array = part[name]
            if not isinstance(array, np.ndarray) or array.shape != (count, *entry.shape):
                came = array.shape if isinstance(array, np.ndarray) else _kind(array)
                raise ValueError(f"{name} must have shape {(count, *entry.shape)}, got {came}")
            part[name] = array[k]
    return part


def pooled_table(table: NDArray[np.float64], update_count: int) -> None:
    """Refuse moments that `update_count` batches cannot have left; count, mean, mean_lo, m2, m2_lo."""
    count, mean, mean_lo, m2, m2_lo = table.T
    if update_count == 0:
        _all_channels("running_moments", table == 0, "be 0 where update_count is 0", table)
    else:
        _all_channels("running_moments", count > 0, "have counts > 0 where update_count is not 0", count)
    _all_channels("running_moments", m2 >= 0, "have m2 >= 0", m2)
    for high, low in ((mean, mean_lo), (m2, m2_lo)):
        _all_channels(
            "running_moments",
            np.abs(low) <= _LOW_PART * np.abs(high),
            "have low parts below 2**-48 of the high",
            low,
        )


def pooled_dof(dof: NDArray[np.float64], count: NDArray[np.float64]) -> None:
    """Refuse what no weights of this sum can have left."""
    within = (dof >= 0) & (dof <= count)
    _all_channels("running_importance_dof", within, "be from 0 to the count of running_moments", dof)


def derived(name: str, given: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    """Refuse a running statistic that says something else than the pooled moments stored beside it."""
    with np.errstate(over="ignore"):  # of a difference that is far too large anyway
        agrees = np.isclose(given, expected, rtol=_DERIVED_RTOL, atol=0)
    _all_channels(name, agrees, "be what running_moments and the layer's ddof give", given)


def malformed(what: str, needed: str, came: object) -> ValueError:
    """Return the error for a file that is not a state file as this package writes it."""
    return ValueError(f"{what} must {needed}, got {came}")


def path(value: object) -> str:
    """Give a path as a str."""
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"path must be a str or os.PathLike, got {_kind(value)}")
    return os.fsdecode(value)


def _check_entry(name: str, value: object, entry: Entry) -> NDArray[Any]:
    if name in ("update_count", "ghost_count"):
        return _update_count(name, value)
    array = _array(name, value, entry)
    _all_channels(name, np.isfinite(array), "be finite", array)
    if name == "running_var":
        _all_channels(name, array >= 0, "be >= 0", array)
    return array


def _update_count(name: str, value: object) -> NDArray[np.int64]:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if isinstance(value, np.ndarray):
        if value.shape != ():
            raise ValueError(f"{name} must have shape (), got {value.shape}")
        is_integer = value.dtype.kind in "iu"
    if not is_integer:
        raise TypeError(f"{name} must be an integer, got {_kind(value)}")
    count = int(value)  # type: ignore[call-overload]
    if not 0 <= count < 2**63:
        raise ValueError(f"{name} must be from 0 to 2**63 - 1, got {count}")
    return np.array(count, np.int64)


def _array(name: str, value: object, entry: Entry) -> NDArray[Any]:
    """Return a copy of `value` as a C-contiguous array of the package's own."""
    if not isinstance(value, np.ndarray):
        write = _validate.to_write(name, value, entry.dtype)
        raise TypeError(f"{name} must be a numpy.ndarray of shape {entry.shape}{write}, got {_kind(value)}")
    if value.dtype != entry.dtype:
        raise TypeError(f"{name} must have dtype {entry.dtype}, got {value.dtype}")
    if value.shape != entry.shape:
        raise ValueError(f"{name} must have shape {entry.shape}, got {value.shape}")
    return np.array(value, order="C")


def _all_channels(name: str, holds: NDArray[np.bool_], needed: str, values: NDArray[Any]) -> None:
    """Raise for the first channel, the first axis of `values`, where `holds` is false."""
    if not holds.all():
        first = tuple(np.argwhere(~holds)[0])
        raise ValueError(f"{name} must {needed}, got {values[first]} in channel {first[0]}")


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, (bool, np.bool_)):
        try:
            return index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an int, got {_kind(value)}")


def _kind(value: object) -> str:
    """Say what came, in short whatever it is; of an array its dtype."""
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else _validate.kind(value)


def _names(keys: object) -> str:
    return ", ".join(sorted(map(str, keys))) or "none"  # type: ignore[call-overload]
