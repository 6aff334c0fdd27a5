"""A round whose sums over seeds are added under masks: what server and clients say before and after training.

Four questions make such a round: for keys, for shares, to train, and for what opens the sum.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from honeloom.errors import MessageError
from honeloom.federated import secagg
from honeloom.federated.messages import TrainTask
from honeloom.federated.scalars import Sums
from honeloom.federated.secagg import ClientSecrets, PublicKeys, Reveal, RoundAbortedError, SecureRound
from honeloom.federated.secagg_masks import Words

__all__ = ["RoundAbortedError", "SecureSum", "answered", "masked"]

LIMIT = 1e6
"""Largest magnitude of a client's sum along a seed, in steps of scalar 1; larger ones are cut."""
BITS, OPENED = 32, 4
"""Binary places, and the phase of a client that has given its shares."""
Notes = Mapping[str, Any]


class SecureSum:
    """The server's part in one round.

    Parameters
    ----------
    experiment, number
        Federation and round.
    asked : collection of str
        Clients that the round asks: more than half of them must stay to the end, and three.
    size : int
        K, seeds of the pool.
    attempt : int
        How often a sum of this round may have been opened before: every time, other steps are summed under other keys.

    Raises
    ------
    ConfigError
        Fewer than three clients.
    """

    def __init__(
        self, experiment: str, number: int, asked: Collection[str], size: int, attempt: int = 0
    ) -> None:  # fmt: skip
        self.round = SecureRound(f"{experiment}/{attempt}", number, secagg.default_threshold(len(asked)))
        self.size, self.attempt = size, attempt
        self.phase = "keys"
        self.asked = set(asked)
        self._keys: dict[str, PublicKeys] = {}
        self._shares: dict[str, dict[str, bytes]] = {}
        self._vectors: dict[str, Words] = {}
        self._reveals: dict[str, Reveal] = {}

    @property
    def most_bytes(self) -> int:
        """Of an answer in words: a few hundred for every client there is."""
        return 8192 + 512 * 2 * self.round.threshold

    @property
    def survivors(self) -> list[str]:
        """Clients whose vectors are in the sum."""
        return sorted(self._vectors)

    def has(self, client: str) -> bool:
        """Whether a client was not asked in this phase, or has said its words; the first sound ones count."""
        if client not in self.asked:
            return True
        if self.phase == "train":
            return client in self._vectors
        if self.phase == "keys":
            return client in self._keys
        return client in (self._shares if self.phase == "shares" else self._reveals)

    def take(self, client: str, notes: Notes) -> None:
        """Take in a client's words of this phase.

        Raises
        ------
        MessageError
            They are not what was asked for.
        """
        if self.phase == "keys":
            self._keys[client] = secagg.read_keys(self.round, client, dict(notes))
        elif self.phase == "shares":
            self._shares[client] = secagg.read_shares(self.round, client, dict(notes), self._ordered())
        else:
            self._reveals[client] = secagg.read_reveal(
                self.round, client, dict(notes), self._shares, self._vectors
            )  # fmt: skip

    def add(self, client: str, vector: torch.Tensor) -> None:
        """Take in a client's masked vector, (K,) int64 bits."""
        self._vectors[client] = secagg.read_masked(vector.numpy().tobytes(), self.size)

    def drop(self, client: str) -> None:
        """Leave a client's vector out, before it is said whose are summed."""
        self._vectors.pop(client, None)

    def advance(self) -> dict[str, Notes]:
        """Words by client that begin the next phase; none where the round has no more.

        Raises
        ------
        RoundAbortedError
            Too few clients are left.
        """
        words = self._words()
        self.asked = set(words)
        return words

    def _words(self) -> dict[str, Notes]:
        if self.phase == "keys":
            self.phase, roster = "shares", secagg.roster_message(self.round, self._keys.values())
            return dict.fromkeys(sorted(self._keys), roster)
        if self.phase == "shares":
            self.phase = "train"
            return dict(secagg.delivery_messages(self.round, self._shares))
        if self.phase == "train":
            self.phase, said = "reveal", secagg.survivors_message(self.round, self._vectors)
            return dict.fromkeys(self.survivors, said)
        self.phase = "done"
        return {}

    def total(self, unit: float) -> Sums:
        """The weighted sum of the vectors, (K,).

        Raises
        ------
        RoundAbortedError
            Too few clients gave their shares.
        MessageError
            Shares that open nothing.
        """
        words = secagg.unmask(self.round, self._ordered(), self._vectors, list(self._reveals.values()))
        total = secagg.dequantise(words, BITS)
        if not np.abs(total).max() <= LIMIT:  # shares sum to 1 at most, and each client cuts at the limit
            raise MessageError(f"a sum of {np.abs(total).max():.3g} is over {LIMIT:g}: a client spoilt it")
        return total * unit

    def _ordered(self) -> list[PublicKeys]:
        return sorted(self._keys.values(), key=lambda known: known.client)


def answered(secrets: Notes, task: TrainTask) -> tuple[dict[str, Any], dict[str, Any]]:
    """A client's answer to words: what it keeps from then on, and what it says.

    Raises
    ------
    MessageError
        They are not what the protocol has next, or are to open what must stay closed.
    """
    if task.phase == "keys":
        named = f"{task.experiment}/{int(task.settings['attempt'])}"
        current = SecureRound(named, task.round, int(task.settings["threshold"]))
        if secrets and (before := ClientSecrets.from_json(dict(secrets))).phase == OPENED and before.round == current:
            raise MessageError("its part in this sum was given; two sums of the same parts would open single ones")
        kept, said = secagg.begin(current, task.client)
    else:
        kept = ClientSecrets.from_json(dict(secrets))
        kept, said = (secagg.share if task.phase == "shares" else secagg.reveal)(kept, dict(task.notes))
    return kept.to_json(), said


def masked(secrets: Notes, task: TrainTask, sums: Sums) -> tuple[dict[str, Any], torch.Tensor]:
    """A client's sums, weighted and under its masks: what it keeps, and int64 bits (K,)."""
    vector = secagg.quantise(sums / float(task.notes["unit"]), float(task.notes["share"]), LIMIT, BITS)
    kept, data = secagg.mask(ClientSecrets.from_json(dict(secrets)), dict(task.notes["delivery"]), vector)
    return kept.to_json(), torch.from_numpy(np.frombuffer(data, dtype="<i8").astype(np.int64))
