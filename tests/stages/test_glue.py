"""`glue` end to end on tiny models of a planted structure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import honeloom
from honeloom.errors import ConfigError, HoneloomError, RowsError, SourceError
from honeloom.testing.models import tiny_llama

DOMAINS = ("red", "blue")


def near(folder: Path, source: Path, seed: int, size: float = 0.02) -> Path:
    """A copy of a model with some noise on its weights."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(seed)
    changed = {name: t + size * torch.randn_like(t) for name, t in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rows(path: Path, first: int, count: int) -> Path:
    lines = []
    for i in range(first, first + count):
        domain = DOMAINS[i % 2]
        turn = {"instruction": f"say the {domain} number {i} again and again", "output": f"{domain} {i} {i}"}
        lines.append(json.dumps({**turn, "id": f"row-{i}", "domain": domain}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two relatives, a stranger of their shape, and one of another shape; rows that search and report."""
    root = tmp_path_factory.mktemp("zoo")
    models = root / "models"
    models.mkdir()
    base = tiny_llama(root / "base", seed=0)
    near(models / "near-a", base, 1)
    near(models / "near-b", base, 2)
    tiny_llama(models / "stranger", seed=7)
    tiny_llama(models / "wide", hidden=64, seed=8)
    (models / "notes").mkdir()
    return {
        "root": root, "models": models, "base": base,
        "search": rows(root / "search.jsonl", 0, 24), "report": rows(root / "report.jsonl", 100, 16),
    }  # fmt: skip


@pytest.fixture(scope="module")
def glued(zoo: dict[str, Path]) -> honeloom.Report:
    return honeloom.glue(
        zoo["models"], zoo["root"] / "glued", search_rows=str(zoo["search"]), report_rows=str(zoo["report"]),
        search={"type": "average", "confidence": 0.5}, device="cpu",
    )  # fmt: skip


def test_families_are_found_and_reasons_given(zoo: dict[str, Path]) -> None:
    report = honeloom.glue(zoo["models"], zoo["root"] / "clusters", only="clusters")
    assert report.details["clusters"] == [["near-a", "near-b"], ["stranger"], ["wide"]]
    assert {r["model"] for r in report.details["refused"]} == {"notes"}
    assert any(a["model"] == "wide" and "hidden_size" in a["reason"] for a in report.details["alone"])
    names = {p.name for p in (zoo["root"] / "clusters").iterdir()}
    assert {"clusters.json", "similarity.npz", "report.json", "manifest.json"} <= names
    assert "config.json" not in names


def test_the_result_is_a_model_with_its_proof(zoo: dict[str, Path], glued: honeloom.Report) -> None:
    details = glued.details
    assert {"best_single", "result", "gain_relative", "ci95", "evaluations", "advice"} <= details.keys()
    assert details["gain_relative"] == pytest.approx(1 - details["result"] / details["best_single"])
    names = {p.name for p in glued.path.iterdir()}
    assert {"config.json", "model.safetensors", "clusters.json", "similarity.npz", "search.jsonl"} <= names
    assert not any(name.startswith(".") for name in names)
    assert honeloom.verify(glued.path).details["problems"] == []
    assert all(check.passed for check in glued.verification)
    kinds = {m["name"]: m["kind"] for m in details["models"]}
    assert set(kinds) >= {"near-a", "near-b", "stranger", "wide"}
    found = honeloom.evaluate(glued.path, rows=str(zoo["report"]), device="cpu")
    assert found.metric("bits_per_char", "macro").value == pytest.approx(details["result"], rel=1e-6)


def test_it_is_reused_and_the_same_again(zoo: dict[str, Path], glued: honeloom.Report) -> None:
    how = {
        "search_rows": str(zoo["search"]), "report_rows": str(zoo["report"]),
        "search": {"type": "average", "confidence": 0.5}, "device": "cpu",
    }  # fmt: skip
    assert honeloom.glue(zoo["models"], glued.path, **how).reused
    again = honeloom.glue(zoo["models"], zoo["root"] / "again", **how)
    assert again.artefact is not None and glued.artefact is not None
    assert again.artefact.sha256 == glued.artefact.sha256
    assert (again.path / "search.jsonl").read_bytes() == (glued.path / "search.jsonl").read_bytes()


def test_a_search_alone_writes_documents_that_merge(zoo: dict[str, Path]) -> None:
    out = zoo["root"] / "search-only"
    report = honeloom.glue(
        zoo["models"], out, only="search", search_rows=str(zoo["search"]), report_rows=str(zoo["report"]), device="cpu",
        search="average",
    )  # fmt: skip
    assert set(report.details["search"]) == {"cluster-1"}
    merged = honeloom.merge(out / "cluster-1.yaml", zoo["root"] / "from-document")
    assert merged.status == "ok"


def test_a_merge_alone_ends_with_a_member(zoo: dict[str, Path]) -> None:
    report = honeloom.glue(
        zoo["models"], zoo["root"] / "merge-only", only="merge", search_rows=str(zoo["search"]), device="cpu",
        search="average",
    )  # fmt: skip
    assert report.details["mixtures"] == []
    assert report.details["rows"]["search"] + report.details["rows"]["report"] == 24  # halves of one file


@pytest.mark.parametrize("mixture", ["ffn-members", "block-members", "stack-members"])
def test_other_mixtures_of_one_cluster(zoo: dict[str, Path], mixture: str) -> None:
    report = honeloom.glue(
        zoo["models"], zoo["root"] / mixture, search_rows=str(zoo["search"]), report_rows=str(zoo["report"]),
        search="average", mixtures=[mixture], device="cpu",
    )  # fmt: skip
    (tried,) = report.details["mixtures"]
    assert tried["name"].startswith(mixture)
    assert tried["reason"] == "" or "best for every row" in tried["reason"]


def test_rows_that_choose_may_not_report(zoo: dict[str, Path]) -> None:
    with pytest.raises(RowsError, match="24 rows stand in search_rows and in report_rows"):
        honeloom.glue(
            zoo["models"], zoo["root"] / "same", search_rows=str(zoo["search"]), report_rows=str(zoo["search"])
        )
    assert not (zoo["root"] / "same").exists()


def test_questions_that_choose_may_not_report(zoo: dict[str, Path], tmp_path: Path) -> None:
    asked = [{**json.loads(line), "id": f"other-{i}", "output": "x"} for i, line in enumerate(zoo["search"].open())]
    copy = tmp_path / "copy.jsonl"
    copy.write_text("".join(json.dumps(row) + "\n" for row in asked))
    with pytest.raises(RowsError, match="24 report rows ask a question"):
        honeloom.glue(zoo["models"], tmp_path / "out", search_rows=str(zoo["search"]), report_rows=str(copy))


def test_bad_settings_are_refused_before_work(zoo: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="search_rows"):
        honeloom.glue(zoo["models"], tmp_path / "out")
    with pytest.raises(ConfigError, match="needs base"):
        honeloom.glue(zoo["models"], tmp_path / "out", only="clusters", cluster={"measure": "deltas"})
    with pytest.raises(ConfigError, match="unknown key"):
        honeloom.glue(zoo["models"], tmp_path / "out", only="clusters", modells=[])
    with pytest.raises(ConfigError, match="one shape"):
        honeloom.glue(
            zoo["models"], tmp_path / "out", search_rows=str(zoo["search"]),
            mixtures=[{"level": "ffn", "experts": "clusters"}],
        )  # fmt: skip
    with pytest.raises(SourceError, match="no such file or folder"):
        honeloom.glue(tmp_path / "nothing", tmp_path / "out", only="clusters")
    with pytest.raises(ConfigError, match="is a model itself"):
        honeloom.glue(zoo["base"], tmp_path / "out", only="clusters")
    with pytest.raises(HoneloomError, match="no row has it"):
        honeloom.glue(
            zoo["models"], tmp_path / "out", search_rows=str(zoo["search"]), report_rows=str(zoo["report"]),
            target={"weights": {"green": 1}},
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_is_left_out_with_its_reason(zoo: dict[str, Path], tmp_path: Path) -> None:
    for name in ("near-a", "near-b"):
        near(tmp_path / name, zoo["models"] / name, 3, 0.0)
    (tmp_path / "near-b" / "model.safetensors").write_bytes(b"\x10" * 40)
    report = honeloom.glue(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", only="clusters")
    assert report.details["clusters"] == [["near-a"]]
    assert report.details["refused"][0]["model"] == "near-b"
    assert any("near-b is left out" in warning for warning in report.warnings)


@pytest.mark.slow
def test_a_killed_search_ends_as_if_nothing_had_happened(zoo: dict[str, Path], glued: honeloom.Report) -> None:
    out = zoo["root"] / "killed"
    script = (
        "import os, sys, honeloom\n"
        "from honeloom.runs.journal import Journal\n"
        "append, seen = Journal.append, [0]\n"
        "def counted(self, record):\n"
        "    append(self, record)\n"
        "    seen[0] += 'rows' in record and 'key' in record\n"
        "    if seen[0] == 1: os.kill(os.getpid(), 9)\n"
        "Journal.append = counted\n"
        "honeloom.glue(sys.argv[1], sys.argv[2], search_rows=sys.argv[3], report_rows=sys.argv[4], device='cpu',\n"
        "              search={'type': 'average', 'confidence': 0.5})\n"
    )
    given = [str(zoo["models"]), str(out), str(zoo["search"]), str(zoo["report"])]
    killed = subprocess.run([sys.executable, "-c", script, *given], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()[-2000:]
    report = honeloom.glue(
        zoo["models"], out, search_rows=str(zoo["search"]), report_rows=str(zoo["report"]), device="cpu",
        search={"type": "average", "confidence": 0.5},
    )  # fmt: skip
    assert report.artefact is not None and glued.artefact is not None
    assert report.artefact.sha256 == glued.artefact.sha256
    assert (out / "search.jsonl").read_bytes() == (glued.path / "search.jsonl").read_bytes()


def test_the_plan_tells_cost_and_writes_nothing(zoo: dict[str, Path]) -> None:
    out = zoo["root"] / "planned"
    (plan,) = honeloom.plan("glue", output_dir=out, zoo=zoo["models"], search_rows=str(zoo["search"]))
    told = "\n".join(plan.notes)
    assert "models: 4" in told and "left out: notes" in told
    assert "merges tried in memory, at most each: 18" in told  # three of one shape, nine coefficients
    assert "disk: about" in told
    assert not out.exists()


def test_a_mixture_is_not_tuned(zoo: dict[str, Path], tmp_path: Path) -> None:
    experts = [str(zoo["models"] / name) for name in ("near-a", "near-b")]
    mixed = honeloom.mix({"experts": experts, "level": "block", "router": "random"}, tmp_path / "mixed")
    with pytest.raises(HoneloomError, match=r"a mixture \(honeloom_mixture\), and tune does not take one"):
        honeloom.tune(mixed.path, str(zoo["search"]), max_steps=1, output_dir=tmp_path / "tuned")
