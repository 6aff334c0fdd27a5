"""Which tensors a mixture has, and where each comes from: names of our own formats and of the standard ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from honeloom.checkpoint.architectures import Architecture

__all__ = ["Entry", "Names", "Trunk", "active_elements", "mixtral", "mixture", "models", "qwen_moe"]

Shape = tuple[int, ...]
SHARED_WIDTH = 32
"""Of the shared expert of zeros, where a format asks for one and there is none: the least that quantised files cut."""
_LAST = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the result.

    Attributes
    ----------
    name : str
        In the result.
    shape : tuple of int
        Its shape.
    origin : str
        "trunk", "experts.N", "shared", "encoder", "gate" or "zeros".
    tensor : str
        Its name there; of a gate "KEY/NAME".
    scale : float
        Multiplier.
    expert : int or None
        The expert that it is part of: not every token uses it.
    """

    name: str
    shape: Shape
    origin: str
    tensor: str = ""
    scale: float = 1.0
    expert: int | None = None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Names:
    """From names on disk to those of the modules, and to parts of layers."""

    architecture: Architecture

    def stock(self, name: str) -> str:
        """Name of a tensor in the transformers class."""
        known = self.architecture
        if name.startswith(f"{known.disk_head}."):
            return known.head + name.removeprefix(known.disk_head)
        stem = known.layers.rpartition(".")[0]
        for layers in known.disk_layers:
            disk = layers.rpartition(".")[0]
            if not disk and not name.startswith(f"{stem}."):
                return f"{stem}.{name}".removeprefix(".")
            if disk and name.startswith(f"{disk}."):
                return (stem + name.removeprefix(disk)).removeprefix(".")
        return name

    def layer(self, name: str) -> tuple[int, str] | None:
        """Layer and the rest of the name below it; None for what lies outside the layers. Takes a stock name."""
        found = re.match(rf"{re.escape(self.architecture.layers)}\.(\d+)\.(.+)", name)
        return (int(found[1]), found[2]) if found else None

    def unit(self, rest: str, level: str) -> tuple[str, str] | None:
        """Prefix of the routed unit within a layer and the name below it; None if the tensor belongs to no unit."""
        if level != "ffn":
            return "", rest
        mlp = f"{self.architecture.mlp}."
        return (mlp, rest.removeprefix(mlp)) if rest.startswith(mlp) else None


@dataclass(frozen=True, slots=True)
class Trunk:
    """What the result's tensors are named after.

    Attributes
    ----------
    names : Names
        Of its family.
    tensors : mapping
        Parameters on disk and their shapes, in their order.
    layers, dense : int
        Layers, and how many of the first stay dense.
    level : str
        ffn, block or model.
    experts : int
        How many.
    """

    names: Names
    tensors: Mapping[str, Shape]
    layers: int
    dense: int
    level: str
    experts: int

    def routed(self, name: str) -> tuple[int, str, str] | None:
        """Layer, prefix of the unit and name below it, for a stock name within a routed unit."""
        place = self.names.layer(name)
        if place is None or place[0] < self.dense:
            return None
        unit = self.names.unit(place[1], self.level)
        return (place[0], *unit) if unit else None

    def gates(self) -> list[int]:
        """Layers that have a gate."""
        return [self.dense] if self.level == "model" else list(range(self.dense, self.layers))


GateShapes = Mapping[str, Shape]
"""Tensors of one gate by their names below it."""


def mixture(trunk: Trunk, gate: GateShapes, *, shared: Mapping[str, Shape] | None) -> list[Entry]:
    """Tensors of a `honeloom_mixture`.

    Parameters
    ----------
    trunk : Trunk
        The base and the sizes.
    gate : mapping
        Tensors of every gate.
    shared : mapping, optional
        Tensors of the model that gives the shared expert, by the names they have in the base.
    """
    layers, placed, entries = trunk.names.architecture.layers, dict[int, None](), list[Entry]()
    for disk, shape in trunk.tensors.items():
        name = trunk.names.stock(disk)
        found = trunk.routed(name)
        if found is None:
            entries.append(Entry(f"trunk.{name}", shape, "trunk", disk))
            continue
        layer, prefix, rest = found
        stem = f"trunk.{layers}.{layer}.{prefix}"
        if layer not in placed and layer in trunk.gates():
            entries += _gate(f"{stem}gate.", str(layer), gate)
        placed[layer] = None
        entries += [Entry(f"{stem}experts.{e}.{rest}", shape, f"experts.{e}", disk, expert=e) for e in _all(trunk)]
        if shared is not None:
            entries.append(Entry(f"{stem}shared.{rest}", shared[disk], "shared", disk))
    return entries


def _all(trunk: Trunk) -> range:
    return range(trunk.experts)


def _gate(prefix: str, key: str, gate: GateShapes) -> list[Entry]:
    return [Entry(f"{prefix}{name}", shape, "gate", f"{key}/{name}") for name, shape in gate.items()]


def mixtral(trunk: Trunk, gate: GateShapes) -> list[Entry]:
    """Tensors of a Mixtral, by their classic names; a dense layer becomes one whose experts are all the base's."""
    entries, placed = list[Entry](), dict[int, None]()
    hidden = gate["weight"][1]
    for name, shape in trunk.tensors.items():
        place = trunk.names.layer(name)
        if place is None or not place[1].startswith("mlp."):
            entries.append(Entry(name, shape, "trunk", name))
            continue
        layer, dense = place[0], place[0] < trunk.dense
        stem = f"model.layers.{layer}.block_sparse_moe."
        if layer not in placed and dense:
            entries.append(Entry(f"{stem}gate.weight", (trunk.experts, hidden), "zeros"))
        elif layer not in placed:
            entries += _gate(f"{stem}gate.", str(layer), gate)
        placed[layer] = None
        leaf = _LAST[place[1].split(".")[1]]
        for e in _all(trunk):
            origin = "trunk" if dense else f"experts.{e}"
            entries.append(Entry(f"{stem}experts.{e}.{leaf}.weight", shape, origin, name, expert=e))
    return entries


def qwen_moe(trunk: Trunk, gate: GateShapes, *, shared: Mapping[str, Shape] | None = None, two: bool) -> list[Entry]:
    """Tensors of a Qwen MoE.

    Parameters
    ----------
    trunk, gate, shared
        As in `mixture`.
    two : bool
        Qwen 2: it has a shared expert, of zeros where none is given, and biases of queries, keys and values. Its gate
        of zeros halves the shared expert, so that one's last matrix is doubled.
    """
    entries, placed = list[Entry](), dict[int, None]()
    hidden = gate["weight"][1]
    for name, shape in trunk.tensors.items():
        found = trunk.routed(name)
        if found is None:
            entries.append(Entry(name, shape, "trunk", name))
            bias = f"{name.removesuffix('.weight')}.bias"
            if two and re.search(r"\.[qkv]_proj\.weight$", name) and bias not in trunk.tensors:
                entries.append(Entry(bias, shape[:1], "zeros"))
            continue
        layer, prefix, rest = found
        stem = f"model.layers.{layer}.{prefix}"
        if layer not in placed:
            entries += _gate(f"{stem}gate.", str(layer), gate)
            if two:
                entries.append(Entry(f"{stem}shared_expert_gate.weight", (1, hidden), "zeros"))
        placed[layer] = None
        entries += [Entry(f"{stem}experts.{e}.{rest}", shape, f"experts.{e}", name, expert=e) for e in _all(trunk)]
        if two:
            entries.append(_shared_part(f"{stem}shared_expert.{rest}", name, shape, shared))
    return entries


def _shared_part(name: str, disk: str, shape: Shape, shared: Mapping[str, Shape] | None) -> Entry:
    down = "down_proj" in disk
    if shared is not None:
        return Entry(name, shared[disk], "shared", disk, scale=2.0 if down else 1.0)
    return Entry(name, (shape[0], SHARED_WIDTH) if down else (SHARED_WIDTH, shape[1]), "zeros")


def models(
    experts: Sequence[tuple[Names, Mapping[str, Shape]]],
    encoder: tuple[Names, Mapping[str, Shape]] | None,
    layer: int,
    gate: GateShapes,
) -> list[Entry]:
    """Tensors of `honeloom_models`.

    Parameters
    ----------
    experts : sequence of (Names, mapping)
        Of every model its parameters on disk.
    encoder : (Names, mapping), optional
        Where the encoder is none of the experts.
    layer : int
        The last layer of the encoder that is read, -1 for none.
    gate : mapping
        Tensors of the gate.
    """
    entries = _gate("gate.", "", gate)
    for e, (names, tensors) in enumerate(experts):
        entries += [
            Entry(f"experts.{e}.{names.stock(disk)}", shape, f"experts.{e}", disk, expert=e)
            for disk, shape in tensors.items()
        ]
    if encoder is not None:
        names, tensors = encoder
        entries += [
            Entry(f"encoder.{names.stock(disk)}", tensors[disk], "encoder", disk)
            for disk in read_by_encoder(names, tensors, layer)
        ]
    return entries


def read_by_encoder(names: Names, tensors: Iterable[str], layer: int) -> Iterator[str]:
    """Embeddings, positions, and layers up to one, by their names on disk."""
    before = tuple(f"{stem}." for stem in (names.architecture.embeddings, names.architecture.positions) if stem)
    for disk in tensors:
        name = names.stock(disk)
        place = names.layer(name)
        read = place is not None and place[0] <= layer
        if read or name.startswith(before):
            yield disk


def active_elements(entries: Iterable[Entry], top_k: int, experts: int) -> int:
    """Weights that one token uses, an average over the experts."""
    shared = routed = 0
    for entry in entries:
        if entry.expert is None:
            shared += entry.elements
        else:
            routed += entry.elements
    return shared + routed * top_k // experts
