"""Batch normalization with what mostly follows it, in the same pass over memory: a residual is added, then ReLU.

y = max((x - mean)·rstd·gamma + beta + residual, 0). Three calls after one another read and write the tensor seven times
in training and keep a tensor more for the backward pass (y, or what ReLU was given); in one pass y costs no more than
without ReLU, and what is kept beside x is a mask of one bit an element.
Source: He et al. (2016), "Deep Residual Learning for Image Recognition", figure 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Unpack, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm import _core, _layout, _validate
from batchnorm._validate import MaybeNone, NoOptions
from batchnorm.functional import (
    PerChannel,
    Prepared,
    Saved,
    _deliver,
    _final,
    _input_of,
    _target,
    new_gradient,
)
from batchnorm.moments import Moments

Array = NDArray[Any]
ReluGradient = Literal["x", "gamma", "beta", "residual"]
NEEDS: tuple[ReluGradient, ...] = get_args(ReluGradient)

# Bits begin behind so many bytes, of which the first says by how many more bits (cpp/src/relu.hpp).
_HEAD = 8


@dataclass(frozen=True, eq=False)
class ReluMask:
    """Which elements of y were above 0 before ReLU (or NaN): one bit each.

    Attributes
    ----------
    shape : that of x.
    order : the axes in the order in which they lie in memory, outermost first; bits are in that order.
    data : uint8, read-only: the bits, and up to 24 bytes.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    data: NDArray[np.uint8]

    def __repr__(self) -> str:
        return _validate.summary(self)

    @property
    def nbytes(self) -> int:
        """Bytes of memory: one bit an element, and up to 24 bytes."""
        return self.data.nbytes

    def to_bool(self) -> NDArray[np.bool]:
        """Give the mask as a bool array of the shape of x."""
        size, first = int(np.prod(self.shape)), 8 * _HEAD + int(self.data[0])
        bits = np.unpackbits(self.data, bitorder="little", count=first + size)[first:].astype(np.bool)
        in_memory = bits.reshape([self.shape[d] for d in self.order])
        return in_memory.transpose(np.argsort(self.order))


@dataclass(frozen=True, eq=False)
class SavedRelu:
    """What `batch_norm_relu` leaves for its backward pass.

    Attributes
    ----------
    batch_norm : Saved, what `batch_norm` leaves: x by reference, moments, gamma.
    mask : ReluMask.
    has_residual : whether a residual was added, which has a gradient then.
    """

    batch_norm: Saved
    mask: ReluMask
    has_residual: bool

    def __repr__(self) -> str:
        return _validate.summary(self)

    @property
    def x(self) -> Array | None:
        """The input, by reference; None after ``out=x``."""
        return self.batch_norm.x

    @property
    def moments(self) -> Moments:
        """Moments of the batch; they update running statistics."""
        return self.batch_norm.moments

    @property
    def rstd(self) -> PerChannel:
        """1/√(var + eps) with the biased variance: (C,) float64."""
        return self.batch_norm.rstd

    @property
    def saved_bytes(self) -> int:
        """Bytes of tensors that are kept for the backward pass: those of x and of the mask."""
        return self.batch_norm.saved_bytes + self.mask.nbytes


class ReluOutput(NamedTuple):
    """The result of `normalize_relu`: `y` like x, and the `mask` for its backward pass; None where not asked for."""

    y: Array
    mask: ReluMask | MaybeNone

    def __repr__(self) -> str:
        return _validate.summary(self)


class ReluGradients(NamedTuple):
    """Gradients of a loss: `dx` and `dresidual` like x, `dgamma` and `dbeta` (C,); None where not asked for."""

    dx: Array | MaybeNone
    dgamma: Array | MaybeNone
    dbeta: Array | MaybeNone
    dresidual: Array | MaybeNone

    def __repr__(self) -> str:
        return _validate.summary(self)


@_validate.options(NoOptions)
def batch_norm_relu(
    x: Array,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    residual: Array | None = None,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    num_threads: int | None = None,
    **others: Unpack[NoOptions],
) -> tuple[Array, SavedRelu]:
    """Normalize each channel of `x` by the statistics of this batch, add a residual, and apply ReLU (training).

    y = max((x - mean)/√(var + eps)·gamma + beta + residual, 0), with the batch's mean and biased variance, as
    `batch_norm` takes them. NaN stays NaN. Source: He et al. (2016), figure 2.

    Parameters
    ----------
    x, gamma, beta, axis, eps, num_threads : as in `batch_norm`.
    residual : added before ReLU: shape and dtype of `x`, or None. A memory order other than that of `x` costs a copy.
    out : where to put y: shape and dtype of `x`; may be `x` itself (then there is no backward pass) or `residual`
        itself, must not overlap them otherwise.

    Returns
    -------
    y : shape, dtype and memory order of `x`; `out` where given. The bits that `batch_norm`, an addition and a maximum
        give; of float16 and bfloat16, those of float32 rounded once.
    saved : SavedRelu, for `batch_norm_relu_backward`; ``saved.moments`` updates running statistics.

    Raises
    ------
    ValueError, TypeError
        As `batch_norm`; for a residual that does not fit. Nothing is written by a call that raises.

    Notes
    -----
    Memory: y, and a bit for each element; while it runs, what `batch_norm` takes. Releases the GIL for large `x`.

    Examples
    --------
    >>> x = np.array([[1.0, 5.0], [3.0, 5.0]])
    >>> y, saved = batch_norm_relu(x, residual=np.array([[0.5, -2.0], [0.5, 2.0]]), eps=0.0)
    >>> y
    array([[0. , 0. ],
           [1.5, 2. ]])
    >>> saved.mask.to_bool()
    array([[False, False],
           [ True,  True]])
    """
    if others:
        _validate.no_options("batch_norm_relu", others)
    x = _validate.array("x", x)
    axis = _validate.axis(axis, x.ndim)
    eps = _validate.eps(eps)
    threads = _validate.num_threads(num_threads)
    scale = _validate.optional_channel_values("gamma", gamma, x.shape[axis])
    shift = _validate.optional_channel_values("beta", beta, x.shape[axis])
    residual = _residual(x, residual, out, {"gamma": scale, "beta": shift})
    _validate.batch_values(x, axis)
    block, sizes = _layout.dense(x, axis)
    added = None if residual is None else _layout.like(block, residual)
    y, mask, table = _target(out, block), _new_mask(block, sizes), _core.new_moments(sizes[1])
    kept_x = None if out is not None and _validate.same_memory(out, x) else x
    kept = None if gamma is None else np.asarray(gamma)
    saved = Saved(kept_x, Moments._from_core(table), kept, axis, eps)
    results = y if out is None else out, SavedRelu(saved, mask, residual is not None)
    # All that is returned is there: once the core writes, nothing can fail.
    _core.batch_norm_relu(block, sizes, added, scale, shift, eps, y, mask.data, table, threads)
    _deliver(y, out)
    return results


@_validate.options(NoOptions)
def normalize_relu(
    x: Array,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    residual: Array | None = None,
    axis: int = 1,
    eps: float = 1e-5,
    needs_mask: bool = False,
    out: Array | None = None,
    num_threads: int | None = None,
    **others: Unpack[NoOptions],
) -> ReluOutput:
    """Normalize each channel of `x` by given statistics, add a residual, and apply ReLU (inference).

    y = max((x - mean)/√(var + eps)·gamma + beta + residual, 0). NaN stays NaN.

    Parameters
    ----------
    x, mean, var, gamma, beta, axis, eps, num_threads : as in `normalize`; `var` is the biased variance, or what the
        caller takes for it.
    residual, out : as in `batch_norm_relu`.
    needs_mask : whether to return the mask that `normalize_relu_backward` takes.

    Returns
    -------
    ReluOutput(y, mask) : y as of `batch_norm_relu`; mask None unless asked for.

    Raises
    ------
    ValueError, TypeError
        As `normalize`; for a residual that does not fit. Nothing is written by a call that raises.

    Notes
    -----
    Memory: y, and a bit for each element where the mask is asked for. Releases the GIL for large `x`.

    Examples
    --------
    >>> y, _ = normalize_relu(np.array([[1.0], [4.0]]), np.array([2.0]), np.array([4.0]), eps=0.0)
    >>> y
    array([[0.],
           [1.]])
    """
    if others:
        _validate.no_options("normalize_relu", others)
    x = _validate.array("x", x)
    axis = _validate.axis(axis, x.ndim)
    eps = _validate.eps(eps)
    threads = _validate.num_threads(num_threads)
    channels = x.shape[axis]
    center, spread = _validate.channel_values("mean", mean, channels), _validate.variances(var, channels)
    scale = _validate.optional_channel_values("gamma", gamma, channels)
    shift = _validate.optional_channel_values("beta", beta, channels)
    per_channel = {"mean": center, "var": spread, "gamma": scale, "beta": shift}
    residual = _residual(x, residual, out, per_channel)
    block, sizes = _layout.dense(x, axis)
    added = None if residual is None else _layout.like(block, residual)
    y, mask = _target(out, block), _new_mask(block, sizes) if needs_mask else None
    bits = None if mask is None else mask.data
    results = ReluOutput(y if out is None else out, mask)
    _core.normalize_relu(block, sizes, added, center, spread, scale, shift, eps, y, bits, threads)
    _deliver(y, out)
    return results


@_validate.options(NoOptions)
def batch_norm_relu_backward(
    dy: Array,
    saved: SavedRelu,
    *,
    needs: Iterable[ReluGradient] = NEEDS,
    out: tuple[Array | None, Array | None] | None = None,
    num_threads: int | None = None,
    **others: Unpack[NoOptions],
) -> ReluGradients:
    """Gradients of `batch_norm_relu`.

    dresidual = dy where the mask is set, else 0; with it in the place of dy, those of `batch_norm_backward`:
    dbeta = sum(dresidual), dgamma = sum(dresidual·x̂), dx = gamma·rstd·(dresidual - dbeta/n - x̂·dgamma/n).

    Parameters
    ----------
    dy : gradient of y: shape and dtype of x.
    saved : what `batch_norm_relu` returned; its x must be unchanged.
    needs : which of "x", "gamma", "beta" and "residual" to compute; the others are None. So is dresidual where no
        residual was added.
    out : (dx, dresidual), where to put them: shape and dtype of x, or None. Each may be `dy` or x itself, must not
        overlap these otherwise, nor the other.
    num_threads : as in `batch_norm`.

    Returns
    -------
    ReluGradients(dx, dgamma, dbeta, dresidual), the bits that `batch_norm_backward` gives for dresidual.

    Raises
    ------
    ValueError, TypeError
        As `batch_norm_backward`. Nothing is written by a call that raises.

    Notes
    -----
    Memory: dx and dresidual, where they are not in `out`; while it runs, what `batch_norm_backward` takes. Releases the
    GIL for large x.

    Examples
    --------
    >>> y, saved = batch_norm_relu(np.array([[1.0], [3.0], [8.0]]), residual=np.zeros((3, 1)))
    >>> dx, dgamma, dbeta, dresidual = batch_norm_relu_backward(np.array([[1.0], [1.0], [2.0]]), saved)
    >>> dresidual, dbeta
    (array([[0.],
           [0.],
           [2.]]), array([2.]))
    """
    if others:
        _validate.no_options("batch_norm_relu_backward", others)
    _validate.instance("saved", saved, SavedRelu, "the SavedRelu of a batch_norm_relu call")
    plain = saved.batch_norm
    x = _input_of(plain)
    need_x, need_gamma, need_beta, need_residual = _validate.needs_among(NEEDS, needs)
    threads = _validate.num_threads(num_threads)
    dy = _validate.array_like("dy", dy, x)
    scale = _validate.optional_channel_values("gamma", plain.gamma, x.shape[plain.axis])
    to_x, to_residual = _validate.two_outputs(out, x, {"dy": dy, "x": x}, {"gamma": scale}, "dx, dresidual")
    block, sizes = _layout.dense(_ordered("saved.x", x, saved.mask), plain.axis)
    dx = _target(to_x, block) if need_x else None
    dresidual = _target(to_residual, block) if need_residual and saved.has_residual else None
    grad, bits, table = _layout.like(block, dy), saved.mask.data, plain.moments._table
    dgamma = new_gradient(plain.gamma, sizes[1]) if need_gamma else None
    dbeta = new_gradient(plain.gamma, sizes[1]) if need_beta else None
    results = _prepared(dx, dgamma, dbeta, dresidual, to_x, to_residual, plain.gamma)
    _core.batch_norm_relu_backward(
        grad, block, sizes, bits, table, scale, plain.eps, dx, dresidual, dgamma, dbeta, threads
    )
    return results.delivered()


@_validate.options(NoOptions)
def normalize_relu_backward(
    dy: Array,
    x: Array,
    mask: ReluMask,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    needs: Iterable[ReluGradient] = NEEDS,
    out: tuple[Array | None, Array | None] | None = None,
    num_threads: int | None = None,
    **others: Unpack[NoOptions],
) -> ReluGradients:
    """Gradients of `normalize_relu`, whose statistics are constants.

    dresidual = dy where the mask is set, else 0; dx = gamma·rstd·dresidual, dbeta = sum(dresidual),
    dgamma = sum(dresidual·x̂) with x̂ = (x - mean)·rstd.

    Parameters
    ----------
    dy : gradient of y: shape and dtype of `x`.
    x, mean, var, gamma, axis, eps : what `normalize_relu` was given.
    mask : what it returned.
    needs, out, num_threads : as in `batch_norm_relu_backward`.

    Returns
    -------
    ReluGradients(dx, dgamma, dbeta, dresidual), the bits that `normalize_backward` gives for dresidual.

    Raises
    ------
    ValueError, TypeError
        As `normalize_backward`; for a mask of another shape. Nothing is written by a call that raises.

    Notes
    -----
    Memory: dx and dresidual, where they are not in `out`. Releases the GIL for large `x`.

    Examples
    --------
    >>> x, mean, var = np.array([[1.0], [4.0]]), np.array([2.0]), np.array([4.0])
    >>> y, mask = normalize_relu(x, mean, var, eps=0.0, needs_mask=True)
    >>> normalize_relu_backward(np.ones((2, 1)), x, mask, mean, var, eps=0.0, needs=("x", "beta"))
    ReluGradients(dx=array([[0. ],
           [0.5]]), dgamma=None, dbeta=array([1.]), dresidual=None)
    """
    if others:
        _validate.no_options("normalize_relu_backward", others)
    x = _validate.array("x", x)
    axis = _validate.axis(axis, x.ndim)
    eps = _validate.eps(eps)
    need_x, need_gamma, need_beta, need_residual = _validate.needs_among(NEEDS, needs)
    threads = _validate.num_threads(num_threads)
    dy = _validate.array_like("dy", dy, x)
    channels = x.shape[axis]
    center, spread = _validate.channel_values("mean", mean, channels), _validate.variances(var, channels)
    scale = _validate.optional_channel_values("gamma", gamma, channels)
    per_channel = {"mean": center, "var": spread, "gamma": scale}
    to_x, to_residual = _validate.two_outputs(out, x, {"dy": dy, "x": x}, per_channel, "dx, dresidual")
    block, sizes = _layout.dense(_ordered("x", x, mask), axis)
    dx = _target(to_x, block) if need_x else None
    dresidual = _target(to_residual, block) if need_residual else None
    dgamma = new_gradient(gamma, sizes[1]) if need_gamma else None
    dbeta = new_gradient(gamma, sizes[1]) if need_beta else None
    results = _prepared(dx, dgamma, dbeta, dresidual, to_x, to_residual, gamma)
    _core.normalize_relu_backward(
        _layout.like(block, dy), block, sizes, mask.data, center, spread, scale, eps,
        dx, dresidual, dgamma, dbeta, threads,
    )  # fmt: skip
    return results.delivered()


def _residual(
    x: Array, residual: object, out: Array | None, apart_from: dict[str, Array | None]
) -> Array | None:
    """Give a residual like `x`, or None, after checking where the sum goes."""
    added = None if residual is None else _validate.array_like("residual", residual, x)
    if out is not None:
        _validate.output(out, x, {"x": x} if added is None else {"x": x, "residual": added}, apart_from)
    return added


def _new_mask(block: Array, sizes: _layout.Sizes) -> ReluMask:
    data = np.empty(_core.relu_mask_bytes(sizes), np.uint8)
    data.flags.writeable = False  # for all but the core
    return ReluMask(block.shape, tuple(_layout.order_of_axes(block)), data)


def _ordered(name: str, x: Array, mask: ReluMask) -> Array:
    """Give `x`, or a copy, in the memory order that the bits of its mask have."""
    _validate.instance("mask", mask, ReluMask, "a ReluMask")
    if mask.shape != x.shape:
        raise ValueError(f"mask must be of {name}'s shape {x.shape}, got one of {mask.shape}")
    if tuple(_layout.order_of_axes(x)) == mask.order:
        return x
    return np.ascontiguousarray(x.transpose(mask.order)).transpose(np.argsort(mask.order))


def _prepared(
    dx: Array | None,
    dgamma: Array | None,
    dbeta: Array | None,
    dresidual: Array | None,
    to_x: Array | None,
    to_residual: Array | None,
    gamma: ArrayLike | None,
) -> Prepared[ReluGradients]:
    results = ReluGradients(_final(dx, to_x), dgamma, dbeta, _final(dresidual, to_residual))
    return Prepared(results, gamma, (dx, to_x), (dresidual, to_residual))
