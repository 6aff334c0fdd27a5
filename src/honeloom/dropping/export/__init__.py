"""A drop plan as a checkpoint: one file per profile says which tensors go where, and what is refused.

`export_plan` decides, as data; `write_export` writes a model folder, `honeloom.backends.gguf` a GGUF file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from honeloom.checkpoint.reader import Checkpoint
from honeloom.dropping.export import decilm, dropped, gguf, native, zero
from honeloom.dropping.export.halves import DROPPED, Located, Source, stock_config
from honeloom.dropping.export.plan import ExportPlan
from honeloom.dropping.export.writing import export_bytes, write_export
from honeloom.types.plans import DropPlan

__all__ = [
    "DROPPED",
    "PROFILES",
    "ExportPlan",
    "Source",
    "export_bytes",
    "export_plan",
    "stock_config",
    "write_export",
]

PROFILES: Mapping[str, Callable[[Source], ExportPlan]] = {
    "zero": zero.export,
    "native": native.export,
    "dropped": dropped.export,
    "decilm": decilm.export,
    "gguf": gguf.export,
}


def export_plan(checkpoint: Checkpoint, plan: DropPlan, located: Located | None = None) -> ExportPlan:
    """Decide what the plan's profile writes of a model; reads headers and small files only.

    Parameters
    ----------
    checkpoint : Checkpoint
        The source: a stock folder, or one of profile dropped, whose drops are then added to the plan's.
    plan : DropPlan
        What goes; layers count as in the original model.
    located : Located, optional
        Where the loaded model keeps its halves, for a family that the table of layouts does not list: profiles zero
        and dropped take it.

    Raises
    ------
    ConfigError, CheckpointError
        The profile cannot say this plan exactly, with the reason.
    """
    return PROFILES[plan.profile](Source.of(checkpoint, plan, located))
