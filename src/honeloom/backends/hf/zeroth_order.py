"""Tuning by forward passes alone: the loop, its losses, and a resume that replays seeds and scalars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from honeloom.backends.devices import memory_guard
from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.local_steps import Collator, build_schedule, collator
from honeloom.backends.hf.objectives import objective_of
from honeloom.backends.hf.tune import Trained, row_order, rows_in_all, total_steps
from honeloom.errors import ConfigError, NotFiniteError
from honeloom.runs.journal import Journal, read_journal
from honeloom.runs.log import Log
from honeloom.runs.processes import world_size
from honeloom.runs.signals import deferred_signals
from honeloom.tuning.config import MezoConfig, TuneConfig
from honeloom.tuning.zeroth_order import Probe, ZerothOrder, step_seeds

__all__ = ["perturbed", "rates_of", "sides_of", "step_batches", "train_zeroth_order"]

STEPS = "steps.jsonl"
SKIPPED = 20
"""Steps in a row without a finite loss after which training is given up."""


def perturbed(model: torch.nn.Module, config: MezoConfig) -> dict[str, torch.Tensor]:
    """The tensors that directions are about, by name.

    Raises
    ------
    ConfigError
        They are of a type whose rounding swallows the steps.
    """
    found = {
        name: parameter.data
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (config.perturb == "all" or ".lora_B." in name)
    }
    if odd := sorted({str(t.dtype) for t in found.values()} - {"torch.float32"}):
        raise ConfigError(f"mezo steps on {odd[0]} would be lost in rounding; trained weights must be in float32")
    return found


def train_zeroth_order(
    model: Any, encoded: Sequence[Encoded], config: TuneConfig, folder: Path, log: Log, *, device: torch.device,
    autocast: torch.dtype | None = None,
) -> Trained:  # fmt: skip
    """Train `model` in place by zeroth-order steps.

    Every step is a line of seeds and scalars in `folder`; an interrupted training replays them and
    goes on with the very weights it had, on whatever device.

    Parameters
    ----------
    model, encoded, config, folder, log, device, autocast
        As of `train`.

    Raises
    ------
    NotFiniteError
        Twenty steps in a row, or all of fewer, had no finite loss.

    References
    ----------
    Malladi et al. 2023, arXiv:2305.17333.
    """
    mezo = config.optimizer
    assert isinstance(mezo, MezoConfig) and isinstance(mezo.mu, float)  # the caller chose by it, and measured it
    if world_size() > 1:
        raise ConfigError("mezo runs in one process; leave torchrun or accelerate out")
    folder.mkdir(exist_ok=True)
    steps = total_steps(len(encoded), config)
    group = config.batch_size * config.accumulate
    lengths = [len(e.ids) for e in encoded]
    order = row_order(
        len(encoded), rows_in_all(len(encoded), config), config.seed, lengths=lengths,
        group=group if config.group_by_length else 0,
    )  # fmt: skip
    stepper = ZerothOrder(
        perturbed(model.eval(), mezo), mu=mezo.mu, kind=mezo.direction, exact=config.method.type == "lora",
        cache=mezo.setting == "speed", clip=mezo.clip,
    )  # fmt: skip
    sides = sides_of(model, stepper.params) if config.method.type == "lora" and mezo.setting == "speed" else None
    rates = rates_of(config, steps)
    losses = [_replayed(stepper, line, rates[k]) for k, line in enumerate(read_journal(folder / STEPS)) if k < steps]
    if losses:
        log.say(f"tune: {len(losses)} of {steps} steps replayed")
    computing: AbstractContextManager[Any] = torch.autocast(device.type, autocast) if autocast else nullcontext()
    with (
        deferred_signals() as pending, log.console.progress("tune", steps) as advance,
        Journal(folder / STEPS, durable=False) as journal,
        memory_guard(device, "training", ["--batch-size 1", "--max-length 512"]), computing,
    ):  # fmt: skip
        advance(len(losses))
        batches = step_batches([encoded[i] for i in order], config, collator(config.packing, encoded), device)
        for number, (passes, targets) in enumerate(batches):
            if number < len(losses):
                continue
            if pending.number is not None:
                break
            seeds = step_seeds(config.seed, "tune", number, mezo.directions)
            objective = objective_of(model, passes, targets, mezo.objective, sides=sides)
            probes = stepper.step(objective, seeds, rates[number])
            losses.append(_mean(probes))
            journal.append({"seeds": seeds, "scalars": [p.scalar for p in probes], "loss": losses[-1]})
            _require_some_finite(losses, number)
            advance(1)
    pending.raise_if_received()
    known = [loss for loss in losses if loss is not None]
    if not known:
        raise NotFiniteError(f"none of {steps} steps had a finite loss; lower lr or mu, or use --dtype fp32")
    tokens = sum(len(encoded[i].ids) for i in order)
    return Trained(steps, tokens, sum(encoded[i].targets for i in order) / tokens, tuple(known), frozenset(order))


def sides_of(model: Any, names: Iterable[str]) -> dict[str, torch.nn.Module]:
    """Layers of adapters by the names of their weights."""
    return {name: model.get_submodule(name.removesuffix(".weight")) for name in names}


def _replayed(stepper: ZerothOrder, line: Mapping[str, Any], rate: float) -> float | None:
    stepper.replay(list(zip(line["seeds"], line["scalars"], strict=True)), rate)
    loss: float | None = line["loss"]
    return loss


def _mean(probes: Sequence[Probe]) -> float | None:
    finite = [probe.loss for probe in probes if probe.finite]
    return sum(finite) / len(finite) if finite else None


def _require_some_finite(losses: Sequence[float | None], number: int) -> None:
    if len(losses) >= SKIPPED and all(loss is None for loss in losses[-SKIPPED:]):
        raise NotFiniteError(
            f"no finite loss in {SKIPPED} steps up to {number + 1}; lower lr or mu, or use --dtype fp32"
        )


def rates_of(config: TuneConfig, steps: int) -> list[float]:
    """Learning rate of every step, by the schedule that first-order tuning has."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    schedule = build_schedule(optimizer, config.schedule, steps, config.warmup_ratio)
    rates = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return rates


def step_batches(
    rows: Sequence[Encoded], config: TuneConfig, collate: Collator, device: torch.device
) -> Iterator[tuple[list[dict[str, torch.Tensor]], int]]:
    """Inputs of the forward passes of every step, and their target tokens."""
    size = config.batch_size
    for start in range(0, len(rows), size * config.accumulate):
        mine = rows[start : start + size * config.accumulate]
        passes = [
            {name: tensor.to(device) for name, tensor in collate(mine[k : k + size]).items()}
            for k in range(0, len(mine), size)
        ]
        yield passes, sum(sum(e.scored[1:]) for e in mine)
