"""Mixtures of `glue`: which rows teach the router, what is mixed, and whether it is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from honeloom.data.writer import write_selected
from honeloom.errors import HoneloomError
from honeloom.stages.glue_jobs import Jobs
from honeloom.stages.glue_rows import GlueRows, Scored, score_all, side_of
from honeloom.types.report import Report
from honeloom.zoo.choice import assign_rows, fill_unread
from honeloom.zoo.config import GlueConfig, Mixture

__all__ = ["Candidate", "Expert", "mix_all", "teaching_rows"]

_TEACHING = 2 / 3
"""Share of the search rows that routers are made from; the others judge what came of it."""


@dataclass(frozen=True)
class Expert:
    """A model that may be mixed: its name, what to call it in settings, and what it made of the search rows."""

    name: str
    model: str
    scored: Scored


@dataclass(frozen=True)
class Candidate:
    """A mixture that was made, or why it could not be."""

    name: str
    report: Report | None
    scored: Scored | None
    experts: tuple[str, ...]
    reason: str = ""

    def made(self) -> Report:
        """The report of a mixture that was made."""
        assert self.report is not None, f"{self.name} was not made: {self.reason}"
        return self.report


def teaching_rows(rows: GlueRows) -> list[bool]:
    """Which search rows routers may be made from."""
    return [side_of(row_id, "glue/router") < _TEACHING for row_id in rows.search.rows.ids]


def mix_all(
    jobs: Jobs,
    rows: GlueRows,
    members: Sequence[Expert],
    merged: Sequence[Expert],
    clusters: Mapping[str, Sequence[str]],
) -> list[Candidate]:
    """Make and measure every mixture that the settings ask for.

    Parameters
    ----------
    jobs : Jobs
        Runs `mix` and `evaluate`.
    rows : GlueRows
        Their search part teaches routers and judges mixtures, each by rows of its own.
    members : sequence of Expert
        The models as they came.
    merged : sequence of Expert
        One result per cluster, the largest cluster first.
    clusters : mapping
        Name of a cluster's result -> its models.
    """
    config: GlueConfig = jobs.work.config
    found = []
    for mixture in config.mixtures:
        experts = list(merged) if mixture.experts == "clusters" else list(members)
        trunk = None
        if mixture.level != "model":
            first = merged[0]
            inside = set(clusters[first.name])
            experts, trunk = [e for e in members if e.name in inside], first
        found.append(_mix(jobs, rows, mixture, experts, trunk))
    return found


def _mix(jobs: Jobs, rows: GlueRows, mixture: Mixture, experts: list[Expert], trunk: Expert | None) -> Candidate:
    name = mixture.name
    if len(experts) < 2:
        what = "cluster" if mixture.experts == "clusters" else "model of one shape"
        return Candidate(name, None, None, (), f"there is one {what} alone, so there is nothing to mix")
    say = jobs.work.log.say
    try:
        if mixture.level == "stack":
            report, experts = _stack(jobs, mixture, experts)
        else:
            report, experts = _routed(jobs, rows, mixture, experts, trunk)
    except HoneloomError as error:
        say(f"glue: mixture {name} cannot be made: {error}")
        return Candidate(name, None, None, tuple(e.name for e in experts), str(error))
    scored = score_all(jobs, rows.search, {name: jobs.place(report)}, rows.metric, kind="search")[name]
    say(f"glue: mixture {name} of {', '.join(e.name for e in experts)} made")
    return Candidate(name, report, scored, tuple(e.name for e in experts))


def _routed(
    jobs: Jobs, rows: GlueRows, mixture: Mixture, experts: list[Expert], trunk: Expert | None
) -> tuple[Report, list[Expert]]:
    """Experts that are best for no teaching row are left out; the others get their rows."""
    config: GlueConfig = jobs.work.config
    teaching = np.array(teaching_rows(rows))
    owners = np.array(assign_rows(fill_unread({e.name: e.scored.values for e in experts})))
    taken = [e for e in experts if (teaching & (owners == e.name)).any()]
    if len(taken) < 2:
        raise HoneloomError(
            f"{taken[0].name if taken else 'no expert'} is best for every row, so there is nothing to mix"
        )
    folder = jobs.scratch / "routing" / mixture.name
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    for expert in taken:
        chosen = np.flatnonzero(teaching & (owners == expert.name)).tolist()
        file = write_selected(rows.search.rows, chosen, folder, expert.name)
        described.append({"model": expert.model, "name": expert.name, "rows": [str(file)]})
    base = trunk.model if trunk else None
    report = jobs.run(
        "mix", jobs.scratch / "mixtures" / mixture.name, f"mixture {mixture.name}",
        level=mixture.level, experts=described, base_model=base, router=mixture.router.model_dump(mode="json"),
        top_k=mixture.top_k, dense_layers=mixture.dense_layers, seed=config.seed, device=config.device,
        threads=config.threads, encoder=config.base if mixture.level == "model" and not mixture.dense_layers else None,
    )  # fmt: skip
    return report, taken


def _stack(jobs: Jobs, mixture: Mixture, experts: list[Expert]) -> tuple[Report, list[Expert]]:
    """The two best models, layer upon layer: two thirds of the one, then two thirds of the other."""
    config: GlueConfig = jobs.work.config
    totals = [float(np.nansum(e.scored.values[:, 0]) / np.nansum(e.scored.values[:, 1])) for e in experts]
    first, second = (experts[i] for i in np.argsort(totals, kind="stable")[:2])
    layers = jobs.layers(first.model)
    cut = layers // 3
    slices = [
        {"sources": [{"model": first.model, "layer_range": [0, layers - cut]}]},
        {"sources": [{"model": second.model, "layer_range": [cut, layers]}]},
    ]
    report = jobs.run(
        "merge", jobs.scratch / "mixtures" / mixture.name, f"mixture {mixture.name}",
        slices=slices, method={"type": "passthrough"}, seed=config.seed, threads=config.threads,
        chat_template="auto",
    )  # fmt: skip
    return report, [first, second]
