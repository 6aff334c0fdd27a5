"""The parameters of one model in memory, filled with one merge after the other.

The model is built once from the donor's configuration. Each merge is a document, planned and computed by the engine
that writes checkpoints, piece by piece; a piece is rounded to the type in which it would be written, and then becomes
the type in which the model computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from honeloom.backends.devices import DTYPES, choose_device, choose_dtype, one_thread
from honeloom.backends.hf.load import Loading, load_arguments, load_config
from honeloom.backends.hf.streamed import source_weights, streamed_model
from honeloom.checkpoint.architectures import layer_count
from honeloom.checkpoint.headers import DTYPE_BITS
from honeloom.config.methods import MethodConfig
from honeloom.errors import ConfigError
from honeloom.merging.compatibility import check_compatible
from honeloom.merging.config import TaskArithmeticConfig
from honeloom.merging.engine.layout import Part, base_use, layer_of, plan_parts
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.engine.streaming import CHUNK, COMPUTED, Merger
from honeloom.merging.engine.tensors import Cut
from honeloom.merging.merge_config import MergeConfig
from honeloom.merging.search.candidates import Candidate, candidate_config, group_of_layer
from honeloom.registry import family
from honeloom.system import cores

__all__ = ["LiveWeights", "Pool"]

Values = npt.NDArray[np.float64]
T = TypeVar("T")
R = TypeVar("R")
_PIECE = 1 << 22
"""Elements per call of a kernel, which reads and writes them where they lie."""
_HEAP = 4 << 20
"""Elements read that are one task."""


@dataclass(frozen=True)
class Pool:
    """The models of a search, opened, and what does not change between its candidates.

    Attributes
    ----------
    models : sequence of str
        N names, in the order of the documents.
    sources : mapping
        Opened models by name, the base among them.
    base : str or None
        base_model of every document.
    method : MethodConfig
        The merge method.
    settings : mapping
        Further settings of the documents, such as dtype, seed and chat_template.
    """

    models: Sequence[str]
    sources: Mapping[str, ModelSource]
    base: str | None
    method: MethodConfig
    settings: Mapping[str, Any]

    @property
    def donor(self) -> ModelSource:
        """Of configuration and tokenizer: the base, else the first model."""
        return self.sources[self.base or self.models[0]]

    @property
    def layers(self) -> int:
        """Of every model."""
        return layer_count(self.donor.config)

    @property
    def prefix(self) -> str:
        """What the names of the layers' tensors begin with."""
        prefixes = self.donor.architecture.disk_layers
        return next((p for p in prefixes if any(n.startswith(f"{p}.") for n in self.donor.tensors)), prefixes[0])

    def document(self, candidate: Candidate) -> dict[str, Any]:
        """The merge that a candidate stands for, for `honeloom merge`."""
        return candidate_config(
            candidate, self.models, self.base, self.method,
            layers=self.layers, prefix=self.prefix, settings=self.settings,
        )  # fmt: skip

    def document_of_single(self, model: int) -> dict[str, Any]:
        """A document that copies one model."""
        settings = {k: v for k, v in self.settings.items() if k != "chat_template"}
        return {"models": [{"model": self.models[model]}], "method": {"type": "linear"}, **settings}

    def merger(self, document: Mapping[str, Any]) -> Merger:
        """The engine's view of a document; the same plan as that of the merge stage."""
        config = MergeConfig.model_validate(dict(document))
        sources = {place: self.sources[source.model] for place, source in config.sources()}
        if config.base_model is not None:
            sources["base_model"] = self.sources[config.base_model]
        donor = sources.get("base_model") or sources["models.0"]
        return Merger(
            config.method,
            family("merging").load(config.method.type),
            plan_parts(config, sources, donor, donor.architecture),
            sources,
            sources.get("base_model") if base_use(config.method) in ("needed", "allowed") else None,
            donor,
            None if config.dtype == "auto" else DTYPES[config.dtype],
            _stored_dtype(donor),
            rounding=config.rounding,
            allow_nan=config.allow_nan,
            seed=config.seed,
        )


class _Mapped:
    """A model whose stored bytes are read where they lie in the page cache, instead of being copied for every merge."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self.name, self.info, self.is_stored, self.read = source.name, source.info, source.is_stored, source.read
        files: dict[Path, npt.NDArray[np.uint8]] = {}
        self._stored: dict[str, tuple[npt.NDArray[np.uint8], int]] = {}
        for name, info in source.tensors.items():
            path, offset = source.place(name)
            if path not in files:
                files[path] = np.asarray(np.memmap(path, np.uint8, "r"))
            size = DTYPE_BITS[info.dtype] // 8
            self._stored[name] = files[path][offset : offset + info.elements * size], size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read_raw(self, name: str, start: int, stop: int, _buffer: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Elements start..stop of a flattened tensor as stored; no buffer is needed."""
        data, size = self._stored[name]
        return data[start * size : stop * size]


def _stored_dtype(donor: ModelSource) -> torch.dtype:
    """What 8-bit weights become: the type that the config says the model computes in."""
    name = str(donor.config.get("dtype") or donor.config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.bfloat16


class LiveWeights:
    """A model in memory whose parameters are filled with merges.

    Parameters
    ----------
    pool : Pool
        The models; where one has a head of its own, the embeddings of the others count as theirs.
    loading : Loading
        Device, number type of the computation, attention. Quantisation is refused.
    threads : int, optional
        Tensors that are merged at a time; one per core by default.

    Raises
    ------
    ConfigError
        The model would be quantised.
    IncompatibleModelsError
        The models do not have the same tensors and arithmetic.
    """

    def __init__(self, pool: Pool, *, loading: Loading | None = None, threads: int | None = None) -> None:
        loading = loading or Loading()
        if loading.load_in:
            raise ConfigError(f"load_in {loading.load_in}: merges are computed from whole weights; leave it out")
        _untie_mixed(pool)
        self.pool = pool
        self._mapped = replace(pool, sources={n: cast(ModelSource, _Mapped(s)) for n, s in pool.sources.items()})
        self.threads = threads or cores()
        config = load_config(pool.donor.folder)
        if not pool.donor.tied:
            config.tie_word_embeddings = False
        configs = {name: load_config(s.folder).to_dict() for name, s in pool.sources.items()}
        check_compatible(
            configs,
            {name: s.tensors for name, s in pool.sources.items()},
            accept=pool.settings.get("accept", ()),
        )
        device = choose_device(loading.device)
        options = load_arguments(loading, device, choose_dtype(loading.dtype, device), fits=True)
        self.model = _empty_model(config, options).to(device).eval()
        self._targets = _targets(self.model, config, pool.donor)
        self._parameters = {p.untyped_storage().data_ptr(): p for p in self.model.parameters()}
        self._held: dict[str, Any] = {}
        self._cuts: dict[tuple[str, str, str, str], dict[int, Cut]] = {}
        # One crew for all merges: every thread has opened files of its own.
        self._crew = ThreadPoolExecutor(self.threads)
        self.merged = 0
        """Tensors computed by the last `fill`."""

    def fill(self, document: Mapping[str, Any]) -> None:
        """Make the parameters those of a merge; tensors that would not change are left alone."""
        merger = self._mapped.merger(document)
        merger.chunk, merger.cuts = _PIECE, self._cuts
        keys = _keys(merger, [part for part in merger.parts if part.name in self._targets])
        changed = [p for p in merger.parts if p.name in keys and self._held.get(p.name) != keys[p.name]]
        for part in changed:
            self._held.pop(part.name, None)

        def compute(parts: Sequence[Part]) -> list[None]:
            with torch.no_grad():  # holds for one thread
                merger.fill([(part, self._targets[part.name]) for part in parts])
            return [None] * len(parts)

        with one_thread(torch.device("cpu")):
            self._spread(compute, changed, lambda part: part.info.elements * len(part.models))
        self._held |= {part.name: keys[part.name] for part in changed}
        self.merged = len(changed)

    def _spread(
        self, work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T], size: Callable[[T], int]
    ) -> list[R]:
        """Do something with all items, the large ones first, small ones several at a time; results in order."""
        order = sorted(range(len(items)), key=lambda i: -size(items[i]))
        heaps, results = _heaps(order, [size(item) for item in items]), dict[int, R]()

        def several(heap: list[int]) -> None:
            results.update(zip(heap, work([items[i] for i in heap]), strict=True))

        if len(heaps) == 1 or self.threads == 1:
            for heap in heaps:
                several(heap)
        else:
            list(self._crew.map(several, heaps))
        return [results[i] for i in range(len(items))]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name on disk and flattened values of everything that merges fill."""
        yield from self._targets.items()

    def slopes(self, candidate: Candidate) -> Values:
        """Inner products (G, N) of the parameters' gradients with how they move along each weight.

        For a weighted average that is (model - merge) / sum of the weights, for task arithmetic scale times the task
        vector. Gradients are taken as they are and then forgotten.
        """
        table, method = candidate.array, self.pool.method
        pieces = [name for name in self._targets if self.pool.donor.info(name).dtype in COMPUTED]
        with one_thread(torch.device("cpu")):
            products = self._spread(
                lambda names: [self._products(name) for name in names],
                pieces,
                lambda name: self._targets[name].numel(),
            )
        total = np.zeros_like(table)
        for name, along in zip(pieces, products, strict=True):
            layer = layer_of(name, self.pool.donor.architecture)
            total[group_of_layer(layer, self.pool.layers, len(table))] += along
        self.model.zero_grad(set_to_none=True)
        sums = table.sum(axis=1, keepdims=True)
        if isinstance(method, TaskArithmeticConfig):
            total *= float(method.scale)
        if not getattr(method, "normalize", False):
            return total
        return (total - (table * total).sum(axis=1, keepdims=True) / sums) / sums

    def _products(self, name: str) -> Values:
        """Inner products (N,) of one tensor's gradient with the models, or with their task vectors."""
        pool, gradient = self.pool, self._gradient(name)
        found = np.zeros(len(pool.models))
        if gradient is None:
            return found
        from_base = isinstance(pool.method, TaskArithmeticConfig)
        for start in range(0, len(gradient), CHUNK):
            piece = gradient[start : start + CHUNK].double().cpu()
            stop = start + len(piece)
            origin = pool.sources[str(pool.base)].read(name, start, stop) if from_base else 0.0
            for k, model in enumerate(pool.models):
                found[k] += float(piece @ (pool.sources[model].read(name, start, stop) - origin))
        return found

    def _gradient(self, name: str) -> torch.Tensor | None:
        """Flattened gradient of what a tensor on disk fills; None where nothing depends on it."""
        target = self._targets[name]
        gradient = self._parameters[target.untyped_storage().data_ptr()].grad
        if gradient is None:
            return None
        return gradient.reshape(-1)[target.storage_offset() : target.storage_offset() + target.numel()]


def _keys(merger: Merger, parts: Sequence[Part]) -> dict[str, Any]:
    """For every tensor what its merge follows from."""
    names = {place: source.name for place, source in merger.sources.items()}
    general = merger.method.type, merger.seed, merger.rounding
    settings = {id(p.settings): tuple(sorted((k, str(v)) for k, v in p.settings.items())) for p in parts}
    return {
        p.name: (
            tuple(names[place] for place, _ in p.models), p.weights, p.base, settings[id(p.settings)],
            merger.output_dtype(p), general,
        )
        for p in parts
    }  # fmt: skip


def _heaps(order: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Cut a sequence of items into pieces of at least so many bytes that a thread is worth its waking."""
    heaps: list[list[int]] = []
    room = 0
    for i in order:
        if room <= 0:
            heaps.append([])
            room = _HEAP
        heaps[-1].append(i)
        room -= sizes[i]
    return heaps


def _untie_mixed(pool: Pool) -> None:
    """Where one model has a head of its own, every tied one gives its embeddings for it, as when merges are written."""
    tied = [source for source in pool.sources.values() if source.tied]
    if len(tied) < len(pool.sources):
        for source in tied:
            source.untie()


def _empty_model(config: Any, options: Mapping[str, Any]) -> Any:
    """The model with memory for its parameters; only tables of positions have values."""
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
    model.tie_weights()
    return model


def _targets(model: Any, config: Any, donor: ModelSource) -> dict[str, torch.Tensor]:
    """For every tensor on disk the flattened elements of the parameter that it fills."""
    found: dict[str, torch.Tensor] = {}
    with streamed_model(config, source_weights(donor)) as skeleton:
        for name, tensor in model.state_dict(keep_vars=True).items():
            path, _, leaf = name.rpartition(".")
            elements = getattr(skeleton.get_submodule(path), leaf).elements
            flat, at = tensor.data.view(-1), 0
            for disk in elements.names:
                size = prod(donor.info(disk).shape)
                found[disk] = flat[at : at + size]
                at += size
    return found
