"""Evaluations on Ray actors: the bits of this process."""

import pytest

from honeloom.errors import ConfigError, HoneloomError
from honeloom.testing import games
from honeloom.valuation import estimate

pytest.importorskip("ray")
ray_backend = pytest.importorskip("honeloom.backends.ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool():
    with ray_backend.RayPool(2) as started:
        yield started


@pytest.mark.parametrize("method", ["regression", "permutation"])
def test_ray_gives_the_bits_of_this_process(pool, method):
    utility = games.Noisy(games.benchmark_game("pairwise", 12, 1), 0.01, 3)
    options = {"method": method, "budget": 90, "seed": 2}
    assert estimate(utility, 12, executor=pool, **options) == estimate(utility, 12, **options)


def test_failures_come_back_as_failures(pool):
    def fragile(coalition):
        if len(coalition) == 2:
            raise RuntimeError("no")
        return float(len(coalition))

    with pytest.warns(UserWarning, match="RuntimeError: no"):
        scores = estimate(fragile, 6, method="permutation", budget=60, executor=pool)
    assert scores.value == pytest.approx((1.0,) * 6)


def test_a_dead_actor_is_told(pool):
    def die(coalition):
        import os

        os._exit(9)

    with pytest.raises(HoneloomError, match="Ray lost a worker"):
        estimate(die, 4, budget=20, executor=pool)


def test_workers_are_counted():
    with pytest.raises(ConfigError, match="workers 0"):
        ray_backend.RayPool(0)
