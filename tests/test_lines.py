"""layer_norm and rms_norm: the contract for what moves along a line, other libraries, bits, and what they become at their ends."""

import ast
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import adversarial
import batchnorm as bn
import reference
from reference import Exact
from tolerances import TABLE, assert_within

Wide = np.longdouble
NORMS = {"layer": bn.layer_norm, "rms": bn.rms_norm}
each_norm = pytest.mark.parametrize("norm", NORMS)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
CASES = [case for case in adversarial.CASES if not case[0].startswith("dy_")]


def exact(values):
    """Give extended values as the sum of two float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        high = values.astype(np.float64)
        return Exact(high, np.where(np.isfinite(high), values - high, 0).astype(np.float64))


class Oracle:
    """The definition: statistics that are exact, or of sums that do not cancel, and all else in extended precision."""

    def __init__(self, norm, x, gamma, beta, axes, eps):
        self.axes = axes
        shape = [n if d in axes else 1 for d, n in enumerate(x.shape)]
        self.gamma, self.beta = (np.asarray(a).astype(Wide).reshape(shape) for a in (gamma, beta))
        self.about_mean = norm == "layer"
        if self.about_mean:
            self.rstd, self.xhat = self.of_mean(x, eps)
        else:
            total = self.mean_of(x.astype(Wide) ** 2) + Wide(eps)
            self.rstd = np.where(total == 0, 0, 1 / np.sqrt(np.where(total == 0, 1, total)))
            self.xhat = x.astype(Wide) * self.rstd
        self.y = self.xhat * self.gamma + self.beta

    def of_mean(self, x, eps):
        others = [d for d in range(x.ndim) if d not in self.axes]
        order = [*others, *self.axes]
        moved = x.transpose(order)
        positions = moved.shape[: len(others)]
        lines = moved.reshape(1, math.prod(positions), math.prod(moved.shape[len(others) :]))
        got = reference.exact_forward(lines, axis=1, eps=eps)
        rstd, xhat = (a.high.astype(Wide) + a.low for a in (got.rstd, got.y))
        back = np.argsort(order)
        rstd = rstd.reshape(positions + (1,) * len(self.axes)).transpose(back)
        return rstd, xhat.reshape(moved.shape).transpose(back)

    def mean_of(self, values):
        return values.mean(self.axes, keepdims=True)

    def over_positions(self, values):
        others = tuple(d for d in range(values.ndim) if d not in self.axes)
        return values.sum(others)

    def check_y(self, y, dtype):
        apart = np.abs(self.xhat * self.gamma)
        scale = np.broadcast_to(apart.max(self.axes, keepdims=True), y.shape)
        at = np.maximum(np.abs(self.y), np.abs(self.beta))
        quantity = "y of lines" if (self.gamma.astype(dtype) == self.gamma).all() else "y"
        assert_within(quantity, dtype, y, exact(self.y), scale=scale.astype(np.float64), at=at.astype(np.float64))

    def check_gradients(self, got, dy, dtype):
        dy = dy.astype(Wide)
        h, rstd = dy * self.gamma, self.rstd
        of_h, of_xhat = self.mean_of(h) * self.about_mean, self.mean_of(h * self.xhat)
        scale = self.mean_of(np.abs(h)) * self.about_mean + np.abs(self.xhat) * self.mean_of(np.abs(h * self.xhat))
        scale = rstd * (np.abs(h) + scale)
        dx = exact(rstd * (h - of_h - self.xhat * of_xhat))
        assert_within("dx", dtype, got.dx, dx, scale=scale.astype(np.float64))
        for name, terms in (("dgamma", dy * self.xhat), ("dbeta", dy)):
            scale = self.over_positions(np.abs(terms)).astype(np.float64)
            assert_within(name, dtype, getattr(got, name), exact(self.over_positions(terms)), scale=scale)


def parameters(shape, seed=5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=shape)


# Lines of 72 values side by side; of 24, whose places lie apart; of 3, which are the channels of maps.
@each_norm
@pytest.mark.parametrize("axes", [(2, 3), (1, 2), (1,)], ids=str)
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=["-".join(case) for case in CASES])
def test_y_and_gradients_keep_the_contract(name, dtype, axes, norm):
    case = adversarial.make(name, dtype)
    gamma, beta = (a.astype(dtype) for a in parameters([case.x.shape[d] for d in axes]))
    oracle = Oracle(norm, case.x, gamma, beta, axes, case.eps)
    y, saved = NORMS[norm](case.x, gamma, beta, axes=axes, eps=case.eps)
    oracle.check_y(y, dtype)
    oracle.check_gradients(bn.backward(case.dy, saved), case.dy, dtype)


@each_norm
@each_dtype
@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 65, 255, 257, 1023, 1040, 4097, 8193])
def test_lines_of_any_length_keep_the_contract(size, dtype, norm):
    rng = np.random.default_rng(size)
    for rows in (0, 1, 2, 67):
        x, dy = rng.normal(3, 2, (2, rows, size)).astype(dtype)
        gamma, beta = (a.astype(dtype) for a in parameters(size))
        oracle = Oracle(norm, x, gamma, beta, (1,), 1e-5)
        y, saved = NORMS[norm](x, gamma, beta, eps=1e-5)
        oracle.check_y(y, dtype)
        oracle.check_gradients(bn.backward(dy, saved), dy, dtype)


@each_dtype
@pytest.mark.parametrize("name", adversarial.CONSTANTS)
def test_constant_lines_are_exactly_beta(name, dtype):
    case = adversarial.make(name, dtype)
    x = np.full((5, 33), case.x[0, 0, 0, 0])
    beta = np.resize([0.1, -3.0, 1e10], 33).astype(dtype)
    y, saved = bn.layer_norm(x, np.ones(33, dtype), beta)
    assert (y == beta).all()
    assert (saved.moments.var() == 0).all()


def test_one_value_is_beta_and_has_no_gradient():
    x, dy = np.random.default_rng(0).normal(1e6, 1, (2, 9, 1)).astype(np.float32)
    y, saved = bn.layer_norm(x, [2.0], [0.5])
    got = bn.backward(dy, saved)
    assert (y == 0.5).all()
    assert (got.dx == 0).all()
    assert got.dgamma.tolist() == [0]


@each_norm
def test_parameter_gradients_of_16_bits_are_sums_of_float64(norm):
    rng = np.random.default_rng(1)
    x, dy = rng.normal(size=(16384, 8)).astype(np.float16), rng.random((16384, 8)).astype(np.float16)
    _, saved = NORMS[norm](x, np.ones(8), np.zeros(8), eps=1e-5)
    got, oracle = bn.backward(dy, saved), Oracle(norm, x, np.ones(8), np.zeros(8), (1,), 1e-5)
    wide = dy.astype(np.float64)
    np.testing.assert_allclose(got.dbeta, wide.sum(0), rtol=1e-14)
    terms = (wide * oracle.xhat).astype(np.float64)
    np.testing.assert_allclose(got.dgamma, terms.sum(0), atol=1e-13 * np.abs(terms).sum(0).max())


@pytest.mark.parametrize(
    ("x", "dy", "gamma"), [(1e-120, 1e200, 1e-200), (1e140, 1e-175, 1e300), (1.0, 1e-300, 1e290)], ids=str
)
def test_float64_far_from_1_keeps_what_batch_norm_keeps(x, dy, gamma):
    values, gradients = (np.random.default_rng(k).normal(size=(8, 1)) for k in (0, 1))
    y, saved = bn.layer_norm((x * values).T, np.full(8, gamma), eps=0.0)
    of_batch, wanted = bn.batch_norm(x * values, [gamma], eps=0.0)
    np.testing.assert_allclose(y.T, of_batch, rtol=1e-14)
    got, exact = bn.backward((dy * gradients).T, saved), bn.backward(dy * gradients, wanted)
    scale = np.abs(exact.dx).max()
    np.testing.assert_allclose(got.dx.T / scale, exact.dx / scale, atol=1e-14)
    np.testing.assert_allclose(got.dgamma.sum() / dy, exact.dgamma[0] / dy, rtol=1e-12)
    dots, exact_dots = bn.jvp((dy * gradients).T, saved), bn.jvp(dy * gradients, wanted)
    scale = np.abs(exact_dots).max()
    np.testing.assert_allclose(dots.T / scale, exact_dots / scale, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_reference_instructions_give_parameter_gradients(dtype):
    code = (
        "import numpy as np, batchnorm as bn\n"
        f"x, dy = np.random.default_rng(0).normal(size=(2, 16, 48)).astype('{dtype}')\n"
        "given = bn.backward(dy, bn.layer_norm(x, np.ones(48))[1])\n"
        "print((given.dgamma.tolist(), given.dbeta.tolist()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BATCHNORM_ISA": "reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    x, dy = np.random.default_rng(0).normal(size=(2, 16, 48)).astype(dtype)
    given = bn.backward(dy, bn.layer_norm(x, np.ones(48))[1])
    np.testing.assert_allclose(ast.literal_eval(run.stdout), [given.dgamma, given.dbeta], rtol=1e-12, atol=1e-12)


@each_norm
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 4), (2, 1, 1)], ids=str)
def test_gradients_of_nothing_are_0(shape, norm):
    _, saved = NORMS[norm](np.zeros(shape), np.ones(shape[-1]))
    got = bn.backward(np.zeros(shape), saved)
    assert got.dgamma.tolist() == got.dbeta.tolist() == [0.0] * shape[-1]


# ---- bits ----


def results(function, x, dy, axes, threads, **options):
    gamma, beta = parameters([x.shape[d] for d in axes])
    y, saved = function(x, gamma, beta, axes=axes, num_threads=threads, **options)
    got = bn.backward(dy, saved, num_threads=threads)
    return y, got.dx, got.dgamma, got.dbeta, saved.moments.mean, bn.grad_sums(dy, saved).sum_dy_xmu


@each_norm
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda t: t.__name__)
@pytest.mark.parametrize(("shape", "axes"), [((700, 257), (1,)), ((9, 40, 130), (1,)), ((3, 20000), (1,))], ids=str)
def test_the_bits_are_those_of_any_number_of_threads_and_of_each_line_alone(shape, axes, dtype, norm):
    rng = np.random.default_rng(2)
    x, dy = (rng.normal(2, 1, shape).astype(dtype) for _ in range(2))
    whole = results(NORMS[norm], x, dy, axes, 1)
    for threads in (2, 3):
        for got, wanted in zip(results(NORMS[norm], x, dy, axes, threads), whole, strict=True):
            assert got.tobytes() == wanted.tobytes()
    for n in range(0, len(x), 97):
        one = slice(n, n + 1)
        for got, wanted in zip(results(NORMS[norm], x[one], dy[one], axes, 1)[:2], whole, strict=False):
            assert got.tobytes() == wanted[one].tobytes()


@each_norm
def test_channels_of_maps_have_the_bits_of_lines_side_by_side(norm):
    rng = np.random.default_rng(3)
    x, dy = rng.normal(2, 1, (2, 3, 48, 9, 7)).astype(np.float32)
    moved, dy_moved = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
    of_maps, of_lines = results(NORMS[norm], x, dy, (1,), 2), results(NORMS[norm], moved, dy_moved, (3,), 2)
    for k, (got, wanted) in enumerate(zip(of_maps, of_lines, strict=True)):
        assert (np.moveaxis(got, 1, -1) if k < 2 else got).tobytes() == wanted.tobytes()


def test_without_gamma_a_line_is_an_instance_to_a_rounding():
    x = np.random.default_rng(4).normal(1e3, 1, (6, 50)).astype(np.float32)
    y, saved = bn.layer_norm(x)
    instances, of_instances = bn.instance_norm(x[:, None])
    assert saved.moments == of_instances.moments
    bound = TABLE["y", "float32"].relative * np.abs(y).max() + np.spacing(np.abs(y).max())
    assert np.abs(y - instances[:, 0]).max() <= bound


# ---- other libraries ----


def torch_samples(names):
    torch = pytest.importorskip("torch", reason="torch is not installed; it is only a second opinion here")
    pytest.importorskip("expecttest", reason="expecttest is not installed, without which torch shows no samples")
    from torch.testing._internal.common_methods_invocations import op_db

    ops = {op.name: op for op in op_db}
    for name in names:
        samples = list(ops[name].sample_inputs("cpu", torch.float64, requires_grad=False))
        assert samples
        yield from (s for s in samples if (s.kwargs.get("eps") or 0) >= 0)  # below 0 it is refused here


def check_against_torch(theirs, ours, arrays):
    """Compare y and the gradients by x, gamma and beta; `arrays` may be None but for the first."""
    torch = pytest.importorskip("torch", reason="torch is not installed; it is only a second opinion here")
    tensors = [None if a is None else a.detach().clone().requires_grad_() for a in arrays]
    ty = theirs(*tensors)
    dy = np.random.default_rng(6).normal(size=tuple(ty.shape))
    (ty * torch.tensor(dy)).sum().backward()
    y, saved = ours(*(None if t is None else t.detach().numpy() for t in tensors))
    wanted = [ty.detach().numpy()] + [None if t is None else t.grad.numpy() for t in tensors]
    for got, want in zip((y, *bn.backward(dy, saved)[:3]), wanted, strict=False):
        if want is not None:
            assert_within("torch", "float64", got, want, scale=np.abs(want).max(initial=0) + np.abs(dy).max(initial=0))


def test_results_are_those_of_torch_on_its_own_samples_of_layer_norm():
    torch = pytest.importorskip("torch", reason="torch is not installed; it is only a second opinion here")
    for sample in torch_samples(["nn.functional.layer_norm"]):
        shape, options = sample.args[0], {"eps": sample.kwargs.get("eps", 1e-5)}
        given = [sample.input, *sample.args[1:3], *(sample.kwargs.get(n) for n in ("weight", "bias"))][:3]
        axes = tuple(range(-len(shape), 0))
        check_against_torch(
            lambda x, w=None, b=None, shape=shape, options=options: torch.nn.functional.layer_norm(
                x, shape, w, b, **options
            ),
            lambda x, w=None, b=None, axes=axes, options=options: bn.layer_norm(x, w, b, axes=axes, **options),
            given,
        )


def test_results_are_those_of_torch_on_its_own_samples_of_rms_norm():
    torch = pytest.importorskip("torch", reason="torch is not installed; it is only a second opinion here")
    for sample in torch_samples(["nn.functional.rms_norm"]):
        shape, weight = sample.args[0], (sample.args[1] if len(sample.args) > 1 else sample.kwargs.get("weight"))
        eps = sample.kwargs.get("eps")
        axes = tuple(range(-len(shape), 0))
        ours = float(np.finfo(np.float64).eps) if eps is None else eps
        check_against_torch(
            lambda x, w=None, shape=shape, eps=eps: torch.nn.functional.rms_norm(x, shape, w, eps),
            lambda x, w=None, axes=axes, ours=ours: bn.rms_norm(x, w, axes=axes, eps=ours),
            [sample.input, weight],
        )


def test_results_are_those_of_torch_on_its_own_samples_of_group_norm():
    torch = pytest.importorskip("torch", reason="torch is not installed; it is only a second opinion here")
    for sample in torch_samples(["nn.functional.group_norm"]):
        groups, eps = sample.args[0], sample.kwargs.get("eps", 1e-5)
        check_against_torch(
            lambda x, w=None, b=None, n=groups, eps=eps: torch.nn.functional.group_norm(x, n, w, b, eps),
            lambda x, w=None, b=None, n=groups, eps=eps: bn.group_norm(x, n, w, b, eps=eps),
            [sample.input, sample.kwargs.get("weight"), sample.kwargs.get("bias")],
        )


def test_results_are_those_of_torch_on_its_own_samples_of_instance_norm():
    torch = pytest.importorskip("torch", reason="torch is not installed; it is only a second opinion here")
    for sample in torch_samples(["nn.functional.instance_norm"]):
        if not sample.kwargs.get("use_input_stats", True):
            continue
        eps = sample.kwargs.get("eps", 1e-5)
        check_against_torch(
            lambda x, w=None, b=None, eps=eps: torch.nn.functional.instance_norm(x, weight=w, bias=b, eps=eps),
            lambda x, w=None, b=None, eps=eps: bn.instance_norm(x, w, b, eps=eps),
            [sample.input, sample.kwargs.get("weight"), sample.kwargs.get("bias")],
        )


# ---- what does not fit ----

X = np.ones((2, 6, 3))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: bn.layer_norm(X, np.ones(6)),
            ValueError,
            "gamma must have shape (3,), that of the axes of x that are normalized, got (6,)",
        ),
        (
            lambda: bn.layer_norm(X, axes=(1, 2), beta=np.ones(18)),
            ValueError,
            "beta must have shape (6, 3), that of the axes of x that are normalized, got (18,)",
        ),
        (lambda: bn.layer_norm(X, axes=3), ValueError, "axes must be in [-3, 2] for an array of 3 dimensions, got 3"),
        (lambda: bn.layer_norm(X, axes=(1.0, 2)), TypeError, "axes must be an int, got float"),
        (
            lambda: bn.rms_norm(X, axes=np.array([1, 2])),
            TypeError,
            "axes must be an int or a tuple of some, got ndarray",
        ),
        (lambda: bn.layer_norm(X, axes=(1, -2)), ValueError, "axes must name each axis once, got (1, -2)"),
        (lambda: bn.layer_norm(X, axes=()), TypeError, "axes must be an int or a tuple of some, got ()"),
        (lambda: bn.rms_norm(X, axes=1.0), TypeError, "axes must be an int or a tuple of some, got float"),
        (
            lambda: bn.layer_norm(X, keep="y"),
            ValueError,
            "keep must be 'x' or None where channels share statistics, which y does not tell, got 'y'",
        ),
        (
            lambda: bn.layer_norm(X, mask=np.ones((2, 6, 3), bool)),
            ValueError,
            (
                "mask must have the shape of x without the axes that are normalized, (2, 6), or with 1 there (and 1 "
                "wherever it is the same along an axis), got (2, 6, 3)"
            ),
        ),
        (
            lambda: bn.layer_norm(X, axes=(1, 2), lengths=[1, 2]),
            ValueError,
            (
                "lengths must come with an x of samples (axis 0) and steps, on axes that are not normalized, got shape "
                "(2, 6, 3) with axes (1, 2)"
            ),
        ),
        (
            lambda: bn.rms_norm(X, weights=np.full((2, 6), -1.0)),
            ValueError,
            "weights must be finite and >= 0 at every position, got -1 at position 0",
        ),
        (
            lambda: bn.moments(X, axes=2, num_groups=1),
            ValueError,
            "num_groups must be None beside axes, of which each index of the others is by itself",
        ),
        (
            lambda: bn.update_running(np.zeros(3), np.ones(3), bn.layer_norm(X)[1]),
            ValueError,
            "batch must have statistics of channels, got those of groups of channels",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(call, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        call()


@each_norm
@pytest.mark.parametrize(("shape", "axes"), [((0, 6), -1), ((2, 0), -1), ((2, 6, 0), 1), ((0, 3, 4), (1, 2))], ids=str)
def test_an_empty_array_gives_an_empty_one_and_gradients_of_0(shape, axes, norm):
    y, saved = NORMS[norm](np.zeros(shape), axes=axes)
    assert y.shape == shape
    got = bn.backward(y, saved)
    assert got.dx.shape == shape
    assert (got.dgamma == 0).all()


@pytest.mark.parametrize("order", ["C", "F", "last first"])
def test_y_lies_as_x_does(order):
    x = np.random.default_rng(7).normal(size=(4, 5, 6))
    laid = {"C": x, "F": x.copy("F"), "last first": np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)}[
        order
    ]
    for axes in (1, 2, (1, 2)):
        y, saved = bn.layer_norm(laid, axes=axes)
        wanted, _ = bn.layer_norm(x, axes=axes)
        assert y.strides == laid.strides
        np.testing.assert_allclose(y, wanted, rtol=1e-14, atol=1e-14)
        assert bn.backward(laid, saved).dx.strides == laid.strides


def test_an_infinity_or_nan_stays_in_its_line():
    x = np.random.default_rng(8).normal(size=(3, 8))
    x[0, 1], x[1, 2] = np.nan, np.inf
    y, saved = bn.layer_norm(x)
    assert np.isnan(y[0]).all()
    assert np.isnan(y[1, 2])
    np.testing.assert_array_equal(y[2], bn.layer_norm(x[2:])[0][0])
    assert np.isfinite(bn.backward(np.ones((3, 8)), saved).dx[2]).all()
