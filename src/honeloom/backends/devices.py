"""Devices and number types: what is here, and what `auto` means."""

from __future__ import annotations

import gc
import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from honeloom.errors import ConfigError, HoneloomError, OutOfMemoryError
from honeloom.runs.processes import local_rank
from honeloom.system import available_memory

__all__ = [
    "DTYPES", "choose_device", "choose_dtype", "describe_devices", "free_memory", "memory_guard", "one_thread",
    "release_memory", "wait_for_all",
]  # fmt: skip

# What torch says: "Tried to allocate 2.00 GiB" on a GPU, "you tried to allocate 123 bytes" on the host.
_WANTED = re.compile(r"ried to allocate ([\d.]+) (\w+)")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str) -> torch.device:
    """Turn auto, cpu, cuda, cuda:N or mps into a device that exists here; ConfigError if it does not."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank())
        return torch.device("mps" if _has_mps() else "cpu")
    kind, _, index = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(_has_mps())}[kind]
    if int(index or 0) >= count:
        here = [d["name"] for d in describe_devices()]
        raise ConfigError(f"--device {name}: not on this machine, which has {', '.join(here)}; use --device auto")
    return torch.device(name)


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn auto, bf16, fp16 or fp32 into a torch dtype; auto is bf16 on capable CUDA devices, else fp32."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def free_memory(device: torch.device) -> int:
    """Bytes that a new allocation on a device could get now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()


@contextmanager
def memory_guard(device: torch.device | str, doing: str, advice: Sequence[str]) -> Iterator[None]:
    """Turn running out of memory into an error that says what was needed, what was free, and which flags help.

    Parameters
    ----------
    device : torch.device or str
        Where the work is done, also as on the command line.
    doing : str
        The work, for the message ("training").
    advice : sequence of str
        Flags that would lower the need, the best first; three are told.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        wanted = _WANTED.search(str(error))
        if type(error) is RuntimeError and not (wanted and "memory" in str(error)):
            raise
        device = choose_device(device) if isinstance(device, str) else device
        amount = f"{wanted[1]} {wanted[2]}" if wanted else "more"
        free = free_memory(device)
        raise OutOfMemoryError(
            f"out of memory while {doing} on {device}: {amount} more were needed and {free / 2**30:.2f} GiB are free; "
            f"try {', or '.join(advice[:3])}"
        ) from None


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Compute with one thread on a CPU: sums are cut by the number of threads, and their bits with them."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def release_memory() -> None:
    """Give back what freed tensors still hold."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait_for_all() -> None:
    """Wait until every process of a spread job is here, then part; HoneloomError if one of them ended before."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        try:
            torch.distributed.barrier()
        except RuntimeError:
            raise HoneloomError("another process of this job ended early; its own message says why") from None
        torch.distributed.destroy_process_group()


def describe_devices() -> list[dict[str, Any]]:
    """Name, kind, memory and free memory in bytes of every device."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    name = platform.processor() or platform.machine()
    found = [{"name": name, "kind": "cpu", "memory_bytes": pages, "free_bytes": available_memory()}]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = {"memory_bytes": properties.total_memory, "free_bytes": free_memory(torch.device("cuda", i))}
        found.append({"name": properties.name, "kind": f"cuda:{i}", **memory})
    if _has_mps():
        found.append({"name": "Apple GPU", "kind": "mps", "memory_bytes": pages, "free_bytes": available_memory()})
    return found
