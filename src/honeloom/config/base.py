"""The base of every settings class, and the marks that say which fields are inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from honeloom.errors import ConfigError
from honeloom.registry import suggest

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "AdaptersInput",
    "Attention",
    "Config",
    "Device",
    "Dtype",
    "EncoderInput",
    "FileInput",
    "InputField",
    "InputKind",
    "LoadIn",
    "ModelInput",
    "NoResultMark",
    "OptionalFileInput",
    "OptionalFolderInput",
    "OptionalModelInput",
    "OptionalScoresInput",
    "RowsConfig",
    "RowsInput",
    "ScoresInput",
    "Seed",
    "Split",
    "VerbConfig",
    "Withdrawn",
    "collect_inputs",
    "validate",
]


class Config(BaseModel):
    """Frozen settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


InputKind = Literal["model", "adapter", "rows", "folder", "file", "scores", "encoder"]


@dataclass(frozen=True, slots=True)
class InputMark:
    """Marks a field whose value names something to read, so that keys depend on its content."""

    kind: InputKind


@dataclass(frozen=True, slots=True)
class NoResultMark:
    """Marks a field that keys leave out: the result does not depend on it, or the fingerprints of inputs tell it."""


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str | Path):
        return (str(value),)
    return tuple(_as_text(v) for v in value) if isinstance(value, list | tuple) else value


ModelInput = Annotated[str, BeforeValidator(_as_text), InputMark("model")]
"""Hub id, id@revision, path or `lab:base`."""
OptionalFolderInput = Annotated[str | None, BeforeValidator(_as_text), InputMark("folder")]
"""A folder of small files whose content matters."""
FileInput = Annotated[str, BeforeValidator(_as_text), InputMark("file")]
"""One file whose content matters."""
OptionalFileInput = Annotated[str | None, BeforeValidator(_as_text), InputMark("file")]
EncoderInput = Annotated[str, BeforeValidator(_as_text), InputMark("encoder")]
"""Hub id of an encoder, or its folder, whose content then matters."""
ScoresInput = Annotated[str, BeforeValidator(_as_text), InputMark("scores")]
"""The scores of a selection: its folder, or the file itself."""
OptionalScoresInput = Annotated[str | None, BeforeValidator(_as_text), InputMark("scores")]
OptionalModelInput = Annotated[str | None, BeforeValidator(_as_text), InputMark("model")]
_ONE_OR_MORE = {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]}
RowsInput = Annotated[
    tuple[str, ...], BeforeValidator(_as_tuple), InputMark("rows"), WithJsonSchema(_ONE_OR_MORE, mode="validation")
]
"""Paths, globs, hub ids or `lab:pool|dev|test`; one string stands for a list of one."""
AdaptersInput = Annotated[
    tuple[str, ...], BeforeValidator(_as_tuple), InputMark("adapter"), WithJsonSchema(_ONE_OR_MORE, mode="validation")
]
"""PEFT adapter folders or hub ids, without their bases; one string stands for a list of one."""
_DEVICE = re.compile(r"^(auto|cpu|cuda|cuda:\d+|mps)$")


def _check_device(value: str) -> str:
    if not _DEVICE.match(value):
        raise ValueError("use auto, cpu, cuda, cuda:N (the GPU number N) or mps")
    return value


Device = Annotated[str, AfterValidator(_check_device), Field(json_schema_extra={"pattern": _DEVICE.pattern})]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
LoadIn = Annotated[
    Literal["4bit", "8bit"] | None,
    Field(
        description="Quantise the loaded weights with bitsandbytes (extra `quant`): 4bit is NF4, 8bit is LLM.int8()."
    ),
]
Attention = Annotated[
    Literal["sdpa", "flash", "eager"] | None,
    Field(description="Attention kernel; default: the model's own choice, sdpa where it can. flash needs CUDA."),
]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="Every random choice follows from it.")]


class VerbConfig(Config):
    """Settings shared by every verb that computes."""

    seed: Seed = 0
    device: Device = Field("auto", description="auto takes cuda, then mps, then cpu.")
    dtype: Dtype = Field("auto", description="Of the loaded weights; auto is bf16 on CUDA devices and fp32 elsewhere.")


def _as_range(value: Any) -> Any:
    """Accept "0.2-0.8" as on the command line."""
    if not isinstance(value, str):
        return value
    parts = value.split("-")
    if len(parts) != 2:
        raise ValueError(_SPLIT_FORM)
    return tuple(parts)


_SPLIT_FORM = "a split is START-STOP with 0 <= START < STOP <= 1, for example 0-0.8"


def _check_range(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] < value[1] <= 1:
        raise ValueError(_SPLIT_FORM)
    return value


_RANGE = {
    "anyOf": [
        {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "minItems": 2, "maxItems": 2},
        {"type": "string", "pattern": "^[0-9.]+-[0-9.]+$"},
    ]
}
Split = Annotated[tuple[float, float], BeforeValidator(_as_range), AfterValidator(_check_range), WithJsonSchema(_RANGE)]


DEFAULT_MAX_TOKENS = 2048
"""Tokens per row where nobody asked for more: memory grows with them, whatever the model can take."""


Withdrawn = Annotated[
    str | tuple[str, ...],
    NoResultMark(),
    Field(description="Rows that are not read, by id: a list, or a file with an id per line."),
]
"""The ids that an input really holds are part of its fingerprint, so only stages that read such a row run again."""


class RowsConfig(VerbConfig):
    """Settings shared by the verbs that read rows."""

    split: Split | None = Field(
        None,
        description="Only rows whose id lies in this part of [0, 1). The place of an id is its SHA-256 read from the "
        "last hex digit, so a row is on the same side in every file and every run.",
    )
    limit: int | None = Field(None, gt=0, description="Read only the first N rows.")
    strict: bool = Field(False, description="Stop at the first unusable row.")
    max_bad: float = Field(0.01, ge=0, le=1, description="Stop if more than this share of rows is unusable.")
    withdraw: Withdrawn = ()


@dataclass(frozen=True, slots=True)
class InputField:
    """One input of a config: its place ("models.0.model"), kind, and value."""

    place: str
    kind: InputKind
    value: str


def collect_inputs(config: BaseModel, prefix: str = "") -> Iterator[InputField]:
    """Yield every marked input of a config, in field order, nested configs included."""
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        mark = next((m for m in info.metadata if isinstance(m, InputMark)), None)
        if mark and value is not None:
            values = value if isinstance(value, tuple) else (value,)
            for i, item in enumerate(values):
                place = f"{prefix}{name}.{i}" if isinstance(value, tuple) else f"{prefix}{name}"
                yield InputField(place, mark.kind, item)
        elif isinstance(value, BaseModel):
            yield from collect_inputs(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from collect_inputs(item, f"{prefix}{name}.{i}.")


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def validate(cls: type[ConfigT], data: Mapping[str, Any], *, what: str) -> ConfigT:
    """Build `cls` from plain data; every problem is told in one ConfigError.

    Parameters
    ----------
    cls : type
        Settings class.
    data : mapping
        Plain values, for example from YAML.
    what : str
        What is being read ("recipe my.yaml, stage 'pick'"), for the message.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A list whose items are wrong counts as too short as well; only the items are worth telling.
        wrong = [p["loc"] for p in problems if p["type"] != "too_short"]
        told = [p for p in problems if p["type"] != "too_short" or all(w[: len(p["loc"])] != p["loc"] for w in wrong)]
        lines = [_describe(cls, problem) for problem in told]
        raise ConfigError(f"{what}: " + "\n  ".join(lines)) from None


def _describe(cls: type[BaseModel], problem: Any) -> str:
    """One line for one pydantic problem: the key as it is written, the value, what is allowed, the near miss."""
    kind, place = problem["type"], _written(cls, problem["loc"])
    value = problem.get("input")
    if kind == "extra_forbidden":
        known = _fields_at(cls, problem["loc"][:-1])
        name = str(problem["loc"][-1])
        return f"unknown key {place!r}{suggest(name, known)} (known: {', '.join(sorted(known))})"
    if kind == "union_tag_invalid":
        context = problem["ctx"]
        tags = [t.strip().strip("'") for t in context["expected_tags"].split(",")]
        return (
            f"{place}: unknown type {context['tag']!r}{suggest(str(context['tag']), tags)} (known: {', '.join(tags)})"
        )
    if kind == "missing":
        return f"missing key {place!r}{_meaning(cls, problem['loc'])}"
    if kind == "value_error":  # our own validators say all that is needed
        text = str(problem["ctx"]["error"])
        if not place:
            return text
        told = not isinstance(value, str | int | float) or repr(value) in text
        return f"{place}: {text}" + ("" if told else f" (got {value!r:.80})")
    text = problem["msg"].replace("Input should be", "must be", 1)
    if kind == "too_short":
        least = problem["ctx"]["min_length"]
        text = "must not be empty" if least == 1 else f"must have at least {least}"
    near = ""
    if kind == "literal_error":
        near = suggest(str(value), re.findall(r"'([^']+)'", problem["ctx"]["expected"]))
    return f"{place}: {text} (got {value!r:.80}){near}"


def _written(cls: type[BaseModel], loc: tuple[Any, ...]) -> str:
    """A place as a recipe writes it: pydantic's has the `type` of every choice between settings in it."""
    parts, current = [], [cls]
    for part in loc:
        following = [sub for c in current for sub in _subconfigs(c, str(part))]
        if not following and any(_tag(c) == str(part) for c in current):
            current = [c for c in current if _tag(c) == str(part)]
            continue
        current = following
        parts.append(str(part))
    return ".".join(parts)


def _meaning(cls: type[BaseModel], loc: tuple[Any, ...]) -> str:
    """What a missing key of the settings themselves stands for, where they say it."""
    info = cls.model_fields.get(str(loc[0])) if len(loc) == 1 else None
    return f" ({info.description.rstrip('.')})" if info and info.description else ""


def _fields_at(cls: type[BaseModel], loc: tuple[Any, ...]) -> set[str]:
    """Names allowed at a place; follows unions by their tag."""
    current: list[type[BaseModel]] = [cls]
    for part in loc:
        following = [sub for c in current for sub in _subconfigs(c, str(part))]
        current = following or [c for c in current if _tag(c) == str(part)] or current
    return {f for c in current for f in c.model_fields}


def _subconfigs(cls: type[BaseModel], name: str) -> list[type[BaseModel]]:
    from typing import get_args

    info = cls.model_fields.get(name)
    if info is None:
        return []
    found: list[type[BaseModel]] = []
    stack: list[Any] = [info.annotation]
    while stack:
        item = stack.pop()
        if isinstance(item, type) and issubclass(item, BaseModel):
            found.append(item)
        else:
            stack.extend(get_args(item))
    return found


def _tag(cls: type[BaseModel]) -> str | None:
    info = cls.model_fields.get("type")
    return str(info.default) if info else None
