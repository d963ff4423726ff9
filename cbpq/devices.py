"""Which device a run uses, from the name the user gave."""

import contextlib
import sys
from pathlib import Path

import torch

from cbpq import distributed
from cbpq.errors import MissingPartError, UsageError

NAMES = ("auto", "cpu", "cuda", "cuda:N", "mps")


def resolve_device(name: str) -> torch.device:
    """The device ``name`` stands for; ``auto`` takes a GPU where there is one. Of several processes on a machine, each
    has the GPU of its number.

    Raises:
        UsageError: no device is called so.
        MissingPartError: this machine does not have it.
    """
    kind, colon, number = name.strip().lower().partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (colon and not (kind == "cuda" and number.isdecimal())):
        raise UsageError(f"unknown device {name!r}; choose one of {', '.join(NAMES)}")
    several = distributed.world_size() > 1
    if several and (kind == "mps" or colon):
        raise UsageError(f"--device {name} is one device for all processes; use cuda (each takes its own GPU) or cpu")
    if kind == "auto":
        mps = torch.backends.mps.is_available() and not several
        kind = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if kind == "cuda":
        return _cuda(int(number) if colon else distributed.local_rank() if several else None)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise MissingPartError("device mps is not available here; use --device cpu")
    return torch.device(kind)


def _cuda(index: int | None) -> torch.device:
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            why = "this build of PyTorch has no CUDA; install one that has, or use --device cpu"
        else:
            why = "PyTorch finds no usable GPU or driver; use --device cpu"
        raise MissingPartError(f"device cuda is not available: {why}")
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        raise MissingPartError(f"device cuda:{index} does not exist; this machine has cuda:0 to cuda:{count - 1}")
    return torch.device("cuda") if index is None else torch.device("cuda", index)


def describe_device(device: torch.device) -> str:
    """The device in words for reports, such as ``cuda (NVIDIA H200)`` or ``cpu (2 threads)``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return _cpu() if device.type == "cpu" else str(device)


def _cpu() -> str:
    threads = torch.get_num_threads()
    return f"cpu ({threads} {'thread' if threads == 1 else 'threads'})"


class PeakMemory:
    """The most memory in use since this object was made: of the GPU for a run on one, else of the process.

    Where the system cannot start counting anew, it is the most since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):  # Linux: the high-water mark goes down to what is in use
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int | None:
        """The peak so far, None if the system does not tell."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next((line.split()[1] for line in status if line.startswith("VmHWM:")), ""))
        with contextlib.suppress(ImportError):
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return None
