"""What `select` lends to its methods: models, vectors, tunings as utilities, and where they run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from hashlib import blake2b
from typing import Any

from honeloom.backends.hf.embed import Embedder
from honeloom.backends.hf.load import Loading
from honeloom.backends.hf.score import Scorer
from honeloom.data.rowset import RowSet
from honeloom.errors import ConfigError
from honeloom.registry import load_target
from honeloom.selection.config import SelectConfig, UtilityConfig
from honeloom.selection.tfidf import tfidf_vectors
from honeloom.selection.vectors import read_vectors, stored_vectors, unit_blocks
from honeloom.stages.inputs import ResolvedInput
from honeloom.stages.work import Work
from honeloom.types.ports import GradientPort, RowTable, SelectionData, UtilityPort, Vectors
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
            open_gradients=self.gradients,
            open_utility=self.utility,
            open_evaluations=self.evaluations,
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
        folder = self._work.dir / SCRATCH
        folder.mkdir(exist_ok=True)
        name = blake2b(how.model_dump_json().encode(), digest_size=8).hexdigest()
        path = folder / f"{name}.npy"
        if path.exists():  # of an interrupted attempt
            return read_vectors(path, len(rows), warn=self._work.log.warn)
        raw_path = folder / f"{name}.raw.npy"
        if how.type == "file":
            raw = read_vectors(self._work.inputs["method.embedding.path"].paths[0], len(rows), warn=self._work.log.warn)
        else:
            raw = stored_vectors(raw_path, self._blocks(rows, how), len(rows))
        vectors = stored_vectors(path, unit_blocks(raw, standardise=how.type == "hidden"), len(rows))
        raw_path.unlink(missing_ok=True)
        return vectors

    def _blocks(self, rows: RowTable, how: Any) -> Iterator[Vectors]:
        config, track = self._work.config, self._work.log.track
        if how.type == "tfidf":
            return tfidf_vectors(rows, size=how.size, seed=config.seed)
        if how.type == "sentence_transformers":
            encode: Callable[..., Iterator[Vectors]] = load_target(
                "honeloom.backends.sentence_encoder:sentence_vectors"
            )
            return encode(track(rows, "embed rows", len(rows)), how.encoder, device=config.device,
                          batch_size=config.batch_size)  # fmt: skip
        found = self._model()
        embedder = Embedder.open(
            found.paths[0], base=found.base, layer=how.depth, loading=Loading.of(config, spread=True),
            batch_size=config.batch_size, max_length=config.max_length,
        )  # fmt: skip
        return embedder.embed(rows, lambda items, label, _: track(items, label, len(rows)))

    def gradients(self, rank: int) -> GradientPort:
        """The model with fresh adapters, as one that compares gradients."""
        found, config = self._model(), self._work.config
        gradients = load_target("honeloom.backends.hf.gradients:RowGradients")
        port: GradientPort = gradients.open(
            found.paths[0], base=found.base, loading=Loading.of(config), rank=rank, seed=config.seed,
            batch_size=config.batch_size, max_length=config.max_length, progress=self._work.log.track,
        )  # fmt: skip
        return port

    def utility(
        self, players: Sequence[Sequence[Row]], names: Sequence[str], dev: Sequence[Row], settings: UtilityConfig
    ) -> UtilityPort:
        """Tune on the players' rows, score the development rows."""
        found, config = self._model(), self._work.config
        if settings.steps is None:
            raise ValueError("the steps of a utility must be known when it is opened")
        model = load_target("honeloom.backends.hf.utility:TunableModel")(
            found.paths[0], found.base, found.fingerprint, Loading.of(config), settings.rank, config.seed,
            config.batch_size, config.max_length,
        )  # fmt: skip
        port: UtilityPort = load_target("honeloom.backends.hf.utility:TuningUtility")(
            model, players, names, dev, steps=settings.steps, batch_size=settings.batch_size, lr=settings.lr,
            score=settings.score, seed=config.seed,
        )  # fmt: skip
        return port

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
