"""A Saved whose fields were replaced by what does not fit: each verb refuses it, and reads nothing of it before."""

import re
from dataclasses import replace

import numpy as np
import pytest

import batchnorm as bn
from batchnorm._passes import ReluMask

X = np.random.default_rng(0).normal(size=(3, 4, 5))
OF_SEGMENTS = bn.batch_norm(X, segments=[0, 0, 1], activation="relu")[1]
OF_MASK = bn.batch_norm(X, mask=np.arange(5)[None] < 3)[1]
NEVER_FALL = "saved.part.offsets must begin with 0, never fall and end with 3, the rows of x"


def with_part(saved, **fields):
    return replace(saved, part=saved.part._replace(**fields))


def with_bits(count):
    return replace(OF_SEGMENTS, relu=ReluMask(OF_SEGMENTS.layout, np.zeros(count, np.uint8)))


BYTES = OF_SEGMENTS.relu.nbytes
REFUSED = [
    (with_part(OF_SEGMENTS, offsets=np.array([0, 9, 1, 3])), ValueError, NEVER_FALL),
    (with_part(OF_SEGMENTS, offsets=np.array([0, 1, 1, 1])), ValueError, NEVER_FALL),
    (with_part(OF_SEGMENTS, offsets=np.array([0.0, 3.0])), ValueError, NEVER_FALL),
    (
        with_part(OF_SEGMENTS, width=0),
        ValueError,
        "saved.part.width must be an int >= 1 that divides 4 channels, got 0",
    ),
    (
        with_part(OF_SEGMENTS, width=2.0),
        ValueError,
        "saved.part.width must be an int >= 1 that divides 4 channels, got 2.0",
    ),
    (
        with_part(OF_SEGMENTS, width=3),
        ValueError,
        "saved.part.width must be an int >= 1 that divides 4 channels, got 3",
    ),
    (
        with_part(OF_MASK, padding="some"),
        ValueError,
        "saved.part.padding must be 'zero', 'keep' or 'normalize', got 'some'",
    ),
    (with_part(OF_MASK, weights=np.ones(3)), ValueError, "saved.part.weights must have shape (15,), got (3,)"),
    (replace(OF_MASK, part="all"), TypeError, "saved.part must be a Part, got str"),
    (replace(OF_MASK, relu=True), TypeError, "saved.relu must be a ReluMask or None, got bool"),
    (replace(OF_MASK, layout="C"), TypeError, "saved.layout must be a Layout or None, got str"),
    (with_bits(0), ValueError, f"saved.relu must have {BYTES} bytes, got 0"),
    (with_bits(3), ValueError, f"saved.relu must have {BYTES} bytes, got 3"),
]
VERBS = {
    "backward": lambda saved: bn.backward(X, saved),
    "jvp": lambda saved: bn.jvp(X, saved),
    "double_backward": lambda saved: bn.double_backward(X, X, saved),
    "grad_sums": lambda saved: bn.grad_sums(X, saved),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
@pytest.mark.parametrize(("saved", "error", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_what_does_not_fit_x_is_refused(saved, error, text, verb):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        verb(saved)
