"""Networks by name: torchvision's, timm's and the user's own functions, built without weights."""

import contextlib
import functools
import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cbpq.errors import SourceError, UsageError, brief, did_you_mean
from cbpq.lazy import Lazy

timm, torchvision = Lazy("timm"), Lazy("torchvision")

# They would read files or fetch from the network; arguments may come from a file, which must not have that power.
_FORBIDDEN = {
    *("pretrained", "weights", "weights_backbone", "progress", "checkpoint_path", "cache_dir"),
    *("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_model_args"),
}
_MOST_CLASSES = 10_000_000  # more is damage in a file, and would only end in a lack of memory


@dataclass(frozen=True)
class Architecture:
    """A network's name in one of the libraries ``torchvision``, ``timm`` (with or without a tag) or ``callable``."""

    library: str
    name: str

    def __str__(self) -> str:
        """The name as the user writes it."""
        return f"timm:{self.name}" if self.library == "timm" else self.name


@functools.cache
def known_names(library: str) -> frozenset[str]:
    """Names of the classification networks of ``torchvision`` or ``timm``."""
    if library == "torchvision":
        return frozenset(torchvision.models.list_models(module=torchvision.models))
    return frozenset(timm.list_models())


def available_models(glob: str = "*") -> list[tuple[str, str]]:
    """(library, name) of every known network whose name matches a shell-style glob, torchvision's first."""
    return [
        (library, name)
        for library in ("torchvision", "timm")
        for name in sorted(known_names(library))
        if fnmatchcase(name, glob)
    ]


def is_timm(name: str) -> bool:
    """Whether timm has a network of this name, tag or not; retired names count, a made-up tag does not."""
    if not timm.is_model(name):
        return False
    base, _, tag = name.partition(".")
    return not tag or name in timm.models.get_arch_pretrained_cfgs(base)


def parse_architecture(text: str) -> Architecture:
    """Read ``resnet18`` (torchvision before timm), ``timm:NAME[.TAG]``, ``torchvision:NAME`` or ``package.module:f``.

    Raises:
        UsageError: no such network; the message has the nearest names.
    """
    library, colon, name = text.partition(":")
    if colon and library not in ("timm", "torchvision"):
        return Architecture("callable", text)
    if not colon:
        library, name = "", text
    if library != "timm" and name in known_names("torchvision"):
        return Architecture("torchvision", name)
    if library != "torchvision" and is_timm(name):
        return Architecture("timm", name)
    base, _, tag = name.partition(".")
    if library != "torchvision" and tag and timm.is_model(base):
        tags = [known.partition(".")[2] for known in timm.models.get_arch_pretrained_cfgs(base)]
        raise UsageError(f"timm's {base} has no weights tagged {tag!r}{did_you_mean(tag, tags) or f'; it has {tags}'}")
    names = {other for known in ("torchvision", "timm") if library in ("", known) for other in known_names(known)}
    raise UsageError(f"unknown network {text!r}{did_you_mean(name, names)}; list them with: cbpq models")


def build(architecture: Architecture, arguments: Mapping[str, Any], *, meta: bool = False) -> nn.Module:
    """Build a network with random weights: float32, evaluation mode, on the CPU.

    Args:
        architecture: which one.
        arguments: for its constructor.
        meta: leave out the values (parameters on the ``meta`` device) where the constructor allows it; cheap and safe
            for comparing shapes. The user's own functions are always run as they are.

    Raises:
        UsageError: the user's function cannot be imported.
        SourceError: the constructor refuses the arguments, or returns no network.
    """
    checked_arguments(arguments)
    constructor = _constructor(architecture)
    options = dict(arguments)
    if architecture.library == "torchvision" and architecture.name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", False)  # else they warn, and take seconds for values soon overwritten
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if meta and architecture.library != "callable":
            # some constructors compute with their tensors (RegNet), which meta tensors cannot
            with contextlib.suppress(Exception), torch.device("meta"):
                return _finished(architecture, constructor(**options))
        try:
            model = constructor(**options)
        except Exception as error:  # foreign code: any exception is possible
            shown = json.dumps(dict(arguments), default=str)
            raise SourceError(f"{architecture} cannot be built with arguments {shown}: {brief(error)}") from error
    return _finished(architecture, model)


def _finished(architecture: Architecture, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise SourceError(f"{architecture} returns a {type(model).__name__}; it must return a torch.nn.Module")
    device = None if any(parameter.is_meta for parameter in model.parameters()) else "cpu"
    return model.to(device=device, dtype=torch.float32).eval().requires_grad_(True)


def _constructor(architecture: Architecture) -> Callable[..., Any]:
    library, name = architecture.library, architecture.name
    if library == "callable":
        return imported(name)
    # the name may come from a file: only registered names, so that timm fetches nothing (hf-hub:, local-dir:)
    if library == "torchvision" and name in known_names("torchvision"):
        return functools.partial(torchvision.models.get_model, name, weights=None)
    if library == "timm" and timm.is_model(name.partition(".")[0]):
        # a tag that this version of timm does not know would be an error, but only the preprocessing depends on it
        return functools.partial(timm.create_model, name if is_timm(name) else name.partition(".")[0])
    raise SourceError(f"this installation's {library} has no network {name!r}; install a version that has it")


def checked_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse constructor arguments that reach beyond building a network.

    Raises:
        SourceError: such an argument, or an impossible number of classes.
    """
    if bad := sorted(_FORBIDDEN & set(arguments)):
        raise SourceError(
            f"the argument {bad[0]!r} is not allowed for a network, because it loads something; remove it"
        )
    classes = arguments.get("num_classes", 1)
    if isinstance(classes, bool) or not isinstance(classes, int) or not 1 <= classes <= _MOST_CLASSES:
        raise SourceError(f"a network with {classes!r} classes is impossible; give a whole number from 1 up")


def accepts(architecture: Architecture, argument: str) -> bool:
    """Whether the constructor is known to take an argument of this name."""
    if architecture.library == "callable":
        try:
            return argument in inspect.signature(imported(architecture.name)).parameters
        except ValueError:  # no signature to be had, as for some functions written in C
            return False
    return argument == "num_classes" or (argument == "in_chans" and architecture.library == "timm")


def imported(path: str) -> Callable[..., Any]:
    """The function or class that ``package.module:name`` means; the current directory is searched first.

    Raises:
        UsageError: the path is malformed, or there is no such module or name.
        SourceError: the module's own code fails.
    """
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise UsageError(f"{path!r} is not of the form package.module:function")
    try:
        with _current_directory_first():
            found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"cannot import {module_name!r} for {path!r}: {brief(error)}; run from the folder that contains it, "
            "or install its package"
        ) from error
    except Exception as error:  # the user's module runs here
        raise SourceError(f"importing {module_name!r} fails: {type(error).__name__}: {brief(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{module_name!r} has no {part!r}{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{path!r} is a {type(found).__name__}; name a function that returns the network")
    return found  # type: ignore[no-any-return] # callable() narrows Any to nothing


@contextlib.contextmanager
def _current_directory_first() -> Iterator[None]:
    """A console script, unlike ``python -m``, has its own folder on the path instead of the current directory."""
    here = str(Path.cwd())
    importlib.invalidate_caches()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
