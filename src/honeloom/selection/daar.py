"""DaaR: diversity as a reward, on rows whose domain nobody labelled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from honeloom.errors import RowsError
from honeloom.selection.config import Embedding, HiddenEmbedding
from honeloom.selection.daar_config import EARLY, DaarConfig
from honeloom.selection.domain_tables import domain_columns, domain_details, domain_table, finite_or_none
from honeloom.selection.domains import Domains, centroids_of, constrained_kmeans, discover
from honeloom.selection.probe import CrossFit, cross_fit, entropy
from honeloom.selection.seeds import JoinedRows, read_seeds, seed_labels
from honeloom.selection.synthesis import synthesise
from honeloom.selection.vectors import inverse_lengths
from honeloom.types.plans import Scores
from honeloom.types.ports import SelectionData, Vectors
from honeloom.types.rows import Row

__all__ = ["daar", "focused_order"]

Values = npt.NDArray[np.float64]
Path = Literal["seeds", "synthesis", "clusters"]
EMBEDDING = HiddenEmbedding(depth=EARLY)
FOCUS_SHARE, OTHER_SHARE = 0.5, 0.1
"""Of the rows of the domain in focus, and of any other domain's: the paper's customised variant."""


@dataclass(frozen=True, slots=True)
class _Found:
    """Domains of the rows, how they were found, and the vectors by which."""

    path: Path
    domains: Domains
    vectors: Vectors
    features: Vectors
    details: dict[str, Any] = field(default_factory=dict)


def daar(
    data: SelectionData, *, seeds: str | None = None, domains: Mapping[str, str] | None = None,
    generator: str | None = None, samples: int = 10, similarity: float = 0.85, clusters: int | None = None,
    embedding: Embedding = EMBEDDING, depth: float = EARLY, folds: int = 2,
    reward: Literal["entropy", "predicted"] = "entropy", focus: str | None = None,
) -> Scores:  # fmt: skip
    """Value every row by how unsure a probe on the model's early states is of the row's domain.

    Rows get a pseudo-domain, by constrained k-means from the centroids of seed rows, which are
    read from a file or written by a model, or by clusters whose number parts of the rows agree
    on. A probe learns the pseudo-domains
    from the mean hidden state at `depth`; the value is the entropy of what it says of a row
    that it did not learn from, in nats.

    Parameters
    ----------
    data : SelectionData
        With `embed`, and for `domains` with `open_generator`.
    seeds, domains, generator, samples, similarity, clusters, embedding, depth, folds, reward, focus
        As in `DaarConfig`.

    Returns
    -------
    Scores
        `value` in [0, ln K], -inf for rows without a vector; columns of pseudo-domain, entropy,
        confidence and diversity; the table of pseudo-domains, whose value is the mean entropy;
        with `focus` an order in which the shares of the domains stay as 5 to 1.

    Raises
    ------
    RowsError
        There is one domain only, for then every entropy is 0; or too few rows; or no domain is
        called `focus`.

    References
    ----------
    Ling et al. 2025 (DaaR), arXiv:2502.04380. Temperature, folds and the widths of the probe
    are ours.
    """
    config = DaarConfig(
        seeds=seeds, clusters=clusters, embedding=embedding, depth=depth, folds=folds, reward=reward, focus=focus,
        domains=dict(domains or {}), generator=generator, samples=samples, similarity=similarity,
    )  # fmt: skip
    found = _domains(data, config)
    if found.domains.count < 2:
        raise RowsError(
            f"daar: the {len(data.rows)} rows make {found.domains.count} domain, and the entropy of one domain is 0 "
            "for every row; give seeds of several domains (method.seeds), or a number of them (method.clusters)"
        )
    if focus is not None and focus not in found.domains.names:
        raise RowsError(f"daar: no domain is called {focus!r} (domains: {', '.join(found.domains.names)})")
    known = np.where(inverse_lengths(found.features) > 0, found.domains.labels, -1)
    if (known >= 0).sum() < 2 * folds:
        raise RowsError(f"daar: {(known >= 0).sum()} rows have a vector, and {folds} folds need {2 * folds} at least")
    fit = cross_fit(
        found.features, known, found.domains.count, ids=data.rows.ids, seed=data.seed, folds=folds,
        regress=reward == "predicted",
    )  # fmt: skip
    data.say(
        f"daar: {found.domains.count} domains by {found.path}; the probe names the domain of {fit.accuracy:.1%} of "
        f"rows it did not learn from, with a calibration error of {fit.calibration_error:.3f}"
    )
    return _scores(data, config, found, fit)


def _domains(data: SelectionData, config: DaarConfig) -> _Found:
    """Pseudo-domains of the rows; seeds are embedded with them, for vectors are standardised together."""
    given, path, told_of = _seeds(data, config)
    table = JoinedRows(given, data.rows)
    both = data.embed(table, config.embedding)
    probed = HiddenEmbedding(depth=config.depth)
    features = both if probed == config.embedding else data.embed(table, probed)
    vectors, features = both[len(given) :], features[len(given) :]
    if not (inverse_lengths(vectors) > 0).any():
        raise RowsError(f"daar: none of the {len(data.rows)} rows has a vector; use another embedding")
    if given:
        names, labels = seed_labels(given)
        held = np.asarray(both[: len(given)])
        start = centroids_of(held, labels, len(names))
        domains = constrained_kmeans(vectors, start, names, seeds=held, seed_labels=labels)
        if told := domains.warning():
            data.warn(f"daar: {told}")
        counts = {name: int((labels == k).sum()) for k, name in enumerate(names)}
        return _Found(path, domains, vectors, features, {**told_of, "seeds": counts})
    domains, stability = discover(vectors, config.clusters, ids=data.rows.ids, seed=data.seed)
    return _Found(path, domains, vectors, features, {**told_of, "stability": stability and asdict(stability)})


def _seeds(data: SelectionData, config: DaarConfig) -> tuple[list[Row], Path, dict[str, Any]]:
    """Seed rows, where they are from, and what a report should say of that."""
    if config.seeds is not None:
        return read_seeds(config.seeds), "seeds", {}
    if not config.domains:
        return [], "clusters", {}
    made = synthesise(data, config.domains, samples=config.samples, similarity=config.similarity)
    told = {"synthesis": {"failed": made.failed, "domains": made.counts}}
    if made.failed is None:
        return sorted(made.rows, key=lambda row: row.id), "synthesis", told
    data.warn(
        f"daar: {made.failed}; domains are found by clustering instead: give a stronger writer (method.generator), or "
        "seed rows (method.seeds)"
    )
    return [], "clusters", told


def focused_order(values: Values, labels: npt.NDArray[np.int64], focus: int, ids: Sequence[str]) -> list[int]:
    """All rows, those of one domain five times as freely as those of any other.

    The place of a row among its domain's, as a share of them, is divided by 0.5 for the domain
    in focus and 0.1 for the others, and rows are taken by that: once the top half of the one is
    taken, so is the top tenth of every other, and before and after the proportion is the same.
    Rows of no domain come last.
    """
    order = sorted(range(len(ids)), key=lambda i: (-values[i], ids[i]))
    sizes = np.bincount(labels[labels >= 0], minlength=focus + 1)
    place = np.zeros(len(sizes), dtype=np.int64)
    turn = np.full(len(ids), math.inf)
    for i in order:
        if (k := labels[i]) >= 0 and values[i] > -math.inf:
            turn[i] = (place[k] + 0.5) / (sizes[k] * (FOCUS_SHARE if k == focus else OTHER_SHARE))
            place[k] += 1
    return sorted(range(len(ids)), key=lambda i: (turn[i], -values[i], ids[i]))


def _scores(data: SelectionData, config: DaarConfig, found: _Found, fit: CrossFit) -> Scores:
    ids, domains = data.rows.ids, found.domains
    measured = fit.entropies if fit.predicted is None else fit.predicted
    value = np.where(np.isfinite(measured), measured, -math.inf)
    columns = domain_columns(data.rows, found.vectors, domains, seed=data.seed)
    order = None
    if config.focus is not None:
        order = focused_order(value, domains.labels, domains.names.index(config.focus), ids)
    own = {"entropy": finite_or_none(fit.entropies), "p_max": finite_or_none(fit.probabilities.max(axis=1))}
    mean = np.nanmean(fit.probabilities, axis=0)
    return Scores(
        tuple(value.tolist()), True, "daar", columns={**columns, **own}, order=order,
        clusters=domain_table(ids, domains, fit.entropies, columns["phi_intra"]),
        details={
            "path": found.path,
            **domain_details(data.rows, found.vectors, domains),
            "effective_domains_of_probe": math.exp(float(entropy(mean / mean.sum()))),
            "probe": _probe_details(config, domains, fit),
            "reward": config.reward,
            **found.details,
        },
    )  # fmt: skip


def _probe_details(config: DaarConfig, domains: Domains, fit: CrossFit) -> dict[str, Any]:
    return {
        "depth": config.depth,
        "folds": config.folds,
        "accuracy": fit.accuracy,
        "calibration_error": fit.calibration_error,
        "temperature": list(fit.temperature),
        "epochs": list(fit.epochs),
        "most_entropy": math.log(domains.count),
    }
