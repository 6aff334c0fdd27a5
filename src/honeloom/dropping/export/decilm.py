"""Profile decilm: the format of Nemotron-NAS, whose blocks may lack attention or MLP, for vLLM and TensorRT-LLM."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from honeloom.checkpoint.decoder_shape import DecoderShape, decoder_shape
from honeloom.checkpoint.export_tensor import ExportTensor
from honeloom.dropping.export.halves import Source
from honeloom.dropping.export.native import blocks_of, place_halves
from honeloom.dropping.export.plan import ExportPlan
from honeloom.dropping.normalise import Block
from honeloom.errors import ConfigError

__all__ = ["CODE_FILE", "export", "ffn_mult", "ffn_width"]

FAMILIES = ("llama", "mistral", "qwen2")
CODE_FILE = "configuration_nemotron_nas.py"
_KEPT = (
    "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "hidden_act", "initializer_range",
    "mlp_bias", "tie_word_embeddings", "use_cache", "vocab_size", "attention_dropout", "pretraining_tp",
)  # fmt: skip
_ROUND = 256


def ffn_width(multiple: float, hidden: int) -> int:
    """Width of an MLP as the runtimes read it: int(2 * multiple * hidden / 3), rounded up to 256."""
    width = int(2 * multiple * hidden / 3)
    return -(-width // _ROUND) * _ROUND


def ffn_mult(width: int, hidden: int) -> float:
    """The multiple that the runtimes read as this width.

    Raises
    ------
    ConfigError
        No multiple is: the width is not one of 256.
    """
    if width % _ROUND or width <= 0:
        raise ConfigError(
            f"profile decilm: intermediate_size is {width}, and its runtimes round widths up to multiples of {_ROUND}; "
            "--profile dropped and --profile gguf take any width"
        )
    multiple = 3 * width / (2 * hidden)
    # Truncation may lose 1, and rounding up then adds 256.
    return multiple if ffn_width(multiple, hidden) == width else multiple * (1 + 1e-9)


def export(source: Source) -> ExportPlan:
    """Rename surviving halves into blocks and say of each what it lacks; tensors of what is lacking are absent.

    Raises
    ------
    ConfigError
        The family or a size has no place in the format, or the first block would have no attention.
    """
    shape = decoder_shape(
        source.config,
        [ExportTensor.copied(source.checkpoint, name) for name in source.names()],
        FAMILIES,
        lambda reason: ConfigError(f"profile decilm: {reason}; --profile dropped and --profile zero take this model"),
    )
    blocks = blocks_of(source)
    if blocks[0][0] is None:
        raise ConfigError(
            "profile decilm: the first block would have no attention, and vLLM fails on that (it has no residual "
            "before the first attention); keep the attention of the first layer, or use --profile gguf or dropped"
        )
    if shape.head_dim * shape.heads != shape.hidden:
        raise ConfigError(
            f"profile decilm: head_dim is {shape.head_dim}, and its runtimes take hidden_size / num_attention_heads = "
            f"{shape.hidden / shape.heads:g}; use --profile gguf or dropped"
        )
    loads = ["vllm with trust_remote_code", "llama.cpp's converter"]
    if not shape.biases:
        loads.insert(1, "tensorrt-llm")
    return ExportPlan(
        profile="decilm",
        tensors=tuple(place_halves(source, blocks)),
        config=_config(source.config, shape, blocks),
        blocks=blocks,
        saves=("params", "kv", "flops"),
        loads_in=tuple(loads),
        files={CODE_FILE: files("honeloom").joinpath("backends/hf/decilm_config.py").read_text(encoding="utf-8")},
        notes=shape.notes,
    )


def _config(config: Mapping[str, Any], shape: DecoderShape, blocks: tuple[Block, ...]) -> dict[str, Any]:
    return {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_nemotron_nas.DeciLMConfig"},
        "model_type": "nemotron-nas",
        "block_configs": [_block(shape, block) for block in blocks],
        "hidden_size": shape.hidden,
        "intermediate_size": None,
        "max_position_embeddings": shape.context,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": len(blocks),
        "num_key_value_heads": None,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "rope_scaling": dict(shape.rope_scaling) if shape.rope_scaling else None,
        **_bias_keys(shape),
        **{key: config[key] for key in _KEPT if key in config},
        "tie_word_embeddings": shape.tied,
    }


def _bias_keys(shape: DecoderShape) -> dict[str, bool]:
    attention = {f"self_attn.{n}_proj" for n in "qkvo"} & shape.biases
    if not attention:
        return {"attention_bias": False}
    if len(attention) == 4:
        return {"attention_bias": True}
    if attention == {f"self_attn.{n}_proj" for n in "qkv"}:
        return {"attention_bias": False, "qkv_bias": True}
    raise ConfigError(f"profile decilm: biases of {', '.join(sorted(attention))} alone cannot be written")


def _block(shape: DecoderShape, block: Block) -> dict[str, Any]:
    attention, mlp = block
    return {
        "attention": {
            "n_heads_in_group": None if attention is None else shape.heads // shape.kv_heads,
            "no_op": attention is None,
            "num_sink_tokens": None,
            "replace_with_linear": False,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {
            "ffn_mult": None if mlp is None else ffn_mult(shape.width, shape.hidden),
            "no_op": mlp is None,
            "replace_with_linear": False,
            "sparsify": None,
        },
    }
