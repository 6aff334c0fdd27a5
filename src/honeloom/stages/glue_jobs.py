"""Verbs that run inside the folder of another one: each is found again by its own key after an interruption."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from honeloom.checkpoint.architectures import layer_count
from honeloom.checkpoint.folders import read_config
from honeloom.config.base import InputField, validate
from honeloom.registry import load_target
from honeloom.runs.log import Console
from honeloom.runs.manifest import load_manifest
from honeloom.runs.output import Mode
from honeloom.stages.inputs import Placed, Resolver
from honeloom.stages.runner import load_report, prepare, run_job
from honeloom.stages.work import Work
from honeloom.types.report import Report
from honeloom.verbs import VERBS

__all__ = ["SCRATCH", "Jobs"]

SCRATCH = ".glue"
"""Rows, scores and mixtures that are no part of the result."""


class _Inner:
    """Progress for the person; what an inner verb says stays in its own report, its warnings are taken from there."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Nothing: the outer verb tells what it does."""

    def warn(self, text: str) -> None:
        """Nothing: warnings are read from the report."""

    @contextmanager
    def progress(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show it as the outer verb's."""
        shown: AbstractContextManager[Callable[[int], None]] = self._console.progress(label, total)
        with shown as advance:
            yield advance


class Jobs:
    """Runs verbs into folders below the stage's.

    Parameters
    ----------
    work : Work
        Of the outer stage; its inputs are not read a second time.
    """

    def __init__(self, work: Work[Any]) -> None:
        self.work = work
        self.scratch = work.dir / SCRATCH
        self._resolver = Resolver()
        for found in work.inputs.values():
            self._resolver.know(found)
        self._folders: dict[str, Path] = {}

    def run(self, verb: str, folder: Path, what: str, **settings: Any) -> Report:
        """Run a verb, go on with it, or find its result.

        Parameters
        ----------
        verb : str
            A name in `VERBS`.
        folder : Path
            Below the stage's own.
        what : str
            For messages.
        **settings
            Of the verb; None leaves the default.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        config = validate(load_target(VERBS[verb].config), given, what=what)
        job = prepare(verb, config, self._resolver)
        folder.parent.mkdir(parents=True, exist_ok=True)
        mode: Mode = "resume" if not folder.exists() or load_manifest(folder) else "overwrite"
        console = _Inner(self.work.log.console)
        report = run_job(job, folder, mode=mode, shown=self.shown(folder), console=console)
        for warning in report.warnings if verb != "evaluate" else ():  # rows that are cut are so for every model
            self.work.log.warn(f"{what}: {warning}")
        self._folders[str(report.out)] = folder
        return report

    def shown(self, folder: Path) -> Path:
        """The path that a folder below the stage's will have."""
        assert self.work.shown is not None  # a stage that writes is always shown somewhere
        return self.work.shown / folder.relative_to(self.work.dir)

    def folder_of(self, report: Report) -> Path:
        """Where the result of a report lies now."""
        return self._folders[str(report.out)]

    def place(self, report: Report) -> str:
        """Make a result readable for later verbs under the path it will have; returns that path."""
        assert report.artefact is not None and report.out is not None  # every verb that runs here writes
        folder = self.folder_of(report)
        relative = os.path.relpath(folder, self.work.dir / "members" / "reader")
        self._resolver.place(report.out, Placed(folder, report.artefact.sha256, relative))
        return report.out

    def layers(self, model: str) -> int:
        """Number of layers of a model by what settings call it."""
        found = self._resolver.resolve(InputField("model", "model", model))
        return layer_count(read_config(found.base or found.paths[0]))

    def adopt(self, folder: Path) -> Report:
        """A finished result that lies below the stage's folder."""
        report = load_report(folder)
        self._folders[str(report.out)] = folder
        return report

    def clear(self) -> None:
        """Remove what is no part of the result, and what an interruption left beside it."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for path in (self.work.dir / "members").glob(".*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
