"""Profile gguf: one file for llama.cpp, of architecture llama where blocks are whole, else of architecture deci.

What llama.cpp does with a block that lacks a half decides what is written: a width of 0 would throw the
block's attention away, and a first block without heads gives every head the size 0. So a missing MLP is
one of zeros, and a missing first attention is one head of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import Any

from honeloom.checkpoint.folders import read_config
from honeloom.dropping.export.gguf_tokenizer import tokenizer_keys
from honeloom.dropping.export.halves import Source
from honeloom.dropping.export.llama_like import LlamaShape, llama_shape
from honeloom.dropping.export.native import blocks_of, place_halves
from honeloom.dropping.export.plan import ExportPlan, ExportTensor
from honeloom.dropping.normalise import Block, is_native
from honeloom.errors import ConfigError

__all__ = ["ZERO_WIDTH", "export"]

ZERO_WIDTH = 32
"""Width of an MLP of zeros: the shortest row that 32-element quantisation takes."""
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_AROUND = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_FLOATS = {"F32": 0, "F16": 1, "BF16": 32}
"""Number types that are written as they are -> general.file_type."""


def export(source: Source) -> ExportPlan:
    """Rename everything as llama.cpp does, interleave rotary halves, and write zeros where it would go wrong.

    Raises
    ------
    ConfigError
        The family or a setting has no place in the format, or the weights have a type that is not written.
    """
    shape = llama_shape(source, "gguf")
    if shape.head_dim % 2:
        raise ConfigError(f"profile gguf: head_dim is {shape.head_dim}, and rotary pairs need an even one")
    blocks = blocks_of(source)
    arch = "llama" if is_native(blocks) else "deci"
    tensors = [_renamed(source, shape, t) for t in place_halves(source, blocks) if not t.name.endswith("inv_freq")]
    tensors += [t for number, block in enumerate(blocks) for t in _stand_ins(shape, number, block)]
    if shape.rope_scaling:
        factors = _rope_factors(shape)
        tensors.append(ExportTensor("rope_freqs.weight", None, (len(factors),), "F32", values=factors))
    vocabulary, notes = tokenizer_keys(source.checkpoint.folder, shape.vocabulary)
    keys = {**_header(source, arch), **_sizes(arch, shape, blocks), **vocabulary}
    return ExportPlan(
        profile="gguf",
        tensors=tuple(tensors),
        config={},
        blocks=blocks,
        saves=("params", "kv", "flops"),
        loads_in=("llama.cpp",),
        keys=keys,
        notes=(*shape.notes, *notes, *_remarks(blocks)),
    )


def _renamed(source: Source, shape: LlamaShape, tensor: ExportTensor) -> ExportTensor:
    """A tensor under llama.cpp's name; vectors become float32, which it requires."""
    if tensor.dtype not in _FLOATS:
        raise ConfigError(f"profile gguf: {tensor.source!r} is {tensor.dtype}; F32, F16 and BF16 are written")
    place = source.layout.half_of(tensor.name)
    name, kind = tensor.name.rsplit(".", 1)
    heads = 0
    if place is None:
        if name not in _AROUND:
            raise ConfigError(f"profile gguf: it has no place for {tensor.name!r}")
        new = _AROUND[name]
    else:
        part = place[2].rpartition(".")[0]
        new = f"blk.{place[0]}.{_NAMES[part]}"
        heads = {"self_attn.q_proj": shape.heads, "self_attn.k_proj": shape.kv_heads}.get(part, 0)
    dtype = "F32" if len(tensor.shape) == 1 else tensor.dtype
    return ExportTensor(f"{new}.{kind}", tensor.source, tensor.shape, dtype, heads)


def _stand_ins(shape: LlamaShape, number: int, block: Block) -> list[ExportTensor]:
    """Zeros in the place of a missing MLP, and of a missing attention in the first block."""
    hidden, prefix = shape.hidden, f"blk.{number}"
    wanted: list[tuple[str, tuple[int, ...]]] = []
    if block[1] is None:
        wanted += [("ffn_norm", (hidden,)), ("ffn_gate", (ZERO_WIDTH, hidden)), ("ffn_up", (ZERO_WIDTH, hidden))]
        wanted += [("ffn_down", (hidden, ZERO_WIDTH))]
    if block[0] is None and number == 0:
        wanted += [("attn_norm", (hidden,)), ("attn_output", (hidden, shape.head_dim))]
        wanted += [(f"attn_{n}", (shape.head_dim, hidden)) for n in "qkv"]
    return [ExportTensor(f"{prefix}.{name}.weight", None, size, "F32") for name, size in wanted]


def _sizes(arch: str, shape: LlamaShape, blocks: tuple[Block, ...]) -> dict[str, Any]:
    """Sizes by block in architecture deci, of all blocks in architecture llama."""
    heads: Any = shape.heads
    kv_heads: Any = shape.kv_heads
    width: Any = shape.width
    if arch == "deci":
        heads = [shape.heads if a is not None else int(i == 0) for i, (a, _) in enumerate(blocks)]
        kv_heads = [shape.kv_heads if a is not None else int(i == 0) for i, (a, _) in enumerate(blocks)]
        width = [shape.width if m is not None else ZERO_WIDTH for _, m in blocks]
    return {
        f"{arch}.vocab_size": shape.vocabulary,
        f"{arch}.context_length": shape.context,
        f"{arch}.embedding_length": shape.hidden,
        f"{arch}.block_count": len(blocks),
        f"{arch}.feed_forward_length": width,
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": kv_heads,
        f"{arch}.attention.key_length": shape.head_dim,
        f"{arch}.attention.value_length": shape.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": shape.eps,
        f"{arch}.rope.dimension_count": shape.head_dim,
        f"{arch}.rope.freq_base": shape.theta,
    }


def _header(source: Source, arch: str) -> dict[str, Any]:
    kinds = [source.checkpoint.info(n).dtype for n in source.names()]
    folder = source.checkpoint.folder
    most = max(_FLOATS, key=lambda kind: (kinds.count(kind), kind))
    return {
        "general.architecture": arch,
        "general.name": str(read_config(folder).get("_name_or_path") or folder.name),
        "general.file_type": _FLOATS[most],
        "general.quantization_version": 2,
    }


def _rope_factors(shape: LlamaShape) -> tuple[float, ...]:
    """By how much rope type llama3 divides the frequency of every rotary pair."""
    scaling: Mapping[str, Any] = shape.rope_scaling or {}
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = float(scaling["original_max_position_embeddings"])
    values = []
    for pair in range(shape.head_dim // 2):
        wavelength = 2 * pi * shape.theta ** (2 * pair / shape.head_dim)
        if wavelength < trained / high:
            values.append(1.0)
        elif wavelength > trained / low:
            values.append(factor)
        else:
            smooth = (trained / wavelength - low) / (high - low)
            values.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(values)


def _remarks(blocks: tuple[Block, ...]) -> tuple[str, ...]:
    notes = []
    lone = [i for i, (_, m) in enumerate(blocks) if m is None]
    if lone:
        notes.append(
            f"the missing MLPs of blocks {lone} are written as {ZERO_WIDTH} units of zeros, for llama.cpp would "
            "throw away the attention of a block of width 0"
        )
    if blocks[0][0] is None:
        notes.append("block 0 has no attention; one head of zeros stands for it, whose keys and values are kept")
    if not is_native(blocks):
        notes.append("run with flash attention (-fa on): without it llama.cpp pads the values of blocks without heads")
    return tuple(notes)
