"""What a comparison of methods found: outcomes, their mean and deviation over seeds, and what an earlier one had."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.text import Text

from cbpq import sections
from cbpq.errors import MissingPartError, UsageError
from cbpq.plain import plain
from cbpq.sections import Section

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Outcome:
    """How a run ended. ``score`` is top-1, or without labels the agreement with the original, in percent.

    ``curve`` holds (epochs, score) as far as it was measured, the finished network last; ``step_seconds`` is the time
    of one training step, ``peak_bytes`` the most memory in use while training, ``file_bytes`` the size of the file, if
    there is one.
    """

    method: str
    constraint: str
    seed: int
    score: float
    agreement: float
    curve: tuple[tuple[float, float], ...]
    step_seconds: float | None
    peak_bytes: int | None
    file_bytes: int | None


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
    """What a comparison found; ``measure`` is ``top-1`` or ``agreement``, ``original`` the network's own."""

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
        for (constraint, method), runs in self.groups():
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

    def groups(self) -> list[tuple[tuple[str, str], list[Outcome]]]:
        """The runs of each (constraint, method), in the order they were asked for."""
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
            rivals.setdefault(row.constraint, []).append(shown(row.scores))
        several = len({row.method for row in rows}) > 1
        compared = self.against is not None
        columns: tuple[str, ...] = (
            *("constraint", "method", self.measure, "agreement", "n", "step", "memory"),
            *(("earlier",) if compared else ()),
        )
        table = [
            [
                row.constraint,
                row.method + (" (best)" if shown(row.scores) == max(rivals[row.constraint]) and several else ""),
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
            f"{self.measure}: mean ± sample standard deviation of n seeds; the original has "
            f"{sections.percent(self.original)}. Memory: the most in use at a time. Budget of each run: {budget}.",
        ]
        if compared:
            notes.append(
                f"earlier: difference from the earlier comparison; * marks p < {SIGNIFICANT} (Welch's t-test)."
            )
        return Section("Methods", columns, table, frozenset(columns[2:]), notes=tuple(notes))


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


def shown(scores: Sequence[float]) -> float:
    """The mean as tables show it: what looks equal there counts as equal."""
    return round(mean(scores), 2)


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
