"""Batch normalization that overwrites its input, and still has a backward pass: from y instead of x.

What each mode keeps of the tensor for its backward pass (besides 40 bytes a channel of moments, and parameters):

| call | keeps | ``saved.saved_bytes`` |
|---|---|---|
| ``batch_norm(x)`` | x, beside y | ``x.nbytes`` |
| ``batch_norm(x, out=x)`` | nothing, and has no backward pass | 0 |
| ``batch_norm_inplace(x)`` | y alone, which is what the next layer reads | 0 |

A channel's x̂ = (x - mean)·rstd is (y - beta)/gamma. Seen that way y is the input of a batch normalization of mean beta
and variance gamma², so that the backward pass is the ordinary one on y with other coefficients per channel: with
rstd' = 1/abs(gamma) and gamma' = gamma·rstd·abs(gamma) its dx is that of x, and its dgamma has the sign of gamma too
much. Source of the idea: Rota Bulò, Porzi & Kontschieder (2018), "In-place activated BatchNorm", section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm import _core, _validate
from batchnorm._validate import Gradient
from batchnorm.functional import (
    Combined,
    Gradients,
    PerChannel,
    Saved,
    batch_norm_backward,
    general_batch_norm,
)
from batchnorm.moments import Moments

Array = NDArray[Any]

# beta and y round to 2⁻²⁴ of themselves (float32), so that x̂ is known to 2⁻²³·abs(beta/gamma): 13 bits are left here.
_MOST_BETA = 2.0**10

# Of gamma, per item size. float32: a normal number, since subnormal y would have lost digits, and finite.
# float64: gamma²·rstd must neither overflow nor lose digits, rstd being from 2⁻⁵¹² to 2⁵³⁷.
_GAMMA_RANGE = {4: (2.0**-126, 2.0**126), 8: (2.0**-150, 2.0**150)}


@dataclass(frozen=True, eq=False)
class SavedOutput:
    """What `batch_norm_inplace` leaves for its backward pass.

    Attributes
    ----------
    y : the output, by reference (not copied): it must be unchanged when the backward pass reads it.
    moments : Moments of the batch that was overwritten; they update running statistics.
    gamma, beta : (C,) float64, copies: what y was made with, 1 and 0 where that was None.
    gradient_dtype : the dtype of dgamma and dbeta: that of gamma, float64 where it was None.
    axis : int >= 0, the channel axis.
    eps : float.
    """

    y: Array
    moments: Moments
    gamma: PerChannel
    beta: PerChannel
    gradient_dtype: np.dtype[Any]
    axis: int
    eps: float

    def __repr__(self) -> str:
        return _validate.summary(self)

    @cached_property
    def rstd(self) -> PerChannel:
        """1/√(var + eps) with the biased variance of `moments`: (C,) float64."""
        return _core.rstd(self.moments._table, self.eps)

    @property
    def saved_bytes(self) -> int:
        """Bytes of tensors that are kept for the backward pass beyond y itself: 0."""
        return 0


@_validate.keywords
def batch_norm_inplace(
    x: Array,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    num_threads: int | None = None,
) -> tuple[Array, SavedOutput]:
    """Normalize `x` in place by the statistics of this batch, so that it can still be differentiated.

    The same bits as ``batch_norm(x, gamma, beta, out=x)``. The backward pass takes x̂ = (y - beta)/gamma from y, which
    is within 2⁻²⁴·(4·max abs(x̂) + 2·abs(beta/gamma)) of the exact one (float32; 2⁻⁵³ for float64).

    Parameters
    ----------
    x : as in `batch_norm`, and writeable. Overwritten.
    gamma, beta : (C,) of any floating or integer dtype, or None for 1 and 0. In every channel abs(beta) must be at most
        2¹⁰·abs(gamma), so that no more than 11 bits of x̂ are lost, and abs(gamma) from 2⁻¹²⁶ to 2¹²⁶ (float32) or
        from 2⁻¹⁵⁰ to 2¹⁵⁰ (float64): from a gamma of 0 nothing could be recovered.
    axis, eps, num_threads : as in `batch_norm`.

    Returns
    -------
    y : `x` itself.
    saved : SavedOutput, for `batch_norm_inplace_backward`.

    Raises
    ------
    ValueError
        For a gamma that cannot be inverted, naming its channel; else as `batch_norm`.
    TypeError
        As `batch_norm`. Nothing is written by a call that raises.

    Notes
    -----
    Memory: no tensor; 24 bytes a channel beside what `batch_norm` takes. A sliced or strided x costs a copy while it
    runs. Releases the GIL for large `x`.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0]])
    >>> y, saved = batch_norm_inplace(x, np.array([2.0]), eps=0.0)
    >>> y is x, y
    (True, array([[-2.],
           [ 2.]]))
    """
    if isinstance(x, np.ndarray):
        _validate.aligned("x", x)
    values = _validate.array("x", x)
    axis = _validate.axis(axis, x.ndim)
    if not x.flags.writeable:
        raise ValueError("x must be writeable, got a read-only array")
    scale = _float64("gamma", gamma, x.shape[axis], 1.0)
    shift = _float64("beta", beta, x.shape[axis], 0.0)
    _check_invertible(scale, shift, x.dtype.itemsize)
    dtype = _validate.float_dtype(gamma)

    def keep(
        _: Array | None, table: PerChannel, gamma: object, axis: int, eps: float, part: object = None
    ) -> tuple[Array, SavedOutput]:
        return x, SavedOutput(values, Moments._from_core(table), scale, shift, dtype, axis, eps)

    done = _core.try_batch_norm(keep, values, gamma, beta, axis, eps, values, num_threads)
    return (done or general_batch_norm(keep, values, gamma, beta, axis, eps, {}, values, num_threads))[1]


@_validate.keywords
def batch_norm_inplace_backward(
    dy: Array,
    saved: SavedOutput,
    *,
    y: Array | None = None,
    needs: Iterable[Gradient] = ("x", "gamma", "beta"),
    out: Array | None = None,
    num_threads: int | None = None,
) -> Gradients:
    """Gradients of `batch_norm_inplace`, from its output.

    Those of `batch_norm_backward` with x̂ = (y - beta)/gamma: dbeta = sum(dy), dgamma = sum(dy·x̂),
    dx = gamma·rstd·(dy - mean(dy) - x̂·mean(dy·x̂)).

    Parameters
    ----------
    dy : gradient of y: shape and dtype of y.
    saved : what `batch_norm_inplace` returned.
    y : its output where that has moved: shape and dtype of ``saved.y``. None: ``saved.y``, which must be unchanged.
    needs, num_threads : as in `batch_norm_backward`.
    out : where to put dx: shape and dtype of y; may be `dy` or y itself, must not overlap them otherwise.

    Returns
    -------
    Gradients(dx, dgamma, dbeta), as `batch_norm_backward` gives them. To its error comes what that of x̂ brings (see
    `batch_norm_inplace`); and of float64, whose coefficients round more often here, 6·2⁻⁵³ of the absolute terms.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_backward`. Nothing is written by a call that raises.

    Notes
    -----
    Memory: dx, or nothing with ``out=dy`` or ``out=y``; while it runs, up to 3 KB a channel and a few percent of y.
    Releases the GIL for large y.

    Examples
    --------
    >>> y, saved = batch_norm_inplace(np.array([[1.0], [3.0], [8.0]]), np.array([2.0]))
    >>> dx, dgamma, dbeta = batch_norm_inplace_backward(np.array([[1.0], [0.0], [0.0]]), saved)
    >>> dx.round(4), dbeta
    (array([[ 0.2177],
           [-0.3048],
           [ 0.0871]]), array([1.]))
    """
    _validate.instance("saved", saved, SavedOutput, "the SavedOutput of a batch_norm_inplace call")
    _validate.instance("saved.moments", saved.moments, Moments, "Moments")
    values = saved.y if y is None else _validate.array_like("y", y, saved.y)
    names = tuple(needs)
    _, need_gamma, need_beta = _validate.needs(names)
    combined = Combined(saved.gradient_dtype, out, need_gamma, need_beta, saved.moments.channels)
    sign = np.copysign(1.0, saved.gamma)
    found = batch_norm_backward(
        dy, _as_if_input(values, saved), needs=names, out=out, num_threads=num_threads
    )
    if need_gamma:
        _core.combine(combined.dgamma, sign, found.dgamma, None, None)
    if need_beta:
        _core.combine(combined.dbeta, None, found.dbeta, None, None)
    return combined.results(found.dx)


def _as_if_input(y: Array, saved: SavedOutput) -> Saved:
    """Give what a batch_norm of y would have saved, had y the mean beta and the variance gamma²."""
    size = np.abs(saved.gamma)
    table = np.zeros((saved.moments.channels, 5))
    table[:, 0] = saved.moments.count
    table[:, 1] = np.where(table[:, 0] > 0, saved.beta, 0.0)
    table[:, 3] = table[:, 0] * (size * size)
    with np.errstate(all="ignore"):  # a channel that is not finite stays so
        factor = saved.gamma * saved.rstd * size
    return Saved(y, Moments._from_table(table), factor, saved.axis, 0.0)


def _float64(name: str, values: ArrayLike | None, channels: int, absent: float) -> PerChannel:
    checked = _validate.optional_channel_values(name, values, channels)
    return np.full(channels, absent) if checked is None else np.array(checked, np.float64)


def _check_invertible(gamma: PerChannel, beta: PerChannel, item_size: int) -> None:
    if item_size not in _GAMMA_RANGE:
        raise TypeError(
            "x must have dtype float32 or float64 for a backward pass from y, got one of 16 bits, whose y has lost too much"
        )
    least, most = _GAMMA_RANGE[item_size]
    size = np.abs(gamma)
    _validate.each_channel(
        "gamma",
        gamma,
        (size >= least) & (size <= most),
        f"have absolute values from {least:.3g} to {most:.3g} to be inverted",
    )
    good = np.abs(beta) / _MOST_BETA <= size
    if not good.all():
        c = int(good.argmin())
        raise ValueError(
            f"gamma must be at least abs(beta)/{_MOST_BETA:.0f} in every channel to be inverted, "
            f"got gamma {gamma[c]} and beta {beta[c]} in channel {c}"
        )
