"""Writing a PEFT LoRA adapter whose factors are the whole update: the loader's scale is 1 in every module."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from honeloom.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from honeloom.checkpoint.writer import TensorStream, write_tensors

__all__ = ["combined_config", "write_adapter"]

_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_ABOUT_TRAINING = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size")


def combined_config(sources: Sequence[Mapping[str, Any]], ranks: Mapping[str, int], *, same: bool) -> dict[str, Any]:
    """Settings under which PEFT loads factors of these ranks with scale 1.

    Parameters
    ----------
    sources : sequence of mapping
        Content of the clients' adapter_config.json; the first gives what is not set here.
    ranks : mapping
        Module path -> rank of its factors. The largest becomes `r`; the others stand in
        rank_pattern, with their alpha in alpha_pattern.
    same : bool
        Whether every client has factors for exactly these modules; otherwise they are named one by one.

    Returns
    -------
    dict
        Content of adapter_config.json.
    """
    first = sources[0]
    config = {k: v for k, v in first.items() if k not in _ABOUT_TRAINING}
    largest = max(ranks.values())
    others = {f"^{module}": rank for module, rank in ranks.items() if rank != largest}
    config.update(
        r=largest,
        lora_alpha=largest,
        rank_pattern=others,
        alpha_pattern=dict(others),
        use_rslora=False,
        init_lora_weights=True,
        inference_mode=True,
    )
    if not same or any(_targets(source) != _targets(first) for source in sources):
        config.update(dict.fromkeys(_TARGETS), target_modules=list(ranks))
    for key in _TARGETS:  # sets, saved in the order of that process
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    return config


def _targets(config: Mapping[str, Any]) -> list[Any]:
    """What decides on the modules, lists without their order."""
    return [sorted(map(str, v)) if isinstance(v := config.get(key), list) else v for key in _TARGETS]


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Iterable[TensorStream]) -> int:
    """Write adapter_model.safetensors and adapter_config.json; returns the bytes of the former."""
    size = write_tensors(folder / ADAPTER_WEIGHTS, tensors)
    text = json.dumps(dict(config), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with open(folder / ADAPTER_CONFIG, "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    return size
