"""For every linear layer, the weights whose outputs are nearest to those of all models."""

from __future__ import annotations

import torch

from honeloom.errors import ConfigError
from honeloom.merging.engine.matrices import Whole, read_matrix
from honeloom.merging.engine.tensors import Merged, Read, Rule, Tensors
from honeloom.merging.fisher import known_data, positive_average

__all__ = ["regmean"]


def _plan_regmean(tensors: Tensors, *, shrink: float = 0.9) -> Merged:
    """Solve the least squares problem that asks for the outputs of each model on its own inputs.

    With Gram matrices G_k = X_k^T X_k of the inputs and weights W_k of shape (out, n): W^T = (sum of w_k G_k)^-1
    (sum of w_k G_k W_k^T).

    Parameters
    ----------
    tensors : Tensors
        K models; `data` holds the K Gram matrices, (n, n) with n the last dimension, or nothing: then it is the
        weighted average.
    shrink : float
        Multiplier on the Gram matrices' entries off the diagonal; below 1 the solution is unique.

    Returns
    -------
    callable
        Elements start..stop of the result, float64. An input that no model ever got has no say: its column is the
        weighted average.

    Raises
    ------
    ConfigError
        A weight is negative, the weights sum to 0, some models have a Gram matrix and others have none, or the
        problem has no unique solution.

    References
    ----------
    Jin et al. 2023, arXiv:2212.09849.
    """
    average = positive_average(tensors, "regmean")
    grams = known_data(tensors, "Gram matrix")
    return Whole(lambda: _solve(tensors, grams, shrink, average)) if grams else average


regmean = Rule(_plan_regmean)
"""For every linear layer the weights whose outputs are nearest to those of all models on their rows."""


def _solve(tensors: Tensors, grams: tuple[Read, ...], shrink: float, average: Merged) -> torch.Tensor:
    n = tensors.columns
    rows = tensors.count // max(1, n)
    left, right = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, rows, dtype=torch.float64)
    for read, data, weight in zip(tensors.models, grams, tensors.weights, strict=True):
        gram = read_matrix(data, n, n)
        diagonal = gram.diagonal() * weight
        gram.mul_(shrink * weight).diagonal().copy_(diagonal)
        left += gram
        right += gram @ read_matrix(read, rows, n).T
    silent = left.diagonal() == 0
    if silent.any():
        left.diagonal()[silent] = 1.0
        right[silent] = read_matrix(average, rows, n).T[silent]
    factor, failed = torch.linalg.cholesky_ex(left)
    # Of an input's square, what the inputs before it do not tell; rounding leaves about n eps where that is nothing.
    own = factor.diagonal().square() / left.diagonal()
    if int(failed) or bool((own <= n * torch.finfo(torch.float64).eps).any()):
        raise ConfigError(
            f"{tensors.name or 'tensor'}: the Gram matrices leave the solution open; set shrink below 1 (it is "
            f"{shrink:g}), or measure on more rows"
        )
    return torch.cholesky_solve(right, factor).T.contiguous()
