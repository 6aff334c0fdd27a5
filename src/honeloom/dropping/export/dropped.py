"""Profile dropped: the source without the tensors of dropped halves, under a model type of its own."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, get_args

from honeloom.checkpoint.export_tensor import ExportTensor
from honeloom.dropping.export.halves import DROPPED, Half, Source
from honeloom.dropping.export.native import blocks_of
from honeloom.dropping.export.plan import ExportPlan
from honeloom.errors import CheckpointError

__all__ = ["AUTO_MAP", "CODE_FILE", "export"]

CODE_FILE = "honeloom_dropped.py"
"""The file by which transformers loads the folder where honeloom is not installed."""
AUTO_MAP = {
    "AutoConfig": "honeloom_dropped.HoneloomDroppedConfig",
    "AutoModelForCausalLM": "honeloom_dropped.HoneloomDroppedForCausalLM",
}
_COPIED = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings")


def export(source: Source) -> ExportPlan:
    """Leave out what is dropped; numbers of layers stay, and config.json says what is missing.

    The model type is not a stock one, so a loader that does not know it stops instead of filling
    the gaps with random numbers.

    Raises
    ------
    CheckpointError
        A half to drop has no tensors in the files, so their layout is not the one that is known; or layers use keys
        of layers before them.
    """
    text = source.config.get("text_config") or source.config
    if source.without_attention and text.get("num_kv_shared_layers"):
        raise CheckpointError(
            f"{source.checkpoint.folder}: num_kv_shared_layers is set, so layers use keys of attentions before them, "
            "which must stay; use --profile zero"
        )
    lost: list[str] = []
    kept: list[str] = []
    for name in source.names():
        place = source.layout.half_of(name)
        gone = place is not None and place[1] is not None and place[0] in source.gone(place[1])
        (lost if gone else kept).append(name)
    _require_found(source, lost)
    config: dict[str, Any] = {
        "architectures": ["HoneloomDroppedForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": DROPPED,
        "base": source.config,
        "drop_spec": _spec(source),
    }
    for key in _COPIED:
        if key in source.config or key in text:
            config[key] = source.config.get(key, text.get(key))
    return ExportPlan(
        profile="dropped",
        tensors=tuple(ExportTensor.copied(source.checkpoint, name) for name in kept),
        config=config,
        blocks=blocks_of(source),
        saves=("params", "kv", "flops"),
        loads_in=("honeloom", "transformers with trust_remote_code"),
        files={CODE_FILE: files("honeloom").joinpath("backends/hf/dropped_model.py").read_text(encoding="utf-8")},
    )


def _spec(source: Source) -> dict[str, Any]:
    """What is missing, and in which modules of the stock class it was."""
    layout = source.layout
    modules: dict[str, Any] = {
        "layers": layout.layers,
        "attention": list(layout.attention),
        "attention_norms": list(layout.attention_norms),
        "mlp": list(layout.mlp),
        "mlp_norms": list(layout.mlp_norms),
        "mlp_outputs": layout.mlp_outputs,
    }
    return {
        "version": 1,
        "attention": list(source.without_attention),
        "mlp": list(source.without_mlp),
        "modules": modules,
    }


def _require_found(source: Source, lost: list[str]) -> None:
    found = {(place[1], place[0]) for name in lost if (place := source.layout.half_of(name))}
    for half in get_args(Half):
        for layer in source.gone(half):
            if (half, layer) not in found and (half, layer) not in source.absent:
                raise CheckpointError(
                    f"{source.checkpoint.folder}: no tensors of the {half} of layer {layer}; its files do not have the "
                    f"layout of {source.layout.model_type}"
                )
