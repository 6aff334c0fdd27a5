"""Bands of diversity: the contrastive pools against which a diversity reward has to stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import numpy as np
import numpy.typing as npt

from honeloom.errors import RowsError
from honeloom.ops.noise import keyed_uniform
from honeloom.selection.config import Embedding, HiddenEmbedding
from honeloom.selection.daar_config import EARLY, BandConfig
from honeloom.selection.domain_tables import domain_columns, domain_details, domain_table, finite_or_none
from honeloom.selection.domains import discover, labelled_domains
from honeloom.selection.vectors import inverse_lengths
from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData

__all__ = ["band", "percentiles"]

Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
EMBEDDING = HiddenEmbedding(depth=EARLY)


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


def band(
    data: SelectionData, *, axis: Literal["inter", "intra"] = "inter", band: str = "80-100",
    by: Literal["cluster", "domain", "source"] = "cluster", clusters: int | None = None,
    embedding: Embedding = EMBEDDING,
) -> Scores:  # fmt: skip
    """Keep the rows of every domain whose diversity lies in a band of percentiles.

    inter sorts a domain's rows by the sum of their cosines with the other domains' centroids,
    ascending: 0-20 are far from the others, 80-100 between the domains. intra sorts by the
    cosine with the domain's own centroid, descending: 0-20 are typical, 80-100 scattered. The
    five bands of each axis are the ten contrastive pools of the paper.

    Parameters
    ----------
    data : SelectionData
        With `embed`.
    axis, band, by, clusters, embedding
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
        There is one domain, and `axis` compares domains; or no row has a vector.

    References
    ----------
    Ling et al. 2025, arXiv:2502.04380, section 3.
    """
    config = BandConfig(axis=axis, band=band, by=by, clusters=clusters, embedding=embedding)
    vectors = data.embed(data.rows, config.embedding)
    if not (inverse_lengths(vectors) > 0).any():
        raise RowsError(f"band: none of the {len(data.rows)} rows has a vector; use another embedding")
    stability = None
    if by == "cluster":
        domains, stability = discover(vectors, clusters, ids=data.rows.ids, seed=data.seed)
    else:
        domains = labelled_domains(vectors, data.rows.domains if by == "domain" else data.rows.sources)
    if domains.count < 2 and axis == "inter":
        raise RowsError(
            f"band: the {len(data.rows)} rows make one domain by {by}, and axis inter compares domains; use axis "
            "intra, or other domains (method.by, method.clusters)"
        )
    columns = domain_columns(data.rows, vectors, domains, seed=data.seed)
    phi = np.array(columns["phi_inter"] if axis == "inter" else columns["phi_intra"])
    place = percentiles(phi if axis == "inter" else -phi, domains.labels, data.rows.ids)
    low, high = config.limits()
    gap = np.maximum(np.maximum(low - place, place - high), 0.0)
    value = np.where(np.isfinite(gap), -gap, -math.inf)
    draws = keyed_uniform(data.seed, "band", data.rows.ids)
    details = domain_details(data.rows, vectors, domains)
    return Scores(
        tuple(value.tolist()), True, "band", columns={**columns, "percentile": finite_or_none(place)},
        order=np.lexsort((draws, -value)).tolist(),
        clusters=domain_table(data.rows.ids, domains, phi, columns["phi_intra"]),
        details={**details, "stability": stability and asdict(stability)},
    )  # fmt: skip
