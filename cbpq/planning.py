"""Deciding everything about a run before doing any of it: names first, since they cost nothing, then network, then
data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cbpq.data import Augment, Data, load_data
from cbpq.devices import resolve_device
from cbpq.errors import UsageError
from cbpq.layers import AUXILIARY, LayerChoice, choose_layers
from cbpq.levels import LevelSet, level_set
from cbpq.methods import method_class
from cbpq.models import LoadedModel, load_model
from cbpq.packing import check_packing
from cbpq.presets import AUTO, Resolved, resolve, without_effect
from cbpq.synthesis import SynthesisChoices, claim_folder, remembering

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
    """Which layers, how data are used, and how the file is written: what settings do not say."""
    warnings: list[str] = field(default_factory=list)
    synthesis: SynthesisChoices = field(default_factory=SynthesisChoices)
    """How pictures are synthesised where there are no data."""
    save_synthetic: Path | None = None

    @property
    def autocast(self) -> torch.dtype | None:
        """What the network computes in where that is safe, if not in float32."""
        return getattr(torch, self.resolved.settings.amp_dtype) if self.amp else None

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
    preset: str = AUTO,
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
    save_synthetic: Path | None = None,
    workers: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    quantize_first: bool = False,
    quantize_last: bool = False,
    device: str = "auto",
    amp: bool = False,
    pack: str = "bits",
    half: bool = False,
    max_minutes: float | None = None,
    command: str = "",
    resume: bool = False,
) -> Plan:
    """Make every choice of a run and check it.

    Args:
        source: see ``cbpq.models.load_model``, like ``weights``, ``arch``, ``pretrained`` and ``input_overrides``.
        data: see ``cbpq.data.load_data``, like ``class_map`` and the five after it. Without it, ``calibration``
            pictures are synthesised from the network.
        save_synthetic: empty or new folder for these pictures.
        constraint: see ``cbpq.levels.level_set``.
        method: see ``cbpq.methods``.
        preset: see ``cbpq.presets.resolve``, like ``settings``.
        include: see ``cbpq.layers.choose_layers``, like the three after it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        amp: compute in bfloat16 (setting ``amp_dtype``) where it is safe; latent weights, scales and multipliers stay
            in float32.
        pack: how the file holds the codes, ``bits`` or ``dense``; see ``cbpq.save``, like ``half``.
        half: what stays float in half precision, measured so.
        max_minutes: stop training after this time; schedules then follow the clock as well as the epochs.
        command: the command line, for the report.
        resume: it is to go on with an unfinished run, which may have saved its synthesised pictures already.

    Raises:
        CbpqError: whatever is wrong with any of it.
    """
    levels = level_set(constraint)
    check_packing(pack)
    method_class(method).check(levels)
    first = resolve("default" if preset == AUTO else preset, method=method, layers=settings).settings
    if data is None:
        check_no_data_flags(class_map, skip_bad_images, val_from_train, limit_train)
    elif save_synthetic is not None:
        raise UsageError("--save-synthetic keeps pictures that are synthesised where there are no data; leave out one")
    if save_synthetic is not None:
        claim_folder(save_synthetic, resume)
    if max_minutes is not None and not (math.isfinite(max_minutes) and max_minutes > 0):
        raise UsageError(f"the time limit must be a number of minutes above 0, not {max_minutes}")
    chosen_device = resolve_device(device)
    loaded = load_model(source, weights=weights, arch=arch, pretrained=pretrained, input_overrides=input_overrides)
    spec = loaded.info.input_spec
    if save_synthetic is not None and spec.channels not in (1, 3):
        raise UsageError(f"pictures of {spec.channels} channels cannot be kept; leave out --save-synthetic")
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
            batch_size=first.batch_size,
            workers=workers,
            seed=first.seed,
            class_map=class_map,
            skip_bad_images=skip_bad_images,
            augment=augment,
            val_from_train=val_from_train,
            limit_train=limit_train,
            calibration=calibration,
        )
    labelled = loaded_data is not None and loaded_data.labelled
    resolved = resolve(
        ("default" if labelled else "little-data") if preset == AUTO else preset,
        architecture=loaded.info.architecture,
        input_size=max(spec.height, spec.width),
        constraint=levels.name,
        method=method,
        images=loaded_data.train.images if loaded_data is not None and loaded_data.train is not None else 0,
        layers=settings,
    )
    if loaded_data is not None:
        loaded_data.set_batch_size(resolved.settings.batch_size)
    choices = {
        "include": list(include),
        "exclude": list(exclude),
        "quantize_first": quantize_first,
        "quantize_last": quantize_last,
        "augment": augment,
        "amp": amp,
        "calibration": calibration,
        "pack": pack,
        "half": half,
    }
    warnings = list(loaded.notes)
    synthesis = SynthesisChoices.for_input(spec)
    if calibration is not None:
        synthesis = replace(synthesis, count=calibration)
    if loaded_data is None:
        warnings += notes_without_data(loaded)
    elif not loaded_data.labelled:
        warnings += loaded_data.describe["notes"]
    warnings += notes_without_effect(resolved, method, amp, layers, loaded_data)
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
        synthesis,
        save_synthetic,
    )


def notes_without_data(loaded: LoadedModel) -> list[str]:
    """What a run without data is worth, in plain words."""
    if remembering(loaded.model):
        made = (
            "no data were given: pictures are synthesised from the network's BatchNorm statistics, the original teaches"
        )
        worth = "accuracy cannot be measured, only agreement with the original on such pictures"
        return [f"{made}; {worth}"]
    return [
        "no data were given, and the network has no BatchNorm that pictures could be synthesised from: weights are "
        "rounded for noise with the moments of the preprocessing, which may cost much accuracy, and the agreement on "
        "such noise says little; 200 pictures of the right kind, without labels, would help a lot (--data FOLDER)"
    ]


def notes_without_effect(
    resolved: Resolved, method: str, amp: bool, layers: LayerChoice, data: Data | None
) -> list[str]:
    """A sentence for each setting that was given on the command line and changes nothing; of ``distillation_views``,
    wherever it is from, since that depends on the pictures.
    """
    reasons = without_effect(resolved, method, amp)
    if AUXILIARY in layers.skipped.values():  # auxiliary heads learn by KL divergence in any case
        reasons.pop("temperature", None)
    if resolved.settings.distillation_views > 1 and data is not None and data.train is not None:
        augmentation = data.train.augmentation
        if not (augmentation.flip or augmentation.moves):
            reasons["distillation_views"] = "training neither mirrors nor moves the pictures"
    return [f"setting {name} changes nothing in this run: {reason}" for name, reason in reasons.items()]


def check_no_data_flags(
    class_map: Path | None, skip_bad_images: bool, val_from_train: float | None, limit_train: int | None
) -> None:
    """Refuse what only makes sense with data.

    Raises:
        UsageError: naming the flag.
    """
    given = {
        "--class-map": class_map is not None,
        "--skip-bad-images": skip_bad_images,
        "--val-from-train": val_from_train is not None,
        "--limit-train": limit_train is not None,
    }
    for flag, used in given.items():
        if used:
            raise UsageError(f"{flag} is about data, but there are none; add --data PATH, or leave it out")


def check_labels_for_loss(job: Plan) -> None:
    """Refuse a loss that needs labels where the training pictures have none.

    Raises:
        UsageError: naming the setting.
    """
    share = job.resolved.settings.distillation
    if share < 1 and not (job.data is not None and job.data.labelled):
        raise UsageError(
            f"there are no labels, which setting distillation = {share:g} needs; "
            "give --set distillation=1, or --data with labelled pictures"
        )
