"""A PEFT LoRA adapter folder: its factors alone, or as additions to the tensors of its base model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from honeloom.checkpoint.architectures import Architecture
from honeloom.checkpoint.reader import Checkpoint
from honeloom.errors import CheckpointError

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "LoraAdapter", "LoraFactors", "LoraFile", "require_plain"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_COPY = re.compile(r"base_model\.model\.(?P<module>.+?)(\.base_layer)?\.weight")
_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?:(?P<linear>[AB])\.weight|embedding_(?P<embedding>[AB]))"
)
_ROW_ELEMENTS = 1 << 18

REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA rescales the whole weight",
    "lora_bias": "its factors have biases",
    "trainable_token_indices": "it replaces token embeddings",
    "target_parameters": "it targets parameters that are not modules",
    "layer_replication": "it repeats layers",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "use_qalora": "it pools its input",
    "use_bdlora": "its factors are block diagonal",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it rescales singular values",
    "monteclora_config": "its factors are sampled",
    "velora_config": "it projects activations",
}
"""Settings that make an adapter something other than W + scale * B @ A."""

_NOT_PLAIN: Mapping[str, str] = {
    "fan_in_fan_out": "its weights are stored transposed",
    "modules_to_save": "it replaces whole modules",
}
"""Settings under which the factors still add up, but are no plain addition to the base's tensors on disk."""

CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Values of init_lora_weights, or their beginnings, that also take the first B @ A out of the base."""


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One weight's addition, scale * B @ A, with B (m, r) and A (r, n) named as in the file."""

    b_name: str
    a_name: str
    scale: float
    shape: tuple[int, int]


class LoraFile:
    """The low-rank factors in an adapter folder, without its base.

    Factors are told apart by the ends of their names, never by their shapes. Use as a context
    manager, or call `close`.

    Parameters
    ----------
    folder : Path
        Holds adapter_config.json and adapter_model.safetensors.

    Attributes
    ----------
    config : dict
        Content of adapter_config.json.
    weights : Checkpoint
        The tensors.
    factors : dict
        Module path -> its factors, with the scale that the loader would apply.
    others : list of str
        Names of tensors that are no factors.

    Raises
    ------
    CheckpointError
        The files are unsound, or the adapter is more than LoRA or rsLoRA.
    """

    def __init__(self, folder: Path) -> None:
        self.config = _read_config(folder)
        file = folder / ADAPTER_WEIGHTS
        if not file.is_file():
            raise CheckpointError(f"{folder}: no {ADAPTER_WEIGHTS}; pickled adapters are never read")
        self.folder = folder
        self.weights = Checkpoint(folder, [file])
        self.factors: dict[str, LoraFactors] = {}
        self.others: list[str] = []
        self._pair()

    def _pair(self) -> None:
        modules: dict[str, dict[str, str]] = {}
        for name in self.weights.names():
            if match := _NAME.fullmatch(name):
                modules.setdefault(match["module"], {})[match["linear"] or match["embedding"]] = name
            else:
                self.others.append(name)
        for module, found in modules.items():
            if set(found) != {"A", "B"}:
                raise CheckpointError(f"{self.folder}: the target {module!r} lacks one of its two factors")
            self.factors[module] = self._factors(module, found["B"], found["A"])

    def _factors(self, module: str, b_name: str, a_name: str) -> LoraFactors:
        a, b = self.weights.info(a_name).shape, self.weights.info(b_name).shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0:
            raise CheckpointError(
                f"{self.folder}: factors of {module!r} have shapes B {b} and A {a}; B @ A does not exist"
            )
        rank = a[0]
        alpha = _pattern_value(self.config.get("alpha_pattern") or {}, module, self.config.get("lora_alpha", rank))
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"{self.folder}: lora_alpha of {module!r} is {alpha!r}; it must be a number")
        scale = alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank
        return LoraFactors(b_name, a_name, scale, (b[0], a[1]))

    def close(self) -> None:
        """Close the file."""
        self.weights.close()

    def __enter__(self) -> LoraFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def require_plain(adapter: LoraFile) -> None:
    """Raise CheckpointError unless every tensor is a factor of a linear layer that adds to a stored weight.

    Raises
    ------
    CheckpointError
        It stores weights transposed, replaces modules, changes biases, or targets embeddings.
    """
    file = adapter.folder / ADAPTER_CONFIG
    for key, reason in _NOT_PLAIN.items():
        if adapter.config.get(key):
            raise CheckpointError(f"{file}: {key} is set, and {reason}; merge it with the library that made it first")
    bias = adapter.config.get("bias", "none")
    if bias != "none":
        raise CheckpointError(f"{file}: bias is {bias!r}, so it changes biases too; only 'none' can be merged")
    for module, factors in adapter.factors.items():
        if factors.a_name.endswith(".lora_embedding_A"):
            raise CheckpointError(
                f"{adapter.folder}: {module!r} is an embedding, whose factors are stored transposed; "
                "merge it with the library that made it first"
            )


class LoraAdapter:
    """The additions of an adapter, by the base's tensor names on disk.

    Parameters
    ----------
    folder : Path
        Holds adapter_config.json and adapter_model.safetensors.
    base : Checkpoint
        Weights of its base model.
    architecture : Architecture
        Of the base; translates module paths to names on disk.

    Raises
    ------
    CheckpointError
        The files are unsound, the adapter is more than LoRA or rsLoRA, or it targets a tensor
        that the base does not have.
    """

    def __init__(self, folder: Path, base: Checkpoint, architecture: Architecture) -> None:
        self._file = LoraFile(folder)
        require_plain(self._file)
        self.folder = folder
        self.weights = self._file.weights
        self._held: tuple[LoraFactors, torch.Tensor, torch.Tensor] | None = None
        self.factors = self._match(base, architecture)

    def _match(self, base: Checkpoint, architecture: Architecture) -> dict[str, LoraFactors]:
        for name in self._file.others:
            if not self._is_copy(name, base, architecture):
                raise CheckpointError(
                    f"{self.folder}: tensor {name!r} is no LoRA factor of a linear layer and no copy of the base's"
                )
        names = set(base.names())
        found = {}
        for module, factors in self._file.factors.items():
            target = _disk_name(module, names, architecture)
            if target is None:
                raise CheckpointError(
                    f"{self.folder}: the target {module!r} is not a weight of the base model; "
                    "is this the base it was trained on?"
                )
            found[target] = factors
        return found

    def _is_copy(self, name: str, base: Checkpoint, architecture: Architecture) -> bool:
        """PEFT also stores embeddings and head when one of them is a target; unchanged, they add nothing."""
        match = _COPY.fullmatch(name)
        source = _disk_name(match["module"], set(base.names()), architecture) if match else None
        if source is None or self.weights.info(name).shape != base.info(source).shape:
            return False
        return torch.equal(self.weights.read(name, torch.float32), base.read(source, torch.float32))

    def add_to(self, name: str, start: int, values: torch.Tensor) -> torch.Tensor:
        """Add the adapter's part to elements start... of a flattened tensor of the base.

        Parameters
        ----------
        name : str
            The base's tensor on disk.
        start : int
            Index of the first element.
        values : Tensor
            The base's elements, flat, float64; changed in place.

        Returns
        -------
        Tensor
            `values`.
        """
        factors = self.factors.get(name)
        if factors is None or not len(values):
            return values
        b, a = self._read(factors)
        rows, columns = factors.shape
        # Blocks of rows on a fixed grid: matrix products may round differently for other heights,
        # and the result must not depend on how the caller cuts the tensor.
        height = max(1, _ROW_ELEMENTS // columns)
        stop = start + len(values)
        for top in range(start // columns // height * height, -(-stop // columns), height):
            block = (b[top : min(top + height, rows)] @ a).mul_(factors.scale).view(-1)
            first = top * columns
            low, high = max(start, first), min(stop, first + len(block))
            values[low - start : high - start] += block[low - first : high - first]
        return values

    def _read(self, factors: LoraFactors) -> tuple[torch.Tensor, torch.Tensor]:
        """B and A in float64; the last pair is kept, for a tensor comes in many pieces."""
        held = self._held  # another thread may put its own pair there
        if held is None or held[0] is not factors:
            b, a = (self.weights.read(name, torch.float64) for name in (factors.b_name, factors.a_name))
            self._held = held = (factors, b, a)
        return held[1:]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> LoraAdapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {ADAPTER_CONFIG}; an adapter folder needs one") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{file}: peft_type is {kind!r}; only LORA adapters can be merged here")
    for key, reason in REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{file}: {key} is set, and {reason}; merge it with the library that made it first")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}, so it fits a base that was changed when it began; save it again "
            "with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    return config


def _disk_name(module: str, base_names: set[str], architecture: Architecture) -> str | None:
    """The base's tensor for a module path of the loaded model."""
    candidates = [f"{module}.weight"]
    if module.startswith(f"{architecture.layers}."):
        rest = module.removeprefix(architecture.layers)
        candidates += [f"{prefix}{rest}.weight" for prefix in architecture.disk_layers]
    if module == architecture.head:
        candidates.append(f"{architecture.disk_head}.weight")
    return next((name for name in candidates if name in base_names), None)


def _pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """First pattern that matches the end of the module path, as PEFT reads them."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CheckpointError(f"alpha_pattern {pattern!r} is not a regular expression: {error}") from None
    return default
