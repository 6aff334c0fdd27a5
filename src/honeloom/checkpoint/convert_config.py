"""Settings of `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from honeloom.config.base import InputMark, VerbConfig

__all__ = ["ConvertConfig"]


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


class ConvertConfig(VerbConfig):
    """Pickled weights as safetensors, tensor by tensor the same."""

    source: Annotated[str, BeforeValidator(_as_text), InputMark("folder")] = Field(
        description="Folder of a model or adapter whose weights exist only as pickles, such as pytorch_model.bin."
    )
