"""Rows as records of a named format: the inverse of `formats`, one pure function per format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from honeloom.data.records import Unusable
from honeloom.types.rows import Row, Turn

__all__ = ["COLUMNS", "CONVERTERS", "RowFormat", "alpaca", "messages", "prompt_completion", "sharegpt"]

RowFormat = Literal["messages", "alpaca", "sharegpt", "prompt-completion"]

_NAMES = {"user": "human", "assistant": "gpt"}


def messages(row: Row) -> dict[str, Any]:
    """Return {id, messages: [{role, content}], domain, source}; any conversation fits."""
    return _record(row, messages=[{"role": t.role, "content": t.content} for t in _turns(row)])


def sharegpt(row: Row) -> dict[str, Any]:
    """Return {id, conversations: [{from, value}], domain, source}; any conversation fits."""
    turns = [{"from": _NAMES.get(t.role, t.role), "value": t.content} for t in _turns(row)]
    return _record(row, conversations=turns)


def alpaca(row: Row) -> dict[str, Any]:
    """Return {id, system, history, instruction, input, output, domain, source}.

    The last exchange is instruction and output; earlier ones are `history`. `input` is empty, as
    the two cannot be told apart any more.
    """
    system, exchanges = _exchanges(row, "alpaca")
    *history, (prompt, answer) = exchanges
    extra: dict[str, Any] = {"system": system} if system else {}
    if history:
        extra["history"] = [list(pair) for pair in history]
    return _record(row, **extra, instruction=prompt, input="", output=answer)


def prompt_completion(row: Row) -> dict[str, Any]:
    """Return {id, system, prompt, completion, domain, source} of a single exchange."""
    system, exchanges = _exchanges(row, "prompt-completion")
    if len(exchanges) > 1:
        raise Unusable(f"{len(exchanges)} exchanges do not fit prompt-completion; use messages or alpaca")
    extra = {"system": system} if system else {}
    return _record(row, **extra, prompt=exchanges[0][0], completion=exchanges[0][1])


CONVERTERS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "messages": messages,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "prompt-completion": prompt_completion,
}
# Column types of each format where rows are written as a table; absent fields become null.
_ENDS = {"domain": "string", "source": "string"}
COLUMNS: dict[str, dict[str, str]] = {
    "messages": {"id": "string", "messages": "turns:role:content", **_ENDS},
    "alpaca": {
        "id": "string", "system": "string", "history": "pairs",
        "instruction": "string", "input": "string", "output": "string", **_ENDS,
    },
    "sharegpt": {"id": "string", "conversations": "turns:from:value", **_ENDS},
    "prompt-completion": {
        "id": "string", "system": "string", "prompt": "string", "completion": "string", **_ENDS,
    },
}  # fmt: skip


def _record(row: Row, **fields: Any) -> dict[str, Any]:
    domain = {} if row.domain is None else {"domain": row.domain}
    return {"id": row.id, **fields, **domain, "source": row.source}


def _turns(row: Row) -> tuple[Turn, ...]:
    if row.kind != "chat":
        what = "plain text" if row.kind == "text" else "multiple-choice"
        raise Unusable(f"a {what} row is no conversation and has no form in this format")
    return row.turns


def _exchanges(row: Row, name: str) -> tuple[str, list[tuple[str, str]]]:
    """Split a conversation into its system text and (user, assistant) pairs."""
    turns = list(_turns(row))
    system = turns.pop(0).content if turns[0].role == "system" else ""
    pairs = list(zip(turns[::2], turns[1::2], strict=False))
    if len(turns) % 2 or any((user.role, answer.role) != ("user", "assistant") for user, answer in pairs):
        roles = " ".join(turn.role for turn in turns[:8])
        raise Unusable(f"the turns ({roles}) do not alternate as {name} needs; use messages")
    return system, [(user.content, answer.content) for user, answer in pairs]
