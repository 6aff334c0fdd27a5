"""Number types of a GGUF file: which tensor gets which, its bytes, and how far codes are from weights."""

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from honeloom.checkpoint.decoder_shape import placed
from honeloom.checkpoint.export_tensor import ExportTensor
from honeloom.checkpoint.gguf.quant import Q8_BLOCK, kept_wider, retyped, type_bytes

TENSORS = (
    ExportTensor("token_embd.weight", "a", (97, 64), "BF16"),
    ExportTensor("blk.0.attn_norm.weight", "b", (64,), "F32"),
    ExportTensor("blk.0.attn_q.bias", "c", (64,), "F32"),
    ExportTensor("blk.0.ffn_gate_inp.weight", "d", (4, 64), "F32"),
    ExportTensor("blk.0.ffn_down_exps.weight", None, (4, 64, 40), "F32", stacked=("e",) * 4),
    ExportTensor("blk.0.ffn_up_exps.weight", None, (4, 40, 64), "F32", stacked=("f",) * 4),
)


@pytest.mark.parametrize(
    ("quant", "types"),
    [("f16", ["F16", "F32", "F32", "F32", "F16", "F16"]), ("q8_0", ["Q8_0", "F32", "F32", "F32", "F16", "Q8_0"])],
)
def test_matrices_take_the_type_and_vectors_and_routers_stay_float32(quant, types):
    found = retyped(TENSORS, quant)
    assert [t.dtype for t in found] == types
    assert kept_wider(found, quant) == (("blk.0.ffn_down_exps.weight",) if quant == "q8_0" else ())
    for tensor in found:
        kind = gguf.GGMLQuantizationType[tensor.dtype]
        assert type_bytes(tensor) == gguf.quantize(np.ones(tensor.shape, dtype=np.float32), kind).nbytes


@given(st.integers(0, 2**32 - 1), st.floats(-30, 10))
def test_codes_of_8_bits_are_off_by_at_most_half_a_step_and_what_the_scale_is_rounded_by(seed, magnitude):
    """Half a step is 1/254 of a block's largest weight; the scale is a float16: 11 bits, or a multiple of 2^-24."""
    rng = np.random.default_rng(seed)
    weights = (rng.standard_normal((8, 4 * Q8_BLOCK)) * 2.0**magnitude).astype(np.float32)
    back = gguf.dequantize(gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    blocks, found = weights.reshape(-1, Q8_BLOCK), back.reshape(-1, Q8_BLOCK)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    bound = largest * (1 / 254 + 2.0**-11) + 127 * 2.0**-25
    assert (np.abs(found - blocks) <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.block_sparse_moe.experts.1.w2.weight", (3, "mlp.experts.down_proj", "weight", 1)),
        ("model.layers.3.block_sparse_moe.experts.12.w1.weight", (3, "mlp.experts.gate_proj", "weight", 12)),
        ("model.layers.3.block_sparse_moe.gate.weight", (3, "mlp.gate", "weight", None)),
        ("model.layers.0.mlp.experts.0.up_proj.weight", (0, "mlp.experts.up_proj", "weight", 0)),
        ("model.layers.10.self_attn.q_proj.bias", (10, "self_attn.q_proj", "bias", None)),
        ("model.layers.0.mlp.experts.gate_up_proj", (0, "mlp.experts", "gate_up_proj", None)),
        ("model.norm.weight", None),
    ],
)
def test_places_of_tensors(name, place):
    assert placed(name) == place
