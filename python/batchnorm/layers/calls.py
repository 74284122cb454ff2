"""What a call of a layer is told, and what it says to its caller."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from batchnorm import _keywords, _where
from batchnorm._arrays import Array
from batchnorm._validate import Keep
from batchnorm.layers.settings import int_within

Options = Mapping[str, Any]
UseStats = Literal["batch", "running"]
USE_STATS: tuple[UseStats, ...] = get_args(UseStats)


class CallOptions(_keywords.Counted, total=False):
    """What a call of a layer may be told beside x and out."""

    segments: ArrayLike | None
    residual: Array | None
    keep: Keep | None
    use_stats: UseStats | None
    update_stats: bool | None
    domain: int | None


OF_LAYER = frozenset(("use_stats", "update_stats", "domain"))
OF_FUNCTIONS = CallOptions.__annotations__.keys() - OF_LAYER


def x_channels(x: Any, axis: int, needed: int) -> Any:
    """Give x, of a subclass as the array that it is, after refusing another number of channels.

    What else is wrong with x is the functions' to say.
    """
    if type(x) is not np.ndarray and isinstance(x, np.ndarray) and type(x) is not np.memmap:
        x = x if isinstance(x, np.ma.MaskedArray) else np.asarray(x)
    if isinstance(x, np.ndarray | _where.DeviceArray) and -x.ndim <= axis < x.ndim and x.shape[axis] != needed:
        raise ValueError(f"x must have {needed} channels on axis {axis}, got shape {x.shape}")
    return x


def domain(value: object, count: int | None) -> int:
    """Give the index of the set of statistics that a call means."""
    if count is None:
        if value is not None:
            raise ValueError(f"domain must be None in a layer built without domains, got {value!r}")
        return 0
    if value is None:
        raise TypeError(f"domain must be an int from 0 to {count - 1} in a layer of {count} domains, got None")
    return int_within("domain", value, f"from 0 to {count - 1}", 0, count - 1)


def stacklevel_of_caller() -> int:
    """Give the stacklevel of who has called the package."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").startswith("batchnorm."):
        level += 1
    return level


# Where filters may belong to a context (Python 3.14), what gives those of the present one.
_context_filters: Callable[[], list[Any]] | None = getattr(warnings, "_get_filters", None)
# The filters as they were when they were last looked at, their number, the first, and what they said.
_filters: tuple[Any, int, Any, bool] = (None, 0, None, False)


def warnings_may_raise() -> bool:
    """Tell whether a RuntimeWarning may be turned into an exception (``-W error``)."""
    global _filters
    now: Any = warnings.filters if _context_filters is None else _context_filters()
    first = now[0] if now else None
    if _filters[0] is now and _filters[1] == len(now) and _filters[2] is first:
        return _filters[3]
    may = any(action == "error" and issubclass(RuntimeWarning, kind) for action, _, kind, *_ in now)
    _filters = now, len(now), first, may
    return may
