"""Export to a plain state dict: float32 again, for everything that knows nothing of cbpq.

Names, types and shapes are those of the network's own ``state_dict()``, so ``load_state_dict(strict=True)`` accepts
them; each constrained weight is decoded to the very bits the network computed with, and half precision widened.
"""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbpq.atomic import atomic_write
from cbpq.errors import CbpqError, UsageError
from cbpq.exports import Exported
from cbpq.fileformat import CbpqFile

_NOTE = "float32 weights again: as large as the original network and no faster, but any tool loads them"


def export_state_dict(file: CbpqFile, out: Path, *, check: bool = True) -> Exported:
    """Write every tensor of ``file`` under its state-dict name, read back and compared before ``out`` appears.

    ``out`` ends in ``.pth`` (``torch.save`` of a dict of tensors, read with ``weights_only=True``) or ``.safetensors``.
    Without ``check`` it is not read back.

    Raises:
        UsageError: another extension.
        CbpqError: ``out`` cannot be written, or what was to be written does not read back equal.
    """
    arrays = file.state()
    data, _ = serialized(arrays, out, check=check)
    atomic_write(out, data)
    return Exported(
        format="state-dict",
        path=out,
        size=len(data),
        float32_size=file.float32_bytes,
        facts={"tensors": len(arrays), "decoded": len(file.constrained)},
        notes=(_NOTE,),
    )


def serialized(arrays: Mapping[str, NDArray[Any]], out: Path, *, check: bool) -> tuple[bytes, dict[str, Tensor]]:
    """The content of a state-dict file named ``out``, and with ``check`` what is read back from it, else nothing.

    Raises:
        UsageError: ``out`` has another extension.
        CbpqError: it does not read back equal.
    """
    if out.suffix not in _WRITERS:
        raise UsageError(f"a state dict is written to a file that ends in {' or '.join(_WRITERS)}, not {out.name!r}")
    dump, load = _WRITERS[out.suffix]
    # a copy, because arrays that were read from a file may be read-only, which tensors cannot be; sorted, because equal
    # content in another order gives equal bytes
    data = dump({name: torch.from_numpy(np.array(array)) for name, array in sorted(arrays.items())})
    found = load(data) if check else {}
    if check:
        check_equal(arrays, found)
    return data, found


def _dump_pickle(tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _load_pickle(data: bytes) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return loaded


def _dump_safetensors(tensors: dict[str, Tensor]) -> bytes:
    # transformers, timm and others look for this entry
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


_WRITERS: dict[str, tuple[Callable[[dict[str, Tensor]], bytes], Callable[[bytes], dict[str, Tensor]]]] = {
    ".pth": (_dump_pickle, _load_pickle),
    ".safetensors": (_dump_safetensors, safetensors.torch.load),
}


def check_equal(expected: Mapping[str, NDArray[Any]], found: Mapping[str, Tensor]) -> None:
    """Make sure that tensors are back under their names, bit for bit.

    Raises:
        CbpqError: one is missing, too many or different.
    """
    if found.keys() != expected.keys():
        raise CbpqError(f"the state dict reads back with other names: {sorted(found.keys() ^ expected.keys())[:3]}")
    for name, array in expected.items():
        back = found[name].numpy()
        # bytes, because NaN is not equal to itself
        if (back.dtype, back.shape, back.tobytes()) != (array.dtype, array.shape, array.tobytes()):
            raise CbpqError(f"{name} does not read back as it was written; nothing was written")
