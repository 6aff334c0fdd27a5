"""Dropping attention, MLP and blocks. `METHODS` lists every importance metric."""

from honeloom.registry import Method

METHODS = (
    Method("cosine", "honeloom.dropping.cosine:cosine", "honeloom.dropping.metric_config:CosineConfig",
           "He et al. 2024, arXiv:2406.15786 (LLM-Drop)", "1 - mean cosine of the stream before and after a unit",
           version=2),
    Method("block_influence", "honeloom.dropping.block_influence:block_influence",
           "honeloom.dropping.metric_config:BlockInfluenceConfig",
           "Men et al. 2024, arXiv:2403.03853 (ShortGPT)", "1 - mean cosine of the stream before and after a block"),
    Method("angular", "honeloom.dropping.angular:angular", "honeloom.dropping.metric_config:AngularConfig",
           "Gromov et al. 2024, arXiv:2403.17887", "mean angle between the stream before and after, at the last token"),
    Method("magnitude", "honeloom.dropping.magnitude:magnitude", "honeloom.dropping.metric_config:MagnitudeConfig",
           "Samragh et al. 2023, arXiv:2312.09299", "mean length of the contribution relative to the stream"),
    Method("perplexity", "honeloom.dropping.perplexity:perplexity", "honeloom.dropping.metric_config:PerplexityConfig",
           "Kim et al. 2024, arXiv:2402.02834 (Shortened LLaMA)", "rise of the loss without the unit, in nats"),
    Method("kl", "honeloom.dropping.kl:kl", "honeloom.dropping.metric_config:KlConfig",
           "folklore", "divergence of the predictions without the unit, in nats"),
    Method("taylor", "honeloom.dropping.taylor:taylor", "honeloom.dropping.metric_config:TaylorConfig",
           "Molchanov et al. 2019, arXiv:1906.10771", "first-order estimate of the change of the loss"),
    Method("random", "honeloom.dropping.baselines:random", "honeloom.dropping.metric_config:RandomConfig",
           "folklore", "uniform numbers"),
    Method("last", "honeloom.dropping.baselines:last", "honeloom.dropping.metric_config:LastConfig",
           "folklore", "the last layers go first"),
    Method("first", "honeloom.dropping.baselines:first", "honeloom.dropping.metric_config:FirstConfig",
           "folklore", "the first layers go first"),
)  # fmt: skip
