"""Which models of a zoo may be merged: opened, sorted by what must agree, compared weight by weight, clustered."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from honeloom.backends.hf.load import load_config
from honeloom.checkpoint.headers import TensorInfo
from honeloom.checkpoint.vocabulary import Vocabulary
from honeloom.errors import ConfigError, HoneloomError, IncompatibleModelsError, NotFiniteError, SourceError
from honeloom.merging.clusters import ClusterMethod, Clusters, find_clusters, nearest_group
from honeloom.merging.compatibility import check_compatible, compare_tokenizers
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.engine.streaming import COMPUTED
from honeloom.merging.engine.tensors import blocks
from honeloom.merging.similarity import BRANCHES, Similarity, branch_matrices, measure_similarity
from honeloom.runs.atomic import open_atomic, write_json
from honeloom.runs.log import Log

__all__ = ["CLUSTERS_FILE", "SIMILARITY_FILE", "Bucket", "ZooClusters", "cluster_zoo", "open_zoo"]

CLUSTERS_FILE, SIMILARITY_FILE = "clusters.json", "similarity.npz"
KEYS = {"weights": "all", "deltas": "delta_all"}
"""Measure -> the matrix of `Similarity` that models are clustered by."""
_COMPARED = 1 << 16
_EMPTY = "the zoo holds no model; give at least one"
_EPOCH = (1980, 1, 1, 0, 0, 0)

Measure = Literal["weights", "deltas"]
Refusals = tuple[tuple[str, str], ...]
"""(model, reason) each."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Models that can be merged as far as their configurations and tokenizers tell.

    Attributes
    ----------
    similarity : Similarity
        Of its models, by name.
    clusters : Clusters
        Of them.
    """

    similarity: Similarity
    clusters: Clusters


@dataclass(frozen=True, slots=True)
class ZooClusters:
    """A zoo in clusters.

    Attributes
    ----------
    clusters : tuple of tuple of str
        Every usable model in one; the largest first, of equal ones the first by name; members by name.
    threshold, method, measure
        As they were asked for.
    buckets : tuple of Bucket
        What the clusters are parts of, the largest first.
    refused : tuple of (str, str)
        Models that cannot be used, each with the reason.
    alone : dict
        Model that no other fits -> the reason.
    """

    clusters: tuple[tuple[str, ...], ...]
    threshold: float
    method: ClusterMethod
    measure: Measure
    buckets: tuple[Bucket, ...]
    refused: Refusals = ()
    alone: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Content of clusters.json."""
        return {
            "clusters": [list(cluster) for cluster in self.clusters],
            "threshold": self.threshold,
            "method": self.method,
            "measure": self.measure,
            "refused": [{"model": model, "reason": reason} for model, reason in self.refused],
            "alone": [{"model": model, "reason": reason} for model, reason in self.alone.items()],
            "buckets": [
                {
                    "models": list(bucket.similarity.names),
                    "order": list(bucket.clusters.order),
                    "linkage": None if (rows := bucket.clusters.linkage) is None else [list(row) for row in rows],
                }
                for bucket in self.buckets
            ],
        }

    def similarity(self) -> Similarity:
        """Of the whole zoo, by name, with NaN between models of different buckets."""
        names = sorted(name for bucket in self.buckets for name in bucket.similarity.names)
        keys = list(dict.fromkeys(key for bucket in self.buckets for key in bucket.similarity.matrices))
        place = {name: i for i, name in enumerate(names)}
        matrices = {}
        for key in keys:
            matrix = np.full((len(names), len(names)), np.nan)
            np.fill_diagonal(matrix, 1.0)
            for bucket in self.buckets:
                if key in bucket.similarity.matrices:
                    at = [place[name] for name in bucket.similarity.names]
                    matrix[np.ix_(at, at)] = bucket.similarity.matrices[key]
            matrices[key] = matrix
        return Similarity(tuple(names), matrices)

    def write(self, folder: Path) -> None:
        """Write clusters.json and similarity.npz: `names`, and the matrices of `Similarity` over the whole zoo.

        Equal results give equal bytes. numpy.load reads the archive without pickles.
        """
        write_json(folder / CLUSTERS_FILE, self.to_json())
        whole = self.similarity()
        arrays = {"names": np.array(whole.names, dtype=np.str_), **whole.matrices}
        with open_atomic(folder / SIMILARITY_FILE) as file, zipfile.ZipFile(file, "w") as archive:
            for key, array in arrays.items():
                entry = zipfile.ZipInfo(f"{key}.npy", _EPOCH)
                entry.create_system, entry.external_attr = 3, 0o644 << 16  # as on any system
                with archive.open(entry, "w") as member:
                    np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)


@dataclass(frozen=True, slots=True)
class _Member:
    """An opened model with what its files say of it.

    Attributes
    ----------
    name : str
        In the zoo.
    source : ModelSource
        Its weights.
    config : mapping
        Its configuration with transformers' defaults.
    digest : str or None
        Of its vocabulary; None without a tokenizer.
    """

    name: str
    source: ModelSource
    config: Mapping[str, Any]
    digest: str | None

    @classmethod
    def read(cls, name: str, source: ModelSource) -> _Member:
        vocabulary = Vocabulary.read(source.tokenizer_folder)
        config = load_config(source.folder).to_dict()
        return cls(name, source, config, vocabulary.digest if vocabulary else None)


_Paired = tuple[list[_Member], ModelSource | None]
"""Models of a bucket, and the base where it fits them."""


def open_zoo(
    folders: Mapping[str, tuple[Path, Path | None]], stack: ExitStack, *, allow_nan: bool = False
) -> tuple[dict[str, ModelSource], Refusals]:
    """Open the models of a zoo; one that cannot be opened is refused, and the others go on.

    Parameters
    ----------
    folders : mapping
        Model's name -> its folder, and of an adapter its base's.
    stack : ExitStack
        Closes them.
    allow_nan : bool
        As for `ModelSource`.

    Returns
    -------
    (dict, tuple)
        The opened models, and (model, reason) of the others.
    """
    opened, refused = {}, []
    for name, (folder, base) in folders.items():
        try:
            with ExitStack() as own:
                source = own.enter_context(ModelSource(name, folder, base, allow_nan=allow_nan))
                load_config(source.folder)
                stack.push(own.pop_all())
        except (HoneloomError, OSError) as error:
            refused.append((name, str(error)))
        else:
            opened[name] = source
    return opened, tuple(refused)


def cluster_zoo(
    sources: Mapping[str, ModelSource],
    base: ModelSource | None,
    *,
    method: ClusterMethod,
    threshold: float,
    measure: Measure,
    threads: int,
    log: Log,
    refused: Refusals = (),
) -> ZooClusters:
    """Sort models by what must agree, compare those that do weight by weight, and cluster them.

    Configurations, tensors and tokens decide first: models in which one id is two tokens cannot be merged row by row;
    chat templates may differ. A model that is there twice counts once. The order of the models changes nothing.

    Parameters
    ----------
    sources : mapping
        Model's name -> the opened model.
    base : ModelSource or None
        Common ancestor, for similarities of task vectors; its vocabulary may be another.
    method, threshold
        See `honeloom.merging.clusters`.
    measure : {"weights", "deltas"}
        Similarity of the weights or of the task vectors.
    threads : int
        Matrices compared at a time.
    log : Log
        Says what is left out, and shows progress.
    refused : tuple of (str, str)
        What `open_zoo` has refused before, for the record.

    Raises
    ------
    ConfigError
        "deltas" without a base, or the threshold is out of range.
    IncompatibleModelsError
        "deltas", and the base fits no two models of the zoo that fit each other.
    SourceError
        No model can be used.
    """
    if measure == "deltas" and base is None:
        raise ConfigError("clusters of deltas need a base: a task vector is a model minus its base; give base")
    members, unreadable = _read_members(sources)
    leaving = [*refused, *unreadable]
    buckets = []
    for bucket in _buckets(members):
        kept, twice = _distinct(bucket)
        for name, reason in twice:
            log.say(f"clusters: {name} is left out: {reason}")
        leaving += twice
        buckets.append(kept)
    paired, alone = _with_base(buckets, base, measure, log)
    measured, damaged = _compare(paired, measure, log, threads)
    leaving += damaged
    if not measured:
        raise SourceError(f"no model of the zoo can be used; {leaving[0][0]}: {leaving[0][1]}" if leaving else _EMPTY)
    found = [Bucket(s, find_clusters(s.names, s.matrices[KEYS[measure]], threshold, method)) for s in measured]
    found.sort(key=lambda bucket: (-len(bucket.similarity.names), bucket.similarity.names))
    clusters = sorted((g for b in found for g in b.clusters.groups), key=lambda group: (-len(group), group))
    reasons = {g[0]: alone.get(g[0]) or _why_alone(g[0], found, members, measure) for g in clusters if len(g) == 1}
    return ZooClusters(tuple(clusters), threshold, method, measure, tuple(found), tuple(leaving), reasons)


def _read_members(sources: Mapping[str, ModelSource]) -> tuple[list[_Member], list[tuple[str, str]]]:
    """By name, with configurations and tokenizers read once; those whose files are damaged are refused."""
    members, refused = [], []
    for name in sorted(sources):
        try:
            members.append(_Member.read(name, sources[name]))
        except (HoneloomError, OSError) as error:
            refused.append((name, str(error)))
    return members, refused


def _misfit(one: _Member, other: _Member, *, any_vocabulary: bool = False) -> str | None:
    """Why two models cannot be merged; None if they can."""
    pair = {one.name: one, other.name: other}
    tensors = {name: _comparable(m.source, o.source) for (name, m), o in zip(pair.items(), (other, one), strict=True)}
    by_token = one.source.by_token | other.source.by_token if any_vocabulary else ()
    try:
        check_compatible({name: m.config for name, m in pair.items()}, tensors, by_token=by_token)
        if not any_vocabulary and one.digest != other.digest:
            folders = {name: m.source.tokenizer_folder for name, m in pair.items()}
            compare_tokenizers(folders, by_token=False, template_chosen=True)
    except HoneloomError as error:
        return str(error)
    return None


def _comparable(source: ModelSource, other: ModelSource) -> Mapping[str, TensorInfo]:
    """Tensors without a head of its own where the other's is tied: a merge gives that one its embeddings for it."""
    if source.tied or not other.tied:
        return source.tensors
    heads = source.by_token - other.by_token
    return {name: info for name, info in source.tensors.items() if name not in heads}


def _buckets(members: Sequence[_Member]) -> list[list[_Member]]:
    """Models that fit pairwise: each goes by name to the first bucket in which it fits all."""
    buckets: list[list[_Member]] = []
    for member in members:
        fitting = (b for b in buckets if all(_misfit(other, member) is None for other in b))
        bucket = next(fitting, None)
        if bucket is None:
            buckets.append([member])
        else:
            bucket.append(member)
    return buckets


def _distinct(bucket: Sequence[_Member]) -> tuple[list[_Member], list[tuple[str, str]]]:
    """The models of a bucket, of those with the same weights the first by name; and the others."""
    kept: list[_Member] = []
    twice = []
    for member in bucket:
        same = next((k.name for k in kept if _same_weights(k.source, member.source)), None)
        if same is None:
            kept.append(member)
        else:
            twice.append((member.name, f"it has the same weights as {same}"))
    return kept, twice


def _same_weights(one: ModelSource, other: ModelSource) -> bool:
    """The beginnings of all tensors are compared first, which tells almost any two models apart."""
    if one.tensors.keys() != other.tensors.keys():
        return False
    for whole in (False, True):
        for name, info in one.tensors.items():
            for start, stop in blocks(info.elements if whole else min(info.elements, _COMPARED), _COMPARED):
                if not _same_elements(one, other, name, start, stop):
                    return False
    return True


def _same_elements(one: ModelSource, other: ModelSource, name: str, start: int, stop: int) -> bool:
    kinds = {source.info(name).dtype for source in (one, other)}
    if len(kinds) == 1 and one.is_stored(name) and other.is_stored(name):
        return bool((one.stored_bytes(name, start, stop) == other.stored_bytes(name, start, stop)).all())
    try:
        return kinds <= COMPUTED and torch.equal(one.read(name, start, stop), other.read(name, start, stop))
    except NotFiniteError:  # a damaged model is found out when it is measured
        return False


def _with_base(
    buckets: Sequence[list[_Member]], base: ModelSource | None, measure: Measure, log: Log
) -> tuple[list[_Paired], dict[str, str]]:
    """Every bucket with the base if that fits; without it no deltas can be compared, and every model stands alone."""
    if base is None:
        return [(bucket, None) for bucket in buckets], {}
    origin = _Member.read(base.name, base)
    paired: list[_Paired] = []
    alone: dict[str, str] = {}
    fitting = 0
    for bucket in buckets:
        why = _misfit(replace(origin, name=f"the base {origin.name}"), bucket[0], any_vocabulary=True)
        fitting += why is None
        if why is None or len(bucket) == 1:
            paired.append((bucket, base if why is None else None))
            continue
        names = ", ".join(m.name for m in bucket)
        if measure == "weights":
            log.say(f"clusters: {names}: compared by their weights alone, without task vectors; {why}")
            paired.append((bucket, None))
        else:
            log.warn(f"clusters: {names}: each stays alone, for their deltas cannot be compared; {why}")
            paired += [([member], None) for member in bucket]
            alone |= {m.name: f"its delta cannot be compared with others: {why}" for m in bucket}
    if alone and not fitting:
        raise IncompatibleModelsError(f"clusters of deltas need a base that fits: {next(iter(alone.values()))}")
    return paired, alone


def _compare(
    buckets: Sequence[_Paired], measure: Measure, log: Log, threads: int
) -> tuple[list[Similarity], list[tuple[str, str]]]:
    """Similarities within every bucket, and models that turn out to hold NaN."""
    found, refused = [], []
    total = sum(len(branch_matrices(bucket[0].source)) for bucket, _ in buckets if len(bucket) > 1)
    with log.console.progress("compare matrices", total) as advance:
        for bucket, base in buckets:
            try:
                found.append(_similarity(bucket, base, measure, threads, advance))
            except NotFiniteError:
                sound, damaged = _sort_out(bucket, threads)
                if not damaged:  # then it is the base
                    raise
                refused += damaged
                if sound:
                    found.append(_similarity(sound, base, measure, threads))
    return found, refused


def _similarity(
    bucket: Sequence[_Member],
    base: ModelSource | None,
    measure: Measure,
    threads: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Similarity:
    """Of the models of a bucket under their names in the zoo; a model alone is not read."""
    names = tuple(member.name for member in bucket)
    if len(bucket) == 1:
        return Similarity(names, {key: np.ones((1, 1)) for key in (*BRANCHES, "all", KEYS[measure])})
    return replace(measure_similarity([m.source for m in bucket], base, threads=threads, advance=advance), names=names)


def _sort_out(bucket: Sequence[_Member], threads: int) -> tuple[list[_Member], list[tuple[str, str]]]:
    """Models whose matrices are finite, and the others with what is wrong."""
    sound, damaged = [], []
    for member in bucket:
        try:
            measure_similarity([member.source], None, threads=threads)
            sound.append(member)
        except NotFiniteError as error:
            damaged.append((member.name, str(error)))
    return sound, damaged


def _why_alone(name: str, buckets: Sequence[Bucket], members: Sequence[_Member], measure: Measure) -> str:
    """Why a model fits no other."""
    own = next(b for b in buckets if name in b.similarity.names)
    names, matrices = own.similarity.names, own.similarity.matrices
    nearest = nearest_group(names, matrices[KEYS[measure]], own.clusters, name)
    if nearest is not None:
        group, value = nearest
        family, threshold = own.clusters.leaders[group], own.clusters.threshold
        return f"similarity to its nearest family, that of {family}, is {value:.4g}, at most the threshold {threshold}"
    known = {member.name: member for member in members}
    kind = known[name].config.get("model_type")
    leaders = [b.clusters.leaders[0] for b in buckets if b is not own]  # the largest bucket first
    leaders.sort(key=lambda leader: known[leader].config.get("model_type") != kind)
    why = next((why for leader in leaders if (why := _misfit(known[leader], known[name]))), None)
    return why or "it is the only model"
