"""What holds for every merge method: the conformance suite, ranges, threads, inputs, names."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_checks import drawn, dtypes, require_same_bits_in_pieces, shapes

from honeloom.merging import METHODS
from honeloom.merging.engine.tensors import Rule
from honeloom.merging.linear import require_models, weight_total, weighted_sum
from honeloom.registry import load_target
from honeloom.testing import check_merge_method

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*are opposite", "ignore:.*directions of the models cancel", "ignore:.*raise max_iter"
)

RULES: dict[str, Rule] = {row.name: load_target(row.target) for row in METHODS}
MODELS = {"slerp": 2, "nuslerp": 2, "nearswap": 1, "arcee_fusion": 1, "passthrough": 1}
FAITHFUL = {"ties": {"density": 1.0}, "dare_linear": {"density": 1.0}, "dare_ties": {"density": 1.0, "normalize": True},
            "della": {"density": 1.0}, "della_linear": {"density": 1.0}, "breadcrumbs": {"density": 1.0, "gamma": 0.0},
            "breadcrumbs_ties": {"density": 1.0, "normalize": True}, "sce": {"select_topk": 1.0}}  # fmt: skip
"""Settings with which copies of a model give that model."""
NEVER = {"nearswap", "arcee_fusion", "magmax", "tsv_m", "iso_c"}
VARIANTS = [
    *((name, {}) for name in RULES),
    *FAITHFUL.items(),
    ("linear", {"normalize": False}),
    ("slerp", {"t": 0.3}),
    ("nuslerp", {"flatten": False}),
    ("nuslerp", {"flatten": False, "row_wise": True}),
    ("multislerp", {"normalize": False}),
    ("task_arithmetic", {"normalize": True}),
    ("dare_linear", {"rescale": "l1", "normalize": True}),
    ("dare_ties", {"rescale": "none"}),
    ("della", {"rescale": "l1", "epsilon": 0.3}),
    ("della_linear", {"rescale": "none", "normalize": True}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.2}),
    ("sce", {"select_topk": 0.5}),
    ("model_stock", {"filter_wise": True}),
]


@pytest.mark.parametrize(("name", "given_settings"), VARIANTS)
def test_conforms(name, given_settings):
    rule = RULES[name]
    copies = name not in NEVER and (name not in FAITHFUL or given_settings == FAITHFUL[name])
    for needs_base in {rule.needs_base, rule.needs_base or name in ("nuslerp", "multislerp")}:
        check_merge_method(rule, needs_base=needs_base, models=MODELS.get(name, 3), copies=copies, **given_settings)


def test_a_plain_function_conforms_and_a_bad_one_does_not():
    def average(tensors, weights, *, share=1.0):
        return weighted_sum(tensors, weights) * share

    check_merge_method(average, needs_base=False)
    check_merge_method(lambda t, w, base: weighted_sum(t, w) + 0 * base, needs_base=True)
    with pytest.raises(AssertionError, match="does not give that model"):
        check_merge_method(average, needs_base=False, share=0.9)
    check_merge_method(average, needs_base=False, copies=False, share=0.9)
    with pytest.raises(AssertionError, match="float32"):
        check_merge_method(lambda t, w: weighted_sum(t, w).float(), needs_base=False)
    with pytest.raises(AssertionError, match="input was changed"):
        check_merge_method(lambda t, w: t[0].mul_(2).double(), needs_base=False)
    calls = iter(range(99))
    with pytest.raises(AssertionError, match="second call"):
        check_merge_method(lambda t, w: weighted_sum(t, w) + next(calls), needs_base=False)
    restless = Rule(lambda tensors: lambda start, stop: tensors.models[0](start, stop) + (stop - start < 50))
    with pytest.raises(AssertionError, match="other ranges"):
        check_merge_method(restless, needs_base=False, copies=False)


@pytest.mark.parametrize(("name", "given_settings"), VARIANTS)
@settings(max_examples=12, deadline=None)
@given(shape=shapes, dtype=dtypes)
def test_ranges_do_not_change_a_bit_for_any_shape_and_type(name, given_settings, shape, dtype):
    rule = RULES[name]
    base, *tensors = drawn(shape, 1 + MODELS.get(name, 3), dtype)
    extra = {"base": base} if rule.needs_base else {}
    weights = [0.5 + k for k in range(len(tensors))]
    merged = require_same_bits_in_pieces(rule, tensors, weights, settings=given_settings, **extra)
    assert merged.shape == tensors[0].shape and bool(torch.isfinite(merged).all())


@pytest.mark.parametrize(("name", "given_settings"), VARIANTS)
def test_threads_and_blocks_do_not_change_a_bit(name, given_settings):
    rule = RULES[name]
    shape = (190, 210) if name in ("tsv_m", "iso_c") else (300, 250)  # the latter: two blocks
    base, *tensors = drawn(shape, 1 + MODELS.get(name, 3))
    extra = {"base": base} if rule.needs_base else {}
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(rule(tensors, **extra, **given_settings))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    assert torch.equal(results[0], require_same_bits_in_pieces(rule, tensors, settings=given_settings, **extra))


@pytest.mark.parametrize("name", [n for n in RULES if n not in ("slerp", "nuslerp", *MODELS)])
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(3)))
def test_the_order_of_models_does_not_matter(name, order):
    if name in ("dare_linear", "dare_ties", "della", "della_linear"):
        chosen = {"density": 1.0}  # what is dropped is a matter of the place
    else:
        chosen = {"density": (0.3, 0.6, 0.9)} if name in ("ties", "breadcrumbs", "breadcrumbs_ties") else {}
    base, *tensors = drawn((7, 9), 4)
    extra = {"base": base} if RULES[name].needs_base else {}
    merged = RULES[name](tensors, [1.0, 2.0, 0.5], **extra, **chosen)
    moved = {k: tuple(v[i] for i in order) if isinstance(v, tuple) else v for k, v in chosen.items()}
    again = RULES[name]([tensors[i] for i in order], [[1.0, 2.0, 0.5][i] for i in order], **extra, **moved)
    torch.testing.assert_close(again, merged, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, rule in RULES.items() if rule.needs_base])
def test_a_base_is_asked_for(name):
    with pytest.raises(Exception, match="needs base_model") as caught:
        RULES[name](drawn((3, 4), MODELS.get(name, 2)))
    assert type(caught.value).__name__ == "ConfigError"


@pytest.mark.parametrize(("name", "count", "wanted"), [
    ("slerp", 3, "slerp takes exactly 2 models, found 3"), ("slerp", 1, "exactly 2 models, found 1"),
    ("nuslerp", 3, "nuslerp takes exactly 2 models, found 3"), ("nearswap", 2, "exactly 1 model, found 2"),
    ("arcee_fusion", 2, "arcee_fusion takes exactly 1 model, found 2"),
    ("passthrough", 2, "passthrough takes exactly 1 model, found 2"),
    ("model_stock", 1, "model_stock takes at least 2 models, found 1"),
])  # fmt: skip
def test_a_number_of_models_that_a_method_cannot_merge_is_refused(name, count, wanted):
    base, *tensors = drawn((3, 4), 1 + count)
    extra = {"base": base} if RULES[name].needs_base else {}
    with pytest.raises(Exception, match=wanted) as caught:
        RULES[name](tensors, **extra)
    assert type(caught.value).__name__ == "ConfigError"


@pytest.mark.parametrize("name", RULES)
def test_one_weight_per_tensor(name):
    for tensors, weights in (([torch.ones(2)], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match="one weight per tensor"):
            RULES[name](tensors, weights)


def test_shared_checks():
    assert weight_total([0.1, 0.2]) == pytest.approx(0.3)
    for weights in ([1, -1], [0.1, 0.2, -0.3], [0.0]):
        with pytest.raises(Exception, match="sum to 0; set normalize to false"):
            weight_total(weights)
    require_models(type("T", (), {"models": (1, 2)})(), "x", 1, None)
    for tensors, weights in (([torch.ones(2)], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match="one weight per tensor"):
            weighted_sum(tensors, weights)


def test_the_table_does_not_import_torch():
    code = "import sys, honeloom.merging; assert len(honeloom.merging.METHODS) == 23; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
