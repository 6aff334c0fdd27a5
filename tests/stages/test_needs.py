"""What a plan says of memory, disk, time and commands."""

import json
import shlex

import pytest

import honeloom
from goldens import check_json
from honeloom.cli.main import main as cli
from honeloom.errors import ConfigError
from honeloom.planning import FSDP_PROFILE
from honeloom.stages.inputs import Resolver
from honeloom.stages.needs import describe_needs
from honeloom.stages.runner import prepare, space_needed
from honeloom.tuning.config import TuneConfig

LLAMA3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def config_alone(tmp_path):
    folder = tmp_path / "llama-3-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA3_8B))
    return folder


def needs(verb, *args, **settings):
    return honeloom.plan(verb, **settings)[0].needs


def test_a_config_alone_is_enough(config_alone, rows):
    found = needs("tune", model=config_alone, rows=rows, device="cuda", batch_size=1, gradient_checkpointing=True)
    assert (found.parameters, found.device, found.dtype, found.tokens_per_row) == (8_030_261_248, "gpu", "bf16", 2048)
    assert found.memory["total"] == sum(v for k, v in found.memory.items() if k != "total")
    by_name = {s.name: s.memory_bytes for s in found.settings}
    assert by_name["QLoRA, 4 bits"] < by_name["zeroth-order, bf16"] < by_name["LoRA, bf16"] < 24e9
    assert by_name["LoRA, bf16"] == found.memory["total"]
    assert by_name["all weights, bf16"] > 5 * by_name["all weights, sharded over 8 GPUs"]
    assert found.disk_bytes < 2e9
    full = needs("tune", model=config_alone, rows=rows, device="cuda", method="full")
    assert full.disk_bytes > (2 + 2 * 12) * 8e9


def test_the_command_says_what_is_no_default(config_alone, rows):
    found = needs("tune", model=config_alone, rows=rows, rank=4, lr=1e-3, packing=True, seed=3, split="0.2-0.8")
    told = shlex.split(found.command)
    assert told[:4] == ["honeloom", "tune", str(config_alone), str(rows)]
    settings = [told[i + 1] for i, a in enumerate(told) if a == "--set"]
    assert settings == ["seed=3", "split=[0.2, 0.8]", "method.rank=4", "lr=0.001", "packing=true"]
    assert shlex.split(found.sharded_command)[:4] == ["accelerate", "launch", "--config_file", str(FSDP_PROFILE)]


@pytest.mark.parametrize(
    ("verb", "settings"),
    [
        ("tune", {"rank": 4, "report_to": ["trackio"], "optimizer": {"type": "sgd", "momentum": 0.9}}),
        ("evaluate", {"batch_size": 3, "split": "0.5-1"}),
        ("drop", {"attention": 1}),
        ("select", {"method": "perplexity", "keep": "20%"}),
    ],
)
def test_the_command_gives_the_same_job_again(tmp_path, tiny_model, rows, verb, settings, capsys):
    given = {"model": tiny_model, ("calibration" if verb == "drop" else "rows"): rows, **settings}
    plan = honeloom.plan(verb, **given)[0]
    command = shlex.split(plan.needs.command.replace(" OUT", f" {tmp_path / 'out'}"))
    with pytest.raises(SystemExit) as stopped:
        cli([*command[1:], "--dry-run", "--json"])
    assert stopped.value.code in (0, None)
    again = json.loads(capsys.readouterr().out)["stages"][0]
    assert (again["key"], again["config"]) == (plan.key, json.loads(json.dumps(plan.config)))


NAMES = (
    "a, b #1.jsonl",
    "x: y.jsonl",
    " [1].jsonl",
    'it\'s "so".jsonl',
    "{a}.jsonl",
    "näh😀.jsonl",
    "#.jsonl",
    "- .tsv",
)


@pytest.mark.parametrize("name", [*NAMES, "yes", "3", "null", "1e3", "null #"])
def test_the_command_keeps_every_name(tmp_path, tiny_model, rows, name, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in NAMES:
        (tmp_path / name).write_bytes(rows.read_bytes())
        jobs = {"evaluate": {"rows": [name, rows]}, "drop": {"calibration": name, "attention": 1}}
    else:
        (tmp_path / name).symlink_to(tiny_model)
        jobs = {"evaluate": {"rows": rows, "against": name}, "select": {"rows": rows, "model": name}}
    for verb, given in jobs.items():
        plan = honeloom.plan(verb, **{"model": tiny_model, **given})[0]
        with pytest.raises(SystemExit) as stopped:
            cli([*shlex.split(plan.needs.command.replace(" OUT", " out"))[1:], "--dry-run", "--json"])
        printed = capsys.readouterr()
        assert stopped.value.code in (0, None), printed.err
        assert json.loads(printed.out)["stages"][0]["config"] == json.loads(json.dumps(plan.config))


def written(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**LLAMA3_8B, **changes}))


def test_settings_that_are_refused_are_not_offered(config_alone, rows):
    plain = needs("tune", model=config_alone, rows=rows, device="cuda")
    assert plain.sharded_command
    assert needs("tune", model=config_alone, rows=rows, device="cuda", load_in="4bit").sharded_command is None
    written(config_alone, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    found = needs("tune", model=config_alone, rows=rows, device="cuda")
    assert found.memory["weights"] == needs_of_4bit(config_alone, rows).memory["weights"] < plain.memory["weights"] / 2
    assert found.sharded_command is None
    assert [s.name for s in found.settings] == ["LoRA on the stored 4 bits"]
    assert not any("--load-in" in s.flags or "full" in s.flags for s in found.settings)
    measured = needs("evaluate", model=config_alone, rows=rows, device="cuda")
    assert [(s.name, s.flags) for s in measured.settings] == [("the stored 4 bits", "--dtype bf16")]
    assert "refuses" in needs("tune", model=config_alone, rows=rows, method="full").unknown
    assert "refuses" in needs("drop", model=config_alone, calibration=rows, attention=1).unknown
    assert "leave load_in 8bit out" in needs("tune", model=config_alone, rows=rows, load_in="8bit").unknown
    written(config_alone, quantization_config={"quant_method": "gptq", "bits": 8})
    assert needs("evaluate", model=config_alone, rows=rows).memory["weights"] > found.memory["weights"]
    for odd in ({"quant_method": "fp8"}, {"bits": 3}, "yes"):
        written(config_alone, quantization_config=odd)
        assert "4 or 8 bits" in needs("tune", model=config_alone, rows=rows).unknown


def needs_of_4bit(folder, rows):
    """What the model would need if it were quantised while it is loaded."""
    stored = (folder / "config.json").read_text()
    written(folder)
    try:
        return needs("tune", model=folder, rows=rows, device="cuda", load_in="4bit")
    finally:
        (folder / "config.json").write_text(stored)


@pytest.mark.parametrize("changes", [{"hidden_size": "big"}, {"num_attention_heads": 0}, {"num_hidden_layers": 10**9}])
def test_a_config_with_odd_sizes_is_unknown(config_alone, rows, changes):
    written(config_alone, **changes)
    (name,) = changes
    assert name in needs("tune", model=config_alone, rows=rows).unknown


def test_a_tuning_asks_for_the_disk_that_its_plan_tells(config_alone, rows):
    """Three checkpoints of fp32 weights and moments exist while the oldest gives way to the newest."""
    for changes, per_weight, trained in (
        ({"method": "full", "dtype": "bf16"}, 2 + 3 * 12, 8_030_261_248),
        ({"method": "full", "optimizer": {"type": "sgd"}}, 4 + 3 * 4, 8_030_261_248),
        ({"method": {"type": "lora", "rank": 8}}, 4 + 3 * 12, 20_971_520),
    ):
        config = TuneConfig.model_validate({"model": config_alone, "rows": rows, **changes})
        job = prepare("tune", config, Resolver(fetch=False))
        least = per_weight * trained
        assert least < space_needed(job) < least + (65 << 20)
        assert describe_needs(job).disk_bytes == space_needed(job)
    (config_alone / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    config = TuneConfig.model_validate({"model": config_alone, "rows": rows, "method": "full"})
    job = prepare("tune", config, Resolver(fetch=False))
    assert space_needed(job) == 7 * job.inputs["model"].size


def test_the_keys_of_a_plan(config_alone, rows, capsys):
    with pytest.raises(SystemExit):
        cli(["tune", str(config_alone), str(rows), "--dry-run", "--json", "--device", "cuda"])
    document = json.loads(capsys.readouterr().out)
    (stage,) = document["stages"]
    needed = {**stage["needs"], "memory": sorted(stage["needs"]["memory"])}
    check_json(
        "plan.json",
        {
            "schema": document["schema"],
            "document": sorted(document),
            "stage": sorted(stage),
            "needs": sorted(needed),
            "memory": needed["memory"],
            "settings": sorted(needed["settings"][0]),
        },
    )


def test_one_process_of_several_prints_the_plan(tiny_model, rows, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in (0, 1):
        monkeypatch.setenv("RANK", str(number))
        with pytest.raises(SystemExit):
            cli(["tune", str(tiny_model), str(rows), "--dry-run"])
        assert bool(capsys.readouterr().out) is (number == 0)


@pytest.mark.parametrize("flags", [["--load-in", "4bit"], ["--attn", "eager"], ["--set", "load_in=8bit"]])
def test_settings_of_a_model_need_one(tiny_model, rows, capsys, flags):
    for model, code in ((["--model", str(tiny_model)], 0), ([], 2)):
        with pytest.raises(SystemExit) as stopped:
            cli(["select", str(rows), "--method", "random", *model, *flags, "--dry-run"])
        assert (stopped.value.code or 0) == code
    assert "give --model, or leave them out" in capsys.readouterr().err


def test_an_unknown_family_is_said(tmp_path, rows):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert "known types" in needs("tune", model=tmp_path / "m", rows=rows).unknown
    with pytest.raises(ConfigError, match=r"--calibrate needs a known model: .*known types"):
        honeloom.plan("tune", model=tmp_path / "m", rows=rows, calibrate=True)


def test_stages_without_a_model_need_none(rows, tiny_model):
    assert needs("select", rows=rows) is None
    assert needs("evaluate", model=tiny_model, rows=rows).memory["weights"] > 0


def test_calibration_counts_the_tokens_that_tuning_sees(tmp_path, tiny_model, rows):
    settings = {"model": tiny_model, "rows": rows, "epochs": 2, "batch_size": 4, "accumulate": 2}
    found = honeloom.plan("tune", calibrate=True, **settings)[0].needs
    report = honeloom.tune(output_dir=tmp_path / "out", **settings)
    assert (found.tokens, found.steps) == (report.details["tokens"], report.details["steps"])
    assert 0 < found.seconds < 600
    for name, changes in {"4bit": {"load_in": "4bit"}}.items():
        with pytest.raises(ConfigError, match="leave --load-in out"):
            honeloom.plan("tune", calibrate=True, **settings, **changes), name


def test_calibrate_without_a_plan_is_refused(tiny_model, rows, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli(["tune", str(tiny_model), str(rows), "--calibrate", "--output-dir", "never"])
    assert stopped.value.code == 2
    assert "add --dry-run" in capsys.readouterr().err


def test_a_person_reads_memory_disk_time_and_commands(config_alone, rows, capsys):
    with pytest.raises(SystemExit):
        cli(["tune", str(config_alone), str(rows), "--dry-run", "--device", "cuda"])
    printed = capsys.readouterr().out
    assert "tune needs, with 8,030,261,248 parameters and rows of up to 2048 tokens:" in printed
    for part in ("per GPU at the peak (bf16): weights 15.0 GiB", "QLoRA, 4 bits: --batch-size 1", "accelerate launch"):
        assert part in printed


def test_a_tuning_that_will_not_fit_is_told_before_it_runs(tmp_path, tiny_model, rows, monkeypatch):
    monkeypatch.setattr("honeloom.stages.tune.free_memory", lambda device: 1 << 20)
    report = honeloom.tune(tiny_model, rows, output_dir=tmp_path / "out", max_steps=1, device="cpu")
    assert any(
        "1.0 GiB" not in w and "GiB are free on cpu; the same command with --dry-run" in w for w in report.warnings
    )
