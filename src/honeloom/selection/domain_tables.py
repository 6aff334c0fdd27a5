"""What a report says of domains: columns per row, a line per domain, and numbers of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import adjusted_mutual_info_score

from honeloom.selection.domains import Domains, diversity, set_diversity
from honeloom.selection.probe import entropy
from honeloom.selection.projection import plane
from honeloom.types.ports import RowTable, Vectors

__all__ = ["domain_columns", "domain_details", "domain_table", "finite_or_none"]

Values = npt.NDArray[np.float64]


def finite_or_none(values: Values) -> list[float | None]:
    """Numbers as a table holds them; None for NaN and the infinite."""
    return [v if math.isfinite(v) else None for v in values.tolist()]


def domain_columns(rows: RowTable, vectors: Vectors, domains: Domains, *, seed: int) -> dict[str, list[Any]]:
    """Pseudo-domain, diversity and place on a map of every row; None where a row has no domain."""
    inter, intra = diversity(vectors, domains)
    drawn = plane(vectors, ids=rows.ids, seed=seed)
    return {
        "cluster": [int(k) if k >= 0 else None for k in domains.labels],
        "pseudo_domain": [domains.names[k] if k >= 0 else None for k in domains.labels],
        "phi_inter": inter.tolist(),
        "phi_intra": intra.tolist(),
        "x": drawn[:, 0].tolist(),
        "y": drawn[:, 1].tolist(),
    }


def domain_table(ids: Sequence[str], domains: Domains, values: Values, intra: Sequence[float]) -> dict[str, list[Any]]:
    """One line per domain: its size, the mean of the finite values, and the row closest to the centroid."""
    members = [np.flatnonzero(domains.labels == k) for k in range(domains.count)]
    finite = [rows[np.isfinite(values[rows])] for rows in members]
    return {
        "cluster": list(range(domains.count)),
        "size": [len(rows) for rows in members],
        "value": [float(values[rows].mean()) if len(rows) else None for rows in finite],
        "proxy_id": [
            ids[min(rows.tolist(), key=lambda i: (-intra[i], ids[i]))] if len(rows) else None for rows in members
        ],
        "name": list(domains.names),
    }


def domain_details(rows: RowTable, vectors: Vectors, domains: Domains) -> dict[str, Any]:
    """Sizes, diversity, and the agreement with the rows' own labels where they have any.

    `effective_domains` is exp of the entropy of the sizes; `agreement_with_labels` is the
    adjusted mutual information over the rows that have a label.
    """
    sizes = np.bincount(domains.labels[domains.labels >= 0], minlength=domains.count)
    named = rows.domains
    labelled = [i for i, name in enumerate(named) if name is not None and domains.labels[i] >= 0]
    agreement = None
    if labelled:
        agreement = float(adjusted_mutual_info_score([named[i] for i in labelled], domains.labels[labelled]))
    return {
        "domains": {name: int(size) for name, size in zip(domains.names, sizes, strict=True)},
        "dropped_domains": list(domains.dropped),
        "effective_domains": math.exp(float(entropy(sizes / sizes.sum()))),
        "agreement_with_labels": agreement,
        "diversity": asdict(set_diversity(vectors, domains.labels, domains.count)),
    }
