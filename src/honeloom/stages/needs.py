"""What a stage needs before it runs: memory per device, disk, the command; light, from the model's config alone."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from honeloom.checkpoint.export_config import ExportConfig
from honeloom.checkpoint.folders import read_config
from honeloom.config.base import DEFAULT_MAX_TOKENS, Config, VerbConfig
from honeloom.config.load import parse_scalar
from honeloom.dropping.config import DropConfig
from honeloom.errors import CheckpointError, HoneloomError
from honeloom.federated.continuation import follows
from honeloom.federated.federate_config import FederateConfig
from honeloom.federated.privacy import exposure_of, mode_of
from honeloom.merging.merge_config import MergeConfig
from honeloom.mixture.config import MixConfig
from honeloom.planning import FSDP_PROFILE
from honeloom.planning.disk import SMALL_FILES, tuning_bytes
from honeloom.planning.memory import CUDA_CONTEXT, Decoder, Work, peak_memory, read_decoder
from honeloom.registry import load_target
from honeloom.selection.config import SelectConfig
from honeloom.stages.drop_notes import drop_notes
from honeloom.stages.export_source import export_needs, export_notes
from honeloom.stages.glue_plan import glue_notes
from honeloom.stages.merge_plan import merge_notes
from honeloom.stages.mix_plan import mix_notes
from honeloom.stages.runner import Job
from honeloom.tuning.config import TuneConfig, TuneOptimizer
from honeloom.types.plans import Needs, Setting, StagePlan
from honeloom.zoo.config import GlueConfig

__all__ = ["describe_needs", "on_gpu", "plan_job", "work_of"]

SHARDS = 8
"""GPUs of the sharded setting in the table."""


def plan_job(job: Job, name: str, state: str) -> StagePlan:
    """Describe a job for `--dry-run`, with what it needs unless it is finished.

    Parameters
    ----------
    job : Job
        From `prepare`.
    name, state : str
        Of the stage: its name, and "run" or "reuse".
    """
    plan = job.plan(name, state)
    if state == "reuse":
        return plan
    return replace(plan, needs=describe_needs(job), notes=_notes(job))


def describe_needs(job: Job) -> Needs | None:
    """Memory, disk and command of a stage that runs a model; None where its model is not known yet.

    Parameters
    ----------
    job : Job
        From `prepare`. Of a hub model that is not in the cache only config.json is fetched.
    """
    config = job.config
    if isinstance(config, ExportConfig):
        return export_needs(config, job.inputs)
    if job.verb.name not in ("tune", "evaluate", "select", "drop", "federate") or "model" not in job.inputs:
        return None
    try:
        settings = _model_config(job)
        if settings is None:
            return None
        decoder = read_decoder(settings)
        stored = stored_bits(settings)
        _require_usable(job, stored)
    except HoneloomError as error:
        return Needs(unknown=str(error))
    gpu, tune = on_gpu(config), job.verb.name == "tune"
    work = work_of(config, settings, gpu=gpu)
    others = _tuning_settings(work, stored) if tune else _inference_settings(work, stored)
    memory = peak_memory(decoder, work)
    if job.verb.name == "federate" and getattr(config, "method", None) == "full":
        memory = replace(memory, adapters=4 * decoder.parameters)  # the base beside what is moved
        others = iter(())
    return Needs(
        parameters=decoder.parameters,
        device="gpu" if gpu else "cpu",
        dtype=work.dtype,
        tokens_per_row=work.tokens,
        memory={**memory.to_json(), **({"context": CUDA_CONTEXT, "total": memory.total + CUDA_CONTEXT} if gpu else {})},
        disk_bytes=_disk(job, decoder, work),
        settings=tuple(
            Setting(name, flags, peak_memory(decoder, other).total + CUDA_CONTEXT) for name, flags, other in others
        ),
        command=_command(job),
        sharded_command=_sharded(job) if tune and work.load_in is None else None,
    )


def _model_config(job: Job) -> dict[str, Any] | None:
    found = job.inputs["model"]
    if found.missing:
        folder: Path | None = load_target("honeloom.backends.hub:fetch_config")(found.value)
    else:
        folder = found.base or (found.paths[0] if found.paths else None)
    return read_config(folder) if folder else None


def stored_bits(settings: Mapping[str, Any]) -> str | None:
    """Return "4bit" or "8bit" for a model whose weights are stored quantised, None for any other.

    Parameters
    ----------
    settings : mapping
        Content of config.json.

    Raises
    ------
    CheckpointError
        Quantised to a size that its quantization_config does not tell.
    """
    stored = settings.get("quantization_config")
    if not stored:
        return None
    if isinstance(stored, dict):
        if stored.get("load_in_4bit") or stored.get("bits") == 4:
            return "4bit"
        if stored.get("load_in_8bit") or stored.get("bits") == 8:
            return "8bit"
    raise CheckpointError("its weights are quantised, and quantization_config does not tell whether to 4 or 8 bits")


def _require_usable(job: Job, stored: str | None) -> None:
    """Raise CheckpointError where the stage refuses quantised weights, so that it needs nothing."""
    config: Any = job.config
    if stored is None:
        return
    if getattr(config, "load_in", None):
        raise CheckpointError(f"its weights are quantised already; leave load_in {config.load_in} out")
    if (job.verb.name == "drop" and config.only is None) or (job.verb.name == "tune" and config.method.type == "full"):
        doing = "drop" if job.verb.name == "drop" else "tune --method full"
        raise CheckpointError(f"its weights are quantised, which {doing} refuses; use the model that it was made from")


def on_gpu(config: VerbConfig) -> bool:
    """Whether the job would run on a GPU, as far as can be told without loading torch."""
    if config.device == "auto":
        return shutil.which("nvidia-smi") is not None
    return config.device.startswith("cuda")


def work_of(config: Any, settings: Mapping[str, Any], *, gpu: bool, tokens: int | None = None) -> Work:
    """How a verb's settings use its model.

    Parameters
    ----------
    config : SelectConfig, TuneConfig, DropConfig or EvaluateConfig
        The verb's settings.
    settings : mapping
        Content of the model's config.json.
    gpu : bool
        Where it runs; also what an `auto` number type means.
    tokens : int, optional
        Of the longest row; by default as many as are allowed.
    """
    text = settings.get("text_config") or settings
    longest = text.get("max_position_embeddings") or text.get("n_positions") or DEFAULT_MAX_TOKENS
    work = Work(
        "inference",
        config.batch_size,
        tokens or min(longest, config.max_length or DEFAULT_MAX_TOKENS),
        dtype=config.dtype if config.dtype != "auto" else "bf16" if gpu else "fp32",
        load_in=getattr(config, "load_in", None) or stored_bits(settings),
        eager=getattr(config, "attn", None) == "eager",
        host=not gpu,
    )
    if isinstance(config, SelectConfig) and (tuned := config.method.tunes()):
        return replace(work, mode="lora", rank=tuned[0], batch_size=tuned[1], states=2)
    if isinstance(config, FederateConfig):
        rank = max(client.largest_rank for client in config.members())
        if config.optimizer.type == "mezo":
            if config.method == "full":
                return replace(work, mode="zeroth-order", dtype="fp32")
            return replace(work, mode="zeroth-order", rank=rank)
        return replace(work, mode="lora", rank=rank, states=_states(config.optimizer))
    if not isinstance(config, TuneConfig):
        return work
    return replace(
        work,
        mode="zeroth-order" if config.optimizer.type == "mezo" else config.method.type,
        rank=getattr(config.method, "rank", 0),
        states=_states(config.optimizer),
        accumulate=config.accumulate,
        checkpointing=config.gradient_checkpointing,
    )


def _states(optimizer: TuneOptimizer) -> int:
    """Tensors that an optimizer keeps per weight."""
    if optimizer.type == "mezo":
        return 0
    return 2 if optimizer.type == "adamw" else int(optimizer.momentum > 0)


def _notes(job: Job) -> tuple[str, ...]:
    """What a federation's operator should know, what a merge decides, and what a plan cannot measure."""
    config = job.config
    if isinstance(config, TuneConfig) and config.optimizer.type == "mezo":
        return _mezo_notes(config)
    if isinstance(config, MergeConfig):
        return merge_notes(config, job.inputs)
    if isinstance(config, MixConfig):
        return tuple(mix_notes(config, job.inputs))
    if isinstance(config, GlueConfig):
        return glue_notes(config, job.inputs)
    if isinstance(config, ExportConfig):
        return export_notes(config, job.inputs)
    if isinstance(config, DropConfig):
        return drop_notes(config, job.inputs)
    if not isinstance(config, FederateConfig):
        return ()
    return (*exposure_of(config).lines(), *_traffic(config, _model_config(job)))


def _traffic(config: FederateConfig, settings: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Bytes per round, as far as they are known beforehand."""
    told = "traffic per round and client: up {}, down {} at most, before framing"
    steps = 4 * config.local_steps * getattr(config.optimizer, "directions", 1)
    asked = math.ceil(config.participation * len(config.members()))
    if config.uplink == "seed-pool":
        up = (8 if config.privacy.secagg else 4) * config.pool_size
        return (told.format(_kb(up), _kb(8 * config.pool_size)),)
    if settings is None or config.targets != "all-linear":
        return ()
    unit = 4 * read_decoder(settings).adapter_widths
    sizes = [client.rank_in(1, 0) * unit for client in config.members()]
    most = max(sizes)
    down = _mb({"flora-stack": sum(sorted(sizes)[-asked:])}.get(mode_of(config.aggregation.type), most))
    if config.uplink == "scalars":
        followed = follows(config.aggregation.type, config.uplink, config.server.type)
        return (told.format(_kb(steps), _kb(steps * asked) if followed else down),)
    return (told.format(f"{_mb(min(sizes))} to {_mb(most)}", down),)


def _kb(count: int) -> str:
    return f"{count / 1e3:,.2f} kB"


def _mezo_notes(config: TuneConfig) -> tuple[str, ...]:
    """Of zeroth-order steps: their rate depends on a curvature that takes the weights to measure."""
    if config.lr == "auto":
        return ("lr auto: about 200 forward passes before the first step measure the curvature that tells the rate",)
    if config.optimizer.type == "mezo" and config.optimizer.objective == "loss":
        return (
            f"lr {config.learning_rate:g} is checked against the loss's curvature before the first step, if training "
            "is long enough for that; --lr auto takes it from there",
        )
    return ()


def _mb(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def _tuning_settings(work: Work, stored: str | None) -> Iterator[tuple[str, str, Work]]:
    """(name, flags, job) of the usual ways to tune a model on GPUs, one row at a time; LoRA alone on stored bits."""
    rows = work.batch_size * work.accumulate
    small = f"--batch-size 1 --accumulate {rows} --gradient-checkpointing --dtype bf16"
    one = replace(
        work, mode="lora", host=False, batch_size=1, accumulate=rows, checkpointing=True, dtype="bf16", load_in=None,
        rank=work.rank or 8,
    )  # fmt: skip
    if stored:
        yield f"LoRA on the stored {_BITS[stored]}", small, replace(one, load_in=stored)
        return
    yield "LoRA, bf16", small, one
    yield "QLoRA, 4 bits", f"{small} --load-in 4bit", replace(one, load_in="4bit")
    yield "all weights, bf16", f"--method full {small}", replace(one, mode="full")
    sharded = replace(one, mode="full", processes=SHARDS)
    yield f"all weights, sharded over {SHARDS} GPUs", f"--method full {small}, with the FSDP profile", sharded
    yield "zeroth-order, bf16", f"--optimizer mezo {small}", replace(one, mode="zeroth-order")


_BITS = {"4bit": "4 bits", "8bit": "8 bits"}


def _inference_settings(work: Work, stored: str | None) -> Iterator[tuple[str, str, Work]]:
    bf16 = replace(work, dtype="bf16", load_in=stored, host=False)
    if stored:
        yield f"the stored {_BITS[stored]}", "--dtype bf16", bf16
        return
    yield "bf16", "--dtype bf16", bf16
    yield "8 bits", "--dtype bf16 --load-in 8bit", replace(bf16, load_in="8bit")
    yield "4 bits", "--dtype bf16 --load-in 4bit", replace(bf16, load_in="4bit")


def _disk(job: Job, decoder: Decoder, work: Work) -> int:
    """Bytes that are written at most, as `space_needed` asks for of a tuning, and those of the download."""
    download = 2 * decoder.parameters if job.inputs["model"].missing else 0
    rows = sum(i.size for i in job.inputs.values() if i.kind == "rows")
    if job.verb.name == "drop":
        return download + decoder.parameters * 2
    if job.verb.name != "tune":
        return download + rows + SMALL_FILES
    dtype = job.config.dtype
    return download + tuning_bytes(
        decoder, full=work.mode == "full", rank=work.rank, states=work.states, dtype=dtype, rows=rows
    )


_PLACES = {
    "tune": ("model", "rows"),
    "select": ("rows",),
    "evaluate": ("model",),
    "drop": ("model",),
    "federate": ("model",),
}
"""Settings that stand as arguments, in their order."""


def _arguments(job: Job) -> list[str]:
    """The verb's command line: its arguments, and by --set whatever is not a default."""
    config, places = job.config, _PLACES[job.verb.name]
    found = [a for name in places for a in _as_list(getattr(config, name))]
    for key, value in config.model_dump(mode="json").items():
        default = _plain(type(config).model_fields[key].get_default(call_default_factory=True))
        if key not in places and value != default:
            changed = _changed(value, default, getattr(config, key))
            found += [a for k, v in _flat(key, changed) for a in ("--set", f"{k}={_yaml(v)}")]
    return [*found, "--output-dir", "OUT"]


def _as_list(value: Any) -> list[str]:
    return list(value) if isinstance(value, tuple) else [str(value)]


def _changed(value: Any, default: Any, given: Any = None) -> Any:
    """Of settings in parts, those that are no defaults: of the same method, or of the one that is given instead."""
    if not isinstance(value, dict):
        return value
    if not isinstance(default, dict) or value.get("type") != default.get("type"):
        own = {
            name: field.get_default(call_default_factory=True)
            for name, field in (type(given).model_fields if isinstance(given, Config) else {}).items()
            if not field.is_required()
        }
        default = {k: _plain(v) for k, v in own.items() if k != "type"}
    return {
        k: _changed(v, default.get(k), getattr(given, k, None))
        for k, v in value.items()
        if k not in default or v != default[k]
    }


def _plain(value: Any) -> Any:
    """As a dump for JSON has it."""
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if inner is not None:
                yield from _flat(f"{key}.{name}", inner)
    else:
        yield key, value


def _yaml(value: Any, *, inside: bool = False) -> str:
    """A value as --set reads it; texts that would be read as something else, or cut, are quoted."""
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(v, inside=True) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(k)}: {_yaml(v, inside=True)}" for k, v in value.items()) + "}"
    if not isinstance(value, str):
        return json.dumps(value)
    found = parse_scalar(f"[{value}]") if inside else parse_scalar(value)
    return value if found == ([value] if inside else value) else _quoted(value)


def _quoted(text: str) -> str:
    """In quotes, with the characters escaped that YAML folds or forbids."""
    plain = json.dumps(text, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff]", lambda m: f"\\u{ord(m[0]):04x}", plain)


def _command(job: Job) -> str:
    return shlex.join(["honeloom", job.verb.name, *_arguments(job)])


def _sharded(job: Job) -> str:
    launch = ["accelerate", "launch", "--config_file", str(FSDP_PROFILE), "--num_processes", str(SHARDS), "-m"]
    return shlex.join([*launch, "honeloom", "tune", *_arguments(job)])
