"""Advice follows from what was measured."""

from __future__ import annotations

from dataclasses import replace

from honeloom.zoo.advice import Finding, advise

FOUND = Finding(
    unit="bits/char",
    members=["a", "b", "c"],
    values={"a": 1.0, "b": 1.2, "c": 3.0, "cluster-1": 0.9, "model-members-rows": 0.8},
    clusters={"cluster-1": {"a": 0.6, "b": 0.4}},
    alone={"c": "other shape"},
    refused=[("d", "quantised")],
    best_single="a",
    result="model-members-rows",
    gain=0.2,
    interval=(-0.3, -0.1),
    use={"a": 0.5, "b": 0.5, "c": 0.0},
    best_in={"x": "a", "y": "b"},
    tried={"model-members-rows": "", "model-clusters-rows": "0.85 bits/char"},
)


def test_every_sentence_has_its_number() -> None:
    lines = advise(FOUND)
    assert lines[0] == (
        "Use model-members-rows: 0.8000 bits/char against 1.0000 of the best single model (a), 20.0% lower; difference "
        "-0.2000 [-0.3000, -0.1000]."
    )
    assert "Merge a, b (cluster-1): 0.9000 bits/char, the best of them alone (a) 1.0000." in lines
    assert "Mix: the router sends the report rows to a 50%, b 50%." in lines
    assert "Mixture model-clusters-rows was not taken: 0.85 bits/char." in lines
    assert any(line.startswith("Leave c out: 3.0000") and "other shape" in line for line in lines)
    assert "Not used: d: quantised." in lines


def test_models_that_the_result_uses_are_not_left_out() -> None:
    lines = advise(FOUND)
    assert not any(line.startswith(("Leave a", "Leave b")) for line in lines)


def test_nothing_better_than_the_best_single_is_said() -> None:
    lines = advise(replace(FOUND, result="a", gain=0.0, interval=(0.0, 0.0), use={}))
    assert lines[0].startswith("Use a as it is (1.0000 bits/char)")
    assert any(line.startswith("Leave b out: 1.2000") and "best single model for y" in line for line in lines)


def test_a_gain_that_the_rows_do_not_show_is_called_so() -> None:
    assert "an interval with 0" in advise(replace(FOUND, interval=(-0.3, 0.1)))[0]


def test_a_merge_that_does_not_hold_on_the_report_rows_is_called_so() -> None:
    lines = advise(replace(FOUND, values={**FOUND.values, "cluster-1": 1.1}))
    assert any("no better than a alone (1.0000)" in line for line in lines)
