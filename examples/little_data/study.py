"""ResNet-20 on CIFAR-10 with 1,024 unlabelled pictures, and with none: every row of the README's tables.

    python -m examples.little_data.study --weights resnet20.th --data cifar10.npz --work runs

For each constraint and seed it runs ``cbpq quantize`` and measures the result on the 10,000 test images. What is there
already is not done again, and what was interrupted is resumed. Raw results go to ``results/``, a small JSON file each.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

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


def over_seeds(values: list[float]) -> str:
    """Mean ± sample standard deviation, in percent."""
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread} %"


def one_row(chosen: argparse.Namespace, pictures: str, constraint: str, seed: int) -> None:
    """Quantize and measure, unless that was done."""
    name = f"{pictures}-{constraint}-{seed}"
    result = RESULTS / f"{name}.json"
    if result.exists():
        return
    output = chosen.work / name
    if not (output / "model.safetensors").exists():
        flags = ["--data", str(without_labels(chosen.data, chosen.work))] if pictures == "unlabelled" else []
        # what each stage wins is measured once, and nothing within training
        flags += ["--set", f"evaluate_every={0 if seed else 100}"]
        if (output / "checkpoint" / "state.pt").exists():
            flags.append("--resume")
        weights = ["--weights", str(chosen.weights)]
        cbpq("quantize", NETWORK, *weights, *flags, "-c", constraint, "--seed", str(seed), "-o", str(output))
    report = json.loads((output / "report.json").read_text())
    measured = report["quantized"] | {"comparison": report["comparison"]}  # on the test images, if there are pictures
    if pictures == "none":
        flags = ["--arch", NETWORK, "--data", str(chosen.data), "--against", NETWORK, "--weights", str(chosen.weights)]
        measured = json.loads(cbpq("evaluate", str(output / "model.safetensors"), *flags, "--json"))
    kept = {
        "command": without_folders(report["command"]),
        "test": {key: measured[key] for key in ("top1", "top1_interval", "images", "comparison")},
        "stages": report["stages"],
        "seconds": report["seconds"],
        "file_bytes": report["sizes"]["file_bytes"],
        "versions": report["versions"],
        "settings": {key: value["value"] for key, value in report["settings"].items()},
    }
    RESULTS.mkdir(exist_ok=True)
    result.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{name}: {kept['test']['top1']:.2f} %", flush=True)


def without_folders(command: str) -> str:
    """A command line with files' names alone, as on any machine."""
    return shlex.join(Path(part).name if "/" in part else part for part in shlex.split(command))


def without_labels(data: Path, work: Path) -> Path:
    """The same pictures, those for training without their labels."""
    path = work / "cifar10-unlabelled.npz"
    if not path.exists():
        arrays: dict[str, Any] = {name: array for name, array in np.load(data).items() if name != "train_labels"}
        partial = path.with_name(f"{os.getpid()}.npz")
        np.savez(partial, **arrays)
        partial.replace(path)
    return path


def cbpq(*arguments: str) -> str:
    """Run the command line and give what it prints."""
    done = subprocess.run([sys.executable, "-m", "cbpq", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
