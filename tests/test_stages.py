"""What a run does before it trains: its rows in the report, what they hand on, and that it goes on where it stopped.

Only two small blocks are constrained, so that a whole run takes a second.
"""

import copy
import json
import math
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import cbpq_process
from small_job import (
    ALL_FOUR,
    RESULTS,
    command,
    contents,
    events_of,
    pictures,
    write_arrays,
    write_network,
)
from torch import Tensor, nn

from cbpq import stages
from cbpq.compensation import Rounding, Start, round_network
from cbpq.evaluation import Predictions
from cbpq.events import Event, Interrupted, Phase, Tick
from cbpq.fileformat import read
from cbpq.layers import choose_layers
from cbpq.levels import Grid, level_set
from cbpq.model_file import save
from cbpq.models import load_model
from cbpq.pictures import NO_LABEL
from cbpq.pipeline import STAGES, execute
from cbpq.planning import Plan, plan
from cbpq.report import Report
from cbpq.scales import initial_scale
from cbpq.settling import finish
from cbpq.summary import setbacks, stage_row
from cbpq.training import Step, prepare, train

pytestmark = pytest.mark.medium  # whole runs

NEAREST, COMPENSATED, RECONSTRUCTED, TRAINED = STAGES
INCLUDE = ("layer2*", "layer3*")
NAMES = (
    *("layer2.0.conv1.weight", "layer2.0.conv2.weight", "layer2.0.downsample.1.weight"),
    *("layer3.0.conv1.weight", "layer3.0.conv2.weight", "layer3.0.conv3.weight", "layer3.0.downsample.1.weight"),
)
SHORT: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 12,
    "epoch_images": 48,
    "reconstruction_steps": 4,
    "reconstruction_images": 24,
    "checkpoint_minutes": 60.0,
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that drops out at random while it trains; pictures with labels, and some without."""
    folder = tmp_path_factory.mktemp("job")
    write_network(folder / "net.safetensors", steps=40, drop_rate=0.2, **ALL_FOUR)
    write_arrays(folder / "data.npz", train=48, val=24)
    np.savez(folder / "images.npz", images=pictures(40, 3)[0])
    return folder


def planned(
    job: Path, data: str | None = "images.npz", preset: str = "auto", minutes: float | None = None, **changes: Any
) -> Plan:
    return plan(
        str(job / "net.safetensors"),
        data=str(job / data) if data else None,
        constraint="ternary",
        preset=preset,
        settings=[("the test", {**SHORT, **changes})],
        include=INCLUDE,
        calibration=24,
        device="cpu",
        max_minutes=minutes,
    )


def done(job: Path, output: Path, data: str | None = "images.npz", **changes: Any) -> Report:
    """A whole run."""
    return execute(planned(job, data, **changes), output)


def rows(report: Report) -> list[str]:
    return [stage.name for stage in report.stages]


def file_of(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def weights_of(output: Path) -> dict[str, Tensor]:
    """Every constrained weight in the file, and everything else there."""
    content = read(output / "model.safetensors")
    found = {name: torch.from_numpy(tensor.weight()) for name, tensor in content.constrained.items()}
    return found | {name: torch.from_numpy(np.asarray(array)) for name, array in content.others.items()}


def in_file(network: nn.Module, output: Path) -> None:
    """Check that the file holds exactly this network."""
    state = network.state_dict()
    held = weights_of(output)
    assert set(held) == set(state)
    for name, tensor in held.items():
        assert torch.equal(tensor, state[name]), name


def original_of(job: Path) -> nn.Module:
    return load_model(str(job / "net.safetensors")).model.eval()


# Rows


def test_the_rows_of_a_run_without_labels(job: Path, tmp_path: Path) -> None:
    report = done(job, tmp_path / "out")
    assert rows(report) == [NEAREST, COMPENSATED, RECONSTRUCTED, TRAINED]
    for stage in report.stages:
        assert stage.top1 is None
        assert stage.agreement is not None
        assert 0 <= stage.agreement <= 100
        assert stage.seconds == report.seconds[stage.name] > 0
        assert stage.peak_bytes is None or stage.peak_bytes > 2**20
    assert report.comparison is not None
    assert report.stages[-1].agreement == report.comparison["agreement"]
    measured = [event["which"] for event in events_of(tmp_path / "out") if event["event"] == "Evaluated"]
    assert measured == ["original", NEAREST, COMPENSATED, RECONSTRUCTED, "epoch 1", "quantized"]
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["name"] for row in document["stages"]] == rows(report)
    assert "## Stages" in (tmp_path / "out" / "report.md").read_text()


def test_no_epochs_end_after_the_rounding(job: Path, tmp_path: Path) -> None:
    report = done(job, tmp_path / "out", epochs=0)
    assert rows(report) == [NEAREST, COMPENSATED]
    assert report.training["steps"] == 0
    made, network, original = planned(job, epochs=0), original_of(job), original_of(job)
    assert made.data is not None
    images = stages.calibration_images(made.data, made.device)
    assert sum(map(len, images)) == 24
    round_network(network, original, NAMES, Rounding(level_set("ternary")), images)
    in_file(network, tmp_path / "out")


@pytest.mark.parametrize("data", ["images.npz", "data.npz"])
def test_nearest_rounding_alone(job: Path, tmp_path: Path, data: str) -> None:
    flags = ("--rounding", "nearest", "--epochs", 0, "-c", "ternary", "-b", 12, "--device", "cpu")
    includes = [part for glob in INCLUDE for part in ("--include", glob)]
    outcome = command(
        "quantize", job / "net.safetensors", "--data", job / data, *flags, *includes, "-o", tmp_path / "out"
    )
    assert outcome.code == 0, outcome.err
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["name"] for row in document["stages"]] == [NEAREST]
    network = original_of(job)
    with torch.no_grad():
        for name in NAMES:
            weight = network.get_parameter(name)
            scale = initial_scale(weight, level_set("ternary"), "least-squares", "channel")
            weight.copy_(Grid(level_set("ternary"), scale).nearest(weight))
    in_file(network, tmp_path / "out")


def test_rows_that_are_not_measured(job: Path, tmp_path: Path) -> None:
    report = done(job, tmp_path / "out", evaluate_every=0)
    assert rows(report) == [NEAREST, COMPENSATED, RECONSTRUCTED, TRAINED]
    assert all(stage.top1 is stage.agreement is None for stage in report.stages[:-1])
    assert report.stages[-1].agreement is not None
    measured = [event["which"] for event in events_of(tmp_path / "out") if event["event"] == "Evaluated"]
    assert measured == ["original", "quantized"]
    done(job, tmp_path / "measured")
    assert file_of(tmp_path / "out") == file_of(tmp_path / "measured")


def test_the_rows_of_a_run_with_labels(job: Path, tmp_path: Path) -> None:
    report = done(job, tmp_path / "out", "data.npz", reconstruction_steps=0)
    assert report.preset == "default"
    assert rows(report) == [NEAREST, COMPENSATED, TRAINED]
    assert all(stage.top1 is not None and stage.agreement is not None for stage in report.stages)
    assert report.quantized is not None
    assert report.stages[-1].top1 == report.quantized["top1"]


@pytest.mark.parametrize("evaluate_every", [0, 1])
def test_the_published_recipe_starts_from_the_original_weights(job: Path, tmp_path: Path, evaluate_every: int) -> None:
    changes = {"reconstruction_steps": 0, "epoch_images": 0, "evaluate_every": evaluate_every}
    report = done(job, tmp_path / "out", "data.npz", preset="paper", **changes)
    assert rows(report) == [NEAREST, TRAINED]

    # the same without any stages
    made = planned(job, "data.npz", preset="paper", **changes)
    assert made.data is not None
    assert made.data.train is not None
    run = prepare(
        made.loaded.model,
        made.data.train,
        levels=made.levels,
        method="cbp",
        settings=made.resolved.settings,
        layers=made.layers,
        device=made.device,
    )
    assert len(list(train(run))) == 2 * 4 + 2
    finish(run)
    save(tmp_path / "plain.safetensors", run.constrained, made.loaded.info, run={}, metrics={})
    content = read(tmp_path / "plain.safetensors")
    held = weights_of(tmp_path / "out")
    for name, tensor in content.constrained.items():
        assert torch.equal(torch.from_numpy(tensor.weight()), held[name]), name
    for name, array in content.others.items():
        assert np.array_equal(array, held[name].numpy()), name


# What is handed on


@pytest.fixture(scope="module")
def rounded(job: Path) -> tuple[nn.Module, nn.Module, dict[str, Start]]:
    """The original, the network after compensated rounding, and what came out of it."""
    original = original_of(job)
    network = copy.deepcopy(original)
    images = [(torch.from_numpy(pictures(32, 9)[0])[:, None] / 255 - 0.5) / 0.25]
    return original, network, round_network(network, original, NAMES, Rounding(level_set("ternary")), images)


@pytest.mark.parametrize("latent_weights", ["original", "compensated", "snapped"])
def test_handed_on(rounded: tuple[nn.Module, nn.Module, dict[str, Start]], latent_weights: str) -> None:
    original, after, starts = rounded
    network = copy.deepcopy(after)
    found = stages.handed_on(network, original, starts, level_set("ternary"), latent_weights)
    assert tuple(found) == NAMES
    goes_on_from = original if latent_weights == "original" else after
    state = goes_on_from.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    for name, start in found.items():
        assert torch.equal(start.scale, starts[name].scale)
        expected = {
            "original": original.get_parameter(name),
            "compensated": starts[name].latent,
            "snapped": after.get_parameter(name),
        }
        assert torch.equal(start.latent, expected[latent_weights]), name
        assert not start.latent.requires_grad
    if latent_weights == "original":  # what trains must not write into the original
        assert all(found[name].latent.data_ptr() != original.get_parameter(name).data_ptr() for name in NAMES)


def test_the_pictures_stages_look_at(job: Path) -> None:
    made = planned(job)
    assert made.data is not None
    settings = made.resolved.settings
    assert sum(map(len, stages.calibration_images(made.data, made.device))) == 24
    assert sum(map(len, stages.calibration_images(made.data, made.device, most=1))) == 12  # one batch
    assert sum(map(len, stages.augmented_images(made.data, settings, made.device))) == 24
    more = stages.augmented_images(made.data, planned(job, reconstruction_images=60).resolved.settings, made.device)
    assert sum(map(len, more)) == 60
    assert len({image.numpy().tobytes() for batch in more for image in batch}) > 24  # other variants each time
    again = stages.augmented_images(made.data, planned(job, reconstruction_images=60).resolved.settings, made.device)
    assert all(torch.equal(one, other) for one, other in zip(more, again, strict=True))


def test_pictures_that_take_too_much_memory(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned(job, "data.npz", preset="default", batch_size=8)
    assert made.data is not None
    monkeypatch.setattr(stages, "MEMORY", 1)
    monkeypatch.setattr(stages, "FEWEST_PICTURES", 16)
    settings = planned(job, reconstruction_images=10**6).resolved.settings
    assert sum(map(len, stages.augmented_images(made.data, settings, made.device))) == 16


# Going on


class Stopper:
    """Listens to a run, and says stop at the ``nth`` step of a phase."""

    def __init__(self, phase: str, nth: int) -> None:
        self._wanted, self._left, self._now = phase, nth, ""

    def listen(self, event: Event) -> None:
        if isinstance(event, Phase):
            self._now = event.name
        elif isinstance(event, Tick | Step) and self._now == self._wanted:
            self._left -= 1

    def __call__(self) -> bool:
        return self._now == self._wanted and self._left <= 0


STOPS = (
    *(("synthesis", 3), ("synthesis", 45), ("measuring", 1), (COMPENSATED, 1), (COMPENSATED, 7)),
    *((RECONSTRUCTED, 1), (RECONSTRUCTED, 5), (RECONSTRUCTED, 8), (TRAINED, 1), (TRAINED, 4)),
    *(("settling the weights", 2), ("measuring", 1)),
)


@pytest.fixture(scope="module")
def unbroken(job: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """Outputs of runs that nothing happened to, with pictures and without."""
    outputs: dict[str | None, Path] = {}
    for data in ("images.npz", None):
        outputs[data] = tmp_path_factory.mktemp("unbroken") / "out"
        done(job, outputs[data], data)
    return outputs


def story(output: Path) -> list[tuple[Any, ...]]:
    """What was measured and trained, in order."""
    keys = ("event", "which", "epoch", "step", "loss")
    told = [event for event in events_of(output) if event["event"] not in ("Saved", "Resumed")]
    return [tuple(event.get(key) for key in keys) for event in told]


def same_result(output: Path, whole: Path) -> None:
    assert set(contents(output)) == RESULTS
    assert file_of(output) == file_of(whole)
    assert story(output) == story(whole)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (output, whole)]
    for report in reports:
        for row in report["stages"]:
            del row["seconds"], row["peak_bytes"]
    assert reports[0]["stages"] == reports[1]["stages"]
    assert reports[0]["layers"] == reports[1]["layers"]


@pytest.mark.parametrize("data", ["images.npz", None])
def test_stopped_again_and_again(job: Path, unbroken: dict[str | None, Path], tmp_path: Path, data: str | None) -> None:
    """One run, stopped in every phase; in training it has dropped out at random since."""
    output = tmp_path / "out"
    stopped = []
    for phase, nth in STOPS:
        if phase == "synthesis" and data is not None:
            continue
        stopper = Stopper(phase, nth)
        torch.manual_seed(nth)  # of no account
        try:
            execute(planned(job, data), output, resume=True, listener=stopper.listen, should_stop=stopper)
            break
        except Interrupted:
            stopped.append(phase)
            assert not (output / "model.safetensors").exists()
    else:
        execute(planned(job, data), output, resume=True)
    expected = {phase for phase, _ in STOPS} - ({"synthesis"} if data else set())
    assert set(stopped) == expected
    same_result(output, unbroken[data])


@pytest.mark.parametrize("seed", [0, 1])
def test_stopped_anywhere(job: Path, unbroken: dict[str | None, Path], tmp_path: Path, seed: int) -> None:
    output = tmp_path / "out"
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == moment

    moment = random.Random(seed).randrange(5, 30)
    with pytest.raises(Interrupted, match="--resume"):
        execute(planned(job), output, should_stop=should_stop)
    execute(planned(job), output, resume=True)
    same_result(output, unbroken["images.npz"])


@pytest.mark.parametrize("latent_weights", ["original", "snapped"])
def test_each_way_of_handing_on_makes_a_run_of_its_own(
    job: Path, unbroken: dict[str | None, Path], tmp_path: Path, latent_weights: str
) -> None:
    stopper = Stopper(RECONSTRUCTED, 6)
    made = planned(job, latent_weights=latent_weights)
    with pytest.raises(Interrupted):
        execute(made, tmp_path / "out", listener=stopper.listen, should_stop=stopper)
    execute(planned(job, latent_weights=latent_weights), tmp_path / "out", resume=True)
    whole = done(job, tmp_path / "whole", latent_weights=latent_weights)
    assert rows(whole) == list(STAGES)
    same_result(tmp_path / "out", tmp_path / "whole")
    assert file_of(tmp_path / "out") != file_of(unbroken["images.npz"])


def test_what_is_done_is_not_done_again(job: Path, tmp_path: Path) -> None:
    stopper = Stopper(RECONSTRUCTED, 3)
    with pytest.raises(Interrupted):
        execute(planned(job, None), tmp_path / "out", listener=stopper.listen, should_stop=stopper)
    seen: list[str] = []

    def listener(event: Event) -> None:
        if isinstance(event, Phase):
            seen.append(event.name)

    execute(planned(job, None), tmp_path / "out", resume=True, listener=listener)
    assert seen[:4] == [RECONSTRUCTED, "measuring", TRAINED, "measuring"]


def flags_of(output: Path, *more: object) -> tuple[object, ...]:
    settings = [part for name, value in SHORT.items() for part in ("--set", f"{name}={value}")]
    includes = [part for glob in INCLUDE for part in ("--include", glob)]
    return ("-c", "ternary", "--calibration", 24, "--device", "cpu", *settings, *includes, "-o", output, *more)


@pytest.mark.parametrize("word", ['"original"', '"compensated rounding"'])
def test_killed(job: Path, unbroken: dict[str | None, Path], tmp_path: Path, word: str) -> None:
    output = tmp_path / "out"
    arguments = ("quantize", job / "net.safetensors", *flags_of(output))
    process = cbpq_process(arguments, tmp_path / "log")
    log, deadline = output / "checkpoint" / "events.jsonl", time.monotonic() + 120
    while process.is_alive() and not (log.exists() and word in log.read_text()):
        assert time.monotonic() < deadline, "the process does not get on"
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (output / "model.safetensors").exists()
    outcome = command(*arguments, "--resume")
    assert outcome.code == 0, outcome.err
    same_result(output, unbroken[None])


# Seeds and time


@pytest.mark.parametrize("data", ["images.npz", None])
def test_a_seed_makes_its_file_and_no_other(
    job: Path, unbroken: dict[str | None, Path], tmp_path: Path, data: str | None
) -> None:
    done(job, tmp_path / "same", data)
    assert file_of(tmp_path / "same") == file_of(unbroken[data])
    done(job, tmp_path / "other", data, seed=1)
    codes, others = (read(folder / "model.safetensors").constrained for folder in (unbroken[data], tmp_path / "other"))
    assert any(not np.array_equal(codes[name].codes, others[name].codes) for name in NAMES)


def test_a_time_limit_ends_every_stage(job: Path, tmp_path: Path) -> None:
    steps = {RECONSTRUCTED: 0, TRAINED: 0}
    now = ""

    def listener(event: Event) -> None:
        nonlocal now
        if isinstance(event, Phase):
            now = event.name
        elif isinstance(event, Tick | Step) and now in steps:
            steps[now] += 1

    made = planned(job, minutes=0.02, epochs=10**6, reconstruction_steps=10**6, evaluate_every=0)
    report = execute(made, tmp_path / "out", listener=listener)
    assert rows(report) == list(STAGES)
    assert all(1 < count < 10**5 for count in steps.values())
    assert set(contents(tmp_path / "out")) == RESULTS
    content = read(tmp_path / "out" / "model.safetensors")
    assert set(content.constrained) == set(NAMES)
    assert report.training["window"] == "shut"
    network = load_model(str(tmp_path / "out" / "model.safetensors")).model
    assert choose_layers(network).constrained


def said(right: int, count: int = 400, labelled: bool = True) -> Predictions:
    """Of ``count`` pictures of class 1, ``right`` are taken for it."""
    classes = (torch.arange(count) < right).long()
    labels = torch.full((count,), 1 if labelled else NO_LABEL)
    losses = torch.full((count,), 1.0 if labelled else math.nan, dtype=torch.float64)
    return Predictions(labels, classes, None, losses, 1.0)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_run_that_ends_below_one_of_its_stages_says_so(labelled: bool) -> None:
    original = said(400, labelled=labelled)

    def after(*rights: int) -> list[str]:
        predictions = [said(right, labelled=labelled) for right in rights]
        rows = [stage_row(f"stage {i}", found, original, 1.0, None) for i, found in enumerate(predictions)]
        return setbacks(rows, predictions[-1], original)

    (text,) = after(100, 396, 380)
    assert text.startswith("after stage 1 the network was better (99.00 %) than at the end; --epochs 0")
    assert not after(100, 396, 394)  # chance may explain it
    assert not after(100, 380, 396)
    assert not after(380)
    rows = [stage_row("stage", None, original, 1.0, None)] * 2  # nothing was measured on the way
    assert not setbacks(rows, said(10, labelled=labelled), original)
