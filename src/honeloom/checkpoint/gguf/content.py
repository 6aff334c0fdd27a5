"""All that a GGUF file says of a decoder: metadata, and tensors under llama.cpp's names.

What llama.cpp does with a block that lacks a half decides what is written: a width of 0 would throw the
block's attention away, and a first block without heads gives every head the size 0. So a missing MLP is
one of zeros, and a missing first attention is one head of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from honeloom.checkpoint.decoder_shape import DecoderShape, Refuse, decoder_shape, placed
from honeloom.checkpoint.export_tensor import ExportTensor
from honeloom.checkpoint.folders import read_config
from honeloom.checkpoint.gguf.architectures import (
    FAMILIES,
    ZERO_WIDTH,
    Halves,
    Target,
    choose_target,
    rope_factors,
    size_keys,
)
from honeloom.checkpoint.gguf.quant import FILE_TYPES
from honeloom.checkpoint.gguf.tokenizer import tokenizer_keys
from honeloom.errors import ConfigError

__all__ = ["GgufContent", "gguf_content", "refusal"]

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_AROUND = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ROUTERS = ("mlp.gate", "mlp.shared_expert_gate")
"""What llama.cpp keeps in float32 although it is a matrix."""


@dataclass(frozen=True, slots=True)
class GgufContent:
    """Metadata, tensors, and what a reader should know."""

    keys: dict[str, Any]
    tensors: tuple[ExportTensor, ...]
    notes: tuple[str, ...]


def gguf_content(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Sequence[ExportTensor],
    blocks: Sequence[Halves],
    silent: Callable[[Sequence[str]], bool],
    refuse: Refuse,
) -> GgufContent:
    """Describe the file of a decoder; reads small files only, apart from what `silent` reads.

    Parameters
    ----------
    folder : Path
        With the tokenizer.
    config : mapping
        Content of config.json, of the stock class.
    tensors : sequence of ExportTensor
        Under the names that the stock class has on disk; layers count as blocks of the file do.
    blocks : sequence of Halves
        What each block has.
    silent : callable
        Whether all of some tensors of the source are 0; asked of shared experts alone.
    refuse : callable
        Makes an error of a reason.

    Raises
    ------
    ConfigError, CheckpointError
        The family or a setting has no place in the format, or the weights have a type that is not written.
    """
    tensors = [t for t in tensors if not t.name.endswith("inv_freq")]
    shape = decoder_shape(config, tensors, FAMILIES, refuse)
    _require_floats(tensors, refuse)

    def part_is_silent(part: str) -> bool:
        return silent([t.source for t in tensors if t.source and (placed(t.name) or (0, ""))[1] == part])

    target = choose_target(shape, blocks, part_is_silent, refuse)
    renamed = _renamed(tensors, shape, target, refuse)
    renamed += [t for number, block in enumerate(blocks) for t in _stand_ins(shape, number, block)]
    if factors := rope_factors(shape):
        renamed.append(ExportTensor("rope_freqs.weight", None, (len(factors),), "F32", values=factors))
    vocabulary, notes = tokenizer_keys(folder, shape.vocabulary)
    keys = {**_header(folder, target.arch, tensors), **size_keys(target.arch, shape, blocks), **vocabulary}
    return GgufContent(keys, tuple(renamed), (*shape.notes, *notes, *_remarks(shape, target, blocks)))


def _require_floats(tensors: Sequence[ExportTensor], refuse: Refuse) -> None:
    for tensor in tensors:
        if tensor.dtype not in FILE_TYPES:
            raise refuse(f"{tensor.source!r} is {tensor.dtype}; F32, F16 and BF16 are written")


def _renamed(
    tensors: Sequence[ExportTensor], shape: DecoderShape, target: Target, refuse: Refuse
) -> list[ExportTensor]:
    """Everything under llama.cpp's names; experts of a layer become one tensor."""
    experts: dict[tuple[int, str], list[ExportTensor]] = {}
    for tensor in tensors:
        place = placed(tensor.name)
        if place is not None and place[3] is not None:
            experts.setdefault(place[:2], []).append(tensor)
    found: list[ExportTensor] = []
    for tensor in tensors:
        place = placed(tensor.name)
        if place is not None and place[3] is not None:
            if stack := experts.pop(place[:2], None):
                found.append(_stacked(f"blk.{place[0]}.{_NAMES[place[1]]}.weight", stack, refuse))
        elif place is None or target.shared or not place[1].startswith("mlp.shared_expert"):
            found.append(_single(tensor, shape, target, refuse))
    if target.head and shape.tied:
        embeddings = next(t for t in found if t.name == "token_embd.weight")
        found.append(replace(embeddings, name="output.weight"))
    return found


def _stacked(name: str, experts: Sequence[ExportTensor], refuse: Refuse) -> ExportTensor:
    """One tensor of all experts of a layer, in their order."""
    first, numbers = experts[0], {t.name: (placed(t.name) or (0, "", "", 0))[3] or 0 for t in experts}
    ordered = sorted(experts, key=lambda t: numbers[t.name])
    if [numbers[t.name] for t in ordered] != list(range(len(ordered))) or len(
        {(t.shape, t.dtype) for t in ordered}
    ) > 1:
        raise refuse(f"the experts beside {first.source!r} are not of one shape and type, or some are missing")
    names = tuple(t.source or "" for t in ordered)
    return ExportTensor(name, None, (len(names), *first.shape), first.dtype, stacked=names)


def _single(tensor: ExportTensor, shape: DecoderShape, target: Target, refuse: Refuse) -> ExportTensor:
    """One tensor; vectors and routers become float32, which llama.cpp requires."""
    place = placed(tensor.name)
    if place is None:
        stem, kind = tensor.name.rsplit(".", 1)
        if stem not in _AROUND:
            raise refuse(f"it has no place for {tensor.name!r}")
        return _as_vector(replace(tensor, name=f"{_AROUND[stem]}.{kind}"))
    layer, part, kind, _ = place
    name = f"blk.{layer}.{_NAMES[part]}.{kind}"
    if part in _ROUTERS:
        size = tensor.shape[-1:] if part == "mlp.shared_expert_gate" else tensor.shape
        return replace(tensor, name=name, shape=size, dtype="F32")
    heads = {"self_attn.q_proj": shape.heads, "self_attn.k_proj": shape.kv_heads}.get(part, 0)
    return _as_vector(replace(tensor, name=name, heads=heads if target.interleaved else 0))


def _as_vector(tensor: ExportTensor) -> ExportTensor:
    return replace(tensor, dtype="F32") if len(tensor.shape) == 1 else tensor


def _stand_ins(shape: DecoderShape, number: int, block: Halves) -> list[ExportTensor]:
    """Zeros in the place of a missing MLP, and of a missing attention in the first block."""
    hidden, prefix = shape.hidden, f"blk.{number}"
    wanted: list[tuple[str, tuple[int, ...]]] = []
    if not block[1]:
        wanted += [("ffn_norm", (hidden,)), ("ffn_gate", (ZERO_WIDTH, hidden)), ("ffn_up", (ZERO_WIDTH, hidden))]
        wanted += [("ffn_down", (hidden, ZERO_WIDTH))]
    if not block[0] and number == 0:
        wanted += [("attn_norm", (hidden,)), ("attn_output", (hidden, shape.head_dim))]
        wanted += [(f"attn_{n}", (shape.head_dim, hidden)) for n in "qkv"]
    return [ExportTensor(f"{prefix}.{name}.weight", None, size, "F32") for name, size in wanted]


def _header(folder: Path, arch: str, tensors: Sequence[ExportTensor]) -> dict[str, Any]:
    kinds = [t.dtype for t in tensors]
    most = max(("F32", "F16", "BF16"), key=lambda kind: (kinds.count(kind), kind))
    return {
        "general.architecture": arch,
        "general.name": str(read_config(folder).get("_name_or_path") or folder.name),
        "general.file_type": FILE_TYPES[most],
        "general.quantization_version": 2,
    }


def _remarks(shape: DecoderShape, target: Target, blocks: Sequence[Halves]) -> tuple[str, ...]:
    notes = []
    lone = [i for i, (_, m) in enumerate(blocks) if not m]
    if lone:
        notes.append(
            f"the missing MLPs of blocks {lone} are written as {ZERO_WIDTH} units of zeros, for llama.cpp would "
            "throw away the attention of a block of width 0"
        )
    if not blocks[0][0]:
        notes.append("block 0 has no attention; one head of zeros stands for it, whose keys and values are kept")
    if target.arch == "deci":
        notes.append("run with flash attention (-fa on): without it llama.cpp pads the values of blocks without heads")
    if shape.experts and shape.experts.shared_width and not target.shared:
        notes.append("the shared expert adds nothing and is left out; the experts are written as architecture llama")
    return tuple(notes)


def refusal(what: str, advice: str) -> Refuse:
    """An error maker: what cannot be written, the reason, what to do.

    Parameters
    ----------
    what : str
        Begins the message ("profile gguf").
    advice : str
        Ends it.
    """
    return lambda reason: ConfigError(f"{what}: {reason}; {advice}")
