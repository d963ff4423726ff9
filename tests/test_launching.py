"""Real launchers: ``--nproc-per-node``, torchrun on one machine and on two, and what happens when a process dies."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from processes import free_port
from small_job import RESULTS, command, contents, environment, events_of, one_line, write_arrays, write_network

from cbpq.fileformat import read

pytestmark = [
    pytest.mark.medium,  # several processes
    pytest.mark.skipif(
        not torch.distributed.is_available() or sys.platform == "win32", reason="this torch has no torch.distributed"
    ),
]

# saved after every step
FLAGS = ("-b", "24", "--epochs", "2", "--rounding", "nearest", "--device", "cpu", "--set", "checkpoint_minutes=0")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_network(folder / "net.safetensors", steps=20, drop_rate=0.2)
    write_arrays(folder / "data.npz", train=24 * 20)
    return folder


Process = subprocess.Popen[str]


def begin(job: Path, output: Path, *flags: object, before: tuple[object, ...] = (sys.executable,)) -> Process:
    flagged = ("-m", "cbpq", "quantize", "net.safetensors", "--data", "data.npz", *FLAGS, "-o", output, *flags)
    return subprocess.Popen(
        [str(argument) for argument in (*before, *flagged)],
        cwd=job,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: Process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def wait_for(process: Process, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not happened() and process.poll() is None:
        assert time.monotonic() < deadline, "the processes do not get on"
        time.sleep(0.005)


def said(output: Path, word: str) -> int:
    try:
        return (output / "checkpoint" / "events.jsonl").read_text().count(word)
    except OSError:
        return 0


def worker(launcher: Process, rank: int) -> int:
    """Number of the process of this rank among a launcher's children."""
    return next(int(child) for child in children(launcher) if f"RANK={rank}" in variables_of(child))


def children(launcher: Process) -> list[str]:
    return Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()


def variables_of(process: str) -> list[str]:
    return Path(f"/proc/{process}/environ").read_text().split("\0")


def file_of(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def test_a_launched_run_fails_with_one_line(job: Path, tmp_path: Path) -> None:
    code, out, err = ended(begin(job, tmp_path / "out", "--nproc-per-node", 2, "-b", 25))
    assert (code, out) == (2, "")
    assert err == "error: batches of 25 pictures cannot be divided evenly among 2 processes; use --batch-size 24\n"
    assert not (tmp_path / "out").exists()


def test_a_launcher_in_a_launcher(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    outcome = command("quantize", job / "net.safetensors", "--nproc-per-node", 2)
    one_line(outcome, 2, "--nproc-per-node starts the processes itself")


@pytest.fixture(scope="module")
def unbroken(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two processes that nothing happened to."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    code, _, err = ended(begin(job, output, before=(*TORCHRUN, "--nproc-per-node", 2)))
    assert code == 0, err
    assert set(contents(output)) == RESULTS
    assert read(output / "model.safetensors").constrained
    return output


@pytest.mark.slow  # starts PyTorch six times
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_killed_in_mid_epoch(job: Path, unbroken: Path, tmp_path: Path, rank: int) -> None:
    """The launcher starts all again, and they go on from the checkpoint: the same file, bit for bit."""
    output = tmp_path / "out"
    process = begin(job, output, "--nproc-per-node", 2)
    wait_for(process, lambda: said(output, '"Saved"') >= 8)
    os.kill(worker(process, rank), signal.SIGKILL)
    code, out, err = ended(process)
    assert code == 0, err
    assert "a process died; this is restart 1" in err
    assert len(re.findall(r"going on after \d+ steps of epoch 1", err)) == 1
    assert "Traceback" not in err
    assert out.count("Exact McNemar test") == 1
    assert set(contents(output)) == RESULTS
    assert file_of(output) == file_of(unbroken)
    assert sum(event["event"] == "Resumed" for event in events_of(output)) == 1


@pytest.mark.slow  # starts PyTorch five times
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_launcher_is_interrupted(job: Path, unbroken: Path, tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "out"
    process = begin(job, output, "--nproc-per-node", 2)
    wait_for(process, lambda: said(output, '"Saved"') >= 8)
    process.send_signal(number)
    code, out, err = ended(process)
    assert (code, out) == (128 + number, "")
    assert err.splitlines()[-1].startswith("interrupted: stopped in epoch 1; everything is saved")
    assert err.count("interrupted: ") == 1
    code, _, err = ended(begin(job, output, "--resume", before=(*TORCHRUN, "--nproc-per-node", 2)))
    assert code == 0, err
    assert file_of(output) == file_of(unbroken)


# Two machines


class Host(NamedTuple):
    """A network namespace, which is to a process what a machine of its own is."""

    namespace: str
    interface: str
    address: str


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Two, with a cable between them."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root, and ip of the package iproute2")
    tag = f"cbpq{os.getpid() % 10000}"
    found = [Host(f"{tag}{end}", f"{tag}{end}", f"10.231.0.{number}") for number, end in enumerate("ab", 1)]
    try:
        for host in found:
            ip("netns", "add", host.namespace)
        first, second = found
        cable = ("type", "veth", "peer", "name", second.interface, "netns", second.namespace)
        ip("link", "add", first.interface, "netns", first.namespace, *cable)
        for host in found:
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            ip("-n", host.namespace, "link", "set", "lo", "up")
            ip("-n", host.namespace, "link", "set", host.interface, "up")
        yield found
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    finally:
        for host in found:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.mark.slow  # starts PyTorch eight times
@pytest.mark.parametrize("killed", [False, True])
def test_two_machines(
    job: Path, unbroken: Path, hosts: list[Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Each has a folder of its own, with the network and the data; a process of the second one may be killed."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    port = free_port()
    launchers = []
    for number, host in enumerate(hosts):
        folder = shutil.copytree(job, tmp_path / host.namespace)
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", host.interface)
        torchrun = (
            *("ip", "netns", "exec", host.namespace, *TORCHRUN, "--nnodes", 2, "--nproc-per-node", 1),
            *("--max-restarts", 3, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:{port}"),
            # what a machine finds out by its name, where it has one
            *("--rdzv-conf", f"is_host={1 - number}", "--local-addr", host.address),
        )
        launchers.append(begin(folder, Path("out"), before=torchrun))
    first, second = launchers
    output = tmp_path / hosts[0].namespace / "out"
    if killed:
        wait_for(first, lambda: said(output, '"Saved"') >= 8)
        os.kill(int(children(second)[0]), signal.SIGKILL)
    results = [ended(launcher) for launcher in launchers]
    assert [code for code, _, _ in results] == [0, 0], results
    assert sum(out.count("Exact McNemar test") for _, out, _ in results) == 1
    written = [(tmp_path / host.namespace / "out").exists() for host in hosts]
    assert sorted(written) == [False, True]  # any of the two may be the first
    output = tmp_path / hosts[written.index(True)].namespace / "out"
    assert set(contents(output)) == RESULTS
    assert file_of(output) == file_of(unbroken)
    resumed = sum(event["event"] == "Resumed" for event in events_of(output))
    assert resumed == killed
