"""DaaR: diversity as a reward, on rows whose domain nobody labelled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from honeloom.data.overlap import question_digest, question_digests
from honeloom.errors import ConfigError, RowsError
from honeloom.ops.noise import keyed_uniform
from honeloom.selection.config import Embedding, HiddenEmbedding
from honeloom.selection.daar_config import EARLY, DaarConfig, RoundTuning
from honeloom.selection.domain_tables import domain_columns, domain_details, domain_table, finite_or_none
from honeloom.selection.domains import Domains, centroids_of, constrained_kmeans, discover, nearest
from honeloom.selection.probe import LEARN_ROWS, CrossFit, cross_fit, entropy
from honeloom.selection.seeds import JoinedRows, PickedRows, read_probe_rows, read_seeds, seed_labels
from honeloom.selection.synthesis import synthesise
from honeloom.selection.vectors import inverse_lengths
from honeloom.types.plans import Scores
from honeloom.types.ports import EmbedPort, SelectionData, Vectors
from honeloom.types.rows import Row

__all__ = ["daar", "domain_order", "drawn_keys"]

Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Path = Literal["seeds", "synthesis", "clusters"]
EMBEDDING, TUNING = HiddenEmbedding(depth=EARLY), RoundTuning()
FOCUS_SHARE, OTHER_SHARE = 0.5, 0.1
"""Of the rows of the domain in focus, and of any other domain's: the paper's customised variant."""


@dataclass(frozen=True, slots=True)
class _Found:
    """Domains of the rows, how they were found, and the vectors by which.

    `taught` are rows beside the pool's that a probe learns from, and `taught_labels` their domains.
    """

    path: Path
    domains: Domains
    vectors: Vectors
    seeds: list[Row]
    taught: list[Row]
    taught_labels: Labels
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Reading:
    """Where the probe read, what it said, and what every round or depth before it said."""

    depth: float
    fit: CrossFit
    sweep: list[dict[str, Any]]
    rounds: list[dict[str, Any]]


def daar(
    data: SelectionData, *, seeds: str | None = None, domains: Mapping[str, str] | None = None,
    generator: str | None = None, samples: int = 10, similarity: float = 0.85, clusters: int | None = None,
    embedding: Embedding = EMBEDDING, depth: float = EARLY, sweep: Sequence[float] = (), folds: int = 2,
    probe_rows: str | None = None, reward: Literal["entropy", "predicted"] = "entropy",
    choice: Literal["draw", "top"] = "draw", factor: float = 0.5, focus: str | None = None,
    rounds: int = 1, tuning: RoundTuning = TUNING,
) -> Scores:  # fmt: skip
    """Value every row by how unsure a probe on the model's early states is of the row's domain.

    Rows get a pseudo-domain, by constrained k-means from the centroids of seed rows, which are
    read from a file or written by a model, or by clusters whose number parts of the rows agree
    on. A probe learns the pseudo-domains from the mean hidden state at `depth`; the value is the
    entropy of what it says of a row that it did not learn from, in nats. Rows are drawn from every
    pseudo-domain, those of high entropy more likely; or the highest are taken. With more rounds, the
    model is tuned on what the last one chose and probed again.

    Parameters
    ----------
    data : SelectionData
        With `embed`; for `domains` with `open_generator`, for `rounds` with `tuned` and `wanted`.
    seeds, domains, generator, samples, similarity, clusters, embedding, depth, sweep, folds
        As in `DaarConfig`, and so are `probe_rows`, `reward`, `choice`, `factor`, `focus`, `rounds`
        and `tuning`.

    Returns
    -------
    Scores
        `value` in [0, ln K], -inf for rows without a vector; columns of pseudo-domain, entropy,
        confidence and diversity; the table of pseudo-domains, whose value is the mean entropy;
        and, save with `choice: top`, an order in which rows of every domain are drawn.

    Raises
    ------
    RowsError
        There is one domain only, for then every entropy is 0; or too few rows; or no domain is
        called `focus`.
    ConfigError
        More rounds are wanted of a choice whose size in rows is not known beforehand.

    References
    ----------
    Ling et al. 2025 (DaaR), arXiv:2502.04380. Temperature, folds, the widths of the probe and
    further rounds are ours.
    """
    config = DaarConfig(
        seeds=seeds, clusters=clusters, embedding=embedding, depth=depth, folds=folds, reward=reward, focus=focus,
        domains=dict(domains or {}), generator=generator, samples=samples, similarity=similarity, sweep=tuple(sweep),
        probe_rows=probe_rows, rounds=rounds, tuning=tuning, choice=choice, factor=factor,
    )  # fmt: skip
    if rounds > 1 and data.wanted is None:
        raise ConfigError("method.rounds: the model is tuned on a number of rows; give --keep in rows or as a share")
    found = _domains(data, config)
    if found.domains.count < 2:
        raise RowsError(
            f"daar: the {len(data.rows)} rows make {found.domains.count} domain, and the entropy of one domain is 0 "
            "for every row; give seeds of several domains (method.seeds), or a number of them (method.clusters)"
        )
    if focus is not None and focus not in found.domains.names:
        raise RowsError(f"daar: no domain is called {focus!r} (domains: {', '.join(found.domains.names)})")
    read = _read(data, config, found)
    data.say(
        f"daar: {found.domains.count} domains by {found.path}; the probe names the domain of {read.fit.accuracy:.1%} "
        f"of rows it did not learn from, with a calibration error of {read.fit.calibration_error:.3f}"
    )
    return _scores(data, config, found, read)


def _domains(data: SelectionData, config: DaarConfig) -> _Found:
    """Pseudo-domains of the rows; other rows are embedded with them, for vectors are standardised together."""
    given, path, told = _seeds(data, config)
    taught = _taught(data, config)
    both = data.embed(JoinedRows([*given, *taught], data.rows), config.embedding)
    held, learnt, vectors = both[: len(given)], both[len(given) : len(given) + len(taught)], both[len(given) :]
    vectors = vectors[len(taught) :]
    base, ids = (learnt, [row.id for row in taught]) if taught else (vectors, data.rows.ids)
    if not (inverse_lengths(vectors) > 0).any() or not (inverse_lengths(base) > 0).any():
        raise RowsError(f"daar: none of the {len(base)} rows has a vector; use another embedding")
    if given:
        names, labels = seed_labels(given)
        start = centroids_of(np.asarray(held), labels, len(names))
        domains = constrained_kmeans(base, start, names, seeds=np.asarray(held), seed_labels=labels)
        if warning := domains.warning():
            data.warn(f"daar: {warning}")
        told["seeds"] = {name: int((labels == k).sum()) for k, name in enumerate(names)}
    else:
        domains, stability = discover(base, config.clusters, ids=ids, seed=data.seed)
        told["stability"] = stability and asdict(stability)
    taught_labels = domains.labels if taught else np.zeros(0, dtype=np.int64)
    if taught:
        domains = replace(domains, labels=nearest(vectors, domains.centroids))
        absent = [name for k, name in enumerate(domains.names) if not (domains.labels == k).any()]
        if absent:
            data.warn(
                f"daar: no row to choose from is of {len(absent)} domains of the probe rows ({', '.join(absent)})"
            )
    return _Found(path, domains, vectors, given, taught, taught_labels, told)


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


def _taught(data: SelectionData, config: DaarConfig) -> list[Row]:
    """Rows of the user's for the probe to learn from, less those that are also to be chosen from."""
    if config.probe_rows is None:
        return []
    rows, ids, asked = read_probe_rows(config.probe_rows), set(data.rows.ids), question_digests(data.rows)
    left = [row for row in rows if row.id not in ids and question_digest(row) not in asked]
    if len(left) < len(rows):
        data.warn(f"daar: {len(rows) - len(left)} of {len(rows)} probe rows are also to be chosen from; left out")
    if len(left) < 2 * config.folds:
        raise RowsError(f"{config.probe_rows}: {len(left)} rows for the probe to learn from; give more, or none at all")
    return left


def _read(data: SelectionData, config: DaarConfig, found: _Found) -> _Reading:
    """Probe at the depth that is set or found best, and again after every tuning on what was chosen."""
    depth, sweep = _best_depth(data, config, found)
    embed, fit, told, before = data.embed, None, list[dict[str, Any]](), set[int]()
    for number in range(1, config.rounds + 1):
        if fit is not None:
            before = set(_order(data, config, found, fit)[: data.wanted])
            data.say(f"daar: round {number}: the model is tuned on {len(before)} rows")
            embed = data.embed  # the last model need not stay while the next one is loaded
            embed = data.tuned([row for i, row in enumerate(data.rows) if i in before], config.tuning)
        fit = _probe(data, config, found, embed, depth)
        now = set(_order(data, config, found, fit)[: data.wanted]) if config.rounds > 1 else set()
        kept = len(before & now) / len(before) if before else None
        told.append(
            {"round": number, "accuracy": fit.accuracy, "calibration_error": fit.calibration_error, "kept": kept}
        )
    assert fit is not None  # there is a first round
    return _Reading(depth, fit, sweep, told)


def _best_depth(data: SelectionData, config: DaarConfig, found: _Found) -> tuple[float, list[dict[str, Any]]]:
    """The depth whose probe has the least loss on rows it did not learn from, and what every depth gave."""
    if not config.sweep:
        return config.depth, []
    places = range(len(data.rows))
    if len(places) > LEARN_ROWS:
        draws = keyed_uniform(data.seed, "daar/sweep", data.rows.ids)
        places = np.sort(np.argsort(draws, kind="stable")[:LEARN_ROWS]).tolist()
    told: list[dict[str, Any]] = []
    for depth in config.sweep:
        fit = _probe(data, config, found, data.embed, depth, places)
        told.append(
            {"depth": depth, "accuracy": fit.accuracy, "loss": fit.loss, "calibration_error": fit.calibration_error}
        )
    best = min(told, key=lambda one: (one["loss"], one["depth"]))
    data.say(f"daar: of depths {', '.join(f'{d:g}' for d in config.sweep)} the probe is best at {best['depth']:g}")
    return best["depth"], [{**one, "chosen": one is best} for one in told]


def _probe(
    data: SelectionData, config: DaarConfig, found: _Found, embed: EmbedPort, depth: float,
    places: Sequence[int] | None = None,
) -> CrossFit:  # fmt: skip
    """What the probe says of the pool's rows, or of those at some places."""
    rows = data.rows if places is None or len(places) == len(data.rows) else PickedRows(data.rows, places)
    # With the seeds, where they are: at the depth of the domains the vectors are there already.
    table = JoinedRows([*found.seeds, *found.taught], rows)
    features = embed(table, HiddenEmbedding(depth=depth))[len(found.seeds) :]
    own = found.domains.labels if rows is data.rows else found.domains.labels[np.asarray(places)]
    labels = np.concatenate([found.taught_labels, own])
    known = np.where(inverse_lengths(features) > 0, labels, -1)
    skip = len(found.taught)
    learnt, judged = int((known[:skip] >= 0).sum()), int((known[skip:] >= 0).sum())
    if learnt + judged < 2 * config.folds or (found.taught and not (learnt >= 2 * config.folds and judged)):
        raise RowsError(
            f"daar: {judged} rows to choose from and {learnt} probe rows have a vector, too few for a probe "
            f"({2 * config.folds} to learn from and one to score); give more rows, or a longer --max-length"
        )
    teach = np.arange(len(known)) < len(found.taught) if found.taught else None
    fit = cross_fit(
        features, known, found.domains.count, ids=[*(row.id for row in found.taught), *rows.ids], seed=data.seed,
        folds=config.folds, regress=config.reward == "predicted", teach=teach,
    )  # fmt: skip
    predicted = None if fit.predicted is None else fit.predicted[skip:]
    return replace(fit, probabilities=fit.probabilities[skip:], entropies=fit.entropies[skip:], predicted=predicted)


def _value(fit: CrossFit) -> Values:
    measured = fit.entropies if fit.predicted is None else fit.predicted
    return np.where(np.isfinite(measured), measured, -math.inf)


def _order(data: SelectionData, config: DaarConfig, found: _Found, fit: CrossFit) -> list[int]:
    """Rows as they are taken."""
    value, ids, domains = _value(fit), data.rows.ids, found.domains
    if config.choice == "top" and config.focus is None:
        return sorted(range(len(ids)), key=lambda i: (-value[i], ids[i]))
    key = value if config.choice == "top" else drawn_keys(value, domains.labels, ids, config.factor, data.seed)
    focus = None if config.focus is None else domains.names.index(config.focus)
    return domain_order(key, domains.labels, ids, focus=focus)


def drawn_keys(values: Values, labels: Labels, ids: Sequence[str], factor: float, seed: int) -> Values:
    """Keys (N,) by whose descending order rows of a domain are drawn without replacement; -inf stays.

    A row's weight is exp(factor * t), where t goes from -1 to 1 with its rank among the values of
    its domain: with factor 0 all are alike, with 0.5 the last weighs 2.7 times the first.

    References
    ----------
    Efraimidis and Spirakis 2006, doi:10.1016/j.ipl.2005.11.003; the logarithm of their keys.
    """
    place = np.zeros(len(ids))
    for k in np.unique(labels[labels >= 0]):
        mine = np.flatnonzero((labels == k) & np.isfinite(values))
        place[mine] = 2.0 * (rankdata(values[mine]) - 0.5) / max(1, len(mine)) - 1.0
    uniform = np.clip(keyed_uniform(seed, "daar/draw", ids), 1e-15, 1 - 1e-15)
    keys = factor * place - np.log(-np.log(uniform))
    return np.where(np.isfinite(values), keys, -math.inf)


def domain_order(keys: Values, labels: Labels, ids: Sequence[str], *, focus: int | None = None) -> list[int]:
    """All rows, by descending key within their domain, and of every domain the same share; or of one more.

    The place of a row among its domain's, as a share of them, says when it is taken. With a
    `focus` it is divided by 0.5 for that domain and 0.1 for the others: once the top half of the
    one is taken, so is the top tenth of every other, and before and after the proportion is the
    same. Rows of no domain come last.
    """
    order = sorted(range(len(ids)), key=lambda i: (-keys[i], ids[i]))
    sizes = np.bincount(labels[labels >= 0], minlength=1)
    place = np.zeros(len(sizes), dtype=np.int64)
    turn = np.full(len(ids), math.inf)
    for i in order:
        if (k := labels[i]) >= 0 and keys[i] > -math.inf:
            share = 1.0 if focus is None else FOCUS_SHARE if k == focus else OTHER_SHARE
            turn[i] = (place[k] + 0.5) / (sizes[k] * share)
            place[k] += 1
    return sorted(range(len(ids)), key=lambda i: (turn[i], -keys[i], ids[i]))


def _scores(data: SelectionData, config: DaarConfig, found: _Found, read: _Reading) -> Scores:
    ids, domains, fit = data.rows.ids, found.domains, read.fit
    value = _value(fit)
    columns = domain_columns(data.rows, found.vectors, domains, seed=data.seed)
    known = np.isfinite(fit.entropies)
    likeliest = np.argmax(np.nan_to_num(fit.probabilities), axis=1)
    own = {
        "entropy": finite_or_none(fit.entropies),
        "p_max": finite_or_none(fit.probabilities.max(axis=1)),
        "probe_domain": [domains.names[k] if there else None for k, there in zip(likeliest, known, strict=True)],
    }
    mean = np.nanmean(fit.probabilities, axis=0)
    order = None if config.choice == "top" and config.focus is None else _order(data, config, found, fit)
    return Scores(
        tuple(value.tolist()), True, "daar", columns={**columns, **own}, order=order,
        clusters=domain_table(ids, domains, fit.entropies, columns["phi_intra"]),
        details={
            "path": found.path,
            **domain_details(data.rows, found.vectors, domains),
            "effective_domains_of_probe": math.exp(float(entropy(mean / mean.sum()))),
            "probe": _probe_details(config, found, read),
            "sweep": read.sweep,
            "rounds": read.rounds,
            "reward": config.reward,
            "choice": config.choice,
            **found.details,
        },
    )  # fmt: skip


def _probe_details(config: DaarConfig, found: _Found, read: _Reading) -> dict[str, Any]:
    fit = read.fit
    return {
        "depth": read.depth,
        "folds": None if found.taught else config.folds,
        "probe_rows": len(found.taught),
        "accuracy": fit.accuracy,
        "loss": fit.loss,
        "calibration_error": fit.calibration_error,
        "temperature": list(fit.temperature),
        "epochs": list(fit.epochs),
        "most_entropy": math.log(found.domains.count),
    }
