"""`drop`: look, score, choose, heal, write by a profile, reload and compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from honeloom.backends.devices import release_memory
from honeloom.backends.hf.compare import largest_gap, probe_ids, row_logits
from honeloom.backends.hf.load import Loading, load_model
from honeloom.backends.hf.reload_export import GGUF_NAME, reload_export, save_export
from honeloom.backends.hf.sublayers import Sublayers, silence
from honeloom.checkpoint.architectures import ARCHITECTURES
from honeloom.checkpoint.folders import discard
from honeloom.checkpoint.reader import Checkpoint
from honeloom.dropping.choice import Ports, choose
from honeloom.dropping.config import DropConfig
from honeloom.dropping.export import Source, export_plan
from honeloom.dropping.plan import drop_plan
from honeloom.dropping.scores import UnitScores
from honeloom.errors import ConfigError
from honeloom.runs.atomic import write_json
from honeloom.stages.drop_cache import read_scores
from honeloom.stages.drop_costs import Costs
from honeloom.stages.drop_heal import HEALED, Healed, heal, require_affine
from honeloom.stages.drop_report import (
    budget_checks,
    drop_curve,
    drop_details,
    importance_metrics,
    loss_metrics,
    scores_document,
)
from honeloom.stages.drop_session import Session, open_session
from honeloom.stages.drop_source import DropSource, open_source
from honeloom.stages.work import Outcome, Work
from honeloom.types.plans import DropPlan
from honeloom.types.report import Check

__all__ = ["execute"]

LIMIT = 1e-4
"""Largest difference of logits that a written model may have."""


def execute(work: Work[DropConfig]) -> Outcome:
    """Run a drop."""
    config = work.config
    source = open_source(config, work.inputs["model"])
    with Checkpoint.open(source.folder) as checkpoint:
        if config.only is None and source.stock.get("model_type") in ARCHITECTURES:
            _try_profile(config, checkpoint, None)
        session = open_session(work, source)
        if config.only == "scores":
            return _scores_alone(work, session)
        located = _try_profile(config, checkpoint, session.where)
        costs = Costs.of(checkpoint, located, source.folder)
        scores = _known_scores(work, source, session)
        ports = Ports(lambda drops: session.scores(drops) if drops or scores is None else scores, session.loss,
                      costs.units, costs.before)  # fmt: skip
        drops = choose(config, source.room, ports)
        plan = drop_plan(drops, metric="named" if config.layers else config.metric.type, profile=config.profile)
        _write_decision(work, plan, scores)
        curve = drop_curve(session, drops, costs, config.speed_context)
        healed = heal(session, source, drops, plan) if config.heal or config.affine else None
        export, checks = _write(work, source, checkpoint, session, plan, healed)
        details = drop_details(config, plan, drops, export, costs)
    checks = (*checks, *budget_checks(config, drops, costs, export))
    details |= {"curve": curve, "scores_reused": session.cached, "scores_from": config.scores}
    details |= {"healing": healed.details} if healed else {}
    metrics = importance_metrics(config, scores) if scores else ()
    metrics += loss_metrics(session, drops, healed.loss if healed else None)
    if config.profile == "gguf":
        return Outcome("gguf", GGUF_NAME, metrics, checks, details, "finetune")
    return Outcome("model", ".", metrics, checks, details, "finetune")


def _scores_alone(work: Work[DropConfig], session: Session) -> Outcome:
    """Measure importances and drop nothing."""
    scores = session.scores()
    write_json(work.dir / "scores.json", scores_document(scores))
    details = {
        "metric": work.config.metric.type, "rows": scores.rows, "tokens": scores.tokens,
        "ignored_rows": scores.ignored_rows, "skipped_rows": scores.skipped_rows, "scores_reused": session.cached,
    }  # fmt: skip
    check = Check("units that have an importance", float(_count(scores)), 1.0, _count(scores) > 0)
    return Outcome("scores", "scores.json", importance_metrics(work.config, scores), (check,), details)


def _count(scores: UnitScores) -> int:
    return sum(s is not None for kind in (scores.attention, scores.mlp, scores.block) for s in kind)


def _try_profile(config: DropConfig, checkpoint: Checkpoint, where: Sublayers | None) -> Source:
    """Refuse, before anything is scored, a family or a setting that the profile cannot take whatever the plan."""
    nothing = DropPlan((), (), (), config.metric.type, config.profile)
    export_plan(checkpoint, nothing, where)
    source = Source.of(checkpoint, nothing, where)
    halves = config.attention or config.mlp or config.joint or (config.budget and config.kinds != ("block",))
    if config.pairs and halves and config.layers is None and not source.layout.sequential:
        raise ConfigError(
            f"native: attention and MLP of this {source.layout.model_type} "
            + ("read the same stream" if source.layout.listed else "are not of a listed family")
            + ", so the MLP of a layer and the attention of the next never make a block; drop whole blocks (--block N)"
        )
    if config.affine:
        require_affine(source)
    if config.heal and source.layout.listed is None:
        raise ConfigError(
            f"heal: a {source.layout.model_type} is not a listed family, so adapters cannot be merged into its files; "
            "drop without --heal, then tune the result"
        )
    return source


def _known_scores(work: Work[DropConfig], source: DropSource, session: Session) -> UnitScores | None:
    """Importances of the whole model: given, measured, or none where layers are named."""
    config = work.config
    if config.scores is not None:
        return read_scores(work.inputs["scores"].paths[0], config, source.room.layers)
    return session.scores() if config.layers is None else None


def _write_decision(work: Work[DropConfig], plan: DropPlan, scores: UnitScores | None) -> None:
    if scores is not None:
        write_json(work.dir / "scores.json", scores_document(scores))
    write_json(work.dir / "drop_plan.json", plan.to_json())
    work.log.say(f"drop: attention {list(plan.attention)}, mlp {list(plan.mlp)}, blocks {list(plan.block)}")


def _write(
    work: Work[DropConfig], source: DropSource, checkpoint: Checkpoint, session: Session, plan: DropPlan,
    healed: Healed | None,
) -> tuple[Any, tuple[Check, ...]]:  # fmt: skip
    """Write the export, of the healed folder if there is one, and compare it with the source without what went."""
    folder = healed.folder if healed else source.folder
    if healed is None:
        export = export_plan(checkpoint, plan, session.where)
        save_export(work.dir, checkpoint, export)
    else:
        with Checkpoint.open(folder) as other:
            export = export_plan(other, plan, session.where)
            save_export(work.dir, other, export)
    for note in export.notes:
        work.log.say(f"drop: {note}")
    check = _verify(work, folder, session, plan, changed=healed is not None)
    discard(work.dir / HEALED)
    discard(work.dir / ".heal")
    return export, (*(healed.checks if healed else ()), check)


def _verify(work: Work[DropConfig], folder: Path, session: Session, plan: DropPlan, *, changed: bool) -> Check:
    """The written model, opened as its runtimes do, against the source with the dropped halves silenced."""
    config, tokenizer = work.config, session.tokenizer
    ids = probe_ids(tokenizer, session.model.config, config.seed)
    probe = "two sentences" if tokenizer else "seeded token ids (no tokenizer)"
    loading = Loading.of(config)
    if config.profile in ("decilm", "gguf"):  # computed in float32 on the host
        loading = replace(loading, device="cpu", dtype="fp32")
    if changed or loading != Loading.of(config):
        session.model = None
        release_memory()
        session.model = load_model(folder, loading=loading)
        silence(session.model, attention=plan.dropped_attention(), mlp=plan.dropped_mlp())
    else:
        silence(session.model, attention=plan.dropped_attention(), mlp=plan.dropped_mlp(), where=session.where)
    expected = row_logits(session.model, ids)
    session.model = None
    release_memory()
    gap = largest_gap(expected, row_logits(reload_export(work.dir, config.profile, loading=loading), ids))
    opened = {"decilm": "its runtimes' rules give", "gguf": "llama.cpp's rules give", "dropped": "the loader gives"}
    how = opened.get(config.profile, "plain transformers gives")
    return Check(f"{how} the dropped model's logits on {probe} (largest difference)", gap, LIMIT, gap <= LIMIT)
