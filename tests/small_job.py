"""A network and data so small that a whole run takes a second, and the command line run on them in this process."""

import contextlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from cbpq.cli import main

ROOT = Path(__file__).parents[1]
CLASSES, SIDE = 6, 8
# two of the four blocks of timm's smallest ResNet: nearly all tests wait for it
SHAPE: dict[str, Any] = {"stem_width": 8, "layers": [1, 0, 0, 1], "channels": [8, 8, 8, 8], "output_stride": 8}
ARGUMENTS: dict[str, Any] = {"num_classes": CLASSES, "in_chans": 1, **SHAPE}
# all of it, where the other blocks (one a bottleneck) or the width of its stem matter
ALL_FOUR: dict[str, Any] = {"stem_width": 16, "layers": [1, 1, 1, 1]}
SPEC = {"channels": 1, "height": SIDE, "width": SIDE, "mean": [0.5], "std": [0.25], "interpolation": "bilinear"}
# the text of a module whose function makes a network without BatchNorm
PLAIN_NETWORK = """
from torch import nn


def make(num_classes=6):
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, num_classes)),
    )


make.input_spec = {"channels": 1, "height": 8, "width": 8, "mean": [0.5], "std": [0.25], "interpolation": "bilinear"}
"""
RESULTS = {"model.safetensors", "report.json", "report.md", "events.jsonl", "settings.toml"}


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    def document(self) -> Any:
        """Its JSON."""
        return json.loads(self.out)


def command(*arguments: object) -> Outcome:
    """Run ``cbpq`` with these arguments in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def refused(outcome: Outcome, code: int, *parts: str) -> str:
    """Check that a command failed as each failure should: its exit code, and one line on stderr that says ``parts``."""
    assert outcome.code == code, outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    assert outcome.err.splitlines()[-1] == errors[0], outcome.err
    assert "Traceback" not in outcome.err, outcome.err
    assert "bug in cbpq" not in outcome.err, outcome.err
    for part in parts:
        assert part in errors[0]
    return errors[0]


def one_line(outcome: Outcome, code: int, *parts: str) -> str:
    """The same for a command that fails before it has anything to show: nothing but that line."""
    line = refused(outcome, code, *parts)
    assert outcome.out == ""
    assert outcome.err == line + "\n"
    return line


def environment() -> dict[str, str]:
    """Variables for ``python -m cbpq`` in any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def write_network(path: Path, steps: int = 0, **arguments: Any) -> Path:
    """A weight file that says all that is to be known of its network, after so many steps of training."""
    chosen = {**ARGUMENTS, **arguments}
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", **chosen)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        images, labels = map(torch.from_numpy, pictures(48, step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network((images[:, None] / 255 - 0.5) / 0.25), labels.long()).backward()
        optimizer.step()
    spec = {**SPEC, "channels": chosen["in_chans"]}
    spec |= {"mean": [0.5] * chosen["in_chans"], "std": [0.25] * chosen["in_chans"]}
    metadata = {"architecture": "timm:test_resnet", "arguments": json.dumps(chosen), "input_spec": json.dumps(spec)}
    save_file(network.state_dict(), path, metadata)
    return path


def pictures(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Noisy pictures (count, 8, 8) of a bright row whose place is the class, and their labels (count,)."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % CLASSES).astype(np.uint8)
    images = rng.integers(0, 90, (count, SIDE, SIDE))
    images[np.arange(count), labels + 1] += 150
    return images.astype(np.uint8), labels


def write_arrays(path: Path, train: int = 96, val: int = 48) -> Path:
    """Data as a ``.npz`` file."""
    arrays = {}
    for seed, (split, count) in enumerate((("train", train), ("val", val))):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = pictures(count, seed)
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy's own type wants the arrays one by one
    return path


def write_folder(root: Path, train: int = 48, val: int = 24) -> Path:
    """Data as PNG files: ``train/class0/000.png``."""
    for seed, (split, count) in enumerate((("train", train), ("val", val))):
        for number, (image, label) in enumerate(zip(*pictures(count, seed), strict=True)):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:03}.png")
    return root


def contents(folder: Path, leave_out: Sequence[str] = ()) -> dict[str, bytes]:
    """Every file below a folder with its bytes, and every empty folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"(folder)"
        for path in sorted(folder.rglob("*"))
        if not any(path.is_relative_to(folder / name) for name in leave_out)
    }


def report_of(output: Path | str) -> dict[str, Any]:
    """The report of a run, from its file."""
    report: dict[str, Any] = json.loads((Path(output) / "report.json").read_text())
    return report


def events_of(output: Path) -> list[dict[str, Any]]:
    """The events of a run, from its file."""
    return [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]


def story(output: Path) -> list[dict[str, Any]]:
    """The events, without what has to differ: times, and where the run was saved and resumed."""
    timeless = []
    for event in events_of(output):
        if event["event"] in ("Saved", "Resumed"):
            continue
        event = {name: value for name, value in event.items() if name not in ("seconds", "images_per_second")}
        if "result" in event:
            event["result"] = {name: value for name, value in event["result"].items() if name != "images_per_second"}
        timeless.append(event)
    return timeless


def same_result(output: Path, unbroken: Path) -> None:
    """Check that a run which was broken ended as if nothing had happened."""
    assert set(contents(output)) == RESULTS
    assert contents(output)["model.safetensors"] == contents(unbroken)["model.safetensors"]
    assert story(output) == story(unbroken)
