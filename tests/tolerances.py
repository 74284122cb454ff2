"""The numerical contract as one table: (quantity, dtype of x) -> bound, each with its argument.

An error is allowed to reach

    relative * scale + ulps * ulp(at) + subnormals * (smallest subnormal of dtype)

where `scale` is the sum of absolute terms named in the entry (reference.forward_scales, backward_scales),
and `at` is the exact value unless the entry says otherwise. u is half the spacing of the dtype at 1.
Tests take bounds from here and from nowhere else.
"""

from typing import NamedTuple

import numpy as np

from reference import Exact, ulp


class Bound(NamedTuple):
    relative: float
    ulps: float
    subnormals: float
    why: str


def _contract(dtype, u):
    return {
        ("mean", dtype): Bound(0, 1, 0, "a sum that cancels is taken again, in the last resort exactly; rounded once"),
        ("var", dtype): Bound(0, 1, 0, "a sum of squares does not cancel; the mean it is taken about is exact enough"),
        ("rstd", dtype): Bound(0, 1, 0, "var + eps, a root and a quotient from var's two float64s, rounded once"),
        ("y", dtype): Bound(
            3 * u,
            1,
            0,
            "x - m_hi, the coefficient gamma * rstd and their product round once each: 3u of |y - beta|; "
            "scale: the channel's max |y - beta|. The folded beta and the last sum round once each: half an ulp "
            "at |beta| and half at |y|; at: the larger of both",
        ),
        ("y of lines", dtype): Bound(
            2 * u,
            1,
            0,
            "x - m_hi (or, where that is exact, what m_hi leaves of the mean) and xhat round once each: 2u of |y - beta|; "
            "scale: the line's max |y - beta|. beta and y round once each, as for y. A gamma that is not of dtype is "
            "rounded too, which the bound of y allows",
        ),
        ("dx", dtype): Bound(
            4 * u,
            0,
            1,
            "three terms of at most one coefficient, one difference and one product each, and the sum; "
            "scale: |a dy| + |a mean(dy)| + |a xhat mean(dy xhat)|, in float64 with the means of |dy| and |dy xhat|, "
            "as dy and x - mean are rounded before they are summed; one subnormal where dx underflows",
        ),
        ("dgamma", dtype): Bound(4 * u, 0, 1, "float64 or compensated sum, rounded once; scale: sum |dy xhat|"),
        ("dbeta", dtype): Bound(4 * u, 0, 1, "float64 or compensated sum, rounded once; scale: sum |dy|"),
        ("weighted", dtype): Bound(
            u + 64 * 2.0**-53,
            0,
            0,
            "as without weights, against float64 formulas whose own sums of some thousand terms, added pairwise, err by "
            "tens of float64 roundings; scale: the value, for the mean |mean| + std",
        ),
        ("weighted y", dtype): Bound(
            4 * u + 64 * 2.0**-53,
            0,
            0,
            "as y, half an ulp each for beta and the last sum, and the oracle's own roundings; "
            "scale: the channel's max |y - beta|, and |y|",
        ),
        ("weighted dx", dtype): Bound(
            6 * u + 64 * 2.0**-53,
            0,
            1,
            "as dx, and one more rounding each for the products w * mean(dy), w * xhat term and w * offset; scale: as dx",
        ),
    }


UNIT_ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53}

TABLE = {
    **_contract("float32", UNIT_ROUNDOFF["float32"]),
    **_contract("float64", UNIT_ROUNDOFF["float64"]),
    # A result stored narrower than x (float16 or float32 gamma): one more rounding. Twice the half ulp, since
    # the bound above may push the exact value over a halfway point.
    ("stored", "float16"): Bound(0, 1, 1, "one rounding to the dtype of gamma"),
    ("stored", "float32"): Bound(0, 1, 1, "one rounding to the dtype of gamma"),
    ("merge", "float64"): Bound(
        1e-12,
        0,
        0,
        "a merge adds three float64 terms; 1e-12 is 4500 roundings, some hundred merges of random order; "
        "scale: max |x| for the mean, sum x^2 for m2",
    ),
    ("pooled", "float64"): Bound(
        1e-15,
        0,
        0,
        "mean and m2 are held to twice float64's digits and rounded once, var divided and rounded once more: 3 roundings, "
        "whatever the offset; scale: |mean|, for float32 x, whose sums are float64, |mean| + std; and var",
    ),
    ("exponential", "float64"): Bound(
        4 * 2.0**-53,
        0,
        0,
        "each fading rounds count and m2, by which all that is older errs, but for its share of the sum: a rate of r "
        "leaves 1/r such errors, and moves the mean by as much of a step, which is at most the largest |x|; "
        "scale: |mean| + std, and var + std * max |x|, each divided by the rate",
    ),
    ("complex step", "float64"): Bound(
        1e-12,
        0,
        0,
        "h = 1e-200 leaves no truncation error, so only float64 sums of tens of terms differ; scale: max |gradient|",
    ),
    ("central difference", "float64"): Bound(
        1e-7,
        0,
        0,
        "h = 1e-5: truncation h^2 ~ 1e-10 times third derivatives, rounding 1e-16 / h = 1e-11 times the terms of "
        "the loss; scale: max |gradient|",
    ),
    ("jvp", "float32"): Bound(
        5 * 2.0**-24,
        0,
        1,
        "one coefficient, one difference and one product a term, and two sums; "
        "scale: the sum of absolute terms, with means of absolute values",
    ),
    ("jvp", "float64"): Bound(
        6 * 2.0**-53, 0, 1, "the same, and x - mean is rounded before it is summed; scale: as for float32"
    ),
    ("second", "float32"): Bound(
        2 * 2.0**-24, 0, 1, "float64 throughout, rounded once; scale: the sum of absolute terms, as for jvp"
    ),
    ("second", "float64"): Bound(
        8 * 2.0**-53,
        0,
        1,
        "differences in two of the sums of a term, its coefficient, difference and product, and three sums; "
        "scale: as for float32",
    ),
    ("torch", "float64"): Bound(
        1e-12,
        0,
        0,
        "torch sums float64 in float64 on well-conditioned data of some hundred values; scale: max |result|",
    ),
    ("oracles", "float64"): Bound(
        1e-12,
        0,
        0,
        "float64 formulas against exact integers on well-conditioned data; scale: max |result|",
    ),
}


def allowed(quantity, dtype, exact, *, scale=0.0, at=None, stored=None):
    """Give the bound of a table entry at every element of exact."""
    bound = TABLE[quantity, np.dtype(dtype).name]
    spacing = ulp(exact.high if at is None else at, dtype, stored)
    least = float(np.finfo(stored or dtype).smallest_subnormal)
    return bound.relative * np.asarray(scale, np.float64) + bound.ulps * spacing + bound.subnormals * least


def assert_within(quantity, dtype, got, exact, *, scale=0.0, at=None):
    """Check that got is exact within TABLE[quantity, dtype]; what is beyond the range of its dtype must be inf."""
    got, dtype = np.asarray(got), np.dtype(dtype)
    if not isinstance(exact, Exact):
        exact = Exact(np.asarray(exact, np.float64), np.zeros(np.shape(exact)))
    assert got.shape == exact.high.shape, f"{quantity}: shape {got.shape}, expected {exact.high.shape}"
    if got.size == 0:
        return
    # Statistics and sums are float64 whatever x is: they have its exponent range, but are judged in ulps of x.
    stored = got.dtype if got.dtype.itemsize > dtype.itemsize else None
    bound = allowed(quantity, dtype, exact, scale=scale, at=at, stored=stored)
    if got.dtype.itemsize < dtype.itemsize:
        bound = bound + allowed("stored", got.dtype, exact)
    overflows = np.abs(exact.high) > float(np.finfo(got.dtype).max)
    right_overflow = overflows & np.isinf(got) & (np.signbit(got) == np.signbit(exact.high))
    error = np.where(right_overflow, 0.0, exact.distance(got))
    wrong = ~(error <= bound)  # so that NaN is wrong
    if wrong.any():
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(wrong, np.where(np.isfinite(error), error / bound, np.inf), 0.0)
        worst = np.unravel_index(np.argmax(share), share.shape)
        raise AssertionError(
            f"{quantity} of {dtype} data: {wrong.sum()} of {wrong.size} beyond the bound; at {tuple(map(int, worst))} "
            f"got {got[worst]!r}, exact {exact.high[worst]!r}, error {error[worst]:.3g} = {share[worst]:.3g} bounds"
        )


def assert_forward(y, statistics, exact, scales, dtype):
    """Check that y and (mean, var, rstd) keep the contract."""
    mean, var, rstd = statistics
    assert_within("mean", dtype, mean, exact.mean)
    assert_within("var", dtype, var, exact.var)
    assert_within("rstd", dtype, rstd, exact.rstd)
    assert_within("y", dtype, y, exact.y, scale=scales.y, at=scales.y_at)


def assert_backward(gradients, exact, scales, dtype):
    """Check that dx, dgamma and dbeta keep the contract."""
    for name, got, value, scale in zip(("dx", "dgamma", "dbeta"), gradients[:3], exact, scales, strict=True):
        assert_within(name, dtype, got, value, scale=scale)


def inverted_xhat(dtype, largest_xhat, ratio):
    """Bound the error of (y - beta)/gamma as xhat, `ratio` being abs(beta/gamma).

    The bound of y, divided by gamma: 3u of the largest xhat, half an ulp at beta and half an ulp at y.
    """
    return UNIT_ROUNDOFF[np.dtype(dtype).name] * (4 * largest_xhat + 2 * ratio)
