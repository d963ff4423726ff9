"""What an ONNX file has to pass before it is written: integers that decode to the weights, and equal logits."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from cbpq.errors import CbpqError
from cbpq.exports.checks import Runs, compare_logits
from cbpq.fileformat import ConstrainedTensor
from cbpq.inputs import InputSpec

ANNOTATION = "finn_datatype"  # qonnx's key for the type of a tensor


def equal_bits(first: NDArray[Any], second: NDArray[Any]) -> bool:
    """Whether two arrays have one type and shape and hold the same bits, which also compares NaNs."""
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


def check_integers(onnx: ModuleType, data: bytes, constrained: dict[str, ConstrainedTensor]) -> None:
    """Every constrained weight must come out of a ``DequantizeLinear``, bit for bit, as the onnx package decodes it.

    Raises:
        CbpqError: one does not.
    """
    graph = onnx.load_from_string(data).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}

    def decoded(node: Any) -> NDArray[np.float32]:
        codes, scale = (onnx.numpy_helper.to_array(stored[name]) for name in node.input)
        if scale.ndim:
            scale = scale.reshape(-1, *[1] * (codes.ndim - 1))
        return np.asarray(codes.astype(np.float32) * scale)

    for name, tensor in constrained.items():
        weight = tensor.weight()
        # equal weights may have become one, under any of their names
        candidates = [nodes[name]] if name in nodes else nodes.values()
        if name in stored or not any(equal_bits(decoded(node), weight) for node in candidates):
            raise CbpqError(f"{name} did not become an integer in the ONNX graph; export it as state-dict instead")


def check_annotations(onnx: ModuleType, data: bytes, constrained: dict[str, ConstrainedTensor]) -> None:
    """Every constrained weight must be an annotated initializer of a layer, equal to the bit after the layer's ``Mul``.

    Raises:
        CbpqError: one is not, or an initializer holds what its annotation does not allow.
    """
    graph = onnx.load_from_string(data).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    weights: dict[str, list[NDArray[np.float32]]] = {}
    for entry in graph.quantization_annotation:
        [kind] = [pair.value for pair in entry.quant_parameter_tensor_names if pair.key == ANNOTATION]
        name = entry.tensor_name
        if name not in stored or not _allows(kind, stored[name]):
            raise CbpqError(f"{name} is annotated as {kind} in the ONNX graph, but holds something else")
        weights[name] = [_weight_of(layer, users, stored) for layer in users.get(name, ())]
    for name, tensor in constrained.items():
        # equal weights may have become one, under any of their names
        candidates = [weights[f"{name}.codes"]] if f"{name}.codes" in weights else weights.values()
        equal = [{equal_bits(found, tensor.weight()) for found in each} for each in candidates]
        if name in stored or {True} not in equal:
            raise CbpqError(f"{name} did not become annotated integers in the ONNX graph; export it as onnx instead")


def _allows(kind: str, values: NDArray[np.float32]) -> bool:
    """Whether a type of qonnx has all these values."""
    few = {"BIPOLAR": [-1, 1], "TERNARY": [-1, 0, 1]}
    if kind in few:
        return bool(np.isin(values, few[kind]).all())
    limit = 2.0 ** (int(kind.removeprefix("INT")) - 1)
    return bool(((values == np.round(values)) & (values >= -limit) & (values < limit)).all())


def _weight_of(layer: Any, users: dict[str, list[Any]], stored: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    """What a layer with codes multiplies with, (outputs, ...), its ``Mul`` included; empty if it has none."""
    following = users.get(layer.output[0], [])
    operators = [node.op_type for node in (layer, *following)]
    if operators not in (["Conv", "Mul"], ["MatMul", "Mul"]) or following[0].input[1] not in stored:
        return np.empty(0, np.float32)
    codes, scale = stored[layer.input[1]], stored[following[0].input[1]]
    if layer.op_type == "MatMul":
        codes = codes.T
    return np.asarray(codes * scale.reshape(-1, *[1] * (codes.ndim - 1)) if scale.ndim else codes * scale)


def check_logits(
    onnxruntime: ModuleType, data: bytes, network: nn.Module, spec: InputSpec, batches: Sequence[int] = (1, 3)
) -> dict[str, Any]:
    """Run the file in onnxruntime beside the network, in batches of these sizes.

    Returns:
        For an export's facts: what `compare_logits` says, and what ran it.

    Raises:
        CbpqError: onnxruntime does not run it, or the logits differ by more than ``checks.TOLERANCE``.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its warnings go to stderr
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads would steal from torch

    def load() -> Runs:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> NDArray[np.float32]:
            result: NDArray[np.float32] = session.run(["logits"], {"input": images.numpy()})[0]
            return result

        return run

    reader = f"onnxruntime {onnxruntime.__version__}"
    facts = compare_logits(reader, load, network, spec, advice="try another opset or format", batches=batches)
    return {**facts, "onnxruntime": str(onnxruntime.__version__)}
