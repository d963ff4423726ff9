"""An original to tune settings on: ResNet-20 trained on 45,000 of CIFAR-10's training pictures, the other 5,000 kept.

    python -m examples.cifar10.original --data cifar10.npz -o tuning

Public checkpoints have learned all 50,000 by heart, so pictures held out from them show little of what the test images
will; here they are as new as those. Writes ``tuning/resnet20.safetensors`` and ``tuning/cifar10.npz``, the 45,000 as
its training split and the 5,000 as its validation split; the test images are not looked at. The same command goes on
after an interruption. ``--weights tuning/resnet20.safetensors --lr 0.05`` trains it further, towards knowing its
pictures by heart as public checkpoints do.
"""

import argparse
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cbpq.atomic import atomic_write
from cbpq.data import load_data
from cbpq.inputs import InputSpec
from examples.cifar10.resnet import INPUT_SPEC, resnet20

TRAIN = 45_000  # the first ones: the pictures are in random order


def main() -> None:
    """Split, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as .npz, see the README")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--weights", type=Path, help="where to start, by default at random weights")
    parser.add_argument("--lr", type=float, default=0.4, help="the highest learning rate")
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
    torch.manual_seed(0)
    network = resnet20()
    if chosen.weights:
        network.load_state_dict(load_file(chosen.weights))
    train(network, split, chosen.epochs, chosen.lr, chosen.output / "training.pt")
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, chosen.output / "resnet20.safetensors")
    (chosen.output / "training.pt").unlink(missing_ok=True)


def train(network: nn.Module, split: Path, epochs: int, lr: float, saved: Path) -> None:
    """SGD with Nesterov momentum, its learning rate up to ``lr`` in a fifth of the budget and down to 0, in bfloat16.

    What ``saved`` holds of it after each epoch is gone on from.
    """
    network.to(memory_format=torch.channels_last)
    data = load_data(str(split), InputSpec(**INPUT_SPEC), 10, batch_size=256)
    assert data.train is not None
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=epochs * len(data.train), pct_start=0.2, anneal_strategy="linear"
    )
    parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "schedule": schedule}
    done = 0
    if saved.exists():
        state = torch.load(saved)
        if state["asked"] != (epochs, lr):
            raise SystemExit(f"{saved} is of another --epochs or --lr; give those, or delete it to start again")
        done = state.pop("done")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in range(done, epochs):
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
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | {"done": epoch + 1, "asked": (epochs, lr)}, buffer := BytesIO())
        atomic_write(saved, buffer.getvalue())


def answers(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, 10) in float32, computed in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output: Tensor = network(images.contiguous(memory_format=torch.channels_last))
    return output.float()


if __name__ == "__main__":
    main()
