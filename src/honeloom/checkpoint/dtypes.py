"""The dtype names of the file format and torch's."""

from __future__ import annotations

import torch

from honeloom.errors import CheckpointError

__all__ = ["FLOAT8_DTYPES", "FLOAT_DTYPES", "format_name", "torch_dtype"]

_TORCH: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_FORMAT = {dtype: name for name, dtype in _TORCH.items()}

FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})
"""Format names of the types that weights are computed in."""
FLOAT8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})
"""Format names of the types that weights are only stored in."""


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype for a name of the file format; CheckpointError if torch has none."""
    if name not in _TORCH:
        raise CheckpointError(f"dtype {name} cannot be computed with; readable: {', '.join(_TORCH)}")
    return _TORCH[name]


def format_name(dtype: torch.dtype) -> str:
    """The file format's name of a torch dtype; CheckpointError if it has none."""
    if dtype not in _FORMAT:
        raise CheckpointError(f"{dtype} cannot be stored in safetensors; storable: {', '.join(map(str, _FORMAT))}")
    return _FORMAT[dtype]
