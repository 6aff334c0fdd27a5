"""Seconds that were measured, and sums of them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Timing"]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of something: elapsed, and of the processor in this process."""

    seconds: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.seconds + other.seconds, self.cpu + other.cpu)

    def __mul__(self, count: float) -> Timing:
        return Timing(self.seconds * count, self.cpu * count)

    def less(self, other: Timing) -> Timing:
        """The difference, where there is one."""
        return Timing(max(0.0, self.seconds - other.seconds), max(0.0, self.cpu - other.cpu))
