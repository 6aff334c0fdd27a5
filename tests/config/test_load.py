"""YAML from anywhere: plain data or a message that names the file, the place and the reason."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from honeloom.config.load import apply_overrides, dump_yaml, load_yaml, parse_scalar, read_yaml
from honeloom.errors import ConfigError


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, what="my.yaml")
    assert str(caught.value).startswith("my.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {canary}']",
        "!!python/object/new:os.system [touch {canary}]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!custom 3",
    ],
)
def test_tags_are_refused_and_nothing_runs(tmp_path, tag):
    canary = tmp_path / "canary"
    message = refused(f"a: {tag.format(canary=canary)}\n")
    assert message.startswith("my.yaml:1:4: could not determine a constructor for the tag")
    assert not canary.exists()


def test_aliases_that_explode_are_refused_at_once():
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    started = time.process_time()
    assert "more than 100,000 nodes once its aliases are expanded" in refused("\n".join(lines))
    assert time.process_time() - started < 5
    assert "more than 100,000 nodes" in refused("a: &a [*a]")


def test_deep_nesting_is_a_message_and_not_a_crash():
    assert "not readable as YAML" in refused("a: " + "[" * 5000 + "]" * 5000)


def test_duplicate_keys_are_errors_at_any_depth():
    assert "duplicate key" in refused("a: 1\na: 2\n")
    assert "my.yaml:3:" in refused("x:\n  b: 1\n  b: 1\n")


def test_tabs_and_other_broken_text_are_named_by_line_and_column():
    assert refused("a:\n\tb: 1\n").startswith("my.yaml:2:1: ")
    assert refused("a: [1, 2\nb: 3\n").startswith("my.yaml:2:")
    assert "special characters are not allowed" in refused("a: \0")
    assert "expected a single document" in refused("a: 1\n---\nb: 2\n")
    assert "key 5 is a int; write it in quotes" in refused("a: {5: x}")
    assert "the top must be a mapping of keys to values, found list" in refused("- a")
    assert "found NoneType" in refused("")


def test_values_are_typed_as_yaml_1_2_says():
    text = "{a: no, b: on, c: yes, d: 1e3, e: 010, f: 0o10, g: 1_000, h: 12:30, i: true, j: ~, k: 10%, l: 1.0, m: 0x1F}"
    assert read_yaml(text, what="x") == {
        "a": "no", "b": "on", "c": "yes", "d": 1000.0, "e": 10, "f": 8, "g": 1000, "h": "12:30", "i": True,
        "j": None, "k": "10%", "l": 1.0, "m": 31,
    }  # fmt: skip


def test_files_that_cannot_be_read_are_named(tmp_path):
    big = tmp_path / "big.yaml"
    big.write_bytes(b"a: 1\n" + b"#" * (10 << 20))
    with pytest.raises(ConfigError, match="10,485,765 bytes; a configuration may have at most 1,048,576"):
        load_yaml(big)
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 text \(byte 6\)"):
        load_yaml(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: embedded null byte"):
        load_yaml(Path("a\0b"))
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert load_yaml(tmp_path / "bom.yaml") == {"a": 1, "b": 2}


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_data_or_a_config_error(data):
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    with contextlib.suppress(ConfigError):
        assert isinstance(read_yaml(text, what="x"), dict)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), PLAIN, max_size=4))
@settings(max_examples=100, deadline=None)
def test_what_is_dumped_is_read_back(data):
    assert read_yaml(dump_yaml(data), what="x") == data


def test_dump_keeps_the_order_of_keys():
    assert dump_yaml({"b": 1, "a": {"z": (1, 2), "y": None}}).splitlines() == [
        "b: 1", "a:", "  z:", "  - 1", "  - 2", "  y: null",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [("10%", "10%"), ("3", 3), ("[1, x]", [1, "x"]), ("{a: 1}", {"a": 1}), ("", None), ("a: [", "a: ["),
     ("!!python/name:os.system", "!!python/name:os.system"), ("no", "no"), ("'3'", "3"), ("$pick", "$pick")],
)  # fmt: skip
def test_the_right_side_of_set(text, value):
    assert parse_scalar(text) == value


def test_overrides_reach_keys_lists_and_places_that_are_not_there_yet():
    data = {"a": {"b": 1}, "l": [{"m": "x"}, {"m": "y"}], "empty": None}
    changed = apply_overrides(data, ["a.b=2", "a.c.d=[1]", "l.1.m=z", "empty.k=5%", "new=a=b"])
    assert changed == {
        "a": {"b": 2, "c": {"d": [1]}}, "l": [{"m": "x"}, {"m": "z"}], "empty": {"k": "5%"}, "new": "a=b",
    }  # fmt: skip
    assert data == {"a": {"b": 1}, "l": [{"m": "x"}, {"m": "y"}], "empty": None}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("l.2.m=x", "'2' is not an index below 2"),
        ("l.-1=x", "'-1' is not an index below 2"),
        ("l.x=1", "'x' is not an index below 2"),
        ("a.b.c=1", "'a.b' is 1 and has no parts"),
    ],
)
def test_overrides_that_lead_nowhere(override, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"a": {"b": 1}, "l": [1, 2]}, [override])
    assert message in str(caught.value)
