"""Random PEFT adapters on tiny models, and what their sum must be."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
IDS = torch.arange(3, 43).view(2, 20)


def open_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(base: Path, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """An adapter with random factors of both kinds."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
    model = get_peft_model(open_base(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    edit_json(folder / CONFIG, base_model_name_or_path=str(base))
    if dtype is not torch.float32:
        edit_weights(folder, lambda ts: ts.update({n: t.to(dtype) for n, t in ts.items()}))
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def logits_of(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(open_base(base), adapter).eval())


def merged_weights(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The base's weights with PEFT's own merge of one adapter, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return (
        PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double().merge_and_unload().state_dict()
    )


def summed_weights(base: Path, adapters: Sequence[Path], shares: Sequence[float]) -> dict[str, torch.Tensor]:
    """Base plus the weighted sum of updates, by PEFT's merges of one adapter at a time."""
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).state_dict()
    total = {name: tensor.clone() for name, tensor in start.items()}
    for adapter, share in zip(adapters, shares, strict=True):
        for name, tensor in merged_weights(base, adapter).items():
            total[name] += share * (tensor - start[name])
    return total


def summed_logits(base: Path, adapters: Sequence[Path], shares: Sequence[float]) -> torch.Tensor:
    model = open_base(base)
    model.load_state_dict({n: t.float() for n, t in summed_weights(base, adapters, shares).items()})
    return logits(model)
