"""How long passes and steps take: timed on random weights, of a whole small model or a large one's first layers."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from honeloom.backends.devices import one_thread, release_memory
from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.local_steps import build_optimizer, collator, local_steps
from honeloom.backends.hf.score import Scorer
from honeloom.backends.hf.tune import train
from honeloom.backends.hf.zeroth_order import train_zeroth_order
from honeloom.planning.timing import Timing
from honeloom.runs.log import Log
from honeloom.tuning.config import TuneConfig

__all__ = ["Bench", "byte_timings", "make_rows", "timed"]

WHOLE = 32_000_000
"""Weights up to which a model is timed whole, so that nothing is extended."""
STEPS = (2, 12)
"""Steps that are timed, at least and at most; one before them warms up."""
ENOUGH = 0.8
"""Seconds that are enough for one rate."""
COPIED = 1 << 24
"""Numbers that are written and read to time bytes."""


def timed(work: Callable[[], Any], device: torch.device | None = None) -> Timing:
    """How long a call takes."""
    _wait(device)
    start, cpu = time.perf_counter(), time.process_time()
    work()
    _wait(device)
    return Timing(time.perf_counter() - start, time.process_time() - cpu)


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _median(timings: Sequence[Timing]) -> Timing:
    return Timing(median(t.seconds for t in timings), median(t.cpu for t in timings))


def make_rows(sizes: Sequence[int], count: int, *, targets: float, vocabulary: int) -> list[Encoded]:
    """Rows of random tokens with lengths spread as given.

    Parameters
    ----------
    sizes : sequence of int
        Quantiles of lengths, ascending.
    count : int
        Rows to make.
    targets : float
        Share of their last tokens that is scored.
    vocabulary : int
        Token ids lie below it.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for k in range(count):
        length = max(2, sizes[(2 * k + 1) * len(sizes) // (2 * count)])
        scored = min(length - 1, max(1, round(length * targets)))
        ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        rows.append(Encoded(tuple(ids), (False,) * (length - scored) + (True,) * scored, scored, False, True))
    return rows


class Bench:
    """Random models of one configuration, on which passes and steps are timed.

    Parameters
    ----------
    config : transformers configuration
        Of the whole model; no weights are read.
    weights : int
        How many it has.
    device, dtype
        Where and in which number type to compute.
    """

    def __init__(self, config: Any, weights: int, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self._layers = config.get_text_config().num_hidden_layers
        self._few = (self._layers,) if weights <= WHOLE or self._layers == 1 else (1, 2)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.config.get_text_config().vocab_size)

    def _extended(self, measure: Callable[[Any], Timing], dtype: torch.dtype) -> Timing:
        """Of the whole model: t(1) + (L - 1) (t(2) - t(1)) where one and two layers are timed, for layers are alike."""
        found = []
        for layers in self._few:
            found.append(measure(self._model(layers, dtype)))
            release_memory()
        if len(found) == 1:
            return found[0]
        return found[0] + found[1].less(found[0]) * (self._layers - 1)

    def _model(self, layers: int, dtype: torch.dtype) -> Any:
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        with torch.random.fork_rng(devices=[]):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).to(self.device)

    def scoring(
        self, rows: Sequence[Encoded], batch: int, *, alone: bool, prepare: Callable[[Any], Any] = lambda model: model
    ) -> Timing:
        """Seconds per token of a pass without gradients.

        Parameters
        ----------
        rows : sequence of Encoded
            What is scored.
        batch : int
            Rows per forward pass.
        alone : bool
            With one thread.
        prepare : callable
            Adds adapters: (model) -> model.
        """
        tokens = sum(len(row.ids) for row in rows)

        def measure(model: Any) -> Timing:
            scorer = Scorer(prepare(model).eval(), _Limit(max(len(r.ids) for r in rows)), batch)  # type: ignore[arg-type]
            with one_thread(self.device) if alone else nullcontext():
                timings = [timed(lambda: scorer.sums(rows[:batch]), self.device)]
                while len(timings) < 2 or (len(timings) < 6 and sum(t.seconds for t in timings) < ENOUGH):
                    timings.append(timed(lambda: scorer.sums(rows), self.device))
            return _median(timings[1:])

        return self._extended(measure, self.dtype) * (1 / tokens)

    def steps(
        self, rows: Callable[[int], Sequence[Encoded]], prepare: Callable[[Any], Any], config: TuneConfig, *, loop: str,
        alone: bool,
    ) -> Timing:  # fmt: skip
        """Seconds of an optimizer step.

        Parameters
        ----------
        rows : callable
            Makes a number of rows.
        prepare : callable
            Marks what is trained: (model) -> model.
        config : TuneConfig
            Of the steps.
        loop : {"trainer", "local"}
            By `tune`'s own training, or by the small loop of utilities and clients.
        alone : bool
            With one thread.
        """
        full = config.method.type == "full"
        weights = torch.float32 if full else self.dtype
        autocast = None if self.dtype is torch.float32 else self.dtype

        def measure(model: Any) -> Timing:
            model = prepare(model)
            if config.gradient_checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            with one_thread(self.device) if alone else nullcontext():
                if loop == "local" and config.optimizer.type != "mezo":
                    return self._local(model, rows, config, autocast)
                return self._trained(model, rows, config, autocast)

        return self._extended(measure, weights)

    def _local(
        self, model: Any, rows: Callable[[int], Sequence[Encoded]], config: TuneConfig, autocast: torch.dtype | None
    ) -> Timing:
        optimizer: Any = build_optimizer(model, config.optimizer, config.learning_rate)  # type: ignore[arg-type]
        made = list(rows(config.batch_size * config.accumulate))
        passes = [made[i :: config.accumulate] for i in range(config.accumulate)]
        collate = collator(config.packing, made)
        timings: list[Timing] = []
        with torch.autocast(self.device.type, dtype=autocast or torch.float32, enabled=autocast is not None):
            while len(timings) <= STEPS[0] or (len(timings) < STEPS[1] and sum(t.seconds for t in timings) < ENOUGH):
                timings.append(timed(lambda: local_steps(model, [passes], optimizer, collate=collate), self.device))
        return _median(timings[1:])

    def _trained(
        self, model: Any, rows: Callable[[int], Sequence[Encoded]], config: TuneConfig, autocast: torch.dtype | None
    ) -> Timing:
        """By the very training that `tune` runs: a few steps tell how many are enough."""
        first = self._ticks(model, rows, config, autocast, 3)
        more = min(STEPS[1], max(STEPS[0], ceil(ENOUGH / max(1e-6, _median(first).seconds))))
        return _median(first if more <= len(first) else self._ticks(model, rows, config, autocast, more + 1))

    def _ticks(
        self, model: Any, rows: Callable[[int], Sequence[Encoded]], config: TuneConfig, autocast: torch.dtype | None,
        steps: int,
    ) -> list[Timing]:  # fmt: skip
        settings = config.model_copy(update={"max_steps": steps, "epochs": None, "report_to": ()})
        made, clock = rows(steps * config.batch_size * config.accumulate), _Clock(self.device)
        run = train_zeroth_order if config.optimizer.type == "mezo" else train
        with tempfile.TemporaryDirectory() as folder:
            run(model, made, settings, Path(folder), Log(clock), device=self.device, autocast=autocast)
        return clock.between()


class _Limit:
    """The part of an encoder that a scorer asks for messages."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length


class _Clock:
    """A console that notes when every step ended."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[tuple[float, float]] = []

    def say(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    @contextmanager
    def progress(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Note the time of every advance."""

        def advance(amount: int) -> None:
            if amount:
                _wait(self._device)
                self._times.append((time.perf_counter(), time.process_time()))

        yield advance

    def between(self) -> list[Timing]:
        """From the end of one step to that of the next."""
        pairs = zip(self._times, self._times[1:], strict=False)
        return [Timing(after[0] - before[0], after[1] - before[1]) for before, after in pairs]


def byte_timings() -> tuple[Timing, Timing]:
    """Seconds per byte of weights that are read and made float32, and per byte that is written to the disk."""
    numbers = torch.zeros(COPIED, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "numbers.safetensors"
        written = timed(lambda: save_file({"numbers": numbers}, file))
        read = timed(lambda: load_file(file)["numbers"].float().sum())
    return read * (0.5 / COPIED), written * (0.5 / COPIED)
