"""Export to C99 for microcontrollers and high-level synthesis: no input is ever multiplied by a constrained weight.

The result is a folder of four files: ``network.h`` (how to call it), ``network.c`` (the network: packed codes as in the
cbpq file, kernels, static memory), and ``main.c`` with ``golden.h``, a program that checks it anywhere. Nothing is
allocated, and nothing but <stdint.h> is needed, and <math.h> where an activation does.

An input is added to, or subtracted from, one sum per power of two in the levels; the sums are combined by doubling, and
each output is then multiplied once by its channel's scale, in which the BatchNorm behind the layer is too. Layers that
stayed float are computed with ordinary products.

Before the folder appears, its program is compiled and run, if there is a compiler: logits may differ from torch's by
``golden.TOLERANCE`` times the largest.
"""

import copy
import re
from pathlib import Path
from typing import Any

from torch import nn

from cbpq.atomic import atomic_write_folder
from cbpq.errors import CbpqError
from cbpq.exports import Exported, float32_size
from cbpq.exports.c import text
from cbpq.exports.c.compiler import FLAGS, compile_and_run, find_compiler, version
from cbpq.exports.c.floats import FloatArithmetic
from cbpq.exports.c.golden import TOLERANCE, Golden, golden, golden_header
from cbpq.exports.c.header import header
from cbpq.exports.c.lowering import exported_program, lower
from cbpq.exports.c.operations import Layer, Network
from cbpq.exports.c.source import SourceWriter, Written
from cbpq.exports.translation import check_weights
from cbpq.fileformat import CbpqFile
from cbpq.inputs import InputSpec

FILES = ("network.h", "network.c", "main.c", "golden.h")


def export_c(model: nn.Module, file: CbpqFile, spec: InputSpec, out: Path, *, check: bool = True) -> Exported:
    """Write ``model`` as C to the folder ``out``, after the check that this package's text describes.

    Args:
        model: the network with the weights of ``file``; it is left as it is.
        file: gives the codes and scales.
        spec: the size and the normalisation of the input.
        out: the folder; one that is there is replaced.
        check: whether to compile and run the code, if there is a compiler.

    Raises:
        CbpqError: ``model`` does not hold the weights of ``file``, there is an operator without a kernel, the compiled
            code computes something else, or ``out`` cannot be written. Nothing was written.
    """
    network = copy.deepcopy(model).cpu().eval()
    check_weights(network, file)
    program = exported_program(network, spec)
    lowered = lower(program, network, file)
    expected = golden(network, spec)
    arithmetic = FloatArithmetic()
    written = SourceWriter(lowered, arithmetic).write(spec)
    files = {
        "network.h": header(spec, expected.logits.shape[1], written, arithmetic),
        "network.c": written.text,
        "main.c": text.kernel("main_float"),
        "golden.h": golden_header(expected.pixels, expected.logits, "logits", TOLERANCE),
    }
    facts, notes = _facts(lowered, written, expected), _unused(lowered, file)
    compiler = find_compiler() if check else None
    if compiler is not None:
        facts |= _checked(compile_and_run(compiler, files)) | {"compiler": version(compiler)}
    else:
        why = "no C compiler was found" if check else "--no-check was given"
        notes.append(f"not compiled, since {why}; try it: cc {' '.join(FLAGS)} network.c main.c -lm && ./a.out")
    atomic_write_folder(out, {name: content.encode("ascii") for name, content in files.items()})
    size = sum(map(len, files.values()))
    return Exported("c", out, size, float32_size(file), facts, tuple(notes))


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
    if found is None:
        raise CbpqError("the compiled check does not say what it found; nothing was written")
    return {"max_difference": float(found[1]), "max_logit": float(found[2])}
