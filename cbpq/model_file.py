"""A network into a cbpq file, and back."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cbpq.constrained import Constrained
from cbpq.errors import CbpqError, UsageError
from cbpq.fileformat import CbpqFile, read, read_packed, write
from cbpq.models import LoadedModel, SourceInfo, from_cbpq_file


def save(
    path: str | Path,
    constrained: Constrained,
    source: SourceInfo | None = None,
    *,
    run: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    packing: str = "bits",
    half: bool = False,
) -> None:
    """Write a constrained network to a cbpq file, atomically, and make sure that it decodes to the very same bits.

    Nothing in the file tells when, where or how fast it was made: equal networks, equal bytes.

    Args:
        path: the file; replaced if it is there.
        constrained: from ``constrain``; the file holds the nearest levels of its latent weights.
        source: what the network is, ``load_model(…).info``. Without it the file can be inspected and exported, but not
            loaded as a network, since it does not say which.
        run: how it was made, JSON values; by default constraint, method and settings.
        metrics: how good it is, JSON values.
        packing: ``dense`` stores several codes as one number where that takes less: ternary weights in 1.6 bits each,
            five levels in 2.4, seven in 2.91.
        half: the tensors that stay float in half precision, except for those with a value that it cannot hold. They
            are rounded for that; what is loaded from the file differs from ``constrained.model`` by as much.

    Raises:
        UsageError: no such packing.
        CbpqError: the place cannot be written to, or the network holds values that are not finite.
    """
    made = {
        "constraint": constrained.level_set.name,
        "method": constrained.method.name,
        "settings": constrained.settings.to_dict(),
    }
    with constrained.projected():
        network = constrained.model.state_dict()
        state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in network.items()}
    tensors = constrained.tensors()
    others = {name: tensor.numpy() for name, tensor in state.items() if name not in tensors}
    information = source.to_dict() if source else {}
    content = CbpqFile(tensors, others, information, dict(run or made), dict(metrics or {})).packed_as(packing)
    if half:
        content = content.halved()
        state |= {name: torch.from_numpy(array) for name, array in content.state().items() if name in others}
    write(Path(path), content)
    decoded = read(Path(path)).state()
    for name, tensor in state.items():
        if not torch.equal(torch.from_numpy(decoded[name].copy()).to(tensor.dtype), tensor):
            raise CbpqError(
                f"{path}: {name} does not decode to the trained weight; this is a bug in cbpq, please report it"
            )


@torch.no_grad()
def halve(network: nn.Module, constrained: Collection[str]) -> list[str]:
    """Round the tensors of a network that stay float to half precision, as ``save(…, half=True)`` does.

    Returns:
        Names of those that are left as they are, because they have a value that half precision cannot hold.
    """
    left = []
    for name, tensor in network.state_dict().items():
        if name not in constrained and tensor.dtype == torch.float32:
            half = tensor.half()
            if half.isfinite().all():
                tensor.copy_(half)
            else:
                left.append(name)
    return left


def load(path: str | Path | CbpqFile, *, arch: str | None = None, packed: bool = False) -> LoadedModel:
    """The network of a cbpq file, on the CPU and in evaluation mode: ``load(path).model``.

    Its weights are decoded bit for bit to those at the end of training; ``preprocess`` makes its input of a picture.

    Args:
        path: the file, or what was read from one.
        arch: for a network made by the user's own code, ``package.module:function`` again as the file names it, because
            loading means running that code.
        packed: keep the weights in memory as they are in the file. Each is decoded when its layer runs, which takes
            time, and gives the same logits, bit for bit, as the plain network gives under ``torch.no_grad()``. Such a
            network only predicts. It can be moved and copied; its ``state_dict()`` is the plain network's.

    Raises:
        UsageError: no such file, ``arch`` is missing or contradicts the file, or ``packed`` without a path.
        FileFormatError: a damaged file, or no cbpq file.
        SourceError: the network cannot be built here.
    """
    if isinstance(path, CbpqFile):
        if packed:
            raise UsageError("a network is kept packed as its file has it; give the path of the file")
        return from_cbpq_file(path, arch)
    return from_cbpq_file(read_packed(Path(path)) if packed else read(Path(path)), arch)
