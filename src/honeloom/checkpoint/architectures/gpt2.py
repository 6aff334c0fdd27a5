"""GPT-2. The first published files name tensors without "transformer."."""

from honeloom.checkpoint.architectures.layout import Architecture
from honeloom.checkpoint.architectures.shapes import gpt2_layer

LAYOUTS = (
    Architecture(
        "gpt2",
        layers="transformer.h",
        attention="attn",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        mid_stream="ln_2",
        attention_out=(r"attn\.c_proj\.(weight|bias)",),
        mlp_out=(r"mlp\.c_proj\.(weight|bias)",),
        embeddings="transformer.wte",
        final_norm="transformer.ln_f",
        disk_layers=("transformer.h", "h"),
        layer_shapes=gpt2_layer,
        tied=True,
        norm_bias=True,
        positions="transformer.wpe",
    ),
)
