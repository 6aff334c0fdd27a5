"""Healing of a dropped model before it is written: channels scaled in closed form, LoRA, and one merged folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from honeloom.backends.devices import choose_device, choose_dtype, release_memory
from honeloom.backends.hf.chat import Encoded, Encoder
from honeloom.backends.hf.importance_passes import PaddedBatch
from honeloom.backends.hf.load import Loading, load_model, token_limit
from honeloom.backends.hf.router_inputs import row_losses
from honeloom.backends.hf.states import watched
from honeloom.backends.hf.sublayer_map import Half, Sublayers, layer_list
from honeloom.backends.hf.sublayers import silence
from honeloom.backends.hf.tune import add_lora, merge_lora, train
from honeloom.checkpoint.adapter import LoraAdapter
from honeloom.checkpoint.architectures import Architecture, architecture_of, output_tensors
from honeloom.checkpoint.dtypes import torch_dtype
from honeloom.checkpoint.folders import copy_config, copy_tokenizer, discard
from honeloom.checkpoint.reader import Checkpoint
from honeloom.checkpoint.writer import TensorStream, write_checkpoint
from honeloom.dropping.affine import ChannelFit, units_behind_gaps
from honeloom.dropping.config import DropConfig
from honeloom.dropping.export import Source
from honeloom.dropping.plan import Drops
from honeloom.dropping.scores import Kind, Unit
from honeloom.errors import ConfigError
from honeloom.runs.atomic import require_space
from honeloom.stages.drop_session import Loss, Session, beside
from honeloom.stages.drop_source import DropSource
from honeloom.stages.row_records import ROWS_FILE, write_questions
from honeloom.stages.rows import scan
from honeloom.stages.tune import encode_rows
from honeloom.stages.work import Work
from honeloom.tuning.config import LoraMethodConfig, TuneConfig
from honeloom.types.plans import DropPlan
from honeloom.types.report import Check

__all__ = ["HEALED", "Healed", "heal", "require_affine"]

HEALED = ".healed"
PROBES = 8
"""Rows of healing on which the merged weights are compared with those that were trained."""


@dataclass(frozen=True, slots=True)
class _Scaling:
    """Scale (D,) of a tensor's output channels, which lie along `axis`, and what is added to a bias."""

    scale: torch.Tensor
    shift: torch.Tensor
    axis: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor scaled, in its own type."""
        factor = self.scale.to(tensor.device)
        if tensor.ndim == 1:
            return (tensor.double() * factor + self.shift.to(tensor.device)).to(tensor.dtype)
        return (tensor.double() * (factor.unsqueeze(1) if self.axis == 0 else factor)).to(tensor.dtype)


Scales = dict[str, _Scaling]
"""By name on disk."""


@dataclass(frozen=True, slots=True)
class Healed:
    """A healed source: all tensors of the source under their names, those that stay changed.

    `loss` is measured as that of the drop is, on calibration rows; None without those.
    """

    folder: Path
    details: Mapping[str, Any]
    loss: Loss | None
    checks: tuple[Check, ...]


def require_affine(source: Source) -> None:
    """Raise ConfigError where scaling channels of a half cannot be folded into its weights exactly."""
    layout = source.layout
    reason = None
    if layout.listed is None:
        reason = "of which the output projections are not known"
    elif not layout.sequential:
        reason = "whose attention and MLP read the same stream, so no half lies behind a gap"
    elif layout.listed.attention_norm is None or any(".post_feedforward" in name for name in source.names()):
        reason = "whose halves end in a norm, which takes a scale of the weights before it away"
    elif any("expert" in name for name in source.names()):
        reason = "whose MLPs are experts, each with an output of its own"
    if reason:
        raise ConfigError(f"affine: this is a {layout.model_type}, {reason}; leave affine out, --heal ROWS takes it")


def heal(session: Session, source: DropSource, drops: Drops, plan: DropPlan) -> Healed:
    """Heal the dropped model; the session's model is changed, and should be let go.

    Returns
    -------
    Healed
        Its folder stands below the stage's, for the export to read.
    """
    work, config, model = session.work, session.work.config, session.model
    details: dict[str, Any] = {}
    target = work.dir / HEALED
    discard(target)
    with Checkpoint.open(source.folder) as checkpoint:
        architecture = architecture_of(source.stock, checkpoint.names())
        scales: Scales = {}
        before = _row_losses_without(session, drops)
        if config.affine:
            units = units_behind_gaps(source.room, frozenset(plan.dropped_attention()), frozenset(plan.dropped_mlp()))
            scales = _fit(session, checkpoint, architecture, drops, units)
            details["scaled"] = [f"{unit.kind} {unit.layer}" for unit in units]
        silence(model, attention=plan.dropped_attention(), mlp=plan.dropped_mlp(), where=session.where)
        _scale(model, session.where, architecture.disk_layers, scales)
        probes: Sequence[Encoded] = session.measured[:PROBES]
        adapter = None
        if config.heal:
            adapter, trained, encoded = _tune(work, source, session)
            probes, details = encoded[:PROBES], {**details, **trained}
        _round(session, checkpoint, architecture.disk_layers, scales, tuned=adapter is not None)
        expected = row_losses(session.model, probes) if probes else None
        loss = _measured(session)
        _write(target, checkpoint, scales, adapter, architecture)
        exact = {checkpoint.info(name).dtype for name in checkpoint.names()} == {"F32"}
    details["loss"] = {"before": before.mean if before else None, "after": loss.mean if loss else None}
    checks = () if expected is None else (_check(work, target, plan, probes, expected, exact=exact),)
    return Healed(target, details, loss, checks)


def _round(session: Session, checkpoint: Checkpoint, prefixes: Sequence[str], scales: Scales, *, tuned: bool) -> None:
    """What has changed, as the files will have it: losses are then those of the files, whatever rounding takes away."""
    if tuned:
        kinds = {i.dtype for name in checkpoint.names() if len((i := checkpoint.info(name)).shape) == 2}
        session.model = merge_lora(session.model, torch_dtype(kinds.pop()) if len(kinds) == 1 else None)
    for name in scales:
        parameter = _parameter(session.model, session.where, prefixes, name)
        parameter.data = parameter.data.to(torch_dtype(checkpoint.info(name).dtype)).to(parameter.dtype)


def _row_losses_without(session: Session, drops: Drops) -> Loss | None:
    return session.loss_beside_source(drops) if session.measured else None


def _measured(session: Session) -> Loss | None:
    """Loss of the session's model as it is now, beside the source's."""
    if not session.measured:
        return None
    now = row_losses(session.model, session.measured).numpy()
    tokens = np.array([row.targets for row in session.measured], dtype=np.float64)
    return beside(now, session.source_losses(), tokens)


def _fit(
    session: Session, checkpoint: Checkpoint, architecture: Architecture, drops: Drops, units: Sequence[Unit]
) -> Scales:
    """Scales of the halves behind the gaps, one after another: each sees the stream as those before have healed it."""
    config, names = session.work.config, checkpoint.names()
    scales: Scales = {}
    rows = [row for row in session.encoded if row.ids][: max(1, config.samples)]
    for unit in units:
        half: Half = "attention" if unit.kind == "attention" else "mlp"
        outputs = output_tensors(architecture, names, unit.layer, half)
        biased = any(name.endswith("bias") for name in outputs)
        fit = ChannelFit(session.model.config.get_text_config().hidden_size, shifted=biased)
        for start in range(0, len(rows), config.batch_size):
            batch = PaddedBatch.of(rows[start : start + config.batch_size], session.model.device)
            wanted = _streams(session.model, session.where, unit, batch)[1]
            with session.without(drops) as where, _scaled(session.model, where, architecture.disk_layers, scales):
                given, after = _streams(session.model, where, unit, batch)
            real = batch.mask.bool()
            fit.add((after - given)[real], (wanted - given)[real])
        turned = any(
            type(m).__name__ == "Conv1D" for m in layer_list(session.model, session.where)[unit.layer].modules()
        )
        scales |= {name: _Scaling(*fit.solve(), axis=int(turned)) for name in outputs}
    return scales


@torch.inference_mode()
def _streams(model: Any, where: Sublayers, unit: Unit, batch: PaddedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream before and after a half, (B, T, D), float32."""
    held: list[torch.Tensor] = []

    def observe(kind: Kind, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        if (kind, layer) == (unit.kind, unit.layer):
            held[:] = [before.float().clone(), after.float().clone()]

    with watched(model, where, observe):
        model(**batch.inputs())
    return held[0], held[1]


def _scale(model: Any, where: Sublayers, prefixes: Sequence[str], scales: Scales) -> None:
    """Scale the output channels of loaded tensors for good."""
    for name, scaling in scales.items():
        parameter = _parameter(model, where, prefixes, name)
        parameter.data = scaling.of(parameter.data)


@contextmanager
def _scaled(model: Any, where: Sublayers, prefixes: Sequence[str], scales: Scales) -> Iterator[None]:
    """Within it, output channels of loaded tensors are scaled."""
    held = {name: _parameter(model, where, prefixes, name).data for name in scales}
    _scale(model, where, prefixes, scales)
    try:
        yield
    finally:
        for name, data in held.items():
            _parameter(model, where, prefixes, name).data = data


def _parameter(model: Any, where: Sublayers, prefixes: Sequence[str], name: str) -> Any:
    """The loaded parameter of a layer's tensor on disk."""
    prefix = next(p for p in prefixes if name.startswith(p + "."))
    number, _, inner = name[len(prefix) + 1 :].partition(".")
    return layer_list(model, where)[int(number)].get_parameter(inner)


def _tune(
    work: Work[DropConfig], source: DropSource, session: Session
) -> tuple[Path, dict[str, Any], Sequence[Encoded]]:
    """Train LoRA on the silenced model: what is gone has no linear layer that could be adapted."""
    config = work.config
    settings = TuneConfig(
        model=config.model, rows=config.heal, method=LoraMethodConfig(rank=config.heal_rank), lr=config.heal_lr,
        max_steps=config.heal_steps, batch_size=config.heal_batch_size, max_length=config.max_length,
        group_by_length=True,  # rows of all lengths in few steps: less of a batch is padding
        seed=config.seed, device=config.device, dtype=config.dtype, attn=config.attn,
    )  # fmt: skip
    device = choose_device(config.device)
    compute = choose_dtype(config.dtype, device)
    if device.type == "cpu" and compute is torch.float16:
        raise ConfigError("--dtype fp16: a CPU does not train in fp16; use bf16, which needs no loss scaling, or fp32")
    rows = scan(work, field="heal")
    encoder = Encoder(
        session.tokenizer, token_limit(session.model.config, session.tokenizer, config.max_length), train=True
    )
    kept, encoded, _ = encode_rows(replace(work, config=settings), rows, encoder)  # type: ignore[arg-type]
    work.log.say(
        f"drop: healing with LoRA of rank {config.heal_rank}, {config.heal_steps} steps on {len(encoded)} rows"
    )
    session.model = add_lora(session.model, seed=config.seed, **settings.method.model_dump(exclude={"type"}))
    folder, autocast = work.dir / ".heal", None if compute is torch.float32 else compute
    trained = train(
        session.model, encoded, settings, folder / "checkpoints", work.log, device=device, autocast=autocast
    )
    session.model.eval()
    session.model.peft_config["default"].base_model_name_or_path = str(source.folder)
    session.model.save_pretrained(folder / "adapter")
    write_questions(work.dir / ROWS_FILE, rows.take([kept[i] for i in trained.seen]))
    details = {
        "steps": trained.steps, "rows": len(encoded), "tokens": trained.tokens, "rank": config.heal_rank,
        "train_loss": {"first": trained.losses[0], "last": trained.losses[-1]},
    }  # fmt: skip
    return folder / "adapter", details, encoded


def _write(
    target: Path, checkpoint: Checkpoint, scales: Scales, adapter: Path | None, architecture: Architecture
) -> None:
    """The source with its changes, as a model folder: what is dropped is still in it, for the export leaves it out."""
    target.mkdir()
    names = checkpoint.names()
    require_space(target, sum(checkpoint.info(n).end - checkpoint.info(n).start for n in names))
    lora = LoraAdapter(adapter, checkpoint, architecture) if adapter is not None else None
    try:
        write_checkpoint(target, [_stream(checkpoint, name, scales, lora) for name in names])
    finally:
        if lora is not None:
            lora.close()
    copy_config(checkpoint.folder, target)
    copy_tokenizer(checkpoint.folder, target)


def _stream(checkpoint: Checkpoint, name: str, scales: Scales, lora: LoraAdapter | None) -> TensorStream:
    info = checkpoint.info(name)
    changed = name in scales or (lora is not None and name in lora.factors)

    def chunks() -> list[torch.Tensor]:
        tensor = checkpoint.read(name)
        if not changed:
            return [tensor]
        dtype = tensor.dtype
        if name in scales:
            tensor = scales[name].of(tensor.double())
        if lora is not None:
            tensor = lora.add_to(name, 0, tensor.double().flatten()).view(info.shape)
        return [tensor.to(dtype)]

    stored = (lambda: None) if changed else partial(checkpoint.place, name)
    return TensorStream(name, torch_dtype(info.dtype), info.shape, chunks, stored)


def _check(
    work: Work[DropConfig],
    folder: Path,
    plan: DropPlan,
    probes: Sequence[Encoded],
    expected: torch.Tensor,
    *,
    exact: bool,
) -> Check:
    """The merged files give the losses of the model that was healed, with weights rounded to their number type.

    Sums of float32 and of float64 differ in the last bit before they are rounded, now and then to another number.
    """
    release_memory()
    again = load_model(folder, loading=Loading.of(work.config))
    silence(again, attention=plan.dropped_attention(), mlp=plan.dropped_mlp())
    tokens = sum(row.targets for row in probes)
    gap = abs(float((row_losses(again, probes) - expected).sum())) / tokens
    limit = 1e-4 if exact else 5e-3
    return Check("the merged weights have the loss of the healed model (nats per token)", gap, limit, gap <= limit)
