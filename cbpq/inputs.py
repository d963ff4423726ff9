"""What a network expects to be fed: the shape, crop and normalisation its weights were trained with. No torch here."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cbpq.errors import UsageError, did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash", "border")
_LARGEST_SIDE = 16384  # a side beyond this in a file's metadata is damage, and would only end in a lack of memory


@dataclass(frozen=True)
class InputSpec:
    """Input of a network: images of ``channels`` × ``height`` × ``width``, scaled to 0..1, then ``(x - mean) / std``.

    To evaluate, the shorter side of a picture is resized to ``resize`` pixels and the centre is cropped, unless
    ``crop_mode`` says otherwise (timm's words: ``squash`` ignores the aspect ratio, ``border`` pads).
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        """Check every field, because a spec may come from a file or from flags.

        Raises:
            UsageError: a field that no network could mean.
        """
        for name in ("channels", "height", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST_SIDE:
                raise UsageError(f"input {name} {value!r} is not a whole number from 1 to {_LARGEST_SIDE}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != self.channels:
                raise UsageError(
                    f"input {name} has {len(values)} values for {self.channels} channels; give one per channel"
                )
            if not all(math.isfinite(value) for value in values) or (name == "std" and min(values) <= 0):
                raise UsageError(f"input {name} {values} is not usable; give finite numbers, std above 0")
        if self.interpolation not in INTERPOLATIONS:
            hint = did_you_mean(self.interpolation, INTERPOLATIONS)
            raise UsageError(
                f"unknown interpolation {self.interpolation!r}{hint or '; use ' + ', '.join(INTERPOLATIONS)}"
            )
        if self.crop_mode not in CROP_MODES:
            raise UsageError(f"unknown crop mode {self.crop_mode!r}; use {', '.join(CROP_MODES)}")
        if not (math.isfinite(self.crop_pct) and 0.05 <= self.crop_pct <= 2.0):
            raise UsageError(f"crop_pct {self.crop_pct} is not between 0.05 and 2; 0.875 means 224 pixels out of 256")

    @property
    def resize(self) -> int:
        """Pixels of the shorter side before the crop, rounded down as timm does (224 / 0.875 = 256)."""
        # the small term undoes the rounding of a quotient such as 224 / (224 / 232), which must give 232 again
        return math.floor(min(self.height, self.width) / self.crop_pct + 1e-6)

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON types."""
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "InputSpec":
        """The spec of ``to_dict``. Missing fields are ImageNet's (averaged for grey), ``size`` stands for both sides.

        Raises:
            UsageError: an unknown field, a value of the wrong type, or no size at all.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = dict(fields)
        size = values.pop("size", None)
        if size is not None:
            sides = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
            if len(sides) != 2:
                raise UsageError(f"input size {size!r} is neither one number nor (height, width)")
            values.setdefault("height", sides[0])
            values.setdefault("width", sides[1])
        for name in values:
            if name not in known:
                raise UsageError(f"unknown input field {name!r}{did_you_mean(name, known)}")
        if "height" not in values or "width" not in values:
            raise UsageError("the input size is not known; give it as height and width")
        channels = values.setdefault("channels", 3)
        try:
            for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
                given = values.get(name)
                values[name] = tuple(map(float, given)) if given is not None else _per_channel(default, channels)
            values["crop_pct"] = float(values.get("crop_pct", 1.0))
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise UsageError(f"input fields {dict(fields)} do not make sense: {error}") from error

    def replaced(self, overrides: Mapping[str, Any]) -> "InputSpec":
        """This spec with the user's ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``.

        ``input_size`` is one side, (height, width) or (channels, height, width). None leaves a field as it is.

        Raises:
            UsageError: an unknown or impossible override.
        """
        fields = override_fields(overrides)
        own = self.to_dict()
        if fields.get("channels", self.channels) != self.channels:
            del own["mean"], own["std"]
        return InputSpec.from_dict(own | fields)


def override_fields(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of InputSpec that the user's overrides set.

    Raises:
        UsageError: an unknown override or an ``input_size`` of another form.
    """
    allowed = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    fields = {name: value for name, value in overrides.items() if value is not None}
    for name in fields:
        if name not in allowed:
            raise UsageError(f"unknown input override {name!r}{did_you_mean(name, allowed)}")
    if (size := fields.pop("input_size", None)) is not None:
        sides = [size, size] if isinstance(size, int) else list(size)
        if len(sides) not in (2, 3):
            raise UsageError(f"input size {size!r} is not one number, (height, width) or (channels, height, width)")
        fields |= dict(zip(("channels", "height", "width")[-len(sides) :], sides, strict=True))
    return fields


def _per_channel(rgb: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return rgb if channels == len(rgb) else (sum(rgb) / len(rgb),) * channels
