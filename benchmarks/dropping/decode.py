"""Decoding with half of the attentions dropped: bytes of the real cache, and tokens per second. Writes DECODE.md.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/dropping/decode.py [--layers N] [--steps N]

Weights are random: time does not depend on them. The cache is the one transformers makes. Where it begins with more
than a few tokens, it is filled with random keys and values instead of reading a long prompt. Dense and dropped take
turns, step by step, in one process, and share the weights of what both have.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from honeloom.backends.hf.dropped_model import HoneloomDroppedConfig, register

HERE = Path(__file__).resolve().parent
CONTEXTS = (64, 1024, 4096)
WARM = 3
MODULES = {
    "layers": "model.layers", "attention": ["self_attn"], "attention_norms": ["input_layernorm"],
    "mlp": ["mlp"], "mlp_norms": ["post_attention_layernorm"], "mlp_outputs": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A cache and context length: bytes per token, medians of a step (wall and CPU seconds), and the bound."""

    cache: str
    context: int
    dense_bytes: int
    dropped_bytes: int
    dense: float
    dropped: float
    dense_cpu: float
    dropped_cpu: float
    bound: float
    spread: tuple[float, float]


def models(layers: int, dropped: list[int]) -> tuple[Any, Any]:
    """A dense Llama with random weights, and the same without some attentions."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=8192, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config).eval()
    register()
    spec = {"version": 1, "attention": dropped, "mlp": [], "modules": MODULES}
    short = AutoModelForCausalLM.from_config(HoneloomDroppedConfig(base=config.to_dict(), drop_spec=spec)).eval()
    wanted = short.state_dict()
    short.load_state_dict({k: v for k, v in dense.state_dict().items() if k in wanted}, assign=True)
    return dense, short


def filled(model: Any, kind: str, tokens: int, room: int) -> Any:
    """The cache of so many tokens, with random content; a static one has room for some more."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=tokens + room) if kind == "static" else DynamicCache(config=config)
    shape = (1, config.num_key_value_heads, tokens, config.hidden_size // config.num_attention_heads)
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.self_attn, "k_proj"):
            cache.update(torch.randn(shape), torch.randn(shape), index)
    return cache


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values in a cache."""
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(t.nbytes for t in held if t is not None)


def checked(dense: Any, short: Any, dropped: list[int]) -> float:
    """Largest difference of logits, written one after another, from those of the silenced dense model in one pass."""
    ids = torch.randint(0, 8192, (1, 24), generator=torch.Generator().manual_seed(1))
    handles = [
        dense.model.layers[i].self_attn.register_forward_hook(lambda m, a, o: (torch.zeros_like(o[0]), *o[1:]))
        for i in dropped
    ]
    whole = dense(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    cache, steps = None, []
    for place in range(ids.shape[1]):
        step = short(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache, steps = step.past_key_values, [*steps, step.logits]
    return float((torch.cat(steps, dim=1) - whole).abs().max())


def bound(config: Any, count: int, context: int) -> float:
    """By how much a step that is as fast as memory allows becomes faster: bytes read before over bytes read after."""
    hidden, width = config.hidden_size, config.intermediate_size
    attention, mlp, head = 4 * 4 * hidden * hidden, 4 * 3 * hidden * width, 4 * hidden * config.vocab_size
    keys = 2 * hidden * 4 * context  # as many key-value heads as heads
    layers = config.num_hidden_layers
    before = layers * (attention + mlp + keys) + head
    return before / (layers * mlp + (layers - count) * (attention + keys) + head)


def measure(dense: Any, short: Any, count: int, kind: str, context: int, steps: int) -> Row:
    """One row: steps of both models in turn, each with its own cache."""
    room = WARM + steps if kind == "static" else 0
    caches = [filled(model, kind, context, room) for model in (dense, short)]
    sizes = [cache_bytes(c) // (context + room) for c in caches]
    walls: list[list[float]] = [[], []]
    cpus: list[list[float]] = [[], []]
    token = torch.tensor([[5]])
    for step in range(WARM + steps):
        for which in (0, 1) if step % 2 else (1, 0):
            wall, cpu = time.perf_counter(), time.process_time()
            (dense, short)[which](token, past_key_values=caches[which], use_cache=True)
            if step >= WARM:
                walls[which].append(time.perf_counter() - wall)
                cpus[which].append(time.process_time() - cpu)
    ratios = sorted(a / b for a, b in zip(*walls, strict=True))
    quarter = len(ratios) // 4
    middle = [statistics.median(w) for w in (*walls, *cpus)]
    spread = (ratios[quarter], ratios[-1 - quarter])
    return Row(kind, context, sizes[0], sizes[1], *middle, bound(dense.config, count, context), spread)


def page(rows: list[Row], gap: float, arguments: argparse.Namespace, load: float) -> str:
    """DECODE.md."""
    layers, count = arguments.layers, arguments.layers // 2
    exact = all(r.dropped_bytes * layers == r.dense_bytes * (layers - count) for r in rows)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        "# Decoding without half of the attentions", "",
        "Command: `OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/dropping/decode.py`. "
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}. A shared machine: the load was {load:.1f} when "
        "the run began.", "",
        f"A Llama of {layers} layers, hidden size 1024, 16 heads that each have keys and values, MLP 2816, fp32, one",
        f"thread, batch 1; {count} of its attentions dropped. Each step feeds one token with a cache of transformers;",
        f"dense and dropped take turns, medians of {arguments.steps} steps. The bound is the ratio of the bytes that a",
        "step must read: weights once, keys and values once.", "",
        "| cache | context | cache, bytes per token, dense | dropped | ratio | tokens/s, dense | dropped | faster | "
        "middle half of step pairs | faster, CPU time | bound |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {r.cache} | {r.context:,} | {r.dense_bytes:,} | {r.dropped_bytes:,} "
            f"| {r.dropped_bytes / r.dense_bytes:.4f} | {1 / r.dense:.2f} | {1 / r.dropped:.2f} "
            f"| {r.dense / r.dropped:.2f}x "
            f"| {r.spread[0]:.2f}-{r.spread[1]:.2f}x | {r.dense_cpu / r.dropped_cpu:.2f}x | {r.bound:.2f}x |"
            for r in rows
        ), "",
        "The dynamic cache, which generation uses unless told otherwise, copies all keys and values at every step to",
        "append one token. The bound does not count that, so long contexts gain more than it says; the static cache",
        "appends in place. Nor does it count the small steps of which attention has more than the MLP.", "",
        f"Logits of 24 tokens written one by one differ by {gap:.1e} from those of the silenced dense model.", "",
        "## Goals", "", "| goal | measured | reached |", "| --- | --- | --- |",
        f"| bytes of the cache are exactly (L - n) / L = {(layers - count) / layers:g} of the dense ones | "
        f"{', '.join(sorted({f'{r.dropped_bytes / r.dense_bytes:g}' for r in rows}))} | {'yes' if exact else 'no'} |",
        f"| step by step = whole pass, within 1e-4 | {gap:.1e} | {'yes' if gap <= 1e-4 else 'no'} |", "",
    ]  # fmt: skip
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    dropped = list(range(0, arguments.layers, 2))  # the first too: its place in the cache is what others get wrong
    dense, short = models(arguments.layers, dropped)
    gap = checked(dense, short, dropped)
    cases = [(kind, context) for kind in ("dynamic", "static") for context in CONTEXTS]
    rows = [measure(dense, short, len(dropped), kind, context, arguments.steps) for kind, context in cases]
    (HERE / "DECODE.md").write_text(page(rows, gap, arguments, load), encoding="utf-8")
    print(page(rows, gap, arguments, load))


if __name__ == "__main__":
    main()
