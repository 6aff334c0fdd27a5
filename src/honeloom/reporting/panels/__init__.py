"""Which panels a verb's page has, in order. Each is a function of the folder and its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from honeloom.reporting.panel import Panel
from honeloom.reporting.panels.band_curve import band_curve_panel
from honeloom.reporting.panels.cluster_values import cluster_values_panel
from honeloom.reporting.panels.comparison import comparison_panel
from honeloom.reporting.panels.confusion import labels_panel, probe_panel
from honeloom.reporting.panels.curvature import curvature_panel, distances_panel
from honeloom.reporting.panels.depth_sweep import depth_sweep_panel
from honeloom.reporting.panels.domain_maps import domain_map_panel, entropy_map_panel
from honeloom.reporting.panels.domain_mix import domain_mix_panel
from honeloom.reporting.panels.drop_curve import drop_order_panel, pareto_panel
from honeloom.reporting.panels.entropy import entropy_panel
from honeloom.reporting.panels.federation import exposure_panel, rounds_panel, traffic_panel
from honeloom.reporting.panels.federation_cost import (
    client_rates_panel,
    instead_panel,
    loss_by_bytes_panel,
    loss_by_round_panel,
    measured_panel,
    memory_panel,
)
from honeloom.reporting.panels.federation_updates import (
    client_losses_panel,
    exactness_panel,
    module_errors_panel,
    update_norms_panel,
)
from honeloom.reporting.panels.importance import importance_panel
from honeloom.reporting.panels.kept_rows import kept_rows_panel
from honeloom.reporting.panels.loss_curve import loss_curve_panel
from honeloom.reporting.panels.metrics import metrics_panel
from honeloom.reporting.panels.parents import parents_panel, tokens_panel
from honeloom.reporting.panels.pool_rows import pool_rows_panel
from honeloom.reporting.panels.removal import removal_panel
from honeloom.reporting.panels.routing import gates_panel, routing_panel
from honeloom.reporting.panels.row_map import row_map_panel
from honeloom.reporting.panels.scores import kept_panel, scores_panel
from honeloom.reporting.panels.trust import trust_panel
from honeloom.reporting.panels.zoo_results import advice_panel, coefficients_panel, results_panel, search_panel
from honeloom.reporting.panels.zoo_similarity import similarity_panel
from honeloom.types.report import Report

__all__ = ["PANELS"]

PANELS: dict[str, tuple[Callable[[Path, Report], Panel | None], ...]] = {
    "select": (
        trust_panel, cluster_values_panel, removal_panel, row_map_panel,
        band_curve_panel, domain_map_panel, entropy_map_panel, entropy_panel, probe_panel, depth_sweep_panel,
        labels_panel, domain_mix_panel, scores_panel, kept_panel, pool_rows_panel, kept_rows_panel,
    ),
    "tune": (loss_curve_panel, curvature_panel, distances_panel),
    "merge": (parents_panel, tokens_panel),
    "mix": (routing_panel, gates_panel),
    "glue": (advice_panel, results_panel, similarity_panel, search_panel, coefficients_panel),
    "drop": (importance_panel, drop_order_panel, pareto_panel),
    "federate": (
        loss_by_round_panel, rounds_panel, client_losses_panel, client_rates_panel, loss_by_bytes_panel, traffic_panel,
        instead_panel, memory_panel, measured_panel, update_norms_panel, exactness_panel, module_errors_panel,
        exposure_panel,
    ),
    "evaluate": (comparison_panel, metrics_panel),
}  # fmt: skip
