"""Training of a mixture's gates, once the mixture is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from honeloom.backends.devices import choose_device, memory_guard, one_thread
from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.load import Loading, load_model
from honeloom.backends.hf.mixture_gates import RouterSpec, build_gate
from honeloom.backends.hf.mixture_use import held_to, weigh_all
from honeloom.backends.hf.router_inputs import row_losses
from honeloom.backends.hf.router_tuning import gate_names, tune_by_losses, tune_gates
from honeloom.mixture.config import MixConfig
from honeloom.mixture.evidence import Gate
from honeloom.stages.mix_inputs import Design, Parts, hidden_size
from honeloom.stages.mix_router import Gates, gate_places, loaded, pooled_vectors
from honeloom.stages.mix_rows import expert_losses, read_tuning_rows, sample_spans
from honeloom.stages.work import Work
from honeloom.types.rows import Row

__all__ = ["Tuned", "tune"]

_PLACE = re.compile(r"(?:.*\.)?(\d+)\.(?:.*\.)?gate\.(.+)")


@dataclass(frozen=True, slots=True)
class Tuned:
    """Gates after training, and the loss of every step."""

    gates: Gates
    losses: tuple[float, ...]
    unit: str


def tune(work: Work[MixConfig], parts: Parts, design: Design, gates: Gates) -> Tuned:
    """Train the gates of the written mixture on rows; whole layer stacks by the losses of the experts.

    Raises
    ------
    RowsError
        No row can be trained on.
    NotFiniteError
        A loss is NaN or infinite.
    """
    settings = work.config.tune_router
    rows, encoded = read_tuning_rows(work, parts)
    work.log.say(f"mix: training the gates for {settings.steps} steps on {len(rows)} rows")
    if work.config.level == "model":
        return _by_losses(work, parts, design, gates, rows, encoded)
    device = choose_device(work.config.device)
    advice = [f"--set tune_router.batch_size={max(1, settings.batch_size // 2)}"]
    with memory_guard(device, "training the gates", advice), one_thread(device):
        model = load_model(work.dir, loading=Loading(work.config.device, "fp32"))
        experts = len(parts.experts)
        losses = tune_gates(
            model, encoded, steps=settings.steps, batch_size=settings.batch_size, lr=settings.lr, seed=work.config.seed,
            all_experts=lambda: weigh_all(model, experts) if design.top_k == 1 else None,
            read=(lambda row: row.prompt) if work.config.input == "sample" else None,
        )  # fmt: skip
        found = _taken(model, gates)
    return Tuned(found, tuple(losses), "nats per token")


def _taken(model: Any, gates: Gates) -> Gates:
    """The gates of a loaded mixture by their keys."""
    tensors: dict[str, dict[str, torch.Tensor]] = {key: {} for key in gates.by_key}
    for name in gate_names(model):
        place = _PLACE.fullmatch(name)
        if place is not None and place[1] in tensors:
            tensors[place[1]][place[2]] = model.get_parameter(name).detach().float().cpu().clone()
    return replace(gates, by_key={key: replace(gate, tensors=tensors[key]) for key, gate in gates.by_key.items()})


def _by_losses(
    work: Work[MixConfig], parts: Parts, design: Design, gates: Gates, rows: Sequence[Row], encoded: Sequence[Encoded]
) -> Tuned:
    settings = work.config.tune_router
    key, place = next(iter(gate_places(work.config, parts, design).items()))
    vectors = pooled_vectors(work, parts, place, sample_spans(encoded))
    if work.config.whole_models:
        losses, unit = expert_losses(work, parts, rows, loaded), "nats per character"
    else:
        losses, unit = _held_losses(work, parts, encoded), "nats per token"
    spec, width = gates.spec, hidden_size((parts.encoder or parts.trunk).config)
    gate = build_gate(RouterSpec(**spec), len(parts.experts), width)
    gate.load_state_dict(gates.by_key[key].tensors)
    with one_thread(torch.device("cpu")):
        told = tune_by_losses(
            gate, vectors, losses, steps=settings.steps, batch_size=settings.batch_size, lr=settings.lr,
            seed=work.config.seed,
        )  # fmt: skip
    tensors = {name: t.detach().clone() for name, t in gate.state_dict().items()}
    old: Gate = gates.by_key[key]
    return Tuned(replace(gates, by_key={key: replace(old, tensors=tensors)}), tuple(told), unit)


def _held_losses(work: Work[MixConfig], parts: Parts, encoded: Sequence[Encoded]) -> torch.Tensor:
    """Loss of every row with the gate held to each expert, in nats per token; (R, E)."""
    model = load_model(work.dir, loading=Loading(work.config.device, "fp32"))
    tokens = torch.tensor([row.targets for row in encoded], dtype=torch.float64)
    columns = []
    for expert in range(len(parts.experts)):
        with held_to(model, expert):
            columns.append(row_losses(model, encoded) / tokens)
    return torch.stack(columns, dim=1)
