"""Which tensors of a layer are its attention's and which its MLP's, norms included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from honeloom.checkpoint.architectures import ARCHITECTURES, Architecture, architecture_of, layer_count
from honeloom.checkpoint.reader import Checkpoint
from honeloom.errors import CheckpointError
from honeloom.types.plans import DropPlan

__all__ = ["DROPPED", "Half", "Layout", "Located", "Source", "norms_of", "present", "stock_config"]

Half = Literal["attention", "mlp"]
DROPPED = "honeloom_dropped"
"""Model type of a folder that lacks the dropped halves."""

_ATTENTION = ("self_attn", "self_attention", "attention", "attn")
_MLP = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "moe")
_SECOND_NORM = "post_attention_layernorm"
_LAST_NORM = "post_feedforward_layernorm"
_TWO_OUTPUTS = ("gpt_oss",)
"""Families whose MLP returns what its router says as well."""


class Located(Protocol):
    """Halves of a loaded model, as `honeloom.backends.hf.sublayers` finds and proves them."""

    @property
    def layers(self) -> str:
        """Module path of the list of layers."""

    @property
    def attention(self) -> tuple[str, ...]:
        """Modules of attention within a layer."""

    @property
    def mlp(self) -> tuple[str, ...]:
        """Modules of the MLP within a layer."""

    @property
    def attention_norms(self) -> tuple[str, ...]:
        """Norms that only attention reads."""

    @property
    def mlp_norms(self) -> tuple[str, ...]:
        """Norms that only the MLP reads."""

    @property
    def mlp_outputs(self) -> tuple[int, ...]:
        """Per layer, how many values the MLP returns."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a model keeps its halves, in the stock class and on disk.

    Attributes
    ----------
    listed : Architecture or None
        The family's layout; None for one that was found by its modules' names.
    layers : str
        Module path of the list of layers.
    attention, mlp : tuple of str
        Modules of each half within a layer.
    attention_norms, mlp_norms : tuple of str
        Norms that only the one half reads.
    sequential : bool
        Whether the MLP reads the stream that attention has added to, so that halves can be paired anew.
    mlp_outputs : int
        How many values the MLP returns.
    disk_layers : tuple of str
        Prefixes of the layers' tensors on disk.
    """

    model_type: str
    listed: Architecture | None
    layers: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    attention_norms: tuple[str, ...]
    mlp_norms: tuple[str, ...]
    sequential: bool
    mlp_outputs: int
    disk_layers: tuple[str, ...]

    @classmethod
    def of(cls, architecture: Architecture) -> Layout:
        """That of a listed family, or of one with Llama's names."""
        return cls(
            architecture.model_type, architecture, architecture.layers, (architecture.attention,), (architecture.mlp,),
            norms_of(architecture, "attention"), norms_of(architecture, "mlp"), architecture.mid_stream is not None,
            2 if architecture.model_type in _TWO_OUTPUTS else 1, architecture.disk_layers,
        )  # fmt: skip

    @classmethod
    def found(cls, model_type: str, located: Located, names: Sequence[str]) -> Layout:
        """That of another family, by what was found in the loaded model; halves are never paired anew.

        Raises
        ------
        CheckpointError
            The files name layers otherwise than the modules are named.
        """
        shorter = located.layers.partition(".")[2]
        prefixes = tuple(p for p in (located.layers, shorter) if p and any(n.startswith(f"{p}.0.") for n in names))
        if not prefixes:
            raise CheckpointError(
                f"a {model_type} keeps its layers at {located.layers}, and no tensor on disk is named so; its files "
                "have names of their own, so --profile zero and dropped cannot tell which tensors to change"
            )
        return cls(
            model_type, None, located.layers, located.attention, located.mlp, located.attention_norms,
            located.mlp_norms, False, max(located.mlp_outputs), prefixes[:1],
        )  # fmt: skip

    def modules(self, half: Half) -> tuple[str, ...]:
        """Modules of a half and its norms."""
        if half == "attention":
            return (*self.attention, *self.attention_norms)
        return (*self.mlp, *self.mlp_norms)

    def half_of(self, name: str) -> tuple[int, Half | None, str] | None:
        """Layer, half and name within the layer of a tensor on disk; None if it belongs to no layer.

        The half is None for a tensor of a layer that is neither attention's nor MLP's.
        """
        for prefix in self.disk_layers:
            number, _, inner = name[len(prefix) + 1 :].partition(".")
            if not (name.startswith(prefix + ".") and number.isdigit()):
                continue
            child = inner.split(".")[0]
            if child in (*self.modules("attention"), *_ATTENTION):
                return int(number), "attention", inner
            if child in (*self.modules("mlp"), *_MLP):
                return int(number), "mlp", inner
            return int(number), None, inner
        return None

    def shifted(self, name: str, layer: int) -> str:
        """The name of a layer's tensor in a layer of another number."""
        prefix = next(p for p in self.disk_layers if name.startswith(p + "."))
        return f"{prefix}.{layer}.{name[len(prefix) + 1 :].partition('.')[2]}"


def norms_of(architecture: Architecture, half: Half) -> tuple[str, ...]:
    """Modules of a layer that normalise what goes into a half or comes out of it, and serve no other half."""
    before = architecture.attention_norm if half == "attention" else architecture.mlp_norm
    after = _SECOND_NORM if half == "attention" else _LAST_NORM
    if architecture.mid_stream is None or after == architecture.mlp_norm:
        return (before,) if before else ()
    return (before, after) if before else (after,)


def stock_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[int], frozenset[int]]:
    """The stock config of a model, and the layers without attention and without MLP, of a dropped model too."""
    if config.get("model_type") != DROPPED:
        return dict(config), frozenset(), frozenset()
    base, spec = config.get("base"), config.get("drop_spec")
    if not isinstance(base, dict) or not isinstance(spec, dict):
        raise CheckpointError(f"config.json: a {DROPPED} needs base and drop_spec; download the folder again")
    return dict(base), frozenset(spec.get("attention", ())), frozenset(spec.get("mlp", ()))


@dataclass(frozen=True, slots=True)
class Source:
    """A model to export, and everything that it is to lack.

    Attributes
    ----------
    config : dict
        The stock config; of an already dropped model that of its base.
    without_attention, without_mlp : tuple of int
        Layers that end without, those that a dropped source lacks already included.
    absent : tuple of (half, int)
        Halves that the source's files lack.
    """

    checkpoint: Checkpoint
    layout: Layout
    config: dict[str, Any]
    layers: int
    without_attention: tuple[int, ...]
    without_mlp: tuple[int, ...]
    absent: tuple[tuple[Half, int], ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, plan: DropPlan, located: Located | None = None) -> Source:
        """Read what a checkpoint is; its drops and the plan's count layers of the original model.

        Raises
        ------
        CheckpointError
            A layer is not there, no attention is left, or the family is not listed and nothing was located.
        """
        config, attention, mlp = stock_config(checkpoint.config)
        if config.get("model_type") not in ARCHITECTURES and located is not None:
            layout = Layout.found(str(config.get("model_type")), located, checkpoint.names())
        else:
            layout = Layout.of(architecture_of(config, checkpoint.names()))
        layers = layer_count(config)
        odd = [i for i in (*plan.dropped_attention(), *plan.dropped_mlp()) if not 0 <= i < layers]
        if odd:
            raise CheckpointError(f"{checkpoint.folder}: no layer {odd[0]}; it has layers 0 to {layers - 1}")
        all_attention = tuple(sorted(attention.union(plan.dropped_attention())))
        if len(all_attention) == layers:
            raise CheckpointError(
                f"{checkpoint.folder}: the plan drops all {layers} attentions, and at least 1 must remain: "
                "without one tokens never see each other"
            )
        halves: tuple[tuple[Half, frozenset[int]], ...] = (("attention", attention), ("mlp", mlp))
        absent = tuple((half, i) for half, dropped in halves for i in sorted(dropped))
        all_mlp = tuple(sorted(mlp.union(plan.dropped_mlp())))
        return cls(checkpoint, layout, config, layers, all_attention, all_mlp, absent)

    def names(self) -> list[str]:
        """Tensors on disk."""
        return self.checkpoint.names()

    def gone(self, half: Half) -> tuple[int, ...]:
        """Layers that end without a half."""
        return self.without_attention if half == "attention" else self.without_mlp


def present(source: Source, names: Iterable[str]) -> dict[tuple[int, Half], list[str]]:
    """Tensors of every half of every layer, in the order given.

    Raises
    ------
    CheckpointError
        A layer's tensor is neither attention's nor MLP's.
    """
    found: dict[tuple[int, Half], list[str]] = {}
    for name in names:
        place = source.layout.half_of(name)
        if place is None:
            continue
        layer, half, _ = place
        if layer >= source.layers:
            raise CheckpointError(
                f"{source.checkpoint.folder}: {name!r} is of a layer beyond the {source.layers} that config.json "
                "counts (heads that predict further tokens); remove those tensors first"
            )
        if half is None:
            raise CheckpointError(
                f"{source.checkpoint.folder}: {name!r} is neither attention's nor MLP's, so the halves of this "
                f"{source.layout.model_type} cannot be told apart; use --profile zero"
            )
        found.setdefault((layer, half), []).append(name)
    return found
