"""A tokenizer as llama.cpp's metadata, where llama.cpp would cut text just as tokenizer.json does.

Where it would not, the file says that it has no vocabulary: it then takes token ids, and never cuts text
otherwise than the model was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["BYTE", "CONTROL", "CUTS", "NORMAL", "UNKNOWN", "UNUSED", "USER_DEFINED", "tokenizer_keys"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens in GGUF."""

_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {
    (_CASELESS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_CASELESS + r"\p{N}" + _REST, False): "qwen2",
    ("bytes", False): "gpt-2",
    ("digits", False): "smollm",
}
"""How text is cut before merging, and whether whole words of the vocabulary are taken -> llama.cpp's name."""


def tokenizer_keys(folder: Path, vocabulary: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Metadata of a tokenizer, and what a reader should know of it.

    Parameters
    ----------
    folder : Path
        Model folder.
    vocabulary : int
        Rows of the embedding; tokens beyond the tokenizer's are written as unused.
    """
    try:
        document = json.loads((folder / "tokenizer.json").read_bytes())
        settings = _read(folder / "tokenizer_config.json")
        found, notes = _keys(document, settings, vocabulary)
    except FileNotFoundError:
        return {"tokenizer.ggml.model": "no_vocab"}, ("without tokenizer.json the file has no vocabulary: give ids",)
    except _Unsaid as reason:
        return {"tokenizer.ggml.model": "no_vocab"}, (
            f"llama.cpp cannot cut text as this tokenizer does ({reason}), so the file has no vocabulary: give token "
            "ids that the source's tokenizer made",
        )
    template = _chat_template(folder, settings)
    return {**found, **({"tokenizer.chat_template": template} if template else {})}, notes


class _Unsaid(Exception):
    """Why a tokenizer cannot be said."""


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def _keys(
    document: Mapping[str, Any], settings: Mapping[str, Any], vocabulary: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    model = document["model"]
    if model.get("type", "BPE") != "BPE":
        raise _Unsaid(f"its model is {model.get('type')}, not BPE")
    words = dict(model["vocab"])
    words.update({t["content"]: t["id"] for t in document.get("added_tokens") or ()})
    if max(words.values()) >= vocabulary:
        raise _Unsaid(f"it has ids up to {max(words.values())}, and the embedding {vocabulary} rows")
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model.get("merges") or ()]
    cut = _cut_of(document)
    types = _types(document, words, byte_fallback=bool(model.get("byte_fallback")))
    names = {i: word for word, i in words.items()}
    tokens = [names.get(i, f"[PAD{i}]") for i in range(vocabulary)]
    keys: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types.get(i, UNUSED) for i in range(vocabulary)],
        **_specials(document, settings, words),
    }
    if cut is None:
        scores, space = _sentencepiece(document, words, merges), _prefix(document)
        keys |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [scores.get(token, 0.0) for token in tokens],
            "tokenizer.ggml.add_space_prefix": space,
        }
        return keys, ()
    pre = CUTS.get((cut, bool(model.get("ignore_merges"))))
    if pre is None:
        raise _Unsaid("its way to cut text before merging is not one of " + ", ".join(CUTS.values()))
    keys |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": [" ".join(m) for m in merges],
    }
    return keys, _normalised(document)


def _parts(part: Mapping[str, Any] | None, items: str) -> list[Mapping[str, Any]]:
    """The steps of a sequence, or the one step there is."""
    if not part:
        return []
    return list(part[items]) if part["type"] == "Sequence" else [part]


def _cut_of(document: Mapping[str, Any]) -> str | None:
    """How text is cut into words of bytes: a regular expression, "bytes" or "digits"; None for sentencepiece's way."""
    steps = _parts(document.get("pre_tokenizer"), "pretokenizers")
    kinds = [s["type"] for s in steps]
    if "ByteLevel" not in kinds:
        return None
    last = steps[-1]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise _Unsaid("it puts a space before text, or does more after turning it into bytes")
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "bytes"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
        return "digits"
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True) and not steps[0].get("invert"):
        return str(steps[0]["pattern"].get("Regex"))
    return "unknown"


def _normalised(document: Mapping[str, Any]) -> tuple[str, ...]:
    kinds = [s["type"] for s in _parts(document.get("normalizer"), "normalizers")]
    if kinds in ([], ["NFC"]):
        return ("the tokenizer composes characters (NFC) first, and llama.cpp does not",) if kinds else ()
    raise _Unsaid(f"it normalises text by {', '.join(kinds)}")


def _prefix(document: Mapping[str, Any]) -> bool:
    """Whether sentencepiece's space mark goes before text."""
    normal = [(s["type"], s) for s in _parts(document.get("normalizer"), "normalizers")]
    steps = _parts(document.get("pre_tokenizer"), "pretokenizers")
    replaces = [s for kind, s in normal if kind == "Replace"]
    prepends = [s for kind, s in normal if kind == "Prepend" and s.get("prepend") == "▁"]
    plain = [s for s in replaces if s.get("pattern") == {"String": " "} and s.get("content") == "▁"]
    if len(plain) == 1 and len(normal) == len(plain) + len(prepends) and not steps:
        return bool(prepends)
    if not normal and len(steps) == 1 and steps[0]["type"] == "Metaspace" and not steps[0].get("split", True):
        return str(steps[0].get("prepend_scheme", "always")) != "never"
    raise _Unsaid("it marks spaces otherwise than sentencepiece")


def _sentencepiece(
    document: Mapping[str, Any], words: Mapping[str, int], merges: list[tuple[str, ...]]
) -> dict[str, float]:
    """Scores by which llama.cpp merges in the order of the merges.

    It joins neighbours whenever what they make is a token, the best score first; so every pair that makes a
    token must be a merge, and the merges that make one token must follow each other.
    """
    if not document["model"].get("byte_fallback") or any(f"<0x{b:02X}>" not in words for b in range(256)):
        raise _Unsaid("it has no tokens for single bytes")
    first: dict[str, int] = {}
    previous = None
    for rank, (left, right) in enumerate(merges):
        word = left + right
        if word in first and word != previous:
            raise _Unsaid(f"merges that make {word!r} do not follow each other")
        first.setdefault(word, rank)
        previous = word
    known = set(merges)
    for word in words:
        for cut in range(1, len(word)):
            pair = (word[:cut], word[cut:])
            if pair not in known and pair[0] in words and pair[1] in words:
                raise _Unsaid(f"{pair[0]!r} and {pair[1]!r} make a token without a merge of theirs")
    return {word: -float(rank) for word, rank in first.items()}


def _types(document: Mapping[str, Any], words: Mapping[str, int], *, byte_fallback: bool) -> dict[int, int]:
    types = dict.fromkeys(words.values(), NORMAL)
    if byte_fallback:
        types |= {words[f"<0x{b:02X}>"]: BYTE for b in range(256) if f"<0x{b:02X}>" in words}
    types |= {t["id"]: CONTROL if t.get("special") else USER_DEFINED for t in document.get("added_tokens") or ()}
    unknown = document["model"].get("unk_token")
    return types | ({words[unknown]: UNKNOWN} if unknown in words else {})


def _specials(
    document: Mapping[str, Any], settings: Mapping[str, Any], words: Mapping[str, int]
) -> dict[str, int | bool]:
    """Ids of special tokens, and which of them go around text."""
    keys: dict[str, int | bool] = {}
    texts: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        value = settings.get(f"{name}_token")
        texts[name] = value.get("content", "") if isinstance(value, dict) else str(value)
        if texts[name] in words:
            keys[f"tokenizer.ggml.{key}_token_id"] = words[texts[name]]
    around = [s for s in _parts(document.get("post_processor"), "processors") if s["type"] == "TemplateProcessing"]
    if len(around) > 1:
        raise _Unsaid("it puts tokens around text twice")
    pieces = [p.get("SpecialToken", {}).get("id") for p in around[0]["single"]] if around else [None]
    before, after = pieces[: pieces.index(None)], pieces[pieces.index(None) + 1 :]
    if before not in ([], [texts["bos"]]) or after not in ([], [texts["eos"]]):
        raise _Unsaid(f"it puts {before + after} around text")
    keys["tokenizer.ggml.add_bos_token"] = bool(before)
    keys["tokenizer.ggml.add_eos_token"] = bool(after)
    return keys


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None
