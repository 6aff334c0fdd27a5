"""Loading models and tokenizers: safetensors only, no code from repositories, headers checked first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from honeloom.backends.devices import choose_device, choose_dtype
from honeloom.checkpoint.folders import read_config
from honeloom.checkpoint.headers import inspect_weights
from honeloom.checkpoint.reader import weight_files
from honeloom.errors import CheckpointError, SourceError

__all__ = ["DEFAULT_MAX_TOKENS", "load_config", "load_model", "load_tokenizer", "max_positions", "token_limit"]

DEFAULT_MAX_TOKENS = 2048
"""Tokens per row where nobody asked for more: memory grows with them, whatever the model can take."""

# What a config gets wrong if the weights hold tensors that it has no place for.
_FIELDS = (
    (re.compile(r"\.experts\.\d+\."), "the number of experts (num_local_experts, num_experts)"),
    (re.compile(r"\.\d+\..*\.bias$"), "a bias switch (attention_bias, mlp_bias)"),
    (re.compile(r"\.\d+\."), "num_hidden_layers"),
    (re.compile(r"lm_head"), "tie_word_embeddings"),
)


def load_config(path: Path) -> Any:
    """Read a model's configuration; refuses repositories that need their own code."""
    file = path / "config.json"
    code = read_config(path).get("auto_map")
    if code:
        names = ", ".join(map(str, code.values())) if isinstance(code, dict) else str(code)
        raise CheckpointError(
            f"{file}: auto_map asks to run code from the repository ({names});"
            " honeloom never runs such code. Use a model whose architecture transformers knows"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise CheckpointError(f"{file}: transformers {transformers.__version__} cannot read it: {error}") from None


def load_model(
    path: Path, *, base: Path | None = None, device: str = "auto", dtype: str = "auto", trainable: bool = False
) -> Any:
    """Load a causal language model, or an adapter on its base, in evaluation mode.

    Parameters
    ----------
    path : Path
        Model folder or PEFT adapter folder.
    base : Path, optional
        The base model's folder, for an adapter.
    device, dtype : str
        As on the command line.
    trainable : bool
        Whether an adapter's weights will be trained.

    Raises
    ------
    CheckpointError
        A weight file is damaged, the weights do not fit the configuration, or the
        architecture is unknown.
    """
    if (path / "adapter_config.json").exists():
        if base is None:
            raise SourceError(f"{path}: an adapter, and its base model is not known; set base_model_name_or_path in it")
        _check_weights([_adapter_file(path)])
        inner = load_model(base, device=device, dtype=dtype)
        return PeftModel.from_pretrained(inner, path, is_trainable=trainable).eval()
    config = load_config(path)
    _check_weights(weight_files(path))
    transformers.utils.logging.disable_progress_bar()  # it would draw over ours
    where = choose_device(device)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=choose_dtype(dtype, where),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # they come back in the loading info and are refused below
        output_loading_info=True,
    )
    model, info = loaded
    _check_fit(path, info)
    return model.to(where).eval()


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
