"""``cbpq evaluate``: how good a network is, and how it differs from the original."""

import os
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from cbpq import sections
from cbpq.cli import common
from cbpq.errors import UsageError
from cbpq.tables import accuracy_section


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A cbpq file, a weight file, a name such as resnet18 or timm:NAME, or module:function.",
        ),
    ],
    data: common.DataPath,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="SOURCE",
            help="The original: measured too, and compared image by image. With a cbpq file, --weights and "
            "--pretrained are about it.",
            rich_help_panel=common.MODEL,
        ),
    ] = None,
    weights: common.Weights = None,
    arch: common.Arch = None,
    pretrained: common.Pretrained = False,
    input_size: common.InputSize = None,
    mean: common.Mean = None,
    std: common.Std = None,
    interpolation: common.Interpolation = None,
    crop_pct: common.CropPct = None,
    class_map: common.ClassMap = None,
    skip_bad_images: common.SkipBadImages = False,
    batch_size: common.BatchSize = 128,
    workers: common.Workers = 0,
    device: common.Device = "auto",
    amp: common.Amp = False,
    min_top1: common.MinTop1 = None,
    max_drop: common.MaxDrop = None,
    min_agreement: common.MinAgreement = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Measure top-1, top-5 and loss of a network, each with its 95 % interval; each image counts once. On pictures
    without labels, --against measures how often it agrees with the original.

    Examples:

      cbpq evaluate out/model.safetensors --data cifar10.npz
      cbpq evaluate out/model.safetensors --data imagenet/ --against resnet18.pth --max-drop 1
      cbpq evaluate resnet18.pth --data imagenet/val --class-map classes.txt --json
    """
    for flag, bound in (("--max-drop", max_drop), ("--min-agreement", min_agreement)):
        if bound is not None and against is None:
            raise UsageError(f"{flag} needs the original to compare with; add --against SOURCE")
    overrides = common.input_overrides(input_size, mean, std, interpolation, crop_pct)

    from cbpq import distributed
    from cbpq.api import evaluate

    distributed.join(os.environ)
    notes = common.stderr(quiet or not distributed.is_main())
    with common.progress(notes, "evaluating") as bar:
        task = bar.add_task("", total=None)
        measured = evaluate(
            source,
            data,
            against=against,
            weights=weights,
            arch=arch,
            pretrained=pretrained,
            input_overrides=overrides,
            class_map=class_map,
            skip_bad_images=skip_bad_images,
            batch_size=batch_size,
            workers=workers,
            device=device,
            amp=amp,
            on_start=lambda batches: bar.update(task, total=batches),
            on_batch=lambda: bar.advance(task),
        )
    result = measured.result
    common.check_labels_for_gates(result.top1 is not None, min_top1=min_top1, max_drop=max_drop)
    for text in measured.notes:
        common.note(notes, text)
    document = measured.to_dict()
    if json and distributed.is_main():
        common.print_json(document)
    elif distributed.is_main():
        _render(common.stdout(), document)
    common.check_gates(
        result.top1,
        result.reference.top1 if result.reference else None,
        agreement=result.comparison.agreement if result.comparison else None,
        min_top1=min_top1,
        max_drop=max_drop,
        min_agreement=min_agreement,
    )


def _render(console: Console, document: dict[str, Any]) -> None:
    section = accuracy_section(document, document["original"], document["comparison"], name="this network")
    network = document["network"]["architecture"]
    console.print(Text(sections.printable(f"{document['source']}: {network}"), style="bold"), soft_wrap=True)
    console.print()
    sections.render(console, section)
    skipped = document["data"].get("skipped_images") or []
    if skipped:
        console.print(Text(f"{len(skipped)} pictures could not be read and do not count.", style="yellow"))
    speed = f"{sections.count(document['images_per_second'])} images/s on {document['device']}"
    console.print(Text(speed, style="dim"))
