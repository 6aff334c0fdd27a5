"""The search of a cluster: in memory and journaled, resumed without measuring again, and what is written of it."""

from __future__ import annotations

import gzip
import json
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from honeloom.backends.hf.live_merge import LiveMerge
from honeloom.backends.hf.score import Scorer
from honeloom.checkpoint.folders import copy_tokenizer
from honeloom.config.base import collect_inputs
from honeloom.data.rowset import RowSet
from honeloom.errors import HoneloomError
from honeloom.merging.config import LinearConfig
from honeloom.merging.engine.sources import ModelSource
from honeloom.merging.merge_config import MergeConfig
from honeloom.merging.search.candidates import Candidate
from honeloom.merging.search.config import (
    AverageConfig,
    CmaConfig,
    CoefficientConfig,
    LayerwiseConfig,
    SimilarityConfig,
)
from honeloom.merging.search.objective import Objective
from honeloom.merging.similarity import Similarity
from honeloom.runs.log import Log, QuietConsole
from honeloom.stages.glue_rows import GlueRows, Part, Scored
from honeloom.stages.inputs import resolve_model, resolve_rows
from honeloom.stages.merge import execute
from honeloom.stages.work import Work
from honeloom.stages.zoo_search import JOURNAL, JournaledPort, open_journal, run_search, search_cluster
from honeloom.zoo.config import GlueConfig

SEARCHES = [
    AverageConfig(), CoefficientConfig(grid=(0.3, 0.6)), SimilarityConfig(grid=(0.3, 0.6)),
    CmaConfig(budget=30), LayerwiseConfig(steps=12, batch=8, checks=3),
]  # fmt: skip
ROWS = 60
WANTED = np.array([0.5, 0.3, 0.2])
OBJECTIVE = Objective(["a", "b", "b"] * (ROWS // 3))


class Killed(Exception):
    """Stands for the end of the process."""


class Noisy:
    """Squared distance from known weights, with noise per row; dies after some calls."""

    models, groups = ("x", "y", "z"), 1

    def __init__(self, calls_left: int = 10**9) -> None:
        self.calls, self.left = 0, calls_left
        self.noise = np.random.default_rng(0).standard_normal((ROWS, 3))

    def _values(self, weights, rows):
        if self.calls == self.left:
            raise Killed
        self.calls += 1
        rows = np.array(rows)
        values = ((weights - WANTED) ** 2).sum() + 0.1 * self.noise[rows] @ weights[0] + self.noise[rows, 0]
        return np.stack([values, 1.0 + rows % 2], axis=1)

    def single(self, model, rows):
        return self._values(np.eye(3)[[model]], rows)

    def measure(self, candidate, rows):
        return self._values(candidate.array, rows)

    def gradient(self, candidate, rows, factors):
        return self._values(candidate.array, rows), factors.sum() * 2 * (candidate.array - WANTED)


def journaled_search(path, search, port, fingerprint="f"):
    with open_journal(path) as (known, keep):
        journaled = JournaledPort(port, fingerprint, known, keep)
        return run_search(journaled, OBJECTIVE, search, LinearConfig(), similarity=np.eye(3), seed=1)


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: s.type)
def test_a_killed_search_goes_on_and_ends_as_one_that_was_not(tmp_path, search):
    whole = Noisy()
    expected = journaled_search(tmp_path / "whole.jsonl", search, whole)
    assert expected == run_search(Noisy(), OBJECTIVE, search, LinearConfig(), similarity=np.eye(3), seed=1)
    for kill in (0, whole.calls // 2, whole.calls - 1):
        path = tmp_path / f"killed{kill}.jsonl"
        with pytest.raises(Killed):
            journaled_search(path, search, Noisy(kill))
        with open(path, "ab") as file:
            file.write(b'{"key": "torn')
        rest = Noisy()
        assert journaled_search(path, search, rest) == expected
        assert rest.calls == whole.calls - kill
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    again = Noisy(0)
    assert journaled_search(tmp_path / "whole.jsonl", search, again) == expected


def test_records_of_other_work_are_left_alone(tmp_path):
    path, port = tmp_path / JOURNAL, Noisy()
    journaled_search(path, AverageConfig(), port, fingerprint="one")
    calls = port.calls
    journaled_search(path, AverageConfig(), port, fingerprint="two")
    assert port.calls == 2 * calls
    path.write_text('{"something": 1}\n')
    with pytest.raises(HoneloomError, match=r"search.jsonl:1: not a record of a measurement"):
        journaled_search(path, AverageConfig(), port)


def test_rows_factors_and_candidates_are_told_apart(tmp_path):
    with open_journal(tmp_path / JOURNAL) as (known, keep):
        port = JournaledPort(Noisy(), "f", known, keep)
        one, two = Candidate.of([[1, 0, 0]]), Candidate.of([[0, 1, 0]])
        assert not np.array_equal(port.measure(one, [0, 1]), port.measure(one, [1, 0]))
        assert not np.array_equal(port.measure(one, [0, 1]), port.measure(two, [0, 1]))
        slopes = [port.gradient(one, [0, 1], np.full(2, factor))[1] for factor in (1.0, 2.0)]
        assert slopes[1] == pytest.approx(2 * slopes[0])
    kinds = [json.loads(line)["kind"] for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert kinds == ["measure"] * 3 + ["gradient"] * 2


# -- the whole stage, on a real model with noise -----------------------------------------------------------------------


def noisy_copy(source, folder, seed, scale):
    """A model's copy with noise on all its matrices."""
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = tensor + scale * tensor.std() * torch.randn(tensor.shape, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    copy_tokenizer(source, folder)
    return folder


class Zoo:
    """Models, rows and settings of one search."""

    def __init__(self, folder, folders, rows, **settings):
        self.folders, self.folder = folders, folder
        self.console = QuietConsole()
        self.said, self.warned = [], []
        self.console.say, self.console.warn = self.said.append, self.warned.append
        self.config = GlueConfig.model_validate(
            {"models": [str(f) for f in folders.values()], "search_rows": [str(rows)], "threads": 1, **settings}
        )
        folder.mkdir(exist_ok=True)
        inputs = {}
        for f in collect_inputs(self.config):
            resolve = resolve_rows if f.kind == "rows" else resolve_model
            inputs[f.place] = resolve(f.value, f.place)
        self.work = Work(self.config, folder, inputs, Log(self.console))
        found = RowSet.scan([f for i in self.work.rows("search_rows") for f in i.files])
        self.rows = GlueRows(Part(rows, found), Part(rows, found), "bits_per_char")
        self.singles = {}
        for name, path in folders.items():
            losses = Scorer.open(path).losses(found)
            self.singles[name] = Scored(np.array([(v.loss_sum / np.log(2), v.chars) for _, v in losses]), {})
        names = tuple(sorted(folders))
        similarity = Similarity(names, {"mlp": np.eye(len(names))})
        self.clusters = SimpleNamespace(measure="weights", similarity=lambda: similarity)

    def search(self, base=None):
        with ExitStack() as stack:
            opened = {n: stack.enter_context(ModelSource(n, p)) for n, p in self.folders.items()}
            origin = stack.enter_context(ModelSource("base", base)) if base else None
            return search_cluster(
                self.work, "cluster-1", opened, origin, self.rows, self.singles, self.clusters
            )  # fmt: skip


@pytest.fixture
def stories(shared_data, tmp_path):
    """Twenty-four short texts of two domains."""
    with gzip.open(shared_data / "text" / "tinystories_valid.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"][:200] for line in file][:24]
    rows = [{"id": f"s{i}", "text": text, "domain": "ab"[i % 2]} for i, text in enumerate(texts)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def copies(stories260k, tmp_path):
    """Two copies with a little noise, and one that is spoilt."""
    scales = {"fair": 0.4, "good": 0.3, "spoilt": 3.0}
    return {n: noisy_copy(stories260k, tmp_path / n, seed, s) for seed, (n, s) in enumerate(scales.items())}


def test_the_noise_of_two_copies_averages_out_and_the_spoilt_one_is_left_out(tmp_path, copies, stories):
    zoo = Zoo(tmp_path / "out", copies, stories, search={"type": "average"})
    found = zoo.search()
    assert found.models == ("good", "fair", "spoilt")
    assert found.taken == ("good", "fair")
    assert found.single is None
    assert found.shares() == {"good": 0.5, "fair": 0.5, "spoilt": 0.0}
    assert found.document == {
        "models": [{"model": str(copies["good"]), "weight": 0.5}, {"model": str(copies["fair"]), "weight": 0.5}],
        "method": {"type": "linear", "normalize": True},
        "seed": 0,
        "chat_template": "auto",
    }
    assert found.found.trace[1].rows < 24 == found.found.trace[0].rows
    assert json.dumps(found.to_json(), allow_nan=False)
    # What was measured in memory is what the written merge scores.
    config = MergeConfig.model_validate(found.document)
    out = tmp_path / "merged"
    out.mkdir()
    execute(Work(config, out, {f.place: resolve_model(f.value, f.place) for f in collect_inputs(config)}, zoo.work.log))
    losses = Scorer.open(out).losses(zoo.rows.search.rows)
    values = np.array([(v.loss_sum / np.log(2), v.chars) for _, v in losses])
    scored = Objective(zoo.rows.search.domains).estimate(values, np.arange(24))
    assert scored.value == pytest.approx(found.found.value.value, rel=1e-6)


def test_a_kill_within_the_stage_changes_nothing(tmp_path, copies, stories, monkeypatch):
    settings = {"search": {"type": "cma", "budget": 14, "groups": 2}}
    expected = Zoo(tmp_path / "whole", copies, stories, **settings).search()
    measure, calls = LiveMerge.measure, []

    def dies(self, candidate, rows):
        if len(calls) == 9:
            raise Killed
        calls.append(len(rows))
        return measure(self, candidate, rows)

    zoo = Zoo(tmp_path / "killed", copies, stories, **settings)
    monkeypatch.setattr(LiveMerge, "measure", dies)
    with pytest.raises(Killed):
        zoo.search()
    monkeypatch.undo()
    found = zoo.search()
    assert found == expected
    journals = [(tmp_path / name / JOURNAL).read_bytes() for name in ("whole", "killed")]
    assert journals[0] == journals[1]


def test_layerwise_learns_weights_per_layer_on_the_real_model(tmp_path, copies, stories):
    search = {"type": "layerwise", "steps": 6, "lr": 0.1, "batch": 12, "checks": 2}
    found = Zoo(tmp_path / "out", copies, stories, search=search).search()
    assert found.single is None
    table = found.found.candidate.array
    assert table.shape == (6, 3)  # five layers and the rest
    assert (table[:, 2] < 0.05).all()  # the spoilt copy
    assert found.document["models"][0]["weight"][0]["filter"] == "model.layers."


def test_the_best_single_model_is_returned_where_no_merge_is_better(tmp_path, stories260k, stories):
    folders = {
        n: noisy_copy(stories260k, tmp_path / n, i, s) for i, (n, s) in enumerate({"own": 0.0, "bad": 3.0}.items())
    }
    zoo = Zoo(tmp_path / "out", folders, stories, search={"type": "coefficient", "grid": [0.5, 0.9]})
    found = zoo.search()
    assert (found.single, found.taken) == ("own", ("own",))
    assert found.document["models"] == [{"model": str(folders["own"])}]
    assert "search: no merge is better than own alone beyond noise" in zoo.said


def test_task_vectors_need_a_base_of_the_same_shape(tmp_path, stories260k, copies, stories, tiny_model):
    settings = {"search": {"type": "coefficient", "grid": [0.5]}, "method": "task_arithmetic"}
    zoo = Zoo(tmp_path / "out", copies, stories, base=str(stories260k), **settings)
    found = zoo.search(stories260k)
    assert found.document["base_model"] == str(stories260k)
    assert found.document["method"]["type"] == "task_arithmetic"
    other = Zoo(tmp_path / "other", copies, stories, base=str(tiny_model), **settings)
    found = other.search(tiny_model)
    assert "base_model" not in found.document
    assert found.document["method"]["type"] == "linear"
    assert any("the base does not fit" in text and "linear" in text for text in other.warned)
