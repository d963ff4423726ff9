import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cbpq.errors import UsageError
from cbpq.packing import Word, bits_for, check_packing, dense_word, in_range, pack, unpack, word_for, word_of_bits

THREE, DENSE = word_of_bits(3), Word(3, 5, 1)


def scalar_pack(indices: list[list[int]], bits: int) -> list[bytes]:
    """One integer per row, index i worth 2**(i·bits): its little-endian bytes are the packed row."""
    rows = []
    for row in indices:
        number = sum(index << (position * bits) for position, index in enumerate(row))
        rows.append(number.to_bytes(-(-len(row) * bits // 8), "little"))
    return rows


def scalar_dense(indices: list[list[int]], levels: int, digits: int, width: int) -> list[bytes]:
    """The words of each row, one Python integer after the other, as the file's text says."""
    rows = []
    for row in indices:
        parts = [row[start : start + digits] for start in range(0, len(row), digits)]
        packed = b""
        for part in parts:
            fewest = next(size for size in range(9) if levels ** len(part) <= 256**size)
            word = sum(index * levels**place for place, index in enumerate(part))
            packed += word.to_bytes(width if len(part) == digits else fewest, "little")
        rows.append(packed)
    return rows


def best_words(levels: int) -> tuple[int, int]:
    """(k, B) by trying everything."""
    found = []
    for width in (1, 2, 3, 4):
        digits = max(k for k in range(1, 33) if levels**k <= 256**width)
        found.append((Fraction(width, digits), width, digits))
    _, width, digits = min(found)
    return digits, width


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
    packed = pack(np.array(indices, dtype=np.uint8), word_of_bits(bits))
    assert packed.dtype == np.uint8
    assert packed.tolist() == expected
    assert unpack(packed, word_of_bits(bits), len(indices[0])).tolist() == indices


@given(rows=st.integers(1, 5), count=st.integers(0, 40), bits=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_agrees_with_scalar_packing_and_comes_back(rows: int, count: int, bits: int, seed: int) -> None:
    generator = random.Random(seed)
    indices = [[generator.randrange(2**bits) for _ in range(count)] for _ in range(rows)]
    array = np.array(indices, dtype=np.uint8).reshape(rows, count)
    word = word_of_bits(bits)
    packed = pack(array, word)
    assert packed.shape == (rows, -(-count * bits // 8))
    assert [row.tobytes() for row in packed] == scalar_pack(indices, bits)
    assert in_range(packed, word, count)
    back = unpack(packed, word, count)
    assert back.dtype == np.uint8
    assert np.array_equal(back, array)


@given(levels=st.integers(2, 256), rows=st.integers(1, 4), count=st.integers(0, 50), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_dense_agrees_with_scalar_packing_and_comes_back(levels: int, rows: int, count: int, seed: int) -> None:
    digits, width = best_words(levels)
    word = word_for(levels, "dense")
    if 8 * width >= bits_for(levels) * digits:
        assert dense_word(levels) is None
        assert word == word_of_bits(bits_for(levels))
        return
    assert word == dense_word(levels) == Word(levels, digits, width)
    generator = random.Random(seed)
    indices = [
        [generator.choice([0, levels - 1, generator.randrange(levels)]) for _ in range(count)] for _ in range(rows)
    ]
    packed = pack(np.array(indices, dtype=np.uint8).reshape(rows, count), word)
    assert [row.tobytes() for row in packed] == scalar_dense(indices, levels, digits, width)
    assert packed.shape == (rows, word.row_bytes(count))
    assert packed.shape[1] <= -(-count * bits_for(levels) // 8)  # never more than by bits
    assert in_range(packed, word, count)
    assert unpack(packed, word, count).tolist() == indices


@pytest.mark.parametrize(
    "levels, digits, width", [(3, 5, 1), (5, 10, 3), (6, 3, 1), (7, 11, 4), (9, 5, 2), (17, 7, 4), (200, None, None)]
)
def test_dense_words(levels: int, digits: int | None, width: int | None) -> None:
    assert dense_word(levels) == (Word(levels, digits, width) if digits and width else None)


@pytest.mark.parametrize("levels", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_powers_of_two_gain_nothing_densely(levels: int) -> None:
    assert dense_word(levels) is None
    assert word_for(levels, "dense") == word_for(levels, "bits") == word_of_bits(bits_for(levels))


def test_words_of_bits_fill_bytes() -> None:
    for bits in range(1, 9):
        word = word_of_bits(bits)
        assert (word.base, word.digits * bits) == (2**bits, 8 * word.width)
        assert word.digits <= 8


def test_unknown_packing() -> None:
    check_packing("dense")
    with pytest.raises(UsageError, match="did you mean 'dense'"):
        word_for(3, "dens")


@pytest.mark.parametrize("word", [THREE, DENSE, Word(5, 10, 3)])
def test_strided_input(word: Word) -> None:
    array = np.arange(132, dtype=np.uint8).reshape(12, 11) % word.base
    assert np.array_equal(pack(array.T[::2], word), pack(np.ascontiguousarray(array.T[::2]), word))
    doubled = np.repeat(pack(array, word), 2, axis=0)
    assert np.array_equal(unpack(doubled[::2], word, 11), array)


@pytest.mark.parametrize("bit", range(16))
def test_padding_bits_are_seen(bit: int) -> None:
    packed = np.zeros((2, 2), dtype=np.uint8)
    packed[1, bit // 8] = 1 << bit % 8
    assert in_range(packed, THREE, 3) is (bit < 9)


def test_padding_without_spare_bits() -> None:
    assert in_range(np.full((1, 3), 255, dtype=np.uint8), THREE, 8)
    assert in_range(np.zeros((1, 0), dtype=np.uint8), THREE, 0)


@pytest.mark.parametrize("place", range(3))
def test_words_that_are_too_large_are_seen(place: int) -> None:
    """Two words of five ternary digits and one of two: below 243, 243 and 9."""
    limits = [243, 243, 9]
    packed = np.array([[0, 0, 0], [242, 242, 8]], dtype=np.uint8)
    assert in_range(packed, DENSE, 12)
    packed[0, place] = limits[place]
    assert not in_range(packed, DENSE, 12)


@pytest.mark.parametrize(
    "indices, word",
    [
        (np.array([[0, 2]], dtype=np.uint8), word_of_bits(1)),
        (np.array([[8]], dtype=np.uint8), THREE),
        (np.array([[3]], dtype=np.uint8), DENSE),
        (np.array([1, 2], dtype=np.uint8), THREE),
        (np.array([[1]], dtype=np.int64), THREE),
    ],
)
def test_pack_refuses(indices: NDArray[np.uint8], word: Word) -> None:
    with pytest.raises(UsageError) as caught:
        pack(indices, word)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_that_no_index_has(bits: int) -> None:
    with pytest.raises(UsageError, match="1 to 8 bits"):
        word_of_bits(bits)


@pytest.mark.parametrize("width, word, count", [(2, THREE, 6), (2, THREE, 2), (1, THREE, -1), (2, DENSE, 5)])
def test_unpack_refuses(width: int, word: Word, count: int) -> None:
    for function in (unpack, in_range):
        with pytest.raises(UsageError):
            function(np.zeros((1, width), dtype=np.uint8), word, count)
