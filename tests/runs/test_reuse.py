"""What is reused between attempts, and that nothing damaged is: recipes, models, rows."""

from __future__ import annotations

import json
import shutil

import pytest

import honeloom
from honeloom.checkpoint.folders import read_config
from honeloom.errors import CheckpointError, HoneloomError, OutOfSpaceError, OutputExistsError, SourceError
from honeloom.planning.memory import read_decoder
from honeloom.runs import atomic
from honeloom.stages.inputs import adapter_base, resolve_model, resolve_rows
from honeloom.stages.lineage import trace
from honeloom.stages.row_records import CALIBRATION_FILE, ROWS_FILE, find_row, write_table


class Recorder:
    """A console that keeps what it is told."""

    def __init__(self):
        self.said, self.warned = [], []

    def say(self, text):
        self.said.append(text)

    def warn(self, text):
        self.warned.append(text)


def flip(path):
    """Change one bit in the middle; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.unlink()
    path.write_bytes(data)


@pytest.fixture
def three(tmp_path, rows):
    """Write a recipe of three selections whose last one keeps what is given."""

    def write(last):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"""version: 1
stages:
  pick: {{select: {{rows: {rows}, keep: 80%}}}}
  fewer: {{select: {{rows: $pick, keep: 50%}}}}
  least: {{select: {{rows: $fewer, {last}}}}}
""")
        return recipe

    return write


def test_a_mended_recipe_keeps_the_stages_of_the_failed_one(tmp_path, three):
    out = tmp_path / "place" / "out"
    with pytest.raises(HoneloomError, match="lies in it"):
        honeloom.run(three("split: [0.0, 1.0e-9]"), output_dir=out)
    (failed,) = out.parent.glob(".out.partial-*")
    (failed / "report.html").write_text("stale")
    before = {n: (failed / "stages" / n / "scores.parquet").stat().st_mtime_ns for n in ("1-pick", "2-fewer")}
    console = Recorder()
    honeloom.run(three("keep: 1"), output_dir=out, console=console)
    assert [s for s in console.said if s.endswith("reused")] == ["[1/3] pick: reused", "[2/3] fewer: reused"]
    assert {n: (out / "stages" / n / "scores.parquet").stat().st_mtime_ns for n in before} == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert honeloom.verify(out).status == "ok"
    page = out / "report.html"
    assert not page.exists() or page.read_text() != "stale"


def test_a_stage_whose_manifest_is_damaged_is_done_again(tmp_path, three):
    out = tmp_path / "place" / "out"
    with pytest.raises(HoneloomError, match="lies in it"):
        honeloom.run(three("split: [0.0, 1.0e-9]"), output_dir=out)
    (failed,) = out.parent.glob(".out.partial-*")
    (failed / "stages" / "2-fewer" / "manifest.json").write_text("{}")
    honeloom.run(three("keep: 1"), output_dir=out)
    assert honeloom.verify(out).status == "ok"


def test_an_interrupted_verb_with_other_settings_is_kept_and_named(tmp_path, rows):
    partial = tmp_path / ".out.partial-0123456789abcdef"
    partial.mkdir()
    (partial / "checkpoint").touch()
    console = Recorder()
    with pytest.raises(HoneloomError, match="none of the 12 rows"):
        honeloom.select(rows, output_dir=tmp_path / "out", split=(0, 1e-9), console=_tracking(console))
    assert (partial / "checkpoint").exists()
    assert [s for s in console.said if str(partial) in s and "--overwrite" in s] == console.said[:1]


def _tracking(console):
    from honeloom.runs.log import QuietConsole

    console.progress = QuietConsole().progress
    return console


def test_a_damaged_stage_of_a_finished_run_is_found_and_made_again(tmp_path, three):
    out, recipe = tmp_path / "out", three("keep: 1")
    honeloom.run(recipe, output_dir=out)
    flip(out / "stages" / "2-fewer" / "scores.parquet")
    with pytest.raises(OutputExistsError, match=r"stages/2-fewer/scores.parquet is damaged .*--resume or --overwrite"):
        honeloom.run(recipe, output_dir=out)
    console = _tracking(Recorder())
    assert not honeloom.run(recipe, output_dir=out, resume=True, console=console).reused
    assert "scores.parquet is damaged" in console.warned[0]
    assert honeloom.verify(out).status == "ok"
    assert honeloom.run(recipe, output_dir=out).reused


def test_a_damaged_result_of_a_verb_is_not_reused(tmp_path, rows):
    out = tmp_path / "out"
    honeloom.select(rows, output_dir=out)
    flip(out / "selected.jsonl")
    with pytest.raises(OutputExistsError, match=r"selected.jsonl is damaged \(wrong content\)"):
        honeloom.select(rows, output_dir=out)
    assert not honeloom.select(rows, output_dir=out, resume=True).reused
    assert honeloom.select(rows, output_dir=out).reused


def test_damaged_inputs_are_refused_by_name(tmp_path, rows, tiny_model, other_model):
    honeloom.merge({"models": [str(tiny_model), str(other_model)]}, tmp_path / "merged")
    honeloom.select(rows, output_dir=tmp_path / "picked", keep="50%")
    resolve_model(str(tmp_path / "merged"))
    resolve_rows(str(tmp_path / "picked"))
    flip(tmp_path / "merged" / "model.safetensors")
    flip(tmp_path / "picked" / "selected.jsonl")
    with pytest.raises(CheckpointError, match=r"merged/model.safetensors: damaged or changed since"):
        resolve_model(str(tmp_path / "merged"))
    for name in (tmp_path / "picked", tmp_path / "picked" / "selected.jsonl"):
        with pytest.raises(SourceError, match=r"picked/selected.jsonl: damaged or changed since"):
            resolve_rows(str(name))


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({"base_model_name_or_path": "org/name", "revision": "abc123"}, "org/name@abc123"),
        ({"base_model_name_or_path": "org/name", "revision": None}, "org/name"),
        ({"base_model_name_or_path": "org/name@old", "revision": "abc123"}, "org/name@old"),
        ({"base_model_name_or_path": "/somewhere/base", "revision": "abc123"}, "/somewhere/base"),
        ({"base_model_name_or_path": "lab:base", "revision": None}, "lab:base"),
        ({"base_model_name_or_path": None, "revision": "abc123"}, None),
    ],
)
def test_the_base_of_an_adapter_has_its_revision(tmp_path, settings, base):
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert adapter_base(tmp_path) == base


def test_an_existing_folder_named_like_a_hub_id_has_no_revision(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/name", "revision": "abc"}')
    assert adapter_base(tmp_path) == "org/name"


def test_lineage_follows_a_row_across_commands(tmp_path, tiny_model, other_model, monkeypatch):
    """A trained model, merged and merged again by separate commands."""
    trained = shutil.copytree(tiny_model, tmp_path / "trained")
    write_table(trained / ROWS_FILE, {"id": ["r1"], "question": [b"q"]})
    monkeypatch.chdir(tmp_path)
    honeloom.merge({"models": ["trained", str(other_model)]}, "merged")
    honeloom.merge({"models": ["merged", str(other_model)]}, "again")

    def fate(name, row):
        return [s["row"] for s in trace(tmp_path / name, row)["stages"]]

    assert fate("merged", "r1") == ["through trained"]
    assert fate("again", "r1") == ["through merged"]
    assert fate("again", "r2") == ["untouched"]


def test_calibration_rows_are_found(tmp_path):
    write_table(tmp_path / CALIBRATION_FILE, {"id": ["r1"]})
    assert find_row(tmp_path, "r1") == "calibrated on"
    assert find_row(tmp_path, "r2") is None


def test_no_stage_starts_without_room_for_its_result(tmp_path, rows, tiny_model, monkeypatch):
    """In fp32: the result, and three checkpoints with what is trained and AdamW's two moments."""
    usage = shutil.disk_usage(tmp_path)
    decoder, small = read_decoder(read_config(tiny_model)), (64 << 20) + rows.stat().st_size
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage._replace(free=small))
    full, lora = (small + 4 * n * (1 + 3 * 3) for n in (decoder.parameters, 8 * decoder.adapter_widths))
    with pytest.raises(OutOfSpaceError, match=f"{full:,} bytes are needed .* {small:,} are free"):
        honeloom.tune(tiny_model, rows, method="full", output_dir=tmp_path / "full")
    with pytest.raises(OutOfSpaceError, match=f"{lora:,} bytes are needed"):
        honeloom.tune(tiny_model, rows, output_dir=tmp_path / "lora")
    for verb, options in (("select", {}), ("evaluate", {"model": tiny_model})):
        with pytest.raises(OutOfSpaceError, match=f"{small:,} bytes are needed"):
            getattr(honeloom, verb)(rows=rows, output_dir=tmp_path / verb, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
