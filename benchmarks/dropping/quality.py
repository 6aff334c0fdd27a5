"""What dropping costs in loss: metrics, kinds, and healing, on real models. Writes QUALITY.md.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/dropping/quality.py [--data DIR] [--out DIR]

Scores are of calibration rows that the model was trained on, losses of held rows that it was not. Every part is kept
in --out (default ~/.cache/honeloom-benchmarks/dropping), so that a stopped benchmark goes on. --data holds models/,
instruct/ and text/ (default: ../shared/data beside the repository).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from quality_page import SEEDS, write_page
from transformers import AutoModelForCausalLM, AutoTokenizer

import honeloom
from honeloom.backends.hf.chat import Encoded, Encoder
from honeloom.backends.hf.importance import score_units
from honeloom.backends.hf.router_inputs import row_losses
from honeloom.backends.hf.sublayers import Sublayers, locate, silenced
from honeloom.dropping.knapsack import choose_drops, choose_within
from honeloom.dropping.metric_config import (
    AngularConfig,
    CosineConfig,
    FirstConfig,
    KlConfig,
    LastConfig,
    MagnitudeConfig,
    PerplexityConfig,
    RandomConfig,
    TaylorConfig,
)
from honeloom.dropping.plan import Drops, Room, drop_plan
from honeloom.dropping.scores import Unit, UnitScores
from honeloom.stages.drop_costs import unit_costs
from honeloom.types.rows import Row, Where

HERE = Path(__file__).resolve().parent
SOURCES = (
    "alpaca", "cot-ecqa", "cot-sensemaking", "cot-creak", "cot-strategyqa", "cot-qasc", "cot-aqua", "arc-easy",
    "arc-challenge", "openbookqa", "boolq", "gpteacher-roleplay", "gpteacher-toolformer", "math-4500", "dolly",
)  # fmt: skip
"""Files of rows on a part of which base6m was trained."""
CALIBRATION, HELD = 128, 160
HEAL_TOKENS = (100_000, 400_000)
HEALING = {"heal_rank": 64, "heal_lr": 6e-4, "heal_batch_size": 4}
METRICS = (
    CosineConfig(), MagnitudeConfig(), AngularConfig(), PerplexityConfig(), KlConfig(), TaylorConfig(), LastConfig(),
    FirstConfig(),
)  # fmt: skip
CONTEXT, STEPS = 512, 24


# --- data ---------------------------------------------------------------------------------------------------------


def unseen(row_id: str) -> bool:
    """Whether base6m was never trained on the row."""
    return hashlib.sha256(row_id.encode()).hexdigest()[-1] in "abcdef"


def spread(row_id: str) -> str:
    """By what rows are ordered, so that every file has its share."""
    return hashlib.sha256(f"order/{row_id}".encode()).hexdigest()


def instruction_rows(data: Path) -> list[dict[str, str]]:
    """All rows of the corpus as plain text, in an order of their own."""
    rows = []
    for source in SOURCES:
        with gzip.open(data / "instruct" / f"{source}.jsonl.gz", "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                text = "\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part)
                rows.append({"id": row["id"], "text": text, "domain": row["domain"]})
    return sorted(rows, key=lambda r: spread(r["id"]))


def stories(data: Path, name: str) -> list[dict[str, str]]:
    """Stories as plain text."""
    with gzip.open(data / "text" / f"tinystories_{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{"id": str(r.get("id", i)), "text": r["text"], "domain": "stories"} for i, r in enumerate(rows)]


def write_rows(file: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """JSONL."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return file


# --- one model ----------------------------------------------------------------------------------------------------


class Bench:
    """A model with encoded calibration and held rows; losses are kept by what is dropped."""

    def __init__(self, folder: Path, calibration: Sequence[Mapping[str, str]], held: Sequence[Mapping[str, str]]):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.where: Sublayers = locate(self.model)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoder = Encoder(tokenizer, self.model.config.max_position_embeddings)
        self.calibration = self._encode(encoder, calibration)
        self.held = self._encode(encoder, held)
        self.tokens = np.array([row.targets for row in self.held], dtype=np.float64)
        self.room = Room(self.model.config.num_hidden_layers)
        self._losses: dict[tuple[tuple[int, ...], tuple[int, ...]], npt.NDArray[np.float64]] = {}

    @staticmethod
    def _encode(encoder: Encoder, rows: Sequence[Mapping[str, str]]) -> list[Encoded]:
        made = [encoder.encode(Row(r["id"], "text", Where("rows", 1), "rows", text=r["text"])) for r in rows]
        return sorted(made, key=lambda e: -len(e.ids))

    def scores(self, metrics: Sequence[Any] = METRICS) -> dict[str, UnitScores]:
        """Importances by metric."""
        batches = (self.calibration[i : i + 8] for i in range(0, len(self.calibration), 8))
        return score_units(self.model, self.where, batches, list(metrics))

    def row_losses(self, drops: Drops) -> npt.NDArray[np.float64]:
        """Summed loss of every held row."""
        plan = drop_plan(drops, metric="", profile="")
        key = (plan.dropped_attention(), plan.dropped_mlp())
        if key not in self._losses:
            with silenced(self.model, attention=key[0], mlp=key[1], where=self.where):
                self._losses[key] = row_losses(self.model, self.held).numpy()
        return self._losses[key]

    def loss(self, drops: Drops) -> float:
        """Nats per token of the held rows."""
        return float(self.row_losses(drops).sum() / self.tokens.sum())

    def stderr(self, drops: Drops) -> float:
        """Standard error of the rise above the whole model, over rows."""
        change = self.row_losses(drops) - self.row_losses(())
        rise, rows = change.sum() / self.tokens.sum(), len(change)
        return float(np.sqrt(((change - rise * self.tokens) ** 2).sum() * rows / (rows - 1)) / self.tokens.sum())


# --- attentions by every metric -------------------------------------------------------------------------------------


def attention_curves(bench: Bench, most: int) -> dict[str, Any]:
    """Loss without the n least important attentions, by metric; the random one by several seeds."""
    scores = bench.scores()
    found: dict[str, Any] = {"rows": len(bench.held), "tokens": int(bench.tokens.sum()), "curves": {}, "layers": {}}
    for name, some in scores.items():
        order = choose_drops(some, {"attention": most}, bench.room)
        found["layers"][name] = [unit.layer for unit in order]
        found["curves"][name] = [bench.loss(order[:n]) for n in range(most + 1)]
        if name == "cosine":
            found["stderr"] = [bench.stderr(order[:n]) for n in range(most + 1)]
    for seed in range(SEEDS):
        some = bench.scores([RandomConfig(seed=seed)])["random"]
        order = choose_drops(some, {"attention": most}, bench.room)
        found["curves"][f"random {seed}"] = [bench.loss(order[:n]) for n in range(most + 1)]
        found["layers"][f"random {seed}"] = [unit.layer for unit in order]
    return found


# --- kinds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A plan, what it costs in loss and what the model then has; `units` counts halves."""

    kind: str
    units: int
    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    loss: float
    params: int
    kv: int


def goals_of(units: Mapping[Unit, Any], layers: int) -> list[int]:
    """Parameters that the plans of single kinds of 6 to 12 halves drop."""
    counts = [("attention", n) for n in range(6, layers)] + [("mlp", n) for n in range(6, 13)]
    counts += [("block", n) for n in range(3, 7)]
    return sorted({n * units[Unit(kind, 0)].params for kind, n in counts})  # type: ignore[arg-type]


def kind_plans(scores: Mapping[str, UnitScores], room: Room, units: Mapping[Unit, Any]) -> Iterator[tuple[str, Drops]]:
    """Every plan of 2 to 12 halves: by the importances of one metric, and jointly by several rules."""
    native = Room(room.layers, native=True)
    for metric, some in scores.items():
        last = f", {metric}"
        for n in range(2, 13):
            if n < room.layers:
                yield "attention" + last, choose_drops(some, {"attention": n}, room)
            yield "MLP" + last, choose_drops(some, {"mlp": n}, room)
            yield "joint" + last, choose_drops(some, {"joint": n}, room)
            if n % 2 == 0:
                yield "block" + last, choose_drops(some, {"block": n // 2}, room)
                yield "joint, native" + last, choose_drops(some, {"joint": n}, native)
        gains = {u: (c.params,) for u, c in units.items() if u.kind != "block"}
        for goal in goals_of(units, room.layers):
            yield "joint, budget" + last, choose_within(some, ("attention", "mlp"), room, gains, (goal,))


def kinds(bench: Bench, folder: Path) -> list[dict[str, Any]]:
    """Points of every kind."""
    units, before = unit_costs(folder)
    scores = bench.scores([CosineConfig(), KlConfig()])
    points, known = [], set()
    for kind, drops in kind_plans(scores, bench.room, units):
        plan = drop_plan(drops, metric="", profile="")
        attention, mlp = plan.dropped_attention(), plan.dropped_mlp()
        if (kind, attention, mlp) in known:
            continue
        known.add((kind, attention, mlp))
        gone = [units[Unit("attention", i)] for i in attention] + [units[Unit("mlp", i)] for i in mlp]
        points.append(asdict(
            Point(
                kind, len(attention) + len(mlp), attention, mlp, bench.loss(drops),
                before.params - sum(c.params for c in gone),
                before.kv_bytes_per_token - sum(c.kv_bytes_per_token for c in gone),
            )
        ))  # fmt: skip
    return points


def speeds(bench: Bench, points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Tokens per second of decoding one row behind a real cache; points take turns, medians of steps."""
    chosen = [
        p for p in points if p["units"] in (4, 8, 12) and p["kind"].endswith("cosine") and "budget" not in p["kind"]
    ]
    arms = {"none": ((), ()), **{f"{p['kind']}, {p['units']}": (p["attention"], p["mlp"]) for p in chosen}}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    ids = torch.arange(CONTEXT).unsqueeze(0) % 4096
    for _ in range(3):
        for name, (attention, mlp) in arms.items():
            with silenced(bench.model, attention=attention, mlp=mlp, where=bench.where), torch.inference_mode():
                cache = bench.model(input_ids=ids, use_cache=True).past_key_values
                for step in range(STEPS + 2):
                    start = time.perf_counter()
                    cache = bench.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
                    if step >= 2:
                        seconds[name].append(time.perf_counter() - start)
    return {name: 1 / statistics.median(found) for name, found in seconds.items()}


# --- healing --------------------------------------------------------------------------------------------------------


def heal_rows(data: Path, most: int) -> list[dict[str, str]]:
    """Rows that base6m was trained on, other than the calibration rows, as many as have so many tokens."""
    tokenizer = AutoTokenizer.from_pretrained(data / "models" / "base6m")
    rows, tokens = [], 0
    for row in [r for r in instruction_rows(data) if not unseen(r["id"])][CALIBRATION:]:
        if tokens >= most:
            break
        rows.append(row)
        tokens += min(1024, 1 + len(tokenizer(row["text"], add_special_tokens=False).input_ids))
    return rows


def healed(data: Path, out: Path, most: int) -> dict[str, Any]:
    """Drop six attentions of base6m, heal with one pass over rows of so many tokens, and evaluate on the held rows."""
    rows = heal_rows(data, most)
    file = write_rows(out / f"heal-{most}.jsonl", rows)
    report = honeloom.drop(
        data / "models" / "base6m", out / "healed" / str(most), attention=6,
        calibration=str(out / "calibration.jsonl"), samples=CALIBRATION, profile="dropped", heal=str(file),
        heal_steps=-(-len(rows) // HEALING["heal_batch_size"]), device="cpu", mode="resume", **HEALING,
    )  # fmt: skip
    scored = honeloom.evaluate(report.path, rows=str(out / "held.jsonl"), device="cpu")
    healing = report.details["healing"]
    return {
        "loss": scored.metric("loss").value, "tokens": healing["tokens"], "steps": healing["steps"],
        "cpu_seconds": report.cost.cpu_seconds, "layers": report.details["plan"]["attention"],
    }  # fmt: skip


# --- all of it ------------------------------------------------------------------------------------------------------


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What a part gave, made if it is not there yet."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(make()), encoding="utf-8")
        print(f"{file.name}: done", flush=True)
    return json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    """Every part, then the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, default=Path.home() / ".cache" / "honeloom-benchmarks" / "dropping")
    given = parser.parse_args()
    data, out = given.data.resolve(), given.out
    torch.set_num_threads(1)
    rows = instruction_rows(data)
    calibration = [r for r in rows if not unseen(r["id"])][:CALIBRATION]
    held = [r for r in rows if unseen(r["id"])][:HELD]
    write_rows(out / "calibration.jsonl", calibration)
    write_rows(out / "held.jsonl", held)
    base = data / "models" / "base6m"
    bench = Bench(base, calibration, held)
    parts: dict[str, Any] = {"base6m": kept(out / "base6m.json", lambda: attention_curves(bench, 6))}
    small = Bench(data / "models" / "stories260k", stories(data, "train")[:CALIBRATION], stories(data, "valid"))
    parts["stories260k"] = kept(out / "stories260k.json", lambda: attention_curves(small, 3))
    parts["kinds"] = kept(out / "kinds.json", lambda: kinds(bench, base))
    parts["speeds"] = kept(out / "speeds.json", lambda: speeds(bench, parts["kinds"]))
    parts["healing"] = {
        f"LoRA, {most:,} tokens": kept(out / f"heal-{most}.json", partial(healed, data, out, most))
        for most in HEAL_TOKENS
    }
    write_page(HERE / "QUALITY.md", parts, calibration=CALIBRATION, context=CONTEXT, rank=int(HEALING["heal_rank"]))


if __name__ == "__main__":
    main()
