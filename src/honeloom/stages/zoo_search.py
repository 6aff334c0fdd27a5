"""Search for the merge of one cluster of a zoo: candidates in memory, every measurement in a journal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from honeloom.backends.devices import release_memory
from honeloom.backends.hf.live_merge import LiveMerge, Metric, Pool
from honeloom.backends.hf.load import Loading, load_config
from honeloom.checkpoint.vocabulary import read_template
from honeloom.config.methods import MethodConfig
from honeloom.errors import HoneloomError, IncompatibleModelsError, RowsError
from honeloom.merging.compatibility import check_compatible
from honeloom.merging.config import LinearConfig
from honeloom.merging.engine.layout import base_use
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.search.candidates import Candidate, check_searchable
from honeloom.merging.search.config import SearchMethodConfig
from honeloom.merging.search.objective import Objective
from honeloom.merging.search.racing import Found, SearchData
from honeloom.registry import family
from honeloom.runs.atomic import canonical_json
from honeloom.runs.journal import Journal, read_journal
from honeloom.stages.glue_rows import GlueRows, Scored
from honeloom.stages.work import Work
from honeloom.stages.zoo_clusters import ZooClusters
from honeloom.types.ports import CandidatePort
from honeloom.types.rows import Row
from honeloom.zoo.config import GlueConfig

__all__ = ["JOURNAL", "JournaledPort", "Searched", "open_journal", "run_search", "search_cluster"]

JOURNAL = "search.jsonl"
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Searched:
    """The merge of a cluster.

    Attributes
    ----------
    models : tuple of str
        Names of the cluster, the best first.
    found : Found
        What the search found.
    document : dict
        The merge, for `honeloom merge`; of a single model, a copy.
    """

    models: tuple[str, ...]
    found: Found
    document: dict[str, Any]

    @property
    def single(self) -> str | None:
        """Name of the best single model, if no merge is better."""
        return self.found.single

    @property
    def taken(self) -> tuple[str, ...]:
        """Names of the models with a weight."""
        return tuple(name for name, share in self.shares().items() if share)

    def shares(self) -> dict[str, float]:
        """Model -> its share of all weights, the mean over groups of layers."""
        table = np.abs(self.found.candidate.array)
        totals = table.sum(axis=1, keepdims=True)
        shares = (table / np.where(totals > 0, totals, 1.0)).mean(axis=0)
        return dict(zip(self.models, shares.tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Numbers of the search, its steps included."""
        found = self.found
        return {
            "models": list(self.models),
            **found.candidate.to_json(),
            "shares": self.shares(),
            "single": found.single,
            "value": found.value.value,
            "stderr": found.value.stderr if np.isfinite(found.value.stderr) else None,
            "rows": found.value.n,
            "evaluations": found.evaluations,
            "rows_evaluated": found.rows_evaluated,
            "stopped": found.stopped,
            "trace": [step.to_json() for step in found.trace],
        }


class JournaledPort:
    """A port whose measurements are kept: what a journal holds already is not measured again.

    Parameters
    ----------
    port : CandidatePort
        Measures.
    fingerprint : str
        Of everything that its numbers depend on; records of another one are left alone.
    known : mapping
        Records of an interrupted attempt by key.
    keep : callable
        Told each new record.
    advance : callable
        Told the number of rows of each measurement.
    """

    def __init__(
        self,
        port: CandidatePort,
        fingerprint: str,
        known: Mapping[str, dict[str, Any]],
        keep: Callable[[dict[str, Any]], None],
        advance: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self.models, self.groups = port.models, port.groups
        self._port, self._fingerprint = port, fingerprint
        self._known, self._keep, self._advance = dict(known), keep, advance

    def single(self, model: int, rows: Sequence[int]) -> Values:
        """As the port's."""
        found = self._found("single", model, rows, (), lambda: {"values": self._port.single(model, rows)})
        return np.array(found["values"], dtype=np.float64).reshape(-1, 2)

    def measure(self, candidate: Candidate, rows: Sequence[int]) -> Values:
        """As the port's."""
        what = candidate.to_json()
        found = self._found("measure", what, rows, (), lambda: {"values": self._port.measure(candidate, rows)})
        return np.array(found["values"], dtype=np.float64).reshape(-1, 2)

    def gradient(self, candidate: Candidate, rows: Sequence[int], factors: Values) -> tuple[Values, Values]:
        """As the port's."""

        def measure() -> dict[str, Values]:
            values, gradient = self._port.gradient(candidate, rows, factors)
            return {"values": values, "gradient": gradient}

        found = self._found("gradient", candidate.to_json(), rows, factors.tolist(), measure)
        return np.array(found["values"]).reshape(-1, 2), np.array(found["gradient"], dtype=np.float64)

    def _found(
        self,
        kind: str,
        what: Any,
        rows: Sequence[int],
        factors: Sequence[float],
        measure: Callable[[], dict[str, Values]],
    ) -> dict[str, Any]:
        text = canonical_json([self._fingerprint, kind, what, list(rows), list(factors)])
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in self._known:
            arrays = {name: values.tolist() for name, values in measure().items()}
            record = {"key": key, "kind": kind, "what": what, "rows": len(rows), **arrays}
            self._keep(record)
            self._known[key] = record
        self._advance(len(rows))
        return self._known[key]


@contextmanager
def open_journal(path: Path) -> Iterator[tuple[dict[str, dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """Records by key that an interrupted attempt left, and a callable that adds one durably.

    Raises
    ------
    HoneloomError
        A record is none of a measurement.
    """
    known = {}
    for number, record in enumerate(read_journal(path), 1):
        if not {"key", "values"} <= record.keys():
            raise HoneloomError(f"{path}:{number}: not a record of a measurement; start over with --overwrite")
        known[record["key"]] = record
    with Journal(path) as journal:
        yield known, journal.append


def run_search(
    port: CandidatePort,
    objective: Objective,
    search: MethodConfig,
    method: MethodConfig,
    *,
    singles: Values | None = None,
    similarity: Values | None = None,
    seed: int = 0,
    budget: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Found:
    """Search the merge of a port's models.

    Parameters
    ----------
    port : CandidatePort
        N models on n rows.
    objective : Objective
        Of the n rows.
    search, method
        Of the search, and of the merges.
    singles : ndarray, optional
        (N, n, 2): what the models score alone; measured here, on all rows, if not given.
    similarity : ndarray, optional
        (N, N), for the search that needs it.
    seed, budget, say
        As in `SearchData`.
    """
    rows = range(len(objective.domains))
    if singles is None:
        singles = np.stack([port.single(model, rows) for model in range(len(port.models))])
    density = getattr(method, "density", None)
    data = SearchData(
        port, objective, singles,
        averages=bool(getattr(method, "normalize", False)),
        density=float(density) if isinstance(density, int | float) else None,
        similarity=similarity, seed=seed, budget=budget, say=say,
    )  # fmt: skip
    left_out = {"type", *getattr(search, "measured", ())}
    settings = {name: getattr(search, name) for name in type(search).model_fields if name not in left_out}
    found: Found = family("search").load(search.type)(data, **settings)
    return found


def search_cluster(
    work: Work[GlueConfig],
    name: str,
    sources: Mapping[str, ModelSource],
    base: ModelSource | None,
    rows: GlueRows,
    singles: Mapping[str, Scored],
    clusters: ZooClusters,
) -> Searched:
    """Search the merge of one cluster on the search rows.

    Parameters
    ----------
    work : Work
        Of `glue`.
    name : str
        Of the cluster, for messages.
    sources : mapping
        Its models by name, opened.
    base : ModelSource or None
        What they were tuned from.
    rows : GlueRows
        The search rows are used.
    singles : mapping
        What every model scores on these alone, with its own tokenizer and template.
    clusters : ZooClusters
        Knows the similarities.
    """
    config, search = work.config, work.config.search
    objective = Objective(rows.search.domains, config.target.weights)
    everything = np.arange(len(rows.search.rows))
    values = {model: np.nan_to_num(singles[model].values) for model in sources}
    order = sorted(sources, key=lambda model: (objective.estimate(values[model], everything).value, model))
    pool = _pool(work, name, order, sources, base)
    usable = _readable(list(rows.search.rows), [singles[model] for model in order])
    port = LiveMerge(
        pool, [row for _, row in usable], metric=cast(Metric, rows.metric), groups=_groups(search, pool.layers),
        names=order, loading=Loading.of(config), batch_size=config.batch_size, max_length=config.max_length,
        threads=config.threads,
    )  # fmt: skip
    kept = _kept(work, name, usable, port)
    chosen = Objective([rows.search.domains[i] for i in kept], _weights(rows, kept, config.target.weights))
    alone = np.stack([singles[model].values[kept] for model in order])
    work.log.say(f"glue: {name}: {search.type} search over {len(order)} models on {len(kept)} rows")
    progress = work.log.console.progress(f"search {name}: rows", None)
    with open_journal(work.dir / JOURNAL) as (known, keep), progress as advance:
        journaled = JournaledPort(port, _fingerprint(work, name, order, pool, rows, kept), known, keep, advance)
        found = run_search(
            journaled, chosen, search, pool.method, singles=alone, similarity=_similarity(clusters, order),
            seed=config.seed, budget=config.budget, say=work.log.say,
        )  # fmt: skip
    del port, journaled
    release_memory()
    work.log.event(
        "searched", cluster=name, evaluations=found.evaluations, rows=found.rows_evaluated, stopped=found.stopped
    )
    single = None if found.single is None else order.index(found.single)
    document = pool.document(found.candidate) if single is None else pool.document_of_single(single)
    return Searched(tuple(order), found, document)


def _pool(
    work: Work[GlueConfig],
    name: str,
    order: Sequence[str],
    sources: Mapping[str, ModelSource],
    base: ModelSource | None,
) -> Pool:
    """The models by what the user called them, with the base where the method looks at one."""
    config, method = work.config, work.config.method
    check_searchable(method)
    values = {model: work.inputs[place].value for model, place in config.named()}
    own = base if base is not None and base_use(method) in ("needed", "allowed", "start") else None
    fault = _fault(own, sources[order[0]]) if own is not None else ""
    if fault:
        instead = "" if base_use(method) != "needed" else "; its models are merged by linear, which needs no base"
        work.log.warn(f"{name}: the base does not fit: {fault}{instead}")
        method, own = (LinearConfig() if instead else method), None
    opened = {values[model]: sources[model] for model in order}
    settings: dict[str, Any] = {"seed": config.seed, "chat_template": "auto"}
    called = None
    if own is not None:
        called = work.inputs["base"].value
        opened.setdefault(called, own)
        givers = [values[m] for m in order if read_template(sources[m].tokenizer_folder) is not None]
        if givers and read_template(own.tokenizer_folder) is None:
            settings["chat_template"] = givers[0]  # a base is rarely tuned for conversations
    return Pool([values[model] for model in order], opened, called, method, settings)


def _fault(base: ModelSource, model: ModelSource) -> str:
    """Why a base is none of a model; empty if it may be."""
    pair = {"base": base, model.name: model}
    try:
        check_compatible(
            {n: load_config(s.folder).to_dict() for n, s in pair.items()}, {n: s.tensors for n, s in pair.items()}
        )
    except IncompatibleModelsError as error:
        return str(error)
    return ""


def _groups(search: MethodConfig, layers: int) -> int:
    return search.groups_of(layers) if isinstance(search, SearchMethodConfig) else 1


def _readable(rows: Sequence[Row], scored: Sequence[Scored]) -> list[tuple[int, Row]]:
    """Rows that every model could read, with their places."""
    finite = np.all([np.isfinite(s.values).all(axis=1) for s in scored], axis=0)
    usable = [(i, row) for i, row in enumerate(rows) if finite[i]]
    if not usable:
        raise RowsError("no search row could be read by every model of a cluster; give rows that their tokenizers read")
    return usable


def _kept(work: Work[GlueConfig], name: str, usable: Sequence[tuple[int, Row]], port: LiveMerge) -> list[int]:
    """Places of the rows that the port numbers 0, 1, ..."""
    if port.left_out:
        row, reason = port.left_out[0]
        work.log.warn(f"{name}: {len(port.left_out)} search rows are not used; first {row.where}: {reason}")
    scored = {id(row) for row in port.rows}
    return [place for place, row in usable if id(row) in scored]


def _weights(rows: GlueRows, kept: Sequence[int], weights: Mapping[str, float]) -> dict[str, float]:
    present = {rows.search.domains[i] for i in kept}
    return {domain: weight for domain, weight in weights.items() if domain in present}


def _similarity(clusters: ZooClusters, order: Sequence[str]) -> Values:
    """Of the MLP matrices, as the paper orders models, by the measure that made the clusters."""
    found = clusters.similarity()
    places = [found.names.index(model) for model in order]
    matrix: Values = found.matrices["delta_mlp" if clusters.measure == "deltas" else "mlp"][np.ix_(places, places)]
    return matrix


def _fingerprint(
    work: Work[GlueConfig], name: str, order: Sequence[str], pool: Pool, rows: GlueRows, kept: Sequence[int]
) -> str:
    """Everything that a measurement depends on."""
    config, places = work.config, dict(work.config.named())
    models = [work.inputs[places[model]].fingerprint for model in order]
    origin = work.inputs["base"].fingerprint if pool.base is not None else None
    parts = [
        name, models, origin, pool.method.model_dump(mode="json"), dict(pool.settings), rows.metric,
        [rows.search.rows.ids[i] for i in kept], config.batch_size, config.max_length, config.device, config.dtype,
    ]  # fmt: skip
    return hashlib.sha256(canonical_json(parts).encode("utf-8", "surrogatepass")).hexdigest()
