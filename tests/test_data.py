"""Data: what can be opened, what the network is fed, which batches come when, and what is refused."""

import gzip
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.models import ResNet18_Weights, ResNet50_Weights, SqueezeNet1_1_Weights

from cbpq import data as data_module
from cbpq import streams
from cbpq.data import Data, TrainLoader, load_data
from cbpq.distributed import Turn
from cbpq.errors import CbpqError, DataError, MissingPartError, UsageError
from cbpq.folders import read_class_map
from cbpq.inputs import InputSpec
from cbpq.loaders import PictureSource, TrainBatches, dealt
from cbpq.readers import Reader
from cbpq.splits import hold_out, stratified
from cbpq.streams import StreamTrainBatches
from cbpq.transforms import (
    RATIO,
    SCALE,
    Augmentation,
    EvalTransform,
    Normalize,
    Shifts,
    epoch_generator,
    random_box,
    shift_and_flip,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = InputSpec(3, 16, 16, MEAN, STD)
LARGE = InputSpec(3, 72, 72, MEAN, STD, crop_pct=0.9)
GREY = InputSpec(1, 8, 8, (0.5,), (0.5,))


def random_image(seed: int, width: int = 20, height: int = 18, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def make_folder(root: Path, counts: dict[str, int], suffix: str = ".png", width: int = 20, mode: str = "RGB") -> Path:
    """``counts`` maps a folder such as ``train/cat`` to its number of pictures; each picture is another one."""
    for folder, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            random_image(1000 * folder + number, width, mode=mode).save(root / name / f"{number:03d}{suffix}")
    return root


def make_npz(path: Path, counts: dict[str, int], shape: tuple[int, ...] = (16, 16, 3), classes: int = 3) -> Path:
    """Splits of random images; labels go round the classes."""
    generator = np.random.default_rng(5)
    arrays: dict[str, Any] = {}
    for split, count in counts.items():
        arrays[f"{split}_images"] = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % classes)[:, None].astype(np.uint8)
    np.savez(path, **arrays)
    return path


def train_of(data: Data) -> TrainLoader:
    assert data.train is not None
    return data.train


def epoch(data: Data, number: int, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(batch.images, batch.labels) for batch in train_of(data).epoch(number, start)]


def everything(data: Data) -> tuple[Tensor, Tensor]:
    batches = list(data.val)
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True)
    )


def distinct(images: Tensor) -> int:
    return len({image.numpy().tobytes() for image in images})


def refused(kind: type[CbpqError], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind or kind is DataError
    assert "\n" not in message
    assert "Traceback" not in message
    return message


# What the network is fed in evaluation


@pytest.mark.parametrize("size", [(500, 375), (213, 480), (224, 224), (90, 301)])
@pytest.mark.parametrize(
    "weights, spec",
    [
        (ResNet18_Weights.IMAGENET1K_V1, InputSpec(3, 224, 224, MEAN, STD, "bilinear", 224 / 256)),
        (SqueezeNet1_1_Weights.IMAGENET1K_V1, InputSpec(3, 224, 224, MEAN, STD, "bilinear", 0.875)),
        (ResNet50_Weights.IMAGENET1K_V2, InputSpec(3, 224, 224, MEAN, STD, "bilinear", 224 / 232)),
    ],
)
def test_evaluation_is_torchvisions(weights: Any, spec: InputSpec, size: tuple[int, int], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        random_image(3, *size).save(tmp_path / name / "x.jpg")
    images, _ = everything(load_data(str(tmp_path), spec, 2, batch_size=2, training=False))
    with Image.open(tmp_path / "a" / "x.jpg") as picture:
        assert torch.equal(images[0], weights.transforms()(picture.convert("RGB")))


@pytest.mark.parametrize("size", [(300, 200), (80, 99)])
@pytest.mark.parametrize(
    "height, width, interpolation, crop_pct, crop_mode",
    [
        (224, 224, "bicubic", 0.95, "center"),
        (96, 96, "bicubic", 1.0, "squash"),
        (96, 96, "bilinear", 1.0, "border"),
        (96, 80, "bicubic", 0.9, "center"),
        (65, 65, "lanczos", 0.875, "center"),
        (32, 32, "bicubic", 0.875, "center"),
    ],
)
def test_evaluation_is_timms(
    height: int, width: int, interpolation: str, crop_pct: float, crop_mode: str, size: tuple[int, int]
) -> None:
    spec = InputSpec(3, height, width, (0.5, 0.4, 0.5), (0.5, 0.5, 0.6), interpolation, crop_pct, crop_mode)
    theirs = create_transform(
        input_size=(3, height, width),
        is_training=False,
        interpolation=interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )
    picture = random_image(4, *size)
    assert torch.equal(Normalize(spec)(EvalTransform(spec)(picture)[None])[0], theirs(picture))


@pytest.mark.parametrize("size, resize", [(96, 118), (128, 186), (224, 232), (224, 255), (299, 342)])
def test_the_resize_a_crop_share_was_made_of_comes_back(size: int, resize: int) -> None:
    spec = InputSpec(3, size, size, crop_pct=size / resize)
    assert spec.resize == resize
    picture = random_image(1, 400, 400)
    smaller = np.asarray(picture.resize((resize, resize), Image.Resampling.BILINEAR))
    corner = round((resize - size) / 2)
    expected = smaller[corner : corner + size, corner : corner + size].transpose(2, 0, 1)
    assert np.array_equal(EvalTransform(spec)(picture).numpy(), expected)


@pytest.mark.parametrize("shape", [(16, 16, 3), (16, 16), (16, 16, 1)])
def test_arrays_of_the_networks_size_are_not_resized(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = make_npz(tmp_path / "a.npz", {"train": 9, "val": 7}, shape)
    images, labels = everything(load_data(str(path), InputSpec(3, 16, 16, MEAN, STD, crop_pct=0.5), 3, batch_size=4))
    raw = np.load(path)["val_images"].reshape(7, 16, 16, -1)
    expected = (np.repeat(raw, 3 // raw.shape[3], axis=3) / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(images.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
    assert images.is_contiguous()
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_large_array_of_the_networks_size_is_not_resized_either(tmp_path: Path) -> None:
    path = make_npz(tmp_path / "a.npz", {"train": 4, "val": 3}, (72, 72, 3))
    images, _ = everything(load_data(str(path), LARGE, 3, batch_size=4))
    expected = (np.load(path)["val_images"] / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(images.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_arrays_of_another_size_go_the_way_of_pictures(tmp_path: Path) -> None:
    path = make_npz(tmp_path / "a.npz", {"val": 3}, (28, 28))
    images, _ = everything(load_data(str(path), SMALL, 3, batch_size=4, training=False))
    picture = Image.fromarray(np.load(path)["val_images"][1]).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    expected = (np.asarray(picture) / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(images[1].numpy(), expected.transpose(2, 0, 1), atol=1e-6)


def test_small_pictures_of_the_right_size_are_taken_as_they_are(tmp_path: Path) -> None:
    spec = InputSpec(3, 18, 20, MEAN, STD, crop_pct=0.5)
    make_folder(tmp_path, {"a": 1, "b": 1})
    images, _ = everything(load_data(str(tmp_path), spec, 2, batch_size=2, training=False))
    expected = (np.asarray(random_image(0)) / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(images[0].numpy(), expected.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize("mode, spec", [("L", SMALL), ("RGB", SMALL), ("L", GREY)])
def test_grey_and_colour_pictures(mode: str, spec: InputSpec, tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 2, "b": 2}, mode=mode)
    images, labels = everything(load_data(str(tmp_path), spec, 2, batch_size=3, training=False))
    assert images.shape == (4, spec.channels, spec.height, spec.width)
    assert labels.tolist() == [0, 0, 1, 1]


def test_pictures_with_alpha_palette_and_one_bit_are_read(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 1, "b": 1})
    for mode in ("RGBA", "P", "CMYK", "LA", "1"):
        picture = random_image(1).convert(mode)
        picture.save(tmp_path / "a" / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    data = load_data(str(tmp_path), SMALL, 2, batch_size=10, training=False)
    assert data.val.images == len(everything(data)[0]) == 7


# Augmentation


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_shift_and_flip_against_a_scalar_reference(draw: st.DataObject) -> None:
    count, channels = draw.draw(st.integers(1, 4)), draw.draw(st.sampled_from([1, 3]))
    height, width = draw.draw(st.integers(1, 6)), draw.draw(st.integers(1, 6))
    pad = (draw.draw(st.integers(0, 3)), draw.draw(st.integers(0, 3)))
    rows = draw.draw(st.lists(st.integers(0, 2 * pad[0]), min_size=count, max_size=count))
    columns = draw.draw(st.lists(st.integers(0, 2 * pad[1]), min_size=count, max_size=count))
    flips = draw.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    images = np.random.default_rng(0).integers(1, 256, (count, channels, height, width), dtype=np.uint8)
    expected = np.zeros_like(images)
    for n, c, y, x in np.ndindex(*images.shape):
        source_x = width - 1 - x if flips[n] else x
        source = (y + rows[n] - pad[0], source_x + columns[n] - pad[1])
        if 0 <= source[0] < height and 0 <= source[1] < width:
            expected[n, c, y, x] = images[n, c, source[0], source[1]]
    result = shift_and_flip(torch.from_numpy(images), pad, np.array([rows, columns]), np.array(flips))
    assert np.array_equal(result.numpy(), expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 10**6))
def test_random_boxes_lie_in_the_picture(width: int, height: int, seed: int) -> None:
    top, left, box_height, box_width = random_box(width, height, np.random.default_rng(seed))
    assert 0 <= top <= top + box_height <= height
    assert 0 <= left <= left + box_width <= width
    assert box_height >= 1
    assert box_width >= 1
    if 0.5 < width / height < 2 and min(width, height) > 50:
        assert SCALE[0] * 0.9 < box_width * box_height / (width * height) <= SCALE[1]
        assert RATIO[0] * 0.9 < box_width / box_height < RATIO[1] * 1.1


def test_random_boxes_and_shifts_reach_every_place() -> None:
    boxes = {random_box(4, 4, np.random.default_rng(seed)) for seed in range(500)}
    assert {box[0] for box in boxes} == {0, 1, 2}
    assert {box[1] for box in boxes} == {0, 1, 2}
    assert (0, 0, 4, 4) in boxes
    draws = Shifts.draw(Augmentation(pad=(2, 1), flip=True), seed=0, epoch=0, count=500)
    assert set(draws.offsets[0]) == {0, 1, 2, 3, 4}
    assert set(draws.offsets[1]) == {0, 1, 2}
    assert 180 < draws.flips.sum() < 320


@pytest.mark.parametrize(
    "augment, spec, grey, expected",
    [
        ("auto", InputSpec(3, 32, 32), False, Augmentation(pad=(4, 4), flip=True)),
        ("auto", InputSpec(3, 32, 32), True, Augmentation(pad=(4, 4))),
        ("auto", GREY, False, Augmentation(pad=(1, 1))),
        ("auto", InputSpec(3, 64, 32), False, Augmentation(pad=(8, 4), flip=True)),
        ("auto", InputSpec(3, 64, 65), False, Augmentation(resized_crop=True, flip=True)),
        ("auto", InputSpec(3, 224, 224), True, Augmentation(resized_crop=True)),
        ("none", InputSpec(3, 224, 224), False, Augmentation()),
        ("none", InputSpec(3, 32, 32), False, Augmentation()),
        ("crop", InputSpec(3, 32, 32), False, Augmentation(pad=(4, 4))),
        ("crop-flip", GREY, True, Augmentation(pad=(1, 1), flip=True)),
        ("crop", InputSpec(3, 224, 224), False, Augmentation(resized_crop=True)),
    ],
)
def test_augmentation_fits_the_input(augment: Any, spec: InputSpec, grey: bool, expected: Augmentation) -> None:
    assert Augmentation.choose(augment, spec, grey) == expected


def test_augmentation_in_words() -> None:
    assert str(Augmentation()) == "none"
    assert str(Augmentation(pad=(4, 4), flip=True)) == "shift by up to 4 pixels (black outside), horizontal flip"
    assert str(Augmentation(resized_crop=True)) == "random-resized crop (35% to 100% of the area)"
    assert "did you mean 'crop'" in refused(UsageError, lambda: Augmentation.choose("corp", SMALL, False))  # type: ignore[arg-type]  # a typo


def test_training_pictures_are_shifted_and_mirrored_originals(tmp_path: Path) -> None:
    path = make_npz(tmp_path / "a.npz", {"train": 12, "val": 3})
    raw = np.load(path)["train_images"].transpose(0, 3, 1, 2)
    data = load_data(str(path), InputSpec(3, 16, 16, (0.0,) * 3, (1.0,) * 3), 3, batch_size=12, seed=3)
    ((images, labels),) = epoch(data, 5)
    padded = np.pad(raw, ((0, 0), (0, 0), (2, 2), (2, 2)))
    versions: dict[bytes, tuple[int, int, int, bool]] = {}
    for n in range(12):
        for y in range(5):
            for x in range(5):
                window = padded[n, :, y : y + 16, x : x + 16]
                versions[window.tobytes()] = (n, y, x, False)
                versions[window[:, :, ::-1].tobytes()] = (n, y, x, True)
    found = [versions[(image * 255).round().to(torch.uint8).numpy().tobytes()] for image in images]
    assert sorted(n for n, *_ in found) == list(range(12))
    assert [n % 3 for n, *_ in found] == labels.tolist()
    assert len({version[1:] for version in found}) > 5


def test_large_arrays_are_cropped_and_resized_for_training(tmp_path: Path) -> None:
    path = make_npz(tmp_path / "a.npz", {"train": 6, "val": 3}, (72, 72, 3))
    plain, cropped = (load_data(str(path), LARGE, 3, batch_size=6, augment=augment) for augment in ("none", "crop"))
    ((before, labels),), ((after, labels_after),) = epoch(plain, 0), epoch(cropped, 0)
    assert torch.equal(labels, labels_after)
    assert before.shape == after.shape
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


# The order and the content of training batches


def random_state() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # numpy's union


@pytest.fixture(scope="module")
def small_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_npz(tmp_path_factory.mktemp("npz") / "a.npz", {"train": 23, "val": 10})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    counts = {"train/a": 9, "train/b": 8, "train/c": 6, "val/a": 2, "val/b": 3, "val/c": 2}
    return make_folder(tmp_path_factory.mktemp("folder"), counts, ".jpg", width=80)


@pytest.mark.parametrize("spec", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_an_epoch_can_be_taken_up_anywhere(kind: str, spec: InputSpec, small_npz: Path, folder: Path) -> None:
    path = str({"npz": small_npz, "folder": folder}[kind])
    data, again = (load_data(path, spec, 3, batch_size=4, seed=7) for _ in range(2))
    whole = epoch(data, 3)
    assert len(whole) == len(train_of(data)) == 5
    assert train_of(data).images == 23
    for start in range(6):
        assert same(epoch(again, 3, start), whole[start:])
    assert not same(epoch(data, 4), whole)
    assert not same(epoch(load_data(path, spec, 3, batch_size=4, seed=8), 3), whole)


@pytest.mark.parametrize("spec", [SMALL, LARGE], ids=["small", "large"])
def test_workers_change_nothing(spec: InputSpec, folder: Path) -> None:
    alone, two = (load_data(str(folder), spec, 3, batch_size=4, seed=7, workers=workers) for workers in (0, 2))
    assert same(epoch(alone, 1, 2), epoch(two, 1, 2))
    assert torch.equal(everything(alone)[0], everything(two)[0])


@pytest.mark.parametrize("spec", [SMALL, LARGE], ids=["small", "large"])
def test_what_a_sample_becomes_does_not_depend_on_its_batch(spec: InputSpec, folder: Path) -> None:
    by_two, by_five = (load_data(str(folder), spec, 3, batch_size=size, seed=7) for size in (2, 5))
    first, second = (torch.cat([images for images, _ in epoch(data, 2)]) for data in (by_two, by_five))
    assert torch.equal(first[:20], second[:20])


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_states_are_left_alone_and_do_not_matter(workers: int, small_npz: Path, folder: Path) -> None:
    def draw() -> list[list[tuple[Tensor, Tensor]]]:
        return [
            epoch(load_data(str(small_npz), SMALL, 3, batch_size=4), 0),
            epoch(load_data(str(folder), LARGE, 3, batch_size=4, workers=workers), 0, 3),
        ]

    before = random_state()
    first = draw()
    everything(load_data(str(folder), LARGE, 3, batch_size=4, workers=workers))
    assert random_state() == before
    torch.manual_seed(99)
    random.seed(99)
    assert all(same(a, b) for a, b in zip(first, draw(), strict=True))
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    random.setstate(before[1])


def test_every_epoch_shows_every_picture_once_but_for_a_short_last_batch(small_npz: Path) -> None:
    spec = InputSpec(3, 16, 16, (0.0,) * 3, (1.0,) * 3)
    data = load_data(str(small_npz), spec, 3, batch_size=5, augment="none")
    seen = torch.cat([images for images, _ in epoch(data, 0)])
    assert len(seen) == 20
    assert distinct(seen) == 20


@pytest.mark.parametrize("images, batch_size, batches", [(23, 23, [23]), (23, 24, [23]), (23, 22, [22]), (3, 64, [3])])
def test_a_short_batch_only_where_it_is_the_only_one(
    images: int, batch_size: int, batches: list[int], tmp_path: Path
) -> None:
    path = make_npz(tmp_path / "a.npz", {"train": images, "val": 3})
    data = load_data(str(path), SMALL, 3, batch_size=batch_size)
    assert [len(labels) for _, labels in epoch(data, 0)] == batches
    assert len(train_of(data)) == len(batches)


def test_evaluation_shows_each_image_once_in_order(small_npz: Path) -> None:
    data = load_data(str(small_npz), SMALL, 3, batch_size=4)
    assert [len(batch.labels) for batch in data.val] == [4, 4, 2]
    assert (len(data.val), data.val.images) == (3, 10)
    assert everything(data)[1].tolist() == [n % 3 for n in range(10)]
    assert torch.equal(everything(data)[0], everything(data)[0])
    assert (everything(data)[0].dtype, everything(data)[1].dtype) == (torch.float32, torch.int64)


def test_epochs_and_batches_count_from_zero(small_npz: Path) -> None:
    data = load_data(str(small_npz), SMALL, 3, batch_size=4)
    refused(UsageError, lambda: epoch(data, -1))
    refused(UsageError, lambda: epoch(data, 0, -1))
    assert epoch(data, 0, 100) == []


def test_what_worker_processes_get_can_be_pickled(folder: Path) -> None:
    # processes that are spawned, as on macOS and Windows, get a pickle; it must give the same pictures
    data = load_data(str(folder), LARGE, 3, batch_size=4)
    assert isinstance(data.train, TrainBatches)
    dataset = data.train._source._dataset  # type: ignore[attr-defined]  # private on purpose
    key = (np.array([3, 1], dtype=np.int64), 2)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[key], dataset[key])


def test_streams_of_randomness_differ() -> None:
    draws = {tuple(epoch_generator(*key).integers(0, 1000, 4)) for key in ((0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 1))}
    draws |= {tuple(epoch_generator(0, 0, 3, sample).integers(0, 1000, 4)) for sample in range(5)}
    assert len(draws) == 9


# Which pictures belong where


def test_stratified_takes_of_every_class_its_share() -> None:
    labels = np.repeat(np.arange(5), [40, 10, 30, 5, 15])
    for count in (1, 10, 20, 99, 100):
        marked = stratified(labels, count, np.random.default_rng(1))
        assert marked.sum() == count
        taken = np.bincount(labels[marked], minlength=5)
        assert np.all(np.abs(taken - np.bincount(labels) * count / 100) < 1)
    assert not np.array_equal(
        stratified(labels, 20, np.random.default_rng(1)), stratified(labels, 20, np.random.default_rng(2))
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.floats(0.01, 0.99))
def test_hold_out_divides(labels: list[int], share: float) -> None:
    kept, held_out = hold_out(np.array(labels), share, np.random.default_rng(0))
    assert len(kept) >= 1
    assert len(held_out) >= 1
    assert abs(len(held_out) - share * len(labels)) <= 1
    assert sorted([*kept, *held_out]) == list(range(len(labels)))


def test_splits_of_a_folder(folder: Path) -> None:
    data = load_data(str(folder), SMALL, 3, batch_size=4)
    assert data.describe == {
        "kind": "folder",
        "classes": 3,
        "train_split": "train",
        "train_images": 23,
        "train_labels": True,
        "val_split": "val",
        "val_images": 7,
        "val_labels": True,
        "held_out_share": None,
        "augmentation": "shift by up to 2 pixels (black outside), horizontal flip",
        "skipped_images": [],
        "notes": [],
    }
    evaluation = load_data(str(folder), SMALL, 3, batch_size=4, training=False)
    assert evaluation.train is None
    assert evaluation.describe["augmentation"] is None
    assert torch.equal(everything(data)[0], everything(evaluation)[0])


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test", "Val"])
def test_names_of_the_validation_split(name: str, tmp_path: Path) -> None:
    make_folder(tmp_path, {"Train/a": 2, "Train/b": 2, f"{name}/a": 1, f"{name}/b": 2, "test/a": 1})
    data = load_data(str(tmp_path), SMALL, 2, batch_size=4)
    assert data.describe["val_split"] == name
    assert data.val.images == 3


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 20, "b": 30})
    data = load_data(str(tmp_path), SMALL, 2, batch_size=4, seed=1)
    assert (train_of(data).images, data.val.images) == (45, 5)
    assert data.describe["val_split"] == "10 % held out of the class folders"
    assert data.describe["held_out_share"] == 0.1
    assert everything(data)[1].tolist() == [0, 0, 1, 1, 1]
    again = load_data(str(tmp_path), SMALL, 2, batch_size=9, seed=1, workers=1)
    assert torch.equal(everything(data)[0], everything(again)[0])
    whole = load_data(str(tmp_path), SMALL, 2, batch_size=4, training=False)
    assert whole.val.images == 50
    assert json.loads(json.dumps(data.describe)) == data.describe


def test_held_out_pictures_are_not_trained_on(tmp_path: Path) -> None:
    path = make_npz(tmp_path / "a.npz", {"train": 30})
    data = load_data(str(path), SMALL, 3, batch_size=27, augment="none")
    ((train, _),) = epoch(data, 0)
    val, _ = everything(data)
    assert (len(train), len(val), distinct(torch.cat([train, val]))) == (27, 3, 30)


def test_val_from_train_leaves_the_validation_split_alone(small_npz: Path) -> None:
    data = load_data(str(small_npz), SMALL, 3, batch_size=4, val_from_train=0.25)
    assert (train_of(data).images, data.val.images) == (17, 6)
    assert data.describe["val_split"] == "25 % held out of train"
    held_out = {image.numpy().tobytes() for image in everything(data)[0]}
    own = {image.numpy().tobytes() for image in everything(load_data(str(small_npz), SMALL, 3, batch_size=4))[0]}
    assert not held_out & own
    again = load_data(str(small_npz), SMALL, 3, batch_size=4, val_from_train=0.25, training=False)
    assert {image.numpy().tobytes() for image in everything(again)[0]} == held_out


@pytest.mark.parametrize("limit, expected", [(6, 6), (1000, 23)])
def test_limit_train(limit: int, expected: int, small_npz: Path) -> None:
    data = load_data(str(small_npz), SMALL, 3, batch_size=expected, limit_train=limit)
    ((_, labels),) = epoch(data, 0)
    assert data.describe["train_images"] == train_of(data).images == len(labels) == expected
    assert max(np.bincount(labels)) - min(np.bincount(labels)) <= 1


@pytest.mark.parametrize(
    "splits, val_split, val_images",
    [
        ({"train": 20, "val": 3, "test": 4}, "val", 3),
        ({"train": 20, "test": 4}, "test", 4),
        ({"train": 20}, "10 % held out of train", 2),
    ],
)
def test_splits_of_an_npz(splits: dict[str, int], val_split: str, val_images: int, tmp_path: Path) -> None:
    data = load_data(str(make_npz(tmp_path / "a.npz", splits)), SMALL, 3, batch_size=4)
    assert (data.describe["val_split"], data.val.images) == (val_split, val_images)


def test_nested_and_hidden_files(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a/deep/deeper": 2, "a": 1, "b": 1, ".cache": 3})
    (tmp_path / "a" / "._000.png").write_bytes(b"resource fork")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "README.md").write_text("no class")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    _, labels = everything(load_data(str(tmp_path), SMALL, 2, batch_size=9, training=False))
    assert labels.tolist() == [0, 0, 0, 1]


# Class maps


@pytest.mark.parametrize(
    "text, expected",
    [
        ("cat\ndog\n", {"cat": 0, "dog": 1}),
        ("\ufeffcat\r\ndog\r\n\r\n", {"cat": 0, "dog": 1}),
        ("cat 4\ndog\t2\n", {"cat": 4, "dog": 2}),
        ("big cat\ndog\n", {"big cat": 0, "dog": 1}),
        ("big cat 7\ndog 1\n", {"big cat": 7, "dog": 1}),
        ('{"cat": 3, "dog": 0}', {"cat": 3, "dog": 0}),
        ("0\n1\n10\n", {"0": 0, "1": 1, "10": 2}),
    ],
)
def test_class_maps(text: str, expected: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "map").write_text(text, encoding="utf-8")
    assert read_class_map(tmp_path / "map") == expected


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"cat\ncat\n", "twice"),
        (b"cat 1\ndog 1\n", "both"),
        (b"\xff\xfe\x00", "text"),
        (b"{", "JSON"),
        (b'{"cat": "a"}', "no label"),
        (b'{"cat": -1}', "no label"),
        (b'{"cat": true}', "no label"),
        (b'{"cat": {"dog": 1}}', "no label"),
        (b'{"cat": 1, "cat": 2}', "twice"),
        (b'{"a":' * 100_000, "JSON"),
    ],
)
def test_class_maps_that_make_no_sense(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "map").write_bytes(content)
    assert says in refused(DataError, lambda: read_class_map(tmp_path / "map"))


def test_a_class_map_for_part_of_the_classes(tmp_path: Path) -> None:
    make_folder(tmp_path / "data", {"n2": 1, "n7": 2})
    (tmp_path / "map").write_text("".join(f"n{number}\n" for number in range(10)))
    data = load_data(str(tmp_path / "data"), SMALL, 10, batch_size=4, class_map=tmp_path / "map", training=False)
    assert everything(data)[1].tolist() == [2, 7, 7]

    def load(classes: int, text: str) -> Data:
        (tmp_path / "map").write_text(text)
        return load_data(
            str(tmp_path / "data"), SMALL, classes, batch_size=4, class_map=tmp_path / "map", training=False
        )

    message = refused(DataError, lambda: load(5, "n2 1\nn7 12\n"))
    assert "label 12" in message
    assert "5 classes" in message
    assert "n7" in refused(DataError, lambda: load(5, "n2\nn3\n"))
    refused(UsageError, lambda: load_data(str(tmp_path / "data"), SMALL, 2, batch_size=1, class_map=tmp_path / "no"))
    path = make_npz(tmp_path / "a.npz", {"train": 5})
    refused(UsageError, lambda: load_data(str(path), SMALL, 3, batch_size=1, class_map=tmp_path / "map"))


def test_the_order_of_class_folders_is_torchvisions_and_doubts_are_noted(tmp_path: Path) -> None:
    make_folder(tmp_path, {"c10": 1, "c2": 2})
    data = load_data(str(tmp_path), SMALL, 2, batch_size=4, training=False)
    assert everything(data)[1].tolist() == [0, 1, 1]
    assert "c10 before c2" in data.describe["notes"][0]


# Bad folders


def test_no_such_data(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nothing"), "", "a\0b", str(tmp_path / ("x" * 5000))):
        refused(UsageError, lambda path=path: load_data(path, SMALL, 2, batch_size=4))  # type: ignore[misc]  # a default binds the loop variable
    (tmp_path / "data.zip").write_bytes(b"PK")
    assert ".npz" in refused(UsageError, lambda: load_data(str(tmp_path / "data.zip"), SMALL, 2, batch_size=4))


def test_arguments_that_make_no_sense(small_npz: Path) -> None:
    bad: list[dict[str, Any]] = [
        {"batch_size": 0},
        {"batch_size": 4, "workers": -1},
        {"batch_size": 4, "seed": -1},
        {"batch_size": 4, "val_from_train": 0.0},
        {"batch_size": 4, "val_from_train": 1.0},
        {"batch_size": 4, "val_from_train": float("nan")},
        {"batch_size": 4, "limit_train": 0},
        {"batch_size": 4, "augment": "flip"},
    ]
    for arguments in bad:
        refused(UsageError, lambda arguments=arguments: load_data(str(small_npz), SMALL, 3, **arguments))  # type: ignore[misc]  # see above
    spec = InputSpec(4, 16, 16, (0.5,) * 4, (0.5,) * 4)
    assert "4 channels" in refused(UsageError, lambda: load_data(str(small_npz), spec, 3, batch_size=4))


def test_empty_folders(tmp_path: Path) -> None:
    def load() -> Data:
        return load_data(str(tmp_path), SMALL, 2, batch_size=4)

    message = refused(DataError, load)
    assert "no class folders and no pictures" in message
    assert ".jpg" in message
    make_folder(tmp_path, {"a": 0, "b": 0})
    assert "no pictures" in refused(DataError, load)
    (tmp_path / "a" / "x.txt").write_text("no picture")
    assert ".jpg" in refused(DataError, load)


def test_class_counts_that_do_not_fit(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 2})
    assert "one class only" in refused(DataError, lambda: load_data(str(tmp_path), SMALL, 2, batch_size=4))
    make_folder(tmp_path, {"b": 2, "c": 2})
    message = refused(DataError, lambda: load_data(str(tmp_path), SMALL, 1000, batch_size=4))
    assert "3 class folders" in message
    assert "1000 classes" in message
    assert "--class-map" in message


def test_one_class_with_pictures(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 2, "b": 0})
    assert "label 0" in refused(DataError, lambda: load_data(str(tmp_path), SMALL, 2, batch_size=4))


def test_a_class_that_only_val_has(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "val/z": 1})
    assert "val/z" in refused(DataError, lambda: load_data(str(tmp_path), SMALL, 2, batch_size=4))


def test_training_without_training_pictures(tmp_path: Path) -> None:
    make_folder(tmp_path, {"val/a": 2, "val/b": 2})
    assert "val" in refused(DataError, lambda: load_data(str(tmp_path), SMALL, 2, batch_size=4))
    assert load_data(str(tmp_path), SMALL, 2, batch_size=4, training=False).val.images == 4


def test_colour_pictures_for_a_grey_network(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 2, "b": 2})
    data = load_data(str(tmp_path), GREY, 2, batch_size=4, training=False)
    message = refused(DataError, lambda: list(data.val))
    assert "3 channels" in message
    assert "takes 1" in message
    path = make_npz(tmp_path / "a.npz", {"train": 5, "val": 3}, (8, 8, 3))
    message = refused(DataError, lambda: load_data(str(path), GREY, 3, batch_size=4))
    assert "3 channels" in message
    assert "takes 1" in message


# Pictures that cannot be read


def png(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def jpeg(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "JPEG")
    return stream.getvalue()


def broken_pictures() -> dict[str, bytes]:
    whole = png(random_image(1, 60, 60))
    huge = bytearray(whole)
    huge[16:24] = struct.pack(">II", 60_000, 60_000)  # the size in the header; Pillow refuses it as a bomb
    damaged = bytearray(whole)
    damaged[60:90] = bytes(30)
    sixteen_bit = Image.fromarray(np.full((9, 9), 300, dtype=np.uint16))
    return {
        "empty.png": b"",
        "text.jpg": b"this is no picture",
        "truncated.png": whole[: len(whole) // 2],
        "truncated.jpg": jpeg(random_image(1, 200, 200))[:3000],
        "bomb.png": bytes(huge),
        "damaged.png": bytes(damaged),
        "deep.png": png(sixteen_bit),
        "line\nbreak.png": b"",
    }


@pytest.mark.parametrize("name, workers", [*((name, 0) for name in sorted(broken_pictures())), ("truncated.jpg", 1)])
def test_an_unreadable_picture_stops_with_its_path(name: str, workers: int, tmp_path: Path) -> None:
    make_folder(tmp_path, {"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2})
    (tmp_path / "train" / "b" / name).write_bytes(broken_pictures()[name])
    data = load_data(str(tmp_path), SMALL, 2, batch_size=3, workers=workers)
    everything(data)
    message = refused(DataError, lambda: epoch(data, 0) + epoch(data, 1) + epoch(data, 2))
    assert str(Path("train", "b", " ".join(name.split()))) in message
    assert "--skip-bad-images" in message


class DeadlyPictures:
    """Pictures that end the process that opens them, as the kernel does when memory runs out."""

    labels = np.array([0, 1, 0, 1])

    def open(self, index: int) -> Image.Image:
        os._exit(1)

    def name(self, index: int) -> str:
        return "x"


def test_a_worker_that_dies_gives_one_line() -> None:
    source = PictureSource(DeadlyPictures(), np.arange(4), SMALL, workers=1, seed=0, resized_crop=False)
    message = refused(DataError, lambda: list(source.batches([np.arange(4)], None)))
    assert "--workers" in message


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    data = load_data(str(tmp_path), SMALL, 2, batch_size=4, training=False)
    assert "gone.png" in refused(DataError, lambda: list(data.val))
    (tmp_path / "a" / "gone.png").unlink()
    (tmp_path / "a" / "itself.png").symlink_to("itself.png")
    data = load_data(str(tmp_path), SMALL, 2, batch_size=4, training=False)
    assert "itself.png" in refused(DataError, lambda: list(data.val))
    (tmp_path / "a" / "itself.png").unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "b" / "pipe.png")
        data = load_data(str(tmp_path), SMALL, 2, batch_size=4, training=False)
        assert "pipe.png" in refused(DataError, lambda: list(data.val))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_can_be_skipped(workers: int, tmp_path: Path) -> None:
    make_folder(tmp_path, {"train/a": 6, "train/b": 6, "val/a": 2, "val/b": 2})
    good = load_data(str(tmp_path), SMALL, 2, batch_size=4)
    expected = everything(good)
    for name, content in broken_pictures().items():
        (tmp_path / "train" / "b" / name).write_bytes(content)
    (tmp_path / "val" / "a" / "0000.jpg").write_bytes(b"")
    data = load_data(str(tmp_path), SMALL, 2, batch_size=4, workers=workers, skip_bad_images=True)
    assert torch.equal(everything(data)[0], expected[0])
    assert torch.equal(everything(data)[1], expected[1])
    assert (train_of(data).images, data.describe["train_images"]) == (12, 12)
    assert (data.val.images, data.describe["val_images"]) == (4, 4)
    names = [f"train/b/{' '.join(name.split())}" for name in broken_pictures()] + ["val/a/0000.jpg"]
    assert data.describe["skipped_images"] == sorted(names)
    assert same(epoch(data, 1), epoch(good, 1))


def test_folders_without_any_readable_picture(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"")

    def load() -> Data:
        return load_data(str(tmp_path), SMALL, 2, batch_size=4, training=False, skip_bad_images=True)

    assert "none of the 2" in refused(DataError, load)
    (tmp_path / "b" / "x.png").write_bytes(png(random_image(1)))
    assert load().describe["skipped_images"] == ["a/x.png"]


def test_one_class_left_after_skipping(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train/a": 2, "val/a": 2, "val/b": 2, "train/b": 0})
    (tmp_path / "train" / "b" / "x.png").write_bytes(b"")
    message = refused(DataError, lambda: load_data(str(tmp_path), SMALL, 2, batch_size=4, skip_bad_images=True))
    assert "two classes" in message


# Bad .npz files


def member(array: NDArray[Any]) -> bytes:
    stream = BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=True)
    return stream.getvalue()


def write_npz(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


IMAGES = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
LABELS = np.array([0, 1, 2, 0])


@pytest.mark.parametrize(
    "images, labels, says",
    [
        (IMAGES.astype(np.float32), LABELS, "float32"),
        (IMAGES.astype(np.int64), LABELS, "int64"),
        (IMAGES[:0], LABELS[:0], "empty"),
        (IMAGES[0], LABELS[:1], "4 train_labels|8 train_images|train_labels"),
        (IMAGES.transpose(0, 3, 1, 2), LABELS, r"\(4, 3, 8, 8\)"),
        (IMAGES.reshape(4, -1), LABELS, "shape"),
        (IMAGES, LABELS[:3], "4 train_images but 3 train_labels"),
        (IMAGES, LABELS.astype(np.float64), "float64"),
        (IMAGES, np.eye(4, 3, dtype=np.int64), "one label per image"),
        (IMAGES, np.array([0, 1, 2, 3]), "label 3 does not fit the network's 3 classes"),
        (IMAGES, np.array([0, -1, 2, 1]), "label -1"),
        (IMAGES, np.array([0, 1, 2, 2**64 - 1], dtype=np.uint64), "18446744073709551615"),
        (IMAGES, np.array([1, 1, 1, 1]), "two classes"),
        (IMAGES, np.array(["a", "b", "c", "d"]), "whole numbers"),
        (IMAGES, np.array([0, 1, None, 2], dtype=object), "objects"),
    ],
)
def test_arrays_that_do_not_fit(images: NDArray[Any], labels: NDArray[Any], says: str, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", {"train_images": member(images), "train_labels": member(labels)})
    with pytest.raises(DataError, match=says) as caught:
        load_data(str(path), InputSpec(3, 8, 8), 3, batch_size=2)
    assert "\n" not in str(caught.value)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("unpickled",))


def damaged_npz() -> dict[str, bytes]:
    def build(**members: bytes) -> bytes:
        stream = BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(f"{name}.npy", content)
        return stream.getvalue()

    images, labels = member(IMAGES), member(LABELS)
    whole = build(train_images=images, train_labels=labels)
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF
    claimed = images.replace(b"(4, 8, 8, 3)", b"(4, 8, 8, 9)")
    absurd = images.replace(b"'shape': (4, 8, 8, 3), }" + b" " * 10, b"'shape': (4000000000000, 3), }    ")
    return {
        "empty": b"",
        "text": b"hello",
        "truncated": whole[: len(whole) // 2],
        "flipped": bytes(flipped),
        "another file": build(weights=images),
        "no images": build(train_labels=labels),
        "no npy": build(train_images=b"junk", train_labels=labels),
        "short member": build(train_images=images[:-5], train_labels=labels),
        "long member": build(train_images=images + b"12345", train_labels=labels),
        "header says more": build(train_images=claimed, train_labels=labels),
        "header says absurdly much": build(train_images=absurd, train_labels=labels),
        "pickle": build(train_images=member(np.array([Bomb()], dtype=object)), train_labels=labels),
        "unknown version": build(train_images=images[:6] + b"\x09" + images[7:], train_labels=labels),
        "gzip": gzip.compress(whole),
    }


@pytest.mark.parametrize("name", sorted(damaged_npz()))
def test_damaged_npz_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(damaged_npz()[name])
    message = refused(DataError, lambda: load_data(str(tmp_path / "a.npz"), InputSpec(3, 8, 8), 3, batch_size=2))
    assert "a.npz" in message


def test_training_on_an_npz_without_training_images(tmp_path: Path) -> None:
    path = make_npz(tmp_path / "a.npz", {"test": 5})
    assert "test" in refused(DataError, lambda: load_data(str(path), SMALL, 3, batch_size=4))
    assert load_data(str(path), SMALL, 3, batch_size=4, training=False).val.images == 5


def test_evaluating_an_npz_of_training_images_only_takes_them_all(tmp_path: Path) -> None:
    path = make_npz(tmp_path / "a.npz", {"train": 12})
    assert load_data(str(path), SMALL, 3, batch_size=4, training=False).val.images == 12


# timm's readers


def mnist_files(root: Path) -> Path:
    """A tiny MNIST as torchvision keeps it."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 12), ("t10k", 5)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
    return root


def test_a_torchvision_data_set(tmp_path: Path) -> None:
    data = load_data(f"torch/mnist@{mnist_files(tmp_path)}", InputSpec(1, 28, 28, (0.1,), (0.3,)), 10, batch_size=4)
    assert (train_of(data).images, data.val.images) == (12, 5)
    assert data.describe["val_split"] == "validation"
    assert data.describe["augmentation"] == "shift by up to 3 pixels (black outside)"
    images, labels = everything(data)
    assert images.shape == (5, 1, 28, 28)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert same(epoch(data, 1)[1:], epoch(data, 1, 1))
    colour = load_data(f"torch/mnist@{tmp_path}", InputSpec(3, 28, 28), 10, batch_size=4)
    assert "flip" not in colour.describe["augmentation"]
    message = refused(DataError, lambda: load_data(f"torch/mnist@{tmp_path}", SMALL, 4, batch_size=4))
    assert "label 4" in message
    assert "4 classes" in message


def test_readers_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str) -> Data:
        return load_data(path, SMALL, 3, batch_size=4)

    assert "torch/mnist@FOLDER" in refused(UsageError, lambda: load("torch/mnist"))
    assert "torch/mnist" in refused(DataError, lambda: load(f"torch/mnist@{tmp_path}"))
    assert "torch/mnits" in refused(DataError, lambda: load(f"torch/mnits@{tmp_path}"))
    refused(UsageError, lambda: load(f"torch/image_folder@{tmp_path}"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for path, command in (("hfds/x/y", "pip install datasets"), ("wds/x@.", "pip install webdataset")):
        assert command in refused(MissingPartError, lambda path=path: load(path))  # type: ignore[misc]  # a default binds the loop variable


class FakeItems:
    """A Hugging Face data set as timm's reader gives it: streams of encoded pictures."""

    label_key = "label"

    def __init__(self, labels: list[Any]) -> None:
        self.dataset = {"label": labels}

    def __getitem__(self, index: int) -> tuple[BytesIO, int]:
        return BytesIO(b"junk" if index == 5 else png(random_image(index))), self.dataset["label"][index]


def test_a_hugging_face_data_set() -> None:
    pictures = Reader("hfds/fake", None).pictures(SimpleNamespace(reader=FakeItems([2, 0, 1, 1, 0, 0])), "train")
    assert pictures.labels.tolist() == [2, 0, 1, 1, 0, 0]
    assert np.array_equal(np.asarray(pictures.open(3)), np.asarray(random_image(3)))
    assert "hfds/fake:train[5]" in refused(DataError, lambda: pictures.open(5))
    assert "hfds/fake:train[6]" in refused(DataError, lambda: pictures.open(6))
    for labels in ([0, None], [0.5, 1.0], ["a", "b"], []):
        dataset = SimpleNamespace(reader=FakeItems(labels))
        refused(DataError, lambda dataset=dataset: Reader("hfds/fake", None).pictures(dataset, "train"))  # type: ignore[misc]  # a default binds the loop variable
    assert "labels" in refused(DataError, lambda: Reader("torch/x", ".").pictures(object(), "train"))


def test_a_web_data_set(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    info: dict[str, Any] = {"splits": {}}
    for split, count in (("train", 9), ("validation", 5)):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for number in range(count):
                for suffix, content in (("png", png(random_image(number))), ("cls", str(number % 3).encode())):
                    entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, BytesIO(content))
        info["splits"][split] = {
            "name": split,
            "num_samples": count,
            "filenames": [f"{split}.tar"],
            "shard_lengths": [count],
        }
    (tmp_path / "_info.json").write_text(json.dumps(info))
    data = load_data(f"wds/fake@{tmp_path}", SMALL, 3, batch_size=4)
    assert everything(data)[1].tolist() == [0, 1, 2, 0, 1]
    assert same(epoch(data, 1)[1:], epoch(data, 1, 1))


class FakeStream:
    """What timm gives for a set that can only be iterated."""

    def __init__(self, count: int, promised: int | None = None, label: int | None = None) -> None:
        self.count, self.promised, self.label = count, promised if promised is not None else count, label

    def __len__(self) -> int:
        return self.promised

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for number in range(self.count):
            yield random_image(number, 80), number % 3 if self.label is None else self.label


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Data]:
    """Loads a stream of fake pictures through the reader ``tfds/fake``."""

    def load(train: FakeStream, val: FakeStream, spec: InputSpec = SMALL, **arguments: Any) -> Data:
        sets = {"train": train, "validation": val}
        monkeypatch.setattr(Reader, "parse", classmethod(lambda cls, path: Reader("tfds/fake", None)))
        monkeypatch.setattr(Reader, "open", lambda self, splits, spec: (sets[splits[0]], splits[0]))
        return load_data("tfds/fake", spec, 3, **{"batch_size": 4, "seed": 1, **arguments})

    return load


@pytest.mark.parametrize("spec", [SMALL, LARGE], ids=["small", "large"])
def test_streams(spec: InputSpec, stream: Callable[..., Data], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BUFFER", 6)
    data = stream(FakeStream(23), FakeStream(7), spec)
    assert (train_of(data).images, len(train_of(data)), data.val.images, len(data.val)) == (23, 5, 7, 2)
    before = random_state()
    whole = epoch(data, 3)
    assert random_state() == before
    assert len(whole) == 5
    assert same(epoch(data, 3, 2), whole[2:])
    assert not same(epoch(data, 4), whole)
    images, labels = everything(data)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    expected = Normalize(spec)(EvalTransform(spec)(random_image(3, 80))[None])[0]
    assert torch.equal(images[3], expected)
    assert data.describe["kind"] == "stream"


@pytest.mark.parametrize("count", [2, 3, 4])
def test_streams_for_several_processes(stream: Callable[..., Data], count: int) -> None:
    data = stream(FakeStream(23), FakeStream(14), batch_size=12)
    train = data.train
    assert isinstance(train, StreamTrainBatches)
    parts = [train.sliced(Turn(number, count)) for number in range(count)]
    whole = epoch(data, 3)
    slices = [list(part.epoch(3)) for part in parts]
    for index, (images, labels) in enumerate(whole):
        assert torch.equal(images, torch.cat([batches[index].images for batches in slices]))
        assert torch.equal(labels, torch.cat([batches[index].labels for batches in slices]))
    with pytest.raises(UsageError, match="batches of 12 pictures cannot be divided evenly among 5 processes"):
        train.sliced(Turn(0, 5))
    batches = list(data.val)
    for number in range(count):
        dealt_out = list(dealt(data.val, Turn(number, count)))
        for ours, theirs in zip(dealt_out, batches[number::count], strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)


def test_a_stream_shows_every_picture_once(stream: Callable[..., Data], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BUFFER", 6)
    data = stream(FakeStream(24), FakeStream(3), augment="none")
    seen = torch.cat([images for images, _ in epoch(data, 0)])
    assert distinct(seen) == 24
    assert train_of(stream(FakeStream(24), FakeStream(3), limit_train=10)).images == 10
    short = epoch(stream(FakeStream(3), FakeStream(3)), 0)
    assert [len(labels) for _, labels in short] == [3]


def test_streams_that_cannot_be_used(stream: Callable[..., Data]) -> None:
    data = stream(FakeStream(20), FakeStream(5, promised=7))
    assert "5 of its 7" in refused(DataError, lambda: list(data.val))
    data = stream(FakeStream(20), FakeStream(5, label=3))
    assert "label 3 does not fit the network's 3 classes" in refused(DataError, lambda: list(data.val))
    refused(DataError, lambda: stream(FakeStream(20), FakeStream(0)))
    refused(UsageError, lambda: stream(FakeStream(9), FakeStream(9), skip_bad_images=True))
    refused(UsageError, lambda: stream(FakeStream(9), FakeStream(9), val_from_train=0.1))


def test_the_public_names_are_there() -> None:
    assert set(data_module.__all__) == {"Augment", "Batch", "Data", "EvalLoader", "TrainLoader", "load_data"}
