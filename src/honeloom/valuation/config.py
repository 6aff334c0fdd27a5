"""Settings of each estimator."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from honeloom.config.methods import MethodConfig

__all__ = [
    "AntitheticConfig",
    "BanzhafConfig",
    "ControlVariateConfig",
    "ExactConfig",
    "GroupPermutationConfig",
    "KernelShapConfig",
    "KnnConfig",
    "LeaveOneOutConfig",
    "PermutationConfig",
    "RegressionConfig",
    "TruncatedConfig",
]


class ExactConfig(MethodConfig):
    """Every coalition."""

    type: Literal["exact"] = "exact"


class LeaveOneOutConfig(MethodConfig):
    """All players but one."""

    type: Literal["leave_one_out"] = "leave_one_out"


class PermutationConfig(MethodConfig):
    """Independent permutations."""

    type: Literal["permutation"] = "permutation"


class AntitheticConfig(MethodConfig):
    """Permutations and their reverse."""

    type: Literal["antithetic"] = "antithetic"


class TruncatedConfig(MethodConfig):
    """Permutations that end early."""

    type: Literal["truncated"] = "truncated"
    tolerance: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="A permutation ends once |v(N) - v(S)| is below this share of |v(N) - v(empty)|; 0 never cuts.",
    )


class GroupPermutationConfig(MethodConfig):
    """Permutations in steps of a group."""

    type: Literal["group_permutation"] = "group_permutation"
    group_size: int | None = Field(None, ge=1, description="Players per step; default: n / 50, at least 1.")
    debias: bool = Field(
        True, description="Undo the shrinkage to the mean that groups cause; false gives SHED's values. Ranks agree."
    )


class BanzhafConfig(MethodConfig):
    """Every evaluation updates every player."""

    type: Literal["banzhaf"] = "banzhaf"


class RegressionConfig(MethodConfig):
    """Ridge regression on membership."""

    type: Literal["regression"] = "regression"
    design: Literal["half", "bernoulli"] = Field(
        "half", description="Coalitions of exactly half the players, or each player in by a fair coin."
    )
    paired: bool = Field(
        False,
        description="Evaluate complements too: cancels interactions of even order, halves the distinct coalitions.",
    )


class KernelShapConfig(MethodConfig):
    """Shapley-kernel coalition sizes, pairs of complements, and the exact sum."""

    type: Literal["kernel_shap"] = "kernel_shap"


class KnnConfig(MethodConfig):
    """The recursion over sorted neighbours; its K belongs to the utility."""

    type: Literal["knn"] = "knn"


class ControlVariateConfig(MethodConfig):
    """Ridge regression of what a surrogate leaves unexplained."""

    type: Literal["control_variate"] = "control_variate"
