"""`extract-lora`: two models in, the low-rank part of their difference out as an adapter; then read back and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from honeloom.backends.devices import DTYPES, one_thread
from honeloom.checkpoint.adapter_writer import combined_config, write_adapter
from honeloom.checkpoint.folders import copy_tokenizer
from honeloom.checkpoint.spool import Spool, Spooled
from honeloom.checkpoint.writer import TensorStream
from honeloom.errors import IncompatibleModelsError, NotFiniteError
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.extract_config import ExtractConfig
from honeloom.merging.extraction import extract_factors
from honeloom.ops.noise import stream_key
from honeloom.ops.rounding import round_once
from honeloom.runs.atomic import require_space
from honeloom.stages.extract_checks import Stated, check_loaded, check_written, difference
from honeloom.stages.extract_models import Target, check_models, choose_targets, measure_outside
from honeloom.stages.work import Outcome, Work
from honeloom.types.report import Metric

__all__ = ["execute"]

_ROOM_FOR_SMALL_FILES = 64 << 20
_MUCH_OUTSIDE = 0.05
_MUCH_LOST = 0.5


@dataclass(frozen=True, slots=True)
class _Module:
    """An extracted module: what is stated of it, and its factors put aside."""

    stated: Stated
    b: Spooled
    a: Spooled

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def execute(work: Work[ExtractConfig]) -> Outcome:
    """Run an extraction."""
    with ExitStack() as stack:
        tuned, base = (
            stack.enter_context(ModelSource(found.value, found.paths[0], found.base))
            for found in (work.inputs["tuned"], work.inputs["base"])
        )
        check_models(work, tuned, base)
        targets = choose_targets(work.config.targets, base)
        spool = stack.enter_context(Spool(work.dir / ".factors"))
        modules = _extract(work, tuned, base, targets, spool)
        size = _write(work, modules, spool)
        copy_tokenizer(tuned.tokenizer_folder, work.dir)
        outside = measure_outside(tuned, base, {t.tensor for t in targets})
        details = _details(work, modules, outside, len(targets), size)
        _tell(work, details)
        checks = check_written(work, tuned, base, [m.stated for m in modules])
    loaded, metrics = check_loaded(work)
    error = Metric(
        "relative_error", details["relative_error"], len(modules), "of the difference's norm", False, None, "all"
    )
    return Outcome("adapter", ".", (error, *metrics), (*checks, *loaded), details, "adapter")


def _extract(
    work: Work[ExtractConfig], tuned: ModelSource, base: ModelSource, targets: Sequence[Target], spool: Spool
) -> list[_Module]:
    """Factor module after module; only one matrix is in memory at a time."""
    config = work.config
    dtype = DTYPES["fp32" if config.dtype == "auto" else config.dtype]
    rank = config.amount()["rank"]
    if rank is not None:  # twice: put aside, and in the file
        elements = sum(min(rank, *t.shape) * sum(t.shape) for t in targets)
        require_space(work.dir, 2 * elements * dtype.itemsize + _ROOM_FOR_SMALL_FILES)
    modules = []
    with one_thread(torch.device("cpu")):
        for target in work.log.track(targets, "extract modules", len(targets)):
            module = _factor(config, difference(tuned, base, target), target, dtype, spool)
            modules += [module] if module else []
    if not modules:
        raise IncompatibleModelsError(
            f"{tuned.name} and {base.name} hold equal weights in all {len(targets)} modules that were compared; "
            "there is nothing to extract. Give two different models, or other --targets"
        )
    return modules


def _factor(
    config: ExtractConfig, delta: torch.Tensor, target: Target, dtype: torch.dtype, spool: Spool
) -> _Module | None:
    """Factors of one difference, rounded, and what they leave of it; None where there is no difference."""
    norm = float(torch.linalg.matrix_norm(delta))
    if norm == 0:
        return None
    low, high = stream_key("extract_lora", config.seed, target.tensor)
    b, a = (round_once(f, dtype) for f in extract_factors(delta, **config.amount(), seed=low | high << 32))
    if not bool(torch.isfinite(b).all() and torch.isfinite(a).all()):
        raise NotFiniteError(f"module {target.module!r}: its factors are beyond the range of {dtype}; use --dtype fp32")
    error = float(torch.linalg.matrix_norm(delta.addmm_(b.double(), a.double(), alpha=-1)))
    return _Module(Stated(target, norm, error), spool.put(b), spool.put(a))


def _write(work: Work[ExtractConfig], modules: Sequence[_Module], spool: Spool) -> int:
    """Write the adapter; returns the bytes of its weights."""
    found = work.inputs["base"]
    # The base as the user can reach it: a hub id stays one, a folder becomes absolute.
    base = found.value.partition("@")[0] if found.revision else str(found.published or found.paths[0])
    like = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": found.revision,
        "bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": any(m.stated.target.transposed for m in modules),
    }  # fmt: skip
    config = combined_config([like], {m.stated.target.module: m.rank for m in modules}, same=False)
    streams = list(_streams(modules, spool))
    require_space(work.dir, sum(s.nbytes for s in streams) + _ROOM_FOR_SMALL_FILES)
    return write_adapter(work.dir, config, streams)


def _streams(modules: Sequence[_Module], spool: Spool) -> Iterator[TensorStream]:
    for module in modules:
        for letter, place in (("A", module.a), ("B", module.b)):
            name = f"base_model.model.{module.stated.target.module}.lora_{letter}.weight"
            yield TensorStream(name, place.dtype, place.shape, partial(_read, spool, place))


def _read(spool: Spool, place: Spooled) -> list[torch.Tensor]:
    return [spool.get(place)]


def _details(
    work: Work[ExtractConfig], modules: Sequence[_Module], outside: dict[str, float], targets: int, size: int
) -> dict[str, Any]:
    """Ranks and errors; `outside` as shares of the whole squared difference."""
    inside, left = (sum(getattr(m.stated, part) ** 2 for m in modules) for part in ("norm", "error"))
    total = inside + sum(outside.values())
    return {
        "base_model": work.inputs["base"].value,
        "rank": max(m.rank for m in modules),
        "relative_error": (left / inside) ** 0.5,
        "total_relative_error": ((left + total - inside) / total) ** 0.5,
        "outside_share": (total - inside) / total,
        "outside": {kind: square / total for kind, square in outside.items()},
        "unchanged_modules": targets - len(modules),
        "bytes_written": size,
        "modules": [
            {"module": s.target.module, "rank": m.rank, "norm": s.norm, "relative_error": s.error / s.norm}
            for m in modules
            for s in (m.stated,)
        ],
    }


def _tell(work: Work[ExtractConfig], details: dict[str, Any]) -> None:
    """Say how near the adapter comes, and warn where that is far."""
    count, error, share = len(details["modules"]), details["relative_error"], details["outside_share"]
    work.log.say(f"extract-lora: rank {details['rank']}, {count} modules, relative error {error:.3g}")
    if error > _MUCH_LOST:
        work.log.warn(
            f"the factors keep {1 - error**2:.0%} of the squared difference of their modules (relative error "
            f"{error:.2f}): a higher --rank, or --energy 0.9, keeps more"
        )
    if share > _MUCH_OUTSIDE:
        parts = ", ".join(f"{kind} {part:.0%}" for kind, part in details["outside"].items() if part >= 0.005)
        work.log.warn(
            f"{share:.0%} of the squared difference lies outside of the adapter ({parts}): it changes linear layers "
            "alone, so base and adapter are that far from the model"
        )
