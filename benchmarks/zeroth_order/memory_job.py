"""Peak memory of one job in a process of its own: prints one JSON line.

Usage: python benchmarks/zeroth_order/memory_job.py MODEL JOB
(a JSON object of what, method, setting, batch, tokens, dtype)

`what` is "inference" (forward passes without labels: logits and nothing else), "mezo" (the product's own step) or
"adamw" (the product's own training loop). The peak is that of resident memory while two batches are worked on, less
what the process held before the model was loaded; a small job of the same kind runs first.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "memory"))
from measure import forget_peak, held, make_rows, write_model  # the memory benchmark's own
from measure import train as train_adamw

from honeloom.backends.hf import tune as tuning
from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.load import Loading, load_model
from honeloom.backends.hf.local_steps import collator
from honeloom.backends.hf.objectives import objective_of
from honeloom.backends.hf.zeroth_order import perturbed, sides_of
from honeloom.planning.memory import Work
from honeloom.tuning.config import MezoConfig
from honeloom.tuning.zeroth_order import ZerothOrder


def do(folder: Path, job: dict[str, Any]) -> None:
    """Load the model, forget the peak so far, and do the job."""
    full = job["method"] == "full"
    model = load_model(folder, loading=Loading("cpu", "fp32" if full else job["dtype"]))
    count = min(job["batch"], 4)
    rows = [_within(e, model.config.vocab_size) for e in make_rows(2 * count, job["tokens"])]
    forget_peak("cpu")
    if job["what"] == "inference":
        infer(model, rows, count)
    elif job["what"] == "mezo":
        mezo(model, rows, count, job)
    else:
        train_adamw(model, Work(job["method"], count, job["tokens"], job["dtype"]), rows)


def _within(row: Encoded, vocabulary: int) -> Encoded:
    ids = tuple(i % vocabulary for i in row.ids)
    return Encoded(ids=ids, scored=row.scored, chars=row.chars, truncated=False, ends=True)


def infer(model: Any, rows: list[Encoded], size: int) -> None:
    """Forward passes and their logits."""
    with torch.inference_mode():
        for start in range(0, len(rows), size):
            batch = collator(False, rows)(rows[start : start + size])
            del batch["labels"]
            logits = model(**batch, use_cache=False).logits
            del logits


def mezo(model: Any, rows: list[Encoded], size: int, job: dict[str, Any]) -> None:
    """Steps as the product takes them."""
    lora = job["method"] == "lora"
    if lora:
        model = tuning.add_lora(model, rank=8, alpha=None, dropout=0.0, targets="all-linear", rslora=False)
    else:
        model = tuning.unfreeze(model)
    stepper = ZerothOrder(perturbed(model.eval(), MezoConfig()), exact=lora, cache=job["setting"] == "speed")
    sides = sides_of(model, stepper.params) if lora and job["setting"] == "speed" else None
    autocast = torch.autocast("cpu", torch.bfloat16) if job["dtype"] == "bf16" else nullcontext()
    with autocast:
        for start in range(0, len(rows), size):
            batch = collator(False, rows)(rows[start : start + size])
            targets = size * (job["tokens"] - 1)
            stepper.step(objective_of(model, [batch], targets, "loss", sides=sides), [start], 1e-6)


def main() -> None:
    """Warm up on the small model, then measure."""
    folder, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as small:
        do(write_model(Path(small), "small"), {**job, "batch": 2, "tokens": 32})
    gc.collect()
    before = held("VmRSS")
    do(folder, job)
    print(json.dumps({"peak": held("VmHWM") - before}))


if __name__ == "__main__":
    main()
