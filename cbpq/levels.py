"""Which values a weight may take: level sets, and everything a method may ask about them.

A level set is a short ascending row of integer *codes* over one denominator: level = code / denominator. Times a scale
``a`` it becomes the grid on which a weight tensor has to end: weight = code × (a / denominator), in float32 and in
exactly this order, so that a file decodes to the very bits the network was trained with.

======================  =======================  ====================
symbol                  here                     meaning
======================  =======================  ====================
q_1 < … < q_n           ``LevelSet.levels``      the levels, before scaling
a                       ``Grid.scale``           scale, shape () or (C, 1, …)
m_i = (q_i+q_{i+1})/2   ``Grid._midpoints``      where the nearest level changes
Y(w)                    ``Grid.distance``        twice the distance to the nearest level
g                       ``window``               the middle 1/g of every gap is free
cs(w)                   ``Grid.penalty``         Y outside the free window, 0 inside it
======================  =======================  ====================

Source: Kim & Jeong, NeurIPS 2021, arXiv 2110.02550 (there, Y is written piece by piece; between two levels it is the
tent ``(q_{i+1} − q_i) − 2|w − m_i|``, outside them a ramp, which together is 2|w − nearest|).
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import torch
from torch import Tensor

from cbpq.errors import UsageError, did_you_mean

MAX_LEVELS = 256  # a code's index is one byte in the file
MAX_SHIFT = 10
FEW = 16


@dataclass(frozen=True)
class LevelSet:
    """The allowed values of a weight before scaling.

    Attributes:
        name: as the user writes it, for example ``two-bit-shift``.
        codes: integers, ascending.
        denominator: level = code / denominator.
    """

    name: str
    codes: tuple[int, ...]
    denominator: int

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels q, ascending."""
        return tuple(code / self.denominator for code in self.codes)


def shift_levels(shifts: int, name: str | None = None) -> LevelSet:
    """Zero and ± the powers of two from 2^-shifts to 1: a product with a weight is a shift of the other factor."""
    powers = [2**k for k in range(shifts + 1)]
    return LevelSet(name or f"shift:{shifts}", (*(-p for p in reversed(powers)), 0, *powers), 2**shifts)


CONSTRAINTS = {
    "binary": LevelSet("binary", (-1, 1), 1),
    "ternary": LevelSet("ternary", (-1, 0, 1), 1),
    "one-bit-shift": shift_levels(1, "one-bit-shift"),
    "two-bit-shift": shift_levels(2, "two-bit-shift"),
}
ALIASES = {"bin": "binary", "ter": "ternary", "1bit": "one-bit-shift", "2bit": "two-bit-shift"}
FAMILIES = ("shift:K", "levels:Q,Q,…")


def level_set(constraint: str | LevelSet) -> LevelSet:
    """The level set a name stands for.

    ``shift:K`` is {0, ±2^-K, …, ±½, ±1}; ``levels:-1,-0.3,0.3,1`` or ``levels:-1,1/3,1`` are levels of your own.

    Raises:
        UsageError: no such constraint, or one that makes no sense (fewer than two levels, all of them zero …).
    """
    if isinstance(constraint, LevelSet):
        return constraint
    name = ALIASES.get(constraint, constraint)
    if name in CONSTRAINTS:
        return CONSTRAINTS[name]
    family, _, argument = name.partition(":")
    if family == "shift" and argument:
        if not argument.isdecimal() or len(argument) > 2 or not 1 <= int(argument) <= MAX_SHIFT:
            raise UsageError(f"constraint {name!r}: K in shift:K is a whole number from 1 to {MAX_SHIFT}")
        return shift_levels(int(argument))
    if family == "levels" and argument:
        return _parse_levels(name, argument)
    known = [*CONSTRAINTS, *ALIASES]
    raise UsageError(
        f"unknown constraint {constraint!r}{did_you_mean(constraint, known)}; "
        f"known are {', '.join([*CONSTRAINTS, *FAMILIES])}"
    )


def _parse_levels(name: str, argument: str) -> LevelSet:
    if re.search(r"e[+-]?\d{3}", argument, re.IGNORECASE):  # Fraction would write out all those digits
        raise UsageError(f"constraint {name!r}: these levels are too large or too small; they are scaled anyway")
    try:
        values = [Fraction(part.strip()) for part in argument.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"constraint {name!r}: write levels as numbers with commas, as in levels:-1,0,1") from error
    if len(set(values)) != len(values) or not 2 <= len(values) <= MAX_LEVELS:
        raise UsageError(f"constraint {name!r}: two to {MAX_LEVELS} different levels are needed")
    denominator = lcm(*(value.denominator for value in values))
    codes = tuple(sorted(int(value * denominator) for value in values))
    # float32 holds integers exactly up to 2^24; beyond that a code would not survive decoding.
    if max(map(abs, codes)) >= 2**24 or denominator >= 2**24:
        raise UsageError(f"constraint {name!r}: these levels have no common denominator below 2^24; round them")
    return LevelSet(name, codes, denominator)


def total(values: Tensor) -> float:
    """Σ values, in float64 where the device has it: a sum over millions of weights should not depend on their order."""
    return float(values.sum(dtype=torch.float32 if values.device.type == "mps" else torch.float64))


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]``, by the quicker of PyTorch's two ways."""
    return table.index_select(0, index.flatten()).view(index.shape)


class Grid:
    """The levels of one weight tensor: a level set times a scale. All that methods know of a constraint.

    Args:
        levels: the level set.
        scale: positive, shape () for a whole layer or (C, 1, …) per output channel; kept by reference, so a learned
            scale moves the grid.
    """

    def __init__(self, levels: LevelSet, scale: Tensor) -> None:
        self.level_set = levels
        self.scale = scale
        codes = torch.tensor(levels.codes, dtype=scale.dtype, device=scale.device)
        self._codes = codes
        self._levels = codes / levels.denominator
        self._midpoints = (self._levels[:-1] + self._levels[1:]) / 2
        gaps = self._levels.diff()
        endless = torch.full_like(gaps[:1], float("inf"))  # beyond the outer levels there is no gap, hence no window
        self._gap_below = torch.cat([endless, gaps])
        self._gap_above = torch.cat([gaps, endless])

    def index(self, weight: Tensor) -> Tensor:
        """Number of the nearest level, int32 in the weight's shape. On a midpoint the upper level is taken."""
        ratio = weight / self.scale
        if len(self._midpoints) > FEW:
            # contiguous: else torch warns where the network is in channels_last
            return torch.bucketize(ratio.contiguous(), self._midpoints, right=True, out_int32=True)
        # The same by counting the midpoints passed, which is quicker than a search for so few.
        passed = torch.zeros_like(ratio, dtype=torch.int8)
        for midpoint in self._midpoints.tolist():
            passed += (ratio >= midpoint).view(torch.int8)
        return passed.int()

    def codes(self, weight: Tensor) -> Tensor:
        """Integer code of the nearest level, int32 in the weight's shape."""
        table = torch.tensor(self.level_set.codes, dtype=torch.int32, device=weight.device)
        return _look_up(table, self.index(weight))

    def level(self, weight: Tensor) -> Tensor:
        """Nearest level before scaling, q in the weight's shape: the constrained weight's derivative by its scale."""
        return _look_up(self._levels, self.index(weight))

    def nearest(self, weight: Tensor) -> Tensor:
        """Nearest allowed weight, code × (a / denominator)."""
        return _look_up(self._codes, self.index(weight)) * (self.scale / self.level_set.denominator)

    def distance(self, weight: Tensor) -> Tensor:
        """Y(w) = 2 |w − nearest(w)|, the penalty without a window. Its mean over all constrained weights is the CFS."""
        return (weight - self.nearest(weight)).abs_().mul_(2)

    def limits(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest allowed weight, each in the scale's shape."""
        unit = self.scale / self.level_set.denominator
        return self._codes[0] * unit, self._codes[-1] * unit

    def gap(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The two neighbouring levels that a weight lies between, as the lower one and the distance to the other; for
        a weight beyond the outer levels, the two that are nearest to it.
        """
        index = self.index(weight)
        unit = self.scale / self.level_set.denominator
        index -= (weight < _look_up(self._codes, index) * unit).int()
        index.clamp_(0, len(self._codes) - 2)
        return _look_up(self._codes, index) * unit, _look_up(self._gap_above, index) * self.scale

    def penalty(self, weight: Tensor, window: float) -> Tensor:
        """cs(w): Y(w), but 0 while w is in the unconstrained window."""
        return self.penalty_and_slope(weight, window)[0]

    def slope(self, weight: Tensor, window: float) -> Tensor:
        """d cs / dw: ±2 away from the nearest level; 0 in the unconstrained window and on a level."""
        return self.penalty_and_slope(weight, window)[1]

    def penalty_and_slope(self, weight: Tensor, window: float) -> tuple[Tensor, Tensor]:
        """Both at once: cs(w) and its slope for the window ``g`` (at least 1; infinity closes it)."""
        index = self.index(weight)
        residual = weight - _look_up(self._codes, index) * (self.scale / self.level_set.denominator)
        gap = torch.where(residual > 0, _look_up(self._gap_above, index), _look_up(self._gap_below, index))
        half_gap = gap * (self.scale / 2)
        # free where |w − m_i| < gap/(2g); and |w − m_i| = |gap/2 − |w − nearest||
        free = (half_gap - residual.abs()).abs_() < half_gap / window
        pull = residual.sign().mul_(2).masked_fill_(free, 0)
        return residual.mul_(pull), pull
