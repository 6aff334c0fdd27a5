"""Settings that change memory and speed must not change what is learned."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import honeloom
from honeloom import lab
from honeloom.backends.hf import tune as tuning
from honeloom.backends.hf.chat import Encoded, Encoder
from honeloom.backends.hf.compare import packing_leak
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer
from honeloom.backends.hf.local_steps import trainable_state
from honeloom.backends.hf.score import pack_batch
from honeloom.checkpoint.architectures import ARCHITECTURES
from honeloom.errors import ConfigError, InputError
from honeloom.runs.log import Log, QuietConsole
from honeloom.testing.fakes import chat_row
from honeloom.tuning.config import TuneConfig

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
SPECIAL = {
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    "mixtral": {**SMALL, "num_local_experts": 2},
    "qwen2_moe": {
        **SMALL,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {**SMALL, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24},
}
TEXT_MODELS = sorted(set(ARCHITECTURES) - {"gemma3"})


def encoded_row(*ids):
    return Encoded(ids=ids, scored=(False, *[True] * (len(ids) - 1)), chars=1, truncated=False, ends=True)


ROWS = [encoded_row(5, 6, 7, 8, 9), encoded_row(20, 21, 22), encoded_row(40, 41), encoded_row(50, 51, 52, 53)]


def test_rows_are_packed_into_the_first_sequence_with_room():
    ids, positions, labels = pack_batch(ROWS, 7)
    assert ids.tolist() == [[5, 6, 7, 8, 9, 40, 41], [50, 51, 52, 53, 20, 21, 22]]
    assert positions.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 0, 1, 2]]
    assert labels.tolist() == [[-100, 6, 7, 8, 9, -100, 41], [-100, 51, 52, 53, -100, 21, 22]]


def test_padding_is_a_row_of_its_own_without_labels():
    ids, positions, labels = pack_batch(ROWS[:2], 6)
    assert positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert ids[1].tolist() == [20, 21, 22, 0, 0]
    assert labels[1].tolist() == [-100, 21, 22, -100, -100]


def random_model(model_type, attention):
    torch.manual_seed(0)
    settings = SPECIAL.get(model_type, SMALL)
    config = CONFIG_MAPPING[model_type](**settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [(m, a) for m in TEXT_MODELS for a in ("sdpa", "eager") if (m, a) != ("gemma2", "sdpa")],  # it caps its scores
)
def test_a_packed_row_has_the_logits_it_has_alone(model_type, attention):
    model = random_model(model_type, attention)
    ids, positions, _ = pack_batch(ROWS, 7)
    with torch.inference_mode():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        for row, (sequence, start) in zip(ROWS, [(0, 0), (1, 4), (0, 5), (1, 0)], strict=True):
            alone = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
            assert torch.allclose(packed[sequence, start : start + len(row.ids)], alone, atol=1e-5), model_type
    assert packing_leak(model, ROWS[0].ids, ROWS[3].ids) == 0


def test_a_leak_is_seen():
    class Leaky:
        device = torch.device("cpu")

        def __init__(self):
            self.model = random_model("llama", "sdpa")

        def __call__(self, input_ids, position_ids, use_cache):
            return self.model(input_ids=input_ids, use_cache=use_cache)  # positions run on: one long row

    assert packing_leak(Leaky(), ROWS[0].ids, ROWS[3].ids) > 1e-4


@pytest.fixture(scope="module")
def encoded():
    encoder = Encoder(load_tokenizer(lab.base_path()), 64, train=True)
    texts = [f"Add {i} and {i}." + " Add 1 and 2." * (i % 4) for i in range(16)]
    return [encoder.encode(chat_row(f"r{i}", text, str(2 * i))) for i, text in enumerate(texts)]


def trained(folder, encoded, **changes):
    settings = TuneConfig(
        **{"model": "lab:base", "rows": "lab:pool", "max_steps": 3, "batch_size": 4, "lr": 1e-2, "optimizer": "sgd"}
        | changes
    )
    model = tuning.add_lora(
        load_model(lab.base_path(), loading=Loading(attn=settings.attn)),
        rank=4, alpha=None, dropout=0.0, targets="all-linear", rslora=False,
    )  # fmt: skip
    result = tuning.train(model, encoded, settings, folder, Log(QuietConsole()))
    return trainable_state(model), result


@pytest.mark.parametrize("changes", [{"packing": True}, {"gradient_checkpointing": True}, {"attn": "eager"}], ids=str)
def test_a_setting_for_memory_or_speed_leaves_the_result(tmp_path, encoded, changes):
    plain, told = trained(tmp_path / "a", encoded)
    other, told_too = trained(tmp_path / "b", encoded, **changes)
    assert told_too.losses == pytest.approx(told.losses, abs=2e-4)
    assert all(torch.allclose(plain[n], other[n], rtol=0, atol=1e-6) for n in plain)
    assert any(v.abs().max() > 1e-4 for n, v in plain.items() if "lora_B" in n)


def test_accumulation_is_a_larger_batch(tmp_path, encoded):
    plain, _ = trained(tmp_path / "a", encoded)
    other, _ = trained(tmp_path / "b", encoded, batch_size=2, accumulate=2)
    assert all(torch.allclose(plain[n], other[n], rtol=0, atol=1e-6) for n in plain)


def test_grouping_by_length_batches_rows_of_similar_length():
    lengths = [(i * 37) % 100 + 1 for i in range(400)]
    plain = tuning.row_order(400, 600, 3)
    grouped = tuning.row_order(400, 600, 3, lengths=lengths, group=4)
    assert sorted(grouped[:400]) == list(range(400)) == sorted(plain[:400])
    assert grouped == tuning.row_order(400, 600, 3, lengths=lengths, group=4)
    assert grouped[:400] != tuning.row_order(400, 600, 4, lengths=lengths, group=4)[:400]

    def padded(order):
        return sum(4 * max(lengths[i] for i in order[s : s + 4]) for s in range(0, 400, 4))

    assert padded(grouped) < 1.06 * sum(lengths) < 1.3 * sum(lengths) < padded(plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in": "4bit", "method": "full"}, "quantised weights cannot be trained; use method lora"),
        ({"packing": True, "group_by_length": True}, "give one of them"),
        ({"attn": "flash"}, r"--attn flash needs a CUDA device \(this is cpu\); use --attn sdpa"),
        ({"load_in": "2bit"}, "load_in"),
        ({"attn": "fast"}, "attn"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, tiny_model, rows, changes, message):
    with pytest.raises(InputError, match=message):
        honeloom.tune(tiny_model, rows, output_dir=tmp_path / "out", max_steps=1, device="cpu", **changes)
    assert not (tmp_path / "out").exists()


def test_a_model_that_ignores_packing_is_refused(tmp_path, tiny_model, rows, monkeypatch):
    monkeypatch.setattr("honeloom.stages.tune.packing_leak", lambda *_: 0.5)
    with pytest.raises(ConfigError, match=r"lets a row see the row packed before it \(its logits move by 0.5\)"):
        honeloom.tune(tiny_model, rows, output_dir=tmp_path / "out", max_steps=1, packing=True)


def test_all_settings_together_through_the_verb(tmp_path, tiny_model, rows):
    report = honeloom.tune(
        tiny_model, rows, output_dir=tmp_path / "out", max_steps=2, batch_size=2, accumulate=2, packing=True,
        gradient_checkpointing=True, attn="eager",
    )  # fmt: skip
    assert report.status == "ok"


def test_tuning_in_16_bits_keeps_adapters_in_32(tmp_path, tiny_model, rows):
    report = honeloom.tune(tiny_model, rows, output_dir=tmp_path / "out", max_steps=2, dtype="bf16", device="cpu")
    assert report.status == "ok"
    model = honeloom.load_model(report.out)
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}


def test_texts_longer_than_the_limit_can_be_tuned_on(tmp_path, tiny_model):
    """A text has no turns: that all of them are cut is told, and is no failure."""
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": t * 40}) + "\n" for t in ("Once upon a time. ", "A sea and a ship. ")))
    report = honeloom.tune(tiny_model, rows, output_dir=tmp_path / "out", max_steps=1, max_length=16)
    assert report.status == "ok"
    assert not [c for c in report.verification if "turn end" in c.claim]
    assert any("2 rows were cut at 16 tokens" in w for w in report.warnings)


def test_a_tracker_changes_no_key_and_leaves_stdout_alone(tmp_path, tiny_model, rows, capsys, monkeypatch):
    from transformers import TrainerCallback

    class Loud(TrainerCallback):
        def __init__(self):
            self.logging_dir = None

        def on_log(self, args, state, control, **kwargs):
            print("a tracker speaks")

    monkeypatch.setattr(tuning, "TensorBoardCallback", Loud)
    told = honeloom.tune(
        tiny_model, rows, output_dir=tmp_path / "out", max_steps=1, report_to=["tensorboard"], device="cpu"
    )
    assert capsys.readouterr().out == ""
    again = honeloom.tune(tiny_model, rows, output_dir=tmp_path / "out", max_steps=1, device="cpu")
    assert told.status == "ok"
    assert again.reused


def test_a_missing_tracker_is_named(tmp_path, tiny_model, rows, monkeypatch):
    def absent():
        raise RuntimeError("TensorBoardCallback requires tensorboard to be installed")

    monkeypatch.setattr(tuning, "TensorBoardCallback", absent)
    with pytest.raises(ConfigError, match="report_to: TensorBoardCallback requires tensorboard"):
        honeloom.tune(tiny_model, rows, output_dir=tmp_path / "out", max_steps=1, report_to=["tensorboard"])


def test_sixteen_bit_floats_are_not_trained_on_a_cpu(tmp_path, tiny_model, rows):
    with pytest.raises(ConfigError, match="--dtype fp16: a CPU does not train in fp16; use bf16"):
        honeloom.tune(tiny_model, rows, output_dir=tmp_path / "out", max_steps=1, dtype="fp16", device="cpu")


def test_fp16_may_skip_steps_and_not_go_on_for_ever(tmp_path, encoded):
    """A gradient that overflows is how fp16 finds its scale; a loss that is none is a fault at once."""
    log, seen = Log(QuietConsole()), []
    arguments = type("Arguments", (), {"fp16": True})
    state = type("State", (), {"global_step": 1, "is_world_process_zero": False})
    control = type("Control", (), {"should_training_stop": False, "should_save": True})
    watcher = tuning._Watcher(tmp_path, log, None, seen.append, {})
    for _ in range(tuning.OVERFLOWS):
        watcher.on_log(arguments, state, control, {"loss": 1.0, "grad_norm": float("inf")})
    assert not watcher.fault
    watcher.on_log(arguments, state, control, {"loss": 1.0, "grad_norm": 0.5})
    for _ in range(tuning.OVERFLOWS + 1):
        watcher.on_log(arguments, state, control, {"loss": 1.0, "grad_norm": float("nan")})
    assert "grad_norm" in watcher.fault
    again = tuning._Watcher(tmp_path, log, None, seen.append, {})
    again.on_log(arguments, state, control, {"loss": float("nan"), "grad_norm": 1.0})
    assert "loss" in again.fault
