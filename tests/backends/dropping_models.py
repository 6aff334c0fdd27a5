"""Tiny random decoders of many families."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NOT_GIVEN = "not given"
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "n_inner": 48}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
WINDOW = {"sliding_window": 6, "layer_types": MIXED}
_SAME_HEADS = {"num_key_value_heads": 4}

FAMILIES = {
    "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {}, "phi3": {}, "olmo": {}, "olmo2": {},
    "granite": {"residual_multiplier": 0.3}, "starcoder2": {}, "smollm3": {}, "gemma": {},
    "stablelm": {}, "cohere": {}, "glm4": {}, "helium": {}, "nemotron": {}, "seed_oss": {}, "hunyuan_v1_dense": {},
    "exaone4": WINDOW, "ministral": WINDOW,
    "gemma2": WINDOW, "gemma3_text": WINDOW, "cohere2": WINDOW,
    "phi": _SAME_HEADS, "falcon": {"head_dim": NOT_GIVEN}, "gpt_neox": _SAME_HEADS,
    "gpt2": GPT, "gptj": {**GPT, "rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": EXPERTS, "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16}, "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS, "gpt_oss": {**EXPERTS, **WINDOW}, "granitemoe": EXPERTS,
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 4,
    },
}  # fmt: skip
"""Model type -> settings beside the small ones."""
PARALLEL = ("phi", "falcon", "gpt_neox", "gptj", "cohere", "cohere2")
"""Families whose attention and MLP read one stream."""
LAYER_TYPES = {name: MIXED for name, settings in FAMILIES.items() if "layer_types" in settings}


def tiny(model_type: str, *, seed: int = 0, scale: float = 0.25, **settings):
    """A random model of a family in float32, its biases and norms random as well."""
    given = {**SMALL, **FAMILIES.get(model_type, {}), **settings}
    config = AutoConfig.for_model(model_type, **{k: v for k, v in given.items() if v != NOT_GIVEN})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "norm" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
            else:
                parameter.data.normal_(0.0, scale)
    return model
