"""Search methods on scorers whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_ports import FormulaPort

from honeloom.errors import ConfigError
from honeloom.merging.search import METHODS
from honeloom.merging.search.average import average
from honeloom.merging.search.candidates import Candidate
from honeloom.merging.search.cma import cma_es
from honeloom.merging.search.coefficient import coefficient
from honeloom.merging.search.layerwise import layerwise
from honeloom.merging.search.similarity_walk import similarity
from honeloom.registry import load_target

THIRD = (1 / 3, 1 / 3, 1 / 3)


def near(target: tuple[float, ...]):
    """Squared distance of the weights from a target, in every group."""
    return lambda weights: float(((weights - np.array(target)) ** 2).sum() / len(weights))


def members(values: dict[frozenset[int], float]):
    """A value per set of models with a weight."""
    return lambda weights: values[frozenset(np.flatnonzero(weights[0]).tolist())]


def sets(*entries: tuple[tuple[int, ...], float]) -> dict[frozenset[int], float]:
    return {frozenset(members): value for members, value in entries}


def test_average_counts_the_seed_once_and_a_rejected_model_changes_nothing():
    # In the order of the single values 0, 1, 2, 3; with 2 it gets worse.
    values = sets(((0,), 1.0), ((1,), 2.0), ((2,), 3.0), ((3,), 4.0), ((0, 1), 0.9), ((0, 1, 2), 5.0), ((0, 1, 3), 0.5))
    port = FormulaPort(members(values), 4)
    found = average(port.data())
    assert [c.weights[0] for c in port.measured] == [
        (0.5, 0.5, 0, 0), pytest.approx((*THIRD, 0)), pytest.approx((1 / 3, 1 / 3, 0, 1 / 3)),
    ]  # fmt: skip
    assert [step.accepted for step in found.trace] == [True, False, True]
    assert found.candidate == port.measured[2]
    assert found.value.value == 0.5
    assert (found.evaluations, found.single, found.stopped) == (3, None, "all models were tried")


def test_average_begins_with_the_best_single_model_not_the_first():
    values = sets(((0,), 3.0), ((1,), 1.0), ((2,), 2.0), ((1, 2), 0.9), ((0, 1, 2), 2.0))
    port = FormulaPort(members(values), 3)
    found = average(port.data())
    assert [c.weights[0] for c in port.measured] == [(0, 0.5, 0.5), pytest.approx(THIRD)]
    assert found.candidate.weights == ((0, 0.5, 0.5),)


def test_two_steps_of_average_give_halves_then_thirds():
    values = sets(((0,), 1.0), ((1,), 2.0), ((2,), 3.0), ((0, 1), 0.9), ((0, 1, 2), 0.8))
    port = FormulaPort(members(values), 3)
    found = average(port.data())
    assert [c.weights[0] for c in port.measured] == [(0.5, 0.5, 0), pytest.approx(THIRD)]
    assert sum(found.candidate.weights[0]) == pytest.approx(1, abs=1e-15)


def test_coefficient_keeps_the_best_of_the_grid_and_coefficients_are_products():
    # w = 0.7 for model 1, then 0.6 for model 2: (.42, .18, .40). Model 2 pulls only once model 1 is in.
    wanted = np.array([0.42, 0.18, 0.40])

    def value(weights: np.ndarray) -> float:
        row = weights[0]
        if row[2] == 0:
            return 1 + abs(row[0] - 0.7)
        return float(np.abs(row - wanted).sum()) if row[1] > 0 else 2.0

    port = FormulaPort(value, 3)
    found = coefficient(port.data())
    assert found.candidate.weights[0] == pytest.approx(tuple(wanted), abs=1e-15)
    assert sum(found.candidate.weights[0]) == pytest.approx(1, abs=1e-15)
    assert [c.weights[0][0] for c in port.measured[:9]] == pytest.approx([0.1 * i for i in range(1, 10)])
    accepted = [step.candidate.weights[0] for step in found.trace if step.accepted]
    assert accepted == [pytest.approx((0.7, 0.3, 0)), pytest.approx((0.42, 0.18, 0.40))]
    assert found.evaluations == 18


def test_coefficient_takes_the_larger_share_of_the_merge_of_two_equal_values():
    port = FormulaPort(lambda weights: 1.0 if weights[0].max() == 1 else 0.5, 2)
    assert coefficient(port.data(), grid=(0.3, 0.6)).candidate.weights == (pytest.approx((0.6, 0.4)),)


@pytest.mark.parametrize(("order", "first"), [("descending", 2), ("ascending", 1)])
def test_similarity_chooses_by_the_weighted_mean_of_the_matrix(order, first):
    matrix = np.array([[1, 0.1, 0.9, 0.5], [0.1, 1, 0.2, 0.3], [0.9, 0.2, 1, 0.8], [0.5, 0.3, 0.8, 1]])
    port = FormulaPort(lambda weights: 1 - 0.1 * np.count_nonzero(weights[0]) - 0.001 * weights[0][0], 4)
    similarity(port.data(similarity=matrix), order=order, grid=(0.5,))
    newcomers = []
    for one, two in zip([Candidate.single(0, 4, 1), *port.measured[:-1]], port.measured, strict=True):
        newcomers += sorted(set(np.flatnonzero(two.array[0])) - set(np.flatnonzero(one.array[0])))
    assert newcomers[0] == first
    # After (0, 2) at (.5, .5): 1 has .15 and 3 has .65; after (0, 1): 2 has .55 and 3 has .4.
    assert newcomers == ([2, 3, 1] if order == "descending" else [1, 3, 2])


def test_similarity_needs_a_matrix_of_the_right_size():
    port = FormulaPort(near((1, 0)), 2)
    with pytest.raises(ConfigError, match="none was given"):
        similarity(port.data())
    with pytest.raises(ConfigError, match=r"2 x 2; it is \(3, 3\)"):
        similarity(port.data(similarity=np.eye(3)))


def test_cma_finds_the_optimum_of_a_quadratic_within_200_evaluations():
    wanted = (0.31, 0.12, 0.77, 0.45)
    port = FormulaPort(near(wanted), 4)
    found = cma_es(port.data(averages=False), budget=200)
    assert found.evaluations <= 200
    assert np.abs(found.candidate.array - wanted).max() <= 1e-3
    assert found.single is None


def test_cma_without_the_surrogate_finds_it_too_but_later():
    wanted = (0.31, 0.12, 0.77, 0.45)
    found = cma_es(FormulaPort(near(wanted), 4).data(averages=False), budget=600, surrogate=False, patience=100)
    assert 200 < found.evaluations <= 600
    assert np.abs(found.candidate.array - wanted).max() <= 1e-3


def test_cma_finds_an_optimum_on_the_boundary_of_what_is_no_quadratic():
    wanted = np.array([0.0, 0.9, 0.1])

    def value(weights: np.ndarray) -> float:
        gap = weights[0] - wanted
        return float(gap @ gap + 0.3 * gap[0] * gap[1] + (gap**4).sum() + 0.3 * (gap**3).sum())

    found = cma_es(FormulaPort(value, 3).data(averages=False), budget=200)
    assert np.abs(found.candidate.array - wanted).max() <= 1e-3


def test_cma_normalises_weights_where_only_ratios_count():
    wanted = (0.6, 0.3, 0.1)
    port = FormulaPort(near(wanted), 3)
    found = cma_es(port.data(averages=True), budget=250)
    assert all(abs(sum(row) - 1) < 1e-12 for c in port.measured for row in c.weights)
    assert port.measured[0].weights == (pytest.approx(THIRD),)
    assert np.abs(found.candidate.array - wanted).max() <= 1e-2


def test_cma_searches_groups_and_densities():
    port = FormulaPort(near((0.2, 0.4)), 2, groups=3)
    found = cma_es(port.data(averages=False, density=0.5), budget=60, densities=True)
    assert found.candidate.array.shape == (3, 2)
    assert len(found.candidate.densities) == 2
    assert all(0.01 <= d <= 1 for c in port.measured for d in c.densities)
    assert port.measured[0].densities == (0.5, 0.5)
    with pytest.raises(ConfigError, match="has no density"):
        cma_es(port.data(), densities=True)


def test_cma_leaves_numpys_generator_alone_and_repeats_itself():
    port = FormulaPort(near((0.2, 0.4)), 2)
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    one = cma_es(port.data(averages=False, seed=3), budget=40)
    assert (np.random.get_state()[1] == before).all()
    assert cma_es(port.data(averages=False, seed=3), budget=40) == one
    assert cma_es(port.data(averages=False, seed=4), budget=40).trace != one.trace


def test_cma_ends_when_nothing_improves():
    port = FormulaPort(lambda weights: 0.0 if weights.max() == 1 and np.count_nonzero(weights) == 1 else 1.0, 2)
    found = cma_es(port.data(), patience=3)
    assert found.evaluations <= 1 + 3 * 6 + 1
    assert found.single == "m0"


def test_layerwise_descends_to_the_optimum_of_each_layer():
    wanted = np.array([[0.2, 0.9], [0.6, 0.1], [0.4, 0.4]])
    port = FormulaPort(
        lambda w: float(((w - wanted) ** 2).sum()), 2, rows=32, groups=3, slope=lambda w: 2 * (w - wanted)
    )
    found = layerwise(port.data(averages=False), steps=300, lr=0.02, batch=8, checks=3)
    assert np.abs(found.candidate.array - wanted).max() < 1e-2
    assert found.evaluations == 1 + 300 + 3
    assert found.rows_evaluated == port.rows_measured + 300 * 8


def test_layerwise_first_step_is_adams():
    # The first step of Adam is lr against the sign of the gradient.
    port = FormulaPort(
        lambda w: float((w @ [1.0, -1.0]).sum()), 2, groups=2, slope=lambda w: np.tile([1.0, -1.0], (2, 1))
    )
    found = layerwise(port.data(averages=False), steps=1, lr=0.25, batch=2, checks=1)
    assert port.measured[-1].array == pytest.approx(np.tile([0.25, 0.75], (2, 1)), abs=1e-6)
    assert found.single == "m1"  # alone it scores less than any mixture


@pytest.mark.parametrize("name", [m.name for m in METHODS])
def test_no_search_returns_what_is_no_better_than_the_best_single_model(name):
    port = FormulaPort(near((0, 1)), 2, groups=1, slope=lambda w: 2 * (w - np.array([0, 1])))
    said: list[str] = []
    row = next(m for m in METHODS if m.name == name)
    limits = {"cma": {"budget": 30}, "layerwise": {"steps": 3}}.get(name, {})
    found = load_target(row.target)(port.data(similarity=np.eye(2), say=said.append), **limits)
    assert found.candidate == Candidate.single(1, 2, 1)
    assert found.single == "m1"
    assert found.value.value == 0
    assert said == ["search: no merge is better than m1 alone beyond noise"]


@pytest.mark.parametrize("name", [m.name for m in METHODS])
def test_a_budget_is_kept_and_the_best_is_not_forgotten(name):
    port = FormulaPort(near((0.5, 0.3, 0.2)), 3, slope=lambda w: 2 * (w - np.array([0.5, 0.3, 0.2])))
    row = next(m for m in METHODS if m.name == name)
    for budget in (1, 2, 5):
        found = load_target(row.target)(port.data(similarity=np.eye(3), budget=budget))
        assert found.evaluations <= budget
        least = min([s.value for s in found.trace], default=np.inf)
        assert found.value.value <= min(least, 0.38)  # 0.38 is the best single model


@given(st.permutations(range(4)), st.integers(0, 5))
def test_walks_do_not_depend_on_the_order_of_the_models(order, seed):
    dice = np.random.default_rng(seed)
    wanted, places = dice.dirichlet(np.ones(4)), np.array(order)
    plain = coefficient(FormulaPort(near(tuple(wanted)), 4).data(), grid=(0.25, 0.5, 0.75))
    mixed = coefficient(FormulaPort(near(tuple(wanted[places])), 4).data(), grid=(0.25, 0.5, 0.75))
    assert mixed.candidate.array[0] == pytest.approx(plain.candidate.array[0][places], abs=1e-12)
