"""Loading models and tokenizers: safetensors only, no code from repositories, headers checked first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from honeloom.backends.devices import choose_device, choose_dtype
from honeloom.checkpoint.headers import inspect_weights
from honeloom.errors import CheckpointError, SourceError

__all__ = ["load_config", "load_model", "load_tokenizer", "max_positions"]


def load_config(path: Path) -> Any:
    """Read a model's configuration; refuses repositories that need their own code."""
    file = path / "config.json"
    try:
        data = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise SourceError(f"{path}: no config.json; a model folder needs one") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if data.get("auto_map"):
        raise CheckpointError(
            f"{file}: auto_map asks to run code from the repository ({', '.join(map(str, data['auto_map'].values()))});"
            " honeloom never runs such code. Use a model whose architecture transformers knows"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
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
        A weight file is damaged, tensors are missing, or the architecture is unknown.
    """
    if (path / "adapter_config.json").exists():
        if base is None:
            raise SourceError(f"{path}: an adapter, and its base model is not known; set base_model_name_or_path in it")
        inner = load_model(base, device=device, dtype=dtype)
        _check_weights(path)
        return PeftModel.from_pretrained(inner, path, is_trainable=trainable).eval()
    config = load_config(path)
    _check_weights(path)
    transformers.utils.logging.disable_progress_bar()  # it would draw over ours
    where = choose_device(device)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=choose_dtype(dtype, where),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors are missing, first {missing[0]!r}; transformers would fill them with "
            "random numbers. The folder is incomplete, or holds a dropped model that needs its own loader"
        )
    return model.to(where).eval()


def _check_weights(path: Path) -> None:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: no *.safetensors file, so no weights to load; the folder is incomplete")
    for file in files:
        fault = inspect_weights(file)
        if fault:
            raise CheckpointError(f"{file}: {fault}")
    index = path / "model.safetensors.index.json"
    if index.exists():
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        absent = sorted(s for s in shards if not (path / s).exists())
        if absent:
            raise CheckpointError(f"{index}: names {absent[0]!r}, which is not there; download the folder again")


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
