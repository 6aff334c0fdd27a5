"""Rounds of federated tuning: what each rule makes of clients of unequal ranks, beside one client that has all rows.

Usage: OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/federated/rounds.py [DATA] [--out DIR]

DATA holds models/base6m and instruct/ (default: ../shared/data beside the repository). Every run is one call of
`honeloom.federate` and one of `honeloom.evaluate`; a finished run is one small file in DIR, so that an interrupted
benchmark goes on. Learning rates are chosen on a seed and on rows that nothing else uses. Writes ROUNDS.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import honeloom
from honeloom import lab

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "selection"))

from tunings import UNSEEN, interval, real_rows, write  # noqa: E402

Options = dict[str, Any]
RANKS = (64, 32, 16, 16, 8, 8, 4, 4)
SEEDS, CHOICE_SEED = (0, 1, 2), 100
CHOICE_ROWS = 8
WIDEST = (2.5e-4, 6.4e-2)
"""How far rates are sought where the best one is at an end of those tried."""

STEPS = {"rounds": 3, "local_steps": 10}
MIXED: dict[str, Options] = {
    "svd": {"aggregation": "svd", "ranks": RANKS},
    "flora": {"aggregation": "flora", "ranks": RANKS},
    "zero_pad": {"aggregation": "zero_pad", "ranks": RANKS},
    "fedit": {"aggregation": "fedit", "ranks": 16},
}
EVEN: dict[str, Options] = {
    rule: {"aggregation": rule, "ranks": 16} for rule in ("svd", "flora", "fedit", "fedex", "ffa", "rolora")
}
SAME_RATE = "flora"
"""Takes the rate of svd; all others choose their own."""
POOLED: Options = {"partition": {"type": "iid", "n": 1}, "rounds": 1, "aggregation": "svd"}
CENTRAL: dict[str, Options] = {
    name: {**POOLED, "local_steps": times * STEPS["rounds"] * STEPS["local_steps"]}
    for name, times in (("same steps", 1), ("same samples", len(RANKS)))
}
"""One client with all rows: as many steps as one client made, and as many as all made together."""
CENTRAL_RANKS = (16, 64)
WORLDS = ("base6m", "lab")
SHORT: Options = {"local_steps": 3, "participation": 0.5, "ranks": RANKS}
MANY: dict[str, Options] = {
    "svd, warm": {**SHORT, "aggregation": "svd"},
    "svd, reset": {**SHORT, "aggregation": "svd", "start": "reset"},
    "ffa": {**SHORT, "aggregation": "ffa"},
}
SECONDS: dict[str, float] = {}
"""CPU time of every run that the page is made of."""
MARKS, OWN_MARKS, CHOICE_MARK, MANY_SEEDS = (10, 100), (10, 30, 100), 10, (0,)


@dataclass(frozen=True)
class World:
    """A model, rows of the clients, rows by which rates are chosen, rows that judge, and the place of finished runs."""

    name: str
    model: str
    pool: Path
    choice: Path
    test: Path
    local: Options
    rates: tuple[float, ...]
    out: Path


def base6m(data: Path, out: Path) -> World:
    """Rows of mixed_demo that base6m never saw; no row is in two files."""
    rows, test = real_rows(data)
    choice: list[dict[str, Any]] = []
    for domain in sorted({row["domain"] for row in rows}):
        mine = [row for row in rows if row["domain"] == domain]
        choice += sorted(mine, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())[:CHOICE_ROWS]
    taken = {row["id"] for row in choice}
    return World(
        "base6m", str(data / "models" / "base6m"),
        write(out / "rounds-pool.jsonl", [row for row in rows if row["id"] not in taken]),
        write(out / "rounds-choice.jsonl", choice), write(out / "rounds-test.jsonl", test),
        {**STEPS, "partition": {"type": "domain", "n": len(RANKS)}, "batch_size": 4, "max_length": 96,
         "split": UNSEEN}, (1e-3, 5e-4, 2e-3), out,
    )  # fmt: skip


def of_the_lab(out: Path) -> World:
    """Right rows of the lab's pool, one of its eight domains to a client; the test asks what was taught, and not."""
    truth = lab.truth("pool")
    rows = [
        {**row, "domain": truth[row["id"]]["domain"].rstrip("+")}
        for row in lab.rows("pool")
        if not (truth[row["id"]]["wrong"] or truth[row["id"]]["duplicate_of"] or truth[row["id"]]["between"])
    ]
    return World(
        "lab", "lab:base", write(out / "rounds-lab-pool.jsonl", rows),
        write(out / "rounds-lab-choice.jsonl", map(dict, lab.rows("dev"))),
        write(out / "rounds-lab-test.jsonl", map(dict, lab.rows("test"))),
        {**STEPS, "partition": {"type": "domain", "n": len(RANKS)}, "batch_size": 8, "max_length": 96},
        (4e-3, 2e-3, 8e-3), out,
    )  # fmt: skip


def settled(world: World, options: Options, lr: float, seed: int) -> Options:
    """All settings of a run; the seed also deals out mixed ranks, for who has which domain follows from sizes."""
    found = {**world.local, **options, "lr": lr, "seed": seed, "device": "cpu"}
    if not isinstance(found["ranks"], int):
        found["ranks"] = [int(r) for r in np.random.default_rng(seed).permutation(found["ranks"])]
    return found


def losses_of(world: World, model: str, rows: Path) -> dict[str, Any]:
    """Loss in nats per token and rows that were scored, by domain."""
    report = honeloom.evaluate(
        model, rows=str(rows), max_length=world.local["max_length"], batch_size=16, device="cpu"
    )  # fmt: skip
    domains = {json.loads(line)["domain"] for line in rows.read_text().splitlines()}
    found = {m.domain: m for m in report.metrics if m.name == "loss" and m.domain in domains}
    return {"losses": {d: m.value for d, m in found.items()}, "rows": {d: m.n for d, m in found.items()}}


def measured(world: World, options: Options, lr: float, seed: int, rows: Path) -> dict[str, Any]:
    """What one run came to, made once."""
    run = settled(world, options, lr, seed)
    text = json.dumps([run, _digest(world.pool), _digest(rows)], sort_keys=True)
    name = f"rounds-{options['aggregation']}-{seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    path = world.out / f"{name}.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        SECONDS[name] = kept["seconds"]
        return kept
    begun, folder = time.process_time(), world.out / name
    honeloom.federate(world.model, rows=str(world.pool), output_dir=folder, mode="resume", **run)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    found = {
        "settings": run, **losses_of(world, str(folder), rows), "rounds": [summary(line) for line in lines],
        "seconds": time.process_time() - begun,
    }  # fmt: skip
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(path)
    shutil.rmtree(folder)
    SECONDS[name] = found["seconds"]
    print(world.name, name, f"lr {lr:g}: {macro(found):.4f}, {found['seconds']:.0f} s", flush=True)
    return found


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of a line of rounds.jsonl: losses of clients on their own rows, weighted by rows; error; mean bytes."""
    ok = [client for client in record["clients"] if client["status"] == "ok"]
    rows = sum(client["rows"] for client in ok)
    return {
        "round": record["round"], "asked": len(record["clients"]), "ok": len(ok), "error": record["error"],
        "rank": record["rank"],
        **{key: sum(c[key] * c["rows"] for c in ok) / rows for key in ("loss_before", "loss_after")},
        **{key: sum(c[key] for c in ok) / len(ok) for key in ("bytes_up", "bytes_down")},
        "norms": {c["id"]: c["norm"] for c in ok},
    }  # fmt: skip


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def macro(run: Mapping[str, Any]) -> float:
    """Mean over domains of the loss on held-out rows."""
    return float(np.mean(list(run["losses"].values())))


def chosen_rate(world: World, options: Options) -> list[tuple[float, float]]:
    """(rate, loss on the rows of the choice), best first; further rates are tried while the best is at an end."""
    found: dict[float, float] = {}
    wanted = list(world.rates)
    while wanted:
        for lr in wanted:
            found[lr] = macro(measured(world, options, lr, CHOICE_SEED, world.choice))
        best = min(found, key=lambda lr: found[lr])
        step = {min(found): best / 2, max(found): best * 2}.get(best)
        wanted = [step] if step is not None and WIDEST[0] <= step <= WIDEST[1] else []
    return sorted(found.items(), key=lambda pair: pair[1])


def arm(world: World, options: Options, lr: float | None = None, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Choose a rate unless one is given, then run every seed with it."""
    rates = chosen_rate(world, options) if lr is None else []
    lr = rates[0][0] if lr is None else lr
    return {"lr": lr, "rates": rates, "runs": [measured(world, options, lr, seed, world.test) for seed in seeds]}


def table(world: World, rules: Mapping[str, Options]) -> dict[str, Any]:
    """Every rule of a table; the others begin with svd's rate, its half and its double, and flora takes it."""
    found = {"svd": arm(world, rules["svd"])}
    lr = found["svd"]["lr"]
    near = around(world, lr)
    for name, options in rules.items():
        if name != "svd":
            found[name] = arm(near, options, lr if name == SAME_RATE else None)
    return found


def around(world: World, lr: float) -> World:
    """The same with rates about one."""
    return replace(world, rates=(lr, lr / 2, lr * 2))


def central(world: World) -> dict[str, Any]:
    """Pooled runs; the rank is chosen like a rate, by the shorter run."""
    tried = {rank: chosen_rate(world, {**CENTRAL["same steps"], "ranks": rank}) for rank in CENTRAL_RANKS}
    rank = min(tried, key=lambda r: tried[r][0][1])
    arms = {name: arm(world, {**options, "ranks": rank}) for name, options in CENTRAL.items()}
    return {"rank": rank, "tried": tried, **arms}


def many(world: World) -> dict[str, Any]:
    """Short rounds: rates chosen after a few rounds, then a run to every mark; the shorter is the longer's start."""
    found = {}
    for name, options in MANY.items():
        rates = chosen_rate(world, {**options, "rounds": CHOICE_MARK})
        runs = {
            mark: [measured(world, {**options, "rounds": mark}, rates[0][0], seed, world.test) for seed in MANY_SEEDS]
            for mark in MARKS
        }
        found[name] = {"lr": rates[0][0], "rates": rates, "runs": runs}
    return found


# the page

HEAD = """\
Command: `OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/federated/rounds.py`; {minutes:.0f} CPU minutes
of runs, {machine}, 1 thread of a shared machine, fp32; Python {python}, torch {torch}.

Eight clients, rows split by domain, 3 rounds of 10 AdamW steps, adapters on every linear layer, three seeds: of the
order of rows, of first weights, and of who has which rank (who has which domain follows from their sizes). Loss is in
nats per token on held-out rows that no client has, the mean over domains: lower is better. Differences are of paired
seeds, as shares of the other's loss, with 95% intervals (Student's t, three seeds: wide). A rule beats another if it is
lower in the mean and in most seeds; other goals go by the mean. The interval says how sure that is."""
ON_BASE6M = """\
Rows of mixed_demo that base6m never saw, batches of 4, at most 96 tokens; {test} test rows fit. **There is little to
learn here**: base6m was trained on other rows of most of these sources. Tuning on all rows moves the loss by a few
percent, 3% is as much as all of it, and a difference between rules cannot be large. Hence the lab beside it."""
ON_LAB = """\
`lab:base` on the right rows of `lab:pool`, one domain to a client, batches of 8; the test is `lab:test`, sixteen
labels, half of them of questions the model was never taught. Here there is much to learn."""
OWN_TEXT = """\
New to it: the mean over domains that are new to the model, math and code to base6m (their main sources were left out of
its training), the untaught labels to the lab's.
Own rows: loss on 16 rows of every client, weighted by rows: of what it was sent in round 1 and in the last round, and
after its own steps there. Error: of the aggregate to the weighted sum of updates, over all modules, mean of the rounds.
Bytes: mean of the clients, of whole messages."""
ON_EVEN = "As above with rank 16 for every client."
ON_MANY = """\
Ranks 64 to 4, half of the clients in a round, {rounds} rounds of 3 steps, one seed. Warm goes on from the aggregate,
reset begins anew beside it; both aggregate by svd at rank 64. Own rows: what clients were sent, mean of five rounds."""
ON_RATES = """\
Chosen for every run on a fourth seed (other order, other first weights, other owners of the ranks) and on rows that
neither train nor test: base6m {choice} rows of every domain of mixed_demo, lab `lab:dev`. Three rates, about svd's for
the other rules, and further ones by factors of 2 while the best was at an end, from {least:g} to {most:g}. flora takes
svd's rate; short rounds are judged after {mark} of them. The centralised rank is chosen the same way, by the shorter
run."""
CAUSES = """\
What goes with these figures; what no table holds was measured aside.

- base6m does not tell the rules apart. It knows most of these sources: one pooled client of 240 steps takes 2% off its
  loss, the rules half of that, and the seeds move it as much. On the two domains that are new to it the order is the
  lab's: fedit, svd, flora, zero_pad. On the other sixteen zero_pad is 0.002 below svd, which seven test rows of
  closed_qa and evol-instruct make. At svd's rate, 0.002, zero_pad is 0.8% above svd on the rows of the choice; at twice
  that rate it comes level. flora is at the rate that suits it: 2.793 there, 2.795 at half of it.
- Exact does not mean better. Where factors are averaged apart, updates shrink, and clients bear twice the rate: fedit
  at rank 16 is ahead of every rule on mixed ranks, and level with svd and fedex on equal ones. At one rate, 0.008, the
  order on mixed ranks is svd, fedit, zero_pad (rows of the choice). With svd and flora the client of rank 64 bounds
  the rate of all: at 0.016 svd loses its way on mixed ranks (3.06) and not at rank 16 (1.27).
- Splits by domain leave a gap to pooled rows that no rule closes in three rounds: twice the loss in the lab at as many
  samples.
- The pooled run of few steps ends noisy, for its rate does not fall: its seeds are 0.3 apart in the lab, and an average
  of eight clients is spared that. Being below it is no proof that splitting rows costs nothing.
- flora's stack is wider than the lab's matrices (152 columns, 96 rows): what it sends is more than the update needs.
"""


def values(runs: Sequence[Mapping[str, Any]]) -> np.ndarray[Any, Any]:
    return np.array([macro(run) for run in runs])


def paired(ours: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> str:
    """Difference over paired seeds as a share of the other's loss, with its 95% interval."""
    gaps, scale = values(ours) - values(other), float(values(other).mean())
    middle, half = interval(gaps)
    return f"{middle / scale:+.1%} ± {half / scale:.1%}, lower in {int((gaps < 0).sum())} of {len(gaps)}"


def gap(ours: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> float:
    return float((values(ours) - values(other)).mean() / values(other).mean())


def new_to_it(run: Mapping[str, Any]) -> float:
    """Mean over the domains that are new to the model: math and code to base6m, untaught questions to the lab's."""
    return float(np.mean([v for d, v in run["losses"].items() if d in ("math", "code") or d.endswith("+")]))


def spread(runs: Sequence[Mapping[str, Any]]) -> str:
    """Mean and the losses of the seeds."""
    each = ", ".join(f"{v:.3f}" for v in values(runs))
    return f"{values(runs).mean():.3f} ({each})"


def mean_of(runs: Sequence[Mapping[str, Any]], key: str, rounds: slice = slice(None)) -> float:
    """Of a figure of rounds.jsonl, over rounds and seeds."""
    return float(np.mean([line[key] for run in runs for line in run["rounds"][rounds]]))


def cells(found: Mapping[str, Any]) -> str:
    """Own rows of the clients, error and bytes."""
    runs, first, last = found["runs"], slice(0, 1), slice(-1, None)
    down = [mean_of(runs, "bytes_down", part) / 1e3 for part in (first, last)]
    return (
        f"{mean_of(runs, 'loss_before', first):.3f} | {mean_of(runs, 'loss_before', last):.3f} | "
        f"{mean_of(runs, 'loss_after', last):.3f} | {mean_of(runs, 'error'):.1e} | "
        f"{mean_of(runs, 'bytes_up') / 1e3:,.0f} | {down[0]:,.0f} | {down[1]:,.0f}"
    )


OWN = "own rows, round 1 | last round | after its steps | error | up, kB | down, round 1, kB | last round, kB"


def rule_table(rules: Mapping[str, Any], against: Mapping[str, Any]) -> list[str]:
    """One line per rule."""
    heads = " | ".join(f"less {name}" for name in against)
    lines = [f"| rule | lr | held-out loss (seeds) | new to it | {heads} | {OWN} |", "|---" * (11 + len(against)) + "|"]
    for name, found in rules.items():
        gaps = (
            "" if found["runs"] == other["runs"] else paired(found["runs"], other["runs"]) for other in against.values()
        )
        new = float(np.mean([new_to_it(run) for run in found["runs"]]))
        told = [name, f"{found['lr']:g}", spread(found["runs"]), f"{new:.3f}", *gaps, cells(found)]
        lines.append(f"| {' | '.join(told)} |")
    return lines


def central_table(found: Mapping[str, Any]) -> list[str]:
    """The base and the pooled runs."""
    base = found["base"]
    lines = ["| one client with all rows | lr | held-out loss (seeds) | new to it |", "|---|---|---|---|"]
    lines.append(f"| the base, not tuned |  | {macro(base):.3f} | {new_to_it(base):.3f} |")
    for name in CENTRAL:
        runs = found["central"][name]
        new = float(np.mean([new_to_it(run) for run in runs["runs"]]))
        lines.append(
            f"| {name}: {CENTRAL[name]['local_steps']} steps, rank {found['central']['rank']} | {runs['lr']:g} | "
            f"{spread(runs['runs'])} | {new:.3f} |"
        )
    return lines


def world_section(name: str, found: Mapping[str, Any], text: str) -> list[str]:
    """Tables of one model with clients of mixed ranks."""
    against = {
        "zero_pad": found["mixed"]["zero_pad"],
        **{f"centralised, {key}": found["central"][key] for key in CENTRAL},
    }
    return [
        f"## {name}, ranks {', '.join(map(str, RANKS))}", "", text, "", *central_table(found), "",
        *rule_table(found["mixed"], against), "",
    ]  # fmt: skip


def many_table(found: Mapping[str, Any]) -> list[str]:
    """Held-out loss after every mark, and how what clients were sent about then did on their own rows."""
    heads = " | ".join([f"held-out, {m} rounds" for m in MARKS] + [f"own rows, about round {m}" for m in OWN_MARKS])
    lines = [f"| rule | lr | {heads} | error | up, kB | down, last round, kB |"]
    lines.append("|---" * (5 + len(MARKS) + len(OWN_MARKS)) + "|")
    for name, line in found.items():
        held = [f"{values(line['runs'][mark]).mean():.3f}" for mark in MARKS]
        longest = line["runs"][MARKS[-1]]
        own = [f"{mean_of(longest, 'loss_before', slice(mark - 5, mark)):.3f}" for mark in OWN_MARKS]
        sent = [mean_of(longest, "bytes_up") / 1e3, mean_of(longest, "bytes_down", slice(-1, None)) / 1e3]
        figures = [*held, *own, f"{mean_of(longest, 'error'):.1e}", *(f"{kb:,.0f}" for kb in sent)]
        lines.append(f"| {name} | {line['lr']:g} | {' | '.join(figures)} |")
    return lines


def rates_table(found: Mapping[str, Any]) -> list[str]:
    """What every rate came to on the rows of the choice."""
    arms: dict[str, Any] = {}
    for world in WORLDS:
        arms |= {f"{world}, same steps, rank {r}": t for r, t in found[world]["central"]["tried"].items()}
        arms[f"{world}, same samples"] = found[world]["central"]["same samples"]["rates"]
        arms |= {f"{world}, mixed ranks, {name}": a["rates"] for name, a in found[world]["mixed"].items()}
    arms |= {f"lab, rank 16, {name}": a["rates"] for name, a in found["even"].items() if name != "fedit"}
    arms |= {f"lab, {CHOICE_MARK} short rounds, {name}": a["rates"] for name, a in found["many"].items()}
    told = ((name, ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in rates)) for name, rates in arms.items() if rates)
    return ["| run | rate: loss, best first |", "|---|---|", *(f"| {name} | {text} |" for name, text in told)]


def bars(found: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """(goal, figure, reached)."""
    reached = []
    for world in WORLDS:
        rules, pooled = found[world]["mixed"], found[world]["central"]["same steps"]["runs"]
        for rule in ("flora", "svd"):
            ours, other = rules[rule]["runs"], rules["zero_pad"]["runs"]
            lower = int((values(ours) < values(other)).sum())
            met = gap(ours, other) < 0 and 2 * lower > len(ours)
            reached.append((f"{world}: {rule} beats zero_pad", paired(ours, other), met))
        ours = rules["svd"]["runs"]
        claim = f"{world}: svd (warm) at most 3% above one client with all rows and as many steps as one client's"
        reached.append((claim, paired(ours, pooled), gap(ours, pooled) <= 0.03))
    even = {name: line["runs"] for name, line in found["even"].items()}
    if even:
        claim = "lab, rank 16 for all: fedit within 3% of svd, as expected"
        reached.append((claim, paired(even["fedit"], even["svd"]), abs(gap(even["fedit"], even["svd"])) <= 0.03))
    return reached


def write_page(found: Mapping[str, Any]) -> bool:
    """Write ROUNDS.md; return whether every goal was reached."""
    reached = bars(found)
    missed = [f"- {claim}: {figure}." for claim, figure, met in reached if not met]
    even, short = found["even"], found["many"]
    minutes = sum(SECONDS.values()) / 60
    head = HEAD.format(
        minutes=minutes, machine=platform.machine(), python=platform.python_version(), torch=torch.__version__
    )
    on_base6m = ON_BASE6M.format(test=sum(found["base6m"]["base"]["rows"].values()))
    on_rates = ON_RATES.format(choice=CHOICE_ROWS, mark=CHOICE_MARK, least=WIDEST[0], most=WIDEST[1])
    text = [
        "# Rounds", "", head, "", "| goal | reached | |", "|---|---|---|",
        *(f"| {claim} | {figure} | {'yes' if met else '**no**'} |" for claim, figure, met in reached), "",
        OWN_TEXT, "",
        *world_section("base6m", found["base6m"], on_base6m), *world_section("lab", found["lab"], ON_LAB),
        "## lab, rank 16 for all", "", ON_EVEN, "",
        *(rule_table(even, {"fedit": even["fedit"]}) if even else ["Not run."]), "",
        "## lab, many short rounds", "", ON_MANY.format(rounds=MARKS[-1]), "",
        *(many_table(short) if short else ["Not run."]), "",
        "## Learning rates", "", on_rates, "", *rates_table(found), "",
        "## Not reached", "", *(missed or ["Nothing."]), "", CAUSES,
    ]  # fmt: skip
    (HERE / "ROUNDS.md").write_text("\n".join(text), encoding="utf-8")
    return not missed


def main() -> None:
    """Run what is not there yet, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--without", default="", help="what to leave out: many, even")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    real, small = base6m(arguments.data, arguments.out), of_the_lab(arguments.out)
    found: dict[str, Any] = {
        world.name: {
            "base": losses_of(world, world.model, world.test),
            "central": central(world),
            "mixed": table(world, MIXED),
        }
        for world in (small, real)
    }
    small = around(small, found["lab"]["mixed"]["svd"]["lr"])
    found["even"] = {} if "even" in arguments.without else table(small, EVEN)
    found["many"] = {} if "many" in arguments.without else many(small)
    sys.exit(not write_page(found))


if __name__ == "__main__":
    main()
