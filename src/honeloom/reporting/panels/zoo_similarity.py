"""How alike the models of a zoo are: every pair as a heat map, similar ones side by side, and the tree they make."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from honeloom.reporting.panel import GREY, INK, SERIES, Panel, by_name, figure
from honeloom.reporting.text import clip, number, plural, visible
from honeloom.types.report import Report

__all__ = ["similarity_panel"]

CLUSTERS_FILE, SIMILARITY_FILE = "clusters.json", "similarity.npz"
MODELS = 48
"""Models that the chart has room for; the table has all of them."""
WITH_NUMBERS, PRECISE = 20, 8
"""Models up to which every cell has its similarity written in it, and up to which with three decimals."""
PIXELS = 28
UNDER = 16
"""Characters of a name below a column."""
TREE = 0.22
"""Share of the width that the tree has."""

Array = npt.NDArray[np.float64]
_MEASURES = {
    "weights": ("all", "weights", "Mean cosine of the columns of all matrices of attention and MLP."),
    "deltas": ("delta_all", "task vectors", "Mean cosine of the columns of all task vectors (model minus base)."),
}
_RULES = {
    "leader": "A model joins the family whose leader it is more than {t} similar to",
    "average": "Two groups are one while the mean similarity across them is above {t} (average linkage)",
    "complete": "Two groups are one while all their models are more than {t} similar (complete linkage)",
}


@dataclass(frozen=True, slots=True)
class _Zoo:
    """What both files say: names and similarities in the shown order, clusters.json, and each model's cluster."""

    names: list[str]
    square: Array
    record: dict[str, Any]
    cluster: dict[str, int]


def similarity_panel(folder: Path, report: Report) -> Panel | None:
    """Similarity of all pairs of models and the clusters they fall into; None where none were compared."""
    zoo = _read(folder)
    if zoo is None:
        return None
    record = zoo.record
    _, what, meaning = _MEASURES[record["measure"]]
    rule = _RULES[record["method"]].format(t=number(record["threshold"]))
    shown, count = min(len(zoo.names), MODELS), len(record["clusters"])
    left = f" The chart has the first {shown} of {len(zoo.names):,} models." if len(zoo.names) > shown else ""
    empty = " Cells are empty where two models could not be compared." if np.isnan(zoo.square).any() else ""
    tree = _trees(zoo) if shown == len(zoo.names) else []
    joins = ""
    if tree:
        by = "" if record["method"] != "leader" else " It is the average linkage and did not make the families."
        joins = f" The tree on the right joins at 1 minus the similarity; the dashed line is the cut.{by}"
    return Panel(
        title="How alike the models are",
        columns=("model", "cluster", "nearest other model", "similarity", "why it is alone or left out"),
        rows=_table(zoo),
        figure=_chart(zoo, shown, what, tree),
        note=f"{meaning} {rule}; frames are clusters.{joins}{empty}{left}",
        alt=f"Heat map of the similarity of {plural(shown, 'model')}, which form {plural(count, 'cluster')}",
        file=CLUSTERS_FILE,
    )


def _read(folder: Path) -> _Zoo | None:
    if not (folder / CLUSTERS_FILE).is_file() or not (folder / SIMILARITY_FILE).is_file():
        return None
    record = json.loads((folder / CLUSTERS_FILE).read_bytes())
    names = [model for bucket in record["buckets"] for model in bucket["order"]]
    with np.load(folder / SIMILARITY_FILE, allow_pickle=False) as archive:
        place = {model: i for i, model in enumerate(archive["names"].tolist())}
        at = [place[model] for model in names]
        square = archive[_MEASURES[record["measure"]][0]][np.ix_(at, at)]
    return _Zoo(names, square, record, {m: k for k, group in enumerate(record["clusters"], 1) for m in group})


def _table(zoo: _Zoo) -> list[tuple[Any, ...]]:
    """Models in the shown order, then those that are left out."""
    why = {entry["model"]: entry["reason"] for entry in zoo.record["alone"]}
    rows: list[tuple[Any, ...]] = []
    for i, model in enumerate(zoo.names):
        others = np.where(np.arange(len(zoo.names)) == i, np.nan, zoo.square[i])
        near = None if np.isnan(others).all() else int(np.nanargmax(others))
        nearest = (None, None) if near is None else (zoo.names[near], float(others[near]))
        rows.append((model, zoo.cluster[model], *nearest, why.get(model, "")))
    return rows + [(entry["model"], None, None, None, entry["reason"]) for entry in zoo.record["refused"]]


def _chart(zoo: _Zoo, shown: int, what: str, tree: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names, square = zoo.names[:shown], zoo.square[:shown, :shown]
    written = shown <= WITH_NUMBERS
    under = [visible(n if len(n) <= UNDER else f"{n[: UNDER - 1]}…") for n in names]
    shapes = _frames(zoo, shown)
    layout: dict[str, Any] = {}
    if tree:
        shapes.append(_cut_line(1 - zoo.record["threshold"]))
        layout["xaxis2"] = _tree_axis(tree, 1 - zoo.record["threshold"])
    return figure(
        [_cells(names, square, written), *tree],
        x=f"similarity of {what}", y="", hovermode="closest", shapes=shapes, showlegend=False,
        height=140 + PIXELS * shown + 4 * max(map(len, under)),
        xaxis={
            **by_name(under), "range": [-0.5, shown - 0.5], "domain": [0, 1 - TREE - 0.03 if tree else 1],
            "autotickangles": [0, -40, -90],
        },
        yaxis={**by_name(names), "range": [shown - 0.5, -0.5]},
        **layout,
    )  # fmt: skip


def _cells(names: Sequence[str], square: Array, written: bool) -> dict[str, Any]:
    """Cells of pairs that were not compared stay empty."""
    lowest = float(np.nanmin(square))
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": list(range(len(names))),
        "y": list(range(len(names))),
        "z": [[None if np.isnan(v) else round(v, 4) for v in line] for line in square.tolist()],
        "zmin": min(0.0, lowest),
        "zmax": 1,
        "colorscale": [[0, "--raised"], [1, SERIES[0]]],
        "text": [
            [f"{clip(one, 30)} and {clip(other, 30)}: {number(v)}" for other, v in zip(names, line, strict=True)]
            for one, line in zip(names, square.tolist(), strict=True)
        ],
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "showscale": not written,
        "colorbar": {"thickness": 12, "len": 0.9, "outlinewidth": 0, "tickcolor": GREY},
    }
    if written:  # paler, so that one colour of text is legible on every cell
        decimals = 3 if len(names) <= PRECISE else 2
        trace |= {"texttemplate": f"%{{z:.{decimals}f}}", "textfont": {"color": "--ink"}, "opacity": 0.6}
    return trace


def _frames(zoo: _Zoo, shown: int) -> list[dict[str, Any]]:
    """A frame round every cluster of several models: they stand side by side."""
    place = {model: i for i, model in enumerate(zoo.names[:shown])}
    frames = []
    for group in zoo.record["clusters"]:
        at = [place[model] for model in group if model in place]
        if len(at) > 1:
            low, high = min(at) - 0.5, max(at) + 0.5
            line = {"color": INK, "width": 2}
            frames.append({"type": "rect", "x0": low, "x1": high, "y0": low, "y1": high, "line": line})
    return frames


def _trees(zoo: _Zoo) -> list[dict[str, Any]]:
    """The merges of every bucket as lines, where they keep the families together."""
    traces, first = [], 0
    for bucket in zoo.record["buckets"]:
        size = len(bucket["order"])
        if bucket["linkage"]:
            x, y = _lines(bucket["linkage"], first, size)
            traces.append({
                "type": "scatter", "mode": "lines", "x": x, "y": y, "xaxis": "x2", "yaxis": "y",
                "line": {"color": INK, "width": 1.5}, "hovertemplate": "joined at %{x:.3f}<extra></extra>",
            })  # fmt: skip
        first += size
    return traces


def _lines(merges: Sequence[Sequence[float]], first: int, size: int) -> tuple[list[float | None], list[float | None]]:
    """Of every merge a bracket between what it joins; leaves are rows of the heat map."""
    at = {i: (0.0, float(first + i)) for i in range(size)}
    x: list[float | None] = []
    y: list[float | None] = []
    for k, (one, other, height, _) in enumerate(merges):
        (left, upper), (right, lower) = at[int(one)], at[int(other)]
        at[size + k] = (height, (upper + lower) / 2)
        x += [round(v, 6) for v in (left, height, height, right)] + [None]
        y += [upper, upper, lower, lower, None]
    return x, y


def _tree_axis(tree: Sequence[dict[str, Any]], cut: float) -> dict[str, Any]:
    far = max([cut, *(v for trace in tree for v in trace["x"] if v is not None)])
    return {
        "domain": [1 - TREE, 1], "anchor": "y", "range": [0, 1.06 * far], "showgrid": False, "zeroline": False,
        "fixedrange": True, "automargin": True, "linecolor": GREY, "nticks": 4,
        "title": {"text": "1 − similarity", "standoff": 12, "font": {"size": 13}},
    }  # fmt: skip


def _cut_line(at: float) -> dict[str, Any]:
    line = {"color": GREY, "dash": "dash", "width": 1.5}
    return {"type": "line", "xref": "x2", "x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1, "line": line}
