"""Float arithmetic in the generated code: how each operation's numbers are stored and its kernel is called."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbpq.exports.c.functions import FUNCTIONS
from cbpq.exports.c.operations import Affine, Binary, Layer, Mean, Network, Operation, Pool, Softmax, Unary
from cbpq.exports.c.text import kernel, number
from cbpq.inputs import InputSpec

Arrays = dict[str, NDArray[Any]]


class FloatArithmetic:
    """Values and sums are float32."""

    types = "float"  #: the kernel file that defines value, total, weight and finishing
    value = "float"
    result = "float"
    bytes = 4  #: of a value
    output = "logits"

    def direct(self, network: Network, maker: Operation) -> bool:
        """Whether ``maker``, which makes the network's last value, writes it where the caller wants it."""
        return True

    def finishing(self, layer: Layer | Affine) -> Arrays:
        """The arrays behind the first fields of the structure ``finishing``."""
        scale = layer.scale if not isinstance(layer, Layer) or layer.tensor is not None else np.ones(len(layer.scale))
        return {"scale": scale.astype(np.float32), "bias": layer.bias.astype(np.float32)}

    def destination(self, place: str, final: bool) -> str:
        """The fields of ``finishing`` before those arrays: where a layer's values go."""
        return place

    def weights(self, layer: Layer) -> NDArray[Any]:
        """What a layer that stayed float multiplies with: its scale is in there."""
        scaled: NDArray[Any] = layer.weight * layer.scale.reshape(-1, 1, 1, 1)
        return scaled.astype(np.float32)

    def unary(self, operation: Unary) -> tuple[str, str, list[str], Arrays]:
        """A kernel's name and text, what follows input, output and count in its call, and arrays for that."""
        function = FUNCTIONS[operation.function]
        numbers = [number(value) for value in operation.numbers]
        return f"apply_{operation.function}", function.kernel(operation.function), numbers, {}

    def binary(self, operation: Binary) -> tuple[str, str, list[str]]:
        """A kernel's name and text, and what follows the sizes in its call."""
        return operation.function, kernel(f"float_{operation.function}"), []

    def quotient(self, operation: Pool | Mean) -> tuple[str, str]:
        """The text of the kernel that makes averages of sums, and the last argument of calls."""
        return kernel("float_quotient"), "0"

    def softmax(self, operation: Softmax) -> str:
        """The text of its kernel."""
        return kernel("float_softmax")

    def declarations(self) -> str:
        """The functions, with what they expect."""
        return (
            "/* Pixels, row by row, the channels of a pixel side by side, become the input of cbpq_run. */\n"
            "void cbpq_normalize(const uint8_t *pixels, float *input);\n\n"
            "/* From CBPQ_INPUT_SIZE normalised values, in the order channel, row, column, to CBPQ_CLASSES logits. */\n"
            "void cbpq_run(const float *input, float *logits);\n"
        )

    def normalize(self, spec: InputSpec) -> str:
        """The body of ``cbpq_normalize``."""
        return (
            "    static const float mean[] = CBPQ_MEAN, std[] = CBPQ_STD;\n"
            "    for (int i = 0; i < CBPQ_HEIGHT * CBPQ_WIDTH; i++)\n"
            "        for (int c = 0; c < CBPQ_CHANNELS; c++)\n"
            "            input[c * CBPQ_HEIGHT * CBPQ_WIDTH + i] = ((float)*pixels++ / 255 - mean[c]) / std[c];\n"
        )
