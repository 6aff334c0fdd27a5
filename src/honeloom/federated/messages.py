"""What a server and its clients say to each other, and its form on the wire: one safetensors document.

Tensors are named `group|module|a` and `group|module|b`; all else is JSON in the document's
metadata. A document is checked against what was agreed before a tensor of it is touched.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save

from honeloom.checkpoint.headers import DTYPE_BITS, Header, parse_header
from honeloom.errors import CheckpointError, MessageError
from honeloom.types.views import plain as plain_text

__all__ = [
    "PROTOCOL", "Factors", "Manifest", "TrainReply", "TrainTask", "decode_reply", "decode_task", "digest_of", "encode",
    "pack_scalars", "unpack_scalars",
]  # fmt: skip

PROTOCOL = 1
"""Raised when messages change; server and clients of different numbers refuse each other."""
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Module -> b (m, r) and a (r, n)."""
LARGEST, MOST_METRICS, MOST_ROWS, ERROR = 1e12, 64, 1 << 53, 500
"""Of what a reply tells beside its tensors: size of a number, numbers, rows, characters of an error."""
_HEX = re.compile("[0-9a-f]*")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class TrainTask:
    """What a client is asked to do in a round.

    Attributes
    ----------
    experiment : str
        Which federation; replies of another one are refused.
    round : int
        From 1.
    client : str
        Whom it is for.
    rank, alpha
        Of the client's adapter, whose scale is alpha / rank.
    start : {"fresh", "shared", "carry"}
        Draw A (for everybody alike where `alike`) and let B be zero; take the first `rank` columns
        of `shared`; or take them and keep the rest beside it, frozen.
    trains : {"both", "a", "b"}
        Which factors change.
    version : int
        Of the frozen additions, once `frozen` is added to those of version `since`; 0 is none.
    settings : mapping
        Steps, rows per step, learning rate, optimizer and the like.
    shared, frozen : Factors
        Scale 1: where to begin; additions to the base that are not trained.
    correction : Factors
        Added to every gradient (SCAFFOLD's c - c_i).
    """

    experiment: str
    round: int
    client: str
    rank: int
    alpha: float
    start: Literal["fresh", "shared", "carry"]
    trains: Literal["both", "a", "b"] = "both"
    alike: bool = False
    since: int = 0
    version: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    shared: Factors = field(default_factory=dict)
    frozen: Factors = field(default_factory=dict)
    correction: Factors = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class TrainReply:
    """What a client sends back.

    Attributes
    ----------
    experiment, round, client
        Of the task.
    rows : int
        How many rows the client has.
    version : int
        Of the frozen additions that it now holds.
    metrics : mapping
        Numbers: losses in nats per token, tokens, seconds.
    error : str or None
        Why there is no update.
    scalars : str
        Instead of factors: of zeroth-order steps, by step and direction, float32 as hex digits.
    digest : str
        Of the factors that the scalars lead to.
    factors : Factors
        As the adapter holds them: the update is alpha / rank * b @ a.
    """

    experiment: str
    round: int
    client: str
    rows: int = 0
    version: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    scalars: str = ""
    digest: str = ""
    factors: Factors = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a reply may hold: shapes (m, n) by module, rank, most bytes; or so many scalars, and no factors."""

    modules: Mapping[str, tuple[int, int]]
    rank: int
    most_bytes: int
    scalars: int = 0

    @classmethod
    def of_scalars(cls, modules: Mapping[str, tuple[int, int]], rank: int, count: int) -> Manifest:
        """What a client sends that sends the scalars of its steps alone."""
        return cls(modules, rank, 8 * count + 8192, count)

    @classmethod
    def of(cls, modules: Mapping[str, tuple[int, int]], rank: int) -> Manifest:
        """What a client of this rank sends in float32, and room for names."""
        numbers = sum(rank * (m + n) for m, n in modules.values())
        return cls(modules, rank, 4 * numbers + 1024 * (len(modules) + 64))


_GROUPS = {TrainTask: ("shared", "frozen", "correction"), TrainReply: ("factors",)}


def encode(message: TrainTask | TrainReply) -> bytes:
    """The message as bytes; equal messages are equal bytes."""
    groups = _GROUPS[type(message)]
    plain = {name: getattr(message, name) for name in type(message).__slots__ if name not in groups}
    if "metrics" in plain:  # always of one width: how long a client took must not show in the bytes it sends
        plain["metrics"] = {name: f"{value:+.17e}" for name, value in plain["metrics"].items()}
    tensors = {
        f"{group}|{module}|{factor}": tensor.detach().contiguous().cpu()
        for group in groups
        for module, pair in getattr(message, group).items()
        for factor, tensor in zip("ba", pair, strict=True)
    }
    text = json.dumps({"protocol": PROTOCOL, **plain}, sort_keys=True, default=dict)
    data: bytes = save(tensors, metadata={"message": text})
    return data


def decode_task(data: bytes) -> TrainTask:
    """Read a task; a client trusts its server with sizes, not with the form."""
    header, plain = _open(data, "task", None)
    return TrainTask(**plain, **_read(data, header, "task", _GROUPS[TrainTask], None))


def decode_reply(data: bytes, manifest: Manifest) -> TrainReply:
    """Read a reply that may be hostile.

    Raises
    ------
    MessageError
        It is larger than agreed, no sound document, of another protocol, or holds other tensors,
        shapes or types than agreed; nothing was allocated for its tensors.
    """
    header, plain = _open(data, "reply", manifest.most_bytes)
    reply = TrainReply(**plain, **_read(data, header, "reply", _GROUPS[TrainReply], manifest))
    if manifest.scalars and reply.error is None:
        _check_scalars(reply, manifest.scalars)
    elif reply.error is None and set(reply.factors) != set(manifest.modules):
        lacking = sorted(set(manifest.modules) - set(reply.factors))
        raise MessageError(f"reply: no factors for {len(lacking)} modules (first {lacking[0]!r})")
    return reply


def _check_scalars(reply: TrainReply, count: int) -> None:
    if reply.factors or len(reply.scalars) != 8 * count or not _HEX.fullmatch(reply.scalars):
        raise MessageError(
            f"reply: {len(reply.scalars) // 8} scalars and {len(reply.factors)} factors, expected {count} and none"
        )
    if not np.isfinite(unpack_scalars(reply.scalars)).all():
        raise MessageError("reply: its scalars hold NaN or infinity")


def pack_scalars(scalars: Sequence[Sequence[float]]) -> str:
    """Numbers by step and direction as hex digits of float32, eight each."""
    return np.array(scalars, dtype="<f4").tobytes().hex()


def unpack_scalars(text: str) -> npt.NDArray[np.float32]:
    """One dimension, in the order of `pack_scalars`."""
    return np.frombuffer(bytes.fromhex(text), dtype="<f4")


def digest_of(factors: Factors) -> str:
    """Sixteen hex digits over names and bits, by which two sides compare what they have."""
    found = hashlib.sha256()
    for module, pair in sorted(factors.items()):
        for tensor in pair:
            found.update(module.encode() + tensor.float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _open(data: bytes, what: str, most: int | None) -> tuple[Header, dict[str, Any]]:
    if most is not None and len(data) > most:
        raise MessageError(f"{what}: {len(data):,} bytes, and at most {most:,} were agreed")
    try:
        header = parse_header(data, what=what)
        plain = json.loads(header.metadata["message"])
    except (CheckpointError, KeyError, ValueError, RecursionError) as error:
        raise MessageError(f"{what}: not a message ({error})") from None
    kind = TrainTask if what == "task" else TrainReply
    names = {name for name in kind.__slots__ if name not in _GROUPS[kind]}
    if not isinstance(plain, dict) or plain.pop("protocol", None) != PROTOCOL:
        raise MessageError(f"{what}: not of protocol {PROTOCOL}; server and clients need the same version of honeloom")
    if not set(plain) <= names or not {"experiment", "round", "client"} <= set(plain):
        raise MessageError(f"{what}: {len(plain)} fields ({', '.join(sorted(plain))[:200]}), expected {sorted(names)}")
    _check_types(plain, what)
    return header, plain


def _check_types(plain: dict[str, Any], what: str) -> None:
    kinds: dict[str, Any] = {
        "experiment": str, "client": str, "round": int, "rank": int, "rows": int, "version": int, "since": int,
        "metrics": dict, "settings": dict, "scalars": str, "digest": str, "error": (str, type(None)),
        "alpha": (int, float),
    }  # fmt: skip
    for name, value in plain.items():
        if name in kinds and (not isinstance(value, kinds[name]) or isinstance(value, bool)):
            raise MessageError(f"{what}: {name} is {value!r:.40}")
    try:
        metrics = {str(name): float(value) for name, value in plain.get("metrics", {}).items()}
    except (TypeError, ValueError, ArithmeticError):
        raise MessageError(f"{what}: metrics hold something that is no number") from None
    if not all(math.isfinite(value) for value in metrics.values()):
        raise MessageError(f"{what}: metrics hold NaN or infinity")
    if any(abs(value) > LARGEST for value in metrics.values()) or len(metrics) > MOST_METRICS:
        raise MessageError(f"{what}: {len(metrics)} metrics, at most {MOST_METRICS} of at most {LARGEST:g} are taken")
    if "metrics" in plain:
        plain["metrics"] = metrics
    if not 0 <= plain.get("rows", 0) <= MOST_ROWS:
        raise MessageError(f"{what}: rows is {plain['rows']:.3g}" if plain["rows"] < 1e300 else f"{what}: rows is huge")
    if plain.get("error") is not None:
        plain["error"] = plain_text(plain["error"])[:ERROR]


def _read(data: bytes, header: Header, what: str, groups: tuple[str, ...], manifest: Manifest | None) -> dict[str, Any]:
    """The tensors by group and module; every name and shape is checked before the first is read."""
    found: dict[str, dict[str, dict[str, Any]]] = {group: {} for group in groups}
    for info in header.tensors:
        parts = info.name.split("|")
        if len(parts) != 3 or parts[0] not in groups or parts[2] not in ("a", "b") or info.dtype not in _DTYPES:
            raise MessageError(f"{what}: tensor {info.name!r:.80} of type {info.dtype} was not agreed")
        if manifest is not None:
            _check_shape(info.name, info.shape, parts, manifest)
        found[parts[0]].setdefault(parts[1], {})[parts[2]] = info
    read: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for group, modules in found.items():
        read[group] = {}
        for module, pair in modules.items():
            if set(pair) != {"a", "b"}:
                raise MessageError(f"{what}: {group} of {module!r:.80} has one factor")
            b, a = (_tensor(data, header, pair[factor]) for factor in "ba")
            if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
                raise MessageError(
                    f"{what}: factors {tuple(b.shape)} and {tuple(a.shape)} of {module!r:.80} do not fit"
                )
            read[group][module] = (b, a)
    return read


def _check_shape(name: str, shape: tuple[int, ...], parts: list[str], manifest: Manifest) -> None:
    _, module, factor = parts
    if module not in manifest.modules:
        raise MessageError(f"reply: tensor {name!r:.80} was not agreed")
    m, n = manifest.modules[module]
    wanted = (m, manifest.rank) if factor == "b" else (manifest.rank, n)
    if shape != wanted:
        raise MessageError(f"reply: {name!r:.80} has shape {shape}, expected {wanted}")


def _tensor(data: bytes, header: Header, info: Any) -> torch.Tensor:
    if not info.elements:
        return torch.empty(info.shape, dtype=_DTYPES[info.dtype])
    assert DTYPE_BITS[info.dtype] % 8 == 0  # of those allowed
    flat = torch.frombuffer(
        bytearray(data[header.data_start + info.start : header.data_start + info.end]), dtype=_DTYPES[info.dtype]
    )
    return flat.view(info.shape)
