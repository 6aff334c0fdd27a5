"""What a job needs before it runs: memory, disk and time, from a model's config alone."""

from pathlib import Path

__all__ = ["FSDP_PROFILE"]

FSDP_PROFILE = Path(__file__).parent / "fsdp2.yaml"
"""A configuration of `accelerate launch` that lays one model over several GPUs."""
