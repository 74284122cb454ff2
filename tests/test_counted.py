"""What is counted: masks, weights, lengths and segments, against the oracle on the data that they leave."""

import dataclasses
import hashlib
import json
import tracemalloc

import numpy as np
import pytest

import batchnorm as bn
import frozen
import reference
from tolerances import UNIT_ROUNDOFF, assert_backward, assert_forward, assert_within

EPS = 1e-3
PADDINGS = ["zero", "keep", "normalize"]

# name -> (shape, axis): runs and rows of the kernels, rows side by side, short runs, tails, several chunks and blocks
SHAPES = {
    "nchw": ((4, 5, 6, 7), 1),
    "nchw_long": ((3, 3, 90, 70), 1),
    "nchw_7x7": ((9, 37, 7, 7), 1),
    "nhwc": ((4, 6, 7, 5), -1),
    "nhwc_wide": ((3, 20, 7, 70), -1),
    "nc": ((300, 70), 1),
    "nc_narrow": ((1900, 3), 1),
    "ncl_short": ((20, 40, 9), 1),
    "one_channel": ((3, 1, 100), 1),
    "middle": ((3, 4, 5, 6, 3), 2),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_padding = pytest.mark.parametrize("padding", PADDINGS)


def positions_of(x, axis):
    axis %= x.ndim
    return x.shape[:axis] + x.shape[axis + 1 :]


def make(shape, dtype, seed=0):
    """Give x, dy, gamma, beta, axis and a mask of about 60 %."""
    size, axis = SHAPES[shape]
    rng = np.random.default_rng(seed)
    channels = size[axis]
    spread = reference.per_channel(rng.uniform(0.5, 2, channels), np.empty(size), axis)
    x = (rng.normal(3, 2, size) * spread).astype(dtype)
    dy = rng.normal(size=size).astype(dtype)
    gamma, beta = rng.uniform(-2, 2, channels), rng.normal(size=channels)
    mask = rng.random(positions_of(x, axis)) < 0.6
    mask.flat[:2] = True
    return x, dy, gamma.astype(dtype), beta.astype(dtype), axis, mask


def kept(values, mask, axis):
    """Give the values at the positions of the mask, (positions, C)."""
    return np.moveaxis(values, axis, -1)[mask]


def poisoned(x, mask, axis, value=np.nan):
    x = x.copy()
    np.moveaxis(x, axis, -1)[~mask] = value
    return x


def expanded(mask, x, axis):
    return np.broadcast_to(np.expand_dims(mask, axis), x.shape)


def weights_like(mask, dtype, seed=5):
    return np.where(mask, np.random.default_rng(seed).uniform(0, 3, mask.shape), 0).astype(dtype)


@every_shape
def test_masked_forward_equals_the_oracle_on_the_compressed_data(shape, dtype):
    x, _, gamma, beta, axis, mask = make(shape, dtype)
    compressed = kept(x, mask, axis)
    exact = reference.exact_forward(compressed, gamma, beta, axis=1, eps=EPS)
    scales = reference.forward_scales(compressed, gamma, beta, exact, axis=1)
    y, saved = bn.batch_norm(poisoned(x, mask, axis), gamma, beta, axis=axis, eps=EPS, mask=mask)
    statistics = saved.moments.mean, saved.moments.var(), saved.rstd
    assert_forward(kept(y, mask, axis), statistics, exact, scales, dtype)
    assert (saved.moments.count == mask.sum()).all()
    assert (kept(y, ~mask, axis) == 0).all()


@every_shape
def test_masked_backward_equals_the_oracle_on_the_compressed_data(shape, dtype):
    x, dy, gamma, beta, axis, mask = make(shape, dtype)
    small, small_dy = kept(x, mask, axis), kept(dy, mask, axis)
    exact = reference.exact_forward(small, gamma, beta, axis=1, eps=EPS)
    gradients = reference.exact_backward(small_dy, small, gamma, axis=1, eps=EPS)
    scales = reference.backward_scales(small_dy, small, gamma, exact, gradients, axis=1)
    _, saved = bn.batch_norm(poisoned(x, mask, axis), gamma, beta, axis=axis, eps=EPS, mask=mask)
    dx, dgamma, dbeta, _ = bn.backward(poisoned(dy, mask, axis), saved)
    assert_backward((kept(dx, mask, axis), dgamma, dbeta), gradients, scales, dtype)
    assert (kept(dx, ~mask, axis) == 0).all()


@every_shape
@every_padding
def test_weighted_forward_and_backward_keep_the_contract(shape, dtype, padding):
    x, dy, gamma, beta, axis, mask = make(shape, dtype)
    w = weights_like(mask, dtype)
    options = {"axis": axis, "eps": EPS, "padding": padding}
    y, saved = bn.batch_norm(x, gamma, beta, weights=w, **options)
    expected = reference.weighted_forward(x, w, gamma, beta, **options)
    counted = expanded(mask, x, axis) | (padding == "normalize")
    scale = np.abs((expected.y - reference.per_channel(beta, x, axis)) * counted)
    scale = np.broadcast_to(scale.max(reference.other_axes(x, axis), keepdims=True), x.shape)
    moments = reference.weighted_moments(x, w, axis)
    assert_within("weighted", dtype, saved.moments.count, moments.count, scale=moments.count)
    spread = np.sqrt(expected.var)
    assert_within("weighted", dtype, saved.moments.mean, expected.mean, scale=np.abs(expected.mean) + spread)
    assert_within("weighted", dtype, saved.moments.var(), expected.var, scale=expected.var)
    assert_within("weighted y", dtype, y, expected.y, scale=scale + np.abs(expected.y))

    got = bn.backward(dy, saved)
    want = reference.weighted_backward(dy, x, w, gamma, **options)
    part = np.abs(reference.weighted_backward(np.abs(dy), x, w, gamma, **options).dbeta)
    a = np.abs(reference.per_channel(expected.rstd * gamma, x, axis))
    xhat = np.abs(reference.weighted_forward(x, w, None, None, **{**options, "padding": "normalize"}).y)
    along = (np.abs(dy) * xhat * counted).sum(reference.other_axes(x, axis))
    share = np.expand_dims(w.astype(float), axis) / w.astype(float).sum()
    sums = share * (reference.per_channel(part, x, axis) + xhat * reference.per_channel(along, x, axis))
    assert_within("weighted dx", dtype, got.dx, want.dx, scale=a * (np.abs(dy) + sums) + np.abs(want.dx))
    assert_within("weighted dx", dtype, got.dgamma, want.dgamma, scale=along)
    assert_within("weighted dx", dtype, got.dbeta, want.dbeta, scale=part)


@every_shape
def test_whole_weights_count_as_repetitions(shape, dtype):
    x, _, _, _, axis, mask = make(shape, dtype)
    w = np.random.default_rng(1).integers(0, 4, mask.shape)
    repeated = np.repeat(np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]), w.ravel(), axis=0)
    exact = reference.exact_forward(repeated, axis=1, eps=EPS)
    moments = bn.moments(x, axis=axis, weights=w.astype(dtype))
    assert (moments.count == w.sum()).all()
    assert_within("mean", dtype, moments.mean, exact.mean)
    assert_within("var", dtype, moments.var(), exact.var)


@every_shape
@every_padding
def test_a_mask_of_ones_gives_the_bits_of_the_plain_call(shape, dtype, padding):
    x, dy, gamma, beta, axis, mask = make(shape, dtype)
    options = {"axis": axis, "eps": EPS}
    y, saved = bn.batch_norm(x, gamma, beta, **options)
    for given in ({"mask": np.ones_like(mask)}, {"weights": np.ones(mask.shape, dtype)}):
        masked, masked_saved = bn.batch_norm(x, gamma, beta, **options, **given, padding=padding)
        assert masked.tobytes() == y.tobytes()
        assert masked_saved.moments == saved.moments
        got, plain = bn.backward(dy, masked_saved), bn.backward(dy, saved)
        assert [g.tobytes() for g in got[:3]] == [g.tobytes() for g in plain[:3]]


@every_shape
@every_padding
def test_padding_says_what_y_and_dx_are_where_nothing_counts(shape, dtype, padding):
    x, dy, gamma, beta, axis, mask = make(shape, dtype)
    y, saved = bn.batch_norm(x, gamma, beta, axis=axis, eps=EPS, mask=mask, padding=padding)
    dx = bn.backward(dy, saved).dx
    there = [kept(a, ~mask, axis) for a in (y, dx, x, dy)]
    if padding == "zero":
        assert (there[0] == 0).all()
        assert (there[1] == 0).all()
    elif padding == "keep":
        assert (there[0] == there[2]).all()
        assert (there[1] == there[3]).all()
    else:
        expected = bn.normalize(x, saved.moments.mean, saved.moments.var(), gamma, beta, axis=axis, eps=EPS)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        assert (there[0] != 0).any()


@pytest.mark.parametrize(("given", "default"), [("mask", "zero"), ("lengths", "zero"), ("weights", "normalize")])
def test_padding_is_zero_unless_weights_say_what_counts(given, default, dtype):
    x = np.random.default_rng(0).normal(2, 1, size=(4, 3, 5)).astype(dtype)
    lengths = np.array([5, 0, 2, 3])
    mask = np.arange(5) < lengths[:, None]
    value = {"mask": mask, "lengths": lengths, "weights": mask.astype(dtype)}[given]
    y, saved = bn.batch_norm(x, **{given: value})
    assert saved.part.padding == default
    for padding in PADDINGS:
        same = bn.batch_norm(x, **{given: value}, padding=padding)[0].tobytes() == y.tobytes()
        assert same == (padding == default)


@every_shape
@pytest.mark.parametrize("padding", ["zero", "keep"])
def test_normalize_with_a_mask_is_normalize_where_it_is_true(shape, dtype, padding):
    x, dy, gamma, beta, axis, mask = make(shape, dtype)
    rng = np.random.default_rng(3)
    mean, var = rng.normal(size=gamma.size), rng.uniform(0.5, 2, gamma.size)
    options = {"axis": axis, "eps": EPS}
    inside = expanded(mask, x, axis)
    y = bn.normalize(poisoned(x, mask, axis, 7), mean, var, gamma, beta, **options, mask=mask, padding=padding)
    plain = bn.normalize(x, mean, var, gamma, beta, **options)
    outside = poisoned(x, mask, axis, 7) if padding == "keep" else np.zeros_like(x)
    assert np.where(inside, plain, outside).tobytes() == y.tobytes()

    got = frozen.backward(dy, x, mean, var, gamma, **options, mask=mask, padding=padding)
    clean = frozen.backward(np.where(inside, dy, 0).astype(dtype), x, mean, var, gamma, **options)
    assert (np.where(inside, clean.dx, dy if padding == "keep" else 0) == got.dx).all()
    np.testing.assert_allclose(got.dgamma, clean.dgamma, rtol=1e-6)
    np.testing.assert_allclose(got.dbeta, clean.dbeta, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axis", "steps"),
    [
        ((5, 4, 9), 1, 2),
        ((5, 9, 4), -1, 1),
        ((5, 4, 9, 2), 1, 2),
        ((5, 9, 4, 2), 2, 1),
        ((5, 9, 2, 4), 3, 1),
    ],
    ids=str,
)
def test_lengths_are_the_mask_of_the_first_steps(shape, axis, steps, dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(dtype)
    lengths = np.array([9, 0, 3, 1, 9])
    index = np.arange(9).reshape([-1 if d == steps else 1 for d in range(len(shape))])
    mask = np.broadcast_to(
        index < lengths.reshape(-1, *[1] * (len(shape) - 1)),
        [1 if d == axis % len(shape) else n for d, n in enumerate(shape)],
    )
    y, saved = bn.batch_norm(x, axis=axis, lengths=lengths)
    same, same_saved = bn.batch_norm(x, axis=axis, mask=mask)
    assert y.tobytes() == same.tobytes()
    assert saved.moments == same_saved.moments
    assert (np.moveaxis(y, steps, 1)[1] == 0).all()


@every_shape
@every_padding
def test_a_mask_that_is_all_false_is_safe(shape, dtype, padding):
    x, dy, gamma, beta, axis, mask = make(shape, dtype)
    nothing = np.zeros_like(mask)
    y, saved = bn.batch_norm(x, gamma, beta, axis=axis, mask=nothing, padding=padding)
    assert (saved.moments.count == 0).all()
    assert (saved.moments.mean == 0).all()
    expected = {"zero": 0 * x, "keep": x, "normalize": 0 * x + reference.per_channel(beta, x, axis)}[padding]
    assert (y == expected).all()
    dx, dgamma, dbeta, _ = bn.backward(dy, saved)
    assert (dx == (dy if padding == "keep" else 0)).all()
    assert np.isfinite(dgamma).all()
    assert np.isfinite(dbeta).all()


def test_one_counted_position_has_no_variance():
    x = np.ones((4, 3), np.float32)
    out = np.full_like(x, 9)
    with pytest.raises(ValueError, match="weights must be above 0 at 2 positions or more"):
        bn.batch_norm(x, weights=[0.5, 0, 0, 0], out=out)
    assert (out == 9).all()


@pytest.mark.parametrize(
    ("counted", "text"),
    [
        ({"mask": [[True, False], [False, False]]}, "mask must be True at"),
        ({"mask": [[1, 0], [0, 0]]}, "mask must be True at"),
        ({"lengths": [0, 1]}, "lengths must leave"),
    ],
    ids=["mask", "mask_of_integers", "lengths"],
)
def test_a_single_position_is_reported_by_the_name_of_what_leaves_it(counted, text):
    x = np.ones((2, 3, 2), np.float32)
    out = np.full_like(x, 9)
    for call in (bn.batch_norm, lambda x, **options: bn.BatchNorm(3)(x, **options)):
        with pytest.raises(ValueError, match=rf"^{text} 2 positions or more for batch statistics \(or none\), got 1$"):
            call(x, out=out, **counted)
    assert (out == 9).all()


@pytest.mark.parametrize("name", ["mask", "weights"])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int8, bool])
def test_integers_0_and_1_mask_and_weigh_as_bools_and_floats_do(name, dtype):
    x, flags = np.random.default_rng(0).normal(size=(4, 3, 5)), np.arange(20).reshape(4, 5) % 3 > 0
    usual = flags if name == "mask" else flags.astype(float)
    expected, saved = bn.batch_norm(x, **{name: usual})
    y, other = bn.batch_norm(x, **{name: flags.astype(dtype)})
    np.testing.assert_array_equal(y, expected)
    assert other.moments == saved.moments == bn.moments(x, **{name: flags.astype(dtype)})


@pytest.mark.parametrize("shape", ["nchw", "nhwc", "nc_narrow", "ncl_short"])
@pytest.mark.parametrize("kind", ["mask", "weights"])
@every_padding
def test_gradients_equal_complex_steps(shape, kind, padding):
    x, dy, gamma, beta, axis, mask = make(shape, np.float64)
    given = mask if kind == "mask" else weights_like(mask, np.float64)
    _, saved = bn.batch_norm(x, gamma, beta, axis=axis, eps=EPS, padding=padding, **{kind: given})
    got = bn.backward(dy, saved)
    rng, h = np.random.default_rng(2), 1e-200
    for name, value in {"x": x, "gamma": gamma, "beta": beta}.items():
        direction = rng.normal(size=value.shape)
        inputs = {"x": x, "gamma": gamma, "beta": beta, name: value + 1j * h * direction}
        y = reference.weighted_forward(
            inputs["x"], given, inputs["gamma"], inputs["beta"], axis=axis, eps=EPS, padding=padding
        ).y
        slope = (y.imag * dy).sum() / h
        mine = (getattr(got, f"d{name}") * direction).sum()
        terms = np.abs(getattr(got, f"d{name}") * direction).sum()
        assert_within("complex step", np.float64, mine, slope, scale=terms)


@pytest.mark.parametrize("kind", ["huge_mean", "cancelling", "wide"])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_hard_data_keep_the_contract_under_a_mask(kind, axis, weighted):
    rng = np.random.default_rng(0)
    data = rng.normal(size=(40, 37, 50))
    data[:, ::3] = {
        "huge_mean": 1e8 + data[:, ::3],
        "cancelling": np.where(rng.random(data[:, ::3].shape) < 0.5, 1, -1) * 1e6 + 1e-3,
        "wide": data[:, ::3] * 1e-40,
    }[kind]
    x = np.ascontiguousarray(np.moveaxis(data.astype(np.float32), 1, axis))
    mask = rng.random((40, 50)) < 0.5
    given = {"weights": np.where(mask, 2, 0).astype(np.float32)} if weighted else {"mask": mask}
    y, saved = bn.batch_norm(poisoned(x, mask, axis), axis=axis, eps=0.0, padding="zero", **given)
    compressed = kept(x, mask, axis)
    exact = reference.exact_forward(compressed, axis=1, eps=0.0)
    scales = reference.forward_scales(compressed, None, None, exact, axis=1)
    statistics = saved.moments.mean, saved.moments.var(), saved.rstd
    assert_forward(kept(y, mask, axis), statistics, exact, scales, np.float32)


@pytest.mark.parametrize("axis", [1, 2])
def test_coefficients_beyond_float32_are_applied_in_float64_under_a_mask_too(axis):
    rng = np.random.default_rng(0)
    data = rng.normal(size=(6, 37, 50)).astype(np.float32)
    data[:, 5] *= np.float32(1e-30)
    x = np.ascontiguousarray(np.moveaxis(data, 1, axis))
    dy = rng.normal(size=x.shape).astype(np.float32)
    gamma = np.where(np.arange(37) == 5, 1e-20, 1.0)
    mask = rng.random((6, 50)) < 0.5
    small, small_dy = kept(x, mask, axis), kept(dy, mask, axis)
    exact = reference.exact_forward(small, gamma, axis=1, eps=0.0)
    gradients = reference.exact_backward(small_dy, small, gamma, axis=1, eps=0.0)
    scales = reference.backward_scales(small_dy, small, gamma, exact, gradients, axis=1)
    _, saved = bn.batch_norm(x, gamma, axis=axis, eps=0.0, mask=mask)
    dx, dgamma, dbeta, _ = bn.backward(dy, saved)
    assert_backward((kept(dx, mask, axis), dgamma, dbeta), gradients, scales, np.float32)


def test_the_halves_of_the_backward_pass_add_up_over_parts_of_a_masked_batch():
    x, dy, gamma, beta, axis, mask = make("nchw", np.float64)
    whole = bn.backward(dy, bn.batch_norm(x, gamma, beta, axis=axis, mask=mask)[1])
    parts = [bn.batch_norm(x[half], gamma, beta, axis=axis, mask=mask[half])[1] for half in (slice(0, 1), slice(1, 4))]
    merged = parts[0].moments | parts[1].moments
    parts = [dataclasses.replace(p, moments=merged) for p in parts]
    grads = dy[:1], dy[1:]
    sums = [bn.grad_sums(g, p) for g, p in zip(grads, parts, strict=True)]
    total = sums[0] + sums[1]
    dx = np.concatenate([bn.grad_input(g, p, total) for g, p in zip(grads, parts, strict=True)])
    np.testing.assert_allclose(dx, whole.dx, rtol=1e-12, atol=1e-14)


# ---- segments ----------------------------------------------------------------------------------------------

SEGMENTED = {"nc": ((200, 70), 1), "ncl": ((50, 5, 30), 1), "nlc": ((50, 30, 5), 2), "narrow": ((200, 3), 1)}


def segments_of(rows, empty=(), seed=0):
    """Give ids of segments of one and more rows, without those in `empty`."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(0, 12, rows))
    ids[-1] = 12  # one row alone
    return np.sort(np.where(np.isin(ids, empty), 0, ids))


@pytest.mark.parametrize("shape", SEGMENTED)
def test_each_segment_has_the_bits_of_a_call_of_its_own(shape, dtype, threads):
    size, axis = SEGMENTED[shape]
    rng = np.random.default_rng(0)
    x, dy = rng.normal(2, 3, size).astype(dtype), rng.normal(size=size).astype(dtype)
    channels = size[axis]
    gamma, beta = rng.normal(size=channels).astype(dtype), rng.normal(size=channels).astype(dtype)
    ids = segments_of(size[0], empty=(3, 7))
    options = {"axis": axis, "eps": EPS}
    y, saved = bn.batch_norm(x, gamma, beta, segments=ids, num_threads=threads, **options)
    dx, dgamma, dbeta, _ = bn.backward(dy, saved, num_threads=threads)
    counts, means = saved.moments.count.reshape(13, -1), saved.moments.mean.reshape(13, -1)
    assert bn.moments(x, axis=axis, segments=ids) == saved.moments
    of_gamma, of_beta = np.zeros(channels), np.zeros(channels)
    for s in range(13):
        rows = ids == s
        if s in (3, 7):
            assert (counts[s] == 0).all()
            continue
        if rows.sum() * x[0].size // channels == 1:
            assert (y[rows] == beta).all()
            assert (dx[rows] == 0).all()
            of_beta += dy[rows].sum(0)
            continue
        alone, alone_saved = bn.batch_norm(x[rows], gamma, beta, **options)
        grads = bn.backward(dy[rows], alone_saved)
        assert y[rows].tobytes() == alone.tobytes()
        assert (means[s] == alone_saved.moments.mean).all()
        assert dx[rows].tobytes() == grads.dx.tobytes()
        of_gamma += grads.dgamma
        of_beta += grads.dbeta
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(dgamma, of_gamma, **tolerance)
    np.testing.assert_allclose(dbeta, of_beta, **tolerance)


def test_many_small_segments_are_shared_out_among_threads_with_the_same_bits(threads):
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 3000, 20_000))
    x, dy = rng.normal(size=(20_000, 16)).astype(np.float32), rng.normal(size=(20_000, 16)).astype(np.float32)
    results = []
    for n in (1, threads):
        y, saved = bn.batch_norm(x, segments=ids, num_threads=n)
        gradients = bn.backward(dy, saved, num_threads=n)[:3]
        results.append([a.tobytes() for a in (y, *gradients, saved.moments.mean)])
    assert results[0] == results[1]


def test_the_cost_of_segments_follows_the_rows_and_not_the_largest_id():
    """Graphs without nodes may be many, but ids that leave out millions are refused before any memory is taken."""
    x = np.arange(12.0).reshape(4, 3)
    for rows, ids, most in (
        (2, [0, 100_000_000], 1024),
        (3, [0, 0, 10**7], 1024),
        (4, [0, 0, 1024, 1024], 1024),
    ):
        tracemalloc.start()
        with pytest.raises(
            ValueError, match=f"segments must be ids below {most} with {rows} rows, .* got {ids[-1]} for"
        ):
            bn.batch_norm(x[:rows], segments=ids)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()
    _, saved = bn.batch_norm(x, segments=[0, 0, 1023, 1023])
    assert saved.moments.count.reshape(1024, 3)[:, 0].nonzero()[0].tolist() == [0, 1023]
    many = np.repeat([0, 8 * 1000 - 1], 500)
    assert len(bn.moments(np.ones((1000, 1)), segments=many).count) == 8000
    with pytest.raises(ValueError, match="segments must be ids below 8000 with 1000 rows"):
        bn.moments(np.ones((1000, 1)), segments=many + many // 7999)


def test_ids_that_are_names_become_ids_as_the_error_says():
    x, names = np.arange(12.0).reshape(4, 3), np.array([7, 7, 10**12, 10**12])
    y, _ = bn.batch_norm(x, segments=np.unique(names, return_inverse=True)[1])
    np.testing.assert_array_equal(y[2:], bn.batch_norm(x[2:])[0])


def test_arrays_that_do_not_lie_row_by_row_have_segments_too():
    rng = np.random.default_rng(0)
    x = np.asfortranarray(rng.normal(size=(40, 6)))
    ids = segments_of(40)
    y, saved = bn.batch_norm(x, segments=ids)
    same, _ = bn.batch_norm(np.ascontiguousarray(x), segments=ids)
    assert (y == same).all()
    dx = bn.backward(np.ones_like(x), saved).dx
    np.testing.assert_allclose(dx, 0, atol=1e-10)


# ---- the same bits -----------------------------------------------------------------------------------------


def all_digests():
    """Give a digest of every shape, type and kind of counting."""
    digests = {}
    for shape in SHAPES:
        for dtype in (np.float32, np.float64):
            x, dy, gamma, beta, axis, mask = make(shape, dtype)
            for kind, given in {"mask": mask, "weights": weights_like(mask, dtype)}.items():
                for padding in PADDINGS:
                    options = {"axis": axis, "padding": padding, kind: given}
                    y, saved = bn.batch_norm(x, gamma, beta, **options)
                    parts = (y, saved.moments.mean, saved.moments.m2, *bn.backward(dy, saved)[:3])
                    data = b"".join(np.ascontiguousarray(a).tobytes() for a in parts)
                    name = f"{shape} {np.dtype(dtype).name} {kind} {padding}"
                    digests[name] = hashlib.sha256(data).hexdigest()
    return digests


def test_every_instruction_set_gives_the_same_bits_with_weights(isa, python_with_isa):
    code = "import json, test_counted as t; print(json.dumps(t.all_digests()))"
    process = python_with_isa(isa, code)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == all_digests()


@every_shape
@every_padding
def test_threads_and_place_change_no_bit_with_weights(shape, dtype, padding, threads):
    x, dy, gamma, beta, axis, mask = make(shape, dtype)
    given = {"axis": axis, "weights": weights_like(mask, dtype), "padding": padding}
    y, saved = bn.batch_norm(x, gamma, beta, num_threads=1, **given)
    again, again_saved = bn.batch_norm(x, gamma, beta, num_threads=threads, **given)
    assert again.tobytes() == y.tobytes()
    assert again_saved.moments == saved.moments
    plain, other = bn.backward(dy, saved), bn.backward(dy, saved, num_threads=threads)
    assert [a.tobytes() for a in plain[:3]] == [a.tobytes() for a in other[:3]]
    place, target = x.copy(), dy.copy()
    bn.batch_norm(place, gamma, beta, out=place, **given)
    assert place.tobytes() == y.tobytes()
    bn.backward(target, saved, out=target)
    assert target.tobytes() == plain.dx.tobytes()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 2, 1), (1, 2, 3, 0)])
def test_weights_follow_the_memory_order_of_x(order):
    x, dy, gamma, beta, _, mask = make("nchw", np.float64)
    w = weights_like(mask, np.float64)
    y, saved = bn.batch_norm(x, gamma, beta, weights=w)
    dx = bn.backward(dy, saved).dx
    laid = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    other, other_saved = bn.batch_norm(laid, gamma, beta, weights=w)
    np.testing.assert_allclose(other, y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(bn.backward(dy, other_saved).dx, dx, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mask", "weights", "lengths"])
@pytest.mark.parametrize(
    "view",
    [
        lambda a: np.repeat(a, 2, axis=2)[:, :, ::2],
        lambda a: np.repeat(a.transpose(2, 0, 1), 2, axis=1)[:, ::2].transpose(1, 2, 0),
        lambda a: a[::-1, :, ::-1].copy()[::-1, :, ::-1],
        lambda a: np.asfortranarray(a)[:, :, ::1],
        lambda a: np.concatenate([a, a], axis=1)[:, : a.shape[1]],
    ],
    ids=["gaps", "gaps_and_order", "reversed", "fortran", "part"],
)
def test_what_counts_is_told_of_positions_however_x_lies_in_memory(view, kind, dtype):
    rng = np.random.default_rng(0)
    plain, dy = rng.normal(2, 3, (5, 4, 6)).astype(dtype), rng.normal(size=(5, 4, 6)).astype(dtype)
    lengths = np.array([6, 0, 2, 5, 3])
    mask = np.arange(6) < lengths[:, None]
    given = {"mask": mask, "weights": np.where(mask, 0.5, 0), "lengths": lengths}[kind]
    options = {kind: given, "padding": "zero"}
    x = view(plain)
    assert (x == plain).all()
    results = []
    for values in (plain, x):
        y, saved = bn.batch_norm(values, **options)
        dx, *sums = bn.backward(dy, saved)[:3]
        results.append((y, dx, *sums, saved.moments.mean, saved.moments.var()))
        assert (bn.moments(values, **{kind: given}).mean == saved.moments.mean).all()
    # Another memory order sums in another order: beyond the last digits nothing differs.
    close = 64 * UNIT_ROUNDOFF[dtype.name]
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(other, one, rtol=close, atol=close * np.abs(one).max())


def test_no_rows_have_no_segments():
    x = np.empty((0, 3, 2))
    y, saved = bn.batch_norm(x, segments=np.empty(0, int))
    assert y.shape == x.shape
    assert saved.moments.channels == 0
    dx, dgamma, dbeta, _ = bn.backward(x, saved)
    assert dx.shape == x.shape
    assert dgamma.tolist() == dbeta.tolist() == [0, 0, 0]


# ---- mistakes ----------------------------------------------------------------------------------------------

X = np.zeros((4, 3, 5), np.float32)
SHAPE_OF_POSITIONS = (
    "mask must have the shape of x without its channel axis, (4, 5), or with 1 there "
    "(and 1 wherever it is the same along an axis), got "
)
MISTAKES = [
    (
        {"mask": np.ones((4, 5), bool), "weights": np.ones((4, 5))},
        ValueError,
        "at most one of mask, weights and lengths must be given, which say what counts, got mask and weights",
    ),
    (
        {"mask": np.ones((4, 3), bool)},
        ValueError,
        f"{SHAPE_OF_POSITIONS}(4, 3)",
    ),
    (
        {"mask": np.ones((4, 3, 5), bool)},
        ValueError,
        f"{SHAPE_OF_POSITIONS}(4, 3, 5)",
    ),
    ({"mask": np.ones((4, 5))}, TypeError, "mask must have a bool dtype (write mask != 0), got float64"),
    ({"mask": np.full((4, 5), 2)}, ValueError, "mask must be bools, or integers 0 and 1, got 2"),
    ({"mask": [[True], [True, False]]}, TypeError, "mask must be an array of numbers, got list"),
    ({"weights": np.ones((4, 5), complex)}, TypeError, "weights must have a floating dtype, got complex128"),
    (
        {"weights": np.full((4, 1, 5), -1.0)},
        ValueError,
        "weights must be finite and >= 0 at every position, got -1 at position 0",
    ),
    (
        {"weights": np.where(np.arange(20).reshape(4, 5) == 7, np.nan, 1)},
        ValueError,
        "weights must be finite and >= 0 at every position, got nan at position 7",
    ),
    (
        {"weights": np.where(np.arange(20).reshape(4, 5) == 7, 1e300, 1)},
        ValueError,
        "weights must be finite and >= 0 at every position, got inf at position 7",
    ),
    ({"lengths": [1, 2, 3]}, ValueError, "lengths must have shape (4,), one per sample, got (3,)"),
    ({"lengths": [1.0, 2, 3, 4]}, TypeError, "lengths must have an integer dtype, got float64"),
    (
        {"lengths": [1, 2, 6, 4]},
        ValueError,
        "lengths must be from 0 to 5, the size of axis 2 of x, got 6 for sample 2",
    ),
    (
        {"segments": [0, 1, 0, 2]},
        ValueError,
        "segments must be ids from 0 that never fall, got 0 for row 2",
    ),
    (
        {"segments": [-1, 0, 0, 2]},
        ValueError,
        "segments must be ids from 0 that never fall, got -1 for row 0",
    ),
    ({"segments": [0, 1]}, ValueError, "segments must have shape (4,), one id per row, got (2,)"),
    (
        {"segments": [0, 0, 0, 2**40]},
        ValueError,
        "segments must be ids below 1024 with 4 rows, since each up to the largest has statistics, got 1099511627776 for row 3; np.unique(segments, return_inverse=True)[1] are ids without gaps",
    ),
    (
        {"mask": np.ones((4, 5), bool), "padding": "reflect"},
        ValueError,
        "padding must be 'zero', 'keep' or 'normalize', got 'reflect'",
    ),
    (
        {"padding": "zero"},
        ValueError,
        "padding must be None without mask, weights or lengths, which say what is padding, got 'zero'",
    ),
]


@pytest.mark.parametrize(("given", "error", "text"), MISTAKES)
def test_a_mistake_is_named_and_nothing_is_written(given, error, text):
    out = np.full_like(X, 9)
    with pytest.raises(error) as caught:
        bn.batch_norm(X, out=out, **given)
    assert str(caught.value) == text
    assert (out == 9).all()


def test_lengths_and_segments_want_axes_of_their_own():
    with pytest.raises(ValueError, match="lengths must come with an x of samples"):
        bn.moments(np.zeros((4, 3)), lengths=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="segments must be of rows on axis 0"):
        bn.moments(np.zeros((4, 3)), axis=0, segments=[0, 0, 0, 0])


def test_at_most_one_option_says_what_shares_statistics():
    with pytest.raises(ValueError, match=r"^at most one of segments and ghost_size must be given"):
        bn.batch_norm(np.ones((4, 2)), segments=[0, 0, 1, 1], ghost_size=2)


@pytest.mark.parametrize("kind", ["mask", "weights", "lengths"])
def test_a_ghost_of_one_position_is_refused_and_a_segment_of_one_gives_beta(kind):
    x = np.random.default_rng(0).normal(size=(4, 3, 2))
    flags = np.array([[1, 1], [1, 1], [0, 0], [1, 0]])
    given = {kind: flags.sum(1) if kind == "lengths" else flags}
    out = np.full_like(x, 9)
    with pytest.raises(ValueError, match=r"2 positions or more for batch statistics \(or .*none\), got 1$"):
        bn.batch_norm(x, ghost_size=2, out=out, **given)
    assert (out == 9).all()
    y, _ = bn.batch_norm(x, beta=[1.0, 2.0, 3.0], segments=[0, 0, 1, 1], padding="zero", **given)
    np.testing.assert_array_equal(y[3, :, 0], [1, 2, 3])
    np.testing.assert_array_equal(y[2], 0)


def test_ids_beyond_int64_are_told_as_they_came():
    with pytest.raises(ValueError, match=f"ids below 1024 .*got {2**63 + 5} for row 1"):
        bn.batch_norm(np.ones((2, 3)), segments=np.array([0, 2**63 + 5], np.uint64))


@pytest.mark.parametrize("part", ["segments", "lengths"])
def test_an_empty_list_is_of_no_rows(part):
    x = np.empty((0, 3, 4))
    y, saved = bn.batch_norm(x, **{part: []})
    assert y.shape == x.shape
    assert (saved.moments.count == 0).all()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"mask": np.ones(6, bool), "weights": np.ones(6)}, "at most one of mask, weights"),
        ({"weights": np.ones(5)}, r"weights must have the shape of x .*got \(5,\)"),
        (
            {"weights": -np.ones(6), "padding": "zero"},
            "weights must be finite and >= 0 .*got -1 at position 0",
        ),
        ({"weights": [1, 1, np.nan, 1, 1, 1]}, "weights must be finite and >= 0 .*got nan at position 2"),
    ],
)
@pytest.mark.parametrize("way", ["evaluation", "use_stats", "frozen"])
def test_weights_are_checked_where_statistics_are_given_too(way, how, told):
    x = np.random.default_rng(0).normal(size=(6, 3))
    layer = bn.BatchNorm(3)
    layer(x)
    if way == "evaluation":
        layer.eval()
    if way == "frozen":
        layer.freeze()
    options = {"use_stats": "running"} if way == "use_stats" else {}
    with pytest.raises(ValueError, match=told):
        layer(x, **how, **options)
