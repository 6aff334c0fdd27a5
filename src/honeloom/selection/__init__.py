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
    Method("shed", "honeloom.selection.shed:shed", "honeloom.selection.config:ShedConfig",
           "He et al. 2024, arXiv:2405.00705", "Shapley values of clusters, sampled by quality"),
    Method("in_run", "honeloom.selection.in_run:in_run", "honeloom.selection.config:InRunConfig",
           "Wang et al. 2025, arXiv:2406.11011", "first-order Shapley values of rows along one tuning"),
    Method("less", "honeloom.selection.influence:less", "honeloom.selection.config:LessConfig",
           "Xia et al. 2024, arXiv:2402.04333", "cosine of a row's Adam step with the target's gradient"),
    Method("tracin", "honeloom.selection.influence:tracin", "honeloom.selection.config:TracinConfig",
           "Pruthi et al. 2020, arXiv:2002.08484", "inner product of a row's gradient with the target's"),
    Method("dsir", "honeloom.selection.dsir:dsir", "honeloom.selection.config:DsirConfig",
           "Xie et al. 2023, arXiv:2302.03169", "resampling towards the target's words and word pairs"),
    Method("k_center", "honeloom.selection.k_center:k_center", "honeloom.selection.config:KCenterConfig",
           "Sener and Savarese 2018, arXiv:1708.00489", "rows that leave no row far from a chosen one"),
    Method("dq", "honeloom.selection.dq:dq", "honeloom.selection.config:DqConfig",
           "Zhou et al. 2023, arXiv:2308.10524", "an even sample of bins filled by graph cut"),
    Method("scores", "honeloom.selection.scores:scores", "honeloom.selection.config:ScoresConfig",
           "none", "scores of an earlier selection, by row id"),
)  # fmt: skip
