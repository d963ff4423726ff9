"""What a cbpq file holds: constrained weights, as integers or as the file's bytes, and all that is beside them."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbpq.packing import Word, bits_for, check_packing, dense_word, unpack, word_for


@dataclass(frozen=True, eq=False)
class ConstrainedTensor:
    """One constrained weight. Shapes: ``codes`` as the weight, output channels (C) first; ``scale`` () or (C,)."""

    codes: NDArray[np.signedinteger[Any]]  #: read from a file: int8 where the levels fit, else int32
    scale: NDArray[np.float32]
    levels: tuple[int, ...]  #: the codes that may occur, ascending
    denominator: int
    constraint: str
    packing: str = "bits"  #: how a file holds the codes: ``bits``, or ``dense`` where that takes less

    def weight(self) -> NDArray[np.float32]:
        """The constrained weight, code · (scale / denominator) in float32, in the shape of ``codes``."""
        step = self.step
        if self.scale.ndim:
            step = step.reshape(-1, *[1] * (self.codes.ndim - 1))
        return np.asarray(self.codes.astype(np.float32) * step)

    @property
    def step(self) -> NDArray[np.float32]:
        """What 1 is worth in the codes, of shape () or (C,)."""
        return step_of(self.scale, self.denominator)

    def packed_as(self, packing: str) -> "ConstrainedTensor":
        """The same weight in another packing of ``cbpq.packing.PACKINGS``; dense only where that takes less.

        Raises:
            UsageError: no such packing.
        """
        check_packing(packing)
        return dataclasses.replace(self, packing=packing if dense_word(len(self.levels)) else "bits")

    @property
    def bits(self) -> int:
        """Bits of an index into the levels: what one weight takes in the file if it is packed by bits."""
        return bits_for(len(self.levels))

    @property
    def word(self) -> Word:
        """The words of the packed codes."""
        return word_for(len(self.levels), self.packing)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed codes, padding included, without the scale."""
        return len(self.codes) * self.word.row_bytes(self.codes[0].size)

    @property
    def histogram(self) -> tuple[int, ...]:
        """How many weights have each level, in the order of ``levels``."""
        return tuple(int(np.count_nonzero(self.codes == level)) for level in self.levels)

    @property
    def terms(self) -> int:
        """How many powers of two the codes are sums of, all weights together: none for 0, one for −4, two for 3."""
        return sum(abs(level).bit_count() * count for level, count in zip(self.levels, self.histogram, strict=True))

    @property
    def sparsity(self) -> float:
        """Share of weights that are zero, 0 to 1."""
        return 1 - np.count_nonzero(self.codes) / self.codes.size

    @property
    def entropy(self) -> float:
        """Shannon entropy of the codes in bits per weight: what ideal compression of each code by itself would take."""
        shares = [count / self.codes.size for count in self.histogram if count]
        return abs(sum(share * math.log2(share) for share in shares))


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """One constrained weight as it is in the file: ``rows`` (C, bytes), the other fields as `ConstrainedTensor`'s."""

    rows: NDArray[np.uint8]
    shape: tuple[int, ...]  #: of the weight
    scale: NDArray[np.float32]
    levels: tuple[int, ...]
    denominator: int
    constraint: str
    packing: str

    @property
    def count(self) -> int:
        """Weights of an output channel."""
        return math.prod(self.shape[1:])

    @property
    def word(self) -> Word:
        """The words of the rows."""
        return word_for(len(self.levels), self.packing)

    def unpacked(self) -> ConstrainedTensor:
        """The weight with its codes as integers."""
        small = self.levels[0] >= -128 and self.levels[-1] <= 127
        table: NDArray[np.signedinteger[Any]] = np.array(self.levels, dtype=np.int8 if small else np.int32)
        codes = table[unpack(self.rows, self.word, self.count)].reshape(self.shape)
        return ConstrainedTensor(codes, self.scale, self.levels, self.denominator, self.constraint, self.packing)


def step_of(scale: NDArray[np.float32], denominator: int) -> NDArray[np.float32]:
    """What an integer code counts: scale / denominator, in float32."""
    return np.asarray(scale / np.float32(denominator))


@dataclass(frozen=True, eq=False)
class CbpqFile:
    """The content of a cbpq file. The JSON objects hold nothing that differs between equal runs: no times, no paths."""

    constrained: dict[str, ConstrainedTensor]  #: by state-dict name
    others: dict[str, NDArray[Any]]  #: every other entry of the state dict, float32 perhaps as float16
    source: dict[str, Any]
    run: dict[str, Any]
    metrics: dict[str, Any]

    def state(self) -> dict[str, NDArray[Any]]:
        """The network's state dict: constrained weights decoded, half precision widened to float32."""
        others = {name: array.astype(np.float32) if _is(array, 16) else array for name, array in self.others.items()}
        return others | {name: tensor.weight() for name, tensor in self.constrained.items()}

    @property
    def float32_bytes(self) -> int:
        """Bytes of the network's state dict, with constrained weights and half precision as float32."""
        constrained = sum(4 * tensor.codes.size for tensor in self.constrained.values())
        others = sum(array.nbytes * (2 if _is(array, 16) else 1) for array in self.others.values())
        return int(constrained + others)

    def packed_as(self, packing: str) -> "CbpqFile":
        """The same content with its weights in another packing, see ``ConstrainedTensor.packed_as``."""
        packed = {name: tensor.packed_as(packing) for name, tensor in self.constrained.items()}
        return dataclasses.replace(self, constrained=packed)

    def halved(self) -> "CbpqFile":
        """The same content with the tensors that stay float in half precision, scales not; see `halved`."""
        return dataclasses.replace(self, others={name: halved(array) for name, array in self.others.items()})


@dataclass(frozen=True, eq=False)
class PackedFile:
    """The content of a cbpq file with its constrained weights as they are in the file; see `CbpqFile`."""

    constrained: dict[str, PackedTensor]
    others: dict[str, NDArray[Any]]
    source: dict[str, Any]
    run: dict[str, Any]
    metrics: dict[str, Any]

    def unpacked(self) -> CbpqFile:
        """The content with all codes as integers."""
        constrained = {name: tensor.unpacked() for name, tensor in self.constrained.items()}
        return CbpqFile(constrained, self.others, self.source, self.run, self.metrics)


def halved(array: NDArray[Any]) -> NDArray[Any]:
    """float32 as float16, each value rounded to the nearest; left as it is if one is beyond float16's range (65504).

    Other types are left as they are.
    """
    if not _is(array, 32):
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.isfinite(half).all() else array


def _is(array: NDArray[Any], bits: int) -> bool:
    """Whether these are floats of so many bits."""
    return array.dtype.kind == "f" and 8 * array.dtype.itemsize == bits
