"""Bands of diversity: the contrastive pools against which a diversity reward has to stand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from honeloom.errors import ConfigError, RowsError
from honeloom.ops.noise import keyed_uniform
from honeloom.selection.config import Embedding, HiddenEmbedding, UtilityConfig
from honeloom.selection.daar_config import EARLY, BandConfig, limits_of
from honeloom.selection.development import development
from honeloom.selection.domain_tables import domain_columns, domain_details, domain_table, finite_or_none
from honeloom.selection.domains import discover, labelled_domains
from honeloom.selection.sizes import BAND_REPEATS, BAND_ROWS, BAND_WIDTH
from honeloom.selection.vectors import inverse_lengths
from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData
from honeloom.valuation.executors import Inline
from honeloom.valuation.game import Game

__all__ = ["band", "percentiles"]

Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Axis = Literal["inter", "intra"]
EMBEDDING, UTILITY = HiddenEmbedding(depth=EARLY), UtilityConfig()


def percentiles(values: Values, labels: Labels, ids: Sequence[str]) -> Values:
    """Place (N,) of every row among its domain's by ascending value, from 0 to 100; NaN for a row of no domain.

    The middle of n rows' places is 50 whatever n is: the r-th of them, from 0, has
    100 (r + 1/2) / n. Equal values go by id.
    """
    by_id = np.empty(len(ids), dtype=np.int64)
    by_id[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
    found = np.full(len(ids), math.nan)
    for k in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == k)
        order = rows[np.lexsort((by_id[rows], values[rows]))]
        found[order] = 100.0 * (np.arange(len(rows)) + 0.5) / len(rows)
    return found


@dataclass(frozen=True, slots=True)
class _Pool:
    """One band of one axis; `order` is that in which all rows are taken for it, `value` (N,) what they score."""

    axis: Axis
    name: str
    value: Values
    order: Labels


def band(
    data: SelectionData, *, axis: Axis | None = None, band: str = "80-100",
    by: Literal["cluster", "domain", "source"] = "cluster", clusters: int | None = None,
    embedding: Embedding = EMBEDDING, utility: UtilityConfig = UTILITY,
) -> Scores:  # fmt: skip
    """Keep the rows of every domain whose diversity lies in a band of percentiles.

    inter sorts a domain's rows by the sum of their cosines with the other domains' centroids,
    ascending: 0-20 are far from the others, 80-100 between the domains. intra sorts by the
    cosine with the domain's own centroid, descending: 0-20 are typical, 80-100 scattered. The
    five bands of each axis are the ten contrastive pools of the paper. A search tunes the model
    on each of them, and on random rows, and keeps the one that scores best on the target.

    Parameters
    ----------
    data : SelectionData
        With `embed`; for a search with `open_utility`, and the target: without one a part of the
        rows is held out for it and taken last.
    axis, band, by, clusters, embedding, utility
        As in `BandConfig`.

    Returns
    -------
    Scores
        `value` is 0 for a row in the band and else minus its distance from it in percentage
        points; rows without a vector are -inf. Rows of the band are taken in an order drawn by
        id, the others by their distance. A share that is kept equal to the band's width keeps
        the band.

    Raises
    ------
    RowsError
        There is one domain, and `axis` compares domains; or no row has a vector; or no tuning
        of a search succeeds.
    ConfigError
        The budget is too small for a search.

    References
    ----------
    Ling et al. 2025, arXiv:2502.04380, section 3.
    """
    config = BandConfig(axis=axis, band=band, by=by, clusters=clusters, embedding=embedding, utility=utility)
    if config.searches:
        _check_budget(data.budget, 100 // BAND_WIDTH * (2 if axis is None else 1))
    vectors = data.embed(data.rows, config.embedding)
    if not (inverse_lengths(vectors) > 0).any():
        raise RowsError(f"band: none of the {len(data.rows)} rows has a vector; use another embedding")
    stability = None
    if by == "cluster":
        domains, stability = discover(vectors, clusters, ids=data.rows.ids, seed=data.seed)
    else:
        domains = labelled_domains(vectors, data.rows.domains if by == "domain" else data.rows.sources)
    axes = _axes(config, domains.count, len(data.rows))
    columns = domain_columns(data.rows, vectors, domains, seed=data.seed)
    places: dict[Axis, Values] = {
        "inter": percentiles(np.array(columns["phi_inter"]), domains.labels, data.rows.ids),
        "intra": percentiles(-np.array(columns["phi_intra"]), domains.labels, data.rows.ids),
    }
    details: dict[str, Any] = {"stability": stability and asdict(stability)}
    if config.searches:
        chosen, told, held_out = _search(data, config, axes, places)
        columns, details = {**columns, "held_out": held_out.tolist()}, {**details, **told}
    else:
        chosen = _pool(data, axes[0], config.band, places[axes[0]])
    phi = np.array(columns[f"phi_{chosen.axis}"])
    return Scores(
        tuple(chosen.value.tolist()), True, "band",
        columns={**columns, "percentile": finite_or_none(places[chosen.axis])}, order=chosen.order.tolist(),
        clusters=domain_table(data.rows.ids, domains, phi, columns["phi_intra"]),
        details={
            **domain_details(data.rows, vectors, domains), "by": by, "axis": chosen.axis, "band": chosen.name,
            **details,
        },
    )  # fmt: skip


def _check_budget(budget: int | None, bands: int) -> None:
    if budget is not None and budget < bands + 1:
        raise ConfigError(
            f"budget {budget}: a search tunes on {bands} bands and on random rows, {bands + 1} evaluations at least; "
            "raise --budget, or give one axis"
        )


def _axes(config: BandConfig, domains: int, rows: int) -> list[Axis]:
    """The axes in question, first the default one."""
    if domains < 2 and (config.axis == "inter" or (config.axis is None and not config.searches)):
        raise RowsError(
            f"band: the {rows} rows make one domain by {config.by}, and axis inter compares domains; use axis intra, "
            "or other domains (method.by, method.clusters)"
        )
    if config.axis is not None:
        return [config.axis]
    if not config.searches:
        return ["inter"]
    return ["inter", "intra"] if domains > 1 else ["intra"]


def _pool(
    data: SelectionData, axis: Axis, name: str, place: Values, held_out: npt.NDArray[np.bool_] | None = None
) -> _Pool:
    low, high = limits_of(name)
    gap = np.maximum(np.maximum(low - place, place - high), 0.0)
    value = np.where(np.isfinite(gap), 0.0 - gap, -math.inf)
    if held_out is not None:
        value[held_out] = -math.inf
    draws = keyed_uniform(data.seed, "band", data.rows.ids)
    return _Pool(axis, name, value, np.lexsort((draws, -value)))


def _search(
    data: SelectionData, config: BandConfig, axes: Sequence[Axis], places: Mapping[Axis, Values]
) -> tuple[_Pool, dict[str, Any], npt.NDArray[np.bool_]]:
    """The pool whose rows teach best what the target asks, what was measured, and the rows that were held out."""
    dev = development(data, config.utility, "band")
    aside = dev.held_out | dev.alike  # neither is tuned on; what asks the same may be chosen
    bands = [f"{x}-{x + BAND_WIDTH}" for x in range(0, 100, BAND_WIDTH)]
    pools = [_pool(data, axis, name, places[axis], dev.held_out) for axis in axes for name in bands]
    usable = int((~aside).sum())
    if usable < len(bands):
        raise RowsError(
            f"band: {usable} of {len(aside)} rows neither score tunings nor repeat one that does, too few to compare "
            "bands; give rows to score on (--target)"
        )
    count = min(data.wanted or usable, usable * BAND_WIDTH // 100, BAND_ROWS)
    drawn = np.argsort(keyed_uniform(data.seed, "band/random", data.rows.ids), kind="stable")
    sets = [order[~aside[order]][:count] for order in (*(pool.order for pool in pools), drawn)]
    wanted = {int(i) for members in sets for i in members}
    rows = {i: row for i, row in enumerate(data.rows) if i in wanted}
    settings = config.utility
    if settings.steps is None:
        settings = settings.model_copy(update={"steps": math.ceil(count / settings.batch_size)})
    budget = data.budget or BAND_REPEATS * len(sets)
    repeats = budget // len(sets)
    data.say(
        f"band: {len(sets)} sets of {count} rows, each tuned on {repeats} times for {settings.steps} steps of "
        f"{settings.batch_size} rows, scored on {len(dev.rows)} rows"
    )
    port = data.open_utility([[rows[int(i)] for i in members] for members in sets], dev.rows, settings)
    with data.open_evaluations(port.fingerprint, budget) as (ledger, executor):
        game = Game(port, len(sets), budget=budget, seed=data.seed, executor=executor or Inline(), ledger=ledger)
        values = np.array([game.evaluate(np.eye(len(sets), dtype=bool)) for _ in range(repeats) if game.remaining])
    if game.failed:
        data.warn(f"band: {game.failed} of {game.spent} evaluations failed. The first: {game.first_error}")
    whole = values[np.isfinite(values).all(axis=1)]  # bands are compared over the same draws of order
    if not len(whole):
        raise RowsError(f"band: no round of tunings on all bands succeeded. The first failure: {game.first_error}")
    found = [_measured(column) for column in whole.T]
    best = max(range(len(pools)), key=lambda k: (found[k]["value"], -k))
    curve = [
        {"axis": p.axis, "band": p.name, **one, "chosen": k == best}
        for k, (p, one) in enumerate(zip(pools, found, strict=False))
    ]
    data.say(f"band: {pools[best].axis} {pools[best].name} scores best")
    told = {
        "band_curve": curve, "band_baseline": found[-1], "score": settings.score, "evaluations": game.spent,
        "budget": budget, "failed": game.failed,
        "development": {"rows": len(dev.rows), "from": "rows" if data.target is None else "target"},
    }  # fmt: skip
    return pools[best], told, dev.held_out


def _measured(values: Values) -> dict[str, Any]:
    """Mean and standard error of repeated evaluations, None where there are too few."""
    known = values[np.isfinite(values)]
    error = float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None
    return {"value": float(known.mean()) if len(known) else None, "stderr": error, "evaluations": len(known)}
