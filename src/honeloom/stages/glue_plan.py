"""What `glue --dry-run` says: models, most merges tried, rows read, disk; from sizes and settings alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from honeloom.checkpoint.folders import read_config
from honeloom.errors import HoneloomError
from honeloom.stages.inputs import ResolvedInput
from honeloom.zoo.config import GlueConfig

__all__ = ["glue_notes", "models_of_one_shape", "tried"]


def glue_notes(config: GlueConfig, inputs: Mapping[str, ResolvedInput]) -> tuple[str, ...]:
    """Lines for a person; what is not on this machine yet is left out.

    Parameters
    ----------
    config : GlueConfig
        The settings.
    inputs : mapping
        Its inputs by place.
    """
    found = {name: inputs[place] for name, place in config.named()}
    lines = [f"models: {len(found)}; every weight is read once to compare them"]
    lines += [f"left out: {left.model}: {left.reason}" for left in config.left_out]
    shapes = models_of_one_shape(found)
    if len(shapes) > 1:
        told = "; ".join(f"{', '.join(names)}: {what}" for what, names in shapes.items())
        lines.append(f"kinds that cannot be merged with each other: {told}")
    if config.only == "clusters":
        return (*lines, "writes clusters.json and similarity.npz, no weights")
    most = max(map(len, shapes.values()), default=len(found))
    most_tried = tried(config, most)
    again = "" if len(shapes) < 2 else " each"
    lines.append(
        f"merges tried in memory, at most{again}: {most_tried}, each on the search rows until it is clearly worse "
        f"({config.search.type})"
    )
    mixtures = [m.name for m in config.mixtures] if config.only is None else []
    evaluations = len(found) + len(shapes) + len(mixtures)
    if config.only != "search":
        lines.append(f"evaluations on the report rows: {evaluations}; mixtures tried: {', '.join(mixtures) or 'none'}")
    if not all(i.paths for i in found.values()):
        return tuple(lines)  # sizes of models that are still to be made are in the table of costs
    total = sum(i.size for i in found.values())
    largest = max((i.size for i in found.values()), default=0)
    written = {"search": 0, "merge": 2 * largest * len(shapes)}.get(str(config.only), total + 2 * largest * len(shapes))
    meanwhile = total * len(mixtures)
    lines.append(f"disk: about {written:,} bytes stay, {meanwhile:,} more while mixtures are tried, at most")
    return tuple(lines)


def tried(config: GlueConfig, models: int) -> int:
    """Merges that a search of some models tries at most."""
    if config.budget:
        return config.budget
    grid = len(getattr(config.search, "grid", ()) or (0,))
    own = getattr(config.search, "budget", None) or getattr(config.search, "steps", None)
    return int(own) if own else max(0, models - 1) * grid


def models_of_one_shape(found: Mapping[str, ResolvedInput]) -> dict[str, list[str]]:
    """Models by what their configurations say of their shape."""
    shapes: dict[str, list[str]] = {}
    for name, item in found.items():
        folder = item.base or (item.paths[0] if item.paths else None)
        shapes.setdefault(_shape(folder) if folder else "not here yet", []).append(name)
    return shapes


def _shape(folder: Path) -> str:
    try:
        config = read_config(folder)
    except HoneloomError:
        return "unreadable"
    fields = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return ", ".join(f"{name} {config[name]}" for name in fields if name in config)
