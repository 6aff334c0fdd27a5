"""Federated tuning. `METHODS` lists the rules that aggregate low-rank updates; one file per rule."""

from honeloom.registry import Method

METHODS = (
    Method("flora", "honeloom.federated.aggregation.flora:flora", "honeloom.federated.config:FloraConfig",
           "Wang et al. 2024, arXiv:2409.05976", "stack the factors: the exact sum, of rank the sum of ranks"),
    Method("svd", "honeloom.federated.aggregation.svd:svd", "honeloom.federated.config:SvdConfig",
           "Eckart and Young 1936, doi:10.1007/BF02288367", "the sum's best approximation by rank or share of energy"),
    Method("flexlora", "honeloom.federated.aggregation.flexlora:flexlora",
           "honeloom.federated.config:FlexLoraConfig",
           "Bai et al. 2024, arXiv:2402.11505", "the sum's best approximation of a rank, never formed densely"),
    Method("fedit", "honeloom.federated.aggregation.fedit:fedit", "honeloom.federated.config:FedItConfig",
           "Zhang et al. 2023, arXiv:2305.05644", "average B and A apart; equal ranks, inexact"),
    Method("zero_pad", "honeloom.federated.aggregation.zero_pad:zero_pad",
           "honeloom.federated.config:ZeroPadConfig",
           "Cho et al. 2024, arXiv:2401.06432", "pad to the largest rank, then average B and A apart; inexact"),
    Method("ffa", "honeloom.federated.aggregation.ffa:ffa", "honeloom.federated.config:FfaConfig",
           "Sun et al. 2024, arXiv:2403.12313", "one frozen A for everybody, average B; exact"),
    Method("rolora", "honeloom.federated.aggregation.rolora:rolora", "honeloom.federated.config:RoLoraConfig",
           "Chen et al. 2025, arXiv:2502.01755", "one factor is everybody's, average the other; exact"),
    Method("fedex", "honeloom.federated.aggregation.fedex:fedex", "honeloom.federated.config:FedExConfig",
           "Singhal et al. 2024, arXiv:2410.09432", "average B and A apart, and keep what that misses; exact"),
)  # fmt: skip
