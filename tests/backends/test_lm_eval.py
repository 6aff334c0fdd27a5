"""What becomes of lm-eval's result."""

import json

import pytest

import honeloom
from honeloom.errors import ConfigError

lm_eval = pytest.importorskip("honeloom.backends.lm_eval")

RESULTS = {
    "results": {
        "sums": {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "adding": {"alias": "adding", "acc,none": 0.25, "bits_per_byte,none": 1.5},
        "taking": {"alias": "taking", "acc,none": 0.75, "word_perplexity,none": 9.0, "odd,none": 3.0},
    },
    "group_subtasks": {"sums": ["adding", "taking"]},
    "higher_is_better": {"taking": {"word_perplexity": False}},
    "n-samples": {"adding": {"effective": 4}, "taking": {"effective": 6}},
}


def test_a_group_gives_its_own_metrics_and_those_of_its_tasks():
    found = {(m.domain, m.name): m for m in lm_eval._all_metrics(["sums"], RESULTS)}
    assert {domain for domain, _ in found} == {"sums", "adding", "taking"}
    assert (found["sums", "acc"].n, found["sums", "acc"].stderr) == (10, 0.1)


def test_units_are_those_of_the_metric():
    units = {m.name: m.unit for m in lm_eval._all_metrics(["sums"], RESULTS)}
    assert units == {"acc": "share", "bits_per_byte": "bits/byte", "word_perplexity": "perplexity", "odd": ""}


def test_a_name_without_result_is_refused():
    with pytest.raises(ConfigError, match="no result for 'nothing', but for sums, adding, taking"):
        lm_eval._all_metrics(["nothing"], RESULTS)


def test_groups_run_and_tags_are_refused(tmp_path):
    rows = [{"q": f"Add {i} and 1.", "choices": ["zz", str(i + 1)], "gold": 1} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "adding.yaml").write_text(
        "task: adding\ntag: plus\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "sums.yaml").write_text("group: sums\ntask: [adding]\n")
    report = honeloom.evaluate("lab:base", tasks=["sums"], task_path=str(tmp_path))
    assert report.metric("acc", "adding").n == 4
    with pytest.raises(ConfigError, match="'plus' is a tag"):
        honeloom.evaluate("lab:base", tasks=["plus"], task_path=str(tmp_path))
