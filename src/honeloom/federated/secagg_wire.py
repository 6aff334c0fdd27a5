"""What clients and server of a secure sum keep and send: records, and the checks of what comes from others."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from honeloom.errors import ConfigError, HoneloomError, MessageError

__all__ = [
    "FEWEST", "KEY", "MOST", "SEALED", "SECRET", "ClientSecrets", "Message", "PublicKeys", "Reveal",
    "RoundAbortedError", "SecureRound", "announced", "check_among", "check_enough", "check_phase", "client_name",
    "fields_from", "fields_of", "hexed", "keys_of", "pairs_of", "plain_keys", "roster_digest", "roster_of",
    "survivors_of",
]  # fmt: skip

Message = dict[str, Any]
FEWEST, MOST = 3, 1000
"""Clients whose vectors are summed: of a sum of two, each of them could take off its own."""
SECRET, KEY, SEALED = 16, 32, 60
"""Bytes of a secret or a share, of a key, and of two sealed shares with nonce and tag."""
LONGEST = 200
"""Characters of a client's name."""
_HEX = re.compile("[0-9a-f]*")


class RoundAbortedError(HoneloomError):
    """Too few clients are left for a sum; what was sent shows nothing of single vectors, and another round may."""


@dataclass(frozen=True, slots=True)
class SecureRound:
    """One execution of the protocol; every derived key is bound to it.

    Attributes
    ----------
    experiment : str
        Which federation.
    number : int
        Its round.
    threshold : int
        Clients whose shares open a mask; fewer learn nothing. `default_threshold` has the usual one.
    """

    experiment: str
    number: int
    threshold: int

    def __post_init__(self) -> None:
        if not 2 <= self.threshold <= MOST:
            raise ConfigError(f"threshold {self.threshold} of a secure sum: must be from 2 to {MOST}")

    @property
    def needed(self) -> int:
        """Fewest clients of a sum."""
        return max(FEWEST, self.threshold)

    def context(self, use: str, *clients: str) -> bytes:
        """What a key is for; JSON, for no two lists have the same text."""
        return json.dumps(["honeloom/secagg/1", self.experiment, self.number, self.threshold, use, *clients]).encode()

    def message(self, phase: str, **parts: Any) -> Message:
        """A message of this round."""
        return {"phase": phase, "experiment": self.experiment, "round": self.number, **parts}


@dataclass(frozen=True, slots=True)
class PublicKeys:
    """What a client announces: keys to seal shares for it and to agree on masks, and a digest of its seed.

    Keys have 32 bytes. The digest (16 bytes) tells the server whether shares rebuilt the seed, and nothing of the mask.
    """

    client: str
    encryption: bytes
    masking: bytes
    commitment: bytes


@dataclass(frozen=True, slots=True)
class Reveal:
    """A client's shares: of the seeds of survivors, and of the mask keys of those that dropped out."""

    client: str
    seeds: Mapping[str, bytes]
    keys: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class ClientSecrets:
    """What a client keeps from one message of a round to the next, and forgets as soon as it can.

    Attributes
    ----------
    round : SecureRound
        Of no other round is a message taken.
    client : str
        Whose they are.
    phase : int
        1: waits for the roster; 2: for its shares; 3: for the survivors; 4: has answered.
    encryption, masking, seed : bytes
        16 bytes each, empty from phase 3 on.
    keys : tuple of PublicKeys
        The roster, in phase 2.
    seed_shares, key_shares : mapping
        By client. After the answer they hold what was told, and nothing else.
    """

    round: SecureRound
    client: str
    phase: int
    encryption: bytes = field(default=b"", repr=False)
    masking: bytes = field(default=b"", repr=False)
    seed: bytes = field(default=b"", repr=False)
    keys: tuple[PublicKeys, ...] = field(default=(), repr=False)
    seed_shares: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    key_shares: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def to_json(self) -> Message:
        """As JSON has it; as secret as what it holds."""
        return self.round.message(
            "state", threshold=self.round.threshold, client=self.client, at=self.phase,
            secrets=[s.hex() for s in (self.encryption, self.masking, self.seed)], keys=plain_keys(self.keys),
            seed_shares=hexed(self.seed_shares), key_shares=hexed(self.key_shares),
        )  # fmt: skip

    @classmethod
    def from_json(cls, data: Any) -> ClientSecrets:
        """What `to_json` wrote.

        Raises
        ------
        MessageError
            It is something else.
        """
        try:
            current = SecureRound(str(data["experiment"]), int(data["round"]), int(data["threshold"]))
            parts = [bytes.fromhex(s) for s in data["secrets"]]
            encryption, masking, seed = parts
            phase = int(data["at"])
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise MessageError(f"kept secrets of a secure sum are damaged ({error}); begin the round anew") from None
        if {len(s) for s in parts} != {SECRET if phase < 3 else 0} or phase not in (1, 2, 3, 4):
            raise MessageError("kept secrets of a secure sum are damaged (sizes); begin the round anew")
        seeds, keys = (pairs_of(data.get(name), SECRET, f"state: {name}") for name in ("seed_shares", "key_shares"))
        roster = roster_of(data.get("keys"))
        return cls(
            current, client_name(data.get("client"), "state"), phase, encryption, masking, seed, roster, seeds, keys
        )


def check_enough(current: SecureRound, count: int, did: str) -> None:
    """RoundAbortedError where fewer clients did something than a sum takes."""
    if count < current.needed:
        raise RoundAbortedError(f"round {current.number}: {count} clients {did}, and a sum takes {current.needed}")


def check_phase(kept: ClientSecrets, phase: int, what: str) -> None:
    """MessageError where something else is due: each message is taken once."""
    if kept.phase != phase:
        raise MessageError(f"{what}: came at phase {kept.phase} of round {kept.round.number}, expected at {phase}")


def fields_of(current: SecureRound, message: Any, phase: str, names: Collection[str]) -> Message:
    """A message of this phase and round with these fields and no others; MessageError where it is another."""
    if not isinstance(message, dict) or set(message) != {"phase", "experiment", "round", *names}:
        raise MessageError(f"{phase}: not a message of this kind")
    if message["phase"] != phase or type(message["round"]) is not int:
        raise MessageError(f"{phase}: phase {message['phase']!r:.40}, round {message['round']!r:.40}")
    if (message["experiment"], message["round"]) != (current.experiment, current.number):
        raise MessageError(
            f"{phase}: of round {message['round']!r:.40} of {message['experiment']!r:.80}, expected "
            f"{current.number} of {current.experiment!r:.80}"
        )
    return message


def fields_from(current: SecureRound, client: str, message: Any, phase: str, names: Collection[str]) -> Message:
    """As `fields_of`, of a client that says it is who it is."""
    parts = fields_of(current, message, phase, ("client", *names))
    if parts["client"] != client:
        raise MessageError(f"{phase}: {client!r} sent a message of {parts['client']!r:.80}")
    return parts


def client_name(value: Any, what: str) -> str:
    """A text of 1 to 200 characters; MessageError otherwise."""
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST:
        raise MessageError(f"{what}: {value!r:.80} is no client's name")
    return value


def _bytes(value: Any, size: int, what: str) -> bytes:
    if not isinstance(value, str) or len(value) != 2 * size or not _HEX.fullmatch(value):
        raise MessageError(f"{what}: {value!r:.40} is not {size} bytes in hex digits")
    return bytes.fromhex(value)


def _rows(value: Any, width: int, what: str) -> list[list[Any]]:
    if not isinstance(value, list) or len(value) > MOST:
        raise MessageError(f"{what}: {value!r:.40} is no list of at most {MOST}")
    if not all(isinstance(row, list) and len(row) == width for row in value):
        raise MessageError(f"{what}: a row has not {width} parts")
    names = [client_name(row[0], what) for row in value]
    if len(set(names)) != len(names):
        raise MessageError(f"{what}: a client is there twice")
    return value


def pairs_of(value: Any, size: int, what: str) -> dict[str, bytes]:
    """Bytes by client, from a list of pairs; MessageError for duplicates, other sizes and other types."""
    return {name: _bytes(text, size, what) for name, text in _rows(value, 2, what)}


def hexed(shares: Mapping[str, bytes]) -> list[list[str]]:
    """What `pairs_of` reads."""
    return [[name, held.hex()] for name, held in sorted(shares.items())]


def keys_of(row: Sequence[Any], what: str) -> PublicKeys:
    """From client and three hex texts; MessageError for other sizes and types."""
    client, *texts = row
    sizes = (KEY, KEY, SECRET)
    return PublicKeys(client, *(_bytes(text, size, what) for text, size in zip(texts, sizes, strict=True)))


def roster_of(value: Any) -> tuple[PublicKeys, ...]:
    """Keys by name, from rows as `keys_of` takes them; MessageError where a client is there twice."""
    return tuple(sorted((keys_of(row, "roster") for row in _rows(value, 4, "roster")), key=lambda k: k.client))


def announced(keys: PublicKeys) -> dict[str, str]:
    """As a message has them."""
    texts = {name: getattr(keys, name).hex() for name in ("encryption", "masking", "commitment")}
    return {"client": keys.client, **texts}


def plain_keys(keys: Iterable[PublicKeys]) -> list[list[str]]:
    """What `roster_of` reads."""
    return [list(announced(k).values()) for k in keys]


def roster_digest(keys: Sequence[PublicKeys]) -> bytes:
    """Of the roster: shares that were sealed under another one do not open."""
    return hashlib.sha256(json.dumps(plain_keys(keys)).encode()).digest()


def survivors_of(current: SecureRound, message: Any) -> set[str]:
    """Names of a list of survivors; MessageError for duplicates and what is no name."""
    value = fields_of(current, message, "survivors", ("survivors",))["survivors"]
    if not isinstance(value, list):
        raise MessageError(f"survivors: {value!r:.40} is no list")
    return {name for (name,) in _rows([[name] for name in value], 1, "survivors")}


def check_among(names: Iterable[str], known: Collection[str], what: str) -> None:
    """MessageError that names a client which is not known."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise MessageError(f"{what}: {unknown[0]!r:.80} is no client that was counted on")
