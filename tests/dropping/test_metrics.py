"""Importance metrics against numbers worked by hand."""

import math

import pytest
import torch

from honeloom.dropping.angular import angular
from honeloom.dropping.block_influence import block_influence
from honeloom.dropping.cosine import cosine
from honeloom.dropping.kl import kl
from honeloom.dropping.magnitude import magnitude
from honeloom.dropping.perplexity import perplexity
from honeloom.dropping.scores import Score, Unit, UnitScores
from honeloom.dropping.taylor import taylor
from honeloom.registry import family
from honeloom.testing import check_drop_metric

STREAMS = [n for n in family("dropping").names() if family("dropping").load_config(n).reads == "streams"]
X = torch.tensor([1.0, 0.0])
ZERO = torch.zeros(2)


@pytest.mark.parametrize("name", [*STREAMS, "kl"])
def test_metrics_of_tokens_conform(name):
    check_drop_metric(family("dropping").load(name))


def test_every_method_has_settings_of_its_name():
    for name in family("dropping").names():
        assert family("dropping").load_config(name)().type == name
    assert {"cosine", "block_influence", "angular", "magnitude"} == set(STREAMS)


@pytest.mark.parametrize(
    ("after", "turned", "angle", "length"),
    [
        (X, 0.0, 0.0, 0.0),
        (2 * X, 0.0, 0.0, 1.0),
        (-X, 2.0, 1.0, 2.0),
        (torch.tensor([0.0, 3.0]), 1.0, 0.5, math.sqrt(10)),
        (torch.tensor([1.0, 1.0]), 1 - math.sqrt(0.5), 0.25, 1.0),
        (ZERO, 1.0, 0.5, 1.0),
    ],
)
def test_known_changes(after, turned, angle, length):
    assert float(cosine(X, after)) == pytest.approx(turned, abs=1e-6)
    assert float(block_influence(X, after)) == pytest.approx(turned, abs=1e-6)
    assert float(angular(X, after)) == pytest.approx(angle, abs=1e-6)
    assert float(magnitude(X, after)) == pytest.approx(length, rel=1e-6)


def test_zero_streams_give_numbers():
    assert [float(f(ZERO, ZERO)) for f in (cosine, angular, magnitude)] == [0.0, 0.0, 0.0]
    assert [float(f(ZERO, X)) for f in (cosine, angular, magnitude)] == pytest.approx([1.0, 0.5, 1.0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_stay_visible(bad):
    after = torch.tensor([bad, 1.0])
    assert not any(math.isfinite(float(f(X, after))) for f in (cosine, angular, magnitude))


def test_small_turns_keep_their_digits():
    """A rotation by 1e-3 has importance 5e-7; 1 - cos in float32 would give a multiple of 6e-8."""
    turn = 1e-3
    after = torch.tensor([math.cos(turn), math.sin(turn)])
    assert float(cosine(X, after)) == pytest.approx(turn**2 / 2, rel=1e-3)
    assert float(angular(X, after)) == pytest.approx(turn / math.pi, rel=1e-3)


def test_bf16_streams_near_one_keep_their_order():
    """Cosines of 0.9990 to 0.9995, a step of 0.0001 apart, are told apart in bf16 streams of width 4096."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4096, generator=generator)
    side = torch.randn(64, 4096, generator=generator)
    side = side - (side * x).sum(1, keepdim=True) / x.square().sum(1, keepdim=True) * x
    side = side / side.norm(dim=1, keepdim=True) * x.norm(dim=1, keepdim=True)
    wanted = [1 - c for c in (0.9995, 0.9994, 0.9993, 0.9992, 0.9991, 0.9990)]
    got = []
    for value in wanted:
        after = (1 - value) * x + math.sqrt(1 - (1 - value) ** 2) * side
        got.append(float(cosine(x.bfloat16(), after.bfloat16()).double().mean()))
    assert got == sorted(got)
    assert got == pytest.approx(wanted, abs=2e-5)


def test_perplexity_is_the_rise_of_the_loss():
    rise = perplexity(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0]))
    assert rise.tolist() == [0.5, -1.0]


def test_divergence_of_two_coins():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    wanted = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(kl(p.log() + 3.0, q.log())) == pytest.approx(wanted, rel=1e-6)
    assert float(kl(p.log(), p.log())) == 0.0


def test_taylor_sums_a_row_before_its_sign_is_dropped():
    gradient = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 0.0]]])
    change = torch.tensor([[[3.0, 9.0], [9.0, -4.0]], [[1.0, 1.0], [7.0, 7.0]]])
    assert taylor(gradient, change).tolist() == [5.0, 2.0]


def test_baselines_order_layers_by_place_or_chance():
    registry = family("dropping")
    values = [registry.load("last")(Unit("mlp", i), 5) for i in range(5)]
    assert values == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert registry.load("last")(Unit("block", 3, 2), 5) == 0.0
    assert [registry.load("first")(Unit("mlp", i), 5) for i in range(3)] == [0.0, 1.0, 2.0]
    draw = registry.load("random")
    one = [draw(Unit("mlp", i), 5, seed=0) for i in range(5)]
    assert one == [draw(Unit("mlp", i), 5, seed=0) for i in range(5)]
    assert len(set(one)) == 5
    assert one != [draw(Unit("mlp", i), 5, seed=1) for i in range(5)]
    assert one != [draw(Unit("attention", i), 5, seed=0) for i in range(5)]


def test_scores_survive_their_file():
    scores = UnitScores(
        (Score(0.5, 0.1), None), (Score(0.25, None), Score(1.0, 0.0)), (), {2: (Score(0.75, 0.5),)}, 3, 40, 1
    )
    assert UnitScores.from_json(scores.to_json()) == scores
    assert scores.to_json()["attention"] == [{"layer": 0, "value": 0.5, "stderr": 0.1}, None]
