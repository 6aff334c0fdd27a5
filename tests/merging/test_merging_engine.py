"""The engine: same bytes however it is run, bounded memory, and nothing merged that does not belong together."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from merging_models import SETTINGS, edit_json, edit_weights, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import honeloom
from honeloom.checkpoint.writer import Progress, TensorStream, write_checkpoint
from honeloom.errors import CheckpointError, ConfigError, IncompatibleModelsError, NotFiniteError
from honeloom.merging.config import TiesConfig
from honeloom.merging.engine.layout import Part
from honeloom.merging.engine.streaming import CHUNK, chunk_elements
from honeloom.registry import family

EVERY = [name for name in family("merging").names() if name not in ("fisher", "regmean")]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def listed(models: dict[str, Path], method: str) -> dict:
    """A merge that a method accepts."""
    config = family("merging").load_config(method)
    alone = config.counts[1] == 1 or (config.base == "start")
    if method == "passthrough":
        return {"models": [models["a"]], "method": method}
    names = ["a"] if alone else ["a", "b"]
    return {"models": [models[n] for n in names], "method": method, "base_model": models["base"]}


@pytest.mark.parametrize("method", EVERY)
def test_chunks_and_threads_change_no_byte(models, merge, method, monkeypatch):
    digests = set()
    for chunk, threads in ((37, 1), (4096, 2), (1 << 30, 3)):
        monkeypatch.setattr("honeloom.stages.merge_inputs.chunk_elements", lambda *_, c=chunk, t=threads, **__: (c, t))
        outcome = merge(**listed(models, method), dtype="bf16")
        assert all(check.passed for check in outcome.checks)
        digests.add(digest(merge.out))
    assert len(digests) == 1


MERGE_ALL = """
import json, sys
import honeloom
for name, settings in json.load(open(sys.argv[1])).items():
    honeloom.merge(settings, f"{sys.argv[2]}/{name}", threads=int(sys.argv[3]))
"""


@pytest.mark.slow
def test_hash_seed_and_thread_count_change_no_byte(tmp_path, models):
    documents = {method: listed(models, method) for method in ("linear", "dare_ties", "sce", "karcher")}
    (tmp_path / "merges.json").write_text(json.dumps(documents, default=str))
    digests = set()
    for seed, threads in (("0", "1"), ("1", "2")):
        out = tmp_path / f"out-{seed}"
        subprocess.run(
            [sys.executable, "-c", MERGE_ALL, str(tmp_path / "merges.json"), str(out), threads],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}, check=True,
        )  # fmt: skip
        digests.add(tuple(digest(out / method) for method in documents))
    assert len(digests) == 1


def test_another_seed_draws_other_entries(models, merge):
    digests = set()
    for seed in (0, 1):
        merge(**listed(models, "dare_linear"), seed=seed)
        digests.add(digest(merge.out))
    assert len(digests) == 2


def test_a_gradient_goes_from_the_first_layer_to_the_last(tmp_path, merge):
    a, b = (make_model(tmp_path / n, s, num_hidden_layers=5) for n, s in (("a", 1), ("b", 2)))
    models = [{"model": a, "weight": [1, 0]}, {"model": b, "weight": [0, 1]}]
    merge(models=models)
    one, two, got = weights_of(a), weights_of(b), merge.tensors()
    for name, tensor in got.items():
        layer = int(name.split(".")[2]) if ".layers." in name else {"model.embed_tokens.weight": 0}.get(name, 4)
        t = layer / 4
        wanted = one[name].double() * (1 - t) + two[name].double() * t
        torch.testing.assert_close(tensor, wanted.float(), rtol=1e-6, atol=1e-9)


def test_mergekit_counts_the_head_as_the_first_layer(tmp_path, merge):
    a, b = (make_model(tmp_path / n, s) for n, s in (("a", 1), ("b", 2)))
    settings = {"merge_method": "slerp", "base_model": str(a), "models": [{"model": str(a)}, {"model": str(b)}],
                "parameters": {"t": [0, 1]}}  # fmt: skip
    merge(**settings, compat="mergekit")
    assert torch.equal(merge.tensors()["lm_head.weight"], weights_of(a)["lm_head.weight"])
    merge(**settings)
    assert torch.equal(merge.tensors()["lm_head.weight"], weights_of(b)["lm_head.weight"])
    assert any("the first" in str(m) for m in merge.said)


def test_the_first_filter_that_matches_counts_and_a_model_beats_the_method(models, merge):
    method = {"type": "passthrough", "scale": [{"filter": "mlp", "value": 2.0}, {"filter": "proj", "value": 3.0}, 5.0]}
    merge(models=[models["a"]], method=method)
    a, got = weights_of(models["a"]), merge.tensors()
    for name, tensor in got.items():
        assert torch.equal(tensor, a[name] * (2 if "mlp" in name else 3 if "proj" in name else 5)), name
    merge(models=[{"model": models["a"], "scale": 7.0}], method=method)
    assert torch.equal(merge.tensors()["lm_head.weight"], a["lm_head.weight"] * 7)


def test_stacked_layers(tmp_path, merge):
    a = make_model(tmp_path / "a", 1, num_hidden_layers=3)
    b = make_model(tmp_path / "b", 2, num_hidden_layers=4)
    slices = [{"sources": [{"model": str(a), "layer_range": [0, 2]}]},
              {"sources": [{"model": str(b), "layer_range": [1, 4]}]}]  # fmt: skip
    merge(slices=slices, method="passthrough")
    one, two, got = weights_of(a), weights_of(b), merge.tensors()
    assert json.loads((merge.out / "config.json").read_text())["num_hidden_layers"] == 5
    for layer, (source, old) in enumerate(((one, 0), (one, 1), (two, 1), (two, 2), (two, 3))):
        name = "self_attn.q_proj.weight"
        assert torch.equal(got[f"model.layers.{layer}.{name}"], source[f"model.layers.{old}.{name}"])
    assert torch.equal(got["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    assert torch.equal(got["lm_head.weight"], two["lm_head.weight"])
    model = AutoModelForCausalLM.from_pretrained(merge.out)
    assert len(model.model.layers) == 5


def test_a_stack_of_all_layers_is_the_model_itself(models, merge):
    merge(slices=[{"sources": [{"model": str(models["a"]), "layer_range": [0, 2]}]}], method="passthrough")
    assert digest(merge.out) == digest_of_tensors(models["a"], merge.out)


def digest_of_tensors(model: Path, out: Path) -> str:
    assert all(torch.equal(weights_of(model)[n], t) for n, t in weights_of(out).items())
    return digest(out)


def test_zeroed_outputs_make_a_layer_the_identity(models, merge):
    """Golden: scale 0 on o_proj and down_proj of one layer leaves the residual stream as it is."""
    scale = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, 1.0]
    first, second = ([{"model": str(models["a"]), "layer_range": [i, i + 1]}] for i in (0, 1))
    whole = [{"sources": first}, {"sources": second, "parameters": {"scale": scale}}]
    merge(slices=whole, method="passthrough")
    zeroed = AutoModelForCausalLM.from_pretrained(merge.out)
    merge(slices=whole[:1], method="passthrough")
    short = AutoModelForCausalLM.from_pretrained(merge.out)
    ids = torch.arange(10).unsqueeze(0)
    torch.testing.assert_close(zeroed(ids).logits, short(ids).logits, rtol=0, atol=1e-6)


def test_slices_take_task_vectors_from_the_base(models, merge):
    """A slice may list the base for its layers; it is no model of the merge."""
    both = [{"model": str(models[n]), "layer_range": [0, 2]} for n in ("base", "a", "b")]
    merge(slices=[{"sources": both}], method="task_arithmetic", base_model=models["base"])
    sliced = merge.tensors()
    merge(models=[models["a"], models["b"]], method="task_arithmetic", base_model=models["base"])
    assert all(torch.equal(sliced[n], t) for n, t in merge.tensors().items())


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([[("a", 0, 3)]], r"layer_range \[0, 3\] of .*, which has 2 layers"),
        ([[("a", 1, 1)]], r"0 <= first < end"),
        ([[("a", 0, 1), ("b", 0, 2)]], r"sources have \[1, 2\] layers"),
    ],
)
def test_wrong_slices(models, merge, slices, message):
    written = [{"sources": [{"model": str(models[m]), "layer_range": [i, j]} for m, i, j in s]} for s in slices]
    with pytest.raises((IncompatibleModelsError, ValueError), match=message):
        merge(slices=written, method="passthrough" if len(slices[0]) == 1 else "linear")


def test_stochastic_rounding_keeps_small_changes_on_average(tmp_path, merge):
    base, tuned = (make_model(tmp_path / n, 0) for n in ("base", "tuned"))
    for folder in (base, tuned):
        edit_weights(folder, lambda ts: ts.update({n: torch.ones_like(t) for n, t in ts.items()}))
    edit_weights(tuned, lambda ts: ts.update({n: t * 1.001 for n, t in ts.items()}))
    settings = {"models": [tuned], "base_model": base, "method": "task_arithmetic", "dtype": "bf16"}
    nearest = merge(**settings)
    assert nearest.details["lost_delta_fraction"] == 1.0
    outcome = merge(**settings, rounding="stochastic")
    assert all(check.passed for check in outcome.checks)
    values = torch.cat([t.double().flatten() for t in merge.tensors().values()])
    assert set(values.unique().tolist()) == {1.0, 1.0078125}
    assert float(values.mean()) == pytest.approx(1.001, abs=2e-4)
    again = digest(merge.out)
    merge(**settings, rounding="stochastic")
    assert digest(merge.out) == again


def test_equal_tensors_are_copied_byte_for_byte(tmp_path, merge):
    a = make_model(tmp_path / "a", 1, torch.bfloat16)
    b = make_model(tmp_path / "b", 1, torch.bfloat16)
    edit_weights(b, lambda ts: ts["lm_head.weight"].mul_(2))
    outcome = merge(models=[a, b])
    got = merge.tensors()
    assert all(torch.equal(got[n], t) for n, t in weights_of(a).items() if n != "lm_head.weight")
    assert outcome.checks[1].passed


def test_block_wise_fp8(tmp_path, models, merge):
    """As DeepSeek-V3 stores it: float8 matrices and one scale per block."""
    folder = make_model(tmp_path / "fp8", 3)
    name = "model.layers.0.mlp.up_proj.weight"  # (48, 32)
    scales = torch.tensor([[0.5, 2.0], [1.0, 4.0], [0.25, 8.0]])

    def quantise(ts):
        ts[name] = (ts[name] * 64).to(torch.float8_e4m3fn)
        ts[f"{name}_scale_inv"] = scales

    edit_weights(folder, quantise)
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    outcome = merge(models=[folder, models["a"]])
    stored = load_file(folder / "model.safetensors")[name].double()
    meant = stored * scales.double().repeat_interleave(16, 0).repeat_interleave(16, 1)
    wanted = (meant + weights_of(models["a"])[name].double()) / 2
    assert torch.equal(merge.tensors()[name], wanted.to(torch.float32))
    assert "quantization_config" not in json.loads((merge.out / "config.json").read_text())
    assert all(check.passed for check in outcome.checks)
    AutoModelForCausalLM.from_pretrained(merge.out)
    edit_weights(folder, lambda ts: ts.update({f"{name}_scale_inv": scales[:2].clone()}))
    with pytest.raises(CheckpointError, match="scale_inv' has shape"):
        merge(models=[folder, models["a"]])


def test_experts_of_a_mixture(tmp_path, merge):
    def mixture(name: str, seed: int) -> Path:
        torch.manual_seed(seed)
        config = MixtralConfig(**{**SETTINGS, "num_local_experts": 3, "num_experts_per_tok": 2})
        MixtralForCausalLM(config).save_pretrained(tmp_path / name)
        return tmp_path / name

    a, b = mixture("a", 1), mixture("b", 2)
    outcome = merge(models=[a, b], method="slerp")
    assert all(check.passed for check in outcome.checks)
    merged = merge.tensors()
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight" in merged  # the names that other runtimes look for
    MixtralForCausalLM.from_pretrained(merge.out).save_pretrained(tmp_path / "again")
    again = weights_of(tmp_path / "again")
    assert merged.keys() == again.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in again.items())
    edit_json(b / "config.json", num_experts_per_tok=1)
    with pytest.raises(IncompatibleModelsError, match=r"num_experts_per_tok is 2 and 1.*accept"):
        merge(models=[a, b])
    merge(models=[a, b], accept=["num_experts_per_tok"])
    assert json.loads((merge.out / "config.json").read_text())["num_experts_per_tok"] == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["linear", "ties", "della", "passthrough"])
def test_nan_and_infinity_name_model_and_tensor(models, merge, method, value):
    edit_weights(models["a"], lambda ts: ts["model.layers.1.mlp.up_proj.weight"].view(-1).__setitem__(7, value))
    with pytest.raises(NotFiniteError, match=r"a: tensor 'model\.layers\.1\.mlp\.up_proj\.weight'.*element 7"):
        merge(**listed(models, method))


def test_integer_tensors_pass_if_equal(models, merge):
    for name in ("a", "b"):
        edit_weights(models[name], lambda ts: ts.update({"model.layers.0.self_attn.steps": torch.arange(5)}))
    merge(models=[models["a"], models["b"]])
    assert merge.tensors()["model.layers.0.self_attn.steps"].tolist() == [0, 1, 2, 3, 4]
    edit_weights(models["b"], lambda ts: ts["model.layers.0.self_attn.steps"].add_(1))
    with pytest.raises(IncompatibleModelsError, match="cannot be averaged"):
        merge(models=[models["a"], models["b"]])


def test_a_quantised_model_is_refused(models, merge):
    edit_json(models["b"] / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="quantised"):
        merge(models=[models["a"], models["b"]])


def test_a_plug_in_is_a_plain_function(models, merge, monkeypatch):
    registry = family("merging")
    monkeypatch.setattr("honeloom.stages.merge_inputs.family", lambda kind: _Median(registry))
    outcome = merge(models=[models["a"], models["b"], models["base"]])
    stacked = {n: torch.stack([weights_of(models[m])[n] for m in ("a", "b", "base")]) for n in merge.tensors()}
    assert all(torch.equal(t, stacked[n].median(dim=0).values) for n, t in merge.tensors().items())
    assert all(check.passed for check in outcome.checks)


class _Median:
    def __init__(self, registry) -> None:
        self.registry = registry

    def load(self, name):
        return lambda tensors, weights, base=None, normalize=True: torch.stack(list(tensors)).median(dim=0).values


def part(elements: int) -> Part:
    from honeloom.checkpoint.headers import TensorInfo

    info = TensorInfo("w", "BF16", (elements,), 0, 2 * elements)
    return Part("w", info, (("models.0", "w"), ("models.1", "w")), (1.0, 1.0), "w", {})


def test_a_budget_lowers_pieces_and_threads_and_is_refused_where_too_small():
    parts, method = [part(1 << 28)], TiesConfig()
    assert chunk_elements(parts, method, budget=None, resident=0, threads=2) == (CHUNK, 2)
    chunk, threads = chunk_elements(parts, method, budget=100 << 20, resident=0, threads=2)
    assert chunk < CHUNK
    assert threads == 2
    with pytest.raises(ConfigError, match=r"max_memory 1,048,576: .* takes at least"):
        chunk_elements(parts, method, budget=1 << 20, resident=0, threads=2)
    whole = family("merging").load_config("iso_c")()
    with pytest.raises(ConfigError, match="takes at least"):
        chunk_elements(parts, whole, budget=1 << 30, resident=0, threads=2)


LIMITED = """
import resource, sys
from honeloom.cli.main import main
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
main()
"""


@pytest.mark.slow
def test_three_models_larger_than_the_memory_allowed(tmp_path):
    """Each has 1 GB of weights; the process may hold 700 MB of data, its libraries included."""
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 4096}
    config = {**SETTINGS, **sizes, "num_attention_heads": 8, "num_key_value_heads": 8}
    first = make_model(tmp_path / "m0", 0, torch.bfloat16, **config)
    weights = load_file(first / "model.safetensors")
    for i in (1, 2):
        folder = tmp_path / f"m{i}"
        folder.mkdir()
        (folder / "config.json").write_bytes((first / "config.json").read_bytes())
        moved = {n: t + 0.001 * i for n, t in weights.items()}
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    del weights
    (tmp_path / "merge.yaml").write_text(json.dumps({"models": [str(tmp_path / f"m{i}") for i in range(3)]}))
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(700 << 20), "merge", str(tmp_path / "merge.yaml"), str(tmp_path / "out"),
         "--max-memory", "900MiB"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["cost"]["peak_rss_bytes"] < 900 << 20


def test_killed_and_resumed_is_the_uninterrupted_merge(tmp_path):
    """The journal lists what the disk holds; a resumed merge writes only the rest."""
    big = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 8}
    a, b = (make_model(tmp_path / n, s, **big) for n, s in (("a", 1), ("b", 2)))
    (tmp_path / "merge.yaml").write_text(json.dumps({"models": [str(a), str(b)], "method": "slerp"}))
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "import honeloom.checkpoint.writer as writer\n"
        "import honeloom.merging.engine.streaming as streaming\n"
        "writer.SYNC_BYTES = 1\n"
        "chunks = streaming.Merger._chunks\n"
        "def slowly(self, part):\n"
        "    time.sleep(0.15)\n"
        "    yield from chunks(self, part)\n"
        "streaming.Merger._chunks = slowly\n"
        "from honeloom.cli.main import main\n"
        "main()\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, str(script), "merge", str(tmp_path / "merge.yaml"), str(out), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            journals = list(tmp_path.glob(".out.partial-*/merge.journal"))
            if journals and journals[0].read_text().count("\n") >= 3:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    done = journals[0].read_text().count("\n")
    assert done >= 3
    report = honeloom.merge(tmp_path / "merge.yaml", out)
    assert any(f"{done} of" in line for line in (out / "events.jsonl").read_text().splitlines())
    assert report.details["lost_delta_fraction"] == 0
    assert not list(tmp_path.glob(".out.partial-*"))
    assert not (out / "merge.journal").exists()
    honeloom.merge(tmp_path / "merge.yaml", tmp_path / "clean")
    assert digest(out) == digest(tmp_path / "clean")


def test_a_file_that_is_gone_is_written_anew_after_any_number_of_kills(tmp_path):
    """What the journal says of a file that is not there any more is forgotten before the file is made again."""

    class Killed(Exception):
        pass

    def chunks(i: int, fail: bool):
        def give():
            if fail:
                raise Killed
            yield torch.full((4,), float(i + 1))

        return give

    finished: dict[str, None] = {}

    def attempt(fails_at: int) -> None:
        streams = [TensorStream(f"t{i}", torch.float32, (4,), chunks(i, i == fails_at)) for i in range(6)]
        progress = Progress(set(finished), durable=lambda names: finished.update(dict.fromkeys(names)),
                            forgotten=lambda names: [finished.pop(n) for n in names])  # fmt: skip
        write_checkpoint(tmp_path, streams, progress=progress)

    import honeloom.checkpoint.writer as writer

    before, writer.SYNC_BYTES = writer.SYNC_BYTES, 1
    try:
        with pytest.raises(Killed):
            attempt(4)
        assert list(finished) == ["t0", "t1", "t2", "t3"]
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(Killed):
            attempt(1)
        assert list(finished) == ["t0"]
        attempt(-1)
    finally:
        writer.SYNC_BYTES = before
    assert all(load_file(tmp_path / "model.safetensors")[f"t{i}"].tolist() == [i + 1] * 4 for i in range(6))


def test_equal_tensors_are_scaled_where_the_method_scales(tmp_path, merge):
    """Multislerp without normalize: twice the weight is twice the length, for tensors that are equal too."""
    a, b = (make_model(tmp_path / n, 1) for n in ("a", "b"))
    edit_weights(b, lambda ts: ts["lm_head.weight"].mul_(0.5))
    models = [{"model": a, "weight": 2}, {"model": b, "weight": 2}]
    merge(models=models, method={"type": "multislerp", "normalize": False})
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(merge.tensors()[name], weights_of(a)[name] * 4)


def test_the_base_is_known_by_what_it_is_and_not_by_its_name(models, merge):
    listed_twice = [models["a"], models["b"], f"{models['base']}/../base"]
    merge(models=listed_twice, base_model=models["base"], method="model_stock")
    with_base = digest(merge.out)
    merge(models=[models["a"], models["b"]], base_model=models["base"], method="model_stock")
    assert digest(merge.out) == with_base


def test_values_beyond_the_range_are_written_where_that_is_allowed(models, merge):
    many = [{"model": models[n], "weight": 1e7} for n in ("a", "b")]
    settings = {"models": many, "method": {"type": "linear", "normalize": False}, "dtype": "fp16"}
    with pytest.raises(NotFiniteError, match="beyond the range"):
        merge(**settings)
    outcome = merge(**settings, allow_nan=True)
    assert all(check.passed for check in outcome.checks)


def test_integers_of_different_types(models, merge):
    for name, dtype in (("a", torch.int64), ("b", torch.int32)):
        edit_weights(
            models[name], lambda ts, d=dtype: ts.update({"model.layers.0.self_attn.s": torch.arange(4, dtype=d)})
        )
    with pytest.raises(IncompatibleModelsError, match="is I64, which cannot be averaged, and I32 in the other"):
        merge(models=[models["a"], models["b"]])
