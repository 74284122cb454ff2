"""What a Saved says, checked, as the passes of derivatives want it."""

from __future__ import annotations

from math import prod
from types import NoneType
from typing import Any, TypeVar

import numpy as np

from batchnorm import _core, _passes, _validate, _where
from batchnorm._arrays import Array, Layout, PerChannel
from batchnorm._parts import Part
from batchnorm._passes import ReluMask, Standard, Statistics
from batchnorm.moments import Moments, table_of
from batchnorm.running import Renorm
from batchnorm.saved import Gradients, Saved, SecondGradients

_Results = TypeVar("_Results", Gradients, SecondGradients)


class Kept:
    """What was kept of a call for its derivatives.

    Attributes
    ----------
    x, layout, block, call, threads : what was kept, how it lies, as the core sees it, and what the core is told of it.
    statistics : the table of the batch's moments, or (mean, var) that were given.
    scale : (C,) or (S·C,) or None, what the passes take for gamma: gamma·r; where y is kept, see `_as_if_input`.
    r, d : (S·C,) or None, those of renorm.
    turn : (S·C,) or None: dgamma is turn·dscale + d·dshift.
    apart : what no output may overlap.
    """

    def __init__(self, saved: Saved, num_threads: int | None) -> None:
        _validate.instance("saved", saved, Saved, "what a forward call saved")
        self._saved = saved
        part, renorm = saved.part, saved.renorm
        if saved.x is None and saved.y is None:
            raise ValueError(
                "saved must hold x, got that of a call with out=x, which has overwritten it, or with keep=None"
            )
        self.x = _validate.array("saved.x", saved.x if saved.y is None else saved.y)
        eps = _validate.eps(saved.eps)
        _validate.instance("saved.part", part, Part, "a Part")
        self.shape = self._shape_of_channels(saved)
        self.channels = prod(self.shape)
        _validate.instance("saved.relu", saved.relu, (ReluMask, NoneType), "a ReluMask or None")
        _validate.instance("saved.layout", saved.layout, (Layout, NoneType), "a Layout or None")
        _validate.instance("saved.renorm", renorm, (Renorm, NoneType), "a Renorm or None")
        if renorm is not None:
            _validate.channel_values("saved.renorm.mean", renorm.mean, self.channels)
        self.threads = _validate.num_threads(num_threads)
        self.layout = saved.layout or Layout.of(self.x, saved.axis, by_rows=part.offsets is not None)
        if self.layout.shape != self.x.shape:
            raise ValueError(f"saved.x must have shape {self.layout.shape}, got {self.x.shape}")
        part.require(self.layout)
        needed = 0 if saved.relu is None else _core.relu_mask_bytes(self.layout.sizes)
        if saved.relu is not None and saved.relu.data.size != needed:
            raise ValueError(f"saved.relu must have {needed} bytes, got {saved.relu.data.size}")
        self.statistics: Statistics = self._statistics_of(saved)
        gamma = self.channel_values("gamma", saved.gamma)
        _where.require_together(self.x, gamma=gamma)
        self.apart: dict[str, Array | None] = {"gamma": gamma, "alpha": part.alpha}
        self.r: PerChannel | None = None if renorm is None else saved.r
        self.d: PerChannel | None = None if renorm is None else saved.d
        self.turn, self.scale = self.r, gamma if self.r is None else of_sets(_where.on_host(gamma), self.r)
        self._dtype, self._rounds = _validate.float_dtype(saved.gamma), False
        self.block = self.layout.block(self.x)
        self.call = part.call(self.layout, self.scale, None, eps, saved.given is not None)
        if saved.relu is not None:
            self.call = self.call._replace(relu=True, bits=saved.relu.data)
        if saved.y is not None:
            self._as_if_input()
        # Of each set and channel; what alpha's tangent is to those of gamma and beta (cpp/include/batchnorm/call.hpp).
        self.alpha: PerChannel | None = None
        if part.alpha is not None and not isinstance(self.statistics, tuple):
            mean, rstd = _where.on_host(self.statistics)[:, 1], saved.rstd
            self.alpha = np.resize(_where.on_host(part.alpha), rstd.shape).astype(np.float64)
            with np.errstate(all="ignore"):
                scale = 1.0 if self.scale is None else np.resize(_where.on_host(self.scale), rstd.shape)
                lift: PerChannel = -scale * rstd * mean
                self.alpha_turn, self.alpha_lift = -lift * rstd * (1 - self.alpha) * mean, lift

    @property
    def in_sets(self) -> bool:
        """Tell whether gradients of channels are made of those of each set."""
        return self.turn is not None or self.alpha is not None

    def _shape_of_channels(self, saved: Saved) -> tuple[int, ...]:
        """Give (C,), or the shape of the axes that were normalized."""
        axis, ndim = saved.axis, self.x.ndim
        if saved.part.each_position != isinstance(axis, tuple):
            raise ValueError(f"saved.axis must be {'a tuple' if saved.part.each_position else 'an int'}, got {axis!r}")
        if (_validate.axes(axis, ndim) if isinstance(axis, tuple) else _validate.axis(axis, ndim)) != axis:
            raise ValueError(f"saved.axis must be >= 0, got {axis}")
        return tuple(self.x.shape[d] for d in axis) if isinstance(axis, tuple) else (self.x.shape[axis],)

    def channel_values(self, name: str, values: Any) -> Array | None:
        """Give a value for each channel, flat; None through."""
        if isinstance(self._saved.axis, tuple):
            return _validate.optional_values_of_axes(name, values, self.shape)
        return _validate.optional_channel_values(name, values, self.channels)

    def _statistics_of(self, saved: Saved) -> Statistics:
        if saved.given is not None:
            return _validate.statistics(*saved.given, self.channels)
        _validate.instance("saved.moments", saved.moments, Moments, "Moments")
        needed = saved.part.entries(self.layout)
        if saved.moments.channels != needed:
            raise ValueError(f"saved.moments must have {needed} channels, got {saved.moments.channels}")
        table: PerChannel = table_of(saved.moments, self.x)
        return table

    def _as_if_input(self) -> None:
        """Let y stand for x: as the input of a batch normalization of mean shift and variance scale².

        x̂ = (y - shift)/scale. With rstd' = 1/abs(scale) and scale' = scale·rstd·abs(scale) its dx is that of x, and its
        x̂ has the sign of scale too much. Source of the idea: Rota Bulò, Porzi & Kontschieder (2018), "In-place activated
        BatchNorm", section 3.
        """
        self.true_scale, self.shift = self._saved.affine()
        size = np.abs(self.true_scale)
        if isinstance(self.statistics, tuple):
            self.statistics = self.shift, size * size
        else:
            known = _where.on_host(self.statistics)
            count, table = known[:, 0], np.zeros_like(known)
            table[:, 0], table[:, 1], table[:, 3] = count, np.where(count > 0, self.shift, 0.0), count * (size * size)
            self.statistics = table
        with np.errstate(all="ignore"):  # a channel that is not finite stays so
            self.scale = self.true_scale * self._saved.rstd * size
        sign = np.copysign(1.0, self.true_scale)
        self.turn = sign if self.r is None else sign * self.r
        self.call = self.call._replace(scale=self.scale, eps=0.0)

    def moments(self, verb: str) -> PerChannel:
        """Give the batch's, after refusing statistics that were given, of which there are no sums to share."""
        if self._saved.given is not None:
            raise ValueError(
                f"saved must be of statistics of the batch for {verb}, got that of statistics that were given, whose "
                "backward pass is one"
            )
        assert not isinstance(self.statistics, tuple)
        return self.statistics

    def standard(self) -> Standard:
        """Give what makes x̂ of what was kept."""
        given, part = self.statistics, self._saved.part
        rstd = part.spread(self._saved.rstd)
        given = given if isinstance(given, tuple) else part.spread(given)
        count = None if isinstance(given, tuple) else given[:, 0]
        rest = np.zeros_like(rstd)
        if self._saved.y is not None:
            with np.errstate(all="ignore"):
                return Standard(count, self.shift, rest, 1 / self.true_scale, self.true_scale, rstd)
        of = self.channels if self._saved.part.each_position else len(rstd)
        scale = np.ones(of) if self.scale is None else np.resize(self.scale, of).astype(np.float64)
        center, rest = (given[0], rest) if isinstance(given, tuple) else (given[:, 1], given[:, 2])
        if self._saved.part.about == "zero":
            center = rest = np.zeros_like(rstd)
        mean = None
        if self.alpha is not None:
            mean, center, rest = center, self.alpha * center, self.alpha * rest
        return Standard(count, center, rest, rstd, scale, rstd, mean)

    def like_x(self, name: str, a: Array) -> Array:
        """Give an array that has the shape and dtype of x and is where x is."""
        checked = _validate.array_like(name, a, self.x)
        _where.require_like(self.x, **{name: checked})
        return checked

    def like_residual(self, name: str, a: Array | None) -> Array | None:
        """Give a tangent or gradient of the residual as a block; None for none."""
        if a is None:
            return None
        if not self._saved.has_residual:
            raise ValueError(f"{name} must be None where no residual was added")
        return self.layout.block(_validate.array_like(name, a, self.x))

    def tangents(
        self, gamma_dot: Array | None, beta_dot: Array | None, turn: PerChannel | None
    ) -> tuple[Array | None, Array | None]:
        """Give those of scale and shift."""
        shift_dot, of_d = beta_dot, None if self.d is None else of_sets(gamma_dot, self.d)
        if of_d is not None and gamma_dot is not None:
            shift_dot = of_d if beta_dot is None else of_d + np.resize(beta_dot, of_d.shape)
        return None if gamma_dot is None else of_sets(gamma_dot, turn), shift_dot

    def along_alpha(self, dot: Array, scale_dot: Array | None, shift_dot: Array | None) -> tuple[Array, Array]:
        """Add what a tangent of alpha is to those of scale and shift, of each set and channel."""
        of_sets = np.resize(dot, self.alpha_turn.shape).astype(np.float64)
        added = [of_sets * self.alpha_turn, of_sets * self.alpha_lift]
        for a, given in zip(added, (scale_dot, shift_dot), strict=True):
            if given is not None:
                a += np.resize(given, a.shape)
        return added[0], added[1]

    def of_var(self, var_dot: Array | None) -> Array | None:
        """Give the tangent of the variance that was given, where y stands for x: that is times rstd·scale."""
        if var_dot is None or self._saved.y is None:
            return var_dot
        with np.errstate(all="ignore"):
            return var_dot.astype(np.float64) * self._saved.rstd * self.true_scale

    def room(self, needed: bool, *, by_core: bool = False) -> Array | None:
        """Make room for one gradient a channel: in its own dtype, where what writes it knows that."""
        known = self._dtype in (np.float32, np.float64)
        if by_core and not _where.on_device(self.x):
            known = known or _validate.is_of_core(self._dtype)
        self._rounds = not known
        # One rounding alone: by float32, of which the core makes 16 bits.
        between = np.float32 if self._dtype.itemsize == 2 and by_core else np.float64
        return _where.empty(self.x, self.shape, self._dtype if known else between) if needed else None

    def room_of_alpha(self, needed: bool) -> Array | None:
        """Make room for the gradient of alpha, where there is one."""
        alpha = self._saved.part.alpha
        if not needed or self.alpha is None:
            return None
        room: Array = _where.empty(self.x, self.channels, _validate.float_dtype(alpha))
        return room

    def wide(self, needed: bool) -> PerChannel | None:
        """Make room for what such a gradient is made of, for each set."""
        return _where.empty(self.x, self.channels * self._saved.part.sets) if needed else None

    def sum_up(self, results: Any, turn: PerChannel | None, dscale: Array | None, dshift: Array | None) -> None:
        """Write dgamma = turn·dscale + d·dshift and dbeta = dshift, summed over the sets, to gradients that have room."""
        dgamma, dbeta = results.dgamma, getattr(results, "dbeta", None)
        if dgamma is not None and dscale is not None and dgamma is not dscale:
            _passes.combine(dgamma, turn, dscale, self.d if dshift is not None else None, dshift)
        if dbeta is not None and dshift is not None and dbeta is not dshift:
            _passes.combine(dbeta, None, dshift, None, None)

    def rounded(self, results: _Results) -> _Results:
        """Give gradients of channels in the dtype of gamma, where they were not written so."""
        # What a comprehension sees would take memory here whether it is come to or not.
        return _rounded(results, self._dtype) if self._rounds else results


def _rounded(results: _Results, dtype: np.dtype[Any]) -> _Results:
    named = results._asdict()
    with np.errstate(all="ignore"):  # a float16 gradient may well over- or underflow; dx is written already
        of_channels = {n: _where.copy(a, dtype) for n, a in named.items() if n in ("dgamma", "dbeta") and a is not None}
    return results._replace(**of_channels)


def of_sets(values: Array | None, factor: PerChannel | None) -> Array | None:
    """Give values of channels times a factor of sets and channels; either may be None for 1."""
    if values is None or factor is None:
        return factor if values is None else values
    with np.errstate(all="ignore"):
        return np.resize(values.astype(np.float64), factor.shape) * factor
