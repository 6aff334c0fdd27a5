"""Tokens and seconds of a tuning, before it runs: the rows are read, and a few steps are timed without its weights."""

from __future__ import annotations

from typing import Any

from honeloom.backends.devices import choose_device, choose_dtype
from honeloom.backends.hf.calibrate import seconds_per_step
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.load import load_config, load_tokenizer, token_limit
from honeloom.backends.hf.tune import rows_in_all, total_steps
from honeloom.errors import ConfigError, SourceError
from honeloom.runs.log import Console, Log, QuietConsole
from honeloom.stages.inputs import ResolvedInput
from honeloom.stages.rows import scan
from honeloom.stages.tune import encode_rows, mark_trainable
from honeloom.stages.work import Work
from honeloom.tuning.config import TuneConfig

__all__ = ["calibrate"]


def calibrate(
    config: TuneConfig, inputs: dict[str, ResolvedInput], console: Console | None = None
) -> tuple[int, int, float]:
    """Return tokens, optimizer steps and seconds of a whole tuning.

    Parameters
    ----------
    config : TuneConfig
        Its settings.
    inputs : dict
        Its resolved inputs; of the model only configuration and tokenizer are read.
    console : Console, optional
        For progress.

    Raises
    ------
    ConfigError
        The weights would be quantised, which random ones are not.
    """
    if config.load_in:
        raise ConfigError("--calibrate times unquantised weights; leave --load-in out, 4 bits take somewhat longer")
    if load_config(inputs["model"].paths[0]).to_dict().get("quantization_config"):
        raise ConfigError(f"--calibrate times unquantised weights, and {inputs['model'].value} is quantised")
    work: Work[Any] = Work(config, None, inputs, Log(console or QuietConsole()))
    folder = work.model()
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise SourceError(f"{inputs['model'].value}: no tokenizer, so tokens cannot be counted; add tokenizer.json")
    settings = load_config(folder)
    encoder = Encoder(tokenizer, token_limit(settings, tokenizer, config.max_length), train=True)
    _, encoded, _ = encode_rows(work, scan(work), encoder)
    steps = total_steps(len(encoded), config)
    tokens = round(rows_in_all(len(encoded), config) * sum(len(e.ids) for e in encoded) / len(encoded))
    # Rows of every length, so that the timed step is neither a short nor a long one.
    by_length = sorted(encoded, key=lambda e: len(e.ids))
    wanted = config.batch_size * config.accumulate
    picked = [by_length[(2 * i + 1) * len(by_length) // (2 * wanted)] for i in range(wanted)]
    passes = [picked[i :: config.accumulate] for i in range(config.accumulate)]
    device = choose_device(config.device)
    second = seconds_per_step(
        settings, lambda m: mark_trainable(m, config), passes, config, device, choose_dtype(config.dtype, device)
    )
    return tokens, steps, steps * second
