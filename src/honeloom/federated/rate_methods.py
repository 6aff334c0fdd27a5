"""Learning rates of single clients: `METHODS` lists what has them."""

from honeloom.registry import Method

METHODS = (
    Method("fedmezo", "honeloom.federated.rates:RateMemory", "honeloom.federated.federate_parts:RatesConfig",
           "Ling et al. 2024 (FedMeZO), arXiv:2402.05926", "clients of `federate` have rates of their own"),
)  # fmt: skip
