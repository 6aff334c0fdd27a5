"""Every row format, and the exact reason for every row that is none."""

from __future__ import annotations

import json
from hashlib import blake2b

import pytest

from honeloom.data.formats import content_digest, normalise
from honeloom.data.records import Unusable
from honeloom.types.rows import Row, Where

HERE = Where("f.jsonl", 1)


def row_of(record: dict) -> Row:
    return normalise(record, HERE, "f")


def turns_of(record: dict) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in row_of(record).turns]


USER_ASSISTANT = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            USER_ASSISTANT,
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, USER_ASSISTANT),
        (
            {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            USER_ASSISTANT,
        ),
        ({"conversation": [{"human": "q", "assistant": "a"}]}, USER_ASSISTANT),
        ({"instruction": "q", "output": "a"}, USER_ASSISTANT),
        ({"instruction": "q", "input": None, "output": "a"}, USER_ASSISTANT),
        ({"instruction": "q", "input": "i", "output": "a"}, [("user", "q\ni"), ("assistant", "a")]),
        ({"instruction": "q", "context": "c", "response": "a"}, [("user", "q\nc"), ("assistant", "a")]),
        ({"prompt": "q", "completion": "a"}, USER_ASSISTANT),
        ({"prompt": "q", "response": "a"}, USER_ASSISTANT),
        ({"prompt": "q", "answer": "a"}, USER_ASSISTANT),
        ({"query": "q", "response": "a"}, USER_ASSISTANT),
        ({"question": "q", "answer": "a"}, USER_ASSISTANT),
        ({"question": "q", "answer": "a", "context": "c"}, [("user", "c\nq"), ("assistant", "a")]),
        (
            {"query": "q", "response": "a", "history": [["h", "b"]]},
            [("user", "h"), ("assistant", "b"), *USER_ASSISTANT],
        ),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["h", "b"]]},
            [("system", "s"), ("user", "h"), ("assistant", "b"), *USER_ASSISTANT],
        ),
        (
            {
                "system": "s",
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            },
            [("system", "s"), *USER_ASSISTANT],
        ),
        # Parquet gives every member of a message, the absent ones as null.
        (
            {
                "messages": [
                    {"role": "user", "content": "q", "from": None},
                    {"role": "assistant", "content": "a"},
                ]
            },
            USER_ASSISTANT,
        ),
    ],
)
def test_conversation_formats(record, turns):
    before = json.dumps(record)
    assert turns_of(record) == turns
    assert row_of(record).kind == "chat"
    assert json.dumps(record) == before


def test_plain_text():
    row = row_of({"text": "some words", "url": 3})
    assert (row.kind, row.text, row.turns) == ("text", "some words", ())


def test_multiple_choice():
    row = row_of({"question": "q", "choices": ["x", "y"], "answer": 1, "context": "c", "task": "t"})
    assert (row.kind, row.choices, row.answer, row.response, row.domain) == (
        "choice",
        ("x", "y"),
        1,
        "y",
        "t",
    )
    assert row.prompt == "c\nq"


def test_multiple_choice_goes_before_the_alpaca_fields_of_the_same_row():
    record = {
        "question": "q",
        "choices": ["x", "y"],
        "answer": 0,
        "instruction": "i",
        "input": "",
        "output": "x",
    }
    assert row_of(record).kind == "choice"


def test_arc_choices():
    choices = {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}
    row = row_of({"question": "q", "choices": choices, "answerKey": "C"})
    assert (row.choices, row.answer) == (("x", "y", "z"), 2)


@pytest.mark.parametrize(
    ("more", "domain"),
    [
        ({"domain": "d", "category": "c", "task": "t"}, "d"),
        ({"category": "c", "task": "t"}, "c"),
        ({"task": "t"}, "t"),
        ({"domain": " "}, None),
        ({"domain": 3}, "3"),
        ({"domain": None, "category": ["c"]}, None),
    ],
)
def test_domain_of_an_evaluation_row(more, domain):
    assert row_of({"prompt": "q", "answer": "a", **more}).domain == domain


def test_task_is_no_domain_of_a_training_row():
    assert row_of({"prompt": "q", "completion": "a", "task": "t"}).domain is None


def test_source_is_the_rows_own_or_the_file():
    assert row_of({"text": "x", "source": "wiki"}).source == "wiki"
    assert row_of({"text": "x"}).source == "f"


def test_id_is_the_rows_own_or_the_hash_of_its_canonical_json():
    assert row_of({"id": "a", "text": "x"}).id == "a"
    assert row_of({"id": 7, "text": "x"}).id == "7"
    record = {"text": "größer", "extra": [1, {"b": 2, "a": 1}]}
    canonical = '{"extra":[1,{"a":1,"b":2}],"text":"größer"}'
    assert row_of(record).id == blake2b(canonical.encode(), digest_size=16).hexdigest()
    assert row_of(dict(reversed(record.items()))).id == row_of(record).id
    assert row_of({"id": None, "text": "x"}).id != row_of({"text": "x"}).id  # another record, another hash


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "q"}, "missing field 'output' (alpaca rows need instruction and output)"),
        ({"output": "a"}, "missing field 'instruction' (alpaca rows need instruction and output)"),
        ({"instruction": "q", "output": ["a"]}, "field 'output' is a list, expected a string"),
        ({"instruction": "q", "output": None}, "field 'output' is null, expected a string"),
        ({"instruction": "q", "output": 4}, "field 'output' is a number, expected a string"),
        ({"instruction": True, "output": "a"}, "field 'instruction' is a boolean, expected a string"),
        ({"instruction": "q", "input": {}, "output": "a"}, "field 'input' is an object, expected a string"),
        ({"instruction": "q", "output": " \n"}, "empty output"),
        ({"instruction": "", "output": "a"}, "empty instruction"),
        ({"prompt": "q", "answer": ""}, "empty output"),
        (
            {"prompt": "q"},
            "missing field 'completion' (prompt rows need prompt and completion or response or answer)",
        ),
        ({"query": "q", "response": None}, "field 'response' is null, expected a string"),
        (
            {"query": "q", "response": "a", "history": "h"},
            "field 'history' is a string, expected a list of pairs",
        ),
        (
            {"query": "q", "response": "a", "history": [["h"]]},
            "field 'history[0]' is a list, expected a pair of strings",
        ),
        ({"text": ""}, "empty text"),
        ({"text": 5}, "field 'text' is a number, expected a string"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": "hello"}, "field 'messages' is a string, expected a list of messages"),
        ({"messages": ["hello"]}, "field 'messages[0]' is a string, expected an object"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no user turn"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]},
            "empty output",
        ),
        (
            {"messages": [{"role": "user"}]},
            "missing field 'messages[0].content' (messages need role and content, or from and value)",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "field 'messages[0].content' is null, expected a string",
        ),
        (
            {"conversations": [{"from": "bing", "value": "q"}]},
            "unknown role 'bing' (allowed: system, user, assistant, tool, human, gpt)",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "field 'messages[0].tool_calls' is not supported; write the calls into the content",
        ),
        (
            {"question": "q", "choices": ["x", "y", "z", "w"], "answer": 7},
            "answer 7 is outside the 4 choices",
        ),
        ({"question": "q", "choices": ["x"], "answer": -1}, "answer -1 is outside the 1 choices"),
        (
            {"question": "q", "choices": ["x"], "answer": "A"},
            "field 'answer' is a string, expected the index of a choice",
        ),
        (
            {"question": "q", "choices": ["x"], "answer": True},
            "field 'answer' is a boolean, expected the index of a choice",
        ),
        (
            {"question": "q", "choices": ["x"]},
            "missing field 'answer' (multiple-choice rows need question, choices and answer)",
        ),
        (
            {"question": "q", "choices": "x", "answer": 0},
            "field 'choices' is a string, expected a list of strings",
        ),
        (
            {"question": "q", "choices": ["x", 2], "answer": 0},
            "field 'choices[1]' is a number, expected a string",
        ),
        ({"question": "q", "choices": ["x", ""], "answer": 0}, "empty choice (choices[1])"),
        (
            {"question": "q", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "E"},
            "answerKey 'E' is not among the labels A",
        ),
        ({"text": "a\x00b"}, "NUL or control character (U+0000)"),
        ({"text": "a\x1bb"}, "NUL or control character (U+001B)"),
        ({"text": "a\ud800b"}, "lone surrogate (U+D800)"),
        ({"question": "q", "choices": ["x", "\x07"], "answer": 0}, "NUL or control character (U+0007)"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "a preference row (chosen, rejected) has no single answer; keep one as 'completion'",
        ),
        (
            {"id": "x", "flags": []},
            "no known format (fields: 'id', 'flags'); expected messages, conversations, instruction/output, "
            "prompt/completion, question/choices, or text",
        ),
        (
            {},
            "no known format (fields: none); expected messages, conversations, instruction/output, "
            "prompt/completion, question/choices, or text",
        ),
    ],
)
def test_reason(record, reason):
    with pytest.raises(Unusable) as caught:
        row_of(record)
    assert caught.value.reason == reason


def test_empty_turn_in_a_long_conversation_is_numbered():
    turns = [
        {"role": r, "content": c} for r, c in [("user", "q"), ("assistant", "a"), ("user", " "), ("assistant", "b")]
    ]
    with pytest.raises(Unusable) as caught:
        row_of({"messages": turns})
    assert (caught.value.reason, caught.value.kind) == ("empty instruction (turn 3)", "empty")


def test_tabs_and_newlines_are_no_control_characters():
    assert row_of({"text": "a\tb\r\nc"}).text == "a\tb\r\nc"


def test_own_id_with_a_control_character_is_replaced():
    assert len(row_of({"id": "a\x00", "text": "x"}).id) == 32


def test_content_digest_ignores_ids_and_formats_but_no_boundary():
    alpaca = row_of({"id": "1", "instruction": "q", "output": "a", "domain": "d"})
    chat = row_of({"id": "2", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    assert content_digest(alpaca) == content_digest(chat)
    assert content_digest(row_of({"prompt": "qa", "completion": "b"})) != content_digest(
        row_of({"prompt": "q", "completion": "ab"})
    )
    choice = {"question": "q", "choices": ["x", "y"], "answer": 0}
    assert content_digest(row_of(choice)) != content_digest(row_of({**choice, "answer": 1}))
