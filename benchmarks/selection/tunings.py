"""What benchmarks that tune share: two models with a pool and a test each, choices, and losses per domain.

The pool of base6m is the part of mixed_demo that it never saw (`split` 0.625-1), without domain and source. Its test
holds 12 other unseen rows of each of the 21 domains: of the data sets' other rows where there are enough, else of
mixed_demo, whose pool then lacks them. The pool of the lab is `lab:pool`, wrong answers included; its test is
`lab:test`, sixteen labels of 60 rows. Choices resume, and losses are kept in a file: an interrupted run goes on.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from scipy.stats import t as student_t

import honeloom
from honeloom import lab
from honeloom.backends.hf.load import Loading
from honeloom.backends.hf.local_steps import build_optimizer, build_schedule, local_steps
from honeloom.backends.hf.utility import TunableModel, trainable
from honeloom.data.rowset import RowSet
from honeloom.data.sources import resolve_sources
from honeloom.ops.noise import keyed_uniform
from honeloom.selection.config import ShedConfig
from honeloom.selection.sampling import qwcs, standardise
from honeloom.tuning.config import AdamWConfig
from honeloom.types.rows import Row

WORKERS = 2
KEEP = "20%"
UNSEEN = (0.625, 1.0)
TEST_ROWS = 12
RANK = 8
DRAW = ShedConfig()
SPECIAL = ("mixed_demo", "alpaca_quality_flags", "preference_dpo_en", "leaky_adapters_math")
Losses = dict[str, float]
"""Held-out loss in nats per token, by domain."""


@dataclass(frozen=True)
class Setting:
    """A model, the rows to choose from, those to be judged by, and how it is tuned: one pass over what was chosen."""

    name: str
    model: str
    folder: Path
    pool: str
    test: str
    split: tuple[float, float] | None
    lr: float
    batch: int
    scored: int
    max_length: int

    def options(self) -> dict[str, Any]:
        """What every selection takes."""
        return {"model": self.model, "split": self.split, "batch_size": self.scored}


@dataclass(frozen=True)
class Trial:
    """One tuning: on these rows of a pool, in the order of a seed, which draws the adapters too."""

    arm: str
    seed: int
    ids: tuple[str, ...]


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Leave a file that is as it should be alone: another process may be reading it."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def unseen(row_id: str) -> bool:
    """Whether base6m never saw the row: the same rows as `split` 0.625-1."""
    return hashlib.sha256(row_id.encode()).hexdigest()[-1] in "abcdef"


def real_rows(data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pool and test of base6m, with their labels; all unseen."""
    mixed = [row for row in read(data / "instruct" / "mixed_demo.jsonl.gz") if unseen(row["id"])]
    inside = {row["id"] for row in mixed}
    files = sorted(p for p in (data / "instruct").glob("*.jsonl.gz") if p.name.split(".")[0] not in SPECIAL)
    other = [row for path in files for row in read(path) if unseen(row["id"]) and row["id"] not in inside]
    test: list[dict[str, Any]] = []
    for domain in sorted({row["domain"] for row in mixed}):
        mine = [row for row in other if row["domain"] == domain]
        if len(mine) < TEST_ROWS:
            mine = [row for row in mixed if row["domain"] == domain]
        test += sorted(mine, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())[:TEST_ROWS]
    taken = {row["id"] for row in test}
    return [row for row in mixed if row["id"] not in taken], test


def settings(data: Path, out: Path) -> dict[str, Setting]:
    """Write pool and test of base6m; return both models."""
    out.mkdir(parents=True, exist_ok=True)
    pool, test = real_rows(data)
    bare = ({k: v for k, v in row.items() if k not in ("domain", "source")} for row in pool)
    own = data / "models" / "base6m"
    return {
        "base6m": Setting(
            "base6m", str(own), own, str(write(out / "daar-pool.jsonl", bare)),
            str(write(out / "daar-test.jsonl", test)), UNSEEN, 5e-3, 8, 16, 128,
        ),
        "lab": Setting("lab", "lab:base", lab.base_path(), "lab:pool", "lab:test", None, 5e-3, 16, 64, 128),
    }  # fmt: skip


def choose(setting: Setting, out: Path, method: dict[str, Any], seed: int = 0, **options: Any) -> Path:
    """Choose a fifth of the pool; return the result's folder, which names the method and its settings."""
    digest = hashlib.sha256(json.dumps([method, options], sort_keys=True).encode()).hexdigest()[:8]
    folder = out / f"{method['type']}-{setting.name}-{seed}-{digest}"
    begun = time.monotonic()
    honeloom.select(
        setting.pool, method=method, keep=KEEP, seed=seed, output_dir=folder, mode="resume",
        **setting.options() | options,
    )  # fmt: skip
    print(folder.name, f"{time.monotonic() - begun:.0f} s", flush=True)
    return folder


def kept(out: Path, name: str, make: Callable[[], Any]) -> Any:
    """What a part of a benchmark found, made once."""
    # Of the package's own code: what an older one found is not shown as this one's.
    sources = sorted(Path(honeloom.__file__).parent.rglob("*.py"))
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    path = out / f"part-{name}-{code}.json"
    if not path.exists():
        path.write_text(json.dumps({"found": make()}))
    return json.loads(path.read_text())["found"]


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def usable(folder: Path) -> list[str]:
    """Ids of the rows that could be chosen."""
    found: list[str] = pq.read_table(folder / "scores.parquet", columns=["id"])["id"].to_pylist()
    return found


def selected(folder: Path) -> tuple[str, ...]:
    table = pq.read_table(folder / "scores.parquet", columns=["id", "selected"])
    return tuple(table.filter(table["selected"])["id"].to_pylist())


def drawn(folder: Path, seed: int) -> tuple[str, ...]:
    """Another draw from SHED's clusters: the values stay, the seed changes."""
    table = pq.read_table(folder / "scores.parquet", columns=["id", "cluster"])
    table = table.filter(table["cluster"].is_valid())
    values = np.array(pq.read_table(folder / "clusters.parquet")["value"].to_pylist())
    ids, label = table["id"].to_pylist(), np.array(table["cluster"].to_pylist())
    order = qwcs(standardise(values, DRAW.standardise), label, ids, factor=DRAW.factor, seed=seed)
    return tuple(ids[i] for i in order[: len(selected(folder))])


def random_rows(ids: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """As many rows, drawn evenly."""
    return tuple(ids[i] for i in np.argsort(keyed_uniform(seed, "benchmark/random", ids))[:count])


@cache
def rows_of(path: str) -> dict[str, Row]:
    return {row.id: row for row in RowSet.scan(resolve_sources([path]))}


def run_trial(setting: Setting, trial: Trial) -> Losses:
    """Tune fresh adapters for one pass, in an order drawn by id; held-out loss of every domain."""
    torch.set_num_threads(1)
    model = TunableModel(
        setting.folder, None, setting.name, Loading("cpu"), RANK, trial.seed, setting.scored, setting.max_length
    )
    scorer = model.open()
    pool = rows_of(setting.pool)
    draws = keyed_uniform(trial.seed, "benchmark/order", trial.ids)
    rows = [e for i in np.argsort(draws) if (e := trainable(scorer.encoder, pool[trial.ids[i]]))]
    batches = [[rows[s : s + setting.batch]] for s in range(0, len(rows), setting.batch)]
    optimizer = build_optimizer(scorer.model, AdamWConfig(), setting.lr)
    local_steps(scorer.model, batches, optimizer, build_schedule(optimizer, "linear", len(batches), 0.0))
    scored = sorted(scorer.losses(rows_of(setting.test).values()), key=lambda pair: pair[0].domain or "")
    found = {}
    for domain, pairs in groupby(scored, key=lambda pair: pair[0].domain or ""):
        losses = [loss for _, loss in pairs]
        found[domain] = sum(x.loss_sum for x in losses) / sum(x.tokens for x in losses)
    return found


def _timed(setting: Setting, trial: Trial) -> tuple[Losses, float]:
    begun = time.process_time()
    return run_trial(setting, trial), time.process_time() - begun


def _key(setting: Setting, trial: Trial) -> str:
    """Of everything that the losses depend on, the paths apart."""
    how = (setting.name, setting.lr, setting.batch, setting.scored, setting.max_length, RANK, trial.seed)
    test = sorted(rows_of(setting.test))
    return hashlib.sha256(json.dumps([how, sorted(trial.ids), test]).encode()).hexdigest()


def measure(setting: Setting, trials: Sequence[Trial], out: Path) -> tuple[dict[str, list[Losses]], float]:
    """Losses by arm, in the order of the seeds, and the CPU seconds that they took."""
    path = out / f"tunings-{setting.name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {line["key"]: line for line in lines}
    with ProcessPoolExecutor(WORKERS) as pool, path.open("a") as file:
        wanted = {_key(setting, trial): trial for trial in trials}
        futures = {key: pool.submit(_timed, setting, trial) for key, trial in wanted.items() if key not in known}
        for key, future in futures.items():
            losses, seconds = future.result()
            trial = wanted[key]
            known[key] = {"key": key, "arm": trial.arm, "seed": trial.seed, "seconds": seconds, "losses": losses}
            file.write(json.dumps(known[key]) + "\n")
            file.flush()
            print(setting.name, trial.arm, trial.seed, f"{macro(losses):.4f}", f"{seconds:.0f} s", flush=True)
    found: dict[str, list[Losses]] = {}
    for trial in trials:
        found.setdefault(trial.arm, []).append(known[_key(setting, trial)]["losses"])
    return found, sum(known[key]["seconds"] for key in wanted)


def macro(losses: Losses) -> float:
    """Mean over domains."""
    return float(np.mean(list(losses.values())))


def macros(runs: Sequence[Losses]) -> np.ndarray[Any, Any]:
    return np.array([macro(losses) for losses in runs])


def interval(gaps: Sequence[float] | np.ndarray[Any, Any]) -> tuple[float, float]:
    """Mean of paired differences and the half-width of its 95% interval."""
    found = np.asarray(gaps, dtype=float)
    spread = float(found.std(ddof=1)) if len(found) > 1 else 0.0
    return float(found.mean()), float(student_t.ppf(0.975, len(found) - 1)) * spread / len(found) ** 0.5


def worst(ours: Sequence[Losses], other: Sequence[Losses]) -> tuple[str, float, float]:
    """The domain with the largest mean difference, that difference, and the half-width of its 95% interval."""
    gaps = {d: interval([a[d] - b[d] for a, b in zip(ours, other, strict=False)]) for d in ours[0]}
    name = max(gaps, key=lambda d: gaps[d][0])
    return name, *gaps[name]
