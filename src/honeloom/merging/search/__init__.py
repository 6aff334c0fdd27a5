"""Search for the merge coefficients of a cluster of models. `METHODS` lists every method; one file per method."""

from honeloom.registry import Method

METHODS = (
    Method("average", "honeloom.merging.search.average:average", "honeloom.merging.search.config:AverageConfig",
           "Zhao et al. 2024 (Model-GLUE), arXiv:2410.05357",
           "from the best model on, take each next one into the average if that is better"),
    Method("coefficient", "honeloom.merging.search.coefficient:coefficient",
           "honeloom.merging.search.config:CoefficientConfig",
           "Zhao et al. 2024 (Model-GLUE), arXiv:2410.05357",
           "as average, with a grid of coefficients for each next model"),
    Method("similarity", "honeloom.merging.search.similarity_walk:similarity",
           "honeloom.merging.search.config:SimilarityConfig",
           "Zhao et al. 2024 (Model-GLUE), arXiv:2410.05357",
           "as coefficient, the next model being the most or least similar to the merge so far"),
    Method("cma", "honeloom.merging.search.cma:cma_es", "honeloom.merging.search.config:CmaConfig",
           "Hansen 2016, arXiv:1604.00772; Zhao et al. 2024 (Model-GLUE), arXiv:2410.05357",
           "CMA evolution strategy over weights per model and layer group"),
    Method("layerwise", "honeloom.merging.search.layerwise:layerwise", "honeloom.merging.search.config:LayerwiseConfig",
           "Yang et al. 2024 (AdaMerging), arXiv:2310.02575",
           "a weight per model and layer, learned by gradients of the loss"),
)  # fmt: skip
