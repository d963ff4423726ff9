"""Export to ONNX with integer weights: each constrained weight is an integer initializer and a ``DequantizeLinear``.

``opset`` decides the type. The default, 21 (IR 10), stores 4-bit integers, which most runtimes read; 25 (IR 13) stores
2-bit integers where the levels fit −2..1, that is for binary and ternary weights. Levels beyond −8..7 take 8 bits.
The dequantized weight, integer × scale with scale = a / denominator, is bit for bit the constrained weight.

Before it is written the file passes ONNX's own checker and runs in onnxruntime beside the PyTorch network, on seeded
random pictures in batches of 1 and 3. Logits may differ by ``onnx_checks.TOLERANCE`` times the largest logit.
"""

import copy
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from cbpq.atomic import atomic_write
from cbpq.errors import CbpqError, UsageError, require_extra
from cbpq.exports import Exported, float32_size
from cbpq.exports.onnx_checks import check_integers, check_logits, equal_bits
from cbpq.exports.translation import PREFIX, Logits, all_names, check_weights, one_line, quiet
from cbpq.fileformat import CbpqFile, ConstrainedTensor
from cbpq.inputs import InputSpec
from cbpq.packing import pack

DEFAULT_OPSET = 21
# The IR version that came with each opset; the onnx package would write its newest, which runtimes refuse.
_IR_VERSIONS = {21: 10, 22: 10, 23: 11, 24: 12, 25: 13}
_INTEGER_TYPES = (("INT2", 2, 25), ("INT4", 4, 21), ("INT8", 8, 21))  # name, bits, first opset
_MAX_BYTES = 2**31 - 1  # protobuf's limit for one file
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
    _check_size(file, types)
    network = copy.deepcopy(model).cpu().eval()
    check_weights(network, file)

    with quiet():
        program, used = _translate(network, spec, opset)
        aliases = all_names(network)
        # in the network's order, so that equal content gives equal bytes
        names = [name for name in aliases if name in file.constrained and not used.isdisjoint(aliases[name])]
        constrained = {name: file.constrained[name] for name in names}
        _replace_weights(onnx, onnxscript.ir, program.model.graph, constrained, types, aliases)
        data = _finish(onnx, onnxscript.ir, program, spec, opset)
    check_integers(onnx, data, constrained)
    facts: dict[str, Any] = {
        "opset": opset,
        "ir_version": _IR_VERSIONS[opset],
        "integer_weights": dict(sorted(Counter(types[name][0] for name in constrained).items())),
    }
    facts["unused_weights"] = unused = sorted(file.constrained.keys() - constrained.keys())
    if check:
        difference, largest, agreement = check_logits(onnxruntime, data, network, spec)
        facts |= {"max_difference": difference, "max_logit": largest, "top1_agreement": agreement}
        facts["onnxruntime"] = str(onnxruntime.__version__)

    atomic_write(out, data)
    notes = [_NOTE]
    if unused:
        notes.append(f"left out, because only training uses them: {', '.join(unused)}")
    return Exported("onnx", out, len(data), float32_size(file), facts, tuple(notes))


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


def _check_size(file: CbpqFile, types: dict[str, tuple[str, int]]) -> None:
    packed = sum(tensor.codes.size * types[name][1] // 8 for name, tensor in file.constrained.items())
    size = packed + sum(array.nbytes for array in file.others.values())
    if size > _MAX_BYTES:
        raise CbpqError(
            f"an ONNX file holds {_MAX_BYTES} bytes, the network takes {size}; export as state-dict instead"
        )


def _translate(network: nn.Module, spec: InputSpec, opset: int) -> tuple[Any, set[str]]:
    """The network as torch's ONNX program, not optimised: each parameter is an initializer of its own name.

    Also the names of the tensors that the forward pass uses: not those of auxiliary heads.
    """
    example = torch.zeros(2, spec.channels, spec.height, spec.width)  # a batch of 1 would become a constant
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # the fast path of nn.MultiheadAttention is one operator that ONNX does not have
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            exported = torch.export.export(
                Logits(network), (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
            )
            program = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=({0: "batch"},),  # the name of the free dimension
                input_names=["input"],
                output_names=["logits"],
            )
    except Exception as error:  # torch raises whatever the network's code and the translation of each operator raise
        raise CbpqError(
            f"torch {torch.__version__} cannot translate {type(network).__name__} to ONNX: {one_line(error)}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    signature = exported.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    users = {node.name: node.users for node in exported.graph.nodes}
    return program, {name.removeprefix(PREFIX) for node, name in targets.items() if users[node]}


def _replace_weights(
    onnx: ModuleType,
    ir: Any,
    graph: Any,
    constrained: dict[str, ConstrainedTensor],
    types: dict[str, tuple[str, int]],
    aliases: dict[str, list[str]],
) -> None:
    """Put integers and ``DequantizeLinear`` in the place of each constrained weight's float32 initializer."""
    first, done = graph[0], set[str]()
    for name, tensor in constrained.items():
        if name in done:
            continue
        done.update(aliases[name])
        found = [graph.initializers.get(PREFIX + alias) for alias in aliases[name]]
        values = [value for value in found if value is not None]
        if not values or not all(equal_bits(value.const_value.numpy(), tensor.weight()) for value in values):
            raise CbpqError(
                f"the translated network does not hold {name} as it is, so it would stay float32; leave this layer "
                "unconstrained, or export as state-dict instead"
            )
        node = _dequantize(onnx, ir, graph, name, tensor, *types[name])
        graph.insert_before(first, node)
        node.outputs[0].type, node.outputs[0].shape = values[0].type, values[0].shape
        for value in values:
            value.replace_all_uses_with(node.outputs[0])
            del graph.initializers[value.name]


def _dequantize(
    onnx: ModuleType, ir: Any, graph: Any, name: str, tensor: ConstrainedTensor, kind: str, bits: int
) -> Any:
    """Store codes and scale as initializers; returns the node that makes the weight ``name`` of them."""
    data_type = onnx.TensorProto.DataType.Value(kind)
    codes = onnx.TensorProto(name=f"{name}.codes", data_type=data_type, dims=tensor.codes.shape)
    # ONNX packs like `pack`, least significant first; two's complement of `bits` bits
    unsigned = (tensor.codes.astype(np.int32) & (2**bits - 1)).astype(np.uint8)
    codes.raw_data = pack(unsigned.reshape(1, -1), bits).tobytes()
    scale = onnx.numpy_helper.from_array(tensor.scale / np.float32(tensor.denominator), f"{name}.scale")
    inputs = []
    for content in (ir.from_proto(codes), ir.from_proto(scale)):
        value = ir.Value(name=content.name, type=ir.TensorType(content.dtype), shape=content.shape, const_value=content)
        graph.register_initializer(value)
        inputs.append(value)
    axis = [ir.AttrInt64("axis", 0)] if tensor.scale.ndim else []
    node = ir.Node("", "DequantizeLinear", inputs, axis, name=f"{name}.dequantize")
    node.outputs[0].name = name
    return node


def _finish(onnx: ModuleType, ir: Any, program: Any, spec: InputSpec, opset: int) -> bytes:
    """Optimise the graph, tidy its names and serialise it."""
    try:
        program.optimize()  # folds constants; DequantizeLinear is never folded
        model = program.model
        ir.passes.common.ClearMetadataAndDocStringPass()(model)  # source lines and paths of this machine
        for value in list(model.graph.initializers.values()):  # renaming moves them
            value.name = value.name.removeprefix(PREFIX)
        model.ir_version = _IR_VERSIONS[opset]
        model.producer_name, model.producer_version = "cbpq", None
        model.metadata_props["input_spec"] = json.dumps(spec.to_dict(), sort_keys=True)
        proto = ir.to_proto(model)
        if [entry.version for entry in proto.opset_import if entry.domain == ""] != [opset]:
            raise CbpqError(f"the network cannot be translated to opset {opset}; try another")
        onnx.checker.check_model(proto, full_check=True)
        return bytes(proto.SerializeToString(deterministic=True))
    except CbpqError:
        raise
    except Exception as error:  # onnxscript, onnx and protobuf each have their own
        raise CbpqError(f"onnx {onnx.__version__} does not accept the translated network: {one_line(error)}") from error
