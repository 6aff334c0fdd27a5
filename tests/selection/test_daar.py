"""DaaR and bands: on made-up vectors whose domains are known, and through the door on the lab with labels hidden."""

import json
import math
from contextlib import nullcontext

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import adjusted_mutual_info_score, roc_auc_score

import honeloom
from honeloom.config.base import validate
from honeloom.errors import ConfigError, RowsError
from honeloom.lab.splits import rows as lab_rows
from honeloom.lab.splits import truth
from honeloom.selection.band import band
from honeloom.selection.choose import take_best
from honeloom.selection.config import SelectConfig
from honeloom.selection.daar import daar, domain_order, drawn_keys
from honeloom.selection.synthesis import SAMPLES_FILE, augmentation_prompt, parse_samples, seed_prompt, synthesise
from honeloom.selection.vectors import unit_blocks
from honeloom.testing import FakeRows, check_selector
from honeloom.testing.fakes import chat_row
from honeloom.types.ports import SelectionData

KINDS = 4
SPLIT = [f"{x}-{x + 20}" for x in range(0, 100, 20)]


def table(count=240, between=20):
    """Rows of four kinds, and some between the first two; no row says which."""
    rows = [chat_row(f"r-{i % KINDS}-{i:04}", f"q {i}", "a", source=f"s{i % 2}") for i in range(count)]
    return rows + [chat_row(f"r-x-{i:04}", f"q {i}", "a", source="s0") for i in range(between)]


def embed(rows, how):
    """The kind's axis and a little of the row's own; ids that begin with `empty` have no vector."""
    found = []
    for name in rows.ids:
        kind, own = name.split("-")[1], np.random.default_rng(abs(hash_of(name))).normal(size=8) * 0.2
        axis = np.eye(8)[0] + np.eye(8)[1] if kind == "x" else np.eye(8)[int(kind)]
        found.append(np.zeros(8) if name.startswith("empty") else axis + own)
    return next(unit_blocks(np.array(found, dtype=np.float32), standardise=False))


def hash_of(name):
    return int.from_bytes(name.encode()[-6:], "little")


def run(method, rows, **settings):
    said, warned = [], []
    seed = settings.pop("seed", 0)
    data = SelectionData(FakeRows(rows), lambda: None, seed, embed=embed, say=said.append, warn=warned.append)
    return method(data, **settings), warned


def kept(scores, rows, count):
    plan = take_best(scores, [r.id for r in rows], amount=count, unit="rows", seed=0)
    return {rows[i].id for i in plan.keep}


@pytest.fixture(scope="module")
def seed_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("seeds") / "seeds.jsonl"
    records = [
        {"id": f"s-{k}-{i}", "instruction": f"seed {k} {i}", "input": "", "output": "a", "domain": "dcba"[k]}
        for k in range(KINDS) for i in range(3)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.mark.parametrize("reward", ["entropy", "predicted"])
def test_daar_conforms_whatever_its_reward(reward):
    check_selector(daar, reward=reward)


def test_rows_between_domains_come_first():
    rows = table()
    scores, _ = run(daar, rows, clusters=KINDS)
    between = np.array([r.id.split("-")[1] == "x" for r in rows])
    assert roc_auc_score(between, scores.value) > 0.85
    assert scores.details["path"] == "clusters"
    assert scores.details["probe"]["accuracy"] > 0.9
    assert min(scores.value) >= 0 and max(scores.value) <= math.log(KINDS)
    assert set(scores.columns) == {
        "cluster", "pseudo_domain", "entropy", "p_max", "probe_domain", "phi_inter", "phi_intra", "x", "y"
    }  # fmt: skip
    assert scores.columns["entropy"] == list(scores.value)
    means = [np.mean([v for v, c in zip(scores.value, scores.columns["cluster"], strict=True) if c == k])
             for k in range(KINDS)]  # fmt: skip
    assert scores.clusters["value"] == pytest.approx(means)
    assert sum(scores.clusters["size"]) == len(rows)


def test_seeds_name_the_domains(seed_file):
    rows = table()
    scores, warned = run(daar, rows, seeds=str(seed_file))
    assert not warned
    assert scores.details["path"] == "seeds"
    assert scores.details["seeds"] == {"a": 3, "b": 3, "c": 3, "d": 3}
    right = [
        "dcba"[int(r.id.split("-")[1])] == name
        for r, name in zip(rows, scores.columns["pseudo_domain"], strict=True)
        if "-x-" not in r.id
    ]
    assert np.mean(right) > 0.95
    assert all(scores.clusters["name"][c] == n
               for c, n in zip(scores.columns["cluster"], scores.columns["pseudo_domain"], strict=True))  # fmt: skip


def test_the_choice_does_not_depend_on_the_order_of_the_rows(seed_file):
    rows = table(120, 10)
    for method, settings in (
        (daar, {"clusters": 3}), (daar, {"seeds": str(seed_file), "focus": "a"}), (band, {"clusters": 3}),
    ):  # fmt: skip
        one, other = run(method, rows, **settings)[0], run(method, rows[::-1], **settings)[0]
        assert kept(one, rows, 26) == kept(other, rows[::-1], 26)
        assert one.value == other.value[::-1]


def test_a_row_without_a_vector_is_left_for_last():
    rows = [*table(120, 0), chat_row("empty-0-1", "q", "a")]
    for method in (daar, band):
        scores, _ = run(method, rows, clusters=KINDS)
        assert scores.value[-1] == -math.inf
        assert scores.columns["pseudo_domain"][-1] is None and scores.columns["cluster"][-1] is None
        assert scores.columns["phi_inter"][-1] == 0.0 == scores.columns["phi_intra"][-1]
        assert "empty-0-1" not in kept(scores, rows, 120)


def test_one_domain_is_refused(tmp_path):
    alike = [chat_row(f"r-0-{i % 1:04}", "q", "a") for i in range(30)]
    for method, what in ((daar, "entropy of one domain is 0"), (band, "make one domain by cluster")):
        with pytest.raises(RowsError, match=what):
            run(method, alike)
    with pytest.raises(RowsError, match="make one domain by domain"):
        run(band, table(), by="domain")
    assert run(band, table(), by="domain", axis="intra")[0].details["domains"] == {"(none)": 260}
    with pytest.raises(RowsError, match="none of the 2 rows has a vector"):
        run(daar, [chat_row(f"empty-{i}-0", "q", "a") for i in range(2)])
    with pytest.raises(RowsError, match="too few for a probe"):
        run(daar, table(3, 0), clusters=2)


def test_a_domain_without_rows_is_told(seed_file):
    rows = [r for r in table(240, 0) if r.id.split("-")[1] != "3"]
    scores, warned = run(daar, rows, seeds=str(seed_file))
    assert "1 of 4 domains (a)" in warned[0]
    assert scores.details["dropped_domains"] == ["a"]
    assert scores.clusters["name"] == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ({"instruction": "x", "output": "y"}, "names no domain"),
        ({"instruction": "x", "domain": "a"}, "cannot be used"),
        ({"instruction": "x", "output": "y", "domain": "a"}, "at least 2 domains"),
    ],
)
def test_seeds_that_say_nothing_are_named(tmp_path, line, what):
    path = tmp_path / "seeds.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(RowsError, match=what) as caught:
        run(daar, table(), seeds=str(path))
    assert "seeds.jsonl" in str(caught.value)


def test_focus_takes_half_of_one_domain_for_a_tenth_of_the_others(seed_file):
    rows = table(400, 0)
    scores, _ = run(daar, rows, seeds=str(seed_file), focus="b")
    taken = [scores.columns["pseudo_domain"][i] for i in scores.order]
    sizes = scores.details["domains"]
    first = taken[: round(0.5 * sizes["b"] + 0.1 * (400 - sizes["b"]))]
    assert abs(first.count("b") - sizes["b"] / 2) <= 2
    assert all(abs(first.count(k) - sizes[k] / 10) <= 2 for k in "acd")
    early = taken[:40]
    assert early.count("b") > 2.5 * max(early.count(k) for k in "acd")
    with pytest.raises(RowsError, match=r"no domain is called 'z' \(domains: a, b, c, d\)"):
        run(daar, rows, seeds=str(seed_file), focus="z")


def test_the_order_of_a_focus_by_hand():
    labels = np.array([0, 0, 1, 1, -1])
    values = np.array([1.0, 2.0, 4.0, 3.0, -math.inf])
    # places 0.25 and 0.75 of each domain, over 0.5 and over 0.1
    assert domain_order(values, labels, list("abcde"), focus=0) == [1, 0, 2, 3, 4]
    assert domain_order(values, labels, list("abcde"), focus=1) == [2, 3, 1, 0, 4]
    assert domain_order(values, labels, list("abcde")) == [2, 1, 3, 0, 4]


def test_rows_are_drawn_by_the_rank_of_their_entropy():
    """The first draw is one of a softmax over ranks, domain by domain, whatever the values themselves are."""
    ids, labels = [f"r{i}" for i in range(8)], np.array([0] * 4 + [1] * 3 + [-1])
    values = np.array([5.0, 1.0, 2.0, 900.0, 0.1, 0.3, 0.2, -math.inf])
    place = np.array([2, 0, 1, 3])
    wanted = np.exp(1.0 * ((place + 0.5) / 2 - 1.0))
    first = np.zeros(4)
    for seed in range(4000):
        keys = drawn_keys(values, labels, ids, 1.0, seed)
        assert keys[-1] == -math.inf
        first[np.argmax(keys[:4])] += 1
    expected = 4000 * wanted / wanted.sum()
    assert ((first - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_every_domain_gives_its_share():
    rows = table(400, 40)
    drawn, _ = run(daar, rows, clusters=KINDS)
    top, _ = run(daar, rows, clusters=KINDS, choice="top")
    assert drawn.value == top.value
    sizes = drawn.details["domains"]
    for count in (44, 110):
        taken = [drawn.columns["pseudo_domain"][i] for i in drawn.order[:count]]
        assert all(abs(taken.count(k) - sizes[k] * count / 440) <= 1 for k in sizes)
    assert kept(top, rows, 44) == {rows[i].id for i in np.argsort(-np.array(top.value), kind="stable")[:44]}
    mean = np.mean([drawn.value[i] for i in drawn.order[:88]])
    assert np.mean(drawn.value) < mean < np.mean(sorted(top.value)[-88:])
    assert run(daar, rows, clusters=KINDS, seed=1)[0].order != drawn.order


@pytest.mark.parametrize("axis", ["inter", "intra"])
def test_the_five_bands_of_an_axis_part_the_rows(axis, seed_file):
    rows = table(200, 0)
    pools = []
    for limits in SPLIT:
        scores, _ = run(band, rows, axis=axis, band=limits, clusters=KINDS)
        inside = {r.id for r, v in zip(rows, scores.value, strict=True) if v == 0.0}
        assert abs(len(inside) - 40) <= KINDS
        assert kept(scores, rows, len(inside)) == inside
        pools.append(inside)
    assert sum(map(len, pools)) == 200 == len(set().union(*pools))
    phi = dict(zip([r.id for r in rows], scores.columns[f"phi_{axis}"], strict=True))
    means = [np.mean([phi[i] for i in pool]) for pool in pools]
    assert means == sorted(means, reverse=axis == "intra")


def test_labels_can_be_the_domains_of_a_band():
    rows = table(200, 0)
    scores, _ = run(band, rows, by="source", axis="intra", band="0-20")
    assert scores.details["domains"] == {"s0": 100, "s1": 100}
    assert sum(v == 0.0 for v in scores.value) == 40
    wide = kept(scores, rows, 100)
    assert kept(scores, rows, 40) < wide
    places = scores.columns["percentile"]
    assert max(p for r, p in zip(rows, places, strict=True) if r.id in wide) <= 51


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ({"type": "band", "band": "80-20"}, "the lower first"),
        ({"type": "band", "band": "0-120"}, "the lower first"),
        ({"type": "band", "by": "source", "clusters": 4}, "leave clusters out"),
        ({"type": "daar", "seeds": "x.jsonl", "clusters": 4}, "seeds and clusters each say"),
        ({"type": "daar", "domains": {"a": "only one"}}, "name at least 2"),
        ({"type": "daar", "samples": 20}, "samples: about rows that a model writes"),
        ({"type": "daar", "seeds": "x.jsonl", "embedding": {"type": "file", "path": "x.npy"}}, "no vectors of the"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(method, what):
    with pytest.raises(ConfigError, match=what):
        validate(SelectConfig, {"rows": "x", "model": "m", "method": method}, what="test")


# the lab, its labels hidden


@pytest.fixture(scope="module")
def lab_seeds(tmp_path_factory):
    """Five dev rows of each of the eight domains."""
    path, seen = tmp_path_factory.mktemp("lab") / "seeds.jsonl", {}
    with open(path, "w") as file:
        for row in lab_rows("dev"):
            name = row["domain"].rstrip("+")
            seen[name] = seen.get(name, 0) + 1
            if seen[name] <= 5:
                file.write(json.dumps({**row, "domain": name}) + "\n")
    return path


@pytest.mark.parametrize("path", ["seeds", "clusters"])
def test_domains_of_the_lab_are_found_and_rows_between_them_stand_out(path, lab_seeds, tmp_path):
    method = {"type": "daar", **({"seeds": str(lab_seeds)} if path == "seeds" else {"clusters": 8})}
    report = honeloom.select(
        "lab:pool", method=method, model="lab:base", keep="20%", limit=600, batch_size=64, output_dir=tmp_path / "out"
    )
    assert report.details["path"] == path
    assert report.details["probe"]["accuracy"] > 0.9
    scores = pq.read_table(tmp_path / "out" / "scores.parquet").to_pydict()
    known = truth("pool")
    between = np.array([known[i]["between"] is not None for i in scores["id"]])
    true = np.array([known[i]["domain"].rstrip("+") for i in scores["id"]])
    found = np.array(scores["pseudo_domain"])
    assert adjusted_mutual_info_score(true[~between], found[~between]) >= 0.8
    assert roc_auc_score(between, scores["score"]) > 0.7
    clusters = pq.read_table(tmp_path / "out" / "clusters.parquet").to_pydict()
    assert len(clusters["name"]) == 8 and sum(clusters["size"]) == len(between)


# rows that a model writes


class Writer:
    """A GeneratePort that answers from a list, over and over; the vector of a text counts its letters."""

    def __init__(self, answer):
        self.answer, self.calls, self.prompts = answer, 0, []

    def generate(self, prompts, **settings):
        self.calls += 1
        self.prompts += prompts
        return [self.answer(prompt, self.calls, i, settings["seed"]) for i, prompt in enumerate(prompts)]

    def vectors(self, texts):
        return np.array([[t.count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for t in texts], dtype=np.float32)


class Kept:
    """Records of a journal in memory."""

    def __init__(self):
        self.records = []

    def open(self, name):
        assert name == SAMPLES_FILE
        return nullcontext((list(self.records), self.records.append))


ABOUT = {"zero": "all about noughts", "one": "all about ones", "two": "all about twos", "three": "all about threes"}


def good(prompt, call, i, seed):
    """A domain's letter, and others that change from sample to sample."""
    kind = next(k for k, text in enumerate(ABOUT.values()) if f"domain: {text}" in prompt)
    words = "".join(chr(97 + (seed + 7 * j * j + 5 * i + call) % 26) * (1 + j) for j in range(4))
    return f"Instruction: {'wxyz'[kind] * 2}{words}\nResponse: {words}"


def write(writer, kept=None, samples=4, similarity=0.9, seed=0, domains=ABOUT):
    kept = kept or Kept()
    data = SelectionData(FakeRows([]), lambda: None, seed, open_generator=lambda: writer, open_journal=kept.open)
    return synthesise(data, domains, samples=samples, similarity=similarity), kept


def test_what_a_model_writes_is_read_in_any_number_of_pairs():
    text = (
        "Sure!\nInstruction 1: add 2\nto 3\nResponse 1: 5\n"
        "Instruction: say hi\nresponse: hi\nInstruction: \nResponse: x"
    )
    assert parse_samples(text) == [("add 2\nto 3", "5"), ("say hi", "hi")]
    assert parse_samples("Instruction: a\nInstruction: b") == [] == parse_samples("")


def test_prompts_name_the_domain_forbid_the_others_and_show_samples():
    first = seed_prompt("one", ABOUT)
    assert "domain: all about ones" in first and "- all about twos" in first and "- all about ones" not in first
    later = augmentation_prompt("one", ABOUT, [chat_row("x", "why?", "because")])
    assert "Instruction: why?\nResponse: because" in later and "all about twos" not in later


def test_samples_of_every_domain_are_unlike_each_other_and_all_is_recorded():
    writer = Writer(good)
    made, kept = write(writer)
    assert made.failed is None
    assert [row.domain for row in made.rows] == [name for name in ABOUT for _ in range(4)]
    for name, told in made.counts.items():
        mine = [r for r in kept.records if r["domain"] == name]
        assert told["calls"] == len(mine) and told["accepted"] == 4
        accepted = [s for r in mine for s in r["samples"] if s["accepted"]]
        assert all(s["closest"] < s["threshold"] for s in accepted) and len(accepted) == 4
    assert len({(row.prompt, row.domain) for row in made.rows}) == 16


def test_an_interrupted_writing_goes_on_without_asking_again():
    whole, kept = write(Writer(good))
    cut = Kept()
    cut.records = kept.records[:3]
    writer = Writer(good)
    writer.calls = 3
    again, cut = write(writer, cut)
    assert again.rows == whole.rows and again.counts == whole.counts
    assert cut.records == kept.records
    assert writer.calls == len(kept.records)


def test_the_threshold_rises_after_refusals_and_the_loop_ends():
    same = Writer(lambda prompt, *_: "Instruction: aaa\nResponse: b")
    made, _ = write(same)
    assert "wrote 1 usable samples of domain 'zero' in 60 calls" in made.failed
    assert made.rows == []
    assert made.counts["zero"]["similarity"] == pytest.approx(0.98)
    assert same.calls == 60


def test_a_model_that_writes_nothing_readable_is_given_up_early():
    weak = Writer(lambda *_: "blah blah")
    made, kept = write(weak)
    assert "wrote 0 usable samples of domain 'zero' in 12 calls (48 answers were unreadable" in made.failed
    assert weak.calls == 12 == len(kept.records)


def test_written_rows_are_seeds_and_a_weak_writer_ends_in_clusters():
    def answer(prompt, call, i, seed):
        kind = next(k for k, text in enumerate(ABOUT.values()) if f"domain: {text}" in prompt)
        return f"Instruction: {kind} {'abcdefghijklmnop'[(call * 4 + i) % 16] * 9}\nResponse: x"

    def near(rows, how):
        axes = [np.eye(8)[int(r.prompt[0])] if r.source == "synthesis" else None for r in rows]
        found = embed(FakeRows([r for r in rows if r.source != "synthesis"]), how)
        return np.concatenate((np.array([a for a in axes if a is not None], dtype=np.float32).reshape(-1, 8), found))

    warned, rows = [], table()
    data = SelectionData(FakeRows(rows), lambda: None, 0, embed=near, open_generator=lambda: Writer(answer))
    scores = daar(data, domains=ABOUT, samples=5)
    assert scores.details["path"] == "synthesis"
    assert scores.details["seeds"] == dict.fromkeys(sorted(ABOUT), 5)
    right = [list(ABOUT)[int(r.id.split("-")[1])] == name
             for r, name in zip(rows[:240], scores.columns["pseudo_domain"], strict=False)]  # fmt: skip
    assert np.mean(right) > 0.95
    weak = SelectionData(
        FakeRows(table(80, 0)), lambda: None, 0, embed=near, open_generator=lambda: Writer(lambda *_: "?"),
        warn=warned.append,
    )  # fmt: skip
    scores = daar(weak, domains=ABOUT)
    assert scores.details["path"] == "clusters"
    assert "found by clustering instead" in warned[0]
    assert scores.details["synthesis"]["domains"]["zero"]["unreadable"] == 48


def test_the_lab_model_cannot_write_domains_and_says_so(tmp_path):
    about = {"sums": "sums of numbers", "words": "letters of words"}
    report = honeloom.select(
        "lab:pool", method={"type": "daar", "domains": about}, model="lab:base", keep=10, limit=60,
        output_dir=tmp_path / "out",
    )  # fmt: skip
    assert report.details["path"] == "clusters"
    assert report.details["synthesis"]["failed"]
    records = (tmp_path / "out" / SAMPLES_FILE).read_text().splitlines()
    assert len(records) == 12 and {json.loads(r)["domain"] for r in records} == {"sums"}
