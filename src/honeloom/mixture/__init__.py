"""Mixtures of experts from trained models. `METHODS` lists the routers; one file per router."""

from honeloom.registry import Method

METHODS = (
    Method("prompts", "honeloom.mixture.prompts:prompts", "honeloom.mixture.routers:PromptsRouterConfig",
           "Goddard et al. 2024, arXiv:2403.13257", "direction of each expert's prompts at the router's input"),
    Method("rows", "honeloom.mixture.discriminants:rows", "honeloom.mixture.routers:RowsRouterConfig",
           "Fisher 1936, doi:10.1111/j.1469-1809.1936.tb02137.x; Ledoit and Wolf 2004, "
           "doi:10.1016/S0047-259X(03)00096-4",
           "shrunken linear discriminants between the rows of each expert's domain"),
    Method("clusters", "honeloom.mixture.clusters:clusters", "honeloom.mixture.routers:ClustersRouterConfig",
           "Gururangan et al. 2023, arXiv:2303.14177", "groups that k-means finds in rows, each given to an expert"),
    Method("smile", "honeloom.mixture.smile:smile", "honeloom.mixture.routers:SmileRouterConfig",
           "Tang et al. 2024, arXiv:2408.10174", "share of the input in the leading directions of each task vector"),
    Method("random", "honeloom.mixture.random:random", "honeloom.mixture.routers:RandomRouterConfig",
           "baseline", "random directions of length 1"),
)  # fmt: skip
