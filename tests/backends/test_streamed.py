"""A model that is never in memory: it computes what the loaded model computes, and reads no more than it uses."""

import gc
import json
import math
import shutil
import struct
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from honeloom.backends.hf import streamed
from honeloom.backends.hf.compare import largest_gap, row_logits
from honeloom.backends.hf.load import load_config, load_model
from honeloom.backends.hf.streamed import (
    Probe,
    Weights,
    checkpoint_weights,
    probe,
    source_weights,
    streamed_model,
)
from honeloom.checkpoint.architectures import tensor_shapes
from honeloom.checkpoint.reader import Checkpoint
from honeloom.errors import CheckpointError
from honeloom.merging.engine.sources import ModelSource

CPU = torch.device("cpu")
ROWS = [[1, 5, 9, 30, 2, 7], [3, 3, 8, 60, 1]]
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": {**SMALL, "attention_bias": True},
    "mistral": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 16},
    "phi3": {**SMALL, "pad_token_id": 0},
    "gemma2": {**SMALL, "head_dim": 16},
    "gemma3_text": {**SMALL, "head_dim": 16},
    "olmo2": SMALL,
    "gpt_neox": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    "gpt2": {
        "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "mixtral": {**SMALL, "num_local_experts": 4},
    "qwen3_moe": {
        **SMALL, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
}  # fmt: skip


def write(folder, family, dtype=torch.float32, **settings):
    """A random model on disk, as transformers saves it."""
    config = CONFIG_MAPPING[family](**FAMILIES[family] | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases too
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder)
    return folder


def edit(folder, change):
    """Change the tensors on disk."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


def streamed_logits(folder, rows=ROWS, **options):
    with (
        Checkpoint.open(folder) as checkpoint,
        streamed_model(load_config(folder), checkpoint_weights(checkpoint), **options) as model,
    ):
        return row_logits(model, rows, CPU)


def watched(weights):
    """The same weights, and the list of what is read of them."""
    reads = []

    def read(name, start, stop):
        reads.append((name, start, stop))
        return weights.read(name, start, stop)

    return Weights(weights.name, weights.shapes, read), reads


@pytest.fixture
def llama(tmp_path):
    return write(tmp_path / "llama", "llama")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_loaded_model(tmp_path, monkeypatch, family, tied):
    folder = write(tmp_path / "model", family, tie_word_embeddings=tied)
    loaded = row_logits(load_model(folder), ROWS)
    assert min(float(logits.std()) for logits in loaded) > 0.3
    assert largest_gap(streamed_logits(folder), loaded) <= 1e-6
    monkeypatch.setattr(streamed, "SLICE", 100)  # three rows of most matrices
    assert largest_gap(streamed_logits(folder), loaded) <= 1e-5


def test_text_part_of_a_model_that_sees(tmp_path):
    text = CONFIG_MAPPING["gemma3_text"](**FAMILIES["gemma3_text"]).to_dict()
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = CONFIG_MAPPING["gemma3"](
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63, boi_token_index=61,
        eoi_token_index=62,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert largest_gap(streamed_logits(tmp_path), row_logits(load_model(tmp_path), ROWS)) <= 1e-6


def test_names_of_the_first_gpt2_files(tmp_path):
    folder = write(tmp_path / "model", "gpt2")
    loaded = row_logits(load_model(folder), ROWS)
    mask = {"h.0.attn.bias": torch.ones(40, 40).tril()}  # a buffer that those files also hold
    edit(folder, lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()} | mask)
    assert largest_gap(streamed_logits(folder), loaded) <= 1e-6


def test_experts_stored_together(tmp_path):
    folder = write(tmp_path / "model", "qwen3_moe")
    loaded = row_logits(load_model(folder), ROWS)

    def fuse(tensors):
        stem = "model.layers.0.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{stem}.{e}.{part}_proj.weight") for e in range(4)])
            for part in ("gate", "up", "down")
        )
        return tensors | {f"{stem}.gate_up_proj": torch.cat([gate, up], dim=1), f"{stem}.down_proj": down}

    edit(folder, fuse)
    assert largest_gap(streamed_logits(folder), loaded) <= 1e-6


def test_head_beside_a_tied_embedding_is_used_as_it_is_stored(llama):
    edit(llama, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] * 3})
    (llama / "config.json").write_text(
        json.dumps(json.loads((llama / "config.json").read_text()) | {"tie_word_embeddings": True})
    )
    assert largest_gap(streamed_logits(llama), row_logits(load_model(llama), ROWS)) <= 1e-6


def test_computes_in_fp32_whatever_is_stored(tmp_path):
    folder = write(tmp_path / "model", "llama", torch.bfloat16)
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    loaded = row_logits(load_model(folder), ROWS)  # fp32 too, on a CPU
    assert largest_gap(streamed_logits(folder), loaded) <= 1e-6
    exact = streamed_logits(folder, dtype=torch.float64)
    assert 0 < largest_gap(exact, loaded) < 1e-4


def test_adapter_is_added_while_reading(tmp_path, tiny_model):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj", "lm_head"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(tmp_path)
    by_peft = row_logits(adapted.eval(), ROWS)
    with (
        ModelSource("a", tmp_path, tiny_model) as source,
        streamed_model(load_config(tiny_model), source_weights(source)) as model,
    ):
        assert largest_gap(row_logits(model, ROWS, CPU), by_peft) <= 1e-5
    assert largest_gap(streamed_logits(tiny_model), by_peft) > 0.01


def test_reads_are_slices_and_only_what_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "SLICE", 320)  # ten rows
    folder = write(tmp_path / "model", "mixtral", num_experts_per_tok=1)
    with Checkpoint.open(folder) as checkpoint:
        weights, reads = watched(checkpoint_weights(checkpoint))
        with streamed_model(load_config(folder), weights) as model:
            assert reads == []
            row_logits(model, [[5]], CPU)
    assert max(stop - start for _, start, stop in reads) == 320
    assert [r for r in reads if "embed_tokens" in r[0]] == [("model.embed_tokens.weight", 160, 192)]
    head = [(a, b) for name, a, b in reads if name == "lm_head.weight"]
    assert head == [(i, min(i + 320, 2048)) for i in range(0, 2048, 320)]
    for layer in range(2):  # one token, one expert
        experts = {n.split(".")[5] for n, _, _ in reads if f"layers.{layer}.block_sparse_moe.experts" in n}
        assert len(experts) == 1


def test_scaled_embedding_reads_its_tokens_alone(tmp_path):
    folder = write(tmp_path / "model", "gemma2", tie_word_embeddings=False)
    with Checkpoint.open(folder) as checkpoint:
        weights, reads = watched(checkpoint_weights(checkpoint))
        with streamed_model(load_config(folder), weights) as model:
            row_logits(model, [[5, 9, 5]], CPU)
    read = [(start, stop) for name, start, stop in reads if name == "model.embed_tokens.weight"]
    assert read == [(160, 192), (288, 320)]


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), data=st.data())
def test_pieces_are_those_of_the_joined_tensors(sizes, data):
    names = [f"t{i}" for i in range(len(sizes))]
    tensors = dict(zip(names, torch.arange(sum(sizes), dtype=torch.float64).split(sizes), strict=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    weights = Weights("m", shapes, lambda name, start, stop: tensors[name][start:stop])
    elements = streamed._Elements(weights, (sum(sizes),), torch.float32, tuple(names))
    start = data.draw(st.integers(0, sum(sizes) - 1))
    stop = data.draw(st.integers(start + 1, sum(sizes)))
    assert elements.read(start, stop).tolist() == list(range(start, stop))


def test_nothing_is_left_behind(llama):
    config = load_config(llama)
    before, state = config.to_dict(), torch.get_rng_state()
    with Checkpoint.open(llama) as checkpoint:
        weights, reads = watched(checkpoint_weights(checkpoint))
        with streamed_model(config, weights, dtype=torch.float64) as model:
            assert all(p.is_meta for p in model.parameters())
            tables = [b for b in model.buffers() if not b.is_meta]
            probe(model, ROWS)
            assert tables and all(p.is_meta for p in model.parameters())
        count = len(reads)
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            probe(model, ROWS)
        assert len(reads) == count > 0
    gone = weakref.ref(weights.read)
    del weights
    gc.collect()
    assert gone() is None  # the model holds it no longer
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_errors_pass_and_clean_up(llama):
    def fail(name, start, stop):
        raise OSError("the disk is gone")

    with Checkpoint.open(llama) as checkpoint:
        good = checkpoint_weights(checkpoint)
        with (
            pytest.raises(OSError, match="the disk is gone"),
            streamed_model(load_config(llama), Weights("m", good.shapes, fail)) as model,
        ):
            probe(model, ROWS)
    assert not any("weight" in vars(module) for module in model.modules())


REFUSED = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight") is None,
                r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight', for .* shape \(48, 32\); did you mean 'model\.l"),
    "shape": (lambda t: t.update({"model.norm.weight": torch.ones(31)}),
              r"'model\.norm\.weight' is \(31,\), and config\.json asks for \(32,\)"),
    "left over": (lambda t: t.update({"model.layers.2.self_attn.q_proj.weight": torch.ones(32, 32)}),
                  r"no place for 1 tensors .* first 'model\.layers\.2\.self_attn\.q_proj\.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit_are_refused_before_anything_is_read(llama, case):
    change, message = REFUSED[case]
    edit(llama, change)
    with Checkpoint.open(llama) as checkpoint:
        weights, reads = watched(checkpoint_weights(checkpoint))
        with pytest.raises(CheckpointError, match=message), streamed_model(load_config(llama), weights):
            pytest.fail("it was built")
        assert reads == []


def test_missing_and_misshapen_experts_are_refused(tmp_path):
    folder = write(tmp_path / "model", "mixtral")
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    edit(folder, lambda t: t.update({name: torch.ones(32, 48)}))
    with pytest.raises(CheckpointError, match=r"experts\.3\.w3\.weight' is \(32, 48\), .* asks for \(48, 32\)"):
        streamed_logits(folder)
    edit(folder, lambda t: t.pop(name) is None)
    with pytest.raises(CheckpointError, match=r"no tensor '.*experts\.3\.w3\.weight', for .* \(48, 32\)"):
        streamed_logits(folder)


def test_codes_are_refused(llama):
    config = load_config(llama)
    with Checkpoint.open(llama) as checkpoint:
        weights = checkpoint_weights(checkpoint)
        config.quantization_config = {"quant_method": "gptq"}
        with pytest.raises(CheckpointError, match="quantised"), streamed_model(config, weights):
            pytest.fail("it was built")
    edit(llama, lambda t: t.update({"lm_head.weight": torch.ones(64, 32, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is torch\.int8"):
        streamed_logits(llama)


def test_nan_is_seen(llama):
    def spoil(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = math.nan

    edit(llama, spoil)
    with (
        Checkpoint.open(llama) as checkpoint,
        streamed_model(load_config(llama), checkpoint_weights(checkpoint)) as model,
    ):
        found = probe(model, ROWS)
    assert (found.finite, found.tokens) == (False, 9)
    assert math.isnan(found.loss)


def test_loss_of_a_model_without_an_opinion(llama):
    edit(llama, lambda t: t.update({"lm_head.weight": torch.zeros(64, 32)}))
    with (
        Checkpoint.open(llama) as checkpoint,
        streamed_model(load_config(llama), checkpoint_weights(checkpoint)) as model,
    ):
        found = probe(model, [*ROWS, [4]])
        assert found == Probe(True, pytest.approx(math.log(64), rel=1e-6), 9)
        lonely = probe(model, [[4]])
        assert (lonely.finite, lonely.tokens) == (True, 0)
        assert math.isnan(lonely.loss)
        for rows in ([], [[1], []]):
            with pytest.raises(ValueError, match="each needs at least one"):
                probe(model, rows)
        with pytest.raises(IndexError, match=r"ids 3 to 64: 'model\.embed_tokens\.weight' has rows 0 to 63"):
            probe(model, [[64, 3]])


def test_rows_of_a_probe_do_not_see_each_other(llama):
    loaded = load_model(llama)
    with (
        Checkpoint.open(llama) as checkpoint,
        streamed_model(load_config(llama), checkpoint_weights(checkpoint)) as model,
    ):
        together = probe(model, ROWS)
    one, other = (probe(loaded, [row]) for row in ROWS)
    assert (one.tokens, other.tokens, together.tokens) == (5, 4, 9)
    assert together.loss == pytest.approx((5 * one.loss + 4 * other.loss) / 9, rel=1e-5)
    with torch.inference_mode():
        by_transformers = float(loaded(input_ids=torch.tensor(ROWS[:1]), labels=torch.tensor(ROWS[:1])).loss)
    assert one.loss == pytest.approx(by_transformers, rel=1e-6)


def test_losses_do_not_depend_on_threads(llama):
    loaded, threads = load_model(llama), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        seen = []
        handle = loaded.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
        probe(loaded, ROWS)
        handle.remove()
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(threads)


CHILD = """
import sys
from pathlib import Path
from honeloom.backends.hf.load import load_config
from honeloom.backends.hf.streamed import checkpoint_weights, probe, streamed_model
from honeloom.checkpoint.reader import Checkpoint
from honeloom.system import address_space_limit, peak_rss

folder = Path(sys.argv[1])
with Checkpoint.open(folder) as checkpoint:
    with streamed_model(load_config(folder), checkpoint_weights(checkpoint)) as model:
        before = peak_rss()
        with address_space_limit(256 << 20):
            found = probe(model, [[1, 2, 3, 4, 5, 6, 7, 8]])
        print(found.finite, checkpoint.bytes_read, peak_rss() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Half a gigabyte of layers, and a limit on memory that they would not fit into."""
    config = CONFIG_MAPPING["llama"](
        vocab_size=1024, hidden_size=1024, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=16,
        tie_word_embeddings=True, dtype="bfloat16", eos_token_id=2,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(config.to_json_string())
    shapes = tensor_shapes(json.loads(config.to_json_string()))
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    block = (torch.randn(1 << 20) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])
    try:
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
        )
    finally:
        shutil.rmtree(tmp_path)
    assert child.returncode == 0, child.stderr
    finite, read, growth = child.stdout.split()
    assert end > 450e6
    assert finite == "True" and int(read) > 0.99 * end
    assert int(growth) < 60e6
