"""Dropped folders: loaded by honeloom, by transformers with remote code, and by nobody in silence."""

import json
import os
import subprocess
import sys

import pytest
import torch
from dropped_models import FAMILIES, SIZES, export, gap, ids_of, make_model, without
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from honeloom.backends.hf.load import load_config, load_model
from honeloom.backends.hf.reload_export import reload_export
from honeloom.backends.hf.sublayers import locate, silenced
from honeloom.checkpoint.architectures import architecture_of
from honeloom.checkpoint.folders import read_config
from honeloom.checkpoint.reader import Checkpoint
from honeloom.errors import CheckpointError

UNLISTED = {
    "phi": SIZES, "opt": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}, "falcon": SIZES,
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4, "vocab_size": 97}, "cohere": SIZES,
    "starcoder2": SIZES, "glm4": {**SIZES, "head_dim": 8},
    "gpt_oss": {**SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
PROFILES = ("zero", "native", "dropped", "decilm", "gguf")


@pytest.fixture
def llama(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "source")
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_the_stock_class_with_zeros_does(family, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path / "source")
    export(tmp_path / "source", tmp_path / "out", "dropped", attention=[0, 1], mlp=[2], block=[3])
    loaded = load_model(tmp_path / "out")
    silent, ids = without(model, [0, 1, 3], [2, 3]), ids_of()
    with torch.inference_mode():
        whole = silent(ids).logits
        assert torch.equal(loaded(ids).logits, whole)
        assert gap(whole, model(ids).logits) > 1e-3
        cache, steps = None, []
        for start, stop in ((0, 10), (10, 11), (11, 18), (18, 24)):  # chunks and a single step
            step = loaded(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache, steps = step.past_key_values, [*steps, step.logits]
    assert gap(torch.cat(steps, dim=1), whole) < 1e-4


@pytest.mark.parametrize("profile", ["zero", "dropped"])
@pytest.mark.parametrize("family", UNLISTED)
def test_families_that_no_table_lists_go_by_what_was_found(family, profile, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **UNLISTED[family])).eval()
    model.save_pretrained(tmp_path / "source")
    drops = {"attention": [0, 1], "mlp": [2]}
    ids = ids_of()
    plan = export(tmp_path / "source", tmp_path / "out", profile, **drops, located=locate(model))
    loaded = load_model(tmp_path / "out")
    with torch.inference_mode(), silenced(model, **drops):
        whole = model(ids, use_cache=False).logits
        assert gap(loaded(ids, use_cache=False).logits, whole) < 1e-5
        first = loaded(ids[:, :10], use_cache=True)
        second = loaded(ids[:, 10:], past_key_values=first.past_key_values, use_cache=True)
        assert gap(torch.cat((first.logits, second.logits), dim=1), whole) < 1e-4
    assert (plan.params < sum(p.numel() for p in model.parameters())) == (profile == "dropped")


@pytest.mark.parametrize("attention", [[0], [1], [3], [0, 1]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generation_goes_by_the_same_logits_as_whole_passes(family, attention, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path / "source")
    export(tmp_path / "source", tmp_path / "out", "dropped", attention=attention)
    loaded, silent = load_model(tmp_path / "out"), without(model, attention)
    ids = ids_of(8, rows=2)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for kind in (None, "static"):
        one, other = (
            m.generate(ids, attention_mask=mask, cache_implementation=kind, eos_token_id=None, **settings)
            for m in (loaded, silent)
        )
        assert torch.equal(one.sequences, other.sequences)
        assert gap(torch.stack(one.logits), torch.stack(other.logits)) < 1e-4


def test_the_cache_holds_nothing_for_layers_without_attention(llama, tmp_path):
    export(tmp_path / "source", tmp_path / "out", "dropped", attention=[0, 2])
    loaded, ids = load_model(tmp_path / "out"), ids_of()
    held = [
        sum(t.nbytes for layer in m(ids, use_cache=True).past_key_values.layers
            for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None)
        for m in (llama, loaded)
    ]  # fmt: skip
    assert held[0] == 2 * 2 * 8 * 4 * 24 * 4  # keys and values, heads, head size, bytes, tokens, layers
    assert held[1] * 4 == held[0] * 2
    static = StaticCache(config=loaded.config, max_cache_len=32)
    assert gap(loaded(ids, past_key_values=static).logits, loaded(ids).logits) < 1e-5


def test_a_loaded_model_is_of_the_stock_family_and_saves_as_what_it_is(llama, tmp_path):
    export(tmp_path / "source", tmp_path / "out", "dropped", attention=[1], mlp=[2])
    loaded = load_model(tmp_path / "out")
    assert architecture_of(loaded.config.to_dict()).model_type == "llama"
    assert isinstance(loaded, type(llama))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again")(ids_of()).logits, loaded(ids_of()).logits)
    one, other = (read_config(tmp_path / name) for name in ("out", "again"))
    assert one["drop_spec"] == other["drop_spec"] and one["auto_map"] == other["auto_map"]
    assert "drop_spec" not in other["base"] and "kv_sharing_modes" not in other["base"]
    assert (tmp_path / "again" / "honeloom_dropped.py").read_text() == (
        tmp_path / "out" / "honeloom_dropped.py"
    ).read_text()


def test_its_configuration_answers_for_its_base(llama, tmp_path):
    export(tmp_path / "source", tmp_path / "out", "dropped", attention=[1])
    config = load_config(tmp_path / "out")
    assert (config.num_hidden_layers, config.max_position_embeddings, config.vocab_size) == (4, 64, 97)
    assert config.get_text_config().model_type == "llama"
    built = AutoModelForCausalLM.from_config(config)
    assert not hasattr(built.model.layers[1].self_attn, "q_proj")


def test_code_of_a_repository_is_still_refused(llama, tmp_path):
    export(tmp_path / "source", tmp_path / "out", "dropped", attention=[1])
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    for change in ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, {"model_type": "llama"}):
        file.write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match="never runs such code"):
            load_config(tmp_path / "out")


def test_the_file_in_the_folder_is_never_run_here(llama, tmp_path):
    export(tmp_path / "source", tmp_path / "out", "dropped", attention=[1])
    (tmp_path / "out" / "honeloom_dropped.py").write_text("raise SystemExit('run')")
    assert load_model(tmp_path / "out")(ids_of()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 2}, "version 2"), ({"attention": [9]}, "names layer 9"), ({"mlp": ["x"]}, "names layer 'x'")],
)
def test_a_spec_that_cannot_be_is_refused(llama, tmp_path, change, message):
    export(tmp_path / "source", tmp_path / "out", "dropped", attention=[1])
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "drop_spec": {**config["drop_spec"], **change}}))
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path / "out")


def test_weights_that_lack_more_than_the_spec_says_are_refused(llama, tmp_path):
    export(tmp_path / "source", tmp_path / "out", "dropped", attention=[1, 2])
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "drop_spec": {**config["drop_spec"], "attention": [1]}}))
    with pytest.raises(CheckpointError, match="tensors are missing"):
        load_model(tmp_path / "out")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_profile_reads_back_as_the_silenced_source(family, profile, tmp_path):
    model = make_model(family, hidden_size=64, intermediate_size=256, head_dim=16)
    model.save_pretrained(tmp_path / "source")
    drops = {"attention": [2], "mlp": [1]} if profile == "native" else {"attention": [1, 2], "mlp": [3]}
    export(tmp_path / "source", tmp_path / "out", profile, **drops)
    ids = ids_of()
    with torch.inference_mode():
        expected = without(model, **drops)(ids).logits
        found = reload_export(tmp_path / "out", profile)(input_ids=ids, use_cache=False).logits
        assert gap(found, expected) < 1e-4 < gap(model(ids).logits, expected)


def test_a_native_export_of_types_of_attention_is_exact(tmp_path):
    model = make_model("gemma2")
    model.save_pretrained(tmp_path / "source")
    export(tmp_path / "source", tmp_path / "out", "native", attention=[2], mlp=[1])
    assert torch.equal(load_model(tmp_path / "out")(ids_of()).logits, without(model, [2], [1])(ids_of()).logits)


def test_decilm_settings_that_do_not_fit_the_tensors_are_found(tmp_path):
    make_model(hidden_size=64, intermediate_size=256, head_dim=16).save_pretrained(tmp_path / "source")
    export(tmp_path / "source", tmp_path / "out", "decilm", attention=[1])
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["block_configs"][0]["ffn"]["ffn_mult"] = 8.1
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="block_configs asks for"):
        reload_export(tmp_path / "out", "decilm")


PLAIN = """
import json, sys, torch
sys.modules["honeloom"] = None
from transformers import AutoConfig, AutoModelForCausalLM

def logits(folder, trust):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32).eval()
    if trust:
        model.save_pretrained(folder + "-saved")
    return model(torch.tensor(json.loads(sys.argv[1]))).logits.tolist()

def blocks(folder, trust):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    one, other = config.block_configs[1], config.to_dict()["block_configs"][1]
    saved = other["attention"]["no_op"]
    return [one.attention.no_op, one.ffn.ffn_mult, config.rope_theta, config.num_hidden_layers, saved]

for line in sys.argv[2:]:
    kind, trust, folder = line.split(" ", 2)
    try:
        answer = {"logits": logits, "blocks": blocks}[kind](folder, trust == "trust")
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print("ANSWER" + json.dumps(answer))
"""


def ask_plainly(folder, ids, *questions):
    """What transformers says of folders in a process that cannot import honeloom."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(ids.tolist()), *questions],
        capture_output=True, text=True, env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules")},
    )  # fmt: skip
    answers = [json.loads(x.removeprefix("ANSWER")) for x in done.stdout.splitlines() if x.startswith("ANSWER")]
    assert len(answers) == len(questions), done.stderr
    return answers


def test_plain_transformers_gives_exact_logits_or_an_error_on_every_profile(tmp_path):
    model = make_model(hidden_size=64, intermediate_size=256, head_dim=16)
    model.save_pretrained(tmp_path / "source")
    drops = {"attention": [2], "mlp": [1]}
    for profile in PROFILES:
        export(tmp_path / "source", tmp_path / profile, profile, **drops)
    ids = ids_of(8)
    expected = without(model, **drops)(ids).logits
    found = ask_plainly(tmp_path, ids, *(f"logits no {tmp_path / profile}" for profile in PROFILES))
    for profile, answer in zip(PROFILES, found, strict=True):
        if profile in ("zero", "native"):
            assert gap(torch.tensor(answer), expected) < 1e-5
        else:
            assert isinstance(answer, str) and "Error" in answer


def test_code_of_the_folder_gives_the_model_and_the_blocks_where_it_is_trusted(tmp_path):
    model, ids = make_model("gemma2"), ids_of(8)
    model.save_pretrained(tmp_path / "source")
    export(tmp_path / "source", tmp_path / "out", "dropped", attention=[0, 1], mlp=[2])
    make_model(hidden_size=64, intermediate_size=256, head_dim=16).save_pretrained(tmp_path / "llama")
    export(tmp_path / "llama", tmp_path / "decilm", "decilm", attention=[1])
    questions = (f"logits trust {tmp_path / 'out'}", f"blocks trust {tmp_path / 'decilm'}")
    logits, blocks = ask_plainly(tmp_path, ids, *questions)
    assert gap(torch.tensor(logits), without(model, [0, 1], [2])(ids).logits) < 1e-5
    saved = load_model(tmp_path / "out-saved")  # written by that process
    assert torch.equal(saved(ids).logits, load_model(tmp_path / "out")(ids).logits)
    assert blocks == [True, 6.0, 10000.0, 4, True]


def test_a_family_whose_layers_share_keys_is_refused(tmp_path):
    """Nothing to export may depend on keys of a layer that is gone."""
    model = make_model()
    model.config.num_kv_shared_layers = 2
    model.save_pretrained(tmp_path / "source")
    for profile in ("native", "dropped"):
        with pytest.raises(CheckpointError, match="num_kv_shared_layers"):
            export(tmp_path / "source", tmp_path / "out", profile, block=[1])


def test_tensors_are_those_of_the_spec(llama, tmp_path):
    export(tmp_path / "source", tmp_path / "out", "dropped", attention=[1], mlp=[1])
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert not any(".1." in name for name in checkpoint.names())
