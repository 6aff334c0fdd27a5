"""`aggregate --scale`: a multiplier on the combined update, so that equal weights and K give the sum of K adapters."""

from __future__ import annotations

import pytest
import torch
from adapter_folders import (
    WEIGHTS,
    logits,
    logits_of,
    make_adapter,
    open_base,
    summed_logits,
    summed_weights,
)
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

import honeloom
from honeloom.checkpoint.adapter import LoraFile
from honeloom.errors import ConfigError, IncompatibleModelsError
from honeloom.federated.aggregation.flora import flora
from honeloom.federated.aggregation.svd import svd
from honeloom.types.updates import Part


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_model):
    """Two adapters of other ranks and scales: sums of products, not of factors, are what is asked for."""
    root = tmp_path_factory.mktemp("pair")
    return [make_adapter(tiny_model, root / "a", 1), make_adapter(tiny_model, root / "b", 2, r=2, lora_alpha=2)]


def dense(folder):
    """Module -> scale B A, by the loader's rules."""
    with LoraFile(folder) as file:
        return {
            name: f.scale * file.weights.read(f.b_name, torch.float64) @ file.weights.read(f.a_name, torch.float64)
            for name, f in file.factors.items()
        }


def test_the_sum_of_two_is_one_merged_after_the_other(pair, tiny_model, tmp_path):
    """Golden: LoRA and LoRA equals the sequential merge, by PEFT's own merging."""
    report = honeloom.aggregate(pair, method="flora", scale=2, output_dir=tmp_path / "out")
    model = PeftModel.from_pretrained(open_base(tiny_model), pair[0]).merge_and_unload()
    model = PeftModel.from_pretrained(model, pair[1]).merge_and_unload()
    torch.testing.assert_close(logits_of(tiny_model, tmp_path / "out"), logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model), summed_logits(tiny_model, pair, (0.5, 0.5)), atol=1e-2)
    assert report.details["relative_error"] <= 1e-6 and report.details["scale"] == 2
    assert all(c.passed for c in report.verification)


def test_every_rule_is_multiplied(pair, tiny_model, tmp_path):
    equals = [make_adapter(tiny_model, tmp_path / n, s) for s, n in enumerate("ab")]
    for method in ("svd", "flora", "zero_pad", "fedit", "fedex", "flexlora"):
        adapters = equals if method in ("fedit", "fedex") else pair
        honeloom.aggregate(adapters, method=method, weights=[3, 1], output_dir=tmp_path / f"{method}-one")
        report = honeloom.aggregate(adapters, method=method, weights=[3, 1], scale=-1.5, output_dir=tmp_path / method)
        assert all(c.passed for c in report.verification), method
        one, scaled = dense(tmp_path / f"{method}-one"), dense(tmp_path / method)
        for name, update in one.items():
            torch.testing.assert_close(scaled[name], -1.5 * update, rtol=1e-5, atol=1e-6)


def test_into_a_base(pair, tiny_model, tmp_path):
    report = honeloom.aggregate(pair, method="flora", scale=2, into_base=tiny_model, output_dir=tmp_path / "out")
    expected = summed_weights(tiny_model, pair, (1, 1))
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)
    assert report.verification[-1].claim.startswith("base plus every adapter's own share") and report.status == "ok"


def test_whole_tensors_cannot_be_multiplied(tiny_model, tmp_path):
    adapters = [make_adapter(tiny_model, tmp_path / n, s, modules_to_save=["lm_head"]) for s, n in enumerate("ab")]
    with pytest.raises(IncompatibleModelsError, match=r"scale 2: .* holds '.*lm_head.weight', a whole tensor"):
        honeloom.aggregate(adapters, method="flora", scale=2, output_dir=tmp_path / "out")
    assert honeloom.aggregate(adapters, method="flora", scale=1, output_dir=tmp_path / "out").status == "ok"


@pytest.mark.parametrize(
    ("value", "message"), [(0, "leaves nothing"), (float("nan"), "finite"), (float("inf"), "finite")]
)
def test_scales_that_mean_nothing(pair, tmp_path, value, message):
    with pytest.raises(ConfigError, match=rf"aggregate: .*{message}"):
        honeloom.aggregate(pair, scale=value, output_dir=tmp_path / "out")


def test_a_check_that_does_not_hold_ends_the_stage(pair, tmp_path, monkeypatch):
    """The factors of scale 1 are not those of scale 2."""
    from honeloom.errors import VerificationError
    from honeloom.federated.aggregation import flora as module
    from honeloom.types.updates import Combined

    right = module.flora
    monkeypatch.setattr(module, "flora", lambda parts: Combined(right(parts).b / 2, right(parts).a))
    with pytest.raises(VerificationError, match="weighted sum of updates"):
        honeloom.aggregate(pair, method="flora", scale=2, output_dir=tmp_path / "out")


def test_the_command(pair, tmp_path, capsys):
    from honeloom.cli.main import main

    with pytest.raises(SystemExit) as end:
        main(["aggregate", *map(str, pair), "--method", "flora", "--scale", "2", "--output-dir", str(tmp_path / "out")])
    assert end.value.code == 0
    single = [dense(a) for a in pair]
    found = dense(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(found[name], single[0][name] + single[1][name], rtol=0, atol=1e-5)


def test_the_default_changes_nothing(pair, tmp_path):
    for name, options in (("one", {}), ("two", {"scale": 1.0}), ("three", {"scale": 1.5})):
        honeloom.aggregate(pair, method="svd", output_dir=tmp_path / name, **options)
    one, two, three = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_equal_shares_and_their_number_give_the_sum(count, rank, seed):
    """Law: K parts of share 1/K and multiplier K are the plain sum, exactly by stacking, best by svd."""
    generator = torch.Generator().manual_seed(seed)
    draws = [
        (torch.randn(7, rank, generator=generator, dtype=torch.float64),
         torch.randn(rank, 6, generator=generator, dtype=torch.float64))
        for _ in range(count)
    ]  # fmt: skip
    parts = [Part(b, a, 1.5 * count, 1 / count) for b, a in draws]
    total = sum(1.5 * b @ a for b, a in draws)
    stacked, best = flora(parts), svd(parts, rank=4)
    torch.testing.assert_close(stacked.b @ stacked.a, total, rtol=0, atol=1e-12)
    tail = torch.linalg.svdvals(total)[4:].square().sum().sqrt()
    error = torch.linalg.matrix_norm(best.b @ best.a - total)
    torch.testing.assert_close(error, tail, rtol=1e-6, atol=1e-6)
