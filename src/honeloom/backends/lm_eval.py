"""lm-evaluation-harness tasks on a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from honeloom.errors import ConfigError, MissingExtraError
from honeloom.registry import suggest
from honeloom.types.report import Metric

try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise MissingExtraError(
        f"--tasks needs lm-eval ({error.name} is missing): pip install 'honeloom[lm-eval]'"
    ) from None

__all__ = ["run_tasks"]

_UNITS = {
    **dict.fromkeys(("acc", "acc_norm", "exact_match", "f1"), "share"),
    **dict.fromkeys(("word_perplexity", "byte_perplexity", "perplexity"), "perplexity"),
    "bits_per_byte": "bits/byte",
}


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_path: str | None,
    batch_size: int,
    limit: int | None,
    seed: int,
) -> list[Metric]:
    """Evaluate tasks and return their metrics; `domain` is the task's name.

    A group gives the metrics of its tasks, and its own where it defines any.

    Parameters
    ----------
    model, tokenizer
        Live objects; nothing is loaded again.
    tasks : sequence of str
        Names of tasks or groups known to lm-eval, or defined in `task_path`.
    task_path : str or None
        Folder of task YAML files; then only these are known, which starts faster.

    Raises
    ------
    ConfigError
        A task is unknown, is a tag, or gave no result.
    """
    manager = TaskManager(include_path=task_path, include_defaults=task_path is None)
    known = set(manager.all_tasks)
    for task in tasks:
        if task not in known:
            where = f"in {task_path}" if task_path else "to lm-eval"
            listed = "" if task_path else "; `lm-eval ls tasks` lists all, --task-path names a folder of your own"
            raise ConfigError(f"task {task!r} is not known {where}{suggest(task, known) or listed}")
        if task in manager.all_tags:
            raise ConfigError(f"task {task!r} is a tag of several tasks and has no result of its own; name the tasks")
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device)),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=1000,
        random_seed=seed,
        numpy_random_seed=seed % 2**32,
        torch_random_seed=seed,
    )
    return _all_metrics(tasks, results)


def _all_metrics(tasks: Sequence[str], results: dict[str, Any]) -> list[Metric]:
    found = results["results"]
    for task in tasks:
        if task not in found and not any(t in found for t in results.get("group_subtasks", {}).get(task, ())):
            raise ConfigError(
                f"lm-eval gave no result for {task!r}, but for {', '.join(found) or 'nothing'}; name these"
            )
    return [m for task in found for m in _metrics(task, results)]


def _samples(name: str, results: dict[str, Any]) -> int:
    parts = results.get("group_subtasks", {}).get(name)
    if parts:
        return sum(_samples(part, results) for part in parts)
    return int(results["n-samples"].get(name, {}).get("effective", 0))


def _metrics(task: str, results: dict[str, Any]) -> list[Metric]:
    found = []
    values = results["results"][task]
    higher = results["higher_is_better"].get(task, {})
    n = _samples(task, results)
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{filtered}")
        stderr = float(error) if isinstance(error, int | float) else None
        found.append(Metric(name, float(value), n, _UNITS.get(name, ""), bool(higher.get(name, True)), stderr, task))
    return found
