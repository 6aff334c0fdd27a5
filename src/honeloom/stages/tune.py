"""`tune`: rows and a model in, an adapter or model out, reloaded and compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from honeloom.backends.hf.chat import Encoded, Encoder, UnrenderableRow
from honeloom.backends.hf.compare import logits_gap
from honeloom.backends.hf.load import load_model, load_tokenizer, max_positions
from honeloom.backends.hf.tune import Trained, add_lora, train, unfreeze
from honeloom.checkpoint.folders import copy_tokenizer, discard
from honeloom.data.rowset import RowSet
from honeloom.errors import ConfigError, RowsError, SourceError
from honeloom.stages.row_records import write_training_rows
from honeloom.stages.rows import scan
from honeloom.stages.work import Outcome, Work
from honeloom.tuning.config import LoraMethodConfig, TuneConfig
from honeloom.types.report import Check, Metric

__all__ = ["execute"]


def execute(work: Work[TuneConfig]) -> Outcome:
    """Run a tuning."""
    config, found = work.config, work.inputs["model"]
    rows = scan(work)
    tokenizer = load_tokenizer(found.paths[0], base=found.base)
    if tokenizer is None:
        raise SourceError(f"{found.value}: no tokenizer, so it cannot be tuned on rows; add tokenizer.json")
    if found.base is not None:
        raise ConfigError(
            f"{found.value} is an adapter; merge it into its base first "
            "(task_arithmetic with weight 1 gives a full model)"
        )
    source = load_model(found.paths[0], device=config.device, dtype=config.dtype)
    limit = max_positions(source.config, tokenizer)
    encoder = Encoder(tokenizer, min(limit, config.max_length or limit), train=True)
    encoded = _encode(work, rows, encoder)
    model = _prepare(source, config)
    work.log.say(f"tune: {config.method.type} on {len(encoded)} rows")
    trained = train(model, encoded, config, work.dir / "checkpoints", work.log)
    _save(work, model)
    discard(work.dir / "checkpoints")
    write_training_rows(work.dir, rows)
    checks = _verify(work, model, encoded, trained)
    return Outcome(
        "adapter" if config.method.type == "lora" else "model",
        metrics=_metrics(trained),
        checks=checks,
        details={
            "steps": trained.steps,
            "tokens": trained.tokens,
            "label_share": trained.label_share,
            "train_loss": sum(trained.losses) / len(trained.losses),
            "losses": _thinned(trained.losses),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "rows": len(encoded),
        },
        relation="adapter" if config.method.type == "lora" else "finetune",
    )


def _encode(work: Work[TuneConfig], rows: RowSet, encoder: Encoder) -> list[Encoded]:
    encoded, skipped, cut, without_end = [], 0, 0, 0
    for row in work.log.track(rows, "read rows", len(rows)):
        try:
            if row.kind == "choice":
                raise UnrenderableRow("multiple-choice rows are for evaluation")
            item = encoder.encode(row)
        except UnrenderableRow as error:
            skipped += 1
            work.log.event("skipped", row=row.id, reason=str(error))
            continue
        cut += item.truncated
        without_end += not item.targets
        if item.targets:
            encoded.append(item)
    if not encoded:
        raise RowsError(f"none of the {len(rows)} rows can be trained on; look at them with `honeloom rows preview`")
    if skipped or without_end:
        work.log.warn(
            f"{skipped + without_end} rows have nothing to train within {encoder.max_length} tokens; left out"
        )
    if cut:
        work.log.warn(f"{cut} rows were cut at {encoder.max_length} tokens and do not train their turn end")
    return encoded


def _prepare(model: Any, config: TuneConfig) -> Any:
    method = config.method
    if isinstance(method, LoraMethodConfig):
        return add_lora(model, seed=config.seed, **method.model_dump(exclude={"type"}))
    return unfreeze(model)


def _save(work: Work[TuneConfig], model: Any) -> None:
    found = work.inputs["model"]
    model.eval()
    if work.config.method.type == "lora":
        # The base as the user can reach it: a hub id stays one, a folder becomes absolute.
        base = found.value if found.revision else str(found.published or found.paths[0])
        model.peft_config["default"].base_model_name_or_path = base
        model.peft_config["default"].revision = found.revision
        model.peft_config["default"].inference_mode = True
    model.save_pretrained(work.dir)
    copy_tokenizer(found.paths[0], work.dir)


def _verify(work: Work[TuneConfig], model: Any, encoded: list[Encoded], trained: Trained) -> tuple[Check, ...]:
    """Load the saved files again and compare logits with the model that was trained."""
    found, config = work.inputs["model"], work.config
    base = found.paths[0] if config.method.type == "lora" else None
    again = load_model(work.dir, base=base, device=config.device, dtype=config.dtype)
    gap = logits_gap(model, again, [list(e.ids) for e in encoded[:4]])
    ends = sum(1 for e in encoded if not e.truncated and e.scored[-1]) / len(encoded)
    return (
        Check("the saved files give the trained model's logits (largest difference)", gap, 1e-4, gap <= 1e-4),
        Check("share of rows whose turn end is trained", ends, 0.0, ends > 0),
    )


def _thinned(losses: Sequence[float]) -> list[tuple[int, float]]:
    """(step, loss) of at most 1,000 steps, evenly spaced, the last one included."""
    stride = max(1, -(-len(losses) // 1000))
    steps = [*range(1, len(losses) + 1, stride)]
    return [(s, losses[s - 1]) for s in steps[:-1]] + [(len(losses), losses[-1])]


def _metrics(trained: Trained) -> tuple[Metric, ...]:
    n = max(1, len(trained.losses) // 10)
    first, last = trained.losses[:n], trained.losses[-n:]
    return (
        Metric("train_loss_first", sum(first) / n, n, "nats/token", False, None, "all"),
        Metric("train_loss_last", sum(last) / n, n, "nats/token", False, None, "all"),
    )
