"""Scores of attention, MLP and block: one pass that keeps sums, against the published order. Writes SCORING.md.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/dropping/scoring.py [--data DIR]

The published order (LLM-Drop) takes one pass per kind of unit, layer by layer over all rows, keeps the streams before
and after a unit of every row, joins them and takes 1 - cosine in float32. Its released code does not start on
transformers 5, so the order is written out here for a Llama, with the arguments that layers ask for today and without
gradients for blocks too. Every run is a process of its own. --data holds models/base6m and text/ (default:
../shared/data beside the repository).
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.importance import score_units
from honeloom.backends.hf.sublayers import locate
from honeloom.dropping.metric_config import CosineConfig
from honeloom.dropping.scores import KINDS

HERE = Path(__file__).resolve().parent
ROWS, TOKENS, REPEATS = 64, 256, 3
MODELS = ("base6m", "random 8x256")
ARMS = {"published order": 1, "one pass": 1, "one pass, 8 rows at a time": 8}
"""Arm -> rows of a forward pass."""
TIME_GOAL, MEMORY_GOAL, SCORE_GOAL = 0.5, 0.2, 1e-6


def load(name: str, data: Path) -> Any:
    """A model in float32; the random one has Llama's own initialisation."""
    if name == "base6m":
        return AutoModelForCausalLM.from_pretrained(data / "models" / "base6m", dtype=torch.float32).eval()
    torch.manual_seed(0)
    if name == "base6m, random weights":
        return LlamaForCausalLM(LlamaConfig.from_pretrained(data / "models" / "base6m")).float().eval()
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def text_rows(data: Path) -> list[list[int]]:
    """Rows of WikiText-2's validation text, packed to one length as in the published order."""
    tokenizer = AutoTokenizer.from_pretrained(data / "models" / "base6m")
    with gzip.open(data / "text" / "wikitext2_valid.txt.gz", "rt", encoding="utf-8") as file:
        ids = tokenizer(file.read(ROWS * TOKENS * 8), add_special_tokens=False).input_ids
    return [ids[i * TOKENS : (i + 1) * TOKENS] for i in range(ROWS)]


def one_pass(model: Any, rows: list[list[int]], size: int) -> dict[str, list[float]]:
    """Ours; the probe of the layers counts."""
    encoded = [Encoded(tuple(r), (False,) * len(r), len(r), truncated=False, ends=False) for r in rows]
    batches = (encoded[i : i + size] for i in range(0, len(encoded), size))
    scores = score_units(model, locate(model), batches, [CosineConfig()])["cosine"]
    return {kind: [s.value for s in scores.of(kind) if s] for kind in KINDS}


@torch.no_grad()
def published_order(model: Any, rows: list[list[int]], size: int) -> dict[str, list[float]]:
    """One pass for each kind."""
    return {kind: [1 - c for c in similarities(model, rows, kind)] for kind in KINDS}


def similarities(model: Any, rows: list[list[int]], kind: str) -> list[float]:
    """Mean cosine of every layer's unit, layer by layer over all rows."""
    layers = model.model.layers
    inputs, arguments = first_inputs(model, rows)
    found = []
    for layer in layers:
        before: list[torch.Tensor] = []
        after: list[torch.Tensor] = []
        handles = watch(layer, kind, before, after)
        outputs = [layer(x, **kwargs) for x, kwargs in zip(inputs, arguments, strict=True)]
        for handle in handles:
            handle.remove()
        if kind == "block":
            before, after = [x.clone() for x in inputs], [y.clone() for y in outputs]
        start, end = torch.cat(before).float(), torch.cat(after).float()
        if kind != "block":
            end = start + end  # the module's output and the residual
        found.append(float(torch.nn.functional.cosine_similarity(start, end, dim=-1).mean()))
        inputs = outputs
    return found


def watch(layer: Any, kind: str, before: list[torch.Tensor], after: list[torch.Tensor]) -> list[Any]:
    """Keep copies of the input of a half's norm and of the output of the half."""
    if kind == "block":
        return []
    norm, half = (
        (layer.input_layernorm, layer.self_attn) if kind == "attention" else (layer.post_attention_layernorm, layer.mlp)
    )

    def keep(module: Any, args: Any, output: Any) -> None:
        after.append((output[0] if isinstance(output, tuple) else output).clone())

    return [
        norm.register_forward_pre_hook(lambda module, args: before.append(args[0].clone())),
        half.register_forward_hook(keep),
    ]


class Caught(Exception):
    """The first layer's input is known."""


def first_inputs(model: Any, rows: list[list[int]]) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """What the first layer is given for every row."""
    inputs: list[torch.Tensor] = []
    arguments: list[dict[str, Any]] = []

    def catch(module: Any, args: Any, kwargs: Any) -> None:
        inputs.append(args[0])
        arguments.append(kwargs)
        raise Caught

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in rows:
        with suppress(Caught):
            model(input_ids=torch.tensor([row]), use_cache=False)
    handle.remove()
    return inputs, arguments


def child(arm: str, name: str, data: Path) -> None:
    """One run; prints its numbers."""
    model, rows = load(name, data), text_rows(data)
    with torch.no_grad():
        model(input_ids=torch.tensor([rows[0][:16]]))
    gc.collect()
    start_memory = peak_memory(reset=True)
    wall, cpu = time.perf_counter(), time.process_time()
    scores = (published_order if arm == "published order" else one_pass)(model, rows, ARMS[arm])
    found = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    print(json.dumps({**found, "memory": peak_memory() - start_memory, "scores": scores}))


def peak_memory(*, reset: bool = False) -> int:
    """Peak of resident bytes since the last reset; with a reset, what is resident now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def measure(arm: str, name: str, data: Path) -> dict[str, Any]:
    """One run in a process of its own, with one thread."""
    command = [sys.executable, __file__, "--data", str(data), "--child", arm, name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{arm} on {name} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure and write the page; 1 if a goal is not reached."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--child", nargs=2, metavar=("ARM", "MODEL"))
    options = parser.parse_args()
    if options.child:
        child(*options.child, options.data)
        return 0
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(REPEATS):
        for name in MODELS:
            for arm in ARMS:
                runs.setdefault((name, arm), []).append(measure(arm, name, options.data))
    goals = goal_rows(runs)
    page = PAGE.format(
        machine=f"{platform.machine()}, {os.cpu_count()} cores, one thread, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; load at the end {os.getloadavg()[0]:.1f}",
        rows=ROWS, tokens=TOKENS, repeats=REPEATS, table="\n".join(table(runs)),
        goals="\n".join(f"| {what} | {value} | {'yes' if good else 'no'} |" for what, value, good in goals),
        redundancy="\n".join(redundancy(options.data)),
    )  # fmt: skip
    (HERE / "SCORING.md").write_text(page, encoding="utf-8")
    print(page)
    return int(not all(good for _, _, good in goals))


def table(runs: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    """One line per model and arm, medians."""
    return [
        f"| {name} | {arm} | {median(r['cpu'] for r in found):.2f} | {median(r['wall'] for r in found):.2f} "
        f"| {median(r['memory'] for r in found) / 2**20:.1f} |"
        for (name, arm), found in runs.items()
    ]


def goal_rows(runs: dict[tuple[str, str], list[dict[str, Any]]]) -> list[tuple[str, str, bool]]:
    """What was to be reached, for both models."""
    lines = []
    for name in MODELS:
        theirs, ours = runs[name, "published order"], runs[name, "one pass"]
        pairs = list(zip(ours, theirs, strict=True))
        cpu = median(a["cpu"] / b["cpu"] for a, b in pairs)
        memory = median(a["memory"] / b["memory"] for a, b in pairs)
        gap = max(
            abs(x - y)
            for a, b in pairs
            for kind in KINDS
            for x, y in zip(a["scores"][kind], b["scores"][kind], strict=True)
        )
        lines += [
            (f"{name}: CPU time, of the published order's: at most {TIME_GOAL}", f"{cpu:.2f}", cpu <= TIME_GOAL),
            (f"{name}: activation memory: at most {MEMORY_GOAL}", f"{memory:.3f}", memory <= MEMORY_GOAL),
            (f"{name}: largest difference of scores: at most {SCORE_GOAL}", f"{gap:.1e}", gap <= SCORE_GOAL),
        ]
    return lines


def redundancy(data: Path) -> list[str]:
    """Importances of trained and of random weights, on the same text."""
    rows, lines, read = text_rows(data), [], []
    for name in ("base6m", "base6m, random weights"):
        scores = one_pass(load(name, data), rows, 8)
        for kind in KINDS:
            low, high = min(scores[kind]), max(scores[kind])
            each = " ".join(f"{v:.3f}" for v in scores[kind])
            lines.append(
                f"| {name} | {kind} | {sum(scores[kind]) / len(scores[kind]):.4f} | {low:.4f} | {high:.4f} | {each} |"
            )
        means = {kind: sum(scores[kind]) / len(scores[kind]) for kind in KINDS}
        read.append(f"{name}: an attention has {means['attention'] / means['mlp']:.2f} times the importance of an MLP.")
    return [*lines, "", *read]


PAGE = """# Time and memory of scoring

Command: `OMP_WAIT_POLICY=PASSIVE python benchmarks/dropping/scoring.py`. {machine}.

Cosine importances of attention, MLP and block of every layer, {rows} rows of {tokens} tokens of WikiText-2's validation
text. The published order is LLM-Drop's: one pass per kind, layer by layer over all rows, streams before and after
every unit stored and joined; written out anew, since its code does not start on transformers 5. It takes one row at a
time, as published. Each run is a process of its own; medians of {repeats}, arms one after the other in every repeat.
Memory is how far the peak of resident bytes rises above the loaded model. The probe of the layers is part of "one
pass".

| model | order | CPU, s | wall, s | memory, MiB |
| --- | --- | --- | --- | --- |
{table}

## Goals

"One pass", one row at a time like the published order; ratios within a repeat, their median.

| goal | measured | reached |
| --- | --- | --- |
{goals}

## Trained against random weights

Importance (1 - cosine) on the same text; base6m, and its architecture with the weights that training would begin
with. Low is redundant.

| weights | kind | mean | lowest | highest | by layer |
| --- | --- | --- | --- | --- | --- |
{redundancy}
"""

if __name__ == "__main__":
    sys.exit(main())
