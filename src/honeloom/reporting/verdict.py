"""The head of a page: what was made, whether it verified, and its main number, in plain sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from honeloom.reporting.records import Inputs
from honeloom.reporting.text import alike, clip, name, number, plural, size
from honeloom.types.report import Metric, Report

__all__ = ["Figure", "Verdict", "describe", "describe_run"]


@dataclass(frozen=True, slots=True)
class Figure:
    """The main number: `before` is empty where nothing was compared; `remark` has the interval."""

    label: str
    after: str
    unit: str = ""
    before: str = ""
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a stage or run says of itself, and further facts as (name, text)."""

    sentence: str
    figure: Figure | None = None
    facts: tuple[tuple[str, str], ...] = ()


def describe(report: Report, inputs: Inputs) -> Verdict:
    """The verdict of one stage."""
    tell = _TELLERS.get(report.verb)
    return tell(report, inputs) if tell else Verdict(f"{report.verb} ended {report.status}.")


def describe_run(stages: Sequence[tuple[Report, Verdict]], run: Report) -> Verdict:
    """The verdict of a run: how many stages, and its last comparison or else its last evaluation.

    Of a sweep: how many points, those that nothing beats, and the best in the first objective. Of an ablation also the
    stage whose replacement costs most; `stages` are those of the whole recipe.
    """
    if sweep := run.details.get("sweep"):
        return _swept(sweep, len(stages))
    evaluations = [(r, v) for r, v in stages if r.verb == "evaluate" and r.metrics]
    compared = [(r, v) for r, v in evaluations if r.details.get("against")]
    ran = f"{plural(len(stages), 'stage')} ran"
    if not evaluations:
        return Verdict(f"{ran}.")
    _, told = (compared or evaluations)[-1]
    sentence = f"{ran}: {told.sentence.replace('No clear', 'no clear', 1)}"
    return Verdict(f"{sentence}{_ablated(run.details.get('ablation', ()))}", told.figure)


def _ablated(effects: Sequence[Mapping[str, Any]]) -> str:
    """What the most telling replacement costs, if it does beyond noise."""
    if not effects:
        return ""
    costs = [e["difference"] if e["better"] == "lower" else -e["difference"] for e in effects]
    worst = max(range(len(effects)), key=costs.__getitem__)
    low, high = effects[worst]["ci95"]
    if costs[worst] <= 0 or low <= 0 <= high:
        return f" None of {plural(len(effects), 'replacement')} of a stage is clearly worse."
    entry = effects[worst]
    return (
        f" Of {plural(len(effects), 'replacement')}, {clip(entry['instead'])} for {clip(entry['without'])} costs most: "
        f"{number(costs[worst])} {entry['unit']}."
    )


def _swept(sweep: Mapping[str, Any], stages: int) -> Verdict:
    points, unbeaten = sweep["points"], [p for p in sweep["points"] if p["pareto"]]
    ran = f"{plural(stages, 'stage')} ran for {plural(len(points), 'point')} of a sweep"
    if not unbeaten:
        return Verdict(f"{ran}.")
    first = sweep["objectives"][0]
    sign = 1 if first["better"] == "lower" else -1
    best = min(unbeaten, key=lambda p: sign * p["objectives"][first["name"]]["value"])
    values = ", ".join(f"{key} {value}" for key, value in best["values"].items())
    several = len(sweep["objectives"]) > 1
    others = f"; {len(unbeaten)} of the points {'is' if len(unbeaten) == 1 else 'are'} unbeaten" if several else ""
    return Verdict(
        f"{ran}: point {best['point']} has the best {clip(first['name'])}{others}.",
        Figure(
            clip(first["name"]), number(best["objectives"][first["name"]]["value"]), first["unit"], remark=clip(values)
        ),
    )


def _name(inputs: Inputs, place: str, otherwise: str) -> str:
    return name(inputs[place]) if place in inputs else otherwise


def _evaluate(report: Report, inputs: Inputs) -> Verdict:
    model = _name(inputs, "model", "The model")
    facts = []
    overlap = report.details.get("overlap")
    if overlap and overlap.get("training_questions_known"):
        facts.append(("rows seen in training", number(overlap["rows"])))
    against = report.details.get("against")
    if against:
        sentence, figure = _compared(report, against, model, inputs)
    else:
        sentence, figure = f"{model} was measured.", _measured(report)
        if "rows" in report.details:
            sentence = f"{model} was measured on {plural(report.details['rows'], 'row')}."
    return Verdict(sentence, figure, tuple(facts))


def _overall(report: Report, kind: str) -> Metric | None:
    found = [m for m in report.metrics if m.name == kind and m.value is not None]
    return next((m for m in found if m.domain in (None, "all")), None)


def _measured(report: Report) -> Figure | None:
    kind = next((m.name for m in report.metrics if m.name == "loss"), report.metrics[0].name if report.metrics else "")
    main = _overall(report, kind)
    if main is None:
        return None
    if main.stderr is None:
        return Figure(main.name, number(main.value), main.unit)
    value, low, high = alike(main.value, main.value - 1.96 * main.stderr, main.value + 1.96 * main.stderr)
    return Figure(main.name, value, main.unit, remark=f"95% interval {low} to {high}")


def _compared(report: Report, against: Mapping[str, Any], model: str, inputs: Inputs) -> tuple[str, Figure | None]:
    other = _name(inputs, "against", name(against["model"]))
    metric, difference = against["metric"], against["difference"]
    low, high = against["ci95"]
    main = _overall(report, metric)
    better = (difference > 0) == (main.higher_is_better if main else metric == "accuracy")
    sentence = f"{model} is {'better' if better else 'worse'} than {other}."
    if low <= 0 <= high:
        sentence = f"No clear difference between {model} and {other}."
    comparable = main is not None and not against["unmatched"]
    now = main.value if main and comparable else difference
    after, before, gap, *ends = alike(now, now - difference, difference, low, high)
    remark = f"95% interval {ends[0]} to {ends[1]}, over the same {plural(against['n'], 'row')}"
    unit = main.unit if main else ""
    if not comparable:
        return sentence, Figure(f"{metric} of {model}, less that of {other}", gap, unit, remark=remark)
    return sentence, Figure(f"{metric}: {other}, then {model}", after, unit, before, f"difference {gap}, {remark}")


def _select(report: Report, inputs: Inputs) -> Verdict:
    d = report.details
    share = d["rows_kept"] / d["rows_usable"] if d["rows_usable"] else 0.0
    rejected = ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in d["rejected"].items())
    return Verdict(
        f"{d['rows_kept']:,} of {plural(d['rows_usable'], 'usable row')} were kept, chosen by {d['method']}."
        f"{_valued(d)}",
        Figure("share of the usable rows", f"{share:.1%}"),
        (("rows read", number(d["rows_in"])), ("left out before scoring", rejected or "none")),
    )


def _valued(d: Mapping[str, Any]) -> str:
    """One sentence more where clusters were valued: how many, by how much work, and whether to trust the order."""
    if not d.get("players") or not d.get("evaluations"):
        return ""
    ranking = {
        True: "their ranking is resolvable",
        False: "their ranking is NOT resolvable, so the order is little better than chance",
        None: "whether their ranking is resolvable is not known",
    }[(d.get("noise") or {}).get("resolvable")]
    done = f"{plural(d['players'], 'cluster')} {'was' if d['players'] == 1 else 'were'} valued"
    return f" {done} with {plural(d['evaluations'], 'evaluation')}; {ranking}."


def _tune(report: Report, inputs: Inputs) -> Verdict:
    d, model = report.details, _name(inputs, "model", "the model")
    what = "A LoRA adapter of" if report.artefact and report.artefact.kind == "adapter" else "All weights of"
    verb = "was" if what.startswith("A LoRA") else "were"
    first, last = _overall(report, "train_loss_first"), _overall(report, "train_loss_last")
    figure = None
    if first and last:
        remark = f"mean of the first and the last {plural(last.n, 'step')}, on the rows trained on: no held-out measure"
        before, after = alike(first.value, last.value)
        figure = Figure("training loss", after, last.unit, before, remark)
    return Verdict(
        f"{what} {model} {verb} trained on {plural(d['rows'], 'row')} in {plural(d['steps'], 'step')}.",
        figure,
        (
            ("tokens", number(d["tokens"])),
            ("share of them trained as answers", f"{d['label_share']:.1%}"),
            ("trained weights", number(d["trainable_parameters"])),
        ),
    )


def _merge(report: Report, inputs: Inputs) -> Verdict:
    d = report.details
    listed = (v for k, v in inputs.items() if k.startswith(("models.", "slices.")) and k.endswith(".model"))
    models = list(dict.fromkeys(listed))
    named = ", ".join(name(m) for m in models[:4]) + (f" and {len(models) - 4} more" if len(models) > 4 else "")
    base = f" into {_name(inputs, 'base_model', '')}" if "base_model" in inputs else ""
    facts = [("method", clip(d["method"])), ("config and tokenizer from", clip(d["donor"]))]
    if d.get("lost_delta_fraction") is not None:
        facts.append(("share of the difference lost to rounding", f"{d['lost_delta_fraction']:.2%}"))
    facts += [("read", size(d["bytes_read"])), ("written", size(d["bytes_written"]))]
    verb = "was" if len(models) == 1 else "were"
    return Verdict(f"{named or 'The models'} {verb} merged{base} by {clip(d['method'])}.", None, tuple(facts))


def _mix(report: Report, inputs: Inputs) -> Verdict:
    d = report.details
    experts = d["experts"]
    named = ", ".join(clip(e, 24) for e in experts[:4]) + (f" and {len(experts) - 4} more" if len(experts) > 4 else "")
    of = {"ffn": "MLPs", "block": "layers", "model": "models"}[d["level"]]
    facts = [("format", clip(d["format"])), ("at a time", number(d["top_k"]))]
    params = d.get("params") or {}
    if params:
        facts += [("parameters", number(params["total"])), ("of them active", number(params["active"]))]
    facts += [("read", size(d["bytes_read"])), ("written", size(d["bytes_written"]))]
    return Verdict(f"The {of} of {named} are the experts of one mixture.", None, tuple(facts))


def _glue(report: Report, inputs: Inputs) -> Verdict:
    d = report.details
    count = sum(map(len, d["clusters"]))
    found = f"{plural(count, 'model')} in {plural(len(d['clusters']), 'cluster')}"
    if "result" not in d:
        return Verdict(f"{found}: {'; '.join(', '.join(c) for c in d['clusters'][:4])}.", None, ())
    after, before = alike(d["result"], d["best_single"])
    low, high = d["ci95"]
    remark = f"of the best single model, {clip(d['best_single_name'], 40)}, on {d['rows']['report']:,} report rows"
    figure = Figure(d["metric"].replace("_", " "), after, d["unit"], before, remark)
    interval = "" if low is None or high is None else f" [{low:+.4f}, {high:+.4f}]"  # too few rows have none
    facts = [
        ("result", clip(d["result_name"])),
        ("difference", f"{d['result'] - d['best_single']:+.4f}{interval}"),
        ("merges tried", number(d["evaluations"])),
    ]
    if d["oracle"]["closed"] is not None:
        facts.append(("of the way to the best model of each domain", f"{d['oracle']['closed']:.0%}"))
    return Verdict(f"{found}: {d['advice'][0]}", figure, tuple(facts))


def _drop(report: Report, inputs: Inputs) -> Verdict:
    d, plan = report.details, report.details.get("plan")
    if plan is None:
        sentence = f"The importance of every layer of {_name(inputs, 'model', 'the model')} was measured."
        return Verdict(sentence, None, (("metric", clip(d["metric"])), ("rows", f"{d['rows']:,}")))
    nouns = (("attention", "the attention"), ("mlp", "the MLP"), ("block", "the whole block"))
    parts = [f"{noun} of {_layers(plan[k])}" for k, noun in nouns if plan[k]]
    sentence = f"{_name(inputs, 'model', 'The model')} lost {' and '.join(parts) or 'nothing'}."
    names = {
        "params": "parameters",
        "kv_bytes_per_token": "cache per token (bytes)",
        "flops_per_token": "operations per token",
    }
    facts = [(label, _change(d[k])) for k, label in names.items() if k in d]
    if plan["profile"] == "zero":
        facts.append(("profile", "zero (shapes and cost stay)"))
    else:
        facts.append(("profile", clip(plan["profile"])))
    return Verdict(sentence, None, (*facts, ("opens in", ", ".join(d["loads_in"]))))


def _federate(report: Report, inputs: Inputs) -> Verdict:
    d = report.details
    came = Counter(status for client in d["clients"] for status in client["status"])
    first, last = _overall(report, "client_loss_first"), _overall(report, "client_loss_last")
    figure = None
    if first and last:
        remark = "before the first round and after the last, by clients on their own rows: no held-out measure"
        before, after = alike(first.value, last.value)
        figure = Figure("loss of the clients", after, last.unit, before, remark)
    up, down = (sum(client[key] for client in d["clients"]) for key in ("bytes_up", "bytes_down"))
    no = came["rejected"]
    refused = f"; {no:,} {'reply was' if no == 1 else 'replies were'} refused" if no else ""
    facts = [
        ("sound replies", number(came["ok"])),
        ("aggregation", f"{clip(d['aggregation'])}, {clip(d['start'])} start"),
        ("sent up", size(up)),
        ("sent down", size(down)),
    ]
    if d.get("relative_error") is not None:
        facts.append(("largest relative error of an aggregate", number(d["relative_error"])))
    return Verdict(
        f"A LoRA adapter of {_name(inputs, 'model', 'the model')} was trained by {plural(len(d['clients']), 'client')} "
        f"in {plural(d['rounds'], 'round')}{refused}.",
        figure,
        tuple(facts),
    )


def _aggregate(report: Report, inputs: Inputs) -> Verdict:
    d, count = report.details, len(report.details["clients"])
    into = f"into {_name(inputs, 'into_base', 'their base')}" if "into_base" in inputs else "into one"
    ranks = sorted(set(d["ranks_in"]))
    given = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    facts = [
        ("method", clip(d["method"])),
        ("rank of the adapters", given),
        ("rank of the aggregate", str(d["rank_out"])),
    ]
    if d.get("lost_delta_fraction") is not None:
        facts.append(("share of the difference lost to rounding", f"{d['lost_delta_fraction']:.2%}"))
    facts += [("read", size(d["bytes_up"])), ("written", size(d.get("bytes_written", d["bytes_down"] / count)))]
    return Verdict(
        f"{plural(count, 'adapter')} {'was' if count == 1 else 'were'} aggregated {into} by {clip(d['method'])}.",
        Figure(
            "relative error of the aggregate", number(float(d["relative_error"])),
            remark="norm of its difference from the weighted sum of the updates, over the norm of that sum",
        ),
        tuple(facts),
    )  # fmt: skip


def _extract(report: Report, inputs: Inputs) -> Verdict:
    d, tuned = report.details, _name(inputs, "tuned", "the model")
    facts = [
        ("modules", number(len(d["modules"]))),
        ("largest rank", str(d["rank"])),
        ("share of the squared difference outside", f"{d['outside_share']:.1%}"),
    ]
    if gap := _overall(report, "logits_gap"):
        facts.append(("largest difference of logits", number(gap.value)))
    return Verdict(
        f"What {tuned} changed in the linear layers of {_name(inputs, 'base', 'its base')} became an adapter.",
        Figure(
            "relative error of the adapter", number(float(d["relative_error"])), remark="over the norm of the change"
        ),
        (*facts, ("written", size(d["bytes_written"]))),
    )


def _convert(report: Report, inputs: Inputs) -> Verdict:
    d = report.details
    facts = (("read from", ", ".join(map(clip, d["files"][:3]))), ("written", size(d["bytes_written"])))
    return Verdict(f"{plural(d['tensors'], 'tensor')} went from pickles into safetensors, bit by bit.", None, facts)


def _export(report: Report, inputs: Inputs) -> Verdict:
    d = report.details
    written = "with its vocabulary" if d["vocabulary"] != "no_vocab" else "without a vocabulary: it takes token ids"
    facts = (
        ("architecture", clip(d["architecture"])),
        ("written", size(d["bytes"])),
        ("same next token", f"{d['logits']['agreement']:.1%} of {d['logits']['tokens']} tokens"),
    )
    sentence = f"{_name(inputs, 'model', 'The model')} is one {d['quant']} file for llama.cpp, {written}."
    return Verdict(sentence, Figure("distance from the source", number(d["logits"]["kl"]), "nats"), facts)


def _layers(which: Sequence[int]) -> str:
    if len(which) > 6:
        return f"{len(which)} layers"
    if len(which) == 1:
        return f"layer {which[0]}"
    return f"layers {', '.join(map(str, which[:-1]))} and {which[-1]}"


def _change(cost: Mapping[str, Any]) -> str:
    before, after = number(cost["before"]), number(cost["after"])
    return f"{after} (unchanged)" if before == after else f"{before} → {after}"


_TELLERS: dict[str, Callable[[Report, Inputs], Verdict]] = {
    "select": _select,
    "tune": _tune,
    "merge": _merge,
    "mix": _mix,
    "glue": _glue,
    "drop": _drop,
    "extract-lora": _extract,
    "convert": _convert,
    "export": _export,
    "federate": _federate,
    "aggregate": _aggregate,
    "evaluate": _evaluate,
}
