"""What is in a cbpq file: codes, levels, scales and sizes of every layer. NumPy only, no torch and no data needed."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbpq.fileformat import CbpqFile, ConstrainedTensor, read


@dataclass(frozen=True)
class LayerInspection:
    """One constrained weight. Shares are from 0 to 1, entropy in bits per weight.

    ``counts`` is the histogram of the codes, in the order of ``codes``; level = code / denominator.
    ``bits`` is the width of an index into the levels and ``packing`` how indices are stored; ``bits_per_weight`` is
    what the codes take in the file, padding included.
    """

    name: str
    constraint: str
    shape: tuple[int, ...]
    parameters: int
    codes: tuple[int, ...]
    denominator: int
    counts: tuple[int, ...]
    bits: int
    packing: str
    bits_per_weight: float
    zeros: float
    entropy: float
    scales: int
    scale_per: str
    scale_min: float
    scale_max: float
    codes_bytes: int
    entropy_bytes: int


@dataclass(frozen=True)
class Inspection:
    """The content of a cbpq file in numbers; ``source``, ``run`` and ``metrics`` are as the file has them.

    ``sizes`` are those of ``sizes_of``.
    """

    path: str
    layers: tuple[LayerInspection, ...]
    sizes: dict[str, float]
    source: dict[str, Any]
    run: dict[str, Any]
    metrics: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def inspect_file(path: str | Path) -> Inspection:
    """Read a cbpq file and describe it.

    Raises:
        UsageError: there is no such file.
        FileFormatError: it is damaged, or no cbpq file.
    """
    path = Path(path)
    file = read(path)
    layers = tuple(_layer(name, tensor) for name, tensor in sorted(file.constrained.items(), key=_in_order))
    return Inspection(
        path=str(path),
        layers=layers,
        sizes=sizes_of(file, path.stat().st_size),
        source=file.source,
        run=file.run,
        metrics=file.metrics,
    )


def _in_order(item: tuple[str, ConstrainedTensor]) -> list[tuple[bool, int, str]]:
    """Sort by name with numbers by their value: layer10 comes after layer2."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", item[0])]


def _layer(name: str, tensor: ConstrainedTensor) -> LayerInspection:
    parameters = tensor.codes.size
    return LayerInspection(
        name=name,
        constraint=tensor.constraint,
        shape=tensor.codes.shape,
        parameters=parameters,
        codes=tensor.levels,
        denominator=tensor.denominator,
        counts=tensor.histogram,
        bits=tensor.bits,
        packing=tensor.packing,
        bits_per_weight=8 * tensor.packed_bytes / parameters,
        zeros=tensor.sparsity,
        entropy=tensor.entropy,
        scales=tensor.scale.size,
        scale_per="channel" if tensor.scale.ndim else "layer",
        scale_min=float(tensor.scale.min()),
        scale_max=float(tensor.scale.max()),
        codes_bytes=tensor.packed_bytes,
        entropy_bytes=round(tensor.entropy * parameters / 8),
    )


def sizes_of(file: CbpqFile, file_bytes: int) -> dict[str, float]:
    """Bytes before and after.

    ``float32_bytes`` (the whole state dict, all floats in FP32), ``file_bytes`` and its parts: ``codes_bytes``,
    ``scale_bytes``, ``others_bytes`` (all that is not constrained) and ``header_bytes``; ``entropy_bytes`` (the codes,
    if each took its layer's entropy), ``bits_per_weight`` and ``entropy`` (means over the constrained weights, padding
    included), ``bits_per_parameter`` (of the whole file, for each floating-point number of the network),
    ``constrained_share`` (of these numbers, 0 to 1) and ``half_share`` (of those that stay float, in float16).
    """
    tensors = file.constrained.values()
    weights = sum(tensor.codes.size for tensor in tensors)
    floats = [array for array in file.others.values() if array.dtype.kind == "f"]
    others = sum(array.nbytes for array in file.others.values())
    codes = sum(tensor.packed_bytes for tensor in tensors)
    scales = sum(tensor.scale.nbytes for tensor in tensors)
    entropy = sum(tensor.entropy * tensor.codes.size for tensor in tensors)
    left = sum(array.size for array in floats)
    halves = sum(array.size for array in floats if array.dtype.itemsize == 2)
    return {
        "float32_bytes": file.float32_bytes,
        "file_bytes": file_bytes,
        "codes_bytes": codes,
        "scale_bytes": scales,
        "others_bytes": others,
        "header_bytes": file_bytes - codes - scales - others,
        "entropy_bytes": round(entropy / 8),
        "bits_per_weight": 8 * codes / weights if weights else 0.0,
        "entropy": entropy / weights if weights else 0.0,
        "bits_per_parameter": 8 * file_bytes / (weights + left) if weights + left else 0.0,
        "constrained_share": weights / (weights + left) if weights else 0.0,
        "half_share": halves / left if left else 0.0,
    }
