"""`evaluate`: per-domain numbers with standard errors, and a paired comparison."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from honeloom.backends.hf.load import Loading
from honeloom.backends.hf.score import Scorer
from honeloom.data.overlap import overlap, question_digests
from honeloom.data.rowset import RowSet
from honeloom.errors import InputError, RowsError
from honeloom.evaluation.config import EvaluateConfig
from honeloom.evaluation.statistics import (
    Comparison,
    Estimate,
    macro_bootstrap,
    macro_mean,
    paired_bootstrap,
    ratio_mean,
)
from honeloom.registry import load_target
from honeloom.stages.inputs import ResolvedInput
from honeloom.stages.row_records import target_digests, training_digests, write_table
from honeloom.stages.rows import limit_text, scan
from honeloom.stages.work import Outcome, Work
from honeloom.types.report import Check, Metric

__all__ = ["execute"]

EXAMPLES = "examples.parquet"
MAX_DOMAINS = 200
"""Domains with numbers of their own; the smaller ones are put together."""
REST = "other"
SUMMARIES = ("all", "macro")


@dataclass(frozen=True, slots=True)
class Example:
    """What a model did on one row; `correct` and `correct_norm` only for multiple choice.

    `expert` names the model that answered, where a mixture of whole models sent the row to it.
    """

    id: str
    domain: str | None
    loss_sum: float
    tokens: int
    chars: int
    correct: bool | None = None
    correct_norm: bool | None = None
    expert: str | None = None


def execute(work: Work[EvaluateConfig]) -> Outcome:
    """Run an evaluation."""
    config, found = work.config, work.inputs["model"]
    rows = scan(work, dedup=False) if config.rows else None
    examples = _examples(work, found, rows) if rows else []
    metrics = _summarise(examples)
    details: dict[str, Any] = {"rows": len(examples)}
    if rows:
        details["overlap"] = _overlap(work, rows)
    if config.against:
        details["against"] = _compare(work, rows, examples)
    if config.tasks:
        metrics += _lm_eval(work)
    if work.folder:
        write_table(work.folder / EXAMPLES, _columns(examples))
    finite = all(math.isfinite(m.value) for m in metrics)
    return Outcome("scores", ".", tuple(metrics), (Check("every number is finite", finite, True, finite),), details)


def _examples(work: Work[EvaluateConfig], found: ResolvedInput, rows: RowSet) -> list[Example]:
    """Score every row with one model, in the rows' order."""
    config = work.config
    scorer = Scorer.open(
        found.paths[0],
        base=found.base,
        loading=Loading.of(config, spread=True),
        batch_size=config.batch_size,
        max_length=config.max_length,
        progress=work.log.track,
    )
    work.log.say(f"evaluate: {found.label} on {len(rows)} rows")
    kinds = Counter(row.kind for row in rows)
    examples: list[Example] = []
    cut = 0
    if kinds["chat"] or kinds["text"]:
        for row, loss in scorer.losses(_only(rows, {"chat", "text"}, len(rows))):
            examples.append(
                Example(row.id, _label(row.domain), loss.loss_sum, loss.tokens, loss.chars, expert=_expert(scorer))
            )
            cut += loss.truncated
    if kinds["choice"]:
        for row, choice in scorer.choices(_only(rows, {"choice"}, len(rows))):
            right = row.answer
            examples.append(
                Example(
                    row.id, _label(row.domain), choice.losses[right], choice.tokens[right], choice.chars[right],
                    choice.best(per_char=False) == right, choice.best(per_char=True) == right, _expert(scorer),
                )
            )  # fmt: skip
    if cut:
        work.log.warn(f"{cut} of {len(examples)} rows were cut at {limit_text(scorer, config.max_length)}")
    if scorer.unscored:
        row, reason = scorer.unscored[0]
        work.log.warn(f"{len(scorer.unscored)} rows could not be scored; first {row.where}: {reason}")
    if not examples:
        raise RowsError(f"none of the {len(rows)} rows could be scored by {found.value}")
    return examples


def _expert(scorer: Scorer) -> str | None:
    """Who answered the row that was just scored; None where nothing is routed."""
    routes = getattr(scorer, "routes", None)
    return str(scorer.model.config.experts[routes[-1]]["name"]) if routes else None


def _label(domain: str | None) -> str | None:
    """A row's domain, told apart from the summaries."""
    return f"{domain} (domain)" if domain in SUMMARIES else domain


class _only:
    """The rows of some kinds, with a length for the progress display."""

    def __init__(self, rows: RowSet, kinds: set[str], total: int) -> None:
        self.rows, self.kinds, self.total = rows, kinds, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Any:
        return (row for row in self.rows if row.kind in self.kinds)


def _summarise(examples: Sequence[Example]) -> list[Metric]:
    """Metrics per domain, over all rows (token-weighted) and as the mean of domains."""
    losses = [e for e in examples if e.correct is None]
    choices = [e for e in examples if e.correct is not None]
    metrics: list[Metric] = []
    if losses:
        metrics += _by_domain(losses, "loss", "nats/token", False, lambda e: (e.loss_sum, e.tokens))
        with_chars = [e for e in losses if e.chars]
        metrics += _by_domain(
            with_chars, "bits_per_char", "bits/char", False, lambda e: (e.loss_sum / math.log(2), e.chars)
        )
    if choices:
        metrics += _by_domain(choices, "accuracy", "share", True, lambda e: (float(e.correct or 0), 1))
        metrics += _by_domain(choices, "accuracy_norm", "share", True, lambda e: (float(e.correct_norm or 0), 1))
    return metrics


def _by_domain(examples: Sequence[Example], name: str, unit: str, higher: bool, terms: Any) -> list[Metric]:
    groups: dict[str, list[Example]] = {}
    for e in examples:
        if e.domain is not None:
            groups.setdefault(e.domain, []).append(e)
    shown = {domain: _estimate(group, terms) for domain, group in sorted(_folded(groups).items())}
    everything = {**shown, "all": _estimate(examples, terms)}
    if groups:
        everything["macro"] = macro_mean([_estimate(group, terms) for _, group in sorted(groups.items())])
    return [Metric(name, e.value, e.n, unit, higher, e.stderr, domain) for domain, e in everything.items()]


def _folded(groups: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The MAX_DOMAINS largest groups, and the others as one."""
    if len(groups) <= MAX_DOMAINS:
        return groups
    order = sorted(groups, key=lambda domain: (-len(groups[domain]), domain))
    kept = {domain: groups[domain] for domain in order[:MAX_DOMAINS] if domain != REST}
    return {**kept, REST: [item for domain, group in groups.items() if domain not in kept for item in group]}


def _estimate(examples: Iterable[Example], terms: Any) -> Estimate:
    pairs = np.array([terms(e) for e in examples], dtype=np.float64).reshape(-1, 2)
    return ratio_mean(pairs[:, 0], pairs[:, 1])


def _columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    names = ["id", "domain", "loss_sum", "tokens", "chars", "correct", "correct_norm"]
    if any(e.expert for e in examples):
        names.append("expert")
    return {name: [getattr(e, name) for e in examples] for name in names}


def _overlap(work: Work[EvaluateConfig], rows: RowSet) -> dict[str, Any]:
    """How many evaluation rows ask a question that the model was tuned on."""
    known = training_digests(work.model())
    if work.config.train_rows:
        files = [f for i in work.rows("train_rows") for f in i.files]
        known |= question_digests(RowSet.scan(files, max_bad=1.0))
    found = overlap(known, rows)
    if found["rows"]:
        first = found["examples"][0]
        work.log.warn(
            f"{found['rows']} of {len(rows)} evaluation rows ask a question the model was tuned on "
            f"(first {first['where']}); the numbers flatter it"
        )
    chosen_by = overlap(target_digests(work.model()), rows)["rows"]
    if chosen_by:
        work.log.warn(
            f"{chosen_by} of {len(rows)} evaluation rows ask a question by which the model's training rows were "
            "chosen (--target); the numbers flatter the choice"
        )
    return {**found, "training_questions_known": len(known), "target_rows": chosen_by}


def _compare(work: Work[EvaluateConfig], rows: RowSet | None, examples: Sequence[Example]) -> dict[str, Any]:
    found = work.inputs["against"]
    others = _read_examples(found.paths[0]) if (found.paths[0] / EXAMPLES).exists() else None
    if others is None:
        if rows is None:
            raise InputError("--against a model needs --rows to compare on")
        others = _examples(work, found, rows)
    metric = "loss" if any(e.correct is None for e in examples) else "accuracy"
    mine, theirs = ([e for e in side if (e.correct is None) == (metric == "loss")] for side in (examples, others))
    pairs = _paired(mine, theirs)
    if metric == "loss" and any(a.tokens != b.tokens for a, b in pairs):
        metric = "bits_per_char"  # other tokenizers split other tokens; characters are the same where both read all
        pairs = [(a, b) for a, b in pairs if a.chars == b.chars > 0]
    if len(pairs) < 2:
        raise InputError(
            f"--against {found.value}: it shares {len(pairs)} rows with this evaluation, at least 2 are needed"
        )
    unmatched = len(mine) + len(theirs) - 2 * len(pairs)
    if unmatched:
        work.log.warn(
            f"--against {found.value}: {unmatched} rows of the two evaluations have no counterpart; "
            f"the comparison is over the {len(pairs)} rows that both scored alike"
        )
    overall = _difference(pairs, metric, work.config)
    by_domain: dict[str, list[tuple[Example, Example]]] = {}
    for a, b in pairs:
        if a.domain is not None:
            by_domain.setdefault(a.domain, []).append((a, b))
    folded = _folded(by_domain)
    parts = {d: _difference(p, metric, work.config) for d, p in sorted(folded.items()) if len(p) > 1}
    macro = _macro_difference(folded, metric, work.config)
    return {
        "model": found.label,
        "metric": metric,
        "difference": overall.difference,
        "ci95": [overall.low, overall.high],
        "n": overall.n,
        "unmatched": unmatched,
        "sentence": _sentence(work.inputs["model"].label, found.label, metric, overall),
        "macro": _told(macro) if macro else None,
        "domains": {d: _told(c) for d, c in parts.items()},
    }


def _told(c: Comparison) -> dict[str, Any]:
    return {"difference": c.difference, "ci95": [c.low, c.high], "n": c.n}


def _difference(pairs: Sequence[tuple[Example, Example]], metric: str, config: EvaluateConfig) -> Comparison:
    one, other, weights = _terms(pairs, metric).T
    return paired_bootstrap(one, other, weights, resamples=config.bootstrap, seed=config.seed)


def _macro_difference(
    pairs: Mapping[str, Sequence[tuple[Example, Example]]], metric: str, config: EvaluateConfig
) -> Comparison | None:
    """Of the means over domains, each as much; None for fewer than two."""
    if len(pairs) < 2:
        return None
    terms = np.concatenate([_terms(some, metric) for some in pairs.values()])
    domains = [domain for domain, some in pairs.items() for _ in some]
    shares = dict.fromkeys(pairs, 1 / len(pairs))
    return macro_bootstrap(
        terms[:, [0, 2]], terms[:, [1, 2]], domains, shares, resamples=config.bootstrap, seed=config.seed
    )


def _terms(pairs: Sequence[tuple[Example, Example]], metric: str) -> npt.NDArray[np.float64]:
    """Summed value of either side, and the weight of both, (N, 3)."""
    if metric == "loss":
        return np.array([(a.loss_sum, b.loss_sum, float(a.tokens)) for a, b in pairs])
    if metric == "bits_per_char":
        return np.array([(a.loss_sum / math.log(2), b.loss_sum / math.log(2), float(a.chars)) for a, b in pairs])
    return np.array([(float(a.correct or 0), float(b.correct or 0), 1.0) for a, b in pairs])


def _sentence(one: str, other: str, metric: str, c: Comparison) -> str:
    unit = {"loss": "nats/token", "bits_per_char": "bits/char"}.get(metric, metric)
    if c.low <= 0 <= c.high:
        interval = f"95% interval [{c.low:.4f}, {c.high:.4f}], {c.n} rows"
        return f"no clear difference between {one} and {other}: {c.difference:+.4f} {unit}, {interval}"
    better = (c.difference < 0) == (metric != "accuracy")
    winner, loser = (one, other) if better else (other, one)
    low, high = sorted((abs(c.low), abs(c.high)))
    interval = f"95% interval [{low:.4f}, {high:.4f}], {c.n} rows"
    return f"{winner} better than {loser} by {abs(c.difference):.4f} {unit}, {interval}"


def _paired(examples: Sequence[Example], others: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Match rows by id; rows with the same id are matched in order."""
    waiting: dict[str, list[Example]] = {}
    for e in reversed(others):
        waiting.setdefault(e.id, []).append(e)
    return [(e, waiting[e.id].pop()) for e in examples if waiting.get(e.id)]


def _read_examples(folder: Path) -> list[Example]:
    table = pq.read_table(folder / EXAMPLES).to_pylist()
    return [Example(**{k: row.get(k) for k in Example.__dataclass_fields__}) for row in table]


def _lm_eval(work: Work[EvaluateConfig]) -> list[Metric]:
    found, config = work.inputs["model"], work.config
    scorer = Scorer.open(found.paths[0], base=found.base, loading=Loading.of(config, spread=True))
    run = load_target("honeloom.backends.lm_eval:run_tasks")
    task_path = str(work.model("task_path")) if config.task_path else None
    results: list[Metric] = run(
        scorer.model, scorer.encoder.tokenizer, config.tasks, task_path=task_path,
        batch_size=config.batch_size, limit=config.limit, seed=config.seed,
    )  # fmt: skip
    return results
