"""SHED: Shapley values of clusters of rows, and a choice by them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from honeloom.errors import ConfigError, RowsError
from honeloom.ops.noise import keyed_uniform
from honeloom.selection import sampling as drawing
from honeloom.selection.config import Embedding, Estimator, HiddenEmbedding, ShedConfig, UtilityConfig
from honeloom.selection.development import Development, development
from honeloom.selection.groups import Groups, by_label, by_vectors, nearest_of_all, representatives
from honeloom.selection.in_run import first_order_values
from honeloom.selection.shed_release import GROUPS, released_values
from honeloom.selection.sizes import FEWEST_STEPS, LABEL_PROXIES, SHED_BUDGET, SURROGATE_EPOCHS, player_count
from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData, UtilityPort
from honeloom.types.rows import Row
from honeloom.valuation.estimation import estimate
from honeloom.valuation.executors import Inline
from honeloom.valuation.game import Game
from honeloom.valuation.noise import measure_noise
from honeloom.valuation.stopping import TopStability, spearman

__all__ = ["shed"]

Values = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

EMBEDDING, UTILITY = HiddenEmbedding(), UtilityConfig()


@dataclass(frozen=True, slots=True)
class _Players:
    """Which groups play, the rows that stand for them, and on what they are scored."""

    group: list[int]
    at: list[list[int]]
    rows: list[list[Row]]
    dev: list[Row]
    held_out: Bools

    @property
    def names(self) -> list[str]:
        return [rows[0].id for rows in self.rows]


def shed(
    data: SelectionData, *, mode: Literal["standard", "shed-paper", "shed-release"] = "standard",
    by: Literal["embedding", "source", "domain"] = "embedding", players: int | None = None, proxies: int | None = None,
    embedding: Embedding = EMBEDDING, estimator: Estimator = "auto", surrogate: Literal["in_run", "none"] | None = None,
    stability: float | None = None, utility: UtilityConfig = UTILITY, sampling: Literal["qwcs", "qocs"] = "qwcs",
    factor: float = 2.0, standardise: Literal["z", "rank"] = "z", curves: int = 4,
) -> Scores:  # fmt: skip
    """Value clusters by tunings on the rows that stand for them, give every row its cluster's value, and sample.

    Rows are embedded and clustered; the players of the game are the clusters, each played by
    its rows nearest to the centroid. The utility tunes a model on the rows of a coalition and
    scores it on the target. Values are estimated within the budget, noise measured first, and
    sampled by QOCS (whole clusters by value) or QWCS (softmax of factor x standardised value).

    Parameters
    ----------
    data : SelectionData
        Rows, ports, and the target; without a target a part of the rows is held out for it and
        taken last.
    mode, by, players, proxies, embedding, estimator, surrogate, stability, utility, sampling, factor
        As in `ShedConfig`, and so are `standardise` and `curves`.

    Returns
    -------
    Scores
        Per row the value of its cluster, in units of the utility; `order` as sampled; the table
        of clusters; and in `details` what was measured.

    Raises
    ------
    RowsError
        Too few rows for two players, or a utility that cannot be evaluated.

    References
    ----------
    He et al. 2024 (SHED), arXiv:2405.00705.
    """
    config = ShedConfig(
        mode=mode, by=by, players=players, proxies=proxies, embedding=embedding, estimator=estimator,
        surrogate=surrogate, stability=stability, utility=utility, sampling=sampling, factor=factor,
        standardise=standardise, curves=curves,
    )  # fmt: skip
    budget = data.budget or SHED_BUDGET
    dev = development(data, config.utility, "shed")
    count = player_count(len(data.rows) - int(dev.held_out.sum()), config.players, budget)
    vectors = data.embed(data.rows, config.embedding) if config.by == "embedding" else None
    if vectors is None:
        labels = data.rows.sources if config.by == "source" else data.rows.domains
        groups = by_label(labels, ids=data.rows.ids, seed=data.seed)
    else:
        groups = by_vectors(vectors, count, ids=data.rows.ids, seed=data.seed)
    each = config.proxies or (1 if config.by == "embedding" else LABEL_PROXIES)
    allowed = ~(dev.held_out | dev.alike) & (groups.label >= 0)
    at = representatives(groups, allowed, each, data.rows.ids)
    if vectors is not None and groups.centroids is not None and config.mode != "standard":
        at = [[i] for i in nearest_of_all(vectors, groups.centroids, allowed)]
    if len([members for members in at if members]) < 2:
        raise RowsError(_too_few(config, len(at)))
    playing = _play(data, at, dev)
    tuning = _with_steps(utility, playing)
    data.say(
        f"shed: {len(playing.rows)} players, each tuning {tuning.steps} steps of {tuning.batch_size} rows, scored on "
        f"{len(dev.rows)} rows; at most {budget} evaluations"
    )
    port = data.open_utility(playing.rows, dev.rows, tuning)
    cheap = _surrogate(data, playing, tuning, config)
    found, removal = _value(data, port, cheap, config, budget, len(playing.rows))
    return _scores(data, config, groups, playing, found, cheap, removal)


def _too_few(config: ShedConfig, groups: int) -> str:
    if config.by != "embedding":
        return (
            f"shed: by {config.by}: the rows have {groups or 'no'} label, and values need at least 2 players; give "
            f"rows with a `{config.by}` of their own, or use method.by=embedding"
        )
    return f"shed: the rows make {groups or 'no'} cluster, for they are all alike; values need at least 2 players"


def _play(data: SelectionData, at: Sequence[Sequence[int]], dev: Development) -> _Players:
    wanted = {i for group in at for i in group}
    rows = {i: row for i, row in enumerate(data.rows) if i in wanted}
    playing = [g for g, members in enumerate(at) if members]
    played = [[rows[i] for i in at[g]] for g in playing]
    return _Players(playing, [list(at[g]) for g in playing], played, dev.rows, dev.held_out)


def _with_steps(utility: UtilityConfig, players: _Players) -> UtilityConfig:
    if utility.steps is not None:
        return utility
    rows = sum(map(len, players.rows))
    return utility.model_copy(update={"steps": max(FEWEST_STEPS, math.ceil(rows / utility.batch_size))})


def _surrogate(data: SelectionData, players: _Players, utility: UtilityConfig, config: ShedConfig) -> Values | None:
    """Cheap values of the players: what the steps of one tuning owe to their rows."""
    wanted = config.surrogate or ("in_run" if config.estimator_name in ("auto", "control_variate") else "none")
    if wanted == "none" or config.mode != "standard":
        return None
    rows = [row for rows in players.rows for row in rows]
    values = first_order_values(
        data.open_gradients(utility.rank), rows, players.dev, epochs=SURROGATE_EPOCHS,
        batch_size=utility.batch_size, lr=utility.lr, seed=data.seed,
    )  # fmt: skip
    owner = np.repeat(np.arange(len(players.rows)), [len(rows) for rows in players.rows])
    return np.bincount(owner, np.nan_to_num(values), minlength=len(players.rows)).astype(np.float64)


def _value(
    data: SelectionData, port: UtilityPort, surrogate: Values | None, config: ShedConfig, budget: int, n: int
) -> tuple[Scores, dict[str, Any] | None]:
    """Values of the players, and what happens when the best or the worst of them are taken away."""
    points = config.curves if budget >= 8 * config.curves else 0
    stop = None
    if config.stability is not None:
        share = (data.wanted or len(data.rows) // 10) / len(data.rows)
        stop = TopStability(max(1, round(share * n)), config.stability)
    with (
        data.open_evaluations(port.fingerprint, budget) as (ledger, executor),
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        left = budget - 2 * points
        if config.mode == "shed-release":
            found = _released(Game(port, n, budget=left, seed=data.seed, executor=executor or Inline(), ledger=ledger))
        else:
            method: Any = config.estimator
            if config.mode == "shed-paper":
                method = {"type": "group_permutation", "debias": False}
            found = estimate(
                port, n, method=method, budget=left, seed=data.seed, stop=stop, surrogate=surrogate, ledger=ledger,
                executor=executor, say=data.say,
            )  # fmt: skip
        game = Game(port, n, budget=2 * points, seed=data.seed, executor=executor or Inline(), ledger=ledger)
        removal = _removal(game, found, points)
    for warning in told:
        if issubclass(warning.category, UserWarning):
            data.warn(f"shed: {warning.message}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if found.resolvable is False:
        data.warn("shed: not resolvable: the values' errors are as large as their differences, so the order is mostly "
                  "chance; spend more evaluations, take fewer players, more steps or more target rows")  # fmt: skip
    if not math.isfinite(found.details["full"]) or not math.isfinite(found.details["empty"]):
        raise RowsError("shed: the model could not be tuned on all players' rows, or not scored; see the warnings")
    return found, removal


def _released(game: Game) -> Scores:
    least = 4 + 2 * (math.ceil(game.n_players / max(1, game.n_players // GROUPS)) - 1)
    if game.budget < least:
        raise ConfigError(
            f"budget {game.budget} (less the removal curves): mode shed-release drops its first permutation, so "
            f"{game.n_players} players need at least {least} evaluations; raise --budget, or lower method.players"
        )
    noise = measure_noise(game, most=4)
    found = released_values(game)
    return Scores(
        tuple(found.value.tolist()), True, "shed-release", tuple(found.stderr.tolist()), tuple(found.count.tolist()),
        noise=noise, details={"evaluations": game.spent, "failed": game.failed, "empty": game.empty, "full": game.full},
    )  # fmt: skip


def _removal(game: Game, found: Scores, points: int) -> dict[str, Any] | None:
    """V without the best, and without the worst, shares of the players; None where no points are wanted."""
    if not points or game.n_players < 3:
        return None
    order = np.argsort(np.argsort(-np.array(found.value), kind="stable"))
    n = game.n_players
    cuts = sorted({round((i + 1) / (points + 1) * n) for i in range(points)} - {0, n})
    shares = [cut / n for cut in cuts]
    best = np.array([order >= cut for cut in cuts])
    worst = np.array([order < game.n_players - cut for cut in cuts])
    values = game.evaluate(np.concatenate((best, worst)))
    ends = [found.details["full"], found.details["empty"]]
    parts = ([v if math.isfinite(v) else None for v in part] for part in (values[: len(cuts)], values[len(cuts) :]))
    without = [[ends[0], *part, ends[1]] for part in parts]
    return {
        "share": [0.0, *shares, 1.0], "without_best": without[0], "without_worst": without[1], "spent": game.spent,
        "failed": game.failed,
    }  # fmt: skip


def _scores(
    data: SelectionData, config: ShedConfig, groups: Groups, players: _Players, found: Scores,
    surrogate: Values | None, removal: dict[str, Any] | None,
) -> Scores:  # fmt: skip
    """Values of players as scores of rows, and the order in which rows are taken."""
    place = np.full(groups.count + 1, -1)  # the last entry is that of rows without a group
    place[players.group] = np.arange(len(players.group))
    player = place[groups.label]
    if config.mode == "shed-release":  # scores of exactly 0 are lost there
        player = np.where((player >= 0) & (np.array(found.value)[player] == 0.0), -1, player)
    chosen = np.flatnonzero((player >= 0) & ~players.held_out)
    order, chances = _sample(data, config, _significant(found), player[chosen], groups.distance[chosen], chosen)
    rest = np.setdiff1d(np.arange(len(player)), chosen)
    rest = rest[np.argsort(keyed_uniform(data.seed, "shed/rest", [data.rows.ids[i] for i in rest]), kind="stable")]
    known = np.isin(np.arange(len(player)), chosen)
    errors, counts = np.array(found.stderr), np.array(found.count)
    proxies = np.zeros(len(player), dtype=bool)
    proxies[[i for rows in players.at for i in rows]] = True
    columns: dict[str, Any] = {
        "cluster": [int(p) if p >= 0 else None for p in player],
        "distance": groups.distance.astype(float).tolist(),
        "proxy": proxies.tolist(),
        "held_out": players.held_out.tolist(),
    }
    if groups.plane is not None:
        columns |= {"x": groups.plane[:, 0].tolist(), "y": groups.plane[:, 1].tolist()}
    return Scores(
        value=tuple(np.where(known, np.array(found.value)[player], -np.inf).tolist()),
        higher_is_better=True,
        method="shed",
        stderr=tuple(np.where(known, errors[player], np.inf).tolist()),
        count=tuple(np.where(known, counts[player], 0).tolist()),
        columns=columns,
        resolvable=found.resolvable,
        noise=found.noise,
        order=np.concatenate((chosen[order], rest)).tolist(),
        clusters=_table(players, found, surrogate, np.bincount(player[player >= 0], minlength=len(players.rows)),
                        chances),
        details=_details(data, config, players, found, surrogate, removal, chances),
    )  # fmt: skip


def _significant(found: Scores) -> Values:
    """Values without the rounding errors of the utility, which would be ranked like differences."""
    unit = max(abs(found.details["full"]), abs(found.details["empty"])) or 1.0
    return np.round(np.array(found.value) / unit, 10) * unit


def _sample(
    data: SelectionData, config: ShedConfig, values: Values, label: npt.NDArray[np.int64],
    distance: npt.NDArray[np.float32], chosen: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], Values | None]:  # fmt: skip
    """Order of the chosen rows, and the chance of every cluster to be drawn first."""
    ids = [data.rows.ids[i] for i in chosen]
    if config.sampling == "qocs":
        return drawing.qocs(values, label, distance, ids), None
    factor = 1.0 if config.mode == "shed-release" else config.factor  # the release has none
    scaled = drawing.standardise(values, config.standardise) if config.mode == "standard" else values
    order = drawing.qwcs(scaled, label, ids, factor=factor, seed=data.seed)
    return order, drawing.cluster_probabilities(scaled, factor)


def _table(
    players: _Players, found: Scores, surrogate: Values | None, sizes: npt.NDArray[np.int64], chances: Values | None
) -> dict[str, Sequence[Any]]:
    n = len(players.rows)
    return {
        "cluster": list(range(n)),
        "size": sizes.tolist(),
        "proxy_id": players.names,
        "value": list(found.value),
        "stderr": [e if math.isfinite(e) else None for e in found.stderr or ()],
        "count": list(found.count or ()),
        "surrogate": surrogate.tolist() if surrogate is not None else [None] * n,
        "p_select": chances.tolist() if chances is not None else [None] * n,
    }


def _details(
    data: SelectionData, config: ShedConfig, players: _Players, found: Scores, surrogate: Values | None,
    removal: dict[str, Any] | None, chances: Values | None,
) -> dict[str, Any]:  # fmt: skip
    spent, failed = (removal.pop("spent"), removal.pop("failed")) if removal else (0, 0)
    agreement = None if surrogate is None else spearman(np.array(found.value), surrogate)
    return {
        **found.details,
        "evaluations": found.details["evaluations"] + spent,
        "failed": found.details["failed"] + failed,
        "budget": data.budget or SHED_BUDGET,
        "players": len(players.rows),
        "estimator": found.method,
        "development": {"rows": len(players.dev), "from": "rows" if data.target is None else "target"},
        "surrogate_correlation": agreement,
        "effective_clusters": None if chances is None else drawing.effective_clusters(chances),
        "removal": removal,
    }
