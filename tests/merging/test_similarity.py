"""Similarities of models against their definition, and one pass whose bits do not depend on how it was read."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from merging_models import edit_weights, make_model
from safetensors.torch import save_file

from honeloom.checkpoint.architectures import ARCHITECTURES
from honeloom.checkpoint.headers import TensorInfo
from honeloom.errors import IncompatibleModelsError, NotFiniteError
from honeloom.merging import similarity as module
from honeloom.merging.engine.operands import KINDS, Operands
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.similarity import branch_matrices, column_products, measure_similarity, sign_counts
from honeloom.merging.similarity_kernels import add_rows

UP, QUERY = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
OFF = ~np.eye(3, dtype=bool)


@pytest.fixture
def opened():
    with ExitStack() as stack:
        yield lambda *folders: [stack.enter_context(ModelSource(f.name, f)) for f in folders]


def write(folder: Path, tensors: dict[str, torch.Tensor], model_type: str = "llama") -> Path:
    """A folder with some of a model's tensors; what is compared needs no others."""
    folder.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def columns(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values).T


@pytest.fixture
def family(tmp_path):
    """A base, two tunings of it and a stranger."""
    base, stranger = make_model(tmp_path / "base", 0), make_model(tmp_path / "stranger", 9)
    tuned = []
    for seed in (1, 2):
        folder = make_model(tmp_path / f"tuned{seed}", 0)
        generator = torch.Generator().manual_seed(seed)
        edit_weights(folder, lambda tensors, g=generator: [t.add_(1e-3 * torch.randn(t.shape, generator=g))
                                                           for t in tensors.values()])  # fmt: skip
        tuned.append(folder)
    return base, *tuned, stranger


def cosine_by_hand(one: Path, other: Path, base: Path | None, wanted: str) -> float:
    """The definition, tensor after tensor, with torch."""
    found = []
    with ExitStack() as stack:
        a, b, *origin = (stack.enter_context(ModelSource("m", f)) for f in (one, other, *([base] if base else [])))
        for name in a.tensors:
            if ("self_attn" in name or "mlp" in name) and wanted in name:
                shape, count = a.info(name).shape, a.info(name).elements
                start = origin[0].read(name, 0, count) if origin else 0
                x, y = ((s.read(name, 0, count) - start).view(shape) for s in (a, b))
                found.append(torch.nn.functional.cosine_similarity(x, y, dim=0, eps=1e-300).mean())
    return float(torch.stack(found).mean())


def test_it_is_the_mean_of_column_cosines_over_tensors(family, opened):
    base, *models = family
    found = measure_similarity(opened(*models), opened(base)[0], threads=1)
    assert found.names == ("tuned1", "tuned2", "stranger")
    assert sorted(found.matrices) == sorted(
        f"{kind}{branch}" for kind in ("", "delta_", "sign_") for branch in ("attention", "mlp", "all")
    )
    for branch, wanted in (("attention", "self_attn"), ("mlp", "mlp"), ("all", "")):
        for key, origin in ((branch, None), (f"delta_{branch}", base)):
            for i, one in enumerate(models):
                for j in range(i):
                    expected = cosine_by_hand(one, models[j], origin, wanted)
                    assert found.matrices[key][i, j] == pytest.approx(expected, abs=1e-12)
    for square in found.matrices.values():
        assert np.array_equal(square, square.T)
        assert (np.diag(square) == 1.0).all()


def test_tunings_are_alike_and_the_stranger_is_not(family, opened):
    base, *models = family
    found = measure_similarity(opened(*models), opened(base)[0], threads=2).matrices
    assert found["all"][0, 1] > 0.99
    assert abs(found["all"][0, 2]) < 0.1
    # Random changes are not alike, however alike the models are; half of their signs agree.
    assert abs(found["delta_all"][0, 1]) < 0.05
    assert found["sign_all"][0, 1] == pytest.approx(0.5, abs=0.02)


def test_columns_by_hand(tmp_path, opened):
    one = columns([3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 2.0])
    other = columns([4.0, 3.0], [0.0, 5.0], [0.0, 0.0], [1.0, 1.0], [-1.0, -2.0])
    a, b = (write(tmp_path / n, {UP: t}) for n, t in (("a", one), ("b", other)))
    found = measure_similarity(opened(a, b), None, threads=1).matrices
    # 24/25, at right angles, both zero, one zero, opposite.
    assert found["mlp"][0, 1] == pytest.approx((0.96 + 0 + 1 + 0 - 1) / 5, abs=1e-15)
    assert found["all"][0, 1] == found["mlp"][0, 1]
    assert math.isnan(found["attention"][0, 1])
    assert found["attention"][0, 0] == 1.0


def test_opposite_and_equal_models_are_exactly_that(tmp_path, opened):
    values = torch.randn(70, 41, generator=torch.Generator().manual_seed(0))
    folders = [write(tmp_path / n, {UP: f * values, QUERY: f * values}) for n, f in (("a", 1), ("b", -1), ("c", 1))]
    found = measure_similarity(opened(*folders), None, threads=1).matrices
    for key in ("attention", "mlp", "all"):
        assert found[key].tolist() == [[1, -1, 1], [-1, 1, -1], [1, -1, 1]]


def test_tensors_count_alike_whatever_their_size(tmp_path, opened):
    small, large = columns([1.0, 0.0]), torch.ones(50, 60)
    one = write(tmp_path / "one", {QUERY: small, UP: large})
    other = write(tmp_path / "other", {QUERY: columns([0.0, 1.0]), UP: large})
    found = measure_similarity(opened(one, other), None, threads=1).matrices
    assert [found[key][0, 1] for key in ("attention", "mlp", "all")] == [0.0, 1.0, 0.5]


def test_signs_by_hand(tmp_path, opened):
    base = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    one = base + torch.tensor([[0.5, -0.5, 0.0, 0.5], [0.5, 0.0, 0.0, 0.0]])
    two = base + torch.tensor([[0.1, -0.2, 0.5, -0.1], [0.0, 0.0, 0.0, 0.0]])
    rest = base + torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    folders = [write(tmp_path / n, {UP: t}) for n, t in (("one", one), ("two", two), ("rest", rest), ("base", base))]
    *models, origin = opened(*folders)
    found = measure_similarity(models, origin, threads=1).matrices
    assert found["sign_mlp"][0, 1] == 2 / 3  # three entries are changed by both
    assert math.isnan(found["sign_mlp"][0, 2])  # none is
    assert (np.diag(found["sign_all"]) == 1).all()
    # Columns' cosines: one of (0.5, 0.5) and (0.1, 0), two equal signs, zero against something, opposite.
    assert found["delta_mlp"][0, 1] == pytest.approx((math.sqrt(0.5) + 1 + 0 - 1) / 4, abs=1e-7)


def test_the_order_of_the_models_moves_rows_and_nothing_else(family, opened):
    base, *models = family
    origin = opened(base)[0]
    plain = measure_similarity(opened(*models), origin, threads=1)
    order = [2, 0, 1]
    moved = measure_similarity(opened(*(models[i] for i in order)), origin, threads=1)
    for key, square in plain.matrices.items():
        assert np.array_equal(square[np.ix_(order, order)], moved.matrices[key], equal_nan=True)


@pytest.mark.parametrize(("chunk", "threads"), [(1, 1), (33, 2), (1 << 20, 1), (1 << 20, 3)])
def test_pieces_and_threads_change_no_bit(family, opened, monkeypatch, chunk, threads):
    base, *models = family
    plain = measure_similarity(opened(*models), opened(base)[0], threads=1)
    monkeypatch.setattr(module, "CHUNK", chunk)
    other = measure_similarity(opened(*models), opened(base)[0], threads=threads)
    for key, square in plain.matrices.items():
        assert square.tobytes() == other.matrices[key].tobytes()


@pytest.mark.parametrize("kind", ["F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("with_base", [False, True])
def test_the_kernel_equals_the_plain_computation_to_the_bit(kind, with_base):
    types = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
             "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
    generator = torch.Generator().manual_seed(len(kind))
    shape = (4, 37, 259)  # one tile of columns and a bit
    stored = torch.randn(shape, dtype=torch.float64, generator=generator).to(types[kind])
    stored[1] = (
        stored[0].double().where(torch.rand(shape[1:], generator=generator) < 0.5, stored[1].double()).to(types[kind])
    )
    values = stored.double().numpy()
    data = [row.contiguous().view(-1).view(torch.uint8).numpy() for row in stored]
    models, origin = (data[1:], data[0]) if with_base else (data, None)
    part = Operands(shape[1] * shape[2], tuple(models), (KINDS[kind],) * len(models), origin, KINDS[kind])
    pairs = len(models) * (len(models) + 1) // 2
    sums, deltas = np.zeros((pairs, shape[2])), np.zeros((pairs, shape[2]))
    signs = np.zeros((2, pairs), np.int64)
    add_rows(*part.arguments, shape[2], sums, deltas, signs)
    assert np.array_equal(sums, column_products(values[1:] if with_base else values))
    if with_base:
        expected = values[1:] - values[0]
        assert np.array_equal(deltas, column_products(expected))
        assert np.array_equal(signs, sign_counts(expected))
        assert 0 < signs[0, 0] < shape[1] * shape[2]  # the first changes some entries and not others
    else:
        assert not deltas.any()
        assert not signs.any()


def test_types_may_differ_and_an_adapter_counts_with_its_base(tmp_path, opened):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_model(tmp_path / "base", 0)
    torch.manual_seed(1)
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "full")
    half = make_model(tmp_path / "half", 0, torch.bfloat16)
    full, short, origin = opened(tmp_path / "full", half, base)
    with ModelSource("adapter", tmp_path / "adapter", base) as adapter:
        found = measure_similarity([full, adapter, short], origin, threads=1).matrices
    assert found["all"][0, 1] == pytest.approx(1, abs=1e-12)
    assert found["delta_all"][0, 1] == pytest.approx(1, abs=1e-5)
    assert found["all"][0, 2] == pytest.approx(found["all"][1, 2], abs=1e-7)
    assert found["all"][0, 2] < 0.99


def test_a_lone_model_and_progress(family, opened):
    steps = []
    (model,) = opened(family[1])
    found = measure_similarity([model], None, threads=1, advance=steps.append)
    assert {key: square.tolist() for key, square in found.matrices.items()} == {
        "attention": [[1.0]], "mlp": [[1.0]], "all": [[1.0]],
    }  # fmt: skip
    assert steps == [1] * len(branch_matrices(model)) == [1] * 14


def test_shapes_and_names_must_agree(tmp_path, opened):
    one, wide = write(tmp_path / "one", {UP: torch.ones(2, 3)}), write(tmp_path / "wide", {UP: torch.ones(2, 4)})
    other, none = write(tmp_path / "other", {QUERY: torch.ones(2, 3)}), write(tmp_path / "none", {"x": torch.ones(2)})
    first, *others = opened(one, wide, other)
    for model, words in zip(others, (r".*up_proj.* \(2, 3\) and \(2, 4\)", "it has no '.*up_proj"), strict=True):
        with pytest.raises(IncompatibleModelsError, match=f"one with {model.name}: {words}"):
            measure_similarity([first, model], None, threads=1)
        with pytest.raises(IncompatibleModelsError, match=words):
            measure_similarity([first], model, threads=1)
    with pytest.raises(IncompatibleModelsError, match="none: it has no matrix"):
        measure_similarity(opened(none), None, threads=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("allow_nan", [False, True])
def test_a_damaged_model_is_named(tmp_path, value, allow_nan):
    sound, damaged = write(tmp_path / "sound", {UP: torch.ones(9, 3)}), torch.ones(9, 3)
    damaged[7, 1] = value
    folder = write(tmp_path / "damaged", {UP: damaged})
    with ModelSource("sound", sound) as a, ModelSource("damaged", folder, allow_nan=allow_nan) as b:
        for models, base in (([a, b], None), ([a], b)):
            with pytest.raises(NotFiniteError, match=r"damaged: tensor '.*up_proj"):
                measure_similarity(models, base, threads=1)


class _Shapes:
    """What `branch_matrices` asks of a source, from a layout's table of shapes."""

    def __init__(self, architecture, shapes):
        self.architecture = architecture
        self.tensors = {n: TensorInfo(n, "BF16", shape, 0, 0) for n, shape in shapes.items()}

    def info(self, name):
        return self.tensors[name]


SIZES = {
    "hidden_size": 8, "intermediate_size": 12, "moe_intermediate_size": 12, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "n_embd": 8, "n_head": 2, "n_inner": None, "num_local_experts": 3,
    "num_experts": 3, "shared_expert_intermediate_size": 12,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_layout_has_matrices_in_both_branches(name):
    layout = ARCHITECTURES[name]
    inner = layout.layer_shapes(SIZES, 0)
    prefix = layout.disk_layers[-1]
    shapes = {f"{prefix}.0.{n}": shape for n, shape in inner.items()}
    found = branch_matrices(_Shapes(layout, {**shapes, "model.embed_tokens.weight": (9, 8), "lm_head.weight": (9, 8)}))
    assert {m.branch for m in found} == {"attention", "mlp"}
    assert {m.name for m in found} == {n for n, shape in shapes.items() if len(shape) >= 2}


def test_experts_in_one_tensor_are_matrices_of_their_own():
    name = "model.layers.1.mlp.experts.down_proj"
    found = branch_matrices(_Shapes(ARCHITECTURES["mixtral"], {name: (3, 8, 12)}))
    assert [(m.first, m.rows, m.columns, m.branch) for m in found] == [(e * 96, 8, 12, "mlp") for e in range(3)]
