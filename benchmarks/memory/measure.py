"""Peak memory of one job on a random Llama, in a process of its own: prints one JSON line.

Usage: python benchmarks/memory/measure.py MODEL JOB (a JSON object of honeloom.planning.memory.Work)

The peak is that of resident memory while the job works, less what the process held before the model was loaded.
A small job of the same kind runs first, so that lazily loaded libraries do not count. On a GPU it is the peak of
allocated memory.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from honeloom.backends.hf import tune as tuning
from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.load import Loading, load_model
from honeloom.backends.hf.objectives import objective_of
from honeloom.backends.hf.score import Scorer, pad_batch
from honeloom.planning.memory import Work
from honeloom.runs.log import Log, QuietConsole
from honeloom.tuning.config import TuneConfig
from honeloom.tuning.zeroth_order import ZerothOrder

VOCABULARY = 32000
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
HUNDRED = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
BILLION = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
SIZES = {"small": SMALL, "100M": HUNDRED, "1B": BILLION}


def write_model(folder: Path, size: str) -> Path:
    """Write a random Llama of a size, in bf16; returns its folder."""
    heads = {"num_key_value_heads": SIZES[size]["num_attention_heads"] // 4 or 1}
    config = LlamaConfig(
        **SIZES[size], **heads, vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_rows(count: int, tokens: int) -> list[Encoded]:
    """Rows of random tokens, all of them scored."""
    ids = torch.randint(0, VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    scored = (False, *[True] * (tokens - 1))
    return [Encoded(ids=tuple(row), scored=scored, chars=tokens, truncated=False, ends=True) for row in ids]


def held(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM at the peak."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def do(folder: Path, work: Work, device: str) -> None:
    """Load the model, forget the peak so far, and do two steps of the job."""
    full = work.mode == "full"
    attn = "eager" if work.eager else None
    model = load_model(folder, loading=Loading(device, "fp32" if full else work.dtype, work.load_in, attn))
    rows = make_rows(2 * work.batch_size * work.accumulate, work.tokens)
    forget_peak(device)
    if work.mode in ("lora", "full"):
        train(model, work, rows)
    elif work.mode == "inference":
        Scorer(model, _Limit(work.tokens), work.batch_size).sums(rows)
    else:
        zeroth_order(model, rows[: work.batch_size])


def train(model: Any, work: Work, rows: list[Encoded]) -> None:
    """Two optimizer steps by the product's own path."""
    config = TuneConfig(
        model="m", rows="r", method=work.mode, max_steps=2, batch_size=work.batch_size, accumulate=work.accumulate,
        gradient_checkpointing=work.checkpointing,
    )  # fmt: skip
    if work.mode == "lora":
        model = tuning.add_lora(model, rank=work.rank, alpha=None, dropout=0.0, targets="all-linear", rslora=False)
    else:
        model = tuning.unfreeze(model)
    autocast = torch.bfloat16 if work.dtype == "bf16" else None
    with tempfile.TemporaryDirectory() as folder:
        tuning.train(model, rows, config, Path(folder), Log(QuietConsole()), autocast=autocast)


def zeroth_order(model: Any, rows: list[Encoded]) -> None:
    """Two steps on all weights by the product's own path, which moves them in place and draws no direction whole."""
    ids, mask, labels = pad_batch(rows, model.device)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    loss = objective_of(model, [inputs], int((labels[:, 1:] != -100).sum()), "loss")
    stepper = ZerothOrder(
        {name: p.data for name, p in model.named_parameters()}, exact=False, cache=False
    )  # fmt: skip
    for step in range(2):
        stepper.step(loss, [step], 1e-6)


class _Limit:
    """The part of an encoder that a scorer asks for messages."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length


def forget_peak(device: str) -> None:
    """Begin the peak anew."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Warm up on the small model, then measure."""
    folder, work = Path(sys.argv[1]), Work(**json.loads(sys.argv[2]))
    device = sys.argv[3] if len(sys.argv) > 3 else "cpu"
    with tempfile.TemporaryDirectory() as small:
        small_work = Work(work.mode, 2, 32, work.dtype, work.load_in, eager=work.eager)
        do(write_model(Path(small), "small"), small_work, device)
    gc.collect()
    before = held("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()
    do(folder, work, device)
    peak = held("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()
    print(json.dumps({"peak": peak - before}))


if __name__ == "__main__":
    main()
