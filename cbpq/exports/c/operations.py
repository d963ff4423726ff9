"""A network as a short list of steps, each of which is one call of a kernel in C.

Values are named; their shapes have the batch axis in front, which is 1. A picture's values are in the order (C, H, W).
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbpq.fileformat import ConstrainedTensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """What all steps have: the values read, the value written, and what it is in the network, for people."""

    inputs: tuple[str, ...]
    output: str
    where: str


@dataclass(frozen=True)
class Geometry:
    """Shape of a convolution; a linear layer is one of 1 × 1 pixel. Pairs are (height, width)."""

    groups: int
    inputs: int  #: channels of one group
    outputs: int  #: channels of one group
    size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)  #: at the top and at the left
    dilation: tuple[int, int] = (1, 1)

    def fields(self) -> list[tuple[str, int]]:
        """The structure ``convolution`` of the C code: these numbers and the products that its loops add."""
        (height, width), (down, across), (below, right) = self.size, self.stride, self.dilation
        return [
            ("groups", self.groups),
            ("inputs", self.inputs),
            ("outputs", self.outputs),
            ("height", height),
            ("width", width),
            ("plane", height * width),
            ("group_values", self.inputs * height * width),
            ("out_height", self.out_size[0]),
            ("out_width", self.out_size[1]),
            ("kernel_height", self.kernel[0]),
            ("kernel_width", self.kernel[1]),
            ("top", -self.padding[0]),
            ("top_value", -self.padding[0] * width),
            ("left", -self.padding[1]),
            ("down", down),
            ("down_values", down * width),
            ("across", across),
            ("below", below),
            ("below_values", below * width),
            ("right", right),
        ]


@dataclass(frozen=True, eq=False)
class Layer(Operation):
    """out[c] = scale[c] · Σ weight · in + bias[c], where the BatchNorms behind it are already in scale and bias.

    ``weight`` holds the integer codes of a constrained layer, whose scale (a / denominator) is in ``scale``, or the
    floats of another.
    """

    geometry: Geometry
    name: str  #: of the weight in the state dict
    weight: NDArray[Any]  #: (C_out, C_in / groups, kernel height, kernel width)
    tensor: ConstrainedTensor | None  #: None for a layer that stayed float
    scale: NDArray[np.float64]  #: (C_out,)
    bias: NDArray[np.float64]  #: (C_out,)


@dataclass(frozen=True, eq=False)
class Affine(Operation):
    """out[c] = scale[c] · in[c] + bias[c], where each channel has ``count`` values."""

    scale: NDArray[np.float64]  #: (C,)
    bias: NDArray[np.float64]  #: (C,)
    count: int


@dataclass(frozen=True)
class Unary(Operation):
    """A function of each value by itself: ``clamp`` has the numbers low and high, ``leaky_relu`` its slope."""

    function: str
    numbers: tuple[float, ...]
    count: int


@dataclass(frozen=True)
class Binary(Operation):
    """``add`` or ``multiply`` of two values; each value of the second serves ``repeat`` of the first."""

    function: str
    count: int
    repeat: int


@dataclass(frozen=True)
class Window:
    """Of an output row (or column) of a pooling: input rows ``start`` to ``end`` − 1, averaged as if ``count``."""

    start: int
    end: int
    count: int


@dataclass(frozen=True)
class Pool(Operation):
    """The maximum or the average of every window."""

    function: str  #: max or average
    channels: int
    size: tuple[int, int]
    rows: tuple[Window, ...]
    columns: tuple[Window, ...]


@dataclass(frozen=True)
class Mean(Operation):
    """The mean over the middle axis of (outer, count, inner)."""

    outer: int
    count: int
    inner: int


@dataclass(frozen=True)
class Softmax(Mean):
    """exp(x) / Σ exp(x) along the middle axis of (outer, count, inner)."""


@dataclass(frozen=True)
class Piece:
    """Values of ``inputs[source]`` that go to the output, in four nested loops of ``sizes``."""

    source: int
    offset: int
    out_offset: int
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    out_steps: tuple[int, ...]


@dataclass(frozen=True)
class Copy(Operation):
    """Slices, transpositions, concatenations and paddings: pieces are copied; ``clear``: what they leave is zero."""

    pieces: tuple[Piece, ...]
    clear: bool


@dataclass(frozen=True)
class View(Operation):
    """The same values in the same order under another shape: nothing to do."""


@dataclass(frozen=True)
class Network:
    """The whole: ``operations`` in order, from the value ``input`` to the value ``output``."""

    operations: tuple[Operation, ...]
    shapes: dict[str, Shape]
    input: str
    output: str

    def size(self, value: str) -> int:
        """How many numbers a value has."""
        return prod(self.shapes[value])

    def uses(self, value: str) -> int:
        """How many operations read a value, the end of the network counted as one more."""
        return sum(value in operation.inputs for operation in self.operations) + (value == self.output)
