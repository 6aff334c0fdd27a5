"""What the updates of a federation were like: their norms, the clients' losses, and how exact every aggregate is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from honeloom.reporting.panel import GREY, INK, SERIES, Panel, by_name, figure, row_height
from honeloom.reporting.panels.federation import ROUNDS_FILE, Record, clients_of, read_rounds, round_axis, shown_of
from honeloom.reporting.text import clip, number, plural
from honeloom.types.report import Report

__all__ = ["client_losses_panel", "exactness_panel", "module_errors_panel", "update_norms_panel"]

MODULES = 20
"""Modules of the last round that are listed, those with the largest errors."""
LINES = 6
"""Clients up to which each has a line of its own; more are dots round a line of their median."""
ROUNDS = 200
"""Rounds that a chart has room for, the last ones."""
WIDE = 20
"""Largest over smallest value from which on an axis is logarithmic."""


def update_norms_panel(folder: Path, report: Report) -> Panel | None:
    """Frobenius norm of every update by round, with refused ones marked; None where no update came."""
    rounds = read_rounds(folder)
    clients = clients_of(rounds, report)
    known = {
        name: [(r["round"], c) for r, c in seen if c["norm"] is not None]
        for name, seen in clients.items()
    }  # fmt: skip
    known = {name: points for name, points in known.items() if points}
    if not known:
        return None
    shown, left = shown_of(list(known))
    everything = [(at, name, c) for name, points in known.items() for at, c in points]
    refused = [p for p in everything if p[2]["status"] != "ok"]
    first = max(rounds[0]["round"], rounds[-1]["round"] - ROUNDS + 1)
    drawn = [p for p in everything if p[1] in set(shown) and p[0] >= first]
    if first > rounds[0]["round"]:
        left += f" It has the last {ROUNDS} of {plural(len(rounds), 'round')}."
    told = f"{plural(len(refused), 'update')} {'was' if len(refused) == 1 else 'were'} refused as too large (crosses)"
    norms = [c["norm"] for _, _, c in drawn]
    return Panel(
        title="Norms of the updates",
        columns=("round", "client", "norm", "status", "why"),
        rows=[
            (at, name, c["norm"], c["status"], c["reason"] or "")
            for at, name, c in sorted(everything, key=lambda p: (p[0], p[2]["status"] == "ok"))
        ],
        figure=_norms(drawn, shown, first, rounds[-1]["round"]),
        note=f"Frobenius norm of what a client changed in a round, over all modules. "
        f"{told if refused else 'No update was refused as too large'}.{left}",
        alt=f"Chart of the norms of {plural(len(drawn), 'update')}, from {number(min(norms))} to {number(max(norms))}; "
        f"{len(refused)} refused",
        file=ROUNDS_FILE,
    )


def client_losses_panel(folder: Path, report: Report) -> Panel | None:
    """Each client's loss before the first round that counted and after the last; None where none is known."""
    ends = {}
    for name, seen in clients_of(read_rounds(folder), report).items():
        ok = [(r["round"], c) for r, c in seen if r["applied"] and c["status"] == "ok"]
        ok = [(at, c) for at, c in ok if c["loss_before"] is not None and c["loss_after"] is not None]
        if ok:
            ends[name] = (ok[0], ok[-1])
    if not ends:
        return None
    shown, left = shown_of(list(ends))
    rows = [
        (name, a["rows"], at, a["loss_before"], to, z["loss_after"], z["loss_after"] - a["loss_before"])
        for name, ((at, a), (to, z)) in ends.items()
    ]
    fell = sum(row[-1] < 0 for row in rows)
    return Panel(
        title="Loss of each client",
        columns=("client", "rows", "first round", "loss before it", "last round", "loss after it", "change"),
        rows=rows,
        figure=_dumbbells([(row[0], row[3], row[5]) for row in rows if row[0] in set(shown)]),
        note=f"On some of the client's own rows, before its first round and after its training in its last; it fell "
        f"for {fell:,} of {plural(len(rows), 'client')}. Rows held out tell more.{left}",
        alt=f"Dumbbell chart of the loss of {plural(len(shown), 'client')} before the first round and after the last; "
        f"it fell for {fell} of {len(rows)}",
        file=ROUNDS_FILE,
    )


def exactness_panel(folder: Path, report: Report) -> Panel | None:
    """Relative error of the aggregate by round; None where nothing was aggregated."""
    rounds = [r for r in read_rounds(folder) if r["applied"] and r["error"] is not None]
    if not rounds:
        return None
    errors = [r["error"] for r in rounds]
    limit = next(
        (c.limit for c in report.verification if c.claim.startswith("every aggregate") and isinstance(c.limit, float)),
        None,
    )
    told = f" It has to stay below {limit:g} (dashed)." if limit is not None else ""
    rule = report.details.get("aggregation")
    return Panel(
        title="Exactness of the aggregate",
        columns=("round", "relative error", "rank", "replies"),
        rows=[(r["round"], r["error"], r["rank"], sum(c["status"] == "ok" for c in r["clients"])) for r in rounds],
        figure=_errors(rounds[-ROUNDS:], limit),
        note=f"Norm of what the aggregate{f' by {clip(rule, 40)}' if rule else ''} differs from the weighted sum of "
        f"the clients' updates, over the norm of that sum.{told}",
        alt=f"Line chart of the relative error of {plural(len(rounds), 'aggregate')}, from {number(min(errors))} to "
        f"{number(max(errors))}",
        file=ROUNDS_FILE,
    )


def module_errors_panel(folder: Path, report: Report) -> Panel | None:
    """Modules with the largest relative errors in the last round that counted; None where none is known."""
    last = next((r for r in reversed(read_rounds(folder)) if r["applied"] and r["errors"]), None)
    if last is None:
        return None
    ranked = sorted(last["errors"].items(), key=lambda e: (-e[1], e[0]))
    which = f"The {MODULES} largest of {len(ranked):,} modules" if len(ranked) > MODULES else "All modules"
    return Panel(
        title=f"Exactness by module, round {last['round']}",
        columns=("module", "relative error"),
        rows=ranked[:MODULES],
        note=f"{which}; the median is {number(float(statistics.median(last['errors'].values())))}. "
        f"{ROUNDS_FILE} has every module of every round.",
        file=ROUNDS_FILE,
    )


def _norms(drawn: Sequence[tuple[int, str, Record]], shown: Sequence[str], first: int, last: int) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    ok = [p for p in drawn if p[2]["status"] == "ok"]
    if len(shown) <= LINES:
        for k, name in enumerate(shown):
            if mine := [p for p in ok if p[1] == name]:
                line = {"color": SERIES[k], "width": 1.5}
                traces.append({**_points(mine), "mode": "lines+markers", "name": name, "line": line})
                traces[-1]["marker"] = {"size": 7, "color": SERIES[k]}
    elif ok:
        by_round = {at: [c["norm"] for a, _, c in ok if a == at] for at in sorted({p[0] for p in ok})}
        traces.append({**_points(ok), "name": "a client", "marker": {"size": 6, "color": SERIES[0], "opacity": 0.6}})
        traces.append({
            "type": "scatter", "mode": "lines", "name": "median", "x": list(by_round),
            "y": [statistics.median(v) for v in by_round.values()], "line": {"color": INK, "width": 2},
            "hovertemplate": "round %{x}, median: %{y:.4g}<extra></extra>",
        })  # fmt: skip
    if refused := [p for p in drawn if p[2]["status"] != "ok"]:
        look = {"size": 12, "color": INK, "symbol": "x"}
        traces.append({**_points(refused), "name": "refused", "marker": look})
    return figure(
        traces, x="round", y="norm", hovermode="closest", xaxis=round_axis(first, last),
        yaxis=_scale([c["norm"] for _, _, c in drawn]),
    )  # fmt: skip


def _points(points: Sequence[tuple[int, str, Record]]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [at for at, _, _ in points],
        "y": [c["norm"] for _, _, c in points],
        "text": [clip(name, 40) for _, name, _ in points],
        "hovertemplate": "round %{x}, %{text}: %{y:.4g}<extra></extra>",
    }


def _scale(values: Sequence[float]) -> dict[str, Any]:
    """From zero, or logarithmic where values lie far apart."""
    if min(values) > 0 and max(values) > WIDE * min(values):
        return {"type": "log", "exponentformat": "power", "dtick": 1}
    return {"rangemode": "tozero"}


def _dumbbells(clients: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
    """Two marks for each client and the line between them."""
    names = [name for name, _, _ in clients]
    bars = {
        "type": "scatter",
        "mode": "lines",
        "x": [x for _, before, after in clients for x in (before, after, None)],
        "y": [y for i in range(len(clients)) for y in (i, i, None)],
        "line": {"color": GREY, "width": 2},
        "showlegend": False,
        "hoverinfo": "skip",
    }
    looks = (("before the first round", "circle-open", SERIES[1]), ("after the last", "circle", SERIES[0]))
    marks = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": label,
            "x": [client[k] for client in clients],
            "y": list(range(len(clients))),
            "text": names,
            "marker": {"size": 10, "symbol": symbol, "color": colour, "line": {"width": 2, "color": colour}},
            "hovertemplate": f"%{{text}}, {label}: %{{x:.4f}}<extra></extra>",
        }
        for k, (label, symbol, colour) in enumerate(looks, 1)
    ]
    return figure(
        [bars, *marks], x="loss (nats/token)", y="", height=row_height(len(clients)), hovermode="closest",
        xaxis={"zeroline": False}, yaxis=by_name(names),
    )  # fmt: skip


def _errors(rounds: Sequence[Record], limit: float | None) -> dict[str, Any]:
    errors = [r["error"] for r in rounds]
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [r["round"] for r in rounds],
        "y": errors,
        "marker": {"size": 8},
        "line": {"color": SERIES[0], "width": 2},
        "hovertemplate": "round %{x}: %{y:.3g}<extra></extra>",
    }
    first, last = rounds[0]["round"], rounds[-1]["round"]
    shapes = []
    if limit is not None:
        dashed = {"color": GREY, "dash": "dash", "width": 1.5}
        shapes = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit, "y1": limit, "line": dashed}]
    axis = _scale([*errors, *([limit] if limit is not None else [])])
    if axis.get("type") != "log":
        axis |= {"exponentformat": "power"}
    return figure(
        [line], x="round", y="relative error", height=280, hovermode="closest", shapes=shapes,
        xaxis=round_axis(first, last), yaxis=axis,
    )  # fmt: skip
