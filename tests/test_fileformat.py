"""The file format against its own text: fixed bytes, an independent decoder, hostile files, and atomic writing."""

import copy
import errno
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import cbpq.fileformat
from cbpq.atomic import atomic_write, remove_leftovers
from cbpq.errors import CbpqError, FileFormatError, UsageError
from cbpq.fileformat import CbpqFile, ConstrainedTensor, is_cbpq_file, read, write

# ---------------------------------------------------------------- the golden file, every byte derived by hand

GOLDEN_DOCUMENT = (
    '{"format_version":1,"metrics":{"top1":91.5},"run":{"seed":0},"source":{"architecture":"tiny"},'
    '"weights":{"fc.weight":{"bits":3,"constraint":"two-bit-shift","denominator":4,'
    '"levels":[-4,-2,-1,0,1,2,4],"shape":[2,3]}}}'
)
GOLDEN_HEADER = (
    '{"__metadata__":{"cbpq":"' + GOLDEN_DOCUMENT.replace('"', '\\"') + '"},'
    '"n":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
    '"fc.bias":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},'
    '"fc.weight.scale":{"dtype":"F32","shape":[2],"data_offsets":[16,24]},'
    '"fc.weight.codes":{"dtype":"U8","shape":[2,2],"data_offsets":[24,28]},'
    '"mask":{"dtype":"BOOL","shape":[3,1],"data_offsets":[28,31]}}'
)
GOLDEN = (
    bytes.fromhex("50 02 00 00 00 00 00 00")  # the header and 4 spaces: 592 bytes
    + GOLDEN_HEADER.encode()
    + b" " * 4
    + bytes.fromhex("fe ff ff ff ff ff ff ff")  # n: -2
    + bytes.fromhex("00 00 80 3f  00 00 80 be")  # fc.bias: 1, -0.25
    + bytes.fromhex("00 00 00 3f  00 00 00 40")  # fc.weight.scale: 0.5, 2
    + bytes.fromhex("98 01  4c 01")  # fc.weight.codes: 0 + 3·8 + 6·64 and 4 + 1·8 + 5·64
    + bytes.fromhex("01 00 01")  # mask
)


def golden_content() -> CbpqFile:
    codes = np.array([[-4, 0, 4], [1, -2, 2]], dtype=np.int8)
    scale = np.array([0.5, 2], dtype=np.float32)
    return CbpqFile(
        constrained={"fc.weight": ConstrainedTensor(codes, scale, (-4, -2, -1, 0, 1, 2, 4), 4, "two-bit-shift")},
        others={
            "mask": np.array([[True], [False], [True]]),
            "fc.bias": np.array([1, -0.25], dtype=np.float32),
            "n": np.array(-2, dtype=np.int64),
        },
        source={"architecture": "tiny"},
        run={"seed": 0},
        metrics={"top1": 91.5},
    )


def assert_same(left: CbpqFile, right: CbpqFile) -> None:
    assert left.constrained.keys() == right.constrained.keys()
    for name, tensor in left.constrained.items():
        other = right.constrained[name]
        assert np.array_equal(tensor.codes, other.codes)
        assert tensor.codes.shape == other.codes.shape
        assert_same_array(tensor.scale, other.scale)
        assert (tensor.levels, tensor.denominator) == (other.levels, other.denominator)
        assert (tensor.constraint, tensor.packing) == (other.constraint, other.packing)
    assert left.others.keys() == right.others.keys()
    for name, array in left.others.items():
        assert_same_array(array, right.others[name])
    assert (left.source, left.run, left.metrics) == (right.source, right.run, right.metrics)


def assert_same_array(left: NDArray[Any], right: NDArray[Any]) -> None:
    assert (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())


def test_golden_bytes_are_written(tmp_path: Path) -> None:
    write(tmp_path / "golden.safetensors", golden_content())
    assert (tmp_path / "golden.safetensors").read_bytes() == GOLDEN


def test_golden_bytes_are_read(tmp_path: Path) -> None:
    file = read(save(tmp_path, GOLDEN))
    assert_same(file, golden_content())
    weight = file.constrained["fc.weight"].weight()
    assert weight.dtype == np.float32
    assert weight.tolist() == [[-0.5, 0.0, 0.5], [0.5, -1.0, 1.0]]
    assert file.constrained["fc.weight"].codes.dtype == np.int8
    file.others["fc.bias"][0] = 3  # what is read may be changed


def test_order_of_content_does_not_matter(tmp_path: Path) -> None:
    content = golden_content()
    shuffled = CbpqFile(
        content.constrained,
        dict(reversed(content.others.items())),
        content.source,
        content.run,
        content.metrics,
    )
    write(tmp_path / "a", shuffled)
    assert (tmp_path / "a").read_bytes() == GOLDEN


def test_other_memory_layouts_give_the_same_bytes(tmp_path: Path) -> None:
    content = golden_content()
    tensor = content.constrained["fc.weight"]
    wide = np.asfortranarray(tensor.codes.astype(np.int64))
    scale = np.repeat(tensor.scale, 2)[::2]
    content.constrained["fc.weight"] = ConstrainedTensor(wide, scale, tensor.levels, 4, "two-bit-shift")
    content.others["fc.bias"] = np.array([1, 9, -0.25], dtype=">f4")[::2]
    write(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == GOLDEN


def test_the_text_holds_the_golden_example() -> None:
    text = cbpq.fileformat.__doc__ or ""
    example = re.search(r'\{"format_version".*?\}\}\}', text, re.DOTALL)
    assert example
    assert re.sub(r"\n *", "", example[0]) == GOLDEN_DOCUMENT
    assert "98 01 4C 01" in text
    assert "00 00 00 3F 00 00 00 40" in text


def test_safetensors_itself_accepts_the_file(tmp_path: Path) -> None:
    tensors = safetensors.numpy.load_file(save(tmp_path, GOLDEN))
    assert tensors["fc.weight.codes"].tolist() == [[0x98, 0x01], [0x4C, 0x01]]
    assert sorted(tensors) == ["fc.bias", "fc.weight.codes", "fc.weight.scale", "mask", "n"]


# ------------------------------------- a decoder written from the text alone: struct and json, one bit at a time

ELEMENTS = {"BOOL": "?", "U8": "B", "U16": "H", "U32": "I", "U64": "Q", "F16": "e", "F32": "f", "F64": "d"}
ELEMENTS |= {"I8": "b", "I16": "h", "I32": "i", "I64": "q"}


def float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


DENSE_WORDS = {3: (5, 1), 5: (10, 3), 7: (11, 4), 9: (5, 2), 17: (7, 4)}  # from the text, or worked out by it


def dense_indices(row: list[int], levels: int, count: int) -> list[int]:
    """The indices of a densely packed row of bytes, all of them used."""
    digits, size = DENSE_WORDS[levels]
    indices: list[int] = []
    while count:
        taken = min(digits, count)
        if taken < digits:
            size = next(b for b in range(1, 5) if levels**taken <= 256**b)
        word = sum(byte << 8 * place for place, byte in enumerate(row[:size]))
        indices += [word // levels**place % levels for place in range(taken)]
        assert word < levels**taken
        row, count = row[size:], count - taken
    assert not row
    return indices


def independent_decode(data: bytes) -> tuple[dict[str, list[float]], dict[str, tuple[list[int], list[Any]]]]:
    """Flat constrained weights by name, and (shape, flat values) of the other tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    buffer = data[8 + length :]
    document = json.loads(header.pop("__metadata__")["cbpq"])
    dense = any("packing" in record for record in document["weights"].values())
    assert document["format_version"] == (2 if dense else 1)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = struct.unpack(f"<{math.prod(entry['shape'])}{ELEMENTS[entry['dtype']]}", buffer[begin:end])
        tensors[name] = (entry["shape"], list(values))
    weights = {}
    for name, record in document["weights"].items():
        rows = record["shape"][0]
        count = math.prod(record["shape"][1:])
        (_, width), packed = tensors.pop(f"{name}.codes")
        scale_shape, scales = tensors.pop(f"{name}.scale")
        flat = []
        for row in range(rows):
            scale = scales[row] if scale_shape else scales[0]
            step = float32(scale / float32(record["denominator"]))
            own = packed[row * width : (row + 1) * width]
            if "packing" in record:
                found = dense_indices(own, len(record["levels"]), count)
            else:
                found = [
                    sum(
                        (own[place // 8] >> place % 8 & 1) << place - index * record["bits"]
                        for place in range(index * record["bits"], (index + 1) * record["bits"])
                    )
                    for index in range(count)
                ]
            flat += [float32(float32(record["levels"][index]) * step) for index in found]
        weights[name] = flat
    return weights, tensors


LEVEL_TABLES = [
    (-1, 1),
    (-1, 0, 1),
    (-2, -1, 0, 1, 2),
    (-4, -2, -1, 0, 1, 2, 4),
    tuple(range(-4, 5)),
    (-128, -64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64, 128),
    (-16777216, 3, 70000),
]
SHAPES = [(1,), (5,), (3, 7), (10, 8), (4, 3, 3), (6, 1, 3, 3), (5, 2, 1, 1), (3, 2, 5, 5), (2, 1, 2, 1, 3)]


@st.composite
def files(draw: st.DrawFn) -> CbpqFile:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    constrained = {}
    for number in range(draw(st.integers(0, 3))):
        shape = draw(st.sampled_from(SHAPES))
        levels = draw(st.sampled_from(LEVEL_TABLES))
        codes = np.array(levels, dtype=np.int32)[generator.integers(0, len(levels), shape)]
        scale = generator.random(draw(st.sampled_from([(), (shape[0],)]))) * draw(
            st.sampled_from([0.0, 1e-30, 1.0, 1e9])
        )
        denominator = draw(st.sampled_from([1, 2, 3, 4, 10]))
        name = f"layer.{number}.wéight"
        tensor = ConstrainedTensor(codes, np.asarray(scale, dtype=np.float32), levels, denominator, "name é")
        constrained[name] = tensor.packed_as(draw(st.sampled_from(["bits", "dense"])))
    others: dict[str, NDArray[Any]] = {"n": np.array(draw(st.integers(-(2**63), 2**63 - 1)), dtype=np.int64)}
    for name, dtype in [("bool", "?"), ("u16", "u2"), ("i8", "i1"), ("f16", "f2"), ("f32", "f4"), ("f64", "f8")]:
        if draw(st.booleans()):
            others[name] = (generator.random(draw(st.sampled_from([(), (0,), (3,), (2, 0, 2)]))) * 2 - 0.5).astype(
                dtype
            )
    text = draw(st.text(st.characters(codec="utf-8"), max_size=5))
    return CbpqFile(constrained, others, {"a": [1, {"b": text}]}, {text: None}, {"top1": draw(st.floats(0, 100))})


@given(file=files())
@settings(max_examples=100, deadline=None)
def test_round_trip_and_independent_decoder(tmp_path_factory: pytest.TempPathFactory, file: CbpqFile) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.safetensors"
    write(path, file)
    data = path.read_bytes()
    back = read(path)
    assert_same(file, back)
    write(path, back)
    assert path.read_bytes() == data
    weights, others = independent_decode(data)
    assert weights.keys() == file.constrained.keys()
    for name, tensor in file.constrained.items():
        weight = tensor.weight()
        assert weight.dtype == np.float32
        assert weight.shape == tensor.codes.shape
        assert weight.tobytes() == struct.pack(f"<{weight.size}f", *weights[name])
    assert {name: (list(a.shape), a.reshape(-1).tolist()) for name, a in file.others.items()} == others


def test_codes_take_the_smallest_of_two_types(tmp_path: Path) -> None:
    for levels, dtype in [((-128, 127), np.int8), ((-1, 128), np.int32), ((-129, 0), np.int32)]:
        codes = np.array([levels], dtype=np.int64)
        tensor = ConstrainedTensor(codes, np.ones((), dtype=np.float32), levels, 1, "levels")
        write(tmp_path / "a", CbpqFile({"w": tensor}, {}, {}, {}, {}))
        assert read(tmp_path / "a").constrained["w"].codes.dtype == dtype


def test_every_level_of_a_full_table(tmp_path: Path) -> None:
    levels = tuple(range(-100, 156))
    codes = np.arange(-100, 156, dtype=np.int32).reshape(2, 128)
    tensor = ConstrainedTensor(codes, np.ones((), dtype=np.float32), levels, 1, "levels")
    write(tmp_path / "a", CbpqFile({"w": tensor}, {}, {}, {}, {}))
    assert np.array_equal(read(tmp_path / "a").constrained["w"].codes, codes)


def test_numbers_for_inspection() -> None:
    codes = np.array([[-1, 0, 0, 1], [0, 0, 0, 0], [1, 1, -1, -1]], dtype=np.int8).reshape(3, 2, 2)
    tensor = ConstrainedTensor(codes, np.ones((), dtype=np.float32), (-1, 0, 1), 1, "ternary")
    assert tensor.bits == 2
    assert tensor.packed_bytes == 3
    assert tensor.histogram == (3, 6, 3)
    assert tensor.sparsity == 0.5
    assert tensor.entropy == 1.5
    assert ConstrainedTensor(codes * 0, tensor.scale, (-1, 0, 1), 1, "ternary").entropy == 0
    assert ConstrainedTensor(codes[:, :, 0], tensor.scale, (-1, 0, 1), 1, "ternary").packed_bytes == 3


# ---------------------------------------------------------------- hostile files


def save(folder: Path, data: bytes) -> Path:
    path = folder / "hostile.safetensors"
    path.write_bytes(data)
    return path


Tensors = dict[str, tuple[str, list[int], bytes]]


def golden_tensors() -> Tensors:
    return {
        "n": ("I64", [], GOLDEN[-31:-23]),
        "fc.bias": ("F32", [2], GOLDEN[-23:-15]),
        "fc.weight.scale": ("F32", [2], GOLDEN[-15:-7]),
        "fc.weight.codes": ("U8", [2, 2], GOLDEN[-7:-3]),
        "mask": ("BOOL", [3, 1], GOLDEN[-3:]),
    }


def build(tensors: Tensors, document: object) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"cbpq": document if isinstance(document, str) else json.dumps(document)}}
    buffer = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(buffer), len(buffer) + len(data)]}
        buffer += data
    return with_header(json.dumps(header), buffer)


def with_header(header: str, buffer: bytes) -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + buffer


def refused(path: Path, *, kind: type[CbpqError] = FileFormatError) -> str:
    with pytest.raises(CbpqError) as caught:
        read(path)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 700
    return message


def test_the_builder_builds_what_is_read(tmp_path: Path) -> None:
    assert_same(read(save(tmp_path, build(golden_tensors(), GOLDEN_DOCUMENT))), golden_content())


def edited(name: str, **changes: object) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        dtype, shape, data = tensors[name]
        old: dict[str, Any] = {"dtype": dtype, "shape": shape, "data": data} | changes
        tensors[name] = (old["dtype"], old["shape"], old["data"])

    return edit


def removed(name: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        del tensors[name]

    return edit


def added(name: str, dtype: str, shape: list[int], data: bytes) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, (dtype, shape, data))


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


TENSOR_FAULTS = {
    "codes missing": (removed("fc.weight.codes"), "'fc.weight' needs"),
    "scale missing": (removed("fc.weight.scale"), "'fc.weight' needs"),
    "weight also a tensor": (added("fc.weight", "F32", [1], floats(1)), "'fc.weight' needs"),
    "codes of another shape": (edited("fc.weight.codes", shape=[4, 1]), "does not fit its codes"),
    "codes flat": (edited("fc.weight.codes", shape=[4]), "does not fit its codes"),
    "codes signed": (edited("fc.weight.codes", dtype="I8"), "does not fit its codes"),
    "codes too long": (edited("fc.weight.codes", shape=[2, 3], data=bytes(6)), "does not fit its codes"),
    "codes too few": (edited("fc.weight.codes", shape=[1, 2], data=bytes(2)), "does not fit its codes"),
    "index 7 of 7": (edited("fc.weight.codes", data=b"\x98\x01\x4f\x01"), "index 7 into a table of 7"),
    "padding": (edited("fc.weight.codes", data=b"\x98\x01\x4c\x81"), "padding bits"),
    "padding, lowest bit": (edited("fc.weight.codes", data=b"\x98\x03\x4c\x01"), "padding bits"),
    "scale NaN": (edited("fc.weight.scale", data=floats(0.5, math.nan)), "scale"),
    "scale infinite": (edited("fc.weight.scale", data=floats(math.inf, 1)), "scale"),
    "scale negative": (edited("fc.weight.scale", data=floats(0.5, -1)), "scale"),
    "scale overflows": (edited("fc.weight.scale", shape=[], data=floats(3.4028235e38)), None),
    "scale of another length": (edited("fc.weight.scale", shape=[1], data=floats(1)), "does not fit its scale"),
    "scale of another rank": (edited("fc.weight.scale", shape=[2, 1]), "does not fit its scale"),
    "scale in F16": (edited("fc.weight.scale", dtype="F16", data=bytes(4)), "does not fit its scale"),
    "other tensor NaN": (edited("fc.bias", data=floats(1, math.nan)), "'fc.bias' has a value that is not finite"),
    "other tensor infinite": (added("x", "F64", [1], struct.pack("<d", -math.inf)), "not finite"),
    "boolean 2": (edited("mask", data=b"\x00\x02\x01"), "booleans other than 0 and 1"),
    "dtype unknown to safetensors": (edited("fc.bias", dtype="F33"), "F33"),
    "dtype unknown to cbpq": (edited("fc.bias", dtype="BF16", data=bytes(4)), "BF16 [2], named 'fc.bias'"),
    "dtype below a byte": (added("x", "F4", [2], b"\x00"), "F4 [2], named 'x'"),
    "complex": (added("x", "C64", [1], bytes(8)), "C64 [1], named 'x'"),
    "shape and bytes disagree": (edited("fc.bias", shape=[3]), None),
    "negative shape": (edited("fc.bias", shape=[-2]), None),
    "shape overflows": (edited("fc.bias", shape=[2**40, 2**40]), None),
    "shape overflows with a zero": (added("x", "F32", [0, 2**62, 2**62], b""), "'x'"),
    "shape no machine can index": (added("x", "F32", [0, 2**63], b""), "'x'"),
    "dimensions": (added("x", "F32", [1] * 9, floats(1)), "such a tensor"),
    "very many dimensions": (added("x", "F32", [1] * 1000, floats(1)), "such a tensor"),
    "name of two lines, shape wrong": (added("a\nb\r\u2028c", "F32", [3], floats(1)), None),
    "name of two lines": (added("a\nb\r\u2028c", "BF16", [2], floats(1)), None),
    "name of a million letters": (added("x" * 10**6, "BF16", [2], floats(1)), None),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_bad_tensors(tmp_path: Path, fault: str) -> None:
    edit, words = TENSOR_FAULTS[fault]
    tensors = golden_tensors()
    edit(tensors)
    document = GOLDEN_DOCUMENT
    if fault == "scale overflows":
        document = document.replace('"denominator":4', '"denominator":1')
    message = refused(save(tmp_path, build(tensors, document)))
    assert words is None or words in message


JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3.0, 1e308, 2**31, 2**63, 2**64, 10**400, "", "x", [], [0], [1], [2, 3.0], [2, 3],
    [2, True], [2, 3, 1, 1, 1, 1, 1, 1, 1], [2**62, 2**62], [2, 10**30], [3, 2], [6], [1] * 300, [0, 0],
    [1, 0], list(range(257)), ["a"], [[2, 3]], {}, {"a": 1}, {"fc.weight": None}, {"fc.weight": []}, {"": {}},
]  # fmt: skip  # a table of values reads better in few lines


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from places(item, (*path, key))


HARMLESS = {("source", "architecture"), ("run", "seed"), ("metrics", "top1")}


@pytest.mark.parametrize("place", list(places(json.loads(GOLDEN_DOCUMENT))), ids=".".join)
def test_every_metadata_value_replaced_by_junk(tmp_path: Path, place: tuple[str, ...]) -> None:
    original = json.loads(GOLDEN_DOCUMENT)
    for junk in JUNK:
        document = copy.deepcopy(original)
        owner = document
        for key in place[:-1]:
            owner = owner[key]
        before, owner[place[-1]] = owner[place[-1]], junk
        path = save(tmp_path, build(golden_tensors(), document))
        harmless = (
            place in HARMLESS
            or (type(junk) is dict and place[0] in ("source", "run", "metrics"))
            or (place == ("weights",) and junk == {})  # the tensors are then ordinary ones
            or (place[-1] == "constraint" and junk == "x")
            or (place[-1] == "denominator" and type(junk) is int and 1 <= junk <= 2**24)
            or json.dumps(junk) == json.dumps(before)
        )
        if harmless:
            read(path)
        else:
            refused(path)


@pytest.mark.parametrize("place", list(places(json.loads(GOLDEN_DOCUMENT))), ids=".".join)
def test_every_metadata_key_removed_or_joined_by_another(tmp_path: Path, place: tuple[str, ...]) -> None:
    for remove in (True, False):
        document = json.loads(GOLDEN_DOCUMENT)
        owner = document
        for key in place[:-1]:
            owner = owner[key]
        if remove:
            del owner[place[-1]]
        else:
            owner["extra"] = 1
        path = save(tmp_path, build(golden_tensors(), document))
        if place in HARMLESS or (
            place == ("weights", "fc.weight") and "fc.weight" not in owner and "extra" not in owner
        ):
            read(path)
        else:
            refused(path)


@pytest.mark.parametrize(
    "document",
    [
        "", "null", "[]", "1", '"x"', "{", "{}", " ", "\ufeff" + GOLDEN_DOCUMENT, GOLDEN_DOCUMENT + "x",
        GOLDEN_DOCUMENT.replace("91.5", "NaN"),
        GOLDEN_DOCUMENT.replace("91.5", "-Infinity"),
        GOLDEN_DOCUMENT.replace("91.5", "1e999"),
        GOLDEN_DOCUMENT.replace("91.5", "1" * 5000),
        GOLDEN_DOCUMENT.replace("tiny", "\\ud800"),
        GOLDEN_DOCUMENT.replace("91.5", "[" * 100_000 + "]" * 100_000),
        GOLDEN_DOCUMENT.replace('"seed":0', '"seed":0,"seed":0'),
        GOLDEN_DOCUMENT.replace('"bits":3', '"bits":3,"bits":3'),
        GOLDEN_DOCUMENT.replace('"run":', '"run":{},"run":'),
    ],
    ids=lambda document: repr(document[-60:]),
)  # fmt: skip  # a table
def test_metadata_that_is_no_usable_json(tmp_path: Path, document: str) -> None:
    refused(save(tmp_path, build(golden_tensors(), document)))


@pytest.mark.parametrize("depth", [100, 300, 900, 960, 980, 990, 3000, 9990, 20_000])
@pytest.mark.parametrize("place", ['"bits":3', '"seed":0', '"format_version":1'])
def test_deeply_nested_metadata(tmp_path: Path, depth: int, place: str) -> None:
    nested = place.split(":")[0] + ":" + "[" * depth + "]" * depth
    path = save(tmp_path, build(golden_tensors(), GOLDEN_DOCUMENT.replace(place, nested)))
    if "seed" not in place:
        refused(path)
        return
    try:
        read(path)
    except FileFormatError:
        refused(path)


def test_newer_version_asks_for_an_update(tmp_path: Path) -> None:
    path = save(tmp_path, build({}, '{"format_version":3,"anything":[]}'))
    assert "update cbpq" in refused(path)
    assert is_cbpq_file(path)


HEADER_FAULTS = {
    "empty": b"",
    "seven bytes": GOLDEN[:7],
    "no header": GOLDEN[:8],
    "header cut": GOLDEN[:300],
    "buffer cut": GOLDEN[:-1],
    "buffer gone": GOLDEN[:-31],
    "trailing byte": GOLDEN + b"\0",
    "header over its limit": struct.pack("<Q", 2**24 + 1) + b"{}" + b" " * 2**24,
    "header of 2**64 - 1 bytes": b"\xff" * 8 + GOLDEN[8:],
    "header longer than the file": struct.pack("<Q", len(GOLDEN)) + GOLDEN[8:],
    "header of no bytes": struct.pack("<Q", 0),
    "zeros": bytes(1000),
    "a zip file": b"PK\x03\x04" + bytes(1000),
    "a pickle": b"\x80\x04\x95" + bytes(1000),
    "text": b"one two three four five\n" * 10,
    "header in UTF-16": struct.pack("<Q", 8) + "{}  ".encode("utf-16-le"),
    "header not UTF-8": struct.pack("<Q", 4) + b'{"\xff}',
    "header with a byte-order mark": with_header("\ufeff" + GOLDEN_HEADER, GOLDEN[-31:]),
    "header after a space": with_header(" " + GOLDEN_HEADER, GOLDEN[-31:]),
    "header a list": with_header("[]", b""),
    "header null": with_header("null", b""),
    "header with more behind it": with_header(GOLDEN_HEADER + "{}", GOLDEN[-31:]),
    "metadata a list": with_header('{"__metadata__":["cbpq"]}', b""),
    "metadata text": with_header('{"__metadata__":"cbpq"}', b""),
    "metadata no text": with_header('{"__metadata__":{"cbpq":{}}}', b""),
    "metadata a number": with_header('{"__metadata__":{"cbpq":1}}', b""),
    "metadata twice": with_header(GOLDEN_HEADER[:-1] + ',"__metadata__":{}}', GOLDEN[-31:]),
    "a tensor twice": with_header(
        GOLDEN_HEADER[:-1] + "," + GOLDEN_HEADER[GOLDEN_HEADER.index('"mask"') :], GOLDEN[-31:]
    ),
    "a tensor null": with_header('{"__metadata__":{"cbpq":"{}"},"a":null}', b""),
    "a tensor a list": with_header('{"__metadata__":{"cbpq":"{}"},"a":[1,2]}', b""),
    "a tensor without offsets": with_header(GOLDEN_HEADER.replace('"data_offsets"', '"offsets"', 1), GOLDEN[-31:]),
    "offsets of three": with_header(GOLDEN_HEADER.replace("[0,8]", "[0,8,8]"), GOLDEN[-31:]),
    "offsets of one": with_header(GOLDEN_HEADER.replace("[28,31]", "[28]"), GOLDEN[-31:]),
    "offsets text": with_header(GOLDEN_HEADER.replace("[28,31]", '["28","31"]'), GOLDEN[-31:]),
    "offsets floats": with_header(GOLDEN_HEADER.replace("[28,31]", "[28.0,31.0]"), GOLDEN[-31:]),
    "offsets an object": with_header(GOLDEN_HEADER.replace("[28,31]", '{"1":31}'), GOLDEN[-31:]),
    "offsets backwards": with_header(GOLDEN_HEADER.replace("[0,8]", "[8,0]"), GOLDEN[-31:]),
    "offsets negative": with_header(GOLDEN_HEADER.replace("[0,8]", "[-8,0]"), GOLDEN[-31:]),
    "offsets huge": with_header(GOLDEN_HEADER.replace("[28,31]", f"[28,{2**70}]"), GOLDEN[-31:]),
    "overlap": with_header(GOLDEN_HEADER.replace("[8,16]", "[0,8]"), GOLDEN[-31:]),
    "overlap by a part": with_header(GOLDEN_HEADER.replace("[8,16]", "[7,15]"), GOLDEN[-31:]),
    "a gap": with_header(GOLDEN_HEADER.replace("[28,31]", "[29,32]"), GOLDEN[-31:] + b"\0"),
    "beyond the end": with_header(GOLDEN_HEADER.replace("[28,31]", "[128,131]"), GOLDEN[-31:]),
    "nested": with_header('{"a":' * 50_000 + "1" + "}" * 50_000, b""),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_bad_containers(tmp_path: Path, fault: str) -> None:
    path = save(tmp_path, HEADER_FAULTS[fault])
    refused(path)
    assert is_cbpq_file(path) in (True, False)


def test_a_plain_safetensors_file_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    for metadata in (None, {}, {"format": "pt"}):
        safetensors.numpy.save_file({"w": np.zeros(3, dtype=np.float32)}, path, metadata)
        message = refused(path)
        assert "plain safetensors file" in message
        assert "cbpq quantize" in message
        assert not is_cbpq_file(path)


def test_other_metadata_strings_are_ignored(tmp_path: Path) -> None:
    header = GOLDEN_HEADER.replace('{"__metadata__":{', '{"__metadata__":{"format":"pt",')
    assert_same(read(save(tmp_path, with_header(header, GOLDEN[-31:]))), golden_content())


def test_no_file_a_folder_and_other_places(tmp_path: Path) -> None:
    save(tmp_path, GOLDEN)
    for path in (tmp_path / "missing", tmp_path / "missing" / "a", tmp_path / "hostile.safetensors" / "a"):
        assert "no such file" in refused(path, kind=UsageError)
        assert not is_cbpq_file(path)
    with pytest.raises(UsageError):
        read(Path("a\0b"))
    assert "folder" in refused(tmp_path)
    assert not is_cbpq_file(tmp_path)
    long = tmp_path / ("x" * 5000)
    with pytest.raises(FileFormatError):
        read(long)
    assert not is_cbpq_file(long)
    assert "no regular file" in refused(Path(os.devnull))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "no regular file" in refused(fifo)  # and it does not wait for a writer


def test_no_permission_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, GOLDEN)

    def forbidden(self: Path, mode: str) -> BinaryIO:  # the superuser may read anything, so chmod alone tests nothing
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", forbidden)
    assert "Permission denied" in refused(path)
    assert not is_cbpq_file(path)


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    generator = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        data = bytearray(GOLDEN)
        for _ in range(generator.choice([1, 1, 1, 2, 5])):
            place = generator.randrange(len(data))
            match generator.randrange(6):
                case 0 | 1 | 2:
                    data[place] ^= 1 << generator.randrange(8)
                case 3:
                    data[place] = generator.randrange(256)
                case 4:
                    del data[place : place + generator.choice([1, 4, len(data)])]
                case 5:
                    data[place:place] = generator.randbytes(generator.choice([1, 8]))
            if not data:
                break
        path = save(tmp_path, bytes(data))
        assert is_cbpq_file(path) in (True, False)
        try:
            file = read(path)
        except FileFormatError:
            refused(path)
            outcomes["refused"] += 1
        else:
            write(tmp_path / "again", file)  # what was read is content that can be written
            assert_same(read(tmp_path / "again"), file)
            outcomes["read"] += 1
    assert min(outcomes.values()) > 10


# ---------------------------------------------------------------- dense packing

# the text's example, and a weight whose every row has a whole word of 11 and one of 2
DENSE_DOCUMENT = {
    "format_version": 2,
    "weights": {
        "t": {"bits": 2, "constraint": "ternary", "denominator": 1, "levels": [-1, 0, 1], "shape": [2, 7]},
        "s": {"bits": 3, "constraint": "s", "denominator": 4, "levels": [-4, -2, -1, 0, 1, 2, 4], "shape": [1, 13]},
        "b": {"bits": 1, "constraint": "binary", "denominator": 1, "levels": [-1, 1], "shape": [1, 3]},
    },
    "source": {},
    "run": {},
    "metrics": {},
}
for _name in ("t", "s"):
    DENSE_DOCUMENT["weights"][_name]["packing"] = "dense"  # type: ignore[index]


def dense_tensors() -> Tensors:
    last = 6 + 5 * 7
    return {
        "b.codes": ("U8", [1, 1], b"\x05"),
        "b.scale": ("F32", [], floats(1)),
        "s.codes": ("U8", [1, 5], (7**11 - 1).to_bytes(4, "little") + bytes([last])),
        "s.scale": ("F32", [], floats(2)),
        "t.codes": ("U8", [2, 2], bytes.fromhex("C8 06 66 04")),
        "t.scale": ("F32", [2], floats(1, 0.5)),
    }


def test_the_dense_example_of_the_text(tmp_path: Path) -> None:
    assert "``W.codes`` is C8 06 66 04" in (cbpq.fileformat.__doc__ or "")
    file = read(save(tmp_path, build(dense_tensors(), DENSE_DOCUMENT)))
    assert {name: tensor.packing for name, tensor in file.constrained.items()} == {
        "t": "dense",
        "s": "dense",
        "b": "bits",
    }
    indices = [[2, 0, 1, 1, 2, 0, 2], [0, 1, 2, 0, 1, 1, 1]]
    assert (file.constrained["t"].codes + 1).tolist() == indices
    assert file.constrained["s"].codes.tolist() == [[4] * 11 + [4, 2]]
    assert file.constrained["b"].codes.tolist() == [[1, -1, 1]]
    write(tmp_path / "again", file)
    back = read(tmp_path / "again")
    assert_same(back, file)
    tensors = safetensors.numpy.load_file(tmp_path / "again")
    assert tensors["t.codes"].tolist() == [[0xC8, 0x06], [0x66, 0x04]]
    weights, _ = independent_decode((tmp_path / "again").read_bytes())
    assert weights["t"][:7] == [1, -1, 0, 0, 1, -1, 1]


DENSE_FAULTS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "word of 3^5": (edited("t.codes", data=bytes([243, 6, 0x66, 4])), "'t' has a word that is too large"),
    "largest byte": (edited("t.codes", data=bytes([0xC8, 6, 255, 4])), "'t' has a word that is too large"),
    "last word of 3^2": (edited("t.codes", data=bytes([0xC8, 9, 0x66, 4])), "'t' has a word that is too large"),
    "word of 7^11": (edited("s.codes", data=(7**11).to_bytes(4, "little") + b"\0"), "'s' has a word that is too large"),
    "last word of 7^2": (edited("s.codes", data=bytes([0, 0, 0, 0, 49])), "'s' has a word that is too large"),
    "last word not shortened": (edited("s.codes", shape=[1, 8], data=bytes(8)), "does not fit its codes"),
    "packed by bits all the same": (edited("s.codes", shape=[1, 5], data=b"\xff" * 5), "'s' has a word"),
    "one byte less": (edited("s.codes", shape=[1, 4], data=bytes(4)), "does not fit its codes"),
    "by bits, padding": (edited("b.codes", data=b"\x0d"), "'b' has padding bits"),
}


@pytest.mark.parametrize("fault", DENSE_FAULTS)
def test_bad_dense_tensors(tmp_path: Path, fault: str) -> None:
    edit, words = DENSE_FAULTS[fault]
    tensors = dense_tensors()
    edit(tensors)
    assert words in refused(save(tmp_path, build(tensors, DENSE_DOCUMENT)))


def test_dense_documents_that_contradict_themselves(tmp_path: Path) -> None:
    def refuse(words: str, name: str | None = None, **changes: object) -> None:
        document: Any = copy.deepcopy(DENSE_DOCUMENT)
        (document["weights"][name] if name else document).update(changes)
        assert words in refused(save(tmp_path, build(dense_tensors(), document)))

    refuse("format_version 1 does not go with", format_version=1)
    refuse("impossible packing", "b", packing="dense")  # it gains nothing
    values: list[object] = ["bits", "Dense", "", None, 1, True, ["dense"], {}]
    for value in values:
        refuse("impossible packing", "t", packing=value)
    sparse = {name: tensor for name, tensor in dense_tensors().items() if name[0] == "b"}
    document: Any = copy.deepcopy(DENSE_DOCUMENT)
    document["weights"] = {"b": document["weights"]["b"]}
    assert "format_version 2 does not go with" in refused(save(tmp_path, build(sparse, document)))


def test_random_damage_to_dense_words_is_refused_or_harmless(tmp_path: Path) -> None:
    generator, whole = random.Random(0), build(dense_tensors(), DENSE_DOCUMENT)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(200):
        data = bytearray(whole)
        data[generator.randrange(len(data) - 20, len(data))] = generator.randrange(256)
        path = save(tmp_path, bytes(data))
        try:
            file = read(path)
        except FileFormatError:
            refused(path)
            outcomes["refused"] += 1
        else:
            write(tmp_path / "again", file)
            assert_same(read(tmp_path / "again"), file)
            outcomes["read"] += 1
    assert min(outcomes.values()) > 10


# ---------------------------------------------------------------- content that cannot be written


def changed(**changes: object) -> CbpqFile:
    content = golden_content()
    fields: dict[str, Any] = vars(content.constrained["fc.weight"]) | changes
    content.constrained["fc.weight"] = ConstrainedTensor(**fields)
    return content


def with_other(name: str, array: NDArray[Any]) -> CbpqFile:
    content = golden_content()
    content.others[name] = array
    return content


def with_run(run: object) -> CbpqFile:
    content = golden_content()
    object.__setattr__(content, "run", run)
    return content


CODES = golden_content().constrained["fc.weight"].codes
ONE = np.ones((), dtype=np.float32)
UNWRITABLE = {
    "code beyond the table": changed(codes=CODES * 2),
    "code between the levels": changed(codes=CODES + np.int8(1)),
    "codes not whole": changed(codes=CODES + 0.5),
    "codes NaN": changed(codes=CODES * np.nan),
    "no codes": changed(codes=CODES[:, :0]),
    "codes a scalar": changed(codes=np.array(1)),
    "scale NaN": changed(scale=ONE * np.nan),
    "scale negative": changed(scale=-ONE),
    "scale in double": changed(scale=np.ones((), dtype=np.float64)),
    "scale of another length": changed(scale=np.ones(3, dtype=np.float32)),
    "one level": changed(levels=(1,)),
    "no level": changed(levels=()),
    "too many levels": changed(levels=tuple(range(-150, 150))),
    "levels not ascending": changed(levels=(0, -1, 1)),
    "levels twice": changed(levels=(0, 0, 1)),
    "levels not whole": changed(levels=(-0.5, 0.5)),
    "level too large": changed(levels=(0, 2**24 + 1)),
    "denominator zero": changed(denominator=0),
    "denominator not whole": changed(denominator=4.0),
    "constraint empty": changed(constraint=""),
    "constraint no text": changed(constraint=None),
    "dense without gain": changed(codes=np.ones((1, 1), np.int8), levels=(-1, 1), packing="dense"),
    "packing unknown": changed(packing="zip"),
    "other NaN": with_other("x", np.array(np.nan)),
    "other infinite": with_other("x", np.array([np.inf], dtype=np.float16)),
    "other complex": with_other("x", np.ones(1, dtype=np.complex64)),
    "other an object": with_other("x", np.array([None])),
    "other text": with_other("x", np.array(["a"])),
    "other of nine dimensions": with_other("x", np.ones([1] * 9)),
    "name taken by codes": with_other("fc.weight.codes", np.ones(1)),
    "name taken by scale": with_other("fc.weight.scale", np.ones(1)),
    "name taken by the weight": with_other("fc.weight", np.ones(1)),
    "name reserved": with_other("__metadata__", np.ones(1)),
    "name half a surrogate pair": with_other("\ud800", np.ones(1)),
    "run NaN": with_run({"a": [math.nan]}),
    "run no object": with_run([1]),
    "run no JSON": with_run({"a": {1, 2}}),
    "run with a numpy number": with_run({"a": np.float32(1)}),
    "run with keys of two types": with_run({"1": 1, 1: 2}),
    "run with half a surrogate pair": with_run({"a": "\udfff"}),
    "run as large as no header": with_run({"a": "x" * 2**24}),
}


@pytest.mark.parametrize("fault", UNWRITABLE)
def test_content_that_is_refused(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "out.safetensors"
    with pytest.raises(FileFormatError) as caught:
        write(path, UNWRITABLE[fault])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_content_that_refers_to_itself_or_is_too_deep(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["a"] = loop
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    for run in (loop, deep):
        with pytest.raises(FileFormatError):
            write(tmp_path / "out", with_run(run))


def test_names_of_codes_may_not_be_names_of_weights(tmp_path: Path) -> None:
    tensor = golden_content().constrained["fc.weight"]
    for names in (("a", "a.codes"), ("a.codes", "a"), ("a.scale", "a")):
        with pytest.raises(FileFormatError):
            write(tmp_path / "out", CbpqFile(dict.fromkeys(names, tensor), {}, {}, {}, {}))
    assert list(tmp_path.iterdir()) == []


def test_a_name_like_codes_without_a_weight_is_fine(tmp_path: Path) -> None:
    write(tmp_path / "a", with_other("buffer.codes", np.arange(3)))
    assert read(tmp_path / "a").others["buffer.codes"].tolist() == [0, 1, 2]


# ---------------------------------------------------------------- atomic writing


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old and much longer")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_name_as_long_as_names_get(tmp_path: Path) -> None:
    atomic_write(tmp_path / ("x" * 255), b"1")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"1"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "target")
    atomic_write(tmp_path / "link", b"1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "target").read_bytes() == b"1"


@pytest.mark.parametrize(
    "number, advice",
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "choose a place"), (errno.EIO, "choose a place")],
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, advice: str
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(CbpqError, match=advice) as caught:
        atomic_write(path, b"new")
    monkeypatch.undo()
    assert str(path) in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupt_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a", b"new")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, words in [
        (tmp_path, "folder has this name"),
        (tmp_path / "missing" / "a", "create the folder"),
        (tmp_path / "file" / "a", "parent is a file"),
        (tmp_path / "loop", "cannot write"),
        (tmp_path / ("x" * 256), "cannot write"),
        (tmp_path / "a\0b", "cannot write"),
        (Path(os.devnull), "not a regular file"),
    ]:
        with pytest.raises(CbpqError, match=words) as caught:
            atomic_write(path, b"new")
        assert "\n" not in str(caught.value)
    assert not Path(os.devnull).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    program = (
        "import sys; from pathlib import Path; from cbpq.atomic import atomic_write\n"
        "while True:\n"
        "    for letter in b'ab': atomic_write(Path(sys.argv[1]), bytes([letter]) * 3_000_000)\n"
    )
    for pause in (0.0, 0.013, 0.027):
        path.unlink(missing_ok=True)
        root = Path(__file__).parents[1]
        with subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=root) as process:
            while not path.exists():
                assert process.poll() is None
                time.sleep(0.002)
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
        data = path.read_bytes()
        assert data in (b"a" * 3_000_000, b"b" * 3_000_000)
        remove_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == [path]


def test_remove_leftovers_takes_nothing_else(tmp_path: Path) -> None:
    names = ["model.safetensors", ".cbpq-notes", "a.tmp", ".cbpq-0123456789abcdef.tmp"]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[:3])
    remove_leftovers(tmp_path / "missing")
