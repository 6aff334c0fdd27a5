"""The model without one unit, for every unit: forward passes restarted at the unit, or one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from honeloom.backends.hf.importance_passes import PaddedBatch, Tally
from honeloom.backends.hf.states import watched
from honeloom.backends.hf.sublayer_map import Sublayers, layer_list, swapped
from honeloom.dropping.scores import Kind, Unit

__all__ = ["GradientPass", "RestartPass", "resumed"]


@contextmanager
def resumed(layers: Sequence[Any], done: int, stream: torch.Tensor, arity: Sequence[int]) -> Iterator[None]:
    """Within it, the first `done` layers compute nothing: a stream is taken for what leaves them.

    Embedding, masks and positions, final norm and head are the model's own.

    Parameters
    ----------
    layers : sequence of modules
        The decoder layers.
    done : int
        How many of them.
    stream : Tensor
        (B, T, D).
    arity : sequence of int
        Per layer how many values it returns in a tuple; 0 if it returns the stream alone.
    """
    before = [vars(layer).get("forward") for layer in layers[:done]]

    def instead(count: int) -> Callable[..., Any]:
        output = (stream, *[None] * (count - 1)) if count else stream
        return lambda *args, **kwargs: output

    for layer, count in zip(layers[:done], arity, strict=False):
        layer.forward = instead(count)
    try:
        yield
    finally:
        for layer, forward in zip(layers[:done], before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


@dataclass(slots=True)
class _Streams:
    """Streams of one batch, by layer."""

    before: dict[int, torch.Tensor] = field(default_factory=dict)
    after: dict[tuple[Kind, int], torch.Tensor] = field(default_factory=dict)
    arity: dict[int, int] = field(default_factory=dict)


class RestartPass:
    """Losses and predictions without each unit.

    The streams of one batch are kept; the model without a unit starts at its layer, so that it computes half of the
    layers on average.
    """

    def __init__(
        self, model: Any, where: Sublayers, tallies: Sequence[Tally], functions: Sequence[Callable[..., Any]]
    ) -> None:
        self.model, self.where = model, where
        self.pairs = list(zip(tallies, functions, strict=True))
        self.layers = layer_list(model, where)
        self.parallel = where.mid_stream is None

    @torch.inference_mode()
    def add(self, batch: PaddedBatch, number: int) -> None:
        """Run one batch whole, then without each unit."""
        inputs, streams = batch.inputs(), _Streams()
        with self._kept(streams):
            logits = self.model(**inputs).logits
        masks = [_counted(tally, batch) for tally, _ in self.pairs]
        whole = _losses(logits, batch) if any(t.config.reads == "losses" for t, _ in self.pairs) else None
        sums: list[dict[Unit, torch.Tensor]] = [{} for _ in self.pairs]
        for unit in sorted({unit for tally, _ in self.pairs for unit in tally.units}):
            with self._without(unit, streams):
                other = self.model(**inputs).logits
            for (tally, function), mask, found in zip(self.pairs, masks, sums, strict=True):
                if unit not in tally.units:
                    continue
                if tally.config.reads == "losses":
                    values = function(whole, _losses(other, batch)) * mask.to(other.device)
                    found[unit] = values.sum(dim=1)
                else:
                    found[unit] = torch.stack(
                        [
                            function(a[m], b[m]).sum(dtype=torch.float64)
                            for a, b, m in zip(logits, other, mask, strict=True)  # a row at a time: (T, V) in float32
                        ]
                    )
        for (tally, _), mask, found in zip(self.pairs, masks, sums, strict=True):
            tally.add(found, mask.sum(dim=1), number, self.model.dtype)

    @contextmanager
    def _kept(self, streams: _Streams) -> Iterator[None]:
        """Within it, a forward pass fills the streams."""

        def observe(kind: Kind, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
            if kind == "block":
                streams.before[layer] = before
            elif kind == "attention" or self.parallel:
                streams.after[kind, layer] = after

        def count(index: int) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                streams.arity[index] = len(output) if isinstance(output, tuple) else 0

            return hook

        with ExitStack() as stack:
            for i, layer in enumerate(self.layers):
                stack.callback(layer.register_forward_hook(count(i)).remove)
            stack.enter_context(watched(self.model, self.where, observe))
            yield

    @contextmanager
    def _without(self, unit: Unit, streams: _Streams) -> Iterator[None]:
        """Within it, a forward pass is that of the model without a unit."""
        i, arity = unit.layer, list(streams.arity.values())
        if unit.kind == "block":
            done, stream = i + unit.blocks, streams.before[i]
        elif unit.kind == "mlp" and not self.parallel:
            done, stream = i + 1, streams.after.get(("attention", i), streams.before[i])
        elif self.parallel:
            other: Kind = "mlp" if unit.kind == "attention" else "attention"
            done, stream = i + 1, streams.after.get((other, i), streams.before[i])
        else:
            silent = swapped(self.layers[i], self.where, i, ("attention",))
            with resumed(self.layers, i, streams.before[i], arity), silent:
                yield
            return
        with resumed(self.layers, done, stream, arity):
            yield


def _counted(tally: Tally, batch: PaddedBatch) -> torch.Tensor:
    """Places in the row whose prediction counts, (B, T), bool."""
    if tally.config.reads == "logits":
        return batch.counted(getattr(tally.config, "skip_first_tokens", 0))
    scored = torch.zeros_like(batch.mask, dtype=torch.bool)
    scored[:, :-1] = batch.labels[:, 1:] != -100
    return scored & (batch.mask > 0)


def _losses(logits: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    """Loss of the next token at every place where it is scored, else 0: (B, T), float32."""
    losses = torch.zeros(batch.ids.shape, device=logits.device)
    labels = batch.labels.to(logits.device)
    for i in range(len(labels)):  # a row at a time: float32 copies of a batch's logits would be the peak of memory
        scored = torch.nonzero((labels[i, 1:] != -100) & (batch.mask[i, :-1].to(labels.device) > 0)).squeeze(1)
        losses[i, scored] = torch.nn.functional.cross_entropy(
            logits[i, scored].float(), labels[i, scored + 1], reduction="none"
        )
    return losses


class GradientPass:
    """One forward and one backward pass: the gradient of every row's loss by the stream after each unit.

    Activations of the batch are kept for the backward pass, as in training; weights get no gradient.
    """

    def __init__(
        self, model: Any, where: Sublayers, tallies: Sequence[Tally], functions: Sequence[Callable[..., Any]]
    ) -> None:
        self.model, self.where = model, where
        self.pairs = list(zip(tallies, functions, strict=True))
        self.parallel = where.mid_stream is None

    def add(self, batch: PaddedBatch, number: int) -> None:
        """Run one batch forward and backward."""
        sums: list[dict[Unit, torch.Tensor]] = [{} for _ in self.pairs]
        counts = _counted(self.pairs[0][0], batch).sum(dim=1)
        before: dict[int, torch.Tensor] = {}

        def score(unit: Unit, gradient: torch.Tensor, change: torch.Tensor) -> None:
            for (tally, function), found in zip(self.pairs, sums, strict=True):
                if unit in tally.units:
                    found[unit] = function(gradient, change)

        halves: dict[Kind, torch.Tensor] = {}

        def observe(kind: Kind, layer: int, given: torch.Tensor, after: torch.Tensor) -> None:
            if self.parallel and kind != "block":
                halves[kind] = (after - given).detach()  # its sum with the stream is no tensor of the model
            elif kind != "block":
                change = (after - given).detach()
                after.register_hook(lambda g: score(Unit(kind, layer), g, change))
            else:
                before[layer] = given.detach()
                self._at_block(layer, after, before, dict(halves), score)
                halves.clear()

        with self._frozen(), torch.enable_grad(), watched(self.model, self.where, observe):
            logits = self.model(**batch.inputs()).logits
            _summed_loss(logits, batch).backward()
        for (tally, _), found in zip(self.pairs, sums, strict=True):
            tally.add(found, counts, number, self.model.dtype)

    def _at_block(
        self,
        layer: int,
        after: torch.Tensor,
        before: dict[int, torch.Tensor],
        halves: dict[Kind, torch.Tensor],
        score: Callable[[Unit, torch.Tensor, torch.Tensor], None],
    ) -> None:
        """Ask for the gradient of a layer's output, which those of blocks and of parallel halves are."""
        plain = after.detach()
        windows = sorted({1, *(n for tally, _ in self.pairs for n in tally.consecutive)})
        starts = [(n, before[layer - n + 1]) for n in windows if layer + 1 >= n]

        def hook(gradient: torch.Tensor) -> None:
            for kind, change in halves.items():
                score(Unit(kind, layer), gradient, change)
            for n, start in starts:
                score(Unit("block", layer - n + 1, n), gradient, plain - start)

        after.register_hook(hook)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Within it, gradients begin at the first layer's input and weights have none."""
        asked = [p for p in self.model.parameters() if p.requires_grad]

        def begin(module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (args[0].detach().requires_grad_(), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

        for parameter in asked:
            parameter.requires_grad_(False)
        first = layer_list(self.model, self.where)[0]
        handle = first.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            for parameter in asked:
                parameter.requires_grad_(True)


def _summed_loss(logits: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    """Sum of the losses of all rows, so that a row's gradients do not depend on the others."""
    labels = batch.labels.to(logits.device)[:, 1:].masked_fill(batch.mask[:, :-1].to(logits.device) == 0, -100)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
