"""Where the attention and the MLP of every decoder layer are, and modules that add nothing in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from honeloom.backends.hf.dropped_model import NoAttention, NoMlp

__all__ = [
    "HALVES", "Half", "Sublayers", "Undo", "evaluating", "inner_model", "layer_list", "put_back", "stream_of", "swap",
    "swapped",
]  # fmt: skip

Half = Literal["attention", "mlp"]
HALVES: tuple[Half, Half] = ("attention", "mlp")
Undo = list[tuple[nn.Module, str, nn.Module]]
"""Layer, path within it, and the module that was there."""


@dataclass(frozen=True, slots=True)
class Sublayers:
    """Where a loaded model keeps its halves, as the probe has seen it.

    Attributes
    ----------
    layers : str
        Module path of the list of decoder layers, of the model without its adapters.
    attention, mlp : tuple of str
        Modules within a layer; an MLP may be two linear layers.
    attention_norms, mlp_norms : tuple of str
        Modules within a layer that only the one half reads.
    mid_stream : str or None
        Module within a layer whose input is the stream between attention and MLP; None if both read the same
        stream.
    attention_outputs, mlp_outputs : tuple of int
        Per layer: how many values the half returns.
    without_attention, without_mlp : tuple of int
        Layers that lack the half.
    """

    layers: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    attention_norms: tuple[str, ...] = ()
    mlp_norms: tuple[str, ...] = ()
    mid_stream: str | None = None
    attention_outputs: tuple[int, ...] = ()
    mlp_outputs: tuple[int, ...] = ()
    without_attention: tuple[int, ...] = ()
    without_mlp: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Number of layers."""
        return len(self.attention_outputs)

    def of(self, half: Half) -> tuple[str, ...]:
        """Modules of a half within a layer."""
        return self.attention if half == "attention" else self.mlp

    def norms(self, half: Half) -> tuple[str, ...]:
        """Modules that only the half reads."""
        return self.attention_norms if half == "attention" else self.mlp_norms

    def without(self, half: Half) -> tuple[int, ...]:
        """Layers that lack the half."""
        return self.without_attention if half == "attention" else self.without_mlp

    def outputs(self, half: Half, layer: int) -> int:
        """How many values the half of a layer returns."""
        return (self.attention_outputs if half == "attention" else self.mlp_outputs)[layer]


def inner_model(model: Any) -> Any:
    """The model without its adapters' wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layer_list(model: Any, where: Sublayers) -> Sequence[Any]:
    """The decoder layers of a model that was located."""
    layers: Sequence[Any] = inner_model(model).get_submodule(where.layers)
    return layers


def stream_of(output: Any) -> torch.Tensor:
    """The stream in what a layer or a half returns: the first value of a tuple, or all there is."""
    stream: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return stream


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Within it, dropout is off and numbers are those of the weights' own type."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for module, was in training:
            module.training = was


def swap(layer: nn.Module, where: Sublayers, i: int, half: Half, *, norms: bool) -> Undo:
    """Put modules that add nothing in the place of a half; returns what was there."""
    undo: Undo = []
    for path in where.of(half):
        old = layer.get_submodule(path)
        if isinstance(old, NoAttention | NoMlp):
            continue
        outputs = where.outputs(half, i)
        new = NoAttention(old) if half == "attention" and outputs == 2 else NoMlp(old, outputs)
        undo.append((layer, path, old))
        layer.set_submodule(path, new)
    for path in where.norms(half) if norms else ():
        undo.append((layer, path, layer.get_submodule(path)))
        layer.set_submodule(path, nn.Identity())
    return undo


def put_back(undo: Undo) -> None:
    """Undo `swap`."""
    for layer, path, module in reversed(undo):
        layer.set_submodule(path, module)


@contextmanager
def swapped(
    layer: nn.Module, where: Sublayers, i: int, halves: Sequence[Half], *, norms: bool = False
) -> Iterator[None]:
    """Within it, layer i lacks halves; caches are not told, so it is for passes without one."""
    undo: Undo = []
    try:
        for half in halves:
            undo += swap(layer, where, i, half, norms=norms)
        yield
    finally:
        put_back(undo)
