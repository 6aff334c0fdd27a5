"""The gates of a mixture: what routers are made from is measured once, and kept until the mixture is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from honeloom.backends.devices import choose_device, choose_dtype, memory_guard, one_thread, release_memory
from honeloom.backends.hf.load import load_config
from honeloom.backends.hf.measure import MeasuredModel
from honeloom.backends.hf.router_inputs import Place, Span, received
from honeloom.backends.hf.streamed import source_weights, streamed_model
from honeloom.checkpoint.architectures import layer_count
from honeloom.checkpoint.folders import discard
from honeloom.checkpoint.reader import Checkpoint
from honeloom.checkpoint.writer import TensorStream, write_tensors
from honeloom.errors import ConfigError
from honeloom.merging.engine.sources import ModelSource
from honeloom.mixture.config import MixConfig
from honeloom.mixture.evidence import Evidence, Gate, as_mlp
from honeloom.mixture.layout import Names
from honeloom.ops.lowrank import LinearMap
from honeloom.ops.noise import normal
from honeloom.registry import family
from honeloom.runs.atomic import require_space, write_json
from honeloom.stages.mix_inputs import Design, Parts, hidden_size, weights_of
from honeloom.stages.mix_rows import Domains, expert_losses, prompt_spans, read_domains, sample_spans
from honeloom.stages.work import Work
from honeloom.system import resident_bytes

__all__ = ["FOLDER", "Gates", "gate_places", "loaded", "make_gates", "plain_config", "pooled_vectors"]

FOLDER = ".router"
"""In the work folder; it goes when the mixture is written."""
_RECORD, _GATES = "gates.json", "gates.safetensors"
_ROWS = 1 << 10


@dataclass(frozen=True, slots=True)
class Gates:
    """Every gate by its key (the layer's number, or nothing), and what is known of them.

    Attributes
    ----------
    by_key : mapping
        The gates.
    domains : Domains or None
        Rows that they were made from.
    """

    by_key: Mapping[str, Gate]
    domains: Domains | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensors of one gate; all have the same."""
        first = next(iter(self.by_key.values()))
        return {name: tuple(t.shape) for name, t in first.tensors.items()}

    @property
    def kind(self) -> str:
        """linear, mlp or subspace."""
        return "subspace" if "basis" in self.shapes else "mlp" if "up.weight" in self.shapes else "linear"

    @property
    def spec(self) -> dict[str, Any]:
        """What config.json says of a gate."""
        shapes = self.shapes
        width = {"linear": None, "mlp": shapes.get("up.weight", (0,))[0], "subspace": shapes.get("basis", (0, 0))[1]}
        return {"type": self.kind, "width": width[self.kind], "bias": "bias" in shapes or "down.bias" in shapes}

    def to_json(self) -> dict[str, Any]:
        """For the report: accuracy on rows that a gate has not seen, and that of always naming the largest class."""
        known = [g for g in self.by_key.values() if g.accuracy is not None]
        if not known:
            return {"accuracy": None}
        return {
            "accuracy": sum(g.accuracy or 0.0 for g in known) / len(known),
            "floor": sum(g.floor or 0.0 for g in known) / len(known),
            "gates": [{"gate": key, "accuracy": g.accuracy} for key, g in self.by_key.items()],
        }


def gate_places(config: MixConfig, parts: Parts, design: Design) -> dict[str, Place]:
    """Where every gate reads, by its key."""
    if config.whole_models:
        return {"": Place(design.layer, "output")}
    first, count = config.dense_layers, layer_count(parts.trunk.config)
    if config.level == "model":
        return {str(first): Place(first, "layer")}
    point: Any = "mlp" if config.level == "ffn" else "layer"
    return {str(i): Place(i, point) for i in range(first, count)}


def make_gates(work: Work[MixConfig], parts: Parts, design: Design) -> Gates:
    """Make every gate, or take those that an interrupted attempt has made.

    Raises
    ------
    ConfigError, RowsError, SourceError
        What the router is made from is missing, or says nothing.
    """
    folder = work.dir / FOLDER
    record = folder / _RECORD
    config = work.config
    domains = read_domains(work, parts) if getattr(config.router, "data", "none") == "rows" else None
    if record.is_file():
        work.log.say("mix: the gates were made before")
        return replace(_read(folder), domains=domains)
    discard(folder)
    folder.mkdir(parents=True)
    with one_thread(torch.device("cpu")):
        gates = Gates(dict(_made(work, parts, design, domains, folder)), domains)
    said = gates.to_json()
    if said["accuracy"] is not None:
        work.log.say(
            f"mix: gates name the right expert for {said['accuracy']:.1%} of what they have not seen; naming the "
            f"largest class alone would for {said['floor']:.1%}"
        )
    tensors = {f"{key}/{name}": t for key, gate in gates.by_key.items() for name, t in gate.tensors.items()}
    write_tensors(folder / _GATES, [TensorStream.of(name, t.contiguous()) for name, t in tensors.items()])
    known = {key: {"accuracy": g.accuracy, "floor": g.floor} for key, g in gates.by_key.items()}
    write_json(record, {"gates": known, "tensors": list(tensors)})
    for file in folder.glob("*.f32"):
        file.unlink()
    return gates


def _read(folder: Path) -> Gates:
    record = json.loads((folder / _RECORD).read_bytes())
    found: dict[str, dict[str, torch.Tensor]] = {key: {} for key in record["gates"]}
    with Checkpoint(folder, [folder / _GATES]) as stored:
        for full in record["tensors"]:
            key, _, name = full.partition("/")
            info = stored.info(full)
            found[key][name] = stored.read_slice(full, 0, info.elements).view(info.shape)
    return Gates({key: Gate(tensors, **record["gates"][key]) for key, tensors in found.items()})


def _made(
    work: Work[MixConfig], parts: Parts, design: Design, domains: Domains | None, folder: Path
) -> Iterator[tuple[str, Gate]]:
    config, method = work.config, work.config.router
    router = family("routing").load(method.type)
    passed = {"type", *getattr(method, "measured", ())}
    given = {n: getattr(method, n) for n in type(method).model_fields if n not in passed}
    reader = parts.encoder or parts.trunk
    width, experts = hidden_size(reader.config), len(parts.experts)
    intercept = not design.standard
    blank = Evidence("", experts, width, config.seed, intercept)
    places = gate_places(config, parts, design)
    data = getattr(method, "data", "none")
    filled = {"prompts": _of_prompts, "rows": _of_rows, "changes": _of_changes}.get(data)
    evidence = filled(work, parts, places, blank, folder, domains) if filled else (lambda key: blank)
    for key in work.log.track(list(places), "make gates", len(places)):
        name = f"layers.{key}" if key else "gate"
        gate = router(replace(evidence(key), name=name), **given)
        if config.gate == "mlp":
            extra = config.width - 2 * experts
            noise = normal(config.seed, f"gate/{name}/mlp", extra * width).view(extra, width) * width**-0.5
            gate = as_mlp(gate, config.width, noise)
        yield key, gate


Fill = Callable[[str], Evidence]


def _of_prompts(
    work: Work[MixConfig], parts: Parts, places: Mapping[str, Place], blank: Evidence, folder: Path, _: Domains | None
) -> Fill:
    """What gates receive for each expert's prompts: few tokens, so the model is read while it computes."""
    config = work.config
    source = parts.encoder or parts.trunk
    take: Any = getattr(config.router, "pooling", "mean")
    spans, owner = list[Span](), list[tuple[int, bool]]()
    chat = config.input == "sample"
    for e, expert in enumerate(config.experts):
        for texts, good in ((expert.prompts, True), (expert.negative_prompts, False)):
            spans += prompt_spans(source, texts, take, chat=chat)
            owner += [(e, good)] * len(texts)
    found = {key: torch.zeros(len(spans), blank.width) for key in places}
    keys = list(places)

    def keep(place: int, span: int, vectors: torch.Tensor) -> None:
        found[keys[place]][span] = vectors[0]

    with streamed_model(plain_config(source), source_weights(source)) as model:
        received(model, source.architecture, list(places.values()), spans, keep)

    def evidence(key: str) -> Evidence:
        positive, negative = (
            tuple(
                found[key][[i for i, (e, g) in enumerate(owner) if e == expert and g is good]]
                for expert in range(blank.experts)
            )
            for good in (True, False)
        )
        return replace(blank, positive=positive, negative=negative)

    return evidence


def _of_rows(
    work: Work[MixConfig], parts: Parts, places: Mapping[str, Place], blank: Evidence, folder: Path,
    domains: Domains | None,
) -> Fill:  # fmt: skip
    """What gates receive for rows; vectors lie in files, one for each gate."""
    assert domains is not None  # routers that are made from rows have them
    config, source = work.config, parts.encoder or parts.trunk
    count = getattr(config.router, "tokens_per_row", 1) if config.input == "token" else 1
    spans = sample_spans(domains.encoded) if config.input == "sample" else domains.spread(count)
    starts = np.concatenate(([0], np.cumsum([s.vectors for s in spans])))
    total, keys = int(starts[-1]), list(places)
    require_space(work.dir, 4 * total * blank.width * len(keys))
    files = {
        key: np.memmap(folder / f"{key or 'gate'}.f32", dtype="<f4", mode="w+", shape=(total, blank.width))
        for key in keys
    }

    def keep(place: int, span: int, vectors: torch.Tensor) -> None:
        files[keys[place]][starts[span] : starts[span + 1]] = vectors.numpy()

    with loaded(work, source) as model:
        received(model, source.architecture, list(places.values()), spans, keep, progress=work.log.track)
    of_row = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor([s.vectors for s in spans]))
    labels, losses = domains.labels, None
    if labels is None:
        losses = expert_losses(work, parts, domains.rows, loaded)
        labels = losses.argmin(dim=1)
        if config.router.type == "rows":  # others group them first
            domains.told(work, labels)
    middle = torch.from_numpy(np.array(files[keys[len(keys) // 2]]))
    pooled = torch.zeros(len(spans), blank.width).index_add_(0, of_row, middle)
    pooled /= torch.bincount(of_row, minlength=len(spans))[:, None]

    def evidence(key: str) -> Evidence:
        vectors = torch.from_numpy(np.array(files[key]))
        return replace(blank, vectors=vectors, rows=of_row, labels=labels, pooled=pooled, losses=losses)

    return evidence


def _of_changes(
    work: Work[MixConfig], parts: Parts, places: Mapping[str, Place], blank: Evidence, folder: Path, _: Domains | None
) -> Fill:
    """Task vectors of the matrices that multiply what a gate receives, never held as a whole."""
    base = parts.trunk
    known, names = base.architecture, Names(base.architecture)

    def evidence(key: str) -> Evidence:
        matrices = [
            name
            for name in weights_of(base)
            if (place := names.layer(names.stock(name))) is not None
            and place[0] == int(key)
            and names.unit(place[1], "ffn") is not None
            and len(base.info(name).shape) == 2
            and not any(re.fullmatch(pattern, place[1]) for pattern in known.mlp_out)
        ]
        odd = next((n for n in matrices if base.info(n).shape[1] != blank.width), None)
        if odd is not None or not matrices:
            raise ConfigError(
                f"router {work.config.router.type}: the MLP of a {known.model_type} has no matrix stored as (out, in) "
                "that multiplies its input; take another router"
            )
        return replace(blank, changes=tuple(_change(base, expert, matrices) for expert in parts.experts))

    return evidence


def _change(base: ModelSource, expert: ModelSource, matrices: Sequence[str]) -> LinearMap:
    """An expert minus the base: some matrices with one input, on top of each other."""
    shapes = [base.info(name).shape for name in matrices]
    rows, width = sum(s[0] for s in shapes), shapes[0][1]

    def pieces() -> Iterator[tuple[int, torch.Tensor]]:
        place = 0
        for name, (count, _) in zip(matrices, shapes, strict=True):
            for start in range(0, count, _ROWS):
                stop = min(start + _ROWS, count)
                ours, theirs = (s.read(name, start * width, stop * width).view(-1, width) for s in (expert, base))
                yield place + start, ours - theirs
            place += count

    def matmul(x: torch.Tensor) -> torch.Tensor:
        product = torch.zeros(rows, x.shape[1], dtype=torch.float64)
        for start, piece in pieces():
            product[start : start + len(piece)] = piece @ x
        return product

    def transposed(x: torch.Tensor) -> torch.Tensor:
        product = torch.zeros(width, x.shape[1], dtype=torch.float64)
        for start, piece in pieces():
            product += piece.T @ x[start : start + len(piece)]
        return product

    return LinearMap((rows, width), matmul, transposed)


def plain_config(source: ModelSource) -> Any:
    """A model's configuration as transformers has it; weights come as what 8-bit codes stand for."""
    config = load_config(source.folder)
    config.quantization_config = None
    return config


@contextmanager
def loaded(work: Work[MixConfig], source: ModelSource) -> Iterator[Any]:
    """A model in memory, for many rows; ConfigError if `max_memory` does not hold it."""
    device = choose_device(work.config.device)
    dtype = choose_dtype("auto", device)
    limit = work.config.max_memory
    weights = dtype.itemsize * sum(prod(info.shape) for info in source.tensors.values())
    least = resident_bytes() + weights
    if limit is not None and device.type == "cpu" and least > limit:
        raise ConfigError(
            f"max_memory {limit:,}: reading rows with {source.name} takes at least {least:,} bytes, for the whole "
            "model is loaded; raise it, or take router: prompts, which reads the model piece by piece"
        )
    with memory_guard(device, f"reading rows with {source.name}", ["--device cpu"] * (device.type != "cpu")):
        yield MeasuredModel.load(source, device=device, dtype=dtype).model
    release_memory()


def pooled_vectors(
    work: Work[MixConfig], parts: Parts, place: Place, spans: Sequence[Span], *, model: Any = None
) -> torch.Tensor:
    """What a gate of samples receives for rows, (R, H); `model` where the reader is loaded already."""
    source = parts.encoder or parts.trunk
    found = torch.zeros(len(spans), hidden_size(source.config))

    def keep(_: int, span: int, vectors: torch.Tensor) -> None:
        found[span] = vectors[0]

    if model is not None:
        received(model, source.architecture, [place], spans, keep)
        return found
    with loaded(work, source) as opened:
        received(opened, source.architecture, [place], spans, keep)
    return found
