"""What can happen to a run from outside, and how each of it has to end: one clear line, the documented exit code,
nothing half-written, an earlier result as it was; and ``--resume`` ends in the very file of an undisturbed run.

Stopping at any event and other damage to checkpoints are in test_resume.
"""

import errno
import functools
import io
import itertools
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import cbpq_process
from safetensors.numpy import load_file
from small_job import (
    RESULTS,
    Outcome,
    command,
    contents,
    one_line,
    refused,
    report_of,
    same_result,
    write_arrays,
    write_folder,
    write_network,
)

from cbpq import recipe, training
from cbpq.cli.display import Display
from cbpq.events import Event
from cbpq.locking import LOCK, held
from cbpq.training import Step

pytestmark = pytest.mark.medium  # whole runs, disturbed

STEPS = 8  # two epochs of four
FLAGS = ("-b", "12", "--epochs", "2", "--device", "cpu", "--rounding", "nearest")
EVERY_STEP = ("--set", "checkpoint_minutes=0")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network, data in both forms, what unbroken runs on them give, and an earlier result."""
    folder = tmp_path_factory.mktemp("job")
    write_network(folder / "net.safetensors", steps=20, drop_rate=0.2)
    write_arrays(folder / "data.npz", train=48, val=24)
    write_folder(folder / "pictures", train=48, val=24)
    for data in ("data.npz", "pictures"):
        assert run(folder, folder / f"whole {data}", data).code == 0
    assert run(folder, folder / "earlier", "data.npz", "--seed", "1").code == 0
    return folder


def run(job: Path, output: Path, data: str, *flags: object) -> Outcome:
    return command(*arguments(job, output, data, *flags))


def arguments(job: Path, output: Path, data: str, *flags: object) -> list[str]:
    chosen = ("quantize", job / "net.safetensors", "--data", job / data, *FLAGS, "-j", "0", *flags, "-o", output)
    return [str(argument) for argument in chosen]


# What happens. Each of these is told about the run's folder and prepares the fault.

Fault = Callable[[Path, pytest.MonkeyPatch, random.Random], None]


def at_a_step(happens: Callable[[Path], None], among: Sequence[int] = range(1, STEPS)) -> Fault:
    """Let it happen once, after a step that is drawn at random, but not the last."""

    def prepare(folder: Path, patch: pytest.MonkeyPatch, rng: random.Random) -> None:
        steps, moment, show = itertools.count(1), rng.choice(among), Display.show

        def shown(self: Display, event: Event) -> None:
            show(self, event)
            if isinstance(event, Step) and next(steps) == moment:
                happens(folder)

        patch.setattr(Display, "show", shown)

    return prepare


def pictures(folder: Path) -> list[Path]:
    return sorted((folder / "pictures" / "train").rglob("*.png"))


def vanish(folder: Path) -> None:
    shutil.rmtree(folder / "pictures")


def cut_short(folder: Path) -> None:
    for path in pictures(folder):
        os.truncate(path, path.stat().st_size // 2)


def turn_into_garbage(folder: Path) -> None:
    for path in pictures(folder):
        path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def become_folders(folder: Path) -> None:
    for path in pictures(folder):
        path.unlink()
        path.mkdir()


def kill_readers(folder: Path) -> None:
    readers = multiprocessing.active_children()
    for process in readers:
        os.kill(int(process.pid or 0), signal.SIGKILL)
    for process in readers:
        process.join()


def remove_arrays(folder: Path) -> None:
    (folder / "data.npz").unlink()


def send(number: int, times: int = 1) -> Callable[[Path], None]:
    """To this process and those that read pictures for it, as schedulers and terminals do."""

    def happens(folder: Path) -> None:
        for _ in range(times):
            for process in multiprocessing.active_children():
                os.kill(int(process.pid or 0), number)
            os.kill(os.getpid(), number)

    return happens


def loss_becomes(value: float) -> Fault:
    def prepare(folder: Path, patch: pytest.MonkeyPatch, rng: random.Random) -> None:
        steps, moment = itertools.count(), rng.randrange(1, STEPS)

        def loss_of(*arguments: Any) -> torch.Tensor:
            loss = recipe.loss_of(*arguments)
            return loss * value if next(steps) == moment else loss

        patch.setattr(training, "loss_of", loss_of)

    return prepare


def writes_fail(number: int) -> Fault:
    """From a write on that is drawn at random."""

    def prepare(folder: Path, patch: pytest.MonkeyPatch, rng: random.Random) -> None:
        Disk(patch, number, rng.randrange(20, 40))

    return prepare


def clock(name: str, read: Callable[[float, random.Random], float]) -> Fault:
    """A clock of the module ``time`` that shows ``read`` of the true time."""

    def prepare(folder: Path, patch: pytest.MonkeyPatch, rng: random.Random) -> None:
        true: Callable[[], float] = getattr(time, name)
        patch.setattr(time, name, lambda: read(true(), rng))
        patch.setattr(time, "localtime", lambda seconds=None: time.gmtime(rng.randrange(2**31)))

    return prepare


class Disk:
    """Counts what is written, and from the write number ``left`` on refuses, half-done, with an error's ``number``."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, left: float = math.inf) -> None:
        self.number, self.left, self.writes = number, left, 0
        for function in ("replace", "mkdir", "fsync"):
            patch.setattr(os, function, self._counted(getattr(os, function)))
        true_open, true_fdopen, true_append = os.open, os.fdopen, Path.open

        def open_(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_CREAT:
                self._count()
            return true_open(path, flags, *rest, **more)

        def append(path: Path, mode: str = "r", **more: Any) -> Any:
            return self._stream(true_append(path, mode, **more)) if mode == "a" else true_append(path, mode, **more)

        patch.setattr(os, "open", open_)
        patch.setattr(os, "fdopen", lambda descriptor, mode: self._stream(true_fdopen(descriptor, mode)))
        patch.setattr(Path, "open", append)

    def _count(self) -> None:
        self.writes += 1
        if self.writes > self.left:
            raise OSError(self.number, os.strerror(self.number))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*arguments: Any, **keywords: Any) -> Any:
            self._count()
            return function(*arguments, **keywords)

        return counted

    def _stream(self, stream: Any) -> Any:
        true = stream.write

        class Stream(io.IOBase):
            def write(inner, data: Any) -> None:
                try:
                    self._count()
                except OSError:
                    true(data[: len(data) // 2])
                    raise
                true(data)

            def flush(inner) -> None:
                stream.flush()

            def fileno(inner) -> int:
                return int(stream.fileno())

            def close(inner) -> None:
                stream.close()

        return Stream()


# The table


@dataclass(frozen=True)
class Row:
    """A fault, the exit code it ends with, what the one line says, and the run it happens to."""

    fault: Fault
    code: int
    says: tuple[str, ...] = ()
    data: str = "data.npz"
    workers: int = 0


SAVED = ("everything is saved", "--resume")
UNREADABLE = ("pictures/train/class", ".png cannot be", "--skip-bad-images")
LOST = "a data-loading worker process died"
FULL, READ_ONLY = "No space left on device", "Read-only file system"

FAULTS = {
    # the data
    "pictures vanish": Row(at_a_step(vanish), 1, (*UNREADABLE, "No such file"), "pictures"),
    "pictures vanish before their readers": Row(at_a_step(vanish), 1, (*UNREADABLE, "No such file"), "pictures", 2),
    "pictures are cut short": Row(at_a_step(cut_short), 1, UNREADABLE, "pictures"),
    "pictures are cut short before their readers": Row(at_a_step(cut_short), 1, UNREADABLE, "pictures", 2),
    "pictures turn into garbage": Row(at_a_step(turn_into_garbage), 1, ("is not a picture",), "pictures"),
    "pictures turn into garbage before their readers": Row(
        at_a_step(turn_into_garbage), 1, ("is not a picture",), "pictures", 2
    ),
    "pictures become folders": Row(at_a_step(become_folders), 1, ("is not a regular file",), "pictures"),
    "an array file vanishes": Row(at_a_step(remove_arrays), 0),  # it was read whole
    # processes and signals
    # a reader that has read all of its epoch is not missed
    "a reader is killed": Row(at_a_step(kill_readers, (1, 2, 5, 6)), 1, (LOST, "--workers"), "pictures", 1),
    "SIGTERM": Row(at_a_step(send(signal.SIGTERM)), 143, SAVED),
    "SIGTERM to every process, twice": Row(at_a_step(send(signal.SIGTERM, times=2)), 143, SAVED, "pictures", 2),
    "Ctrl-C": Row(at_a_step(send(signal.SIGINT)), 130, SAVED),
    # numbers
    "the loss becomes NaN": Row(loss_becomes(math.nan), 1, ("the loss became nan in epoch", "lower --lr")),
    "the loss becomes infinite": Row(loss_becomes(math.inf), 1, ("the loss became inf in epoch", "lower --lr")),
    # the disk
    "the disk is full": Row(writes_fail(errno.ENOSPC), 1, ("cannot write", FULL)),
    "the quota is used up": Row(writes_fail(errno.EDQUOT), 1, ("cannot write",)),
    "the output becomes read-only": Row(writes_fail(errno.EROFS), 1, ("cannot write", READ_ONLY)),
    "the disk fails": Row(writes_fail(errno.EIO), 1, ("cannot write",)),
    # the clock
    "the clock is set at every look": Row(clock("time", lambda true, rng: rng.uniform(-1e9, 4e9)), 0),
    "the clock runs backwards": Row(clock("time", lambda true, rng: -true), 0),
    "the fine clock stands still": Row(clock("perf_counter", lambda true, rng: 1.0), 0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(job: Path, tmp_path: Path, name: str) -> None:
    row, output, rng = FAULTS[name], tmp_path / "out", random.Random(name)
    for source in ("net.safetensors", "data.npz"):
        shutil.copy(job / source, tmp_path)
    shutil.copytree(job / "pictures", tmp_path / "pictures")
    shutil.copytree(job / "earlier", output)
    with pytest.MonkeyPatch.context() as patch:
        row.fault(tmp_path, patch, rng)
        outcome = run(tmp_path, output, row.data, *EVERY_STEP, "--overwrite", "-j", row.workers)
    if row.code == 0:
        assert outcome.code == 0, outcome.err
    else:
        ended(outcome, row.code, *row.says)
        assert contents(output, leave_out=["checkpoint"]) == contents(job / "earlier")
        assert {path.name for path in (output / "checkpoint").iterdir()} == {"state.pt", "events.jsonl"}
        shutil.copytree(job / "pictures", tmp_path / "mended")
        shutil.rmtree(tmp_path / "pictures", ignore_errors=True)
        (tmp_path / "mended").rename(tmp_path / "pictures")
        outcome = run(tmp_path, output, row.data, "--resume")
        assert outcome.code == 0, outcome.err
        assert "going on after" in outcome.err
    same_result(output, job / f"whole {row.data}")
    for tensor in load_file(output / "model.safetensors").values():
        assert tensor.dtype.kind != "f" or math.isfinite(tensor.sum())


def ended(outcome: Outcome, code: int, *parts: str) -> None:
    """Check how a run ended that failed or was asked to stop."""
    if code < 128:
        refused(outcome, code, *parts)
        return
    assert outcome.code == code, outcome.err
    assert outcome.err.splitlines()[-1].startswith("interrupted: ")
    assert all(part in outcome.err.splitlines()[-1] for part in parts)
    assert outcome.err.count("stopping after this step") == 1


# Every write of a run fails once


def count_writes(job: Path, tmp_path: Path) -> int:
    output = tmp_path / "counted"
    shutil.copytree(job / "earlier", output)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, errno.ENOSPC)
        assert run(job, output, "data.npz", "--overwrite").code == 0
    same_result(output, job / "whole data.npz")
    return disk.writes


def full_at(job: Path, output: Path, write: int) -> None:
    """A run that replaces a result, on a disk that is full from a write on, and the same again with room."""
    whole, earlier = contents(job / "whole data.npz"), contents(job / "earlier")
    shutil.copytree(job / "earlier", output)
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, errno.ENOSPC, write)
        outcome = run(job, output, "data.npz", "--overwrite")
    if outcome.code:
        refused(outcome, 1, "cannot write", FULL)
        left = contents(output, leave_out=["checkpoint"])
        assert left.keys() == earlier.keys()
        changed = {name for name in left if left[name] != earlier[name]}
        # only when everything is written, the results take the place of the earlier ones, one after the other
        assert not changed or left["model.safetensors"] == whole["model.safetensors"]
        assert not list(output.rglob("*.tmp"))
        unfinished = (output / "checkpoint" / "state.pt").exists()
        assert unfinished or not (output / "checkpoint").exists()
        outcome = run(job, output, "data.npz", "--resume" if unfinished else "--overwrite")
        assert outcome.code == 0, outcome.err
    same_result(output, job / "whole data.npz")


def test_a_disk_that_is_full_at_some_writes(job: Path, tmp_path: Path) -> None:
    writes = count_writes(job, tmp_path)
    for write in (0, random.Random(0).randrange(1, writes - 8), writes - 8, writes - 3):
        full_at(job, tmp_path / str(write), write)


@pytest.mark.slow  # two runs for each of the hundred writes of a run
def test_a_disk_that_is_full_at_any_write(job: Path, tmp_path: Path) -> None:
    writes = count_writes(job, tmp_path)
    for write in range(writes + 1):
        full_at(job, tmp_path / str(write), write)


# Killed


def killed_at(job: Path, output: Path, seconds: float, *flags: object) -> bool:
    """Start or resume a run and kill it after some time; whether it was still there."""
    process = cbpq_process(arguments(job, output, "data.npz", *EVERY_STEP, *flags), output.with_suffix(".log"))
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), output.with_suffix(".log").read_text()
    return process.exitcode != 0


def kill_and_resume(job: Path, folder: Path, kills: int, seed: int) -> int:
    """Kill runs at random moments until there were as many kills; resume each in the end. How many runs it took."""
    rng, killed, runs, slowest = random.Random(seed), 0, 0, 0.0
    for name in ("starts the server", "tells how long it takes"):
        begun = time.monotonic()
        assert not killed_at(job, folder / name, 600)
        slowest = time.monotonic() - begun
    while killed < kills:
        output = folder / str(runs)
        runs += 1
        again = killed_at(job, output, rng.uniform(0, slowest))
        killed += again
        while again and killed < kills and rng.random() < 0.3:  # and what was resumed is killed, too
            if not (output / "checkpoint" / "state.pt").exists():
                break
            again = killed_at(job, output, rng.uniform(0, slowest), "--resume")
            killed += again
        if again:
            outcome = run(job, output, "data.npz", "--resume")
            if outcome.code == 2:  # killed after the very last file
                one_line(outcome, 2, "is finished")
                shutil.rmtree(output / "checkpoint", ignore_errors=True)
                (output / LOCK).unlink(missing_ok=True)
            else:
                assert outcome.code == 0, outcome.err
        same_result(output, job / "whole data.npz")
        shutil.rmtree(output)
    return runs


def test_killed_at_some_moments(job: Path, tmp_path: Path) -> None:
    kill_and_resume(job, tmp_path, 2, seed=0)


@pytest.mark.slow  # real processes
def test_killed_at_fifty_random_moments(job: Path, tmp_path: Path) -> None:
    runs = kill_and_resume(job, tmp_path, 50, seed=1)
    assert runs > 2


# Two at once


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_two_runs_into_one_folder(job: Path, tmp_path: Path, method: str) -> None:
    """The second is refused, whatever it asks for. When the first is killed, its lock keeps nobody out, and the readers
    of its pictures end, too.
    """
    output, busy = tmp_path / "out", "another run is writing to"
    given = arguments(job, output, "pictures", *EVERY_STEP, "--epochs", "999", "-j", "2")
    first = cbpq_process(given, tmp_path / "log", method)
    state = output / "checkpoint" / "state.pt"
    deadline = time.monotonic() + 100
    while not state.exists():
        assert first.is_alive(), (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for flags in ((), ("--resume",), ("--overwrite",)):
        one_line(run(job, output, "data.npz", *flags), 2, busy, str(output), "-o")
    readers: list[int] = []
    while not readers:  # there are none between two epochs
        readers = descendants(int(first.pid or 0))
    first.kill()
    first.join()
    assert (output / LOCK).exists()
    outcome = run(job, output, "data.npz", "--overwrite")
    assert outcome.code == 0, outcome.err
    same_result(output, job / "whole data.npz")
    while any(Path(f"/proc/{reader}").exists() for reader in readers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def descendants(process: int) -> list[int]:
    """Processes that it started, and those that these started."""
    try:
        own = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it ended just now
        return []
    return [int(number) for number in own] + [below for number in own for below in descendants(int(number))]


def comparison(job: Path, output: Path) -> list[str]:
    settings = (
        "--set",
        "batch_size=12",
        "--set",
        "rounding=nearest",
        "--epochs",
        "2",
        "--seeds",
        "1",
        "--method",
        "cbp",
    )
    given = ("compare", job / "net.safetensors", "--data", job / "data.npz", "--device", "cpu", *settings, "-o", output)
    return [str(argument) for argument in given]


def test_two_comparisons_into_one_folder(job: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    compared = comparison(job, output)
    with held(output):
        for more in ((), ("--resume",), ("--overwrite",)):
            one_line(command(*compared, *more), 2, "another run is writing to", str(output))
    assert not output.exists()
    with held(output / "runs" / "cbp-two-bit-shift-0"):  # a single run, in the place of one of the comparison's
        refused(command(*compared), 2, "another run is writing to", "cbp-two-bit-shift-0")
    assert not output.exists()
    assert command(*compared).code == 0
    assert not (output / LOCK).exists()


def test_a_comparison_ends_what_a_kill_left_between_two_results(job: Path, tmp_path: Path) -> None:
    """The report is there already, but not all that a comparison reads."""
    output = tmp_path / "out"
    compared = comparison(job, output)
    with pytest.MonkeyPatch.context() as patch:
        true = os.replace

        def replace(old: Any, new: Any) -> None:
            if Path(new) == output / "runs" / "cbp-two-bit-shift-0" / "events.jsonl":
                raise OSError(errno.EIO, "as if it were killed here")
            true(old, new)

        patch.setattr(os, "replace", replace)
        refused(command(*compared), 1, "cannot write")
    assert (output / "runs" / "cbp-two-bit-shift-0" / "report.json").exists()
    outcome = command(*compared, "--resume")
    assert outcome.code == 0, outcome.err
    assert set(contents(output / "runs" / "cbp-two-bit-shift-0")) == RESULTS


def test_a_comparison_that_is_terminated_goes_on(job: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    compared = comparison(job, output)
    with pytest.MonkeyPatch.context() as patch:
        at_a_step(send(signal.SIGTERM))(tmp_path, patch, random.Random(0))
        ended(command(*compared), 143, *SAVED)
    assert command(*compared, "--resume").code == 0


# The clock


def test_a_time_limit_follows_the_clock_that_nobody_sets(job: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock("time", lambda true, rng: rng.uniform(-1e9, 4e9))(tmp_path, patch, random.Random(0))
        flags = ("--epochs", "100000", "--max-time", "0.005", "--set", "evaluate_every=0")
        outcome = run(job, tmp_path / "out", "data.npz", *flags)
    assert outcome.code == 0, outcome.err
    assert report_of(tmp_path / "out")["training"]["seconds"] >= 0.3


def test_a_clock_that_leaps_as_after_a_suspension(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is up at once; the run ends properly."""
    begun = itertools.count(step=3600)
    true = training.prepare

    def prepare(*arguments: Any, **keywords: Any) -> training.Run:
        made = true(*arguments, **keywords)
        made._clock = lambda: float(next(begun))
        return made

    monkeypatch.setattr("cbpq.pipeline.prepare", prepare)
    outcome = run(job, tmp_path / "out", "data.npz", "--epochs", "100000", "--max-time", "60")
    assert outcome.code == 0, outcome.err
    assert report_of(tmp_path / "out")["training"]["steps"] <= 2
