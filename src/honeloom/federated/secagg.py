"""Sums of integer vectors of which nobody sees the parts: masks that cancel, and shares for those who drop out.

Every two clients agree on a mask that one adds and the other subtracts, and each adds one of its own. The server
sees masked vectors alone. Once it has said whose vectors it sums, the clients give it the shares of the own masks of
those, and of the mask keys of those that fell silent after they had been counted on; never both of one client.

What it holds against: a server and fewer clients than the threshold that follow the protocol and pool what they
saw; clients that follow it also answer no second list of survivors. Keys and lists are not signed: a server that
invents clients, or tells each of them something else, is not held off, nor is a client that spoils a sum. The sum
itself is shown to the server, and to whomever it tells; of a sum, all clients but one can subtract their parts.

What a client keeps must be stored before its message leaves: two vectors under the same masks show their difference.

Bonawitz et al. 2017, doi:10.1145/3133956.3133982.
"""

from __future__ import annotations

import secrets as system_secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from honeloom.errors import ConfigError, MessageError, NotFiniteError
from honeloom.federated.secagg_masks import (
    Entropy,
    Words,
    check_usable,
    combined,
    commitment_of,
    derived,
    open_shares,
    pair_mask,
    private_key,
    public_keys,
    seal_shares,
    split,
    stream,
    weights_at_zero,
)
from honeloom.federated.secagg_wire import (
    FEWEST,
    MOST,
    SEALED,
    SECRET,
    ClientSecrets,
    Message,
    PublicKeys,
    Reveal,
    RoundAbortedError,
    SecureRound,
    announced,
    check_among,
    check_enough,
    check_phase,
    client_name,
    fields_from,
    fields_of,
    hexed,
    keys_of,
    pairs_of,
    plain_keys,
    roster_digest,
    roster_of,
    survivors_of,
)

__all__ = [
    "FEWEST", "MOST", "ClientSecrets", "PublicKeys", "Reveal", "RoundAbortedError", "SecureRound", "begin",
    "default_threshold", "delivery_messages", "dequantise", "mask", "quantise", "read_keys", "read_masked",
    "read_reveal", "read_roster", "read_shares", "reveal", "roster_message", "share", "survivors_message",
    "tolerance", "unmask",
]  # fmt: skip


def default_threshold(clients: int) -> int:
    """More than half, and at least two.

    Raises
    ------
    ConfigError
        Fewer than three clients, or more than 1000.
    """
    if not FEWEST <= clients <= MOST:
        raise ConfigError(
            f"a secure sum of {clients} clients: it takes {FEWEST} to {MOST}, for of a sum of two each can subtract "
            "its own part and has the other's; add clients, or turn secure sums off"
        )
    return clients // 2 + 1


# The client


def begin(
    current: SecureRound, client: str, entropy: Entropy = system_secrets.token_bytes
) -> tuple[ClientSecrets, Message]:
    """Draw fresh secrets and announce their public keys.

    Parameters
    ----------
    current : SecureRound
        As agreed beforehand; the threshold is not the server's to choose later.
    client : str
        Who this is.
    entropy : callable
        So many secret bytes. Anything but the default is for tests.

    Returns
    -------
    tuple
        What to keep, and a message with phase "keys", `client`, `encryption`, `masking` and `commitment` (hex).
    """
    encryption, masking, seed = (entropy(SECRET) for _ in range(3))
    kept = ClientSecrets(current, client_name(client, "begin"), 1, encryption, masking, seed)
    return kept, current.message("keys", **announced(public_keys(kept)))


def share(
    kept: ClientSecrets, message: Any, entropy: Entropy = system_secrets.token_bytes
) -> tuple[ClientSecrets, Message]:
    """Split seed and mask key among all clients of the roster.

    Parameters
    ----------
    kept : ClientSecrets
        From `begin`.
    message : dict
        The server's roster.
    entropy : callable
        For nonces; the polynomials have pycryptodome's own source, which is the system's.

    Returns
    -------
    tuple
        What to keep, and a message with phase "shares", `client`, and `shares`: pairs of recipient and sealed shares.

    Raises
    ------
    MessageError
        A roster of another round or threshold, with fewer than three clients or fewer than the threshold, or so
        many that two groups could each open masks; with duplicates; without this client's keys or with
        others in their place; or a second one.
    """
    check_phase(kept, 1, "roster")
    keys = read_roster(kept.round, message)
    if public_keys(kept) not in keys:
        raise MessageError(f"roster: the keys of {kept.client!r} are missing or not those that it announced")
    of_key, of_seed = (split(s, kept.round.threshold, len(keys)) for s in (kept.masking, kept.seed))
    seen = roster_digest(keys)
    sealed, own = {}, {}
    for peer, *shares in zip(keys, of_key, of_seed, strict=True):
        if peer.client == kept.client:
            own = {kept.client: shares[1]}
        else:
            sealed[peer.client] = seal_shares(kept, peer, (shares[0], shares[1]), seen, entropy)
    after = replace(kept, phase=2, keys=keys, seed_shares=own)
    return after, kept.round.message("shares", client=kept.client, shares=hexed(sealed))


def mask(kept: ClientSecrets, message: Any, vector: Words) -> tuple[ClientSecrets, bytes]:
    """Open the shares of the others, and add all masks to a vector; seeds and keys are forgotten.

    Parameters
    ----------
    kept : ClientSecrets
        From `share`.
    message : dict
        The server's delivery.
    vector : uint64 (K,)
        From `quantise`.

    Returns
    -------
    tuple
        What to keep, and 8 K bytes, little end first.

    Raises
    ------
    MessageError
        Shares of too few clients, of unknown ones, or of another round; or a second delivery.
    """
    check_phase(kept, 2, "delivery")
    if vector.dtype != np.uint64 or vector.ndim != 1:
        raise ValueError(f"a vector of {vector.dtype} with {vector.ndim} dimensions; quantise makes it uint64 of one")
    parts = fields_of(kept.round, message, "delivery", ("client", "shares"))
    if parts["client"] != kept.client:
        raise MessageError(f"delivery: for {parts['client']!r:.80}, and came to {kept.client!r}")
    sealed = pairs_of(parts["shares"], SEALED, "delivery")
    peers = {k.client: k for k in kept.keys if k.client != kept.client}
    check_among(sealed, peers, "delivery")
    if len(sealed) + 1 < kept.round.needed:
        raise MessageError(f"delivery: shares of {len(sealed) + 1} clients, and it takes {kept.round.needed}")
    seen, seeds, keys = roster_digest(kept.keys), dict(kept.seed_shares), {}
    total = vector + stream(derived(kept.seed, kept.round.context("own mask", kept.client)), len(vector))
    private = private_key(kept.masking, kept.round, "masking", kept.client)
    for name, text in sealed.items():
        keys[name], seeds[name] = open_shares(kept, peers[name], text, seen)
        total += pair_mask(kept.round, private, kept.client, peers[name], len(vector))
    after = ClientSecrets(kept.round, kept.client, 3, seed_shares=seeds, key_shares=keys)
    return after, total.astype("<u8").tobytes()


def reveal(kept: ClientSecrets, message: Any) -> tuple[ClientSecrets, Message]:
    """Give the shares that open a sum; asked again for the same one, give them again.

    Parameters
    ----------
    kept : ClientSecrets
        From `mask`.
    message : dict
        The server's list of survivors.

    Returns
    -------
    tuple
        What to keep, and a message with phase "reveal", `client`, and pairs of client and share: `seeds` of the
        survivors, `keys` of those that dropped out after they had shared.

    Raises
    ------
    MessageError
        A list without this client, with unknown ones or duplicates, of too few, or another one than before.
    """
    survivors = survivors_of(kept.round, message)
    if kept.phase == 4 and survivors != set(kept.seed_shares):
        raise MessageError("survivors: not the list that was answered before; two lists would open single masks")
    if kept.phase != 4:
        check_phase(kept, 3, "survivors")
    check_among(survivors, kept.seed_shares, "survivors")
    if kept.client not in survivors:
        raise MessageError(f"survivors: {kept.client!r} sent its vector and is not in the list")
    if len(survivors) < kept.round.needed:
        raise MessageError(f"survivors: {len(survivors)} clients, and it takes {kept.round.needed}")
    seeds = {name: held for name, held in kept.seed_shares.items() if name in survivors}
    keys = {name: held for name, held in kept.key_shares.items() if name not in survivors}
    after = replace(kept, phase=4, seed_shares=seeds, key_shares=keys)
    return after, kept.round.message("reveal", client=kept.client, seeds=hexed(seeds), keys=hexed(keys))


# The server: read each message as it comes, so that one client's fault is that client's


def read_keys(current: SecureRound, client: str, message: Any) -> PublicKeys:
    """A client's announcement; MessageError where it is none of this client and round."""
    names = ("encryption", "masking", "commitment")
    parts = fields_from(current, client, message, "keys", names)
    found = keys_of([client, *(parts[n] for n in names)], "keys")
    check_usable(found)
    return found


def roster_message(current: SecureRound, keys: Iterable[PublicKeys]) -> Message:
    """What all clients are told of all: `threshold`, and `keys`: rows of client and three hex texts, by name.

    Raises
    ------
    RoundAbortedError
        Too few clients.
    MessageError
        Two clients announced the same key.
    """
    ordered = sorted(keys, key=lambda k: k.client)
    check_enough(current, len(ordered), "announced keys")
    message = current.message("roster", threshold=current.threshold, keys=plain_keys(ordered))
    read_roster(current, message)
    return message


def read_roster(current: SecureRound, message: Any) -> tuple[PublicKeys, ...]:
    """The keys of all clients, by name; MessageError as `share` has it."""
    parts = fields_of(current, message, "roster", ("threshold", "keys"))
    keys = roster_of(parts["keys"])
    if parts["threshold"] != current.threshold:
        raise MessageError(f"roster: threshold {parts['threshold']!r:.40}, and {current.threshold} was agreed")
    if not current.needed <= len(keys) < 2 * current.threshold:
        raise MessageError(
            f"roster: {len(keys)} clients, and it takes {current.needed} to {2 * current.threshold - 1} where "
            f"{current.threshold} open a mask"
        )
    if len({public for k in keys for public in (k.encryption, k.masking)}) != 2 * len(keys):
        raise MessageError("roster: a key is there twice")
    return keys


def read_shares(current: SecureRound, client: str, message: Any, keys: Sequence[PublicKeys]) -> dict[str, bytes]:
    """A client's sealed shares by recipient; MessageError unless there is one for every other client of the roster."""
    sealed = pairs_of(fields_from(current, client, message, "shares", ("shares",))["shares"], SEALED, "shares")
    others = {k.client for k in keys} - {client}
    check_among(sealed, others, "shares")
    if len(sealed) != len(others):
        raise MessageError(f"shares: {client!r} sent {len(sealed)}, and {len(others)} clients need one")
    return sealed


def delivery_messages(current: SecureRound, shares: Mapping[str, Mapping[str, bytes]]) -> dict[str, Message]:
    """What each client that shared gets from the others that did: `client`, and `shares`: pairs of sender and text.

    Raises
    ------
    RoundAbortedError
        Too few clients shared.
    """
    check_enough(current, len(shares), "shared their secrets")
    return {
        to: current.message("delivery", client=to, shares=[[s, shares[s][to].hex()] for s in sorted(shares) if s != to])
        for to in sorted(shares)
    }


def read_masked(data: bytes, size: int) -> Words:
    """A masked vector (K,); MessageError where it has another size."""
    if not isinstance(data, bytes) or len(data) != 8 * size:
        raise MessageError(f"masked vector: {len(data):,} bytes, expected {8 * size:,}")
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)


def survivors_message(current: SecureRound, masked: Collection[str]) -> Message:
    """Whose vectors are to be summed. Say it once: another list for the same round is refused by the clients.

    Raises
    ------
    RoundAbortedError
        Too few clients sent their vectors.
    """
    check_enough(current, len(masked), "sent a vector")
    return current.message("survivors", survivors=sorted(masked))


def read_reveal(
    current: SecureRound, client: str, message: Any, sharers: Collection[str], survivors: Collection[str]
) -> Reveal:
    """A client's answer; MessageError unless it has a share for every sharer, of the kind that was asked for."""
    parts = fields_from(current, client, message, "reveal", ("seeds", "keys"))
    found = Reveal(client, pairs_of(parts["seeds"], SECRET, "reveal"), pairs_of(parts["keys"], SECRET, "reveal"))
    if set(found.seeds) != set(survivors) or set(found.keys) != set(sharers) - set(survivors):
        raise MessageError(f"reveal: {client!r} sent shares of other clients than it was asked for")
    if client not in survivors:
        raise MessageError(f"reveal: {client!r} is none of the survivors")
    return found


def unmask(
    current: SecureRound, keys: Sequence[PublicKeys], masked: Mapping[str, Words], reveals: Sequence[Reveal]
) -> Words:
    """Take all masks off the sum.

    Parameters
    ----------
    current : SecureRound
        Of all parts.
    keys : sequence of PublicKeys
        The roster.
    masked : mapping
        Of the survivors: uint64 (K,).
    reveals : sequence of Reveal
        Answers of survivors, as `read_reveal` has them.

    Returns
    -------
    uint64 (K,)
        The sum of the survivors' vectors modulo 2**64.

    Raises
    ------
    RoundAbortedError
        Fewer answers than the threshold: the masks stay where they are.
    MessageError
        The shares do not rebuild what a client announced.
    """
    answers = sorted({r.client: r for r in reveals}.values(), key=lambda r: r.client)[: current.threshold]
    if len(answers) < current.threshold:
        raise RoundAbortedError(
            f"round {current.number}: {len(answers)} clients gave their shares, and it takes {current.threshold}; "
            "nothing of the sum can be opened"
        )
    places = {k.client: (place, k) for place, k in enumerate(sorted(keys, key=lambda k: k.client), start=1)}
    weights = weights_at_zero([places[r.client][0] for r in answers])
    total = np.zeros_like(next(iter(masked.values())))
    for name in sorted(masked):
        total += masked[name]
        seed = combined(weights, [r.seeds[name] for r in answers])
        if commitment_of(seed, current, name) != places[name][1].commitment:
            raise MessageError(f"reveal: the shares do not rebuild the seed of {name!r}; the round is lost")
        total -= stream(derived(seed, current.context("own mask", name)), len(total))
    for name in sorted(answers[0].keys):
        private = private_key(combined(weights, [r.keys[name] for r in answers]), current, "masking", name)
        if private.public_key().public_bytes_raw() != places[name][1].masking:
            raise MessageError(f"reveal: the shares do not rebuild the key of {name!r}; the round is lost")
        for other in sorted(masked):  # as the one that dropped out would have: the opposite of what is in the sum
            total += pair_mask(current, private, name, places[other][1], len(total))
    return total


# Fixed point


def quantise(values: npt.NDArray[np.float64], weight: float, clip: float, bits: int = 32) -> Words:
    """Round weight * value to multiples of 2**-bits, negative ones as two's complement, so that sums wrap around.

    Parameters
    ----------
    values : float64 (K,)
        Numbers of one client.
    weight : float
        Its share of the sum, in [0, 1].
    clip : float
        Largest magnitude of a value before it is weighted; larger ones are cut.
    bits : int
        After the point. With 1000 clients at most, sums are exact while clip is below 2**(63 - bits) / 1000: 2.1e6
        for 32 bits.

    Raises
    ------
    NotFiniteError
        A value is NaN or infinite.
    ConfigError
        The weight is no share, or sums of 1000 clients could be over 2**63.
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"weight {weight} of a secure sum: must be a share, from 0 to 1")
    if not (clip > 0 and 0 <= bits < 63 and clip * 2.0**bits * MOST < 2.0**63):
        raise ConfigError(
            f"clip {clip} with {bits} bits after the point: clip must be over 0 and below 2**(63 - bits) / {MOST}, "
            "that sums do not overflow; lower one of them"
        )
    if not np.isfinite(values).all():
        raise NotFiniteError("a vector for a secure sum holds NaN or infinity")
    scaled = np.rint(weight * np.clip(values.astype(np.float64), -clip, clip) * 2.0**bits)
    found: Words = scaled.astype(np.int64).view(np.uint64)
    return found


def dequantise(total: Words, bits: int = 32) -> npt.NDArray[np.float64]:
    """The numbers (K,) of a sum of quantised vectors; off by at most `tolerance`."""
    found: npt.NDArray[np.float64] = total.view(np.int64).astype(np.float64) / 2.0**bits
    return found


def tolerance(clients: int, clip: float, bits: int = 32) -> float:
    """How far a sum can be from that of the weighted, cut numbers: half a unit a client, and roundings of doubles."""
    return clients * (0.5 * 2.0**-bits + 2.0**-52 * clip)
