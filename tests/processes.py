"""Several processes in a test, as a launcher would start them: all call one function, each told who it is."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# a server that has imported everything forks the processes, which so start in no time
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["small_job", "cbpq.pipeline"])
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
