"""The safetensors container of a cbpq file: its header, its tensors and its JSON, every byte of it distrusted."""

import json
import math
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

MAX_HEADER = 2**24
MAX_DIMENSIONS = 8
MOST_NESTED = 100  # objects and lists in one another; what recurses over metadata can rely on it
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


def read_header(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The metadata strings, the header's unchecked entries by name, and where the buffer begins."""
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
    except UnicodeDecodeError as error:
        raise Flaw("its header is not that of a safetensors file", _NOT_OURS) from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise Flaw("its header is not that of a safetensors file", _NOT_OURS)
    return metadata, header, 8 + length


def read_tensors(stream: BinaryIO, entries: dict[str, Any], start: int) -> dict[str, NDArray[Any]]:
    """All tensors, in the machine's byte order and writable; ``entries`` and ``start`` are those of `read_header`.

    They are read one by one, so that no more is in memory than they take.
    """
    places = {name: _place(name, entry) for name, entry in entries.items()}
    position = 0
    for name, (_, _, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise Flaw(f"tensor {name!r} begins at byte {begin} of the buffer, where {position} was due")
        position = end
    actual = stream.seek(0, 2)
    if actual != start + position:
        raise Flaw(f"{actual} bytes long where its header promises {start + position}")
    tensors = {}
    for name, (dtype, shape, begin, end) in places.items():
        stream.seek(start + begin)
        data = np.empty(end - begin, dtype=np.uint8)
        if stream.readinto(data) != len(data):  # type: ignore[attr-defined]  # BinaryIO's class has no such method
            raise Flaw(f"ends within tensor {name!r}")
        if dtype == np.bool_ and (data > 1).any():
            raise Flaw(f"tensor {name!r} has booleans other than 0 and 1")
        array = data.view(dtype.newbyteorder("<")).astype(dtype, copy=False)
        try:
            tensors[name] = array.reshape(shape)
        except (ValueError, OverflowError) as error:  # [0, 2**63] is an empty tensor, but not to numpy
            raise Flaw(f"no machine could index the shape {shape} of tensor {name!r}") from error
    return tensors


def _place(name: str, entry: object) -> tuple[np.dtype[Any], list[int], int, int]:
    """Type, shape and place in the buffer of a tensor, its size checked."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Flaw(f"tensor {name!r} needs dtype, shape and data_offsets in the header", _NOT_OURS)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise Flaw(f"tensor {name!r} has a shape or data_offsets that are no lists of whole numbers", _NOT_OURS)
    if not isinstance(dtype, str) or dtype not in DTYPES or len(shape) > MAX_DIMENSIONS:
        raise Flaw(f"no cbpq file may have such a tensor: {dtype} {shape}, named {name!r}")
    kind = np.dtype(DTYPES[dtype])
    if len(offsets) != 2 or offsets[1] - offsets[0] != kind.itemsize * math.prod(shape):
        raise Flaw(f"tensor {name!r} of shape {shape} does not fit its data_offsets {offsets}")
    return kind, shape, offsets[0], offsets[1]


def dump(value: object) -> str:
    """Canonical JSON text. Raises TypeError, ValueError or RecursionError for what is not JSON, such as NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    text.encode()  # raises for half a surrogate pair
    return text


def _check_nesting(value: dict[str, Any] | list[Any], most: int) -> None:
    if not most:
        raise ValueError(f"it is nested more than {MOST_NESTED} deep")
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            _check_nesting(item, most - 1)


def parse(text: object, what: str, advice: str = _DAMAGED) -> dict[str, Any]:
    """One JSON object, no key twice, nothing in it that `dump` would refuse, nor deeper than MOST_NESTED."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(keys := dict(pairs)) < len(pairs):
            raise ValueError("a key appears twice")
        return keys

    try:
        if not isinstance(text, str) or not text.startswith("{"):
            raise ValueError("it must be an object")
        parsed: dict[str, Any] = json.loads(text, object_pairs_hook=unique)
        _check_nesting(parsed, MOST_NESTED)
        dump(parsed)  # 1e999 is infinite only after parsing
    except (ValueError, RecursionError) as error:
        raise Flaw(f"{what} is not valid JSON ({error})", advice) from error
    return parsed
