"""Settings of the merge methods; those of the command are in `merge_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from honeloom.config.methods import MethodConfig
from honeloom.merging.parameters import Bounded, Varying

__all__ = [
    "ArceeFusionConfig", "BreadcrumbsConfig", "BreadcrumbsTiesConfig", "DareLinearConfig", "DareTiesConfig",
    "DellaConfig", "DellaLinearConfig", "FisherConfig", "IsoCConfig", "KarcherConfig", "LinearConfig", "MagmaxConfig",
    "MergeMethodConfig", "ModelStockConfig", "MultislerpConfig", "NearswapConfig", "NuslerpConfig", "PassthroughConfig",
    "RegmeanConfig", "SceConfig", "SlerpConfig", "TaskArithmeticConfig", "TiesConfig", "TsvMConfig", "keeps_equal",
    "plan_settings",
]  # fmt: skip

Any_ = Annotated[Varying, Bounded()]
Share = Annotated[Varying, Bounded(gt=0, le=1)]
Part = Annotated[Varying, Bounded(ge=0, le=1)]
Positive = Annotated[Varying, Bounded(gt=0)]

_DENSITY = "Share of each task vector's entries that is kept, tensor by tensor."
_SCALE = "Multiplier on the merged task vector (the paper's lambda)."
_NORMALIZE = "Divide by the sum of the weights."
_RESCALE = (
    "What makes up for dropped entries: inverse divides by the probability to be kept, which leaves the expectation as "
    "it was; l1 keeps the sum of absolute values, as mergekit does; none."
)
Rescale = Literal["inverse", "l1", "none"]


class MergeMethodConfig(MethodConfig):
    """What the command must know of a method."""

    base: ClassVar[Literal["needed", "allowed", "start", "unused"]] = "unused"
    """Whether base_model is the origin of task vectors, or (start) the model at one end of an arc."""
    counts: ClassVar[tuple[int, int | None]] = (1, None)
    """Least and largest number of models, the base left out where it is needed."""
    weighted: ClassVar[bool] = True
    """Whether the models' weights count."""
    per_model: ClassVar[frozenset[str]] = frozenset()
    """Settings that a model may have for itself."""
    random: ClassVar[bool] = False
    data: ClassVar[Literal["", "fisher", "gram"]] = ""
    """What must be measured on rows of each model."""
    measured: ClassVar[frozenset[str]] = frozenset()
    """Settings of that measurement; the method itself does not take them."""
    whole: ClassVar[bool] = False
    """Whether a matrix is computed as a whole, in memory."""


class LinearConfig(MergeMethodConfig):
    """Weighted average of the models."""

    type: Literal["linear"] = "linear"
    normalize: bool = Field(True, description=_NORMALIZE)


class SlerpConfig(MergeMethodConfig):
    """Spherical interpolation of two models."""

    base, counts, weighted = "start", (2, 2), False
    type: Literal["slerp"] = "slerp"
    t: Part = Field(0.5, description="0 gives the base (or first) model, 1 the other.")


class NuslerpConfig(MergeMethodConfig):
    """Spherical interpolation of two models by their weights, whole or row by row."""

    base, counts = "allowed", (2, 2)
    type: Literal["nuslerp"] = "nuslerp"
    flatten: bool = Field(True, description="One angle per tensor; otherwise one per row or column.")
    row_wise: bool = Field(False, description="Without flatten: one angle per row; else one per column.")


class MultislerpConfig(MergeMethodConfig):
    """Spherical mean of several models in the tangent space of their average direction."""

    base, counts = "allowed", (1, None)
    type: Literal["multislerp"] = "multislerp"
    normalize: bool = Field(True, description=_NORMALIZE)
    eps: float = Field(1e-8, gt=0, description="Lengths below it count as zero.")


class KarcherConfig(MergeMethodConfig):
    """Riemannian centre of mass on the sphere."""

    type: Literal["karcher"] = "karcher"
    max_iter: int = Field(10, ge=1, description="Steps of the fixed-point iteration at most.")
    tol: float = Field(1e-5, gt=0, description="Ends once the step in the tangent space is shorter.")


class TaskArithmeticConfig(MergeMethodConfig):
    """The base plus a weighted sum of task vectors."""

    base = "needed"
    type: Literal["task_arithmetic"] = "task_arithmetic"
    scale: Any_ = Field(1.0, description="Multiplier on the summed task vectors (the paper's lambda).")
    normalize: bool = Field(False, description=_NORMALIZE)


class _Sparse(MergeMethodConfig):
    base = "needed"
    per_model = frozenset({"density"})


class TiesConfig(_Sparse):
    """Trim each task vector, elect a sign per entry, average what agrees with it."""

    type: Literal["ties"] = "ties"
    density: Share = Field(0.2, description=_DENSITY)
    scale: Any_ = Field(1.0, description=_SCALE)
    normalize: bool = Field(True, description="Divide by the sum of the weights that agree.")


class DareLinearConfig(_Sparse):
    """Drop entries of the task vectors at random, rescale the rest, add."""

    random = True
    type: Literal["dare_linear"] = "dare_linear"
    density: Share = Field(0.5, description="Probability of an entry to be kept (the paper's 1 - p).")
    scale: Any_ = Field(1.0, description=_SCALE)
    normalize: bool = Field(False, description=_NORMALIZE)
    rescale: Rescale = Field("inverse", description=_RESCALE)


class DareTiesConfig(_Sparse):
    """Drop entries at random, rescale the rest, elect signs."""

    random = True
    type: Literal["dare_ties"] = "dare_ties"
    density: Share = Field(0.5, description="Probability of an entry to be kept (the paper's 1 - p).")
    scale: Any_ = Field(1.0, description=_SCALE)
    normalize: bool = Field(False, description="Divide by the sum of the weights that agree.")
    rescale: Rescale = Field("inverse", description=_RESCALE)


class _Della(_Sparse):
    random = True
    per_model = frozenset({"density", "epsilon"})


class DellaConfig(_Della):
    """Drop small entries more often than large ones, rescale the rest, elect signs."""

    type: Literal["della"] = "della"
    density: Share = Field(0.5, description="Mean probability of an entry to be kept.")
    epsilon: Part = Field(
        0.1, description="Probabilities go from density - epsilon (smallest of a row) to density + epsilon."
    )
    scale: Any_ = Field(1.0, description=_SCALE)
    normalize: bool = Field(True, description="Divide by the sum of the weights that agree.")
    rescale: Rescale = Field("inverse", description=_RESCALE)


class DellaLinearConfig(_Della):
    """Drop small entries more often than large ones, rescale the rest, add."""

    type: Literal["della_linear"] = "della_linear"
    density: Share = Field(0.5, description="Mean probability of an entry to be kept.")
    epsilon: Part = Field(
        0.1, description="Probabilities go from density - epsilon (smallest of a row) to density + epsilon."
    )
    scale: Any_ = Field(1.0, description=_SCALE)
    normalize: bool = Field(False, description=_NORMALIZE)
    rescale: Rescale = Field("inverse", description=_RESCALE)


class _Breadcrumbs(_Sparse):
    per_model = frozenset({"density", "gamma"})


class BreadcrumbsConfig(_Breadcrumbs):
    """Leave out the largest and the smallest entries of each task vector, add the rest."""

    type: Literal["breadcrumbs"] = "breadcrumbs"
    density: Share = Field(0.14, description=_DENSITY)
    gamma: Part = Field(0.01, description="Share of the largest entries that is left out.")
    scale: Any_ = Field(1.0, description=_SCALE)
    normalize: bool = Field(False, description=_NORMALIZE)


class BreadcrumbsTiesConfig(_Breadcrumbs):
    """Leave out the largest and the smallest entries of each task vector, elect signs."""

    type: Literal["breadcrumbs_ties"] = "breadcrumbs_ties"
    density: Share = Field(0.14, description=_DENSITY)
    gamma: Part = Field(0.01, description="Share of the largest entries that is left out.")
    scale: Any_ = Field(1.0, description=_SCALE)
    normalize: bool = Field(False, description="Divide by the sum of the weights that agree.")


class SceConfig(MergeMethodConfig):
    """Select entries that vary most between models, weight models by their energy, elect signs."""

    base, weighted = "needed", False
    type: Literal["sce"] = "sce"
    select_topk: Share = Field(0.1, description="Share of the entries, by variance over the models, that is merged.")


class ModelStockConfig(MergeMethodConfig):
    """Between the base and the average of the models, as far as the angle of their task vectors says."""

    base, counts, weighted = "needed", (2, None), False
    type: Literal["model_stock"] = "model_stock"
    filter_wise: bool = Field(False, description="One angle per row instead of one per tensor.")


class NearswapConfig(MergeMethodConfig):
    """Take from the second model what is near to the first."""

    base, counts, weighted = "needed", (1, 1), False
    type: Literal["nearswap"] = "nearswap"
    t: Positive = Field(0.001, description="Distance up to which an entry is taken over whole.")


class ArceeFusionConfig(MergeMethodConfig):
    """Take the entries of one model whose change matters most for its rows."""

    base, counts, weighted = "needed", (1, 1), False
    type: Literal["arcee_fusion"] = "arcee_fusion"


class PassthroughConfig(MergeMethodConfig):
    """Copy the tensors of one model; with slices, stack layers."""

    counts, weighted = (1, 1), False
    per_model = frozenset({"scale"})
    type: Literal["passthrough"] = "passthrough"
    scale: Any_ = Field(1.0, description="Multiplier on the tensors.")


class MagmaxConfig(MergeMethodConfig):
    """Of every entry, the largest change any model made."""

    base = "needed"
    type: Literal["magmax"] = "magmax"
    scale: Any_ = Field(1.0, description=_SCALE)


class FisherConfig(MergeMethodConfig):
    """Average weighted by the diagonal of each model's Fisher information on its own rows."""

    data, measured = "fisher", frozenset({"examples"})
    type: Literal["fisher"] = "fisher"
    eps: float = Field(1e-6, gt=0, description="Added to every Fisher value, in units of the mean of its tensor.")
    examples: int = Field(256, gt=0, description="Rows of each model at most.")


class RegmeanConfig(MergeMethodConfig):
    """For every linear layer the weights whose outputs are nearest to those of all models on their rows."""

    data, measured, whole = "gram", frozenset({"examples"}), True
    type: Literal["regmean"] = "regmean"
    shrink: float = Field(0.9, ge=0, le=1, description="Multiplier on the off-diagonal of the Gram matrices.")
    examples: int = Field(256, gt=0, description="Rows of each model at most.")


class TsvMConfig(MergeMethodConfig):
    """Keep each task's leading singular directions and make them orthogonal to the other tasks'."""

    base, whole = "needed", True
    type: Literal["tsv_m"] = "tsv_m"
    scale: Any_ = Field(1.0, description=_SCALE)


class IsoCConfig(MergeMethodConfig):
    """Sum of the task vectors with all singular values set to their mean."""

    base, whole = "needed", True
    type: Literal["iso_c"] = "iso_c"
    scale: Any_ = Field(1.0, description=_SCALE)


def plan_settings(method: MethodConfig) -> dict[str, Any]:
    """Settings that a method's plan takes, by name."""
    measured = method.measured if isinstance(method, MergeMethodConfig) else frozenset()
    return {name: getattr(method, name) for name in type(method).model_fields if name not in {"type", *measured}}


def keeps_equal(method: MethodConfig, settings: Mapping[str, Any]) -> bool:
    """Whether a method with these settings gives back tensors that are equal in all models."""
    if not isinstance(method, MergeMethodConfig):
        return False
    if isinstance(method, LinearConfig | MultislerpConfig):
        return method.normalize
    return not isinstance(method, PassthroughConfig) or settings["scale"] in (1.0, (1.0,))
