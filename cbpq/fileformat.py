"""The cbpq file, format version 1. This text is the specification; a reader needs nothing else.

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
``constraint``, a name for people, not empty. In the document and the header no object has a key twice, and there are
no NaNs and no infinities.

**Constrained weights.** For a weight W, C = shape[0] and n = the product of the other dimensions (1 if there are none).

- Tensor ``W.codes``, dtype ``U8``, shape [C, ⌈n·bits/8⌉]. Row c holds, for each weight of output channel c in row-major
  order, its index into ``levels``. Index i occupies the bits i·bits … i·bits + bits − 1 of the row, its least
  significant bit first; bit k of a row is bit k mod 8 of its byte ⌊k/8⌋, where bit 0 of a byte is worth 1. Each index
  is below the number of levels. The padding bits, from n·bits to the end of the row, are zero.
- Tensor ``W.scale``, dtype ``F32``, finite and ≥ 0: shape [] where one scale serves the whole weight, shape [C] where
  each output channel has its own.
- weight = float32(levels[index]) · (scale / float32(denominator)), both operations rounded to float32, and finite.
- There is no tensor named W.

**Other tensors.** Every other tensor is an entry of the network's state dict under its own name; all floats are finite.

**Writing.** Equal content gives equal bytes. The document has sorted keys, no white space, and only the escapes that
JSON demands. ``__metadata__`` comes first in the header and holds nothing but ``cbpq``; the tensors follow by dtype
(U64 I64 F64 F32 U32 I32 F16 U16 I16 I8 U8 BOOL), then by the bytes of their names; spaces make N a multiple of 8.

**Versions.** ``format_version`` goes up with every change of what a reader must do. A reader refuses a version that it
does not know before it looks at anything else in the document.

**Example.** The document above with the scales 0.5 and 2 and the codes (−4, 0, 4) and (1, −2, 2), that is the weights
(−0.5, 0, 0.5) and (0.5, −1, 1): the indices are (0, 3, 6) and (4, 1, 5), the rows 0 + 3·2³ + 6·2⁶ = 0x0198 and
4 + 1·2³ + 5·2⁶ = 0x014C; ``fc.weight.codes`` is 98 01 4C 01 and ``fc.weight.scale`` is 00 00 00 3F 00 00 00 40.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from cbpq import container
from cbpq.atomic import atomic_write
from cbpq.container import DTYPES, MAX_DIMENSIONS, MAX_HEADER, Flaw
from cbpq.errors import FileFormatError, UsageError
from cbpq.packing import bits_for, pack, padding_is_zero, row_bytes, unpack

FORMAT_VERSION = 1
_MAX_INTEGER = 2**24  # every integer up to here is exact in float32


@dataclass(frozen=True, eq=False)
class ConstrainedTensor:
    """One constrained weight. Shapes: ``codes`` as the weight, output channels (C) first; ``scale`` () or (C,)."""

    codes: NDArray[np.signedinteger[Any]]  #: read from a file: int8 where the levels fit, else int32
    scale: NDArray[np.float32]
    levels: tuple[int, ...]  #: the codes that may occur, ascending
    denominator: int
    constraint: str

    def weight(self) -> NDArray[np.float32]:
        """The constrained weight, code · (scale / denominator) in float32, in the shape of ``codes``."""
        step = self.step
        if self.scale.ndim:
            step = step.reshape(-1, *[1] * (self.codes.ndim - 1))
        return np.asarray(self.codes.astype(np.float32) * step)

    @property
    def step(self) -> NDArray[np.float32]:
        """What 1 is worth in the codes, of shape () or (C,)."""
        return np.asarray(self.scale / np.float32(self.denominator))

    @property
    def bits(self) -> int:
        """Bits that one weight takes in the file."""
        return bits_for(len(self.levels))

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed codes, padding included, without the scale."""
        return len(self.codes) * row_bytes(self.codes[0].size, self.bits)

    @property
    def histogram(self) -> tuple[int, ...]:
        """How many weights have each level, in the order of ``levels``."""
        return tuple(int(np.count_nonzero(self.codes == level)) for level in self.levels)

    @property
    def terms(self) -> int:
        """How many powers of two the codes are sums of, all weights together: none for 0, one for −4, two for 3."""
        return sum(abs(level).bit_count() * count for level, count in zip(self.levels, self.histogram, strict=True))

    @property
    def sparsity(self) -> float:
        """Share of weights that are zero, 0 to 1."""
        return 1 - np.count_nonzero(self.codes) / self.codes.size

    @property
    def entropy(self) -> float:
        """Shannon entropy of the codes in bits per weight: what ideal compression of each code by itself would take."""
        shares = [count / self.codes.size for count in self.histogram if count]
        return abs(sum(share * math.log2(share) for share in shares))


@dataclass(frozen=True, eq=False)
class CbpqFile:
    """The content of a cbpq file. The JSON objects hold nothing that differs between equal runs: no times, no paths."""

    constrained: dict[str, ConstrainedTensor]  #: by state-dict name
    others: dict[str, NDArray[Any]]  #: every other entry of the state dict
    source: dict[str, Any]
    run: dict[str, Any]
    metrics: dict[str, Any]


def write(path: Path, file: CbpqFile) -> None:
    """Write ``file`` to ``path``, atomically; the same content gives the same bytes everywhere.

    Raises:
        FileFormatError: content that `read` would refuse; nothing was written.
        CbpqError: the place cannot be written to.
    """
    try:
        tensors, text = _encode(file)
        _decode(tensors, text)  # the rules stand in one place: nothing is written that would not be read
        data = save(tensors, {"cbpq": text})
        if int.from_bytes(data[:8], "little") > MAX_HEADER:
            raise Flaw(f"names and metadata take more than {MAX_HEADER} bytes")
    except (Flaw, UsageError) as flaw:
        raise FileFormatError(f"cannot write {path}: {flaw}; nothing was written, correct the content") from flaw
    atomic_write(path, data)


def read(path: Path) -> CbpqFile:
    """Read and check a whole cbpq file.

    Raises:
        UsageError: there is no such file.
        FileFormatError: the file breaks any rule of this module's text, or cannot be read.
    """
    try:
        with container.open_regular(path) as stream:
            metadata, size = container.read_header(stream)
            if "cbpq" not in metadata:
                advice = "`cbpq quantize` makes a cbpq file from a model's weights"
                raise Flaw("this is a plain safetensors file and no cbpq file", advice)
            actual = stream.seek(0, 2)
            if actual != size:
                raise Flaw(f"{actual} bytes long where its header promises {size}")
            stream.seek(0)
            data = stream.read()
        return _decode(container.read_tensors(data), metadata["cbpq"])
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
        _check_record(name, record)
        weights[name] = record
        table = np.array(tensor.levels)
        codes = tensor.codes.reshape(len(tensor.codes), -1)
        indices = np.minimum(np.searchsorted(table, codes), len(table) - 1).astype(np.uint8)
        if not np.array_equal(table[indices], codes):
            raise Flaw(f"weight {name!r} has a code that is not one of its levels {tensor.levels}")
        scale: NDArray[Any] = np.asarray(tensor.scale, order="C")
        parts = {f"{name}.codes": pack(indices, tensor.bits), f"{name}.scale": scale}
        if taken := tensors.keys() & {name, *parts}:
            raise Flaw(f"the name {min(taken)!r} is needed by the weight {name!r} and by another tensor")
        tensors |= parts
    for name, array in tensors.items():
        if name == "__metadata__" or array.dtype.name not in DTYPES.values() or array.ndim > MAX_DIMENSIONS:
            raise Flaw(f"no cbpq file may have such a tensor: {array.dtype} {array.shape}, named {name!r}")
    document = {"format_version": FORMAT_VERSION, "weights": weights}
    try:
        container.dump(list(tensors))
        return tensors, container.dump(document | {"source": file.source, "run": file.run, "metrics": file.metrics})
    except (TypeError, ValueError, RecursionError) as error:
        raise Flaw(f"names, source, run and metrics must be JSON ({error})") from error


def _decode(tensors: dict[str, NDArray[Any]], text: object) -> CbpqFile:
    """The content of a file from its tensors and its document, every rule checked."""
    document = container.parse(text, "its metadata")
    version = document.get("format_version")
    if type(version) is not int or version < 1:
        raise Flaw("its metadata has no usable format_version")
    if version != FORMAT_VERSION:
        raise Flaw(f"format_version {version} is newer than {FORMAT_VERSION}, the last one known here", "update cbpq")
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
    for name, array in others.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Flaw(f"tensor {name!r} has a value that is not finite")
    return CbpqFile(constrained, others, document["source"], document["run"], document["metrics"])


def _decode_weight(name: str, record: dict[str, Any], packed: NDArray[Any], scale: NDArray[Any]) -> ConstrainedTensor:
    shape, levels, bits, denominator = record["shape"], record["levels"], record["bits"], record["denominator"]
    rows, count = shape[0], math.prod(shape[1:])
    # sizes first: nothing is allocated for a shape that the file does not fill
    if packed.dtype != np.uint8 or packed.shape != (rows, row_bytes(count, bits)):
        raise Flaw(f"weight {name!r} of shape {shape} does not fit its codes, {packed.dtype} {packed.shape}")
    if scale.dtype != np.float32 or scale.shape not in ((), (rows,)):
        raise Flaw(f"weight {name!r} of shape {shape} does not fit its scale, {scale.dtype} {scale.shape}")
    with np.errstate(over="ignore"):
        largest = scale / np.float32(denominator) * np.float32(max(-levels[0], levels[-1]))
    if not (np.isfinite(largest) & (scale >= 0)).all():
        raise Flaw(f"weight {name!r} has a scale that is negative, not finite or too large")
    if not padding_is_zero(packed, bits, count):
        raise Flaw(f"weight {name!r} has padding bits that are not zero")
    indices = unpack(packed, bits, count)
    if indices.max() >= len(levels):
        raise Flaw(f"weight {name!r} has the index {indices.max()} into a table of {len(levels)} levels")
    small = levels[0] >= -128 and levels[-1] <= 127
    codes = np.array(levels, dtype=np.int8 if small else np.int32)[indices].reshape(shape)
    return ConstrainedTensor(codes, scale, tuple(levels), denominator, record["constraint"])


def _check_record(name: str, record: object) -> None:
    """Refuse what is no description of a constrained weight."""

    def integers(values: object, low: int, high: float = math.inf) -> bool:
        return isinstance(values, list) and all(type(value) is int and low <= value <= high for value in values)

    if not isinstance(record, dict) or record.keys() != {"bits", "constraint", "denominator", "levels", "shape"}:
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
    for key, right in valid.items():
        if not right:
            raise Flaw(f"weight {name!r} has in the metadata an impossible {key}: {record[key]!r}")
