"""Our own optimizers: `METHODS` lists them. First-order ones are torch's."""

from honeloom.registry import Method

METHODS = (
    Method("mezo", "honeloom.tuning.zeroth_order:ZerothOrder", "honeloom.tuning.config:MezoConfig",
           "Malladi et al. 2023 (MeZO), arXiv:2305.17333", "zeroth-order steps: two forward passes, no gradients"),
)  # fmt: skip
