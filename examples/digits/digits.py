"""What the scripts of this folder share: reading the digits, training a network on them, measuring and writing it."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

MEAN, STD = 0.3, 0.37
BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """A timm network and how it learns the digits; ``side`` is the height and width that pictures are resized to."""

    architecture: str
    arguments: Mapping[str, Any]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    epochs: int
    side: int = 8

    @property
    def input_spec(self) -> dict[str, Any]:
        """What the network is fed, in cbpq's words."""
        size = {"channels": 1, "height": self.side, "width": self.side}
        return size | {"mean": [MEAN], "std": [STD], "interpolation": "bilinear"}


def read(path: Path, split: str, side: int = 8) -> tuple[Tensor, Tensor]:
    """Pictures (N, side, side) uint8 and labels (N,) of ``train`` or ``val``."""
    with np.load(path) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"][:, 0]
    if side != images.shape[1]:  # with Pillow, as cbpq does it, so that both feed the very same numbers
        resized = [Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR) for image in images]
        images = np.stack([np.asarray(image) for image in resized])
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def normalize(images: Tensor) -> Tensor:
    """(N, H, W) uint8 to (N, 1, H, W) float32, as a recipe's input_spec says."""
    return (images[:, None] / 255 - MEAN) / STD


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every picture moved by up to an eighth of its side, black moving in."""
    side = images.shape[1]
    reach = side // 8
    padded = nn.functional.pad(images, (reach, reach, reach, reach))
    moves = torch.randint(0, 2 * reach + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([picture[y : y + side, x : x + side] for picture, (y, x) in zip(padded, moves, strict=True)])


def train(recipe: Recipe, images: Tensor, labels: Tensor, *, seed: int = 0) -> nn.Module:
    """A network trained from scratch with a cosine schedule."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network: nn.Module = timm.create_model(recipe.architecture, **recipe.arguments)
    optimizer = recipe.optimizer(network.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * (len(images) // BATCH))
    for _ in range(recipe.epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH)[: len(images) // BATCH]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(normalize(shifted(images[batch], generator))), labels[batch]).backward()
            optimizer.step()
            scheduler.step()
    return network.eval()


def describe_accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> str:
    """How many pictures the network gets right, in words."""
    with torch.no_grad():
        right = int((network(normalize(images)).argmax(1) == labels).sum())
    return f"validation accuracy {100 * right / len(labels):.2f} % ({right} of {len(labels)})"


def write(path: Path, recipe: Recipe, network: nn.Module) -> None:
    """Write the weights, with all that cbpq needs to know of the network in the file's metadata."""
    metadata = {
        "architecture": f"timm:{recipe.architecture}",
        "arguments": json.dumps(recipe.arguments),
        "input_spec": json.dumps(recipe.input_spec),
    }
    save_file(network.state_dict(), path, metadata)
