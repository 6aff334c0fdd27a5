"""Mixtures of experts: the MLP's output projection is one tensor per expert, or one for all."""

from honeloom.checkpoint.architectures.layout import Architecture
from honeloom.checkpoint.architectures.shapes import mixtral_layer, qwen2_moe_layer, qwen3_moe_layer

_FUSED = r"mlp\.experts\.down_proj"

LAYOUTS = (
    Architecture(
        "mixtral", mlp_out=(r"block_sparse_moe\.experts\.\d+\.w2\.weight", _FUSED), layer_shapes=mixtral_layer
    ),
    # A layer may also be dense (mlp_only_layers, decoder_sparse_step).
    Architecture(
        "qwen2_moe",
        mlp_out=(
            r"mlp\.experts\.\d+\.down_proj\.weight",
            r"mlp\.shared_expert\.down_proj\.weight",
            _FUSED,
            r"mlp\.down_proj\.weight",
        ),
        layer_shapes=qwen2_moe_layer,
    ),
    Architecture(
        "qwen3_moe",
        mlp_out=(r"mlp\.experts\.\d+\.down_proj\.weight", _FUSED, r"mlp\.down_proj\.weight"),
        layer_shapes=qwen3_moe_layer,
    ),
)
