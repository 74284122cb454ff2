"""Norms of each sample by itself: what `batch_norm` is with other values sharing statistics.

Instance and group norm take those of a sample's channels over all places, graph norm of a graph's; layer and RMS norm
those of some axes, for each index of the others. They depend on no other sample, so that training and inference are the
same, and every option and verb of `batch_norm` goes with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike

from batchnorm import _core, _keywords, _validate, _where
from batchnorm._arrays import Array
from batchnorm._parts import About, Grouping, require_values_of_samples, width_of_groups
from batchnorm._validate import WeightsAre
from batchnorm.forward import Options, normalized_by_batch, ordinary_saved, same
from batchnorm.saved import Saved


class GraphOptions(Options, total=False):
    """What else `graph_norm` may be told."""

    weights_are: WeightsAre | None


@_keywords.options(Options, keep="x")
def instance_norm(
    x: Array,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    num_threads: int | None = None,
    **options: Unpack[Options],
) -> tuple[Array, Saved]:
    """Normalize each channel of each sample of `x` by its own statistics.

    y = (x - mean)/√(var + eps)·gamma + beta, with the mean and biased variance of a sample's m values of a channel: that is
    `batch_norm` with each sample (index of axis 0) as a segment. Source: Ulyanov, Vedaldi & Lempitsky (2016), "Instance
    Normalization", equation 3.

    Parameters
    ----------
    x, gamma, beta, axis, eps, out, num_threads : as in `batch_norm`; the channel axis is not axis 0.
    mask, weights, lengths, padding, residual, activation, keep : as in `batch_norm`.

    Returns
    -------
    y : shape, dtype and memory order of `x`; `out` where given. The bounds of `batch_norm`, sample by sample.
    saved : Saved, as of `batch_norm`; ``saved.moments`` has an entry for each sample and channel, sample first.

    Errors, memory and threads are those of `batch_norm` with segments; ValueError for one value in a sample and channel.

    Examples
    --------
    >>> y, _ = instance_norm(np.array([[[1.0, 3.0]], [[10.0, 30.0]]]), eps=0.0)
    >>> y.ravel()
    array([-1.,  1., -1.,  1.])
    """
    if options:
        _keywords.no_options("instance_norm", options)
    done = _core.try_batch_norm(ordinary_saved, x, gamma, beta, axis, eps, out, num_threads, options or None, 0)
    if done is not None:
        return done
    x = _validate.array("x", x)
    each = max(x.shape[_validate.axis(axis, x.ndim)], 1)
    return _normalized_by_groups(x, each, gamma, beta, axis, eps, options, out, num_threads)


@_keywords.options(Options, keep="x")
def group_norm(
    x: Array,
    num_groups: int,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    grouping: Grouping = "contiguous",
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    num_threads: int | None = None,
    **options: Unpack[Options],
) -> tuple[Array, Saved]:
    """Normalize groups of channels of each sample of `x` by their own statistics.

    y = (x - mean)/√(var + eps)·gamma + beta, with the mean and biased variance of the m values of a sample's C/num_groups
    channels, and gamma and beta of each channel. With ``num_groups=1`` that is layer normalization over channels and
    places, with C of them `instance_norm`. It depends on no other sample, so that training and inference are the same.
    Source: Wu & He (2018), "Group Normalization", equation 7.

    Parameters
    ----------
    x, gamma, beta, axis, eps, out, num_threads : as in `batch_norm`; the channel axis is not axis 0.
    num_groups : int >= 1 that divides C.
    grouping : "contiguous": group g is the neighbours g·C/num_groups to (g + 1)·C/num_groups - 1, as nearly everywhere.
        "strided": channels g, g + num_groups, g + 2·num_groups and so on, as in MLX where pytorch_compatible=False, its
        default.
    mask, weights, lengths, padding, residual, activation : as in `batch_norm`.
    keep : "x" or None, as in `batch_norm`; "y" only where each channel is a group.

    Returns
    -------
    y : shape, dtype and memory order of `x`; `out` where given. The bounds of `batch_norm`, for each channel of each
        sample.
    saved : Saved, as of `batch_norm`; ``saved.moments`` has an entry for each sample and group, sample first.

    Errors, memory and threads are those of `batch_norm` with segments; ValueError for one value in a sample and group.

    Examples
    --------
    >>> x = np.array([[[1.0, 3.0], [5.0, 7.0]], [[10.0, 30.0], [50.0, 70.0]]])
    >>> y, saved = group_norm(x, 1, eps=0.0)
    >>> saved.moments.mean, saved.moments.var()
    (array([ 4., 40.]), array([  5., 500.]))
    """
    if options:
        _keywords.no_options("group_norm", options)
    if grouping == "contiguous" and type(num_groups) is int and num_groups > 0:
        done = _core.try_batch_norm(
            ordinary_saved, x, gamma, beta, axis, eps, out, num_threads, options or None, num_groups
        )
        if done is not None:
            return done
    x = _validate.array("x", x)
    told = {**options, "grouping": grouping}
    return _normalized_by_groups(x, num_groups, gamma, beta, axis, eps, told, out, num_threads)


@_keywords.options(GraphOptions, keep="x")
def graph_norm(
    x: Array,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    *,
    segments: ArrayLike | None = None,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    num_threads: int | None = None,
    **options: Unpack[GraphOptions],
) -> tuple[Array, Saved]:
    """Normalize each channel of each graph about a share of its mean.

    y = o/√(mean(o²) + eps)·gamma + beta, o = x - alpha·mean, with means over the m nodes of a graph. With alpha = 1 that is
    `batch_norm` with segments. Where all nodes of a graph look alike, their mean tells its structure: alpha, which is
    learned, leaves some of it. mean(o²) = var + (1 - alpha)²·mean². Source: Cai, Luo, Xu, He, Liu & Wang (2021), "GraphNorm",
    equation 6.

    Parameters
    ----------
    x, gamma, beta, axis, eps, out, num_threads : as in `batch_norm`; the channel axis is not axis 0.
    alpha : (C,) of any floating or integer dtype, or None for 1.
    segments : (N,) of int, ids from 0 that never fall: which graph a row (axis 0) belongs to. None: all rows are one.
    mask, weights, lengths, weights_are, padding, residual, activation : as in `batch_norm`.
    keep : "x" or None, as in `batch_norm`.

    Returns
    -------
    y : shape, dtype and memory order of `x`; `out` where given. The bounds of `batch_norm`, of o in the place of x - mean.
    saved : Saved, as of `batch_norm`; ``saved.moments`` are those of the values, about their mean. `backward` gives dalpha
        too, `jvp` takes alpha_dot, `double_backward` v_dalpha.

    Errors, memory and threads are those of `batch_norm` with segments.

    Examples
    --------
    >>> y, _ = graph_norm(np.array([[1.0], [3.0], [5.0]]), alpha=[0.5], segments=[0, 0, 1], eps=0.0)
    >>> y.round(4).ravel()
    array([0.    , 1.4142, 1.    ])
    """
    if options:
        _keywords.no_options("graph_norm", options)
    x = _validate.array("x", x)
    if options.get("keep") == "y":
        raise ValueError("keep must be 'x' or None beside alpha, of which y does not tell the mean, got 'y'")
    at = _validate.axis(axis, x.ndim)
    if at == 0:
        raise ValueError(f"axis must not be 0, which is that of the nodes, got {axis} with shape {x.shape}")
    channels = x.shape[at]
    shares = np.ones(channels) if alpha is None else _validate.channel_values("alpha", alpha, channels)
    # A single node has the variance 0, as in a segment of one.
    ids = np.zeros(len(x), np.int64) if segments is None else segments
    told = {**options, "segments": ids, "alpha": _where.copy(shares)}
    return normalized_by_batch(same, x, gamma, beta, axis, eps, told, out, num_threads)


def _normalized_by_groups(
    x: Array, num_groups: int, gamma: ArrayLike | None, beta: ArrayLike | None, axis: int, eps: float,
    options: Mapping[str, Any], *rest: Any,
) -> tuple[Array, Saved]:  # fmt: skip
    at = _validate.axis(axis, x.ndim)
    width = width_of_groups(x, at, num_groups)
    require_values_of_samples(x, at, width)
    if width > 1 and options.get("keep") == "y":
        raise ValueError("keep must be 'x' or None where channels share statistics, which y does not tell, got 'y'")
    return normalized_by_batch(same, x, gamma, beta, axis, eps, {**options, "num_groups": num_groups}, *rest)


@_keywords.options(Options, keep="x")
def layer_norm(
    x: Array,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axes: int | tuple[int, ...] = -1,
    eps: float = 1e-5,
    out: Array | None = None,
    num_threads: int | None = None,
    **options: Unpack[Options],
) -> tuple[Array, Saved]:
    """Normalize `x` over some axes, by their own statistics for each index of the others.

    y = (x - mean)/√(var + eps)·gamma + beta, with the mean and biased variance of the D values along `axes`, and gamma and
    beta of each of these D places. Source: Ba, Kiros & Hinton (2016), "Layer Normalization", equations 3 and 4.

    One value (D = 1) has variance 0, and y = beta. ValueError for shapes, eps, mask or out that do not fit. TypeError for
    other dtypes. Nothing is written by a call that raises.

    Memory: y, 40 bytes for each index of the other axes, and a bit for each element with ReLU; while it runs, up to 256 KB
    a thread, or four times D values, and 64 bytes for each of D. Releases the GIL for large `x`. `saved` keeps `x` alive.

    Parameters
    ----------
    x : as in `batch_norm`. Where `axes` do not lie side by side in memory, in their order, it costs a copy. Over the
        channels of (N, C, H, W), ``axes=1``, it does not.
    gamma, beta : of the shape of `x` along `axes` ((D,) for one axis), of any floating or integer dtype, or None for 1 and 0.
    axes : the axes that are normalized; in any order. -1 for sequences of vectors, (1, 2, 3) for the maps of a sample.
    eps : added to the variance; finite, >= 0. Frameworks differ: 1e-5 in PyTorch and ONNX, 1e-3 in Keras, 1e-6 in Flax.
    mask, weights, lengths : which indices of the other axes count: of the shape of `x` without `axes`, or with 1 there. Each
        has statistics of its own, so that they tell what y is (`padding`) and what dgamma and dbeta are sums over; of a
        weight it counts whether it is 0. Steps of lengths are the first of the other axes behind axis 0. Where one
        does not count and padding is "normalize" (the default of weights) y is beta, to whose gradient its dy belongs.
    padding, residual, activation, num_threads : as in `batch_norm`.
    keep : "x" or None, as in `batch_norm`.
    out : as in `batch_norm`.

    Returns
    -------
    y : shape, dtype and memory order of `x`; `out` where given. Within one rounding of y and 2⁻²⁴ of the largest
        abs(y - beta) along `axes` (float32); constant values give exactly beta. For float16 and bfloat16 the y of the same
        values in float32, rounded once more. What follows is added to the rounded value.
    saved : Saved, for `backward`, `jvp`, `double_backward` and the halves, of which sums are those of gamma·dy;
        ``saved.moments`` has an entry for each index of the other axes, in the order of memory.

    Examples
    --------
    >>> x = np.array([[1.0, 3.0, 5.0], [10.0, 10.0, 10.0]])
    >>> y, saved = layer_norm(x, np.array([1.0, 1.0, 2.0]), eps=0.0)
    >>> y.round(4)
    array([[-1.2247,  0.    ,  2.4495],
           [ 0.    ,  0.    ,  0.    ]])
    >>> saved.moments.mean
    array([ 3., 10.])
    """
    if options:
        _keywords.no_options("layer_norm", options)
    done = _core.try_batch_norm(ordinary_saved, x, gamma, beta, axes, eps, out, num_threads, options or None, -1)
    return done or _normalized_along(x, axes, "mean", gamma, beta, eps, options, out, num_threads)


@_keywords.options(Options, keep="x")
def rms_norm(
    x: Array,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axes: int | tuple[int, ...] = -1,
    eps: float = 1e-6,
    out: Array | None = None,
    num_threads: int | None = None,
    **options: Unpack[Options],
) -> tuple[Array, Saved]:
    """Divide `x` by its root mean square over some axes, for each index of the others.

    y = x/√(mean(x²) + eps)·gamma + beta, with the mean over the D values along `axes`. No mean is taken away: values far
    from 0 against their spread lose it. Source: Zhang & Sennrich (2019), "Root Mean Square Layer Normalization", equation 4.

    Parameters
    ----------
    x, gamma, beta, axes, mask, weights, lengths, padding, residual, activation, keep, out, num_threads : as in
        `layer_norm`. Where another library multiplies by 1 + weight (Gemma), gamma is that sum.
    eps : added to the mean square; finite, >= 0. Frameworks and models differ: 1e-6 in Keras, Flax, T5 and Gemma, 1e-5 in
        ONNX, MLX and Llama 2, 2⁻²³ (float32's) in PyTorch where it is None.

    Returns
    -------
    y : shape, dtype and memory order of `x`; `out` where given. The bounds of `layer_norm`; zeros give exactly beta.
    saved : Saved, as of `layer_norm`: ``saved.moments`` are those of the values, about their mean, and ``saved.rstd``
        is 1/√(mean(x²) + eps).

    Errors, memory and threads are those of `layer_norm`.

    Examples
    --------
    >>> y, saved = rms_norm(np.array([[3.0, 4.0]]), eps=0.0)
    >>> y.round(4), saved.rstd.round(4)
    (array([[0.8485, 1.1314]]), array([0.2828]))
    """
    if options:
        _keywords.no_options("rms_norm", options)
    done = _core.try_batch_norm(ordinary_saved, x, gamma, beta, axes, eps, out, num_threads, options or None, -2)
    return done or _normalized_along(x, axes, "zero", gamma, beta, eps, options, out, num_threads)


def _normalized_along(
    x: Array, axes: int | tuple[int, ...], about: About, gamma: ArrayLike | None, beta: ArrayLike | None, eps: float,
    options: Options, *rest: Any,
) -> tuple[Array, Saved]:  # fmt: skip
    x = _validate.array("x", x)
    if options.get("keep") == "y":
        raise ValueError("keep must be 'x' or None where channels share statistics, which y does not tell, got 'y'")
    at = _validate.axes(axes, x.ndim)
    return normalized_by_batch(same, x, gamma, beta, at, eps, {**options, "about": about}, *rest)
