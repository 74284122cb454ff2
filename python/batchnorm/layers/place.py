"""Where the state of a layer lies: it follows x, to a device and back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from batchnorm import _where
from batchnorm._where import DeviceArray
from batchnorm.layers.statistics import Statistics
from batchnorm.moments import Moments, moments_at

if TYPE_CHECKING:
    from batchnorm.layers.layer import Layer, State

Place = tuple[Any, int]  # a library and a device; None is the host


def follow(layer: Layer, x: Any) -> Any:
    """Bring parameters and statistics to where x is; give x as the functions take it.

    From the host that is queued before what follows; back to it, it waits for the device.
    """
    there = _where.recognized_or_same("x", x)
    place = (there.library, there.device) if type(there) is DeviceArray else None
    if place != layer._place:
        layer._state, layer._place = state_at(layer._state, there if place else None), place
    return there


def state_at(state: State, like: DeviceArray | None) -> State:
    """Give a state whose arrays are where `like` is, parameters as its library has them; None: on the host."""
    gamma, beta, alpha = (_parameter_at(a, like) for a in (state.gamma, state.beta, state.alpha))
    statistics = tuple(statistics_at(s, like) for s in state.statistics)
    return state._replace(gamma=gamma, beta=beta, alpha=alpha, statistics=statistics)


def statistics_at(statistics: Statistics, like: Any) -> Statistics:
    """Give the same statistics where `like` is."""
    pooled: Moments | None = statistics.pooled
    if pooled is not None:
        pooled = moments_at(pooled, like)
    return replace(statistics, mean=_at(statistics.mean, like), var=_at(statistics.var, like), pooled=pooled)


def beside(before: Statistics, new: Statistics) -> Statistics:
    """Give new statistics, of the host, where those before them are."""
    return statistics_at(new, before.mean) if _where.on_device(before.mean) else new


def _at(a: Any, like: DeviceArray | None) -> Any:
    if like is None:
        return _where.on_host(a)
    if type(a) is DeviceArray and a.device == like.device:
        return a
    return _where.uploaded(_where.on_host(a), like)


def _parameter_at(a: Any, like: DeviceArray | None) -> Any:
    if a is None:
        return None
    known = _where.recognized_or_same("gamma", a)
    if isinstance(known, np.ndarray) and like is None:
        return a
    if like is not None and type(known) is DeviceArray and (known.library, known.device) == (like.library, like.device):
        return a
    return _where.given_back(_at(known, like), like)
