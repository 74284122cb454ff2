"""The digits: 1797 real images of 8x8 pixels that scikit-learn ships, split into three parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# 1024 samples are a whole number of batches of every power of two up to 256. The 256 choose the learning
# rates. The 517 that are left are the test part.
TRAINING, VALIDATION = 1024, 256


class Part(NamedTuple):
    """Images x (N, 8, 8, 1) float32 and their digits (N,) int64."""

    x: NDArray[Any]
    digits: NDArray[Any]


class Split(NamedTuple):
    """Three parts without a common sample: fit on the first, choose on the second, report on the third."""

    training: Part
    validation: Part
    test: Part


def load_digits() -> Part:
    """Return all images in the order in which they are stored, pixels from 0 to 16."""
    from sklearn import datasets

    stored = datasets.load_digits()
    return Part(stored.images[..., None].astype(np.float32), stored.target.astype(np.int64))


def split(digits: Part, seed: int) -> Split:
    """Split at random; shift and scale all pixels by one mean and one deviation, those of the training part.

    One pair of numbers for all pixels keeps the input well scaled for the network without batch norm, and
    leaves the differences between pixels in place.
    """
    order = np.random.default_rng([seed, 0]).permutation(len(digits.x))
    training, validation, test = np.split(order, [TRAINING, TRAINING + VALIDATION])
    pixels = digits.x[training]
    x = (digits.x - pixels.mean()) / pixels.std()
    return Split(*(Part(x[chosen], digits.digits[chosen]) for chosen in (training, validation, test)))
