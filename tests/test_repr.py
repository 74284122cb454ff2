"""What a result shows of itself: in a line or two, whatever its size, with every field by its name."""

import dataclasses

import numpy as np
import pytest

import batchnorm as bn

X = np.random.default_rng(0).normal(size=(32, 16, 8, 8)).astype(np.float32)
GAMMA = np.ones(16, np.float32)
MASK = np.arange(2048).reshape(32, 8, 8) % 3 > 0
STEPS = np.ascontiguousarray(X[..., 0])

LARGE = {
    "Saved": lambda: bn.batch_norm(X, GAMMA)[1],
    "Saved_of_a_mask": lambda: bn.batch_norm(X, GAMMA, mask=MASK)[1],
    "Saved_of_segments": lambda: bn.batch_norm(STEPS, segments=np.arange(32) // 2)[1],
    "SavedRelu": lambda: bn.batch_norm_relu(X, GAMMA)[1],
    "SavedOutput": lambda: bn.batch_norm_inplace(X.copy(), GAMMA)[1],
    "GhostSaved": lambda: bn.ghost_batch_norm(X, GAMMA, ghost_size=2)[1],
    "RenormSaved": lambda: bn.batch_renorm(X, np.zeros(16), np.ones(16), r_max=2, d_max=1)[1],
    "Gradients": lambda: bn.batch_norm_backward(X, bn.batch_norm(X, GAMMA)[1]),
    "ReluGradients": lambda: bn.batch_norm_relu_backward(X, bn.batch_norm_relu(X, residual=X)[1]),
    "SecondGradients": lambda: bn.batch_norm_double_backward(X, X, bn.batch_norm(X, GAMMA)[1]),
    "ReluOutput": lambda: bn.normalize_relu(X, np.zeros(16), np.ones(16), needs_mask=True),
    "ReluMask": lambda: bn.batch_norm_relu(X)[1].mask,
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


@pytest.mark.parametrize(
    "name", [name for name in LARGE if name not in ("GradSums", "Moments", "Report", "BatchNorm")]
)
def test_a_repr_names_every_field(name):
    value = LARGE[name]()
    names = value._fields if isinstance(value, tuple) else [f.name for f in dataclasses.fields(value)]
    for field in names:
        assert f"{field}=" in repr(value)


def test_a_long_array_is_told_by_dtype_and_shape_and_a_short_one_by_its_values():
    y, saved = bn.batch_norm(X, GAMMA)
    assert repr(saved) == (
        "Saved(x=<float32 (32, 16, 8, 8)>, moments=Moments(channels=16, count=2048), gamma=<float32 (16,)>, axis=1, "
        "eps=1e-05, part=None)"
    )
    assert repr(bn.batch_norm_backward(y, saved, needs=("beta",))) == (
        "Gradients(dx=None, dgamma=None, dbeta=<float32 (16,)>)"
    )
    _, saved = bn.batch_norm(np.array([[1.0], [3.0]]))
    assert repr(bn.batch_norm_backward(np.array([[1.0], [3.0]]), saved, needs=("beta",))) == (
        "Gradients(dx=None, dgamma=None, dbeta=array([4.]))"
    )


def test_the_repr_of_a_report_names_what_was_found():
    assert repr(bn.BatchNorm(3).report()) == "<Report: nothing found>"
    assert repr(bn.BatchNorm(3).eval().report()) == "<Report: untrained>"
