"""What a result shows of itself: in a line or two, whatever its size, with every field by its name."""

import dataclasses

import numpy as np
import pytest

import batchnorm as bn

X = np.random.default_rng(0).normal(size=(32, 16, 8, 8)).astype(np.float32)
GAMMA = np.ones(16, np.float32)
MASK = np.arange(2048).reshape(32, 8, 8) % 3 > 0
RENORM = bn.Renorm(np.zeros(16), np.ones(16), 2, 1)
STEPS = np.ascontiguousarray(X[..., 0])

LARGE = {
    "Saved": lambda: bn.batch_norm(X, GAMMA)[1],
    "Saved_of_a_mask": lambda: bn.batch_norm(X, GAMMA, mask=MASK)[1],
    "Saved_of_segments": lambda: bn.batch_norm(STEPS, segments=np.arange(32) // 2)[1],
    "Saved_of_relu": lambda: bn.batch_norm(X, GAMMA, activation="relu")[1],
    "Saved_of_y": lambda: bn.batch_norm(X.copy(), GAMMA, keep="y")[1],
    "Saved_of_ghosts": lambda: bn.batch_norm(X, GAMMA, ghost_size=2)[1],
    "Saved_of_renorm": lambda: bn.batch_norm(X, renorm=RENORM)[1],
    "Gradients": lambda: bn.backward(X, bn.batch_norm(X, GAMMA)[1]),
    "Gradients_of_a_residual": lambda: bn.backward(X, bn.batch_norm(X, residual=X, activation="relu")[1]),
    "SecondGradients": lambda: bn.double_backward(X, X, bn.batch_norm(X, GAMMA)[1]),
    "Saved_of_given": lambda: bn.normalize(X, np.zeros(16), np.ones(16), activation="relu", save=True)[1],
    "ReluMask": lambda: bn.batch_norm(X, activation="relu")[1].relu,
    "Renorm": lambda: RENORM,
    "Part": lambda: bn.batch_norm(X, GAMMA, mask=MASK)[1].part,
    "Layout": lambda: bn.batch_norm(X, GAMMA, mask=MASK)[1].layout,
    "GradSums": lambda: bn.grad_sums(X, bn.batch_norm(X)[1]),
    "Moments": lambda: bn.moments(X),
    "Report": lambda: wide_report(),
    "Finding": lambda: next(iter(wide_report())),
    "BatchNorm": lambda: bn.BatchNorm(4096).eval(),
}


def wide_report():
    layer = bn.BatchNorm(4096, nonfinite="propagate")
    layer.gamma[...] = 0
    layer(np.full((4, 4096), np.nan))
    return layer.report()


@pytest.mark.parametrize("name", LARGE)
def test_the_repr_of_a_large_result_is_short(name):
    value = LARGE[name]()
    text = repr(value)
    assert type(value).__name__ in text
    assert len(text) < 400


@pytest.mark.parametrize("name", [name for name in LARGE if name not in ("GradSums", "Moments", "Report", "BatchNorm")])
def test_a_repr_names_every_field_but_defaults(name):
    value = LARGE[name]()
    if isinstance(value, tuple):
        defaults = dict.fromkeys(value._fields, value)  # a tuple shows all
    else:
        defaults = {field.name: field.default for field in dataclasses.fields(value) if field.repr}
    for field, default in defaults.items():
        assert (f"{field}=" in repr(value)) == (getattr(value, field) is not default), field


def test_a_long_array_is_told_by_dtype_and_shape_and_a_short_one_by_its_values():
    y, saved = bn.batch_norm(X, GAMMA)
    assert repr(saved) == (
        "Saved(x=<float32 (32, 16, 8, 8)>, moments=Moments(channels=16, count=2048), gamma=<float32 (16,)>, axis=1, "
        "eps=1e-05)"
    )
    assert repr(bn.backward(y, saved, needs=("beta",))) == (
        "Gradients(dx=None, dgamma=None, dbeta=<float32 (16,)>, dresidual=None)"
    )
    _, saved = bn.batch_norm(np.array([[1.0], [3.0]]))
    assert repr(bn.backward(np.array([[1.0], [3.0]]), saved, needs=("beta",))) == (
        "Gradients(dx=None, dgamma=None, dbeta=array([4.]), dresidual=None)"
    )


def test_the_repr_of_a_report_names_what_was_found():
    assert repr(bn.BatchNorm(3).report()) == "<Report: nothing found>"
    assert repr(bn.BatchNorm(3).eval().report()) == "<Report: untrained>"
