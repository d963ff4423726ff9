"""The cbpq file, format versions 1 and 2. This text is the specification; a reader needs nothing else.

**Container.** A cbpq file is a safetensors file. All numbers in it are little-endian.

    8 bytes    N, the length of the header: an unsigned integer, at most 16,777,216
    N bytes    the header: a JSON object in UTF-8 that begins with ``{`` and may end in spaces
    the rest   the buffer: the tensors one after another, without gap or overlap, up to the end of the file

The header maps the name of each tensor to ``{"dtype": …, "shape": […], "data_offsets": [begin, end]}``, with offsets
counted from the start of the buffer. Elements are in row-major order; shape ``[]`` means one element; there are at most
8 dimensions. The dtypes are ``BOOL`` (a byte, 0 or 1), ``U8 U16 U32 U64`` (unsigned), ``I8 I16 I32 I64`` (two's
complement) and ``F16 F32 F64`` (IEEE 754). The header's key ``__metadata__`` is no tensor but an object of strings. Its
string ``cbpq`` is the document; other strings are ignored.

**Document.** JSON text of one object with exactly these keys (line breaks only for this page):

    {"format_version":1,
     "metrics":{"top1":91.5},
     "run":{"seed":0},
     "source":{"architecture":"tiny"},
     "weights":{"fc.weight":{"bits":3,"constraint":"two-bit-shift","denominator":4,
                             "levels":[-4,-2,-1,0,1,2,4],"shape":[2,3]}}}

``metrics``, ``run`` and ``source`` are objects of any content. ``weights`` has an object for each constrained weight,
with exactly the five keys above: ``shape``, 1 to 8 integers from 1 up, output channels first; ``levels``, 2 to 256
integers, ascending, from −2²⁴ to 2²⁴; ``denominator``, an integer from 1 to 2²⁴; ``bits``, ⌈log₂(number of levels)⌉;
``constraint``, a name for people, not empty. A sixth key is there only as *Dense packing* says. In the document and the
header no object has a key twice, and there are no NaNs and no infinities.

**Constrained weights.** For a weight W, C = shape[0] and n = the product of the other dimensions (1 if there are none).

- Tensor ``W.codes``, dtype ``U8``, shape [C, ⌈n·bits/8⌉]. Row c holds, for each weight of output channel c in row-major
  order, its index into ``levels``. Index i occupies the bits i·bits … i·bits + bits − 1 of the row, its least
  significant bit first; bit k of a row is bit k mod 8 of its byte ⌊k/8⌋, where bit 0 of a byte is worth 1. Each index
  is below the number of levels. The padding bits, from n·bits to the end of the row, are zero.
- Tensor ``W.scale``, dtype ``F32``, finite and ≥ 0: shape [] where one scale serves the whole weight, shape [C] where
  each output channel has its own.
- weight = float32(levels[index]) · (scale / float32(denominator)), both operations rounded to float32, and finite.
- There is no tensor named W.

**Dense packing.** A weight whose object has the key ``packing``, always ``"dense"``, differs in ``W.codes`` alone.
``format_version`` is 2 if there is such a weight, else 1. With L levels, a word of B bytes takes k(B) indices, the
largest k with L^k ≤ 256^B. B is that of 1, 2, 3 and 4 with the smallest B/k(B), of equal ones the smallest, and
k = k(B): for 3 levels k = 5 and B = 1, for 5 levels 10 and 3, for 7 levels 11 and 4, for 9 levels 5 and 2. Only a
weight with 8·B < k·bits may be packed like this; so never one of 2, 4 or 16 levels.

- Row c is a sequence of words: ⌊n/k⌋ of k indices and, if r = n mod k is not 0, one of the last r. A word of m indices
  i₀, i₁, … is the integer i₀ + i₁·L + i₂·L² + …, which is below L^m, with its least significant byte first. It has B
  bytes if m = k, else b, the smallest b with L^r ≤ 256^b.
- The shape of ``W.codes`` is [C, ⌊n/k⌋·B + b], with b = 0 if r = 0. There are no padding bits.

**Other tensors.** Every other tensor is an entry of the network's state dict under its own name; all floats are finite.
One that is float32 in the network may be ``F16`` here: its values are then those of the file, exactly.

**Writing.** Equal content gives equal bytes. The document has sorted keys, no white space, and only the escapes that
JSON demands. ``__metadata__`` comes first in the header and holds nothing but ``cbpq``; the tensors follow by dtype
(U64 I64 F64 F32 U32 I32 F16 U16 I16 I8 U8 BOOL), then by the bytes of their names; spaces make N a multiple of 8.

**Versions.** ``format_version`` goes up with every change of what a reader must do. A reader refuses a version that it
does not know before it looks at anything else in the document.

**Example.** The document above with the scales 0.5 and 2 and the codes (−4, 0, 4) and (1, −2, 2), that is the weights
(−0.5, 0, 0.5) and (0.5, −1, 1): the indices are (0, 3, 6) and (4, 1, 5), the rows 0 + 3·2³ + 6·2⁶ = 0x0198 and
4 + 1·2³ + 5·2⁶ = 0x014C; ``fc.weight.codes`` is 98 01 4C 01 and ``fc.weight.scale`` is 00 00 00 3F 00 00 00 40.

A ternary weight of shape [2, 7] that is packed densely has the levels −1, 0, 1 and words of 5 indices in a byte. For
the indices (2, 0, 1, 1, 2, 0, 2) and (0, 1, 2, 0, 1, 1, 1), the words are 2 + 0·3 + 1·9 + 1·27 + 2·81 = 0xC8 and
0 + 2·3 = 0x06, then 0 + 1·3 + 2·9 + 0·27 + 1·81 = 0x66 and 1 + 1·3 = 0x04: ``W.codes`` is C8 06 66 04.
"""

import io
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from cbpq import container
from cbpq.atomic import atomic_write
from cbpq.container import DTYPES, MAX_DIMENSIONS, MAX_HEADER, Flaw
from cbpq.content import CbpqFile, ConstrainedTensor, PackedFile, PackedTensor, step_of
from cbpq.errors import FileFormatError, UsageError
from cbpq.packing import bits_for, dense_word, in_range, pack, unpack

__all__ = [
    "CbpqFile",
    "ConstrainedTensor",
    "PackedFile",
    "PackedTensor",
    "decode",
    "encode",
    "is_cbpq_file",
    "read",
    "read_packed",
    "write",
]

_BITS, _DENSE = 1, 2  # format versions: every weight packed by bits, some densely
_KEYS = {"bits", "constraint", "denominator", "levels", "shape"}
_MAX_INTEGER = 2**24  # every integer up to here is exact in float32
_CHECKED_AT_ONCE = 2**20  # indices


def write(path: Path, file: CbpqFile) -> None:
    """Write ``file`` to ``path``, atomically; the same content gives the same bytes everywhere.

    Raises:
        FileFormatError: content that `read` would refuse; nothing was written.
        CbpqError: the place cannot be written to.
    """
    try:
        data = encode(file)
    except FileFormatError as error:
        raise FileFormatError(f"cannot write {path}: {error}; nothing was written, correct the content") from error
    atomic_write(path, data)


def encode(file: CbpqFile) -> bytes:
    """The bytes of a file with this content.

    Raises:
        FileFormatError: content that `read` would refuse.
    """
    try:
        tensors, text = _encode(file)
        _decode(tensors, text)  # the rules stand in one place: nothing is written that would not be read
        data = save(tensors, {"cbpq": text})
        if int.from_bytes(data[:8], "little") > MAX_HEADER:
            raise Flaw(f"names and metadata take more than {MAX_HEADER} bytes")
    except (Flaw, UsageError) as flaw:
        raise FileFormatError(str(flaw)) from flaw
    return data


def decode(data: bytes) -> CbpqFile:
    """The content of a file with these bytes.

    Raises:
        FileFormatError: they break any rule of this module's text.
    """
    try:
        return _read(io.BytesIO(data)).unpacked()
    except Flaw as flaw:
        raise FileFormatError(f"{flaw}; {flaw.advice}") from flaw


def read(path: Path) -> CbpqFile:
    """Read and check a whole cbpq file.

    Raises:
        UsageError: there is no such file.
        FileFormatError: the file breaks any rule of this module's text, or cannot be read.
    """
    return read_packed(path).unpacked()


def read_packed(path: Path) -> PackedFile:
    """Read and check a whole cbpq file, in little more memory than it takes on the disk.

    Raises:
        UsageError: there is no such file.
        FileFormatError: the file breaks any rule of this module's text, or cannot be read.
    """
    try:
        with container.open_regular(path) as stream:
            return _read(stream)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read ({error.strerror}); check its name and permissions") from error
    except Flaw as flaw:
        raise FileFormatError(f"{path}: {flaw}; {flaw.advice}") from flaw


def is_cbpq_file(path: Path) -> bool:
    """Whether the header of ``path`` is that of a cbpq file of any version. The rest is not looked at; never raises."""
    try:
        with container.open_regular(path) as stream:
            return "cbpq" in container.read_header(stream)[0]
    except (Flaw, OSError):
        return False


def _read(stream: BinaryIO) -> PackedFile:
    metadata, entries, start = container.read_header(stream)
    if "cbpq" not in metadata:
        advice = "`cbpq quantize` makes a cbpq file from a model's weights"
        raise Flaw("this is a plain safetensors file and no cbpq file", advice)
    return _decode(container.read_tensors(stream, entries, start), metadata["cbpq"])


def _encode(file: CbpqFile) -> tuple[dict[str, NDArray[Any]], str]:
    """The tensors and the document of a file. Checks only what its own steps need; the rest is for `_decode`."""
    # np.ascontiguousarray would turn a scalar into a vector
    tensors = {name: np.asarray(array, order="C") for name, array in file.others.items()}
    weights = {}
    for name, tensor in file.constrained.items():
        record: dict[str, Any] = {
            "bits": tensor.bits,
            "constraint": tensor.constraint,
            "denominator": tensor.denominator,
            "levels": list(tensor.levels),
            "shape": list(tensor.codes.shape),
        }
        if tensor.packing != "bits":
            record["packing"] = tensor.packing
        _check_record(name, record)
        weights[name] = record
        table = np.array(tensor.levels)
        codes = tensor.codes.reshape(len(tensor.codes), -1)
        indices = np.minimum(np.searchsorted(table, codes), len(table) - 1).astype(np.uint8)
        if not np.array_equal(table[indices], codes):
            raise Flaw(f"weight {name!r} has a code that is not one of its levels {tensor.levels}")
        scale: NDArray[Any] = np.asarray(tensor.scale, order="C")
        parts = {f"{name}.codes": pack(indices, tensor.word), f"{name}.scale": scale}
        if taken := tensors.keys() & {name, *parts}:
            raise Flaw(f"the name {min(taken)!r} is needed by the weight {name!r} and by another tensor")
        tensors |= parts
    for name, array in tensors.items():
        if name == "__metadata__" or array.dtype.name not in DTYPES.values() or array.ndim > MAX_DIMENSIONS:
            raise Flaw(f"no cbpq file may have such a tensor: {array.dtype} {array.shape}, named {name!r}")
    document = {"format_version": _version(weights), "weights": weights}
    try:
        container.dump(list(tensors))
        return tensors, container.dump(document | {"source": file.source, "run": file.run, "metrics": file.metrics})
    except (TypeError, ValueError, RecursionError) as error:
        raise Flaw(f"names, source, run and metrics must be JSON ({error})") from error


def _version(weights: dict[str, Any]) -> int:
    return _DENSE if any("packing" in record for record in weights.values()) else _BITS


def _decode(tensors: dict[str, NDArray[Any]], text: object) -> PackedFile:
    """The content of a file from its tensors and its document, every rule checked."""
    document = container.parse(text, "its metadata")
    version = document.get("format_version")
    if type(version) is not int or version < 1:
        raise Flaw("its metadata has no usable format_version")
    if version > _DENSE:
        raise Flaw(f"format_version {version} is newer than {_DENSE}, the last one known here", "update cbpq")
    sections = {"source", "run", "metrics", "weights"}
    if document.keys() != {"format_version", *sections} or not all(isinstance(document[key], dict) for key in sections):
        raise Flaw(f"its metadata must be format_version and the objects {', '.join(sorted(sections))}")
    others = dict(tensors)
    constrained = {}
    for name, record in document["weights"].items():
        _check_record(name, record)
        codes, scale = others.pop(f"{name}.codes", None), others.pop(f"{name}.scale", None)
        if codes is None or scale is None or name in tensors:
            raise Flaw(f"weight {name!r} needs its own tensors .codes and .scale, and none by its bare name")
        constrained[name] = _decode_weight(name, record, codes, scale)
    if version != _version(document["weights"]):
        raise Flaw(f"its format_version {version} does not go with how its weights are packed")
    for name, array in others.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Flaw(f"tensor {name!r} has a value that is not finite")
    return PackedFile(constrained, others, document["source"], document["run"], document["metrics"])


def _decode_weight(name: str, record: dict[str, Any], rows: NDArray[Any], scale: NDArray[Any]) -> PackedTensor:
    shape, levels, denominator = record["shape"], record["levels"], record["denominator"]
    packing = record.get("packing", "bits")
    tensor = PackedTensor(rows, tuple(shape), scale, tuple(levels), denominator, record["constraint"], packing)
    # sizes first: nothing is allocated for a shape that the file does not fill
    if rows.dtype != np.uint8 or rows.shape != (shape[0], tensor.word.row_bytes(tensor.count)):
        raise Flaw(f"weight {name!r} of shape {shape} does not fit its codes, {rows.dtype} {rows.shape}")
    if scale.dtype != np.float32 or scale.shape not in ((), (shape[0],)):
        raise Flaw(f"weight {name!r} of shape {shape} does not fit its scale, {scale.dtype} {scale.shape}")
    with np.errstate(over="ignore"):
        largest = step_of(scale, denominator) * np.float32(max(-levels[0], levels[-1]))
    if not (np.isfinite(largest) & (scale >= 0)).all():
        raise Flaw(f"weight {name!r} has a scale that is negative, not finite or too large")
    _check_rows(name, tensor)
    return tensor


def _check_rows(name: str, tensor: PackedTensor) -> None:
    """Refuse bytes that no weight is packed to; a part of the rows at a time, since indices take more than bytes."""
    step = max(1, _CHECKED_AT_ONCE // tensor.count)
    for begin in range(0, len(tensor.rows), step):
        rows = tensor.rows[begin : begin + step]
        if not in_range(rows, tensor.word, tensor.count):
            what = "a word that is too large" if tensor.packing == "dense" else "padding bits that are not zero"
            raise Flaw(f"weight {name!r} has {what}")
        if tensor.word.base == len(tensor.levels):
            continue  # every digit is an index
        most = unpack(rows, tensor.word, tensor.count).max()
        if most >= len(tensor.levels):
            raise Flaw(f"weight {name!r} has the index {most} into a table of {len(tensor.levels)} levels")


def _check_record(name: str, record: object) -> None:
    """Refuse what is no description of a constrained weight."""

    def integers(values: object, low: int, high: float = math.inf) -> bool:
        return isinstance(values, list) and all(type(value) is int and low <= value <= high for value in values)

    if not isinstance(record, dict) or record.keys() - {"packing"} != _KEYS:
        raise Flaw(f"weight {name!r} needs bits, constraint, denominator, levels and shape in the metadata")
    shape, levels = record["shape"], record["levels"]
    valid = {
        "shape": integers(shape, 1) and 1 <= len(shape) <= MAX_DIMENSIONS,
        "levels": integers(levels, -_MAX_INTEGER, _MAX_INTEGER)
        and 2 <= len(levels) <= 256
        and all(low < high for low, high in pairwise(levels)),
        "denominator": integers([record["denominator"]], 1, _MAX_INTEGER),
        "constraint": isinstance(record["constraint"], str) and record["constraint"] != "",
    }
    valid["bits"] = valid["levels"] and integers([record["bits"]], *[bits_for(len(levels))] * 2)
    if "packing" in record:
        valid["packing"] = valid["levels"] and record["packing"] == "dense" and dense_word(len(levels)) is not None
    for key, right in valid.items():
        if not right:
            raise Flaw(f"weight {name!r} has in the metadata an impossible {key}: {record[key]!r}")
