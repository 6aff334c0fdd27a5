"""Which panels a verb's page has, in order. Each is a function of the folder and its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from honeloom.reporting.panel import Panel
from honeloom.reporting.panels.cluster_values import cluster_values_panel
from honeloom.reporting.panels.comparison import comparison_panel
from honeloom.reporting.panels.importance import importance_panel
from honeloom.reporting.panels.kept_rows import kept_rows_panel
from honeloom.reporting.panels.loss_curve import loss_curve_panel
from honeloom.reporting.panels.metrics import metrics_panel
from honeloom.reporting.panels.pool_rows import pool_rows_panel
from honeloom.reporting.panels.removal import removal_panel
from honeloom.reporting.panels.row_map import row_map_panel
from honeloom.reporting.panels.scores import kept_panel, scores_panel
from honeloom.reporting.panels.trust import trust_panel
from honeloom.types.report import Report

__all__ = ["PANELS"]

PANELS: dict[str, tuple[Callable[[Path, Report], Panel | None], ...]] = {
    "select": (
        trust_panel, cluster_values_panel, removal_panel, row_map_panel,
        scores_panel, kept_panel, pool_rows_panel, kept_rows_panel,
    ),
    "tune": (loss_curve_panel,),
    "merge": (),
    "drop": (importance_panel,),
    "evaluate": (comparison_panel, metrics_panel),
}  # fmt: skip
