"""Pictures made of a network alone."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_job import ALL_FOUR, CLASSES, write_network
from torch import Tensor, nn

from cbpq import synthesis
from cbpq.errors import CbpqError, UsageError
from cbpq.inputs import InputSpec
from cbpq.models import load_model
from cbpq.synthesis import (
    SynthesisChoices,
    contact_sheet,
    gaussian_pictures,
    save_pictures,
    steps_in_all,
    synthesize,
)
from cbpq.transforms import Normalize

FEW = SynthesisChoices(count=40, batch_size=20, steps=25, label_weight=0.3, shift=0)
GREY = InputSpec(1, 8, 8, mean=(0.5,), std=(0.25,))
COLOUR = InputSpec(3, 8, 8, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    path = write_network(tmp_path_factory.mktemp("network") / "net.safetensors", steps=100, **ALL_FOUR)
    return load_model(str(path)).model


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    path = write_network(tmp_path_factory.mktemp("network") / "net.safetensors", in_chans=3)
    return load_model(str(path)).model


@pytest.fixture(scope="module")
def made(grey: nn.Module) -> Tensor:
    return synthesize(grey, GREY, CLASSES, FEW, seed=1)


def mismatch_of(network: nn.Module, images: Tensor, spec: InputSpec) -> float:
    """Independent of the module: mean over layers and channels of the relative errors of mean and deviation."""
    errors: list[Tensor] = []

    def look(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].transpose(0, 1).flatten(1)
        deviation = norm.running_var.sqrt()
        errors.append(((values.mean(1) - norm.running_mean) / deviation).square().mean())
        errors.append((values.std(1) / deviation - 1).square().mean())

    watched = copy.deepcopy(network).eval()
    for module in watched.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(look)
    with torch.no_grad():
        watched(Normalize(spec)(images))
    assert errors
    return float(torch.stack(errors).mean())


def test_statistics_come_near_those_of_training(grey: nn.Module, made: Tensor) -> None:
    noise = gaussian_pictures(40, GREY, seed=1)
    assert mismatch_of(grey, made, GREY) < 0.3 * mismatch_of(grey, noise, GREY)


def test_the_network_is_sure_and_sees_every_class_as_often(
    grey: nn.Module, made: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        sure, predicted = grey(Normalize(GREY)(made)).softmax(1).max(1)
    assert sure.mean() > 0.8
    assert torch.bincount(predicted, minlength=CLASSES).min() > 0
    wanted: list[int] = []

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        wanted.extend(labels.tolist())
        return scores.sum()

    monkeypatch.setattr(nn.functional, "cross_entropy", loss)
    synthesize(grey, GREY, CLASSES, SynthesisChoices(count=14, batch_size=7, steps=1))
    assert sorted(np.bincount(wanted, minlength=CLASSES)) == [2, 2, 2, 2, 3, 3]
    assert wanted != sorted(wanted)


def test_pictures_are_bytes_and_vary(made: Tensor) -> None:
    assert made.shape == (40, 1, 8, 8)
    assert made.dtype == torch.uint8
    assert made.device.type == "cpu"
    assert made.is_contiguous()
    assert made.flatten(1).float().std(1).min() > 5
    assert len(torch.unique(made.flatten(1), dim=0)) == 40
    assert int(made.max()) - int(made.min()) > 100


def test_a_seed_reproduces_its_pictures_and_no_others(grey: nn.Module, made: Tensor) -> None:
    assert torch.equal(synthesize(grey, GREY, CLASSES, FEW, seed=1), made)
    assert not torch.equal(synthesize(grey, GREY, CLASSES, FEW, seed=2), made)
    assert torch.equal(gaussian_pictures(4, COLOUR, 3), gaussian_pictures(4, COLOUR, 3))
    assert not torch.equal(gaussian_pictures(4, COLOUR, 3), gaussian_pictures(4, COLOUR, 4))


@pytest.mark.parametrize("training", [True, False])
def test_the_network_stays_as_it_was(grey: nn.Module, training: bool) -> None:
    network = copy.deepcopy(grey).train(training)
    first = next(network.parameters())
    first.requires_grad_(False)
    for parameter in list(network.parameters())[1:3]:
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(network)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with torch.no_grad():  # whoever calls may have switched gradients off
        synthesize(network, GREY, CLASSES, SynthesisChoices(count=4, batch_size=4, steps=2))
    assert torch.equal(torch.get_rng_state(), state)
    for (name, value), (_, old) in zip(network.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(value, old), name
        assert value.stride() == old.stride(), name
    parameters = list(network.parameters())
    assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * (len(parameters) - 1)
    assert [parameter.grad is None for parameter in parameters[:4]] == [True, False, False, True]
    assert parameters[1].grad is not None
    assert parameters[1].grad.eq(1).all()
    for module, same in zip(network.modules(), before.modules(), strict=True):
        assert module.training == same.training
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_moments_and_their_slope() -> None:
    values = torch.randn(4, 3, 2, 5, dtype=torch.double, requires_grad=True)
    mean, square = synthesis._Moments.apply(values)
    torch.testing.assert_close(mean, values.mean((0, 2, 3)))
    torch.testing.assert_close(square, (values**2).mean((0, 2, 3)))
    assert torch.autograd.gradcheck(synthesis._Moments.apply, values)
    assert torch.autograd.gradcheck(synthesis._Moments.apply, values[..., 0, 0])


def test_colour_pictures_are_mirrored_and_grey_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = torch.arange(8.0).expand(64, 3, 8, 8)
    still = synthesis._moved(ramp[:, :1], GREY, 0, torch.Generator().manual_seed(0))
    assert torch.equal(still, ramp[:, :1])
    moved = synthesis._moved(ramp, COLOUR, 0, torch.Generator().manual_seed(0))
    mirrored = (moved == ramp.flip(-1)).flatten(1).all(1)
    assert torch.equal(moved[~mirrored], ramp[~mirrored])
    assert 16 < int(mirrored.sum()) < 48


def test_colour_network_with_several_outputs(colour: nn.Module) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = colour

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            scores: Tensor = self.inner(images)
            return scores, scores

    calls: list[int] = []
    choices = SynthesisChoices(count=10, batch_size=4, steps=3)
    images = synthesize(Heads(), COLOUR, CLASSES, choices, on_step=lambda: calls.append(1))
    assert images.shape == (10, 3, 8, 8)
    assert len(calls) == steps_in_all(colour, choices) == 9


def test_normalisation_and_one_dimensional_batch_norm() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    spec = InputSpec(3, 4, 4)
    assert synthesize(network, spec, 3, SynthesisChoices(count=3, batch_size=8, steps=2)).shape == (3, 3, 4, 4)


def test_dead_channels_do_not_matter(grey: nn.Module) -> None:
    network = copy.deepcopy(grey)
    norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm.running_var is not None
    norm.running_var[0] = 0
    synthesize(network, GREY, CLASSES, SynthesisChoices(count=4, batch_size=4, steps=2))


def test_a_network_of_nan_is_refused(grey: nn.Module) -> None:
    network = copy.deepcopy(grey)
    with torch.no_grad():
        next(network.parameters()).fill_(torch.nan)
    with pytest.raises(CbpqError, match="not finite"):
        synthesize(network, GREY, CLASSES, SynthesisChoices(count=4, batch_size=4, steps=2))


@pytest.mark.parametrize("spec", [InputSpec(3, 32, 24), GREY, InputSpec(3, 15, 15, mean=(0.2, 0.5, 0.6))])
def test_without_batch_norm_noise_has_the_moments_of_the_preprocessing(spec: InputSpec) -> None:
    network = nn.Sequential(nn.Conv2d(spec.channels, 2, 3), nn.Flatten())
    choices = SynthesisChoices(count=300)
    images = synthesize(network, spec, 5, choices, seed=2)
    assert steps_in_all(network, choices) == 0
    assert torch.equal(images, gaussian_pictures(300, spec, 2))
    normalised = Normalize(spec)(images)
    clipped = (images == 0) | (images == 255)
    assert normalised.mean((0, 2, 3)).abs().max() < 0.2
    assert (normalised.std((0, 2, 3)) - 1).abs().max() < 0.25
    assert clipped.float().mean() < 0.25
    neighbours = normalised.diff(dim=3).square().mean() / (2 * normalised.var())
    assert neighbours < 0.6  # 1 where pixels know nothing of each other


def test_choices_fit_the_input() -> None:
    sizes = {
        side: (choices.count, choices.batch_size)
        for side in (8, 28, 32, 64, 224, 384)
        for choices in [SynthesisChoices.for_input(InputSpec(3, side, side))]
    }
    assert sizes == {8: (512, 256), 28: (512, 256), 32: (512, 256), 64: (256, 128), 224: (64, 32), 384: (64, 32)}


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_contact_sheet(channels: int, mode: str) -> None:
    images = torch.arange(10).to(torch.uint8)[:, None, None, None].expand(10, channels, 6, 5)
    sheet = contact_sheet(images, columns=4, most=9)
    assert sheet.mode == mode
    assert sheet.size == (4 * 5 + 3 * 2, 3 * 6 + 2 * 2)
    pixels = np.asarray(sheet).reshape(22, 26, channels)[..., 0]
    assert pixels[0, 7] == 1
    assert pixels[8, 0] == 4
    assert pixels[21, 0] == 8
    assert pixels[21, 25] == pixels[6, 0] == 255
    assert contact_sheet(images[:2]).size == (12, 6)


def test_pictures_are_saved(tmp_path: Path) -> None:
    images = gaussian_pictures(3, COLOUR, 0)
    folder = tmp_path / "new" / "pictures"
    save_pictures(images, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["0000.png", "0001.png", "0002.png", "contact-sheet.png"]
    with Image.open(folder / "0001.png") as picture:
        assert np.array_equal(np.asarray(picture), images[1].permute(1, 2, 0).numpy())


def test_pictures_are_saved_nowhere_else(tmp_path: Path) -> None:
    images = gaussian_pictures(1, GREY, 0)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        save_pictures(images, tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        save_pictures(images, tmp_path / "file")
    with pytest.raises(CbpqError, match=r"cannot write .*below.* \(Not a directory\)") as raised:
        save_pictures(images, tmp_path / "file" / "below")
    assert "\n" not in str(raised.value)
    with pytest.raises(CbpqError, match="2 channels"):
        save_pictures(torch.zeros(1, 2, 4, 4, dtype=torch.uint8), tmp_path / "odd")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
