"""What a server and its clients say to each other, and its form on the wire: one safetensors document.

Tensors are named `group|module|a` and `group|module|b`, or `array|name`; all else is JSON in the
document's metadata, without what is at its default. A document is checked against what was agreed
before a tensor of it is touched.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

import torch
from safetensors.torch import save

from honeloom.checkpoint.headers import DTYPE_BITS, Header, parse_header
from honeloom.errors import CheckpointError, MessageError
from honeloom.types.views import plain as plain_text

__all__ = [
    "PROTOCOL", "Arrays", "Factors", "Log", "Manifest", "TrainReply", "TrainTask", "decode_reply", "decode_task",
    "digest_of", "encode",
]  # fmt: skip

PROTOCOL = 2
"""Raised when messages change; server and clients of different numbers refuse each other."""
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Module -> b (m, r) and a (r, n)."""
Arrays = Mapping[str, torch.Tensor]
"""Name -> one dimension."""
Log = tuple[tuple[int, tuple[tuple[str, float, float], ...]], ...]
"""Rounds of zeroth-order steps: number, and of every client its name, share and learning rate."""
LARGEST, MOST_METRICS, MOST_ROWS, ERROR = 1e12, 64, 1 << 53, 500
"""Of what a reply tells beside its tensors: size of a number, numbers, rows, characters of an error."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ARRAY_DTYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}


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
        Of what the client holds from round to round, once this task is added to version `since`; 0 is none. That
        is the frozen additions, and with `follows` the shared factors.
    settings : mapping
        Steps, rows per step, learning rate, optimizer and the like.
    phase : str
        What is asked: to train, or a step of a protocol beside it, whose words are in `notes`.
    follows : bool
        Whether the client keeps the shared factors and moves them on by `log`.
    log : Log
        Rounds between `since` and `version`; their scalars are in the array `log`, one after the other.
    digest : str
        Of the shared factors at `version`, where the client follows.
    notes : mapping
        Of a protocol beside training.
    shared, frozen : Factors
        Scale 1: where to begin; additions to the base that are not trained.
    correction : Factors
        Added to every gradient (SCAFFOLD's c - c_i).
    arrays : Arrays
        `log`, as above; `pool`: (K,) float64, by how much the seeds of a pool have moved the start.
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
    phase: str = "train"
    follows: bool = False
    log: Log = ()
    digest: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    shared: Factors = field(default_factory=dict)
    frozen: Factors = field(default_factory=dict)
    correction: Factors = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)


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
        Of what it now holds.
    metrics : mapping
        Numbers: losses in nats per token, tokens, seconds.
    error : str or None
        Why there is no update.
    digest : str
        Of the factors that the scalars lead to; with a pool, of what the client began with.
    notes : mapping
        Of a protocol beside training.
    factors : Factors
        As the adapter holds them: the update is alpha / rank * b @ a.
    arrays : Arrays
        Instead of factors. `scalars`: float32, of zeroth-order steps, by step and direction. `pool`: (K,), by how
        much the client moved each seed of a pool. `masked`: the same under a mask, int64 bits.
    """

    experiment: str
    round: int
    client: str
    rows: int = 0
    version: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    digest: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    factors: Factors = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a reply may hold: factors of shapes (m, n) by module and of a rank, or arrays, and how many bytes.

    Attributes
    ----------
    modules, rank
        Of the factors; no modules: none.
    most_bytes : int
        Of the whole message.
    arrays : mapping
        Name -> (type as safetensors names it, length).
    notes : bool
        Whether the reply may tell something beside the numbers.
    """

    modules: Mapping[str, tuple[int, int]]
    rank: int
    most_bytes: int
    arrays: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    notes: bool = False

    @classmethod
    def of(cls, modules: Mapping[str, tuple[int, int]], rank: int) -> Manifest:
        """What a client of this rank sends in float32, and room for names."""
        numbers = sum(rank * (m + n) for m, n in modules.values())
        return cls(modules, rank, 4 * numbers + 1024 * (len(modules) + 64))

    @classmethod
    def of_arrays(cls, **arrays: tuple[str, int]) -> Manifest:
        """What a client sends that sends numbers instead of factors."""
        return cls({}, 0, sum(8 * count for _, count in arrays.values()) + 8192, arrays)

    @classmethod
    def of_notes(cls, most_bytes: int) -> Manifest:
        """What a client sends in a step of a protocol beside training."""
        return cls({}, 0, most_bytes, {}, True)


_GROUPS = {TrainTask: ("shared", "frozen", "correction"), TrainReply: ("factors",)}


def encode(message: TrainTask | TrainReply) -> bytes:
    """The message as bytes; equal messages are equal bytes."""
    groups = _GROUPS[type(message)]
    plain = {
        f.name: value
        for f in fields(message)
        if f.name not in (*groups, "arrays") and (value := getattr(message, f.name)) != _default(f)
    }
    if "metrics" in plain:  # always of one width: how long a client took must not show in the bytes it sends
        plain["metrics"] = {name: f"{value:+.8e}" for name, value in plain["metrics"].items()}
    tensors = {
        f"{group}|{module}|{factor}": tensor.detach().contiguous().cpu()
        for group in groups
        for module, pair in getattr(message, group).items()
        for factor, tensor in zip("ba", pair, strict=True)
    }
    tensors |= {f"array|{name}": tensor.contiguous().cpu() for name, tensor in message.arrays.items()}
    text = json.dumps({"protocol": PROTOCOL, **plain}, sort_keys=True, default=dict, separators=(",", ":"))
    data: bytes = save(tensors, metadata={"message": text})
    return data


def _default(known: Any) -> Any:
    if known.default_factory is not MISSING:
        return known.default_factory()
    return known.default


def decode_task(data: bytes) -> TrainTask:
    """Read a task; a client trusts its server with sizes, not with the form."""
    header, plain = _open(data, "task", None)
    if "log" in plain:
        plain["log"] = tuple((number, tuple((c, s, lr) for c, s, lr in moved)) for number, moved in plain["log"])
    return TrainTask(**plain, **_read(data, header, "task", _GROUPS[TrainTask], None))


def decode_reply(data: bytes, manifest: Manifest) -> TrainReply:
    """Read a reply that may be hostile.

    Raises
    ------
    MessageError
        It is larger than agreed, no sound document, of another protocol, or holds other tensors,
        shapes or types than agreed; nothing was allocated for its tensors.
    """
    try:
        header, plain = _open(data, "reply", manifest.most_bytes)
        reply = TrainReply(**plain, **_read(data, header, "reply", _GROUPS[TrainReply], manifest))
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:  # nothing that is sent may end a server
        raise MessageError(f"reply: not a message ({type(error).__name__}: {str(error)[:200]})") from None
    if reply.error is not None:
        return reply
    if lacking := sorted(set(manifest.modules) - set(reply.factors)):
        raise MessageError(f"reply: no factors for {len(lacking)} modules (first {lacking[0]!r})")
    if missing := sorted(set(manifest.arrays) - set(reply.arrays)):
        raise MessageError(f"reply: no {missing[0]}")
    if reply.notes and not manifest.notes:
        raise MessageError("reply: notes were not agreed")
    if odd := [n for n, t in reply.arrays.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]:
        raise MessageError(f"reply: its {odd[0]} hold NaN or infinity")
    return reply


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
    names = {name for name in kind.__slots__ if name not in (*_GROUPS[kind], "arrays")}
    if not isinstance(plain, dict) or plain.pop("protocol", None) != PROTOCOL:
        raise MessageError(f"{what}: not of protocol {PROTOCOL}; server and clients need the same version of honeloom")
    if not set(plain) <= names or not {"experiment", "round", "client"} <= set(plain):
        raise MessageError(f"{what}: {len(plain)} fields ({', '.join(sorted(plain))[:200]}), expected {sorted(names)}")
    _check_types(plain, what)
    return header, plain


def _check_types(plain: dict[str, Any], what: str) -> None:
    kinds: dict[str, Any] = {
        "experiment": str, "client": str, "round": int, "rank": int, "rows": int, "version": int, "since": int,
        "metrics": dict, "settings": dict, "notes": dict, "digest": str, "error": (str, type(None)), "phase": str,
        "alpha": (int, float), "start": str, "trains": str, "log": list,
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
    if len(metrics) > MOST_METRICS:
        raise MessageError(f"{what}: {len(metrics)} metrics, at most {MOST_METRICS} are taken")
    if large := [name for name, value in metrics.items() if abs(value) > LARGEST]:
        raise MessageError(
            f"{what}: {large[0]:.40} is {metrics[large[0]]:.3g}, at most {LARGEST:g} is taken; where it is a loss, "
            "lower lr"
        )
    if "metrics" in plain:
        plain["metrics"] = metrics
    for name in ("rows", "round", "version", "rank"):
        if not 0 <= plain.get(name, 0) <= MOST_ROWS:
            raise MessageError(f"{what}: {name} is {plain[name]!s:.20}")
    if plain.get("error") is not None:
        plain["error"] = plain_text(plain["error"])[:ERROR]


def _read(data: bytes, header: Header, what: str, groups: tuple[str, ...], manifest: Manifest | None) -> dict[str, Any]:
    """The tensors by group and module; every name and shape is checked before the first is read."""
    found: dict[str, dict[str, dict[str, Any]]] = {group: {} for group in groups}
    arrays = {}
    for info in header.tensors:
        parts = info.name.split("|")
        if len(parts) == 2 and parts[0] == "array":
            _check_array(info, parts[1], what, manifest)
            arrays[parts[1]] = info
            continue
        if len(parts) != 3 or parts[0] not in groups or parts[2] not in ("a", "b") or info.dtype not in _DTYPES:
            raise MessageError(f"{what}: tensor {info.name!r:.80} of type {info.dtype} was not agreed")
        if manifest is not None:
            _check_shape(info.name, info.shape, parts, manifest)
        found[parts[0]].setdefault(parts[1], {})[parts[2]] = info
    read: dict[str, Any] = {"arrays": {name: _tensor(data, header, info) for name, info in arrays.items()}}
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


def _check_array(info: Any, name: str, what: str, manifest: Manifest | None) -> None:
    agreed = manifest.arrays.get(name) if manifest is not None else (info.dtype, info.elements)
    if agreed is None:
        raise MessageError(f"{what}: array {name!r:.80} was not agreed")
    if info.dtype not in _ARRAY_DTYPES or len(info.shape) != 1 or (info.dtype, info.elements) != agreed:
        raise MessageError(
            f"{what}: {name} of {info.elements} numbers of type {info.dtype}, expected {agreed[1]} of {agreed[0]}"
        )


def _check_shape(name: str, shape: tuple[int, ...], parts: list[str], manifest: Manifest) -> None:
    _, module, factor = parts
    if module not in manifest.modules:
        raise MessageError(f"reply: tensor {name!r:.80} was not agreed")
    m, n = manifest.modules[module]
    wanted = (m, manifest.rank) if factor == "b" else (manifest.rank, n)
    if shape != wanted:
        raise MessageError(f"reply: {name!r:.80} has shape {shape}, expected {wanted}")


def _tensor(data: bytes, header: Header, info: Any) -> torch.Tensor:
    dtype = {**_DTYPES, **_ARRAY_DTYPES}[info.dtype]
    if not info.elements:
        return torch.empty(info.shape, dtype=dtype)
    assert DTYPE_BITS[info.dtype] % 8 == 0  # of those allowed
    flat = torch.frombuffer(bytearray(data[header.data_start + info.start : header.data_start + info.end]), dtype=dtype)
    return flat.view(info.shape)
