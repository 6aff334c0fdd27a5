"""The life of an output folder: what may be replaced, what is reused, what a failure leaves."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from honeloom.errors import ConfigError, OutOfSpaceError, OutputExistsError
from honeloom.runs.manifest import write_manifest
from honeloom.runs.output import is_complete, open_output


def publish(out, key="k1", content="one", **options):
    with open_output(out, key, "select", **options) as output:
        if not (output.reused or output.complete):
            (output.work / "result").write_text(content)
            output.finish()
    return output


def fail(out, error, key="k1", files=(), valuable=False, **options):
    with open_output(out, key, "tune", **options) as output:
        for name in files:
            (output.work / name).touch()
        output.valuable = valuable
        raise error


def holds(out):
    return (out / "result").read_text()


def test_new_then_reused_then_refused_then_replaced(tmp_path):
    out = tmp_path / "deep" / "out"
    assert not publish(out).reused
    before = (out / "result").stat().st_mtime_ns
    assert publish(out, content="never").reused
    assert (out / "result").stat().st_mtime_ns == before
    with pytest.raises(OutputExistsError, match=r"a result of `honeloom select` with other settings .*--overwrite"):
        publish(out, "k2", "two")
    assert holds(out) == "one"
    publish(out, "k2", "two", mode="resume")
    assert holds(out) == "two"
    publish(out, "k3", "three", mode="overwrite")
    assert holds(out) == "three"
    publish(out, "k3", "again", mode="overwrite", reuse=False)
    assert holds(out) == "again"
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_an_empty_folder_is_taken_and_a_foreign_one_only_with_overwrite(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    publish(out)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    for mode in ("new", "resume"):
        with pytest.raises(OutputExistsError, match="it holds other files"):
            publish(foreign, mode=mode)
    assert (foreign / "thesis.tex").read_text() == "years of work"
    publish(foreign, mode="overwrite")
    assert sorted(os.listdir(foreign)) == ["manifest.json", "result"]


def test_the_old_result_stays_until_the_new_is_complete(tmp_path):
    out = tmp_path / "out"
    publish(out)
    with open_output(out, "k2", "select", mode="overwrite") as output:
        (output.work / "result").write_text("two")
        assert holds(out) == "one"
        assert is_complete(out, "k1")
        output.finish()
        assert holds(out) == "one"
    assert holds(out) == "two"


@pytest.mark.parametrize("mode", ["new", "resume", "overwrite"])
def test_a_folder_that_holds_the_place_the_home_or_an_input_is_never_replaced(tmp_path, monkeypatch, mode):
    out = tmp_path / "out"
    (out / "inside").mkdir(parents=True)
    rows = out / "inside" / "rows.jsonl"
    rows.write_text("{}")
    (tmp_path / "link").symlink_to(rows)
    with pytest.raises(OutputExistsError, match="which this command reads or stands in"):
        publish(out, mode=mode, inputs=[tmp_path / "link"])
    with pytest.raises(OutputExistsError, match=f"{rows}, which"):
        publish(rows.parent, mode=mode, inputs=[rows])
    monkeypatch.setenv("HOME", str(out / "inside"))
    with pytest.raises(OutputExistsError, match="reads or stands in"):
        publish(out, mode=mode)
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    monkeypatch.chdir(out / "inside")
    with pytest.raises(OutputExistsError, match="reads or stands in"):
        publish(out, mode=mode)
    assert rows.read_text() == "{}"


def test_the_current_folder_is_not_swapped_away_even_when_empty(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputExistsError, match="here is a folder, which"):
        publish(Path("."))


@pytest.mark.parametrize("name", ["/", "//", "a\nb", "a\0b", "a\x7f"])
def test_names_that_can_be_no_output(name):
    with pytest.raises(ConfigError, match="output folder"):
        publish(Path(name))


def test_a_file_as_out_or_on_the_way_to_it(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(OutputExistsError, match="is a file; --output-dir must name a folder"):
        publish(tmp_path / "file", mode="overwrite")
    with pytest.raises(OutputExistsError, match="file is a file, so no folder can lie in it"):
        publish(tmp_path / "file" / "a" / "out", mode="overwrite")
    assert (tmp_path / "file").read_text() == "text"


def test_a_link_as_out_is_followed_and_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk" / "result-1")
    publish(link)
    publish(link, "k2", "two", mode="overwrite")
    assert link.is_symlink()
    assert holds(tmp_path / "disk" / "result-1") == "two"


def test_names_with_spaces_letters_and_glob_signs(tmp_path):
    for name in ("mit Leerzeichen", "größe 模型", "[a]*?", "-rf"):
        out = tmp_path / name
        assert publish(out).final == out
        assert publish(out).reused


def test_umask_077(tmp_path):
    before = os.umask(0o077)
    try:
        publish(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "out" / "result").stat().st_mode & 0o777 == 0o600
    assert publish(tmp_path / "out").reused


def test_a_damaged_result_is_not_reused(tmp_path):
    out = tmp_path / "out"
    publish(out)
    (out / "result").write_text("short"[:2])
    with pytest.raises(OutputExistsError):
        publish(out, "k9")
    assert not publish(out, "k1", "one", mode="resume").reused
    assert holds(out) == "one"


def test_an_interrupted_swap_is_undone_or_finished(tmp_path):
    out, old = tmp_path / "out", tmp_path / ".out.old"
    publish(out)
    out.rename(old)  # killed between the two renames
    assert publish(out).reused
    assert os.listdir(tmp_path) == ["out"]
    publish(tmp_path / "other", "k0")
    (tmp_path / "other").rename(old)  # killed before the old one was removed
    assert publish(out).reused
    assert os.listdir(tmp_path) == ["out"]


def test_an_interrupted_attempt_is_resumed_with_its_key_and_removed_with_another(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fail(out, KeyboardInterrupt(), files=["checkpoint", ".x.json.tmp-1-00000000"])
    assert not out.exists()
    with open_output(out, "k1", "tune") as output:
        assert output.resumed
        assert os.listdir(output.work) == ["checkpoint"]
    with open_output(out, "k2", "tune") as output:
        assert not output.resumed
        assert os.listdir(output.work) == []
        output.finish()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OutOfSpaceError("full"), OSError(errno.EIO, "I/O error"), ConfigError("bad")])
def test_a_failure_leaves_the_old_result_and_nothing_else(tmp_path, error):
    out = tmp_path / "out"
    publish(out)
    with pytest.raises(type(error)):
        fail(out, error, "k2", ["half"], mode="overwrite")
    assert os.listdir(tmp_path) == ["out"]
    assert holds(out) == "one"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ConfigError("no such device")])
def test_a_failure_keeps_what_an_earlier_attempt_or_a_finished_stage_left(tmp_path, error):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fail(out, KeyboardInterrupt(), files=["checkpoint"])
    with pytest.raises(type(error)):
        fail(out, error)
    with open_output(out, "k1", "tune") as output:
        assert os.listdir(output.work) == ["checkpoint"]
    run = tmp_path / "run"
    with pytest.raises(type(error)):
        fail(run, error, valuable=True)
    with open_output(run, "k1", "run") as output:
        assert output.resumed


def test_an_attempt_with_other_settings_stays_until_overwrite_or_a_result(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fail(out, KeyboardInterrupt(), files=["checkpoint"])
    old = tmp_path / ".out.partial-k1"
    with open_output(out, "k2", "tune") as output:
        assert output.kept == (old,)
        assert os.listdir(old) == ["checkpoint"]
    with open_output(out, "k3", "tune", mode="overwrite") as output:
        assert output.kept == ()
        assert not old.exists()
        output.finish()
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(KeyboardInterrupt):
        fail(out, KeyboardInterrupt(), "k4", files=["checkpoint"], mode="resume")
    publish(out, "k5", mode="resume")
    assert os.listdir(tmp_path) == ["out"]


def test_an_interrupted_run_is_taken_over_with_its_stages_only(tmp_path):
    out = tmp_path / "out"
    stale = tmp_path / ".out.partial-k1"
    (stale / "stages" / "1-pick").mkdir(parents=True)
    (stale / "report.html").write_text("of the other recipe")
    write_manifest(stale, "k1", "run")
    with pytest.raises(KeyboardInterrupt):
        fail(out, KeyboardInterrupt(), "k2", files=["checkpoint"])
    with open_output(out, "k3", "run") as output:
        assert (output.resumed, output.complete) == (True, False)
        assert os.listdir(output.work) == ["stages"]
        assert os.listdir(output.work / "stages") == ["1-pick"]
        assert output.kept == (tmp_path / ".out.partial-k2",)
        output.finish()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("content", ["onE", "o"])
def test_a_damaged_result_is_named_and_made_again_only_when_asked(tmp_path, content):
    out = tmp_path / "out"
    publish(out)
    (out / "result").write_text(content)
    with pytest.raises(OutputExistsError, match=r"result is damaged \(wrong (content|size)\); pass --resume or"):
        publish(out)
    output = publish(out, mode="resume")
    assert (output.reused, output.damage.file) == (False, "result")
    assert holds(out) == "one"
    (out / "notes.txt").write_text("mine")
    assert publish(out).reused
