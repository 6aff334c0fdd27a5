"""Each verb on small real inputs: the contract's files and keys, and what plain libraries make of the result."""

import json
import math
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import honeloom
from honeloom import lab
from honeloom.errors import ConfigError, InputError, OutputExistsError, RowsError, SourceError, TemplateError
from honeloom.stages import evaluate as evaluating
from honeloom.stages.rows import convert, place_of, preview

SIDE_FILES = {
    "report.json", "recipe.lock.yaml", "inputs.json", "environment.json", "events.jsonl", "README.md", "manifest.json",
    "report.html",
}  # fmt: skip
IDS = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def plain(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def picked(out):
    return honeloom.select("lab:pool", method="ifd", model="lab:base", keep="10%", limit=200, output_dir=out / "pick")


@pytest.fixture(scope="module")
def tuned(out, picked):
    return honeloom.tune("lab:base", out / "pick", max_steps=6, lr=5e-3, batch_size=8, output_dir=out / "tuned")


@pytest.fixture(scope="module")
def merged(out, tuned):
    config = {
        "base_model": "lab:base", "models": [{"model": str(out / "tuned"), "weight": 0.5}], "method": "task_arithmetic",
        "dtype": "fp32",
    }  # fmt: skip
    return honeloom.merge(config, out / "merged")


@pytest.fixture(scope="module")
def dropped(out, merged):
    return honeloom.drop(out / "merged", out / "dropped", attention=1, block=1, calibration="lab:dev", samples=16)


def test_select_writes_the_contract(out, picked):
    names = {p.name for p in (out / "pick").iterdir()}
    assert names == SIDE_FILES | {
        "selected.jsonl",
        "rejected.parquet",
        "scores.parquet",
        "clusters.parquet",
        "evaluations.jsonl",
    }
    assert {"rows_in", "rows_usable", "rows_kept", "method", "evaluations", "noise"} <= set(picked.details)
    usable = picked.details["rows_usable"]
    assert picked.details["rows_in"] == 200
    assert picked.details["rows_kept"] == math.floor(usable * 0.1 + 0.5)
    scores = pq.read_table(out / "pick" / "scores.parquet")
    assert {"id", "score", "stderr", "count", "cluster"} <= set(scores.column_names)
    assert scores.num_rows == usable
    kept = [json.loads(line)["id"] for line in (out / "pick" / "selected.jsonl").read_text().splitlines()]
    flags = dict(zip(scores["id"].to_pylist(), scores["selected"].to_pylist(), strict=True))
    assert kept == [i for i, chosen in flags.items() if chosen]


def test_token_budget_is_respected(tmp_path):
    report = honeloom.select("lab:dev", keep="200tok", model="lab:base", output_dir=tmp_path / "o")
    scorer_tokens = 0
    from honeloom.backends.hf.load import load_tokenizer

    tokenizer = load_tokenizer(lab.base_path())
    for line in (tmp_path / "o" / "selected.jsonl").read_text().splitlines():
        row = json.loads(line)
        scorer_tokens += len(tokenizer(f"{row['instruction']}\n{row['output']}", add_special_tokens=False)["input_ids"])
    assert 150 < scorer_tokens <= 200
    assert report.details["rows_kept"] > 1


def test_split_is_by_the_hash_of_the_id(tmp_path):
    report = honeloom.select("lab:dev", keep="100%", split=(0.625, 1.0), output_dir=tmp_path / "o")
    import hashlib

    ids = [json.loads(line)["id"] for line in (tmp_path / "o" / "selected.jsonl").read_text().splitlines()]
    assert all(hashlib.sha256(i.encode()).hexdigest()[-1] in "abcdef" for i in ids)
    expected = sum(hashlib.sha256(r["id"].encode()).hexdigest()[-1] in "abcdef" for r in lab.rows("dev"))
    assert report.details["rows_kept"] == expected
    assert 0 <= place_of("x") < 1


def test_tuned_adapter_loads_in_plain_peft(out, tuned):
    names = {p.name for p in (out / "tuned").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "training_rows.parquet"} <= names
    assert not any(n.startswith("checkpoint") for n in names)
    assert tuned.artefact.kind == "adapter"
    assert {"steps", "tokens", "label_share", "train_loss"} <= set(tuned.details)
    by_peft = PeftModel.from_pretrained(plain(lab.base_path()), out / "tuned")
    ours = honeloom.load_model(out / "tuned")
    assert torch.equal(logits(by_peft), logits(ours))
    assert not torch.equal(logits(ours), logits(plain(lab.base_path())))


def test_full_tuning_gives_a_plain_model(tmp_path, out, picked):
    report = honeloom.tune("lab:base", out / "pick", method="full", max_steps=2, output_dir=tmp_path / "full")
    assert report.artefact.kind == "model"
    assert torch.isfinite(logits(plain(tmp_path / "full"))).all()
    assert "base_model_relation" not in (tmp_path / "full" / "README.md").read_text()  # no hub parent to name


def test_merged_model_is_base_plus_half_the_adapter(out, merged):
    base, adapter = plain(lab.base_path()), PeftModel.from_pretrained(plain(lab.base_path()), out / "tuned")
    full = adapter.merge_and_unload().state_dict()
    for name, tensor in plain(out / "merged").state_dict().items():
        start = base.state_dict()[name]
        assert torch.allclose(tensor, start + 0.5 * (full[name] - start), atol=1e-6), name
    assert {"method", "donor", "lost_delta_fraction", "bytes_read", "bytes_written"} <= set(merged.details)
    assert (out / "merged" / "merge.yaml").exists()


def test_dropped_model_is_the_source_without_those_sublayers(out, dropped):
    plan = json.loads((out / "dropped" / "drop_plan.json").read_text())
    assert set(plan) == {"attention", "mlp", "block", "metric", "profile"}
    assert len(plan["attention"]) == len(plan["block"]) == 1
    scores = json.loads((out / "dropped" / "scores.json").read_text())
    assert set(scores) == {"attention", "mlp", "block"}
    assert set(scores["mlp"][0]) == {"layer", "value", "stderr"}
    for key in ("params", "kv_bytes_per_token", "flops_per_token"):
        assert set(dropped.details[key]) == {"before", "after"}
    reference = plain(out / "merged")

    def silence(module, args, output):
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    for i in plan["attention"] + plan["block"]:
        reference.model.layers[i].self_attn.register_forward_hook(silence)
    for i in plan["mlp"] + plan["block"]:
        reference.model.layers[i].mlp.register_forward_hook(silence)
    assert torch.equal(logits(reference), logits(plain(out / "dropped")))


def test_the_planted_attentions_are_dropped_first(tmp_path):
    report = honeloom.drop("lab:base", tmp_path / "d", attention=2, calibration="lab:dev", samples=64)
    assert report.details["plan"]["attention"] == list(lab.PLANTED_LAYERS)


def test_evaluate_against_a_model_and_against_its_own_record(tmp_path, out, tuned):
    first = honeloom.evaluate("lab:base", rows="lab:dev", limit=60, output_dir=tmp_path / "before")
    live = honeloom.evaluate(out / "tuned", rows="lab:dev", limit=60, against="lab:base")
    stored = honeloom.evaluate(out / "tuned", rows="lab:dev", limit=60, against=tmp_path / "before")
    for key in ("difference", "ci95", "n", "metric"):
        assert live.details["against"][key] == stored.details["against"][key]
    gap = live.metric("loss").value - first.metric("loss").value
    assert live.details["against"]["difference"] == pytest.approx(gap, abs=1e-9)
    low, high = live.details["against"]["ci95"]
    assert low < gap < high
    assert live.out is None
    table = pq.read_table(tmp_path / "before" / "examples.parquet")
    assert {"id", "domain", "loss_sum", "tokens", "chars", "correct"} <= set(table.column_names)
    assert first.metric("loss").value == pytest.approx(
        np.sum(table["loss_sum"].to_numpy()) / np.sum(table["tokens"].to_numpy())
    )


def test_evaluate_macro_is_the_mean_of_domains():
    report = honeloom.evaluate("lab:base", rows="lab:dev", limit=60)
    domains = [m.value for m in report.metrics if m.name == "loss" and m.domain not in ("all", "macro")]
    assert len(domains) > 4
    assert report.metric("loss", "macro").value == pytest.approx(sum(domains) / len(domains))


def test_training_rows_in_the_evaluation_are_reported(out, tuned):
    report = honeloom.evaluate(out / "tuned", rows=out / "pick" / "selected.jsonl")
    assert report.details["overlap"]["rows"] == report.details["rows"]
    assert any("tuned on" in w for w in report.warnings)
    clean = honeloom.evaluate(out / "tuned", rows="lab:dev", limit=20)
    assert clean.details["overlap"]["rows"] < 20


def test_overlap_follows_the_chain_through_merge_and_drop(out, dropped):
    report = honeloom.evaluate(out / "dropped", rows=out / "pick" / "selected.jsonl", limit=5)
    assert report.details["overlap"]["rows"] == 5


def test_lm_eval_runs_a_local_task(tmp_path):
    rows = [{"q": f"Add {i} and 1.", "choices": ["zz", str(i + 1)], "gold": 1} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "adding.yaml").write_text(
        f"task: adding\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    report = honeloom.evaluate("lab:base", tasks=["adding"], task_path=str(tmp_path), limit=6)
    metric = report.metric("acc", "adding")
    assert metric.n == 6
    assert 0 <= metric.value <= 1
    with pytest.raises(ConfigError, match="did you mean 'adding'"):
        honeloom.evaluate("lab:base", tasks=["ading"], task_path=str(tmp_path))


def test_stories_loss_is_the_published_one(shared_data):
    rows = shared_data / "text" / "tinystories_valid.jsonl.gz"
    report = honeloom.evaluate(shared_data / "models" / "stories260k", rows=rows)
    assert report.metric("loss").value == pytest.approx(1.503, abs=0.002)  # scoring the EOS would give 1.553
    assert report.metric("bits_per_char").value == pytest.approx(1.089, abs=0.002)


def test_bad_input_says_what_to_do(tmp_path, out, tuned):
    with pytest.raises(ConfigError, match="needs a model"):
        honeloom.select("lab:dev", method="ifd", output_dir=tmp_path / "o")
    with pytest.raises(ConfigError, match="is an adapter; merge it"):
        honeloom.tune(out / "tuned", "lab:dev", output_dir=tmp_path / "o")
    with pytest.raises(ConfigError, match="at most 7"):
        honeloom.drop("lab:base", tmp_path / "o", attention=9, calibration="lab:dev", samples=2)
    with pytest.raises(RowsError, match="budget"):
        honeloom.select("lab:dev", keep="1tok", model="lab:base", output_dir=tmp_path / "o")
    done = honeloom.evaluate("lab:base", rows="lab:dev", limit=5, output_dir=tmp_path / "dev")
    with pytest.raises(InputError, match="shares 0 rows"):
        honeloom.evaluate("lab:base", rows="lab:test", limit=5, against=done.out)
    bare = tmp_path / "bare"
    plain(lab.base_path()).save_pretrained(bare)
    with pytest.raises(SourceError, match="no tokenizer"):
        honeloom.evaluate(bare, rows="lab:dev")
    assert not (tmp_path / "o").exists()
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_model_without_tokenizer_can_be_merged(tmp_path):
    bare = tmp_path / "bare"
    plain(lab.base_path()).save_pretrained(bare)
    report = honeloom.merge({"models": [str(bare), str(bare)]}, tmp_path / "m")
    assert report.status == "ok"
    assert not (tmp_path / "m" / "tokenizer.json").exists()


def test_same_seed_same_bytes(tmp_path, out, picked):
    digests = []
    for name in ("one", "two"):
        report = honeloom.tune("lab:base", out / "pick", max_steps=3, seed=5, output_dir=tmp_path / name)
        digests.append(report.artefact.sha256)
    assert digests[0] == digests[1]


def test_preview_fails_where_no_row_keeps_its_turn_end():
    shown = preview(["lab:dev"], "lab:base", count=3, limit=None, max_length=None)
    assert shown["ends"] == shown["rows"] == 3
    with pytest.raises(TemplateError, match="3 are cut at 6 tokens: raise --max-length"):
        preview(["lab:dev"], "lab:base", count=3, limit=None, max_length=6)


def test_convert_names_the_users_file_and_writes_gzip(tmp_path):
    written, _ = convert(["lab:dev"], tmp_path / "o.jsonl.gz", to="messages", limit=5, overwrite=False)
    assert written == 5
    assert honeloom.select(tmp_path / "o.jsonl.gz", keep="100%", output_dir=tmp_path / "s").details["rows_in"] == 5
    with pytest.raises(ConfigError, match=r"cannot write rows to o\.csv;"):
        convert(["lab:dev"], tmp_path / "o.csv", to="messages", limit=5, overwrite=False)
    with pytest.raises(OutputExistsError, match="is a folder"):
        convert(["lab:dev"], tmp_path / "s", to="messages", limit=5, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"o.jsonl.gz", "s"}


def test_counts_that_no_method_made_are_null(out, picked):
    table = pq.read_table(out / "pick" / "scores.parquet")
    assert table["count"].null_count == table["stderr"].null_count == table.num_rows
    assert str(table.schema.field("count").type) == "int64"


def test_cut_rows_are_counted_and_not_ranked(tmp_path):
    options = {"limit": 60, "max_length": 24}
    picked = honeloom.select(
        "lab:dev", method="ifd", model="lab:base", keep="10%", output_dir=tmp_path / "o", **options
    )
    table = pq.read_table(tmp_path / "o" / "scores.parquet").to_pylist()
    cut = [row for row in table if row["truncated"]]
    assert 0 < len(cut) < len(table)
    assert all(row["score"] is None and not row["selected"] for row in cut)
    assert any(f"{len(cut)} rows were cut at 24 tokens" in w for w in picked.warnings)
    report = honeloom.evaluate("lab:base", rows="lab:dev", **options)
    assert any(f"{len(cut)} of {report.details['rows']} rows were cut at 24 tokens" in w for w in report.warnings)


def domains_of(report):
    return [m.domain for m in report.metrics if m.name == "loss"]


def test_domains_named_as_the_summaries_keep_their_numbers(tmp_path):
    rows = tmp_path / "rows.jsonl"
    names = ["all", "macro", "c"] * 2
    records = ({"instruction": f"Say {i}.", "output": "It. " * (i + 1), "domain": d} for i, d in enumerate(names))
    rows.write_text("".join(json.dumps(r) + "\n" for r in records))
    report = honeloom.evaluate("lab:base", rows=rows)
    assert domains_of(report) == ["all (domain)", "c", "macro (domain)", "all", "macro"]
    assert report.metric("loss").n == 6


def test_small_domains_are_put_together(monkeypatch):
    whole = honeloom.evaluate("lab:base", rows="lab:dev", limit=60, against="lab:base")
    monkeypatch.setattr(evaluating, "MAX_DOMAINS", 2)
    folded = honeloom.evaluate("lab:base", rows="lab:dev", limit=60, against="lab:base")
    assert len(domains_of(folded)) == 5
    assert "other" in domains_of(folded)
    assert folded.metric("loss", "macro") == whole.metric("loss", "macro")
    assert sum(m.n for m in folded.metrics if m.name == "loss" and m.domain not in ("all", "macro")) == 60
    assert len(folded.details["against"]["domains"]) <= 3 < len(whole.details["against"]["domains"])


def test_rows_without_counterpart_are_told(tmp_path):
    honeloom.evaluate("lab:base", rows="lab:dev", limit=20, output_dir=tmp_path / "few")
    report = honeloom.evaluate("lab:base", rows="lab:dev", limit=30, against=tmp_path / "few")
    assert report.details["against"]["n"] == 20
    assert report.details["against"]["unmatched"] == 10
    assert any("10 rows of the two evaluations have no counterpart" in w for w in report.warnings)


def test_models_of_other_tokenizers_are_compared_per_character(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(lab.base_path(), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {t: i for t, i in vocabulary.items() if len(t) < 3 or t.startswith("<|")}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    report = honeloom.evaluate("lab:base", rows="lab:dev", limit=40, against=other)
    against = report.details["against"]
    assert against["metric"] == "bits_per_char"
    assert "bits/char" in against["sentence"]
    mine, theirs = (
        honeloom.evaluate(m, rows="lab:dev", limit=40).metric("bits_per_char").value for m in ("lab:base", other)
    )
    assert against["unmatched"] == 0
    assert against["difference"] == pytest.approx(mine - theirs, abs=1e-9)
