"""SHED through the command's door: the lab model is tuned for real, a few steps at a time."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

import honeloom
from honeloom.errors import ConfigError, RowsError, SourceError
from honeloom.runs.journal import read_journal

SETTINGS = {
    "method": {"type": "shed", "players": 5, "curves": 1, "surrogate": "none",
               "utility": {"steps": 2, "batch_size": 4, "target_rows": 8, "lr": 1e-2}},
    "model": "lab:base", "keep": "10%", "budget": 12, "limit": 120, "max_length": 48,
}  # fmt: skip


def pick(out, **changes):
    return honeloom.select("lab:pool", **{"target": "lab:dev", **SETTINGS, **changes}, output_dir=out)


@pytest.fixture(scope="module")
def picked(tmp_path_factory):
    out = tmp_path_factory.mktemp("shed") / "picked"
    return out, pick(out)


def test_everything_that_was_measured_is_written(picked):
    out, report = picked
    details = report.details
    assert details["method"] == "shed"
    assert details["evaluations"] == 12 == details["budget"]
    assert set(details["noise"]) == {"sd", "margin", "predicted_rho", "resolvable"}
    assert all(check.passed for check in report.verification)
    scores = pq.read_table(out / "scores.parquet")
    clusters = pq.read_table(out / "clusters.parquet")
    assert {"id", "score", "stderr", "count", "cluster", "rank", "proxy", "x", "y"} <= set(scores.column_names)
    assert sum(clusters["size"].to_pylist()) == len(scores) == details["rows_usable"]
    value = dict(zip(clusters["cluster"].to_pylist(), clusters["value"].to_pylist(), strict=True))
    assert scores["score"].to_pylist() == [value[c] for c in scores["cluster"].to_pylist()]
    ranks = np.array(scores["rank"].to_pylist())
    assert sorted(ranks) == list(range(len(scores)))
    assert (np.array(scores["selected"].to_pylist()) == (ranks < details["rows_kept"])).all()
    ledger = list(read_journal(out / "evaluations.jsonl"))
    assert len({r["key"] for r in ledger}) == len(ledger) <= 12
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_scores_are_applied_by_id_without_a_model(picked, tmp_path):
    out, _ = picked
    report = honeloom.select(
        "lab:pool", method={"type": "scores", "path": out / "scores.parquet"}, keep="20%", limit=120,
        output_dir=tmp_path / "again",
    )  # fmt: skip
    first = pq.read_table(out / "scores.parquet")
    wanted = {i for i, r in zip(first["id"].to_pylist(), first["rank"].to_pylist(), strict=True) if r < 24}
    table = pq.read_table(tmp_path / "again" / "scores.parquet")
    assert report.details["rows_kept"] == 24
    assert set(table.filter(table["selected"])["id"].to_pylist()) == wanted


@pytest.mark.slow
def test_two_workers_write_the_same_bytes(picked, tmp_path):
    pick(tmp_path / "two", workers=2)
    for name in ("scores.parquet", "clusters.parquet", "selected.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (picked[0] / name).read_bytes()


@pytest.mark.slow
def test_ray_writes_the_same_bytes(picked, tmp_path):
    pytest.importorskip("ray")
    pick(tmp_path / "ray", ray="local", workers=2)
    for name in ("scores.parquet", "clusters.parquet", "selected.jsonl"):
        assert (tmp_path / "ray" / name).read_bytes() == (picked[0] / name).read_bytes()


@pytest.mark.slow
def test_a_killed_valuation_goes_on_where_it_was(picked, tmp_path):
    """kill -9 at random moments, then resume: the same bytes, and no evaluation paid twice."""
    out = tmp_path / "killed"
    script = (
        "import json, sys, honeloom; settings = json.loads(sys.argv[1]);"
        "honeloom.select('lab:pool', target='lab:dev', output_dir=sys.argv[2], **settings)"
    )
    command = [sys.executable, "-c", script, json.dumps(SETTINGS), str(out)]
    journal, rng, kills = None, random.Random(0), 0
    while kills < 2:
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        seen = len(list(read_journal(journal))) if journal else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            found = list(tmp_path.glob(".killed.partial-*/evaluations.jsonl"))
            if found and len(list(read_journal(found[0]))) >= seen + 2:
                journal = found[0]
                time.sleep(rng.random() * 0.3)
                process.kill()
                break
            time.sleep(0.02)
        process.wait()
        assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()
        kills += 1
    subprocess.run(command, check=True, capture_output=True)
    for name in ("scores.parquet", "clusters.parquet", "selected.jsonl", "evaluations.jsonl"):
        assert (out / name).read_bytes() == (picked[0] / name).read_bytes()


def rows_file(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_target_in_the_pool_is_refused_or_left_out(tmp_path):
    pool = [{"id": f"p{i}", "instruction": f"What is the sum of {i} and {i + 1} today?", "output": str(i)}
            for i in range(40)]  # fmt: skip
    rows = rows_file(tmp_path / "pool.jsonl", pool)
    target = rows_file(tmp_path / "target.jsonl", [{**pool[3], "id": "t"}, {**pool[7], "id": "u", "output": "no"}])
    options = {"method": "dsir", "target": target, "keep": "5"}
    with pytest.raises(RowsError, match=r"2 of 40 rows repeat a row of the target.*pool.jsonl:4.*leave_out"):
        honeloom.select(rows, **options, output_dir=tmp_path / "no")
    assert not (tmp_path / "no").exists()
    report = honeloom.select(rows, **options, overlap="leave_out", output_dir=tmp_path / "yes")
    assert report.details["rows_usable"] == 38
    assert report.details["rejected"]["target_overlap"] == 2
    rejected = pq.read_table(tmp_path / "yes" / "rejected.parquet").to_pylist()
    assert {r["id"] for r in rejected} == {"p3", "p7"}


def test_what_a_method_cannot_use_is_an_error(tmp_path):
    for options, message in (
        ({"method": "random", "budget": 20}, "uses no budget"),
        ({"method": "length", "model": "lab:base", "target": "lab:dev"}, "uses no target"),
        ({"method": "less", "model": "lab:base"}, "needs a target"),
        ({"method": "shed", "target": "lab:dev"}, "needs a model"),
        ({"method": {"type": "shed", "estimator": "permutations"}, "model": "lab:base"}, "did you mean 'permutation'"),
        ({"method": {"type": "shed", "embedding": "tf-idf"}, "model": "lab:base"}, "embedding"),
    ):
        with pytest.raises(ConfigError, match=message):
            honeloom.select("lab:pool", **options, output_dir=tmp_path / "x")
    with pytest.raises(SourceError, match="no such file"):
        honeloom.select("lab:pool", method={"type": "scores", "path": "nowhere.parquet"}, output_dir=tmp_path / "x")


def test_vectors_can_come_from_words_or_a_file(tmp_path):
    report = pick(tmp_path / "words", method={**SETTINGS["method"], "embedding": {"type": "tfidf", "size": 16}})
    assert report.details["players"] == 5
    ids = pq.read_table(tmp_path / "words" / "scores.parquet")["id"].to_pylist()
    vectors = np.random.default_rng(0).normal(size=(len(ids), 6)).astype(np.float32)
    np.save(tmp_path / "own.npy", vectors)
    own = {**SETTINGS["method"], "embedding": {"type": "file", "path": str(tmp_path / "own.npy")}}
    assert pick(tmp_path / "own", method=own).details["players"] == 5
    np.save(tmp_path / "own.npy", vectors[:-1])
    with pytest.raises(SourceError, match="vectors for"):
        pick(tmp_path / "short", method=own)
    assert not (tmp_path / "short").exists()


def test_without_a_target_a_part_of_the_rows_is_held_out(tmp_path):
    report = pick(tmp_path / "own", target=())
    assert report.details["development"] == {"rows": 8, "from": "rows"}
    assert any("held out" in w for w in report.warnings)


def _gone(group, seconds):
    """Whether no process of the group is left; multiprocessing's own tracker ends a moment after the others."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_ctrl_c_keeps_what_was_paid_and_leaves_no_process(tmp_path, workers):
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "honeloom", "select", "lab:pool", "--method", "shed", "--model", "lab:base",
               "--target", "lab:dev", "--budget", "200", "--limit", "120", "--workers", workers, "--max-length", "48",
               "--set", "method.surrogate=none", "--output-dir", str(out)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    ledger = None
    while time.monotonic() < deadline and not (ledger and list(read_journal(ledger))):
        time.sleep(0.05)
        ledger = next(iter(tmp_path.glob(".stopped.partial-*/evaluations.jsonl")), None)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert not out.exists()
    assert list(read_journal(ledger))
    assert _gone(process.pid, seconds=20)


def test_rows_that_chose_cannot_judge_unnoticed(tmp_path):
    """A model tuned on rows that were chosen by the test set says so when it is measured on it."""
    honeloom.select("lab:pool", method="dsir", target="lab:dev", keep="20", limit=200, output_dir=tmp_path / "picked")
    honeloom.tune("lab:base", tmp_path / "picked", max_steps=1, output_dir=tmp_path / "tuned")
    report = honeloom.evaluate(tmp_path / "tuned", rows="lab:dev", limit=30)
    assert report.details["overlap"]["target_rows"] == 30
    assert any("chosen" in w for w in report.warnings)
    other = honeloom.evaluate(tmp_path / "tuned", rows="lab:test", limit=30)
    assert other.details["overlap"]["target_rows"] < 5


def test_a_choice_is_applied_again_in_one_recipe_and_its_target_is_not_forgotten(tmp_path):
    recipe = {
        "version": 1,
        "stages": {
            "pick": {"select": {"rows": "lab:pool", "limit": 150, "method": "dsir", "target": "lab:dev", "keep": "10"}},
            "more": {"select": {"rows": "lab:pool", "limit": 150, "method": {"type": "scores", "path": "$pick"},
                                "keep": "20"}},
            "tuned": {"tune": {"model": "lab:base", "rows": "$more", "max_steps": 1}},
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    honeloom.run(tmp_path / "recipe.yaml", output_dir=tmp_path / "run")
    one, two = (pq.read_table(tmp_path / "run/stages" / n / "scores.parquet") for n in ("1-pick", "2-more"))
    chosen = [set(t.filter(t["selected"])["id"].to_pylist()) for t in (one, two)]
    assert chosen[0] < chosen[1]
    report = honeloom.evaluate(tmp_path / "run/stages/3-tuned", rows="lab:dev", limit=12)
    assert report.details["overlap"]["target_rows"] == 12
