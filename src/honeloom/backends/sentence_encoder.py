"""Vectors of rows by an encoder of the package sentence-transformers (extra `embed`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from honeloom.backends.devices import choose_device, memory_guard
from honeloom.backends.hf.score import windows
from honeloom.errors import MissingExtraError, SourceError
from honeloom.types.rows import Row

try:
    from sentence_transformers import SentenceTransformer
except ImportError as error:
    raise MissingExtraError(
        f"sentence-transformers is not installed ({error.name}): pip install 'honeloom[embed]'"
    ) from None

__all__ = ["SentenceEncoder", "sentence_vectors"]

WINDOW = 32
"""Batches that are sorted by length together."""


class SentenceEncoder:
    """A loaded encoder; it cuts a row at its own limit of tokens.

    Parameters
    ----------
    model : SentenceTransformer
        The encoder.
    batch_size : int
        Rows per forward pass.
    """

    def __init__(self, model: SentenceTransformer, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size

    @classmethod
    def open(cls, encoder: str, *, device: str = "auto", batch_size: int = 16) -> SentenceEncoder:
        """Load an encoder from a folder, without the network, or from the hub.

        Weights are read from safetensors alone, and no code of a repository is run.

        Raises
        ------
        SourceError
            It is not there, or cannot be loaded.
        """
        local = Path(encoder).is_dir()
        try:
            model = SentenceTransformer(
                encoder, device=str(choose_device(device)), local_files_only=local, trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            what = "folder" if local else "folder or hub id"
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise SourceError(
                f"encoder {encoder}: cannot be loaded ({first}); give the {what} of a sentence-transformers model "
                "with safetensors weights, or use the embedding `tfidf` or `hidden`"
            ) from None
        return cls(model, batch_size)

    def embed(self, rows: Iterable[Row]) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the vectors of the rows in order, some hundred at a time: (n, d); a row without text gives NaN."""
        advice = [f"--batch-size {max(1, self.batch_size // 2)}"]
        for window in windows((f"{row.prompt}\n{row.response}".strip() for row in rows), self.batch_size * WINDOW):
            with memory_guard(self.model.device, "embedding rows", advice):
                found = self.model.encode(window, batch_size=self.batch_size, show_progress_bar=False)
            vectors = np.array(found, dtype=np.float32)
            vectors[[i for i, text in enumerate(window) if not text]] = np.nan
            yield vectors


def sentence_vectors(
    rows: Iterable[Row], encoder: str, *, device: str = "auto", batch_size: int = 16
) -> Iterator[npt.NDArray[np.float32]]:
    """Load an encoder and yield the vectors of the rows, as `SentenceEncoder` does."""
    return SentenceEncoder.open(encoder, device=device, batch_size=batch_size).embed(rows)
