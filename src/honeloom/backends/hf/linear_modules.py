"""Which modules of a model are linear layers, from its configuration alone."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from honeloom.backends.hf.load import load_config

__all__ = ["linear_modules"]


def linear_modules(path: Path) -> dict[str, bool]:
    """Linear layers of a causal language model, by their paths in the model; no weight is read.

    Parameters
    ----------
    path : Path
        Model folder; only config.json is opened.

    Returns
    -------
    dict
        Module path -> whether its weight is stored as (in, out), as those of GPT-2 are, instead of (out, in).

    Raises
    ------
    CheckpointError
        transformers cannot read the configuration, or it needs code from the repository.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(path), trust_remote_code=False)
    kinds = (torch.nn.Linear, Conv1D)
    return {name: isinstance(module, Conv1D) for name, module in model.named_modules() if isinstance(module, kinds)}
