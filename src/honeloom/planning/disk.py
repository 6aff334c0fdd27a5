"""Disk that tuning writes, from a model's config alone."""

from __future__ import annotations

from honeloom.planning.memory import DTYPE_BYTES, Decoder

__all__ = ["CHECKPOINTS", "SMALL_FILES", "tuning_bytes"]

CHECKPOINTS = 3
"""Two are kept, and the third is written before the oldest goes."""
SMALL_FILES = 64 << 20
"""Room for reports, tokenizer and the like, in bytes."""
_FP32 = 4


def tuning_bytes(decoder: Decoder, *, full: bool, rank: int, states: int, dtype: str, rows: int) -> int:
    """Return the bytes that a tuning writes, at most.

    Parameters
    ----------
    decoder : Decoder
        The model.
    full : bool
        Whether all weights are trained, or LoRA's.
    rank : int
        LoRA's; every matrix is assumed to be adapted.
    states : int
        Tensors of the optimizer per trained weight (AdamW 2, SGD with momentum 1).
    dtype : str
        Number type of a full result; for `auto` the larger one counts.
    rows : int
        Bytes of the rows, which are recorded.
    """
    trained = decoder.parameters if full else rank * decoder.adapter_widths
    result = trained * (DTYPE_BYTES.get(dtype, _FP32) if full else _FP32)
    # What is trained is fp32 in a checkpoint, whatever the result's number type.
    return result + CHECKPOINTS * trained * _FP32 * (1 + states) + rows + SMALL_FILES
