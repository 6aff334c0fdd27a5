"""The tokenizer and chat template of a GGUF file, used by the rules that llama.cpp goes by."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from honeloom.backends.gguf import GgufFile
from honeloom.checkpoint.gguf.tokenizer import BYTE, CONTROL, CUTS, NORMAL, USER_DEFINED
from honeloom.errors import CheckpointError, TemplateError

__all__ = ["GgufVocabulary", "render_chat"]

_SPACE = "▁"


class GgufVocabulary:
    """Cuts text as llama.cpp does with the vocabulary of a file; it reads no other file.

    Parameters
    ----------
    file : GgufFile
        The file.

    Raises
    ------
    CheckpointError
        The file has no vocabulary, or one of a kind that is not written here.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.kind = str(file.need("tokenizer.ggml.model"))
        if self.kind not in ("llama", "gpt2"):
            raise CheckpointError(f"{file.path}: its vocabulary is {self.kind!r}; read here are llama and gpt2")
        self.tokens: list[str] = list(file.need("tokenizer.ggml.tokens"))
        types = list(file.need("tokenizer.ggml.token_type"))
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        self._bytes = {int(t[3:5], 16): i for i, t in enumerate(self.tokens) if types[i] == BYTE}
        self._apart = {t: i for i, t in enumerate(self.tokens) if types[i] == USER_DEFINED}
        self._special = self._apart | {t: i for i, t in enumerate(self.tokens) if types[i] == CONTROL}
        self._words = {t for i, t in enumerate(self.tokens) if types[i] in (NORMAL, USER_DEFINED, BYTE)}
        self._bpe = self._pairs() if self.kind == "gpt2" else None
        self._scores: Sequence[float] = file.get("tokenizer.ggml.scores") or ()

    def encode(self, text: str, *, around: bool = True, special: bool = False) -> list[int]:
        """Token ids of a text.

        Parameters
        ----------
        text : str
            Any text.
        around : bool
            Whether the tokens that go before and after a text are added.
        special : bool
            Whether special tokens are found in the text.
        """
        known = self._special if special else self._apart
        ids: list[int] = []
        begins = True
        for piece in _split(text, known):
            if piece in known:
                ids.append(known[piece])
            elif piece:
                ids += self._merged(piece, begins) if self._bpe is None else self._bpe.encode(piece).ids
            begins = piece in known
        if not around:
            return ids
        return [*self._edge("bos"), *ids, *self._edge("eos")]

    def _edge(self, name: str) -> list[int]:
        wanted = self._file.get(f"tokenizer.ggml.add_{name}_token")
        return [int(self._file.need(f"tokenizer.ggml.{name}_token_id"))] if wanted else []

    def _pairs(self) -> Tokenizer:
        """Byte pairs, joined in the order of the merges, within the words that the named pattern cuts."""
        name = str(self._file.need("tokenizer.ggml.pre"))
        found = {label: (cut, whole) for (cut, whole), label in CUTS.items()}
        if name not in found:
            raise CheckpointError(f"{self._file.path}: it cuts text as {name!r}; known are {', '.join(found)}")
        cut, whole = found[name]
        merges = [tuple(m.split(" ")) for m in self._file.need("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab=self._ids, merges=merges, ignore_merges=whole))
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in ("bytes", "digits"))
        first = {"bytes": [], "digits": [pre_tokenizers.Digits(individual_digits=True)]}.get(
            cut, [pre_tokenizers.Split(Regex(cut), "isolated")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, as_bytes])
        return tokenizer

    def _merged(self, text: str, begins: bool) -> list[int]:
        """As sentencepiece does: neighbours join where that makes a token, best score first, the left one of ties."""
        prefix = " " if begins and self._file.get("tokenizer.ggml.add_space_prefix") else ""
        parts = list((prefix + text).replace(" ", _SPACE))
        while True:
            pairs = [a + b for a, b in pairwise(parts)]
            joined = [(-self._scores[self._ids[pair]], i) for i, pair in enumerate(pairs) if pair in self._ids]
            if not joined:
                break
            _, at = min(joined)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [i for part in parts for i in self._spelled(part)]

    def _spelled(self, part: str) -> list[int]:
        """A token, or the tokens of its bytes."""
        return [self._ids[part]] if part in self._words else [self._bytes[b] for b in part.encode()]


def _split(text: str, known: Mapping[str, int]) -> list[str]:
    """The text around the tokens that are found before it is cut, the longest first."""
    if not known:
        return [text]
    found = "|".join(re.escape(token) for token in sorted(known, key=lambda t: (-len(t), t)))
    return [piece for piece in re.split(f"({found})", text) if piece]


class _Generation(Extension):
    """The tag around answers, which transformers needs for masks and servers pass over."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Any:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_chat(file: GgufFile, messages: Sequence[Mapping[str, str]]) -> str | None:
    """A conversation by the template of a file, up to where the answer begins; None without a template.

    The special tokens come from the file's vocabulary, as in a server that has nothing else.

    Raises
    ------
    TemplateError
        The template cannot be rendered.
    """
    template = file.get("tokenizer.chat_template")
    if template is None:
        return None
    tokens = file.get("tokenizer.ggml.tokens") or ()

    def refuse(message: str) -> Any:
        raise TemplateError(f"{file.path}: its chat template refuses a conversation: {message}")

    names = {name: file.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    words = {f"{name}_token": tokens[i] if i is not None else "" for name, i in names.items()}
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, raise_exception=refuse,
            strftime_now=lambda form: datetime.now().strftime(form), **words,
        )  # fmt: skip
    except JinjaError as error:
        raise TemplateError(f"{file.path}: its chat template cannot be rendered: {error}") from None
