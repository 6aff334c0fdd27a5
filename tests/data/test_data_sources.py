"""What a ROWS argument resolves to, and how a wrong one is told."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from honeloom.data import RowFile, fingerprint, resolve_sources
from honeloom.data.reader import read_rows
from honeloom.errors import SourceError

LINE = b'{"text": "one line"}\n'


def resolve(*args: object, **options: object) -> tuple[RowFile, ...]:
    return resolve_sources([str(arg) for arg in args], **options)


@pytest.mark.parametrize(
    ("name", "content", "form", "compression"),
    [
        ("a.jsonl", LINE, "jsonl", ""),
        ("a.JSONL.GZ", LINE, "jsonl", "gz"),
        ("a.jsonl.zst", LINE, "jsonl", "zst"),
        ("a.json", b" \n[{}]", "json", ""),
        ("a.json", LINE, "jsonl", ""),
        ("a.json.gz", b"\xef\xbb\xbf[{}]", "json", "gz"),
        ("a.csv", b"text\nx\n", "csv", ""),
        ("a.tsv.gz", b"text\nx\n", "tsv", "gz"),
        ("a.txt", b"x\n", "text", ""),
        ("a.parquet", b"", "parquet", ""),
        ("a.arrow", b"", "arrow", ""),
    ],
)
def test_format_and_compression_come_from_the_name(save, name, content, form, compression):
    if name.endswith(".GZ"):
        path = save("a.jsonl.gz", content).rename(save("b", b"").parent / name)
    else:
        path = save(name, content)
    (file,) = resolve(path)
    assert (file.format, file.compression, file.label) == (form, compression, str(path))


def test_stem_is_the_name_without_its_endings(save):
    (file,) = resolve(save("gsm8k.v2.jsonl.gz", LINE))
    assert file.stem == "gsm8k.v2"
    assert resolve("lab:dev")[0].stem == "lab-dev"


def test_glob_is_sorted_and_leaves_other_files_out(save, tmp_path):
    for name in ("b.jsonl", "a.jsonl", "notes.md", "state.json"):
        save(name, LINE)
    assert [Path(f.label).name for f in resolve(tmp_path / "*")] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(SourceError, match=r"matches only .*notes\.md"):
        resolve(tmp_path / "*.md")
    with pytest.raises(SourceError, match="matches nothing"):
        resolve(tmp_path / "*.parquet")


def test_file_whose_name_looks_like_a_glob(save):
    path = save("a[1].jsonl", LINE)
    assert resolve(path)[0].path == path


def test_plain_folder(save, tmp_path):
    save("d/b.jsonl", LINE)
    save("d/a.csv", b"text\nx\n")
    save("d/README.md", b"")
    assert [f.label for f in resolve(f"{tmp_path}/d/")] == [f"{tmp_path}/d/a.csv", f"{tmp_path}/d/b.jsonl"]
    save("e/README.md", b"")
    with pytest.raises(SourceError, match=r"holds no row files \(it holds: README\.md\)"):
        resolve(tmp_path / "e")


def test_our_output_folder_is_its_selection(save, tmp_path):
    save("out/manifest.json", b"{}")
    save("out/rejected.parquet", b"")
    save("out/evaluations.jsonl", b"")
    path = save("out/selected.jsonl.gz", LINE)
    assert [f.path for f in resolve(tmp_path / "out")] == [path]
    path.unlink()
    with pytest.raises(SourceError, match="0 files named selected"):
        resolve(tmp_path / "out")


def test_saved_dataset_and_saved_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(10)])
    data.save_to_disk(str(tmp_path / "one"), num_shards=3)
    rows = list(read_rows(resolve(tmp_path / "one")))
    assert [row.text for row in rows] == [f"row {i}" for i in range(10)]
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "dict"))
    assert len(list(read_rows(resolve(tmp_path / "dict")))) == 10
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(SourceError, match=r"splits train, test: name one"):
        resolve(tmp_path / "both")
    assert len(list(read_rows(resolve(tmp_path / "both" / "test")))) == 10
    data.select([1, 0]).save_to_disk(str(tmp_path / "indexed"))
    assert [row.text for row in read_rows(resolve(tmp_path / "indexed"))] == ["row 1", "row 0"]


def test_hub_id_is_fetched_only_where_nothing_is_on_disk(save, tmp_path, monkeypatch):
    save("hub/data/train-00000.jsonl", LINE)
    save("hub/data/test-00000.jsonl", LINE)
    asked: list[str] = []

    def fetch(name: str) -> Path:
        asked.append(name)
        return tmp_path / "hub"

    (file,) = resolve("org/name@v1.0", fetch_hub=fetch)
    assert asked == ["org/name@v1.0"]
    assert (file.label, file.from_hub) == ("org/name@v1.0/data/train-00000.jsonl", True)
    monkeypatch.chdir(tmp_path)
    save("org/name/a.jsonl", LINE)
    assert resolve("org/name", fetch_hub=fetch)[0].label == "org/name/a.jsonl"
    with pytest.raises(SourceError, match="hub data sets cannot be fetched"):
        resolve("org/other")
    for looks_like_a_path in ("./org/other", "org/other.jsonl", "/org/other", "a/b/c", "other.jsonl"):
        with pytest.raises(SourceError, match="no such file"):
            resolve(looks_like_a_path, fetch_hub=fetch)
    assert len(asked) == 1


def test_missing_file_names_its_neighbours(save, tmp_path):
    save("train.jsonl", LINE)
    with pytest.raises(SourceError, match=r"no such file or folder: .*trian\.jsonl; did you mean .*/train\.jsonl"):
        resolve(tmp_path / "trian.jsonl")
    with pytest.raises(SourceError, match="does not exist either"):
        resolve(tmp_path / "nowhere" / "train.jsonl")


@pytest.mark.parametrize("name", ["a\nb.jsonl", "a\x00.jsonl", "a\x1b[2J.jsonl", "a\x85.jsonl", "a\udcff.jsonl", ""])
def test_names_with_control_characters_are_refused(name):
    with pytest.raises(SourceError, match=r"character|empty"):
        resolve_sources([name])


def test_folder_that_holds_a_hostile_name(save, tmp_path):
    save("d/a\nb.jsonl", LINE)
    with pytest.raises(SourceError, match=r"U\+000A"):
        resolve(tmp_path / "d")


def test_what_is_no_row_file(save, tmp_path):
    with pytest.raises(SourceError, match=r"no ending that tells its format; allowed: \.jsonl"):
        resolve(save("a.bin", b""))
    with pytest.raises(SourceError, match="no ending"):
        resolve(save("a.parquet.gz", b""))
    with pytest.raises(SourceError, match="at least one"):
        resolve()
    with pytest.raises(SourceError, match="lab:pool, lab:dev and lab:test"):
        resolve("lab:train")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(SourceError, match="not a regular file"):
        resolve(tmp_path / "pipe.jsonl")
    with pytest.raises(SourceError, match="cannot read"):
        resolve(tmp_path / ("x" * 300 + ".jsonl"))


def test_unicode_path_with_spaces(save):
    path = save("Ordner mit Leerzeichen/Zeilen für 日本.jsonl", LINE)
    (row,) = read_rows(resolve(path))
    assert str(row.where) == f"{path}:1"
    assert row.source == "Zeilen für 日本"


def test_lab_rows_and_their_fingerprint(monkeypatch):
    lab = ModuleType("honeloom.lab")
    lab.rows = lambda split: iter([{"id": f"{split}-{i}", "text": f"{split} {i}"} for i in range(3)])
    monkeypatch.setitem(sys.modules, "honeloom.lab", lab)
    rows = list(read_rows(resolve("lab:pool")))
    assert (rows[0].id, rows[0].text, str(rows[0].where)) == ("pool-0", "pool 0", "lab:pool:1")
    assert fingerprint(resolve("lab:pool")) == fingerprint(resolve("lab:pool"))
    assert fingerprint(resolve("lab:pool")) != fingerprint(resolve("lab:dev"))


def test_fingerprint_is_of_contents_in_order_and_not_of_names(save):
    a, b, c = save("a.jsonl", LINE), save("b.jsonl", LINE + LINE), save("c.jsonl", LINE)
    assert fingerprint(resolve(a, b)) == fingerprint(resolve(c, b))
    assert fingerprint(resolve(a, b)) != fingerprint(resolve(b, a))
    # Moving a line from one file to the next is a change too.
    assert fingerprint(resolve(a, b)) != fingerprint(resolve(b, c))
    assert len(fingerprint(resolve(a))) == 64


def test_saved_dataset_with_a_missing_part(save, tmp_path):
    save("d/state.json", json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}).encode())
    with pytest.raises(SourceError, match=r"lacks data-0\.arrow"):
        resolve(tmp_path / "d")
    save("d/state.json", b"[]")
    with pytest.raises(SourceError, match="names no data files"):
        resolve(tmp_path / "d")
