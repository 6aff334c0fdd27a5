"""DSIR, greedy k-center, dataset quantization, and scores from a file: against laws, enumeration and hand work."""

import math
from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import chisquare

from honeloom.errors import ConfigError, SourceError
from honeloom.selection.choose import take_best
from honeloom.selection.dq import dq, graph_cut_bins
from honeloom.selection.dsir import dsir, log_ratios
from honeloom.selection.k_center import greedy_centers, k_center
from honeloom.selection.scores import scores
from honeloom.testing import FakeRows, check_selector
from honeloom.testing.fakes import chat_row
from honeloom.types.ports import SelectionData


def no_model():
    raise AssertionError("no model is needed")


def texts(*answers, prefix="r"):
    return FakeRows(chat_row(f"{prefix}{i}", "say", answer) for i, answer in enumerate(answers))


def data(rows, **given):
    return SelectionData(rows, no_model, given.pop("seed", 0), **given)


def names(n):
    return [f"row-{i:04d}" for i in range(n)]


def unit(n, d, seed=0):
    found = np.random.default_rng(seed).normal(size=(n, d))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("method", [dsir, k_center, dq])
def test_the_baselines_conform(method):
    check_selector(method)


MIXED = ("red green blue", "one two three four five", "red one", "blue blue blue red", "six")


@pytest.mark.parametrize("buckets", [2, 64, 10_000])
def test_a_target_equal_to_the_rows_gives_weights_of_exactly_zero(buckets):
    found = dsir(data(texts(*MIXED), target=texts(*MIXED)), buckets=buckets, noise=False)
    assert found.value == (0.0,) * 5


def test_rows_with_the_words_of_the_target_come_first():
    found = dsir(data(texts(*MIXED), target=texts("red blue green", "green red")), noise=False)
    assert sorted(range(5), key=lambda i: -found.value[i])[0] in (0, 3)
    assert found.value[0] > 0 > found.value[1]
    assert found.columns["log_weight"] == list(found.value)
    assert found.columns["ngrams"] == [7, 11, 5, 9, 3]  # words of prompt and answer, and the pairs of neighbours


def test_ratios_by_hand():
    """A prior of 2 n-grams, as many as buckets, spread as the pool's 3 and 1; the target has one in each bucket."""
    found = log_ratios(np.array([1, 1]), np.array([3, 1]))
    assert np.exp(found) == pytest.approx([(1 * 4 / 3 + 2) / 4, (1 * 4 / 1 + 2) / 4])
    assert log_ratios(np.array([5, 1]), np.array([0, 1]))[0] == 0.0
    pool = np.array([3, 1])
    assert (np.exp(found) * pool / pool.sum()).sum() == pytest.approx(1.0)  # smoothed, it is a distribution


def test_length_alone_earns_nothing():
    """Beyond the mean length a row of the same words has the same weight; below it, the sum over its n-grams."""
    answers = " ".join(["red"] * 100), " ".join(["red"] * 1000), " ".join(["red"] * 10), *["one two three"] * 40
    rows = FakeRows(chat_row(f"r{i}", "", answer) for i, answer in enumerate(answers))
    found = dsir(data(rows, target=texts("red red red red")), buckets=64, noise=False)
    assert np.mean(found.columns["ngrams"]) < found.columns["ngrams"][0] == 199
    assert found.value[1] == pytest.approx(found.value[0], rel=0.01)
    assert found.value[2] / 19 == pytest.approx(found.value[0] / np.mean(found.columns["ngrams"]), rel=0.1)


def test_gumbel_noise_draws_without_replacement_in_proportion_to_the_weights():
    """Chosen pairs over many seeds against the law of two sequential draws."""
    rows, target = texts("red", "one two", "red green", "six"), texts("red green")
    weights = np.exp(dsir(data(rows, target=target), buckets=512, noise=False).value)
    p = weights / weights.sum()
    chances = {
        frozenset(pair): sum(p[a] * p[b] / (1 - p[a]) for a, b in permutations(pair))
        for pair in combinations(range(4), 2)
    }
    assert sum(chances.values()) == pytest.approx(1)
    seen = dict.fromkeys(chances, 0)
    for seed in range(1500):
        found = dsir(data(rows, target=target, seed=seed), buckets=512)
        seen[frozenset(take_best(found, rows.ids, amount=2, unit="rows", seed=0).keep)] += 1
    assert chisquare(list(seen.values()), [1500 * c for c in chances.values()]).pvalue > 0.001


def test_dsir_needs_a_target_with_words_and_scores_no_row_without():
    with pytest.raises(ConfigError, match="needs a target"):
        dsir(data(texts("red")))
    empty = FakeRows([chat_row("e", "", " ")])
    with pytest.raises(ConfigError, match="none of the 1 rows of the target has a word"):
        dsir(data(texts("red"), target=empty))
    assert dsir(data(FakeRows([*empty, *texts("red")]), target=texts("red"))).value[0] == -math.inf


def radius(vectors, centers):
    gaps = np.linalg.norm(vectors[:, None].astype(float) - vectors[list(centers)].astype(float), axis=2)
    return gaps.min(axis=1).max()


@pytest.mark.parametrize("seed", range(8))
def test_greedy_centers_are_within_twice_the_best_radius(seed):
    vectors = unit(10, 3, seed)
    order, _ = greedy_centers(vectors, names(10), 10)
    for k in range(1, 10):
        best = min(radius(vectors, chosen) for chosen in combinations(range(10), k))
        assert radius(vectors, order[:k]) <= 2 * best + 1e-6


def test_values_are_distances_to_the_rows_before():
    vectors = unit(40, 5)
    order, values = greedy_centers(vectors, names(40), 25)
    assert sorted(order) == list(range(40))
    assert values[order[0]] == 2.0
    for place in range(1, 25):
        gaps = np.linalg.norm(vectors[order[:place]] - vectors[order[place]], axis=1)
        assert values[order[place]] == pytest.approx(gaps.min(), abs=1e-3)
    assert (np.diff(values[order]) <= 0).all()
    assert order[0] == np.linalg.norm(vectors - vectors.mean(axis=0), axis=1).argmin()


def test_rows_beyond_the_wanted_ones_follow_by_distance_and_those_without_vector_last():
    vectors = 3.0 * unit(30, 4)
    vectors[4], vectors[9], vectors[2] = np.nan, 0.0, np.inf
    rows = FakeRows(chat_row(i, "q", "a") for i in names(30))
    found = k_center(data(rows, wanted=6, embed=lambda rows, how: vectors))
    assert sorted(found.order[-3:]) == [2, 4, 9]
    assert [found.value[i] for i in (2, 4, 9)] == [-math.inf] * 3
    assert found.details["centers"] == 6
    assert found.details["radius"] == found.value[found.order[6]]
    rest = [found.value[i] for i in found.order[6:27]]
    assert rest == sorted(rest, reverse=True)


def test_centers_do_not_depend_on_the_order_of_rows_and_ties_go_to_the_lowest_id():
    vectors, ids = np.concatenate([unit(50, 6)] * 2), names(100)
    turned = np.random.default_rng(1).permutation(100)
    one, _ = greedy_centers(vectors, ids, 60)
    other, _ = greedy_centers(vectors[turned], [ids[i] for i in turned], 60)
    assert [ids[i] for i in one] == [ids[turned[i]] for i in other]
    assert all(i < 50 for i in one[:50])  # the copies of rows have higher ids


def test_no_row_with_a_vector_leaves_all_unscored():
    rows = FakeRows(chat_row(i, "q", "a") for i in names(4))
    for method in (k_center, dq):
        found = method(data(rows, embed=lambda rows, how: np.full((4, 3), np.nan, np.float32)))
        assert found.value == (-math.inf,) * 4


def slow_bins(vectors, bins):
    """The greedy rule by its definition, all cosines at hand."""
    cosines = vectors.astype(float) @ vectors.T.astype(float)
    left, found = list(range(len(vectors))), np.zeros(len(vectors), dtype=int)
    for number in range(bins):
        rest, taken = list(left), []
        for _ in range(len(vectors) // bins + (number < len(vectors) % bins)):
            gains = {
                i: sum(cosines[i, r] for r in rest if r not in taken) - sum(cosines[i, s] for s in taken) for i in left
            }
            best = max(left, key=lambda i: (round(gains[i], 4), -i))
            taken.append(best)
            left.remove(best)
        found[taken] = number
    return found


@pytest.mark.parametrize("bins", [1, 3, 5])
def test_bins_follow_the_greedy_rule(bins):
    vectors = unit(32, 6, seed=bins)
    assert (graph_cut_bins(vectors, bins, ties=np.arange(32.0)) == slow_bins(vectors, bins)).all()


def test_every_prefix_samples_the_bins_evenly():
    rows = FakeRows(chat_row(i, "q", "a") for i in names(200))
    vectors = unit(200, 8)
    vectors[17] = np.nan
    found = dq(data(rows, embed=lambda rows, how: vectors), bins=4)
    bins = found.columns["bin"]
    assert bins[17] is None
    assert found.order[-1] == 17
    for taken in (40, 100):
        counts = np.bincount([bins[i] for i in found.order[:taken]], minlength=4)
        assert abs(counts - taken / 4).max() <= 1
    other = dq(data(rows, embed=lambda rows, how: vectors, seed=1), bins=4)
    assert other.columns == found.columns
    assert other.order != found.order


def test_many_rows_are_chosen_several_at_a_time(monkeypatch):
    monkeypatch.setattr("honeloom.selection.dq.STEPS", 10)
    found = graph_cut_bins(unit(101, 4), 7, ties=np.arange(101.0))
    assert np.bincount(found).tolist() == [15, 15, 15, 14, 14, 14, 14]


def table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_scores_go_to_their_ids(tmp_path):
    path = table(
        tmp_path / "s.parquet", id=["r2", "r0", "other", "r3"], score=[2.0, 1.0, 9.0, None],
        stderr=[0.5, None, 0.1, 0.2], cluster=[4, 5, 6, None],
    )  # fmt: skip
    said = []
    found = scores(replace(data(texts("a", "b", "c", "d")), say=said.append), path=path)
    assert found.value == (1.0, -math.inf, 2.0, -math.inf)
    assert found.stderr == (math.inf, math.inf, 0.5, 0.2)
    assert found.columns == {"cluster": [5, None, 4, None]}
    assert found.order is None
    assert "1 of 4 rows are not named" in said[0]


def test_ranks_give_the_order(tmp_path):
    path = table(tmp_path / "s.parquet", id=["r0", "r1", "r2"], score=[1.0, 2.0, 3.0], rank=[1, 0, 2])
    found = scores(data(texts("a", "b", "c", "d")), path=path)
    assert found.order == [1, 0, 2, 3]
    assert found.stderr is None and found.columns is None


def test_scores_follow_the_rows_and_the_first_of_two_entries_counts(tmp_path):
    path = table(tmp_path / "s.parquet", id=[f"row-{i}" for i in range(20)] * 2, score=[float(i) for i in range(40)])
    check_selector(scores, path=path)
    warned = []
    rows = FakeRows([chat_row("row-3", "q", "a"), chat_row("row-3", "q", "a")])
    found = scores(replace(data(rows), warn=warned.append), path=path)
    assert found.value == (3.0, 3.0)
    assert "1 entries repeat an id" in warned[0]


def test_what_is_wrong_with_a_file_of_scores_is_said(tmp_path):
    rows = data(texts("a"))
    (tmp_path / "text.parquet").write_text("id,score\n")
    cases = {
        str(tmp_path / "text.parquet"): "not a readable Parquet file",
        str(tmp_path / "absent.parquet"): "no such file; give a scores.parquet",
        table(tmp_path / "a.parquet", name=["r0"], value=[1.0]): r"no column id and no column score \(columns: name, v",
        table(tmp_path / "b.parquet", id=["r0"], value=[1.0]): "has no column score",
        table(tmp_path / "c.parquet", id=["r0"], score=["high"]): "column score holds string, expected numbers",
        table(tmp_path / "d.parquet", id=[0], score=[1.0]): "column id holds int64, expected text",
        table(tmp_path / "e.parquet", id=["x"], score=[1.0]): "names none of the 1 rows",
    }
    for path, message in cases.items():
        with pytest.raises(SourceError, match=message) as caught:
            scores(rows, path=path)
        assert path in str(caught.value)
