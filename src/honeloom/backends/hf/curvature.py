"""Curvature and batch noise of a model's loss before its first zeroth-order step, and the settings they give."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from honeloom.backends.devices import memory_guard
from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.local_steps import collator
from honeloom.backends.hf.objectives import objective_of
from honeloom.backends.hf.tune import row_order, total_steps
from honeloom.backends.hf.zeroth_order import perturbed, rates_of, step_batches
from honeloom.errors import ConfigError, NotFiniteError
from honeloom.runs.atomic import write_json
from honeloom.runs.log import Log
from honeloom.runs.processes import world_size
from honeloom.tuning.config import MezoConfig, MezoTuningConfig, TuneConfig
from honeloom.tuning.curvature import BATCHES, Curvature, Rung, estimate, passes_of

__all__ = ["curvature_details", "estimate_for", "settled"]

FILE = "curvature.json"
SHARE = 10
"""A given rate is only checked where training has at least so many times the passes that the check takes."""


def estimate_for(
    model: Any, batches: Sequence[tuple[Sequence[Mapping[str, torch.Tensor]], int]], mezo: MezoConfig, *, seed: int
) -> Curvature:
    """Measure around a model as it is; its weights are afterwards what they were, to the bit.

    Parameters
    ----------
    model : transformers or PEFT model
        Put into evaluation mode.
    batches : sequence of (inputs, targets)
        Each as large as a step's: inputs of its forward passes with labels, and the target tokens in them.
    mezo : MezoConfig
        For what is perturbed.
    seed : int
        Of the directions, which no training has.

    Raises
    ------
    ConfigError
        What is perturbed is not in float32.
    NotFiniteError
        As of `estimate`.
    """
    params = perturbed(model.eval(), mezo)
    return estimate([objective_of(model, passes, targets, "loss") for passes, targets in batches], params, seed=seed)


def settled(
    model: Any, encoded: Sequence[Encoded], config: TuneConfig, folder: Path, log: Log, *, device: torch.device,
    autocast: torch.dtype | None = None,
) -> tuple[TuneConfig, dict[str, Any] | None]:  # fmt: skip
    """Replace `auto` by what the first batches tell, and warn of a given rate that is too large.

    A given rate is checked where that takes at most a tenth of training's passes, and the objective is the loss.
    What was found is kept in `folder`, so that an interrupted training goes on with the same numbers.

    Parameters
    ----------
    model, encoded, config, folder, log, device, autocast
        As of `train_zeroth_order`.

    Returns
    -------
    (TuneConfig, dict or None)
        Settings with numbers alone, and details for the report; None where nothing was measured.

    Raises
    ------
    ConfigError
        A rate is to be found where the loss has no curvature.
    NotFiniteError
        Losses around the start are not finite, and a number is to be found there.
    """
    mezo = config.optimizer
    assert isinstance(mezo, MezoTuningConfig)  # the caller chose by it
    wanted = "auto" in (config.lr, mezo.mu)
    if world_size() > 1 or not (wanted or _worth_it(len(encoded), config, mezo)):
        return config, None
    try:
        found = _kept(folder / FILE) or _measured(model, encoded, config, mezo, folder, log, device, autocast)
    except NotFiniteError as error:
        if wanted:
            raise
        log.warn(f"the loss's curvature was not measured: {error}")
        return config, None
    lr, mu, rate = _numbers(config, mezo, found, total_steps(len(encoded), config))
    details = curvature_details(found, mezo.directions, rate=rate)
    details |= {"lr": lr, "mu": mu, "chosen": "auto" if config.lr == "auto" else "given"}
    log.say(_line(details))
    _warn(details, log)
    return config.model_copy(update={"lr": lr, "optimizer": mezo.model_copy(update={"mu": mu})}), details


def curvature_details(found: Curvature, directions: int, *, rate: float | None) -> dict[str, Any]:
    """What the report says of it, as plain data: curvature, noise, bounds, the rate of `auto`, and the distances."""
    bound, ceiling = found.bound(directions), found.ceiling(directions)
    return {
        "trace": found.trace,
        "trace_stderr": found.trace_stderr,
        "largest": found.largest,
        "largest_stderr": found.largest_stderr,
        "effective_rank": found.effective_rank,
        "stable_rank": found.stable_rank,
        "signal": found.signal,
        "signal_stderr": found.signal_stderr,
        "bound": bound if bound < float("inf") else None,
        "ceiling": ceiling if ceiling < float("inf") else None,
        "rate": rate,
        "width": found.width,
        "passes": found.passes,
        "ladder": [[rung.mu, rung.change, rung.trace] for rung in found.ladder],
    }


def _worth_it(rows: int, config: TuneConfig, mezo: MezoConfig) -> bool:
    steps = total_steps(rows, config)
    passes = passes_of(_count(rows, config))
    return mezo.objective == "loss" and SHARE * passes <= 2 * mezo.directions * steps


def _count(rows: int, config: TuneConfig) -> int:
    """Batches to measure on: the rows once, but at least two batches, and not more than are of use."""
    return max(2, min(BATCHES, rows // (config.batch_size * config.accumulate)))


def _measured(
    model: Any, encoded: Sequence[Encoded], config: TuneConfig, mezo: MezoConfig, folder: Path, log: Log,
    device: torch.device, autocast: torch.dtype | None,
) -> Curvature:  # fmt: skip
    """Estimate on the first batches of the training order, and keep it."""
    group = config.batch_size * config.accumulate
    order = row_order(
        len(encoded), _count(len(encoded), config) * group, config.seed, lengths=[len(e.ids) for e in encoded],
        group=group if config.group_by_length else 0,
    )  # fmt: skip
    batches = list(step_batches([encoded[i] for i in order], config, collator(config.packing, encoded), device))
    log.say(f"tune: {passes_of(len(batches))} passes measure the loss's curvature")
    computing: AbstractContextManager[Any] = torch.autocast(device.type, autocast) if autocast else nullcontext()
    with memory_guard(device, "training", ["--batch-size 1", "--max-length 512"]), computing:
        found = estimate_for(model, batches, mezo, seed=config.seed)
    folder.mkdir(exist_ok=True)
    write_json(folder / FILE, asdict(found))
    return found


def _kept(path: Path) -> Curvature | None:
    if not path.exists():
        return None
    stored = json.loads(path.read_bytes())
    found = Curvature(**{**stored, "ladder": ()})
    return replace(found, ladder=tuple(Rung(**rung) for rung in stored["ladder"]))


def _numbers(
    config: TuneConfig, mezo: MezoTuningConfig, found: Curvature, steps: int
) -> tuple[float, float, float | None]:  # fmt: skip
    """Rate and distance in force, and the rate that auto would take; None where there is none."""
    shares = rates_of(config.model_copy(update={"lr": 1.0}), steps)
    rate = None
    try:
        rate = found.rate(mezo.directions, sum(share**2 for share in shares))
    except ValueError as error:
        if config.lr == "auto":
            raise ConfigError(f"lr auto: {error}; give lr as a number") from None
    lr = rate if rate is not None and config.lr == "auto" else config.learning_rate
    return lr, found.mu if mezo.mu == "auto" else mezo.mu, rate


def _line(details: Mapping[str, Any]) -> str:
    rank, share = details["effective_rank"], max(0.0, details["signal"])
    told = f"effective rank about {rank:.0f}" if rank is not None else "no effective rank, some of it is negative"
    return (
        f"tune: curvature {details['trace']:.3g} ± {details['trace_stderr']:.1g}, {told}; {share:.0%} of a batch's "
        f"gradient is signal; lr {details['lr']:.3g}, mu {details['mu']:g} ({details['chosen']})"
    )


def _warn(details: Mapping[str, Any], log: Log) -> None:
    """Warn of a rate at which the loss can only go up."""
    ceiling, lr, rate = details["ceiling"], details["lr"], details["rate"]
    if ceiling is not None and lr > ceiling:
        told = f"; --lr auto takes {rate:.2g}" if rate is not None else ""
        log.warn(f"lr {lr:g} is above {ceiling:.2g}, from which on steps go up in the mean at the start{told}")
