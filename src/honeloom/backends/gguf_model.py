"""A GGUF file computed by the rules that llama.cpp goes by, to compare it with what it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from honeloom.backends.gguf import GgufFile
from honeloom.errors import CheckpointError

__all__ = ["ARCHITECTURES", "GgufModel"]

ARCHITECTURES = ("llama", "deci", "qwen2", "qwen3", "qwen2moe", "qwen3moe")
_NEIGHBOURS = ("llama", "deci")
"""Architectures whose rotary pairs stand side by side; in the others they are half a head apart."""
_NORMALISED = ("llama", "qwen3moe")
"""Architectures in which the weights of the experts used are made to sum to 1."""
_LEAST_SUM = 6.103515625e-5


class GgufModel:
    """A GGUF file computed in float32 on the host.

    Called as a model of transformers is, so that both can be compared. It knows nothing of how the
    file was made: a width of 0 throws a block's attention away here too, and a shared expert's gate of 0
    gives NaN. One matrix is in memory at a time, beside the embeddings.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    CheckpointError
        Another architecture, a key or tensor is missing, or the first block has no heads, which llama.cpp does not
        load.
    """

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)
        self.device = torch.device("cpu")
        self.arch = str(self.file.need("general.architecture"))
        if self.arch not in ARCHITECTURES:
            raise CheckpointError(f"{path}: architecture {self.arch!r}; computed here are {', '.join(ARCHITECTURES)}")
        self.blocks = int(self._read("block_count"))
        self.heads = self._by_block("attention.head_count")
        self.widths = self._by_block("feed_forward_length")
        if self.heads[0] == 0:
            raise CheckpointError(f"{path}: block 0 has no heads, by which llama.cpp reads the size of all of them")
        self.head_dim = int(self._read("attention.key_length"))
        self.eps = float(self._read("attention.layer_norm_rms_epsilon"))
        self.theta = float(self._read("rope.freq_base"))
        self.experts = int(self.file.get(f"{self.arch}.expert_count") or 0)
        self.used = int(self._read("expert_used_count")) if self.experts else 0

    def _read(self, key: str) -> Any:
        return self.file.need(f"{self.arch}.{key}")

    def _by_block(self, key: str) -> list[int]:
        value = self._read(key)
        return [int(v) for v in value] if isinstance(value, list) else [int(value)] * self.blocks

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits (B, T, V) of token ids (B, T)."""
        return SimpleNamespace(logits=torch.stack(self.row_logits(input_ids.tolist())))

    @torch.inference_mode()
    def row_logits(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Logits (T, V) of some rows of token ids; every weight is read once for all of them."""
        embeddings = self.file.tensor("token_embd.weight")
        lengths = [len(row) for row in rows]
        stream = embeddings[torch.tensor([token for row in rows for token in row])]
        for block in range(self.blocks):
            stream = self._block(stream, lengths, block)
        if "output.weight" in self.file or self.arch == "qwen2moe":  # which loads no file without a head
            embeddings = self.file.tensor("output.weight")
        return list((self._norm(stream, "output_norm") @ embeddings.T).split(lengths))

    def _block(self, stream: torch.Tensor, lengths: list[int], block: int) -> torch.Tensor:
        """One block of llama.cpp's graphs, of all rows one after the other (sum of lengths, hidden)."""
        current = self._attention(stream, lengths, block) if self.heads[block] else stream
        if self.widths[block] == 0:
            return stream  # `continue` before the sum: what attention gave is lost
        current = current + stream if self.heads[block] else current
        states = self._norm(current, f"blk.{block}.ffn_norm")
        if not self.experts:
            return current + self._gated(states, f"blk.{block}.ffn_{{}}")
        mixed = self._mixed(states, block)
        return current + (mixed + self._shared(states, block) if self.arch == "qwen2moe" else mixed)

    def _gated(self, states: torch.Tensor, name: str, expert: int | None = None) -> torch.Tensor:
        gate = silu(self._linear(states, name.format("gate"), expert))
        return self._linear(gate * self._linear(states, name.format("up"), expert), name.format("down"), expert)

    def _mixed(self, states: torch.Tensor, block: int) -> torch.Tensor:
        """The experts that each token uses, by softmax over all of them."""
        shares = self._linear(states, f"blk.{block}.ffn_gate_inp").softmax(dim=-1)
        weights, chosen = shares.topk(self.used, dim=-1)
        if self.arch in _NORMALISED:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=_LEAST_SUM)
        result = torch.zeros_like(states)
        for expert in range(self.experts):
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            if len(tokens):
                found = self._gated(states[tokens], f"blk.{block}.ffn_{{}}_exps", expert)
                result[tokens] += weights[tokens, place, None] * found
        return result

    def _shared(self, states: torch.Tensor, block: int) -> torch.Tensor:
        """The expert that every token uses; its gate is silu(x) / x, as the graph has it."""
        gate = states @ self.file.tensor(f"blk.{block}.ffn_gate_inp_shexp.weight")[:, None]
        return self._gated(states, f"blk.{block}.ffn_{{}}_shexp") * (silu(gate) / gate)

    def _attention(self, stream: torch.Tensor, lengths: list[int], block: int) -> torch.Tensor:
        states = self._norm(stream, f"blk.{block}.attn_norm")
        query, key, value = (
            self._linear(states, f"blk.{block}.attn_{n}").view(len(states), -1, self.head_dim) for n in "qkv"
        )
        if "qwen3" in self.arch:
            query = self._norm(query, f"blk.{block}.attn_q_norm")
            key = self._norm(key, f"blk.{block}.attn_k_norm")
        found = [
            scaled_dot_product_attention(self._turn(q), self._turn(k), v.transpose(0, 1), is_causal=True,
                                         enable_gqa=True).transpose(0, 1)
            for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        ]  # fmt: skip
        return self._linear(torch.cat(found).flatten(1), f"blk.{block}.attn_output")

    def _turn(self, states: torch.Tensor) -> torch.Tensor:
        """Rotary positions, (T, heads, head_dim) -> (heads, T, head_dim)."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64)
        rates = self.theta ** (-pairs / self.head_dim)
        if "rope_freqs.weight" in self.file and self.arch in _NEIGHBOURS:  # the other graphs know no factors
            rates = rates / self.file.tensor("rope_freqs.weight").double()
        angles = torch.arange(len(states), dtype=torch.float64)[:, None] * rates
        cos, sin = angles.cos().float(), angles.sin().float()
        states = states.transpose(0, 1)
        if self.arch in _NEIGHBOURS:
            even, odd = states[..., 0::2], states[..., 1::2]
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
        first, second = states.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)

    def _norm(self, states: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + self.eps)
        return states * scale * self.file.tensor(f"{name}.weight")

    def _linear(self, states: torch.Tensor, name: str, expert: int | None = None) -> torch.Tensor:
        bias = self.file.tensor(f"{name}.bias") if f"{name}.bias" in self.file else None
        return linear(states, self.file.tensor(f"{name}.weight", expert), bias)
