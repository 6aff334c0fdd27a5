"""Dropping attention, MLP and blocks. `METHODS` lists every importance metric."""

from honeloom.registry import Method

METHODS = (
    Method("cosine", "honeloom.dropping.cosine:cosine", "honeloom.dropping.config:CosineConfig",
           "He et al. 2024, arXiv:2406.15786 (LLM-Drop)", "1 - mean cosine of the stream before and after a sub-layer"),
)  # fmt: skip
