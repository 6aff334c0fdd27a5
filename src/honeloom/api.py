"""The verbs as Python functions: same names and settings as the commands.

Every writing verb also takes `overwrite` and `resume` (or `mode`, "new" by default), `set` (a
list of "a.b=c") and `console` (silent by default; in a notebook, messages and progress); those that make a
model or an adapter also take `push_to_hub`: "org/name", where the verified result goes, into a private repository
unless one is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from honeloom.config.load import load_documents
from honeloom.errors import ConfigError
from honeloom.merging.documents import in_order, parts_folder, read_card
from honeloom.registry import load_target
from honeloom.runs.log import Console
from honeloom.runs.notebook import notebook_console
from honeloom.runs.output import Mode, is_complete, locate
from honeloom.runs.processes import rank
from honeloom.stages.costs import Entry, with_costs
from honeloom.stages.inputs import Resolver, resolve_model
from honeloom.stages.needs import plan_job
from honeloom.stages.options import choose_mode, read_recipe, read_settings, take_mode, take_repository
from honeloom.stages.pipeline import plan_recipe, run_recipe
from honeloom.stages.publish import check_push, push_result
from honeloom.stages.runner import prepare, require_content, run_job
from honeloom.types.report import Report
from honeloom.types.views import PlanList

__all__ = [
    "aggregate", "convert", "drop", "evaluate", "export", "extract_lora", "federate", "glue", "load_model", "merge",
    "mix", "plan", "run", "select", "tune",
]  # fmt: skip

PathLike = str | Path


def select(rows: PathLike | Sequence[PathLike], *, output_dir: PathLike, **options: Any) -> Report:
    """Choose the rows worth training on.

    Parameters
    ----------
    rows : path, glob, hub id, `lab:` split, or a sequence of them
        Rows to choose from.
    output_dir : path
        Where `selected.*`, `scores.parquet` and the report go.
    **options
        Flags of `honeloom select` and settings of `honeloom.selection.config.SelectConfig`
        (method, model, keep, ...), and `overwrite`, `resume`, `set` and `console`.

    Returns
    -------
    Report
        `path` is the file of selected rows.

    Raises
    ------
    InputError
        A setting, the rows or the model cannot be used.
    """
    return _run_verb("select", output_dir, {"rows": rows, **options})


def tune(model: PathLike, rows: PathLike | Sequence[PathLike], *, output_dir: PathLike, **options: Any) -> Report:
    """Tune a model on rows: LoRA (default) or full.

    Parameters
    ----------
    model : path, hub id or `lab:base`
        The model to tune.
    rows : path, glob, hub id, `lab:` split, or a sequence of them
        Instruction rows or plain text.
    output_dir : path
        Where the adapter (or model) goes.
    **options
        Flags of `honeloom tune` (rank, epochs, ...) and settings of
        `honeloom.tuning.config.TuneConfig`, and `overwrite`, `resume`, `set`,
        `push_to_hub` and `console`.

    Raises
    ------
    InputError
        A setting, the rows or the model cannot be used.
    NotFiniteError
        The loss became NaN or infinite; nothing is published.
    """
    return _run_verb("tune", output_dir, {"model": str(model), "rows": rows, **options})


def aggregate(adapters: PathLike | Sequence[PathLike], *, output_dir: PathLike, **options: Any) -> Report:
    """Combine LoRA adapters of one base model into one adapter, or into the base.

    Parameters
    ----------
    adapters : path, hub id, or a sequence of them
        PEFT adapter folders.
    output_dir : path
        Where the adapter (or, with `into_base`, the model) goes.
    **options
        Flags of `honeloom aggregate` (method, rank, energy, ...) and settings of
        `honeloom.federated.config.AggregateConfig`, and `overwrite`, `resume`, `set`,
        `push_to_hub` and `console`.

    Raises
    ------
    IncompatibleModelsError
        The adapters are of different bases, or the rule cannot combine them; the message says why.
    NotFiniteError
        An adapter holds NaN or infinity.
    """
    return _run_verb("aggregate", output_dir, {"adapters": adapters, **options})


def federate(model: PathLike, config: PathLike | None = None, *, output_dir: PathLike, **options: Any) -> Report:
    """Tune a model on rows that stay with their clients.

    Parameters
    ----------
    model : path, hub id or `lab:base`
        The base model of all clients.
    config : path, optional
        FED.yaml: settings of `honeloom.federated.federate_config.FederateConfig`.
    output_dir : path
        Where the adapter, `rounds.jsonl` and `partition.json` go.
    **options
        Settings that replace those of `config`, and `overwrite`, `resume`, `set`, `push_to_hub`
        and `console`.

    Raises
    ------
    InputError
        A setting, the rows or the model cannot be used.
    HoneloomError
        Too few clients reply in three rounds in a row.
    """
    reads = () if config is None else (Path(config),)
    given = {} if config is None else {"config": config}
    return _run_verb("federate", output_dir, {**given, "model": model, **options}, reads=reads)


def merge(
    config: PathLike | dict[str, Any] | None = None,
    output_dir: PathLike | None = None,
    *,
    from_card: PathLike | None = None,
    **options: Any,
) -> Report:
    """Merge models of one architecture.

    Parameters
    ----------
    config : path or dict
        Settings of `honeloom.merging.merge_config.MergeConfig`, or mergekit's YAML. A file may hold several
        documents: those with a `name` are merged first, into folders below `<output_dir>-parts`.
    output_dir : path
        Where the merged model goes.
    from_card : path, optional
        Instead of `config`: the card (README.md) of a merged model, which is made again from models whose content
        must be what the card says.
    **options
        Settings that replace those of `config`, and `overwrite`, `resume`, `set`,
        `push_to_hub` and `console`.

    Raises
    ------
    IncompatibleModelsError
        The models cannot be merged; the message names the field and both values.
    """
    if (config is None) == (from_card is None):
        raise ConfigError("merge takes a configuration or the card of a merged model; give one of the two")
    if from_card is not None:
        document, digests = read_card(Path(from_card))
        return _run_verb("merge", output_dir, {"config": document, **options}, wanted=digests)
    if isinstance(config, dict):
        return _run_verb("merge", output_dir, {"config": config, **options})
    file = Path(config or "")
    *earlier, (_, last) = in_order(load_documents(file), parts_folder(Path(output_dir or "merged")))
    mode = choose_mode(options.get("mode", "new"), options.get("overwrite", False), options.get("resume", False))
    for name, document in earlier:
        part = parts_folder(Path(output_dir or "merged")) / str(name)
        shared: dict[str, Any] = {key: options.get(key) for key in ("console", "max_memory", "threads")}
        again = "overwrite" if mode == "overwrite" else "resume"
        _run_verb("merge", part, {"config": document, "mode": again, **shared}, reads=(file,))
    return _run_verb("merge", output_dir, {"config": last, **options}, reads=(file,))


def mix(config: PathLike | dict[str, Any], output_dir: PathLike | None = None, **options: Any) -> Report:
    """Combine dense models to one mixture of experts, without training.

    Parameters
    ----------
    config : path or dict
        Settings of `honeloom.mixture.config.MixConfig`, or mergekit-moe's YAML.
    output_dir : path
        Where the mixture goes.
    **options
        Settings that replace those of `config`, and `overwrite`, `resume`, `set`,
        `push_to_hub` and `console`.

    Raises
    ------
    IncompatibleModelsError
        The experts cannot stand beside each other at this level; the message names the field and both values.
    """
    reads = () if isinstance(config, dict) else (Path(config),)
    return _run_verb("mix", output_dir, {"config": config, **options}, reads=reads)


def glue(zoo: PathLike | dict[str, Any] | None = None, output_dir: PathLike | None = None, **options: Any) -> Report:
    """Make one model of a zoo: cluster it, search merges, merge, mix, verify, advise.

    Parameters
    ----------
    zoo : path or dict
        A folder of model folders, a YAML file with `models`, `base`, `search_rows`, `report_rows`, `budget`, or such a
        mapping; settings of `honeloom.zoo.config.GlueConfig`.
    output_dir : path
        Where the model goes, beside `clusters.json`, `similarity.npz`, `search.jsonl` and `members/`.
    **options
        Flags of `honeloom glue` and settings that replace those of `zoo`, and `overwrite`, `resume`, `set`,
        `push_to_hub` and `console`.

    Raises
    ------
    InputError
        A setting, a model or the rows cannot be used.
    """
    reads = (Path(zoo),) if isinstance(zoo, str | Path) and Path(zoo).is_file() else ()
    return _run_verb("glue", output_dir, {"zoo": zoo, **options}, reads=reads)


def extract_lora(model: PathLike, base: PathLike, output_dir: PathLike, **options: Any) -> Report:
    """Extract the low-rank difference of two models as a PEFT adapter.

    Parameters
    ----------
    model : path, hub id or `lab:base`
        The tuned model; the setting `tuned` of a recipe.
    base : path, hub id or `lab:base`
        What it was tuned from, which the adapter will be loaded on.
    output_dir : path
        Where the adapter goes.
    **options
        Settings of `honeloom.merging.extract_config.ExtractConfig` (rank, energy, targets, ...), and `overwrite`,
        `resume`, `set`, `push_to_hub` and `console`.

    Raises
    ------
    IncompatibleModelsError
        The models are one, or differ in kind, vocabulary or shapes; the message names tensor and both values.
    NotFiniteError
        A model holds NaN or infinity.
    """
    return _run_verb("extract-lora", output_dir, {"tuned": str(model), "base": str(base), **options})


def convert(model: PathLike, output_dir: PathLike, **options: Any) -> Report:
    """Convert pickled weights to safetensors; no code of theirs is run.

    Parameters
    ----------
    model : path
        Folder of a model or adapter whose weights exist only as pickles (`pytorch_model.bin`, ...).
    output_dir : path
        Where the same model goes, with safetensors.
    **options
        Settings of `honeloom.checkpoint.convert_config.ConvertConfig`, and `overwrite`, `resume`, `set`,
        `push_to_hub` and `console`.

    Raises
    ------
    CheckpointError
        There is nothing to convert, or a pickle holds more than tensors.
    """
    return _run_verb("convert", output_dir, {"source": str(model), **options})


def drop(model: PathLike, output_dir: PathLike, **options: Any) -> Report:
    """Drop the least important attention, MLP or blocks of a model.

    Parameters
    ----------
    model : path, hub id or `lab:base`
        The model to make shallower.
    output_dir : path
        Where the model, `drop_plan.json` and `scores.json` go.
    **options
        Settings of `honeloom.dropping.config.DropConfig` (attention, mlp, block,
        calibration, ...), and `overwrite`, `resume`, `set`,
        `push_to_hub` and `console`.
    """
    return _run_verb("drop", output_dir, {"model": str(model), **options})


def export(model: PathLike, output_dir: PathLike, **options: Any) -> Report:
    """Write a model as one file for a runtime that reads no model folder: GGUF, for llama.cpp.

    Parameters
    ----------
    model : path, hub id or `lab:base`
        A whole model, dropped ones and standard mixtures of experts included.
    output_dir : path
        Where `model.gguf` goes.
    **options
        Settings of `honeloom.checkpoint.export_config.ExportConfig` (quant, ...), and `overwrite`, `resume`, `set`,
        `push_to_hub` and `console`.

    Raises
    ------
    InputError, NotFiniteError
        An adapter, a family that is not written, no package `gguf`; or numbers beyond float16.
    """
    return _run_verb("export", output_dir, {"model": str(model), **options})


def evaluate(model: PathLike, *, output_dir: PathLike | None = None, **options: Any) -> Report:
    """Measure a model per domain, with standard errors; optionally against another.

    Parameters
    ----------
    model : path, hub id or `lab:base`
        The model to measure; an adapter folder brings its base.
    output_dir : path, optional
        Keeps the report and `examples.parquet`.
    **options
        Settings of `honeloom.evaluation.config.EvaluateConfig` (rows, tasks, against, ...),
        and `overwrite`, `resume`, `set` and `console`.
    """
    return _run_verb("evaluate", output_dir, {"model": str(model), **options})


def run(
    recipe: PathLike,
    *,
    output_dir: PathLike,
    set: Sequence[str] = (),
    seed: int | None = None,
    withdraw: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    mode: Mode = "new",
    console: Console | None = None,
) -> Report:
    """Run a recipe file.

    Parameters
    ----------
    recipe : path
        The YAML file.
    output_dir : path
        The run folder.
    set : sequence of str
        Overrides: "model=X" sets a variable, "pick.keep=5%" a stage's key.
    seed : int, optional
        Seed of the stages that name none; default: the recipe's.
    withdraw : sequence of str
        Ids of rows that no stage may read, beside those that the recipe withdraws.
    overwrite, resume : bool
        Whether `output_dir` may hold anything, or an earlier honeloom result.
    mode : {"new", "resume", "overwrite"}
        The same in one word. Stages that match are reused in every mode.
    """
    path = Path(recipe)
    mode = choose_mode(mode, overwrite, resume)
    out = Path(output_dir)
    own_lock = path.resolve() == locate(out) / "recipe.lock.yaml"  # it has been read, and is written again
    return run_recipe(
        read_recipe(path, set, seed, withdraw), out, mode=mode, reads=[] if own_lock else [path],
        console=console or notebook_console(),
    )  # fmt: skip


def plan(
    verb: str,
    *,
    output_dir: PathLike | None = None,
    calibrate: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> PlanList:
    """Say what a verb or a recipe would do and cost; loads no weights of its models and writes nothing.

    Parameters
    ----------
    verb : str
        A verb of `honeloom.verbs`, or "run" with `recipe` (and `set`, `seed` and `withdraw`).
    output_dir : path, optional
        Where the result would go; tells what would be reused.
    calibrate : bool
        Also count all tokens and time what is to be done, for the seconds of every stage: each verb
        is tried on the built-in lab in a temporary folder, and passes and steps are timed on random weights.
    console : Console, optional
        For the progress of that.
    **settings
        As of the verb's function.

    Returns
    -------
    PlanList
        A list of StagePlan, with the sums in `total`.

    Raises
    ------
    InputError
        A setting or an input cannot be used, or calibrated.
    """
    if verb == "run":
        given = (settings.get("set", ()), settings.get("seed"), settings.get("withdraw", ()))
        recipe = read_recipe(Path(settings["recipe"]), *given)
        out = Path(output_dir or "run")
        return PlanList(plan_recipe(recipe, out, calibrate=calibrate, console=console))
    take_mode(settings)
    repository = take_repository(verb, settings)
    if verb == "merge" and isinstance(settings.get("config"), str | Path):
        documents = load_documents(Path(settings["config"]))
        if len(documents) > 1:
            entries = _plan_documents(documents, Path(output_dir or "merged"))
            return PlanList(with_costs(entries, calibrate=calibrate, console=console))
    job = prepare(verb, read_settings(verb, settings), Resolver(fetch=False))
    done = output_dir is not None and is_complete(locate(Path(output_dir)), job.key)
    planned = replace(plan_job(job, verb, "reuse" if done else "run"), push_to_hub=repository)
    return PlanList(with_costs([Entry(job, planned)], calibrate=calibrate, console=console))


def _plan_documents(documents: Sequence[dict[str, Any]], out: Path) -> list[Entry]:
    """Plans of merges that build on each other, before any of them has been made."""
    parts = parts_folder(out)
    ordered = in_order(documents, parts)
    resolver = Resolver(fetch=False, pending={str(parts / str(name)): str(name) for name, _ in ordered[:-1]})
    entries = []
    for name, document in ordered:
        job = prepare("merge", read_settings("merge", {"config": document}), resolver)
        entries.append(Entry(job, plan_job(job, name or "merge", "run"), str(parts / str(name))))
    return entries


def load_model(
    model: PathLike,
    *,
    device: str = "auto",
    dtype: str = "auto",
    load_in: Literal["4bit", "8bit"] | None = None,
    attn: Literal["sdpa", "flash", "eager"] | None = None,
) -> Any:
    """Open any model or adapter folder that honeloom wrote, or any Hugging Face model.

    Returns
    -------
    transformers.PreTrainedModel or peft.PeftModel
        In evaluation mode. Safetensors only; code in repositories is never run.
    """
    found = resolve_model(str(model))
    loading = load_target("honeloom.backends.hf.load:Loading")(device, dtype, load_in, attn, spread=True)
    return load_target("honeloom.backends.hf.load:load_model")(found.paths[0], base=found.base, loading=loading)


def _run_verb(
    verb: str,
    output_dir: PathLike | None,
    options: dict[str, Any],
    *,
    reads: Sequence[Path] = (),
    wanted: Mapping[str, str] | None = None,
) -> Report:
    """Validate settings (None means the default), find the inputs (with the `wanted` content, by place), run."""
    mode = take_mode(options)
    console: Console | None = options.pop("console", None) or notebook_console()
    if output_dir is None and verb != "evaluate":
        raise ConfigError(f"{verb} writes its result: give an output folder (--output-dir OUT)")
    repository = take_repository(verb, options)
    settings = read_settings(verb, options)
    if repository is not None and rank() == 0:
        check_push(repository)
    job = prepare(verb, settings, Resolver(), runs=True)
    require_content(job, wanted or {})
    report = run_job(job, Path(output_dir) if output_dir else None, mode=mode, reads=reads, console=console)
    if repository is not None and output_dir is not None and rank() == 0:
        push_result(locate(Path(output_dir)), repository, console)
    return report
