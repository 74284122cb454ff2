"""One value a channel that counts, in all of x or in a last ghost: it has no variance, and is normalized apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from batchnorm import _validate, _where
from batchnorm._arrays import Array
from batchnorm._parts import parts
from batchnorm.derivatives import backward
from batchnorm.forward import batch_norm, normalize
from batchnorm.layers.calls import Options
from batchnorm.layers.layer import Call, is_x, snapshot
from batchnorm.layers.statistics import merged
from batchnorm.moments import merge
from batchnorm.saved import Gradients, Saved

if TYPE_CHECKING:
    from batchnorm.layers.batch import BatchNorm

COUNTS = ("mask", "weights", "lengths")  # say which positions count
_HEAD, _TAIL = slice(0, -1), slice(-1, None)


@dataclass(frozen=True, eq=False)
class Apart:
    """Of a call that has normalized some rows of x apart from others: which, and what each has saved."""

    x: Array
    parts: tuple[tuple[slice, Saved], ...]

    def backward(self, dy: Array, *, needs: Sequence[str], out: Any, num_threads: int | None) -> Gradients:
        """Do `backward` of all rows; gradients of gamma and beta add up in float64."""
        dy, (_, first) = _validate.array_like("dy", dy, self.x), self.parts[0]
        to = out if isinstance(out, tuple) else (out, None)
        _validate.two_outputs(to, self.x, {"dy": dy, "x": self.x}, {"gamma": first.gamma}, "dx, dresidual")
        wanted = "x" in needs, "residual" in needs and first.has_residual
        whole = [
            None if not w else np.empty_like(self.x, subok=False) if a is None else a
            for a, w in zip(to, wanted, strict=True)
        ]
        wide, sums = None if first.gamma is None else first.gamma.astype(np.float64), dict[str, Any]()
        for rows, saved in self.parts:
            how: Any = {"needs": needs, "out": tuple(None if a is None else a[rows] for a in whole)}
            given = backward(dy[rows], replace(saved, gamma=wide), num_threads=num_threads, **how)
            with np.errstate(all="ignore"):
                for name in {"gamma", "beta"}.intersection(needs):
                    sums[name] = getattr(given, f"d{name}") + sums.get(name, 0.0)
        return Gradients(whole[0], sums.get("gamma"), sums.get("beta"), whole[1])


def of_one_value(layer: BatchNorm, x: Array, out: Array | None, told: Options, k: int, update: bool) -> Array | None:
    """Normalize x where one value a channel counts, in all or in a last ghost; None where it is not so."""
    settings, axis, size = layer.settings, layer.settings.axis, layer.settings.ghost_size
    if (
        not isinstance(x, np.ndarray | _where.DeviceArray)
        or not -x.ndim <= axis < x.ndim
        or told.get("segments") is not None
    ):
        return None
    axis %= x.ndim
    counts = {name: told[name] for name in COUNTS if told.get(name) is not None}
    is_one = 0 < x.size == x.shape[axis]
    if counts and size is None:
        x = _validate.array("x", x)
        is_one = is_one or parts(x, axis, {**counts, "padding": told.get("padding")})[1].has_one()
    if is_one:
        pools = update and settings.update_rate is None
        if settings.single_value == "use_running":
            return layer._by_running(x, out, told, k, pools)
        mean = layer._moments(x, counts).mean.copy()
        return layer._by_running(x, out, told, k, pools, (mean, np.zeros(settings.channels), 0.0))
    if size is None or counts or axis == 0 or x.size != len(x) * x.shape[axis]:
        return None
    if len(x) > size > 1 == len(x) % size:
        return _ghosts_and_one(layer, x, out, told, k, update)
    return None


def _ghosts_and_one(layer: BatchNorm, x: Array, out: Array | None, told: Options, k: int, update: bool) -> Array:
    """Normalize ghosts, and one value a channel behind them as `single_value` says."""
    settings, state = layer.settings, layer._state
    x = _validate.array("x", x)
    _where.require_host("a last ghost of one value with single_value", x=x)
    gamma, beta, now = snapshot(state.gamma), state.beta, state.statistics[k]
    if out is not None:
        _validate.output(out, x, {"x": x}, {"gamma": gamma, "beta": beta})
    (head, of_head), (tail, of_tail) = ((x[part], _of_rows(told, part)) for part in (_HEAD, _TAIL))
    if settings.renorm is not None:
        of_head["renorm"] = layer._renorm(now)
    of_tail.pop("ghost_size")
    one = layer._moments(tail, {})
    given, eps = (now.mean, now.var), settings.eps
    if settings.single_value == "skip":
        given, eps = (one.mean.copy(), np.zeros(settings.channels)), 0.0
    y = np.empty_like(x, subok=False) if out is None or update else out
    rest: dict[str, Any] = {"axis": settings.axis, "num_threads": settings.num_threads}
    _, ghosts = batch_norm(head, gamma, beta, eps=settings.eps, out=y[_HEAD], **rest, **of_head)
    _, last = normalize(tail, given[0], given[1], gamma, beta, eps=eps, out=y[_TAIL], save=True, **rest, **of_tail)
    assert ghosts.moments is not None
    seen = merged(ghosts.moments, settings.channels)
    pools = update and settings.update_rate is None
    seen = merge(seen, one) if pools else seen
    changes: dict[str, Any] = {"largest_size": max(state.largest_size, x.size), "batch": (k, seen, x.size)}
    if update:
        changes["statistics"] = layer._learned(state.statistics, k, seen if pools else ghosts)
    call: Call = [x, Apart(x, ((_HEAD, ghosts), (_TAIL, last)))]
    if ghosts.y is None and (ghosts.x is None or is_x(out, x)):
        call = []
    after = layer._state._replace(call=call, **changes)
    if out is not None and y is not out:
        out[...] = y
    layer._state, layer._evaluation = after, None
    return y if out is None else out


def _of_rows(told: Options, rows: slice) -> dict[str, Any]:
    """Give the options for some rows of x."""
    residual = told.get("residual")
    return {**told} if residual is None else {**told, "residual": residual[rows]}
