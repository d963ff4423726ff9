"""The text of ``network.c``: constants, the kernels that are needed, and one call after another."""

import re
from dataclasses import dataclass
from functools import singledispatchmethod

import numpy as np
from numpy.typing import NDArray

from cbpq.errors import CbpqError
from cbpq.exports.c import text
from cbpq.exports.c.floats import Arrays, FloatArithmetic
from cbpq.exports.c.memory import Plan, plan
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
    Window,
)
from cbpq.inputs import InputSpec
from cbpq.packing import pack, word_of_bits

MOST_POWERS = 15  # a level is an int16
_TOTAL_BYTES = 4  # a sum is a float or an int32
_BEGINNING = ("convolution", "constrained", "ordinary", "window", "quotient")  # kernels that others need, in order


@dataclass(frozen=True)
class Written:
    """The text, and what it takes."""

    text: str
    constant_bytes: int
    memory_bytes: int
    additions: int  #: of constrained layers for one picture, each also a subtraction
    products: int  #: of an input and a weight, in layers that stayed float


class SourceWriter:
    """Writes the network as C in one arithmetic."""

    def __init__(self, network: Network, arithmetic: FloatArithmetic) -> None:
        self._network, self._arithmetic = network, arithmetic
        self._direct = self._last_is_direct(plan(network))
        self._plan: Plan = plan(network, own_output=not self._direct)
        self._kernels: dict[str, str] = {}
        self._constants: list[str] = []
        self._calls: list[str] = []
        self._step = 0  # the number of the operation at hand, for names
        self._levels: dict[tuple[int, ...], str] = {}
        self._bytes = self._additions = self._products = 0
        self._powers = self._line = 0

    def write(self, spec: InputSpec) -> Written:
        """The whole text.

        Raises:
            CbpqError: a constrained layer with levels that are too large.
        """
        for step, operation in enumerate(self._network.operations, start=1):
            self._step = step
            if not isinstance(operation, View):
                shapes = [str(self._network.shapes[name]) for name in (operation.inputs[0], operation.output)]
                kind = f", {operation.tensor.constraint}" if isinstance(operation, Layer) and operation.tensor else ""
                self._calls.append("    " + text.comment(f"{operation.where}{kind}: {' to '.join(shapes)}"))
                self._add(operation)
        lines = _TOTAL_BYTES * self._line * (self._powers + ("ordinary" in self._kernels))
        used = self._plan.size * self._arithmetic.bytes + lines
        return Written(self._text(spec), self._bytes, used, self._additions, self._products)

    def _text(self, spec: InputSpec) -> str:
        """What was collected, in the order C needs it."""
        arithmetic, calls = self._arithmetic, list(self._calls)
        value, output = arithmetic.value, arithmetic.output
        if not self._direct:
            last = self._at(self._network.output)
            calls.append(f"    for (int i = 0; i < CBPQ_CLASSES; i++)\n        {output}[i] = ({last})[i];")
        names = [name for name in _BEGINNING if name in self._kernels]
        names += sorted(self._kernels.keys() - set(_BEGINNING))
        kernels = [text.kernel(arithmetic.types), *(self._kernels[name] for name in names)]
        mathematics = "#include <math.h>\n" if re.search(r"(expf|tanhf|erff)\(", "".join(kernels)) else ""
        sizes = f"#define MOST_POWERS {max(self._powers, 1)}\n#define LONGEST_LINE {max(self._line, 1)}\n"
        memory = "All values between input and output; those needed at different times share their place."
        block = f"{text.paragraph(memory)}static {value} memory[{self._plan.size}];\n" if self._plan.size else ""
        normalize = f"void cbpq_normalize(const uint8_t *pixels, {value} *input)\n{{\n{arithmetic.normalize(spec)}}}\n"
        head = f"void cbpq_run(const {value} *input, {arithmetic.result} *{output})"
        run = "\n".join([head, "{", *calls, "}\n"])
        parts = ['#include "network.h"\n', mathematics, sizes, *kernels, *self._constants, block, normalize, run]
        return "\n".join(part for part in parts if part)

    def _last_is_direct(self, first: Plan) -> bool:
        """Whether the result can be written to the caller's memory at once: one operation makes it, nobody else reads
        it."""
        home = first.home[self._network.output]
        operations = [operation for operation in self._network.operations if not isinstance(operation, View)]
        makers = [operation for operation in operations if first.home[operation.output] == home]
        readers = [operation for operation in operations if home in {first.home[name] for name in operation.inputs}]
        if not makers:
            raise CbpqError("the network gives its input as it is; there is nothing to write")
        return self._arithmetic.direct(self._network, makers[-1]) if len(makers) == 1 and not readers else False

    def _at(self, value: str, offset: int = 0) -> str:
        """Where a value is, in C; ``offset`` counts from its start."""
        home, block = self._plan.home[value], "memory"
        if home not in self._plan.offsets:
            block = "input" if home == self._network.input else self._arithmetic.output
        offset += self._plan.offsets.get(home, 0)
        return f"{block} + {offset}" if offset else block

    def _constant(self, name: str, values: NDArray[np.generic]) -> str:
        self._constants.append(text.array(name, values))
        self._bytes += values.nbytes
        return name

    def _finishing(self, operation: Layer | Affine, name: str) -> str:
        arrays: Arrays = self._arithmetic.finishing(operation)
        names = [self._constant(f"{name}_{key}", values) for key, values in arrays.items()]
        final = self._plan.home[operation.output] not in self._plan.offsets
        place = self._arithmetic.destination(self._at(operation.output), final)
        return f"&(finishing){{{', '.join([place, *names])}}}"

    def _call(self, kernel: str, *arguments: object) -> None:
        self._calls.append(f"    {kernel}(\n{text.wrapped(map(str, arguments), 8)});")
        if len(line := f"    {kernel}({', '.join(map(str, arguments))});") <= text.WIDTH:
            self._calls[-1] = line

    @singledispatchmethod
    def _add(self, operation: Operation) -> None:
        raise CbpqError(f"{operation.where} has no kernel; this is a bug in cbpq, please report it")

    @_add.register
    def _(self, operation: Layer) -> None:
        geometry = operation.geometry
        name = text.identifier(self._step, operation.name.removesuffix(".weight"))
        self._kernels["convolution"] = text.kernel("convolution")
        self._line = max(self._line, geometry.out_size[1])
        self._constants.append(text.structure("convolution", f"{name}_shape", geometry.fields()))
        pixels = geometry.out_size[0] * geometry.out_size[1]
        if operation.tensor is None:
            self._kernels["ordinary"] = text.kernel("ordinary")
            weights = self._constant(f"{name}_weights", self._arithmetic.weights(operation))
            self._products += operation.weight.size * pixels
            kernel = "ordinary_layer"
        else:
            self._kernels["constrained"] = text.kernel("constrained")
            weights = f"&{self._constrained(operation, name)}"
            self._additions += operation.tensor.terms * pixels
            kernel = "constrained_layer"
        self._call(kernel, self._at(operation.inputs[0]), f"&{name}_shape", weights, self._finishing(operation, name))

    def _constrained(self, operation: Layer, name: str) -> str:
        """The packed codes of a layer, as in the file; returns the name of what describes them."""
        tensor = operation.tensor
        if tensor is None or max(map(abs, tensor.levels)) >= 2**MOST_POWERS:
            raise CbpqError(
                f"{operation.name} has levels that are sums of more than {MOST_POWERS} powers of two, which the export "
                "format c does not add up; choose onnx or state-dict"
            )
        indices = np.searchsorted(tensor.levels, operation.weight.reshape(len(operation.weight), -1)).astype(np.uint8)
        packed = pack(indices, word_of_bits(tensor.bits))
        if tensor.levels not in self._levels:
            label = f"levels{len(self._levels)}"
            self._levels[tensor.levels] = self._constant(label, np.array(tensor.levels, dtype=np.int16))
        powers = max(map(abs, tensor.levels)).bit_length()
        self._powers = max(self._powers, powers)
        fields = [
            ("codes", self._constant(f"{name}_codes", packed)),
            ("row_bytes", packed.shape[1]),
            ("bits", tensor.bits),
            ("levels", self._levels[tensor.levels]),
            ("powers", powers),
        ]
        self._constants.append(text.structure("constrained_weights", f"{name}_weights", fields))
        return f"{name}_weights"

    @_add.register
    def _(self, operation: Affine) -> None:
        self._kernels["affine"] = text.kernel("affine")
        how = self._finishing(operation, text.identifier(self._step, operation.where.partition(" ")[0]))
        self._call("affine", self._at(operation.inputs[0]), len(operation.scale), operation.count, how)

    @_add.register
    def _(self, operation: Unary) -> None:
        name, kernel, arguments, arrays = self._arithmetic.unary(operation)
        self._kernels[name] = kernel
        arguments = [self._constant(f"w{self._step}_{key}", values) for key, values in arrays.items()] + arguments
        self._call(name, self._at(operation.inputs[0]), self._at(operation.output), operation.count, *arguments)

    @_add.register
    def _(self, operation: Binary) -> None:
        name, kernel, arguments = self._arithmetic.binary(operation)
        self._kernels[name] = kernel
        places = [self._at(value) for value in (*operation.inputs, operation.output)]
        self._call(name, *places, operation.count, operation.repeat, *arguments)

    @_add.register
    def _(self, operation: Pool) -> None:
        name = f"{operation.function}_pool"
        self._kernels["window"], self._kernels[name] = text.kernel("window"), text.kernel(name)
        windows = []
        for axis, row in (("rows", operation.rows), ("columns", operation.columns)):
            windows += [self._windows(f"w{self._step}_{axis}", row), len(row)]
        places = [self._at(operation.inputs[0]), self._at(operation.output)]
        last = self._quotient(operation) if operation.function == "average" else []
        self._call(name, *places, operation.channels, *operation.size, *windows, *last)

    @_add.register
    def _(self, operation: Mean) -> None:
        self._kernels["mean"] = text.kernel("mean")
        places = [self._at(operation.inputs[0]), self._at(operation.output)]
        self._call("mean", *places, operation.outer, operation.count, operation.inner, *self._quotient(operation))

    @_add.register
    def _(self, operation: Softmax) -> None:
        self._kernels["softmax"] = self._arithmetic.softmax(operation)
        places = [self._at(operation.inputs[0]), self._at(operation.output)]
        self._call("softmax", *places, operation.outer, operation.count, operation.inner)

    @_add.register
    def _(self, operation: Copy) -> None:
        self._kernels["copy"] = text.kernel("copy")
        if operation.clear:
            self._kernels["clear"] = text.kernel("clear")
            self._call("clear", self._at(operation.output), self._network.size(operation.output))
        for number, piece in enumerate(operation.pieces):
            name = f"w{self._step}_piece{number}"
            fields = zip(("sizes", "steps", "out_steps"), (piece.sizes, piece.steps, piece.out_steps), strict=True)
            inside = [(key, "{" + ", ".join(map(str, values)) + "}") for key, values in fields]
            self._constants.append(text.structure("piece", name, inside))
            source = self._at(operation.inputs[piece.source], piece.offset)
            self._call("copy", source, self._at(operation.output, piece.out_offset), f"&{name}")

    def _quotient(self, operation: Pool | Mean) -> list[str]:
        self._kernels["quotient"], last = self._arithmetic.quotient(operation)
        return [last]

    def _windows(self, name: str, windows: tuple[Window, ...]) -> str:
        items = [f"{{{window.start}, {window.end}, {window.count}}}" for window in windows]
        self._constants.append(f"static const window {name}[{len(items)}] = {{\n{text.wrapped(items)}\n}};\n")
        return name
