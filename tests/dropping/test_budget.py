"""Budgets: what they accept, and the settings that need or refuse them."""

import pytest

from honeloom.config.base import validate
from honeloom.dropping.budget import parse_budget, read_budgets
from honeloom.dropping.config import DropConfig
from honeloom.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("params", "75%", 750.0), ("params", " 1.5e2 ", 150.0), ("params", 300, 300.0),
        ("kv_bytes_per_token", "1_000", 1000.0), ("flops", "12.5 %", 125.0), ("loss_increase", "0.05", 0.05),
        ("loss_increase", "3%", 30.0),
    ],
)  # fmt: skip
def test_a_budget_is_a_number_or_a_share(key, value, limit):
    assert parse_budget(key, value).limit(1000) == limit


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("memory", "75%", "budget 'memory': choose from kv_bytes_per_token, params, flops, loss_increase"),
        ("param", "75%", "did you mean 'params'"),
        ("params", "three", "'three' is no limit"),
        ("params", "-5", "'-5' is no limit"),
        ("params", "0%", "leaves nothing"),
        ("flops", "100%", "no less than the model has"),
        ("flops", True, "True is no limit"),
        ("params", "1e999", "leaves nothing"),
    ],
)
def test_what_is_no_budget_is_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        parse_budget(key, value)


def test_budgets_are_read_from_flags_and_mappings():
    assert read_budgets(["params=75%", "flops = 1e9"]) == {"params": "75%", "flops": "1e9"}
    assert read_budgets("params=75%") == read_budgets({"params": "75%"}) == {"params": "75%"}
    with pytest.raises(ValueError, match="give KEY=VALUE"):
        read_budgets(["params"])
    with pytest.raises(ValueError, match="given twice"):
        read_budgets(["params=75%", "params=50%"])


def config(**settings):
    return validate(DropConfig, {"model": "m", "calibration": "c", **settings}, what="drop")


def test_settings_come_back_as_they_were_written():
    found = config(budget=["params=75%"], layers=None, joint=2)
    assert DropConfig.model_validate(found.model_dump(mode="json")) == found
    named = config(layers={"attention": [1, 2], "mlp": [True, False]})
    assert named.layers.attention == (1, 2) and named.layers.mlp == (True, False)
    assert DropConfig.model_validate(named.model_dump(mode="json")) == named


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to drop"),
        ({"calibration": (), "attention": 1}, r"missing key 'calibration' \(Rows on which importance is measured\)"),
        ({"attention": -1}, "attention: must be greater than or equal to 0"),
        ({"only": "scores", "attention": 1}, "only scores: nothing is dropped, so attention would change nothing"),
        ({"layers": {"mlp": [1]}, "joint": 2}, "layers names what goes, so joint would change nothing"),
        ({"attention": 1, "per_round": 2}, "per_round would change nothing without choice iterative"),
        ({"attention": 1, "kinds": ["block"]}, "kinds would change nothing without a budget"),
        ({"attention": 1, "consecutive": True}, "consecutive would change nothing without block"),
        ({"attention": 1, "alpha": 2}, "alpha would change nothing without joint or a budget"),
        ({"attention": 1, "heal_steps": 3}, "heal_steps would change nothing without heal"),
        ({"attention": 1, "metric": "block_influence"}, "scores block alone, and attention is to be ranked"),
        ({"budget": {"loss_increase": "0.1"}, "measure": 0}, "budget loss_increase measures the model"),
        ({"attention": 1, "choice": "greedy", "measure": 0}, "choice greedy measures the model"),
        ({"attention": 1, "scores": "s.json", "choice": "iterative"}, "choice iterative measures anew"),
        ({"attention": 1, "profile": "native"}, "profile native: an attention goes with an MLP"),
        ({"joint": 3, "native": True}, "native: halves go in pairs.*joint 3 is odd"),
        ({"budget": {"params": "75%"}, "kinds": ["mlp"], "native": True}, "kinds must hold attention and mlp"),
        ({"joint": 2, "native": True, "choice": "iterative"}, "per_round must be even"),
        ({"block": 2, "consecutive": True, "max_run": 2}, "leave choice, scores and max_run out"),
        ({"layers": {"mlp": [1, True]}}, "layers.mlp"),
        ({"budget": {"parms": "75%"}}, "did you mean 'params'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)
