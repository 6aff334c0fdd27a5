"""Curvature from forward passes: known spectra, known noise, the bound, and what theory says of steps and rank."""

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from honeloom.errors import NotFiniteError
from honeloom.tuning import curvature
from honeloom.tuning.curvature import LADDER, Curvature, Rung, estimate, passes_of
from honeloom.tuning.zeroth_order import ZerothOrder

LINEAR = np.linspace(0.1, 2.0, 50)
"""The spectrum of the golden numbers: trace 52.5, largest 2."""


def load_theory():
    place = Path(__file__).resolve().parents[2] / "benchmarks" / "zeroth_order" / "theory.py"
    spec = importlib.util.spec_from_file_location("zeroth_order_theory", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


theory = load_theory()


def rotated(eigenvalues, seed=0):
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))[0]
    return basis @ np.diag(eigenvalues) @ basis.T


def losses_of(params, hessian, pulls):
    """Quadratics of one Hessian, each with a linear term of its own, in double precision."""

    def loss(pull):
        w = params["w"].double().numpy()
        return 0.5 * float(w @ hessian @ w) + float(pull @ w)

    return [lambda p=p: loss(p) for p in pulls]


def measured(hessian, pulls=None, start=None, **settings):
    size = len(hessian)
    params = {"w": torch.ones(size) if start is None else start.clone()}
    return estimate(losses_of(params, hessian, np.zeros((2, size)) if pulls is None else pulls), params, **settings)


def test_the_trace_of_a_diagonal_is_exact_and_of_a_rotated_one_within_its_error():
    exact = measured(np.diag(LINEAR), seed=0)
    assert exact.trace == pytest.approx(LINEAR.sum(), rel=2e-3) and exact.trace_stderr < 0.02 * exact.trace
    for seed in range(5):
        found = measured(rotated(LINEAR), seed=seed)
        assert abs(found.trace - LINEAR.sum()) < 4 * found.trace_stderr
        assert found.trace_stderr < 0.25 * found.trace  # sqrt(2 tr H^2 / 6) is 0.09 of it
    assert measured(rotated(LINEAR), seed=0, directions=40).trace == pytest.approx(LINEAR.sum(), rel=0.06)


@pytest.mark.parametrize("spectrum", [np.ones(12), 1 / np.arange(1, 21), LINEAR])
def test_moments_and_the_largest_eigenvalue_are_those_of_the_spectrum(spectrum):
    """Tolerances: 20% on a square, 35% on a cube of which 60 directions give 34,220 dependent numbers."""
    spectrum = np.concatenate([spectrum, np.zeros(100)])
    found = measured(rotated(spectrum), seed=1, directions=60)
    square, cube = (spectrum**2).sum(), (spectrum**3).sum()
    assert found.square == pytest.approx(square, rel=0.2) and found.cube == pytest.approx(cube, rel=0.35)
    assert found.largest == pytest.approx(cube / square, rel=0.25)
    assert found.largest_stderr < 0.3 * found.largest
    assert found.largest < 1.15 * spectrum.max()  # from below
    assert found.stable_rank == pytest.approx(spectrum.sum() ** 2 / square, rel=0.25)
    assert found.effective_rank > 0.85 * spectrum.sum() / spectrum.max()  # from above


def test_equal_eigenvalues_have_their_number_as_effective_rank():
    for rank in (5, 10, 20):
        spectrum = np.concatenate([np.full(rank, 3.0), np.zeros(200)])
        found = [measured(rotated(spectrum, seed), seed=seed, directions=16) for seed in range(6)]
        assert np.mean([f.effective_rank for f in found]) == pytest.approx(rank, rel=0.25)
        assert np.mean([f.largest for f in found]) == pytest.approx(3.0, rel=0.25)


def test_signal_is_the_share_of_the_gradient_in_those_of_batches():
    """Twelve batches' noises, orthogonal to each other and to the gradient, and three times as large in the square."""
    size = 300
    rows = np.linalg.qr(np.random.default_rng(0).standard_normal((size, 13)))[0].T
    gradient, pulls = 2.0 * rows[0], 2.0 * rows[0] + math.sqrt(12.0) * rows[1:]
    found = measured(np.zeros((size, size)), pulls, torch.zeros(size), seed=0, directions=40)
    assert found.gradient == pytest.approx(float(gradient @ gradient), rel=0.35)
    assert found.batch == pytest.approx(16.0, rel=0.15)
    assert found.signal == pytest.approx(0.25, abs=0.06)
    few = measured(np.zeros((size, size)), pulls, torch.zeros(size), seed=0)
    assert abs(few.signal - 0.25) < 3 * few.signal_stderr and few.signal_stderr < 0.25
    alone = measured(np.zeros((size, size)), np.repeat(gradient[None], 2, 0), torch.zeros(size), seed=0)
    assert alone.signal == pytest.approx(1.0, abs=1e-6)


def test_descent_in_the_mean_ends_at_the_bound():
    """The golden spectrum has 2 / (52.5 + 2 * 2) = 0.0354; the largest eigenvalue is known from below."""
    found = measured(np.diag(LINEAR), seed=0, directions=40)
    assert found.bound() == pytest.approx(2 / (LINEAR.sum() + 2 * LINEAR.max()), rel=0.1)
    changes = {}
    for share in (0.8, 2.0):
        params, change = {"w": torch.ones(50)}, []
        (loss,) = losses_of(params, np.diag(LINEAR), np.zeros((1, 50)))
        stepper, begun = ZerothOrder(params), loss()
        for seed in range(2000):
            params["w"].fill_(1.0)
            stepper.step(loss, [seed], share * found.bound())
            change.append(loss() - begun)
        changes[share] = np.mean(change), np.std(change) / math.sqrt(2000)
    assert changes[0.8][0] + 3 * changes[0.8][1] < 0 < changes[2.0][0] - 3 * changes[2.0][1]


def test_many_directions_leave_the_largest_eigenvalue():
    """Steps along 400 averaged directions of a quadratic descend far above the bound of a single one."""
    found = measured(rotated(LINEAR), seed=0, directions=40)
    assert found.bound(10**9) == pytest.approx(2 / found.largest)
    assert found.bound(1) < found.bound(4) < found.bound(400)
    params = {"w": torch.ones(50)}
    (loss,) = losses_of(params, rotated(LINEAR), np.zeros((1, 50)))
    begun = loss()
    for step in range(10):
        ZerothOrder(params).step(loss, range(step * 400, (step + 1) * 400), 0.5 * found.bound(400))
    assert loss() < 0.2 * begun and 0.5 * found.bound(400) > 5 * found.bound(1)


PLAIN = Curvature(
    trace=90.0, trace_stderr=3.0, square=400.0, cube=2000.0, largest=5.0, largest_stderr=1.0, gradient=2.0, batch=8.0,
    signal=0.25, signal_stderr=0.0, mu=1e-3, width=1e-3, ladder=(), passes=10,
)  # fmt: skip


def test_the_rate_is_that_of_the_formulas():
    assert PLAIN.scale() == 100.0 and PLAIN.scale(4) == 25.0 + 0.75 * 5.0
    assert PLAIN.bound() == 0.02 and PLAIN.ceiling() == 0.005
    assert PLAIN.rate() == pytest.approx(curvature.SAFETY * 0.25 / 100)
    assert PLAIN.effective_rank == 18.0 and PLAIN.stable_rank == 20.25
    many = PLAIN.rate(1, 10_000)  # sqrt(1/3 / (20 * 100 * 10000))
    assert many == pytest.approx(math.sqrt(1 / 3 / 2e7)) and PLAIN.rate(1, 40_000) == pytest.approx(many / 2)
    assert PLAIN.rate(1, 10) == PLAIN.rate()
    quiet = dataclasses.replace(PLAIN, signal=1.0)
    assert quiet.rate(1, 10**6) == quiet.rate() == pytest.approx(curvature.SAFETY / 100)


def test_what_is_uncertain_makes_the_rate_small_and_never_zero():
    unsure = dataclasses.replace(PLAIN, signal=-0.1, signal_stderr=0.2)
    assert unsure.safe_signal == 0.1
    assert dataclasses.replace(PLAIN, signal=0.2, signal_stderr=0.1).safe_signal == pytest.approx(0.16)
    assert dataclasses.replace(PLAIN, signal=1.4).safe_signal == 1.0
    saddle = dataclasses.replace(PLAIN, trace=-4.0)
    assert saddle.scale() == 20.0 + 10.0 and saddle.effective_rank is None and saddle.stable_rank is None
    flat = dataclasses.replace(PLAIN, trace=0.0, trace_stderr=0.0, square=0.0, largest=0.0)
    assert flat.bound() == flat.ceiling() == math.inf
    with pytest.raises(ValueError, match="no curvature"):
        flat.rate()


def rough(params):
    return [lambda s=s: float(sum((s * t.double()).sin().sum() for t in params.values())) for s in (1.0, 1.1)]


def test_the_tensors_are_afterwards_what_they_were_to_the_bit():
    draw = torch.Generator().manual_seed(0)
    params = {"b": torch.randn(7, 3, generator=draw), "a": torch.randn(40, generator=draw)}
    before = {name: t.clone() for name, t in params.items()}
    found = estimate(rough(params), params, seed=3)
    assert all(torch.equal(params[name], before[name]) for name in params)
    assert found == estimate(rough(params), dict(reversed(params.items())), seed=3)
    assert found.trace != estimate(rough(params), params, seed=4).trace
    assert found.passes == passes_of(2)

    def broken():
        raise RuntimeError("in the middle")

    calls = iter(range(100))
    with pytest.raises(RuntimeError, match="in the middle"):
        estimate([lambda: broken() if next(calls) > 20 else 1.0, lambda: 1.0], params, seed=3)
    assert all(torch.equal(params[name], before[name]) for name in params)


def test_passes_are_counted():
    hessian, counts = np.diag(LINEAR), [0]
    params = {"w": torch.ones(50)}
    (loss,) = losses_of(params, hessian, np.zeros((1, 50)))

    def counted():
        counts[0] += 1
        return loss()

    found = estimate([counted] * 5, params, seed=0, directions=4)
    assert counts[0] == found.passes == passes_of(5, directions=4) == 5 + 2 * (6 * 3 + 4 * 5 + 2 * 6)


def test_distances_avoid_rounding_and_curvature_of_higher_order():
    """Losses in steps of 1e-6, as of float32, of a function whose third derivative shows from 1e-2 on."""
    params = {"w": torch.zeros(400)}

    def loss(rounding, bend):
        w = params["w"].double()
        value = float((2 * w + 2 * w**2 + bend * w**3).sum())
        return round(value / rounding) * rounding

    coarse = estimate([lambda: loss(1e-3, 3e3)] * 2, params, seed=0)
    fine = estimate([lambda: loss(1e-9, 3e3)] * 2, params, seed=0)
    assert fine.mu < coarse.mu and fine.mu <= 1e-3
    changes = [rung.change for rung in coarse.ladder]
    assert [rung.mu for rung in coarse.ladder] == list(LADDER)
    assert changes[0] > min(changes) < changes[-1]
    assert coarse.mu not in (LADDER[0], LADDER[-1])
    assert fine.trace == pytest.approx(1600, rel=0.05) and coarse.width > fine.mu


def test_losses_that_are_none():
    params = {"w": torch.zeros(30)}
    before = params["w"].clone()
    with pytest.raises(NotFiniteError, match="before the first step"):
        estimate([lambda: math.nan, lambda: 1.0], params, seed=0)

    def cliff(limit):
        w = params["w"]
        return float((w.double() ** 2).sum()) if float(w.abs().max()) < limit else math.inf

    far = estimate([lambda: cliff(2e-2)] * 2, params, seed=0)
    assert far.ladder[-1] == Rung(LADDER[-1], None, None) and far.trace == pytest.approx(60, rel=1e-3)
    with pytest.raises(NotFiniteError, match="finite at 2 distances"):
        estimate([lambda: cliff(5e-4)] * 2, params, seed=0)
    assert torch.equal(params["w"], before)


@pytest.mark.parametrize("wrong", [{"directions": 2}, {"ladder": (1e-3, 1e-2)}])
def test_too_few_are_refused(wrong):
    with pytest.raises(ValueError, match="at least two batches, three directions and three distances"):
        estimate([lambda: 1.0] * 2, {"w": torch.zeros(3)}, **{"seed": 0, **wrong})
    with pytest.raises(ValueError, match="at least two batches"):
        estimate([lambda: 1.0], {"w": torch.zeros(3)}, seed=0)


@pytest.mark.parametrize(("spectrum", "seeds"), [(theory.flat(10), 32), (theory.decaying(10), 24)])
def test_steps_to_a_target_depend_on_the_effective_rank_and_not_on_the_dimension(spectrum, seeds):
    """d = 100, 1,000 and 10,000 agree within 15% at the rate chosen; a mean's standard error is 3 to 4%."""
    assert sum(spectrum) / max(spectrum) == pytest.approx(10, rel=1e-6)
    means = [theory.mean_steps(spectrum, dimension, seeds)[0] for dimension in theory.DIMENSIONS]
    assert max(means) < 1.15 * min(means)


def test_steps_grow_linearly_with_the_effective_rank():
    """(r + 2) / (2 s (1 - s / 2)) ln(1 / target) steps with s of the best rate; the slope within 20%, R^2 over 0.98."""
    means = [theory.mean_steps(theory.flat(rank), 300, 24)[0] for rank in theory.RANKS]
    slope, intercept, fit = theory.line(theory.RANKS, means)
    assert fit > 0.98 and slope == pytest.approx(theory.theory(), rel=0.2)
    assert abs(intercept) < 0.25 * means[-1]
