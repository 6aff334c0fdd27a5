"""Open the base of federated clients as what they train of it: adapters, or all its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.federated_model import FederatedModel
from honeloom.backends.hf.federated_weights import FederatedWeights
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer, token_limit
from honeloom.errors import SourceError
from honeloom.types.rows import Row

__all__ = ["open_port"]


def open_port(
    folder: Path, settings: Mapping[str, Any], rows: Mapping[str, Sequence[Row]], *, name: str
) -> FederatedModel | FederatedWeights:  # fmt: skip
    """Load a base and take in clients' rows.

    Parameters
    ----------
    folder : Path
        Of the base.
    settings : mapping
        `method`, `targets`, `batch_size`, `max_length`, `load_in`, `dtype` and `device`, as in FED.yaml.
    rows : mapping
        Of the clients that this process is.
    name : str
        Of the base, for messages.

    Raises
    ------
    SourceError
        The base has no tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise SourceError(f"{name}: no tokenizer, so it cannot be tuned on rows; add tokenizer.json")
    full = settings["method"] == "full"
    # Small steps vanish in 16 bits, so all weights are moved in float32.
    dtype = "fp32" if full and settings["dtype"] == "auto" else settings["dtype"]
    model = load_model(folder, loading=Loading(settings["device"], dtype, settings["load_in"]))
    encoder = Encoder(tokenizer, token_limit(model.config, tokenizer, settings["max_length"]), train=True)
    if full:
        return FederatedWeights(model, encoder, rows, batch_size=settings["batch_size"])
    return FederatedModel(model, encoder, rows, targets=settings["targets"], batch_size=settings["batch_size"])
