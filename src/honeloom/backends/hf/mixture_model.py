"""Mixtures with a shared trunk: a stock decoder whose last layers, or their MLPs, are several, with a router.

No modelling code is copied. The trunk is the class that transformers has for the base model, and
every expert is a copy of one of its own modules; what is new is the choice among them. A decision
per row is taken when its prompt is read, from the prompt alone, and kept while the answer is
written; each expert keeps the keys and values of its own rows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from honeloom.backends.hf.mixture_cache import MixtureCache, OwnCacheGeneration
from honeloom.backends.hf.mixture_gates import Decision, RouterSpec, build_gate, pool_states
from honeloom.checkpoint.architectures import Architecture, architecture_of
from honeloom.errors import CheckpointError

__all__ = [
    "MIXTURE",
    "HoneloomMixtureConfig",
    "HoneloomMixtureForCausalLM",
    "layout_of",
    "read_tokens",
    "register",
]

MIXTURE = "honeloom_mixture"
LEVELS = ("ffn", "block", "model")


class HoneloomMixtureConfig(PreTrainedConfig):
    """Configuration of a mixture with a shared trunk.

    Attributes
    ----------
    trunk : PreTrainedConfig
        Of the stock model whose embedding, final norm, head and dense layers are used.
    level : {"ffn", "block", "model"}
        What there is several of: MLPs, decoder layers, or the whole stack of layers after the
        dense ones, for which one decision is taken.
    experts : list of str
        Their names.
    top_k : int
        Experts per decision; 1 at level model.
    dense_layers : int
        The first layers, which are the trunk's alone.
    shared_expert : bool
        Whether every MLP has one more expert, whose output is always added.
    router : dict
        Fields of `RouterSpec`.
    """

    model_type = MIXTURE
    sub_configs = {"trunk": AutoConfig}

    trunk: Any = None
    level: Any = "ffn"
    experts: Any = None
    top_k: Any = 2
    dense_layers: Any = 0
    shared_expert: Any = False
    router: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.trunk is None:  # transformers makes a default one to see what differs from it
            self.trunk = {"model_type": "llama"}
        if isinstance(self.trunk, Mapping):
            self.trunk = AutoConfig.for_model(**self.trunk)
        self.experts = list(self.experts or ["expert"])
        self.router = dict(self.router or {})
        for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.trunk.get_text_config(), name, None))
        kwargs.setdefault("tie_word_embeddings", bool(getattr(self.trunk, "tie_word_embeddings", False)))
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        spec, layers = self.spec, self.num_hidden_layers
        if self.level not in LEVELS:
            raise ValueError(f"level is {self.level!r}, and must be one of {', '.join(LEVELS)}")
        if not 1 <= self.top_k <= (1 if self.level == "model" else len(self.experts)):
            most = "1 at level model" if self.level == "model" else f"{len(self.experts)}, the number of experts"
            raise ValueError(f"top_k is {self.top_k}, and must be from 1 to {most}")
        if not 0 <= self.dense_layers <= layers:
            raise ValueError(f"dense_layers is {self.dense_layers}, and the trunk has {layers} layers")
        if self.level != "ffn" and (spec.input == "token" or self.shared_expert):
            what = "router.input is 'token'" if spec.input == "token" else "shared_expert is true"
            raise ValueError(f"{what} at level {self.level}; only MLPs (level ffn) can have that")

    @property
    def spec(self) -> RouterSpec:
        """The router's settings."""
        default = {"input": "token" if self.level == "ffn" else "sample"}
        return RouterSpec.read({**default, **self.router})

    @property
    def reads_prompt(self) -> bool:
        """Whether decisions are taken per row, from its prompt."""
        return self.spec.input == "sample"

    @property
    def keeps_decisions(self) -> bool:
        """Whether decisions are taken while a prompt is read, and hold for what follows."""
        return self.reads_prompt and len(self.routed) > 0

    @property
    def routed(self) -> range:
        """Numbers of the routed layers."""
        return range(self.dense_layers, self.num_hidden_layers)

    @property
    def deciding(self) -> range:
        """Numbers of the layers that have a gate."""
        return self.routed[:1] if self.level == "model" else self.routed

    @property
    def num_hidden_layers(self) -> int:
        """The trunk's."""
        return int(self.trunk.get_text_config().num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """The trunk's."""
        return int(self.trunk.get_text_config().hidden_size)

    @property
    def max_position_embeddings(self) -> int | None:
        """The trunk's."""
        text = self.trunk.get_text_config()
        limit: int | None = getattr(text, "max_position_embeddings", None)
        return limit

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The trunk's: what sizes, caches and generation go by."""
        return self.trunk.get_text_config(decoder=decoder, encoder=encoder)


@dataclass
class _Pass:
    """One forward pass: what the routers may read, and what they decided."""

    mask: torch.Tensor | None
    cache: Any
    decisions: dict[int, Decision] = field(default_factory=dict)

    def of_rows(self, layer: int, decide: Callable[[], Decision]) -> Decision:
        """The decision of a layer for every row: the cache's, if its rows were read before."""
        held = self.cache.decisions if isinstance(self.cache, MixtureCache) else self.decisions
        if layer not in held:
            held[layer] = decide()
        self.decisions[layer] = held[layer]
        return held[layer]


_PASS: ContextVar[_Pass] = ContextVar("honeloom_mixture_pass")


@contextmanager
def _running(current: _Pass) -> Iterator[None]:
    token = _PASS.set(current)
    try:
        yield
    finally:
        _PASS.reset(token)


def _current() -> _Pass:
    found = _PASS.get(None)
    if found is None:
        raise RuntimeError("a routed module runs within its mixture's forward pass only; call the whole model")
    return found


class RoutedBlock(nn.Module):
    """A decoder layer that is several: every row passes through those that its decision names."""

    def __init__(self, layer: nn.Module, config: HoneloomMixtureConfig, index: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([copy.deepcopy(layer) for _ in config.experts])
        self.spec, self.top_k = config.spec, config.top_k
        self.source = config.dense_layers if config.level == "model" else index
        if index in config.deciding:
            self.gate = build_gate(self.spec, len(self.experts), config.hidden_size)
        self._names = list(inspect.signature(type(layer).forward).parameters)[2:]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The weighted sum of the chosen layers' outputs (B, T, H)."""
        current = _current()
        decision = current.of_rows(self.source, lambda: self._decide(hidden_states, current.mask))
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if decision.single is not None:
            return self._run(decision.single, hidden_states, given, current.cache)
        parts = []
        for expert, picked in decision.groups:
            rows = picked.to(hidden_states.device)
            inner = {name: _rows_of(value, rows, len(hidden_states), name) for name, value in given.items()}
            parts.append(self._run(expert, hidden_states[rows], inner, current.cache))
        return decision.combine(parts)

    def _decide(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> Decision:
        return Decision.of_scores(self.gate(pool_states(hidden_states, mask, self.spec.pooling)), self.top_k)

    def _run(self, expert: int, hidden_states: torch.Tensor, given: dict[str, Any], cache: Any) -> torch.Tensor:
        if cache is not None:
            given = {name: cache.views[expert] if value is cache else value for name, value in given.items()}
        output = self.experts[expert](hidden_states, **given)
        return output[0] if isinstance(output, tuple) else output


_PER_ROW = ("attention_mask", "position_ids", "position_embeddings")


def _rows_of(value: Any, rows: torch.Tensor, batch: int, name: str) -> Any:
    """An argument of a layer for some rows of the batch."""
    if name not in _PER_ROW or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(_rows_of(v, rows, batch, name) for v in value)
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, which cannot be cut into rows; use --attn sdpa")
    return value[rows.to(value.device)] if len(value) == batch else value


class RoutedMlp(nn.Module):
    """An MLP that is several, chosen per token or per row; a shared one is always added."""

    def __init__(self, mlp: nn.Module, config: HoneloomMixtureConfig, index: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([copy.deepcopy(mlp) for _ in config.experts])
        if config.shared_expert:
            self.shared = copy.deepcopy(mlp)
        self.spec, self.top_k, self.index = config.spec, config.top_k, index
        self.has_shared = config.shared_expert
        self.gate = build_gate(self.spec, len(self.experts), config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen MLPs' outputs (B, T, H)."""
        current = _current()
        if self.spec.input == "sample":
            decision = current.of_rows(self.index, lambda: self._decide(hidden_states, current.mask))
            output = self._run(decision, hidden_states)
        else:
            tokens = hidden_states.flatten(0, 1)
            decision = Decision.of_scores(self.gate(tokens), self.top_k)
            current.decisions[self.index] = decision
            output = self._run(decision, tokens).view_as(hidden_states)
        return output + self.shared(hidden_states) if self.has_shared else output

    def _decide(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> Decision:
        return Decision.of_scores(self.gate(pool_states(hidden_states, mask, self.spec.pooling)), self.top_k)

    def _run(self, decision: Decision, states: torch.Tensor) -> torch.Tensor:
        """Outputs for N rows or tokens, (N, ...)."""
        if decision.single is not None:
            output: torch.Tensor = self.experts[decision.single](states)
            return output
        return decision.combine([self.experts[e](states[rows.to(states.device)]) for e, rows in decision.groups])


class _Generation(GenerationConfig):
    """Settings of generation from those of a mixture, whose `top_k` counts experts, not tokens."""

    @classmethod
    def from_model_config(cls, model_config: Any) -> GenerationConfig:
        """As for any model, without `top_k`."""
        document = dict(model_config if isinstance(model_config, dict) else model_config.to_dict())
        document.pop("top_k", None)
        return GenerationConfig.from_model_config(document)


class HoneloomMixtureForCausalLM(PreTrainedModel, OwnCacheGeneration, GenerationMixin):
    """A causal language model whose last layers, or their MLPs, are several.

    `last_decisions` maps every layer that has a gate to the `Decision` that the last forward pass
    went by: of B rows, or of B * T tokens where tokens are routed.
    """

    config_class = HoneloomMixtureConfig
    generation_config_class = _Generation
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = [r"\.gate\."]

    def __init__(self, config: HoneloomMixtureConfig) -> None:
        super().__init__(config)
        self.last_decisions: dict[int, Decision] = {}
        self.trunk = AutoModelForCausalLM.from_config(config.trunk, dtype=torch.get_default_dtype())
        self._build(config, architecture_of(config.trunk.to_dict()))
        self.post_init()

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Read generation_config.json; without one transformers would take our `top_k` for tokens'."""
        GenerationMixin.adjust_generation_fn(cast(Any, self), *args, **kwargs)
        if getattr(self.generation_config, "_from_model_config", False):
            self.generation_config = _Generation.from_model_config(self.config)

    def _build(self, config: HoneloomMixtureConfig, architecture: Architecture) -> None:
        """Put routed modules in the place of the last layers, or of their MLPs."""
        if architecture.layers != architecture.disk_layers[0]:
            raise CheckpointError(
                f"a {architecture.model_type} cannot be the trunk of a mixture: its files name layers otherwise than "
                "transformers does; take the text model alone"
            )
        layers: Any = self.trunk.get_submodule(architecture.layers)
        for index in config.routed:
            layer = layers[index]
            mlp = layer.get_submodule(architecture.mlp)
            if hasattr(mlp, "experts"):
                raise CheckpointError(
                    f"a {architecture.model_type} cannot be the trunk of a mixture: its MLPs have experts already; "
                    "mixtures of whole models (honeloom_models) take any model"
                )
            if config.level == "ffn":
                layer.set_submodule(architecture.mlp, RoutedMlp(mlp, config, index))
            else:
                layers[index] = RoutedBlock(layer, config, index)

    def get_input_embeddings(self) -> Any:
        """The trunk's embedding."""
        return self.trunk.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the trunk's embedding."""
        self.trunk.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The trunk's head."""
        return self.trunk.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the trunk's head."""
        self.trunk.set_output_embeddings(new_embeddings)

    def new_cache(self) -> MixtureCache | None:
        """An empty cache, whose first forward pass decides where every row goes; None if tokens are routed."""
        config = self.config
        if not config.keeps_decisions:
            return None
        routed = config.routed if config.level != "ffn" else range(0)
        shared = config.dense_layers if config.level == "model" else None
        return MixtureCache(config.trunk, len(config.experts), routed, shared)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        routing_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the trunk's own forward pass, with one argument more.

        Parameters
        ----------
        routing_mask : Tensor, optional
            (B, T), 1 where a token is read by routers that decide per row. It counts where a
            decision is taken: without a cache, and in the first pass of one. Without it all attended
            tokens are read. Where a prompt comes in several passes, the first decides.

        Raises
        ------
        ValueError
            A row has no token to decide by; the cache is not a mixture's; hidden states or
            attentions are asked for where whole layers are routed.
        """
        self._refuse(kwargs)
        keeps = self.config.keeps_decisions
        if use_cache is None:
            use_cache = bool(getattr(self.config.get_text_config(), "use_cache", True))
        if keeps and past_key_values is None and use_cache and not self.training:
            past_key_values = self.new_cache()
        if keeps and past_key_values is not None and not isinstance(past_key_values, MixtureCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; this mixture keeps its decisions with the "
                "keys and values: leave it out, or make it with model.new_cache()"
            )
        given = input_ids if input_ids is not None else inputs_embeds
        mask = None
        if keeps and given is not None and not (past_key_values is not None and past_key_values.decisions):
            mask = read_tokens(given.shape[:2], attention_mask, routing_mask)
        current = _Pass(mask, past_key_values)
        with _running(current):
            output = self.trunk(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, inputs_embeds=inputs_embeds,
                use_cache=use_cache and (past_key_values is not None or not keeps), **kwargs,
            )  # fmt: skip
        self.last_decisions = current.decisions
        return output

    def _refuse(self, kwargs: Mapping[str, Any]) -> None:
        """Whole layers that see some rows each would fill these lists with pieces of a batch."""
        for name in ("output_hidden_states", "output_attentions"):
            if self.config.level != "ffn" and (kwargs.get(name) or getattr(self.config, name, False)):
                raise ValueError(
                    f"{name} is not to be had where whole layers are routed, for each sees some rows of the batch; "
                    "put hooks on the layers, or mix at level ffn"
                )


def read_tokens(
    shape: tuple[int, ...], attention_mask: torch.Tensor | None, routing_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Tokens (B, T) that a row's decision reads, bool; None for all of them.

    Raises
    ------
    ValueError
        A mask has another shape, or leaves a row without a token.
    """
    found = None
    for name, mask in (("attention_mask", attention_mask), ("routing_mask", routing_mask)):
        if mask is None:
            continue
        if mask.ndim != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
            if name == "attention_mask" and routing_mask is not None:
                continue
            raise ValueError(f"{name} is {tuple(mask.shape)}, and routing rows needs one of {tuple(shape)}")
        part = mask[:, : shape[1]].bool()
        found = part if found is None else found & part.to(found.device)
    if found is not None and not bool(found.any(dim=1).all()):
        row = int((~found.any(dim=1)).int().argmax())
        raise ValueError(
            f"row {row} has no token to decide by in the first pass of its cache; give the whole prompt in one pass, "
            "and a routing_mask that marks some of it"
        )
    return found


def layout_of(model: Any) -> Architecture:
    """The layout of a loaded model, of a mixture's trunk within the mixture.

    Raises
    ------
    CheckpointError
        The family is not known.
    """
    config = model.config
    if config.model_type != MIXTURE:
        return architecture_of(config.to_dict())
    inner = architecture_of(config.trunk.to_dict())
    return replace(
        inner,
        layers=f"trunk.{inner.layers}",
        embeddings=f"trunk.{inner.embeddings}",
        final_norm=f"trunk.{inner.final_norm}",
        head=f"trunk.{inner.head}",
        positions=inner.positions and f"trunk.{inner.positions}",
    )


def register() -> None:
    """Let transformers' Auto classes open mixtures; may be called any number of times."""
    AutoConfig.register(MIXTURE, HoneloomMixtureConfig, exist_ok=True)
    AutoModelForCausalLM.register(HoneloomMixtureConfig, HoneloomMixtureForCausalLM, exist_ok=True)
