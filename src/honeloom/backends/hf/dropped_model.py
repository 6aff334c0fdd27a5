"""Decoders from which attention or MLP of some layers is gone: the stock class, with modules that add nothing.

This file stands twice: in honeloom, which opens such folders itself, and as `honeloom_dropped.py` in
every folder of the profile "dropped", where transformers runs it with `trust_remote_code=True`. So it
needs torch and transformers alone, and no modelling code is copied: `base` in config.json names the
stock class, `drop_spec` what is missing.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig

MODEL_TYPE = "honeloom_dropped"
_SIZES = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "tie_word_embeddings")


class HoneloomDroppedConfig(PreTrainedConfig):
    """Configuration of a decoder without some of its attentions and MLPs.

    Parameters
    ----------
    base : dict or PreTrainedConfig
        Of the stock model, with its model_type.
    drop_spec : dict
        "version" (1), "attention" and "mlp" (layers that lack them), "modules" (where the stock
        class keeps them).
    """

    model_type = MODEL_TYPE

    def __init__(self, base: Any = None, drop_spec: Any = None, **kwargs: Any) -> None:
        base = {"model_type": "llama"} if base is None else base  # transformers makes one to compare with
        self.base = AutoConfig.for_model(**base) if isinstance(base, dict) else base
        self.drop_spec = dict(drop_spec or {"version": 1, "attention": [], "mlp": []})
        if self.drop_spec.get("version") != 1:
            raise ValueError(f"drop_spec has version {self.drop_spec.get('version')!r}; this file reads version 1")
        layers = self.base.get_text_config().num_hidden_layers
        for half in ("attention", "mlp"):
            odd = [i for i in self.drop_spec[half] if not (isinstance(i, int) and 0 <= i < layers)]
            if odd:
                raise ValueError(f"drop_spec.{half} names layer {odd[0]!r}; the base has layers 0 to {layers - 1}")
        super().__init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        """What only the base says (sizes, numbers of layers and heads)."""
        if name.startswith("_") or name in ("base", "drop_spec", "attribute_map"):
            raise AttributeError(name)
        return getattr(self.base, name)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The base's: what sizes and generation go by."""
        return self.base.get_text_config(*args, **kwargs)

    def stock(self) -> Any:
        """The base's configuration, with what its model without halves needs to know."""
        config = copy.deepcopy(self.base)
        config.drop_spec = copy.deepcopy(self.drop_spec)
        text, missing = config.get_text_config(), self.drop_spec["attention"]
        if missing and hasattr(type(text), "kv_sharing_modes"):
            raise ValueError(f"layers of a {text.model_type} share keys and values, so none can lose its attention")
        if missing:
            text.kv_sharing_modes = ["reuse" if i in missing else "full" for i in range(text.num_hidden_layers)]
            _require_placeholders(text, missing)
        return config


def _require_placeholders(text: Any, missing: list[int]) -> None:
    """Refuse where the cache would keep a place for layers that never fill it: lengths are read off the first."""
    cache = DynamicCache(config=text)
    built = [i for i, layer in enumerate(cache.layers) if type(layer).__name__ == "DummyLayer"]
    if not set(missing) <= set(built):
        raise ValueError(
            f"the cache of a {text.model_type} keeps no placeholders for layers without attention here, so decoding "
            "could go wrong; use transformers 5.23 or newer, or export the model with another profile"
        )


class NoAttention(nn.Module):
    """In the place of an attention: adds nothing, keeps nothing in the cache."""

    def __init__(self, replaced: nn.Module | None = None) -> None:
        super().__init__()
        _keep_plain(self, replaced)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Zeros like the input, and no weights of attention."""
        return torch.zeros_like(hidden_states), None


class NoMlp(nn.Module):
    """In the place of an MLP: adds nothing."""

    def __init__(self, replaced: nn.Module | None = None, outputs: int = 1) -> None:
        super().__init__()
        _keep_plain(self, replaced)
        self.outputs = outputs

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Zeros like the input; beside it nothing where a router would speak."""
        zeros = torch.zeros_like(hidden_states)
        return zeros if self.outputs == 1 else (zeros, *[None] * (self.outputs - 1))


def _keep_plain(module: nn.Module, replaced: nn.Module | None) -> None:
    """Keep numbers and names that the layer reads off its halves (layer_idx, is_sliding)."""
    for name, value in vars(replaced).items() if replaced is not None else ():
        if isinstance(value, int | float | str) and not name.startswith("_") and name != "training":
            setattr(module, name, value)


def remove_halves(model: nn.Module, spec: dict[str, Any]) -> None:
    """Put modules that add nothing in the place of what `drop_spec` says is missing, norms included."""
    modules = spec.get("modules") or {}
    if not spec["attention"] and not spec["mlp"]:
        return
    layers: Any = model.get_submodule(modules["layers"])
    for layer in (layers[i] for i in spec["attention"]):
        for path in modules["attention"]:
            layer.set_submodule(path, NoAttention(layer.get_submodule(path)))
        _remove_norms(layer, modules["attention_norms"])
    for layer in (layers[i] for i in spec["mlp"]):
        for path in modules["mlp"]:
            layer.set_submodule(path, NoMlp(layer.get_submodule(path), modules["mlp_outputs"]))
        _remove_norms(layer, modules["mlp_norms"])


def _remove_norms(layer: nn.Module, names: list[str]) -> None:
    for name in names:
        if getattr(layer, name, None) is not None:
            setattr(layer, name, nn.Identity())


@functools.cache
def dropped_class(stock: Any) -> Any:
    """The stock class, built without the halves that its configuration's `drop_spec` names."""

    class Dropped(stock):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            remove_halves(self, config.drop_spec)

        @classmethod
        def is_custom_code(cls) -> bool:
            """No more than the stock class: names on disk differ from the modules' as they do there."""
            return bool(stock.is_custom_code())

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            """Save as a folder of the profile "dropped"."""
            super().save_pretrained(save_directory, *args, **kwargs)
            write_files(Path(save_directory), json.loads((Path(save_directory) / "config.json").read_text()))

    Dropped.__name__ = Dropped.__qualname__ = stock.__name__  # by which transformers finds how names on disk differ
    return Dropped


def write_files(folder: Path, saved: dict[str, Any]) -> None:
    """Write config.json of a dropped model, from that of its stock class, and this file beside it."""
    base = {key: value for key, value in saved.items() if key not in ("drop_spec", "kv_sharing_modes")}
    for part in base.values():
        if isinstance(part, dict):
            part.pop("kv_sharing_modes", None)
    config = {
        "architectures": ["HoneloomDroppedForCausalLM"],
        "auto_map": {
            "AutoConfig": "honeloom_dropped.HoneloomDroppedConfig",
            "AutoModelForCausalLM": "honeloom_dropped.HoneloomDroppedForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "base": base,
        "drop_spec": saved["drop_spec"],
        **{key: base[key] for key in _SIZES if key in base},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "honeloom_dropped.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")


class HoneloomDroppedForCausalLM:
    """The door for the Auto classes; what comes out is the stock class without the dropped halves."""

    config_class = HoneloomDroppedConfig

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Nothing is to be remembered: `save_pretrained` writes this file itself."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a dropped folder; arguments are those of the stock class."""
        if config is None:
            config = HoneloomDroppedConfig.from_pretrained(path)
        kwargs.pop("trust_remote_code", None)
        return _class_of(config).from_pretrained(path, *args, config=config.stock(), **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return _class_of(config)._from_config(config.stock(), **kwargs)


def _class_of(config: HoneloomDroppedConfig) -> Any:
    """The class that transformers has for the base, without what is dropped."""
    stock: Any = AutoModelForCausalLM._model_mapping[type(config.base)]
    return dropped_class(stock[0] if isinstance(stock, tuple) else stock)


def register() -> None:
    """Let transformers' Auto classes open dropped folders; may be called any number of times."""
    AutoConfig.register(MODEL_TYPE, HoneloomDroppedConfig, exist_ok=True)
    AutoModelForCausalLM.register(HoneloomDroppedConfig, HoneloomDroppedForCausalLM, exist_ok=True)
