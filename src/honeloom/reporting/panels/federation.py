"""Who took part in a federation, and what travelled: clients by rounds, bytes and ranks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from honeloom.reporting.panel import GREY, SERIES, Panel, by_name, figure, row_height
from honeloom.reporting.text import NAME, clip, number, plural, size
from honeloom.runs.journal import read_journal
from honeloom.types.report import Report

__all__ = [
    "ROUNDS_FILE",
    "UNITS",
    "Seen",
    "byte_unit",
    "clients_of",
    "exposure_panel",
    "read_rounds",
    "round_axis",
    "rounds_panel",
    "shown_of",
    "traffic_panel",
]

ROUNDS_FILE = "rounds.jsonl"
CLIENTS = 24
"""Clients that a chart has room for; the tables have all of them."""
ROUNDS = 200
"""Rounds that the grid has room for, the last ones: with all its clients it stays below 5,000 points."""
STATUSES = ("ok", "late", "rejected", "absent")
LOOKS = dict(zip(STATUSES, ((SERIES[0], "circle"), (SERIES[1], "diamond"), (SERIES[3], "x"), (GREY, "circle-open")),
                 strict=True))  # fmt: skip
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

Record = dict[str, Any]
Seen = list[tuple[Record, Record]]
"""Rounds that asked a client, each with what it had of it."""


def read_rounds(folder: Path) -> list[Record]:
    """Lines of rounds.jsonl; none where there is no such file."""
    return list(read_journal(folder / ROUNDS_FILE))


def clients_of(rounds: Sequence[Record], report: Report) -> dict[str, Seen]:
    """By client, in the order of their names with numbers as numbers: the rounds that asked it, maybe none."""
    names = {c["id"] for c in report.details.get("clients") or ()} | {c["id"] for r in rounds for c in r["clients"]}
    found: dict[str, Seen] = {name: [] for name in sorted(names, key=_natural)}
    for record in rounds:
        for client in record["clients"]:
            found[client["id"]].append((record, client))
    return found


def shown_of(clients: Sequence[str]) -> tuple[list[str], str]:
    """Clients that a chart shows, and a sentence where it leaves some out."""
    shown = list(clients)[:CLIENTS]
    left = f" The chart has the first {len(shown)} of {len(clients):,} clients by name." if clients[CLIENTS:] else ""
    return shown, left


def rounds_panel(folder: Path, report: Report) -> Panel | None:
    """What every round had of every client; None without rounds."""
    rounds = read_rounds(folder)
    clients = clients_of(rounds, report)
    if not rounds or not clients:
        return None
    shown, left = shown_of(list(clients))
    drawn = rounds[-ROUNDS:]
    if len(rounds) > len(drawn):
        left += f" It has the last {len(drawn)} of {plural(len(rounds), 'round')}."
    counts = Counter(c["status"] for seen in clients.values() for _, c in seen)
    told = ", ".join(f"{counts[s]:,} {s}" for s in STATUSES if counts[s])
    idle = [r["round"] for r in rounds if not r["applied"]]
    nothing = ""
    if idle:
        which = ", ".join(map(str, idle[:8])) + (f" and {len(idle) - 8} more" if len(idle) > 8 else "")
        nothing = f" Too few replied in round{'s' if len(idle) > 1 else ''} {which}: nothing changed there (grey band)."
    asked = plural(sum(counts.values()), "request")
    return Panel(
        title="Clients by round",
        columns=("client", "rows", *STATUSES, "not asked", "why"),
        rows=[_row(name, seen, len(rounds)) for name, seen in clients.items()],
        figure=_grid(drawn, {name: clients[name] for name in shown}),
        note=f"Of {asked}: {told}. Without a mark, a client was not asked.{nothing}{left}",
        alt=f"Grid of {plural(len(shown), 'client')} by {plural(len(drawn), 'round')}, of all requests {told}",
        file=ROUNDS_FILE,
    )


def traffic_panel(folder: Path, report: Report) -> Panel | None:
    """Bytes that every client sent and was sent, over all rounds, and the rank it trained; None without rounds."""
    rounds = read_rounds(folder)
    asked = {name: seen for name, seen in clients_of(rounds, report).items() if seen}
    if not asked:
        return None
    shown, left = shown_of(list(asked))
    sums = {n: [sum(c[key] for _, c in seen) for key in ("bytes_up", "bytes_down")] for n, seen in asked.items()}
    up, down = (sum(both[i] for both in sums.values()) for i in (0, 1))
    aggregate = max(r["rank"] for r in rounds)
    return Panel(
        title="Ranks and bytes by client",
        columns=("client", "rank", "rounds asked", "bytes up", "bytes down"),
        rows=[(name, _ranks(seen), len(seen), *sums[name]) for name, seen in asked.items()],
        figure=_bars([(f"{clip(n, NAME)} · rank {_ranks(asked[n])}", sums[n]) for n in shown]),
        note=f"Over {plural(len(rounds), 'round')}, {size(up)} went up to the server and {size(down)} down to the "
        f"clients. The largest rank of an aggregate is {aggregate}.{left}",
        alt=f"Bar chart of bytes up and down for {plural(len(shown), 'client')}; in all {size(up)} up and "
        f"{size(down)} down",
        file=ROUNDS_FILE,
    )


def exposure_panel(folder: Path, report: Report) -> Panel | None:
    """Who sees what of a client; None where the report does not say."""
    privacy = report.details.get("privacy")
    if not privacy:
        return None
    epsilon, dp = report.details.get("epsilon"), privacy.get("dp") or {}
    sums = "Secure aggregation." if privacy.get("secagg") else "No secure aggregation."
    noise = "No noise: no epsilon can be told."
    if epsilon is not None:
        noise = (
            f"Each row of a client: epsilon {number(epsilon)} at delta {number(dp['delta'])}, of noise "
            f"{number(dp['noise'])} times a row's largest scalar, {number(dp['clip'])}."
        )
    who = (("the server", "server"), ("other clients", "clients"), ("neither of them", "hidden"))
    return Panel(
        title="Who sees what of a client",
        columns=("who", "sees"),
        rows=[(name, privacy[key]) for name, key in who],
        note=f"Mode {clip(privacy['mode'])}, engine {clip(report.details['engine'])}. {sums} {noise}",
    )


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts client-2 before client-10; runs of more than 18 digits are text."""
    parts = re.split(r"([0-9]{1,18})", name[:NAME])
    return [(k % 2 == 0, int(p) if k % 2 else 0, p) for k, p in enumerate(parts)] + [(True, 0, name)]


def _row(name: str, seen: Seen, rounds: int) -> tuple[Any, ...]:
    counts = Counter(c["status"] for _, c in seen)
    why = "; ".join(
        f"round {r['round']} {c['status']}: {c['reason'] or 'no reply'}" for r, c in seen if c["status"] != "ok"
    )
    rows = max((c["rows"] for _, c in seen), default=0)
    return (name, rows, *(counts[s] for s in STATUSES), rounds - len(seen), why)


def _grid(rounds: Sequence[Record], clients: dict[str, Seen]) -> dict[str, Any]:
    first, last = rounds[0]["round"], rounds[-1]["round"]
    points = [(i, name, r, c) for i, (name, seen) in enumerate(clients.items()) for r, c in seen if r["round"] >= first]
    wide = max(3, min(13, 700 // len(rounds)))
    traces = []
    for status, (colour, symbol) in LOOKS.items():
        mine = [p for p in points if p[3]["status"] == status]
        if not mine:
            continue
        told = [f": {clip(c['reason'], 40)}" if c["reason"] else "" for *_, c in mine]
        traces.append({
            "type": "scatter",
            "mode": "markers",
            "name": status,
            "x": [r["round"] for _, _, r, _ in mine],
            "y": [i for i, *_ in mine],
            "text": [f"{clip(p[1], 30)} {status}{why}" for p, why in zip(mine, told, strict=True)],
            "marker": {"size": wide, "color": colour, "symbol": symbol},
            "hovertemplate": "round %{x}, %{text}<extra></extra>",
        })  # fmt: skip
    look = {"fillcolor": GREY, "opacity": 0.18, "line": {"width": 0}, "layer": "below"}
    idle = [
        {"type": "rect", "x0": r["round"] - 0.5, "x1": r["round"] + 0.5, "yref": "paper", "y0": 0, "y1": 1, **look}
        for r in rounds
        if not r["applied"]
    ]
    return figure(
        traces, x="round", y="", height=row_height(len(clients)), hovermode="closest", shapes=idle,
        showlegend=True, xaxis=round_axis(first, last), yaxis=by_name(list(clients)),
    )  # fmt: skip


def round_axis(first: int, last: int) -> dict[str, Any]:
    """A horizontal axis of rounds: whole numbers only."""
    step = {"dtick": 1} if last - first < 20 else {}
    return {"range": [first - 0.6, last + 0.6], "zeroline": False, "showgrid": False, "tickformat": "d", **step}


def byte_unit(most: float) -> str:
    """The largest of UNITS that is not above a number of bytes."""
    return next((u for u in reversed(UNITS) if most >= UNITS[u]), "bytes")


def _ranks(seen: Seen) -> str:
    """`4`, or `4 to 8` where it changed."""
    ranks = sorted({c["rank"] for _, c in seen})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _bars(clients: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Any]:
    unit = byte_unit(max(max(both) for _, both in clients))
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": label,
            "x": [round(both[k] / UNITS[unit], 4) for _, both in clients],
            "y": list(range(len(clients))),
            "text": [f"{name}: {number(both[k])} bytes {label}" for name, both in clients],
            "textposition": "none",
            "hovertemplate": "%{text}<extra></extra>",
        }
        for k, label in enumerate(("up", "down"))
    ]
    return figure(
        traces, x=unit, y="", height=row_height(len(clients)) + 8 * len(clients), hovermode="closest",
        xaxis={"rangemode": "tozero"}, yaxis=by_name([name for name, _ in clients]),
        legend={
            "orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "traceorder": "normal",
        },
    )  # fmt: skip
