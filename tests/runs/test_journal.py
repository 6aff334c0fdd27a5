"""The journal: durable lines, a torn tail dropped, damage in the middle refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from honeloom.errors import HoneloomError
from honeloom.runs.journal import Journal, read_journal

RECORDS = [{"n": 0}, {"n": 1, "text": "zwei\nZeilen é"}, {"n": 2}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "journal.jsonl"
    with Journal(file) as journal:
        for record in RECORDS:
            journal.append(record)
    return file


def test_records_come_back_in_order(path):
    assert list(read_journal(path)) == RECORDS


def test_no_file_is_no_records(tmp_path):
    assert list(read_journal(tmp_path / "absent")) == []


@given(cut=st.integers(min_value=0))
@settings(max_examples=60, deadline=None)
def test_a_cut_anywhere_keeps_the_complete_lines_and_appends_after_them(cut):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        with Journal(path) as journal:
            for record in RECORDS:
                journal.append(record)
        whole = path.read_bytes()
        cut %= len(whole) + 1
        path.write_bytes(whole[:cut])
        complete = RECORDS[: whole[:cut].count(b"\n")]
        assert list(read_journal(path)) == complete
        with Journal(path) as journal:
            journal.append({"n": "new"})
        assert list(read_journal(path)) == [*complete, {"n": "new"}]
        assert path.read_bytes().count(b"\n") == len(complete) + 1


def test_a_damaged_middle_line_is_an_error_that_names_it(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"n": \n' + lines[2])
    with pytest.raises(HoneloomError, match=r"journal\.jsonl:2: damaged"):
        list(read_journal(path))


def test_a_line_longer_than_the_search_block_survives_a_torn_tail(tmp_path):
    path = tmp_path / "long"
    with Journal(path) as journal:
        journal.append({"text": "x" * (3 << 20)})
    with open(path, "ab") as file:
        file.write(b"y" * (2 << 20))
    assert len(next(read_journal(path))["text"]) == 3 << 20
    with Journal(path) as journal:
        journal.append({"n": 1})
    assert [sorted(r) for r in read_journal(path)] == [["text"], ["n"]]


def test_what_append_returned_is_on_disk_before_close(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.append({"a": 1})
    assert json.loads((tmp_path / "j").read_text()) == {"a": 1}
    journal.close()
