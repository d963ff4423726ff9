"""The processes of one run: which of them this is, and what they tell each other.

A run is one process, or several that ``torchrun`` or a scheduler has started and told who they are (``RANK``,
``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``). Then all of them do the same, but for these:

- Training: each process takes its slice of every batch, so ``batch_size`` is that of all of them together. A picture
  is augmented as it would be for one process. DistributedDataParallel averages the gradients, and the denominators of
  the feature loss are averaged too. So N processes take the steps of one, up to rounding, with two exceptions: networks
  that draw random numbers (dropout) draw other ones in each process; and BatchNorm, which on GPUs has the statistics of
  the whole batch (SyncBatchNorm), has those of each process's slice on CPUs, for which PyTorch has no such layer.
- Latent weights, scales and multipliers are never sent: every process computes them from the same gradients. At every
  checkpoint it is checked that codes and multipliers are equal.
- Running statistics of BatchNorm are averaged over the processes whenever the network is saved or measured.
- Measuring: the batches are dealt out, each to one process, so that every picture counts once.
- Before training, every process does the same work and then takes process 0's result, so that not even another kind of
  CPU makes a difference.
- Process 0 alone reads checkpoints, writes files and shows progress.

With one process, all functions here are trivial, and nothing of ``torch.distributed`` is touched.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from cbpq.errors import CbpqError, UsageError, brief

T = TypeVar("T")

PATIENCE = timedelta(hours=2)  # how long one process waits for another, which may be slower at rounding a large network
MEETING = timedelta(minutes=10)  # how long it waits for all to begin
FAREWELL = 5.0  # seconds that process 0 stays after a failure, at most
_FAILURES = "cbpq: how many have failed"  # a key of the store
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class ContactError(CbpqError):
    """The other processes of a run cannot be reached."""


@dataclass(frozen=True)
class Turn:
    """One of the processes that share some work: number ``number``, from 0, of ``of``."""

    number: int = 0
    of: int = 1


ALL = Turn()


@dataclass(frozen=True)
class _Group:
    turn: Turn
    local_rank: int
    store: Any  # dist.Store, which an installation without torch.distributed does not have
    talk: Any  # the gloo group for what is said on the CPU


_group: _Group | None = None


def turn() -> Turn:
    """Which of the run's processes this is."""
    return _group.turn if _group else ALL


def rank() -> int:
    """Number of this process, from 0."""
    return turn().number


def world_size() -> int:
    """Number of processes of this run."""
    return turn().of


def local_rank() -> int:
    """Number of this process among those on its machine, from 0."""
    return _group.local_rank if _group else 0


def is_main() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return rank() == 0


def are_several(environment: Mapping[str, str]) -> bool:
    """Whether the variables speak of several processes."""
    return environment.get("WORLD_SIZE", "1") not in ("", "1")


def join(environment: Mapping[str, str]) -> None:
    """Become one of the processes that the variables speak of; for a run of one process, do nothing.

    Raises:
        UsageError: a variable is missing or makes no sense.
        ContactError: the other processes cannot be reached.
    """
    global _group
    if not are_several(environment):
        return
    numbers = _numbers(environment)
    if not dist.is_available():
        raise UsageError("this build of PyTorch has no torch.distributed; start one process only")
    # which a build without torch.distributed does not have
    from torch.distributed import distributed_c10d
    from torch.distributed.rendezvous import rendezvous

    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    if on_gpus and numbers["LOCAL_RANK"] < torch.cuda.device_count():
        torch.cuda.set_device(numbers["LOCAL_RANK"])
    try:
        shared, _, _ = next(rendezvous("env://", timeout=MEETING))
        store = distributed_c10d.PrefixStore(_attempt(environment), shared)
        dist.init_process_group(
            "nccl" if on_gpus else "gloo",
            store=store,
            rank=numbers["RANK"],
            world_size=numbers["WORLD_SIZE"],
            timeout=None if on_gpus else PATIENCE,
        )
        talk = dist.new_group(backend="gloo", timeout=PATIENCE) if on_gpus else dist.group.WORLD
    except (RuntimeError, ValueError) as error:  # what it raises where a host or port is wrong
        where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        raise ContactError(f"process {numbers['RANK']} cannot reach the others at {where} ({brief(error)})") from error
    _group = _Group(Turn(numbers["RANK"], numbers["WORLD_SIZE"]), numbers["LOCAL_RANK"], store, talk)


def _numbers(environment: Mapping[str, str]) -> dict[str, int]:
    missing = [name for name in _VARIABLES if not environment.get(name)]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(missing)} is not set; start with torchrun or "
            "--nproc-per-node, or set what torchrun sets"
        )
    try:
        numbers = {name: int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    except ValueError as error:
        raise UsageError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers ({error})") from error
    if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise UsageError(f"RANK is {numbers['RANK']}, but there are {numbers['WORLD_SIZE']} processes (WORLD_SIZE)")
    return numbers


def _attempt(environment: Mapping[str, str]) -> str:
    """A name for this start of all processes: torchrun may give those that it starts again the store of the ones before
    them, with addresses in it that are no longer true. On several machines the counts need not agree; there,
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps.
    """
    one_machine = environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"]
    return f"attempt {environment.get('TORCHELASTIC_RESTART_COUNT', '0')}" if one_machine else "attempt"


def leave(together: bool = True) -> None:
    """The end of what ``join`` began; ``together`` waits for the other processes to get there."""
    global _group
    if _group is None:
        return
    if together:
        dist.barrier(group=_group.talk)
    _group = None
    dist.destroy_process_group()


def largest_share(batches: int) -> int:
    """The most batches that one process has of so many."""
    return -(-batches // world_size())


def from_main(make: Callable[[], T]) -> T:
    """What process 0 makes, in every process."""
    if _group is None:
        return make()
    box = [make() if is_main() else None]
    dist.broadcast_object_list(box, 0, group=_group.talk, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]  # None only where make gave it


def gathered(value: T) -> list[T]:
    """What every process has, in the order of their numbers."""
    if _group is None:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_group.talk)
    return values


@torch.no_grad()
def take_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with what process 0 has in them."""
    if _group is None:
        return
    own = list(tensors)
    for tensor, value in zip(own, from_main(lambda: [mine.cpu() for mine in own]), strict=True):
        tensor.copy_(value)


@torch.no_grad()
def mean(value: Tensor) -> Tensor:
    """The mean over all processes, of a tensor on any device; the same bits in each of them."""
    if _group is None:
        return value
    total = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_group.talk if total.device.type == "cpu" else None)
    return total / world_size()


def any_of(flag: bool) -> bool:
    """Whether any process says so."""
    return bool(mean(torch.tensor(float(flag)))) if _group else flag


def with_shared_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    """The network with BatchNorm layers that take the statistics of all processes' pictures, if it is to be trained on
    a GPU by several; the parameters stay the same objects.
    """
    if _group is None or device.type != "cuda":
        return model
    from timm.layers import norm_act  # a slow import; it knows timm's own layers beside PyTorch's

    convert: Callable[[nn.Module], nn.Module] = norm_act.convert_sync_batchnorm
    return convert(model)


def averaging(model: nn.Module, device: torch.device) -> nn.Module | None:
    """The network so wrapped that a backward pass averages its gradients over the processes; None if there is one."""
    if _group is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name is to change, but not in all versions of PyTorch
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=_group.talk if device.type == "cpu" else None,
            broadcast_buffers=False,  # each process keeps its statistics, which are averaged when they are needed
            find_unused_parameters=True,  # such as those of a head that only another training uses
        )


def first_to_say() -> bool:
    """Whether no process has said yet why the run fails; after this, one has."""
    if _group is None:
        return True
    try:
        return bool(_group.store.add(_FAILURES, 1) == 1)
    except RuntimeError:  # it is gone with the process that held it
        return rank() == 1


def wait_for_others() -> None:
    """After a failure: let the other processes notice it, and ask whether something was said, before the store goes."""
    if _group is None or not is_main():
        return
    store, others = _group.store, _group.turn.of - 1
    leave(together=False)  # which closes the connections
    enough = time.monotonic() + FAREWELL
    while store.add(_FAILURES, 0) <= others and time.monotonic() < enough:
        time.sleep(0.05)


def is_lost_contact(error: BaseException) -> bool:
    """Whether the error only says that another process is gone."""
    if _group is None or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "connection closed"))
