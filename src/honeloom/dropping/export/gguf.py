"""Profile gguf: one file for llama.cpp, of the family's architecture where blocks are whole, else of deci."""

from __future__ import annotations

from honeloom.checkpoint.gguf.content import gguf_content, refusal
from honeloom.dropping.export.halves import Source
from honeloom.dropping.export.native import blocks_of, place_halves
from honeloom.dropping.export.plan import ExportPlan

__all__ = ["export"]


def export(source: Source) -> ExportPlan:
    """Rename everything as llama.cpp does, with zeros where it would go wrong.

    Raises
    ------
    ConfigError
        The family or a setting has no place in the format, or the weights have a type that is not written.
    """
    blocks, checkpoint = blocks_of(source), source.checkpoint
    content = gguf_content(
        checkpoint.folder,
        source.config,
        place_halves(source, blocks),
        [(attention is not None, mlp is not None) for attention, mlp in blocks],
        lambda names: not any(bool(checkpoint.read(name).any()) for name in names),
        refusal("gguf", "--profile dropped and --profile zero of `honeloom drop` take every decoder"),
    )
    return ExportPlan(
        profile="gguf",
        tensors=content.tensors,
        config={},
        blocks=blocks,
        saves=("params", "kv", "flops"),
        loads_in=("llama.cpp",),
        keys=content.keys,
        notes=content.notes,
    )
