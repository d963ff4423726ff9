"""Export to qonnx's dialect of ONNX, for tools that build FPGA designs: weights are integers of 1 to 4 bits.

The file is plain ONNX (opset 18, IR 8). The codes of each constrained weight are an initializer, which feeds its
convolution or ``MatMul`` directly and is annotated with qonnx's name of its type: ``BIPOLAR`` for binary weights,
``TERNARY`` for ternary ones, ``INT3`` for one-bit shifts, ``INT4`` for two-bit shifts, else the smallest ``INTk`` with
all levels. A ``Mul`` behind the layer has the scale, an ``Add`` behind that the bias. A ``Mul`` between codes and layer
would not do: qonnx's clean-up computes whatever is constant, and would leave float32 weights of 32 bits.

qonnx stores integers as float32, linear weights as (inputs, outputs). It needs a fixed batch size, here 1, which its
``ChangeBatchSize`` changes where the network keeps the batch apart from all else. Code × scale is bit for bit the
constrained weight.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cbpq.atomic import atomic_write
from cbpq.errors import require_extra
from cbpq.exports import Exported
from cbpq.exports.integer_layers import IntegerLayers, annotation, smallest
from cbpq.exports.onnx_checks import check_annotations, check_logits
from cbpq.exports.onnx_graph import check_size, finish, replace_weights, translate
from cbpq.exports.translation import quiet
from cbpq.fileformat import CbpqFile
from cbpq.inputs import InputSpec

OPSET, IR_VERSION = 18, 8  # the oldest that torch writes without converting: these tools are slow to follow ONNX
_NOTES = (
    "the gain is in hardware that is built from it; the file is no smaller, because qonnx stores integers as float32",
    "activations are still float: a design in integers needs them quantized by another tool",
)


def export_qonnx(model: nn.Module, file: CbpqFile, spec: InputSpec, out: Path, *, check: bool = True) -> Exported:
    """Write ``model`` to ``out`` as this module's text describes; every weight is compared with ``file`` before that.

    The file computes ``logits`` (1, classes) from ``input`` (1, C, H, W), both float32. The input is normalised as
    ``spec`` says; the file's metadata holds ``spec`` as JSON under ``input_spec``.

    Args:
        model: the network with the weights of ``file``; it is left as it is.
        file: gives the codes and scales.
        spec: the size of the input, and what the check's random pictures look like.
        out: the file to write.
        check: whether to run the file in onnxruntime, which knows nothing of the annotations.

    Raises:
        MissingPartError: onnx, onnxscript or onnxruntime is not installed.
        CbpqError: ``model`` does not hold the weights of ``file``, torch cannot translate it, a weight is not used as
            it is by convolutions or linear layers, the result is too large, or onnxruntime computes something else.
            Nothing was written.
    """
    onnx, onnxscript, onnxruntime = (require_extra(name, "onnx") for name in ("onnx", "onnxscript", "onnxruntime"))
    check_size(file.float32_bytes)
    file = replace(file, constrained={name: smallest(tensor) for name, tensor in file.constrained.items()})

    with quiet():
        translated = translate(model, file, spec, OPSET, free_batch=False)
        weights = translated.constrained
        # int32, until the graph is optimised: that would fold codes that feed their layer directly
        make = onnx.numpy_helper.from_array
        codes = {name: make(tensor.codes.astype(np.int32), f"{name}.codes") for name, tensor in weights.items()}
        replace_weights(onnx, onnxscript.ir, translated, codes)
        data = finish(onnx, onnxscript.ir, translated, spec, OPSET, IR_VERSION, IntegerLayers(onnx, weights))
    check_annotations(onnx, data, weights)
    facts: dict[str, Any] = {
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "batch_size": 1,
        "integer_weights": dict(sorted(Counter(annotation(tensor.levels)[0] for tensor in weights.values()).items())),
        "constrained_weights": sum(tensor.codes.size for tensor in weights.values()),
        "weight_bits": sum(tensor.codes.size * annotation(tensor.levels)[1] for tensor in weights.values()),
        "unused_weights": translated.unused,
    }
    if check:
        facts |= check_logits(onnxruntime, data, translated.network, spec, batches=[1] * 4)
    atomic_write(out, data)
    return Exported("qonnx", out, len(data), file.float32_bytes, facts, (*_NOTES, *translated.notes))
