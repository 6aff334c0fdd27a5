"""Panels of a mixture: who goes where, and how well gates tell."""

from __future__ import annotations

from hostile_texts import HOSTILE

from honeloom.reporting.panels.routing import gates_panel, routing_panel
from honeloom.types.report import Cost, Report


def report(**details):
    usual = {
        "level": "ffn", "experts": ["math", "story"], "top_k": 1, "utilisation": [0.25, 0.75],
        "domains": [{"domain": "a", "rows": 1, "shares": [1.0, 0.0]}, {"domain": "b", "rows": 3, "shares": [0.0, 1.0]}],
        "router": {
            "type": "rows", "gate": "linear", "input": "token", "accuracy": 0.8, "floor": 0.5,
            "gates": [{"gate": "1", "accuracy": 0.7}, {"gate": "2", "accuracy": 0.9}],
        },
    }  # fmt: skip
    return Report("mix", "ok", None, 0, None, cost=Cost(1.0, 1.0, 1), details={**usual, **details})


def test_rows_of_the_table_are_all_and_the_domains(tmp_path):
    panel = routing_panel(tmp_path, report())
    assert panel.columns == ("domain", "rows", "math", "story")
    assert panel.rows == [("all", 4, "25.0%", "75.0%"), ("a", 1, "100.0%", "0.0%"), ("b", 3, "0.0%", "100.0%")]
    assert panel.figure["data"][0]["z"] == [[0.25, 0.75], [1.0, 0.0], [0.0, 1.0]]
    assert "1 of 2 experts work at a time" in panel.note
    assert "story has 75.0%" in panel.alt


def test_one_group_of_rows_is_not_told_twice(tmp_path):
    one = [{"domain": "two sentences", "rows": 2, "shares": [0.25, 0.75]}]
    assert [row[0] for row in routing_panel(tmp_path, report(domains=one)).rows] == ["two sentences"]


def test_accuracy_of_every_gate(tmp_path):
    panel = gates_panel(tmp_path, report())
    assert panel.rows == [(1, 0.7), (2, 0.9)]
    assert panel.figure["layout"]["shapes"][0]["x0"] == 0.5
    assert "the mean is 80.0%" in panel.note


def test_panels_are_absent_where_there_is_nothing_to_show(tmp_path):
    assert routing_panel(tmp_path, report(utilisation=None)) is None
    assert gates_panel(tmp_path, report(router={"accuracy": None})) is None
    alone = {"accuracy": 1.0, "floor": 0.5, "gates": [{"gate": "", "accuracy": 1.0}]}
    assert gates_panel(tmp_path, report(router=alone)) is None


def test_names_are_anybodys(tmp_path):
    for text in HOSTILE:
        panel = routing_panel(tmp_path, report(experts=[text, "b"]))
        assert panel.columns == ("domain", "rows", text, "b")  # the page escapes it
        assert all(len(tick) < 80 for tick in panel.figure["layout"]["xaxis"]["ticktext"])
