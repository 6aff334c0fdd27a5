r"""Rendering: rows to token ids with a mask of what is scored or trained.

Conversations use the tokenizer's own chat template, rendered by transformers in jinja2's
immutable sandbox under a time and size limit. Only assistant text and the turn end that
follows it are scored. Where the tokenizer has no template, the plain template applies::

    <bos>system\nuser\n<assistant text><eos>

with further turns in the same way. Plain text is <bos> + text; its <eos> is trained but
never scored in evaluation.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from types import FrameType
from typing import Any

from jinja2.exceptions import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from honeloom.errors import TemplateError
from honeloom.system import address_space_limit
from honeloom.types.rows import Row, Turn

__all__ = ["Encoded", "Encoder", "UnrenderableRow", "bounded_rendering"]

RENDER_SECONDS = 5.0
RENDER_BYTES = 1 << 30
PROBE = (Turn("user", "What is two plus two?"), Turn("assistant", "It is four."))


class UnrenderableRow(Exception):
    """A row that the template cannot render; the text says why."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as token ids.

    Attributes
    ----------
    ids : tuple of int
        Token ids, at most `max_length`.
    scored : tuple of bool
        Per token: whether it is a target of the loss. The first token never is.
    chars : int
        Characters of the scored text that fit, special tokens not counted.
    truncated : bool
        Whether tokens were cut at the end.
    ends : bool
        Whether the end of the last assistant turn, or the text's <eos>, is kept and scored.
    prompt : int
        Tokens at the beginning by which a router may decide; 0 where nothing is routed.
    """

    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    chars: int
    truncated: bool
    ends: bool
    prompt: int = 0

    @property
    def targets(self) -> int:
        """Number of scored tokens."""
        return sum(self.scored)


class Encoder:
    """Turns rows into token ids for one tokenizer.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Must be a fast tokenizer if it has a chat template without generation marks.
    max_length : int
        Tokens per row; the rest is cut at the end.
    train : bool
        Whether plain text ends with a trained <eos>.

    Raises
    ------
    TemplateError
        The chat template fails, takes too long, prints too much, or never makes the end of
        an assistant turn a label, so that a tuned model would not know how to stop. Where
        `train` needs an <eos> and the tokenizer has none, `encode` raises it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, train: bool = False) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.train = train
        self.template: str | None = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
        if isinstance(tokenizer.chat_template, dict):
            self.template = tokenizer.chat_template.get("default")
        self._marked = self.template is not None and "{% generation" in self.template.replace("{%-", "{%")
        if self.template is not None:
            self._probe()

    def encode(self, row: Row, *, empty_prompt: bool = False) -> Encoded:
        """Encode a chat or text row.

        Parameters
        ----------
        row : Row
            Of kind chat or text.
        empty_prompt : bool
            Replace every user and system text by nothing: what the response costs without
            its prompt, in the same format.

        Raises
        ------
        UnrenderableRow
            The template refuses this row.
        """
        if row.kind == "text":
            return self._text(row.text)
        turns = row.turns
        if empty_prompt:
            turns = tuple(Turn(t.role, t.content if t.role == "assistant" else "") for t in turns)
        return self._plain(turns) if self.template is None else self._chat(turns)

    def encode_choices(self, row: Row) -> list[Encoded]:
        r"""Encode a multiple-choice row: one per choice, the choice's tokens scored.

        The prompt is "Question: ...\nAnswer:" as in lm-evaluation-harness, without template.
        """
        prompt = self._ids(f"Question: {row.prompt}\nAnswer:")
        encoded = []
        for choice in row.choices:
            answer = self._ids(f" {choice}")
            head = (self._bos() + prompt)[-(self.max_length - len(answer)) :]
            ids = (head + answer)[-self.max_length :]
            scored = [False] * (len(ids) - len(answer)) + [True] * len(answer)
            cut = len(head) < len(prompt)
            encoded.append(Encoded(tuple(ids), tuple(scored[-len(ids) :]), len(choice), cut, ends=False))
        return encoded

    def prompt_ids(self, row: Row, *, empty_prompt: bool = False) -> list[int]:
        """Token ids of what stands before the first answer, as if none followed: what a router reads.

        A plain text has no prompt, and neither has a conversation that the assistant begins.

        Raises
        ------
        UnrenderableRow
            The template refuses this row.
        """
        if row.kind == "choice":
            return self._bos() + self._ids(f"Question: {row.prompt}\nAnswer:")
        turns = list(takewhile(lambda t: t.role != "assistant", row.turns))
        if not turns:
            return []
        messages = [{"role": t.role, "content": "" if empty_prompt else t.content} for t in turns]
        if self.template is None:
            texts = [f"{m['content']}\n" for m in messages if m["content"]]
            return self._bos() + [i for text in texts for i in self._ids(text)]
        return self._ids(str(self._apply(messages, tokenize=False, add_generation_prompt=True)))

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text, special tokens not counted."""
        return len(self._ids(text))

    def _text(self, text: str) -> Encoded:
        batch = self.tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=self.tokenizer.is_fast
        )
        bos, tokens = self._bos(), list(batch["input_ids"])
        eos = self._eos() if self.train else []
        ids = bos + tokens + eos
        scored = [False] + [True] * (len(ids) - 1)
        kept = max(0, min(len(ids), self.max_length) - len(bos))
        chars = len(text)
        if kept < len(tokens):
            chars = batch["offset_mapping"][kept - 1][1] if self.tokenizer.is_fast and kept else 0
        return self._cut(ids, scored, chars, len(text), end=len(ids) - 1 if eos else None)

    def _plain(self, turns: Sequence[Turn]) -> Encoded:
        ids, scored, chars, end = self._bos(), [False] * len(self._bos()), [], None
        eos = self._eos()
        for turn in turns:
            if turn.role == "assistant":
                part = self._ids(turn.content) + eos
                end = len(ids) + len(part) - 1 if eos else None
            else:
                part = self._ids(f"{turn.content}\n") if turn.content else []
            ids += part
            scored += [turn.role == "assistant"] * len(part)
            chars.append(len(turn.content) if turn.role == "assistant" else 0)
        return self._cut(ids, scored, sum(chars), sum(chars), end)

    def _chat(self, turns: Sequence[Turn]) -> Encoded:
        ids, scored = self._render(turns)
        total = sum(len(t.content) for t in turns if t.role == "assistant")
        last = max((i for i, s in enumerate(scored) if s), default=None)  # a turn end, as the probe has shown
        return self._cut(ids, scored, total, total, last)

    def _render(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        messages = [{"role": t.role, "content": t.content} for t in turns]
        return self._render_marked(messages) if self._marked else self._render_spans(messages)

    def _render_marked(self, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        rendered = self._apply(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},  # a long row is cut afterwards, and is no reason to warn
        )  # fmt: skip
        return list(rendered["input_ids"]), [bool(m) for m in rendered["assistant_masks"]]

    def _render_spans(self, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        text = str(self._apply(messages, tokenize=False))
        spans = [self._span(messages, i, text) for i, m in enumerate(messages) if m["role"] == "assistant"]
        batch = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        scored = [any(a < e and s < b for s, e in spans) for a, b in batch["offset_mapping"]]
        return list(batch["input_ids"]), scored

    def _span(self, messages: list[dict[str, str]], index: int, text: str) -> tuple[int, int]:
        """Characters of one assistant turn, its turn end included, trailing white space not."""
        start = str(self._apply(messages[:index], tokenize=False, add_generation_prompt=True))
        end = str(self._apply(messages[: index + 1], tokenize=False))
        if not (text.startswith(end) and end.startswith(start)):
            raise UnrenderableRow(
                "the chat template renders earlier turns differently once later ones follow, so what the assistant "
                "said cannot be told apart; use a template with {% generation %} marks"
            )
        return len(start), len(end.rstrip())

    def _apply(self, messages: list[dict[str, str]], **options: Any) -> Any:
        try:
            with _limits(RENDER_SECONDS, RENDER_BYTES):
                result = self.tokenizer.apply_chat_template(messages, chat_template=self.template, **options)
        except (JinjaError, TypeError, ValueError, OverflowError) as error:
            raise UnrenderableRow(f"the chat template fails: {error}") from None
        except MemoryError:
            raise TemplateError(f"the chat template wants more than {RENDER_BYTES:,} bytes of memory") from None
        size = sum(len(m["content"]) for m in messages)
        if isinstance(result, str) and len(result) > 20 * size + 100_000:
            raise TemplateError(f"the chat template printed {len(result):,} characters for {size:,} of text")
        return result

    def _probe(self) -> None:
        """Render a known conversation and require that the turn end is a label."""
        try:
            ids, scored = self._render(PROBE)
        except UnrenderableRow as error:
            raise TemplateError(f"{error}; mend or remove the tokenizer's chat_template") from None
        trained = str(self.tokenizer.decode([i for i, s in zip(ids, scored, strict=True) if s]))
        content = str(self.tokenizer.decode(self._ids(PROBE[1].content))).strip()
        if content not in trained:
            raise TemplateError(f"the chat template's mask covers {trained!r} and misses the answer {content!r}")
        if not trained.split(content)[-1].strip():
            raise TemplateError(
                "the chat template ends an assistant turn with nothing that is trained, so a tuned model would never "
                "stop; put the end token inside the {% generation %} block, or after the assistant's text"
            )

    def _cut(self, ids: list[int], scored: list[bool], chars: int, total: int, end: int | None) -> Encoded:
        """Cut at the end; `end` is the place of the last turn end among all tokens."""
        if scored:
            scored[0] = False  # nothing predicts the first token
        truncated = len(ids) > self.max_length
        kept = scored[: self.max_length]
        if truncated and chars == total and any(scored):  # a share is exact enough where offsets are not at hand
            chars = round(total * sum(kept) / sum(scored))
        ends = end is not None and end < len(kept) and kept[end]
        return Encoded(tuple(ids[: self.max_length]), tuple(kept), chars, truncated, ends)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _bos(self) -> list[int]:
        token = self.tokenizer.bos_token_id
        return [] if token is None else [int(token)]

    def _eos(self) -> list[int]:
        token = self.tokenizer.eos_token_id
        if token is None and self.train:
            raise TemplateError(
                "the tokenizer has no EOS token to end a row with, so a tuned model would never stop; "
                "set eos_token in tokenizer_config.json, or give it a chat template for conversations"
            )
        return [] if token is None else [int(token)]


def bounded_rendering() -> AbstractContextManager[None]:
    """Bounds of time and memory for one rendering of a template elsewhere; TemplateError where it takes longer."""
    return _limits(RENDER_SECONDS, RENDER_BYTES)


@contextmanager
def _limits(seconds: float, extra_bytes: int) -> Iterator[None]:
    """Bound the time and memory of one rendering: a template is a program that a stranger wrote.

    Only the main thread has the needed timer, and only Linux tells its address space; elsewhere
    the sandbox's own limits hold.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        raise TemplateError(f"the chat template took longer than {seconds:g} s for one conversation")

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    with address_space_limit(extra_bytes):
        previous = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
