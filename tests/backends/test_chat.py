"""Rendering and masks: what is trained, what is masked, and templates that must be refused."""

import resource

import pytest
from transformers import AutoTokenizer

from honeloom import lab
from honeloom.backends.hf.chat import Encoder, UnrenderableRow
from honeloom.errors import TemplateError
from honeloom.testing.fakes import chat_row
from honeloom.types.rows import Row, Turn, Where

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(lab.base_path())


def trained(encoder, row):
    encoded = encoder.encode(row)
    return encoder.tokenizer.decode([i for i, s in zip(encoded.ids, encoded.scored, strict=True) if s])


ROW = chat_row("r", "Add 2 and 3.", "5")
MULTI = Row(
    "m", "chat", Where("f", 1), "s",
    turns=(Turn("user", "Add 2 and 3."), Turn("assistant", "5"), Turn("user", "Add 1 and 1."), Turn("assistant", "2")),
)  # fmt: skip


def test_marked_template_trains_answer_and_turn_end(tokenizer):
    encoder = Encoder(tokenizer, 128)
    assert trained(encoder, ROW).strip() == "5<|end|>"
    assert encoder.encode(ROW).chars == 1
    assert trained(encoder, MULTI).replace(" ", "") == "5<|end|>2<|end|>"


def test_unmarked_template_is_masked_by_prefixes(tokenizer):
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    encoder = Encoder(tokenizer, 512)
    assert trained(encoder, ROW).replace(" ", "") == "5<|im_end|>"
    assert trained(encoder, MULTI).replace(" ", "") == "5<|im_end|>2<|im_end|>"


def test_system_text_is_never_trained(tokenizer):
    tokenizer.chat_template = CHATML
    row = Row("s", "chat", Where("f", 1), "s", turns=(Turn("system", "Be brief."), *ROW.turns))
    assert "brief" not in trained(Encoder(tokenizer, 512), row)


def test_template_that_never_trains_the_turn_end_is_refused(tokenizer):
    tokenizer.chat_template = NO_END
    with pytest.raises(TemplateError, match="never stop"):
        Encoder(tokenizer, 512)


def test_template_that_rewrites_history_rejects_the_row_only(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {% if loop.last or m['role'] == 'user' %}{{ m['content'] }}"
        "{% else %}...{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    encoder = Encoder(tokenizer, 512)
    assert trained(encoder, ROW).replace(" ", "") == "5<|end|>"
    with pytest.raises(UnrenderableRow, match="renders earlier turns differently"):
        encoder.encode(MULTI)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% set n = namespace(s='x' * 1000) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
    ids=["mro", "range", "doubling", "mutation", "globals"],
)
def test_hostile_templates_are_stopped(tokenizer, attack):
    tokenizer.chat_template = attack
    with pytest.raises(TemplateError):
        Encoder(tokenizer, 128)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB: the doubling was stopped early


def test_template_that_loops_long_is_timed_out(tokenizer, monkeypatch):
    monkeypatch.setattr("honeloom.backends.hf.chat.RENDER_SECONDS", 0.5)
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match="longer than"):
        Encoder(tokenizer, 128)


def test_template_that_prints_megabytes_is_refused(tokenizer):
    tokenizer.chat_template = "{% for i in range(90000) %}xxxxxxxxxx{% endfor %}"
    with pytest.raises(TemplateError, match="printed 900,000 characters"):
        Encoder(tokenizer, 128)


def test_plain_template_ends_with_eos(tokenizer):
    tokenizer.chat_template = None
    encoder = Encoder(tokenizer, 128)
    assert trained(encoder, ROW).strip() == f"5{tokenizer.eos_token}"


def test_text_is_scored_after_bos_and_eos_only_trained(tokenizer):
    row = Row("t", "text", Where("f", 1), "s", text="Kevar lives in Belm.")
    scored, training = Encoder(tokenizer, 128).encode(row), Encoder(tokenizer, 128, train=True).encode(row)
    assert scored.scored == (False,) + (True,) * (len(scored.ids) - 1)
    assert scored.chars == len(row.text)
    assert training.ids == (*scored.ids, tokenizer.eos_token_id)


def test_truncation_counts_only_characters_that_fit(tokenizer):
    row = Row("t", "text", Where("f", 1), "s", text="Kevar lives in Belm. " * 20)
    encoded = Encoder(tokenizer, 10).encode(row)
    assert encoded.truncated
    assert len(encoded.ids) == 10
    kept = tokenizer.decode(encoded.ids[1:]) if tokenizer.bos_token_id is not None else tokenizer.decode(encoded.ids)
    assert encoded.chars == pytest.approx(len(kept), abs=1)


def test_empty_prompt_changes_the_prompt_alone(tokenizer):
    encoder = Encoder(tokenizer, 128)
    full, alone = encoder.encode(ROW), encoder.encode(ROW, empty_prompt=True)
    assert full.targets == alone.targets
    assert len(alone.ids) < len(full.ids)
    empty = chat_row("e", "", "5")
    assert encoder.encode(empty) == encoder.encode(empty, empty_prompt=True)


def test_choices_score_only_the_choice(tokenizer):
    row = Row(
        "c", "choice", Where("f", 1), "s", turns=(Turn("user", "Which?"),), choices=("one", "two three"), answer=1
    )
    one, two = Encoder(tokenizer, 128).encode_choices(row)
    assert tokenizer.decode([i for i, s in zip(two.ids, two.scored, strict=True) if s]).strip() == "two three"
    assert (one.chars, two.chars) == (3, 9)


def test_a_tokenizer_without_eos_cannot_teach_a_model_to_stop(tokenizer):
    text = Row("t", "text", Where("f", 1), "s", text="Kevar lives in Belm.")
    tokenizer.eos_token = None
    with pytest.raises(TemplateError, match="no EOS token"):
        Encoder(tokenizer, 128, train=True).encode(text)
    assert Encoder(tokenizer, 128, train=True).encode(ROW).ends  # the chat template brings its own end
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="never stop"):
        Encoder(tokenizer, 128, train=True).encode(ROW)
    scored = Encoder(tokenizer, 128).encode(ROW)  # to evaluate, no end is needed
    assert scored.targets
    assert not scored.ends


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("row", [ROW, MULTI], ids=["one", "several"])
def test_ends_says_whether_the_last_turn_end_is_a_label(tokenizer, template, row):
    if not template:
        tokenizer.chat_template = None
    whole = Encoder(tokenizer, 128, train=True).encode(row)
    assert whole.ends
    last = max(i for i, s in enumerate(whole.scored) if s)
    assert Encoder(tokenizer, last + 1, train=True).encode(row).ends
    assert not Encoder(tokenizer, last, train=True).encode(row).ends


def test_text_ends_only_with_its_eos(tokenizer):
    row = Row("t", "text", Where("f", 1), "s", text="Kevar lives in Belm.")
    whole = Encoder(tokenizer, 128, train=True).encode(row)
    assert whole.ends
    assert not Encoder(tokenizer, 128).encode(row).ends
    assert not Encoder(tokenizer, len(whole.ids) - 1, train=True).encode(row).ends
