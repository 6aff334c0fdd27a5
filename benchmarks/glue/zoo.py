"""A real zoo with a planted structure, and the rows that search it and judge it. Made once, kept in a folder.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/glue/zoo.py [DATA] [--out DIR]

DATA holds models/ and instruct/ (default: ../shared/data beside the repository). Six experts are tuned from base6m,
each on one domain; "outsider" has base6m's shape and was trained from other random weights on a domain of its own;
stories260k has another shape, vocabulary and tokenizer. Rows are told apart by the hash of their id, read from its
last hex digit: [0, 0.625) tunes, [0.625, 0.8) searches, [0.8, 1) reports; base6m saw no row of the last two parts.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import honeloom
from honeloom.stages.rows import place_of
from honeloom.types.report import Report

HERE = Path(__file__).resolve().parent
TUNED, SEARCHED = 0.625, 0.8


@dataclass(frozen=True)
class Domain:
    """Whose rows, how an expert is tuned on them (no steps: no expert), and how many rows search and report."""

    sources: tuple[str, ...]
    steps: int = 0
    batch: int = 8
    searched: int = 32
    reported: int = 60


DOMAINS = {
    "math": Domain(("gsm8k",), 80),
    "code": Domain(("codealpaca", "gpteacher-codegen"), 100),
    "medical": Domain(("pubmedqa",), 60, 4, 16, 40),
    "tool-use": Domain(("gpteacher-toolformer",), 80),
    "fact-check": Domain(("cot-creak",), 80),
    "roleplay": Domain(("gpteacher-roleplay",), 60, 4, 24, 40),
    "yes-no": Domain(("boolq",), 200),
    "stories": Domain(("tinystories_valid",), searched=24, reported=40),
}
EXPERTS = ("math", "code", "medical", "tool-use", "fact-check", "roleplay")
"""Tuned from base6m; these and base6m itself are one family."""
OUTSIDER, FOREIGN = "outsider", "stories260k"
FAMILIES = (EXPERTS, (OUTSIDER,), (FOREIGN,))
"""What clustering must find."""
LR = 5e-4


@dataclass(frozen=True)
class Zoo:
    """The folders of the models by name, base6m's, and the files of rows."""

    models: Mapping[str, Path]
    base: Path
    search: Path
    report: Path
    tuned: Mapping[str, Path]


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a plain file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(data: Path, name: str) -> list[dict[str, Any]]:
    """Every row of a domain, in an order that nobody chose."""
    if name == "stories":
        stories = read(data / "text" / "tinystories_valid.jsonl.gz")
        found = [{"id": f"story-{i}", "text": story["text"]} for i, story in enumerate(stories)]
    else:
        found = [r for s in DOMAINS[name].sources for r in read(data / "instruct" / f"{s}.jsonl.gz")]
    found.sort(key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    return [{**row, "domain": name} for row in found]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Leave a file that is as it should be alone."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def write_rows(data: Path, out: Path) -> tuple[Path, Path, dict[str, Path]]:
    """The rows that search, those that report, and those that tune each expert."""
    searched, reported, tuned = [], [], {}
    for name, domain in DOMAINS.items():
        rows = rows_of(data, name)
        first, last = (0.0, 0.4) if name == "stories" else (TUNED, SEARCHED)
        searched += [r for r in rows if first <= place_of(r["id"]) < last][: domain.searched]
        reported += [r for r in rows if place_of(r["id"]) >= last][: domain.reported]
        if domain.steps:
            tuned[name] = write(out / f"{name}.jsonl", (r for r in rows if place_of(r["id"]) < TUNED))
    return write(out / "search.jsonl", searched), write(out / "report.jsonl", reported), tuned


def other_start(base: Path, out: Path) -> Path:
    """A model of base6m's shape with other random weights, and its tokenizer."""
    folder = out / "other-start"
    if not (folder / "tokenizer.json").exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
            if (base / name).exists():
                shutil.copy(base / name, folder / name)
    return folder


def tune(model: Path, name: str, rows: Path, folder: Path, lr: float) -> Report:
    """All weights, one learning rate for all experts."""
    domain = DOMAINS[name]
    report = honeloom.tune(
        model, rows, method="full", lr=lr, schedule="cosine", max_steps=domain.steps, batch_size=domain.batch,
        group_by_length=True, device="cpu", output_dir=folder, mode="resume",
    )  # fmt: skip
    print(f"{folder.name}: tuned on {name} in {report.cost.cpu_seconds:.0f} CPU s", flush=True)
    return report


def build(data: Path, out: Path) -> Zoo:
    """The zoo, or what of it is not there yet."""
    models = out / "zoo"
    models.mkdir(parents=True, exist_ok=True)
    search, report, tuned = write_rows(data, out)
    base = data / "models" / "base6m"
    for name in EXPERTS:
        tune(base, name, tuned[name], models / name, LR)
    tune(other_start(base, out), "yes-no", tuned["yes-no"], models / OUTSIDER, 3 * LR)
    foreign = data / "models" / FOREIGN
    names = (*EXPERTS, OUTSIDER)
    return Zoo({**{n: models / n for n in names}, FOREIGN: foreign}, base, search, report, tuned)


def arguments() -> argparse.Namespace:
    """DATA and --out, for every script of this folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, default=Path.home() / ".cache" / "honeloom-benchmarks" / "glue")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    for name, folder in build(given.data, given.out).models.items():
        print(f"{name}: {folder}")
