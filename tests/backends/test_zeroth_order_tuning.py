"""`tune --optimizer mezo`: through the door, resumed from seeds and scalars, and what it refuses."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

import honeloom
from honeloom.backends.hf import objectives, zeroth_order
from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.local_steps import collator
from honeloom.backends.hf.objectives import objective_of
from honeloom.backends.hf.zeroth_order import perturbed, train_zeroth_order
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


@pytest.mark.parametrize(
    ("after", "method"),
    [(1, "lora"), (7, "full"), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((1, "full"), (7, "lora")))],
)
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
    with torch.no_grad():
        expected = model(**batch)
    assert objective_of(model, [batch], targets, "loss")() == pytest.approx(float(expected.loss), rel=1e-6)
    likeliest = expected.logits[:, :-1].argmax(-1)
    wrong = float(((likeliest != labels[:, 1:]) & (labels[:, 1:] != -100)).sum()) / targets
    assert objective_of(model, [batch], targets, "accuracy")() == pytest.approx(wrong)
    assert objective_of(model, [batch, batch], 2 * targets, "loss")() == pytest.approx(float(expected.loss), rel=1e-6)


SHAPES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260}


def model_of(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=260)
    elif kind == "gemma2":  # its logits are capped
        config = Gemma2Config(
            **SHAPES, intermediate_size=48, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0,
            attn_logit_softcapping=5.0,
        )  # fmt: skip
    else:
        config = LlamaConfig(**SHAPES, intermediate_size=48, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data.mul_(6)  # logits that matter
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).eval() if kind == "lora" else model


def encoded(lengths, prompt=3):
    draw = torch.Generator().manual_seed(1)
    rows = [tuple(torch.randint(1, 260, (n,), generator=draw).tolist()) for n in lengths]
    scored = [(*[False] * prompt, *[True] * (len(ids) - prompt)) for ids in rows]
    return [
        Encoded(ids=i, scored=s, truncated=False, ends=True, chars=len(i)) for i, s in zip(rows, scored, strict=True)
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [1, 2000, 1 << 20])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "lora"])
def test_the_lean_loss_is_the_models_own(kind, chunk, packed, monkeypatch):
    model, rows = model_of(kind), encoded([30, 12, 20, 9, 7])
    monkeypatch.setattr(objectives, "CHUNK", chunk)
    batches = [collator(packed, rows)(part) for part in (rows[:3], rows[3:])]
    targets = sum(sum(e.scored[1:]) for e in rows)
    with torch.no_grad():
        own = sum(float(model(**b, num_items_in_batch=targets, use_cache=False).loss) for b in batches)
        alone = [model(input_ids=torch.tensor([e.ids]), labels=torch.tensor([e.ids])).logits[0] for e in rows]
    assert objective_of(model, batches, targets, "loss")() == pytest.approx(own, rel=1e-6)
    wrong, nats = [], []
    for logits, e in zip(alone, rows, strict=True):
        ids, at = torch.tensor(e.ids[3:]), logits[2:-1].double()
        nats.append(float(torch.nn.functional.cross_entropy(at, ids)))
        wrong.append(float((at.argmax(-1) != ids).double().mean()))
    counts = [len(e.ids) - 3 for e in rows]
    whole = [sum(m * c for m, c in zip(means, counts, strict=True)) / targets for means in (nats, wrong)]
    assert own == pytest.approx(whole[0], rel=1e-5)  # no row sees another
    assert objective_of(model, batches, targets, "accuracy")() == pytest.approx(whole[1])
    if packed:
        with pytest.raises(ValueError, match="packed"):
            objective_of(model, batches, targets, "loss", rows=True)
    else:
        assert objective_of(model, batches, targets, "loss", rows=True)() == pytest.approx(nats, rel=1e-5)
        assert objective_of(model, batches, targets, "accuracy", rows=True)() == pytest.approx(wrong)


def test_logits_are_computed_at_targets_alone_and_nothing_is_cached():
    model, seen = model_of("llama"), []
    model.lm_head.register_forward_hook(lambda _, inputs, out: seen.append(tuple(out.shape)))
    monitored = model.model.forward
    model.model.forward = lambda *a, **k: seen.append(k["use_cache"]) or monitored(*a, **k)
    (batch,) = [collator(False, rows)(rows) for rows in [encoded([12, 8], prompt=5)]]
    objective_of(model, [batch], 10, "loss")()
    assert seen == [False, (2, 7, 260)]  # positions 4 to 10


def test_a_model_that_gives_all_logits_has_the_same_loss(monkeypatch):
    model, rows = model_of("llama"), encoded([12, 8, 20])
    batch, targets = collator(False, rows)(rows), 31
    lean = objective_of(model, [batch], targets, "loss")()
    forward = model.forward
    model.forward = lambda input_ids, attention_mask: forward(input_ids=input_ids, attention_mask=attention_mask)
    assert objective_of(model, [batch], targets, "loss")() == pytest.approx(lean, rel=1e-6)


def test_a_row_without_targets_has_no_loss():
    rows = encoded([12, 8])
    batch = collator(False, rows)(rows)
    batch["labels"][1] = -100
    values = objective_of(model_of("llama"), [batch], 9, "loss", rows=True)()
    assert values.shape == (2,) and values[0] > 0 and values[1] == 0


def test_autocast_sees_what_was_moved_between_the_sides():
    model, rows = model_of("lora"), encoded([12, 8])
    batch = collator(False, rows)(rows)
    params = perturbed(model, MezoConfig())
    with torch.autocast("cpu", torch.bfloat16):
        probe = zeroth_order.ZerothOrder(params, mu=0.5).probe(objective_of(model, [batch], 14, "loss"), 3)
    assert abs(probe.plus - probe.minus) > 1e-3


def test_half_precision_weights_are_refused(tiny_model):
    with pytest.raises(ConfigError, match=r"torch\.bfloat16 would be lost in rounding"):
        perturbed(small(tiny_model).bfloat16(), MezoConfig())


def test_losses_that_are_none_are_skipped_and_too_many_end_it(tmp_path, tiny_model):
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


@pytest.mark.parametrize("packed", [False, True])
def test_both_sides_of_adapters_take_one_forward_pass(packed):
    model, rows = model_of("lora"), encoded([30, 12, 20])
    batches, passes = [collator(packed, rows)(rows)], []
    model.register_forward_hook(lambda *_: passes.append(1))
    targets, params = sum(sum(e.scored[1:]) for e in rows), perturbed(model, MezoConfig())
    sides = {name: model.get_submodule(name.removesuffix(".weight")) for name in params}
    before = {name: t.clone() for name, t in params.items()}
    for how in ("loss", "accuracy"):
        apart = objective_of(model, batches, targets, how)
        at_once = objective_of(model, batches, targets, how, sides=sides)
        stepper = zeroth_order.ZerothOrder(params, mu=0.05)
        one, passed = stepper.probe(apart, 7), len(passes)
        other = stepper.probe(at_once, 7)
        assert (other.plus, other.minus) == pytest.approx((one.plus, one.minus), rel=1e-5)
        assert how != "loss" or one.plus != one.minus
        assert (passed, len(passes)) == (2, 3)
        passes.clear()
    assert all(torch.equal(before[name], t) for name, t in params.items())
    assert not any("forward" in vars(module) for module in sides.values())
    if not packed:
        by_row = objective_of(model, batches, targets, "loss", rows=True, sides=sides)
        plus, minus = by_row.both(params, {name: -t for name, t in params.items()})
        assert plus.shape == minus.shape == (3,)


def test_layers_that_see_no_rows_take_two_passes():
    """As experts do, whose input is tokens of whatever rows."""
    model, rows = model_of("lora"), encoded([12, 8])
    params = perturbed(model, MezoConfig())
    sides = {name: model.get_submodule(name.removesuffix(".weight")) for name in params}
    batch = collator(False, rows)(rows)
    for layer in model.base_model.model.model.layers:  # an MLP that is handed tokens, as experts are
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: forward(x.flatten(0, 1)).view(x.shape)
    objective = objective_of(model, [batch], 14, "loss", sides=sides)
    probe = zeroth_order.ZerothOrder(params, mu=0.05).probe(objective, 7)
    plain = zeroth_order.ZerothOrder(params, mu=0.05).probe(objective_of(model, [batch], 14, "loss"), 7)
    assert (probe.plus, probe.minus) == (plain.plus, plain.minus)


def test_a_row_matches_exactly_where_no_target_is_wrong():
    model, rows = model_of("llama"), encoded([12, 8, 20])
    with torch.no_grad():  # the second row's targets become the likeliest tokens
        ids = list(rows[1].ids)
        for place in range(3, 8):
            ids[place] = int(model(input_ids=torch.tensor([ids])).logits[0, place - 1].argmax())
    rows[1] = Encoded(ids=tuple(ids), scored=rows[1].scored, truncated=False, ends=True, chars=8)
    batch = collator(False, rows)(rows)
    assert objective_of(model, [batch], 31, "exact_match")() == pytest.approx(2 / 3)
    assert objective_of(model, [batch], 31, "exact_match", rows=True)().tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="packed"):
        objective_of(model, [collator(True, rows)(rows)], 31, "exact_match")
