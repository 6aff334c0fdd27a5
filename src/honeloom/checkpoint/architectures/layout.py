"""The record that describes where a model family keeps its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from honeloom.checkpoint.architectures.shapes import Shapes, llama_layer

__all__ = ["Architecture"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where one family of decoders keeps its parts, in the loaded model and on disk.

    The defaults are the Llama layout. Module paths are those of the transformers class; tensor
    names are those of the files, which differ for some families.

    Attributes
    ----------
    model_type : str
        As in config.json.
    layers : str
        Module path of the list of decoder layers.
    attention, mlp : str
        Modules of the two branches within a layer.
    attention_norm, mlp_norm : str or None
        Modules that normalise the input of each branch; None if the branch reads the stream
        itself.
    mid_stream : str or None
        Module within a layer whose input is the residual stream between attention and MLP;
        None if both read the same stream (parallel branches).
    attention_out, mlp_out : tuple of str
        Regular expressions for the tensors on disk, within a layer, of each branch's output
        projection, biases included. With all of them zero the branch adds nothing.
    embeddings, final_norm, head : str
        Module paths.
    disk_layers : tuple of str
        Prefixes of the layers' tensors on disk, the usual one first.
    disk_head : str
        Prefix of the head's tensors on disk.
    layer_shapes : callable
        (config, layer) -> names within a layer on disk and their shapes.
    tied : bool
        Whether head and embedding are one where the config does not say.
    norm_bias : bool
        Whether the final norm has a bias.
    positions : str or None
        Module path of learned positions.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    mid_stream: str | None = "post_attention_layernorm"
    attention_out: tuple[str, ...] = (r"self_attn\.o_proj\.(weight|bias)",)
    mlp_out: tuple[str, ...] = (r"mlp\.down_proj\.(weight|bias)",)
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    disk_layers: tuple[str, ...] = ("model.layers",)
    disk_head: str = "lm_head"
    layer_shapes: Callable[[Mapping[str, Any], int], Shapes] = llama_layer
    tied: bool = False
    norm_bias: bool = False
    positions: str | None = None
