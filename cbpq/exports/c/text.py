"""Pieces of C text: names, comments, numbers and arrays."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH = 120
TYPES = {"float32": "float", "uint8": "uint8_t", "int8": "int8_t", "int16": "int16_t", "int32": "int32_t"}
TYPES |= {"int64": "int64_t"}


def kernel(name: str) -> str:
    """The text of one of this package's C files."""
    return (files("cbpq.exports.c") / "kernels" / f"{name}.c").read_text(encoding="utf-8")


def identifier(number: int, name: str) -> str:
    """A C name for a layer of any name: the number makes it unique, and its letter no keyword."""
    readable = re.sub(r"[^A-Za-z0-9]+", "_", name)[-40:].strip("_")
    return f"w{number}_{readable}" if readable else f"w{number}"


def comment(text: str) -> str:
    """``text`` as one comment, without anything that could end it or mean something to a compiler."""
    return f"/* {re.sub(r'[^A-Za-z0-9_.,:;()<>= +-]', '_', text)} */"


def number(value: float) -> str:
    """A float constant of exactly this float32; for an infinity the largest there is."""
    limits = np.finfo(np.float32)
    single = float(np.clip(np.float32(value), limits.min, limits.max))
    text = f"{single:.9g}"
    return f"{text}f" if re.search(r"[.e]", text) else f"{text}.0f"


def literals(values: NDArray[Any]) -> list[str]:
    """The elements as C constants."""
    if values.dtype == np.float32:
        return [number(value) for value in values.ravel().tolist()]
    if values.dtype == np.int64:
        return [f"INT64_C({value})" for value in values.ravel().tolist()]
    return [str(value) for value in values.ravel().tolist()]


def array(name: str, values: NDArray[Any]) -> str:
    """``static const`` array of the elements in order."""
    return f"static const {TYPES[values.dtype.name]} {name}[{values.size}] = {{\n{wrapped(literals(values))}\n}};\n"


def wrapped(items: Iterable[str], indent: int = 4) -> str:
    """Items with commas in lines of at most `WIDTH` characters."""
    space, lines, line, length = " " * indent, list[str](), list[str](), indent
    for item in items:
        if line and length + len(item) + 2 > WIDTH:
            lines.append(space + ", ".join(line) + ",")
            line, length = [], indent
        line.append(item)
        length += len(item) + 2
    return "\n".join([*lines, space + ", ".join(line)])


def paragraph(text: str) -> str:
    """Sentences as a comment of several lines."""
    lines = textwrap.wrap(text, WIDTH - 6)
    return "/* " + "\n   ".join(lines) + " */\n"


def structure(kind: str, name: str, fields: Sequence[tuple[str, object]]) -> str:
    """``static const`` structure with named fields."""
    inside = wrapped([f".{field} = {value}" for field, value in fields])
    return f"static const {kind} {name} = {{\n{inside}\n}};\n"
