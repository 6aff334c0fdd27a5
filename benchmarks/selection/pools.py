"""The ten contrastive pools of the DaaR paper on two models: which band of diversity teaches most?

Usage: OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/selection/pools.py [DATA] [--out DIR]

DATA holds models/base6m and instruct/ (default: ../shared/data beside the repository). Domains are found, not given.
What the pools, tests and tunings are stands in tunings.py; choices and tunings are shared with daar.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tunings import (
    Losses,
    Setting,
    Trial,
    choose,
    interval,
    macros,
    measure,
    random_rows,
    report_of,
    selected,
    settings,
    usable,
)

HERE = Path(__file__).resolve().parent
SEEDS = range(5)
AXES = ("inter", "intra")
BANDS = tuple(f"{low}-{low + 20}" for low in range(0, 100, 20))
EARLY: dict[str, Any] = {"embedding": {"type": "hidden", "depth": 0.1}}
"""Where domains are found: near the input, as the paper looks for them, and not at the deeper default."""
TOP: dict[str, Any] = {"type": "daar", "choice": "top", "depth": 0.1, **EARLY}
POOLS = tuple(f"{axis} {band}" for axis in AXES for band in BANDS)


def trials_of(setting: Setting, out: Path) -> tuple[list[Trial], dict[str, Any]]:
    """The ten pools, a fifth drawn evenly, and DaaR's; and what the domains are."""
    folders = [
        choose(setting, out, {"type": "band", "axis": axis, "band": band, **EARLY}) for axis in AXES for band in BANDS
    ]
    pools = dict(zip(POOLS, map(selected, folders), strict=True))
    ids, count = usable(folders[0]), len(pools[POOLS[0]])
    domains = report_of(folders[0])["details"]["domains"]
    trials = []
    for seed in SEEDS:
        trials += [
            Trial("random", seed, random_rows(ids, count, seed)),
            Trial("daar", seed, selected(choose(setting, out, TOP, seed))),
            *(Trial(name, seed, rows) for name, rows in pools.items()),
        ]
    return trials, {"rows": len(ids), "kept": count, "domains": len(domains)}


def error(runs: Sequence[Losses]) -> float:
    """Standard error of the mean macro loss over the seeds."""
    return float(macros(runs).std(ddof=1) / len(runs) ** 0.5)


def beside(ours: Sequence[Losses], other: Sequence[Losses]) -> str:
    """Mean paired difference with its 95% interval, as a share of the other's loss."""
    middle, half = interval(macros(ours) - macros(other))
    scale = float(macros(other).mean())
    return f"{middle / scale:+.2%} ± {half / scale:.2%}"


def table(arms: dict[str, list[Losses]]) -> list[str]:
    lines = ["| rows | macro loss | standard error | less random | less DaaR |", "|---|---|---|---|---|"]
    for arm in (*POOLS, "random", "daar"):
        cells = ["" if arm == other else beside(arms[arm], arms[other]) for other in ("random", "daar")]
        lines.append(f"| {arm} | {macros(arms[arm]).mean():.4f} | {error(arms[arm]):.4f} | {' | '.join(cells)} |")
    return lines


def verdict(name: str, arms: dict[str, list[Losses]]) -> str:
    """Which pool wins, and whether it is told from the second, random and DaaR."""
    order = sorted(POOLS, key=lambda pool: float(macros(arms[pool]).mean()))
    best, second = order[:2]
    wins = [POOLS[int(np.argmin([macros(arms[pool])[seed] for pool in POOLS]))] for seed in range(len(SEEDS))]
    return (
        f"- {name}: **{best}** wins ({wins.count(best)} of {len(SEEDS)} seeds); less the second, {second}: "
        f"{beside(arms[best], arms[second])}; less random: {beside(arms[best], arms['random'])}; less DaaR: "
        f"{beside(arms[best], arms['daar'])}. The worst is {order[-1]}."
    )


def write_page(found: dict[str, dict[str, list[Losses]]], sizes: dict[str, dict[str, Any]], minutes: float) -> None:
    """Write POOLS.md."""
    text = [
        "# The ten contrastive pools on two models",
        "",
        "Command: `OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/selection/pools.py`; "
        f"{minutes:.0f} CPU minutes of tunings in two processes. DaaR beside its rivals stands in "
        "[DAAR.md](DAAR.md), which also says what is tuned and scored.",
        "",
        "A pool holds a fifth of every domain. inter sorts a domain's rows by closeness to the other domains' "
        "centroids, 0-20 the farthest; intra by closeness to their own, 0-20 the closest. Domains are clusters of the "
        "model's states at depth 0.1, their number found; DaaR takes the highest entropies. "
        f"Means over {len(SEEDS)} seeds (adapters and order; random and DaaR "
        "choose anew); differences are paired, with 95% intervals, as shares of the other's loss.",
        "",
        "Which band wins:",
        "",
        *(verdict(name, arms) for name, arms in found.items()),
        "",
        "The winner is the best of ten on the test that it is judged by, so its leads over random and DaaR flatter it; "
        "where the interval beside the second holds 0, the two are not told apart. Pools are cut once, with seed 0.",
        "",
    ]
    for name, arms in found.items():
        size = sizes[name]
        text += [f"## {name}", "", f"{size['kept']:,} of {size['rows']:,} rows, {size['domains']} domains.", ""]
        text += [*table(arms), ""]
    (HERE / "POOLS.md").write_text("\n".join(text), encoding="utf-8")


def main() -> None:
    """Measure, and write POOLS.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "daar")
    arguments = parser.parse_args()
    found, sizes, seconds = {}, {}, 0.0
    for name, setting in settings(arguments.data, arguments.out).items():
        trials, sizes[name] = trials_of(setting, arguments.out)
        found[name], more = measure(setting, trials, arguments.out)
        seconds += more
    write_page(found, sizes, seconds / 60)


if __name__ == "__main__":
    main()
