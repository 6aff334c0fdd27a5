"""Stored bytes to rows of float64 and back, compiled: what the merge kernels share.

Compiled code is cached by the file that calls it: after a change here, remove `*.nbi` beside the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import types
from numba.extending import intrinsic

from honeloom.merging.engine.operands import ITEM_SIZES, KINDS

__all__ = [
    "MAGNITUDE", "ROW", "Array", "all_finite", "at", "bf16_bits", "compiled", "decode", "encode", "fill",
    "first_not_finite", "float64_of", "int64_of", "load", "single", "store", "uint32_of", "widen",
]  # fmt: skip

ROW = 1024
"""Elements at a time, which with a few rows beside it stay in the first-level cache."""
_F64, _F32, _BF16, _F16 = KINDS["F64"], KINDS["F32"], KINDS["BF16"], KINDS["F16"]
_E4M3 = KINDS["F8_E4M3"]
_SIZES = np.array(ITEM_SIZES, np.int64)
_CODES = torch.arange(256, dtype=torch.uint8)
_TABLES = np.stack([_CODES.view(t).double().numpy() for t in (torch.float8_e4m3fn, torch.float8_e5m2)])
_I64, _I32, _U16, _U32, _U64 = np.int64, np.int32, np.uint16, np.uint32, np.uint64
MAGNITUDE = _I64((1 << 63) - 1)
"""Of a float64's bits, all but the sign."""
_INFINITY = _I64(0x7FF << 52)

Array = npt.NDArray[Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile at the first call, for any thread; division by zero is not an error, which would forbid vectors."""
    return cast("_Function", numba.njit(cache=True, nogil=True, error_model="numpy")(function))


def _bits_as(target: Any) -> Any:
    """The same bits as another type, within an expression."""

    def typed(_context: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

        return target(value), code

    return intrinsic(typed)


_float32_of, float64_of, int64_of = (_bits_as(t) for t in (types.float32, types.float64, types.int64))
uint32_of = _bits_as(types.uint32)


def _typed_pointer(_context: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(types.int64), code  # type: ignore[no-untyped-call]


_pointer: Any = intrinsic(_typed_pointer)


@compiled
def fill(row: Any, value: Any) -> None:
    """A plain loop: assignment to a slice takes seconds to compile."""
    for i in range(row.size):
        row[i] = value


@compiled
def single(half: Any) -> Any:
    """The number of a bfloat16's bits, as float32."""
    return _float32_of(_U32(_U32(half) << _U32(16)))


@compiled
def at(address: Any, kind: int, first: int, count: int) -> Any:
    """Stored bytes of some elements."""
    size = _SIZES[kind]
    return numba.carray(_pointer(address + first * size), (count * size,), np.uint8)  # type: ignore[attr-defined]


@compiled
def decode(row: Array, data: Array, kind: int) -> None:
    """Stored elements as float64, exactly."""
    n = row.size
    if kind == _BF16:
        halves = data.view(np.uint16)
        for i in range(n):
            row[i] = single(halves[i])
    elif kind == _F32:
        singles = data.view(np.float32)
        for i in range(n):
            row[i] = singles[i]
    elif kind == _F64:
        doubles = data.view(np.float64)
        for i in range(n):
            row[i] = doubles[i]
    elif kind == _F16:
        _decode_f16(row, data.view(np.uint16))
    else:
        table = _TABLES[kind - _E4M3]
        for i in range(n):
            row[i] = table[data[i]]


@compiled
def _decode_f16(row: Array, halves: Array) -> None:
    """Exponents move by 112, twice if infinite or NaN; subnormal numbers are small integers times 2**-24."""
    for i in range(row.size):
        size = _U32(halves[i]) & _U32(0x7FFF)
        moved = _U32(size << _U32(13)) + (_U32(224 << 23) if size >= _U32(0x7C00) else _U32(112 << 23))
        value = _float32_of(_U32(moved))
        value = np.float32(_I32(size)) * np.float32(2.0**-24) if size < _U32(0x400) else value
        row[i] = -value if halves[i] >= _U16(0x8000) else value


@compiled
def encode(data: Array, row: Array, kind: int) -> bool:
    """Float64 to the nearest stored value, ties to even, in one step; whether all of these are finite."""
    if kind == _BF16:
        if _encode_bf16(data.view(np.uint16), row):
            return True
        _encode_16(data.view(np.uint16), row, 45, _I32(896 << 7), 897 << 52, 2.0**133, _I32(0x7F80))
    elif kind == _F16:
        _encode_16(data.view(np.uint16), row, 42, _I32(1008 << 10), 1009 << 52, 2.0**24, _I32(0x7C00))
    elif kind == _F32:
        singles = data.view(np.float32)
        for i in range(row.size):
            singles[i] = np.float32(row[i])
    else:
        doubles = data.view(np.float64)
        for i in range(row.size):
            doubles[i] = row[i]
    if all_finite(data, kind):
        return True
    _write_nan(data, row, kind)
    return False


@compiled
def _write_nan(data: Array, row: Array, kind: int) -> None:
    """NaN comes out as infinity or with some bits of its own; all become the same quiet one, byte by byte."""
    size = _SIZES[kind]
    for i in range(row.size):
        if np.isnan(row[i]):
            for j in range(size * i, size * i + size):
                data[j] = 0
            data[size * i + size - 1] = 0x7E if kind == _F16 else 0x7F
            data[size * i + size - 2] = 0xF8 if kind == _F64 else 0x00 if kind == _F16 else 0xC0


@compiled
def bf16_bits(value: float) -> Any:
    """Bits as a float32 of the nearest bfloat16, ties to even, where that is finite; else those of NaN or infinity.

    A sum with a number whose last place is that of the result rounds once, subnormal numbers too; the difference is
    exact, and only the sign of 0 must be brought back.
    """
    bits = int64_of(value)
    large = float64_of(max(bits & _INFINITY, _I64(897 << 52))) * (1.5 * 2.0**45)
    return uint32_of(np.float32(float64_of(int64_of((value + large) - large) | (bits & ~MAGNITUDE))))


@compiled
def _encode_bf16(codes: Array, row: Array) -> bool:
    """To bfloat16; False, and nothing is right, if a number is NaN, infinite or becomes so."""
    for i in range(codes.size):
        codes[i] = _U16(bf16_bits(row[i]) >> _U32(16))
    return bool(all_finite(codes.view(np.uint8), _BF16))


@compiled
def _encode_16(
    codes: Array, row: Array, dropped: int, moved: Any, smallest: int, inverse: float, infinity: Any
) -> None:
    """Bits below the last place are rounded into it; below the smallest normal number a sum with 2**52 rounds.

    `dropped` bits of the mantissa go, exponents move by `moved`, `smallest` is the first normal number's bits and
    1 / `inverse` the first subnormal number. Beyond the largest number a carry has gone past infinity, and that of NaN
    maybe into the sign, hence the unsigned shift.
    """
    half = _I64((_I64(1) << (dropped - 1)) - 1)
    for i in range(row.size):
        bits = int64_of(row[i])
        size = bits & MAGNITUDE
        code = _I32(_U64(size + half + ((size >> dropped) & 1)) >> _U64(dropped)) - moved
        small = _I32(int64_of(float64_of(size) * inverse + 2.0**52) & 0xFFFF)
        code = small if size < smallest else code
        code = infinity if code > infinity else code
        codes[i] = _U16(code | _I32((bits >> 48) & 0x8000))


@compiled
def all_finite(data: Array, kind: int) -> bool:
    """Whether no stored element is NaN or infinite; plain reductions, which vectorise."""
    if kind in (_BF16, _F16):
        halves, largest = data.view(np.uint16), _U16(0)
        for i in range(halves.size):
            largest = max(largest, _U16(halves[i] & _U16(0x7FFF)))
        return bool(largest < (0x7F80 if kind == _BF16 else 0x7C00))
    if kind == _F32:
        singles, most = data.view(np.uint32), _U32(0)
        for i in range(singles.size):
            most = max(most, _U32(singles[i] & _U32(0x7FFFFFFF)))
        return bool(most < _U32(0x7F800000))
    wrong = _I64(0)
    if kind == _F64:
        doubles = data.view(np.int64)
        for i in range(doubles.size):
            wrong |= _I64((doubles[i] & MAGNITUDE) >= _INFINITY)
    else:
        table = _TABLES[kind - _E4M3]
        for i in range(data.size):
            wrong |= _I64(not np.isfinite(table[data[i]]))
    return bool(wrong == 0)


@compiled
def _first(row: Array) -> int:
    """Place of the first number that is NaN or infinite, or -1."""
    for i in range(row.size):
        if not np.isfinite(row[i]):
            return i
    return -1


@compiled
def first_not_finite(count: int, address: int, kind: int) -> int:
    """Place of the first stored element that is NaN or infinite, or -1.

    Parameters
    ----------
    count, address, kind : int
        Elements, their address and kind.
    """
    row = np.empty(ROW)
    for p in range(0, count, ROW):
        size = min(ROW, count - p)
        data = at(address, kind, p, size)
        if not all_finite(data, kind):
            decode(row[:size], data, kind)
            return p + _first(row[:size])
    return -1


@compiled
def load(row: Array, address: int, kind: int, p: int, model: int, found: Array) -> None:
    """Decode a row that begins at p, and note in `found` the model and place of the first element not finite."""
    data = at(address, kind, p, row.size)
    decode(row, data, kind)
    if (found[1] < 0 or found[1] > p) and not all_finite(data, kind):
        wrong = p + _first(row)
        if found[1] < 0 or wrong < found[1]:
            found[0], found[1] = model, wrong


@compiled
def _equal(one: Array, other: Array, kind: int) -> int:
    """How many of at most a row of stored numbers are equal as numbers: NaN to nothing, zero to minus zero."""
    if kind in (_BF16, _F16):
        a, b, same = one.view(np.uint16), other.view(np.uint16), _U16(0)
        infinity = _U16(0x7F80) if kind == _BF16 else _U16(0x7C00)
        for i in range(a.size):
            size = _U16(a[i] & _U16(0x7FFF))
            zeros = _U16((a[i] | b[i]) & _U16(0x7FFF)) == _U16(0)
            same = _U16(same + _U16(((a[i] == b[i]) & (size <= infinity)) | zeros))
        return int(same)
    if kind == _F32:
        return _equal_floats(one.view(np.float32), other.view(np.float32))
    return _equal_floats(one.view(np.float64), other.view(np.float64))


@compiled
def _equal_floats(one: Array, other: Array) -> int:
    count = 0
    for i in range(one.size):
        count += one[i] == other[i]
    return count


@compiled
def widen(singles: Array, data: Array, kind: int, spare: Array) -> None:
    """Stored elements as float32."""
    if kind == _BF16:
        halves, bits = data.view(np.uint16), singles.view(np.uint32)
        for i in range(halves.size):
            bits[i] = _U32(_U32(halves[i]) << _U32(16))
    else:
        decode(spare[: singles.size], data, kind)
        for i in range(singles.size):
            singles[i] = np.float32(spare[i])


@compiled
def store(
    out: Array, kind: int, held: int, merged: Array, origin: Array, base: int, base_kind: int, p: int, found: Array,
    room: Array,
) -> int:  # fmt: skip
    """Encode a row, note in `found` the first element that is not finite, and count what the rounding loses.

    What is rounded to `kind` is written as `held`: as itself, or as float32. `room` is (2, ROW) float64, for anything.
    """
    size, n = _SIZES[kind], merged.size
    spare = room[0]
    data = out[p * size : (p + n) * size] if held == kind else room[1].view(np.uint8)[: n * size]
    if not encode(data, merged, kind) and found[2] < 0:
        decode(spare[:n], data, kind)
        found[2] = p + _first(spare[:n])
    if held != kind:
        widen(out[4 * p : 4 * (p + n)].view(np.float32), data, kind, spare)
    if base == 0:
        return 0
    if base_kind == kind:
        theirs = at(base, kind, p, n)
    else:
        theirs = spare.view(np.uint8)[: n * size]
        encode(theirs, origin, kind)
    return _equal(data, theirs, kind) - _equal_floats(merged, origin)  # what is equal before is equal after
