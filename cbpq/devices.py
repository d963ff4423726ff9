"""Which device a run uses, from the name the user gave."""

import torch

from cbpq.errors import MissingPartError, UsageError

NAMES = ("auto", "cpu", "cuda", "cuda:N", "mps")


def resolve_device(name: str) -> torch.device:
    """The device ``name`` stands for; ``auto`` takes a GPU where there is one.

    Raises:
        UsageError: no device is called so.
        MissingPartError: this machine does not have it.
    """
    kind, colon, number = name.strip().lower().partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (colon and not (kind == "cuda" and number.isdecimal())):
        raise UsageError(f"unknown device {name!r}; choose one of {', '.join(NAMES)}")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda":
        return _cuda(int(number) if colon else None)
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
