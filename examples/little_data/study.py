"""ResNet-20 on CIFAR-10 with 1,024 unlabelled pictures, and with none: every row of the README's tables.

    python -m examples.little_data.study --weights resnet20.th --data cifar10.npz --work runs

For each constraint and seed it runs ``cbpq quantize`` and measures the result on the 10,000 test images. What is there
already is not done again, and what was interrupted is resumed. Raw results go to ``results/``, a small JSON file each.
"""

import argparse
import json
import os
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from examples.runs import cbpq, keep, over_seeds, quantized

NETWORK = "examples.cifar10.resnet:resnet20"
CONSTRAINTS = ("two-bit-shift", "one-bit-shift", "ternary", "binary")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as .npz, see examples/cifar10")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--pictures", nargs="+", choices=("unlabelled", "none"), default=["unlabelled", "none"])
    parser.add_argument("--constraints", nargs="+", choices=CONSTRAINTS, default=CONSTRAINTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    for seed in chosen.seeds:
        for pictures in chosen.pictures:
            for constraint in chosen.constraints:
                one_row(chosen, pictures, constraint, seed)
    print(table())


def table() -> str:
    """All results so far in Markdown: mean ± sample standard deviation over seeds."""
    lines = [
        "| pictures | constraint | runs | top-1 | same answer as the original | seconds | file |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for pictures, constraint in product(("unlabelled", "none"), CONSTRAINTS):
        runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{pictures}-{constraint}-*.json"))]
        if runs:
            top1 = over_seeds([run["test"]["top1"] for run in runs])
            agreement = over_seeds([run["test"]["comparison"]["agreement"] for run in runs])
            seconds = mean(sum(part for name, part in run["seconds"].items() if name != "measuring") for run in runs)
            size = mean(run["file_bytes"] for run in runs) / 1000
            source = "1,024 unlabelled" if pictures == "unlabelled" else pictures
            row = (source, f"`{constraint}`", len(runs), top1, agreement, f"{seconds:.0f}", f"{size:.1f} kB")
            lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def one_row(chosen: argparse.Namespace, pictures: str, constraint: str, seed: int) -> None:
    """Quantize and measure, unless that was done."""
    name = f"{pictures}-{constraint}-{seed}"
    result = RESULTS / f"{name}.json"
    if result.exists():
        return
    output = chosen.work / name
    flags = ["--data", str(without_labels(chosen.data, chosen.work))] if pictures == "unlabelled" else []
    # what each stage wins is measured once, and nothing within training
    flags += ["--set", f"evaluate_every={0 if seed else 100}"]
    weights = ["--weights", str(chosen.weights)]
    report = quantized(output, NETWORK, *weights, *flags, "-c", constraint, "--seed", str(seed))
    measured = report["quantized"] | {"comparison": report["comparison"]}  # on the test images, if there are pictures
    if pictures == "none":
        flags = ["--arch", NETWORK, "--data", str(chosen.data), "--against", NETWORK, *weights]
        measured = json.loads(cbpq("evaluate", str(output / "model.safetensors"), *flags, "--json"))
    kept = keep(result, report, measured)
    print(f"{name}: {kept['test']['top1']:.2f} %", flush=True)


def without_labels(data: Path, work: Path) -> Path:
    """The same pictures, those for training without their labels."""
    path = work / "cifar10-unlabelled.npz"
    if not path.exists():
        arrays: dict[str, Any] = {name: array for name, array in np.load(data).items() if name != "train_labels"}
        partial = path.with_name(f"{os.getpid()}.npz")
        np.savez(partial, **arrays)
        partial.replace(path)
    return path


if __name__ == "__main__":
    main()
