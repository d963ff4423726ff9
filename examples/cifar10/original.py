"""An original to tune settings on: ResNet-20 trained on 45,000 of CIFAR-10's training pictures, the other 5,000 kept.

    python -m examples.cifar10.original --data cifar10.npz -o tuning

Public checkpoints have learned all 50,000 by heart, so pictures held out from them show little of what the test images
will; here they are as new as those. Writes ``tuning/resnet20.safetensors`` and ``tuning/cifar10.npz``, the 45,000 as
its training split and the 5,000 as its validation split; the test images are not looked at.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cbpq.data import load_data
from cbpq.inputs import InputSpec
from examples.cifar10.resnet import INPUT_SPEC, resnet20

TRAIN = 45_000  # the first ones: the pictures are in random order


def main() -> None:
    """Split, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as .npz, see the README")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    split = chosen.output / "cifar10.npz"
    with np.load(chosen.data) as arrays:
        images, labels = arrays["train_images"], arrays["train_labels"]
    parts = {"train": slice(TRAIN), "val": slice(TRAIN, None)}
    np.savez(
        split,
        **{f"{name}_images": images[part] for name, part in parts.items()},
        **{f"{name}_labels": labels[part] for name, part in parts.items()},
    )
    network = train(split, chosen.epochs)
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, chosen.output / "resnet20.safetensors")


def train(split: Path, epochs: int) -> nn.Module:
    """SGD with Nesterov momentum, its learning rate up to 0.4 in a fifth of the budget and down to 0, in bfloat16."""
    torch.manual_seed(0)
    network = resnet20().to(memory_format=torch.channels_last)
    data = load_data(str(split), InputSpec(**INPUT_SPEC), 10, batch_size=256)
    assert data.train is not None
    optimizer = torch.optim.SGD(network.parameters(), lr=0.4, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.4, total_steps=epochs * len(data.train), pct_start=0.2, anneal_strategy="linear"
    )
    for epoch in range(epochs):
        network.train()
        for batch in data.train.epoch(epoch):
            loss = nn.functional.cross_entropy(answers(network, batch.images), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            right = sum(int((answers(network, b.images).argmax(1) == b.labels).sum()) for b in data.val)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, held out {right / data.val.images:.2%}", flush=True)
    return network


def answers(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, 10) in float32, computed in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output: Tensor = network(images.contiguous(memory_format=torch.channels_last))
    return output.float()


if __name__ == "__main__":
    main()
