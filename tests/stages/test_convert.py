"""`convert`: the tensors of a pickle in safetensors, bit by bit, and never the code of one."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import honeloom
from honeloom.checkpoint.pickles import PickledWeights, pickled_files
from honeloom.cli.main import main
from honeloom.errors import CheckpointError, ConfigError, VerificationError
from honeloom.stages import convert as stage
from honeloom.stages.inputs import resolve_model

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
IDS = torch.arange(3, 43).view(2, 20)


class Canary:
    """Unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def old(tmp_path, tiny_model):
    """A folder without weights, and its tensors."""
    folder = tmp_path / "old"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return folder, tensors


def write_shards(folder, parts):
    """Shards and their index, as transformers wrote them."""
    names = {}
    for i, part in enumerate(parts, 1):
        file = f"pytorch_model-{i:05d}-of-{len(parts):05d}.bin"
        torch.save(part, folder / file)
        names |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))


def halves(tensors):
    names = list(tensors)
    return [{n: tensors[n] for n in part} for part in (names[:9], names[9:])]


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def logits(folder):
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["one file", "shards", "old format", "other name"])
def test_the_same_tensors_come_out(old, tiny_model, tmp_path, kind):
    folder, tensors = old
    if kind == "shards":
        write_shards(folder, halves(tensors))
    elif kind == "old format":
        torch.save(tensors, folder / SINGLE, _use_new_zipfile_serialization=False)
    else:
        torch.save(tensors, folder / {"one file": SINGLE, "other name": "weights.pt"}[kind])
        torch.save({"step": 3}, folder / "optimizer.pt")
        torch.save({"step": 3}, folder / "training_args.bin")
    report = honeloom.convert(folder, tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), tensors)
    assert [c.passed for c in report.verification] == [True, True] and report.artefact.kind == "model"
    assert report.details["tensors"] == len(tensors) and report.details["tied"] == report.details["left_out"] == []
    assert len(report.details["files"]) == (2 if kind == "shards" else 1)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tiny_model), rtol=0, atol=0)
    assert resolve_model(str(tmp_path / "out")).fingerprint == report.artefact.sha256
    assert honeloom.verify(tmp_path / "out").status == "ok"


def test_types_are_kept(old, tmp_path):
    folder, tensors = old
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    tensors = {name: tensor.to(kinds[i % 3]) for i, (name, tensor) in enumerate(tensors.items())}
    tensors |= {"counter": torch.tensor(7), "mask": torch.tensor([True, False]), "empty": torch.zeros(0, 3)}
    torch.save(tensors, folder / SINGLE)
    honeloom.convert(folder, tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), tensors)


def test_shared_and_strided_memory(old, tmp_path):
    """Names that are views of one storage come out as tensors of their own, and turned ones row by row."""
    folder, tensors = old
    q, k = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk")
    both = torch.randn(48, 32)
    tensors[q], tensors[k] = both[:32], both[32:]
    turned = "model.layers.1.mlp.down_proj.weight"
    tensors[turned] = tensors[turned].T.contiguous().T
    tensors["model.layers.1.self_attn.q_proj.weight"] = tensors[q]
    torch.save(tensors, folder / SINGLE)
    honeloom.convert(folder, tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), tensors)


@pytest.mark.parametrize("shared", [True, False])
def test_a_tied_head_is_stored_once(old, tmp_path, shared):
    folder, tensors = old
    change_config(folder, tie_word_embeddings=True)
    embeddings = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embeddings if shared else embeddings.clone()
    write_shards(folder, halves(tensors))
    report = honeloom.convert(folder, tmp_path / "out")
    assert report.details["tied"] == ["lm_head.weight"] and report.warnings == ()
    del tensors["lm_head.weight"]
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), tensors)


def test_a_tied_head_that_differs_is_kept_and_told(old, tmp_path):
    folder, tensors = old
    change_config(folder, tie_word_embeddings=True)
    torch.save(tensors, folder / SINGLE)
    report = honeloom.convert(folder, tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), tensors)
    assert any("ties 'lm_head.weight' to 'model.embed_tokens.weight', and their values differ" in w
               for w in report.warnings)  # fmt: skip


def test_tables_of_positions_are_left_out(old, tmp_path):
    folder, tensors = old
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    torch.save({**tensors, table: torch.ones(4)}, folder / SINGLE)
    report = honeloom.convert(folder, tmp_path / "out")
    assert report.details["left_out"] == [table]
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), tensors)


def test_gpt2_as_it_was_first_published(tmp_path):
    """Names without "transformer.", masks among the tensors, no head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tmp_path / "gpt2"
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64)).eval()
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    tensors = {
        n.removeprefix("transformer."): t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"
    }
    tensors["h.0.attn.bias"] = torch.ones(64, 64).tril().view(1, 1, 64, 64)
    torch.save(tensors, folder / SINGLE, _use_new_zipfile_serialization=False)
    honeloom.convert(folder, tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), tensors)
    with torch.inference_mode():
        torch.testing.assert_close(logits(tmp_path / "out"), model(input_ids=IDS).logits, rtol=0, atol=0)


def test_an_adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "nobody/has-this", "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.randn(2, 8), name.format("B"): torch.randn(8, 2)}
    torch.save(tensors, folder / "adapter_model.bin")
    report = honeloom.convert(folder, tmp_path / "out")
    assert report.artefact.kind == "adapter" and len(report.verification) == 1
    assert_same(load_file(tmp_path / "out" / "adapter_model.safetensors"), tensors)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == settings


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["single", "second shard", "in a list", "adapter"])
def test_code_in_a_pickle_never_runs(old, tmp_path, canary, monkeypatch, zipped, place):
    """Not even where the environment asks torch to unpickle everything."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, tensors = old
    if place == "second shard":
        write_shards(folder, halves(tensors))
        (file,) = folder.glob("*-00002-*.bin")
        torch.save({**halves(tensors)[1], "x": Canary(canary)}, file, _use_new_zipfile_serialization=zipped)
    elif place == "adapter":
        (folder / "adapter_config.json").write_text("{}")
        file = folder / "adapter_model.bin"
        torch.save({"x": Canary(canary)}, file, _use_new_zipfile_serialization=zipped)
    else:
        file = folder / SINGLE
        strange = [Canary(canary)] if place == "in a list" else {**tensors, "x": Canary(canary)}
        torch.save(strange, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=rf"{file.name}: not converted: it asks for \S+open.*nothing of it was run"
    ):
        honeloom.convert(folder, tmp_path / "out")
    assert not canary.exists() and not (tmp_path / "out").exists()
    torch.load(file, weights_only=False)  # the canary does sing
    assert canary.exists()


def test_a_bare_pickle_never_runs(old, tmp_path, canary):
    folder, _ = old
    (folder / SINGLE).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(CheckpointError, match="not converted"):
        honeloom.convert(folder, tmp_path / "out")
    assert not canary.exists()


def test_the_advice_of_torch_to_run_it_is_not_passed_on(old, tmp_path, canary):
    folder, tensors = old
    files = {
        "call": lambda f: torch.save({"x": Canary(canary)}, f),
        "cut": lambda f: f.write_bytes(_saved(tensors)[:-900]),
        "cut at the end": lambda f: f.write_bytes(_saved(tensors)[:-30]),
        "not downloaded": lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "noise": lambda f: f.write_bytes(bytes(range(256)) * 9),
        "empty": lambda f: f.write_bytes(b""),
        "script": _save_script,
    }
    for name, write in files.items():
        write(folder / SINGLE)
        with pytest.raises(CheckpointError, match="not converted") as caught:
            honeloom.convert(folder, tmp_path / "out")
        assert "weights_only" not in str(caught.value) and "trust" not in str(caught.value), name
        assert str(folder / SINGLE) in str(caught.value) and "\n" not in str(caught.value)
        assert not canary.exists()


def _saved(tensors):
    data = io.BytesIO()
    torch.save(tensors, data)
    return data.getvalue()


def _save_script(file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"w": torch.ones(2)}}, r"'state_dict' is of type dict.*state_dict alone"),
        ({1: torch.ones(2)}, "the key 1 is no name, but of type int"),
        ([torch.ones(2)], "holds a list; weights are tensors by name"),
        ({"w": torch.ones(2, 2).to_sparse()}, "'w' is no dense tensor"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "'w': torch.complex128 cannot be stored"),
    ],
)
def test_what_is_not_weights_by_name(old, tmp_path, content, message):
    torch.save(content, old[0] / SINGLE)
    with pytest.raises(CheckpointError, match=message):
        honeloom.convert(old[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_convert(tiny_model, old, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["convert", str(tiny_model), str(tmp_path / "out")])
    assert end.value.code == 2
    assert "nothing to convert: its weights are safetensors already (model.safetensors)" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"no pickled weights \(found .*config.json"):
        honeloom.convert(old[0], tmp_path / "out")
    for name in ("a.pt", "b.bin"):
        torch.save(old[1], old[0] / name)
    with pytest.raises(CheckpointError, match=r"several pickled files and no .*index.json \(found a.pt, b.bin\)"):
        honeloom.convert(old[0], tmp_path / "out")
    with pytest.raises(honeloom.errors.SourceError, match="no such folder"):
        honeloom.convert(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"w": "gone.bin"}}, "names 'gone.bin', which is not in its folder"),
        ({"weight_map": {"w": "../pytorch_model.bin"}}, "not in its folder"),
        ({"weight_map": {}}, "needs weight_map"),
        ([], "needs weight_map"),
    ],
)
def test_an_index_that_does_not_fit(old, tmp_path, index, message):
    torch.save(old[1], tmp_path / SINGLE)
    (old[0] / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        honeloom.convert(old[0], tmp_path / "out")


def test_a_tensor_in_two_shards(old, tmp_path):
    first, second = halves(old[1])
    write_shards(old[0], [first, {**second, next(iter(first)): torch.ones(1)}])
    with pytest.raises(CheckpointError, match=r"00002.*holds '.*', which .*00001.* holds too"):
        honeloom.convert(old[0], tmp_path / "out")


def test_a_config_that_asks_for_code_is_refused_before_anything_is_opened(old, tmp_path, canary):
    torch.save({"x": Canary(canary)}, old[0] / SINGLE)
    change_config(old[0], auto_map={"AutoModelForCausalLM": "modeling_stranger.Model"})
    with pytest.raises(CheckpointError, match="auto_map asks to run code"):
        honeloom.convert(old[0], tmp_path / "out")
    assert not canary.exists()


def test_weights_of_another_model_are_not_published(old, tmp_path):
    torch.save({n: t for n, t in old[1].items() if "layers.1" not in n}, old[0] / SINGLE)
    with pytest.raises(CheckpointError, match="tensors are missing"):
        honeloom.convert(old[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_wrong_bit_is_not_published(old, tmp_path, monkeypatch):
    right = stage.write_checkpoint

    def wrong(folder, streams, **options):
        size = right(folder, streams, **options)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        return size

    torch.save(old[1], old[0] / SINGLE)
    monkeypatch.setattr(stage, "write_checkpoint", wrong)
    with pytest.raises(VerificationError, match="read back other than the pickle holds them: measured 1, limit 0"):
        honeloom.convert(old[0], tmp_path / "out")


def test_other_commands_name_this_one(old, tmp_path):
    torch.save(old[1], old[0] / SINGLE)
    with pytest.raises(CheckpointError, match=rf"make them with `honeloom convert {old[0]} OUT`"):
        resolve_model(str(old[0]))
    from honeloom.checkpoint.reader import Checkpoint

    with pytest.raises(CheckpointError, match=rf"make them with `honeloom convert {old[0]} OUT`"):
        Checkpoint.open(old[0])


def test_only_one_file_is_open_at_a_time(old, tmp_path, monkeypatch):
    """Each shard is opened to list it, to write it and to compare it: never once per tensor."""
    from honeloom.checkpoint import pickles

    write_shards(old[0], halves(old[1]))
    opened, right = [], pickles._load

    def counted(path):
        opened.append(path.name[:19])
        return right(path)

    monkeypatch.setattr(pickles, "_load", counted)
    honeloom.convert(old[0], tmp_path / "out")
    one, two = "pytorch_model-00001", "pytorch_model-00002"
    assert opened == [one, two] * 3


def test_the_command(old, tmp_path, capsys):
    torch.save(old[1], old[0] / SINGLE)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return end.value.code, printed.out, printed.err

    code, out, _ = run("convert", old[0], tmp_path / "out", "--dry-run")
    assert code == 0 and not (tmp_path / "out").exists()
    code, out, _ = run("convert", old[0], "--output-dir", tmp_path / "out")
    assert (code, out.splitlines()[-1]) == (0, str(tmp_path / "out"))
    code, out, _ = run("convert", old[0], tmp_path / "out", "--resume", "--json")
    assert code == 0 and json.loads(out)["verb"] == "convert"
    assert run("convert", old[0], tmp_path / "out", "--output-dir", tmp_path / "out")[0] == 2
    with pytest.raises(ConfigError, match="output folder"):
        honeloom.convert(old[0], None)


_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(_DTYPES, st.lists(st.integers(0, 4), max_size=3), st.booleans()), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_any_tensors_come_back(tmp_path_factory, kinds, zipped, seed):
    """Law: what is saved is what is read, whatever types, shapes, strides and format."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i, (dtype, shape, turned) in enumerate(kinds):
        tensor = torch.randint(0, 100, shape, generator=generator).to(dtype)
        tensors[f"t{i}"] = tensor.mT if turned and tensor.ndim > 1 else tensor
    folder = tmp_path_factory.mktemp("any")
    torch.save(tensors, folder / SINGLE, _use_new_zipfile_serialization=zipped)
    found = PickledWeights(pickled_files(folder))
    assert {n: (t.dtype, t.shape) for n, t in found.tensors.items()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
    }
    for name, tensor in tensors.items():
        assert found.read(name).is_contiguous() and torch.equal(found.read(name), tensor)
