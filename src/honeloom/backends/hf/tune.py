"""Tuning with transformers' Trainer and PEFT: seeded order, resumable checkpoints, no NaN saved."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer_pt_utils import get_length_grouped_indices

from honeloom.backends.devices import memory_guard
from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.local_steps import build_optimizer, build_schedule, collator
from honeloom.config.base import DEFAULT_MAX_TOKENS
from honeloom.errors import ConfigError, NotFiniteError
from honeloom.ops.noise import permutation
from honeloom.runs.atomic import fsync_file, write_json
from honeloom.runs.log import Log
from honeloom.runs.processes import local_rank, sharded, world_size
from honeloom.runs.signals import PendingSignal, deferred_signals
from honeloom.tuning.config import TuneConfig

__all__ = [
    "Trained", "add_lora", "lora_arguments", "merge_lora", "require_trackers", "row_order", "rows_in_all",
    "total_steps", "train", "training_arguments", "unfreeze",
]  # fmt: skip

COMPLETE = "complete.json"
OVERFLOWS = 20
"""Steps in a row that fp16 may skip: its scale begins at 2**16, and each of them halves it."""
# The older name goes in transformers 6.
_RECOMPUTE = next(
    n for n in ("activation_checkpointing", "gradient_checkpointing") if n in TrainingArguments.__dataclass_fields__
)


@dataclass(frozen=True, slots=True)
class Trained:
    """What training did: steps, tokens seen, share of them that were targets, losses per step, rows seen.

    `gathered` is the trained state of a sharded model, whole, on the leading process alone;
    None where the model is whole.
    """

    steps: int
    tokens: int
    label_share: float
    losses: tuple[float, ...]
    seen: frozenset[int]
    gathered: dict[str, torch.Tensor] | None = None


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: float | None,
    dropout: float,
    targets: str | Sequence[str],
    rslora: bool,
    seed: int = 0,
) -> Any:
    """Wrap a model with LoRA adapters (arXiv:2106.09685); A is drawn from `seed`, B is zero.

    Returns
    -------
    peft.PeftModel
        Only the adapters are trainable.
    """
    config = LoraConfig(**lora_arguments(rank, alpha, dropout, targets, rslora))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(f"method.targets {targets!r}: {error}; `all-linear` adapts every linear layer") from None
    held = wrapped.peft_config["default"]
    if isinstance(held.target_modules, set):  # its order, which PEFT writes, follows the interpreter's hash seed
        held.target_modules = sorted(held.target_modules)
    return wrapped


def merge_lora(model: Any, dtype: torch.dtype | None) -> Any:
    """The model with its adapters added to their weights, as these are once a file has them in `dtype`."""
    changed = [m.get_base_layer() for m in model.modules() if isinstance(m, LoraLayer)]
    merged = model.merge_and_unload()
    for layer in changed if dtype is not None else ():
        layer.weight.data = layer.weight.data.to(dtype).to(layer.weight.dtype)
    return merged


def lora_arguments(
    rank: int, alpha: float | None, dropout: float, targets: str | Sequence[str], rslora: bool
) -> dict[str, Any]:
    """What PEFT is told: every setting of LoRA by its name there."""
    return {
        "r": rank,
        "lora_alpha": alpha if alpha is not None else 2 * rank,
        "lora_dropout": dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "use_rslora": rslora,
        "task_type": "CAUSAL_LM",
    }


def unfreeze(model: Any) -> Any:
    """Make every weight trainable."""
    model.requires_grad_(True)
    return model


def total_steps(rows: int, config: TuneConfig) -> int:
    """Optimizer steps of a run over `rows` rows."""
    if config.max_steps is not None:
        return config.max_steps
    return math.ceil(rows_in_all(rows, config) / _rows_per_step(config))


def rows_in_all(rows: int, config: TuneConfig) -> int:
    """How many rows are trained on, repeats counted; at least one."""
    if config.max_steps is not None:
        return config.max_steps * _rows_per_step(config)
    return max(1, round(rows * (config.epochs or 1.0)))


def _rows_per_step(config: TuneConfig) -> int:
    """Rows of one optimizer step, over all processes."""
    return config.batch_size * config.accumulate * world_size()


def row_order(rows: int, wanted: int, seed: int, *, lengths: Sequence[int] = (), group: int = 0) -> list[int]:
    """Indices of the rows in training order: a fresh permutation of all of them per epoch.

    Parameters
    ----------
    rows, wanted : int
        How many there are, and how many are trained on.
    seed : int
        Of the permutations.
    lengths : sequence of int
        Tokens of every row, to group by.
    group : int
        Rows per optimizer step: within fifty such groups the longest come first. 0: no grouping.
    """
    order: list[int] = []
    epoch = 0
    while len(order) < wanted:
        shuffled = permutation(seed, f"tune/epoch/{epoch}", rows).tolist()
        if group:
            # The library permutes too; its generator is seeded by the first draw of ours.
            generator = torch.Generator().manual_seed(shuffled[0])
            places = get_length_grouped_indices([lengths[i] for i in shuffled], group, generator=generator)
            shuffled = [shuffled[place] for place in places]
        order += shuffled
        epoch += 1
    return order[:wanted]


def train(
    model: Any,
    encoded: Sequence[Encoded],
    config: TuneConfig,
    folder: Path,
    log: Log,
    *,
    device: torch.device | None = None,
    autocast: torch.dtype | None = None,
    name: str | None = None,
) -> Trained:
    """Train `model` in place.

    Parameters
    ----------
    model : transformers or PEFT model
        With its trainable parameters marked.
    encoded : sequence of Encoded
        The rows.
    config : TuneConfig
        Settings.
    folder : Path
        For checkpoints and trainer files; the newest complete checkpoint in it is resumed.
    log : Log
        Progress, events and warnings.
    device : torch.device, optional
        Where to compute; by default where the model is.
    autocast : torch.dtype, optional
        bfloat16 or float16: matrix products in it, weights as they are.
    name : str, optional
        What trackers call the run.

    Raises
    ------
    NotFiniteError
        The loss or gradient is NaN or infinite; `diagnosis.json` in `folder` says where.
    """
    steps = total_steps(len(encoded), config)
    group = _rows_per_step(config) if config.group_by_length else 0
    lengths = [len(e.ids) for e in encoded]
    order = row_order(len(encoded), rows_in_all(len(encoded), config), config.seed, lengths=lengths, group=group)
    device = device or model.device
    signature = {
        "device": device.type, "dtype": str(model.dtype), "autocast": str(autocast), "processes": str(world_size()),
        "sharded": str(sharded()),
    }  # fmt: skip
    checkpoint = newest_checkpoint(folder, log, signature)
    with deferred_signals() as pending, log.console.progress("tune", steps) as advance:
        watcher = _Watcher(folder, log, pending, advance, signature)
        trainer = _trainer(
            config=config,
            model=model,
            args=_arguments(config, folder, steps, device, autocast, name),
            train_dataset=_Rows(_filled([encoded[i] for i in order], config)),
            data_collator=collator(config.packing, encoded),
            callbacks=[watcher, *_tensorboard(config, folder.parent / "tensorboard")],
        )
        # Under autocast the library would copy every input of an adapter to fp32, and autocast copy it back.
        casting = disable_input_dtype_casting(model) if autocast and hasattr(model, "peft_config") else nullcontext()
        with memory_guard(device, "training", _memory_advice(config)), casting, redirect_stdout(sys.stderr):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # Under autocast accelerate replaces `forward`; the caller gets the plain model back.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    pending.raise_if_received()
    if watcher.fault:
        raise NotFiniteError(f"{watcher.fault}; lower lr or use --dtype fp32. See {folder / 'diagnosis.json'}")
    tokens = sum(len(encoded[i].ids) for i in order)
    targets = sum(encoded[i].targets for i in order)
    losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    gathered = _gather(model) if sharded() else None
    return Trained(steps, tokens, targets / tokens, losses, frozenset(order), gathered)


def _gather(model: Any) -> dict[str, torch.Tensor]:
    """The trained state of a sharded model, whole, on the host of the leading process; every process must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def _filled(rows: list[Encoded], config: TuneConfig) -> list[Encoded]:
    """Rows without targets up to a full batch for every process, which would else train the first rows again."""
    missing = -len(rows) % (config.batch_size * world_size()) if world_size() > 1 else 0
    filler = replace(rows[0], scored=(False,) * len(rows[0].ids), ends=False)
    return [*rows, *[filler] * missing]


def _memory_advice(config: TuneConfig) -> list[str]:
    """Flags that lower the memory of this training, the cheapest in time first."""
    advice = []
    if config.batch_size > 1:
        part = max(n for n in range(1, config.batch_size // 2 + 1) if config.batch_size % n == 0)
        advice.append(f"--batch-size {part} --accumulate {config.accumulate * config.batch_size // part}")
    if not config.gradient_checkpointing:
        advice.append("--gradient-checkpointing")
    if config.method.type == "full":
        advice.append("--method lora")
    elif config.load_in != "4bit":
        advice.append("--load-in 4bit")
    return [*advice, f"--max-length {(config.max_length or DEFAULT_MAX_TOKENS) // 2}"]


def require_trackers(config: TuneConfig) -> None:
    """Raise ConfigError if a tracker is asked for that is not installed, before any work."""
    with _tracker_errors():
        _tensorboard(config, Path())
        for callback in get_reporting_integration_callbacks([t for t in config.report_to if t != "tensorboard"]):
            callback()


def _tensorboard(config: TuneConfig, folder: Path) -> list[TrainerCallback]:
    """TensorBoard's writer, which by itself would write below the checkpoints and go with them."""
    if "tensorboard" not in config.report_to:
        return []
    with _tracker_errors():
        callback = TensorBoardCallback()
    callback.logging_dir = callback.logging_dir or str(folder)  # TENSORBOARD_LOGGING_DIR wins
    return [callback]


@contextmanager
def _tracker_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # a tracker that is not installed
        raise ConfigError(f"report_to: {error}") from None


def _trainer(**parts: Any) -> Trainer:
    with _tracker_errors():
        trainer = _OrderedTrainer(**parts)
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(
    config: TuneConfig, steps: int, device: str, autocast: torch.dtype | None = None
) -> dict[str, Any]:
    """What the Trainer is told: every setting of ours by its name there.

    Parameters
    ----------
    config : TuneConfig
        Our settings. Optimizer, schedule, row order and packing are built by us and do not appear.
    steps : int
        Optimizer steps.
    device : str
        Kind of device: cpu, cuda or mps.
    autocast : torch.dtype, optional
        As of `train`.
    """
    arguments: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "max_grad_norm": config.max_grad_norm,
        "learning_rate": config.learning_rate,
        "seed": config.seed % 2**32,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every,
        "save_total_limit": 2,
        "report_to": [t for t in config.report_to if t != "tensorboard"] or "none",
        "project": "honeloom",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": device == "cuda",
        "use_cpu": device == "cpu",
        "bf16": autocast is torch.bfloat16,
        "fp16": autocast is torch.float16,
    }
    if config.gradient_checkpointing:
        arguments |= {_RECOMPUTE: True, f"{_RECOMPUTE}_kwargs": {"use_reentrant": False}}
    return arguments


def _arguments(
    config: TuneConfig, folder: Path, steps: int, device: torch.device, autocast: torch.dtype | None, name: str | None
) -> TrainingArguments:
    if device.type == "cuda" and device.index not in (None, local_rank()):
        raise ConfigError(
            f"--device {device}: the trainer uses the first device; set CUDA_VISIBLE_DEVICES={device.index}"
        )
    arguments = TrainingArguments(
        output_dir=str(folder), run_name=name, **training_arguments(config, steps, device.type, autocast)
    )
    # Several visible devices would otherwise be filled by torch.nn.DataParallel, which multiplies the batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Rows(Dataset):
    """Rows in training order."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index]


class _OrderedTrainer(Trainer):
    """A Trainer that keeps the order of its dataset and builds the optimizer and schedule of our settings."""

    def __init__(self, *, config: TuneConfig, **parts: Any) -> None:
        super().__init__(**parts)
        self.settings = config

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            assert self.settings.optimizer.type != "mezo"  # which has a loop of its own
            self.optimizer = build_optimizer(trained, self.settings.optimizer, self.settings.learning_rate)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            scheduled: Any = optimizer or self.optimizer
            settings = self.settings
            schedule: Any = build_schedule(scheduled, settings.schedule, num_training_steps, settings.warmup_ratio)
            self.lr_scheduler = schedule
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # type: ignore[arg-type]


class _Watcher(TrainerCallback):
    """Stops on NaN, saves on a signal, marks checkpoints complete, and tells the log."""

    def __init__(
        self, folder: Path, log: Log, pending: PendingSignal, advance: Callable[[int], None], signature: dict[str, str]
    ) -> None:
        self.folder = folder
        self.signature = signature
        self.log = log
        self.pending = pending
        self.advance = advance
        self.fault = ""
        self.overflows = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.advance(1)
        self.pending.number = _heard_anywhere(self.pending.number, args.device)
        if self.pending.number is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        numbers = {k: float(v) for k, v in (logs or {}).items() if k in ("loss", "grad_norm", "learning_rate")}
        bad = [k for k in ("loss", "grad_norm") if k in numbers and not math.isfinite(numbers[k])]
        # fp16 scales the loss up until a gradient overflows, skips that step, and halves the scale.
        self.overflows = self.overflows + 1 if bad == ["grad_norm"] else 0
        if bad == ["grad_norm"] and args.fp16 and self.overflows <= OVERFLOWS:
            numbers.pop("grad_norm")
            bad = []
        if bad:
            self.fault = f"step {state.global_step}: {bad[0]} is {numbers[bad[0]]}"
            control.should_training_stop = True
            control.should_save = False
            if state.is_world_process_zero:
                told = {k: str(v) for k, v in numbers.items()}
                write_json(self.folder / "diagnosis.json", {"step": state.global_step, **told})
        elif "loss" in numbers:
            self.log.event("step", step=state.global_step, **numbers)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        for file in checkpoint.iterdir():
            fsync_file(file)
        write_json(checkpoint / COMPLETE, {"step": state.global_step, **self.signature})


def _heard_anywhere(number: int | None, device: torch.device) -> int | None:
    """The signal that any process of a spread job has received, so that all of them stop at the same step."""
    if not torch.distributed.is_initialized():
        return number
    heard = torch.tensor(number or 0, device=device if torch.distributed.get_backend() == "nccl" else "cpu")
    torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
    return int(heard) or None


def newest_checkpoint(folder: Path, log: Log, signature: dict[str, str]) -> Path | None:
    """The newest complete checkpoint that was made the same way; others are named and skipped."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        if (checkpoint / COMPLETE).exists():
            made = json.loads((checkpoint / COMPLETE).read_bytes())
            if made == {"step": made["step"], **signature}:
                log.say(f"tune: going on from step {made['step']}")
                return checkpoint
            log.say(f"tune: {checkpoint.name} is from another device, number type or number of processes; skipped")
            continue
        log.say(f"tune: {checkpoint.name} was cut off while it was saved; skipped")
    return None
