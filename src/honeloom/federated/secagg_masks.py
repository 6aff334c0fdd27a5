"""Keys, masks and shares of secure sums, from the libraries that have them.

Secrets have 16 bytes, the size of the shares: X25519 withstands 2**128 steps of work and no more, so that a private
key stretched from 16 random bytes is no weaker, and so is a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from honeloom.errors import MessageError, MissingExtraError
from honeloom.federated.secagg_wire import KEY, SECRET, ClientSecrets, PublicKeys, SecureRound

try:
    from Crypto.Protocol.SecretSharing import Shamir
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as absent:
    raise MissingExtraError(
        f"secure sums need cryptography and pycryptodome ({absent}): pip install 'honeloom[dp]'"
    ) from absent

__all__ = [
    "Entropy", "Words", "check_usable", "combined", "commitment_of", "derived", "open_shares", "pair_mask",
    "private_key", "public_keys", "seal_shares", "split", "stream", "weights_at_zero",
]  # fmt: skip

Entropy = Callable[[int], bytes]
Words = npt.NDArray[np.uint64]
NONCE = 12
_FIELD = (1 << 128) | 0x87  # of Shamir's shares: 1 + x + x^2 + x^7 + x^128


def derived(secret: bytes, context: bytes, size: int = KEY) -> bytes:
    """HKDF-SHA256 of a secret for one use."""
    return HKDF(algorithm=SHA256(), length=size, salt=None, info=context).derive(secret)


def private_key(secret: bytes, current: SecureRound, use: str, client: str) -> X25519PrivateKey:
    """The private key of a client for "encryption" or "masking"."""
    return X25519PrivateKey.from_private_bytes(derived(secret, current.context(f"{use} key", client)))


def commitment_of(seed: bytes, current: SecureRound, client: str) -> bytes:
    """By which the server knows the seed again, and learns nothing of the mask."""
    return derived(seed, current.context("commitment", client), SECRET)


def public_keys(kept: ClientSecrets) -> PublicKeys:
    """What a client announces of its secrets."""
    encryption, masking = (
        private_key(secret, kept.round, use, kept.client).public_key().public_bytes_raw()
        for secret, use in ((kept.encryption, "encryption"), (kept.masking, "masking"))
    )
    return PublicKeys(kept.client, encryption, masking, commitment_of(kept.seed, kept.round, kept.client))


def _agreed(private: X25519PrivateKey, public: bytes, who: str) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # a point of small order, whose secret everybody knows
        raise MessageError(f"the key of {who!r} is no sound X25519 key") from None


def check_usable(keys: PublicKeys) -> None:
    """MessageError unless both keys can be agreed with: one client's fault must not stop the others."""
    for public in (keys.encryption, keys.masking):
        _agreed(X25519PrivateKey.generate(), public, keys.client)


def split(secret: bytes, threshold: int, clients: int) -> list[bytes]:
    """One share of 16 bytes for each client in order; the polynomial is drawn from the system's source."""
    return [bytes(held) for _, held in Shamir.split(threshold, clients, secret, ssss=False)]


def _box(kept: ClientSecrets, peer: PublicKeys, sender: str, to: str) -> ChaCha20Poly1305:
    """For one sender's shares for one recipient."""
    private = private_key(kept.encryption, kept.round, "encryption", kept.client)
    agreed = _agreed(private, peer.encryption, peer.client)
    return ChaCha20Poly1305(derived(agreed, kept.round.context("share", sender, to)))


def seal_shares(
    kept: ClientSecrets, peer: PublicKeys, shares: tuple[bytes, bytes], seen: bytes, entropy: Entropy
) -> bytes:
    """Shares of mask key and seed for a peer: nonce, text and tag, bound to the roster by its digest."""
    nonce = entropy(NONCE)  # random, for a client that is asked again after a crash splits anew under the same key
    return nonce + _box(kept, peer, kept.client, peer.client).encrypt(nonce, b"".join(shares), seen)


def open_shares(kept: ClientSecrets, peer: PublicKeys, text: bytes, seen: bytes) -> tuple[bytes, bytes]:
    """What `seal_shares` of a peer sealed; MessageError where round, roster, sender or recipient is another."""
    try:
        opened = _box(kept, peer, peer.client, kept.client).decrypt(text[:NONCE], text[NONCE:], seen)
    except InvalidTag:
        raise MessageError(
            f"delivery: the shares of {peer.client!r} are of another round or roster, or damaged"
        ) from None
    return opened[:SECRET], opened[SECRET:]


def stream(key: bytes, size: int) -> Words:
    """AES-256 in counter mode; a key is used for one mask, so that its counter may begin at zero."""
    text = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * size))
    return np.frombuffer(text, dtype="<u8").astype(np.uint64)


def pair_mask(current: SecureRound, private: X25519PrivateKey, client: str, peer: PublicKeys, size: int) -> Words:
    """What a client adds for a peer: the first by name adds the mask, the second its opposite."""
    first, second = sorted((client, peer.client))
    agreed = derived(_agreed(private, peer.masking, peer.client), current.context("pair mask", first, second))
    added = stream(agreed, size)
    return added if client == first else np.negative(added)


def _times(a: int, b: int) -> int:
    """Product in the field of the shares."""
    found = 0
    while b:
        if b & 1:
            found ^= a
        a <<= 1
        if a >> 128:
            a ^= _FIELD
        b >>= 1
    return found


def _inverse(a: int) -> int:
    """By Euclid's algorithm on polynomials."""
    r, s, r_next, s_next = _FIELD, 0, a, 1
    while r_next != 1:
        shift = r.bit_length() - r_next.bit_length()
        if shift >= 0:
            r, s = r ^ (r_next << shift), s ^ (s_next << shift)
        if r.bit_length() < r_next.bit_length():
            r, s, r_next, s_next = r_next, s_next, r, s
    return s_next


def weights_at_zero(places: Sequence[int]) -> list[int]:
    """Lagrange's weights at 0, once for all secrets of a round: Shamir.combine takes them anew for each.

    With 1000 clients that is hours against seconds.
    """
    found: list[int] = []
    every = 1
    for x in places:
        every = _times(every, x)
    for x in places:
        below = x
        for other in places:
            if other != x:
                below = _times(below, x ^ other)
        found.append(_times(every, _inverse(below)))
    return found


def combined(weights: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The secret of these shares, as `Shamir.combine` has it."""
    found = 0
    for weight, held in zip(weights, shares, strict=True):
        found ^= _times(weight, int.from_bytes(held, "big"))
    return found.to_bytes(SECRET, "big")
