"""Under which of llama.cpp's architectures a decoder computes the same, and the sizes that its file names.

What each graph does decides. `llama` turns neighbouring pairs, takes biases and any head size, knows llama3's
rotary factors, and sums experts with weights that add up to 1. The Qwen graphs turn halves and know no factors;
`qwen2moe` never normalises the weights of experts, divides by the shared expert's gate, and wants a head of its
own; `qwen3moe` always normalises. `deci` is `llama` with sizes by block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import pi
from typing import Any

from honeloom.checkpoint.decoder_shape import DecoderShape, Experts, Refuse

__all__ = ["FAMILIES", "LLAMA_LIKE", "ZERO_WIDTH", "Halves", "Target", "choose_target", "rope_factors", "size_keys"]

LLAMA_LIKE = ("llama", "mistral", "qwen2")
"""Families that `llama` and `deci` can say."""
FAMILIES = (*LLAMA_LIKE, "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")
"""Model types that are written; what each computes was compared with llama.cpp."""
ZERO_WIDTH = 32
"""Width of an MLP of zeros: the shortest row that 32-element quantisation takes."""

Halves = tuple[bool, bool]
"""Whether a block has attention, and an MLP."""


@dataclass(frozen=True, slots=True)
class Target:
    """How a decoder is written.

    Attributes
    ----------
    arch : str
        llama.cpp's architecture.
    interleaved : bool
        Whether rotary pairs stand side by side.
    head : bool
        Whether tied embeddings are written once more as the head.
    shared : bool
        Whether the shared expert is written.
    """

    arch: str
    interleaved: bool
    head: bool = False
    shared: bool = False


def choose_target(
    shape: DecoderShape, blocks: Sequence[Halves], silent: Callable[[str], bool], refuse: Refuse
) -> Target:
    """Find the architecture.

    Parameters
    ----------
    shape : DecoderShape
        The decoder.
    blocks : sequence of Halves
        What each block has.
    silent : callable
        Whether all tensors of a part ("mlp.shared_expert.down_proj") are 0.
    refuse : callable
        Makes an error of a reason.

    Raises
    ------
    ConfigError
        No architecture computes this decoder.
    """
    if shape.head_dim % 2:
        raise refuse(f"head_dim is {shape.head_dim}, and rotary pairs need an even one")
    if any(half != (True, True) for half in blocks):
        if shape.family not in LLAMA_LIKE:
            raise refuse(
                f"blocks without attention or MLP can be written of {', '.join(LLAMA_LIKE)} alone, not of a "
                f"{shape.family}; drop whole blocks, or the MLP of a layer with the attention of the next one"
            )
        return Target("deci", True)
    if shape.experts is not None:
        return _sparse(shape, shape.experts, silent, refuse)
    if shape.family == "qwen3":
        _require_plain(shape, "qwen3", refuse)
        return Target("qwen3", False)
    fits = shape.rope_scaling is None and shape.heads * shape.head_dim == shape.hidden
    extra = shape.biases - {f"self_attn.{n}_proj" for n in "qkv"}
    return Target("qwen2", False) if shape.family == "qwen2" and fits and not extra else Target("llama", True)


def _sparse(shape: DecoderShape, experts: Experts, silent: Callable[[str], bool], refuse: Refuse) -> Target:
    normalised = experts.normalised or experts.used == experts.count  # of all of them the weights sum to 1 anyway
    if shape.family == "mixtral":
        return Target("llama", True)
    if shape.family == "qwen3_moe":
        _require_plain(shape, "qwen3moe", refuse)
        if not normalised:
            raise refuse("norm_topk_prob is false, and llama.cpp's qwen3moe makes the weights of experts sum to 1")
        return Target("qwen3moe", False)
    if normalised and (not experts.shared_width or silent("mlp.shared_expert.down_proj")):
        return Target("llama", True)
    if experts.normalised and experts.used < experts.count:
        raise refuse(
            "norm_topk_prob is true and there is a shared expert: llama.cpp's qwen2moe does not make the weights of "
            "experts sum to 1, and its architectures that do have no gated shared expert"
        )
    if silent("mlp.shared_expert_gate"):
        raise refuse("the gate of the shared expert is 0 in a layer, and llama.cpp divides by what it gives")
    _require_plain(shape, "qwen2moe", refuse)
    if shape.heads * shape.head_dim != shape.hidden:
        raise refuse(f"{shape.heads} heads of {shape.head_dim} are not the hidden size {shape.hidden}, as qwen2moe has")
    return Target("qwen2moe", False, head=True, shared=True)


def _require_plain(shape: DecoderShape, arch: str, refuse: Refuse) -> None:
    """The Qwen graphs have no rotary factors, and no bias behind attention."""
    if shape.rope_scaling is not None:
        raise refuse(f"rope_type is llama3, which llama.cpp's {arch} does not know; default can be written")
    odd = sorted(shape.biases - {f"self_attn.{n}_proj" for n in "qkv"})
    if odd:
        raise refuse(f"{odd[0]} has a bias, for which llama.cpp's {arch} has no place")


def size_keys(arch: str, shape: DecoderShape, blocks: Sequence[Halves]) -> dict[str, Any]:
    """Sizes: by block in architecture deci, of all blocks in the others."""
    heads: Any = shape.heads
    kv_heads: Any = shape.kv_heads
    width: Any = shape.experts.width if shape.experts and arch == "llama" else shape.width
    if arch == "deci":
        heads = [shape.heads if a else int(i == 0) for i, (a, _) in enumerate(blocks)]
        kv_heads = [shape.kv_heads if a else int(i == 0) for i, (a, _) in enumerate(blocks)]
        width = [shape.width if m else ZERO_WIDTH for _, m in blocks]
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
        **_expert_keys(arch, shape.experts),
    }


def _expert_keys(arch: str, experts: Experts | None) -> dict[str, int]:
    if experts is None:
        return {}
    keys = {f"{arch}.expert_count": experts.count, f"{arch}.expert_used_count": experts.used}
    if arch != "llama":
        keys[f"{arch}.expert_feed_forward_length"] = experts.width
    if arch == "qwen2moe":
        keys[f"{arch}.expert_shared_feed_forward_length"] = experts.shared_width
    return keys


def rope_factors(shape: DecoderShape) -> tuple[float, ...]:
    """By how much rope type llama3 divides the frequency of every rotary pair; nothing for plain positions."""
    if shape.rope_scaling is None:
        return ()
    scaling = shape.rope_scaling
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
