"""How far networks of cbpq files are from the original: KL divergence of their outputs, and the share of same answers.

    python -m examples.cifar10.divergence --weights resnet20.th --data cifar10.npz compared/*/model.safetensors

On the validation pictures and on the first 10,000 that were trained on, both as they are; in float32. KL divergence
tells networks apart that a share of the pictures does not: of 5,000 it is known to ± 0.7 % at best.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import cbpq
from cbpq.models import load_model
from cbpq.transforms import Normalize

NETWORK = "examples.cifar10.resnet:resnet20"
SEEN = 10_000  # pictures that were trained on
BATCH = 500


@dataclass(frozen=True)
class Distance:
    """From the original: mean KL(original ‖ network) in nats, and the share of pictures with the same answer in %."""

    kl: float
    agreement: float


class Measure:
    """An original, and the two sets of pictures with what it says of them."""

    def __init__(self, weights: Path, data: Path) -> None:
        original = load_model(NETWORK, weights=weights)
        self._normalize = Normalize(original.info.input_spec)
        with np.load(data) as arrays:
            self.pictures = {"val": arrays["val_images"], "seen": arrays["train_images"][:SEEN]}
        self._original = {name: self._answers(original.model.eval(), name) for name in self.pictures}

    def __call__(self, file: Path) -> dict[str, Distance]:
        """How far the network of a cbpq file is, on ``val`` and on ``seen`` pictures."""
        network = cbpq.load(file, arch=NETWORK).model
        return {name: distance(own, self._answers(network, name)) for name, own in self._original.items()}

    @torch.no_grad()
    def _answers(self, network: nn.Module, name: str) -> Tensor:
        batches = torch.from_numpy(self.pictures[name]).permute(0, 3, 1, 2).split(BATCH)
        return torch.cat([network(self._normalize(images)) for images in batches])


def distance(original: Tensor, network: Tensor) -> Distance:
    """Of two networks' logits (N, classes) for the same pictures."""
    divergence = torch.nn.functional.kl_div(
        network.double().log_softmax(1), original.double().log_softmax(1), reduction="batchmean", log_target=True
    )
    same = (original.argmax(1) == network.argmax(1)).double().mean()
    return Distance(float(divergence), 100 * float(same))


def main() -> None:
    """Measure the files that the command line names, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="cbpq files")
    parser.add_argument("--weights", type=Path, required=True, help="of the original")
    parser.add_argument("--data", type=Path, required=True, help="as .npz, with training and validation pictures")
    chosen = parser.parse_args()
    measure = Measure(chosen.weights, chosen.data)
    print("| | KL | same answer | KL, seen in training | same answer |\n|---|---:|---:|---:|---:|")
    for file in chosen.files:
        cells = [f"{d.kl:.4f} | {d.agreement:.2f} %" for d in measure(file).values()]
        print(f"| {file} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
