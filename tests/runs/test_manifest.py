"""The manifest finds every change of a finished folder and names the file."""

from __future__ import annotations

import json
import shutil
import stat

import pytest

import honeloom
from honeloom.errors import SourceError
from honeloom.runs.manifest import MANIFEST, load_manifest, refresh_manifest, verify_folder, write_manifest


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "a.txt").write_bytes(b"alpha")
    (out / "sub" / "b.json").write_bytes(b"[1, 2]")
    (out / "empty").write_bytes(b"")
    (out / "sub" / "manifest.json").write_bytes(b"{}")
    write_manifest(out, "k" * 16, "select")
    return out


def problems(folder):
    return [(p.file, p.problem) for p in verify_folder(folder)[1]]


def test_content(folder):
    document = json.loads((folder / MANIFEST).read_bytes())
    assert list(document) == ["schema", "verb", "key", "files", "checksum"]
    assert document["schema"] == "honeloom.manifest/1"
    assert document["files"]["a.txt"] == {
        "size": 5,
        "sha256": "8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223f8",
    }
    assert list(document["files"]) == ["a.txt", "empty", "sub/b.json", "sub/manifest.json"]
    assert verify_folder(folder) == (4, [])


@pytest.mark.parametrize("name", ["a.txt", "sub/b.json", "sub/manifest.json"])
def test_every_flipped_byte_is_found(folder, name):
    path = folder / name
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        assert problems(folder) == [(name, "wrong content")]


def test_every_flipped_byte_of_the_manifest_is_found(folder):
    path = folder / MANIFEST
    whole = path.read_bytes()
    for i in range(len(whole)):
        other = ord("\t") if whole[i] in b" \n" else whole[i] ^ 1  # a tab would be the same JSON
        path.write_bytes(whole[:i] + bytes([other]) + whole[i + 1 :])
        assert load_manifest(folder) is None, (i, other)
    assert problems(folder) == [(MANIFEST, "damaged: its content does not match its own checksum")]


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"checksum": 1}', "[" * 100_000, '{"schema": "\\ud800", "checksum": NaN}', "9" * 10_000]
)
def test_what_is_no_manifest_is_damaged_and_never_a_crash(folder, text):
    (folder / MANIFEST).write_text(text)
    assert load_manifest(folder) is None
    assert len(problems(folder)) == 1


def test_truncated_missing_and_extra_files_are_named(folder):
    (folder / "a.txt").write_bytes(b"alph")
    (folder / "empty").unlink()
    (folder / "sub" / "new").write_bytes(b"")
    (folder / "sub" / "link").symlink_to("/etc/hostname")
    count, found = verify_folder(folder)
    assert count == 4
    assert [(p.file, p.problem, p.expected, p.found) for p in found] == [
        ("a.txt", "wrong size", 5, 4),
        ("empty", "missing", 0, None),
        ("sub/link", "not in the manifest", None, "sub/link"),
        ("sub/new", "not in the manifest", None, "sub/new"),
    ]


def test_no_manifest_and_no_folder(folder, tmp_path):
    (folder / MANIFEST).unlink()
    assert problems(folder) == [(MANIFEST, "missing: not a finished honeloom result")]
    with pytest.raises(SourceError, match="is not a folder"):
        verify_folder(tmp_path / "nowhere")


def test_refresh_takes_in_the_named_file_only(folder):
    (folder / "a.txt").write_bytes(b"changed")
    (folder / "z.html").write_bytes(b"page")
    refresh_manifest(folder, ["z.html"])
    assert problems(folder) == [("a.txt", "wrong size")]


def test_a_private_file_gets_the_folder_s_rights(tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o755)
    (out / "private").touch(mode=0o600)
    write_manifest(out, "k", "merge")
    assert stat.S_IMODE((out / "private").stat().st_mode) == 0o644


def test_verify_looks_inside_weights_whose_hash_is_right(folder, tiny_model):
    shutil.copy(tiny_model / "model.safetensors", folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[0:8] = (2**63).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(data)
    write_manifest(folder, "k", "merge")
    report = honeloom.verify(folder)
    assert report.status == "failed"
    assert [p["file"] for p in report.details["problems"]] == ["model.safetensors"]
