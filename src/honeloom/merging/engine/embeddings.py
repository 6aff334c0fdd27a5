"""Embeddings and heads of models with different vocabularies, row by row in the order of one vocabulary.

`combine` chooses the vocabulary, `lay_out` says for every model where each row comes from, and `permuted` reads a
tensor that way. A merge method then runs on rows that stand for the same token in every model, as on any other tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from honeloom.checkpoint.vocabulary import IN_CONFIG, Ids, Plan, Vocabulary
from honeloom.errors import ConfigError, IncompatibleModelsError
from honeloom.merging.engine.tensors import BLOCK, Read, blocks
from honeloom.merging.merge_config import TokenRule

__all__ = ["Layout", "RowReader", "combine", "lay_out", "permuted"]

_ZERO, _MEAN, _PADDING = -1, -2, -3
"""Instead of a model's place: a row of zeros, the mean of the models that have the token, the mean of all rows."""
_SHOWN = 4


def combine(
    vocabularies: Mapping[str, Vocabulary],
    donor: str,
    source: str = "base",
    pad_to_multiple_of: int | None = None,
    rows: Mapping[str, int] | None = None,
) -> Plan:
    """Choose the vocabulary of a merged model, and find every model's rows in it.

    A union keeps the donor's ids; then come the tokens that it lacks, in the order of the models and of their ids. Rows
    beyond the tokens are padding: the origin's are kept, each model giving its own row of that number if that is
    padding too, else the origin's. `pad_to_multiple_of` trims them, or adds rows that are the mean of all token rows:
    their logits are then the mean logit, while those of zero rows could be the largest of all.

    Parameters
    ----------
    vocabularies : mapping
        Model, as the user wrote it -> its vocabulary.
    donor : str
        One of them: the base, or the first model.
    source : str
        "base" (the donor's), "union", or a model.
    pad_to_multiple_of : int, optional
        Rows are the least multiple that holds all tokens; by default as many as the origin has, or needs.
    rows : mapping, optional
        Model -> rows of its embeddings; by default those that its tokens need. A token beyond them has no row.

    Raises
    ------
    ConfigError
        The source is no model.
    IncompatibleModelsError
        Vocabularies differ and one is in a format that is not read.
    """
    if source not in ("base", "union", *vocabularies):
        known_names = ", ".join(["base", "union", *vocabularies])
        raise ConfigError(f"tokenizer.source {source!r}: is no model of this merge; must be one of {known_names}")
    origin = donor if source in ("base", "union") else source
    _refuse_unread(vocabularies, origin)
    tokens = dict(vocabularies[origin].tokens)
    for vocabulary in vocabularies.values() if source == "union" else ():
        first = max(tokens.values(), default=-1) + 1
        tokens |= {t: first + i for i, t in enumerate(t for t in vocabulary.tokens if t not in tokens)}
    held = {name: (rows or {}).get(name, v.rows) for name, v in vocabularies.items()}
    known = max(tokens.values()) + 1 if tokens else held[origin]
    unit = pad_to_multiple_of
    total = -(-known // unit) * unit if unit else max(known, held[origin])
    ids = np.fromiter(tokens.values(), np.int64, len(tokens))
    new = tuple(tokens)[len(vocabularies[origin].tokens) :]
    found = {name: _ids_of(v, tokens) for name, v in vocabularies.items()}
    permutations = {
        name: _permutation(ids, found[name], v, held[name], total, held[origin]) for name, v in vocabularies.items()
    }
    words = _findings(vocabularies, origin, tokens, new, found)
    return Plan(vocabularies, donor, origin, tokens, new, known, total, held, permutations, tuple(words))


def _refuse_unread(vocabularies: Mapping[str, Vocabulary], origin: str) -> None:
    for name, vocabulary in vocabularies.items():
        same = all(v.digest == vocabulary.digest for v in vocabularies.values())
        if not vocabulary.tokens and not same:
            raise IncompatibleModelsError(
                f"{name}: its tokenizer is a {vocabulary.kind} alone, which can be copied but not matched with the "
                f"others' ({origin}'s first) token by token; make a tokenizer.json in its folder with "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder), then merge again"
            )


def _ids_of(vocabulary: Vocabulary, tokens: Mapping[str, int]) -> Ids:
    """The model's id of each token, -1 where it has none."""
    get = vocabulary.tokens.get
    return np.fromiter((get(token, -1) for token in tokens), np.int64, len(tokens))


def _permutation(ids: Ids, found: Ids, vocabulary: Vocabulary, held: int, total: int, inherited: int) -> Ids:
    result = np.arange(total, dtype=np.int64)
    result[min(held, inherited) :] = -1  # padding that is not inherited has no row in any model
    used = np.fromiter(vocabulary.tokens.values(), np.int64, len(vocabulary.tokens))
    result[used[used < total]] = -1
    result[ids] = np.where(found < held, found, -1)
    return result


def _some(items: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")


def _quoted(tokens: Sequence[str]) -> str:
    return _some([repr(t) for t in tokens[: _SHOWN + 1]])


def _findings(
    vocabularies: Mapping[str, Vocabulary],
    origin: str,
    tokens: Mapping[str, int],
    new: Sequence[str],
    found: Mapping[str, Ids],
) -> list[str]:
    """What a user should know of the differences, one sentence each."""
    base, lines = vocabularies[origin], []
    owners = Counter(token for v in vocabularies.values() for token in v.tokens)
    ids = np.fromiter(tokens.values(), np.int64, len(tokens))
    shared = len(tokens) - len(np.unique(ids))
    if shared:
        lines.append(f"{origin}: {shared:,} tokens share an id, and so a row, with another")
    for name, other in vocabularies.items():
        alone = [t for t in other.tokens if owners[t] == 1] if len(vocabularies) > 1 else []
        if alone:
            lines.append(f"{name}: {len(alone):,} tokens are in no other model ({_quoted(alone)})")
        if name != origin and other.digest != base.digest:
            lines += _conflicts(name, other, tokens, ids != found[name])
            lines += _habits(name, other, origin, base)
    return lines + _dead_entries(vocabularies, base, new)


def _conflicts(name: str, other: Vocabulary, tokens: Mapping[str, int], moved: npt.NDArray[np.bool_]) -> list[str]:
    """Ids and tokens that do not go together as in the result."""
    lines, at = [], {i: t for t, i in other.tokens.items()}
    elsewhere = [t for t, m in zip(tokens, moved, strict=True) if m and t in other.tokens]
    if elsewhere:
        lines.append(
            f"{name}: {len(elsewhere):,} tokens have other ids than in the result ({_quoted(elsewhere)}); harmless, "
            "rows are matched by token"
        )
    clash = [t for t, i in tokens.items() if at.get(i, t) != t]
    if clash:
        shown = _some([f"{tokens[t]} is {at[tokens[t]]!r}, not {t!r}" for t in clash[: _SHOWN + 1]])
        lines.append(f"{name}: {len(clash):,} ids stand for other tokens than in the result ({shown}); not mixed")
    dropped = [t for t in other.tokens if t not in tokens]
    if dropped:
        lines.append(
            f"{name}: {len(dropped):,} of its tokens are not in the result ({_quoted(dropped)}) and their rows are "
            "lost; tokenizer.source: union keeps them"
        )
    return lines


def _habits(name: str, other: Vocabulary, origin: str, base: Vocabulary) -> list[str]:
    """Where a model's texts become other tokens than the result's."""
    lines = []
    if other.kind != base.kind:
        lines.append(f"{name}: its tokenizer is {other.kind}, the result's {base.kind}; they cut a text differently")
    elif other.tokens == base.tokens:
        lines.append(f"{name}: has the same tokens as {origin}, but cuts a text or adds to it in another way")
    for role in IN_CONFIG:
        one, two = other.roles.get(role), base.roles.get(role)
        if one != two:
            lines.append(f"{name}: its {role} is {one!r}, the result's is {origin}'s, {two!r}")
    plain = [t for t in other.added if t in base.tokens and t not in base.added]
    if plain:
        lines.append(
            f"{name}: finds {len(plain):,} tokens in any text ({_quoted(plain)}) that are ordinary entries of "
            f"{origin}'s tokenizer, which may cut them up"
        )
    return lines


def _dead_entries(vocabularies: Mapping[str, Vocabulary], base: Vocabulary, new: Sequence[str]) -> list[str]:
    """Entries that the result's tokenizer never produces, or that it starts to produce."""
    plain = [t for t in new if not any(t in v.added for v in vocabularies.values())]
    if base.reachable is None:
        return [
            f"the result's tokenizer can produce the {len(plain):,} tokens that the union adds ({_quoted(plain)}), and "
            "so may cut a text differently from the one that it extends"
        ] * bool(plain)
    # A new letter needs no merge.
    dead = [t for t in [*base.tokens, *(t for t in plain if len(t) > 1)] if t not in base.reachable]
    return [
        f"the result's tokenizer can never produce {len(dead):,} of its entries, as no merge forms them "
        f"({_quoted(dead)}); their rows are kept"
    ] * bool(dead)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every row of the result comes from, for each of K models.

    Attributes
    ----------
    models : tuple of str
        Their names, in order.
    rows, known : int
        Rows of the result, and those before new padding.
    held : tuple of int
        Rows that each model's tensor must have.
    owner : ndarray
        (K, rows) int64: place of the model whose row is taken; negative for a computed row.
    index : ndarray
        (K, rows) int64: the row's number there.
    own : ndarray
        (K, rows) int64: the model's own row, -1 where it has none.
    zeros : int
        Tokens of which no model has a row.
    words : tuple of str
        What a user should know of missing rows, one sentence each.
    """

    models: tuple[str, ...]
    rows: int
    known: int
    held: tuple[int, ...]
    owner: Ids
    index: Ids
    own: Ids
    zeros: int
    words: tuple[str, ...]


def lay_out(plan: Plan, rules: Mapping[str, TokenRule] | None = None) -> Layout:
    """Find a row for every token in every model.

    A model that lacks a token takes, in this order: the row that a rule names; the donor's; the row of the only model
    that has it; the mean of the models that have it; zeros.

    Parameters
    ----------
    plan : Plan
        The result's vocabulary.
    rules : mapping, optional
        Token -> its rule. A source is "zero"; a model (its row of that token); model#id with a number, the row of that
        id; or model#token, the row of another token.

    Raises
    ------
    ConfigError
        A rule is for a token that the result does not have, or names a row that is not there.
    """
    rules = rules or {}
    names, every = tuple(plan.permutations), np.arange(plan.rows)
    own = np.stack([plan.permutations[name] for name in names])
    has = own >= 0
    count, donor = has.sum(axis=0), names.index(plan.donor)
    fill = np.where(count == 1, has.argmax(axis=0), np.where(count == 0, _ZERO, _MEAN))
    fill = np.where(has[donor], donor, fill)
    fill_index = own[np.maximum(fill, 0), every]
    padding = np.ones(plan.rows, bool)
    ids = np.fromiter(plan.tokens.values(), np.int64, len(plan.tokens))
    padding[ids] = False
    kept = padding & (every < plan.held[plan.origin])
    fill[kept], fill_index[kept] = names.index(plan.origin), every[kept]
    fill[padding & (every >= max(plan.known, plan.held[plan.origin]))] = _PADDING
    owner = np.where(has, np.arange(len(names))[:, None], fill)
    index = np.where(has, own, fill_index)
    for token, rule in rules.items():
        place, row = _named_row(plan, token, rule.source)
        here = plan.tokens[token]
        chosen = np.ones(len(names), bool) if rule.force else ~has[:, here]
        owner[chosen, here], index[chosen, here] = place, row
    lost = [t for t, i in plan.tokens.items() if count[i] == 0 and t not in rules]
    words = [
        f"{len(lost):,} tokens have no row in any model ({_quoted(lost)}); their rows are zeros. "
        "tokenizer.tokens can give them a source"
    ] * bool(lost)
    held = tuple(plan.held[name] for name in names)
    return Layout(names, plan.rows, plan.known, held, owner, index, own, len(lost), tuple(words))


def _named_row(plan: Plan, token: str, source: str) -> tuple[int, int]:
    """Place of a model, and the row there that a rule's source means."""
    where = f"tokenizer.tokens.{token}"
    if token not in plan.tokens:
        raise ConfigError(
            f"{where}: the result has no such token; set tokenizer.source to union or to a model that has it"
        )
    if source == "zero":
        return _ZERO, -1
    names = list(plan.permutations)
    # Names and tokens may themselves hold "#": the longest name that fits is meant.
    name = max((n for n in names if source == n or source.startswith(f"{n}#")), key=len, default=None)
    if name is None:
        raise ConfigError(
            f"{where}.source {source!r}: must be zero, a model, model#id or model#token; the models are "
            f"{', '.join(names)}"
        )
    text = source.removeprefix(name).removeprefix("#") if source != name else token
    by_number = source != name and text.isdecimal()
    row = int(text) if by_number else plan.vocabularies[name].tokens.get(text)
    if row is None:
        raise ConfigError(f"{where}.source {source!r}: {name} has no token {text!r}; name another model or token")
    if row >= plan.held[name]:
        raise ConfigError(
            f"{where}.source {source!r}: row {row} is beyond {name}'s embeddings, which have {plan.held[name]}"
        )
    return names.index(name), row


@dataclass(frozen=True, slots=True)
class RowReader:
    """A model's embeddings, head, or bias of the head.

    Attributes
    ----------
    read : Read
        The tensor (rows, width), flattened.
    rows, width : int
        Its shape; the width of a bias is 1.
    """

    read: Read
    rows: int
    width: int


def permuted(reads: Sequence[RowReader], layout: Layout) -> list[Read]:
    """Read tensors in the order of the result's vocabulary.

    Parameters
    ----------
    reads : sequence of RowReader
        One per model of the layout, in that order.
    layout : Layout
        From `lay_out`.

    Returns
    -------
    list of Read
        One per model: elements of its (layout.rows, width), flattened. Only the rows that a range needs are read, runs
        of neighbours at once; where nothing moves, a range is one read of the same range.

    Raises
    ------
    IncompatibleModelsError
        A tensor has fewer rows than its model's embeddings, or another width than the first.
    """
    for name, reader, held in zip(layout.models, reads, layout.held, strict=True):
        if reader.rows < held or reader.width != reads[0].width:
            raise IncompatibleModelsError(
                f"{name}: has {(reader.rows, reader.width)} where {(held, reads[0].width)} is needed (rows, width); "
                "embeddings and head of a model must have the same rows, and all models the same width"
            )
    return [_Permuted(tuple(reads), layout, place) for place in range(len(reads))]


class _Permuted:
    """One model's rows in the result's order."""

    def __init__(self, reads: tuple[RowReader, ...], layout: Layout, place: int) -> None:
        self._reads, self._layout = reads, layout
        self._owner, self._index = layout.owner[place], layout.index[place]
        self._width = reads[0].width
        self._mean_row: torch.Tensor | None = None

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        width = self._width
        first, last = start // width, -(-stop // width)
        owner, index = self._owner[first:last], self._index[first:last]
        if len(owner) and owner[0] >= 0 and (owner == owner[0]).all() and (np.diff(index) == 1).all():
            shift = (int(index[0]) - first) * width
            return self._reads[int(owner[0])].read(start + shift, stop + shift)
        values = torch.zeros(last - first, width, dtype=torch.float64)
        for kind in np.unique(owner):
            at = np.flatnonzero(owner == kind)
            if kind != _ZERO:
                values[torch.from_numpy(at)] = self._rows(int(kind), first + at, index[at])
        return values.view(-1)[start - first * width : stop - first * width]

    def _rows(self, kind: int, rows: Ids, index: Ids) -> torch.Tensor:
        if kind == _PADDING:
            return self._mean_of_all()
        return self._mean_of_owners(rows) if kind == _MEAN else _gather(self._reads[kind], index)

    def _mean_of_owners(self, rows: Ids) -> torch.Tensor:
        total = torch.zeros(len(rows), self._width, dtype=torch.float64)
        own = self._layout.own[:, rows]
        for reader, index in zip(self._reads, own, strict=True):
            at = np.flatnonzero(index >= 0)
            if len(at):
                total[torch.from_numpy(at)] += _gather(reader, index[at])
        return total.div_(torch.from_numpy((own >= 0).sum(axis=0)).unsqueeze(1))

    def _mean_of_all(self) -> torch.Tensor:
        """Two threads may both compute it: they get the same bits, the blocks are fixed."""
        if self._mean_row is None:
            total = np.zeros(self._width)
            for first, last in blocks(self._layout.known, max(1, BLOCK // self._width)):
                values = self(first * self._width, last * self._width).view(-1, self._width)
                total += np.add.reduce(values.numpy(), axis=0)
            self._mean_row = torch.from_numpy(total / self._layout.known)
        return self._mean_row


def _gather(reader: RowReader, index: Ids) -> torch.Tensor:
    """Rows by number, (n, width): each once, and neighbours in one read."""
    wanted, place = np.unique(index, return_inverse=True)
    edges = np.flatnonzero(np.diff(wanted) != 1) + 1
    firsts = wanted[np.concatenate(([0], edges))]
    lasts = wanted[np.concatenate((edges - 1, [len(wanted) - 1]))] + 1
    runs = [
        reader.read(a * reader.width, b * reader.width) for a, b in zip(firsts.tolist(), lasts.tolist(), strict=True)
    ]
    return torch.cat(runs).view(-1, reader.width)[torch.from_numpy(place)]
