"""What is known of published weights without fetching them: their files' names and hashes, and the input they take."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from cbpq.architectures import Architecture, known_names
from cbpq.checkpoints import file_sha256
from cbpq.errors import SourceError, UsageError
from cbpq.inputs import InputSpec
from cbpq.lazy import Lazy

timm, torchvision = Lazy("timm"), Lazy("torchvision")

_HASH = re.compile(r"-([0-9a-f]{8,64})(?![0-9a-z])")  # torchvision's files end in the start of their SHA-256
_TIMM_INPUT = ("input_size", "img_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@functools.cache
def _torchvision_hashes() -> dict[str, tuple[str, Any]]:
    """First 8 digits of the SHA-256 of each file torchvision publishes → (network, entry of its weights enum)."""
    table = {}
    for name in known_names("torchvision"):
        for entry in torchvision.models.get_model_weights(name):
            if found := _HASH.search(entry.url):
                table[found[1][:8]] = (name, entry)
    return table


@functools.cache
def _timm_files() -> dict[str, list[str]]:
    """Name of each file that timm's configurations link to → networks with tag; torchvision's files left out."""
    table: dict[str, list[str]] = {}
    for name in timm.list_models(pretrained=True, include_tags=True):
        config: Any = timm.get_pretrained_cfg(name)
        if config.url and "download.pytorch.org" not in config.url:
            table.setdefault(config.url.rpartition("/")[2], []).append(name)
    return table


def recognised(path: Path) -> tuple[Architecture, Any] | None:
    """The network of a published file, known by its bytes or by its full name, with torchvision's entry for it."""
    for digits in (file_sha256(path), *_HASH.findall(path.name)):
        if found := _torchvision_hashes().get(digits[:8]):
            return Architecture("torchvision", found[0]), found[1]
    names = _timm_files().get(path.name, [])
    return (Architecture("timm", names[0]), None) if len(names) == 1 else None


def torchvision_entry(name: str, path: Path | None) -> tuple[Any, bool]:
    """torchvision's entry for the weights of a network in a file, and whether it is known to be that entry.

    A hash in the file name that torchvision no longer lists (``resnet50-19c8e357.pth``) is of an earlier release of the
    first entry. Anything else is taken for the current default.
    """
    entries = torchvision.models.get_model_weights(name)
    found = recognised(path) if path is not None else None
    if found is not None and found[0].name == name and found[1] is not None:
        return found[1], True
    if path is not None and re.search(rf"^{re.escape(name)}-[0-9a-f]{{8}}\.pth$", path.name):
        return next(iter(entries)), True
    return entries.DEFAULT, False


def torchvision_input(entry: Any) -> InputSpec:
    """The input that an entry of torchvision's weights enums is evaluated with."""
    transform = entry.transforms()
    size = int(transform.crop_size[0])
    return InputSpec(
        channels=3,
        height=size,
        width=size,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
        crop_pct=size / int(transform.resize_size[0]),
    )


def timm_input(model: nn.Module, args: Mapping[str, Any]) -> InputSpec:
    """The input of a timm network: its configuration, and what the command line kept in a checkpoint changed.

    Raises:
        SourceError: values that make no sense.
    """
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    resolve: Any = timm.data.resolve_data_config  # timm's functions are partly typed
    chosen = {key: args[key] for key in _TIMM_INPUT if args.get(key) is not None}
    try:
        data = resolve(chosen, pretrained_cfg=config)
        channels, height, width = data["input_size"]
        mean, std = tuple(data["mean"]), tuple(data["std"])
        fields = {
            "mean": mean if len(mean) == channels else None,
            "std": std if len(std) == channels else None,
            **{key: data[key] for key in ("interpolation", "crop_pct", "crop_mode")},
        }
        return InputSpec.from_dict({"channels": channels, "height": height, "width": width, **fields})
    except (AssertionError, TypeError, ValueError, UsageError) as error:
        raise SourceError(f"the network's own input settings {chosen or config} make no sense: {error}") from error
