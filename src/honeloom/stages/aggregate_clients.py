"""The adapters that `aggregate` reads: opened, compared, and read module by module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from honeloom.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoraFile
from honeloom.checkpoint.dtypes import FLOAT_DTYPES
from honeloom.checkpoint.writer import TensorStream
from honeloom.errors import CheckpointError, IncompatibleModelsError, NotFiniteError, SourceError
from honeloom.federated.config import AggregateConfig
from honeloom.merging.compatibility import compare_tokenizers
from honeloom.merging.engine.streaming import CHUNK
from honeloom.merging.linear import weighted_sum
from honeloom.ops.rounding import round_once
from honeloom.runs.manifest import sha256_file
from honeloom.stages.inputs import adapter_base, resolve_model
from honeloom.stages.work import Work
from honeloom.types.updates import Part

__all__ = ["Client", "averaged_streams", "bytes_of", "check_clients", "module_names", "open_clients", "read_parts"]

_MUST_AGREE = ("bias", "fan_in_fan_out", "modules_to_save", "task_type")


@dataclass(frozen=True, slots=True)
class Client:
    """One adapter: its place among those given, name, share of the whole, the multiplier on all, and factors."""

    place: int
    name: str
    share: float
    scale: float
    file: LoraFile

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(self.file.weights.info(f.a_name).shape[0] for f in self.file.factors.values())

    @property
    def base(self) -> str | None:
        """The base model that the adapter names."""
        return adapter_base(self.file.folder)


def open_clients(work: Work[AggregateConfig], stack: ExitStack) -> list[Client]:
    """Open the adapters in an order that only their contents decide, so that no byte depends on how they are listed."""
    keyed = []
    for place, share in enumerate(work.config.shares()):
        found = work.inputs[f"adapters.{place}"]
        file = stack.enter_context(LoraFile(found.paths[0]))
        if not file.factors:
            raise CheckpointError(f"{found.value}: {ADAPTER_WEIGHTS} holds no LoRA factors; nothing can be aggregated")
        digests = [sha256_file(file.folder / name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)]
        keyed.append(((*digests, share, place), Client(place, found.label, share, work.config.scale, file)))
    return [client for _, client in sorted(keyed, key=lambda pair: pair[0])]


def module_names(clients: Sequence[Client]) -> list[str]:
    """Every module that some client has factors for, sorted."""
    return sorted({module for client in clients for module in client.file.factors})


def check_clients(work: Work[AggregateConfig], clients: Sequence[Client]) -> None:
    """Refuse adapters of different models or kinds before any weight is read; say where tokenizers differ.

    Raises
    ------
    IncompatibleModelsError
        Two differ in base model, in a module's shape, or in a setting that changes what the tensors mean; or their
        update is to be multiplied and they hold whole tensors, whose change cannot be told from them alone.
    """
    if "into_base" not in work.inputs:  # a base takes none but copies of its own
        _check_scale(clients)
    first = clients[0]
    for other in clients[1:]:
        for key in _MUST_AGREE:
            one, two = (_plain(client.file.config.get(key)) for client in (first, other))
            if one != two:
                raise IncompatibleModelsError(
                    f"cannot aggregate {first.name} with {other.name}: {key} is {one!r} and {two!r}; "
                    "all adapters must be tuned with the same one"
                )
    for module in module_names(clients):
        holders = [client for client in clients if module in client.file.factors]
        shapes = [client.file.factors[module].shape for client in holders]
        odd = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
        if odd is not None:
            raise IncompatibleModelsError(
                f"cannot aggregate {holders[0].name} (of {holders[0].base}) with {holders[odd].name} (of "
                f"{holders[odd].base}): the update of {module!r} is {shapes[0]} and {shapes[odd]}; "
                "they were tuned on different models"
            )
    _check_bases(work, clients)
    folders = {client.name: client.file.folder for client in clients}
    for finding in compare_tokenizers(folders, by_token=False, template_chosen=True):
        work.log.warn(finding)


def _check_scale(clients: Sequence[Client]) -> None:
    """A whole tensor is base plus change: a multiple of the change needs the base, which is not read."""
    found = next(((client, name) for client in clients for name in client.file.others), None)
    if found is not None and found[0].scale != 1:
        client, name = found
        raise IncompatibleModelsError(
            f"cannot aggregate with scale {client.scale:g}: {client.name} holds {name!r}, a whole tensor and no "
            "factors, which can only be averaged; leave --scale out, or tune without modules_to_save and trained biases"
        )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value or None


def _check_bases(work: Work[AggregateConfig], clients: Sequence[Client]) -> None:
    """The adapters' bases must be one model: by name, or by content where both are here."""
    known = [client for client in clients if client.base]
    if unknown := [client.name for client in clients if not client.base]:
        work.log.warn(f"{', '.join(unknown)}: no base model is named in {ADAPTER_CONFIG}; only sizes were compared")
    for other in known[1:]:
        if not _same_model(str(known[0].base), str(other.base)):
            raise IncompatibleModelsError(
                f"cannot aggregate {known[0].name} with {other.name}: their base models are {known[0].base!r} and "
                f"{other.base!r}. If they are one model, write the same base_model_name_or_path into both "
                f"{ADAPTER_CONFIG}"
            )
    target = work.inputs.get("into_base")
    if target is not None and known and not _same_model(str(known[0].base), target.value):
        work.log.warn(
            f"the adapters name {known[0].base!r} as their base, and {target.value!r} is not known to be the same model"
        )


def _same_model(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return len({resolve_model(name, fetch=False).fingerprint for name in (one, other)}) == 1
    except (SourceError, CheckpointError):
        return False


def read_parts(clients: Sequence[Client], module: str, dtype: torch.dtype | None = None) -> list[Part]:
    """Read every client's update of a module times the multiplier, in `dtype` if given; rank 0 where a client has none.

    Raises
    ------
    NotFiniteError
        A factor holds NaN or infinity; the message names file and tensor.
    """
    rows, columns = next(c.file.factors[module].shape for c in clients if module in c.file.factors)
    parts = []
    for client in clients:
        factors = client.file.factors.get(module)
        if factors is None:
            parts.append(Part(torch.zeros(rows, 0), torch.zeros(0, columns), 1.0, client.share))
            continue
        b, a = (_read(client, name, dtype) for name in (factors.b_name, factors.a_name))
        parts.append(Part(b, a, factors.scale * client.scale, client.share))
    return parts


def _read(client: Client, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    _require_float(client, name)
    tensor = client.file.weights.read(name, dtype)
    _require_finite(client, name, tensor)
    return tensor


def _require_float(client: Client, name: str) -> None:
    info = client.file.weights.info(name)
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{client.file.folder / ADAPTER_WEIGHTS}: tensor {name!r} is {info.dtype}; "
            f"only {', '.join(sorted(FLOAT_DTYPES))} can be aggregated"
        )


def _require_finite(client: Client, name: str, tensor: torch.Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        first = int((~torch.isfinite(tensor)).view(-1).nonzero()[0])
        raise NotFiniteError(
            f"{client.file.folder / ADAPTER_WEIGHTS}: tensor {name!r} holds NaN or infinity (element {first}); "
            "the adapter is damaged: leave it out, or tune it again"
        )


def averaged_streams(clients: Sequence[Client], dtype: torch.dtype) -> list[TensorStream]:
    """Weighted averages of the tensors that are no factors: saved modules, biases, copies of embeddings.

    As every client has the whole tensor, its average is the base's plus the weighted sum of changes.

    Raises
    ------
    CheckpointError
        One client lacks such a tensor, its shapes differ, or it is of an unknown kind.
    """
    names = sorted({name for client in clients for name in client.file.others})
    streams = []
    for name in names:
        holders = [client for client in clients if name in client.file.others]
        if ".lora_" in name:
            raise CheckpointError(f"{holders[0].name}: tensor {name!r} is no LoRA factor that adds up; it is not read")
        if len(holders) < len(clients):
            lacks = next(client for client in clients if client not in holders)
            raise CheckpointError(
                f"{lacks.name} has no tensor {name!r}, which {holders[0].name} holds; whole tensors are averaged, "
                "and that takes one from every adapter"
            )
        shapes = list(dict.fromkeys(client.file.weights.info(name).shape for client in clients))
        if len(shapes) > 1:
            raise IncompatibleModelsError(f"tensor {name!r} has shapes {shapes} in the adapters; they must be equal")
        for client in clients:
            _require_float(client, name)
        streams.append(TensorStream(name, dtype, shapes[0], partial(_average, clients, name, dtype)))
    return streams


def _average(clients: Sequence[Client], name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    count = math.prod(clients[0].file.weights.info(name).shape)
    for start in range(0, count, CHUNK):
        pieces = [c.file.weights.read_slice(name, start, min(count, start + CHUNK), torch.float64) for c in clients]
        for client, piece in zip(clients, pieces, strict=True):
            _require_finite(client, name, piece)
        yield round_once(weighted_sum(pieces, [client.share for client in clients]), dtype)


def bytes_of(file: LoraFile) -> int:
    """Bytes of an adapter's tensors: what it takes to send it."""
    infos = [file.weights.info(name) for name in file.weights.names()]
    return sum(info.end - info.start for info in infos)
