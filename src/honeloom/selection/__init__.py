"""Choosing training rows. `METHODS` lists every selector; one file per method."""

from honeloom.registry import Method

METHODS = (
    Method("random", "honeloom.selection.random:random", "honeloom.selection.config:RandomConfig",
           "baseline", "uniform choice, the bar every selector must clear"),
    Method("stratified", "honeloom.selection.stratified:stratified", "honeloom.selection.config:StratifiedConfig",
           "baseline", "random choice with equal shares of every domain or source"),
    Method("length", "honeloom.selection.length:length", "honeloom.selection.config:LengthConfig",
           "Shen 2024, arXiv:2402.06094; Zhao et al. 2024, arXiv:2402.04833",
           "longest (or shortest) responses in tokens"),
    Method("perplexity", "honeloom.selection.perplexity:perplexity", "honeloom.selection.config:PerplexityConfig",
           "Marion et al. 2023, arXiv:2309.04564", "a band of the response's perplexity under the model"),
    Method("ifd", "honeloom.selection.ifd:ifd", "honeloom.selection.config:IfdConfig",
           "Li et al. 2024, arXiv:2308.12032 and 2402.00530",
           "response perplexity with the prompt over without, below 1"),
)  # fmt: skip
