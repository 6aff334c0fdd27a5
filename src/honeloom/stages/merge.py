"""`merge`: models of one architecture in, one model out, then loaded, probed and recomputed in samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from honeloom.backends.hf.load import load_config
from honeloom.checkpoint.folders import copy_config, copy_tokenizer, discard
from honeloom.checkpoint.layer_fields import gather_layer_fields
from honeloom.checkpoint.writer import Progress, write_checkpoint
from honeloom.config.load import dump_yaml
from honeloom.merging.engine.layout import picked_layers
from honeloom.merging.engine.streaming import Merger
from honeloom.merging.merge_config import MergeConfig
from honeloom.runs.atomic import require_space, write_bytes
from honeloom.runs.journal import Journal, read_journal
from honeloom.runs.redact import redact
from honeloom.stages.merge_checks import verify_merged
from honeloom.stages.merge_data import FOLDER
from honeloom.stages.merge_inputs import Models, open_models, plan_merge
from honeloom.stages.merge_plan import mergekit_notes
from honeloom.stages.merge_tokens import Matched
from honeloom.stages.row_records import CALIBRATION_FILE, write_table
from honeloom.stages.work import Outcome, Work, resolved_settings
from honeloom.system import give_back_memory

__all__ = ["execute", "warn_of_loss", "write_merged"]

_NOTABLE_LOSS = 0.05
_ROOM_FOR_SMALL_FILES = 64 << 20
_JOURNAL = "merge.journal"


def execute(work: Work[MergeConfig]) -> Outcome:
    """Run a merge."""
    config = work.config
    for note in mergekit_notes(config):
        work.log.say(f"merge: {note}")
    with ExitStack() as stack:
        models = open_models(work, stack)
        merger, matched, measured = plan_merge(work, models, stack)
        work.log.say(
            f"merge: {config.method.type} of {len(models.ordered)} models, {len(merger.parts)} tensors; "
            f"configuration and tokenizer from {merger.donor.name}"
        )
        written = write_merged(work, merger)
        _write_small_files(work, models, merger, matched)
        warn_of_loss(work, merger)
        started = time.monotonic()
        checks, probed = verify_merged(work, merger, allow_nan=config.allow_nan)
        work.log.event("verified", took=round(time.monotonic() - started, 3))
        details = {
            "method": config.method.type,
            "donor": merger.donor.name,
            "lost_delta_fraction": merger.lost_delta_fraction,
            "bytes_read": merger.bytes_in,
            "bytes_written": written,
            "models": [{"model": s.name, "sha256": _fingerprint(work, s.name)} for s in models.ordered.values()],
            "probe": probed.to_json(),
        }
        if matched:
            details["tokenizer"] = matched.to_json()
        if measured:
            details["data"] = list(measured.models)
            write_table(work.dir / CALIBRATION_FILE, {"id": list(measured.ids)})
    discard(work.dir / FOLDER)
    return Outcome("model", checks=checks, details=details, relation="merge")


def write_merged(work: Work[Any], merger: Merger) -> int:
    """Write the tensors as they are computed, going on where an interrupted attempt stopped; returns their bytes."""
    streams = merger.streams()
    present = sum(p.stat().st_size for p in work.dir.glob("*.safetensors")) if work.resumed else 0
    require_space(work.dir, max(0, sum(s.nbytes for s in streams) - present) + _ROOM_FOR_SMALL_FILES)
    journal = work.dir / _JOURNAL
    if work.resumed:
        for entry in read_journal(journal):
            merger.counts.update({name: (lost, count) for name, (lost, count) in entry.get("tensors", {}).items()})
            for name in entry.get("forgotten", ()):
                merger.counts.pop(name, None)
    else:
        journal.unlink(missing_ok=True)
    finished = set(merger.counts)
    if finished:
        work.log.say(f"merge: {len(finished)} of {len(streams)} tensors were written before")
    with Journal(journal) as record, work.log.console.progress("merge tensors", len(streams)) as advance, _one_thread():
        advance(len(finished))

        def keep(names: Sequence[str]) -> None:
            record.append({"tensors": {name: merger.counts[name] for name in names}})

        def forget(names: Sequence[str]) -> None:
            record.append({"forgotten": list(names)})

        progress = Progress(finished, lambda name: advance(1), keep, forget)
        started = time.monotonic()
        size = write_checkpoint(work.dir, streams, threads=merger.threads, progress=progress)
        work.log.event("written", took=round(time.monotonic() - started, 3), threads=merger.threads)
    journal.unlink()
    give_back_memory()
    return size


class _one_thread:
    """Let torch use one thread: tensors are what is shared out among threads."""

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)


def _write_small_files(work: Work[MergeConfig], models: Models, merger: Merger, matched: Matched | None) -> None:
    config, donor = work.config, merger.donor
    changes: dict[str, Any] = {}
    dtype = None
    if config.dtype != "auto" or "quantization_config" in donor.config:
        dtype = str(merger.dtype or merger.default_dtype).removeprefix("torch.")
    picked = picked_layers(config, models.sources)
    if picked is not None:
        changes |= gather_layer_fields(donor.config, picked)
    if not donor.tied and load_config(donor.folder).tie_word_embeddings:  # by default too, as in Gemma
        changes["tie_word_embeddings"] = False
    generation: dict[str, Any] = {}
    if matched:
        found, generation = matched.write(work)
        changes |= found
    else:
        copy_tokenizer(donor.tokenizer_folder, work.dir)
    drop = ("quantization_config",)  # 8-bit weights became what they stand for
    copy_config(donor.folder, work.dir, dtype=dtype, drop=drop, generation=generation, changes=changes)
    write_bytes(work.dir / "merge.yaml", redact(dump_yaml(resolved_settings(work))).encode())


def _fingerprint(work: Work[MergeConfig], name: str) -> str | None:
    return next((i.fingerprint for i in work.inputs.values() if i.value == name and i.kind == "model"), None)


def warn_of_loss(work: Work[Any], merger: Merger) -> None:
    """Say if the output type rounds much of the change away; known once all tensors are written."""
    share = merger.lost_delta_fraction
    if share > _NOTABLE_LOSS:
        work.log.warn(
            f"{share:.0%} of the weights change by less than the output type can express and stay the base's; "
            "dtype: fp32 keeps them, rounding: stochastic keeps them on average"
        )
