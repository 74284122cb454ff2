"""Ghost batch normalization: a large batch normalized in small parts, each by statistics of its own.

The batch axis (axis 0) is cut into consecutive ghosts of `ghost_size` samples, which are segments of as many rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm import _core, _layout, _validate
from batchnorm._validate import Gradient
from batchnorm.counted import Segments, dense
from batchnorm.functional import (
    Gradients,
    PerChannel,
    Prepared,
    _deliver,
    _target,
    new_gradient,
    update_running,
)
from batchnorm.moments import Moments

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class GhostSaved:
    """What `ghost_batch_norm` leaves for its backward pass.

    Attributes
    ----------
    x : the input, by reference (not copied): it must be unchanged when the backward pass reads it. None after
        ``out=x``, which has overwritten it: there is no backward pass then.
    moments : tuple of Moments, one for each ghost, in the order of the samples; empty for a batch of no samples.
    gamma : (C,) or None, by reference.
    axis : int >= 1, the channel axis.
    eps : float.
    ghost_size : int, samples in each ghost; the last may have fewer.
    """

    x: Array | None
    moments: tuple[Moments, ...]
    gamma: Array | None
    axis: int
    eps: float
    ghost_size: int

    def __repr__(self) -> str:
        return _validate.summary(self)


@_validate.keywords
def ghost_batch_norm(
    x: Array,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    ghost_size: int,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, GhostSaved]:
    """Normalize each ghost of `ghost_size` samples by the statistics of that ghost (training).

    y = (x - mean)/√(var + eps)·gamma + beta, with the mean and biased variance of the samples i·ghost_size to
    (i + 1)·ghost_size - 1 along axis 0. Source: Hoffer, Hubara & Soudry (2017), "Train longer, generalize better",
    algorithm 1.

    Parameters
    ----------
    x : ndarray, as in `batch_norm`. The slices along axis 0 of a C-contiguous or channels-last array are used in place;
        where such slices have gaps (axis 0 is not the slowest in memory), that costs a copy of x and one of y.
    gamma, beta : (C,) of any floating or integer dtype, or None for 1 and 0.
    ghost_size : int >= 1, samples in a ghost. Where it does not divide the batch, the last ghost is smaller (as in TabNet);
        every ghost needs 2 or more values a channel. At or above the batch it is `batch_norm`.
    axis : the channel axis; not axis 0, which holds the samples.
    eps, out, num_threads : as in `batch_norm`.

    Returns
    -------
    y : shape, dtype and memory order of `x`; `out` where given. Each ghost keeps the bounds of `batch_norm`.
    saved : GhostSaved, for `ghost_batch_norm_backward`; ``saved.moments`` updates running statistics by
        `ghost_update_running`, and ``merge(*saved.moments)`` is the moments of the whole batch.

    Raises
    ------
    ValueError
        For a ghost of one value per channel, which has no variance; for axis 0; as `batch_norm`.
    TypeError
        As `batch_norm`. Nothing is written by a call that raises.

    Notes
    -----
    Memory: y; while it runs, up to 3 KB a channel for each thread. Threads share out the ghosts, or each of few.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0], [10.0], [30.0]])
    >>> y, saved = ghost_batch_norm(x, ghost_size=2, eps=0.0)
    >>> y.ravel()
    array([-1.,  1., -1.,  1.])
    >>> [m.mean.item() for m in saved.moments]
    [2.0, 20.0]
    """
    x = _validate.array("x", x)
    axis = _validate.axis(axis, x.ndim)
    eps = _validate.eps(eps)
    size = _validate.ghost_size(ghost_size)
    threads = _validate.num_threads(num_threads)
    scale = _validate.optional_channel_values("gamma", gamma, x.shape[axis])
    shift = _validate.optional_channel_values("beta", beta, x.shape[axis])
    if out is not None:
        _validate.output(out, x, {"x": x}, {"gamma": scale, "beta": shift})
    _validate.ghost_values(x, axis, size)
    part = _ghosts(x, size)
    block, sizes = dense(x, axis, part)
    target = np.empty_like(x, subok=False) if out is None else out
    ghosts, channels = len(part.offsets) - 1, sizes[1]
    y, table = _target(target, block), _core.new_moments(ghosts * channels)
    kept = None if gamma is None else np.asarray(gamma)
    kept_x = None if out is not None and _validate.same_memory(out, x) else x
    moments = tuple(Moments._from_core(table[k * channels : (k + 1) * channels]) for k in range(ghosts))
    results = target, GhostSaved(kept_x, moments, kept, axis, eps, size)
    # All that is returned is there: once the core writes, nothing can fail.
    offsets = part.of_outer(sizes, len(x))
    _core.segment_batch_norm(block, sizes, offsets, scale, shift, eps, y, table, threads)
    _deliver(y, target)
    return results


@_validate.keywords
def ghost_batch_norm_backward(
    dy: Array,
    saved: GhostSaved,
    *,
    needs: Iterable[Gradient] = ("x", "gamma", "beta"),
    out: Array | None = None,
    num_threads: int | None = None,
) -> Gradients:
    """Gradients of `ghost_batch_norm`, through the statistics of each ghost.

    dx is that of `batch_norm_backward` ghost by ghost. gamma and beta are shared, so their gradients add up over the ghosts:
    dbeta = sum(dy) and dgamma = sum(dy·x̂), with the x̂ of each ghost.

    Parameters
    ----------
    dy : gradient of y: shape and dtype of x.
    saved : what `ghost_batch_norm` returned, called without ``out=x``. Its x must be unchanged.
    needs, out, num_threads : as in `batch_norm_backward`.

    Returns
    -------
    Gradients(dx, dgamma, dbeta), as `batch_norm_backward` gives them and within the same bounds: the sums over the ghosts
    are compensated, in float64, in the order of the samples.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_backward`. Nothing is written by a call that raises.

    Notes
    -----
    Memory: dx; while it runs, up to 3 KB a channel for each thread, and 16 bytes a ghost and channel.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0], [10.0], [30.0]])
    >>> y, saved = ghost_batch_norm(x, ghost_size=2, eps=0.0)
    >>> dx, dgamma, dbeta = ghost_batch_norm_backward(np.array([[1.0], [2.0], [3.0], [5.0]]), saved)
    >>> dgamma, dbeta                           # (2 - 1) + (5 - 3), and the sum
    (array([3.]), array([11.]))
    """
    x = _input_of(saved)
    need_x, need_gamma, need_beta = _validate.needs(needs)
    threads = _validate.num_threads(num_threads)
    dy = _validate.array_like("dy", dy, x)
    scale = _validate.optional_channel_values("gamma", saved.gamma, x.shape[saved.axis])
    if out is not None:
        _validate.output(out, x, {"dy": dy, "x": x}, {"gamma": scale})
    part = _ghosts(x, saved.ghost_size)
    block, sizes = dense(x, saved.axis, part)
    grad, channels = _layout.like(block, dy), sizes[1]
    target = None if not need_x else np.empty_like(x, subok=False) if out is None else out
    dx = None if target is None else _target(target, block)
    dgamma = new_gradient(saved.gamma, channels) if need_gamma else None
    dbeta = new_gradient(saved.gamma, channels) if need_beta else None
    results = Prepared(Gradients(target, dgamma, dbeta), saved.gamma, (dx, target))
    table = np.concatenate([np.empty((0, 5)), *(moments._table for moments in saved.moments)])
    offsets = part.of_outer(sizes, len(x))
    _core.segment_batch_norm_backward(
        grad, block, sizes, offsets, table, scale, saved.eps, dx, dgamma, dbeta, threads
    )
    return results.delivered()


@_validate.keywords
def ghost_update_running(
    running_mean: ArrayLike,
    running_var: ArrayLike,
    moments: Sequence[Moments],
    *,
    update_rate: float = 0.1,
    ddof: int = 1,
) -> tuple[PerChannel, PerChannel]:
    """Give the running statistics after the ghosts of one batch, one update a ghost, in their order.

    running = (1 - update_rate)·running + update_rate·ghost, once for each of k ghosts: the running statistics keep
    (1 - update_rate)^k of what they were, and later ghosts count for more. Source: Hoffer, Hubara & Soudry (2017), algorithm 1.
    For one update with the statistics of the whole batch, use ``update_running(..., merge(*saved.moments))``.

    Parameters
    ----------
    running_mean, running_var : (C,) of any floating or integer dtype. Not changed.
    moments : Moments of each ghost: ``saved.moments``.
    update_rate, ddof : as in `update_running`.

    Returns
    -------
    running_mean, running_var : new (C,) float64 arrays.

    Raises
    ------
    TypeError, ValueError
        As `update_running`; for `moments` that are not a sequence of Moments.

    Examples
    --------
    >>> y, saved = ghost_batch_norm(np.array([[1.0], [3.0], [10.0], [30.0]]), ghost_size=2)
    >>> ghost_update_running([0.0], [1.0], saved.moments, update_rate=0.5, ddof=0)
    (array([10.5]), array([50.5]))
    """
    _validate.instance("moments", moments, Sequence, "a sequence of Moments")
    # The empty one changes nothing, but lets the others be checked and converted where there are no ghosts.
    mean, var = running_mean, running_var
    for ghost in moments or [Moments.empty(np.size(running_mean))]:
        mean, var = update_running(mean, var, ghost, update_rate=update_rate, ddof=ddof)
    return mean, var  # type: ignore[return-value]  # both come from update_running by now


def ghost_moments(x: Array, *, ghost_size: int, axis: int, num_threads: int | None) -> tuple[Moments, ...]:
    """Give the moments of each ghost, those of `ghost_batch_norm`."""
    x = _validate.array("x", x)
    axis = _validate.axis(axis, x.ndim)
    _validate.ghost_values(x, axis, ghost_size)
    part, channels = _ghosts(x, ghost_size), x.shape[axis]
    block, sizes = dense(x, axis, part)
    table = _core.segment_moments(
        block, sizes, part.of_outer(sizes, len(x)), _validate.num_threads(num_threads)
    )
    ghosts = range(len(part.offsets) - 1)
    return tuple(Moments._from_core(table[k * channels : (k + 1) * channels]) for k in ghosts)


def _ghosts(x: Array, size: int) -> Segments:
    """Give the samples of each ghost."""
    return Segments(np.append(np.arange(0, len(x), size, dtype=np.int64), np.int64(len(x))))


def _input_of(saved: GhostSaved) -> Array:
    """Give the x of `saved`, whose fields may have been replaced since `ghost_batch_norm` made it."""
    _validate.instance("saved", saved, GhostSaved, "the GhostSaved of a ghost_batch_norm call")
    x = _validate.saved_input(saved.x, saved.axis, saved.eps)
    size = _validate.ghost_size(saved.ghost_size)
    _validate.ghost_values(x, saved.axis, size)
    needed = len(range(0, len(x), size))
    _validate.instance("saved.moments", saved.moments, Sequence, "a sequence of Moments")
    if len(saved.moments) != needed:
        raise ValueError(f"saved.moments must have {needed} Moments, one a ghost, got {len(saved.moments)}")
    for moments in saved.moments:
        _validate.instance("saved.moments", moments, Moments, "a sequence of Moments")
        if moments.channels != x.shape[saved.axis]:
            raise ValueError(
                f"saved.moments must have {x.shape[saved.axis]} channels, got {moments.channels}"
            )
    return x
