"""Selectors against hand-worked numbers, and the conformance suite over all of them."""

import json
import math
from typing import Literal

import numpy as np
import pytest

import honeloom
from honeloom.config.methods import MethodConfig
from honeloom.errors import ConfigError
from honeloom.registry import Method, Registry, family
from honeloom.selection import METHODS
from honeloom.selection.choose import rows_to_keep, take_best
from honeloom.selection.config import SelectConfig
from honeloom.selection.ifd import ifd, ifd_ratio
from honeloom.selection.length import length
from honeloom.selection.perplexity import perplexity
from honeloom.selection.random import random
from honeloom.selection.stratified import stratified
from honeloom.testing import FakeModel, FakeRows, check_selector
from honeloom.testing.fakes import chat_row
from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData


def data(rows, loss=lambda row, with_prompt: 1.0, seed=0, cut=()):
    return SelectionData(FakeRows(rows), lambda: FakeModel(loss, cut), seed)


@pytest.mark.parametrize("name", [n for n in family("selection").names() if n != "scores"])  # that one needs a file
def test_every_selector_conforms(name):
    config = family("selection").load_config(name)()
    settings = {field: getattr(config, field) for field in type(config).model_fields if field != "type"}
    check_selector(family("selection").load(name), **settings)


def test_length_counts_response_tokens():
    rows = [chat_row("a", "q", "one two three"), chat_row("b", "q q q q", "one")]
    assert length(data(rows)).value == (3.0, 1.0)
    assert length(data(rows), order="shortest").value == (-3.0, -1.0)


def test_ifd_is_the_ratio_of_perplexities():
    rows = [chat_row("helped", "q", "a b"), chat_row("hindered", "q", "a b"), chat_row("unscored", "q", "a b")]
    table = {"helped": (1.0, 2.0), "hindered": (2.0, 1.0)}
    scores = ifd(data(rows, lambda r, w: table[r.id][0 if w else 1] if r.id in table else None))
    assert scores.value[0] == pytest.approx(math.exp(-1.0))
    assert scores.value[1] == pytest.approx(-math.exp(1.0))  # at or above 1: after every helped row
    assert scores.value[2] == -math.inf
    assert ifd_ratio(np.array([1.5]), np.array([1.5]))[0] == 1.0


def test_ifd_of_a_row_without_prompt_is_exactly_one_and_not_kept_first():
    rows = [chat_row("empty", "", "a b c"), chat_row("good", "x", "a b c")]
    scores = ifd(data(rows, lambda r, w: 2.0 if r.id == "empty" or not w else 1.0))
    assert scores.columns["ifd"][0] == 1.0
    assert scores.value[1] > 0 > scores.value[0]


def test_perplexity_bands():
    rows = [chat_row(f"r{i}", "q", "a") for i in range(5)]
    losses = {f"r{i}": float(i) for i in range(5)}
    middle = perplexity(data(rows, lambda r, w: losses[r.id]))
    assert max(range(5), key=lambda i: middle.value[i]) == 2
    assert perplexity(data(rows, lambda r, w: losses[r.id]), band="low").value[0] == 0.0
    assert perplexity(data(rows, lambda r, w: losses[r.id]), band="high").value[4] == 4.0


def test_stratified_keeps_equal_shares():
    rows = [chat_row(f"r{i}", "q", "a", domain="big" if i < 80 else "small") for i in range(100)]
    scores = stratified(data(rows))
    kept = take_best(scores, [r.id for r in rows], amount=0.1, unit="share", seed=0).keep
    assert sum(1 for i in kept if i < 80) == 8
    assert sum(1 for i in kept if i >= 80) == 2


def test_random_depends_on_seed_and_id_only():
    rows = [chat_row(f"r{i}", "q", "a") for i in range(50)]
    forward, backward = random(data(rows, seed=1)).value, random(data(rows[::-1], seed=1)).value
    assert forward == backward[::-1]
    assert forward != random(data(rows, seed=2)).value
    assert 0.35 < sum(forward) / 50 < 0.65


@pytest.mark.parametrize(
    ("share", "usable", "kept"), [(0.1, 5, 1), (0.1, 25, 3), (0.1, 24, 2), (0.5, 5, 3), (1.0, 7, 7), (0.001, 9, 1)]
)
def test_shares_round_half_up(share, usable, kept):
    assert rows_to_keep(share, "share", usable) == kept


@pytest.mark.parametrize(("keep", "kept"), [("2.9%", 15), ("0.7%", 4), ("2.8%", 14), ("100%", 500)])
def test_shares_are_exact(keep, kept):
    amount, unit = SelectConfig(rows="x.jsonl", keep=keep).keep_amount()
    assert rows_to_keep(amount, unit, 500) == kept


@pytest.mark.parametrize("higher", [True, False])
def test_unscored_rows_come_last_whichever_end_is_better(higher):
    scores = Scores((-math.inf, 1.0, 2.0), higher, "x")
    assert take_best(scores, ["a", "b", "c"], amount=2, unit="rows", seed=0).keep == (1, 2)


def test_the_suite_refuses_a_selector_that_prefers_unscored_rows():
    def by_loss(data, unknown):
        found = {row.id: loss.loss_sum for row, loss in data.open_model().losses(data.rows)}
        return Scores(tuple(found.get(i, unknown) for i in data.rows.ids), False, "by_loss")

    check_selector(by_loss, unknown=-math.inf)
    with pytest.raises(AssertionError, match=r"\+inf"):
        check_selector(by_loss, unknown=math.inf)


@pytest.mark.parametrize("method", [ifd, perplexity])
def test_rows_cut_at_the_limit_are_not_scored(method):
    rows = [chat_row("cut", "q", "a b"), chat_row("whole", "q", "a b")]
    scores = method(data(rows, lambda r, w: 1.0 if w else 2.0, cut={"cut"}))
    assert scores.value[0] == -math.inf
    assert math.isfinite(scores.value[1])
    assert scores.columns["truncated"] == [True, False]


def test_counts_are_clamped_to_what_there_is():
    assert rows_to_keep(500, "rows", 20) == 20


def test_ties_do_not_depend_on_order():
    ids = [f"r{i}" for i in range(30)]
    equal = Scores((1.0,) * 30, True, "flat")
    one = take_best(equal, ids, amount=10, unit="rows", seed=5).keep
    other = take_best(equal, ids[::-1], amount=10, unit="rows", seed=5).keep
    assert {ids[i] for i in one} == {ids[::-1][i] for i in other}


def test_token_budget_takes_the_best_that_fit():
    scores = Scores((3.0, 2.0, 1.0), True, "x")
    plan = take_best(scores, ["a", "b", "c"], amount=10, unit="tokens", seed=0, tokens=[8, 5, 2])
    assert plan.keep == (0, 2)  # 8, then 5 does not fit, 2 does


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        take_best(Scores((math.nan,), True, "broken"), ["a"], amount=1, unit="rows", seed=0)


class ShoutConfig(MethodConfig):
    """Settings of a plug-in used below."""

    type: Literal["mine/shout"] = "mine/shout"
    word: str = "three"


def shout(data, *, word="three"):
    values = tuple(float(word in row.response) + i / 1000 for i, row in enumerate(data.rows))
    return Scores(values, True, "mine/shout")


def test_a_plug_in_is_chosen_like_a_built_in(monkeypatch, tmp_path):
    here = __name__
    registry = Registry(
        "selection", [*METHODS, Method("mine/shout", f"{here}:shout", f"{here}:ShoutConfig", "none", "test")]
    )
    for module in ("honeloom.config.methods", "honeloom.stages.select", "honeloom.stages.runner"):
        monkeypatch.setattr(f"{module}.family", lambda kind: registry)
    rows = tmp_path / "rows.jsonl"
    answers = ["one", "three", "two", "three three"]
    rows.write_text("".join(json.dumps({"instruction": f"q{i}", "output": a}) + "\n" for i, a in enumerate(answers)))
    honeloom.select(rows, method={"type": "mine/shout", "word": "two"}, keep="1", output_dir=tmp_path / "o")
    assert json.loads((tmp_path / "o" / "selected.jsonl").read_text())["output"] == "two"
    with pytest.raises(ConfigError, match="has no setting 'wrd'; did you mean 'word'"):
        honeloom.select(rows, method={"type": "mine/shout", "wrd": "two"}, keep="1", output_dir=tmp_path / "p")
