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
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import lcm

import torch
from torch import Tensor

from cbpq.errors import UsageError, did_you_mean
from cbpq.fused import fused

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


def _staircase(values: Tensor, start: float, steps: Iterable[tuple[float | Tensor, float]]) -> Tensor:
    """``start``, and on top of it the rise of every (edge, rise) whose edge a value has reached.

    The same by searching, looking up or masking takes a CPU several times as long: these two it does with many values
    at once.
    """
    height = torch.full_like(values, start)
    reached = torch.empty_like(values)
    for edge, rise in steps:
        height.add_(torch.ge(values, edge, out=reached), alpha=rise)
    return height


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
        scaled = torch.tensor(levels.codes, dtype=scale.dtype) / levels.denominator
        self._midpoints = ((scaled[:-1] + scaled[1:]) / 2).unbind()
        # In codes: how wide the gaps are, and where that changes. Beyond the outer levels it counts as 0.
        self._gaps = [above - below for below, above in pairwise(levels.codes)]
        changes = [after - before for before, after in pairwise([0, *self._gaps, 0])]
        self._gap_changes = [(code, change) for code, change in zip(levels.codes, changes, strict=True) if change]

    def index(self, weight: Tensor) -> Tensor:
        """Number of the nearest level, int32 in the weight's shape. On a midpoint the upper level is taken."""
        ratio = weight / self.scale
        if len(self._midpoints) > FEW:
            midpoints = torch.stack(self._midpoints).to(ratio)
            # contiguous: else torch warns where the network is in channels_last
            return torch.bucketize(ratio.contiguous(), midpoints, right=True, out_int32=True)
        return _staircase(ratio, 0, ((midpoint, 1) for midpoint in self._midpoints)).int()

    def _code(self, weight: Tensor) -> Tensor:
        """Code of the nearest level, as a real number."""
        if len(self._midpoints) > FEW:
            index = self.index(weight)
            codes = torch.tensor(self.level_set.codes, dtype=self.scale.dtype, device=weight.device)
            return codes.index_select(0, index.flatten()).view(index.shape)
        rises = zip(self._midpoints, self._gaps, strict=True)
        return _staircase(weight / self.scale, self.level_set.codes[0], rises)

    def codes(self, weight: Tensor) -> Tensor:
        """Integer code of the nearest level, int32 in the weight's shape."""
        return self._code(weight).int()

    def level(self, weight: Tensor) -> Tensor:
        """Nearest level before scaling, q in the weight's shape."""
        return self._code(weight).div_(self.level_set.denominator)

    @fused
    def nearest(self, weight: Tensor) -> Tensor:
        """Nearest allowed weight, code × (a / denominator)."""
        return self._code(weight).mul_(self._unit())

    def _unit(self) -> Tensor:
        """What a code counts."""
        return self.scale / self.level_set.denominator

    def distance(self, weight: Tensor) -> Tensor:
        """Y(w) = 2 |w − nearest(w)|, the penalty without a window. Its mean over all constrained weights is the CFS."""
        return (weight - self.nearest(weight)).abs_().mul_(2)

    def limits(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest allowed weight, each in the scale's shape."""
        unit = self._unit()
        return self.level_set.codes[0] * unit, self.level_set.codes[-1] * unit

    def gap(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The two neighbouring levels that a weight lies between, as the lower one and the distance to the other; for
        a weight beyond the outer levels, the two that are nearest to it.
        """
        codes, unit = self.level_set.codes, self._unit()
        inner = codes[1:-1]
        lower = _staircase(weight, codes[0], ((c * unit, gap) for c, gap in zip(inner, self._gaps, strict=False)))
        changes = ((c * unit, change) for c, change in self._gap_changes if c in inner)
        return lower.mul_(unit), _staircase(weight, self._gaps[0], changes).mul_(unit)

    def penalty(self, weight: Tensor, window: float, nearest: Tensor | None = None) -> Tensor:
        """cs(w): Y(w), but 0 while w is in the unconstrained window. The arguments are those of ``slope``."""
        residual, bound = self._residual(weight, window, nearest)
        return residual.abs_().mul_(bound).mul_(2)

    def slope(self, weight: Tensor, window: float, nearest: Tensor | None = None) -> Tensor:
        """d cs / dw: ±2 away from the nearest level; 0 in the unconstrained window and on a level.

        Args:
            weight: any shape that the scale fits.
            window: ``g``, at least 1; infinity closes it.
            nearest: the nearest allowed weight, where it is at hand; it is computed otherwise.
        """
        residual, bound = self._residual(weight, window, nearest)
        return residual.sign_().mul_(bound).mul_(2)

    def _residual(self, weight: Tensor, window: float, nearest: Tensor | None) -> tuple[Tensor, Tensor]:
        """w − nearest, and 1 where the constraint binds, 0 where w is in the unconstrained window."""
        unit = self._unit()
        residual = weight - (self.nearest(weight) if nearest is None else nearest)
        edges = ((code * unit, change) for code, change in self._gap_changes)
        half_gap = _staircase(weight, 0, edges).mul_(unit / 2)
        # free where |w − m_i| < gap/(2g); and |w − m_i| = |gap/2 − |w − nearest||
        to_middle = residual.abs().sub_(half_gap).abs_()
        return residual, to_middle.ge_(half_gap.div_(window))
