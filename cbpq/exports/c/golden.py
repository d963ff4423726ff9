"""What shows that the generated code computes what the network does: pictures, the network's logits, a program."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cbpq.errors import CbpqError
from cbpq.exports.c import text
from cbpq.inputs import InputSpec
from cbpq.models import logits
from cbpq.synthesis import gaussian_pictures
from cbpq.transforms import Normalize

TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order
_MOST_VALUES = 2**18  # of all pictures together, so that the text stays small


@dataclass(frozen=True, eq=False)
class Golden:
    """``pixels`` uint8 (N, H, W, C), as cameras give them; ``logits`` float32 (N, classes), by PyTorch."""

    pixels: NDArray[np.uint8]
    logits: NDArray[np.float32]


def golden(network: nn.Module, spec: InputSpec) -> Golden:
    """Smooth noise, always the same, and what ``network`` says of it; four pictures, or fewer of large ones.

    Raises:
        CbpqError: the logits are not finite.
    """
    count = max(1, min(4, _MOST_VALUES // (spec.channels * spec.height * spec.width)))
    pixels = gaussian_pictures(count, spec, 0)
    outputs = says(network, pixels, spec)
    if outputs.dim() != 2 or not outputs.isfinite().all():
        raise CbpqError("the network's own logits for pictures of noise are no row of finite numbers; nothing to check")
    return Golden(pixels.permute(0, 2, 3, 1).contiguous().numpy(), outputs.numpy())


def says(network: nn.Module, pixels: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """The logits (N, classes) for uint8 pictures (N, C, H, W), one by one."""
    with torch.no_grad():
        return torch.cat([logits(network(picture)) for picture in Normalize(spec)(pixels).split(1)])


def golden_header(pixels: NDArray[np.uint8], expected: NDArray[np.generic], name: str, tolerance: float | None) -> str:
    """``golden.h``: the pictures, and what is expected of each, as ``golden_NAME``; a tolerance unless it is exact."""
    parts = [
        "/* Seeded pictures of noise and what the original network says of them. */",
        "#include <stdint.h>\n",
        f"#define GOLDEN_COUNT {len(pixels)}",
    ]
    if tolerance is not None:
        parts.append(f"#define GOLDEN_TOLERANCE {tolerance:g} /* of the largest logit */")
    for kind, values in (("pixels", pixels.reshape(len(pixels), -1)), (name, expected)):
        rows = ",\n".join(f"    {{\n{text.wrapped(text.literals(row), 8)}\n    }}" for row in values)
        of = text.TYPES[values.dtype.name]
        parts.append(f"\nstatic const {of} golden_{kind}[{len(values)}][{values.shape[1]}] = {{\n{rows}\n}};")
    return "\n".join(parts) + "\n"
