"""Questions in both training and evaluation rows."""

from __future__ import annotations

from pathlib import Path

from honeloom.data import RowSet, overlap, question_digest, question_digests, resolve_sources
from honeloom.data.formats import normalise
from honeloom.types.rows import Row, Where


def asked(question: str, **more: object) -> Row:
    return normalise({"prompt": question, "completion": "a", **more}, Where("f", 1), "f")


def test_digest_is_of_letters_and_digits_only():
    digest = question_digest(asked("How many apples, are there?"))
    assert digest is not None
    assert len(digest) == 8
    for same in (
        "how MANY apples  are\nthere",
        "“How” many — apples are_there…",
        " How many apples are there ?",
    ):
        assert question_digest(asked(same)) == digest
    for other in ("how many apples are here", "how many apples are there 2", "howmany apples are there"):
        assert question_digest(asked(other)) != digest


def test_system_text_and_answer_do_not_count():
    plain = question_digest(asked("How many apples are there?"))
    assert question_digest(asked("How many apples are there?", system="Be brief.", id="x")) == plain
    choice = {"question": "How many apples are there?", "choices": ["1", "2"], "answer": 0}
    assert question_digest(normalise(choice, Where("f", 1), "f")) == plain


def test_digest_needs_three_words():
    assert question_digest(asked("True or")) is None
    assert question_digest(asked("?!")) is None
    assert question_digest(asked("True or false?")) is not None
    assert question_digest(asked("Größe in 日本 помощь")) is not None
    assert question_digests([asked("no"), asked("one two three"), asked("One, two, three")]) == {
        question_digest(asked("one two three"))
    }


def test_overlap_counts_by_file_and_shows_examples():
    rows = [
        normalise({"id": f"{f}{i}", "prompt": f"question number {i} of many", "answer": "a"}, Where(f, i), "f")
        for f in ("a", "b")
        for i in range(1, 6)
    ]
    found = overlap(question_digests(rows[:4]), rows)
    assert found == {
        "rows": 8,
        "files": {"a": 4, "b": 4},
        "examples": [{"id": i, "where": f"a:{i[1]}"} for i in ("a1", "a2", "a3", "a4")]
        + [{"id": "b1", "where": "b:1"}],
    }
    assert overlap(set(), rows) == {"rows": 0, "files": {}, "examples": []}


def test_a_real_leak_is_found_and_clean_rows_are_not_accused(shared_data: Path):
    def rows(*names: str) -> RowSet:
        return RowSet.scan(resolve_sources([str(shared_data / name) for name in names]), max_bad=1)

    tests = question_digests(rows(*(f"eval/{name}.jsonl.gz" for name in ("gsm8k_test", "svamp", "asdiv", "mawps"))))
    leaky = rows("instruct/leaky_adapters_math.jsonl.gz")
    assert overlap(tests, leaky)["rows"] > 0.85 * len(leaky)
    assert overlap(tests, rows("instruct/mixed_demo.jsonl.gz"))["rows"] == 0
    assert overlap(tests, rows("instruct/gsm8k.jsonl.gz"))["rows"] < 0.001 * 7326
