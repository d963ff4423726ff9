"""Pictures to run an export with, and how well two networks agree on them."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cbpq.data import EvalLoader, load_data
from cbpq.errors import UsageError
from cbpq.inputs import InputSpec
from cbpq.pictures import NO_LABEL
from cbpq.synthesis import SynthesisChoices, remembering, synthesize, to_bytes

PICTURES = 256  # to calibrate with
_SYNTHESISED = 64
_MOST_VALIDATED = 2000


@dataclass(frozen=True)
class Pictures:
    """``calibration`` uint8 (N, C, H, W), and if there are labels ``validation`` of them with ``labels`` (M,)."""

    calibration: Tensor
    validation: Tensor | None
    labels: Tensor | None
    note: str


def pictures(
    data: str | None, network: nn.Module, spec: InputSpec, classes: int, class_map: Path | None = None
) -> Pictures:
    """From ``data`` and ``class_map``, as ``cbpq.data.load_data`` takes them, or made of the network alone.

    Raises:
        UsageError: a class map without data.
        CbpqError: the data cannot be used.
    """
    if data is None:
        if class_map is not None:
            raise UsageError("a class map says which classes data have; give --data as well, or leave it out")
        choices = replace(SynthesisChoices.for_input(spec), count=_SYNTHESISED, batch_size=_SYNTHESISED)
        kind = "synthesised pictures" if remembering(network) else "pictures of noise"
        note = f"the ranges of the activations are those on {_SYNTHESISED} {kind}; give --data for real ones"
        return Pictures(synthesize(network, spec, classes, choices), None, None, note)
    opened = load_data(data, spec, classes, batch_size=64, calibration=PICTURES, class_map=class_map)
    chosen, _ = _read(opened.calibration or opened.val, spec, PICTURES)
    if not opened.val_labelled:
        return Pictures(chosen, None, None, "")
    images, labels = _read(opened.val, spec, _MOST_VALIDATED)
    return Pictures(chosen, images, labels, "")


def _read(loader: EvalLoader, spec: InputSpec, most: int) -> tuple[Tensor, Tensor]:
    """At most so many pictures of a loader, spread over all of it."""
    every = max(1, -(-loader.images // most))
    parts, labels = list[Tensor](), list[Tensor]()
    for batch in loader:
        parts.append(to_bytes(batch.images[::every], spec))
        labels.append(batch.labels[::every])
    return torch.cat(parts)[:most], torch.cat(labels)[:most]


def agreement(first: Tensor, second: Tensor) -> float:
    """In percent, how often two (N, classes) say the same class."""
    return float((first.argmax(1) == second.argmax(1)).double().mean() * 100)


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Top-1 of (N, classes) in percent."""
    known = labels != NO_LABEL
    return float((outputs.argmax(1) == labels)[known].double().mean() * 100)
