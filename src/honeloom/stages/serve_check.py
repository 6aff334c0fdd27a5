"""`serve-check`: a model in its runtime against its source, token by token, with near ties told apart from errors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from honeloom.backends.devices import release_memory
from honeloom.backends.hf.compare import divergence, probe_ids, row_logits
from honeloom.backends.hf.greedy import continue_greedily
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer, max_positions
from honeloom.backends.hf.reload_export import GGUF_NAME
from honeloom.backends.llama_cpp import ask_llama_cpp, llama_python
from honeloom.checkpoint.folders import read_config
from honeloom.checkpoint.gguf.quant import FILE_TYPES
from honeloom.errors import ConfigError, IncompatibleModelsError, SourceError
from honeloom.registry import load_target
from honeloom.runs.manifest import load_manifest
from honeloom.stages.export_texts import PROMPTS
from honeloom.stages.inputs import ResolvedInput, recorded_inputs, resolve_model
from honeloom.system import peak_rss
from honeloom.types.report import Check, Cost, Report

__all__ = ["KL_LIMITS", "Continuation", "serve_check"]

Runtime = Literal["llama.cpp", "transformers"]
KL_LIMITS = {"F32": 2e-4, "F16": 2e-4, "BF16": 2e-4, "Q8_0": 5e-2}
"""Mean KL divergence in nats that the number types of a file, and the runtime's own, may make.

llama.cpp rounds activations and its cache too. Measured with five trained models, at most: F32 3e-6, F16 2e-5, BF16
2e-5, Q8_0 2e-3 on real rows and 1.2e-2 on texts far from what a model was trained on.
"""


@dataclass(frozen=True, slots=True)
class Continuation:
    """Greedy tokens after one prompt, in the source and in the runtime.

    Attributes
    ----------
    first_difference : int or None
        Position of the first token that differs, counted from the prompt's end.
    margin : float or None
        By how much the source prefers its token there to the runtime's, in logits.
    error : float or None
        Largest difference of logits at all other positions; a margin up to twice that is a near tie.
    near_tie : bool or None
        Whether that explains the difference.
    """

    prompt: str
    source: list[int]
    found: list[int]
    first_difference: int | None = None
    margin: float | None = None
    error: float | None = None
    near_tie: bool | None = None


def serve_check(
    target: str | Path,
    *,
    against: str | Path | None = None,
    runtime: Runtime | None = None,
    tokens: int = 24,
    device: str = "auto",
) -> Report:
    """Run a model in its runtime, and compare what it writes with its source.

    Parameters
    ----------
    target : path or hub id
        The folder that `export` wrote, a GGUF file, or a model.
    against : path or hub id, optional
        The source, computed by transformers in float32; by default the model that the export was made from.
    runtime : {"llama.cpp", "transformers"}, optional
        By default llama.cpp for a GGUF file, transformers for a model folder.
    tokens : int
        Written after each of three prompts, greedily.
    device : str
        Where transformers computes.

    Returns
    -------
    Report
        `details` has `source`, `runtime`, `kl`, and `prompts`: for each a `Continuation`. `status` is failed where the
        mean KL divergence is above its limit, or a token differs by more than a near tie.

    Raises
    ------
    ConfigError, SourceError
        The source is not known, the runtime does not run such a thing, or the file is of a type without a limit.
    MissingExtraError
        No Python here has llama.cpp.
    VerificationError
        llama.cpp does not load the file.
    """
    started, cpu = time.monotonic(), time.process_time()
    if tokens < 1:
        raise ConfigError(f"tokens: {tokens}; give at least 1")
    file = _gguf_file(Path(target))
    runtime = _choose_runtime(file, target, runtime)
    kind = _file_type(file) if file else "F32"
    source = _find_source(Path(target), against)
    prompts, expected, texts = _ask_source(source, tokens, device)
    rows = [[*p, *e[:-1]] for p, e in zip(prompts, expected.tokens, strict=True)]
    if file is not None:
        _require_vocabulary(source, expected, file, _vocabulary(file))
        answer = ask_llama_cpp(file, rows=rows, prompts=prompts, tokens=len(expected.tokens[0]))
        found = _Written(answer.greedy, [torch.from_numpy(part) for part in answer.rows])
        version = answer.version
    else:
        model = resolve_model(str(target))
        if model.paths[0] != source.paths[0]:  # the same folder has one vocabulary
            _require_vocabulary(source, expected, target, read_config(model.base or model.paths[0]).get("vocab_size"))
        found, version = _ask_model(model, prompts, rows, len(expected.tokens[0]), device)
    kl = divergence(expected.logits, found.logits)
    compared = [
        _compare(text, len(p), a, b, x, y, rounded=kl <= KL_LIMITS[kind])
        for text, p, a, b, x, y in zip(
            texts, prompts, expected.tokens, found.tokens, expected.logits, found.logits, strict=True
        )
    ]
    checks = _checks(runtime, kind, kl, sum(map(len, rows)), compared)
    return Report(
        verb="serve-check",
        status="ok" if all(c.passed for c in checks) else "failed",
        out=None,
        seed=0,
        artefact=None,
        verification=checks,
        cost=Cost(round(time.monotonic() - started, 3), round(time.process_time() - cpu, 3), peak_rss()),
        details={
            "target": str(target), "source": source.value, "runtime": runtime, "version": version, "type": kind,
            "kl": kl, "prompts": [asdict(c) for c in compared],
        },
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Written:
    """Tokens after each prompt, and logits (T, V) over each prompt and the source's tokens but the last."""

    tokens: list[list[int]]
    logits: list[torch.Tensor]


def _gguf_file(target: Path) -> Path | None:
    if target.is_file() and target.suffix == ".gguf":
        return target
    return target / GGUF_NAME if (target / GGUF_NAME).is_file() else None


def _choose_runtime(file: Path | None, target: str | Path, runtime: Runtime | None) -> Runtime:
    fitting: Runtime = "llama.cpp" if file else "transformers"
    if runtime not in (None, "llama.cpp", "transformers"):
        raise ConfigError(f"runtime {runtime!r}; known are llama.cpp and transformers")
    if runtime in (None, fitting):
        if file is not None:
            llama_python()  # before anything is loaded
        return fitting
    if file is None:
        raise ConfigError(f"{target} has no model.gguf, and llama.cpp runs GGUF files: honeloom export {target} OUT")
    raise ConfigError(f"{file} is a GGUF file, which runs in llama.cpp; leave --runtime out")


def _file_type(file: Path) -> str:
    number = load_target("honeloom.backends.gguf:GgufFile")(file).get("general.file_type")
    kind = {v: k for k, v in FILE_TYPES.items()}.get(number)
    if kind is None:
        raise ConfigError(
            f"{file}: its general.file_type is {number}; limits were measured for {', '.join(KL_LIMITS)} alone. "
            "Measure coarser types by their loss in llama.cpp"
        )
    return kind


def _vocabulary(file: Path) -> int:
    opened = load_target("honeloom.backends.gguf:GgufFile")(file)
    return int(opened.need(f"{opened.need('general.architecture')}.vocab_size"))


def _require_vocabulary(source: ResolvedInput, expected: _Written, target: str | Path, size: int | None) -> None:
    wanted = expected.logits[0].shape[-1]
    if size is not None and size != wanted:
        raise IncompatibleModelsError(
            f"{target} has a vocabulary of {size} tokens, and {source.value} one of {wanted}; give --against the model "
            "that it was made from"
        )


def _find_source(target: Path, against: str | Path | None) -> ResolvedInput:
    """The model that was exported, or the one that is given."""
    if against is not None:
        return resolve_model(str(against), "against")
    folder = target if target.is_dir() else target.parent
    manifest = load_manifest(folder) or {}
    entry = next((e for e in recorded_inputs(folder) if e["place"] == "model"), None)
    if manifest.get("verb") != "export" or entry is None:
        raise ConfigError(f"{target}: no export that names its source; give the source with --against MODEL")
    value = str(folder / entry["relative"]) if entry["relative"] else (entry["paths"] or [entry["value"]])[0]
    if not Path(value).is_dir():
        value = entry["value"]
    found = resolve_model(value, "against")
    if found.fingerprint != entry["sha256"]:
        raise SourceError(
            f"{value} is not what {folder} was exported from (its content changed); give the source with --against"
        )
    return found


def _ask_source(source: ResolvedInput, count: int, device: str) -> tuple[list[list[int]], _Written, list[str]]:
    """Prompts, what the source writes after them with its logits, and how prompts are shown."""
    folder = source.paths[0]
    tokenizer = load_tokenizer(folder, base=source.base)
    model = load_model(folder, base=source.base, loading=Loading(device, "fp32"))
    limit = max_positions(model.config, tokenizer)
    prompts = [ids[: max(1, limit - count)] for ids in probe_ids(tokenizer, model.config, 0, PROMPTS)]
    count = min(count, limit - max(map(len, prompts)))
    tokens = continue_greedily(model, prompts, count)
    logits = row_logits(model, [[*p, *t[:-1]] for p, t in zip(prompts, tokens, strict=True)])
    del model
    release_memory()
    texts = list(PROMPTS) if tokenizer else [f"{len(p)} seeded token ids" for p in prompts]
    return prompts, _Written(tokens, logits), texts


def _ask_model(
    target: ResolvedInput, prompts: Sequence[list[int]], rows: Sequence[list[int]], count: int, device: str
) -> tuple[_Written, str]:
    model = load_model(target.paths[0], base=target.base, loading=Loading(device, "fp32"))
    written = _Written(continue_greedily(model, prompts, count), row_logits(model, rows))
    return written, str(load_target("transformers:__version__"))


def _compare(
    text: str, start: int, source: list[int], found: list[int], expected: torch.Tensor, served: torch.Tensor, *,
    rounded: bool,
) -> Continuation:  # fmt: skip
    """Where two continuations part, and whether the source was as good as undecided there.

    If every logit is off by at most `error`, the order of two of them can change only where they are within twice
    that. The place itself does not count: whatever differs there would explain itself. Nothing is a near tie where
    the models differ by more than rounding does.
    """
    at = next((i for i, (a, b) in enumerate(zip(source, found, strict=True)) if a != b), None)
    if at is None:
        return Continuation(text, source, found)
    row = start - 1 + at
    gaps = (expected - served).abs().amax(dim=-1)
    error = float(torch.cat([gaps[:row], gaps[row + 1 :]]).max())
    margin = float(expected[row, source[at]] - expected[row, found[at]])
    return Continuation(text, source, found, at, margin, error, rounded and margin <= 2 * error)


def _checks(runtime: str, kind: str, kl: float, positions: int, compared: Sequence[Continuation]) -> tuple[Check, ...]:
    limit = KL_LIMITS[kind]
    wrong = sum(c.near_tie is False for c in compared)
    count = len(compared[0].source)
    return (
        Check(f"{runtime} predicts as the source on {positions} tokens (mean KL divergence, nats)", kl, limit,
              kl <= limit),
        Check(f"of {len(compared)} prompts, those whose {count} greedy tokens differ by more than a near tie", wrong, 0,
              wrong == 0),
    )  # fmt: skip


def table(report: Report) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows for a person."""
    rows = []
    for entry in report.details["prompts"]:
        at = entry["first_difference"]
        same = len(entry["source"]) if at is None else at
        verdict = "same" if at is None else "near tie" if entry["near_tie"] else "differs"
        rows.append([entry["prompt"], f"{same} of {len(entry['source'])}", verdict, entry["margin"], entry["error"]])
    return ["prompt", "same tokens", "verdict", "margin", "error"], rows
