"""Safetensors headers: sound ones are read, hostile ones end in one cheap sentence."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from honeloom.checkpoint import headers
from honeloom.checkpoint.headers import MAX_HEADER_BYTES, inspect_weights, read_header
from honeloom.errors import CheckpointError


def file_of(folder, header: object, data: bytes = b"", length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "w.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_library_writes(tmp_path):
    tensors = {
        "b": torch.zeros(2, 3, dtype=torch.bfloat16), "a": torch.zeros(0, 4), "scalar": torch.tensor(1.0),
        "mask": torch.ones(3, dtype=torch.bool), "naïve \"quoted\" \\ {brace}": torch.zeros(5, dtype=torch.int64),
    }  # fmt: skip
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt", "note": '{["x"]}'})
    header = read_header(tmp_path / "w.safetensors")
    assert {t.name: t.shape for t in header.tensors} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {t.name: t.dtype for t in header.tensors}["b"] == "BF16"
    assert header.metadata["note"] == '{["x"]}'
    assert [t.start for t in header.tensors] == sorted(t.start for t in header.tensors)
    assert inspect_weights(tmp_path / "w.safetensors") is None


def test_empty_object_and_padding(tmp_path):
    assert read_header(file_of(tmp_path, b"{}   ")).tensors == ()
    assert read_header(file_of(tmp_path, b' { "a" : {"dtype":"U8","shape":[2],"data_offsets":[0,2]} } ', b"xy")).tensors


HOSTILE = {
    "length 2**63": (b"{}", b"", 1 << 63, "over the limit"),
    "length 2**64-1": (b"{}", b"", (1 << 64) - 1, "over the limit"),
    "101 MB": (b"{}", b"", 101_000_000, "over the limit"),
    "beyond the file": (b"{}", b"", 1000, "truncated"),
    "no JSON": (b"\x00\xff\xfe", b"", None, "not a JSON object"),
    "list": (b"[1]", b"", None, "not a JSON object"),
    "unclosed": (b'{"a":', b"", None, "flat JSON object"),
    "no comma": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]} "b"}', b"", None, "expected ','"),
    "rest": (b'{} {"a":1}', b"", None, "text after"),
    "duplicate names": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x", None, "duplicate key 'a'",
    ),
    "escaped duplicate": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"\\u0061":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"", None, "duplicate key 'a'",
    ),
    "duplicate fields": (b'{"a":{"dtype":"U8","dtype":"F32","shape":[]}}', b"x", None, "duplicate key"),
    "duplicate metadata": (b'{"__metadata__":{"a":"1","a":"2"}}', b"", None, "duplicate key"),
    "metadata not text": (b'{"__metadata__":{"a":1}}', b"", None, "flat JSON object"),
    "unknown dtype": ({"a": entry("F7")}, b"1234", None, "unknown dtype"),
    "dtype no text": ({"a": entry(3)}, b"1234", None, "unknown dtype"),
    "negative shape": ({"a": entry(shape=(-1,))}, b"1234", None, "shape"),
    "boolean shape": ({"a": entry(shape=(True,))}, b"1234", None, "shape"),
    "float shape": ({"a": entry(shape=(1.0,))}, b"1234", None, "shape"),
    "overflow": ({"a": entry(shape=(2**32, 2**32))}, b"1234", None, "overflows"),
    "overflow by many": ({"a": entry(shape=[2] * 64)}, b"1234", None, "overflows"),
    "huge number": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[]}}', b"x", None, "not JSON"),
    "size mismatch": ({"a": entry(shape=(2,))}, b"1234", None, "takes 8 bytes"),
    "reversed": ({"a": entry(offsets=(4, 0))}, b"1234", None, "data_offsets"),
    "overlap": ({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456", None, "overlaps"),
    "same range": ({"a": entry(), "b": entry()}, b"1234", None, "overlaps"),
    "hole": ({"a": entry(), "b": entry(offsets=(8, 12))}, b"1" * 12, None, "hole"),
    "late begin": ({"a": entry(offsets=(4, 8))}, b"1" * 8, None, "hole"),
    "short data": ({"a": entry()}, b"123", None, "truncated"),
    "extra data": ({"a": entry()}, b"12345", None, "belong to no tensor"),
    "extra field": ({"a": {**entry(), "x": 1}}, b"1234", None, "keys must be"),
    "missing field": ({"a": {"dtype": "F32"}}, b"1234", None, "keys must be"),
    "deep": (b'{"a":{"dtype":"F32","shape":' + b"[" * 60_000 + b"}}", b"", None, "not JSON"),
    "half a byte": ({"a": entry("F4", (1,), (0, 0))}, b"", None, "takes"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path, case):
    header, data, length, reason = HOSTILE[case]
    path = file_of(tmp_path, header, data, length)
    found = inspect_weights(path)
    assert found is not None
    assert reason in found
    assert "\n" not in found
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\x00" * 8, b"\x01\x00\x00\x00\x00\x00\x00\x00{"])
def test_short_files(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    assert inspect_weights(tmp_path / "w.safetensors")


def test_missing_file_and_folder(tmp_path):
    assert inspect_weights(tmp_path / "none.safetensors") == "no such file"
    assert inspect_weights(tmp_path) == "no such file"


BIG = {
    "one name": lambda: b'{"' + b"a" * 60_000_000,
    "nested": lambda: b'{"a":' + b"[" * 60_000_000,
    "spaces": lambda: b" " * 60_000_000,
    "metadata": lambda: b'{"__metadata__":{' + b'"a":"b",' * 7_000_000 + b'"a":"b"}}',
    "escapes": lambda: b'{"' + b'\\"' * 30_000_000,
    "digits": lambda: b'{"a":{"dtype":"U8","shape":[' + b"1," * 20_000_000,
}


def peak_while_inspecting(path) -> int:
    tracemalloc.start()
    try:
        assert inspect_weights(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", BIG)
def test_hostile_headers_are_cheap(tmp_path, case):
    text = BIG[case]()
    assert len(text) < MAX_HEADER_BYTES
    assert peak_while_inspecting(file_of(tmp_path, text)) < 100 << 20


def test_the_number_of_tensors_is_bounded(tmp_path, monkeypatch):
    """A tenth of the real bound, in a tenth of the memory allowed."""
    assert headers.MAX_TENSORS == 200_000
    monkeypatch.setattr(headers, "MAX_TENSORS", 20_000)
    entries = (b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(20_001))
    path = file_of(tmp_path, b"{" + b",".join(entries) + b"}")
    assert "more than 20,000 tensors" in inspect_weights(path)
    assert peak_while_inspecting(path) < 15 << 20


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_files_never_raise_anything_else(tmp_path, data):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.float16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(content)
    reason = inspect_weights(path)
    if reason is None:
        assert sum(t.end - t.start for t in read_header(path).tensors) <= len(content)
    else:
        with pytest.raises(CheckpointError):
            read_header(path)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.integers() | st.text() | st.floats(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_json_is_judged(tmp_path, value):
    inspect_weights(file_of(tmp_path, value, b"1234"))
    inspect_weights(file_of(tmp_path, {"a": value}, b"1234"))
    inspect_weights(file_of(tmp_path, {"a": {**entry(), "shape": value}}, b"1234"))
