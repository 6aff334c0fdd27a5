"""Seeded checkpoints to merge: a base and fine-tunes of it, made of random numbers and written as a stream.

    python benchmarks/merging/checkpoints.py large|many|tiny [--layers N] [--tensors N] [--to DIR]

- large: a Llama of 1.1 billion parameters in bf16 (2.2 GB each): base N(0, .02), four fine-tunes base + N(0, .002).
- many: a Llama of many layers of a few numbers each, base and one fine-tune.
- tiny: Llama, Qwen2 and Mixtral in float32, base and three fine-tunes each, whose task vectors are exact in float32 and
  of distinct magnitudes, so that two programs can only choose the same entries.

Every tensor of every model has a random stream of its own. A folder is complete or not there, and is not made twice.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
PLACE = HERE / "out" / "checkpoints"
SEED = 0
BASE_SD, DELTA_SD = 0.02, 0.002
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
         "num_key_value_heads": 4, "vocab_size": 32000}  # fmt: skip
MANY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 256}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "mixtral": {"tie_word_embeddings": False, "num_local_experts": 4, "num_experts_per_tok": 2},
}
_BLOCK = 1 << 20
_TINY_BASE, _TINY_SHARED, _TINY_OWN = 0.5, 0.2, 0.2
_STEP = 2.0**-22
"""Numbers of the tiny models are multiples of it below 4, which float32 holds exactly, and so their differences."""
Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint16]


def to_bfloat16(values: Floats) -> Words:
    """Nearest bfloat16 of finite numbers, ties to even, as 16-bit words."""
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(16)
    odd &= np.uint32(1)
    odd += bits
    odd += np.uint32(0x7FFF)
    return (odd >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(words: Words) -> Floats:
    """The numbers that words of bfloat16 stand for."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def llama_config(sizes: Mapping[str, int]) -> dict[str, Any]:
    """config.json of a Llama in bf16 whose head is not tied."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16", **sizes,
    }  # fmt: skip


def llama_shapes(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of its tensors in the order of the file."""
    hidden, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    narrow = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(sizes["num_hidden_layers"]):
        layer = {
            "input_layernorm": (hidden,), "mlp.down_proj": (hidden, inner), "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden), "post_attention_layernorm": (hidden,), "self_attn.k_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden), "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (narrow, hidden),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def header(shapes: Mapping[str, tuple[int, ...]], dtype: str, size: int) -> bytes:
    """First bytes of a safetensors file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + size * prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def stream(tensor: int, model: int) -> np.random.Generator:
    """Random numbers of one tensor of one model."""
    return np.random.Generator(np.random.SFC64([SEED, tensor, model]))


def family_blocks(tensor: int, shape: tuple[int, ...], models: int) -> Iterator[list[Words]]:
    """Pieces of one tensor of the base and of `models` fine-tunes; a norm's weights are around 1."""
    streams = [stream(tensor, model) for model in range(models + 1)]
    count = prod(shape)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        base = np.ones(size, np.float32) if len(shape) == 1 else streams[0].standard_normal(size, np.float32)
        if len(shape) > 1:
            base *= np.float32(BASE_SD)
        pieces = [to_bfloat16(base)]
        origin = from_bfloat16(pieces[0])
        for own in streams[1:]:
            values = own.standard_normal(size, np.float32)
            values *= np.float32(DELTA_SD)
            values += origin
            pieces.append(to_bfloat16(values))
        yield pieces


def write_family(folder: Path, sizes: Mapping[str, int], models: int) -> list[Path]:
    """Write a Llama and fine-tunes of it in bf16; returns the folders, base first."""
    names = ["base", *(f"tune{i}" for i in range(1, models + 1))]
    if _is_done(folder, made := {"sizes": dict(sizes), "models": models, "seed": SEED}):
        return [folder / name for name in names]
    shapes, config = llama_shapes(sizes), llama_config(sizes)
    with ExitStack() as stack:
        files: list[BinaryIO] = []
        for name in names:
            _write_json(folder / name / "config.json", config)
            files.append(stack.enter_context(open(folder / name / "model.safetensors", "wb")))
            files[-1].write(header(shapes, "BF16", 2))
        for index, shape in enumerate(shapes.values()):
            for pieces in family_blocks(index, shape, models):
                for file, words in zip(files, pieces, strict=True):
                    file.write(words.data)
    _write_json(folder / "made.json", made)
    return [folder / name for name in names]


def large(place: Path, layers: int = LARGE["num_hidden_layers"]) -> list[Path]:
    """A base of 1.1 billion parameters, or with fewer layers, and four fine-tunes."""
    return write_family(place / f"large-{layers}", {**LARGE, "num_hidden_layers": layers}, 4)


def many(place: Path, tensors: int) -> list[Path]:
    """A base and a fine-tune of about that many tensors: 9 per layer and 3 besides."""
    return write_family(place / f"many-{tensors}", {**MANY, "num_hidden_layers": (tensors - 3) // 9}, 1)


def distinct(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The numbers as multiples of the step, moved as little as makes all magnitudes distinct and none 0."""
    flat = values.reshape(-1)
    order, rank = np.argsort(np.abs(flat), kind="stable"), np.arange(flat.size)
    sizes = np.rint(np.abs(flat[order]) / _STEP).astype(np.int64)
    result = np.empty_like(flat)
    result[order] = np.maximum.accumulate(sizes - rank) + rank + 1
    return (result * np.where(flat < 0, -_STEP, _STEP)).reshape(values.shape)


def tiny(place: Path, kind: str, models: int = 3) -> list[Path]:
    """A random model of one of the kinds in `TINY` and fine-tunes of it, in float32."""
    folder, names = place / f"tiny-{kind}", ["base", *(f"tune{i}" for i in range(1, models + 1))]
    if not _is_done(folder, made := {"sizes": {**SMALL, **TINY[kind]}, "models": models, "seed": SEED}):
        config, shapes = _transformers(kind)
        for model, name in enumerate(names):
            _write_json(folder / name / "config.json", config)
            with open(folder / name / "model.safetensors", "wb") as file:
                file.write(header(shapes, "F32", 4))
                for index, shape in enumerate(shapes.values()):
                    file.write(_tiny_tensor(index, shape, model).tobytes())
        _write_json(folder / "made.json", made)
    return [folder / name for name in names]


def _tiny_tensor(index: int, shape: Sequence[int], model: int) -> Floats:
    """Half of a task vector is common to all fine-tunes, so that the cosine of any two is near .5."""
    base = np.rint(stream(index, 0).standard_normal(shape) * _TINY_BASE / _STEP) * _STEP
    if model == 0:
        return base.astype(np.float32)
    shared, own = stream(index, 1_000).standard_normal(shape), stream(index, model).standard_normal(shape)
    return (base + distinct(_TINY_SHARED * shared + _TINY_OWN * own)).astype(np.float32)


def _transformers(kind: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json, names and shapes as transformers has them in memory: experts of a layer are one tensor."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **SMALL, **TINY[kind])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}
    return {**config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}, shapes


def _is_done(folder: Path, made: Mapping[str, Any]) -> bool:
    """Whether exactly this is there; anything else is removed."""
    mark = folder / "made.json"
    if mark.exists() and json.loads(mark.read_text()) == made:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("large", "many", "tiny"))
    parser.add_argument("--layers", type=int, default=LARGE["num_hidden_layers"], help="of large")
    parser.add_argument("--tensors", type=int, default=5_000, help="of many, about")
    parser.add_argument("--to", type=Path, default=PLACE)
    given = parser.parse_args()
    if given.what == "large":
        found = large(given.to, given.layers)
    elif given.what == "many":
        found = many(given.to, given.tensors)
    else:
        found = [path for kind in TINY for path in tiny(given.to, kind)]
    print("\n".join(map(str, found)))


if __name__ == "__main__":
    main()
