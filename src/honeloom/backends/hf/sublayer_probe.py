"""The trial of every layer on its own: with halves silenced, is it the sum that dropping takes it for?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from honeloom.backends.hf.sublayer_map import HALVES, Half, Sublayers, stream_of, swapped
from honeloom.errors import CheckpointError

__all__ = ["Probe"]

PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class _Call:
    """What a layer is called with beside the stream, and random numbers in its place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream: torch.Tensor

    def run(self, layer: nn.Module) -> torch.Tensor:
        """The stream that leaves the layer, (1, T, D)."""
        if self.args:
            return stream_of(layer(self.stream, *self.args[1:], **self.kwargs))
        return stream_of(layer(**{**self.kwargs, "hidden_states": self.stream}))


class Probe:
    """Runs every layer on its own with halves silenced, and compares to the bit."""

    def __init__(self, inner: Any, where: Sublayers) -> None:
        self.inner, self.where = inner, where
        self.layers = list(inner.get_submodule(where.layers))
        self.calls = self._calls()

    def run(self) -> Sublayers:
        """What was seen; CheckpointError at the first layer that is not a sum of stream and halves."""
        arity = {half: tuple(self._outputs(half, i) for i in range(len(self.layers))) for half in HALVES}
        self.where = replace(self.where, attention_outputs=arity["attention"], mlp_outputs=arity["mlp"])
        for i in range(len(self.layers)):
            self._require_identity(i)
        for half in HALVES:
            present = [i for i in range(len(self.layers)) if i not in self.where.without(half)]
            norms = self._shared_norms(half, present)
            if half == "attention":
                self.where = replace(self.where, attention_norms=norms)
            else:
                self.where = replace(self.where, mlp_norms=norms)
            for i in present:
                self._require_oracle(half, i)
        return replace(self.where, mid_stream=self._mid_stream())

    def _calls(self) -> list[_Call]:
        calls: list[_Call] = []
        generator = torch.Generator().manual_seed(0)

        def keep(module: Any, args: Any, kwargs: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            noise = torch.randn(given.shape, generator=generator).to(given.device, given.dtype)
            calls.append(_Call(args, kwargs, noise))

        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.layers]
        vocabulary = self.inner.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(1, PROBE_TOKENS + 1) % vocabulary).unsqueeze(0).to(self.inner.device)
        try:
            self.inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def _outputs(self, half: Half, i: int) -> int:
        seen: list[int] = []

        def look(module: Any, args: Any, output: Any) -> None:
            seen.append(len(output) if isinstance(output, tuple) else 1)

        module = self.layers[i].get_submodule(self.where.of(half)[-1])
        handle = module.register_forward_hook(look)
        try:
            self.calls[i].run(self.layers[i])
        finally:
            handle.remove()
        if len(seen) != 1:
            raise CheckpointError(f"{self._name(i)} calls its {half} {len(seen)} times, so it cannot be dropped")
        return seen[0]

    def _name(self, i: int) -> str:
        return f"{type(self.layers[i]).__name__} (layer {i} of this {self.inner.config.model_type})"

    def _require_identity(self, i: int) -> None:
        call, kept = self.calls[i], self.calls[i].stream.clone()
        try:
            with swapped(self.layers[i], self.where, i, HALVES):
                out = call.run(self.layers[i])
        except (TypeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self._name(i)} does not run without attention and MLP: {error}") from None
        gap = float((out.float() - kept.float()).abs().max())
        if not _same(out, kept):
            raise CheckpointError(
                f"{self._name(i)}: with attention and MLP silenced it must return its input, and it is off by up to "
                f"{gap:.3g}. Its halves do more than add to the residual stream (post-norm, or a residual within "
                "the module), so none of them can be dropped or scored"
            )

    def _require_oracle(self, half: Half, i: int) -> None:
        """Without the half and its norms the layer does what it does where the half returns zeros."""
        with _zeroed(self.layers[i].get_submodule(self.where.of(half)[-1])):
            wanted = self.calls[i].run(self.layers[i])
        with swapped(self.layers[i], self.where, i, (half,), norms=True):
            got = self.calls[i].run(self.layers[i])
        if not _same(got, wanted):
            gap = float((got.float() - wanted.float()).abs().max())
            raise CheckpointError(
                f"{self._name(i)}: without its {half} it differs by up to {gap:.3g} from the layer whose {half} "
                "returns zeros, so the half cannot be taken out"
            )

    def _shared_norms(self, half: Half, present: Sequence[int]) -> tuple[str, ...]:
        """Norms of a half in every layer: in one whose other half gives zeros, the other's norm seems idle too."""
        found = [self._norms(half, i) for i in present]
        return tuple(name for name in (found[0] if found else ()) if all(name in names for names in found))

    def _norms(self, half: Half, i: int) -> tuple[str, ...]:
        """Norms that change nothing once the half is silent."""
        layer, found = self.layers[i], []
        with swapped(layer, self.where, i, (half,)):
            wanted = self.calls[i].run(layer)
            for name, child in list(layer.named_children()):
                if "norm" not in type(child).__name__.lower():
                    continue
                setattr(layer, name, nn.Identity())
                try:
                    if _same(self.calls[i].run(layer), wanted):
                        found.append(name)
                finally:
                    setattr(layer, name, child)
        return tuple(found)

    def _mid_stream(self) -> str | None:
        """The module that is given the stream between the halves; None if both halves read one stream."""
        both = [
            i
            for i in range(len(self.layers))
            if i not in self.where.without_attention and i not in self.where.without_mlp
        ]
        if not both:
            raise CheckpointError(f"no layer of this {self.inner.config.model_type} has both attention and MLP left")
        name = self._reader(both[0])
        for i in both:
            if name is None:
                self._require_parallel(i)
            elif name not in self._readers(i):
                raise CheckpointError(f"{self._name(i)}: {name} is not given the stream between attention and MLP")
        return name

    def _reader(self, i: int) -> str | None:
        return next(iter(self._readers(i)), None)

    def _readers(self, i: int) -> list[str]:
        """Children whose input is the stream after attention, still unchanged when the layer is done."""
        layer, call = self.layers[i], self.calls[i]
        seen: dict[str, torch.Tensor] = {}
        with swapped(layer, self.where, i, ("mlp",)):
            middle = call.run(layer)

        def keep(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, kwargs: Any) -> None:
                given = args[0] if args else next(iter(kwargs.values()), None)
                if torch.is_tensor(given):
                    seen.setdefault(name, given)

            return hook

        handles = [c.register_forward_pre_hook(keep(n), with_kwargs=True) for n, c in layer.named_children()]
        try:
            call.run(layer)
        finally:
            for handle in handles:
                handle.remove()
        return [n for n, t in seen.items() if t.numel() == middle.numel() and _same(t.reshape(middle.shape), middle)]

    def _require_parallel(self, i: int) -> None:
        """What the modules return is what each of them adds to the layer's input."""
        layer, call = self.layers[i], self.calls[i]
        for half, other in (("attention", "mlp"), ("mlp", "attention")):
            seen: list[torch.Tensor] = []
            module = layer.get_submodule(self.where.of(half)[-1])  # type: ignore[arg-type]
            handle = module.register_forward_hook(lambda m, a, out, seen=seen: seen.append(stream_of(out).clone()))
            try:
                with swapped(layer, self.where, i, (other,)):  # type: ignore[arg-type]
                    out = call.run(layer)
            finally:
                handle.remove()
            added = call.stream + seen[0].reshape(call.stream.shape)
            gap = float((out.float() - added.float()).abs().max())
            if gap > 1e-2 * float(seen[0].float().abs().max()):
                raise CheckpointError(
                    f"{self._name(i)}: what its {half} adds to the stream is not what the module returns (off by up to "
                    f"{gap:.3g}), and no module reads the stream between the halves, so it cannot be scored"
                )


@contextmanager
def _zeroed(module: nn.Module) -> Iterator[None]:
    def zero(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handle = module.register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the bit; broken weights are found later, so NaN in one place is equal too."""
    return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
