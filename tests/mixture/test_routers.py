"""Routers against closed forms and other implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from honeloom.errors import ConfigError, RowsError
from honeloom.mixture.clusters import assigned, clusters, kmeans
from honeloom.mixture.discriminants import discriminant, rows, shrinkage_of
from honeloom.mixture.evidence import Evidence, Gate, as_mlp
from honeloom.mixture.prompts import prompts
from honeloom.mixture.random import random
from honeloom.mixture.smile import smile
from honeloom.ops.lowrank import LinearMap

SETTINGS = {"shrinkage": None, "folds": 4, "scale": 1.0}


def blobs(classes, count, width, distance, seed=0):
    """Vectors around centres: (N, H), (N,)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator, dtype=torch.float64) * distance
    labels = torch.arange(classes).repeat_interleave(count)
    noise = torch.randn(classes * count, width, generator=generator, dtype=torch.float64)
    return centres[labels] + noise, labels


def matrix(values):
    wide = values.double()
    return LinearMap((wide.shape[0], wide.shape[1]), lambda x: wide @ x, lambda x: wide.T @ x)


def test_random_rows_have_length_one_and_follow_from_seed_and_name():
    evidence = Evidence("layers.0", 4, 16, seed=3)
    weight = random(evidence, scale=2.0).tensors["weight"]
    torch.testing.assert_close(weight.norm(dim=1), torch.full((4,), 2.0))
    assert torch.equal(weight, random(evidence, scale=2.0).tensors["weight"])
    for other in (Evidence("layers.1", 4, 16, seed=3), Evidence("layers.0", 4, 16, seed=4)):
        assert not torch.equal(weight, random(other, scale=2.0).tensors["weight"])


def test_prompts_by_hand():
    """Means (4, 0), minus the negative (1, 0), and (1, 4): seen from their mean (2, 2) they are (1, -2) and (-1, 2)."""
    positive = (torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.tensor([[1.0, 4.0]]))
    negative = (torch.tensor([[1.0, 0.0]]), torch.zeros(0, 2))
    gate = prompts(Evidence("g", 2, 2, positive=positive, negative=negative), scale=3.0)
    direction = torch.tensor([1.0, -2.0]) / math.sqrt(5)
    torch.testing.assert_close(gate.tensors["weight"], 3 * torch.stack((direction, -direction)))


def test_prompts_that_say_the_same_are_refused():
    same = torch.tensor([[1.0, 2.0]])
    with pytest.raises(ConfigError, match="2 of 2 experts"):
        prompts(Evidence("g", 2, 2, positive=(same, same), negative=(same[:0], same[:0])), scale=1.0)


def test_one_expert_keeps_its_prompts_direction():
    gate = prompts(
        Evidence("g", 1, 2, positive=(torch.tensor([[3.0, 4.0]]),), negative=(torch.zeros(0, 2),)), scale=1.0
    )
    torch.testing.assert_close(gate.tensors["weight"], torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize("count", [60, 5])
def test_shrinkage_is_that_of_ledoit_and_wolf(count):
    vectors, _ = blobs(1, count, 12, 0.0)
    centred = vectors - vectors.mean(dim=0)
    assert shrinkage_of(centred) == pytest.approx(
        ledoit_wolf_shrinkage(centred.numpy(), assume_centered=True), abs=1e-10
    )


@pytest.mark.parametrize("count", [40, 4])
def test_discriminants_are_those_of_lda(count):
    """More vectors than dimensions, and fewer: both ways to solve give what the library gives."""
    vectors, labels = blobs(3, count, 20, 0.5)
    found = discriminant(vectors, labels, 3, intercept=True, shrinkage=0.3)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3).fit(vectors, labels)
    wanted = theirs.decision_function(vectors)
    scores = found.scores(vectors).numpy()
    np.testing.assert_allclose(scores - scores[:, :1], wanted - wanted[:, :1], atol=1e-8)
    posterior = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(posterior, theirs.predict_proba(vectors), atol=1e-8)


def test_ridge_without_intercept_is_the_normal_equations():
    vectors, labels = blobs(3, 30, 8, 1.0)
    found = discriminant(vectors, labels, 3, intercept=False, shrinkage=0.2)
    indicators = torch.nn.functional.one_hot(labels, 3).double()
    moment = vectors.T @ vectors / len(vectors)
    shrunk = 0.8 * moment + 0.2 * moment.trace() / 8 * torch.eye(8, dtype=torch.float64)
    wanted = torch.linalg.solve(shrunk, vectors.T @ (indicators - indicators.mean(dim=0)) / len(vectors)).T
    factor = found.weight / wanted
    torch.testing.assert_close(factor, factor.mean().expand_as(factor))
    assert float(found.bias.abs().max()) == 0.0


@pytest.mark.parametrize("intercept", [True, False])
def test_accuracy_is_of_rows_that_were_not_seen(intercept):
    vectors, labels = blobs(2, 40, 30, 2.0)
    of_row = torch.arange(80)
    evidence = Evidence("g", 2, 30, intercept=intercept, vectors=vectors, rows=of_row, labels=labels)
    gate = rows(evidence, **SETTINGS)
    assert gate.accuracy > 0.95
    assert gate.floor == 0.5
    assert ("bias" in gate.tensors) == intercept
    noise, _ = blobs(1, 80, 30, 0.0, seed=5)
    blind = rows(Evidence("g", 2, 30, intercept=intercept, vectors=noise, rows=of_row, labels=labels), **SETTINGS)
    assert blind.accuracy < 0.75  # of what it has seen it would name nearly all


def test_vectors_of_one_row_stay_together():
    """Every row has a direction of its own and the labels are drawn: only a leak could tell them."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(24, 200, generator=generator, dtype=torch.float64)
    of_row = torch.arange(24).repeat_interleave(8)
    vectors = directions[of_row] + 0.01 * torch.randn(192, 200, generator=generator, dtype=torch.float64)
    labels = torch.arange(24) % 2
    found = rows(Evidence("g", 2, 200, intercept=True, vectors=vectors, rows=of_row, labels=labels), **SETTINGS)
    assert found.accuracy < 0.8


def test_an_expert_without_rows_is_named():
    vectors, labels = blobs(2, 4, 5, 1.0)
    evidence = Evidence("g", 3, 5, vectors=vectors, rows=torch.arange(8), labels=labels)
    with pytest.raises(RowsError, match="no row belongs to expert 2"):
        rows(evidence, **SETTINGS)


def test_kmeans_finds_what_the_library_finds_whatever_the_order():
    vectors, labels = blobs(4, 25, 10, 3.0)
    found = kmeans(vectors, 4, seed=0, restarts=8)
    points = (vectors - vectors.mean(dim=0)).numpy()
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    theirs = KMeans(4, n_init=10, random_state=0).fit(points)

    def inertia(groups):
        return sum(((points[groups == k] - points[groups == k].mean(axis=0)) ** 2).sum() for k in range(4))

    assert inertia(found.numpy()) <= theirs.inertia_ + 1e-9
    assert len(set(zip(found.tolist(), labels.tolist(), strict=True))) == 4
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    moved = kmeans(vectors[order], 4, seed=0, restarts=8)
    assert len(set(zip(moved.tolist(), found[order].tolist(), strict=True))) == 4


def test_too_few_rows_for_the_groups():
    with pytest.raises(RowsError, match="2 rows cannot be cut into 3"):
        kmeans(torch.randn(2, 4), 3, seed=0, restarts=1)


def test_groups_go_to_the_experts_of_least_loss_one_each():
    """Both groups like expert 0 best; the sum is least if group 1, which gains more, gets it."""
    groups = torch.tensor([0, 0, 1, 1])
    losses = torch.tensor([[1.0, 1.1], [1.0, 1.1], [1.0, 3.0], [1.0, 3.0]])
    assert assigned(groups, losses).tolist() == [1, 1, 0, 0]


def test_clusters_of_rows_become_a_gate():
    vectors, labels = blobs(2, 30, 12, 3.0)
    losses = torch.stack((1.0 - labels.double(), labels.double()), dim=1)
    evidence = Evidence(
        "g", 2, 12, intercept=True, vectors=vectors, rows=torch.arange(60), pooled=vectors, losses=losses
    )
    gate = clusters(evidence, restarts=4, **SETTINGS)
    scores = vectors.float() @ gate.tensors["weight"].T + gate.tensors["bias"]
    assert torch.equal(scores.argmax(dim=1), 1 - labels)
    assert gate.accuracy == 1.0


def test_smile_of_rank_one_changes():
    """Task vectors u v^T with orthogonal v: a basis is its v up to the sign, and the score |v . x|."""
    u = torch.arange(1.0, 7.0)
    one, two = torch.zeros(4), torch.zeros(4)
    one[0], two[2] = 1.0, 1.0
    changes = (matrix(torch.outer(u, one)), matrix(torch.outer(u, two)), matrix(torch.zeros(6, 4)))
    basis = smile(Evidence("g", 3, 4, changes=changes), rank=1, scale=1.0).tensors["basis"]
    x = torch.tensor([3.0, 5.0, -2.0, 7.0])
    torch.testing.assert_close((basis @ x).norm(dim=1), torch.tensor([3.0, 2.0, 0.0]), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="no expert differs"):
        smile(Evidence("g", 1, 4, changes=changes[2:]), rank=1, scale=1.0)


def test_smile_keeps_what_the_decomposition_has():
    change = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).double()
    basis = smile(Evidence("g", 1, 8, changes=(matrix(change),)), rank=3, scale=1.0).tensors["basis"][0].double()
    right = torch.linalg.svd(change).Vh[:3]
    torch.testing.assert_close(basis.T @ basis, right.T @ right, atol=1e-6, rtol=0)


def test_an_mlp_gate_begins_as_the_linear_one():
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([0.1, -0.2, 0.3])
    gate = as_mlp(Gate({"weight": weight, "bias": bias}, 0.5, 0.3), 8, torch.randn(2, 5))
    x = torch.randn(7, 5)
    for act in (torch.nn.functional.silu, torch.relu, torch.nn.functional.gelu):
        scores = act(x @ gate.tensors["up.weight"].T) @ gate.tensors["down.weight"].T + gate.tensors["down.bias"]
        torch.testing.assert_close(scores, x @ weight.T + bias)
    assert (gate.accuracy, gate.floor) == (0.5, 0.3)
    with pytest.raises(ValueError, match="twice the number"):
        as_mlp(Gate({"weight": weight}), 4, torch.zeros(0, 5))
