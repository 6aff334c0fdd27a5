"""ZOO.md: what was measured of the real zoo."""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "merging"))
import pages

from zoo import DOMAINS, EXPERTS, FAMILIES, FOREIGN, OUTSIDER, Zoo

PAPER = 0.0561


def write_page(path: Path, zoo: Zoo, found: Any, orders: Sequence[Sequence[Sequence[str]]], *, seconds: float) -> None:
    """Write the page, and show it."""
    best = found.best_single()
    lines = [
        "# One model of a real zoo",
        "",
        "Command: `OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/glue/zoo_arms.py`. "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, honeloom "
        f"{version('honeloom')}, torch {version('torch')}; {seconds / 60:.0f} minutes for what was not there yet.",
        "",
        f"Six experts tuned from base6m ({', '.join(EXPERTS)}), `{OUTSIDER}` of the same shape trained from other "
        f"random weights on yes-no questions, and {FOREIGN}, another shape, vocabulary and tokenizer. {len(found.ids)} "
        "report rows of eight domains, which base6m, the experts and every search saw nothing of; bits per character, "
        "lower is better; macro is the plain mean over the domains. Intervals are 95%, of the paired difference on the "
        "same rows.",
        "",
        "## Goals",
        "",
        *pages.goals(_goals(found, orders, best)),
        "## Every arm",
        "",
        *_arms(found, best),
        "",
        *_parts(found, best),
        "",
        "## Searches",
        "",
        *_searches(found),
        "",
        "## Routes of the result",
        "",
        *_routes(found),
        "",
        "## What this does not show",
        "",
        "One small zoo, one tuning of each expert, one seed. Domains are far apart, so routing is easy; experts of one "
        "domain would gain less by mixing and more by merging. The rows that name the best single model are the report "
        "rows themselves, which makes it the hardest rival.",
        "",
    ]
    path.write_text("\n".join(lines))
    print("\n".join(lines))


def _told(gap: Any) -> str:
    return f"{gap.difference:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"


def _arms(found: Any, best: str) -> list[str]:
    ordered = sorted(found.arms, key=found.macro)
    oracle, single = found.oracle(), found.macro(best)
    rows = []
    for name in ordered:
        value = found.macro(name)
        told = "" if name == best else _told(found.gap(name, best))
        closed = (single - value) / (single - oracle)
        rows.append([
            f"**{name}**" if name == "honeloom glue" else name, found.arms[name].kind, f"{value:.4f}",
            f"{1 - value / single:+.1%}", told, f"{closed:.0%}", *(f"{found.domain(name, d):.3f}" for d in DOMAINS),
            f"{found.arms[name].seconds:.0f}",
        ])  # fmt: skip
    members = [name for name, arm in found.arms.items() if arm.kind == "member"]
    lowest = [f"{min(found.domain(name, d) for name in members):.3f}" for d in DOMAINS]
    below = f"{1 - oracle / single:+.1%}"
    rows.append(["(oracle: the best member of each domain)", "", f"{oracle:.4f}", below, "", "100%", *lowest, ""])
    head = ["what", "kind", "macro", "below the best single", f"less {best}", "of the gap closed", *DOMAINS, "CPU s"]
    return pages.table(head, rows)


def _parts(found: Any, best: str) -> Iterable[str]:
    """Which part comes from merging and which from mixing."""
    single, result = found.macro(best), found.macro("honeloom glue")
    merged = min((n for n, a in found.arms.items() if a.kind == "merge, searched"), key=found.macro)
    default = found.macro("coefficient")
    by_merging = (single - default) / (single - result)
    averaged, forced = found.macro("average of the family"), found.macro("average with the outsider")
    yield (
        f"Of the {single - result:.4f} bits per character between the best single model ({best}) and the result, "
        f"merging alone gives {single - default:.4f} ({by_merging:.0%}), mixing members instead of their merge "
        f"{default - result:.4f} more. The lowest merge of all is {merged}, {found.macro(merged):.4f}. Without "
        f"a search the average of the family gives {averaged:.4f}, with the outsider in it {forced:.4f}: what does "
        "not belong together must not be averaged."
    )


def _searches(found: Any) -> list[str]:
    rows = []
    for name, report in found.reports.items():
        for cluster, s in report.details.get("search", {}).items():
            taken = ", ".join(f"{m} {v:.2f}" for m, v in s["shares"].items() if v > 0.005)
            rows.append([name, cluster, str(s["evaluations"]), f"{s['rows_evaluated']:,}", f"{s['value']:.4f}",
                         f"{found.macro(name):.4f}" if name in found.arms else "", taken, s["stopped"]])  # fmt: skip
    head = ["search", "cluster", "merges tried", "rows read", "search rows", "report rows", "shares", "ended"]
    return pages.table(head, rows)


def _routes(found: Any) -> list[str]:
    routes = found.arms["honeloom glue"].routes
    if not routes:
        return ["The result routes no samples."]
    counts = {d: Counter() for d in DOMAINS}
    for row_id, domain in zip(found.ids, found.domains, strict=True):
        counts[domain][routes.get(row_id, "unread")] += 1
    names = sorted({n for c in counts.values() for n in c})
    rows = [[d, *(str(counts[d][n] or "") for n in names)] for d in DOMAINS]
    right, total, worst = _own(found)
    return [
        *pages.table(["rows of", *names], rows), "",
        f"Routed to the member that is best in the row's domain: {right} of {total} rows ({right / total:.1%}). On "
        f"those rows the mixture's bits per character differ from that member's by at most {worst:.2e} (relative, by "
        "domain).",
    ]  # fmt: skip


def _own(found: Any) -> tuple[int, int, float]:
    """Rows whose router is right, all rows, and the largest relative difference by domain on the former."""
    mixture = found.arms["model level, members"]
    members = [n for n, a in found.arms.items() if a.kind == "member"]
    right, worst = 0, 0.0
    for domain in DOMAINS:
        best = min(members, key=lambda n: found.domain(n, domain))
        labelled = zip(found.ids, found.domains, strict=True)
        mine = np.array([d == domain and mixture.routes.get(i) == best for i, d in labelled])
        right += int(mine.sum())
        if mine.any():
            one, other = (found.arms[n].values[mine].sum(axis=0) for n in ("model level, members", best))
            worst = max(worst, abs((one[0] / one[1]) / (other[0] / other[1]) - 1))
    return right, len(found.ids), worst


def _goals(found: Any, orders: Sequence[Sequence[Sequence[str]]], best: str) -> list[pages.Goal]:
    single, result = found.macro(best), found.macro("honeloom glue")
    against = found.gap("honeloom glue", best)
    wanted = sorted(sorted(f) for f in FAMILIES)
    same = all(sorted(sorted(c) for c in order) == wanted for order in orders)
    *_, worst = _own(found)
    raced = found.reports["coefficient"].details["search"]["cluster-1"]
    share = raced["rows_evaluated"] / (raced["evaluations"] * raced["rows"])
    kept = "the search of all rows was not run"
    within = False
    if (full := "coefficient, all rows") in found.arms:
        gap = found.gap("coefficient", full)
        kept, within = f"difference to the search of all rows {_told(gap)}", gap.low <= 0 <= gap.high
    return [
        pages.Goal("clustering finds exactly the planted families, in any input order", f"{len(orders)} orders", same),
        pages.Goal(f"macro at least {PAPER:.2%} below the best single model", f"{1 - result / single:.2%}",
                   1 - result / single >= PAPER),
        pages.Goal("95% interval of the difference excludes 0", _told(against), against.high < 0),
        pages.Goal("where the router is right, every member's value within 1%", f"{worst:.2e}", worst <= 0.01),
        pages.Goal("racing reads at most half of the rows, for a result within its interval", f"{share:.0%}; {kept}",
                   share <= 0.5 and within),
    ]  # fmt: skip
