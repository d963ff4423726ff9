"""What the constraint costs: a training step with it, as a ratio to the plain step in the same run, and peak memory.

    python examples/benchmarks/step_cost.py resnet18 --size 64 --batch-size 32
    python examples/benchmarks/step_cost.py timm:resnet50 --batch-size 256 --device cuda --amp --channels-last

Weights are random: they do not change the time. Plain and constrained steps alternate, so that whatever else the
machine does falls on both; on a CPU that others use too, the ratio of processor times is what to go by. The constraint
is measured where it does most, in the middle of its schedule: window neither open nor shut, every multiplier at work.
Memory is measured in a process for each of the two.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import cbpq
from cbpq import fused
from cbpq.constrained import Constrained
from cbpq.devices import PeakMemory, describe_device, resolve_device
from cbpq.models import load_model

SHARE = 0.5  # of the budget, where the constraint is measured
WARM_UP = 2
MEMORY_STEPS = 3
WIDTH = 110
CLOCKS = ("clock", "processor")
PASSES = 7
"""Numbers per weight that have to move through memory: latent weight, constrained weight, multiplier and gradient are
read and the gradient written before the optimizer's step; latent weight read and constrained weight written after it.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("network", nargs="?", default="resnet18", help="torchvision's name, or timm:NAME")
    options.add_argument("--size", type=int, default=224, help="pixels")
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--constraint", default="two-bit-shift")
    options.add_argument("--method", default="cbp")
    options.add_argument("--preset", default="default")
    options.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    options.add_argument("--device", default="cpu")
    options.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    options.add_argument("--channels-last", action="store_true")
    options.add_argument("--compiled", action="store_true", help="as a long run goes on, with its passes compiled")
    options.add_argument("--steps", type=int, default=6, help="of each kind")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    options.add_argument("--memory-of", choices=("plain", "constrained"), help=argparse.SUPPRESS)
    return options


class Job:
    """A network, its optimizer and a batch, with or without the constraint."""

    def __init__(self, args: argparse.Namespace, constrain: bool) -> None:
        torch.manual_seed(0)
        self.device = resolve_device(args.device)
        self.amp = args.amp
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        loaded = load_model(args.network, random=True, num_classes=None)
        self.network: nn.Module = loaded.model.to(self.device).train()
        self.network.to(memory_format=layout)
        images = torch.randn(args.batch_size, 3, args.size, args.size, device=self.device)
        self.images = images.contiguous(memory_format=layout)
        self.labels = torch.randint(loaded.num_classes, (args.batch_size,), device=self.device)
        parameters = self.network.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, lr=1e-4)
            if args.optimizer == "adamw"
            else torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
        )
        self.constrained: Constrained | None = None
        if constrain:
            self.constrained = cbpq.constrain(
                self.network,
                self.optimizer,
                args.constraint,
                args.method,
                preset=args.preset,
                example_input=self.images[:1],
            )
            self.constrained.advance(SHARE)

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            loss = nn.functional.cross_entropy(self.network(self.images).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        if self.constrained is not None:
            self.constrained.advance(SHARE)

    def weights(self) -> int:
        """How many weights are constrained."""
        found = self.constrained
        return sum(found.latent(name).numel() for name in found.names) if found else 0


def seconds(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """How long something takes, on a GPU until it has finished there: by the clock, and of the processor's time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started, used = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, time.process_time() - used


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / min(seconds(lambda: target.copy_(source), device)[0] for _ in range(5))


def peak_memory(args: argparse.Namespace) -> int:
    """Peak memory of a few steps in this process; 0 where the system does not tell."""
    job = Job(args, args.memory_of == "constrained")
    peak = PeakMemory(job.device)
    for _ in range(MEMORY_STEPS):
        job.step()
    return peak.bytes() or 0


def memory_of(kind: str) -> int:
    """Peak memory of a few steps in a process of their own."""
    command = [sys.executable, *sys.argv, "--memory-of", kind]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as plain values: seconds, bytes, and ratios to the plain step."""
    memory = {kind: memory_of(kind) for kind in ("plain", "constrained")}
    jobs = {"plain": Job(args, False), "constrained": Job(args, True)}
    device, weights = jobs["plain"].device, jobs["constrained"].weights()
    for job in jobs.values():
        for _ in range(WARM_UP):
            job.step()
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in jobs}
    for _ in range(args.steps):
        for kind, job in jobs.items():
            times[kind].append(seconds(job.step, device))
    clocks = {
        clock: {kind: [round(pair[number], 5) for pair in pairs] for kind, pairs in times.items()}
        for number, clock in enumerate(CLOCKS)
    }
    moved = bandwidth(device)
    return {
        "settings": {key: value for key, value in vars(args).items() if key not in ("json", "memory_of")},
        "device": describe_device(device),
        "torch": torch.__version__,
        "weights": weights,
        "seconds": clocks,
        "ratio": {clock: median(found["constrained"]) / median(found["plain"]) for clock, found in clocks.items()},
        "memory": memory,
        "memory_ratio": memory["constrained"] / memory["plain"] if memory["plain"] else None,
        "bandwidth": moved,
        "floor": 4 * PASSES * weights / moved,
    }


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    given = result["settings"]
    what = f"{given['network']}, {given['size']} px, batch {given['batch_size']}, {given['optimizer']}"
    how = f"{given['method']}, {given['constraint']}, preset {given['preset']}{', compiled' * given['compiled']}"
    rows = Table(title=f"{what}\n{how}; {result['device']}")
    rows.add_column()
    for heading in ("plain", "constrained", "ratio"):
        rows.add_column(heading, justify="right")
    for clock, found in result["seconds"].items():
        steps = [f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})" for values in found.values()]
        rows.add_row(f"s of {clock} time", *steps, f"{result['ratio'][clock]:.3f}")
    if result["memory_ratio"]:
        megabytes = [f"{value / 1e6:.0f}" for value in result["memory"].values()]
        rows.add_row("MB at most", *megabytes, f"{result['memory_ratio']:.3f}")
    plain = median(result["seconds"]["clock"]["plain"])
    rows.add_row(
        "s by bandwidth alone",
        f"{result['bandwidth'] / 1e9:.1f} GB/s",
        f"+ {result['floor']:.3f}",
        f"{1 + result['floor'] / plain:.3f}",
    )
    return rows


def main() -> None:
    """Measure, print the table, and write the JSON."""
    args = parser().parse_args()
    if args.compiled:
        fused.ENOUGH = 0
    if args.memory_of:
        print(peak_memory(args))
        return
    result = measure(args)
    Console(width=WIDTH).print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
