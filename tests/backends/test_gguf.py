"""GGUF files: what is written, what it computes by llama.cpp's rules, and what llama.cpp itself computes."""

import gguf
import pytest
import torch
from dropped_models import export, gap, ids_of, make_model, without
from transformers import AutoModelForCausalLM, AutoTokenizer

from honeloom.backends.gguf_model import GgufModel
from honeloom.backends.llama_cpp import ask_llama_cpp
from honeloom.checkpoint.folders import copy_tokenizer
from honeloom.errors import CheckpointError

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "initializer_range": 0.15}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "layer 0": ("llama", {}, {"attention": [0]}),
    "last layer": ("llama", {}, {"attention": [3]}),
    "mlp only": ("llama", {}, {"mlp": [1]}),
    "last mlp": ("llama", {}, {"mlp": [3]}),
    "joint": ("llama", {}, {"attention": [0, 2, 3], "mlp": [1]}),
    "last block": ("llama", {}, {"block": [3], "attention": [1]}),
    "native": ("llama", {}, {"attention": [2], "mlp": [1]}),
    "tied": ("llama", {"tie_word_embeddings": True}, {"attention": [1]}),
    "small heads": ("llama", {"head_dim": 8}, {"attention": [1]}),
    "biases": ("qwen2", {}, {"attention": [1], "mlp": [2]}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}, {"attention": [0], "mlp": [2]}),
}


def make(case, folder):
    """The file of a case, the silenced source, and the plan."""
    model_type, fields, drops = CASES[case]
    model = make_model(model_type, **{**SHAPE, **fields})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "source")
    plan = export(folder / "source", folder / "out", "gguf", **drops)
    block = drops.get("block", [])
    return without(model, [*drops.get("attention", []), *block], [*drops.get("mlp", []), *block]), plan


@pytest.mark.parametrize("case", CASES)
def test_the_file_computes_the_silenced_source(case, tmp_path):
    silent, plan = make(case, tmp_path)
    ids = ids_of(40)
    with torch.inference_mode():
        assert gap(GgufModel(tmp_path / "out" / "model.gguf")(ids).logits, silent(ids).logits) < 1e-4
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert sum(int(t.n_elements) for t in reader.tensors) == plan.params
    assert {t.name for t in reader.tensors} == {t.name for t in plan.tensors}
    assert ("output.weight" in {t.name for t in reader.tensors}) == (case != "tied")


def test_equal_inputs_give_equal_bytes_and_number_types_stay(tmp_path):
    make_model(**SHAPE).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    for name in ("one", "two"):
        export(tmp_path / "source", tmp_path / name, "gguf", attention=[1])
    one, two = ((tmp_path / name / "model.gguf").read_bytes() for name in ("one", "two"))
    assert one == two
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "one" / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "BF16" and kinds["blk.0.attn_norm.weight"] == "F32"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    found = GgufModel(tmp_path / "one" / "model.gguf")(ids_of()).logits
    with torch.inference_mode():
        assert gap(found, without(stock, [1])(ids_of()).logits) < 1e-4


def test_a_width_of_zero_would_lose_the_attention_and_no_heads_would_not_load(tmp_path):
    """The two rules of llama.cpp for which zeros are written, in the check that stands for it."""
    silent, _ = make("mlp only", tmp_path)
    path = tmp_path / "out" / "model.gguf"
    model, ids = GgufModel(path), ids_of()
    model.widths[1] = 0
    with torch.inference_mode():
        assert gap(model(ids).logits, silent(ids).logits) > 0.05
        assert gap(model(ids).logits, without(silent, [1])(ids).logits) < 1e-4
    reader = gguf.GGUFReader(path, "r+")
    reader.fields["deci.attention.head_count"].parts[reader.fields["deci.attention.head_count"].data[0]][0] = 0
    reader.data.flush()
    with pytest.raises(CheckpointError, match="block 0 has no heads"):
        GgufModel(path)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_silenced_source(case, tmp_path, llama_cpp):
    """Its keys and values are fp16, hence the tolerance; the last token alone takes another path."""
    silent, _ = make(case, tmp_path)
    ids = ids_of(40)
    found = ask_llama_cpp(tmp_path / "out" / "model.gguf", rows=ids.tolist(), last=ids.tolist())
    with torch.inference_mode():
        expected = silent(ids).logits[0]
    assert gap(torch.tensor(found.rows[0]), expected) < 2e-2
    assert gap(torch.tensor(found.last[0]), expected[-1]) < 2e-2


TEXTS = (
    "Once upon a time, there was a girl named Lily.", "  two spaces", "It's 2024, isn't it?\n\nYes: 3.14!",
    "naïve – 中文", "",
)  # fmt: skip


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", ["base6m", "stories260k"])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(name, shared_data, tmp_path, llama_cpp):
    """base6m: bytes and single digits; stories260k: sentencepiece with bytes for what it does not know."""
    source = shared_data / "models" / name
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    stock.save_pretrained(tmp_path / "fp32")  # with bf16 weights llama.cpp rounds the stream to bf16 as well
    copy_tokenizer(source, tmp_path / "fp32")
    export(tmp_path / "fp32", tmp_path, "gguf", attention=[1])
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    found = ask_llama_cpp(tmp_path / "model.gguf", rows=ids.tolist(), texts=TEXTS)
    assert found.tokens == [tokenizer(text)["input_ids"] for text in TEXTS]
    model = without(stock, [1])
    with torch.inference_mode():
        assert gap(torch.tensor(found.rows[0]), model(ids).logits[0]) < 2e-2
