"""All methods × constraints that were compared, as one table and one picture, from the raw results beside this file.

    python -m examples.cifar10.methods two-epochs

``results/two-epochs*.json`` are what ``cbpq compare`` and ``parq.py`` wrote; the table is printed, the picture is
``two-epochs.png``.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from cbpq.standings import read_comparison
from examples.runs import over_seeds

HERE = Path(__file__).parent
CONSTRAINTS = ("binary", "ternary", "one-bit-shift", "two-bit-shift")
LOWEST = 85.0  # of the picture; a point below it becomes a remark


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budget", help="what the results' names begin with")
    parser.add_argument("-o", "--output", type=Path, help="the picture (default: beside this file)")
    chosen = parser.parse_args()
    documents = [read_comparison(path) for path in sorted((HERE / "results").glob(f"{chosen.budget}*.json"))]
    if not documents:
        parser.error(f"no results are called {chosen.budget}*.json")
    runs = distinct(run for document in documents for run in document["runs"])
    print(table(runs))
    draw(runs, documents[0]["original"], chosen.output or HERE / f"{chosen.budget}.png")


def distinct(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run once: a comparison with more seeds repeats those of an earlier one."""
    return list({(run["method"], run["constraint"], run["seed"]): run for run in runs}.values())


def groups(runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Runs by constraint and method, the best method first."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {constraint: {} for constraint in CONSTRAINTS}
    for run in runs:
        found.setdefault(run["constraint"], {}).setdefault(run["method"], []).append(run)
    return {
        constraint: dict(sorted(methods.items(), key=lambda item: -mean(run["score"] for run in item[1])))
        for constraint, methods in found.items()
    }


def table(runs: Iterable[dict[str, Any]]) -> str:
    """The README's table."""
    lines = [
        "| constraint | method | runs | top-1 | same answer as the original |",
        "|---|---|---:|---:|---:|",
    ]
    for constraint, methods in groups(runs).items():
        name = f"`{constraint}`"
        for method, group in methods.items():
            top1, same = (over_seeds([run[key] for run in group]) for key in ("score", "agreement"))
            lines.append(f"| {name} | `{method}` | {len(group)} | {top1} | {same} |")
            name = ""
    return "\n".join(lines)


def draw(runs: Iterable[dict[str, Any]], original: float, path: Path) -> None:
    """A row for each method, a panel for each constraint; bars are one standard deviation to either side."""
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    found = {constraint: methods for constraint, methods in groups(runs).items() if methods}
    heights = [len(methods) + 0.5 for methods in found.values()]
    panels = figure.subplots(len(found), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (constraint, methods) in zip(panels, found.items(), strict=True):
        for place, (method, group) in enumerate(methods.items()):
            scores = [run["score"] for run in group]
            color = "C3" if method == "cbp" else "C0"
            if mean(scores) < LOWEST:
                panel.text(LOWEST, place, f"← {mean(scores):.1f}", va="center", color=color)
                continue
            spread = stdev(scores) if len(scores) > 1 else 0.0
            panel.errorbar(mean(scores), place, xerr=spread, marker="o", capsize=3, color=color)
        panel.axvline(original, color="gray", linewidth=0.8, linestyle=":")
        panel.set(yticks=range(len(methods)), ylim=(len(methods) - 0.4, -0.6), title=constraint)
        panel.set_yticklabels([f"{method} ({len(group)})" for method, group in methods.items()])
        panel.grid(axis="x", alpha=0.3)
    panels[-1].set(xlim=(LOWEST - 0.2, 92), xlabel="top-1 in % (in brackets: runs; dotted: the original network)")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
