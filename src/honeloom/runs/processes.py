"""One job in several processes, as torchrun and accelerate start it: rank 0 leads, the others only compute."""

from __future__ import annotations

import os

__all__ = ["local_rank", "rank", "sharded", "world_size"]


def world_size() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process; 0 writes, publishes and speaks."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process on its machine: the device it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def sharded() -> bool:
    """Whether accelerate was told to lay one model over the processes (FSDP) rather than copy it to each."""
    return world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
