"""Seconds of stages before they run: trials on the lab, rates on random weights, times the work that was counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from honeloom.errors import ConfigError, SourceError
from honeloom.planning.timing import Timing
from honeloom.planning.volume import Lengths, Part, batch_sizes
from honeloom.registry import load_target
from honeloom.runs.log import Console
from honeloom.runs.processes import world_size
from honeloom.stages.runner import Job
from honeloom.stages.trials import Trials, trial_of
from honeloom.stages.volumes import Counted
from honeloom.stages.volumes.reading import Shape, Tokens
from honeloom.system import peak_rss
from honeloom.types.rows import Row

__all__ = ["Calibration", "require_timeable"]

MOST_ROWS = 20_000
"""Rows that are made to tokens to count them; of more, so many are looked at."""
SCORED_BATCHES = 4
"""On which a scoring pass is timed."""
GRADIENTS_ONLY = 0.95
"""Of a step with its optimizer, where there is none."""


def require_timeable(job: Job) -> None:
    """Refuse, before anything is timed, what random weights do not tell.

    Raises
    ------
    ConfigError
        An input is not downloaded yet, weights would be quantised, or this is one of several processes.
    """
    if world_size() > 1:
        raise ConfigError(f"--calibrate times one process, and WORLD_SIZE is {world_size()}; plan without a launcher")
    if missing := ", ".join(i.value for i in job.inputs.values() if i.missing):
        raise ConfigError(f"--calibrate needs a known model and its rows here; not downloaded yet: {missing}")
    if getattr(job.config, "load_in", None):
        raise ConfigError("--calibrate times unquantised weights; leave --load-in out, 4 bits take somewhat longer")


class Calibration:
    """Rates of this machine, each measured once.

    Parameters
    ----------
    console : Console
        Told what is being timed.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._trials = Trials()
        self._tried: set[str] = set()
        self._started: set[str] = set()
        self._rates: dict[Any, Timing] = {}
        self._benches: dict[Any, Any] = {}
        self._counted = 0
        self._counting = Timing()
        self._bytes: tuple[Timing, Timing] | None = None

    def try_out(self, job: Job) -> int:
        """Make the trial that stands for a stage; peak resident bytes of the process behind it."""
        name = trial_of(job)
        if name not in self._tried:
            self._console.say(f"calibrate: {name} on the lab")
            self._tried.add(name)
        self._trials.cold(name)
        return peak_rss()

    def count(self, rows: Iterable[Row], shape: Shape, max_length: int | None) -> Tokens:
        """Tokens of rows as the model's own tokenizer and template make them; how long that takes is noted.

        Raises
        ------
        SourceError
            The model has no tokenizer.
        """
        timed = load_target("honeloom.backends.hf.calibrate:timed")
        found: list[Tokens] = []
        took = timed(lambda: found.append(_tokens(rows, shape, max_length)))
        self._counting += took
        self._counted += len(found[0].tokens) + found[0].left_out
        return found[0]

    def seconds(self, job: Job, counted: Counted) -> tuple[dict[str, Timing], Timing]:
        """What a stage takes, by what it is spent on, and in all.

        Parameters
        ----------
        job : Job
            The stage.
        counted : Counted
            Its work.
        """
        parts: dict[str, Timing] = {"start": self._start(job, counted)}
        if counted.volume.rows:
            parts["read rows"] = self._reading * counted.volume.rows
        rendered = sum(p.rendered for p in counted.parts)
        if rendered and self._counted:
            parts["make tokens"] = self._counting * (rendered / self._counted)
        for part in counted.parts:
            if part.tokens:
                taken = self._passes(job, part, counted.shapes[part.model])
                parts[part.what] = parts.get(part.what, Timing()) + taken
        if weights := self._weights(counted):
            parts["read and write weights"] = weights
        if counted.client_rounds:
            layers = counted.shapes["model"].layers
            parts["rounds"] = self._trials.round(trial_of(job)) * (layers * counted.client_rounds)
        return parts, sum(parts.values(), Timing())

    def _start(self, job: Job, counted: Counted) -> Timing:
        """Imports where they come first, and what the verb takes beside its passes; verbs inside it the same."""
        name = trial_of(job)
        total = self._trials.warm(name) if name in self._started else self._trials.cold(name)
        self._started.add(name)
        for inner, times in counted.inner.items():
            total += self._trials.warm(inner) * times
        return total

    @property
    def _reading(self) -> Timing:
        """Seconds per row that is read and looked at for duplicates."""
        if "rows" not in self._rates:
            rows = load_target("honeloom.stages.inputs:resolve_rows")("lab:dev").files
            scan = load_target("honeloom.stages.row_split:read_split")
            table = scan(rows, split=None)
            timed = load_target("honeloom.backends.hf.calibrate:timed")
            took: Timing = timed(lambda: scan(rows, split=None))
            self._rates["rows"] = took * (1 / len(table))
        return self._rates["rows"]

    def _weights(self, counted: Counted) -> Timing:
        """Weights that are loaded, and written; those of the lab are in the start."""
        if self._bytes is None:
            self._bytes = load_target("honeloom.backends.hf.calibrate:byte_timings")()
        read, written = self._bytes
        loads = sum(times * _bytes_of(counted.shapes[place]) for place, times in counted.loads.items())
        return read * loads + written * counted.volume.bytes_written

    def _passes(self, job: Job, part: Part, shape: Shape) -> Timing:
        key = (shape.folder, shape.kind, part.kind, part.batch, repr(part.tuning), part.loop, part.alone,
               part.lengths.sizes, part.lengths.scored_sizes, job.config.device, job.config.dtype)  # fmt: skip
        if key not in self._rates:
            self._console.say(f"calibrate: {part.what}")
            bench = self._bench(job, shape)
            self._rates[key] = _scoring(bench, part, shape) if part.kind == "score" else _step(bench, part, job)
        rate = self._rates[key]
        if part.kind == "score":
            count = part.tokens * part.depth
        else:
            count = part.passes * part.lengths.rows / part.batch / float(part.tuning.get("accumulate", 1))
            count *= GRADIENTS_ONLY if part.kind == "backward" else 1.0
        return rate * (count * shape.active)

    def _bench(self, job: Job, shape: Shape) -> Any:
        key = (shape.folder, job.config.device, job.config.dtype)
        if key not in self._benches:
            device = load_target("honeloom.backends.devices:choose_device")(job.config.device)
            dtype = load_target("honeloom.backends.devices:choose_dtype")(job.config.dtype, device)
            if shape.settings.get("quantization_config"):
                raise ConfigError("--calibrate times unquantised weights, and these are quantised")
            config = load_target("honeloom.backends.hf.load:load_config")(shape.folder)
            bench = load_target("honeloom.backends.hf.calibrate:Bench")
            self._benches[key] = bench(config, shape.decoder.parameters, device, dtype)
        return self._benches[key]


def _bytes_of(shape: Shape) -> int:
    """Bytes that loading reads: of an adapter its base too."""
    return shape.size if shape.kind == "model" else shape.size + 2 * shape.decoder.parameters


def _rows(bench: Any, lengths: Lengths, sizes: tuple[int, ...]) -> Callable[[int], Any]:
    make = load_target("honeloom.backends.hf.calibrate:make_rows")
    share = lengths.targets / lengths.tokens if lengths.tokens else 0.5
    return lambda count: make(sizes, count, targets=share, vocabulary=bench.vocabulary)


def _scoring(bench: Any, part: Part, shape: Shape) -> Timing:
    sizes = tuple(n for batch in batch_sizes(part, max(SCORED_BATCHES, 8 // part.batch)) for n in batch)
    rows = _rows(bench, part.lengths, sizes)(len(sizes))
    rank = part.tuning["method"]["rank"] if part.tuning else _rank(shape)
    add = load_target("honeloom.backends.hf.tune:add_lora")
    settings = {"rank": rank, "alpha": None, "dropout": 0.0, "targets": "all-linear", "rslora": False}
    adapted = {"prepare": lambda model: add(model, **settings)} if rank else {}
    timing: Timing = bench.scoring(rows, part.batch, alone=part.alone, **adapted)
    return timing


def _rank(shape: Shape) -> int:
    """Of the adapters that a model has beside its weights, as their bytes tell; 0 without any."""
    return max(1, round(shape.size / 4 / shape.decoder.adapter_widths)) if shape.kind == "adapter" else 0


def _step(bench: Any, part: Part, job: Job) -> Timing:
    """Seconds of a step of the part's rows."""
    tuned: Any = load_target("honeloom.tuning.config:TuneConfig").model_validate(
        {"model": "-", "rows": ["-"], **_tune_settings(part.tuning), "seed": job.config.seed}
    )
    prepare = load_target("honeloom.stages.tune:mark_trainable")
    rows = _rows(bench, part.lengths, part.lengths.sizes)
    timing: Timing = bench.steps(rows, lambda m: prepare(m, tuned), tuned, loop=part.loop, alone=part.alone)
    return timing


def _tune_settings(tuning: Mapping[str, Any]) -> dict[str, Any]:
    """As `tune` takes them: a distance that would be measured first is any."""
    settings = dict(tuning)
    optimizer = dict(settings.get("optimizer") or {})
    if optimizer.get("mu") == "auto":
        optimizer["mu"] = 1e-3
    return {**settings, "optimizer": optimizer} if optimizer else settings


def _tokens(rows: Iterable[Row], shape: Shape, max_length: int | None) -> Tokens:
    load = load_target("honeloom.backends.hf.load:load_tokenizer")
    tokenizer = load(shape.tokenizer) if shape.tokenizer else None
    if tokenizer is None:
        raise SourceError(f"{shape.tokenizer}: no tokenizer, so tokens cannot be counted; add tokenizer.json")
    config = load_target("honeloom.backends.hf.load:load_config")(shape.folder)
    limit = load_target("honeloom.backends.hf.load:token_limit")(config, tokenizer, max_length)
    encoder = load_target("honeloom.backends.hf.chat:Encoder")(tokenizer, limit, train=True)
    unrenderable = load_target("honeloom.backends.hf.chat:UnrenderableRow")
    tokens, targets, scored, left_out = list[int](), list[int](), list[list[int]](), 0
    for row in rows:
        try:
            choices = encoder.encode_choices(row) if row.kind == "choice" else [encoder.encode(row)]
        except unrenderable:
            left_out += 1
            continue
        right = choices[row.answer] if row.kind == "choice" else choices[0]
        if not right.targets:
            left_out += 1
            continue
        tokens.append(len(right.ids))
        targets.append(right.targets)
        scored.append([len(c.ids) for c in choices])
    return Tokens(tokens, targets, scored, left_out)
