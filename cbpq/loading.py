"""Networks with their weights: from a file, from what is published, or random."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cbpq.architectures import Architecture, accepts, build, imported, is_timm
from cbpq.checkpoints import check_fit, content_sha256, load_strictly, read_weights
from cbpq.errors import SourceError, UsageError, brief
from cbpq.identification import Fit, fit, identify, image_size
from cbpq.inputs import InputSpec, override_fields
from cbpq.lazy import Lazy
from cbpq.published import timm_input, torchvision_entry, torchvision_input
from cbpq.sources import LoadedModel, SourceInfo, logits
from cbpq.tracing import untouched

timm = Lazy("timm")

_WITH_HEADS = ("googlenet", "inception_v3")  # torchvision's networks with auxiliary heads and their own input scaling
Overrides = Mapping[str, Any]


def from_weights(path: Path, architecture: Architecture | None, overrides: Overrides) -> LoadedModel:
    """The network of a weight file; without ``architecture`` the file must tell it."""
    state, metadata = read_weights(path)
    size = _size(overrides)
    notes: tuple[str, ...] = ()
    if architecture is None:
        found, notes = identify(path, state, metadata, size)
    else:
        ours = metadata.get("architecture") in (str(architecture), architecture.name)
        found = fit(architecture, state, metadata.get("arguments", {}) if ours else {}, size)
    if found.problem:
        raise SourceError(
            f"{path} and {found.architecture} do not fit together: {found.problem}; {_advice(found, size)}"
        )
    entry, known = None, False
    if found.architecture.library == "torchvision":
        entry, known = torchvision_entry(found.architecture.name, path)
    return _filled(found, overrides, metadata, entry, known, notes)


def from_torchvision(architecture: Architecture, overrides: Overrides) -> LoadedModel:
    """A network with the weights that torchvision publishes as its default."""
    entry, _ = torchvision_entry(architecture.name, None)
    try:
        state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # urllib, sockets, the file system, a wrong hash
        raise SourceError(_not_fetched(str(architecture), error)) from error
    found = fit(architecture, state, {}, _size(overrides))
    if found.problem:
        raise SourceError(
            f"torchvision's own weights do not fit its {architecture}: {found.problem}; update torchvision"
        )
    return _filled(found, overrides, {}, entry, True, ())


def from_timm(source: str, overrides: Overrides) -> LoadedModel:
    """A network with weights that timm fetches; ``source`` is timm's name or ``hf-hub:owner/name``."""
    arguments: dict[str, Any] = {}
    try:
        if source.startswith("hf-hub:"):
            with _quiet_hub():
                _, name, saved = timm.models.load_model_config_from_hf(source.removeprefix("hf-hub:"))
            arguments |= saved
        else:
            name = source
        asked = _asked(Architecture("timm", name), None, overrides)
        with _quiet_hub():
            model: nn.Module = timm.create_model(source, pretrained=True, **asked)
    except Exception as error:  # the hub's client raises many kinds; so does timm on what it fetched
        raise SourceError(_not_fetched(source, error)) from error
    architecture = Architecture("timm", name)
    arguments = _json(arguments | asked | {"num_classes": getattr(model, "num_classes", 0)}, str(architecture))
    model = model.float().eval()
    skeleton = build(architecture, arguments, meta=True)
    check_fit(skeleton, model.state_dict(), f"the weights of {source} and timm's {name}", "update timm")
    spec = _input_spec(architecture, model, arguments, overrides, {}, None)
    return finish(architecture, arguments, model, spec)


def unfilled(
    architecture: Architecture, num_classes: int | None, overrides: Overrides, *, trained: bool
) -> LoadedModel:
    """A network as its constructor leaves it: random, or ``trained`` by the user's own function."""
    arguments = _asked(architecture, num_classes, overrides)
    if architecture.name in _WITH_HEADS and architecture.library == "torchvision":
        arguments["aux_logits"] = True
    model = build(architecture, arguments)
    spec = _input_spec(architecture, model, arguments, overrides, {}, None)
    return finish(architecture, arguments, model, spec, hashed=trained)


def finish(
    architecture: Architecture,
    arguments: Mapping[str, Any],
    model: nn.Module,
    spec: InputSpec,
    notes: tuple[str, ...] = (),
    *,
    hashed: bool = True,
) -> LoadedModel:
    """Count the classes, which also proves that the network takes its input, and write everything down."""
    classes = count_classes(architecture, arguments, model, spec)
    complete = dict(arguments)
    if architecture.library != "callable":
        complete.setdefault("num_classes", classes)
    sha256 = content_sha256(model.state_dict()) if hashed else None
    info = SourceInfo(architecture.library, architecture.name, _json(complete, str(architecture)), spec, sha256)
    return LoadedModel(model, info, classes, notes)


def count_classes(architecture: Architecture, arguments: Mapping[str, Any], model: nn.Module, spec: InputSpec) -> int:
    """Classes of a network, from a forward pass of one empty picture.

    Raises:
        UsageError: the network does not take pictures of this shape.
        SourceError: it returns no class scores.
    """
    if getattr(model, "num_classes", None) == 0:
        raise SourceError(f"{architecture} has no classifier, it only computes features; choose weights that have one")
    # on the meta device first, where nothing is computed: a file may ask for pictures of any size
    networks = [model] if architecture.library == "callable" else [build(architecture, arguments, meta=True), model]
    for network in networks:
        anchor = next(iter(network.parameters()), torch.zeros(()))
        try:
            with torch.no_grad(), untouched(network):
                scores = logits(network(torch.zeros(1, spec.channels, spec.height, spec.width, device=anchor.device)))
        except (SourceError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a foreign forward pass
            failure = brief(error)
            continue
        if scores.dim() != 2 or scores.shape[0] != 1:
            raise SourceError(
                f"{architecture} returns {tuple(scores.shape)} for one picture; it must return (1, classes)"
            )
        return scores.shape[1]
    raise UsageError(
        f"{architecture} does not take pictures of {spec.channels}×{spec.height}×{spec.width} ({failure}); "
        "give the size it was made for with --input-size"
    )


def _filled(
    found: Fit,
    overrides: Overrides,
    metadata: Mapping[str, Any],
    entry: Any,
    known: bool,
    notes: tuple[str, ...],
) -> LoadedModel:
    """Build the network and load it; ``entry`` is torchvision's for these weights, for sure if it is ``known``."""
    architecture, arguments = found.architecture, _json(found.arguments, str(found.architecture))
    if entry is not None and architecture.name in _WITH_HEADS and "transform_input" not in arguments:
        if known:
            arguments["transform_input"] = True  # as torchvision builds them around these weights
        else:
            notes += (
                f"{architecture} is built with transform_input off; if these are torchvision's published weights, "
                f"keep their file name, {entry.url.rpartition('/')[2]}",
            )
    if entry is not None and not known and "input_spec" not in metadata and len(type(entry).__members__) > 2:
        notes += (f"preprocessing is that of torchvision's {entry}; --input-size and --crop-pct change it",)
    model = build(architecture, arguments)
    load_strictly(model, found.state, f"the weights and {architecture}", "use --arch")
    spec = _input_spec(architecture, model, arguments, overrides, metadata, entry)
    return finish(architecture, arguments, model, spec, notes)


def _input_spec(
    architecture: Architecture,
    model: nn.Module,
    arguments: Mapping[str, Any],
    overrides: Overrides,
    metadata: Mapping[str, Any],
    entry: Any,
) -> InputSpec:
    """The input of a network: its file's word, else its library's or its function's, changed as the user asks."""
    given: Any = metadata.get("input_spec")
    args: Mapping[str, Any] = metadata.get("args", {})
    built: dict[str, Any] = {}  # what the constructor's arguments say of the input
    if given is None and architecture.library == "torchvision":
        given = torchvision_input(entry or torchvision_entry(architecture.name, None)[0])
        built = {"input_size": arguments.get("image_size") or arguments.get("input_size")}
        crop, resize = args.get("val_crop_size"), args.get("val_resize_size")  # of torchvision's training script
        if isinstance(crop, int) and isinstance(resize, int) and 0 < crop <= resize:
            built = {"input_size": crop, "crop_pct": crop / resize}
    elif given is None and architecture.library == "timm":
        given = timm_input(model, args)
        size = arguments.get("img_size") or (given.height, given.width)
        height, width = (size, size) if isinstance(size, int) else size
        built = {"input_size": (arguments.get("in_chans", given.channels), height, width)}
    elif given is None:
        given = getattr(imported(architecture.name), "input_spec", None) or getattr(model, "input_spec", None)
        if given is None and isinstance(getattr(model, "pretrained_cfg", None), dict):
            given = timm_input(model, {})
        if given is None and overrides.get("input_size") is None:
            raise UsageError(
                f"the input size of {architecture} is not known; give --input-size, or set the function's attribute "
                "input_spec"
            )
    if isinstance(given, InputSpec):
        return given.replaced(built).replaced(overrides)
    if given is None:
        return InputSpec.from_dict(override_fields(overrides))
    try:
        if not isinstance(given, Mapping):
            raise UsageError(f"it is a {type(given).__name__}, no dictionary")
        spec = InputSpec.from_dict(given)
    except UsageError as error:
        where = "its metadata" if "input_spec" in metadata else f"{architecture.name}.input_spec"
        raise SourceError(f"the input of {architecture} according to {where} is unusable: {error}") from error
    return spec.replaced(overrides)


def _asked(architecture: Architecture, num_classes: int | None, overrides: Overrides) -> dict[str, Any]:
    """Constructor arguments that follow from the user's request alone."""
    arguments: dict[str, Any] = {}
    if num_classes is not None and accepts(architecture, "num_classes"):
        arguments["num_classes"] = num_classes
    fields = override_fields(overrides)
    if fields.get("channels", 3) != 3 and accepts(architecture, "in_chans"):
        arguments["in_chans"] = fields["channels"]
    if architecture.library != "callable" and (size := _size(overrides)):
        arguments |= image_size(architecture, build(architecture, arguments, meta=True), {}, size)
    return arguments


def _size(overrides: Overrides) -> Sequence[int]:
    fields = override_fields(overrides)
    return (fields["height"], fields["width"]) if "height" in fields else ()


def _advice(found: Fit, size: Sequence[int]) -> str:
    architecture, state = found.architecture, found.state
    if architecture.library == "torchvision" and is_timm(architecture.name):
        other = Architecture("timm", architecture.name)
        if not fit(other, state, {}, size).problem:
            return f"it is timm's network of that name: {other}"
    return "name the right architecture"


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub's client logs each of its many attempts; the one error in the end says it all."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _not_fetched(source: str, error: Exception) -> str:
    return (
        f"the weights of {source} could not be fetched ({type(error).__name__}: {brief(error)}); check the "
        "connection, or fetch the file by other means and give it with --weights"
    )


def _json(arguments: Mapping[str, Any], what: str) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SourceError(
            f"the arguments of {what} are not plain data ({brief(error)}), so no file can keep them"
        ) from error
    return plain
