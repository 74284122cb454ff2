"""Derivatives of batch normalization in closed form: forward mode (jvp), and the second order (double backward).

With x̂ = (x - mean)·rstd and means over the m values of a channel, the derivative of x̂ along v is rstd·(v - mean(v) -
x̂·mean(v·x̂)), which is symmetric: forward and reverse mode are the same operator. Results are plain arrays, of which
nothing is recorded: there is no third order here, and what would need it raises NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from batchnorm import _core, _layout, _validate
from batchnorm.functional import Array, Gradients, Saved, _deliver, _input_of, _rounded, _target


class SecondGradients(NamedTuple):
    """Gradients of a function of dx, dgamma and dbeta: `ddy` by dy and `dx` by x, like x; `dgamma` by gamma, (C,).

    None where not asked for.
    """

    ddy: Array | None
    dx: Array | None
    dgamma: Array | None


def batch_norm_jvp(
    x_dot: Array,
    saved: Saved,
    *,
    gamma_dot: ArrayLike | None = None,
    beta_dot: ArrayLike | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """Give the derivative of `batch_norm`'s y along tangents (forward mode).

    y_dot = gamma·rstd·(x_dot - mean(x_dot) - x̂·mean(x_dot·x̂)) + gamma_dot·x̂ + beta_dot

    Parameters
    ----------
    x_dot : tangent of x: shape and dtype of x. A memory order other than that of x costs a copy.
    saved : what `batch_norm` returned, called without ``out=x``, mask, weights, lengths or segments.
    gamma_dot, beta_dot : tangents of gamma and beta, (C,) of any floating dtype, or None for 0.
    out : where to put y_dot: shape and dtype of x; may be `x_dot` or x itself, must not overlap them otherwise.
    num_threads : as in `batch_norm`.

    Returns
    -------
    y_dot : shape, dtype and memory order of x; `out` where given. Within 4·2⁻²⁴ (float32) of the sum of its absolute
    terms.

    Raises
    ------
    TypeError, ValueError
        For shapes and dtypes that do not fit. Nothing is written by a call that raises.
    NotImplementedError
        For the `SecondGradients` of a double backward in place of `saved`: that would be the third order.

    Notes
    -----
    An empty batch gives an empty y_dot. Memory: y_dot; while it runs, up to 3 KB a channel and a few percent of x.
    Releases the GIL for large x.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0], [8.0]])
    >>> from batchnorm import batch_norm
    >>> y, saved = batch_norm(x, eps=0.0)
    >>> batch_norm_jvp(np.ones_like(x), saved).round(12) + 0.0      # a shift of all x changes no y
    array([[0.],
           [0.],
           [0.]])
    >>> (batch_norm_jvp(x, saved, gamma_dot=[1.0]) - y).round(12) + 0.0  # nor does a scale, beside that of gamma
    array([[0.],
           [0.],
           [0.]])
    """
    x = _plain_input(saved)
    threads = _validate.num_threads(num_threads)
    _validate.array_like("x_dot", x_dot, x)
    channels = x.shape[saved.axis]
    scale = _validate.optional_channel_values("gamma", saved.gamma, channels)
    of_gamma = _validate.optional_channel_values("gamma_dot", gamma_dot, channels)
    of_beta = _validate.optional_channel_values("beta_dot", beta_dot, channels)
    if out is not None:
        apart = {"gamma": scale, "gamma_dot": of_gamma, "beta_dot": of_beta}
        _validate.output(out, x, {"x_dot": x_dot, "x": x}, apart)
    block, sizes = _layout.dense(x, saved.axis)
    y_dot = _target(out, block)
    _core.batch_norm_jvp(
        _layout.like(block, x_dot),
        block,
        sizes,
        saved.moments._table,
        scale,
        of_gamma,
        of_beta,
        saved.eps,
        y_dot,
        threads,
    )
    return _deliver(y_dot, out)


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
    """Give the derivative of `normalize`'s y along tangents (forward mode).

    y_dot = gamma·rstd·(x_dot - mean_dot - x̂·rstd·var_dot/2) + gamma_dot·x̂ + beta_dot

    Parameters
    ----------
    x_dot : tangent of x: shape and dtype of `x`.
    x : what was normalized. Read only where `gamma_dot` or `var_dot` is given.
    mean, var, gamma, axis, eps : what `normalize` was given.
    mean_dot, var_dot, gamma_dot, beta_dot : tangents, (C,) of any floating dtype, or None for 0.
    out, num_threads : as in `batch_norm_jvp`.

    Returns
    -------
    y_dot : shape, dtype and memory order of `x`; `out` where given.

    Raises
    ------
    TypeError, ValueError
        As `normalize`. Nothing is written by a call that raises.

    Notes
    -----
    Memory: y_dot; while it runs, up to 1 KB a channel. Releases the GIL for large `x`.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0]])
    >>> normalize_jvp(np.ones_like(x), x, mean=[1.0], var=[4.0], eps=0.0, beta_dot=[2.0])
    array([[2.5],
           [2.5]])
    """
    _validate.array("x", x)
    axis = _validate.axis(axis, x.ndim)
    eps = _validate.eps(eps)
    threads = _validate.num_threads(num_threads)
    _validate.array_like("x_dot", x_dot, x)
    channels = x.shape[axis]
    center = _validate.channel_values("mean", mean, channels)
    spread = _validate.variances(var, channels)
    given = {"gamma": gamma, "mean_dot": mean_dot, "var_dot": var_dot}
    given |= {"gamma_dot": gamma_dot, "beta_dot": beta_dot}
    checked = {name: _validate.optional_channel_values(name, v, channels) for name, v in given.items()}
    if out is not None:
        _validate.output(out, x, {"x_dot": x_dot, "x": x}, {"mean": center, "var": spread, **checked})
    block, sizes = _layout.dense(x, axis)
    y_dot = _target(out, block)
    _core.normalize_jvp(
        _layout.like(block, x_dot),
        block,
        sizes,
        center,
        spread,
        checked["gamma"],
        checked["mean_dot"],
        checked["var_dot"],
        checked["gamma_dot"],
        checked["beta_dot"],
        eps,
        y_dot,
        threads,
    )
    return _deliver(y_dot, out)


def batch_norm_double_backward(
    v_dx: Array,
    dy: Array,
    saved: Saved,
    *,
    v_dgamma: ArrayLike | None = None,
    v_dbeta: ArrayLike | None = None,
    needs: Iterable[str] = ("dy", "x", "gamma"),
    num_threads: int | None = None,
) -> SecondGradients:
    """Gradients of `batch_norm_backward`: of what depends on dx, dgamma and dbeta, by dy, x and gamma.

    With v = v_dx, w = v_dgamma, v0 = v - mean(v), g0 = dy - mean(dy), a = mean(v·x̂), b = mean(dy·x̂), c = mean(v0·g0):

        ddy = gamma·rstd·(v0 - a·x̂) + w·x̂ + v_dbeta
        dx = -gamma·rstd²·(b·v0 + a·g0 + (c - 3·a·b)·x̂) + w·rstd·(g0 - b·x̂)
        dgamma = m·rstd·(c - a·b)

    Parameters
    ----------
    v_dx : cotangent of dx: the gradient by it, shape and dtype of x.
    dy, saved : what `batch_norm_backward` was given; `saved` of a call without mask, weights, lengths or segments.
    v_dgamma, v_dbeta : cotangents of dgamma and dbeta, (C,) of any floating dtype, or None for 0.
    needs : which of "dy", "x", "gamma" to compute.
    num_threads : as in `batch_norm`.

    Returns
    -------
    SecondGradients(ddy, dx, dgamma): arrays like x, and (C,) in the dtype of gamma (float64 where that is None); None
    where not asked for. ddy is as accurate as dx of the first order; dx is computed in float64 and rounded once.

    Raises
    ------
    TypeError, ValueError
        For arrays unlike x, and unknown names in `needs`.
    NotImplementedError
        For `SecondGradients` in place of `saved`: that would be the third order.

    Notes
    -----
    An empty batch gives empty arrays, and zeros. Memory: ddy and dx; while it runs, up to 3 KB a channel and a few
    percent of x. Releases the GIL for large x.

    Examples
    --------
    >>> x, dy = np.array([[1.0], [3.0], [8.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> from batchnorm import batch_norm
    >>> y, saved = batch_norm(x, np.array([2.0]))
    >>> second = batch_norm_double_backward(np.ones_like(x), dy, saved)
    >>> second.ddy.round(12) + 0.0      # the sum of dx is 0 whatever dy
    array([[0.],
           [0.],
           [0.]])
    """
    x = _plain_input(saved)
    need_dy, need_x, need_gamma = _needs(needs)
    threads = _validate.num_threads(num_threads)
    _validate.array_like("v_dx", v_dx, x)
    _validate.array_like("dy", dy, x)
    channels = x.shape[saved.axis]
    scale = _validate.optional_channel_values("gamma", saved.gamma, channels)
    of_gamma = _validate.optional_channel_values("v_dgamma", v_dgamma, channels)
    of_beta = _validate.optional_channel_values("v_dbeta", v_dbeta, channels)
    block, sizes = _layout.dense(x, saved.axis)
    ddy = np.empty_like(block, subok=False) if need_dy else None
    dx = np.empty_like(block, subok=False) if need_x else None
    dgamma = _core.batch_norm_double_backward(
        _layout.like(block, v_dx),
        _layout.like(block, dy),
        block,
        sizes,
        saved.moments._table,
        scale,
        of_gamma,
        of_beta,
        saved.eps,
        ddy,
        dx,
        need_gamma,
        threads,
    )
    return SecondGradients(ddy, dx, _in_dtype_of(dgamma, saved.gamma))


def normalize_double_backward(
    v_dx: Array,
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
    needs: Iterable[str] = ("dy", "x", "gamma"),
    num_threads: int | None = None,
) -> SecondGradients:
    """Gradients of `normalize_backward`, whose statistics are constants.

    ddy = gamma·rstd·v_dx + v_dgamma·x̂ + v_dbeta,    dx = v_dgamma·rstd·dy,    dgamma = rstd·sum(v_dx·dy)

    Parameters
    ----------
    v_dx : cotangent of dx, shape and dtype of `x`.
    dy, x, mean, var, gamma, axis, eps : what `normalize_backward` was given. x is read only where `v_dgamma` is given.
    v_dgamma, v_dbeta, needs, num_threads : as in `batch_norm_double_backward`.

    Returns
    -------
    SecondGradients(ddy, dx, dgamma), as `batch_norm_double_backward` gives them.

    Raises
    ------
    TypeError, ValueError
        As `normalize` and `batch_norm_double_backward`.

    Notes
    -----
    Memory: ddy and dx; while it runs, up to 3 KB a channel and a few percent of `x`. Releases the GIL for large `x`.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0]])
    >>> normalize_double_backward(np.ones_like(x), x, x, mean=[1.0], var=[4.0], eps=0.0).dgamma
    array([2.])
    """
    _validate.array("x", x)
    axis = _validate.axis(axis, x.ndim)
    eps = _validate.eps(eps)
    need_dy, need_x, need_gamma = _needs(needs)
    threads = _validate.num_threads(num_threads)
    _validate.array_like("v_dx", v_dx, x)
    _validate.array_like("dy", dy, x)
    channels = x.shape[axis]
    center = _validate.channel_values("mean", mean, channels)
    spread = _validate.variances(var, channels)
    scale = _validate.optional_channel_values("gamma", gamma, channels)
    of_gamma = _validate.optional_channel_values("v_dgamma", v_dgamma, channels)
    of_beta = _validate.optional_channel_values("v_dbeta", v_dbeta, channels)
    block, sizes = _layout.dense(x, axis)
    ddy = np.empty_like(block, subok=False) if need_dy else None
    dx = np.empty_like(block, subok=False) if need_x else None
    dgamma = _core.normalize_double_backward(
        _layout.like(block, v_dx),
        _layout.like(block, dy),
        block,
        sizes,
        center,
        spread,
        scale,
        of_gamma,
        of_beta,
        eps,
        ddy,
        dx,
        need_gamma,
        threads,
    )
    return SecondGradients(ddy, dx, _in_dtype_of(dgamma, gamma))


def _plain_input(saved: Any) -> Array:
    """Give the x of `saved`, which must be of the first order and of all values alike."""
    if isinstance(saved, SecondGradients | Gradients):
        raise NotImplementedError(
            "saved must be the Saved of a batch_norm call, got gradients: derivatives beyond the second order, and those "
            "of arrays of which nothing was recorded, are not offered"
        )
    x = _input_of(saved)
    if saved.part is not None:
        raise NotImplementedError(
            "saved must be of a call without mask, weights, lengths or segments, got one of part of x: only its first "
            "derivatives are offered"
        )
    return x


def _needs(names: Any) -> tuple[bool, bool, bool]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"needs must be a tuple of names, got {_validate.kind(names)}")
    asked = tuple(names)
    for name in asked:
        if not isinstance(name, str) or name not in ("dy", "x", "gamma"):
            raise ValueError(f"needs must name some of 'dy', 'x', 'gamma', got {name!r}")
    return "dy" in asked, "x" in asked, "gamma" in asked


def _in_dtype_of(gradient: Array | None, gamma: ArrayLike | None) -> Array | None:
    if gradient is None or gamma is None:
        return gradient
    dtype = np.asarray(gamma).dtype
    return gradient if gradient.dtype == dtype else _rounded(gradient, dtype)
