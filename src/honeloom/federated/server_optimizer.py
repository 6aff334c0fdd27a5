"""What a server does with an aggregated update before it becomes the new state.

References
----------
Hsu, Qi and Brown 2019, arXiv:1909.06335 (momentum); Reddi et al. 2021, arXiv:2003.00295 (adaptive).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from honeloom.federated.federate_parts import ServerConfig
from honeloom.ops.lowrank import compress, stack_factors

__all__ = ["ServerOptimizer"]

Pair = tuple[torch.Tensor, torch.Tensor]
ENERGY = 1.0 - 1e-12


class ServerOptimizer:
    """Momentum on low-rank updates, or Adam, Yogi and Adagrad on their factors.

    Factors are not unique, so that steps on them depend on how an update happens to be written;
    the adaptive kinds, which work entry by entry, have no other choice without a dense matrix.

    Parameters
    ----------
    config : ServerConfig
        Its kind and settings.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config

    def step(
        self, old: Mapping[str, Pair] | None, new: Mapping[str, Pair], moments: dict[str, Pair]
    ) -> Mapping[str, Pair]:
        """The new state of every module.

        Parameters
        ----------
        old : mapping or None
            b (m, r) and a (r, n) before; None where `new` is itself the change.
        new : mapping
            What was aggregated.
        moments : dict
            Of earlier rounds; changed in place.

        Returns
        -------
        mapping
            As `new`; with momentum the rank may grow up to that of old and new together.
        """
        if self.config.type == "none":
            return new
        if self.config.type == "momentum":
            return {
                module: self._momentum(module, old[module] if old else None, new[module], moments) for module in new
            }
        assert old is not None  # the settings allow these for averages of factors alone
        return {
            module: (
                self._adaptive(f"{module}|b", old[module][0], new[module][0], moments),
                self._adaptive(f"{module}|a", old[module][1], new[module][1], moments),
            )
            for module in new
        }

    def _momentum(self, module: str, old: Pair | None, new: Pair, moments: dict[str, Pair]) -> Pair:
        """Let the velocity be beta times the last one plus the change, and move by lr times it."""
        terms = [(*new, 1.0)]
        if old is not None:
            terms.append((*old, -1.0))
        if module in moments:
            terms.append((*moments[module], self.config.beta1))
        velocity = _compressed(terms)
        moments[module] = velocity
        moved = [(*velocity, self.config.lr)]
        if old is not None:
            moved.append((*old, 1.0))
        return _compressed(moved)

    def _adaptive(self, name: str, old: torch.Tensor, new: torch.Tensor, moments: dict[str, Pair]) -> torch.Tensor:
        config = self.config
        change = new.double() - old.double()
        first, second = moments.get(name, (torch.zeros_like(change), torch.full_like(change, config.tau**2)))
        first = config.beta1 * first + (1 - config.beta1) * change
        square = change.square()
        if config.type == "adagrad":
            second = second + square
        elif config.type == "adam":
            second = config.beta2 * second + (1 - config.beta2) * square
        else:
            second = second - (1 - config.beta2) * square * torch.sign(second - square)
        moments[name] = (first, second)
        return old.double() + config.lr * first / (second.sqrt() + config.tau)


def _compressed(terms: list[tuple[torch.Tensor, torch.Tensor, float]]) -> Pair:
    b, a = stack_factors(terms)
    if not float(b.abs().max()) or not float(a.abs().max()):
        return b[:, :1], a[:1]
    return compress(b, a, energy=ENERGY)
