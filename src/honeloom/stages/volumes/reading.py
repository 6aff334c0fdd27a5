"""What a plan knows of inputs: models by their configurations, rows by counting them, and what stages will make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from honeloom.checkpoint.folders import read_config
from honeloom.config.base import DEFAULT_MAX_TOKENS
from honeloom.data.rowset import RowSet
from honeloom.data.sources import RowFile
from honeloom.errors import HoneloomError, SourceError
from honeloom.planning.memory import Decoder, read_decoder
from honeloom.planning.volume import Lengths
from honeloom.registry import load_target
from honeloom.stages.inputs import ResolvedInput
from honeloom.stages.row_split import read_split
from honeloom.types.rows import Row

__all__ = ["Made", "PlanReader", "Pool", "Shape", "Tokens", "estimate_tokens", "position_limit"]

SAMPLE = 200
"""Rows that are made to tokens where they are not all counted."""
CHARS_PER_TOKEN = 4
PER_TURN = 4
"""Tokens that a chat template adds to a turn, about."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model as a plan knows it.

    Attributes
    ----------
    settings : mapping
        Content of its config.json.
    folder : Path
        Where that is.
    tokenizer : Path or None
        Folder with its tokenizer.
    size : int
        Bytes of its weights on disk.
    active : float
        What a token passes through, as a multiple of a model with these settings.
    kind : {"model", "adapter"}
        As it lies on disk.
    predicted : bool
        Whether it is still to be made.
    """

    settings: Mapping[str, Any]
    folder: Path
    tokenizer: Path | None
    size: int
    active: float = 1.0
    kind: str = "model"
    predicted: bool = False

    @property
    def decoder(self) -> Decoder:
        """Its sizes; CheckpointError where the family is not known."""
        return read_decoder(self.settings)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.decoder.layers


@dataclass(frozen=True, slots=True)
class Pool:
    """Rows as a plan knows them: how many, their bytes, and a table from which some can be looked at."""

    count: int
    size: int
    table: RowSet | None = None
    predicted: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """What a stage will make."""

    pool: Pool | None = None
    shape: Shape | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of rows that were looked at: as trained on, of their answers, and of the sequences that scoring computes.

    `left_out` are rows of which nothing can be trained on.
    """

    tokens: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    scored: list[list[int]] = field(default_factory=list)
    left_out: int = 0


TokenCounter = Callable[[Iterable[Row], Shape, int | None], Tokens]


class PlanReader:
    """Reads what stages will read; of stages before them what they will make.

    Parameters
    ----------
    count : callable
        (rows, model, tokens per row at most) -> Tokens.
    sample : int
        Rows that are looked at, at most.
    exact : bool
        Whether `count` is exact, and no estimate.
    """

    def __init__(self, count: TokenCounter, sample: int, *, exact: bool = False) -> None:
        self._count, self._sample, self._exact = count, sample, exact
        self._made: dict[str, Made] = {}
        self._pools: dict[Any, Pool] = {}
        self._lengths: dict[Any, Lengths] = {}

    def will_make(self, folder: str, made: Made) -> None:
        """Note what a stage will make at a path."""
        self._made[folder] = made

    def shape(self, found: ResolvedInput) -> Shape:
        """A model or adapter; SourceError where it is not known yet.

        An adapter has the settings of its base, and its own bytes.
        """
        if found.relative is None and not found.paths and not found.missing:
            made = self.made_at(found.value)
            if made is not None and made.shape is not None:
                return made.shape
            raise SourceError(f"{found.value}: what model it will be cannot be told before it is there")
        if found.missing:
            folder = load_target("honeloom.backends.hub:fetch_config")(found.value)
            settings = read_config(folder)
            return Shape(settings, folder, None, 2 * read_decoder(settings).parameters)
        folder = found.base or found.paths[0]
        own = found.paths[0]
        tokenizer = own if (own / "tokenizer.json").is_file() else folder
        weights = sum(p.stat().st_size for p in own.glob("*.safetensors"))
        kind = "adapter" if (own / "adapter_config.json").is_file() else "model"
        settings = read_config(folder) if (folder / "config.json").is_file() else {}
        return Shape(settings, folder, tokenizer, weights, _active(settings), kind)

    def pool(self, inputs: Sequence[ResolvedInput], config: Any, *, whole: bool = False, **reading: Any) -> Pool:
        """Usable rows of some inputs together.

        Parameters
        ----------
        inputs : sequence of ResolvedInput
            Of one field of the settings.
        config : RowsConfig
            For limit, split and what counts as unusable.
        whole : bool
            Of a target, whatever `limit` and `split` say of the rows.
        reading : Any
            Of `RowSet.scan`: dedup, near_duplicates.
        """
        limit, split = (None, None) if whole else (config.limit, getattr(config, "split", None))
        files = tuple(f for i in inputs for f in i.files)
        made = [m.pool for i in inputs if not i.files and (m := self.made_at(i.value)) and m.pool]
        if missing := [i.value for i in inputs if i.missing]:
            raise SourceError(f"not downloaded yet: {', '.join(missing)}")
        if len(made) + sum(bool(i.files) for i in inputs) < len(inputs):
            raise SourceError("rows of a stage that makes none")
        pools = [self._read(files, limit, split, config, reading)] if files else []
        if made:
            pools += [_cut(pool, limit, split) for pool in made]
        return _together(pools)

    def _read(
        self, files: tuple[RowFile, ...], limit: int | None, split: Any, config: Any, reading: Mapping[str, Any]
    ) -> Pool:
        key = (files, limit, split, tuple(sorted(reading.items())))
        if key not in self._pools:
            given = {"limit": limit, "split": split, "strict": config.strict, "max_bad": config.max_bad, **reading}
            table = read_split(files, **given)
            size = sum(f.path.stat().st_size for f in files if f.format != "lab")
            self._pools[key] = Pool(len(table), size or 200 * len(table), table)
        return self._pools[key]

    def lengths(self, pool: Pool, shape: Shape, max_length: int | None) -> Lengths:
        """Tokens of rows by a model's tokenizer."""
        if pool.table is None or not len(pool.table):
            return Lengths(pool.count)
        key = (id(pool.table), shape.tokenizer, max_length)
        if key not in self._lengths:
            table, everything = pool.table, len(pool.table)
            seen = min(self._sample, everything)
            places = sorted({(2 * k + 1) * everything // (2 * seen) for k in range(seen)})
            found = self._count(table.take(places), shape, max_length)
            usable = everything if not found.left_out else everything * len(found.tokens) // max(1, len(places))
            self._lengths[key] = Lengths.of(
                usable, found.tokens, found.targets, found.scored, counted=self._exact and seen == everything
            )  # fmt: skip
        looked = self._lengths[key]
        if pool.count == len(pool.table):
            return looked
        return looked.take(round(pool.count * looked.rows / len(pool.table)))

    def made_at(self, value: str) -> Made | None:
        """What a stage will make at a path, or at one below it; None where no stage does."""
        fits = [folder for folder in self._made if value == folder or value.startswith(f"{folder}/")]
        return self._made[max(fits, key=len)] if fits else None


def _active(settings: Mapping[str, Any]) -> float:
    """Of a mixture of whole models: what a token passes through, over one expert: half an encoder before it."""
    experts = settings.get("experts")
    return 1.5 if settings.get("model_type") == "honeloom_models" and experts else 1.0


def _cut(pool: Pool, limit: int | None, split: tuple[float, float] | None) -> Pool:
    count = min(pool.count, limit) if limit else pool.count
    if split is not None:
        count = round(count * (split[1] - split[0]))
    return replace(pool, count=count, predicted=True)


def _together(pools: Sequence[Pool]) -> Pool:
    if len(pools) == 1:
        return pools[0]
    largest = max(pools, key=lambda pool: pool.count)
    return Pool(
        sum(p.count for p in pools), sum(p.size for p in pools), largest.table,
        predicted=any(p.predicted for p in pools),
    )  # fmt: skip


def position_limit(settings: Mapping[str, Any], max_length: int | None) -> int:
    """Tokens per row at most: as asked, and as the model takes."""
    text = settings.get("text_config") or settings
    longest = text.get("max_position_embeddings") or text.get("n_positions") or DEFAULT_MAX_TOKENS
    return min(int(longest), max_length or DEFAULT_MAX_TOKENS)


def estimate_tokens(rows: Iterable[Row], shape: Shape, max_length: int | None) -> Tokens:
    """Count tokens by tokenizer.json alone, with a guess of what a template adds; without one, by characters."""
    limit = position_limit(shape.settings, max_length)
    length = _tokenizer(shape.tokenizer)
    found = Tokens()
    for row in rows:
        turns = 1 if row.kind == "text" else max(1, len(row.turns))
        prompt = 0 if row.kind == "text" else length(row.prompt)
        answer = length(row.text if row.kind == "text" else row.response)
        whole = min(limit, prompt + answer + PER_TURN * turns)
        choices = [min(limit, prompt + length(choice) + PER_TURN) for choice in row.choices] or [whole]
        found.tokens.append(whole)
        found.targets.append(min(whole, answer + 1))
        found.scored.append(choices)
    return found


def _tokenizer(folder: Path | None) -> Callable[[str], int]:
    file = folder / "tokenizer.json" if folder else None
    if file is None or not file.is_file():
        return lambda text: len(text) // CHARS_PER_TOKEN + 1
    try:
        tokenizer = load_target("tokenizers:Tokenizer").from_file(str(file))
    except Exception as error:  # the library raises bare exceptions for files that it cannot read
        raise HoneloomError(f"{file}: {error}") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
