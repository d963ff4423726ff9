"""From a picture to what the network is fed.

To evaluate, a picture goes through timm's own evaluation transform for the network's input specification, which for the
centre crop is torchvision's preset as well. Two things differ: a picture that has the network's size already, and is
small (64 pixels at most), is taken as it is; and so is every array of the network's own size.

To train, inputs larger than 64 pixels are random-resized crops (35 to 100 % of the area: mild, as fits the few epochs a
converged network is trained further), smaller ones are shifted by up to an eighth of their size, with black coming in
from outside. Colour pictures are also mirrored left to right; grey ones are not, because a mirrored digit is no digit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cbpq.errors import UsageError, did_you_mean
from cbpq.inputs import InputSpec
from cbpq.lazy import Lazy
from cbpq.pictures import with_channels

timm, tv = Lazy("timm"), Lazy("torchvision.transforms")

SMALL = 64  # pixels; up to here inputs are treated as CIFAR's are
SCALE = (0.35, 1.0)  # share of the area a random-resized crop takes
RATIO = (3 / 4, 4 / 3)  # its width over its height

Augment = Literal["auto", "none", "crop", "crop-flip"]
AUGMENTS: tuple[Augment, ...] = ("auto", "none", "crop", "crop-flip")

# epoch_generator's streams; none is 0, since numpy's SeedSequence ignores trailing zeros
ORDER, SHIFT, CROP = 1, 2, 3


def epoch_generator(seed: int, epoch: int, *stream: int) -> np.random.Generator:
    """Randomness that depends on its arguments alone: no global state, no worker, no earlier draw."""
    return np.random.default_rng([seed, epoch, *stream])


@dataclass(frozen=True)
class Augmentation:
    """What training does to pictures: ``resized_crop`` (large inputs), ``pad`` pixels (height, width), ``flip``."""

    resized_crop: bool = False
    pad: tuple[int, int] = (0, 0)
    flip: bool = False

    @classmethod
    def choose(cls, augment: Augment, spec: InputSpec, grey: bool) -> "Augmentation":
        """Choose what fits the input. ``auto`` mirrors unless the pictures or the network are grey.

        Raises:
            UsageError: an unknown word.
        """
        if augment not in AUGMENTS:
            raise UsageError(
                f"unknown augmentation {augment!r}{did_you_mean(augment, AUGMENTS)}; use {', '.join(AUGMENTS)}"
            )
        if augment == "none":
            return cls()
        flip = augment == "crop-flip" or (augment == "auto" and spec.channels == 3 and not grey)
        if is_small(spec):
            return cls(pad=(spec.height // 8, spec.width // 8), flip=flip)
        return cls(resized_crop=True, flip=flip)

    @property
    def moves(self) -> bool:
        """Whether what is in a picture comes to another place."""
        return self.resized_crop or any(self.pad)

    def __str__(self) -> str:
        parts = []
        if self.resized_crop:
            parts.append(f"random-resized crop ({SCALE[0]:.0%} to {SCALE[1]:.0%} of the area)")
        if any(self.pad):
            rows, columns = self.pad
            parts.append(f"shift by up to {rows if rows == columns else f'{rows}×{columns}'} pixels (black outside)")
        if self.flip:
            parts.append("horizontal flip")
        return ", ".join(parts) or "none"

    def on_batch(self, images: Tensor, draws: "Shifts", samples: NDArray[np.int64]) -> Tensor:
        """The part that is done on whole batches: shift and flip, with the draws of these samples."""
        if not (any(self.pad) or self.flip):
            return images
        return shift_and_flip(images, self.pad, draws.offsets[:, samples], draws.flips[samples])


@dataclass(frozen=True)
class Shifts:
    """The shift and flip of every sample in one epoch: offsets (2, N) from 0 to 2 × pad, flips (N,) bool."""

    offsets: NDArray[np.int64]
    flips: NDArray[np.bool_]

    @classmethod
    def draw(cls, augmentation: Augmentation, seed: int, epoch: int, count: int) -> "Shifts":
        """Draw for the whole epoch, so that a sample's draw depends on its number and not on its batch."""
        generator = epoch_generator(seed, epoch, SHIFT)
        offsets = generator.integers(0, 2 * np.array(augmentation.pad)[:, None] + 1, size=(2, count))
        return cls(offsets, generator.random(count) < 0.5 if augmentation.flip else np.zeros(count, dtype=np.bool_))


def shift_and_flip(
    images: Tensor, pad: tuple[int, int], offsets: NDArray[np.int64], flips: NDArray[np.bool_]
) -> Tensor:
    """Pad ``images`` (B, C, H, W) with zeros, cut H × W out at ``offsets`` (2, B), mirror where ``flips`` (B,)."""
    height, width = images.shape[2:]
    if any(pad):
        padded = torch.nn.functional.pad(images, (pad[1], pad[1], pad[0], pad[0]))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2 pad + 1, 2 pad + 1, H, W), a view
        rows, columns = torch.from_numpy(offsets)
        images = windows[torch.arange(len(images)), :, rows, columns]
    if not flips.any():
        return images
    return torch.where(torch.from_numpy(flips)[:, None, None, None], images.flip(-1), images)


class Normalize:
    """uint8 (B, C, H, W) to float32: ``(x / 255 - mean) / std``, in torchvision's order of operations."""

    def __init__(self, spec: InputSpec) -> None:
        self._mean = torch.tensor(spec.mean).reshape(-1, 1, 1)
        self._std = torch.tensor(spec.std).reshape(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Repeats grey images for a network of three channels."""
        scaled = images.expand(-1, len(self._mean), -1, -1).to(torch.float32, memory_format=torch.contiguous_format)
        return scaled.div_(255).sub_(self._mean).div_(self._std)


class EvalTransform:
    """Picture to uint8 (C, height, width), as the library that trained the network does it."""

    def __init__(self, spec: InputSpec) -> None:
        self._size = (spec.width, spec.height) if is_small(spec) else None
        self._transform: Callable[[Image.Image], Tensor] = timm.data.create_transform(
            input_size=(spec.channels, spec.height, spec.width),
            interpolation=spec.interpolation,
            mean=spec.mean,
            std=spec.std,
            # timm rounds size / crop_pct down; see InputSpec.resize for the small factor
            crop_pct=spec.crop_pct / (1 + 1e-9),
            crop_mode=spec.crop_mode,
            normalize=False,
        )

    def __call__(self, picture: Image.Image) -> Tensor:
        """Resize and crop, unless it is a small picture of the right size."""
        if picture.size == self._size:
            return to_tensor(picture)
        return self._transform(picture)


def preprocess(picture: Image.Image, spec: InputSpec, name: str = "the picture") -> Tensor:
    """One picture as a network is fed it to evaluate, float32 (1, C, height, width).

    Raises:
        DataError: a colour picture, by its ``name``, for a network of one channel.
    """
    return Normalize(spec)(EvalTransform(spec)(with_channels(picture, spec.channels, name))[None])


class RandomResizedCrop:
    """Picture to uint8 (C, height, width): a random part of it, as torchvision draws it, from a generator of ours."""

    def __init__(self, spec: InputSpec) -> None:
        self._size = [spec.height, spec.width]
        self._interpolation = tv.InterpolationMode(spec.interpolation)

    def __call__(self, picture: Image.Image, generator: np.random.Generator) -> Tensor:
        """Cut ``random_box`` out and resize it."""
        box = random_box(picture.width, picture.height, generator)
        return to_tensor(tv.functional.resized_crop(picture, *box, self._size, self._interpolation))


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture as uint8 (C, H, W)."""
    tensor: Tensor = tv.functional.pil_to_tensor(picture)
    return tensor


def random_box(width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop, its area in SCALE and its shape in RATIO as far as that is possible."""
    for _ in range(10):
        area = width * height * generator.uniform(*SCALE)
        ratio = math.exp(generator.uniform(*np.log(RATIO)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(generator.integers(0, height - box_height + 1))
            left = int(generator.integers(0, width - box_width + 1))
            return top, left, box_height, box_width
    # a very long picture: the largest centred box of an allowed shape
    box_width = max(1, min(width, round(height * RATIO[1])))
    box_height = max(1, min(height, round(width / RATIO[0])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def is_small(spec: InputSpec) -> bool:
    """Whether the network's input is at most 64 pixels on its longer side."""
    return max(spec.height, spec.width) <= SMALL
