"""Export to a smaller cbpq file: the same codes packed densely, or by bits again, and half precision for the floats."""

import dataclasses
from pathlib import Path

import numpy as np

from cbpq.atomic import atomic_write
from cbpq.errors import CbpqError, UsageError
from cbpq.exports import Exported
from cbpq.fileformat import CbpqFile, decode, encode
from cbpq.inspection import sizes_of

_FACTS = ("bits_per_weight", "entropy", "bits_per_parameter")


def export_cbpq(
    file: CbpqFile, out: Path, *, check: bool = True, pack: str | None = None, half: bool = False
) -> Exported:
    """Write ``file`` in another packing, or with the tensors that stay float in half precision.

    Args:
        file: what to write.
        out: where.
        check: read back and compare before ``out`` appears.
        pack: ``dense`` or ``bits``; None leaves every weight as it is packed.
        half: round the floats. What was measured of the network before does not hold for it any more, and stands in
            the file's metrics under ``before_half_precision``.

    Raises:
        UsageError: nothing to do, or an unknown packing.
        CbpqError: ``out`` cannot be written, or what was to be written does not read back equal.
    """
    if pack is None and not half:
        raise UsageError("the file would be the same; give --pack dense, --pack bits or --half")
    smaller = file if pack is None else file.packed_as(pack)
    notes = []
    if half:
        rounded = smaller.halved()
        if any(array is not smaller.others[name] for name, array in rounded.others.items()):
            smaller = dataclasses.replace(rounded, metrics={"before_half_precision": file.metrics})
        kept = sorted(name for name, array in smaller.others.items() if array.dtype == np.float32)
        notes += [f"half precision cannot hold {', '.join(kept)}, which stay in float32"] if kept else []
    content = encode(smaller)
    if check:
        _compare(smaller, decode(content))
    atomic_write(out, content)
    sizes = sizes_of(smaller, len(content))
    parts = {name: sizes[f"{name}_bytes"] for name in ("codes", "scale", "others", "header")}
    return Exported(
        format="cbpq",
        path=out,
        size=len(content),
        float32_size=file.float32_bytes,
        facts={"bytes": parts} | {name: sizes[name] for name in _FACTS},
        notes=tuple(notes),
    )


def _compare(expected: CbpqFile, found: CbpqFile) -> None:
    wanted, state = expected.state(), found.state()
    if wanted.keys() != state.keys() or not all(np.array_equal(array, state[name]) for name, array in wanted.items()):
        raise CbpqError("the file does not read back as it was written; this is a bug in cbpq, please report it")
