"""From a cbpq file to files that other tools read: one module or package per target, and one table of all of them.

A target is a function that checks its result with the reader it is meant for, writes ``out`` whole or not at all, and
returns an `Exported`. A new one is a new module and a new row of ``FORMATS``. None is imported before it is used.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cbpq import fileformat
from cbpq.errors import UsageError, did_you_mean, require_extra
from cbpq.fileformat import CbpqFile

if TYPE_CHECKING:
    from torch import nn

    from cbpq.inputs import InputSpec


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        format: a name from ``FORMATS``.
        path: the written file.
        size: its length in bytes.
        float32_size: bytes of the network's tensors with every constrained weight as float32, to compare ``size`` with.
        facts: what else the target has to say, in JSON types (opset, maximum difference, ...).
        notes: sentences for the user: what the target gains, and what it does not.
    """

    format: str
    path: Path
    size: int
    float32_size: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON types."""
        return {
            "format": self.format,
            "path": str(self.path),
            "size": self.size,
            "float32_size": self.float32_size,
            **self.facts,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        summary: one line for help texts.
        function: ``module:name``; called as ``(file, out, **options)``.
        needs_network: call it as ``(model, file, spec, out, **options)`` instead.
        variants: options that are on or off; where one is on, this other function is called, with the network.
        extensions: what ``out`` may end with; none if it may have any name.
        by_ending: whether an ``out`` with such an ending, and nothing else said, means this format.
        files: what is in ``out``, by path, if that is a folder.
        extra: the optional part it belongs to, as in ``pip install "cbpq[extra]"``; empty if none.
        modules: the packages that this part installs and the target imports.
        options: keyword arguments it understands.
    """

    summary: str
    function: str
    extensions: tuple[str, ...] = ()
    by_ending: bool = True
    files: tuple[str, ...] = ()
    needs_network: bool = False
    extra: str = ""
    modules: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    variants: Mapping[str, str] = field(default_factory=dict)

    def chosen(self, options: Mapping[str, Any]) -> tuple[str, bool]:
        """The function for these options, and whether it takes the network."""
        variant = next((function for name, function in self.variants.items() if options.get(name)), None)
        return variant or self.function, variant is not None or self.needs_network


FORMATS: Mapping[str, Format] = {
    "state-dict": Format(
        summary="float32 weights that load_state_dict of torchvision, timm or your own network accepts",
        function="cbpq.exports.state_dict:export_state_dict",
        extensions=(".pth", ".safetensors"),
        options=("check", "fold_bn"),
        variants={"fold_bn": "cbpq.exports.folding:export_folded"},
    ),
    "onnx": Format(
        summary="an ONNX network whose constrained weights are 4-bit integers, or 2-bit with opset 25 where they fit",
        function="cbpq.exports.onnx:export_onnx",
        extensions=(".onnx",),
        needs_network=True,
        extra="onnx",
        modules=("onnx", "onnxscript", "onnxruntime"),
        options=("opset", "check"),
    ),
    "qonnx": Format(
        summary="ONNX for FPGA flows: constrained weights as integers of 1 to 4 bits, annotated as qonnx reads them",
        function="cbpq.exports.qonnx:export_qonnx",
        extensions=(".onnx",),
        by_ending=False,
        needs_network=True,
        extra="onnx",
        modules=("onnx", "onnxscript", "onnxruntime"),
        options=("check",),
    ),
    "torchao": Format(
        summary="int8 weights in torchao's safetensors layout, which torchao loads into the network",
        function="cbpq.exports.torchao:export_torchao",
        extensions=(".safetensors",),
        by_ending=False,
        needs_network=True,
        extra="torchao",
        modules=("torchao",),
        options=("check",),
    ),
    "pt2": Format(
        summary="a torch.export program with int8 weights that torch alone loads and runs",
        function="cbpq.exports.pt2:export_pt2",
        extensions=(".pt2",),
        needs_network=True,
        options=("check",),
    ),
    "c": Format(
        summary="a folder of C99 code for microcontrollers and FPGAs: adds and shifts for constrained weights",
        function="cbpq.exports.c:export_c",
        files=("network.h", "network.c", "main.c", "golden.h"),
        needs_network=True,
        options=("check", "activations", "data", "class_map"),
    ),
    "coreml": Format(
        summary="a Core ML package for Apple's systems, whose constrained weights are indices into palettes of levels",
        function="cbpq.exports.coreml:export_coreml",
        extensions=(".mlpackage",),
        files=("Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"),
        needs_network=True,
        extra="coreml",
        modules=("coremltools",),
        options=("check",),
    ),
    "hardware-report": Format(
        summary="a folder of what hardware has to do: operations, bits, ranges, energy, and golden vectors",
        function="cbpq.exports.hardware:hardware_report",
        files=("hardware.json", "hardware.md", "histogram.png", "golden.npz"),
        needs_network=True,
        options=("data", "class_map"),
    ),
    "cbpq": Format(
        summary="a cbpq file again, with its codes packed densely or its floats in half precision",
        function="cbpq.exports.smaller:export_cbpq",
        extensions=(".safetensors",),
        by_ending=False,
        options=("check", "pack", "half"),
    ),
}


def export(
    source: Path | str | CbpqFile,
    format: str,
    out: Path | str,
    *,
    model: "nn.Module | None" = None,
    spec: "InputSpec | None" = None,
    overwrite: bool = False,
    **options: Any,
) -> Exported:
    """Write ``source`` in another format, checked before it appears under the name ``out``.

    Args:
        source: a cbpq file, or what was read from one.
        format: a name from ``FORMATS``.
        out: the file to write, whose extension must be one of the format's, or the folder.
        model: the network with the weights of ``source``, for formats that need it; else it is rebuilt from ``source``.
        spec: the input of ``model``; without it, the one ``source`` states.
        overwrite: whether an existing ``out`` may be replaced.
        options: settings of the format, such as ``opset`` or ``check``; None stands for its default.

    Raises:
        UsageError: an unknown format or option, an extension that does not fit, an ``out`` that cannot be or exists.
        MissingPartError: the format's optional packages are not installed.
        CbpqError: ``source`` cannot be read or rebuilt, or the result did not pass its check; nothing was written.
    """
    out = Path(out)
    target, given = check_request(format, out, overwrite=overwrite, **options)
    file = source if isinstance(source, CbpqFile) else fileformat.read(Path(source))
    path, takes_network = target.chosen(given)
    module_name, _, name = path.partition(":")
    function = getattr(importlib.import_module(module_name), name)
    given = {name: value for name, value in given.items() if name not in target.variants}
    result: Exported
    if takes_network:
        network, input_spec = _network(file, model, spec)
        result = function(network, file, input_spec, out, **given)
    else:
        result = function(file, out, **given)
    return result


def check_request(format: str, out: Path, *, overwrite: bool = False, **options: Any) -> tuple[Format, dict[str, Any]]:
    """What can be said of an `export` before anything is read: its row in the table, and the options that are set.

    Raises:
        UsageError: an unknown format or option, an extension that does not fit, an ``out`` that cannot be or exists.
        MissingPartError: the format's optional packages are not installed.
    """
    target = FORMATS.get(format)
    if target is None:
        known = ", ".join(FORMATS)
        raise UsageError(f"unknown export format {format!r}{did_you_mean(format, FORMATS)}; there are {known}")
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in target.options:
            takes = ", ".join(target.options) or "none"
            raise UsageError(f"the export format {format} has no option {name!r}; it has {takes}")
    _check_out(out, format, target, overwrite)
    for module in target.modules:
        require_extra(module, target.extra)
    return target, given


def _check_out(out: Path, format: str, target: Format, overwrite: bool) -> None:
    if target.extensions and out.suffix not in target.extensions:
        what = "folders" if target.files else "files"
        endings = " or ".join(target.extensions)
        raise UsageError(f"the export format {format} writes {what} that end in {endings}, not {out.name!r}")
    if target.files:
        _check_out_folder(out, target, overwrite)
        return
    if out.is_dir():
        raise UsageError(f"{out} is a folder; name a file to write")
    if not out.parent.is_dir():
        raise UsageError(f"the folder {out.parent} does not exist; create it first or choose another")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists; choose another name or allow overwriting")


def _check_out_folder(out: Path, target: Format, overwrite: bool) -> None:
    """An old export may be replaced; a folder with anything else in it is not touched."""
    paths = [PurePosixPath(name) for name in target.files]
    expected = {str(part) for path in paths for part in (path, *path.parents)}
    try:
        inside = any(out.iterdir()) if out.exists() else False
        found = (path.relative_to(out).as_posix() for path in out.rglob("*"))
        other = next((name for name in found if name not in expected), None) if inside else None
        parent = out.absolute().parent.is_dir()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{out} cannot be the output ({reason}); name a new folder") from error
    if not parent:
        raise UsageError(f"the folder {out.parent} does not exist; create it first or choose another")
    if inside and not overwrite:
        raise UsageError(f"{out} exists; choose another name or allow overwriting")
    if other:
        raise UsageError(f"{out} holds {other}, which is no part of such an export; name another folder")


def _network(file: CbpqFile, model: "nn.Module | None", spec: "InputSpec | None") -> "tuple[nn.Module, InputSpec]":
    from cbpq.models import SourceInfo, from_cbpq_file

    if model is None:
        loaded = from_cbpq_file(file)
        return loaded.model, spec or loaded.info.input_spec
    return model, spec or SourceInfo.from_dict(file.source).input_spec
