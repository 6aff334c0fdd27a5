"""How alike models of one architecture are, weight by weight: all pairs in one pass over the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from honeloom.checkpoint.architectures import Architecture
from honeloom.errors import IncompatibleModelsError, NotFiniteError
from honeloom.merging.engine.layout import layer_of
from honeloom.merging.engine.operands import ITEM_SIZES, KINDS, Operands
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.engine.streaming import COMPUTED
from honeloom.merging.engine.tensors import Bytes, blocks

__all__ = [
    "BRANCHES", "Matrix", "Similarity", "branch_matrices", "column_products", "measure_similarity", "sign_counts",
]  # fmt: skip

BRANCHES = ("attention", "mlp")
CHUNK = 1 << 16
"""Elements per piece of a model, or one row of a matrix where that is longer; it changes no bit of the result."""

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Similarity:
    """Similarities of all pairs of N models.

    Attributes
    ----------
    names : tuple of str
        N models.
    matrices : dict
        Each (N, N), float64, symmetric, with 1 on the diagonal. "attention", "mlp" and "all": mean over the tensors of
        the mean over a tensor's columns of the columns' cosine. With a base also "delta_attention", "delta_mlp",
        "delta_all": the same of the task vectors; and "sign_attention", "sign_mlp", "sign_all": the share of agreeing
        signs among the entries that both task vectors change, NaN where there is no such entry.
    """

    names: tuple[str, ...]
    matrices: dict[str, Array]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of attention or of an MLP: a tensor, or one expert's part of a tensor that holds them all.

    Attributes
    ----------
    name : str
        Of the tensor.
    branch : str
        "attention" or "mlp".
    first, rows, columns : int
        First element in the flattened tensor, and the sizes.
    """

    name: str
    branch: str
    first: int
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class _Measured:
    """Of one matrix: cosines of the models and of the task vectors, (N, N); entries that pairs change, and alike."""

    branch: str
    cosines: Array
    deltas: Array
    signs: Counts


def branch_matrices(source: ModelSource) -> list[Matrix]:
    """Matrices of attention and MLP in the layers, by name; embeddings, head, norms and biases do not count.

    GPT-2 stores its matrices transposed, so that its columns belong to outputs and not to inputs.
    """
    modules = _modules(source.architecture)
    found = []
    for name in sorted(source.tensors):
        info, layer = source.info(name), layer_of(name, source.architecture)
        if layer is None or info.dtype not in COMPUTED or len(info.shape) not in (2, 3):
            continue
        branch = next((b for b in BRANCHES if name.split(f".{layer}.", 1)[1].split(".")[0] in modules[b]), None)
        if branch is not None:
            rows, columns = info.shape[-2:]
            experts = prod(info.shape[:-2])
            found += [Matrix(name, branch, e * rows * columns, rows, columns) for e in range(experts)]
    return [m for m in found if m.rows and m.columns]


def _modules(architecture: Architecture) -> dict[str, set[str]]:
    """Names of both branches within a layer, as in the loaded model and as on disk."""
    outputs = {"attention": architecture.attention_out, "mlp": architecture.mlp_out}
    return {
        branch: {getattr(architecture, branch), *(pattern.split(r"\.")[0] for pattern in outputs[branch])}
        for branch in BRANCHES
    }


def measure_similarity(
    models: Sequence[ModelSource],
    base: ModelSource | None,
    *,
    threads: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Similarity:
    """Compare N models pair by pair, reading each once (Model-GLUE, arXiv:2410.05357, section on clustering).

    A column is what a matrix stored as (outputs, inputs) makes of one input. Of two columns that are zero the cosine is
    1, of one that is zero and one that is not it is 0: a column that only one model has tuned is no likeness. In memory
    are N (N + 1) / 2 sums per column of a matrix and thread, twice that with a base. Sums are float64 and run down the
    rows, so neither pieces nor threads change a bit of them.

    Parameters
    ----------
    models : sequence of ModelSource
        N models of one architecture and equal shapes.
    base : ModelSource or None
        Their common ancestor, for the task vectors (model minus base).
    threads : int
        Matrices compared at a time.
    advance : callable
        Called with 1 for every matrix of `branch_matrices`.

    Returns
    -------
    Similarity
        The order of the models moves rows and columns and nothing else.

    Raises
    ------
    IncompatibleModelsError
        A model lacks a matrix, has another shape of it, or there is none.
    NotFiniteError
        A model holds NaN or infinity.
    """
    matrices = branch_matrices(models[0])
    if not matrices:
        raise IncompatibleModelsError(f"{models[0].name}: it has no matrix of attention or MLP that could be compared")
    for other in (*models[1:], *([base] if base else [])):
        _require_same(models[0], other, matrices)
    measured = []
    with ThreadPoolExecutor(max(1, threads)) as crew:
        for found in crew.map(partial(_measure, models, base), matrices):
            measured.append(found)
            advance(1)
    return Similarity(tuple(m.name for m in models), _summary(measured, len(models), base is not None))


def _require_same(first: ModelSource, other: ModelSource, matrices: Sequence[Matrix]) -> None:
    for matrix in matrices:
        shape = first.info(matrix.name).shape
        found = other.info(matrix.name).shape if matrix.name in other.tensors else None
        if found != shape:
            what = f"it has no {matrix.name!r}" if found is None else f"{matrix.name!r} has shape {shape} and {found}"
            raise IncompatibleModelsError(
                f"cannot compare {first.name} with {other.name}: {what}; only models of one architecture and size can "
                "be compared"
            )


def _measure(models: Sequence[ModelSource], base: ModelSource | None, matrix: Matrix) -> _Measured:
    """Read a matrix of every model, some rows at a time."""
    from honeloom.merging.similarity_kernels import add_rows  # loads numba

    pairs, count = len(models) * (len(models) + 1) // 2, matrix.rows * matrix.columns
    sums = np.zeros((pairs, matrix.columns))
    deltas = np.zeros_like(sums if base else sums[:, :0])
    signs = np.zeros((2, pairs), np.int64)
    step = max(1, CHUNK // matrix.columns) * matrix.columns
    rooms = [np.empty(8 * step, np.uint8) for _ in range(len(models) + 1)]
    for start, stop in blocks(count, step):
        where = (matrix.name, matrix.first + start, matrix.first + stop)
        parts = [_part(model, *where, room) for model, room in zip(models, rooms, strict=False)]
        origin = _part(base, *where, rooms[-1]) if base else (None, 0)
        part = Operands(stop - start, tuple(d for d, _ in parts), tuple(k for _, k in parts), *origin)
        add_rows(*part.arguments, matrix.columns, sums, deltas, signs)
    if not (np.isfinite(sums).all() and np.isfinite(deltas).all()):
        _find_damage([*models, *([base] if base else [])], matrix)
    cosines, alike = _cosines(sums, len(models)), _cosines(deltas, len(models))
    return _Measured(matrix.branch, cosines, alike, np.stack([_square(found, len(models)) for found in signs]))


def _part(source: ModelSource, name: str, start: int, stop: int, room: Bytes) -> tuple[Bytes, int]:
    """Elements as they are stored where that is all there is to know of them, else in float64; and their kind."""
    kind = source.info(name).dtype
    if source.is_stored(name) and kind in KINDS:
        size = ITEM_SIZES[KINDS[kind]]
        return source.read_raw(name, start, stop, room[: (stop - start) * size]), KINDS[kind]
    values: Bytes = source.read(name, start, stop).numpy().view(np.uint8)
    return values, KINDS["F64"]


def _find_damage(sources: Sequence[ModelSource], matrix: Matrix) -> None:
    stop = matrix.first + matrix.rows * matrix.columns
    for source in sources:
        for start in range(matrix.first, stop, CHUNK):
            values = source.read(matrix.name, start, min(start + CHUNK, stop))  # refuses NaN unless that is allowed
            if not bool(torch.isfinite(values).all()):
                raise NotFiniteError(f"{source.name}: tensor {matrix.name!r} holds NaN or infinity; it is like nothing")
    raise NotFiniteError(f"{matrix.name!r} has values whose squares are beyond the range of float64")


def column_products(values: Array) -> Array:
    """Dot products of all pairs' columns: the plain computation that the compiled one equals to the bit.

    Parameters
    ----------
    values : ndarray
        (N, rows, columns), float64.

    Returns
    -------
    ndarray
        (N (N + 1) / 2, columns): pairs (0, 0), (1, 0), (1, 1), (2, 0), ...; each summed row by row.
    """
    one, other = np.tril_indices(len(values))
    total = np.zeros((len(one), values.shape[2]))
    for row in range(values.shape[1]):
        total += values[one, row] * values[other, row]
    return total


def sign_counts(deltas: Array) -> Counts:
    """Entries that both task vectors of a pair change, and those of them that they change with one sign.

    Parameters
    ----------
    deltas : ndarray
        (N, rows, columns), float64.

    Returns
    -------
    ndarray
        (2, N (N + 1) / 2), int64, pairs as in `column_products`.
    """
    one, other = np.tril_indices(len(deltas))
    sign = np.sign(deltas).reshape(len(deltas), -1)
    products = sign[one] * sign[other]
    return np.stack([np.count_nonzero(products, axis=1), np.count_nonzero(products > 0, axis=1)])


def _square(pairs: npt.NDArray[np.int64], models: int) -> Counts:
    """Values of pairs as a symmetric matrix."""
    square = np.zeros((models, models), np.int64)
    one, other = np.tril_indices(models)
    square[one, other] = square[other, one] = pairs
    return square


def _cosines(products: Array, models: int) -> Array:
    """Mean over the columns of the cosine of every pair, (N, N)."""
    one, other = np.tril_indices(models)
    squares = products[one == other]
    scale = np.sqrt(squares[one] * squares[other])  # of equal columns this is their square again: the cosine is 1
    cosines = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    cosines[(squares[one] == 0) & (squares[other] == 0)] = 1.0
    square = np.eye(models)
    if products.size:
        square[one, other] = square[other, one] = np.clip(cosines, -1.0, 1.0).mean(axis=1)
    np.fill_diagonal(square, 1.0)
    return square


def _summary(measured: Sequence[_Measured], models: int, with_base: bool) -> dict[str, Array]:
    """Means over the matrices, in their order."""
    branches = {branch: [m for m in measured if m.branch == branch] for branch in BRANCHES} | {"all": measured}
    matrices = {branch: _mean([m.cosines for m in found], models) for branch, found in branches.items()}
    if with_base:
        for branch, found in branches.items():
            matrices[f"delta_{branch}"] = _mean([m.deltas for m in found], models)
            matrices[f"sign_{branch}"] = _shares([m.signs for m in found], models)
    return matrices


def _mean(squares: Sequence[Array], models: int) -> Array:
    """NaN beside the diagonal if there are none."""
    mean: Array = np.full((models, models), np.nan)
    if squares:
        mean = sum(squares, np.zeros((models, models))) / len(squares)
    np.fill_diagonal(mean, 1.0)
    return mean


def _shares(counts: Sequence[Counts], models: int) -> Array:
    changed, alike = sum(counts, np.zeros((2, models, models), np.int64))
    shares: Array = np.divide(alike, changed, out=np.full((models, models), np.nan), where=changed > 0)
    np.fill_diagonal(shares, 1.0)
    return shares
