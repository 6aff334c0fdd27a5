"""Tuning by forward passes alone: the loop, its losses, and a resume that replays seeds and scalars."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from honeloom.backends.devices import memory_guard
from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.local_steps import Collator, build_schedule, collator
from honeloom.backends.hf.tune import Trained, row_order, rows_in_all, total_steps
from honeloom.errors import ConfigError, NotFiniteError
from honeloom.runs.journal import Journal, read_journal
from honeloom.runs.log import Log
from honeloom.runs.processes import world_size
from honeloom.runs.signals import deferred_signals
from honeloom.tuning.config import MezoConfig, TuneConfig
from honeloom.tuning.zeroth_order import Probe, ZerothOrder, step_seeds

__all__ = ["objective_of", "perturbed", "rates_of", "step_batches", "train_zeroth_order"]

STEPS = "steps.jsonl"
CHUNK = 1 << 20
"""Logits that are read at a time."""
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


@dataclass(frozen=True, slots=True)
class _Batch:
    """Inputs of a forward pass, and where its targets are among the logits that it returns, row after row."""

    inputs: dict[str, Any]
    places: torch.Tensor | None
    """Indices into (rows x positions); None where every one of them has a target."""
    rows: npt.NDArray[np.int64]
    ids: torch.Tensor


def objective_of(
    model: Any, batches: Sequence[Mapping[str, torch.Tensor]], targets: int, objective: str, *, rows: bool = False
) -> Callable[[], Any]:  # fmt: skip
    """What two sides are compared by: nats per target token, or the share of target tokens that are not the likeliest.

    Logits are computed where any row of the batch has a target, if the model can be asked for that, and read a few at
    a time in float32, with sums in float64, so that there is never a second copy of them.

    Parameters
    ----------
    model : transformers or PEFT model
        In evaluation mode: both sides must see the same network.
    batches : sequence of mapping
        Inputs of the forward passes, with labels.
    targets : int
        Target tokens in all of them.
    objective : {"loss", "accuracy"}
        Which.
    rows : bool
        Whether to return each row's mean over its own targets instead, for steps that bound what a row can do.

    Returns
    -------
    callable
        Gives a number, or numbers of shape (rows,) in float64; 0 for a row without targets.

    Raises
    ------
    ValueError
        Rows are asked for where several are packed into one.
    """
    if rows and any("position_ids" in inputs for inputs in batches):
        raise ValueError("packed batches have no rows of their own; use padded ones")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = _arguments(getattr(base.forward, "__func__", base.forward))
    ready = [_prepared(inputs, "use_cache" in known, "logits_to_keep" in known) for inputs in batches]

    def value() -> Any:
        with torch.inference_mode():  # with no_grad, autocast would go on with its casts of weights from before a move
            found = [(batch, _each(model, batch, objective)) for batch in ready]
        if rows:
            return np.concatenate([_by_row(batch, each) for batch, each in found])
        return sum(float(each.sum()) for _, each in found) / targets

    return value


@cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    """Names of what a forward pass can be told; asking takes longer than a small step's noise."""
    return frozenset(inspect.signature(forward).parameters)


def _prepared(inputs: Mapping[str, torch.Tensor], uncached: bool, lean: bool) -> _Batch:
    """What does not change from side to side; in numpy, whose calls cost less than a small model's layers."""
    device = inputs["labels"].device
    labels = inputs["labels"].cpu().numpy()[:, 1:]
    scored = labels != -100
    asked: dict[str, Any] = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    if uncached:
        asked["use_cache"] = False
    positions = labels.shape[1] + 1
    if lean:
        keep = np.flatnonzero(scored.any(axis=0))
        asked["logits_to_keep"] = torch.from_numpy(keep).to(device)
        labels, scored, positions = labels[:, keep], scored[:, keep], len(keep)
    row, place = scored.nonzero()
    places = None if len(row) == len(labels) * positions else torch.from_numpy(row * positions + place).to(device)
    return _Batch(asked, places, row, torch.from_numpy(labels[row, place]).to(device))


def _each(model: Any, batch: _Batch, objective: str) -> torch.Tensor:
    """Of every target, its nats or whether it is not the likeliest; float64."""
    logits = model(**batch.inputs).logits.flatten(0, 1)
    found = torch.empty(len(batch.ids), dtype=torch.float64, device=logits.device)
    size = max(1, CHUNK // logits.shape[-1])
    for start in range(0, len(batch.ids), size):
        end = min(start + size, len(batch.ids))
        part = logits[start:end] if batch.places is None else logits[batch.places[start:end]]
        ids = batch.ids[start:end]
        if objective == "loss":
            found[start:end] = torch.nn.functional.cross_entropy(part.float(), ids, reduction="none")
        else:
            found[start:end] = part.argmax(dim=-1) != ids
    return found


def _by_row(batch: _Batch, each: torch.Tensor) -> npt.NDArray[np.float64]:
    count = len(batch.inputs["input_ids"])
    totals = np.bincount(batch.rows, each.cpu().numpy(), count)
    return np.asarray(totals / np.bincount(batch.rows, minlength=count).clip(min=1))


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
            probes = stepper.step(objective_of(model, passes, targets, mezo.objective), seeds, rates[number])
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
