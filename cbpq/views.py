"""Other views of the pictures in a batch, like those that training makes of them.

The mean of what a network answers to several views is right more often than any one answer of its own, so a network
that learns it can come out better than the one it learns from.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from cbpq.transforms import Augmentation

MOVED = 16  # views are moved by up to one part in so many of their size


def other_views(images: Tensor, augmentation: Augmentation, count: int) -> Iterator[Tensor]:
    """Up to ``count`` other views of a batch (B, C, H, W), of what training does to it: the first is the mirror image,
    if it mirrors, and then, if it cuts out or shifts, come moved ones, every other of them mirrored. How far they are
    moved is random, and the same for the whole batch.
    """
    for number in range(count):
        view = images.flip(-1) if augmentation.flip and number % 2 == 0 else images
        if number == 0 and augmentation.flip:
            yield view
        elif augmentation.moves:
            yield _moved(view)


def _moved(images: Tensor) -> Tensor:
    """Down and to the right by so many pixels, with the outermost ones repeated where nothing is left."""
    height, width = images.shape[2:]
    most = [max(1, size // MOVED) for size in (height, width)]
    down, right = (int(torch.randint(2 * pixels + 1, ())) for pixels in most)
    rows, columns = most
    padded = pad(images, (columns, columns, rows, rows), mode="replicate")
    return padded[:, :, down : down + height, right : right + width]
