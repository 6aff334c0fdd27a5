"""One job in several processes, on the CPU over gloo."""

import json
import os
import socket
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from safetensors.torch import load_file

import honeloom
from honeloom.errors import ConfigError
from honeloom.tuning.config import TuneConfig

PROFILE = files("honeloom.planning") / "fsdp2.yaml"


def test_only_tune_spreads_over_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="evaluate works in one process, and WORLD_SIZE is 2; only tune"):
        honeloom.evaluate("lab:base", rows="lab:dev", limit=2)


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(tmp_path):
    """Two processes with batches of 4 take the steps of one with batches of 8.

    With SGD: AdamW divides by gradients that are near zero at first and makes rounding visible.
    """
    settings = ["lab:base", "lab:dev", "--max-steps", "4", "--optimizer", "sgd", "--lr", "0.1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "honeloom"]
    command = [*launch, "tune", *settings, "--batch-size", "4", "--output-dir", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(tmp_path / "two")
    assert done.stdout.splitlines().count(str(tmp_path / "two")) == 1  # only the leading process speaks
    assert compare(tmp_path, "lora") > 1e-3


@pytest.mark.slow
def test_an_adapter_has_the_same_bytes_whatever_the_hash_seed(tmp_path, tiny_model, rows):
    """PEFT holds the names of modules in a set, and would write them in the order of their hashes."""
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "honeloom", "tune", str(tiny_model), str(rows), "--max-steps", "1"]
        subprocess.run(
            [*command, "--output-dir", str(tmp_path / seed)], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
            capture_output=True,
        )  # fmt: skip
    for name in ("adapter_config.json", "adapter_model.safetensors", "inputs.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


HEARD = """
import os, torch
from honeloom.backends.hf.tune import _heard_anywhere
torch.distributed.init_process_group("gloo")
told = [_heard_anywhere(n, torch.device("cpu")) for n in (None, 15 if os.environ["RANK"] == "1" else None)]
open(os.environ["TOLD"] + os.environ["RANK"], "w").write(str(told))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_signal_to_one_process_is_heard_by_all(tmp_path):
    """All must stop at the same step: one that went on alone would wait for the others for ever."""
    (tmp_path / "heard.py").write_text(HEARD)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "TOLD": str(tmp_path / "told-")}
    command = [*launch, str(tmp_path / "heard.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)] == ["[None, 15]"] * 2


@pytest.mark.slow
def test_a_last_step_that_is_not_full_trains_no_row_twice(tmp_path):
    """17 rows in batches of 2 x 4: the second process has nothing in the last step, and must add nothing."""
    settings = ["--epochs", "1", "--limit", "17", "--optimizer", "sgd", "--lr", "0.1", "--batch-size", "4"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "honeloom"]
    command = [*launch, "tune", "lab:base", "lab:dev", *settings, "--output-dir", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one = honeloom.tune(
        "lab:base", "lab:dev", epochs=1, limit=17, optimizer="sgd", lr=0.1, batch_size=8, output_dir=tmp_path / "one"
    )
    pair = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two")]
    assert max(float((pair[0][k] - pair[1][k]).abs().max()) for k in pair[0]) < 1e-5
    two = json.loads((tmp_path / "two/report.json").read_text())["details"]
    assert (two["processes"], two["rows_per_step"], two["steps"]) == (2, 8, one.details["steps"])


def test_the_number_of_processes_is_part_of_the_key(monkeypatch, tiny_model, rows):
    keys = []
    for count in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", count)
        keys.append(honeloom.plan("tune", model=tiny_model, rows=rows)[0].key)
    assert keys[0] != keys[1]


def compare(folder: Path, method: str) -> float:
    """Hold the result of two processes to that of one; how far training went from the start."""
    steps = {"max_steps": 4, "optimizer": "sgd", "lr": 0.1, "batch_size": 8}
    honeloom.tune("lab:base", "lab:dev", method=method, output_dir=folder / "one", **steps)
    file = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    one, two = (load_file(folder / n / file) for n in ("one", "two"))
    assert max(float((one[k].float() - two[k].float()).abs().max()) for k in one) < 1e-5
    assert honeloom.verify(folder / "two").status == "ok"
    assert not [p for p in folder.iterdir() if "partial" in p.name]
    if method == "lora":
        return max(float(t.abs().max()) for k, t in one.items() if "lora_B" in k)
    return float(
        honeloom.evaluate("lab:base", rows="lab:dev", limit=20, against=folder / "two").details["against"]["difference"]
    )


def launch_sharded(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with the shipped profile, told to stay on the CPU."""
    on_cpu = PROFILE.read_text().replace("num_processes: 8", "use_cpu: true\nnum_processes: 2")
    (folder / "profile.yaml").write_text(on_cpu)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "profile.yaml")]
    script = str(Path(__file__).with_name("fsdp_on_cpu.py"))
    command = [
        *launch,
        "--main_process_port",
        port,
        script,
        "tune",
        "lab:base",
        "lab:dev",
        "--device",
        "cpu",
        *arguments,
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_sharded_model_trains_as_a_whole_one(tmp_path, method):
    """Two shards with batches of 4 take the steps of one process with batches of 8, and can save checkpoints."""
    settings = ["--max-steps", "4", "--optimizer", "sgd", "--lr", "0.1", "--batch-size", "4", "--method", method]
    done = launch_sharded(tmp_path, *settings, "--set", "checkpoint_every=2", "--output-dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ok   the assembled weights give the sharded model's logits" in done.stdout
    assert abs(compare(tmp_path, method)) > 1e-3


@pytest.mark.parametrize(
    ("variables", "settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "FSDP version 1.*fsdp2.yaml"),
        ({"FSDP_VERSION": "2"}, {"load_in": "4bit"}, "load_in 4bit.*sharded"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tmp_path, monkeypatch, tiny_model, rows, variables, settings, message):
    from honeloom.stages.tune import require_shardable

    for name, value in {**variables, "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        require_shardable(TuneConfig(model=str(tiny_model), rows=str(rows), **settings))
