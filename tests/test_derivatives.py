"""Forward-mode and double backward: bounds, complex steps, torch, and an end at the second order."""

import numpy as np
import pytest

import batchnorm as bn
import frozen
import reference
from differences import complex_step, each_derivative
from tolerances import assert_within

EPS = 1e-2
STEP = 1e-200


class Case:
    """x, dy, v and values of channels, float64 by default."""

    def __init__(self, shape=(3, 4, 5), axis=1, dtype=np.float64):
        rng = np.random.default_rng(7)
        self.axis, channels = axis, shape[axis]
        self.x, self.dy, self.v, self.u = (rng.normal(m, 2, shape).astype(dtype) for m in (1, 0.5, 0.2, 0))
        self.gamma, self.w, self.wb = (rng.normal(size=channels).astype(dtype) for _ in range(3))
        self.mean, self.mean_dot, self.var_dot = (rng.normal(size=channels) for _ in range(3))
        self.var = rng.uniform(0.5, 2, channels)
        self.options = {"axis": axis, "eps": EPS}

    def saved(self):
        return bn.batch_norm(self.x, self.gamma, **self.options)[1]

    def jvp(self, **options):
        return bn.jvp(self.v, self.saved(), gamma_dot=self.w, beta_dot=self.wb, **options)

    def second(self, **options):
        return bn.double_backward(self.v, self.dy, self.saved(), v_dgamma=self.w, v_dbeta=self.wb, **options)

    def frozen_jvp(self, **options):
        tangents = {
            "mean_dot": self.mean_dot,
            "var_dot": self.var_dot,
            "gamma_dot": self.w,
            "beta_dot": self.wb,
        }
        return frozen.jvp(self.v, self.x, self.mean, self.var, self.gamma, **tangents, **self.options, **options)

    def frozen_second(self, **options):
        return frozen.double_backward(
            self.v, self.dy, self.x, self.mean, self.var, self.gamma,
            v_dgamma=self.w, v_dbeta=self.wb, **self.options, **options,
        )  # fmt: skip


@pytest.fixture
def case(layout, dtype):
    return Case(layout.shape, layout.axis, dtype)


def imaginary(value):
    return value.imag / STEP


def close(got, expected):
    assert_within("complex step", "float64", got, expected, scale=np.abs(expected).max())


# ---- bounds -----------------------------------------------------------------------------------------------


def test_jvp_keeps_its_bound(case, dtype):
    options = {"gamma_dot": case.w, "beta_dot": case.wb, **case.options}
    exact = reference.extended(reference.jvp, case.v, case.x, case.gamma, **options)
    scale = reference.jvp_scale(case.v, case.x, case.gamma, **options)
    assert_within("jvp", dtype, case.jvp(), exact, scale=scale)


def test_double_backward_keeps_its_bounds(case, dtype):
    arguments = (case.v, case.dy, case.x, case.gamma)
    options = {"v_dgamma": case.w, "v_dbeta": case.wb, **case.options}
    exact = reference.extended(reference.double_backward, *arguments, **options)
    scales = reference.second_scales(*arguments, **options)
    for name, got, value, scale in zip(("jvp", "second", "second"), case.second(), exact, scales, strict=True):
        assert_within(name, dtype, got, value, scale=scale)


# ---- complex steps ----------------------------------------------------------------------------------------


def test_jvp_equals_the_complex_step_of_forward():
    c, h = Case(), STEP * 1j
    moved = reference.forward(c.x + h * c.v, c.gamma + h * c.w, h * c.wb, **c.options).y
    expected = imaginary(moved)
    close(c.jvp(), expected)
    options = {"gamma_dot": c.w, "beta_dot": c.wb, **c.options}
    close(reference.jvp(c.v, c.x, c.gamma, **options), expected)


def test_normalize_jvp_equals_the_complex_step_of_normalize():
    c, h = Case(), STEP * 1j
    mean, var = c.mean + h * c.mean_dot, c.var + h * c.var_dot
    expected = imaginary(reference.normalize(c.x + h * c.v, mean, var, c.gamma + h * c.w, h * c.wb, **c.options))
    close(c.frozen_jvp(), expected)


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
def test_double_backward_equals_the_complex_step_of_backward(frozen):
    c = Case()

    def loss(dy, x, gamma):
        if frozen:
            got = reference.normalize_backward(dy, x, c.mean, c.var, gamma, **c.options)
        else:
            got = reference.backward(dy, x, gamma, **c.options)
        return (c.v * got.dx).sum() + (c.w * got.dgamma).sum() + (c.wb * got.dbeta).sum()

    second = c.frozen_second() if frozen else c.second()
    for got, expected in zip(second, each_derivative(loss, (c.dy, c.x, c.gamma), complex_step), strict=True):
        close(got, expected)


def test_the_jvp_of_backward_is_double_backward():
    c, h = Case(), STEP * 1j
    moved = reference.backward(c.dy, c.x + h * c.v, c.gamma + h * c.w, **c.options)
    second = bn.double_backward(c.v, c.dy, c.saved(), v_dgamma=c.w)
    close(second.dx, imaginary(moved.dx))
    close(second.dgamma, imaginary(moved.dgamma))


def test_the_jvp_of_jvp_is_double_backward():
    c, h = Case(), STEP * 1j
    second = bn.double_backward(c.v, c.u, c.saved())
    close(second.dx, imaginary(reference.jvp(c.v, c.x + h * c.u, c.gamma, **c.options)))


def test_the_gradient_of_jvp_is_double_backward():
    c = Case()

    def loss(x):
        return (c.dy * reference.jvp(c.v, x, c.gamma, **c.options)).sum()

    second = bn.double_backward(c.v, c.dy, c.saved())
    close(second.dx, each_derivative(loss, (c.x,), complex_step)[0])


def test_double_backward_equals_that_of_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed; it is only a second opinion here")
    c = Case()
    x, gamma, dy = (torch.tensor(a, requires_grad=True) for a in (c.x, c.gamma, c.dy))
    beta = torch.zeros_like(gamma, requires_grad=True)
    y = torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)
    first = torch.autograd.grad(y, (x, gamma, beta), dy, create_graph=True)
    expected = torch.autograd.grad(first, (dy, x, gamma), [torch.tensor(a) for a in (c.v, c.w, c.wb)])
    for got, value in zip(c.second(), expected, strict=True):
        assert_within("torch", "float64", got, value.numpy(), scale=np.abs(value.numpy()).max())


# ---- the end ----------------------------------------------------------------------------------------------


def test_a_third_order_is_refused():
    c = Case()
    saved, second = c.saved(), c.second()
    text = "must not be SecondGradients: derivatives end at the second order, and this would be the third"
    for name, call in (
        ("x_dot", lambda: bn.jvp(second, saved)),
        ("saved", lambda: bn.jvp(c.v, second)),
        ("x_dot", lambda: frozen.jvp(second, c.x, c.mean, c.var)),
        ("v_dx", lambda: bn.double_backward(second, c.dy, saved)),
        ("dy", lambda: bn.double_backward(c.v, second, saved)),
        ("saved", lambda: bn.double_backward(c.v, c.dy, second)),
        ("v_dx", lambda: frozen.double_backward(second, c.dy, c.x, c.mean, c.var)),
        ("dy", lambda: frozen.double_backward(c.v, second, c.x, c.mean, c.var)),
    ):
        with pytest.raises(NotImplementedError, match=f"^{name} {text}"):
            call()


def test_values_that_carry_derivatives_of_their_own_are_refused():
    c = Case()
    for value in (c.v + STEP * 1j, c.v.astype(object)):
        with pytest.raises(TypeError, match="x_dot must have dtype float16, bfloat16, float32 or float64, got"):
            bn.jvp(value, c.saved())
        with pytest.raises(TypeError, match="v_dx must have dtype float16, bfloat16, float32 or float64, got"):
            bn.double_backward(value, c.dy, c.saved())


# ---- calls ------------------------------------------------------------------------------------------------

CALLS = ["jvp", "second", "frozen_jvp", "frozen_second"]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_any_number_of_threads_gives_the_same_bits(dtype):
    for shape in ((8, 3, 4001), (5003, 37)):
        for name in CALLS:
            c = Case(shape, 1, dtype)
            one = getattr(c, name)(num_threads=1)
            for threads in (2, 3, 7):
                np.testing.assert_equal(getattr(c, name)(num_threads=threads), one)


@pytest.mark.parametrize("onto", ["v", "dy", "x"])
@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
def test_each_output_may_be_any_input(layout, dtype, onto, frozen):
    name = "frozen_second" if frozen else "second"
    for position in (0, 1):
        c = Case(layout.shape, layout.axis, dtype)
        expected = getattr(c, name)()
        target = getattr(c, onto)
        got = getattr(c, name)(out=(target, None) if position == 0 else (None, target))
        assert got[position] is target
        assert_same(got, expected)


@pytest.mark.parametrize("onto", ["v", "x"])
@pytest.mark.parametrize("name", ["jvp", "frozen_jvp"])
def test_the_output_of_jvp_may_be_an_input(layout, dtype, onto, name):
    c = Case(layout.shape, layout.axis, dtype)
    expected = getattr(c, name)()
    target = getattr(c, onto)
    assert getattr(c, name)(out=target) is target
    np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("needs", [("dy",), ("x",), ("gamma",), ("dy", "gamma")], ids="_".join)
@pytest.mark.parametrize("name", ["second", "frozen_second"])
def test_only_what_is_needed_is_given_with_the_same_bits(case, needs, name):
    everything = dict(zip(("dy", "x", "gamma"), getattr(case, name)(), strict=True))
    for key, got in zip(everything, getattr(case, name)(needs=needs), strict=True):
        if key in needs:
            np.testing.assert_array_equal(got, everything[key])
        else:
            assert got is None


def test_no_v_dx_is_zeros(case):
    second = bn.double_backward(None, case.dy, case.saved(), v_dgamma=case.w)
    case.v[...], case.wb[...] = 0, 0
    assert_same(second, case.second())


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0), (0, 3)], ids=str)
def test_an_empty_batch_gives_empty_arrays_and_zero_dgamma(shape, dtype):
    c = Case(shape, 1, dtype)
    for name in CALLS:
        got = getattr(c, name)()
        if isinstance(got, bn.SecondGradients):
            assert got.ddy.shape == got.dx.shape == shape
            np.testing.assert_array_equal(got.dgamma, np.zeros(3))
        else:
            assert got.shape == shape


def test_a_constant_channel_without_eps_gives_the_tangent_of_beta(case):
    case.x[...], case.options["eps"] = 2.5, 0.0
    expected = np.broadcast_to(reference.per_channel(case.wb, case.x, case.axis), case.x.shape)
    np.testing.assert_array_equal(case.jvp(), expected)
    second = case.second()
    np.testing.assert_array_equal(second.ddy, expected)
    np.testing.assert_array_equal(second.dx, 0)
    np.testing.assert_array_equal(second.dgamma, 0)


def test_bad_arguments_are_named_and_nothing_is_written(dtype):
    c = Case((3, 4, 5), 1, dtype)
    out = np.full_like(c.x, 7)
    with pytest.raises(ValueError, match=r"gamma_dot must have shape \(4,\), got \(3,\)"):
        bn.jvp(c.v, c.saved(), gamma_dot=np.ones(3), out=out)
    with pytest.raises(ValueError, match=r"x_dot must have shape"):
        bn.jvp(c.v[:2], c.saved(), out=out)
    with pytest.raises(ValueError, match="needs must name some of 'dy', 'x', 'gamma', got 'beta'"):
        c.second(needs=("beta",), out=(out, None))
    with pytest.raises(TypeError, match=r"out must be a tuple \(ddy, dx\) of arrays or None, got ndarray"):
        c.second(out=out)
    with pytest.raises(ValueError, match="out must be two arrays that share no memory, got an overlap"):
        c.second(out=(out, out))
    with pytest.raises(ValueError, match="var must be >= 0 in every channel"):
        frozen.double_backward(c.v, c.dy, c.x, c.mean, -c.var, out=(out, None))
    np.testing.assert_array_equal(out, 7)


@pytest.mark.parametrize("name", ["v_dx", "dy", "x_dot", "x", "x_of_jvp"])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda a: a.tolist(), TypeError, "must be a numpy.ndarray .*, got list"),
        (lambda a: a.astype(np.int64), TypeError, "must have dtype float16, bfloat16, float32 or float64"),
    ],
    ids=["list", "int64"],
)
def test_each_tensor_is_named_by_its_own_name(name, change, error, text):
    c = Case((3, 4, 5), 1)
    constants, out = {"mean": c.mean, "var": c.var}, np.full_like(c.x, 7)
    calls = {
        "v_dx": lambda a: bn.double_backward(a, c.dy, c.saved(), out=(out, None)),
        "dy": lambda a: frozen.double_backward(c.v, a, c.x, **constants, out=(out, None)),
        "x_dot": lambda a: frozen.jvp(a, c.x, **constants, out=out),
        "x": lambda a: frozen.double_backward(c.v, c.dy, a, **constants, out=(out, None)),
        "x_of_jvp": lambda a: frozen.jvp(c.v, a, **constants, out=out),
    }
    good = {"v_dx": c.v, "dy": c.dy, "x_dot": c.v}.get(name, c.x)
    with pytest.raises(error, match=rf"^{name.removesuffix('_of_jvp')} {text}"):
        calls[name](change(good))
    np.testing.assert_array_equal(out, 7)


def test_every_instruction_set_gives_the_same_bits(isa, python_with_isa):
    code = (
        "import hashlib, numpy as np, test_derivatives as t\n"
        "h = hashlib.sha256()\n"
        "for shape in ((3, 5, 49), (2, 3, 20011), (301, 7), (50, 6, 4)):\n"
        "    for dtype in (np.float32, np.float64):\n"
        "        for name in t.CALLS:\n"
        "            got = getattr(t.Case(shape, 1, dtype), name)()\n"
        "            for a in got if isinstance(got, tuple) else (got,): h.update(np.ascontiguousarray(a))\n"
        "print(h.hexdigest())"
    )
    found = [python_with_isa(name, code) for name in (bn.available_isas()[0], isa)]
    assert [p.returncode for p in found] == [0, 0], found[1].stderr
    assert found[0].stdout == found[1].stdout


def test_tangents_of_what_a_call_had_not_are_refused():
    c = Case()
    for name, text in (
        ("mean_dot", "mean_dot and var_dot must be None where the statistics are those of the batch"),
        ("residual_dot", "residual_dot must be None where no residual was added"),
    ):
        with pytest.raises(ValueError, match=f"^{text}$"):
            bn.jvp(c.v, c.saved(), **{name: c.v if name == "residual_dot" else c.mean})
    with pytest.raises(ValueError, match=r"^v_dresidual must be None where no residual was added$"):
        bn.double_backward(c.v, c.dy, c.saved(), v_dresidual=c.v)


@pytest.mark.parametrize("given", [{"mask": True}, {"activation": "relu"}, {"residual": True}], ids=str)
def test_what_follows_is_rounded_once_in_16_bits(given):
    """Of float16, the derivatives are those of the same values in float32, rounded once."""
    c = Case(dtype=np.float16)
    mask = np.random.default_rng(3).random((3, 5)) < 0.7
    given = {n: v if isinstance(v, str) else {"mask": mask, "residual": c.u}[n] for n, v in given.items()}
    wide = {n: v.astype(np.float32) if n == "residual" else v for n, v in given.items()}
    _, saved = bn.batch_norm(c.x, c.gamma, **c.options, **given)
    _, other = bn.batch_norm(c.x.astype(np.float32), c.gamma, **c.options, **wide)
    v, dy = c.v.astype(np.float32), c.dy.astype(np.float32)
    tangents = {"gamma_dot": c.w, "beta_dot": c.wb}
    np.testing.assert_array_equal(bn.jvp(c.v, saved, **tangents), bn.jvp(v, other, **tangents).astype(np.float16))
    second, wide_second = bn.double_backward(c.v, c.dy, saved), bn.double_backward(v, dy, other)
    for name in ("ddy", "dx"):
        got, want = getattr(second, name).astype(np.float64), getattr(wide_second, name).astype(np.float64)
        # Half a spacing of float16, and what the float32 it is held against has rounded: 5 of its units of each term.
        assert (np.abs(got - want) <= 0.5 * reference.ulp(want, np.float16) + 40 * 2.0**-24 * np.abs(want).max()).all()
