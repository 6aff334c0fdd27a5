"""Plans against hand-worked numbers, and exact choices against every possible one."""

import random
from itertools import product

import pytest
from plan_scores import scores_of

from honeloom.dropping.knapsack import choose_drops, choose_within, offers_of
from honeloom.dropping.normalise import is_native, normalise
from honeloom.dropping.plan import (
    Room,
    best_window,
    drop_plan,
    greedy,
    iterative,
    layer_numbers,
    neighbours,
    ranking,
    require_room,
    rounds_of,
)
from honeloom.dropping.scores import Unit
from honeloom.errors import ConfigError


def A(layer):
    return Unit("attention", layer)


def M(layer):
    return Unit("mlp", layer)


def B(layer, blocks=1):
    return Unit("block", layer, blocks)


def choose(scores, room=None, **counts):
    settings = {k: counts.pop(k) for k in ("alpha", "consecutive", "before") if k in counts}
    layers = max(len(scores.attention), len(scores.block))
    return choose_drops(scores, counts, room or Room(layers), **settings)


def test_ties_go_to_the_higher_layer_then_to_attention():
    scores = scores_of([0.1, 0.2, 0.2], [0.2, 0.2, 0.3])
    assert [u for _, u in ranking(scores, ("attention", "mlp"))] == [A(0), A(2), A(1), M(1), M(0), M(2)]


def test_joint_is_the_merge_of_both_rankings():
    attention, mlp = [0.4, 0.1, 0.3, 0.9], [0.2, 0.5, 0.15, 0.35]
    both = choose(scores_of(attention, mlp), joint=5)
    order = sorted([(v, 0, i) for i, v in enumerate(attention)] + [(v, 1, i) for i, v in enumerate(mlp)])
    assert both == tuple((A, M)[kind](i) for _, kind, i in order[:5])
    halves = {kind: [u for u in both if u.kind == kind] for kind in ("attention", "mlp")}
    assert halves["attention"] == list(choose(scores_of(attention, mlp), attention=2))
    assert halves["mlp"] == list(choose(scores_of(attention, mlp), mlp=3))


def test_alpha_weighs_attention_in_joint_choices_alone():
    scores = scores_of([0.3, 0.1], [0.2, 0.25])
    assert choose(scores, joint=2) == (A(1), M(0))
    assert choose(scores, joint=2, alpha=3.0) == (M(0), M(1))
    assert choose(scores, attention=1, alpha=3.0) == (A(1),)


def test_blocks_come_first_and_are_not_chosen_twice():
    drops = choose(scores_of([0.1, 0.2, 0.3], [0.3, 0.1, 0.2], [0.05, 0.4, 0.5]), block=1, attention=1, mlp=1)
    assert drops == (B(0), A(1), M(1))
    plan = drop_plan(drops, metric="cosine", profile="zero")
    assert (plan.block, plan.attention, plan.mlp) == ((0,), (1,), (1,))
    assert plan.dropped_attention() == (0, 1)
    assert plan.to_json()["attention"] == [1]


def test_one_attention_stays_whatever_the_ranking_says():
    assert choose(scores_of([0.1, 0.2, 0.3], [0.9, 0.9, 0.8]), joint=4) == (A(0), A(1), M(2), M(1))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_run_of_blocks_is_found_where_it_is(n):
    """Blocks 3 and 4 of 6 do nothing; the published code reads the column of n + 1 and finds another run."""
    stream = [0.0, 1.0, 2.0, 3.0, 3.0, 3.0, 4.5]  # an importance is how far the stream moves
    windows = {f"w{m}": [stream[i + m] - stream[i] for i in range(7 - m)] for m in (2, 3)}
    scores = scores_of([0] * 6, [0] * 6, [stream[i + 1] - stream[i] for i in range(6)], **windows)
    drops = choose(scores, block=n, consecutive=True)
    assert drops == {1: (B(4),), 2: (B(3, 2),), 3: (B(2, 3),)}[n]
    assert drop_plan(drops, metric="c", profile="zero").block == {1: (4,), 2: (3, 4), 3: (2, 3, 4)}[n]
    if n == 1:
        assert drops == choose(scores, block=1)


def test_runs_keep_out_of_protected_layers_and_never_pass_the_end():
    scores = scores_of(block=[0.0] * 4, w3=[0.1, 0.2])
    assert best_window(scores, 3, Room(4)) == B(0, 3)
    assert best_window(scores, 3, Room(4, protect_first=1)) == B(1, 3)
    with pytest.raises(ConfigError, match="no 3 neighbouring blocks are free"):
        best_window(scores, 3, Room(4, protect_first=1, protect_last=1))


def test_all_rounds_at_once_are_the_one_shot_choice():
    scores = scores_of([0.4, 0.1, 0.3, 0.2], [0.9, 0.8, 0.7, 0.6], [0.5] * 4)
    counts = {"attention": 3, "mlp": 1}

    def search(per_round):
        seen = []

        def rescore(drops):
            seen.append(drops)
            gone = Room(4).gone(drops)
            return scores_of(
                [None if i in gone[0] else s.value for i, s in enumerate(scores.attention)],
                [None if i in gone[1] else s.value for i, s in enumerate(scores.mlp)], [0.5] * 4,
            )  # fmt: skip

        found = iterative(rescore, rounds_of(counts, per_round), lambda s, c, d: choose_drops(s, c, Room(4), before=d))
        return found, seen

    assert search(4) == (choose(scores, **counts), [(), (A(1), A(3), A(2))])
    assert search(1) == (choose(scores, **counts), [(), (A(1),), (A(1), A(3)), (A(1), A(3), A(2))])


def test_rounds_score_again_and_skip_what_is_gone():
    """Without attention 1 the other two change places, which one scoring cannot know."""
    first, later = [0.3, 0.1, 0.2], [0.3, None, 0.9]
    found = iterative(
        lambda drops: scores_of(later if drops else first, [1] * 3, [1] * 3),
        rounds_of({"attention": 2}, 1),
        lambda s, c, d: choose_drops(s, c, Room(3), before=d),
    )
    assert found == (A(1), A(0))
    assert choose(scores_of(first, [1] * 3, [1] * 3), attention=2) == (A(1), A(2))


def test_rounds_of_pairs_take_as_many_of_both():
    assert rounds_of({"attention": 3, "mlp": 3, "block": 1}, 4, pairs=True) == [
        {"block": 1}, {"attention": 2, "mlp": 2}, {"attention": 1, "mlp": 1},
    ]  # fmt: skip


def test_greedy_follows_what_it_measures():
    """0 and 2 cost little alone and much together, so the second step takes 1."""
    losses = {(): 1.0, (0,): 1.1, (1,): 1.4, (2,): 1.2, (0, 1): 1.5, (0, 2): 3.0, (1, 2): 2.0}

    def measure(drops):
        return losses[tuple(sorted(u.layer for u in drops))]

    def candidates(drops):
        return [(A(i),) for i in range(3) if A(i) not in drops] if len(drops) < 2 else []

    assert greedy(measure, candidates) == ((A(0), A(1)), [1.0, 1.1, 1.5])
    assert greedy(measure, candidates, most=1.45) == ((A(0),), [1.0, 1.1])
    # Per saving, 1 is the cheapest: 0.4 / 10 < 0.1 / 1.
    saved = {A(0): 1.0, A(1): 10.0, A(2): 1.0}
    assert greedy(measure, candidates, gain=lambda _, o: saved[o[0]])[0] == (A(1), A(0))


def test_pairs_next_to_each_other_leave_whole_blocks():
    room = Room(3, native=True)
    assert neighbours(room, ()) == [(A(0), M(0)), (M(0), A(1)), (A(1), M(1)), (M(1), A(2)), (A(2), M(2))]
    assert neighbours(room, (M(0), A(1)))[:2] == [(A(0), M(1)), (M(1), A(2))]
    for pair in neighbours(room, (M(0), A(1))):
        assert room.allows((M(0), A(1), *pair))


def test_native_choices_pair_an_mlp_with_the_next_attention():
    scores = scores_of([0.9, 0.1, 0.9, 0.9], [0.2, 0.9, 0.9, 0.9], [0.5] * 4)
    room = Room(4, native=True)
    assert choose(scores, room, joint=2) == (A(1), M(0))
    assert choose(scores, room, attention=1, mlp=1) == (A(1), M(0))
    assert choose(scores, room, block=2) == (B(3), B(2))
    assert choose(scores, joint=2) == (A(1), M(0))
    with pytest.raises(ConfigError, match="no choice of what may go reaches that"):
        choose(scores, room, attention=1)


def test_a_longest_run_is_kept():
    scores = scores_of([0.1, 0.2, 0.3, 0.9, 0.8], [1] * 5, [1] * 5)
    assert choose(scores, attention=3) == (A(0), A(1), A(2))
    assert choose(scores, Room(5, max_run=1), attention=3) == (A(0), A(2), A(4))
    assert choose(scores, Room(5, max_run=2), attention=3) == (A(0), A(1), A(4))


def test_protected_layers_stay():
    scores = scores_of([0.1, 0.2, 0.3, 0.4], [1] * 4, [0.1, 0.2, 0.3, 0.4])
    assert choose(scores, Room(4, protect_first=1), attention=2) == (A(1), A(2))
    assert choose(scores, Room(4, protect_first=1, protect_last=2), block=1) == (B(1),)


def test_drops_of_a_dropped_model_count():
    room = Room(4, without_attention=frozenset({1}), without_mlp=frozenset({1, 2}))
    scores = scores_of([0.4, None, 0.1, 0.2], [0.3, None, None, 0.5], [0.3, None, 0.1, 0.9])
    assert choose(scores, room, attention=2) == (A(2), A(3))
    with pytest.raises(ConfigError, match=r"asked 3 attention layers, and the model has 4 \(1 already dropped\)"):
        choose(scores, room, attention=3)


@pytest.mark.parametrize(
    ("counts", "room", "message"),
    [
        ({"attention": 40}, Room(32), r"asked 40 attention layers, and the model has 32 \(0 already dropped\); at least"
         r" 1 attention must remain; ask for at most 31"),
        ({"attention": 32}, Room(32), "ask for at most 31"),
        ({"block": 4}, Room(4), "asked 4 blocks.*at most 3"),
        ({"mlp": 5}, Room(4), r"asked 5 MLPs, and the model has 4 \(0 already dropped\); ask for at most 4"),
        ({"joint": 8}, Room(4), "asked 8 attentions and MLPs together, and the model has 8.*at most 7"),
        ({"block": 1, "attention": 3}, Room(4), r"1 go as whole blocks\).*at most 2"),
        ({"attention": 3}, Room(4, protect_first=2), "2 layers are protected.*at most 2"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_given_are_refused(counts, room, message):
    with pytest.raises(ConfigError, match=message):
        require_room(counts, room)


def test_everything_but_one_attention_may_go():
    require_room({"attention": 31, "mlp": 32}, Room(32))
    require_room({"block": 2}, Room(4, protect_first=2))


def every_choice(layers, room, offers):
    """Every way to take at most one offer of each layer, that keeps to the room."""
    for some in product(*[[None, *o] for o in offers]):
        taken = [o for o in some if o]
        units = [u for o in taken for u in o.units]
        if room.allows(units):
            yield sum(o.score for o in taken), tuple(map(sum, zip(*[o.gains for o in taken], strict=True))), units


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("native", [False, True])
def test_a_choice_within_budgets_is_the_best_of_all(seed, native):
    draw = random.Random(seed)
    numbers = [[draw.choice([-1, 1, 2, 3, 5, 8]) / 16 for _ in range(4)] for _ in range(3)]
    scores = scores_of(*numbers)
    kinds = draw.choice([("attention", "mlp"), ("attention", "mlp", "block")])
    room = Room(4, native=native, max_run=draw.choice([None, 2]))
    gains = {A(i): (draw.randint(1, 4), 2) for i in range(4)} | {M(i): (draw.randint(3, 9), 0) for i in range(4)}
    gains |= {B(i): tuple(a + b for a, b in zip(gains[A(i)], gains[M(i)], strict=True)) for i in range(4)}
    goals = (draw.randint(5, 12), draw.choice([0, 2, 4]))
    found = choose_within(scores, kinds, room, gains, goals)
    value = {u: s for s, u in ranking(scores, kinds)}
    best = min(
        score for score, gained, _ in every_choice(4, room, offers_of(scores, kinds, room, gains))
        if gained and all(g >= goal for g, goal in zip(gained, goals, strict=True))
    )  # fmt: skip
    assert sum(value[u] for u in found) == best
    assert room.allows(found)
    assert all(sum(gains[u][i] for u in found) >= goal for i, goal in enumerate(goals))
    if native:
        assert is_native(normalise(4, *room.gone(found)))


@pytest.mark.parametrize("seed", range(8))
def test_a_native_choice_of_a_number_is_the_best_of_all(seed):
    draw = random.Random(seed)
    scores = scores_of(*[[draw.random() for _ in range(5)] for _ in range(3)])
    room = Room(5, native=True)
    found = choose(scores, room, joint=4)
    gains = {u: (1,) for _, u in ranking(scores, ("attention", "mlp"))}
    best = min(
        (score, units) for score, gained, units in every_choice(
            5, room, offers_of(scores, ("attention", "mlp"), room, gains))
        if gained == (4,)
    )  # fmt: skip
    assert set(found) == set(best[1])


def test_budgets_that_are_met_choose_nothing_and_those_that_cannot_be_are_refused():
    scores, gains = scores_of([0.1, 0.2], [0.3, 0.4]), {A(0): (1,), A(1): (1,), M(0): (5,), M(1): (5,)}
    assert choose_within(scores, ("attention", "mlp"), Room(2), gains, (0,), before=(A(0),)) == (A(0),)
    assert choose_within(scores, ("attention", "mlp"), Room(2), gains, (6,), before=()) == (A(0), M(0))
    with pytest.raises(ConfigError, match="no choice of what may go reaches that"):
        choose_within(scores, ("attention", "mlp"), Room(2), gains, (12,))


def test_layers_by_name():
    assert layer_numbers([3, 0], 4, "layers.mlp", from_end=False) == (0, 3)
    assert layer_numbers([-1, 0], 4, "layers.mlp", from_end=True) == (0, 3)
    assert layer_numbers([True, False, False, True], 4, "layers.mlp", from_end=False) == (0, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([4], "there is no layer 4; the model has layers 0 to 3"),
        ([1, 1], "layer 1 is named twice"),
        ([-1], "-1 is below 0.*from_end=true"),
        ([True, False], "2 times true or false, and the model has 4 layers"),
    ],
)
def test_layers_that_are_none_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        layer_numbers(given, 4, "layers.attention", from_end=False)
