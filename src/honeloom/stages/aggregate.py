"""`aggregate`: PEFT adapters of one base in; one adapter, or the base with their sum added, out; then read back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from honeloom.backends.devices import DTYPES
from honeloom.checkpoint.adapter import LoraFile
from honeloom.checkpoint.adapter_writer import combined_config, write_adapter
from honeloom.checkpoint.folders import copy_config, copy_tokenizer, discard
from honeloom.checkpoint.reader import Checkpoint
from honeloom.checkpoint.spool import Spool, Spooled
from honeloom.checkpoint.writer import TensorStream
from honeloom.errors import ConfigError, IncompatibleModelsError, NotFiniteError
from honeloom.federated.aggregation.warm import whole
from honeloom.federated.config import AggregateConfig
from honeloom.merging.config import TaskArithmeticConfig
from honeloom.merging.engine.recompute import recomputation_error
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.engine.streaming import Merger
from honeloom.ops.rounding import round_once
from honeloom.registry import family
from honeloom.runs.atomic import require_space
from honeloom.stages.aggregate_checks import Exactness, Rule, check_written, measure_written
from honeloom.stages.aggregate_clients import (
    Client,
    averaged_streams,
    bytes_of,
    check_clients,
    module_names,
    open_clients,
    read_parts,
)
from honeloom.stages.merge import warn_of_loss, write_merged
from honeloom.stages.merge_checks import verify_merged
from honeloom.stages.work import Outcome, Work
from honeloom.types.report import Check, Metric

__all__ = ["execute"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes as max_lora_rank."""
_ROOM_FOR_SMALL_FILES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Module:
    """An aggregated module: the clients' ranks in the order given, and its factors put aside."""

    name: str
    ranks: tuple[int, ...]
    b: Spooled
    a: Spooled

    @property
    def rank(self) -> int:
        return self.b.shape[1]


def execute(work: Work[AggregateConfig]) -> Outcome:
    """Run an aggregation."""
    config, into_base = work.config, "into_base" in work.inputs
    rule = partial(family("aggregation").load(config.method.type), **config.method.model_dump(exclude={"type"}))
    with ExitStack() as stack:
        clients = open_clients(work, stack)
        check_clients(work, clients)
        bases = _open_on_base(work, clients, stack) if into_base else None
        folder = work.dir / ".update" if into_base else work.dir
        discard(work.dir / ".update")
        folder.mkdir(exist_ok=True)
        modules = _write_update(work, clients, rule, folder)
        written = stack.enter_context(LoraFile(folder))
        measured = measure_written(clients, written, config.seed)
        checks = check_written(clients, written, rule, config.method.type, measured, config.seed)
        details = _details(clients, modules, measured, bytes_of(written), config)
        if bases is None:
            copy_tokenizer(clients[0].file.folder, work.dir)
            _warn_of_rank(work, details)
        else:
            merged, more = _merge(work, clients, bases, folder, exact=measured.rounding <= 1e-6)
            details, checks = {**details, **merged}, (*checks[1:], *more)
    discard(work.dir / ".update")
    error = Metric("relative_error", measured.relative, len(modules), "of the update's norm", False, None, "all")
    kind, relation = ("model", "finetune") if into_base else ("adapter", "adapter")
    return Outcome("model" if kind == "model" else "adapter", ".", (error,), checks, details, relation)


def _write_update(work: Work[AggregateConfig], clients: Sequence[Client], rule: Rule, folder: Path) -> list[_Module]:
    """Combine module after module and write the result as an adapter; only one module is in memory at a time."""
    config, into_base = work.config, "into_base" in work.inputs
    # What goes into a base is rounded once, there.
    dtype = torch.float64 if into_base else DTYPES["fp32" if config.dtype == "auto" else config.dtype]
    elements = sum(c.file.weights.info(n).elements for c in clients for n in c.file.weights.names())
    require_space(folder, 2 * 2 * elements * dtype.itemsize + _ROOM_FOR_SMALL_FILES)
    averaged = averaged_streams(clients, dtype)
    names = module_names(clients)
    work.log.say(f"aggregate: {config.method.type} of {len(clients)} adapters, {len(names)} modules")
    with Spool(folder / ".factors") as spool:
        read_as = torch.float64 if into_base else None
        tracked = work.log.track(names, "aggregate modules", len(names))
        modules = [_combine(clients, name, rule, spool, read_as) for name in tracked]
        same = all(set(client.file.factors) == set(names) for client in clients)
        settings = combined_config([c.file.config for c in clients], {m.name: m.rank for m in modules}, same=same)
        write_adapter(folder, settings, [*_factor_streams(clients, modules, spool, dtype), *averaged])
    return modules


def _combine(clients: Sequence[Client], name: str, rule: Rule, spool: Spool, read_as: torch.dtype | None) -> _Module:
    parts = read_parts(clients, name, read_as)
    try:
        b, a = whole(rule(parts))
    except IncompatibleModelsError as error:
        given = ", ".join(client.name for client in clients)
        raise IncompatibleModelsError(f"module {name!r} of {given}: {error}") from None
    if not bool(torch.isfinite(b).all() and torch.isfinite(a).all()):
        raise NotFiniteError(f"module {name!r}: the aggregate has values beyond the range of {b.dtype}")
    ranks = dict(zip((client.place for client in clients), (part.rank for part in parts), strict=True))
    return _Module(name, tuple(ranks[i] for i in range(len(clients))), spool.put(b), spool.put(a))


def _factor_streams(
    clients: Sequence[Client], modules: Sequence[_Module], spool: Spool, dtype: torch.dtype
) -> Iterator[TensorStream]:
    """Both factors of every module, under the names that the clients' files have."""
    for module in modules:
        names = next(c.file.factors[module.name] for c in clients if module.name in c.file.factors)
        for name, place in ((names.a_name, module.a), (names.b_name, module.b)):
            yield TensorStream(name, dtype, place.shape, partial(_rounded, spool, place, name, dtype))


def _rounded(spool: Spool, place: Spooled, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    tensor = spool.get(place)
    if tensor.dtype is not dtype:
        tensor = round_once(tensor.double(), dtype)
    if not bool(torch.isfinite(tensor).all()):
        raise NotFiniteError(f"the tensor {name!r} has values beyond the range of {dtype}; choose dtype: fp32 or bf16")
    yield tensor


def _open_on_base(
    work: Work[AggregateConfig], clients: Sequence[Client], stack: ExitStack
) -> tuple[ModelSource, list[ModelSource]]:
    """Open the base alone and under every adapter, which refuses whatever does not fit it before any work."""
    found = work.inputs["into_base"]
    if found.base is not None:
        raise ConfigError(f"into_base {found.value!r} is an adapter; give the model that the adapters were tuned on")
    folder = found.paths[0]
    base = stack.enter_context(ModelSource(found.value, folder))
    return base, [stack.enter_context(ModelSource(c.name, c.file.folder, folder)) for c in clients]


def _merge(
    work: Work[AggregateConfig],
    clients: Sequence[Client],
    bases: tuple[ModelSource, list[ModelSource]],
    update: Path,
    *,
    exact: bool,
) -> tuple[dict[str, Any], tuple[Check, ...]]:
    """Write the base plus the update as a merge of one model, and check it against the adapters themselves."""
    base, alone = bases
    dtype = None if work.config.dtype == "auto" else DTYPES[work.config.dtype]
    with ModelSource("the aggregated adapter", update, base.folder) as combined:
        merger = Merger.of(TaskArithmeticConfig(), [combined], [1.0], base, dtype)
        size = write_merged(work, merger)
        copy_config(base.folder, work.dir, dtype=None if dtype is None else str(dtype).removeprefix("torch."))
        copy_tokenizer(base.tokenizer_folder, work.dir)
        warn_of_loss(work, merger)
        checks, _ = verify_merged(work, merger)
    if exact:
        direct = Merger.of(TaskArithmeticConfig(), alone, [c.share * c.scale for c in clients], base, dtype)
        with Checkpoint.open(work.dir) as result:
            error = recomputation_error(direct, result, seed=work.config.seed)
        claim = "base plus every adapter's own share, in samples: largest error in units of the last place"
        checks += (Check(claim, error, 0.51, error <= 0.51),)
    return {"lost_delta_fraction": merger.lost_delta_fraction, "bytes_written": size}, checks


def _details(
    clients: Sequence[Client], modules: Sequence[_Module], measured: Exactness, size: int, config: AggregateConfig
) -> dict[str, Any]:
    """Ranks, bytes and errors; clients in the order given."""
    listed = sorted(clients, key=lambda client: client.place)
    sent = [bytes_of(client.file) for client in listed]
    rank = max(module.rank for module in modules)
    return {
        "method": config.method.type,
        "base_model": next((client.base for client in listed if client.base), None),
        "scale": config.scale,
        "relative_error": measured.relative,
        "ranks_in": [client.rank for client in listed],
        "rank_out": rank,
        "bytes_up": sum(sent),
        "bytes_down": size * len(clients),
        "vllm_max_lora_rank": next((r for r in VLLM_RANKS if r >= rank), None),
        "clients": [
            {"adapter": client.name, "weight": client.share, "rank": client.rank, "bytes_up": up, "bytes_down": size}
            for client, up in zip(listed, sent, strict=True)
        ],
        "modules": [
            {"module": m.name, "ranks": list(m.ranks), "rank": m.rank, "relative_error": measured.modules[m.name]}
            for m in modules
        ],
    }


def _warn_of_rank(work: Work[AggregateConfig], details: dict[str, Any]) -> None:
    if details["vllm_max_lora_rank"] is None:
        work.log.warn(
            f"rank {details['rank_out']} is beyond {VLLM_RANKS[-1]}, the largest max_lora_rank of vLLM (it takes "
            f"{', '.join(map(str, VLLM_RANKS))}): lower it with --method svd --rank {VLLM_RANKS[-1]}, or merge it with "
            "--into-base"
        )
