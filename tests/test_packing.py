import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cbpq.errors import UsageError
from cbpq.packing import bits_for, pack, padding_is_zero, row_bytes, unpack


def scalar_pack(indices: list[list[int]], bits: int) -> list[bytes]:
    """One integer per row, index i worth 2**(i·bits): its little-endian bytes are the packed row."""
    rows = []
    for row in indices:
        number = sum(index << (position * bits) for position, index in enumerate(row))
        rows.append(number.to_bytes(-(-len(row) * bits // 8), "little"))
    return rows


@pytest.mark.parametrize(
    "levels, bits",
    [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (7, 3), (8, 3), (9, 4), (16, 4), (17, 5), (128, 7), (129, 8), (256, 8)],
)
def test_bits_for(levels: int, bits: int) -> None:
    assert bits_for(levels) == bits


@pytest.mark.parametrize("levels", [-1, 0, 257])
def test_bits_for_refuses(levels: int) -> None:
    with pytest.raises(UsageError, match="1 to 256"):
        bits_for(levels)


@pytest.mark.parametrize(
    "indices, bits, expected",
    [
        ([[1, 0, 0, 0, 0, 0, 0, 1, 1]], 1, [[0x81, 0x01]]),
        ([[0, 1, 2, 3]], 2, [[0b11_10_01_00]]),
        ([[0, 3, 6], [4, 1, 5]], 3, [[0x98, 0x01], [0x4C, 0x01]]),
        ([[7] * 8], 3, [[0xFF, 0xFF, 0xFF]]),
        ([[0x0A, 0x0B, 0x0C]], 4, [[0xBA, 0x0C]]),
        ([[255, 0, 1]], 8, [[255, 0, 1]]),
    ],
)
def test_known_bytes(indices: list[list[int]], bits: int, expected: list[list[int]]) -> None:
    packed = pack(np.array(indices, dtype=np.uint8), bits)
    assert packed.dtype == np.uint8
    assert packed.tolist() == expected
    assert unpack(packed, bits, len(indices[0])).tolist() == indices


@given(rows=st.integers(1, 5), count=st.integers(0, 40), bits=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_agrees_with_scalar_packing_and_comes_back(rows: int, count: int, bits: int, seed: int) -> None:
    generator = random.Random(seed)
    indices = [[generator.randrange(2**bits) for _ in range(count)] for _ in range(rows)]
    array = np.array(indices, dtype=np.uint8).reshape(rows, count)
    packed = pack(array, bits)
    assert packed.shape == (rows, row_bytes(count, bits))
    assert [row.tobytes() for row in packed] == scalar_pack(indices, bits)
    assert padding_is_zero(packed, bits, count)
    back = unpack(packed, bits, count)
    assert back.dtype == np.uint8
    assert np.array_equal(back, array)


def test_strided_input() -> None:
    array = np.arange(48, dtype=np.uint8).reshape(6, 8) % 8
    assert np.array_equal(pack(array.T[::2], 3), pack(np.ascontiguousarray(array.T[::2]), 3))
    packed = pack(array, 3)
    doubled = np.repeat(packed, 2, axis=0)
    assert np.array_equal(unpack(doubled[::2], 3, 8), array)


@pytest.mark.parametrize("bit", range(16))
def test_padding_bits_are_seen(bit: int) -> None:
    packed = np.zeros((2, 2), dtype=np.uint8)
    packed[1, bit // 8] = 1 << bit % 8
    assert padding_is_zero(packed, 3, 3) is (bit < 9)


def test_padding_without_spare_bits() -> None:
    assert padding_is_zero(np.full((1, 3), 255, dtype=np.uint8), 3, 8)
    assert padding_is_zero(np.zeros((1, 0), dtype=np.uint8), 3, 0)


@pytest.mark.parametrize(
    "indices, bits",
    [
        (np.array([[0, 2]], dtype=np.uint8), 1),
        (np.array([[8]], dtype=np.uint8), 3),
        (np.array([[1]], dtype=np.uint8), 0),
        (np.array([[1]], dtype=np.uint8), 9),
        (np.array([1, 2], dtype=np.uint8), 3),
        (np.array([[1]], dtype=np.int64), 3),
    ],
)
def test_pack_refuses(indices: NDArray[np.uint8], bits: int) -> None:
    with pytest.raises(UsageError) as caught:
        pack(indices, bits)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("width, bits, count", [(2, 3, 6), (2, 3, 2), (1, 3, -1), (1, 0, 3), (1, 9, 0)])
def test_unpack_refuses(width: int, bits: int, count: int) -> None:
    with pytest.raises(UsageError):
        unpack(np.zeros((1, width), dtype=np.uint8), bits, count)
