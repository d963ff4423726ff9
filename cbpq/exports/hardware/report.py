"""The hardware report as a record, and in JSON types."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cbpq.exports.hardware.energy import LEFT_OUT, METHOD, PICOJOULES, SOURCE, Energy, energy
from cbpq.exports.hardware.layers import Layer
from cbpq.exports.hardware.ranges import Ranges
from cbpq.exports.hardware.scales import PowerScale, power_scale
from cbpq.exports.hardware.widths import INPUT_BITS, accumulator_bits
from cbpq.exports.hardware.work import Work, total, work
from cbpq.plain import plain


@dataclass(frozen=True)
class PowerEffect:
    """What a network says with powers of two for scales, against what it says: how often the same class, in percent,
    and the largest difference of two logits beside the largest logit.
    """

    agreement_percent: float
    max_logit_difference: float
    max_logit: float


@dataclass(frozen=True)
class HardwareLayer:
    """One layer; see the classes of its parts."""

    layer: Layer
    ranges: Ranges
    work: Work
    energy: Energy
    scale: PowerScale | None  #: None, like the next, for a layer that stayed float
    accumulator_bits: int | None

    @classmethod
    def of(cls, layer: Layer, ranges: Ranges) -> "HardwareLayer":
        """All that follows from the layer itself."""
        done = work(layer)
        scale = power_scale(layer.tensor) if layer.tensor else None
        widest = accumulator_bits(layer.tensor) if layer.tensor else None
        return cls(layer, ranges, done, energy(done), scale, widest)

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON types."""
        tensor = self.layer.tensor
        parts: dict[str, Any] = {
            "name": self.layer.weight,
            "constraint": tensor.constraint if tensor else None,
            "shape": self.layer.shape,
            "weight_bits": tensor.bits if tensor else 32,
            "uses": [asdict(site) for site in self.layer.sites],
            **asdict(self.work),
            **asdict(self.ranges),
            **asdict(self.energy),
        }
        if tensor and self.scale:
            parts |= {"accumulator_bits": self.accumulator_bits, **asdict(self.scale)}
            parts |= {"codes": tensor.levels, "counts": tensor.histogram, "denominator": tensor.denominator}
        content: dict[str, Any] = plain(parts)
        return content


@dataclass(frozen=True)
class HardwareReport:
    """The whole report; ``pictures`` is how many the ranges were seen on, ``source`` what the file says of itself."""

    source: Mapping[str, Any]
    layers: tuple[HardwareLayer, ...]
    effect: PowerEffect
    pictures: int
    notes: tuple[str, ...]

    def totals(self) -> dict[str, tuple[int, Work]]:
        """How many layers there are, and what they do together: of the constrained, the float and all."""
        constrained = [layer.work for layer in self.layers if layer.layer.tensor]
        floats = [layer.work for layer in self.layers if not layer.layer.tensor]
        groups = {"constrained": constrained, "float": floats, "all": [*constrained, *floats]}
        return {name: (len(group), total(group)) for name, group in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """The content of ``hardware.json``: plain JSON types, None for a number that is not finite."""
        totals = {
            name: {"layers": count, **asdict(done), **asdict(energy(done))}
            for name, (count, done) in self.totals().items()
        }
        document: dict[str, Any] = plain(
            {
                "source": self.source,
                "pictures": self.pictures,
                "input_bits": INPUT_BITS,
                "totals": totals,
                "power_of_two_scales": asdict(self.effect),
                "energy": {"source": SOURCE, "picojoules": PICOJOULES, "method": METHOD, "left_out": LEFT_OUT},
                "notes": self.notes,
            }
        )
        return document | {"layers": [layer.to_dict() for layer in self.layers]}
