"""AdaSTE: a straight-through estimator whose factor on the gradient depends on the weight and on the gradient's sign.

Le, Høier, Lin & Zach, *AdaSTE: An adaptive straight-through estimator to train binary neural networks*, CVPR 2022,
arXiv 2112.02880. The network computes with the minimiser of a problem of its own (bilevel optimisation), in units in
which the two levels are −1 and +1:

    w*(θ) = argmin over w in [−1, 1] of (w − θ)²/2 + μ/2 (|w| − 1 − α)² = sign(θ) h(|θ|)
    h(t)  = min(1, (t + μ(1 + α)) / (1 + μ)),   which is 1 from t = 1 − μα on                                    (1)

As the attraction μ grows, w* goes from clip(θ) to sign(θ), which it is from μ = 1/α on. Its derivative says nothing
about the jump at θ = 0; instead the gradient ∂C/∂w* is multiplied by the difference quotient of w* for a finite step:

    step toward the other level   (h(|θ|) + h(0)) / |θ|    the step that just reaches θ = 0, where w* jumps to −h(0)
    step outward                  1/(1 + μ), or 0 where h(|θ|) = 1 already                                       (2)

============  ======================  ===============================================================
symbol        here                    meaning
============  ======================  ===============================================================
θ             ``slot.latent``         latent weight
w*            ``constrained_weight``  what the network computes with
α             ``adaste_margin``       how far beyond the levels they attract
μ             ``coupling``            grows geometrically with progress, up to 1/α
============  ======================  ===============================================================

A problem of two levels, wherever they are: an affine map takes them to ±1, and with them w* and θ, and leaves the
quotient (2) as it is. The first factor of (2) has no bound as θ → 0; the authors' code takes at most 0.5, as is done
here (``adaste_flip_bound``).

The paper's settings (CIFAR-10): learning rate 3e-4 with cosine, momentum 0.9, batches of 128, 700 epochs, α = 0.01, μ =
0.01 growing by 5 % per epoch (so that it is 1/α after 189 epochs, 27 % of them). Their networks start at |θ| = 10 and
are trained from scratch. Departures: μ moves with every step instead of every epoch. Where the authors' code departs
from the derivation, this file follows the derivation: the code has the wrong sign in the first factor where θ > 0 and
h < 1, and applies (2) only where |∂C/∂w*| > 1e-3.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cbpq.errors import UsageError
from cbpq.levels import LevelSet
from cbpq.methods.base import Method, Slot, State, Update
from cbpq.settings import setting


@dataclass(eq=False)
class AdaSTE(Method):
    """The adaptive straight-through estimator, for two levels."""

    name: ClassVar = "adaste"
    paper: ClassVar = {"epochs": 700, "batch_size": 128, "lr": 3e-4, "lr_schedule": "cosine", "weight_decay": 0.0}

    adaste_margin: float = setting(
        0.01, 0.01, 0.01, "adaste: α, how far beyond the levels they attract a weight", least=1e-6
    )
    adaste_coupling: float = setting(0.01, 0.01, 0.01, "adaste: μ at first, the attraction's strength", least=1e-6)
    adaste_full: float = setting(
        0.27, 0.27, 0.27, "adaste: share of the budget after which the attraction is full, μ = 1/α", least=1e-6
    )
    adaste_flip_bound: float = setting(0.5, 0.5, 0.5, "adaste: bound on a gradient's factor toward the other level")

    def __post_init__(self) -> None:
        self.scalars = {"progress": 0.0}

    @classmethod
    def check(cls, levels: LevelSet) -> None:
        """Two levels, and no others."""
        if len(levels.codes) != 2:
            raise UsageError(
                f"method adaste is for two levels, {levels.name} has {len(levels.codes)}: "
                "choose constraint binary, or another method, such as cbp"
            )

    def start(self, latent: Tensor) -> State:
        """Nothing."""
        return {}

    @property
    def coupling(self) -> float:
        """μ at this point of the budget."""
        first, full = self.adaste_coupling, 1 / self.adaste_margin
        share = self.scalars["progress"] / self.adaste_full
        return full if share >= 1 else min(full, first * (full / first) ** share)

    def on_levels(self) -> bool:
        """Never: the network comes to its levels gradually."""
        return False

    def constrained_weight(self, slot: Slot) -> Tensor:
        """w* of equation (1)."""
        side, distance, centre, unit = _in_units(slot)
        weight = centre + unit * side * self._height(distance)
        return torch.where(self._reached(distance), slot.grid.nearest(slot.latent), weight)  # the level's very bits

    def gradient(self, slot: Slot, gradient: Tensor, lr: float) -> Tensor:
        """The gradient times the difference quotient (2)."""
        side, distance, _, _ = _in_units(slot)
        outward = (~self._reached(distance)).to(gradient) / (1 + self.coupling)
        jump = self._height(distance) + self._height(distance.new_zeros(()))
        flip = (jump / distance).clamp_(max=self.adaste_flip_bound)
        return gradient.mul_(torch.where(gradient * side > 0, flip, outward))

    def after_step(self, slot: Slot, lr: float) -> None:
        """Nothing: θ is free."""

    def advance(self, progress: float, slots: Iterable[Slot]) -> Update:
        """μ grows, and with it every w* changes."""
        before = self.coupling
        self.scalars["progress"] = max(self.scalars["progress"], progress)
        return Update(weights_changed=self.coupling != before)

    def _height(self, distance: Tensor) -> Tensor:
        """h of equation (1)."""
        coupling = self.coupling
        return ((distance + coupling * (1 + self.adaste_margin)) / (1 + coupling)).clamp_(max=1)

    def _reached(self, distance: Tensor) -> Tensor:
        """Where h = 1."""
        return distance >= 1 - self.coupling * self.adaste_margin

    def describe(self) -> Mapping[str, float]:
        """The attraction μ."""
        return {"coupling": self.coupling}


def _in_units(slot: Slot) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sign(θ) and |θ|, and what they are measured in: θ = 0 is a weight of ``centre``, θ = 1 is ``unit`` above it."""
    lowest, highest = slot.grid.limits()
    centre, unit = (lowest + highest) / 2, (highest - lowest) / 2
    side = 2 * slot.grid.index(slot.latent) - 1  # not the sign, since on the midpoint there must be one
    return side.to(slot.latent), (slot.latent - centre).abs() / unit, centre, unit
