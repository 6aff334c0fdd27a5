"""What the licences of a result's sources say together: their union, and what to read before it is passed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["UNKNOWN", "licence_warnings", "only_licence"]

UNKNOWN = "unknown"
_OWN_TERMS = (
    "other",
    "llama",
    "gemma",
    "openrail",
    "creativeml",
    "bigscience",
    "bigcode",
    "deepfloyd",
    "apple-",
    "intel-",
)
_COPYLEFT = ("gpl", "agpl", "lgpl", "cc-by-sa", "odbl", "osl", "eupl", "cecill", "ms-rl", "mpl")


def licence_warnings(union: Mapping[str, Sequence[str]]) -> list[str]:
    """Sentences about licences that restrict, that are not known, or that may not stand beside each other.

    Parameters
    ----------
    union : mapping
        Licence as the hub spells it (`UNKNOWN` where none is told) -> names of what has it. This reads names, not
        texts, and replaces nobody's advice.
    """
    found = []
    for licence, names in union.items():
        of = f"{', '.join(dict.fromkeys(names))}: {licence}"
        if licence == UNKNOWN:
            found.append(
                f"The licence of {', '.join(dict.fromkeys(names))} is not known here; read it before you pass this on."
            )
        elif _has(licence, "-nc"):
            found.append(f"Commercial use is not allowed ({of}).")
        elif licence.startswith(_OWN_TERMS):
            found.append(f"Terms of its own ({of}); read them.")
        if _has(licence, "-nd"):
            found.append(f"Adapted versions may not be shared ({of}).")
    copyleft = [licence for licence in union if licence.startswith(_COPYLEFT)]
    if len({_family(licence) for licence in copyleft}) > 1:
        found.append(f"Several licences each ask for themselves: {', '.join(sorted(copyleft))}.")
    barred = sorted(x for x in union if _has(x, "-nc") and x not in copyleft)
    if copyleft and barred:
        found.append(f"{', '.join(sorted(copyleft))} and {', '.join(barred)} ask for what excludes each other.")
    return found


def only_licence(union: Mapping[str, Sequence[str]]) -> str | None:
    """The licence that all sources share, where each has it and nothing else; else None."""
    return next(iter(union)) if len(union) == 1 and UNKNOWN not in union else None


def _has(licence: str, part: str) -> bool:
    return part in f"{licence}-" and f"{part}-" in f"{licence}-"


def _family(licence: str) -> str:
    """The name without its version."""
    return licence.rstrip("0123456789.").rstrip("-")
