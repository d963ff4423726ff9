"""Level indices ↔ bytes. Bits are packed least-significant first, and each output channel starts on a byte.

Index i of a channel occupies bits i·bits … i·bits + bits − 1 of its row; bit k of a row is bit k mod 8 of byte ⌊k / 8⌋.
"""

import numpy as np
from numpy.typing import NDArray

from cbpq.errors import UsageError


def bits_for(levels: int) -> int:
    """Bits of an index into a table of ``levels`` levels: ⌈log₂ levels⌉, at least 1.

    Raises:
        UsageError: not 1 to 256 levels, the range of one byte.
    """
    if not 1 <= levels <= 256:
        raise UsageError(f"a level table has 1 to 256 levels, not {levels}; use fewer levels")
    return max(1, (levels - 1).bit_length())


def row_bytes(count: int, bits: int) -> int:
    """Bytes of one output channel of ``count`` indices of ``bits`` bits."""
    return (count * bits + 7) // 8


def pack(indices: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack ``indices`` (C, n), each below 2**bits, to bytes (C, ⌈n·bits / 8⌉); padding bits are zero.

    Raises:
        UsageError: not a matrix of uint8, not 1 to 8 bits, or an index that needs more bits.
    """
    _check_matrix(indices, bits)
    if indices.size and int(indices.max()) >> bits:
        raise UsageError(f"index {indices.max()} does not fit into {bits} bits; pack with bits_for(number of levels)")
    rows, count = indices.shape
    planes = np.empty((rows, count, bits), dtype=np.uint8)
    for bit in range(bits):
        np.bitwise_and(indices >> bit, 1, out=planes[:, :, bit])
    return np.packbits(planes.reshape(rows, count * bits), axis=1, bitorder="little")


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """The inverse of `pack`: bytes (C, ⌈count·bits / 8⌉) to indices (C, count). Padding bits are not looked at.

    Raises:
        UsageError: not a matrix of uint8, not 1 to 8 bits, or rows of another length.
    """
    _check_matrix(packed, bits)
    rows, width = packed.shape
    if count < 0 or width != row_bytes(count, bits):
        raise UsageError(f"{count} indices of {bits} bits do not make rows of {width} bytes; pass the count packed")
    planes = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little").reshape(rows, count, bits)
    indices = np.zeros((rows, count), dtype=np.uint8)
    for bit in range(bits):
        indices |= planes[:, :, bit] << bit
    return indices


def padding_is_zero(packed: NDArray[np.uint8], bits: int, count: int) -> bool:
    """Whether the bits behind the ``count`` indices of each row are all zero; ``packed`` as for `unpack`."""
    used = count * bits % 8
    return used == 0 or not np.any(packed[:, -1] >> used)


def _check_matrix(array: NDArray[np.uint8], bits: int) -> None:
    if array.ndim != 2 or array.dtype != np.uint8:
        raise UsageError(
            f"a matrix of uint8 is needed, not shape {array.shape} of {array.dtype}; reshape and convert it"
        )
    if not 1 <= bits <= 8:
        raise UsageError(f"an index has 1 to 8 bits, not {bits}; use bits_for(number of levels)")
