"""The loaded model of a drop, and everything that is measured on it: importances, losses, speed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from honeloom.backends.hf.chat import Encoded, Encoder, UnrenderableRow
from honeloom.backends.hf.compare import probe_ids
from honeloom.backends.hf.importance import score_units
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer, token_limit
from honeloom.backends.hf.router_inputs import row_losses
from honeloom.backends.hf.sublayers import Sublayers, locate, silenced
from honeloom.checkpoint.architectures import ARCHITECTURES, architecture_of
from honeloom.dropping.config import DropConfig
from honeloom.dropping.plan import Drops, drop_plan
from honeloom.dropping.scores import UnitScores
from honeloom.errors import NotFiniteError, RowsError, SourceError
from honeloom.ops.noise import keyed_uniform
from honeloom.stages.drop_cache import ScoreCache, score_key
from honeloom.stages.drop_source import DropSource
from honeloom.stages.row_records import CALIBRATION_FILE, write_table
from honeloom.stages.rows import scan
from honeloom.stages.work import Work

__all__ = ["Loss", "Session", "beside", "open_session"]

STEPS, WARM = 16, 2
"""Decoding steps that are timed, and those before."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Mean loss in nats per scored token, and by how much it is above the source's.

    `rise_stderr` is paired: of the difference on the same rows; None for fewer than two.
    """

    mean: float
    rise: float
    rise_stderr: float | None


@dataclass(slots=True)
class Session:
    """A loaded model and its calibration rows.

    Attributes
    ----------
    model : transformers model
        The source; returned as it was by all methods here.
    where : Sublayers
        Its halves.
    tokenizer
        None where the model has none.
    encoded : sequence of Encoded
        Calibration rows, longest first.
    measured : sequence of Encoded
        Those on which losses are measured.
    cached : bool
        Whether the importances of the whole model were known from before.
    """

    work: Work[DropConfig]
    model: Any
    where: Sublayers
    tokenizer: Any
    encoded: Sequence[Encoded]
    measured: Sequence[Encoded]
    cached: bool = False
    _losses: dict[tuple[tuple[int, ...], tuple[int, ...]], npt.NDArray[np.float64]] = field(default_factory=dict)

    def scores(self, drops: Drops = ()) -> UnitScores:
        """Importances of the model after some drops; of the whole model they are kept for the next time."""
        config = self.work.config
        windows = (config.block,) if config.consecutive and config.block > 1 else ()
        if drops:
            with self.without(drops) as where:
                return self._measure(where, (), f"score what is left ({len(drops)} gone)")
        cache, token_ids = ScoreCache(score_key(config, self.work.inputs, windows)), _digest(self.encoded)
        known = cache.read(token_ids)
        if known is not None:
            self.cached = True
            self.work.log.say(f"drop: importances of these rows are known from {cache.path}")
            return known
        found = self._measure(self.where, windows, "score layers")
        if not cache.write(found, token_ids):
            self.work.log.say(f"drop: importances could not be kept at {cache.path} for the next time")
        return found

    def _measure(self, where: Sublayers, windows: Sequence[int], label: str) -> UnitScores:
        config, size = self.work.config, self.work.config.batch_size
        starts = self.work.log.track(range(0, len(self.encoded), size), label, -(-len(self.encoded) // size))
        batches = (self.encoded[start : start + size] for start in starts)
        found = score_units(
            self.model, where, batches, [config.metric], consecutive=windows, skip_not_finite=config.on_nan == "skip"
        )[config.metric.type]
        if found.skipped_rows:
            self.work.log.warn(
                f"{found.skipped_rows} calibration rows gave NaN or infinite numbers and are left out of the scores"
            )
        return found

    def without(self, drops: Drops) -> Any:
        """A context within which the model lacks some units."""
        plan = drop_plan(drops, metric="", profile="")
        return silenced(
            self.model, attention=plan.dropped_attention(), mlp=plan.dropped_mlp(), where=self.where
        )  # fmt: skip

    def loss(self, drops: Drops) -> float:
        """Mean loss after some drops, in nats per scored token of the measured rows."""
        return float(self._row_losses(drops).sum() / self._tokens.sum())

    def loss_beside_source(self, drops: Drops) -> Loss:
        """Loss after some drops, beside that of the source on the same rows."""
        return beside(self._row_losses(drops), self._row_losses(()), self._tokens)

    def source_losses(self) -> npt.NDArray[np.float64]:
        """Summed loss of every measured row under the source, (R,); asked for while the model is still whole."""
        return self._row_losses(())

    def _row_losses(self, drops: Drops) -> npt.NDArray[np.float64]:
        if not self.measured:
            raise RowsError(
                "no calibration row has a scored token, so no loss can be measured; rows need an answer, or text, and "
                "the model a tokenizer"
            )
        plan = drop_plan(drops, metric="", profile="")
        key = (plan.dropped_attention(), plan.dropped_mlp())
        if key not in self._losses:
            with self.without(drops):
                losses = row_losses(self.model, self.measured).numpy()
            if not np.isfinite(losses).all():
                raise NotFiniteError(
                    f"the loss without attention {list(key[0])} and MLP {list(key[1])} is NaN or infinite; use --dtype "
                    "fp32, or --measure 0 to go without losses"
                )
            self._losses[key] = losses
        return self._losses[key]

    @property
    def _tokens(self) -> npt.NDArray[np.float64]:
        return np.array([row.targets for row in self.measured], dtype=np.float64)

    def speeds(self, points: Sequence[Drops], context: int) -> list[float]:
        """Tokens per second when one row is decoded behind so many tokens, after the drops of each point.

        The cache is the real one. Points take turns three times, and the median of the steps counts.
        """
        seconds: list[list[float]] = [[] for _ in points]
        for _ in range(3):
            for drops, found in zip(points, seconds, strict=True):
                with self.without(drops):
                    found += _decode_seconds(self.model, context)
        return [1 / median(found) for found in seconds]


def beside(losses: npt.NDArray[np.float64], source: npt.NDArray[np.float64], tokens: npt.NDArray[np.float64]) -> Loss:
    """Loss of rows beside that of the source on the same rows; sums of losses (R,), tokens (R,)."""
    change, total = losses - source, tokens.sum()
    rise, rows = float(change.sum() / total), len(tokens)
    spread = float(np.sqrt(((change - rise * tokens) ** 2).sum() * rows / (rows - 1)) / total) if rows > 1 else None
    return Loss(float(losses.sum() / total), rise, spread)


@torch.inference_mode()
def _decode_seconds(model: Any, context: int) -> list[float]:
    ids = torch.arange(context, device=model.device).unsqueeze(0) % model.get_input_embeddings().weight.shape[0]
    cache, token, seconds = model(input_ids=ids, use_cache=True).past_key_values, ids[:, :1], []
    for _ in range(WARM + STEPS):
        _wait(model.device)
        start = time.perf_counter()
        cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
        _wait(model.device)
        seconds.append(time.perf_counter() - start)
    return seconds[WARM:]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def open_session(work: Work[DropConfig], source: DropSource) -> Session:
    """Load the model, prove that its halves can go, and encode the calibration rows.

    Raises
    ------
    CheckpointError
        The layers are not sums of a stream and their halves.
    RowsError
        No calibration row can be used.
    SourceError
        It is to be healed, and has no tokenizer.
    """
    model = load_model(source.folder, loading=Loading.of(work.config))
    listed = source.stock.get("model_type") in ARCHITECTURES
    where = locate(model, architecture_of(source.stock) if listed else None)
    tokenizer = load_tokenizer(source.folder)
    if work.config.heal and tokenizer is None:
        raise SourceError(f"{source.folder}: no tokenizer, so it cannot be healed on rows; add tokenizer.json")
    encoded = _calibration(work, model, tokenizer) if work.config.calibration else []
    scored = [row for row in encoded if row.targets]
    draws = keyed_uniform(work.config.seed, "drop/measure", [str(i) for i in range(len(scored))])
    picked = sorted(range(len(scored)), key=lambda i: draws[i])[: work.config.measure]
    return Session(work, model, where, tokenizer, encoded, [scored[i] for i in sorted(picked)])


def _calibration(work: Work[DropConfig], model: Any, tokenizer: Any) -> list[Encoded]:
    """Encode the calibration rows: a seeded sample of at most `samples`, longest first."""
    if tokenizer is None:
        work.log.warn(
            "the model has no tokenizer: layers are scored on seeded token ids, which say little of real text"
        )
        ids = probe_ids(None, model.config, work.config.seed)
        return [
            Encoded(ids=tuple(row), scored=(False,) * len(row), chars=0, truncated=False, ends=False) for row in ids
        ]
    config, rows = work.config, scan(work, field="calibration")
    draws = keyed_uniform(config.seed, "drop/calibration", rows.ids)
    chosen = sorted(range(len(rows)), key=lambda i: (draws[i], rows.ids[i]))[: config.samples]
    encoder = Encoder(tokenizer, token_limit(model.config, tokenizer, config.max_length))
    used: dict[str, Encoded] = {}
    for row in rows.take(chosen):
        try:
            used[row.id] = encoder.encode_choices(row)[row.answer] if row.kind == "choice" else encoder.encode(row)
        except UnrenderableRow as error:
            work.log.event("skipped", row=row.id, reason=str(error))
    tokens = sum(len(e.ids) for e in used.values())
    if not tokens:
        raise RowsError("no calibration row could be rendered; look at them with `honeloom rows preview`")
    if "samples" in config.model_fields_set and len(used) < config.samples:
        work.log.warn(
            f"samples {config.samples} are asked for, and there are {len(used)} rows of {tokens:,} tokens in all"
        )
    write_table(work.dir / CALIBRATION_FILE, {"id": list(used)})
    return sorted(used.values(), key=lambda e: -len(e.ids))


def _digest(encoded: Sequence[Encoded]) -> str:
    """SHA-256 of all token ids, and of which of them are scored."""
    digest = hashlib.sha256()
    for row in encoded:
        digest.update(np.array([len(row.ids), *row.ids, *row.scored], dtype="<i8").tobytes())
    return digest.hexdigest()
