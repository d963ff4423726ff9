"""What an ONNX file has to pass before it is written: integers that decode to the weights, and equal logits."""

from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cbpq.errors import CbpqError
from cbpq.exports.translation import one_line
from cbpq.fileformat import ConstrainedTensor
from cbpq.inputs import InputSpec
from cbpq.models import logits

TOLERANCE = 1e-3  # of the largest logit: float32 sums in another order reach 1e-5 in deep networks


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


def check_logits(
    onnxruntime: ModuleType, data: bytes, network: nn.Module, spec: InputSpec
) -> tuple[float, float, float]:
    """Run the file beside the network: the largest difference, the largest logit, and the share of equal top-1.

    Raises:
        CbpqError: onnxruntime does not run it, or the logits differ by more than ``TOLERANCE``.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its warnings go to stderr
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads would steal from torch
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (spec.mean, spec.std))
    sizes = [(batch, spec.channels, spec.height, spec.width) for batch in (1, 3)]
    batches = [(torch.rand(size, generator=generator) - mean) / std for size in sizes]
    with torch.no_grad():
        ours = np.concatenate([logits(network(images)).numpy() for images in batches])
    if not np.isfinite(ours).all():
        raise CbpqError(
            "the network's own logits for random pictures are not finite; nothing can be compared with them"
        )
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        theirs = np.concatenate([session.run(["logits"], {"input": images.numpy()})[0] for images in batches])
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise CbpqError(f"onnxruntime {onnxruntime.__version__} rejects the network: {one_line(error)}") from error
    difference, largest = float(np.abs(theirs - ours).max()), float(np.abs(ours).max())
    if not difference <= TOLERANCE * largest:  # also when the difference is NaN
        raise CbpqError(
            f"onnxruntime {onnxruntime.__version__} computes other logits than torch: they differ by {difference:.3g}, "
            f"and the largest is {largest:.3g}; try another opset"
        )
    agreement = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
    return difference, largest, agreement
