"""`tune`: rows and a model in, an adapter or model out, reloaded and compared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from honeloom.backends.devices import DTYPES, choose_device, choose_dtype, free_memory, release_memory
from honeloom.backends.hf.chat import Encoded, Encoder, UnrenderableRow
from honeloom.backends.hf.compare import largest_gap, packing_leak, row_logits
from honeloom.backends.hf.curvature import settled
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer, token_limit
from honeloom.backends.hf.local_steps import restore_trainable
from honeloom.backends.hf.tune import Trained, add_lora, require_trackers, train, unfreeze
from honeloom.backends.hf.zeroth_order import train_zeroth_order
from honeloom.checkpoint.folders import copy_tokenizer, discard, read_config, refuse_mixture, refuse_quantised
from honeloom.checkpoint.reader import Checkpoint
from honeloom.data.rowset import RowSet
from honeloom.errors import CheckpointError, ConfigError, RowsError, SourceError
from honeloom.planning import FSDP_PROFILE
from honeloom.planning.memory import peak_memory, read_decoder
from honeloom.runs.output import published_name
from honeloom.runs.processes import sharded, world_size
from honeloom.stages.needs import work_of
from honeloom.stages.row_records import ROWS_FILE, write_questions
from honeloom.stages.rows import scan
from honeloom.stages.work import Outcome, Work
from honeloom.tuning.config import LoraMethodConfig, TuneConfig
from honeloom.types.report import Check, Metric

__all__ = ["encode_rows", "execute", "mark_trainable", "require_shardable"]


def execute(work: Work[TuneConfig]) -> Outcome:
    """Run a tuning."""
    config, found = work.config, work.inputs["model"]
    rows = scan(work)
    tokenizer = load_tokenizer(found.paths[0], base=found.base)
    if tokenizer is None:
        raise SourceError(f"{found.value}: no tokenizer, so it cannot be tuned on rows; add tokenizer.json")
    if found.base is not None:
        raise ConfigError(
            f"{found.value} is an adapter; merge it into its base first "
            "(task_arithmetic with weight 1 gives a full model)"
        )
    refuse_mixture(found.paths[0], "tune")
    require_shardable(config)
    require_trackers(config)
    full = config.method.type == "full"
    if full:
        refuse_quantised(found.paths[0], "tune --method full")
    device = choose_device(config.device)
    compute = choose_dtype(config.dtype, device)
    if device.type == "cpu" and compute is torch.float16:
        raise ConfigError("--dtype fp16: a CPU does not train in fp16; use bf16, which needs no loss scaling, or fp32")
    model = _prepare(work, sharded())
    encoder = Encoder(tokenizer, token_limit(model.config, tokenizer, config.max_length), train=True)
    kept, encoded, turn_ends = encode_rows(work, rows, encoder)
    if config.packing and config.load_in != "8bit":  # whose rounding depends on the whole batch, packed or padded
        _require_packing(model, encoded, found.value)
    _warn_of_memory(work, device, max(len(e.ids) for e in encoded))
    work.log.say(f"tune: {config.method.type} on {len(encoded)} rows")
    autocast = None if compute is torch.float32 else compute
    folder = work.dir / "checkpoints"
    curvature = None
    if config.optimizer.type == "mezo":
        config, curvature = settled(model, encoded, config, folder, work.log, device=device, autocast=autocast)
        trained = train_zeroth_order(model, encoded, config, folder, work.log, device=device, autocast=autocast)
    else:
        name = published_name(work.dir)
        trained = train(model, encoded, config, folder, work.log, device=device, name=name, autocast=autocast)
    probes = [list(e.ids) for e in encoded[:4]]
    checks: tuple[Check, ...] = ()
    if sharded():
        in_shards = row_logits(model.eval(), probes, device)  # every process takes part
        if work.leads:
            model = _assemble(work, trained)
            checks = (_check_logits("the assembled weights give the sharded model's logits", in_shards, model, probes),)
    if not work.leads:
        return Outcome("model" if full else "adapter")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _save(work, model, compute if full else None)
    write_questions(work.dir / ROWS_FILE, rows.take([kept[i] for i in trained.seen]))
    logits = row_logits(model, probes)
    del model  # one model at a time: a second copy may not fit
    release_memory()
    checks += _verify(work, logits, probes, turn_ends)
    discard(work.dir / "checkpoints")
    outcome = _outcome(config, trained, checks, trainable=trainable, rows=len(encoded))
    return replace(outcome, details={**outcome.details, "curvature": curvature}) if curvature else outcome


def _outcome(config: TuneConfig, trained: Trained, checks: tuple[Check, ...], *, trainable: int, rows: int) -> Outcome:
    lora = config.method.type == "lora"
    details = {
        "steps": trained.steps,
        "tokens": trained.tokens,
        "label_share": trained.label_share,
        "train_loss": sum(trained.losses) / len(trained.losses),
        "losses": _thinned(trained.losses),
        "trainable_parameters": trainable,
        "rows": rows,
        "processes": world_size(),
        "rows_per_step": config.batch_size * config.accumulate * world_size(),
    }
    relation = "adapter" if lora else "finetune"
    return Outcome("adapter" if lora else "model", ".", _metrics(trained), checks, details, relation)


def require_shardable(config: TuneConfig) -> None:
    """Raise ConfigError where accelerate was asked to shard what cannot be."""
    if not sharded():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(f"FSDP version {version}: only version 2 is supported; a profile for it is {FSDP_PROFILE}")
    if config.load_in:
        raise ConfigError(
            f"load_in {config.load_in}: quantised weights are not sharded; launch without the FSDP profile, "
            "then every GPU holds its own copy"
        )


def encode_rows(work: Work[TuneConfig], rows: RowSet, encoder: Encoder) -> tuple[list[int], list[Encoded], list[bool]]:
    """Encode what can be trained on: positions within the rows, the encoded rows, and whose last turn ends.

    A plain text may be longer than the limit by far and has no turns, so only conversations count for the last.
    """
    kept: list[int] = []
    encoded: list[Encoded] = []
    turn_ends: list[bool] = []
    skipped = cut = 0
    for position, row in enumerate(work.log.track(rows, "read rows", len(rows))):
        try:
            if row.kind == "choice":
                raise UnrenderableRow("multiple-choice rows are for evaluation")
            item = encoder.encode(row)
        except UnrenderableRow as error:
            skipped += 1
            work.log.event("skipped", row=row.id, reason=str(error))
            continue
        cut += item.truncated
        if item.targets:
            kept.append(position)
            encoded.append(item)
            turn_ends += [item.ends] if row.kind == "chat" else []
        else:
            skipped += 1
    if not encoded:
        raise RowsError(
            f"none of the {len(rows)} rows has anything to train within {encoder.max_length} tokens; look at them with "
            "`honeloom rows preview`, or raise --max-length"
        )
    if skipped:
        work.log.warn(f"{skipped} rows have nothing to train within {encoder.max_length} tokens; left out")
    if cut:
        work.log.warn(f"{cut} rows were cut at {encoder.max_length} tokens and do not train their end")
    return kept, encoded, turn_ends


def _warn_of_memory(work: Work[TuneConfig], device: torch.device, tokens: int) -> None:
    """Warn where the estimate is above what is free; a host that runs out ends the process without a word."""
    settings = read_config(work.model())
    try:
        memory = peak_memory(
            read_decoder(settings), work_of(work.config, settings, gpu=device.type == "cuda", tokens=tokens)
        )
    except CheckpointError:  # a family without known sizes
        return
    needed, free = memory.total - memory.weights, free_memory(device)  # the weights are loaded by now
    if needed > free and not sharded():
        work.log.warn(
            f"beside the weights this tuning takes about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free "
            f"on {device}; the same command with --dry-run tells ways that need less"
        )


def _require_packing(model: Any, encoded: Sequence[Encoded], name: str) -> None:
    """Refuse a model that lets a packed row see the one before it."""
    leak = packing_leak(model, encoded[0].ids, encoded[-1].ids)
    if leak > 1e-6:
        raise ConfigError(
            f"packing: {name} lets a row see the row packed before it (its logits move by {leak:.3g}); "
            "leave packing out, --group-by-length saves padding as well"
        )


def _prepare(work: Work[TuneConfig], on_host: bool) -> Any:
    """The model as training begins; on the host if its shards go to the devices from there."""
    config, method = work.config, work.config.method
    loading = Loading.of(config)
    if on_host:
        loading = replace(loading, device="cpu", dtype=_dtype_name(config))
    if method.type == "full":
        # Small updates vanish in 16 bits, so all weights are trained in fp32 and only computed with in less.
        loading = replace(loading, dtype="fp32")
    return mark_trainable(load_model(work.model(), loading=loading), config)


def mark_trainable(model: Any, config: TuneConfig) -> Any:
    """Add LoRA's adapters to a model, or make all its weights trainable."""
    if isinstance(config.method, LoraMethodConfig):
        return add_lora(model, seed=config.seed, **config.method.model_dump(exclude={"type"}))
    return unfreeze(model)


def _dtype_name(config: TuneConfig) -> str:
    """What `auto` means on the device that computes."""
    compute = choose_dtype(config.dtype, choose_device(config.device))
    return next(name for name, dtype in DTYPES.items() if dtype is compute)


def _assemble(work: Work[TuneConfig], trained: Trained) -> Any:
    """The whole trained model on the leading process."""
    model = _prepare(work, on_host=True)
    assert trained.gathered is not None  # the leading process of a sharded job has it
    restore_trainable(model, trained.gathered)
    return model.to(choose_device(work.config.device)).eval()


def _save(work: Work[TuneConfig], model: Any, dtype: torch.dtype | None) -> None:
    """Write the adapter, or the full model in `dtype`."""
    found = work.inputs["model"]
    model.eval()
    if dtype is not None:
        for parameter in model.parameters():  # not `model.to`: the rotary frequencies must stay in fp32
            parameter.data = parameter.data.to(dtype)
    if work.config.method.type == "lora":
        # The base as the user can reach it: a hub id stays one, a folder becomes absolute.
        base = found.value.partition("@")[0] if found.revision else str(found.published or found.paths[0])
        model.peft_config["default"].base_model_name_or_path = base
        model.peft_config["default"].revision = found.revision
        model.peft_config["default"].inference_mode = True
    model.save_pretrained(work.dir)
    copy_tokenizer(found.paths[0], work.dir)


def _check_logits(claim: str, expected: list[torch.Tensor], model: Any, rows: list[list[int]]) -> Check:
    gap = largest_gap(expected, row_logits(model, rows))
    return Check(f"{claim} (largest difference)", gap, 1e-4, gap <= 1e-4)


def _verify(
    work: Work[TuneConfig], logits: list[torch.Tensor], probes: list[list[int]], turn_ends: list[bool]
) -> tuple[Check, ...]:
    """Load the saved files again and compare logits with the model that was trained; count what changed."""
    found, config = work.inputs["model"], work.config
    base = found.paths[0] if config.method.type == "lora" else None
    again = load_model(work.dir, base=base, loading=Loading.of(config))
    ends = sum(turn_ends) / max(1, len(turn_ends))
    if turn_ends and ends < 0.5:
        work.log.warn(f"only {ends:.0%} of the rows train their turn end; raise --max-length")
    changed = _changed_share(work)
    if config.method.type == "full" and changed < 0.5:
        work.log.warn(
            f"only {changed:.0%} of the written weights differ from the source: most changes are smaller than the "
            "number type can express; --dtype fp32 keeps them"
        )
    checks = [_check_logits("the saved files give the trained model's logits", logits, again, probes)]
    if turn_ends:
        checks.append(Check("share of conversations whose turn end is trained", ends, 0.0, ends > 0))
    return (*checks, Check("share of the trained weights that changed", changed, 0.0, changed > 0))


def _changed_share(work: Work[TuneConfig]) -> float:
    """Of the written weights, how many differ from where training began (LoRA's B begins at zero)."""
    changed = total = 0
    if work.config.method.type == "lora":
        with Checkpoint(work.dir, [work.dir / "adapter_model.safetensors"]) as adapter:
            for name in adapter.names():
                if "lora_B" in name or "lora_embedding_B" in name:
                    tensor = adapter.read(name)
                    changed += int(tensor.count_nonzero())
                    total += tensor.numel()
        return changed / total
    with Checkpoint.open(work.model()) as before, Checkpoint.open(work.dir) as after:
        for name in sorted(set(before.names()) & set(after.names())):
            one, other = before.read(name), after.read(name)
            changed += int((one.float() != other.float()).sum())
            total += one.numel()
    return changed / total


def _thinned(losses: Sequence[float]) -> list[tuple[int, float]]:
    """(step, loss) of at most 1,000 steps, evenly spaced, the last one included."""
    stride = max(1, -(-len(losses) // 1000))
    steps = [*range(1, len(losses) + 1, stride)]
    return [(s, losses[s - 1]) for s in steps[:-1]] + [(len(losses), losses[-1])]


def _metrics(trained: Trained) -> tuple[Metric, ...]:
    n = max(1, len(trained.losses) // 10)
    first, last = trained.losses[:n], trained.losses[-n:]
    return (
        Metric("train_loss_first", sum(first) / n, n, "nats/token", False, None, "all"),
        Metric("train_loss_last", sum(last) / n, n, "nats/token", False, None, "all"),
    )
