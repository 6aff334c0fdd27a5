"""What is claimed of an extracted adapter, measured on the files as they were written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from honeloom.backends.devices import release_memory
from honeloom.backends.hf.compare import largest_gap, probe_ids, row_logits
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer
from honeloom.checkpoint.adapter import LoraFile
from honeloom.checkpoint.folders import read_config
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.extract_config import ExtractConfig
from honeloom.ops.noise import permutation
from honeloom.runs.environment import installed_version
from honeloom.stages.extract_models import Target, differences
from honeloom.stages.work import Work
from honeloom.types.report import Check, Metric

__all__ = ["Stated", "check_loaded", "check_written", "difference"]

_SAMPLES = 3
_TOLERANCE = 1e-9
"""Of a norm that is computed twice in float64, relative to that of the difference."""


@dataclass(frozen=True, slots=True)
class Stated:
    """A module's difference: its norm, and the norm of what the factors leave of it."""

    target: Target
    norm: float
    error: float


def difference(tuned: ModelSource, base: ModelSource, target: Target) -> torch.Tensor:
    """Read a module's difference of weights: (out, in), float64."""
    delta = torch.empty(base.tensors[target.tensor].elements, dtype=torch.float64)
    for start, piece in differences(tuned, base, target.tensor):
        delta[start : start + len(piece)] = piece
    rows, columns = target.shape
    return delta.view(columns, rows).T.contiguous() if target.transposed else delta.view(rows, columns)


def check_written(
    work: Work[ExtractConfig], tuned: ModelSource, base: ModelSource, modules: Sequence[Stated]
) -> tuple[Check, ...]:
    """Read the adapter back: its scales, and in samples how far base and adapter are from the model.

    Parameters
    ----------
    work : Work
        The stage.
    tuned, base : ModelSource
        The models.
    modules : sequence of Stated
        What the report says of each module.
    """
    chosen = permutation(work.config.seed, "extract-lora/check", len(modules)).tolist()[:_SAMPLES]
    with LoraFile(work.dir) as written:
        odd = sum(factors.scale != 1.0 for factors in written.factors.values())
        excess = max(_distance(written, tuned, base, modules[i]) for i in chosen)
    return (
        Check("modules whose scale in the loader would not be 1", odd, 0, odd == 0),
        Check(
            "base plus the adapter as written is as far from the model as stated (relative, in three modules)",
            excess,
            _TOLERANCE,
            excess <= _TOLERANCE,
        ),
    )


def _distance(written: LoraFile, tuned: ModelSource, base: ModelSource, stated: Stated) -> float:
    """Distance of the measured error from the stated one, over the norm of the difference; row after row."""
    factors = written.factors[stated.target.module]
    b, a = (written.weights.read(name, torch.float64) for name in (factors.b_name, factors.a_name))
    delta, square = difference(tuned, base, stated.target), 0.0
    for row, weights in zip(delta, b * factors.scale, strict=True):
        square += float((row - weights @ a).square().sum())
    return abs(math.sqrt(square) - stated.error) / stated.norm


def check_loaded(work: Work[ExtractConfig]) -> tuple[tuple[Check, ...], tuple[Metric, ...]]:
    """Load the adapter with PEFT on its base, and tell how far its logits are from the model's.

    One model is in memory at a time. Nothing is loaded where PEFT is missing, where weights are quantised, or where
    the base is an adapter itself; then there is no claim, and a warning.
    """
    if reason := _cannot_load(work):
        work.log.warn(f"the adapter was not loaded: {reason}")
        return (), ()
    tuned, base, loading = work.inputs["tuned"], work.inputs["base"], Loading(work.config.device)
    tokenizer = load_tokenizer(tuned.paths[0], base=tuned.base)
    model = load_model(tuned.paths[0], base=tuned.base, loading=loading)
    rows = probe_ids(tokenizer, model.config, work.config.seed)
    expected = row_logits(model, rows)
    del model
    release_memory()
    found = row_logits(load_model(work.dir, base=base.paths[0], loading=loading), rows)
    finite = all(bool(torch.isfinite(logits).all()) for logits in found)
    probe = "two sentences" if tokenizer else "seeded token ids (no tokenizer)"
    claim = f"PEFT loads the adapter on its base, and its logits on {probe} are finite"
    gap, count = largest_gap(expected, found), sum(map(len, rows))
    metric = Metric("logits_gap", gap, count, "largest difference from the model", False, None, "all")
    return (Check(claim, finite, True, finite),), (metric,)


def _cannot_load(work: Work[ExtractConfig]) -> str | None:
    if installed_version("peft") is None:
        return "peft is not installed (pip install 'honeloom[tune]')"
    if work.inputs["base"].base is not None:
        return "its base is an adapter itself"
    for found in work.inputs.values():
        if read_config(found.base or found.paths[0]).get("quantization_config"):
            return f"the weights of {found.value} are stored in 8 bits"
    return None
