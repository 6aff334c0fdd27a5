"""Aggregation at Llama-7B layer shapes: time, working memory, error and bytes of every rule; writes AGGREGATION.md.

    OMP_NUM_THREADS=1 python benchmarks/federated/aggregation.py

One module of 4096 x 4096 and ten clients of ranks 64, 32, 16, 16, 8, 8, 4, 4, 4, 4, from factors in memory to factors
in memory. Figures are processor seconds of one thread; rules and rivals take turns, so a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from honeloom.federated.aggregation.exactness import error_norms
from honeloom.federated.aggregation.fedex import fedex
from honeloom.federated.aggregation.fedit import fedit
from honeloom.federated.aggregation.ffa import ffa
from honeloom.federated.aggregation.flexlora import flexlora
from honeloom.federated.aggregation.flora import flora
from honeloom.federated.aggregation.rolora import rolora
from honeloom.federated.aggregation.svd import svd
from honeloom.federated.aggregation.warm import warm, whole
from honeloom.federated.aggregation.zero_pad import zero_pad
from honeloom.ops.lowrank import relative_error, stack_factors
from honeloom.types.updates import Combined, Part

HERE = Path(__file__).resolve().parent
SIZE, RANKS, FULL_SVD_SIZE = 4096, (64, 32, 16, 16, 8, 8, 4, 4, 4, 4), 1536
TOTAL = sum(RANKS)
MEMORY_LIMIT = 100 * 10**6
Parts = Sequence[Part]


def make_parts(ranks: Sequence[int], shared: str | None = None) -> list[Part]:
    """Factors of falling column norms, as trained adapters have, with scale 2 and shares by rank."""
    draw = torch.Generator().manual_seed(0)
    largest = max(ranks)
    common_b, common_a = torch.randn(SIZE, largest, generator=draw), torch.randn(largest, SIZE, generator=draw)
    parts = []
    for rank in ranks:
        b = common_b if shared == "b" else torch.randn(SIZE, rank, generator=draw)
        a = common_a if shared == "a" else torch.randn(rank, SIZE, generator=draw)
        falling = torch.arange(1, rank + 1).rsqrt()
        b = b if shared == "b" else b[:, :rank] * falling
        parts.append(Part(b[:, :rank].contiguous() / 64, a[:rank].contiguous() / 64, 2.0, rank / sum(ranks)))
    return parts


def sum_of_products(parts: Parts) -> torch.Tensor:
    """What a dense aggregation does: one product per client, weighted and added."""
    total = torch.zeros(SIZE, SIZE)
    for part in parts:
        total += part.weight * part.scale * (part.b @ part.a)
    return total


def fused_sum_of_products(parts: Parts) -> torch.Tensor:
    """The same with scaling and addition inside the product."""
    total = torch.zeros(SIZE, SIZE)
    for part in parts:
        total.addmm_(part.b, part.a, alpha=part.weight * part.scale)
    return total


def full_svd(size: int) -> torch.Tensor:
    """Singular value decomposition of a dense matrix, as FlexLoRA does it."""
    return torch.linalg.svd(torch.randn(size, size, generator=torch.Generator().manual_seed(1)))[1]


def processor_seconds(call: Callable[[], object]) -> float:
    """Of one call in this thread."""
    start = time.process_time()
    call()
    return time.process_time() - start


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times of every call, one of each in turn; a first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            seconds = processor_seconds(call)
            if turn:
                times[name].append(seconds)
    return times


RULES: dict[str, tuple[Callable[[Parts], Combined], Sequence[int], str | None]] = {
    "flora": (flora, RANKS, None),
    "svd (rank 64, the default)": (svd, RANKS, None),
    "svd (rank 160)": (partial(svd, rank=TOTAL), RANKS, None),
    "svd (energy 0.9)": (partial(svd, energy=0.9), RANKS, None),
    "flexlora (rank 16)": (partial(flexlora, rank=16), RANKS, None),
    "zero_pad": (zero_pad, RANKS, None),
    "zero_pad (norm_weights)": (partial(zero_pad, norm_weights=True), RANKS, None),
    "ffa": (ffa, RANKS, "a"),
    "fedit": (fedit, (16,) * 10, None),
    "fedex": (fedex, (16,) * 10, None),
    "rolora": (rolora, (16,) * 10, "a"),
}
"""Name -> rule, ranks of the clients, and the factor that they share."""


def working_memory(name: str) -> int:
    """Peak bytes that a rule takes beyond its inputs and outputs, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name,))


def _peak(name: str) -> int:
    torch.set_num_threads(1)
    rule, ranks, shared = RULES[name]
    small = [replace(p, b=p.b[:64].contiguous(), a=p.a[:, :64].contiguous()) for p in make_parts(ranks, shared)]
    whole(rule(small))  # libraries take their own memory on first use
    parts = make_parts(ranks, shared)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    result = whole(rule(parts))
    outputs = sum(t.numel() * t.element_size() for t in result)
    return max(0, _status("VmHWM") - before - outputs)


def _status(field: str) -> int:
    """A figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def rule_rows(times: dict[str, list[float]]) -> tuple[list[str], dict[str, int]]:
    """One line per rule: time, error, working memory, bytes up of all clients and down to each."""
    lines, memory = [], {}
    for name, (rule, ranks, shared) in RULES.items():
        parts = make_parts(ranks, shared)
        combined = rule(parts)
        b, a = whole(combined)
        target = stack_factors([(p.b, p.a, p.weight * p.scale) for p in parts])
        error = relative_error(b, a, *target)
        memory[name] = working_memory(name)
        up = sum(p.b.nbytes + p.a.nbytes for p in parts)
        lines.append(
            f"| {name} | {'mixed' if len(set(ranks)) > 1 else '10 x 16'} | {statistics.median(times[name]) * 1e3:.1f} "
            f"({min(times[name]) * 1e3:.1f} - {max(times[name]) * 1e3:.1f}) | {error:.2e} | {b.shape[1]} | "
            f"{memory[name] / 1e6:.0f} | {up / 1e6:.1f} | {(b.nbytes + a.nbytes) / 1e6:.1f} |"
        )
    return lines, memory


TEXT = """# Aggregation

Command: `OMP_NUM_THREADS=1 python benchmarks/federated/aggregation.py`. {machine}, 1 thread, a shared machine;
Python {python}, torch {torch}.

One module of {size} x {size} in fp32, ten clients of ranks {ranks} (R = {total}), factors in memory, no
files. Processor milliseconds, medians of {repeats} interleaved repeats. For 64 modules (q and v of a Llama-7B) multiply
by 64.

## Against dense aggregation

| | ms (min - max) |
|---|---|
{rivals}

The full SVD is one module, scaled: {measured:.2f} s were measured at {full} x {full}, and {size} x {size} counts as
({size}/{full})^3 of that.

| goal | reached | |
|---|---|---|
{goals}

The usual dense loop forms a product, scales it and adds it, three passes over 64 MiB. Fused into the product it is the
faster rival in the table; against that, svd is {fused:.1f} times faster and flora {fused_flora:.0f} times.

## Rules

Error is relative to the weighted sum of updates (exact, by QR). Random factors are a hard case for truncation: those of
trained adapters usually decay faster. Working memory is the peak of a process of its own beyond inputs and outputs
(Linux). Up is the sum over the ten clients, both factors; down goes to each of them; fp32.

| rule | ranks | ms (min - max) | error | rank | working memory, MB | up, MB | down, MB |
|---|---|---|---|---|---|---|---|
{rules}

Measuring the error of a result by 32 random columns takes {sketch:.0f} ms; splitting it for a warm start at rank 16
{warm:.0f} ms.

## Not reached

{missed}
"""


def main() -> None:
    """Measure everything in turn and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    parts = make_parts(RANKS)
    cut = svd(parts)
    calls: dict[str, Callable[[], object]] = {
        "sum of dense products": partial(sum_of_products, parts),
        "the same, fused": partial(fused_sum_of_products, parts),
        "sketch": partial(error_norms, cut, parts),
        "warm": partial(warm, flora(parts), 16),
    }
    calls |= {name: partial(rule, make_parts(ranks, shared)) for name, (rule, ranks, shared) in RULES.items()}
    times = interleaved(calls, repeats)
    middle = {name: statistics.median(values) for name, values in times.items()}
    small = processor_seconds(partial(full_svd, FULL_SVD_SIZE))
    scaled = small * (SIZE / FULL_SVD_SIZE) ** 3
    lines, memory = rule_rows(times)
    best = "svd (rank 64, the default)"
    dense = middle["sum of dense products"]
    wanted = [
        ("svd against the sum of dense products", dense / middle[best], 20),
        ("svd against a full SVD (one module, scaled)", scaled / middle[best], 100),
        ("flora against the sum of dense products", dense / middle["flora"], 100),
    ]
    missed = [f"- {what}: {got:.1f} times, {least} wanted" for what, got, least in wanted if got < least]
    largest = max(memory, key=lambda name: memory[name])
    if memory[largest] > MEMORY_LIMIT:
        missed.append(f"- working memory: {largest} takes {memory[largest] / 1e6:.0f} MB, 100 wanted")
    goals = [
        f"| {what}: {least} times faster | {got:.0f} times | {_yes(got >= least)} |" for what, got, least in wanted
    ]
    goals.append(
        f"| working memory of every rule: 100 MB at most | {memory[largest] / 1e6:.0f} MB ({largest}) | "
        f"{_yes(memory[largest] <= MEMORY_LIMIT)} |"
    )
    rivals = [
        f"| {name} | {middle[name] * 1e3:.1f} ({min(times[name]) * 1e3:.1f} - {max(times[name]) * 1e3:.1f}) |"
        for name in ("sum of dense products", "the same, fused", "flora", best)
    ]
    rivals.append(f"| full SVD of the dense sum, scaled | {scaled * 1e3:,.0f} |")
    text = TEXT.format(
        machine=platform.machine(), python=platform.python_version(), torch=torch.__version__, size=SIZE,
        ranks=", ".join(map(str, RANKS)), total=TOTAL, repeats=repeats, rivals="\n".join(rivals), measured=small,
        full=FULL_SVD_SIZE, goals="\n".join(goals), fused=middle["the same, fused"] / middle[best],
        fused_flora=middle["the same, fused"] / middle["flora"], rules="\n".join(lines),
        sketch=middle["sketch"] * 1e3, warm=middle["warm"] * 1e3, missed="\n".join(missed) or "Nothing.",
    )  # fmt: skip
    (HERE / "AGGREGATION.md").write_text(text)
    print(text)
    sys.exit(bool(missed))


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"


if __name__ == "__main__":
    main()
