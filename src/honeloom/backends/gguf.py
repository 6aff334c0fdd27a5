"""GGUF files through the package `gguf`: written tensor by tensor, and read back as llama.cpp computes them."""

from __future__ import annotations

from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from honeloom.checkpoint.dtypes import torch_dtype
from honeloom.checkpoint.reader import Checkpoint
from honeloom.dropping.export.plan import ExportPlan, ExportTensor
from honeloom.dropping.export.writing import read_tensor
from honeloom.errors import CheckpointError, MissingExtraError
from honeloom.runs.atomic import require_space

try:
    import gguf
except ImportError as error:
    raise MissingExtraError(f"the package gguf is not installed ({error.name}): pip install 'honeloom[gguf]'") from None

__all__ = ["GgufModel", "write_gguf"]

_KINDS = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


def write_gguf(path: Path, checkpoint: Checkpoint, plan: ExportPlan) -> int:
    """Write an export of profile gguf; equal inputs give equal bytes, and memory holds one tensor.

    Returns
    -------
    int
        Bytes of the file.

    Raises
    ------
    MissingExtraError
        On import, where the package `gguf` is not installed.
    """
    require_space(path.parent, sum(_bytes(t) for t in plan.tensors))
    writer = gguf.GGUFWriter(path, plan.keys["general.architecture"])
    try:
        for key, value in plan.keys.items():
            if key != "general.architecture":  # the writer's own
                _add(writer, key, value)
        for tensor in plan.tensors:
            kind = _KINDS[torch_dtype(tensor.dtype)]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), _bytes(tensor), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan.tensors:
            content = read_tensor(checkpoint, tensor).to(torch_dtype(tensor.dtype)).contiguous()
            writer.write_tensor_data(content.view(torch.uint8).numpy())
    finally:
        writer.close()
    return path.stat().st_size


def _bytes(tensor: ExportTensor) -> int:
    return prod(tensor.shape) * torch_dtype(tensor.dtype).itemsize


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


class GgufModel:
    """A GGUF file of architecture llama or deci, computed in float32 by the rules that llama.cpp goes by.

    Called as a model of transformers is, so that both can be compared. It knows nothing of how the
    file was made: a width of 0 throws a block's attention away here too.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    CheckpointError
        Another architecture, or the first block has no heads, which llama.cpp does not load.
    """

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.device = torch.device("cpu")
        self.arch = str(_field(reader, "general.architecture"))
        if self.arch not in ("llama", "deci"):
            raise CheckpointError(f"{path}: architecture {self.arch!r}; llama and deci are computed here")
        self.blocks = int(self._read(reader, "block_count"))
        self.heads = self._by_block(reader, "attention.head_count")
        self.kv_heads = self._by_block(reader, "attention.head_count_kv")
        self.widths = self._by_block(reader, "feed_forward_length")
        if self.heads[0] == 0:
            raise CheckpointError(f"{path}: block 0 has no heads, by which llama.cpp reads the size of all of them")
        self.head_dim = int(self._read(reader, "attention.key_length"))
        self.eps = float(self._read(reader, "attention.layer_norm_rms_epsilon"))
        self.theta = float(self._read(reader, "rope.freq_base"))
        self.tensors = {t.name: _tensor(t) for t in reader.tensors}

    def _read(self, reader: Any, key: str) -> Any:
        return _field(reader, f"{self.arch}.{key}")

    def _by_block(self, reader: Any, key: str) -> list[int]:
        value = self._read(reader, key)
        return [int(v) for v in value] if isinstance(value, list) else [int(value)] * self.blocks

    @torch.inference_mode()
    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits (B, T, V) of token ids (B, T)."""
        stream = self.tensors["token_embd.weight"][input_ids]
        for block in range(self.blocks):
            stream = self._block(stream, block)
        states = self._norm(stream, "output_norm")
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return SimpleNamespace(logits=states @ head.T)

    def _block(self, stream: torch.Tensor, block: int) -> torch.Tensor:
        """One block of llama.cpp's graph for deci; that for llama has no other."""
        current = self._attention(stream, block) if self.heads[block] else stream
        if self.widths[block] == 0:
            return stream  # `continue` before the sum: what attention gave is lost
        current = current + stream if self.heads[block] else current
        states = self._norm(current, f"blk.{block}.ffn_norm")
        gate = torch.nn.functional.silu(self._linear(states, f"blk.{block}.ffn_gate"))
        return current + self._linear(gate * self._linear(states, f"blk.{block}.ffn_up"), f"blk.{block}.ffn_down")

    def _attention(self, stream: torch.Tensor, block: int) -> torch.Tensor:
        states = self._norm(stream, f"blk.{block}.attn_norm")
        rows, length, _ = states.shape
        query, key, value = (
            self._linear(states, f"blk.{block}.attn_{n}").view(rows, length, -1, self.head_dim).transpose(1, 2)
            for n in "qkv"
        )
        found = torch.nn.functional.scaled_dot_product_attention(
            self._turn(query), self._turn(key), value, is_causal=True, enable_gqa=True
        )
        return self._linear(found.transpose(1, 2).reshape(rows, length, -1), f"blk.{block}.attn_output")

    def _turn(self, states: torch.Tensor) -> torch.Tensor:
        """Rotary positions on neighbouring pairs, (B, heads, T, head_dim)."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64)
        rates = self.theta ** (-pairs / self.head_dim)
        if "rope_freqs.weight" in self.tensors:
            rates = rates / self.tensors["rope_freqs.weight"].double()
        angles = torch.arange(states.shape[2], dtype=torch.float64)[:, None] * rates
        even, odd, cos, sin = states[..., 0::2], states[..., 1::2], angles.cos().float(), angles.sin().float()
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def _norm(self, states: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + self.eps)
        return states * scale * self.tensors[f"{name}.weight"]

    def _linear(self, states: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(states, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))


def _field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise CheckpointError(f"the file has no key {key!r}")
    return field.contents()


def _tensor(tensor: Any) -> torch.Tensor:
    """A tensor of the file in float32, of quantised types what their codes stand for."""
    values = gguf.dequantize(np.array(tensor.data), tensor.tensor_type)
    return torch.from_numpy(values.astype(np.float32)).reshape(tuple(int(n) for n in reversed(tensor.shape)))
