"""Whose a row is, and which model is best where."""

from __future__ import annotations

import numpy as np

from honeloom.zoo.choice import assign_rows, best_by_domain, domain_means, fill_unread

ONE = np.array([[2.0, 1.0], [4.0, 2.0], [9.0, 3.0]])
OTHER = np.array([[1.0, 1.0], [6.0, 2.0], [6.0, 3.0]])


def test_means_are_ratios_of_sums() -> None:
    assert domain_means(ONE, ["a", "a", "b"]) == {"a": 2.0, "b": 3.0}


def test_the_best_of_every_domain() -> None:
    assert best_by_domain({"one": ONE, "other": OTHER}, ["a", "a", "b"]) == {"a": "one", "b": "other"}


def test_rows_go_to_the_expert_with_the_lowest_value_per_unit() -> None:
    assert assign_rows({"one": ONE, "other": OTHER}) == ["other", "one", "other"]


def test_equals_go_to_the_first() -> None:
    assert assign_rows({"one": ONE, "other": ONE.copy()}) == ["one"] * 3


def test_a_row_that_was_not_read_counts_as_the_worst_that_was() -> None:
    blind = ONE.copy()
    blind[1] = np.nan
    filled = fill_unread({"one": ONE, "other": OTHER, "blind": blind})
    np.testing.assert_array_equal(filled["blind"], [[2, 1], [6, 2], [9, 3]])
    np.testing.assert_array_equal(filled["one"], ONE)


def test_a_row_that_nobody_reads_weighs_nothing_and_is_nobodys() -> None:
    blind = np.full((1, 2), np.nan)
    filled = fill_unread({"one": blind, "other": blind.copy()})
    np.testing.assert_array_equal(filled["one"], [[0, 0]])
    assert assign_rows(filled) == [""]
