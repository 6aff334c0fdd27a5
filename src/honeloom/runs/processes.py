"""One job in several processes, as torchrun and accelerate start it: rank 0 leads, the others only compute."""

from __future__ import annotations

import os

__all__ = ["local_rank", "rank", "world_size"]


def world_size() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process; 0 writes, publishes and speaks."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process on its machine: the device it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))
