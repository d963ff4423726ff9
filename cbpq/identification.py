"""Which network a weight file belongs to: asked of its metadata, then of its name, and proven by a strict fit."""

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cbpq.architectures import Architecture, accepts, build, is_timm, known_names, parse_architecture
from cbpq.checkpoints import misfit
from cbpq.errors import SourceError, UsageError, did_you_mean
from cbpq.layers import end_layers
from cbpq.published import recognised

_SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Fit:
    """How a state dict fits a network. ``problem`` is empty if strictly, with these arguments and this naming."""

    architecture: Architecture
    arguments: dict[str, Any]
    state: State
    problem: str


def fit(architecture: Architecture, state: State, arguments: Mapping[str, Any], size: Sequence[int] = ()) -> Fit:
    """Try a state dict on a network, with number of classes, channels and input size read from its shapes.

    Args:
        architecture: the network.
        state: the weights.
        arguments: for the constructor; they are completed, never replaced, but for the number of classes.
        size: (height, width) for networks that are built for one input size which the weights do not show (Swin).
    """
    complete = dict(arguments)
    try:
        model = build(architecture, complete, meta=True)
        if getattr(model, "num_classes", None) == 0 and accepts(architecture, "num_classes"):
            complete["num_classes"] = 1  # a backbone: any classifier shows where the weights' own would be
            model = build(architecture, complete, meta=True)
        adapted = _from_shapes(architecture, model, state, complete, size)
        complete |= adapted
        if set(adapted) - {"num_classes"} or misfit(model.state_dict(), state):
            model = build(architecture, complete, meta=True)
    except SourceError as error:
        return Fit(architecture, complete, state, str(error))
    expected = model.state_dict()
    problem = misfit(expected, state)
    if problem and (rename := _RENAMES.get(architecture.library)):
        renamed = rename(model, state)
        if not misfit(expected, renamed):
            return Fit(architecture, complete, renamed, "")
    return Fit(architecture, complete, state, problem)


def _from_shapes(
    architecture: Architecture, model: nn.Module, state: State, arguments: Mapping[str, Any], size: Sequence[int]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    own = dict(model.named_parameters())
    first, last = end_layers(model)
    name = last[0] if last else ""
    if name in state and accepts(architecture, "num_classes"):
        classes = state[name].shape[0] if state[name].dim() else 0
        # always written down for the libraries, whose default could change
        if classes and (architecture.library != "callable" or classes != own[name].shape[0]):
            found["num_classes"] = classes
    if first and first[0] in state and accepts(architecture, "in_chans"):
        here, there = own[first[0]].shape, state[first[0]].shape
        if len(here) == len(there) == 4 and here[1] != there[1]:
            found["in_chans"] = there[1]
    if architecture.library == "torchvision" and architecture.name in ("googlenet", "inception_v3"):
        found["aux_logits"] = any(name.lower().startswith("aux") for name in state)
    found |= image_size(architecture, model, state, size)
    return {key: value for key, value in found.items() if key == "num_classes" or key not in arguments}


def image_size(architecture: Architecture, model: nn.Module, state: State, size: Sequence[int]) -> dict[str, Any]:
    """The size a network must be built for: from its position embedding, else as asked if its size is fixed."""
    if architecture.library == "torchvision":
        if (table := state.get("encoder.pos_embedding")) is not None and table.dim() == 3:
            patch = getattr(model, "patch_size", 0)
            return {"image_size": math.isqrt(table.shape[1] - 1) * patch} if isinstance(patch, int) else {}
        if size and hasattr(model, "image_size") and size[0] == size[1]:
            return {"image_size": size[0]}
        return {"input_size": tuple(size)} if size and architecture.name.startswith("maxvit") else {}
    if architecture.library == "timm":
        config: Any = getattr(model, "pretrained_cfg", None) or {}
        table, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
        patches = getattr(model, "patch_embed", None)
        count, patch = getattr(patches, "num_patches", 0), getattr(patches, "patch_size", None)
        if count and isinstance(table, Tensor) and isinstance(own, Tensor) and table.dim() == own.dim() == 3 and patch:
            if table.shape == own.shape:
                return {}
            side = math.isqrt(max(table.shape[1] - (own.shape[1] - count), 1))  # without class and register tokens
            return {"img_size": side * patch[0]}
        if size and config.get("fixed_input_size") and tuple(size) != tuple(config["input_size"][1:]):
            return {"img_size": list(size)}
    return {}


def _old_torchvision_names(model: nn.Module, state: State) -> State:
    """torchvision's published DenseNet and ViT files have names of earlier versions, which its own loading knows."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)
        name = re.sub(r"\.mlp\.linear_([12])\.", lambda found: f".mlp.{0 if found[1] == '1' else 3}.", name)
        renamed[name] = tensor
    return renamed


def _timm_names(model: nn.Module, state: State) -> State:
    """The original authors' names for a network, in timm's own translation; resampled tables are not accepted."""
    translate: Callable[..., Any] | None = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if translate is None:
        return state
    try:
        renamed = translate(dict(state), model)
    except Exception:  # written for one family of files, it may stumble over any other
        return state
    sizes = {tensor.numel() for tensor in state.values()}
    fits = isinstance(renamed, dict) and all(isinstance(t, Tensor) and t.numel() in sizes for t in renamed.values())
    return renamed if fits else state


_RENAMES = {"torchvision": _old_torchvision_names, "timm": _timm_names}


def identify(
    path: Path, state: State, metadata: Mapping[str, Any], size: Sequence[int] = ()
) -> tuple[Fit, tuple[str, ...]]:
    """Find the network of a weight file, and notes for the user on what was decided between.

    Raises:
        UsageError: neither metadata nor name tell, or several networks fit; the candidates are listed.
        SourceError: the network is told, but the weights do not fit it.
    """
    said = metadata.get("architecture", "")
    groups: list[list[Architecture]] = []
    if ":" in said:
        architecture = parse_architecture(said)
        if architecture.library == "callable":
            raise UsageError(
                f"{path} says that its network is {said}, which is code on your side; repeat with --arch {said} "
                "if you trust it"
            )
        groups = [[architecture]]
    elif said and (candidates := _named(said)):
        if metadata.get("saver") == "timm" and len(candidates) > 1:
            candidates = [candidate for candidate in candidates if candidate.library == "timm"]
        groups = [candidates]
    elif found := recognised(path):
        groups = [[found[0]], *_from_file_name(path.name)]
    groups = groups or _from_file_name(path.name)
    if not groups:
        names = known_names("torchvision") | known_names("timm")
        hint = f" (its metadata says {said!r}, which is no known network)" if said else ""
        raise UsageError(
            f"cannot tell the network from the name or the metadata of {path}{hint}; name it with --arch, such as "
            f"--arch resnet18{did_you_mean(_stem(path.name), names)}"
        )
    tried: list[Fit] = []
    for group in groups:
        fits = [fit(candidate, state, metadata.get("arguments", {}), size) for candidate in group]
        good = [candidate for candidate in fits if not candidate.problem]
        if good:
            return _only(path, good)
        tried += fits
    listed = ", ".join(str(candidate.architecture) for candidate in tried)
    raise SourceError(f"{path} does not fit {listed}: {tried[0].problem}; name the right architecture with --arch")


def _only(path: Path, good: list[Fit]) -> tuple[Fit, tuple[str, ...]]:
    if len(good) == 1:
        return good[0], ()
    # a name without prefix means torchvision's network wherever it can be given, so also here
    names = [str(candidate.architecture) for candidate in good]
    if good[0].architecture.library == "torchvision" and len(good) == 2:
        return good[0], (f"{path.name} is taken for torchvision's {names[0]}; --arch {names[1]} means timm's",)
    raise UsageError(f"{path} fits several networks: {', '.join(names)}; choose one with --arch")


def _named(name: str) -> list[Architecture]:
    """Both libraries' networks of exactly this name, torchvision's first."""
    found = [Architecture("torchvision", name)] if name in known_names("torchvision") else []
    return [*found, Architecture("timm", name)] if is_timm(name) else found


def _stem(name: str) -> str:
    while suffix := next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), ""):
        name = name.removesuffix(suffix)
    return name


def _from_file_name(file_name: str) -> list[list[Architecture]]:
    """Networks whose name begins the file name, up to a separator: the longest name first, by library within."""
    stem = _stem(file_name)
    groups = []
    for end in range(len(stem), 0, -1):
        if end < len(stem) and (stem[end].isalnum() or not stem[end - 1].isalnum()):
            continue
        candidates = _named(stem[:end])
        if candidates:
            groups.append(candidates)
    return groups
