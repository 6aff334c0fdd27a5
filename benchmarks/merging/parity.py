"""Element by element: the methods that honeloom and mergekit define alike, on the same YAML. Writes PARITY.md.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/merging/parity.py [--env DIR] [--only CASE ...]

Tiny random models in float32 (`checkpoints.tiny`), one merge per method and model kind by each program. The unit is the
last place of bfloat16 at the larger of the two values, and never less than at a 4096th of the tensor's largest, so that
what is left of a cancellation in float32 does not count as a difference. mergekit's half is kept in out/parity/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pages
import rival
from checkpoints import PLACE, TINY, tiny
from safetensors.numpy import load_file

import honeloom
from honeloom.errors import HoneloomError

OUT = pages.HERE / "out" / "parity"
BAR = 1.0
_FLOOR = 2.0**-12
_THEIRS = "mergekit fails:"
_THREE, _WEIGHTS = (1, 2, 3), (0.5, 0.3, 0.4)


@dataclass(frozen=True)
class Case:
    """One merge of the tiny models.

    Attributes
    ----------
    models : tuple of int
        Which fine-tunes; 0 is the base.
    weights : tuple of float
        One per model, or empty for methods without weights.
    own : mapping
        Parameters that every model gets, beside its weight.
    base : bool
        Whether base_model is given.
    shared : mapping
        Parameters of the whole merge.
    slices : tuple of (int, int, int)
        (model, first layer, end) instead of whole models.
    """

    method: str
    models: tuple[int, ...] = _THREE
    weights: tuple[Any, ...] = ()
    own: Mapping[str, Any] | None = None
    base: bool = True
    shared: Mapping[str, Any] | None = None
    slices: tuple[tuple[int, int, int], ...] = ()

    def config(self, folders: list[Path]) -> dict[str, Any]:
        """mergekit's YAML."""
        config: dict[str, Any] = {"merge_method": self.method, "dtype": "float32", "compat": "mergekit"}
        if self.base:
            config["base_model"] = str(folders[0])
        if self.shared:
            config["parameters"] = dict(self.shared)
        if self.slices:
            sources = [{"model": str(folders[m]), "layer_range": [a, b]} for m, a, b in self.slices]
            config["slices"] = [{"sources": [source]} for source in sources]
        else:
            config["models"] = [self._model(i, str(folders[m])) for i, m in enumerate(self.models)]
        return config

    def _model(self, place: int, path: str) -> dict[str, Any]:
        parameters = {"weight": self.weights[place]} if self.weights else {}
        parameters |= self.own or {}
        return {"model": path, "parameters": parameters} if parameters else {"model": path}


def _sparse(method: str, **own: float) -> Case:
    return Case(method, weights=_WEIGHTS, own=own, shared={"lambda": 0.8})


def _by_layer(attention: list[float], rest: float) -> list[dict[str, Any]]:
    return [{"filter": "self_attn", "value": attention}, {"value": rest}]


CASES: dict[str, Case] = {
    "linear": Case("linear", weights=_WEIGHTS, base=False),
    "linear, not normalized": Case("linear", weights=_WEIGHTS, base=False, shared={"normalize": False}),
    "linear, weights by filter and layer": Case(
        "linear", (1, 2), (_by_layer([0.0, 0.5, 0.9], 0.3), _by_layer([1.0, 0.2], 0.8)), base=False
    ),
    "slerp": Case("slerp", (0, 1), shared={"t": 0.3}),
    "slerp, t by filter and layer": Case("slerp", (0, 1), shared={"t": _by_layer([0.0, 0.5, 0.3, 0.7, 1.0], 0.5)}),
    "nuslerp": Case("nuslerp", (1, 2), (0.6, 0.2), base=False),
    "nuslerp of task vectors": Case("nuslerp", (1, 2), (0.6, 0.2)),
    "nuslerp, not flattened": Case("nuslerp", (1, 2), (0.6, 0.2), base=False, shared={"nuslerp_flatten": False}),
    "nuslerp, row-wise": Case(
        "nuslerp", (1, 2), (0.6, 0.2), base=False, shared={"nuslerp_flatten": False, "nuslerp_row_wise": True}
    ),
    "multislerp": Case("multislerp", weights=_WEIGHTS, base=False),
    "multislerp of task vectors": Case("multislerp", weights=_WEIGHTS),
    "karcher, equal weights": Case("karcher", base=False),
    "task_arithmetic": Case("task_arithmetic", weights=_WEIGHTS, shared={"lambda": 0.8}),
    "task_arithmetic, normalized": Case("task_arithmetic", weights=_WEIGHTS, shared={"normalize": True}),
    "ties, density .5": _sparse("ties", density=0.5),
    "ties, density .2": _sparse("ties", density=0.2),
    "breadcrumbs, density .5, gamma .1": _sparse("breadcrumbs", density=0.5, gamma=0.1),
    "breadcrumbs_ties, density .5, gamma .1": _sparse("breadcrumbs_ties", density=0.5, gamma=0.1),
    "sce, all": Case("sce", shared={"select_topk": 1.0}),
    "sce, a third": Case("sce", shared={"select_topk": 0.33}),
    "model_stock": Case("model_stock"),
    "model_stock, filter-wise": Case("model_stock", shared={"filter_wise": True}),
    "nearswap": Case("nearswap", (1,), shared={"t": 0.1}),
    "arcee_fusion": Case("arcee_fusion", (1,)),
    "passthrough, layers of three models": Case("passthrough", base=False, slices=((1, 0, 1), (2, 2, 3), (3, 1, 2))),
    "passthrough, layers stacked": Case("passthrough", base=False, slices=((1, 0, 2), (2, 1, 3), (3, 2, 3))),
    "passthrough, scaled": Case("passthrough", (1,), own={"scale": 0.75}, base=False),
    "dare_linear, density 1": _sparse("dare_linear", density=1.0),
    "dare_ties, density 1": _sparse("dare_ties", density=1.0),
    "della, density 1": _sparse("della", density=1.0, epsilon=0.0),
    "della_linear, density 1": _sparse("della_linear", density=1.0, epsilon=0.0),
}


@dataclass
class Difference:
    """Between two results of one merge: the largest in units, elements beyond the bar, of how many, worst tensor."""

    largest: float = 0.0
    beyond: int = 0
    count: int = 0
    tensor: str = ""


def bfloat16_unit(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Distance of neighbouring bfloat16 numbers at these magnitudes: 8 significant bits."""
    units: npt.NDArray[np.float64] = np.ldexp(1.0, np.maximum(np.frexp(values)[1] - 8, -133))
    return units


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Difference:
    """Compare all tensors; ValueError if names or shapes differ."""
    if odd := sorted(ours.keys() ^ theirs.keys()):
        raise ValueError(f"only one of the two wrote {', '.join(odd[:3])}")
    found = Difference()
    for name in ours:
        a, b = (np.asarray(side[name], np.float64) for side in (ours, theirs))
        if a.shape != b.shape:
            raise ValueError(f"{name} is {a.shape} here and {b.shape} there")
        size = np.maximum(np.abs(a), np.abs(b))
        units = np.abs(a - b) / bfloat16_unit(np.maximum(size, size.max(initial=0.0) * _FLOOR))
        units = np.where(np.isnan(units), np.inf, units)
        found.count += a.size
        found.beyond += int((units > BAR).sum())
        if units.max(initial=0.0) >= found.largest:
            found.largest, found.tensor = float(units.max(initial=0.0)), name
    return found


def merge_theirs(env: Path, configs: Mapping[str, dict[str, Any]], place: Path) -> dict[str, str]:
    """Let mergekit do what it has not done yet; errors by case."""
    jobs, named = [], {}
    for name, config in configs.items():
        out = place / folder_name(name) / "mergekit"
        named[str(out.absolute())] = name
        mark = rival.write_config(out.parent / "config.yaml", config)
        if (out / "config.json").exists() and (out / "mergekit_config.yml").read_text() == mark.read_text():
            continue
        shutil.rmtree(out, ignore_errors=True)
        jobs.append((mark, out))
    if not jobs:
        return {}
    return {named[out]: error for out, error in rival.merge_many(env, jobs, place / "mergekit.log").items()}


def merge_ours(config: Path, out: Path) -> str:
    """Merge with honeloom, in this process; returns what it says if it fails."""
    try:
        honeloom.merge(config, out, overwrite=True)
    except HoneloomError as error:
        return str(error)
    return ""


def folder_name(case: str) -> str:
    """Of a case."""
    return case.replace(", ", "-").replace(" ", "_").replace(".", "")


def compare(env: Path, kind: str, cases: Mapping[str, Case]) -> dict[str, Difference | str]:
    """All cases on one kind of model: the difference, or why there is none."""
    folders, place = tiny(PLACE, kind), OUT / kind
    errors = merge_theirs(env, {name: case.config(folders) for name, case in cases.items()}, place)
    found: dict[str, Difference | str] = {}
    for name in cases:
        folder = place / folder_name(name)
        if name in errors:
            found[name] = f"{_THEIRS} {errors[name].splitlines()[-1].strip()}"
        elif error := merge_ours(folder / "config.yaml", folder / "honeloom"):
            found[name] = f"honeloom: {error}"
        else:
            sides = [load_file(folder / side / "model.safetensors") for side in ("honeloom", "mergekit")]
            try:
                found[name] = difference(*sides)
            except ValueError as error:
                found[name] = str(error)
        print(kind, name, found[name], flush=True)
    return found


def cell(found: Difference | str) -> str:
    """Of the table."""
    if isinstance(found, str):
        return "mergekit fails" if found.startswith(_THEIRS) else "no result"
    return f"{found.largest:.2g}" + (f" ({found.beyond} of {found.count:,} beyond)" if found.beyond else "")


def is_missed(found: Difference | str) -> bool:
    """Whether the goal is missed; where mergekit has no result there is none."""
    return not found.startswith(_THEIRS) if isinstance(found, str) else found.largest > BAR


def page(found: Mapping[str, Mapping[str, Difference | str]], theirs: Mapping[str, str]) -> list[str]:
    """The result as Markdown."""
    rows = [(name, *(cell(found[kind][name]) for kind in found)) for name in next(iter(found.values()))]
    notes: dict[bool, list[str]] = {True: [], False: []}
    for kind, results in found.items():
        for name, result in results.items():
            text = result if isinstance(result, str) else f"{result.largest:.3g} units in {result.tensor}"
            if isinstance(result, str) or result.largest > BAR:
                notes[is_missed(result)].append(f"- {name}, {kind}: {text}")
    return [
        "# The same merge by honeloom and by mergekit", "",
        "Command: `OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/merging/parity.py`. "
        f"{pages.machine(theirs)}", "",
        "Tiny random models in float32: a base and three fine-tunes. Both programs get the same YAML, with",
        "`compat: mergekit` for honeloom, and compute in float32 (mergekit) and float64 rounded once (honeloom). The",
        "largest difference over all elements, in units of the last place of bfloat16; the goal is 1. Random methods",
        "are compared where nothing is dropped: their random numbers differ.", "",
        *pages.table(("method", *found), rows), "", *notes[False], *([""] if notes[False] else []),
        "## Not reached", "", *(notes[True] or ["Nothing."]), "",
    ]  # fmt: skip


def main() -> None:
    """Merge, compare, and write the page unless only some cases were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=rival.ENVIRONMENT)
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=CASES)
    given = parser.parse_args()
    cases = {name: case for name, case in CASES.items() if not given.only or name in given.only}
    found = {kind: compare(given.env, kind, cases) for kind in TINY}
    if given.only:
        print(json.dumps({kind: {n: cell(r) for n, r in results.items()} for kind, results in found.items()}, indent=1))
        return
    pages.write("PARITY.md", page(found, rival.versions(given.env)))
    sys.exit(any(is_missed(result) for results in found.values() for result in results.values()))


if __name__ == "__main__":
    main()
