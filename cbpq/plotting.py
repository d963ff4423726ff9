"""A comparison of methods as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from cbpq.atomic import writing
from cbpq.errors import MissingPartError
from cbpq.standings import Comparison, Outcome


def plot(comparison: Comparison, path: Path) -> None:
    """Draw the score against epochs, a panel for each constraint, a line for each method, error bars over seeds.

    Raises:
        MissingPartError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise MissingPartError("the plot needs matplotlib: pip install 'cbpq[compare]'") from error
    groups = comparison.groups()
    constraints = list(dict.fromkeys(constraint for (constraint, _), _ in groups))
    figure = Figure(figsize=(4.5 * len(constraints), 3.8), layout="constrained")
    panels = figure.subplots(1, len(constraints), squeeze=False)[0]
    for panel, name in zip(panels, constraints, strict=True):
        curves = [(method, _curve(runs)) for (constraint, method), runs in groups if constraint == name]
        last = max((epoch for _, points in curves for epoch, _ in points), default=1)
        for number, (method, points) in enumerate(curves):
            beside = (number - (len(curves) - 1) / 2) * last / 60  # else error bars would cover each other
            panel.errorbar(
                [epoch + beside for epoch, _ in points],
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
        panel.set(title=name, xlabel="epochs", ylabel=f"{comparison.measure} in %", xlim=(0, last * 1.08))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
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
