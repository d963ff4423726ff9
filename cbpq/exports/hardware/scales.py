"""What it would cost to have powers of two for scales, which are shifts."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbpq.fileformat import ConstrainedTensor


@dataclass(frozen=True)
class PowerScale:
    """The scales of one layer and the powers of two nearest to them.

    Attributes:
        scales: how many there are: one, or one per output channel.
        scale_min: the smallest.
        scale_max: the largest.
        exponent_min: a sum of codes times inputs is to be multiplied by scale / denominator; the exponent of the power
            of two nearest to the smallest of these that is not 0 (None if all are).
        exponent_max: to the largest.
        power_error: ‖w′ − w‖ / ‖w‖ with w the layer's weights and w′ those on the powers of two.
    """

    scales: int
    scale_min: float
    scale_max: float
    exponent_min: int | None
    exponent_max: int | None
    power_error: float


def power_scale(tensor: ConstrainedTensor) -> PowerScale:
    """The scales of ``tensor``."""
    exponents = nearest_exponents(tensor.step)[tensor.step > 0]
    weight, rounded = (part.weight().astype(np.float64) for part in (tensor, on_powers(tensor)))
    size = float(np.linalg.norm(weight))
    return PowerScale(
        scales=tensor.scale.size,
        scale_min=float(tensor.scale.min()),
        scale_max=float(tensor.scale.max()),
        exponent_min=int(exponents.min()) if exponents.size else None,
        exponent_max=int(exponents.max()) if exponents.size else None,
        power_error=float(np.linalg.norm(rounded - weight)) / size if size else 0.0,
    )


def on_powers(tensor: ConstrainedTensor) -> ConstrainedTensor:
    """``tensor`` with each scale such that scale / denominator is the nearest power of two; 0 stays 0."""
    powers = np.where(tensor.step > 0, np.ldexp(1.0, nearest_exponents(tensor.step)), 0.0)
    with np.errstate(over="ignore"):  # the power above the largest float
        return replace(tensor, scale=np.asarray(powers * tensor.denominator, dtype=np.float32))


def nearest_exponents(values: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """k such that 2^k is nearest to each positive value, by difference and so with the least error of the weights; of
    two that are equally near, the lower. For 0 it means nothing.
    """
    fractions, exponents = np.frexp(np.asarray(values, dtype=np.float64))
    return np.asarray(exponents - (fractions <= 0.75), dtype=np.int64)
