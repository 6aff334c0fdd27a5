"""What a merge method must know of each model's own rows: measured model by model, kept until the merge is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from honeloom.backends.devices import choose_device, choose_dtype, free_memory, memory_guard, release_memory
from honeloom.backends.hf.chat import Encoded, Encoder, UnrenderableRow
from honeloom.backends.hf.load import load_config, load_tokenizer, token_limit
from honeloom.backends.hf.measure import (
    MeasuredModel,
    fisher_diagonals,
    gram_bytes,
    gram_matrices,
    shared_inputs,
)
from honeloom.checkpoint.folders import discard
from honeloom.checkpoint.reader import Checkpoint
from honeloom.checkpoint.writer import TensorStream, write_tensors
from honeloom.data.rowset import RowSet
from honeloom.errors import ConfigError, RowsError, SourceError
from honeloom.merging.config import MergeMethodConfig
from honeloom.merging.engine.embeddings import Layout, RowReader, permuted
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.engine.streaming import Rows
from honeloom.merging.engine.tensors import Read
from honeloom.merging.merge_config import MergeConfig
from honeloom.ops.noise import keyed_uniform
from honeloom.runs.atomic import canonical_json, require_space, write_json
from honeloom.stages.rows import read_split, tell_rejected
from honeloom.stages.work import Work
from honeloom.system import resident_bytes

__all__ = ["FOLDER", "Measured", "measure_models"]

FOLDER = ".measured"
"""In the work folder; it goes when the merge is written."""
_RECORD = "measured.json"


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of every model.

    Attributes
    ----------
    kind : {"fisher", "gram"}
        Diagonals of the Fisher information, or Gram matrices of inputs.
    data : mapping
        Place of a source in the configuration -> tensor's name in that model -> Read.
    models : tuple of dict
        Model, rows and tokens of each measurement, for the report.
    ids : tuple of str
        Of all rows, each once.
    """

    kind: str
    data: Mapping[str, Mapping[str, Read]]
    models: tuple[dict[str, Any], ...]
    ids: tuple[str, ...]

    def in_order(
        self, rows: Mapping[str, Rows], layout: Layout | None, sources: Mapping[str, ModelSource]
    ) -> Mapping[str, Mapping[str, Read]]:
        """`data` with the diagonals of tensors that are merged by token in the order of the result's vocabulary.

        Where a model's row is not its own (it lacks the token), it knows nothing of it: the diagonal is 0 there.
        """
        if self.kind != "fisher" or layout is None:
            return self.data  # a layer's input does not depend on the order of its outputs
        places = np.arange(len(layout.models))[:, None]
        own = replace(layout, owner=np.where(layout.owner == places, layout.owner, -1))
        found = {}
        for place, reads in self.data.items():
            k, moved = layout.models.index(sources[place].name), {}
            for name in rows.keys() & reads.keys():
                reader = RowReader(reads[name], max(layout.held), prod(rows[name].shape[1:]))
                moved[name] = permuted([reader] * len(layout.models), own)[k]
            found[place] = {**reads, **moved}
        return found


def measure_models(work: Work[MergeConfig], sources: Mapping[str, ModelSource], stack: ExitStack) -> Measured | None:
    """Measure every model on the rows that its source names; once where two sources name the same model and rows.

    What an interrupted attempt has measured is taken from `FOLDER` of the work folder.

    Parameters
    ----------
    work : Work
        Of the merge.
    sources : mapping
        Opened models by the place of their source.
    stack : ExitStack
        Closes the measured files.

    Returns
    -------
    Measured or None
        None if the method needs no data.

    Raises
    ------
    ConfigError
        A source names no rows, or `max_memory` does not hold a model.
    SourceError, RowsError
        A model has no tokenizer, or none of its rows can be used.
    """
    config, method = work.config, work.config.method
    if not isinstance(method, MergeMethodConfig) or not method.data:
        return None
    for place, source in config.sources():
        if not source.rows:  # the configuration lets it pass for a base
            raise ConfigError(f"{place}.rows: {method.type} measures each model on rows of its own domain; name them")
    device = choose_device(config.device)
    data, done = {}, dict[str, tuple[dict[str, Any], Mapping[str, Read]]]()
    for place, _ in config.sources():
        task = _Task(work, place, sources[place], method, device)
        key = canonical_json(task.settings())
        if key not in done:
            done[key] = task.result(stack)
        data[place] = done[key][1]
    records = [record for record, _ in done.values()]
    ids = tuple(dict.fromkeys(row for record in records for row in record["ids"]))
    told = tuple({k: record[k] for k in ("model", "rows", "tokens")} for record in records)
    return Measured(method.data, data, told, ids)


@dataclass(frozen=True, slots=True)
class _Task:
    """One model and its rows."""

    work: Work[MergeConfig]
    place: str
    source: ModelSource
    method: MergeMethodConfig
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """To compute in; the configuration's is that of the result."""
        return choose_dtype("auto", self.device)

    @property
    def folder(self) -> Path:
        return self.work.dir / FOLDER / self.place

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return {
            "measured": self.method.data,
            **{name: getattr(self.method, name) for name in sorted(self.method.measured)},
            "model": self.work.inputs[f"{self.place}.model"].fingerprint,
            "rows": [found.fingerprint for found in self.work.rows(f"{self.place}.rows")],
            "seed": self.work.config.seed,
            "device": self.device.type,
            "dtype": str(self.dtype),
        }

    def result(self, stack: ExitStack) -> tuple[dict[str, Any], Mapping[str, Read]]:
        """The record of the measurement, made now unless it is there, and the tensors, opened."""
        file = self.folder / _RECORD
        record: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {}
        if record.get("settings") == self.settings():
            self.work.log.say(f"merge: {self.source.name} was measured before")
        else:
            record = self._measured()
            write_json(file, record)
        files = [self.folder / name for name in record["files"]]
        stored = stack.enter_context(Checkpoint(self.folder, files))
        reads = {n: partial(stored.read_slice, kept, dtype=torch.float64) for n, kept in record["tensors"].items()}
        return record, reads

    def _measured(self) -> dict[str, Any]:
        """Measure, and write the tensors."""
        ids, rows = self._rows()
        tokens = sum(len(row.ids) for row in rows)
        self.work.log.say(f"merge: measuring {self.source.name} on {len(rows)} rows, {tokens:,} tokens")
        self._require_memory()
        discard(self.folder)
        self.folder.mkdir(parents=True)
        advice = ["--device cpu"] * (self.device.type != "cpu") + ["shorter rows"]
        with memory_guard(self.device, f"measuring {self.source.name}", advice):
            tensors, files = self._write(rows)
        release_memory()
        return {
            "settings": self.settings(), "model": self.source.name, "rows": len(rows), "tokens": tokens, "ids": ids,
            "files": files, "tensors": tensors,
        }  # fmt: skip

    def _write(self, rows: Sequence[Encoded]) -> tuple[Mapping[str, str], list[str]]:
        """Tensor -> its name in the files, and the files."""
        model = MeasuredModel.load(self.source, device=self.device, dtype=self.dtype)
        if self.method.data == "fisher":
            require_space(self.work.dir, 4 * sum(map(prod, model.shapes.values())))
            diagonals = fisher_diagonals(model, rows, progress=self.work.log.track)
            return {name: name for name in list(diagonals)}, [self._write_file(0, diagonals)]
        firsts = shared_inputs(model, rows[0])
        sizes = gram_bytes(model, firsts)
        require_space(self.work.dir, sum(sizes.values()))
        self.work.log.say(
            f"merge: {len(sizes)} Gram matrices of {len(firsts)} linear layers, {sum(sizes.values()):,} bytes; other "
            "tensors are averaged"
        )
        grams = gram_matrices(model, rows, firsts, budget=self._budget(), progress=self.work.log.track)
        return firsts, [self._write_file(i, part) for i, part in enumerate(grams)]

    def _write_file(self, number: int, tensors: dict[str, torch.Tensor]) -> str:
        name = f"{number:05d}.safetensors"
        write_tensors(self.folder / name, [TensorStream.of(n, tensor) for n, tensor in tensors.items()])
        tensors.clear()  # before the next ones come
        return name

    def _rows(self) -> tuple[list[str], list[Encoded]]:
        """A seeded sample of the rows, longest first: ids, and what can be trained on."""
        tokenizer = load_tokenizer(self.source.tokenizer_folder)
        if tokenizer is None:
            raise SourceError(f"{self.source.name}: no tokenizer, so it cannot be measured on rows; add tokenizer.json")
        limit = token_limit(load_config(self.source.folder), tokenizer, None)
        files = [f for found in self.work.rows(f"{self.place}.rows") for f in found.files]
        rows = read_split(files, split=None, max_bad=1.0)
        tell_rejected(self.work, rows)
        return self._encoded(rows, Encoder(tokenizer, limit, train=True))

    def _encoded(self, rows: RowSet, encoder: Encoder) -> tuple[list[str], list[Encoded]]:
        draws = keyed_uniform(self.work.config.seed, "merge/data", rows.ids)
        order = sorted(range(len(rows)), key=lambda i: (draws[i], rows.ids[i]))
        chosen = order[: getattr(self.method, "examples", None)]
        usable: list[tuple[str, Encoded]] = []
        for row in rows.take(chosen):
            try:
                encoded = encoder.encode_choices(row)[row.answer] if row.kind == "choice" else encoder.encode(row)
            except UnrenderableRow as error:
                self.work.log.event("skipped", row=row.id, reason=str(error))
                continue
            if encoded.targets:
                usable.append((row.id, encoded))
        name, within = self.source.name, f"within {encoder.max_length} tokens"
        if not usable:
            raise RowsError(
                f"{self.place}.rows: none of the {len(chosen)} rows has anything to train {within}; look at them with "
                "`honeloom rows preview`"
            )
        if len(usable) < len(chosen):
            lost = len(chosen) - len(usable)
            self.work.log.warn(f"{name}: {lost} of {len(chosen)} rows have nothing to train {within}; left out")
        cut = sum(encoded.truncated for _, encoded in usable)
        if cut:
            self.work.log.warn(f"{name}: {cut} of {len(usable)} rows were cut at {encoder.max_length} tokens")
        usable.sort(key=lambda pair: -len(pair[1].ids))  # what does not fit into memory shows at once
        return [row_id for row_id, _ in usable], [encoded for _, encoded in usable]

    def _require_memory(self) -> None:
        """Refuse a limit that the weights and what is summed do not fit into, before they are loaded."""
        limit = self.work.config.max_memory
        if limit is None or self.device.type != "cpu":
            return
        shapes = [info.shape for info in self.source.tensors.values()]
        weights = self.dtype.itemsize * sum(map(prod, shapes))
        widest = max((shape[-1] for shape in shapes if len(shape) == 2), default=0)
        sums = 4 * sum(map(prod, shapes)) if self.method.data == "fisher" else 4 * widest**2
        least = resident_bytes() + weights + sums
        if least > limit:
            raise ConfigError(
                f"max_memory {limit:,}: measuring {self.source.name} on its rows takes at least {least:,} bytes, for "
                f"the whole model is loaded; raise it, or choose a method that needs no rows"
            )

    def _budget(self) -> int:
        """Bytes for sums: half of what is free now, for activations and the file system need some too."""
        free, limit = free_memory(self.device), self.work.config.max_memory
        if limit is not None and self.device.type == "cpu":
            free = min(free, limit - resident_bytes())
        return max(0, free) // 2
