"""Rows for people and for stages: scan with quarantine, preview, convert."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from honeloom.backends.hf.chat import Encoder, UnrenderableRow
from honeloom.backends.hf.load import load_config, load_tokenizer, max_positions, token_limit
from honeloom.backends.hf.score import Scorer
from honeloom.data.reader import read_rows
from honeloom.data.rowset import RowSet
from honeloom.data.writer import convert_rows, row_ending
from honeloom.errors import ConfigError, OutputExistsError, SourceError, TemplateError
from honeloom.runs.atomic import fsync_dir
from honeloom.stages.inputs import resolve_model, resolve_rows
from honeloom.stages.row_split import place_of, read_split
from honeloom.stages.work import Work
from honeloom.types.rows import Rejected, Row

__all__ = ["convert", "limit_text", "place_of", "preview", "read_split", "scan", "tell_rejected"]


def scan(work: Work[Any], *, field: str = "rows", near_duplicates: float | None = None, dedup: bool = True) -> RowSet:
    """Read a stage's rows, and tell what was rejected; `limit` and `split` are not for a target."""
    config = work.config
    target = field == "target"
    rows = read_split(
        [f for i in work.rows(field) for f in i.files], limit=None if target else config.limit,
        split=None if target else config.split, strict=config.strict, max_bad=config.max_bad, dedup=dedup,
        near_duplicates=near_duplicates,
    )  # fmt: skip
    tell_rejected(work, rows)
    return rows


def tell_rejected(work: Work[Any], rows: RowSet) -> None:
    """Warn once about rows that were left out, by kind."""
    if rows.rejected:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(rows.counts.rejected.items()))
        first = rows.rejected[0]
        work.log.warn(
            f"{len(rows.rejected)} of {rows.counts.rows_in} rows left out ({kinds}); "
            f"first {first.where}: {first.reason}"
        )


def limit_text(scorer: Scorer, asked: int | None) -> str:
    """Say at how many tokens rows are cut, and whether the model would take more."""
    used, most = scorer.encoder.max_length, max_positions(scorer.model.config, scorer.encoder.tokenizer)
    more = f", the default limit; the model takes {most:,} (--max-length)" if asked is None and most > used else ""
    return f"{used:,} tokens{more}"


def preview(
    sources: Sequence[str], model: str, *, count: int, limit: int | None, max_length: int | None
) -> dict[str, Any]:
    """Render the first rows and say per piece of text whether it is trained.

    Raises
    ------
    TemplateError
        The chat template never makes the turn end a label, or no row keeps its turn end.
    SourceError
        The model has no tokenizer.
    """
    found = resolve_model(model)
    tokenizer = load_tokenizer(found.paths[0], base=found.base)
    if tokenizer is None:
        raise SourceError(f"{model}: no tokenizer, so rows cannot be rendered; name a model that has one")
    limit_tokens = token_limit(load_config(found.base or found.paths[0]), tokenizer, max_length)
    encoder = Encoder(tokenizer, limit_tokens, train=True)
    shown: list[dict[str, Any]] = []
    counts = {"rows": 0, "rejected": 0, "tokens": 0, "trained": 0, "truncated": 0, "ends": 0}
    rejected: list[dict[str, str]] = []
    for row in read_rows([f for s in sources for f in resolve_rows(s).files], limit=limit or count):
        if isinstance(row, Rejected):
            counts["rejected"] += 1
            rejected.append({"where": str(row.where), "reason": row.reason})
            continue
        _preview_row(row, encoder, counts, shown, rejected)
    _require_ends(counts, limit_tokens)
    plain = encoder.template is None
    return {
        "model": model,
        "template": "plain" if plain else "chat_template",
        **counts,
        "shown": shown[:count],
        "reasons": rejected[:20],
    }


def _require_ends(counts: dict[str, int], limit_tokens: int) -> None:
    if counts["rows"] and not counts["ends"]:
        advice = "mend the tokenizer's chat template, or look at the rows: they hold no assistant turn"
        if counts["truncated"]:
            advice = f"{counts['truncated']} are cut at {limit_tokens} tokens: raise --max-length, or shorten the rows"
        raise TemplateError(
            f"none of the {counts['rows']} rows has its turn end as a label, so a model tuned on them would never "
            f"stop; {advice}"
        )


def _preview_row(
    row: Row, encoder: Encoder, counts: dict[str, int], shown: list[dict[str, Any]], rejected: list[dict[str, str]]
) -> None:
    try:
        if row.kind == "choice":
            raise UnrenderableRow("multiple-choice rows are for evaluation")
        encoded = encoder.encode(row)
    except UnrenderableRow as error:
        counts["rejected"] += 1
        rejected.append({"where": str(row.where), "reason": str(error)})
        return
    counts["rows"] += 1
    counts["tokens"] += len(encoded.ids)
    counts["trained"] += encoded.targets
    counts["truncated"] += encoded.truncated
    counts["ends"] += encoded.ends
    pieces: list[dict[str, Any]] = []
    run: list[int] = []
    for i, token in enumerate(encoded.ids):
        run.append(token)
        if i + 1 == len(encoded.ids) or encoded.scored[i + 1] != encoded.scored[i]:
            pieces.append({"text": encoder.tokenizer.decode(run), "trained": encoded.scored[i]})
            run = []
    shown.append({"id": row.id, "where": str(row.where), "truncated": encoded.truncated, "pieces": pieces})


def convert(
    sources: Sequence[str], out: Path, *, to: str, limit: int | None, overwrite: bool
) -> tuple[int, list[Rejected]]:
    """Convert rows to another format; the file appears only when it is complete.

    Returns
    -------
    (int, list of Rejected)
        Rows written, and rows that could not be read or expressed.
    """
    if out.is_dir():
        raise OutputExistsError(f"{out} is a folder; name a file that ends in .jsonl, .jsonl.gz or .parquet")
    if out.exists() and not overwrite:
        raise OutputExistsError(f"{out} exists; name another file or pass --overwrite")
    formats = ("messages", "alpaca", "sharegpt", "prompt-completion")
    if to not in formats:
        raise ConfigError(f"--to {to!r}: choose one of {', '.join(formats)}")
    row_ending(out)
    files = [f for s in sources for f in resolve_rows(s).files]
    if os.path.realpath(out) in {os.path.realpath(f.path) for f in files}:
        raise OutputExistsError(f"{out} is a file that this command reads, so it is never replaced; name another file")
    rejected: list[Rejected] = []

    def usable() -> Any:
        for row in read_rows(files, limit=limit):
            if isinstance(row, Rejected):
                rejected.append(row)
            else:
                yield row

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{secrets.token_hex(4)}.{out.name}")  # the ending says how it is written
    try:
        written, unfit = convert_rows(usable(), to, temporary)  # type: ignore[arg-type]
        temporary.replace(out)
        fsync_dir(out.resolve().parent)
    except OSError as error:
        if error.filename == str(temporary):
            raise ConfigError(f"{out} cannot be written: {error.strerror}") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return written, rejected + unfit
