"""What the commands share: options spelt once, consoles, JSON output, progress and gates."""

import json
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cbpq.errors import GateError, UsageError
from cbpq.plain import plain

CONSTRAINT = "Constraint and method"
MODEL = "Network"
DATA = "Data"
RUN = "Running"
OUTPUT = "Output"
GATES = "Gates (exit code 3 when missed)"


def method_names() -> list[str]:
    """Names of the methods, which are their files', so that help does without torch."""
    files = pkgutil.iter_modules([str(Path(__file__).parents[1] / "methods")])
    return [file.name.replace("_", "-") for file in files if file.name != "base"]


Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="Weights for a named or callable network.", rich_help_panel=MODEL),
]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar="NAME",
        help="Architecture of a weight file that does not tell; or the callable that builds a cbpq file's network.",
        rich_help_panel=MODEL,
    ),
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="Download the weights the library has for it.", rich_help_panel=MODEL)
]
InputSize = Annotated[
    str | None,
    typer.Option(
        "--input-size",
        metavar="SIZE",
        help="Input size: 224, 224x288 (height x width) or 3x224x224.",
        rich_help_panel=MODEL,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option("--mean", metavar="R,G,B", help="Mean of the normalisation, 0 to 1.", rich_help_panel=MODEL),
]
Std = Annotated[
    str | None,
    typer.Option("--std", metavar="R,G,B", help="Deviation of the normalisation.", rich_help_panel=MODEL),
]
Interpolation = Annotated[
    str | None,
    typer.Option("--interpolation", metavar="NAME", help="bilinear, bicubic, nearest …", rich_help_panel=MODEL),
]
CropPct = Annotated[
    float | None,
    typer.Option(
        "--crop-pct",
        metavar="SHARE",
        help="Share of the resized picture that the centre crop keeps, such as 0.875.",
        rich_help_panel=MODEL,
    ),
]
DataPath = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="PATH",
        help="Folder with train/ and val/, folder of class folders or of pictures without labels, .npz file, or a timm "
        "reader such as hfds/….",
        rich_help_panel=DATA,
    ),
]
ClassMap = Annotated[
    Path | None,
    typer.Option(
        "--class-map",
        metavar="FILE",
        help="Class names, one a line in index order, for a folder that holds only some of them.",
        rich_help_panel=DATA,
    ),
]
SkipBadImages = Annotated[
    bool,
    typer.Option(
        "--skip-bad-images", help="Count and report pictures that cannot be read, do not stop.", rich_help_panel=DATA
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any other setting; quantize --dry-run shows all.",
        rich_help_panel=CONSTRAINT,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="TOML file with settings.", rich_help_panel=CONSTRAINT),
]
ValFromTrain = Annotated[
    float | None,
    typer.Option(
        "--val-from-train",
        metavar="SHARE",
        help="Measure on this share of the training data, held out, instead of the validation data: for tuning.",
        rich_help_panel=DATA,
    ),
]
LimitTrain = Annotated[
    int | None,
    typer.Option("--limit-train", metavar="N", min=1, help="Use N training images only.", rich_help_panel=DATA),
]
ChosenDevice = Annotated[  # None lets a variable or a configuration file say
    str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=RUN)
]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images at a time.", rich_help_panel=RUN)]
Workers = Annotated[
    int, typer.Option("--workers", "-j", min=0, help="Processes that read pictures; 0 reads here.", rich_help_panel=RUN)
]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=RUN)
]
Amp = Annotated[bool, typer.Option("--amp", help="Compute in mixed precision.", rich_help_panel=RUN)]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.", rich_help_panel=RUN)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.", rich_help_panel=OUTPUT)]
Pack = Annotated[  # None lets a variable or a configuration file say, or a file stay as it is
    str | None,
    typer.Option(
        "--pack",
        metavar="NAME",
        help="bits: whole bits for each code. dense: several codes as one number, where that takes less (three levels "
        "1.6 bits, five 2.4, seven 2.91); such a file cannot be read by cbpq 0.1.0.",
        rich_help_panel=OUTPUT,
    ),
]
Half = Annotated[
    bool,
    typer.Option("--half", help="Tensors that stay float in half precision.", rich_help_panel=OUTPUT),
]
MinTop1 = Annotated[
    float | None,
    typer.Option("--min-top1", metavar="PERCENT", min=0, max=100, help="Least top-1 accuracy.", rich_help_panel=GATES),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop", metavar="POINTS", help="Most points of top-1 below the original.", rich_help_panel=GATES
    ),
]

MinAgreement = Annotated[
    float | None,
    typer.Option(
        "--min-agreement",
        metavar="PERCENT",
        min=0,
        max=100,
        help="Least share of pictures with the original's answer; needs no labels.",
        rich_help_panel=GATES,
    ),
]


def stdout() -> Console:
    """The console for results."""
    return Console(highlight=False)


def stderr(quiet: bool = False) -> Console:
    """The console for progress, notes and errors; a quiet one prints nothing."""
    return Console(stderr=True, highlight=False, quiet=quiet)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(plain(document), indent=2) + "\n")


def note(console: Console, text: str) -> None:
    """Print one line of text as it is, whatever brackets it holds."""
    console.print(text, markup=False, soft_wrap=True, style="dim")


def warn(console: Console, text: str) -> None:
    """Print one warning."""
    console.print(f"warning: {text}", markup=False, soft_wrap=True, style="yellow")


@contextmanager
def progress(console: Console, label: str) -> Iterator[Progress]:
    """Show a bar on a terminal, and nothing at all elsewhere: a log has no use for one."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = console.quiet or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        yield bar


def input_overrides(
    input_size: str | None, mean: str | None, std: str | None, interpolation: str | None, crop_pct: float | None
) -> dict[str, Any]:
    """The preprocessing flags as the overrides ``load_model`` takes, unset ones left out.

    Raises:
        UsageError: a size or a list of numbers that cannot be read.
    """
    given = {
        "input_size": _size(input_size),
        "mean": _numbers("--mean", mean),
        "std": _numbers("--std", std),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
    }
    return {name: value for name, value in given.items() if value is not None}


def check_labels_for_gates(labelled: bool, *, min_top1: float | None, max_drop: float | None) -> None:
    """Refuse bounds on an accuracy that will not be known.

    Raises:
        UsageError: one is set, and the validation pictures have no labels.
    """
    for flag, bound in (("--min-top1", min_top1), ("--max-drop", max_drop)):
        if bound is not None and not labelled:
            raise UsageError(f"{flag} needs labelled validation pictures; use --min-agreement")


def check_gates(
    top1: float | None,
    original_top1: float | None = None,
    *,
    agreement: float | None = None,
    min_top1: float | None = None,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    file_bytes: float | None = None,
    max_megabytes: float | None = None,
) -> None:
    """Hold a top-1 accuracy and an agreement in percent, and the size of a file, against the bounds the user set. What
    is None is not known, and held against nothing.

    Raises:
        GateError: a bound is missed; the message holds both numbers.
    """
    if min_top1 is not None and top1 is not None and not top1 >= min_top1:
        raise GateError(f"top-1 is {top1:.2f} %, below --min-top1 {min_top1:g} %")
    if min_agreement is not None and agreement is not None and not agreement >= min_agreement:
        raise GateError(
            f"{agreement:.2f} % of the images have the original's answer, below --min-agreement {min_agreement:g} %"
        )
    if top1 is not None and original_top1 is not None and max_drop is not None:
        drop = original_top1 - top1
        if not drop <= max_drop:
            raise GateError(
                f"top-1 fell by {drop:.2f} points ({original_top1:.2f} % to {top1:.2f} %), "
                f"more than --max-drop {max_drop:g}"
            )
    if max_megabytes is not None and file_bytes is not None and not file_bytes <= max_megabytes * 1e6:
        raise GateError(f"the file is {file_bytes / 1e6:.3f} MB, more than --max-size {max_megabytes:g} MB")


def _size(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.lower().replace(",", "x").replace("×", "x").split("x")
    if not all(part.strip().isdecimal() for part in parts) or len(parts) > 3:
        raise UsageError(f"--input-size {text!r} is no size; write 224, 224x288 (height x width) or 3x224x224")
    sides = tuple(int(part) for part in parts)
    return sides * 2 if len(sides) == 1 else sides


def _numbers(flag: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise UsageError(
            f"{flag} {text!r} is no list of numbers; write one per channel, as 0.485,0.456,0.406"
        ) from error
