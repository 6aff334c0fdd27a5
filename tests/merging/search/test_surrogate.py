"""The quadratic that is fitted to candidates."""

from __future__ import annotations

import numpy as np
import pytest

from honeloom.merging.search.surrogate import lowest_of_quadratic

DICE = np.random.default_rng(0)
HESSIAN = np.array([[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 1.5]])


def quadratic(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    gaps = points - centre
    return 7 + 0.5 * np.einsum("mi,ij,mj->m", gaps, HESSIAN, gaps)


def test_the_minimum_of_a_quadratic_is_found_exactly():
    points, centre = DICE.uniform(size=(20, 3)), np.array([0.2, 0.7, 0.4])
    found = lowest_of_quadratic(points, quadratic(points, centre), np.ones(20))
    assert found == pytest.approx(centre, abs=1e-6)


def test_the_minimum_is_held_within_bounds():
    # Along a1 = 0 the lowest point of the rest: -H_rr^-1 H_r1 (0 - c1).
    points, centre = DICE.uniform(size=(20, 3)), np.array([-0.2, 0.5, 0.5])
    found = lowest_of_quadratic(points, quadratic(points, centre), np.ones(20))
    rest = centre[1:] - np.linalg.solve(HESSIAN[1:, 1:], HESSIAN[1:, 0] * 0.2)
    assert found == pytest.approx(np.array([0.0, *rest]), abs=1e-6)


def test_with_few_points_there_are_no_cross_terms_and_with_fewer_nothing():
    points, centre = DICE.uniform(size=(11, 3)), np.array([0.2, 0.7, 0.4])
    levels = ((points - centre) ** 2).sum(axis=1)
    assert lowest_of_quadratic(points, levels, np.ones(11)) == pytest.approx(centre, abs=1e-6)
    assert lowest_of_quadratic(points[:10], levels[:10], np.ones(10)) is None


def test_a_saddle_has_no_minimum():
    points = DICE.uniform(size=(20, 2))
    assert lowest_of_quadratic(points, points[:, 0] ** 2 - points[:, 1] ** 2, np.ones(20)) is None


def test_points_count_by_their_weights():
    points = DICE.uniform(size=(40, 2))
    levels = ((points - 0.5) ** 2).sum(axis=1)
    wrong = levels.copy()
    wrong[::3] += DICE.standard_normal(14)
    weights = np.where(np.arange(40) % 3, 1.0, 1e-12)
    assert lowest_of_quadratic(points, wrong, weights) == pytest.approx([0.5, 0.5], abs=1e-3)
