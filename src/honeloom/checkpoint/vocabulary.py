"""Tokenizers as plain data: which token has which id, one vocabulary for several models, and its files.

Nothing here runs a tokenizer or a template; what transformers would do with the files is worked out from their text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from honeloom.checkpoint.folders import copy_tokenizer, tokenizer_files
from honeloom.errors import CheckpointError, ConfigError, TemplateError
from honeloom.system import copy_file

__all__ = [
    "IN_CONFIG", "Ids", "Plan", "Vocabulary", "Written", "choose_template", "read_template", "write_tokenizer",
]  # fmt: skip

Ids = npt.NDArray[np.int64]
IN_CONFIG = ("bos_token", "eos_token", "pad_token")
"""Special tokens whose ids stand in config.json and generation_config.json too."""
_ROLES = (*IN_CONFIG, "unk_token", "sep_token", "cls_token", "mask_token")
_MAX_ID = 1 << 24
"""Embeddings have far fewer rows; a larger id in a file would only fill the memory."""
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer of one model.

    Attributes
    ----------
    kind : str
        BPE, Unigram, WordPiece or WordLevel; or the name of a file that is copied but not read (`tokenizer.model`).
    tokens : mapping
        Token -> id, in the order of the ids; empty if the file is not read.
    added : mapping
        Tokens found in a text before it is cut, with their flags (`special`, `lstrip`, ...).
    roles : mapping
        "bos_token", "eos_token", ... -> token.
    scores : mapping
        Token -> log probability; for Unigram.
    digest : str
        SHA-256 of all that decides which ids a text gets.
    reachable : frozenset of str or None
        What a BPE model can make of a text: letters, bytes, results of merges. None where any entry can come up.
    """

    kind: str
    tokens: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    roles: Mapping[str, str]
    scores: Mapping[str, float]
    digest: str
    reachable: frozenset[str] | None = None

    @property
    def rows(self) -> int:
        """Rows that embeddings need: the largest id plus one."""
        return max(self.tokens.values(), default=-1) + 1

    @classmethod
    def read(cls, folder: Path) -> Vocabulary | None:
        """Read the tokenizer files of a model folder, with the ids that transformers gives.

        Returns
        -------
        Vocabulary or None
            None if the folder has no tokenizer.

        Raises
        ------
        CheckpointError
            A file is damaged, or an id is not a number below 2**24.
        """
        config, extra = _object(folder / "tokenizer_config.json"), _object(folder / "special_tokens_map.json")
        try:
            if (folder / "tokenizer.json").is_file():
                content = _object(folder / "tokenizer.json")
            elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                content = {"model": _bpe(folder)}
            else:
                return _unread(folder)
            named = {role: _flagged(value) for role in _ROLES if (value := config.get(role) or extra.get(role))}
            added = [_flagged(token) for token in content.get("added_tokens") or ()]
            added += [*_declared(folder, config), *named.values(), *map(_flagged, _listed(config, extra))]
            return _assembled(content, added, {role: str(token["content"]) for role, token in named.items()})
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: not the files of a tokenizer ({error!r}); download it again") from None


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}; download the folder again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not an object; download the folder again")
    return content


def _bpe(folder: Path) -> dict[str, Any]:
    """The model of a folder with vocab.json and merges.txt, as tokenizer.json would have it."""
    lines = (folder / "merges.txt").read_bytes().decode().split("\n")
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    return {"type": "BPE", "vocab": _object(folder / "vocab.json"), "merges": merges}


def _unread(folder: Path) -> Vocabulary | None:
    """A vocabulary in a format that is compared and copied as bytes."""
    names = [n for n in tokenizer_files(folder) if n.endswith(".model") or n in ("vocab.json", "vocab.txt")]
    compared = [*names, *(n for n in ("added_tokens.json",) if (folder / n).is_file())]
    digest = hashlib.sha256(b"".join((folder / n).read_bytes() for n in compared)).hexdigest()
    return Vocabulary(names[0], {}, {}, {}, {}, digest) if names else None


def _flagged(token: Any) -> dict[str, Any]:
    """An added token's content and flags; a bare text is a special token, as in transformers."""
    if isinstance(token, str):
        token = {"content": token, "special": True}
    flags = {flag: bool(token.get(flag, False)) for flag in ("single_word", "lstrip", "rstrip", "special")}
    normalized = token.get("normalized", not flags["special"])
    return {"content": str(token["content"]), **flags, "normalized": bool(normalized)}


def _declared(folder: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Added tokens that are written beside tokenizer.json, by id."""
    if "added_tokens_decoder" in config:
        decoder = {int(i): token for i, token in config["added_tokens_decoder"].items()}
        return [_flagged(decoder[i]) for i in sorted(decoder)]
    older = _object(folder / "added_tokens.json")
    return [_flagged({"content": token}) for token in sorted(older, key=older.__getitem__)]


def _listed(*configs: Mapping[str, Any]) -> list[Any]:
    """Special tokens without a role."""
    for config in configs:
        for key in ("extra_special_tokens", "additional_special_tokens"):
            if tokens := config.get(key):
                return list(tokens.values() if isinstance(tokens, dict) else tokens)
    return []


def _assembled(content: Mapping[str, Any], added: Sequence[dict[str, Any]], roles: Mapping[str, str]) -> Vocabulary:
    model = content["model"]
    listed = model["vocab"] if isinstance(model["vocab"], list) else []
    ids: dict[str, int] = {str(piece[0]): i for i, piece in enumerate(listed)} if listed else dict(model["vocab"])
    free = len(ids)
    kept: dict[str, dict[str, Any]] = {}
    for token in added:
        text = token["content"]
        if text and text not in kept:
            # The tokenizers library ignores the ids in the file: it counts on from the number of the model's entries.
            free += text not in ids
            ids.setdefault(text, free - 1)
            kept[text] = token
    if not all(type(i) is int and 0 <= i < _MAX_ID for i in ids.values()):
        raise ValueError("an id is not a number from 0 to 2**24 - 1")
    # Old files leave the type out.
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram" if listed else "WordPiece")
    merges = [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in model.get("merges") or ()]
    steps = [content.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor")]
    options = {k: v for k, v in model.items() if k not in ("vocab", "merges") and v not in (None, False)}
    decides = [options, merges, steps, list(kept.values()), sorted(ids.items()), listed]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    reachable = None
    if kind == "BPE" and not model.get("ignore_merges"):
        reachable = _reachable(model, merges, ids, '"ByteLevel"' in json.dumps(steps)).union(kept)
    tokens = dict(sorted(ids.items(), key=lambda item: item[1]))
    return Vocabulary(str(kind), tokens, kept, roles, {str(p[0]): float(p[1]) for p in listed}, digest, reachable)


def _reachable(
    model: Mapping[str, Any], merges: Sequence[tuple[str, ...]], ids: Iterable[str], bytewise: bool
) -> frozenset[str]:
    before, after = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    letters = {t for t in ids if len(t.removeprefix(before).removesuffix(after)) == 1}
    if bytewise:
        from tokenizers.pre_tokenizers import ByteLevel

        letters &= set(ByteLevel.alphabet())
    formed = {left + right.removeprefix(before) for left, right in merges}
    if model.get("byte_fallback"):
        formed |= {f"<0x{byte:02X}>" for byte in range(256)}
    return frozenset(letters | formed | {str(model.get("unk_token"))})


@dataclass(frozen=True, slots=True)
class Plan:
    """One vocabulary for several models.

    Attributes
    ----------
    vocabularies : mapping
        Model -> its vocabulary, in the order given.
    donor : str
        The model that gives the configuration.
    origin : str
        The model whose ids, and files, the result has: the donor, or the one that was named.
    tokens : mapping
        Token -> id of the result, in the order of the ids.
    new : tuple of str
        Tokens that the origin does not have.
    known : int
        Rows with a meaning: those of the tokens. The rest is padding.
    rows : int
        Rows of the result's embeddings.
    held : mapping
        Model -> rows of its embeddings.
    permutations : mapping
        Model -> (rows,) int64: the model's row for each row of the result, -1 where it has none.
    words : tuple of str
        Where the models differ, one sentence each.
    """

    vocabularies: Mapping[str, Vocabulary]
    donor: str
    origin: str
    tokens: Mapping[str, int]
    new: tuple[str, ...]
    known: int
    rows: int
    held: Mapping[str, int]
    permutations: Mapping[str, Ids]
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """What became of the tokenizer files.

    Attributes
    ----------
    files : tuple of str
        Their names.
    config, generation : mapping
        Keys of config.json and of generation_config.json to set.
    words : tuple of str
        What was left out.
    """

    files: tuple[str, ...]
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    words: tuple[str, ...] = ()


def write_tokenizer(plan: Plan, folder: Path, out: Path, template: str | None = None) -> Written:
    """Write the tokenizer of a plan: the origin's files byte for byte, extended only by what a union adds.

    New tokens that are added tokens of their model become added tokens here, with the same flags; the others become
    entries of the tokenizer's model, without merges. All tokens then stand in the model's vocabulary, since a reader
    numbers anew those that do not.

    Parameters
    ----------
    plan : Plan
        From `honeloom.merging.engine.embeddings.combine`.
    folder : Path
        Tokenizer files of `plan.origin`.
    out : Path
        The result's folder; must exist.
    template : str, optional
        Chat template instead of the origin's.

    Raises
    ------
    CheckpointError
        A file is damaged.
    """
    copy_tokenizer(folder, out)
    if template is not None and template != read_template(folder):
        _set_template(out, template)
    else:
        for extra in sorted((folder / _TEMPLATES).glob("*.jinja")):
            (out / _TEMPLATES).mkdir(exist_ok=True)
            copy_file(extra, out / _TEMPLATES / extra.name)
    words = _extend(plan, out) if plan.new else []
    config: dict[str, Any] = {"vocab_size": plan.rows}
    generation: dict[str, Any] = {}
    if plan.origin != plan.donor:
        config |= _special_ids(plan, folder / "config.json")
        generation = _special_ids(plan, folder / "generation_config.json")
    files = [*tokenizer_files(out), *(f"{_TEMPLATES}/{p.name}" for p in sorted((out / _TEMPLATES).glob("*.jinja")))]
    return Written(tuple(files), config, generation, tuple(words))


def _special_ids(plan: Plan, file: Path) -> dict[str, Any]:
    """Ids of special tokens beside another model's tokenizer: those of its own file, else of its tokenizer's roles."""
    own, roles = _object(file), plan.vocabularies[plan.origin].roles
    ids = {f"{role}_id": plan.tokens.get(roles.get(role, "")) for role in IN_CONFIG}
    return {key: own.get(key, value) for key, value in ids.items()}


def _extend(plan: Plan, out: Path) -> list[str]:
    """Add the new tokens to the copied files; says which files cannot have them and are left out."""
    owners = [v.added for v in plan.vocabularies.values()]
    added = {t: flags for t in plan.new if (flags := next((o[t] for o in owners if t in o), None))}
    config, complete = _object(out / "tokenizer_config.json"), (out / "tokenizer.json").is_file()
    if complete:
        content = _object(out / "tokenizer.json")
        vocab = content["model"]["vocab"]
        content["model"]["vocab"] = _pieces(plan, vocab) if isinstance(vocab, list) else dict(plan.tokens)
        listed = [*(content.get("added_tokens") or ()), *added.values()]
        content["added_tokens"] = [{**token, "id": plan.tokens[token["content"]]} for token in listed]
        _write(out / "tokenizer.json", content)
    if (out / "vocab.json").is_file():
        _write(out / "vocab.json", dict(plan.tokens))
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(plan.tokens[t]): flags for t, flags in added.items()}
        _write(out / "tokenizer_config.json", config)
    if added and ((out / "added_tokens.json").is_file() or not complete):
        _write(out / "added_tokens.json", _object(out / "added_tokens.json") | {t: plan.tokens[t] for t in added})
    stale = [n for n in tokenizer_files(out) if n.endswith(".model") or n == "vocab.txt"]
    for name in stale:
        (out / name).unlink()
    return [f"{name}: left out, it cannot hold the tokens that the union adds; tokenizer.json does" for name in stale]


def _pieces(plan: Plan, listed: Sequence[Any]) -> list[Any]:
    """A Unigram model's list, where place is id: new pieces keep their own score, but none becomes the least likely."""
    names = {i: t for t, i in plan.tokens.items()}
    scores = {t: score for v in reversed([*plan.vocabularies.values()]) for t, score in v.scores.items()}
    least = min(piece[1] for piece in listed)
    later = (names[i] for i in range(len(listed), plan.known))
    return [*listed, *([token, max(least, scores.get(token, least))] for token in later)]


def _write(path: Path, content: Any) -> None:
    """A text as it is, anything else as JSON."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with open(path, "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_template(folder: Path) -> str | None:
    """The chat template of a model folder, the default one of several; None if it has none.

    Raises
    ------
    CheckpointError
        A file is damaged.
    """
    file = folder / "chat_template.jinja"
    try:
        if file.is_file():
            return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8: {error}; download the folder again") from None
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = _object(folder / name).get("chat_template")
        if isinstance(template, list):
            template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
        if template is not None:
            return str(template)
    return None


def _set_template(out: Path, template: str) -> None:
    """Where transformers looks first, and nowhere else."""
    _write(out / "chat_template.jinja", template)
    (out / "chat_template.json").unlink(missing_ok=True)
    config = _object(out / "tokenizer_config.json")
    if config.pop("chat_template", None) is not None:
        _write(out / "tokenizer_config.json", config)


_BUILT_IN: Mapping[str, str] = {
    "chatml": (
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    "llama3": (
        "{{- '<|begin_of_text|>' -}}{%- for message in messages -%}"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
        "{{- message['content'] | trim + '<|eot_id|>' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
    ),
    "alpaca": (
        "{{- bos_token -}}{%- if messages[0]['role'] != 'system' -%}{{- 'Below is an instruction that describes a task."
        " Write a response that appropriately completes the request.\\n\\n' -}}{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}{{- '### Instruction:\\n' + message['content'] + '\\n\\n' -}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{- '### Response:\\n' + message['content'] -}}{{- eos_token -}}{{- '\\n\\n' -}}"
        "{%- elif message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}"
        "{%- else -%}{{- raise_exception('the alpaca format has no role ' + message['role']) -}}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}"
    ),
}
"""Published formats: OpenAI's ChatML, Meta's Llama 3 prompt format, Stanford Alpaca's prompt."""
_TURN_ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
_MARKER = re.compile(r"<[|｜][^\s'\"{}+<>|｜]+[|｜]>")


def choose_template(spec: str, folders: Mapping[str, Path], plan: Plan) -> tuple[str | None, list[str]]:
    """Find a chat template, and check that the result's tokenizer has its special tokens.

    A marker such as <|im_start|> must be a token of the result, and so must every added token like [INST] of the
    template's model (of any model, for a template from elsewhere) that the template writes; what is no token to the
    template's own model either is plain text. The template is not run.

    Parameters
    ----------
    spec : str
        "auto": the template that comes with the result's tokenizer; a model; "chatml", "llama3" or "alpaca"; or the
        text of a Jinja template.
    folders : mapping
        Model -> folder of its tokenizer files.
    plan : Plan
        The result's vocabulary.

    Returns
    -------
    str or None
        The template's text; None if there is none.
    list of str
        What a user should know of it.

    Raises
    ------
    ConfigError
        The name is not known, or the model has no template.
    TemplateError
        A special token of the template is no token of the result.
    """
    owner = plan.origin if spec == "auto" else spec if spec in folders else None
    text = read_template(folders[owner]) if owner else _built_in(spec, folders)
    words = []
    if owner:
        others = [n for n in folders if n != owner and read_template(folders[n]) not in (None, text)]
        has = f"{owner}'s" if text is not None else "none"
        words += [f"chat template: the result has {has}; different ones: {', '.join(others)}"] * bool(others)
    if text is None and spec != "auto":
        raise ConfigError(f"chat_template: {spec} has none; name a model that has one, or give its text")
    if text is None:
        return None, words
    return text, words + _check_markers(text, owner, plan) + _check_end(spec, plan)


def _built_in(spec: str, folders: Mapping[str, Path]) -> str:
    if spec in ("mistral", "exaone"):
        raise ConfigError(
            f"chat_template {spec!r}: differs between versions of these models; give the template's text, or name a "
            f"model of the merge that has it ({', '.join(folders)})"
        )
    if spec not in _BUILT_IN and "{{" not in spec and "{%" not in spec:
        known = ", ".join(["auto", *_BUILT_IN, *folders])
        raise ConfigError(f"chat_template {spec!r}: must be one of {known}, or the text of a Jinja template")
    return _BUILT_IN.get(spec, spec)


def _check_markers(text: str, owner: str | None, plan: Plan) -> list[str]:
    if not plan.tokens:
        return ["chat template: its special tokens cannot be looked up in a tokenizer that is only copied"]
    models = [plan.vocabularies[owner]] if owner else list(plan.vocabularies.values())
    marked = {t for v in models for t in v.added if t in text and t[0] in "<[" and t[-1] in ">]"}
    markers = sorted(marked | set(_MARKER.findall(text)))
    plain = [t for t in markers if owner and t not in plan.vocabularies[owner].tokens]
    missing = [t for t in markers if t not in plan.tokens and t not in plain]
    if missing:
        raise TemplateError(
            f"chat_template: writes {', '.join(map(repr, missing))}, which the result's vocabulary does not have; set "
            f"tokenizer.source to union or to a model that has it, or choose another template than {owner or 'this'}"
        )
    return [f"chat template: {t!r} is no token of {owner}, just text" for t in plain]


def _check_end(spec: str, plan: Plan) -> list[str]:
    """Whether generation would stop at the end of a turn."""
    end, eos = _TURN_ENDS.get(spec), plan.vocabularies[plan.origin].roles.get("eos_token")
    if end is None or end == eos:
        return []
    return [
        f"chat template {spec} ends a turn with {end!r} (id {plan.tokens.get(end)}), while eos_token is {eos!r}; "
        "generation stops there only if eos_token_id in generation_config.json names it too"
    ]
