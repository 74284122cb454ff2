"""Forward mode and double backward against complex steps, autograd, and their own identities."""

import numpy as np
import pytest

import batchnorm as bn
import reference
from tolerances import assert_within

EPS = 1e-3
H = 1e-200


def problem(layout, dtype, seed=0):
    """Give x, dy, v and gamma, and values per channel for the rest."""
    rng = np.random.default_rng(seed)
    x = layout.normal(dtype)
    dy, v = (rng.normal(size=x.shape).astype(dtype) for _ in range(2))
    return x, dy, v, *(rng.uniform(-2, 2, layout.channels) for _ in range(5))


def saved_of(x, gamma, layout):
    return bn.batch_norm(x, gamma, axis=layout.axis, eps=EPS)[1]


def assert_equals_step(mine, slope):
    assert_within("complex step", np.float64, mine, slope, scale=np.abs(slope).max() + 1e-3)


def test_jvp_equals_a_complex_step(layout):
    x, x_dot, _, gamma, beta, gamma_dot, beta_dot, _ = problem(layout, np.float64)
    stepped = reference.forward(
        x + 1j * H * x_dot, gamma + 1j * H * gamma_dot, beta + 1j * H * beta_dot, axis=layout.axis, eps=EPS
    )
    got = bn.batch_norm_jvp(x_dot, saved_of(x, gamma, layout), gamma_dot=gamma_dot, beta_dot=beta_dot)
    assert_equals_step(got, stepped.y.imag / H)


def test_normalize_jvp_equals_a_complex_step(layout):
    x, x_dot, _, gamma, mean, gamma_dot, beta_dot, mean_dot = problem(layout, np.float64)
    var, var_dot = np.abs(gamma) + 0.1, beta_dot[::-1].copy()
    stepped = reference.normalize(
        x + 1j * H * x_dot,
        mean + 1j * H * mean_dot,
        var + 1j * H * var_dot,
        gamma + 1j * H * gamma_dot,
        1j * H * beta_dot,
        axis=layout.axis,
        eps=EPS,
    )
    tangents = {"mean_dot": mean_dot, "var_dot": var_dot, "gamma_dot": gamma_dot, "beta_dot": beta_dot}
    got = bn.normalize_jvp(x_dot, x, mean, var, gamma, axis=layout.axis, eps=EPS, **tangents)
    assert_equals_step(got, stepped.imag / H)


def contracted(gradients, v, v_dgamma, v_dbeta):
    return (gradients.dx * v).sum() + (gradients.dgamma * v_dgamma).sum() + (gradients.dbeta * v_dbeta).sum()


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
def test_double_backward_equals_complex_steps(layout, frozen):
    x, dy, v, gamma, v_dgamma, v_dbeta, mean, spread = problem(layout, np.float64)
    options, var = {"axis": layout.axis, "eps": EPS}, np.abs(spread) + 0.1

    def backward(dy, x, gamma):
        if frozen:
            gradients = reference.normalize_backward(dy, x, mean, var, gamma, **options)
        else:
            gradients = reference.backward(dy, x, gamma, **options)
        return contracted(gradients, v, v_dgamma, v_dbeta)

    if frozen:
        got = bn.normalize_double_backward(
            v, dy, x, mean, var, gamma, v_dgamma=v_dgamma, v_dbeta=v_dbeta, **options
        )
    else:
        saved = saved_of(x, gamma, layout)
        got = bn.batch_norm_double_backward(v, dy, saved, v_dgamma=v_dgamma, v_dbeta=v_dbeta)
    rng = np.random.default_rng(1)
    for k, mine in enumerate(got):
        for _ in range(3):
            inputs = [dy, x, gamma]
            direction = rng.normal(size=inputs[k].shape)
            inputs[k] = inputs[k] + 1j * H * direction
            slope = backward(*inputs).imag / H
            scale = np.abs(mine * direction).sum()
            assert_within("complex step", np.float64, (mine * direction).sum(), slope, scale=scale)


def test_every_element_of_double_backward_equals_a_complex_step():
    rng = np.random.default_rng(3)
    x, dy, v = (rng.normal(size=(5, 2, 3)) for _ in range(3))
    gamma, w = np.array([2.0, -0.5]), np.array([0.3, 1.0])
    _, saved = bn.batch_norm(x, gamma, eps=EPS)
    got = bn.batch_norm_double_backward(v, dy, saved, v_dgamma=w)
    for at in np.ndindex(x.shape):
        step = np.zeros(x.shape, complex)
        step[at] = 1j * H
        by_x = contracted(reference.backward(dy, x + step, gamma, axis=1, eps=EPS), v, w, 0).imag / H
        by_dy = contracted(reference.backward(dy + step, x, gamma, axis=1, eps=EPS), v, w, 0).imag / H
        assert_within("complex step", np.float64, got.dx[at], by_x, scale=np.abs(got.dx).max())
        assert_within("complex step", np.float64, got.ddy[at], by_dy, scale=np.abs(got.ddy).max())


def test_float32_derivatives_keep_their_bounds(layout):
    x, dy, v, gamma, gamma_dot, beta_dot, *_ = problem(layout, np.float32)
    saved = saved_of(x, gamma, layout)
    wide = saved_of(x.astype(np.float64), gamma, layout)
    exact = bn.batch_norm_jvp(v.astype(np.float64), wide, gamma_dot=gamma_dot, beta_dot=beta_dot)
    xhat = np.abs(reference.forward(x, None, None, axis=layout.axis, eps=EPS).y)
    channel = lambda values: np.abs(reference.per_channel(values, x, layout.axis))
    axes = reference.other_axes(x, layout.axis)
    mean_of = lambda a: np.abs(a).mean(axes, keepdims=True)
    a = channel(saved.rstd * gamma)

    def along(t):
        return a * (np.abs(t) + mean_of(t) + xhat * mean_of(t * xhat))

    scale = along(v) + channel(gamma_dot) * xhat + channel(beta_dot)
    got = bn.batch_norm_jvp(v, saved, gamma_dot=gamma_dot, beta_dot=beta_dot)
    assert_within("dx", np.float32, got, exact, scale=scale)

    second = bn.batch_norm_double_backward(v, dy, saved, v_dgamma=gamma_dot, v_dbeta=beta_dot)
    exact2 = bn.batch_norm_double_backward(
        v.astype(np.float64), dy.astype(np.float64), wide, v_dgamma=gamma_dot, v_dbeta=beta_dot
    )
    assert_within("dx", np.float32, second.ddy, exact2.ddy, scale=scale)
    r = channel(saved.rstd)
    terms = np.abs(a * r) * (
        mean_of(dy * xhat) * (np.abs(v) + mean_of(v))
        + mean_of(v * xhat) * (np.abs(dy) + mean_of(dy))
        + 4 * xhat * (mean_of(v * dy) + mean_of(v) * mean_of(dy) + mean_of(v * xhat) * mean_of(dy * xhat))
    ) + channel(gamma_dot) * r * (np.abs(dy) + mean_of(dy) + mean_of(dy * xhat) * xhat)
    assert_within("second", np.float32, second.dx, exact2.dx, scale=terms)
    of_gamma = np.abs(saved.rstd) * (
        np.abs(v * dy).sum(axes) + (np.abs(v * xhat)).sum(axes) * mean_of(dy * xhat).ravel()
    )
    assert_within("second", np.float32, second.dgamma, exact2.dgamma, scale=of_gamma)


def test_derivatives_equal_those_of_autograd(layout):
    torch = pytest.importorskip("torch", reason="compares with PyTorch where it is installed")
    x, dy, v, gamma, v_dgamma, v_dbeta, *_ = problem(layout, np.float64)
    move = lambda a: torch.tensor(np.moveaxis(a, layout.axis, 1).copy(), requires_grad=True)
    tx, tdy, tv = move(x), move(dy), move(v)
    tgamma, tbeta = (
        torch.tensor(gamma, requires_grad=True),
        torch.zeros(gamma.size, dtype=torch.float64, requires_grad=True),
    )
    y = torch.nn.functional.batch_norm(tx, None, None, tgamma, tbeta, training=True, eps=EPS)
    first = torch.autograd.grad(y, (tx, tgamma, tbeta), tdy, create_graph=True)
    weights = tv, torch.tensor(v_dgamma), torch.tensor(v_dbeta)
    total = sum((f * w).sum() for f, w in zip(first, weights, strict=True))
    expected = torch.autograd.grad(total, (tdy, tx, tgamma))
    saved = saved_of(x, gamma, layout)
    got = bn.batch_norm_double_backward(v, dy, saved, v_dgamma=v_dgamma, v_dbeta=v_dbeta)
    for mine, theirs in zip(got, expected, strict=True):
        back = theirs.numpy() if mine.ndim == 1 else np.moveaxis(theirs.numpy(), 1, layout.axis)
        assert_within("torch", np.float64, mine, back, scale=np.abs(back).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threads_and_memory_order_change_no_bit(layout, dtype, threads):
    x, dy, v, gamma, w, *_ = problem(layout, dtype)
    saved = saved_of(x, gamma, layout)
    one = bn.batch_norm_double_backward(v, dy, saved, v_dgamma=w, num_threads=1)
    other = bn.batch_norm_double_backward(np.asfortranarray(v), dy, saved, v_dgamma=w, num_threads=threads)
    assert [a.tobytes() for a in one] == [a.tobytes() for a in other]
    y_dot = bn.batch_norm_jvp(v, saved, gamma_dot=w, num_threads=1)
    target = v.copy()
    assert bn.batch_norm_jvp(target, saved, gamma_dot=w, num_threads=threads, out=target) is target
    assert target.tobytes() == y_dot.tobytes()


def test_every_instruction_set_gives_the_same_bits_for_derivatives(isa, python_with_isa):
    code = """if True:
        import hashlib, numpy as np, batchnorm as bn
        rng, digest = np.random.default_rng(0), hashlib.sha256()
        for shape, axis in [((4, 5, 60, 7), 1), ((97, 33), 1), ((40, 9, 21), 2), ((6, 40, 9), 1)]:
            for dtype in (np.float32, np.float64):
                x, dy, v = (rng.normal(2, 3, shape).astype(dtype) for _ in range(3))
                gamma = rng.normal(size=shape[axis])
                _, saved = bn.batch_norm(x, gamma, axis=axis)
                parts = bn.batch_norm_double_backward(v, dy, saved, v_dgamma=gamma, v_dbeta=gamma)
                for part in (bn.batch_norm_jvp(v, saved, gamma_dot=gamma), *parts):
                    digest.update(part.tobytes())
        print(digest.hexdigest())
    """
    runs = [python_with_isa(name, code) for name in (isa, bn.available_isas()[-1])]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout


def test_only_what_is_needed_is_computed(layout):
    x, dy, v, gamma, *_ = problem(layout, np.float64)
    saved = saved_of(x, gamma, layout)
    whole = bn.batch_norm_double_backward(v, dy, saved)
    for k, name in enumerate(("dy", "x", "gamma")):
        part = bn.batch_norm_double_backward(v, dy, saved, needs=(name,))
        assert [p is not None for p in part] == [i == k for i in range(3)]
        assert part[k].tobytes() == whole[k].tobytes()


def test_an_empty_batch_has_empty_derivatives():
    x = np.zeros((0, 3))
    _, saved = bn.batch_norm(x)
    assert bn.batch_norm_jvp(x, saved).shape == (0, 3)
    second = bn.batch_norm_double_backward(x, x, saved)
    assert second.ddy.shape == second.dx.shape == (0, 3)
    assert second.dgamma.tolist() == [0, 0, 0]


def test_a_constant_channel_without_eps_has_no_slope():
    x = np.full((4, 1), 3.0)
    _, saved = bn.batch_norm(x, eps=0.0)
    assert (bn.batch_norm_jvp(np.arange(4.0).reshape(4, 1), saved) == 0).all()


def test_nested_use_beyond_the_second_order_raises():
    x = np.arange(6.0).reshape(3, 2)
    _, saved = bn.batch_norm(x)
    second = bn.batch_norm_double_backward(x, x, saved)
    for call in (
        lambda: bn.batch_norm_double_backward(x, x, second),
        lambda: bn.batch_norm_jvp(x, second),
        lambda: bn.batch_norm_jvp(x, bn.batch_norm_backward(x, saved)),
    ):
        with pytest.raises(NotImplementedError, match="derivatives beyond the second order"):
            call()
    for nested in (x + 0j, [[1.0, 2.0]]):
        with pytest.raises(TypeError, match="x_dot must"):
            bn.batch_norm_jvp(nested, saved)


def test_parts_of_a_batch_have_first_derivatives_only():
    x = np.arange(6.0).reshape(3, 2)
    _, saved = bn.batch_norm(x, mask=[True, True, False])
    with pytest.raises(NotImplementedError, match="without mask, weights, lengths or segments"):
        bn.batch_norm_jvp(x, saved)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"gamma_dot": [1.0]}, ValueError, "gamma_dot must have shape (2,), got (1,)"),
        ({"beta_dot": [1, 2]}, TypeError, "beta_dot must have a floating dtype, got int64"),
        ({"out": np.zeros((2, 2))}, ValueError, "out must have shape (3, 2), got (2, 2)"),
        ({"num_threads": 0}, ValueError, "num_threads must be an int >= 1 or None, got 0"),
    ],
)
def test_a_mistake_is_named(options, error, text):
    x = np.arange(6.0).reshape(3, 2)
    _, saved = bn.batch_norm(x)
    with pytest.raises(error) as caught:
        bn.batch_norm_jvp(x, saved, **options)
    assert str(caught.value) == text
    with pytest.raises(ValueError, match="needs must name some of 'dy', 'x', 'gamma', got 'beta'"):
        bn.batch_norm_double_backward(x, x, saved, needs=("beta",))
    with pytest.raises(ValueError, match="v_dx must have shape"):
        bn.batch_norm_double_backward(x[:2], x, saved)
