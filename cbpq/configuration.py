"""Where the choices of a run come from: flag > ``CBPQ_*`` variable > configuration file > preset."""

import copy
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cbpq.errors import UsageError, did_you_mean
from cbpq.presets import COMMAND_LINE, SETTINGS, parse_setting
from cbpq.settings import TRUTH

PREFIX = "CBPQ_"
# What a file or variable may say beside the settings of the preset, with the value where nobody says anything.
CHOICES: dict[str, Any] = {
    "constraint": "two-bit-shift",
    "method": "cbp",
    "preset": "auto",
    "include": [],
    "exclude": [],
    "quantize_first": False,
    "quantize_last": False,
    "augment": "auto",
    "device": "auto",
    "amp": False,
    "pack": "bits",
    "half": False,
}

Layer = tuple[str, dict[str, Any]]


def read_config(path: Path) -> dict[str, Any]:
    """Settings and choices of a TOML file, such as the ``settings.toml`` of an earlier run.

    Raises:
        UsageError: no such file, no TOML, or an unknown key (with the nearest names).
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no valid TOML: {error}") from error
    for name in values:
        if name not in SETTINGS and name not in CHOICES:
            known = [*SETTINGS, *CHOICES]
            raise UsageError(f"{path}: unknown key {name!r}{did_you_mean(name, known)}")
    return values


def from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Settings and choices in ``CBPQ_*`` variables: CBPQ_EPOCHS=3 is ``epochs``. Unknown ones are not ours."""
    names = {PREFIX + name.upper(): name for name in (*SETTINGS, *CHOICES)}
    return {name: environment[variable] for variable, name in names.items() if variable in environment}


def parse_assignments(assignments: list[str]) -> dict[str, str]:
    """``key=value`` pairs of ``--set``.

    Raises:
        UsageError: no equals sign, no such setting, or two values for one.
    """
    values: dict[str, str] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"--set {assignment!r}: write key=value, for example --set warmup=0.1")
        parsed = parse_setting(name, value.strip(), "--set")
        if name in values and parse_setting(name, values[name], "--set") != parsed:
            raise UsageError(f"--set {name}={values[name]} and --set {assignment} contradict each other")
        values[name] = value.strip()
    return values


def combine(
    flags: Mapping[str, Any], assignments: list[str], environment: Mapping[str, str], config: Path | None
) -> tuple[dict[str, Any], dict[str, str], list[Layer]]:
    """All sources put in order.

    Args:
        flags: what the command line said, by name; None or an empty list for what it did not say.
        assignments: ``--set key=value``.
        environment: the process's variables.
        config: a configuration file.

    Returns:
        The choices by name, where each comes from, and the layers of settings for ``cbpq.presets.resolve``.

    Raises:
        UsageError: anything that cannot be read, or a setting given twice with different values.
    """
    said = {name: value for name, value in flags.items() if value not in (None, [], ())}
    assigned = parse_assignments(assignments)
    for name in assigned:
        if name in said and parse_setting(name, assigned[name], "--set") != said[name]:
            raise UsageError(f"--{name.replace('_', '-')} and --set {name}=… contradict each other")
    sources: list[Layer] = [
        (str(config), read_config(config) if config else {}),
        ("environment", dict(from_environment(environment))),
        (COMMAND_LINE, {**assigned, **said}),
    ]
    choices, origins = copy.deepcopy(CHOICES), dict.fromkeys(CHOICES, "default")
    for origin, values in sources:
        for name in values.keys() & CHOICES.keys():
            choices[name], origins[name] = _parse_choice(name, values[name], origin), origin
    layers = [(origin, {n: v for n, v in values.items() if n in SETTINGS}) for origin, values in sources]
    return choices, origins, layers


def _parse_choice(name: str, value: Any, origin: str) -> Any:
    default = CHOICES[name]
    if isinstance(default, list):
        parts = [part for part in value.split(",") if part] if isinstance(value, str) else value
        if isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts):
            return list(parts)
    elif isinstance(default, bool):
        found = TRUTH.get(str(value).lower())
        if found is not None:
            return found
    elif isinstance(value, str):
        return value
    raise UsageError(f"{name}: {value!r} from {origin} does not fit")
