"""`export`: a model folder in, one GGUF file out; read back, computed, and compared with the source."""

from __future__ import annotations

from typing import Any

from honeloom.backends.hf.reload_export import GGUF_NAME
from honeloom.checkpoint.export_config import ExportConfig
from honeloom.checkpoint.gguf.quant import FILE_TYPES, QUANTS, kept_wider, retyped
from honeloom.checkpoint.reader import Checkpoint
from honeloom.dropping.export import ExportPlan, export_plan
from honeloom.registry import load_target
from honeloom.stages.export_checks import check_vocabulary, compare_logits
from honeloom.stages.export_source import open_export
from honeloom.stages.work import Outcome, Work
from honeloom.types.plans import DropPlan
from honeloom.types.report import Metric

__all__ = ["execute"]

NOTHING = DropPlan((), (), (), "none", "gguf")
"""A whole model is a dropped one of which nothing went: the same code describes both."""


def execute(work: Work[ExportConfig]) -> Outcome:
    """Run an export."""
    folder = open_export(work.inputs["model"])
    quant = work.config.quant
    write = load_target("honeloom.backends.gguf:write_gguf")  # the package is an extra
    with Checkpoint.open(folder) as checkpoint:
        plan = export_plan(checkpoint, NOTHING)
        tensors = retyped(plan.tensors, quant)
        keys = {**plan.keys, "general.file_type": FILE_TYPES[QUANTS[quant]]}
        work.log.say(f"export: {len(tensors)} tensors as architecture {keys['general.architecture']}, {quant}")
        size = write(work.dir / GGUF_NAME, checkpoint, keys, tensors)
    wider = kept_wider(tensors, quant)
    _tell(work, plan, wider)
    checks, logits = compare_logits(work, folder, sparse=bool(keys.get(f"{keys['general.architecture']}.expert_count")))
    checks += check_vocabulary(work, folder)
    details = {
        "format": "gguf",
        "quant": quant,
        "architecture": keys["general.architecture"],
        "params": plan.params,
        "bytes": size,
        "bytes_source": work.inputs["model"].size,
        "kept_f16": list(wider),
        "vocabulary": keys["tokenizer.ggml.model"],
        "chat_template": "tokenizer.chat_template" in keys,
        "logits": logits,
        "notes": list(plan.notes),
        "loads_in": ["llama.cpp"],
    }
    return Outcome("gguf", GGUF_NAME, _metrics(logits), checks, details, "quantized")


def _tell(work: Work[ExportConfig], plan: ExportPlan, wider: tuple[str, ...]) -> None:
    for note in plan.notes:
        work.log.say(f"export: {note}")
    if plan.keys["tokenizer.ggml.model"] == "no_vocab":
        work.log.warn("the file has no vocabulary, so a server cannot take text: give it token ids")
    if wider:
        work.log.say(f"export: {len(wider)} matrices stay f16, for 32 does not divide their rows, as {wider[0]}")


def _metrics(logits: dict[str, Any]) -> tuple[Metric, ...]:
    n = logits["tokens"]
    return (
        Metric("kl", logits["kl"], n, "nats", False, None, "all"),
        Metric("logits_gap", logits["largest_gap"], n, "logits", False, None, "all"),
    )
