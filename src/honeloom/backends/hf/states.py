"""The residual stream, seen while it passes: hooks hand every layer's states on and keep none.

`watched` shows what attention, MLP and block do to the stream; `mean_states` gives masked means of
hidden states. Statistics accumulate in float64 with padding excluded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.score import pad_batch
from honeloom.backends.hf.sublayer_map import Sublayers, layer_list, stream_of
from honeloom.checkpoint.architectures import Architecture
from honeloom.dropping.scores import Kind
from honeloom.errors import CheckpointError

__all__ = ["Reached", "RunningMeans", "layers_of", "mean_states", "stream_after", "watched"]

Array = npt.NDArray[np.float64]
Observer = Callable[[Kind, int, torch.Tensor, torch.Tensor], None]


class RunningMeans:
    """Means and standard errors of many values at once, which arrive in groups: one group of tokens per row.

    Only sums in float64 are kept. The standard error treats rows as the independent units, not tokens: it is that
    of the mean over tokens as a ratio of row sums. Rows without tokens do not count.

    Parameters
    ----------
    values : int
        How many means.
    """

    def __init__(self, values: int) -> None:
        self._sums = np.zeros((5, values))
        self.rows = np.zeros(values, dtype=np.int64)

    def add(self, sums_VB: Array, counts_VB: Array) -> None:
        """Add the rows of a batch: sum of values and number of tokens of each, shape (V, B)."""
        self.rows += (counts_VB > 0).sum(axis=1)
        products = (sums_VB, counts_VB, sums_VB**2, sums_VB * counts_VB, counts_VB**2)
        self._sums += np.stack([p.sum(axis=1) for p in products])

    @property
    def tokens(self) -> Array:
        """Number of tokens of each mean, (V,)."""
        return self._sums[1]

    @property
    def means(self) -> Array:
        """Sum of values over number of tokens, (V,)."""
        return self._sums[0] / self._sums[1]

    def stderr(self, value: int) -> float | None:
        """Standard error of one mean; None for fewer than two rows."""
        n, (s, c, ss, sc, cc) = int(self.rows[value]), self._sums[:, value].tolist()
        if n < 2:
            return None
        mean = s / c
        square = max(0.0, ss - 2 * mean * sc + mean * mean * cc)
        return float((square * n / (n - 1)) ** 0.5 / c)


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


@contextmanager
def watched(model: Any, where: Sublayers, observe: Observer, *, stop: bool = False) -> Iterator[None]:
    """Within it, a forward pass shows the stream before and after every attention, MLP and block.

    Nothing is kept, so memory does not grow with layers or batches.

    Parameters
    ----------
    model : transformers model
        In evaluation mode.
    where : Sublayers
        From `locate`.
    observe : callable
        Called as observe(kind, layer, before, after) with tensors (B, T, D) as they are computed: of a layer the
        attention, the MLP, the block. Where both halves read one stream, `after` is that stream and what the half
        adds to it. Halves that a layer lacks are not shown; its block is.
    stop : bool
        End the pass with `Reached` behind the last layer: final norm and head are not computed.
    """
    layers = layer_list(model, where)
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            last = stop and index + 1 == len(layers)
            for handle in _Watch(where, index, observe, last).hooks(layer):
                stack.callback(handle.remove)
        yield


class _Watch:
    """The hooks of one layer, and the streams that they hand to one another."""

    def __init__(self, where: Sublayers, index: int, observe: Observer, last: bool) -> None:
        self.where, self.index, self.observe, self.last = where, index, observe, last
        self.attends, self.has_mlp = index not in where.without_attention, index not in where.without_mlp
        self.before: torch.Tensor | None = None
        self.middle: torch.Tensor | None = None

    def hooks(self, layer: Any) -> list[Any]:
        handles = [layer.register_forward_pre_hook(self.at_input, with_kwargs=True)]
        if self.where.mid_stream is not None:
            module = layer.get_submodule(self.where.mid_stream)
            handles.append(module.register_forward_pre_hook(self.at_middle, with_kwargs=True))
        else:
            halves: tuple[tuple[Kind, bool, str], ...] = (
                ("attention", self.attends, self.where.attention[-1]),
                ("mlp", self.has_mlp, self.where.mlp[-1]),
            )
            for kind, present, path in halves:
                if present:
                    handles.append(layer.get_submodule(path).register_forward_hook(self.at_half(kind)))
        return [*handles, layer.register_forward_hook(self.at_output)]

    def at_input(self, module: Any, args: Any, kwargs: Any) -> None:
        self.before = args[0] if args else kwargs["hidden_states"]

    def at_middle(self, module: Any, args: Any, kwargs: Any) -> None:
        assert self.before is not None  # the layer was entered
        middle = args[0] if args else next(iter(kwargs.values()))
        self.middle = _in_shape(middle, self.before)
        if self.attends:
            self.observe("attention", self.index, self.before, self.middle)

    def at_half(self, kind: Kind) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            assert self.before is not None  # the layer was entered
            added = stream_of(output)
            self.observe(kind, self.index, self.before, self.before + added.view(self.before.shape))

        return hook

    def at_output(self, module: Any, args: Any, output: Any) -> None:
        assert self.before is not None  # the layer was entered
        after = stream_of(output)
        if self.where.mid_stream is not None and self.has_mlp:
            assert self.middle is not None  # and its middle passed
            self.observe("mlp", self.index, self.middle, after)
        self.observe("block", self.index, self.before, after)
        self.before = self.middle = None
        if self.last:
            raise Reached


def _in_shape(stream: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A stream whose tokens were laid end to end, as (B, T, D); the tensor itself where it is a view of it."""
    if stream.shape == like.shape:
        return stream
    whole = stream._base
    return whole if whole is not None and whole.shape == like.shape else stream.view(like.shape)


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
        held["state"] = stream_of(output)
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
