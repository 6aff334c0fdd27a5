"""honeloom: select, tune, aggregate, merge and drop open language models, and prove each step.

The verbs of the command line are functions here. Importing this package loads nothing
heavy; each name is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from honeloom.api import (
        aggregate,
        convert,
        drop,
        evaluate,
        export,
        extract_lora,
        federate,
        glue,
        load_model,
        merge,
        mix,
        plan,
        run,
        select,
        tune,
    )
    from honeloom.stages.records import verify
    from honeloom.stages.serve_check import serve_check
    from honeloom.types.report import Report

__version__ = "0.1.0"

_FUNCTIONS = (
    "aggregate", "convert", "drop", "evaluate", "export", "extract_lora", "federate", "glue", "load_model", "merge",
    "mix", "plan", "run", "select", "tune",
)  # fmt: skip
_TARGETS = {
    **dict.fromkeys(_FUNCTIONS, "honeloom.api"),
    "serve_check": "honeloom.stages.serve_check",
    "verify": "honeloom.stages.records",
    "Report": "honeloom.types.report",
}

__all__ = [
    "Report", "__version__", "aggregate", "convert", "drop", "evaluate", "export", "extract_lora",
    "federate", "glue", "load_model", "merge", "mix", "plan", "run", "select", "serve_check", "tune", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _TARGETS:
        return getattr(importlib.import_module(_TARGETS[name]), name)
    raise AttributeError(f"module 'honeloom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
