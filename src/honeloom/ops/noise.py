"""Random numbers from a counter: element i of a stream depends on (seed, name, i) and nothing else.

The generator is Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405) in exact int64
arithmetic. Every later step uses only operations that IEEE 754 rounds exactly, one at a time, so
a stream has the same bits on every device and thread count, however it is cut into pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from honeloom.ops.rounding import round_once

__all__ = [
    "bernoulli", "gaussian", "keyed_uniform", "normal", "permutation", "philox", "rademacher", "stream_key", "uniform",
]  # fmt: skip

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_BLOCK = 1 << 17
_ACCELERATOR_BLOCK = 1 << 24
Device = torch.device | str


def philox(
    counter: Sequence[torch.Tensor], key: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds of Philox4x32.

    Parameters
    ----------
    counter : four int64 tensors of one shape
        The 32-bit words of each counter, least significant first.
    key : (int, int)
        The two 32-bit words of the key.

    Returns
    -------
    tuple of four int64 tensors
        The 32-bit words of each output.
    """
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2**64, which keeps both 32-bit halves.
        low, high = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = (high >> 32).bitwise_and_(_WORD).bitwise_xor_(b).bitwise_xor_(k0)
        c = (low >> 32).bitwise_and_(_WORD).bitwise_xor_(d).bitwise_xor_(k1)
        b, d = high.bitwise_and_(_WORD), low.bitwise_and_(_WORD)
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return a, b, c, d


def uniform(seed: int, name: str, count: int, *, start: int = 0, device: Device = "cpu") -> torch.Tensor:
    """Uniform numbers in [0, 1) with 53 random bits each.

    Parameters
    ----------
    seed : int
        0 or more, below 2**64.
    name : str
        The stream; other names give independent numbers.
    count : int
        How many elements.
    start : int
        Index of the first one.

    Returns
    -------
    Tensor
        Shape (count,), float64.
    """

    def block(first: int, size: int) -> torch.Tensor:
        words = _words("uniform", seed, name, 2 * first, 2 * size, device).view(-1, 2)
        bits = ((words[:, 0] >> 5) << 26) | (words[:, 1] >> 6)
        return bits.double().mul_(2.0**-53)

    return _fill(block, count, start, torch.float64, device)


def normal(
    seed: int, name: str, count: int, *, start: int = 0, dtype: torch.dtype = torch.float32, device: Device = "cpu"
) -> torch.Tensor:
    """Standard normal numbers by inversion.

    Each is the normal quantile of (w + 1/2) / 2**32 with a 32-bit word w, so the largest
    magnitude is 6.34. The quantile is computed in float64 to about 1e-15 and rounded once.

    Parameters
    ----------
    seed, name, count, start
        As in `uniform`.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    Tensor
        Shape (count,).

    References
    ----------
    Wichura 1988, algorithm AS 241, doi:10.2307/2347330.
    """

    def block(first: int, size: int) -> torch.Tensor:
        return _quantile(_words("normal", seed, name, first, size, device))

    return _fill(block, count, start, dtype, device)


def gaussian(seed: int, name: str, count: int, *, start: int = 0, device: Device = "cpu") -> torch.Tensor:
    """Standard normal numbers in float32, several times faster than `normal`: directions of zeroth-order steps.

    Elements 2p and 2p+1 are r cos a and r sin a. Word 2p gives r^2 = -2 ln u with u = (w >> 1 | 1) / 2**31; of word
    2p+1 two bits choose the quadrant of a and thirty the place in it. Logarithm, sine and cosine are
    polynomials in float32, right to about 1e-7, and the largest magnitude is 6.56. `noise_kernels` has the same bits.

    Parameters
    ----------
    seed, name, count, start
        As in `uniform`.

    Returns
    -------
    Tensor
        Shape (count,), float32.

    References
    ----------
    Box and Muller 1958, doi:10.1214/aoms/1177706645.
    """

    def block(first: int, size: int) -> torch.Tensor:
        skipped = first % 2
        pairs = (skipped + size + 1) // 2
        words = _words("gaussian", seed, name, first - skipped, 2 * pairs, device).view(-1, 2)
        radius, (less, more) = _root_of_log(words[:, 0]), _turned(words[:, 1])
        return torch.stack((radius * less, radius * more), dim=1).view(-1)[skipped : skipped + size]

    return _fill(block, count, start, torch.float32, device)


def rademacher(
    seed: int, name: str, count: int, *, start: int = 0, dtype: torch.dtype = torch.float32, device: Device = "cpu"
) -> torch.Tensor:
    """Signs: +1 or -1 with equal probability, one random bit each; shape (count,)."""

    def block(first: int, size: int) -> torch.Tensor:
        word, skipped = divmod(first, 32)
        words = _words("rademacher", seed, name, word, -(-(skipped + size) // 32), device)
        bits = (words.unsqueeze(1) >> torch.arange(32, device=device)).bitwise_and_(1)
        return bits.view(-1)[skipped : skipped + size].mul_(2).sub_(1)

    return _fill(block, count, start, dtype, device)


def bernoulli(seed: int, name: str, p: float, count: int, *, start: int = 0, device: Device = "cpu") -> torch.Tensor:
    """True with probability p (0 to 1); shape (count,), bool."""
    return uniform(seed, name, count, start=start, device=device) < p


def permutation(seed: int, name: str, n: int) -> torch.Tensor:
    """A random order of 0..n-1: stable sort by 64-bit keys; shape (n,), int64."""
    words = _words("permutation", seed, name, 0, 2 * n, "cpu").view(-1, 2)
    return torch.argsort((words[:, 0] << 32) | words[:, 1], stable=True)


def keyed_uniform(seed: int, name: str, ids: Sequence[str]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per id, with 53 bits, whatever the order and the other ids.

    Parameters
    ----------
    seed : int
        0 or more, below 2**64.
    name : str
        What the numbers are for.
    ids : sequence of str
        Names of the things to number.

    Returns
    -------
    ndarray
        Shape (len(ids),), float64.
    """
    key = _digest("keyed", seed, name, 32)
    digests = (hashlib.blake2b(i.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest() for i in ids)
    bits = np.frombuffer(b"".join(digests), dtype="<u8") >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def stream_key(use: str, seed: int, name: str) -> tuple[int, int]:
    """The two words of the generator's key for a stream: `use` is the function's name."""
    digest = _digest(use, seed, name, 8)
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _digest(use: str, seed: int, name: str, size: int) -> bytes:
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed}: must be 0 or more and below 2**64")
    text = name.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=size, salt=seed.to_bytes(8, "little"), person=use.encode()).digest()


def _words(use: str, seed: int, name: str, first: int, count: int, device: Device) -> torch.Tensor:
    """Words first..first+count of a stream, int64 in [0, 2**32); word j is output j % 4 of counter j // 4."""
    key = stream_key(use, seed, name)
    begin, end = first // 4, -(-(first + count) // 4)
    index = torch.arange(begin, end, dtype=torch.int64, device=device)
    zero = torch.zeros_like(index)
    outputs = philox((index & _WORD, index >> 32, zero, zero), key)
    return torch.stack(outputs, dim=1).view(-1)[first - 4 * begin : first - 4 * begin + count]


def _fill(
    block: Callable[[int, int], torch.Tensor], count: int, start: int, dtype: torch.dtype, device: Device
) -> torch.Tensor:
    """Compute a stream in pieces that fit the cache; the pieces do not change a bit."""
    if count < 0 or start < 0:
        raise ValueError(f"count {count} and start {start}: neither may be negative")
    result = torch.empty(count, dtype=dtype, device=device)
    for first, size in _pieces(count, _BLOCK if result.device.type == "cpu" else _ACCELERATOR_BLOCK):
        piece = block(start + first, size)
        result[first : first + size] = round_once(piece, dtype) if piece.is_floating_point() else piece
    return result


def _pieces(count: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, size):
        yield first, min(size, count - first)


# Wichura's AS 241 (PPND16), highest power first. Its third region begins at exp(-25), below the
# smallest tail 2**-33 that a 32-bit word can give, so it is not needed.
_A = (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
      1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0)  # fmt: skip
_B = (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
      5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0)  # fmt: skip
_C = (7.7454501427834140764e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
      3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734)  # fmt: skip
_D = (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
      6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0)  # fmt: skip
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_SQRT_HALF = 0.7071067811865476
_ATANH = tuple(2.0 / (2 * k + 1) for k in range(11, -1, -1))


def _quantile(words: torch.Tensor) -> torch.Tensor:
    """Normal quantile of (w + 1/2) / 2**32 in float64."""
    offset = (words.double() + (0.5 - 2.0**31)).mul_(2.0**-32)  # p - 1/2, exact
    square = (offset * offset).neg_().add_(0.180625)
    result = _polynomial(_A, square).div_(_polynomial(_B, square)).mul_(offset)
    outside = (offset.abs() > 0.425).nonzero().squeeze(1)
    tail = offset[outside]
    root = _log(tail.abs().neg_().add_(0.5)).neg_().sqrt_().sub_(1.6)
    value = _polynomial(_C, root).div_(_polynomial(_D, root))
    result[outside] = torch.where(tail < 0, -value, value)
    return result


def _polynomial(coefficients: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    """Horner's rule with a rounding after every product and every sum."""
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total.mul_(x).add_(coefficient)
    return total


def _log(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of normal positive float64 numbers; libraries differ in the last bit, this does not."""
    bits = x.view(torch.int64)
    exponent = (bits >> 52).sub_(1022).double()
    mantissa = ((bits & ((1 << 52) - 1)) | (1022 << 52)).view(torch.float64)  # in [1/2, 1)
    small = mantissa < _SQRT_HALF
    mantissa = torch.where(small, mantissa * 2.0, mantissa)
    exponent = torch.where(small, exponent - 1.0, exponent)
    s = (mantissa - 1.0).div_(mantissa + 1.0)
    series = _polynomial(_ATANH, s * s).mul_(s)
    return (exponent * _LN2_LOW).add_(series).add_(exponent * _LN2_HIGH)


# Coefficients, highest power first, of minimax fits that were then rounded to float32:
# (f - ln(1 + f)) / f^2 for 1 + f from 1/sqrt(2) to sqrt(2), relative error of the logarithm 3.4e-8;
# sin(x pi/4) / x and cos(x pi/4) in x^2 for |x| <= 1, errors 2.4e-9 and 2.8e-8.
LOG_FIT = (-0.08734750747680664, 0.14307482540607452, -0.14917989075183868, 0.165705144405365, -0.19962070882320404,
           0.25001755356788635, -0.33333951234817505, 0.49999991059303284)  # fmt: skip
SIN_FIT = (-3.595450834836811e-05, 0.002490007085725665, -0.08074543625116348, 0.7853981852531433)
COS_FIT = (-0.0003188805130776018, 0.015849914401769638, -0.3084242641925812, 1.0)
LN2 = 0.6931471824645996
SQRT_HALF_BITS = 0x3F3504F3


def _root_of_log(words: torch.Tensor) -> torch.Tensor:
    """sqrt(-ln u) of u = (w >> 1 | 1) / 2**31 in float32: the mantissa around 1, and the exponent, apart."""
    bits = ((words >> 1) | 1).int().float().view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32).sub_(1.0)
    fit = _polynomial(LOG_FIT, f).mul_(f * f).sub_(f)
    squared = (31 - exponent).float().mul_(LN2).add_(fit)
    return squared.double().sqrt_().float()  # libraries round float32 roots differently; this one is right


def _turned(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(2) (cos a, sin a), as cos - sin and cos + sin of a - pi/4 in the first quadrant, with two random signs."""
    x = ((words << 34 >> 32) | 2).int().float().mul_(2.0**-31)
    square = x * x
    sine, cosine = _polynomial(SIN_FIT, square).mul_(x), _polynomial(COS_FIT, square)
    return _signed(cosine - sine, words >> 31), _signed(cosine + sine, words >> 30)


def _signed(values: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Turn the sign of values around where the last bit of a word is set."""
    return torch.where((words & 1).bool(), -values, values)
