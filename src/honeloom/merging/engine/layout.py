"""The plan of a merge: every tensor of the result, what it is made of, and the settings that hold for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from honeloom.checkpoint.architectures import Architecture
from honeloom.checkpoint.headers import TensorInfo
from honeloom.checkpoint.layer_fields import Picked
from honeloom.config.methods import MethodConfig
from honeloom.errors import IncompatibleModelsError
from honeloom.merging.config import MergeMethodConfig, plan_settings
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.merge_config import MergeConfig, Slice, SliceSource, Source
from honeloom.merging.parameters import resolve, varies

__all__ = ["Part", "base_use", "layer_of", "picked_layers", "plan_parts"]


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the result.

    Attributes
    ----------
    name : str
        In the result.
    info : TensorInfo
        The donor's tensor: type and shape of the result.
    models : tuple of (str, str)
        Place of each source in the configuration, and the tensor's name in it.
    weights : tuple of float
        One per source.
    base : str or None
        The tensor's name in the base.
    settings : mapping
        Of the method, as numbers; a tuple holds one number per source.
    """

    name: str
    info: TensorInfo
    models: tuple[tuple[str, str], ...]
    weights: tuple[float, ...]
    base: str | None
    settings: Mapping[str, Any]


def plan_parts(
    config: MergeConfig, sources: Mapping[str, ModelSource], donor: ModelSource, architecture: Architecture
) -> list[Part]:
    """List the tensors of the result, in the donor's file order.

    Parameters
    ----------
    config : MergeConfig
        What to merge.
    sources : mapping
        Opened models by the place of their source in the configuration ("models.0"), and "base_model".
    donor : ModelSource
        Gives names, order and types.
    architecture : Architecture
        Tells layers from the rest.

    Raises
    ------
    IncompatibleModelsError
        A slice asks for layers that a model does not have, or leaves the base's layers open.
    """
    planner = _Planner(config, sources, donor, architecture)
    return list(planner.whole() if config.models else planner.sliced())


def picked_layers(config: MergeConfig, sources: Mapping[str, ModelSource]) -> Picked | None:
    """For every layer of the result the config of the model that it comes from first, and its number there.

    None where layers stay as they are.
    """
    if not config.slices:
        return None
    return [
        (sources[f"slices.{number}.sources.0"].config, layer)
        for number, part in enumerate(config.slices)
        for layer in range(*part.sources[0].layer_range)
    ]


@dataclass(slots=True)
class _Planner:
    config: MergeConfig
    sources: Mapping[str, ModelSource]
    donor: ModelSource
    architecture: Architecture
    _index: dict[str, dict[int, dict[str, str]]] = field(default_factory=dict)

    def whole(self) -> Iterator[Part]:
        """Every tensor from the tensors of the same name."""
        places = [(f"models.{i}", source) for i, source in enumerate(self.config.models)]
        layers = [layer for name in self.donor.tensors if (layer := self._layer(name)) is not None]
        last = max(layers, default=0)
        memo: dict[str, Any] = {}
        for name, info in self.donor.tensors.items():
            layer = self._layer(name)
            t = self._outside(name) if layer is None else (layer / last if last else 1.0)
            named = [(place, source, name) for place, source in places]
            yield self._part(name, info, named, name, t, {}, memo)

    def sliced(self) -> Iterator[Part]:
        """Layers one after another; what lies before them from the first slice, what follows from the last."""
        slices = self.config.slices
        prefix = self._prefix()
        for name, info in self._outer(before=True):
            yield self._outer_part(name, info, 0)
        out = 0
        for number, part in enumerate(slices):
            self._check_range(number, part)
            memo: dict[str, Any] = {}
            first, end = part.sources[0].layer_range
            base = self._base_layer(number, part)
            for i in range(end - first):
                t = i / (end - first - 1) if end - first > 1 else 1.0
                for rest, named, base_name in self._layer_names(number, part, i, base):
                    info = self.sources[named[0][0]].info(named[0][2])
                    yield self._part(f"{prefix}.{out}.{rest}", info, named, base_name, t, part.parameters, memo)
                out += 1
        for name, info in self._outer(before=False):
            yield self._outer_part(name, info, len(slices) - 1)

    def _outer_part(self, name: str, info: TensorInfo, number: int) -> Part:
        part = self.config.slices[number]
        named = [(f"slices.{number}.sources.{j}", s, name) for j, s in enumerate(part.sources)]
        return self._part(name, info, named, name, self._outside(name), part.parameters, {})

    def _part(
        self,
        name: str,
        info: TensorInfo,
        named: Sequence[tuple[str, Source, str]],
        base_name: str | None,
        t: float,
        overrides: Mapping[str, Any],
        memo: dict[str, Any],
    ) -> Part:
        use = base_use(self.config.method)
        own = self.sources.get("base_model") if use != "unused" else None
        # Listed among the models, the base has no task vector; as the start of an arc it comes first.
        kept = [n for n in named if self.sources[n[0]] is not own]
        weights, settings = self._resolved(kept, name, t, overrides, memo)
        models = tuple((place, tensor) for place, _, tensor in kept)
        has_base = own is not None and base_name is not None
        if has_base and use == "start":
            models, weights = (("base_model", str(base_name)), *models), (1.0, *weights)
        return Part(name, info, models, weights, base_name if has_base and use != "start" else None, settings)

    def _resolved(
        self,
        named: Sequence[tuple[str, Source, str]],
        name: str,
        t: float,
        overrides: Mapping[str, Any],
        memo: dict[str, Any],
    ) -> tuple[tuple[float, ...], Mapping[str, Any]]:
        """Weights and settings as numbers; computed once where nothing varies."""
        if "steady" in memo:
            found: tuple[tuple[float, ...], Mapping[str, Any]] = memo["steady"]
            return found
        method = self.config.method
        given = plan_settings(method)
        own = [source.own() for _, source, _ in named]
        weights = tuple(float(resolve(s.weight, name, t, 1.0) or 0.0) for _, s, _ in named)
        settings: dict[str, Any] = {}
        for key, value in given.items():
            shared = value
            if isinstance(value, float) or varies(value):
                fallback = resolve(value, name, t, _default(method, key))
                shared = resolve(overrides.get(key), name, t, fallback)
            mine = [resolve(o.get(key), name, t, shared) if key in o else shared for o in own]
            settings[key] = tuple(mine) if any(key in o for o in own) else shared
        values = [*given.values(), *overrides.values(), *(s.weight for _, s, _ in named)]
        values += [value for settings_ in own for value in settings_.values()]
        if not any(varies(v) for v in values):
            memo["steady"] = (weights, settings)
        return weights, settings

    def _layer(self, name: str) -> int | None:
        return layer_of(name, self.architecture)

    def _outside(self, name: str) -> float:
        """0 for what comes before the layers; 1 for what follows them, which mergekit counts as 0."""
        return 0.0 if self._is_before(name) or self.config.compat == "mergekit" else 1.0

    def _is_before(self, name: str) -> bool:
        paths = [self.architecture.embeddings, self.architecture.positions]
        leaves = tuple(f"{path.rpartition('.')[2]}.weight" for path in paths if path)
        return name.endswith(leaves)

    def _outer(self, *, before: bool) -> list[tuple[str, TensorInfo]]:
        tensors = self.donor.tensors.items()
        return [(n, i) for n, i in tensors if self._layer(n) is None and self._is_before(n) == before]

    def _prefix(self) -> str:
        """Of the layers' tensors in the result, as in the donor."""
        prefixes = self.architecture.disk_layers
        return next((p for p in prefixes if any(n.startswith(f"{p}.") for n in self.donor.tensors)), prefixes[0])

    def _layer_names(
        self, number: int, part: Slice, i: int, base: int | None
    ) -> Iterator[tuple[str, list[tuple[str, Source, str]], str | None]]:
        """Of every tensor of a slice's layer: its name within the layer, each source's name for it, and the base's."""
        places: list[tuple[str, SliceSource]] = [
            (f"slices.{number}.sources.{j}", source) for j, source in enumerate(part.sources)
        ]
        found = [self._names_in(self.sources[place], source.layer_range[0] + i) for place, source in places]
        origin = None if base is None else self._names_in(self.sources["base_model"], base + i)
        for (place, source), names in zip(places[1:], found[1:], strict=True):
            self._require_same(found[0], names, self.sources[place].name, source.layer_range[0] + i)
        if origin is not None:
            self._require_same(found[0], origin, self.sources["base_model"].name, (base or 0) + i)
        for rest in found[0]:
            named: list[tuple[str, Source, str]] = [
                (place, source, names[rest]) for (place, source), names in zip(places, found, strict=True)
            ]
            yield rest, named, None if origin is None else origin[rest]

    def _names_in(self, model: ModelSource, layer: int) -> dict[str, str]:
        """Names within a layer -> names on disk."""
        if model.name not in self._index:
            layers: dict[int, dict[str, str]] = {}
            for name in model.tensors:
                at = self._layer(name)
                if at is not None:
                    prefix = next(p for p in self.architecture.disk_layers if name.startswith(f"{p}.{at}."))
                    layers.setdefault(at, {})[name.removeprefix(f"{prefix}.{at}.")] = name
            self._index[model.name] = layers
        return self._index[model.name].get(layer, {})

    def _require_same(self, first: Mapping[str, str], other: Mapping[str, str], model: str, layer: int) -> None:
        odd = next((n for n in (*first, *other) if n not in first or n not in other), None)
        if odd is not None:
            has = "has" if odd in other else "lacks"
            raise IncompatibleModelsError(
                f"layer {layer} of {model} {has} {odd!r}, unlike the first source of its slice; layers that are merged "
                "must have the same tensors"
            )

    def _check_range(self, number: int, part: Slice) -> None:
        for j, source in enumerate(part.sources):
            model = self.sources[f"slices.{number}.sources.{j}"]
            layers = 1 + max((x for n in model.tensors if (x := self._layer(n)) is not None), default=-1)
            if source.layer_range[1] > layers:
                raise IncompatibleModelsError(
                    f"slices.{number}.sources.{j}: layer_range {list(source.layer_range)} of {model.name}, "
                    f"which has {layers} layers"
                )

    def _base_layer(self, number: int, part: Slice) -> int | None:
        """First layer of the base behind a slice: the range given for it, else that of all sources."""
        if "base_model" not in self.sources or base_use(self.config.method) == "unused":
            return None
        base = self.sources["base_model"]
        own = [
            s.layer_range[0] for j, s in enumerate(part.sources) if self.sources[f"slices.{number}.sources.{j}"] is base
        ]
        ranges = {s.layer_range[0] for s in part.sources}
        if not own and len(ranges) > 1:
            raise IncompatibleModelsError(
                f"slices.{number}: its sources have different layers, so the base's are not known; list base_model "
                "among them with its layer_range"
            )
        return own[0] if own else ranges.pop()


def base_use(method: MethodConfig) -> str:
    """What base_model is to a method: needed, allowed or unused, or the start of an arc."""
    return method.base if isinstance(method, MergeMethodConfig) else "allowed"


def _default(method: MethodConfig, key: str) -> float | None:
    """What a setting is where no filter matches: its default."""
    value = type(method).model_fields[key].default
    return value if isinstance(value, float) else None


def layer_of(name: str, architecture: Architecture) -> int | None:
    """Number of the layer that a tensor on disk belongs to; None for the rest."""
    for prefix in architecture.disk_layers:
        if name.startswith(f"{prefix}."):
            number = name[len(prefix) + 1 :].partition(".")[0]
            return int(number) if number.isdigit() else None
    return None
