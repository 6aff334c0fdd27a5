"""From raw rows to a smaller model that is better at one domain, by one recipe; and the recipe without each stage.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/loop/loop.py [--data DIR] [--out DIR]

Makes the rows, runs loop.yaml on base6m, then variants of it that lack one stage each, and writes RESULT.md. --data
holds models/ and instruct/ (default: ../shared/data beside the repository). Every run is kept in --out (default
~/.cache/honeloom-benchmarks/loop), so that a stopped benchmark goes on.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = "code"
SEARCH, TEST, TARGET_TEST = 12, 40, 200
"""Rows of a domain to search with, to test with, and to test the target with."""


def unseen(row_id: str) -> bool:
    """Whether base6m was never trained on the row."""
    return hashlib.sha256(row_id.encode()).hexdigest()[-1] in "abcdef"


def read(file: Path) -> list[dict[str, str]]:
    """Rows."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(file: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """JSONL."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def make_rows(data: Path, out: Path) -> None:
    """Pool, target, search and test rows: no id and no question is in two of them."""
    mixed = read(data / "instruct" / "mixed_demo.jsonl.gz")
    pool = [r for r in mixed if not unseen(r["id"])]
    asked = {(r["instruction"], r["input"]) for r in pool}
    fresh = [r for r in mixed if unseen(r["id"]) and (r["instruction"], r["input"]) not in asked]
    taken = {r["id"] for r in mixed}
    by_domain: dict[str, list[dict[str, str]]] = {}
    for row in fresh:
        by_domain.setdefault(row["domain"], []).append(row)
    search = [r for rows in by_domain.values() for r in rows[:SEARCH]]
    test = [r for rows in by_domain.values() for r in rows[SEARCH + 24 * (rows[0]["domain"] == TARGET) :][:TEST]]
    target = by_domain[TARGET][SEARCH : SEARCH + 24]
    more = [r for name in ("codealpaca", "gpteacher-codegen") for r in read(data / "instruct" / f"{name}.jsonl.gz")]
    more = [r for r in more if unseen(r["id"]) and r["id"] not in taken]
    test += sorted(more, key=lambda r: hashlib.sha256(r["id"].encode()).hexdigest())[: TARGET_TEST - TEST]
    for name, rows in (("pool", pool), ("target", target), ("search", search), ("test", test)):
        write(out / f"{name}.jsonl", rows)
        print(name, len(rows))


# --- runs -----------------------------------------------------------------------------------------------------------


def settings(data: Path, out: Path) -> list[str]:
    """Where the recipe finds its model and rows."""
    rows = [f"{name}={out / name}.jsonl" for name in ("pool", "target", "search", "test")]
    return [f"model={data / 'models' / 'base6m'}", *rows]


def without(recipe: dict[str, Any], what: str) -> dict[str, Any]:
    """The recipe without one of its stages: what took its result takes what it was made of."""
    stages = {k: json.loads(json.dumps(v)) for k, v in recipe["stages"].items() if k not in ("before", "tuned")}
    stages["after"]["evaluate"].pop("against")
    if what in ("pick", "near"):  # as many rows, drawn at random
        keep = stages[what]["select"]["keep"]
        stages[what] = {"select": {"rows": "$pool", "method": {"type": "random"}, "keep": keep}}
    elif what in ("general", "expert"):  # one tuned model is nothing to merge
        other = "expert" if what == "general" else "general"
        merged = {"models": [f"${other}"], "base_model": "$model", "method": {"type": "task_arithmetic"}}
        stages["glued"] = {"merge": merged}
        del stages[what]
    elif what == "glued":
        stages["glued"] = {"merge": {"models": ["$general", "$expert"], "base_model": "$model"}}
    elif what == "heal":
        small = stages["small"]["drop"]
        stages["small"] = {"drop": {k: v for k, v in small.items() if not k.startswith("heal")}}
    elif what == "drop":
        del stages["small"]
        stages["after"]["evaluate"]["model"] = "$glued"
    return {**recipe, "stages": stages}


VARIANTS = {
    "pick": "rows for the general model at random, not by DaaR",
    "near": "rows for the expert at random, not those like the target's",
    "general": "the expert alone",
    "expert": "the general model alone",
    "glued": "the plain mean of both, weights not searched",
    "heal": "dropped, not healed",
    "drop": "not dropped",
}


def run_all(data: Path, out: Path) -> dict[str, Report]:
    """The recipe, and every variant beside a copy of it, so that equal stages are taken over."""
    recipe = dict(load_yaml(HERE / "loop.yaml"))
    reports = {"": honeloom.run(HERE / "loop.yaml", set=settings(data, out), output_dir=out / "full", mode="resume")}
    for what in VARIANTS:
        folder = out / f"without-{what}"
        if not (folder / "manifest.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(out / "full", folder)
        file = out / f"without-{what}.yaml"
        file.write_text(dump_yaml(without(recipe, what)), encoding="utf-8")
        reports[what] = honeloom.run(file, set=settings(data, out), output_dir=folder, mode="overwrite")
        print(f"without {what}: done", flush=True)
    return reports
