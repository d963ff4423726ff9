"""A call of an operator in torch's graph, as the functions that translate it see it."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from cbpq.exports.c.operations import Shape
from cbpq.fileformat import ConstrainedTensor


class Unsupported(Exception):
    """A use of an operator that has no kernel; the message says which."""


@dataclass(frozen=True)
class Constrained:
    """A constrained weight where torch has a float tensor."""

    name: str
    tensor: ConstrainedTensor


@dataclass(frozen=True)
class Call:
    """An operator in the graph: the output's name and shape, its arguments by name, and which of them are values."""

    output: str
    where: str
    target: Any
    arguments: dict[str, Any]
    inputs: list[str]
    shape: Shape
    shapes: dict[str, Shape]

    def value(self, name: str) -> str:
        """The argument ``name``, which has to be computed from the picture."""
        value = self.arguments[name]
        if not isinstance(value, str):
            raise Unsupported(f"its {name} is no picture's")
        return value

    def constant(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """The argument ``name``, which has to be a tensor of the network's own, or None."""
        value = self.arguments[name]
        if value is None:
            return None
        if not isinstance(value, Tensor):
            what = f"the constrained weight {value.name}" if isinstance(value, Constrained) else "computed"
            raise Unsupported(f"its {name} is {what}, and has to be a constant")
        return value.double().numpy()

    @property
    def count(self) -> int:
        """How many numbers the output has."""
        return prod(self.shape)


def pair(values: Any) -> tuple[int, int]:
    """One number for both axes, or one for each."""
    values = [values] if isinstance(values, int) else list(values)
    first, last = values[0], values[-1]
    return int(first), int(last)
