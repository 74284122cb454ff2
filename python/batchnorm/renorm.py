"""Batch Renormalization: training output corrected towards what running statistics would give.

With σ_B = √(var_B + eps) of the batch (var_B biased) and σ = √(running_var + eps):

    r = σ_B/σ and d = (mean_B - running_mean)/σ, both clipped,    y = (x̂·r + d)·gamma + beta,

where r and d are constants to the gradient. Source: Ioffe (2017), "Batch Renormalization", algorithm 1. Implementations
disagree; `parity` says whose rules hold:

==================== ============================ ============================ ===================================
parity               "paper"                      "keras" (Keras 3)            "torchrl" (BatchRenorm1d)
==================== ============================ ============================ ===================================
what is averaged     σ                            σ                            var_B·N/(N - 1), N = samples (axis 0)
lower clip of r      1/r_max                      r_min, 0 unless given        1/r_max
warm-up              r_max and d_max by step      the caller's                 r and d mixed with 1 and 0 by `weight`
a usual schedule     ``RenormSchedule.paper()``   ``.constant(inf, inf)``      ``.torchrl()``
==================== ============================ ============================ ===================================

All three add eps inside the root and evaluate by (x - running_mean)/√(running_var + eps): that is `normalize`. Where σ is
what is averaged, it is kept as running_var = max(σ² - eps, 0); the floor is Keras's. Keras averages a second time, at
a rate of its own, for evaluation: call `renorm_update_running` once for each pair. In torchrl's code the weight of the
warm-up goes on growing past 1; `RenormSchedule.torchrl` holds it at 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm import _core, _validate
from batchnorm._validate import Gradient, Parity
from batchnorm.functional import (
    Combined,
    Gradients,
    PerChannel,
    Saved,
    batch_norm_backward,
    normalize,
    update_running,
)
from batchnorm.moments import Moments
from batchnorm.moments import moments as moments_of

Array = NDArray[Any]
Points = tuple[tuple[int, float], ...]


class RenormLimits(NamedTuple):
    """The limits of one step: r_max >= 1, d_max >= 0, and the weight >= 0 of the correction (1: all of it)."""

    r_max: float
    d_max: float
    weight: float = 1.0


@dataclass(frozen=True)
class RenormSchedule:
    """Limits as functions of the training step: lines between points (step, value), constant before and after.

    Parameters
    ----------
    r_max, d_max, weight : tuples of (step, value), steps rising from 0 or more. r_max >= 1, d_max >= 0, weight >= 0;
        infinity only in a tuple of one point.

    Calling it with a step (int >= 0, training calls so far) gives that step's `RenormLimits`. The step is the caller's
    state; a schedule never changes.

    Raises
    ------
    TypeError, ValueError
        For points that do not fit.

    Examples
    --------
    >>> schedule = RenormSchedule.paper()
    >>> schedule(0)
    RenormLimits(r_max=1.0, d_max=0.0, weight=1.0)
    >>> schedule(15_000)
    RenormLimits(r_max=1.5714285714285714, d_max=2.5, weight=1.0)
    """

    r_max: Points
    d_max: Points
    weight: Points = ((0, 1.0),)

    def __post_init__(self) -> None:
        for name, least in (("r_max", 1.0), ("d_max", 0.0), ("weight", 0.0)):
            object.__setattr__(self, name, _validate.schedule_points(name, getattr(self, name), least))

    def __call__(self, step: int) -> RenormLimits:
        """Give the limits of a step."""
        at = _validate.step(step)
        return RenormLimits(*(_interpolated(points, at) for points in (self.r_max, self.d_max, self.weight)))

    @classmethod
    def constant(cls, r_max: float, d_max: float) -> Self:
        """Give the same limits at every step; ``constant(1, 0)`` is batch norm, infinity does not clip."""
        return cls(((0, r_max),), ((0, d_max),))

    @classmethod
    def paper(cls) -> Self:
        """Give batch norm for 5000 steps, then r_max to 3 by step 40000 and d_max to 5 by step 25000 (section 4)."""
        return cls(((5_000, 1.0), (40_000, 3.0)), ((5_000, 0.0), (25_000, 5.0)))

    @classmethod
    def torchrl(
        cls, warmup_steps: int = 10_000, *, smooth: bool = False, r_max: float = 3.0, d_max: float = 5.0
    ) -> Self:
        """Give constant limits with a weight of 0 before `warmup_steps` (>= 0) and 1 from there, or a line between."""
        steps = _validate.step(warmup_steps, "warmup_steps")
        start = 0 if smooth else steps - 1
        weight = ((0, 1.0),) if steps == 0 else ((start, 0.0), (steps, 1.0))
        return cls(((0, r_max),), ((0, d_max),), weight)


@dataclass(frozen=True, eq=False)
class RenormSaved:
    """What `batch_renorm` leaves for its backward pass and for `renorm_update_running`.

    Attributes
    ----------
    x : the input, by reference: it must be unchanged when the backward pass reads it. None after ``out=x``.
    moments : Moments of the batch.
    running_mean, running_var : (C,) float64, copies of those before the batch.
    limits : (r_min, r_max, d_max, weight), floats.
    gamma : (C,) or None, by reference.
    axis : int >= 0, the channel axis.
    eps : float.
    parity : "paper", "keras" or "torchrl".
    samples : int, the size of axis 0.

    `r` and `d` follow from them: ``dataclasses.replace(saved, moments=merged, samples=...)`` has those of the merged.
    """

    x: Array | None
    moments: Moments
    running_mean: PerChannel
    running_var: PerChannel
    limits: _validate.Limits
    gamma: Array | None
    axis: int
    eps: float
    parity: Parity
    samples: int

    def __repr__(self) -> str:
        return _validate.summary(self)

    @property
    def r(self) -> PerChannel:
        """The correction of the spread, after clipping: (C,) float64."""
        return self._correction[0]

    @property
    def d(self) -> PerChannel:
        """The correction of the mean, after clipping: (C,) float64."""
        return self._correction[1]

    @cached_property
    def _correction(self) -> tuple[PerChannel, PerChannel]:
        return _correction(self.moments, self.running_mean, self.running_var, self.eps, self.limits)


@_validate.keywords
def batch_renorm(
    x: Array,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    r_max: float,
    d_max: float,
    weight: float = 1.0,
    r_min: float | None = None,
    parity: Parity = "paper",
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, RenormSaved]:
    """Normalize by the statistics of the batch, corrected towards the running ones (training).

    y = (x̂·r + d)·gamma + beta with r = clip(σ_B/σ, r_min, r_max), d = clip((mean_B - running_mean)/σ, -d_max, d_max),
    σ_B = √(var_B + eps), σ = √(running_var + eps), var_B biased. Where nothing is clipped, y is that of evaluation.
    Source: Ioffe (2017), "Batch Renormalization", algorithm 1.

    Parameters
    ----------
    x : ndarray, as in `batch_norm`.
    running_mean, running_var : (C,) of any floating or integer dtype, before this batch; running_var >= 0. Not changed. NaN is let
        through and stays in its channel; a channel where running_var + eps is 0 has r = 1, d = 0.
    gamma, beta : (C,) of any floating or integer dtype, or None for 1 and 0.
    r_max, d_max : limits, >= 1 and >= 0; infinity does not clip. ``r_max=1, d_max=0`` is batch norm.
    weight : finite, >= 0: r and d become 1 + (r - 1)·weight and d·weight.
    r_min : from 0 to 1; None: 1/r_max, and 0 for Keras.
    parity : "paper", "keras" or "torchrl", by the table of the module ``batchnorm.renorm``.
    axis, eps, out, num_threads : as in `batch_norm`.

    Returns
    -------
    y : shape, dtype and memory order of `x`; `out` where given. The bounds of `batch_norm`, with gamma·r and
        beta + gamma·d for gamma and beta.
    saved : RenormSaved, for `batch_renorm_backward` and `renorm_update_running`.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; for limits out of range; for one sample, or samples on the channel axis, under "torchrl".
        Nothing is written by a call that raises.

    Notes
    -----
    Memory: y, and what `moments` and `normalize` take.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0]])
    >>> y, saved = batch_renorm(x, [1.0], [4.0], r_max=3.0, d_max=5.0, eps=0.0)
    >>> y.ravel(), saved.r, saved.d             # (x - 1)/2, as evaluation has it
    (array([0., 1.]), array([0.5]), array([0.5]))
    """
    x = _validate.array("x", x)
    axis = _validate.axis(axis, x.ndim)
    eps = _validate.eps(eps)
    _validate.num_threads(num_threads)
    channels = x.shape[axis]
    center = _validate.channel_values("running_mean", running_mean, channels)
    spread = _validate.channel_values("running_var", running_var, channels)
    _validate.not_negative("running_var", spread)
    scale = _validate.optional_channel_values("gamma", gamma, channels)
    shift = _validate.optional_channel_values("beta", beta, channels)
    limits = _validate.renorm_limits(r_max, d_max, weight, r_min, parity)
    if parity == "torchrl":
        _validate.torchrl_samples(x, axis)
    if out is not None:
        apart = {"running_mean": center, "running_var": spread, "gamma": scale, "beta": shift}
        _validate.output(out, x, {"x": x}, apart)
    _validate.batch_values(x, axis)

    batch = moments_of(x, axis=axis, num_threads=num_threads)
    kept = None if gamma is None else np.asarray(gamma)
    kept_x = None if out is not None and _validate.same_memory(out, x) else x
    before = np.array(center, np.float64), np.array(spread, np.float64)
    saved = RenormSaved(kept_x, batch, *before, limits, kept, axis, eps, parity, x.shape[0])
    r, d = saved.r, saved.d
    with np.errstate(all="ignore"):
        folded = r if scale is None else scale.astype(np.float64) * r
        offset = (d if scale is None else scale * d) + (0.0 if shift is None else shift.astype(np.float64))
        # normalize takes the mean as one float64; what is left of it belongs to the offset.
        rstd = Saved(None, batch, None, axis, eps).rstd
        offset = offset - folded * rstd * batch._table[:, 2]
    y = np.empty_like(x, subok=False) if out is None else out
    results = y, saved
    normalize(x, batch.mean, batch.var(), folded, offset, axis=axis, eps=eps, out=y, num_threads=num_threads)
    return results


@_validate.keywords
def batch_renorm_backward(
    dy: Array,
    saved: RenormSaved,
    *,
    needs: Iterable[Gradient] = ("x", "gamma", "beta"),
    out: Array | None = None,
    num_threads: int | None = None,
) -> Gradients:
    """Gradients of `batch_renorm`, r and d held constant.

    dbeta = sum(dy), dgamma = sum(dy·(x̂·r + d)), dx = gamma·r·rstd·(dy - mean(dy) - x̂·mean(dy·x̂)).
    Source: Ioffe (2017), section 3.

    Parameters
    ----------
    dy : gradient of y: shape and dtype of x.
    saved : what `batch_renorm` returned, called without ``out=x``. Its x must be unchanged.
    needs, out, num_threads : as in `batch_norm_backward`.

    Returns
    -------
    Gradients(dx, dgamma, dbeta), as `batch_norm_backward` gives them; dgamma within its bound of
    sum(abs(dy·x̂·r)) + sum(abs(dy·d)).

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_backward`. Nothing is written by a call that raises.

    Notes
    -----
    Memory and threads: as `batch_norm_backward`.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0]])
    >>> y, saved = batch_renorm(x, [1.0], [4.0], r_max=3.0, d_max=5.0, eps=0.0)
    >>> dx, dgamma, dbeta = batch_renorm_backward(np.array([[1.0], [3.0]]), saved)
    >>> dgamma, dbeta                           # sum(dy·y), as gamma is 1 and beta 0
    (array([3.]), array([4.]))
    """
    _validate.instance("saved", saved, RenormSaved, "the RenormSaved of a batch_renorm call")
    _validate.instance("saved.moments", saved.moments, Moments, "Moments")
    need_x, need_gamma, need_beta = _validate.needs(needs)
    channels = saved.moments.channels
    for name in ("running_mean", "running_var"):
        _validate.channel_values(f"saved.{name}", getattr(saved, name), channels)
    r, d = saved.r, saved.d
    scale = _validate.optional_channel_values("gamma", saved.gamma, channels)
    if out is not None and isinstance(saved.x, np.ndarray):
        _validate.output(out, saved.x, {}, {"gamma": scale})  # the rest is batch_norm_backward's to check
    with np.errstate(all="ignore"):
        folded = r if scale is None else scale.astype(np.float64) * r
    asked = {"x": need_x, "gamma": need_gamma, "beta": need_gamma or need_beta}
    names = [name for name in _validate.GRADIENTS if asked[name]]
    plain = Saved(saved.x, saved.moments, folded, saved.axis, saved.eps)
    combined = Combined(_validate.float_dtype(saved.gamma), out, need_gamma, need_beta, channels)
    found = batch_norm_backward(dy, plain, needs=names, out=out, num_threads=num_threads)
    if need_gamma:
        _core.combine(combined.dgamma, r, found.dgamma, d, found.dbeta)
    if need_beta:
        _core.combine(combined.dbeta, None, found.dbeta, None, None)
    return combined.results(found.dx)


@_validate.keywords
def renorm_update_running(
    running_mean: ArrayLike, running_var: ArrayLike, saved: RenormSaved, *, update_rate: float = 0.01
) -> tuple[PerChannel, PerChannel]:
    """Give the running statistics after the batch of a `batch_renorm`, as its `parity` averages them.

    running = (1 - update_rate)·running + update_rate·batch for the mean, and for σ = √(running_var + eps) with
    running_var = max(σ² - eps, 0) (the paper, Keras), or for the variance var_B·N/(N - 1) (torchrl). Source: Ioffe (2017),
    algorithm 1, whose α is update_rate; the table of the module ``batchnorm.renorm``.

    Parameters
    ----------
    running_mean, running_var : (C,) of any floating or integer dtype, running_var >= 0. Not changed.
    saved : what `batch_renorm` returned. A channel of no values leaves its running statistics alone.
    update_rate : from 0 (leaves the bits) to 1 (stores the batch's).

    Returns
    -------
    running_mean, running_var : new (C,) float64 arrays.

    Raises
    ------
    TypeError, ValueError
        For shapes and dtypes that do not fit, a rate out of range.

    Examples
    --------
    >>> y, saved = batch_renorm(np.array([[0.0], [2.0]]), [0.0], [9.0], r_max=3.0, d_max=5.0, eps=0.0)
    >>> renorm_update_running([0.0], [9.0], saved, update_rate=0.5)        # σ from 3 to (3 + 1)/2
    (array([0.5]), array([4.]))
    """
    _validate.instance("saved", saved, RenormSaved, "the RenormSaved of a batch_renorm call")
    mean, var = update_running(running_mean, running_var, saved.moments, update_rate=update_rate, ddof=0)
    before = _validate.channel_values("running_var", running_var, saved.moments.channels).astype(np.float64)
    _validate.not_negative("running_var", before)
    rate, batch = _validate.update_rate(update_rate), saved.moments.var()
    if rate == 0:
        return mean, var
    with np.errstate(all="ignore"):
        if saved.parity == "torchrl":
            new = (1 - rate) * before + rate * (batch * saved.samples / (saved.samples - 1))
        elif rate == 1:
            new = var
        else:
            sigma = (1 - rate) * np.sqrt(before + saved.eps) + rate * np.sqrt(batch + saved.eps)
            new = np.maximum(sigma * sigma - saved.eps, 0.0)
    return mean, np.where(saved.moments.count == 0, before, new)


def _correction(
    batch: Moments, mean: Array, var: Array, eps: float, limits: _validate.Limits
) -> tuple[PerChannel, PerChannel]:
    """Give r and d of each channel, clipped and weighted."""
    r_min, r_max, d_max, weight = limits
    with np.errstate(all="ignore"):  # NaN and infinity stay in their channel
        sigma = np.sqrt(var.astype(np.float64) + eps)
        r = np.clip(np.sqrt(batch.var() + eps) / sigma, r_min, r_max)
        d = np.clip((batch.mean - mean) / sigma, -d_max, d_max)
        r, d = 1.0 + (r - 1.0) * weight, d * weight
    nothing = (sigma == 0) | (batch.count == 0)  # to renormalize against, or to renormalize
    return np.where(nothing, 1.0, r), np.where(nothing, 0.0, d)


def _interpolated(points: Points, step: int) -> float:
    if step <= points[0][0]:
        return points[0][1]
    for (a, start), (b, end) in pairwise(points):
        if step < b:
            return start + (end - start) * ((step - a) / (b - a))
    return points[-1][1]
