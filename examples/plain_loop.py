"""Constrain a network inside a PyTorch loop of your own: two lines more, and the rest is as ever.

python examples/plain_loop.py --epochs 3
"""

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cbpq

DIGITS = Path(__file__).parent / "digits"


def digits(split: str) -> TensorDataset:
    """The UCI digits, normalised: (N, 1, 8, 8) float32 and labels (N,)."""
    with np.load(DIGITS / "digits.npz") as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    normalised = (torch.from_numpy(images)[:, None] / 255 - 0.3) / 0.37
    return TensorDataset(normalised, torch.from_numpy(labels[:, 0]).long())


def accuracy(network: nn.Module) -> float:
    """Validation accuracy in percent."""
    images, labels = digits("val").tensors
    network.eval()
    with torch.no_grad():
        return float((network(images).argmax(1) == labels).float().mean() * 100)


def main() -> None:
    """Fine-tune the digits network with two-bit shift weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--constraint", default="two-bit-shift")
    parser.add_argument("-o", "--output", type=Path, default=Path("digits-plain-loop.safetensors"))
    args = parser.parse_args()

    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=10, in_chans=1, channels=[16, 32, 48, 64], output_stride=8)
    network.load_state_dict(load_file(DIGITS / "resnet.safetensors"))
    print(f"original: {accuracy(network):.2f} %")

    loader = DataLoader(digits("train"), batch_size=64, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    constrained = cbpq.constrain(network, optimizer, args.constraint, epochs=args.epochs)  # one
    for epoch in range(args.epochs):
        network.train()
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        constrained.end_epoch()  # two
        # the network holds constrained weights at every moment, so this is the accuracy of the quantized network
        print(f"epoch {epoch + 1}: {accuracy(network):.2f} %, CFS {constrained.cfs():.4f}")

    cbpq.save(args.output, constrained)
    before = 4 * sum(parameter.numel() for parameter in network.parameters())
    print(f"wrote {args.output}: {args.output.stat().st_size:,} bytes, {before:,} before")


if __name__ == "__main__":
    main()
