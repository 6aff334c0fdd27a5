"""What is checked of every merged model: it loads, computes, is the merge of its parents, and its template renders."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from honeloom.backends.devices import one_thread
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.compare import probe_ids
from honeloom.backends.hf.load import load_config, load_tokenizer
from honeloom.backends.hf.streamed import Probe, checkpoint_weights, probe, source_weights, streamed_model
from honeloom.checkpoint.reader import Checkpoint
from honeloom.errors import CheckpointError, TemplateError
from honeloom.merging.engine.recompute import recomputation_error
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.engine.streaming import Merger
from honeloom.stages.work import Work
from honeloom.types.report import Check

__all__ = ["Probed", "verify_merged"]

_TEXT = (
    "The mill stood at the end of the village, where the river turns to the sea.",
    "Question: What is two plus two? Answer: Two plus two is four.",
)
_TOKENS = 16
_FAR = 1.0


@dataclass(frozen=True, slots=True)
class Probed:
    """Loss on two sentences, in nats per token, of the result and of every model behind it (None: not measured)."""

    loss: float | None = None
    parents: dict[str, float | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        parents = [{"model": model, "loss": loss} for model, loss in self.parents.items()]
        return {"loss": self.loss, "parents": parents}


def verify_merged(work: Work[Any], merger: Merger, *, allow_nan: bool = False) -> tuple[tuple[Check, ...], Probed]:
    """Build the result in transformers, probe it beside its parents, and recompute samples of it.

    Weights are read while they are used, so memory does not grow with the model.
    """
    seed = work.config.seed
    tokenizer = load_tokenizer(work.dir)
    parents = list(dict.fromkeys((merger.donor, *merger.sources.values())))
    cpu = torch.device("cpu")  # one thread of torch each, set once here and not by those who work side by side
    with Checkpoint.open(work.dir) as written, one_thread(cpu), ThreadPoolExecutor(merger.threads) as crew:
        losses = [crew.submit(_parent_loss, source, seed) for source in parents]
        rows = _rows(tokenizer, config := load_config(work.dir), seed)
        with streamed_model(config, checkpoint_weights(written)) as model:
            found = probe(model, rows)
        probed = Probed(_number(found), {s.name: f.result() for s, f in zip(parents, losses, strict=True)})
        error = recomputation_error(merger, written, seed=seed)
    limit = 1.0 if merger.rounding == "stochastic" else 0.5
    on = "two sentences" if tokenizer else "seeded token ids (no tokenizer)"
    claim = "merged values, recomputed in samples by the plain path: largest error in units of the last place"
    checks = (
        Check(f"transformers builds the result and its logits on {on} are finite", found.finite, True,
              found.finite or allow_nan),
        Check(claim, error, limit, error <= limit),
        *template_check(tokenizer),
    )  # fmt: skip
    _warn_of_distance(work, probed)
    return checks, probed


def _parent_loss(source: ModelSource, seed: int) -> float | None:
    """A parent's loss on the same sentences; None where it cannot be built piece by piece."""
    config = copy.copy(load_config(source.folder))
    config.quantization_config = None
    tokenizer = load_tokenizer(source.tokenizer_folder)
    try:
        with streamed_model(config, source_weights(source)) as model:
            return _number(probe(model, _rows(tokenizer, config, seed)))
    except CheckpointError:
        return None


def _rows(tokenizer: Any, config: Any, seed: int) -> list[list[int]]:
    """The beginnings of two sentences: enough to see that a model has forgotten how to write, and quick."""
    return [row[:_TOKENS] for row in probe_ids(tokenizer, config, seed, _TEXT)]


def _number(found: Probe) -> float | None:
    return found.loss if math.isfinite(found.loss) else None


def template_check(tokenizer: Any) -> tuple[Check, ...]:
    """Whether the chat template, if there is one, turns a conversation into tokens."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return ()
    try:
        Encoder(tokenizer, 64)
        renders = True
    except TemplateError:
        renders = False
    return (Check("the chat template renders a conversation", renders, True, renders),)


def _warn_of_distance(work: Work[Any], probed: Probed) -> None:
    """Say if the result predicts plain text far worse than every parent: most often they do not belong together."""
    known = [loss for loss in probed.parents.values() if loss is not None]
    if known and probed.loss is not None and probed.loss > max(known) + _FAR:
        work.log.warn(
            f"on two plain sentences the result's loss is {probed.loss:.2f} nats per token, its parents' are "
            f"{min(known):.2f} to {max(known):.2f}: it may have forgotten how to write; look at the weights, the base "
            "model and the tokenizers"
        )
