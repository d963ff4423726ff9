"""``cbpq compare``: methods and constraints side by side."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cbpq.cli import common
from cbpq.errors import MissingPartError


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="A weight file, a torchvision name, timm:NAME, hf-hub:ORG/NAME, or package.module:callable.",
            show_default=False,
        ),
    ],
    data: common.DataPath,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the results.", rich_help_panel=common.OUTPUT),
    ],
    constraints: Annotated[
        list[str] | None,
        typer.Option(
            "--constraint",
            "-c",
            metavar="NAME",
            help="binary, ternary, one-bit-shift, two-bit-shift (default), shift:K or levels:Q,Q,…; repeatable.",
            rich_help_panel=common.CONSTRAINT,
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="Repeatable; by default each that can have the constraint.",
            rich_help_panel=common.CONSTRAINT,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs", metavar="N", help="Passes over the data of each run.", rich_help_panel=common.CONSTRAINT
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds", metavar="N", min=1, help="Runs of each, from --first-seed on.", rich_help_panel=common.CONSTRAINT
        ),
    ] = 3,
    first_seed: Annotated[
        int,
        typer.Option(
            "--first-seed",
            metavar="N",
            min=0,
            help="Seed of the first run of each: to run parts of a comparison apart.",
            rich_help_panel=common.CONSTRAINT,
        ),
    ] = 0,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", metavar="NAME", help="default, little-data or paper.", rich_help_panel=common.CONSTRAINT
        ),
    ] = None,
    assignments: common.Assignments = None,
    config: common.Config = None,
    weights: common.Weights = None,
    arch: common.Arch = None,
    pretrained: common.Pretrained = False,
    input_size: common.InputSize = None,
    mean: common.Mean = None,
    std: common.Std = None,
    interpolation: common.Interpolation = None,
    crop_pct: common.CropPct = None,
    class_map: common.ClassMap = None,
    val_from_train: common.ValFromTrain = None,
    limit_train: common.LimitTrain = None,
    workers: common.Workers = 2,
    device: common.ChosenDevice = None,
    amp: common.Amp = False,
    max_time: Annotated[
        float | None,
        typer.Option("--max-time", metavar="MINUTES", help="Budget of each run in time.", rich_help_panel=common.RUN),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="FILE",
            help="An earlier comparison.json: show the differences, and which are significant.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the runs in the output.", rich_help_panel=common.OUTPUT),
    ] = False,
    overwrite: common.Overwrite = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Compare methods on equal terms: every method with every constraint and seed, same data, start and budget.

    Writes comparison.json, comparison.md and comparison.png; each run is in a folder of its own under runs/.

    Examples:

      cbpq compare resnet20.safetensors --data cifar10.npz -c binary -c ternary --epochs 10 -o compared
      cbpq compare resnet18.pth --data imagenet/ --method cbp --method proxquant --seeds 1 --max-time 60 -o compared
      cbpq compare resnet18.pth --data imagenet/ -o again --against compared/comparison.json
    """
    from cbpq.configuration import combine

    flags: dict[str, Any] = {"preset": preset, "device": device, "amp": amp or None, "epochs": epochs}
    choices, _, layers = combine(flags, assignments or [], os.environ, config)
    one_constraint, _ = choices.pop("constraint"), choices.pop("method")
    overrides = common.input_overrides(input_size, mean, std, interpolation, crop_pct)

    from cbpq.cli.display import Display
    from cbpq.comparison import Cell, compare_methods
    from cbpq.planning import Plan
    from cbpq.plotting import plot
    from cbpq.standings import Outcome, score_table

    console = common.stderr(quiet)
    warned: set[str] = set()
    with Display(console) as display:

        def on_run(number: int, total: int, cell: Cell, job: Plan, done: Sequence[Outcome]) -> None:
            display.above = _table(score_table(done)) if done else None
            common.note(console, f"run {number}/{total}: {cell.method}, {cell.constraint}, seed {cell.seed}")
            for text in job.warnings:
                if text not in warned:  # the next seed's are the same
                    common.warn(console, text)
                    warned.add(text)

        comparison = compare_methods(
            source,
            data,
            output,
            constraints=constraints or [one_constraint],
            methods=methods or None,
            seeds=seeds,
            first_seed=first_seed,
            against=against,
            resume=resume,
            overwrite=overwrite,
            listener=display.show,
            should_stop=display.should_stop,
            on_run=on_run,
            command=shlex.join(["cbpq", *sys.argv[1:]]),
            settings=layers,
            weights=weights,
            arch=arch,
            pretrained=pretrained,
            input_overrides=overrides,
            class_map=class_map,
            val_from_train=val_from_train,
            limit_train=limit_train,
            workers=workers,
            max_minutes=max_time,
            **choices,
        )
    written = ["comparison.json", "comparison.md"]
    try:
        plot(comparison, output / "comparison.png")
        written.append("comparison.png")
    except MissingPartError as error:  # the numbers are there: no reason to fail
        common.warn(console, str(error))
    if json:
        common.print_json(comparison.to_dict())
    else:
        comparison.render(common.stdout())
    common.note(console, f"wrote {', '.join(written)} to {output}")


def _table(rows: Sequence[tuple[str, str, str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("constraint", "method", "so far"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table
