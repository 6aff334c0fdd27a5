"""LoRA factors as Flower's records: PEFT's names, checked before an array is touched.

An ArrayRecord holds NPY files. One of them can claim any shape in a few bytes, so that names, types,
shapes and lengths are compared with each other first; nothing is ever unpickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch

from honeloom.errors import MessageError, MissingExtraError
from honeloom.federated.client import fresh_factors, split_shared
from honeloom.federated.frozen import Pair, Pairs

try:
    from flwr.app import Array, ArrayRecord
except ImportError as error:
    raise MissingExtraError(f"flwr is not installed ({error.name}): pip install 'honeloom[federated]'") from None

__all__ = ["PREFIX", "begin", "read_factors", "shapes_of", "write_factors"]

PREFIX = "base_model.model."
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_DTYPES = {np.dtype("<f2"), np.dtype("<f4"), np.dtype("<f8")}
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_STRANGE = (
    ("lora_magnitude_vector", "DoRA rescales the whole weight, and a sum of updates has no such scale"),
    ("lora_embedding_", "factors of embeddings are no linear layer's; leave embeddings out of target_modules"),
    (".bias", "biases are not part of a low-rank update; use bias='none'"),
    (".lora_", "PEFT's names end in lora_A.weight or lora_B.weight; send get_peft_model_state_dict(model)"),
)
"""What a name that is no factor's may contain, and what to say then."""


def write_factors(pairs: Pairs, scale: float = 1.0) -> ArrayRecord:
    """Factors as float32 arrays under PEFT's names, in the order of the modules.

    Parameters
    ----------
    pairs : mapping
        Module -> b (m, r) and a (r, n), of scale 1.
    scale : float
        With which they are going to be read: b is divided by it.
    """
    record = ArrayRecord()
    for module, (b, a) in sorted(pairs.items()):
        for name, tensor in (("A", a), ("B", b / scale if scale != 1.0 else b)):
            array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
            record[f"{PREFIX}{module}.lora_{name}.weight"] = Array(array)
    return record


def read_factors(record: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]] | None = None) -> dict[str, Pair]:
    """Factors of an ArrayRecord.

    Parameters
    ----------
    record : ArrayRecord
        PEFT's names; float16, float32 or float64 arrays.
    shapes : mapping, optional
        Module -> (m, n) that is expected; the rank is the sender's choice.

    Returns
    -------
    dict
        Module -> b (m, r) and a (r, n), float32, in the order of the modules.

    Raises
    ------
    MessageError
        A name, type, shape or length is not what was agreed; or NaN or infinity is among the numbers.
    """
    found: dict[str, dict[str, Array]] = {}
    for name, array in record.items():
        if not (match := _NAME.fullmatch(name)):
            raise MessageError(f"{name!r:.120} is not a LoRA factor: {_reason(name)}")
        found.setdefault(match["module"], {})[match["factor"]] = array
    if one := [module for module, factors in found.items() if len(factors) < 2]:
        raise MessageError(f"module {one[0]!r:.120} has one factor of two")
    for module, factors in found.items():
        if shapes is not None and module not in shapes:
            raise MessageError(f"module {module!r:.120} is none of the {len(shapes)} that the others have")
        _check(module, factors["B"], factors["A"], None if shapes is None else shapes[module])
    if shapes is not None and (lacking := sorted(set(shapes) - set(found))):
        raise MessageError(f"{len(lacking)} modules have no factors (first {lacking[0]!r})")
    return {m: (_tensor(m, f["B"]), _tensor(m, f["A"])) for m, f in sorted(found.items())}


def shapes_of(pairs: Pairs) -> dict[str, tuple[int, int]]:
    """Module -> (m, n)."""
    return {module: (b.shape[0], a.shape[1]) for module, (b, a) in pairs.items()}


def begin(
    module: str, like: Pair, scale: float, shared: Pairs, start: str, seed: int, name: str
) -> tuple[Pair, Pair | None]:  # fmt: skip
    """Where a client begins in one module, and what it keeps frozen beside of the shared columns.

    Parameters
    ----------
    module : str
        Its name.
    like : (Tensor, Tensor)
        Factors of the client's rank, for their shapes.
    scale : float
        The client's.
    shared : mapping
        Of every module; none before the first aggregate.
    start : {"fresh", "shared", "carry"}
        As of `honeloom.federated.messages.TrainTask`.
    seed, name
        Of an A that is drawn.
    """
    rank, shape = like[1].shape[0], {module: (like[0].shape[0], like[1].shape[1])}
    if start == "fresh" or module not in shared:
        return fresh_factors(shape, rank, seed, name)[module], None
    mine, rest = split_shared({module: shared[module]}, shape, rank, scale, keep=start == "carry")
    return mine[module], rest.get(module)


def _reason(name: str) -> str:
    return next(
        (why for part, why in _STRANGE if part in name),
        "modules_to_save and other weights are not part of a low-rank update; leave them out",
    )


def _check(module: str, b: Array, a: Array, expected: tuple[int, int] | None) -> None:
    """Shapes as they are claimed; `_tensor` compares them with the bytes."""
    if len(b.shape) != 2 or len(a.shape) != 2 or b.shape[1] != a.shape[0] or min(*b.shape, *a.shape) < 1:
        raise MessageError(f"factors B {tuple(b.shape)} and A {tuple(a.shape)} of {module!r:.120} have no product")
    shape = (b.shape[0], a.shape[1])
    if expected is not None and shape != expected:
        raise MessageError(f"module {module!r} has shape {shape} here and {expected} in the model")


def _tensor(module: str, array: Array) -> torch.Tensor:
    """A float32 tensor of its own; no byte is allocated for more than came."""
    file = BytesIO(array.data)
    try:
        shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file, max_header_size=4096)
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError) as error:
        raise MessageError(f"an array of {module!r:.120} is no NPY file ({str(error)[:80]})") from None
    start = file.tell()
    if array.stype != "numpy.ndarray" or dtype not in _DTYPES or shape != tuple(array.shape):
        raise MessageError(
            f"an array of {module!r:.120} is {array.stype} of {dtype} with shape {shape}; "
            f"expected float32 of shape {tuple(array.shape)}"
        )
    if math.prod(shape) * dtype.itemsize != len(array.data) - start:
        raise MessageError(f"an array of {module!r:.120} has {len(array.data) - start} bytes for shape {shape}")
    numbers = np.frombuffer(array.data, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    with np.errstate(over="ignore"):  # found as infinity below
        tensor = torch.from_numpy(numbers.astype(np.float32, order="C"))
    if not bool(torch.isfinite(tensor).all()):
        raise MessageError(f"the factors of {module!r:.120} hold NaN or infinity")
    return tensor
