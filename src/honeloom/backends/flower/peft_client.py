"""The client's side of `FloraStrategy`: from a message to a PEFT model, and from the model to a reply.

Nothing here imports PEFT: the model brings it along.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from honeloom.backends.flower.records import PREFIX, begin, read_factors, shapes_of, write_factors
from honeloom.backends.flower.replies import BESIDE, CLIENT, SCALE
from honeloom.checkpoint.adapter import CHANGES_BASE, REFUSED
from honeloom.errors import ConfigError, MessageError, MissingExtraError
from honeloom.federated.frozen import Pair, Pairs, stacked

try:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
except ImportError as error:
    raise MissingExtraError(f"flwr is not installed ({error.name}): pip install 'honeloom[federated]'") from None

__all__ = ["FROZEN", "hold", "receive", "reply"]

FROZEN = "frozen"
"""Name of the adapter that holds what is not trained; the base itself is never changed."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One module's adapter that is trained."""

    module: Any
    adapter: str

    def factors(self) -> Pair:
        """B (m, r) and A (r, n) as PEFT holds them."""
        return self.module.lora_B[self.adapter].weight, self.module.lora_A[self.adapter].weight

    @property
    def scale(self) -> float:
        """What B @ A is multiplied with: alpha / r, or alpha / sqrt(r), times whatever PEFT was told."""
        return float(self.module.scaling[self.adapter])


def receive(model: Any, message: Message, context: Context | None = None) -> None:
    """Put what `FloraStrategy` sent into a PEFT model.

    For training: the adapter that is trained begins where the rule says, and what is frozen lies
    beside it in an adapter named "frozen". For evaluation: the frozen adapter is the whole update,
    and the other one adds nothing.

    Parameters
    ----------
    model : PeftModel
        With one LoRA adapter, of this client's own rank and alpha; fresh, or of an earlier message.
    message : Message
        From the server.
    context : Context, optional
        Names the client by `partition-id` of its node's config, so that runs can be repeated.

    Raises
    ------
    ConfigError
        The adapter is more than LoRA or rsLoRA on linear layers.
    MessageError
        The message is not a FloraStrategy's, or of another model.
    """
    config, record = _told(message), _arrays(message)
    scale = float(config["lora-scale"])
    if message.metadata.message_type.split(".")[0] == MessageType.EVALUATE:
        hold(model, record, scale)
        return
    layers = _layers(model)
    shared, frozen = _split(_factors(layers, record, scale), config["lora-shared-columns"])
    name = "shared" if config["lora-alike"] else f"{_client(message, context)}/{config['server-round']}"
    rest: dict[str, Pair] = {}
    starts = {}
    for module, layer in layers.items():
        starts[module], beside = begin(
            module, layer.factors(), layer.scale, shared, config["lora-start"], int(config["lora-seed"]), name
        )
        if beside is not None:
            rest[module] = beside
    _freeze(model, layers, stacked(frozen, rest))
    for module, layer in layers.items():
        _put(layer, starts[module])
        b, a = layer.factors()
        b.requires_grad_(config["lora-trains"] != "a")
        a.requires_grad_(config["lora-trains"] != "b")


def reply(
    model: Any, message: Message, context: Context | None = None, *, rows: float,
    metrics: Mapping[str, int | float | list[int] | list[float]] | None = None,
) -> Message:  # fmt: skip
    """Answer a message, with the adapter if it was about training.

    Parameters
    ----------
    model : PeftModel
        After `receive` and local steps.
    message, context
        As of `receive`.
    rows : float
        The client's weight, sent as num-examples.
    metrics : mapping, optional
        Numbers that the server averages.

    Returns
    -------
    Message
        B times its scale, and A, in float32 under PEFT's names.
    """
    content = RecordDict()
    numbers: dict[str, Any] = {"num-examples": rows, **(metrics or {})}
    if (number := _number(context)) is not None:
        numbers[CLIENT] = number
    if message.metadata.message_type.split(".")[0] != MessageType.EVALUATE:
        found = {}
        for module, layer in _layers(model).items():
            b, a = layer.factors()
            found[module] = (b.detach().float() * layer.scale, a.detach().float())
        content["arrays"] = write_factors(found)
        numbers |= {SCALE: 1.0, BESIDE: 1}
    content["metrics"] = MetricRecord(numbers)
    return Message(content, reply_to=message)


def hold(model: Any, arrays: ArrayRecord, scale: float = 1.0) -> None:
    """Let a PEFT model be the base with a whole update, and nothing else.

    Parameters
    ----------
    model : PeftModel
        With one LoRA adapter of any rank; it adds nothing afterwards.
    arrays : ArrayRecord
        What a round of `FloraStrategy` gave.
    scale : float
        The strategy's `scale`, if it has one.
    """
    layers = _layers(model)
    _freeze(model, layers, _factors(layers, arrays, scale))
    for layer in layers.values():
        b, a = layer.factors()
        _put(layer, (torch.zeros_like(b), a.detach().clone()))


def _told(message: Message) -> ConfigRecord:
    for config in message.content.config_records.values():
        if "lora-start" in config:
            return config
    raise MessageError("the message has no 'lora-start' among its settings; the server must run FloraStrategy")


def _arrays(message: Message) -> ArrayRecord:
    return next(iter(message.content.array_records.values()), ArrayRecord())


def _number(context: Context | None) -> int | None:
    number = None if context is None else context.node_config.get("partition-id")
    return None if number is None else int(number)


def _client(message: Message, context: Context | None) -> int:
    number = _number(context)
    return int(message.metadata.dst_node_id) if number is None else number


def _factors(layers: Mapping[str, _Layer], record: ArrayRecord, scale: float) -> dict[str, Pair]:
    """Factors of scale 1 for these layers; none where the record is empty."""
    pairs = {module: (b * scale, a) for module, (b, a) in read_factors(record).items()}
    mine = {module: (layer.factors()[0].shape[0], layer.factors()[1].shape[1]) for module, layer in layers.items()}
    if pairs and shapes_of(pairs) != mine:
        odd = sorted({m for m, _ in set(mine.items()) ^ set(shapes_of(pairs).items())})
        raise MessageError(
            f"the server's update is of other modules or shapes than this model's adapter (first {odd[0]!r}: "
            f"{shapes_of(pairs).get(odd[0])} there, {mine.get(odd[0])} here); use one base and one target_modules"
        )
    return pairs


def _split(pairs: Pairs, columns: list[int]) -> tuple[dict[str, Pair], dict[str, Pair]]:
    """Columns that clients begin with, and frozen ones."""
    shared, frozen = {}, {}
    for (module, (b, a)), count in zip(sorted(pairs.items()), columns, strict=True):
        if count:
            shared[module] = (b[:, :count], a[:count])
        if count < b.shape[1]:
            frozen[module] = (b[:, count:], a[count:])
    return shared, frozen


def _layers(model: Any) -> dict[str, _Layer]:
    """The layers of the adapter that is trained, by module path."""
    configs = getattr(model, "peft_config", {})
    names = [name for name in configs if name != FROZEN]
    if len(names) != 1:
        raise ConfigError(f"a PEFT model with one adapter is needed; this one has {names or 'none'}")
    _refuse(configs[names[0]])
    found = {
        path.removeprefix(PREFIX): _Layer(module, names[0])
        for path, module in model.named_modules()
        if names[0] in getattr(module, "lora_A", ())
    }
    if strange := [p for p, m in model.named_modules() if names[0] in getattr(m, "lora_embedding_A", ())]:
        raise ConfigError(f"{strange[0]!r} is an embedding with LoRA factors; leave it out of target_modules")
    for path, layer in found.items():
        b, a = layer.factors()
        if b.ndim != 2 or a.ndim != 2:
            raise ConfigError(f"module {path!r}: its factors have {b.ndim} dimensions; only linear layers are combined")
        if not math.isfinite(layer.scale) or layer.scale <= 0:
            raise ConfigError(f"module {path!r}: its scale alpha / r is {layer.scale}; a number over 0 is needed")
    if not found:
        raise ConfigError(f"adapter {names[0]!r} has no linear layer with LoRA factors")
    return found


def _refuse(config: Any) -> None:
    """Raise ConfigError unless the adapter is W + scale * B @ A."""
    if str(getattr(config, "peft_type", "")).rpartition(".")[2] != "LORA":
        raise ConfigError(f"peft_type {config.peft_type}: only LoRA updates are combined")
    for key, reason in REFUSED.items():
        if getattr(config, key, None):
            raise ConfigError(f"{key} is set, and {reason}; only plain LoRA updates are combined, so leave it out")
    if getattr(config, "modules_to_save", None):
        raise ConfigError("modules_to_save is set, and whole modules are not part of a low-rank update; leave it out")
    if getattr(config, "bias", "none") != "none":
        raise ConfigError(f"bias {config.bias!r}: biases are not part of a low-rank update; use 'none'")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise ConfigError(f"init_lora_weights {start!r} changes the base, so that clients have none in common")


def _freeze(model: Any, layers: Mapping[str, _Layer], pairs: Pairs) -> None:
    """Have exactly these factors in the frozen adapter; no adapter for none."""
    rank = max((a.shape[0] for _, a in pairs.values()), default=0)
    adapter = next(iter(layers.values())).adapter
    there = model.peft_config.get(FROZEN)
    if there is not None and there.r != rank:
        model.base_model.set_adapter([adapter])
        model.delete_adapter(FROZEN)
    if rank and FROZEN not in model.peft_config:
        model.add_adapter(FROZEN, _frozen_config(model.peft_config[adapter], rank))
    model.base_model.set_adapter([adapter, FROZEN] if rank else [adapter])
    if not rank:
        return
    for module, layer in layers.items():
        beside = _Layer(layer.module, FROZEN)
        b, a = beside.factors()
        _put(beside, pairs.get(module, (b[:, :0], a[:0])))
        layer.module.scaling[FROZEN] = 1.0
        b.requires_grad_(False)
        a.requires_grad_(False)


def _frozen_config(like: Any, rank: int) -> Any:
    """Settings of an adapter on the same modules."""
    config = copy.deepcopy(like)
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.use_rslora, config.lora_dropout, config.init_lora_weights = False, 0.0, True
    config.inference_mode = False
    return config


@torch.no_grad()
def _put(layer: _Layer, pair: Pair) -> None:
    """Factors of at most the adapter's rank, in float32; the rest of it is zero."""
    for weight, dim, tensor in zip(layer.factors(), (1, 0), pair, strict=True):
        source = tensor.detach().clone()
        weight.data = weight.data.float().zero_()
        weight.narrow(dim, 0, source.shape[dim]).copy_(source)
