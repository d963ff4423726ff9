"""Export to ONNX with integer weights: each constrained weight is an integer initializer and a ``DequantizeLinear``.

``opset`` decides the type. The default, 21 (IR 10), stores 4-bit integers, which most runtimes read; 25 (IR 13) stores
2-bit integers where the levels fit −2..1, that is for binary and ternary weights. Levels beyond −8..7 take 8 bits.
The dequantized weight, integer × scale with scale = a / denominator, is bit for bit the constrained weight.

Before it is written the file passes ONNX's own checker and runs in onnxruntime beside the PyTorch network, on seeded
random pictures in batches of 1 and 3. Logits may differ by ``checks.TOLERANCE`` times the largest logit.
"""

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn

from cbpq.atomic import atomic_write
from cbpq.errors import CbpqError, UsageError, require_extra
from cbpq.exports import Exported
from cbpq.exports.onnx_checks import check_integers, check_logits
from cbpq.exports.onnx_graph import check_size, finish, replace_weights, translate
from cbpq.exports.translation import quiet
from cbpq.fileformat import CbpqFile, ConstrainedTensor
from cbpq.inputs import InputSpec
from cbpq.packing import pack, word_of_bits

DEFAULT_OPSET = 21
# The IR version that came with each opset; the onnx package would write its newest, which runtimes refuse.
_IR_VERSIONS = {21: 10, 22: 10, 23: 11, 24: 12, 25: 13}
_INTEGER_TYPES = (("INT2", 2, 25), ("INT4", 4, 21), ("INT8", 8, 21))  # name, bits, first opset
_NOTE = (
    "smaller, not faster: onnxruntime keeps 2-bit and 4-bit weights packed in memory, "
    "but dequantizes them to float32 at every run"
)


def export_onnx(
    model: nn.Module, file: CbpqFile, spec: InputSpec, out: Path, *, opset: int | None = None, check: bool = True
) -> Exported:
    """Write ``model`` to ``out`` as ONNX, after the checks that this module's text describes.

    The file computes ``logits`` (batch, classes) from ``input`` (batch, C, H, W), both float32, for any batch size. The
    input is normalised as ``spec`` says; the file's metadata holds ``spec`` as JSON under ``input_spec``.

    Args:
        model: the network with the weights of ``file``; it is left as it is.
        file: gives the codes and scales.
        spec: the size of the input, and what the check's random pictures look like.
        out: the file to write.
        opset: 21 (the default) to 25; 25 stores binary and ternary weights with 2 bits.
        check: whether to run the file in onnxruntime.

    Raises:
        UsageError: an opset without the needed types.
        MissingPartError: onnx, onnxscript or onnxruntime is not installed.
        CbpqError: ``model`` does not hold the weights of ``file``, torch cannot translate it, a weight fits no integer
            type, the result is too large, or onnxruntime computes something else. Nothing was written.
    """
    onnx, onnxscript, onnxruntime = (require_extra(name, "onnx") for name in ("onnx", "onnxscript", "onnxruntime"))
    opset = _check_opset(opset)
    types = {name: _integer_type(name, tensor, opset) for name, tensor in file.constrained.items()}
    packed = sum(tensor.codes.size * types[name][1] // 8 for name, tensor in file.constrained.items())
    check_size(packed + sum(array.nbytes for array in file.others.values()))

    with quiet():
        translated = translate(model, file, spec, opset)
        weights = translated.constrained
        codes = {name: _packed_codes(onnx, name, tensor, *types[name]) for name, tensor in weights.items()}
        replace_weights(onnx, onnxscript.ir, translated, codes)
        data = finish(onnx, onnxscript.ir, translated, spec, opset, _IR_VERSIONS[opset])
    check_integers(onnx, data, weights)
    facts: dict[str, Any] = {
        "opset": opset,
        "ir_version": _IR_VERSIONS[opset],
        "integer_weights": dict(sorted(Counter(types[name][0] for name in weights).items())),
        "unused_weights": translated.unused,
    }
    if check:
        facts |= check_logits(onnxruntime, data, translated.network, spec)
    atomic_write(out, data)
    return Exported("onnx", out, len(data), file.float32_bytes, facts, (_NOTE, *translated.notes))


def _check_opset(opset: int | None) -> int:
    if opset is None:
        return DEFAULT_OPSET
    if opset < min(_IR_VERSIONS):
        raise UsageError(f"opset {opset} has no 4-bit integers for weights; use 21 (the default) or later")
    if opset > max(_IR_VERSIONS):
        raise UsageError(f"opset {opset} is not supported; use 21 (the default) to {max(_IR_VERSIONS)}")
    return opset


def _integer_type(name: str, tensor: ConstrainedTensor, opset: int) -> tuple[str, int]:
    """The narrowest signed integer that holds every level: its ONNX name and its bits."""
    low, high = min(tensor.levels), max(tensor.levels)
    for integer, bits, since in _INTEGER_TYPES:
        if opset >= since and -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1):
            return integer, bits
    raise CbpqError(f"{name} has codes from {low} to {high}, which 8 bits cannot hold; export as state-dict instead")


def _packed_codes(onnx: ModuleType, name: str, tensor: ConstrainedTensor, kind: str, bits: int) -> Any:
    """The codes of the weight ``name`` as a ``TensorProto``."""
    data_type = onnx.TensorProto.DataType.Value(kind)
    codes = onnx.TensorProto(name=f"{name}.codes", data_type=data_type, dims=tensor.codes.shape)
    # ONNX packs like `pack`, least significant first; two's complement of `bits` bits
    unsigned = (tensor.codes.astype(np.int32) & (2**bits - 1)).astype(np.uint8)
    codes.raw_data = pack(unsigned.reshape(1, -1), word_of_bits(bits)).tobytes()
    return codes
