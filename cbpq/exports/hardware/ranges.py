"""How large the inputs of layers and their sums become on pictures."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cbpq.errors import CbpqError
from cbpq.exports.hardware.layers import Layer
from cbpq.exports.hardware.widths import INPUT_BITS, integer_bits, signed_bits
from cbpq.models import logits
from cbpq.uses import Use, watching


@dataclass(frozen=True)
class Ranges:
    """What was seen of one layer.

    Attributes:
        input_min: the smallest input.
        input_max: the largest.
        input_integer_bits: that fixed-point inputs need before the binary point, see ``widths.integer_bits``.
        accumulator_bits_seen: that the finished sums of codes times inputs took, the inputs as integers of
            ``INPUT_BITS`` whose largest magnitude is the largest seen, not rounded. None for float layers.
    """

    input_min: float
    input_max: float
    input_integer_bits: int
    accumulator_bits_seen: int | None


@torch.no_grad()
def observed(
    network: nn.Module, layers: Sequence[Layer], batches: Iterable[Tensor]
) -> tuple[dict[str, Ranges], Tensor]:
    """The ranges of each layer by its weight's name, and the logits (N, classes), for normalised pictures.

    Raises:
        CbpqError: some of these are not finite.
    """
    extremes = {layer.weight: [math.inf, -math.inf, 0.0] for layer in layers}
    codes = {
        layer.weight: torch.from_numpy(layer.tensor.codes.astype("float32"))
        for layer in layers
        if layer.tensor is not None
    }

    def note(name: str, use: Use) -> None:
        low, high = float(use.input.min()), float(use.input.max())
        largest = float(use.multiply(codes[name], None).abs().max()) if name in codes else 0.0
        if not math.isfinite(low + high + largest):
            raise CbpqError(f"the inputs of {name} are not finite for some pictures; is the network damaged?")
        before = extremes[name]
        extremes[name] = [min(low, before[0]), max(high, before[1]), max(largest, before[2])]

    with watching(network, list(extremes), note):
        scores = torch.cat([logits(network(batch)) for batch in batches])
    if not scores.isfinite().all():
        raise CbpqError("the network's logits are not finite for some pictures; is it damaged?")
    return {name: _ranges(*found, constrained=name in codes) for name, found in extremes.items()}, scores


def _ranges(low: float, high: float, largest: float, *, constrained: bool) -> Ranges:
    unit = max(abs(low), abs(high)) / (2 ** (INPUT_BITS - 1) - 1)
    most = math.ceil(largest / unit) if unit else 0
    return Ranges(low, high, integer_bits(low, high), signed_bits(-most, most) if constrained else None)
