"""Measuring a network, and another beside it: the function behind ``cbpq.evaluate`` and ``cbpq evaluate``."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cbpq import distributed, fileformat
from cbpq.data import EvalLoader, load_data
from cbpq.devices import describe_device, resolve_device
from cbpq.errors import UsageError
from cbpq.evaluation import Evaluation, predict, summarize
from cbpq.models import LoadedModel, SourceInfo, load_model
from cbpq.plain import plain


@dataclass(frozen=True)
class Measurement:
    """How good a network is: ``result``, with the original's in ``result.reference`` and ``result.comparison``.

    ``info`` says what was measured, ``original`` what it was held against; ``data`` describes the images, ``notes`` are
    sentences for the user.
    """

    source: str
    info: SourceInfo
    original: SourceInfo | None
    data: Mapping[str, Any]
    device: str
    result: Evaluation
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON types: the figures of ``result`` themselves, those of the original under ``original``."""
        figures = self.result.to_dict()
        original, comparison = figures.pop("reference", None), figures.pop("comparison", None)
        return {
            "source": self.source,
            **figures,
            "original": original,
            "comparison": comparison,
            "network": plain(self.info.to_dict()),
            "data": plain(self.data),
            "device": self.device,
            "notes": list(self.notes),
        }


def evaluate(
    source: str | Path,
    data: str | Path,
    *,
    against: str | Path | None = None,
    weights: Path | None = None,
    arch: str | None = None,
    pretrained: bool = False,
    input_overrides: Mapping[str, Any] | None = None,
    class_map: Path | None = None,
    skip_bad_images: bool = False,
    batch_size: int = 128,
    workers: int = 0,
    device: str = "auto",
    amp: bool = False,
    on_start: Callable[[int], object] | None = None,
    on_batch: Callable[[], object] | None = None,
) -> Measurement:
    """Measure ``source`` on the evaluation images of ``data``, each image once, with the network's own preprocessing.

    Args:
        source: a cbpq file, or any source ``cbpq.models.load_model`` takes.
        data: see ``cbpq.data.load_data``, like ``class_map`` and ``skip_bad_images``.
        against: the original, measured too and compared image by image. Pictures without labels need it.
        weights: weights for the network that is a name or a function: ``source``, or ``against`` if ``source`` is a
            cbpq file, which holds its own; so too ``pretrained``.
        arch: the architecture of a weight file that does not tell, or the function that makes a cbpq file's network.
        input_overrides: preprocessing other than the network's own, for both networks.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        amp: compute in bfloat16 where that is safe.
        on_start: called once with the number of batches to come; ``on_batch`` after each of them.

    Raises:
        CbpqError: whatever is wrong with a network, the images or the request, in one line.
    """
    target = resolve_device(device)
    first, second = _load(str(source), against, weights, arch, pretrained, dict(input_overrides or {}))
    notes = list(first.notes)
    networks = [first]
    if second is not None:
        networks.append(second)
        notes += [*second.notes, *_doubts(first, second)]

    def images(loaded: LoadedModel) -> tuple[EvalLoader, dict[str, Any]]:
        opened = load_data(
            str(data),
            loaded.info.input_spec,
            loaded.num_classes,
            batch_size=batch_size,
            workers=workers,
            training=False,
            class_map=class_map,
            skip_bad_images=skip_bad_images,
        )
        return opened.val, opened.describe

    loader, describe = images(first)
    if second is None and not describe["val_labels"]:
        raise UsageError(f"the pictures in {data} have no labels to measure accuracy with; add --against SOURCE")
    loaders = [loader]
    if second is not None:
        same = second.info.input_spec == first.info.input_spec
        loaders.append(loader if same else images(second)[0])
    if on_start is not None:
        on_start(sum(distributed.largest_share(len(each)) for each in loaders))
    autocast = torch.bfloat16 if amp else None
    predictions = []
    for loaded, batches in zip(networks, loaders, strict=True):
        predictions.append(predict(loaded.model.to(target), batches, target, autocast=autocast, on_batch=on_batch))
        loaded.model.to("cpu")  # one network at a time on the device
    return Measurement(
        source=str(source),
        info=first.info,
        original=second.info if second is not None else None,
        data=describe,
        device=describe_device(target),
        result=summarize(*predictions),
        notes=tuple(dict.fromkeys(notes)),
    )


def _load(
    source: str,
    against: str | Path | None,
    weights: Path | None,
    arch: str | None,
    pretrained: bool,
    overrides: dict[str, Any],
) -> tuple[LoadedModel, LoadedModel | None]:
    """Load both networks, each with those of the options that are about it."""
    if against is None:
        return load_model(source, weights=weights, arch=arch, pretrained=pretrained, input_overrides=overrides), None
    against = str(against)
    against_arch = arch if Path(against).is_file() else None
    if not fileformat.is_cbpq_file(Path(source)):
        first = load_model(source, weights=weights, arch=arch, pretrained=pretrained, input_overrides=overrides)
        return first, load_model(against, input_overrides=overrides)
    first = load_model(source, arch=arch, input_overrides=overrides)
    if first.info.library == "callable" and against == first.info.architecture:
        # a function says nothing about its input, but the file made from it does
        spec = first.info.input_spec.to_dict()
        size = [spec.pop(name) for name in ("channels", "height", "width")]
        overrides = {"input_size": size, **spec}
    second = load_model(against, weights=weights, arch=against_arch, pretrained=pretrained, input_overrides=overrides)
    if _made_from(first.info, second.info):  # the preprocessing asked for when the file was made holds for both
        second.info = dataclasses.replace(second.info, input_spec=first.info.input_spec)
    return first, second


def _made_from(file: SourceInfo, original: SourceInfo) -> bool:
    """Whether the file says that it was made from just this network."""
    same = dataclasses.replace(original, input_spec=file.input_spec)
    return file.weights_sha256 is not None and same == file


def _doubts(first: LoadedModel, second: LoadedModel) -> list[str]:
    """What makes a comparison less than it seems.

    Raises:
        UsageError: the networks cannot be compared at all.
    """
    if first.num_classes != second.num_classes:
        raise UsageError(
            f"a network of {first.num_classes} classes cannot be compared with one of {second.num_classes}; "
            "give the network it was made from"
        )
    doubts = []
    hashes = (first.info.weights_sha256, second.info.weights_sha256)
    if None not in hashes and hashes[0] != hashes[1]:
        doubts.append("the two networks do not come from the same original weights")
    if first.info.input_spec != second.info.input_spec:
        doubts.append("each network was fed by its own preprocessing, and these differ")
    return doubts
