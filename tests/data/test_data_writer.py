"""Writing: a selection is a byte-faithful part of its input; other formats read back as the same rows."""

from __future__ import annotations

import gzip
import json
import os
import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from honeloom.data import RowSet, convert_rows, read_rows, resolve_sources, write_rejected, write_selected
from honeloom.errors import ConfigError, SourceError
from honeloom.types.rows import Rejected, Where

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def scan(*paths: object, **options: object) -> RowSet:
    return RowSet.scan(resolve_sources([str(path) for path in paths]), **{"max_bad": 1, **options})


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


# ------------------------------------------------------------------ selections

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(str.strip)
STYLES = [
    lambda record: json.dumps(record),
    lambda record: json.dumps(record, ensure_ascii=False, separators=(",", ":")),
    lambda record: " " + json.dumps(dict(reversed(record.items())), separators=(" , ", " : ")) + "\t",
]


@st.composite
def lines(draw) -> bytes:
    record = {
        "text": draw(TEXT),
        "n": draw(st.floats(allow_nan=False)),
        "nested": {"b": None, "a": [draw(TEXT)]},
    }
    return draw(st.sampled_from(STYLES))(record).encode() + draw(st.sampled_from([b"\n", b"\r\n"]))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(lines(), min_size=1, max_size=12, unique=True),
    st.sampled_from(["", ".gz"]),
    st.booleans(),
    st.booleans(),
    st.data(),
)
@example([b'{"text": "x"}\n'], "", True, True, None)
def test_any_choice_of_lines_has_the_bytes_of_the_input(tmp_path_factory, rows, ending, bom, cut, data):
    folder = tmp_path_factory.mktemp("lines")
    content = (b"\xef\xbb\xbf" if bom else b"") + b"".join(rows)
    content = content.removesuffix(b"\n").removesuffix(b"\r") if cut else content
    path = folder / f"in.jsonl{ending}"
    path.write_bytes(gzip.compress(content) if ending else content)
    rowset = scan(path, dedup=False)
    assert len(rowset) == len(rows)
    everything = range(len(rows))
    chosen = everything if data is None else data.draw(st.lists(st.sampled_from(everything), unique=True))
    written = write_selected(rowset, chosen, folder)
    assert written.name == f"selected.jsonl{ending}"
    expected = [rows[i] for i in sorted(chosen)]
    if cut and expected and expected[-1] == rows[-1]:
        expected[-1] = expected[-1].rstrip(b"\r\n") + b"\n"
    packed = written.read_bytes()
    assert (gzip.decompress(packed) if ending else packed) == b"".join(expected)


def test_order_is_the_inputs_whatever_the_indices(save, alpaca, out):
    a = save("a.jsonl", [alpaca(i) for i in range(5)])
    b = save("b.jsonl.gz", [alpaca(i) for i in range(5, 10)])
    path = write_selected(scan(a, b), [9, 0, 5, 4], out)
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["r0", "r4", "r5", "r9"]
    assert path.name == "selected.jsonl"
    assert os.listdir(out) == ["selected.jsonl"]


def test_gzip_bytes_do_not_depend_on_time_or_name(save, alpaca, out, monkeypatch):
    rows = scan(save("a.jsonl.gz", [alpaca(i) for i in range(100)]))
    first = write_selected(rows, range(50), out, stem="one").read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert write_selected(rows, reversed(range(50)), out, stem="two").read_bytes() == first


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'[{"text": "\xc3\xbc \\ud83d\\ude00", "n": 1.50}]'),
        ("a.csv", b"text,n\n\"a, b\",7\n"),
        ("a.tsv.gz", b"text\tn\nx\t7\n"),
        ("a.txt", b"a plain line\n"),
        ("a.txt.gz", b"a plain line\n"),
        ("a.jsonl.zst", b'{"text":"x"}\n'),
        ("a.json", b'{"text":"x"}\n'),
        ("a.json", b'[{"text": "x", "extra": "\\ud800"}]'),
    ],
)  # fmt: skip
def test_other_containers_become_json_lines(save, out, name, content):
    rows = scan(save(name, content))
    path = write_selected(rows, [0], out)
    assert path.name == "selected.jsonl"
    (again,) = scan(path)
    (before,) = rows
    assert (again.turns, again.text) == (before.turns, before.text)
    if content.startswith(b'{"text"'):
        assert path.read_bytes() == content


def test_json_lines_under_the_name_json_in_gzip(save, out):
    assert write_selected(scan(save("a.json.gz", b'{"text": "x"}\n')), [0], out).name == "selected.jsonl.gz"


def test_parquet_keeps_types_and_metadata(out, tmp_path):
    schema = pa.schema(
        [
            pa.field("text", pa.large_string()),
            pa.field("when", pa.timestamp("us")),
            pa.field("tags", pa.list_(pa.struct([("k", pa.int8())]))),
            pa.field("kind", pa.dictionary(pa.int32(), pa.string())),
        ],
        metadata={"huggingface": "{}"},
    )
    values = [
        {"text": f"t{i}", "when": i, "tags": [{"k": i % 100}] * (i % 3), "kind": f"k{i % 2}"} for i in range(4000)
    ]
    table = pa.Table.from_pylist(values, schema=schema)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=600)
    rows = scan(tmp_path / "a.parquet")
    chosen = [3999, 0, 17, 1024, 2500]
    path = write_selected(rows, chosen, out)
    assert path.name == "selected.parquet"
    written = pq.read_table(path)
    assert written.equals(table.take(sorted(chosen)))
    assert written.schema.metadata == schema.metadata
    assert write_selected(rows, chosen, out, stem="again").read_bytes() == path.read_bytes()
    assert pq.ParquetFile(write_selected(rows, range(4000), out, stem="all")).num_row_groups == 1
    assert pq.read_table(write_selected(rows, [], out, stem="none")).num_rows == 0


def test_tables_of_unequal_schema_and_mixtures_become_json_lines(save, out, tmp_path, alpaca):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b"], "n": [1]}), tmp_path / "b.parquet")
    lines = save("c.jsonl", [alpaca(0)])
    assert write_selected(scan(tmp_path / "a.parquet", tmp_path / "b.parquet"), [0, 1], out).name == "selected.jsonl"
    path = write_selected(scan(tmp_path / "a.parquet", lines), [0, 1], out)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"text": "a"}, alpaca(0)]


def test_saved_dataset_becomes_parquet(out, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(10)]).save_to_disk(
        str(tmp_path / "d"), num_shards=2
    )
    path = write_selected(scan(tmp_path / "d"), [9, 2], out)
    assert pq.read_table(path).to_pylist() == [{"text": "row 2"}, {"text": "row 9"}]


def test_hub_and_lab_rows_become_json_lines(out, tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "hub" / "train.parquet")
    files = resolve_sources(["org/name"], fetch_hub=lambda name: tmp_path / "hub")
    assert write_selected(RowSet.scan(files), [0], out).read_bytes() == b'{"text": "a"}\n'
    lab = ModuleType("honeloom.lab")
    lab.rows = lambda split: iter([{"id": "p0", "instruction": "q", "output": "ü"}])
    monkeypatch.setitem(sys.modules, "honeloom.lab", lab)
    assert write_selected(scan("lab:pool"), [0], out).read_text() == '{"id": "p0", "instruction": "q", "output": "ü"}\n'


def test_a_ten_megabyte_row_stays_intact(save, out):
    line = b'{"text": "' + b"word " * 2_000_000 + b'"}\n'
    rows = scan(save("a.jsonl", b'{"text": "x"}\n' + line))
    assert write_selected(rows, [1], out).read_bytes() == line


def test_changed_input_is_not_copied(save, alpaca, out):
    path = save("a.jsonl", [alpaca(0)])
    rows = scan(path)
    save("a.jsonl", [alpaca(1), alpaca(2)])
    with pytest.raises(SourceError, match="was changed"):
        write_selected(rows, [0], out)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_obey_the_umask(save, alpaca, out, umask, mode):
    rows = scan(save("a.jsonl", [alpaca(0)]))
    before = os.umask(umask)
    try:
        paths = [write_selected(rows, [0], out), write_rejected([], out / "rejected.parquet")]
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [mode, mode]


def test_unicode_folder_with_spaces(save, alpaca, tmp_path):
    folder = tmp_path / "Ausgabe für 日本"
    folder.mkdir()
    rows = scan(save("in put/ä.jsonl.gz", [alpaca(0)]))
    assert [row.id for row in scan(write_selected(rows, [0], folder))] == ["r0"]


# ------------------------------------------------------------------ rejected rows


def test_rejected_rows_as_a_table(out):
    rejected = [Rejected(Where("ä.jsonl", 3), "empty output", "x"), Rejected(Where("b", 1), "invalid JSON")]
    path = write_rejected(iter(rejected), out / "rejected.parquet")
    assert pq.read_table(path).to_pylist() == [
        {"id": "x", "file": "ä.jsonl", "line": 3, "reason": "empty output"},
        {"id": None, "file": "b", "line": 1, "reason": "invalid JSON"},
    ]
    assert pq.read_table(write_rejected([], out / "none.parquet")).schema.names == [
        "id",
        "file",
        "line",
        "reason",
    ]


def test_every_reason_can_be_written(save, out):
    lines = [
        b'{"id": "\\ud800", "text": ""}',
        b'{"text": "a\\ud800"}',
        b"\xff",
        b'{"messages": [{"role": "\\ud800", "content": "x"}]}',
    ]
    rejected = list(read_rows(resolve_sources([str(save("a.jsonl", b"\n".join(lines)))])))
    assert len(rejected) == 4
    assert pq.read_table(write_rejected(rejected, out / "r.parquet")).num_rows == 4


# ------------------------------------------------------------------ other formats

CONTENT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("to", ["messages", "sharegpt", "alpaca", "prompt-completion"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_converted_rows_read_back_as_the_same_rows(tmp_path_factory, to, ending, data):
    folder = tmp_path_factory.mktemp("convert")
    longest = 1 if to == "prompt-completion" else 3
    records = []
    for i in range(data.draw(st.integers(1, 4))):
        exchanges = data.draw(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=longest))
        system = data.draw(st.sampled_from([[], [{"role": "system", "content": "Be brief."}]]))
        turns = [
            {"role": r, "content": c} for pair in exchanges for r, c in zip(("user", "assistant"), pair, strict=True)
        ]
        domain = data.draw(st.sampled_from([{}, {"domain": "d"}]))
        records.append({"id": f"r{i}", "messages": system + turns, "source": "s", **domain})
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = list(scan(folder / "in.jsonl", dedup=False))
    path = folder / f"out{ending}"
    assert convert_rows(rows, to, path) == (len(rows), [])
    again = list(scan(path, dedup=False))
    key = [(row.id, row.turns, row.domain, row.source) for row in rows]
    assert [(row.id, row.turns, row.domain, row.source) for row in again] == key


def test_rows_that_a_format_cannot_hold_are_left_out_with_the_reason(save, out):
    def chat(*roles: str) -> dict:
        return {"id": "-".join(roles), "messages": [{"role": role, "content": "x"} for role in roles]}

    records = [
        {"id": "t", "text": "x"},
        {"id": "c", "question": "q", "choices": ["a", "b"], "answer": 0},
        chat("user", "assistant"),
        chat("user", "tool", "assistant"),
        chat("user", "assistant", "user", "assistant"),
        chat("user", "assistant", "user"),
    ]
    rows = scan(save("a.jsonl", records), dedup=False)
    expected = {
        "messages": ["t", "c"],
        "sharegpt": ["t", "c"],
        "alpaca": ["t", "c", "user-tool-assistant", "user-assistant-user"],
        "prompt-completion": [
            "t",
            "c",
            "user-tool-assistant",
            "user-assistant-user-assistant",
            "user-assistant-user",
        ],
    }
    for to, missing in expected.items():
        count, left_out = convert_rows(rows, to, out / "x.jsonl")
        assert sorted(r.id for r in left_out) == sorted(missing)
        assert count == len((out / "x.jsonl").read_text().splitlines()) == len(records) - len(missing)
        assert all(r.reason for r in left_out)


def test_wrong_targets_are_named(out):
    with pytest.raises(ConfigError, match="unknown row format 'chatml'; allowed: messages, alpaca"):
        convert_rows([], "chatml", out / "x.jsonl")
    with pytest.raises(ConfigError, match=r"must end in \.jsonl, \.jsonl\.gz or \.parquet"):
        convert_rows([], "alpaca", out / "x.csv")


# ------------------------------------------------------------------ real rows


def test_real_selection_is_a_part_of_the_file(shared_data: Path, out):
    source = shared_data / "instruct" / "mixed_demo.jsonl.gz"
    rows = scan(source)
    path = write_selected(rows, range(0, len(rows), 10), out)
    original = gzip.decompress(source.read_bytes()).splitlines(keepends=True)
    assert gzip.decompress(path.read_bytes()) == b"".join(original[::10])
    assert [row.id for row in scan(path)] == rows.ids[::10]
