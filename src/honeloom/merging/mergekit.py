"""mergekit's YAML in our words: same recipe, same result wherever the definitions agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from honeloom.errors import ConfigError

__all__ = ["differences", "is_mergekit", "translate"]

_RENAMED: Mapping[str, str] = {
    "lambda": "scale",
    "lambda_": "scale",
    "nuslerp_flatten": "flatten",
    "nuslerp_row_wise": "row_wise",
    "normalize_weights": "normalize",
}
_IGNORED = ("int8_mask",)
"""Settings of how mergekit stores masks; the result does not depend on them."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ties": {"density": 1.0, "normalize": True},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "della": {"density": 1.0, "epsilon": 0.15, "normalize": True},
    "della_linear": {"density": 1.0, "epsilon": 0.15},
    "breadcrumbs": {"density": 1.0, "gamma": 0.01},
    "breadcrumbs_ties": {"density": 1.0, "gamma": 0.01},
    "sce": {"select_topk": 1.0},
}
"""What a file means that leaves a setting out, where our default is the paper's and not mergekit's."""

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Whether a configuration is written in mergekit's words."""
    return "merge_method" in data


def differences(method: str, settings: Mapping[str, Any], *, gradients: bool, weights: bool) -> list[str]:
    """Where a mergekit file gives another result here than in mergekit, one line each.

    Parameters
    ----------
    method : str
        Its name.
    settings : mapping
        As translated.
    gradients : bool
        Whether any setting varies over the layers, in our way.
    weights : bool
        Whether weights differ, and count.
    """
    lines = []
    if settings.get("rescale") == "inverse":
        lines.append(
            f"{method}: kept entries are divided by their probability, as in the paper; mergekit scales them so "
            "that the sum of absolute values stays, which is biased"
        )
    if method.startswith("breadcrumbs"):
        lines.append(
            f"{method}: mergekit zeroes a whole tensor where gamma times its size is below 1; here nothing is cut"
        )
    if method == "karcher" and weights:
        lines.append("karcher: weights count here; mergekit ignores them")
    if method == "model_stock":
        lines.append("model_stock: a negative mean cosine gives the base here; mergekit extrapolates beyond it")
    if gradients:
        lines.append("a gradient reaches the final norm and the head at its last value; mergekit gives them the first")
    return lines


def translate(data: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a mergekit configuration; whatever it cannot express is refused by name.

    Parameters
    ----------
    data : mapping
        One document. A key `compat: mergekit` asks for mergekit's behaviour where it is not the paper's.

    Raises
    ------
    ConfigError
        It has `modules`, or a model reference or data type without a counterpart.
    """
    rest = dict(data)
    if "modules" in rest:
        raise ConfigError("modules: the parts of a model are merged one by one; give each part's folder its own file")
    kind = str(rest.pop("merge_method"))
    method: dict[str, Any] = {"type": kind, **_DEFAULTS.get(kind, {})}
    parameters = _renamed(rest.pop("parameters", None))
    shared_weight = parameters.pop("weight", None)
    if "rescale" in parameters:
        parameters["rescale"] = _rescale(parameters["rescale"], rest.get("compat"))
    elif kind.startswith(("dare", "della")):
        parameters["rescale"] = _rescale(True, rest.get("compat"))
    if "row_wise" in parameters:  # mergekit's flag has the two directions the other way round
        parameters["row_wise"] = not parameters["row_wise"]
    elif parameters.get("flatten") is False:
        parameters["row_wise"] = True
    method.update(parameters)
    result: dict[str, Any] = {"method": method, "source_format": "mergekit", "chat_template": "auto"}
    base = rest.pop("base_model", None)
    if base is not None:
        result["base_model"] = base = _reference(base)
    if rest.get("models") is not None:
        models = [_source(entry, shared_weight) for entry in rest.pop("models")]
        # The base among the models has no task vector; only an average counts it.
        keeps_base = kind in ("linear", "karcher", "passthrough")
        result["models"] = [m for m in models if keeps_base or m["model"] != base]
    if rest.get("slices") is not None:
        result["slices"] = [_slice(entry, base, shared_weight) for entry in rest.pop("slices")]
    if kind == "karcher" and rest.get("compat") == "mergekit":
        for source in (*result.get("models", ()), *(s for part in result.get("slices", ()) for s in part["sources"])):
            source["weight"] = 1.0  # mergekit does not look at it
    _translate_types(rest, result)
    _translate_tokenizer(rest, result)
    return {**result, **rest}


def _renamed(parameters: Any) -> dict[str, Any]:
    return {
        _RENAMED.get(name, name): _values(value) for name, value in (parameters or {}).items() if name not in _IGNORED
    }


def _values(value: Any) -> Any:
    """A list of filters, where a lone value among them is mergekit's way to say "else"."""
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return [v if isinstance(v, dict) else {"value": v} for v in value]
    return value


def _rescale(value: Any, compat: Any) -> str:
    if not value:
        return "none"
    return "l1" if compat == "mergekit" else "inverse"


def _source(entry: Any, weight: Any = None) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or "model" not in entry:
        entry = {"model": entry}
    source = {k: v for k, v in entry.items() if k not in ("parameters", "model")}
    source["model"] = _reference(entry["model"])
    own = _renamed(entry.get("parameters"))
    if weight is not None:
        own.setdefault("weight", weight)
    return {**source, **own}


def _slice(entry: Mapping[str, Any], base: str | None, weight: Any) -> dict[str, Any]:
    own = entry.get("base_model")
    if own is not None and _reference(own) != base:
        raise ConfigError(f"slices: base_model {own!r} differs from the file's, {base!r}; one base serves all slices")
    rest = {k: v for k, v in entry.items() if k not in ("sources", "parameters", "base_model")}
    sources = [_source(s, weight) for s in entry.get("sources") or []]
    return {**rest, "sources": sources, "parameters": _renamed(entry.get("parameters"))}


def _reference(value: Any) -> str:
    """A model as one string: path or id, @revision, +adapter."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        known = {"model", "lora", "path", "revision"}
        unknown = sorted(set(value) - known - {"override_architecture"})
        if value.get("override_architecture") or unknown:
            what = unknown[0] if unknown else "override_architecture"
            raise ConfigError(f"model {dict(value)!r}: {what!r} has no counterpart; write path@revision+adapter")
        inner = value.get("model", value.get("path"))
        text = _reference(inner)
        if value.get("revision") and "model" not in value:
            text += f"@{value['revision']}"
        return f"{text}+{_reference(value['lora'])}" if value.get("lora") else text
    raise ConfigError(f"model {value!r}: must be a path or a hub id, with @revision and +adapter as needed")


def _translate_types(rest: dict[str, Any], result: dict[str, Any]) -> None:
    dtype = rest.pop("dtype", None)
    out = rest.pop("out_dtype", None) or dtype
    if out is not None:
        result["dtype"] = _DTYPES.get(str(out), out)


def _translate_tokenizer(rest: dict[str, Any], result: dict[str, Any]) -> None:
    source = rest.pop("tokenizer_source", None)
    settings = rest.pop("tokenizer", None)
    if source is not None and settings is not None:
        raise ConfigError("tokenizer_source and tokenizer are both given; keep one")
    if source is not None:
        result["tokenizer"] = {"source": source if isinstance(source, str) else _reference(source)}
    if settings is None:
        return
    translated = {k: v for k, v in settings.items() if k not in ("tokens", "source")}
    named = settings.get("source", "base")
    translated["source"] = named if isinstance(named, str) else _reference(named)
    translated["tokens"] = {name: _token(rule) for name, rule in (settings.get("tokens") or {}).items()}
    result["tokenizer"] = translated


def _token(rule: Mapping[str, Any]) -> dict[str, Any]:
    source = rule.get("source", "")
    if isinstance(source, Mapping) and "kind" in source:
        if source["kind"] == "zero":
            source = "zero"
        elif source["kind"] == "model_token":
            token = source.get("token_id", source.get("token"))
            source = f"{_reference(source['model'])}#{token}"
        else:
            raise ConfigError(f"tokenizer.tokens: kind {source['kind']!r} is not known; use model_token or zero")
    elif not isinstance(source, str):
        source = _reference(source)
    return {"source": source, "force": bool(rule.get("force", False))}
