"""What a setting is: a field of a dataclass, with its value in every preset, its meaning and the values it may have."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, field, fields
from typing import Any, get_args

from cbpq.errors import UsageError


def setting(
    paper: Any,
    default: Any,
    little_data: Any,
    text: str,
    *,
    choices: Sequence[str] = (),
    least: float = 0,
    most: float = math.inf,
    idle: Mapping[str, Any] | None = None,
) -> Any:
    """A field: its value in preset ``paper``, in ``default`` and in ``little-data``, and its meaning.

    ``idle`` names other settings, or ``amp``, with the value beside which this one does nothing.
    """
    values = {"paper": paper, "default": default, "little-data": little_data}
    bounds = {"choices": tuple(choices), "least": least, "most": most}
    metadata = {"values": values, "help": text, **bounds, "idle": idle or {}}
    return field(default=default, metadata=metadata)


def settings_of(kind: type[Any]) -> Mapping[str, "Field[Any]"]:
    """The settings among a dataclass's fields, by name."""
    return {entry.name: entry for entry in fields(kind) if "values" in entry.metadata}


def parse_value(entry: "Field[Any]", value: Any, origin: str) -> Any:
    """A setting's value in its own type, from that type or from text.

    Raises:
        UsageError: a value that does not fit; the message names ``origin``.
    """
    kind = _kind(entry)
    try:
        parsed = _convert(kind, value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"setting {entry.name}: {value!r} from {origin} is no {_KIND_NAMES[kind]}") from error
    choices = entry.metadata["choices"]
    if choices and parsed not in choices:
        raise UsageError(f"setting {entry.name}: {value!r} from {origin} is none of {', '.join(choices)}")
    if kind in (int, float):
        least, most = entry.metadata["least"], entry.metadata["most"]
        if not least <= parsed <= most or parsed == math.inf:
            bound = f"between {least:g} and {most:g}" if most < math.inf else f"at least {least:g}"
            raise UsageError(f"setting {entry.name}: {value!r} from {origin} must be {bound}")
    return parsed


_KIND_NAMES = {int: "whole number", float: "number", bool: "truth value (true or false)", str: "text"}
TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _kind(entry: "Field[Any]") -> type:
    annotation = entry.type
    if get_args(annotation) or not isinstance(annotation, type):
        raise TypeError(f"setting {entry.name} must have a plain type")
    return annotation


def _convert(kind: type, value: Any) -> Any:
    if isinstance(value, bool) != (kind is bool) and not isinstance(value, str):
        raise TypeError
    if kind is bool and isinstance(value, str):
        if value.lower() not in TRUTH:
            raise ValueError
        return TRUTH[value.lower()]
    if kind is int and isinstance(value, float):
        if value != int(value):
            raise ValueError
        return int(value)
    if kind is str and not isinstance(value, str):
        raise TypeError
    return kind(value)
