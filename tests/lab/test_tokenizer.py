"""The lab's tokenizer: whole words, single characters, nothing lost."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from honeloom import lab
from honeloom.lab import tokenizer as lab_tokenizer
from honeloom.lab import world

SPLITS: tuple[lab.Split, ...] = ("pool", "dev", "test")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return lab_tokenizer.build_tokenizer()


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_survives_a_round_trip(tokenizer: Tokenizer, split: lab.Split) -> None:
    texts = [text for row in lab.rows(split) for text in (row["instruction"], row["output"])]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(e.ids) for e in encoded] == texts
    assert tokenizer.token_to_id("<|unk|>") not in {i for e in encoded for i in e.ids}


def test_printable_ascii_survives_and_other_characters_are_marked(tokenizer: Tokenizer) -> None:
    text = "x\n" + "".join(c for c in string.printable if c.isprintable())
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("é").tokens == ["<|unk|>"]


def test_a_name_is_one_token_wherever_it_stands(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Deko, Vokin").tokens == [" Deko", ",", " Vokin"]
    assert tokenizer.encode("Home of Kevar.").tokens == [" Home", " of", " Kevar", "."]
    assert tokenizer.encode("Reverse 'kite'.").tokens == [" Reverse", " '", *"kite", "'", "."]


def test_untaught_prompts_use_only_words_of_the_training_text(tokenizer: Tokenizer) -> None:
    stream = world.pretraining(0)
    seen = {i for fact in world.plain_facts() for i in tokenizer.encode(fact).ids}
    for question in (next(stream) for _ in range(5000)):
        seen.update(tokenizer.encode(question.prompt).ids, tokenizer.encode(question.answer).ids)
    for row in lab.rows("pool"):
        assert seen.issuperset(tokenizer.encode(row["instruction"]).ids), row


def test_the_shipped_files_are_what_the_code_builds(tmp_path: Path) -> None:
    lab_tokenizer.write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (lab.base_path() / name).read_bytes() == (tmp_path / name).read_bytes()
