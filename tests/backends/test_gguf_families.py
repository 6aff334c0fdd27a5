"""GGUF files of whole models: seven families, what they compute, and what is refused."""

import json

import pytest
import torch
from dropped_models import gap, ids_of, make_model
from safetensors.torch import load_file, save_file

from honeloom.backends.gguf import GgufFile, write_gguf
from honeloom.backends.gguf_model import GgufModel
from honeloom.backends.llama_cpp import ask_llama_cpp
from honeloom.checkpoint.gguf.quant import retyped
from honeloom.checkpoint.reader import Checkpoint
from honeloom.dropping.export import export_plan
from honeloom.errors import CheckpointError, ConfigError, NotFiniteError
from honeloom.types.plans import DropPlan

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.15}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
QWEN2 = {**EXPERTS, "shared_expert_intermediate_size": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "llama": ("llama", {}, "llama"),
    "mistral tied": ("mistral", {"tie_word_embeddings": True}, "llama"),
    "qwen2": ("qwen2", {}, "qwen2"),
    "qwen2 odd heads": ("qwen2", {"head_dim": 8}, "llama"),
    "qwen3": ("qwen3", {"head_dim": 24}, "qwen3"),
    "qwen3 tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}, "qwen3"),
    "mixtral": ("mixtral", {"num_local_experts": 4}, "llama"),
    "mixtral of one": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1}, "llama"),
    "qwen2_moe": ("qwen2_moe", QWEN2, "qwen2moe"),
    "qwen2_moe tied": ("qwen2_moe", {**QWEN2, "tie_word_embeddings": True}, "qwen2moe"),
    "qwen2_moe all": ("qwen2_moe", {**QWEN2, "num_experts_per_tok": 4, "norm_topk_prob": True}, "qwen2moe"),
    "qwen2_moe silent": ("qwen2_moe", {**QWEN2, "norm_topk_prob": True}, "llama"),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 24, "norm_topk_prob": True}, "qwen3moe"),
}


def make(case, folder):
    """A random model of a case, with norms and biases that matter, saved."""
    kind, fields, _ = CASES[case]
    model = make_model(kind, **{**SHAPE, **fields})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "silent" in case and "shared_expert.down_proj" in name:
                parameter.zero_()
    model.save_pretrained(folder)
    return model


def write(source, file, quant=None):
    """Write a whole model; returns the plan."""
    with Checkpoint.open(source) as checkpoint:
        plan = export_plan(checkpoint, DropPlan((), (), (), "none", "gguf"))
        write_gguf(file, checkpoint, plan.keys, retyped(plan.tensors, quant) if quant else plan.tensors)
    return plan


@pytest.mark.parametrize("case", CASES)
def test_the_file_computes_the_model(case, tmp_path):
    model, ids = make(case, tmp_path / "source"), ids_of(40)
    plan = write(tmp_path / "source", tmp_path / "model.gguf")
    assert plan.keys["general.architecture"] == CASES[case][2]
    with torch.inference_mode():
        expected = model(ids).logits
    assert gap(GgufModel(tmp_path / "model.gguf")(ids).logits, expected) < 1e-4
    for quant, limit in (("f16", 0.02), ("q8_0", 0.6)):
        write(tmp_path / "source", tmp_path / f"{quant}.gguf", quant)
        difference = (GgufModel(tmp_path / f"{quant}.gguf")(ids).logits - expected).abs()
        assert difference.median() < limit / 4 and difference.max() > 1e-5


def first_tie(model, ids, within):
    """The first position at which some layer prefers its last chosen expert to the next one by less than this."""
    if not hasattr(model.config, "num_experts_per_tok"):
        return ids.shape[1]
    used = model.config.num_experts_per_tok
    ties = torch.zeros(ids.shape[1], dtype=torch.bool)
    for logits in model(ids, output_router_logits=True).router_logits:
        best = logits.sort(dim=-1, descending=True).values
        if used < best.shape[-1]:
            ties |= best[:, used - 1] - best[:, used] < within
    return int(ties.nonzero()[0, 0]) if ties.any() else ids.shape[1]


@pytest.mark.llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_model(case, tmp_path, llama_cpp):
    """Its cache is float16. Behind a token whose experts are as good as tied it may have taken the other one."""
    model, ids = make(case, tmp_path / "source"), ids_of(40)
    write(tmp_path / "source", tmp_path / "model.gguf", "f16")
    found = ask_llama_cpp(tmp_path / "model.gguf", rows=ids.tolist(), last=ids.tolist())
    with torch.inference_mode():
        expected, sure = model(ids).logits[0], first_tie(model, ids, 3e-3)
    assert sure >= 8
    limit = 2e-2 * float(expected.std())
    assert gap(torch.tensor(found.rows[0][:sure]), expected[:sure]) < limit
    if sure == 40:
        assert gap(torch.tensor(found.last[0]), expected[-1]) < limit


def test_rows_of_unequal_length_do_not_see_each_other(tmp_path):
    make("qwen3_moe", tmp_path / "source")
    write(tmp_path / "source", tmp_path / "model.gguf")
    model = GgufModel(tmp_path / "model.gguf")
    rows = [ids_of(9)[0].tolist(), ids_of(17)[0].tolist()]
    for row, logits in zip(rows, model.row_logits(rows), strict=True):
        assert gap(logits, model(torch.tensor([row])).logits[0]) < 1e-5


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, "there is a shared expert"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("qwen3", {"rope_parameters": LLAMA3}, "qwen3 does not know"),
        ("llama", {"model_type": "gemma2"}, "a gemma2 is not of the families"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(case, fields, message, tmp_path):
    make(case, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ConfigError, match=message):
        write(tmp_path, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_tensors_that_have_no_place_or_are_missing_are_refused(tmp_path):
    make("mixtral", tmp_path)
    gone = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    change(tmp_path, lambda t: t.pop(gone))
    with pytest.raises(ConfigError, match="or some are missing"):
        write(tmp_path, tmp_path / "model.gguf")
    change(tmp_path, lambda t: t.update({"model.layers.0.mlp.gate_proj.bias": torch.zeros(96)}))
    with pytest.raises(ConfigError, match=r"no place for 'model.layers.0.mlp.gate_proj.bias'"):
        write(tmp_path, tmp_path / "model.gguf")


def test_a_layer_without_experts_among_others_is_refused(tmp_path):
    model = make_model("qwen3_moe", **SHAPE, **EXPERTS, head_dim=16, norm_topk_prob=True, mlp_only_layers=[1])
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="layer 1 has an MLP without experts"):
        write(tmp_path, tmp_path / "model.gguf")


def test_a_shared_gate_of_zeros_would_be_divided_by(tmp_path):
    """llama.cpp writes the gate as silu(x) / x: refused in a model, NaN in a file."""
    make("qwen2_moe", tmp_path / "source")
    write(tmp_path / "source", tmp_path / "sound.gguf")
    assert torch.isfinite(GgufModel(tmp_path / "sound.gguf")(ids_of()).logits).all()

    def silence(tensors):
        for name in tensors:
            if "shared_expert_gate" in name:
                tensors[name].zero_()

    change(tmp_path / "source", silence)
    with pytest.raises(ConfigError, match="the gate of the shared expert is 0"):
        write(tmp_path / "source", tmp_path / "model.gguf")
    model = GgufModel(tmp_path / "sound.gguf")
    read = model.file.tensor
    model.file.tensor = lambda name, index=None: read(name, index) * (0 if "gate_inp_shexp" in name else 1)
    assert torch.isnan(model(ids_of()).logits).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_numbers_that_a_type_cannot_hold_are_refused(value, tmp_path):
    make("llama", tmp_path)

    def spoil(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = value

    change(tmp_path, spoil)
    with pytest.raises(NotFiniteError, match=r"up_proj.weight.*--quant q8_0"):
        write(tmp_path, tmp_path / "model.gguf", "f16")
    if value == 1e5:
        write(tmp_path, tmp_path / "model.gguf", "q8_0")
    else:
        with pytest.raises(NotFiniteError, match="up_proj"):
            write(tmp_path, tmp_path / "model.gguf", "q8_0")


def test_equal_inputs_give_equal_bytes(tmp_path):
    make("mixtral", tmp_path / "source")
    for name in ("one", "two"):
        write(tmp_path / "source", tmp_path / f"{name}.gguf", "q8_0")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a file of this kind, and long enough to be looked at")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GgufFile(tmp_path / "x.gguf")
    make("qwen2_moe tied", tmp_path / "source")
    with Checkpoint.open(tmp_path / "source") as checkpoint:
        plan = export_plan(checkpoint, DropPlan((), (), (), "none", "gguf"))
        headless = [t for t in plan.tensors if t.name != "output.weight"]
        write_gguf(tmp_path / "model.gguf", checkpoint, plan.keys, headless)
        write_gguf(tmp_path / "odd.gguf", checkpoint, {"general.architecture": "gpt2"}, headless[:1])
    with pytest.raises(CheckpointError, match=r"no tensor 'output.weight'"):
        GgufModel(tmp_path / "model.gguf")(ids_of())
    with pytest.raises(CheckpointError, match="architecture 'gpt2'"):
        GgufModel(tmp_path / "odd.gguf")
