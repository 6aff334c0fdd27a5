"""Advice in words: merge these, mix those, leave that out, each with its measured reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Finding", "advise"]


@dataclass(frozen=True)
class Finding:
    """What was measured of a zoo.

    Attributes
    ----------
    unit : str
        Of the values, which are of the report rows; lower is better.
    members : sequence of str
        The models.
    values : mapping
        Model, merged cluster or mixture -> value.
    clusters : mapping
        Name of a cluster's merge -> its models and their share in the merge, 0 for those left out.
    alone : mapping
        Model that fits no other -> why.
    refused : sequence of (str, str)
        Model that cannot be used, and why.
    best_single : str
        The model with the lowest value.
    result : str
        What was taken.
    gain : float
        1 - value of the result / value of the best single model.
    interval : (float, float)
        95 % interval of the difference.
    use : mapping
        Of a mixture: expert -> share of the report rows it answers.
    best_in : mapping
        Domain -> the single model that is best there.
    tried : mapping
        Mixture -> why it was not taken.
    """

    unit: str
    members: Sequence[str]
    values: Mapping[str, float]
    clusters: Mapping[str, Mapping[str, float]]
    alone: Mapping[str, str]
    refused: Sequence[tuple[str, str]]
    best_single: str
    result: str
    gain: float
    interval: tuple[float, float]
    use: Mapping[str, float] = field(default_factory=dict)
    best_in: Mapping[str, str] = field(default_factory=dict)
    tried: Mapping[str, str] = field(default_factory=dict)


def advise(found: Finding) -> list[str]:
    """Sentences for a person, the verdict first."""
    return [
        _verdict(found), *_merging(found), *_mixing(found), *_leaving(found),
        *(f"Not used: {model}: {reason}." for model, reason in found.refused),
    ]  # fmt: skip


def _verdict(found: Finding) -> str:
    value, best = found.values[found.result], found.values[found.best_single]
    if found.result == found.best_single:
        return (
            f"Use {found.best_single} as it is ({best:.4f} {found.unit}): nothing that was tried is better beyond the "
            "noise of these rows."
        )
    low, high = found.interval
    sure = "" if high < 0 or low > 0 else ", an interval with 0, so these rows do not tell them apart"
    return (
        f"Use {found.result}: {value:.4f} {found.unit} against {best:.4f} of the best single model "
        f"({found.best_single}), {abs(found.gain):.1%} {'lower' if found.gain >= 0 else 'higher'}; difference "
        f"{value - best:+.4f} [{low:+.4f}, {high:+.4f}]{sure}."
    )


def _merging(found: Finding) -> list[str]:
    lines = []
    for name, shares in found.clusters.items():
        if len(shares) < 2:
            continue
        taken = [model for model, share in shares.items() if share > 0]
        best = min(shares, key=lambda model: found.values[model])
        value, single = found.values.get(name), found.values[best]
        if value is None or len(taken) < 2:
            alone = taken[0] if len(taken) == 1 else best
            lines.append(
                f"Do not merge {', '.join(shares)}: no weights that were tried beat {alone} alone on the search rows."
            )
        elif value < single:
            lines.append(
                f"Merge {', '.join(taken)} ({name}): {value:.4f} {found.unit}, the best of them alone ({best}) "
                f"{single:.4f}."
            )
        else:
            lines.append(
                f"Merging {', '.join(taken)} ({name}) gives {value:.4f} {found.unit}, no better than {best} alone "
                f"({single:.4f}) on the report rows, although the search rows said so."
            )
    return lines


def _mixing(found: Finding) -> list[str]:
    lines = []
    if found.use:
        used = [
            f"{name} {share:.0%}" for name, share in sorted(found.use.items(), key=lambda p: (-p[1], p[0])) if share
        ]
        lines.append(f"Mix: the router sends the report rows to {', '.join(used)}.")
    lines += [
        f"Mixture {name} was not taken: {reason}." for name, reason in found.tried.items() if name != found.result
    ]
    return lines


def _leaving(found: Finding) -> list[str]:
    """Models that the result does not use."""
    lines = []
    for model in found.members:
        if _is_used(found, model):
            continue
        best = [domain or "all rows" for domain, name in found.best_in.items() if name == model]
        why = f"although it is the best single model for {', '.join(best)}" if best else "it is best in no domain"
        if (reason := found.alone.get(model)) is not None:
            why += f"; it fits no other model: {reason}"
        lines.append(f"Leave {model} out: {found.values[model]:.4f} {found.unit} alone; {why}.")
    return lines


def _is_used(found: Finding, model: str) -> bool:
    """Whether the result is this model, routes to it, or holds it in a merge that it is or routes to."""
    if model == found.result or found.use.get(model):
        return True
    owners = [name for name, shares in found.clusters.items() if shares.get(model)]
    return any(name == found.result or found.use.get(name) for name in owners)
