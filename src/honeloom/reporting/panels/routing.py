"""Panels of `mix`: which experts the rows of each domain go to, and how well every gate tells them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from honeloom.reporting.panel import Panel, by_name, figure, row_height, share_map, vertical_line
from honeloom.reporting.text import clip, number
from honeloom.types.report import Report

__all__ = ["gates_panel", "routing_panel"]

WITH_NUMBERS, DOMAINS, GATES = 12, 40, 60
"""Experts up to which cells have their number written; domains and gates that the charts have at most."""
_PIXELS = 30


def routing_panel(folder: Path, report: Report) -> Panel | None:
    """Weight of every expert, in all and for the rows of each domain; None where the report has none."""
    details = report.details
    experts, shares = list(details.get("experts", ())), details.get("utilisation")
    if not experts or not shares:
        return None
    domains = list(details.get("domains", ()))
    count = sum(d["rows"] for d in domains)
    lines = [("all", count, shares), *((d["domain"], d["rows"], d["shares"]) for d in domains)]
    if len(domains) == 1:
        lines = lines[1:]
    most = max(range(len(experts)), key=lambda e: shares[e])
    unit = "tokens" if details.get("router", {}).get("input") == "token" else "rows"
    return Panel(
        title="Experts by domain",
        columns=("domain", "rows", *experts),
        rows=[(name, rows, *(f"{s:.1%}" for s in given)) for name, rows, given in lines],
        figure=_heat_map(experts, lines[:DOMAINS]),
        note=f"Weight of each expert over the {unit} of {count:,} rows and all {_gates(report)} gates; a line sums to "
        f"100%. {details['top_k']} of {len(experts)} experts work at a time.",
        alt=f"Heat map of {len(lines[:DOMAINS])} groups of rows by {len(experts)} experts; over all of them "
        f"{clip(experts[most])} has {shares[most]:.1%}",
    )


def _gates(report: Report) -> str:
    gates = report.details.get("router", {}).get("gates")
    return f"{len(gates):,}" if gates else "its"


def _heat_map(experts: list[str], lines: list[tuple[str, int, list[float]]]) -> dict[str, Any]:
    names = [name for name, _, _ in lines]
    texts = [
        [f"{clip(name, 30)} to {clip(expert, 30)}: {share:.1%}" for expert, share in zip(experts, given, strict=True)]
        for name, _, given in lines
    ]
    shares = [[round(s, 4) for s in given] for _, _, given in lines]
    return share_map(names, experts, shares, texts, x="expert", y="", numbers=WITH_NUMBERS, pixels=_PIXELS)


def gates_panel(folder: Path, report: Report) -> Panel | None:
    """Cross-validated accuracy of every gate; None for routers that have none, and for one gate alone."""
    router = report.details.get("router", {})
    gates = [g for g in router.get("gates", ()) if g["accuracy"] is not None]
    if len(gates) < 2:
        return None
    shown = gates[:GATES]
    names = [f"layer {g['gate']}" for g in shown]
    floor = router["floor"]
    trace = {
        "type": "bar", "orientation": "h", "x": [g["accuracy"] for g in shown], "y": list(range(len(shown))),
        "text": [f"{g['accuracy']:.0%}" for g in shown], "textposition": "auto",
        "hovertemplate": "%{x:.1%}<extra></extra>",
    }  # fmt: skip
    return Panel(
        title="How well each gate tells the experts' rows apart",
        columns=("layer", "accuracy"),
        rows=[(int(g["gate"]), g["accuracy"]) for g in gates],
        figure=figure(
            [trace], x="share of what it has not seen that goes to its own expert", y="", height=row_height(len(shown)),
            xaxis={"tickformat": ".0%", "range": [0, 1]}, yaxis=by_name(names), shapes=[vertical_line(floor)],
        ),
        note=f"Cross-validated; the mean is {router['accuracy']:.1%}. Always naming the largest class would reach "
        f"{floor:.1%} (dashed).",
        alt=f"Bar chart of the accuracy of {len(shown)} gates, on average {number(router['accuracy'])}",
    )  # fmt: skip
