"""A forward pass through a model that is never in memory: weights are read piece by piece when they are used.

The modules are those of transformers, with parameters on the meta device. In the place of each stands a tensor that
reads its elements when an operation asks for them and forgets them after it: a linear layer takes slices of its rows,
an embedding the rows of its tokens, a mixture the experts that were chosen. So memory does not grow with the model
but with the longest row of tokens: activations, and logits of 4 T V bytes.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from honeloom.backends.devices import one_thread
from honeloom.checkpoint.architectures import Architecture, architecture_of
from honeloom.checkpoint.reader import Checkpoint
from honeloom.errors import CheckpointError
from honeloom.merging.engine.sources import ModelSource
from honeloom.registry import suggest

__all__ = ["Probe", "Weights", "checkpoint_weights", "probe", "source_weights", "streamed_model"]

_BUILDING = threading.Lock()
"""While a model is built, transformers replaces functions of torch for the whole process."""
SLICE = 1 << 20
"""Elements of a matrix that are in memory at once: 4 MiB in fp32, so that malloc uses the same pages again."""

_EXPERTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Parameter of all experts -> what each expert has on disk, joined by rows in this order; two customs of naming."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What a model's weights are read from.

    Attributes
    ----------
    name : str
        Of the model, for messages.
    shapes : mapping
        Every tensor's name on disk, and its shape.
    read : callable
        (name, start, stop) -> elements start..stop of the flattened tensor, of any floating type.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str, int, int], torch.Tensor]


def checkpoint_weights(checkpoint: Checkpoint) -> Weights:
    """The weights of a model folder; it must stay open."""
    shapes = {name: checkpoint.info(name).shape for name in checkpoint.names()}
    return Weights(str(checkpoint.folder), shapes, checkpoint.read_slice)


def source_weights(source: ModelSource) -> Weights:
    """The weights of a model to merge, an adapter's part included; it must stay open.

    Tensors that an adapter or scales change raise NotFiniteError as the source does.
    """

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return (source.stored if source.is_stored(name) else source.read)(name, start, stop)

    return Weights(source.name, {name: info.shape for name, info in source.tensors.items()}, read)


@dataclass(frozen=True, slots=True)
class Probe:
    """What a few rows say of a model.

    Attributes
    ----------
    finite : bool
        Whether all logits are.
    loss : float
        Mean next-token loss in nats per token; NaN if there is no token to predict or a logit is NaN.
    tokens : int
        Tokens that were predicted.
    """

    finite: bool
    loss: float
    tokens: int


@torch.inference_mode()
def probe(model: Any, rows: Sequence[Sequence[int]]) -> Probe:
    """Next-token loss of some rows of token ids, in one forward pass; on a CPU with one thread, for the same bits.

    Parameters
    ----------
    model : transformers model
        In evaluation mode; streamed or loaded.
    rows : sequence of sequence of int
        B rows of 1 to T token ids. The first token of a row is not predicted.

    Raises
    ------
    ValueError
        There is no row, or an empty one.
    """
    if not rows or not all(rows):
        raise ValueError(f"{len(rows)} rows of {[len(row) for row in rows]} tokens; each needs at least one")
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    ids_BT = pad_sequence([torch.tensor(row, device=device) for row in rows], batch_first=True)
    with one_thread(device):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits  # causal: no token sees the padding behind it
    finite, total, tokens = True, 0.0, 0
    for row, logits_TV in zip(rows, logits_BTV, strict=True):
        logits = logits_TV[: len(row)].float()
        finite = finite and bool(torch.isfinite(logits).all())
        losses = F.cross_entropy(logits[:-1], torch.tensor(row[1:], device=device, dtype=torch.long), reduction="none")
        total += float(losses.double().sum())
        tokens += len(row) - 1
    return Probe(finite, total / tokens if tokens else float("nan"), tokens)


@contextmanager
def streamed_model(config: Any, weights: Weights, *, dtype: torch.dtype = torch.float32) -> Iterator[Any]:
    """A causal language model of transformers that reads its weights while it computes.

    Linear layers, heads and the experts of a mixture are read in slices of rows, embeddings by token; other weights,
    such as norms and the convolutions of GPT-2, whole for the one operation that uses them. Names on disk may differ
    from those of the modules as far as the architecture table tells, a tied head may be stored or not, and experts may
    be stored one by one or together. Of a model that also sees, the text part alone can compute. Every forward pass
    reads all it uses anew.

    Parameters
    ----------
    config : transformers configuration
        As from `load_config`; it is not changed.
    weights : Weights
        Open until the end of the block.
    dtype : torch.dtype
        Of the computation. fp32 by default, whatever is stored: on a CPU without bf16 instructions a product in bf16
        takes longer than the conversion and the product in fp32.

    Yields
    ------
    transformers model
        On the CPU, in evaluation mode. All its parameters, and so its `device`, say meta. At the end of the block its
        weights are gone.

    Raises
    ------
    CheckpointError
        Before anything is computed: a tensor is missing, has another shape, or finds no place in the model; the family
        is not known; the weights are quantised. While it computes: a tensor holds integers.
    """
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{weights.name}: its weights are quantised, so they cannot be read one by one; load it whole"
        )
    with _BUILDING:
        model = _build(config, dtype)
    found = _Places(model, architecture_of(config.to_dict(), weights.shapes), weights).find_all()
    replaced = []
    try:
        for name, elements in found.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            vars(module)[leaf] = _Streamed.of(elements)  # found before the module's own parameter of that name
            replaced.append((module, leaf))
        yield model
    finally:
        for module, leaf in replaced:
            del vars(module)[leaf]


class _EmptyOnMeta(TorchFunctionMode):
    """While a model is built: what will be filled later takes no memory; what has values, such as a table, is real."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _build(config: Any, dtype: torch.dtype) -> Any:
    """The model with all parameters on the meta device, and its tables of positions in memory."""
    with _EmptyOnMeta():
        model: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),  # it would be changed
            dtype=dtype,
            experts_implementation="eager",  # takes one expert at a time; others want all of them as one tensor
        )
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                setattr(module, name, torch.nn.Parameter(parameter.to("meta"), requires_grad=False))
    return model.eval()


@dataclass(frozen=True, slots=True)
class _Elements:
    """The elements of a parameter: ranges of tensors on disk, one after another."""

    weights: Weights
    shape: tuple[int, ...]
    dtype: torch.dtype
    names: tuple[str, ...]
    first: int = 0

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of the flattened parameter."""
        parts = [self._convert(*part) for part in self._parts(self.first + start, self.first + stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Ranges of tensors on disk that hold elements start..stop of all of them in a row."""
        begin = 0
        for name in self.names:
            end = begin + prod(self.weights.shapes[name])
            if start < end and begin < stop:
                yield name, max(start, begin) - begin, min(stop, end) - begin
            begin = end

    def _convert(self, name: str, start: int, stop: int) -> torch.Tensor:
        values = self.weights.read(name, start, stop)
        if not values.is_floating_point():
            raise CheckpointError(f"{self.weights.name}: tensor {name!r} is {values.dtype}; only floats can be used")
        return values.to(self.dtype)

    def whole(self) -> torch.Tensor:
        """The parameter."""
        return self.read(0, prod(self.shape)).view(self.shape)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop along the first dimension."""
        size = prod(self.shape[1:])
        return self.read(start * size, stop * size).view(stop - start, *self.shape[1:])

    def row(self, index: int) -> _Elements:
        """One row as a parameter of its own, still unread."""
        return replace(self, shape=self.shape[1:], first=self.first + index * prod(self.shape[1:]))


class _Streamed(torch.Tensor):
    """A parameter that is read when an operation uses it, in slices where the operation allows it."""

    elements: _Elements

    @classmethod
    def of(cls, elements: _Elements) -> _Streamed:
        """Shape and type are there at once."""
        made = torch.empty(elements.shape, dtype=elements.dtype, device="meta").as_subclass(cls)
        made.elements = elements
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        place, in_slices = _IN_SLICES.get(func, (0, None))
        if in_slices and len(args) > place and isinstance(args[place], cls):
            return in_slices(*args, **kwargs)
        return func(*_read(args), **{key: _read(value) for key, value in kwargs.items()})


def _read(value: Any) -> Any:
    """An argument with every parameter in it read whole."""
    if isinstance(value, _Streamed):
        return value.elements.whole()
    return type(value)(map(_read, value)) if type(value) in (list, tuple) else value


def _linear(x: torch.Tensor, weight: _Streamed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute x @ weight.T + bias, some rows of the weight after the other."""
    rows, columns = weight.elements.shape
    bias, step = _read(bias), max(1, SLICE // columns)
    if rows <= step:
        return F.linear(x, weight.elements.whole(), bias)
    product = x.new_empty(*x.shape[:-1], rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = None if bias is None else bias[start:stop]
        product[..., start:stop] = F.linear(x, weight.elements.rows(start, stop), part)
    return product


def _embedding(ids: torch.Tensor, weight: _Streamed, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The rows of the tokens; further arguments matter to training alone."""
    unique, places = torch.unique(ids, return_inverse=True)
    count = weight.elements.shape[0]
    if not 0 <= unique[0] <= unique[-1] < count:
        raise IndexError(f"ids {unique[0]} to {unique[-1]}: {weight.elements.names[0]!r} has rows 0 to {count - 1}")
    return torch.cat([weight.elements.rows(i, i + 1) for i in unique.tolist()])[places]


def _item(stack: _Streamed, index: Any) -> torch.Tensor:
    """One expert, still unread."""
    if isinstance(index, int) or (isinstance(index, torch.Tensor) and index.ndim == 0):
        return _Streamed.of(stack.elements.row(int(index)))
    return stack.elements.whole()[index]


_IN_SLICES: Mapping[Any, tuple[int, Callable[..., torch.Tensor]]] = {
    F.linear: (1, _linear),
    F.embedding: (1, _embedding),
    torch.Tensor.__getitem__: (0, _item),
}
"""Operation -> which of its arguments is not read whole, and what stands for the operation."""

_FACTS = {torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__}  # type: ignore[attr-defined]
"""What is known without reading."""


class _Places:
    """Where the parameters of a model are on disk."""

    def __init__(self, model: Any, architecture: Architecture, weights: Weights) -> None:
        self._model = model
        self._architecture = architecture
        self._weights = weights
        self._stem = architecture.layers.rpartition(".")[0]  # of the decoder
        above, _, decoder = self._stem.rpartition(".")
        self._others = {n for n, _ in model.get_submodule(above).named_children()} - {decoder, architecture.head}
        self._other_stems = tuple(f"{above}.{name}.".removeprefix(".") for name in self._others)

    def find_all(self) -> dict[str, _Elements]:
        """Every parameter and stored buffer of the decoder, by its name in the model; CheckpointError if one lacks."""
        state = self._model.state_dict(keep_vars=True)
        wanted = {name: tensor for name, tensor in state.items() if not name.startswith(self._other_stems)}
        found = {}
        for name, tensor in wanted.items():
            tied = (other for other, kept in wanted.items() if kept is tensor and other != name)
            places = (self._find(candidate, tuple(tensor.shape)) for candidate in (name, *tied))
            stored = next(filter(None, places), None)
            if stored is None:
                raise self._missing(name, tuple(tensor.shape), suggest(name, self._weights.shapes))
            found[name] = _Elements(self._weights, tuple(tensor.shape), tensor.dtype, stored)
        self._refuse_others({name for elements in found.values() for name in elements.names})
        return found

    def _find(self, name: str, shape: tuple[int, ...]) -> tuple[str, ...] | None:
        """Tensors on disk that make up a parameter, in their order; None if they are not there."""
        shapes = self._weights.shapes
        for disk in self._names(name):
            if disk in shapes:
                return (self._checked(disk, shape),)
            stem, _, leaf = disk.rpartition(".")
            for parts in _EXPERTS.get(leaf, ()):
                if f"{stem}.0.{parts[0]}.weight" in shapes:
                    size = (shape[1] // len(parts), *shape[2:])
                    each = [f"{stem}.{expert}.{part}.weight" for expert in range(shape[0]) for part in parts]
                    return tuple(self._checked(one, size) for one in each)
        return None

    def _names(self, name: str) -> Iterator[str]:
        """What a parameter may be called on disk."""
        yield name
        known = self._architecture
        if name.startswith(f"{known.head}."):
            yield known.disk_head + name.removeprefix(known.head)
        if name.startswith(f"{self._stem}."):
            for layers in known.disk_layers:
                yield (layers.rpartition(".")[0] + name.removeprefix(self._stem)).removeprefix(".")
        if ".mlp." in name:
            yield name.replace(".mlp.", ".block_sparse_moe.")  # Mixtral

    def _checked(self, disk: str, shape: tuple[int, ...]) -> str:
        if disk not in self._weights.shapes:
            raise self._missing(disk, shape, "")
        stored = tuple(self._weights.shapes[disk])
        if stored != shape:
            raise CheckpointError(
                f"{self._weights.name}: tensor {disk!r} is {stored}, and config.json asks for {shape}; "
                "config.json does not belong to these weights"
            )
        return disk

    def _missing(self, name: str, shape: tuple[int, ...], near: str) -> CheckpointError:
        return CheckpointError(
            f"{self._weights.name}: no tensor {name!r}, for which config.json asks with shape {shape}{near}; "
            "the folder is incomplete, or config.json does not belong to these weights"
        )

    def _refuse_others(self, used: set[str]) -> None:
        """Parameters without a place mean a wrong config; stray buffers are harmless."""
        ignored = [re.compile(pattern) for pattern in self._model._keys_to_ignore_on_load_unexpected or ()]
        left = [
            name
            for name in self._weights.shapes
            if name.endswith((".weight", ".bias"))
            and name not in used
            and self._others.isdisjoint(name.split("."))
            and not any(pattern.search(name) for pattern in ignored)
        ]
        if left:
            raise CheckpointError(
                f"{self._weights.name}: config.json has no place for {len(left)} tensors of the weights, first "
                f"{left[0]!r}, so they would be left out; check model_type and the sizes in config.json"
            )
