"""A small selection by values of clusters, written by hand; half of its texts are attempts to run or to mislead."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
from hostile_texts import HOSTILE

from honeloom.data.sources import fingerprint, resolve_sources
from honeloom.types.report import Artefact, Report

CLUSTERS = 5
PER_CLUSTER = 8
VALUES = [0.25, -0.5, 1.0, 0.125, 0.0]
KEPT = {2: 8, 0: 2}
"""Rows kept of clusters 2 and 0."""


def row_id(i):
    return f"{i} {HOSTILE[i % len(HOSTILE)][:30]}"


def input_rows():
    count = CLUSTERS * PER_CLUSTER + 2
    return [
        {"id": row_id(i), "instruction": f"question {i} {HOSTILE[i % 6]}", "output": f"answer {i}"}
        for i in range(count)
    ]


def scores_table():
    """Rows of five clusters in turn, then two of none."""
    n = CLUSTERS * PER_CLUSTER
    cluster = [i % CLUSTERS for i in range(n)] + [None, None]
    place = [i // CLUSTERS for i in range(n)] + [0, 1]
    return pa.table({
        "id": [row_id(i) for i in range(n + 2)],
        "score": pa.array([None if c is None else VALUES[c] for c in cluster], pa.float64()),
        "cluster": pa.array(cluster, pa.int64()),
        "selected": [c is not None and p < KEPT.get(c, 0) for c, p in zip(cluster, place, strict=True)],
        "source": ["<b>pool</b>"] * (n + 2),
        "domain": pa.nulls(n + 2, pa.string()),
        "distance": [0.1 * (PER_CLUSTER - p) for p in place],
        "x": [((c or 0) + 0.123456789 * p) / 7 for c, p in zip(cluster, place, strict=True)],
        "y": [((c or 0) - 0.123456789 * p) / 7 for c, p in zip(cluster, place, strict=True)],
    })  # fmt: skip


def clusters_table(count=CLUSTERS, values=VALUES):
    return pa.table({
        "cluster": list(range(count)),
        "size": [PER_CLUSTER] * count,
        "proxy_id": [row_id(i) for i in range(count)],
        "value": [float(v) for v in values],
        "stderr": pa.array([None, *[0.1] * (count - 1)], pa.float64()),
        "p_select": [1 / count] * count,
    })  # fmt: skip


def valued_report(folder, **details):
    """The report of `valued_folder`, with other details where they are given."""
    usual = {
        "rows_in": 42, "rows_usable": 42, "rows_kept": 10, "method": "shed", "rejected": {}, "evaluations": 58,
        "budget": 60, "players": 5, "failed": 2, "empty": -5.0, "full": -4.0, "estimator": "regression",
        "noise": {"sd": 0.05, "margin": 0.2, "predicted_rho": 0.9, "resolvable": True},
        "development": {"rows": 12, "from": "target"}, "surrogate_correlation": 0.5, "effective_clusters": 1.25,
        "removal": {
            "share": [0.0, 0.5, 1.0], "without_best": [-4.0, -4.8, -5.0], "without_worst": [-4.0, -3.8, -5.0],
        },
    }  # fmt: skip
    artefact = Artefact("rows", str(folder / "selected.jsonl"), "0" * 64)
    return Report("select", "ok", str(folder), 3, artefact, details={**usual, **details})


def write_valued(folder):
    """Write the folder and return its report."""
    rows, scores = input_rows(), scores_table()
    pq.write_table(scores, folder / "scores.parquet")
    pq.write_table(clusters_table(), folder / "clusters.parquet")
    pool = folder / "pool.jsonl"
    pool.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    kept = [r for r, k in zip(rows, scores["selected"].to_pylist(), strict=True) if k]
    (folder / "selected.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    entry = {
        "place": "rows.0", "kind": "rows", "value": str(pool), "paths": [str(pool)], "relative": None,
        "revision": None, "sha256": fingerprint(resolve_sources([str(pool)])), "bytes": pool.stat().st_size,
    }  # fmt: skip
    (folder / "inputs.json").write_text(json.dumps({"schema": "honeloom.inputs/1", "inputs": [entry]}))
    return valued_report(folder)
