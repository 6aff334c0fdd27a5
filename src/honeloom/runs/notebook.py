"""What a notebook shows while a stage runs: its messages, and one display per task that is updated in place."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from honeloom.runs.log import Console

__all__ = ["NotebookConsole", "notebook_console"]

PAUSE = 0.2
"""Seconds between two updates of a display: a notebook is slow to draw, and fast steps would flood it."""


def notebook_console() -> Console | None:
    """The console of a running IPython or Jupyter session; None in any other Python process."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    if shell is None:
        return None
    # Libraries load tqdm, which asks for ipywidgets in a notebook; progress is shown here without them.
    warnings.filterwarnings("ignore", message="IProgress not found")
    return NotebookConsole(in_place=hasattr(shell, "kernel"))


class NotebookConsole:
    """Prints messages, and progress where a display can be replaced.

    Parameters
    ----------
    in_place : bool
        Whether the front end can update a display; IPython in a terminal cannot, and shows
        messages only.
    """

    def __init__(self, *, in_place: bool) -> None:
        self.in_place = in_place

    def say(self, text: str) -> None:
        """Print one line."""
        print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print one warning."""
        print(f"warning: {text}", flush=True)

    @contextmanager
    def progress(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show one bar with count, rate and time left; it stays with its final count."""
        if not self.in_place:
            yield lambda amount: None
            return
        bar = _Bar(label, total)
        try:
            yield bar.advance
        finally:
            bar.show()


class _Bar:
    """One display, updated a few times a second."""

    def __init__(self, label: str, total: int | None) -> None:
        self.label, self.total, self.done = label, total, 0
        self.started = self.shown = time.monotonic()
        self.handle: Any = None

    def advance(self, amount: int) -> None:
        self.done += amount
        if time.monotonic() - self.shown >= PAUSE:
            self.show()

    def show(self) -> None:
        text = self._text()
        fill = f' value="{self.done}" max="{self.total}"' if self.total else ""
        content = {"text/plain": text, "text/html": f"<div><progress{fill}></progress> {escape(text)}</div>"}
        display = sys.modules["IPython"].display
        if self.handle is None:
            self.handle = display.display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)
        self.shown = time.monotonic()

    def _text(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        of = f" of {self.total:,}" if self.total else ""
        rate = f"{self.done / seconds:,.{0 if self.done >= 10 * seconds else 2}f}/s"
        if self.total and 0 < self.done < self.total:
            return (
                f"{self.label}: {self.done:,}{of}, {rate}, {seconds / self.done * (self.total - self.done):.0f} s left"
            )
        return f"{self.label}: {self.done:,}{of} in {seconds:.1f} s, {rate}"
