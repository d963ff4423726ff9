"""How much a layer computes for one picture."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod

from cbpq.exports.hardware.layers import Layer


@dataclass(frozen=True)
class Work:
    """Counts for one picture, the padding of convolutions counted as if it were inside, biases left out.

    Attributes:
        weights: how many there are.
        outputs: values that come out; each is multiplied by a scale once.
        macs: products of an input with a weight, zeros included.
        products: those that need a multiplier, since the weight stayed float.
        additions: an input is added or subtracted once for each power of two that a code is a sum of: once for the
            codes 1, −2 and 4, twice for 3 = 2 + 1, never for 0. As the export format c counts them.
        shifts: additions whose input is shifted first: those of any power of two but 1.
        doublings: what replaces the shifts where inputs are summed by power of two: from the highest power on, the sum
            is doubled, once per output and power but the last, and added to the next.
        zero_weights: weights that are zero.
        skipped_macs: products with these.
    """

    weights: int = 0
    outputs: int = 0
    macs: int = 0
    products: int = 0
    additions: int = 0
    shifts: int = 0
    doublings: int = 0
    zero_weights: int = 0
    skipped_macs: int = 0


def work(layer: Layer) -> Work:
    """What ``layer`` does."""
    weights, outputs = prod(layer.shape), layer.outputs
    positions = outputs // layer.shape[0]
    if (tensor := layer.tensor) is None:
        return Work(weights, outputs, weights * positions, weights * positions)
    counts = list(zip(map(abs, tensor.levels), tensor.histogram, strict=True))
    zeros = sum(count for level, count in counts if level == 0)
    return Work(
        weights=weights,
        outputs=outputs,
        macs=weights * positions,
        additions=tensor.terms * positions,
        shifts=sum((level >> 1).bit_count() * count for level, count in counts) * positions,
        doublings=(max(level for level, _ in counts).bit_length() - 1) * outputs,
        zero_weights=zeros,
        skipped_macs=zeros * positions,
    )


def total(parts: Iterable[Work]) -> Work:
    """The sum of all."""
    sums = asdict(Work())
    for part in parts:
        for name, value in asdict(part).items():
            sums[name] += value
    return Work(**sums)
