"""Batch normalization as pure functions: statistics go in, statistics come out, nothing is remembered.

Per channel, over its m values: mean = sum(x)/m, var = sum((x - mean)²)/m (biased), rstd = 1/√(var + eps),
y = (x - mean)·rstd·gamma + beta. Where var + eps is 0, rstd is 0, so that y = beta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm import _core, _layout, _validate
from batchnorm._validate import Gradient, MaybeNone, NoOptions, Padded, Parts, WeightsAre
from batchnorm.counted import Counted, Positions, Segments, counted, dense
from batchnorm.moments import Moments

# Each function first offers its arguments to the core as they came (_core.try_...), which does the ordinary call whole.
# None says that something is not ordinary and that nothing was done: then all is checked, converted and reported here.

Array = NDArray[Any]
PerChannel = NDArray[np.float64]


@dataclass(frozen=True, eq=False, init=False)
class Saved:
    """What `batch_norm` leaves for its backward pass.

    Attributes
    ----------
    x : the input, by reference (not copied): it must be unchanged when the backward pass reads it. None after
        ``out=x``, which has overwritten it: there is no backward pass then.
    moments : Moments of the batch.
    gamma : (C,) or None, by reference.
    axis : int >= 0, the channel axis.
    eps : float.
    part : what of x was counted: None for all of it, else Positions or Segments (of `batchnorm.counted`).

    For statistics that were merged over several batches or ranks, use ``dataclasses.replace(saved, moments=merged)``:
    the backward pass takes mean, variance and count from `moments`, and `rstd` follows them.
    """

    x: Array | None
    moments: Moments
    gamma: Array | None
    axis: int
    eps: float
    part: Counted | None = None

    def __init__(
        self,
        x: Array | None,
        moments: Moments,
        gamma: Array | None,
        axis: int,
        eps: float,
        part: Counted | None = None,
    ) -> None:
        # A frozen dataclass's own __init__, which assigns past its own refusal, takes twice as long.
        fields = self.__dict__
        fields["x"], fields["moments"], fields["gamma"] = x, moments, gamma
        fields["axis"], fields["eps"], fields["part"] = axis, eps, part

    def __repr__(self) -> str:
        return _validate.summary(self)

    @cached_property
    def rstd(self) -> PerChannel:
        """1/√(var + eps) with the biased variance of `moments`: (C,) float64."""
        return _core.rstd(self.moments._table, self.eps)

    @property
    def saved_bytes(self) -> int:
        """Bytes of tensors that are kept for the backward pass: those of x; 0 where it was overwritten."""
        return 0 if self.x is None else self.x.nbytes


class Gradients(NamedTuple):
    """Gradients of a loss: `dx` like x, `dgamma` and `dbeta` (C,); None where not asked for."""

    dx: Array | MaybeNone
    dgamma: Array | MaybeNone
    dbeta: Array | MaybeNone

    def __repr__(self) -> str:
        return _validate.summary(self)


class GradSums:
    """The sums of the first half of the backward pass; those of several parts of a batch add up with ``+``.

    Attributes
    ----------
    count : (C,) float64, values that were summed.
    sum_dy : (C,) float64, sum(dy).
    sum_dy_xmu : (C,) float64, sum(dy·(x - mean)), about the mean of the moments they were computed with.
    """

    __slots__ = ("_table", "count")

    def __init__(self, count: PerChannel, table: PerChannel) -> None:
        # The table is (C, 4): sum_dy, its low part, sum_dy_xmu, its low part. Made by grad_sums, added here.
        self._table = _validate.table("table", table, 4)
        self.count = _validate.channel_values("count", count, len(self._table))

    @property
    def sum_dy(self) -> PerChannel:
        """sum(dy), which is dbeta."""
        return self._table[:, 0] + self._table[:, 1]

    @property
    def sum_dy_xmu(self) -> PerChannel:
        """sum(dy·(x - mean)), which is dgamma/rstd."""
        return self._table[:, 2] + self._table[:, 3]

    def __add__(self, other: GradSums) -> GradSums:
        if not isinstance(other, GradSums):
            return NotImplemented
        if other._table.shape != self._table.shape:
            raise ValueError(
                f"sums must have {self._table.shape[0]} channels to be added, got {other._table.shape[0]}"
            )
        a, b = self._table, other._table
        table = np.empty_like(a)
        table[:, ::2], rounded_off = _two_sum(a[:, ::2], b[:, ::2])
        table[:, 1::2] = a[:, 1::2] + b[:, 1::2] + rounded_off
        return GradSums(self.count + other.count, table)

    def __repr__(self) -> str:
        return f"GradSums(channels={self._table.shape[0]})"


@_validate.options(Parts)
def batch_norm(
    x: Array,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    num_threads: int | None = None,
    **parts: Unpack[Parts],
) -> tuple[Array, Saved]:
    """Normalize each channel of `x` by the statistics of this batch (training).

    y = (x - mean)/√(var + eps)·gamma + beta, with the batch's mean and biased variance (divided by the m values of a
    channel). Source: Ioffe & Szegedy (2015), "Batch Normalization", algorithm 1.

    Parameters
    ----------
    x : ndarray of float16, bfloat16 (ml_dtypes), float32 or float64, 1 to 8 dimensions, any memory order. An array
        that fills one block of memory (C-contiguous, channels-last, transposed) is used in place; a sliced, strided,
        broadcast or not aligned one costs a copy. A subclass is taken by its memory, but a masked array is refused.
    gamma, beta : (C,) of any floating or integer dtype, or None for 1 and 0.
    axis : the channel axis; every other axis is summed over.
    eps : added to the variance; finite, >= 0. Frameworks differ: 1e-5 in PyTorch and Flax, 1e-3 in Keras.
    mask : bool, or integers 0 and 1: the shape of `x` without its channel axis, or with 1 there, and 1 on any axis along
        which it does not change. Statistics are those of the positions where it is True.
    weights : floats or integers >= 0 of such a shape, rounded to the dtype of `x`: mean = sum(w·x)/W, var =
        sum(w·(x - mean)²)/W, with W = sum(w), which is the moments' count. A weight of 2 counts as the position twice; what weights are only
        matters to unbiased variances (`Moments.var`).
    lengths : (N,) of int. Sample n (axis 0) counts for its first lengths[n] steps; steps are axis 2 where channels are
        axis 1, else axis 1.
    segments : (N,) of int, ids from 0 that never fall: rows (axis 0) of one id are normalized by their own
        statistics (the graphs of a batch, packed sequences). ``saved.moments`` then has one entry per id and channel,
        id first, of count 0 for those that no row has; ids are below 1024, or 8·N where that is more. At most one of
        mask, weights, lengths and segments.
    padding : what y is where the mask is False, the weight 0 or the step beyond the length: "zero" (the default of mask
        and lengths), "keep" (x itself) or "normalize" (as everywhere; the default of weights). With "zero" and "keep",
        x is not looked at there: it may hold NaN.
    out : where to put y: shape and dtype of `x`; may be `x` itself, must not overlap it otherwise. A memory order
        other than that of `x` costs a copy.
    num_threads : threads to use at most; None: `set_num_threads`, else OMP_NUM_THREADS, else all. Same bits for any.

    Returns
    -------
    y : shape, dtype and memory order of `x`; `out` where given. Within 3·2⁻²⁴ (float32) of the channel's largest
        abs(y) before beta is added, and one rounding; a constant channel gives exactly beta. For float16 and bfloat16
        the y of the same values in float32, rounded once more; computed without a float32 copy.
    saved : Saved, for `batch_norm_backward`; ``saved.moments`` updates running statistics.

    Raises
    ------
    ValueError
        For one value per channel, which has no variance; for shapes, eps, weights or out that do not fit.
    TypeError
        For other dtypes. Nothing is written by a call that raises.

    Notes
    -----
    An empty batch, and one of which nothing counts, gives moments of count 0, and y = beta wherever that is normalized.
    A segment of one value a channel has variance 0, and y = beta. NaN and infinity stay in their channel. Memory: y; while it
    runs, up to 3 KB a channel and a few percent of `x`. Releases the GIL for large `x`. `saved` keeps `x` alive.

    Examples
    --------
    >>> x = np.array([[1.0, 5.0], [3.0, 5.0]])
    >>> y, saved = batch_norm(x, eps=0.0)
    >>> y
    array([[-1.,  0.],
           [ 1.,  0.]])
    >>> saved.moments.mean, saved.moments.var()
    (array([2., 5.]), array([1., 0.]))
    """
    if not parts or _validate.no_options("batch_norm", parts):
        done = _core.try_batch_norm(_saved, x, gamma, beta, axis, eps, out, num_threads)
        if done is not None:
            return done
    return general_batch_norm(_saved, x, gamma, beta, axis, eps, parts, out, num_threads)


_Kept = TypeVar("_Kept")


def _saved(
    x: Array | None,
    table: PerChannel,
    gamma: Array | None,
    axis: int,
    eps: float,
    part: Counted | None = None,
) -> Saved:
    if part is None:
        return Saved(x, Moments._from_core(table), gamma, axis, eps)
    dof = part.importance_dof(len(table)) if isinstance(part, Positions) else None
    return Saved(x, Moments._from_core(table, dof), gamma, axis, eps, part)


# What a layer asks of the core: each is one call, and the last two ask for no memory.
ordinary_batch_norm, new_room = _core.try_batch_norm, _core.room
update_into, pool_into = _core.try_update_running, _core.pool


def general_batch_norm(
    keep: Callable[[Array | None, PerChannel, Array | None, int, float, Counted | None], _Kept],
    x: Array,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    axis: int,
    eps: float,
    parts: Mapping[str, Any],
    out: Array | None,
    num_threads: int | None,
) -> tuple[Array, _Kept]:
    """Do `batch_norm` with whatever arguments; report those that do not fit.

    keep(x, table of moments, gamma, axis, eps, part) makes what is kept for the backward pass, before the table is
    filled: once anything is written, nothing may be asked for that there might not be.
    """
    x = _validate.array("x", x)
    axis = _validate.axis(axis, x.ndim)
    eps = _validate.eps(eps)
    threads = _validate.num_threads(num_threads)
    scale = _validate.optional_channel_values("gamma", gamma, x.shape[axis])
    shift = _validate.optional_channel_values("beta", beta, x.shape[axis])
    part = counted(x, axis, **parts)
    if out is not None:
        _validate.output(out, x, {"x": x}, {"gamma": scale, "beta": shift})
    block, sizes = dense(x, axis, part)
    y = _target(out, block)
    kept = None if gamma is None else np.asarray(gamma)
    kept_x = None if out is not None and _validate.same_memory(out, x) else x
    segments = len(part.offsets) - 1 if isinstance(part, Segments) else 1
    table = _core.new_moments(segments * sizes[1])
    if isinstance(part, Positions):
        part = replace(part, table=table)
    results = y if out is None else out, keep(kept_x, table, kept, axis, eps, part)
    if part is None:
        _validate.batch_values(x, axis)
        _core.batch_norm(block, sizes, scale, shift, eps, y, table, threads)
    elif isinstance(part, Segments):
        offsets = part.of_outer(sizes, len(x))
        _core.segment_batch_norm(block, sizes, offsets, scale, shift, eps, y, table, threads)
    else:
        try:
            _core.weighted_batch_norm(
                block, sizes, part.weights, part.code, scale, shift, eps, y, table, threads
            )
        except ValueError:  # the core knows only of weights
            _validate.several_positions(part.source, part.weights)
            raise
    _deliver(y, out)
    return results


@_validate.options(Padded)
def normalize(
    x: Array,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    num_threads: int | None = None,
    **parts: Unpack[Padded],
) -> Array:
    """Normalize each channel of `x` by statistics that are given (inference).

    y = (x - mean)/√(var + eps)·gamma + beta. Source: Ioffe & Szegedy (2015), algorithm 2, steps 10 and 11, whose
    population variance is the unbiased one; any variance will do here, and is used as it is.

    Parameters
    ----------
    x : ndarray of float16, bfloat16 (ml_dtypes), float32 or float64, 1 to 8 dimensions, any memory order; copied only
        where `batch_norm` copies.
    mean, var : (C,) of any floating or integer dtype; var >= 0. NaN is let through and stays in its channel.
    gamma, beta : (C,) of any floating or integer dtype, or None for 1 and 0.
    axis : the channel axis.
    eps : added to var; finite, >= 0.
    mask, lengths, padding : as in `batch_norm`: what y is beside the positions that count.
    out : where to put y, as in `batch_norm`.
    num_threads : as in `batch_norm`.

    Returns
    -------
    y : shape, dtype and memory order of `x`; `out` where given. Each channel's y is within 3·2⁻²⁴ (float32) of its
        largest abs(y) before beta is added, and one rounding, however large mean/std is.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; for a negative variance. One value per channel is fine here. Nothing is written by a call
        that raises.

    Notes
    -----
    Memory: y; while it runs, up to 1 KB a channel. Releases the GIL for large `x`.

    Examples
    --------
    >>> normalize(np.array([[1.0, 5.0]]), mean=[0.0, 5.0], var=[4.0, 1.0], beta=[0.0, 2.0], eps=0.0)
    array([[0.5, 2. ]])
    """
    if not parts or _validate.no_options("normalize", parts):
        done = _core.try_normalize(x, mean, var, gamma, beta, axis, eps, out, num_threads)
        if done is not None:
            return done

    x = _validate.array("x", x)
    axis = _validate.axis(axis, x.ndim)
    eps = _validate.eps(eps)
    threads = _validate.num_threads(num_threads)
    channels = x.shape[axis]
    center = _validate.channel_values("mean", mean, channels)
    spread = _validate.variances(var, channels)
    scale = _validate.optional_channel_values("gamma", gamma, channels)
    shift = _validate.optional_channel_values("beta", beta, channels)
    part = _padded(x, axis, **parts)
    if out is not None:
        apart = {"mean": center, "var": spread, "gamma": scale, "beta": shift}
        _validate.output(out, x, {"x": x}, apart)
    block, sizes = _layout.dense(x, axis)
    y = _target(out, block)
    if part is None:
        _core.normalize(block, sizes, center, spread, scale, shift, eps, y, threads)
    else:
        _core.weighted_normalize(
            block, sizes, part.weights, part.code, center, spread, scale, shift, eps, y, threads
        )
    return _deliver(y, out)


@_validate.options(NoOptions)
def batch_norm_backward(
    dy: Array,
    saved: Saved,
    *,
    needs: Iterable[Gradient] = ("x", "gamma", "beta"),
    out: Array | None = None,
    num_threads: int | None = None,
    **others: Unpack[NoOptions],
) -> Gradients:
    """Gradients of `batch_norm`, through the batch's statistics.

    With x̂ = (x - mean)·rstd and means over the m values of a channel:

        dbeta = sum(dy),    dgamma = sum(dy·x̂),    dx = gamma·rstd·(dy - mean(dy) - x̂·mean(dy·x̂)).

    With weights w of sum W:  dx = gamma·rstd·(dy - w/W·sum(dy) - w/W·x̂·sum(dy·x̂)),  and beside the positions that
    count, dx is 0 and dy is left out of the sums where y was 0 (``padding="zero"``), dx is dy where y was x ("keep").

    Source: Ioffe & Szegedy (2015), section 3, simplified.

    Parameters
    ----------
    dy : gradient of y: shape and dtype of x. A memory order other than that of x costs a copy.
    saved : what `batch_norm` returned, called without ``out=x``. Its x must be unchanged.
    needs : which of "x", "gamma", "beta" to compute.
    out : where to put dx: shape and dtype of x; may be `dy` or x itself, must not overlap them otherwise.
    num_threads : as in `batch_norm`.

    Returns
    -------
    Gradients(dx, dgamma, dbeta): dx like x; dgamma and dbeta (C,) in the dtype of gamma (float64 where that is None or
    integers); None where not asked for. Each within 4·2⁻²⁴ (float32) of the sum of its absolute terms; 6·2⁻²⁴ with weights other
    than 0 and 1.

    Raises
    ------
    TypeError, ValueError
        For a dy or out unlike x, and unknown names in `needs`. Nothing is written by a call that raises.

    Notes
    -----
    An empty batch gives an empty dx, and zeros. Memory: dx; while it runs, up to 3 KB a channel
    and a few percent of x. Releases the GIL for large x.

    Examples
    --------
    >>> y, saved = batch_norm(np.array([[1.0], [3.0], [8.0]]), np.array([2.0]))
    >>> dx, dgamma, dbeta = batch_norm_backward(np.array([[1.0], [0.0], [0.0]]), saved)
    >>> dx.round(4), dbeta
    (array([[ 0.2177],
           [-0.3048],
           [ 0.0871]]), array([1.]))
    """
    if others:
        _validate.no_options("batch_norm_backward", others)
    if type(saved) is Saved and type(saved.moments) is Moments and saved.part is None:
        table, gamma, axis, eps = saved.moments._table, saved.gamma, saved.axis, saved.eps
        done = _core.try_batch_norm_backward(
            Gradients, dy, saved.x, table, gamma, axis, eps, needs, out, num_threads
        )
        if done is not None:
            return done

    x = _input_of(saved)
    need_x, need_gamma, need_beta = _validate.needs(needs)
    threads = _validate.num_threads(num_threads)
    dy = _validate.array_like("dy", dy, x)
    scale = _validate.optional_channel_values("gamma", saved.gamma, x.shape[saved.axis])
    if out is not None:
        _validate.output(out, x, {"dy": dy, "x": x}, {"gamma": scale})
    part = saved.part
    block, sizes = dense(x, saved.axis, part)
    dx = _target(out, block) if need_x else None
    grad, table = _layout.like(block, dy), saved.moments._table
    dgamma = new_gradient(saved.gamma, sizes[1]) if need_gamma else None
    dbeta = new_gradient(saved.gamma, sizes[1]) if need_beta else None
    results = Prepared(Gradients(_final(dx, out), dgamma, dbeta), saved.gamma, (dx, out))
    wanted = (scale, saved.eps, dx, dgamma, dbeta, threads)
    if part is None:
        _core.batch_norm_backward(grad, block, sizes, table, *wanted)
    elif isinstance(part, Segments):
        offsets = part.of_outer(sizes, len(x))
        _core.segment_batch_norm_backward(grad, block, sizes, offsets, table, *wanted)
    else:
        _core.weighted_batch_norm_backward(grad, block, sizes, part.weights, part.code, table, *wanted)
    return results.delivered()


@_validate.options(Padded)
def normalize_backward(
    dy: Array,
    x: Array,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    needs: Iterable[Gradient] = ("x", "gamma", "beta"),
    out: Array | None = None,
    num_threads: int | None = None,
    **parts: Unpack[Padded],
) -> Gradients:
    """Gradients of `normalize`, whose statistics are constants (frozen statistics, fine-tuning).

    With rstd = 1/√(var + eps): dbeta = sum(dy), dgamma = sum(dy·(x - mean))·rstd, dx = gamma·rstd·dy.

    Parameters
    ----------
    dy : gradient of y: shape and dtype of `x`.
    x : what was normalized. Read only for dgamma.
    mean, var, gamma, axis, eps, mask, lengths, padding : what `normalize` was given.
    needs, out, num_threads : as in `batch_norm_backward`.

    Returns
    -------
    Gradients(dx, dgamma, dbeta), as `batch_norm_backward` gives them.

    Raises
    ------
    TypeError, ValueError
        As `normalize` and `batch_norm_backward`. Nothing is written by a call that raises.

    Notes
    -----
    Memory: dx; while it runs, up to 3 KB a channel and a few percent of `x`. Releases the GIL for large `x`.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0]])
    >>> normalize_backward(np.ones_like(x), x, mean=[1.0], var=[4.0], eps=0.0)
    Gradients(dx=array([[0.5],
           [0.5]]), dgamma=array([1.]), dbeta=array([2.]))
    """
    if not parts or _validate.no_options("normalize_backward", parts):
        done = _core.try_normalize_backward(
            Gradients, dy, x, mean, var, gamma, axis, eps, needs, out, num_threads
        )
        if done is not None:
            return done

    x = _validate.array("x", x)
    axis = _validate.axis(axis, x.ndim)
    eps = _validate.eps(eps)
    need_x, need_gamma, need_beta = _validate.needs(needs)
    threads = _validate.num_threads(num_threads)
    dy = _validate.array_like("dy", dy, x)
    channels = x.shape[axis]
    center = _validate.channel_values("mean", mean, channels)
    spread = _validate.variances(var, channels)
    scale = _validate.optional_channel_values("gamma", gamma, channels)
    part = _padded(x, axis, **parts)
    if out is not None:
        _validate.output(out, x, {"dy": dy, "x": x}, {"mean": center, "var": spread, "gamma": scale})
    block, sizes = _layout.dense(x, axis)
    dx = _target(out, block) if need_x else None
    grad = _layout.like(block, dy)
    dgamma = new_gradient(gamma, sizes[1]) if need_gamma else None
    dbeta = new_gradient(gamma, sizes[1]) if need_beta else None
    results = Prepared(Gradients(_final(dx, out), dgamma, dbeta), gamma, (dx, out))
    wanted = (center, spread, scale, eps, dx, dgamma, dbeta, threads)
    if part is None:
        _core.normalize_backward(grad, block, sizes, *wanted)
    else:
        _core.weighted_normalize_backward(grad, block, sizes, part.weights, part.code, *wanted)
    return results.delivered()


@_validate.options(NoOptions)
def update_running(
    running_mean: ArrayLike,
    running_var: ArrayLike,
    moments: Moments,
    *,
    update_rate: float = 0.1,
    ddof: int = 1,
    weights_are: WeightsAre | None = None,
    **others: Unpack[NoOptions],
) -> tuple[PerChannel, PerChannel]:
    """Give the running statistics after one more batch.

    running = (1 - update_rate)·running + update_rate·batch, for the mean and for the variance m2/(count - ddof), in
    float64. PyTorch calls update_rate momentum; the momentum of Keras, Flax and ONNX is 1 - update_rate.

    Parameters
    ----------
    running_mean, running_var : (C,) of any floating or integer dtype. Not changed.
    moments : of the batch: ``saved.moments``, say. A channel of count 0 leaves its running statistics alone.
    update_rate : from 0 (leaves the bits) to 1 (stores the batch's).
    ddof : 1 for the unbiased variance (PyTorch), 0 for the biased one (Keras, Flax, ONNX).
    weights_are : "counts" or "importance", as in `Moments.var`; to be given for ddof=1 of weights other than 0 and 1.

    Returns
    -------
    running_mean, running_var : new (C,) float64 arrays.

    Raises
    ------
    TypeError, ValueError
        For shapes and dtypes that do not fit, a rate out of range, a batch of fewer than `ddof` + 1 values, or of a sum of
        weights below that where they are counts.

    Examples
    --------
    >>> y, saved = batch_norm(np.array([[1.0], [3.0]]))
    >>> update_running([0.0], [1.0], saved.moments, update_rate=0.5)
    (array([1.]), array([1.5]))
    """
    if others:
        _validate.no_options("update_running", others)
    if type(moments) is Moments and weights_are is None:
        done = _core.try_update_running(
            running_mean, running_var, moments._table, update_rate, ddof, None, False
        )
        if done is not None:
            return done

    _validate.instance("moments", moments, Moments, "Moments")
    mean = _validate.channel_values("running_mean", running_mean, moments.channels)
    var = _validate.channel_values("running_var", running_var, moments.channels)
    mean, var = mean.astype(np.float64, copy=False), var.astype(np.float64, copy=False)
    rate, ddof = _validate.update_rate(update_rate), _validate.ddof(ddof)
    table, counted_ddof = moments._divided(ddof, weights_are)
    if moments._dof is not None:
        _validate.weights_leave_variance(moments.count, moments._dof, ddof, weights_are)
    return _core.update_running(mean, var, table, rate, counted_ddof)


@_validate.keywords
def grad_sums(dy: Array, saved: Saved, *, num_threads: int | None = None) -> GradSums:
    """First half of `batch_norm_backward`: the sums over the batch that it needs.

    Between the halves, the sums of several parts of a batch (ranks, micro-batches) may be added. All parts must have
    been summed about the same mean: that of the merged moments.

    Parameters
    ----------
    dy, saved, num_threads : as in `batch_norm_backward`.

    Returns
    -------
    GradSums: sum(dy) and sum(dy·(x - mean)) per channel, float64.

    Raises
    ------
    TypeError, ValueError
        For a dy unlike x.

    Examples
    --------
    >>> y, saved = batch_norm(np.array([[1.0], [3.0]]))
    >>> grad_sums(np.array([[1.0], [2.0]]), saved).sum_dy_xmu
    array([1.])
    """
    x = _input_of(saved)
    threads = _validate.num_threads(num_threads)
    dy = _validate.array_like("dy", dy, x)
    block, sizes = _layout.dense(x, saved.axis)
    grad, part = _layout.like(block, dy), _not_segments(saved)
    if part is None:
        table = _core.grad_sums(grad, block, sizes, saved.moments._table, threads)
        return GradSums(np.full(sizes[1], float(sizes[0] * sizes[2])), table)
    table = _core.weighted_grad_sums(
        grad, block, sizes, part.weights, part.code, saved.moments._table, threads
    )
    return GradSums(np.full(sizes[1], part.total), table)


@_validate.keywords
def grad_input(
    dy: Array, saved: Saved, sums: GradSums, *, out: Array | None = None, num_threads: int | None = None
) -> Array:
    """Second half of `batch_norm_backward`: dx from sums that may have been added over parts of the batch.

    dx = gamma·rstd·(dy - S/n - x̂·rstd·D/n), with S = sums.sum_dy, D = sums.sum_dy_xmu, n = saved.moments.count.

    Parameters
    ----------
    dy, saved, out, num_threads : as in `batch_norm_backward`.
    sums : GradSums over all the values that `saved.moments` counts.

    Returns
    -------
    dx : shape, dtype and memory order of x; `out` where given.

    Raises
    ------
    TypeError, ValueError
        For a dy or out unlike x, and sums over another number of values than the moments have.

    Examples
    --------
    >>> y, saved = batch_norm(np.array([[1.0], [3.0], [8.0]]))
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> bool((grad_input(dy, saved, grad_sums(dy, saved)) == batch_norm_backward(dy, saved).dx).all())
    True
    """
    x = _input_of(saved)
    _validate.instance("sums", sums, GradSums, "GradSums")
    threads = _validate.num_threads(num_threads)
    dy = _validate.array_like("dy", dy, x)
    scale = _validate.optional_channel_values("gamma", saved.gamma, x.shape[saved.axis])
    if out is not None:
        _validate.output(out, x, {"dy": dy, "x": x}, {"gamma": scale})
    needed = saved.moments.count
    if sums.count.shape != needed.shape or (sums.count != needed).any():
        raise ValueError("sums must count the values that saved.moments count, got others")
    block, sizes = _layout.dense(x, saved.axis)
    dx = _target(out, block)
    grad, part, table = _layout.like(block, dy), _not_segments(saved), saved.moments._table
    if part is None:
        _core.grad_input(grad, block, sizes, table, sums._table, scale, saved.eps, dx, threads)
    else:
        _core.weighted_grad_input(
            grad, block, sizes, part.weights, part.code, table, sums._table, scale, saved.eps, dx, threads
        )
    return _deliver(dx, out)


def _input_of(saved: Saved) -> Array:
    """Give the x of `saved`, whose fields may have been replaced since `batch_norm` made it."""
    _validate.instance("saved", saved, Saved, "the Saved of a batch_norm call")
    x = _validate.saved_input(saved.x, saved.axis, saved.eps)
    _validate.instance("saved.moments", saved.moments, Moments, "Moments")
    needed = x.shape[saved.axis]
    if saved.part is not None:
        _validate.instance("saved.part", saved.part, (Positions, Segments), "Positions, Segments or None")
        if isinstance(saved.part, Segments):
            needed *= len(saved.part.offsets) - 1
    if saved.moments.channels != needed:
        raise ValueError(f"saved.moments must have {needed} channels, got {saved.moments.channels}")
    return x


def _padded(x: Array, axis: int, **parts: Unpack[Padded]) -> Positions | None:
    """Give the positions that are normalized by statistics that are given; None for all."""
    part = counted(x, axis, **parts)
    assert not isinstance(part, Segments)
    return None if part is not None and part.padding == "normalize" else part


def _not_segments(saved: Saved) -> Positions | None:
    if isinstance(saved.part, Segments):
        raise TypeError(
            "saved must be of one set of statistics for the halves of the backward pass, got that of segments"
        )
    return saved.part


def _target(out: Array | None, block: Array) -> Array:
    """Where the core writes: `out` if it lies in memory as the input does, else an array that does."""
    if out is not None and _layout.same(block, out):
        return out
    return np.empty_like(block, subok=False)


def _final(result: Array | None, out: Array | None) -> Array | None:
    """Where what the core writes to `result` is in the end."""
    return result if result is None or out is None else out


def _deliver(result: Array, out: Array | None) -> Array:
    if out is None or result is out:
        return result
    out[...] = result
    return out


_AnyGradients = TypeVar("_AnyGradients", bound=tuple[Any, ...])


class Prepared(Generic[_AnyGradients]):
    """What a backward pass returns, made before it writes: afterwards nothing may be asked for that there might not be.

    copies : what the core writes to, and where that is to go in the end, either of which may be None.
    """

    def __init__(
        self, results: _AnyGradients, gamma: ArrayLike | None, *copies: tuple[Array | None, Array | None]
    ) -> None:
        self._results, self._gamma = results, gamma
        self._copies = [(a, o) for a, o in copies if a is not None and o is not None and a is not o]
        self._rounds = gamma is not None and not _validate.is_of_core(_validate.float_dtype(gamma))

    def delivered(self) -> _AnyGradients:
        """Give the results, once the core has written."""
        if self._copies:
            for result, out in self._copies:
                out[...] = result
        return self._rounded() if self._rounds else self._results

    def _rounded(self) -> _AnyGradients:
        named: Any = self._results
        per_channel = [name for name in named._fields if name in ("dgamma", "dbeta")]
        rounded: _AnyGradients = named._replace(
            **{name: _like_gamma(getattr(named, name), self._gamma) for name in per_channel}
        )
        return rounded


class Combined:
    """Gradients whose dgamma and dbeta are made of those that another backward pass gives, by ``_core.combine``.

    As `Prepared`, for that pass writes dx to `out`. The room is in the dtype of the results, or float64.
    """

    def __init__(
        self, dtype: np.dtype[Any], out: Array | None, need_gamma: bool, need_beta: bool, channels: int
    ) -> None:
        self._dtype, self._out = dtype, out
        self._rounds = dtype not in (np.float32, np.float64)
        room = np.dtype(np.float64) if self._rounds else dtype
        self.dgamma = np.empty(channels, room) if need_gamma else None
        self.dbeta = np.empty(channels, room) if need_beta else None
        self._results = Gradients(out, self.dgamma, self.dbeta)

    def results(self, dx: Array | None) -> Gradients:
        """Give them with that dx."""
        # What a comprehension sees would take memory whether it is come to or not.
        return self._results if not self._rounds and dx is self._out else self._rounded(dx)

    def _rounded(self, dx: Array | None) -> Gradients:
        rounded = (None if a is None else _rounded(a, self._dtype) for a in (self.dgamma, self.dbeta))
        return Gradients(dx, *rounded)


def new_gradient(gamma: ArrayLike | None, channels: int) -> Array:
    """Room for one value a channel in the dtype of gamma; in float64 where that is None, or a dtype the core has not."""
    dtype = _validate.float_dtype(gamma)
    return np.empty(channels, dtype if _validate.is_of_core(dtype) else np.float64)


def _like_gamma(gradient: Array | None, gamma: ArrayLike | None) -> Array | None:
    """Give a gradient, float32 or float64 as it was computed, in the dtype of gamma; as it is where that is None."""
    return gradient if gradient is None or gamma is None else _rounded(gradient, _validate.float_dtype(gamma))


def _rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    if values.dtype == dtype:
        return values
    with np.errstate(all="ignore"):  # a float16 gradient may well over- or underflow; dx is written already
        return values.astype(dtype)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Give a + b and what that addition rounded off (Knuth's TwoSum); 0 where the sum is not finite."""
    with np.errstate(all="ignore"):  # infinities and NaN stay in their channel
        total = a + b
        part = total - a
        return total, np.where(np.isfinite(total), (a - (total - part)) + (b - part), 0.0)
