"""Moments merge: any split of the data gives the statistics of the whole."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batchnorm as bn
import reference
from tolerances import assert_within

CHANNELS = 3


@st.composite
def rows(draw, max_rows=40):
    """(rows, CHANNELS) float64 with offsets from 0 to 1e6 standard deviations."""
    count = draw(st.integers(0, max_rows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    offset = draw(st.sampled_from([0.0, 1.0, 1e3, -1e6]))
    return rng.normal(size=(count, CHANNELS)) * draw(st.sampled_from([1e-3, 1.0, 1e3])) + offset


@st.composite
def parts(draw):
    """Rows and a split of them into parts, some of which may be empty."""
    x = draw(rows())
    cuts = sorted(draw(st.lists(st.integers(0, len(x)), max_size=6)))
    return x, np.split(x, cuts)


def assert_same_moments(got, expected, x):
    np.testing.assert_array_equal(got.count, expected.count)
    assert_within("merge", "float64", got.mean, expected.mean, scale=np.abs(x).max(initial=0))
    assert_within("merge", "float64", got.m2, expected.m2, scale=(x**2).sum())


@given(parts())
def test_any_split_equals_the_whole(data):
    x, pieces = data
    assert_same_moments(bn.merge(*(bn.moments(p) for p in pieces)), bn.moments(x), x)


@given(parts(), st.randoms(use_true_random=False))
def test_order_of_the_parts_does_not_matter(data, random):
    x, pieces = data
    moments = [bn.moments(p) for p in pieces]
    shuffled = moments.copy()
    random.shuffle(shuffled)
    assert_same_moments(bn.merge(*shuffled), bn.merge(*moments), x)


@given(rows(), rows(), rows())
def test_merging_is_associative(a, b, c):
    x = np.concatenate([a, b, c])
    a, b, c = bn.moments(a), bn.moments(b), bn.moments(c)
    assert_same_moments((a | b) | c, a | (b | c), x)


@given(rows())
def test_empty_is_the_identity(x):
    m, empty = bn.moments(x), bn.Moments.empty(CHANNELS)
    for got in (m | empty, empty | m):
        for name in ("count", "mean", "m2"):
            np.testing.assert_array_equal(getattr(got, name), getattr(m, name))


@given(rows(), rows())
def test_bar_and_merge_are_the_same(a, b):
    a, b = bn.moments(a), bn.moments(b)
    assert (a | b) == bn.merge(a, b)


@given(rows(), rows())
def test_merge_follows_the_formula(a, b):
    x = np.concatenate([a, b])
    expected = reference.merge(reference.moments(a, 1), reference.moments(b, 1))
    assert_same_moments(bn.moments(a) | bn.moments(b), expected, x)


def test_parts_with_far_means_merge_to_the_variance_of_the_whole():
    # delta^2 * n_a * n_b / n is all of the variance here.
    a, b = np.full((3, 1), 1e8), np.full((5, 1), -1e8)
    merged = bn.moments(a) | bn.moments(b)
    exact = reference.exact_forward(np.concatenate([a, b]), axis=1, eps=0.0)
    assert_within("mean", "float64", merged.mean, exact.mean)
    assert_within("var", "float64", merged.var(), exact.var)


@pytest.mark.parametrize("k", range(9), ids=lambda k: f"1e{k}")
def test_many_merges_keep_a_variance_small_against_the_mean(k):
    # One row at a time, as a running normalizer of observations does.
    x = 10.0**k + np.random.default_rng(k).normal(size=(500, 2))
    merged = bn.merge(bn.Moments.empty(2), *(bn.moments(x[i : i + 1]) for i in range(len(x))))
    exact = reference.exact_forward(x, axis=1, eps=0.0)
    assert_within("var", "float32", merged.var(), exact.var)
    assert_within("merge", "float64", merged.mean, exact.mean, scale=10.0**k)


def test_a_merge_does_not_change_its_parts():
    a, b = bn.moments(np.eye(3)), bn.moments(np.ones((4, 3)))
    before = [getattr(m, name).copy() for m in (a, b) for name in ("count", "mean", "m2")]
    a | b
    after = [getattr(m, name) for m in (a, b) for name in ("count", "mean", "m2")]
    for then, now in zip(before, after, strict=True):
        np.testing.assert_array_equal(then, now)


def test_var_is_biased_unless_ddof_is_said():
    m = bn.moments(np.array([[1.0], [2.0], [6.0]]))
    np.testing.assert_array_equal(m.var(), [14 / 3])
    np.testing.assert_array_equal(m.var(ddof=1), [7.0])


@pytest.mark.parametrize(("values", "ddof"), [(0, 1), (1, 1), (1, 2), (2, 3)])
def test_var_of_too_few_values_is_nan(values, ddof):
    assert np.isnan(bn.moments(np.ones((values, 2))).var(ddof=ddof)).all()


def test_empty_moments_are_zero():
    m = bn.Moments.empty(4)
    assert m.channels == 4
    for value in (m.count, m.mean, m.m2):
        np.testing.assert_array_equal(value, np.zeros(4))


@pytest.mark.parametrize("count", [5, np.array([5.0, 5.0])], ids=["scalar", "array"])
def test_the_constructor_takes_one_count_or_one_a_channel(count):
    m = bn.Moments(count, np.array([1.0, 2.0]), np.array([10.0, 20.0]))
    np.testing.assert_array_equal(m.count, [5, 5])
    np.testing.assert_array_equal(m.var(), [2, 4])


WEIGHTED = bn.moments(np.eye(3), weights=[0.5, 1.0, 2.0])
WAYS = {
    "counted": bn.moments(np.eye(3)),
    "weighted": WEIGHTED,
    "merged": WEIGHTED | WEIGHTED,
    "copied": pickle.loads(pickle.dumps(WEIGHTED)),
    "constructed": bn.Moments(3.5, np.zeros(3), np.ones(3), importance_dof=np.ones(3)),
}


def test_a_subclass_is_whole_and_refuses_an_importance_dof_by_name():
    class Named(bn.Moments):
        __slots__ = ()

    made = Named(3, np.zeros(2), np.ones(2))
    assert type(made) is Named
    assert made == bn.Moments(3, np.zeros(2), np.ones(2))
    with pytest.raises(TypeError, match=r"^importance_dof must be None in a subclass of Moments, got one for Named$"):
        Named(3, np.zeros(2), np.ones(2), importance_dof=np.ones(2))


def test_the_type_of_weighted_moments_makes_moments_without_weights_too():
    weighted = bn.Moments(3, np.zeros(2), np.ones(2), importance_dof=np.ones(2))
    made = type(weighted)(3, np.zeros(2), np.ones(2))
    assert made == bn.Moments(3, np.zeros(2), np.ones(2))
    assert (made.importance_dof == 2).all()
    assert (pickle.loads(pickle.dumps(made)) | weighted).channels == 2


@pytest.mark.parametrize("name", ["count", "mean", "m2", "importance_dof"])
@pytest.mark.parametrize("way", WAYS)
def test_moments_cannot_be_written(way, name):
    m = WAYS[way]
    before = getattr(m, name).tolist()
    try:
        getattr(m, name)[0] = 1
    except ValueError as error:
        assert "read-only" in str(error)
    assert getattr(m, name).tolist() == before
    with pytest.raises(AttributeError):
        setattr(m, name, np.zeros(3))


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_merges_to_the_same_bits(duplicate):
    rng = np.random.default_rng(0)
    m, other = bn.moments(1e6 + rng.normal(size=(50, 3))), bn.moments(rng.normal(size=(9, 3)))
    assert duplicate(m) == m
    assert duplicate(m) | other == m | other


def test_moments_of_other_data_are_not_equal():
    assert bn.moments(np.eye(3)) != bn.moments(2 * np.eye(3))
    assert bn.moments(np.eye(3)) != 3


def test_moments_merge_with_moments_alone():
    with pytest.raises(TypeError, match="unsupported operand"):
        bn.moments(np.eye(3)) | 3


def test_repr_tells_count_and_channels():
    assert repr(bn.moments(np.ones((5, 3)))) == "Moments(channels=3, count=5)"
    uneven = bn.Moments(np.array([2.0, 4.0]), np.zeros(2), np.zeros(2))
    assert repr(uneven) == "Moments(channels=2, count=various)"


def test_equal_moments_have_equal_hashes():
    a, b = bn.Moments(1, [0.0], [0.0]), bn.Moments(1, [-0.0], [0.0])
    assert a == b
    assert hash(a) == hash(b)
