"""How weights are loaded: every combination of settings, and quantised weights for real where bitsandbytes is."""

import json
import shutil

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import honeloom
from goldens import check_json
from honeloom.backends.devices import memory_guard
from honeloom.backends.hf import load as loading_module
from honeloom.backends.hf.compare import logits_gap
from honeloom.backends.hf.load import Loading, load_arguments, load_model
from honeloom.backends.hf.score import Scorer
from honeloom.backends.hf.tune import lora_arguments, training_arguments
from honeloom.errors import CheckpointError, ConfigError, MissingExtraError, OutOfMemoryError
from honeloom.planning import FSDP_PROFILE
from honeloom.testing.fakes import chat_row
from honeloom.testing.models import tiny_llama
from honeloom.tuning.config import LoraMethodConfig, TuneConfig

DEVICES = {"cpu": torch.float32, "cuda:0": torch.bfloat16}


SETTINGS = (
    {}, {"load_in": "4bit"}, {"load_in": "8bit"}, {"attn": "flash"}, {"attn": "eager"}, {"attn": "sdpa"},
    {"spread": True},
)  # fmt: skip


def plain(value):
    if hasattr(value, "to_dict"):
        return {k: v for k, v in value.to_dict().items() if k.startswith(("load_in", "bnb_4bit"))}
    return str(value) if isinstance(value, torch.dtype) else value


def test_every_setting_reaches_from_pretrained_by_its_name_there():
    told = {}
    for device, dtype in DEVICES.items():
        for settings in SETTINGS:
            for fits in (True, False) if settings.get("spread") else (True,):
                name = f"{device} {settings} {'fits' if fits else 'does not fit'}"
                arguments = load_arguments(Loading(device, **settings), torch.device(device), dtype, fits=fits)
                told[name] = {k: plain(v) for k, v in arguments.items()}
    check_json("from_pretrained.json", told)


CASES = {
    "defaults": {},
    "full, 16 bits on a GPU": {"method": "full", "dtype": "bf16"},
    "everything": {
        "batch_size": 4, "accumulate": 3, "gradient_checkpointing": True, "packing": True, "max_grad_norm": 0.5,
        "lr": 1e-3, "seed": 2**40, "checkpoint_every": 7, "report_to": ("tensorboard",),
    },
}  # fmt: skip


def test_every_setting_reaches_the_trainer_by_its_name_there():
    told = {}
    for name, changes in CASES.items():
        config = TuneConfig(model="m", rows="r", **changes)
        for device in ("cpu", "cuda"):
            for autocast in (None, torch.bfloat16, torch.float16):
                key = f"{name}; {device}; {str(autocast).removeprefix('torch.')}"
                told[key] = training_arguments(config, 11, device, autocast)
    check_json("training_arguments.json", told)


def test_every_setting_of_lora_reaches_peft_by_its_name_there():
    settings = {
        "defaults": LoraMethodConfig(),
        "everything": LoraMethodConfig(rank=3, alpha=5.0, dropout=0.1, targets=("q_proj", "v_proj"), rslora=True),
    }
    check_json("lora_config.json", {n: lora_arguments(**c.model_dump(exclude={"type"})) for n, c in settings.items()})


def test_accelerate_reads_the_shipped_profile_as_it_is_meant():
    read = load_config_from_file(str(FSDP_PROFILE)).to_dict()
    check_json("fsdp_profile.json", {k: v for k, v in read.items() if v not in (None, {}, [])})


def test_a_model_that_does_not_fit_one_device_is_spread(tmp_path):
    """`device_map` on the host alone: hooks are in place, and losses are those of the plain model."""
    arguments = load_arguments(Loading("cpu", spread=True), torch.device("cpu"), torch.float32, fits=False)
    assert arguments["device_map"] == "auto"
    path = tiny_llama(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, **arguments)
    plain = Scorer.open(path, loading=Loading("cpu"))
    rows = [chat_row("a", "Add 1 and 2.", "3"), chat_row("b", "Say yes.", "yes")]
    losses = [[loss.loss_sum for _, loss in s.losses(rows)] for s in (plain, Scorer(model, plain.encoder, 2))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_an_allocation_that_the_host_refuses_is_told():
    message = (
        r"out of memory while scoring on cpu: \d+ bytes more were needed and [\d.]+ GiB are free; try --batch-size 1$"
    )
    with (
        pytest.raises(OutOfMemoryError, match=message),
        memory_guard(torch.device("cpu"), "scoring", ["--batch-size 1"]),
    ):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), memory_guard(torch.device("cpu"), "x", []):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_flash_is_refused_without_cuda(tiny_model):
    with pytest.raises(ConfigError, match=r"needs a CUDA device \(this is cpu\); use --attn sdpa"):
        load_model(tiny_model, loading=Loading("cpu", attn="flash"))


def test_attention_that_a_family_lacks_is_named(tmp_path, rows):
    config = CONFIG_MAPPING["gemma2"](
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="--attn sdpa: a gemma2 model has no such attention; use eager, flash"):
        load_model(tmp_path, loading=Loading("cpu", attn="sdpa"))
    assert load_model(tmp_path, loading=Loading("cpu", attn="eager")).config._attn_implementation == "eager"


def test_a_missing_bitsandbytes_names_the_extra(tiny_model, monkeypatch):
    monkeypatch.setattr(loading_module, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(MissingExtraError, match=r"load_in 4bit needs bitsandbytes: pip install 'honeloom\[quant\]'"):
        load_model(tiny_model, loading=Loading("cpu", load_in="4bit"))


@pytest.fixture
def quantised(tmp_path, tiny_model):
    """A folder whose config says that its weights are quantised."""
    folder = tmp_path / "quantised"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    config["_name_or_path"] = "org/unquantised"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_quantised_weights_are_not_quantised_again(quantised):
    with pytest.raises(ConfigError, match=r"quantised already \(gptq\); leave load_in 8bit out"):
        load_model(quantised, loading=Loading("cpu", load_in="8bit"))


def test_merge_and_drop_refuse_quantised_weights_and_name_the_source(tmp_path, tiny_model, quantised, rows):
    card = "---\nbase_model: org/the-source\nbase_model_relation: quantized\n---\n"
    (quantised / "README.md").write_text(card)
    merge = {"method": "linear", "models": [{"model": str(quantised)}, {"model": str(tiny_model)}]}
    with pytest.raises(CheckpointError, match=r"quantised \(gptq\).*merge.*org/the-source"):
        honeloom.merge(merge, tmp_path / "merged")
    with pytest.raises(CheckpointError, match=r"quantised \(gptq\).*drop.*org/the-source"):
        honeloom.drop(quantised, tmp_path / "dropped", attention=1, calibration=rows)
    (quantised / "README.md").unlink()
    with pytest.raises(CheckpointError, match="org/unquantised"):
        honeloom.drop(quantised, tmp_path / "dropped", attention=1, calibration=rows)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_tuning_and_evaluating_on_quantised_weights(tmp_path, rows, bits):
    """Base weights in few bits, adapters in full precision (QLoRA); the saved adapter gives the same logits on it."""
    pytest.importorskip("bitsandbytes")
    model = tiny_llama(tmp_path / "model", hidden=64)
    report = honeloom.tune(
        model, rows, output_dir=tmp_path / "out", max_steps=2, load_in=bits, device="cpu", packing=True
    )
    assert report.status == "ok"
    exact = honeloom.load_model(report.out, device="cpu")
    coarse = honeloom.load_model(report.out, device="cpu", load_in=bits)
    assert {p.dtype for n, p in coarse.named_parameters() if "lora_" in n} == {torch.float32}
    kinds = {type(m).__name__ for m in coarse.modules()}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits] in kinds
    assert 0 < logits_gap(exact, coarse, [[3, 4, 5, 6]]) < 10
    full, few = (honeloom.evaluate(model, rows=rows, device="cpu", load_in=b).metrics[0].value for b in (None, bits))
    assert full != few == pytest.approx(full, rel=0.1)
    kept = honeloom.select(
        rows,
        model=model,
        method="perplexity",
        keep="50%",
        load_in=bits,
        device="cpu",
        output_dir=tmp_path / "picked",
    )
    assert kept.status == "ok"


def test_four_bits_on_a_cpu_give_what_their_codes_say(tmp_path):
    """A forward pass must not change the weights: the layer's output is that of its dequantised matrix."""
    functional = pytest.importorskip("bitsandbytes").functional
    model = load_model(tiny_llama(tmp_path / "m", hidden=64), loading=Loading("cpu", load_in="4bit"))
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first = layer(x)
        matrix = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.allclose(first, x @ matrix.T, atol=1e-5)
        assert torch.equal(first, layer(x))


def test_experts_that_would_stay_unquantised_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = CONFIG_MAPPING["mixtral"](
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="load_in 4bit would leave its experts unquantised"):
        load_model(tmp_path, loading=Loading("cpu", load_in="4bit"))
