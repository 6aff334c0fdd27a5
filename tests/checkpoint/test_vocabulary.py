"""Reading, extending and writing tokenizer files; the libraries that load them are the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2Tokenizer

from honeloom.checkpoint.vocabulary import Vocabulary, choose_template, read_template, write_tokenizer
from honeloom.errors import CheckpointError, ConfigError, TemplateError
from honeloom.lab.tokenizer import write_tokenizer as write_lab_tokenizer
from honeloom.merging.engine.embeddings import combine

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
USER = {"role": "user", "content": " hi "}
TURNS = [USER, {"role": "assistant", "content": "yes"}]


def added(token: str, number: int = 0, **flags: bool) -> dict[str, Any]:
    return {"id": number, "content": token, **FLAGS, **flags}


def write_files(
    folder: Path, vocab: Any, tokens: Any = (), kind: str = "BPE", config: Any = None, steps: Any = None, **model: Any
) -> Path:
    """A tokenizer.json, and a tokenizer_config.json where given."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = {"merges": []} if kind == "BPE" else {"unk_token": "<unk>"} if kind.startswith("Word") else {"unk_id": 0}
    if kind == "WordPiece":
        rest |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": list(tokens), "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None, **(steps or {}),
        "model": {"type": kind, "vocab": vocab, **rest, **model},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path) -> Vocabulary:
    found = Vocabulary.read(folder)
    assert found is not None
    return found


def union(folders: dict[str, Path]) -> Any:
    return combine({name: read(folder) for name, folder in folders.items()}, next(iter(folders)), "union")


def ids_of(folder: Path) -> dict[str, int]:
    """What the tokenizers library makes of a file."""
    return dict(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab())


def test_tokens_are_read_in_the_order_of_their_ids_with_what_they_are(tmp_path):
    config = {"bos_token": "<s>", "pad_token": {"content": "b"}, "added_tokens_decoder": {"3": added("<x>")}}
    found = read(write_files(tmp_path, {"b": 1, "a": 0}, [added("<s>", 2)], config=config))
    assert list(found.tokens.items()) == [("a", 0), ("b", 1), ("<s>", 2), ("<x>", 3)]
    assert (found.kind, found.rows) == ("BPE", 4)
    assert set(found.added) == {"<s>", "<x>", "b"}  # transformers makes every token with a role an added token
    assert found.added["<s>"] == {"content": "<s>", **FLAGS}
    assert found.roles == {"bos_token": "<s>", "pad_token": "b"}


def test_ids_are_those_that_the_library_gives_whatever_the_file_says(tmp_path):
    """An added token that the model has keeps the model's id; others are counted on from the number of its entries."""
    vocab = {"a": 0, "b": 1, "<in>": 7}
    folder = write_files(tmp_path, vocab, [added("<x>", 40), added("<in>", 3), added("<y>", 50)])
    found = read(folder)
    assert dict(found.tokens) == {"a": 0, "b": 1, "<x>": 3, "<in>": 7, "<y>": 4}
    assert dict(found.tokens) == ids_of(folder)


def test_tokens_that_share_an_id_are_said(tmp_path):
    folder = write_files(tmp_path, {"a": 0, "b": 2}, [added("<x>", 3)])
    assert ids_of(folder) == {"a": 0, "b": 2, "<x>": 2}
    assert union({"one": folder}).words[0] == "one: 1 tokens share an id, and so a row, with another"


def test_tokens_that_transformers_appends_on_loading_are_counted(tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "extra_special_tokens": ["<e>"],
              "added_tokens_decoder": {"9": added("<late>"), "2": added("<early>")}}  # fmt: skip
    folder = write_files(tmp_path, {"a": 0}, [added("<s>", 1)], config=config)
    expected = {"a": 0, "<s>": 1, "<early>": 2, "<late>": 3, "[PAD]": 4, "<e>": 5}
    assert dict(read(folder).tokens) == expected == AutoTokenizer.from_pretrained(folder).get_vocab()


def test_unigram_pieces_have_their_place_as_id_and_keep_their_scores(tmp_path):
    found = read(write_files(tmp_path, [["<unk>", 0.0], ["a", -1.5]], [added("<s>", 2)], "Unigram"))
    assert (found.kind, dict(found.tokens)) == ("Unigram", {"<unk>": 0, "a": 1, "<s>": 2})
    assert dict(found.scores) == {"<unk>": 0.0, "a": -1.5}


def test_a_folder_with_vocab_json_and_merges_is_read(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "abb": 3}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "added_tokens.json").write_text('{"<y>": 5, "<x>": 4}')
    found = read(tmp_path)
    assert dict(found.tokens) == {"a": 0, "b": 1, "ab": 2, "abb": 3, "<x>": 4, "<y>": 5}
    assert found.reachable is not None and found.tokens.keys() - found.reachable == {"abb"}


def test_a_folder_with_a_sentencepiece_model_alone_is_compared_by_its_bytes(tmp_path):
    for name, data in (("one", b"x"), ("same", b"x"), ("other", b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(data)
    one, same, other = (read(tmp_path / name) for name in ("one", "same", "other"))
    assert (one.kind, len(one.tokens), one.rows) == ("tokenizer.model", 0, 0)
    assert one.digest == same.digest != other.digest


def test_a_folder_without_a_tokenizer_has_no_vocabulary(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert Vocabulary.read(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{"), ("tokenizer.json", "[1]"), ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": "0"}}}'), ("tokenizer.json", '{"model": {"vocab": {"a": -1}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 99999999999}}}'),
        ("tokenizer.json", '{"model": {"vocab": [[]]}}'), ("tokenizer.json", '{"model": {"vocab": "ab"}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 3}]}'),
        ("tokenizer.json", '{"model": {"vocab": {"\\ud800": 0}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}, "merges": [["a"]]}}'),
        ("tokenizer_config.json", "[" * 100_000),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=r"download (it|the folder) again"):
        Vocabulary.read(tmp_path)


def test_the_digest_tells_tokenizers_apart_and_nothing_else(tmp_path):
    vocab = {"a": 0, "b": 1, "ab": 2}
    plain = read(write_files(tmp_path / "a", vocab, merges=["a b"])).digest
    truncated = {"truncation": {"max_length": 5}, "decoder": {"type": "ByteLevel"}}
    assert read(write_files(tmp_path / "b", vocab, merges=[["a", "b"]], ignore_merges=False)).digest == plain
    assert read(write_files(tmp_path / "c", vocab, merges=["a b"], steps=truncated)).digest == plain
    lower = {"normalizer": {"type": "Lowercase"}}
    assert read(write_files(tmp_path / "d", vocab, merges=["a b"], steps=lower)).digest != plain
    assert read(write_files(tmp_path / "e", vocab)).digest != plain
    assert read(write_files(tmp_path / "f", vocab, [added("ab", 2)], merges=["a b"])).digest != plain
    assert read(write_files(tmp_path / "g", {"b": 0, "a": 1, "ab": 2}, merges=["a b"])).digest != plain


def test_what_no_merge_forms_is_not_reachable(tmp_path):
    vocab = {t: i for i, t in enumerate(["a", "b", "ab", "aab", "<0x0A>", "水", "<unk>", "##c", "##cc"])}
    model = {"merges": [["a", "b"]], "byte_fallback": True, "unk_token": "<unk>"}

    def dead(name: str, **more: Any) -> set[str] | None:
        found = read(write_files(tmp_path / name, vocab, [added("<s>", 9)], **{**model, **more}))
        return None if found.reachable is None else set(found.tokens) - found.reachable

    assert dead("plain") == {"aab", "##c", "##cc"}
    assert dead("prefix", continuing_subword_prefix="##") == {"aab", "##cc"}
    assert dead("no fallback", byte_fallback=False) == {"aab", "##c", "##cc", "<0x0A>"}
    # A text becomes bytes first, and none is written as this letter.
    assert dead("bytes", steps={"pre_tokenizer": {"type": "ByteLevel"}}) == {"aab", "##c", "##cc", "水"}
    assert dead("whole words", ignore_merges=True) is None


def test_a_result_with_the_donors_vocabulary_has_its_files_byte_for_byte(tmp_path):
    folder = write_files(tmp_path / "a", {"a": 0}, [added("<s>", 1)], config={"chat_template": "{{ 'x' }}"})
    (folder / "tokenizer.model").write_bytes(b"kept")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'tools' }}")
    (tmp_path / "out").mkdir()
    written = write_tokenizer(union({"a": folder, "b": folder}), folder, tmp_path / "out", "{{ 'x' }}")
    assert written.files == (
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "additional_chat_templates/tool_use.jinja",
    )  # fmt: skip
    assert all((tmp_path / "out" / n).read_bytes() == (folder / n).read_bytes() for n in written.files)
    assert (dict(written.config), dict(written.generation), written.words) == ({"vocab_size": 2}, {}, ())


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    """A donor, and a model with a plain, a special and an ordinary added token more."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<s>",
              "added_tokens_decoder": {"3": added("<s>")}}  # fmt: skip
    one = write_files(tmp_path / "one", {"a": 0, "b": 1, "ab": 2}, [added("<s>", 3)], merges=["a b"], config=config)
    extra = [added("<s>", 4), added("<|im|>", 5), added(" tool", 6, special=False, normalized=True, lstrip=True)]
    two = {"bos_token": "<s>", "eos_token": "<|im|>"}
    return {"one": one, "two": write_files(tmp_path / "two", {"b": 0, "c": 1, "bc": 2, "a": 3}, extra, config=two)}


def test_a_union_keeps_ids_and_appends_plain_and_added_tokens(pair, tmp_path):
    (pair["one"] / "added_tokens.json").write_text('{"<s>": 3}')
    plan = union(pair)
    out = tmp_path / "out"
    out.mkdir()
    written = write_tokenizer(plan, pair["one"], out)
    assert dict(plan.tokens) == {"a": 0, "b": 1, "ab": 2, "<s>": 3, "c": 4, "bc": 5, "<|im|>": 6, " tool": 7}
    assert ids_of(out) == dict(plan.tokens)
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.get_vocab() == dict(plan.tokens)
    assert loaded("abc<|im|>bc tool", add_special_tokens=False).input_ids == [2, 4, 6, 1, 4, 7]
    assert loaded.decode([6, 7, 5], skip_special_tokens=True) == " tool bc"  # special stays special, the other not
    decoder = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert sorted(decoder) == ["3", "6", "7"]
    assert decoder["7"] == {"content": " tool", **FLAGS, "special": False, "normalized": True, "lstrip": True}
    assert json.loads((out / "added_tokens.json").read_text()) == {"<s>": 3, "<|im|>": 6, " tool": 7}
    assert dict(written.config) == {"vocab_size": 8}


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"])
def test_classes_that_build_their_tokenizer_anew_agree_on_the_ids(pair, tmp_path, kind):
    config = json.loads((pair["one"] / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": kind, "unk_token": "<s>", "pad_token": "<s>"}
    (pair["one"] / "tokenizer_config.json").write_text(json.dumps(config))
    plan = union(pair)
    (tmp_path / "out").mkdir()
    write_tokenizer(plan, pair["one"], tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == kind
    assert {t: i for t, i in loaded.get_vocab().items() if t in plan.tokens} == dict(plan.tokens)
    assert loaded("ab<|im|>", add_special_tokens=False).input_ids[-1] == 6


def test_added_tokens_that_a_file_numbers_wrongly_keep_their_real_ids_in_a_union(tmp_path):
    one = write_files(tmp_path / "one", {"a": 0}, [added("<s>", 30)])
    plan = union({"one": one, "two": write_files(tmp_path / "two", {"z": 0}, [added("<t>", 1)])})
    (tmp_path / "out").mkdir()
    write_tokenizer(plan, one, tmp_path / "out")
    assert dict(plan.tokens) == {"a": 0, "<s>": 1, "z": 2, "<t>": 3} == ids_of(tmp_path / "out")


def test_a_unigram_union_appends_pieces_with_their_scores(tmp_path):
    one = write_files(tmp_path / "one", [["<unk>", 0.0], ["a", -2.0], ["b", -3.0]], [added("<s>", 3)], "Unigram")
    pieces = [["<unk>", 0.0], ["b", -1.0], ["ab", -2.5], ["ba", -40.0]]
    two = write_files(tmp_path / "two", pieces, [added("<t>", 4)], "Unigram")
    three = write_files(tmp_path / "three", [["<unk>", 0.0], ["ab", -1.0]], kind="Unigram")
    plan = union({"one": one, "two": two, "three": three})
    (tmp_path / "out").mkdir()
    write_tokenizer(plan, one, tmp_path / "out")
    vocab = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    # <s> and <t> only hold a place; "ba" may not become less likely than the least likely piece was.
    assert vocab[3:] == [["<s>", -3.0], ["ab", -2.5], ["ba", -3.0], ["<t>", -3.0]]
    assert ids_of(tmp_path / "out") == dict(plan.tokens)
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("ab<t>").tokens == ["ab", "<t>"]


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece"])
def test_word_tokenizers_can_be_united(tmp_path, kind):
    one = write_files(tmp_path / "one", {"<unk>": 0, "a": 1}, kind=kind)
    plan = union({"one": one, "two": write_files(tmp_path / "two", {"<unk>": 0, "bb": 1}, kind=kind)})
    (tmp_path / "out").mkdir()
    write_tokenizer(plan, one, tmp_path / "out")
    assert ids_of(tmp_path / "out") == {"<unk>": 0, "a": 1, "bb": 2}
    assert any("can produce the 1 tokens that the union adds ('bb')" in line for line in plan.words)


def test_a_union_of_folders_with_vocab_json_alone_loads_in_transformers(pair, tmp_path):
    one, out = tmp_path / "gpt", tmp_path / "out"
    one.mkdir()
    out.mkdir()
    (one / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}')
    (one / "merges.txt").write_text("#version: 0.2\na b\n")
    (one / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    plan = union({"one": one, "two": pair["two"]})
    write_tokenizer(plan, one, out)
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.get_vocab() == dict(plan.tokens)
    assert loaded("ab<|im|>").input_ids == [2, plan.tokens["<|im|>"]]


def test_a_sentencepiece_model_beside_an_extended_tokenizer_is_left_out_and_said(pair, tmp_path):
    (pair["one"] / "tokenizer.model").write_bytes(b"old")
    (tmp_path / "out").mkdir()
    written = write_tokenizer(union(pair), pair["one"], tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert "tokenizer.model" not in written.files
    assert written.words[0].startswith("tokenizer.model: left out")


def test_another_models_tokenizer_brings_its_special_ids(pair, tmp_path):
    plan = combine({n: read(f) for n, f in pair.items()}, "one", "two")
    (pair["two"] / "generation_config.json").write_text('{"eos_token_id": [5, 4], "pad_token_id": 0}')
    (tmp_path / "out").mkdir()
    written = write_tokenizer(plan, pair["two"], tmp_path / "out")
    assert dict(written.config) == {"vocab_size": 7, "bos_token_id": 4, "eos_token_id": 5, "pad_token_id": None}
    assert dict(written.generation) == {"bos_token_id": 4, "eos_token_id": [5, 4], "pad_token_id": 0}


TOKENS = st.text(st.characters(codec="utf-8", exclude_characters=" \n"), min_size=1, max_size=4)


@st.composite
def tokenizer_files(draw: st.DrawFn) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Entries with ids in any order, some with gaps, and added tokens of which some are entries too."""
    entries = draw(st.lists(TOKENS, min_size=1, max_size=12, unique=True))
    ids = draw(st.permutations(range(len(entries) + draw(st.integers(0, 3)))))
    later = draw(st.lists(st.one_of(TOKENS, st.sampled_from(entries)), max_size=4, unique=True))
    return dict(zip(entries, ids, strict=False)), [added(t, i, special=i % 2 == 0) for i, t in enumerate(later)]


@settings(max_examples=60, deadline=None)
@given(st.lists(tokenizer_files(), min_size=2, max_size=3))
def test_any_union_is_written_with_the_ids_that_were_planned(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("union")
    folders = {f"m{i}": write_files(folder / f"m{i}", *files) for i, files in enumerate(models)}
    for path in folders.values():
        assert dict(read(path).tokens) == ids_of(path)
    plan = union(folders)
    (folder / "out").mkdir()
    write_tokenizer(plan, folders["m0"], folder / "out")
    assert ids_of(folder / "out") == dict(plan.tokens)
    assert {t: plan.tokens[t] for t in read(folders["m0"]).tokens} == dict(read(folders["m0"]).tokens)
    assert set(plan.tokens) == {t for path in folders.values() for t in read(path).tokens}


@pytest.mark.parametrize("name", ["stories260k", "babyllama105", "base6m"])
def test_real_tokenizers_have_the_ids_that_transformers_gives(shared_data, name):
    folder = shared_data / "models" / name
    loaded = AutoTokenizer.from_pretrained(folder)
    found = read(folder)
    assert dict(found.tokens) == loaded.get_vocab()
    assert found.roles["eos_token"] == loaded.eos_token
    assert found.reachable is not None


def test_only_what_real_merges_form_is_reachable(shared_data):
    """Every entry of a trained byte-level tokenizer comes up; each is what its own text becomes."""
    found = read(shared_data / "tokenizers" / "bpe4k")
    assert found.reachable is not None and found.reachable >= found.tokens.keys()


def test_a_union_of_real_tokenizers_loads_and_cuts_texts_as_the_donor_does(shared_data, tmp_path):
    folders = {n: shared_data / "models" / n for n in ("base6m", "stories260k", "babyllama105")}
    plan = union(folders)
    write_tokenizer(plan, folders["base6m"], tmp_path)
    loaded, donor = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(folders["base6m"])
    assert loaded.get_vocab() == dict(plan.tokens)
    text = "Once upon a time, there was a naïve <|user|> with 3 dogs.\n"
    assert loaded(text).input_ids == donor(text).input_ids
    assert loaded.chat_template == donor.chat_template
    assert any("can never produce" in line for line in plan.words)


def test_a_vocab_json_tokenizer_and_its_tokenizer_json_agree(shared_data, tmp_path):
    gpt2 = shared_data / "tokenizers" / "gpt2"
    found = read(gpt2)
    assert (found.kind, found.rows, len(found.tokens)) == ("BPE", 50257, 50257)
    assert found.reachable is not None and found.tokens.keys() - found.reachable == {"<|endoftext|>"}
    loaded = GPT2Tokenizer.from_pretrained(gpt2)
    assert dict(found.tokens) == loaded.get_vocab()
    loaded.save_pretrained(tmp_path)
    assert read(tmp_path).tokens == found.tokens


def render(text: str | None, **values: Any) -> str:
    assert text is not None
    return jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(text).render(**values)


def model_with(folder: Path, *tokens: str, **config: Any) -> Path:
    return write_files(folder, {"a": 0}, [added(t, i + 1) for i, t in enumerate(tokens)], config=config)


def test_the_template_of_the_tokenizer_is_the_default_and_others_are_named(tmp_path):
    folders = {"one": model_with(tmp_path / "one", "<|u|>", chat_template="{{ '<|u|>' }}"),
               "two": model_with(tmp_path / "two", chat_template=[{"name": "default", "template": "{{ 'b' }}"}]),
               "three": model_with(tmp_path / "three")}  # fmt: skip
    plan = union(folders)
    assert choose_template("auto", folders, plan) == (
        "{{ '<|u|>' }}", ["chat template: the result has one's; different ones: two"],
    )  # fmt: skip
    assert choose_template("two", folders, plan)[0] == "{{ 'b' }}"
    assert choose_template("auto", {"three": folders["three"]}, union({"three": folders["three"]})) == (None, [])
    with pytest.raises(ConfigError, match="three has none"):
        choose_template("three", folders, plan)


def test_a_file_of_its_own_wins_over_the_template_in_the_config(tmp_path):
    folder = model_with(tmp_path, chat_template="old")
    (tmp_path / "chat_template.jinja").write_bytes(b"new\n")
    assert read_template(folder) == "new\n" == AutoTokenizer.from_pretrained(folder).chat_template
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="UTF-8"):
        read_template(folder)


def test_a_template_is_refused_if_the_result_lacks_its_special_tokens(tmp_path):
    two = model_with(tmp_path / "two", "<|im_start|>", "[INST]", chat_template="{{ '[INST]<|x|>' }}")
    folders = {"one": model_with(tmp_path / "one", "<|im_end|>"), "two": two}
    base = combine({n: read(f) for n, f in folders.items()}, "one")
    both = union(folders)
    with pytest.raises(TemplateError, match=r"'<\|im_start\|>'.*tokenizer.source to union"):
        choose_template("chatml", folders, base)
    assert choose_template("chatml", folders, both)[0]
    with pytest.raises(TemplateError, match=r"'\[INST\]'"):
        choose_template("two", folders, base)
    with pytest.raises(TemplateError, match=r"'<｜User｜>'"):
        choose_template("{{ '<｜User｜>' }}", folders, both)
    # What is no token to the template's own model is text, as in Zephyr's <|user|>.
    assert choose_template("two", folders, both)[1] == ["chat template: '<|x|>' is no token of two, just text"]
    # Llama 2 writes [INST] as text, too.
    assert choose_template("{{ '[INST]' }}", {"one": folders["one"]}, union({"one": folders["one"]}))[1] == []


@pytest.mark.parametrize(
    ("spec", "said"), [("mistral", "give the template's text"), ("exaone", "give"), ("x", "one of")]
)
def test_names_without_a_template_are_refused_with_the_next_step(tmp_path, spec, said):
    folders = {"one": model_with(tmp_path)}
    with pytest.raises(ConfigError, match=said):
        choose_template(spec, folders, union(folders))


def test_built_in_templates_write_the_published_formats(tmp_path):
    marks = (
        "<|im_start|>",
        "<|im_end|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    )
    folders = {"one": model_with(tmp_path, *marks, eos_token="<|im_end|>")}
    plan = union(folders)
    text, words = choose_template("chatml", folders, plan)
    assert words == []
    assert render(text, messages=TURNS) == "<|im_start|>user\n hi <|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert render(text, messages=[], add_generation_prompt=True) == "<|im_start|>assistant\n"
    text, words = choose_template("llama3", folders, plan)
    assert render(text, messages=TURNS) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"
    )
    assert "ends a turn with '<|eot_id|>' (id 6), while eos_token is '<|im_end|>'" in words[0]
    text, words = choose_template("alpaca", folders, plan)
    below = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    assert render(text, messages=[USER], add_generation_prompt=True, bos_token="<s>") == (
        f"<s>{below}### Instruction:\n hi \n\n### Response:\n"
    )
    assert render(text, messages=[{"role": "system", "content": "Be."}, *TURNS], eos_token="</s>") == (
        "Be.\n\n### Instruction:\n hi \n\n### Response:\nyes</s>\n\n"
    )


def test_a_template_is_written_where_transformers_finds_it_and_nowhere_else(tmp_path):
    folder = tmp_path / "lab"
    folder.mkdir()
    write_lab_tokenizer(folder)
    (tmp_path / "out").mkdir()
    written = write_tokenizer(union({"lab": folder}), folder, tmp_path / "out", "{{ '<|user|>' }}\n")
    assert "chat_template.jinja" in written.files
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.apply_chat_template(TURNS, tokenize=False) == "<|user|>"
