"""What a whole run costs beside its training steps: start-up, evaluation, loading a file, reading pictures.

    python examples/benchmarks/run_cost.py --json results/run-cost.json

Each thing is measured beside the plainest program that does the same, one after the other in turn, so that whatever
else the machine does falls on both; where others use it too, processor time is what to go by.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

import cbpq
from cbpq.data import load_data
from cbpq.evaluation import predict
from cbpq.models import load_model
from cbpq.sources import LoadedModel

CLASSES = 10
IMAGES = 1024  # 32 x 32 pixels, to evaluate
PHOTOS = 96  # of 500 x 375 pixels, to read
BATCH = 16
WIDTH = 140

BARE_HELP = """
import typer

app = typer.Typer()


@app.command()
def first(): ...


@app.command()
def second(): ...


app()
"""

BARE_EVALUATION = """
import sys

import numpy as np
import torch
from torchvision.models import resnet18

model = resnet18(num_classes=10).eval()
model.load_state_dict(torch.load(sys.argv[1], weights_only=True))
data = np.load(sys.argv[2])
mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
right = 0
with torch.inference_mode():
    for images, labels in zip(np.split(data["val_images"], 8), np.split(data["val_labels"], 8)):
        batch = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
        right += int((model(batch).argmax(1).numpy() == labels[:, 0]).sum())
print(right)
"""

Work = Callable[[], object]
Times = dict[str, list[float]]


def in_turn(ours: Work, plain: Work, repeats: int, of_children: bool = False) -> dict[str, Times]:
    """Seconds that each takes, by the clock and of the processor, ``repeats`` times; a first turn does not count."""
    found: dict[str, Times] = {clock: {"ours": [], "plain": []} for clock in ("clock", "processor")}
    used = _of_children if of_children else time.process_time
    for turn in range(repeats + 1):
        for name, work in (("ours", ours), ("plain", plain)):
            started, before = time.perf_counter(), used()
            work()
            if turn:
                found["clock"][name].append(round(time.perf_counter() - started, 5))
                found["processor"][name].append(round(used() - before, 5))
    return found


def _of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def program(*arguments: str | Path) -> Work:
    """A run of Python, its output thrown away."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return lambda: subprocess.run(
        [sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL, check=True, env=environment
    )


def prepare(folder: Path) -> LoadedModel:
    """A ResNet-18 with random two-bit weights as a cbpq file and as a state dict, images for it, and photos."""
    torch.manual_seed(0)
    network = load_model("resnet18", random=True, num_classes=CLASSES, input_overrides={"input_size": (3, 32, 32)})
    optimizer = torch.optim.SGD(network.model.parameters(), lr=0.1)
    constrained = cbpq.constrain(network.model, optimizer, "two-bit-shift", preset="paper")
    constrained.finish()
    cbpq.save(folder / "model.safetensors", constrained, network.info)
    torch.save(network.model.state_dict(), folder / "model.pth")
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    np.savez(folder / "images.npz", val_images=images, val_labels=draw.integers(0, CLASSES, (IMAGES, 1)))
    for number in range(PHOTOS):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), np.uint8))
        place = folder / "photos" / "train" / str(number % CLASSES)
        place.mkdir(parents=True, exist_ok=True)
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(place / f"{number}.jpg", quality=90)
    return network


def plain_network(folder: Path) -> nn.Module:
    """The same network as PyTorch's users load it."""
    model: nn.Module = resnet18(num_classes=CLASSES).eval()
    model.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
    return model


def evaluation(folder: Path, repeats: int) -> dict[str, Times]:
    """``cbpq.evaluate``'s loop over a network from a file, against a loop that only counts what is right."""
    loaded = cbpq.load(folder / "model.safetensors")
    spec = loaded.info.input_spec
    data = load_data(str(folder / "images.npz"), spec, CLASSES, batch_size=BATCH, training=False)
    plain, device = plain_network(folder), torch.device("cpu")

    def counting() -> int:
        with torch.inference_mode():
            return sum(int((plain(batch.images).argmax(1) == batch.labels).sum()) for batch in data.val)

    return in_turn(lambda: predict(loaded.model, data.val, device), counting, repeats)


def reading(folder: Path, repeats: int) -> dict[str, Times]:
    """An epoch of training batches from photos, 224 pixels, in this process, against torchvision's usual way."""
    spec = load_model("resnet18", random=True).info.input_spec
    data = load_data(str(folder / "photos"), spec, CLASSES, batch_size=BATCH, val_from_train=0.1)
    if data.train is None:
        raise SystemExit("the photos were not found")
    train, count = data.train, int(data.describe["train_images"])
    steps = [transforms.RandomResizedCrop(224, (0.35, 1)), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    usual = transforms.Compose([*steps, transforms.Normalize(spec.mean, spec.std)])
    images = torch.utils.data.Subset(ImageFolder(str(folder / "photos" / "train"), usual), range(count))
    plain: DataLoader[Any] = DataLoader(images, BATCH, shuffle=True, drop_last=True)
    return in_turn(lambda: list(train.epoch(0)), lambda: list(plain), repeats)


def measure(folder: Path, repeats: int) -> dict[str, dict[str, Times]]:
    """Everything, by what it is."""
    prepare(folder)
    file, arrays = folder / "model.safetensors", folder / "images.npz"
    (folder / "bare.py").write_text(BARE_HELP)
    (folder / "evaluate.py").write_text(BARE_EVALUATION)
    return {
        "cbpq --help, and a bare Typer program's": in_turn(
            program("-m", "cbpq", "--help"), program(folder / "bare.py", "--help"), repeats, of_children=True
        ),
        f"cbpq evaluate, {IMAGES} images, and a script's": in_turn(
            program("-m", "cbpq", "evaluate", file, "--data", arrays, "--quiet"),
            program(folder / "evaluate.py", folder / "model.pth", arrays),
            repeats,
            of_children=True,
        ),
        "loading a file, and a state dict": in_turn(lambda: cbpq.load(file), lambda: plain_network(folder), repeats),
        f"evaluating {IMAGES} images, and a bare loop": evaluation(folder, repeats),
        f"reading {PHOTOS} photos, and torchvision's way": reading(folder, repeats),
    }


def table(result: dict[str, dict[str, Times]]) -> Table:
    """The result for people."""
    rows = Table(title="seconds: median (least to most)")
    rows.add_column()
    for heading in ("clock", "ours", "plain", "ratio"):
        rows.add_column(heading, justify="right")
    for what, clocks in result.items():
        for clock, found in clocks.items():
            cells = [f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})" for values in found.values()]
            rows.add_row(what, clock, *cells, f"{median(found['ours']) / median(found['plain']):.2f}")
    return rows


def main() -> None:
    """Measure, print the table, and write the JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.repeats)
    Console(width=WIDTH).print(table(result))
    if args.json:
        shown = {"threads": torch.get_num_threads(), "torch": torch.__version__, "seconds": result}
        args.json.write_text(json.dumps(shown, indent=1) + "\n")


if __name__ == "__main__":
    main()
