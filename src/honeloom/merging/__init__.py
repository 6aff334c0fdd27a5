"""Merging models of one architecture. `METHODS` lists every rule; one file per method or family."""

from honeloom.registry import Method

METHODS = (
    Method("linear", "honeloom.merging.linear:linear", "honeloom.merging.config:LinearConfig",
           "Wortsman et al. 2022, arXiv:2203.05482", "weighted average of the models"),
    Method("task_arithmetic", "honeloom.merging.task_arithmetic:task_arithmetic",
           "honeloom.merging.config:TaskArithmeticConfig",
           "Ilharco et al. 2023, arXiv:2212.04089", "base plus a weighted sum of task vectors"),
    Method("slerp", "honeloom.merging.slerp:slerp", "honeloom.merging.config:SlerpConfig",
           "Shoemake 1985, doi:10.1145/325334.325242", "spherical interpolation of two models"),
)  # fmt: skip
