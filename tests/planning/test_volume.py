"""How much work a stage is: sums that can be done by hand."""

from honeloom.planning.volume import QUANTILES, Lengths, backward, batch_sizes, greedy_losses, score, totals, train

ROWS = Lengths.of(4, [10, 20, 30, 40], [2, 4, 6, 8], [[10], [20], [30], [40]], counted=True)


def test_lengths_of_rows_that_were_looked_at():
    assert (ROWS.rows, ROWS.tokens, ROWS.targets, ROWS.scored, ROWS.total, ROWS.longest) == (4, 25, 5, 25, 100, 40)
    some = Lengths.of(1000, [10, 20], [1, 1], [[10], [20]], counted=False)
    assert (some.total, some.counted) == (15_000, False)
    assert ROWS.take(2).total == 50
    assert ROWS.take(4) is ROWS
    assert Lengths.of(0, [], [], [], counted=True).total == Lengths(5).longest == 0


def test_choices_are_scored_one_by_one():
    rows = Lengths.of(2, [12, 14], [2, 4], [[12, 11, 13], [14, 14, 14]], counted=True)
    assert (rows.scored, rows.sequences, rows.total, rows.longest) == (39, 3, 26, 14)
    assert score("x", rows, batch=8).tokens == 78


def test_answers_alone_are_shorter():
    alone = ROWS.answers()
    assert (alone.scored, alone.rows) == (6, 4)
    assert alone.scored_sizes == (2, 5, 7, 10)


def test_quantiles_are_bounded_and_keep_both_ends():
    sizes = list(range(1, 1001))
    kept = Lengths.of(1000, sizes, sizes, [[n] for n in sizes], counted=True).sizes
    assert (len(kept), kept[0], kept[-1]) == (QUANTILES, 1, 1000)
    assert list(kept) == sorted(kept)


def test_batches_of_a_pass_hold_rows_of_similar_length():
    sizes = list(range(1, 65))
    rows = Lengths.of(64, sizes, sizes, [[n] for n in sizes], counted=True)
    assert batch_sizes(score("x", rows, batch=32), 4) == [sizes[:32], sizes[32:]]
    some = batch_sizes(score("x", rows, batch=4), 2)
    assert some == [[17, 18, 19, 20], [49, 50, 51, 52]]
    assert batch_sizes(score("x", ROWS, batch=2), 4) == [[10, 20], [30, 40]]
    assert batch_sizes(score("x", ROWS.take(2), batch=4), 4) == [[10, 20, 30, 40]]


def test_passes_steps_and_gradients_add_up():
    parts = [
        score("twice", ROWS, batch=2, times=2),
        train("steps", ROWS, steps=3, batch=8),
        train("part of a step", ROWS, steps=2, batch=3, rows=5),
        backward("gradients", ROWS, batch=2),
        train("zeroth order", ROWS, steps=2, batch=2, tuning={"optimizer": {"type": "mezo", "directions": 3}}),
    ]
    assert [p.tokens for p in parts] == [200, 600, 125, 100, 100]
    assert [p.rendered for p in parts] == [8, 4, 4, 4, 4]
    assert totals(parts) == (200 + 6 * 100, 600 + 125 + 100, 3 + 2 + 2)


def test_a_greedy_choice_measures_all_that_is_left():
    assert greedy_losses(8, 3) == 1 + 8 + 7 + 6
    assert greedy_losses(2, 5) == 1 + 2 + 1
