"""How many bits values and sums need."""

import math

import numpy as np

from cbpq.fileformat import ConstrainedTensor

INPUT_BITS = 8  # of the integer inputs that accumulators are sized for


def signed_bits(low: int, high: int) -> int:
    """The bits of a two's complement number that holds every integer from ``low`` to ``high``, and 0."""
    return 1 + max((-low - 1).bit_length() if low < 0 else 0, max(high, 0).bit_length())


def accumulator_bits(tensor: ConstrainedTensor, input_bits: int = INPUT_BITS) -> int:
    """The bits that no sum of codes times inputs can exceed, whatever the inputs and in whatever order it is formed.

    The inputs are two's complement integers of ``input_bits``; of all output channels the widest counts. It is the
    least such number: some inputs need it. For unsigned inputs of as many bits, one bit more is enough: with P and N
    the sums of the positive codes and of the negative ones' magnitudes, 255 P < 2 (128 P + 127 N), and so for N.
    """
    codes = tensor.codes.reshape(len(tensor.codes), -1).astype(np.int64)
    positive, negative = np.maximum(codes, 0).sum(axis=1), np.maximum(-codes, 0).sum(axis=1)
    most, least = 2 ** (input_bits - 1) - 1, 2 ** (input_bits - 1)  # magnitudes
    high, low = positive * most + negative * least, positive * least + negative * most
    return signed_bits(-int(low.max()), int(high.max()))


def integer_bits(low: float, high: float) -> int:
    """The bits before the binary point, sign apart, of fixed-point numbers from ``low`` to ``high``: the least i with
    −2^i ≤ low and high < 2^i, which is negative for small numbers; 0 if both are 0.
    """
    needed = []
    if high > 0:
        needed.append(math.frexp(high)[1])
    if low < 0:
        fraction, exponent = math.frexp(-low)
        needed.append(exponent - (fraction == 0.5))
    return max(needed, default=0)
