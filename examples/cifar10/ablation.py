"""What each part of preset ``default`` is worth: ResNet-20 on CIFAR-10, with one part left out or replaced at a time.

    python -m examples.cifar10.original --data cifar10.npz --epochs 24 -o tuning
    python -m examples.cifar10.ablation --weights tuning/resnet20.safetensors --data tuning/cifar10.npz --work runs

Starts from an original that was trained on 45,000 of the training images, trains on these and measures on the other
5,000; the test images are not looked at. What is there already is not done again, and what was interrupted is resumed.
Raw results go to ``results/``, a small JSON file each, and the table is printed.
"""

import argparse
import json
import re
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from cbpq.presets import Settings, parse_setting, resolve
from examples.cifar10.divergence import NETWORK, Measure
from examples.runs import keep, over_seeds, quantized

RESULTS = Path(__file__).parent / "results"
WHOLE = "the preset as it is"
IMAGES = 45_000  # that are trained on
CONSTANT = ("--set", "lr_schedule=constant")
HARD = (
    *("--set", "soft_window=false", "--set", "window_close=0.9", "--set", "window_power=1"),
    *("--set", "multiplier_lr=0.00002", "--set", "latent_weights=compensated"),
)
PARTS = {
    WHOLE: (),
    "no multipliers, no window (straight-through)": ("--method", "straight-through"),
    "as ternary weights are led: on levels all along, from compensated rounding": HARD,
    "on levels from the first step on": ("--set", "soft_window=false"),
    "window closes evenly, until 70 % of the budget": ("--set", "window_power=1", "--set", "window_close=0.7"),
    "latent weights start at the original ones": ("--set", "latent_weights=original"),
    "latent weights start where compensated rounding put them": ("--set", "latent_weights=compensated"),
    "latent weights start on their levels": ("--set", "latent_weights=snapped"),
    "start from nearest rounding": ("--rounding", "nearest"),
    "distillation of outputs alone (KL)": ("--set", "distillation_loss=kl"),
    "labels instead of distillation": ("--set", "distillation=0"),
    "SGD, learning rate 0.02": ("--set", "optimizer=sgd", "--lr", "0.02"),
    "learning rate halved": ("--lr", "{half}"),
    "learning rate doubled": ("--lr", "{double}"),
    "learning rate of a short budget": ("--lr", "{short}"),
    "batches of 64": ("--batch-size", "64"),
    "multipliers grow a fifth as fast": ("--set", "multiplier_lr={slow}"),
    "multipliers grow five times as fast": ("--set", "multiplier_lr={fast}"),
    "multipliers grow fifty times as fast": ("--set", "multiplier_lr={fastest}"),
    "learning rate constant": CONSTANT,
    "learning rate constant, multipliers grow five times as fast": (*CONSTANT, "--set", "multiplier_lr={fast}"),
    "learning rate constant, multipliers grow fifty times as fast": (*CONSTANT, "--set", "multiplier_lr={fastest}"),
    "learning rate constant, no multipliers, no window": (*CONSTANT, "--method", "straight-through"),
    "scales fixed": ("--set", "learn_scales=false"),
    "one scale for each layer": ("--set", "scale_granularity=layer"),
    "BatchNorm statistics frozen in training": ("--set", "batchnorm=frozen"),
    "BatchNorm statistics not re-estimated": ("--set", "batchnorm_batches=0"),
    "the blocks' part of the loss does not fade out": ("--set", "blocks_fade=false"),
    "the original answers for four views of each picture": ("--set", "distillation_views=4"),
}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="what original.py wrote, as .npz")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--constraints", nargs="+", default=["binary", "two-bit-shift"])
    parser.add_argument("--parts", nargs="+", type=int, metavar="N", help="only these rows, counted from 0")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--amp", action="store_true")
    chosen = parser.parse_args()
    names = list(PARTS)
    for seed, part, constraint in product(chosen.seeds, chosen.parts or range(len(names)), chosen.constraints):
        if names[part] == WHOLE or not as_it_is(names[part], constraint, chosen.epochs):
            one_run(chosen, names[part], constraint, seed)
        else:
            print(f"not run, as the preset for {constraint} has it already: {names[part]}", flush=True)
    print(table(chosen.epochs, chosen.constraints))


def table(epochs: int, constraints: list[str]) -> str:
    """The rows that have results, in Markdown: of held-out pictures the share with the original's answer, the mean
    cross-entropy and KL divergence from the original, which still tell where answers hardly differ, and that divergence
    on pictures that were trained on.
    """
    lines = [
        f"| | {' | '.join(f'`{c}`, same answer | cross-entropy | KL | KL seen' for c in constraints)} |",
        f"|---|{'---:|---:|---:|---:|' * len(constraints)}",
    ]
    for part in PARTS:
        cells: list[str] = []
        found = [results(epochs, constraint, part) for constraint in constraints]
        for runs in found:
            cells.append(over_seeds([run["test"]["comparison"]["agreement"] for run in runs]) if runs else "–")
            cells.append(f"{mean(run['test']['loss'] for run in runs):.4f}" if runs else "–")
            cells += [f"{mean(run['kl'][name] for run in runs):.4f}" if runs else "–" for name in ("val", "seen")]
        if any(found):
            lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def results(epochs: int, constraint: str, part: str) -> list[dict[str, Any]]:
    """What was measured in every finished run of one row."""
    paths = sorted(RESULTS.glob(f"{stem(epochs, constraint, part)}-[0-9]*.json"))
    return [json.loads(path.read_text()) for path in paths]


def stem(epochs: int, constraint: str, part: str) -> str:
    """A run's name without its seed."""
    return f"ablation-{epochs}-{constraint}-{re.sub('[^a-z0-9]+', '-', part.lower()).strip('-')}"


def as_it_is(part: str, constraint: str, epochs: int) -> bool:
    """Whether the preset has a row's settings already."""
    values = of_preset(constraint, epochs).to_dict()
    pairs = [flag.partition("=") for flag in replaced(part, constraint, epochs) if flag != "--set"]
    return all(name in values and parse_setting(name, value, "") == values[name] for name, _, value in pairs)


def of_preset(constraint: str, epochs: int) -> Settings:
    """The settings of the preset as it is."""
    return resolve(constraint=constraint, images=IMAGES, layers=[("ablation", {"epochs": epochs})]).settings


def replaced(part: str, constraint: str, epochs: int) -> list[str]:
    """The flags of a row, whose rates are relative to what the preset has for the constraint and budget."""
    preset = of_preset(constraint, epochs)
    rates = {"half": preset.lr / 2, "double": preset.lr * 2, "short": resolve(constraint=constraint).settings.lr}
    grows = preset.of_methods["multiplier_lr"]
    rates |= {"slow": grows / 5, "fast": grows * 5, "fastest": grows * 50}
    return [flag.format(**{name: f"{rate:.6g}" for name, rate in rates.items()}) for flag in PARTS[part]]


@cache
def measure(weights: Path, data: Path) -> Measure:
    """Made once for all rows: it runs the original on every picture."""
    return Measure(weights, data)


def one_run(chosen: argparse.Namespace, part: str, constraint: str, seed: int) -> None:
    """Quantize and measure on the held-out pictures, unless that was done."""
    name = f"{stem(chosen.epochs, constraint, part)}-{seed}"
    path = RESULTS / f"{name}.json"
    if path.exists():
        return
    flags = ["--weights", str(chosen.weights), "--data", str(chosen.data), *(["--amp"] if chosen.amp else [])]
    flags += ["-c", constraint, "--epochs", str(chosen.epochs), "--seed", str(seed), "--set", "evaluate_every=0"]
    report = quantized(chosen.work / name, NETWORK, *flags, *replaced(part, constraint, chosen.epochs))
    distances = measure(chosen.weights, chosen.data)(chosen.work / name / "model.safetensors")
    kl = {on: distance.kl for on, distance in distances.items()}
    kept = keep(path, report, report["quantized"] | {"comparison": report["comparison"]}, kl=kl)
    print(f"{name} ({part}): {kept['test']['comparison']['agreement']:.2f} %", flush=True)


if __name__ == "__main__":
    main()
