"""Processes in a test: several, as a launcher would start them, that call one function, or one that is cbpq."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from cbpq.cli import main

T = TypeVar("T")

# a server that has imported everything forks the processes, which so start in no time; it finds installed modules only
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["timm", "cbpq.pipeline", "cbpq.cli.quantize", "cbpq.cli.evaluate"])
NOTHING: Mapping[str, Any] = MappingProxyType({})


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}


def in_processes(
    count: int,
    work: Callable[..., T],
    *arguments: Any,
    each: Sequence[Mapping[str, str]] = (),
    more: Mapping[str, Any] = NOTHING,
) -> list[T]:
    """What ``work(rank, *arguments, **more)`` returns in each of ``count`` processes.

    ``each`` holds further variables for some of them.
    """
    port = free_port()
    environments = [variables(rank, count, port) for rank in range(count)]
    for environment, added in zip(environments, each, strict=False):
        environment.update(added)
    ends: list[Connection] = []
    processes = []
    for rank, environment in enumerate(environments):
        here, there = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_call, args=(there, environment, work, (rank, *arguments), dict(more)))
        process.start()
        there.close()
        ends.append(here)
        processes.append(process)
    try:
        results: list[Any] = [pickle.loads(end.recv_bytes()) if end.poll(240) else "it does not get on" for end in ends]
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    for result in results:
        assert not isinstance(result, str), result
    return [result[0] for result in results]


def _call(
    end: Connection, environment: Mapping[str, str], work: Callable[..., T], arguments: Any, more: Mapping[str, Any]
) -> None:
    """Send a tuple of what the work returns, or a text that says why it does not."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    try:
        result: Any = (work(*arguments, **more),)
    except BaseException:
        result = traceback.format_exc()
    end.send_bytes(pickle.dumps(result))  # whole: send() would leave tensors in memory that ends with this process


def cbpq_process(arguments: Sequence[object], log: Path, readers: str = "fork") -> BaseProcess:
    """A whole command as a process of its own, which starts others in the given way; what it says is in ``log``."""
    process = CONTEXT.Process(target=_cbpq, args=([str(argument) for argument in arguments], log, readers))
    process.start()
    return process


def _cbpq(arguments: list[str], log: Path, readers: str) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method(readers, force=True)
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os._exit(main(arguments))
