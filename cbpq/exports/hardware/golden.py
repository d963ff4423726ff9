"""Golden vectors: pictures, what each layer makes of them, and the logits, to check an implementation with."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cbpq.exports.hardware.layers import Layer
from cbpq.inputs import InputSpec
from cbpq.models import logits
from cbpq.transforms import Normalize
from cbpq.uses import Use, watching

MOST_PICTURES = 4
_MOST_VALUES = 2**22  # of all layers' outputs together: 16 MiB, or one picture


@torch.no_grad()
def golden(network: nn.Module, layers: Sequence[Layer], pixels: Tensor, spec: InputSpec) -> bytes:
    """A ``.npz`` file of the first of some pictures, uint8 (N, C, H, W); the same ones give the same bytes.

    ``pixels`` (N, C, H, W) are the pictures, ``input`` is what the network is fed, normalised; ``logits`` (N, classes)
    what it says. ``outputs/NAME`` is what the layer NAME (of the weight NAME.weight) gives, bias included, before
    BatchNorm and activation; for its second use in a forward pass ``outputs/NAME@2``. All but the pixels are float32.
    The first axis is the pictures, but for layers that see windows of a picture as a batch. Read it with
    ``numpy.load``; other arithmetic rounds otherwise, so compare with a tolerance.
    """
    values = sum(layer.outputs for layer in layers)
    chosen = pixels[: max(1, min(MOST_PICTURES, _MOST_VALUES // max(1, values)))]
    images = Normalize(spec)(chosen)
    names, parameters = {layer.weight: layer.name for layer in layers}, dict(network.named_parameters())
    arrays = {"pixels": chosen.numpy(), "input": images.numpy()}

    def note(name: str, use: Use) -> None:
        key, count = f"outputs/{names[name]}", 1
        while (key if count == 1 else f"{key}@{count}") in arrays:
            count += 1
        output = use.multiply(parameters[name], use.bias)  # once more: what follows may write into the network's own
        arrays[key if count == 1 else f"{key}@{count}"] = output.numpy()

    with watching(network, list(names), note):
        network(images)
    arrays["logits"] = logits(network(images)).numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy's own type wants the arrays one by one
    return buffer.getvalue()
