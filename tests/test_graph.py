"""graph_norm and GraphNorm: the formula, its gradients by complex steps, the contract, bits, and what alpha becomes at its ends."""

import copy
import pickle
import re

import numpy as np
import pytest

import adversarial
import batchnorm as bn
from batchnorm import convert
from reference import Exact
from tolerances import assert_within

Wide = np.longdouble
EPS = 1e-5
IDS = np.array([0] * 5 + [1] * 4 + [3] * 3)
rng = np.random.default_rng(0)
X = rng.normal(2, 1, (12, 3))
DY = rng.normal(size=(12, 3))
GAMMA, BETA, ALPHA = rng.normal(size=(3, 3))


def formula(x, gamma, beta, alpha, ids=IDS, eps=EPS):
    """Equation 6, graph by graph, in the type of the arguments, which may be complex."""
    y = np.zeros(np.shape(x), np.result_type(x, gamma, beta, alpha))
    for graph in np.unique(ids):
        nodes = x[ids == graph]
        o = nodes - alpha * nodes.mean(0)
        y[ids == graph] = gamma * o / np.sqrt((o * o).mean(0) + eps) + beta
    return y


def step(function, arguments, tangents):
    """Give the derivative of a function along tangents, by a complex step: exact to a rounding."""
    h = 1e-200
    return function(*(a + 1j * h * np.asarray(t) for a, t in zip(arguments, tangents, strict=True))).imag / h


def saved_of(alpha=ALPHA):
    return bn.graph_norm(X, GAMMA, BETA, alpha, segments=IDS, eps=EPS)


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12 * np.abs(wanted).max())


@pytest.mark.parametrize("alpha", [ALPHA, np.zeros(3), np.ones(3), np.full(3, 0.5)], ids=["any", "0", "1", "half"])
def test_y_and_its_derivatives_are_those_of_the_formula(alpha):
    arguments = X, GAMMA, BETA, alpha
    y, saved = saved_of(alpha)
    close(y, formula(*arguments))
    got = bn.backward(DY, saved)
    for k, gradient in enumerate((got.dx, got.dgamma, got.dbeta, got.dalpha)):
        wanted = np.zeros(gradient.shape)
        for at in np.ndindex(gradient.shape):
            tangents = [np.zeros(a.shape) for a in arguments]
            tangents[k][at] = 1
            wanted[at] = (DY * step(formula, arguments, tangents)).sum()
        close(gradient, wanted)
    tangents = [np.random.default_rng(k).normal(size=a.shape) for k, a in enumerate(arguments)]
    of_x, of_gamma, of_beta, of_alpha = tangents
    given = bn.jvp(of_x, saved, gamma_dot=of_gamma, beta_dot=of_beta, alpha_dot=of_alpha)
    close(given, step(formula, arguments, tangents))


def test_second_gradients_are_those_of_the_gradients():
    _, saved = saved_of()
    v, (v_gamma, v_beta, v_alpha) = rng.normal(size=(12, 3)), rng.normal(size=(3, 3))
    second = bn.double_backward(v, DY, saved, v_dgamma=v_gamma, v_dbeta=v_beta, v_dalpha=v_alpha)
    of_dy = step(formula, (X, GAMMA, BETA, ALPHA), (v, v_gamma, v_beta, v_alpha))
    close(second.ddy, of_dy)

    def inner(x, gamma, alpha):
        """Give <v, gradients> from gradients that the package has, at other arguments: differences of it are compared."""
        of = bn.graph_norm(x, gamma, BETA, alpha, segments=IDS, eps=EPS)[1]
        got = bn.backward(DY, of)
        of_channels = (v_gamma, got.dgamma), (v_beta, got.dbeta), (v_alpha, got.dalpha)
        return (v * got.dx).sum() + sum((a * b).sum() for a, b in of_channels)

    h, arguments = 1e-5, (X, GAMMA, ALPHA)
    for k, gradient in enumerate((second.dx, second.dgamma, second.dalpha)):
        along = rng.normal(size=gradient.shape)
        moved = [[a + s * h * along if i == k else a for i, a in enumerate(arguments)] for s in (-2, -1, 1, 2)]
        ends = [inner(*at) for at in moved]
        slope = (8 * (ends[2] - ends[1]) - (ends[3] - ends[0])) / (12 * h)  # of fourth order
        assert abs((gradient * along).sum() - slope) <= 1e-8 * (1 + abs(slope))


def test_with_alpha_1_it_is_batch_norm_of_segments():
    y, saved = saved_of(np.ones(3))
    expected, of_batch = bn.batch_norm(X, GAMMA, BETA, segments=IDS, eps=EPS)
    assert saved.moments == of_batch.moments
    close(y, expected)
    close(bn.backward(DY, saved).dx, bn.backward(DY, of_batch).dx)
    assert bn.graph_norm(X, GAMMA, BETA, segments=IDS, eps=EPS)[0].tobytes() == y.tobytes()


def test_without_segments_all_rows_are_one_graph():
    y, _ = bn.graph_norm(X, GAMMA, BETA, ALPHA, eps=EPS)
    assert y.tobytes() == bn.graph_norm(X, GAMMA, BETA, ALPHA, segments=np.zeros(12, int), eps=EPS)[0].tobytes()
    close(y, formula(X, GAMMA, BETA, ALPHA, np.zeros(12, int)))


def test_one_node_keeps_what_alpha_leaves_of_it():
    y, saved = bn.graph_norm(np.array([[3.0, -4.0, 0.0]]), alpha=[0.5, 1.0, 0.5], eps=0.0)
    assert y.tolist() == [[1, 0, 0]]
    assert saved.rstd.tolist() == [1 / 1.5, 0, 0]


CASES = [case for case in adversarial.CASES if not case[0].startswith("dy_")]


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=["-".join(case) for case in CASES])
def test_y_keeps_the_contract(name, dtype, alpha):
    case = adversarial.make(name, dtype)
    channels = case.x.shape[1]
    ids = np.arange(len(case.x)) // 2
    gamma, beta = (np.random.default_rng(5).normal(size=channels).astype(dtype) for _ in range(2))
    y, _ = bn.graph_norm(case.x, gamma, beta, np.full(channels, alpha), segments=ids, eps=case.eps)
    for graph in np.unique(ids):
        nodes = np.moveaxis(case.x[ids == graph], 1, -1)
        shape = nodes.shape
        nodes = nodes.reshape(-1, channels).astype(Wide)
        # The mean of what is left after the first value: its rounding is one of the spread, not of the values.
        apart = nodes - nodes[0]
        mean = apart.mean(0)
        o = (apart - mean) + (1 - Wide(alpha)) * (nodes[0] + mean)
        total = (o * o).mean(0) + Wide(case.eps)
        wanted = np.where(total == 0, 0, o / np.sqrt(np.where(total == 0, 1, total))) * gamma
        got = np.moveaxis(y[ids == graph], 1, -1)
        exact, scale = (wanted + beta).reshape(shape), np.abs(wanted).max(0)
        at = np.maximum(np.abs(exact), np.abs(beta)).astype(np.float64)
        high = exact.astype(np.float64)
        low = np.where(np.isfinite(high), exact - high, 0).astype(np.float64)
        scales = np.broadcast_to(scale, shape).astype(np.float64)
        assert_within("y", dtype, got, Exact(high, low), scale=scales, at=at)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda t: t.__name__)
def test_the_bits_are_those_of_any_number_of_threads_and_of_each_graph_alone(dtype):
    many = np.random.default_rng(2)
    ids = np.sort(many.integers(0, 40, 900))
    x, dy = many.normal(2, 1, (2, 900, 70)).astype(dtype)
    alpha = many.random(70)

    def results(rows, threads):
        y, saved = bn.graph_norm(x[rows], alpha=alpha, segments=ids[rows] - ids[rows].min(), num_threads=threads)
        got = bn.backward(dy[rows], saved, num_threads=threads)
        return y, got.dx, got.dgamma, got.dalpha

    whole = results(slice(None), 1)
    for threads in (2, 3):
        assert [a.tobytes() for a in results(slice(None), threads)] == [a.tobytes() for a in whole]
    rows = ids == ids[450]
    for got, wanted in zip(results(rows, 2)[:2], whole, strict=False):
        assert got.tobytes() == wanted[rows].tobytes()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: bn.graph_norm(X, alpha=[1.0, 2.0]), ValueError, "alpha must have shape (3,), got (2,)"),
        (
            lambda: bn.graph_norm(X, keep="y"),
            ValueError,
            "keep must be 'x' or None beside alpha, of which y does not tell the mean, got 'y'",
        ),
        (
            lambda: bn.jvp(X, bn.batch_norm(X)[1], alpha_dot=ALPHA),
            ValueError,
            "alpha_dot must be None where there was no alpha, as graph_norm has",
        ),
        (lambda: bn.graph_norm(X, axis=0), ValueError, "axis must not be 0, which is that of the nodes, got 0 with shape (12, 3)"),
        (lambda: bn.GraphNorm(4)(X), ValueError, "x must have 4 channels on axis 1, got shape (12, 3)"),
        (lambda: bn.GraphNorm(3, alpha=1), TypeError, "alpha must be True or False, got int"),
        (lambda: convert.to_keras(bn.GraphNorm(3)), TypeError, "the layer must be of a kind that keras has, got a GraphNorm"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        call()


@pytest.mark.parametrize("name", ["graph", "batch", "instance", "group", "layer"])
def test_gradients_are_of_the_weights_of_the_call(name):
    x, dy = np.random.default_rng(3).normal(size=(2, 6, 4, 5))
    weights = np.random.default_rng(4).uniform(0.1, 2, (6, 5))
    gamma = [1.0, 2.0, 3.0, 4.0]  # no array: the call is none of the ordinary ones
    _, saved = {
        "graph": lambda: bn.graph_norm(x, gamma, weights=weights),
        "batch": lambda: bn.batch_norm(x, gamma, weights=weights, segments=[0, 0, 0, 1, 1, 1]),
        "instance": lambda: bn.instance_norm(x, gamma, weights=weights),
        "group": lambda: bn.group_norm(x, 2, gamma, weights=weights),
        "layer": lambda: bn.layer_norm(x, gamma, axes=1, weights=weights),
    }[name]()
    before = bn.backward(dy, saved).dx
    weights[...] = 1
    assert bn.backward(dy, saved).dx.tobytes() == before.tobytes()


# ---- the layer ----


def layer_of(**options):
    layer = bn.GraphNorm(3, **options)
    for name, value in (("gamma", GAMMA), ("beta", BETA), ("alpha", ALPHA)):
        if getattr(layer, name) is not None:
            getattr(layer, name)[:] = value
    return layer


def test_a_layer_learns_alpha():
    layer = layer_of(dtype="float64")
    y = layer(X, segments=IDS)
    expected, saved = saved_of()
    assert y.tobytes() == expected.tobytes()
    layer.alpha += 1  # what comes after the call is not in its gradients
    dx, wanted = layer.backward(DY), bn.backward(DY, saved)
    assert dx.tobytes() == wanted.dx.tobytes()
    for name in ("dgamma", "dbeta", "dalpha"):
        assert getattr(layer, name).tobytes() == getattr(wanted, name).tobytes()
    layer.freeze().backward(DY)
    assert layer.dalpha is None


def test_graph_gradients_keep_dalpha_in_all_that_is_made_of_them():
    given = bn.backward(DY, saved_of()[1])
    second = bn.double_backward(X, DY, saved_of()[1])
    assert pickle.loads(pickle.dumps(second)).dalpha.tobytes() == second.dalpha.tobytes()
    assert repr(second).startswith("GraphSecondGradients(ddy=")
    assert bn.double_backward(X, DY, saved_of()[1], needs=("x",)).dalpha is None
    for same in (given._replace(dx=None), copy.copy(given), pickle.loads(pickle.dumps(given))):
        assert same.dalpha.tobytes() == given.dalpha.tobytes()
    assert given._replace(dalpha=None).dalpha is None
    assert repr(given).startswith("GraphGradients(dx=")
    assert ", dalpha=array([" in repr(given)


def test_a_layer_without_alpha_is_batch_norm_of_segments():
    layer = layer_of(alpha=False, dtype="float64")
    assert layer.alpha is None
    close(layer(X, segments=IDS), bn.batch_norm(X, GAMMA, BETA, segments=IDS, eps=EPS)[0])
    layer.backward(DY)
    assert layer.dalpha is None
    assert "alpha" not in layer.state_dict()


def test_a_state_has_alpha_and_a_report_looks_at_it(tmp_path):
    layer, other = layer_of(), bn.GraphNorm(3)
    layer.save(tmp_path / "state")
    other.load(tmp_path / "state")
    assert other.alpha.tolist() == layer.alpha.tolist()
    layer.alpha[1] = np.nan
    assert [(f.kind, f.channels) for f in layer.report().findings if f.severity == "error"] == [("nonfinite", (1,))]
    with pytest.raises(ValueError, match=r"^alpha must be finite"):
        other.load_state_dict(layer.state_dict())


def test_the_parameters_go_to_pytorch_geometric_and_back():
    layer = layer_of()
    state = convert.to_torch(layer)
    assert sorted(state) == ["bias", "mean_scale", "weight"]
    module = type("GraphNorm", (), {"eps": 1e-4, "in_channels": 3, **state})()
    for source, eps in ((state, 1e-5), (module, 1e-4)):
        back = convert.from_torch(source, kind=bn.GraphNorm)
        assert (back.eps, back.channels, back.alpha.tolist()) == (eps, 3, layer.alpha.tolist())
        np.testing.assert_allclose(back(X, segments=IDS), formula(X, layer.gamma, layer.beta, layer.alpha, eps=eps))
