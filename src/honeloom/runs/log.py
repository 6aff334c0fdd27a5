"""What a running stage says: to the person, and to `events.jsonl`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

from honeloom.runs.journal import Journal
from honeloom.runs.redact import redact

__all__ = ["Console", "Log", "QuietConsole"]

T = TypeVar("T")


class Console(Protocol):
    """Where messages for a person go; the command line and notebooks bring their own."""

    def say(self, text: str) -> None:
        """Print one line."""

    def warn(self, text: str) -> None:
        """Print one warning."""

    def progress(self, label: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """Open a progress display; the callable adds to it."""


class QuietConsole:
    """Prints nothing: the default of the Python functions."""

    def say(self, text: str) -> None:
        """Print nothing."""

    def warn(self, text: str) -> None:
        """Print nothing; the report carries every warning."""

    @contextmanager
    def progress(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show nothing."""
        yield lambda amount: None


class Log:
    """One voice for a stage: console, events and collected warnings.

    Parameters
    ----------
    console : Console
        For the person.
    events : Journal or None
        `events.jsonl` of the output folder.
    """

    def __init__(self, console: Console, events: Journal | None = None) -> None:
        self.console = console
        self.events = events
        self.warnings: list[str] = []
        self._start = time.monotonic()

    def event(self, name: str, **fields: Any) -> None:
        """Record one machine-readable event; secrets are blanked."""
        if self.events is not None:
            seconds = round(time.monotonic() - self._start, 3)
            clean = {k: redact(v) if isinstance(v, str) else v for k, v in fields.items()}
            self.events.append({"event": name, "seconds": seconds, **clean})

    def say(self, text: str) -> None:
        """Tell the person, and record it."""
        self.console.say(redact(text))
        self.event("message", text=text)

    def warn(self, text: str) -> None:
        """Warn once: console, events, and the report's `warnings`."""
        text = redact(text)
        if text not in self.warnings:
            self.warnings.append(text)
            self.console.warn(text)
            self.event("warning", text=text)

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield items while showing progress."""
        with self.console.progress(label, total) as advance:
            for item in items:
                yield item
                advance(1)
