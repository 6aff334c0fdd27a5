"""The merge stage on tiny models: right numbers, same bytes, honest refusals."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merging_models import edit_json, edit_weights, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM

from honeloom.config.load import load_yaml
from honeloom.errors import CheckpointError, IncompatibleModelsError, NotFiniteError, SourceError
from honeloom.merging.merge_config import MergeConfig
from honeloom.merging.slerp import slerp
from honeloom.ops.rounding import round_once

TOKENIZER = Tokenizer(WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>")).to_str()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_linear(models, merge):
    outcome = merge(models=[{"model": models["a"], "weight": 1}, {"model": models["b"], "weight": 3}])
    a, b, got = weights_of(models["a"]), weights_of(models["b"]), merge.tensors()
    assert set(got) == set(a)
    for name, tensor in got.items():
        assert torch.equal(tensor, ((a[name].double() + 3 * b[name].double()) / 4).float())
    assert outcome.kind == "model"
    assert outcome.relation == "merge"
    assert all(check.passed for check in outcome.checks)
    size = sum(t.nbytes for t in a.values())
    details = {k: v for k, v in outcome.details.items() if k not in ("models", "probe")}
    assert details == {
        "method": "linear",
        "donor": str(models["a"]),
        "lost_delta_fraction": 0.0,
        "bytes_read": 2 * size,
        "bytes_written": (merge.out / "model.safetensors").stat().st_size,
    }
    assert [m["model"] for m in outcome.details["models"]] == [str(models["a"]), str(models["b"])]
    assert {p["model"] for p in outcome.details["probe"]["parents"]} == {str(models["a"]), str(models["b"])}
    assert sorted(p.name for p in merge.out.iterdir()) == [
        "config.json", "generation_config.json", "merge.yaml", "model.safetensors",
    ]  # fmt: skip
    assert "no tokenizer" in outcome.checks[0].claim


def test_task_arithmetic(models, merge):
    method = {"type": "task_arithmetic", "scale": 0.5}
    outcome = merge(models=[models["a"], models["b"]], base_model=models["base"], method=method)
    base, a, b = (weights_of(models[n]) for n in ("base", "a", "b"))
    for name, tensor in merge.tensors().items():
        wanted = base[name].double() + 0.5 * ((a[name].double() - base[name]) + (b[name].double() - base[name]))
        torch.testing.assert_close(tensor, wanted.float(), rtol=1e-7, atol=0)
    assert outcome.details["donor"] == str(models["base"])


def test_slerp_with_and_without_base(models, merge):
    merge(models=[models["a"], models["b"]], method={"type": "slerp", "t": 0.3})
    a, b = weights_of(models["a"]), weights_of(models["b"])
    for name, tensor in merge.tensors().items():
        torch.testing.assert_close(tensor, slerp([a[name], b[name]], t=0.3).float(), rtol=1e-7, atol=0)
    without = digest(merge.out)
    merge(models=[models["b"]], base_model=models["a"], method={"type": "slerp", "t": 0.3})
    assert digest(merge.out) == without


def test_slerp_of_a_model_with_itself(models, merge):
    merge(models=[models["a"], models["a"]], method="slerp")
    assert all(torch.equal(weights_of(models["a"])[n], t) for n, t in merge.tensors().items())
    with pytest.raises(IncompatibleModelsError, match="two different ones"):
        merge(models=[f"{models['a']}/../a"], base_model=models["a"], method="slerp")


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp"])
def test_piece_size_changes_no_byte(models, merge, method, monkeypatch):
    listed = [models["a"]] if method == "slerp" else [models["a"], models["b"]]
    digests = set()
    for chunk in (37, 4096, 1 << 30):
        monkeypatch.setattr("honeloom.stages.merge_inputs.chunk_elements", lambda *_, size=chunk, **__: (size, 1))
        merge(models=listed, base_model=models["base"], method=method, dtype="bf16")
        digests.add(digest(merge.out))
    assert len(digests) == 1


def test_shards_change_no_value(tmp_path, models, merge):
    make_model(tmp_path / "sharded", 1, max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    merge(models=[models["a"], models["b"]])
    single = merge.tensors()
    merge(models=[tmp_path / "sharded", models["b"]])
    assert all(torch.equal(single[n], t) for n, t in merge.tensors().items())


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_output_types(models, merge, name, dtype):
    outcome = merge(models=[models["a"], models["b"]], dtype=name)
    a, b = weights_of(models["a"]), weights_of(models["b"])
    for tensor_name, tensor in merge.tensors().items():
        assert torch.equal(tensor, round_once((a[tensor_name].double() + b[tensor_name].double()) / 2, dtype))
    config = json.loads((merge.out / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert outcome.checks[1].value <= 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_keeps_the_donors_type(tmp_path, models, merge, dtype):
    make_model(tmp_path / "narrow", 7, dtype)
    merge(models=[tmp_path / "narrow", models["a"]])
    assert {t.dtype for t in merge.tensors().values()} == {dtype}


def test_single_model_with_weight_one_is_itself(tmp_path, merge):
    base, tuned = (make_model(tmp_path / n, s, torch.bfloat16) for n, s in (("base", 0), ("tuned", 1)))
    merge(models=[tuned], base_model=base, method="task_arithmetic")
    assert all(torch.equal(weights_of(tuned)[n], t) for n, t in merge.tensors().items())


def test_lost_deltas_are_counted(tmp_path, merge):
    """A change of one part in a thousand is under half of bfloat16's last place almost everywhere."""
    base, tuned = (make_model(tmp_path / n, 0) for n in ("base", "tuned"))
    for folder in (base, tuned):
        edit_weights(folder, lambda ts: ts.update({n: torch.ones_like(t) for n, t in ts.items()}))
    edit_weights(tuned, lambda ts: ts.update({n: t * 1.001 for n, t in ts.items() if "mlp" in n}))
    everything = sum(t.numel() for t in weights_of(base).values())
    moved = sum(t.numel() for n, t in weights_of(base).items() if "mlp" in n)
    outcome = merge(models=[tuned], base_model=base, method="task_arithmetic", dtype="bf16")
    assert outcome.details["lost_delta_fraction"] == pytest.approx(moved / everything)
    assert "stay the base's" in merge.log.warnings[0]
    outcome = merge(models=[tuned], base_model=base, method="task_arithmetic", dtype="fp32")
    assert outcome.details["lost_delta_fraction"] == 0


def test_tied_embeddings(tmp_path, merge):
    one, two = (make_model(tmp_path / n, s, tie_word_embeddings=True) for n, s in (("one", 1), ("two", 2)))
    merge(models=[one, two])
    assert "lm_head.weight" not in merge.tensors()
    expected = digest(merge.out)
    edit_weights(two, lambda ts: ts.update({"lm_head.weight": ts["model.embed_tokens.weight"].clone()}))
    merge(models=[one, two])
    assert digest(merge.out) == expected
    edit_weights(two, lambda ts: ts["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but 'lm_head\.weight' is not"):
        merge(models=[one, two])


def test_a_head_of_one_model_is_kept_and_tied_ones_give_their_embeddings(tmp_path, merge):
    tied = make_model(tmp_path / "tied", 1, tie_word_embeddings=True)
    own = make_model(tmp_path / "own", 2)
    merge(models=[tied, own])
    a, b, got = weights_of(tied), weights_of(own), merge.tensors()
    head = (a["model.embed_tokens.weight"].double() + b["lm_head.weight"].double()) / 2
    assert torch.equal(got["lm_head.weight"], head.float())
    assert json.loads((merge.out / "config.json").read_text())["tie_word_embeddings"] is False


def test_tokenizer_and_yaml(models, merge):
    for name, content in (("a", "x"), ("b", "y")):
        (models[name] / "tokenizer_config.json").write_text(json.dumps({"chat_template": content}))
    edit_json(models["a"] / "generation_config.json", temperature=0.5, do_sample=True)
    linear = {"type": "linear", "normalize": False}
    for name in ("a", "b"):
        (models[name] / "tokenizer.json").write_text(TOKENIZER)
    with pytest.raises(IncompatibleModelsError, match="chat_template: auto"):
        merge(models=[models["a"], models["b"]], method=linear)
    merge(models=[models["a"], models["b"]], method=linear, chat_template="auto")
    assert (merge.out / "tokenizer_config.json").read_bytes() == (models["a"] / "tokenizer_config.json").read_bytes()
    assert json.loads((merge.out / "generation_config.json").read_text())["temperature"] == 0.5
    assert any("chat templates" in w and "differ" in w for w in merge.log.warnings)
    again = MergeConfig.model_validate(load_yaml(merge.out / "merge.yaml"))
    assert again.models[0].model == str(models["a"])
    assert again.method.normalize is False


def make_adapter(base: Path, folder: Path, seed: int = 0, **settings) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings})
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 20}},
        {"target_modules": ["lm_head", "o_proj"]},
    ],
)
def test_adapter_as_a_model(models, merge, tmp_path, settings):
    adapter = make_adapter(models["base"], tmp_path / "adapter", **settings)
    base = LlamaForCausalLM.from_pretrained(models["base"], dtype=torch.float64)
    merged = PeftModel.from_pretrained(base, adapter).double().merge_and_unload().state_dict()
    outcome = merge(models=[adapter], base_model=models["base"], method="task_arithmetic")
    for name, tensor in merge.tensors().items():
        torch.testing.assert_close(tensor, merged[name].float(), rtol=2e-7, atol=1e-8)
    assert all(c.passed for c in outcome.checks)
    by_average = merge(models=[adapter, adapter])
    assert by_average.details["donor"] == str(adapter)
    assert all(torch.equal(weights_of(merge.out)[n], t) for n, t in merge.tensors().items())


def test_adapter_in_small_pieces(models, merge, tmp_path, monkeypatch):
    adapter = make_adapter(models["base"], tmp_path / "adapter")
    monkeypatch.setattr("honeloom.checkpoint.adapter._ROW_ELEMENTS", 96)
    digests = []
    for chunk in (41, 1 << 20):
        monkeypatch.setattr("honeloom.stages.merge_inputs.chunk_elements", lambda *_, size=chunk, **__: (size, 1))
        merge(models=[adapter, models["a"]])
        digests.append(digest(merge.out))
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole modules"),
        ({"bias": "all"}, "changes biases too"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"alpha_pattern": {"(": 1}}, "regular expression"),
        ({"lora_alpha": "big"}, "must be a number"),
    ],
)
def test_adapters_that_are_more_than_lora(models, merge, tmp_path, changes, reason):
    adapter = make_adapter(models["base"], tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=reason):
        merge(models=[adapter])


def test_adapter_that_does_not_fit_its_base(models, merge, tmp_path):
    adapter = make_adapter(models["base"], tmp_path / "adapter")
    small = make_model(tmp_path / "small", 0, hidden_size=16)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(small))
    with pytest.raises(CheckpointError, match="is this the base it was trained on"):
        merge(models=[adapter])
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(SourceError, match="base model is not known"):
        merge(models=[adapter])
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {n.replace("layers.1", "layers.9"): t for n, t in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(models["base"]))
    with pytest.raises(CheckpointError, match=r"layers\.9.*not a weight of the base"):
        merge(models=[adapter])


def test_incompatible_models(models, merge, tmp_path):
    other = make_model(tmp_path / "other", 0, intermediate_size=64)
    with pytest.raises(IncompatibleModelsError, match="intermediate_size is 48 and 64"):
        merge(models=[models["a"], other])
    assert not list(merge.out.glob("*"))
    edit_json(models["b"] / "config.json", rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})
    with pytest.raises(IncompatibleModelsError, match="rope_parameters"):
        merge(models=[models["a"], models["b"]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_inputs(models, merge, value):
    edit_weights(models["b"], lambda ts: ts["model.norm.weight"].__setitem__(5, value))
    with pytest.raises(NotFiniteError, match=r"b: tensor 'model.norm.weight' .*element 5.*allow_nan"):
        merge(models=[models["a"], models["b"]])
    outcome = merge(models=[models["a"], models["b"]], allow_nan=True)
    assert not merge.tensors()["model.norm.weight"].isfinite().all()
    assert all(c.passed for c in outcome.checks)
    assert outcome.checks[0].value is False


def test_values_beyond_the_output_type(models, merge):
    edit_weights(models["a"], lambda ts: ts["model.norm.weight"].fill_(1e6))
    with pytest.raises(NotFiniteError, match=r"beyond the range of torch.float16; choose dtype"):
        merge(models=[models["a"]], dtype="fp16")


def test_integer_tensors_pass_only_if_equal(models, merge):
    for name in ("a", "b"):
        edit_weights(models[name], lambda ts: ts.update({"steps": torch.arange(3)}))
    merge(models=[models["a"], models["b"]])
    assert merge.tensors()["steps"].tolist() == [0, 1, 2]
    edit_weights(models["b"], lambda ts: ts["steps"].add_(1))
    with pytest.raises(IncompatibleModelsError, match=r"'steps' is I64.*values differ"):
        merge(models=[models["a"], models["b"]])


def test_code_in_a_repository_is_refused(models, merge):
    edit_json(models["b"] / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(CheckpointError, match="auto_map"):
        merge(models=[models["a"], models["b"]])


def test_damaged_and_pickled_weights(models, merge):
    file = models["b"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"b/model.safetensors: .*truncated"):
        merge(models=[models["a"], models["b"]])
    file.rename(models["b"] / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="never reads them"):
        merge(models=[models["a"], models["b"]])


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from merging_models import MergeRun
run = MergeRun(Path(sys.argv[2]))
run(models=sys.argv[3:5], base_model=sys.argv[5], method="task_arithmetic", dtype="bf16")
print(run.out)
"""


@pytest.mark.slow
def test_hash_seed_changes_no_byte(models, tmp_path):
    digests = set()
    for seed in ("0", "1"):
        root = tmp_path / seed
        root.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), root, models["a"], models["b"], models["base"]],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        out = Path(done.stdout.splitlines()[-1])
        digests.add(hashlib.sha256(b"".join(p.read_bytes() for p in sorted(out.iterdir()))).hexdigest())
    assert len(digests) == 1
