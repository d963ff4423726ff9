"""Level indices ↔ bytes: the indices of an output channel are digits of words, the first the least significant.

By bits, a digit has base 2**bits, and the words merely cut the row's bits into whole bytes. Densely, it has as base the
number of levels, which wastes less. The last word of a row holds what is left, in the fewest bytes that can hold it.
"""

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbpq.errors import UsageError, did_you_mean

PACKINGS = ("bits", "dense")
_MOST_DENSE_BYTES = 4
_LARGEST_TABLE = 2**12  # entries: a table of this size stays in a processor's cache


@dataclass(frozen=True)
class Word:
    """``digits`` indices below ``base`` in ``width`` bytes, little-endian, the first index the least significant."""

    base: int
    digits: int
    width: int

    def row_bytes(self, count: int) -> int:
        """Bytes of an output channel of ``count`` indices; its last word may be shorter than the others."""
        full, rest = divmod(count, self.digits)
        largest: int = self.base**rest - 1
        return full * self.width + (largest.bit_length() + 7) // 8

    @functools.cached_property
    def table(self) -> NDArray[np.uint8]:
        """The digits (base**t, t) of all numbers below base**t, for looking up t digits at a time."""
        step = 1
        while step < self.digits and self.base ** (step + 1) <= _LARGEST_TABLE:
            step += 1
        numbers = np.arange(self.base**step)
        return np.stack([numbers // self.base**digit % self.base for digit in range(step)], axis=1).astype(np.uint8)


def bits_for(levels: int) -> int:
    """Bits of an index into a table of ``levels`` levels: ⌈log₂ levels⌉, at least 1.

    Raises:
        UsageError: not 1 to 256 levels, the range of one byte.
    """
    if not 1 <= levels <= 256:
        raise UsageError(f"a level table has 1 to 256 levels, not {levels}; use fewer levels")
    return max(1, (levels - 1).bit_length())


@functools.cache
def word_of_bits(bits: int) -> Word:
    """The word for indices of 1 to 8 ``bits`` each: as few of them as fill whole bytes.

    Raises:
        UsageError: another number of bits.
    """
    if not 1 <= bits <= 8:
        raise UsageError(f"an index has 1 to 8 bits, not {bits}; use bits_for(number of levels)")
    digits = 8 // math.gcd(8, bits)
    return Word(2**bits, digits, digits * bits // 8)


@functools.cache
def dense_word(levels: int) -> Word | None:
    """The word of 1 to 4 bytes that takes fewest bits for an index, of equal ones the shortest; None if that is no
    gain over whole bits.
    """
    bits = bits_for(levels)
    if levels == 2**bits or levels == 1:
        return None
    words = []
    for width in range(1, _MOST_DENSE_BYTES + 1):
        digits = 1
        while levels ** (digits + 1) <= 256**width:
            digits += 1
        words.append(Word(levels, digits, width))
    best = min(words, key=lambda word: Fraction(word.width, word.digits))  # of equal ones the first
    return best if 8 * best.width < bits * best.digits else None


def word_for(levels: int, packing: str) -> Word:
    """The word for indices into a table of ``levels`` levels; dense packing that gains nothing is packing by bits.

    Raises:
        UsageError: no such packing, or not 1 to 256 levels.
    """
    check_packing(packing)
    return (dense_word(levels) if packing == "dense" else None) or word_of_bits(bits_for(levels))


def check_packing(packing: str) -> None:
    """Refuse an unknown packing.

    Raises:
        UsageError: naming those there are.
    """
    if packing not in PACKINGS:
        raise UsageError(f"unknown packing {packing!r}{did_you_mean(packing, PACKINGS)}; use {' or '.join(PACKINGS)}")


def pack(indices: NDArray[np.uint8], word: Word) -> NDArray[np.uint8]:
    """Pack ``indices`` (C, n), each below ``word.base``, to bytes (C, ``word.row_bytes(n)``).

    Raises:
        UsageError: not a matrix of uint8, or an index that is too large.
    """
    _check_matrix(indices)
    if indices.size and int(indices.max()) >= word.base:
        raise UsageError(f"index {indices.max()} is not below {word.base}; choose a word for this number of levels")
    rows, count = indices.shape
    words = -(-count // word.digits)
    padded = np.zeros((rows, words * word.digits), dtype=np.uint8)
    padded[:, :count] = indices
    values = np.zeros((rows, words), dtype=np.int64)
    for digit in reversed(range(word.digits)):
        values *= word.base
        values += padded[:, digit :: word.digits]
    packed = np.empty((rows, words, word.width), dtype=np.uint8)
    for place in range(word.width):
        packed[:, :, place] = values >> 8 * place & 255
    return np.ascontiguousarray(packed.reshape(rows, -1)[:, : word.row_bytes(count)])


def unpack(packed: NDArray[np.uint8], word: Word, count: int) -> NDArray[np.uint8]:
    """The inverse of `pack`: bytes (C, ``word.row_bytes(count)``) to indices (C, count), if `in_range`.

    Raises:
        UsageError: not a matrix of uint8, or rows of another length.
    """
    values = _values(packed, word, count)
    table = word.table
    step = table.shape[1]
    indices = np.empty((*values.shape, word.digits), dtype=np.uint8)
    for digit in range(0, word.digits, step):
        higher = values // len(table)
        most = min(step, word.digits - digit)
        # the remainder like this, and `take` instead of brackets, because both are a few times as fast
        indices[:, :, digit : digit + most] = np.take(table, values - higher * len(table), axis=0)[:, :, :most]
        values = higher
    return np.ascontiguousarray(indices.reshape(len(packed), -1)[:, :count])


def in_range(packed: NDArray[np.uint8], word: Word, count: int) -> bool:
    """Whether `pack` could have written these bytes (C, ``word.row_bytes(count)``): no word is too large.

    Raises:
        UsageError: as `unpack`.
    """
    values = _values(packed, word, count)
    full, rest = divmod(count, word.digits)
    largest = values.max(axis=0, initial=0)
    return not (largest[:full] >= word.base**word.digits).any() and not (largest[full:] >= word.base**rest).any()


def _values(packed: NDArray[np.uint8], word: Word, count: int) -> NDArray[np.signedinteger[Any]]:
    """The words (C, ⌈count / digits⌉) as integers."""
    _check_matrix(packed)
    rows, width = packed.shape
    if count < 0 or width != word.row_bytes(count):
        raise UsageError(f"{count} indices do not make rows of {width} bytes; pass the count packed")
    kind: np.dtype[np.signedinteger[Any]] = np.dtype(np.int32 if word.width < 4 else np.int64)
    if word.width == 1:
        return packed.astype(kind)
    padded = np.zeros((rows, -(-count // word.digits) * word.width), dtype=np.uint8)
    padded[:, :width] = packed
    values: NDArray[np.signedinteger[Any]] = padded[:, :: word.width].astype(kind)
    for place in range(1, word.width):
        values |= padded[:, place :: word.width].astype(kind) << 8 * place
    return values


def _check_matrix(array: NDArray[np.uint8]) -> None:
    if array.ndim != 2 or array.dtype != np.uint8:
        raise UsageError(
            f"a matrix of uint8 is needed, not shape {array.shape} of {array.dtype}; reshape and convert it"
        )
