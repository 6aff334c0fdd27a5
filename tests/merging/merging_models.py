"""Tiny random Llama models on disk, and a way to run the stage on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from honeloom.config.base import collect_inputs
from honeloom.merging.merge_config import MergeConfig
from honeloom.runs.log import Log, QuietConsole
from honeloom.stages.inputs import resolve_model
from honeloom.stages.merge import execute
from honeloom.stages.work import Outcome, Work

SETTINGS = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


def make_model(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A random Llama in a folder."""
    torch.manual_seed(seed)
    shard = settings.pop("max_shard_size", "5GB")
    model = LlamaForCausalLM(LlamaConfig(**{**SETTINGS, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a single-file model in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object on disk."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class MergeRun:
    """Runs merges into numbered folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.said: list[str] = []
        console = QuietConsole()
        console.say = self.said.append  # type: ignore[method-assign]
        self.log = Log(console)
        self.out = root

    def __call__(self, **settings: Any) -> Outcome:
        for key in ("models", "base_model"):
            if key in settings:
                settings[key] = _text(settings[key])
        config = MergeConfig.model_validate(settings)
        self.out = self.root / f"out{len(list(self.root.glob('out*')))}"
        self.out.mkdir()
        inputs = {f.place: resolve_model(f.value, f.place) for f in collect_inputs(config)}
        return execute(Work(config, self.out, inputs, self.log))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The last result."""
        return load_file(self.out / "model.safetensors")


def _text(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {k: _text(v) for k, v in value.items()}
    return [_text(v) for v in value] if isinstance(value, list) else value
