"""Memory by formula: counted by hand on small numbers, and against the tensors that autograd really keeps."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from honeloom.backends.hf import tune as tuning
from honeloom.backends.hf.objectives import CHUNK
from honeloom.errors import CheckpointError
from honeloom.planning.memory import Work, peak_memory, read_decoder

LLAMA3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
SIZES = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LORA = Work("lora", batch_size=2, tokens=96, dtype="fp32", rank=8)


def test_sizes_of_a_published_model():
    decoder = read_decoder(LLAMA3_8B)
    assert decoder.parameters == 8_030_261_248
    assert decoder.matrices == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    # LoRA of rank 8 on every linear layer of it has 20,971,520 weights, as PEFT counts them.
    assert 8 * decoder.adapter_widths == 20_971_520
    assert (decoder.norms, decoder.readers, decoder.gated, decoder.largest) == (2, 5, True, 128256 * 4096)


def test_the_static_parts_are_what_they_are_said_to_be():
    decoder = read_decoder(LLAMA3_8B)
    lora = peak_memory(decoder, replace(LORA, dtype="bf16"))
    assert lora.weights == 2 * decoder.parameters
    assert (lora.adapters, lora.optimizer) == (4 * 20_971_520, 8 * 20_971_520)
    quantised = peak_memory(decoder, replace(LORA, dtype="bf16", load_in="4bit"))
    assert quantised.weights == pytest.approx(
        decoder.matrices * 0.516 + 2 * (8_030_261_248 - decoder.matrices), rel=1e-3
    )
    full = peak_memory(decoder, replace(LORA, mode="full", accumulate=2))
    assert (full.weights, full.gradients, full.optimizer) == tuple(n * decoder.parameters for n in (4, 4, 8))
    assert peak_memory(decoder, replace(LORA, mode="full", accumulate=2, states=0)).optimizer == 0


def test_eight_billion_parameters_on_24_gigabytes():
    """One row of 2,048 tokens at a time, layers computed again: adapters and zeroth-order fit, all weights do not."""
    decoder = read_decoder(LLAMA3_8B)
    one = Work("lora", batch_size=1, tokens=2048, checkpointing=True, accumulate=8)
    room = 24 * 10**9
    assert peak_memory(decoder, replace(one, load_in="4bit")).total < 0.55 * room
    assert peak_memory(decoder, replace(one, mode="zeroth-order")).total < peak_memory(decoder, one).total < room
    assert peak_memory(decoder, replace(one, mode="full")).total > 5 * room
    assert peak_memory(decoder, replace(one, mode="full", processes=8)).total < 1.2 * room


def saved_bytes(model, work):
    """Bytes of the distinct tensors that autograd keeps after a forward pass, parameters not counted."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(0, 500, (work.batch_size, work.tokens))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    return sum(n for n, _ in kept.values())


def one_layer(model_type, mode, layers, attention="sdpa", autocast=False):
    sizes = {"vocab_size": 500, "n_embd": 64, "n_head": 4, "n_layer": layers} if model_type == "gpt2" else {
        **{k: v for k, v in SIZES.items() if model_type != "gpt_neox" or k != "num_key_value_heads"},
        "num_hidden_layers": layers, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if mode == "full":
        return tuning.unfreeze(model), config
    return tuning.add_lora(model, rank=8, alpha=None, dropout=0.0, targets="all-linear", rslora=False), config


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "olmo2", "phi3", "gpt_neox", "gpt2"]
)
def test_activations_are_those_that_autograd_keeps(model_type, mode):
    """What a further layer adds, by formula and by count; families with other parts may differ by a bounded share."""
    work = replace(LORA, mode=mode, eager=model_type == "gemma2")
    counted, estimated = [], []
    for layers in (1, 2):
        model, config = one_layer(model_type, mode, layers, "eager" if model_type == "gemma2" else "sdpa")
        counted.append(saved_bytes(model, work))
        estimated.append(peak_memory(read_decoder(json.loads(config.to_json_string())), work).activations)
    ratio = (estimated[1] - estimated[0]) / (counted[1] - counted[0])
    assert 0.8 < ratio < 1.25, ratio


def test_eager_attention_keeps_the_scores():
    long = replace(LORA, tokens=512)
    found = []
    for attention in ("sdpa", "eager"):
        model, config = one_layer("llama", "lora", 1, attention)
        decoder = read_decoder(json.loads(config.to_json_string()))
        found.append(
            (saved_bytes(model, long), peak_memory(decoder, replace(long, eager=attention == "eager")).activations)
        )
    counted, estimated = (found[1][i] - found[0][i] for i in (0, 1))
    assert estimated == pytest.approx(counted, rel=0.25)


def test_checkpointing_keeps_the_stream_and_one_layer_at_a_time():
    decoder = read_decoder({**LLAMA3_8B, "vocab_size": 1000})
    plain, again = (
        peak_memory(decoder, replace(LORA, dtype="bf16", tokens=1024, checkpointing=c)) for c in (False, True)
    )
    assert again.activations == 2 * 1024 * 4096 * 2 * 32
    assert plain.activations // 32 < again.logits < 1.5 * plain.activations // 32


def test_logits_grow_with_the_vocabulary_alone():
    small, large = (
        peak_memory(read_decoder({**LLAMA3_8B, "vocab_size": v}), replace(LORA, tokens=1024)).logits
        for v in (200_000, 400_000)
    )
    assert large == 2 * small == 2 * 1024 * 2 * 200_000 * 12


def test_a_zeroth_order_step_reads_its_logits_in_pieces():
    decoder = read_decoder({**LLAMA3_8B, "num_hidden_layers": 1})
    step = replace(LORA, mode="zeroth-order", batch_size=4, tokens=512, host=True)
    found = peak_memory(decoder, step)
    assert (found.logits, found.scratch) == (4 * 512 * 128256 * 4 + CHUNK * 8, 0)
    tiny = peak_memory(read_decoder({**LLAMA3_8B, "vocab_size": 500_000}), replace(step, batch_size=1, tokens=1))
    assert tiny.logits == 500_000 * 12


def test_an_unknown_family_is_refused():
    with pytest.raises(CheckpointError, match="known types"):
        read_decoder({"model_type": "mamba"})


QWEN3_MOE = {
    "model_type": "qwen3_moe", "vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 32, "num_experts": 4,
    "num_experts_per_tok": 2, "decoder_sparse_step": 1,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 500, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128}


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LLAMA3_8B, {"hidden_size": "big"}),
        (LLAMA3_8B, {"num_attention_heads": 0}),
        (LLAMA3_8B, {"num_attention_heads": None}),
        (LLAMA3_8B, {"num_attention_heads": 4097}),
        (LLAMA3_8B, {"num_hidden_layers": -1}),
        (LLAMA3_8B, {"num_hidden_layers": 10**9}),
        (LLAMA3_8B, {"vocab_size": 1.5}),
        (LLAMA3_8B, {"vocab_size": True}),
        (LLAMA3_8B, {"intermediate_size": [1]}),
        (LLAMA3_8B, {"hidden_size": 16}),
        (LLAMA3_8B, {"model_type": ["llama"]}),
        (LLAMA3_8B, {"text_config": "none"}),
        (LLAMA3_8B, {"text_config": {"model_type": "llama", "hidden_size": 4096}}),
        (QWEN3_MOE, {"decoder_sparse_step": 0}),
        (QWEN3_MOE, {"num_experts": None}),
        (QWEN3_MOE, {"mlp_only_layers": 3}),
        (QWEN3_MOE, {"num_experts": 4096, "num_hidden_layers": 4096}),
        (GPT2, {"n_head": None}),
        (GPT2, {"n_positions": {}}),
    ],
)
def test_a_size_that_is_none_is_refused(config, changes):
    read_decoder(config)
    with pytest.raises(CheckpointError):
        read_decoder({**config, **changes})


def test_a_size_that_is_null_is_one_that_is_left_out():
    assert read_decoder({**GPT2, "n_inner": None}) == read_decoder(GPT2)
    assert read_decoder({**QWEN3_MOE, "decoder_sparse_step": None}) == read_decoder(QWEN3_MOE)
    assert read_decoder({**LLAMA3_8B, "head_dim": None}) == read_decoder(LLAMA3_8B)


def test_peft_counts_the_same_adapters():
    config = LlamaConfig(**SIZES, num_hidden_layers=2)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    adapted = tuning.add_lora(model, rank=4, alpha=None, dropout=0.0, targets="all-linear", rslora=False)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == 4 * read_decoder(json.loads(config.to_json_string())).adapter_widths
