"""Runs that are stopped, killed or run out of disk, and go on: the finished file is that of an unbroken run."""

import errno
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from processes import cbpq_process
from small_job import (
    Outcome,
    command,
    contents,
    environment,
    one_line,
    refused,
    same_result,
    write_arrays,
    write_folder,
    write_network,
)

from cbpq import pipeline, recipe, training
from cbpq.checkpoint import save_checkpoint
from cbpq.errors import CbpqError
from cbpq.events import Event, Interrupted, Saved, Tick
from cbpq.locking import LOCK
from cbpq.methods import METHODS
from cbpq.pipeline import execute
from cbpq.planning import plan
from cbpq.report import Report
from cbpq.training import EpochEnd, Run, Step

pytestmark = pytest.mark.medium  # whole runs, stopped and resumed

EPOCHS = 3
# saved after every step; of the stages before training only the one that takes no time (test_stages has the others)
SETTINGS = {"epochs": EPOCHS, "batch_size": 24, "checkpoint_minutes": 0.0, "rounding": "nearest"}
RUN = ("-b", "24", "--epochs", str(EPOCHS), "--device", "cpu", "--rounding", "nearest")
FLAGS = (*RUN, "--set", "checkpoint_minutes=0")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network that drops out at random while it trains, and its pictures."""
    folder = tmp_path_factory.mktemp("job")
    write_network(folder / "net.safetensors", steps=40, drop_rate=0.2)
    write_arrays(folder / "data.npz")
    write_folder(folder / "pictures", train=96, val=48)
    return folder


@pytest.fixture(scope="module")
def unbroken(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the run that nothing happened to."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    attempt(job, output)
    return output


def attempt(
    job: Path,
    output: Path,
    *,
    listener: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    choices: Mapping[str, Any] = MappingProxyType({}),
    **changes: Any,
) -> Report:
    """Start the run, or go on with it."""
    settings = [("the test", {**SETTINGS, **changes})]
    made = plan(str(job / "net.safetensors"), data=str(job / "data.npz"), settings=settings, device="cpu", **choices)
    return execute(made, output, resume=True, listener=listener, should_stop=should_stop)


def arguments(job: Path, output: Path, *flags: object, data: str = "data.npz") -> list[str]:
    given = ("quantize", job / "net.safetensors", "--data", job / data, *FLAGS, "-o", output, *flags)
    return [str(argument) for argument in given]


def cli(job: Path, output: Path, *flags: object) -> Outcome:
    return command(*arguments(job, output, *flags))


class Stopper:
    """Says stop at the ``nth`` question."""

    def __init__(self, nth: int) -> None:
        self.asked, self.nth = 0, nth

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked == self.nth


# Asked to stop


def test_stopped_anywhere(job: Path, unbroken: Path, tmp_path: Path) -> None:
    count = Stopper(0)
    attempt(job, tmp_path / "counted", should_stop=count, checkpoint_minutes=60.0)
    same_result(tmp_path / "counted", unbroken)
    moments = [1, 2, *random.Random(0).sample(range(3, count.asked), 5), count.asked]
    for moment in moments:
        output = tmp_path / str(moment)
        with pytest.raises(Interrupted, match="--resume"):
            attempt(job, output, should_stop=Stopper(moment), checkpoint_minutes=60.0)
        assert not (output / "model.safetensors").exists()
        attempt(job, output, checkpoint_minutes=60.0)
        same_result(output, unbroken)


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"cbp"}))
def test_other_methods_stopped_anywhere(job: Path, method: str, preset: str, tmp_path: Path) -> None:
    choices, count = {"method": method, "preset": preset, "constraint": "binary"}, Stopper(0)
    attempt(job, tmp_path / "whole", should_stop=count, checkpoint_minutes=60.0, choices=choices)
    for moment in random.Random(2).sample(range(3, count.asked), 4):
        output = tmp_path / str(moment)
        with pytest.raises(Interrupted, match="--resume"):
            attempt(job, output, should_stop=Stopper(moment), checkpoint_minutes=60.0, choices=choices)
        attempt(job, output, checkpoint_minutes=60.0, choices=choices)
        same_result(output, tmp_path / "whole")


def test_stopped_again_and_again(job: Path, unbroken: Path, tmp_path: Path) -> None:
    stops = 0
    for nth in random.Random(1).choices(range(4, 14), k=100):
        try:
            attempt(job, tmp_path / "out", should_stop=Stopper(nth), checkpoint_minutes=60.0)
            break
        except Interrupted:
            stops += 1
    assert stops >= 2
    same_result(tmp_path / "out", unbroken)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "lr": 1e-3, "scale_granularity": "layer"},
        {"multiplier_schedule": "lagrangian", "patience": 1, "lr_schedule": "constant", "learn_scales": False},
    ],
)
def test_everything_that_learns_is_saved(job: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    attempt(job, tmp_path / "unbroken", **changes)
    for nth in (9, 14):
        with pytest.raises(Interrupted):
            attempt(job, tmp_path / "out", should_stop=Stopper(nth), **changes)
    attempt(job, tmp_path / "out", **changes)
    same_result(tmp_path / "out", tmp_path / "unbroken")


def test_broken_off_without_being_asked(job: Path, unbroken: Path, tmp_path: Path) -> None:
    """As by a second Ctrl-C, at any event: what was saved before is where it goes on."""
    events: list[Event] = []
    attempt(job, tmp_path / "counted", listener=events.append)
    for moment in random.Random(2).sample(range(len(events)), 4):
        countdown = iter(range(moment, -1, -1))

        def listener(event: Event, countdown: Iterator[int] = countdown) -> None:
            if next(countdown, -1) == 0:
                raise KeyboardInterrupt

        output = tmp_path / str(moment)
        with pytest.raises(KeyboardInterrupt):
            attempt(job, output, listener=listener)
        saved = any(isinstance(event, Saved) for event in events[: moment + 1])
        assert (output / "checkpoint" / "state.pt").exists() == saved
        assert output.exists() == saved  # a run that saved nothing leaves nothing
        attempt(job, output)
        same_result(output, unbroken)


def test_a_run_with_a_time_limit_goes_on(job: Path, tmp_path: Path) -> None:
    flags = ("--epochs", "100000", "--max-time", "0.005", "--set", "evaluate_every=0")
    made = plan(
        str(job / "net.safetensors"),
        data=str(job / "data.npz"),
        device="cpu",
        max_minutes=0.005,
        settings=[("the test", {**SETTINGS, "epochs": 100_000, "evaluate_every": 0})],
    )
    with pytest.raises(Interrupted):
        execute(made, tmp_path / "out", should_stop=Stopper(9))
    outcome = cli(job, tmp_path / "out", *flags, "--resume", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document()["training"]["seconds"] >= 0.3


# What --resume makes of what it finds


def test_resume_with_nothing_there_starts(job: Path, unbroken: Path, tmp_path: Path) -> None:
    outcome = cli(job, tmp_path / "out", "--resume")
    assert outcome.code == 0, outcome.err
    assert "going on" not in outcome.err
    same_result(tmp_path / "out", unbroken)


def test_resume_of_a_finished_run_says_so(job: Path, unbroken: Path) -> None:
    before = contents(unbroken)
    one_line(cli(job, unbroken, "--resume"), 2, "is finished", "--overwrite")
    assert contents(unbroken) == before


@pytest.fixture(scope="module")
def stopped(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that was stopped in its second epoch."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(Interrupted):
        attempt(job, output, should_stop=Stopper(16))
    return output


@pytest.mark.parametrize(
    "flags, parts",
    [
        (("--epochs", "5"), ("epochs was 3, now 5",)),
        (("--seed", "1", "-c", "binary"), ("seed was 0, now 1", "constraint was two-bit-shift, now binary")),
        (("--limit-train", "48"), ("training images was 96, now 48",)),
        (("--exclude", "layer4*"), ("exclude was [], now ['layer4*']",)),
        (("--max-time", "9"), ("max time was None, now 9.0",)),
        (("--amp",), ("amp was False, now True",)),
        (("--mean", "0.4"), ("input",)),
    ],
)
def test_other_settings_are_refused(job: Path, stopped: Path, flags: tuple[str, ...], parts: tuple[str, ...]) -> None:
    before = contents(stopped)
    one_line(cli(job, stopped, "--resume", *flags), 2, *parts, "--overwrite")
    assert contents(stopped) == before


def test_another_network_is_refused(job: Path, stopped: Path, tmp_path: Path) -> None:
    write_network(tmp_path / "net.safetensors", steps=41, drop_rate=0.2)
    shutil.copy(job / "data.npz", tmp_path)
    one_line(cli(tmp_path, stopped, "--resume"), 2, "weights was")


def test_an_unfinished_run_is_not_touched_unasked(job: Path, stopped: Path) -> None:
    before = contents(stopped)
    one_line(cli(job, stopped), 2, "unfinished run", "--resume", "--overwrite")
    one_line(cli(job, stopped, "--resume", "--overwrite"), 2, "contradict")
    assert contents(stopped) == before


def test_what_does_not_change_the_result_may_change(job: Path, stopped: Path, unbroken: Path, tmp_path: Path) -> None:
    output = shutil.copytree(stopped, tmp_path / "out")
    flags = ("--resume", "--set", "checkpoint_minutes=7", "--set", "evaluate_every=0", "-j", "0", "--quiet")
    arguments = ("quantize", job / "net.safetensors", "--data", job / "data.npz", *RUN, "-o", output)
    assert command(*arguments, *flags).code == 0
    assert contents(output)["model.safetensors"] == contents(unbroken)["model.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped"])
def test_a_damaged_checkpoint(job: Path, stopped: Path, unbroken: Path, tmp_path: Path, damage: str) -> None:
    output = shutil.copytree(stopped, tmp_path / "out")
    state = output / "checkpoint" / "state.pt"
    data = state.read_bytes()
    half = len(data) // 2
    flipped = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
    state.write_bytes({"cut": data[:half], "empty": b"", "text": b"hello", "flipped": flipped}[damage])
    one_line(cli(job, output, "--resume"), 1, "state.pt is damaged", "--overwrite")
    if damage == "flipped":
        assert cli(job, output, "--overwrite").code == 0
        same_result(output, unbroken)


@pytest.mark.parametrize(
    "part, value",
    [
        ("run", {}),
        ("run", 3),
        ("log", 5),
        ("seconds", None),
        ("original", {"labels": 1}),
        ("stages", [{}]),
        ("starts", 1),
    ],
)
def test_a_checkpoint_that_holds_something_else(
    job: Path, stopped: Path, tmp_path: Path, part: str, value: object
) -> None:
    output = shutil.copytree(stopped, tmp_path / "out")
    path = output / "checkpoint" / "state.pt"
    loaded = torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)
    save_checkpoint(path, loaded["identity"], loaded["state"] | {part: value})
    before = path.read_bytes()
    refused(cli(job, output, "--resume"), 1, "state.pt is damaged", "--overwrite")
    assert path.read_bytes() == before


# A disk that is full


def full_after(monkeypatch: pytest.MonkeyPatch, writes: int, function: str) -> None:
    """From the given number of files on, the disk is full."""
    real: Callable[..., Any] = getattr(os, function)
    left = iter(range(writes))

    def full(*arguments: Any, **keywords: Any) -> Any:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **keywords)

    monkeypatch.setattr(os, function, full)


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_full_disk(job: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    output = tmp_path / "out"
    # fsync is called twice for every file: for itself and for its folder, where failing is no failure
    for writes in (6, 2, 9):
        with monkeypatch.context() as patch:
            full_after(patch, writes * (2 if function == "fsync" else 1), function)
            refused(cli(job, output, "--resume"), 1, "No space left on device", "free some space")
        assert (output / "checkpoint" / "state.pt").exists()
        assert not list(output.rglob("*.tmp"))
        assert not (output / "model.safetensors").exists()
    assert cli(job, output, "--resume").code == 0
    same_result(output, unbroken)


def test_a_disk_that_is_full_from_the_start(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_after(monkeypatch, 0, "fsync")
    refused(cli(job, tmp_path / "deep" / "out"), 1, "No space left on device")
    assert contents(tmp_path) == {}


def test_a_disk_that_is_full_at_the_end(
    job: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier result stays as it is until the new one is whole."""
    output = tmp_path / "out"
    writes = 0
    real = os.replace

    def counted(*arguments: Any) -> None:
        nonlocal writes
        writes += 1
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted)
        assert cli(job, output, "--seed", "1").code == 0
    earlier = contents(output)
    for missing in (6, 9):  # the last of ten are five files into the working folder, and from there to their places
        with monkeypatch.context() as patch:
            full_after(patch, writes - missing, "replace")
            refused(cli(job, output, "--overwrite"), 1, "No space left on device")
        assert contents(output, leave_out=["checkpoint"]) == earlier
    with monkeypatch.context() as patch:
        full_after(patch, 4, "replace")  # the log, and three of the five files; then it is full
        refused(cli(job, output, "--resume"), 1, "No space left on device")
    assert contents(output, leave_out=["checkpoint"]) == earlier
    assert cli(job, output, "--resume").code == 0
    same_result(output, unbroken)


def test_a_limit_on_the_size_of_files(job: Path, unbroken: Path, tmp_path: Path) -> None:
    """A write that really fails half-way, in a run whose checkpoint grows when the optimizer begins to remember."""
    output = tmp_path / "out"
    first: list[int] = []

    def listener(event: Event) -> None:
        if isinstance(event, Saved) and not first:
            first.append((output / "checkpoint" / "state.pt").stat().st_size)
            resource.setrlimit(resource.RLIMIT_FSIZE, (first[0] + 1000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CbpqError, match=r"cannot write .*state\.pt \(File too large\)"):
            attempt(job, output, listener=listener)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (output / "checkpoint" / "state.pt").stat().st_size == first[0]
    assert not list(output.rglob("*.tmp"))
    attempt(job, output)
    same_result(output, unbroken)


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    job: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    saved: dict[str, bytes] = {}
    with monkeypatch.context() as patch:
        steps, real = iter(range(100)), recipe.loss_of

        def loss_of(*arguments: Any) -> torch.Tensor:
            if next(steps) == 6:
                saved.update(contents(output, leave_out=[LOCK]))
                return torch.tensor(float("nan"), requires_grad=True)
            return real(*arguments)

        patch.setattr(training, "loss_of", loss_of)
        refused(cli(job, output), 1, "the loss became nan in epoch 2, step 3", "lower --lr")
    assert saved
    assert contents(output) == saved
    assert cli(job, output, "--resume").code == 0
    same_result(output, unbroken)


def test_a_weight_that_is_not_finite_is_never_saved(
    job: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss stays finite here: a latent weight that is NaN has a nearest level all the same."""
    output = tmp_path / "out"

    runs: list[Run] = []

    def prepare(*arguments: Any, **keywords: Any) -> Run:
        runs.append(training.prepare(*arguments, **keywords))
        return runs[0]

    def listener(event: Event) -> None:
        if isinstance(event, Step) and (event.epoch, event.step) == (2, 2):
            with torch.no_grad():
                runs[0].constrained.latent("layer1.0.conv1.weight")[0, 0, 0, 0] = float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "prepare", prepare)
        with pytest.raises(CbpqError, match="not finite any more after step 2 of epoch 2"):
            attempt(job, output, listener=listener)
    attempt(job, output)
    same_result(output, unbroken)


# Real processes


def wait_for(is_alive: Callable[[], bool], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened() and is_alive():
        assert time.monotonic() < deadline, "the process does not get on"
        time.sleep(0.001)


def said(output: Path, word: str) -> int:
    log = output / "checkpoint" / "events.jsonl"
    try:
        return log.read_text().count(word)
    except OSError:
        return 0


# a moment in the life of a process, and how to see from outside that it has come
KILLS: dict[str, Callable[[Path], bool]] = {
    "while it measures the original": lambda output: (output / "checkpoint").exists(),
    "in its first epoch": lambda output: said(output, '"Saved"') >= 2,
    "in its second epoch": lambda output: said(output, '"EpochEnd"') >= 1,
    "while it writes the results": lambda output: said(output, '"quantized"') >= 1,
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed(job: Path, unbroken: Path, tmp_path: Path, moment: str) -> None:
    output = tmp_path / "out"
    process = cbpq_process(arguments(job, output), tmp_path / "log")
    wait_for(process.is_alive, lambda: KILLS[moment](output))
    time.sleep(random.Random(moment).random() * 0.02)
    process.kill()
    process.join()
    if process.exitcode == 0:  # it was quicker than the signal
        same_result(output, unbroken)
        return
    assert process.exitcode == -signal.SIGKILL
    outcome = cli(job, output, "--resume")
    if outcome.code == 2:  # killed after the very last file
        one_line(outcome, 2, "is finished")
        shutil.rmtree(output / "checkpoint", ignore_errors=True)
    else:
        assert outcome.code == 0, outcome.err
    same_result(output, unbroken)


def test_interrupted_as_from_a_keyboard(job: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the process and those that read pictures for it."""
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "cbpq", *arguments(job, output, "-j", "2", data="pictures")],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as in a terminal: a group of its own, so that Ctrl-C reaches its workers too
    )
    wait_for(lambda: process.poll() is None, lambda: said(output, '"Saved"') >= 3)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    last = err.splitlines()[-1]
    assert last.startswith("interrupted: ")
    assert "everything is saved" in last
    assert "--resume" in last
    assert err.count("stopping after this step") == 1
    assert (output / "checkpoint" / "state.pt").exists()

    def pictures(output: Path) -> Outcome:
        flags = (*FLAGS, "-o", output, "--resume", "-j", "0")
        return command("quantize", job / "net.safetensors", "--data", job / "pictures", *flags)

    assert pictures(output).code == 0
    assert pictures(tmp_path / "unbroken").code == 0
    same_result(output, tmp_path / "unbroken")


def test_ticks_are_counted(job: Path, tmp_path: Path) -> None:
    """Phases say how many steps they have, so that a display can tell how much is left."""
    events: list[Event] = []
    attempt(job, tmp_path / "out", listener=events.append)
    assert sum(isinstance(event, Tick) for event in events) == 3 * 2 + 2 * 2 + 4  # measurements, epochs, settling
    assert sum(isinstance(event, EpochEnd) for event in events) == EPOCHS
