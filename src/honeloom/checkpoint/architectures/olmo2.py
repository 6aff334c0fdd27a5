"""OLMo 2: branches read the stream itself and are normalised after."""

from honeloom.checkpoint.architectures.layout import Architecture

LAYOUTS = (Architecture("olmo2", attention_norm=None, mlp_norm=None, mid_stream="mlp"),)
