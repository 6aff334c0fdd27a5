"""Every listed family against the real modules and files of transformers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from honeloom.backends.hf.sublayers import silenced
from honeloom.checkpoint.architectures import (
    ARCHITECTURES,
    architecture_of,
    layer_count,
    layer_tensors,
    output_tensors,
)
from honeloom.checkpoint.folders import read_config
from honeloom.errors import CheckpointError

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "head_dim": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EYES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
SETTINGS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64, "bos_token_id": 1},
    "gpt_neox": {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")},
    "mixtral": {**TEXT, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **TEXT, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {**TEXT, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 8}, "vision_config": EYES, "mm_tokens_per_image": 4,
        "boi_token_index": 60, "eoi_token_index": 61, "image_token_index": 62,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "gpt_neox sequential", "qwen3_moe mixed"])
def saved(request, tmp_path_factory):
    """A tiny random model with every vector away from its initial 0 or 1, its folder and its layout."""
    model_type, _, variant = request.param.partition(" ")
    settings = dict(SETTINGS.get(model_type, TEXT))
    if variant == "sequential":
        settings["use_parallel_residual"] = False
    if variant == "mixed":
        settings["mlp_only_layers"] = [0]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp(model_type)
    model.save_pretrained(folder)
    config = read_config(folder)
    return model, folder, architecture_of(config), config


def test_module_paths_exist(saved):
    model, _, architecture, config = saved
    layers = model.get_submodule(architecture.layers)
    assert len(layers) == layer_count(config) == 2
    for path in (architecture.embeddings, architecture.final_norm, architecture.head):
        model.get_submodule(path)
    parts = [architecture.attention, architecture.mlp, architecture.attention_norm, architecture.mlp_norm]
    for layer in layers:
        for part in [p for p in (*parts, architecture.mid_stream) if p]:
            layer.get_submodule(part)


def test_names_on_disk(saved):
    _, folder, architecture, config = saved
    names = sorted(load_file(folder / "model.safetensors"))
    within = [layer_tensors(architecture, names, i) for i in range(2)]
    assert within[0]
    assert within[1]
    assert not set(within[0]) & set(within[1])
    assert layer_tensors(architecture, names, 2) == []
    outside = [n for n in names if n not in within[0] + within[1] and "vision" not in n and "multi_modal" not in n]
    assert not [n for n in outside if ".layers." in n or ".h." in n]
    stored_head = f"{architecture.disk_head}.weight" in names
    assert stored_head != config.get("tie_word_embeddings", False)


def test_attention_stream_is_where_it_is_said_to_be(saved):
    """The input of `mid_stream` minus the layer's input is what attention adds: nothing, once silenced."""
    model, _, architecture, _ = saved
    if architecture.mid_stream is None:
        pytest.skip("parallel branches have no stream between them")
    seen: dict[str, torch.Tensor] = {}
    layer = model.get_submodule(architecture.layers)[1]

    def keep(name):
        def hook(module, args, kwargs):
            seen[name] = args[0] if args else next(iter(kwargs.values()))

        return hook

    handles = [
        layer.register_forward_pre_hook(keep("in"), with_kwargs=True),
        layer.get_submodule(architecture.mid_stream).register_forward_pre_hook(keep("mid"), with_kwargs=True),
    ]
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        model(input_ids=ids)
        assert not torch.equal(seen["in"], seen["mid"])
        with silenced(model, attention=[1]):
            model(input_ids=ids)
        assert torch.equal(seen["in"], seen["mid"])
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_zero_output_tensors_add_exactly_nothing(saved, branch, tmp_path):
    model, folder, architecture, _ = saved
    tensors = load_file(folder / "model.safetensors")
    for name in output_tensors(architecture, list(tensors), 1, branch):
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    zeroed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(12).view(1, -1)
    skipped = {"attention": [], "mlp": [], branch: [1]}
    with torch.no_grad():
        with silenced(model, **skipped):
            wanted = model(input_ids=ids).logits
        assert torch.equal(zeroed(input_ids=ids).logits, wanted)
        assert not torch.equal(model(input_ids=ids).logits, wanted)


def test_fused_experts_count_as_outputs():
    names = ["model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"]
    for model_type in ("mixtral", "qwen3_moe"):
        assert output_tensors(ARCHITECTURES[model_type], names, 0, "mlp") == names[:1]


def test_first_gpt2_names():
    names = ["h.1.attn.c_proj.weight", "h.1.attn.c_proj.bias", "h.11.attn.c_proj.weight", "h.1.attn.c_attn.bias"]
    architecture = architecture_of({"model_type": "gpt2"})
    assert output_tensors(architecture, names, 1, "attention") == names[:2]
    assert layer_tensors(architecture, names, 1) == [names[0], names[1], names[3]]


LLAMA_NAMES = [
    f"model.layers.0.{n}.weight"
    for n in ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj")
]


def test_unlisted_families():
    assert architecture_of({"model_type": "new"}, LLAMA_NAMES).layers == "model.layers"
    with pytest.raises(CheckpointError, match=r"'new' is not known .* names were not given; known types: llama"):
        architecture_of({"model_type": "new"})
    with pytest.raises(CheckpointError, match=r"has no 'model.layers.0.input_layernorm.weight'"):
        architecture_of({"model_type": "new"}, LLAMA_NAMES[1:])
    with pytest.raises(CheckpointError, match="pre_feedforward_layernorm"):
        architecture_of({"model_type": "new"}, [*LLAMA_NAMES, "model.layers.0.pre_feedforward_layernorm.weight"])
    with pytest.raises(CheckpointError, match="names no number of layers"):
        layer_count({})
    with pytest.raises(CheckpointError, match="layer 0 of this llama model has no tensor like"):
        output_tensors(ARCHITECTURES["llama"], ["x"], 0, "mlp")
