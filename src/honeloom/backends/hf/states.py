"""The residual stream, seen while it passes: hooks hand every layer's states on and keep none.

`watch_sublayers` shows what attention, MLP and block do to the stream; `mean_states` gives
masked means of hidden states. Statistics accumulate in float64 with padding excluded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.score import pad_batch
from honeloom.checkpoint.architectures import Architecture
from honeloom.errors import CheckpointError

__all__ = [
    "Kind",
    "Reached",
    "RunningMean",
    "layers_of",
    "mean_states",
    "skip_sublayers",
    "stream_after",
    "watch_sublayers",
]

Kind = Literal["attention", "mlp", "block"]
Observer = Callable[[Kind, int, torch.Tensor, torch.Tensor], None]


@dataclass(slots=True)
class RunningMean:
    """Mean and standard error of values that arrive in groups (one group per row).

    The standard error treats rows as the independent units, not tokens: it is that of the
    mean over tokens as a ratio of row sums.
    """

    sums: list[float] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)

    def add(self, sums_B: torch.Tensor, counts_B: torch.Tensor) -> None:
        """Add the rows of a batch: sum of values and number of tokens of each, shape (B,)."""
        self.sums += sums_B.double().tolist()
        self.counts += counts_B.double().tolist()

    @property
    def mean(self) -> float:
        """Sum of values over number of tokens."""
        return sum(self.sums) / sum(self.counts)

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean; None for fewer than two rows."""
        n, mean, total = len(self.sums), self.mean, sum(self.counts)
        if n < 2:
            return None
        square = sum((s - mean * c) ** 2 for s, c in zip(self.sums, self.counts, strict=True))
        return float((square * n / (n - 1)) ** 0.5 / total)


def layers_of(model: Any, architecture: Architecture) -> Sequence[torch.nn.Module]:
    """The decoder layers of a loaded model, adapters or not."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        return inner.get_submodule(architecture.layers)
    except AttributeError:
        raise CheckpointError(
            f"{type(inner).__name__} has no module {architecture.layers!r}, where {architecture.model_type} keeps its"
            " layers"
        ) from None


def watch_sublayers(
    model: Any, architecture: Architecture, batches: Iterable[Sequence[Encoded]], observe: Observer
) -> Iterator[torch.Tensor]:
    """Run batches and show the stream before and after every sub-layer as it is computed.

    Parameters
    ----------
    model : transformers model
        In evaluation mode.
    architecture : Architecture
        Names the layers and the place between attention and MLP.
    batches : iterable of sequence of Encoded
        Rows of each forward pass.
    observe : callable
        Called as observe(kind, layer, before, after) with tensors (B, T, D) of the current
        batch. Nothing is kept, so memory does not grow with layers or batches.

    Yields
    ------
    Tensor
        The batch's attention mask (B, T), after its forward pass.

    Raises
    ------
    CheckpointError
        The layout has no stream between attention and MLP (parallel branches).
    """
    if architecture.mid_stream is None:
        raise CheckpointError(
            f"{architecture.model_type} runs attention and MLP in parallel, so no stream lies between them; "
            "sequential decoders can be scored"
        )
    with ExitStack() as stack:
        for index, layer in enumerate(layers_of(model, architecture)):
            stack.enter_context(_watch_layer(layer, index, architecture.mid_stream, observe))
        for batch in batches:
            ids, mask, _ = pad_batch(batch, model.device)
            with torch.inference_mode():
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            yield mask


@contextmanager
def _watch_layer(layer: torch.nn.Module, index: int, mid_stream: str, observe: Observer) -> Iterator[None]:
    held: dict[str, torch.Tensor] = {}

    def at_input(module: Any, args: Any, kwargs: Any) -> None:
        held["in"] = args[0] if args else kwargs["hidden_states"]

    def at_middle(module: Any, args: Any, kwargs: Any) -> None:
        held["mid"] = args[0] if args else next(iter(kwargs.values()))
        observe("attention", index, held["in"], held["mid"])

    def at_output(module: Any, args: Any, output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        observe("mlp", index, held["mid"], out)
        observe("block", index, held["in"], out)
        held.clear()

    handles = [
        layer.register_forward_pre_hook(at_input, with_kwargs=True),
        layer.get_submodule(mid_stream).register_forward_pre_hook(at_middle, with_kwargs=True),
        layer.register_forward_hook(at_output),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def skip_sublayers(
    model: Any, architecture: Architecture, attention: Sequence[int], mlp: Sequence[int]
) -> Iterator[None]:
    """Let the given attentions and MLPs add nothing to the stream: the reference for a dropped model."""

    def silence(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    layers = layers_of(model, architecture)
    handles = [layers[i].get_submodule(architecture.attention).register_forward_hook(silence) for i in attention]
    handles += [layers[i].get_submodule(architecture.mlp).register_forward_hook(silence) for i in mlp]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Reached(Exception):
    """A forward pass has come as far as anyone wants to see."""


def mean_states(
    model: Any, architecture: Architecture, batches: Iterable[Sequence[Encoded]], layer: int
) -> Iterator[torch.Tensor]:
    """Masked mean over tokens of the stream that leaves a layer: one (B, D) float32 tensor per batch.

    What lies behind the layer, the output head included, is not computed.

    Parameters
    ----------
    layer : int
        -1 is the embedding, i the output of decoder layer i.
    """
    with stream_after(model, architecture, layer) as held:
        for batch in batches:
            ids, mask, _ = pad_batch(batch, model.device)
            with torch.inference_mode(), suppress(Reached):
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            weight = mask.unsqueeze(-1).float()
            yield (held.pop("state").float() * weight).sum(dim=1) / weight.sum(dim=1)


@contextmanager
def stream_after(model: Any, architecture: Architecture, layer: int) -> Iterator[dict[str, torch.Tensor]]:
    """Within it, a forward pass ends with `Reached` once a layer is done, and its output (B, T, D) is in "state".

    Parameters
    ----------
    layer : int
        -1 is the embedding, i the output of decoder layer i.
    """
    held: dict[str, torch.Tensor] = {}
    layers = layers_of(model, architecture)

    def keep_input(module: Any, args: Any, kwargs: Any) -> None:
        held["state"] = args[0] if args else kwargs["hidden_states"]
        raise Reached

    def keep_output(module: Any, args: Any, output: Any) -> None:
        held["state"] = output[0] if isinstance(output, tuple) else output
        raise Reached

    if layer == -1:
        first = layers[0] if len(layers) else model.get_submodule(architecture.final_norm)
        handle = first.register_forward_pre_hook(keep_input, with_kwargs=True)
    else:
        handle = layers[layer].register_forward_hook(keep_output)
    try:
        yield held
    finally:
        handle.remove()
