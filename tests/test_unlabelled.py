"""Pictures without labels: which data are taken for such, what is measured on them, and whole runs."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_job import (
    CLASSES,
    RESULTS,
    Outcome,
    command,
    contents,
    events_of,
    one_line,
    pictures,
    refused,
    report_of,
    write_arrays,
    write_folder,
    write_network,
)
from torch import Tensor, nn

from cbpq.cli import common
from cbpq.data import Data, load_data
from cbpq.errors import DataError, GateError, UsageError
from cbpq.evaluation import Predictions, compare, evaluate, predict, summarize
from cbpq.fileformat import read
from cbpq.inputs import InputSpec
from cbpq.loaders import Batch, EvalLoader, RepeatedBatches, TrainLoader
from cbpq.pictures import NO_LABEL
from cbpq.tables import accuracy_section

pytestmark = pytest.mark.medium  # whole runs

GREY = InputSpec(1, 8, 8, mean=(0.5,), std=(0.25,))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("network") / "net.safetensors", steps=30)


def write_flat(folder: Path, count: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pictures(count, seed)[0]):
        Image.fromarray(image).save(folder / f"{number:04}.png")
    return folder


def write_images(path: Path, **counts: int) -> Path:
    np.savez(path, **{name: pictures(count, 0)[0] for name, count in counts.items()})  # type: ignore[arg-type]  # as in small_job
    return path


def load(path: Path, **arguments: Any) -> Data:
    return load_data(str(path), GREY, CLASSES, **{"batch_size": 8, "augment": "none", **arguments})


def seen(batches: Any) -> list[bytes]:
    return [image.numpy().tobytes() for batch in batches for image in batch.images]


def shown(data: Data) -> list[bytes]:
    assert data.calibration is not None
    return seen(data.calibration)


def labels_of(loader: EvalLoader | None) -> set[int]:
    assert loader is not None
    return {label for batch in loader for label in batch.labels.tolist()}


# Which data have no labels


def test_a_flat_folder(tmp_path: Path) -> None:
    data = load(write_flat(tmp_path, 200))
    assert data.train is not None
    assert (data.labelled, data.val_labelled) == (False, False)
    assert (data.train.images, data.val.images) == (180, 20)
    assert data.describe["val_split"] == "10 % held out of the pictures"
    assert data.describe["held_out_share"] == 0.1
    assert (data.describe["train_labels"], data.describe["val_labels"]) == (False, False)
    assert data.describe["notes"] == []
    assert labels_of(data.val) == labels_of(data.calibration) == {NO_LABEL}
    assert all((batch.labels == NO_LABEL).all() for batch in data.train.epoch(0))
    assert len({*shown(data), *seen(data.val)}) == 200
    json.dumps(data.describe)


def test_all_pictures_are_evaluated(tmp_path: Path) -> None:
    data = load(write_flat(tmp_path, 30), training=False)
    assert data.val.images == 30
    assert (data.train, data.calibration, data.describe["train_labels"]) == (None, None, None)
    assert (data.labelled, data.val_labelled) == (False, False)


@pytest.mark.parametrize(
    "train, val, labels",
    [("flat", "flat", (False, False)), ("flat", "classes", (False, True)), ("classes", "flat", (True, False))],
)
def test_each_split_has_labels_or_not(train: str, val: str, labels: tuple[bool, bool], tmp_path: Path) -> None:
    write_folder(tmp_path / "classes", train=24, val=12)
    for split, kind in (("train", train), ("val", val)):
        if kind == "flat":
            write_flat(tmp_path / "data" / split, 24)
        else:
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "classes" / split).rename(tmp_path / "data" / split)
    data = load(tmp_path / "data")
    assert (data.labelled, data.val_labelled) == labels
    assert (data.describe["train_split"], data.describe["val_split"]) == ("train", "val")
    assert labels_of(data.val) == (set(range(CLASSES)) if labels[1] else {NO_LABEL})
    if not labels[0] and labels[1]:
        with pytest.raises(DataError, match="6 class folders, the network tells 9 classes"):
            load_data(str(tmp_path / "data"), GREY, 9, batch_size=8)
        names = tmp_path / "names.txt"
        names.write_text("".join(f"class{label}\n" for label in reversed(range(9))))
        mapped = load_data(str(tmp_path / "data"), GREY, 9, batch_size=8, class_map=names)
        assert labels_of(mapped.val) == set(range(3, 9))


def test_a_class_may_still_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "plane", "car", "bus", "bike", "boat"):
        write_flat(tmp_path / name, 4)
    data = load(tmp_path)
    assert data.labelled
    assert data.describe["train_split"] == "the class folders"
    for name in ("plane", "car", "bus", "bike", "boat"):
        for picture in (tmp_path / name).iterdir():
            picture.unlink()
    data = load(tmp_path)
    assert not data.labelled
    assert data.describe["train_split"] == "train"


def test_folders_that_could_be_either_are_refused(tmp_path: Path) -> None:
    write_flat(tmp_path, 3)
    write_flat(tmp_path / "a" / "deep", 3)
    with pytest.raises(DataError, match=r"pictures directly in it \(0000.png\) and class folders with pictures \(a\)"):
        load(tmp_path)
    write_folder(tmp_path / "splits")
    write_flat(tmp_path / "splits" / "train", 1)
    with pytest.raises(DataError, match=r"train has pictures directly in it"):
        load(tmp_path / "splits")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no picture")
    (tmp_path / "a").rename(tmp_path / ".a")
    (tmp_path / "splits").rename(tmp_path / ".splits")
    assert load(tmp_path).describe["train_images"] == 3


def test_a_class_map_needs_class_folders(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(UsageError, match="leave the class map out"):
        load(write_flat(tmp_path / "flat", 3), class_map=tmp_path / "names.txt")


@pytest.mark.parametrize(
    "counts, val_split, val_images",
    [
        ({"train_images": 40}, "10 % held out of train", 4),
        ({"images": 40}, "10 % held out of train", 4),
        ({"train_images": 40, "val_images": 6}, "val", 6),
        ({"train_images": 40, "test_images": 6}, "test", 6),
    ],
)
def test_arrays_without_labels(counts: dict[str, int], val_split: str, val_images: int, tmp_path: Path) -> None:
    data = load(write_images(tmp_path / "a.npz", **counts))
    assert (data.labelled, data.val_labelled) == (False, False)
    assert (data.describe["val_split"], data.val.images) == (val_split, val_images)
    assert labels_of(data.val) == {NO_LABEL}


def test_arrays_with_some_labels(tmp_path: Path) -> None:
    with np.load(write_arrays(tmp_path / "all.npz")) as arrays:
        both = dict(arrays)
    np.savez(tmp_path / "a.npz", **{name: both[name] for name in both if name != "train_labels"})
    data = load(tmp_path / "a.npz")
    assert (data.labelled, data.val_labelled) == (False, True)
    np.savez(tmp_path / "b.npz", images=both["train_images"], labels=both["train_labels"])
    data = load(tmp_path / "b.npz")
    assert (data.labelled, data.val_labelled) == (True, True)
    np.savez(tmp_path / "c.npz", images=both["train_images"], labels=both["train_labels"][1:])
    with pytest.raises(DataError, match="96 images but 95 labels"):
        load(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", images=both["train_images"], labels=both["train_labels"].astype(int) - 1)
    with pytest.raises(DataError, match="label -1 does not fit"):
        load(tmp_path / "d.npz")


# How many of them


def test_calibration_pictures_are_random_and_the_same_for_a_seed(tmp_path: Path) -> None:
    path = write_images(tmp_path / "a.npz", train_images=400, val_images=8)
    first, again, other = (load(path, calibration=50, seed=seed, batch_size=10) for seed in (0, 0, 1))
    assert first.train is not None
    assert first.train.images == 50
    assert shown(first) == shown(again)
    assert len(set(shown(first)) & set(shown(other))) < 40
    assert sorted(shown(first)) == sorted(seen(first.train.epoch(0)))
    assert load(path, calibration=1000).describe["train_images"] == 400
    assert load(path, calibration=50, limit_train=20).describe["train_images"] == 20
    for count in (0, -3):
        with pytest.raises(UsageError, match="calibration"):
            load(path, calibration=count)


def test_many_pictures(tmp_path: Path) -> None:
    data = load(write_images(tmp_path / "a.npz", images=12_000))
    assert data.train is not None
    assert (data.train.images, data.val.images) == (1024, 1000)
    assert data.describe["val_split"] == "1000 pictures held out of train"
    assert data.describe["held_out_share"] == pytest.approx(1000 / 12_000)
    assert not set(shown(data)) & set(seen(data.val))
    assert load(tmp_path / "a.npz", val_from_train=0.1).val.images == 1200


def test_of_few_pictures_none_is_held_out(tmp_path: Path) -> None:
    data = load(write_flat(tmp_path, 19))
    assert (data.describe["train_images"], data.describe["val_images"]) == (19, 19)
    assert data.describe["val_split"] == "the calibration pictures themselves"
    assert data.describe["held_out_share"] is None
    assert shown(data) == seen(data.val)
    assert data.describe["notes"] == ["only 19 pictures without labels: expect clearly less than with 200 or more"]
    assert load(tmp_path, calibration=5).val.images == 5
    assert load(tmp_path, val_from_train=0.5).val.images == 10
    write_flat(tmp_path, 20)
    assert load(tmp_path).val.images == 2


def test_calibration_does_not_change_labelled_training(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "a.npz")
    data, plain = load(path, calibration=12), load(path)
    assert data.train is not None
    assert plain.train is not None
    assert seen(data.train.epoch(0)) == seen(plain.train.epoch(0))
    assert data.describe == plain.describe
    assert len(shown(data)) == 12
    assert data.calibration is not None
    labels = torch.cat([batch.labels for batch in data.calibration])
    assert labels.bincount().tolist() == [2] * CLASSES
    assert len(set(shown(plain))) == 96


def test_calibration_pictures_are_mirrored_at_most(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "a.npz")
    plain = shown(load(path, augment="none"))
    assert shown(load(path, augment="crop")) == plain
    data = load(path, augment="crop-flip")
    assert data.calibration is not None
    images = torch.cat([batch.images for batch in data.calibration])
    assert len(images) == data.calibration.images == 2 * len(plain)
    assert len(data.calibration) == len(list(data.calibration))
    assert shown(data)[: len(plain)] == plain
    assert torch.equal(images[len(plain) :].flip(-1), images[: len(plain)])


# Pictures that cannot be used


@pytest.mark.parametrize("count", [12, 40])
def test_bad_pictures_of_a_flat_folder(count: int, tmp_path: Path) -> None:
    write_flat(tmp_path, count)
    (tmp_path / "0007.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0007\.png"):
        seen([*load(tmp_path, batch_size=1).val, *(load(tmp_path, batch_size=1).calibration or ())])
    data = load(tmp_path, skip_bad_images=True)
    assert data.describe["skipped_images"] == ["0007.png"]
    assert len({*seen(data.val), *shown(data)}) == count - 1


def test_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no class folders and no pictures in it; looked for \.jpg"):
        load(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"has no pictures in it; looked for \.jpg"):
        load(tmp_path)
    (tmp_path / "train" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of the 1 pictures"):
        load(tmp_path, skip_bad_images=True)


# Several passes as one epoch


def tensors(batches: Any) -> list[tuple[list[int], bytes]]:
    return [(batch.labels.tolist(), batch.images.numpy().tobytes()) for batch in batches]


def test_repeated_batches(tmp_path: Path) -> None:
    inner = load(write_arrays(tmp_path / "a.npz"), batch_size=20, augment="crop").train
    assert inner is not None
    outer: TrainLoader = RepeatedBatches(inner, 3)
    assert (len(outer), outer.images) == (12, 96)
    for number in (0, 2):
        expected = [batch for index in range(3) for batch in tensors(inner.epoch(3 * number + index))]
        assert tensors(outer.epoch(number)) == expected
        for start in (0, 1, 3, 4, 5, 8, 11, 12, 13):
            assert tensors(outer.epoch(number, start)) == expected[start:]
    assert len({batch[1] for batch in tensors(outer.epoch(0))}) == 12
    for passes in (0, -1):
        with pytest.raises(UsageError, match="passes"):
            RepeatedBatches(inner, passes)
    with pytest.raises(UsageError, match="count from 0"):
        next(outer.epoch(0, -1))


# What is measured


class Batches:
    """Rows of outputs that the identity is evaluated on."""

    def __init__(self, scores: Tensor, labels: list[int], size: int = 4) -> None:
        self._scores, self._labels, self._size = scores, torch.tensor(labels), size
        self.images = len(labels)

    def __len__(self) -> int:
        return -(-self.images // self._size)

    def __iter__(self) -> Iterator[Batch]:
        for scores, labels in zip(self._scores.split(self._size), self._labels.split(self._size), strict=True):
            yield Batch(scores, labels)


def test_only_the_agreement_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 7, generator=generator)
    batches = Batches(scores, [NO_LABEL] * 20)
    other = nn.Linear(7, 7)
    result = evaluate(nn.Identity(), batches, "cpu", reference=other)
    same = int((scores.argmax(1) == other(scores).argmax(1)).sum())
    assert result.comparison is not None
    assert result.comparison.agreement == pytest.approx(100 * same / 20)
    low, high = result.comparison.agreement_interval
    assert low <= result.comparison.agreement <= high
    document = result.to_dict()
    nothing = ("top1", "top1_interval", "top5", "top5_interval", "loss", "loss_interval")
    for part in (document, document["reference"]):
        assert part["images"] == 20
        assert all(part[name] is None for name in nothing)
    assert all(document["comparison"][name] is None for name in ("mcnemar_p", "only_model_right", "drop"))
    json.dumps(document, allow_nan=False)


def test_predictions_without_labels(tmp_path: Path) -> None:
    found = predict(nn.Identity(), Batches(torch.eye(7), [NO_LABEL] * 7), "cpu")
    assert not found.labelled
    assert found.classes.tolist() == list(range(7))
    assert found.in_top5 is None
    assert found.losses.isnan().all()
    torch.save(found.state_dict(), tmp_path / "state.pt")
    again = Predictions.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert compare(again, found).agreement == 100
    assert summarize(again).to_dict(timing=False) == summarize(found).to_dict(timing=False)


@pytest.mark.parametrize("labels", [[0, NO_LABEL, 1], [NO_LABEL, 0, 1], [0, 1, NO_LABEL], [NO_LABEL, NO_LABEL, 1]])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_labels_for_some_images_only(labels: list[int], size: int) -> None:
    with pytest.raises(DataError, match="label"):
        predict(nn.Identity(), Batches(torch.eye(3), labels, size), "cpu")
    first = predict(nn.Identity(), Batches(torch.eye(3), [NO_LABEL] * 3), "cpu")
    second = predict(nn.Identity(), Batches(torch.eye(3), [0, 1, 2]), "cpu")
    with pytest.raises(UsageError, match="same images"):
        compare(first, second)


def test_the_section_of_the_report() -> None:
    unknown = {"images": 1234, "top1": None, "top5": None, "loss": None}
    section = accuracy_section(unknown, unknown, {"agreement": 97.5, "agreement_interval": (96.5, 98.2)})
    assert section.title == "Agreement"
    assert section.rows == [("same answer as the original", "97.50 % [96.50, 98.20]")]
    assert section.notes[0].startswith("1,234 images")
    assert "no labels" in section.notes[1]


def test_gates_of_what_is_not_known() -> None:
    common.check_gates(None, None, agreement=90.0, min_agreement=90.0)
    with pytest.raises(GateError, match=r"89\.90 % of the images .* --min-agreement 90 %"):
        common.check_gates(None, None, agreement=89.9, min_agreement=90)
    with pytest.raises(GateError):
        common.check_gates(None, agreement=math.nan, min_agreement=0)


# Whole runs


def quantize(network: Path, data: Path, output: Path, *flags: object) -> Outcome:
    arguments = ("--epochs", 1, "-b", 16, "-j", 0, "--device", "cpu", "-o", output)
    few = ("epoch_images=64", "reconstruction_steps=2", "reconstruction_images=64")
    settings = [part for setting in few for part in ("--set", setting)]
    return command("quantize", network, "--data", data, *arguments, *settings, *flags)


def test_a_flat_folder_from_end_to_end(network: Path, tmp_path: Path) -> None:
    data = write_flat(tmp_path / "flat", 240)
    outcome = quantize(
        network, data, tmp_path / "out", "--calibration", 120, "--set", "evaluate_every=1", "--epochs", 2
    )
    assert outcome.code == 0, outcome.err
    assert set(contents(tmp_path / "out")) == RESULTS
    report = report_of(tmp_path / "out")
    assert report["data"]["train_images"] == 120
    assert report["data"]["val_images"] == 24
    assert report["quantized"]["top1"] is report["original"]["loss"] is report["comparison"]["mcnemar_p"] is None
    assert not [text for text in report["warnings"] if not text.startswith("after reconstruction")]
    agreement, (low, high) = report["comparison"]["agreement"], report["comparison"]["agreement_interval"]
    text = f"{agreement:.2f} % [{low:.2f}, {high:.2f}]"
    for page in (outcome.out, (tmp_path / "out" / "report.md").read_text()):
        assert text in page
        assert "Agreement" in page
        assert "Accuracy is not known, since the pictures have no labels." in page
        assert "top-1" not in page
    assert f"quantized: agreement {text}" in outcome.err
    assert "original: 24 pictures without labels" in outcome.err
    assert "epoch 1: agreement" in outcome.err
    metrics = read(tmp_path / "out" / "model.safetensors").metrics
    assert metrics["comparison"]["agreement"] == agreement
    assert metrics["quantized"]["top1"] is None
    assert command("inspect", tmp_path / "out" / "model.safetensors").code == 0
    measured = [event for event in events_of(tmp_path / "out") if event["event"] == "Evaluated"]
    stages = ("nearest rounding", "compensated rounding", "reconstruction")
    assert [event["which"] for event in measured] == ["original", *stages, "epoch 1", "quantized"]
    assert measured[-1]["result"]["comparison"] == report["comparison"]

    # the settings make the same run, and the number of pictures is part of what it is
    again = quantize(
        network,
        data,
        tmp_path / "again",
        "--calibration",
        120,
        "--config",
        tmp_path / "out" / "settings.toml",
        "--epochs",
        2,
    )
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_evaluating_without_labels(network: Path, tmp_path: Path) -> None:
    data = write_flat(tmp_path / "flat", 30)
    assert quantize(network, data, tmp_path / "out").code == 0
    file = tmp_path / "out" / "model.safetensors"
    one_line(command("evaluate", file, "--data", data), 2, "no labels", "--against SOURCE")
    one_line(command("evaluate", file, "--data", data, "--min-agreement", 1), 2, "--against SOURCE")
    arguments = ("evaluate", file, "--data", data, "--against", network, "--device", "cpu")
    outcome = command(*arguments)
    assert outcome.code == 0, outcome.err
    assert "Agreement" in outcome.out
    document = command(*arguments, "--json").document()
    assert document["images"] == 30
    assert document["top1"] is document["original"]["top1"] is None
    assert f"{document['comparison']['agreement']:.2f} % [" in outcome.out
    for gate in (("--min-top1", 1), ("--max-drop", 1)):
        one_line(command(*arguments, *gate), 2, gate[0], "needs labelled", "--min-agreement")
    itself = ("evaluate", network, "--data", data, "--against", network, "--min-agreement", 100)
    assert command(*itself).code == 0
    untrained = write_network(tmp_path / "other.safetensors")
    refused(command("evaluate", untrained, "--data", data, "--against", network, "--min-agreement", 100), 3, "below")


def test_the_agreement_as_a_gate(network: Path, tmp_path: Path) -> None:
    data = write_flat(tmp_path / "flat", 240)
    assert quantize(network, data, tmp_path / "good", "--min-agreement", 0).code == 0
    every_layer = ("-c", "binary", "--quantize-first", "--quantize-last", "--rounding", "nearest")
    settings = (*every_layer, "--epochs", 0, "--min-agreement", 100)
    outcome = quantize(network, data, tmp_path / "bad", *settings)
    refused(outcome, 3, "of the images have the original's answer, below --min-agreement 100 %")
    assert set(contents(tmp_path / "bad")) == RESULTS
    # with labels as well
    outcome = quantize(network, write_arrays(tmp_path / "a.npz"), tmp_path / "labelled", *settings)
    refused(outcome, 3, "--min-agreement")


def test_three_pictures(network: Path, tmp_path: Path) -> None:
    outcome = quantize(network, write_flat(tmp_path / "flat", 3), tmp_path / "out")
    assert outcome.code == 0, outcome.err
    report = report_of(tmp_path / "out")
    warning = "only 3 pictures without labels: expect clearly less than with 200 or more"
    assert report["warnings"][0] == warning
    assert f"warning: {warning}" in outcome.out
    assert report["data"]["val_split"] == "the calibration pictures themselves"
    assert report["comparison"]["agreement"] is not None


def test_an_unreadable_picture(network: Path, tmp_path: Path) -> None:
    data = write_flat(tmp_path / "flat", 30)
    (data / "0004.png").write_bytes((data / "0004.png").read_bytes()[:40])
    refused(quantize(network, data, tmp_path / "out"), 1, "flat/0004.png", "--skip-bad-images")
    outcome = quantize(network, data, tmp_path / "out", "--skip-bad-images", "--overwrite")
    assert outcome.code == 0, outcome.err
    assert report_of(tmp_path / "out")["data"]["skipped_images"] == ["0004.png"]
    assert "0004.png" in (tmp_path / "out" / "report.md").read_text()


def test_training_without_and_validation_with_labels(network: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "data", train=1, val=48)
    (tmp_path / "data" / "train" / "class0" / "000.png").unlink()
    (tmp_path / "data" / "train" / "class0").rmdir()
    write_flat(tmp_path / "data" / "train", 120)
    outcome = quantize(network, tmp_path / "data", tmp_path / "out", "--min-top1", 20, "--max-drop", 80)
    assert outcome.code == 0, outcome.err
    report = report_of(tmp_path / "out")
    assert report["quantized"]["top1"] > 20
    assert report["quantized"]["images"] == 48
    assert (report["data"]["train_labels"], report["data"]["val_labels"]) == (False, True)
    assert "Accuracy" in outcome.out


@pytest.mark.parametrize("name", ["images", "train_images"])
def test_a_run_on_arrays_without_labels(name: str, network: Path, tmp_path: Path) -> None:
    outcome = quantize(network, write_images(tmp_path / "a.npz", **{name: 120}), tmp_path / "out")
    assert outcome.code == 0, outcome.err
    report = report_of(tmp_path / "out")
    assert (report["data"]["train_images"], report["data"]["val_images"]) == (108, 12)
    assert report["comparison"]["agreement_interval"][0] <= report["comparison"]["agreement"]


def test_another_number_of_pictures_is_another_run(network: Path, tmp_path: Path) -> None:
    data = write_flat(tmp_path / "flat", 60)
    shown_plan = command("quantize", network, "--data", data, "--calibration", 40, "--dry-run", "--json")
    assert shown_plan.document()["settings"]["calibration"]["value"] == 40
    (tmp_path / "out").mkdir()
    from cbpq.planning import plan

    first, second = (plan(str(network), data=str(data), device="cpu", calibration=count) for count in (40, None))
    assert first.identity() != second.identity()
    assert first.choices["calibration"] == 40
