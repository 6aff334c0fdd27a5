"""Panels of a drop: importances, the order of drops, and loss against cost."""

import json

import pytest

from honeloom.reporting.panels.drop_curve import drop_order_panel, pareto_panel
from honeloom.reporting.panels.importance import importance_panel
from honeloom.types.report import Cost, Metric, Report


def point(dropped, unit, share, loss, **more):
    return {
        "dropped": dropped, "unit": unit, "params": 1000 * share, "kv_bytes_per_token": 64 * share,
        "flops_per_token": 2000 * share, "loss": loss, "rise": loss - 2.0, "rise_stderr": 0.1,
        "tokens_per_second": None, **more,
    }  # fmt: skip


CURVE = [point(0, None, 1.0, 2.0), point(1, "attention 1", 0.75, 2.1), point(2, "mlp 0", 0.5, 2.5)]


def report(*metrics, **details):
    usual = {"curve": CURVE, "order": ["attention 1", "mlp 0"], "profile": "dropped"}
    losses = (Metric("loss", 2.0, 7, "nats/token", False, None, "source"), *metrics)
    return Report("drop", "ok", None, 0, None, losses, cost=Cost(1.0, 1.0, 1), details={**usual, **details})


@pytest.fixture
def folder(tmp_path):
    def scores(*values):
        return [{"layer": i, "value": v, "stderr": e} for i, (v, e) in enumerate(values)]

    content = {"attention": scores((0.5, 0.01), (0.1, None)), "mlp": scores((-0.1, 0.2), (1.0, 0.3)), "block": []}
    (tmp_path / "scores.json").write_text(json.dumps(content))
    plan = {"attention": [1], "mlp": [0], "block": [], "metric": "perplexity", "profile": "dropped"}
    (tmp_path / "drop_plan.json").write_text(json.dumps(plan))
    return tmp_path


def test_importances_with_errors_and_frames_around_what_went(folder):
    panel = importance_panel(folder, report())
    assert panel.rows == [
        ("attention", 0, 0.5, 0.01, "kept"), ("attention", 1, 0.1, None, "dropped"),
        ("mlp", 0, -0.1, 0.2, "dropped"), ("mlp", 1, 1.0, 0.3, "kept"),
    ]  # fmt: skip
    assert panel.figure["data"][0]["z"] == [[pytest.approx(-0.30103), -1.0], [-1.0, 0.0]]  # the negative one is palest
    frames = [((s["x0"] + s["x1"]) / 2, (s["y0"] + s["y1"]) / 2) for s in panel.figure["layout"]["shapes"]]
    assert frames == [(1.0, 0.0), (0.0, 1.0)]
    assert "dropped: attention 1, MLP 0" in panel.alt and "(perplexity)" in panel.title


def test_importances_alone_have_no_plan(folder):
    (folder / "drop_plan.json").unlink()
    panel = importance_panel(folder, report(metric="kl"))
    assert {row[4] for row in panel.rows} == {"kept"} and "(kl)" in panel.title


def test_the_order_has_the_rise_of_every_measured_step(tmp_path):
    panel = drop_order_panel(tmp_path, report())
    assert panel.rows == [(1, "attention 1", 2.1, pytest.approx(0.1), 0.1), (2, "mlp 0", 2.5, 0.5, 0.1)]
    assert panel.figure["data"][0]["x"] == [0, 1, 2] and panel.figure["data"][0]["error_y"]["array"] == [0.1] * 3
    assert "7 calibration rows" in panel.note
    unmeasured = drop_order_panel(tmp_path, report(curve=CURVE[:1]))
    assert unmeasured.rows[0] == (1, "attention 1", None, None, None)
    silent = [{**p, "loss": None, "rise": None} for p in CURVE]
    assert drop_order_panel(tmp_path, report(curve=silent)).figure is None


def test_loss_stands_against_every_cost_and_the_chosen_point_is_a_star(tmp_path):
    panel = pareto_panel(tmp_path, report())
    assert panel.columns[3:] == ("parameters", "cache bytes per token", "matrix FLOPs per token", "decision")
    assert [row[-1] for row in panel.rows] == ["source", "on the way", "chosen"]
    assert panel.figure["data"][0]["x"] == [100.0, 75.0, 50.0]
    assert [m == "star" for m in panel.figure["data"][0]["marker"]["symbol"]] == [False, False, True]


def test_speed_and_healing_are_shown_where_there_are_any(tmp_path):
    timed = [{**p, "tokens_per_second": s} for p, s in zip(CURVE, (10.0, 12.0, 15.0), strict=True)]
    healed = Metric("loss", 2.2, 7, "nats/token", False, None, "healed")
    panel = pareto_panel(tmp_path, report(healed, curve=timed, profile="zero"))
    assert panel.columns[-2] == "decoded tokens per second"
    assert panel.figure["data"][3]["x"] == pytest.approx([100.0, 120.0, 150.0, 150.0])
    assert panel.figure["data"][3]["y"] == [2.0, 2.1, 2.5, 2.2]
    assert panel.rows[-1][:3] == (2, "healed", 2.2)
    assert "Profile zero saves none of it" in panel.note


def test_panels_are_absent_where_nothing_was_measured(tmp_path):
    assert importance_panel(tmp_path, report()) is None
    assert drop_order_panel(tmp_path, report(order=[])) is None
    assert pareto_panel(tmp_path, report(curve=CURVE[:1])) is None
