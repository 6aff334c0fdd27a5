"""Clustering against scikit-learn's k-means, and its memory at a million rows; writes CLUSTERING.md.

    OMP_NUM_THREADS=1 python benchmarks/selection/clustering.py [DATA]

DATA holds instruct/*.jsonl.gz (default: ../shared/data beside the repository); without it the real rows are left out.
Takes about five minutes on one core, and 1.5 GB of disk. Memory is read from /proc, so that part needs Linux.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from sklearn.cluster import KMeans

from honeloom.data.rowset import RowSet
from honeloom.data.sources import resolve_sources
from honeloom.selection.clusters import kmeans
from honeloom.selection.sampling import qocs, qwcs
from honeloom.selection.tfidf import tfidf_vectors
from honeloom.selection.vectors import stored_vectors

HERE = Path(__file__).resolve().parent
ROWS, CLUSTERS, LENGTH = 20_000, 300, 384
LARGE_ROWS, LARGE_CLUSTERS = 1_000_000, 3000
FASTER, WORSE, MEMORY = 20, 1.03, 2 * 2**30
BLOCK = 10_000


@dataclass
class Result:
    """Lines of CLUSTERING.md, and the bars that were missed."""

    lines: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Keep and print."""
        self.lines.append(text)
        print(text, flush=True)

    def bar(self, claim: str, passed: bool) -> str:
        """Note a missed bar; return the word for a table."""
        if not passed:
            self.missed.append(claim)
        return "yes" if passed else "**no**"


def mixture(count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Unit rows of 400 groups of unequal size, each with 8 directions of its own, and noise in all."""
    rng = np.random.default_rng(seed)
    centres = 0.6 * rng.normal(size=(400, LENGTH)).astype(np.float32)
    directions = 0.25 * rng.normal(size=(400, 8, LENGTH)).astype(np.float32)
    shares = rng.dirichlet(np.full(400, 0.7))
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        rows = 0.8 * rng.standard_normal((n, LENGTH), dtype=np.float32)
        groups = rng.choice(400, n, p=shares)
        for group in np.unique(groups):
            members = groups == group
            along = rng.standard_normal((int(members.sum()), 8), dtype=np.float32)
            rows[members] += centres[group] + along @ directions[group]
        yield rows / np.linalg.norm(rows, axis=1, keepdims=True)


def real(data: Path) -> np.ndarray:
    """Unit TF-IDF vectors of 20,000 instructions and answers, drawn from all files."""
    rows = RowSet.scan(resolve_sources([str(data / "instruct" / "*.jsonl.gz")]), max_bad=1.0)
    chosen = rows.take(np.random.default_rng(0).choice(len(rows), ROWS, replace=False))
    vectors = np.nan_to_num(np.concatenate(list(tfidf_vectors(chosen, size=LENGTH, seed=0))))
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall and processor seconds, and what the call returns."""
    wall, processor = time.perf_counter(), time.process_time()
    found = call()
    return time.perf_counter() - wall, time.process_time() - processor, found


def compare(result: Result, name: str, vectors: np.ndarray, rounds: int) -> None:
    """Both in turn, each seed once."""
    ids = [f"row-{i:07d}" for i in range(len(vectors))]
    ours, theirs = [], []
    for seed in range(rounds):
        wall, processor, found = timed(lambda s=seed: kmeans(vectors, CLUSTERS, seed=s, ids=ids))
        ours.append((wall, processor, float((found.distances.astype(np.float64) ** 2).sum())))
        model = KMeans(CLUSTERS, init="k-means++", algorithm="lloyd", n_init=1, random_state=seed)
        wall, processor, found = timed(lambda m=model: m.fit(vectors))
        theirs.append((wall, processor, float(found.inertia_)))
    for what, runs in (("honeloom", ours), ("scikit-learn", theirs)):
        walls = [r[0] for r in runs]
        result.add(
            f"| {name} | {what} | {min(walls):.2f} / {median(walls):.2f} / {max(walls):.2f} | "
            f"{median(r[1] for r in runs):.2f} | {min(r[2] for r in runs):.0f} - {max(r[2] for r in runs):.0f} | |"
        )
    faster = median(r[0] for r in theirs) / median(r[0] for r in ours)
    inertia = sum(r[2] for r in ours) / sum(r[2] for r in theirs)
    word = result.bar(
        f"{name}: {faster:.1f} times faster at {inertia:.3f} of the inertia", faster >= FASTER and inertia <= WORSE
    )
    result.add(f"| {name} | | **{faster:.1f} times** | | **{inertia:.3f}** | {word} |")


def watch(peak: dict[str, int], stop: threading.Event) -> None:
    """Peaks of the memory that is the process's own (RssAnon), and of all that is resident (VmRSS), in bytes."""
    while not stop.wait(0.02):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("RssAnon", "VmRSS"):
                peak[name] = max(peak.get(name, 0), int(rest.split()[0]) * 1024)


def large(path: Path) -> None:
    """The child: cluster and sample a memory map, print seconds and peaks."""
    peak: dict[str, int] = {}
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(peak, stop))
    watcher.start()
    vectors = np.load(path, mmap_mode="r")
    ids = [f"row-{i:07d}" for i in range(len(vectors))]
    seconds, _, found = timed(lambda: kmeans(vectors, LARGE_CLUSTERS, seed=0, ids=ids))
    values = np.random.default_rng(0).normal(size=len(found.centroids))
    drawn, _, order = timed(lambda: qwcs(values, found.labels, ids, factor=3.0, seed=0))
    whole, _, other = timed(lambda: qocs(values, found.labels, found.distances, ids))
    stop.set()
    watcher.join()
    assert len(order) == len(other) == len(vectors)
    inertia = float((found.distances.astype(np.float64) ** 2).mean())
    print(seconds, drawn, whole, peak["RssAnon"], peak["VmRSS"], len(found.centroids), inertia)


def million(result: Result) -> None:
    """Write the vectors, and measure a process that clusters them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        stored_vectors(path, mixture(LARGE_ROWS), LARGE_ROWS)
        size = path.stat().st_size
        done = subprocess.run(
            [sys.executable, __file__, "--large", str(path)], capture_output=True, text=True, check=True
        )
    seconds, drawn, whole, own, resident, clusters, mean = map(float, done.stdout.split())
    word = result.bar(f"{own / 2**20:,.0f} MiB beyond the embedding file", own < MEMORY)
    result.add(
        f"| {LARGE_ROWS:,} x {LENGTH} | {clusters:.0f} | {seconds:.0f} | {drawn:.1f} | {whole:.1f} | "
        f"{size / 2**20:,.0f} | {own / 2**20:,.0f} | {resident / 2**20:,.0f} | {mean:.4f} | {word} |"
    )


def write(result: Result, data: Path, rounds: int) -> None:
    """Measure, and write CLUSTERING.md."""
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    result.add(
        f"# Clustering\n\nCommand: `OMP_NUM_THREADS=1 python benchmarks/selection/clustering.py`. "
        f"{platform.machine()}, {threads} thread(s), "
        f"a shared machine; Python {platform.python_version()}, numpy {np.__version__}.\n\n"
        f"## Against scikit-learn\n\n{ROWS:,} unit rows of length {LENGTH}, {CLUSTERS} clusters; "
        f"`KMeans(init='k-means++', algorithm='lloyd', n_init=1)`, its other settings as they come. Both in turn, "
        f"{rounds} seeds each. The goal is {FASTER} times faster (medians) at most {WORSE} of its inertia (means over "
        "the seeds).\n\n`mixture` is 400 Gaussian groups of unequal size with 8 directions of their own, and noise; "
        "`real` is TF-IDF vectors of instructions and answers of public sets.\n"
    )
    result.add(
        "| rows | | seconds (min / median / max) | processor seconds | inertia | reached |\n|---|---|---|---|---|---|"
    )
    compare(result, "mixture", np.concatenate(list(mixture(ROWS))), rounds)
    if data.is_dir():
        compare(result, "real", real(data), rounds)
    result.add(
        f"\n## A million rows\n\nA memory map of float32, then `qwcs` and `qocs` over all rows. Own memory is the peak "
        "of RssAnon, which leaves out the pages of the mapped file and of libraries, sampled every 20 ms; interpreter "
        f"and libraries' data are in it. The goal is below {MEMORY / 2**20:,.0f} MiB.\n"
    )
    result.add(
        "| rows | clusters | k-means, s | qwcs, s | qocs, s | file, MiB | own memory, MiB | resident, MiB | "
        "mean squared distance | reached |\n|" + "---|" * 10
    )
    million(result)
    result.add("\n## Not reached\n\n" + ("\n".join(f"- {claim}" for claim in result.missed) or "Nothing."))
    (HERE / "CLUSTERING.md").write_text("\n".join(result.lines) + "\n")


def main() -> None:
    """Run all, or the child."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.large:
        large(arguments.large)
    else:
        write(Result(), arguments.data, arguments.rounds)


if __name__ == "__main__":
    main()
