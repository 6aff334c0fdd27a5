"""How long a training step takes: timed on the model's first layers with random weights, extended to all of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from honeloom.backends.devices import release_memory
from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.local_steps import build_optimizer, collator, local_steps
from honeloom.errors import ConfigError
from honeloom.tuning.config import TuneConfig

__all__ = ["seconds_per_step"]

TIMED = 3
"""Steps per slice; the first one before them only warms up."""


def seconds_per_step(
    config: Any,
    prepare: Callable[[Any], Any],
    passes: Sequence[Sequence[Encoded]],
    settings: TuneConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Seconds of an optimizer step of the whole model.

    Parameters
    ----------
    config : transformers configuration
        Of the whole model; no weights are read.
    prepare : callable
        Marks what is trained: (model) -> model.
    passes : sequence of sequence of Encoded
        Rows of every forward pass of a step.
    settings : TuneConfig
        For the optimizer.
    device, dtype
        Where and in which number type to compute.

    Returns
    -------
    float
        With t(1) and t(2) of one and two layers, t(1) + (L - 1) (t(2) - t(1)): layers are alike,
        and what stands around them is counted once.
    """
    layers = config.get_text_config().num_hidden_layers
    one = _timed(_slice(config, 1), prepare, passes, settings, device, dtype)
    if layers == 1:
        return one
    two = _timed(_slice(config, 2), prepare, passes, settings, device, dtype)
    return one + (layers - 1) * max(0.0, two - one)


def _slice(config: Any, layers: int) -> Any:
    """The configuration of the first layers alone."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def _timed(
    config: Any,
    prepare: Callable[[Any], Any],
    passes: Sequence[Sequence[Encoded]],
    settings: TuneConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    if settings.optimizer.type == "mezo":
        raise ConfigError("--calibrate times steps with gradients, and mezo has none; leave one of them out")
    weights = torch.float32 if settings.method.type == "full" else dtype
    with torch.random.fork_rng(devices=[]):
        model = prepare(AutoModelForCausalLM.from_config(config, dtype=weights).to(device))
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = build_optimizer(model, settings.optimizer, settings.learning_rate)
    collate = collator(settings.packing, [row for rows in passes for row in rows])
    seconds = []
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
        for _ in range(1 + TIMED):
            _wait(device)
            start = time.perf_counter()
            local_steps(model, [passes], optimizer, max_grad_norm=settings.max_grad_norm, collate=collate)
            _wait(device)
            seconds.append(time.perf_counter() - start)
    del model, optimizer
    release_memory()
    return median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
