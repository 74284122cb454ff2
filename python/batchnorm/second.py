"""Derivatives of batch normalization in closed form: forward-mode (jvp), and the gradients of its gradients.

Second order is where it ends. All of its combinations are one function, because the derivatives involved are symmetric:

    gradients of gradients                 batch_norm_double_backward(v, dy, saved)
    jvp of batch_norm_backward along x'    its dx and dgamma, with v = x' (Hessian-vector products)
    gradient by x of batch_norm_jvp        its dx, with v = x_dot and dy the gradient of y_dot
    jvp of batch_norm_jvp along x'         its dx, with v = x_dot and dy = x'
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm import _core, _layout, _validate
from batchnorm._validate import MaybeNone
from batchnorm.functional import Prepared, Saved, _deliver, _final, _input_of, _target, new_gradient

Array = NDArray[Any]
Outputs = tuple[Array | None, Array | None]

SecondGradient = Literal["dy", "x", "gamma"]
_SECOND: tuple[SecondGradient, ...] = get_args(SecondGradient)


class SecondGradients(NamedTuple):
    """Gradients of gradients: `ddy` and `dx` like x, `dgamma` (C,); None where not asked for.

    They are the last order there is: a function of derivatives that is given one raises NotImplementedError.
    """

    ddy: Array | MaybeNone
    dx: Array | MaybeNone
    dgamma: Array | MaybeNone

    def __repr__(self) -> str:
        return _validate.summary(self)


@_validate.keywords
def batch_norm_jvp(
    x_dot: Array,
    saved: Saved,
    *,
    gamma_dot: ArrayLike | None = None,
    beta_dot: ArrayLike | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """Directional derivative of `batch_norm` (forward-mode), through the batch's statistics.

    With x̂ = (x - mean)·rstd and means over the m values of a channel, along tangents x', gamma', beta':

        y' = gamma·rstd·(x' - mean(x') - x̂·mean(x'·x̂)) + gamma'·x̂ + beta'.

    Source: Ioffe & Szegedy (2015), algorithm 1, differentiated.

    Parameters
    ----------
    x_dot : tangent of x: shape and dtype of x. A memory order other than that of x costs a copy.
    saved : what `batch_norm` returned, called without ``out=x``. Its x must be unchanged.
    gamma_dot, beta_dot : tangents of gamma and beta, (C,) of any floating or integer dtype, or None for 0.
    out : where to put y': shape and dtype of x; may be `x_dot` or x itself, must not overlap them otherwise.
    num_threads : as in `batch_norm`.

    Returns
    -------
    y_dot : shape, dtype and memory order of x; `out` where given. Within 5·2⁻²⁴ (float32) of the sum of its absolute
        terms.

    Raises
    ------
    TypeError, ValueError
        For an x_dot or out unlike x, and tangents of another shape. Nothing is written by a call that raises.
    NotImplementedError
        For SecondGradients, whose derivative would be of third order.

    Notes
    -----
    Memory: y'; while it runs, up to 3 KB a channel and a few percent of x. Releases the GIL for large x.

    Examples
    --------
    >>> import batchnorm as bn
    >>> y, saved = bn.batch_norm(np.array([[1.0], [3.0]]), eps=0.0)
    >>> batch_norm_jvp(np.array([[1.0], [1.0]]), saved, beta_dot=[0.5])
    array([[0.5],
           [0.5]])
    """
    _refuse_third_order(x_dot=x_dot, saved=saved)
    x = _whole_input_of(saved)
    threads = _validate.num_threads(num_threads)
    x_dot = _validate.array_like("x_dot", x_dot, x)
    channels = x.shape[saved.axis]
    scale = _validate.optional_channel_values("gamma", saved.gamma, channels)
    turn = _validate.optional_channel_values("gamma_dot", gamma_dot, channels)
    lift = _validate.optional_channel_values("beta_dot", beta_dot, channels)
    if out is not None:
        apart = {"gamma": scale, "gamma_dot": turn, "beta_dot": lift}
        _validate.output(out, x, {"x_dot": x_dot, "x": x}, apart)
    block, sizes = _layout.dense(x, saved.axis)
    y_dot = _target(out, block)
    tangent, table = _layout.like(block, x_dot), saved.moments._table
    _core.batch_norm_jvp(tangent, block, sizes, table, scale, turn, lift, saved.eps, y_dot, threads)
    return _deliver(y_dot, out)


@_validate.keywords
def normalize_jvp(
    x_dot: Array,
    x: Array,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    mean_dot: ArrayLike | None = None,
    var_dot: ArrayLike | None = None,
    gamma_dot: ArrayLike | None = None,
    beta_dot: ArrayLike | None = None,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """Directional derivative of `normalize` (forward-mode), whose statistics are given.

    y' = gamma·rstd·(x' - mean' - x̂·rstd·var'/2) + gamma'·x̂ + beta', with x̂ = (x - mean)·rstd. Source: the formula of
    `normalize`, differentiated.

    Parameters
    ----------
    x_dot : tangent of x: shape and dtype of x.
    x, mean, var, gamma : as in `normalize`.
    mean_dot, var_dot, gamma_dot, beta_dot : tangents, (C,) of any floating or integer dtype, or None for 0.
    axis, eps : as in `normalize`.
    out : where to put y': may be `x_dot` or `x` itself, must not overlap them otherwise.
    num_threads : as in `batch_norm`.

    Returns
    -------
    y_dot : shape, dtype and memory order of x; `out` where given. Within 5·2⁻²⁴ (float32) of the sum of its absolute
        terms.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_jvp`; for a negative variance. Nothing is written by a call that raises.
    NotImplementedError
        For SecondGradients, whose derivative would be of third order.

    Notes
    -----
    x is read only where gamma_dot or var_dot is given. Memory: y'; while it runs, up to 1 KB a channel. Releases the
    GIL for large x.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0]])
    >>> normalize_jvp(np.ones_like(x), x, mean=[1.0], var=[4.0], gamma_dot=[1.0], eps=0.0)
    array([[0.5],
           [1.5]])
    """
    _refuse_third_order(x_dot=x_dot, x=x)
    x = _validate.array("x", x)
    axis = _validate.axis(axis, x.ndim)
    eps = _validate.eps(eps)
    threads = _validate.num_threads(num_threads)
    x_dot = _validate.array_like("x_dot", x_dot, x)
    channels = x.shape[axis]
    center = _validate.channel_values("mean", mean, channels)
    spread = _validate.variances(var, channels)
    scale = _validate.optional_channel_values("gamma", gamma, channels)
    given = {"mean_dot": mean_dot, "var_dot": var_dot, "gamma_dot": gamma_dot, "beta_dot": beta_dot}
    tangents = {name: _validate.optional_channel_values(name, a, channels) for name, a in given.items()}
    if out is not None:
        apart = {"mean": center, "var": spread, "gamma": scale, **tangents}
        _validate.output(out, x, {"x_dot": x_dot, "x": x}, apart)
    block, sizes = _layout.dense(x, axis)
    y_dot = _target(out, block)
    tangent = _layout.like(block, x_dot)
    _core.normalize_jvp(
        tangent, block, sizes, center, spread, scale, **tangents, eps=eps, out=y_dot, threads=threads
    )
    return _deliver(y_dot, out)


@_validate.keywords
def batch_norm_double_backward(
    v_dx: Array | None,
    dy: Array,
    saved: Saved,
    *,
    v_dgamma: ArrayLike | None = None,
    v_dbeta: ArrayLike | None = None,
    needs: Iterable[SecondGradient] = _SECOND,
    out: Outputs | None = None,
    num_threads: int | None = None,
) -> SecondGradients:
    """Gradients of the gradients that `batch_norm_backward` gives, by dy, x and gamma.

    Of sum(v·dx) + sum(w·dgamma) + sum(v_dbeta·dbeta), v = v_dx and w = v_dgamma being the gradients of a loss by dx and
    dgamma. With v0 = v - mean(v), g0 = dy - mean(dy), a = mean(v·x̂), b = mean(dy·x̂), c = mean(v0·g0) and m values a
    channel:

        ddy = gamma·rstd·(v0 - a·x̂) + w·x̂ + v_dbeta,
        dx = -gamma·rstd²·(b·v0 + a·g0 + (c - 3ab)·x̂) + w·rstd·(g0 - b·x̂),
        dgamma = rstd·m·(c - ab).

    Source: the formulas of `batch_norm_backward`, differentiated.

    Parameters
    ----------
    v_dx : shape and dtype of x, or None for 0.
    dy, saved : what `batch_norm_backward` was given.
    v_dgamma, v_dbeta : (C,) of any floating or integer dtype, or None for 0.
    needs : which of "dy", "x", "gamma" to compute.
    out : where to put (ddy, dx), either of which may be None. Each may be `v_dx`, `dy` or x itself, must not overlap
        them, or each other, otherwise.
    num_threads : as in `batch_norm`.

    Returns
    -------
    SecondGradients(ddy, dx, dgamma): ddy and dx like x; dgamma (C,) in the dtype of gamma (float64 where that is
    None); None where not asked for. Of the sum of its absolute terms, ddy is within 5·2⁻²⁴ (float32), dx and dgamma
    within 2·2⁻²⁴.

    Raises
    ------
    TypeError, ValueError
        For arrays unlike x, and unknown names in `needs`. Nothing is written by a call that raises.
    NotImplementedError
        For SecondGradients, whose derivative would be of third order.

    Notes
    -----
    The other combinations of second order (jvp of the backward pass, of the jvp, gradients of the jvp) are this
    function too; the head of this module says how. An empty batch gives empty arrays, and zeros. Memory: ddy and dx; an
    array like x where v_dx is None, and where ddy goes to an input that dx needs; while it runs, up to 3 KB a channel
    and a few percent of x. Releases the GIL for large x.

    Examples
    --------
    >>> import batchnorm as bn
    >>> y, saved = bn.batch_norm(np.array([[1.0], [3.0], [8.0]]), np.array([2.0]))
    >>> dy, v = np.array([[1.0], [0.0], [0.0]]), np.array([[0.0], [1.0], [0.0]])
    >>> second = batch_norm_double_backward(v, dy, saved)
    >>> bool(np.isclose(np.sum(second.ddy * dy), np.sum(v * bn.batch_norm_backward(dy, saved).dx)))
    True
    """
    _refuse_third_order(v_dx=v_dx, dy=dy, saved=saved)
    x = _whole_input_of(saved)
    call = _Second(v_dx, dy, x, saved.axis, saved.gamma, v_dgamma, v_dbeta, needs, out, {})
    threads = _validate.num_threads(num_threads)
    _core.batch_norm_double_backward(
        *call.tensors, call.sizes, saved.moments._table, *call.values, saved.eps, *call.targets, threads
    )
    return call.results.delivered()


@_validate.keywords
def normalize_double_backward(
    v_dx: Array | None,
    dy: Array,
    x: Array,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    v_dgamma: ArrayLike | None = None,
    v_dbeta: ArrayLike | None = None,
    axis: int = 1,
    eps: float = 1e-5,
    needs: Iterable[SecondGradient] = _SECOND,
    out: Outputs | None = None,
    num_threads: int | None = None,
) -> SecondGradients:
    """Gradients of the gradients that `normalize_backward` gives, by dy, x and gamma; the statistics are constants.

    With v = v_dx and w = v_dgamma: ddy = gamma·rstd·v + w·x̂ + v_dbeta, dx = w·rstd·dy, dgamma = rstd·sum(v·dy). Source:
    the formulas of `normalize_backward`, differentiated.

    Parameters
    ----------
    v_dx, v_dgamma, v_dbeta, needs, out, num_threads : as in `batch_norm_double_backward`.
    dy, x, mean, var, gamma, axis, eps : as in `normalize_backward`.

    Returns
    -------
    SecondGradients(ddy, dx, dgamma): as `batch_norm_double_backward`.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_double_backward`; for a negative variance. Nothing is written by a call that raises.
    NotImplementedError
        For SecondGradients, whose derivative would be of third order.

    Notes
    -----
    Memory: as `batch_norm_double_backward`. Releases the GIL for large x.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0]])
    >>> normalize_double_backward(x, np.ones_like(x), x, mean=[1.0], var=[4.0], eps=0.0).dgamma
    array([2.])
    """
    _refuse_third_order(v_dx=v_dx, dy=dy, x=x)
    x = _validate.array("x", x)
    axis = _validate.axis(axis, x.ndim)
    eps = _validate.eps(eps)
    threads = _validate.num_threads(num_threads)
    center = _validate.channel_values("mean", mean, x.shape[axis])
    spread = _validate.variances(var, x.shape[axis])
    apart: dict[str, Array | None] = {"mean": center, "var": spread}
    call = _Second(v_dx, dy, x, axis, gamma, v_dgamma, v_dbeta, needs, out, apart)
    _core.normalize_double_backward(
        *call.tensors, call.sizes, center, spread, *call.values, eps, *call.targets, threads
    )
    return call.results.delivered()


class _Second:
    """The checked arguments of a double backward call as the core wants them, and its results as the caller does."""

    def __init__(
        self,
        v_dx: Array | None,
        dy: Array,
        x: Array,
        axis: int,
        gamma: ArrayLike | None,
        v_dgamma: ArrayLike | None,
        v_dbeta: ArrayLike | None,
        needs: Iterable[str],
        out: Outputs | None,
        apart: dict[str, Array | None],
    ) -> None:
        dy = _validate.array_like("dy", dy, x)
        if v_dx is not None:
            v_dx = _validate.array_like("v_dx", v_dx, x)
        need_dy, need_x, need_gamma = _validate.needs_among(_SECOND, needs)
        given = {"gamma": gamma, "v_dgamma": v_dgamma, "v_dbeta": v_dbeta}
        values = {n: _validate.optional_channel_values(n, a, x.shape[axis]) for n, a in given.items()}
        inputs = {"v_dx": v_dx, "dy": dy, "x": x}
        may_be = {name: a for name, a in inputs.items() if a is not None}
        out_dy, to_x = _validate.two_outputs(out, x, may_be, {**apart, **values})
        block, self.sizes = _layout.dense(x, axis)
        v = np.zeros_like(block, subok=False) if v_dx is None else _layout.like(block, v_dx)
        self.tensors = v, _layout.like(block, dy), block
        self.values = values["gamma"], values["v_dgamma"], values["v_dbeta"]
        # ddy is written first: not to what dx is then computed from.
        to_dy = out_dy
        if to_dy is not None and need_x and any(_validate.overlap(to_dy, a) for a in may_be.values()):
            to_dy = None
        ddy = _target(to_dy, block) if need_dy else None
        dx = _target(to_x, block) if need_x else None
        dgamma = new_gradient(gamma, self.sizes[1]) if need_gamma else None
        results = SecondGradients(_final(ddy, out_dy), _final(dx, to_x), dgamma)
        self.results = Prepared(results, gamma, (ddy, out_dy), (dx, to_x))
        self.targets = (ddy, dx, dgamma)


def _refuse_third_order(**arguments: object) -> None:
    for name, value in arguments.items():
        if isinstance(value, SecondGradients):
            raise NotImplementedError(
                f"{name} must not be SecondGradients: derivatives end at the second order, and this would be the third"
            )


def _whole_input_of(saved: Saved) -> Array:
    """Give the x of `saved`, all of which was counted."""
    x = _input_of(saved)
    if saved.part is not None:
        raise NotImplementedError(
            "saved must be of a call without mask, weights, lengths or segments, got one of part of x: only its first "
            "derivatives are offered"
        )
    return x
