"""The oracle: batch normalization as its formulas, and once more in exact integers. Never imports batchnorm.

Three levels, each held to the next by test_accuracy.py:

formulas   float64, or complex128 for complex steps: the definition, for reading.
fsum_*     float64 with correctly rounded sums: for tensors too large for integers, good to about 2^-50.
exact_*    every float is an integer times 2^k, so sums, means and variances are exact rationals of Python
           integers; the one square root is taken to 320 bits. A few microseconds an element.

Arrays have any rank; `axis` is the channel axis. mean, var (biased: m2 / count) and rstd are (C,).
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np


class Forward(NamedTuple):
    y: object
    mean: object
    var: object
    rstd: object


class Backward(NamedTuple):
    dx: object
    dgamma: object
    dbeta: object


class Moments(NamedTuple):
    count: object
    mean: object
    m2: object


# ---- formulas ---------------------------------------------------------------------------------------------


def per_channel(values, x, axis):
    """Shape (C,) values so that they broadcast against x."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.asarray(values).reshape(shape)


def other_axes(x, axis):
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def _wide(x):
    return x.astype(np.result_type(x.dtype, np.float64))


def _gamma_beta(x, gamma, beta, axis):
    channels = x.shape[axis]
    gamma = np.ones(channels) if gamma is None else _wide(np.asarray(gamma))
    beta = np.zeros(channels) if beta is None else _wide(np.asarray(beta))
    return per_channel(gamma, x, axis), per_channel(beta, x, axis)


def moments(x, axis):
    """Give count = values a channel, mean = sum(x) / count, m2 = sum((x - mean)^2); zeros for an empty channel."""
    x = _wide(x)
    axes = other_axes(x, axis)
    count = math.prod(x.shape[i] for i in axes)
    mean = x.sum(axes) / max(count, 1)
    m2 = ((x - per_channel(mean, x, axis)) ** 2).sum(axes)
    return Moments(np.full(x.shape[axis], float(count)), mean, m2)


def merge(a, b):
    """Give the moments of both parts together (Chan, Golub, LeVeque 1979, eq. 2.1)."""
    count = a.count + b.count
    share = b.count / np.where(count == 0, 1.0, count)
    delta = b.mean - a.mean
    return Moments(count, a.mean + delta * share, a.m2 + b.m2 + delta**2 * a.count * share)


def reciprocal_std(var, eps):
    """Give 1 / sqrt(var + eps), and 0 where var + eps is 0, so that y is beta there."""
    total = np.asarray(var) + eps
    return np.where(total == 0, 0.0, 1.0 / np.sqrt(np.where(total == 0, 1.0, total)))


def normalize(x, mean, var, gamma, beta, *, axis, eps):
    """Give y = (x - mean) * rstd * gamma + beta."""
    gamma, beta = _gamma_beta(x, gamma, beta, axis)
    x = _wide(x)
    rstd = per_channel(reciprocal_std(var, eps), x, axis)
    return (x - per_channel(mean, x, axis)) * rstd * gamma + beta


def forward(x, gamma, beta, *, axis, eps):
    """Normalize with the statistics of this batch."""
    m = moments(x, axis)
    var = m.m2 / np.maximum(m.count, 1)
    y = normalize(x, m.mean, var, gamma, beta, axis=axis, eps=eps)
    return Forward(y, m.mean, var, reciprocal_std(var, eps))


def _sums(dy, xhat, axis):
    axes = other_axes(dy, axis)
    return (dy * xhat).sum(axes), dy.sum(axes)


def backward(dy, x, gamma, *, axis, eps):
    """Give dx = gamma * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)): the batch statistics depend on x too."""
    dy, stats = _wide(dy), forward(x, None, None, axis=axis, eps=eps)
    xhat = stats.y
    dgamma, dbeta = _sums(dy, xhat, axis)
    count = max(math.prod(x.shape[i] for i in other_axes(x, axis)), 1)
    a = per_channel(stats.rstd, x, axis) * _gamma_beta(x, gamma, None, axis)[0]
    dx = a * (dy - per_channel(dbeta, x, axis) / count - xhat * per_channel(dgamma, x, axis) / count)
    return Backward(dx, dgamma, dbeta)


def normalize_backward(dy, x, mean, var, gamma, *, axis, eps):
    """Give dx = gamma * rstd * dy: the statistics are constants."""
    dy = _wide(dy)
    xhat = normalize(x, mean, var, None, None, axis=axis, eps=eps)
    a = per_channel(reciprocal_std(var, eps), x, axis) * _gamma_beta(x, gamma, None, axis)[0]
    return Backward(a * dy, *_sums(dy, xhat, axis))


def per_position(weights, x, axis):
    """Shape weights (as x without its channel axis) so that they broadcast against x."""
    return np.expand_dims(np.asarray(weights, np.float64), axis)


def weighted_moments(x, weights, axis):
    """Give W = sum(w), mean = sum(w x) / W, m2 = sum(w (x - mean)^2) over what has a weight; zeros where W is 0."""
    w = np.broadcast_to(per_position(weights, x, axis), x.shape)
    x = np.where(w == 0, 0.0, _wide(x))
    axes = other_axes(x, axis)
    total = w.sum(axes)
    mean = (w * x).sum(axes) / np.where(total == 0, 1.0, total)
    m2 = (w * (x - per_channel(mean, x, axis)) ** 2).sum(axes)
    return Moments(total, mean, m2)


def weighted_forward(x, weights, gamma, beta, *, axis, eps, padding):
    """Normalize with the statistics of what has a weight; `padding` says what y is elsewhere."""
    m = weighted_moments(x, weights, axis)
    var = m.m2 / np.where(m.count == 0, 1.0, m.count)
    rstd = np.where(m.count == 0, 0.0, reciprocal_std(var, eps))
    gamma, beta = _gamma_beta(x, gamma, beta, axis)
    y = (_wide(x) - per_channel(m.mean, x, axis)) * per_channel(rstd, x, axis) * gamma + beta
    if padding != "normalize":
        y = np.where(per_position(weights, x, axis) == 0, 0.0 if padding == "zero" else _wide(x), y)
    return Forward(y, m.mean, var, rstd)


def weighted_backward(dy, x, weights, gamma, *, axis, eps, padding):
    """Give dx = gamma rstd (dy - w/W sum(dy) - w/W xhat sum(dy xhat)), sums over what depends on the statistics.

    Where there is no weight, dx is 0 (padding zero), dy (keep) or gamma rstd dy (normalize).
    """
    w = np.broadcast_to(per_position(weights, x, axis), x.shape)
    counts = np.ones(x.shape, bool) if padding == "normalize" else w != 0
    forward = weighted_forward(x, weights, None, None, axis=axis, eps=eps, padding="normalize")
    xhat, g = np.where(counts, forward.y, 0.0), np.where(counts, _wide(dy), 0.0)
    dgamma, dbeta = _sums(g, xhat, axis)
    a = per_channel(forward.rstd, x, axis) * _gamma_beta(x, gamma, None, axis)[0]
    total = w.sum(other_axes(x, axis))
    share = w / per_channel(np.where(total == 0, 1.0, total), x, axis)
    dx = a * (g - share * per_channel(dbeta, x, axis) - share * xhat * per_channel(dgamma, x, axis))
    return Backward(np.where(~counts & (padding == "keep"), _wide(dy), dx), dgamma, dbeta)


def ghosts(samples, ghost_size):
    """Give the slices of consecutive ghosts; the last may be smaller."""
    return [slice(i, min(i + ghost_size, samples)) for i in range(0, samples, ghost_size)]


def ghost_forward(x, gamma, beta, *, ghost_size, axis, eps):
    """Give the Forward of each ghost; their y, put together, is that of the batch."""
    options = {"axis": axis, "eps": eps}
    return [forward(x[part], gamma, beta, **options) for part in ghosts(len(x), ghost_size)]


def ghost_backward(dy, x, gamma, *, ghost_size, axis, eps):
    """Give dx ghost by ghost, and dgamma and dbeta summed over the ghosts, which share gamma and beta."""
    options = {"axis": axis, "eps": eps}
    parts = [backward(dy[part], x[part], gamma, **options) for part in ghosts(len(x), ghost_size)]
    return Backward(np.concatenate([p.dx for p in parts]), sum(p.dgamma for p in parts), sum(p.dbeta for p in parts))


class Composed(NamedTuple):
    """A combination of options as the composition of its steps, for arrays (N, C, L) of float64 or complex128.

    weights : (N, L). sets : row slices, or indices of (N, C, L), each with statistics of its own. about_zero : whether
    these are taken about 0; alpha : (C,) or None, about what share of the mean. given : (mean, var) or None. r, d : (C,) of each
    set, or None. passes : where ReLU lets through, or None to tell it from s; relu : whether it follows. width :
    channels that share statistics, neighbours where they are not strided.
    """

    weights: object
    padding: str
    sets: list
    eps: float
    given: object = None
    r: object = None
    d: object = None
    relu: bool = False
    passes: object = None
    width: int = 1
    about_zero: bool = False
    alpha: object = None
    strided: bool = False

    @property
    def counted(self):
        """Where y comes from the formula, (N, 1, L)."""
        return np.ones_like(self.weights[:, None], bool) if self.padding == "normalize" else self.weights[:, None] > 0

    def statistics(self, x):
        """Give count, mean and var of each set, (S, C)."""
        if self.given is not None:
            return [(None, *self.given)]
        of_sets = []
        for at in self.sets:
            w, values = np.broadcast_to(self.weights[:, None], x.shape)[at], x[at]
            w = w[:, :1]
            count = w.sum() * self.width
            mean = self._of_group((w * values).sum((0, 2))) / (count or 1)
            var = self._of_group((w * (values - mean[:, None]) ** 2).sum((0, 2))) / (count or 1)
            of_sets.append((count, mean, var))
        return of_sets

    def _of_group(self, sums):
        """Give each channel the sum over those that share statistics with it."""
        if self.strided:
            return np.tile(sums.reshape(self.width, -1).sum(0), self.width)
        return np.repeat(sums.reshape(-1, self.width).sum(1), self.width)

    def __call__(self, x, gamma, beta, residual):
        """Give s, before ReLU and padding, and y."""
        s = np.zeros(x.shape, np.result_type(x, gamma, beta, residual))
        for k, (rows, (count, mean, var)) in enumerate(zip(self.sets, self.statistics(x), strict=True)):
            if self.about_zero or self.alpha is not None:
                alpha = 0 if self.alpha is None else self.alpha
                mean, var = alpha * mean, var + ((1 - alpha) * mean) ** 2
            rstd = 1 / np.sqrt(var + self.eps)
            rstd = np.zeros_like(rstd) if count == 0 else rstd
            xhat = (x[rows] - mean[:, None]) * rstd[:, None]
            if self.r is not None:
                xhat = xhat * self.r[k][:, None] + self.d[k][:, None]
            s[rows] = xhat * gamma[:, None] + beta[:, None]
        s = s + residual
        passes = s.real > 0 if self.passes is None else self.passes
        y = np.where(passes, s, 0) if self.relu else s
        return s, np.where(self.counted, y, x if self.padding == "keep" else 0)


class Second(NamedTuple):
    ddy: object
    dx: object
    dgamma: object


def _mean(values, axis):
    """Mean of each channel, to broadcast."""
    axes = other_axes(values, axis)
    return values.sum(axes, keepdims=True) / max(math.prod(values.shape[i] for i in axes), 1)


def _zero_if_none(values, x, axis):
    return per_channel(np.zeros(x.shape[axis]) if values is None else _wide(np.asarray(values)), x, axis)


def jvp(x_dot, x, gamma, *, axis, eps, gamma_dot=None, beta_dot=None):
    """Give y' = gamma * rstd * (x' - mean(x') - xhat * mean(x' * xhat)) + gamma' * xhat + beta'."""
    x_dot, stats = _wide(x_dot), forward(x, None, None, axis=axis, eps=eps)
    a = per_channel(stats.rstd, x, axis) * _gamma_beta(x, gamma, None, axis)[0]
    along = x_dot - _mean(x_dot, axis) - stats.y * _mean(x_dot * stats.y, axis)
    return a * along + _zero_if_none(gamma_dot, x, axis) * stats.y + _zero_if_none(beta_dot, x, axis)


def normalize_jvp(x_dot, x, mean, var, gamma, *, axis, eps, mean_dot, var_dot, gamma_dot, beta_dot):
    """Give y' = gamma * rstd * (x' - mean' - xhat * rstd * var' / 2) + gamma' * xhat + beta'."""
    xhat = normalize(x, mean, var, None, None, axis=axis, eps=eps)
    rstd = per_channel(reciprocal_std(var, eps), x, axis)
    mean_dot, var_dot, gamma_dot, beta_dot = (
        _zero_if_none(v, x, axis) for v in (mean_dot, var_dot, gamma_dot, beta_dot)
    )
    along = _wide(x_dot) - mean_dot - xhat * rstd * var_dot / 2
    return _gamma_beta(x, gamma, None, axis)[0] * rstd * along + gamma_dot * xhat + beta_dot


def double_backward(v, dy, x, gamma, *, axis, eps, v_dgamma=None, v_dbeta=None):
    """Give the gradients of sum(v * dx) + sum(v_dgamma * dgamma) + sum(v_dbeta * dbeta) of `backward`."""
    stats = forward(x, None, None, axis=axis, eps=eps)
    xhat, s = stats.y, per_channel(stats.rstd, x, axis)
    scale, w = _gamma_beta(x, gamma, None, axis)[0] * s, _zero_if_none(v_dgamma, x, axis)
    v0, g0 = _wide(v) - _mean(_wide(v), axis), _wide(dy) - _mean(_wide(dy), axis)
    a, b, c = _mean(v0 * xhat, axis), _mean(g0 * xhat, axis), _mean(v0 * g0, axis)
    ddy = jvp(v, x, gamma, axis=axis, eps=eps, gamma_dot=v_dgamma, beta_dot=v_dbeta)
    dx = w * s * (g0 - b * xhat) - scale * s * (b * v0 + a * g0 + (c - 3 * a * b) * xhat)
    count = math.prod(x.shape[i] for i in other_axes(x, axis))
    return Second(ddy, dx, (s * count * (c - a * b)).reshape(-1))


def jvp_scale(x_dot, x, gamma, *, axis, eps, gamma_dot=None, beta_dot=None):
    """Give the sum of the absolute terms of `jvp`, means being those of absolute values."""
    x_dot, stats = np.abs(_wide(x_dot)), forward(x, None, None, axis=axis, eps=eps)
    xhat = np.abs(stats.y)
    a = np.abs(per_channel(stats.rstd, x, axis) * _gamma_beta(x, gamma, None, axis)[0])
    turn, lift = (np.abs(_zero_if_none(t, x, axis)) for t in (gamma_dot, beta_dot))
    return a * (x_dot + _mean(x_dot, axis) + xhat * _mean(x_dot * xhat, axis)) + turn * xhat + lift


def second_scales(v, dy, x, gamma, *, axis, eps, v_dgamma=None, v_dbeta=None):
    """Give the sums of the absolute terms of `double_backward`, means being those of absolute values."""
    stats = forward(x, None, None, axis=axis, eps=eps)
    xhat, s = np.abs(stats.y), per_channel(stats.rstd, x, axis)
    scale, w = np.abs(_gamma_beta(x, gamma, None, axis)[0]) * s, np.abs(_zero_if_none(v_dgamma, x, axis))
    v0, g0 = (np.abs(_wide(t)) + _mean(np.abs(_wide(t)), axis) for t in (v, dy))
    a, b, c = _mean(v0 * xhat, axis), _mean(g0 * xhat, axis), _mean(v0 * g0, axis)
    ddy = jvp_scale(v, x, gamma, axis=axis, eps=eps, gamma_dot=v_dgamma, beta_dot=v_dbeta)
    dx = w * s * (g0 + b * xhat) + scale * s * (b * v0 + a * g0 + (c + 3 * a * b) * xhat)
    count = math.prod(x.shape[i] for i in other_axes(x, axis))
    return Second(ddy, dx, (s * count * (c + a * b)).reshape(-1))


def extended(formula, *arrays, **options):
    """Give the Exact of a formula, or of each field of its result, computed in long double."""

    def widened(value):
        return value.astype(np.longdouble) if isinstance(value, np.ndarray) else value

    result = formula(*map(widened, arrays), **{name: widened(value) for name, value in options.items()})

    def split(value):
        high = value.astype(np.float64)
        return Exact(high, (value - high).astype(np.float64))

    return split(result) if isinstance(result, np.ndarray) else type(result)(*map(split, result))


def renorm_correction(x, running_mean, running_var, *, r_min, r_max, d_max, axis, eps):
    """Give r = clip(sigma_B / sigma) and d = clip((mean_B - running_mean) / sigma); eps is inside both roots."""
    stats = forward(x, None, None, axis=axis, eps=eps)
    sigma = np.sqrt(running_var + eps)
    r = np.clip(np.sqrt(stats.var + eps) / sigma, r_min, r_max)
    return r, np.clip((stats.mean - running_mean) / sigma, -d_max, d_max)


def renorm_forward(x, r, d, gamma, beta, *, axis, eps):
    """Give y = (xhat * r + d) * gamma + beta; r and d are constants."""
    gamma, beta = _gamma_beta(x, gamma, beta, axis)
    xhat = forward(x, None, None, axis=axis, eps=eps).y
    return (xhat * per_channel(r, x, axis) + per_channel(d, x, axis)) * gamma + beta


def running_update(running, batch, update_rate):
    """Give running = (1 - update_rate) * running + update_rate * batch."""
    return (1.0 - update_rate) * running + update_rate * batch


# ---- values known better than a float64 --------------------------------------------------------------------


class Exact(NamedTuple):
    """A value known to about 2^-106 of itself: the nearest float64, and the float64 nearest to what is left."""

    high: np.ndarray
    low: np.ndarray

    def distance(self, got):
        """Give |got - value|, rounded once or twice in float64. Equal infinities are at distance 0."""
        got = np.asarray(got, np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            return np.where(got == self.high, np.abs(self.low), np.abs((got - self.high) - self.low))

    def moveaxis(self, source, destination):
        return Exact(np.moveaxis(self.high, source, destination), np.moveaxis(self.low, source, destination))


def ulp(values, dtype, stored=None):
    """Give the distance between neighbouring floats of `dtype` at `values`, with the exponent range of `stored`.

    Statistics of float32 data are judged in float32 ulps but live in float64: var of 1e30 does not overflow.
    """
    info, least = np.finfo(dtype), float(np.finfo(stored or dtype).smallest_subnormal)
    exponent = np.frexp(np.abs(np.asarray(values, np.float64)))[1]
    return np.maximum(np.ldexp(1.0, exponent - 1 - info.nmant), least)


# ---- exact integers ----------------------------------------------------------------------------------------

_ROOT_BITS = 320


def _to_integers(values):
    """Find integers m and one exponent k with values == m * 2^k, exactly."""
    values = np.asarray(values, np.float64).ravel()
    assert np.isfinite(values).all(), "the exact oracle takes finite values"
    fraction, exponent = np.frexp(values)
    mantissa = (fraction * 2.0**53).astype(np.int64).tolist()
    exponent = (exponent.astype(np.int64) - 53).tolist()
    k = min((e for m, e in zip(mantissa, exponent, strict=True) if m), default=0)
    return [m << (e - k) if m else 0 for m, e in zip(mantissa, exponent, strict=True)], k


def _divide(numerator, denominator):
    try:
        return numerator / denominator  # correctly rounded for integers of any size
    except OverflowError:
        return math.inf if numerator > 0 else -math.inf


def _to_exact(numerators, denominator, exponent):
    """Give the Exact of numerators * 2^exponent / denominator, denominator > 0."""
    up, denominator = max(exponent, 0), denominator << max(-exponent, 0)
    high, low = np.zeros(len(numerators)), np.zeros(len(numerators))
    for i, numerator in enumerate(numerators):
        numerator <<= up
        high[i] = nearest = _divide(numerator, denominator)
        if math.isfinite(nearest):
            p, q = nearest.as_integer_ratio()
            low[i] = _divide(numerator * q - p * denominator, denominator * q)
    return Exact(high, low)


def _reciprocal_root(value):
    """Find integers r, h with 1 / sqrt(value) = r * 2^-h to 320 bits; 0 for value 0."""
    if value == 0:
        return 0, 0
    p, q = value.numerator, value.denominator
    shift = 2 * _ROOT_BITS - (q.bit_length() - p.bit_length())
    shift += shift % 2
    square = (q << shift) // p if shift >= 0 else q // (p << -shift)
    return math.isqrt(square), shift // 2


class _Channel:
    """One channel in integers: x - mean = deviation * 2^k / count, var a Fraction, rstd = root * 2^-root_shift."""

    def __init__(self, x, eps, mean, var):
        if mean is None:
            integers, self.k = _to_integers(x)
            self.count = max(len(integers), 1)
            total = sum(integers)
            self.mean = _to_exact([total], self.count, self.k)
            self.deviation = [self.count * m - total for m in integers]
            square = sum(d * d for d in self.deviation)
            self.var = Fraction(square, self.count**3) * Fraction(2) ** (2 * self.k)
        else:
            (*integers, center), self.k = _to_integers([*np.asarray(x, np.float64).ravel(), float(mean)])
            self.count = 1
            self.mean = _to_exact([center], 1, self.k)
            self.deviation = [m - center for m in integers]
            self.var = Fraction(float(var))
        self.total = self.var + Fraction(float(eps))
        self.root, self.root_shift = _reciprocal_root(self.total)

    def statistics(self):
        var = _to_exact([self.var.numerator], self.var.denominator, 0)
        return self.mean, var, _to_exact([self.root], 1, -self.root_shift)

    def y(self, gamma, beta):
        ((g,), g_k), ((b,), b_k) = _to_integers([gamma]), _to_integers([beta])
        scale_k = g_k + self.k - self.root_shift
        k = min(scale_k, b_k)
        scale, shift = (g * self.root) << (scale_k - k), (self.count * b) << (b_k - k)
        return _to_exact([scale * d + shift for d in self.deviation], self.count, k)

    def dgamma_dbeta(self, dy):
        integers, k = _to_integers(dy)
        along_x = sum(m * d for m, d in zip(integers, self.deviation, strict=True))
        dgamma = _to_exact([along_x * self.root], self.count, k + self.k - self.root_shift)
        return dgamma, _to_exact([sum(integers)], 1, k)

    def dx(self, dy, gamma, frozen):
        integers, k = _to_integers(dy)
        ((g,), g_k) = _to_integers([gamma])
        scale, scale_k = g * self.root, g_k - self.root_shift + k
        if frozen or self.total == 0:
            return _to_exact([scale * m for m in integers], 1, scale_k)
        # dy - mean(dy) - deviation * sum(dy * deviation) * 2^2k / (count^3 * (var + eps)), over one denominator
        n, total = self.count, sum(integers)
        along_x = sum(m * d for m, d in zip(integers, self.deviation, strict=True))
        inverse = Fraction(2) ** (2 * self.k) / self.total
        p, q = inverse.denominator * n * n, along_x * inverse.numerator
        terms = [(n * m - total) * p - d * q for m, d in zip(integers, self.deviation, strict=True)]
        return _to_exact([scale * t for t in terms], n * p, scale_k)


def _rows(x, axis):
    """View x as (C, values of a channel), in index order."""
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], math.prod(x.shape[i] for i in other_axes(x, axis)))


def _stack(channels, like, axis):
    """Put the rows of _rows back in the shape of `like`."""
    shape = np.moveaxis(like, axis, 0).shape
    parts = [np.array([getattr(c, name) for c in channels]).reshape(shape) for name in ("high", "low")]
    return Exact(*(np.moveaxis(part, 0, axis) for part in parts))


def _concatenate(values):
    return Exact(*(np.array([getattr(v, name)[0] for v in values]) for name in ("high", "low")))


def _each(values, channels, default):
    return [default] * channels if values is None else np.asarray(values, np.float64).tolist()


def _channels(x, axis, eps, mean, var):
    rows = _rows(x, axis)
    means, variances = _each(mean, len(rows), None), _each(var, len(rows), None)
    return [_Channel(r, eps, m, v) for r, m, v in zip(rows, means, variances, strict=True)]


def exact_forward(x, gamma=None, beta=None, *, axis, eps, mean=None, var=None):
    """Give a Forward of Exact; with mean and var given it is inference, else training."""
    channels = _channels(x, axis, eps, mean, var)
    gammas, betas = _each(gamma, len(channels), 1.0), _each(beta, len(channels), 0.0)
    y = _stack([c.y(g, b) for c, g, b in zip(channels, gammas, betas, strict=True)], x, axis)
    statistics = [c.statistics() for c in channels]
    return Forward(y, *(_concatenate([s[i] for s in statistics]) for i in range(3)))


def exact_backward(dy, x, gamma=None, *, axis, eps, mean=None, var=None):
    """Give a Backward of Exact; with mean and var given the statistics are constants."""
    channels, rows = _channels(x, axis, eps, mean, var), _rows(dy, axis)
    gammas = _each(gamma, len(channels), 1.0)
    dx = [c.dx(r, g, mean is not None) for c, r, g in zip(channels, rows, gammas, strict=True)]
    sums = [c.dgamma_dbeta(r) for c, r in zip(channels, rows, strict=True)]
    return Backward(_stack(dx, x, axis), *(_concatenate([s[i] for s in sums]) for i in range(2)))


def exact_weighted_moments(x, weights, *, axis):
    """Give (mean, var) as Exact, of every channel: mean = sum(w x) / W, var = sum(w (x - mean)^2) / W, W = sum(w)."""
    w = [Fraction(value) for value in np.asarray(weights, np.float64).ravel().tolist()]
    total, means, variances = sum(w), [], []
    for row in _rows(x, axis).astype(np.float64):
        values = [Fraction(value) for value in row.tolist()]
        mean = sum(a * b for a, b in zip(w, values, strict=True)) / total
        var = sum(a * (b - mean) ** 2 for a, b in zip(w, values, strict=True)) / total
        means.append(_to_exact([mean.numerator], mean.denominator, 0))
        variances.append(_to_exact([var.numerator], var.denominator, 0))
    return _concatenate(means), _concatenate(variances)


# ---- correctly rounded sums --------------------------------------------------------------------------------


def _fsum(values):
    return math.fsum(values.ravel().tolist())


def _fsum_channel(row, eps):
    """Give mean as high and low part, var, rstd and x - mean of one channel."""
    row = row.astype(np.float64)
    first = _fsum(row) / row.size
    deviation = row - first
    rest = _fsum(deviation) / row.size
    mean = first + rest
    deviation -= rest
    var = _fsum(deviation * deviation) / row.size
    return (
        Exact(np.array([mean]), np.array([rest - (mean - first)])),
        var,
        reciprocal_std(var, eps),
        deviation,
    )


def _known(values):
    values = np.asarray(values, np.float64)
    return Exact(values, np.zeros_like(values))


def fsum_forward(x, gamma=None, beta=None, *, axis, eps):
    """Do what exact_forward does for large float32 tensors."""
    rows = _rows(x, axis)
    gammas, betas = _each(gamma, len(rows), 1.0), _each(beta, len(rows), 0.0)
    parts = [_fsum_channel(row, eps) for row in rows]
    y = [_known(p[3] * p[2] * g + b) for p, g, b in zip(parts, gammas, betas, strict=True)]
    mean = _concatenate([p[0] for p in parts])
    return Forward(_stack(y, x, axis), mean, _known([p[1] for p in parts]), _known([p[2] for p in parts]))


def fsum_backward(dy, x, gamma=None, *, axis, eps):
    """Do what exact_backward does for large float32 tensors."""
    rows = _rows(dy, axis).astype(np.float64)
    dx, sums = [], []
    for row, x_row, g in zip(rows, _rows(x, axis), _each(gamma, len(rows), 1.0), strict=True):
        _, _, rstd, deviation = _fsum_channel(x_row, eps)
        xhat = deviation * rstd
        dgamma, dbeta = _fsum(row * xhat), _fsum(row)
        dx.append(_known(g * rstd * ((row - dbeta / row.size) - xhat * (dgamma / row.size))))
        sums.append((dgamma, dbeta))
    return Backward(_stack(dx, x, axis), _known([s[0] for s in sums]), _known([s[1] for s in sums]))


# ---- what errors are measured against ----------------------------------------------------------------------


class Scales(NamedTuple):
    """The sums of absolute terms that tolerances.py multiplies by u, in float64."""

    y: np.ndarray  # max |y - beta| of the channel, broadcast to x
    y_at: np.ndarray  # max(|y|, |beta|), elementwise: what the last two roundings act on


class GradientScales(NamedTuple):
    # |a dy| + |a mean(dy)| + |a xhat mean(dy xhat)|, a = gamma * rstd, elementwise. For float64 the two means are
    # those of |dy| and |dy xhat|: their own terms are rounded too, with nothing wider to hold them.
    dx: np.ndarray
    dgamma: np.ndarray  # sum |dy xhat|, (C,)
    dbeta: np.ndarray  # sum |dy|, (C,)


def _xhat(x, exact, axis):
    mean, low = per_channel(exact.mean.high, x, axis), per_channel(exact.mean.low, x, axis)
    return ((x.astype(np.float64) - mean) - low) * per_channel(exact.rstd.high, x, axis)


def forward_scales(x, gamma, beta, exact, *, axis):
    gamma, beta = _gamma_beta(x, gamma, beta, axis)
    before_beta = np.abs(_xhat(x, exact, axis) * gamma)
    largest = before_beta.max(other_axes(x, axis), initial=0.0, keepdims=True)
    return Scales(np.broadcast_to(largest, x.shape), np.maximum(np.abs(exact.y.high), np.abs(beta)))


def backward_scales(dy, x, gamma, exact, gradients, *, axis, frozen=False):
    dy, xhat = dy.astype(np.float64), _xhat(x, exact, axis)
    a = per_channel(exact.rstd.high, x, axis) * _gamma_beta(x, gamma, None, axis)[0]
    dgamma, dbeta = _sums(np.abs(dy), np.abs(xhat), axis)
    dx = np.abs(a * dy)
    if not frozen:
        along_x, total = (dgamma, dbeta) if x.dtype == np.float64 else (gradients.dgamma.high, gradients.dbeta.high)
        count = max(math.prod(x.shape[i] for i in other_axes(x, axis)), 1)
        dx = dx + np.abs(a * per_channel(total / count, x, axis))
        dx = dx + np.abs(a * xhat * per_channel(along_x / count, x, axis))
    return GradientScales(dx, dgamma, dbeta)
