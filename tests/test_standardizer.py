"""Standardizer: what it learns of streams and tables, and that scikit-learn takes it for one of its own."""

import copy
import importlib.util
import os
import pickle
import subprocess
import sys
from decimal import Decimal, localcontext
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import batchnorm as bn
from batchnorm import Standardizer, _core
from tolerances import TABLE, UNIT_ROUNDOFF

OFFSETS = (0.0, 1.0, 1e3, 1e8)
CUTS = ("one", "sevens", "whole")
RATES = (None, 0.0, 0.05, 0.999, 1.0)


def table(n, features, offset=0.0, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return (offset + rng.standard_normal((n, features)) * 2.0 ** np.arange(features)).astype(dtype)


def pieces(x, cut):
    return list(x) if cut == "one" else [x[at : at + 7] for at in range(0, len(x), 7)] if cut == "sevens" else [x]


def learned(x, cut="whole", **parameters):
    norm = Standardizer(x.shape[1], **parameters)
    for piece in pieces(x, cut):
        norm(piece)
    return norm


def exact(values, rate=None, weights=None):
    """Give count, mean and var of the values of one feature, oldest first, by the definition."""
    keep = Fraction(1) if rate is None else Fraction(1.0 - rate)
    found = [(Fraction(float(v)), Fraction(1)) for v in values if not np.isnan(v)]
    if weights is not None:
        found = [
            (Fraction(float(v)), Fraction(float(w)))
            for v, w in zip(values, weights, strict=True)
            if w and not np.isnan(v)
        ]
    found = [(v, w * keep ** (len(found) - 1 - k)) for k, (v, w) in enumerate(found)]
    count = sum(w for _, w in found)
    mean = sum(v * w for v, w in found) / count
    return count, mean, sum(w * (v - mean) ** 2 for v, w in found) / count


def root(value):
    with localcontext(prec=60):
        return Fraction((Decimal(value.numerator) / Decimal(value.denominator)).sqrt())


def assert_learned(norm, x, rate=None, weights=None):
    for c in range(x.shape[1]):
        count, mean, var = exact(x[:, c], rate, weights)
        quantity, share = ("pooled", 1) if rate is None else ("exponential", max(rate, 1 / len(x)))
        relative = Fraction(TABLE[quantity, "float64"].relative) / Fraction(share)
        spread = 0 if rate is None and x.dtype == np.float64 else root(var)
        assert abs(Fraction(norm.moments.count[c]) - count) <= relative * count
        assert abs(Fraction(norm.mean_[c]) - mean) <= relative * (abs(mean) + spread)
        far = 0 if rate is None else root(var) * Fraction(float(np.nanmax(np.abs(x[:, c]))))
        assert abs(Fraction(norm.var_[c]) - var) <= relative * (var + far)


# ---- what is learned -------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pooled_statistics_are_exact_to_1e_15_however_the_stream_is_cut(cut, offset, dtype):
    x = table(500, 3, offset, dtype=dtype)
    assert_learned(learned(x, cut), x)


@pytest.mark.parametrize("rate", RATES[1:])
@pytest.mark.parametrize("cut", CUTS)
def test_exponential_statistics_weight_each_value_by_the_values_after_it(cut, rate):
    x = table(60, 2, 1e3)
    assert_learned(learned(x, cut, update_rate=rate), x, rate)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("cut", CUTS)
def test_a_missing_cell_changes_nothing_of_its_feature_and_all_of_others(cut, rate):
    x = table(60, 3, 10.0)
    x[np.random.default_rng(1).random(x.shape) < 0.3] = np.nan
    assert_learned(learned(x, cut, update_rate=rate), x, rate)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("rows", [1, 40])
def test_a_mask_says_the_same_as_missing_cells(rows, rate):
    x, there = table(rows, 3), np.random.default_rng(1).random((rows, 3)) < 0.6
    by_mask, by_nan = Standardizer(3, update_rate=rate), Standardizer(3, update_rate=rate)
    for norm in (by_mask, by_nan):
        norm(table(5, 3, seed=2))
    y = by_mask(np.where(there, x, np.inf), mask=there)
    z = by_nan(np.where(there, x, np.nan))
    assert by_mask.moments == by_nan.moments
    np.testing.assert_array_equal(y[there], z[there])
    assert np.isinf(y[~there]).all()


@pytest.mark.parametrize("rate", RATES)
def test_weights_of_observations_are_weights_of_values(rate):
    x, weights = table(40, 2, 5.0), np.random.default_rng(1).integers(0, 4, 40) / 2
    x[::3, 0] = np.nan
    norm = Standardizer(2, update_rate=rate)
    norm(x, weights=weights)
    assert_learned(norm, x, rate, weights)


def test_importance_dof_of_exponential_statistics_is_that_of_their_weights():
    weights = 0.9 ** np.arange(30)
    expected = weights.sum() - (weights**2).sum() / weights.sum()
    for cut in CUTS:
        got = learned(table(30, 2), cut, update_rate=0.1).moments.importance_dof
        np.testing.assert_allclose(got, expected, rtol=1e-13)


def test_moments_of_workers_merge_into_those_of_one():
    x = table(90, 3, 1e4)
    parts = [learned(part).moments for part in np.split(x, 3)]
    norm = Standardizer(3)
    norm.moments = bn.merge(*parts)
    assert_learned(norm, x)
    assert norm.moments == bn.merge(*parts)


def test_16_bit_observations_are_learned_as_they_are():
    for dtype in (np.float16, ml_dtypes.bfloat16):
        x = table(30, 2, dtype=dtype)
        for cut in CUTS:
            norm = learned(x, cut)
            assert_learned(norm, x.astype(np.float64))
            assert norm(x[0]).dtype == dtype


# ---- y ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", OFFSETS[:3])
@pytest.mark.parametrize("cut", ["one", "whole"])
def test_y_keeps_the_bound_of_the_contract(cut, offset, dtype):
    x, u = table(50, 2, offset, dtype=dtype), Fraction(UNIT_ROUNDOFF[np.dtype(dtype).name])
    norm = learned(x).eval()
    y = np.stack([norm(row) for row in pieces(x, cut)]).reshape(x.shape)
    for c in range(2):
        _, mean, var = exact(x[:, c])
        wanted = [(Fraction(float(v)) - mean) / root(var) for v in x[:, c]]
        largest = max(map(abs, wanted))
        for got, want in zip(y[:, c], wanted, strict=True):
            assert abs(Fraction(float(got)) - want) <= 3 * u * largest + u * abs(want)


def test_a_call_learns_before_it_normalizes():
    norm = Standardizer(1)
    assert norm(np.array([3.0]))[0] == 0
    assert norm(np.array([5.0]))[0] == 1


def test_evaluation_learns_nothing():
    norm = learned(table(9, 2)).eval()
    before = norm.moments
    for x in (table(1, 2)[0], table(3, 2)):
        norm(x)
    assert norm.moments is not before
    assert norm.moments == before
    assert not norm.training
    assert norm.train().training


def test_evaluation_takes_nothing_back_of_what_others_learn_meanwhile():
    norm = Standardizer(2).fit(table(4, 2)).eval()

    class Learning:
        def __array__(self, dtype=None, copy=None):
            norm.partial_fit(table(3, 2))
            return np.ones((5, 2), bool)

    norm(table(5, 2), mask=Learning())
    np.testing.assert_array_equal(norm.moments.count, [7, 7])


def test_what_learns_nothing_does_not_make_it_fitted():
    norm = Standardizer()
    norm.eval()(np.ones(3))
    norm.train()(np.ones((0, 2)))
    with pytest.raises(ValueError, match="must have seen data"):
        norm.transform(np.ones((1, 3)))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0), (2, 0, 0)])
def test_no_features_are_no_error(shape):
    assert Standardizer(0)(np.zeros(shape)).shape == Standardizer().eval()(np.zeros(shape)).shape == shape


def test_limits_and_eps_at_the_end_of_their_range_are_no_harm():
    x = table(100, 1)
    for dtype in (np.float16, np.float32):
        assert np.isfinite(Standardizer(clip=1e300)(x.astype(dtype))).all()
    norm = Standardizer(1, eps=1e307)
    norm(x)
    np.testing.assert_allclose(norm.inverse(np.array([1.0])), np.sqrt(1e307) + norm.mean_, rtol=1e-12)
    np.testing.assert_allclose(norm.eval()(np.array([1e155])), 1e155 / np.sqrt(1e307), rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_feature_of_one_value_is_only_centred_and_an_unseen_one_is_left(rows):
    norm = Standardizer(3)
    norm(np.array([[4.0, np.nan, 1.0], [4.0, np.nan, 3.0]]))
    np.testing.assert_array_equal(norm.eval()(np.full((rows, 3), 6.0)), np.full((rows, 3), [2.0, 6.0, 4.0]))
    np.testing.assert_array_equal(norm.scale_, [1, 1, 1])
    assert np.isnan(norm.mean_[1])


@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("parameters", [{"center": False}, {"scale": False}, {"eps": 0.5}, {"clip": 0.25}])
def test_parameters_say_what_y_is(rows, parameters):
    x = table(50, 3, 2.0)
    y = learned(x, **parameters).eval()(x[:rows])
    told = {"center": True, "scale": True, "eps": 0.0, "clip": np.inf} | parameters
    mean = x.mean(axis=0) if told["center"] else 0
    scale = np.sqrt(x.var(axis=0) + told["eps"]) if told["scale"] else 1
    expected = np.clip((x[:rows] - mean) / scale, -told["clip"], told["clip"])
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rows", [1, 4])
def test_missing_cells_are_kept_or_zero_in_y(rows):
    x = table(rows, 3)
    x[:, 1] = np.nan
    there = np.array([True, True, False])
    for missing, at in (("keep", [np.nan, 7.0]), ("zero", [0.0, 0.0])):
        norm = learned(table(20, 3), missing=missing)
        y = norm(np.where(there, x, 7.0), mask=np.broadcast_to(there, x.shape))
        np.testing.assert_array_equal(y[:, 1:], np.full((rows, 2), at))
        assert np.isfinite(y[:, 0]).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 5, 3), (0, 3)])
def test_any_axes_come_before_features(shape, dtype):
    x = table(np.prod(shape[:-1], dtype=int), 3, dtype=dtype).reshape(shape)
    one, other = Standardizer(3), Standardizer(3)
    y = one(x)
    assert (y.shape, y.dtype) == (shape, dtype)
    np.testing.assert_array_equal(other(x.reshape(-1, 3)).reshape(shape), y)
    assert one.moments == other.moments
    out = np.array(x)
    assert Standardizer()(out, out=out) is out
    np.testing.assert_array_equal(out, y)


@pytest.mark.parametrize("rate", (None, 0.05))
def test_an_observation_that_lies_otherwise_in_memory_has_the_same_bits(rate):
    x, wide = table(20, 3), np.empty((20, 6))
    wide[:, ::2] = x
    one, other, third = (Standardizer(3, update_rate=rate) for _ in range(3))
    for k in range(20):
        y = one(x[k])
        assert other(wide[k, ::2]).tobytes() == y.tobytes() == third(x[k], mask=np.ones(3, bool)).tobytes()
    assert one.moments == other.moments == third.moments


def test_what_is_no_ordinary_observation_is_left_to_the_general_way():
    known, how = (np.zeros((2, 5)), None), (1.0, 0.0, np.inf, True, True, np.nan, True)
    assert _core.try_observe(known, np.ones(2), how) is not None
    for x in (
        None,
        [1.0, 2.0],
        np.ones(3),
        np.ones((2, 1)),
        np.ones((2, 2)),
        np.ones(2, ">f8"),
        np.array([1.0, np.inf]),
    ):
        assert _core.try_observe(known, x, how) is None
    for bad in ((np.zeros((3, 5)), None), (np.zeros((2, 5)), np.zeros(3)), (np.zeros((2, 5)),), None):
        assert _core.try_observe(bad, np.ones(2), how) is None
    for at, value in ((0, 2.0), (0, 1), (1, -1.0), (2, 0.0), (2, "x"), (5, None)):
        assert _core.try_observe(known, np.ones(2), (*how[:at], value, *how[at + 1 :])) is None
    assert _core.try_observe(known, np.ones(2), how[:6]) is None
    assert not known[0].any()


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads):
    x = table(30000, 8, 100.0, dtype=np.float32)
    x[::5, 3] = np.nan
    one, many = Standardizer(num_threads=1), Standardizer(num_threads=threads)
    assert one(x).tobytes() == many(x).tobytes()
    assert one.moments == many.moments


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_observation_alone_has_the_bits_that_it_has_among_others(dtype):
    x = table(50, 5, 3.0, dtype=dtype)
    norm = learned(x, clip=1.0).eval()
    y = norm(x)
    for k in range(50):
        assert (
            norm(x[k]).tobytes()
            == norm(x[k : k + 1]).tobytes()
            == norm.transform(x[k : k + 1]).tobytes()
            == y[k].tobytes()
        )


def test_inverse_gives_x_back():
    for dtype, u in ((np.float32, 2.0**-24), (np.float64, 2.0**-53)):
        x = table(40, 3, 50.0, dtype=dtype)
        for parameters in ({}, {"eps": 0.1}, {"center": False}, {"scale": False}):
            norm = learned(x, **parameters)
            y = norm.eval()(x)
            np.testing.assert_allclose(norm.inverse(y), x, rtol=16 * u, atol=16 * u * np.abs(x).max())
            back = norm.inverse(y[0], out=y[0])
            assert back.base is y
            np.testing.assert_array_equal(norm.inverse(norm(x[0])), back)


# ---- errors and state ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda n: n([1.0, 2.0]), TypeError, "x must be a numpy.ndarray"),
        (lambda n: n(np.ones(3)), ValueError, r"x must have 2 features on its last axis, got shape \(3,\)"),
        (lambda n: n(np.array([1.0, -np.inf])), ValueError, "x must be finite or NaN, which is missing, got -inf in feature 1"),
        (lambda n: n(np.array([[1.0, np.inf]] * 2)), ValueError, "got inf in feature 1"),
        (lambda n: n(np.array([1.5e308, 1.0])), ValueError, "values of feature 0 whose moments leave float64"),
        (lambda n: n(np.ones(2), mask=np.ones(3, bool)), ValueError, r"mask must have shape \(2,\), that of x, got \(3,\)"),
        (lambda n: n(np.ones(2), mask=[1, 0]), TypeError, "mask must have bools"),
        (lambda n: n(np.ones((3, 2)), weights=[1.0]), ValueError, r"weights must have shape \(3,\)"),
        (lambda n: n(np.ones((2, 2)), weights=[1.0, -1.0]), ValueError, "weights must be finite and >= 0, got -1.0"),
        (lambda n: n.eval()(np.ones((1, 2)), weights=[1.0]), ValueError, "weights must be None in evaluation"),
        (lambda n: n(np.ones(2), out=np.ones(3)), ValueError, "out must have shape"),
        (lambda n: n.set_params(clip=0.0)(np.ones(2)), ValueError, "clip must be above 0, or None, got 0.0"),
        (lambda n: n.set_params(update_rate=2)(np.ones(2)), ValueError, "update_rate must be from 0 to 1, got 2"),
        (lambda n: n.set_params(missing="drop")(np.ones(2)), ValueError, "missing must be 'keep' or 'zero', got 'drop'"),
        (lambda n: n.set_params(with_std=1), ValueError, "parameters must be of features, update_rate"),
        (lambda n: n.inverse(np.ones(3)), ValueError, "y must have 2 features on its last axis"),
        (lambda n: setattr(n, "moments", bn.Moments.empty(3)), ValueError, "moments must be of 2 features, got 3"),
        (lambda n: setattr(n, "moments", 1.0), TypeError, "moments must be Moments, got float"),
        (lambda n: n.load_state_dict({}), ValueError, "state must have the settings"),
        (lambda n: n.load_state_dict(learned(table(3, 2), eps=1.0).state_dict()), ValueError, "eps='?0.0'?, got eps='?1.0'?"),
        (lambda n: n.load_state_dict(learned(table(3, 3)).state_dict()), ValueError, "moments must be of 2 features"),
        (lambda n: n.partial_fit(np.ones((3, 2)), sample_weight=[0, 0, 0]), ValueError, "at least one non-zero number"),
        (lambda n: n.fit(np.ma.masked_array(np.ones((3, 2)))), TypeError, r"write X.filled\(np.nan\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_changes_nothing(call, kind, text):
    norm = Standardizer(2)
    norm(np.array([[-1.5e308, 1.0], [-1.5e308, 4.0]]))
    before = norm.moments
    with pytest.raises(kind, match=text):
        call(norm)
    assert norm.moments == before


def test_keywords_of_scikit_learn_are_told_what_to_write():
    with pytest.raises(TypeError, match="center must be given instead of with_mean: write center=False"):
        Standardizer(3, with_mean=False)


@pytest.mark.parametrize("rate", (None, 0.05))
def test_a_state_goes_on_bit_for_bit(tmp_path, rate):
    x = table(20, 3)
    norm = learned(x, update_rate=rate)
    norm.save(tmp_path / "norm.npz")
    others = [Standardizer(3, update_rate=rate) for _ in range(2)]
    others[0].load(tmp_path / "norm.npz")
    others[1].load_state_dict(norm.state_dict())
    others += [copy.deepcopy(norm), copy.copy(norm), pickle.loads(pickle.dumps(norm))]
    y = norm(x[0])
    for other in others:
        assert other(x[0]).tobytes() == y.tobytes()
        assert other.moments == norm.moments
    with pytest.raises(ValueError, match="state must have the settings of this layer"):
        Standardizer(3, eps=1.0).load(tmp_path / "norm.npz")
    Standardizer(3, eps=1.0, update_rate=rate).load(tmp_path / "norm.npz", strict=False)


@pytest.mark.parametrize("rate", [None, 0.1])
def test_a_state_of_weights_or_of_another_rate_loads(tmp_path, rate):
    norm = Standardizer(2, update_rate=rate)
    norm(np.ones((2, 2)), weights=[0.5, 2.0])
    norm.save(tmp_path / "norm.npz")
    for other in (None, 0.1):
        loaded = Standardizer(2, update_rate=other)
        loaded.load(tmp_path / "norm.npz", strict=False)
        assert loaded.moments == norm.moments


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ([3, 2, 0, 4, -1e5], "low parts below"),
        ([3, 2, 5, 4, 0], "low parts below"),
        ([0, 2, 0, 4, 0], "moments must be 0 where count is 0, got 2.0"),
        ([3, 2, 0, -4, 0], "moments must have m2 >= 0, got -4.0"),
        ([-3, 2, 0, 4, 0], "moments must have count >= 0, got -3.0"),
        ([3, np.nan, 0, 4, 0], "moments must be finite, got nan"),
    ],
)
def test_a_state_that_cannot_be_is_refused(row, text):
    norm = Standardizer(1)
    state = norm.state_dict()
    with pytest.raises(ValueError, match=text):
        norm.load_state_dict(state | {"moments": np.array([row], np.float64)})
    with pytest.raises(ValueError, match=r"moments must have shape \(1, 5\), got \(\)"):
        norm.load_state_dict(state | {"moments": np.array(1.0)})


def test_features_that_are_known_stay():
    norm = Standardizer().fit(table(3, 2))
    norm.features = 5
    with pytest.raises(ValueError, match="features must be 2, of which something has been seen, got 5"):
        norm(np.ones(2))
    assert norm.reset()(np.ones(5)).shape == (5,)


@pytest.mark.parametrize(
    ("values", "weights", "text"),
    [
        ([["1"]], None, "X must have numbers, got dtype <U1"),
        (np.array([[1], ["NaT"]], "m8[s]"), None, "X must have numbers, got dtype"),
        ([[1.0], [2.0]], [1j, 1], "sample_weight must be numbers, got dtype complex128"),
        ([[1.0], [2.0]], [1, -1], "sample_weight must be finite and >= 0, got -1.0 of observation 1"),
        ([[1.0], [2.0]], np.ma.masked_array([1, 1], [0, 1]), "sample_weight must be"),
    ],
)
def test_what_is_no_number_is_refused(values, weights, text):
    with pytest.raises((ValueError, TypeError), match=text):
        Standardizer().fit(values, sample_weight=weights)


def test_reset_forgets():
    norm = Standardizer().fit(table(5, 2))
    assert norm.reset()(np.array([1.0, 2.0, 3.0])).shape == (3,)
    assert repr(Standardizer(3, clip=5.0)) == "Standardizer(3, clip=5.0)"


# ---- scikit-learn ----------------------------------------------------------------------------------------


def test_scikit_learn_is_not_imported():
    code = (
        "import sys, numpy as np, batchnorm as bn\n"
        "n = bn.Standardizer().fit([[1, 2], [3, 5]])\n"
        "assert n.transform([[1, 2]]).shape == (1, 2)\n"
        "try: bn.Standardizer().transform([[1, 2]])\n"
        "except ValueError as e: assert 'must have seen data' in str(e)\n"
        "assert not {'sklearn', 'pandas', 'polars', 'scipy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


@pytest.mark.filterwarnings("ignore:Estimator Standardizer does not inherit:UserWarning")
@pytest.mark.parametrize("parameters", [{}, {"clip": 5.0, "eps": 1e-8}, {"missing": "zero"}])
def test_check_estimator_passes(parameters):
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    results = checks.check_estimator(Standardizer(**parameters), on_skip=None, on_fail=None)
    assert len(results) > 40
    skipped = {"check_array_api_input"}  # NumPy's arrays alone are taken
    if importlib.util.find_spec("pandas") is None:
        skipped.add("check_sample_weights_pandas_series")
    assert {r["check_name"] for r in results if r["status"] == "skipped"} == skipped
    assert {r["check_name"]: r["exception"] for r in results if r["status"] not in ("passed", "skipped")} == {}


def test_it_agrees_with_standard_scaler():
    scaler = pytest.importorskip("sklearn.preprocessing").StandardScaler()
    x, weights = table(200, 4, 3.0), np.random.default_rng(1).random(200)
    x[::4, 2] = np.nan
    constant = np.array(x)
    constant[:, 1] = 5.0
    for values, given in ((constant, None), (x, weights)):  # StandardScaler has NaN for a constant with weights
        scaler.fit(values, sample_weight=given)
        ours = Standardizer().fit(values, sample_weight=given)
        np.testing.assert_allclose(ours.transform(values), scaler.transform(values), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(ours.scale_, scaler.scale_, rtol=1e-12)
        np.testing.assert_allclose(ours.n_samples_seen_, scaler.n_samples_seen_, rtol=1e-12)
        np.testing.assert_allclose(ours.inverse_transform(scaler.transform(values)), values, rtol=1e-9)


def test_exponential_statistics_are_those_of_pandas():
    pandas = pytest.importorskip("pandas")
    x = table(50, 2)
    norm, ewm = learned(x, update_rate=0.1), pandas.DataFrame(x).ewm(alpha=0.1)
    np.testing.assert_allclose(norm.mean_, ewm.mean().iloc[-1], rtol=1e-12)
    np.testing.assert_allclose(norm.var_, ewm.var(bias=True).iloc[-1], rtol=1e-12)
    np.testing.assert_allclose(norm.moments.var(1, weights_are="importance"), ewm.var().iloc[-1], rtol=1e-12)


def test_clone_pipeline_and_output_of_frames():
    base, pipeline = pytest.importorskip("sklearn.base"), pytest.importorskip("sklearn.pipeline")
    pandas = pytest.importorskip("pandas")
    polars = pytest.importorskip("polars")
    x = table(6, 2)
    frame = pandas.DataFrame(x, columns=["a", "b"], index=list("uvwxyz"))
    cloned = base.clone(Standardizer(clip=0.5).fit(x))
    assert (cloned.get_params()["clip"], hasattr(cloned, "n_features_in_")) == (0.5, False)
    steps = pipeline.make_pipeline(Standardizer(), Standardizer()).set_output(transform="pandas")
    got = steps.fit_transform(frame)
    assert list(got.columns) == ["a", "b"]
    assert list(got.index) == list("uvwxyz")
    np.testing.assert_allclose(got.to_numpy(), Standardizer().fit_transform(x), rtol=1e-12)
    made = Standardizer().set_output(transform="polars").fit_transform(polars.DataFrame(x, schema=["a", "b"]))
    assert made.columns == ["a", "b"]


def test_frames_of_other_columns_are_refused_and_nullable_ones_read():
    pandas = pytest.importorskip("pandas")
    norm = Standardizer().fit(pandas.DataFrame({"a": pandas.array([1, None, 3], "Int64"), "b": [1.0, 2.0, 6.0]}))
    np.testing.assert_array_equal(norm.n_samples_seen_, [2, 3])
    np.testing.assert_array_equal(norm.get_feature_names_out(), ["a", "b"])
    with pytest.raises(ValueError, match="Feature names unseen at fit time:\n- c"):
        norm.transform(pandas.DataFrame({"a": [1.0], "c": [2.0]}))
    with pytest.raises(ValueError, match="same order"):
        norm.transform(pandas.DataFrame({"b": [1.0], "a": [2.0]}))
    with pytest.raises(ValueError, match="same order"):
        norm.inverse_transform(pandas.DataFrame({"b": [1.0], "a": [2.0]}))
    norm.get_feature_names_out()[0] = "z"
    assert list(norm.feature_names_in_) == ["a", "b"]
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        norm.transform(np.ones((1, 2)))


def test_a_fit_that_fails_forgets_nothing():
    norm = Standardizer().fit(table(5, 2))
    before = norm.moments
    with pytest.raises(ValueError, match="x must be finite"):
        norm.fit([[1.0, np.inf]])
    assert norm.moments == before
