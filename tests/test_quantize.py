"""The main job, from source to file, through the command line and the library."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from small_job import (
    PLAIN_NETWORK,
    RESULTS,
    ROOT,
    Outcome,
    command,
    contents,
    events_of,
    one_line,
    refused,
    report_of,
    write_arrays,
    write_folder,
    write_network,
)
from torch import nn

import cbpq
from cbpq import pipeline
from cbpq.cli.display import Display
from cbpq.cli.quantize import default_output
from cbpq.evaluation import Predictions, predict
from cbpq.events import Evaluated, Event, Saved
from cbpq.fileformat import read
from cbpq.inspection import inspect_file
from cbpq.layers import AUXILIARY, LayerChoice, choose_layers
from cbpq.levels import level_set
from cbpq.loaders import Batch
from cbpq.methods import METHODS
from cbpq.model_file import save
from cbpq.models import load_model, logits
from cbpq.pipeline import execute
from cbpq.planning import notes_without_effect, plan
from cbpq.presets import COMMAND_LINE, SETTINGS, resolve
from cbpq.scales import initial_scale
from cbpq.settling import finish
from cbpq.training import EpochEnd, Step, prepare, take_step
from cbpq.transforms import Augmentation

DIGITS = ROOT / "examples" / "digits"
SHORT = ("-b", "16", "--epochs", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network that knows its pictures, and the pictures in two forms."""
    folder = tmp_path_factory.mktemp("job")
    write_network(folder / "net.safetensors", steps=40)
    write_arrays(folder / "data.npz")
    write_folder(folder / "pictures")
    return folder


@pytest.fixture(scope="module")
def finished(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that other runs are held against."""
    output = tmp_path_factory.mktemp("finished") / "out"
    assert run(job, output).code == 0
    return output


def run(job: Path, output: Path, *flags: object, data: str = "data.npz") -> Outcome:
    """``cbpq quantize`` on the small job; ``flags`` come last, so they win."""
    return command("quantize", job / "net.safetensors", "--data", job / data, *SHORT, "-o", output, *flags)


def timeless(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in evaluation.items() if name != "images_per_second"}


# The main job


@pytest.mark.medium
def test_the_command_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DIGITS, tmp_path / "examples" / "digits")
    outcome = command(
        *("quantize", "examples/digits/resnet.safetensors", "--data", "examples/digits/digits.npz"),
        *("--constraint", "two-bit-shift", "--epochs", "1", "-b", "64", "--device", "cpu"),
    )
    assert outcome.code == 0, outcome.err
    output = tmp_path / "resnet-two-bit-shift"
    assert set(contents(output)) == RESULTS

    report = report_of(output)
    for which, least in (("original", 95), ("quantized", 90)):
        found = report[which]
        assert found["images"] == 359
        low, high = found["top1_interval"]
        assert least < found["top1"]
        assert 0 < low < found["top1"] < high < 100
        assert found["top5_interval"][0] < found["top5"] <= 100
        assert f"{found['top1']:.2f} % [{low:.2f}, {high:.2f}]" in outcome.out
        assert f"{found['top1']:.2f} % [{low:.2f}, {high:.2f}]" in (output / "report.md").read_text()
    assert report["comparison"]["drop"] == pytest.approx(report["original"]["top1"] - report["quantized"]["top1"])
    size = (output / "model.safetensors").stat().st_size
    assert report["sizes"]["file_bytes"] == size < report["sizes"]["float32_bytes"] / 7
    assert len(report["layers"]) == 15
    assert {row["bits_per_weight"] for row in report["layers"]} == {3.0}
    assert [row["name"] for row in report["skipped"][:2]] == ["conv1.0.weight", "fc.weight"]
    assert report["settings"]["epochs"] == {"value": 1, "from": "command line"}
    assert report["settings"]["lr"] == {"value": 0.0005, "from": "preset default, two-bit-shift"}
    assert report["training"]["steps"] == 1438 // 64
    assert report["versions"]["torch"] == torch.__version__

    # what the file says of itself, and what is measured of it alone, agree with the report
    content = read(output / "model.safetensors")
    assert content.metrics["quantized"] == timeless(report["quantized"])
    assert content.metrics["original"] == timeless(report["original"])
    measured = cbpq.evaluate(output / "model.safetensors", DIGITS / "digits.npz", device="cpu", batch_size=64)
    assert timeless(measured.result.to_dict()) == timeless(report["quantized"])


def test_events_and_report_tell_the_same_story(finished: Path) -> None:
    report, events = report_of(finished), events_of(finished)
    kinds = [event.pop("event") for event in events]
    told = dict(zip([event.get("which") for event in events], events, strict=True))
    assert told["original"]["result"] == report["original"]
    assert told["quantized"]["result"] == report["quantized"]
    assert "epoch 1" in told
    assert "epoch 2" not in told  # the last epoch's network is measured when its weights are settled
    ends = [event for kind, event in zip(kinds, events, strict=True) if kind == "EpochEnd"]
    assert [end["epoch"] for end in ends] == [1, 2]
    assert ends[-1]["cfs"] == report["training"]["cfs"]
    steps = [event for kind, event in zip(kinds, events, strict=True) if kind == "Step"]
    assert [(step["epoch"], step["step"]) for step in steps] == [(1, 6), (2, 6)]
    assert kinds[-1] == "Evaluated"
    assert set(kinds) == {"Evaluated", "Saved", "Step", "EpochEnd"}


def test_all_that_is_json_is_plain_json(finished: Path) -> None:
    def strict(text: str) -> Any:
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    strict((finished / "report.json").read_text())
    for line in (finished / "events.jsonl").read_text().splitlines():
        strict(line)


def test_the_report_holds_no_nan_even_when_nothing_was_trained(job: Path, tmp_path: Path) -> None:
    assert run(job, tmp_path / "out", "--epochs", "0").code == 0
    report = report_of(tmp_path / "out")
    assert report["training"]["steps"] == 0
    assert report["training"]["images_per_second"] is None
    assert "NaN" not in (tmp_path / "out" / "report.json").read_text()


def test_settings_fed_back_make_the_same_file(job: Path, tmp_path: Path) -> None:
    flags = ("-c", "levels:-1,-0.5,0.5,1", "--seed", "3", "--exclude", "layer1*", "--set", "temperature=2.5")
    assert run(job, tmp_path / "first", *flags, "--quantize-last", "--augment", "none").code == 0
    config = tmp_path / "first" / "settings.toml"
    outcome = command(
        *("quantize", job / "net.safetensors", "--data", job / "data.npz", "--device", "cpu"),
        *("--config", config, "-o", tmp_path / "second"),
    )
    assert outcome.code == 0, outcome.err
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert first["model.safetensors"] == second["model.safetensors"]
    assert first["settings.toml"] == second["settings.toml"]
    assert report_of(tmp_path / "second")["settings"]["temperature"] == {"value": 2.5, "from": str(config)}


@pytest.mark.medium
def test_the_seed_decides_the_file(job: Path, finished: Path, tmp_path: Path) -> None:
    expected = (finished / "model.safetensors").read_bytes()
    assert run(job, tmp_path / "again").code == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == expected
    torch.manual_seed(99)  # whatever happened in the process before is of no account
    np.random.seed(99)  # the old global generator is what must not matter
    assert run(job, tmp_path / "third").code == 0
    assert (tmp_path / "third" / "model.safetensors").read_bytes() == expected
    assert run(job, tmp_path / "other", "--seed", "1").code == 0
    other = read(tmp_path / "other" / "model.safetensors")
    assert any(
        not np.array_equal(tensor.codes, other.constrained[name].codes)
        for name, tensor in read(finished / "model.safetensors").constrained.items()
    )


@pytest.mark.medium
def test_workers_do_not_matter(job: Path, tmp_path: Path) -> None:
    for workers in ("0", "2"):
        assert run(job, tmp_path / workers, "-j", workers, "--epochs", "1", data="pictures").code == 0
    files = [contents(tmp_path / workers)["model.safetensors"] for workers in ("0", "2")]
    assert files[0] == files[1]


def test_the_file_is_the_network_at_the_end_of_training(job: Path, tmp_path: Path) -> None:
    settings = [("the test", {"epochs": 1, "batch_size": 16})]
    made = plan(str(job / "net.safetensors"), data=str(job / "data.npz"), settings=settings, device="cpu")
    report = execute(made, tmp_path / "out")
    loaded = cbpq.load(tmp_path / "out" / "model.safetensors")
    assert loaded.info == made.loaded.info
    assert not loaded.model.training
    assert made.data is not None
    with torch.no_grad():
        for batch in made.data.val:
            assert torch.equal(loaded.model(batch.images), made.loaded.model(batch.images))
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, made.loaded.model.state_dict()[name])
    for row in report.layers:
        weight = loaded.model.get_parameter(row.name)
        assert all(len(channel.unique()) <= 7 for channel in weight)
    assert report.to_dict() == report_of(tmp_path / "out")


def test_the_library_twin(job: Path, finished: Path, tmp_path: Path) -> None:
    report = cbpq.quantize(
        str(job / "net.safetensors"),
        str(job / "data.npz"),
        tmp_path / "out",
        device="cpu",
        settings=[("here", {"epochs": 2, "batch_size": 16})],
    )
    assert report.settings["epochs"] == {"value": 2, "from": "here"}
    assert contents(tmp_path / "out")["model.safetensors"] == (finished / "model.safetensors").read_bytes()


def test_events_of_the_library(job: Path, tmp_path: Path) -> None:
    settings = [("the test", {"epochs": 2, "batch_size": 16, "evaluate_every": 0})]
    made = plan(str(job / "net.safetensors"), data=str(job / "data.npz"), settings=settings, device="cpu")
    seen: list[Event] = []
    execute(made, tmp_path / "out", listener=seen.append)
    assert sum(isinstance(event, Step) for event in seen) == 12
    assert sum(isinstance(event, EpochEnd) for event in seen) == 2
    assert sum(isinstance(event, Saved) for event in seen) == 6  # original, two stages, start, two epochs
    assert [event.which for event in seen if isinstance(event, Evaluated)] == ["original", "quantized"]


# The output folder


@pytest.mark.parametrize(
    "source, constraint, name",
    [
        ("resnet18.pth", "binary", "resnet18-binary"),
        ("nets/resnet18-f37072fd.pth", "two-bit-shift", "resnet18-f37072fd-two-bit-shift"),
        ("resnet18", "ternary", "resnet18-ternary"),
        ("timm:resnet18.a1_in1k", "ternary", "resnet18-ternary"),
        ("hf-hub:timm/resnet18.a1_in1k", "ternary", "resnet18-ternary"),
        ("my_package.nets:make", "ternary", "make-ternary"),
        ("nets:make", "shift:3", "make-shift-3"),
        ("net.safetensors", "levels:-1,1/3,1", "net-levels--1,1-3,1"),
    ],
)
def test_default_output(source: str, constraint: str, name: str) -> None:
    assert default_output(source, constraint) == Path(name)


def test_a_result_is_not_overwritten_unasked(job: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    before = contents(output)
    one_line(run(job, output), 2, "already holds model.safetensors", "--overwrite")
    assert contents(output) == before
    (output / "model.safetensors").unlink()  # any file of a result counts
    one_line(run(job, output), 2, "already holds report.json")


def test_what_is_to_be_overwritten_stays_until_the_new_result_is_there(
    job: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    before = contents(output)
    one_line(run(job, output, "--overwrite", "-c", "quaternary"), 2, "quaternary")
    assert contents(output) == before
    refused(run(job, output, "--overwrite", "--lr", "1e30"), 1, "the loss became", "epoch 1", "lower --lr")
    assert contents(output, leave_out=["checkpoint"]) == before
    one_line(run(job, output), 2, "unfinished run", "--resume")
    assert run(job, output, "--overwrite", "--seed", "1").code == 0
    assert set(contents(output)) == RESULTS
    assert contents(output)["model.safetensors"] != before["model.safetensors"]


def test_other_files_in_the_output_are_left_alone(job: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    output.mkdir(parents=True)
    (output / "notes.txt").write_text("mine")
    assert run(job, output, "--epochs", "0").code == 0
    assert set(contents(output)) == RESULTS | {"notes.txt"}


# Ends before the budget, and gates


def test_max_time_ends_early_with_a_whole_result(job: Path, tmp_path: Path) -> None:
    outcome = run(job, tmp_path / "out", "--epochs", "100000", "--max-time", "0.005", "--set", "evaluate_every=0")
    assert outcome.code == 0, outcome.err
    assert set(contents(tmp_path / "out")) == RESULTS
    report, events = report_of(tmp_path / "out"), events_of(tmp_path / "out")
    assert 0 < report["training"]["steps"] < 600_000
    assert report["training"]["seconds"] >= 0.3
    assert report["training"]["window"] == "shut"  # schedules follow the clock
    assert report["training"]["images_per_second"] * report["training"]["seconds"] == pytest.approx(
        16 * report["training"]["steps"]
    )
    assert len([event for event in events if event["event"] == "EpochEnd"]) == report["training"]["epochs"]
    assert cbpq.load(tmp_path / "out" / "model.safetensors").num_classes == 6


@pytest.mark.parametrize(
    "gate, part",
    [
        (("--min-top1", "100"), "below --min-top1 100"),
        (("--max-drop", "-0.5"), "--max-drop -0.5"),
        (("--max-size", "0.001"), "--max-size 0.001"),
    ],
)
def test_gates(job: Path, tmp_path: Path, gate: tuple[str, str], part: str) -> None:
    # without training or compensation, so that the network is surely worse
    outcome = run(job, tmp_path / "out", "--epochs", "0", "--rounding", "nearest", "-c", "binary", "--json", *gate)
    refused(outcome, 3, part)
    assert set(contents(tmp_path / "out")) == RESULTS
    assert outcome.document() == report_of(tmp_path / "out")


def test_gates_that_are_met(job: Path, tmp_path: Path) -> None:
    gates = ("--min-top1", "0", "--max-drop", "100", "--max-size", "0.1")
    assert run(job, tmp_path / "out", "--epochs", "0", *gates).code == 0


# What is printed


def test_json_is_all_there_is_on_stdout(job: Path, tmp_path: Path) -> None:
    outcome = run(job, tmp_path / "out", "--json")
    assert outcome.document() == report_of(tmp_path / "out")
    assert "measuring" in outcome.err


def test_quiet(job: Path, tmp_path: Path) -> None:
    outcome = run(job, tmp_path / "out", "--quiet")
    assert outcome.err == ""
    assert "Accuracy" in outcome.out


def test_plain_lines_without_a_terminal(job: Path, tmp_path: Path) -> None:
    outcome = run(job, tmp_path / "out")
    assert "\x1b" not in outcome.err + outcome.out
    assert "epoch 2/2: loss" in outcome.err
    assert max(map(len, outcome.out.splitlines()[2:])) <= 120


def test_the_live_display_on_a_terminal(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    settings = [("the test", {"epochs": 2, "batch_size": 16})]
    made = plan(str(job / "net.safetensors"), data=str(job / "data.npz"), settings=settings, device="cpu")
    screen = io.StringIO()
    with Display(Console(file=screen, force_terminal=True, width=100, highlight=False)) as display:
        execute(made, tmp_path / "out", listener=display.show, should_stop=display.should_stop)
        drawn = io.StringIO()
        Console(file=drawn, width=100).print(display._screen())
    shown = screen.getvalue()
    assert "epoch 1/2: loss" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor, hidden while it works, is back
    assert "measuring" in drawn.getvalue()


# --dry-run


def test_dry_run_shows_where_every_value_comes_from(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "my.toml"
    config.write_text('epochs = 7\nlr = 0.5\nseed = 5\nconstraint = "binary"\nexclude = ["layer4*"]\n')
    monkeypatch.setenv("CBPQ_LR", "0.25")
    monkeypatch.setenv("CBPQ_SEED", "6")
    monkeypatch.setenv("CBPQ_CONSTRAINT", "ternary")
    monkeypatch.chdir(tmp_path)
    outcome = command(
        *("quantize", job / "net.safetensors", "--config", "my.toml", "--seed", "8", "--set", "patience=3"),
        *("--dry-run", "--json", "--device", "cpu", "--data", job / "data.npz"),
    )
    assert outcome.code == 0, outcome.err
    settings = outcome.document()["settings"]
    assert settings["batch_size"] == {"value": 128, "from": "preset default"}
    assert settings["epochs"] == {"value": 7, "from": "my.toml"}
    assert settings["lr"] == {"value": 0.25, "from": "environment"}
    assert settings["seed"] == {"value": 8, "from": "command line"}
    assert settings["patience"] == {"value": 3, "from": "command line"}
    assert settings["constraint"] == {"value": "ternary", "from": "environment"}
    assert settings["exclude"] == {"value": ["layer4*"], "from": "my.toml"}
    assert settings["method"] == {"value": "cbp", "from": "default"}
    assert settings["device"] == {"value": "cpu", "from": "command line"}
    assert set(SETTINGS) < set(settings)
    assert not any(name.startswith("layer4") for name in outcome.document()["constrained"])

    outcome = command("quantize", job / "net.safetensors", "--config", "my.toml", "--dry-run")
    for name in (*SETTINGS, "constraint", "method", "preset", "device"):
        assert re.search(rf"^\W*{name}\W", outcome.out, re.MULTILINE), name
    assert re.search(r"lr\W+0\.25\W+environment", outcome.out)
    assert re.search(r"fc\.weight.* float: classifier", outcome.out)
    assert set(contents(tmp_path)) == {"my.toml"}


@pytest.mark.parametrize(
    ("flags", "warnings"),
    [
        ((), []),
        (
            ("--set", "temperature=2", "--set", "patience=3"),
            [
                "setting temperature changes nothing in this run: distillation_loss is features",
                "setting patience changes nothing in this run: multiplier_schedule is progress",
            ],
        ),
        (
            ("--set", "distillation_views=2", "--augment", "none"),
            ["setting distillation_views changes nothing in this run: training neither mirrors nor moves the pictures"],
        ),
        (("--set", "distillation_views=2"), []),
        (("--set", "amp_dtype=float16", "--amp"), []),
    ],
)
def test_settings_that_change_nothing_are_named(job: Path, flags: tuple[str, ...], warnings: list[str]) -> None:
    flags = ("--dry-run", "--json", "--device", "cpu", *flags)
    outcome = command("quantize", job / "net.safetensors", "--data", job / "data.npz", *flags)
    assert outcome.code == 0, outcome.err
    assert outcome.document()["warnings"] == warnings


def test_temperature_counts_where_auxiliary_heads_learn() -> None:
    resolved = resolve(layers=[(COMMAND_LINE, {"temperature": 2})])
    for reason, notes in (("first layer", 1), (AUXILIARY, 0)):
        layers = LayerChoice((), {"a.weight": reason})
        assert len(notes_without_effect(resolved, "cbp", False, layers, None)) == notes


def test_dry_run_touches_nothing(job: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(finished)
    assert run(job, finished, "--dry-run").code == 0
    assert run(job, Path("new"), "--dry-run").code == 0
    assert contents(finished) == before
    assert contents(tmp_path) == {}


# Presets, constraints, scales, layers


def test_preset_paper(job: Path, tmp_path: Path) -> None:
    outcome = run(job, tmp_path / "out", "--preset", "paper", "--set", "patience=1")
    assert outcome.code == 0, outcome.err
    settings = report_of(tmp_path / "out")["settings"]
    assert settings["lr"] == {"value": 0.01, "from": "preset paper, model cifar"}
    assert settings["learn_scales"]["value"] is False
    assert any(event.get("multipliers_updated") for event in events_of(tmp_path / "out"))
    content = read(tmp_path / "out" / "model.safetensors")
    assert {tensor.scale.shape for tensor in content.constrained.values()} == {()}
    loaded = load_model(str(job / "net.safetensors")).model.state_dict()
    for name, tensor in content.constrained.items():  # the published scale, frozen: the mean of |w|
        assert tensor.scale == pytest.approx(float(loaded[name].abs().mean()), rel=1e-6)


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("method", METHODS)
def test_methods(job: Path, tmp_path: Path, method: str, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = []

    def noting(network: nn.Module, *arguments: Any, **keywords: Any) -> Predictions:
        values.append(len(network.get_parameter("layer1.0.conv1.weight")[0].unique()))
        return predict(network, *arguments, **keywords)

    monkeypatch.setattr(pipeline, "predict", noting)
    outcome = run(job, tmp_path / "out", "--method", method, "--preset", preset, "-c", "binary", "--epochs", "3")
    assert outcome.code == 0, outcome.err
    assert values[0] > 2
    assert set(values[1:]) <= {1, 2}  # whatever the network computes with while it trains, the levels are measured
    report = report_of(tmp_path / "out")
    origins = {
        "default": "preset default, binary",
        "paper": f"preset paper, {'model cifar' if method == 'cbp' else f'method {method}'}",
    }
    assert report["method"] == method
    assert report["settings"]["lr"]["from"] == origins[preset]
    content = read(tmp_path / "out" / "model.safetensors")
    assert {tensor.levels for tensor in content.constrained.values()} == {(-1, 1)}
    assert content.run["method"] == method


def test_a_method_that_does_not_cover_a_constraint(tmp_path: Path) -> None:
    outcome = command("quantize", "no such network", "--method", "adaste", "-c", "ternary", "-o", tmp_path / "out")
    one_line(outcome, 2, "adaste is for two levels", "choose constraint binary")


def test_help_names_every_method() -> None:
    text = command("quantize", "--help").out
    assert all(method in text for method in METHODS)


@pytest.mark.parametrize(
    "constraint, levels, learned",
    [
        ("binary", 2, True),
        ("binary", 2, False),
        ("ter", 3, True),
        ("one-bit-shift", 5, True),
        ("2bit", 7, True),
        ("2bit", 7, False),
        ("shift:3", 9, True),
        ("levels:-1,-0.3,0.3,1", 4, True),
        ("levels:-1,1/3,1", 3, False),
    ],
)
def test_constraints(job: Path, tmp_path: Path, constraint: str, levels: int, learned: bool) -> None:
    outcome = run(
        *(job, tmp_path / "out", "-c", constraint, "--epochs", "1", "-b", "96", "--rounding", "nearest"),
        *("--set", f"learn_scales={learned}", "--set", "lr=0.5", "--set", "warmup=0"),
    )
    assert outcome.code == 0, outcome.err
    content = read(tmp_path / "out" / "model.safetensors")
    assert len({tensor.levels for tensor in content.constrained.values()}) == 1
    before = load_model(str(job / "net.safetensors")).model.state_dict()
    moved = []
    for name, tensor in content.constrained.items():
        assert len(tensor.levels) == levels
        assert set(np.unique(tensor.codes)) <= set(tensor.levels)
        untrained = initial_scale(before[name], level_set(constraint), "least-squares", "channel")
        moved.append(not np.array_equal(untrained.reshape(-1).numpy(), tensor.scale))
    assert any(moved) == learned  # BatchNorm makes the loss nearly indifferent to some of them


@pytest.mark.medium
def test_which_layers(job: Path, tmp_path: Path) -> None:
    def constrained(*flags: str) -> set[str]:
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        assert run(job, output, "--epochs", "0", *flags).code == 0
        content = read(output / "model.safetensors")
        assert set(content.constrained) == {row["name"] for row in report_of(output)["layers"]}
        assert set(content.constrained) == {layer.name for layer in inspect_file(output / "model.safetensors").layers}
        return set(content.constrained)

    usual = constrained()
    assert {"conv1.0.weight", "fc.weight"} & usual == set()
    assert constrained("--quantize-first", "--quantize-last") == usual | {"conv1.0.weight", "fc.weight"}
    assert constrained("--include", "layer1*") == {name for name in usual if name.startswith("layer1")}
    left = constrained("--exclude", "layer1*", "--exclude", "*.conv2")
    assert left == {name for name in usual if not name.startswith("layer1") and "conv2" not in name}


@pytest.mark.medium
def test_other_ways_to_train(job: Path, tmp_path: Path) -> None:
    sets = ("optimizer=adamw", "lr_schedule=constant", "distillation=0", "scale_granularity=layer", "gradient_clip=0")
    flags = [part for assignment in sets for part in ("--set", assignment)]
    assert run(job, tmp_path / "a", "--amp", "--lr", "1e-3", *flags).code == 0
    assert report_of(tmp_path / "a")["quantized"]["images"] == 48


@pytest.mark.medium
def test_ways_to_use_the_data(job: Path, tmp_path: Path) -> None:
    assert run(job, tmp_path / "limited", "--limit-train", "40").code == 0
    report = report_of(tmp_path / "limited")
    assert (report["data"]["train_images"], report["training"]["steps"]) == (40, 4)
    assert run(job, tmp_path / "held", "--val-from-train", "0.25").code == 0
    report = report_of(tmp_path / "held")
    assert (report["data"]["train_images"], report["original"]["images"]) == (72, 24)

    pictures = shutil.copytree(job / "pictures", tmp_path / "pictures")
    (pictures / "train" / "class0" / "bad.png").write_bytes(b"no picture")
    flags = ("--epochs", "1", "-j", "0")
    outcome = command(
        *("quantize", job / "net.safetensors", "--data", pictures, *SHORT, *flags, "-o", tmp_path / "skipped"),
        "--skip-bad-images",
    )
    assert outcome.code == 0, outcome.err
    assert report_of(tmp_path / "skipped")["data"]["skipped_images"] == ["train/class0/bad.png"]
    assert report_of(tmp_path / "skipped")["data"]["train_images"] == 48


def test_a_cbpq_file_is_a_source_too(job: Path, finished: Path, tmp_path: Path) -> None:
    outcome = command(
        *("quantize", finished / "model.safetensors", "--data", job / "data.npz", *SHORT, "--epochs", "0"),
        *("-c", "two-bit-shift", "-o", tmp_path / "out"),
    )
    assert outcome.code == 0, outcome.err
    report = report_of(tmp_path / "out")
    assert timeless(report["original"]) == timeless(report_of(finished)["quantized"])


def test_a_function_of_ones_own_without_batchnorm(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain_nets.py").write_text(PLAIN_NETWORK)
    scope: dict[str, Any] = {}
    exec(PLAIN_NETWORK, scope)
    torch.manual_seed(0)
    torch.save(scope["make"]().state_dict(), tmp_path / "weights.pth")
    outcome = command(
        *("quantize", "plain_nets:make", "--weights", "weights.pth", "--data", job / "data.npz", *SHORT),
        *("-c", "ternary"),
    )
    assert outcome.code == 0, outcome.err
    file = tmp_path / "make-ternary" / "model.safetensors"
    assert set(read(file).constrained) == {"2.weight", "4.weight", "7.weight"}
    loaded = cbpq.load(file, arch="plain_nets:make")
    assert loaded.num_classes == 6
    measured = cbpq.evaluate(file, job / "data.npz", arch="plain_nets:make", batch_size=16, device="cpu")
    assert timeless(measured.result.to_dict()) == timeless(report_of(tmp_path / "make-ternary")["quantized"])


# The networks people have


class _TwoPictures:
    """A training loader of one batch."""

    images, augmentation = 2, Augmentation()

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return 1

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        yield from [self._batch][start:]


@pytest.mark.medium
@pytest.mark.parametrize(
    "source, size",
    [
        ("alexnet", 64),
        ("resnet18", 32),
        ("resnet50", 32),
        ("googlenet", 32),
        ("mobilenet_v2", 32),
        ("mobilenet_v3_small", 32),
        ("efficientnet_b0", 32),
        ("convnext_tiny", 32),
        ("densenet121", 32),
        ("timm:vit_tiny_patch16_224", 32),
        ("timm:deit_tiny_distilled_patch16_224", 32),
        ("timm:swin_tiny_patch4_window7_224", 32),
        ("squeezenet1_1", 32),
    ],
)
def test_networks(source: str, size: int, tmp_path: Path) -> None:
    loaded = load_model(source, random=True, num_classes=4, input_overrides={"input_size": (size, size)})
    torch.manual_seed(0)
    batch = Batch(torch.randn(2, 3, size, size), torch.tensor([0, 1]))
    network = prepare(
        loaded.model,
        _TwoPictures(batch),
        levels=level_set("two-bit-shift"),
        method="cbp",
        settings=resolve(layers=[("the test", {"epochs": 1, "scale_rule": "mean-abs", "distillation": 0.5})]).settings,
        layers=choose_layers(loaded.model, input_spec=loaded.info.input_spec),
        device=torch.device("cpu"),
    )
    network.model.train()
    assert take_step(network, batch) > 0
    for parameter in network.model.parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all())
    finish(network)
    save(tmp_path / "model.safetensors", network.constrained, loaded.info)
    again = cbpq.load(tmp_path / "model.safetensors")
    assert again.num_classes == 4
    with torch.no_grad():
        expected = logits(network.model(batch.images))
        assert expected.isfinite().all()
        assert torch.equal(logits(again.model(batch.images)), expected)
    sizes = {name: parameter.numel() for name, parameter in again.model.named_parameters()}
    constrained = sum(sizes[name] for name in network.constrained.names)
    assert constrained > 0.5 * sum(sizes.values())
    if source == "googlenet":  # its auxiliary heads are trained and kept as well
        assert any(name.startswith("aux1") for name in network.constrained.names)
        assert network.model.get_parameter("aux1.fc2.weight").grad is not None
