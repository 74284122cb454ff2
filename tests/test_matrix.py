"""Every combination of options and every verb equals the composition of its steps (tests/matrix.py lists them)."""

import dataclasses
import pickle

import ml_dtypes
import numpy as np
import pytest

import batchnorm as bn
import matrix
import reference

EPS = 1e-3
ROWS, CHANNELS, STEPS = SHAPE = (7, 4, 4)
IDS = np.array([0, 0, 1, 1, 1, 3, 3])
GHOST = 4
GROUPS = 2
# Of composed float64 sums of 28 values near 1, whose own oracle rounds as often; second derivatives by differences of
# 1e-5 are known to about 1e-9.
CLOSE, BY_DIFFERENCES = 1e-11, 1e-7

# By which the two values of samples of that length lie far enough apart for differences.
rng = np.random.default_rng(9)
X, DY, V, RESIDUAL, X_DOT, RESIDUAL_DOT, V_RESIDUAL = (rng.normal(0.5, 1, SHAPE) for _ in range(7))
GAMMA = np.array([1.5, -0.7, 0.4, 2.1])
BETA, GAMMA_DOT, BETA_DOT, V_GAMMA, V_BETA, MEAN, MEAN_DOT = (rng.normal(size=CHANNELS) for _ in range(7))
ALPHA, ALPHA_DOT, V_ALPHA = np.array([[0.3, 1.0, -0.5, 1.7], [0.2, -1.0, 0.4, 0.7], [1.1, 0.6, -0.9, 0.3]])
VAR, VAR_DOT = rng.uniform(0.5, 2, (2, CHANNELS))
LENGTHS = np.array([4, 0, 2, 3, 4, 2, 4])
MASK = rng.random((ROWS, STEPS)) < 0.7
MASK[:, :2] = True
MASK[1] = False
WEIGHTS = np.where(MASK, rng.uniform(0.3, 2, MASK.shape), 0)
RENORM = bn.Renorm(MEAN, VAR, 1.3, 0.4)

cases = pytest.mark.parametrize("case", matrix.CASES, ids=lambda c: c.id)


def with_verb(verb):
    return pytest.mark.parametrize("case", [case for case, v in matrix.COMBINATIONS if v == verb], ids=lambda c: c.id)


def options_of(case):
    """Give the keywords of a combination, but for `out`."""
    counts = {"mask": MASK, "weights": WEIGHTS, "lengths": LENGTHS}
    options = {"eps": EPS, "keep": case.kept[0]}
    if case.counts != "all":
        options |= {case.counts: counts[case.counts], "padding": case.padding}
    if case.shares in ("segments", "ghosts"):
        options |= {"segments": IDS} if case.shares == "segments" else {"ghost_size": GHOST}
    if case.statistics == "renorm":
        options["renorm"] = RENORM
    if "residual" in case.follows:
        options["residual"] = RESIDUAL
    if "relu" in case.follows:
        options["activation"] = "relu"
    return options


def run(case, x=X, residual=RESIDUAL, laid=np.copy):
    """Give y and what is saved."""
    x = laid(x)
    options = options_of(case) | ({"out": x} if case.kept == "y in place" else {})
    if "residual" in options:
        options["residual"] = residual.astype(x.dtype)
    if case.statistics == "given":
        return bn.normalize(x, MEAN, VAR, GAMMA, BETA, save=True, **options)
    if case.shares in matrix.GROUPS:
        grouping = "contiguous" if case.shares == "groups" else "strided"
        return bn.group_norm(x, GROUPS, GAMMA, BETA, grouping=grouping, **options)
    if case.shares == "graphs":
        return bn.graph_norm(x, GAMMA, BETA, ALPHA, segments=IDS, **options)
    if case.shares in matrix.LINES:
        function = bn.layer_norm if case.shares == "lines" else bn.rms_norm
        return function(x, GAMMA, BETA, axes=1, **options)
    function = bn.instance_norm if case.shares == "instances" else bn.batch_norm
    return function(x, GAMMA, BETA, **options)


def width_of(case):
    return CHANNELS // GROUPS if case.shares in matrix.GROUPS else CHANNELS if case.shares in matrix.LINES else 1


def composed(case):
    """Give the oracle of a combination, r, d and what passes ReLU being constants, and its residual."""
    weights = {
        "all": np.ones((ROWS, STEPS)),
        "mask": MASK.astype(float),
        "weights": WEIGHTS,
        "lengths": (np.arange(STEPS) < LENGTHS[:, None]).astype(float),
    }[case.counts]
    lines = [np.s_[n : n + 1, :, i : i + 1] for n in range(ROWS) for i in range(STEPS)]
    if case.shares in matrix.LINES:
        weights = (weights > 0).astype(float)
    sets = {
        "batch": [slice(0, ROWS)],
        "segments": [slice(0, 2), slice(2, 5), slice(5, 5), slice(5, 7)],
        "graphs": [slice(0, 2), slice(2, 5), slice(5, 5), slice(5, 7)],
        "ghosts": [slice(0, 4), slice(4, 7)],
        "instances": [slice(n, n + 1) for n in range(ROWS)],
        "groups": [slice(n, n + 1) for n in range(ROWS)],
        "strided groups": [slice(n, n + 1) for n in range(ROWS)],
        "lines": lines,
        "lines about 0": lines,
    }[case.shares]
    given = (MEAN, VAR) if case.statistics == "given" else None
    of = reference.Composed(weights, case.padding, sets, EPS, given, relu="relu" in case.follows, width=width_of(case))
    of = of._replace(about_zero=case.shares == "lines about 0", alpha=ALPHA if case.shares == "graphs" else None)
    of = of._replace(strided=case.shares == "strided groups")
    if case.statistics == "renorm":
        sigma = np.sqrt(VAR + EPS)
        r = [
            np.clip(np.sqrt(var + EPS) / sigma, 1 / 1.3, 1.3) if n else np.ones(CHANNELS)
            for n, _, var in of.statistics(X)
        ]
        d = [np.clip((mean - MEAN) / sigma, -0.4, 0.4) if n else np.zeros(CHANNELS) for n, mean, _ in of.statistics(X)]
        of = of._replace(r=r, d=d)
    residual = RESIDUAL if "residual" in case.follows else np.zeros(SHAPE)
    return of._replace(passes=of(X, GAMMA, BETA, residual)[0] > 0), residual


def along(
    case,
    x=X,
    gamma=GAMMA,
    alpha=ALPHA,
    *,
    x_dot=0,
    gamma_dot=0,
    beta_dot=0,
    residual_dot=0,
    mean_dot=0,
    var_dot=0,
    alpha_dot=0,
):
    """Give the derivative of y along tangents, by a complex step."""
    of, residual = composed(case)
    h = 1e-100
    if of.alpha is not None:
        of = of._replace(alpha=alpha + 1j * h * alpha_dot)
    if of.given is not None:
        of = of._replace(given=(MEAN + 1j * h * mean_dot, VAR + 1j * h * var_dot))
    if case.follows in ("nothing", "relu"):
        residual_dot = 0
    _, y = of(
        x + 1j * h * x_dot,
        gamma + 1j * h * gamma_dot,
        BETA + 1j * h * beta_dot,
        residual + 1j * h * residual_dot,
    )
    return y.imag / h


def assert_close(got, want, close=CLOSE):
    np.testing.assert_allclose(got, want, rtol=close, atol=close * max(1.0, np.abs(want).max(initial=0)))


@cases
def test_the_forward_call_is_the_composition_of_its_steps(case):
    y, saved = run(case)
    of, residual = composed(case)
    assert_close(y, of(X, GAMMA, BETA, residual)[1])
    if case.statistics != "given":
        count, mean, var = (np.array(values) for values in zip(*of.statistics(X), strict=True))
        width = width_of(case)
        first = slice(CHANNELS // width) if of.strided else slice(None, None, width)  # channels of groups
        assert_close(saved.moments.count, np.repeat(count, CHANNELS // width))
        assert_close(saved.moments.mean, mean[:, first].ravel())
        nothing = np.repeat(count, CHANNELS // width) == 0
        assert_close(np.where(nothing, 0, saved.moments.var()), var[:, first].ravel())


@with_verb("backward")
def test_backward_is_the_transpose_of_the_derivative(case):
    _, saved = run(case)
    got = bn.backward(DY, saved)
    assert_close((got.dgamma * GAMMA_DOT).sum(), (DY * along(case, gamma_dot=GAMMA_DOT)).sum())
    assert_close((got.dbeta * BETA_DOT).sum(), (DY * along(case, beta_dot=BETA_DOT)).sum())
    if case.shares == "graphs":
        assert_close((got.dalpha * ALPHA_DOT).sum(), (DY * along(case, alpha_dot=ALPHA_DOT)).sum())
    for tangent in (X_DOT, V):
        assert_close((got.dx * tangent).sum(), (DY * along(case, x_dot=tangent)).sum())
    if "residual" in case.follows:
        assert_close(got.dresidual, DY * along(case, residual_dot=np.ones(SHAPE)))
    else:
        assert got.dresidual is None


@with_verb("jvp")
def test_jvp_is_the_derivative_along_tangents(case):
    _, saved = run(case)
    dots = {"gamma_dot": GAMMA_DOT, "beta_dot": BETA_DOT}
    if case.statistics == "given":
        dots |= {"mean_dot": MEAN_DOT, "var_dot": VAR_DOT}
    if "residual" in case.follows:
        dots["residual_dot"] = RESIDUAL_DOT
    if case.shares == "graphs":
        dots["alpha_dot"] = ALPHA_DOT
    assert_close(bn.jvp(X_DOT, saved, **dots), along(case, x_dot=X_DOT, **dots))


@with_verb("double_backward")
def test_double_backward_differentiates_backward(case):
    """Of sum(v·dx) + sum(v_dgamma·dgamma) + ... = sum(dy·y') along v, v_dgamma, ..., by dy, x and gamma."""
    _, saved = run(case)
    vs = {"v_dgamma": V_GAMMA, "v_dbeta": V_BETA}
    tangents = {"x_dot": V, "gamma_dot": V_GAMMA, "beta_dot": V_BETA, "residual_dot": V_RESIDUAL}
    if "residual" in case.follows:
        vs["v_dresidual"] = V_RESIDUAL
    if case.shares == "graphs":
        vs["v_dalpha"] = tangents["alpha_dot"] = V_ALPHA
    got = bn.double_backward(V, DY, saved, **vs)
    assert_close(got.ddy, along(case, **tangents))
    h = 1e-5

    def difference(**step):
        return sum(
            sign * (DY * along(case, **{n: a + sign * h * b for n, (a, b) in step.items()}, **tangents)).sum()
            for sign in (1, -1)
        ) / (2 * h)

    assert_close((got.dx * X_DOT).sum(), difference(x=(X, X_DOT)), BY_DIFFERENCES)
    assert_close((got.dgamma * GAMMA_DOT).sum(), difference(gamma=(GAMMA, GAMMA_DOT)), BY_DIFFERENCES)
    if case.shares == "graphs":
        assert_close((got.dalpha * ALPHA_DOT).sum(), difference(alpha=(ALPHA, ALPHA_DOT)), BY_DIFFERENCES)


@with_verb("halves")
def test_halves_have_the_bits_of_the_whole(case):
    _, saved = run(case)
    counted = {
        n: a for n, a in options_of(case).items() if n in ("mask", "weights", "lengths", "segments", "ghost_size")
    }
    if case.shares == "instances":
        counted["ghost_size"] = 1
    if case.shares in matrix.GROUPS:
        counted |= {"num_groups": GROUPS, "grouping": "contiguous" if case.shares == "groups" else "strided"}
    if case.shares in matrix.LINES:
        counted["axes"] = 1
    if case.shares == "graphs":
        counted["segments"] = IDS
    assert bn.moments(X, **counted) == saved.moments
    sums = bn.grad_sums(DY, saved)
    whole = bn.backward(DY, saved)
    assert bn.grad_input(DY, saved, sums).tobytes() == whole.dx.tobytes()
    if case.shares in matrix.LINES:  # of gamma·dy, as ReLU lets it through, where a position counts
        of, _ = composed(case)
        passes = of.counted & (of.passes if of.relu else True)
        assert_close(sums.sum_dy, np.where(passes, DY * GAMMA[:, None], 0).sum(1).ravel())
    else:
        assert_close(sums.sum_dy.reshape(-1, CHANNELS).sum(0), whole.dbeta)
    twice = sum([sums, sums])
    assert (twice.sum_dy == 2 * sums.sum_dy).all()


@with_verb("update_running")
@pytest.mark.parametrize("segments", ["each", "pooled"])
def test_running_statistics_follow_each_set_or_all(case, segments):
    _, saved = run(case)
    of, _ = composed(case)
    of_sets = of.statistics(X)
    if segments == "pooled":
        of_sets = of._replace(sets=[slice(0, ROWS)]).statistics(X)
    mean, var = MEAN, VAR
    rate, renorms = 0.25, case.statistics == "renorm"
    for count, batch_mean, batch_var in of_sets:
        if count:
            mean = reference.running_update(mean, batch_mean, rate)
            if renorms:
                var = reference.running_update(np.sqrt(var + EPS), np.sqrt(batch_var + EPS), rate) ** 2 - EPS
            else:
                var = reference.running_update(var, batch_var, rate)
    ddof = {} if renorms else {"ddof": 0}
    got = bn.update_running(MEAN, VAR, saved, update_rate=rate, segments=segments, **ddof)
    assert_close(got[0], mean)
    assert_close(got[1], var)


@cases
def test_out_takes_results_and_what_was_saved_can_be_replaced(case):
    _, saved = run(case)
    kept = saved.x if saved.y is None else saved.y
    moved = dataclasses.replace(saved, **{"x" if saved.y is None else "y": kept.copy()})
    whole = bn.backward(DY, saved)
    for dx, dresidual in ((DY.copy(), None), (np.empty(SHAPE), np.empty(SHAPE))):
        dy = dx if dresidual is None else DY
        if dresidual is None:
            dy[...] = DY
        got = bn.backward(dy, moved, out=(dx, dresidual))
        assert got.dx is dx
        for name in ("dx", "dgamma", "dbeta"):
            assert getattr(got, name).tobytes() == getattr(whole, name).tobytes()
        if whole.dresidual is not None:
            assert got.dresidual.tobytes() == whole.dresidual.tobytes()


@cases
def test_what_is_asked_for_has_the_same_bits_without_the_rest(case):
    _, saved = run(case)
    whole = bn.backward(DY, saved)
    for needs in (("residual",), ("x",), ("gamma", "residual"), ("beta",), ()):
        got = bn.backward(DY, saved, needs=needs)
        for name in ("x", "gamma", "beta", "residual"):
            wanted, found = getattr(whole, f"d{name}"), getattr(got, f"d{name}")
            assert (found is None) == (wanted is None or name not in needs)
            if found is not None:
                assert found.tobytes() == wanted.tobytes(), (needs, name)


@cases
def test_what_was_saved_may_be_pickled(case):
    _, saved = run(case)
    other = pickle.loads(pickle.dumps(saved))
    for name in ("dx", "dgamma", "dbeta"):
        assert getattr(bn.backward(DY, other), name).tobytes() == getattr(bn.backward(DY, saved), name).tobytes()
    assert bn.jvp(X_DOT, other).tobytes() == bn.jvp(X_DOT, saved).tobytes()
    assert bn.double_backward(V, DY, other).dx.tobytes() == bn.double_backward(V, DY, saved).dx.tobytes()


@pytest.mark.parametrize(
    "laid",
    [
        lambda a: a.copy("F"),
        lambda a: np.repeat(a, 2, axis=2)[:, :, ::2],
        lambda a: a[:, ::-1].copy()[:, ::-1],
    ],
    ids=["fortran", "gaps", "reversed"],
)
@cases
def test_however_x_lies_in_memory_the_results_are_those_of_a_copy(case, laid):
    (y, saved), (other, of_laid) = run(case), run(case, laid=laid)
    assert_close(other, y)
    whole, got = bn.backward(DY, saved), bn.backward(laid(DY), of_laid)
    for name in ("dx", "dgamma", "dbeta", "dresidual"):
        if getattr(whole, name) is None:
            assert getattr(got, name) is None
        else:
            assert_close(getattr(got, name), getattr(whole, name))
    assert_close(bn.jvp(laid(X_DOT), of_laid), bn.jvp(X_DOT, saved))
    assert_close(bn.double_backward(V, laid(DY), of_laid).dx, bn.double_backward(V, DY, saved).dx)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=lambda t: t.__name__)
@pytest.mark.parametrize("case", [c for c in matrix.CASES if c.follows != "nothing"], ids=lambda c: c.id)
def test_what_follows_has_the_bits_of_the_steps_one_after_another(case, dtype):
    """In float32, rounded once more in 16 bits."""
    wide, residual = X.astype(dtype).astype(np.float32), RESIDUAL.astype(dtype)
    plain = case._replace(follows="nothing")
    steps, _ = run(plain, wide)
    of, _ = composed(plain)
    if "residual" in case.follows:
        steps = np.where(of.counted, steps + residual.astype(np.float32), steps)
    if "relu" in case.follows:
        steps = np.where(of.counted & (steps <= 0), np.float32(0), steps)
    y, _ = run(case, X.astype(dtype), residual=residual)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.astype(np.float32), steps.astype(dtype).astype(np.float32))


def test_the_page_of_combinations_is_the_list():
    assert matrix.PAGE.read_text() == matrix.table()
