"""The verbs that compute: where their settings and runners live, as strings.

Nothing heavy is imported here; `stages.runner` loads a verb's settings to plan it, and its
runner only when there is work to do.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["VERBS", "Verb"]


@dataclass(frozen=True, slots=True)
class Verb:
    """One command of the pipeline.

    Attributes
    ----------
    name : str
        Command and recipe key; the function's name has "_" for "-".
    config : str
        "module:Class" of its settings.
    execute : str
        "module:function" of its runner: (Work) -> Outcome.
    version : int
        Raised when the stage's own numbers change.
    family : str or None
        Kind of method its `method` or `metric` field names, if any.
    """

    name: str
    config: str
    execute: str
    version: int = 1
    family: str | None = None


_ALL = (
    Verb("select", "honeloom.selection.config:SelectConfig", "honeloom.stages.select:execute", family="selection"),
    Verb("tune", "honeloom.tuning.config:TuneConfig", "honeloom.stages.tune:execute", 2, family="tuning"),
    Verb(
        "aggregate",
        "honeloom.federated.config:AggregateConfig",
        "honeloom.stages.aggregate:execute",
        family="aggregation",
    ),
    Verb("federate", "honeloom.federated.federate_config:FederateConfig", "honeloom.stages.federate:execute"),
    Verb("merge", "honeloom.merging.merge_config:MergeConfig", "honeloom.stages.merge:execute", family="merging"),
    Verb("mix", "honeloom.mixture.config:MixConfig", "honeloom.stages.mix:execute", family="routing"),
    Verb("glue", "honeloom.zoo.config:GlueConfig", "honeloom.stages.glue:execute", family="merging"),
    Verb("extract-lora", "honeloom.merging.extract_config:ExtractConfig", "honeloom.stages.extract_lora:execute"),
    Verb("convert", "honeloom.checkpoint.convert_config:ConvertConfig", "honeloom.stages.convert:execute"),
    Verb("drop", "honeloom.dropping.config:DropConfig", "honeloom.stages.drop:execute", version=2, family="dropping"),
    Verb("export", "honeloom.checkpoint.export_config:ExportConfig", "honeloom.stages.export:execute"),
    Verb("evaluate", "honeloom.evaluation.config:EvaluateConfig", "honeloom.stages.evaluate:execute"),
)

VERBS: dict[str, Verb] = {verb.name: verb for verb in _ALL}
