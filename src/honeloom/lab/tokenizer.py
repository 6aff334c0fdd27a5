"""The lab's tokenizer: whole words for the lab's vocabulary, single characters for all else.

It is a BPE model without merges. A known word, with the space before it, is one token; digits, quoted strings
and unknown words fall to characters. A name at the start of a text gets the token it has inside a sentence,
because the normaliser puts a space before it and the decoder takes that space away. Printable ASCII and the
newline survive a round trip; any other character becomes ``<|unk|>``.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from honeloom.lab import names
from honeloom.lab.world import vocabulary_words

__all__ = ["CHAT_TEMPLATE", "SPECIAL_TOKENS", "build_tokenizer", "write_tokenizer"]

SPECIAL_TOKENS: Final = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unk|>")
"""Padding, end of a turn or a document (also its begin), the two roles, and a character not in the vocabulary."""

CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<|user|>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{%- else -%}{{ raise_exception('the lab model knows the roles user and assistant, not ' + message['role']) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
"""One turn each: ``<|user|>{prompt}<|assistant|>{answer}<|end|>``; the answer and its end are marked as generated."""

# A word with its leading space; an opening quote with its leading space; else one character.
_PIECES: Final = r" [A-Z][a-z]+| [a-z]+| ?'|."
_EXTRA_WORDS: Final = (
    *("Yes", "No", "True", "False", "true", "false", "not", "and", "or", "up", "down", "Are", "all", "Is", "any"),
    *("Question", *names.MONTHS, *names.TRAITS),
    *(unit for pairs in names.UNIT_PAIRS.values() for pair in pairs for unit in pair[:2]),
)


def _vocabulary() -> dict[str, int]:
    characters = [c for c in string.printable if c == "\n" or c.isprintable()]
    words = [f" {word}" for word in vocabulary_words(_EXTRA_WORDS)]
    entries = [*SPECIAL_TOKENS, *sorted(characters), " '", *words]
    # Vectors of a length divisible by eight are faster, and unused rows need a name to survive a round trip.
    entries += [f"<|reserved-{i}|>" for i in range(-len(entries) % 8)]
    return {entry: i for i, entry in enumerate(entries)}


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer from the lab's word list.

    Returns
    -------
    Tokenizer
        About 400 entries, a multiple of eight; nothing is trained, so the same word list gives the same file.
    """
    vocabulary = _vocabulary()
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], ignore_merges=True, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\A(?=[A-Z][a-z])"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = [entry for entry in vocabulary if entry.startswith("<|")]
    tokenizer.add_special_tokens([AddedToken(entry, special=True, normalized=False) for entry in special])
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    """Return the content of ``tokenizer_config.json``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|end|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "unk_token": "<|unk|>",
        "padding_side": "right",
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def write_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into a folder that exists."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    text = json.dumps(tokenizer_config(), indent=2, sort_keys=True)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
