"""Estimated against measured peak memory, and calibrated against real seconds. Writes RESULT.md.

Usage: python benchmarks/memory/run.py [DATA], or python benchmarks/memory/run.py --gpu

Memory on a random Llama of 125M parameters, on the CPU; every job in a process of its own. Time on base6m and
instruct/mini.jsonl of DATA (default: ../shared/data beside the repository). With --gpu: memory alone, of a random
Llama of 1B parameters on the first CUDA device, into GPU.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from measure import write_model

import honeloom
from honeloom.checkpoint.folders import read_config
from honeloom.planning.memory import Work, peak_memory, read_decoder

HERE = Path(__file__).resolve().parent
JOBS = (
    Work("inference", 8, 256, "fp32"),
    Work("inference", 4, 512, "bf16"),
    Work("zeroth-order", 4, 256, "fp32"),
    Work("zeroth-order", 4, 256, "bf16"),
    Work("lora", 4, 256, "fp32"),
    Work("lora", 4, 512, "fp32"),
    Work("lora", 4, 256, "bf16"),
    Work("lora", 2, 512, "fp32", checkpointing=True),
    Work("lora", 2, 256, "fp32", eager=True),
    Work("lora", 4, 256, "bf16", "4bit"),
    Work("full", 4, 256, "fp32"),
    Work("full", 4, 256, "bf16"),
    Work("full", 2, 512, "fp32", checkpointing=True),
    Work("full", 2, 256, "fp32", accumulate=2),
)
LIVE = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
"""Makes glibc give back every freed megabyte at once, so that resident memory is live tensors."""
GPU_JOBS = (
    Work("inference", 8, 512),
    Work("inference", 8, 512, load_in="4bit"),
    Work("zeroth-order", 4, 512),
    Work("lora", 4, 512),
    Work("lora", 4, 512, load_in="4bit"),
    Work("lora", 4, 512, load_in="8bit"),
    Work("lora", 2, 2048, checkpointing=True),
    Work("full", 2, 512),
    Work("full", 2, 512, checkpointing=True, accumulate=2),
)
GB = 1e9


def measured(model: Path, work: Work, variables: dict[str, str], device: str = "cpu") -> int:
    """Peak bytes of a job in a fresh process."""
    command = [sys.executable, str(HERE / "measure.py"), str(model), json.dumps(asdict(work)), device]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", **variables}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def describe(work: Work) -> str:
    """One line for the table."""
    extras = [work.load_in or "", "checkpointing" * work.checkpointing, "eager" * work.eager]
    extras.append(f"accumulate {work.accumulate}" if work.accumulate > 1 else "")
    return ", ".join([f"{work.mode} {work.dtype}", f"{work.batch_size} x {work.tokens}", *filter(None, extras)])


def memory_table(folder: Path) -> tuple[list[str], float]:
    """Lines of the table, and the largest deviation of the estimate from what a user sees."""
    model = write_model(folder / "llama", "100M")
    decoder = read_decoder(read_config(model))
    lines, worst = [], 0.0
    for job in JOBS:
        work = Work(**{**asdict(job), "host": True})
        estimate = peak_memory(decoder, work)
        seen, live = measured(model, work, {}), measured(model, work, LIVE)
        ratio, tensors = estimate.total / seen, (estimate.total - estimate.allocator) / live
        worst = max(worst, abs(ratio - 1))
        cells = (estimate.total / GB, seen / GB, ratio, (estimate.total - estimate.allocator) / GB, live / GB, tensors)
        lines.append(f"| {describe(work)} | " + " | ".join(f"{c:.2f}" for c in cells) + " |")
        print(lines[-1], flush=True)
    return lines, worst


def gpu_table(folder: Path) -> list[str]:
    """Lines of the table for a GPU: estimate, peak of allocated memory, ratio."""
    model = write_model(folder / "llama", "1B")
    decoder = read_decoder(read_config(model))
    lines = []
    for work in GPU_JOBS:
        estimate, peak = peak_memory(decoder, work).total, measured(model, work, {}, "cuda")
        lines.append(f"| {describe(work)} | {estimate / GB:.2f} | {peak / GB:.2f} | {estimate / peak:.2f} |")
        print(lines[-1], flush=True)
    return lines


def time_lines(data: Path, folder: Path) -> list[str]:
    """Calibrated against real seconds of training, one after the other."""
    lines = []
    for changes in ({}, {"method": "full"}, {"packing": True}):
        settings = {
            "model": data / "models" / "base6m", "rows": data / "instruct" / "mini.jsonl", "max_steps": 30, **changes
        }  # fmt: skip
        before = honeloom.plan("tune", calibrate=True, **settings)[0].needs.seconds
        out = folder / f"tuned-{len(lines)}"
        honeloom.tune(**settings, output_dir=out)
        after = honeloom.plan("tune", calibrate=True, **settings)[0].needs.seconds
        planned = (before + after) / 2  # other work may share the cores
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        steps = [e["seconds"] for e in events if e["event"] == "step"]
        real = (steps[-1] - steps[0]) / (len(steps) - 1) * len(steps)
        name = ", ".join(f"{k} {v}" for k, v in changes.items()) or "lora"
        lines.append(f"| {name} | {planned:.1f} | {real:.1f} | {planned / real:.2f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure and write RESULT.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--gpu", action="store_true")
    arguments = parser.parse_args()
    if arguments.gpu:
        with tempfile.TemporaryDirectory() as folder:
            lines = "\n".join(gpu_table(Path(folder)))
        (HERE / "GPU.md").write_text(GPU_TEXT.format(name=torch.cuda.get_device_name(), lines=lines))
        return
    with tempfile.TemporaryDirectory() as folder:
        memory, worst = memory_table(Path(folder))
        seconds = time_lines(arguments.data, Path(folder))
    text = TEXT.format(memory="\n".join(memory), worst=f"{worst:.0%}", seconds="\n".join(seconds))
    (HERE / "RESULT.md").write_text(text)


GPU_TEXT = """# Estimated and measured memory on a GPU

Command: `python benchmarks/memory/run.py --gpu`. A random Llama of 1B parameters (hidden 2048, 16 layers, vocabulary
32,000) on one {name}; peak of allocated memory in GB, batch x tokens. The estimate leaves out the context that a
process holds on a GPU (600 MiB assumed) and what the allocator keeps beside live tensors.

| job | estimate | measured | ratio |
|---|---|---|---|
{lines}
"""

TEXT = """# Estimated and measured memory, calibrated and real seconds

Command: `python benchmarks/memory/run.py`. A random Llama of 125M parameters (hidden 768, 12 layers, vocabulary 32,000)
on the CPU of a two-core machine without a GPU; peaks in GB, batch x tokens. "As it runs" is resident memory with
glibc's own allocator, which is what a user sees. "Live tensors" is the same job with
`MALLOC_MMAP_THRESHOLD_=1048576`, where freed memory goes back at once; the estimate beside it leaves the allocator's
part out. The largest deviation as it runs is {worst}.

| job | estimate | as it runs | ratio | estimate | live tensors | ratio |
|---|---|---|---|---|---|---|
{memory}

Seconds of 30 steps on base6m and 473 rows: `--calibrate` (steps on random weights), the mean of
one before and one after, against the tuning run between them. A ratio is worth as
much as the cores were quiet: with other work on them one of an earlier run was 0.37.

| tuning | calibrated | real | ratio |
|---|---|---|---|
{seconds}

## On a GPU

See `GPU.md`. Unmeasured are sharding over several GPUs (its arithmetic is tested with two processes on a CPU), flash
attention, and models above 1B parameters.
"""


if __name__ == "__main__":
    main()
