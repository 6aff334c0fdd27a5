"""Everything that a real zoo can be made of, measured on the same rows: searches, plain merges, mixtures, stacking.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/glue/zoo_arms.py [DATA] [--out DIR]

Makes the zoo if it is not there (see zoo.py), then writes ZOO.md beside this script. Every arm is a result of its own
in DIR, so that an interrupted benchmark goes on. What is chosen is chosen by the search rows; the tables are of the
report rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

import honeloom
from honeloom.evaluation.statistics import Comparison, macro_bootstrap
from honeloom.types.report import Report
from zoo import DOMAINS, EXPERTS, FOREIGN, OUTSIDER, Zoo, arguments, build, read_rows

HERE = Path(__file__).resolve().parent
SHARES = dict.fromkeys(DOMAINS, 1 / len(DOMAINS))
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """One result: what it is, and its bits and characters of every report row."""

    name: str
    kind: str
    values: Values
    routes: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Found:
    """All arms by name, labels of the report rows, and reports worth telling of."""

    ids: list[str]
    domains: list[str]
    arms: dict[str, Arm] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)

    def domain(self, name: str, domain: str) -> float:
        """Bits per character."""
        total = self.arms[name].values[[d == domain for d in self.domains]].sum(axis=0)
        return float(total[0] / total[1])

    def macro(self, name: str) -> float:
        """Mean over domains."""
        return float(np.mean([self.domain(name, d) for d in DOMAINS]))

    def gap(self, one: str, other: str) -> Comparison:
        """Paired difference with its interval."""
        return macro_bootstrap(self.arms[one].values, self.arms[other].values, self.domains, SHARES)

    def best_single(self) -> str:
        """The member with the lowest macro value, on these very rows: the hardest rival."""
        return min((n for n, a in self.arms.items() if a.kind == "member"), key=self.macro)

    def oracle(self) -> float:
        """Every domain by the member that is best there."""
        members = [n for n, a in self.arms.items() if a.kind == "member"]
        return float(np.mean([min(self.domain(n, d) for n in members) for d in DOMAINS]))


def score(found: Found, zoo: Zoo, out: Path, name: str, model: Path, kind: str, seconds: float = 0.0) -> None:
    """Evaluate a model on the report rows; a row that it cannot read counts as the worst of what others made of it."""
    report = honeloom.evaluate(
        model, rows=str(zoo.report), device="cpu", max_bad=1.0, output_dir=out / "scores" / name, mode="resume"
    )
    table = pq.read_table(report.path / "examples.parquet").to_pydict()
    place = {row_id: i for i, row_id in enumerate(found.ids)}
    values = np.full((len(found.ids), 2), np.nan)
    for row_id, loss, chars in zip(table["id"], table["loss_sum"], table["chars"], strict=True):
        values[place[row_id]] = loss / np.log(2), chars
    others = np.stack([a.values for a in found.arms.values()]) if found.arms else values[None]
    worst = others[np.nan_to_num(others[..., 0] / others[..., 1], nan=-1.0).argmax(axis=0), np.arange(len(values))]
    values = np.where(np.isnan(values), worst, values)
    routes = dict(zip(table["id"], table["expert"], strict=True)) if "expert" in table else {}
    found.arms[name] = Arm(name, kind, values, routes, seconds)
    print(f"{name}: {found.macro(name):.4f}", flush=True)


def timed(make: Callable[[], Report]) -> tuple[Report, float]:
    """A report, and the CPU seconds of its making as it says itself."""
    report = make()
    return report, report.cost.cpu_seconds


def merges(found: Found, zoo: Zoo, out: Path) -> None:
    """Merges that nobody searched: the average of the family, TIES at its defaults."""
    family = [str(zoo.models[name]) for name in EXPERTS]
    documents: dict[str, dict[str, Any]] = {
        "average of the family": {"models": family, "chat_template": "auto"},
        "ties of the family": {
            "models": family, "method": "ties", "base_model": str(zoo.base), "chat_template": "auto",
        },
        "task arithmetic, scale 0.4": {
            "models": family, "method": {"type": "task_arithmetic", "scale": 0.4}, "base_model": str(zoo.base),
            "chat_template": "auto",
        },
    }  # fmt: skip
    forced = [*family, str(zoo.models[OUTSIDER])]
    documents["average with the outsider"] = {"models": forced, "chat_template": "auto"}
    for name, document in documents.items():
        folder = merge_of(out, name)
        report, seconds = timed(partial(honeloom.merge, document, folder, mode="resume"))
        score(found, zoo, out, name, report.path, "merge, not searched", seconds)


def glue(zoo: Zoo, folder: Path, models: Sequence[str], **settings: Any) -> Report:
    """The verb on some models of the zoo."""
    document = {
        "models": [{"model": str(zoo.models[name]), "name": name} for name in models], "base": str(zoo.base),
        "search_rows": str(zoo.search), "report_rows": str(zoo.report), "device": "cpu",
    }  # fmt: skip
    return honeloom.glue(document, folder, mode="resume", **settings)


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy soup (average)": {"search": "average"},
    "coefficient": {"search": "coefficient"},
    "CMA-ES": {"search": {"type": "cma", "budget": 60}},
    "layer-wise": {"search": {"type": "layerwise", "steps": 40}},
    "coefficient, all rows": {"search": {"type": "coefficient", "racing": False}},
    "CMA-ES, three groups of layers": {"search": {"type": "cma", "budget": 80, "groups": 3}},
    "similarity, least similar first": {"search": {"type": "similarity", "order": "ascending"}},
}


def search(found: Found, zoo: Zoo, out: Path, name: str) -> None:
    """A search of the family alone, and the merge that it ends with."""
    folder = out / "searches" / slug(name)
    report = glue(zoo, folder, EXPERTS, only="search", **SEARCHES[name])
    found.reports[name] = report
    merged = honeloom.merge(folder / "cluster-1.yaml", merge_of(out, name), mode="resume")
    score(found, zoo, out, name, merged.path, "merge, searched", report.cost.cpu_seconds)


def merge_of(out: Path, search: str) -> Path:
    """Where the merge lies that a search ends with."""
    return out / "merges" / slug(search)


def slug(name: str) -> str:
    """A name as a folder's."""
    return name.replace(" ", "-").replace(",", "").replace("(", "").replace(")", "")


def mixtures(found: Found, zoo: Zoo, out: Path) -> None:
    """Each way to mix alone, on the merge that the default search finds."""
    levels: dict[str, Any] = {
        "FFN level": "ffn-members",
        "FFN level, half dense": {"level": "ffn", "experts": "members", "dense_layers": 6},
        "block level": "block-members",
        "model level, clusters": "model-clusters",
        "model level, members": "model-members",
        "model level, random router": {"level": "model", "experts": "members", "router": "random"},
        "stacking": "stack-members",
    }
    for name, mixture in levels.items():
        folder = out / "mixtures" / slug(name)
        report = mix_alone(zoo, out, mixture, folder)
        score(found, zoo, out, name, report.path, "mixture", report.cost.cpu_seconds)


def mix_alone(zoo: Zoo, out: Path, mixture: Any, folder: Path) -> Report:
    """One mixture as `glue` makes it, kept whatever it is worth."""
    from honeloom.zoo.config import GlueConfig  # after the arms before it: settings load the registry

    chosen = GlueConfig.model_validate({"models": ["a"], "search_rows": "b", "mixtures": [mixture]}).mixtures[0]
    merged = merge_of(out, "coefficient")
    names = list(zoo.models) if chosen.level == "model" else list(EXPERTS)
    models: dict[str, Path] = {n: zoo.models[n] for n in names}
    if chosen.experts == "clusters":
        models = {"cluster-1": merged, OUTSIDER: zoo.models[OUTSIDER], FOREIGN: zoo.models[FOREIGN]}
    if chosen.level == "stack":
        first, second = list(models.values())[:2]
        slices = [{"sources": [{"model": str(m), "layer_range": r}]} for m, r in ((first, [0, 8]), (second, [4, 12]))]
        return honeloom.merge(
            {"slices": slices, "method": "passthrough", "chat_template": "auto"}, folder, mode="resume"
        )
    rows = teaching(zoo, out, models)
    experts = [
        {"model": str(m), "name": n, **({"rows": str(rows[n])} if chosen.router.type == "rows" else {})}
        for n, m in models.items() if n in rows
    ]  # fmt: skip
    document: dict[str, Any] = {
        "level": chosen.level, "experts": experts, "router": chosen.router.model_dump(mode="json"),
        "dense_layers": chosen.dense_layers,
    }  # fmt: skip
    document |= {"encoder": str(zoo.base)} if chosen.level == "model" else {"base_model": str(merged)}
    return honeloom.mix(document, folder, mode="resume")


def teaching(zoo: Zoo, out: Path, models: Mapping[str, Path]) -> dict[str, Path]:
    """Search rows by the expert that is best at them, as `glue` assigns them; experts without any are left out."""
    rows = read_rows(zoo.search)
    ratios = {}
    for name, model in models.items():
        report = honeloom.evaluate(
            model, rows=str(zoo.search), device="cpu", max_bad=1.0, output_dir=out / "search-scores" / name,
            mode="resume",
        )  # fmt: skip
        table = pq.read_table(report.path / "examples.parquet").to_pydict()
        lines = zip(table["id"], table["loss_sum"], table["chars"], strict=True)
        ratios[name] = {row_id: loss / chars for row_id, loss, chars in lines if chars}
    best = {r["id"]: min(models, key=lambda n: ratios[n].get(r["id"], np.inf)) for r in rows}
    folder = out / "teaching" / "-".join(sorted(models))[:80]
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in models:
        mine = [r for r in rows if best[r["id"]] == name]
        if mine:
            found[name] = folder / f"{name}.jsonl"
            found[name].write_text("".join(json.dumps(r) + "\n" for r in mine))
    return found


def orders(zoo: Zoo, out: Path) -> list[list[list[str]]]:
    """Clusters of the zoo in several input orders."""
    names = list(zoo.models)
    found = []
    for n, order in enumerate((names, names[::-1], names[3:] + names[:3], sorted(names, key=lambda x: x[::-1]))):
        document = {"models": [{"model": str(zoo.models[name]), "name": name} for name in order]}
        report = honeloom.glue(document, out / f"clusters-{n}", only="clusters", mode="resume")
        found.append(report.details["clusters"])
    return found


def measure(data: Path, out: Path) -> Iterator[tuple[Zoo, Found, list[list[list[str]]]]]:
    """Everything, or what is not there yet; what is known so far after each of the longer searches."""
    zoo = build(data, out)
    rows = read_rows(zoo.report)
    found = Found([r["id"] for r in rows], [r["domain"] for r in rows])
    for name, model in zoo.models.items():
        score(found, zoo, out, name, model, "member")
    score(found, zoo, out, "base6m", zoo.base, "base")
    merges(found, zoo, out)
    first, second, *others = SEARCHES
    for name in (first, second):
        search(found, zoo, out, name)
    mixtures(found, zoo, out)
    report = glue(zoo, out / "glued", list(zoo.models))
    found.reports["glue"] = report
    score(found, zoo, out, "honeloom glue", report.path, "glue", report.cost.cpu_seconds)
    clusters = orders(zoo, out)
    for name in others:
        yield zoo, found, clusters
        search(found, zoo, out, name)
    yield zoo, found, clusters


if __name__ == "__main__":
    from zoo_page import write_page

    given = arguments()
    started = time.monotonic()
    for known in measure(given.data, given.out):
        write_page(HERE / "ZOO.md", *known, seconds=time.monotonic() - started)
