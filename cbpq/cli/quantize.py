"""``cbpq quantize``: the main job."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cbpq.cli import processes
from cbpq.cli.common import (
    CONSTRAINT,
    DATA,
    GATES,
    OUTPUT,
    RUN,
    Arch,
    Assignments,
    ChosenDevice,
    ClassMap,
    Config,
    CropPct,
    Half,
    InputSize,
    Interpolation,
    Json,
    LimitTrain,
    MaxDrop,
    Mean,
    MinAgreement,
    MinTop1,
    Overwrite,
    Pack,
    Pretrained,
    Quiet,
    SkipBadImages,
    Std,
    ValFromTrain,
    Weights,
    Workers,
    check_gates,
    check_labels_for_gates,
    input_overrides,
    method_names,
    note,
    print_json,
    stderr,
    stdout,
    warn,
)


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="A weight file, a torchvision name, timm:NAME, hf-hub:ORG/NAME, or package.module:callable.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Folder with train/ and val/, folder of class folders or of pictures without labels, .npz file, or a "
            "timm reader such as hfds/…. Without it, pictures are synthesised from the network.",
            rich_help_panel=DATA,
        ),
    ] = None,
    constraint: Annotated[
        str | None,
        typer.Option(
            "--constraint",
            "-c",
            metavar="NAME",
            help="binary, ternary, one-bit-shift, two-bit-shift (default), shift:K or levels:Q,Q,…",
            rich_help_panel=CONSTRAINT,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help=f"How weights are led there: {', '.join(method_names())}; cbp by default.",
            rich_help_panel=CONSTRAINT,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="default: short recipe for a budget of epochs. little-data: for few pictures without labels, or none. "
            "paper: as published. By itself default or little-data, as the data are.",
            rich_help_panel=CONSTRAINT,
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", metavar="N", help="Passes over the data.", rich_help_panel=CONSTRAINT)
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            "--rounding",
            metavar="RULE",
            help="First rounding: nearest, or compensated for its own errors. --epochs 0 stops after it.",
            rich_help_panel=CONSTRAINT,
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", metavar="X", help="Learning rate.", rich_help_panel=CONSTRAINT)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "-b", metavar="N", help="Images per step.", rich_help_panel=CONSTRAINT),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", help="Seed of everything random.", rich_help_panel=CONSTRAINT),
    ] = None,
    assignments: Assignments = None,
    config: Config = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="GLOB", help="Constrain only these layers.", rich_help_panel=CONSTRAINT),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="GLOB", help="Leave these layers in float.", rich_help_panel=CONSTRAINT),
    ] = None,
    quantize_first: Annotated[
        bool, typer.Option("--quantize-first", help="The first convolution too.", rich_help_panel=CONSTRAINT)
    ] = False,
    quantize_last: Annotated[
        bool, typer.Option("--quantize-last", help="The classifier too.", rich_help_panel=CONSTRAINT)
    ] = False,
    weights: Weights = None,
    arch: Arch = None,
    pretrained: Pretrained = False,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    crop_pct: CropPct = None,
    class_map: ClassMap = None,
    skip_bad_images: SkipBadImages = False,
    augment: Annotated[
        str | None,
        typer.Option(
            "--augment", metavar="KIND", help="auto, none, crop or crop-flip, for training.", rich_help_panel=DATA
        ),
    ] = None,
    val_from_train: ValFromTrain = None,
    limit_train: LimitTrain = None,
    calibration: Annotated[
        int | None,
        typer.Option(
            "--calibration",
            metavar="N",
            min=1,
            help="Use N pictures where they have no labels (1024, or all there are); without data, synthesise N.",
            rich_help_panel=DATA,
        ),
    ] = None,
    save_synthetic: Annotated[
        Path | None,
        typer.Option(
            "--save-synthetic",
            metavar="FOLDER",
            help="Without data: keep the synthesised pictures, and a contact sheet of them.",
            rich_help_panel=DATA,
        ),
    ] = None,
    workers: Workers = 2,
    device: ChosenDevice = None,
    amp: Annotated[bool, typer.Option("--amp", help="Compute in mixed precision.", rich_help_panel=RUN)] = False,
    nproc_per_node: Annotated[
        int | None,
        typer.Option(
            "--nproc-per-node",
            metavar="N",
            min=1,
            help="Start N processes, each with a GPU of its own; --batch-size is that of all together. As torchrun.",
            rich_help_panel=RUN,
        ),
    ] = None,
    max_time: Annotated[
        float | None,
        typer.Option("--max-time", metavar="MINUTES", help="Finish training after this time.", rich_help_panel=RUN),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder for the results; by default named after source and constraint.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    pack: Pack = None,
    half: Half = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run in the output.", rich_help_panel=OUTPUT)
    ] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show every setting and layer, and do nothing.", rich_help_panel=OUTPUT),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    min_top1: MinTop1 = None,
    max_drop: MaxDrop = None,
    min_agreement: MinAgreement = None,
    max_size: Annotated[
        float | None,
        typer.Option("--max-size", metavar="MB", help="Largest file, in megabytes.", rich_help_panel=GATES),
    ] = None,
) -> None:
    """Lead a network's weights to a few allowed values; write one small file and a report.

    Examples:

      cbpq quantize resnet18.pth --data imagenet/ --constraint two-bit-shift
      cbpq quantize timm:resnet18.a1_in1k --pretrained --data imagenet/ -c ternary --epochs 3 -o out
      cbpq quantize nets.my:make --weights my.pth --data pictures.npz -c binary --min-top1 90
      cbpq quantize resnet18.pth --data folder-of-pictures/ --calibration 256 --min-agreement 90
      cbpq quantize resnet18.pth --constraint two-bit-shift
    """
    if nproc_per_node not in (None, 1) and not dry_run and not processes.is_launched():
        raise typer.Exit(processes.launch(nproc_per_node))

    from cbpq.configuration import combine

    flags: dict[str, Any] = {
        "constraint": constraint,
        "method": method,
        "preset": preset,
        "include": include,
        "exclude": exclude,
        "quantize_first": quantize_first or None,
        "quantize_last": quantize_last or None,
        "augment": augment,
        "device": device,
        "amp": amp or None,
        "pack": pack,
        "half": half or None,
        "epochs": epochs,
        "rounding": rounding,
        "lr": lr,
        "batch_size": batch_size,
        "seed": seed,
    }
    choices, origins, layers = combine(flags, assignments or [], os.environ, config)
    overrides = input_overrides(input_size, mean, std, interpolation, crop_pct)

    from cbpq import distributed
    from cbpq.cli.display import Display, show_plan
    from cbpq.levels import level_set
    from cbpq.outputs import claim_output, is_finished, state_file
    from cbpq.pipeline import execute
    from cbpq.planning import check_labels_for_loss, plan

    distributed.join(os.environ)
    quiet = quiet or not distributed.is_main()
    console = stderr(quiet)
    folder = output or default_output(source, level_set(choices["constraint"]).name)
    if processes.restarts():
        note(console, f"a process died; this is restart {processes.restarts()} of {processes.most_restarts()}")
        if distributed.from_main(lambda: is_finished(folder) and not overwrite):
            return
        resume = distributed.from_main(lambda: resume or state_file(folder).exists())
        overwrite = overwrite and not resume
    if not dry_run and distributed.is_main():
        claim_output(folder, resume=resume, overwrite=overwrite)
    job = plan(
        source,
        data=data,
        settings=layers,
        weights=weights,
        arch=arch,
        pretrained=pretrained,
        input_overrides=overrides,
        class_map=class_map,
        skip_bad_images=skip_bad_images,
        val_from_train=val_from_train,
        limit_train=limit_train,
        calibration=calibration,
        save_synthetic=save_synthetic,
        workers=workers,
        max_minutes=max_time,
        command=shlex.join(["cbpq", *sys.argv[1:]]),
        resume=resume,
        **choices,
    )
    check_labels_for_gates(job.data is not None and job.data.val_labelled, min_top1=min_top1, max_drop=max_drop)
    if dry_run:
        if distributed.is_main():
            show_plan(job, origins, stdout(), as_json=json)
        return
    check_labels_for_loss(job)
    for text in job.warnings:
        warn(console, text)
    with Display(console) as display:
        report = execute(
            job, folder, resume=resume, overwrite=overwrite, listener=display.show, should_stop=display.should_stop
        )
    if json and distributed.is_main():
        print_json(report.to_dict())
    elif distributed.is_main():
        report.render(stdout())
    note(console, f"wrote {folder / 'model.safetensors'}, report.md and report.json beside it")
    quantized, original, comparison = report.quantized or {}, report.original or {}, report.comparison or {}
    check_gates(
        quantized["top1"],
        original["top1"],
        agreement=comparison["agreement"],
        min_top1=min_top1,
        max_drop=max_drop,
        min_agreement=min_agreement,
        file_bytes=report.sizes["file_bytes"],
        max_megabytes=max_size,
    )


def default_output(source: str, constraint: str) -> Path:
    """A folder in the current one, named after source and constraint: ``resnet18-two-bit-shift``."""
    name = Path(source.rpartition(":")[2]).stem  # of a file, of timm:resnet18.a1_in1k, of package.nets:make
    return Path(f"{name or 'network'}-{constraint}".replace(":", "-").replace("/", "-"))
