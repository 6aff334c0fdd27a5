"""Mixtures of whole models: stock models that may differ in everything, and a router that reads the prompt.

The router reads what an encoder makes of the prompt: one of the models, or the first layers of
another. Where all models share the encoder's vocabulary the mixture takes token ids, as any model
does; otherwise each row must be read by its model's own tokenizer (`honeloom.backends.hf.routed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from honeloom.backends.hf.load import load_tokenizer
from honeloom.backends.hf.mixture_cache import ModelsCache, OwnCacheGeneration
from honeloom.backends.hf.mixture_gates import Decision, RouterSpec, build_gate, pool_states
from honeloom.backends.hf.mixture_model import read_tokens
from honeloom.backends.hf.states import Reached, stream_after
from honeloom.checkpoint.architectures import Architecture, architecture_of
from honeloom.errors import ConfigError

__all__ = ["MODELS", "HoneloomModelsConfig", "HoneloomModelsForCausalLM", "register"]

MODELS = "honeloom_models"


class HoneloomModelsConfig(PreTrainedConfig):
    """Configuration of a mixture of whole models.

    Attributes
    ----------
    experts : list of dict
        Of each model: `name`, `config` (its own, with model_type) and `tokenizer`, its folder within
        the mixture's, or None where the encoder's is used.
    encoder : dict
        `config`, cut to the layers that are read, where the encoder is no expert; `expert`, its
        index where it is one; `tokenizer`, its folder, or None for the mixture's own folder.
    router : dict
        Fields of `RouterSpec`.
    """

    model_type = MODELS

    experts: Any = None
    encoder: Any = None
    router: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers makes a default one to see what differs from it
        default = {"name": "expert", "config": {"model_type": "llama"}, "tokenizer": None}
        self.experts = [dict(e) for e in self.experts or [default]]
        self.encoder = dict(self.encoder or {"config": None, "expert": 0, "tokenizer": None})
        self.router = dict(self.router or {})
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        spec, count = self.spec, len(self.experts)
        for i, expert in enumerate(self.experts):
            if not isinstance(expert.get("config"), Mapping) or "model_type" not in expert["config"]:
                raise ValueError(f"experts[{i}].config must be a model's configuration, with its model_type")
        index = self.encoder.get("expert")
        if index is None and not isinstance(self.encoder.get("config"), Mapping):
            raise ValueError("encoder has neither a config nor the index of an expert")
        if index is not None and not 0 <= index < count:
            raise ValueError(f"encoder.expert is {index}, and there are {count} experts")
        if spec.type == "subspace":
            raise ValueError("router.type is 'subspace'; whole models are chosen by a linear or mlp gate")
        layers = self.encoder_config.get_text_config().num_hidden_layers
        if not -1 <= spec.layer < layers:
            raise ValueError(f"router.layer is {spec.layer}; the encoder has layers -1 (embedding) to {layers - 1}")

    @property
    def spec(self) -> RouterSpec:
        """The router's settings."""
        return RouterSpec.read({**self.router, "input": "sample"})

    @property
    def names(self) -> list[str]:
        """Names of the experts."""
        return [str(e.get("name", i)) for i, e in enumerate(self.experts)]

    @property
    def encoder_config(self) -> Any:
        """The encoder's own configuration."""
        index = self.encoder.get("expert")
        return _config_of(self.encoder["config"] if index is None else self.experts[index]["config"])

    @property
    def max_position_embeddings(self) -> int | None:
        """The longest input that every model takes."""
        texts = [_config_of(e["config"]).get_text_config() for e in self.experts]
        known = [n for t in texts if (n := getattr(t, "max_position_embeddings", None))]
        return min(known) if known else None

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The first model's: what generation goes by where all share a vocabulary."""
        return _config_of(self.experts[0]["config"]).get_text_config(decoder=decoder, encoder=encoder)


def _config_of(document: Mapping[str, Any]) -> Any:
    return AutoConfig.for_model(**document)


def _build(document: Mapping[str, Any], attention: str | None) -> Any:
    """A stock model; an attention that transformers chose by itself is chosen anew for each model."""
    asked = {} if attention in (None, "sdpa") else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_config(_config_of(document), dtype=torch.get_default_dtype(), **asked)


class HoneloomModelsForCausalLM(PreTrainedModel, OwnCacheGeneration, GenerationMixin):
    """Several causal language models, of which a router picks one per row.

    `last_decisions` maps 0 to the `Decision` (B rows, one expert each) of the last forward pass.
    """

    config_class = HoneloomModelsConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = [r"^gate\."]

    def __init__(self, config: HoneloomModelsConfig) -> None:
        super().__init__(config)
        self.last_decisions: dict[int, Decision] = {}
        self._shared: bool | None = None
        attention = config._attn_implementation
        self.experts = nn.ModuleList([_build(e["config"], attention) for e in config.experts])
        if config.encoder.get("expert") is None:
            self.encoder = _without_head(_build(config.encoder["config"], attention))
        self.gate = build_gate(config.spec, len(self.experts), config.encoder_config.get_text_config().hidden_size)
        self.post_init()
        self._gather()

    def _gather(self) -> None:
        """Learn from the models what is tied, kept in fp32 or not split; transformers asks direct children alone."""
        inner: dict[str, Any] = {f"experts.{e}": model for e, model in enumerate(self.experts)}
        if self.config.encoder.get("expert") is None:
            inner["encoder"] = self.encoder
        for prefix, model in inner.items():
            tied = {f"{prefix}.{k}": f"{prefix}.{v}" for k, v in model.all_tied_weights_keys.items()}
            self.all_tied_weights_keys.update(tied)
            for name in ("_no_split_modules", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
                getattr(self, name).update(getattr(model, name, None) or ())

    @property
    def reader(self) -> Any:
        """The model whose states the router reads: an expert, or the encoder."""
        index = self.config.encoder.get("expert")
        return self.encoder if index is None else self.experts[index]

    def get_input_embeddings(self) -> Any:
        """The reader's embedding: what vectors of texts are taken from."""
        return self.reader.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None: every model has a head of its own."""

    def route(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None,
        read: torch.Tensor | None,
    ) -> Decision:  # fmt: skip
        """Decide for rows (B, T) in the encoder's tokens, by those marked in `read` (B, T); None reads all."""
        spec, reader = self.config.spec, self.reader
        with stream_after(reader, _layout(reader), spec.layer) as held, suppress(Reached):
            reader(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        return Decision.of_scores(self.gate(pool_states(held["state"], read, spec.pooling)), 1)

    def new_cache(self) -> ModelsCache:
        """An empty cache, whose first forward pass decides where every row goes."""
        return ModelsCache(len(self.experts))

    @torch.inference_mode()
    def choose(self, prompts: Sequence[Sequence[int]], *, batch_size: int = 16) -> list[int]:
        """Index of the model that every prompt goes to.

        Parameters
        ----------
        prompts : sequence of sequence of int
            Token ids by the encoder's tokenizer, each at least one.
        batch_size : int
            Prompts per forward pass.
        """
        found = [0] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            ids = torch.zeros(len(picked), len(prompts[picked[0]]), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(picked):
                ids[row, : len(prompts[i])] = torch.tensor(prompts[i])
                mask[row, : len(prompts[i])] = 1
            mask = mask.to(self.device)
            decision = self.route(ids.to(self.device), mask, None, mask.bool())
            for i, expert in zip(picked, decision.experts[:, 0].tolist(), strict=True):
                found[i] = expert
        return found

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        routing_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Route rows of token ids, and run each through its model; logits (B, T, V) are in the rows' order.

        `routing_mask` (B, T) marks what the router reads, in the first pass of a cache. Of models
        with fewer rows in their head, the logits beyond are the smallest number there is.

        Raises
        ------
        ConfigError
            The models do not share the encoder's vocabulary, so no ids mean the same to all.
        ValueError
            Something other than token ids is given, or another cache than `ModelsCache`.
        """
        self._require_shared_vocabulary()
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("a mixture of whole models takes input_ids: every model has embeddings of its own")
        if past_key_values is not None and not isinstance(past_key_values, ModelsCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; leave it out: models keep their own"
            )
        cache = past_key_values
        if cache is None and use_cache:
            cache = self.new_cache()
        decision = self._decided(cache, input_ids, attention_mask, position_ids, routing_mask)
        parts = []
        for expert, picked in decision.groups:
            rows = picked.to(input_ids.device)
            parts.append(self._run(expert, rows, cache, input_ids, attention_mask, position_ids, logits_to_keep))
        if cache is not None:
            cache.seen += input_ids.shape[1]
        self.last_decisions = {0: decision}
        logits = decision.combine(_equally_wide(parts))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _decided(
        self, cache: ModelsCache | None, ids: torch.Tensor, attention: torch.Tensor | None,
        positions: torch.Tensor | None, routing: torch.Tensor | None,
    ) -> Decision:  # fmt: skip
        if cache is not None and cache.decisions:
            return cache.decisions[0]
        read = read_tokens(tuple(ids.shape), attention, routing)
        decision = self.route(ids, attention, positions, read)
        if cache is not None:
            cache.decisions[0] = decision
        return decision

    def _run(
        self, expert: int, rows: torch.Tensor, cache: ModelsCache | None, ids: torch.Tensor,
        attention: torch.Tensor | None, positions: torch.Tensor | None, keep: int | torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Logits (n, T, V) of one model's rows; its keys and values go to its part of the cache."""
        output = self.experts[expert](
            input_ids=ids[rows],
            attention_mask=None if attention is None else attention[rows],
            position_ids=positions[rows] if positions is not None and len(positions) == len(ids) else positions,
            past_key_values=None if cache is None else cache.experts[expert],
            use_cache=cache is not None,
            logits_to_keep=keep,
        )
        if cache is not None:
            cache.experts[expert] = output.past_key_values
        logits: torch.Tensor = output.logits
        return logits

    def _require_shared_vocabulary(self) -> None:
        if self._shared is None:
            self._shared = _share_vocabulary(self.config)
        if not self._shared:
            raise ConfigError(
                f"the models of this mixture ({', '.join(self.config.names)}) have vocabularies of their own, so no "
                "token ids mean the same to all; give it text: honeloom evaluate --rows, or honeloom.backends.hf.score"
                ".Scorer and generate.Generator, read every row by its model's tokenizer"
            )


def _layout(model: Any) -> Architecture:
    return architecture_of(model.config.to_dict())


def _without_head(model: Any) -> Any:
    """Take final norm and head away: an encoder ends with the layer that is read."""
    architecture = _layout(model)
    model.set_submodule(architecture.final_norm, nn.Identity())
    model.set_submodule(architecture.head, nn.Identity())
    model._tied_weights_keys = None
    model.all_tied_weights_keys = {}
    return model


def _equally_wide(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    width = max(p.shape[-1] for p in parts)
    lowest = torch.finfo(parts[0].dtype).min
    return [nn.functional.pad(p, (0, width - p.shape[-1]), value=lowest) for p in parts]


def _share_vocabulary(config: Any) -> bool:
    """Whether all models read text by the encoder's vocabulary, as far as their tokenizers are at hand."""
    own, root = config.encoder.get("tokenizer"), Path(str(config.name_or_path))
    others = {str(t): None for e in config.experts if (t := e.get("tokenizer")) not in (None, own)}
    if not others:
        return True
    held = load_tokenizer(root / own if own else root)
    if held is None:
        return False
    words = held.get_vocab()
    found = [load_tokenizer(root / name) for name in others]
    return all(t is not None and t.get_vocab() == words for t in found)


def register() -> None:
    """Let transformers' Auto classes open mixtures of whole models; may be called any number of times."""
    AutoConfig.register(MODELS, HoneloomModelsConfig, exist_ok=True)
    AutoModelForCausalLM.register(HoneloomModelsConfig, HoneloomModelsForCausalLM, exist_ok=True)
