"""The set of usable rows: what is counted, what is refused, and streaming it again."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from honeloom.data import RowSet, resolve_sources
from honeloom.errors import ConfigError, RowsError, SourceError


def scan(*paths: object, **options: object) -> RowSet:
    return RowSet.scan(resolve_sources([str(path) for path in paths]), **options)


def test_scan_keeps_labels_and_places(save, alpaca):
    a = save("a.jsonl", [alpaca(0, domain="x"), alpaca(1, source="s")])
    b = save("b.jsonl.gz", [alpaca(2, domain="x")])
    rows = scan(a, b)
    assert (rows.ids, rows.domains, rows.sources) == (["r0", "r1", "r2"], ["x", None, "x"], ["a", "s", "b"])
    assert (rows.file_index.tolist(), rows.line.tolist()) == ([0, 0, 1], [1, 2, 1])
    assert (rows.file_index.dtype, rows.line.dtype) == (np.int32, np.int64)
    assert (rows.counts.rows_in, rows.counts.rows_usable, rows.counts.rejected) == (3, 3, {})
    assert rows.counts.files == {str(a): 2, str(b): 1}
    assert [row.id for row in rows] == rows.ids
    assert [row.id for row in rows] == rows.ids  # it can be streamed any number of times


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.csv", "a.txt", "a.parquet"])
def test_a_view_streams_its_rows_from_every_container(save, tmp_path, name):
    texts = [f"document {i}" for i in range(3000)]
    if name == "a.parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        path = tmp_path / name
        pq.write_table(pa.table({"text": texts}), path, row_group_size=500)
    elif name == "a.json":
        path = save(name, ("[" + ",\n".join(f'{{"text": "{text}"}}' for text in texts) + "]").encode())
    elif name.startswith("a.jsonl"):
        path = save(name, [{"text": text} for text in texts])
    else:
        path = save(name, "\n".join((["text"] if name == "a.csv" else []) + texts).encode())
    rows = scan(path)
    view = rows.take([2999, 0, 1024, 1023, 7])
    assert [row.text for row in view] == [texts[i] for i in (0, 7, 1023, 1024, 2999)]
    assert view.ids == [row.id for row in view]
    assert len(view) == 5
    assert [row.text for row in view.take([1])] == [texts[7]]
    assert list(rows.take([])) == []


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_take_is_file_order_and_equals_the_whole(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("views")
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
    for f, size in enumerate(sizes):
        # Every third line is no row, and blank lines stand between.
        lines = [f'{{"text": "file {f} row {i}"}}\n\n' if i % 3 else "broken\n" for i in range(size * 2)]
        (folder / f"{f}.jsonl").write_text("".join(lines))
    rows = scan(folder, max_bad=1)
    everything = [row.text for row in rows]
    chosen = data.draw(st.permutations(range(len(rows)))).copy()[: data.draw(st.integers(0, len(rows)))]
    view = rows.take(chosen)
    assert [row.text for row in view] == [everything[i] for i in sorted(chosen)]
    assert view.ids == [rows.ids[i] for i in sorted(chosen)]


def test_take_refuses_what_is_not_there(save, alpaca):
    rows = scan(save("a.jsonl", [alpaca(i) for i in range(3)]))
    for wrong in ([3], [-1], [0, 5]):
        with pytest.raises(IndexError, match="expected 0 to 2"):
            rows.take(wrong)
    with pytest.raises(ValueError, match="given twice"):
        rows.take([1, 1])


def test_same_file_twice(save, alpaca):
    path = save("a.jsonl", [alpaca(0), alpaca(1)])
    assert scan(path, path).counts.rejected == {"exact_duplicate": 2}
    twice = scan(path, path, dedup=False)
    assert [row.id for row in twice] == twice.ids == ["r0", "r1", "r0", "r1"]


def test_exact_duplicates_keep_the_first(save, alpaca):
    chat = {
        "id": "c",
        "messages": [
            {"role": "user", "content": "Say number 0."},
            {"role": "assistant", "content": "number 0"},
        ],
    }
    rows = scan(save("a.jsonl", [alpaca(0), alpaca(1), alpaca(0, id="again", extra=1), chat]))
    assert rows.ids == ["r0", "r1"]
    assert [(r.id, r.reason, r.kind) for r in rows.rejected] == [
        ("again", "exact duplicate of r0", "exact_duplicate"),
        ("c", "exact duplicate of r0", "exact_duplicate"),
    ]
    assert (rows.counts.rows_in, rows.counts.rows_usable) == (4, 2)
    assert len(scan(rows.files[0].path, dedup=False)) == 4


def test_near_duplicates_keep_the_first(save):
    text = " ".join(f"word{i}" for i in range(200))
    other = " ".join(f"thing{i}" for i in range(200))
    records = [
        {"id": "first", "text": text},
        {"id": "other", "text": other},
        {"id": "near", "text": text.replace("word150", "changed") + "!"},
        {"id": "half", "text": " ".join(text.split()[:100] + other.split()[100:])},
        {"id": "short", "text": "few words"},
        {"id": "punctuated", "text": "Few words."},
    ]
    path = save("a.jsonl", records)
    rows = scan(path, near_duplicates=0.8)
    assert rows.ids == ["first", "other", "half", "short"]
    assert [(r.id, r.reason) for r in rows.rejected] == [
        ("near", "near duplicate of first"),
        ("punctuated", "near duplicate of short"),
    ]
    assert rows.counts.rejected == {"near_duplicate": 2}
    assert len(scan(path)) == 6
    for wrong in (0, 1.5, -1):
        with pytest.raises(ConfigError, match="near_duplicates"):
            scan(path, near_duplicates=wrong)


def test_too_many_bad_rows(save, alpaca):
    good = [alpaca(i) for i in range(97)]
    path = save("a.jsonl", [{"instruction": "q"}, {"flags": 1}, *good, {"text": ""}])
    with pytest.raises(RowsError) as caught:
        scan(path)
    message = str(caught.value)
    assert message.startswith("3 of 100 rows cannot be used, more than the share of 0.01 that --max-bad allows")
    for part in (
        f"{path}:1: missing field 'output'",
        f"{path}:2: no known",
        f"{path}:100: empty text",
        "--strict",
    ):
        assert part in message
    rows = scan(path, max_bad=0.03)
    assert rows.counts.rejected == {"empty": 1, "schema": 2}
    assert Counter(r.kind for r in rows.rejected) == {"schema": 2, "empty": 1}
    with pytest.raises(ConfigError, match="max_bad is 3"):
        scan(path, max_bad=3)


def test_one_percent_is_allowed(save, alpaca):
    rows = scan(save("a.jsonl", [*(alpaca(i) for i in range(99)), {"flags": 1}]))
    assert rows.counts.rows_usable == 99


def test_duplicates_of_content_are_not_bad_but_stolen_ids_are(save, alpaca):
    assert len(scan(save("a.jsonl", [alpaca(0, id=str(i)) for i in range(100)]))) == 1
    with pytest.raises(RowsError, match=r"99 of 100 .*duplicate id 'x' \(first at .*b\.jsonl:1\)"):
        scan(save("b.jsonl", [alpaca(i, id="x") for i in range(100)]))


def test_strict_stops_at_the_first_bad_row(save, alpaca):
    path = save("a.jsonl", [alpaca(0), alpaca(0, id="again"), alpaca(1), {"flags": 1}, {"text": ""}])
    with pytest.raises(RowsError, match=r"a\.jsonl:4: no known format"):
        scan(path, strict=True)
    assert len(scan(path, strict=True, limit=3)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"no usable row in .*a\.jsonl \(0 rows read\)"),
        (b"\n\n", r"\(0 rows read\)"),
        (b"broken\n", r"\(1 rows read\): .*a\.jsonl:1: invalid JSON"),
    ],
)
def test_no_rows_at_all(save, content, message):
    with pytest.raises(RowsError, match=message):
        scan(save("a.jsonl", content), max_bad=1)


def test_an_empty_file_among_others_is_counted(save, alpaca):
    empty = save("a.jsonl", b"")
    rows = scan(empty, save("b.jsonl", [alpaca(0)]))
    assert rows.counts.files[str(empty)] == 0
    assert [row.id for row in rows] == ["r0"]


def test_limit(save, alpaca):
    a = save("a.jsonl", [alpaca(i) for i in range(10)])
    b = save("b.jsonl", [alpaca(i) for i in range(10, 20)])
    rows = scan(a, b, limit=12)
    assert (len(rows), rows.counts.rows_in) == (12, 12)
    assert [row.id for row in rows][-1] == "r11"


def test_file_changed_after_the_scan(save, alpaca):
    path = save("a.jsonl", [alpaca(i) for i in range(3)])
    rows = scan(path)
    with path.open("ab") as f:
        f.write(b"{}\n")
    with pytest.raises(SourceError, match="was changed while it was in use"):
        list(rows)
    rows = scan(path, max_bad=1)
    os.utime(path, ns=(1, 1))
    with pytest.raises(SourceError, match="was changed"):
        list(rows)
    path.unlink()
    with pytest.raises(SourceError, match="cannot read"):
        list(rows)


def test_real_rows(shared_data: Path):
    rows = scan(shared_data / "instruct" / "alpaca.jsonl.gz")
    assert (rows.counts.rows_in, rows.counts.rows_usable, rows.counts.rejected) == (
        15814,
        15812,
        {"characters": 2},
    )
    both = scan(shared_data / "instruct" / "mini.jsonl", shared_data / "instruct" / "self-instruct-seed.jsonl.gz")
    assert both.counts.rows_in == 645
    assert set(both.counts.rejected) <= {"exact_duplicate"}
