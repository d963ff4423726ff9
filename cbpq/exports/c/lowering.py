"""From torch's graph of a network to a list of operations: one table row per ATen operator.

The graph is that of ``torch.export`` in evaluation mode for one picture. What depends on weights alone is computed
here. A network with any other operator is refused by the operator's name.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from cbpq.errors import CbpqError, brief
from cbpq.exports.c import moves, rows
from cbpq.exports.c.calls import Call, Constrained, Unsupported
from cbpq.exports.c.folding import folded
from cbpq.exports.c.operations import Network, Operation, View
from cbpq.exports.translation import PREFIX, all_names, exporting, program_of
from cbpq.fileformat import CbpqFile
from cbpq.inputs import InputSpec

Row = Callable[[Call], Operation | None]

# An operator that gives its input with other strides (a slice, a permutation) is a view for torch: `moves.strided`.
ROWS: dict[str, Row] = {
    "aten.conv2d": rows.convolution,
    "aten.linear": rows.linear,
    "aten._native_batch_norm_legit_no_training": rows.batch_norm,
    "aten.batch_norm": rows.batch_norm,
    "aten.relu": rows.unary("relu"),
    "aten.relu6": rows.clamp,
    "aten.hardtanh": rows.clamp,
    "aten.clamp": rows.clamp,
    "aten.leaky_relu": rows.unary("leaky_relu", "negative_slope"),
    "aten.hardswish": rows.unary("hardswish"),
    "aten.hardsigmoid": rows.unary("hardsigmoid"),
    "aten.sigmoid": rows.unary("sigmoid"),
    "aten.tanh": rows.unary("tanh"),
    "aten.silu": rows.unary("silu"),
    "aten.gelu": rows.gelu,
    "aten.softmax": rows.softmax,
    "aten._softmax": rows.softmax,
    "aten.max_pool2d": rows.max_pool,
    "aten.avg_pool2d": rows.average_pool,
    "aten.adaptive_avg_pool2d": rows.adaptive_average_pool,
    "aten.mean": rows.mean,
    "aten.add": rows.arithmetic,
    "aten.sub": rows.arithmetic,
    "aten.mul": rows.arithmetic,
    "aten.div": rows.arithmetic,
    "aten.cat": moves.concatenation,
    "aten.stack": moves.concatenation,
    "aten.channel_shuffle": moves.channel_shuffle,
    "aten.pad": moves.padding,
    "aten.constant_pad_nd": moves.padding,
    **dict.fromkeys(
        (
            *("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unsqueeze", "aten.squeeze"),
            *("aten.slice", "aten.select", "aten.narrow", "aten.transpose", "aten.permute", "aten.t", "aten.expand"),
        ),
        moves.strided,
    ),
}
# The same values: dropout and its kin are gone in evaluation mode. A split is one view per part.
_SAME = (
    *("aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.dropout", "aten.to", "aten._to_copy"),
    "aten.lift_fresh_copy",
)
_CHECKS = ("aten._assert_tensor_metadata",)
_SPLITS = ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split")


def exported_program(network: nn.Module, spec: InputSpec) -> "torch.export.ExportedProgram":
    """The graph of ``network`` for one picture, without operators that write in place.

    Raises:
        CbpqError: torch cannot follow the network's code.
    """
    with exporting(f"follow the code of {type(network).__name__}"):
        functional: torch.export.ExportedProgram = program_of(network, spec, free_batch=False).run_decompositions({})
    return functional


def lower(program: "torch.export.ExportedProgram", network: nn.Module, file: CbpqFile) -> Network:
    """The operations of ``program``, BatchNorms folded into the layers before them.

    Args:
        program: of ``network``, from `exported_program`.
        network: tells which names one tensor has.
        file: tells which weights are constrained.

    Raises:
        CbpqError: an operator, or a use of one, that has no kernel; the message names it and its place.
    """
    return folded(_Lowering(program, network, file).network())


def stored(program: "torch.export.ExportedProgram") -> dict[str, Tensor]:
    """The tensors of the network's own by the names of the graph's inputs that stand for them."""
    everything = {**program.constants, **program.state_dict}
    return {name: everything[target].detach() for name, target in _targets(program).items()}


def _targets(program: "torch.export.ExportedProgram") -> dict[str, str]:
    signature = program.graph_signature
    own = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {**own, **signature.inputs_to_lifted_tensor_constants}


def place(node: fx.Node) -> str:
    """Where in the network a node of its graph comes from: a module's name, or that it is the network itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = str(stack[-1][0]) if stack else ""
    return f"{name}.".removeprefix(PREFIX).removesuffix(".") or "the network itself"


def _check_types(node: fx.Node) -> None:
    values = node.meta["val"]
    for value in values if isinstance(values, list | tuple) else [values]:
        if isinstance(value, Tensor) and value.dtype != torch.float32:
            raise Unsupported(f"it gives {str(value.dtype).removeprefix('torch.')} and not float32")


def _applied(row: Row, call: Call) -> Operation | None:
    try:
        return row(call)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # operators have more forms than the rows know, such as bounds that are tensors
        raise Unsupported(f"this form of it has no kernel ({brief(error)})") from error


class _Lowering:
    def __init__(self, program: "torch.export.ExportedProgram", network: nn.Module, file: CbpqFile) -> None:
        self._program = program
        self._file = file
        self._aliases = all_names(network)
        self._targets, self._stored = _targets(program), stored(program)
        self._known: dict[fx.Node, Any] = {}  # a value's name, a constant, or a tuple of these
        self._operations: list[Operation] = []
        self._shapes: dict[str, tuple[int, ...]] = {}

    def network(self) -> Network:
        """All nodes, one by one."""
        inputs, outputs = list[str](), list[str]()
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                self._known[node] = self._constant(node)
                if self._known[node] is None:
                    inputs.append(self._name(node))
            elif node.op == "call_function":
                self._known[node] = self._result(node)
            elif node.op == "output":
                outputs = [self._known[value] for value in node.args[0]]
        if len(inputs) != 1 or len(outputs) != 1 or not isinstance(outputs[0], str) or not self._operations:
            raise CbpqError("the network has not one input and one output that depends on it; nothing to translate")
        if self._operations[-1].output != outputs[0]:
            self._operations.append(View((outputs[0],), "logits", "the end of the network"))
            self._shapes["logits"], outputs = self._shapes[outputs[0]], ["logits"]
        return Network(tuple(self._operations), self._shapes, inputs[0], outputs[0])

    def _constant(self, node: fx.Node) -> Any:
        """The tensor that a placeholder stands for, a constrained weight as such; None for the picture."""
        if (name := self._targets.get(node.name)) is None:
            return None
        own = name.removeprefix(PREFIX)
        for alias in self._aliases.get(own, [own]):
            if alias in self._file.constrained:
                return Constrained(alias, self._file.constrained[alias])
        return self._stored[node.name]

    def _result(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            whole, index = node.args
            return self._known[whole][index]  # type: ignore[index]
        name = str(getattr(node.target, "overloadpacket", node.target))
        if name in _CHECKS:
            return None
        call = self._call(node, name)
        try:
            if not call.inputs:
                return self._computed(call, node)
            _check_types(node)
            if name in _SAME:
                return call.inputs[0]
            if name in _SPLITS:
                return self._parts(call, node)
            if (row := ROWS.get(name)) is None:
                raise Unsupported("there is no kernel for it")
            operation = _applied(row, call)
        except Unsupported as reason:
            raise CbpqError(
                f"the export format c cannot translate {name} at {place(node)}: {reason}; nothing was written"
            ) from reason
        if operation is None:
            return call.inputs[0]
        self._operations.append(operation)
        self._shapes[operation.output] = call.shape
        result = operation.output
        return (result,) if isinstance(node.meta["val"], list | tuple) else result

    def _call(self, node: fx.Node, name: str) -> Call:
        schema = getattr(node.target, "_schema", None)
        arguments = {} if schema is None else {part.name: part.default_value for part in schema.arguments}
        arguments |= dict(zip(arguments, node.args, strict=False)) | dict(node.kwargs)
        known = fx.node.map_arg(arguments, lambda part: self._known[part])
        inputs = [self._known[part] for part in node.all_input_nodes if isinstance(self._known[part], str)]
        value = node.meta["val"]
        first = value[0] if isinstance(value, list | tuple) else value
        shape = tuple(int(size) for size in first.shape) if isinstance(first, Tensor) else ()
        return Call(node.name, f"{place(node)} ({name})", node.target, known, inputs, shape, self._shapes)

    def _name(self, node: fx.Node) -> str:
        self._known[node] = node.name
        self._shapes[node.name] = tuple(int(size) for size in node.meta["val"].shape)
        return node.name

    def _computed(self, call: Call, node: fx.Node) -> Any:
        """What depends on weights alone."""
        if spent := [part for part in call.arguments.values() if isinstance(part, Constrained)]:
            raise Unsupported(f"it changes the constrained weight {spent[0].name}, whose levels are then lost")
        with torch.no_grad():
            return node.target(*fx.node.map_arg(node.args, self._known.get), **node.kwargs)  # type: ignore[operator]

    def _parts(self, call: Call, node: fx.Node) -> tuple[str, ...]:
        parts = []
        for number, value in enumerate(node.meta["val"]):
            operation = moves.part(call, number, f"{node.name}_{number}")
            self._operations.append(operation)
            self._shapes[operation.output] = tuple(int(size) for size in value.shape)
            parts.append(operation.output)
        return tuple(parts)
