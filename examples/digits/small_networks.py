"""Train two small networks on the digits that are no ResNets, to try methods and presets on.

    python -m examples.digits.small_networks -o networks

``depthwise.safetensors`` is a narrow timm EfficientNet: inverted residuals, whose depthwise convolutions have nine
weights per channel, and squeeze-and-excitation. ``transformer.safetensors`` is a small timm VisionTransformer. Like
``resnet.safetensors``, both say in their metadata what they are. The same seed gives the same weights on one machine.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from examples.digits.digits import Recipe, describe_accuracy, read, train, write

DIGITS = Path(__file__).parent / "digits.npz"
TASK = {"num_classes": 10, "in_chans": 1}
RECIPES = {
    "depthwise": Recipe(
        "test_efficientnet",
        TASK | {"channel_multiplier": 0.5, "depth_multiplier": 2},
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        epochs=20,
        side=32,  # it halves its input five times
    ),
    "transformer": Recipe(
        "test_vit",
        TASK | {"img_size": 12, "patch_size": 3, "embed_dim": 48, "depth": 3, "num_heads": 4, "weight_init": "jax"},
        partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.05),
        epochs=50,
        side=12,
    ),
}


def main() -> None:
    """Write the networks and print how good they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--epochs", type=int, help="passes over the data; by default as many as each network needs")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    for name, recipe in RECIPES.items():
        if chosen.epochs is not None:
            recipe = replace(recipe, epochs=chosen.epochs)
        network = train(recipe, *read(DIGITS, "train", recipe.side), seed=chosen.seed)
        write(chosen.output / f"{name}.safetensors", recipe, network)
        print(f"{name}: {describe_accuracy(network, *read(DIGITS, 'val', recipe.side))}", flush=True)


if __name__ == "__main__":
    main()
