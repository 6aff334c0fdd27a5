"""A point in the space of merges of some models, and the one document that makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from honeloom.config.methods import MethodConfig
from honeloom.errors import ConfigError
from honeloom.merging.config import MergeMethodConfig

__all__ = ["Candidate", "candidate_config", "check_searchable", "group_of_layer", "group_rows"]

Values = npt.NDArray[np.float64]


def group_rows(groups: int) -> int:
    """Rows of weights for some groups of layers: one more for what lies outside the layers, unless all is one group."""
    return groups + 1 if groups > 1 else 1


def group_of_layer(layer: int | None, layers: int, rows: int) -> int:
    """Row of weights that holds for a layer (None: outside the layers), of groups as equal as can be.

    Parameters
    ----------
    layer : int or None
        From 0.
    layers : int
        Of the model.
    rows : int
        Rows of weights: 1, or groups + 1.
    """
    if rows == 1:
        return 0
    return rows - 1 if layer is None else layer * (rows - 1) // layers


@dataclass(frozen=True, slots=True)
class Candidate:
    """Weights of N models.

    Attributes
    ----------
    weights : tuple of tuple of float
        (G, N). One row for the whole model; or one row per group of layers, the groups contiguous and equal, and a
        last one for embeddings, head and final norm.
    densities : tuple of float
        (N,), for methods that have a density; empty leaves it to the method's settings.
    """

    weights: tuple[tuple[float, ...], ...]
    densities: tuple[float, ...] = ()

    @classmethod
    def of(cls, weights: npt.ArrayLike, densities: Sequence[float] = (), *, rows: int | None = None) -> Candidate:
        """From an array (G, N), or from (N,) weights that hold in each of `rows` groups."""
        table = np.asarray(weights, dtype=np.float64)
        if table.ndim == 1:
            table = np.repeat(table[None, :], rows or 1, axis=0)
        return cls(tuple(tuple(row) for row in table.tolist()), tuple(map(float, densities)))

    @classmethod
    def single(cls, model: int, models: int, rows: int) -> Candidate:
        """One model alone."""
        return cls.of(np.eye(models)[model], rows=rows)

    @property
    def array(self) -> Values:
        """The weights, (G, N)."""
        return np.array(self.weights, dtype=np.float64)

    def normalised(self) -> Candidate:
        """The same with every row divided by its sum; rows that sum to 0 become equal weights."""
        table = self.array
        totals = table.sum(axis=1, keepdims=True)
        equal = np.full_like(table, 1 / table.shape[1])
        wanted = np.where(np.abs(totals) > 1e-9, table / np.where(totals == 0, 1.0, totals), equal)
        return replace(self, weights=Candidate.of(wanted).weights)

    def to_json(self) -> dict[str, Any]:
        """Weights and densities."""
        return {"weights": self.weights, **({"densities": self.densities} if self.densities else {})}


def candidate_config(
    candidate: Candidate,
    models: Sequence[str],
    base: str | None,
    method: MethodConfig,
    *,
    layers: int,
    prefix: str,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Document of the merge that a candidate stands for, as `MergeConfig` reads it.

    What is measured in memory and what is written later both follow from it, and from nothing else. A model whose
    weights are all 0 is left out, but for the first where no base is given: it is the donor of configuration and
    tokenizer.

    Parameters
    ----------
    candidate : Candidate
        Weights (G, N) and perhaps densities.
    models : sequence of str
        N names.
    base : str or None
        base_model of the document.
    method : MethodConfig
        The merge method; a density of the candidate counts instead of its own.
    layers : int
        Of the models.
    prefix : str
        What the names of the layers' tensors begin with, for example "model.layers".
    settings : mapping, optional
        Further settings of the document, such as dtype, seed and chat_template.

    Raises
    ------
    ConfigError
        The method does not look at weights, measures models on data, has no density, or there are more groups
        than layers.
    ValueError
        The sizes do not agree.
    """
    check_searchable(method, densities=bool(candidate.densities))
    table = candidate.array
    if table.shape[1] != len(models) or (candidate.densities and len(candidate.densities) != len(models)):
        raise ValueError(f"{table.shape} weights and {len(candidate.densities)} densities for {len(models)} models")
    if len(table) - 1 > layers:
        raise ConfigError(f"{len(table) - 1} groups of layers, and the models have {layers} layers; set fewer groups")
    listed = []
    for k in _listed(table, models, base):
        entry: dict[str, Any] = {"model": models[k], "weight": _varying(table[:, k], layers, prefix)}
        if candidate.densities:
            entry["density"] = candidate.densities[k]
        listed.append(entry)
    document = {"models": listed, "method": method.model_dump(mode="json"), **(settings or {})}
    return document if base is None else {**document, "base_model": base}


def check_searchable(method: MethodConfig, *, densities: bool = False) -> None:
    """Refuse a merge method whose result no weight changes, or that measures its models on rows (ConfigError)."""
    if not isinstance(method, MergeMethodConfig):
        return
    if not method.weighted or method.data:
        why = "does not look at weights" if not method.weighted else "measures every model on rows of its own"
        raise ConfigError(
            f"{method.type} {why}, so there are no coefficients to search; use linear, task_arithmetic, ties, "
            "dare_linear, dare_ties, della or breadcrumbs"
        )
    if densities and "density" not in method.per_model:
        raise ConfigError(
            f"{method.type} has no density to search; use ties, dare_ties, della, or set densities: false"
        )


def _listed(table: Values, models: Sequence[str], base: str | None) -> list[int]:
    """Models that the document names."""
    kept = [k for k in range(len(models)) if table[:, k].any() or (k == 0 and base is None)]
    if any(models[k] != base for k in kept):
        return kept
    # The base alone has no task vector; a document needs one model beside it.
    return sorted({*kept, next((k for k, name in enumerate(models) if name != base), 0)})


def _varying(weights: Values, layers: int, prefix: str) -> Any:
    """Weights (G,) of one model as a number, or as anchors of the layers and a number for the rest."""
    if (weights == weights[0]).all():
        return float(weights[0])
    anchors = [float(weights[group_of_layer(layer, layers, len(weights))]) for layer in range(layers)]
    return [{"filter": f"{prefix}.", "value": anchors}, {"filter": "*", "value": float(weights[-1])}]
