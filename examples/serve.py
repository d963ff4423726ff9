"""Say what a picture shows, with nothing but a file that cbpq made.

python examples/serve.py resnet-two-bit-shift/model.safetensors picture.png
"""

import argparse
import sys

import torch

import cbpq


def main() -> int:
    """Print the most probable classes of a picture, by their numbers, and how sure the network is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a cbpq file")
    parser.add_argument("picture", help="a picture in a format that Pillow reads")
    parser.add_argument("--top", type=int, default=5, help="so many classes")
    parser.add_argument("--packed", action="store_true", help="keep the weights packed in memory: slower, same result")
    parser.add_argument("--arch", help="package.module:function, for a network made by your own code")
    args = parser.parse_args()
    try:
        loaded = cbpq.load(args.model, arch=args.arch, packed=args.packed)
        images = loaded.preprocess(args.picture)
    except cbpq.errors.CbpqError as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return error.exit_code
    with torch.no_grad():
        probabilities = loaded.model(images)[0].softmax(0)
    shown = max(1, min(args.top, len(probabilities)))
    for probability, number in zip(*probabilities.topk(shown), strict=True):
        print(f"class {number}: {probability:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
