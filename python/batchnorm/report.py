"""What a layer's state says about its health: findings, each by a threshold that carries its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from batchnorm import _validate
from batchnorm._arrays import Array, PerChannel
from batchnorm._validate import WeightsAre
from batchnorm.moments import Moments

if TYPE_CHECKING:
    from batchnorm.layers.layer import State
    from batchnorm.layers.settings import BatchSettings
    from batchnorm.layers.statistics import Statistics

__all__ = ["Finding", "Report"]

Flags = NDArray[np.bool_]

_FLOAT16_MAX = 65504.0
_FLOAT16_NORMAL = 2.0**-14  # below it float16 loses digits: one for each halving

# A channel of less than a thousandth of the median abs(gamma) carries a millionth of a usual channel's power.
_DEAD_GAMMA = 1e-3
# After ReLU: of normal values, 1 in 30,000 lies more than 4 standard deviations above the mean.
_DEAD_SIGMAS = 4.0

# Chance puts a channel 5 standard errors away once in 1.7 million: hardly ever, even among 10,000 channels.
_DRIFT_ERRORS = 5.0
# And it must matter. Neighbours in an image or a sequence are alike, which makes real standard errors several times
# the computed ones; only half a standard deviation, or a factor of 2 in variance, is seen in the output as well.
_DRIFT_MEAN = 0.5
_DRIFT_VAR = 2.0

# A variance of N values has a relative standard error of sqrt(2/N): 10 % at 200, which is 5 % of the output.
_ENOUGH_VALUES = 200.0
# A quarter of the values: twice the standard errors, at the same share in the running statistics.
_SMALL_BATCH = 0.25

_SHOWN = 8  # channels that a text lists
_ERRORS = ("nonfinite", "negative_variance")  # what evaluation fails by; the others are warnings


@dataclass(frozen=True)
class Finding:
    """One thing that is, or may go, wrong in a layer.

    Attributes
    ----------
    kind : one of those that `Report` names.
    severity : "error" where evaluation gives NaN, infinity or an exception; else "warning".
    channels : tuple of int, the channels concerned; () where it concerns them all.
    domain : int, or None where the layer has no domains or the finding is about gamma and beta.
    text : str, a sentence with the figures.
    """

    kind: str
    severity: str
    channels: tuple[int, ...]
    domain: int | None
    text: str

    __repr__ = _validate.summary


@dataclass(frozen=True)
class Report:
    """What ``layer.report()`` found; empty, and false, for a healthy layer.

    Of layers without running statistics: nonfinite, dead and dead_relu.

    ======================  ========================================================================================
    kind                    found where
    ======================  ========================================================================================
    nonfinite               gamma, beta or a running statistic is infinite or NaN
    nonfinite_batch         the last batch's mean or variance is
    untrained               the layer evaluates, or is frozen, by the zeros and ones that statistics start as
    negative_variance       running variance < 0
    vanishing_variance      running variance <= eps: eps decides the scale, and y has at most 1/√2 of its usual spread
    float16                 in float16, a running statistic, the folded scale gamma·rstd or the folded offset
                            beta - mean·gamma·rstd would be infinite, or the scale subnormal
    dead                    gamma is 0, or less than a thousandth of the median abs(gamma)
    dead_relu               beta + 4·abs(gamma) < 0: a ReLU behind it passes less than 1 value in 30,000
    mean_drift              the last batch's mean is 5 standard errors and half a standard deviation from the running
    variance_drift          its variance is 5 standard errors and a factor of 2 from the running one
    few_values              the running variance averages fewer than 200 values: its standard error is above 10 %
    small_batch             the last x had less than a quarter of the values of an earlier one
    ======================  ========================================================================================

    Standard errors are those of independent normal values; weights that are no counts are worth sum(w)²/sum(w²) values.
    With the update rate r and n values a channel, the running variance averages n·(2 - r)/r values, as far as there
    have been as many.

    `findings` is a tuple of Finding. ``len``, ``for`` and ``bool`` work on them; ``str`` gives them a line each.

    >>> from batchnorm import BatchNorm
    >>> layer = BatchNorm(3)
    >>> layer.gamma[1] = 0
    >>> print(layer.report())
    warning dead: gamma is 0 or below 0.001 of the median abs(gamma), 0.0 at the least, in channel 1
    >>> [(finding.kind, finding.channels) for finding in layer.report()]
    [('dead', (1,))]
    """

    findings: tuple[Finding, ...]

    def __len__(self) -> int:
        return len(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __repr__(self) -> str:
        kinds = ", ".join(f.kind for f in self.findings)
        return f"<Report: {kinds or 'nothing found'}>"

    def __str__(self) -> str:
        return "\n".join(f"{f.severity} {f.kind}: {f.text}" for f in self.findings) or "nothing found"


def parameter_findings(gamma: Array | None, beta: Array | None, alpha: Array | None) -> tuple[Finding, ...]:
    """Find what is wrong in a layer that learns of no batches."""
    shape = next((a.shape for a in (gamma, beta) if a is not None), (0,))
    scale = np.ones(shape) if gamma is None else gamma.astype(np.float64)
    shift = np.zeros(shape) if beta is None else beta.astype(np.float64)
    found = [_finding(None, *one) for one in _of_parameters(scale.ravel(), shift.ravel())]
    if alpha is not None:
        found.append(_finding(None, "nonfinite", "alpha is not finite", ~np.isfinite(alpha)))
    return tuple(f for f in found if f is not None)


_Found = tuple[str, str, Flags | None]  # kind, text, and the channels; None where it concerns them all


@np.errstate(all="ignore")  # what leaves float64 is beyond every threshold
def findings(state: State, settings: BatchSettings, seen: Moments | None, *, evaluates: bool) -> tuple[Finding, ...]:
    """Find what is wrong in a layer, of whose last batch `seen` are the moments; `evaluates`: by running statistics."""
    gamma, beta = state.gamma, state.beta
    scale = np.ones(settings.channels) if gamma is None else gamma.astype(np.float64)
    shift = np.zeros(settings.channels) if beta is None else beta.astype(np.float64)
    found = [_finding(None, *one) for one in _of_parameters(scale, shift)]
    for k, s in enumerate(state.statistics):
        domain = None if settings.domains is None else k
        found += [_finding(domain, *one) for one in _of_statistics(s, scale, shift, settings.eps, evaluates)]
        if seen is not None and state.batch[0] == k:
            found += [_finding(domain, *one) for one in _of_batch(seen, s, settings)]
            if state.batch[2] < _SMALL_BATCH * state.largest_size:
                text = f"the last x had {state.batch[2]} values, an earlier one {state.largest_size}"
                found.append(_finding(domain, "small_batch", text, None))
    return tuple(f for f in found if f is not None)


def _finding(domain: int | None, kind: str, text: str, where: Flags | None) -> Finding | None:
    """Give a finding about the channels where `where` is true; None where there are none."""
    place = "" if domain is None else f" of domain {domain}"
    severity = "error" if kind in _ERRORS else "warning"
    if where is None:
        return Finding(kind, severity, (), domain, text.format(place=place))
    channels = tuple(np.flatnonzero(where).tolist())
    shown = ", ".join(map(str, channels[:_SHOWN]))
    rest = f" and {len(channels) - _SHOWN} more" if len(channels) > _SHOWN else ""
    plural = "" if len(channels) == 1 else "s"
    text = f"{text} in channel{plural} {shown}{rest}{place}"
    return Finding(kind, severity, channels, domain, text) if channels else None


def _of_parameters(scale: PerChannel, shift: PerChannel) -> Iterator[_Found]:
    """Find what gamma and beta alone tell."""
    for name, values in (("gamma", scale), ("beta", shift)):
        yield "nonfinite", f"{name} is not finite", ~np.isfinite(values)
    size = np.abs(scale)
    finite = size[np.isfinite(size)]
    if finite.size:
        text = f"gamma is 0 or below {_DEAD_GAMMA:g} of the median abs(gamma), {finite.min()} at the least,"
        yield "dead", text, (size == 0) | (size < _DEAD_GAMMA * np.median(finite))
    text = f"beta + {_DEAD_SIGMAS:g}·abs(gamma) < 0: a ReLU would pass nothing"
    yield "dead_relu", text, shift + _DEAD_SIGMAS * size < 0


def _of_statistics(s: Statistics, gamma: PerChannel, beta: PerChannel, eps: float, evaluates: bool) -> Iterator[_Found]:
    """Find what is wrong in one set of running statistics."""
    mean, var = s.mean, s.var
    if evaluates and s.update_count == 0 and mean.size and (mean == 0).all() and (var == 1).all():
        text = "the running statistics{place} have seen no batch: evaluation normalizes by mean 0 and variance 1"
        yield "untrained", text, None
    for name, values in (("running_mean", mean), ("running_var", var)):
        yield "nonfinite", f"{name} is not finite", ~np.isfinite(values)
    yield "negative_variance", "running_var is negative", var < 0
    if s.update_count > 0:
        yield "vanishing_variance", f"running_var is no more than eps = {eps:g}", (var >= 0) & (var <= eps)
    good = np.isfinite(mean) & np.isfinite(var) & (var >= 0)
    total = np.where(good & (var + eps > 0), var + eps, np.inf)  # where it is 0, rstd is 0, as in the functions
    scale = gamma / np.sqrt(total)
    offset = beta - np.where(good, mean, 0.0) * scale
    for name, values in (("running_mean", mean), ("running_var", var), ("scale", scale), ("offset", offset)):
        text = f"{name} is beyond float16's {_FLOAT16_MAX:g}"
        yield "float16", text, good & np.isinf(values.astype(np.float16))
    low = good & (scale != 0) & (np.abs(scale.astype(np.float16)) < _FLOAT16_NORMAL)
    yield "float16", "scale is subnormal in float16", low


def _of_batch(m: Moments, s: Statistics, settings: BatchSettings) -> Iterator[_Found]:
    """Find what the last batch tells beside the running statistics of its domain."""
    mean, var, are = s.mean, s.var, settings.weights_are
    finite = np.isfinite(m.mean) & np.isfinite(m.m2)
    yield "nonfinite_batch", "the last batch's mean or variance is not finite", ~finite
    count = _worth(m, are)
    good = finite & (count >= 2) & np.isfinite(mean) & np.isfinite(var) & (var > 0)
    batch_var = m.var(settings.ddof, weights_are=are or "importance")
    n, ratio = np.where(good, count, 2.0), np.where(good, batch_var, 1.0) / np.where(good, var, 1.0)
    rate = 0.0 if settings.update_rate is None else settings.update_rate
    if rate < 1:
        off = np.where(good, m.mean - mean, 0.0) / np.sqrt(np.where(good, var, 1.0))
        errors = off * np.sqrt(n * (2 - rate) / 2) / (1 - rate)  # the running mean has noise, and took its share
        yield from _drift("mean", errors, np.abs(off) >= _DRIFT_MEAN)
        # Wilson and Hilferty (1931): the cube root of a variance is nearly normal, down to 2 values.
        share = 2 / (9 * (n - 1))
        errors = (np.cbrt(ratio) - (1 - share)) / np.sqrt(share)
        yield from _drift("variance", errors, good & ((ratio >= _DRIFT_VAR) | (ratio <= 1 / _DRIFT_VAR)))
    values = count * s.update_count if s.pooled is None else _worth(s.pooled, are)
    if rate > 0:
        values = np.minimum(values, count * (2 - rate) / rate)
    if s.update_count > 0 and settings.update_rate != 0 and values.size:
        text = f"the running variance averages {values.min():g} values, and should {_ENOUGH_VALUES:g},"
        yield "few_values", text, values < _ENOUGH_VALUES


def _worth(m: Moments, weights_are: WeightsAre | None) -> PerChannel:
    """Give the values that each channel's weights are worth: as many as they count, else sum(w)²/sum(w²)."""
    if m._dof is None or weights_are == "counts":
        return m.count
    return np.where(m.count > 0, m.count / (m.count - m._dof), 0.0)


def _drift(what: str, errors: PerChannel, matters: Flags) -> Iterator[_Found]:
    far = matters & (np.abs(errors) >= _DRIFT_ERRORS)
    if far.any():
        worst = errors[far][np.argmax(np.abs(errors[far]))]
        text = f"the last batch's {what} is {worst:+.3g} standard errors from the running one at the worst,"
        yield f"{what}_drift", text, far
