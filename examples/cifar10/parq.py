"""torchao's PARQ on the terms of ``cbpq compare``: the same network, data, order, budget, optimizer, loss and measure.

    pip install ".[torchao]"
    python examples/cifar10/parq.py SOURCE --weights FILE --data FILE --constraint binary ternary four-levels -o OUT

PARQ (Jin et al., *PARQ: Piecewise-Affine Regularized Quantization*, ICML 2025, arXiv 2503.15748) draws the weights that
the network computes with from the latent ones to the levels, by a piecewise-affine map that becomes a staircase in the
course of training. The levels are those of least-squares binary quantization (Pouransari et al., CVPR Workshops 2020),
here of each output channel: {−v, v}, {−v, 0, v}, or four, {±v₁ ± v₂}, found anew from the latent weights every few
steps. Latent weights start at the original network's.

Its own settings are those the authors train ResNet-20 on CIFAR-10 with (``scripts/qat_resnet_cifar10.sh`` in
github.com/facebookresearch/parq, else the defaults of the script it calls), in proportion to the budget: steepness 100,
annealing from the first step to three quarters of the budget (epoch 150 of 200), levels found greedily every 10 steps,
and before all a short warm-up on float weights (200 of 78,200 steps). torchao's documentation suggests a steepness of
1 to 20: ``--steepness``.

Each finished run is a file ``OUT/parq-CONSTRAINT-SEED.json``, which is not made again; ``OUT/parq.json`` holds them all
in the form of ``comparison.json``.
"""

import argparse
import copy
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from torch import nn

from cbpq.atomic import atomic_write, writing
from cbpq.comparison import Cell, comparison_of, differences, score_of, seed_range
from cbpq.compensation import Rounding, round_network
from cbpq.configuration import combine
from cbpq.data import Data
from cbpq.devices import PeakMemory
from cbpq.errors import CbpqError, UsageError, require_extra
from cbpq.evaluation import compare, predict, summarize
from cbpq.plain import plain
from cbpq.planning import Plan, check_labels_for_loss, plan
from cbpq.recipe import make_optimizer
from cbpq.settling import settle
from cbpq.stages import calibration_images, handed_on, training_batches
from cbpq.standings import Comparison, Outcome
from cbpq.summary import versions
from cbpq.training import Training, get_ready, next_epoch, take_steps, train_mode

WARM_UP = 200 / 78_200  # share of the budget
QUANT_PERIOD = 10  # steps between two searches for the levels
SAME = 1e-5  # of a channel's largest weight: values closer than this differ by rounding errors only


@dataclass(frozen=True)
class Levels:
    """A constraint that PARQ has a quantizer for. ``bits`` is how that names it (0 is ternary), ``cbpq`` how cbpq names
    the nearest it has, which decides nothing but the learning rate, preset ``little-data`` and a compensated start.
    """

    title: str
    bits: int
    count: int
    cbpq: str


CONSTRAINTS = {
    "binary": Levels("binary", 1, 2, "binary"),
    "ternary": Levels("ternary", 0, 3, "ternary"),
    "four-levels": Levels("four levels (2 bit)", 2, 4, "levels:-1,-1/3,1/3,1"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit code."""
    chosen = command_line().parse_args(arguments)
    try:
        comparison = run_all(chosen)
    except CbpqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept", file=sys.stderr)
        return 130
    comparison.render(Console())
    return 0


def command_line() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Flags that cbpq compare has too mean the same.",
    )
    parser.add_argument("source")
    parser.add_argument("--weights", type=Path, help="weights for a named or callable network")
    parser.add_argument("--data", required=True)
    parser.add_argument("--constraint", nargs="+", default=list(CONSTRAINTS), help=", ".join(CONSTRAINTS))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, from --first-seed on")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device")
    parser.add_argument("--amp", action="store_true", default=None)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--start",
        choices=("original", "compensated"),
        default="original",
        help="latent weights: the original ones, as PARQ takes them (default), or where compensated rounding puts "
        "them; four levels are then taken as evenly spaced",
    )
    parser.add_argument("--steepness", type=float, default=100.0, help="of the annealing")
    parser.add_argument("--anneal-end", type=float, default=0.75, help="share of the budget after which it is over")
    return parser


def run_all(chosen: argparse.Namespace) -> Comparison:
    """Make every run that is not there yet.

    Raises:
        CbpqError: what went wrong; finished runs are intact.
    """
    for name in chosen.constraint:
        if name not in CONSTRAINTS:
            raise UsageError(f"PARQ has no quantizer for {name!r}; choose from {', '.join(CONSTRAINTS)}")
    seeds = seed_range(chosen.seeds, chosen.first_seed)
    if not (chosen.steepness > 0 and 0 < chosen.anneal_end <= 1):
        raise UsageError("--steepness must be above 0, and --anneal-end a share of the budget above 0 and at most 1")
    parq = require_extra("torchao.prototype.parq", "torchao")
    flags = {name: getattr(chosen, name) for name in ("epochs", "device", "amp")}
    choices, _, layers = combine(flags, chosen.set, os.environ, None)
    choices = {name: value for name, value in choices.items() if name not in ("constraint", "method")}
    own = {"start": chosen.start, "steepness": chosen.steepness, "anneal_end": chosen.anneal_end}
    with writing(chosen.output):
        chosen.output.mkdir(parents=True, exist_ok=True)
    # as a reader would type it: argv[0] is a path of this machine
    command = shlex.join(["python", "-m", "examples.cifar10.parq", *sys.argv[1:]])
    done: list[Outcome] = []
    for seed, name in product(seeds, dict.fromkeys(chosen.constraint)):
        settings = [*layers, ("the comparison", {"seed": seed})]
        constraint = CONSTRAINTS[name].cbpq
        job = plan(
            chosen.source, data=chosen.data, weights=chosen.weights, constraint=constraint, settings=settings, **choices
        )
        path = chosen.output / f"{Cell('parq', name, seed).folder}.json"
        if not path.exists():
            report = one_run(path.stem, job, CONSTRAINTS[name], own, parq)
            atomic_write(path, json.dumps(plain(report), indent=1).encode())
        report = json.loads(path.read_text())
        if different := [*differences(report, job), *(key for key in own if report["parq"][key] != own[key])]:
            raise UsageError(f"the finished run {path} differs in {', '.join(different)}; name another folder with -o")
        done.append(outcome_of(report, CONSTRAINTS[name], seed))
        comparison = comparison_of(report, job, done, command)
        shared = {key: value for key, value in job.resolved.settings.to_dict().items() if key != "seed"}
        document = comparison.to_dict() | {"parq": own, "settings": shared}
        atomic_write(chosen.output / "parq.json", json.dumps(document, indent=1).encode())
    return comparison


def one_run(name: str, job: Plan, levels: Levels, own: dict[str, Any], parq: ModuleType) -> dict[str, Any]:
    """Train and measure; what there is to say of it, in the form of a report of ``cbpq quantize``."""
    settings, data = job.resolved.settings, job.data
    check_labels_for_loss(job)
    if data is None or not settings.epochs:
        raise UsageError("PARQ comes to its levels by training: give --data, and --epochs of at least 1")
    network = job.loaded.model.to(job.device)
    teacher = copy.deepcopy(network).eval().requires_grad_(False)
    original = predict(teacher, data.val, job.device, autocast=job.autocast)
    if own["start"] == "compensated":
        start_compensated(job, data, network, teacher)
    run = prepared(job, data, network, teacher, levels, own, parq)
    memory = PeakMemory(job.device)
    train_mode(run)
    while not run.done:
        for _ in take_steps(run):
            pass
        loss = next_epoch(run)
        print(f"{name}: epoch {run.epoch} of {settings.epochs}, loss {loss:.4f}", file=sys.stderr)
    peak = memory.bytes()
    settle(run)
    final = predict(network, data.val, job.device, autocast=job.autocast)
    count = most_levels(network, job.layers.constrained)
    if count > levels.count:
        print(
            f"warning: {name}: a constrained weight takes {count} values in one output channel, where "
            f"{levels.count} are allowed; raise --epochs",
            file=sys.stderr,
        )
    return {
        "source": job.loaded.info.to_dict(),
        "settings": job.resolved.to_dict(),
        "data": data.describe,
        "original": summarize(original).to_dict(),
        "quantized": summarize(final).to_dict(),
        "comparison": compare(final, original).to_dict(),
        "training": {"epochs": run.epoch, "steps": run.steps, "seconds": run.seconds, "peak_bytes": peak},
        "parq": own | {"levels": count},
        "versions": versions(job.device) | {"torchao": metadata.version("torchao")},
    }


@torch.no_grad()
def start_compensated(job: Plan, data: Data, network: nn.Module, teacher: nn.Module) -> None:
    """Start at weights whose rounding compensates its own errors, as most methods of ``cbpq compare`` do."""
    settings = job.resolved.settings
    rounding = Rounding(job.levels, settings.rounding, settings.scale_rule, settings.scale_granularity)
    images = calibration_images(data, job.device)
    starts = round_network(network, teacher, job.layers.constrained, rounding, images, lambda: None, job.layers.after)
    for name, start in handed_on(network, teacher, starts, job.levels, "compensated").items():
        network.get_parameter(name).copy_(start.latent)


def prepared(
    job: Plan,
    data: Data,
    network: nn.Module,
    teacher: nn.Module,
    levels: Levels,
    own: dict[str, Any],
    parq: ModuleType,
) -> Training:
    """A training run whose optimizer is cbpq's within PARQ's."""
    settings, loader = job.resolved.settings, training_batches(data, job.resolved.settings)
    torch.manual_seed(settings.seed)
    optimizer = make_optimizer(network, settings)
    weights = [network.get_parameter(name) for name in job.layers.constrained]
    taken = {id(weight) for weight in weights}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
    # PARQ knows what it is to quantize by this key
    optimizer.add_param_group({"params": weights, "weight_decay": settings.weight_decay, "quant_bits": levels.bits})
    steps = settings.epochs * len(loader)
    end = max(1, min(int(own["anneal_end"] * steps), steps - 1))  # the last step, at least, ends on the levels
    annealing = parq.ProxPARQ(0, end, steepness=own["steepness"])
    outer = parq.QuantOptimizer(
        optimizer,
        parq.LSBQuantizer(),
        annealing,
        warmup_steps=round(WARM_UP * steps),
        quant_period=QUANT_PERIOD,
        quant_per_channel=True,
    )
    run = Training(
        network, teacher if settings.distillation else None, outer, loader, settings, job.device, job.autocast
    )
    get_ready(run, job.layers.constrained)
    return run


@torch.no_grad()
def most_levels(network: nn.Module, names: Sequence[str]) -> int:
    """The most values that a weight takes in one of its output channels."""
    most = 0
    for name in names:
        rows = network.get_parameter(name).flatten(1).sort(dim=1).values
        apart = rows.diff(dim=1) > SAME * rows.abs().amax(dim=1, keepdim=True)
        most = max(most, 1 + int(apart.sum(dim=1).max()))
    return most


def outcome_of(report: dict[str, Any], levels: Levels, seed: int) -> Outcome:
    """A finished run's row among others."""
    score, training = score_of(report["quantized"], report["comparison"]), report["training"]
    return Outcome(
        "parq",
        levels.title,
        seed,
        score,
        report["comparison"]["agreement"],
        ((float(training["epochs"]), score),),
        training["seconds"] / training["steps"],
        training["peak_bytes"],
        None,
    )


if __name__ == "__main__":
    sys.exit(main())
