"""How much work every verb is, from its settings and what it reads: rows, passes, evaluations, bytes.

One function per verb; `planning.volume` has the arithmetic, `reading` what is known of inputs.
"""

from __future__ import annotations

from collections.abc import Callable

from honeloom.stages.runner import Job
from honeloom.stages.volumes.counting import Counted
from honeloom.stages.volumes.models import (
    count_aggregate,
    count_bytes,
    count_drop,
    count_export,
    count_extract,
    count_glue,
    count_merge,
    count_mix,
)
from honeloom.stages.volumes.reading import PlanReader
from honeloom.stages.volumes.rows import count_evaluate, count_federate, count_select, count_tune

__all__ = ["Counted", "volume_of"]

_VERBS: dict[str, Callable[[Job, PlanReader], Counted]] = {
    "aggregate": count_aggregate,
    "drop": count_drop,
    "evaluate": count_evaluate,
    "export": count_export,
    "extract-lora": count_extract,
    "federate": count_federate,
    "glue": count_glue,
    "merge": count_merge,
    "mix": count_mix,
    "select": count_select,
    "tune": count_tune,
}


def volume_of(job: Job, reader: PlanReader) -> Counted:
    """Count a stage's work.

    Parameters
    ----------
    job : Job
        From `prepare`; of inputs that are still to be made, the reader knows what to expect.
    reader : PlanReader
        Reads rows and configurations.

    Raises
    ------
    HoneloomError
        Rows cannot be read, or a model is not known.
    """
    return _VERBS.get(job.verb.name, count_bytes)(job, reader)
