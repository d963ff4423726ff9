"""From what the user names as the model, the source, to a network with weights and its own preprocessing.

A source is a torchvision name (``resnet18``), ``timm:NAME[.TAG]``, ``hf-hub:owner/name``, a weight file, a cbpq file,
or ``package.module:function``. Names that torchvision and timm share mean torchvision's. Nothing is fetched unasked.
"""

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cbpq import fileformat
from cbpq.architectures import Architecture, available_models, build, is_timm, known_names, parse_architecture
from cbpq.checkpoints import check_fit, load_strictly
from cbpq.errors import UsageError, did_you_mean
from cbpq.fileformat import CbpqFile, PackedFile
from cbpq.inputs import InputSpec, override_fields
from cbpq.loading import count_classes, from_timm, from_torchvision, from_weights, unfilled
from cbpq.packed import packed_network
from cbpq.sources import LoadedModel, SourceInfo, auxiliary_logits, logits

__all__ = [
    "InputSpec",
    "LoadedModel",
    "SourceInfo",
    "auxiliary_logits",
    "available_models",
    "build_model",
    "from_cbpq_file",
    "load_model",
    "logits",
]


def load_model(
    source: str,
    *,
    weights: Path | None = None,
    arch: str | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    input_overrides: Mapping[str, Any] | None = None,
    random: bool = False,
) -> LoadedModel:
    """Load a network.

    Args:
        source: a name, a file or a function, as the module says.
        weights: the weight file for a name or a function.
        arch: the network of a file that does not tell it itself.
        pretrained: fetch the published weights of a name; for a function: it returns a trained network.
        num_classes: what the network must have; only random weights take any number.
        input_overrides: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``.
        random: random weights on purpose, for trying things out.

    Raises:
        UsageError: unknown names, no such file, contradictory requests, or a network that cannot be told.
        SourceError: weights that cannot be read, fetched or fitted.
        FileFormatError: a damaged cbpq file.
    """
    overrides = dict(input_overrides or {})
    override_fields(overrides)  # a mistake in them is told before anything is read or fetched
    if sum((weights is not None, pretrained, random)) > 1:
        raise UsageError("weights, pretrained and random exclude each other; give one of them")
    path = _as_file(source)
    if path is not None:
        if weights is not None or pretrained or random:
            raise UsageError(f"{source} is itself a file of weights; leave out --weights and --pretrained")
        if fileformat.is_cbpq_file(path):
            loaded = from_cbpq_file(fileformat.read(path), arch)
            spec = loaded.info.input_spec.replaced(overrides)
            loaded.info = dataclasses.replace(loaded.info, input_spec=spec)
        else:
            loaded = from_weights(path, parse_architecture(arch) if arch else None, overrides)
    else:
        if arch is not None:
            raise UsageError(f"--arch is for files; {source!r} already names the network")
        loaded = _from_name(source, weights, pretrained, random, num_classes, overrides)
    if num_classes is not None and loaded.num_classes != num_classes:
        raise UsageError(f"{source} has {loaded.num_classes} classes, not {num_classes}; leave out --num-classes")
    return loaded


def from_cbpq_file(file: CbpqFile | PackedFile, arch: str | None = None) -> LoadedModel:
    """The network of a cbpq file with exactly its weights; of a `PackedFile` a network that keeps them packed.

    A network from the user's own code needs ``arch`` to name that code again, because loading it means running it.

    Raises:
        UsageError: ``arch`` is missing for such a network, or contradicts the file.
        FileFormatError: the source in the file is unusable.
        SourceError: the network cannot be built, or its weights are others than the file's.
    """
    info = SourceInfo.from_dict(file.source)
    if info.library == "callable" and arch is None:
        raise UsageError(
            f"this file's network is made by {info.architecture}, which is code on your side; "
            f"repeat with --arch {info.architecture} if you trust it"
        )
    if arch is not None and arch not in (info.architecture, f"{info.library}:{info.architecture}"):
        raise UsageError(f"--arch {arch} contradicts the file, whose network is {info.architecture}; leave it out")
    what, remedy = f"this file and {info.architecture}", f"it needs the {info.library} it was written with"
    if isinstance(file, PackedFile):
        model = packed_network(file, _architecture(info), info.arguments, what, remedy)
    else:
        model = _network(info, file, what, remedy)
    return LoadedModel(model, info, count_classes(_architecture(info), info.arguments, model, info.input_spec))


def _network(info: SourceInfo, file: CbpqFile, what: str, remedy: str) -> nn.Module:
    state = {name: torch.from_numpy(array.copy()) for name, array in file.state().items()}
    # first by shape alone, so that a damaged file cannot ask for any amount of memory
    if info.library != "callable":
        check_fit(build(_architecture(info), info.arguments, meta=True), state, what, remedy)
    model = build_model(info)
    load_strictly(model, state, what, remedy)
    return model


def build_model(info: SourceInfo) -> nn.Module:
    """The network of a file's metadata with random weights: float32, evaluation mode, on the CPU.

    Raises:
        UsageError: the user's function cannot be imported.
        SourceError: the network is unknown here, or refuses its arguments.
    """
    return build(_architecture(info), info.arguments)


def _architecture(info: SourceInfo) -> Architecture:
    return Architecture(info.library, info.architecture)


def _from_name(
    source: str,
    weights: Path | None,
    pretrained: bool,
    random: bool,
    num_classes: int | None,
    overrides: Mapping[str, Any],
) -> LoadedModel:
    hub = source.startswith(("hf-hub:", "hf_hub:"))
    architecture = None if hub else parse_architecture(source)
    if not (weights is not None or pretrained or random):
        raise UsageError(f"{source} names a network, but no weights; add --weights FILE, or --pretrained to fetch them")
    if architecture is None or (pretrained and architecture.library == "timm"):
        if not pretrained:
            raise UsageError(f"{source} names its own weights; use it with --pretrained alone")
        return from_timm(source.replace("hf_hub:", "hf-hub:") if architecture is None else architecture.name, overrides)
    if weights is not None:
        if weights.is_file() and fileformat.is_cbpq_file(weights):
            raise UsageError(f"{weights} is a cbpq file, which holds its network too; give it as the source")
        return from_weights(weights, architecture, overrides)
    if pretrained and architecture.library == "torchvision":
        return from_torchvision(architecture, overrides)
    return unfilled(architecture, num_classes, overrides, trained=pretrained)


def _as_file(source: str) -> Path | None:
    """The file a source means, None for a name.

    Raises:
        UsageError: clearly meant as a file or a name, but there is none such.
    """
    if source.startswith(("timm:", "torchvision:", "hf-hub:", "hf_hub:")) or not source:
        return None
    path, is_file = Path(source), False
    with contextlib.suppress(OSError, ValueError):
        is_file = path.is_file()
    # the libraries are slow to import: they are asked only about what could be a name of theirs
    if re.fullmatch(r"\w+", source) and source in known_names("torchvision"):
        return None
    if not is_file and re.fullmatch(r"[\w.-]+", source) and is_timm(source):
        return None
    with contextlib.suppress(OSError, ValueError):  # too long for a path, or with a null character
        if path.exists():
            return path
    if re.fullmatch(r"[\w.]+:[\w.]+", source):
        return None
    if path.suffix in (".pth", ".pt", ".th", ".bin", ".safetensors", ".ckpt", ".tar") or len(path.parts) > 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"no such file: {source}{did_you_mean(path.name, siblings)}")
    return None
