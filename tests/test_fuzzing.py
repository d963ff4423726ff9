"""Thousands of damaged and hostile files: each ends in one clear line or a sound result; none ends in a traceback,
hangs, or takes more memory than twice what the sound file takes.

A few hundred of them by default, all with ``pytest -m slow``. What was once found stays in tests/data/fuzz.
"""

import contextlib
import functools
import json
import resource
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest
import torch
import typer.main
from fuzzing import mutated
from safetensors import safe_open
from small_job import Outcome, command, refused, write_arrays, write_network

import cbpq
from cbpq.checkpoint import load_checkpoint
from cbpq.errors import CbpqError
from cbpq.events import Interrupted
from cbpq.models import load_model
from cbpq.pipeline import execute
from cbpq.planning import plan

pytestmark = pytest.mark.medium  # a thousand files

SECONDS = 60  # for a file of some kilobytes; a machine that is busy may well need one of them
HEADROOM = 2**28  # bytes that all these files together may add to the process
SLACK = {True: 2**19, False: 2**24}  # bytes that are not the file's: messages and such; free memory that is in pieces
EXACT_EVERY = 25  # files
FOUND = sorted((Path(__file__).parent / "data" / "fuzz").glob("*"))


SUFFIXES = {"cbpq": ".safetensors", "safetensors": ".safetensors", "pth": ".pth", "old pth": ".pth", "state": ".pt"}
SUFFIXES |= {"npz": ".npz"}


class Hang(BaseException):
    """Not an Exception: nothing on the way may take it for its own."""


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """End what hangs, and let the system refuse what would need far more memory than there is reason for."""

    def ring(number: int, frame: FrameType | None) -> NoReturn:
        raise Hang

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, hard))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))  # else half of the time
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sound files, by kind, and data to measure them with."""
    folder = tmp_path_factory.mktemp("sound")
    network = write_network(folder / "safetensors", steps=1)
    write_arrays(folder / "data.npz", train=12, val=6)
    shutil.copy(folder / "data.npz", folder / "npz")
    with safe_open(network, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        metadata = {
            name: text if name == "architecture" else json.loads(text) for name, text in file.metadata().items()
        }
    metadata["numbers"] = [5, 500, 50_000]
    torch.save({"state_dict": state, "epoch": 3, **metadata}, folder / "pth")
    torch.save({"state_dict": state, "epoch": 3, **metadata}, folder / "old pth", _use_new_zipfile_serialization=False)
    given = ("quantize", network, "--data", folder / "data.npz", "--device", "cpu", "-b", "12", "--rounding", "nearest")
    outcome = command(*given, "--epochs", "0", "-o", folder / "out")
    assert outcome.code == 0, outcome.err
    shutil.copy(folder / "out" / "model.safetensors", folder / "cbpq")
    job = plan(str(network), data=str(folder / "data.npz"), device="cpu", settings=[("here", {"rounding": "nearest"})])
    asked = iter((False,) * 12)
    with pytest.raises(Interrupted):
        execute(job, folder / "unfinished", should_stop=lambda: next(asked, True))
    shutil.copy(folder / "unfinished" / "checkpoint" / "state.pt", folder / "state")
    return folder


def evaluate(path: Path, data: Path) -> Outcome:
    return command("evaluate", path, "--data", data, "--device", "cpu", "-b", "6", "-j", "0")


def load(read: Callable[[str], Any], path: Path) -> None:
    with contextlib.suppress(CbpqError):
        read(str(path))


# what each kind of file goes through
CBPQ = {
    "inspect": lambda path, sound: command("inspect", path),
    "load": lambda path, sound: load(cbpq.load, path),
    "evaluate": lambda path, sound: evaluate(path, sound / "data.npz"),
}
WEIGHTS = {**CBPQ, "load": lambda path, sound: load(load_model, path)}
USES: dict[str, dict[str, Callable[[Path, Path], Outcome | None]]] = {
    "cbpq": CBPQ,
    "safetensors": WEIGHTS,
    "pth": WEIGHTS,
    "old pth": WEIGHTS,
    "npz": {"evaluate": lambda path, sound: evaluate(sound / "cbpq", path)},
    "state": {"load": lambda path, sound: load(lambda name: load_checkpoint(Path(name), {}), path)},
}


def use(name: str, kind: str, path: Path, sound: Path, exact: bool = False) -> int:
    """Use a file in one way, and check how that ends. Returns the most bytes it took at a time: of Python's own
    allocations if ``exact``, which is slow; else by how much the process grew.
    """
    if exact:
        tracemalloc.start()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = resident("VmRSS")
    signal.alarm(SECONDS)
    try:
        outcome = USES[kind][name](path, sound)
        peak = tracemalloc.get_traced_memory()[1] if exact else resident("VmHWM") - before
    finally:
        signal.alarm(0)
        tracemalloc.stop()
    if outcome is not None and outcome.code:
        assert outcome.code in (1, 2), outcome.err
        line = refused(outcome, outcome.code)
        assert "out of memory" not in line
        assert len(line) < 2000, line
    return peak


def resident(what: str) -> int:
    """Bytes of memory that the process has (VmRSS), or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def sound_peaks(kind: str, sound: Path) -> dict[tuple[str, bool], int]:
    """What a sound file takes, in each use and either way of measuring; the first time also fills caches."""
    path = sound / f"sound{SUFFIXES[kind]}"
    shutil.copy(sound / kind, path)
    for name in USES[kind]:
        use(name, kind, path, sound)
    return {(name, exact): use(name, kind, path, sound, exact) for name in USES[kind] for exact in (True, False)}


def check(name: str, kind: str, path: Path, sound: Path, exact: bool, most: int) -> None:
    """Use a file, and hold the memory it takes against what a sound one takes."""
    allowed = 2 * max(most, 0) + SLACK[exact]
    # where memory is scarce the system takes pages away, and what comes back looks like growth: but not twice
    if use(name, kind, path, sound, exact) > allowed and (peak := use(name, kind, path, sound, exact)) > allowed:
        raise AssertionError(f"{peak} bytes, where the sound file takes {most}")


def fuzz(kind: str, seeds: range, sound: Path, folder: Path) -> None:
    data, path, failures = (sound / kind).read_bytes(), folder / f"mutated{SUFFIXES[kind]}", []
    with guarded():
        peaks = sound_peaks(kind, sound)
        for seed, name in product(seeds, USES[kind]):
            path.write_bytes(mutated(data, kind, seed))
            exact = seed % EXACT_EVERY == 0
            try:
                check(name, kind, path, sound, exact, peaks[name, exact])
            except (Exception, Hang) as error:
                failures.append(f"{kind} {seed} {name}: {type(error).__name__} {error}"[:1000])
    assert not failures, f"{len(failures)} of {len(seeds)}:\n" + "\n".join(failures[:40])


SOME = {"cbpq": 100, "safetensors": 15, "pth": 30, "old pth": 20, "state": 30, "npz": 30}
ALL = {"cbpq": 10_000, "safetensors": 400, "pth": 600, "old pth": 400, "state": 600, "npz": 2_000}


@pytest.mark.parametrize("kind", SOME)
def test_some_mutated_files(kind: str, sound: Path, tmp_path: Path) -> None:
    fuzz(kind, range(SOME[kind]), sound, tmp_path)


PARTS = [(kind, range(first, min(first + 500, count))) for kind, count in ALL.items() for first in range(0, count, 500)]


@pytest.mark.slow  # 10,000 cbpq files, 2,000 checkpoints of four kinds, 2,000 .npz
@pytest.mark.parametrize("kind, seeds", PARTS, ids=[f"{kind} from {seeds[0]}" for kind, seeds in PARTS])
def test_all_mutated_files(kind: str, seeds: range, sound: Path, tmp_path: Path) -> None:
    fuzz(kind, seeds, sound, tmp_path)


def test_the_same_seed_makes_the_same_file(sound: Path) -> None:
    for kind in ALL:
        data = (sound / kind).read_bytes()
        files = [mutated(data, kind, seed) for seed in range(30)]
        assert files == [mutated(data, kind, seed) for seed in range(30)]
        assert len(set(files)) > 20


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_what_was_found(path: Path, sound: Path) -> None:
    """Files that once did harm; their names begin with their kind."""
    kind = path.name.split("-")[0]
    with guarded():
        for (name, exact), most in sound_peaks(kind, sound).items():
            check(name, kind, path, sound, exact, most)
