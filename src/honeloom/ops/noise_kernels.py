"""Compiled streams of `honeloom.ops.noise` for one CPU thread: the same bits, drawn where they are used.

Numbers go in blocks that stay in the first-level cache, so that a direction is added to weights, or to a
sum of directions, without ever being in memory. Nothing is contracted or reassociated: each product, sum and root
is rounded by itself, as torch does it on any device. Import this when a step starts: it loads numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from honeloom.ops.noise import COS_FIT, LN2, LOG_FIT, SIN_FIT, SQRT_HALF_BITS

__all__ = ["accumulate", "add", "add_drawn", "copy", "fill", "words"]

BLOCK = 4096
"""Numbers at a time; a multiple of the 128 signs that one counter gives."""
_F32, _I32, _U32, _U64 = np.float32, np.int32, np.uint32, np.uint64
_LOW, _HALF = _U64(0xFFFFFFFF), _U64(32)
_M0, _M1, _W0, _W1 = _U64(0xD2511F53), _U64(0xCD9E8D57), _U64(0x9E3779B9), _U64(0xBB67AE85)
_ONE, _TWO, _TOP = _U32(1), _U32(2), _U32(1 << 31)
_UNIT, _LN2, _FINE = _F32(1.0), _F32(LN2), _F32(2.0**-31)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (_F32(c) for c in LOG_FIT)
_S0, _S1, _S2, _S3 = (_F32(c) for c in SIN_FIT)
_C0, _C1, _C2, _C3 = (_F32(c) for c in COS_FIT)
_SEAM, _WIDTH, _LARGEST = _I32(SQRT_HALF_BITS), _I32(23), _I32(31)

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]
Integers = npt.NDArray[np.int64]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiled(function: _Function) -> _Function:
    return cast("_Function", numba.njit(cache=True, nogil=True)(function))


@_compiled
def words(even: Words, odd: Words, first: int, counters: int, k0: int, k1: int) -> None:
    """Outputs of some counters: words 0 and 2 of each, and words 1 and 3, apart. One plain loop, which vectorises."""
    for i in range(counters):
        a, b, c, d = _U64(first + i) & _LOW, _U64(first + i) >> _HALF, _U64(0), _U64(0)
        x, y = _U64(k0), _U64(k1)
        for _ in range(10):
            low, high = a * _M0, c * _M1
            a, b = (high >> _HALF) ^ b ^ x, high & _LOW
            c, d = (low >> _HALF) ^ d ^ y, low & _LOW
            x, y = (x + _W0) & _LOW, (y + _W1) & _LOW
        even[2 * i], even[2 * i + 1] = _U32(a), _U32(c)
        odd[2 * i], odd[2 * i + 1] = _U32(b), _U32(d)


@_compiled
def _roots(words: Words, exponents: Floats, count: int) -> None:
    """sqrt(-ln u), in the place of the words, in three plain loops, which vectorise."""
    r, bits = words.view(np.float32), words.view(np.int32)
    for i in range(count):
        r[i] = _F32(_I32((words[i] >> _ONE) | _ONE))
    for i in range(count):
        exponent = _I32(_I32(bits[i] - _SEAM) >> _WIDTH)
        bits[i] = _I32(bits[i] - _I32(exponent << _WIDTH))
        exponents[i] = _F32(_I32(_LARGEST - exponent))
    for i in range(count):
        f = r[i] - _UNIT
        fit = ((_L0 * f + _L1) * f + _L2) * f + _L3
        fit = (((fit * f + _L4) * f + _L5) * f + _L6) * f + _L7
        r[i] = np.sqrt(exponents[i] * _LN2 + (fit * (f * f) - f))


@_compiled
def _turns(words: Words, r: Floats, z: Floats, count: int) -> None:
    """Pairs of normal numbers from radii and angles."""
    for i in range(count):
        x = _F32(_I32(_I32(words[i] << _TWO) | _I32(2))) * _FINE
        square = x * x
        sine = (((_S0 * square + _S1) * square + _S2) * square + _S3) * x
        cosine = ((_C0 * square + _C1) * square + _C2) * square + _C3
        z[2 * i] = r[i] * (cosine - sine)
        z[2 * i + 1] = r[i] * (cosine + sine)
    bits = z.view(np.uint32)
    for i in range(count):
        bits[2 * i] ^= words[i] & _TOP
        bits[2 * i + 1] ^= _U32(words[i] << _ONE) & _TOP


@_compiled
def _spread(even: Words, odd: Words, z: Floats, count: int) -> None:
    """A sign for each bit: every word 32 times, then one plain loop over all, which vectorises."""
    bits = z.view(np.uint32)
    for j in range(count):
        one, other = bits[64 * j : 64 * j + 32], bits[64 * j + 32 : 64 * j + 64]
        for b in range(32):
            one[b] = even[j]
            other[b] = odd[j]
    for i in range(64 * count):
        bits[i] = _U32(_U32(~bits[i] >> _U32(i & 31)) << _U32(31)) | _U32(0x3F800000)


@_compiled
def _copy(out: Any, values: Any) -> None:
    """A plain loop, for the two are known not to overlap."""
    for i in range(out.size):
        out[i] = values[i]


@_compiled
def _draw(signs: bool, z: Floats, even: Words, odd: Words, first: int, size: int, k0: int, k1: int) -> None:
    """Elements of a stream from a multiple of 128 on, at most a block; a counter gives 4 numbers or 128 signs."""
    if signs:
        counters = (size + 127) // 128
        words(even, odd, first // 128, counters, k0, k1)
        _spread(even, odd, z, 2 * counters)
    else:
        counters = (size + 3) // 4
        words(even, odd, first // 4, counters, k0, k1)
        _roots(even, z, 2 * counters)  # z has room for the exponents
        _turns(odd, even.view(np.float32), z, 2 * counters)


@_compiled
def _axpy(theta: Floats, z: Floats, by: Any) -> None:
    """Product and sum are rounded apart."""
    for i in range(theta.size):
        theta[i] += z[i] * by


def _typed_pointer(_context: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), code  # type: ignore[no-untyped-call]


_pointer: Any = intrinsic(_typed_pointer)


@_compiled
def _at(address: Any, size: Any) -> Any:
    """The tensor at an address: one call for many tensors, which for a small adapter is most of the time."""
    return numba.carray(_pointer(address), (size,), np.float32)  # type: ignore[attr-defined]


@_compiled
def _room() -> Any:
    return np.empty(BLOCK, np.float32), np.empty(BLOCK // 2, np.uint32), np.empty(BLOCK // 2, np.uint32)


@_compiled
def fill(signs: bool, out: Floats, start: int, k0: int, k1: int) -> None:
    """Write a stream.

    Parameters
    ----------
    signs : bool
        Those of `rademacher` instead of the numbers of `gaussian`.
    out : ndarray
        Shape (n,), float32, contiguous: gets elements start..start+n.
    start : int
        0 or more.
    k0, k1 : int
        From `stream_key`.
    """
    z, even, odd = _room()
    end = start + out.size
    for p in range(start - start % 128, end, BLOCK):
        size, skipped = min(BLOCK, end - p), max(0, start - p)
        _draw(signs, z, even, odd, p, size, k0, k1)
        _copy(out[p + skipped - start : p + size - start], z[skipped:size])


@_compiled
def add(signs: bool, where: Integers, sizes: Integers, keys: Integers, amount: float) -> None:
    """Add a stream to each of some tensors, times a number; product and sum are rounded apart.

    Parameters
    ----------
    signs : bool
        As in `fill`.
    where, sizes : ndarray
        Shape (n,), int64: addresses of tensors that are float32 and contiguous, and how many numbers each has. They are
        changed in place; the caller keeps them alive.
    keys : ndarray
        Shape (n, 2), int64: from `stream_key`, by tensor.
    amount : float
        Rounded to float32.
    """
    z, even, odd = _room()
    by = _F32(amount)
    for k in range(where.size):
        theta = _at(where[k], sizes[k])
        for p in range(0, theta.size, BLOCK):
            size = min(BLOCK, theta.size - p)
            _draw(signs, z, even, odd, p, size, keys[k, 0], keys[k, 1])
            _axpy(theta[p : p + size], z, by)


@_compiled
def add_drawn(where: Integers, sizes: Integers, z: Floats, amount: float) -> None:
    """The same with numbers that are there: z has those of all tensors, one after the other."""
    by, first = _F32(amount), 0
    for k in range(where.size):
        _axpy(_at(where[k], sizes[k]), z[first : first + sizes[k]], by)
        first += sizes[k]


@_compiled
def copy(where: Integers, sizes: Integers, values: Floats, back: bool) -> None:
    """Copy tensors one after the other into values, or back from there."""
    first = 0
    for k in range(where.size):
        theta, kept = _at(where[k], sizes[k]), values[first : first + sizes[k]]
        if back:
            _copy(theta, kept)
        else:
            _copy(kept, theta)
        first += sizes[k]


@_compiled
def accumulate(signs: bool, out: Floats, keys: Integers, by: npt.NDArray[np.float64]) -> None:
    """Sum of streams times numbers: in float64 and in order, rounded once.

    Parameters
    ----------
    signs : bool
        As in `fill`.
    out : ndarray
        Shape (n,), float32, contiguous: gets the sum.
    keys : ndarray
        Shape (K, 2), int64: those of the streams.
    by : ndarray
        Shape (K,), float64.
    """
    z, even, odd = _room()
    total = np.empty(BLOCK, np.float64)
    for p in range(0, out.size, BLOCK):
        size = min(BLOCK, out.size - p)
        total[:size] = 0.0
        for j in range(by.size):
            _draw(signs, z, even, odd, p, size, keys[j, 0], keys[j, 1])
            amount = by[j]
            for i in range(size):
                total[i] += np.float64(z[i]) * amount
        _copy(out[p : p + size], total)
