"""A network into a cbpq file, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cbpq.constrained import Constrained
from cbpq.errors import CbpqError
from cbpq.fileformat import CbpqFile, read, write
from cbpq.models import LoadedModel, SourceInfo, from_cbpq_file


def save(
    path: str | Path,
    constrained: Constrained,
    source: SourceInfo | None = None,
    *,
    run: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
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

    Raises:
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
    write(Path(path), CbpqFile(tensors, others, information, dict(run or made), dict(metrics or {})))
    content = read(Path(path))
    decoded = {name: tensor.weight() for name, tensor in content.constrained.items()} | content.others
    for name, tensor in state.items():
        if not torch.equal(torch.from_numpy(decoded[name].copy()), tensor):
            raise CbpqError(
                f"{path}: {name} does not decode to the trained weight; this is a bug in cbpq, please report it"
            )


def load(path: str | Path | CbpqFile, *, arch: str | None = None) -> LoadedModel:
    """The network of a cbpq file, on the CPU and in evaluation mode: ``load(path).model``.

    Its weights are decoded bit for bit to those at the end of training; ``info.input_spec`` says how to feed it.

    Args:
        path: the file, or what was read from one.
        arch: for a network made by the user's own code, ``package.module:function`` again as the file names it, because
            loading means running that code.

    Raises:
        UsageError: no such file, or ``arch`` is missing or contradicts the file.
        FileFormatError: a damaged file, or no cbpq file.
        SourceError: the network cannot be built here.
    """
    return from_cbpq_file(path if isinstance(path, CbpqFile) else read(Path(path)), arch)
