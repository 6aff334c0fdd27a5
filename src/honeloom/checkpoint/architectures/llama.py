"""Llama and the families that kept its layout."""

from honeloom.checkpoint.architectures.layout import Architecture
from honeloom.checkpoint.architectures.shapes import phi3_layer, qwen2_layer, qwen3_layer

LAYOUTS = (
    Architecture("llama"),
    Architecture("mistral"),
    Architecture("qwen2", layer_shapes=qwen2_layer),
    Architecture("qwen3", layer_shapes=qwen3_layer),
    Architecture("phi3", layer_shapes=phi3_layer),
)
