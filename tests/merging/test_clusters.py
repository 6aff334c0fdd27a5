"""Families from a matrix of similarities: the rules by hand, and no influence of the order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from honeloom.errors import ConfigError
from honeloom.merging.clusters import agglomerate, find_clusters, leader_clusters, nearest_group

METHODS = ["leader", "average", "complete"]
FAR = 0.1


def matrix(names, **pairs):
    """Similarities by pairs of one-letter names; all others are far."""
    found = np.full((len(names), len(names)), FAR)
    np.fill_diagonal(found, 1.0)
    for pair, value in pairs.items():
        i, j = (names.index(letter) for letter in pair)
        found[i, j] = found[j, i] = value
    return found


@pytest.mark.parametrize("method", METHODS)
def test_alike_models_are_together_and_the_stranger_is_alone(method):
    names = ["a", "copy", "stranger"]
    similarity = np.array([[1, 0.999, 0.01], [0.999, 1, 0.02], [0.01, 0.02, 1]])
    found = find_clusters(names, similarity, 0.95, method)
    assert found.groups == (("a", "copy"), ("stranger",))
    assert (found.method, found.threshold) == (method, 0.95)
    assert set(found.order[:2]) == {"a", "copy"} or set(found.order[1:]) == {"a", "copy"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("threshold", [0.95, 0.3, 0.0, -0.5, 1.0])
def test_the_threshold_is_strict(method, threshold):
    at = find_clusters(["a", "b"], np.array([[1, threshold], [threshold, 1]]), threshold, method)
    assert at.groups == (("a",), ("b",))
    above = np.nextafter(np.float64(threshold), 2) if threshold >= 0.5 else threshold + 1e-9
    if threshold < 1:
        joined = find_clusters(["a", "b"], np.array([[1, above], [above, 1]]), threshold, method)
        assert joined.groups == (("a", "b"),)


def test_the_most_central_model_leads_and_its_family_need_not_agree_among_itself():
    names = list("xby")
    similarity = matrix(names, xb=0.97, by=0.96, xy=0.9)
    assert leader_clusters(names, similarity).groups == (("b", "x", "y"),)
    assert leader_clusters(names, similarity).leaders == ("b",)
    assert leader_clusters(names, similarity).order == ("y", "b", "x")  # as the tree of average linkage has them
    # The mean of 0.96 and 0.9 is below the threshold, and so is 0.9.
    for linkage in ("average", "complete"):
        assert agglomerate(names, similarity, 0.95, linkage).groups == (("b", "x"), ("y",))


def test_a_model_joins_the_leader_that_it_is_most_similar_to():
    names = list("abcdm")
    similarity = matrix(names, ab=0.97, cd=0.98, am=0.962, cm=0.961)
    found = leader_clusters(names, similarity)
    assert found.leaders == ("a", "c")  # c was first, a has the larger family
    assert found.groups == (("a", "b", "m"), ("c", "d"))
    assert found.order == ("d", "c", "m", "a", "b")
    assert found.linkage is not None
    equal = leader_clusters(names, matrix(names, ab=0.97, cd=0.98, am=0.961, cm=0.961))
    assert equal.groups == (("c", "d", "m"), ("a", "b"))  # of equal leaders the first


def test_a_tree_that_would_tear_a_group_apart_is_not_shown():
    """b leads c too, and c stands between x and y, which b does not take in."""
    names = list("abcdefxy")
    near = dict.fromkeys(("ab", "bd", "be", "bf", "ad", "ae", "af", "de", "df", "ef"), 0.97)
    similarity = matrix(names, **near, bc=0.96, bx=0.94, by=0.94, cx=0.999, cy=0.998)
    found = leader_clusters(names, similarity)
    assert found.groups == (("a", "b", "c", "d", "e", "f"), ("x",), ("y",))
    assert found.linkage is None
    assert found.order == ("b", "a", "d", "e", "f", "c", "x", "y")


def test_exact_ties_go_by_name():
    names = list("dcba")
    equal = np.full((4, 4), 0.97)
    assert leader_clusters(names, equal).leaders == ("a",)
    two = matrix(names, ab=0.97, cd=0.97)
    assert leader_clusters(names, two).leaders == ("a", "c")
    assert agglomerate(names, two, 0.95).leaders == ("a", "c")
    # Rows with the same values in another order tie exactly, however their sums would be rounded.
    values = matrix(names, da=0.1, db=0.7, dc=0.3, ca=0.7, cb=0.1, ab=0.3)
    assert leader_clusters(names, values, 0.9).leaders == ("a", "b", "c", "d")


def test_linkages_by_hand():
    names = list("abc")
    similarity = matrix(names, ab=0.9, ac=0.5, bc=0.3)
    average, complete = agglomerate(names, similarity, 0.35), agglomerate(names, similarity, 0.35, "complete")
    assert average.groups == (("a", "b", "c"),)  # the mean of 0.5 and 0.3 is 0.4
    assert complete.groups == (("a", "b"), ("c",))  # the least is 0.3
    for found, height in ((average, 0.6), (complete, 0.7)):
        (one, other, first, two), (low, high, last, three) = found.linkage
        assert {found.order[one], found.order[other]} == {"a", "b"}
        assert (first, two, last, three) == pytest.approx((0.1, 2, height, 3))
        assert (found.order[low], high) == ("c", 3)


def test_the_linkage_is_scipys_with_leaves_in_the_shown_order():
    rng = np.random.default_rng(0)
    names = [f"m{i}" for i in range(9)]
    points = rng.normal(size=(9, 4))
    similarity = np.clip(np.corrcoef(points), -1, 1)
    found = agglomerate(names, similarity, 0.2)
    place = [names.index(name) for name in found.order]
    distances = squareform(1 - similarity[np.ix_(place, place)], checks=False)
    theirs = hierarchy.linkage(distances, "average")
    assert np.allclose(np.array(found.linkage), theirs)
    assert hierarchy.is_valid_linkage(np.array(found.linkage, dtype=float))
    label = hierarchy.fcluster(theirs, 0.8, "distance")
    groups = {tuple(sorted(n for n, at in zip(found.order, label, strict=True) if at == k)) for k in set(label)}
    assert groups == set(found.groups)


@pytest.mark.parametrize("method", METHODS)
def test_one_model_and_none(method):
    found = find_clusters(["a"], np.ones((1, 1)), 0.95, method)
    assert (found.groups, found.leaders, found.order) == ((("a",),), ("a",), ("a",))
    assert found.linkage == ()
    assert nearest_group(["a"], np.ones((1, 1)), found, "a") is None
    with pytest.raises(ConfigError, match="names"):
        find_clusters([], np.ones((0, 0)), 0.95, method)


@pytest.mark.parametrize(("method", "value"), [("leader", 0.4), ("average", 0.35), ("complete", 0.3)])
def test_the_nearest_group_by_the_rule(method, value):
    names = list("abc")
    similarity = matrix(names, ab=0.97, ac=0.4, bc=0.3)
    found = find_clusters(names, similarity, 0.95, method)
    assert found.leaders[0] == "a"
    group, near = nearest_group(names, similarity, found, "c")
    assert (found.groups[group], near) == (("a", "b"), pytest.approx(value))


@pytest.mark.parametrize(
    ("names", "similarity", "threshold", "words"),
    [
        (["a", "a"], np.eye(2), 0.5, "differ"),
        (["a"], np.eye(2), 0.5, r"shape \(2, 2\)"),
        (["a", "b"], np.array([[1, np.nan], [np.nan, 1]]), 0.5, "between -1 and 1"),
        (["a", "b"], np.array([[1, 2.0], [2.0, 1]]), 0.5, "between -1 and 1"),
        (["a", "b"], np.array([[1, 0.2], [0.3, 1]]), 0.5, "same both ways"),
        (["a", "b"], np.eye(2), 1.5, "threshold is 1.5"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_similarity_is_refused(names, similarity, threshold, words, method):
    with pytest.raises(ConfigError, match=words):
        find_clusters(names, similarity, threshold, method)


@st.composite
def zoos(draw):
    """A symmetric matrix with many equal values, and two orders of it."""
    count = draw(st.integers(1, 8))
    values = draw(st.lists(st.sampled_from([-1.0, -0.2, 0.0, 0.1, 0.3, 0.7, 0.95, 0.97, 1.0]),
                           min_size=count * count, max_size=count * count))  # fmt: skip
    square = np.array(values).reshape(count, count)
    similarity = np.tril(square, -1) + np.tril(square, -1).T + np.eye(count)
    return similarity, draw(st.permutations(range(count)))


@settings(max_examples=150, deadline=None)
@given(zoos(), st.sampled_from(METHODS), st.sampled_from([0.95, 0.2, 0.0, -1.0, 1.0]))
def test_the_order_of_the_models_changes_nothing(zoo, method, threshold):
    similarity, order = zoo
    names = [f"m{i}" for i in range(len(similarity))]
    plain = find_clusters(names, similarity, threshold, method)
    other = find_clusters([names[i] for i in order], similarity[np.ix_(order, order)], threshold, method)
    assert plain == other
    assert sorted(n for group in plain.groups for n in group) == sorted(plain.order) == sorted(names)
    assert list(plain.groups) == sorted(plain.groups, key=lambda group: (-len(group), group))
    at = dict(zip(names, range(len(names)), strict=True))
    place = {name: i for i, name in enumerate(plain.order)}
    for group, leader in zip(plain.groups, plain.leaders, strict=True):
        assert leader in group
        places = sorted(place[name] for name in group)
        assert places == list(range(places[0], places[0] + len(group)))  # side by side
        if method == "leader":
            assert all(similarity[at[n], at[leader]] > threshold for n in group if n != leader)
        if method == "complete":
            assert all(similarity[at[n], at[m]] > threshold for n in group for m in group if n != m)
    if method == "leader":
        lead = [at[name] for name in plain.leaders]
        assert all(similarity[i, j] <= threshold for i in lead for j in lead if i != j)
