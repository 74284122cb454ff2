"""Batch normalization as pure functions: statistics go in, statistics come out, nothing is remembered.

Over the m values that share statistics: mean = sum(x)/m, var = sum((x - mean)²)/m (biased), rstd = 1/√(var + eps),
y = (x - mean)·rstd·gamma + beta. Where var + eps is 0, rstd is 0, so that y = beta.

Every combination of options is the composition of its steps: s = batch_norm(x) + residual; where a position counts
y = relu(s), and elsewhere what `padding` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike

from batchnorm import _core, _keywords, _validate, _where
from batchnorm._arrays import ORDERS, Array, Axis, Layout, PerChannel, Target
from batchnorm._parts import ALL, Part, parts, require_values, shared_by
from batchnorm._passes import Call, ReluMask
from batchnorm._validate import Activation, Keep, MaybeNone, Padding, WeightsAre
from batchnorm.moments import Moments, moments_to_be
from batchnorm.running import Renorm
from batchnorm.saved import Saved, affine

_Kept = TypeVar("_Kept")

# A call first offers its arguments to the core as they came (_core.try_...), which does the ordinary one whole. None says
# that something is not ordinary and that nothing was done: then all is checked, converted and reported here.
ordinary_batch_norm = _core.try_batch_norm


class Options(_keywords.Counted, total=False):
    """What else a normalization may be told."""

    residual: Array | None
    activation: Activation | None
    keep: Keep | None


class BatchOptions(Options, total=False):
    """What else may be told where statistics are those of the batch."""

    segments: ArrayLike | None
    ghost_size: int | None
    weights_are: WeightsAre | None
    renorm: Renorm | None


@_keywords.options(BatchOptions, keep="x")
def batch_norm(
    x: Array,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    num_threads: int | None = None,
    **options: Unpack[BatchOptions],
) -> tuple[Array, Saved]:
    """Normalize each channel of `x` by the statistics of this batch (training).

    y = (x - mean)/√(var + eps)·gamma + beta, with the batch's mean and biased variance (divided by the m values of a
    channel). Source: Ioffe & Szegedy (2015), "Batch Normalization", algorithm 1.

    An empty batch, and one of which nothing counts, gives moments of count 0, and y = beta wherever that is normalized.
    A segment of one value a channel has variance 0, and y = beta. NaN and infinity stay in their channel.

    ValueError for one value per channel (position, ghost), which has no variance; for shapes, eps, weights or out that do
    not fit; for options that exclude each other. TypeError for other dtypes. Nothing is written by a call that raises.

    Memory: y, and a bit for each element with ReLU; while it runs, up to 3 KB a channel and a few percent of `x`. Releases
    the GIL for large `x`. `saved` keeps `x` alive.

    Parameters
    ----------
    x : ndarray of float16, bfloat16 (ml_dtypes), float32 or float64, 1 to 8 dimensions, any memory order. An array
        that fills one block of memory (C-contiguous, channels-last, transposed) is used in place; a sliced, strided,
        broadcast or not aligned one costs a copy. A subclass is taken by its memory, but a masked array is refused.
        Or an array on a CUDA device, where the call is then queued: results are of its library (`batchnorm.cuda`).
    gamma, beta : (C,) of any floating or integer dtype, or None for 1 and 0.
    axis : the channel axis; every other axis is summed over.
    eps : added to the variance; finite, >= 0. Frameworks differ: 1e-5 in PyTorch and Flax, 1e-3 in Keras.
    mask : bool, or integers 0 and 1: the shape of `x` without its channel axis, or with 1 there, and 1 on any axis along
        which it does not change. Statistics are those of the positions where it is True.
    weights : floats or integers >= 0 of such a shape, rounded to the dtype of `x`: mean = sum(w·x)/W, var =
        sum(w·(x - mean)²)/W, with W = sum(w), which is the moments' count. A weight of 2 counts as the position twice.
    lengths : (N,) of int. Sample n (axis 0) counts for its first lengths[n] steps; steps are axis 2 where channels are
        axis 1, else axis 1. At most one of mask, weights and lengths.
    padding : what y is where the mask is False, the weight 0 or the step beyond the length: "zero" (the default of mask
        and lengths), "keep" (x itself) or "normalize" (as everywhere; the default of weights). With "zero" and "keep",
        x is not looked at there: it may hold NaN.
    residual : added before the activation: shape and dtype of `x`, or None.
    activation : "relu" or None. y = max(s, 0), NaN stays NaN. Source: He et al. (2016), "Deep Residual Learning for Image
        Recognition", figure 2.
    keep : "x", "y" or None, what `backward` and its like work from. "y" needs no x: with ``out=x`` nothing is kept beside
        y; but not with residual and activation, after which y does not tell x̂ = (y - beta)/gamma, whose error is
        2⁻²⁴·(4·max abs(x̂) + 2·abs(beta/gamma)) (float32): in every channel abs(beta) must be at most 2¹⁰·abs(gamma) and
        abs(gamma) from 2⁻¹²⁶ to 2¹²⁶ (float32) or from 2⁻¹⁵⁰ to 2¹⁵⁰ (float64); not for 16-bit x.
    segments : (N,) of int, ids from 0 that never fall: rows (axis 0) of one id are normalized by their own
        statistics (the graphs of a batch, packed sequences). ``saved.moments`` then has one entry per id and channel,
        id first, of count 0 for those that no row has; ids are below 1024, or 8·N where that is more.
    ghost_size : int >= 1: each ghost of so many rows has its own statistics, as ``segments=arange(N)//ghost_size`` but
        that every ghost needs 2 values a channel; the last may be smaller. Source: Hoffer, Hubara & Soudry (2017), "Train
        longer, generalize better", algorithm 1. At most one of segments and ghost_size.
    weights_are : "counts" or "importance", what weights are, for `update_running`; it changes no y.
    renorm : `Renorm`: the batch is corrected towards running statistics, y = (x̂·r + d)·gamma + beta.
    out : where to put y: shape and dtype of `x`; may be `x` or `residual` itself, must not overlap them otherwise. A memory
        order other than that of `x` costs a copy. ``out=x`` leaves no x for a backward pass.
    num_threads : threads to use at most; None: `set_num_threads`, else OMP_NUM_THREADS, else all. Same bits for any.

    Returns
    -------
    y : shape, dtype and memory order of `x`; `out` where given. Within 3·2⁻²⁴ (float32) of the channel's largest
        abs(y) before beta is added, and one rounding each of beta and of y; a constant channel gives exactly beta. A
        residual is added to the rounded value. For float16 and bfloat16 the y of the same values in float32, rounded once more.
    saved : Saved, for `backward`, `jvp`, `double_backward`, `grad_sums` and `update_running`.

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
    done = _core.try_batch_norm(ordinary_saved, x, gamma, beta, axis, eps, out, num_threads, options or None, None)
    if done is not None:
        return done
    if options:
        _keywords.no_options("batch_norm", options)
    return normalized_by_batch(same, x, gamma, beta, axis, eps, options, out, num_threads)


@overload
def normalize(
    x: Array,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    save: Literal[False] = False,
    out: Array | None = None,
    num_threads: int | None = None,
    **options: Unpack[Options],
) -> Array: ...
@overload
def normalize(
    x: Array,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    save: Literal[True],
    out: Array | None = None,
    num_threads: int | None = None,
    **options: Unpack[Options],
) -> tuple[Array, Saved]: ...
@_keywords.options(Options, keep="x")
def normalize(
    x: Array,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    save: bool = False,
    out: Array | None = None,
    num_threads: int | None = None,
    **options: Unpack[Options],
) -> Array | tuple[Array, Saved]:
    """Normalize each channel of `x` by statistics that are given (inference, frozen statistics).

    y = (x - mean)/√(var + eps)·gamma + beta. Source: Ioffe & Szegedy (2015), algorithm 2, steps 10 and 11, whose
    population variance is the unbiased one; any variance will do here, and is used as it is.

    TypeError and ValueError as in `batch_norm`, and for a negative variance. One value per channel is fine here. Memory: y;
    while it runs, up to 1 KB a channel, and as `batch_norm` for what follows. Releases the GIL for large `x`.

    Parameters
    ----------
    x : ndarray of float16, bfloat16 (ml_dtypes), float32 or float64, 1 to 8 dimensions, any memory order; copied only
        where `batch_norm` copies.
    mean, var : (C,) of any floating or integer dtype; var >= 0. NaN is let through and stays in its channel.
    gamma, beta : (C,) of any floating or integer dtype, or None for 1 and 0.
    axis : the channel axis.
    eps : added to var; finite, >= 0.
    mask, weights, lengths, padding : as in `batch_norm`: what y is beside the positions that count.
    residual, activation, keep, out, num_threads : as in `batch_norm`.
    save : whether to return what `backward` and its like take.

    Returns
    -------
    y : shape, dtype and memory order of `x`; `out` where given. Each channel's y is within 3·2⁻²⁴ (float32) of its
        largest abs(y) before beta is added, and one rounding each of beta and of y, however large mean/std is.
    saved : Saved, only with `save`.

    Examples
    --------
    >>> normalize(np.array([[1.0, 5.0]]), mean=[0.0, 5.0], var=[4.0, 1.0], beta=[0.0, 2.0], eps=0.0)
    array([[0.5, 2. ]])
    """
    if options:
        _keywords.no_options("normalize", options)
    if not save:
        done = _core.try_normalize(x, mean, var, gamma, beta, axis, eps, out, num_threads, options or None)
        if done is not None:
            return done
    of = _Forward(x, gamma, beta, axis, eps, options, out, num_threads, (mean, var))
    of.part.require_weights()
    call, saved, y = of.call(save), None, Target(of.layout, of.x, of.out)
    if save:
        saved = of.saved(None, of.part, y.array)
        if of.keep == "y":
            require_invertible(*saved.affine(), of.x)
    results = y.array if saved is None else (y.array, saved)
    _where.passes(of.x).normalize(of.layout.block(of.x), call, of.given, y.block, of.threads)
    y.deliver()
    return _where.given_back(results, of.x)


def ordinary_saved(x: Array | None, table: PerChannel, gamma: Array | None, axis: int, eps: float, *rest: Any) -> Saved:
    """Give what an ordinary call saves; of one with options the core tells more."""
    if not rest:
        return Saved(x, Moments._from_core(table), gamma, axis, eps)
    given, sizes, weights, offsets, bits, options, shares = rest
    shape, options = given.shape, options or {}
    layout = Layout(shape, ORDERS[len(shape)], sizes)
    part, saved_axis = (
        ALL if shares is None else shared_by(shares, sizes[1]),
        axis if shares is None or shares >= 0 else (axis,),
    )
    if weights is not None:
        has_mask = options.get("mask") is not None
        otherwise: Padding = "zero" if has_mask else "normalize"
        padding, source = options.get("padding") or otherwise, "mask" if has_mask else "weights"
        part = part._replace(
            weights=weights, padding=padding, source=source, weights_are=options.get("weights_are"), table=table
        )
    if offsets is not None:
        if sizes[0] != shape[0]:  # in rows, where one takes several steps
            offsets = offsets // (sizes[0] // shape[0])
        part = part._replace(offsets=offsets)
    saved = Saved(x, Moments._from_core(table, part.importance_dof(layout)), gamma, saved_axis, eps)
    others = saved.__dict__
    others["layout"], others["part"], others["has_residual"] = layout, part, options.get("residual") is not None
    if bits is not None:
        others["relu"] = ReluMask(layout, bits)
    return saved


def same(saved: Saved) -> Saved:
    """Make of what is saved nothing else."""
    return saved


def normalized_by_batch(made: Callable[[Saved], _Kept], *given: Any) -> tuple[Array, _Kept]:
    """Do `batch_norm` with whatever it was given (as `_Forward` takes it); report what does not fit.

    made(saved) makes what is returned beside y, before anything is written: then nothing may be asked for that there
    might not be.
    """
    of = _Forward(*given)
    x, part, renorm = of.x, of.part, of.options.get("renorm")
    if renorm is not None:
        _validate.instance("renorm", renorm, Renorm, "a Renorm or None")
        _validate.channel_values("renorm.mean", renorm.mean, of.channels)
    require_values(x, of.axis, of.layout, part, of.options)
    if renorm is not None:
        assert isinstance(of.axis, int)
        _validate.renorm_samples(renorm.parity, renorm.samples, x, of.axis, part.offsets)
    call, block, y = of.call(True), of.layout.block(x), Target(of.layout, x, of.out)
    table = _where.empty(x, (part.entries(of.layout), 5))
    moments, shown = moments_to_be(table, part, of.layout)
    part = part if part.weights is None else part._replace(table=shown)
    saved = of.saved(moments, part, y.array, renorm)
    results = y.array, made(saved)
    if of.keep == "y" and renorm is None:
        require_invertible(*saved.affine(), x)
    try:
        if renorm is None:
            _where.passes(x).batch_norm(block, call, y.block, table, of.threads)
        else:
            _where.passes(x).moments(block, call, table, of.threads)
            scale, shift = affine(_where.on_host(of.gamma), _where.on_host(of.beta), renorm.correction(moments, of.eps))
            if of.keep == "y":
                require_invertible(scale, shift, x)
            _where.passes(x).normalize(block, call._replace(scale=scale, shift=shift), table, y.block, of.threads)
    except ValueError:  # the core knows only of weights
        if isinstance(part.weights, np.ndarray) and part.source != "weights":
            _validate.several_positions(part.source, part.weights)
        raise
    y.deliver()
    return results if not _where.on_device(x) else (_where.given_back(results[0], x), results[1])


def given_moments(x: Array, table: PerChannel, *, axis: int, out: Array | None, num_threads: int | None) -> Array:
    """Give x normalized by moments that are known already, eps being 0."""
    of = _Forward(x, None, None, axis, 0.0, {}, out, num_threads)
    y = Target(of.layout, of.x, of.out)
    _where.passes(of.x).normalize(of.layout.block(of.x), of.call(False), table, y.block, of.threads)
    return _where.given_back(y.deliver(), of.x)


class _Forward:
    """The checked arguments of a forward call, and what it leaves."""

    given: tuple[Array, Array] | MaybeNone = None  # mean and var, where the call was given them

    def __init__(
        self,
        x: Array,
        gamma: ArrayLike | None,
        beta: ArrayLike | None,
        axis: Axis,
        eps: float,
        options: Mapping[str, Any],
        out: Array | None,
        num_threads: int | None,
        given: tuple[ArrayLike, ArrayLike] | None = None,
    ) -> None:
        self.x, self.options = _validate.array("x", x), options
        self.out = out = _where.recognized_or_same("out", out)
        apart: dict[str, Array | None] = {}
        self.axis: Axis
        if "about" in options and isinstance(axis, tuple):  # of layer_norm and its like
            self.axis, shape = axis, tuple(self.x.shape[d] for d in axis)
            self.channels = prod(shape)
            self.gamma = _validate.optional_values_of_axes("gamma", gamma, shape)
            self.beta = _validate.optional_values_of_axes("beta", beta, shape)
        else:
            self.axis = _validate.axis(axis, self.x.ndim)
            self.channels = self.x.shape[self.axis]
            self.gamma = _validate.optional_channel_values("gamma", gamma, self.channels)
            self.beta = _validate.optional_channel_values("beta", beta, self.channels)
        apart |= {"gamma": self.gamma, "beta": self.beta}
        if given is not None:
            self.given = apart["mean"], apart["var"] = _validate.statistics(*given, self.channels)
        self.eps, self.threads = _validate.eps(eps), _validate.num_threads(num_threads)
        self._given_gamma, self._given_beta = gamma, beta
        activation, residual = options.get("activation"), options.get("residual")
        if activation is not None:
            _validate.choice("activation", activation, _validate.ACTIVATIONS)
        self.relu = activation is not None
        self.residual = None if residual is None else _validate.array_like("residual", residual, self.x)
        self.keep = options.get("keep", "x")
        if self.keep is not None:
            _validate.choice("keep", self.keep, _validate.KEEPS)
        if self.keep == "y":
            _validate.y_tells_x(activation, residual, self.x)
        if out is not None:
            may_be = {"x": self.x} if self.residual is None else {"x": self.x, "residual": self.residual}
            _validate.output(out, self.x, may_be, apart)
        self.layout, self.part = parts(self.x, self.axis, options)
        others = {self.part.source: self.part.weights, "alpha": self.part.alpha}
        _where.require_together(self.x, **apart, **others)
        _where.require_like(self.x, residual=self.residual, out=out)
        self._relu_mask: ReluMask | None = None

    def call(self, saves: bool) -> Call:
        """Give the call of all this, with a mask of ReLU where anything is kept."""
        of = self.part.call(self.layout, self.gamma, self.beta, self.eps, self.given is not None)
        if self.relu and saves and self.keep is not None:
            self._relu_mask = ReluMask.room(self.layout, self.x)
        if not self.relu and self.residual is None:
            return of
        added = None if self.residual is None else self.layout.block(self.residual)
        bits = None if self._relu_mask is None else self._relu_mask.data
        return of._replace(residual=added, relu=self.relu, bits=bits)

    def saved(self, moments: Moments | None, part: Part, y: Array, renorm: Renorm | None = None) -> Saved:
        """Give what is saved, once there is a call."""
        gamma: Any = self._given_gamma
        if gamma is not None and not _where.on_device(self.gamma):
            gamma = np.asarray(gamma)
        overwritten = self.out is not None and _where.same_memory(self.out, self.x)
        told = {"part": part, "renorm": renorm, "relu": self._relu_mask, "has_residual": self.residual is not None}
        others: dict[str, Any] = {
            name: v for name, v in told.items() if v is not None and v is not False and v is not ALL
        }
        if self.keep == "y":
            gamma = None if gamma is None else np.array(_where.on_host(self.gamma))
            beta = None if self._given_beta is None else np.array(_where.on_host(self.beta))
            others |= {"y": _where.kept(y), "beta": beta}
        if others or self.layout.order != ORDERS[self.x.ndim]:
            others["layout"] = self.layout
        if self.given is not None:
            others["given"] = tuple(_where.copy(a, np.float64) for a in self.given)
        x = _where.kept(self.x) if self.keep == "x" and not overwritten else None
        return Saved(x, moments, gamma, self.axis, self.eps, **others)


# beta and y round to 2⁻²⁴ of themselves (float32), so that x̂ is known to 2⁻²³·abs(beta/gamma): 13 bits are left here.
_MOST_BETA = 2.0**10

# Of gamma, per item size. float32: a normal number, since subnormal y would have lost digits, and finite.
# float64: gamma²·rstd must neither overflow nor lose digits, rstd being from 2⁻⁵¹² to 2⁵³⁷.
_GAMMA_RANGE = {4: (2.0**-126, 2.0**126), 8: (2.0**-150, 2.0**150)}


def require_invertible(gamma: PerChannel, beta: PerChannel, x: Array) -> None:
    """Refuse a gamma and beta through which y does not tell x̂."""
    least, most = _GAMMA_RANGE[x.dtype.itemsize]
    size = np.abs(gamma)
    needed = f"have absolute values from {least:.3g} to {most:.3g} to be inverted"
    _validate.each_channel("gamma", gamma, (size >= least) & (size <= most), needed)
    good = np.abs(beta) / _MOST_BETA <= size
    if not good.all():
        c = int(good.argmin())
        raise ValueError(
            f"gamma must be at least abs(beta)/{_MOST_BETA:.0f} in every channel to be inverted, "
            f"got gamma {gamma[c]} and beta {beta[c]} in channel {c}"
        )
