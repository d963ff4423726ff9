"""Straight-through: the network computes with the nearest level, the latent weight follows its gradient unchanged.

Courbariaux, Bengio & David, *BinaryConnect: Training deep neural networks with binary weights during propagations*,
NeurIPS 2015, arXiv 1511.00363 (deterministic form; there the levels are ±1). Each step, at learning rate η:

    w ← w − η ∂C/∂w̄,   w̄ = nearest(w)                                                                            (1)
    w ← clip(w, a q_1, a q_n)                                                                        if bounded  (2)

============  ===================  ==================================================================
symbol        here                 meaning
============  ===================  ==================================================================
w             ``slot.latent``      latent weight
w̄             ``Grid.nearest``     what the network computes with
a q_1, a q_n  ``Grid.limits``      the outermost levels, scaled; −1 and +1 in the paper
============  ===================  ==================================================================

Nothing leads the weights: their rounding follows them. It is what every other method has to beat. Where the range is
bounded, a weight outside it has no gradient either, as in Hubara et al., *Binarized Neural Networks*, NeurIPS 2016,
arXiv 1602.02830; that matters for pretrained weights, and where the scale learns, since (2) leaves none outside.

The paper's settings (CIFAR-10): Adam, learning rate 0.003 falling to 2e-6, batches of 50, 500 epochs, bounded. Its
decay is exponential, which is a cosine in preset ``paper``; its squared hinge loss is cross-entropy here.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cbpq.methods.base import Method, Slot, State
from cbpq.settings import setting


@dataclass(eq=False)
class StraightThrough(Method):
    """The straight-through estimator, for any levels."""

    name: ClassVar = "straight-through"
    paper: ClassVar = {
        "epochs": 500,
        "batch_size": 50,
        "optimizer": "adamw",
        "lr": 3e-3,
        "lr_schedule": "cosine",
        "weight_decay": 0.0,
    }

    straight_through_bounded: bool = setting(
        True, False, False, "straight-through: keep latent weights between the outermost levels"
    )

    def start(self, latent: Tensor) -> State:
        """Nothing."""
        return {}

    def gradient(self, slot: Slot, gradient: Tensor, lr: float) -> Tensor:
        """As it is, but none outside the range."""
        if not self.straight_through_bounded:
            return gradient
        lowest, highest = slot.grid.limits()
        return gradient.masked_fill_((slot.latent < lowest) | (slot.latent > highest), 0)

    def after_step(self, slot: Slot, lr: float) -> None:
        """Equation (2)."""
        if self.straight_through_bounded:
            slot.latent.copy_(slot.latent.clamp(*slot.grid.limits()))
