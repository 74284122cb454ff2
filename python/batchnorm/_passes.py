"""What the core is asked: a call, of which each pass of the core (``_core.calls``) is one; and what it has no pass for.

With S sets of statistics (segments, ghosts; else 1), what belongs to a set and channel is (S·C,), set first: sums, and
scale and shift where they differ from set to set. Moments are of each set and group of `width` channels, (S·C/width,).
y = x̂·scale + shift; scale and shift are gamma and beta but for renormalization and kept outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchnorm import _core, _validate, _where
from batchnorm._arrays import Array, Layout, PerChannel, Sizes

Statistics = PerChannel | tuple[PerChannel, PerChannel]  # the moments of a batch, or mean and var (C,) that were given

# Bits begin behind so many bytes, of which the first says by how many more bits (cpp/include/batchnorm/call.hpp).
_HEAD = 8
KEEP, NORMALIZE = 1, 2  # paddings as the core takes them


@dataclass(frozen=True, eq=False)
class ReluMask:
    """Through which elements ReLU lets a gradient: those that were above 0 before it, or NaN. One bit each.

    Attributes
    ----------
    layout : how x lay in memory; bits are in that order.
    data : uint8, read-only: the bits, and up to 24 bytes.
    """

    layout: Layout = field(repr=False)
    data: NDArray[np.uint8]

    __repr__ = _validate.summary

    @classmethod
    def room(cls, layout: Layout, x: Array) -> ReluMask:
        """Give one whose bits, of what is like x, are still to be written."""
        data = _where.empty(x, _core.relu_mask_bytes(layout.sizes), np.uint8)
        data.flags.writeable = False  # for all but the core
        return cls(layout, data)

    @property
    def nbytes(self) -> int:
        """Bytes of memory: one bit an element, and up to 24 bytes."""
        return self.data.nbytes

    def block(self) -> NDArray[np.bool]:
        """Give the mask as the core sees x: (outer, channels, inner)."""
        outer, channels, inner = self.layout.sizes
        data = _where.on_host(self.data)
        size, first = outer * channels * inner, 8 * _HEAD + int(data[0])
        bits = np.unpackbits(data, bitorder="little", count=first + size)[first:]
        return bits.view(np.bool).reshape(self.layout.sizes)

    def to_bool(self) -> NDArray[np.bool]:
        """Give the mask as a bool array of the shape of x."""
        return self.layout.array(self.block())


class Call(NamedTuple):
    """What the core is told beside tensors, whatever the pass: the tuple that the binding reads.

    Attributes
    ----------
    sizes : (outer, channels, inner).
    offsets : (S + 1,) steps of outer, or None for one set.
    width : channels that share statistics, neighbours where they are not `strided`.
    weights : (outer·inner,) or None.
    padding : what y is where a weight is 0, by its place in `PADDINGS`.
    scale, shift : (C,) or (S·C,) or None, what y = x̂·scale + shift has.
    eps : float.
    residual : (outer, channels, inner) or None; a tangent of it in `jvp`.
    relu, bits : whether ReLU follows, and its mask or None.
    each_position : whether `width` channels of each position share statistics, and no two positions.
    about_zero : whether the mean is taken to be 0.
    alpha : (C,) or None, what the mean is times.
    strided : whether group g of G = C/width is channels g, g + G, g + 2·G and so on.
    """

    sizes: Sizes
    offsets: NDArray[np.int64] | None
    width: int
    weights: Array | None
    padding: int
    scale: Array | None
    shift: Array | None
    eps: float
    residual: Array | None = None
    relu: bool = False
    bits: NDArray[np.uint8] | None = None
    each_position: bool = False
    about_zero: bool = False
    alpha: Array | None = None
    strided: bool = False

    def counted(self) -> NDArray[np.bool] | None:
        """Tell where y comes from the formula, (outer, 1, inner); None where it does everywhere."""
        if self.weights is None or self.padding == NORMALIZE:
            return None
        counted: NDArray[np.bool] = self.weights != 0
        return counted.reshape(self.sizes[0], 1, self.sizes[2])


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Give a + b and what that addition rounded off (Knuth's TwoSum); 0 where the sum is not finite."""
    with np.errstate(all="ignore"):  # infinities and NaN stay in their channel
        total = a + b
        part = total - a
        return total, np.where(np.isfinite(total), (a - (total - part)) + (b - part), 0.0)


def combine(to: Array, a: PerChannel | None, x: PerChannel, b: PerChannel | None, y: PerChannel | None) -> None:
    """Write a·x + b·y to (C,), of values of sets and channels: summed over the sets in their order, compensated.

    a may be None for 1, b and y for 0. Where there is one set no memory is asked for, so that it may follow a call that
    has written.
    """
    if _where.on_device(to):
        _where.passes(to).combine(to, a, x, b, y if b is not None else None, 0)
        return
    if len(x) == to.size:
        _core.combine(to, a, x, b, y if b is not None else None)
        return
    total, rest = np.zeros(len(to)), np.zeros(len(to))
    with np.errstate(all="ignore"):
        values = x if a is None else a * x
        values = values if b is None or y is None else values + b * y
        for of_set in values.reshape(-1, max(len(to), 1)):
            total, rounded_off = two_sum(total, of_set)
            rest += rounded_off
        to[...] = total + rest


# ---- second derivatives, of which the core has the plain ones ---------------------------------------------


class Standard(NamedTuple):
    """What makes x̂ of what was kept: ((x - center) - rest)·factor; and the scale and rstd of y. All (S·C,).

    `total` is the sum of the weights, None where statistics were given; `mean` that of the values, where alpha is times it.
    """

    total: PerChannel | None
    center: PerChannel
    rest: PerChannel
    factor: PerChannel
    scale: PerChannel
    rstd: PerChannel
    mean: PerChannel | None = None


class Second(NamedTuple):
    """The tensors of a double backward call, as blocks: x, v and g come in, ddy and dx go out."""

    x: Array
    v: Array
    g: Array
    ddy: Array | None
    dx: Array | None


@np.errstate(all="ignore")  # infinities and NaN stay in their channel
def double_backward_by_formula(
    call: Call,
    tensors: Second,
    stopped: NDArray[np.bool] | None,
    v_dresidual: Array | None,
    standard: Standard,
    v_scale: Array | None,
    v_shift: Array | None,
    v_alpha: Array | None = None,
) -> tuple[PerChannel, PerChannel]:
    """Write the gradients of gradients, computed in float64, and give those of scale and alpha, (S·C,).

    `stopped` tells where ReLU let no gradient through. With h = scale·g, p = w/W, S = sum(h), D = sum(h·x̂), V = sum(p·v),
    A = sum(p·v·x̂) over what shares statistics, dx = rstd·(h - p·(S + D·x̂)) and sum(v·dx) = rstd·(sum(v·h) - V·S - A·D);
    differentiated by g and x, with drstd/dx = -rstd²·p·x̂ and dx̂ = rstd·(dx - p·(...)). About alpha times the mean, the
    tangent o' = v - alpha·V - v_alpha·mean of o = x - alpha·mean stands for v; what is had by o is that by x less alpha·p times
    its sum, and with the gradient by o', g' = rstd·(h - p·D·x̂), of alpha -mean·sum(by o) - V·sum(g').
    """
    outer, channels, inner = call.sizes
    x, v, g, *to = tensors
    ddy, dx = (None if a is None else np.empty(call.sizes) for a in to)
    g = g if stopped is None else np.where(stopped, 0.0, g)
    counted, weights = call.counted(), np.ones((outer, 1, inner))
    if call.weights is not None:
        weights = call.weights.reshape(outer, 1, inner)
    offsets = np.array([0, outer]) if call.offsets is None else call.offsets
    count, center, rest, factor, scale, rstd, mean = standard
    of_scale = [
        np.zeros(len(scale)) if a is None else np.resize(a, len(scale)) for a in (v_scale, v_shift, v_alpha, mean)
    ]
    by_scale, by_alpha = np.zeros(len(scale)), np.zeros(len(scale))
    for s, (a, b) in enumerate(pairwise(offsets)):
        if a == b:
            continue
        at = slice(s * channels, (s + 1) * channels)

        def laid(values: PerChannel, at: slice = at) -> Array:
            """Give what each entry of the moments has, to broadcast."""
            if not call.each_position:
                return values[at].reshape(-1, 1)
            of_lines = values.reshape(outer, inner, channels // call.width).transpose(0, 2, 1)
            return np.repeat(of_lines, call.width, 1)

        share: Any = 0.0
        if count is not None:
            share = laid(np.where(count > 0, 1 / count, 0.0)) * weights[a:b]
        rows = Second(*(None if t is None else t[a:b] for t in (x, v, g, ddy, dx)))  # type: ignore[arg-type]
        of_set = [laid(values) for values in (center, rest, factor, rstd)]
        of_set += [values[at].reshape(-1, 1) for values in (scale, *of_scale)]
        here = None if counted is None else counted[a:b]
        by_scale[at], by_alpha[at] = _of_set(rows, call, here, share, *of_set)
    if ddy is not None:
        if v_dresidual is not None:
            ddy += v_dresidual
        if stopped is not None:
            ddy[stopped] = 0
        if counted is not None:
            ddy = np.where(counted, ddy, v if call.padding == KEEP else 0)
    for block, values in zip(to, (ddy, dx), strict=True):
        if block is not None:
            block[...] = values
    return by_scale, by_alpha


def _of_set(
    tensors: Second, call: Call, counted: NDArray[np.bool] | None, share: Any,
    center: PerChannel, rest: PerChannel, factor: PerChannel, rstd: PerChannel, scale: PerChannel, w: Array, lift: Array,
    v_alpha: Array, mean: PerChannel,
) -> tuple[PerChannel, PerChannel]:  # fmt: skip
    v, g = tensors.v.astype(np.float64), tensors.g.astype(np.float64)
    xhat = ((tensors.x.astype(np.float64) - center) - rest) * factor
    if counted is not None:
        xhat, v, g = (np.where(counted, a, 0.0) for a in (xhat, v, g))

    def total(values: Array) -> Array:
        """Of each channel, those of its group added up."""
        outer, channels, inner = values.shape
        groups, members = channels // call.width, 1 if call.strided else 2
        of_groups = values.reshape(outer, *((call.width, groups) if call.strided else (groups, call.width)), inner)
        axes = (2,) if call.each_position else (0, members, 3)
        sums = np.sum(of_groups, axes, keepdims=True)
        ends = sums.shape[0], sums.shape[3]
        return np.broadcast_to(sums, (ends[0], *of_groups.shape[1:3], ends[1])).reshape(ends[0], channels, ends[1])

    alpha: Any = 0.0 if call.about_zero else 1.0 if call.alpha is None else call.alpha.reshape(-1, 1)
    h = scale * g
    mean_v = total(share * v + 0 * v)
    v = v - alpha * mean_v
    if call.alpha is not None:
        v = v - v_alpha * mean
    along_v, along_h = total(share * v * xhat), total(h * xhat)
    turned_v = v - along_v * xhat
    if tensors.ddy is not None:
        tensors.ddy[...] = scale * rstd * turned_v + w * xhat + lift
    by_scale: PerChannel = np.sum(rstd * g * turned_v, (0, 2))
    by_alpha = np.zeros(len(by_scale))
    if tensors.dx is not None or call.alpha is not None:
        inner = total(v * h) - along_v * along_h
        of_xhat = w * g - rstd * (along_v * h + along_h * share * v)  # the gradient by x̂
        pulled = of_xhat - share * total(of_xhat * xhat) * xhat
        of_centered = rstd * (pulled - share * rstd * inner * xhat)
        whole = total(of_centered)
        if tensors.dx is not None:
            tensors.dx[...] = of_centered - alpha * share * whole
    if call.alpha is not None:
        of_tangent = total(rstd * (h - share * along_h * xhat))
        by_alpha = -(mean * whole + mean_v * of_tangent).ravel()
        if tensors.dx is not None:
            tensors.dx[...] -= v_alpha * share * of_tangent
    return by_scale, by_alpha
