"""Panels of the curvature at the start: what they show, and that they are absent where nothing was measured."""

import pytest

from honeloom.reporting.page import write_page
from honeloom.reporting.panels import PANELS
from honeloom.reporting.panels.curvature import curvature_panel, distances_panel
from honeloom.types.report import Artefact, Metric, Report

FOUND = {
    "trace": 260.5, "trace_stderr": 30.0, "largest": 10.8, "largest_stderr": 11.7, "effective_rank": 24.1,
    "stable_rank": 32.0, "signal": 0.85, "signal_stderr": 0.11, "bound": 0.00712, "ceiling": 0.0068, "rate": 9.9e-4,
    "width": 1e-3, "passes": 200, "lr": 9.9e-4, "mu": 3e-4, "chosen": "auto",
    "ladder": [[1e-4, 0.004, 270.0], [3e-4, 0.001, 261.0], [1e-3, 0.01, 260.0], [3e-3, 0.0, 259.0], [1e-2, None, None]],
}  # fmt: skip


def report(folder, curvature, verb="tune"):
    usual = {"losses": [(1, 4.0), (2, 3.5)], "steps": 2, "rows": 8, "tokens": 90, "label_share": 0.5}
    details = {**usual, "trainable_parameters": 24, **({"curvature": curvature} if curvature else {})}
    metric = Metric("train_loss_last", 3.5, 1, "nats/token", False, None, "all")
    return Report(verb, "ok", str(folder), 0, Artefact("adapter", str(folder), "0" * 64), (metric,), details=details)


def test_rates_and_curvature_are_in_the_table(tmp_path):
    panel = curvature_panel(tmp_path, report(tmp_path, FOUND))
    rows = {name: (value, error) for name, value, error in panel.rows}
    assert rows["learning rate (auto)"] == (9.9e-4, None) and rows["trace of the Hessian"] == (260.5, 30.0)
    assert rows["steps go up in the mean from"] == (0.0068, None) and rows["effective rank"] == (24.1, None)
    assert "200 forward passes" in panel.note and "is above" not in panel.note


def test_a_rate_above_the_ceiling_is_told(tmp_path):
    found = {**FOUND, "lr": 0.01, "chosen": "given"}
    assert "The rate is above" in curvature_panel(tmp_path, report(tmp_path, found)).note
    unknown = {**FOUND, "bound": None, "ceiling": None, "effective_rank": None, "rate": None}
    assert "is above" not in curvature_panel(tmp_path, report(tmp_path, unknown)).note


def test_distances_are_a_chart_with_the_chosen_one_marked(tmp_path):
    panel = distances_panel(tmp_path, report(tmp_path, FOUND))
    (trace,) = panel.figure["data"]
    assert trace["x"] == [1e-4, 3e-4, 1e-3] and trace["marker"]["size"] == [7, 14, 7]  # a log scale has no 0
    assert panel.figure["layout"]["xaxis"]["type"] == "log"
    assert [row[3] for row in panel.rows] == ["", "steps", "curvature", "", ""] and panel.rows[-1][:3] == (
        1e-2,
        None,
        None,
    )


@pytest.mark.parametrize("panel", [curvature_panel, distances_panel])
def test_nothing_measured_is_no_panel(tmp_path, panel):
    assert panel(tmp_path, report(tmp_path, None)) is None
    assert panel in PANELS["tune"]


def test_what_a_client_measured_has_no_rate_of_its_own(tmp_path):
    found = {key: value for key, value in FOUND.items() if key not in ("lr", "mu", "chosen")}
    federation = report(tmp_path, found, "federate")
    assert curvature_panel(tmp_path, federation).rows[0][:2] == ("learning rate (measured)", None)
    assert [row[3] for row in distances_panel(tmp_path, federation).rows][2] == "curvature"


def test_the_page_has_them(tmp_path):
    write_page(tmp_path, report(tmp_path, FOUND))
    page = (tmp_path / "report.html").read_text()
    assert "Curvature at the start, and the learning rate" in page and "Distances that were tried" in page
