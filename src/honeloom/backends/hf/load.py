"""Loading models and tokenizers: safetensors only, no code from repositories, headers checked first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_bitsandbytes_available, is_flash_attn_2_available

from honeloom.backends.devices import DTYPES, choose_device, choose_dtype, free_memory
from honeloom.checkpoint.folders import read_config
from honeloom.checkpoint.headers import inspect_weights
from honeloom.checkpoint.reader import weight_files
from honeloom.config.base import DEFAULT_MAX_TOKENS
from honeloom.dropping.export.dropped import AUTO_MAP
from honeloom.dropping.export.halves import DROPPED
from honeloom.errors import CheckpointError, ConfigError, MissingExtraError, SourceError
from honeloom.planning.memory import Work, read_decoder, weight_bytes
from honeloom.registry import load_target

__all__ = [
    "MIXTURES",
    "Loading",
    "load_arguments",
    "load_config",
    "load_model",
    "load_tokenizer",
    "max_positions",
    "token_limit",
]

# What a config gets wrong if the weights hold tensors that it has no place for.
_FIELDS = (
    (re.compile(r"\.experts\.\d+\."), "the number of experts (num_local_experts, num_experts)"),
    (re.compile(r"\.\d+\..*\.bias$"), "a bias switch (attention_bias, mlp_bias)"),
    (re.compile(r"\.\d+\."), "num_hidden_layers"),
    (re.compile(r"lm_head"), "tie_word_embeddings"),
)


MIXTURES = {
    "honeloom_mixture": "honeloom.backends.hf.mixture_model:register",
    "honeloom_models": "honeloom.backends.hf.models_mixture:register",
    DROPPED: "honeloom.backends.hf.dropped_model:register",
}
"""Model types of our own -> what makes them known to transformers."""

ATTENTION = {"sdpa": "sdpa", "flash": "flash_attention_2", "eager": "eager"}


@dataclass(frozen=True, slots=True)
class Loading:
    """How weights are loaded: device, number type, quantisation and attention, as on the command line.

    `spread` lets a model that one GPU cannot hold be laid over all of them and the host's
    memory; it is for inference.
    """

    device: str = "auto"
    dtype: str = "auto"
    load_in: str | None = None
    attn: str | None = None
    spread: bool = False

    @classmethod
    def of(cls, config: Any, *, spread: bool = False) -> Loading:
        """Take the settings of a verb, as far as it has them."""
        return cls(config.device, config.dtype, getattr(config, "load_in", None), getattr(config, "attn", None), spread)


def load_arguments(loading: Loading, device: torch.device, dtype: torch.dtype, *, fits: bool) -> dict[str, Any]:
    """What `from_pretrained` is told about number type, placement, quantisation and attention.

    Parameters
    ----------
    loading : Loading
        What was asked for.
    device, dtype
        What `auto` came to.
    fits : bool
        Whether one device holds the weights.

    Returns
    -------
    dict
        NF4 with double quantisation is QLoRA's setting (arXiv:2305.14314), int8 is LLM.int8()
        (arXiv:2208.07339). Without `device_map` the model is loaded on the host.
    """
    arguments: dict[str, Any] = {"dtype": dtype}
    if loading.attn:
        arguments["attn_implementation"] = ATTENTION[loading.attn]
    if loading.load_in == "4bit":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif loading.load_in == "8bit":
        arguments["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if loading.spread and not fits:
        arguments["device_map"] = "auto"
    elif loading.load_in:
        arguments["device_map"] = {"": str(device)}
    return arguments


def _check_loading(path: Path, loading: Loading, device: torch.device, config: Mapping[str, Any]) -> bool:
    """Refuse what cannot work here; return whether the weights will be quantised."""
    stored = config.get("quantization_config")
    if loading.load_in and stored:
        method = stored.get("quant_method", "unknown")
        raise ConfigError(f"{path}: its weights are quantised already ({method}); leave load_in {loading.load_in} out")
    wants = bool(loading.load_in) or (stored or {}).get("quant_method") == "bitsandbytes"
    if wants and not is_bitsandbytes_available():
        what = f"load_in {loading.load_in}" if loading.load_in else f"{path}"
        raise MissingExtraError(f"{what} needs bitsandbytes: pip install 'honeloom[quant]'")
    if wants and device.type == "mps":
        raise ConfigError("bitsandbytes weights are not for mps; use --device cpu, or leave load_in out")
    if loading.attn == "flash" and not (device.type == "cuda" and is_flash_attn_2_available()):
        lacks = "the package flash-attn" if device.type == "cuda" else f"a CUDA device (this is {device.type})"
        raise ConfigError(f"--attn flash needs {lacks}; use --attn sdpa, which is exact as well")
    return wants or bool(stored)


def load_config(path: Path) -> Any:
    """Read a model's configuration; refuses repositories that need their own code."""
    file = path / "config.json"
    document = read_config(path)
    code = document.get("auto_map")
    if code and not (document.get("model_type") == DROPPED and code == AUTO_MAP):  # ours, and read without its file
        names = ", ".join(map(str, code.values())) if isinstance(code, dict) else str(code)
        raise CheckpointError(
            f"{file}: auto_map asks to run code from the repository ({names});"
            " honeloom never runs such code. Use a model whose architecture transformers knows"
        )
    if document.get("model_type") in MIXTURES:
        load_target(MIXTURES[document["model_type"]])()
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise CheckpointError(f"{file}: transformers {transformers.__version__} cannot read it: {error}") from None


def load_model(path: Path, *, base: Path | None = None, loading: Loading | None = None, trainable: bool = False) -> Any:
    """Load a causal language model, or an adapter on its base, in evaluation mode.

    Parameters
    ----------
    path : Path
        Model folder or PEFT adapter folder.
    base : Path, optional
        The base model's folder, for an adapter.
    loading : Loading, optional
        Device, number type, quantisation, attention; by default all of them `auto`.
    trainable : bool
        Whether an adapter's weights will be trained.

    Raises
    ------
    CheckpointError
        A weight file is damaged, the weights do not fit the configuration, or the
        architecture is unknown.
    ConfigError, MissingExtraError
        The quantisation or attention cannot be had here.
    """
    loading = loading or Loading()
    if (path / "adapter_config.json").exists():
        if base is None:
            raise SourceError(f"{path}: an adapter, and its base model is not known; set base_model_name_or_path in it")
        _check_weights([_adapter_file(path)])
        inner = load_model(base, loading=loading)
        adapted = load_target("peft:PeftModel")  # here, for plain models need no extra
        return adapted.from_pretrained(inner, path, is_trainable=trainable).eval()
    config = load_config(path)
    device = choose_device(loading.device)
    quantised = _check_loading(path, loading, device, config.to_dict())
    files = weight_files(path)
    _check_weights(files)
    transformers.utils.logging.disable_progress_bar()  # it would draw over ours
    dtype = choose_dtype(loading.dtype, device)
    fits = device.type != "cuda" or _loaded_bytes(config.to_dict(), files, loading, dtype) < 0.9 * free_memory(device)
    arguments = load_arguments(loading, device, dtype, fits=fits)
    model, info = _from_pretrained(path, config, arguments, loading.attn)
    _check_fit(path, info)
    if quantised:
        _keep_codes(model)
    if loading.load_in:
        _require_quantised(path, model, loading.load_in)
    placed = quantised or "device_map" in arguments
    return (model if placed else model.to(device)).eval()


def _loaded_bytes(config: Mapping[str, Any], files: Sequence[Path], loading: Loading, dtype: torch.dtype) -> int:
    """Bytes of the weights once they are loaded; those of the files where the family's sizes are not known."""
    name = next(name for name, kind in DTYPES.items() if kind is dtype)
    try:
        work = Work("inference", 1, 1, dtype=name, load_in=loading.load_in)
        return weight_bytes(read_decoder(config), work)
    except CheckpointError:
        return sum(f.stat().st_size for f in files)


def _require_quantised(path: Path, model: Any, load_in: str) -> None:
    """Refuse experts that stay as they are: bitsandbytes replaces linear layers, and they are one tensor per layer."""
    left = {n: p.numel() for n, p in model.named_parameters() if p.ndim == 3 and ".gate." not in n}
    if left:
        raise ConfigError(
            f"{path}: load_in {load_in} would leave its experts unquantised ({next(iter(left))} and others, "
            f"{sum(left.values()):,} weights), for bitsandbytes replaces linear layers alone; leave load_in out"
        )


def _keep_codes(model: Any) -> None:
    """Stop bitsandbytes from laying 4-bit weights out anew in the first forward on a CPU.

    It would round their scales to bf16, compute in bf16 whatever was asked for, and lose bits on
    the way back to training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _from_pretrained(
    path: Path, config: Any, arguments: dict[str, Any], attn: str | None
) -> tuple[Any, dict[str, Any]]:
    """The model and what transformers says of its loading."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they come back in the loading info and are refused below
            output_loading_info=True,
            **arguments,
        )
    except ValueError as error:
        if attn is None or "attention" not in str(error):
            raise
        others = ", ".join(sorted(ATTENTION.keys() - {attn}))
        raise ConfigError(f"--attn {attn}: a {config.model_type} model has no such attention; use {others}") from None
    return loaded


def _check_fit(path: Path, info: dict[str, Any]) -> None:
    """Refuse weights that do not fit the configuration: transformers would load what it can and go on."""
    mismatched = sorted(info["mismatched_keys"], key=str)
    if mismatched:
        name, stored, expected = mismatched[0]
        raise CheckpointError(
            f"{path}: tensor {name!r} is {tuple(stored)}, and config.json asks for {tuple(expected)} "
            f"({len(mismatched)} such tensors); config.json does not belong to these weights"
        )
    # Stray buffers and counters are harmless; parameters that find no place mean a wrong config.
    unexpected = sorted(k for k in info["unexpected_keys"] if k.endswith((".weight", ".bias")))
    if unexpected:
        name = unexpected[0]
        field = next((field for pattern, field in _FIELDS if pattern.search(name)), "model_type or architectures")
        raise CheckpointError(
            f"{path}: config.json has no place for {len(unexpected)} tensors of the weights, first {name!r}, so they "
            f"would be left out; check {field} in config.json"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors are missing, first {missing[0]!r}; transformers would fill them with "
            "random numbers. The folder is incomplete, or holds a dropped model that needs its own loader"
        )


def _adapter_file(path: Path) -> Path:
    """The one weight file of an adapter; without it PEFT would unpickle adapter_model.bin."""
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointError(
            f"{path}: no {file.name}; honeloom reads adapters from that file only, never pickled ones"
        )
    return file


def _check_weights(files: Sequence[Path]) -> None:
    for file in files:
        fault = inspect_weights(file)
        if fault:
            raise CheckpointError(f"{file}: {fault}")


def load_tokenizer(path: Path, *, base: Path | None = None) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model folder (of its base, for an adapter without one); None if there is none."""
    for folder in (path, base):
        if folder and any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            try:
                return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            except (ValueError, KeyError, OSError) as error:
                raise CheckpointError(f"{folder}: its tokenizer cannot be read: {error}") from None
    return None


def max_positions(config: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """The longest input in tokens: the config's limit, else the tokenizer's, else 2048."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    limit = getattr(tokenizer, "model_max_length", None)
    return limit if isinstance(limit, int) and 0 < limit < 10**7 else 2048


def token_limit(config: Any, tokenizer: PreTrainedTokenizerBase | None, asked: int | None) -> int:
    """Tokens per row: what was asked for, else DEFAULT_MAX_TOKENS; never more than the model takes."""
    return min(max_positions(config, tokenizer), asked or DEFAULT_MAX_TOKENS)
