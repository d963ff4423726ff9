"""``cbpq export``: a cbpq file in a format other tools read."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from cbpq import sections
from cbpq.cli import common
from cbpq.errors import UsageError
from cbpq.tables import accuracy_section

if TYPE_CHECKING:
    from cbpq.api import Measurement
    from cbpq.exports import Exported


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A cbpq file, such as out/model.safetensors.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="File to write, or folder for c and coreml.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="state-dict, onnx, qonnx, torchao, pt2, coreml, c (a folder), or cbpq to pack it otherwise; unless "
            "given, by the ending of OUT: .pth or .safetensors for state-dict, .onnx for onnx, .pt2, .mlpackage.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(
            "--opset", min=1, help="For onnx: operator set; 25 stores 2-bit weights.", rich_help_panel=common.OUTPUT
        ),
    ] = None,
    fold_bn: Annotated[
        bool,
        typer.Option(
            "--fold-bn",
            help="For state-dict: BatchNorms become part of the convolutions and linear layers before them.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = False,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Run the result in what it is meant for (onnxruntime, torchao, a C compiler), or read it "
            "(coremltools), before it is written; done unless refused.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            "--activations",
            metavar="NAME",
            help="For c: float (the default), or int8 for integers everywhere.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = None,
    pack: common.Pack = None,
    half: common.Half = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="For int8 and the hardware report: pictures that tell how large activations become; with int8, labels "
            "measure the accuracy. Without it, pictures are made of the network. For cbpq: measure what --half costs.",
            rich_help_panel=common.DATA,
        ),
    ] = None,
    class_map: common.ClassMap = None,
    hardware_report: Annotated[
        Path | None,
        typer.Option(
            "--hardware-report",
            metavar="FOLDER",
            help="Also, or instead of OUT, write what hardware has to do: operations, bits, ranges, energy, and golden "
            "vectors.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = None,
    arch: common.Arch = None,
    overwrite: common.Overwrite = False,
    json: common.Json = False,
) -> None:
    """Write a cbpq file for other tools: a state dict, a program, C code; the result is checked before it is written.

    Examples:

      cbpq export out/model.safetensors -o resnet18.pth
      cbpq export out/model.safetensors --fold-bn -o resnet18.pth
      cbpq export out/model.safetensors --format onnx -o resnet18.onnx
      cbpq export out/model.safetensors --format qonnx -o resnet18.onnx
      cbpq export out/model.safetensors --format c -o resnet18_c
      cbpq export out/model.safetensors --hardware-report resnet18_hardware --data imagenet/
      cbpq export out/model.safetensors -o resnet18.mlpackage
      cbpq export out/model.safetensors --format cbpq --pack dense --half --data imagenet/ -o small.safetensors
    """
    from cbpq.exports import FORMATS, check_request, export

    options = {
        "format": format,
        "opset": opset,
        "fold_bn": fold_bn or None,
        "check": check,
        "activations": activations,
        "pack": pack,
        "half": half or None,
    }
    if class_map is not None and data is None:
        raise UsageError("--class-map says which classes --data has; give both, or leave it out")
    wanted = _wanted(output, hardware_report, options, {"data": data, "class_map": class_map})
    for name, (out, given) in wanted.items():
        check_request(name, out, overwrite=overwrite, **given)
    measured = half and data is not None and "cbpq" in wanted
    model = spec = None
    if any(FORMATS[name].chosen(given)[1] for name, (_, given) in wanted.items()):
        if arch is not None:
            from cbpq.model_file import load

            loaded = load(file, arch=arch)
            model, spec = loaded.model, loaded.info.input_spec
    elif arch is not None and not measured:
        raise UsageError(f"--arch makes no sense with --format {min(wanted)}, which needs no network; leave it out")
    results = []
    for name, (out, given) in wanted.items():
        with common.stderr().status(Text(sections.printable(f"{name}: {out}"))):
            results.append(export(file, name, out, model=model, spec=spec, overwrite=overwrite, **given))
    cost = _cost(wanted["cbpq"][0], file, data, arch, class_map) if measured and data is not None else None
    if json:
        documents = [result.to_dict() for result in results]
        documents[-1] |= {"measured": cost.to_dict()} if cost else {}
        both = {**documents[-1], "hardware_report": documents[0]}
        common.print_json(both if len(documents) > 1 else documents[0])
        return
    for result in results:
        _show(result)
    if cost is not None:
        document = cost.to_dict()
        names = (document, document["original"], document["comparison"])
        sections.render(common.stdout(), accuracy_section(*names, name="half precision"))
    elif half:
        common.note(common.stderr(), f"not measured; cbpq evaluate {output} --data PATH --against {file} does that")


def _wanted(
    output: Path | None, report: Path | None, options: dict[str, Any], pictures: dict[str, Any]
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By format: where to, and its options. The report comes first, since it is the one that data can keep from being.

    Raises:
        UsageError: neither is wanted, or one is in the other's place.
    """
    wanted: dict[str, tuple[Path, dict[str, Any]]] = {}
    if output is None and report is None:
        raise UsageError("nothing to write: name a file with --output, or a folder with --hardware-report")
    if report is not None:
        wanted["hardware-report"] = report, pictures
    if output is None:
        if unused := [name for name, value in options.items() if value is not None]:
            flag = f"--{unused[0].replace('_', '-')}"
            raise UsageError(f"{flag} is about what --output names, and there is none; add it, or leave it out")
        return wanted
    chosen = options.pop("format") or format_of(output)
    if report is not None:
        places = Path(os.path.abspath(output)), Path(os.path.abspath(report))
        if any(one == other or one in other.parents for one, other in (places, places[::-1])):
            raise UsageError(f"--output {output} and --hardware-report {report} are in each other's place")
        if chosen in wanted:
            raise UsageError(f"--format {chosen} and --hardware-report are the same; give one of them")
    # beside a report, pictures need not be for the format
    calibrates = report is None or options["activations"] == "int8"
    if chosen == "cbpq" and options["half"]:
        calibrates = False  # they measure what was written
    wanted[chosen] = output, {**options, **(pictures if calibrates else {})}
    return wanted


def _show(result: "Exported") -> None:
    console = common.stdout()
    whole = sections.size(result.float32_size)
    line = f"{result.path}: {result.format}, {sections.size(result.size)} (the network in FP32: {whole})"
    console.print(Text(sections.printable(line)), soft_wrap=True)
    for name, value in result.facts.items():
        if not sections.is_empty(value):
            fact = f"  {name.replace('_', ' ')}: {sections.anything(value)}"
            console.print(Text(sections.printable(fact)), soft_wrap=True)
    for text in result.notes:
        common.note(common.stderr(), text)


def _cost(output: Path, file: Path, data: str, arch: str | None, class_map: Path | None) -> "Measurement":
    """The written network beside the one it was made from."""
    from cbpq.api import evaluate

    with common.progress(common.stderr(), "evaluating") as bar:
        task = bar.add_task("", total=None)
        return evaluate(
            output,
            data,
            against=file,
            arch=arch,
            class_map=class_map,
            on_start=lambda batches: bar.update(task, total=batches),
            on_batch=lambda: bar.advance(task),
        )


def format_of(output: Path) -> str:
    """The first format in the table that writes files with this ending.

    Raises:
        UsageError: none does.
    """
    from cbpq.exports import FORMATS

    for name, target in FORMATS.items():
        if target.by_ending and output.suffix in target.extensions:
            return name
    known = ", ".join(f"{name} ({' or '.join(target.extensions) or 'a folder'})" for name, target in FORMATS.items())
    ending = output.suffix or "nothing"
    raise UsageError(f"{output.name}: no format ends in {ending}; give --format: {known}")
