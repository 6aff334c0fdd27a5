"""SIGTERM as an exception, so that a pre-empted job leaves by the same path as Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["PendingSignal", "Terminated", "deferred_signals", "terminate_cleanly"]


class Terminated(BaseException):
    """The process was asked to end (SIGTERM); the command exits with 143."""


@contextmanager
def terminate_cleanly() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM while inside; only the main thread may install it."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class PendingSignal:
    """A signal that arrived while it was deferred; `number` is None until then."""

    number: int | None = None

    def raise_if_received(self) -> None:
        """Raise what the signal stands for, now that it is safe."""
        if self.number == signal.SIGTERM:
            raise Terminated
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt


@contextmanager
def deferred_signals() -> Iterator[PendingSignal]:
    """Hold back Ctrl-C and SIGTERM so that a loop can finish its step and save; a second one acts at once."""
    pending = PendingSignal()
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if pending.number is not None:
            pending.raise_if_received()
        pending.number = number

    previous = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pending
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
