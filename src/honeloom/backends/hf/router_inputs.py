"""What a router will receive: the inputs of MLPs or layers of a model, for prompts and rows.

Rows pass in batches, padded right; on a CPU with one thread, so that the bits are the same every time. The pass ends at
the last layer that is asked for: neither later layers nor the head are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from honeloom.backends.devices import memory_guard, one_thread
from honeloom.checkpoint.architectures import Architecture
from honeloom.errors import NotFiniteError

__all__ = ["Place", "Span", "received", "row_losses"]

BATCH_TOKENS = 4096
"""Of one forward pass, padding included."""
Take = Literal["mean", "last", "spread"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a gate reads.

    Attributes
    ----------
    layer : int
        Number of the layer.
    point : {"mlp", "layer", "output"}
        What the layer's MLP receives, after its norm; the stream that enters the layer; the stream that leaves it.
        Layer -1, output: the embeddings.
    """

    layer: int
    point: Literal["mlp", "layer", "output"]


@dataclass(frozen=True, slots=True)
class Span:
    """A row of token ids, and how many vectors are taken of its first tokens.

    Attributes
    ----------
    ids : tuple of int
        All that is computed.
    take : {"mean", "last", "spread"}
        One vector, the mean or the last of the tokens, or `count` of them, evenly spaced.
    count : int
        At most, for spread.
    """

    ids: tuple[int, ...]
    take: Take = "mean"
    count: int = 1

    @property
    def vectors(self) -> int:
        """How many it gives."""
        return min(self.count, len(self.ids)) if self.take == "spread" else 1


class _Enough(Exception):
    """The last layer that matters has been reached."""


def received(
    model: Any, architecture: Architecture, places: Sequence[Place], spans: Sequence[Span],
    keep: Callable[[int, int, torch.Tensor], None],
    progress: Callable[[Iterable[Any], str, int | None], Iterable[Any]] = lambda items, label, total: items,
) -> None:  # fmt: skip
    """Show what gates receive.

    Parameters
    ----------
    model : transformers model
        In evaluation mode; streamed or loaded.
    architecture : Architecture
        Its layout.
    places : sequence of Place
        Where to look.
    spans : sequence of Span
        What is read.
    keep : callable
        (place's index, span's index, vectors (n, H) in float32 on the host), in no fixed order of spans.
    progress : callable, optional
        Wraps the batches to show progress, as `Log.track`.

    Raises
    ------
    NotFiniteError
        A vector is NaN or infinite.
    """
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    batches = _batches(spans)
    last = max((i for i, p in enumerate(places) if p.layer == max(q.layer for q in places)), default=0)
    state: dict[str, Any] = {}

    def see(index: int, hidden: torch.Tensor) -> None:
        for row, span in enumerate(state["rows"]):
            vectors = _taken(hidden[row, : len(spans[span].ids)], spans[span])
            if not bool(torch.isfinite(vectors).all()):
                raise NotFiniteError(
                    f"what layer {places[index].layer} receives is NaN or infinite; look at its weights"
                )
            keep(index, span, vectors)
        if index == last:
            raise _Enough

    handles = [_watch(model, architecture, place, partial(see, index)) for index, place in enumerate(places)]
    try:
        with torch.inference_mode(), one_thread(device):
            for rows in progress(batches, "read rows", len(batches)):
                state["rows"] = rows
                ids = [torch.tensor(spans[i].ids, device=device) for i in rows]
                doing = f"reading {len(rows)} rows of up to {len(ids[0])} tokens"
                with memory_guard(device, doing, ["shorter rows", "--device cpu"]):
                    _forward(model, pad_sequence(ids, batch_first=True))
    finally:
        for handle in handles:
            handle.remove()


def _forward(model: Any, ids: torch.Tensor) -> None:
    try:
        model(input_ids=ids, use_cache=False)
    except _Enough:
        return


def _batches(spans: Sequence[Span]) -> list[list[int]]:
    """Rows of similar length together, longest first."""
    order = sorted(range(len(spans)), key=lambda i: (-len(spans[i].ids), i))
    batches: list[list[int]] = []
    width = 0
    for i in order:
        if not batches or (len(batches[-1]) + 1) * width > BATCH_TOKENS:
            batches.append([])
            width = len(spans[i].ids)
        batches[-1].append(i)
    return batches


def _watch(model: Any, architecture: Architecture, place: Place, see: Callable[[torch.Tensor], None]) -> Any:
    """Have a function see the hidden states (B, T, H) at a place."""

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(args[0] if args else kwargs["hidden_states"])

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        see(output[0] if isinstance(output, tuple) else output)

    layers = model.get_submodule(architecture.layers)
    if place.layer < 0:  # what the first layer receives: embeddings with all that is done to them
        return layers[0].register_forward_pre_hook(before, with_kwargs=True)
    layer = layers[place.layer]
    if place.point == "output":
        return layer.register_forward_hook(after)
    module = layer.get_submodule(architecture.mlp) if place.point == "mlp" else layer
    return module.register_forward_pre_hook(before, with_kwargs=True)


def _taken(hidden: torch.Tensor, span: Span) -> torch.Tensor:
    """The vectors of one row, (n, H)."""
    if span.take == "mean":
        return hidden.float().mean(dim=0, keepdim=True).cpu()
    if span.take == "last":
        return hidden[-1:].float().cpu()
    places = torch.linspace(0, len(hidden) - 1, span.vectors).round().long()
    return hidden[places.to(hidden.device)].float().cpu()


def row_losses(model: Any, rows: Sequence[Any]) -> torch.Tensor:
    """Summed loss in nats of every encoded row, one at a time; (R,), float64.

    Parameters
    ----------
    model : transformers model
        Loaded or streamed.
    rows : sequence of Encoded
        Each with a target.
    """
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    found = torch.zeros(len(rows), dtype=torch.float64)
    with torch.inference_mode(), one_thread(device):
        for i, row in enumerate(rows):
            ids = torch.tensor([row.ids], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            scored = torch.tensor(row.scored[1:], device=device)
            losses = torch.nn.functional.cross_entropy(logits[scored].float(), ids[0, 1:][scored], reduction="none")
            found[i] = losses.double().sum().cpu()
    return found
