"""What a drop reports: the order of drops, what each costs in loss and saves, and numbers of the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from honeloom.dropping.config import DropConfig
from honeloom.dropping.export import ExportPlan
from honeloom.dropping.plan import Drops
from honeloom.dropping.scores import KINDS, UnitScores
from honeloom.stages.drop_costs import Costs
from honeloom.stages.drop_session import Loss, Session
from honeloom.types.plans import DropPlan
from honeloom.types.report import Check, Metric

__all__ = ["budget_checks", "drop_curve", "drop_details", "importance_metrics", "loss_metrics", "scores_document"]

POINTS = 16
"""Most plans along the order of drops on which loss and speed are measured."""
_UNITS = {
    "cosine": "1 - cosine", "block_influence": "1 - cosine", "angular": "half turns", "magnitude": "of the stream",
    "perplexity": "nats/token", "kl": "nats/token", "taylor": "nats/token",
}  # fmt: skip


def scores_document(scores: UnitScores) -> dict[str, Any]:
    """Content of `scores.json`: {layer, value, stderr} of every unit that is there, by kind."""
    return {
        kind: [
            {"layer": i, "value": s.value, "stderr": s.stderr} for i, s in enumerate(scores.of(kind)) if s is not None
        ]
        for kind in KINDS
    }


def importance_metrics(config: DropConfig, scores: UnitScores) -> tuple[Metric, ...]:
    """Every importance as a metric of the report."""
    unit = _UNITS.get(config.metric.type, "")
    return tuple(
        Metric("importance", s.value, scores.rows, unit, True, s.stderr, f"{kind}.{i}")
        for kind in KINDS
        for i, s in enumerate(scores.of(kind))
        if s is not None
    )


def loss_metrics(session: Session, drops: Drops, healed: Loss | None) -> tuple[Metric, ...]:
    """Losses of the source, of the dropped model and of the healed one, on the measured calibration rows."""
    if not session.measured:
        return ()
    found = {"source": session.loss_beside_source(()), "dropped": session.loss_beside_source(drops)}
    if healed is not None:
        found["healed"] = healed
    rows = len(session.measured)
    return tuple(Metric("loss", loss.mean, rows, "nats/token", False, None, name) for name, loss in found.items())


def drop_curve(session: Session, drops: Drops, costs: Costs, speed_context: int | None) -> list[dict[str, Any]]:
    """Plans along the order of drops, from none to all: what each costs in loss, and what the model then costs.

    Costs are those without the units, whatever the profile. At most `POINTS` plans are measured.
    """
    stride = max(1, -(-len(drops) // (POINTS - 1)))
    places = sorted({*range(0, len(drops), stride), len(drops)})
    prefixes = [drops[:place] for place in places]
    speeds = session.speeds(prefixes, speed_context) if speed_context else [None] * len(prefixes)
    points = []
    for some, speed in zip(prefixes, speeds, strict=True):
        cost = costs.without(some)
        loss = session.loss_beside_source(some) if session.measured else None
        points.append({
            "dropped": len(some),
            "unit": _name(some[-1]) if some else None,
            "params": cost.params,
            "kv_bytes_per_token": cost.kv_bytes_per_token,
            "flops_per_token": cost.flops_per_token,
            "loss": loss.mean if loss else None,
            "rise": loss.rise if loss else None,
            "rise_stderr": loss.rise_stderr if loss else None,
            "tokens_per_second": speed,
        })  # fmt: skip
    return points


def _name(unit: Any) -> str:
    last = f" to {unit.layer + unit.blocks - 1}" if unit.blocks > 1 else ""
    return f"{unit.kind} {unit.layer}{last}"


def drop_details(config: DropConfig, plan: DropPlan, drops: Drops, export: ExportPlan, costs: Costs) -> dict[str, Any]:
    """What stands in `details`, beside what was measured."""
    before, after = costs.before, costs.after(export)
    return {
        **{
            key: {"before": before.of(key), "after": after.of(key)}
            for key in ("params", "kv_bytes_per_token", "flops_per_token")
        },
        "loads_in": list(export.loads_in),
        "plan": plan.to_json(),
        "order": [_name(unit) for unit in drops],
        "metric": config.metric.type,
        "profile": config.profile,
        "saves": list(export.saves),
        "blocks": [list(block) for block in export.blocks],
        "notes": list(export.notes),
        "decode_bound": costs.bounds(export),
        "zeroed": [t.name for t in export.tensors if t.source is None and export.profile == "zero"],
    }


def budget_checks(config: DropConfig, drops: Drops, costs: Costs, export: ExportPlan) -> tuple[Check, ...]:
    """Whether the result keeps every budget on a cost; of profile zero, whether the plan would."""
    saves = bool(export.saves)
    found: Sequence[tuple[str, str, float, float]] = [
        (str(b), key, (costs.after(export) if saves else costs.without(drops)).of(key), b.limit(costs.before.of(key)))
        for b in config.budgets
        if (key := {"flops": "flops_per_token"}.get(b.key, b.key)) != "loss_increase"
    ]
    what = "the result" if saves else "the plan, written by a profile that saves,"
    return tuple(
        Check(f"{what} keeps the budget {name} ({key})", value, limit, value <= limit)
        for name, key, value, limit in found
    )
