"""The door of the family: noise first, then one estimator within the budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from honeloom.config.base import validate
from honeloom.config.methods import MethodConfig
from honeloom.errors import ConfigError
from honeloom.registry import family
from honeloom.types.plans import Noise, Scores
from honeloom.valuation.config import AntitheticConfig, ControlVariateConfig, ExactConfig, KnnConfig, RegressionConfig
from honeloom.valuation.exact import MAX_PLAYERS
from honeloom.valuation.executors import Executor, Inline, Utility
from honeloom.valuation.game import Estimate, Game
from honeloom.valuation.knn import KnnUtility
from honeloom.valuation.ledger import Ledger
from honeloom.valuation.noise import RESOLVABLE, achieved_rho, measure_noise
from honeloom.valuation.stopping import StoppingRule

__all__ = ["DEFAULT_BUDGET", "estimate"]

DEFAULT_BUDGET = 1000
"""Evaluations where none are asked for; 3 per player if that is more, and 2^n for method `exact`."""
ENOUGH_PAIRS = 10
"""Pairs of permutations from which `auto` takes them: fewer do not tell their own error."""


def estimate(
    utility: Utility,
    n_players: int,
    *,
    method: str | Mapping[str, Any] | MethodConfig = "auto",
    budget: int | None = None,
    seed: int = 0,
    stop: StoppingRule | None = None,
    surrogate: Sequence[float] | npt.NDArray[Any] | None = None,
    ledger: Ledger | None = None,
    executor: Executor | None = None,
    say: Callable[[str], None] | None = None,
) -> Scores:
    """Estimate what every player adds to a utility of coalitions.

    First v(N) and v(empty) are measured, repeatedly if the budget allows; a warning says when
    the budget cannot tell the players apart. An evaluation that raises or is not finite is left
    out and the standard errors grow; above 5% no more are made. It always returns.

    `auto` takes `knn` for a KnnUtility, `control_variate` where a surrogate is given, and
    `exact` where the budget holds all 2^n coalitions and the noise is below the mean margin.
    Without noise it takes `antithetic` from 20 evaluations a player, and paired `regression` from 2
    a player. Else it takes `regression`.

    Parameters
    ----------
    utility : callable
        frozenset of players (0..n-1) -> value, in any unit, higher is better. One that draws
        random numbers may have a method `evaluate(coalition, repeat)`, which is then called instead.
    n_players : int
        n, 1 or more.
    method : str, mapping or MethodConfig
        "auto", a name of `METHODS`, or a name with settings: {"type": "regression", "paired": True}.
    budget : int or None
        Most evaluations, those that measure the noise included; default 1000 or 3 n, and 2^n
        with the noise probes for `exact`.
    seed : int
        Every coalition that is asked for follows from it.
    stop : StoppingRule or None
        Ends before the budget does.
    surrogate : sequence or array of float or None
        Cheap values of the players, for `control_variate`.
    ledger : Ledger or None
        Keeps every evaluation on disk, so that none is paid twice.
    executor : Executor or None
        Where evaluations run; default in this process. The result does not depend on it.
    say : callable or None
        Told in one line what the noise promises, before the budget is spent.

    Returns
    -------
    Scores
        `value` and `stderr` in units of the utility, `count` of evaluations or marginals per
        player, `resolvable`, `noise`; `method` is the one that was used. `details` has the
        number of `evaluations` and of those that `failed`, and v(`empty`) and v(N), `full`.

    Raises
    ------
    ConfigError
        A setting, or a method that does not fit the utility.
    """
    config = _config(method)
    _check(n_players, budget, surrogate, config)
    limit = budget if budget is not None else _default_budget(n_players, config)
    game = Game(
        utility,
        n_players,
        budget=limit,
        seed=seed,
        executor=executor or Inline(),
        ledger=ledger,
        stop=stop,
        surrogate=None if surrogate is None else np.array(surrogate, dtype=np.float64),
    )
    if config is None and isinstance(utility, KnnUtility):
        config = KnnConfig()
    needs_noise = not isinstance(config, KnnConfig)
    noise = measure_noise(game, most=_probes(game, config)) if needs_noise else Noise(None, None, None)
    if say is not None and needs_noise:
        say(_told(game, noise))
    config = config or _choose(game)
    _warn_unresolvable(game, noise, config)
    found = family("valuation").load(config.type)(game, **config.model_dump(exclude={"type"}))
    return _scores(found, config.type, noise, game)


def _config(method: str | Mapping[str, Any] | MethodConfig) -> MethodConfig | None:
    """Settings of a method; None for auto."""
    if isinstance(method, MethodConfig):
        return method
    data = {"type": method} if isinstance(method, str) else dict(method)
    name = data.get("type", "auto")
    if name == "auto":
        if len(data) > 1:
            raise ConfigError(f"method 'auto' has no settings, got {sorted(set(data) - {'type'})}; name a method")
        return None
    cls: type[MethodConfig] = family("valuation").load_config(str(name))
    return validate(cls, data, what=f"valuation method {name!r}")


def _check(
    n_players: int,
    budget: int | None,
    surrogate: Sequence[float] | npt.NDArray[Any] | None,
    config: MethodConfig | None,
) -> None:
    if n_players < 1:
        raise ConfigError(f"n_players {n_players}: must be 1 or more")
    if budget is not None and budget < 1:
        raise ConfigError(f"budget {budget}: must be 1 evaluation or more")
    if surrogate is None:
        return
    if len(surrogate) != n_players or not np.isfinite(np.asarray(surrogate, dtype=np.float64)).all():
        raise ConfigError(f"surrogate: needs {n_players} finite numbers, one per player, got {len(surrogate)}")
    if not isinstance(config, ControlVariateConfig | None):
        raise ConfigError(f"method {config.type!r} takes no surrogate; use 'control_variate' or 'auto'")


def _default_budget(n: int, config: MethodConfig | None) -> int:
    if isinstance(config, ExactConfig) and n <= MAX_PLAYERS:
        return (1 << n) + 4
    return max(DEFAULT_BUDGET, 3 * n)


def _probes(game: Game, config: MethodConfig | None) -> int:
    """Evaluations for the noise: a tenth of the budget at most, and what `exact` leaves over."""
    if isinstance(config, ExactConfig) and game.n_players <= MAX_PLAYERS:
        return game.budget - (1 << game.n_players)
    return max(game.budget // 10, 4 if game.budget >= 16 else 2)


def _choose(game: Game) -> MethodConfig:
    n = game.n_players
    if game.surrogate is not None:
        return ControlVariateConfig()
    small = game.noise_sd is not None and game.noise_sd <= abs(game.margin)
    if n <= MAX_PLAYERS and game.remaining >= (1 << n) - 2 and (small or game.noise_sd == 0.0):
        return ExactConfig()
    if game.noise_sd != 0.0:
        return RegressionConfig()
    if game.remaining >= 2 * ENOUGH_PAIRS * n:
        return AntitheticConfig()
    return RegressionConfig(paired=game.remaining >= 2 * n)


def _told(game: Game, noise: Noise) -> str:
    sd = "not measured" if noise.sd is None else f"sd {noise.sd:.3g}"
    if noise.margin is None or noise.predicted_rho is None:
        return f"noise {sd}; v(N) or v(empty) could not be evaluated"
    return (
        f"noise {sd}, mean margin {noise.margin:.3g}, predicted rank correlation {noise.predicted_rho:.2f} "
        f"for {game.remaining} more evaluations of {game.n_players} players"
    )


def _warn_unresolvable(game: Game, noise: Noise, config: MethodConfig) -> None:
    rho = noise.predicted_rho
    if rho is None or rho >= RESOLVABLE or isinstance(config, ExactConfig) or game.surrogate is not None:
        return
    warnings.warn(
        f"not resolvable: {game.budget} evaluations with noise {_amount(noise.sd)} and a mean margin of "
        f"{noise.margin:.3g} rank {game.n_players} players with a predicted correlation of {rho:.2f}. "
        "Use fewer players, more evaluations, a surrogate, or a less noisy utility",
        stacklevel=3,
    )


def _amount(sd: float | None) -> str:
    return "that was not measured" if sd is None else f"{sd:.3g}"


def _scores(found: Estimate, method: str, noise: Noise, game: Game) -> Scores:
    rho = achieved_rho(found)
    rho = noise.predicted_rho if rho is None else rho
    return Scores(
        value=tuple(found.value.tolist()),
        higher_is_better=True,
        method=method,
        stderr=tuple(found.stderr.tolist()),
        count=tuple(found.count.tolist()),
        resolvable=None if rho is None else rho >= RESOLVABLE,
        noise=noise,
        details={"evaluations": game.spent, "failed": game.failed, "empty": game.empty, "full": game.full},
    )
