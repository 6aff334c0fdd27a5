"""Our own optimizers: `METHODS` lists them. First-order ones are torch's."""

from honeloom.registry import Method

METHODS = (
    Method("mezo", "honeloom.tuning.zeroth_order:ZerothOrder", "honeloom.tuning.config:MezoConfig",
           "Malladi et al. 2023 (MeZO), arXiv:2305.17333", "zeroth-order steps: two forward passes, no gradients"),
    Method("fedmezo", "honeloom.federated.rates:RateMemory", "honeloom.federated.federate_parts:RatesConfig",
           "Ling et al. 2024 (FedMeZO), arXiv:2402.05926", "mezo by federated clients, each at a rate of its own"),
)  # fmt: skip
