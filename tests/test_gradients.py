"""Gradients, second opinions: complex steps of the formula, central differences of the compiled code, torch."""

import numpy as np
import pytest

import batchnorm as bn
import reference
from differences import central_difference, complex_step, each_derivative
from frozen import backward as backward_of_given
from tolerances import assert_within

SHAPE, AXIS, EPS = (3, 4, 5), 1, 1e-2
CHANNELS = SHAPE[AXIS]


def problem():
    """x, gamma, beta, and the weights whose sum with y is the loss: its gradient at y is `weights`."""
    rng = np.random.default_rng(31)
    return (
        rng.normal(1, 2, SHAPE),
        rng.normal(size=CHANNELS),
        rng.normal(size=CHANNELS),
        rng.normal(size=SHAPE),
    )


def frozen_statistics():
    rng = np.random.default_rng(32)
    return rng.normal(size=CHANNELS), rng.uniform(0.5, 2, CHANNELS)


def ours(frozen):
    x, gamma, beta, weights = problem()
    if frozen:
        return backward_of_given(weights, x, *frozen_statistics(), gamma, axis=AXIS, eps=EPS)
    _, saved = bn.batch_norm(x, gamma, beta, axis=AXIS, eps=EPS)
    return bn.backward(weights, saved)


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("position", [0, 1, 2], ids=["dx", "dgamma", "dbeta"])
def test_backward_equals_the_complex_step_of_the_formula(position, frozen):
    x, gamma, beta, weights = problem()

    def loss(x, gamma, beta):
        if frozen:
            y = reference.normalize(x, *frozen_statistics(), gamma, beta, axis=AXIS, eps=EPS)
        else:
            y = reference.forward(x, gamma, beta, axis=AXIS, eps=EPS).y
        return (weights * y).sum()

    expected = each_derivative(loss, (x, gamma, beta), complex_step)[position]
    assert_within("complex step", "float64", ours(frozen)[position], expected, scale=np.abs(expected).max())


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("position", [0, 1, 2], ids=["dx", "dgamma", "dbeta"])
def test_backward_equals_the_central_differences_of_forward(position, frozen):
    x, gamma, beta, weights = problem()

    def loss(x, gamma, beta):
        if frozen:
            y = bn.normalize(x, *frozen_statistics(), gamma, beta, axis=AXIS, eps=EPS)
        else:
            y, _ = bn.batch_norm(x, gamma, beta, axis=AXIS, eps=EPS)
        return (weights * y).sum()

    expected = each_derivative(loss, (x, gamma, beta), central_difference)[position]
    assert_within("central difference", "float64", ours(frozen)[position], expected, scale=np.abs(expected).max())


def test_the_oracles_backward_equals_the_complex_step_of_its_forward():
    x, gamma, beta, weights = problem()

    def loss(x, gamma, beta):
        return (weights * reference.forward(x, gamma, beta, axis=AXIS, eps=EPS).y).sum()

    expected = each_derivative(loss, (x, gamma, beta), complex_step)
    got = reference.exact_backward(weights, x, gamma, axis=AXIS, eps=EPS)
    for value, derivative in zip(got, expected, strict=True):
        assert_within("complex step", "float64", value.high, derivative, scale=np.abs(derivative).max())


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
def test_float64_results_equal_those_of_torch(frozen):
    torch = pytest.importorskip("torch", reason="torch is not installed; it is only a second opinion here")
    x, gamma, beta, weights = problem()
    tx, tgamma, tbeta = (torch.tensor(a, requires_grad=True) for a in (x, gamma, beta))
    mean, var = frozen_statistics()
    statistics = (torch.tensor(mean), torch.tensor(var)) if frozen else (None, None)
    ty = torch.nn.functional.batch_norm(tx, *statistics, tgamma, tbeta, training=not frozen, eps=EPS)
    (ty * torch.tensor(weights)).sum().backward()
    if frozen:
        y = bn.normalize(x, mean, var, gamma, beta, axis=AXIS, eps=EPS)
    else:
        y, _ = bn.batch_norm(x, gamma, beta, axis=AXIS, eps=EPS)
    theirs = [t.detach().numpy() for t in (ty, tx.grad, tgamma.grad, tbeta.grad)]
    for got, expected in zip((y, *ours(frozen)[:3]), theirs, strict=True):
        assert_within("torch", "float64", got, expected, scale=np.abs(expected).max())
