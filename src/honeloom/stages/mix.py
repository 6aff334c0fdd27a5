"""`mix`: trained models in, one mixture of experts out, then loaded and held to each expert in turn."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from honeloom.checkpoint.folders import discard
from honeloom.checkpoint.reader import Checkpoint
from honeloom.checkpoint.writer import TensorStream, write_tensors
from honeloom.mixture.config import MixConfig
from honeloom.mixture.layout import active_elements
from honeloom.mixture.mergekit_moe import differences
from honeloom.runs.atomic import write_json
from honeloom.stages.mix_checks import verify_mixture
from honeloom.stages.mix_inputs import Design, Parts, open_parts, plan_mixture
from honeloom.stages.mix_plan import runtime_notes
from honeloom.stages.mix_router import FOLDER, Gates, make_gates
from honeloom.stages.mix_tuning import Tuned, tune
from honeloom.stages.mix_use import measure_use
from honeloom.stages.mix_write import bytes_read, lay_out, patch_gates, write_small_files, write_tensors_of
from honeloom.stages.row_records import CALIBRATION_FILE, write_table
from honeloom.stages.work import Outcome, Work

__all__ = ["execute"]

_TUNED, _TUNED_RECORD = "tuned.safetensors", "tuned.json"


def execute(work: Work[MixConfig]) -> Outcome:
    """Run a mix."""
    config = work.config
    for note in differences(config):
        work.log.say(f"mix: {note}")
    with ExitStack() as stack:
        parts = open_parts(work, stack)
        design = plan_mixture(work, parts)
        _announce(work, parts, design)
        gates = make_gates(work, parts, design)
        entries = lay_out(config, parts, design, gates)
        tuned = _tuned_before(work, gates)
        written = write_tensors_of(work, parts, design, entries, tuned.gates if tuned else gates)
        write_small_files(work, parts, design, gates)
        if config.tune_router.steps and tuned is None:
            tuned = tune(work, parts, design, gates)
            _keep(work, tuned)
            patch_gates(work, entries, tuned.gates)
        if tuned is not None:
            gates = tuned.gates
        started = time.monotonic()
        checks = verify_mixture(work, parts, design)
        use = measure_use(work, parts, design, gates)
        work.log.event("verified", took=round(time.monotonic() - started, 3))
        _warn_of_idle(work, use.shares)
        details = {
            "level": config.level, "experts": list(design.names), "top_k": design.top_k,
            "dense_layers": config.dense_layers, "format": design.format, "base": parts.trunk.name, **use.to_json(),
            "router": {"type": config.router.type, "gate": gates.kind, "input": config.input, **gates.to_json()},
            "params": {
                "total": sum(e.elements for e in entries),
                "active": active_elements(entries, design.top_k, len(parts.experts)),
            },
            "bytes_read": bytes_read(entries, parts), "bytes_written": written,
            "models": [{"model": s.name, "sha256": _fingerprint(work, s.name)} for s in parts.distinct.values()],
        }  # fmt: skip
        if tuned is not None:
            details["tuned"] = {"steps": len(tuned.losses), "unit": tuned.unit, "losses": list(tuned.losses)}
        if gates.domains is not None:
            write_table(work.dir / CALIBRATION_FILE, {"id": [row.id for row in gates.domains.rows]})
    discard(work.dir / FOLDER)
    return Outcome("model", checks=checks, details=details, relation="merge")


def _announce(work: Work[MixConfig], parts: Parts, design: Design) -> None:
    config = work.config
    names = ", ".join(design.names)
    work.log.say(
        f"mix: {design.format}, level {config.level}, {len(design.names)} experts ({names}), top {design.top_k}"
    )
    if design.reason:
        work.log.say(f"mix: no standard format: {design.reason}")
    for note in runtime_notes(design.format, len(design.names), config.dense_layers, shared=parts.shared is not None):
        work.log.say(f"mix: {note}")


def _tuned_before(work: Work[MixConfig], gates: Gates) -> Tuned | None:
    """What an interrupted attempt has trained."""
    record = work.dir / FOLDER / _TUNED_RECORD
    if not record.is_file():
        return None
    kept = json.loads(record.read_bytes())
    found: dict[str, dict[str, torch.Tensor]] = {key: {} for key in gates.by_key}
    with Checkpoint(work.dir / FOLDER, [work.dir / FOLDER / _TUNED]) as stored:
        for full in stored.names():
            key, _, name = full.partition("/")
            info = stored.info(full)
            found[key][name] = stored.read_slice(full, 0, info.elements).view(info.shape)
    by_key = {key: replace(gate, tensors=found[key]) for key, gate in gates.by_key.items()}
    work.log.say("mix: the gates were trained before")
    return Tuned(replace(gates, by_key=by_key), tuple(kept["losses"]), kept["unit"])


def _keep(work: Work[MixConfig], tuned: Tuned) -> None:
    tensors = {f"{key}/{name}": t for key, gate in tuned.gates.by_key.items() for name, t in gate.tensors.items()}
    write_tensors(work.dir / FOLDER / _TUNED, [TensorStream.of(n, t.contiguous()) for n, t in tensors.items()])
    write_json(work.dir / FOLDER / _TUNED_RECORD, {"losses": list(tuned.losses), "unit": tuned.unit})


def _warn_of_idle(work: Work[MixConfig], shares: tuple[float, ...]) -> None:
    idle = [name for name, share in zip(work.config.names, shares, strict=True) if share == 0]
    if idle and len(shares) > 1:
        work.log.warn(
            f"no row that was looked at goes to {', '.join(idle)}; give the router more of their prompts or rows, or "
            "leave them out"
        )


def _fingerprint(work: Work[Any], name: str) -> str | None:
    return next((i.fingerprint for i in work.inputs.values() if i.value == name and i.kind == "model"), None)
