"""Comparisons of methods: what is run, what is kept, what is said of it, and what is refused."""

import io
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from scipy import stats
from small_job import Outcome, command, contents, one_line, refused, report_of

from cbpq import plotting, standings
from cbpq.comparison import Cell, combinations, compare_methods
from cbpq.errors import CbpqError, MissingPartError, UsageError
from cbpq.events import Interrupted
from cbpq.methods import METHODS
from cbpq.standings import read_comparison, welch

pytestmark = pytest.mark.medium  # whole runs

FILES = {"comparison.json", "comparison.md", "comparison.png"}
SHORT = ("--epochs", 2, "-j", 0, "--device", "cpu", "--set", "batch_size=32", "--set", "rounding=nearest")


def compare(*arguments: object) -> Outcome:
    return command("compare", "net.safetensors", "--data", "a.npz", *SHORT, "-o", "out", *arguments)


def document(folder: Path = Path("out")) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "comparison.json").read_text())
    return found


def test_two_methods_and_two_constraints(small_job: Path) -> None:
    methods = ["cbp", "straight-through"]
    flags = [part for method in methods for part in ("--method", method)]
    outcome = compare("-c", "binary", "-c", "ternary", *flags, "--seeds", 2)
    assert outcome.code == 0, outcome.err
    cells = [(c, m, s) for s in (0, 1) for c in ("binary", "ternary") for m in methods]
    assert {path.name for path in (small_job / "out" / "runs").iterdir()} == {f"{m}-{c}-{s}" for c, m, s in cells}
    assert {path.name for path in (small_job / "out").iterdir()} == {*FILES, "runs"}
    found = document()
    assert [(row["constraint"], row["method"]) for row in found["rows"]] == [(c, m) for c, m, s in cells if s == 0]
    assert len(found["runs"]) == len(cells)
    for run in found["runs"]:
        report = report_of(small_job / "out" / "runs" / f"{run['method']}-{run['constraint']}-{run['seed']}")
        assert run["score"] == report["quantized"]["top1"]
        assert run["agreement"] == report["comparison"]["agreement"]
        assert report["settings"]["seed"]["value"] == run["seed"]
        assert [epoch for epoch, _ in run["curve"]] == [1, 2]
        assert run["curve"][-1][1] == run["score"]
        assert run["step_seconds"] == pytest.approx(report["training"]["seconds"] / report["training"]["steps"])
    for row in found["rows"]:
        scores = [
            run["score"]
            for run in found["runs"]
            if (run["constraint"], run["method"]) == (row["constraint"], row["method"])
        ]
        assert row["scores"] == scores
        assert row["mean"] == pytest.approx(statistics.mean(scores))
        assert row["deviation"] == pytest.approx(statistics.stdev(scores))
        shown = f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f} %"
        assert shown in " ".join(outcome.out.split())
        assert shown in (small_job / "out" / "comparison.md").read_text()
    # the same start and the same measure for all
    originals = {report_of(path)["original"]["top1"] for path in (small_job / "out" / "runs").iterdir()}
    assert originals == {found["original"]}
    with Image.open(small_job / "out" / "comparison.png") as image:
        assert image.width > 600


def test_an_interrupted_comparison_goes_on_where_it_was(small_job: Path) -> None:
    whole: dict[str, Any] = {"constraints": ["binary", "ternary"], "methods": ["cbp"], "seeds": 1, "device": "cpu"}
    whole |= {"settings": [("here", {"epochs": 2, "batch_size": 32, "rounding": "nearest"})]}
    compare_methods("net.safetensors", "a.npz", small_job / "whole", **whole)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == stop_at

    events: list[Any] = []
    compare_methods("net.safetensors", "a.npz", small_job / "count", **whole, should_stop=stop_never(asked))
    stop_at, total = len(asked) * 3 // 4, len(asked)
    assert total > 10
    asked.clear()
    with pytest.raises(Interrupted):
        compare_methods("net.safetensors", "a.npz", small_job / "out", **whole, should_stop=stop)
    assert len(document()["runs"]) == 1  # what is finished is told
    first = contents(small_job / "out" / "runs" / "cbp-binary-0")
    with pytest.raises(UsageError, match="already holds 2 of the 2 runs; use --resume"):
        compare_methods("net.safetensors", "a.npz", small_job / "out", **whole)
    compare_methods("net.safetensors", "a.npz", small_job / "out", **whole, resume=True, listener=events.append)
    assert contents(small_job / "out" / "runs" / "cbp-binary-0") == first  # not run again
    for cell in ("cbp-binary-0", "cbp-ternary-0"):
        models = [(small_job / name / "runs" / cell / "model.safetensors").read_bytes() for name in ("whole", "out")]
        assert models[0] == models[1]


def stop_never(asked: list[int]) -> Any:
    def ask() -> bool:
        asked.append(1)
        return False

    return ask


def test_finished_runs_with_other_settings_are_not_mixed_in(small_job: Path) -> None:
    assert compare("--method", "cbp", "--seeds", 1).code == 0
    refused(compare("--method", "cbp", "--seeds", 1, "--resume", "--set", "temperature=3"), 2, "differs in temperature")
    assert compare("--method", "cbp", "--seeds", 1, "--overwrite", "--set", "temperature=3").code == 0
    # more seeds are no other settings
    assert compare("--method", "cbp", "--seeds", 2, "--resume", "--set", "temperature=3").code == 0
    assert document()["rows"][0]["deviation"] is not None


def test_finished_runs_are_looked_at_before_any_is_made(small_job: Path) -> None:
    flags, runs = ("--method", "cbp", "-c", "binary", "-c", "ternary"), small_job / "out" / "runs"
    assert compare(*flags, "--seeds", 1).code == 0
    shutil.rmtree(runs / "cbp-binary-0")
    refused(compare(*flags, "--seeds", 1, "--resume", "--set", "temperature=3"), 2, "cbp-ternary-0 differs")
    assert not (runs / "cbp-binary-0").exists()
    # rows are in the order asked for
    assert compare(*flags, "--seeds", 1, "--resume").code == 0
    assert [row["constraint"] for row in document()["rows"]] == ["binary", "ternary"]


def test_damaged_results_are_told_and_can_be_made_again(small_job: Path) -> None:
    assert compare("--method", "cbp", "--seeds", 1).code == 0
    (cell,), first = (small_job / "out" / "runs").iterdir(), document()["runs"]
    for name, text in [
        ("report.json", ""),
        ("report.json", "[]"),
        ("report.json", '{"settings": {"lr": [0.1, "here"]}}'),
        ("report.json", '{"settings": {}}'),
        ("events.jsonl", "{"),
        ("events.jsonl", None),
    ]:
        kept = (cell / name).read_bytes()
        if text is None:
            (cell / name).unlink()
        else:
            (cell / name).write_text(text)
        refused(compare("--method", "cbp", "--seeds", 1, "--resume"), 1, f"{cell.name} are damaged")
        (cell / name).write_bytes(kept)
    shutil.rmtree(cell)
    assert compare("--method", "cbp", "--seeds", 1, "--resume").code == 0
    assert [run["score"] for run in document()["runs"]] == [run["score"] for run in first]


def test_against_an_earlier_one(small_job: Path) -> None:
    assert compare("--method", "cbp", "--seeds", 2, "-c", "binary").code == 0
    earlier = document()
    for row in earlier["rows"]:
        row["scores"] = [1.0, 1.1]
    (small_job / "earlier.json").write_text(json.dumps(earlier))
    outcome = compare("--method", "cbp", "--seeds", 2, "-c", "binary", "--resume", "--against", "earlier.json")
    assert outcome.code == 0, outcome.err
    row = document()["rows"][0]
    assert row["change"] == pytest.approx(row["mean"] - 1.05)
    assert row["p"] == pytest.approx(stats.ttest_ind(row["scores"], [1.0, 1.1], equal_var=False).pvalue)
    mark = " *" if row["p"] < 0.05 else ""
    assert f"{row['change']:+.2f}{mark}" in outcome.out


def test_pictures_without_labels_are_compared_by_agreement(small_job: Path) -> None:
    import numpy as np

    np.savez(small_job / "a.npz", images=np.load(small_job / "a.npz")["train_images"])
    assert compare("--method", "cbp", "--seeds", 1).code == 0
    found = document()
    assert (found["measure"], found["original"]) == ("agreement", 100.0)
    assert found["runs"][0]["score"] == found["runs"][0]["agreement"]


def test_warnings_of_the_runs_are_shown_once_each(small_job: Path) -> None:
    flags = ("--set", "temperature=2", "--set", "multiplier_lr=1e-4", "--set", "evaluate_every=0")
    outcome = compare("--method", "cbp", "--method", "straight-through", "--seeds", 2, *flags)
    assert outcome.code == 0
    shown = [line for line in outcome.err.splitlines() if line.startswith(("run", "warning"))]
    assert shown == [
        "run 1/4: cbp, two-bit-shift, seed 0",
        "warning: setting temperature changes nothing in this run: distillation_loss is features",
        "run 2/4: straight-through, two-bit-shift, seed 0",
        "warning: setting multiplier_lr changes nothing in this run: method straight-through does not have it",
        "run 3/4: cbp, two-bit-shift, seed 1",
        "run 4/4: straight-through, two-bit-shift, seed 1",
    ]


def test_without_matplotlib_there_is_no_plot(small_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise MissingPartError("the plot needs matplotlib: pip install 'cbpq[compare]'")

    monkeypatch.setattr(plotting, "plot", missing)
    outcome = compare("--method", "cbp", "--seeds", 1, "--set", "evaluate_every=0")
    assert outcome.code == 0
    assert "warning: the plot needs matplotlib" in outcome.err
    assert {path.name for path in (small_job / "out").iterdir()} == {"comparison.json", "comparison.md", "runs"}


def test_seeds_come_one_after_the_other() -> None:
    cells = combinations(["binary", "shift:2"], ["cbp"], 2)
    assert cells == [Cell("cbp", name, seed) for seed in (0, 1) for name in ("binary", "shift:2")]
    assert len({cell.folder for cell in cells}) == 4
    assert not any(character in cell.folder for cell in cells for character in ":,/")
    assert combinations(["binary", "shift:2"], ["cbp"], 1, first_seed=1) == cells[2:]


@pytest.mark.parametrize(
    "constraints, methods, seeds, words",
    [
        ([], ["cbp"], 1, "at least one --constraint"),
        (["binary"], [], 1, "at least one --method"),
        (["binary", "binary"], ["cbp"], 1, "given twice"),
        (["binary"], ["cbp", "cbp"], 1, "given twice"),
        (["binari"], ["cbp"], 1, "did you mean"),
        (["binary"], ["cpb"], 1, "did you mean"),
        (["binary"], ["cbp"], 0, "too few"),
    ],
)
def test_combinations_that_make_no_sense(constraints: list[str], methods: list[str], seeds: int, words: str) -> None:
    with pytest.raises(CbpqError, match=words):
        combinations(constraints, methods, seeds)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UsageError, match="0 or more, not -1"):
        combinations(["binary"], ["cbp"], 1, first_seed=-1)


def test_by_default_each_method_that_can_have_the_constraint() -> None:
    pairs = [(cell.constraint, cell.method) for cell in combinations(["binary", "ternary"], None, 1)]
    assert ("binary", "adaste") in pairs
    assert ("ternary", "adaste") not in pairs
    assert {method for _, method in pairs} == set(METHODS)
    with pytest.raises(UsageError, match="adaste"):
        combinations(["binary", "ternary"], ["cbp", "adaste"], 1)


def test_refusals_come_before_any_work(small_job: Path) -> None:
    one_line(compare("--method", "cbpp"), 2, "unknown method")
    one_line(compare("--against", "none.json"), 2, "cannot read none.json")
    (small_job / "broken.json").write_text("[]")
    one_line(compare("--against", "broken.json"), 2, "no comparison.json")
    one_line(compare("--resume", "--overwrite"), 2, "contradict each other")
    (small_job / "out").write_text("")
    one_line(compare(), 2, "is a file")
    assert set(contents(small_job)) == {"net.safetensors", "a.npz", "broken.json", "out"}


def test_welch() -> None:
    ours, others = (90.1, 90.3, 90.2), (89.0, 89.5, 89.1)
    assert welch(ours, others) == pytest.approx(stats.ttest_ind(ours, others, equal_var=False).pvalue)
    assert welch((90.0,), others) is None
    assert welch((90.0, 90.0), (90.0, 90.0)) == 1
    assert welch((90.0, 90.0), (91.0, 91.0)) == 0


def test_earlier_comparisons_are_read(small_job: Path) -> None:
    (small_job / "good.json").write_text(
        json.dumps({"rows": [{"constraint": "binary", "method": "cbp", "scores": [90, 91]}]})
    )
    assert read_comparison(small_job / "good.json")["rows"]
    for text in (
        "",
        "{}",
        '{"rows": 3}',
        '{"rows": [{}]}',
        '{"rows": [{"constraint": 1, "method": 2, "scores": ["x"]}]}',
    ):
        (small_job / "bad.json").write_text(text)
        with pytest.raises(UsageError, match=r"no comparison\.json"):
            read_comparison(small_job / "bad.json")


def test_what_looks_equal_is_equally_good() -> None:
    """Means that are the same in the table's two decimals are both the best."""
    scores = {("cbp", "binary"): 88.881, ("proxquant", "binary"): 88.879, ("askewsgd", "binary"): 88.87}
    runs = tuple(standings.Outcome(*key, 0, score, 90.0, (), None, None, None) for key, score in scores.items())
    made = standings.Comparison("", {}, {}, {"epochs": 3}, "top-1", None, runs, {})
    assert [row[1] for row in made.section().rows] == ["cbp (best)", "proxquant (best)", "askewsgd"]


def test_80_columns_break_no_name() -> None:
    names = [(method, constraint) for constraint in ("binary", "two-bit-shift") for method in METHODS]
    runs = tuple(
        standings.Outcome(*name, seed, 97 + seed / 10, 97.5, (), 0.2, 10**9, None) for name in names for seed in (0, 1)
    )
    rows = [{"constraint": constraint, "method": method, "scores": [90.0, 91.0]} for method, constraint in names]
    for against in (None, {"rows": rows}):
        out = io.StringIO()
        compared = standings.Comparison("", {}, {}, {"epochs": 2}, "agreement", 99.0, runs, {}, against)
        compared.render(Console(width=80, file=out))
        shown = out.getvalue()
        assert all(word in shown.split() for name in names for word in name)
        assert max(map(len, shown.splitlines())) <= 80


def test_the_plot_takes_runs_of_unequal_length(small_job: Path) -> None:
    run = standings.Outcome("cbp", "binary", 0, 90.0, 91.0, ((1.0, 80.0), (2.0, 90.0)), 0.1, None, 1000)
    longer = standings.Outcome("cbp", "binary", 1, 92.0, 91.0, ((1.0, 85.0), (3.0, 92.0)), 0.1, None, 1000)
    made = standings.Comparison("", {}, {}, {"epochs": 3}, "top-1", None, (run, longer), {})
    plotting.plot(made, small_job / "plot.png")
    assert plotting._curve([run, longer]) == [(1.0, [80.0, 85.0]), (2.0, [90.0]), (3.0, [92.0])]
    assert (small_job / "plot.png").stat().st_size > 1000
