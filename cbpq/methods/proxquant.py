"""ProxQuant: gradient steps on real weights, each followed by a proximal step toward the nearest level.

Bai, Wang & Liberty, *ProxQuant: Quantized neural networks via proximal operators*, ICLR 2019, arXiv 1810.00861.
Minimise C(w) + λ R(w), with R the distance to the levels (W-shaped for two of them). Each step, at learning rate η:

    w ← w − η ∂C/∂w                                                 the network computes with w itself           (1)
    w ← prox(w) = nearest(w) + sign(d) max(|d| − η λ, 0)            d = w − nearest(w), R(w) = Σ |d|             (2)

so that a weight comes nearer to its level by η λ, never past it.

============  ===================  ==================================================================
symbol        here                 meaning
============  ===================  ==================================================================
w             ``slot.latent``      the weight, which is real until it is frozen
λ             ``strength``         grows in proportion to progress: 1e-4 · epoch in the paper
============  ===================  ==================================================================

After a share of the budget every weight is put on its nearest level for good, while biases, normalisation and learned
scales go on. The paper gives (2) for two and three levels; the distance to the nearest level has the same proximal
operator for any.

The paper's settings (CIFAR-10): from a pretrained network, Adam, learning rate 0.01, batches of 128, 300 epochs, λ =
1e-4 · epoch (0.03 at the end), frozen after 200 epochs; three levels took twice the epochs. Departures: λ moves with
every step instead of every epoch; where levels are ±1 in the paper, they have a scale here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from cbpq.levels import total
from cbpq.methods.base import Method, Slot, State, Update
from cbpq.settings import setting


@dataclass(eq=False)
class ProxQuant(Method):
    """Proximal steps toward the nearest level, for any levels."""

    name: ClassVar = "proxquant"
    paper: ClassVar = {"epochs": 300, "batch_size": 128, "optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.0}

    proxquant_strength: float = setting(
        0.03, 0.03, 0.03, "proxquant: λ, pull to the nearest level, at the end of the budget; it grows from 0"
    )
    proxquant_freeze: float = setting(
        2 / 3, 2 / 3, 2 / 3, "proxquant: share of the budget after which weights stay on their levels", most=1
    )

    def __post_init__(self) -> None:
        self.scalars = {"strength": 0.0, "frozen": False}

    def start(self, latent: Tensor) -> State:
        """The level, before scaling, that each weight is frozen on; it means nothing before."""
        return {"level": torch.zeros_like(latent)}

    def on_levels(self) -> bool:
        """Never: the network comes to its levels gradually."""
        return False

    def constrained_weight(self, slot: Slot) -> Tensor:
        """The weight itself, which is a level once it is frozen."""
        return slot.latent

    def gradient(self, slot: Slot, gradient: Tensor, lr: float) -> Tensor:
        """As it is, until weights are frozen."""
        return gradient.zero_() if self.scalars["frozen"] else gradient

    def after_step(self, slot: Slot, lr: float) -> None:
        """Equation (2); or back on the level, which momentum and decay may have moved the weight from."""
        latent, grid, state, _ = slot
        if self.scalars["frozen"]:
            latent.copy_(grid.nearest(state["level"] * grid.scale))
        elif pull := lr * self.scalars["strength"]:
            nearest = grid.nearest(latent)
            latent.copy_(nearest + softshrink(latent - nearest, pull))

    def advance(self, progress: float, slots: Iterable[Slot]) -> Update:
        """λ in proportion to progress, and the end of it."""
        self.scalars["strength"] = max(self.scalars["strength"], self.proxquant_strength * progress)
        if self.scalars["frozen"] or progress < self.proxquant_freeze:
            return Update()
        self.scalars["frozen"] = True
        for latent, grid, state, _ in slots:
            state["level"].copy_(grid.level(latent))
            latent.copy_(grid.nearest(latent))
        return Update(weights_changed=True)

    def penalty(self, slot: Slot) -> float:
        """λ R(w)."""
        return float(self.scalars["strength"]) * total(slot.grid.distance(slot.latent)) / 2

    def describe(self) -> Mapping[str, float]:
        """The strength λ."""
        return {"strength": self.scalars["strength"]}
