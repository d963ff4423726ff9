"""Export to a ``torch.export`` program: a ``.pt2`` file that torch alone loads and runs.

It needs neither cbpq nor the code that made the network:

    program = torch.export.load("resnet18.pt2").module()
    logits = program(images)  # float32 (batch, C, H, W), normalised

Constrained weights are stored as integer codes, ``<name>_codes``, and steps, ``<name>_step`` = scale / denominator. The
program multiplies them right before each use, so there is one decoded weight at a time; the product is bit for bit the
constrained weight.

Where torch cannot leave the number of pictures open, the program takes one at a time. The file's ``input_spec.json``
says how pictures are normalised. Before it is written the program is loaded and run beside the network: logits may
differ by ``checks.TOLERANCE`` times the largest.
"""

import copy
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from cbpq.atomic import atomic_write
from cbpq.errors import CbpqError
from cbpq.exports import Exported
from cbpq.exports.checks import Runs, compare_logits
from cbpq.exports.translation import Logits, all_names, check_weights, exporting, program_of, quiet
from cbpq.fileformat import CbpqFile, ConstrainedTensor
from cbpq.inputs import InputSpec
from cbpq.models import logits

_CODES, _STEP = "_codes", "_step"


def export_pt2(model: nn.Module, file: CbpqFile, spec: InputSpec, out: Path, *, check: bool = True) -> Exported:
    """Write ``model`` to ``out`` as a program of ``torch.export``, after the check that this module's text describes.

    Args:
        model: the network with the weights of ``file``; it is left as it is.
        file: gives the codes and scales.
        spec: the size of the input, and what the check's random pictures look like.
        out: the file to write.
        check: whether to load and run it.

    Raises:
        CbpqError: ``model`` does not hold the weights of ``file``, torch cannot follow its code, or the program
            computes something else. Nothing was written.
    """
    network = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    check_weights(network, file)
    program, any_batch = _program(network, file.constrained, spec)
    _decode_late(program)
    _forget_origin(program)
    buffer = io.BytesIO()
    with exporting(f"write the program of {type(network).__name__}"):
        torch.export.save(program, buffer, extra_files={"input_spec.json": json.dumps(spec.to_dict(), sort_keys=True)})
    data = buffer.getvalue()
    version = str(torch.__version__)
    facts: dict[str, Any] = {"integer_weights": len(file.constrained), "batch": "any" if any_batch else 1}
    facts["torch"] = version
    if check:
        batches = (1, 3) if any_batch else (1,)
        facts |= compare_logits(f"torch {version}", lambda: _loaded(data), network, spec, batches=batches)
    atomic_write(out, data)
    return Exported("pt2", out, len(data), file.float32_bytes, facts, _notes(program, any_batch))


class _Decoding(Logits):
    """``network`` with codes and steps in the place of its constrained weights."""

    def __init__(self, network: nn.Module, constrained: Mapping[str, ConstrainedTensor]) -> None:
        super().__init__(network)
        self._names: dict[str, list[str]] = {}  # of each weight, all that it has
        aliases = all_names(network)
        for name in aliases:  # in the network's order, so that equal content gives equal bytes
            if name in constrained and not any(name in others for others in self._names.values()):
                self._names[name] = aliases[name]
                self._replace(name, constrained[name])

    def _replace(self, name: str, tensor: ConstrainedTensor) -> None:
        for alias in self._names[name]:
            path, _, key = alias.rpartition(".")
            del self.network.get_submodule(path)._parameters[key]
        path, _, key = name.rpartition(".")
        module = self.network.get_submodule(path)
        small = min(tensor.levels) >= -128 and max(tensor.levels) <= 127
        step = np.asarray(tensor.scale / np.float32(tensor.denominator))
        parts = {
            _CODES: torch.from_numpy(tensor.codes.astype(np.int8 if small else np.int32)),
            _STEP: torch.from_numpy(step.reshape(-1, *[1] * (tensor.codes.ndim - 1)) if step.ndim else step.copy()),
        }
        for suffix, part in parts.items():
            if hasattr(module, key + suffix):
                raise CbpqError(f"{name}: the network has something named {key + suffix} already; rename it")
            module.register_buffer(key + suffix, part)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, classes)."""
        weights: dict[str, Tensor] = {}
        for name, names in self._names.items():
            weight = self.network.get_buffer(name + _CODES) * self.network.get_buffer(name + _STEP)
            weights |= dict.fromkeys(names, weight)
        return logits(torch.func.functional_call(self.network, weights, (images,)))


def _program(
    network: nn.Module, constrained: Mapping[str, ConstrainedTensor], spec: InputSpec
) -> "tuple[torch.export.ExportedProgram, bool]":
    """The program, and whether it takes any number of pictures."""
    decoding = _Decoding(copy.deepcopy(network), constrained)
    doing = f"follow the code of {type(network).__name__}"
    try:
        with exporting(doing):
            return program_of(decoding, spec, free_batch=True), True
    except CbpqError:  # networks that look at the number of pictures; for what else it is, it will fail again
        with exporting(doing):
            return program_of(decoding, spec, free_batch=False), False


def _decode_late(program: "torch.export.ExportedProgram") -> None:
    """Move each multiplication of codes with their step to where its result is first needed."""
    buffers = program.graph_signature.inputs_to_buffers
    place = {node: number for number, node in enumerate(program.graph.nodes)}
    for node in place:
        first: Any = node.args[0] if node.args else None
        if node.op == "call_function" and isinstance(first, fx.Node) and buffers.get(first.name, "").endswith(_CODES):
            if node.users:
                min(node.users, key=place.__getitem__).prepend(node)
            else:  # only training uses it
                program.graph.erase_node(node)
    program.graph.lint()
    program.graph_module.recompile()


def _forget_origin(program: "torch.export.ExportedProgram") -> None:
    """Keep the paths and lines of this machine's code out of the file, and the example's zeros."""
    for node in program.graph.nodes:
        for key in ("stack_trace", "from_node", "source_fn_stack", "torch_fn", "custom"):
            node.meta.pop(key, None)
    (images,), _ = program.example_inputs
    program.example_inputs = ((torch.zeros(()).expand(images.shape),), {})


def _loaded(data: bytes) -> Runs:
    with quiet():
        run: Runs = torch.export.load(io.BytesIO(data)).module()
    return run


def _notes(program: "torch.export.ExportedProgram", any_batch: bool) -> tuple[str, ...]:
    operators = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    foreign = sorted({operator.namespace for operator in operators} - {"aten"})
    notes = [
        "a byte for each constrained weight, and no code but torch's; not faster: weights become float32 at every run, "
        "which costs most for single pictures",
        f"torch {torch.__version__} wrote it; torch does not promise that other versions can read it",
    ]
    if not any_batch:
        notes.append(
            "takes one picture at a time: the network's code fixes their number for torch, as len(x) does and "
            "x.shape[0] does not"
        )
    if foreign:
        notes.append(f"import what registers the operators of {', '.join(foreign)} before loading it")
    return tuple(notes)
