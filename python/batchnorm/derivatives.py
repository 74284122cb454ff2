"""Derivatives of the normalizations in closed form: the verbs, which take what a forward call has saved.

First derivatives are `backward` (and its halves `grad_sums` and `grad_input`) and `jvp`; second order is where it ends.
All of its combinations are one function, because the derivatives involved are symmetric:

    gradients of gradients           double_backward(v, dy, saved)
    jvp of backward along x'         its dx and dgamma, with v = x' (Hessian-vector products)
    gradient by x of jvp             its dx, with v = x_dot and dy the gradient of y_dot
    jvp of jvp along x'              its dx, with v = x_dot and dy = x'
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Unpack, get_args

import numpy as np
from numpy.typing import ArrayLike

from batchnorm import _core, _keywords, _passes, _validate, _where
from batchnorm._arrays import ORDERS, Array, Layout, Target
from batchnorm._kept import Kept
from batchnorm._keywords import NoOptions
from batchnorm._parts import ABOUTS, Part
from batchnorm._passes import ReluMask
from batchnorm._validate import PADDINGS
from batchnorm.moments import Moments
from batchnorm.saved import (
    Gradients,
    GradSums,
    GraphGradients,
    GraphSecondGradients,
    Saved,
    SecondGradients,
    grad_sums_of,
)

Outputs = tuple[Array | None, Array | None]
Gradient = Literal["x", "gamma", "beta", "residual"]
SecondGradient = Literal["dy", "x", "gamma"]
NEEDS: tuple[Gradient, ...] = get_args(Gradient)
_SECOND: tuple[SecondGradient, ...] = get_args(SecondGradient)
_PADDING = {padding: k for k, padding in enumerate(PADDINGS)}  # as the core takes them


@_keywords.options(NoOptions)
def backward(
    dy: Array,
    saved: Saved,
    *,
    needs: Iterable[Gradient] = NEEDS,
    out: Array | Outputs | None = None,
    num_threads: int | None = None,
    **others: Unpack[NoOptions],
) -> Gradients:
    """Gradients of a normalization, through the batch's statistics.

    With x̂ = (x - mean)·rstd and means over the m values that share statistics:

        dbeta = sum(dy),    dgamma = sum(dy·x̂),    dx = gamma·rstd·(dy - mean(dy) - x̂·mean(dy·x̂)).

    With weights w of sum W:  dx = gamma·rstd·(dy - w/W·sum(dy) - w/W·x̂·sum(dy·x̂)),  and beside the positions that
    count, dx is 0 and dy is left out of the sums where y was 0 (``padding="zero"``), dx is dy where y was x ("keep").
    Where statistics were given (`normalize`), dx = gamma·rstd·dy. After ReLU, dy is first set to 0 where y was not above
    0 before it; that is dresidual. Segments and ghosts each have a dx of their own, and share gamma and beta. With
    renorm, whose r and d are constants, gamma·r stands for gamma in dx, and dgamma = sum(dy·(x̂·r + d)). Source: Ioffe &
    Szegedy (2015), section 3, simplified; Ioffe (2017), section 3.

    An empty batch gives an empty dx, and zeros. TypeError or ValueError for a dy or out unlike x, and unknown names in
    `needs`; nothing is written by a call that raises. Memory: dx and dresidual; while it runs, up to 3 KB a channel and a
    few percent of x. Releases the GIL for large x.

    Parameters
    ----------
    dy : gradient of y: shape and dtype of x. A memory order other than that of x costs a copy.
    saved : what the forward call returned. Its x (or y) must be unchanged.
    needs : which of "x", "gamma", "beta" and "residual" to compute.
    out : where to put dx: shape and dtype of x; may be `dy` or x itself, must not overlap them otherwise. Or a tuple
        (dx, dresidual) of such arrays, apart from each other, or None.
    num_threads : as in `batch_norm`.

    Returns
    -------
    Gradients(dx, dgamma, dbeta, dresidual), of `graph_norm` GraphGradients, which has dalpha too: dx and dresidual like
    x; dgamma and dbeta (C,) in the dtype of gamma (float64 where that is None or integers); None where not asked for,
    as dresidual is where no residual was added. Each within 4·2⁻²⁴ (float32) of the sum of its absolute terms; 6·2⁻²⁴
    with weights other than 0 and 1.

    Examples
    --------
    >>> from batchnorm.forward import batch_norm
    >>> y, saved = batch_norm(np.array([[1.0], [3.0], [8.0]]), np.array([2.0]))
    >>> dx, dgamma, dbeta, _ = backward(np.array([[1.0], [0.0], [0.0]]), saved)
    >>> dx.round(4), dbeta
    (array([[ 0.2177],
           [-0.3048],
           [ 0.0871]]), array([1.]))
    """
    if others:
        _keywords.no_options("backward", others)
    if type(saved) is Saved and isinstance(saved.x, np.ndarray) and _is_ordinary(saved):
        part, axis = saved.part, saved.axis[0] if isinstance(saved.axis, tuple) else saved.axis
        rest, done = (saved.gamma, axis, saved.eps, needs, out, num_threads), None
        if isinstance(saved.moments, Moments):
            if saved.renorm is None and not part.strided:
                bits = None if saved.relu is None else saved.relu.data
                about = 0 if not part.each_position else 1 if part.about == "mean" else 2
                how = (part.weights, _PADDING[part.padding], bits, saved.has_residual, part.offsets, part.width, about)
                done = _core.try_batch_norm_backward(Gradients, dy, saved.x, saved.moments._table, *rest, *how)
        elif saved.given is not None and saved.layout is None:
            done = _core.try_normalize_backward(Gradients, dy, saved.x, *saved.given, *rest)
        if done is not None:
            return done

    of = Kept(saved, num_threads)
    need_x, need_gamma, need_beta, need_residual = _validate.needs_among(NEEDS, needs)
    dy = of.like_x("dy", dy)
    outputs = tuple(_where.recognized_or_same("out", a) for a in (out if isinstance(out, tuple) else (out, None)))
    to_x, to_residual = _validate.two_outputs(outputs, of.x, {"dy": dy, "x": of.x}, of.apart, "dx, dresidual")
    dx = Target(of.layout, of.x, to_x, need_x)
    residual = Target(of.layout, of.x, to_residual, need_residual and saved.has_residual)
    dgamma, dbeta = of.room(need_gamma, by_core=not of.in_sets), of.room(need_beta, by_core=not of.in_sets)
    results = Gradients(dx.array, dgamma, dbeta, residual.array)
    dscale, dshift, dalpha = dgamma, dbeta, of.room_of_alpha(need_gamma)
    if of.in_sets:
        dscale, dshift = of.wide(need_gamma), of.wide(need_gamma or need_beta)
    if of.alpha is not None:
        results = GraphGradients.beside(results, dalpha)
    to = dx.block, residual.block, dscale, dshift, of.threads
    _where.passes(of.x).backward(of.layout.block(dy), of.block, of.call, of.statistics, *to)
    of.sum_up(results, of.turn, dscale, dshift)
    if dalpha is not None and dscale is not None:
        _passes.combine(dalpha, of.alpha_turn, dscale, of.alpha_lift, dshift)
    dx.deliver()
    residual.deliver()
    return _where.given_back(of.rounded(results), of.x)


@_keywords.keywords
def grad_sums(dy: Array, saved: Saved, *, num_threads: int | None = None) -> GradSums:
    """First half of `backward`: the sums over the batch that it needs.

    Between the halves, the sums of several parts of a batch (ranks, micro-batches) may be added, by ``+`` or sum(). All
    parts must have been summed about the same mean: that of the merged moments.

    Parameters
    ----------
    dy, saved, num_threads : as in `backward`; `saved` of a call that took the statistics of the batch. Errors, memory and
        threads as there, without dx.

    Returns
    -------
    GradSums: sum(dy) and sum(dy·(x - mean)), float64, one for each entry of ``saved.moments``, of `group_norm` for each
    sample and channel; of the dy that ReLU lets through, where a position counts. Of `layer_norm` and `rms_norm`, whose
    dgamma and dbeta are no such sums, they are those of gamma·dy (about 0 in `rms_norm`).

    Examples
    --------
    >>> from batchnorm.forward import batch_norm
    >>> y, saved = batch_norm(np.array([[1.0], [3.0]]))
    >>> grad_sums(np.array([[1.0], [2.0]]), saved).sum_dy_xmu
    array([1.])
    """
    of = Kept(saved, num_threads)
    moments = of.moments("grad_sums")
    dy = of.like_x("dy", dy)
    table = _where.empty(of.x, (len(moments) * saved.part.sums_an_entry, 4))
    _where.passes(of.x).grad_sums(of.layout.block(dy), of.block, of.call, moments, table, of.threads)
    return grad_sums_of(lambda: saved.part.counts(of.layout), table)


@_keywords.keywords
def grad_input(
    dy: Array, saved: Saved, sums: GradSums, *, out: Array | None = None, num_threads: int | None = None
) -> Array:
    """Second half of `backward`: dx from sums that may have been added over parts of the batch.

    dx = gamma·rstd·(dy - S/n - x̂·rstd·D/n), with S = sums.sum_dy, D = sums.sum_dy_xmu, n = saved.moments.count. Of the
    sums of the same call, the bits of `backward`.

    Parameters
    ----------
    dy, saved, num_threads : as in `grad_sums`.
    sums : GradSums over all the values that `saved.moments` counts; ValueError for another number of values.
    out : as in `backward`. Errors, memory and threads as there.

    Returns
    -------
    dx : shape, dtype and memory order of x; `out` where given.

    Examples
    --------
    >>> from batchnorm.forward import batch_norm
    >>> y, saved = batch_norm(np.array([[1.0], [3.0], [8.0]]))
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> bool((grad_input(dy, saved, grad_sums(dy, saved)) == backward(dy, saved).dx).all())
    True
    """
    of = Kept(saved, num_threads)
    moments = of.moments("grad_input")
    _validate.instance("sums", sums, GradSums, "GradSums")
    dy, out = of.like_x("dy", dy), _where.recognized_or_same("out", out)
    if out is not None:
        _validate.output(out, of.x, {"dy": dy, "x": of.x}, of.apart)
    is_there = _where.on_device(of.x)
    if is_there and sums.at is not None and sums.at.shape[0] == len(moments) * saved.part.sums_an_entry:
        pass  # of the same device, where counts are not looked at
    elif not np.array_equal(sums.count, saved.part.spread(_where.on_host(moments)[:, 0])):
        raise ValueError("sums must count the values that saved.moments count, got others")
    dx = Target(of.layout, of.x, out)
    table = sums.at if is_there and sums.at is not None else sums._table
    _where.passes(of.x).grad_input(of.layout.block(dy), of.block, of.call, moments, table, dx.block, None, of.threads)
    return _where.given_back(dx.deliver(), of.x)


@_keywords.keywords
def jvp(
    x_dot: Array,
    saved: Saved,
    *,
    gamma_dot: ArrayLike | None = None,
    beta_dot: ArrayLike | None = None,
    residual_dot: Array | None = None,
    alpha_dot: ArrayLike | None = None,
    mean_dot: ArrayLike | None = None,
    var_dot: ArrayLike | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """Directional derivative of a normalization (forward-mode), through the batch's statistics.

    With x̂ = (x - mean)·rstd and means over the m values that share statistics, along tangents x', gamma', beta':

        y' = gamma·rstd·(x' - mean(x') - x̂·mean(x'·x̂)) + gamma'·x̂ + beta'.

    With weights the means are weighted. Where statistics were given, y' = gamma·rstd·(x' - mean' - x̂·rstd·var'/2) +
    gamma'·x̂ + beta'. A residual's tangent is added; after ReLU y' is 0 where y is; beside the positions that count it is
    0 (``padding="zero"``) or x' ("keep"). With renorm, x̂·r + d stands for x̂ at gamma', and gamma·r for gamma. Source:
    Ioffe & Szegedy (2015), algorithm 1, differentiated.

    TypeError or ValueError for an x_dot or out unlike x, tangents of another shape, or of what the call had not;
    NotImplementedError for SecondGradients, whose derivative would be of third order. Nothing is written by a call that
    raises. Memory: y'; while it runs, up to 3 KB a channel and a few percent of x. Releases the GIL for large x.

    Parameters
    ----------
    x_dot : tangent of x: shape and dtype of x. A memory order other than that of x costs a copy.
    saved : what the forward call returned. Its x (or y) must be unchanged.
    gamma_dot, beta_dot : tangents of gamma and beta, (C,) of any floating or integer dtype, or None for 0.
    residual_dot : tangent of the residual: shape and dtype of x, or None for 0.
    alpha_dot : tangent of alpha in `graph_norm`, (C,), or None for 0.
    mean_dot, var_dot : tangents of statistics that were given, (C,), or None for 0.
    out : where to put y': shape and dtype of x; may be `x_dot` or x itself, must not overlap them otherwise.
    num_threads : as in `batch_norm`.

    Returns
    -------
    y_dot : shape, dtype and memory order of x; `out` where given. Within 5·2⁻²⁴ (float32) of the sum of its absolute
        terms.

    Examples
    --------
    >>> from batchnorm.forward import batch_norm
    >>> y, saved = batch_norm(np.array([[1.0], [3.0]]), eps=0.0)
    >>> jvp(np.array([[1.0], [1.0]]), saved, beta_dot=[0.5])
    array([[0.5],
           [0.5]])
    """
    _refuse_third_order(x_dot=x_dot, saved=saved)
    of = Kept(saved, num_threads)
    _where.require_host("jvp", x=of.x)
    x_dot = _validate.array_like("x_dot", x_dot, of.x)
    given = {"gamma_dot": gamma_dot, "beta_dot": beta_dot, "mean_dot": mean_dot, "var_dot": var_dot}
    dots = {name: of.channel_values(name, a) for name, a in given.items()}
    if saved.given is None and (mean_dot is not None or var_dot is not None):
        raise ValueError("mean_dot and var_dot must be None where the statistics are those of the batch")
    added = of.like_residual("residual_dot", residual_dot)
    _where.require_host("jvp", x_dot=x_dot, residual_dot=added, **dots)
    of_alpha = of.channel_values("alpha_dot", alpha_dot)
    if of_alpha is not None and of.alpha is None:
        raise ValueError("alpha_dot must be None where there was no alpha, as graph_norm has")
    if out is not None:
        _validate.output(out, of.x, {"x_dot": x_dot, "x": of.x}, of.apart | dots)
    y_dot, tangent = Target(of.layout, of.x, out), of.layout.block(x_dot)
    by_channel = of.tangents(dots["gamma_dot"], dots["beta_dot"], of.turn)
    if of_alpha is not None:
        by_channel = of.along_alpha(of_alpha, *by_channel)
    of_statistics = dots["mean_dot"], of.of_var(dots["var_dot"])
    to = *of_statistics, *by_channel, y_dot.block, of.threads
    _core.jvp(tangent, of.block, of.call._replace(residual=added), of.statistics, *to)
    return y_dot.deliver()


@_keywords.keywords
def double_backward(
    v_dx: Array | None,
    dy: Array,
    saved: Saved,
    *,
    v_dgamma: ArrayLike | None = None,
    v_dbeta: ArrayLike | None = None,
    v_dresidual: Array | None = None,
    v_dalpha: ArrayLike | None = None,
    needs: Iterable[SecondGradient] = _SECOND,
    out: Outputs | None = None,
    num_threads: int | None = None,
) -> SecondGradients:
    """Gradients of the gradients that `backward` gives, by dy, x and gamma (and alpha).

    Of sum(v·dx) + sum(w·dgamma) + sum(v_dbeta·dbeta), v = v_dx and w = v_dgamma being the gradients of a loss by dx and
    dgamma. With v0 = v - mean(v), g0 = dy - mean(dy), a = mean(v·x̂), b = mean(dy·x̂), c = mean(v0·g0) and m values that
    share statistics:

        ddy = gamma·rstd·(v0 - a·x̂) + w·x̂ + v_dbeta,
        dx = -gamma·rstd²·(b·v0 + a·g0 + (c - 3ab)·x̂) + w·rstd·(g0 - b·x̂),
        dgamma = rstd·m·(c - ab).

    Where statistics were given: ddy = gamma·rstd·v + w·x̂ + v_dbeta, dx = w·rstd·dy, dgamma = rstd·sum(v·dy). ReLU's mask
    and renorm's r and d are constants. Source: the formulas of `backward`, differentiated. The other combinations of
    second order (jvp of the backward pass, of the jvp, gradients of the jvp) are this function too; the head of this module
    says how.

    An empty batch gives empty arrays, and zeros. TypeError or ValueError for arrays unlike x, and unknown names in `needs`;
    NotImplementedError for SecondGradients, whose derivative would be of third order. Nothing is written by a call that
    raises. Memory: ddy and dx; an array like x where v_dx is None, and where ddy goes to an input that dx needs; while it
    runs, up to 3 KB a channel and a few percent of x, and some float64 tensors where more than a batch of which all counts
    was saved. Releases the GIL for large x.

    Parameters
    ----------
    v_dx : shape and dtype of x, or None for 0.
    dy, saved : what `backward` was given.
    v_dgamma, v_dbeta : (C,) of any floating or integer dtype, or None for 0.
    v_dresidual : gradient by dresidual: shape and dtype of x, or None for 0.
    v_dalpha : gradient by dalpha in `graph_norm`, (C,), or None for 0.
    needs : which of "dy", "x", "gamma" to compute.
    out : where to put (ddy, dx), either of which may be None. Each may be `v_dx`, `dy` or x itself, must not overlap
        them, or each other, otherwise.
    num_threads : as in `batch_norm`.

    Returns
    -------
    SecondGradients(ddy, dx, dgamma), of `graph_norm` GraphSecondGradients, which has dalpha too: ddy and dx like x;
    dgamma (C,) in the dtype of gamma (float64 where that is None); None where not asked for. Of the sum of its absolute
    terms, ddy is within 5·2⁻²⁴ (float32), dx and dgamma within 2·2⁻²⁴.

    Examples
    --------
    >>> from batchnorm.forward import batch_norm
    >>> y, saved = batch_norm(np.array([[1.0], [3.0], [8.0]]), np.array([2.0]))
    >>> dy, v = np.array([[1.0], [0.0], [0.0]]), np.array([[0.0], [1.0], [0.0]])
    >>> second = double_backward(v, dy, saved)
    >>> bool(np.isclose(np.sum(second.ddy * dy), np.sum(v * backward(dy, saved).dx)))
    True
    """
    _refuse_third_order(v_dx=v_dx, dy=dy, saved=saved)
    of = Kept(saved, num_threads)
    _where.require_host("double_backward", x=of.x)
    dy = _validate.array_like("dy", dy, of.x)
    v_dx = None if v_dx is None else _validate.array_like("v_dx", v_dx, of.x)
    need_dy, need_x, need_gamma = _validate.needs_among(_SECOND, needs)
    v_scale, v_shift = of.channel_values("v_dgamma", v_dgamma), of.channel_values("v_dbeta", v_dbeta)
    v_alpha = of.channel_values("v_dalpha", v_dalpha)
    if v_alpha is not None and of.alpha is None:
        raise ValueError("v_dalpha must be None where there was no alpha, as graph_norm has")
    added = of.like_residual("v_dresidual", v_dresidual)
    others = {"v_dx": v_dx, "dy": dy, "v_dgamma": v_scale, "v_dbeta": v_shift, "v_dalpha": v_alpha}
    _where.require_host("double_backward", v_dresidual=added, **others)
    inputs = {name: a for name, a in (("v_dx", v_dx), ("dy", dy), ("x", of.x)) if a is not None}
    apart = of.apart | {"v_dgamma": v_scale, "v_dbeta": v_shift, "v_dalpha": v_alpha}
    out_dy, out_x = _validate.two_outputs(out, of.x, inputs, apart, "ddy, dx")
    layout, call = of.layout, of.call
    ddy, dx = Target(layout, of.x, out_dy, need_dy), Target(layout, of.x, out_x, need_x)
    dgamma = of.room(need_gamma)
    results, dalpha = SecondGradients(ddy.array, dx.array, dgamma), of.room_of_alpha(need_gamma)
    if of.alpha is not None:
        results = GraphSecondGradients.beside(results, dalpha)
    v = np.zeros(layout.sizes, of.x.dtype) if v_dx is None else layout.block(v_dx)
    to_dy = ddy.block
    if out_dy is not None and need_x and any(_where.overlap(out_dy, a) for a in inputs.values()):
        # ddy is written first: not to what dx is then computed from.
        to_dy = np.empty(layout.sizes, of.x.dtype)
    second = _passes.Second(of.block, v, layout.block(dy), to_dy, dx.block)
    by_channel = of.tangents(v_scale, v_shift, of.r)
    if (
        call.weights is None
        and call.offsets is None
        and saved.part.is_of_channels
        and not call.relu
        and saved.y is None
        and added is None
    ):
        dscale = np.empty(of.channels)
        to = *by_channel, to_dy, dx.block, dscale, of.threads
        _core.double_backward(v, second.g, of.block, call, of.statistics, *to)
    else:
        stopped = None if saved.relu is None else ~saved.relu.block()
        of_sets = *by_channel, v_alpha
        dscale, of_alpha = _passes.double_backward_by_formula(call, second, stopped, added, of.standard(), *of_sets)
        if dalpha is not None:
            _passes.combine(dalpha, None, of_alpha, None, None)
    if to_dy is not ddy.block:
        ddy.block[...] = to_dy
    of.sum_up(results, of.r, dscale, None)
    ddy.deliver()
    dx.deliver()
    return of.rounded(results)


def _is_ordinary(saved: Saved) -> bool:
    """Tell whether the core may look at what was saved, whose fields may have been replaced, before it is checked."""
    layout, relu, part, axis = saved.layout, saved.relu, saved.part, saved.axis
    return (
        type(part) is Part and part.padding in _PADDING and part.about in ABOUTS and part.alpha is None
        and (part.each_position == isinstance(axis, tuple)) and (isinstance(axis, int) or len(axis) == 1)
        and (relu is None or type(relu) is ReluMask)
        and (layout is None or (type(layout) is Layout and layout.order == ORDERS[len(layout.order)]))
    )  # fmt: skip


def _refuse_third_order(**arguments: object) -> None:
    for name, value in arguments.items():
        if isinstance(value, SecondGradients):
            raise NotImplementedError(
                f"{name} must not be SecondGradients: derivatives end at the second order, and this would be the third"
            )
