"""The lab's rows: fixed for ever, disjoint by content, and wrong only where the record says so."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

import pytest

from honeloom import lab
from honeloom.lab import splits, world

SPLITS: tuple[lab.Split, ...] = ("pool", "dev", "test")
GOLDEN = {
    "pool": "bd7317d4cb59878e13d78955d3fceaaf743e4a2cf65c2100eb654e02a0dc4452",
    "dev": "aa2c09737ad8fa46968141900a5c8fa368ec8315717cf0934563b6181d840680",
    "test": "b5870c301a6feebf4089318d73b6204264035c86c79f754cc115743db27c0d14",
}
GOLDEN_TRAINING_TEXT = "34ab9c8337b031a54bbfc4ccfb6f6ffaa28b907c65b531331e711bfa25e81684"
DIGEST = (
    "import hashlib, json, sys; from honeloom import lab; "
    "print(*(hashlib.sha256(json.dumps([list(lab.rows(s)), lab.truth(s)], sort_keys=True).encode()).hexdigest() "
    "for s in ('pool', 'dev', 'test')))"
)


def digest(split: lab.Split) -> str:
    text = json.dumps([list(lab.rows(split)), lab.truth(split)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def patterns() -> Iterator[tuple[str, re.Pattern[str]]]:
    """Every template as a pattern whose groups are the operands."""
    for op in world.OPS.values():
        for template in op.templates:
            names: list[str] = []

            def group(match: re.Match[str], names: list[str] = names) -> str:
                name = match[1]
                if name in names:
                    return f"(?P={name}_)"
                names.append(name)
                return f"(?P<{name}_>{'not |' if name == 'no' else '.+?'})"

            yield op.name, re.compile(re.sub(r"\\{(\w+)\\}", group, re.escape(template)))


PATTERNS: dict[str, list[re.Pattern[str]]] = defaultdict(list)
for _name, _pattern in patterns():
    PATTERNS[_name].append(_pattern)


def content(op: str, prompt: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Op and operands read back from the wording."""
    matches = [m for pattern in PATTERNS[op] if (m := pattern.fullmatch(prompt))]
    assert matches, (op, prompt)
    return op, tuple(sorted(matches[0].groupdict().items()))


def contents(split: lab.Split) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    known = lab.truth(split)
    found = set()
    for row in lab.rows(split):
        fact = known[row["id"]]
        if fact["between"] is None and fact["duplicate_of"] is None:
            found.add(content(fact["op"], row["instruction"]))
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_golden(split: lab.Split) -> None:
    assert digest(split) == GOLDEN[split]


@pytest.mark.parametrize("seed", ["0", "1"])
def test_rows_do_not_depend_on_the_hash_seed(seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    out = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [GOLDEN[split] for split in SPLITS]


def test_importing_the_lab_is_light() -> None:
    code = (
        "import sys, honeloom.lab as lab; list(lab.rows('dev')); "
        "print([m for m in ('torch', 'numpy', 'tokenizers', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_sizes_ids_and_keys() -> None:
    for split, size in (("pool", 2400), ("dev", 480), ("test", 960)):
        rows = list(lab.rows(split))  # type: ignore[arg-type]
        assert [row["id"] for row in rows] == [f"{split}-{i:05d}" for i in range(size)]
        keys = {"id", "instruction", "input", "output", "source"} | ({"domain"} if split != "pool" else set())
        assert all(set(row) == keys for row in rows)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_dev_and_test_hold_every_label_alike(split: lab.Split) -> None:
    counts = Counter(row["domain"] for row in lab.rows(split))
    assert set(counts) == {d + mark for d in lab.DOMAINS for mark in ("", "+")}
    assert len(set(counts.values())) == 1
    known = lab.truth(split)
    assert all(known[row["id"]]["taught"] != row["domain"].endswith("+") for row in lab.rows(split))
    assert not any(fact["wrong"] or fact["duplicate_of"] or fact["between"] for fact in known.values())
    assert len({row["instruction"] for row in lab.rows(split)}) == len(known)


def test_no_content_is_in_two_splits() -> None:
    pool, dev, test = (contents(split) for split in SPLITS)
    assert len(pool) > 1500
    assert not pool & dev
    assert not pool & test
    assert not dev & test


def test_training_text_is_the_one_of_the_shipped_weights() -> None:
    stream = world.pretraining(1)
    text = json.dumps([(q.prompt, q.answer) for q in (next(stream) for _ in range(2000))])
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN_TRAINING_TEXT


def test_no_content_is_in_the_training_text_except_facts() -> None:
    stream = world.pretraining(1)
    questions = [next(stream) for _ in range(5000)]
    assert {world.part_of(q.op, q.key) for q in questions if not q.op.everywhere} == {"pretrain"}
    prompts = {q.prompt for q in questions}
    for split in SPLITS:
        known = lab.truth(split)
        shared = [known[r["id"]]["op"] for r in lab.rows(split) if r["instruction"] in prompts]
        assert all(world.OPS[op].everywhere for op in shared)


@pytest.mark.parametrize("split", SPLITS)
def test_the_record_agrees_with_the_rows(split: lab.Split) -> None:
    known = lab.truth(split)
    for row in lab.rows(split):
        fact = known[row["id"]]
        assert fact["wrong"] == (row["output"] != fact["answer"]) == (fact["noise"] is not None)
        assert fact["source"] == row["source"]
        assert row.get("domain", fact["domain"]) == fact["domain"]


def originals() -> dict[str, lab.Truth]:
    return {name: fact for name, fact in lab.truth("pool").items() if fact["duplicate_of"] is None}


def test_shares_of_planted_errors() -> None:
    facts = list(originals().values())
    assert len(facts) == 2304
    by_source: dict[str, list[lab.Truth]] = defaultdict(list)
    for fact in facts:
        by_source[fact["source"]].append(fact)
    assert len(by_source) == 12
    assert {len(group) for group in by_source.values()} == {192}
    noisy = {s: g for s, g in by_source.items() if any(f["noise"] == "source" for f in g)}
    assert len(noisy) == 3
    assert {sum(f["noise"] == "source" for f in g) for g in noisy.values()} == {round(0.9 * 192)}
    clean = [fact for source, group in by_source.items() if source not in noisy for fact in group]
    assert sum(f["wrong"] for f in clean) / len(clean) == pytest.approx(0.1, abs=0.015)
    assert sum(f["wrong"] for f in facts) / len(facts) == pytest.approx(0.3, abs=0.01)


def test_wrong_answers_look_right() -> None:
    known, rows = originals(), {row["id"]: row for row in lab.rows("pool")}
    answers: dict[str, set[str]] = defaultdict(set)
    for fact in known.values():
        answers[fact["op"]].add(fact["answer"])
    wrong = {name: fact for name, fact in known.items() if fact["wrong"]}
    borrowed = [rows[name]["output"] in answers[fact["op"]] for name, fact in wrong.items()]
    assert sum(borrowed) / len(borrowed) > 0.99
    same_length = [len(rows[name]["output"]) == len(fact["answer"]) for name, fact in wrong.items()]
    assert sum(same_length) / len(same_length) > 0.75


def test_duplicates_repeat_their_original() -> None:
    known, rows = lab.truth("pool"), {row["id"]: row for row in lab.rows("pool")}
    kinds = Counter()
    for name, fact in known.items():
        if fact["duplicate_of"] is None:
            continue
        row, first = rows[name], rows[fact["duplicate_of"]]
        assert known[fact["duplicate_of"]]["duplicate_of"] is None
        assert (row["output"], row["source"]) == (first["output"], first["source"])
        changed = row["instruction"].removeprefix("Question: ")
        assert first["instruction"] in (changed, f"{changed}.", f"{changed}?")
        kinds[row["instruction"] == first["instruction"]] += 1
    assert kinds == {True: 48, False: 48}
    texts = Counter(rows[name]["instruction"] for name in originals())
    assert max(texts.values()) == 1


def test_mixtures_and_replay() -> None:
    facts = list(originals().values())
    mixed = [fact for fact in facts if fact["between"] is not None]
    assert len(mixed) == 72
    assert all(fact["op"].count("|") == 1 and not fact["taught"] for fact in mixed)
    assert all(set(fact["between"] or ()) <= set(lab.DOMAINS) for fact in mixed)
    assert {d for fact in mixed for d in fact["between"] or ()} == set(lab.DOMAINS)
    assert Counter(f["domain"] for f in facts if f["taught"]) == dict.fromkeys(lab.DOMAINS, 84)
    single = [f["domain"] for f in facts if not f["taught"] and f["between"] is None]
    assert Counter(single) == {f"{domain}+": 195 for domain in lab.DOMAINS}


ORACLES: Mapping[str, object] = {
    "arith.sum_diff": lambda a, b: f"{int(a) + int(b)},{int(a) - int(b)}",
    "arith.two_sums": lambda a, b, c, d: f"{int(a) + int(b)},{int(c) + int(d)}",
    "compare.cross": lambda a, b, c, d: f"{min(int(a), int(b))},{max(int(c), int(d))}",
    "lists.max_min": lambda items: "{1},{0}".format(*sorted(map(int, items.split(",")))[:: len(items.split(",")) - 1]),
    "lists.length_last": lambda items: f"{items.count(',') + 1},{items.split(',')[-1]}",
    "strings.reverse_capitals": lambda s: "".join(reversed(s.upper())),
    "strings.last_first": lambda s: s[-1] + "," + s[0],
    "logic.two": lambda e: str(bool(eval(e.replace("true", "True").replace("false", "False")))),
    "logic.three": lambda e: str(bool(eval(e.replace("true", "True").replace("false", "False")))),
    "dates.next": lambda d, m: f"{int(d) + 1} {m}",
}


@pytest.mark.parametrize("op", sorted(ORACLES))
def test_true_answers_are_true(op: str) -> None:
    checked = 0
    for split in SPLITS:
        known = lab.truth(split)
        for row in lab.rows(split):
            fact = known[row["id"]]
            if fact["op"] == op and fact["duplicate_of"] is None:
                operands = {k.rstrip("_"): v for k, v in content(op, row["instruction"])[1]}
                assert ORACLES[op](**operands) == fact["answer"]  # type: ignore[operator]
                checked += 1
    assert checked > 10


def test_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'test'.*pool, dev, test"):
        list(lab.rows("tset"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no split 'x'"):
        lab.truth("x")  # type: ignore[arg-type]


def test_answers_are_copies() -> None:
    next(lab.rows("dev"))["output"] = "spoilt"
    lab.truth("dev")["dev-00000"]["answer"] = "spoilt"
    assert next(lab.rows("dev"))["output"] == lab.truth("dev")["dev-00000"]["answer"] != "spoilt"
    assert splits.rows is lab.rows
