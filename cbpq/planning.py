"""Deciding everything about a run before doing any of it: names first, since they cost nothing, then network, then
data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cbpq.data import Augment, Data, load_data
from cbpq.devices import resolve_device
from cbpq.errors import UsageError
from cbpq.layers import LayerChoice, choose_layers
from cbpq.levels import LevelSet, level_set
from cbpq.methods import method_class
from cbpq.models import LoadedModel, load_model
from cbpq.presets import Resolved, Settings, resolve

FREE_SETTINGS = ("checkpoint_minutes", "evaluate_every")  # they do not change the result


@dataclass
class Plan:
    """A run with every choice made, and nothing done yet."""

    loaded: LoadedModel
    data: Data | None
    levels: LevelSet
    method: str
    resolved: Resolved
    layers: LayerChoice
    device: torch.device
    amp: bool
    max_minutes: float | None
    data_name: str = ""
    command: str = ""
    choices: Mapping[str, Any] = field(default_factory=dict)
    """Which layers, and how data are used: what settings do not say."""
    warnings: list[str] = field(default_factory=list)

    def identity(self) -> dict[str, Any]:
        """What makes this run this run: two runs that agree here give the same file."""
        data = self.data
        settings = self.resolved.settings.to_dict()
        return {
            "network": self.loaded.info.architecture,
            "weights": self.loaded.info.weights_sha256,
            "input": self.loaded.info.input_spec.to_dict(),
            "constraint": self.levels.name,
            "method": self.method,
            "preset": self.resolved.preset,
            **{name: value for name, value in settings.items() if name not in FREE_SETTINGS},
            **self.choices,
            "data": self.data_name,
            "training images": data.train.images if data and data.train else 0,
            "validation images": data.val.images if data and data.val else 0,
            "device": self.device.type,
            "max time": self.max_minutes,
        }


def plan(
    source: str,
    *,
    data: str | None = None,
    constraint: str = "two-bit-shift",
    method: str = "cbp",
    preset: str = "default",
    settings: Sequence[tuple[str, Mapping[str, Any]]] = (),
    weights: Path | None = None,
    arch: str | None = None,
    pretrained: bool = False,
    input_overrides: Mapping[str, Any] | None = None,
    class_map: Path | None = None,
    skip_bad_images: bool = False,
    augment: Augment = "auto",
    val_from_train: float | None = None,
    limit_train: int | None = None,
    calibration: int | None = None,
    workers: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    quantize_first: bool = False,
    quantize_last: bool = False,
    device: str = "auto",
    amp: bool = False,
    max_minutes: float | None = None,
    command: str = "",
) -> Plan:
    """Make every choice of a run and check it.

    Args:
        source: see ``cbpq.models.load_model``, like ``weights``, ``arch``, ``pretrained`` and ``input_overrides``.
        data: see ``cbpq.data.load_data``, like ``class_map`` and the five after it. None makes a plan that can only be
            shown.
        constraint: see ``cbpq.levels.level_set``.
        method: see ``cbpq.methods``.
        preset: see ``cbpq.presets.resolve``, like ``settings``.
        include: see ``cbpq.layers.choose_layers``, like the three after it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        amp: compute in bfloat16 where it is safe; latent weights, scales and multipliers stay in float32.
        max_minutes: stop training after this time; schedules then follow the clock as well as the epochs.
        command: the command line, for the report.

    Raises:
        CbpqError: whatever is wrong with any of it.
    """
    levels = level_set(constraint)
    method_class(method)
    resolve(preset, layers=settings)
    if max_minutes is not None and not (math.isfinite(max_minutes) and max_minutes > 0):
        raise UsageError(f"the time limit must be a number of minutes above 0, not {max_minutes}")
    chosen_device = resolve_device(device)
    loaded = load_model(source, weights=weights, arch=arch, pretrained=pretrained, input_overrides=input_overrides)
    spec = loaded.info.input_spec
    resolved = resolve(
        preset,
        architecture=loaded.info.architecture,
        input_size=max(spec.height, spec.width),
        constraint=levels.name,
        layers=settings,
    )
    layers = choose_layers(
        loaded.model,
        input_spec=spec,
        include=include,
        exclude=exclude,
        quantize_first=quantize_first,
        quantize_last=quantize_last,
    )
    loaded_data = None
    if data is not None:
        loaded_data = load_data(
            data,
            spec,
            loaded.num_classes,
            batch_size=resolved.settings.batch_size,
            workers=workers,
            seed=resolved.settings.seed,
            class_map=class_map,
            skip_bad_images=skip_bad_images,
            augment=augment,
            val_from_train=val_from_train,
            limit_train=limit_train,
            calibration=calibration,
        )
        check_labels_for_loss(loaded_data, resolved.settings)
    choices = {
        "include": list(include),
        "exclude": list(exclude),
        "quantize_first": quantize_first,
        "quantize_last": quantize_last,
        "augment": augment,
        "amp": amp,
        "calibration": calibration,
    }
    warnings = list(loaded.notes)
    if loaded_data is not None and not loaded_data.labelled:
        warnings += loaded_data.describe["notes"]
    return Plan(
        loaded,
        loaded_data,
        levels,
        method,
        resolved,
        layers,
        chosen_device,
        amp,
        max_minutes,
        Path(data).name if data is not None else "",  # not the whole path, so that data may be moved
        command,
        choices,
        warnings,
    )


def check_labels_for_loss(data: Data, settings: Settings) -> None:
    """Refuse a loss that needs labels where the training pictures have none.

    Raises:
        UsageError: naming the setting.
    """
    if not data.labelled and settings.distillation < 1:
        raise UsageError(
            f"the training pictures have no labels, which setting distillation = {settings.distillation:g} needs; "
            "give --set distillation=1, or labelled pictures"
        )
