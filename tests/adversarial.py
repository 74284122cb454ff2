"""Named inputs on which batch normalization goes wrong elsewhere. Fixed seeds; every value is generated here.

A case is (4, 3, 8, 9): two channels of the named trouble around one of plain normals, so that vector lanes and
neighbouring coefficients see both. 72 values a plane and 288 a channel leave a tail on every vector width.
"""

from typing import NamedTuple
from zlib import crc32

import numpy as np

SHAPE = (4, 3, 8, 9)  # N, C, H, W; 288 values a channel
_TROUBLED = (0, 2)


class Case(NamedTuple):
    x: np.ndarray
    dy: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    eps: float


# x of one troubled channel from (rng, n, dtype): n values, cast to dtype afterwards.
X = {
    "plain_normal": lambda rng, n, dtype: rng.normal(size=n),
    "zero_mean_centred": lambda rng, n, dtype: _centred(rng.normal(size=n)),
    "mean_exactly_zero": lambda rng, n, dtype: _mirrored(rng.normal(size=n // 2).astype(dtype)),
    "mean_exactly_zero_wide": lambda rng, n, dtype: _mirrored(10.0 ** rng.uniform(-6, 6, n // 2)),
    **{f"mean_std_1e{k}": lambda rng, n, dtype, k=k: 10.0**k + rng.normal(size=n) for k in range(9)},
    "mean_std_1e6_negative": lambda rng, n, dtype: -1e6 + rng.normal(size=n),
    "offset_100_std_0.01": lambda rng, n, dtype: 100 + 0.01 * rng.normal(size=n),
    "offset_2000_four_values": lambda rng, n, dtype: np.resize(2000 + rng.normal(size=4), n),
    "ramp_40000": lambda rng, n, dtype: 40000 + np.arange(n) / 64,
    "one_outlier_1e6": lambda rng, n, dtype: _with(rng.normal(size=n), {n // 3: 1e6}),
    "one_outlier_1e12": lambda rng, n, dtype: _with(rng.normal(size=n), {n // 3: 1e12}),
    "one_outlier_1e18": lambda rng, n, dtype: _with(rng.normal(size=n), {n // 3: 1e18}),
    "first_value_outlier_1e12": lambda rng, n, dtype: _with(rng.normal(size=n), {0: 1e12}),
    "two_outliers_cancel_1e6": lambda rng, n, dtype: _with(rng.normal(size=n), {7: 1e6, n - 9: -1e6}),
    "two_outliers_cancel_1e18": lambda rng, n, dtype: _with(rng.normal(size=n), {7: 1e18, n - 9: -1e18}),
    "two_outliers_cancel_1e30": lambda rng, n, dtype: _with(rng.normal(size=n), {7: 1e30, n - 9: -1e30}),
    # Three magnitudes in one lane of 16: while the largest is in the high part of a compensated sum, the next fills the
    # low part.
    "nested_outliers_cancel": lambda rng, n, dtype: _with(
        rng.normal(size=n), {0: 1e38, 16: 1e18, 48: -1e18, 64: -1e38}
    ),
    "sum_cancellation": lambda rng, n, dtype: _shuffled(rng, [1e15, -1e15, 1.0], n),
    "subnormal": lambda rng, n, dtype: rng.uniform(-1, 1, n) * float(np.finfo(dtype).smallest_normal),
    "subnormal_smallest": lambda rng, n, dtype: rng.integers(-3, 4, n) * float(np.finfo(dtype).smallest_subnormal),
    "tiny_1e-25": lambda rng, n, dtype: 1e-25 * rng.normal(size=n),
    **{
        f"constant_{value}": lambda rng, n, dtype, value=value: np.full(n, float(value))
        for value in (
            "0",
            "0.1",
            "1",
            "-7",
            "123456.789",
            "10000001",
            "1e10",
            "1e30",
            "3.4028234663852886e38",
        )
    },
    "constant_but_one_ulp": lambda rng, n, dtype: _with(np.full(n, 3.0), {n // 2: np.nextafter(dtype(3), dtype(4))}),
    "alternating_1": lambda rng, n, dtype: np.resize([1.0, -1.0], n),
    "alternating_1e4_with_drift": lambda rng, n, dtype: np.resize([1e4, -1e4], n) + np.arange(n) / 16,
    "alternating_1e15": lambda rng, n, dtype: np.resize([1e15, -1e15], n) + rng.normal(size=n) * 1e8,
    "alternating_max": lambda rng, n, dtype: np.resize([1.0, -1.0], n) * float(np.finfo(np.float32).max),
    "huge_1e15": lambda rng, n, dtype: 1e15 * rng.normal(size=n),
    "huge_1e18": lambda rng, n, dtype: 1e18 * rng.normal(size=n),
    "huge_1e20": lambda rng, n, dtype: 1e20 * rng.normal(size=n),
    "huge_1e30": lambda rng, n, dtype: 1e30 * rng.normal(size=n),
    "near_max_both_signs": lambda rng, n, dtype: rng.uniform(-1, 1, n) * float(np.finfo(np.float32).max),
    "near_max_one_sign": lambda rng, n, dtype: rng.uniform(0.9, 1, n) * float(np.finfo(np.float32).max),
    "near_max_mostly_one_sign": lambda rng, n, dtype: (
        np.resize([1.0] * 9 + [-1.0], n) * float(np.finfo(np.float32).max)
    ),
    "one_value_max": lambda rng, n, dtype: _with(np.zeros(n), {n // 3: float(np.finfo(np.float32).max)}),
    "one_value_not_zero": lambda rng, n, dtype: _with(np.zeros(n), {n - 1: 1.0}),
    "two_values": lambda rng, n, dtype: np.resize([3.0, 5.0], n),
    "two_values_1ulp_apart": lambda rng, n, dtype: rng.choice([dtype(1), np.nextafter(dtype(1), dtype(2))], n),
    "two_values_1ulp_apart_1e8": lambda rng, n, dtype: rng.choice(
        [dtype(1e8), np.nextafter(dtype(1e8), dtype(2e8))], n
    ),
    "geometric": lambda rng, n, dtype: 0.75 ** np.arange(n),
    "geometric_both_signs": lambda rng, n, dtype: (-0.9) ** np.arange(n),
    "sorted_heavy_tail": lambda rng, n, dtype: np.sort(rng.lognormal(0, 5, n)),
    "heavy_tail_cauchy": lambda rng, n, dtype: rng.standard_cauchy(n),
    "heavy_tail_exponents": lambda rng, n, dtype: rng.choice([-1, 1], n) * 2.0 ** rng.integers(-60, 60, n),
    "all_magnitudes": lambda rng, n, dtype: rng.choice([-1, 1], n) * 10.0 ** rng.uniform(-44, 38, n),
    "uniform_0_1": lambda rng, n, dtype: rng.uniform(size=n),
    "small_integers": lambda rng, n, dtype: rng.integers(-2, 3, n),
}

# dy of one troubled channel from (rng, x of that channel).
DY = {
    "constant": lambda rng, x: np.full(x.size, 0.7),
    "zero": lambda rng, x: np.zeros(x.size),
    "offset_1e6": lambda rng, x: 1e6 + rng.normal(size=x.size),
    "parallel_to_x": lambda rng, x: x.astype(np.float64),
    "parallel_to_x_plus_a_little": lambda rng, x: x.astype(np.float64) + 1e-4 * rng.normal(size=x.size),
    "1e30": lambda rng, x: 1e30 * rng.normal(size=x.size),
    "subnormal": lambda rng, x: rng.uniform(-1, 1, x.size) * float(np.finfo(x.dtype).smallest_normal),
    "one_outlier_1e12": lambda rng, x: _with(rng.normal(size=x.size), {5: 1e12}),
    "sum_cancels": lambda rng, x: _mirrored(rng.normal(size=x.size // 2)),
}


def _with(values, places):
    values[list(places)] = list(places.values())
    return values


def _centred(values):
    return values - values.mean()


def _mirrored(half):
    return np.concatenate([half, -half[::-1]])


def _shuffled(rng, pattern, n):
    return rng.permutation(np.resize(pattern, n))


def _planes(rows):
    """(C, values) to (N, C, H, W)."""
    n, c, h, w = SHAPE
    return np.ascontiguousarray(rows.reshape(c, n, h, w).swapaxes(0, 1))


def _case(name, dtype, x="plain_normal", dy=None, gamma=1.0, beta=0.0, eps=1e-5):
    """gamma, beta: one number for the troubled channels, or None for random ones."""
    rng, dtype = np.random.default_rng(crc32(name.encode())), np.dtype(dtype).type
    values, channels = SHAPE[0] * SHAPE[2] * SHAPE[3], SHAPE[1]
    x_rows, dy_rows = (
        rng.normal(size=(channels, values)).astype(dtype),
        rng.normal(size=(channels, values)).astype(dtype),
    )
    gammas, betas = rng.uniform(0.5, 2, channels), rng.normal(size=channels)
    with np.errstate(under="ignore"):
        for c in _TROUBLED:
            x_rows[c] = np.asarray(X[x](rng, values, dtype)).astype(dtype)
            if dy is not None:
                dy_rows[c] = np.asarray(DY[dy](rng, x_rows[c])).astype(dtype)
            gammas[c] = gammas[c] if gamma is None else gamma
            betas[c] = betas[c] if beta is None else beta
    assert np.isfinite(x_rows).all() and np.isfinite(dy_rows).all(), name
    return Case(_planes(x_rows), _planes(dy_rows), gammas.astype(dtype), betas.astype(dtype), eps)


# Every x as it is, then the cases that also turn another knob.
_OPTIONS = {
    **{name: {"x": name} for name in X},
    "mean_std_1e4_affine": {"x": "mean_std_1e4", "gamma": None, "beta": None},
    "subnormal_gamma_1e30": {"x": "subnormal", "gamma": 1e30},
    "subnormal_eps_0": {"x": "subnormal", "eps": 0.0},
    "tiny_1e-25_eps_1e-60": {"x": "tiny_1e-25", "eps": 1e-60},
    "tiny_1e-25_eps_0": {"x": "tiny_1e-25", "eps": 0.0},
    "two_values_1ulp_apart_eps_1e-30": {"x": "two_values_1ulp_apart", "eps": 1e-30},
    "constant_but_one_ulp_eps_0": {"x": "constant_but_one_ulp", "eps": 0.0},
    "constant_1e10_affine": {"x": "constant_1e10", "gamma": None, "beta": None},
    "constant_0.1_eps_1e-60": {"x": "constant_0.1", "gamma": None, "beta": None, "eps": 1e-60},
    "eps_1e10": {"eps": 1e10},
    "gamma_zero": {"gamma": 0.0, "beta": None},
    "gamma_negative": {"gamma": -1.5, "beta": None},
    "gamma_1e30": {"gamma": 1e30},
    "gamma_1e-30": {"gamma": 1e-30},
    "gamma_subnormal": {"gamma": 1e-40},
    "gamma_1e-30_huge_1e15": {"x": "huge_1e15", "gamma": 1e-30},
    "beta_cancels_output": {"beta": 1.0, "x": "two_values"},
    "beta_1000": {"beta": 1000.0},
    "beta_1024_near_power_of_two": {"beta": 1024.0001},
    "beta_1e30": {"beta": 1e30},
    # The outlier's xhat is 17: 17 * gamma is beyond float32 until beta is added.
    "beta_brings_overflow_back": {"x": "one_outlier_1e6", "gamma": 3e37, "beta": -3e38},
    # gamma brings the coefficient into range, but x - mean is beyond float32.
    "near_max_mostly_one_sign_gamma_1e10": {"x": "near_max_mostly_one_sign", "gamma": 1e10},
    "beta_subnormal": {"beta": 1e-41, "gamma": 1e-38},
    **{f"dy_{name}": {"dy": name} for name in DY},
    "dy_and_x_offset_1e4": {"x": "mean_std_1e4", "dy": "parallel_to_x"},
    "dy_parallel_to_huge_1e18": {"x": "huge_1e18", "dy": "parallel_to_x"},
    "dy_offset_1e6_mean_std_1e6": {"x": "mean_std_1e6", "dy": "offset_1e6"},
    "dy_1e30_tiny_1e-25": {"x": "tiny_1e-25", "dy": "one_outlier_1e12", "eps": 1e-60},
    "dy_subnormal_huge_1e30": {"x": "huge_1e30", "dy": "subnormal"},
}

NAMES = list(_OPTIONS)
# In float64 the squares of subnormals vanish, so that no float64 is near 1 / sqrt(var); and between the multiples
# of the smallest subnormal there is no float64 for their mean.
_FLOAT32_ONLY = {"subnormal_eps_0", "subnormal_smallest"}
CASES = [
    (name, dtype)
    for name in NAMES
    for dtype in ("float32", "float64")
    if not (dtype == "float64" and name in _FLOAT32_ONLY)
]
CONSTANTS = [name for name in X if name.startswith("constant_") and name != "constant_but_one_ulp"]
RATIOS = {k: f"mean_std_1e{k}" for k in range(9)}


def make(name, dtype):
    """Give the case of this name with x of this dtype; the same values on every call."""
    return _case(name, dtype, **_OPTIONS[name])
