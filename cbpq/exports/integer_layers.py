"""Layers that compute with codes and multiply by the scale afterwards, annotated as qonnx and its kin read them."""

import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbpq.errors import CbpqError
from cbpq.exports.onnx_checks import ANNOTATION, equal_bits
from cbpq.fileformat import ConstrainedTensor


def annotation(levels: tuple[int, ...]) -> tuple[str, int]:
    """qonnx's name of the smallest type that holds these levels, and its bits."""
    if set(levels) <= {-1, 1}:
        return "BIPOLAR", 1
    if set(levels) <= {-1, 0, 1}:
        return "TERNARY", 2
    bits = 1 + max(-min(levels) - 1, max(levels)).bit_length()
    return f"INT{bits}", bits


def smallest(tensor: ConstrainedTensor) -> ConstrainedTensor:
    """The same weight with codes that have no common divisor, where that leaves every bit as it is."""
    divisor = math.gcd(*tensor.levels)
    levels = tuple(level // divisor for level in tensor.levels)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.asarray(tensor.scale / np.float32(tensor.denominator) * np.float32(divisor))
        smaller = replace(tensor, codes=tensor.codes // divisor, scale=scale, levels=levels, denominator=1)
        return smaller if equal_bits(smaller.weight(), tensor.weight()) else tensor


class IntegerLayers:
    """Turns the layers of an ONNX graph whose weights come from ``DequantizeLinear`` into layers of their codes.

    Called with a ``ModelProto`` it returns another, with the shape of every tensor.
    """

    def __init__(self, onnx: ModuleType, constrained: dict[str, ConstrainedTensor]) -> None:
        self._onnx = onnx
        self._constrained = constrained
        self._stored: dict[str, Any] = {}  # initializers by name
        self._weights: dict[str, str] = {}  # the weight that a tensor holds
        self._turned: dict[str, str] = {}  # the same for (inputs, outputs), which linear layers multiply with

    def __call__(self, model: Any) -> Any:
        """Do it to every layer.

        Raises:
            CbpqError: anything else uses a weight.
        """
        graph = model.graph
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._weights = {node.output[0]: node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        self._turned = {
            node.output[0]: self._weights[node.input[0]]
            for node in graph.node
            if node.op_type == "Transpose"
            and node.input[0] in self._weights
            and self._attributes(node).get("perm") == [1, 0]
        }
        gone = self._weights.keys() | self._turned.keys()
        nodes = [part for node in graph.node if gone.isdisjoint(node.output) for part in self._parts(node)]
        read = {name for node in nodes for name in node.input}
        made = {name for node in nodes for name in node.output}
        values = [value for value in graph.value_info if value.name in made]
        for field in ("node", "value_info", "initializer"):
            graph.ClearField(field)
        graph.node.extend(nodes)
        graph.value_info.extend(values)
        graph.initializer.extend(tensor for tensor in self._stored.values() if tensor.name in read)
        for name in sorted(self._weights):
            kind = annotation(self._constrained[name].levels)[0]
            entry = self._onnx.StringStringEntryProto(key=ANNOTATION, value=kind)
            graph.quantization_annotation.add(tensor_name=f"{name}.codes", quant_parameter_tensor_names=[entry])
        return self._onnx.shape_inference.infer_shapes(model, strict_mode=True)

    def _parts(self, node: Any) -> list[Any]:
        """The node itself, or what computes the same with codes."""
        used = [name for name in node.input if name in self._weights or name in self._turned]
        if not used:
            return [node]
        name = self._weights.get(used[0]) or self._turned[used[0]]
        bias = node.input[2] if len(node.input) > 2 else ""
        convolution = node.op_type == "Conv" and used[0] in self._weights and (not bias or bias in self._stored)
        if used != list(node.input[1:2]) or not (convolution or self._is_linear(node)):
            raise CbpqError(
                f"{name} cannot stay integer in qonnx, because {node.op_type} uses it otherwise than as the weight of "
                "a convolution or linear layer; leave this layer unconstrained, or export as onnx instead"
            )
        tensor = self._constrained[name]
        codes = tensor.codes.astype(np.float32)
        scale = tensor.scale / np.float32(tensor.denominator)
        if convolution:
            channels = (1, -1, *[1] * (codes.ndim - 2))  # of what comes out
            scale = scale.reshape(channels) if scale.ndim else scale
            array = self._onnx.numpy_helper.to_array
            bias = bias and self._store(f"{bias}.reshaped", array(self._stored[bias]).reshape(channels))
        stored = self._store(f"{name}.codes", codes if convolution else codes.T)
        return self._chain(node, stored, self._store(f"{name}.scale", scale), bias)

    def _chain(self, node: Any, codes: str, scale: str, bias: str) -> list[Any]:
        """The layer with its codes, then ``Mul``, then ``Add`` where there is a bias."""
        make, output = self._onnx.helper.make_node, node.output[0]
        attributes = self._attributes(node) if node.op_type == "Conv" else {}
        operator = "Conv" if node.op_type == "Conv" else "MatMul"
        unscaled, scaled = f"{output}.unscaled", f"{output}.scaled" if bias else output
        parts = [
            make(operator, [node.input[0], codes], [unscaled], name=node.name, **attributes),
            make("Mul", [unscaled, scale], [scaled], name=f"{node.name}.scale"),
        ]
        return [*parts, make("Add", [scaled, bias], [output], name=f"{node.name}.bias")] if bias else parts

    def _is_linear(self, node: Any) -> bool:
        """Whether it multiplies by a weight of shape (outputs, inputs), transposed before or by itself."""
        if node.op_type == "MatMul":
            return node.input[1] in self._turned
        usual = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0, **self._attributes(node)}
        return node.op_type == "Gemm" and usual == {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}

    def _attributes(self, node: Any) -> dict[str, Any]:
        return {entry.name: self._onnx.helper.get_attribute_value(entry) for entry in node.attribute}

    def _store(self, name: str, array: NDArray[np.float32]) -> str:
        contiguous = np.asarray(array, order="C")  # np.ascontiguousarray would turn a scalar into a vector
        self._stored[name] = self._onnx.numpy_helper.from_array(contiguous, name)
        return name
