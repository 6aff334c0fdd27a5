"""Gemma 2 and 3: each branch is normalised before and after, so the MLP has a norm of its own."""

from dataclasses import replace

from honeloom.checkpoint.architectures.layout import Architecture
from honeloom.checkpoint.architectures.shapes import gemma2_layer, gemma3_layer

GEMMA2 = Architecture(
    "gemma2",
    mlp_norm="pre_feedforward_layernorm",
    mid_stream="pre_feedforward_layernorm",
    layer_shapes=gemma2_layer,
    tied=True,
)
GEMMA3_TEXT = replace(GEMMA2, model_type="gemma3_text", layer_shapes=gemma3_layer)
GEMMA3 = replace(
    GEMMA3_TEXT,
    model_type="gemma3",
    layers="model.language_model.layers",
    embeddings="model.language_model.embed_tokens",
    final_norm="model.language_model.norm",
    disk_layers=("language_model.model.layers", "model.language_model.layers"),
    disk_head="language_model.lm_head",
)
"""The text tower of the model that also sees images."""

LAYOUTS = (GEMMA2, GEMMA3_TEXT, GEMMA3)
