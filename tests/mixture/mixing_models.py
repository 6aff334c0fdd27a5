"""Tiny random models of several families on disk, and a way to mix them without the command around the stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from honeloom.config.base import collect_inputs, validate
from honeloom.lab.tokenizer import build_tokenizer, write_tokenizer
from honeloom.mixture.config import MixConfig
from honeloom.runs.log import Log, QuietConsole
from honeloom.stages.inputs import Resolver
from honeloom.stages.mix import execute
from honeloom.stages.work import Outcome, Work

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def write_model(folder: Path, seed: int, family: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> str:
    """A random model with the lab's tokenizer; its path as text."""
    sizes = {**SIZES, "vocab_size": build_tokenizer().get_vocab_size(), **more}
    if family == "qwen3":
        sizes.setdefault("head_dim", 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


def write_rows(path: Path, word: str, count: int = 16) -> str:
    """Rows of one domain."""
    records = (
        {"id": f"{word}{i}", "instruction": f"{word} {i}.", "input": "", "output": f"It is {word} {i}.", "domain": word}
        for i in range(count)
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


class MixRun:
    """Runs mixes into numbered folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.said: list[str] = []
        console = QuietConsole()
        console.say = self.said.append  # type: ignore[method-assign]
        self.log = Log(console)
        self.out = root

    def __call__(self, experts: list[Any], **settings: Any) -> Outcome:
        config = validate(MixConfig, {"experts": experts, **settings}, what="mix")
        self.out = self.root / f"out{len(list(self.root.glob('out*')))}"
        self.out.mkdir()
        resolver = Resolver()
        inputs = {f.place: resolver.resolve(f) for f in collect_inputs(config)}
        return execute(Work(config, self.out, inputs, self.log))


IDS = torch.arange(3, 43).view(2, 20)


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    """Of some ids."""
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def open_model(folder: Any) -> Any:
    """As plain transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
