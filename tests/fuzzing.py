"""Damaged and hostile files, made from sound ones: the same seed gives the same file.

Bytes are changed anywhere; and where the form of a file is known, its parts are changed and put together again, so that
what comes behind the first check is reached as well.
"""

import hashlib
import io
import json
import random
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

NUMBERS = (0, 1, 2, 7, 127, 255, 256, 65535, 2**24 + 1, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "\0",
    "../../x",
    "/etc/passwd",
    "x" * 3000,
    "os:system",
    [],
    {},
    1.5,
    -0.5,
    1e308,
)


def mutated(data: bytes, kind: str, seed: int) -> bytes:
    """A damaged copy of a file; ``kind`` is one of MUTATIONS."""
    rng = random.Random(f"{kind} {seed}")
    return rng.choice(MUTATIONS[kind])(data, rng)


def anywhere(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, removed, inserted, repeated, moved; mostly near the beginning or the end."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        if not changed:
            break
        near = rng.choice((len(changed), 400, 64))
        place = rng.choice((rng.randrange(min(near, len(changed))), -1 - rng.randrange(min(near, len(changed)))))
        place %= len(changed)
        length = rng.choice((1, 2, 4, 8, 100, len(changed)))
        match rng.randrange(8):
            case 0 | 1:
                changed[place] ^= 1 << rng.randrange(8)
            case 2:
                changed[place] = rng.choice((0, 1, 255, rng.randrange(256)))
            case 3:
                number = rng.choice(NUMBERS) * rng.choice((1, 1, -1))
                size = rng.choice((2, 4, 8))
                changed[place : place + size] = (number % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "big")))
            case 4:
                del changed[place : place + length]
            case 5:
                changed[place:place] = rng.randbytes(min(length, 100))
            case 6:
                changed[place:place] = changed[place : place + min(length, 1000)]
            case 7:
                del changed[place:]
    return bytes(changed)


def other_value(value: Any, rng: random.Random) -> Any:
    """JSON with one of its parts changed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {name: part for name, part in value.items() if name != key}
            case 1:
                return {f"{name}x" if name == key else name: part for name, part in value.items()}
            case 2:
                return value | {str(rng.choice(VALUES)): value[key]}
            case _:
                return value | {key: other_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], *rng.choice(([], [other_value(value[place], rng)], value[place:])), *value[place + 1 :]]
    if isinstance(value, str) and value.startswith(("{", "[")) and rng.random() < 0.9:
        return json.dumps(other_value(json.loads(value), rng))
    if rng.random() < 0.02:
        return json.loads("[" * 400 + "]" * 400)
    number = rng.choice(NUMBERS) * rng.choice((1, 1, -1))
    return rng.choice((number, number, rng.choice(VALUES), value, [value] * 9, {"a": value}))


def safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """Another header before the same tensors."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 2, 3))):
        if isinstance(header, dict) and "__metadata__" in header and rng.random() < 0.6:
            header = header | {"__metadata__": other_value(header["__metadata__"], rng)}
        else:
            header = other_value(header, rng)
    text = json.dumps(header)
    if rng.random() < 0.05:  # a key twice
        text = text.replace('"dtype"', '"shape": [1], "dtype"', 1)
    return struct.pack("<Q", len(text)) + text.encode() + data[8 + length :]


def zip_members(data: bytes, rng: random.Random) -> bytes:
    """The same archive with other members, and sound checksums for them."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    place = rng.randrange(len(members))
    if rng.random() < 0.5:  # the small ones are those that describe the others
        place = min(range(len(members)), key=lambda index: len(members[index][1]) + rng.randrange(2000))
    name, content = members[place]
    match rng.randrange(6):
        case 0:
            members[place] = (rng.choice((f"../{name}", f"/{name}", "x", name.upper(), name + "\0")), content)
        case 1:
            del members[place]
        case 2:
            members.append(rng.choice(members))
        case 3 if content.startswith(b"\x93NUMPY"):
            members[place] = (name, npy_header(content, rng))
        case 4 if name.endswith(".pkl"):
            members[place] = (name, pickle_numbers(content, rng))
        case _:
            members[place] = (name, anywhere(content, rng))
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    buffer, other = io.BytesIO(), rng.randrange(len(members) + 1)
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name that is there twice is meant
        for index, (name, content) in enumerate(members):
            method = rng.choice(methods) if index == other else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name or "x"), content, method)
    return buffer.getvalue()


def zip_directory(data: bytes, rng: random.Random) -> bytes:
    """Other numbers in the directory of an archive: method, checksum, sizes, places."""
    changed = bytearray(data)
    for entry in re.finditer(rb"PK\x01\x02", data):
        if rng.random() < 0.5 and entry.start() + 46 <= len(data):
            place, size = rng.choice(((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (20, 8), (28, 2), (30, 2), (42, 4)))
            number = rng.choice(NUMBERS) % 2 ** (8 * size)
            changed[entry.start() + place : entry.start() + place + size] = number.to_bytes(size, "little")
    return bytes(changed)


def npy_header(content: bytes, rng: random.Random) -> bytes:
    """An array with another description before the same values."""
    length = int.from_bytes(content[8:10], "little")
    text: str
    text, values = content[10 : 10 + length].decode(), content[10 + length :]
    number = str(rng.choice(NUMBERS) * rng.choice((1, 1, -1)))
    text = rng.choice(
        (
            re.sub(r"\d+(?=[,)])", lambda found: rng.choice((number, found[0])), text),
            text.replace("|u1", rng.choice(("|O", "<f8", "<i8", "|S9", "<U3", "|b1", "|V4", "<c16", ">u2"))),
            text.replace("False", rng.choice(("True", "None", "0", "__import__('os')"))),
            text.replace("(", "(" * rng.choice((2, 100))),
            "{" * rng.choice((1, 5000)) + text,
            text.replace("'shape'", "'shpe'"),
        )
    )
    version = rng.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"))
    size = rng.choice((len(text), len(text), rng.choice(NUMBERS)))
    width = 2 if version == b"\x01\x00" else 4
    return b"\x93NUMPY" + version + (size % (1 << 8 * width)).to_bytes(width, "little") + text.encode() + values


def pickle_numbers(content: bytes, rng: random.Random) -> bytes:
    """A pickle with other whole numbers, or another global name."""
    found: re.Match[bytes] = rng.choice(list(re.finditer(rb"K.|M..|J....|c[\w.]+\n\w+\n", content, re.DOTALL)))
    if found[0].startswith(b"c"):
        names = (
            b"builtins\neval\n",
            b"os\nsystem\n",
            b"builtins\nbytearray\n",
            b"torch\nTensor\n",
            b"collections\nCounter\n",
        )
        new = b"c" + rng.choice(names)
    else:
        number = rng.choice((*NUMBERS[:10], -1))
        new = b"J" + struct.pack("<i", number)
    return content[: found.start()] + new + content[found.end() :]


def signed(mutate: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """The same for a file that begins with the digest of the rest, which is made to fit."""

    def change(data: bytes, rng: random.Random) -> bytes:
        content = mutate(data[32:], rng)
        return hashlib.sha256(content).digest() + content

    return change


MUTATIONS: dict[str, tuple[Callable[[bytes, random.Random], bytes], ...]] = {
    "cbpq": (anywhere, safetensors_header, safetensors_header),
    "safetensors": (anywhere, safetensors_header),
    "pth": (anywhere, zip_members, zip_members, zip_directory),
    "old pth": (anywhere, anywhere, pickle_numbers),
    "state": (anywhere, signed(anywhere), signed(zip_members), signed(zip_members), signed(zip_directory)),
    "npz": (anywhere, zip_members, zip_members, zip_directory),
}
