"""OLMo 2: branches read the stream itself and are normalised after."""

from honeloom.checkpoint.architectures.layout import Architecture
from honeloom.checkpoint.architectures.shapes import olmo2_layer

LAYOUTS = (Architecture("olmo2", attention_norm=None, mlp_norm=None, mid_stream="mlp", layer_shapes=olmo2_layer),)
