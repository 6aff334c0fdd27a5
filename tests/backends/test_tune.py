"""Training: the small loop and the trainer agree; resume is exact; NaN is never saved."""

import json
import math

import pyarrow.parquet as pq
import pytest
import torch

import honeloom
from honeloom import lab
from honeloom.backends.hf import tune as tuning
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer
from honeloom.backends.hf.local_steps import (
    build_optimizer,
    build_schedule,
    local_steps,
    restore_trainable,
    trainable_state,
)
from honeloom.checkpoint.reader import Checkpoint
from honeloom.errors import ConfigError, NotFiniteError
from honeloom.runs.log import Log, QuietConsole
from honeloom.testing.fakes import chat_row
from honeloom.tuning.config import TuneConfig


@pytest.fixture(scope="module")
def encoded():
    encoder = Encoder(load_tokenizer(lab.base_path()), 64, train=True)
    return [
        encoder.encode(chat_row(f"r{i}", f"Add {i} and {i}." + " Add 1 and 2." * (i % 3), str(2 * i)))
        for i in range(10)
    ]


def config(**changes):
    settings = {
        "model": "lab:base",
        "rows": "lab:pool",
        "max_steps": 4,
        "batch_size": 2,
        "lr": 5e-3,
        "checkpoint_every": 2,
    }
    return TuneConfig(**(settings | changes))


def lora(seed=0):
    return tuning.add_lora(
        load_model(lab.base_path()), rank=4, alpha=None, dropout=0.0, targets="all-linear", rslora=False, seed=seed
    )


def quiet():
    return Log(QuietConsole())


def same(one, other, atol=0.0):
    return all(torch.allclose(one[n], other[n], rtol=0, atol=atol) for n in one)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("optimizer", "accumulate"), [("adamw", 1), ("sgd", 1), ("adamw", 2)])
def test_small_loop_and_trainer_agree(tmp_path, encoded, method, optimizer, accumulate):
    settings = config(optimizer=optimizer, method=method, accumulate=accumulate, warmup_ratio=0.25)

    def fresh():
        return lora() if method == "lora" else tuning.unfreeze(load_model(lab.base_path()))

    by_trainer = fresh()
    result = tuning.train(by_trainer, encoded, settings, tmp_path, quiet())
    by_loop = fresh()
    order = tuning.row_order(len(encoded), 4 * 2 * accumulate, settings.seed)
    batches = [
        [[encoded[i] for i in order[s + 2 * p : s + 2 * p + 2]] for p in range(accumulate)]
        for s in range(0, len(order), 2 * accumulate)
    ]
    opt = build_optimizer(by_loop, settings.optimizer, settings.learning_rate)
    losses = local_steps(by_loop, batches, opt, build_schedule(opt, "linear", 4, 0.25))
    assert result.losses == pytest.approx(losses, abs=2e-4)  # the trainer logs four decimals
    assert same(trainable_state(by_trainer), trainable_state(by_loop), atol=1e-6)


def test_reset_in_place_is_exact(encoded):
    model = lora()
    start = trainable_state(model)
    settings = config()
    for _ in range(2):
        opt = build_optimizer(model, settings.optimizer, 1e-2)
        local_steps(model, [[encoded[:2]]], opt)
        assert not same(start, trainable_state(model))
        restore_trainable(model, start)
        assert same(start, trainable_state(model))


def test_resume_gives_the_uninterrupted_bytes(tmp_path, encoded, monkeypatch):
    straight = lora()
    tuning.train(straight, encoded, config(), tmp_path / "a", quiet())

    class Stop(Exception):
        pass

    seen = tuning._Watcher.on_step_end

    def die(self, args, state, control, **rest):
        seen(self, args, state, control, **rest)
        if state.global_step == 3:
            raise Stop

    monkeypatch.setattr(tuning._Watcher, "on_step_end", die)
    with pytest.raises(Stop):
        tuning.train(lora(), encoded, config(), tmp_path / "b", quiet())
    monkeypatch.setattr(tuning._Watcher, "on_step_end", seen)
    again = lora()
    result = tuning.train(again, encoded, config(), tmp_path / "b", quiet())
    assert same(trainable_state(straight), trainable_state(again))
    assert len(result.losses) == 4


def test_cut_off_checkpoint_is_named_and_skipped(tmp_path, encoded):
    said = []
    log = quiet()
    log.console.say = said.append
    tuning.train(lora(), encoded, config(), tmp_path, quiet())
    newest = max(tmp_path.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    (newest / tuning.COMPLETE).unlink()
    signature = {
        "device": "cpu", "dtype": "torch.float32", "autocast": "None", "processes": "1", "sharded": "False",
    }  # fmt: skip
    chosen = tuning.newest_checkpoint(tmp_path, log, signature)
    assert chosen is not None
    assert chosen != newest
    assert any(newest.name in line and "skipped" in line for line in said)
    assert tuning.newest_checkpoint(tmp_path, log, signature | {"device": "cuda"}) is None
    assert any("another device, number type or number of processes" in line for line in said)


def test_nan_stops_and_leaves_a_diagnosis(tmp_path, encoded):
    model = lora()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(math.nan)
    with pytest.raises(NotFiniteError, match="step 1"):
        tuning.train(model, encoded, config(), tmp_path, quiet())
    assert json.loads((tmp_path / "diagnosis.json").read_text())["step"] == 1
    assert not list(tmp_path.glob("checkpoint-*"))


def test_row_order_covers_every_row_each_epoch():
    order = tuning.row_order(7, 14, 3)
    assert sorted(order[:7]) == sorted(order[7:]) == list(range(7))
    assert order[:7] != order[7:]
    assert order == tuning.row_order(7, 14, 3)
    assert tuning.total_steps(7, config(max_steps=None, epochs=2.0, accumulate=2)) == 4


def test_adapter_starts_from_its_seed():
    assert same(trainable_state(lora(1)), trainable_state(lora(1)))
    assert not same(trainable_state(lora(1)), trainable_state(lora(2)))


def test_no_epoch_is_too_short():
    assert tuning.total_steps(10, config(max_steps=None, epochs=0.01)) == 1
    assert tuning.rows_in_all(10, config(max_steps=None, epochs=0.01)) == 1


def test_unknown_targets_name_the_key():
    with pytest.raises(ConfigError, match=r"method.targets \['nope'\].*all-linear"):
        tuning.add_lora(load_model(lab.base_path()), rank=2, alpha=None, dropout=0.0, targets=["nope"], rslora=False)


def test_full_tuning_in_16_bits_keeps_fp32_weights(tmp_path, encoded):
    """Three small steps move every weight in fp32; rounding each step to bf16 would lose nearly all of them."""
    model = tuning.unfreeze(load_model(lab.base_path(), loading=Loading(dtype="fp32")))
    start = trainable_state(model)
    tuning.train(model, encoded, config(method="full", lr=2e-5), tmp_path, quiet(), autocast=torch.bfloat16)
    after = trainable_state(model)
    moved = sum(int((after[n] != start[n]).sum()) for n in start) / sum(t.numel() for t in start.values())
    assert all(t.dtype is torch.float32 for t in after.values())
    assert moved > 0.9


def test_only_rows_that_were_seen_are_recorded(tmp_path):
    report = honeloom.tune("lab:base", "lab:dev", max_steps=2, batch_size=4, output_dir=tmp_path / "t")
    assert pq.read_table(tmp_path / "t" / "training_rows.parquet").num_rows == 8
    assert report.details["rows"] == 480
    assert {c.claim for c in report.verification} >= {"share of the trained weights that changed"}


def test_full_tuning_writes_the_number_type_asked_for(tmp_path):
    report = honeloom.tune("lab:base", "lab:dev", method="full", dtype="bf16", max_steps=2, output_dir=tmp_path / "t")
    with Checkpoint.open(tmp_path / "t") as written:
        assert written.info("model.norm.weight").dtype == "BF16"
    assert any("--dtype fp32 keeps them" in w for w in report.warnings)
