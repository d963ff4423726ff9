"""A network as an ONNX graph whose constrained weights are integers: what exports to ONNX and its dialects share."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from cbpq.errors import CbpqError, brief
from cbpq.exports.onnx_checks import equal_bits
from cbpq.exports.translation import PREFIX, all_names, check_weights, exporting, own_names, program_of
from cbpq.fileformat import CbpqFile, ConstrainedTensor
from cbpq.inputs import InputSpec

MAX_BYTES = 2**31 - 1  # protobuf's limit for one file


@dataclass(frozen=True, eq=False)
class Translated:
    """A network and torch's ONNX program of it.

    Attributes:
        network: a copy of the network, on the CPU and in evaluation mode.
        program: what torch made of it, not optimised: each parameter is an initializer of its own name.
        constrained: the constrained weights that the forward pass uses, in the network's order.
        unused: the names of the others, such as those of auxiliary heads.
        aliases: all names of each tensor.
    """

    network: nn.Module
    program: Any
    constrained: dict[str, ConstrainedTensor]
    unused: list[str]
    aliases: dict[str, list[str]]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of it."""
        return (f"left out, because only training uses them: {', '.join(self.unused)}",) if self.unused else ()


def check_size(size: int) -> None:
    """Refuse a network that takes more bytes than one file can hold, before any work.

    Raises:
        CbpqError: it does.
    """
    if size > MAX_BYTES:
        raise CbpqError(f"an ONNX file holds {MAX_BYTES} bytes, the network takes {size}; export as state-dict instead")


def translate(model: nn.Module, file: CbpqFile, spec: InputSpec, opset: int, *, free_batch: bool = True) -> Translated:
    """Translate a copy of ``model``, for any number of pictures or for one.

    Raises:
        CbpqError: ``model`` does not hold the weights of ``file``, or torch cannot translate it.
    """
    network = copy.deepcopy(model).cpu().eval()
    check_weights(network, file)
    program, used = _program(network, spec, opset, free_batch=free_batch)
    aliases = all_names(network)
    # in the network's order, so that equal content gives equal bytes
    names = [name for name in aliases if name in file.constrained and not used.isdisjoint(aliases[name])]
    unused = sorted(file.constrained.keys() - set(names))
    return Translated(network, program, {name: file.constrained[name] for name in names}, unused, aliases)


def _program(network: nn.Module, spec: InputSpec, opset: int, *, free_batch: bool) -> tuple[Any, set[str]]:
    """The program, and the names of the tensors that the forward pass uses."""
    with exporting(f"translate {type(network).__name__} to ONNX"):
        exported = program_of(network, spec, free_batch=free_batch)
        program = torch.onnx.export(
            exported,
            (),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=({0: "batch"},) if free_batch else None,  # the name of the free dimension
            input_names=["input"],
            output_names=["logits"],
        )
    users = {node.name: node.users for node in exported.graph.nodes}
    return program, {name for node, name in own_names(exported).items() if users[node]}


def replace_weights(onnx: ModuleType, ir: Any, translated: Translated, codes: Mapping[str, Any]) -> None:
    """Put integers and ``DequantizeLinear`` in the place of each constrained weight's float32 initializer.

    ``codes`` holds them as ``TensorProto`` under the name of the weight.

    Raises:
        CbpqError: a weight is not in the program as it is.
    """
    graph, aliases, done = translated.program.model.graph, translated.aliases, set[str]()
    first = graph[0]
    for name, tensor in translated.constrained.items():
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
        node = dequantize(onnx, ir, graph, name, tensor, codes[name])
        graph.insert_before(first, node)
        node.outputs[0].type, node.outputs[0].shape = values[0].type, values[0].shape
        for value in values:
            value.replace_all_uses_with(node.outputs[0])
            del graph.initializers[value.name]


def dequantize(onnx: ModuleType, ir: Any, graph: Any, name: str, tensor: ConstrainedTensor, codes: Any) -> Any:
    """Store codes and scale as initializers; returns the node that makes the weight ``name`` of them."""
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


def finish(
    onnx: ModuleType,
    ir: Any,
    translated: Translated,
    spec: InputSpec,
    opset: int,
    ir_version: int,
    edit: Callable[[Any], Any] | None = None,
) -> bytes:
    """Optimise the graph, tidy its names, let ``edit`` make another ``ModelProto`` of it, and serialise it.

    Raises:
        CbpqError: ``edit`` refuses the graph, or ONNX's own checker does.
    """
    try:
        translated.program.optimize()  # folds constants; DequantizeLinear is never folded
        model = translated.program.model
        ir.passes.common.ClearMetadataAndDocStringPass()(model)  # source lines and paths of this machine
        for value in list(model.graph.initializers.values()):  # renaming moves them
            value.name = value.name.removeprefix(PREFIX)
        model.ir_version = ir_version
        model.producer_name, model.producer_version = "cbpq", None
        model.metadata_props["input_spec"] = json.dumps(spec.to_dict(), sort_keys=True)
        proto = ir.to_proto(model)
        if [entry.version for entry in proto.opset_import if entry.domain == ""] != [opset]:
            raise CbpqError(f"the network cannot be translated to opset {opset}; try another opset or format")
        proto = edit(proto) if edit else proto
        onnx.checker.check_model(proto, full_check=True)
        return bytes(proto.SerializeToString(deterministic=True))
    except CbpqError:
        raise
    except Exception as error:  # onnxscript, onnx and protobuf each have their own
        raise CbpqError(f"onnx {onnx.__version__} does not accept the translated network: {brief(error)}") from error
