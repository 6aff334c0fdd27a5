"""Steps per CPU-second of one thread beside the published loop, and nanoseconds per number: prints one JSON line.

Usage: OMP_NUM_THREADS=1 python benchmarks/zeroth_order/speed.py DATA

The contenders take turns in one process, each on a model of its own. The published loop (MeZO, Malladi et al. 2023,
arXiv:2305.17333) is written here from its description: a seed for torch's generator, numbers drawn again for each of
four passes over the parameters in the model's order, sums out of place, two losses of the model with labels.
"""

from __future__ import annotations

import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from honeloom.backends.hf.objectives import objective_of
from honeloom.backends.hf.zeroth_order import perturbed, sides_of
from honeloom.ops import noise, noise_kernels
from honeloom.tuning.config import MezoConfig
from honeloom.tuning.zeroth_order import ZerothOrder, accumulated

TOKENS, REPEATS, STEPS, MU, LR = 64, 13, 5, 1e-3, 1e-6
Step = Callable[[int], None]


def llama() -> Any:
    """A random Llama of 6.8M parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4, vocab_size=4096,
        max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).float().eval()


def with_lora(model: Any) -> Any:
    """Rank 8 on queries and values; B is drawn too, so that both factors matter."""
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.01)
    return model


def batch_of(vocabulary: int) -> dict[str, torch.Tensor]:
    """One row of random tokens."""
    ids = torch.randint(1, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """The model's own loss."""
    with torch.inference_mode():
        return float(model(**batch, use_cache=False).loss)


def published(model: Any, batch: dict[str, torch.Tensor]) -> Step:
    """The loop as it is described: plus, minus, back, and the update."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def perturb(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for _, param in trained:
            z = torch.normal(mean=0, std=1, size=param.data.size(), device=param.device, dtype=param.dtype)
            param.data = param.data + scale * z * MU

    def step(seed: int) -> None:
        perturb(seed, 1)
        plus = loss_of(model, batch)
        perturb(seed, -2)
        minus = loss_of(model, batch)
        perturb(seed, 1)
        scalar = (plus - minus) / (2 * MU)
        torch.manual_seed(seed)
        for _, param in trained:
            z = torch.normal(mean=0, std=1, size=param.data.size(), device=param.device, dtype=param.dtype)
            param.data = param.data - LR * (scalar * z)

    return step


def ours(model: Any, batch: dict[str, torch.Tensor], setting: str, kind: Any, exact: bool) -> Step:
    """The product's own step."""
    stepper = ZerothOrder(perturbed(model, MezoConfig()), mu=MU, kind=kind, exact=exact, cache=setting == "speed")
    sides = sides_of(model, stepper.params) if exact and setting == "speed" else None
    targets = int((batch["labels"][:, 1:] != -100).sum())

    def step(seed: int) -> None:
        stepper.step(objective_of(model, [batch], targets, "loss", sides=sides), [seed], LR)

    return step


def bare(model: Any, batch: dict[str, torch.Tensor]) -> Step:
    """Two forward passes with the model's loss, and nothing else."""

    def step(_seed: int) -> None:
        loss_of(model, batch)
        loss_of(model, batch)

    return step


def backward(model: Any, batch: dict[str, torch.Tensor]) -> Step:
    """Backpropagation and AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)

    def step(_seed: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()

    return step


def steps_of(model: Any, lora: bool) -> dict[str, Step]:
    """The contenders, each with a copy of the model."""
    batch = batch_of(model.config.vocab_size)

    def fresh() -> Any:
        mine = copy.deepcopy(model)
        return with_lora(mine) if lora else mine

    return {
        "published": published(fresh(), batch),
        **{
            f"{setting}, {kind}": ours(fresh(), batch, setting, kind, lora)
            for kind in ("gaussian", "rademacher")
            for setting in ("memory", "speed")
        },
        "two forward passes": bare(fresh(), batch),
        "AdamW": backward(fresh(), batch),
    }


def timed(steps: dict[str, Step]) -> dict[str, list[float]]:
    """CPU seconds per step of every contender, at every turn."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step(0)
        step(1)
    gc.disable()
    for turn in range(REPEATS):
        for name, step in steps.items():
            begun = time.process_time()
            for k in range(STEPS):
                step(10 + turn * STEPS + k)
            found[name].append((time.process_time() - begun) / STEPS)
        gc.collect()
    gc.enable()
    return found


def per_number(work: Callable[[], Any], count: int, repeats: int = 15) -> float:
    """Nanoseconds of CPU per number, the median."""
    work()
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return statistics.median(found) / count * 1e9


def generators() -> dict[str, float]:
    """Nanoseconds per number of what draws and adds them."""
    n = 1 << 21
    theta, z = torch.zeros(n), torch.zeros(n)
    drawn, where, sizes, keys = z.numpy(), np.array([theta.data_ptr()]), np.array([n]), np.array([[1, 2]])
    generator = np.random.Generator(np.random.Philox(0))
    usual = np.random.default_rng(0)
    return {
        "torch.normal_": per_number(lambda: z.normal_(), n),
        "numpy standard_normal, float32, PCG64": per_number(lambda: usual.standard_normal(n, np.float32, drawn), n),
        "numpy standard_normal, float32, Philox": per_number(
            lambda: generator.standard_normal(n, np.float32, drawn), n, 5
        ),
        "honeloom normal (inversion in float64, torch)": per_number(lambda: noise.normal(0, "x", n), n, 3),
        "honeloom gaussian, the torch reference": per_number(lambda: noise.gaussian(0, "x", n), n, 3),
        "honeloom gaussian, kernel": per_number(lambda: noise_kernels.fill(False, drawn, 0, 1, 2), n),
        "the same added to weights, never in memory": per_number(
            lambda: noise_kernels.add(False, where, sizes, keys, 1e-3), n
        ),
        "honeloom rademacher, kernel": per_number(lambda: noise_kernels.fill(True, drawn, 0, 1, 2), n),
        "the same added to weights": per_number(lambda: noise_kernels.add(True, where, sizes, keys, 1e-3), n),
        "numbers that are there, added to weights": per_number(
            lambda: noise_kernels.add_drawn(where, sizes, drawn, 1e-3), n
        ),
        "torch: weights + numbers * amount, out of place": per_number(lambda: theta + drawn_times(z), n),
    }


def drawn_times(z: torch.Tensor) -> torch.Tensor:
    """The product that an expression makes on the way."""
    return z * 1e-3


def sums() -> dict[str, float]:
    """CPU seconds of a sum of K directions on 49,152 weights, those of the adapter above."""
    like, found = torch.empty(49_152), {}
    for kind in ("gaussian", "rademacher"):
        accumulated(like, "w", [0], [1.0], kind)
        for count in (1024, 4096):
            begun = time.process_time()
            accumulated(like, "w", range(count), [1e-3] * count, kind)
            found[f"{kind}, K = {count}"] = time.process_time() - begun
    return found


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    models = {
        "Llama 6.8M": llama(),
        "base6m": AutoModelForCausalLM.from_pretrained(Path(sys.argv[1]) / "models/base6m", dtype=torch.float32).eval(),
    }
    seconds, sizes = {}, {}
    for name, model in models.items():
        for lora in (False, True):
            what = f"{name}, {'LoRA' if lora else 'all parameters'}"
            seconds[what] = timed(steps_of(model, lora))
            trained = with_lora(copy.deepcopy(model)) if lora else model
            sizes[what] = sum(p.numel() for p in trained.parameters() if p.requires_grad)
            print(what, {k: round(statistics.median(v) * 1e3, 2) for k, v in seconds[what].items()}, file=sys.stderr)
    print(json.dumps({"seconds": seconds, "sizes": sizes, "generators": generators(), "sums": sums()}))


if __name__ == "__main__":
    main()
