"""Quotas, rows that must be kept or dropped, and scores of two selections added up."""

import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import honeloom
from honeloom.cli.main import main
from honeloom.config.base import validate
from honeloom.errors import ConfigError, RowsError, SourceError
from honeloom.selection.choose import Quotas, take_best
from honeloom.selection.config import SelectConfig
from honeloom.types.plans import Scores

IDS = list("abcdefghij")
GROUP = ["x", "x", "x", "x", "y", "y", "y", "z", None, None]


def take(amount, *, unit="rows", share=None, first=(), tokens=None):
    """Keep of ten rows whose scores fall from a to j."""
    scores = Scores(tuple(range(10, 0, -1)), True, "test")
    quotas = None if share is None else Quotas(GROUP, {k: Decimal(v) for k, v in share.items()})
    plan = take_best(scores, IDS, amount=amount, unit=unit, seed=0, first=first, quotas=quotas, tokens=tokens)
    return "".join(IDS[i] for i in plan.keep)


@pytest.mark.parametrize(
    ("amount", "share", "kept"),
    [
        (4, None, "abcd"),
        (4, {"y": "0.5"}, "abef"),
        (4, {"y": "0.5", "z": "0.25"}, "aefh"),
        (4, {"x": "0"}, "efgh"),
        (4, {"x": "0.25", "y": "0"}, "ahij"),
        (4, {"z": "0.5"}, "abch"),  # z has one row: the other place goes to rows without a quota
        (8, {"x": "0.5", "y": "0.5"}, "abcdefgh"),  # y has three rows
        (5, {"y": "0.1"}, "abcde"),  # half a row is rounded up
        (5, {"x": "0.1", "y": "0.1", "z": "0.1"}, "aeij"),  # 1.5 rows of all quotas are 2, not 3
    ],
)
def test_quotas_by_hand(amount, share, kept):
    assert take(amount, share=share) == kept


def test_rows_that_must_be_kept_count():
    assert take(3, first={9}) == "abj"
    assert take(3, first={7, 8, 9}) == "hij"
    assert take(4, share={"x": "0.5"}, first={0, 1, 2}) == "abce"  # more than the quota of x, which they use up
    with pytest.raises(RowsError, match="more than the 2 rows to keep"):
        take(2, first={0, 1, 2})


def test_quotas_of_tokens():
    tokens = [10] * 10
    assert take(40, unit="tokens", tokens=tokens, share={"y": "0.5"}) == "abef"
    assert take(45, unit="tokens", tokens=tokens, share={"z": "0.5"}) == "abch"
    tokens[4] = 25  # too long for the 20 of its group
    assert take(40, unit="tokens", tokens=tokens, share={"y": "0.5"}) == "abfg"
    with pytest.raises(RowsError, match="more than the 15 tokens to keep"):
        take(15, unit="tokens", tokens=tokens, first={4})


def test_the_choice_is_a_prefix_where_nothing_else_is_asked():
    rng = np.random.default_rng(0)
    scores = Scores(tuple(rng.normal(size=200)), True, "test")
    ids = [f"r{i}" for i in range(200)]
    plain = take_best(scores, ids, amount=50, unit="rows", seed=1)
    group = ["a"] * 200
    assert take_best(scores, ids, amount=50, unit="rows", seed=1, quotas=Quotas(group, {"a": Decimal(1)})) == plain


# through the door


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"id": f"r{i}", "instruction": f"question number {i}", "output": f"answer {i}",
                        "domain": "code" if i % 4 == 0 else "talk"}) + "\n"
            for i in range(40)
        )
    )  # fmt: skip
    return path


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        main(["select", *map(str, arguments)])
    return left.value.code


def selected(folder):
    return [json.loads(line)["id"] for line in (folder / "selected.jsonl").read_text().splitlines()]


def test_quotas_and_lists_on_the_command_line(rows_file, tmp_path):
    keep, drop, out = tmp_path / "keep.txt", tmp_path / "drop.jsonl", tmp_path / "out"
    keep.write_text("r5\n\nr7 \n")
    drop.write_text("".join(line + "\n" for line in rows_file.read_text().splitlines()[:3]))
    code = run(
        rows_file, "--keep", 10, "--quota", "code=50%", "--must-keep", keep, "--must-drop", drop, "--output-dir", out
    )
    assert code == 0
    chosen = selected(out)
    assert len(chosen) == 10 and {"r5", "r7"} <= set(chosen) and not {"r0", "r1", "r2"} & set(chosen)
    assert sum(int(name[1:]) % 4 == 0 for name in chosen) == 5
    rejected = pq.read_table(out / "rejected.parquet").to_pylist()
    assert sorted(r["id"] for r in rejected) == ["r0", "r1", "r2"]
    assert {r["reason"] for r in rejected} == {"named in must_drop"}
    details = json.loads((out / "report.json").read_text())["details"]
    assert details["rejected"] == {"must_drop": 3} and details["rows_usable"] == 37


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--quota", "code"], "use GROUP=SHARE"),
        (["--quota", "code=10%", "--quota", "code=20%"], "given twice"),
        (["--quota", "code=10"], "quota.code"),
        (["--quota", "code=60%", "--quota", "talk=60%"], "together they are at most 100%"),
        (["--quota", "cod=10%"], "did you mean"),
        (["--quota-by", "source"], "give quota, or leave it out"),
        (["--quota", "0=10%", "--quota-by", "cluster"], "makes no clusters"),
        (["--axis", "inter"], "axis"),
        (["--must-keep", "nobody.txt"], "nobody.txt"),
    ],
)
def test_what_cannot_be_done_is_said(rows_file, tmp_path, capsys, flags, what):
    code = run(rows_file, "--output-dir", tmp_path / "out", *flags)
    assert code == 2 and what in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_lists_that_name_nobody_are_refused(rows_file, tmp_path):
    names = tmp_path / "names.txt"
    for field, text, what in (
        ("must_keep", "r1\nzz\n", r"1 of the 2 rows .* are not among the 40 usable rows \(first: zz\)"),
        ("must_drop", "zz\n", "1 of the 1 rows"),
        ("must_keep", "\n", "0 of the 0 rows"),
        ("must_drop", "".join(f"r{i}\n" for i in range(40)), "none is left to choose"),
    ):
        names.write_text(text)
        with pytest.raises(RowsError, match=what):
            honeloom.select(rows_file, output_dir=tmp_path / "out", **{field: names})
    names.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RowsError, match="not a text file of ids"):
        honeloom.select(rows_file, output_dir=tmp_path / "out", must_keep=names)


def test_a_changed_list_is_another_selection(rows_file, tmp_path):
    names, out = tmp_path / "names.txt", tmp_path / "out"
    names.write_text("r1\n")
    honeloom.select(rows_file, output_dir=out, must_keep=names, keep=3)
    assert "r1" in selected(out)
    names.write_text("r2\n")
    honeloom.select(rows_file, output_dir=out, must_keep=names, keep=3, resume=True)
    assert "r2" in selected(out)


def test_too_small_groups_are_told(rows_file, tmp_path):
    report = honeloom.select(rows_file, output_dir=tmp_path / "out", keep=30, quota={"code": "60%", "talk": 0.4})
    assert report.details["rows_kept"] == 22
    assert any("22 rows are kept, not 30" in text for text in report.warnings)


def test_pseudo_domains_can_have_quotas(tmp_path):
    out = tmp_path / "out"
    honeloom.select(
        "lab:pool", method={"type": "daar", "clusters": 4}, model="lab:base", limit=120, keep=40, batch_size=64,
        quota={"domain-0": "50%"}, quota_by="cluster", output_dir=out,
    )  # fmt: skip
    table = pq.read_table(out / "scores.parquet").to_pydict()
    chosen = [d for d, s in zip(table["pseudo_domain"], table["selected"], strict=True) if s]
    assert len(chosen) == 40 and chosen.count("domain-0") == 20


# a term


def write_scores(path, values):
    pq.write_table(pa.table({"id": list(values), "score": list(values.values())}), path)
    return path


def test_values_and_diversity_add_up(rows_file, tmp_path):
    rng = np.random.default_rng(3)
    names = [f"r{i}" for i in range(40)]
    one = dict(zip(names, rng.normal(size=40), strict=True))
    two = dict(zip(names[:30], 100 * rng.normal(size=30) + 7, strict=True))
    base, term = write_scores(tmp_path / "a.parquet", one), write_scores(tmp_path / "b.parquet", two)
    out = tmp_path / "out"
    report = honeloom.select(
        rows_file, method={"type": "scores", "path": base, "term": term, "weight": 0.5}, keep=5, output_dir=out
    )
    x = np.array([one[n] for n in names[:30]])
    y = np.array([two[n] for n in names[:30]])
    total = (x - x.mean()) / x.std() + 0.5 * (y - y.mean()) / y.std()
    assert set(selected(out)) == {names[i] for i in np.argsort(-total)[:5]}
    assert report.details["term"]["rows"] == 30
    table = pq.read_table(out / "scores.parquet").to_pydict()
    assert table["base"][:30] == pytest.approx(list(x)) and table["term"][30:] == [None] * 10
    assert table["score"][:30] == pytest.approx(list(total)) and table["score"][30:] == [None] * 10


def test_a_term_about_other_rows_is_refused(rows_file, tmp_path):
    one, two = {f"r{i}": 1.0 * i for i in range(20)}, {f"r{i}": 1.0 * i for i in range(20, 40)}
    base, term = write_scores(tmp_path / "a.parquet", one), write_scores(tmp_path / "b.parquet", two)
    with pytest.raises(SourceError, match="no row with a score in both"):
        honeloom.select(rows_file, method={"type": "scores", "path": base, "term": term}, output_dir=tmp_path / "o")
    with pytest.raises(ConfigError, match="give term, or leave it out"):
        validate(SelectConfig, {"rows": "x", "method": {"type": "scores", "path": "a", "weight": 2.0}}, what="test")
