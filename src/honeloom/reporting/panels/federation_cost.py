"""What a federation's loss cost: rounds, bytes beside those of adapters, memory beside gradients; clients' rates."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from honeloom.reporting.panel import GREY, SERIES, Panel, by_name, figure, row_height
from honeloom.reporting.panels.federation import (
    ROUNDS_FILE,
    UNITS,
    Record,
    byte_unit,
    clients_of,
    read_rounds,
    round_axis,
    shown_of,
)
from honeloom.reporting.text import NAME, clip, number, plural, size
from honeloom.types.report import Report

__all__ = [
    "client_rates_panel",
    "instead_panel",
    "loss_by_bytes_panel",
    "loss_by_round_panel",
    "measured_panel",
    "memory_panel",
]

LINES = 6
"""Clients up to which each has a line of its own."""
MIB = 1 << 20


def loss_by_round_panel(folder: Path, report: Report) -> Panel | None:
    """Mean loss of the clients on their own rows, as each round began; None unless two rounds tell it."""
    points = _losses(read_rounds(folder))
    if len(points) < 2:
        return None
    first, last = points[0], points[-1]
    return Panel(
        title="Loss by round",
        columns=("round", "loss before it", "loss after local steps", "bytes so far"),
        rows=[(r["round"], before, after, sent) for r, before, after, sent in points],
        figure=figure(
            [
                _line([p[0]["round"] for p in points], [p[1] for p in points], "as it began", SERIES[0]),
                _line([p[0]["round"] for p in points], [p[2] for p in points], "after local steps", GREY),
            ],
            x="round", y="nats/token", xaxis=round_axis(first[0]["round"], last[0]["round"]),
        ),
        note="On some of each client's own rows, weighted by rows. As a round began, all clients had the same model; "
        "after their own steps, each has one of its own. Rows held out tell more.",
        alt=f"Line chart of the clients' loss over {plural(len(points), 'round')}, from {number(first[1])} to "
        f"{number(last[1])}",
        file=ROUNDS_FILE,
    )  # fmt: skip


def loss_by_bytes_panel(folder: Path, report: Report) -> Panel | None:
    """The same losses over all bytes that had travelled by then; None unless two rounds tell it."""
    points = _losses(read_rounds(folder))
    if len(points) < 2:
        return None
    unit = byte_unit(points[-1][3])
    sent = [p[3] / UNITS[unit] for p in points]
    return Panel(
        title="Loss by bytes",
        columns=("bytes so far", "loss", "round"),
        rows=[(p[3], p[1], p[0]["round"]) for p in points],
        figure=figure(
            [_line(sent, [p[1] for p in points], "loss", SERIES[0])], x=f"{unit} up and down, all clients",
            y="nats/token", height=300,
        ),
        note=f"Loss as a round began, over what all clients had sent and been sent before it, in all "
        f"{size(points[-1][3])}.",
        alt=f"Line chart of the clients' loss over {size(points[-1][3])}, from {number(points[0][1])} to "
        f"{number(points[-1][1])}",
        file=ROUNDS_FILE,
    )  # fmt: skip


def client_rates_panel(folder: Path, report: Report) -> Panel | None:
    """Learning rate of every client by round; None where all had the same in every round."""
    rounds = read_rounds(folder)
    clients = {name: seen for name, seen in clients_of(rounds, report).items() if seen}
    if not any(len({c["lr"] for c in r["clients"]}) > 1 for r in rounds):
        return None
    shown, left = shown_of(list(clients))
    traces: list[dict[str, Any]] = []
    for k, name in enumerate(shown):
        line = _line([r["round"] for r, _ in clients[name]], [c["lr"] for _, c in clients[name]], name, SERIES[k % 6])
        traces.append(line if len(shown) <= LINES else {**line, "mode": "markers", "showlegend": False})
    rates = (report.details.get("rates") or {}).get("statistic", "")
    means = {r["round"]: statistics.fmean(c["lr"] for c in r["clients"]) for r in rounds if r["clients"]}
    traces.append({**_line(list(means), list(means.values()), "mean", GREY), "mode": "lines"})
    return Panel(
        title="Learning rates of the clients",
        columns=("client", "first", "lowest", "highest", "last"),
        rows=[
            (name, seen[0][1]["lr"], min(c["lr"] for _, c in seen), max(c["lr"] for _, c in seen), seen[-1][1]["lr"])
            for name, seen in clients.items()
        ],
        figure=figure(
            traces, x="round", y="learning rate", hovermode="closest",
            xaxis=round_axis(rounds[0]["round"], rounds[-1]["round"]), yaxis={"exponentformat": "power"},
        ),
        note=f"By statistic {clip(rates)}: whoever was above the mean of the rounds before steps further.{left}",
        alt=f"Line chart of the learning rates of {plural(len(shown), 'client')} over {plural(len(rounds), 'round')}",
        file=ROUNDS_FILE,
    )  # fmt: skip


def instead_panel(folder: Path, report: Report) -> Panel | None:
    """Bytes up of a client in a round beside those of the tensors themselves; None where tensors travelled."""
    rounds = read_rounds(folder)
    whole = report.details.get("tensor_bytes") or {}
    sent = {
        name: statistics.fmean(c["bytes_up"] for _, c in seen)
        for name, seen in clients_of(rounds, report).items()
        if seen and whole.get(name)
    }
    if not sent or report.details.get("uplink") in (None, "tensors"):
        return None
    shown, left = shown_of(list(sent))
    times = statistics.median(whole[name] / max(1.0, sent[name]) for name in sent)
    what = "all weights" if report.details.get("method") == "full" else "the adapter"
    return Panel(
        title="Bytes that did not have to travel",
        columns=("client", f"up in a round, {clip(report.details['uplink'])}", f"{what} in float32", "times"),
        rows=[(name, sent[name], whole[name], whole[name] / max(1.0, sent[name])) for name in sent],
        figure=_beside([(name, sent[name], whole[name]) for name in shown], what),
        note=f"What a client sent in a round, framing included, beside {what} it would have sent: in the median "
        f"{number(times)} times as much.{left}",
        alt=f"Bar chart of bytes up in a round for {plural(len(shown), 'client')}, beside those of {what}; in the "
        f"median {number(times)} times as much",
        file=ROUNDS_FILE,
    )


def measured_panel(folder: Path, report: Report) -> Panel | None:
    """What each client's loss bore before the first round; None where nothing was measured."""
    found = report.details.get("measured")
    if not found:
        return None
    clients = found["clients"]
    rates, bounds = ([one[key] for one in clients.values()] for key in ("rate", "bound"))
    return Panel(
        title="Learning rate, as the clients measured it",
        columns=("client", "trace of the Hessian", "effective rank", "signal in a batch", "up from", "rate", "mu"),
        rows=[
            (name, c["trace"], c["trace"] / c["largest"] if c["largest"] > 0 else None, c["signal"], c["bound"],
             c["rate"], c["mu"])
            for name, c in clients.items()
        ],
        note="By forward passes on its own rows, before the first round: what a client's batches allow, and from where "
        f"on steps go up in the mean even with the gradient of all its rows, at least {number(min(bounds))}. All took "
        f"{number(found['lr'])}: the median rate, times the clients of a round, whose mean has less noise, within a "
        "third of the median bound.",
        alt=f"Table of what {plural(len(clients), 'client')} measured; rates from {number(min(rates))} to "
        f"{number(max(rates))}",
        file="curvature.json",
    )  # fmt: skip


def memory_panel(folder: Path, report: Report) -> Panel | None:
    """Estimated peak memory of a client's training, of inference and of backpropagation; None where unknown."""
    memory = report.details.get("memory") or {}
    if len(memory) < 2:
        return None
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [round(b / MIB, 2) for b in memory.values()],
        "y": list(range(len(memory))),
        "text": [f"{clip(name, NAME)}: {size(b)}" for name, b in memory.items()],
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>",
    }
    least = min(memory.values())
    return Panel(
        title="Memory beside backpropagation",
        columns=("what", "peak, MiB", "times the least"),
        rows=[(name, b / MIB, b / least) for name, b in memory.items()],
        figure=figure(
            [bars], x="MiB", y="", height=row_height(len(memory)), xaxis={"rangemode": "tozero"},
            yaxis=by_name(list(memory)),
        ),
        note="Estimated from the model's config for batches of this size and length, as by --dry-run; with weights.",
        alt="Bar chart of peak memory: " + ", ".join(f"{name} {size(b)}" for name, b in memory.items()),
    )  # fmt: skip


def _losses(rounds: Sequence[Record]) -> list[tuple[Record, float, float, int]]:
    """Rounds that tell losses: the mean before and after, and bytes that had travelled before the round."""
    traffic = [sum(c["bytes_up"] + c["bytes_down"] for c in r["clients"]) for r in rounds]
    found = []
    for record, sent in zip(rounds, accumulate(traffic, initial=0), strict=False):
        ok = [c for c in record["clients"] if c["status"] == "ok" and c["rows"]]
        if ok and all(c["loss_before"] is not None and c["loss_after"] is not None for c in ok):
            rows = sum(c["rows"] for c in ok)
            before, after = (sum(c[k] * c["rows"] for c in ok) / rows for k in ("loss_before", "loss_after"))
            found.append((record, before, after, sent))
    return found


def _line(x: Sequence[float], y: Sequence[float], name: str, colour: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "marker": {"size": 6, "color": colour},
        "line": {"color": colour, "width": 2},
        "hovertemplate": f"%{{x:.4g}}, {clip(name, NAME)}: %{{y:.4g}}<extra></extra>",
    }


def _beside(clients: Sequence[tuple[str, float, float]], what: str) -> dict[str, Any]:
    columns = {"sent": [sent for _, sent, _ in clients], what: [whole for *_, whole in clients]}
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": label,
            "x": values,
            "y": list(range(len(clients))),
            "text": [f"{clip(c[0], NAME)}, {label}: {size(b)}" for c, b in zip(clients, values, strict=True)],
            "textposition": "none",
            "hovertemplate": "%{text}<extra></extra>",
        }
        for label, values in columns.items()
    ]
    return figure(
        traces, x="bytes", y="", height=row_height(len(clients)) + 8 * len(clients), hovermode="closest",
        xaxis={"type": "log", "exponentformat": "power", "dtick": 1}, yaxis=by_name([name for name, *_ in clients]),
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "traceorder": "normal"},
    )  # fmt: skip
