"""What ZOO stands for on the command line: a YAML file, or a folder of model folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from honeloom.config.load import load_yaml
from honeloom.errors import ConfigError, SourceError

__all__ = ["read_zoo"]

_MARKS = ("config.json", "adapter_config.json")


def read_zoo(zoo: Path) -> dict[str, Any]:
    """Settings of `glue` from a YAML file, or the models of a folder.

    Parameters
    ----------
    zoo : Path
        A file with `models`, `base`, `search_rows`, `report_rows`, `budget` and any other setting; or a folder whose
        subfolders are models or adapters.

    Raises
    ------
    SourceError
        There is no such file or folder, or the folder holds no model.
    ConfigError
        The file is no mapping.
    """
    if zoo.is_file():
        return dict(load_yaml(zoo))
    if not zoo.is_dir():
        raise SourceError(f"zoo {str(zoo)!r}: no such file or folder; give a YAML file, or a folder of model folders")
    models, left_out = [], []
    for path in sorted(p for p in zoo.iterdir() if p.is_dir() and not p.name.startswith(".")):
        reason = _why_not(path)
        if reason is None:
            models.append({"model": str(path), "name": path.name})
        else:
            left_out.append({"model": path.name, "reason": reason})
    if not models:
        if any((zoo / mark).is_file() for mark in _MARKS):
            raise ConfigError(f"zoo {str(zoo)!r} is a model itself; give the folder that holds the model folders")
        raise SourceError(f"zoo {str(zoo)!r}: no model folder in it (one with {' or '.join(_MARKS)})")
    return {"models": models, "left_out": left_out}


def _why_not(folder: Path) -> str | None:
    """Why a folder is no model that can be used, or None."""
    if not any((folder / mark).is_file() for mark in _MARKS):
        return f"no {' or '.join(_MARKS)}"
    if not any(folder.glob("*.safetensors")):
        return "no *.safetensors; `honeloom convert` makes them from pickled weights"
    return None
