"""`tune` with rates from the loss's curvature: found, kept over interruptions, checked, and what is refused."""

import json

import pytest
import torch

import honeloom
from honeloom.backends.hf import curvature
from honeloom.checkpoint.reader import Checkpoint
from honeloom.errors import ConfigError, NotFiniteError
from honeloom.runs.journal import Journal
from honeloom.tuning.curvature import passes_of

QUICK = {"max_steps": 60, "batch_size": 4, "max_length": 48, "schedule": "constant"}
AUTO = {"optimizer": {"type": "mezo", "direction": "rademacher", "mu": "auto"}, "lr": "auto"}


def tune(out, model="lab:base", **more):
    return honeloom.tune(model, "lab:dev", output_dir=out, **{**QUICK, **more})


def weights(folder):
    names = ("adapter_model.safetensors", "model.safetensors")
    with Checkpoint(folder, [next(folder / n for n in names if (folder / n).exists())]) as file:
        return {name: file.read(name) for name in file.names()}


@pytest.mark.parametrize(
    "more", [{}, *(pytest.param(m, marks=pytest.mark.slow) for m in ({"method": "full"}, {"perturb": "b"}))]
)
def test_auto_trains_and_the_loss_falls(tmp_path, more):
    optimizer = {**AUTO["optimizer"], **{k: v for k, v in more.items() if k == "perturb"}}
    how = {"lr": "auto", "optimizer": optimizer, **{k: v for k, v in more.items() if k != "perturb"}}
    report = tune(tmp_path / "out", max_steps=100, **how)
    losses = [loss for _, loss in report.details["losses"]]
    first, last = (sum(part) / len(part) for part in (losses[:20], losses[-20:]))
    assert last < first - 0.1
    found = report.details["curvature"]
    assert found["chosen"] == "auto" and found["lr"] == found["rate"] < found["bound"]
    assert found["passes"] == passes_of(8) and found["mu"] in [rung[0] for rung in found["ladder"][1:-1]]
    assert not any("go up in the mean" in warning for warning in report.warnings)


@pytest.mark.slow
def test_an_interrupted_training_goes_on_with_the_numbers_it_had(tmp_path, monkeypatch):
    tune(tmp_path / "straight", **AUTO)
    append, measure, count = Journal.append, curvature.estimate_for, {"n": 0, "measured": 0}

    def interrupted(self, record):
        append(self, record)
        if "scalars" in record:
            count["n"] += 1
            if count["n"] == 5:
                raise KeyboardInterrupt

    def counted(*arguments, **options):
        count["measured"] += 1
        return measure(*arguments, **options)

    monkeypatch.setattr(Journal, "append", interrupted)
    monkeypatch.setattr(curvature, "estimate_for", counted)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "cut", **AUTO)
    monkeypatch.setattr(Journal, "append", append)
    report = tune(tmp_path / "cut", resume=True, **AUTO)
    straight, cut = weights(tmp_path / "straight"), weights(tmp_path / "cut")
    assert all(torch.equal(straight[name], cut[name]) for name in straight)
    assert (
        report.details["curvature"]
        == json.loads((tmp_path / "straight/report.json").read_text())["details"]["curvature"]
    )
    assert count["measured"] == 1


def test_measuring_changes_nothing_else(tmp_path, monkeypatch):
    how = {"optimizer": "mezo", "lr": 1e-4, "max_steps": 3}
    plain = tune(tmp_path / "plain", **how)
    monkeypatch.setattr(curvature, "SHARE", 0)
    checked = tune(tmp_path / "checked", **how)
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "checked")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "curvature" not in plain.details and checked.details["curvature"]["chosen"] == "given"
    assert checked.details["curvature"]["lr"] == 1e-4 and not checked.warnings


def test_a_rate_that_is_too_large_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(curvature, "SHARE", 0)
    report = tune(tmp_path / "out", optimizer="mezo", lr=0.05, max_steps=2)
    (warning,) = [w for w in report.warnings if "go up in the mean" in w]
    assert warning.startswith("lr 0.05 is above 0.00") and "--lr auto takes" in warning


def test_few_rows_and_several_passes_per_step(tmp_path):
    report = tune(tmp_path / "out", limit=5, accumulate=2, max_steps=3, **AUTO)
    assert report.details["curvature"]["passes"] == passes_of(2)


def test_losses_that_are_none_end_auto_and_leave_a_given_rate(tmp_path, monkeypatch):
    def none(*_, **__):
        raise NotFiniteError("the loss is not finite")

    monkeypatch.setattr(curvature, "estimate_for", none)
    monkeypatch.setattr(curvature, "SHARE", 0)
    with pytest.raises(NotFiniteError):
        tune(tmp_path / "auto", **AUTO)
    report = tune(tmp_path / "given", optimizer="mezo", lr=1e-4, max_steps=2)
    assert report.warnings == ("the loss's curvature was not measured: the loss is not finite",)


def test_a_loss_without_curvature_has_no_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(curvature, "objective_of", lambda *_, **__: lambda: 1.0)
    with pytest.raises(ConfigError, match="lr auto: the loss has no curvature along any direction"):
        tune(tmp_path / "out", **AUTO)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"lr": "auto"}, "add --optimizer mezo, or give lr as a number"),
        ({"lr": "auto", "optimizer": "sgd"}, "lr auto is for zeroth-order steps"),
        ({"lr": "atuo", "optimizer": "mezo"}, "lr: must be a number over 0, or auto; did you mean 'auto'"),
        ({"lr": 0, "optimizer": "mezo"}, "lr: must be over 0, or auto"),
        ({"optimizer": {"type": "mezo", "mu": "autp"}}, "optimizer.mu: must be a number over 0, or auto"),
        ({"optimizer": {"type": "sgd", "mu": "auto"}}, "mu"),
        ({"lr": "auto", "optimizer": {"type": "mezo", "objective": "accuracy"}}, "a share of tokens has no curvature"),
        ({"optimizer": {"type": "mezo", "objective": "accuracy", "mu": "auto"}}, "a share of tokens has no curvature"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path, changes, what):
    with pytest.raises(ConfigError, match=what):
        tune(tmp_path / "out", **changes)


@pytest.mark.parametrize(
    ("lr", "told"), [("auto", "about 200 forward passes before the first step"), (0.01, "lr 0.01 is checked against")]
)
def test_the_plan_says_that_the_rate_waits_for_the_weights(lr, told):
    (plan,) = honeloom.plan("tune", model="lab:base", rows="lab:dev", optimizer="mezo", lr=lr)
    assert told in plan.notes[0]
    (plan,) = honeloom.plan("tune", model="lab:base", rows="lab:dev")
    assert plan.notes == ()
