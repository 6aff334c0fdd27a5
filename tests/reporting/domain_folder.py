"""A small selection by pseudo-domains, written by hand: what `daar` and `band` leave behind."""

import math

import pyarrow as pa
import pyarrow.parquet as pq

from honeloom.types.report import Report

PER_DOMAIN = 6
CURVE = [
    {"axis": axis, "band": band, "value": value, "stderr": 0.03, "evaluations": 3, "chosen": value == -1.5}
    for axis, band, value in (
        ("inter", "0-20", -2.0), ("inter", "80-100", -1.5), ("intra", "0-20", -1.75), ("intra", "80-100", -1.875),
    )
]  # fmt: skip
SWEEP = [
    {"depth": 0.5, "accuracy": 0.875, "loss": 0.5, "calibration_error": 0.02, "chosen": False},
    {"depth": 0.1, "accuracy": 0.9375, "loss": 0.25, "calibration_error": 0.01, "chosen": True},
]


def domain_scores(names=("a", "b"), labels=None):
    """Six rows of every domain and one of none; the last two of a domain are kept, and taken for the next one."""
    count = len(names)
    of, place = [k for k in range(count) for _ in range(PER_DOMAIN)], list(range(PER_DOMAIN)) * count
    marks = [None if labels is None else labels[i % len(labels)] for i in range(len(of) + 1)]
    most = math.log(max(2, count))
    entropy = [most * (p + 0.5) / PER_DOMAIN for p in place]
    said = [names[(k + 1) % count] if p >= 4 else names[k] for k, p in zip(of, place, strict=True)]
    return pa.table({
        "id": [f"row-{i:03d}" for i in range(count * PER_DOMAIN + 1)],
        "score": pa.array([*entropy, None], pa.float64()),
        "cluster": pa.array([*of, None], pa.int64()),
        "selected": [*(p >= 4 for p in place), False],
        "source": ["pool"] * (count * PER_DOMAIN + 1),
        "domain": pa.array(marks, pa.string()),
        "pseudo_domain": pa.array([*(names[k] for k in of), None], pa.string()),
        "x": [*(k + p / 20 for k, p in zip(of, place, strict=True)), 0.0],
        "y": [*((k * k - p) / 10 for k, p in zip(of, place, strict=True)), 0.0],
        "entropy": pa.array([*entropy, None], pa.float64()),
        "probe_domain": pa.array([*said, None], pa.string()),
    })  # fmt: skip


def domain_report(folder, names=("a", "b"), **details):
    """The report of such a folder by `daar`, with other details where they are given."""
    rows = len(names) * PER_DOMAIN + 1
    usual = {
        "rows_in": rows, "rows_usable": rows, "rows_kept": 2 * len(names), "method": "daar", "rejected": {},
        "evaluations": 0, "noise": None, "reward": "entropy", "domains": dict.fromkeys(names, PER_DOMAIN),
        "probe": {"most_entropy": math.log(max(2, len(names)))}, "agreement_with_labels": None,
    }  # fmt: skip
    return Report("select", "ok", str(folder), 3, None, details={**usual, **details})


def write_domains(folder, names=("a", "b"), labels=None, **details):
    """Write the folder and return its report."""
    scores = domain_scores(names, labels)
    pq.write_table(scores, folder / "scores.parquet")
    clusters = {"cluster": list(range(len(names))), "value": [0.5] * len(names), "name": list(names)}
    pq.write_table(pa.table(clusters), folder / "clusters.parquet")
    return domain_report(folder, names, **details)
