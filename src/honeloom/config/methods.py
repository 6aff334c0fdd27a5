"""Fields that name a method: "length", {type: length, order: shortest}, or settings of the default method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from honeloom.config.base import Config
from honeloom.errors import UnknownNameError
from honeloom.registry import family, suggest

__all__ = ["FamilyMethod", "MethodConfig", "default_type"]


class MethodConfig(Config):
    """Settings of one method; `type` is its name in the registry.

    A selection method says which of `model`, `target` and `budget` it needs from the settings
    of `select`, and which it can also use.
    """

    type: str

    def needs(self) -> frozenset[str]:
        """What must be given beside the rows."""
        return frozenset()

    def uses(self) -> frozenset[str]:
        """What may be given, and changes the result."""
        return frozenset()

    def tunes(self) -> tuple[int, int] | None:
        """Rank and rows per step of the LoRA tunings it makes, which then are the peak of memory; None for none."""
        return None


def default_type(name: str) -> BeforeValidator:
    """Let a name alone stand for {type: name}, and settings without `type` for those of `name`."""
    return BeforeValidator(lambda value: _with_type(value, name))


def _with_type(value: Any, default: str) -> Any:
    if isinstance(value, str):
        return {"type": value}
    return {"type": default, **value} if isinstance(value, dict) else value


@dataclass(frozen=True)
class FamilyMethod:
    """Marks a field as any method of a family, plug-ins included.

    The settings class is found in the registry when a value is read, so a plug-in's settings
    are checked as strictly as our own.
    """

    kind: str
    default: str

    def _parse(self, value: Any) -> Any:
        value = _with_type(value, self.default)
        if not isinstance(value, dict):
            return value
        try:
            cls: type[BaseModel] = family(self.kind).load_config(value["type"])
        except UnknownNameError as error:
            raise ValueError(str(error)) from None
        unknown = sorted(set(value) - set(cls.model_fields))
        if unknown:
            known = sorted(set(cls.model_fields) - {"type"})
            raise ValueError(
                f"method {value['type']!r} has no setting {unknown[0]!r}{suggest(unknown[0], known)} "
                f"(known: {', '.join(known) or 'none'})"
            )
        return cls.model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._parse, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        registry = family(self.kind)
        settings = [_inlined(registry.load_config(name).model_json_schema()) for name in registry.names()]
        return {"anyOf": [{"type": "string", "enum": registry.names()}, *settings]}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema whose references to its own definitions are replaced by them, so that it can stand within another."""
    definitions = schema.pop("$defs", {})

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        reference = node.get("$ref", "")
        if reference.startswith("#/$defs/"):
            beside = {k: walk(v) for k, v in node.items() if k != "$ref"}
            return {**walk(definitions[reference.removeprefix("#/$defs/")]), **beside}
        return {k: walk(v) for k, v in node.items() if k != "discriminator"}

    inlined: dict[str, Any] = walk(schema)
    return inlined
