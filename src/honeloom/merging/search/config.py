"""Settings of the search methods."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from honeloom.config.methods import MethodConfig

__all__ = ["AverageConfig", "CmaConfig", "CoefficientConfig", "LayerwiseConfig", "SearchMethodConfig",
           "SimilarityConfig"]  # fmt: skip

_Coefficient = Annotated[float, Field(gt=0, lt=1)]
_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_GRID_TEXT = "Coefficients of the merge so far that are tried; the new model gets the rest."


class SearchMethodConfig(MethodConfig):
    """What every search has."""

    measured: ClassVar[frozenset[str]] = frozenset()
    """Settings of the model that is measured; the method itself does not take them."""
    needs_similarity: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False
    confidence: float = Field(
        0.95, ge=0.5, lt=1, description="Of the one-sided paired test by which a candidate replaces the best so far."
    )
    margin: float = Field(0.0, ge=0, description="Least improvement that counts, in units of the value.")
    racing: bool = Field(True, description="Stop measuring a candidate once it is clear that it is not better.")

    def groups_of(self, layers: int) -> int:
        """Into how many groups the layers of a model are cut."""
        return 1


class AverageConfig(SearchMethodConfig):
    """Running average: each next model is taken in if that is better."""

    type: Literal["average"] = "average"


class CoefficientConfig(SearchMethodConfig):
    """Running merge with a grid of coefficients for each next model."""

    type: Literal["coefficient"] = "coefficient"
    grid: tuple[_Coefficient, ...] = Field(_GRID, min_length=1, description=_GRID_TEXT)


class SimilarityConfig(SearchMethodConfig):
    """Running merge whose next model is chosen by its similarity."""

    needs_similarity = True
    type: Literal["similarity"] = "similarity"
    order: Literal["ascending", "descending"] = Field(
        "ascending", description="ascending takes the model least similar to the merge next, descending the most."
    )
    grid: tuple[_Coefficient, ...] = Field(_GRID, min_length=1, description=_GRID_TEXT)


class CmaConfig(SearchMethodConfig):
    """CMA evolution strategy."""

    measured = frozenset({"groups"})
    type: Literal["cma"] = "cma"
    groups: int = Field(1, ge=1, description="Contiguous groups of layers with weights of their own.")
    budget: int = Field(200, ge=2, description="Candidates that are measured at most.")
    sigma0: float = Field(1 / 6, gt=0, le=1, description="First standard deviation, where weights lie in [0, 1].")
    popsize: int | None = Field(None, ge=4, description="Candidates per generation; null: 4 + 3 ln n of n variables.")
    patience: int = Field(10, ge=1, description="Generations without an improvement beyond noise after which it ends.")
    surrogate: bool = Field(
        True, description="One candidate per generation is the minimum of a quadratic fitted to what was measured."
    )
    densities: bool = Field(False, description="Search a density per model too, for methods that have one.")

    def groups_of(self, layers: int) -> int:
        """As set."""
        return self.groups


class LayerwiseConfig(SearchMethodConfig):
    """Weights per layer by gradient descent."""

    needs_gradient = True
    type: Literal["layerwise"] = "layerwise"
    steps: int = Field(100, ge=1, description="Steps of Adam.")
    lr: float = Field(0.01, gt=0, le=1, description="Learning rate of the weights.")
    batch: int = Field(16, ge=1, description="Rows per step.")
    checks: int = Field(4, ge=1, description="How often the weights are measured on all rows, evenly spread.")

    def groups_of(self, layers: int) -> int:
        """One group per layer."""
        return layers
