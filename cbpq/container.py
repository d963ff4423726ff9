"""The safetensors container of a cbpq file: its header, its tensors and its JSON, every byte of it distrusted."""

import json
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

MAX_HEADER = 2**24
MAX_DIMENSIONS = 8
DTYPES = {"BOOL": "bool", "F16": "float16", "F32": "float32", "F64": "float64"}
DTYPES |= {f"{kind[0].upper()}{size}": f"{kind}{size}" for kind in ("int", "uint") for size in (8, 16, 32, 64)}
_DAMAGED = "the file is damaged: copy it again, or make it anew with `cbpq quantize`"
_NOT_OURS = "name a file made by `cbpq quantize`, or copy it again if this was one"


class Flaw(Exception):
    """What is wrong with a file or with content to be written, without the file's name."""

    def __init__(self, reason: str, advice: str = _DAMAGED) -> None:
        reason = " ".join(reason.split())  # one line, and not the 16 MB that a hostile name may have
        super().__init__(reason if len(reason) <= 300 else f"{reason[:300]}…")
        self.advice = advice


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; OSError if that fails, `Flaw` if ``path`` is a folder, a pipe or a device."""
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a null byte in the name
        raise FileNotFoundError(str(error)) from error
    if stat.S_ISDIR(mode):
        raise Flaw("is a folder", f"name the file in it, such as {path / 'model.safetensors'}")
    if not stat.S_ISREG(mode):  # a pipe would wait, /dev/zero would never end
        raise Flaw("is no regular file", _NOT_OURS)
    return path.open("rb")


def read_header(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """The metadata strings, and the length in bytes that the whole file should have."""
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise Flaw(f"only {len(prefix)} bytes long" if prefix else "is empty", _NOT_OURS)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise Flaw(f"no cbpq file: its header would have {length} bytes, more than {MAX_HEADER}", _NOT_OURS)
    raw = stream.read(length)
    if len(raw) < length:
        raise Flaw(f"its header should have {length} bytes, but the file ends after {len(raw)}", _NOT_OURS)
    try:
        header = parse(raw.decode(), "its header", _NOT_OURS)
        metadata = header.pop("__metadata__", {})
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if not isinstance(metadata, dict) or not all(isinstance(end, int) for end in ends):
            raise TypeError
    except (UnicodeDecodeError, LookupError, TypeError) as error:
        raise Flaw("its header is not that of a safetensors file", _NOT_OURS) from error
    return metadata, 8 + length + max(ends, default=0)


def read_tensors(data: bytes) -> dict[str, NDArray[Any]]:
    """All tensors of a whole file, in the machine's byte order and writable."""
    try:
        # checks that the tensors, each as long as its shape says, fill the buffer exactly
        entries = deserialize(data)  # type: ignore[no-untyped-call]  # safetensors types only a part of itself
    except SafetensorError as error:
        raise Flaw(f"no sound safetensors file: {str(error).removeprefix('Error while deserializing: ')}") from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES or len(entry["shape"]) > MAX_DIMENSIONS:
            raise Flaw(f"no cbpq file may have such a tensor: {entry['dtype']} {entry['shape']}, named {name!r}")
        dtype = np.dtype(DTYPES[entry["dtype"]])
        if dtype == np.bool_ and max(entry["data"], default=0) > 1:
            raise Flaw(f"tensor {name!r} has booleans other than 0 and 1")
        array = np.frombuffer(entry["data"], dtype.newbyteorder("<")).astype(dtype)
        try:
            tensors[name] = array.reshape(entry["shape"])
        except (ValueError, OverflowError) as error:  # [0, 2**63] is an empty tensor to safetensors, but not to numpy
            raise Flaw(f"no machine could index the shape {entry['shape']} of tensor {name!r}") from error
    return tensors


def dump(value: object) -> str:
    """Canonical JSON text. Raises TypeError, ValueError or RecursionError for what is not JSON, such as NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    text.encode()  # raises for half a surrogate pair
    return text


def parse(text: object, what: str, advice: str = _DAMAGED) -> dict[str, Any]:
    """One JSON object, no key twice, nothing in it that `dump` would refuse."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(keys := dict(pairs)) < len(pairs):
            raise ValueError("a key appears twice")
        return keys

    try:
        if not isinstance(text, str) or not text.startswith("{"):
            raise ValueError("it must be an object")
        parsed: dict[str, Any] = json.loads(text, object_pairs_hook=unique)
        dump(parsed)  # 1e999 is infinite only after parsing
    except (ValueError, RecursionError) as error:
        raise Flaw(f"{what} is not valid JSON ({error})", advice) from error
    return parsed
