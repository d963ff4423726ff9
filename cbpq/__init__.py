"""Lead every weight of a pretrained image classifier to one of a few allowed values.

Two lines in a training loop of your own:

    constrained = cbpq.constrain(model, optimizer, "two-bit-shift")
    ...                                    # your loop, unchanged
    constrained.end_epoch()

``quantize`` is the whole job from source to file; ``load``, ``evaluate``, ``inspect`` and ``export`` work on that file.
Every name is imported on first use, so that ``import cbpq`` costs nothing and does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from cbpq import errors

if TYPE_CHECKING:
    from cbpq.api import evaluate
    from cbpq.constrained import constrain
    from cbpq.exports import export
    from cbpq.inspection import inspect_file as inspect
    from cbpq.model_file import load, save
    from cbpq.pipeline import quantize

    __version__: str

__all__ = ["__version__", "constrain", "errors", "evaluate", "export", "inspect", "load", "quantize", "save"]

# Where each public name lives. None may be called like a submodule of this package: importing the submodule would
# put the module in the function's place.
_HOMES = {
    "Constrained": ("cbpq.constrained", "Constrained"),
    "constrain": ("cbpq.constrained", "constrain"),
    "evaluate": ("cbpq.api", "evaluate"),
    "export": ("cbpq.exports", "export"),
    "inspect": ("cbpq.inspection", "inspect_file"),
    "load": ("cbpq.model_file", "load"),
    "quantize": ("cbpq.pipeline", "quantize"),
    "save": ("cbpq.model_file", "save"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        module, attribute = _HOMES[name]
        value = getattr(importlib.import_module(module), attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The installed version, or in a checkout that is not installed the one ``pyproject.toml`` states."""
    from importlib import metadata

    try:
        return metadata.version("cbpq")
    except metadata.PackageNotFoundError:
        import tomllib
        from pathlib import Path

        project = Path(__file__).parents[1] / "pyproject.toml"
        if not project.is_file():
            return "unknown"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
