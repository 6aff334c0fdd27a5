"""Reading: every container, and every kind of damage a file can have."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from honeloom.data import read_rows, resolve_sources
from honeloom.data import records as records_module
from honeloom.data import streams as streams_module
from honeloom.errors import ConfigError, SourceError
from honeloom.types.rows import Rejected, Row

GOOD = b'{"text": "good row"}\n'


def read(*paths: object, limit: int | None = None) -> list[Row | Rejected]:
    return list(read_rows(resolve_sources([str(path) for path in paths]), limit=limit))


def reasons(rows: list[Row | Rejected]) -> list[tuple[int, str]]:
    return [(row.where.line, row.reason) for row in rows if isinstance(row, Rejected)]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_the_same_rows_in_every_text_container(save, alpaca, compression):
    records = [alpaca(i, output=f'line "{i}",\nnext\tline ü') for i in range(50)]
    expected = [(row.id, row.turns) for row in read(save("x.jsonl", records))]
    assert len(expected) == 50
    table = [list(records[0])] + [list(record.values()) for record in records]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in cells] for cells in table]
    contents = {
        "a.jsonl": b"".join(json.dumps(r).encode() + b"\n" for r in records),
        "b.json": json.dumps(records, indent=2).encode(),
        "c.json": b"\n".join(json.dumps(r).encode() for r in records),
        "d.csv": "\r\n".join(",".join(cells) for cells in quoted).encode(),
        "e.tsv": "\n".join("\t".join(cells) for cells in quoted).encode(),
    }
    for name, content in contents.items():
        assert [(row.id, row.turns) for row in read(save(name + compression, content))] == expected, name


def test_parquet_and_both_arrow_formats(alpaca, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    records = [alpaca(i) for i in range(5000)]
    table = pa.Table.from_pylist(records)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as f, pa.ipc.new_file(f, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        rows = read(tmp_path / name)
        assert [(row.id, row.where.line) for row in rows] == [(f"r{i}", i + 1) for i in range(5000)]
        assert len(read(tmp_path / name, limit=10)) == 10


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1 no table at all", b"ARROW1 no table at all"])
def test_damaged_table(save, name, content):
    with pytest.raises(SourceError, match=rf"{name} is no readable"):
        read(save(name, content))


def test_text_is_one_document_per_line_that_is_not_blank(save):
    rows = read(save("a.txt", b"First document.\r\n\n   \nSecond document.\nno newline"))
    assert [(row.where.line, row.text) for row in rows] == [
        (1, "First document."),
        (4, "Second document."),
        (5, "no newline"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x",}', "invalid JSON: "),
        (b'{"text": "x"},', "invalid JSON: Extra data at column 14"),
        (b'{"text": "x"', "invalid JSON: Expecting ',' delimiter at column 13"),
        (b"not json", "invalid JSON: Expecting value at column 1"),
        (b'{"text": "x\x00"}', "invalid JSON: Invalid control character at column 12"),
        (b"\x00\x00\x00", "invalid JSON: "),
        (b'{"text": "\\u0000"}', "NUL or control character (U+0000)"),
        (b'{"text": "\\ud83d"}', "lone surrogate (U+D83D)"),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at byte 14)"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8 (byte 0xed at byte 11)"),
        (b'["text"]', "the line is a list, expected an object"),
        (b"3", "the line is a number, expected an object"),
        (b"null", "the line is null, expected an object"),
        (b"[" * 100_000, "invalid JSON: "),
        (b'{"n": ' + b"9" * 5000 + b"}", "invalid JSON: "),
    ],
)
def test_bad_line_is_set_aside_with_its_line_and_reason(save, line, reason):
    rows = read(save("a.jsonl", GOOD + line + b"\n" + b'{"text": "last"}'))
    assert [row.text for row in rows if isinstance(row, Row)] == ["good row", "last"]
    ((number, found),) = reasons(rows)
    assert number == 2
    assert found.startswith(reason)


def test_rejected_row_keeps_its_own_id(save):
    (row,) = read(save("a.jsonl", [{"id": "x", "instruction": "q"}]))
    assert (row.id, row.kind) == ("x", "schema")


def test_bom_crlf_and_blank_lines_are_accepted(save):
    rows = read(save("a.jsonl", b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n  \n'))
    assert [(row.where.line, row.text) for row in rows] == [(1, "a"), (3, "b")]


def test_line_separators_of_unicode_end_no_line(save):
    (row,) = read(save("a.jsonl", '{"text": "a\u2028b\u0085c"}'.encode()))
    assert row.text == "a\u2028b\u0085c"


def test_utf16_is_named(save):
    with pytest.raises(SourceError, match=r"a\.jsonl is UTF-16"):
        read(save("a.jsonl", '{"text": "x"}'.encode("utf-16")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv", "a.jsonl.gz", "a.txt.zst"])
@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_file_has_no_rows(save, name, content):
    assert read(save(name, content)) == []


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("cut", [0.02, 0.5, 0.9, 0.99])
def test_compressed_file_cut_short(tmp_path, alpaca, ending, cut):
    content = b"".join(json.dumps(alpaca(i)).encode() + b"\n" for i in range(3000))
    packed = gzip.compress(content) if ending == "gz" else zstandard.ZstdCompressor().compress(content)
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(packed[: int(len(packed) * cut)])
    with pytest.raises(SourceError, match=rf"a\.jsonl\.{ending} is damaged or cut short"):
        read(path)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_file_that_is_not_compressed_at_all(tmp_path, ending):
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(GOOD * 10)
    with pytest.raises(SourceError, match="is damaged or cut short"):
        read(path)


def test_several_compressed_members_in_one_file(tmp_path):
    lines = [b'{"text": "%d"}\n' % i for i in range(4)]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(gzip.compress(line) for line in lines))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.ZstdCompressor().compress(line) for line in lines))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert [row.text for row in read(tmp_path / name)] == ["0", "1", "2", "3"]


def test_limit_counts_rows_read_usable_or_not_over_all_files(save):
    a = save("a.jsonl", b'{"text": "a"}\nbroken\n\n{"text": "b"}\n')
    b = save("b.jsonl", b'{"text": "c"}\n{"text": "d"}\n')
    assert len(read(a, b)) == 5
    assert [type(row).__name__ for row in read(a, b, limit=2)] == ["Row", "Rejected"]
    assert read(a, b, limit=4)[-1].text == "c"
    assert len(read(a, b, limit=99)) == 5
    with pytest.raises(ConfigError, match="limit is 0"):
        read(a, limit=0)


def test_limit_does_not_read_on(tmp_path):
    packed = gzip.compress(GOOD * 200_000)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-10])
    assert len(read(tmp_path / "a.jsonl.gz", limit=3)) == 3


def test_second_row_with_an_id_and_other_content(save):
    a = save("a.jsonl", [{"id": "x", "text": "one"}, {"id": "y", "text": "two"}])
    b = save("b.jsonl", [{"id": "x", "text": "one"}, {"id": "x", "text": "other"}])
    rows = read(a, b)
    assert [type(row).__name__ for row in rows] == ["Row", "Row", "Row", "Rejected"]
    assert rows[3].reason == f"duplicate id 'x' (first at {a}:1)"
    assert (rows[3].id, rows[3].kind, rows[3].is_duplicate) == ("x", "duplicate_id", False)


def test_mixed_formats_in_one_file(save):
    rows = read(save("a.jsonl", [{"text": "x"}, {"prompt": "q", "completion": "a"}, {"flags": 1}]))
    assert [row.kind for row in rows] == ["text", "chat", "schema"]


# ------------------------------------------------------------------ long rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz", "a.jsonl.zst"])
def test_row_of_ten_megabytes(save, name):
    long = "word " * 2_000_000
    records = [{"text": "short"}, {"text": long}, {"text": "after"}]
    content = {
        "json": json.dumps(records).encode(),
        "csv": ("text\n" + "\n".join(r["text"] for r in records)).encode(),
        "txt": "\n".join(r["text"] for r in records).encode(),
    }.get(name.split(".")[1], b"".join(json.dumps(r).encode() + b"\n" for r in records))
    assert [len(row.text) for row in read(save(name, content))] == [5, 10_000_000, 5]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_line_over_the_bound_is_set_aside(save, monkeypatch, name):
    monkeypatch.setattr(streams_module, "MAX_RECORD_BYTES", 1 << 20)
    monkeypatch.setattr(records_module, "MAX_RECORD_BYTES", 1 << 20)
    rows = read(save(name, GOOD + b'{"text": "' + b"x" * (3 << 20) + b'"}\n' + b'{"text": "last"}'))
    assert reasons(rows) == [(2, "the line is longer than 1 MiB")]
    assert rows[2].where.line == 3


# ------------------------------------------------------------------ CSV


def test_csv_counts_the_line_a_record_starts_on(save):
    content = b'text\n"two\nlines"\none\n'
    assert [row.where.line for row in read(save("a.csv", content))] == [2, 4]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"instruction,output\nq,a\nq\n", [(3, "the row has 1 fields, the header 2")]),
        (b"instruction,output\nq,a,b\n", [(2, "the row has 3 fields, the header 2")]),
        (b"text\ngood\ncaf\xe9\nlast\n", [(3, "not UTF-8 (byte 0xe9 at byte 4)")]),
        (b"text\nx\x00y\n", [(2, "NUL or control character (U+0000)")]),
        (b'text\ngood\n"open\n', [(3, "invalid CSV: unexpected end of data")]),
        (b"instruction,output\nq,\n", [(2, "empty output")]),
    ],
)
def test_csv_damage(save, content, expected):
    assert reasons(read(save("a.csv", content))) == expected


@pytest.mark.parametrize("header", [b"text,text\n", b"text,\n"])
def test_csv_header_without_names(save, header):
    with pytest.raises(SourceError, match=r"a\.csv:1: the header .* empty or repeated names"):
        read(save("a.csv", header + b"x,y\n"))


# ------------------------------------------------------------------ JSON arrays


def test_array_elements_that_are_no_rows(save):
    content = b'[{"text": "a"}, 7, "x", null, {"text": "caf\xe9"}, {"text": "\\udc80"}, {"text": "b"},\n]'
    rows = read(save("a.json", content))
    assert [row.text for row in rows if isinstance(row, Row)] == ["a", "b"]
    assert reasons(rows) == [
        (2, "the element is a number, expected an object"),
        (3, "the element is a string, expected an object"),
        (4, "the element is null, expected an object"),
        (5, "not UTF-8"),
        (6, "lone surrogate (U+DC80)"),
        (8, "invalid JSON: trailing comma before the end of the array"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"},\n{"text": }]', r"a\.json:2: invalid JSON: element 2: Expecting value"),
        (b'[{"text": "a"},\n\n{"text": "b"', r"a\.json:3: invalid JSON: element 2: "),
        (b'[{"text": "a"}\n{"text": "b"}]', r"a\.json:2: invalid JSON: expected '\]', found '\{'"),
        (b'[{"text": "a"}', r"expected '\]', found the end"),
        (b'[{"text": "a"}] []', r"'\[' after the end of the array"),
        (b'[{"text": "a}]', r"element 1: Unterminated string"),
    ],
)
def test_damaged_array_names_its_line(save, content, message):
    with pytest.raises(SourceError, match=message):
        read(save("a.json", content))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=30),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_array_is_read_alike_however_the_file_is_cut(tmp_path_factory, texts, piece, indent, ascii_only):
    """The pieces a file arrives in may end inside an escape, a number or a character."""
    elements = [{"text": text, "n": -12.5e3, "deep": [[{}], True, None]} for text in texts]
    path = tmp_path_factory.mktemp("arrays") / "a.json"
    path.write_text(json.dumps(elements, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    (file,) = resolve_sources([str(path)])
    old = streams_module._BUFFER
    streams_module._BUFFER = piece
    try:
        assert [record.load() for record in records_module.raw_records(file)] == elements
    finally:
        streams_module._BUFFER = old


def test_malformed_array_does_not_read_the_whole_file_first(save, monkeypatch):
    pieces = []
    original = records_module.chunks

    def counted(*args):
        for piece in original(*args):
            pieces.append(len(piece))
            yield piece

    monkeypatch.setattr(records_module, "chunks", counted)
    with pytest.raises(SourceError, match="element 1"):
        read(save("a.json", b"[{bad}," + b'{"text": "x"},' * 500_000 + b"{}]"))
    assert len(pieces) == 1


# ------------------------------------------------------------------ cost


def test_two_hundred_thousand_rows_in_little_memory(tmp_path):
    """Texts of 200 MB pass; a list of them would show."""
    path = tmp_path / "big.jsonl"
    filler = "word " * 180
    with path.open("w") as f:
        for i in range(200_000):
            f.write(f'{{"id": "row-{i}", "instruction": "Say {i}", "output": "{filler}{i}"}}\n')
    code = (
        "import resource, sys; from honeloom.data import RowSet, resolve_sources\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        f"files = resolve_sources([{str(path)!r}]); before = peak(); rows = RowSet.scan(files)\n"
        "print(len(rows), peak() - before, sum(1 for _ in rows.take(range(0, 200_000, 50))))"
    )
    count, grown, taken = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert (int(count), int(taken)) == (200_000, 4000)
    assert float(grown) < 110


def test_import_is_light():
    code = "import sys, honeloom.data; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {
        "pyarrow",
        "torch",
        "transformers",
        "datasets",
        "pydantic",
        "datasketch",
        "zstandard",
    }


def test_missing_library_is_named(save, monkeypatch):
    from honeloom.data import optional
    from honeloom.errors import MissingExtraError

    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'zstandard'", name="zstandard")

    monkeypatch.setattr(optional.importlib, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r"reading \.zst rows needs zstandard: pip install zstandard"):
        read(save("a.jsonl.zst", GOOD))


# ------------------------------------------------------------------ real rows

UNUSABLE = {
    "ifeval",
    "open_koala",
    "open_vicuna",
    "open_wizardlm",
    "alpaca_quality_flags",
    "preference_dpo_en",
}


def test_every_real_file(shared_data: Path):
    """All rows of all files can be used, but open prompts, flags, preferences, and two damaged rows."""
    for path in sorted([*shared_data.glob("*/*.jsonl*"), *shared_data.glob("text/*.txt*")]):
        name = path.name.split(".")[0]
        rows = read(path)
        rejected = [row for row in rows if isinstance(row, Rejected)]
        if name in UNUSABLE:
            assert len(rejected) == len(rows), name
        else:
            assert len(rejected) == (2 if name == "alpaca" else 0), (name, rejected[:3])


def test_real_mixed_rows_have_their_domains(shared_data: Path):
    rows = read(shared_data / "instruct" / "mixed_demo.jsonl.gz")
    assert len(rows) == 5559
    assert len({row.domain for row in rows}) == 21
    assert rows[0].id == "cot-sensemaking-01286"
