"""Every merge method on real experts of one small model: held-out losses by domain, intervals, time. Writes EXPERTS.md.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/merging/experts.py [DATA] [--out DIR]

DATA holds models/base6m and instruct/ (default: ../shared/data beside the repository). Experts are tuned on the rows
of three subjects that base6m saw nothing of; rows of which the id's hash lies in [0.8, 1) measure. Tunings, merges and
evaluations are results of their own in DIR, so that an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pages
import pyarrow.parquet as pq

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import honeloom
from honeloom.merging import METHODS
from honeloom.registry import family
from honeloom.stages.rows import place_of
from honeloom.types.report import Report

HERE = Path(__file__).resolve().parent
HELD_OUT = 0.8
LR = 5e-4
RESAMPLES = 2000
LAYERS = 12
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Domain:
    """What an expert is tuned on, how long, and how many rows measure it; without steps it has no expert."""

    sources: tuple[str, ...]
    tested: int
    steps: int = 0
    batch: int = 8


DOMAINS = {
    "math": Domain(("gsm8k",), 60, 80),
    "code": Domain(("codealpaca", "gpteacher-codegen"), 60, 100),
    "medical": Domain(("pubmedqa",), 40, 80, batch=4),
    "general": Domain(("alpaca",), 40),
}
"""base6m was trained on other rows of the last one; of the other three it saw none at all."""
EXPERTS = tuple(name for name, domain in DOMAINS.items() if domain.steps)
TWO = EXPERTS[:2]
SUMMED = ("task_arithmetic", "dare_linear", "dare_ties", "della_linear", "breadcrumbs", "breadcrumbs_ties")
"""Methods that add the task vectors without dividing by the weights."""
SCALE = 0.4
"""For those, a hand choice: usual for task arithmetic where no rows choose it."""


@dataclass(frozen=True)
class Arm:
    """A method, its defaults or a scale, on all experts or on two."""

    method: str
    scale: float | None = None
    two: bool = False

    @property
    def name(self) -> str:
        """In the tables."""
        return f"{self.method}, scale {self.scale:g}" if self.scale is not None else self.method

    @property
    def config(self) -> Any:
        """The class of the method's settings."""
        return family("merging").load_config(self.method)

    @property
    def experts(self) -> tuple[str, ...]:
        """All, or two where the method takes no more."""
        return TWO if self.two or self.config.counts[1] is not None else EXPERTS


PLAIN = {EXPERTS: Arm("linear"), TWO: Arm("linear", two=True)}
"""What the other methods must tell themselves apart from."""
ARMS = (*(Arm(method.name) for method in METHODS), *(Arm(name, SCALE) for name in SUMMED), PLAIN[TWO])


@dataclass(frozen=True)
class Measured:
    """A model on the held-out rows, and the merge it came from.

    Attributes
    ----------
    rows : dict
        By domain, summed losses and scored tokens of the rows, (N, 2), in one order for all models.
    overlap : int
        Rows whose question the model was tuned on.
    merge : Report or None
        What the merge says of itself.
    written : float
        Seconds in which its tensors were computed and written.
    problems : int
        What `honeloom verify` found in the model's folder.
    spent : float
        CPU seconds of the evaluation.
    """

    rows: Mapping[str, Floats]
    overlap: int = 0
    merge: Report | None = None
    written: float = 0.0
    problems: int = 0
    spent: float = 0.0

    def loss(self, domain: str) -> float:
        """Nats per token."""
        total, tokens = self.rows[domain].sum(axis=0)
        return float(total / tokens)

    def macro(self, domains: Sequence[str]) -> float:
        """Mean over domains."""
        return float(np.mean([self.loss(domain) for domain in domains]))


@dataclass(frozen=True)
class Found:
    """All that was measured."""

    base: Measured
    experts: dict[str, Measured]
    tunings: dict[str, Report]
    merges: dict[Arm, Measured] = field(default_factory=dict)

    def best(self, domains: Sequence[str]) -> str:
        """The single expert with the lowest macro loss."""
        return min(domains, key=lambda name: self.experts[name].macro(domains))

    def own(self, domains: Sequence[str]) -> Measured:
        """Every domain as its own expert has it: what one model of all could at best be expected to keep."""
        return Measured({d: self.experts[d].rows[d] for d in domains})

    def ranked(self, domains: Sequence[str]) -> list[tuple[Arm, Measured]]:
        """Merges of exactly these experts, lowest macro loss first."""
        mine = [(arm, merged) for arm, merged in self.merges.items() if arm.experts == tuple(domains)]
        return sorted(mine, key=lambda pair: pair[1].macro(domains))


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Leave a file that is as it should be alone: another process may be reading it."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def prepare(data: Path, out: Path) -> tuple[dict[str, Path], Path]:
    """Write the rows of every expert, and those that measure, in an order that nobody chose."""
    out.mkdir(parents=True, exist_ok=True)
    tuned, tested = {}, list[dict[str, Any]]()
    for name, domain in DOMAINS.items():
        rows = [{**r, "domain": name} for s in domain.sources for r in read(data / "instruct" / f"{s}.jsonl.gz")]
        rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
        tested += [row for row in rows if place_of(row["id"]) >= HELD_OUT][: domain.tested]
        if domain.steps:
            tuned[name] = write(out / f"{name}.jsonl", (row for row in rows if place_of(row["id"]) < HELD_OUT))
    return tuned, write(out / "test.jsonl", tested)


def tune(base: Path, rows: Path, name: str, out: Path) -> Report:
    """An expert: all weights, one learning rate for all."""
    domain = DOMAINS[name]
    report = honeloom.tune(
        base, rows, method="full", lr=LR, schedule="cosine", max_steps=domain.steps, batch_size=domain.batch,
        group_by_length=True, device="cpu", output_dir=out / f"expert-{name}", mode="resume",
    )  # fmt: skip
    print(f"{name}: tuned in {report.cost.cpu_seconds:.0f} CPU s", flush=True)
    return report


def document(arm: Arm, base: Path, folders: Mapping[str, Path], rows: Mapping[str, Path]) -> dict[str, Any]:
    """The merge's configuration.

    Methods that know a start instead of a base begin at the first expert. passthrough takes the lower half of the
    layers from the first expert and the upper half from the second.
    """
    settings = {} if arm.scale is None else {"scale": arm.scale}
    config = arm.config
    common: dict[str, Any] = {"method": {"type": arm.method, **settings}, "dtype": "fp32", "threads": 1}
    names = [str(folders[name]) for name in arm.experts]
    if arm.method == "passthrough":
        half = LAYERS // 2
        parts = zip(names, ([0, half], [half, LAYERS]), strict=True)
        return {**common, "slices": [{"sources": [{"model": m, "layer_range": r}]} for m, r in parts]}
    if config.base == "needed" and config.counts[1] is not None:
        return {**common, "models": names[1:], "base_model": names[0]}
    if config.data:
        measured = zip(names, arm.experts, strict=True)
        return {**common, "models": [{"model": model, "rows": str(rows[name])} for model, name in measured]}
    return {**common, "models": names, **({"base_model": str(base)} if config.base == "needed" else {})}


def merge(arm: Arm, config: dict[str, Any], test: Path, against: Path, out: Path) -> Measured:
    """Merge, verify, evaluate.

    Without rows a merge takes a second or two; it is made once before, so that no kernel is compiled in what is timed.
    """
    folder = out / f"merge-{arm.name.replace(', ', '-').replace(' ', '-')}{'-two' * arm.two}"
    if not (folder.exists() or arm.config.data):
        honeloom.merge(config, out / "untimed", mode="overwrite")
    report = honeloom.merge(config, folder, mode="resume")
    verified = honeloom.verify(folder)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    written = next(event["took"] for event in reversed(events) if event["event"] == "written")
    problems = len(verified.details["problems"])
    found = replace(evaluate(folder, test, against), merge=report, written=written, problems=problems)
    losses = ", ".join(f"{domain} {found.loss(domain):.3f}" for domain in DOMAINS)
    print(f"{arm.name}: {losses}; {report.cost.cpu_seconds:.1f} CPU s", flush=True)
    return found


def evaluate(model: Path, test: Path, against: Path | None, out: Path | None = None) -> Measured:
    """Losses of every row by domain, and how many of the questions the model was tuned on."""
    folder = out or model.with_name(f"scores-{model.name}")
    options: dict[str, Any] = {} if against is None else {"against": against}
    report = honeloom.evaluate(model, rows=test, device="cpu", output_dir=folder, mode="resume", **options)
    table = pq.read_table(folder / "examples.parquet").sort_by("id")
    domains = np.array(table["domain"].to_pylist())
    numbers = np.array([table["loss_sum"].to_pylist(), table["tokens"].to_pylist()], np.float64).T
    rows = {name: numbers[domains == name] for name in DOMAINS}
    return Measured(rows, report.details["overlap"]["rows"], spent=report.cost.cpu_seconds)


def measure(data: Path, out: Path) -> Found:
    """Tune, merge, evaluate: all, or what is not there yet."""
    rows, test = prepare(data, out)
    base, start = data / "models" / "base6m", out / "scores-base"
    scores = evaluate(base, test, None, start)
    tunings = {name: tune(base, rows[name], name, out) for name in EXPERTS}
    folders = {name: report.path for name, report in tunings.items()}
    experts = {name: evaluate(folder, test, start) for name, folder in folders.items()}
    found = Found(scores, experts, tunings)
    for arm in ARMS:
        found.merges[arm] = merge(arm, document(arm, base, folders, rows), test, start, out)
    return found


# statistics


def difference(one: Measured, other: Measured, domains: Sequence[str]) -> tuple[float, float, float]:
    """Macro loss of one less the other's, and its 95% interval: a paired bootstrap over the rows of each domain."""
    draws = np.zeros(RESAMPLES)
    for place, domain in enumerate(domains):
        gap = one.rows[domain][:, 0] - other.rows[domain][:, 0]
        tokens, count = one.rows[domain][:, 1], len(gap)
        picked = np.random.default_rng([0, place]).integers(count, size=(RESAMPLES, count))
        draws += gap[picked].sum(axis=1) / tokens[picked].sum(axis=1) / len(domains)
    low, high = np.quantile(draws, [0.025, 0.975])
    return one.macro(domains) - other.macro(domains), float(low), float(high)


def told(gap: tuple[float, float, float]) -> str:
    """A difference with its interval."""
    return f"{number(gap[0])} [{number(gap[1])}, {number(gap[2])}]"


def number(value: float) -> str:
    """A signed difference; one that three decimals would call 0 has more of them."""
    return f"{value:+.3f}" if abs(value) >= 5e-4 or value == 0 else f"{value:+.1g}"


def beats(one: Measured, other: Measured, domains: Sequence[str]) -> bool:
    """Whether its loss is lower and the interval is without 0."""
    return difference(one, other, domains)[2] < 0


def kept_share(found: Found, merged: Measured, domains: Sequence[str]) -> float:
    """How much of what the experts gained on their own domains is left, in the mean over domains."""
    start = found.base.macro(domains)
    return (start - merged.macro(domains)) / (start - found.own(domains).macro(domains))


# the page


def loss_table(found: Found, domains: Sequence[str]) -> list[str]:
    """Base, experts, then the merges, lowest macro loss first."""
    best = found.experts[found.best(domains)]
    other = [d for d in DOMAINS if d not in domains]

    def line(name: str, model: Measured, *last: str) -> list[str]:
        cells = [name, *(f"{model.loss(d):.3f}" for d in domains), f"{model.macro(domains):.3f}"]
        for rival in (found.base, best):
            cells.append("" if rival is model else told(difference(model, rival, domains)))
        cells.append(f"{kept_share(found, model, domains):.0%}")
        return [*cells, *(f"{model.loss(d):.3f}" if d in model.rows else "" for d in other), *last]

    rows = [line("base6m", found.base, "", "")]
    rows += [line(f"expert: {name}", found.experts[name], "", "") for name in domains]
    rows.append(line("every domain by its own expert", found.own(domains), "", ""))
    for arm, merged in found.ranked(domains):
        assert merged.merge is not None
        rows.append(line(arm.name, merged, f"{merged.written:.2f}", f"{merged.merge.cost.cpu_seconds:.1f}"))
    head = ("model", *domains, "macro", "less base6m", f"less the best expert ({found.best(domains)})", "gain kept",
            *other, "written, s", "all, CPU s")  # fmt: skip
    return pages.table(head, rows)


def expert_table(found: Found) -> list[str]:
    """What the experts are."""
    rows = []
    for name, report in found.tunings.items():
        domain = DOMAINS[name]
        rows.append((name, ", ".join(domain.sources), f"{domain.steps} x {domain.batch}",
                     f"{report.cost.cpu_seconds:.0f}", f"{found.base.loss(name):.3f}",
                     f"{found.experts[name].loss(name):.3f}", str(len(found.base.rows[name]))))  # fmt: skip
    rows.append(("(none)", ", ".join(DOMAINS["general"].sources), "", "", f"{found.base.loss('general'):.3f}", "",
                 str(len(found.base.rows["general"]))))  # fmt: skip
    return pages.table(("expert", "rows of", "steps x rows", "CPU s", "loss of base6m", "of the expert", "held-out "
                        "rows"), rows)  # fmt: skip


def findings(found: Found, domains: Sequence[str]) -> list[str]:
    """Who wins, by how much, and what the rows do not tell apart."""
    ranked, name = found.ranked(domains), found.best(domains)
    (winner, first), rest = ranked[0], ranked[1:]
    plain = found.merges[PLAIN[tuple(domains)]]
    blind = next((arm, m) for arm, m in ranked if arm.scale is None and not arm.config.data)
    equal = [arm.name for arm, merged in rest if not beats(first, merged, domains)]
    better = [f"{arm.name} ({number(merged.macro(domains) - plain.macro(domains))})" for arm, merged in ranked
              if beats(merged, plain, domains)]  # fmt: skip
    ahead = sum(beats(merged, found.experts[name], domains) for _, merged in ranked)
    behind = [arm.name for arm, merged in ranked if merged.macro(domains) >= found.base.macro(domains)]
    forgets = sum(beats(found.base, merged, ["general"]) for _, merged in ranked)
    worst = max(ranked, key=lambda pair: pair[1].loss("general"))
    lines = [
        f"- Lowest macro loss: {winner.name}, {first.macro(domains):.3f}; less the best single expert ({name}) "
        f"{told(difference(first, found.experts[name], domains))}, less linear "
        f"{told(difference(first, plain, domains))}. It keeps {kept_share(found, first, domains):.0%} of what the "
        "experts gained on their own domains.",
        f"- Next: {rest[0][0].name}, {told(difference(rest[0][1], first, domains))} above it. Not told apart from the "
        f"first by these rows: {', '.join(equal) or 'none'}.",
        f"- Lowest at its defaults and without looking at rows: {blind[0].name}, less linear "
        f"{told(difference(blind[1], plain, domains))}.",
        f"- Below linear, interval without 0: {'; '.join(better) or 'none'}.",
        f"- {ahead} of {len(ranked)} merges are below the best single expert, interval without 0. Not below base6m: "
        f"{', '.join(behind) or 'none'}.",
        f"- general, which no expert was tuned on: {forgets} of {len(ranked)} merges are above base6m, interval "
        f"without 0; most of all {worst[0].name}, {told(difference(worst[1], found.base, ['general']))}.",
    ]
    for arm, merged in ranked:
        if arm.scale is not None:
            gap = difference(merged, found.merges[Arm(arm.method)], domains)
            lines.append(f"- {arm.name}, less the same at its default of 1: {told(gap)}.")
    return lines


def goals(found: Found) -> list[pages.Goal]:
    """What a merging tool must do here."""
    names = {arm.method for arm in found.merges}
    bad = [arm.name for arm, m in found.merges.items()
           if m.problems or m.merge is None or not all(check.passed for check in m.merge.verification)]  # fmt: skip
    lines = [
        pages.Goal("every method merges, each result's own checks hold, and `honeloom verify` finds nothing",
                   f"{len(names)} methods, {len(found.merges)} merges; failing: {', '.join(bad) or 'none'}",
                   not bad and names == {method.name for method in METHODS}),
    ]  # fmt: skip
    for domains in (EXPERTS, TWO):
        arm, merged = found.ranked(domains)[0]
        gap = difference(merged, found.experts[found.best(domains)], domains)
        lines.append(pages.Goal(f"{' and '.join(domains)}: the best merge is below the best single expert, interval "
                                "without 0", f"{arm.name}, {told(gap)}", gap[2] < 0))  # fmt: skip
    return lines


def figure(found: Found, path: Path) -> None:
    """Macro loss of every merge beside base and experts, three experts above, two below."""
    groups = (EXPERTS, TWO)
    heights = [len(found.ranked(domains)) + 1.5 for domains in groups]
    drawn, panels = plt.subplots(2, 1, figsize=(8, 0.24 * sum(heights) + 1.6), height_ratios=heights)
    for panel, domains in zip(panels, groups, strict=True):
        ranked, best = found.ranked(domains), found.experts[found.best(domains)]
        gaps = np.array([difference(merged, best, domains) for _, merged in ranked]) + best.macro(domains)
        colours = ["tab:orange" if arm.scale is not None else "tab:blue" for arm, _ in ranked]
        places = np.arange(len(ranked))
        panel.hlines(places, gaps[:, 1], gaps[:, 2], color=colours, lw=1.5)
        panel.scatter(gaps[:, 0], places, color=colours, s=18, zorder=3)
        marks = (("base6m", found.base.macro(domains), "tab:gray", "--"),
                 ("best single expert", best.macro(domains), "black", "-"),
                 ("every domain by its own expert", found.own(domains).macro(domains), "tab:green", ":"))  # fmt: skip
        for label, place, colour, style in marks:
            panel.axvline(place, color=colour, ls=style, lw=1.2, label=label)
        panel.set_yticks(places, [arm.name for arm, _ in ranked], fontsize=8)
        panel.set_ylim(len(ranked) - 0.3, -0.7)
        panel.set_title(f"{', '.join(domains)}: {len(domains)} experts", fontsize=10, loc="left")
        panel.set_xlabel("macro held-out loss, nats per token", fontsize=9)
        panel.grid(axis="x", alpha=0.3)
    panels[0].legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.08, 0.02))
    drawn.tight_layout()
    drawn.savefig(path, dpi=130)
    plt.close(drawn)


def spent(found: Found) -> float:
    """CPU minutes of tunings, merges and evaluations."""
    models = [found.base, *found.experts.values(), *found.merges.values()]
    reports = [*found.tunings.values(), *(model.merge for model in models if model.merge is not None)]
    return (sum(report.cost.cpu_seconds for report in reports) + sum(model.spent for model in models)) / 60


def page(found: Found) -> list[str]:
    """The result as Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("honeloom", "torch", "transformers"))
    overlap = max(m.overlap for m in (*found.experts.values(), *found.merges.values()))
    table, said = partial(loss_table, found), partial(findings, found)
    return [
        "# Every merge method on real experts", "",
        "Command: `OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/merging/experts.py`. "
        f"{platform.machine()}, Python {platform.python_version()}, {versions}. Tunings, merges and "
        f"evaluations took {spent(found):.0f} CPU minutes.", "",
        "base6m is a Llama of 5.7 million parameters. Its experts are tuned with all weights (AdamW, learning rate "
        f"{LR:g}, cosine) on sources that it saw nothing of, on the rows whose id's hash lies in [0, {HELD_OUT}). Rows "
        f"in [{HELD_OUT}, 1) measure: loss of the answers in nats per token. {overlap or 'None'} of them ask a "
        "question that a model was tuned on, by the overlap guard of `evaluate`. fisher and regmean measure each "
        "expert on rows of its tuning. Nothing was searched: methods have their defaults, weights are 1. Merges are "
        "written in float32 by one thread.", "",
        *expert_table(found), "",
        "Methods that do not divide by the weights add every task vector in full by default, which is much for three. "
        f"They were merged at a scale of {SCALE} as well, a hand choice that is usual for task arithmetic where no "
        "rows choose it.", "",
        "## Three experts", "",
        "macro is the mean over the three domains. Differences are of macro losses on the same rows, with the 95% "
        f"interval of a paired bootstrap over the rows of each domain ({RESAMPLES:,} resamples). \"gain kept\" is the "
        "part of what the experts gained on their own domains, in the mean. general are rows of a source that base6m "
        "knows and no expert was tuned on. \"written\" is the time to compute and write the tensors on a shared "
        "machine; \"all\" includes what is measured on rows, and the checks.", "",
        *table(EXPERTS), "", *said(EXPERTS), "",
        "![macro loss of every method](experts.png)", "",
        "The points are macro losses, the bars the interval of the difference to the best single expert; orange is "
        f"scale {SCALE}.", "",
        "## Two experts", "",
        f"Methods that take two models at most, and linear, on {TWO[0]} and {TWO[1]}; macro is over these two. "
        f"nearswap and arcee_fusion start at {TWO[0]}; slerp has t 0.5; passthrough stacks layers 0 to "
        f"{LAYERS // 2 - 1} of {TWO[0]} and {LAYERS // 2} to {LAYERS - 1} of {TWO[1]}.", "",
        *table(TWO), "", *said(TWO), "",
        "## Goals", "", *pages.goals(goals(found)),
        "## What this does not show", "",
        "One small model, one tuning of each expert, one seed of the random methods. The first of many merges is named "
        "by the rows that measure it, so its lead is somewhat flattered; the intervals are of rows, not of tunings. "
        "Settings that suit these experts may rank the methods otherwise.", "",
    ]  # fmt: skip


def main() -> None:
    """Measure, and write EXPERTS.md and its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "experts")
    given = parser.parse_args()
    found = measure(given.data, given.out)
    figure(found, HERE / "experts.png")
    pages.write("EXPERTS.md", page(found))


if __name__ == "__main__":
    main()
