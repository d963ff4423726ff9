"""Make the two files of this example: the UCI handwritten digits, and a small network trained on them.

    pip install scikit-learn
    python examples/digits/prepare.py

``digits.npz`` holds scikit-learn's copy of the data (1,797 pictures of 8×8 pixels, Alpaydin & Kaynak 1998, CC BY 4.0)
in the MedMNIST layout, every fifth picture for validation. ``resnet.safetensors`` is timm's ``test_resnet``, narrowed,
with all that cbpq needs to know of it in its metadata. On one machine it always gives the same weights.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

HERE = Path(__file__).parent
ARCHITECTURE = "test_resnet"
ARGUMENTS: dict[str, Any] = {"num_classes": 10, "in_chans": 1, "channels": [16, 32, 48, 64], "output_stride": 8}
MEAN, STD = 0.3, 0.37
INPUT_SPEC = {"channels": 1, "height": 8, "width": 8, "mean": [MEAN], "std": [STD], "interpolation": "bilinear"}
EPOCHS, BATCH = 60, 64


def write_data(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write the data set; training images (N, 8, 8) uint8 and labels (N,), and the same for validation."""
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    val = np.arange(len(images)) % 5 == 4
    arrays = {
        "train_images": images[~val],
        "train_labels": labels[~val, None],
        "val_images": images[val],
        "val_labels": labels[val, None],
    }
    np.savez_compressed(path, **arrays)
    train_images, train_labels, val_images, val_labels = (torch.from_numpy(array) for array in arrays.values())
    return train_images, train_labels[:, 0].long(), val_images, val_labels[:, 0].long()


def normalize(images: Tensor) -> Tensor:
    """(N, 8, 8) uint8 to (N, 1, 8, 8) float32, as INPUT_SPEC says."""
    return (images[:, None] / 255 - MEAN) / STD


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every picture moved by up to one pixel, black moving in."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    moves = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    return torch.stack([picture[y : y + 8, x : x + 8] for picture, (y, x) in zip(padded, moves, strict=True)])


def train(images: Tensor, labels: Tensor) -> nn.Module:
    """A network trained from scratch with SGD and a cosine schedule."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network: nn.Module = timm.create_model(ARCHITECTURE, **ARGUMENTS)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    steps = EPOCHS * (len(images) // BATCH)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH)[: len(images) // BATCH]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(normalize(shifted(images[batch], generator))), labels[batch]).backward()
            optimizer.step()
            scheduler.step()
    return network.eval()


def main() -> None:
    """Write both files beside this script."""
    images, labels, val_images, val_labels = write_data(HERE / "digits.npz")
    network = train(images, labels)
    with torch.no_grad():
        right = (network(normalize(val_images)).argmax(1) == val_labels).sum().item()
    print(f"validation accuracy {100 * right / len(val_labels):.2f} % ({right} of {len(val_labels)})")
    metadata = {"architecture": f"timm:{ARCHITECTURE}", "arguments": ARGUMENTS, "input_spec": INPUT_SPEC}
    save_file(
        network.state_dict(),
        HERE / "resnet.safetensors",
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()},
    )


if __name__ == "__main__":
    main()
