"""`tune --optimizer mezo`: through the door, resumed from seeds and scalars, and what it refuses."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import honeloom
from honeloom.backends.hf.zeroth_order import objective_of, perturbed, train_zeroth_order
from honeloom.checkpoint.reader import Checkpoint
from honeloom.errors import ConfigError, NotFiniteError
from honeloom.runs.journal import Journal
from honeloom.runs.log import Log, QuietConsole
from honeloom.tuning.config import MezoConfig, TuneConfig

QUICK = {"max_steps": 12, "batch_size": 4, "max_length": 48, "schedule": "constant"}


def tune(out, model="lab:base", **more):
    return honeloom.tune(model, "lab:dev", output_dir=out, **{**QUICK, **more})


def weights(folder):
    names = ("adapter_model.safetensors", "model.safetensors")
    with Checkpoint(folder, [next(folder / n for n in names if (folder / n).exists())]) as file:
        return {name: file.read(name) for name in file.names()}


@pytest.mark.parametrize(("method", "lr"), [("lora", 5e-4), ("full", 3e-5)])
def test_the_loss_falls_by_forward_passes_alone(tmp_path, method, lr, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("there is no backward pass"))
    report = tune(
        tmp_path / "out", method=method, lr=lr, max_steps=80, optimizer={"type": "mezo", "direction": "rademacher"}
    )
    losses = [loss for _, loss in report.details["losses"]]
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    assert last < first - 0.1
    assert all(check.passed for check in report.verification) and report.details["steps"] == 80


def test_memory_and_speed_are_the_same_steps(tmp_path):
    for setting in ("memory", "speed"):
        tune(tmp_path / setting, optimizer={"type": "mezo", "setting": setting}, lr=1e-3)
    one, other = weights(tmp_path / "memory"), weights(tmp_path / "speed")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_b_alone_leaves_a_as_it_was_drawn(tmp_path):
    tune(tmp_path / "b", optimizer={"type": "mezo", "perturb": "b"}, lr=1e-3)
    tune(tmp_path / "sgd", optimizer="sgd", lr=1e-12, max_steps=1)  # A as it is drawn
    mine, drawn = weights(tmp_path / "b"), weights(tmp_path / "sgd")
    assert all(torch.allclose(mine[n], drawn[n], atol=1e-6) for n in mine if "lora_A" in n)
    assert all(bool(mine[n].any()) for n in mine if "lora_B" in n)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("after", [1, 7])
def test_an_interrupted_training_replays_and_ends_with_the_same_bytes(tmp_path, method, after, monkeypatch):
    how = {"method": method, "optimizer": {"type": "mezo", "directions": 2}, "lr": 1e-4, "max_steps": 10}
    tune(tmp_path / "straight", **how)
    append = Journal.append
    count = {"n": 0}

    def interrupted(self, record):
        append(self, record)
        if "scalars" in record:
            count["n"] += 1
            if count["n"] == after:
                raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "cut", **how)
    monkeypatch.setattr(Journal, "append", append)
    report = tune(tmp_path / "cut", resume=True, **how)
    straight, cut = weights(tmp_path / "straight"), weights(tmp_path / "cut")
    assert all(torch.equal(straight[name], cut[name]) for name in straight)
    assert report.details["steps"] == 10 and len(report.details["losses"]) == 10


def small(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def test_objectives_are_the_models_loss_and_its_wrong_tokens(tiny_model):
    model = small(tiny_model)
    ids = torch.arange(24).view(2, 12) % 50
    labels = ids.clone()
    labels[0, :5] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    targets = int((labels[:, 1:] != -100).sum())
    expected = model(**batch)
    assert objective_of(model, [batch], targets, "loss")() == pytest.approx(float(expected.loss), rel=1e-6)
    likeliest = expected.logits[:, :-1].argmax(-1)
    wrong = float(((likeliest != labels[:, 1:]) & (labels[:, 1:] != -100)).sum()) / targets
    assert objective_of(model, [batch], targets, "accuracy")() == pytest.approx(wrong)
    assert objective_of(model, [batch, batch], 2 * targets, "loss")() == pytest.approx(float(expected.loss), rel=1e-6)


def test_half_precision_weights_are_refused(tiny_model):
    with pytest.raises(ConfigError, match=r"torch\.bfloat16 would be lost in rounding"):
        perturbed(small(tiny_model).bfloat16(), MezoConfig())


def test_losses_that_are_none_are_skipped_and_too_many_end_it(tmp_path, tiny_model):
    from honeloom.backends.hf.chat import Encoded

    model = small(tiny_model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    rows = [Encoded(ids=tuple(range(1, 9)), scored=(True,) * 8, truncated=False, ends=True, chars=20)] * 4
    settings = {"model": "m", "rows": ("x",), "method": "full", "optimizer": "mezo", "max_steps": 40, "batch_size": 2}
    with pytest.raises(NotFiniteError, match="no finite loss in 20 steps"):
        train_zeroth_order(
            model, rows, TuneConfig.model_validate(settings), tmp_path, Log(QuietConsole()), device=torch.device("cpu")
        )
    fewer = TuneConfig.model_validate({**settings, "max_steps": 5})
    (tmp_path / "fewer").mkdir()
    with pytest.raises(NotFiniteError, match="none of 5 steps had a finite loss"):
        train_zeroth_order(model, rows, fewer, tmp_path / "fewer", Log(QuietConsole()), device=torch.device("cpu"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(dict(model.named_parameters())[name], before[name], atol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and all(line["scalars"] == [0.0] and line["loss"] is None for line in lines)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"gradient_checkpointing": True}, "mezo keeps no activations"),
        ({"max_grad_norm": 0.5}, "mezo has no gradients"),
        ({"report_to": ["wandb"]}, "which mezo does not use"),
        ({"method": "full", "optimizer": {"type": "mezo", "perturb": "b"}}, "about the factors of LoRA"),
        ({"optimizer": {"type": "mezo", "mu": 0}}, "mu"),
        ({"optimizer": {"type": "meso"}}, "adamw|sgd|mezo"),
    ],
)
def test_what_means_nothing_without_gradients_is_refused(tmp_path, changes, what):
    with pytest.raises(ConfigError, match=what):
        tune(tmp_path / "out", **{"optimizer": "mezo", **changes})


def test_an_adapter_by_mezo_is_an_ordinary_one(tmp_path, tiny_model):
    tune(tmp_path / "out", model=str(tiny_model), optimizer="mezo", max_steps=2)
    loaded = PeftModel.from_pretrained(small(tiny_model), tmp_path / "out")
    assert loaded.peft_config["default"].r == 8
    assert not (tmp_path / "out" / "checkpoints").exists()
