"""What scores of units are made of: batches, sums over rows, and the pass that reads streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.score import pad_batch
from honeloom.backends.hf.states import Reached, RunningMeans, watched
from honeloom.backends.hf.sublayer_map import Sublayers
from honeloom.dropping.metric_config import DropMetricConfig
from honeloom.dropping.scores import Kind, Score, Unit, UnitScores
from honeloom.errors import NotFiniteError, RowsError

__all__ = ["PaddedBatch", "Pass", "StreamPass", "Tally", "scores_by_kind", "units_of"]


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Rows of a forward pass, each (B, T), int64: token ids, 1 where there is a token, labels (-100 elsewhere).

    Padding may stand on either side. Rows without any token are left out and counted.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    ignored: int = 0

    @classmethod
    def of(cls, batch: Sequence[Encoded] | PaddedBatch, device: torch.device) -> PaddedBatch:
        """Rows in tokens, padded to the right where they are not padded yet."""
        if not isinstance(batch, PaddedBatch):
            real = [e for e in batch if e.ids]
            if not real:
                empty = torch.zeros(0, 0, dtype=torch.int64)
                return cls(empty, empty, empty, len(batch))
            return cls(*pad_batch(real, device), len(batch) - len(real))
        rows = batch.mask.any(dim=1)
        ids, mask, labels = (t[rows].to(device) for t in (batch.ids, batch.mask, batch.labels))
        return cls(ids, mask, labels, batch.ignored + int((~rows).sum()))

    def inputs(self) -> dict[str, Any]:
        """Arguments of a forward pass without a cache; positions count real tokens."""
        given = {"input_ids": self.ids, "attention_mask": self.mask, "use_cache": False}
        if bool(self.mask[:, 0].all()):
            return given
        return {**given, "position_ids": (self.mask.cumsum(dim=1) - 1).clamp_min(0)}

    def counted(self, skip: int) -> torch.Tensor:
        """Where a token counts, (B, T), bool: real ones but the first `skip` of a row."""
        return (self.mask > 0) & (self.mask.cumsum(dim=1) > skip)

    def last(self) -> torch.Tensor:
        """Place of every row's last real token, (B,)."""
        places = torch.arange(self.mask.shape[1], device=self.mask.device)
        return (self.mask * places).argmax(dim=1)


def units_of(config: DropMetricConfig, where: Sublayers, consecutive: Sequence[int]) -> list[Unit]:
    """What a metric scores, in the order in which a forward pass computes it."""
    units = []
    for layer in range(where.count):
        attends, has_mlp = layer not in where.without_attention, layer not in where.without_mlp
        there: Mapping[Kind, bool] = {"attention": attends, "mlp": has_mlp, "block": attends or has_mlp}
        units += [Unit(kind, layer) for kind, present in there.items() if present and kind in config.kinds]
        if "block" in config.kinds:
            units += [Unit("block", layer - n + 1, n) for n in consecutive if layer + 1 >= n > 1]
    return units


class Tally:
    """Sums of one metric over rows, for every unit that it scores."""

    def __init__(
        self, config: DropMetricConfig, where: Sublayers, consecutive: Sequence[int], *, skip: bool = False
    ) -> None:
        self.config, self.where, self.consecutive = config, where, tuple(consecutive)
        self.units = units_of(config, where, consecutive)
        self.means = RunningMeans(len(self.units))
        self.ignored = self.skipped = 0
        self.skip = skip

    def add(self, sums: Mapping[Unit, torch.Tensor], counts_B: torch.Tensor, number: int, dtype: torch.dtype) -> None:
        """Add a batch: of every unit the sum over the tokens of each row, (B,), and how many tokens those are.

        Raises
        ------
        NotFiniteError
            A sum is NaN or infinite; the first unit in the order of computation is named. With `skip` such a row
            counts for no unit instead: attention has carried what is not finite to all of its later tokens.
        """
        values = torch.stack([sums[unit].double() for unit in self.units]).cpu().numpy()
        counts = counts_B.double().cpu().numpy()
        self.ignored += int((counts == 0).sum())
        finite = np.isfinite(values)
        if not finite.all():
            if not self.skip:
                raise _not_finite(self.config, self.units[int(finite.all(axis=1).argmin())], number, dtype)
            odd = ~finite.all(axis=0)
            self.skipped += int(odd.sum())
            values[:, odd], counts[odd] = 0.0, 0.0
        self.means.add(values, np.broadcast_to(counts, values.shape))

    def result(self) -> UnitScores:
        """Scores of all rows; RowsError if none had a token that counts."""
        if not self.units or self.means.rows[0] == 0:
            what = {"losses": "scored token", "gradients": "scored token"}.get(self.config.reads, "token")
            raise RowsError(
                f"metric {self.config.type}: no {what} is left in the calibration rows"
                + (f", of which {self.skipped} gave NaN or infinite numbers" if self.skipped else "")
                + ("; rows need an answer, or text" if what == "scored token" else "; give longer rows")
            )
        means = self.means.means
        found = {unit: Score(float(means[i]), self.means.stderr(i)) for i, unit in enumerate(self.units)}
        return scores_by_kind(
            self.config, self.where, self.consecutive, found,
            rows=int(self.means.rows[0]), tokens=int(self.means.tokens[0]), ignored_rows=self.ignored,
            skipped_rows=self.skipped,
        )  # fmt: skip


def scores_by_kind(
    config: DropMetricConfig,
    where: Sublayers,
    consecutive: Sequence[int],
    found: Mapping[Unit, Score],
    **counts: int,
) -> UnitScores:
    """Scores of units as lists by layer, with None where there is no unit."""
    layers = where.count

    def of(kind: Kind) -> tuple[Score | None, ...]:
        return tuple(found.get(Unit(kind, i)) for i in range(layers)) if kind in config.kinds else ()

    windows = consecutive if "block" in config.kinds else ()
    lists = {n: tuple(found.get(Unit("block", i, n)) for i in range(layers - n + 1)) for n in windows}
    return UnitScores(of("attention"), of("mlp"), of("block"), lists, **counts)


def _not_finite(config: DropMetricConfig, unit: Unit, number: int, dtype: torch.dtype) -> NotFiniteError:
    name = str(dtype).removeprefix("torch.")
    hint = (
        "fp16 overflows above 65504, so use --dtype bf16 or fp32" if dtype == torch.float16 else "look at its weights"
    )
    return NotFiniteError(
        f"metric {config.type}: {unit.kind} of layer {unit.layer} is the first whose numbers are NaN or infinite, in "
        f"batch {number} ({name}); {hint}, or leave such rows out with --on-nan skip"
    )


class Pass(Protocol):
    """A way to read a model, for the metrics that need it."""

    def add(self, batch: PaddedBatch, number: int) -> None:
        """Read one batch."""


class StreamPass:
    """One forward pass scores every unit by the stream before and after it; nothing but row sums is kept.

    For windows of blocks the inputs of the last few layers are held while a batch passes.
    """

    def __init__(
        self, model: Any, where: Sublayers, tallies: Sequence[Tally], functions: Sequence[Callable[..., Any]]
    ) -> None:
        self.model, self.where = model, where
        self.pairs = list(zip(tallies, functions, strict=True))
        self.windows = sorted({n for tally in tallies for n in tally.consecutive if n > 1})
        self.whole = any(not tally.config.last_token for tally in tallies)

    def add(self, batch: PaddedBatch, number: int) -> None:
        """Run one batch up to the last layer; norm and head are not computed."""
        sums: list[dict[Unit, torch.Tensor]] = [{} for _ in self.pairs]
        counted = [batch.counted(getattr(tally.config, "skip_first_tokens", 0)) for tally, _ in self.pairs]
        rows, last = torch.arange(len(batch.ids), device=batch.ids.device), batch.last()
        held: dict[int, torch.Tensor] = {}

        def score(unit: Unit, before: torch.Tensor, after: torch.Tensor) -> None:
            for (tally, function), mask, found in zip(self.pairs, counted, sums, strict=True):
                if unit.kind not in tally.config.kinds:
                    continue
                if tally.config.last_token:
                    one = before if before.ndim == 2 else before[rows, last]
                    found[unit] = function(one, after[rows, last])
                else:
                    values = function(before, after)
                    found[unit] = values.masked_fill(~mask.to(values.device), 0.0).sum(dim=1, dtype=torch.float64)

        def observe(kind: Kind, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
            score(Unit(kind, layer), before, after)
            if kind == "block" and self.windows:
                held[layer] = before if self.whole else before[rows, last]
                for n in self.windows:
                    if layer + 1 >= n:
                        score(Unit("block", layer - n + 1, n), held[layer - n + 1], after)
                held.pop(layer - self.windows[-1] + 1, None)

        with watched(self.model, self.where, observe, stop=True), torch.inference_mode(), suppress(Reached):
            self.model(**batch.inputs())
        for (tally, _), mask, found in zip(self.pairs, counted, sums, strict=True):
            counts = torch.ones_like(last) if tally.config.last_token else mask.sum(dim=1)
            tally.add(found, counts, number, self.model.dtype)
