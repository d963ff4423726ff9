"""Quantizing a network where there is nothing but the network."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from small_job import (
    ALL_FOUR,
    CLASSES,
    PLAIN_NETWORK,
    RESULTS,
    SIDE,
    Outcome,
    command,
    contents,
    events_of,
    one_line,
    refused,
    report_of,
    write_arrays,
    write_network,
)

from cbpq.data import synthetic_data
from cbpq.events import Interrupted, Phase, Tick
from cbpq.inputs import InputSpec
from cbpq.pipeline import execute, quantize
from cbpq.planning import plan

SHORT = ("--calibration", 32, "--epochs", 1, "-b", 16, "--set", "epoch_images=64", "--device", "cpu")
STEPS = ("--set", "reconstruction_steps=4", "--set", "reconstruction_images=32")
pytestmark = pytest.mark.medium  # whole runs

FEW_LAYERS = ("--include", "layer2*", "--include", "layer3*")
WARNING = "no data were given: pictures are synthesised from the network's BatchNorm statistics"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with BatchNorm that knows its pictures, alone in its folder."""
    return write_network(tmp_path_factory.mktemp("network") / "net.safetensors", steps=60, **ALL_FOUR)


@pytest.fixture
def alone(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with nothing in it but that network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.safetensors").write_bytes(network.read_bytes())
    return tmp_path


def run(*flags: object, source: str = "net.safetensors", output: str = "out") -> Outcome:
    return command("quantize", source, *SHORT, *STEPS, *FEW_LAYERS, "-o", output, *flags)


def top1_of(output: str, data: Path) -> tuple[float, float]:
    """Accuracies of the original and of the result, in percent."""
    outcome = command(
        *("evaluate", f"{output}/model.safetensors", "--data", data, "--against", "net.safetensors", "--json")
    )
    assert outcome.code == 0, outcome.err
    document = outcome.document()
    return document["original"]["top1"], document["top1"]


# The command


def test_a_network_and_nothing_else(alone: Path) -> None:
    flags = ("--constraint", "two-bit-shift", *SHORT, *STEPS)
    outcome = command("quantize", "net.safetensors", *flags)
    assert outcome.code == 0, outcome.err
    output = alone / "net-two-bit-shift"
    assert set(contents(alone, leave_out=["net-two-bit-shift"])) == {"net.safetensors"}
    assert set(contents(output)) == RESULTS
    assert f"warning: {WARNING}" in outcome.err
    assert "only agreement with the original" in outcome.err

    report = report_of(output)
    assert report["preset"] == "little-data"
    assert report["data"]["kind"] == "synthetic"
    assert (report["data"]["train_images"], report["data"]["val_images"]) == (29, 3)
    assert report["data"]["train_labels"] is report["data"]["val_labels"] is False
    assert any(WARNING in text for text in report["warnings"])
    assert report["quantized"]["top1"] is report["original"]["top1"] is None
    assert report["quantized"]["loss"] is report["comparison"]["drop"] is None
    assert report["comparison"]["agreement"] is not None
    assert "synthesis" in report["seconds"]
    for page in (outcome.out, (output / "report.md").read_text()):
        words = " ".join(page.split())
        assert "3 images (10 % held out of the synthesised pictures)" in words
        assert "Accuracy is not known" in words
        assert "top-1" not in words
        assert WARNING in words

    # on real pictures, of which nothing was known
    original, quantized = top1_of("net-two-bit-shift", write_arrays(alone / "data.npz", val=240))
    assert original > 98
    assert quantized > original - 3


def test_it_is_worth_more_than_rounding_to_the_nearest(alone: Path) -> None:
    data = write_arrays(alone / "data.npz", val=240)
    for output, flags in (("synthetic", ()), ("nearest", ("--rounding", "nearest"))):
        every_layer = ("-c", "binary", "--epochs", 0, *flags, "-o", output)
        assert command("quantize", "net.safetensors", *SHORT[:2], *SHORT[4:], *every_layer).code == 0
    original, synthetic = top1_of("synthetic", data)
    assert synthetic > original - 10
    assert top1_of("nearest", data)[1] < synthetic - 30


def test_the_library_does_the_same(alone: Path) -> None:
    settings = {"epochs": 0, "batch_size": 16}
    report = quantize(
        "net.safetensors", None, "twin", calibration=8, settings=[("here", settings)], include=["layer3*"], device="cpu"
    )
    assert report.data["kind"] == "synthetic"
    assert set(contents(alone / "twin")) == RESULTS


def test_few_pictures_are_all_measured_on_and_still_called_synthesised(alone: Path) -> None:
    outcome = run("--calibration", 8, "--epochs", 0)
    assert outcome.code == 0, outcome.err
    assert "8 images (the synthesised pictures themselves)" in " ".join(outcome.out.split())
    assert report_of("out")["data"]["notes"] == []


def test_a_time_limit_ends_it_soon(alone: Path) -> None:
    flags = ("--max-time", 0.02, "--calibration", 8, "--epochs", 10**6, "--set", "reconstruction_steps=1000000")
    short = ("--set", "batchnorm_batches=2", "--set", "evaluate_every=0", "-b", 8)
    outcome = command("quantize", "net.safetensors", *flags, *short, *FEW_LAYERS, "--device", "cpu", "-o", "out")
    assert outcome.code == 0, outcome.err
    assert set(contents(alone / "out")) == RESULTS
    assert command("inspect", "out/model.safetensors").code == 0


def test_what_would_be_done(alone: Path) -> None:
    outcome = command("quantize", "net.safetensors", "-c", "ternary", "--dry-run", "--save-synthetic", "pictures")
    assert outcome.code == 0, outcome.err
    assert set(contents(alone)) == {"net.safetensors"}
    words = " ".join(outcome.out.split())
    assert "little-data" in words
    assert "preset little-data" in words
    assert WARNING in words
    document = command(
        "quantize", "net.safetensors", "--dry-run", "--json", "--epochs", 3, "--set", "temperature=2"
    ).document()
    settings = document["settings"]
    assert settings["preset"]["value"] == "little-data"
    assert settings["reconstruction_steps"] == {"value": 50, "from": "preset little-data"}
    assert settings["lr"] == {"value": 1e-3, "from": "preset little-data"}
    assert (settings["epochs"]["value"], settings["epochs"]["from"]) == (3, "command line")
    assert settings["temperature"]["from"] == "command line"


# Pictures


def test_the_pictures_are_kept(alone: Path) -> None:
    assert run("--save-synthetic", "deep/pictures", "--epochs", 0).code == 0
    folder = alone / "deep" / "pictures"
    assert set(contents(folder)) == {"contact-sheet.png", *(f"{number:04}.png" for number in range(32))}
    for number in (0, 31):
        with Image.open(folder / f"{number:04}.png") as image:
            assert (image.mode, image.size) == ("L", (SIDE, SIDE))
            assert np.asarray(image).std() > 5
    # they are data like any others, and the run on them needs no warning
    again = run("--data", "deep/pictures", "--epochs", 0, "--calibration", 33, output="again")
    assert again.code == 0, again.err
    assert "no data" not in again.err


def test_a_network_for_colours(alone: Path) -> None:
    write_network(alone / "colour.safetensors", in_chans=3, **ALL_FOUR)
    assert run("--save-synthetic", "pictures", "--calibration", 4, source="colour.safetensors").code == 0
    with Image.open("pictures/0003.png") as image:
        assert (image.mode, image.size) == ("RGB", (SIDE, SIDE))


def test_a_network_for_more_than_colours(alone: Path) -> None:
    write_network(alone / "many.safetensors", in_chans=4, **ALL_FOUR)
    one_line(run("--save-synthetic", "pictures", source="many.safetensors"), 2, "4 channels", "--save-synthetic")
    assert run("--calibration", 4, source="many.safetensors").code == 0
    assert report_of("out")["comparison"]["agreement"] is not None


def test_a_folder_for_pictures_that_cannot_be_used(alone: Path) -> None:
    (alone / "file").write_text("")
    (alone / "full").mkdir()
    (alone / "full" / "holiday.png").write_text("")
    before = contents(alone)
    one_line(run("--save-synthetic", "full"), 2, "full is not empty")
    one_line(run("--save-synthetic", "full", "--resume"), 2, "full is not empty")
    one_line(run("--save-synthetic", "file"), 2, "file is a file")
    one_line(run("--save-synthetic", "new", "--data", "full"), 2, "--save-synthetic", "leave out one")
    one_line(run("--save-synthetic", "full", "--dry-run"), 2, "full is not empty")
    assert contents(alone) == before
    (alone / "empty").mkdir()
    assert run("--save-synthetic", "empty", "--calibration", 4, "--epochs", 0).code == 0
    assert (alone / "empty" / "0003.png").exists()


@pytest.mark.parametrize("moment", ["synthesis", "compensated rounding"])
def test_the_same_command_goes_on_when_pictures_were_kept(alone: Path, moment: str) -> None:
    now, left = "", 3

    def listener(event: object) -> None:
        nonlocal now, left
        if isinstance(event, Phase):
            now = event.name
        elif isinstance(event, Tick) and now == moment:
            left -= 1

    settings = {"epochs": 0, "batch_size": 16}
    made = plan(
        "net.safetensors",
        calibration=4,
        include=["layer3*"],
        device="cpu",
        settings=[("here", settings)],
        save_synthetic=alone / "pictures",
    )
    with pytest.raises(Interrupted):
        execute(made, alone / "out", listener=listener, should_stop=lambda: left <= 0)
    assert (alone / "pictures").exists() == (moment != "synthesis")
    flags = ("--calibration", 4, "--include", "layer3*", "--device", "cpu", "--epochs", 0, "-b", 16)
    arguments = ("quantize", "net.safetensors", *flags, "-o", "out", "--save-synthetic", "pictures")
    outcome = command(*arguments, "--resume")
    assert outcome.code == 0, outcome.err
    assert len(contents(alone / "pictures")) == 5
    one_line(command(*arguments, "--overwrite"), 2, "pictures is not empty")


@pytest.mark.parametrize("augment, shown", [("none", "none"), ("auto", "shift by up to 1 pixels (black outside)")])
def test_pictures_are_augmented_as_asked(augment: Any, shown: str) -> None:
    spec = InputSpec(1, SIDE, SIDE, mean=(0.5,), std=(0.25,))
    images = torch.randint(256, (24, 1, SIDE, SIDE), dtype=torch.uint8)
    data = synthetic_data(images, spec, CLASSES, batch_size=8, seed=0, augment=augment)
    assert data.describe["augmentation"] == shown
    assert data.train is not None
    batches = [batch for epoch in range(3) for batch in data.train.epoch(epoch)]
    found = {image.numpy().tobytes() for batch in batches for image in batch.images}
    assert (len(found) <= 24) == (augment == "none")


def test_the_flag_for_augmentation_is_not_lost(alone: Path) -> None:
    assert run("--augment", "none", "--epochs", 0, "--calibration", 4).code == 0
    assert report_of("out")["data"]["augmentation"] == "none"


# What makes no sense


@pytest.mark.parametrize(
    "flags, part",
    [
        (("--class-map", "net.safetensors"), "--class-map"),
        (("--skip-bad-images",), "--skip-bad-images"),
        (("--val-from-train", "0.1"), "--val-from-train"),
        (("--limit-train", "5"), "--limit-train"),
        (("--min-top1", "50"), "--min-top1 needs labelled"),
        (("--max-drop", "1"), "--max-drop needs labelled"),
        (("--min-agreement", "100.1"), "--min-agreement"),
        (("--calibration", "0"), "--calibration"),
        (("--preset", "paper"), "no labels"),
        (("--set", "distillation=0.5"), "distillation = 0.5"),
    ],
)
def test_flags_that_need_data(alone: Path, flags: tuple[str, ...], part: str) -> None:
    one_line(run(*flags), 2, part)
    assert set(contents(alone)) == {"net.safetensors"}


def test_the_agreement_is_a_gate(alone: Path) -> None:
    assert run("--min-agreement", 0, "--epochs", 0).code == 0
    weak = ("-c", "binary", "--rounding", "nearest", "--epochs", 0, "--include", "*", "--min-agreement", 100)
    refused(run(*weak, output="weak"), 3, "--min-agreement 100 %")
    assert set(contents(alone / "weak")) == RESULTS


# Other networks


def test_a_network_without_batchnorm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("nets_without_norm.py").write_text(PLAIN_NETWORK)
    scope: dict[str, Any] = {}
    exec(PLAIN_NETWORK, scope)
    torch.manual_seed(0)
    torch.save(scope["make"]().state_dict(), "plain.pth")
    flags = ("--weights", "plain.pth", *SHORT, *STEPS, "-o", "out", "--save-synthetic", "noise")
    outcome = command("quantize", "nets_without_norm:make", *flags)
    assert outcome.code == 0, outcome.err
    sys.modules.pop("nets_without_norm")
    for part in ("has no BatchNorm", "may cost much accuracy", "says little", "200 pictures", "--data FOLDER"):
        assert part in outcome.err
    report = report_of("out")
    assert [row["name"] for row in report["stages"]][-1] == "training"
    assert len(report["warnings"]) == 1
    assert report["comparison"]["agreement"] is not None
    phases = [event["event"] for event in events_of(Path("out"))]
    assert "Evaluated" in phases
    assert len(contents(Path("noise"))) == 33


def write_resnet18() -> None:
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), "resnet18.pth")


def test_torchvisions_resnet18(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_resnet18()
    flags = ("--input-size", 32, "--calibration", 4, "--epochs", 0, "--include", "layer1.0*")
    outcome = command("quantize", "resnet18.pth", "--constraint", "two-bit-shift", *flags)
    assert outcome.code == 0, outcome.err
    report = report_of("resnet18-two-bit-shift")
    assert [row["name"] for row in report["stages"]] == ["nearest rounding", "compensated rounding"]
    assert report["stages"][1]["agreement"] is not None
    assert min(row["snr"] for row in report["layers"]) > 5


@pytest.mark.slow
def test_all_of_torchvisions_resnet18(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_resnet18()
    flags = ("--input-size", 32, "--calibration", 4, "--epochs", 0)
    outcome = command("quantize", "resnet18.pth", "--constraint", "two-bit-shift", *flags)
    assert outcome.code == 0, outcome.err
    assert len(report_of("resnet18-two-bit-shift")["layers"]) == 19


@pytest.mark.slow
def test_the_whole_command_for_torchvisions_resnet18(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_resnet18()
    outcome = command("quantize", "resnet18.pth", "--constraint", "two-bit-shift")
    assert outcome.code == 0, outcome.err
    report = report_of("resnet18-two-bit-shift")
    assert [row["name"] for row in report["stages"]] == [
        *("nearest rounding", "compensated rounding", "reconstruction", "training")
    ]
