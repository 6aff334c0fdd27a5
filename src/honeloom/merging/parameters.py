"""Settings that vary: one number, a gradient over the layers, or other values for some tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, PlainValidator, WithJsonSchema

from honeloom.config.base import Config

__all__ = ["Bounded", "Filtered", "Varying", "numbers", "resolve", "varies", "varying_fields"]


class Filtered(Config):
    """A value for the tensors whose name contains `filter`."""

    filter: str | None = None
    value: float | tuple[float, ...]


def _parse(value: Any) -> Any:
    """One of the three forms; a number at the end of a list of filters stands for every other tensor."""
    if isinstance(value, Filtered):
        return value
    if isinstance(value, dict):
        unknown = sorted(set(value) - {"filter", "value"})
        if unknown or "value" not in value:
            raise ValueError(f"{value!r:.80} must be {{filter: part of a tensor's name, value: number}}")
        return Filtered(filter=value.get("filter"), value=_plain(value["value"]))
    if isinstance(value, list | tuple) and any(isinstance(v, dict | Filtered) for v in value):
        items = [v if isinstance(v, dict | Filtered) else {"filter": "*", "value": v} for v in value]
        return tuple(_parse(item) for item in items)
    return _plain(value)


def _plain(value: Any) -> float | tuple[float, ...]:
    if isinstance(value, list | tuple):
        return tuple(_number(item) for item in value)
    return _number(value)


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{value!r:.80} must be a finite number, a list of anchors, or a list of {{filter, value}}")
    return number


_NUMBERS = {"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}]}
_FILTER = {"type": "object", "properties": {"filter": {"type": "string"}, "value": _NUMBERS}, "required": ["value"]}
_SCHEMA = {"anyOf": [*_NUMBERS["anyOf"], {"type": "array", "items": {"anyOf": [_FILTER, {"type": "number"}]}}]}
_PARSER = PlainValidator(_parse)
Varying = Annotated[Any, _PARSER, WithJsonSchema(_SCHEMA, mode="validation")]
"""One number; a list of anchors, interpolated over the layers; or a list of {filter, value}, the first match counts."""


def varying_fields(settings: type[BaseModel]) -> frozenset[str]:
    """Fields of a settings class that may vary over layers and tensors."""
    return frozenset(name for name, info in settings.model_fields.items() if _PARSER in info.metadata)


def numbers(value: Any) -> Iterable[float]:
    """Every number that a setting can come to lies between these."""
    if isinstance(value, Filtered):
        yield from numbers(value.value)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from numbers(item)
    elif value is not None:
        yield float(value)


def Bounded(*, ge: float | None = None, gt: float | None = None, le: float | None = None) -> AfterValidator:
    """Check every number of a varying setting."""

    def check(value: Any) -> Any:
        if isinstance(value, tuple) and not value:
            raise ValueError("an empty list gives no value; write a number, anchors or filters")
        for number in numbers(value):
            below = (ge is not None and number < ge) or (gt is not None and number <= gt)
            if below or (le is not None and number > le) or not math.isfinite(number):
                low = f"at least {ge:g}" if ge is not None else f"above {gt:g}" if gt is not None else ""
                high = f"at most {le:g}" if le is not None else ""
                raise ValueError(f"{number:g} must be {' and '.join(filter(None, (low, high))) or 'finite'}")
        return value

    return AfterValidator(check)


def varies(value: Any) -> bool:
    """Whether a setting has other values in other layers or tensors."""
    return isinstance(value, tuple)


def resolve(value: Any, tensor: str, t: float, default: float | None = None) -> float | None:
    """The number that a varying setting comes to.

    Parameters
    ----------
    value : float, sequence of float, sequence of Filtered, or None
        The setting.
    tensor : str
        Name of the tensor in the result.
    t : float
        Where it lies: 0 in the first layer (and the embeddings), 1 in the last (and the head).
    default : float, optional
        If no filter matches, or the value is None.

    Returns
    -------
    float or None
        Anchors are interpolated linearly, the first at t = 0 and the last at t = 1.
    """
    if value is None:
        return default
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value[0], Filtered):
        match = next((f for f in value if f.filter in (None, "*") or f.filter in tensor), None)
        return default if match is None else resolve(match.value, tensor, t, default)
    return interpolate(value, t)


def interpolate(anchors: Sequence[float], t: float) -> float:
    """Value at t of a line through anchors spread evenly over [0, 1]."""
    place = t * (len(anchors) - 1)
    low = min(int(place), len(anchors) - 1)
    high = min(low + 1, len(anchors) - 1)
    share = place - low
    return anchors[low] if share == 0 else (1 - share) * anchors[low] + share * anchors[high]
