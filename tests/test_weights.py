"""What weights are: counts or importance, which decides an unbiased variance, in functions, layers and states."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest

import batchnorm as bn
from tolerances import assert_within

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (50, 3))
BATCHES = [RNG.normal(3, 2, (50, 1)) for _ in range(40)]


def normalized(dtype, seed):
    """Give weights that sum to 1 but for rounding."""
    w = np.random.default_rng(seed).random(50).astype(dtype)
    return w / w.sum()


def unbiased(x, w):
    """Give the unbiased variance of importance weights, each x - mean and sum in float64."""
    w = w.astype(np.float64)
    mean = (w[:, None] * x).sum(0) / w.sum()
    return (w[:, None] * (x - mean) ** 2).sum(0) / (w.sum() - (w * w).sum() / w.sum())


# ---- in the functions --------------------------------------------------------------------------------------


def test_importance_weights_have_the_unbiased_variance_of_their_ratios(dtype):
    x, w = X.astype(dtype), normalized(dtype, 1)
    exact = unbiased(x.astype(np.float64), w)
    for scale in (1.0, 0.5, 2.0**40, 2.0**-80):
        var = bn.moments(x, weights=w * dtype.type(scale)).var(1, weights_are="importance")
        assert_within("weighted", dtype, var, exact, scale=exact)


@pytest.mark.parametrize("ddof", [0, 1, 2])
def test_importance_weights_are_the_aweights_of_numpy(ddof):
    w = normalized(np.float64, 2)
    var = bn.moments(X, weights=w).var(ddof, weights_are="importance")
    expected = np.cov(X.T, aweights=w, ddof=ddof).diagonal()
    assert_within("oracles", np.float64, var, expected, scale=expected)


@pytest.mark.parametrize("ddof", [0, 1, 2])
def test_counts_are_repetitions(ddof):
    w = np.random.default_rng(3).integers(0, 4, 50)
    var = bn.moments(X, weights=w.astype(float)).var(ddof, weights_are="counts")
    expected = np.repeat(X, w, axis=0).var(0, ddof=ddof)
    assert_within("oracles", np.float64, var, expected, scale=expected)


def test_what_weights_are_must_be_said_where_it_decides():
    m = bn.moments(X, weights=normalized(np.float64, 1))
    text = r"weights_are must be 'counts' .* or 'importance' .* for ddof=1 and weights other than 0 and 1, .* got None"
    with pytest.raises(ValueError, match=text):
        m.var(1)
    with pytest.raises(ValueError, match=text):
        bn.update_running(np.zeros(3), np.ones(3), m)
    with pytest.raises(ValueError, match="weights_are must be 'counts' or 'importance', got 'importanc'"):
        m.var(1, weights_are="importanc")
    assert m.var(0).shape == bn.update_running(np.zeros(3), np.ones(3), m, ddof=0)[1].shape == (3,)


@pytest.mark.parametrize("kind", [{}, {"mask": np.arange(50) % 2 > 0}, {"weights": np.arange(50) % 2.0}])
def test_weights_of_0_and_1_are_counts_and_importance_alike(kind):
    m = bn.moments(X, **kind)
    for weights_are in ("counts", "importance"):
        assert m.var(1, weights_are=weights_are).tobytes() == m.var(1).tobytes()
    assert (m.importance_dof == m.count - 1).all()


def test_no_rounding_of_a_sum_decides_about_a_variance():
    m = bn.Moments(np.nextafter(1.0, 2.0), [0.0], [0.1])
    assert np.isnan(m.var(1)).all()
    with pytest.raises(ValueError, match="batch must have at least 2 values in every channel, got 1"):
        bn.update_running([0.0], [1.0], m)


def test_counts_that_sum_to_less_than_2_are_refused_by_name():
    m = bn.moments(X, weights=normalized(np.float64, 1))
    assert np.isnan(m.var(1, weights_are="counts")).all()
    text = r"weights must sum to at least 2 where they are counts and ddof=1 .*, got a sum of .* in channel 0"
    with pytest.raises(ValueError, match=text):
        bn.update_running(np.zeros(3), np.ones(3), m, weights_are="counts")


@pytest.mark.parametrize("weights_dtype", [np.float32, np.float64])
def test_counts_that_sum_to_about_2_are_refused_by_their_exact_sum_before_anything_is_written(dtype, weights_dtype):
    rng, x, refused = np.random.default_rng(2), X[:, :1].astype(dtype), 0
    for _ in range(300):
        w = rng.random(50).astype(weights_dtype)
        w *= weights_dtype(2) / w.sum()
        w[0] += rng.integers(-2, 3) * np.spacing(w[0])
        layer, out = bn.BatchNorm(1, weights_are="counts"), np.full_like(x, 7)
        try:
            layer(x, weights=w, out=out)
        except ValueError:
            refused += 1
            assert (out == 7).all()
            assert layer.update_count == 0
            assert math.fsum(w.astype(x.dtype)) < 2
        else:
            assert math.fsum(w.astype(x.dtype)) >= 2
    assert 0 < refused < 300


def test_a_weight_beside_which_others_vanish_leaves_the_exact_variance():
    m = bn.moments(np.array([[1.0], [3.0]]), weights=[1.0, 1e-30])
    assert m.importance_dof.tolist() == [2e-30]  # 2·w_1·w_2/sum(w)
    assert m.var(1, weights_are="importance").tolist() == [2.0]  # that of two values


@pytest.mark.parametrize("large, small", [(1e300, 1e-30), (1e308, 5e-324), (1.0, 5e-324)])
def test_two_weights_leave_an_unbiased_variance_however_far_apart_they_are(large, small):
    for weights in ([large, small], [small, large]):
        m = bn.moments(np.array([[1.0], [3.0]]), weights=weights)
        assert m.importance_dof.tolist() == [2 * small]  # 2·w_1·w_2/sum(w)
        parts = [bn.moments(np.array([[1.0]]), weights=[w]) for w in weights]
        assert (parts[0] | parts[1]).importance_dof.tolist() == [2 * small]
        layer = bn.BatchNorm(1, update_rate=1.0, weights_are="importance")
        layer(np.array([[1.0], [3.0]]), weights=weights)
        assert np.isfinite(layer.running_var).all()


def test_importance_dof_keeps_float64s_digits_over_all_scales():
    rng = np.random.default_rng(3)
    for spread in (1, 30, 300):
        w = 10.0 ** rng.uniform(-spread, 0, 40)
        exact = [Fraction(float(v)) for v in w]
        dof = sum(exact) - sum(v * v for v in exact) / sum(exact)
        found = bn.moments(np.zeros((40, 1)), weights=w).importance_dof[0]
        assert abs(Fraction(float(found)) / dof - 1) < Fraction(8, 2**53)


def test_one_weight_leaves_no_unbiased_variance():
    m = bn.moments(X, weights=np.arange(50) == 3.0) | bn.Moments.empty(3)
    assert np.isnan(m.var(1)).all()
    m = bn.moments(X, weights=np.where(np.arange(50) == 3, 0.5, 0))
    assert np.isnan(m.var(1, weights_are="importance")).all()
    with pytest.raises(ValueError, match="weights must be above 0 at 2 positions for ddof=1"):
        bn.update_running(np.zeros(3), np.ones(3), m, weights_are="importance")


@pytest.mark.parametrize("split", [1, 20, 49])
def test_merged_moments_keep_what_importance_divides_by(split):
    w = normalized(np.float64, 4)
    whole = bn.moments(X, weights=w)
    merged = bn.moments(X[:split], weights=w[:split]) | bn.moments(X[split:], weights=w[split:])
    assert_within("merge", np.float64, merged.importance_dof, whole.importance_dof, scale=1.0)
    var = whole.var(1, weights_are="importance")
    assert_within("merge", np.float64, merged.var(1, weights_are="importance"), var, scale=var)


def test_moments_with_weights_merge_with_those_without():
    w = np.concatenate([np.ones(20), normalized(np.float64, 5)[20:]])
    whole, parts = bn.moments(X, weights=w), (bn.moments(X[:20]), bn.moments(X[20:], weights=w[20:]))
    for merged in (parts[0] | parts[1], parts[1] | parts[0], bn.merge(bn.Moments.empty(3), *parts)):
        assert_within("merge", np.float64, merged.importance_dof, whole.importance_dof, scale=20.0)
    assert (bn.moments(X[:20]) | bn.moments(X[20:])).importance_dof.tolist() == [49.0] * 3


def test_moments_with_weights_are_copied_pickled_and_compared_whole():
    m = bn.moments(X, weights=normalized(np.float64, 1))
    for same in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert same == m
        assert hash(same) == hash(m)
        assert same.importance_dof.tobytes() == m.importance_dof.tobytes()
    given = bn.Moments(m.count, m.mean, m.m2, importance_dof=m.importance_dof)
    var = m.var(1, weights_are="importance")
    assert_within("merge", np.float64, given.var(1, weights_are="importance"), var, scale=var)
    assert bn.Moments(m.count, m.mean, m.m2) != given
    with pytest.raises(ValueError, match="importance_dof must be from 0 to count, got 2"):
        bn.Moments(1.0, [0.0, 0.0], [1.0, 1.0], importance_dof=[0.5, 2.0])


# ---- in the layer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.05, 1 / 50])
def test_a_layer_of_importance_weights_does_not_see_their_scale(scale):
    layer, plain = (
        bn.BatchNorm(3, weights_are="importance", update_rate=1.0),
        bn.BatchNorm(3, update_rate=1.0),
    )
    layer(X, weights=np.full(50, scale))
    plain(X)
    assert_within("oracles", np.float64, layer.running_var, plain.running_var, scale=plain.running_var)


@pytest.mark.parametrize("rate", [0.1, None])
def test_weights_that_sum_to_1_never_give_garbage(dtype, rate):
    for weights_are in ("importance", "counts", None):
        layer = bn.BatchNorm(1, weights_are=weights_are, update_rate=rate)
        for seed, x in enumerate(BATCHES):
            w = normalized(dtype, seed)
            if weights_are == "importance" or (weights_are == "counts" and rate is None):
                layer(x.astype(dtype), weights=w)
            else:
                out = np.full(x.shape, 9, dtype)
                with pytest.raises(ValueError, match=r"^weights"):
                    layer(x.astype(dtype), weights=w, out=out)
                assert (out == 9).all()
        assert (layer.running_var > 0.5).all()
        assert (layer.running_var < 8).all()
        assert layer.update_count in (0, len(BATCHES))


def test_a_layer_that_pools_importance_weights_has_the_exact_variance_of_all():
    layer = bn.BatchNorm(1, weights_are="importance", update_rate=None)
    w = [normalized(np.float64, seed) * (seed + 1) for seed in range(len(BATCHES))]
    for x, each in zip(BATCHES, w, strict=True):
        layer(x, weights=each)
    exact = unbiased(np.concatenate(BATCHES), np.concatenate(w))
    assert_within("oracles", np.float64, layer.running_var, exact, scale=exact)


@pytest.mark.parametrize("domains", [None, 2])
def test_the_state_of_pooled_importance_weights_goes_on_bit_for_bit(tmp_path, domains):
    settings = {"weights_are": "importance", "update_rate": None, "domains": domains}
    call = {} if domains is None else {"domain": 1}
    a, b = bn.BatchNorm(3, **settings), bn.BatchNorm(3, **settings)
    a(X, weights=normalized(np.float64, 1), **call)
    a.save(tmp_path / "state")
    b.load(tmp_path / "state")
    for layer in (a, b):
        layer(X * 2, weights=normalized(np.float64, 2), **call)
    assert a.running_var.tobytes() == b.running_var.tobytes()
    assert repr(a) == repr(b)
    bad = a.state_dict()
    bad["running_importance_dof"][-1] = 99
    with pytest.raises(ValueError, match="running_importance_dof must be from 0 to the count"):
        b.load_state_dict(bad)


def test_biased_statistics_need_no_word_about_weights():
    for weights_are in (None, "counts", "importance"):
        layer = bn.BatchNorm(3, ddof=0, update_rate=None, weights_are=weights_are)
        layer(X, weights=normalized(np.float64, 1))
        expected = bn.moments(X, weights=normalized(np.float64, 1)).var()
        assert (layer.running_var == expected).all()


def test_a_call_that_updates_nothing_needs_no_word_about_weights():
    layer, w = bn.BatchNorm(3), normalized(np.float64, 1)
    layer(X)
    layer(X, weights=w, update_stats=False)
    layer.report()
    layer.eval()(X, weights=w)
    assert layer.update_count == 1


def test_a_report_takes_importance_weights_for_as_many_values_as_they_are_worth():
    plain, weighted = (bn.BatchNorm(3, update_rate=1.0, weights_are=word) for word in (None, "importance"))
    x = np.random.default_rng(0).normal(size=(400, 3))
    plain(x)
    weighted(x, weights=np.full(400, 1 / 400))
    assert not plain.report()
    assert not weighted.report()
    weighted(x[:100], weights=np.full(100, 7.0))
    assert "few_values" in [f.kind for f in weighted.report()]


# ---- where nothing counts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_halves_and_whole_agree_where_nothing_counts(dtype, eps):
    x, gamma, beta, nothing = X.astype(dtype), np.full(3, 2.0), np.arange(3.0), np.zeros(50)
    y, saved = bn.batch_norm(x, gamma, beta, weights=nothing, eps=eps)
    m = bn.moments(x, weights=nothing)
    halves = bn.normalize(x, m.mean, m.var(), gamma, beta, eps=eps)
    assert halves.tobytes() == y.tobytes() == np.broadcast_to(beta, x.shape).astype(dtype).tobytes()
    assert saved.rstd.tolist() == [0, 0, 0]
    assert m.var().tolist() == [np.inf] * 3
    assert np.isnan(m.var(1)).all()


@pytest.mark.parametrize("padding", ["normalize", "zero"])
def test_gradients_through_weights_of_hardly_anything_are_those_of_ordinary_ones(padding):
    """A sum of weights below 1 leaves no more room for what is formed before a weight is applied."""
    x, dy = np.float32([[5], [6], [-1]]), np.full((3, 1), 2, np.float32)
    gamma = np.array([1e7])

    def dx(dtype, tiny):
        weights = np.array([2, 2, 0], dtype) * dtype(tiny)
        _, saved = bn.batch_norm(x.astype(dtype), gamma, weights=weights, padding=padding)
        return bn.backward(dy.astype(dtype), saved).dx

    wanted = dx(np.float64, 1)
    assert_within("weighted dx", "float32", dx(np.float32, 1e-30), wanted, scale=np.abs(wanted).max())
