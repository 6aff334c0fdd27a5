"""Atomic writes and the names they leave behind; keys; redaction."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections import namedtuple

import pytest

from honeloom.errors import OutOfSpaceError
from honeloom.runs import atomic
from honeloom.runs.atomic import canonical_json, remove_temporaries, require_space, write_bytes, write_json
from honeloom.runs.keys import combine_digests, stage_key
from honeloom.runs.redact import redact, redact_tree


@pytest.mark.parametrize("step", [0, 1])
def test_a_write_that_fails_leaves_the_old_content_and_no_temporary(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    calls = []

    def full(label):
        calls.append(label)
        if len(calls) > step:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "observers", [full])
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert calls == ["fsync file", "rename file"][: step + 1]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_only_temporaries_of_the_writer_are_removed(tmp_path):
    (tmp_path / "sub").mkdir()
    gone = [tmp_path / ".report.json.tmp-123-0a1b2c3d", tmp_path / "sub" / ".x.tmp-9-ffffffff"]
    kept = [tmp_path / "report.json", tmp_path / ".x.tmp-notes", tmp_path / "a.tmp-1-ffffffff"]
    for file in gone + kept:
        file.touch()
    remove_temporaries(tmp_path)
    assert [p.exists() for p in gone] == [False, False]
    assert all(p.exists() for p in kept)


def test_json_refuses_what_it_cannot_spell(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert os.listdir(tmp_path) == []


def test_space_is_asked_for_before_it_is_used(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage(2000, 0, 1100))
    require_space(tmp_path / "not" / "there", 1000)
    with pytest.raises(OutOfSpaceError, match=r"1,001 bytes are needed .* 1,100 are free"):
        require_space(tmp_path, 1001)


def test_a_key_depends_on_settings_version_and_content_and_not_on_key_order():
    key = stage_key("select", 1, {"a": 1, "b": [2]}, ["f1", "f2"])
    assert key == stage_key("select", 1, {"b": [2], "a": 1}, ["f1", "f2"])
    others = [
        stage_key("merge", 1, {"a": 1, "b": [2]}, ["f1", "f2"]),
        stage_key("select", 2, {"a": 1, "b": [2]}, ["f1", "f2"]),
        stage_key("select", 1, {"a": 1.5, "b": [2]}, ["f1", "f2"]),
        stage_key("select", 1, {"a": 1, "b": [2]}, ["f2", "f1"]),
    ]
    assert len({key, *others}) == 5
    assert len(key) == 16


def test_canonical_json_and_folder_digest_are_the_documented_ones():
    assert canonical_json({"b": "é", "a": [1, None]}) == '{"a":[1,null],"b":"é"}'
    # printf 'a 1\nb 2\n' | sha256sum
    assert combine_digests({"b": "2", "a": "1"}) == "2951835de33689a441bfa61bc7af99b1f0305ca8ec0ab4dd508f14f57b27ca23"


def test_secrets_are_blanked_and_ordinary_names_are_not(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdef0123456789")
    monkeypatch.setenv("TOKENIZERS_CACHE", "/data/tokenizers")
    token = "hf_" + "Ab1" * 11
    assert redact(f"x {token} y abcdef0123456789") == "x [secret] y [secret]"
    assert redact("/data/tokenizers/hf_models2024/task-1") == "/data/tokenizers/hf_models2024/task-1"
    assert redact_tree({"k": [token, 1, {token: None}]}) == {"k": ["[secret]", 1, {"[secret]": None}]}


KEY = """
from honeloom.config.base import collect_inputs
from honeloom.selection.config import SelectConfig
from honeloom.stages.inputs import Resolver
from honeloom.stages.runner import prepare
import sys
print(prepare("select", SelectConfig(rows=sys.argv[1], method="length", model=sys.argv[2]), Resolver()).key)
"""


def test_keys_ignore_mtime_hash_seed_locale_and_place(rows, tiny_model, tmp_path):
    def key(**env):
        run = [sys.executable, "-c", KEY, str(rows), str(tiny_model)]
        done = subprocess.run(run, env={**os.environ, **env}, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    first = key(PYTHONHASHSEED="0", LC_ALL="C")
    os.utime(rows, (1, 1))
    moved = tmp_path / "elsewhere.jsonl"
    rows.rename(moved)
    rows = moved
    assert key(PYTHONHASHSEED="1", LC_ALL="tr_TR.UTF-8", TZ="Pacific/Kiritimati") == first
    rows.write_text(rows.read_text().replace("It is 3.", "It is 4."))
    assert key() != first
