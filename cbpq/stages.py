"""What training and the stages before it are given: pictures, and what one stage takes over from another."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import count

import torch
from torch import Tensor, nn

from cbpq import distributed
from cbpq.compensation import Start
from cbpq.data import Batch, Data, TrainLoader
from cbpq.errors import TrainingError
from cbpq.levels import Grid, LevelSet
from cbpq.loaders import RepeatedBatches
from cbpq.presets import Settings

MEMORY = 2**28  # bytes of pictures that the stages before training look at, at most
FEWEST_PICTURES = 32  # looked at whatever they take


@torch.no_grad()
def handed_on(
    network: nn.Module, original: nn.Module, starts: Mapping[str, Start], levels: LevelSet, latent_weights: str
) -> dict[str, Start]:
    """What later stages take over from rounding, by the setting ``latent_weights``.

    ``compensated`` and ``snapped`` go on from the rounded network, with the weights as they were before they were
    placed, or on their levels. ``original`` goes on from the original network, and takes over the scales only.
    """
    if latent_weights == "compensated":
        return dict(starts)
    if latent_weights == "snapped":
        return {name: Start(Grid(levels, s.scale).nearest(s.latent), s.scale) for name, s in starts.items()}
    network.load_state_dict(original.state_dict())
    return {name: Start(original.get_parameter(name).detach().clone(), s.scale) for name, s in starts.items()}


def training_batches(data: Data, settings: Settings) -> TrainLoader:
    """The training pictures, gone through several times in an epoch where there are few; of several processes, each
    has its slices.

    Raises:
        TrainingError: there are none.
        UsageError: a batch cannot be divided among the processes.
    """
    if data.train is None:
        raise TrainingError("there are no pictures to train on")
    steps = settings.epoch_images / settings.batch_size
    own = data.train.sliced(distributed.turn()) if distributed.world_size() > 1 else data.train
    passes = math.ceil(steps / len(own))
    return RepeatedBatches(own, passes) if passes > 1 else own


def calibration_images(data: Data, device: torch.device, most: int | None = None) -> list[Tensor]:
    """Training pictures as they are for evaluation, in batches; as many as MEMORY takes. No more batches are read than
    hold ``most``.
    """
    if data.calibration is not None:
        return _some(data.calibration, device, most)
    return _some(data.train.epoch(0), device, most) if data.train is not None else []


def augmented_images(data: Data, settings: Settings, device: torch.device) -> list[Tensor]:
    """``reconstruction_images`` training pictures as training sees them, in batches; as many as MEMORY takes."""
    if data.train is None:
        return []
    loader = data.train
    # epochs far from those that training draws, so that it sees other variants
    batches = (batch for number in count(2**20) for batch in loader.epoch(number))
    return _some(batches, device, max(settings.reconstruction_images, loader.images))


def _some(batches: Iterable[Batch], device: torch.device, most: int | None = None) -> list[Tensor]:
    return list(_limited((batch.images for batch in batches), device, most))


def _limited(batches: Iterable[Tensor], device: torch.device, most: int | None) -> Iterator[Tensor]:
    pictures = taken = 0
    for images in batches:
        if pictures >= FEWEST_PICTURES and taken + images.numel() * images.element_size() > MEMORY:
            return
        yield images.to(device)
        pictures, taken = pictures + len(images), taken + images.numel() * images.element_size()
        if most is not None and pictures >= most:
            return
