"""AskewSGD: gradient steps on real weights that may move freely only in intervals around the levels, which shrink.

Leconte, Schechtman & Moulines, *ASkewSGD: An annealed interval-constrained optimisation method to train quantized
neural networks*, AISTATS 2023, arXiv 2211.03741. The weights' constraint is relaxed to ψ(w) ≥ 0, and ε goes to 0. Let
t be a weight's place between its two neighbouring levels, 0 at the lower one and 1 at the upper one:

    ψ = ε − 16 t² (1 − t)²                          ε = 1 allows all between the levels, ε = 0 only the levels   (1)

The network computes with w itself. The optimizer follows v in place of −∂C/∂w, at learning rate η:

    K = −κ ψ / ψ'(w)                                the velocity at which ψ rises at the rate κ |ψ|              (2)
    v = −∂C/∂w   where ψ ≥ 0, or ψ' = 0, or −∂C/∂w has the sign of K and is larger
    v = K        elsewhere, with |K| at most (distance of the two levels)/(4 η)                                  (3)

============  ===================  ==================================================================
symbol        here                 meaning
============  ===================  ==================================================================
w             ``slot.latent``      the weight, which is real until the end
ε             ``relaxation``       1, and from some point on falling geometrically with progress
κ             ``askewsgd_rate``    how fast a weight returns to its interval
============  ===================  ==================================================================

So no projection is made, and a weight may be outside for a while. ε and K are the paper's: (1) is 16 times its
polynomial in units of the levels' distance, ε − (w² − 1)² for two levels at ±1; the factor cancels in (2). Beyond the
outer levels (1) holds as well, and brings weights back.

The paper's settings (ImageNet): SGD, learning rate 0.1, momentum 0.9, batches of 256, 300 epochs, κ = 1, ε = 1 for 100
epochs and 5 % smaller with each one after that (3.5e-5 at the end). As in the authors' code, v passes through the
optimizer, momentum included, and the bound on K comes after the comparison. Departures: ε moves with every step instead
of every epoch; the two levels are those a weight lies between, where the code takes the two nearest, which are the same
where levels have equal distances; weights beyond the outer levels are not clipped, since (1) brings them back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cbpq.methods.base import Method, Slot, State, Update
from cbpq.settings import setting

FAR = 1e3  # in units of the levels' distance; t⁴ has to stay in float32's range, whatever the scale


@dataclass(eq=False)
class AskewSGD(Method):
    """Annealed interval constraints, for any levels."""

    name: ClassVar = "askewsgd"
    paper: ClassVar = {"epochs": 300, "batch_size": 256, "lr": 0.1}

    askewsgd_rate: float = setting(1.0, 1.0, 1.0, "askewsgd: κ, how fast a weight returns to its interval")
    askewsgd_free: float = setting(
        1 / 3, 0.1, 0.1, "askewsgd: share of the budget in which all weights between the outer levels are free", most=1
    )
    askewsgd_end: float = setting(
        3.5e-5, 3.5e-5, 3.5e-5, "askewsgd: ε at the end of the budget, 1 being free", least=1e-12, most=1
    )

    def __post_init__(self) -> None:
        self.scalars = {"relaxation": 1.0}

    def start(self, latent: Tensor) -> State:
        """Nothing."""
        return {}

    def on_levels(self) -> bool:
        """Never: the network comes to its levels gradually."""
        return False

    def constrained_weight(self, slot: Slot) -> Tensor:
        """The weight itself."""
        return slot.latent

    def gradient(self, slot: Slot, gradient: Tensor, lr: float) -> Tensor:
        """−v of equation (3)."""
        lower, width = slot.grid.gap(slot.latent)
        t = ((slot.latent - lower) / width).clamp_(-FAR, FAR)
        inside = t * (1 - t)
        constraint = self.scalars["relaxation"] - 16 * inside.square()
        slope = -32 * inside * (1 - 2 * t) / width
        velocity = -self.askewsgd_rate * constraint / slope
        follows = (constraint >= 0) | (slope == 0)
        # (−g) K > K² without the square, which would leave float32's range for weights of 1e-20
        follows |= (gradient.sign() == -velocity.sign()) & (gradient.abs() > velocity.abs())
        if lr:
            bound = width / (4 * lr)
            velocity = velocity.clamp(-bound, bound)
        return torch.where(follows, gradient, -velocity)

    def after_step(self, slot: Slot, lr: float) -> None:
        """Nothing: the velocity does it all."""

    def advance(self, progress: float, slots: Iterable[Slot]) -> Update:
        """ε stays 1 for a while, then falls geometrically to its end."""
        share = max(0.0, progress - self.askewsgd_free) / max(1 - self.askewsgd_free, 1e-9)
        self.scalars["relaxation"] = min(self.scalars["relaxation"], self.askewsgd_end**share)
        return Update()

    def describe(self) -> Mapping[str, float]:
        """The relaxation ε."""
        return {"relaxation": self.scalars["relaxation"]}
