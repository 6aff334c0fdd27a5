"""Clusters, their proxies, and the two samplers, against laws and enumeration."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import chisquare
from sklearn.cluster import KMeans

from honeloom.selection.clusters import kmeans
from honeloom.selection.groups import Groups, representatives
from honeloom.selection.sampling import cluster_probabilities, effective_clusters, qocs, qwcs, standardise


def names(n):
    return [f"row-{i:04d}" for i in range(n)]


def blobs(n=600, k=6, d=8, seed=0):
    rng = np.random.default_rng(seed)
    centres = 10 * rng.normal(size=(k, d))
    return (centres[np.arange(n) % k] + rng.normal(size=(n, d))).astype(np.float32)


def test_separate_groups_are_found():
    found = kmeans(blobs(), 6, seed=0, ids=names(600))
    groups = {tuple(sorted({i % 6 for i in np.flatnonzero(found.labels == c)})) for c in range(6)}
    assert groups == {(i,) for i in range(6)}
    for c in range(6):
        assert np.allclose(found.centroids[c], blobs()[found.labels == c].mean(axis=0), atol=1e-4)
    assert np.allclose(found.distances, np.linalg.norm(blobs() - found.centroids[found.labels], axis=1), atol=1e-3)


def test_the_order_of_rows_does_not_matter():
    vectors, ids = blobs(300, 5), names(300)
    turned = np.random.default_rng(1).permutation(300)
    one = kmeans(vectors, 7, seed=3, ids=ids)
    other = kmeans(vectors[turned], 7, seed=3, ids=[ids[i] for i in turned])
    assert {frozenset(np.array(ids)[one.labels == c]) for c in range(7)} == {
        frozenset(np.array(ids)[turned][other.labels == c]) for c in range(7)
    }
    assert (kmeans(vectors, 7, seed=3, ids=ids).labels == one.labels).all()


def proxies_of(found, ids):
    """The one row that stands for each cluster."""
    groups = Groups(found.labels, found.distances)
    return [members[0] for members in representatives(groups, np.ones(len(ids), dtype=bool), 1, ids)]


def test_as_many_clusters_as_rows_make_every_row_a_proxy():
    vectors = np.eye(5, dtype=np.float32)
    found = kmeans(vectors, 5, seed=0, ids=names(5))
    assert sorted(proxies_of(found, names(5))) == list(range(5))


def test_one_cluster_is_stood_for_by_the_row_nearest_to_the_mean():
    vectors = blobs(50, 3)
    found = kmeans(vectors, 1, seed=0, ids=names(50))
    assert proxies_of(found, names(50)) == [int(np.linalg.norm(vectors - vectors.mean(axis=0), axis=1).argmin())]


def test_proxies_are_members_and_ties_go_to_the_lowest_id():
    found = kmeans(blobs(), 40, seed=0, ids=names(600))
    proxies = proxies_of(found, names(600))
    assert [found.labels[p] for p in proxies] == list(range(len(found.centroids)))
    same = np.ones((4, 3), dtype=np.float32)
    assert proxies_of(kmeans(same, 1, seed=0, ids=["d", "b", "a", "c"]), ["d", "b", "a", "c"]) == [2]


def test_fewer_distinct_rows_than_clusters_give_fewer_clusters():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0)
    found = kmeans(vectors, 8, seed=0, ids=names(30))
    assert len(found.centroids) == 3
    assert (found.sizes == 10).all()
    with pytest.raises(ValueError, match="k = 0"):
        kmeans(vectors, 0, seed=0, ids=names(30))


def test_given_centroids_are_where_it_begins():
    vectors = blobs(120, 3)
    init = np.stack([vectors[i::3].mean(axis=0) for i in range(3)])
    found = kmeans(vectors, 3, seed=0, ids=names(120), init=init, iterations=0)
    assert (found.labels == np.arange(120) % 3).all()
    assert np.array_equal(found.centroids, init)


def test_a_memory_map_gives_clusters_as_good_as_those_of_full_iterations(tmp_path):
    """Inertia at most 3% above that of scikit-learn, over rows with no clear groups."""
    rng = np.random.default_rng(5)
    vectors = (rng.normal(size=(6000, 6)) @ rng.normal(size=(6, 16)) + rng.normal(size=(6000, 16))).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    found = kmeans(np.load(tmp_path / "v.npy", mmap_mode="r"), 60, seed=0, ids=names(6000))
    full = KMeans(60, init="k-means++", algorithm="lloyd", n_init=1, random_state=0).fit(vectors)
    assert (found.distances.astype(float) ** 2).sum() <= 1.03 * full.inertia_
    means = np.stack([vectors[found.labels == c].mean(axis=0) for c in range(60)])
    assert np.allclose(found.centroids, means, atol=1e-4)


LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
IDS = names(9)


def test_ordered_sampling_takes_whole_clusters():
    distances = np.array([2, 1, 3, 1, 1, 4, 3, 2, 1], dtype=np.float32)
    values = np.array([0.0, 5.0, -1.0])  # a value of exactly 0 is a value
    assert qocs(values, LABELS, distances, IDS).tolist() == [3, 4, 1, 0, 2, 8, 7, 6, 5]
    assert qocs(np.zeros(3), LABELS, distances, IDS)[:4].tolist() == [8, 7, 6, 5]  # the largest first
    assert sorted(qocs(values, LABELS, distances, IDS)) == list(range(9))


def test_weighted_sampling_draws_clusters_by_the_softmax():
    """First draws over many seeds against softmax(f s); rows within a cluster evenly."""
    values, factor, draws = np.array([0.5, -0.2, -1.0]), 1.3, 4000
    firsts = [int(qwcs(values, LABELS, IDS, factor=factor, seed=s)[0]) for s in range(draws)]
    expected = cluster_probabilities(values, factor)
    counts = np.bincount(LABELS[firsts], minlength=3)
    assert chisquare(counts, draws * expected).pvalue > 0.001
    in_third = Counter(f for f in firsts if LABELS[f] == 2)
    assert chisquare([in_third[i] for i in range(5, 9)]).pvalue > 0.001


def test_weighted_sampling_follows_the_sequential_law():
    """Two clusters, rows {a} and {b, c}: every order's chance by hand, exhausted clusters left out."""
    labels, ids = np.array([0, 1, 1]), ["a", "b", "c"]
    p = cluster_probabilities(np.array([1.0, 0.0]), 1.0)
    q = p[1]
    chances = {
        order: {0: p[0] * 0.5, 1: q * 0.5 * p[0], 2: q * 0.5 * q}[order.index(0)] for order in permutations(range(3))
    }
    assert sum(chances.values()) == pytest.approx(1)
    seen = Counter(tuple(qwcs(np.array([1.0, 0.0]), labels, ids, factor=1.0, seed=s).tolist()) for s in range(4000))
    assert chisquare([seen[o] for o in chances], [4000 * c for c in chances.values()]).pvalue > 0.001


def test_weighted_sampling_is_even_over_clusters_at_factor_zero_and_safe_at_large_ones():
    values = np.array([3.0, 2.0, 1.0])
    firsts = [LABELS[qwcs(values, LABELS, IDS, factor=0.0, seed=s)[0]] for s in range(3000)]
    assert chisquare(np.bincount(firsts)).pvalue > 0.001
    steep = qwcs(values, LABELS, IDS, factor=1e4, seed=0)
    assert LABELS[steep].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert (qwcs(values + 7.0, LABELS, IDS, factor=1.0, seed=5) == qwcs(values, LABELS, IDS, factor=1.0, seed=5)).all()


def test_weighted_sampling_does_not_depend_on_the_order_of_rows():
    turned = np.random.default_rng(0).permutation(9)
    values = np.array([0.1, 0.5, -0.3])
    one = [IDS[i] for i in qwcs(values, LABELS, IDS, factor=1.0, seed=2)]
    ids = [IDS[i] for i in turned]
    other = [ids[i] for i in qwcs(values, LABELS[turned], ids, factor=1.0, seed=2)]
    assert one == other


def test_values_on_a_common_scale():
    values = np.array([1.0, 2.0, 4.0])
    assert standardise(values).mean() == pytest.approx(0)
    assert standardise(values).std() == pytest.approx(1)
    assert standardise(1000 * values + 3) == pytest.approx(standardise(values))
    assert standardise(values, "rank").tolist() == [-1, 0, 1]
    assert standardise(np.ones(4)).tolist() == standardise(np.ones(4), "rank").tolist() == [0, 0, 0, 0]
    assert effective_clusters(np.full(8, 0.125)) == pytest.approx(8)
    assert effective_clusters(np.array([1.0, 0.0])) == pytest.approx(1)
