"""The passes of the core over blocks (outer, channels, inner); what it has no kernel for, composed of what it has.

Everything that the core is asked to do with tensors is asked here. With S sets of statistics (segments, ghosts; else
1), what belongs to a set and channel is (S·C,), set first: moments, sums, and scale and shift where they differ from
set to set. y = x̂·scale + shift; scale and shift are gamma and beta but for renormalization and kept outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchnorm import _core, _validate
from batchnorm._arrays import Layout
from batchnorm._validate import PADDINGS, Padding

Array = NDArray[Any]
Table = NDArray[np.float64]
Statistics = tuple[Table, Table]  # mean and var, (C,)

# Bits begin behind so many bytes, of which the first says by how many more bits (cpp/src/relu.hpp).
_HEAD = 8


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

    def __repr__(self) -> str:
        return _validate.summary(self)

    @classmethod
    def room(cls, layout: Layout) -> ReluMask:
        """Give one whose bits are still to be written."""
        data = np.empty(_core.relu_mask_bytes(layout.sizes), np.uint8)
        data.flags.writeable = False  # for all but the core
        return cls(layout, data)

    @property
    def nbytes(self) -> int:
        """Bytes of memory: one bit an element, and up to 24 bytes."""
        return self.data.nbytes

    def block(self) -> NDArray[np.bool]:
        """Give the mask as the core sees x: (outer, channels, inner)."""
        outer, channels, inner = self.layout.sizes
        size, first = outer * channels * inner, 8 * _HEAD + int(self.data[0])
        bits = np.unpackbits(self.data, bitorder="little", count=first + size)[first:]
        return bits.view(np.bool).reshape(self.layout.sizes)

    def fill(self, passes: NDArray[np.bool]) -> None:
        """Write the bits of a block, once."""
        bits = np.packbits(passes, bitorder="little")
        self.data.flags.writeable = True
        self.data[0] = 0
        self.data[_HEAD : _HEAD + bits.size] = bits
        self.data.flags.writeable = False

    def to_bool(self) -> NDArray[np.bool]:
        """Give the mask as a bool array of the shape of x."""
        return self.layout.array(self.block())


@dataclass(frozen=True, slots=True)
class Call:
    """What the core is told of one call, whatever the pass.

    Attributes
    ----------
    x : (outer, channels, inner), C-contiguous: the input, or what stands for it.
    weights : (outer·inner,) or None.
    padding : what y is where a weight is 0.
    offsets : (S + 1,) steps of outer, or None for one set.
    eps, threads : as the core takes them.
    """

    x: Array
    weights: Array | None
    padding: Padding
    offsets: NDArray[np.int64] | None
    eps: float
    threads: int

    @property
    def sets(self) -> int:
        return 1 if self.offsets is None else len(self.offsets) - 1

    @property
    def code(self) -> int:
        """The padding as the core takes it."""
        return PADDINGS.index(self.padding)

    def counted(self) -> NDArray[np.bool] | None:
        """Tell where y comes from the formula, (outer, 1, inner); None where it does everywhere."""
        if self.weights is None or self.padding == "normalize":
            return None
        outer, _, inner = self.x.shape
        counted: NDArray[np.bool] = self.weights != 0
        return counted.reshape(outer, 1, inner)

    def per_position(self, values: Array) -> Array:
        """Shape values of positions so that they broadcast against x, float64."""
        outer, _, inner = self.x.shape
        return values.astype(np.float64).reshape(outer, 1, inner)

    def of_given(self) -> Call:
        """Give the call where statistics are given: weights say no more than where there is padding."""
        return replace(self, weights=None) if self.padding == "normalize" else self

    def wide(self) -> Call:
        """Give the call in whose dtype what is made of several steps is rounded once."""
        return replace(self, x=wide(self.x))

    def of_sets(self, *tensors: Array | None) -> Iterator[tuple[slice, Call, list[Any]]]:
        """Give for each set that has values: its entries, its call, and its part of the tensors."""
        _, channels, inner = self.x.shape
        if self.offsets is None:
            yield slice(0, channels), self, list(tensors)
            return
        for s, (a, b) in enumerate(zip(self.offsets[:-1], self.offsets[1:], strict=True)):
            if a < b:
                weights = None if self.weights is None else self.weights[a * inner : b * inner]
                one = replace(self, x=self.x[a:b], weights=weights, offsets=None)
                yield (
                    slice(s * channels, (s + 1) * channels),
                    one,
                    [None if t is None else t[a:b] for t in tensors],
                )


class Tail(NamedTuple):
    """What follows where a position counts: a residual is added, then ReLU, whose mask is kept or not."""

    residual: Array | None
    relu: bool
    mask: ReluMask | None


def entries(values: Array | None, at: slice, channels: int) -> Array | None:
    """Give those of one set, of values for all sets and channels, or for the channels of each set alike."""
    return values if values is None or len(values) == channels else values[at]


# ---- forward ---------------------------------------------------------------------------------------------


def is_one_forward(call: Call, tail: Tail | None, *, corrected: bool) -> bool:
    """Tell whether one call of the core writes y, and the last that is made."""
    if tail is not None:
        return tail.relu and call.weights is None and call.offsets is None and not corrected
    return call.offsets is None or (call.weights is None and not corrected)


def moments(call: Call, table: Table) -> None:
    """Write the moments of each set and channel."""
    if call.weights is None and call.offsets is not None:
        table[:] = _core.segment_moments(call.x, call.x.shape, call.offsets, call.threads)
        return
    for at, one, _ in call.of_sets():
        if one.weights is None:
            table[at] = _core.moments(one.x, one.x.shape, one.threads)
        else:
            table[at] = _core.weighted_moments(one.x, one.x.shape, one.weights, one.threads)


def batch_norm(
    call: Call, scale: Array | None, shift: Array | None, tail: Tail | None, table: Table, y: Array
) -> None:
    """Normalize each set by its own statistics, and write these to the table; then what follows."""
    if tail is not None and is_one_forward(call, tail, corrected=False):
        bits = None if tail.mask is None else tail.mask.data
        _core.batch_norm_relu(
            call.x, call.x.shape, tail.residual, scale, shift, call.eps, y, bits, table, call.threads
        )
        return
    _with_tail(call, tail, y, lambda one, s: _batch_norm(one, scale, shift, table, s))


def _batch_norm(call: Call, scale: Array | None, shift: Array | None, table: Table, y: Array) -> None:
    x, sizes = call.x, call.x.shape
    if call.weights is None and call.offsets is not None:
        _core.segment_batch_norm(x, sizes, call.offsets, scale, shift, call.eps, y, table, call.threads)
    elif call.weights is None:
        _core.batch_norm(x, sizes, scale, shift, call.eps, y, table, call.threads)
    elif call.offsets is None:
        _core.weighted_batch_norm(
            x, sizes, call.weights, call.code, scale, shift, call.eps, y, table, call.threads
        )
    else:
        for at, one, (to,) in call.of_sets(y):
            assert one.weights is not None
            if np.count_nonzero(one.weights) == 1:  # of which the core makes no batch
                moments(one, table[at])
                by_moments(one, table[at], scale, shift, None, to)
            else:
                _batch_norm(one, scale, shift, table[at], to)


def by_moments(
    call: Call, table: Table, scale: Array | None, shift: Array | None, tail: Tail | None, y: Array
) -> None:
    """Normalize each set by moments that are known; the other half of `batch_norm`."""
    _with_tail(call, tail, y, lambda one, s: _by_moments(one, table, scale, shift, s))


def _by_moments(call: Call, table: Table, scale: Array | None, shift: Array | None, y: Array) -> None:
    for at, one, (to,) in call.of_sets(y):
        of_set, channels = table[at], one.x.shape[1]
        a, b = entries(scale, at, channels), entries(shift, at, channels)
        with np.errstate(all="ignore"):
            # The core takes the mean as one float64 here; what is left of it belongs to the shift.
            rest = of_set[:, 2] * _core.rstd(of_set, one.eps)
            b = (0.0 if b is None else b.astype(np.float64)) - (rest if a is None else a * rest)
        _normalize(one, (of_set[:, 1].copy(), _core.variance(of_set, 0)), a, b, to)


def normalize(
    call: Call, given: Statistics, scale: Array | None, shift: Array | None, tail: Tail | None, y: Array
) -> None:
    """Normalize by statistics that are given; then what follows."""
    call = call.of_given()
    if tail is not None and is_one_forward(call, tail, corrected=False):
        bits = None if tail.mask is None else tail.mask.data
        _core.normalize_relu(
            call.x, call.x.shape, tail.residual, *given, scale, shift, call.eps, y, bits, call.threads
        )
        return
    _with_tail(call, tail, y, lambda one, s: _normalize(one, given, scale, shift, s))


def _normalize(call: Call, given: Statistics, scale: Array | None, shift: Array | None, y: Array) -> None:
    call = call.of_given()
    x, sizes = call.x, call.x.shape
    if call.weights is None:
        _core.normalize(x, sizes, *given, scale, shift, call.eps, y, call.threads)
    else:
        _core.weighted_normalize(
            x, sizes, call.weights, call.code, *given, scale, shift, call.eps, y, call.threads
        )


def _with_tail(call: Call, tail: Tail | None, y: Array, run: Any) -> None:
    """Let run(call, s) write s, and y what follows it, rounded once."""
    if tail is None:
        run(call, y)
        return
    counted, call = call.counted(), call.wide()
    s = np.empty_like(call.x)
    run(call, s)
    with np.errstate(all="ignore"):
        after = s if tail.residual is None else s + tail.residual
        if tail.relu:
            passes = ~(after <= 0)  # NaN too
            after = np.where(passes, after, 0)
            if counted is not None:
                passes |= ~counted  # where y is 0 or x, whatever ReLU says
            if tail.mask is not None:
                tail.mask.fill(passes)
        if counted is not None:
            after = np.where(counted, after, s)
        y[...] = after


def after_tail(
    call: Call, s_dot: Array, x_dot: Array, residual_dot: Array | None, relu: ReluMask | None
) -> Array:
    """Give the derivative of y from that of s: the residual's is added, what ReLU stops and padding are left out."""
    with np.errstate(all="ignore"):
        y_dot = s_dot if residual_dot is None else s_dot + residual_dot
    if relu is not None:
        y_dot = np.where(relu.block(), y_dot, 0)
    counted = call.counted()
    if counted is not None:
        y_dot = np.where(counted, y_dot, x_dot if call.padding == "keep" else 0)
    return y_dot


def wide(a: Array) -> Array:
    """Give 16-bit values as float32, in which what is made of several steps is rounded once."""
    return a.astype(np.float32) if a.itemsize == 2 else a


# ---- first derivatives -----------------------------------------------------------------------------------


def through_tail(call: Call, dy: Array, relu: ReluMask | None) -> Array:
    """Give the gradient of what ReLU was given."""
    return dy if relu is None else np.where(relu.block(), dy, dy.dtype.type(0))


def where_counted(call: Call, g: Array) -> Array:
    """Give a gradient where y came from the formula, else 0."""
    counted = call.counted()
    return g if counted is None else np.where(counted, g, g.dtype.type(0))


def grad_sums(call: Call, g: Array, table: Table) -> Table:
    """Sum g and g·(x - mean) of each set and channel."""
    sums = np.zeros((len(table), 4))
    for at, one, (of_set,) in call.of_sets(g):
        if one.weights is None:
            sums[at] = _core.grad_sums(of_set, one.x, one.x.shape, table[at], one.threads)
        else:
            sums[at] = _core.weighted_grad_sums(
                of_set, one.x, one.x.shape, one.weights, one.code, table[at], one.threads
            )
    return sums


def grad_input(call: Call, g: Array, table: Table, sums: Table, scale: Array | None, dx: Array) -> None:
    """Write dx from sums."""
    for at, one, (of_set, to) in call.of_sets(g, dx):
        x, sizes, a = one.x, one.x.shape, entries(scale, at, one.x.shape[1])
        if one.weights is None:
            _core.grad_input(of_set, x, sizes, table[at], sums[at], a, one.eps, to, one.threads)
        else:
            _core.weighted_grad_input(
                of_set, x, sizes, one.weights, one.code, table[at], sums[at], a, one.eps, to, one.threads
            )


def is_one_backward(call: Call, scale: Array | None) -> bool:
    """Tell whether one call of the core does the backward pass of all sets."""
    return call.offsets is None or (call.weights is None and (scale is None or len(scale) == call.x.shape[1]))


def backward(
    call: Call,
    g: Array,
    table: Table,
    scale: Array | None,
    dx: Array | None,
    dscale: Array | None,
    dshift: Array | None,
) -> None:
    """Write the gradients of `batch_norm`, those of scale and shift summed over the sets.

    One call of the core (`is_one_backward`).
    """
    x, sizes, rest = call.x, call.x.shape, (scale, call.eps, dx, dscale, dshift, call.threads)
    if call.offsets is not None:
        _core.segment_batch_norm_backward(g, x, sizes, call.offsets, table, *rest)
    elif call.weights is None:
        _core.batch_norm_backward(g, x, sizes, table, *rest)
    else:
        _core.weighted_batch_norm_backward(g, x, sizes, call.weights, call.code, table, *rest)


def backward_of_sets(
    call: Call, g: Array, table: Table, scale: Array | None, dx: Array | None
) -> tuple[Table, Table]:
    """Write dx of each set, and give the gradients of its scale and shift, (S·C,)."""
    dscale, dshift = np.zeros(len(table)), np.zeros(len(table))
    for at, one, (of_set, to) in call.of_sets(g, dx):
        a = entries(scale, at, one.x.shape[1])
        backward(one, of_set, table[at], a, to, dscale[at], dshift[at])
    return dscale, dshift


def normalize_backward(
    call: Call,
    g: Array,
    given: Statistics,
    scale: Array | None,
    dx: Array | None,
    dscale: Array | None,
    dshift: Array | None,
) -> None:
    """Write the gradients of `normalize`."""
    call = call.of_given()
    rest = (*given, scale, call.eps, dx, dscale, dshift, call.threads)
    if call.weights is None:
        _core.normalize_backward(g, call.x, call.x.shape, *rest)
    else:
        _core.weighted_normalize_backward(g, call.x, call.x.shape, call.weights, call.code, *rest)


def relu_backward(
    call: Call,
    dy: Array,
    relu: ReluMask,
    table: Table | None,
    given: Statistics | None,
    scale: Array | None,
    dx: Array | None,
    dresidual: Array | None,
    dscale: Array | None,
    dshift: Array | None,
) -> None:
    """Write the gradients of a call with ReLU and one set without weights, of which the core has a pass."""
    rest = (scale, call.eps, dx, dresidual, dscale, dshift, call.threads)
    if table is not None:
        _core.batch_norm_relu_backward(dy, call.x, call.x.shape, relu.data, table, *rest)
    elif given is not None:
        mean, var = given
        _core.normalize_relu_backward(dy, call.x, call.x.shape, relu.data, mean, var, *rest)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Give a + b and what that addition rounded off (Knuth's TwoSum); 0 where the sum is not finite."""
    with np.errstate(all="ignore"):  # infinities and NaN stay in their channel
        total = a + b
        part = total - a
        return total, np.where(np.isfinite(total), (a - (total - part)) + (b - part), 0.0)


def combine(to: Array, a: Table | None, x: Table, b: Table | None, y: Table | None) -> None:
    """Write a·x + b·y to (C,), of values of sets and channels: summed over the sets in their order, compensated.

    a may be None for 1, b and y for 0. Where there is one set no memory is asked for, so that it may follow a call that
    has written.
    """
    if len(x) == len(to):
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


# ---- along tangents, and second derivatives --------------------------------------------------------------


def jvp(
    call: Call,
    x_dot: Array,
    table: Table,
    scale: Array | None,
    scale_dot: Array | None,
    shift_dot: Array | None,
    y_dot: Array,
) -> None:
    """Write the derivative of `batch_norm` along tangents, as if y came from the formula everywhere.

    With weights it is that of `normalize` along the tangents of the statistics (the chain rule): mean' = sum(w·x')/W
    and var' = 2·sum(w·x'·(x - mean))/W, which are the `grad_sums` of w·x'.
    """
    for at, one, (tangent, to) in call.of_sets(x_dot, y_dot):
        channels, of_set = one.x.shape[1], table[at]
        a, a_dot, b_dot = (entries(v, at, channels) for v in (scale, scale_dot, shift_dot))
        if one.weights is None:
            _core.batch_norm_jvp(
                tangent, one.x, one.x.shape, of_set, a, a_dot, b_dot, one.eps, to, one.threads
            )
            continue
        w = one.per_position(one.weights)
        with np.errstate(all="ignore"):
            weighted = np.where(w > 0, tangent * w, 0).astype(one.x.dtype)
            sums = grad_sums(one, weighted, of_set)
            share = np.where(of_set[:, 0] > 0, 1 / of_set[:, 0], 0.0)
            dots = (sums[:, 0] + sums[:, 1]) * share, 2 * (sums[:, 2] + sums[:, 3]) * share
        given = of_set[:, 1].copy(), _core.variance(of_set, 0)
        normalize_jvp(one, tangent, given, a, *dots, a_dot, b_dot, to)


def normalize_jvp(
    call: Call,
    x_dot: Array,
    given: Statistics,
    scale: Array | None,
    mean_dot: Array | None,
    var_dot: Array | None,
    scale_dot: Array | None,
    shift_dot: Array | None,
    y_dot: Array,
) -> None:
    """Write the derivative of `normalize` along tangents, as if y came from the formula everywhere."""
    dots = (mean_dot, var_dot, scale_dot, shift_dot)
    _core.normalize_jvp(x_dot, call.x, call.x.shape, *given, scale, *dots, call.eps, y_dot, call.threads)


class Standard(NamedTuple):
    """What makes x̂ of what was kept: ((x - center) - rest)·factor; and the scale and rstd of y. All (S·C,)."""

    center: Table
    rest: Table
    factor: Table
    scale: Table
    rstd: Table


def double_backward(
    call: Call,
    v: Array,
    g: Array,
    table: Table,
    values: tuple[Array | None, Array | None, Array | None],
    ddy: Array | None,
    dx: Array | None,
) -> Table:
    """Write the gradients of gradients of `batch_norm` without weights; give that of scale, (S·C,).

    values : scale, and the gradients by dscale and dshift.
    """
    dscale = np.zeros(len(table))
    for at, one, (of_dx, of_set, to_dy, to_x) in call.of_sets(v, g, ddy, dx):
        scale, v_scale, v_shift = (entries(a, at, one.x.shape[1]) for a in values)
        _core.batch_norm_double_backward(
            of_dx, of_set, one.x, one.x.shape, table[at], scale, v_scale, v_shift, one.eps, to_dy, to_x, dscale[at], one.threads
        )  # fmt: skip
    return dscale


def normalize_double_backward(
    call: Call,
    v: Array,
    g: Array,
    given: Statistics,
    values: tuple[Array | None, Array | None, Array | None],
    ddy: Array | None,
    dx: Array | None,
) -> Table:
    """Write the gradients of gradients of `normalize` without weights; give that of scale, (C,)."""
    dscale = np.zeros(call.x.shape[1])
    _core.normalize_double_backward(
        v, g, call.x, call.x.shape, *given, *values, call.eps, ddy, dx, dscale, call.threads
    )
    return dscale


def double_backward_of_weights(
    call: Call,
    v: Array,
    g: Array,
    count: Table | None,
    standard: Standard,
    v_scale: Array | None,
    v_shift: Array | None,
    ddy: Array | None,
    dx: Array | None,
) -> Table:
    """Write the gradients of gradients by the formula in float64; give that of scale, (S·C,).

    `count` is the sum of the weights of each set and channel, None where statistics are given. Of sum(v·dx) with
    dx = k·(g - p·(S + D·x̂)), k = scale·rstd, p = w/W, S = sum(g), D = sum(g·x̂), V = sum(p·v), A = sum(p·v·x̂) that is
    k·(sum(v·g) - V·S - A·D); differentiated by g and x, with drstd/dx = -rstd²·p·x̂ and dx̂ = rstd·(dx - p·(...)).
    """
    dscale = np.zeros(len(standard.rstd))
    for at, one, (of_dx, of_set, to_dy, to_x) in call.of_sets(v, g, ddy, dx):
        of_standard = Standard(*(a[at] for a in standard))
        by_scale, by_shift = (entries(a, at, one.x.shape[1]) for a in (v_scale, v_shift))
        total = None if count is None else count[at]
        with np.errstate(all="ignore"):
            dscale[at] = _double_backward(
                one, of_dx, of_set, total, of_standard, by_scale, by_shift, to_dy, to_x
            )
    return dscale


def _double_backward(
    call: Call,
    v: Array,
    g: Array,
    count: Table | None,
    standard: Standard,
    v_scale: Array | None,
    v_shift: Array | None,
    ddy: Array | None,
    dx: Array | None,
) -> Table:
    center, rest, factor, scale, rstd = (a.reshape(-1, 1) for a in standard)
    counted, v, g = call.counted(), v.astype(np.float64), g.astype(np.float64)
    xhat = ((call.x.astype(np.float64) - center) - rest) * factor
    if counted is not None:
        xhat, v, g = (np.where(counted, a, 0.0) for a in (xhat, v, g))
    w, lift = (0.0 if a is None else a.reshape(-1, 1) for a in (v_scale, v_shift))
    share: Any = 0.0
    if count is not None:
        weights = np.ones((1, 1, 1)) if call.weights is None else call.per_position(call.weights)
        share = np.where(count > 0, 1 / count, 0.0).reshape(-1, 1) * weights

    def total(values: Array) -> Array:
        summed: Array = np.sum(values, (0, 2))
        return summed.reshape(-1, 1)

    by_v, along_v = total(share * v + 0 * v), total(share * v * xhat)
    by_g, along_g = total(g), total(g * xhat)
    inner = total(v * g) - by_v * by_g - along_v * along_g
    if ddy is not None:
        ddy[...] = scale * rstd * (v - by_v - along_v * xhat) + w * xhat + lift
    if dx is not None:
        pulled = g - share * (by_g + along_g * xhat)
        turned = share * (inner * xhat + along_g * (v - by_v - along_v * xhat)) + along_v * pulled
        dx[...] = w * rstd * pulled - scale * rstd * rstd * turned
    by_scale: Table = rstd * inner
    return by_scale.reshape(-1)
