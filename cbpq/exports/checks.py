"""What an exported file has to pass in the reader it is meant for: the logits of the network."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cbpq.errors import CbpqError, brief
from cbpq.inputs import InputSpec
from cbpq.models import logits

TOLERANCE = 1e-3  # of the largest logit: float32 sums in another order reach 1e-5 in deep networks
Runs = Callable[[Tensor], Tensor | NDArray[Any]]  # (B, C, H, W) to logits (B, classes)


def compare_logits(
    reader: str,
    load: Callable[[], Runs],
    network: nn.Module,
    spec: InputSpec,
    *,
    advice: str = "export as state-dict instead",
    batches: Sequence[int] = (1, 3),
) -> dict[str, Any]:
    """Run what a reader makes of an export beside the network, on seeded random pictures.

    Args:
        reader: its name and version, for messages.
        load: reads the export and returns what runs it.
        network: in evaluation mode, on the CPU.
        spec: what the pictures look like.
        advice: what to do where the logits differ.
        batches: how many pictures at a time.

    Returns:
        ``max_difference`` and ``max_logit``, absolute, and ``top1_agreement``, 0 to 1.

    Raises:
        CbpqError: the reader fails, or its logits differ by more than ``TOLERANCE`` times the largest.
    """
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (spec.mean, spec.std))
    sizes = [(batch, spec.channels, spec.height, spec.width) for batch in batches]
    pictures = [(torch.rand(size, generator=generator) - mean) / std for size in sizes]
    with torch.no_grad():
        ours = np.concatenate([logits(network(images)).numpy() for images in pictures])
        if not np.isfinite(ours).all():
            raise CbpqError(
                "the network's own logits for random pictures are not finite; nothing can be compared with them"
            )
        try:
            run = load()
            theirs = np.concatenate([np.asarray(run(images)) for images in pictures])
        except Exception as error:  # readers' own exceptions have no common base
            raise CbpqError(f"{reader} rejects the network: {brief(error)}") from error
    if theirs.shape != ours.shape:
        raise CbpqError(f"{reader} gives logits of the shape {theirs.shape} where torch gives {ours.shape}; {advice}")
    difference, largest = float(np.abs(theirs - ours).max()), float(np.abs(ours).max())
    if not difference <= TOLERANCE * largest:  # also when the difference is NaN
        raise CbpqError(
            f"{reader} computes other logits than torch: they differ by {difference:.3g}, and the largest is "
            f"{largest:.3g}; {advice}"
        )
    agreement = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
    return {"max_difference": difference, "max_logit": largest, "top1_agreement": agreement}
