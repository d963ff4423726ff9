"""Make the two files of this example: the UCI handwritten digits, and a small network trained on them.

    pip install scikit-learn
    python -m examples.digits.prepare

``digits.npz`` holds scikit-learn's copy of the data (1,797 pictures of 8×8 pixels, Alpaydin & Kaynak 1998, CC BY 4.0)
in the MedMNIST layout, every fifth picture for validation. ``resnet.safetensors`` is timm's ``test_resnet``, narrowed,
with all that cbpq needs to know of it in its metadata. On one machine it always gives the same weights.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from examples.digits.digits import Recipe, describe_accuracy, read, train, write

HERE = Path(__file__).parent
RESNET = Recipe(
    "test_resnet",
    {"num_classes": 10, "in_chans": 1, "channels": [16, 32, 48, 64], "output_stride": 8},
    partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
    epochs=60,
)


def write_data(path: Path) -> None:
    """Write the data set."""
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    val = np.arange(len(images)) % 5 == 4
    np.savez_compressed(
        path,
        train_images=images[~val],
        train_labels=labels[~val, None],
        val_images=images[val],
        val_labels=labels[val, None],
    )


def main() -> None:
    """Write both files beside this script."""
    data = HERE / "digits.npz"
    write_data(data)
    network = train(RESNET, *read(data, "train"))
    print(describe_accuracy(network, *read(data, "val")))
    write(HERE / "resnet.safetensors", RESNET, network)


if __name__ == "__main__":
    main()
