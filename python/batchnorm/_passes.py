"""The passes of the core over blocks (outer, channels, inner), each one call whatever counts and follows.

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

# Bits begin behind so many bytes, of which the first says by how many more bits (cpp/include/batchnorm/call.hpp).
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

    @property
    def bits(self) -> NDArray[np.uint8] | None:
        return None if self.mask is None else self.mask.data


def entries(values: Array | None, at: slice, channels: int) -> Array | None:
    """Give those of one set, of values for all sets and channels, or for the channels of each set alike."""
    return values if values is None or len(values) == channels else values[at]


# ---- forward ---------------------------------------------------------------------------------------------


def told(call: Call, scale: Array | None, shift: Array | None, tail: Tail | None) -> tuple[Any, ...]:
    """Give what the core calls a call."""
    rest = (None, False, None) if tail is None else (tail.residual, tail.relu, tail.bits)
    return (call.x.shape, call.offsets, call.weights, call.code, scale, shift, call.eps, *rest)


def moments(call: Call, table: Table) -> None:
    """Write the moments of each set and channel."""
    _core.moments(call.x, told(call, None, None, None), table, call.threads)


def batch_norm(
    call: Call, scale: Array | None, shift: Array | None, tail: Tail | None, table: Table, y: Array
) -> None:
    """Normalize each set by its own statistics, and write these to the table; then what follows."""
    _core.batch_norm(call.x, told(call, scale, shift, tail), y, table, call.threads)


def by_moments(
    call: Call, table: Table, scale: Array | None, shift: Array | None, tail: Tail | None, y: Array
) -> None:
    """Normalize each set by moments that are known; the other half of `batch_norm`."""
    _core.normalize_by_moments(call.x, told(call, scale, shift, tail), table, y, call.threads)


def normalize(
    call: Call, given: Statistics, scale: Array | None, shift: Array | None, tail: Tail | None, y: Array
) -> None:
    """Normalize by statistics that are given; then what follows."""
    _core.normalize(call.x, told(call, scale, shift, tail), *given, y, call.threads)


# ---- first derivatives -----------------------------------------------------------------------------------


def through(relu: ReluMask | None, residual: Array | None = None) -> Tail | None:
    """Give what the core lets a gradient through, and a tangent with that of the residual."""
    return None if relu is None and residual is None else Tail(residual, relu is not None, relu)


def grad_sums(call: Call, dy: Array, relu: ReluMask | None, table: Table) -> Table:
    """Sum dy and dy·(x - mean) of each set and channel."""
    sums = np.zeros((len(table), 4))
    _core.grad_sums(dy, call.x, told(call, None, None, through(relu)), table, sums, call.threads)
    return sums


def grad_input(
    call: Call, dy: Array, relu: ReluMask | None, table: Table, sums: Table, scale: Array | None, dx: Array
) -> None:
    """Write dx from sums."""
    what = told(call, scale, None, through(relu))
    _core.grad_input(dy, call.x, what, table, sums, dx, None, call.threads)


def backward(
    call: Call,
    dy: Array,
    relu: ReluMask | None,
    statistics: Table | Statistics,
    scale: Array | None,
    dx: Array | None,
    dresidual: Array | None,
    dscale: Array | None,
    dshift: Array | None,
) -> None:
    """Write the gradients of `batch_norm`, or of `normalize` where statistics were given.

    Those of scale and shift are (C,), summed over the sets, or of each set, (S·C,).
    """
    what, of = told(call, scale, None, through(relu)), statistics
    if isinstance(of, tuple):
        mean, var = of
        _core.normalize_backward(dy, call.x, what, mean, var, dx, dresidual, dscale, dshift, call.threads)
    else:
        _core.backward(dy, call.x, what, of, dx, dresidual, dscale, dshift, call.threads)


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
    relu: ReluMask | None,
    residual_dot: Array | None,
    table: Table,
    scale: Array | None,
    scale_dot: Array | None,
    shift_dot: Array | None,
    y_dot: Array,
) -> None:
    """Write the derivative of `batch_norm` along tangents."""
    what = told(call, scale, None, through(relu, residual_dot))
    _core.jvp(x_dot, call.x, what, table, scale_dot, shift_dot, y_dot, call.threads)


def normalize_jvp(
    call: Call,
    x_dot: Array,
    relu: ReluMask | None,
    residual_dot: Array | None,
    given: Statistics,
    scale: Array | None,
    mean_dot: Array | None,
    var_dot: Array | None,
    scale_dot: Array | None,
    shift_dot: Array | None,
    y_dot: Array,
) -> None:
    """Write the derivative of `normalize` along tangents."""
    what, dots = (
        told(call, scale, None, through(relu, residual_dot)),
        (mean_dot, var_dot, scale_dot, shift_dot),
    )
    _core.normalize_jvp(x_dot, call.x, what, *given, *dots, y_dot, call.threads)


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


def through_tail(call: Call, dy: Array, relu: ReluMask | None) -> Array:
    """Give the gradient of what ReLU was given."""
    return dy if relu is None else np.where(relu.block(), dy, dy.dtype.type(0))


def where_counted(call: Call, g: Array) -> Array:
    """Give a gradient where y came from the formula, else 0."""
    counted = call.counted()
    return g if counted is None else np.where(counted, g, g.dtype.type(0))


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
        what = told(one, scale, None, None)
        to = (to_dy, to_x, dscale[at], one.threads)
        _core.double_backward(of_dx, of_set, one.x, what, table[at], v_scale, v_shift, *to)
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
    dscale, (scale, v_scale, v_shift) = np.zeros(call.x.shape[1]), values
    what, (mean, var) = told(call, scale, None, None), given
    _core.normalize_double_backward(
        v, g, call.x, what, mean, var, v_scale, v_shift, ddy, dx, dscale, call.threads
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
