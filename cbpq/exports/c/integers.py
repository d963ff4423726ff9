"""Integer arithmetic in the generated code: int8 values, int32 sums, multipliers and shifts instead of floats.

A value v stands for v · scale, −127 ≤ v ≤ 127. Wherever a result is rounded, it is to the nearest integer, and from the
middle away from zero. A real factor m becomes M / 2^r with an integer |M| ≤ 2³⁰ of 30 significant bits.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cbpq.errors import CbpqError
from cbpq.exports.c.floats import Arrays, FloatArithmetic
from cbpq.exports.c.functions import FUNCTIONS
from cbpq.exports.c.operations import (
    Affine,
    Binary,
    Copy,
    Layer,
    Mean,
    Network,
    Operation,
    Pool,
    Softmax,
    Unary,
    View,
)
from cbpq.exports.c.text import kernel, literals, number, wrapped
from cbpq.inputs import InputSpec

MOST = 127
_BITS = 30  # of a multiplier
_MOST_SHIFT = 40
_SCORE_BITS = 15  # what the largest logit of the calibration takes
_MOST_SUM = 2**31 - 1


def away(values: Any) -> Any:
    """To the nearest integer, as float64, and from the middle away from zero."""
    array = np.asarray(values, dtype=np.float64)
    return np.copysign(np.floor(np.abs(array) + 0.5), array)


def factor(value: float, most_shift: int = _MOST_SHIFT) -> tuple[int, int]:
    """(M, r) with M / 2^r ≈ ``value``, where r is from 0 to ``most_shift``.

    Raises:
        CbpqError: ``value`` is too large.
    """
    shift = _BITS - int(np.frexp(value)[1]) if value else 0
    if shift < 0:
        raise CbpqError(f"a factor of {value:.3g} between the scales of two layers does not fit int8 activations")
    shift = min(shift, most_shift)
    return int(away(value * 2.0**shift)), shift


class Int8Arithmetic(FloatArithmetic):
    """Values are int8 and sums int32.

    Args:
        network: what is computed.
        ranges: the largest magnitude of each value on the calibration pictures.
        spec: tells how large the input may be.
    """

    types, value, result, bytes, output = "int8", "int8_t", "int32_t", 1, "scores"

    def __init__(self, network: Network, ranges: Mapping[str, float], spec: InputSpec) -> None:
        self._network, self._spec = network, spec
        bounds = [max(mean, 1 - mean) / std for mean, std in zip(spec.mean, spec.std, strict=True)]
        self.scales = _scales(network, {**ranges, network.input: max(bounds)})
        self.final = ""  # the value that is written as scores, if a layer makes it
        self.score_scale = self.scales[network.output]

    def direct(self, network: Network, maker: Operation) -> bool:
        """A layer's sums become scores of more bits than other values have; else the last values are the scores."""
        if not isinstance(maker, Layer | Affine):
            return False
        self.final, self.score_scale = maker.output, self.scales[network.output] * MOST / 2.0**_SCORE_BITS
        return True

    def finishing(self, layer: Layer | Affine) -> Arrays:
        """Multiplier, shift and bias per channel."""
        scale = layer.scale
        if isinstance(layer, Layer):
            weights = self.weights(layer) if layer.tensor is None else layer.weight
            magnitudes = np.abs(weights.astype(np.int64)).reshape(len(weights), -1).sum(axis=1)
            if magnitudes.max(initial=0) * MOST > _MOST_SUM:
                raise CbpqError(f"the sums of {layer.name} would not fit 32 bits; export with float activations")
            scale = scale if layer.tensor is not None else _steps(layer)
        out = self.score_scale if layer.output == self.final else self.scales[layer.output]
        numbers = []
        for factor_of, bias in zip(scale * self.scales[layer.inputs[0]] / out, layer.bias / out, strict=True):
            # |bias| · 2^r < 2^60, so that nothing overflows 64 bits
            multiplier, shift = factor(float(factor_of), min(_MOST_SHIFT, 60 - int(np.frexp(bias)[1])))
            if not multiplier:
                shift = 16  # a bias alone
            numbers.append((multiplier, shift, int(away(bias * 2.0**shift))))
        multipliers, shifts, biases = zip(*numbers, strict=True)
        return {
            "multiplier": np.array(multipliers, dtype=np.int32),
            "shift": np.array(shifts, dtype=np.uint8),
            "bias": np.array(biases, dtype=np.int64),
        }

    def destination(self, place: str, final: bool) -> str:
        """Either values or scores."""
        return f"0, {place}" if final else f"{place}, 0"

    def weights(self, layer: Layer) -> NDArray[Any]:
        """int8 weights of a layer that stayed float: the largest of each channel is ±127."""
        scaled = layer.weight * layer.scale.reshape(-1, 1, 1, 1)
        return np.asarray(away(scaled / _steps(layer).reshape(-1, 1, 1, 1))).astype(np.int8)

    def table(self, operation: Unary) -> NDArray[np.int8]:
        """What the function makes of each value from −128 to 127."""
        values = torch.arange(-128, 128, dtype=torch.float64) * self.scales[operation.inputs[0]]
        results = FUNCTIONS[operation.function].torch(values, *operation.numbers).numpy()
        return np.asarray(np.clip(away(results / self.scales[operation.output]), -MOST, MOST)).astype(np.int8)

    def unary(self, operation: Unary) -> tuple[str, str, list[str], Arrays]:
        """A table."""
        return "look_up", kernel("int8_lookup"), [], {"table": self.table(operation)}

    def factors(self, operation: Binary) -> tuple[int, ...]:
        """Multipliers and the shift: two multipliers for a sum, one for a product."""
        first, second = (self.scales[name] for name in operation.inputs)
        out = self.scales[operation.output]
        if operation.function == "multiply":
            return factor(first * second / out)
        _, shift = factor(max(first, second) / out)
        return int(away(first / out * 2.0**shift)), int(away(second / out * 2.0**shift)), shift

    def binary(self, operation: Binary) -> tuple[str, str, list[str]]:
        """With these factors."""
        factors = [str(part) for part in self.factors(operation)]
        return operation.function, kernel(f"int8_{operation.function}"), factors

    def average(self, operation: Pool | Mean) -> tuple[int, int]:
        """Multiplier and shift of an average."""
        return factor(self.scales[operation.inputs[0]] / self.scales[operation.output])

    def quotient(self, operation: Pool | Mean) -> tuple[str, str]:
        """With these."""
        multiplier, shift = self.average(operation)
        return kernel("int8_quotient"), f"(ratio){{{multiplier}, {shift}}}"

    def softmax(self, operation: Softmax) -> str:
        """There is none."""
        raise CbpqError(f"{operation.where} has no kernel for int8 activations; export with float activations")

    def pixels(self) -> NDArray[np.int8]:
        """(C, 256): what each pixel of a channel becomes."""
        mean, std = (np.array(values).reshape(-1, 1) for values in (self._spec.mean, self._spec.std))
        values = (np.arange(256) / 255 - mean) / std / self.scales[self._network.input]
        return np.asarray(np.clip(away(values), -MOST, MOST)).astype(np.int8)

    def normalize(self, spec: InputSpec) -> str:
        """By a table."""
        rows = ",\n".join(f"        {{\n{wrapped(literals(row), 12)}\n        }}" for row in self.pixels())
        return (
            f"    static const int8_t table[CBPQ_CHANNELS][256] = {{\n{rows}\n    }};\n"
            "    for (int i = 0; i < CBPQ_HEIGHT * CBPQ_WIDTH; i++)\n"
            "        for (int c = 0; c < CBPQ_CHANNELS; c++)\n"
            "            input[c * CBPQ_HEIGHT * CBPQ_WIDTH + i] = table[c][*pixels++];\n"
        )

    def declarations(self) -> str:
        """The functions and the scales."""
        return (
            "/* An input value is a normalised pixel / CBPQ_INPUT_SCALE; a score is a logit / CBPQ_LOGIT_SCALE. */\n"
            f"#define CBPQ_INPUT_SCALE {number(self.scales[self._network.input])}\n"
            f"#define CBPQ_LOGIT_SCALE {number(self.score_scale)}\n\n"
            "/* Pixels, row by row, the channels of a pixel side by side, become the input of cbpq_run. */\n"
            "void cbpq_normalize(const uint8_t *pixels, int8_t *input);\n\n"
            "/* From CBPQ_INPUT_SIZE values, in the order channel, row, column, to CBPQ_CLASSES scores. No floats. */\n"
            "void cbpq_run(const int8_t *input, int32_t *scores);\n"
        )


def _steps(layer: Layer) -> NDArray[np.float64]:
    """(C,): what 1 is worth in the int8 weights of a layer that stayed float."""
    scaled = np.abs(layer.weight * layer.scale.reshape(-1, 1, 1, 1)).reshape(len(layer.weight), -1).max(axis=1)
    return np.asarray(np.where(scaled > 0, scaled, 1.0) / MOST)


def _scales(network: Network, ranges: Mapping[str, float]) -> dict[str, float]:
    """The scale of each value. Values that are only moved, or cut off, share it: then nothing is to be computed."""
    group = {name: name for name in network.shapes}
    cut: set[str] = set()  # beyond the range of what becomes of them, nothing of these is needed

    def leader(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for operation in network.operations:
        moved = isinstance(operation, View | Copy) or (isinstance(operation, Pool) and operation.function == "max")
        cuts = isinstance(operation, Unary) and (
            operation.function == "relu" or (operation.function == "clamp" and operation.numbers[0] <= 0)
        )
        if cuts and network.uses(operation.inputs[0]) == 1 and operation.inputs[0] != network.input:
            cut.add(operation.inputs[0])
            moved = True
        if moved:
            for name in operation.inputs:
                group[leader(name)] = leader(operation.output)
    largest: dict[str, float] = {}
    for name in network.shapes:
        if name not in cut:
            largest[leader(name)] = max(largest.get(leader(name), 0.0), ranges.get(name, 0.0))
    return {name: (largest.get(leader(name), 0.0) or 1.0) / MOST for name in network.shapes}
