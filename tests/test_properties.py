"""Any shape, axis, dtype, memory order and values: the contract; and relations that must hold to the bit."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

import batchnorm as bn
import frozen
import reference
from tolerances import assert_backward, assert_forward, assert_within

# 17 and 257 leave one value after the last full vector; 16 leaves none.
DIMS = [0, 1, 2, 2, 3, 5, 16, 17, 257]
MOST_VALUES = 1500  # keeps the exact oracle at milliseconds

VALUES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "offset": lambda rng, shape: rng.normal(size=shape) + 10.0 ** rng.integers(0, 9),
    "integers": lambda rng, shape: rng.integers(-3, 4, shape),
    "constant": lambda rng, shape: np.full(shape, rng.normal() * 10.0 ** rng.integers(-5, 20)),
    "max": lambda rng, shape: rng.choice([-1.0, 0.0, 1.0], shape) * float(np.finfo(np.float32).max),
    "tiny": lambda rng, shape: rng.normal(size=shape) * 1e-40,
    "outlier": lambda rng, shape: rng.normal(size=shape) * np.where(rng.uniform(size=shape) < 0.05, 1e9, 1.0),
}
MEMORY = ["contiguous", "permuted", "sliced", "reversed", "broadcast"]


class Problem(NamedTuple):
    x: np.ndarray
    dy: np.ndarray
    gamma: np.ndarray | None
    beta: np.ndarray | None
    axis: int
    eps: float


def in_memory(draw, values, kind):
    """Give the same values in an array whose memory is laid out as `kind` says."""
    if kind == "permuted":
        order = draw(st.permutations(range(values.ndim)))
        return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))
    if kind == "sliced":
        axis = draw(st.integers(0, values.ndim - 1))
        every_second = tuple(slice(None, None, 2) if i == axis else slice(None) for i in range(values.ndim))
        return np.repeat(values, 2, axis)[every_second]
    if kind == "reversed":
        axis = draw(st.integers(0, values.ndim - 1))
        return np.flip(np.flip(values, axis).copy(), axis)
    if kind == "broadcast":
        axis = draw(st.integers(0, values.ndim - 1))
        return np.broadcast_to(np.take(values, [0], axis), values.shape) if values.size else values
    return values


@st.composite
def shapes(draw, ranks=(1, 8)):
    """Up to MOST_VALUES values: dimensions are drawn one by one from those that still fit."""
    shape, size = [], 1
    for _ in range(draw(st.integers(*ranks))):
        dim = draw(st.sampled_from([d for d in DIMS if d * size <= MOST_VALUES]))
        shape.append(dim)
        size *= max(dim, 1)
    return tuple(draw(st.permutations(shape)))


@st.composite
def problems(draw, shape_strategy=None, values=tuple(VALUES)):
    shape = draw(shapes() if shape_strategy is None else shape_strategy)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    dtype = np.dtype(draw(st.sampled_from(["float32", "float64"])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(values))
    x = np.asarray(VALUES[kind](rng, shape)).astype(dtype)
    x = in_memory(draw, x, draw(st.sampled_from(MEMORY)))
    dy = in_memory(draw, rng.normal(size=shape).astype(dtype), draw(st.sampled_from(MEMORY)))
    parameter_dtypes = st.sampled_from([None, "float16", "float32", "float64"])
    gamma, beta = (
        None if name is None else rng.normal(size=shape[axis]).astype(name)
        for name in (draw(parameter_dtypes), draw(parameter_dtypes))
    )
    event(f"values {kind}")
    return Problem(x, dy, gamma, beta, axis, draw(st.sampled_from([1e-12, 1e-8, 1e-5, 1e-3, 1.0])))


def values_a_channel(p):
    return int(np.prod([p.x.shape[i] for i in reference.other_axes(p.x, p.axis)], dtype=np.int64))


def options(p):
    return {"axis": p.axis, "eps": p.eps}


def trains(p):
    """Tell whether batch statistics are defined: no values at all, or at least two."""
    return values_a_channel(p) != 1


@settings(max_examples=200)
@given(problems())
def test_batch_norm_keeps_the_contract(p):
    assume(trains(p))
    y, saved = bn.batch_norm(p.x, p.gamma, p.beta, **options(p))
    assert (y.shape, y.dtype) == (p.x.shape, p.x.dtype)
    if p.x.size == 0:
        return
    exact = reference.exact_forward(p.x, p.gamma, p.beta, **options(p))
    scales = reference.forward_scales(p.x, p.gamma, p.beta, exact, axis=p.axis)
    assert_forward(y, (saved.moments.mean, saved.moments.var(), saved.rstd), exact, scales, p.x.dtype)


@settings(max_examples=200)
@given(problems())
def test_batch_norm_backward_keeps_the_contract(p):
    assume(trains(p))
    _, saved = bn.batch_norm(p.x, p.gamma, p.beta, **options(p))
    got = bn.backward(p.dy, saved)
    assert (got.dx.shape, got.dx.dtype) == (p.x.shape, p.x.dtype)
    assert got.dgamma.shape == got.dbeta.shape == saved.rstd.shape
    if p.x.size == 0:
        return
    exact = reference.exact_forward(p.x, p.gamma, p.beta, **options(p))
    gradients = reference.exact_backward(p.dy, p.x, p.gamma, **options(p))
    scales = reference.backward_scales(p.dy, p.x, p.gamma, exact, gradients, axis=p.axis)
    assert_backward(got, gradients, scales, p.x.dtype)


@settings(max_examples=100)
@given(problems(), st.integers(0, 2**32))
def test_normalize_and_its_backward_keep_the_contract(p, seed):
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(size=p.x.shape[p.axis]), rng.uniform(0, 4, p.x.shape[p.axis])
    y = bn.normalize(p.x, mean, var, p.gamma, p.beta, **options(p))
    with np.errstate(over="ignore"):  # dgamma beyond the range of gamma's dtype is inf, and NumPy may say so
        got = frozen.backward(p.dy, p.x, mean, var, p.gamma, **options(p))
    assert (y.shape, y.dtype) == (got.dx.shape, got.dx.dtype) == (p.x.shape, p.x.dtype)
    if p.x.size == 0:
        return
    exact = reference.exact_forward(p.x, p.gamma, p.beta, **options(p), mean=mean, var=var)
    scales = reference.forward_scales(p.x, p.gamma, p.beta, exact, axis=p.axis)
    assert_within("y", p.x.dtype, y, exact.y, scale=scales.y, at=scales.y_at)
    gradients = reference.exact_backward(p.dy, p.x, p.gamma, **options(p), mean=mean, var=var)
    scales = reference.backward_scales(p.dy, p.x, p.gamma, exact, gradients, axis=p.axis, frozen=True)
    assert_backward(got, gradients, scales, p.x.dtype)


@given(problems())
def test_inputs_are_not_changed(p):
    assume(trains(p))
    arrays = [a for a in (p.x, p.dy, p.gamma, p.beta) if a is not None]
    before = [a.tobytes() for a in arrays]
    _, saved = bn.batch_norm(p.x, p.gamma, p.beta, **options(p))
    bn.backward(p.dy, saved)
    bn.normalize(p.x, saved.moments.mean, saved.moments.m2, p.gamma, p.beta, **options(p))
    assert [a.tobytes() for a in arrays] == before


@given(problems())
def test_dense_memory_order_of_x_is_kept(p):
    assume(trains(p) and p.x.size > 0)
    y, saved = bn.batch_norm(p.x, p.gamma, p.beta, **options(p))
    dense = sorted(s for s, n in zip(p.x.strides, p.x.shape, strict=True) if n > 1)
    expected = np.cumprod([p.x.itemsize, *sorted_dims(p.x)])[:-1].tolist()
    assume(dense == expected)  # slices, flips and repeats have no dense order to keep
    dx = bn.backward(p.dy, saved).dx
    for result in (y, dx):
        kept = [r for r, n in zip(result.strides, p.x.shape, strict=True) if n > 1]
        assert kept == [s for s, n in zip(p.x.strides, p.x.shape, strict=True) if n > 1]


def sorted_dims(x):
    """List dimensions above 1 in order of growing stride."""
    return [n for _, n in sorted((s, n) for s, n in zip(x.strides, x.shape, strict=True) if n > 1)]


def run(p, **changes):
    """Give every result of training on a problem."""
    p = p._replace(**changes)
    y, saved = bn.batch_norm(p.x, p.gamma, p.beta, **options(p))
    gradients = bn.backward(p.dy, saved)
    return {
        "mean": saved.moments.mean,
        "m2": saved.moments.m2,
        "rstd": saved.rstd,
        "y": y,
        "dx": gradients.dx,
        "dgamma": gradients.dgamma,
        "dbeta": gradients.dbeta,
    }


def assert_same_bits(got, expected, names=None):
    for name in names or expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


@given(problems())
def test_calling_twice_gives_the_same_bits(p):
    assume(trains(p))
    first, second = run(p), run(p)
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in second.items()}


# ---- relations, to the bit --------------------------------------------------------------------------------

ORDINARY = ("normal", "offset", "integers", "outlier")
ordinary_problems = problems(shapes(ranks=(2, 5)), values=ORDINARY)


def dense(p, order="K"):
    """Fill one block of memory each with x and dy: another memory order may give other last bits."""
    return p._replace(x=p.x.copy(order=order), dy=p.dy.copy(order=order))


@given(ordinary_problems, st.integers(-12, 12))
def test_scaling_x_by_a_power_of_two_and_eps_by_its_square_leaves_y(p, k):
    assume(trains(p))
    p = dense(p)
    expected, got = run(p), run(p, x=p.x * p.x.dtype.type(2.0**k), eps=p.eps * 4.0**k)
    assert_same_bits(got, expected, ["y", "dgamma", "dbeta"])
    np.testing.assert_array_equal(got["mean"], expected["mean"] * 2.0**k)
    np.testing.assert_array_equal(got["m2"], expected["m2"] * 4.0**k)
    np.testing.assert_array_equal(got["rstd"], expected["rstd"] / 2.0**k)
    np.testing.assert_array_equal(got["dx"], expected["dx"] / p.x.dtype.type(2.0**k))


@given(ordinary_problems)
def test_negating_x_negates_y(p):
    assume(trains(p))
    p = dense(p)._replace(beta=None)
    expected, got = run(p), run(p, x=-p.x)
    assert_same_bits(got, expected, ["m2", "rstd", "dbeta"])
    for name in ("mean", "y", "dgamma"):
        np.testing.assert_array_equal(got[name], -expected[name], err_msg=name)


@given(ordinary_problems)
def test_negating_gamma_and_beta_negates_y_and_dx(p):
    assume(trains(p) and p.gamma is not None)
    expected, got = run(p), run(p, gamma=-p.gamma, beta=None if p.beta is None else -p.beta)
    assert_same_bits(got, expected, ["mean", "m2", "dgamma", "dbeta"])
    for name in ("y", "dx"):
        np.testing.assert_array_equal(got[name], -expected[name], err_msg=name)


@given(ordinary_problems, st.randoms(use_true_random=False))
def test_permuting_channels_permutes_results(p, random):
    assume(trains(p))
    p, order = dense(p, "C"), list(range(p.x.shape[p.axis]))
    random.shuffle(order)

    def permuted(values):
        return None if values is None else values[order]

    expected = run(p)
    got = run(
        p,
        x=p.x.take(order, p.axis),
        dy=p.dy.take(order, p.axis),
        gamma=permuted(p.gamma),
        beta=permuted(p.beta),
    )
    for name, value in expected.items():
        axis = p.axis if value.ndim == p.x.ndim and name in ("y", "dx") else 0
        np.testing.assert_array_equal(got[name], value.take(order, axis), err_msg=name)


@given(ordinary_problems, st.sampled_from([np.nan, np.inf, 1e38, -1e38]), st.integers(0, 2**32))
def test_a_nan_or_huge_neighbour_channel_leaves_the_bits_of_the_others(p, bad, seed):
    assume(trains(p) and p.x.size > 0 and p.x.shape[p.axis] > 1)
    rng = np.random.default_rng(seed)
    channel = int(rng.integers(p.x.shape[p.axis]))
    p = dense(p)
    expected = run(p)
    x, dy = p.x.copy(order="K"), p.dy.copy(order="K")
    for array in (x, dy):
        spoiled = np.moveaxis(array, p.axis, 0)[channel, ...]
        spoiled[tuple(rng.integers(n) for n in spoiled.shape)] = bad
    with np.errstate(over="ignore"):  # the spoiled channel's dgamma is beyond float16
        got = run(p, x=x, dy=dy)
    for name, value in expected.items():
        axis = p.axis if name in ("y", "dx") else 0
        others = np.delete(np.arange(p.x.shape[p.axis]), channel)
        np.testing.assert_array_equal(got[name].take(others, axis), value.take(others, axis), err_msg=name)


@given(problems(st.tuples(*[st.sampled_from([1, 2, 3, 5, 7])] * 4), values=ORDINARY))
def test_merging_neighbouring_spatial_axes_leaves_the_bits(p):
    assume(trains(p))
    p = p._replace(axis=1, gamma=None, beta=None, x=np.ascontiguousarray(p.x), dy=np.ascontiguousarray(p.dy))
    assume(trains(p))
    n, c, h, w = p.x.shape
    expected, got = run(p), run(p, x=p.x.reshape(n, c, h * w), dy=p.dy.reshape(n, c, h * w))
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name].ravel(), value.ravel(), err_msg=name)


# ---- relations, within the table --------------------------------------------------------------------------------


@given(ordinary_problems, st.randoms(use_true_random=False))
def test_order_of_the_samples_does_not_matter(p, random):
    assume(trains(p) and p.x.size > 0)
    sample_axis = next(i for i in range(p.x.ndim) if i != p.axis % p.x.ndim)
    order = list(range(p.x.shape[sample_axis]))
    random.shuffle(order)
    y, _ = bn.batch_norm(p.x.take(order, sample_axis), p.gamma, p.beta, **options(p))
    exact = reference.exact_forward(p.x, p.gamma, p.beta, **options(p))
    scales = reference.forward_scales(p.x, p.gamma, p.beta, exact, axis=p.axis)
    back = np.empty_like(y)
    back[(slice(None),) * sample_axis + (order,)] = y
    assert_within("y", p.x.dtype, back, exact.y, scale=scales.y, at=scales.y_at)


@pytest.mark.parametrize("shift", [65536.0, -1024.0])
def test_an_exact_shift_of_x_leaves_y_within_the_contract(shift):
    x = np.random.default_rng(0).integers(-64, 65, (4, 3, 5, 7)).astype(np.float32) / 64
    exact = reference.exact_forward(x, axis=1, eps=1e-5)
    scales = reference.forward_scales(x, None, None, exact, axis=1)
    y, _ = bn.batch_norm(x + np.float32(shift))
    assert_within("y", x.dtype, y, exact.y, scale=scales.y, at=scales.y_at)
