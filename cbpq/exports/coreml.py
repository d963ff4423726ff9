"""Export to Core ML: an ML program in an ``.mlpackage`` folder, whose constrained weights are palettes and indices.

A palette is a table of values, one per output channel or one for the whole weight, as the scales are; each weight is an
index into it, of 1, 2, 3, 4, 6 or 8 bits. coremltools makes palettes of the distinct values that it finds
(``mode="unique"``), before it optimises anything, so that BatchNorms stay apart and no weight changes. The network
computes in float32: 16 bits would round the scales.

Before the folder appears coremltools reads it back: each palette must hold nothing but the level set (and zeros that
fill it up), and must decode to the constrained weights. Core ML itself runs on Apple's systems only, so nothing is
predicted.
"""

import copy
import json
import tempfile
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cbpq.atomic import atomic_write_folder
from cbpq.errors import CbpqError, brief, require_extra
from cbpq.exports import FORMATS, Exported
from cbpq.exports.translation import all_names, check_weights, exporting, own_names, program_of, quiet
from cbpq.fileformat import CbpqFile, ConstrainedTensor
from cbpq.inputs import InputSpec

_LARGEST = 256  # entries of a palette
_SMALLEST = 10  # coremltools stores a tensor with fewer values as it is
_MANIFEST, _MODEL, _ = FORMATS["coreml"].files
_PASS = "compression::palettize_weights"
_NOTES = (
    "smaller, not faster: Core ML makes float32 weights of the palettes when it loads or runs the network",
    "it runs on iOS 18, macOS 15, tvOS 18, watchOS 11 or newer, in float32, on CPU or GPU; the Neural Engine, which "
    "computes with 16 bits, is not used",
)
_CHECKED = (
    "coremltools reads it back, and its palettes give the weights exactly; logits were not compared, since Core ML "
    "computes on Apple's systems only"
)


def export_coreml(model: nn.Module, file: CbpqFile, spec: InputSpec, out: Path, *, check: bool = True) -> Exported:
    """Write ``model`` to the folder ``out`` for Core ML, after the check that this module's text describes.

    The network computes ``logits`` (1, classes) from ``input`` (1, C, H, W), both float32. The input is normalised as
    ``spec`` says; the package's metadata holds ``spec`` as JSON under ``input_spec``.

    Args:
        model: the network with the weights of ``file``; it is left as it is.
        file: gives the codes and scales.
        spec: the size of the input.
        out: the folder; one that is there is replaced.
        check: whether to read the package back.

    Raises:
        MissingPartError: coremltools is not installed.
        CbpqError: ``model`` does not hold the weights of ``file``, torch or coremltools cannot translate it, a weight
            has too many levels, the package reads back otherwise, or ``out`` cannot be written. Nothing was written.
    """
    coremltools = require_extra("coremltools", "coreml")
    _check_levels(file)
    network = copy.deepcopy(model).cpu().eval()
    check_weights(network, file)
    with exporting(f"follow the code of {type(network).__name__}"):
        program = program_of(network, spec, free_batch=False).run_decompositions({})
    aliases = all_names(network)
    names = _constants(program, aliases, file)
    constrained = {node: file.constrained[name] for node, name in names.items()}
    palettized = {node: tensor for node, tensor in constrained.items() if tensor.codes.size >= _SMALLEST}
    facts: dict[str, Any] = {"coremltools": str(coremltools.__version__), "palettes": {}}
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "network.mlpackage"
        try:
            with quiet():
                _convert(coremltools, program, palettized, spec, package)
                found = read_palettes(coremltools, package) if check else {}
        except Exception as error:  # coremltools raises whatever its operators raise
            raise CbpqError(
                f"coremltools {coremltools.__version__} cannot translate {type(network).__name__}: {brief(error)}"
            ) from error
        if check:
            facts["palettes"] = check_palettes(found, palettized, names)
        paths = {name: package / name for name in FORMATS["coreml"].files}
        content = {name: path.read_bytes() for name, path in paths.items() if path.exists()}
    facts["float_weights"] = [names[node] for node in constrained if node not in palettized]
    used = {alias for name in names.values() for alias in aliases[name]}
    facts["unused_weights"] = sorted(file.constrained.keys() - used)
    atomic_write_folder(out, content)
    size = sum(map(len, content.values()))
    return Exported("coreml", out, size, file.float32_bytes, facts, tuple(_notes(facts, check)))


def _check_levels(file: CbpqFile) -> None:
    for name, tensor in file.constrained.items():
        if len(tensor.levels) > _LARGEST:
            raise CbpqError(
                f"{name} has {len(tensor.levels)} levels, a palette holds {_LARGEST}; export as state-dict instead"
            )


def _notes(facts: Mapping[str, Any], check: bool) -> list[str]:
    notes = [*_NOTES, _CHECKED if check else "not read back, since --no-check was given"]
    if facts["float_weights"]:
        notes.append(f"too small for a palette, and float32: {', '.join(facts['float_weights'])}")
    if facts["unused_weights"]:
        notes.append(f"left out, because only training uses them: {', '.join(facts['unused_weights'])}")
    return notes


def _constants(
    program: "torch.export.ExportedProgram", aliases: Mapping[str, list[str]], file: CbpqFile
) -> dict[str, str]:
    """Which constrained weight each input of the graph stands for, of those that the forward pass uses."""
    users = {node.name: node.users for node in program.graph.nodes}
    found: dict[str, str] = {}
    for node, name in own_names(program).items():
        held = [alias for alias in aliases.get(name, ()) if alias in file.constrained]
        if held and users[node]:
            found[node] = held[0]
    return found


def _convert(
    tools: ModuleType,
    program: "torch.export.ExportedProgram",
    palettized: Mapping[str, ConstrainedTensor],
    spec: InputSpec,
    package: Path,
) -> None:
    """Translate the graph and save it; ``palettized`` by the names of the graph's inputs."""
    optimize = tools.optimize.coreml
    per_channel = {"granularity": "per_grouped_channel", "group_size": 1, "channel_axis": 0}
    configs = {
        node: optimize.OpPalettizerConfig(
            mode="unique", weight_threshold=0, **(per_channel if tensor.scale.ndim else {})
        )
        for node, tensor in palettized.items()
    }
    passes = tools.PassPipeline.DEFAULT_PALETTIZATION  # palettes first, and what optimises leaves them as they are
    passes.set_options(_PASS, {"config": optimize.OptimizationConfig(op_name_configs=configs)})
    converted = tools.convert(
        program,
        convert_to="mlprogram",
        inputs=[tools.TensorType(name="input", shape=(1, spec.channels, spec.height, spec.width))],
        outputs=[tools.TensorType(name="logits")],
        minimum_deployment_target=tools.target.iOS18,  # the first with a palette per channel
        compute_precision=tools.precision.FLOAT32,
        pass_pipeline=passes,
        skip_model_load=True,
    )
    metadata = converted.user_defined_metadata
    metadata.pop("com.github.apple.coremltools.conversion_date", None)
    metadata["input_spec"] = json.dumps(spec.to_dict(), sort_keys=True)
    converted.save(str(package))
    _tidy(tools, package)


def read_palettes(tools: ModuleType, package: Path) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """The indices and palettes of each palettized weight in a package, by coremltools' names, as it reads them."""
    model = tools.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    program = tools.converters.mil.frontend.milproto.load.load(
        spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir
    )
    operations = program.functions["main"].find_ops(op_type="constexpr_lut_to_dense")
    return {operation.outputs[0].name: (operation.indices.val, operation.lut.val) for operation in operations}


def check_palettes(
    found: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
    palettized: Mapping[str, ConstrainedTensor],
    names: Mapping[str, str],
) -> dict[str, int]:
    """Every constrained weight must come out of palettes that hold its level set and nothing else.

    Args:
        found: what `read_palettes` gives.
        palettized: the constrained weights by the names of the graph's inputs.
        names: their state-dict names, for messages.

    Returns:
        How many weights have indices of how many bits.

    Raises:
        CbpqError: a weight has no palette, or one with other values, or decodes to something else.
    """
    widths = Counter[str]()
    for node, tensor in palettized.items():
        own = f"{node}_palettized"  # the name that coremltools gives it
        candidates = [found[own]] if own in found else found.values()  # equal weights may have become one
        width = next((lut.shape[-2] for indices, lut in candidates if _is_level_set(indices, lut, tensor)), None)
        if width is None:
            raise CbpqError(f"{names[node]} did not become a palette of its levels; export it as state-dict instead")
        widths[f"{int(width).bit_length() - 1}-bit"] += 1
    return dict(sorted(widths.items()))


def _is_level_set(indices: NDArray[Any], lut: NDArray[Any], tensor: ConstrainedTensor) -> bool:
    """Whether each palette has no value but its channel's levels, and the indices then give the weights."""
    groups = tensor.scale.size
    entries = lut.shape[-2]
    if lut.dtype != np.float32 or lut.shape != (groups, *[1] * (indices.ndim - 1), entries, 1):
        return False
    if indices.shape != tensor.codes.shape:
        return False
    palettes = lut.reshape(groups, entries)
    steps = (tensor.scale / np.float32(tensor.denominator)).reshape(groups, 1)
    levels = np.array(tensor.levels, dtype=np.float32) * steps
    known = (palettes[:, :, None] == levels[:, None, :]).any(axis=2) | (palettes == 0)  # what is left over is filled up
    decoded = np.take_along_axis(palettes, indices.reshape(groups, -1).astype(np.intp), axis=1)
    return bool(known.all() and np.array_equal(decoded.reshape(indices.shape), tensor.weight()))


def _tidy(tools: ModuleType, package: Path) -> None:
    """Make equal content equal bytes: coremltools identifies parts by random numbers, and maps have no order."""
    manifest = json.loads((package / _MANIFEST).read_text(encoding="utf-8"))
    parts = manifest["itemInfoEntries"]
    own = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, part["path"])) for old, part in parts.items()}
    manifest["itemInfoEntries"] = {own[old]: part for old, part in parts.items()}
    manifest["rootModelIdentifier"] = own[manifest["rootModelIdentifier"]]
    (package / _MANIFEST).write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", encoding="utf-8")
    spec = tools.utils.load_spec(str(package))
    (package / _MODEL).write_bytes(spec.SerializeToString(deterministic=True))
