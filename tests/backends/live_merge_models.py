"""Tiny models of one family with a tokenizer, and the merge stage on a document."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from honeloom import lab
from honeloom.backends.hf.live_merge import Pool
from honeloom.checkpoint.folders import copy_tokenizer
from honeloom.config.base import collect_inputs
from honeloom.config.methods import MethodConfig
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.merge_config import MergeConfig
from honeloom.runs.log import Log, QuietConsole
from honeloom.stages.inputs import resolve_model
from honeloom.stages.merge import execute
from honeloom.stages.work import Work
from honeloom.testing.models import tiny_llama
from honeloom.types.rows import Row, Turn, Where


def family(folder: Path, names: str, *, dtype: torch.dtype = torch.float32, untied: str = "") -> dict[str, Path]:
    """Random models near a common one; the letters in `untied` have a head of their own."""
    origin = AutoModelForCausalLM.from_pretrained(tiny_llama(folder / "origin", layers=3))
    found = {}
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        config = type(origin.config).from_dict({**origin.config.to_dict(), "tie_word_embeddings": name not in untied})
        model = type(origin)(config)
        model.load_state_dict(origin.state_dict(), strict=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.to(dtype).save_pretrained(folder / name)
        copy_tokenizer(lab.base_path(), folder / name)
        found[name] = folder / name
    return found


def pool_of(
    stack: ExitStack, folders: Mapping[str, Path], method: MethodConfig, *, base: str | None = None, **settings: Any
) -> Pool:
    """The models but for the base, opened; documents name them by their folders."""
    sources = {str(path): stack.enter_context(ModelSource(str(path), path)) for path in folders.values()}
    models = [str(path) for name, path in folders.items() if name != base]
    return Pool(models, sources, str(folders[base]) if base else None, method, settings)


def merged_tensors(document: Mapping[str, Any], out: Path) -> dict[str, torch.Tensor]:
    """Run `merge` on a document; the tensors of the checkpoint."""
    config = MergeConfig.model_validate(dict(document))
    out.mkdir(parents=True)
    inputs = {f.place: resolve_model(f.value, f.place) for f in collect_inputs(config)}
    execute(Work(config, out, inputs, Log(QuietConsole())))
    return load_file(out / "model.safetensors")


def chat(number: int, domain: str = "a") -> Row:
    answer = " ".join(f"word{i}" for i in range(number % 5 + 1))
    turns = (Turn("user", f"Say {number}."), Turn("assistant", answer))
    return Row(f"r{number}", "chat", Where("rows", number), "rows", domain, turns)


def choice(number: int) -> Row:
    question = (Turn("user", f"What is {number}?"),)
    return Row(
        f"c{number}", "choice", Where("rows", number), "rows", "c", question, "", ("one", "two", "six"), number % 3
    )
