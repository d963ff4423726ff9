"""``cbpq export``: a cbpq file in a format other tools read."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cbpq import sections
from cbpq.cli import common
from cbpq.errors import UsageError


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A cbpq file, such as out/model.safetensors.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="File to write, or folder for c.", rich_help_panel=common.OUTPUT
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="state-dict (.pth or .safetensors), onnx (.onnx) or c (a folder); unless given, by the ending of OUT.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(
            "--opset", min=1, help="ONNX operator set; 25 stores 2-bit weights.", rich_help_panel=common.OUTPUT
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Run the result in what it is meant for (onnxruntime, a C compiler) before it is written.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = True,
    activations: Annotated[
        str | None,
        typer.Option(
            "--activations",
            metavar="NAME",
            help="For c: float (the default), or int8 for integers everywhere.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="For int8: pictures that tell how large activations become; labels, if any, measure the accuracy. "
            "Without it, pictures are made of the network.",
            rich_help_panel=common.DATA,
        ),
    ] = None,
    arch: common.Arch = None,
    overwrite: common.Overwrite = False,
    json: common.Json = False,
) -> None:
    """Write a cbpq file as a state dict, an ONNX network or C code; the result is checked before it is written.

    Examples:

      cbpq export out/model.safetensors -o resnet18.pth
      cbpq export out/model.safetensors --format onnx -o resnet18.onnx
      cbpq export out/model.safetensors --format c -o resnet18_c
    """
    from cbpq.exports import FORMATS, export

    chosen = format or format_of(output)
    model = spec = None
    if arch is not None:
        if chosen in FORMATS and not FORMATS[chosen].needs_network:
            raise UsageError(f"--arch makes no sense with --format {chosen}, which needs no network; leave it out")
        from cbpq.model_file import load

        loaded = load(file, arch=arch)
        model, spec = loaded.model, loaded.info.input_spec
    options = {"opset": opset, "check": check, "activations": activations, "data": data}
    result = export(file, chosen, output, model=model, spec=spec, overwrite=overwrite, **options)
    if json:
        common.print_json(result.to_dict())
        return
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


def format_of(output: Path) -> str:
    """The format that alone writes files with this ending.

    Raises:
        UsageError: none does, or several do.
    """
    from cbpq.exports import FORMATS

    fits = [name for name, target in FORMATS.items() if output.suffix in target.extensions]
    if len(fits) == 1:
        return fits[0]
    known = ", ".join(f"{name} ({' or '.join(target.extensions) or 'a folder'})" for name, target in FORMATS.items())
    why = f"several formats end in {output.suffix}" if fits else f"no format ends in {output.suffix or 'nothing'}"
    raise UsageError(f"{output.name}: {why}; give --format: {known}")
