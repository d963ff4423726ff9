"""Other views of a batch, and what the original answers to them together."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from small_job import ALL_FOUR, write_arrays, write_network
from torch import Tensor, nn

from cbpq.data import load_data
from cbpq.layers import choose_layers
from cbpq.levels import level_set
from cbpq.models import load_model
from cbpq.presets import resolve
from cbpq.recipe import loss_of
from cbpq.training import Run, prepare, train
from cbpq.transforms import Augment, Augmentation
from cbpq.views import MOVED, other_views

SHIFT, FLIP, BOTH = Augmentation(pad=(4, 4)), Augmentation(flip=True), Augmentation(pad=(4, 4), flip=True)
CROP = Augmentation(resized_crop=True, flip=True)

FAR = 5  # pixels, further than anything moves


def batch(height: int, width: int) -> Tensor:
    """Pixels that are all different."""
    return torch.arange(2 * 3 * height * width, dtype=torch.float32).reshape(2, 3, height, width)


def moves(images: Tensor, view: Tensor, mirrored: bool) -> set[tuple[int, int]]:
    """Every (down, right) of up to FAR pixels that makes the view of the images."""
    height, width = images.shape[2:]
    found = set()
    for down, right in product(range(-FAR, FAR + 1), repeat=2):
        rows = [min(max(row + down, 0), height - 1) for row in range(height)]
        columns = [min(max(column + right, 0), width - 1) for column in range(width)]
        if mirrored:
            columns = [width - 1 - column for column in columns]
        if torch.equal(view, images[:, :, rows][:, :, :, columns]):
            found.add((down, right))
    return found


@pytest.mark.parametrize(
    "augmentation, expected",
    [
        (Augmentation(), []),
        (FLIP, [(True, False)]),
        (SHIFT, [(False, True)] * 4),
        (BOTH, [(True, False), (False, True), (True, True), (False, True)]),
        (CROP, [(True, False), (False, True), (True, True), (False, True)]),
    ],
)
def test_views_are_mirrored_and_moved_as_training_does(
    augmentation: Augmentation, expected: list[tuple[bool, bool]]
) -> None:
    torch.manual_seed(0)
    images = batch(32, 48)
    seen: set[tuple[int, int]] = set()
    for _ in range(40):
        views = list(other_views(images, augmentation, 4))
        assert len(views) == len(expected)
        for view, (mirrored, moved) in zip(views, expected, strict=True):
            assert view.shape == images.shape
            (move,) = moves(images, view, mirrored)
            assert moved or move == (0, 0)
            if moved:
                seen.add(move)
        if len(seen) == 5 * 7:
            break
    if any(moved for _, moved in expected):
        assert {abs(down) for down, _ in seen} == {0, 1, 2}  # 32 / MOVED
        assert {abs(right) for _, right in seen} == {0, 1, 2, 3}  # 48 / MOVED
        assert MOVED == 16


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (8, 8)])
def test_small_pictures_move_by_a_pixel(size: tuple[int, int]) -> None:
    images = batch(*size)
    for _ in range(10):
        for view, mirrored in zip(other_views(images, BOTH, 3), (True, False, True), strict=True):
            assert any(max(map(abs, move)) <= 1 for move in moves(images, view, mirrored))


def test_no_more_views_than_asked_for() -> None:
    assert list(other_views(batch(8, 8), BOTH, 0)) == []
    assert len(list(other_views(batch(8, 8), BOTH, 1))) == 1


def run_of(folder: Path, augment: Augment, **settings: object) -> Run:
    """A run that distils, not begun."""
    loaded = load_model(str(write_network(folder / "net.safetensors", steps=20, **ALL_FOUR)))
    assert loaded.info.input_spec is not None
    data = load_data(
        str(write_arrays(folder / "data.npz")),
        loaded.info.input_spec,
        loaded.num_classes,
        batch_size=16,
        augment=augment,
    )
    assert data.train is not None
    chosen = {"epochs": 1, "batch_size": 16} | settings
    return prepare(
        loaded.model,
        data.train,
        levels=level_set("ternary"),
        method="cbp",
        settings=resolve(layers=[("the test", chosen)]).settings,
        layers=choose_layers(loaded.model, input_spec=loaded.info.input_spec),
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("compared", ["features", "kl"])
@pytest.mark.parametrize(
    "augment, views, asked", [("crop-flip", 4, 4), ("crop-flip", 1, 1), ("crop", 2, 2), ("none", 4, 1)]
)
def test_the_target_is_the_mean_of_what_the_original_answers(
    augment: Augment, views: int, asked: int, compared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, augment, distillation_views=views, distillation_loss=compared)
    seen: list[Tensor] = []
    targets: list[Tensor] = []
    assert run.teacher is not None
    taken = iter(run.loader.epoch(0))

    def noting(output: Tensor, labels: Tensor, target: Tensor, *others: Any) -> Tensor:
        targets.append(target)
        return loss_of(output, labels, target, *others)

    monkeypatch.setattr("cbpq.training.loss_of", noting)
    watch = run.teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    events = train(run)
    next(events)
    watch.remove()
    assert len(seen) == asked
    assert torch.equal(seen[-1], next(taken).images)  # the last, so that its blocks are compared
    with torch.no_grad():
        answers = [run.teacher(images) for images in seen]
    assert torch.allclose(targets[0], torch.stack(answers).mean(0), rtol=1e-5, atol=1e-5)
    if asked > 1:
        assert not torch.allclose(targets[0], answers[-1], rtol=1e-3)
    if run.features is not None:
        for path, output in run.features._teachers.items():
            assert torch.allclose(output, of_block(run.teacher, path, seen[-1]), atol=1e-5)


def of_block(network: nn.Module, path: str, images: Tensor) -> Tensor:
    """What a block gives for a batch."""
    outputs: list[Tensor] = []
    hook = network.get_submodule(path).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        network(images)
    hook.remove()
    return outputs[0]
