"""What a verb takes beside its passes: tried on the built-in lab with next to no work, cold and warm."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from honeloom.config.base import validate
from honeloom.federated.federate_config import FederateConfig
from honeloom.planning.timing import Timing
from honeloom.registry import load_target
from honeloom.runs.log import Log, QuietConsole
from honeloom.selection.config import SelectConfig
from honeloom.stages.inputs import Resolver
from honeloom.stages.runner import Job, prepare
from honeloom.stages.work import Work
from honeloom.tuning.config import TuneConfig
from honeloom.verbs import VERBS

__all__ = ["Trials", "trial_of"]

MODEL, ROWS, LIMIT = "lab:base", "lab:dev", 8
LAB_LAYERS = 8
_MORE_ROUNDS = 3


def trial_of(job: Job) -> str:
    """The trial that stands for a stage: its verb, and which of its ways through the code."""
    config = job.config
    if isinstance(config, SelectConfig):
        if "model" not in job.inputs:
            return "select"
        return "select, tunings" if config.method.tunes() else "select, losses"
    if isinstance(config, TuneConfig):
        return f"tune, {config.method.type}" + (", mezo" if config.optimizer.type == "mezo" else "")
    if isinstance(config, FederateConfig):
        return "federate, mezo" if config.optimizer.type == "mezo" else "federate"
    return job.verb.name if job.verb.name in _SETTINGS else "merge"


_TWO = [{"model": MODEL, "name": "one"}, {"model": MODEL, "name": "other"}]
_FEDERATION = {
    "model": MODEL, "rows": [ROWS], "limit": 2 * LIMIT, "partition": {"type": "iid", "n": 2}, "rounds": 1,
    "local_steps": 1, "batch_size": 1,
}  # fmt: skip
_TUNING = {"model": MODEL, "rows": [ROWS], "limit": LIMIT, "max_steps": 1, "batch_size": 1}
_DROP = {"model": MODEL, "layers": {"attention": [0]}}
_SETTINGS: dict[str, dict[str, Any]] = {
    "evaluate": {"model": MODEL, "rows": [ROWS], "limit": LIMIT},
    "select": {"rows": [ROWS], "limit": LIMIT, "keep": "50%"},
    "select, losses": {"rows": [ROWS], "limit": LIMIT, "keep": "50%", "model": MODEL, "method": {"type": "perplexity"}},
    "select, tunings": {
        "rows": [ROWS], "limit": 4 * LIMIT, "keep": "50%", "model": MODEL, "budget": 4,
        "method": {
            "type": "shed", "players": 2, "curves": 0, "utility": {"steps": 1, "batch_size": 1, "target_rows": 2},
        },
    },
    "tune, lora": _TUNING,
    "tune, full": {**_TUNING, "method": {"type": "full"}},
    "tune, lora, mezo": {**_TUNING, "optimizer": {"type": "mezo"}},
    "tune, full, mezo": {**_TUNING, "optimizer": {"type": "mezo"}, "method": {"type": "full"}},
    "federate": _FEDERATION,
    "federate, mezo": {**_FEDERATION, "optimizer": {"type": "mezo"}},
    "merge": {"models": [MODEL, MODEL]},
    "mix": {"experts": _TWO, "level": "model", "router": {"type": "random"}},
    "glue": {
        "models": _TWO, "search_rows": [ROWS], "limit": 4 * LIMIT, "budget": 1, "mixtures": [],
    },
    "drop": _DROP,
}  # fmt: skip


class Trials:
    """Trials of verbs, each made once: the first time in this process, with imports, and again where that matters."""

    def __init__(self) -> None:
        self._cold: dict[str, Timing] = {}
        self._warm: dict[str, Timing] = {}
        self._rounds: dict[str, Timing] = {}

    def cold(self, name: str) -> Timing:
        """Seconds of a verb with next to no work, the first time."""
        if name not in self._cold:
            self._cold[name] = _try(name, {})
        return self._cold[name]

    def warm(self, name: str) -> Timing:
        """The same again."""
        if name not in self._warm:
            self.cold(name)
            self._warm[name] = _try(name, {})
        return self._warm[name]

    def round(self, name: str) -> Timing:
        """Of a federation: what one client takes in one round, per layer, with next to no steps."""
        if name not in self._rounds:
            longer = _try(name, {"rounds": _MORE_ROUNDS}).less(self.warm(name))
            clients = _SETTINGS[name]["partition"]["n"] * (_MORE_ROUNDS - 1)
            self._rounds[name] = longer * (1 / clients / LAB_LAYERS)
        return self._rounds[name]


def _try(name: str, changes: Mapping[str, Any]) -> Timing:
    with tempfile.TemporaryDirectory(prefix="honeloom-plan-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a run that is thrown away
        return _run(name, {**_SETTINGS[name], **changes}, Path(folder))


def _run(name: str, settings: Mapping[str, Any], folder: Path) -> Timing:
    """The verb's own work: what `report.cost` tells, without pages and locks."""
    verb = VERBS[name.partition(",")[0]]
    config = validate(load_target(verb.config), settings, what=f"trial of {verb.name}")
    work: Work[Any] = Work(
        config, folder, prepare(verb.name, config, Resolver()).inputs, Log(QuietConsole()), shown=folder
    )
    start, cpu = time.perf_counter(), time.process_time()
    load_target(verb.execute)(work)
    return Timing(time.perf_counter() - start, time.process_time() - cpu)
