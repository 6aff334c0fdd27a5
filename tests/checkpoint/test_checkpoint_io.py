"""Reading and writing model folders, and the small files beside the weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from honeloom.checkpoint.folders import copy_config, copy_tokenizer, discard, read_config
from honeloom.checkpoint.reader import Checkpoint
from honeloom.checkpoint.writer import TensorStream, write_checkpoint
from honeloom.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b.weight": torch.arange(7, dtype=torch.bfloat16),
    "c.flag": torch.tensor([True, False, True]),
    "d.weight": torch.zeros(0, 5, dtype=torch.float16),
    "e.weight": torch.tensor(2.5, dtype=torch.float64),
    "f.code": torch.arange(5, dtype=torch.float32).to(torch.float8_e4m3fn),
}


def streams(tensors=None):
    return [TensorStream.of(n, t) for n, t in (tensors or TENSORS).items()]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.float(), other.float())


def sharded(folder, **shards):
    weight_map = {}
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_written_and_read_back(tmp_path):
    size = write_checkpoint(tmp_path, streams())
    assert size == (tmp_path / "model.safetensors").stat().st_size
    by_library = load_file(tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert sorted(checkpoint.names()) == sorted(TENSORS)
        for name, tensor in TENSORS.items():
            assert same(checkpoint.read(name), tensor)
            assert same(by_library[name], tensor)
        assert checkpoint.info("a.weight").shape == (3, 4)
        assert checkpoint.read("b.weight", torch.float64).dtype == torch.float64


def test_slices_read_only_their_bytes(tmp_path):
    write_checkpoint(tmp_path, streams())
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.bytes_read == 0
        assert checkpoint.read_slice("a.weight", 5, 9).tolist() == [5, 6, 7, 8]
        assert checkpoint.bytes_read == 16
        assert checkpoint.read_slice("a.weight", 12, 12).numel() == 0
        for wrong in ((-1, 2), (3, 2), (0, 13)):
            with pytest.raises(ValueError, match="elements"):
                checkpoint.read_slice("a.weight", *wrong)
        with pytest.raises(CheckpointError, match=r"no tensor 'a.weigth'.*did you mean 'a.weight'"):
            checkpoint.read("a.weigth")


def test_data_is_aligned_and_bytes_repeat(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        write_checkpoint(folder, streams())
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    with Checkpoint.open(one) as checkpoint:
        header = next(iter(checkpoint._headers.values()))
        assert header.data_start % 8 == 0
        assert header.metadata == {"format": "pt"}
        for info in header.tensors:
            assert info.start % {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}.get(info.dtype, 1) == 0


def test_shards_as_hugging_face_writes_them(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    size = write_checkpoint(tmp_path, streams(tensors), shard_bytes=900)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 500, "total_size": 2000}
    assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"
    assert size == sum((tmp_path / n).stat().st_size for n in names[:3])
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.names() == list(tensors)
        assert all(same(checkpoint.read(n), t) for n, t in tensors.items())


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    write_checkpoint(
        tmp_path, streams({"a": torch.ones(2), "big": torch.ones(1000), "c": torch.ones(2)}), shard_bytes=100
    )
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3


def test_chunks_come_one_at_a_time(tmp_path):
    def pieces():
        for i in range(10):
            yield torch.full((100,), float(i))

    write_checkpoint(tmp_path, [TensorStream("x", torch.float32, (10, 100), pieces)])
    assert load_file(tmp_path / "model.safetensors")["x"][7, 3] == 7


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (TensorStream("x", torch.float32, (4,), lambda: [torch.ones(3)]), "1 elements fewer"),
        (TensorStream("x", torch.float32, (4,), lambda: [torch.ones(3), torch.ones(2)]), "does not fit"),
        (TensorStream("x", torch.float32, (4,), lambda: [torch.ones(4, dtype=torch.float16)]), "does not fit"),
    ],
)
def test_chunks_that_break_their_word(tmp_path, stream, reason):
    with pytest.raises(ValueError, match=reason):
        write_checkpoint(tmp_path, [stream])


def test_two_tensors_of_one_name(tmp_path):
    with pytest.raises(ValueError, match="same name"):
        write_checkpoint(tmp_path, [TensorStream.of("x", torch.ones(1))] * 2)


def test_missing_shard(tmp_path):
    sharded(tmp_path, one={"a": torch.ones(1)}, two={"b": torch.ones(1)})
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 'two.safetensors', which is not there"):
        Checkpoint.open(tmp_path)


def test_tensor_not_in_its_shard(tmp_path):
    weight_map = sharded(tmp_path, one={"a": torch.ones(1)}, two={"b": torch.ones(1)})
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {**weight_map, "a": "two.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"index.json: two.safetensors does not hold 'a'"):
        Checkpoint.open(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    sharded(tmp_path, one={"a": torch.ones(1), "c": torch.ones(1)}, two={"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"two.safetensors: holds 'a', which one.safetensors holds too"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "same folder"),
    ],
)
def test_bad_index(tmp_path, text, reason):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        Checkpoint.open(tmp_path)


def test_single_file_wins_over_a_stale_index(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert Checkpoint.open(tmp_path).names() == ["a"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_damaged_shard(tmp_path, damage):
    save_file({"a": torch.ones(10)}, tmp_path / "model.safetensors")
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[9] ^= 0x80
    broken = {"truncated": content[:-4], "empty": b"", "flipped": bytes(content)}[damage]
    (tmp_path / "model.safetensors").write_bytes(broken)
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        Checkpoint.open(tmp_path)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth"])
def test_pickles_are_never_read(tmp_path, name):
    torch.save(Canary(tmp_path / "canary"), tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: pickled weights can run code"):
        Checkpoint.open(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model.safetensors .* found nothing"):
        Checkpoint.open(tmp_path)


def test_tokenizer_files_keep_their_bytes(tmp_path):
    source, target = tmp_path / "s", tmp_path / "t"
    source.mkdir()
    target.mkdir()
    kept = ["tokenizer.json", "chat_template.jinja", "spiece.model", "merges.txt"]
    for name in [*kept, "config.json", "model.safetensors", "README.md"]:
        (source / name).write_bytes(f"{name}\r\n\xff".encode("latin-1"))
    assert sorted(copy_tokenizer(source, target)) == sorted(kept)
    assert sorted(p.name for p in target.iterdir()) == sorted(kept)
    assert all((source / n).read_bytes() == (target / n).read_bytes() for n in kept)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"a": 1}, {"a": 1, "dtype": "float16"}),
        ({"torch_dtype": "float32", "a": 1}, {"torch_dtype": "float16", "a": 1}),
        (
            {"dtype": "float32", "text_config": {"dtype": "float32"}, "vision_config": {}},
            {"dtype": "float16", "text_config": {"dtype": "float16"}, "vision_config": {}},
        ),
    ],
)
def test_config_with_changes(tmp_path, config, wanted):
    source, target = tmp_path / "s", tmp_path / "t"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_bytes(b'{"x": 1}')
    copy_config(source, target, dtype="float16", changes={"layers": 3})
    assert read_config(target) == {**wanted, "layers": 3}
    assert list(read_config(target))[: len(config)] == list(config)
    assert (target / "generation_config.json").read_bytes() == b'{"x": 1}'
    discard(source)
    discard(source)
    assert not source.exists()


@pytest.mark.parametrize(("text", "reason"), [(None, "no config.json"), ("{", "not JSON"), ("[]", "holds a list")])
def test_bad_config(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        read_config(tmp_path)
