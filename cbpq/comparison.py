"""Methods side by side: every combination of methods, constraints and seeds, run and measured alike.

Each combination is a run of ``cbpq.pipeline`` in a folder of its own, ``OUT/runs/METHOD-CONSTRAINT-SEED``. All take the
same data in the same order for a seed, start from the same network, have the same budget and are measured on the same
pictures. What is finished stays finished: the comparison can be stopped and resumed at any moment.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from cbpq.atomic import atomic_write
from cbpq.errors import CbpqError, UsageError, brief
from cbpq.events import Event
from cbpq.levels import level_set
from cbpq.locking import check_free, held
from cbpq.methods import METHODS, method_class
from cbpq.outputs import state_file
from cbpq.pipeline import execute
from cbpq.plain import plain
from cbpq.planning import FREE_SETTINGS, Plan, plan
from cbpq.standings import Comparison, Outcome, read_comparison
from cbpq.training import EpochEnd


@dataclass(frozen=True)
class Cell:
    """One run to be made."""

    method: str
    constraint: str
    seed: int

    @property
    def folder(self) -> str:
        """The name of its folder, such as ``cbp-two-bit-shift-0``."""
        return f"{self.method}-{self.constraint}-{self.seed}".replace(":", "_").replace(",", "_")


def compare_methods(
    source: str,
    data: str,
    output: Path,
    *,
    constraints: Sequence[str],
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    first_seed: int = 0,
    against: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    listener: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    on_run: Callable[[int, int, Cell, Plan, Sequence[Outcome]], None] = lambda number, total, cell, job, done: None,
    command: str = "",
    settings: Sequence[tuple[str, Mapping[str, Any]]] = (),
    **choices: Any,
) -> Comparison:
    """Run and measure every combination; all results are in ``output``.

    Args:
        source: see ``cbpq.models.load_model``.
        data: see ``cbpq.data.load_data``; the same for all runs.
        output: folder for the results.
        constraints: see ``cbpq.levels.level_set``.
        methods: see ``cbpq.methods``; None for each that can have the constraint.
        seeds: how many.
        first_seed: the first of them, the others follow it; so parts of a comparison can be run apart.
        against: an earlier ``comparison.json`` to compare with.
        resume: go on with what is in ``output``; finished runs are kept.
        overwrite: replace what is in ``output``.
        listener: called with every event of every run.
        should_stop: asked at every event; True saves and ends with Interrupted.
        on_run: called before each run with its number from 1, their count, the run, its plan, and the outcomes so far.
        command: the command line, for the report.
        settings: see ``cbpq.presets.resolve``; the same for all runs, but for the seed.
        **choices: see ``cbpq.planning.plan``.

    Raises:
        CbpqError: what went wrong; finished runs are intact.
        Interrupted: ``should_stop`` said so.
    """
    cells = combinations(constraints, methods, seeds, first_seed)
    earlier = read_comparison(against) if against is not None else None
    _claim(output, cells, resume=resume, overwrite=overwrite)
    outcomes: dict[Cell, Outcome] = {}
    comparison: Comparison | None = None

    def to_make(cell: Cell) -> bool:
        folder = output / "runs" / cell.folder
        return overwrite or state_file(folder).exists() or not (folder / "report.json").exists()

    with held(output):
        # what is finished comes first: whether it may stay is known before hours go into the others
        for number, cell in enumerate(sorted(cells, key=to_make), 1):
            folder = output / "runs" / cell.folder
            seeded = [*settings, ("the comparison", {"seed": cell.seed})]
            unfinished = state_file(folder).exists() and not overwrite
            job = plan(
                source,
                data=data,
                constraint=cell.constraint,
                method=cell.method,
                settings=seeded,
                command=command,
                resume=unfinished,
                **choices,
            )
            on_run(number, len(cells), cell, job, in_order(outcomes, cells))
            if to_make(cell):
                execute(job, folder, resume=unfinished, overwrite=overwrite, listener=listener, should_stop=should_stop)
            report, outcomes[cell] = _finished(folder, cell, job)
            comparison = comparison_of(report, job, in_order(outcomes, cells), command, earlier)
            texts = {
                "comparison.json": json.dumps(comparison.to_dict(), indent=1),
                "comparison.md": comparison.to_markdown(),
            }
            for name, text in texts.items():
                atomic_write(output / name, text.encode())
    if comparison is None:
        raise UsageError("there is nothing to compare")
    return comparison


def combinations(
    constraints: Sequence[str], methods: Sequence[str] | None, seeds: int, first_seed: int = 0
) -> list[Cell]:
    """All runs, the first seed of every combination first.

    Raises:
        UsageError: an unknown name, one given twice, none, or a method that cannot have one of the constraints.
    """
    for what, names in (("constraint", constraints), ("method", METHODS if methods is None else methods)):
        if not names:
            raise UsageError(f"give at least one --{what}")
        for name in names:
            if list(names).count(name) > 1:
                raise UsageError(f"--{what} {name} was given twice")
    chosen_seeds = seed_range(seeds, first_seed)
    pairs = []
    for levels, method in product(map(level_set, constraints), METHODS if methods is None else methods):
        try:
            method_class(method).check(levels)
        except UsageError:
            if methods is not None:  # this method was asked for by name
                raise
        else:
            pairs.append((levels.name, method))
    return [Cell(method, name, seed) for seed in chosen_seeds for name, method in pairs]


def seed_range(seeds: int, first_seed: int) -> range:
    """As many seeds, from the first one on.

    Raises:
        UsageError: none, or one below 0.
    """
    if seeds < 1:
        raise UsageError(f"{seeds} seeds are too few; give 1 or more")
    if first_seed < 0:
        raise UsageError(f"seeds are 0 or more, not {first_seed}")
    return range(first_seed, first_seed + seeds)


def in_order(outcomes: Mapping[Cell, Outcome], cells: Sequence[Cell]) -> list[Outcome]:
    """The outcomes there are, in the order of ``cells`` and not of their making."""
    return [outcomes[cell] for cell in cells if cell in outcomes]


def _claim(output: Path, cells: Sequence[Cell], *, resume: bool, overwrite: bool) -> None:
    """Make sure that ``output`` may be written to, before any work is done."""
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other: go on, or start again?")
    if output.exists() and not output.is_dir():
        raise UsageError(f"the output {output} is a file; name a folder")
    check_free(output)
    begun = [cell for cell in cells if any((output / "runs" / cell.folder).glob("[!.]*"))]
    if begun and not (resume or overwrite):
        raise UsageError(
            f"{output} already holds {len(begun)} of the {len(cells)} runs; use --resume to go on with them, "
            "--overwrite to start again, or name another folder with -o"
        )


def _finished(folder: Path, cell: Cell, job: Plan) -> tuple[dict[str, Any], Outcome]:
    """A finished run's report and outcome; refuses one that was made in another way than planned."""
    try:
        report = json.loads((folder / "report.json").read_text())
        different = differences(report, job)
        outcome = outcome_of(report, cell, folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CbpqError(
            f"the results in {folder} are damaged or of another version ({brief(error)}); delete that folder, and "
            "--resume runs it again"
        ) from error
    if different:
        raise UsageError(
            f"the finished run in {folder} differs in {', '.join(different)}; give the same settings, or use "
            "--overwrite to start again"
        )
    return report, outcome


def differences(report: Mapping[str, Any], job: Plan) -> list[str]:
    """In what a finished run was made in another way than planned."""
    own = {name: value for name, value in job.resolved.settings.to_dict().items() if name not in FREE_SETTINGS}
    saved = {name: entry["value"] for name, entry in report["settings"].items() if name not in FREE_SETTINGS}
    different = sorted(name for name in own | saved if own.get(name) != saved.get(name))
    if report["source"] != plain(job.loaded.info.to_dict()):
        different.append("the network")
    return different


def outcome_of(report: Mapping[str, Any], cell: Cell, folder: Path) -> Outcome:
    """A finished run's outcome, from its report and events."""
    score, agreement = score_of(report["quantized"], report["comparison"]), report["comparison"]["agreement"]
    training = report["training"]
    curve = [*_measured_epochs(folder / "events.jsonl"), (float(training["epochs"]), score)]
    stage = next((stage for stage in report["stages"] if stage["name"] == "training"), None)
    return Outcome(
        cell.method,
        cell.constraint,
        cell.seed,
        score,
        agreement,
        tuple(curve),
        training["seconds"] / training["steps"] if training["steps"] else None,
        stage["peak_bytes"] if stage else None,
        report["sizes"]["file_bytes"],
    )


def _measured_epochs(path: Path) -> Iterator[tuple[float, float]]:
    epoch = 0
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == EpochEnd.__name__:
            epoch = event["epoch"]
        elif event["event"] == "Evaluated" and event["which"] == f"epoch {epoch}":
            yield float(epoch), score_of(event["result"], event["result"].get("comparison"))


def score_of(result: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> float:
    """Top-1 of an evaluation, or without labels the agreement with the original, in percent."""
    score = result["top1"] if result["top1"] is not None else (comparison or {})["agreement"]
    return float(score)


def comparison_of(
    report: Mapping[str, Any],
    job: Plan,
    done: Sequence[Outcome],
    command: str = "",
    against: Mapping[str, Any] | None = None,
) -> Comparison:
    """The comparison of what is done so far; ``report`` and ``job`` are those of one of the runs."""
    labelled = report["quantized"]["top1"] is not None
    order = {(run.constraint, run.method): None for run in done}
    ordered = [run for key in order for run in done if (run.constraint, run.method) == key]
    return Comparison(
        command,
        report["source"],
        report["data"],
        {"epochs": job.resolved.settings.epochs, "minutes": job.max_minutes},
        "top-1" if labelled else "agreement",
        report["original"]["top1"] if labelled else 100.0,
        tuple(ordered),
        report["versions"],
        against,
    )
