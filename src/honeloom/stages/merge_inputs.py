"""What a merge reads: models opened by their place, compared, their tokens matched, their rows measured."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from honeloom.backends.devices import DTYPES
from honeloom.backends.hf.load import load_config
from honeloom.checkpoint.architectures import Architecture
from honeloom.checkpoint.layer_fields import gather_layer_fields
from honeloom.errors import ConfigError, IncompatibleModelsError
from honeloom.merging.compatibility import check_compatible, compare_tokenizers
from honeloom.merging.config import MergeMethodConfig
from honeloom.merging.engine.layout import Part, base_use, picked_layers, plan_parts
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.engine.streaming import Merger, chunk_elements
from honeloom.merging.merge_config import MergeConfig
from honeloom.registry import family
from honeloom.stages.merge_data import Measured, measure_models
from honeloom.stages.merge_tokens import Matched, match_tokens
from honeloom.stages.work import Work
from honeloom.system import cores, resident_bytes

__all__ = ["Models", "open_models", "plan_merge"]

_CHECKS = 192 << 20
"""Memory of building a model in transformers and of a probe that reads its weights piece by piece."""


@dataclass(frozen=True, slots=True)
class Models:
    """The opened models of a merge.

    Attributes
    ----------
    sources : dict
        By the place of their source in the configuration ("models.0", "slices.1.sources.0"), and "base_model".
    donor : ModelSource
        Of configuration, tokenizer, names and types: the base, else the first model listed.
    ordered : dict
        Each model once by its name, the donor first.
    """

    sources: dict[str, ModelSource]
    donor: ModelSource
    ordered: dict[str, ModelSource] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture:
        """Of the donor."""
        return self.donor.architecture


def open_models(work: Work[MergeConfig], stack: ExitStack) -> Models:
    """Open every model, one that is listed twice once, and refuse those that do not fit before any weight is read.

    Raises
    ------
    IncompatibleModelsError
        Two models differ where they must agree; the message names field and values.
    """
    opened: dict[tuple[Path, Path | None], ModelSource] = {}
    sources = {}
    for place, found in work.inputs.items():
        if found.kind != "model":
            continue
        where = (found.paths[0], found.base)
        if where not in opened:
            source = ModelSource(found.value, *where, allow_nan=work.config.allow_nan)
            opened[where] = stack.enter_context(source)
        sources[place.removesuffix(".model")] = opened[where]
    first = next(place for place, _ in work.config.sources())
    donor = sources.get("base_model") or sources[first]
    models = Models(sources, donor, {s.name: s for s in (donor, *sources.values())})
    _untie_mixed(work, models)
    _check(work, models)
    return models


def _untie_mixed(work: Work[MergeConfig], models: Models) -> None:
    """Where one model has a head of its own, so has the result, and every tied one gives its embeddings for it."""
    tied = [s for s in models.ordered.values() if s.tied]
    if tied and len(tied) < len(models.ordered):
        names = ", ".join(s.name for s in tied)
        work.log.say(f"merge: {names}: tied embeddings count as head too, for other models have a head of their own")
        for source in tied:
            source.untie()


def _check(work: Work[MergeConfig], models: Models) -> None:
    config = work.config
    configs = {name: load_config(s.folder).to_dict() for name, s in models.ordered.items()}
    tensors = {name: s.tensors for name, s in models.ordered.items()}
    rows = models.donor.by_token if config.tokenizer else ()
    check_compatible(configs, tensors, accept=config.accept, by_token=rows, by_layer=bool(config.slices))
    for name in config.accept:
        work.log.warn(f"accept: {name} may differ between the models; the result has that of {models.donor.name}")
    folders = {name: s.tokenizer_folder for name, s in models.ordered.items()}
    by_token, chosen = config.tokenizer is not None, config.chat_template is not None
    for finding in compare_tokenizers(folders, by_token=by_token, template_chosen=chosen):
        work.log.warn(finding)


def plan_merge(
    work: Work[MergeConfig], models: Models, stack: ExitStack
) -> tuple[Merger, Matched | None, Measured | None]:
    """The merge as a plan, with its memory within the budget; how tokens are matched, and what was measured, if any."""
    config, method = work.config, work.config.method
    needs_tokens = config.tokenizer is not None or config.chat_template not in (None, "auto")
    matched = match_tokens(work, models.sources, models.donor) if needs_tokens else None
    parts = plan_parts(config, models.sources, models.donor, models.architecture)
    _check_layers(config, models)
    arc = isinstance(method, MergeMethodConfig) and method.base == "start"
    if arc and "base_model" in models.sources and len({source.folder for source in _ends(parts, models)}) < 2:
        raise IncompatibleModelsError(f"{method.type}: both ends are the same model; give two different ones")
    base = models.sources.get("base_model") if base_use(method) in ("needed", "allowed") else None
    rows = matched.rows(parts) if matched and config.tokenizer else {}
    measured = measure_models(work, models.sources, stack)  # once all is known to fit
    merger = Merger(
        method,
        family("merging").load(method.type),
        parts,
        models.sources,
        base,
        models.donor,
        None if config.dtype == "auto" else DTYPES[config.dtype],
        _dtype_of(models.donor),
        rows,
        measured.in_order(rows, matched.layout if matched else None, models.sources) if measured else {},
        rounding=config.rounding,
        allow_nan=config.allow_nan,
        seed=config.seed,
    )
    threads = config.threads or cores()
    merger.chunk, merger.threads = chunk_elements(
        parts, method, budget=config.max_memory, resident=resident_bytes(), threads=threads, after=_CHECKS
    )
    return merger, matched, measured


def _check_layers(config: MergeConfig, models: Models) -> None:
    """Refuse picked layers whose config cannot be written, or that attend in different ways and are merged, early."""
    picked = picked_layers(config, models.sources)
    if picked is None:
        return
    gather_layer_fields(models.donor.config, picked)
    for number, part in enumerate(config.slices if "layer_types" not in config.accept else ()):
        members = [models.sources[f"slices.{number}.sources.{j}"] for j in range(len(part.sources))]
        kinds = [
            tuple((source.config.get("layer_types") or ())[slice(*own.layer_range)])
            for source, own in zip(members, part.sources, strict=True)
        ]
        odd = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
        if odd is not None:
            raise IncompatibleModelsError(
                f"slices.{number}: layer_types is {list(kinds[0])} in {members[0].name} and {list(kinds[odd])} in "
                f"{members[odd].name}; to merge them all the same, set accept: [layer_types]"
            )


def _ends(parts: Sequence[Part], models: Models) -> list[ModelSource]:
    """The models of an arc."""
    return [models.sources[place] for place, _ in parts[0].models] if parts else []


def _dtype_of(donor: ModelSource) -> torch.dtype:
    """What 8-bit weights become: the type that the config says the model computes in."""
    name = str(donor.config.get("dtype") or donor.config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"{donor.name}: config.json says dtype {name!r}; set dtype: bf16, fp16 or fp32")
    return found
