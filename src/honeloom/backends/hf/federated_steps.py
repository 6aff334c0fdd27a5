"""Zeroth-order steps of a federated client, with or without noise that hides single rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.client_rows import ClientRows
from honeloom.backends.hf.local_steps import Collator, collator
from honeloom.backends.hf.objectives import objective_of
from honeloom.errors import ConfigError, NotFiniteError
from honeloom.federated.dp import Draws, PrivateScalar, check_budget, poisson_rows, secret_generator
from honeloom.tuning.config import MezoConfig
from honeloom.tuning.curvature import BATCHES, estimate
from honeloom.tuning.zeroth_order import ZerothOrder, step_seeds
from honeloom.types.federation import LocalJob

__all__ = ["Scalars", "measured", "zeroth_order_steps"]

Sides = Mapping[str, torch.nn.Module]
Scalars = tuple[tuple[float, ...], ...]
"""By step and direction."""


def zeroth_order_steps(
    model: Any, held: ClientRows, job: LocalJob, params: Mapping[str, torch.Tensor], mezo: MezoConfig, *,
    sides: Sides | None,
) -> tuple[Scalars, float]:  # fmt: skip
    """Take a job's steps by forward passes along its directions.

    Parameters
    ----------
    model : transformers or PEFT model
        Changed in place.
    held : ClientRows
        The rows.
    job : LocalJob
        With directions; its settings may hold `dp`.
    params : mapping
        Tensors that are moved, by the names that their numbers are drawn under.
    mezo : MezoConfig
        Of the steps.
    sides : mapping or None
        Of adapters, the linear layers by the names of their weights; their values are kept aside while losses are
        taken. None: all weights are moved there and back.

    Returns
    -------
    tuple
        Scalars by step and direction, and the mean loss where it was finite; with noise 0, for losses are not noised.

    Raises
    ------
    NotFiniteError
        No loss was finite. With noise this is not told, for it would tell of the rows.
    ConfigError
        The noise's accounting does not hold for these rows.
    """
    dp = job.settings.get("dp")
    stepper = ZerothOrder(
        params, mu=mezo.mu, kind=mezo.direction, exact=sides is not None, cache=mezo.setting == "speed", clip=mezo.clip,
        judge=_judge(held, job, mezo) if dp else None,
    )  # fmt: skip
    sides = sides if mezo.setting == "speed" else None
    objectives = _private(model, held, job, sides) if dp else _plain(model, held, job, mezo, sides)
    scalars, losses = [], []
    for seeds, objective in zip(job.directions, objectives, strict=True):
        probes = stepper.step(objective, seeds, job.settings["lr"])
        scalars.append(tuple(probe.scalar for probe in probes))
        losses += [probe.loss for probe in probes if probe.finite]
    if dp:
        return tuple(scalars), 0.0
    if not losses:
        raise NotFiniteError(f"none of {len(scalars)} steps had a finite loss; lower lr or mu, or use --dtype fp32")
    return tuple(scalars), sum(losses) / len(losses)


def measured(
    model: Any, held: ClientRows, job: LocalJob, params: Mapping[str, torch.Tensor], mezo: MezoConfig
) -> dict[str, float]:
    """Curvature and batch noise of a client's loss, and what follows for its steps.

    Raises
    ------
    ConfigError
        The loss has no curvature.
    NotFiniteError
        It is not finite around the start.
    """
    count = max(2, min(BATCHES, len(held.of(job.client)) // int(job.settings["batch_size"])))
    batches = replace(job, settings={**job.settings, "steps": count})
    losses = list(_plain(model, held, batches, mezo))
    found = estimate(losses, params, seed=job.seed)
    try:
        rate = found.rate(mezo.directions, float(job.settings["horizon"]))
    except ValueError as error:
        raise ConfigError(f"lr auto: {error}") from None
    return {
        "trace": found.trace, "largest": found.largest, "signal": found.signal, "mu": found.mu, "rate": rate,
        "bound": found.bound(mezo.directions),
    }  # fmt: skip


def _plain(
    model: Any, held: ClientRows, job: LocalJob, mezo: MezoConfig, sides: Sides | None = None
) -> Iterator[Callable[[], Any]]:
    """What the sides of every step are compared by: the mean over the targets of its rows."""
    collate = collator(False, held.of(job.client))
    for passes in held.batches(job):
        targets = sum(sum(e.scored[1:]) for rows in passes for e in rows)
        yield objective_of(model, _inputs(model, passes, collate), targets, mezo.objective, sides=sides)


def _judge(held: ClientRows, job: LocalJob, mezo: MezoConfig) -> PrivateScalar:
    dp, size, count = job.settings["dp"], int(job.settings["batch_size"]), len(held.of(job.client))
    check_budget(float(dp["delta"]), rows=count)
    if size > count:
        raise ConfigError(f"batch_size {size}: {job.client!r} has {count} rows, and samples of more cannot be drawn")
    return PrivateScalar(float(dp["clip"]), float(dp["noise"]), float(size), mezo.mu, _secret(job, "noise"))


def _private(model: Any, held: ClientRows, job: LocalJob, sides: Sides | None) -> Iterator[Callable[[], Any]]:
    """What the sides of every step are compared by: the losses of a Poisson sample's rows.

    Each row is computed alone, without padding: in one batch, a row changes the others' last bits, which a small mu
    makes large, and so it would change more than its own scalar.
    """
    mine, size = held.of(job.client), int(job.settings["batch_size"])
    draws, collate = _secret(job, "sample"), collator(False, mine)
    for _ in job.directions:
        rows = [mine[i] for i in poisson_rows(len(mine), size / len(mine), draws).tolist()]
        inputs = _inputs(model, [[row] for row in rows], collate)
        yield objective_of(model, inputs, 1, "loss", rows=True, sides=sides) if rows else _nothing


def _secret(job: LocalJob, what: str) -> Draws:
    """Numbers that nobody else can guess, unless a seed says so."""
    seed = job.settings["dp"]["seed"]
    return secret_generator(None if seed is None else step_seeds(int(seed), f"{what}/{job.order}", 0, 1)[0])


def _nothing() -> Any:
    return np.zeros(0)


def _inputs(model: Any, passes: list[list[Encoded]], collate: Collator) -> list[dict[str, torch.Tensor]]:
    return [{k: t.to(model.device) for k, t in collate(rows).items()} for rows in passes]
