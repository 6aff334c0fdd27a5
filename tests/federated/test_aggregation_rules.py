"""Aggregation rules against closed forms, dense sums, and one another."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from honeloom.errors import IncompatibleModelsError
from honeloom.federated.aggregation.exactness import error_norms, measured_error
from honeloom.federated.aggregation.fedex import fedex
from honeloom.federated.aggregation.fedit import fedit
from honeloom.federated.aggregation.ffa import ffa
from honeloom.federated.aggregation.flexlora import flexlora
from honeloom.federated.aggregation.flora import flora
from honeloom.federated.aggregation.rolora import rolora
from honeloom.federated.aggregation.svd import svd
from honeloom.federated.aggregation.warm import warm, whole
from honeloom.federated.aggregation.zero_pad import zero_pad
from honeloom.registry import family
from honeloom.testing import check_aggregation
from honeloom.types.updates import Combined, Part

ANY_RANK = {"flora": flora, "svd": svd, "flexlora": flexlora, "zero_pad": zero_pad}
ALL = {**ANY_RANK, "fedit": fedit, "fedex": fedex, "ffa": ffa, "rolora": rolora}
CONFORMANCE = {
    "flora": {"exact": True},
    "svd": {"exact": False},
    "flexlora": {"exact": False},
    "zero_pad": {"exact": False},
    "fedit": {"exact": False, "ranks": (3, 3, 3)},
    "fedex": {"exact": True, "ranks": (3, 3, 3)},
    "ffa": {"exact": True, "shared": "a"},
    "rolora": {"exact": True, "shared": "a", "ranks": (3, 3, 3)},
}


def make(ranks=(4, 2, 1), m=6, n=5, scale=2.0, shares=(0.5, 0.3, 0.2), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    return [Part(draw(m, r).to(dtype), draw(r, n).to(dtype), scale, p) for r, p in zip(ranks, shares, strict=True)]


def dense(parts):
    return sum(p.weight * p.scale * p.b.double() @ p.a.double() for p in parts)


def product(combined):
    b, a = whole(combined)
    return b.double() @ a.double()


def relative(combined, parts):
    return float((product(combined) - dense(parts)).norm() / dense(parts).norm())


@pytest.mark.parametrize("name", [row.name for row in family("aggregation")])
def test_every_rule_conforms(name):
    check_aggregation(family("aggregation").load(name), **CONFORMANCE[name])


def test_further_settings_conform():
    check_aggregation(svd, exact=True, rank=100)
    check_aggregation(svd, exact=True, energy=1.0)
    check_aggregation(zero_pad, exact=False, norm_weights=True)
    check_aggregation(rolora, exact=True, shared="b", ranks=(3, 3, 3))


def test_stacking_is_the_sum_to_the_last_digits():
    parts = make()
    assert float((product(flora(parts)) - dense(parts)).abs().max()) <= 4e-15
    g = np.random.default_rng(0)
    bs = [torch.from_numpy(g.standard_normal((6, r))) for r in (4, 2, 1)]
    drawn = [
        Part(b, torch.from_numpy(g.standard_normal((b.shape[1], 5))), 2.0, p)
        for b, p in zip(bs, (0.5, 0.3, 0.2), strict=True)
    ]
    assert relative(zero_pad(drawn), drawn) == pytest.approx(0.57, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_factors_are_summed_in_float32(dtype):
    parts = make(dtype=dtype)
    for rule in (flora, lambda p: svd(p, rank=7)):
        combined = rule(parts)
        assert combined.b.dtype is combined.a.dtype is torch.float32
        assert relative(combined, parts) <= 1e-6


def test_plus_and_minus_one():
    """The mean of the products is 1, the product of the means 0."""
    one = torch.ones(1, 1, dtype=torch.float64)
    parts = [Part(one, one, 1.0, 0.5), Part(-one, -one, 1.0, 0.5)]
    for name in ("flora", "svd", "flexlora", "fedex"):
        assert float(product(ALL[name](parts))) == pytest.approx(1.0), name
    for name in ("fedit", "zero_pad"):
        assert float(product(ALL[name](parts))) == 0.0, name


def regauged(parts, seed=1):
    """The same updates in other factors: (B Q, Q^-1 A)."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for part in parts:
        q = torch.linalg.qr(torch.randn(part.rank, part.rank, generator=g, dtype=torch.float64)).Q * 1.7
        found.append(replace(part, b=part.b @ q, a=torch.linalg.inv(q) @ part.a))
    return found


@pytest.mark.parametrize("name", ["flora", "svd", "flexlora", "fedex"])
def test_the_factorisation_does_not_matter(name):
    parts = make(ranks=(3, 3, 3))
    one, other = product(ALL[name](parts)), product(ALL[name](regauged(parts)))
    assert float((one - other).norm() / one.norm()) <= 1e-6


@pytest.mark.parametrize("name", ["fedit", "zero_pad"])
def test_averages_of_factors_are_no_function_of_the_updates(name):
    parts = make(ranks=(3, 3, 3))
    one, other = product(ALL[name](parts)), product(ALL[name](regauged(parts)))
    assert float((one - other).norm() / one.norm()) > 0.1
    flipped = [replace(parts[0], b=-parts[0].b, a=-parts[0].a), *parts[1:]]
    assert not torch.allclose(product(ALL[name](flipped)), one)


@pytest.mark.parametrize("name", ALL)
def test_one_client_and_identical_clients(name):
    """Shares count once: weighting both factors would give 1/4 + 1/4."""
    (part,) = make(ranks=(3,), shares=(1.0,))
    for parts in ([part], [replace(part, weight=0.5)] * 2):
        torch.testing.assert_close(product(ALL[name](parts)), 2.0 * part.b @ part.a)


def test_scales_are_folded():
    parts = [replace(p, scale=s) for p, s in zip(make(), (2.0, 1.0, 8 / 4**0.5), strict=True)]
    assert relative(flora(parts), parts) <= 1e-14
    assert relative(svd(parts, rank=7), parts) <= 1e-7


@pytest.mark.parametrize(
    ("m", "n", "ranks"), [(4, 9, (4, 4, 4)), (9, 4, (4, 2, 1)), (3, 3, (3, 3, 2)), (1, 5, (1, 1, 1))]
)
def test_dimensions_that_equal_a_rank(m, n, ranks):
    parts = make(ranks=ranks, m=m, n=n)
    for rule in (flora, lambda p: svd(p, rank=99)):
        assert relative(rule(parts), parts) <= 1e-7
    assert svd(parts, rank=99).rank == min(m, n, sum(ranks))


def test_the_error_of_a_truncation_is_the_tail():
    parts = make(ranks=(8, 4, 2), m=40, n=30)
    values = torch.linalg.svdvals(dense(parts))
    for rank in (1, 3, 8, 13, 14):
        tail = float((values[rank:].square().sum() / values.square().sum()).sqrt())
        assert relative(svd(parts, rank=rank), parts) == pytest.approx(tail, abs=1e-7)
    assert svd(parts).rank == flexlora(parts).rank == 8
    share = float(values[:5].square().sum() / values.square().sum())
    assert svd(parts, energy=share - 1e-6).rank == 5
    assert svd(parts, energy=share + 1e-6).rank == 6
    assert svd(parts, energy=share + 1e-6, rank=2).rank == 2
    torch.testing.assert_close(product(flexlora(parts, rank=3)), product(svd(parts, rank=3)))


def test_pairs_of_very_unequal_length_count_by_their_product():
    parts = make(ranks=(3, 3), shares=(0.5, 0.5))
    skewed = [parts[0], replace(parts[1], b=parts[1].b * 1e-9, a=parts[1].a * 1e9)]
    assert relative(svd(skewed, rank=6), parts) <= 1e-6


@pytest.mark.parametrize("rule", [flora, fedex])
def test_warm_start_and_residual_are_the_update(rule):
    parts = make(ranks=(3, 3, 3), m=20, n=16)
    combined = rule(parts)
    b, a, residual = warm(combined, 3)
    assert b.shape == (20, 3) and residual is not None
    assert relative(Combined(b, a, residual), parts) <= 1e-6
    torch.testing.assert_close(b @ a, product(svd(parts, rank=3)))
    b, a, residual = warm(combined, 50)
    assert residual is None
    assert relative(Combined(b, a), parts) <= 1e-6
    with pytest.raises(ValueError, match="1 or more"):
        warm(combined, 0)


def test_frozen_a():
    """Exact although the product has drifted far; a smaller client holds the first rows."""
    parts = make(ranks=(4, 4, 2))
    shared = [replace(p, a=parts[0].a[: p.rank]) for p in parts]
    assert relative(ffa(shared), shared) <= 1e-7
    with pytest.raises(IncompatibleModelsError, match="one frozen A"):
        ffa(parts)
    nearly = [shared[0], replace(shared[1], a=shared[1].a + 1e-6)]
    with pytest.raises(IncompatibleModelsError, match="one frozen A"):
        ffa(nearly)


def test_alternating_factors():
    parts = make(ranks=(3, 3, 3))
    with_a = [replace(p, a=parts[0].a) for p in parts]
    with_b = [replace(p, b=parts[0].b, scale=s) for p, s in zip(parts, (2.0, 1.0, 0.5), strict=True)]
    for shared in (with_a, with_b):
        assert relative(rolora(shared), shared) <= 1e-7
    with pytest.raises(IncompatibleModelsError, match="both A and B differ"):
        rolora(parts)


def test_residual_and_means():
    parts = make(ranks=(3, 3, 3))
    combined = fedex(parts)
    assert combined.rank == 3 and combined.residual is not None
    torch.testing.assert_close(product(Combined(combined.b, combined.a)), product(fedit(parts)))
    assert relative(Combined(combined.b, combined.a), parts) > 0.1
    assert relative(combined, parts) <= 1e-7


@pytest.mark.parametrize("rule", [fedit, fedex, rolora])
def test_unequal_ranks_are_refused_with_the_reason(rule):
    with pytest.raises(IncompatibleModelsError, match=rf"{rule.__name__} averages factors.*\[4, 2, 1\].*flora and svd"):
        rule(make())


def test_clients_without_the_module_count_as_no_change():
    parts = make(ranks=(3, 3, 3))
    absent = replace(parts[2], b=parts[2].b[:, :0], a=parts[2].a[:0])
    given = [*parts[:2], absent]
    for rule in (flora, fedex, lambda p: svd(p, rank=9)):
        assert relative(rule(given), given) <= 1e-7
    one = [parts[0], replace(absent, weight=0.5)]
    torch.testing.assert_close(product(fedit(one)), dense(one))


def test_norm_weights_replace_the_shares():
    parts = make(ranks=(3, 2), shares=(0.9, 0.1))
    norms = [2.0 * float((p.b @ p.a).norm()) for p in parts]
    weighed = [replace(p, weight=x / sum(norms)) for p, x in zip(parts, norms, strict=True)]
    torch.testing.assert_close(product(zero_pad(parts, norm_weights=True)), product(zero_pad(weighed)))
    still = [replace(p, b=p.b * 0) for p in parts]
    assert float(product(zero_pad(still, norm_weights=True)).norm()) == 0


def test_untrained_adapters_give_zero():
    parts = [replace(p, b=p.b * 0) for p in make()]
    for rule in ANY_RANK.values():
        combined = rule(parts)
        assert float(product(combined).norm()) == 0.0
        assert measured_error(combined, parts) == 0.0


def test_bad_parts_are_refused():
    good = make()
    for wrong, message in (
        ([replace(good[0], a=good[0].a[:2]), *good[1:]], "no product"),
        ([replace(good[0], b=torch.zeros(7, 4)), *good[1:]], r"shapes \[\(7, 5\), \(6, 5\)\]"),
        ([replace(good[0], weight=-0.5), *good[1:]], "must be finite"),
        ([replace(good[0], scale=float("nan")), *good[1:]], "must be finite"),
        ([replace(p, b=p.b[:, :0], a=p.a[:0]) for p in good], "no client has factors"),
        ([], "no client has factors"),
    ):
        for rule in ALL.values():
            with pytest.raises(IncompatibleModelsError, match=message):
                rule(wrong)


def test_measured_error_by_qr_and_by_sketch():
    small, large = make(ranks=(8, 4, 2), m=40, n=30), make(ranks=(64, 32, 16), m=200, n=150)
    for parts, tolerance in ((small, 1e-9), (large, 0.3)):
        combined = svd(parts, rank=4)
        assert measured_error(combined, parts) == pytest.approx(relative(combined, parts), rel=tolerance)
        assert measured_error(flora(parts), parts) <= 1e-6
    assert measured_error(svd(large, rank=4), large, columns=4096) == pytest.approx(
        relative(svd(large, rank=4), large), rel=0.03
    )
    opposite = [small[0], replace(small[0], b=-small[0].b, weight=0.5)]
    norms = error_norms(flora(opposite), opposite)
    assert norms.target <= 1e-12 and norms.scaled <= 1e-6


finite = st.floats(0.01, 8.0, allow_nan=False)


@st.composite
def drawn_parts(draw):
    count = draw(st.integers(1, 5))
    m, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    weights = draw(st.lists(finite, min_size=count, max_size=count))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    parts = []
    for weight in weights:
        rank = draw(st.integers(1, 12))
        b, a = torch.randn(m, rank, generator=g).to(dtype), torch.randn(rank, n, generator=g).to(dtype)
        parts.append(Part(b, a, draw(finite), weight / sum(weights)))
    return parts


@settings(max_examples=80, deadline=None)
@given(drawn_parts())
def test_any_ranks_scales_and_types(parts):
    """In fp32, relative to the norms that go in: parts may cancel in a weight of one element."""
    for combined in (flora(parts), svd(parts, rank=99)):
        gap = float((product(combined) - dense(parts)).norm())
        size = sum(p.weight * p.scale * float((p.b.double() @ p.a.double()).norm()) for p in parts)
        assert gap <= 1e-6 * max(size, float(dense(parts).norm()))
    equal = [replace(p, b=p.b[:, :1], a=p.a[:1]) for p in parts]
    assert error_norms(fedex(equal), equal).scaled <= 1e-6
    shared = [replace(p, a=parts[0].a[:1], b=p.b[:, :1]) for p in parts]
    for rule in (ffa, rolora):
        assert error_norms(rule(shared), shared).scaled <= 1e-6
