"""Running statistics, and the renormalization that corrects a batch towards them.

With σ_B = √(var_B + eps) of the batch (var_B biased) and σ = √(running_var + eps), batch renormalization is

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
a rate of its own, for evaluation: call `update_running` once for each pair. In torchrl's code the weight of the
warm-up goes on growing past 1; `RenormSchedule.torchrl` holds it at 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Self, Unpack, get_args

import numpy as np
from numpy.typing import ArrayLike

from batchnorm import _core, _keywords, _validate, _where
from batchnorm._arrays import PerChannel
from batchnorm._keywords import NoOptions
from batchnorm._validate import Parity, WeightsAre
from batchnorm.moments import Moments, merge, table_of
from batchnorm.saved import Saved

Points = tuple[tuple[int, float], ...]
Segments = Literal["each", "pooled"]
_Running = tuple[ArrayLike, ArrayLike]  # mean and var
_SEGMENTS: tuple[Segments, ...] = get_args(Segments)

# What a layer asks of the core: each is one call that asks for no memory.
update_into, pool_into, new_room = _core.try_update_running, _core.pool, _core.room
observe, standardizing = _core.try_observe, _core.standardizing


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
        infinity only in a tuple of one point. TypeError or ValueError for points that do not fit.

    Calling it with a step (int >= 0, training calls so far) gives that step's limits, for
    ``Renorm(mean, var, **schedule(step)._asdict())``. The step is the caller's state; a schedule never changes.

    >>> schedule = RenormSchedule.paper()
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
        at = _validate.int_at_least("step", step, 0)
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
        steps = _validate.int_at_least("warmup_steps", warmup_steps, 0)
        start = 0 if smooth else steps - 1
        weight = ((0, 1.0),) if steps == 0 else ((start, 0.0), (steps, 1.0))
        return cls(((0, r_max),), ((0, d_max),), weight)


@dataclass(frozen=True, eq=False, init=False)
class Renorm:
    """What `batch_norm` corrects its batch towards (``renorm=``): running statistics, and how far it may.

    r = clip(σ_B/σ, r_min, r_max), d = clip((mean_B - mean)/σ, -d_max, d_max), by the head of this module. Source: Ioffe
    (2017), "Batch Renormalization", algorithm 1.

    Parameters
    ----------
    mean, var : (C,) of any floating or integer dtype, running statistics before this batch; var >= 0. Copied, as
        float64. NaN is let through and stays in its channel; a channel where var + eps is 0 has r = 1, d = 0.
    r_max, d_max : limits, >= 1 and >= 0; infinity does not clip. ``r_max=1, d_max=0`` is batch norm.
    weight : finite, >= 0: r and d become 1 + (r - 1)·weight and d·weight.
    r_min : from 0 to 1; None: 1/r_max, and 0 for Keras.
    parity : "paper", "keras" or "torchrl", by the table of this module.
    samples : int >= 2 or None: torchrl's N where the batch was merged over ranks; None: those of each set of x.

    TypeError or ValueError for shapes, dtypes and limits that do not fit.

    >>> from batchnorm.forward import batch_norm
    >>> y, saved = batch_norm(np.array([[1.0], [3.0]]), renorm=Renorm([1.0], [4.0], 3.0, 5.0), eps=0.0)
    >>> y.ravel(), saved.r, saved.d             # (x - 1)/2, as evaluation has it
    (array([0., 1.]), array([0.5]), array([0.5]))
    """

    mean: PerChannel
    var: PerChannel
    r_max: float
    d_max: float
    weight: float = 1.0
    r_min: float | None = None
    parity: Parity = "paper"
    samples: int | None = None

    def __init__(
        self,
        mean: ArrayLike,
        var: ArrayLike,
        r_max: float,
        d_max: float,
        weight: float = 1.0,
        r_min: float | None = None,
        parity: Parity = "paper",
        samples: int | None = None,
    ) -> None:
        center = _validate.numbers("mean", mean)
        if center.ndim != 1:
            raise ValueError(f"mean must have 1 dimension, got {center.ndim}")
        center, spread = (np.array(a, np.float64) for a in _validate.statistics(center, var, center.size))
        limits = _validate.renorm_limits(r_max, d_max, weight, r_min, parity)
        if samples is not None:
            samples = _validate.int_at_least("samples", samples, 2, " or None")
        self.__dict__.update(mean=center, var=spread, parity=parity, samples=samples, **limits)

    __repr__ = _validate.summary

    def correction(self, batch: Moments, eps: float) -> tuple[PerChannel, PerChannel]:
        """Give r and d for each entry of the moments of a batch, clipped and weighted."""
        mean, var = (np.resize(a, batch.channels) for a in (self.mean, self.var))
        with np.errstate(all="ignore"):  # NaN and infinity stay in their channel
            sigma = np.sqrt(var + eps)
            r = np.clip(np.sqrt(batch.var() + eps) / sigma, self.r_min, self.r_max)
            d = np.clip((batch.mean - mean) / sigma, -self.d_max, self.d_max)
            r, d = 1.0 + (r - 1.0) * self.weight, d * self.weight
        nothing = (sigma == 0) | (batch.count == 0)  # to renormalize against, or to renormalize
        return np.where(nothing, 1.0, r), np.where(nothing, 0.0, d)


@_keywords.options(NoOptions)
def update_running(
    running_mean: ArrayLike,
    running_var: ArrayLike,
    batch: Moments | Saved,
    *,
    update_rate: float = 0.1,
    ddof: int | None = None,
    weights_are: WeightsAre | None = None,
    segments: Segments = "each",
    **others: Unpack[NoOptions],
) -> tuple[PerChannel, PerChannel]:
    """Give the running statistics after one more batch.

    running = (1 - update_rate)·running + update_rate·batch, for the mean and for the variance m2/(count - ddof), in
    float64. PyTorch calls update_rate momentum; the momentum of Keras, Flax and ONNX is 1 - update_rate.

    After a call with `renorm`, as its `parity` averages: for the mean and for σ = √(running_var + eps) with
    running_var = max(σ² - eps, 0) (the paper, Keras), or for the variance var_B·N/(N - 1) (torchrl). Source: Ioffe (2017),
    algorithm 1, whose α is update_rate (0.01 there). After one with ghosts, once for each, in their order: k of them keep
    (1 - update_rate)^k of what was, and later ones count for more. Source: Hoffer, Hubara & Soudry (2017), "Train longer,
    generalize better", algorithm 1.

    Parameters
    ----------
    running_mean, running_var : (C,) of any floating or integer dtype. Not changed. Where running_mean is on a CUDA
        device, the results are there too, and numbers of values are not looked at: too few give a variance of NaN.
    batch : what `batch_norm` saved, or Moments. A channel of count 0 leaves its running statistics alone.
    update_rate : from 0 (leaves the bits) to 1 (stores the batch's).
    ddof : 1 (None) for the unbiased variance (PyTorch), 0 for the biased one (Keras, Flax, ONNX). None with `renorm`,
        whose parity says it.
    weights_are : "counts" or "importance", as in `Moments.var`; to be given for ddof=1 of weights other than 0 and 1, unless
        the call has said it.
    segments : "each" or "pooled": an update for each segment or ghost, or one with the moments of all.

    Returns
    -------
    running_mean, running_var : new (C,) float64 arrays. Memory: some arrays of C values. TypeError or ValueError for
        shapes and dtypes that do not fit, a rate out of range, a batch of fewer than `ddof` + 1 values, or of a sum of
        weights below that where they are counts.

    Examples
    --------
    >>> from batchnorm.forward import batch_norm
    >>> y, saved = batch_norm(np.array([[1.0], [3.0]]))
    >>> update_running([0.0], [1.0], saved, update_rate=0.5)
    (array([1.]), array([1.5]))
    >>> y, saved = batch_norm(np.array([[1.0], [3.0], [10.0], [30.0]]), ghost_size=2)
    >>> update_running([0.0], [1.0], saved, update_rate=0.5, ddof=0)
    (array([10.5]), array([50.5]))
    """
    if others:
        _keywords.no_options("update_running", others)
    if segments not in _SEGMENTS:
        _validate.choice("segments", segments, _SEGMENTS)
    mean_there = _where.recognized_or_same("running_mean", running_mean)
    if _where.on_device(mean_there):
        told = {"update_rate": update_rate, "ddof": ddof, "weights_are": weights_are, "segments": segments}
        return _updated_on_device(mean_there, running_var, batch, told)
    if _where.on_device(_where.recognized_or_same("running_var", running_var)):
        raise ValueError("running_var must be on the host, as running_mean is, got one on a CUDA device")
    now: _Running = running_mean, running_var
    if type(batch) is Moments:
        return _updated(now, batch, update_rate, ddof, weights_are)
    if type(batch) is not Saved:
        _validate.instance("batch", batch, Moments, "what batch_norm saved, or Moments")
        return _updated(now, batch, update_rate, ddof, weights_are)  # type: ignore[arg-type]  # of a subclass
    if batch.moments is None:
        raise ValueError("batch must have statistics of a batch, got those of a call that they were given to")
    if not batch.part.has_own_statistics:
        raise ValueError("batch must have statistics of channels, got those of groups of channels")
    if batch.renorm is not None and ddof is not None:
        raise ValueError(f"ddof must be None after a call with renorm, whose parity says it, got {ddof}")
    said = batch.part.weights_are if weights_are is None else weights_are
    for moments, samples in _sets(batch, segments):
        if batch.renorm is None:
            now = _updated(now, moments, update_rate, ddof, said)
        else:
            now = _renorm_updated(now, moments, update_rate, batch.renorm.parity, batch.eps, samples)
    return now  # type: ignore[return-value]  # there is a set at the least


def _sets(saved: Saved, segments: Segments) -> list[tuple[Moments, int]]:
    """Give the moments and samples (indices of axis 0) of each set of a call, or of all in one.

    Where there is no set, an empty one, of which an update changes nothing but checks its arguments.
    """
    layout, offsets, moments = saved.layout, saved.part.offsets, saved.moments
    if layout is None or offsets is None:
        sets, samples = [moments], [0 if layout is None else layout.shape[0]]
    else:
        channels = layout.sizes[1]
        sets = list(moments.split(channels)) if moments.channels else [Moments.empty(channels)]
        samples = [int(n) for n in np.diff(offsets)] or [0]
        if segments == "pooled":
            sets, samples = [merge(*sets)], [layout.shape[0]]
    if saved.renorm is not None and saved.renorm.samples is not None:
        samples = [saved.renorm.samples] * len(sets)
    return list(zip(sets, samples, strict=False))


def _updated(
    now: _Running, moments: Moments, update_rate: float, ddof: int | None, weights_are: WeightsAre | None
) -> tuple[PerChannel, PerChannel]:
    ddof = 1 if ddof is None else ddof
    if weights_are is None and moments._dof is None:
        done: tuple[PerChannel, PerChannel] | None = _core.try_update_running(
            *now, moments._table, update_rate, ddof, None, False
        )
        if done is not None:
            return done
    mean, var = (
        _validate.channel_values(name, a, moments.channels).astype(np.float64, copy=False)
        for name, a in zip(("running_mean", "running_var"), now, strict=True)
    )
    rate, ddof = _validate.share("update_rate", update_rate), _validate.int_at_least("ddof", ddof, 0)
    table, counted_ddof = moments._divided(ddof, weights_are)
    if moments._dof is not None:
        _validate.weights_leave_variance(moments.count, moments._dof, ddof, weights_are)
    return _core.update_running(mean, var, table, rate, counted_ddof)


def _updated_on_device(
    mean: Any, running_var: ArrayLike, batch: Moments | Saved, told: dict[str, Any]
) -> tuple[PerChannel, PerChannel]:
    """Do `update_running` where the running statistics are, without waiting where no weights or renorm have a say."""
    var: Any = _validate.numbers("running_var", running_var)
    _where.require_like(mean, running_var=var)
    seen = batch if isinstance(batch, Moments) else getattr(batch, "moments", None)
    is_plain = isinstance(batch, Moments) or (
        type(batch) is Saved and batch.renorm is None and batch.part.has_own_statistics and told["segments"] == "each"
    )
    if seen is None or not is_plain or seen._dof is not None:
        here = update_running(_where.on_host(mean), _where.on_host(var), batch, **told)
        new_mean, new_var = (_where.given_back(_where.uploaded(a, mean), mean) for a in here)
        return new_mean, new_var
    if told["weights_are"] is not None:
        _validate.choice("weights_are", told["weights_are"], _validate.WEIGHTS_ARE)
    rate = _validate.share("update_rate", told["update_rate"])
    ddof = 1 if told["ddof"] is None else _validate.int_at_least("ddof", told["ddof"], 0)
    sets = [batch] if isinstance(batch, Moments) else [one for one, _ in _sets(batch, "each")]
    now: Any = tuple(
        _where.contiguous(_validate.channel_values(name, a, sets[0].channels), np.float64)
        for name, a in (("running_mean", mean), ("running_var", var))
    )
    for one in sets:
        new = _where.empty_like(now[0]), _where.empty_like(now[1])
        _where.passes(mean).update_running(*now, table_of(one, mean), rate, ddof, False, *new, 0)
        now = new
    return _where.given_back(now[0], mean), _where.given_back(now[1], mean)


def _renorm_updated(
    now: _Running, moments: Moments, update_rate: float, parity: Parity, eps: float, samples: int
) -> tuple[PerChannel, PerChannel]:
    moments = Moments._from_core(moments._table)  # biased, whatever weights are
    mean, var = _updated(now, moments, update_rate, 0, None)
    before = _validate.channel_values("running_var", now[1], moments.channels).astype(np.float64)
    _validate.not_negative("running_var", before)
    rate, batch = _validate.share("update_rate", update_rate), moments.var()
    if rate == 0:
        return mean, var
    with np.errstate(all="ignore"):
        if parity == "torchrl":
            new = (1 - rate) * before + rate * (batch * samples / (samples - 1))
        elif rate == 1:
            new = var
        else:
            sigma = (1 - rate) * np.sqrt(before + eps) + rate * np.sqrt(batch + eps)
            new = np.maximum(sigma * sigma - eps, 0.0)
    return mean, np.where(moments.count == 0, before, new)


def _interpolated(points: Points, step: int) -> float:
    if step <= points[0][0]:
        return points[0][1]
    for (a, start), (b, end) in pairwise(points):
        if step < b:
            return start + (end - start) * ((step - a) / (b - a))
    return points[-1][1]
