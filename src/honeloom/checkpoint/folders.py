"""The small files of a model folder: tokenizer, configuration, and folders that go away."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from honeloom.errors import CheckpointError
from honeloom.system import copy_file

__all__ = [
    "copy_config", "copy_tokenizer", "discard", "read_config", "refuse_mixture", "refuse_quantised", "tokenizer_files",
]  # fmt: skip

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the tokenizer files in a folder, sentencepiece models (*.model) included, in a fixed order."""
    models = sorted(p.name for p in folder.glob("*.model") if p.is_file())
    return [n for n in _TOKENIZER_FILES if (folder / n).is_file()] + models


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer files of a model folder byte for byte; return their names."""
    names = tokenizer_files(source)
    for name in names:
        copy_file(source / name, target / name)
    return names


def read_config(folder: Path) -> dict[str, Any]:
    """Parse `config.json` of a model folder.

    Raises
    ------
    CheckpointError
        Not there, not JSON, or not an object.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no config.json; a model folder needs one") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}; download the folder again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: holds a {type(config).__name__}; a model's configuration is a JSON object")
    return config


def copy_config(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    drop: Sequence[str] = (),
    generation: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Copy `config.json` and `generation_config.json` with changes.

    Parameters
    ----------
    source, target : Path
        Model folders.
    dtype : str, optional
        "bfloat16", for example; replaces `dtype`, the older key `torch_dtype`, and those of nested configurations.
    drop : sequence of str
        Keys to leave out.
    generation : mapping, optional
        Keys to set in `generation_config.json`, where there is one.
    changes : mapping, optional
        Keys to set in `config.json`.
    """
    config = {key: value for key, value in read_config(source).items() if key not in drop}
    if dtype is not None:
        for part in (config, *_nested(config)):
            _set_dtype(part, dtype, add=part is config)
    config.update(changes or {})
    _write(target / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    file = source / "generation_config.json"
    if file.is_file() and generation:
        content = {**json.loads(file.read_bytes()), **generation}
        _write(target / file.name, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    elif file.is_file():
        copy_file(file, target / file.name)


def _nested(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            yield value


def _set_dtype(config: dict[str, Any], dtype: str, *, add: bool) -> None:
    present = [key for key in ("dtype", "torch_dtype") if key in config]
    for key in present or (["dtype"] if add else []):
        config[key] = dtype


def discard(folder: Path) -> None:
    """Remove a folder and everything in it, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def refuse_mixture(folder: Path, doing: str) -> None:
    """Raise CheckpointError for a mixture of honeloom's own kind, whose routers would read the answers in training.

    Parameters
    ----------
    folder : Path
        Model folder.
    doing : str
        What it is wanted for ("tune").
    """
    kind = read_config(folder).get("model_type")
    if kind in ("honeloom_mixture", "honeloom_models"):
        raise CheckpointError(
            f"{folder}: a mixture ({kind}), and {doing} does not take one; {doing} its experts and mix them again, or "
            "let `honeloom mix` train the gates alone (tune_router)"
        )


def refuse_quantised(folder: Path, doing: str) -> None:
    """Raise CheckpointError if a model's weights are quantised: arithmetic on them is not arithmetic on the model.

    Parameters
    ----------
    folder : Path
        Model folder.
    doing : str
        What the weights are wanted for ("merge").
    """
    config = read_config(folder)
    settings = config.get("quantization_config")
    if not settings:
        return
    method = settings.get("quant_method", "an unknown method") if isinstance(settings, dict) else settings
    source = _unquantised(folder, config)
    raise CheckpointError(
        f"{folder}: its weights are quantised ({method}), so {doing} would work on rounded codes, not on the model; "
        + (f"use its source {source}" if source else "use the model that it was quantised from")
    )


def _unquantised(folder: Path, config: dict[str, Any]) -> str | None:
    """The model that a quantised one says it was made from: by its card, else by its config."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(errors="replace")
        found = re.search(r"^base_model:\s*\n?\s*(?:-\s*)?(\S+)", text, re.MULTILINE)
        if text.startswith("---") and found:
            return found[1].strip("'\"")
    name = config.get("_name_or_path")
    return str(name) if name else None
