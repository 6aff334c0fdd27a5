"""Domains and the probe against cases that can be worked out: geometry, entropy, calibration, and the theory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score

from honeloom.selection.band import percentiles
from honeloom.selection.domains import (
    Domains,
    centroids_of,
    constrained_kmeans,
    diversity,
    find_domains,
    labelled_domains,
    set_diversity,
    stable_count,
)
from honeloom.selection.probe import calibration_error, cross_fit, entropy, fit_temperature, softmax
from honeloom.selection.vectors import unit_blocks

KINDS, LENGTH = 4, 12


def names(n):
    return [f"row-{i:04d}" for i in range(n)]


def world(n, spread=0.25, seed=0):
    """Rows around one axis per kind, and their kinds; the kind is told by the id's number."""
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % KINDS
    rows = np.eye(LENGTH)[kind] + spread * rng.normal(size=(n, LENGTH))
    return next(unit_blocks(rows.astype(np.float32), standardise=False)), kind


# entropy


@pytest.mark.parametrize("k", [2, 4, 21])
def test_entropy_of_the_uniform_and_the_certain(k):
    assert entropy(np.full(k, 1 / k)) == pytest.approx(math.log(k), abs=1e-12)
    assert entropy(np.eye(k)).tolist() == [0.0] * k


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8).filter(lambda p: sum(p) > 1e-3), st.randoms())
def test_entropy_does_not_depend_on_the_order_and_lies_within_its_bounds(p, random):
    p = np.array(p) / sum(p)
    shuffled = p.copy()
    random.shuffle(shuffled)
    assert entropy(shuffled) == pytest.approx(float(entropy(p)), abs=1e-12)
    assert 0 <= entropy(p) <= math.log(len(p)) + 1e-12


def test_the_row_about_which_nothing_is_known_has_the_most_entropy():
    logits = np.vstack((np.zeros(5), np.random.default_rng(0).normal(size=(50, 5)) * 3))
    assert entropy(softmax(logits)).argmax() == 0
    assert np.allclose(softmax(logits).astype(np.float32).sum(axis=1), 1, atol=1e-6)


def test_the_error_of_hard_assignment_is_zero_exactly_where_the_entropy_is():
    """A discrete mixture computed exactly: the ideal weight of a row against that of its likeliest domain alone."""
    rng = np.random.default_rng(1)
    given_domain = rng.dirichlet(np.full(40, 0.15), size=3)  # p(x | c)
    given_domain[1:, :8] = 0  # rows of one domain only
    given_domain /= given_domain.sum(axis=1, keepdims=True)
    prior, wanted = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    joint = prior[:, None] * given_domain
    posterior = (joint / joint.sum(axis=0)).T
    weight = wanted / prior  # 0.4, 1, 2.5: all different
    exact = posterior @ weight
    hard = weight[posterior.argmax(axis=1)]
    error = (exact - hard) ** 2
    assert np.allclose(exact, (wanted @ given_domain) / joint.sum(axis=0))
    unsure = entropy(posterior)
    assert ((error < 1e-24) == (unsure < 1e-12)).all()
    assert (unsure[:8] == 0).all() and (error[:8] == 0).all()
    assert np.corrcoef(np.argsort(np.argsort(error)), np.argsort(np.argsort(unsure)))[0, 1] > 0.7


# geometry


def test_pure_rows_of_orthogonal_domains_are_far_from_the_other():
    vectors = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0]], dtype=np.float32)
    labels = np.array([0, 1, 0, 1, -1, 0])
    domains = Domains(np.array([[2.0, 0, 0], [0, 5.0, 0]]), labels, ("a", "b"))
    inter, intra = diversity(vectors, domains)
    assert inter[:5].tolist() == [0.0] * 5
    assert intra[:5].tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert inter[5] == pytest.approx(math.sqrt(0.5), abs=1e-7) == intra[5]


def test_one_domain_has_no_other():
    inter, intra = diversity(np.eye(2, dtype=np.float32), Domains(np.ones((1, 2)), np.zeros(2, dtype=np.int64), ("a",)))
    assert inter.tolist() == [0.0, 0.0]
    assert intra == pytest.approx([math.sqrt(0.5)] * 2)


def test_diversity_of_a_set():
    vectors = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=np.float32)
    far = set_diversity(vectors, np.array([0, 1, 0, 1]), 3)
    assert far.inter == pytest.approx(math.sqrt(2))
    assert far.intra == (0.0, 0.0, 0.0)
    mixed = set_diversity(vectors, np.array([0, 0, 1, 1]), 2)
    assert mixed.inter == 0.0
    assert mixed.intra == pytest.approx((math.sqrt(0.5),) * 2)
    assert set_diversity(vectors, np.zeros(4, dtype=np.int64), 1).inter == 0.0


def test_labels_are_domains_and_rows_without_one_are_together():
    vectors = np.array([[1, 0], [0, 1], [0, 0], [1, 1]], dtype=np.float32)
    found = labelled_domains(vectors, ["b", None, "b", "a"])
    assert found.names == ("(none)", "a", "b")
    assert found.labels.tolist() == [2, 0, -1, 1]
    assert found.centroids[2].tolist() == [1.0, 0.0]


def test_percentiles_are_those_within_a_domain():
    found = percentiles(np.array([3.0, 1.0, 2.0, 0.0, 5.0, 5.0]), np.array([0, 0, 0, -1, 1, 1]), list("cabdfe"))
    assert np.allclose(found, [250 / 3, 50 / 3, 50, math.nan, 75, 25], equal_nan=True)


# pseudo-domains


def test_seeds_say_which_domain_is_which():
    vectors, kind = world(400)
    seeds, seed_kind = world(12, seed=5)
    start = centroids_of(seeds, seed_kind, KINDS)
    found = constrained_kmeans(vectors, start, list("wxyz"), seeds=seeds, seed_labels=seed_kind)
    assert found.names == tuple("wxyz")
    assert (found.labels == kind).mean() > 0.95
    assert found.warning() is None
    again = constrained_kmeans(vectors[::-1], start, list("wxyz"), seeds=seeds, seed_labels=seed_kind)
    assert (again.labels[::-1] == found.labels).all()


def test_a_domain_without_rows_is_left_out_and_told():
    vectors, kind = world(300)
    vectors = vectors[kind != 2]
    seeds = np.eye(LENGTH, dtype=np.float32)[[0, 1, 2, 3]]
    start = np.vstack((seeds[:2], -np.ones((1, LENGTH)), seeds[3:]))
    held = np.where(np.arange(4)[:, None] == 2, -1 / math.sqrt(LENGTH), seeds).astype(np.float32)
    found = constrained_kmeans(vectors, start, list("wxyz"), seeds=held, seed_labels=np.arange(4))
    assert found.names == ("w", "x", "z") and found.dropped == ("y",)
    assert set(found.labels.tolist()) == {0, 1, 2}
    assert "1 of 4 domains (y)" in found.warning()


def test_a_zero_row_belongs_nowhere():
    vectors, _ = world(60)
    vectors[7] = 0
    found = find_domains(vectors, KINDS, ids=names(60), seed=0)
    assert found.labels[7] == -1 and (np.delete(found.labels, 7) >= 0).all()
    with pytest.raises(ValueError, match="no row has a vector"):
        constrained_kmeans(np.zeros((3, 2), np.float32), np.eye(2), "ab")


def test_the_number_of_domains_is_found_and_does_not_depend_on_the_order():
    vectors, kind = world(600, spread=0.2)
    found = stable_count(vectors, ids=names(600), seed=0, most=7)
    assert found.best == KINDS
    assert found.counts == tuple(range(2, 8))
    assert max(found.agreement) == found.agreement[KINDS - 2] > 0.95
    assert stable_count(vectors[::-1], ids=names(600)[::-1], seed=0, most=7) == found
    domains = find_domains(vectors, KINDS, ids=names(600), seed=0)
    assert adjusted_mutual_info_score(kind, domains.labels) > 0.95


def test_rows_that_are_all_alike_are_one_domain():
    same = np.tile(np.array([[1.0, 0.0]], np.float32), (50, 1))
    assert stable_count(same, ids=names(50), seed=0).best == 1
    assert stable_count(same[:4], ids=names(4), seed=0).best == 1
    assert find_domains(same, 3, ids=names(50), seed=0).count == 1


# the probe


@pytest.fixture(scope="module")
def probed():
    vectors, kind = world(480)
    rng = np.random.default_rng(3)
    between = np.eye(LENGTH)[[0, 1] * 10] + np.eye(LENGTH)[[2, 3] * 10] + 0.1 * rng.normal(size=(20, LENGTH))
    vectors = np.concatenate((vectors, next(unit_blocks(between.astype(np.float32), standardise=False))))
    labels = np.concatenate((kind, [0, 1] * 10))
    labels[11] = -1
    return vectors, labels, cross_fit(vectors, labels, KINDS, ids=names(500), seed=0, regress=True)


def test_the_probe_learns_the_domains_and_is_unsure_between_them(probed):
    _, _, found = probed
    assert found.accuracy > 0.9
    assert found.calibration_error < 0.1
    pure, between = np.delete(found.entropies[:480], 11), found.entropies[480:]
    assert np.mean(pure[:, None] < between[None, :]) > 0.8
    assert np.mean(np.delete(found.predicted[:480], 11)[:, None] < found.predicted[None, 480:]) > 0.75
    assert len(found.temperature) == len(found.epochs) == 10
    assert np.nanmax(found.entropies) <= math.log(KINDS) + 1e-9
    assert np.nansum(found.probabilities, axis=1) == pytest.approx(np.where(np.arange(500) == 11, 0, 1))
    assert math.isnan(found.entropies[11]) and math.isnan(found.predicted[11])


def test_the_probe_sees_ids_not_places_and_no_threads(probed):
    vectors, labels, found = probed
    torch.set_num_threads(2)
    try:
        state = torch.get_rng_state()
        back = cross_fit(vectors[::-1], labels[::-1], KINDS, ids=names(500)[::-1], seed=0, regress=True)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert np.array_equal(back.entropies[::-1], found.entropies, equal_nan=True)
    assert np.array_equal(back.predicted[::-1], found.predicted, equal_nan=True)


def test_a_row_is_scored_by_a_probe_that_did_not_learn_from_it():
    """Labels drawn at random can be learnt by heart only: who had seen a row would know its label."""
    vectors, _ = world(240)
    labels = np.random.default_rng(0).integers(0, 2, 240)
    found = cross_fit(vectors, labels, 2, ids=names(240), seed=0)
    assert 0.35 < found.accuracy < 0.65
    assert found.calibration_error < 0.25


def test_too_little_for_a_probe_is_refused():
    vectors, labels = world(8)
    for count, rows in ((1, 8), (2, 3)):
        with pytest.raises(ValueError, match="a probe needs 2 domains"):
            cross_fit(vectors[:rows], labels[:rows] % count, count, ids=names(rows), seed=0)


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_the_temperature_undoes_a_scale(factor):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 3)) * 2
    drawn = (softmax(logits).cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    assert fit_temperature(logits * factor, drawn) == pytest.approx(factor, rel=0.05)
    assert calibration_error(softmax(logits), drawn) < 0.02
    assert calibration_error(softmax(logits * 8), drawn) > 0.05


def test_the_temperature_of_a_probe_that_is_always_right_is_finite():
    logits = np.eye(3)[np.arange(90) % 3] * 5
    assert 0.3 < fit_temperature(logits, np.arange(90) % 3) < 3
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, dtype=np.int64)) == 1.0
