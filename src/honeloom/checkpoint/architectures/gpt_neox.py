"""GPT-NeoX and Pythia: attention and MLP read the same stream, unless the config says otherwise."""

from honeloom.checkpoint.architectures.layout import Architecture
from honeloom.checkpoint.architectures.shapes import gpt_neox_layer

PARALLEL = Architecture(
    "gpt_neox",
    layers="gpt_neox.layers",
    attention="attention",
    mid_stream=None,
    attention_out=(r"attention\.dense\.(weight|bias)",),
    mlp_out=(r"mlp\.dense_4h_to_h\.(weight|bias)",),
    embeddings="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    disk_layers=("gpt_neox.layers",),
    disk_head="embed_out",
    layer_shapes=gpt_neox_layer,
    norm_bias=True,
)
LAYOUTS = (PARALLEL,)
