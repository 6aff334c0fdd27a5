"""The vocabulary and chat template of a GGUF file, against the tokenizer and against llama.cpp."""

import json

import pytest
from transformers import AutoTokenizer

from honeloom.backends.gguf import GgufFile, write_gguf
from honeloom.backends.gguf_vocabulary import GgufVocabulary, render_chat
from honeloom.backends.llama_cpp import ask_llama_cpp
from honeloom.checkpoint.export_tensor import ExportTensor
from honeloom.checkpoint.gguf.tokenizer import tokenizer_keys
from honeloom.checkpoint.reader import Checkpoint
from honeloom.dropping.export import export_plan
from honeloom.errors import CheckpointError, TemplateError
from honeloom.stages.export_texts import CONVERSATIONS, TEXTS
from honeloom.types.plans import DropPlan

MORE = ("", " ", "\n", "a   b", "aaaaaaaaaaaaaaaa", "the the  the", "0123456789 007", "▁", "<s> </s> <0x41>")


def write(source, file):
    with Checkpoint.open(source) as checkpoint:
        plan = export_plan(checkpoint, DropPlan((), (), (), "none", "gguf"))
        write_gguf(file, checkpoint, plan.keys, plan.tensors)
    return GgufFile(file)


@pytest.mark.parametrize("name", ["base6m", "stories260k"])
def test_texts_are_cut_as_the_tokenizer_does(name, shared_data, tmp_path):
    source = shared_data / "models" / name
    vocabulary, tokenizer = GgufVocabulary(write(source, tmp_path / "x.gguf")), AutoTokenizer.from_pretrained(source)
    for text in (*TEXTS, *MORE[:-2]):
        assert vocabulary.encode(text) == tokenizer(text)["input_ids"], text
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert vocabulary.encode(text, around=False) == bare, text
    text = "</s>Once</s> more"
    assert vocabulary.encode(text, around=False, special=True) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert vocabulary.encode(text, around=False) != vocabulary.encode(text, around=False, special=True)


def test_chats_are_rendered_from_the_file_alone(shared_data, tmp_path):
    source = shared_data / "models" / "base6m"
    file, tokenizer = write(source, tmp_path / "x.gguf"), AutoTokenizer.from_pretrained(source)
    for chat in CONVERSATIONS:
        expected = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
        assert render_chat(file, chat) == expected and chat[-1]["content"].strip() in expected


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", ["base6m", "stories260k"])
def test_llama_cpp_cuts_and_renders_the_same(name, shared_data, tmp_path, llama_cpp):
    """What stands for llama.cpp in the check of every export is what llama.cpp does."""
    file = write(shared_data / "models" / name, tmp_path / "x.gguf")
    vocabulary = GgufVocabulary(file)
    texts = (*TEXTS, *MORE)
    for chat in CONVERSATIONS:
        found = ask_llama_cpp(tmp_path / "x.gguf", texts=texts, chat=chat)
        assert found.tokens == [vocabulary.encode(text) for text in texts]
        assert found.chat == render_chat(file, chat)
    assert (found.chat is None) == (name == "stories260k")


def bare(folder, file, template="", **settings):
    """A file of one tensor with a small byte-level vocabulary and a template."""
    words = {c: i for i, c in enumerate("abcdefgh")} | {"<s>": 8, "</s>": 9, "ab": 10}
    document = {
        "added_tokens": [{"id": 8, "content": "<s>", "special": True}, {"id": 9, "content": "</s>", "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": None, "normalizer": None,
        "model": {"type": "BPE", "vocab": words, "merges": [["a", "b"]]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    keys, _ = tokenizer_keys(folder, 12)
    with_arch = {"general.architecture": "llama", **keys}
    write_gguf(file, None, with_arch, [ExportTensor("output_norm.weight", None, (4,), "F32")])
    return GgufFile(file)


def test_templates_see_the_special_tokens_and_the_tag_of_answers_is_passed_over(tmp_path):
    turn = "{% generation %}{{ m.content | tojson }}{% endgeneration %}"
    template = f"{{{{ bos_token }}}}{{% for m in messages %}}{turn}{{% endfor %}}{{{{ eos_token }}}}"
    file = bare(tmp_path, tmp_path / "x.gguf", template)
    assert render_chat(file, [{"role": "user", "content": "é\n"}]) == '<s>"é\\n"</s>'
    assert GgufVocabulary(file).encode("abba") == [10, 1, 0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system turn') }}", "refuses a conversation: no system turn"),
        ("{% if %}", "cannot be rendered"),
        ("{{ messages.__class__.__mro__ }}", "cannot be rendered"),
    ],
)
def test_a_template_that_fails_is_told(template, message, tmp_path):
    with pytest.raises(TemplateError, match=message):
        render_chat(bare(tmp_path, tmp_path / "x.gguf", template), [{"role": "user", "content": "x"}])


def test_a_file_without_a_vocabulary_is_told(tmp_path):
    keys = {"general.architecture": "llama", "tokenizer.ggml.model": "no_vocab"}
    write_gguf(tmp_path / "x.gguf", None, keys, [ExportTensor("output_norm.weight", None, (4,), "F32")])
    file = GgufFile(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="its vocabulary is 'no_vocab'"):
        GgufVocabulary(file)
    assert render_chat(file, []) is None
