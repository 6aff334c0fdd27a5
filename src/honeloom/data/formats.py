"""Row formats: from a record as somebody wrote it to a `Row`, or the reason why it cannot be one.

The format is found for each row by its own fields, so that files may mix formats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

from honeloom.data.records import Unusable, describe
from honeloom.types.rows import Row, Turn, Where

__all__ = ["content_digest", "normalise", "own_id"]

_canonical = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str).encode

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
          "human": "user", "gpt": "assistant"}  # fmt: skip
_CHAT_KEYS = ("messages", "conversations", "conversation")
# Prompt field -> the fields that may hold its answer, in the order they are looked for.
_PAIRS = {"prompt": ("completion", "response", "answer"), "query": ("response", "answer"),
          "question": ("answer", "response")}  # fmt: skip
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_KNOWN = "messages, conversations, instruction/output, prompt/completion, question/choices, or text"


def normalise(record: dict[str, Any], where: Where, file_stem: str) -> Row:
    """Turn one record into a row.

    Parameters
    ----------
    record : dict
        The record as read; it is not changed.
    where : Where
        Its file and line.
    file_stem : str
        The source of rows that name none.

    Raises
    ------
    Unusable
        With the reason, if the record is of no known format or has nothing to train on.
    """
    fields = _content(record)
    row = Row(
        id=own_id(record) or _digest_id(record),
        where=where,
        source=_label(record, "source") or file_stem,
        domain=_domain(record, fields.pop("evaluation", False)),
        **fields,
    )
    _check_characters(row)
    return row


def own_id(record: dict[str, Any]) -> str | None:
    """Return the record's own `id` as a string, or None where it has none or one of another type."""
    value = record.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value and not _FORBIDDEN.search(value) else None


def content_digest(row: Row) -> bytes:
    """Return 16 bytes that are equal for rows that train or test the same, whatever their ids."""
    turns = [(turn.role, turn.content) for turn in row.turns]
    return blake2b(_canonical([row.kind, turns, row.text, row.choices, row.answer]).encode(), digest_size=16).digest()


def _digest_id(record: dict[str, Any]) -> str:
    return blake2b(_canonical(record).encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _content(record: dict[str, Any]) -> dict[str, Any]:
    """Find the format and return the fields of `Row` that it gives, and whether it is an evaluation row."""
    if record.get("chosen") is not None and record.get("rejected") is not None:
        raise Unusable("a preference row (chosen, rejected) has no single answer; keep one as 'completion'")
    if record.get("choices") is not None and record.get("question") is not None:
        return _choice(record)
    for key in _CHAT_KEYS:
        if record.get(key) is not None:
            return _chat(_with_system(record, _messages(record, key)))
    if record.get("instruction") is not None or record.get("output") is not None:
        return _alpaca(record)
    for key, answers in _PAIRS.items():
        if record.get(key) is not None:
            return _pair(record, key, answers)
    if record.get("text") is not None:
        return _text(record)
    names = ", ".join(repr(name)[:40] for name in list(record)[:6]) or "none"
    raise Unusable(f"no known format (fields: {names}); expected {_KNOWN}")


# ------------------------------------------------------------------ fields


def _string(record: dict[str, Any], key: str, needs: str) -> str:
    if key not in record:
        raise Unusable(f"missing field {key!r} ({needs})")
    value = record[key]
    if not isinstance(value, str):
        raise Unusable(f"field {key!r} is {describe(value)}, expected a string")
    return value


def _optional(record: dict[str, Any], key: str) -> str:
    """Return a field that may be absent, null or blank; all three mean the same."""
    return "" if record.get(key) is None else _string(record, key, "")


def _label(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value.strip() else None


def _domain(record: dict[str, Any], evaluation: bool) -> str | None:
    keys = ("domain", "category", "task") if evaluation else ("domain", "category")
    return next((label for key in keys if (label := _label(record, key))), None)


# ------------------------------------------------------------------ formats


def _chat(turns: list[Turn]) -> dict[str, Any]:
    """Check what training needs: something asked, and an answer in every assistant turn."""
    roles = {turn.role for turn in turns}
    if "assistant" not in roles:
        raise Unusable("no assistant turn", "empty")
    if "user" not in roles:
        raise Unusable("no user turn", "empty")
    for number, turn in enumerate(turns, 1):
        if turn.role in ("user", "assistant") and not turn.content.strip():
            what = "output" if turn.role == "assistant" else "instruction"
            raise Unusable(f"empty {what}" + (f" (turn {number})" if len(turns) > 2 else ""), "empty")
    return {"kind": "chat", "turns": tuple(turns)}


def _with_system(record: dict[str, Any], turns: list[Turn]) -> list[Turn]:
    """Put the row's `system` (or `system_prompt`) text first, unless the turns bring their own."""
    system = _optional(record, "system") or _optional(record, "system_prompt")
    if system.strip() and not (turns and turns[0].role == "system"):
        return [Turn("system", system), *turns]
    return turns


def _messages(record: dict[str, Any], key: str) -> list[Turn]:
    messages = record[key]
    if not isinstance(messages, list):
        raise Unusable(f"field {key!r} is {describe(messages)}, expected a list of messages")
    return [turn for i, message in enumerate(messages) for turn in _turns(message, f"{key}[{i}]")]


def _turns(message: object, name: str) -> Iterator[Turn]:
    """Read one message: {role, content}, {from, value}, or one {human, assistant} exchange."""
    if not isinstance(message, dict):
        raise Unusable(f"field '{name}' is {describe(message)}, expected an object")
    if message.get("tool_calls"):
        raise Unusable(f"field '{name}.tool_calls' is not supported; write the calls into the content")
    if message.get("human") is not None and message.get("assistant") is not None:
        for key in ("human", "assistant"):
            yield Turn(_ROLES[key], _member(message, key, name))
        return
    by_role = message.get("role") is not None or message.get("from") is None
    role_key, text_key = ("role", "content") if by_role else ("from", "value")
    role = _member(message, role_key, name)
    if role not in _ROLES:
        raise Unusable(f"unknown role {role[:40]!r} (allowed: {', '.join(_ROLES)})")
    yield Turn(_ROLES[role], _member(message, text_key, name))


def _member(message: dict[str, Any], key: str, name: str) -> str:
    if key not in message:
        raise Unusable(f"missing field '{name}.{key}' (messages need role and content, or from and value)")
    value = message[key]
    if not isinstance(value, str):
        raise Unusable(f"field '{name}.{key}' is {describe(value)}, expected a string")
    return value


def _alpaca(record: dict[str, Any]) -> dict[str, Any]:
    """Read instruction, input and output; Dolly's `context` and `response` are the same two fields."""
    needs = "alpaca rows need instruction and output"
    dolly = record.get("output") is None and record.get("response") is not None
    instruction = _string(record, "instruction", needs)
    output = _string(record, "response" if dolly else "output", needs)
    given = _optional(record, "context" if dolly else "input")
    if not instruction.strip():
        raise Unusable("empty instruction", "empty")
    return _exchange(record, f"{instruction}\n{given}" if given.strip() else instruction, output)


def _pair(record: dict[str, Any], key: str, answers: tuple[str, ...]) -> dict[str, Any]:
    present = [name for name in answers if record.get(name) is not None]
    answer_key = present[0] if present else next((name for name in answers if name in record), answers[0])
    needs = f"{key} rows need {key} and {' or '.join(answers)}"
    prompt, answer = _string(record, key, needs), _string(record, answer_key, needs)
    if not prompt.strip():
        raise Unusable("empty instruction", "empty")
    fields = _exchange(record, _with_context(record, prompt) if key == "question" else prompt, answer)
    return {**fields, "evaluation": answer_key == "answer"}


def _exchange(record: dict[str, Any], prompt: str, answer: str) -> dict[str, Any]:
    if not answer.strip():
        raise Unusable("empty output", "empty")
    turns = [*_history(record), Turn("user", prompt), Turn("assistant", answer)]
    return _chat(_with_system(record, turns))


def _history(record: dict[str, Any]) -> Iterator[Turn]:
    history = record.get("history")
    if history is None:
        return
    if not isinstance(history, list):
        raise Unusable(f"field 'history' is {describe(history)}, expected a list of pairs")
    for i, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise Unusable(f"field 'history[{i}]' is {describe(pair)}, expected a pair of strings")
        yield Turn("user", pair[0])
        yield Turn("assistant", pair[1])


def _text(record: dict[str, Any]) -> dict[str, Any]:
    text = _string(record, "text", "plain text rows need text")
    if not text.strip():
        raise Unusable("empty text", "empty")
    return {"kind": "text", "text": text}


def _choice(record: dict[str, Any]) -> dict[str, Any]:
    needs = "multiple-choice rows need question, choices and answer"
    question = _string(record, "question", needs)
    if not question.strip():
        raise Unusable("empty instruction", "empty")
    texts, answer = _choices_and_answer(record, needs)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise Unusable(f"field 'choices[{i}]' is {describe(text)}, expected a string")
        if not text.strip():
            raise Unusable(f"empty choice (choices[{i}])", "empty")
    if not 0 <= answer < len(texts):
        raise Unusable(f"answer {answer} is outside the {len(texts)} choices")
    turns = (Turn("user", _with_context(record, question)),)
    return {"kind": "choice", "turns": turns, "choices": tuple(texts), "answer": answer, "evaluation": True}


def _with_context(record: dict[str, Any], question: str) -> str:
    context = _optional(record, "context")
    return f"{context}\n{question}" if context.strip() else question


def _choices_and_answer(record: dict[str, Any], needs: str) -> tuple[list[Any], int]:
    """Read a list of choices with an index, or ARC's {text, label} with an answerKey."""
    choices = record["choices"]
    labelled = isinstance(choices, dict)
    texts = choices.get("text") if isinstance(choices, dict) else choices
    if not isinstance(texts, list):
        raise Unusable(f"field 'choices' is {describe(choices)}, expected a list of strings")
    if labelled:
        key, labels = _string(record, "answerKey", needs), choices.get("label")
        if not isinstance(labels, list) or len(labels) != len(texts):
            raise Unusable("field 'choices.label' does not name each of the choices")
        if key not in labels:
            raise Unusable(f"answerKey {key[:40]!r} is not among the labels {', '.join(map(str, labels))}")
        return texts, labels.index(key)
    if "answer" not in record:
        raise Unusable(f"missing field 'answer' ({needs})")
    answer = record["answer"]
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise Unusable(f"field 'answer' is {describe(answer)}, expected the index of a choice")
    return texts, answer


# ------------------------------------------------------------------ characters


def _check_characters(row: Row) -> None:
    for text in _texts(row):
        if found := _FORBIDDEN.search(text):
            code = ord(found[0])
            what = "lone surrogate" if code >= 0xD800 else "NUL or control character"
            raise Unusable(f"{what} (U+{code:04X})", "characters")


def _texts(row: Row) -> Iterator[str]:
    yield from (row.text, row.source, row.domain or "")
    yield from (turn.content for turn in row.turns)
    yield from row.choices
