"""Values of players from a utility of coalitions: utility x design x stopping rule.

`METHODS` lists every estimator; one file per method or close family. `estimate` is the door.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from honeloom.registry import Method

if TYPE_CHECKING:
    from honeloom.valuation.estimation import estimate
    from honeloom.valuation.executors import Inline, ProcessPool
    from honeloom.valuation.knn import KnnUtility
    from honeloom.valuation.ledger import Ledger
    from honeloom.valuation.stopping import Budget, RankStability, StandardError, TopStability

METHODS = (
    Method("exact", "honeloom.valuation.exact:exact", "honeloom.valuation.config:ExactConfig",
           "Shapley 1953, doi:10.1515/9781400881970-018", "Shapley values by all 2^n coalitions, n at most 20"),
    Method("leave_one_out", "honeloom.valuation.leave_one_out:leave_one_out",
           "honeloom.valuation.config:LeaveOneOutConfig",
           "Cook 1977, doi:10.1080/00401706.1977.10489493", "what is lost without each player: v(N) - v(N without i)"),
    Method("permutation", "honeloom.valuation.permutation:permutation", "honeloom.valuation.config:PermutationConfig",
           "Castro et al. 2009, doi:10.1016/j.cor.2008.04.004", "mean marginal along random permutations"),
    Method("antithetic", "honeloom.valuation.permutation:antithetic", "honeloom.valuation.config:AntitheticConfig",
           "Mitchell et al. 2022, arXiv:2104.12199",
           "permutations together with their reverse; exact on quadratic games"),
    Method("truncated", "honeloom.valuation.permutation:truncated", "honeloom.valuation.config:TruncatedConfig",
           "Ghorbani and Zou 2019, arXiv:1904.02868", "permutations cut once the rest can add nothing"),
    Method("group_permutation", "honeloom.valuation.group_permutation:group_permutation",
           "honeloom.valuation.config:GroupPermutationConfig",
           "He et al. 2024 (SHED), arXiv:2405.00705", "permutations in steps of a group, with the bias removed"),
    Method("banzhaf", "honeloom.valuation.banzhaf:banzhaf", "honeloom.valuation.config:BanzhafConfig",
           "Wang and Jia 2023, arXiv:2205.15466", "Banzhaf values by maximum sample reuse"),
    Method("regression", "honeloom.valuation.regression:regression", "honeloom.valuation.config:RegressionConfig",
           "Lin et al. 2022, arXiv:2206.10013; Ilyas et al. 2022, arXiv:2202.00622",
           "ridge regression on half-size coalitions; the choice under noise"),
    Method("kernel_shap", "honeloom.valuation.kernel_shap:kernel_shap", "honeloom.valuation.config:KernelShapConfig",
           "Lundberg and Lee 2017, arXiv:1705.07874; Covert and Lee 2021, arXiv:2012.01536",
           "Shapley values by least squares on pairs of complements, sum constrained"),
    Method("knn", "honeloom.valuation.knn:knn", "honeloom.valuation.config:KnnConfig",
           "Jia et al. 2019, arXiv:1908.08619", "closed form Shapley values of a nearest-neighbour utility"),
    Method("control_variate", "honeloom.valuation.control_variate:control_variate",
           "honeloom.valuation.config:ControlVariateConfig",
           "Goldwasser and Hooker 2023, arXiv:2310.07672",
           "a cheap surrogate's values plus the residual by real evaluations"),
)  # fmt: skip

_TARGETS = {
    "estimate": "estimation",
    "Inline": "executors",
    "ProcessPool": "executors",
    "KnnUtility": "knn",
    "Ledger": "ledger",
    **dict.fromkeys(("Budget", "RankStability", "StandardError", "TopStability"), "stopping"),
}

__all__ = [
    "METHODS", "Budget", "Inline", "KnnUtility", "Ledger", "ProcessPool", "RankStability", "StandardError",
    "TopStability", "estimate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _TARGETS:
        return getattr(importlib.import_module(f"honeloom.valuation.{_TARGETS[name]}"), name)
    raise AttributeError(f"module 'honeloom.valuation' has no attribute {name!r}")
