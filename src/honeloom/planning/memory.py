"""Peak memory of tuning and inference, from a model's config alone.

The terms are the tensors that are alive at the peak of a step of transformers' decoders: they
were counted on a Llama with PyTorch's saved-tensor hooks and hold for the layouts that share
its parts. `benchmarks/memory` compares the sums with measured peaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal

from honeloom.checkpoint.architectures import architecture_of, layer_count, tensor_shapes
from honeloom.errors import CheckpointError

__all__ = ["DTYPE_BYTES", "Decoder", "Memory", "Work", "peak_memory", "read_decoder", "weight_bytes"]

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
QUANTISED_BYTES = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
"""Bytes per weight of a matrix: NF4 in blocks of 64 with scales quantised twice, and int8."""
_FP32 = 4
CUDA_CONTEXT = 600 << 20
"""Bytes that a process holds on a GPU before its first tensor, about; not measured."""

HOST_SLACK = {"backward": {4: 0.5, 2: 0.15}, "forward": {4: 0.25, 2: 0.25}}
"""What glibc keeps on the host beyond the live tensors of a step, as a share of them, by bytes per number.

Tensors of mixed sizes leave holes that the next ones do not fit. Measured on a 125M Llama
(`benchmarks/memory`); a GPU's allocator was not measured.
"""

READ_LOGITS = 1 << 20
"""Logits that a zeroth-order step copies to fp32 at a time, and their log-softmax."""

Mode = Literal["lora", "full", "zeroth-order", "inference"]


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a decoder, in numbers of weights and widths.

    Attributes
    ----------
    parameters : int
        All weights, a tied head once.
    matrices : int
        Weights of the layers' matrices: what is quantised and what all-linear LoRA adapts.
    adapter_widths : int
        Sum over these matrices of inputs + outputs: LoRA's weights per unit of rank.
    largest : int
        Weights of the largest tensor.
    layers, hidden, queries, keys, width, vocabulary : int
        Layers; sizes of the stream, of all queries, of all keys, of the MLP's inside, and the
        vocabulary.
    gated : bool
        Whether the MLP multiplies two branches.
    norms : int
        Norms of a layer that act on the stream.
    plain_norms : bool
        Whether they are LayerNorm, one kernel that keeps its input alone.
    head_norms : bool
        Whether queries and keys are normalised.
    capped : bool
        Whether attention scores pass a tanh.
    kept : int
        Tensors of the MLP's width that are kept for the backward pass.
    readers : int
        Matrices of a layer that read the normalised stream.
    experts_used : int
        Experts that a token passes through; 1 without experts.
    """

    parameters: int
    matrices: int
    adapter_widths: int
    largest: int
    layers: int
    hidden: int
    queries: int
    keys: int
    width: int
    vocabulary: int
    heads: int
    gated: bool
    norms: int
    plain_norms: bool
    head_norms: bool
    kept: int
    capped: bool
    readers: int
    experts_used: int


@dataclass(frozen=True, slots=True)
class Work:
    """How a job uses the decoder.

    `dtype` is that of the loaded weights, `rank` LoRA's, `states` the optimizer's tensors per
    trained weight (AdamW 2, SGD with momentum 1). `processes` share weights, gradients and
    states (FSDP). `host` is true where tensors lie in the host's memory.
    """

    mode: Mode
    batch_size: int
    tokens: int
    dtype: str = "bf16"
    load_in: str | None = None
    rank: int = 8
    states: int = 2
    accumulate: int = 1
    checkpointing: bool = False
    eager: bool = False
    processes: int = 1
    host: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes at the peak, by part; `total` is their sum.

    `activations` holds what is kept for the backward pass, or the largest layer's tensors where
    there is none; `logits` their copies in the loss; `allocator` what it keeps beside live
    tensors.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    scratch: int
    allocator: int = 0

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        """Return the parts and their total."""
        return {**asdict(self), "total": self.total}


def read_decoder(config: Mapping[str, Any]) -> Decoder:
    """Sizes from the content of config.json; CheckpointError where the family or a size is not known."""
    config = _checked(config)
    try:
        return _read(config)
    except KeyError as error:
        raise CheckpointError(f"config.json has no {error.args[0]!r}") from None


_LIMITS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_attention_heads", "num_key_value_heads", "n_head"), 1 << 12),
    **dict.fromkeys(("num_local_experts", "num_experts", "num_experts_per_tok", "decoder_sparse_step"), 1 << 12),
    **dict.fromkeys(("hidden_size", "n_embd", "head_dim", "moe_intermediate_size"), 1 << 20),
    **dict.fromkeys(("intermediate_size", "n_inner"), 1 << 22),
    **dict.fromkeys(("vocab_size", "n_positions", "max_position_embeddings"), 1 << 28),
}
"""Sizes that are whole numbers above 0 -> the largest that is believed."""
_MOST_EXPERTS = 1 << 17
"""In all layers together."""


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without sizes that are null; CheckpointError where a part or a size is none."""
    inner = config.get("text_config")
    if not isinstance(config.get("model_type") or "", str) or not isinstance(inner or {}, Mapping):
        raise CheckpointError("config.json: model_type must be text, and text_config an object")
    kept = {k: v for k, v in config.items() if v is not None or k not in _LIMITS}
    for key, value in kept.items():
        most = _LIMITS.get(key)
        if most and (type(value) is not int or not 0 < value <= most):
            raise CheckpointError(f"config.json: {key} is {value!r:.40}, not a whole number from 1 to {most:,}")
    layers, heads = (kept.get(a) or kept.get(b) or 1 for a, b in _OTHER_NAMES[:2])
    size, experts = (kept.get(a) or kept.get(b) or 1 for a, b in _OTHER_NAMES[2:])
    if layers * experts > _MOST_EXPERTS:
        raise CheckpointError(f"config.json: {layers:,} layers of {experts:,} experts are not believed")
    if "head_dim" not in kept and size < heads and size > 1:
        raise CheckpointError(f"config.json: {heads:,} heads do not fit in a stream of {size:,}")
    if not isinstance(kept.get("mlp_only_layers") or [], list):
        raise CheckpointError("config.json: mlp_only_layers is no list")
    return {**kept, "text_config": _checked(inner)} if inner else kept


_OTHER_NAMES = (
    ("num_hidden_layers", "n_layer"),
    ("num_attention_heads", "n_head"),
    ("hidden_size", "n_embd"),
    ("num_local_experts", "num_experts"),
)


def _read(config: Mapping[str, Any]) -> Decoder:
    shapes = tensor_shapes(config)
    prefix = f"{architecture_of(config).disk_layers[0]}."
    inner = {n: s for n, s in shapes.items() if n.startswith(prefix)}
    first = {n.removeprefix(f"{prefix}0."): s for n, s in inner.items() if n.startswith(f"{prefix}0.")}
    matrices = [s for n, s in inner.items() if len(s) == 2]
    text = config.get("text_config") or config
    hidden = text.get("hidden_size") or text["n_embd"]
    heads = text.get("num_attention_heads") or text["n_head"]
    size = text.get("head_dim") or hidden // heads
    gated = any(part in n for n in first for part in ("gate_proj", "gate_up_proj", ".w3"))
    return Decoder(
        parameters=sum(prod(s) for s in shapes.values()),
        matrices=sum(prod(s) for s in matrices),
        adapter_widths=sum(sum(s) for s in matrices),
        largest=max(prod(s) for s in shapes.values()),
        layers=layer_count(config),
        hidden=hidden,
        queries=heads * size,
        keys=(text.get("num_key_value_heads") or heads) * size,
        width=_mlp_width(text, first),
        vocabulary=text["vocab_size"],
        heads=heads,
        gated=gated,
        norms=sum(1 for n, s in first.items() if n.endswith(".weight") and s == (hidden,)),
        plain_norms=any(n.endswith("norm.bias") or n == "ln_1.bias" for n in first),
        head_norms=any("q_norm" in n for n in first),
        kept=_mlp_kept(text, gated),
        capped=bool(text.get("attn_logit_softcapping")),
        readers=sum(1 for n, s in first.items() if len(s) == 2 and "experts" not in n and not _writes(n)),
        experts_used=int(text.get("num_experts_per_tok") or 1),
    )


def _mlp_width(text: Mapping[str, Any], layer: Mapping[str, tuple[int, ...]]) -> int:
    if any("experts" in n for n in layer):
        return int(text.get("moe_intermediate_size") or text["intermediate_size"])
    return int(text.get("intermediate_size") or text.get("n_inner") or 4 * text["n_embd"])


def _mlp_kept(text: Mapping[str, Any], gated: bool) -> int:
    """Gate, its activation, up and product; without a gate both sides of the activation, and all its operations."""
    if gated:
        return 4
    return 9 if (text.get("activation_function") or text.get("hidden_act")) == "gelu_new" else 2


def _writes(name: str) -> bool:
    """Whether a matrix writes to the stream rather than reading it."""
    return any(part in name for part in ("o_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h", ".w2"))


def peak_memory(decoder: Decoder, work: Work) -> Memory:
    """Peak of an optimizer step with LoRA or all weights; of a zeroth-order step or inference without gradients.

    Parameters
    ----------
    decoder : Decoder
        The model.
    work : Work
        The job; its tokens are those of the longest batch, per row.
    """
    if work.mode in ("zeroth-order", "inference"):
        return _inference(decoder, work)
    full, compute = work.mode == "full", DTYPE_BYTES[work.dtype]
    trained = decoder.parameters if full else work.rank * decoder.adapter_widths
    share = work.processes
    weights = decoder.parameters * _FP32 if full else weight_bytes(decoder, work)
    if full and compute < _FP32:
        weights += decoder.matrices * compute  # autocast keeps a copy of every matrix
    gradients, optimizer = trained * _FP32, trained * _FP32 * work.states
    activations, transient = _saved(decoder, work, compute)
    logits = work.batch_size * work.tokens * decoder.vocabulary * _logit_bytes(compute)
    in_backward = activations + max(logits, transient) + (gradients if work.accumulate > 1 else 0)
    in_step = gradients + 2 * decoder.largest * _FP32 * full
    backward_leads = in_backward * share >= in_step
    step = (activations, max(logits, transient)) if backward_leads else (0, 0)
    return Memory(
        weights=weights // share,
        adapters=0 if full else trained * _FP32,
        gradients=gradients // share if not backward_leads or work.accumulate > 1 else 0,
        optimizer=optimizer // share,
        activations=step[0],
        logits=step[1],
        scratch=(2 * decoder.largest * _FP32 if full and not backward_leads else 0) + _gathered(decoder, work),
        allocator=int(HOST_SLACK["backward"][compute] * sum(step)) if work.host else 0,
    )


def _gathered(decoder: Decoder, work: Work) -> int:
    """Bytes of the layers that are whole at a time where the model is sharded: the current and the next."""
    return 2 * decoder.matrices * _FP32 // decoder.layers if work.processes > 1 else 0


def _inference(decoder: Decoder, work: Work) -> Memory:
    """Peak of a forward pass with its loss; on a GPU a zeroth-order step also draws noise for one tensor at a time."""
    compute = DTYPE_BYTES[work.dtype]
    tokens = work.batch_size * work.tokens
    stream = 3 * decoder.hidden * _FP32
    branch = max((3 if decoder.gated else 2) * decoder.width * decoder.experts_used, 3 * decoder.queries) * compute
    scores = 2 * _scores(decoder, work, compute) if work.eager else 0
    zeroth = work.mode == "zeroth-order"
    # Scoring takes the loss row by row; a zeroth-order step a few logits at a time.
    in_fp32 = min(READ_LOGITS, tokens * decoder.vocabulary) if zeroth else work.tokens * decoder.vocabulary
    logits = tokens * decoder.vocabulary * compute + in_fp32 * 2 * _FP32
    layer = tokens * (stream + branch) + scores
    noise = 2 * decoder.largest * compute if zeroth and not work.host else 0
    return Memory(
        weights=weight_bytes(decoder, work),
        adapters=0,
        gradients=0,
        optimizer=0,
        activations=layer if layer > max(logits, noise) else 0,
        logits=logits if logits >= max(layer, noise) else 0,
        scratch=noise if noise > max(layer, logits) else 0,
        allocator=int(HOST_SLACK["forward"][compute] * max(layer, logits)) if work.host else 0,
    )


def _scores(decoder: Decoder, work: Work, compute: int) -> int:
    """Bytes of eager attention's weights: the softmax in fp32, its copy in 16 bits, and scores that are capped."""
    size = _FP32 if compute == _FP32 else _FP32 + compute
    return (size + 2 * _FP32 * decoder.capped) * work.batch_size * decoder.heads * work.tokens**2


def weight_bytes(decoder: Decoder, work: Work) -> int:
    """Bytes of frozen weights: matrices quantised if asked for, the rest as loaded."""
    compute = DTYPE_BYTES[work.dtype]
    if work.load_in is None:
        return decoder.parameters * compute
    return int(decoder.matrices * QUANTISED_BYTES[work.load_in]) + (decoder.parameters - decoder.matrices) * compute


def _logit_bytes(compute: int) -> int:
    """Bytes per logit at the peak: its log-softmax and the gradients of both in fp32, and 16-bit logits beside them."""
    return 3 * _FP32 if compute == _FP32 else 3 * _FP32 + 2 * compute


def _saved(decoder: Decoder, work: Work, compute: int) -> tuple[int, int]:
    """Bytes kept for the backward pass, and bytes of one layer's gradients while it is passed."""
    full, tokens = work.mode == "full", work.batch_size * work.tokens
    # Norms keep their input in fp32, and the normalised stream too where their weight is trained.
    normalised = decoder.norms * decoder.hidden
    if decoder.head_norms:
        normalised += decoder.queries + decoder.keys
    norms = normalised * _FP32 * (2 if full and not decoder.plain_norms else 1)
    # The normalised stream is kept once; autocast casts an fp32 stream for every matrix that reads it.
    casts = decoder.readers if full and compute < _FP32 else 2
    attention = (2 * decoder.queries + 2 * decoder.keys) * compute
    mlp = decoder.kept * decoder.width * decoder.experts_used * compute
    layer = tokens * (norms + casts * decoder.hidden * compute + attention + mlp)
    if work.eager:
        layer += _scores(decoder, work, compute)
    transient = tokens * (3 if decoder.gated else 2) * decoder.width * decoder.experts_used * compute
    if not work.checkpointing:
        return layer * decoder.layers, transient
    stream = tokens * decoder.hidden * (_FP32 if full else compute)
    return stream * decoder.layers, layer + transient  # one layer is computed again at a time, after the loss
