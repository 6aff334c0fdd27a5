"""How much work the verbs are that put models together or take them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from honeloom.checkpoint.export_config import ExportConfig
from honeloom.dropping.config import DropConfig
from honeloom.dropping.plan import rounds_of
from honeloom.federated.config import AggregateConfig
from honeloom.merging.extract_config import ExtractConfig
from honeloom.merging.merge_config import MergeConfig
from honeloom.mixture.config import MixConfig
from honeloom.planning.volume import Lengths, Part, backward, greedy_losses, score, train
from honeloom.stages.drop_cache import ScoreCache, score_key
from honeloom.stages.export_texts import TEXTS
from honeloom.stages.glue_plan import models_of_one_shape, tried
from honeloom.stages.runner import Job
from honeloom.stages.volumes.counting import ADAPTER_BYTES, Counted, count, rows_of
from honeloom.stages.volumes.reading import Made, PlanReader, Pool, Shape
from honeloom.zoo.config import GlueConfig

__all__ = [
    "count_aggregate", "count_bytes", "count_drop", "count_export", "count_extract", "count_glue", "count_merge",
    "count_mix",
]  # fmt: skip

POINTS = 16
"""Most points of a drop's curve."""


_WEIGHT_BYTES = {"f16": 2.0, "q8_0": 34 / 32}
"""Of a weight in a GGUF file: eight bits each, and a scale for every 32."""
_TEXT_BYTES = 3
"""Of a token of the texts that a file is tried on, which are of many scripts."""
_DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def _shapes(job: Job, reader: PlanReader) -> dict[str, Shape]:
    """Models and adapters among the inputs, by place."""
    return {p: reader.shape(i) for p, i in job.inputs.items() if i.kind in ("model", "adapter")}


def _weights(shapes: Mapping[str, Shape]) -> int:
    """Bytes that are read of some models; of an adapter those of its base too, which come once."""
    sizes = sum(s.size for s in shapes.values())
    bases = {id(s.settings): _model_bytes(s) for s in shapes.values() if s.kind == "adapter"}
    return sizes + sum(bases.values())


def _model_bytes(shape: Shape, dtype: str = "auto") -> int:
    """Of a whole model of this shape; as it lies on disk where no number type is asked for."""
    if shape.kind == "model" and dtype == "auto":
        return shape.size
    stored = str(shape.settings.get("dtype") or shape.settings.get("torch_dtype") or "float32")
    width = _DTYPE_BYTES.get(dtype) or (4 if stored == "float32" else 2)
    return shape.decoder.parameters * width


def count_merge(job: Job, reader: PlanReader) -> Counted:
    """Every weight is read, and those of one model written; some methods measure models on rows."""
    config = job.config
    assert isinstance(config, MergeConfig)  # by the verb
    shapes = _shapes(job, reader)
    first = "base_model" if "base_model" in shapes else f"{next(place for place, _ in config.sources())}.model"
    donor = shapes[first]
    written = _model_bytes(donor, config.dtype)
    parts, pools, lengths = _measured(job, config, reader, shapes)
    made = Made(shape=replace(donor, size=written, kind="model", predicted=True))
    volume = count(parts, pools, lengths, shapes, read=_weights(shapes), written=written)
    return Counted(volume, tuple(parts), shapes, made, written, dict.fromkeys(shapes, 1))


def _measured(
    job: Job, config: MergeConfig, reader: PlanReader, shapes: Mapping[str, Shape]
) -> tuple[list[Part], list[Pool], list[Lengths]]:
    """Passes of each model's own rows, for the methods that measure."""
    parts, pools, lengths = [], [], []
    for place, source in config.sources():
        if not source.rows:
            continue
        pool = reader.pool(rows_of(job, f"{place}.rows"), _Plain(config))
        shape = shapes[f"{place}.model"]
        known = reader.lengths(pool, shape, None)
        measure = backward if config.method.type == "fisher" else score
        parts.append(measure("measure on rows", known, batch=1, model=f"{place}.model"))
        pools.append(pool)
        lengths.append(known)
    return parts, pools, lengths


class _Plain:
    """How rows are read where a verb has no settings for it."""

    split = None

    def __init__(self, config: Any) -> None:
        self.limit = getattr(config, "limit", None)
        self.strict = getattr(config, "strict", False)
        self.max_bad = getattr(config, "max_bad", 1.0)


def count_mix(job: Job, reader: PlanReader) -> Counted:
    """The experts are read and laid beside each other; a router reads rows or prompts."""
    config = job.config
    assert isinstance(config, MixConfig)  # by the verb
    shapes = _shapes(job, reader)
    experts = [shapes[f"experts.{i}.model"] for i in range(len(config.experts))]
    trunk = shapes.get("base_model", experts[0])
    parts: list[Part] = []
    pools: list[Pool] = []
    lengths: list[Lengths] = []
    for k in range(len(config.experts)):
        if given := rows_of(job, f"experts.{k}.rows"):
            pool = reader.pool(given, _Plain(config))
            known = reader.lengths(pool, trunk, None)
            parts.append(score("read rows for the router", known, batch=16, depth=0.5, model=f"experts.{k}.model"))
            pools.append(pool)
            lengths.append(known)
    if config.tune_router.steps:
        pool = reader.pool(rows_of(job, "tune_router.rows"), _Plain(config))
        known = reader.lengths(pool, trunk, None)
        parts.append(train("tune the router", known, steps=config.tune_router.steps, batch=8))
        pools.append(pool)
        lengths.append(known)
    # MLPs are most of a layer; before a whole model, the router reads the prompt with half of another.
    share = len(experts) if config.whole_models else 1 + 0.6 * (len(experts) - 1)
    written = round(_model_bytes(trunk, config.dtype) * share)
    active = 1.5 if config.whole_models else 1 + 0.6 * (config.chosen - 1)
    made = Made(shape=replace(trunk, size=written, kind="model", active=active, predicted=True))
    notes = ("sizes of the mixture are predicted from its experts",)
    volume = count(parts, pools, lengths, shapes, read=_weights(shapes), written=written, notes=notes)
    return Counted(volume, tuple(parts), shapes, made, written, dict.fromkeys(shapes, 1))


def count_aggregate(job: Job, reader: PlanReader) -> Counted:
    """Adapters are read, and one adapter or model written."""
    config = job.config
    assert isinstance(config, AggregateConfig)  # by the verb
    shapes = _shapes(job, reader)
    adapters = [s for p, s in shapes.items() if p.startswith("adapters.")]
    sizes = [s.size for s in adapters]
    written = sum(sizes) if config.method.type in ("flora", "fedex") else max(sizes)
    shape = replace(adapters[0], size=written, predicted=True)
    if config.into_base is not None:
        base = shapes["into_base"]
        written = _model_bytes(base, config.dtype)
        shape = replace(base, size=written, kind="model", predicted=True)
    volume = count((), (), (), shapes, read=sum(s.size for s in shapes.values()), written=written)
    return Counted(volume, (), shapes, Made(shape=shape), written, dict.fromkeys(shapes, 1))


def count_extract(job: Job, reader: PlanReader) -> Counted:
    """Two models are read, and an adapter written."""
    config = job.config
    assert isinstance(config, ExtractConfig)  # by the verb
    shapes = _shapes(job, reader)
    base = shapes["base"]
    rank = config.amount()["rank"]
    most = min(base.decoder.hidden, base.decoder.keys)
    size = (rank or most) * base.decoder.adapter_widths * (_DTYPE_BYTES.get(config.dtype) or ADAPTER_BYTES)
    notes = ("how long the decompositions take is not counted",)
    volume = count((), (), (), shapes, read=_weights(shapes), written=size, at_most=rank is None, notes=notes)
    shape = replace(base, size=size, kind="adapter", predicted=True)
    return Counted(volume, (), shapes, Made(shape=shape), size, dict.fromkeys(shapes, 1))


def count_bytes(job: Job, reader: PlanReader) -> Counted:
    """A verb that reads files and writes as many bytes."""
    read = sum(i.size for i in job.inputs.values())
    shapes = _shapes(job, reader)
    read = max(read, _weights(shapes))
    shape = next(iter(shapes.values()), None)
    made = Made(shape=replace(shape, predicted=True)) if shape else Made()
    volume = count((), (), (), shapes, read=read, written=read)
    return Counted(volume, (), shapes, made, read, dict.fromkeys(shapes, 1))


def count_export(job: Job, reader: PlanReader) -> Counted:
    """Every weight is read and written in another type, and the source and the file give logits of some texts."""
    config = job.config
    assert isinstance(config, ExportConfig)  # by the verb
    shape = reader.shape(job.inputs["model"])
    written = round(shape.decoder.parameters * _WEIGHT_BYTES[config.quant])
    tokens = [max(1, len(text.encode()) // _TEXT_BYTES) for text in TEXTS]
    texts = Lengths.of(len(TEXTS), tokens, [0] * len(TEXTS), [[n] for n in tokens], counted=False)
    parts = (score("compare logits", texts, batch=1, times=2),)
    volume = count(parts, (), (), {"model": shape}, read=shape.size, written=written)
    return Counted(volume, parts, {"model": shape}, Made(), written, {"model": 2})


def count_drop(job: Job, reader: PlanReader) -> Counted:
    """Importances, the losses of a choice, the curve along the order of drops, and healing."""
    config = job.config
    assert isinstance(config, DropConfig)  # by the verb
    shape = reader.shape(job.inputs["model"])
    pool = reader.pool(rows_of(job, "calibration"), config) if config.calibration else Pool(0, 0)
    rows = reader.lengths(pool, shape, config.max_length) if config.calibration else Lengths(0)
    taken = rows.take(min(config.samples, rows.rows))
    measured = rows.take(min(config.measure, taken.rows))
    layers, parts = shape.layers, list[Part]()
    drops = _drops(config, layers)
    if config.calibration:
        rounds = _scorings(config) - _known(job, config)
        parts += _importances(config, taken, layers, rounds)
    losses = min(POINTS, drops + 1) + (1 if config.heal or config.affine else 0)
    evaluations = losses if measured.rows and config.only is None else 0
    if config.choice == "greedy":
        evaluations += greedy_losses(_units(config, layers), drops)
    if evaluations and measured.rows:
        parts.append(score("measure losses", measured, batch=1, times=evaluations, rendered=0, alone=True))
    pools, lengths = [pool], [rows]
    if config.heal:
        healing = reader.pool(rows_of(job, "heal"), config)
        known = reader.lengths(healing, shape, config.max_length)
        tuning = {"method": {"type": "lora", "rank": config.heal_rank}, "group_by_length": True}
        parts.append(train("heal", known, steps=config.heal_steps, batch=config.heal_batch_size, tuning=tuning,
                           loop="trainer"))  # fmt: skip
        pools.append(healing)
        lengths.append(known)
    written = 0 if config.only else shape.size
    at_most = bool(config.budget) or config.choice == "greedy"
    volume = count(parts, pools, lengths, {"model": shape}, read=shape.size, written=written, at_most=at_most,
                   evaluations=evaluations)  # fmt: skip
    made = Made(shape=replace(shape, size=written, predicted=True))
    inner = {"tune, lora": 1} if config.heal else {}
    return Counted(volume, tuple(parts), {"model": shape}, made, written, {"model": 2}, inner=inner)


def _units(config: DropConfig, layers: int) -> int:
    """What may go."""
    kinds = {"block": config.block, "attention": config.attention, "mlp": config.mlp}
    asked = [k for k, n in kinds.items() if n] or (["attention", "mlp"] if config.joint else list(config.kinds))
    return len(asked) * max(0, layers - config.protect_first - config.protect_last)


def _drops(config: DropConfig, layers: int) -> int:
    """Units that go; of a budget at most half of what may."""
    if config.layers is not None:
        named = (config.layers.block, config.layers.attention, config.layers.mlp)
        return sum(sum(n) if n and isinstance(n[0], bool) else len(n) for n in named)
    asked = sum(config.counts.values())
    return asked or (_units(config, layers) // 2 if config.budget else 0)


def _known(job: Job, config: DropConfig) -> int:
    """1 where the importances of these rows under the whole model are kept from an earlier drop."""
    if not job.inputs["model"].paths or any(not i.files for i in rows_of(job, "calibration")) or not _scorings(config):
        return 0
    windows = (config.block,) if config.consecutive and config.block > 1 else ()
    return int(ScoreCache(score_key(config, job.inputs, windows)).read() is not None)


def _scorings(config: DropConfig) -> int:
    """How often importances are measured."""
    if config.layers is not None or config.scores is not None:
        return 0
    if config.choice == "iterative":
        return max(1, len(rounds_of(config.counts, config.per_round, pairs=config.pairs)))
    return 1


def _importances(config: DropConfig, rows: Lengths, layers: int, times: int) -> list[Part]:
    """Passes of one metric over the calibration rows, `times` times."""
    reads, what = config.metric.reads, f"measure importances ({config.metric.type})"
    if reads == "places" or not times:
        return [score("read rows", rows, batch=config.batch_size, times=0, rendered=rows.rows)]
    if reads == "gradients":
        return [backward(what, rows, batch=config.batch_size, times=times)]
    # Restarts: the model without a unit is computed from there on, half of it on average.
    passes = times * (1.0 if reads == "streams" else 1 + len(config.metric.kinds) * (layers + 1) / 2)
    return [score(what, rows, batch=config.batch_size, times=passes, rendered=rows.rows)]


def count_glue(job: Job, reader: PlanReader) -> Counted:
    """Every model on the search rows, the candidates of the search, and the results on the report rows."""
    config = job.config
    assert isinstance(config, GlueConfig)  # by the verb
    shapes = _shapes(job, reader)
    models = {name: shapes[place] for name, place in config.named()}
    first = next(iter(models.values()))
    read, zoo = _weights(shapes), sum(_model_bytes(s) for s in models.values())
    if config.only == "clusters":
        return Counted(count((), (), (), shapes, read=read), (), shapes)
    search, report = _glue_rows(job, config, reader, first)
    clusters = models_of_one_shape({name: job.inputs[place] for name, place in config.named()})
    merged = max(1, len(clusters))
    candidates = sum(tried(config, len(names)) for names in clusters.values() if len(names) > 1)
    place = next(place for _, place in config.named())
    parts = [
        _scored("score every model", search, config, place, len(models)),
        _scored("try merges", search, config, place, candidates),
    ]
    mixtures = list(config.mixtures) if config.only is None else []
    evaluations = len(models) + candidates
    if config.only != "search":
        results = merged + len(mixtures)
        parts += [
            _scored("score merges and mixtures", search, config, place, results),
            _scored("report", report, config, place, len(models) + results),
        ]
        evaluations += 2 * results + len(models)
    each = max(_model_bytes(s) for s in models.values())
    written = {"search": 0, "merge": 2 * each * merged}.get(str(config.only), zoo + 2 * each * merged)
    made = Made(shape=replace(first, size=each, kind="model", active=1.5 if mixtures else 1.0, predicted=True))
    volume = count(
        parts, (Pool(search.rows + report.rows, 0),), (search, report), shapes, read=read, written=written,
        evaluations=evaluations, at_most=True,
    )  # fmt: skip
    inner = {"merge": merged, "mix": len(mixtures), "evaluate": len(models) + 2 * (merged + len(mixtures))}
    several = sum(len(names) > 1 for names in clusters.values())
    stays = 0 if config.only == "search" else each * (1 + several)  # the root, and the merges that it was chosen from
    return Counted(volume, tuple(parts), shapes, made, stays, dict.fromkeys(shapes, 2), inner=inner)


def _scored(what: str, rows: Lengths, config: GlueConfig, place: str, times: int) -> Part:
    return score(what, rows, batch=config.batch_size, times=times, model=place)


def _glue_rows(job: Job, config: GlueConfig, reader: PlanReader, shape: Shape) -> tuple[Lengths, Lengths]:
    """Rows that choose, and rows that report."""
    how = _Plain(config)
    search = reader.pool(rows_of(job, "search_rows"), how)
    known = reader.lengths(search, shape, config.max_length)
    if config.report_rows:
        return known, reader.lengths(reader.pool(rows_of(job, "report_rows"), how), shape, config.max_length)
    half = known.rows // 2
    return known.take(known.rows - half), known.take(half)
