"""The six claims made for batch norm and, for each, the criterion that decides whether it held.

A criterion is a function of measured numbers alone. It was written before they were seen and has not followed
them since: that a claim does not hold here is a result. Arguments named ``plain`` and ``normalized`` hold one
number per seed, in the same order of seeds. Accuracies are shares from 0 to 1; a number of steps is inf where
none was enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

# A statement "in most seeds" must be true in this share of them.
MOST = 0.8
# Claim 1: the validation accuracy to reach.
TARGET_ACCURACY = 0.95
# Claim 2: a run trains if it ends with at least this validation accuracy.
TRAINED_ACCURACY = 0.9
# Claim 3: the range over the scales, with batch norm, is at most this part of the range without.
RANGE_RATIO = 0.5
# Claim 4: the gaps are compared only between networks that fit the training part this well.
FIT_ACCURACY = 0.99
# Claim 5: how much more accuracy the smallest batch costs with batch norm than without.
SUFFERS_BY = 0.02
# Claim 6: share of test images that get the same digit, and difference in test accuracy.
SAME_DIGIT, ACCURACY_WITHIN = 0.99, 0.005


@dataclass(frozen=True)
class Verdict:
    """Whether a claim held, and the numbers that decided it in a few words."""

    held: bool
    why: str


@dataclass(frozen=True)
class Claim:
    """One claim: ``key`` names its picture and its entry in the JSON, ``criterion`` is in words."""

    key: str
    title: str
    criterion: str


FEWER_STEPS = Claim(
    "fewer_steps",
    f"It reaches {TARGET_ACCURACY:.0%} validation accuracy in fewer steps",
    f"fewer steps than the plain net in at least {MOST:.0%} of the seeds, each net at its own best rate of the sweep",
)
HIGHER_RATES = Claim(
    "higher_rates",
    "It trains at learning rates where the plain net fails",
    f"at some rate above the plain net's best, at least {MOST:.0%} of the seeds train with batch norm and at "
    f"most {1 - MOST:.0%} without (a net trains if it ends with {TRAINED_ACCURACY:.0%} validation accuracy)",
)
INIT_SCALE = Claim(
    "init_scale",
    "It depends less on the scale of the initial weights",
    f"the range of test accuracy over the scales is smaller in at least {MOST:.0%} of the seeds, and its "
    f"median is at most {RANGE_RATIO:g} times the plain net's",
)
REGULARIZES = Claim(
    "regularizes",
    "It regularizes: the gap between training and test accuracy is smaller",
    f"the gap is smaller in at least {MOST:.0%} of the seeds, and both nets reach a median training accuracy "
    f"of {FIT_ACCURACY:.0%}",
)
BATCH_NOISE = Claim(
    "batch_noise",
    "Its noise grows as the batch shrinks, until training suffers",
    f"in at least {MOST:.0%} of the seeds the noise is larger at every smaller batch; and in as many the way "
    f"from the best to the smallest batch costs at least {100 * SUFFERS_BY:g} points more test accuracy than "
    "without batch norm",
)
RUNNING_STATISTICS = Claim(
    "running_statistics",
    "Inference with running statistics agrees with that of the whole training set",
    f"in the median over the seeds at least {SAME_DIGIT:.0%} of the test images get the same digit, and test "
    f"accuracy differs by at most {100 * ACCURACY_WITHIN:g} points",
)
CLAIMS = (FEWER_STEPS, HIGHER_RATES, INIT_SCALE, REGULARIZES, BATCH_NOISE, RUNNING_STATISTICS)


def fewer_steps(plain: Sequence[float], normalized: Sequence[float]) -> Verdict:
    """Judge the steps to the target accuracy. A target that neither reaches is no gain."""
    return _most(b < a for a, b in zip(plain, normalized, strict=True))


def higher_rates(
    rates: Sequence[float], plain: Sequence[float], normalized: Sequence[float], plain_best: float
) -> Verdict:
    """Judge the share of seeds that trained, one for each rate."""
    shares = zip(rates, plain, normalized, strict=True)
    found = [f"{rate:g}" for rate, a, b in shares if rate > plain_best and b >= MOST and a <= 1 - MOST + 1e-9]
    return Verdict(bool(found), f"at rate {', '.join(found)}" if found else "at no rate")


def init_scale(plain: Sequence[float], normalized: Sequence[float]) -> Verdict:
    """Judge the largest minus the smallest test accuracy over the scales of the initial weights."""
    smaller = _most(b < a for a, b in zip(plain, normalized, strict=True))
    ratio = median(normalized) / median(plain) if median(plain) > 0 else math.inf
    return Verdict(smaller.held and ratio <= RANGE_RATIO, f"{smaller.why}; {ratio:.2f} times the range")


def regularizes(
    plain: Sequence[float],
    normalized: Sequence[float],
    plain_fit: Sequence[float],
    normalized_fit: Sequence[float],
) -> Verdict:
    """Judge training minus test accuracy, where the training accuracies allow it."""
    if min(median(plain_fit), median(normalized_fit)) < FIT_ACCURACY:
        return Verdict(False, f"a net fits below {FIT_ACCURACY:.0%}")
    return _most(b < a for a, b in zip(plain, normalized, strict=True))


def batch_noise(
    noise: Sequence[Sequence[float]], plain: Sequence[Sequence[float]], normalized: Sequence[Sequence[float]]
) -> Verdict:
    """Judge, per seed and for rising batch sizes, the noise and the test accuracy after training."""
    grows = _most(bool(n) and all(a > b for a, b in pairwise(n)) for n in noise)
    costs = [(max(b) - b[0]) - (max(a) - a[0]) for a, b in zip(plain, normalized, strict=True)]
    suffers = _most(cost >= SUFFERS_BY - 1e-9 for cost in costs)
    return Verdict(grows.held and suffers.held, f"noise: {grows.why}; suffering: {suffers.why}")


def running_statistics(same_digit: Sequence[float], running: Sequence[float], population: Sequence[float]) -> Verdict:
    """Judge the share of test images with the same digit, and the two test accuracies."""
    same = median(same_digit)
    difference = median(abs(a - b) for a, b in zip(running, population, strict=True))
    held = same >= SAME_DIGIT and difference <= ACCURACY_WITHIN + 1e-9
    return Verdict(held, f"{same:.1%} same; {100 * difference:.1f} points apart")


def _most(statements: Iterable[bool]) -> Verdict:
    answers = [bool(statement) for statement in statements]
    return Verdict(sum(answers) >= MOST * len(answers) - 1e-9, f"{sum(answers)} of {len(answers)} seeds")
