"""What a stage needs before it runs: memory per device, disk, the command; light, from the model's config alone."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from honeloom.checkpoint.folders import read_config
from honeloom.config.base import DEFAULT_MAX_TOKENS, Config, VerbConfig
from honeloom.errors import CheckpointError, ConfigError
from honeloom.planning import FSDP_PROFILE
from honeloom.planning.memory import CUDA_CONTEXT, DTYPE_BYTES, Decoder, Work, peak_memory, read_decoder
from honeloom.registry import load_target
from honeloom.runs.log import Console
from honeloom.stages.runner import Job
from honeloom.tuning.config import TuneConfig
from honeloom.types.plans import Needs, Setting, StagePlan

__all__ = ["describe_needs", "plan_job", "work_of"]

SHARDS = 8
"""GPUs of the sharded setting in the table."""


def plan_job(job: Job, name: str, state: str, *, calibrate: bool = False, console: Console | None = None) -> StagePlan:
    """Describe a job for `--dry-run`, with what it needs unless it is finished.

    Parameters
    ----------
    job : Job
        From `prepare`.
    name, state : str
        Of the stage: its name, and "run" or "reuse".
    calibrate : bool
        Whether to read the rows and time a few steps of a tuning, which imports torch.
    console : Console, optional
        For the progress of that.

    Raises
    ------
    ConfigError
        Something other than a tuning is to be calibrated, or its model is not here.
    """
    plan = job.plan(name, state)
    if state == "reuse":
        return plan
    needs = describe_needs(job)
    if calibrate:
        if job.verb.name != "tune":
            raise ConfigError(f"--calibrate times the steps of tune, and this is {job.verb.name}; leave it out")
        if needs is None or needs.unknown or not all(i.paths for i in job.inputs.values()):
            missing = ", ".join(i.value for i in job.inputs.values() if not i.paths)
            raise ConfigError(f"--calibrate needs a known model and its rows here; not downloaded yet: {missing}")
        tokens, steps, seconds = load_target("honeloom.stages.calibrate:calibrate")(job.config, job.inputs, console)
        needs = replace(needs, tokens=tokens, steps=steps, seconds=seconds)
    return replace(plan, needs=needs)


def describe_needs(job: Job) -> Needs | None:
    """Memory, disk and command of a stage that runs a model; None where its model is not known yet.

    Parameters
    ----------
    job : Job
        From `prepare`. Of a hub model that is not in the cache only config.json is fetched.
    """
    config = job.config
    if job.verb.name not in ("tune", "evaluate", "select", "drop") or "model" not in job.inputs:
        return None
    try:
        settings = _model_config(job)
        if settings is None:
            return None
        decoder = read_decoder(settings)
    except CheckpointError as error:
        return Needs(unknown=str(error))
    gpu = _on_gpu(config)
    work = work_of(config, settings, gpu=gpu)
    others = _tuning_settings(config, work) if job.verb.name == "tune" else _inference_settings(work)
    memory = peak_memory(decoder, work)
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
        sharded_command=_sharded(job) if job.verb.name == "tune" else None,
    )


def _model_config(job: Job) -> dict[str, Any] | None:
    found = job.inputs["model"]
    if found.missing:
        folder: Path | None = load_target("honeloom.backends.hub:fetch_config")(found.value)
    else:
        folder = found.base or (found.paths[0] if found.paths else None)
    return read_config(folder) if folder else None


def _on_gpu(config: VerbConfig) -> bool:
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
        load_in=getattr(config, "load_in", None),
        eager=config.attn == "eager",
        host=not gpu,
    )
    if not isinstance(config, TuneConfig):
        return work
    return replace(
        work,
        mode=config.method.type,
        rank=getattr(config.method, "rank", 0),
        states=2 if config.optimizer.type == "adamw" else int(config.optimizer.momentum > 0),
        accumulate=config.accumulate,
        checkpointing=config.gradient_checkpointing,
    )


def _tuning_settings(config: Any, work: Work) -> Iterator[tuple[str, str, Work]]:
    """(name, flags, job) of the usual ways to tune this model on GPUs, one row at a time."""
    rows = work.batch_size * work.accumulate
    small = f"--batch-size 1 --accumulate {rows} --gradient-checkpointing --dtype bf16"
    one = replace(
        work, mode="lora", host=False, batch_size=1, accumulate=rows, checkpointing=True, dtype="bf16", load_in=None,
        rank=work.rank or 8,
    )  # fmt: skip
    yield "LoRA, bf16", small, one
    yield "QLoRA, 4 bits", f"{small} --load-in 4bit", replace(one, load_in="4bit")
    yield "all weights, bf16", f"--method full {small}", replace(one, mode="full")
    sharded = replace(one, mode="full", processes=SHARDS)
    yield f"all weights, sharded over {SHARDS} GPUs", f"--method full {small}, with the FSDP profile", sharded
    yield "zeroth-order, bf16", "forward passes only; not offered yet", replace(one, mode="zeroth-order")


def _inference_settings(work: Work) -> Iterator[tuple[str, str, Work]]:
    bf16 = replace(work, dtype="bf16", load_in=None, host=False)
    yield "bf16", "--dtype bf16", bf16
    yield "8 bits", "--dtype bf16 --load-in 8bit", replace(bf16, load_in="8bit")
    yield "4 bits", "--dtype bf16 --load-in 4bit", replace(bf16, load_in="4bit")


def _disk(job: Job, decoder: Decoder, work: Work) -> int:
    """Bytes of the result, of two checkpoints beside it while it is made, and of the download."""
    download = 2 * decoder.parameters if job.inputs["model"].missing else 0
    rows = sum(i.size for i in job.inputs.values() if i.kind == "rows")
    if job.verb.name == "drop":
        return download + decoder.parameters * 2
    if job.verb.name != "tune":
        return download + rows
    trained = decoder.parameters if work.mode == "full" else work.rank * decoder.adapter_widths
    written = trained * (DTYPE_BYTES[work.dtype] if work.mode == "full" else 4)
    return download + rows + written + 2 * trained * 4 * (1 + work.states)


_PLACES = {"tune": ("model", "rows"), "select": ("rows",), "evaluate": ("model",), "drop": ("model",)}
"""Settings that stand as arguments, in their order."""


def _arguments(job: Job) -> list[str]:
    """The verb's command line: its arguments, and by --set whatever is not a default."""
    config, places = job.config, _PLACES[job.verb.name]
    found = [a for name in places for a in _as_list(getattr(config, name))]
    for key, value in config.model_dump(mode="json").items():
        default = type(config).model_fields[key].get_default(call_default_factory=True)
        default = default.model_dump(mode="json") if isinstance(default, Config) else default
        if key not in places and value != (list(default) if isinstance(default, tuple) else default):
            changed = _changed(value, default)
            found += [a for k, v in _flat(key, changed) for a in ("--set", f"{k}={_yaml(v)}")]
    return [*found, "--output-dir", "OUT"]


def _as_list(value: Any) -> list[str]:
    return list(value) if isinstance(value, tuple) else [str(value)]


def _changed(value: Any, default: Any) -> Any:
    """Of a method's settings those that are not its defaults; all of another method's."""
    if isinstance(value, dict) and isinstance(default, dict) and value.get("type") == default.get("type"):
        return {k: v for k, v in value.items() if v != default[k]}
    return value


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if inner is not None:
                yield from _flat(f"{key}.{name}", inner)
    else:
        yield key, value


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _command(job: Job) -> str:
    return shlex.join(["honeloom", job.verb.name, *_arguments(job)])


def _sharded(job: Job) -> str:
    launch = ["accelerate", "launch", "--config_file", str(FSDP_PROFILE), "--num_processes", str(SHARDS), "-m"]
    return shlex.join([*launch, "honeloom", "tune", *_arguments(job)])
