"""What `select` lends to its methods: models, vectors, tunings as utilities, and where they run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from hashlib import blake2b
from typing import Any

from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.embed import Embedder, layer_at
from honeloom.backends.hf.load import Loading
from honeloom.backends.hf.score import Scorer
from honeloom.data.rowset import RowSet
from honeloom.errors import ConfigError, RowsError
from honeloom.registry import load_target
from honeloom.runs.journal import Journal, read_journal
from honeloom.selection.config import SelectConfig, UtilityConfig
from honeloom.selection.daar_config import RoundTuning
from honeloom.selection.tfidf import tfidf_vectors
from honeloom.selection.vectors import read_vectors, stored_vectors, unit_blocks
from honeloom.stages.inputs import ResolvedInput
from honeloom.stages.work import Work
from honeloom.types.ports import EmbedPort, GeneratePort, GradientPort, RowTable, SelectionData, UtilityPort, Vectors
from honeloom.types.rows import Row
from honeloom.valuation.executors import Executor, Inline, Outcome, ProcessPool, Task, Utility
from honeloom.valuation.ledger import Ledger

__all__ = ["LEDGER", "Ports"]

LEDGER = "evaluations.jsonl"
SCRATCH = ".vectors"


class Ports:
    """The ports of one run, opened on first use; `close` removes what they left in the folder."""

    def __init__(self, work: Work[SelectConfig]) -> None:
        self._work = work

    def data(self, rows: RowSet, target: RowSet | None, wanted: int | None) -> SelectionData:
        """What a method works on."""
        config, log = self._work.config, self._work.log
        return SelectionData(
            rows,
            lambda: self.scorer(),
            config.seed,
            target=target,
            budget=config.budget,
            wanted=wanted,
            embed=self.embed,
            tuned=self.tuned,
            open_gradients=self.gradients,
            open_utility=self.utility,
            open_evaluations=self.evaluations,
            open_generator=self.generator,
            open_journal=self.journal,
            say=log.say,
            warn=log.warn,
        )

    def close(self) -> None:
        """Remove stored vectors."""
        shutil.rmtree(self._work.dir / SCRATCH, ignore_errors=True)

    def scorer(self) -> Scorer:
        """The model as one that scores rows, loaded once."""
        return self._scorer

    @cached_property
    def _scorer(self) -> Scorer:
        found, config = self._model(), self._work.config
        return Scorer.open(
            found.paths[0],
            base=found.base,
            loading=Loading.of(config, spread=True),
            batch_size=config.batch_size,
            max_length=config.max_length,
            progress=self._work.log.track,
        )

    def embed(self, rows: RowTable, how: Any) -> Vectors:
        """Vectors of length 1 as a memory map; a row that has none is zero.

        Hidden states are standardised first: a few of their dimensions are large in every row.
        """
        return self._embed(rows, how, "", self._embedder)

    def tuned(self, rows: Sequence[Row], settings: RoundTuning) -> EmbedPort:
        """The model after a tuning on these rows, as one that embeds rows."""
        model = self._tunable(settings.rank)
        steps = settings.epochs * math.ceil(len(rows) / settings.batch_size)
        tuning = load_target("honeloom.backends.hf.utility:TuningUtility")(
            model, [rows], [], steps=steps, batch_size=settings.batch_size, lr=settings.lr, score="loss",
            seed=self._work.config.seed,
        )  # fmt: skip
        scorer = tuning.tuned(frozenset({0}))
        encoder = Encoder(scorer.encoder.tokenizer, scorer.encoder.max_length)

        def embedder(depth: float) -> Embedder:
            return Embedder(scorer.model, encoder, layer_at(scorer.model, depth), self._work.config.batch_size)

        return lambda table, how: self._embed(table, how, tuning.fingerprint, embedder)

    def _embed(self, rows: RowTable, how: Any, model: str, embedder: Callable[[float], Embedder]) -> Vectors:
        """Vectors by `how` of the named model; "" is the model as it was given."""
        folder = self._work.dir / SCRATCH
        folder.mkdir(exist_ok=True)
        digest = blake2b(f"{model}\n{how.model_dump_json()}".encode(), digest_size=8)
        for row_id in rows.ids:  # a method may ask for vectors of other rows than the usable ones
            digest.update(b"\n" + row_id.encode("utf-8", "surrogatepass"))
        name = digest.hexdigest()
        path = folder / f"{name}.npy"
        if path.exists():  # of an interrupted attempt
            return read_vectors(path, len(rows), warn=self._work.log.warn)
        raw_path = folder / f"{name}.raw.npy"
        if how.type == "file":
            raw = read_vectors(self._work.inputs["method.embedding.path"].paths[0], len(rows), warn=self._work.log.warn)
        else:
            # A raw file that is there is complete: an interrupted attempt got that far.
            raw = (
                read_vectors(raw_path, len(rows), warn=self._work.log.warn)
                if raw_path.exists()
                else stored_vectors(raw_path, self._blocks(rows, how, embedder), len(rows))
            )
        vectors = stored_vectors(path, unit_blocks(raw, standardise=how.type == "hidden"), len(rows))
        raw_path.unlink(missing_ok=True)
        return vectors

    def _blocks(self, rows: RowTable, how: Any, embedder: Callable[[float], Embedder]) -> Iterator[Vectors]:
        config, track = self._work.config, self._work.log.track
        if how.type == "tfidf":
            return tfidf_vectors(rows, size=how.size, seed=config.seed)
        if how.type == "sentence_transformers":
            encode: Callable[..., Iterator[Vectors]] = load_target(
                "honeloom.backends.sentence_encoder:sentence_vectors"
            )
            paths = self._work.inputs["method.embedding.encoder"].paths
            name = str(paths[0]) if paths else how.encoder
            return encode(track(rows, "embed rows", len(rows)), name, device=config.device,
                          batch_size=config.batch_size)  # fmt: skip
        return embedder(how.depth).embed(rows, lambda items, label, _: track(items, label, len(rows)))

    def _embedder(self, depth: float) -> Embedder:
        found, config = self._model(), self._work.config
        return Embedder.open(
            found.paths[0], base=found.base, layer=depth, loading=Loading.of(config, spread=True),
            batch_size=config.batch_size, max_length=config.max_length,
        )  # fmt: skip

    def generator(self) -> GeneratePort:
        """The method's own model that writes, else the model itself."""
        config = self._work.config
        found = self._work.inputs.get("method.generator") or self._model()
        generator = load_target("honeloom.backends.hf.generate:Generator")
        port: GeneratePort = generator.open(
            found.paths[0], base=found.base, loading=Loading.of(config, spread=True), batch_size=config.batch_size
        )
        return port

    @contextmanager
    def journal(self, name: str) -> Iterator[tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]]:
        """A file of records in the output folder, which an interrupted attempt may have begun."""
        path = self._work.dir / name
        before = list(read_journal(path))
        with Journal(path) as journal:
            yield before, journal.append

    def gradients(self, rank: int) -> GradientPort:
        """The model with fresh adapters, as one that compares gradients."""
        found, config = self._model(), self._work.config
        gradients = load_target("honeloom.backends.hf.gradients:RowGradients")
        port: GradientPort = gradients.open(
            found.paths[0], base=found.base, loading=Loading.of(config), rank=rank, seed=config.seed,
            batch_size=config.batch_size, max_length=config.max_length, progress=self._work.log.track,
        )  # fmt: skip
        return port

    def utility(self, players: Sequence[Sequence[Row]], dev: Sequence[Row], settings: UtilityConfig) -> UtilityPort:
        """Tune on the players' rows, score the development rows.

        Raises
        ------
        RowsError
            Nothing of the development rows can be scored.
        """
        config = self._work.config
        if settings.steps is None:
            raise ValueError("the steps of a utility must be known when it is opened")
        model = self._tunable(settings.rank)
        self._tell_lost(model.encoder(), players, dev)
        port: UtilityPort = load_target("honeloom.backends.hf.utility:TuningUtility")(
            model, players, dev, steps=settings.steps, batch_size=settings.batch_size, lr=settings.lr,
            score=settings.score, seed=config.seed,
        )  # fmt: skip
        return port

    def _tunable(self, rank: int) -> Any:
        """The model, to be opened with fresh adapters."""
        found, config = self._model(), self._work.config
        return load_target("honeloom.backends.hf.utility:TunableModel")(
            found.paths[0], found.base, found.fingerprint, Loading.of(config), rank, config.seed,
            config.batch_size, config.max_length,
        )  # fmt: skip

    def _tell_lost(self, encoder: Any, players: Sequence[Sequence[Row]], dev: Sequence[Row]) -> None:
        """Warn of rows that say nothing within the token limit."""
        trainable = load_target("honeloom.backends.hf.utility:trainable")
        within = f"within {encoder.max_length} tokens; raise --max-length or give shorter rows"
        lost = sum(row.kind != "choice" and trainable(encoder, row) is None for row in dev)
        if lost == len(dev):
            raise RowsError(f"none of the {len(dev)} target rows has a scored token {within}")
        if lost:
            self._work.log.warn(f"{lost} of {len(dev)} target rows have no scored token {within}")
        empty = sum(all(trainable(encoder, row) is None for row in rows) for rows in players)
        if empty:
            self._work.log.warn(f"{empty} of {len(players)} players have no row with a trainable token {within}")

    @contextmanager
    def evaluations(self, fingerprint: str, budget: int) -> Iterator[tuple[Ledger, Executor]]:
        """The ledger in the output folder, and the processes that evaluate; progress is shown."""
        config, log = self._work.config, self._work.log
        with ExitStack() as stack:
            ledger = stack.enter_context(Ledger(self._work.dir / LEDGER, fingerprint))
            if len(ledger):
                log.say(f"select: {len(ledger)} evaluations of an interrupted attempt are taken from its ledger")
            executor: Executor = Inline()
            if config.ray is not None:
                pool = load_target("honeloom.backends.ray:RayPool")
                address = None if config.ray == "local" else config.ray
                executor = stack.enter_context(pool(config.workers, address=address, gpus=_gpus(config)))
            elif config.workers > 1:
                executor = stack.enter_context(ProcessPool(config.workers))
            advance = stack.enter_context(log.console.progress("evaluate", budget))
            yield ledger, _Shown(executor, advance)

    def _model(self) -> ResolvedInput:
        if "model" not in self._work.inputs:
            raise ConfigError(f"method {self._work.config.method.type!r} needs a model (--model)")
        return self._work.inputs["model"]


class _Shown:
    """An executor whose progress is shown."""

    def __init__(self, inner: Executor, advance: Callable[[int], None]) -> None:
        self._inner = inner
        self._advance = advance

    def map_utilities(self, utility: Utility, tasks: Sequence[Task]) -> Iterator[tuple[int, Outcome]]:
        """Yield what the executor yields."""
        for found in self._inner.map_utilities(utility, tasks):
            yield found
            self._advance(1)


def _gpus(config: SelectConfig) -> float:
    """GPUs that a worker on a cluster asks for."""
    return 1.0 if config.device.startswith("cuda") else 0.0
