"""Maps of the rows by pseudo-domain, and by how unsure the probe is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from honeloom.reporting.panel import GREY, INK, SERIES, SYMBOLS, Panel, figure
from honeloom.reporting.panels.domain_rows import NONE, kind_of, largest_first, names_of, read_domains
from honeloom.reporting.panels.row_map import (
    ENDS,
    ID,
    bare_axis,
    colours,
    even_sample,
    short_places,
    value_traces,
)
from honeloom.reporting.text import clip, number, plural
from honeloom.types.report import Report

__all__ = ["domain_map_panel", "entropy_map_panel"]

HEIGHT = 480
SCALE = ((0.0, GREY), (1.0, SERIES[1]))
PLANE = "Rows near each other have alike vectors, seen in the plane of their largest variance."


def domain_map_panel(folder: Path, report: Report) -> Panel | None:
    """Rows by the position of their vectors, coloured by pseudo-domain; None without positions or domains."""
    table = _placed(folder)
    if table is None:
        return None
    drawn = _sampled(table, report.seed)
    names = largest_first(names_of(table["pseudo_domain"]))
    rest = [n for n in names[len(SERIES) :] if n != NONE]
    grey = f" The {len(rest)} smallest domains are grey." if len(rest) > 1 else ""
    kind = kind_of(table)
    return Panel(
        title=f"Map by {kind}",
        columns=(kind, "rows", "kept", "middle x", "middle y"),
        rows=_by_domain(table, names),
        figure=figure(
            _domain_traces(drawn, names), x="", y="", height=HEIGHT,
            xaxis=bare_axis(), yaxis=bare_axis(), hovermode="closest",
        ),
        note=f"{PLANE} Outlined, larger marks were kept.{grey}{_told(drawn, table)}",
        alt=f"Scatter chart of {len(drawn):,} rows coloured by {plural(len(names), kind)}; "
        f"{int(np.count_nonzero(drawn['selected'].to_numpy())):,} of them were kept",
        file="scores.parquet",
    )  # fmt: skip


def entropy_map_panel(folder: Path, report: Report) -> Panel | None:
    """Rows by the position of their vectors, coloured by the probe's entropy; None without positions or entropies."""
    table = _placed(folder, ("entropy",))
    if table is None or table["entropy"].null_count == len(table):
        return None
    drawn = _sampled(table, report.seed)
    known = table.filter(table["entropy"].is_valid())
    entropies = known["entropy"].to_numpy()
    reach = float(np.quantile(entropies, ENDS)) or float(entropies.max()) or 1.0
    beyond = f" The highest {1 - ENDS:.0%} have the colour of the scale's end." if entropies.max() > reach else ""
    domains = zip(drawn["id"].to_pylist(), names_of(drawn["pseudo_domain"]), strict=True)
    texts = [f"{clip(row, ID)}, {clip(domain, ID)}" for row, domain in domains]
    return Panel(
        title="Map by entropy",
        columns=("pseudo-domain", "rows", "kept", "mean entropy", "highest"),
        rows=_entropies(known),
        figure=figure(
            value_traces(drawn, "entropy", "entropy", texts), x="", y="", height=HEIGHT,
            coloraxis=colours("entropy", SCALE, 0.0, reach), xaxis=bare_axis(), yaxis=bare_axis(), hovermode="closest",
        ),
        note="The same plane. The more orange a row, the less sure the probe is of its domain; entropy is in nats."
        f"{beyond} Outlined diamonds were kept.{_told(drawn, table)}",
        alt=f"Scatter chart of {len(drawn):,} rows coloured by entropy, from {number(float(entropies.min()))} "
        f"to {number(float(entropies.max()))} nats",
        file="scores.parquet",
    )  # fmt: skip


def _placed(folder: Path, needed: tuple[str, ...] = ()) -> pa.Table | None:
    """Rows with a place on the map."""
    table = read_domains(folder, ("id", "x", "y", *needed), ("domain", "source"))
    if table is None:
        return None
    table = table.filter(pc.and_(table["x"].is_valid(), table["y"].is_valid()))
    return table if len(table) else None


def _sampled(table: pa.Table, seed: int) -> pa.Table:
    """An even sample of every domain, the same for both maps."""
    _, group = np.unique(names_of(table["pseudo_domain"]), return_inverse=True)
    return table.take(even_sample(group.astype(float), seed))


def _told(drawn: pa.Table, table: pa.Table) -> str:
    if len(drawn) == len(table):
        return ""
    return f" Drawn are {len(drawn):,} of {len(table):,} rows, an even sample of every domain."


def _domain_traces(drawn: pa.Table, names: list[str]) -> list[dict[str, Any]]:
    """Rows left out, then kept ones on top, domain by domain; the legend has a domain once."""
    looks = _looks(names)
    group = np.array([looks[n][0] for n in names_of(drawn["pseudo_domain"])])
    kept = drawn["selected"].to_numpy()
    places = {axis: short_places(drawn[axis]) for axis in ("x", "y")}
    ids = [clip(row, ID) for row in drawn["id"].to_pylist()]
    headings = dict.fromkeys(looks.values())
    shared = {"type": "scatter", "mode": "markers"}
    traces: list[dict[str, Any]] = [
        {**shared, "name": name, "legendgroup": name, "x": [None], "y": [None],
         "marker": {"color": colour, "symbol": symbol, "size": 8}}
        for name, colour, symbol in headings
    ]  # fmt: skip
    for which, more in (
        (~kept, {"size": 5, "opacity": 0.8}),
        (kept, {"size": 9, "line": {"color": INK, "width": 1.2}}),
    ):
        for name, colour, symbol in headings:
            at = np.flatnonzero(which & (group == name))
            if len(at):
                traces.append(_points(at, places, ids, name, {"color": colour, "symbol": symbol, **more}))
    return traces


def _looks(names: list[str]) -> dict[str, tuple[str, str, str]]:
    """Heading, colour and symbol of every domain: the largest have their own, the others are grey together."""
    named = [n for n in names if n != NONE]
    own = min(len(named), len(SERIES))
    rest = len(named) - own
    looks = {n: (n, SERIES[i], SYMBOLS[i]) for i, n in enumerate(named[:own])}
    if rest == 1:
        looks[named[-1]] = (named[-1], GREY, "hexagon")
    else:
        looks |= dict.fromkeys(named[own:], (f"{rest} others", GREY, "hexagon"))
    return looks | {NONE: ("without a domain", GREY, "x")} if NONE in names else looks


def _points(
    at: npt.NDArray[np.int64], places: dict[str, list[float]], ids: list[str], name: str, marker: dict[str, Any]
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "legendgroup": name,
        "showlegend": False,
        **{axis: [values[i] for i in at] for axis, values in places.items()},
        "text": [ids[i] for i in at],
        "marker": marker,
        # The name as the page has escaped it.
        "hovertemplate": "%{text}<extra>%{fullData.name}</extra>",
    }


def _by_domain(table: pa.Table, names: list[str]) -> list[tuple[Any, ...]]:
    """The map in numbers: every domain's rows and middle."""
    found = np.array(names_of(table["pseudo_domain"]))
    kept, x, y = (table[c].to_numpy() for c in ("selected", "x", "y"))
    groups = [(name, found == name) for name in names]
    return [(name, int(g.sum()), int((g & kept).sum()), float(x[g].mean()), float(y[g].mean())) for name, g in groups]


def _entropies(known: pa.Table) -> list[tuple[Any, ...]]:
    """Entropy by domain, the least sure first."""
    found = np.array(names_of(known["pseudo_domain"]))
    kept, entropy = known["selected"].to_numpy(), known["entropy"].to_numpy()
    groups = [(name, found == name) for name in largest_first(found.tolist())]
    rows = [
        (name, int(g.sum()), int((g & kept).sum()), float(entropy[g].mean()), float(entropy[g].max()))
        for name, g in groups
    ]
    return sorted(rows, key=lambda r: -r[3])
