"""The document of a candidate, and the weights that a plan reads from it."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from merging_models import make_model

from honeloom.errors import ConfigError
from honeloom.merging.config import FisherConfig, LinearConfig, TaskArithmeticConfig, TiesConfig
from honeloom.merging.engine.layout import plan_parts
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.merge_config import MergeConfig
from honeloom.merging.parameters import resolve
from honeloom.merging.search.candidates import Candidate, candidate_config, group_of_layer, group_rows

WHERE = {"layers": 4, "prefix": "model.layers"}


def document(candidate, models=("a", "b"), base=None, method=None, **where):
    return candidate_config(candidate, models, base, method or LinearConfig(), **{**WHERE, **where})


def test_one_group_is_one_number_per_model():
    found = document(Candidate.of([[0.25, 0.75]]), settings={"dtype": "bf16"})
    assert found == {
        "models": [{"model": "a", "weight": 0.25}, {"model": "b", "weight": 0.75}],
        "method": {"type": "linear", "normalize": True},
        "dtype": "bf16",
    }
    assert MergeConfig.model_validate(found).models[1].weight == 0.75


def test_groups_are_anchors_of_the_layers_and_a_number_for_the_rest():
    found = document(Candidate.of([[0.1, 0.5], [0.3, 0.5], [0.6, 0.5]]), base="o", method=TiesConfig())
    assert found["models"][0]["weight"] == [
        {"filter": "model.layers.", "value": [0.1, 0.1, 0.3, 0.3]}, {"filter": "*", "value": 0.6},
    ]  # fmt: skip
    assert found["models"][1]["weight"] == 0.5
    assert found["base_model"] == "o"


def test_densities_stand_beside_the_weights():
    found = document(Candidate.of([[0.1, 0.5]], (0.2, 0.9)), base="o", method=TiesConfig())
    assert [m["density"] for m in found["models"]] == [0.2, 0.9]


@pytest.mark.parametrize(
    ("weights", "base", "method", "listed"),
    [
        ([[0.5, 0.0, 0.5]], None, LinearConfig(), "ac"),
        ([[0.0, 0.5, 0.5]], None, LinearConfig(), "abc"),  # a gives configuration and tokenizer
        ([[0.0, 0.0, 1.0]], "o", TaskArithmeticConfig(), "c"),
        ([[0.0, 0.0, 0.0]], "o", TaskArithmeticConfig(), "a"),
        ([[1.0, 0.0, 0.0]], "a", TaskArithmeticConfig(), "ab"),  # the base alone is no merge
        ([[0.0, 0.5, 1], [0, 0.0, 1], [0, 0.0, 1]], "o", TaskArithmeticConfig(), "bc"),
    ],
)
def test_models_without_a_weight_are_left_out(weights, base, method, listed):
    found = document(Candidate.of(weights), "abc", base, method)
    assert "".join(m["model"] for m in found["models"]) == listed
    MergeConfig.model_validate(found)


@given(layers=st.integers(1, 64), groups=st.integers(2, 64), seed=st.integers(0, 99))
def test_every_layer_gets_the_weights_of_its_group(layers, groups, seed):
    groups = min(groups, layers)
    if groups < 2:
        return
    table = np.random.default_rng(seed).uniform(size=(group_rows(groups), 2))
    found = document(Candidate.of(table), layers=layers)
    config = MergeConfig.model_validate(found)
    for k, source in enumerate(config.models):
        for layer in range(layers):
            got = resolve(source.weight, f"model.layers.{layer}.mlp.up_proj.weight", layer / max(1, layers - 1), 1.0)
            assert got == pytest.approx(table[layer * groups // layers, k], rel=1e-12, abs=1e-14)
        assert resolve(source.weight, "lm_head.weight", 1.0, 1.0) == table[-1, k]
        assert resolve(source.weight, "model.embed_tokens.weight", 0.0, 1.0) == table[-1, k]


def test_groups_are_contiguous_and_as_equal_as_can_be():
    assert [group_of_layer(i, 7, 4) for i in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert group_of_layer(None, 7, 4) == 3
    assert [group_of_layer(i, 7, 1) for i in (0, 6, None)] == [0, 0, 0]
    assert (group_rows(1), group_rows(2), group_rows(12)) == (1, 3, 13)


def test_the_plan_of_a_document_holds_the_candidates_weights(tmp_path):
    folders = [make_model(tmp_path / name, seed, num_hidden_layers=4) for seed, name in enumerate("ab")]
    names = [str(f) for f in folders]
    table = np.array([[0.75, 0.25], [0.5, 1.5], [1.0, 3.0]])
    config = MergeConfig.model_validate(document(Candidate.of(table), names))
    with ExitStack() as stack:
        opened = {
            f"models.{i}": stack.enter_context(ModelSource(n, f))
            for i, (n, f) in enumerate(zip(names, folders, strict=True))
        }
        donor = opened["models.0"]
        parts = {p.name: p.weights for p in plan_parts(config, opened, donor, donor.architecture)}
    assert parts["model.layers.1.mlp.up_proj.weight"] == pytest.approx((0.75, 0.25), rel=1e-14)
    assert parts["model.layers.2.mlp.up_proj.weight"] == pytest.approx((0.5, 1.5), rel=1e-14)
    assert parts["model.embed_tokens.weight"] == parts["lm_head.weight"] == parts["model.norm.weight"] == (1.0, 3.0)


def test_normalised_rows_sum_to_one_and_nothing_becomes_equal_weights():
    found = Candidate.of([[1, 3], [0, 0], [-1, 3]], (0.5, 0.5)).normalised()
    assert found.array == pytest.approx(np.array([[0.25, 0.75], [0.5, 0.5], [-0.5, 1.5]]))
    assert found.densities == (0.5, 0.5)


def test_impossible_candidates_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 3\) weights and 0 densities for 2 models"):
        document(Candidate.of([[1, 1, 1]]))
    with pytest.raises(ConfigError, match="5 groups of layers, and the models have 4 layers"):
        document(Candidate.of(np.ones((6, 2))))
    with pytest.raises(ConfigError, match="fisher measures every model on rows of its own"):
        document(Candidate.of([[1, 1]]), method=FisherConfig())
