"""Zeroth-order steps: what theory says of quadratics, restores and replays to the last bit, losses that are none."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from honeloom.tuning import zeroth_order
from honeloom.tuning.zeroth_order import ZerothOrder, accumulated, direction, step_seeds, step_size

CURVATURE = torch.linspace(0.1, 2.0, 50, dtype=torch.float64)


def quadratic(params):
    """Half of theta' H theta with a diagonal H, in double precision."""
    return lambda: float(0.5 * (CURVATURE * params["w"].double() ** 2).sum())


def tensors(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return {"b": torch.randn(7, 3, generator=draw).to(dtype), "a.weight": torch.randn(40, generator=draw).to(dtype)}


def rough(params):
    """A loss that is no quadratic."""
    return lambda: float(sum((t.double().sin() + 0.1 * t.double() ** 2).sum() for t in params.values()))


@pytest.mark.parametrize(("kind", "curved"), [("gaussian", 2.0), ("rademacher", 0.0)])
def test_the_mean_descent_on_a_quadratic_is_the_theory(kind, curved):
    """-lr |g|^2 + lr^2/2 (|g|^2 tr H + 2 g'Hg), without the last term for signs and a diagonal H."""
    lr, start = 1e-3, torch.ones(50)
    gradient = CURVATURE * start.double()
    square = float(gradient.square().sum())
    theory = -lr * square + lr**2 / 2 * (
        square * float(CURVATURE.sum()) + curved * float((gradient * CURVATURE * gradient).sum())
    )
    assert theory == pytest.approx(-0.068815 if curved else -0.068921, abs=2e-6)
    params = {"w": start.clone()}
    loss = quadratic(params)
    stepper, before = ZerothOrder(params, mu=1e-2, kind=kind), quadratic({"w": start})()
    found = []
    for seed in range(6000):
        params["w"].copy_(start)
        stepper.step(loss, [seed], lr)
        found.append(loss() - before)
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - theory) < 4 * error and error < 0.002


@pytest.mark.parametrize("mu", [1e-3, 0.1, 10.0])
def test_a_scalar_on_a_quadratic_is_exact_whatever_mu(mu):
    params = {"w": torch.linspace(-1, 1, 50)}
    probe = ZerothOrder(params, mu=mu).probe(quadratic(params), 5)
    z = direction(5, "w", params["w"], "gaussian").double()
    assert probe.scalar == pytest.approx(float((z * CURVATURE * params["w"].double()).sum()), rel=2e-3)
    assert probe.loss >= quadratic(params)()


def test_the_mean_of_estimates_is_the_gradient():
    params = {"w": torch.linspace(0.5, 1.5, 50)}
    stepper, estimate, count = ZerothOrder(params, kind="rademacher"), torch.zeros(50).double(), 4000
    for seed in range(count):
        probe = stepper.probe(quadratic(params), seed)
        estimate += probe.scalar * direction(seed, "w", params["w"], "rademacher").double() / count
    gradient = CURVATURE * params["w"].double()
    spread = float(gradient.square().sum()) ** 0.5 / math.sqrt(count)
    assert float((estimate - gradient).abs().max()) < 5 * spread


def test_a_rate_below_the_bound_descends_and_one_far_above_does_not():
    """Descent in the mean needs lr < 2 / (tr H + 2 lambda_max)."""
    bound = 2 / float(CURVATURE.sum() + 2 * CURVATURE.max())
    ends = {}
    for factor in (0.5, 4.0):
        params = {"w": torch.ones(50)}
        stepper, loss = ZerothOrder(params), quadratic(params)
        begun = loss()
        for seed in range(300):
            stepper.step(loss, [seed], factor * bound)
        ends[factor] = loss() / begun
    assert ends[0.5] < 0.1 and not ends[4.0] < 1


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_values_are_back_to_the_last_bit_after_a_probe(kind, cache):
    params = tensors()
    before = {name: t.clone() for name, t in params.items()}
    stepper = ZerothOrder(params, kind=kind, cache=cache)
    for seed in range(20):
        stepper.probe(rough(params), seed)
    assert all(torch.equal(before[name], params[name]) for name in params)


def test_without_a_copy_values_drift_by_little():
    params = tensors()
    before = {name: t.clone() for name, t in params.items()}
    stepper = ZerothOrder(params, exact=False)
    for seed in range(100):
        stepper.probe(rough(params), seed)
    moved = max(float((before[name] - params[name]).abs().max()) for name in params)
    assert 0 < moved < 1e-5


@pytest.mark.parametrize(
    ("exact", "cache", "kind", "directions"),
    list(itertools.product([True, False], [True, False], ["gaussian", "rademacher"], [1, 3])),
)
def test_seeds_and_scalars_repeat_a_hundred_steps_to_the_last_bit(exact, cache, kind, directions):
    params, server = tensors(), tensors()
    client = ZerothOrder(params, mu=1e-2, kind=kind, exact=exact, cache=cache)
    log, loss = [], rough(params)
    begun = loss()
    for step in range(100):
        seeds = [1000 * step + k for k in range(directions)]
        probes = client.step(loss, seeds, 1e-2)
        log.append([(p.seed, p.scalar) for p in probes])
    # the server has neither the data nor the cache, and its tensors in another order
    replay = ZerothOrder(dict(reversed(server.items())), mu=1e-2, kind=kind, exact=exact, cache=False)
    for scalars in log:
        replay.replay([(seed, float(np.float32(scalar))) for seed, scalar in scalars], 1e-2)
    assert all(torch.equal(params[name], server[name]) for name in params)
    assert loss() < begun
    assert all(scalar == float(np.float32(scalar)) for scalars in log for _, scalar in scalars)


def test_a_cached_direction_is_the_one_drawn_anew():
    found = []
    for cache in (True, False):
        params = tensors()
        stepper = ZerothOrder(params, cache=cache)
        for seed in (3, 4, 3):
            stepper.step(rough(params), [seed], 1e-2)
        found.append(params)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_tensor_draws_by_its_name_alone():
    params = tensors()
    alone = direction(9, "b", params["b"], "gaussian")
    both = {name: direction(9, name, t, "gaussian") for name, t in params.items()}
    assert torch.equal(alone, both["b"]) and not torch.equal(alone, direction(9, "c", params["b"], "gaussian"))
    assert not torch.equal(alone, direction(10, "b", params["b"], "gaussian"))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_loss_that_is_none_changes_nothing_and_is_told(exact, bad, side):
    params = tensors()
    before = {name: t.clone() for name, t in params.items()}
    sides = iter([bad, 1.0] if side == 0 else [1.0, bad])
    (probe,) = ZerothOrder(params, exact=exact).step(lambda: next(sides), [7], 0.5)
    assert probe.scalar == 0.0 and not probe.finite
    for name, tensor in params.items():
        assert torch.allclose(before[name], tensor, rtol=0, atol=0 if exact else 1e-6)


def test_a_loss_that_raises_leaves_the_values_where_they_were():
    params = tensors()
    before = {name: t.clone() for name, t in params.items()}

    def broken():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        ZerothOrder(params).step(broken, [1], 0.1)
    assert all(torch.equal(before[name], params[name]) for name in params)


def test_a_scalar_has_a_limit_and_steps_are_means_over_directions():
    params = {"w": torch.full((50,), 100.0)}
    probe = ZerothOrder(params, clip=2.5).probe(quadratic(params), 1)
    assert abs(probe.scalar) == 2.5
    assert step_size(0.5, 4.0, 2) == 1.0
    one, other = {"w": torch.ones(50)}, {"w": torch.ones(50)}
    ZerothOrder(one).step(quadratic(one), [1, 2], 0.1)
    for seed in (1, 2):
        scalar = ZerothOrder({"w": torch.ones(50)}).probe(quadratic({"w": torch.ones(50)}), seed)
        assert scalar.scalar == 0.0  # the loss of other tensors does not move with these
    two = ZerothOrder(other)
    probes = [two.probe(quadratic(other), seed) for seed in (1, 2)]
    expected = torch.ones(50) - sum(0.05 * p.scalar * direction(p.seed, "w", other["w"], "gaussian") for p in probes)
    assert torch.allclose(one["w"], expected, atol=1e-5)


def test_an_objective_without_a_gradient_is_one():
    """The number of wrong signs, smoothed by the directions."""
    params = {"w": torch.full((20,), -0.5)}
    stepper = ZerothOrder(params, mu=1.0)
    for seed in range(400):
        stepper.step(lambda: float((params["w"] < 0).sum()), [seed], 0.05)
    assert int((params["w"] < 0).sum()) < 5


def test_seeds_follow_from_names_and_steps():
    assert step_seeds(1, "a/3", 0, 2) == step_seeds(1, "a/3", 0, 2)
    found = [seed for name in ("a/3", "a/4") for step in range(50) for seed in step_seeds(1, name, step, 2)]
    assert len(set(found)) == 200 and all(0 <= seed < 2**63 for seed in found)


@pytest.mark.parametrize("bad", [{"mu": 0.0}, {"mu": math.nan}, {"clip": 0.0}, {"mu": -1.0}])
def test_settings_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match="must be over 0"):
        ZerothOrder({"w": torch.ones(2)}, **bad)


@pytest.mark.parametrize("size", [100, 1000, 10000])
def test_the_effective_rank_decides_how_many_steps_it_takes(size):
    """Quadratics of one effective rank in more and more dimensions: the same steps to a tenth of the loss."""
    rank = 20
    curvature = torch.zeros(size)
    curvature[:rank] = 1.0
    params = {"w": torch.zeros(size)}
    params["w"][:rank] = 1.0

    def loss():
        return float(0.5 * (curvature * params["w"] ** 2).sum())

    stepper = ZerothOrder(params, kind="rademacher", mu=1e-2)
    lr, begun, steps = 1 / (rank + 2), loss(), 0
    while loss() > 0.1 * begun:
        stepper.step(loss, [steps], lr)
        steps += 1
        assert steps < 500
    theory = math.log(0.1) / math.log(1 - lr * 2 + lr**2 * rank)  # of the mean square, each step
    assert steps == pytest.approx(theory, rel=0.6)


def by_torch(monkeypatch):
    """No tensor is one for the kernels."""
    monkeypatch.setattr(zeroth_order, "_host", lambda tensor: None)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_kernels_take_the_steps_of_torch(exact, cache, kind, monkeypatch):
    shapes, found = [(1,), (7, 3), (130,), (0, 4), (64, 65), (5001,)], []
    for forced in (False, True):
        draw = torch.Generator().manual_seed(0)
        params = {f"w{i}": torch.randn(shape, generator=draw) for i, shape in enumerate(shapes)}
        params["turned"] = torch.randn(9, 8, generator=draw).t()  # not contiguous, so torch does it
        if forced:
            by_torch(monkeypatch)
        stepper = ZerothOrder(params, kind=kind, exact=exact, cache=cache)
        assert [type(part).__name__ for part in stepper._parts] == ["_Hosted", "_Others"][forced:]
        probes = [p for seed in range(3) for p in stepper.step(rough(params), [seed, seed + 9][: 1 + seed % 2], 1e-2)]
        found.append((params, probes))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("shape", [(1,), (70,), (4097,), (3, 50_001)])
def test_a_sum_of_directions_is_exact_to_the_last_rounding(kind, shape, monkeypatch):
    like = torch.empty(shape)
    seeds = list(range(40, 60))
    coefficients = [0.0 if k % 4 == 3 else (-1) ** k * 10.0 ** (k % 7 - 3) for k in range(20)]
    total = accumulated(like, "w", seeds, coefficients, kind)
    wanted = sum(
        c * direction(s, "w", like, kind).double() for s, c in zip(seeds, coefficients, strict=True) if c
    )  # fmt: skip
    assert total.dtype == torch.float32 and total.shape == like.shape
    assert torch.equal(total, wanted.float())
    by_torch(monkeypatch)
    assert torch.equal(total, accumulated(like, "w", seeds, coefficients, kind))


def test_a_sum_of_directions_draws_none_for_zeros_and_takes_no_other_numbers(monkeypatch):
    by_torch(monkeypatch)
    monkeypatch.setitem(zeroth_order._DRAW, "gaussian", lambda *_, **__: pytest.fail("drawn"))
    assert not accumulated(torch.ones(5), "w", [1, 2], [0.0, -0.0], "gaussian").any()
    assert not accumulated(torch.ones(5), "w", [], [], "gaussian").any()
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            accumulated(torch.ones(5), "w", [1, 2], [1.0, bad], "gaussian")
    with pytest.raises(ValueError, match="zip"):
        accumulated(torch.ones(5), "w", [1, 2], [1.0], "gaussian")


def test_many_steps_from_one_place_are_the_sum_of_their_directions():
    params = tensors()
    begun = {name: t.clone() for name, t in params.items()}
    stepper, steps = ZerothOrder(params), []
    for seed in range(30):
        steps += [(p.seed, -step_size(1e-2, p.scalar)) for p in stepper.step(rough(params), [seed], 1e-2)]
    for name, tensor in params.items():
        total = accumulated(tensor, name, *zip(*steps, strict=True), "gaussian")
        assert torch.allclose(begun[name] + total, tensor, rtol=0, atol=2e-6)


def test_a_judge_makes_the_scalar_of_what_each_row_lost():
    params = {"w": torch.linspace(-1, 1, 50)}
    asked = []

    def rows():
        return (CURVATURE * params["w"].double() ** 2).numpy().reshape(10, 5).sum(axis=1)

    def clipped(plus, minus):
        asked.append((plus, minus))
        return float(np.clip((plus - minus) / 2e-3, -0.5, 0.5).sum())

    stepper = ZerothOrder(params, judge=clipped)
    (probe,) = stepper.step(rows, [3], 0.0)
    ((plus, minus),) = asked
    assert (
        plus.shape == (10,) and probe.plus == pytest.approx(plus.mean()) and probe.minus == pytest.approx(minus.mean())
    )
    assert probe.scalar == float(np.float32(clipped(plus, minus)))
    plain = ZerothOrder(params, clip=1e9).probe(rows, 3)
    assert plain.scalar == pytest.approx(float((plus - minus).mean()) / 2e-3, rel=1e-5)


def test_a_judge_is_asked_even_where_a_loss_is_none():
    """So that a private step has its noise whatever a row did."""
    params = tensors()
    stepper = ZerothOrder(params, judge=lambda plus, minus: 0.25 if np.isnan(plus).any() else math.nan)
    probe = stepper.probe(lambda: np.array([1.0, math.nan]), 1)
    assert probe.scalar == 0.25 and not probe.finite
    assert stepper.probe(lambda: np.array([1.0, 2.0]), 1).scalar == 0.0
    with pytest.raises(ValueError, match="judge"):
        ZerothOrder(params, clip=1.0, judge=lambda plus, minus: 0.0)


def test_numba_waits_for_a_step():
    code = """
import sys, torch
from honeloom.tuning.zeroth_order import ZerothOrder
stepper = ZerothOrder({"w": torch.ones(3)})
assert "numba" not in sys.modules
stepper.step(lambda: 1.0, [1], 0.1)
assert "numba" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
