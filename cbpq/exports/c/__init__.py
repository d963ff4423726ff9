"""Export to C99 for microcontrollers and high-level synthesis: no input is ever multiplied by a constrained weight.

The result is a folder of four files: ``network.h`` (how to call it), ``network.c`` (the network: packed codes as in the
cbpq file, kernels, static memory), and ``main.c`` with ``golden.h``, a program that checks it anywhere. Nothing is
allocated, and nothing but <stdint.h> is needed, and <math.h> where an activation does.

An input is added to, or subtracted from, one sum per power of two in the levels; the sums are combined by doubling, and
each output is then multiplied once by its channel's scale, in which the BatchNorm behind the layer is too. Layers that
stayed float are computed with ordinary products.

With ``activations="int8"`` there are no floats at all: values are int8 with a scale each, sums int32, and the scale and
bias of a channel are integers and a shift (``integers`` says how results are rounded); layers that stayed float have
int8 weights. The scales come from pictures.

Before the folder appears, its program is compiled and run, if there is a compiler: logits may differ from torch's by
``golden.TOLERANCE`` times the largest, and integers must be exactly those that ``reference`` computes.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cbpq.atomic import atomic_write_folder
from cbpq.errors import UsageError, did_you_mean
from cbpq.exports import Exported
from cbpq.exports.c import text
from cbpq.exports.c.calibration import ranges
from cbpq.exports.c.compiler import FLAGS, compile_and_run, find_compiler, version
from cbpq.exports.c.floats import FloatArithmetic
from cbpq.exports.c.golden import TOLERANCE, Golden, golden, golden_header, says
from cbpq.exports.c.header import header
from cbpq.exports.c.integers import Int8Arithmetic
from cbpq.exports.c.lowering import exported_program, lower
from cbpq.exports.c.operations import Layer, Network
from cbpq.exports.c.reference import scores
from cbpq.exports.c.source import SourceWriter, Written
from cbpq.exports.sample import accuracy, agreement, pictures
from cbpq.exports.translation import check_weights
from cbpq.fileformat import CbpqFile
from cbpq.inputs import InputSpec

ACTIVATIONS = ("float", "int8")


def export_c(
    model: nn.Module,
    file: CbpqFile,
    spec: InputSpec,
    out: Path,
    *,
    check: bool = True,
    activations: str = "float",
    data: str | None = None,
    class_map: Path | None = None,
) -> Exported:
    """Write ``model`` as C to the folder ``out``, after the check that this package's text describes.

    Args:
        model: the network with the weights of ``file``; it is left as it is.
        file: gives the codes and scales.
        spec: the size and the normalisation of the input.
        out: the folder; one that is there is replaced.
        check: whether to compile and run the code, if there is a compiler.
        activations: ``float``, or ``int8`` for integers everywhere.
        data: pictures that tell how large activations become, as ``cbpq.data.load_data`` takes them; labels are only
            used to measure with. Without them, pictures are made of the network.
        class_map: as ``cbpq.data.load_data`` takes it.

    Raises:
        UsageError: unknown activations, or ``data`` that nothing is needed of.
        CbpqError: ``model`` does not hold the weights of ``file``, there is an operator without a kernel, the compiled
            code computes something else, or ``out`` cannot be written. Nothing was written.
    """
    if activations not in ACTIVATIONS:
        known = " or ".join(ACTIVATIONS)
        raise UsageError(f"unknown activations {activations!r}{did_you_mean(activations, ACTIVATIONS)}; give {known}")
    if (data is not None or class_map is not None) and activations == "float":
        raise UsageError("float activations need no pictures; leave the data out, or export with int8 activations")
    network = copy.deepcopy(model).cpu().eval()
    check_weights(network, file)
    program = exported_program(network, spec)
    lowered = lower(program, network, file)
    expected = golden(network, spec)
    if activations == "float":
        made = _floats(lowered, expected, spec)
    else:
        made = _integers(lowered, expected, spec, program, network, (data, class_map))
    facts, notes = {"activations": activations, **_facts(lowered, made.written, expected), **made.facts}, [*made.notes]
    notes += _unused(lowered, file)
    compiler = find_compiler() if check else None
    if compiler is not None:
        facts |= _checked(compile_and_run(compiler, made.files)) | {"compiler": version(compiler)}
    else:
        why = "no C compiler was found" if check else "--no-check was given"
        notes.append(f"not compiled, since {why}; try it: cc {' '.join(FLAGS)} network.c main.c -lm && ./a.out")
    atomic_write_folder(out, {name: content.encode("ascii") for name, content in made.files.items()})
    size = sum(map(len, made.files.values()))
    return Exported("c", out, size, file.float32_bytes, facts, tuple(notes))


@dataclass(frozen=True)
class _Made:
    files: Mapping[str, str]
    written: Written
    facts: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def _floats(network: Network, expected: Golden, spec: InputSpec) -> _Made:
    arithmetic = FloatArithmetic()
    written = SourceWriter(network, arithmetic).write(spec)
    files = {
        "network.h": header(spec, expected.logits.shape[1], written, arithmetic),
        "network.c": written.text,
        "main.c": text.kernel("main_float"),
        "golden.h": golden_header(expected.pixels, expected.logits, "logits", TOLERANCE),
    }
    return _Made(files, written, {})


def _integers(
    network: Network,
    expected: Golden,
    spec: InputSpec,
    program: "torch.export.ExportedProgram",
    model: nn.Module,
    source: tuple[str | None, Path | None],
) -> _Made:
    classes = expected.logits.shape[1]
    data, class_map = source
    chosen = pictures(data, model, spec, classes, class_map)
    arithmetic = Int8Arithmetic(network, ranges(program, chosen.calibration, spec), spec)
    written = SourceWriter(network, arithmetic).write(spec)

    def both(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return says(model, pixels, spec), scores(network, arithmetic, pixels)

    facts: dict[str, Any] = {
        "calibration_pictures": len(chosen.calibration),
        "calibration_agreement_percent": agreement(*both(chosen.calibration)),
    }
    if chosen.validation is not None and chosen.labels is not None:
        floats, integers = both(chosen.validation)
        facts |= {"validation_pictures": len(chosen.labels), "agreement_percent": agreement(floats, integers)}
        facts |= {
            "top1_float_percent": accuracy(floats, chosen.labels),
            "top1_int8_percent": accuracy(integers, chosen.labels),
        }
    exact = scores(network, arithmetic, torch.from_numpy(expected.pixels).permute(0, 3, 1, 2))
    files = {
        "network.h": header(spec, classes, written, arithmetic),
        "network.c": written.text,
        "main.c": text.kernel("main_int8"),
        "golden.h": golden_header(expected.pixels, exact.numpy().astype("int32"), "scores", None),
    }
    return _Made(files, written, facts, (chosen.note,) if chosen.note else ())


def _facts(network: Network, written: Written, expected: Golden) -> dict[str, Any]:
    layers = [operation for operation in network.operations if isinstance(operation, Layer)]
    constrained = [layer.name for layer in layers if layer.tensor is not None]
    return {
        "constrained_layers": len(constrained),
        "float_layers": len(layers) - len(constrained),
        "additions": written.additions,
        "products": written.products,
        "constant_bytes": written.constant_bytes,
        "memory_bytes": written.memory_bytes,
        "golden_pictures": len(expected.pixels),
    }


def _unused(network: Network, file: CbpqFile) -> list[str]:
    """A note on constrained weights that no step reads."""
    used = {operation.name for operation in network.operations if isinstance(operation, Layer)}
    unused = sorted(file.constrained.keys() - used)
    return [f"left out, because only training uses them: {', '.join(unused)}"] if unused else []


def _checked(output: str) -> dict[str, Any]:
    """The numbers that the program prints."""
    found = re.search(r"largest difference (\S+), largest logit (\S+),", output)
    # integers are compared exactly by the program itself
    return {"max_difference": float(found[1]), "max_logit": float(found[2])} if found else {"exact": True}
