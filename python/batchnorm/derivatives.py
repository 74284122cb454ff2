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
from typing import Any, Literal, TypeVar, Unpack, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm import _core, _passes, _validate
from batchnorm._arrays import ORDERS, Layout, Target
from batchnorm._parts import Part
from batchnorm._passes import ReluMask, Standard
from batchnorm._validate import PADDINGS, NoOptions
from batchnorm.moments import Moments
from batchnorm.running import Renorm
from batchnorm.saved import Gradients, GradSums, PerChannel, Saved, SecondGradients, kept_affine

Array = NDArray[Any]
Outputs = tuple[Array | None, Array | None]
Gradient = Literal["x", "gamma", "beta", "residual"]
SecondGradient = Literal["dy", "x", "gamma"]
NEEDS: tuple[Gradient, ...] = get_args(Gradient)
_SECOND: tuple[SecondGradient, ...] = get_args(SecondGradient)
_Results = TypeVar("_Results", Gradients, SecondGradients)


@_validate.options(NoOptions)
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
    renorm, whose r and d are constants, gamma·r stands for gamma in dx, and dgamma = sum(dy·(x̂·r + d)).

    Source: Ioffe & Szegedy (2015), section 3, simplified; Ioffe (2017), section 3.

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
    Gradients(dx, dgamma, dbeta, dresidual): dx and dresidual like x; dgamma and dbeta (C,) in the dtype of gamma
    (float64 where that is None or integers); None where not asked for, as dresidual is where no residual was added. Each
    within 4·2⁻²⁴ (float32) of the sum of its absolute terms; 6·2⁻²⁴ with weights other than 0 and 1.

    Raises
    ------
    TypeError, ValueError
        For a dy or out unlike x, and unknown names in `needs`. Nothing is written by a call that raises.

    Notes
    -----
    An empty batch gives an empty dx, and zeros. Memory: dx and dresidual; while it runs, up to 3 KB a channel and a few
    percent of x. Releases the GIL for large x.

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
        _validate.no_options("backward", others)
    if type(saved) is Saved and (saved.layout is None or saved.layout.order == ORDERS[len(saved.layout.order)]):
        part, rest, done = saved.part, (saved.gamma, saved.axis, saved.eps, needs, out, num_threads), None
        if type(saved.moments) is Moments:
            if part.offsets is None and saved.renorm is None:
                bits = None if saved.relu is None else saved.relu.data
                how = (part.weights, PADDINGS.index(part.padding), bits, saved.has_residual)
                done = _core.try_batch_norm_backward(Gradients, dy, saved.x, saved.moments._table, *rest, *how)
        elif saved.given is not None and saved.layout is None:
            done = _core.try_normalize_backward(Gradients, dy, saved.x, *saved.given, *rest)
        if done is not None:
            return done

    of = _Kept(saved, num_threads)
    need_x, need_gamma, need_beta, need_residual = _validate.needs_among(NEEDS, needs)
    need_residual = need_residual and saved.has_residual
    dy = _validate.array_like("dy", dy, of.x)
    to_x, to_residual = _outputs(out, of, {"dy": dy, "x": of.x}, "dx, dresidual")
    dx = Target(of.layout, of.x, to_x) if need_x else None
    residual = Target(of.layout, of.x, to_residual) if need_residual else None
    dgamma, dbeta = of.room(need_gamma, by_core=of.turn is None), of.room(need_beta, by_core=of.turn is None)
    results = Gradients(_array(dx), dgamma, dbeta, _array(residual))
    dscale, dshift = (dgamma, dbeta) if of.turn is None else (of.wide(need_gamma), of.wide(need_gamma or need_beta))
    grad, to = of.layout.block(dy), (_block(dx), _block(residual), dscale, dshift, of.threads)
    if of.given is not None:
        mean, var = of.given
        _core.normalize_backward(grad, of.block, of.call, mean, var, *to)
    else:
        _core.backward(grad, of.block, of.call, of.moments, *to)
    of.sum_up(dgamma, dbeta, of.turn, dscale, dshift)
    if dx is not None:  # no loop, whose iterator would ask for memory
        dx.deliver()
    if residual is not None:
        residual.deliver()
    return of.rounded(results)


@_validate.keywords
def grad_sums(dy: Array, saved: Saved, *, num_threads: int | None = None) -> GradSums:
    """First half of `backward`: the sums over the batch that it needs.

    Between the halves, the sums of several parts of a batch (ranks, micro-batches) may be added, by ``+`` or sum(). All
    parts must have been summed about the same mean: that of the merged moments.

    Parameters
    ----------
    dy, saved, num_threads : as in `backward`; `saved` of a call that took the statistics of the batch.

    Returns
    -------
    GradSums: sum(dy) and sum(dy·(x - mean)), float64, one for each entry of ``saved.moments``; of the dy that ReLU lets
    through, where a position counts.

    Raises
    ------
    TypeError, ValueError
        For a dy unlike x.

    Notes
    -----
    Memory and threads: as `backward`, without dx.

    Examples
    --------
    >>> from batchnorm.forward import batch_norm
    >>> y, saved = batch_norm(np.array([[1.0], [3.0]]))
    >>> grad_sums(np.array([[1.0], [2.0]]), saved).sum_dy_xmu
    array([1.])
    """
    of = _Kept(saved, num_threads)
    of.require_batch("grad_sums")
    dy = _validate.array_like("dy", dy, of.x)
    table = np.empty((len(of.moments), 4))
    _core.grad_sums(of.layout.block(dy), of.block, of.call, of.moments, table, of.threads)
    return GradSums(saved.part.counts(of.layout), table)


@_validate.keywords
def grad_input(
    dy: Array, saved: Saved, sums: GradSums, *, out: Array | None = None, num_threads: int | None = None
) -> Array:
    """Second half of `backward`: dx from sums that may have been added over parts of the batch.

    dx = gamma·rstd·(dy - S/n - x̂·rstd·D/n), with S = sums.sum_dy, D = sums.sum_dy_xmu, n = saved.moments.count. Of the
    sums of the same call, the bits of `backward`.

    Parameters
    ----------
    dy, saved, num_threads : as in `grad_sums`.
    sums : GradSums over all the values that `saved.moments` counts.
    out : as in `backward`.

    Returns
    -------
    dx : shape, dtype and memory order of x; `out` where given.

    Raises
    ------
    TypeError, ValueError
        For a dy or out unlike x, and sums over another number of values than the moments have.

    Notes
    -----
    Memory and threads: as `backward`.

    Examples
    --------
    >>> from batchnorm.forward import batch_norm
    >>> y, saved = batch_norm(np.array([[1.0], [3.0], [8.0]]))
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> bool((grad_input(dy, saved, grad_sums(dy, saved)) == backward(dy, saved).dx).all())
    True
    """
    of = _Kept(saved, num_threads)
    of.require_batch("grad_input")
    _validate.instance("sums", sums, GradSums, "GradSums")
    dy = _validate.array_like("dy", dy, of.x)
    if out is not None:
        _validate.output(out, of.x, {"dy": dy, "x": of.x}, of.apart)
    needed = of.moments[:, 0]
    if sums.count.shape != needed.shape or (sums.count != needed).any():
        raise ValueError("sums must count the values that saved.moments count, got others")
    dx = Target(of.layout, of.x, out)
    grad, table = of.layout.block(dy), sums._table
    _core.grad_input(grad, of.block, of.call, of.moments, table, dx.block, None, of.threads)
    dx.deliver()
    return dx.array


@_validate.keywords
def jvp(
    x_dot: Array,
    saved: Saved,
    *,
    gamma_dot: ArrayLike | None = None,
    beta_dot: ArrayLike | None = None,
    residual_dot: Array | None = None,
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

    Parameters
    ----------
    x_dot : tangent of x: shape and dtype of x. A memory order other than that of x costs a copy.
    saved : what the forward call returned. Its x (or y) must be unchanged.
    gamma_dot, beta_dot : tangents of gamma and beta, (C,) of any floating or integer dtype, or None for 0.
    residual_dot : tangent of the residual: shape and dtype of x, or None for 0.
    mean_dot, var_dot : tangents of statistics that were given, (C,), or None for 0.
    out : where to put y': shape and dtype of x; may be `x_dot` or x itself, must not overlap them otherwise.
    num_threads : as in `batch_norm`.

    Returns
    -------
    y_dot : shape, dtype and memory order of x; `out` where given. Within 5·2⁻²⁴ (float32) of the sum of its absolute
        terms.

    Raises
    ------
    TypeError, ValueError
        For an x_dot or out unlike x, tangents of another shape, or of what the call had not. Nothing is written by a call
        that raises.
    NotImplementedError
        For SecondGradients, whose derivative would be of third order.

    Notes
    -----
    Memory: y'; while it runs, up to 3 KB a channel and a few percent of x. Releases the GIL for large x.

    Examples
    --------
    >>> from batchnorm.forward import batch_norm
    >>> y, saved = batch_norm(np.array([[1.0], [3.0]]), eps=0.0)
    >>> jvp(np.array([[1.0], [1.0]]), saved, beta_dot=[0.5])
    array([[0.5],
           [0.5]])
    """
    _refuse_third_order(x_dot=x_dot, saved=saved)
    of = _Kept(saved, num_threads)
    x_dot = _validate.array_like("x_dot", x_dot, of.x)
    given = {"gamma_dot": gamma_dot, "beta_dot": beta_dot, "mean_dot": mean_dot, "var_dot": var_dot}
    dots = {name: _validate.optional_channel_values(name, a, of.channels) for name, a in given.items()}
    if of.given is None and (mean_dot is not None or var_dot is not None):
        raise ValueError("mean_dot and var_dot must be None where the statistics are those of the batch")
    if residual_dot is not None:
        if not saved.has_residual:
            raise ValueError("residual_dot must be None where no residual was added")
        residual_dot = _validate.array_like("residual_dot", residual_dot, of.x)
    if out is not None:
        _validate.output(out, of.x, {"x_dot": x_dot, "x": of.x}, of.apart | dots)
    y_dot = Target(of.layout, of.x, out)
    tangent, call = of.layout.block(x_dot), of.call
    if residual_dot is not None:
        call = call._replace(residual=of.layout.block(residual_dot))
    by_channel = of.tangents(dots["gamma_dot"], dots["beta_dot"], of.turn)
    if of.given is None:
        _core.jvp(tangent, of.block, call, of.moments, *by_channel, y_dot.block, of.threads)
    else:
        of_given = dots["mean_dot"], of.of_var(dots["var_dot"])
        _core.normalize_jvp(tangent, of.block, call, *of.given, *of_given, *by_channel, y_dot.block, of.threads)
    y_dot.deliver()
    return y_dot.array


@_validate.keywords
def double_backward(
    v_dx: Array | None,
    dy: Array,
    saved: Saved,
    *,
    v_dgamma: ArrayLike | None = None,
    v_dbeta: ArrayLike | None = None,
    v_dresidual: Array | None = None,
    needs: Iterable[SecondGradient] = _SECOND,
    out: Outputs | None = None,
    num_threads: int | None = None,
) -> SecondGradients:
    """Gradients of the gradients that `backward` gives, by dy, x and gamma.

    Of sum(v·dx) + sum(w·dgamma) + sum(v_dbeta·dbeta), v = v_dx and w = v_dgamma being the gradients of a loss by dx and
    dgamma. With v0 = v - mean(v), g0 = dy - mean(dy), a = mean(v·x̂), b = mean(dy·x̂), c = mean(v0·g0) and m values that
    share statistics:

        ddy = gamma·rstd·(v0 - a·x̂) + w·x̂ + v_dbeta,
        dx = -gamma·rstd²·(b·v0 + a·g0 + (c - 3ab)·x̂) + w·rstd·(g0 - b·x̂),
        dgamma = rstd·m·(c - ab).

    Where statistics were given: ddy = gamma·rstd·v + w·x̂ + v_dbeta, dx = w·rstd·dy, dgamma = rstd·sum(v·dy). ReLU's mask
    and renorm's r and d are constants. Source: the formulas of `backward`, differentiated.

    Parameters
    ----------
    v_dx : shape and dtype of x, or None for 0.
    dy, saved : what `backward` was given.
    v_dgamma, v_dbeta : (C,) of any floating or integer dtype, or None for 0.
    v_dresidual : gradient by dresidual: shape and dtype of x, or None for 0.
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
    and a few percent of x, and some float64 tensors where more than a batch of which all counts was saved. Releases the GIL for large x.

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
    of = _Kept(saved, num_threads)
    dy = _validate.array_like("dy", dy, of.x)
    v_dx = None if v_dx is None else _validate.array_like("v_dx", v_dx, of.x)
    need_dy, need_x, need_gamma = _validate.needs_among(_SECOND, needs)
    v_scale, v_shift = (
        _validate.optional_channel_values(n, a, of.channels) for n, a in (("v_dgamma", v_dgamma), ("v_dbeta", v_dbeta))
    )
    if v_dresidual is not None:
        if not saved.has_residual:
            raise ValueError("v_dresidual must be None where no residual was added")
        v_dresidual = _validate.array_like("v_dresidual", v_dresidual, of.x)
    inputs = {name: a for name, a in (("v_dx", v_dx), ("dy", dy), ("x", of.x)) if a is not None}
    apart = of.apart | {"v_dgamma": v_scale, "v_dbeta": v_shift}
    out_dy, to_x = _validate.two_outputs(out, of.x, inputs, apart)
    layout, call = of.layout, of.call
    ddy = Target(layout, of.x, out_dy) if need_dy else None
    dx = Target(layout, of.x, to_x) if need_x else None
    dgamma = of.room(need_gamma)
    results = SecondGradients(_array(ddy), _array(dx), dgamma)
    v = np.zeros(layout.sizes, of.x.dtype) if v_dx is None else layout.block(v_dx)
    second = _passes.Second(of.block, v, layout.block(dy), _block(ddy), _block(dx))
    by_channel = of.tangents(v_scale, v_shift, of.r)
    if out_dy is not None and need_x and any(_validate.overlap(out_dy, a) for a in inputs.values()):
        # ddy is written first: not to what dx is then computed from.
        second = second._replace(ddy=np.empty(layout.sizes, of.x.dtype))
    is_plain = call.weights is None and call.offsets is None and not call.relu and saved.y is None
    if is_plain and v_dresidual is None:
        dscale = _plain_second(of, second, *by_channel)
    else:
        added = None if v_dresidual is None else layout.block(v_dresidual)
        second, dscale = _composed_second(of, saved.relu, second, added, by_channel)
    if ddy is not None and second.ddy is not ddy.block:  # no loop, whose iterator would ask for memory
        ddy.block[...] = second.ddy
    if dx is not None and second.dx is not dx.block:
        dx.block[...] = second.dx
    of.sum_up(dgamma, None, of.r, dscale, None)
    if ddy is not None:
        ddy.deliver()
    if dx is not None:
        dx.deliver()
    return of.rounded(results)


def _plain_second(of: _Kept, second: _passes.Second, v_scale: Array | None, v_shift: Array | None) -> PerChannel:
    """Write the second gradients of a call of which the core has that pass, and give that of scale, (C,)."""
    dscale = np.empty(of.channels)
    v, g, to = second.v, second.g, (second.ddy, second.dx, dscale, of.threads)
    if of.given is not None:
        mean, var = of.given
        _core.normalize_double_backward(v, g, second.x, of.call, mean, var, v_scale, v_shift, *to)
    else:
        _core.double_backward(v, g, second.x, of.call, of.moments, v_scale, v_shift, *to)
    return dscale


def _composed_second(
    of: _Kept,
    relu: ReluMask | None,
    second: _passes.Second,
    v_dresidual: Array | None,
    by_channel: tuple[Array | None, Array | None],
) -> tuple[_passes.Second, PerChannel]:
    """Give the second gradients of calls of which the core has no such pass, and that of scale, (S·C,)."""
    stopped = None if relu is None else ~relu.block()
    ddy, dx = (None if to is None else np.empty(of.layout.sizes) for to in (second.ddy, second.dx))
    g = second.g if stopped is None else np.where(stopped, 0.0, second.g)
    count = None if of.table is None else of.table[:, 0]
    composed = second._replace(g=g, ddy=ddy, dx=dx)
    dscale = _passes.double_backward_by_formula(of.call, composed, count, of.standard(), *by_channel)
    if ddy is not None:
        if v_dresidual is not None:
            ddy += v_dresidual
        if stopped is not None:
            ddy[stopped] = 0
        counted = of.call.counted()
        if counted is not None:
            ddy[...] = np.where(counted, ddy, second.v if of.call.padding == _passes.KEEP else 0)
    return composed, dscale


class _Kept:
    """What a Saved says, checked, as the passes want it.

    Attributes
    ----------
    x, layout, block, call, threads : what was kept, how it lies, as the core sees it, and what the core is told of it.
    table, given : the statistics of the batch, or those that were given; the other is None.
    scale : (C,) or (S·C,) or None, what the passes take for gamma: gamma·r; where y is kept, see `_as_if_input`.
    r, d : (S·C,) or None, those of renorm.
    turn : (S·C,) or None: dgamma is turn·dscale + d·dshift.
    apart : what no output may overlap.
    """

    def __init__(self, saved: Saved, num_threads: int | None) -> None:
        _validate.instance("saved", saved, Saved, "what batch_norm, normalize or instance_norm saved")
        tensor = saved.x if saved.y is None else saved.y
        self.x = _validate.saved_input(tensor, saved.axis, saved.eps)
        _validate.instance("saved.part", saved.part, Part, "a Part")
        if saved.relu is not None:
            _validate.instance("saved.relu", saved.relu, ReluMask, "a ReluMask or None")
        if saved.renorm is not None:
            _validate.instance("saved.renorm", saved.renorm, Renorm, "a Renorm or None")
            _validate.channel_values("saved.renorm.mean", saved.renorm.mean, self.x.shape[saved.axis])
        threads, part = _validate.num_threads(num_threads), saved.part
        self.layout = saved.layout or Layout.of(self.x, saved.axis, by_rows=part.offsets is not None)
        if self.layout.shape != self.x.shape:
            raise ValueError(f"saved.x must have shape {self.layout.shape}, got {self.x.shape}")
        self.channels = self.x.shape[saved.axis]
        self.given: tuple[PerChannel, PerChannel] | None = None
        self.table: PerChannel | None = None
        if saved.given is None:
            self.table = self._moments_of(saved)
        else:
            mean, var = saved.given
            self.given = (
                _validate.channel_values("mean", mean, self.channels),
                _validate.variances(var, self.channels),
            )
        gamma = _validate.optional_channel_values("gamma", saved.gamma, self.channels)
        self.apart: dict[str, Array | None] = {"gamma": gamma}
        self.r: PerChannel | None = None if saved.renorm is None else saved.r
        self.d: PerChannel | None = None if saved.renorm is None else saved.d
        self.turn, self.scale = self.r, of_sets(gamma, self.r)
        self._saved, self._dtype, self._rounds = saved, _validate.float_dtype(saved.gamma), False
        self.block, self.threads = self.layout.block(self.x), threads
        self.call = part.call(self.layout, self.scale, None, float(saved.eps), self.given is not None)
        if saved.relu is not None:
            self.call = self.call._replace(relu=True, bits=saved.relu.data)
        if saved.y is not None:
            self._as_if_input()

    def _moments_of(self, saved: Saved) -> PerChannel:
        _validate.instance("saved.moments", saved.moments, Moments, "Moments")
        assert saved.moments is not None
        needed = self.channels * saved.part.sets
        if saved.moments.channels != needed:
            raise ValueError(f"saved.moments must have {needed} channels, got {saved.moments.channels}")
        return saved.moments._table

    def _as_if_input(self) -> None:
        """Let y stand for x: as the input of a batch normalization of mean shift and variance scale².

        x̂ = (y - shift)/scale. With rstd' = 1/abs(scale) and scale' = scale·rstd·abs(scale) its dx is that of x, and its
        x̂ has the sign of scale too much. Source of the idea: Rota Bulò, Porzi & Kontschieder (2018), "In-place activated
        BatchNorm", section 3.
        """
        self.true_scale, self.shift = kept_affine(self._saved, self.channels)
        size, sets = np.abs(self.true_scale), self._saved.part.sets
        if self.given is None:
            assert self.table is not None
            table = np.zeros((sets * self.channels, 5))
            table[:, 0] = self.table[:, 0]
            table[:, 1] = np.where(table[:, 0] > 0, self.shift, 0.0)
            table[:, 3] = table[:, 0] * (size * size)
            self.table = table
        else:
            self.given = self.shift, size * size
        with np.errstate(all="ignore"):  # a channel that is not finite stays so
            self.scale = self.true_scale * self._saved.rstd * size
        sign = np.copysign(1.0, self.true_scale)
        self.turn = sign if self.r is None else sign * self.r
        self.call = self.call._replace(scale=self.scale, eps=0.0)

    @property
    def moments(self) -> PerChannel:
        assert self.table is not None
        return self.table

    def require_batch(self, name: str) -> None:
        """Refuse statistics that were given, of which there are no sums to share."""
        if self.given is not None:
            raise ValueError(
                f"saved must be of statistics of the batch for {name}, got that of statistics that were given, whose "
                "backward pass is one"
            )

    def standard(self) -> Standard:
        """Give what makes x̂ of what was kept."""
        rstd = self._saved.rstd
        if self._saved.y is not None:
            with np.errstate(all="ignore"):
                return Standard(self.shift, np.zeros_like(rstd), 1 / self.true_scale, self.true_scale, rstd)
        scale = np.ones_like(rstd) if self.scale is None else np.resize(self.scale, rstd.shape)
        if self.given is not None:
            return Standard(self.given[0], np.zeros_like(rstd), rstd, scale.astype(np.float64), rstd)
        return Standard(self.moments[:, 1], self.moments[:, 2], rstd, scale.astype(np.float64), rstd)

    def tangents(
        self, gamma_dot: Array | None, beta_dot: Array | None, turn: PerChannel | None
    ) -> tuple[Array | None, Array | None]:
        """Give those of scale and shift."""
        shift_dot, of_d = beta_dot, None if self.d is None else of_sets(gamma_dot, self.d)
        if of_d is not None and gamma_dot is not None:
            shift_dot = of_d if beta_dot is None else of_d + np.resize(beta_dot, of_d.shape)
        return None if gamma_dot is None else of_sets(gamma_dot, turn), shift_dot

    def of_var(self, var_dot: Array | None) -> Array | None:
        """Give the tangent of the variance that was given, where y stands for x: that is times rstd·scale."""
        if var_dot is None or self._saved.y is None:
            return var_dot
        with np.errstate(all="ignore"):
            return var_dot.astype(np.float64) * self._saved.rstd * self.true_scale

    def room(self, needed: bool, *, by_core: bool = False) -> Array | None:
        """Make room for one gradient a channel: in its own dtype, where what writes it knows that."""
        known = self._dtype in (np.float32, np.float64) or (by_core and _validate.is_of_core(self._dtype))
        self._rounds = not known
        return np.empty(self.channels, self._dtype if known else np.float64) if needed else None

    def wide(self, needed: bool) -> PerChannel | None:
        """Make room for what such a gradient is made of, for each set."""
        return np.empty(self.channels * self._saved.part.sets) if needed else None

    def sum_up(
        self,
        dgamma: Array | None,
        dbeta: Array | None,
        turn: PerChannel | None,
        dscale: Array | None,
        dshift: Array | None,
    ) -> None:
        """Write dgamma = turn·dscale + d·dshift and dbeta = dshift, summed over the sets."""
        if dgamma is not None and dscale is not None and dgamma is not dscale:
            _passes.combine(dgamma, turn, dscale, self.d if dshift is not None else None, dshift)
        if dbeta is not None and dshift is not None and dbeta is not dshift:
            _passes.combine(dbeta, None, dshift, None, None)

    def rounded(self, results: _Results) -> _Results:
        """Give gradients of channels in the dtype of gamma, where they were not written so."""
        # What a comprehension sees would take memory here whether it is come to or not.
        return _rounded(results, self._dtype) if self._rounds else results


def _rounded(results: _Results, dtype: np.dtype[Any]) -> _Results:
    named: Any = results
    with np.errstate(all="ignore"):  # a float16 gradient may well over- or underflow; dx is written already
        of_channels = {
            name: getattr(named, name).astype(dtype)
            for name in ("dgamma", "dbeta")
            if getattr(named, name, None) is not None
        }
    rounded: _Results = named._replace(**of_channels)
    return rounded


def of_sets(values: Array | None, factor: PerChannel | None) -> Array | None:
    """Give values of channels times a factor of sets and channels; either may be None for 1."""
    if values is None or factor is None:
        return factor if values is None else values
    with np.errstate(all="ignore"):
        return np.resize(values.astype(np.float64), factor.shape) * factor


def _outputs(
    out: Array | Outputs | None, of: _Kept, may_be: dict[str, Array], names: str
) -> tuple[Array | None, Array | None]:
    """Give where dx and dresidual go, checked."""
    if isinstance(out, tuple):
        return _validate.two_outputs(out, of.x, may_be, of.apart, names)
    if out is not None:
        _validate.output(out, of.x, may_be, of.apart)
    return out, None


def _array(target: Target | None) -> Array | None:
    return None if target is None else target.array


def _block(target: Target | None) -> Array | None:
    return None if target is None else target.block


def _refuse_third_order(**arguments: object) -> None:
    for name, value in arguments.items():
        if isinstance(value, SecondGradients):
            raise NotImplementedError(
                f"{name} must not be SecondGradients: derivatives end at the second order, and this would be the third"
            )
