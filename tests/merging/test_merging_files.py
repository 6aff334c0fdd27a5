"""Merge files: mergekit's words, several documents, the recipe in a card; and merges by token, end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from merging_models import SETTINGS, edit_json, make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import honeloom
from honeloom.config.base import validate
from honeloom.errors import CheckpointError, ConfigError, IncompatibleModelsError, SourceError
from honeloom.merging.documents import in_order
from honeloom.merging.merge_config import MergeConfig
from honeloom.merging.mergekit import translate
from honeloom.merging.parameters import resolve


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def read(**document) -> MergeConfig:
    return validate(MergeConfig, document, what="merge")


# mergekit's words


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ties", {"density": 1.0, "normalize": True, "scale": 1.0}),
        ("dare_ties", {"density": 1.0, "rescale": "inverse", "normalize": False}),
        ("della", {"density": 1.0, "epsilon": 0.15, "rescale": "inverse"}),
        ("breadcrumbs", {"density": 1.0, "gamma": 0.01}),
        ("sce", {"select_topk": 1.0}),
    ],
)
def test_what_a_file_leaves_out_is_mergekits_default(method, settings):
    config = read(merge_method=method, base_model="x", models=[{"model": "x"}, {"model": "a"}])
    assert [s.model for s in config.models] == ["a"]
    assert {k: getattr(config.method, k) for k in settings} == settings


VARYING = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]
OTHER_TOKEN = {"kind": "model_token", "model": "a", "token_id": 7}


def test_every_part_of_a_mergekit_file():
    config = read(
        merge_method="dare_linear",
        base_model={"model": {"path": "org/base", "revision": "main"}},
        models=[
            {"model": "a", "parameters": {"weight": VARYING, "density": 0.4}},
            {"model": {"model": "org/b", "lora": "org/adapter"}, "parameters": {"weight": 0.2}},
        ],
        parameters={"lambda": 0.7, "normalize": True, "int8_mask": True, "rescale": False},
        dtype="float32",
        out_dtype="bfloat16",
        tokenizer={"source": "union", "tokens": {"<x>": {"source": {"kind": "zero"}, "force": True},
                                                 "<y>": {"source": OTHER_TOKEN}}},
        chat_template="chatml",
    )  # fmt: skip
    assert config.base_model == "org/base@main"
    assert [s.model for s in config.models] == ["a", "org/b+org/adapter"]
    weight = config.models[0].weight
    assert resolve(weight, "layers.0.mlp.up_proj.weight", 0.25) == 0.25
    assert resolve(weight, "layers.0.self_attn.q_proj.weight", 0.25) == 0.5
    assert config.models[0].density == 0.4
    method = config.method
    assert (method.scale, method.normalize, method.rescale) == (0.7, True, "none")
    assert config.dtype == "bf16"
    assert config.chat_template == "chatml"
    assert config.tokenizer.tokens["<x>"].source == "zero"
    assert config.tokenizer.tokens["<x>"].force
    assert config.tokenizer.tokens["<y>"].source == "a#7"


def test_weights_for_all_models_and_slices_of_mergekit():
    slices = [{"sources": [{"model": "x", "layer_range": [0, 2]}, {"model": "a", "layer_range": [0, 2]}],
               "parameters": {"t": 0.2}}]  # fmt: skip
    config = read(merge_method="slerp", base_model="x", slices=slices, parameters={"t": 0.5})
    assert config.slices[0].parameters == {"t": 0.2}
    both = read(merge_method="linear", models=["a", "b"], parameters={"weight": 0.5})
    assert [s.weight for s in both.models] == [0.5, 0.5]


def test_nuslerps_direction_is_turned_round():
    """mergekit's nuslerp_row_wise takes one angle per column."""
    for given, wanted in (({}, (True, False)), ({"nuslerp_flatten": False}, (False, True)),
                          ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, (False, False))):  # fmt: skip
        config = read(merge_method="nuslerp", models=["a", "b"], parameters=given)
        assert (config.method.flatten, config.method.row_wise) == wanted


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"modules": {"text": {}}, "models": ["a"]}, "modules: the parts of a model"),
        ({"tokenizer_source": "base", "tokenizer": {"source": "base"}, "models": ["a"]}, "both given"),
        ({"models": [{"model": {"model": "a", "override_architecture": "X"}}]}, "override_architecture"),
        ({"models": [{"model": 3}]}, "must be a path or a hub id"),
        ({"models": ["a"], "parameters": {"wieght_decay": 1}}, "'wieght_decay'"),
        ({"merge_method": "tise", "models": ["a"], "base_model": "x"}, "did you mean 'ties'"),
        ({"models": ["a"], "tokenizer": {"tokens": {"<x>": {"source": {"kind": "odd"}}}}}, "kind 'odd' is not known"),
        ({"models": ["a"], "dtype": "float8"}, "dtype"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(document, message):
    with pytest.raises(ConfigError, match=message):
        read(**{"merge_method": "linear", **document})


def test_a_translated_file_is_not_changed():
    document = {"merge_method": "ties", "base_model": "x", "models": [{"model": "a", "parameters": {"weight": 1}}],
                "parameters": {"lambda": 2}}  # fmt: skip
    before = json.dumps(document)
    translate(document)
    assert json.dumps(document) == before


# Our own words


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "give models, or slices"),
        ({"models": ["a"], "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]}, "give models, or slices"),
        ({"models": ["a", "b"], "method": "passthrough"}, "takes exactly 1 model; found 2"),
        ({"models": ["a"], "method": "model_stock", "base_model": "x"}, "at least 2 models besides base_model"),
        ({"models": ["a"], "method": "ties"}, "ties needs base_model"),
        ({"models": [{"model": "a", "density": 0.1}]}, "models.0.density: linear has no such setting for one model"),
        ({"models": [{"model": "a", "weight": 2}], "method": "magmax", "base_model": "x", "accept": ["vocab_size"]},
         "accept: 'vocab_size' cannot differ"),
        ({"models": [{"model": "a", "weight": 2}], "method": "arcee_fusion", "base_model": "x"},
         "does not look at weights"),
        ({"models": [{"model": "a", "rows": "r.jsonl"}]}, "linear measures nothing on rows"),
        ({"models": ["a"], "method": "fisher"}, "fisher measures each model on rows of its own domain"),
        ({"models": [{"model": "a", "weight": []}]}, "an empty list gives no value"),
        ({"models": [{"model": "a", "weight": [{"filter": "mlp"}]}]}, "filter: part of a tensor's name"),
        ({"models": ["a"], "base_model": "x", "method": {"type": "ties", "density": [0.5, 1.5]}},
         "1.5 must be above 0 and"),
        ({"models": ["a"], "max_memory": "2 gallons"}, "a size is a number of bytes"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}], "parameters": {"t": 1}}]},
         "slices.0.parameters: linear has no setting 't' that may vary"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}], "parameters": {"density": 5}}],
          "base_model": "x", "method": "ties"}, r"slices\.0\.parameters\.density: 5 must be above 0 and at most 1"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}], "parameters": {"normalize": 0}}],
          "base_model": "x", "method": "ties"}, "no setting 'normalize' that may vary"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_read(document, message):
    with pytest.raises(ConfigError, match=message):
        read(**document)


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2 << 30), ("1.5 MB", 1_500_000), ("100k", 100_000), (7, 7)])
def test_sizes(text, size):
    assert read(models=["a"], max_memory=text).max_memory == size


# Several documents


def test_documents_are_ordered_by_what_they_name():
    documents = [{"models": ["second", "x"]}, {"name": "second", "models": ["first"], "base_model": "first"},
                 {"name": "first", "models": ["y"]}, {"name": "unused", "models": ["z"]}]  # fmt: skip
    ordered = in_order(documents, Path("parts"))
    assert [name for name, _ in ordered] == ["first", "second", None]
    assert ordered[1][1] == {"models": ["parts/first"], "base_model": "parts/first"}
    assert ordered[2][1] == {"models": ["parts/second", "x"]}


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([{"models": ["a"]}, {"models": ["b"]}], "2 documents have no name"),
        ([{"name": "p", "models": ["q"]}, {"name": "q", "models": ["p"]}, {"models": ["p"]}], "circle: p -> q -> p"),
        ([{"name": "p", "models": ["a"]}, {"name": "p", "models": ["a"]}, {"models": ["p"]}], "two documents"),
        ([{"name": "../p", "models": ["a"]}, {"models": ["b"]}], r"name '\.\./p'"),
    ],
)
def test_documents_that_cannot_be_ordered(documents, message):
    with pytest.raises(ConfigError, match=message):
        in_order(documents, Path("parts"))


def test_a_file_of_several_documents(tmp_path, models):
    a, b, base = (str(models[n]) for n in ("a", "b", "base"))
    (tmp_path / "merge.yaml").write_text(
        f"name: half\nmodels: [{a}, {b}]\n---\nmodels: [half]\nbase_model: {base}\nmethod: {{type: task_arithmetic}}\n"
    )
    plans = honeloom.plan("merge", config=tmp_path / "merge.yaml", output_dir=tmp_path / "out")
    assert [p.stage for p in plans] == ["half", "merge"]
    report = honeloom.merge(tmp_path / "merge.yaml", tmp_path / "out")
    assert report.details["donor"] == base
    assert (tmp_path / "out-parts" / "half" / "manifest.json").is_file()
    half = weights_of(tmp_path / "out-parts" / "half")
    assert all(torch.allclose(half[n], t, atol=1e-7) for n, t in weights_of(tmp_path / "out").items())
    again = honeloom.merge(tmp_path / "merge.yaml", tmp_path / "out")
    assert again.reused


# The recipe in a card


def test_a_card_makes_its_model_again(tmp_path, models):
    settings = {"models": [str(models["a"]), {"model": str(models["b"]), "weight": 2}], "seed": 3, "dtype": "bf16"}
    first = honeloom.merge(settings, tmp_path / "one")
    again = honeloom.merge(from_card=tmp_path / "one", output_dir=tmp_path / "two")
    assert again.artefact.sha256 == first.artefact.sha256
    card = (tmp_path / "one" / "README.md").read_text()
    assert "honeloom-merge" in card
    assert str(tmp_path) not in card  # a card may be published
    edit_json(models["a"] / "config.json", max_position_embeddings=128)
    with pytest.raises(SourceError, match=r"models\.0\.model .* has the content .* --set models\.0\.model=PATH"):
        honeloom.merge(from_card=tmp_path / "one", output_dir=tmp_path / "three")


def test_a_card_alone_needs_to_be_told_where_models_are(tmp_path, models):
    honeloom.merge({"models": [str(models["a"]), str(models["b"])]}, tmp_path / "one")
    card = tmp_path / "elsewhere" / "README.md"
    card.parent.mkdir()
    shutil.copy(tmp_path / "one" / "README.md", card)
    places = [f"models.{i}.model={models[n]}" for i, n in enumerate("ab")]
    report = honeloom.merge(from_card=card, output_dir=tmp_path / "two", set=places)
    assert (
        report.artefact.sha256 == honeloom.merge(from_card=tmp_path / "one", output_dir=tmp_path / "3").artefact.sha256
    )


def test_other_cards_tell_of_no_merge(tmp_path):
    (tmp_path / "README.md").write_text("# a model")
    with pytest.raises(SourceError, match="tells of no merge"):
        honeloom.merge(from_card=tmp_path, output_dir=tmp_path / "out")
    with pytest.raises(SourceError, match=r"no README\.md"):
        honeloom.merge(from_card=tmp_path / "none", output_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match="give one of the two"):
        honeloom.merge(output_dir=tmp_path / "out")


# Adapters, tokens, layers


def test_a_model_plus_an_adapter(tmp_path, models, merge):
    torch.manual_seed(0)
    peft = get_peft_model(LlamaForCausalLM.from_pretrained(models["a"]), LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    peft.save_pretrained(tmp_path / "adapter")
    merge(models=[f"{models['b']}+{tmp_path / 'adapter'}"])
    changed = {n for n, t in merge.tensors().items() if not torch.equal(t, weights_of(models["b"])[n])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    with pytest.raises(SourceError, match="is no adapter"):
        merge(models=[f"{models['b']}+{models['a']}"])


def with_tokenizer(folder: Path, tokens: list[str], template: str | None = None) -> Path:
    tokenizer = Tokenizer(WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v}))
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_the_union_of_two_vocabularies(tmp_path, merge, tied):
    """Golden: {<unk>, a, b} and {<unk>, b, c}: b is merged, a and c come from the model that has them."""
    one = with_tokenizer(make_model(tmp_path / "one", 1, vocab_size=3, tie_word_embeddings=tied), ["<unk>", "a", "b"])
    two = with_tokenizer(make_model(tmp_path / "two", 2, vocab_size=3, tie_word_embeddings=tied), ["<unk>", "b", "c"])
    outcome = merge(models=[one, two], tokenizer="union")
    assert all(check.passed for check in outcome.checks)
    x, y, got = weights_of(one), weights_of(two), merge.tensors()
    for name in ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tied):
        wanted = [(x[name][0].double() + y[name][0].double()) / 2, x[name][1].double(),
                  (x[name][2].double() + y[name][1].double()) / 2, y[name][2].double()]  # fmt: skip
        assert torch.equal(got[name], torch.stack(wanted).float())
    assert json.loads((merge.out / "config.json").read_text())["vocab_size"] == 4
    assert AutoTokenizer.from_pretrained(merge.out)("a b c")["input_ids"] == [1, 2, 3]
    assert AutoModelForCausalLM.from_pretrained(merge.out).get_input_embeddings().weight.shape[0] == 4
    assert outcome.details["tokenizer"]["added"] == 1


def test_the_same_tokens_in_another_order_equal_permuted_rows(tmp_path, merge):
    one = with_tokenizer(make_model(tmp_path / "one", 1, vocab_size=3), ["<unk>", "a", "b"])
    two = with_tokenizer(make_model(tmp_path / "two", 2, vocab_size=3), ["b", "<unk>", "a"])
    merge(models=[one, two], tokenizer="base", method="slerp")
    by_token = merge.tensors()
    from merging_models import edit_weights

    names = ("model.embed_tokens.weight", "lm_head.weight")
    edit_weights(two, lambda ts: ts.update({n: ts[n][[1, 2, 0]].clone() for n in names}))
    with_tokenizer(two, ["<unk>", "a", "b"])
    merge(models=[one, two], method="slerp")
    assert all(torch.equal(by_token[n], t) for n, t in merge.tensors().items())


TEMPLATE = "{{ messages[0].content }} a"


def test_a_template_is_chosen_and_rendered(tmp_path, merge):
    one = with_tokenizer(make_model(tmp_path / "one", 1, vocab_size=3), ["<unk>", "a", "b"])
    two = with_tokenizer(
        make_model(tmp_path / "two", 2, vocab_size=3), ["<unk>", "a", "b"], "{{ messages[0].content }} a"
    )
    merge(models=[one, two], chat_template=str(two))
    assert AutoTokenizer.from_pretrained(merge.out).chat_template == "{{ messages[0].content }} a"
    with pytest.raises(Exception, match=r"<\|im_start\|>"):
        merge(models=[one, two], chat_template="chatml")


def qwen(folder: Path, seed: int, layers: int) -> Path:
    torch.manual_seed(seed)
    sizes = {
        **SETTINGS,
        "num_hidden_layers": layers,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    }
    Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(folder)
    return folder


def test_a_stack_carries_what_the_config_says_of_each_layer(tmp_path, merge):
    a = qwen(tmp_path / "a", 1, 3)
    types = json.loads((a / "config.json").read_text())["layer_types"]
    assert len(set(types)) == 2
    ranges = ([0, 2], [1, 3])
    merge(slices=[{"sources": [{"model": str(a), "layer_range": r}]} for r in ranges], method="passthrough")
    config = json.loads((merge.out / "config.json").read_text())
    assert config["layer_types"] == [*types[0:2], *types[1:3]]
    assert AutoModelForCausalLM.from_pretrained(merge.out).config.num_hidden_layers == 4
    edit_json(a / "config.json", layer_gains=[1.0, 2.0, 3.0])
    with pytest.raises(CheckpointError, match="layer_gains has as many entries as there are layers"):
        merge(slices=[{"sources": [{"model": str(a), "layer_range": r}]} for r in ranges], method="passthrough")


def test_layers_of_another_model_bring_what_its_config_says_of_them(tmp_path, merge):
    """The donor has fewer layers than the other one has, and other kinds."""
    a, b = qwen(tmp_path / "a", 1, 2), qwen(tmp_path / "b", 2, 4)
    edit_json(b / "config.json", layer_types=["full_attention", "sliding_attention"] * 2)
    slices = [
        {"sources": [{"model": str(a), "layer_range": [0, 1]}]},
        {"sources": [{"model": str(b), "layer_range": [2, 4]}]},
    ]
    merge(slices=slices, method="passthrough")
    first = json.loads((a / "config.json").read_text())["layer_types"][0]
    config = json.loads((merge.out / "config.json").read_text())
    assert config["layer_types"] == [first, "full_attention", "sliding_attention"]
    both = [{"model": str(m), "layer_range": r} for m, r in ((a, [1, 2]), (b, [2, 3]))]
    with pytest.raises(IncompatibleModelsError, match=r"slices\.0: layer_types is .*accept: \[layer_types\]"):
        merge(slices=[{"sources": both}])
    merge(slices=[{"sources": both}], accept=["layer_types"])


def test_layers_that_are_not_alike(tmp_path, merge):
    """Of Qwen2-MoE the first layer is dense: each layer has names of its own."""
    torch.manual_seed(0)
    sizes = {**SETTINGS, "num_hidden_layers": 3, "mlp_only_layers": [0], "num_experts": 2, "num_experts_per_tok": 1,
             "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}  # fmt: skip
    Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes)).save_pretrained(tmp_path / "m")
    source = {"model": str(tmp_path / "m"), "layer_range": [0, 3]}
    merge(slices=[{"sources": [source]}], method="passthrough")
    assert merge.tensors().keys() == weights_of(tmp_path / "m").keys()
    both = [{**source, "layer_range": [0, 1]}, {**source, "layer_range": [1, 2]}]
    with pytest.raises(IncompatibleModelsError, match=r"layer 1 of .* 'mlp"):
        merge(slices=[{"sources": both}])
