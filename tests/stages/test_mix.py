"""`mix` as a whole: equal bytes whatever interrupts it, plans that load nothing, and results that evaluate."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import honeloom
from honeloom.stages import mix as stage
from honeloom.stages import mix_router


def digests(folder):
    """Of what the result is; reports hold times."""
    names = ("model.safetensors", "config.json", "mix.yaml", "tokenizer.json")
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}


@pytest.fixture
def recipe(tiny_model, other_model, make_rows):
    """A mixture whose gates are made from rows, and then trained."""
    own = [make_rows(8, "one.jsonl"), make_rows(10, "two.jsonl")]
    models = (tiny_model, other_model)
    return {
        "experts": [{"model": str(m), "rows": [str(r)]} for m, r in zip(models, own, strict=True)],
        "router": "rows", "tune_router": {"steps": 3, "rows": [str(own[0])], "batch_size": 2},
    }  # fmt: skip


class Stopped(Exception):
    """The attempt ends here."""


@pytest.mark.parametrize("at", ["lay_out", "write_small_files", "tune", "patch_gates", "verify_mixture"])
def test_an_interrupted_mix_goes_on_to_the_same_bytes(recipe, tmp_path, monkeypatch, at):
    honeloom.mix(recipe, tmp_path / "clean")

    def stop(*args, **kwargs):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(stage, at, stop)
        with pytest.raises(Stopped):
            honeloom.mix(recipe, tmp_path / "out")
    made = []
    original = mix_router._made

    def counted(*args):
        made.append(1)
        return original(*args)

    monkeypatch.setattr(mix_router, "_made", counted)
    honeloom.mix(recipe, tmp_path / "out", resume=True)
    assert not made  # the gates are measured once
    assert digests(tmp_path / "out") == digests(tmp_path / "clean")
    assert not list(tmp_path.glob(".out.partial-*"))
    assert not (tmp_path / "out" / mix_router.FOLDER).exists()


def test_killed_and_resumed_is_the_uninterrupted_mix(tmp_path, tiny_model, other_model):
    """kill -9 while tensors are written; the journal lists what the disk holds, and only the rest is written."""
    settings = {"experts": [str(tiny_model), str(other_model)], "router": "random", "dtype": "bf16"}
    (tmp_path / "mix.yaml").write_text(json.dumps(settings))
    script = tmp_path / "slow.py"
    script.write_text(
        "import time\n"
        "import honeloom.checkpoint.writer as writer\n"
        "import honeloom.stages.mix_write as mix_write\n"
        "writer.SYNC_BYTES = 1\n"
        "pieces = mix_write._pieces\n"
        "def slowly(*args):\n"
        "    time.sleep(0.15)\n"
        "    yield from pieces(*args)\n"
        "mix_write._pieces = slowly\n"
        "from honeloom.cli.main import main\n"
        "main()\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, str(script), "mix", str(tmp_path / "mix.yaml"), str(out), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            journals = list(tmp_path.glob(".out.partial-*/mix.journal"))
            if journals and journals[0].read_text().count("\n") >= 3:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    done = journals[0].read_text().count("\n")
    assert done >= 3
    honeloom.mix(tmp_path / "mix.yaml", out)
    assert any(f"{done} of" in line for line in (out / "events.jsonl").read_text().splitlines())
    assert not (out / "mix.journal").exists()
    honeloom.mix(tmp_path / "mix.yaml", tmp_path / "clean")
    assert digests(out) == digests(tmp_path / "clean")


@pytest.mark.slow
def test_bytes_depend_on_neither_threads_nor_hash_seed(recipe, tmp_path):
    (tmp_path / "mix.yaml").write_text(json.dumps(recipe))
    found = []
    for seed, threads in (("1", "1"), ("77", "2")):
        out = tmp_path / f"out{seed}"
        subprocess.run(
            [sys.executable, "-m", "honeloom", "mix", str(tmp_path / "mix.yaml"), str(out), "--threads", threads],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}, check=True, capture_output=True,
        )  # fmt: skip
        found.append(digests(out))
    assert found[0] == found[1]


def test_the_result_of_a_mix_is_made_again_from_its_mix_yaml(recipe, tmp_path):
    first = honeloom.mix(recipe, tmp_path / "one")
    second = honeloom.mix(tmp_path / "one" / "mix.yaml", tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert first.artefact.sha256 == second.artefact.sha256


def test_a_plan_says_what_will_be_without_reading_weights(recipe, tmp_path, tiny_model, other_model):
    from honeloom.config.base import collect_inputs, validate
    from honeloom.mixture.config import MixConfig
    from honeloom.stages.inputs import Resolver
    from honeloom.stages.mix_plan import mix_notes

    def notes(**settings):
        config = validate(MixConfig, settings, what="mix")
        resolver = Resolver()
        return mix_notes(config, {f.place: resolver.resolve(f) for f in collect_inputs(config)})

    report = honeloom.mix(recipe, tmp_path / "out")
    told = notes(**recipe)
    params = report.details["params"]
    assert "format: mixtral" in told
    assert f"parameters: {params['total']:,}, of which a token uses {params['active']:,}" in told
    assert any(f"reads {report.details['bytes_read']:,} bytes" in line for line in told)
    three = notes(experts=[str(tiny_model)] * 3, router="random", dense_layers=1)
    assert any("3 experts are no power of two" in line for line in three)
    whole = notes(experts=[str(tiny_model), str(other_model)], router="random", level="model")
    assert any(line.startswith("format: honeloom_models") for line in whole)
    assert any("loads in honeloom alone" in line for line in whole)


def test_no_part_of_a_plan_needs_torch(recipe, tmp_path):
    (tmp_path / "mix.yaml").write_text(json.dumps(recipe))
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from honeloom.config.base import collect_inputs, validate\n"
        "from honeloom.mixture.config import MixConfig\n"
        "from honeloom.stages.inputs import Resolver\n"
        "from honeloom.stages.mix_plan import mix_notes\n"
        "config = validate(MixConfig, json.loads(Path(sys.argv[1]).read_text()), what='mix')\n"
        "resolver = Resolver()\n"
        "assert mix_notes(config, {f.place: resolver.resolve(f) for f in collect_inputs(config)})\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "mix.yaml")], check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("level", "format_"), [("ffn", "auto"), ("block", "auto"), ("model", "auto")])
def test_a_mixture_is_a_model_to_every_verb(recipe, tmp_path, level, format_):
    settings = {k: v for k, v in recipe.items() if k != "tune_router"}
    report = honeloom.mix({**settings, "level": level, "format": format_}, tmp_path / "out")
    assert report.status == "ok"
    rows = recipe["experts"][0]["rows"]
    measured = honeloom.evaluate(tmp_path / "out", rows=rows)
    assert all(m.value is None or m.value > 0 for m in measured.metrics)


def test_two_equal_models_evaluate_as_one(tmp_path, tiny_model, rows):
    dense = honeloom.evaluate(tiny_model, rows=[rows])
    for level in ("ffn", "block", "model"):
        honeloom.mix({"experts": [str(tiny_model)] * 2, "router": "random", "level": level}, tmp_path / level)
        mixed = honeloom.evaluate(tmp_path / level, rows=[rows])
        for one, other in zip(dense.metrics, mixed.metrics, strict=True):
            assert other.value == pytest.approx(one.value, abs=1e-5)


def test_the_card_names_the_parents(recipe, tmp_path):
    honeloom.mix(recipe, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert Path(recipe["experts"][0]["model"]).name in card
