"""What is checked of every mixture: it loads, computes, and with its gates held to one expert is that expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from honeloom.backends.devices import one_thread
from honeloom.backends.hf.compare import largest_gap, probe_ids
from honeloom.backends.hf.load import Loading, load_config, load_model, load_tokenizer
from honeloom.backends.hf.mixture_use import held_to, pad_rows
from honeloom.backends.hf.streamed import Weights, checkpoint_weights, streamed_model
from honeloom.checkpoint.architectures import ARCHITECTURES
from honeloom.checkpoint.reader import Checkpoint
from honeloom.merging.engine.sources import ModelSource
from honeloom.mixture.config import MixConfig
from honeloom.mixture.layout import Names, Trunk
from honeloom.stages.merge_checks import template_check
from honeloom.stages.mix_inputs import Design, Parts, trunk_of, weights_of, written_dtype
from honeloom.stages.mix_router import plain_config
from honeloom.stages.work import Work
from honeloom.types.report import Check

__all__ = ["opened_mixture", "verify_mixture"]

_TEXT = (
    "The mill stood at the end of the village, where the river turns to the sea.",
    "Question: What is two plus two? Answer: Two plus two is four.",
)
_TOKENS = 16
_LIMIT = 1e-4


@dataclass(frozen=True, slots=True)
class _Probe:
    """Two sentences, and what they are called in claims."""

    rows: list[list[int]]
    called: str

    @classmethod
    def of(cls, source: ModelSource, config: Any, seed: int) -> _Probe:
        """The beginnings of two sentences, or seeded ids where there is no tokenizer."""
        tokenizer = load_tokenizer(source.tokenizer_folder)
        rows = [row[:_TOKENS] for row in probe_ids(tokenizer, config, seed, _TEXT)]
        return cls(rows, "two sentences" if tokenizer else "seeded token ids (no tokenizer)")


def verify_mixture(work: Work[MixConfig], parts: Parts, design: Design) -> tuple[Check, ...]:
    """Check what was written against the models that it was made of; on the CPU, in float32."""
    with one_thread(torch.device("cpu")):
        found = _verify_models(work, parts, design) if work.config.whole_models else _verify_trunk(work, parts, design)
    return (*found, *template_check(load_tokenizer(work.dir)))


@contextmanager
def opened_mixture(work: Work[MixConfig], design: Design) -> Iterator[Any]:
    """The written mixture: one of a known layout reads its weights while it computes, others are loaded."""
    if design.format in ARCHITECTURES:
        with Checkpoint.open(work.dir) as written, ExitStack() as stack:
            yield stack.enter_context(streamed_model(load_config(work.dir), checkpoint_weights(written)))
        return
    yield load_model(work.dir, loading=Loading("cpu", "fp32"))


def _verify_trunk(work: Work[MixConfig], parts: Parts, design: Design) -> tuple[Check, ...]:
    config = plain_config(parts.trunk)
    probe = _Probe.of(parts.trunk, config, work.config.seed)
    trunk = trunk_of(parts, work.config)
    with opened_mixture(work, design) as model:
        free = _logits(model, probe.rows)
        held = []
        for expert in range(len(parts.experts)):
            with held_to(model, expert):
                held.append(_logits(model, probe.rows))
    gap = 0.0
    for expert, logits in enumerate(held):
        with _dense(config, parts, design, trunk, expert) as model:
            gap = max(gap, largest_gap(logits, _logits(model, probe.rows)))
    finite = all(bool(torch.isfinite(row).all()) for row in free)
    claim = (
        f"gates held to one expert after the other: largest difference from the logits of the base with that expert's "
        f"{'MLPs' if work.config.level == 'ffn' else 'layers'} on {probe.called}"
    )
    return (
        Check(f"transformers builds the mixture and its logits on {probe.called} are finite", finite, True, finite),
        Check(claim, gap, _LIMIT, gap <= _LIMIT),
    )


@torch.inference_mode()
def _logits(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits (T, V) of every row, in one pass with padding."""
    ids, mask = pad_rows(rows)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    return [logits[i, : len(row)] for i, row in enumerate(rows)]


@contextmanager
def _dense(config: Any, parts: Parts, design: Design, trunk: Trunk, expert: int) -> Iterator[Any]:
    """The base with the units of one expert, as the types of the result round them, read while it computes."""
    weights = _composed(parts, design, trunk, parts.experts[expert])
    with ExitStack() as stack:
        model = stack.enter_context(streamed_model(config, weights))
        if parts.shared is not None:
            other = stack.enter_context(streamed_model(config, _composed(parts, design, trunk, parts.shared)))
            _add_shared(model, other, trunk, stack)
        yield model


def _composed(parts: Parts, design: Design, trunk: Trunk, unit: ModelSource) -> Weights:
    def read(name: str, start: int, stop: int) -> torch.Tensor:
        source = unit if trunk.routed(trunk.names.stock(name)) else parts.trunk
        return source.read(name, start, stop).to(written_dtype(parts.trunk, name, design.dtype))

    return Weights(f"{parts.trunk.name} with {unit.name}", dict(trunk.tensors), read)


def _add_shared(model: Any, other: Any, trunk: Trunk, stack: ExitStack) -> None:
    """Add the MLPs of another model to those of the routed layers."""
    known = trunk.names.architecture
    for layer in range(trunk.dense, trunk.layers):
        path = f"{known.layers}.{layer}.{known.mlp}"
        shared = other.get_submodule(path)

        def add(module: Any, args: Any, output: torch.Tensor, shared: Any = shared) -> Any:
            return output + shared(*args)

        stack.callback(model.get_submodule(path).register_forward_hook(add).remove)


def _verify_models(work: Work[MixConfig], parts: Parts, design: Design) -> tuple[Check, ...]:
    """Every expert, read from the result, against its own model."""
    finite, gap, called = True, 0.0, ""
    with Checkpoint.open(work.dir) as written:
        for e, source in enumerate(parts.experts):
            config = plain_config(source)
            probe = _Probe.of(source, config, work.config.seed)
            names = Names(source.architecture)
            places = {name: f"experts.{e}.{names.stock(name)}" for name in weights_of(source)}
            inside = Weights(
                str(work.dir), {n: written.info(p).shape for n, p in places.items()}, _reader(written, places)
            )
            with streamed_model(config, inside) as model:
                ours = _logits(model, probe.rows)
            with streamed_model(config, _rounded(source, design)) as model:
                theirs = _logits(model, probe.rows)
            finite = finite and all(bool(torch.isfinite(row).all()) for row in ours)
            gap, called = max(gap, largest_gap(ours, theirs)), probe.called
    load_config(work.dir)
    return (
        Check(f"transformers builds every expert and its logits on {called} are finite", finite, True, finite),
        Check(f"logits of every expert: largest difference from its own model on {called}", gap, _LIMIT, gap <= _LIMIT),
    )


def _reader(written: Checkpoint, places: Mapping[str, str]) -> Callable[[str, int, int], torch.Tensor]:
    return lambda name, start, stop: written.read_slice(places[name], start, stop)


def _rounded(source: ModelSource, design: Design) -> Weights:
    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return source.read(name, start, stop).to(written_dtype(source, name, design.dtype))

    return Weights(source.name, {name: source.info(name).shape for name in weights_of(source)}, read)
