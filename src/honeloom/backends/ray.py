"""Ray: independent evaluations of a utility on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType

from honeloom.errors import ConfigError, HoneloomError, MissingExtraError
from honeloom.valuation.executors import Outcome, Task, Utility, call_utility

try:
    import ray
except ImportError as error:
    raise MissingExtraError(f"ray is not installed ({error.name}): pip install 'honeloom[ray]'") from None

__all__ = ["RayPool"]


class RayPool:
    """An executor of `honeloom.valuation` on Ray actors; use it as a context.

    Each actor is sent the utility once and holds it, so that a model is loaded once per actor.
    At most two evaluations per actor are under way. The results are those of every other
    executor, bit for bit.

    Parameters
    ----------
    workers : int
        Number of actors.
    address : str or None
        Of a cluster, for example "auto" or "ray://host:10001"; None starts one on this machine
        and ends it with the context.
    cpus, gpus : float
        That an actor takes.
    """

    def __init__(self, workers: int, *, address: str | None = None, cpus: float = 1, gpus: float = 0) -> None:
        if workers < 1:
            raise ConfigError(f"workers {workers}: must be 1 or more")
        self._workers, self._cpus, self._gpus = workers, cpus, gpus
        self._started = not ray.is_initialized()
        if self._started:
            local = {"num_cpus": max(1, round(workers * cpus)), "include_dashboard": False} if address is None else {}
            ray.init(address=address, log_to_driver=False, **local)
        self._actors: list[ray.actor.ActorHandle] = []
        self._utility: Utility | None = None

    def map_utilities(self, utility: Utility, tasks: Sequence[Task]) -> Iterator[tuple[int, Outcome]]:
        """Yield the outcomes as they come.

        Raises
        ------
        HoneloomError
            An actor died or could not be started.
        """
        actors = self._actors_of(utility)
        running: dict[ray.ObjectRef, tuple[int, int]] = {}
        waiting = iter(enumerate(tasks))

        def submit(actor: int) -> None:
            found = next(waiting, None)
            if found is not None:
                running[actors[actor].evaluate.remote(found[1])] = (found[0], actor)

        for slot in range(2 * len(actors)):
            submit(slot % len(actors))
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            index, actor = running.pop(done)
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayError as error:
                raise HoneloomError(
                    f"Ray lost a worker while it evaluated ({type(error).__name__}: {error}); try fewer workers or "
                    "more memory each. With a ledger, what was finished is kept"
                ) from None
            submit(actor)
            yield index, outcome

    def _actors_of(self, utility: Utility) -> list[ray.actor.ActorHandle]:
        if self._utility is not utility:
            self._end_actors()
            held = ray.put(utility)
            actor = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus)(_Holder)
            self._actors = [actor.remote(held) for _ in range(self._workers)]
            self._utility = utility
        return self._actors

    def _end_actors(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._utility = [], None

    def close(self) -> None:
        """End the actors, and the cluster if this object started it."""
        self._end_actors()
        if self._started and ray.is_initialized():
            ray.shutdown()

    def __enter__(self) -> RayPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Holder:
    """One actor's copy of the utility."""

    def __init__(self, utility: Utility) -> None:
        self._utility = utility

    def evaluate(self, task: Task) -> Outcome:
        """Evaluate one task."""
        return call_utility(self._utility, task)
