"""Sparse task vectors with and without election of signs: hand-worked numbers, statistics, an independent reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_checks import drawn, dtypes, group, require_same_bits_in_pieces, shapes, t

from honeloom.errors import ConfigError
from honeloom.merging.task_vectors import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    share_of,
    ties,
)

FIRST, SECOND, ZERO = t(4, -3, 2, -1), t(-1, 5, 3, -2), t(0, 0, 0, 0)
LINEAR = [dare_linear, della_linear, breadcrumbs]
ELECTING = [ties, dare_ties, della, breadcrumbs_ties]


def test_ties_by_hand():
    assert ties([FIRST, SECOND], base=ZERO, density=0.5).tolist() == [4, 5, 3, 0]
    assert ties([FIRST, SECOND], [2, 1], base=ZERO, density=0.5).tolist() == [4, -3, 3, 0]
    assert ties([FIRST, SECOND], [2, 1], base=ZERO, density=0.5, normalize=False).tolist() == [8, -6, 3, 0]
    assert ties([FIRST + 1, SECOND + 1], base=ZERO + 1, density=1, scale=2).tolist() == [9, 11, 6, -2]


def test_ties_elects_by_mass_and_not_by_count():
    assert ties([t(3), t(-1), t(-1)], base=t(0), density=1).tolist() == [3]
    assert ties([t(2), t(-2)], base=t(0), density=1).tolist() == [2], "a mass of zero counts as plus"
    assert ties([t(5), t(5)], base=t(5), density=1).tolist() == [5]


def test_ties_trims_to_an_exact_number_by_lowest_index():
    equal = t(1, 1, 1, 1)
    assert ties([equal], base=ZERO, density=0.5).tolist() == [1, 1, 0, 0]
    assert ties([equal, equal], [0.3, 7], base=ZERO, density=1).tolist() == [1, 1, 1, 1]
    assert ties([t(1, -3, 3, 2, 3)], base=torch.zeros(5), density=0.4).tolist() == [0, -3, 3, 0, 0]
    assert ties([FIRST, SECOND], base=ZERO, density=(0.25, 0.75)).tolist() == [4, 5, 3, -2]


def test_shares_are_rounded_down_and_never_to_none():
    assert [share_of(0.5, n) for n in (0, 1, 2, 3, 4, 5)] == [0, 1, 1, 1, 2, 2]
    assert [share_of(0.01, n) for n in (1, 199, 200)] == [1, 1, 2]
    assert share_of(0.29, 100) == 29, "0.29 * 100 is 28.999999999999996"
    assert share_of(1, 7) == 7


def test_breadcrumbs_by_hand():
    assert breadcrumbs([FIRST], base=ZERO, density=0.5, gamma=0.25).tolist() == [0, -3, 2, 0]
    assert breadcrumbs([FIRST], base=ZERO, density=0.5, gamma=0).tolist() == [4, -3, 0, 0]
    assert breadcrumbs([FIRST], base=ZERO, density=0.5).tolist() == [4, -3, 0, 0], "0.04 entries are none"
    assert breadcrumbs([FIRST], base=ZERO, density=1, gamma=0.5).tolist() == FIRST.tolist(), "density goes first"
    assert breadcrumbs([FIRST], base=ZERO, density=0.75, gamma=0.5).tolist() == [0, -3, 2, -1]
    assert breadcrumbs([t(1, 1, 1, 1)], base=ZERO, density=0.5, gamma=0.25).tolist() == [0, 1, 1, 0]
    both = breadcrumbs([FIRST, SECOND], [1, 3], base=ZERO, density=0.5, gamma=(0.25, 0), normalize=True)
    assert both.tolist() == [0, (-3 + 15) / 4, (2 + 9) / 4, 0]
    assert breadcrumbs_ties([FIRST, SECOND], base=ZERO, density=0.5, gamma=0.25).tolist() == [0, -3, 5, -2]
    scaled = breadcrumbs_ties([FIRST, SECOND], [1, 3], base=ZERO, density=0.5, gamma=0, normalize=True, scale=2)
    assert scaled.tolist() == [8, 10, 6, 0]


def test_dare_keeps_mean_and_variance():
    """Of mask / p: mean 1, variance (1 - p) / p; tolerances are four standard errors."""
    count = 1 << 20
    kept = dare_linear([torch.ones(count)], base=torch.zeros(count), density=0.5)
    assert set(kept.tolist()) == {0.0, 2.0}
    assert float(kept.mean()) == pytest.approx(1, abs=0.004)
    assert float(kept.var()) == pytest.approx(1, abs=0.01)
    few = dare_linear([torch.ones(count)], base=torch.zeros(count), density=0.1)
    assert float(few.mean()) == pytest.approx(1, abs=4 * 3 / 1024)
    assert float(few.var()) == pytest.approx(9, abs=0.2)
    plain = dare_linear([torch.ones(count)], base=torch.zeros(count), density=0.5, rescale="none")
    assert torch.equal(plain, kept / 2)


def test_dare_streams_follow_seed_name_and_place():
    x, zero = torch.ones(4096), torch.zeros(4096)

    def mask(**how):
        return dare_linear([x], base=zero, **how)

    assert torch.equal(mask(), mask(seed=0, name=""))
    others = [mask(seed=1), mask(name="q"), dare_linear([zero, x], base=zero)]
    for other in others:
        assert 0.4 < float((other != mask()).double().mean()) < 0.6
    assert torch.equal(mask(density=0.5) > 0, dare_ties([x], base=zero, density=0.5) > 0)


@pytest.mark.parametrize("rule", [dare_linear, dare_ties, della, della_linear])
def test_l1_keeps_the_sum_of_sizes(rule):
    delta, zero = t(1, -1, 1, 1, 10), torch.zeros(5)
    drawn_sums = set()
    for seed in range(30):
        kept = rule([delta], base=zero, seed=seed, rescale="l1", scale=1.0)
        size = float(kept.abs().sum())
        assert size == pytest.approx(14) or not kept.any()
        drawn_sums.add(tuple((kept != 0).tolist()))
    assert len(drawn_sums) > 5
    assert rule([zero], base=zero, rescale="l1").tolist() == [0] * 5


@pytest.mark.parametrize("rule", [dare_linear, dare_ties, della, della_linear])
def test_density_one_drops_nothing(rule):
    base, x = drawn((6, 7), 2)
    torch.testing.assert_close(rule([x], base=base, density=1), x, rtol=1e-15, atol=1e-15)


def test_della_probabilities_by_hand():
    """Row 1, 2, 3, 4 with density 0.5 and epsilon 0.2: 0.3, 0.4333, 0.5667, 0.7, here over many rows."""
    rows = 1 << 17
    delta = t(3, -1, 4, 2).repeat(rows, 1)
    plain = della_linear([delta], base=torch.zeros(rows, 4), epsilon=0.2, rescale="none")
    probabilities = t(0.3 + 0.4 * 2 / 3, 0.3, 0.7, 0.3 + 0.4 / 3)
    torch.testing.assert_close((plain != 0).double().mean(dim=0), probabilities, rtol=0, atol=4 * 0.5 / rows**0.5)
    scaled = della_linear([delta], base=torch.zeros(rows, 4), epsilon=0.2)
    chosen = plain != 0
    torch.testing.assert_close(scaled[chosen], (delta / probabilities)[chosen])
    assert torch.equal(scaled != 0, chosen)
    error = (scaled.mean(dim=0) - delta[0]).abs() / (delta[0].abs() * ((1 - probabilities) / probabilities).sqrt())
    assert float(error.max()) < 4 / rows**0.5, "the expectation is the task vector"


def test_della_ranks_equal_sizes_by_index_and_single_entries_by_density():
    rows = 1 << 16
    plain = della_linear([torch.ones(rows, 2)], base=torch.zeros(rows, 2), epsilon=0.4, rescale="none")
    torch.testing.assert_close(plain.mean(dim=0), t(0.1, 0.9), rtol=0, atol=0.01)
    single = della_linear([torch.ones(rows, 1)], base=torch.zeros(rows, 1), density=0.3, epsilon=0.2)
    assert set(single.view(-1).tolist()) == {0.0, 1 / 0.3}
    assert float((single != 0).double().mean()) == pytest.approx(0.3, abs=0.01)


def test_della_refuses_probabilities_out_of_range():
    for density, epsilon in ((0.1, 0.1), (0.2, 0.5), (0.95, 0.1)):
        with pytest.raises(ConfigError, match=rf"density {density} and epsilon {epsilon}: .*below 0\."):
            della([t(1, 2)], base=t(0, 0), density=density, epsilon=epsilon)
    with pytest.raises(ConfigError, match=r"density 0\.1 and epsilon 0\.2"):
        della([t(1, 2)] * 2, base=t(0, 0), density=(0.5, 0.1), epsilon=0.2)
    assert della([t(1, 2)], base=t(0, 0), density=0.9, epsilon=0.1).shape == (2,)


@pytest.mark.parametrize("rule", [ties, *LINEAR, *ELECTING[1:]])
def test_one_setting_per_model_or_one_for_all(rule):
    base, a, b = drawn((9, 10), 3)
    one = rule([a, b], base=base, density=0.5)
    assert torch.equal(rule([a, b], base=base, density=(0.5, 0.5)), one)
    assert not torch.equal(rule([a, b], base=base, density=(0.5, 0.25)), one)
    with pytest.raises(ValueError, match="3 values for 2 models"):
        rule([a, b], base=base, density=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("rule", LINEAR)
def test_a_sum_of_weights_of_zero_is_refused(rule):
    with pytest.raises(ConfigError, match="sum to 0"):
        rule([FIRST, SECOND], [1, -1], base=ZERO, normalize=True)


def reference(kept: np.ndarray, weights: list[float], base: np.ndarray, scale: float, normalize: bool, elect: bool):
    """Entry by entry, in plain Python."""
    result = base.copy()
    for i in range(len(base)):
        pairs = [(w, d) for w, d in zip(weights, kept[:, i].tolist(), strict=True)]
        if elect:
            sign = 1 if sum(w * d for w, d in pairs) >= 0 else -1
            pairs = [(w, d) for w, d in pairs if w * d * sign > 0]
        below = sum(w for w, _ in pairs) if elect else sum(weights)
        result[i] += scale * sum(w * d for w, d in pairs) / ((below or 1.0) if normalize else 1.0)
    return result


def trimmed(delta: np.ndarray, density: float, gamma: float) -> np.ndarray:
    order = np.argsort(-np.abs(delta), kind="stable")
    count = max(1, int(density * len(delta) + 1e-9))
    top = min(int(gamma * len(delta) + 1e-9), len(delta) - count)
    kept = np.zeros_like(delta)
    chosen = order[top : top + count]
    kept[chosen] = delta[chosen]
    return kept


@pytest.mark.parametrize(("rule", "elect"), [(ties, True), (breadcrumbs, False), (breadcrumbs_ties, True)])
@settings(max_examples=25, deadline=None)
@given(shapes, dtypes, st.sampled_from([0.05, 0.2, 0.5, 0.77, 1.0]), st.sampled_from([0.0, 0.01, 0.3]), st.booleans())
def test_selection_equals_a_plain_reference(rule, elect, shape, dtype, density, gamma, normalize):
    base, *tensors = drawn(shape, 4, dtype)
    tensors[0] = (tensors[0] * 2).round() / 2 + base  # many equal sizes
    weights = [1.0, 0.5, 2.0]
    chosen = {"density": density, "scale": 0.7, "normalize": normalize}
    chosen |= {"gamma": gamma} if rule is not ties else {}
    merged = require_same_bits_in_pieces(rule, tensors, weights, base=base, settings=chosen)
    origin = base.double().reshape(-1).numpy()
    deltas = [x.double().reshape(-1).numpy() - origin for x in tensors]
    kept = np.stack([trimmed(d, density, chosen.get("gamma", 0.0)) for d in deltas])
    wanted = reference(kept, weights, origin, 0.7, normalize, elect)
    np.testing.assert_allclose(merged.reshape(-1).numpy(), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("rule", "elect"), [(dare_ties, True), (dare_linear, False), (della, True), (della_linear, False)]
)
@settings(max_examples=15, deadline=None)
@given(shapes, dtypes, st.booleans(), st.integers(0, 2**64 - 1))
def test_random_drops_equal_a_plain_reference(rule, elect, shape, dtype, normalize, seed):
    base, *tensors = drawn(shape, 4, dtype)
    weights = [1.0, 0.5, 2.0]
    chosen = {"density": 0.6, "scale": 0.7, "normalize": normalize, "rescale": "none"}
    merged = require_same_bits_in_pieces(rule, tensors, weights, base=base, seed=seed, name="q", settings=chosen)
    origin = base.double().reshape(-1).numpy()
    linear = della_linear if rule in (della, della_linear) else dare_linear
    kept = []
    for k in range(3):
        alone = [base] * 3
        alone[k] = tensors[k]  # what is dropped depends on the place
        plan = linear.plan(group(alone, base=base, seed=seed, name="q"), density=0.6, rescale="none")
        kept.append((plan(0, base.numel()) - base.double().reshape(-1)).numpy())
    wanted = reference(np.stack(kept), weights, origin, 0.7, normalize, elect)
    np.testing.assert_allclose(merged.reshape(-1).numpy(), wanted, rtol=1e-11, atol=1e-12)
