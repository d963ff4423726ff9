"""Methods side by side: every combination of methods, constraints and seeds, run and measured alike.

Each combination is a run of ``cbpq.pipeline`` in a folder of its own, ``OUT/runs/METHOD-CONSTRAINT-SEED``. All take the
same data in the same order for a seed, start from the same network, have the same budget and are measured on the same
pictures. What is finished stays finished: the comparison can be stopped and resumed at any moment.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.text import Text

from cbpq import sections
from cbpq.atomic import atomic_write
from cbpq.errors import MissingPartError, UsageError
from cbpq.events import Event
from cbpq.levels import level_set
from cbpq.methods import METHODS, method_class
from cbpq.outputs import state_file, writing
from cbpq.pipeline import execute
from cbpq.planning import FREE_SETTINGS, Plan, plan
from cbpq.report import plain
from cbpq.sections import Section
from cbpq.training import EpochEnd

SIGNIFICANT = 0.05
RESULTS = ("comparison.json", "comparison.md", "comparison.png")


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


@dataclass(frozen=True)
class Outcome:
    """How a run ended. ``score`` is top-1, or without labels the agreement with the original, in percent.

    ``curve`` holds (epochs, score) as far as it was measured, the finished network last; ``step_seconds`` is the time
    of one training step, ``peak_bytes`` the most memory in use while training.
    """

    method: str
    constraint: str
    seed: int
    score: float
    agreement: float
    curve: tuple[tuple[float, float], ...]
    step_seconds: float | None
    peak_bytes: int | None
    file_bytes: int


@dataclass(frozen=True)
class Row:
    """All seeds of a method and a constraint; ``change`` is the difference from an earlier comparison, in points."""

    method: str
    constraint: str
    scores: tuple[float, ...]
    agreement: float
    step_seconds: float | None
    peak_bytes: int | None
    change: float | None = None
    p: float | None = None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds, None for one."""
        return stdev(self.scores) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """What ``compare_methods`` found; ``measure`` is ``top-1`` or ``agreement``, ``original`` the network's own."""

    command: str
    source: Mapping[str, Any]
    data: Mapping[str, Any]
    budget: Mapping[str, Any]
    measure: str
    original: float | None
    outcomes: tuple[Outcome, ...]
    versions: Mapping[str, Any]
    against: Mapping[str, Any] | None = None

    def rows(self) -> list[Row]:
        """A row for each constraint and method, in the order they were asked for."""
        earlier = _scores_of(self.against) if self.against is not None else {}
        rows = []
        for (constraint, method), runs in self._groups():
            scores = tuple(run.score for run in runs)
            before = earlier.get((constraint, method))
            rows.append(
                Row(
                    method,
                    constraint,
                    scores,
                    mean(run.agreement for run in runs),
                    _mean_known(run.step_seconds for run in runs),
                    max((run.peak_bytes for run in runs if run.peak_bytes is not None), default=None),
                    mean(scores) - mean(before) if before else None,
                    welch(scores, before) if before else None,
                )
            )
        return rows

    def _groups(self) -> list[tuple[tuple[str, str], list[Outcome]]]:
        keys = dict.fromkeys((run.constraint, run.method) for run in self.outcomes)
        return [(key, [run for run in self.outcomes if (run.constraint, run.method) == key]) for key in keys]

    def to_dict(self) -> dict[str, Any]:
        """The content of ``comparison.json``."""
        document: dict[str, Any] = {
            name: plain(getattr(self, name))
            for name in ("command", "source", "data", "budget", "measure", "original", "versions")
        }
        rows = [{**asdict(row), "mean": mean(row.scores), "deviation": row.deviation} for row in self.rows()]
        return document | {"rows": plain(rows), "runs": plain([asdict(run) for run in self.outcomes])}

    def to_markdown(self) -> str:
        """The content of ``comparison.md``."""
        parts = [f"# {sections.escape(self._title())}\n"]
        if self.command:
            parts.append(sections.fenced(self.command, "console"))
        return "\n".join([*parts, sections.markdown(self.section())])

    def render(self, console: Console) -> None:
        """Print the table."""
        console.print(Text(sections.printable(self._title()), style="bold"))
        console.print()
        sections.render(console, self.section())

    def _title(self) -> str:
        return f"{self.source.get('architecture') or 'network'}: methods compared"

    def section(self) -> Section:
        """The table of rows, the best of each constraint marked."""
        rows = self.rows()
        rivals: dict[str, list[float]] = {}
        for row in rows:
            rivals.setdefault(row.constraint, []).append(mean(row.scores))
        several = len({row.method for row in rows}) > 1
        compared = self.against is not None
        columns: tuple[str, ...] = (
            *("constraint", "method", self.measure, "agreement", "seeds", "step", "peak memory"),
            *(("earlier",) if compared else ()),
        )
        table = [
            [
                row.constraint,
                row.method + (" (best)" if mean(row.scores) == max(rivals[row.constraint]) and several else ""),
                over_seeds(row),
                sections.percent(row.agreement),
                str(len(row.scores)),
                f"{1000 * row.step_seconds:.0f} ms" if row.step_seconds is not None else sections.UNKNOWN,
                sections.size(row.peak_bytes),
                *([_change(row)] if compared else []),
            ]
            for row in rows
        ]
        budget = ", ".join(f"{name} {value}" for name, value in self.budget.items() if value is not None)
        notes = [
            f"{self.measure}: mean ± sample standard deviation over seeds; the original has "
            f"{sections.percent(self.original)}. Budget of each run: {budget}.",
        ]
        if compared:
            notes.append(
                f"earlier: difference from the earlier comparison; * marks p < {SIGNIFICANT} (Welch's t-test)."
            )
        return Section("Methods", columns, table, frozenset(columns[2:]), notes=tuple(notes))


def compare_methods(
    source: str,
    data: str,
    output: Path,
    *,
    constraints: Sequence[str],
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    against: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    listener: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    on_run: Callable[[int, int, Cell, Sequence[Outcome]], None] = lambda number, total, cell, done: None,
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
        seeds: how many; they are 0, 1, 2, …
        against: an earlier ``comparison.json`` to compare with.
        resume: go on with what is in ``output``; finished runs are kept.
        overwrite: replace what is in ``output``.
        listener: called with every event of every run.
        should_stop: asked at every event; True saves and ends with Interrupted.
        on_run: called before each run with its number from 1, their count, the run, and the outcomes so far.
        command: the command line, for the report.
        settings: see ``cbpq.presets.resolve``; the same for all runs, but for the seed.
        **choices: see ``cbpq.planning.plan``.

    Raises:
        CbpqError: what went wrong; finished runs are intact.
        Interrupted: ``should_stop`` said so.
    """
    cells = combinations(constraints, methods, seeds)
    earlier = read_comparison(against) if against is not None else None
    _claim(output, cells, resume=resume, overwrite=overwrite)
    done: list[Outcome] = []
    comparison: Comparison | None = None
    for number, cell in enumerate(cells, 1):
        on_run(number, len(cells), cell, done)
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
        if overwrite or not (folder / "report.json").exists():
            execute(job, folder, resume=unfinished, overwrite=overwrite, listener=listener, should_stop=should_stop)
        report = json.loads((folder / "report.json").read_text())
        _check_same(report, job, folder)
        done.append(outcome_of(report, cell, folder))
        comparison = _summary(report, job, done, command, earlier)
        texts = {
            "comparison.json": json.dumps(comparison.to_dict(), indent=1),
            "comparison.md": comparison.to_markdown(),
        }
        for name, text in texts.items():
            with writing(output / name):
                atomic_write(output / name, text.encode())
    if comparison is None:
        raise UsageError("there is nothing to compare")
    return comparison


def combinations(constraints: Sequence[str], methods: Sequence[str] | None, seeds: int) -> list[Cell]:
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
    if seeds < 1:
        raise UsageError(f"{seeds} seeds are too few; give 1 or more")
    pairs = []
    for levels, method in product(map(level_set, constraints), METHODS if methods is None else methods):
        try:
            method_class(method).check(levels)
        except UsageError:
            if methods is not None:  # this method was asked for by name
                raise
        else:
            pairs.append((levels.name, method))
    return [Cell(method, name, seed) for seed in range(seeds) for name, method in pairs]


def _claim(output: Path, cells: Sequence[Cell], *, resume: bool, overwrite: bool) -> None:
    """Make sure that ``output`` may be written to, before any work is done."""
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other: go on, or start again?")
    if output.exists() and not output.is_dir():
        raise UsageError(f"the output {output} is a file; name a folder")
    begun = [cell for cell in cells if any((output / "runs" / cell.folder).glob("*"))]
    if begun and not (resume or overwrite):
        raise UsageError(
            f"{output} already holds {len(begun)} of the {len(cells)} runs; use --resume to go on with them, "
            "--overwrite to start again, or name another folder with -o"
        )


def _check_same(report: Mapping[str, Any], job: Plan, folder: Path) -> None:
    """Refuse a finished run that was made in another way."""
    own = {name: value for name, value in job.resolved.settings.to_dict().items() if name not in FREE_SETTINGS}
    saved = {name: entry["value"] for name, entry in report["settings"].items() if name not in FREE_SETTINGS}
    different = sorted(name for name in own | saved if own.get(name) != saved.get(name))
    if report["source"] != plain(job.loaded.info.to_dict()):
        different.append("the network")
    if different:
        raise UsageError(
            f"the finished run in {folder} differs in {', '.join(different)}; give the same settings, or use "
            "--overwrite to start again"
        )


def outcome_of(report: Mapping[str, Any], cell: Cell, folder: Path) -> Outcome:
    """A finished run's outcome, from its report and events."""
    score, agreement = _score(report["quantized"], report["comparison"]), report["comparison"]["agreement"]
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
            yield float(epoch), _score(event["result"], event["result"].get("comparison"))


def _score(result: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> float:
    score = result["top1"] if result["top1"] is not None else (comparison or {})["agreement"]
    return float(score)


def _summary(
    report: Mapping[str, Any], job: Plan, done: Sequence[Outcome], command: str, against: Mapping[str, Any] | None
) -> Comparison:
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


def read_comparison(path: Path) -> dict[str, Any]:
    """An earlier ``comparison.json``.

    Raises:
        UsageError: no such file, or something else.
    """
    try:
        document = json.loads(path.read_text())
        _scores_of(document)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is no comparison.json of cbpq compare") from error
    return dict(document)


def _scores_of(document: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float, ...]]:
    return {(row["constraint"], row["method"]): tuple(map(float, row["scores"])) for row in document["rows"]}


def welch(scores: Sequence[float], others: Sequence[float]) -> float | None:
    """p of Welch's t-test that two sets of runs have the same mean; None where either has fewer than two.

    Raises:
        MissingPartError: scipy is not installed.
    """
    if len(scores) < 2 or len(others) < 2:
        return None
    if stdev(scores) == stdev(others) == 0:  # the test divides by it
        return 1.0 if mean(scores) == mean(others) else 0.0
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingPartError("comparing comparisons needs scipy: pip install 'cbpq[compare]'") from error
    return float(stats.ttest_ind(scores, others, equal_var=False).pvalue)


def score_table(done: Sequence[Outcome]) -> list[tuple[str, str, str]]:
    """Constraint, method and mean score of what is finished."""
    groups: dict[tuple[str, str], list[float]] = {}
    for run in done:
        groups.setdefault((run.constraint, run.method), []).append(run.score)
    return [(*key, f"{mean(scores):.2f} % ({len(scores)})") for key, scores in groups.items()]


def over_seeds(row: Row) -> str:
    """Mean ± sample standard deviation in percent."""
    spread = f" ± {row.deviation:.2f}" if row.deviation is not None else ""
    return f"{mean(row.scores):.2f}{spread} %"


def _change(row: Row) -> str:
    if row.change is None:
        return sections.UNKNOWN
    return f"{row.change:+.2f}{' *' if row.p is not None and row.p < SIGNIFICANT else ''}"


def _mean_known(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def plot(comparison: Comparison, path: Path) -> None:
    """Draw the score against epochs, a panel for each constraint, a line for each method, error bars over seeds.

    Raises:
        MissingPartError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPartError("the plot needs matplotlib: pip install 'cbpq[compare]'") from error
    groups = comparison._groups()
    constraints = list(dict.fromkeys(constraint for (constraint, _), _ in groups))
    figure = Figure(figsize=(4.5 * len(constraints), 3.8), layout="constrained")
    panels = figure.subplots(1, len(constraints), squeeze=False)[0]
    for panel, name in zip(panels, constraints, strict=True):
        for (constraint, method), runs in groups:
            if constraint != name:
                continue
            points = _curve(runs)
            panel.errorbar(
                [epoch for epoch, _ in points],
                [mean(scores) for _, scores in points],
                yerr=[stdev(scores) if len(scores) > 1 else 0.0 for _, scores in points],
                marker="o",
                markersize=3,
                capsize=2,
                linewidth=1.2,
                label=method,
            )
        if comparison.original is not None:
            panel.axhline(comparison.original, color="gray", linewidth=0.8, linestyle=":", label="original")
        panel.set(title=name, xlabel="epochs", ylabel=f"{comparison.measure} in %")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    with writing(path):
        figure.savefig(path, dpi=120)


def _curve(runs: Sequence[Outcome]) -> list[tuple[float, list[float]]]:
    """The scores of all runs at each epoch that any was measured at."""
    at: dict[float, list[float]] = {}
    for run in runs:
        for epoch, score in dict(run.curve).items():
            if math.isfinite(score):
                at.setdefault(epoch, []).append(score)
    return sorted(at.items())
