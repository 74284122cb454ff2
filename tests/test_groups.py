"""group_norm: the contract for what channels share, other libraries, and what it becomes at its ends."""

import functools
import re

import numpy as np
import pytest

import adversarial
import batchnorm as bn
import reference
from tolerances import assert_within

LAYOUTS = {"nchw": 1, "nhwc": 3}
every_layout = pytest.mark.parametrize("axis", LAYOUTS.values(), ids=LAYOUTS.keys())
# Of which each has channels of other kinds beside it in its group.
CASES = [case for case in adversarial.CASES if not case[0].startswith("dy_")]


def samples_and_groups(a, num_groups):
    """Give (N, C, H, W) as (1, N·G, values): a group of a sample as a channel."""
    return a.reshape(1, a.shape[0] * num_groups, -1)


@functools.cache
def expected(name, dtype, num_groups):
    """Give the case and the exact y, (N, C, H, W), and moments, with the scales of y."""
    case = adversarial.make(name, dtype)
    channels = case.x.shape[1]
    groups = samples_and_groups(case.x, num_groups)
    y, scale, at = (np.empty(case.x.shape) for _ in range(3))
    low = np.empty(case.x.shape)
    for c in range(channels):
        # With gamma and beta of one channel for all of its group, of which this one is looked at.
        gamma, beta = np.repeat(case.gamma[c], groups.shape[1]), np.repeat(case.beta[c], groups.shape[1])
        exact = reference.exact_forward(groups, gamma, beta, axis=1, eps=case.eps)
        of_channel = slice(None), c
        y[of_channel] = exact.y.high.reshape(case.x.shape)[of_channel]
        low[of_channel] = exact.y.low.reshape(case.x.shape)[of_channel]
        xhat = (groups - exact.mean.high[:, None] - exact.mean.low[:, None]) * exact.rstd.high[:, None]
        apart = np.abs(xhat.astype(np.float64) * float(case.gamma[c])).reshape(case.x.shape)[of_channel]
        scale[of_channel] = apart.max((1, 2), keepdims=True)
        at[of_channel] = np.maximum(np.abs(y[of_channel]), abs(float(case.beta[c])))
    return case, reference.Exact(y, low), exact, scale, at


@every_layout
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=["-".join(case) for case in CASES])
def test_y_and_statistics_keep_the_contract(name, dtype, num_groups, axis):
    case, y, exact, scale, at = expected(name, dtype, num_groups)
    x = np.ascontiguousarray(np.moveaxis(case.x, 1, axis))
    got, saved = bn.group_norm(x, num_groups, case.gamma, case.beta, axis=axis, eps=case.eps)
    assert_within("mean", dtype, saved.moments.mean, exact.mean)
    assert_within("var", dtype, saved.moments.var(), exact.var)
    assert_within("rstd", dtype, saved.rstd, exact.rstd)
    assert_within("y", dtype, np.moveaxis(got, axis, 1), y, scale=scale, at=at)


@every_layout
@pytest.mark.parametrize("name", [name for name, dtype in CASES if dtype == "float32"])
def test_dx_keeps_the_contract(name, axis):
    case, _, exact, _, _ = expected(name, "float32", 1)
    wide = case.dy.astype(np.float64) * case.gamma.astype(np.float64).reshape(-1, 1, 1)  # exact
    groups, dy = samples_and_groups(case.x, 1), samples_and_groups(wide, 1)
    gradients = reference.exact_backward(dy, groups, axis=1, eps=case.eps)
    scales = reference.backward_scales(dy, groups, None, exact, gradients, axis=1)
    x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, axis)) for a in (case.x, case.dy))
    _, saved = bn.group_norm(x, 1, case.gamma, case.beta, axis=axis, eps=case.eps)
    got = np.moveaxis(bn.backward(dy, saved).dx, axis, 1)
    assert_within("dx", "float32", samples_and_groups(got, 1), gradients.dx, scale=scales.dx)


@every_layout
@pytest.mark.parametrize("name", adversarial.CONSTANTS)
def test_a_constant_group_is_exactly_beta(name, axis):
    case = adversarial.make(name, "float32")
    x = np.full_like(case.x, case.x[0, 0, 0, 0])
    beta = np.array([0.1, -3.0, 1e10], np.float32)
    y, _ = bn.group_norm(np.moveaxis(x, 1, axis), 1, case.gamma, beta, axis=axis)
    assert (y == beta.reshape([-1 if i == axis else 1 for i in range(4)])).all()


@every_layout
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_groups_of_one_channel_are_instances(dtype, axis):
    x, dy = np.random.default_rng(0).normal(3, 1, (2, 5, 6, 7, 6))
    x, dy = (np.moveaxis(a, 1, axis).astype(dtype) for a in (x, dy))
    channels = x.shape[axis]
    y, saved = bn.group_norm(x, channels, axis=axis)
    expected_y, instances = bn.instance_norm(x, axis=axis)
    assert y.tobytes() == expected_y.tobytes()
    assert bn.backward(dy, saved).dx.tobytes() == bn.backward(dy, instances).dx.tobytes()


@every_layout
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 12, 2, 2), (2, 12, 9, 11), (5, 12, 1, 1)], ids=str)
def test_strided_groups_have_the_bits_of_neighbours_that_were_put_so(shape, dtype, axis):
    rng = np.random.default_rng(5)
    x, dy, x_dot = rng.normal(3, 1, (3, *shape)).astype(dtype)
    gamma, beta = rng.normal(size=(2, 12))
    order = np.arange(12).reshape(3, 4).T.ravel()  # of channels c, those of c mod 4 one after the other

    def results(grouping, channels):
        given = [np.ascontiguousarray(np.moveaxis(a[:, channels], 1, axis)) for a in (x, dy, x_dot)]
        y, saved = bn.group_norm(
            given[0], 4, gamma[channels], beta[channels], grouping=grouping, axis=axis, num_threads=2
        )
        dx, dgamma, dbeta, _ = bn.backward(given[1], saved)
        assert bn.grad_input(given[1], saved, bn.grad_sums(given[1], saved)).tobytes() == dx.tobytes()
        tensors = [np.moveaxis(a, axis, 1) for a in (y, dx, bn.jvp(given[2], saved))]
        return saved.moments, tensors, [dgamma, dbeta]

    moments, tensors, of_channels = results("strided", np.arange(12))
    of_neighbours = results("contiguous", order)
    assert moments == of_neighbours[0]
    assert (moments.mean == bn.moments(x, num_groups=4, grouping="strided").mean).all() or axis == 3
    for got, wanted in zip(tensors, of_neighbours[1], strict=True):
        assert got[:, order].tobytes() == wanted.tobytes()
    for got, wanted in zip(of_channels, of_neighbours[2], strict=True):
        assert got[order].tobytes() == wanted.tobytes()


def test_strided_groups_are_those_of_the_formula_of_mlx():
    x = np.random.default_rng(6).normal(3, 1, (2, 5, 4, 6))  # channels last
    y = bn.group_norm(x, 3, axis=-1, eps=1e-5, grouping="strided")[0]
    groups = x.reshape(2, -1, 3)  # as MLX reshapes them
    mean, var = groups.mean(1, keepdims=True), groups.var(1, keepdims=True)
    assert_within("oracles", "float64", y, ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape), scale=3)


def test_a_strided_layer_is_the_function_and_keeps_its_grouping():
    x = np.random.default_rng(8).normal(1, 2, (3, 6, 5)).astype(np.float32)
    layer = bn.GroupNorm(2, 6, grouping="strided")
    assert repr(layer) == "GroupNorm(2, 6, axis=1, eps=1e-05, grouping='strided')"
    assert layer(x).tobytes() == bn.group_norm(x, 2, layer.gamma, layer.beta, grouping="strided")[0].tobytes()
    with pytest.raises(ValueError, match="grouping"):
        bn.GroupNorm(2, 6).load_state_dict(layer.state_dict())
    for convert in (bn.convert.to_torch, bn.convert.to_keras, bn.convert.to_flax, bn.convert.to_onnx):
        with pytest.raises(ValueError, match=r"^the layer must have grouping='contiguous' for .*, got 'strided'$"):
            convert(layer)


def test_one_group_of_a_table_is_layer_normalization():
    x = np.random.default_rng(1).normal(5, 2, (6, 9))
    gamma, beta = np.linspace(-1, 2, 9), np.linspace(3, 4, 9)
    y, _ = bn.group_norm(x, 1, gamma, beta, eps=1e-6)
    mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    assert_within("oracles", "float64", y, (x - mean) / np.sqrt(var + 1e-6) * gamma + beta, scale=np.abs(y).max())


@every_layout
@pytest.mark.parametrize("shape", [(3, 12, 2, 2), (2, 12, 9, 11), (9, 64, 4, 4)], ids=str)
def test_the_bits_are_those_of_any_number_of_threads_and_of_each_sample_alone(shape, axis):
    rng = np.random.default_rng(2)
    x, dy = (np.moveaxis(rng.normal(2, 1, shape), 1, axis).astype(np.float32) for _ in range(2))
    gamma, beta = rng.normal(size=(2, shape[1])).astype(np.float32)

    def bits(x, dy, threads):
        y, saved = bn.group_norm(x, 4, gamma, beta, axis=axis, num_threads=threads)
        return y, bn.backward(dy, saved, num_threads=threads).dx

    whole = bits(x, dy, 1)
    for threads in (2, 3):
        for got, wanted in zip(bits(x, dy, threads), whole, strict=True):
            assert got.tobytes() == wanted.tobytes()
    for n in range(shape[0]):
        for got, wanted in zip(bits(x[n : n + 1], dy[n : n + 1], 1), whole, strict=True):
            assert got.tobytes() == wanted[n : n + 1].tobytes()


# Samples of 1.5 MB, of which some groups at a time are worked on.
LARGE = (2, 24, 128, 128)
OPTIONS = {
    "plain": {},
    "mask": {"mask": True},
    "weights": {"weights": True},
    "padding": {"mask": True, "padding": "zero"},
    "relu": {"activation": "relu"},
    "residual": {"residual": True, "activation": "relu"},
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_group_has_the_bits_that_it_has_alone(option, dtype):
    rng = np.random.default_rng(7)
    x, dy, residual, x_dot = (rng.normal(2, 1, LARGE).astype(dtype) for _ in range(4))
    gamma, beta, gamma_dot, beta_dot = rng.normal(size=(4, LARGE[1]))
    positions = rng.random((LARGE[0], 1, *LARGE[2:])) < 0.7
    settings = {"mask": positions, "weights": positions * 1.5, "residual": residual}

    def results(channels, num_groups):
        some = {
            key: (settings[key][:, channels] if key == "residual" else settings[key]) if value is True else value
            for key, value in OPTIONS[option].items()
        }
        here = [a[:, channels].copy() for a in (x, dy, x_dot)]
        y, saved = bn.group_norm(here[0], num_groups, gamma[channels], beta[channels], num_threads=2, **some)
        gradients = bn.backward(here[1], saved, num_threads=2)
        of_residual = here[1] if "residual" in some else None
        tangents = {"gamma_dot": gamma_dot[channels], "beta_dot": beta_dot[channels], "residual_dot": of_residual}
        y_dot = bn.jvp(here[2], saved, num_threads=2, **tangents)
        return [y, gradients.dx, y_dot, saved.moments.mean.reshape(LARGE[0], -1), gradients.dgamma, gradients.dbeta]

    whole = results(slice(None), 6)
    for group in range(6):
        channels = slice(4 * group, 4 * group + 4)
        for k, (got, wanted) in enumerate(zip(results(channels, 1), whole, strict=True)):
            of_group = wanted[:, channels] if k < 3 else wanted[:, group] if k == 3 else wanted[channels]
            assert got.tobytes() == np.ascontiguousarray(of_group).tobytes()


@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [((3, 6, 4, 5), 1), ((3, 6, 4, 5), 2), ((3, 6, 4, 5), 6), ((4, 6, 7), 3), ((5, 6), 1), ((5, 6), 2)],
    ids=str,
)
def test_float64_results_equal_those_of_torch(shape, num_groups):
    torch = pytest.importorskip("torch", reason="torch is not installed; it is only a second opinion here")
    rng = np.random.default_rng(3)
    x, dy = rng.normal(1, 2, (2, *shape))
    gamma, beta = rng.normal(size=(2, 6))
    tx, tgamma, tbeta = (torch.tensor(a, requires_grad=True) for a in (x, gamma, beta))
    ty = torch.nn.functional.group_norm(tx, num_groups, tgamma, tbeta, 1e-5)
    (ty * torch.tensor(dy)).sum().backward()
    y, saved = bn.group_norm(x, num_groups, gamma, beta)
    theirs = [t.detach().numpy() for t in (ty, tx.grad, tgamma.grad, tbeta.grad)]
    for got, wanted in zip((y, *bn.backward(dy, saved)[:3]), theirs, strict=True):
        assert_within("torch", "float64", got, wanted, scale=np.abs(wanted).max())


def test_one_position_that_counts_is_enough_for_several_channels():
    x = np.random.default_rng(4).normal(size=(2, 6, 3))
    y, saved = bn.group_norm(x, 3, lengths=[1, 3])
    assert saved.moments.count.tolist() == [2, 2, 2, 6, 6, 6]
    expected_y, _ = bn.group_norm(x[:1, :, :1], 3)
    np.testing.assert_array_equal(y[:1, :, :1], expected_y)


X = np.ones((2, 6, 3))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: bn.group_norm(X, 4), ValueError, "num_groups must divide the channels of x, 6, got 4"),
        (lambda: bn.group_norm(X, 0), ValueError, "num_groups must be an int >= 1, got 0"),
        (lambda: bn.group_norm(X, 1.0), TypeError, "num_groups must be an int >= 1, got float"),
        (lambda: bn.group_norm(X, 2, axis=0), ValueError, "axis must not be 0, which holds the samples, got 0"),
        (
            lambda: bn.group_norm(X[:, :, 0], 6),
            ValueError,
            "x must have at least 2 values in each sample and channel for their statistics, got shape (2, 6)",
        ),
        (
            lambda: bn.group_norm(X, 2, keep="y"),
            ValueError,
            "keep must be 'x' or None where channels share statistics, which y does not tell, got 'y'",
        ),
        (
            lambda: bn.moments(X, num_groups=2, ghost_size=1),
            ValueError,
            "segments and ghost_size must be None beside num_groups, which are of each sample",
        ),
        (
            lambda: bn.update_running(np.zeros(6), np.ones(6), bn.group_norm(X, 2)[1]),
            ValueError,
            "batch must have statistics of channels, got those of groups of channels",
        ),
        (lambda: bn.group_norm(X, 2, np.ones(2)), ValueError, "gamma must have shape (6,), got (2,)"),
        (
            lambda: bn.group_norm(X, 2, grouping="mlx"),
            ValueError,
            "grouping must be 'contiguous' or 'strided', got 'mlx'",
        ),
        (
            lambda: bn.GroupNorm(2, 6, grouping="mlx"),
            ValueError,
            "grouping must be 'contiguous' or 'strided', got 'mlx'",
        ),
        (
            lambda: bn.moments(X, grouping="strided"),
            ValueError,
            "grouping must be None without num_groups, got 'strided'",
        ),
        (
            lambda: bn.moments(X, axes=1, grouping="strided"),
            ValueError,
            "grouping must be None beside axes, of which each index of the others is by itself",
        ),
        (
            lambda: bn.GroupNorm(2, 6, pytorch_compatible=False),
            TypeError,
            "grouping must be given instead of pytorch_compatible: write grouping='strided', got pytorch_compatible=False",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(call, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        call()


@pytest.mark.parametrize("shape", [(0, 6, 3), (2, 0, 3), (2, 6, 0)], ids=str)
def test_an_empty_array_gives_an_empty_one(shape):
    y, saved = bn.group_norm(np.zeros(shape), 2)
    assert y.shape == shape
    assert bn.backward(y, saved).dx.shape == shape
