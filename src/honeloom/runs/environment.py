"""What the machine was when a result was made: versions and devices, never secrets."""

from __future__ import annotations

import os
import platform
import shutil
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["describe_environment", "describe_installation", "installed_version"]

PACKAGES = (
    "honeloom", "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "peft", "accelerate",
    "datasets", "numpy", "scipy", "scikit-learn", "pyarrow", "pydantic", "flwr", "ray", "lm_eval",
    "sentence-transformers", "bitsandbytes", "gguf", "plotly", "matplotlib", "dp-accounting",
)  # fmt: skip
VARIABLES = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "PYTHONHASHSEED",
    "RANK", "LOCAL_RANK", "WORLD_SIZE",
)  # fmt: skip


ADDS = {
    "tune": "tune, and adapters as models",
    "lm-eval": "evaluate --tasks",
    "quant": "--load-in 4bit|8bit",
    "report": "report.html",
}
"""What each extra adds; the others are for later versions."""


@cache
def installed_version(package: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_environment() -> dict[str, Any]:
    """Return python, platform, package versions and the few variables that change numbers."""
    versions = {p: installed_version(p) for p in PACKAGES}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": {p: v for p, v in versions.items() if v},
        "variables": {v: os.environ[v] for v in VARIABLES if v in os.environ},
    }


def describe_installation() -> dict[str, Any]:
    """Return the environment with the extras, what each of them lacks, and the free disk space here."""
    return {**describe_environment(), "extras": _extras(), "disk_free_bytes": shutil.disk_usage(Path.cwd()).free}


def _extras() -> dict[str, Any]:
    """What each extra adds, which distributions it asks for, and which of them are absent."""
    found: dict[str, Any] = {}
    declared = (
        metadata.requires("honeloom") if installed_version("honeloom") else None
    )  # a checkout that is not installed
    for requirement in declared or []:
        name, _, marker = requirement.partition(";")
        if "extra ==" not in marker:
            continue
        extra = marker.split("extra ==")[1].strip().strip("'\"")
        package = name.strip().split("[")[0]
        for sign in "<>=!~ ":
            package = package.split(sign)[0]
        if extra in ("dev", "all") or package == "honeloom":
            continue
        entry = found.setdefault(extra, {"adds": ADDS.get(extra), "needs": [], "missing": []})
        entry["needs"].append(package)
        if installed_version(package) is None:
            entry["missing"].append(package)
    return found
