"""CBP: constrained backpropagation with pseudo-Lagrange multipliers.

Kim & Jeong, *CBP: Backpropagation with constraint on weight precision using a pseudo-Lagrange multiplier method*,
NeurIPS 2021, arXiv 2110.02550. Minimise the loss C subject to cs(w) = 0 for every weight, by descending in w and
ascending in λ on the Lagrangian

    L = C(W) + Σ_i λ_i cs(w_i)                                                                                   (1)

============  ===================  ==================================================================
symbol        here                 meaning
============  ===================  ==================================================================
w             ``slot.latent``      latent weight; the network computes with its nearest level, or by (2)
λ             ``multiplier``       pseudo-Lagrange multiplier, one for each weight, starts at 0
cs, Y         ``Grid.penalty``     constraint function with window, and without
g             ``window``           the middle 1/g of each gap between two levels is unconstrained
p, p_max      ``patience``         epochs since the last multiplier update, and their maximum
L_prev        ``previous``         Lagrangian of the epoch before, for the published schedule
============  ===================  ==================================================================

Each step: gradient of (1) at w, straight through the rounding (identity, no mask), clipped by value; the optimizer
moves w; w is clamped. λ and g move seldom, by one of two schedules:

``lagrangian`` (published): after an epoch whose summed L did not fall, or p_max epochs after the last time, the window
closes a notch (g+1 below 10, then +10), λ takes one Adam ascent step, and the learning rate drops once, when g reaches
20.

``progress`` (ours, for a fixed budget): over the run, 1/g falls from 1 to 0 at the share ``window_close`` of the
budget, evenly or as a higher power (``window_power``) of what is left until then, and λ takes ``multiplier_updates``
ascent steps at equal distances. Nothing waits for the Lagrangian to stall, which in a short run it never does.

With ``soft_window`` (ours, for schedule ``progress``) a weight in the window is unconstrained in the forward pass too:
until the window is shut the network computes not with its nearest level, but with

    middle + clip(g (w − middle), −gap/2, gap/2)              middle and width of the gap that w lies in          (2)

which is w itself at g = 1 and its nearest level at the end, and outside the window all along: the proximal map of PARQ
(Jin et al., ICML 2025, arXiv 2503.15748). Meanwhile the scale follows the latent weights, by ``soft_window_scale``.

Departures from the published code: on a midpoint the upper level is taken (there sign(0) = 0 gives a value that is no
level); from one update to the next, λ's Adam moments (of the second, the root) rest in float16, in units of the scale.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cbpq.errors import UsageError
from cbpq.fused import fused
from cbpq.levels import Grid, total
from cbpq.methods.base import Method, Slot, State, Update
from cbpq.settings import setting

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's usual constants, as published
NO_PREVIOUS = 1e10
LR_DROP_AT_WINDOW = 20
SHUT = 1e-12  # 1/g from which on the window counts as shut, long before g is more than float32 can hold


@dataclass(eq=False)
class CBP(Method):
    """Constrained backpropagation, for any levels."""

    name: ClassVar = "cbp"

    multiplier_lr: float = setting(
        1e-4, 2e-5, 1e-4, "step size of the ascent in the multipliers: the most that one grows by in an update"
    )
    multiplier_schedule: str = setting(
        "lagrangian", "progress", "progress", "when window and multipliers move", choices=("lagrangian", "progress")
    )
    patience: int = setting(
        20,
        20,
        20,
        "p_max, epochs between multiplier updates (schedule lagrangian)",
        least=1,
        idle={"multiplier_schedule": "progress"},
    )
    multiplier_updates: int = setting(
        50,
        50,
        50,
        "multiplier updates in the whole budget (schedule progress)",
        idle={"multiplier_schedule": "lagrangian"},
    )
    window_close: float = setting(
        0.9,
        0.9,
        0.9,
        "share of the budget after which the window is shut (progress)",
        least=1e-6,
        idle={"multiplier_schedule": "lagrangian"},
    )
    window_power: float = setting(
        1.0,
        1.0,
        1.0,
        "the window's width falls as this power of what is left until it is shut: above 1 fast first, then slowly "
        "(progress)",
        least=0.1,
        most=10,
        idle={"multiplier_schedule": "lagrangian"},
    )
    soft_window: bool = setting(
        False,
        False,
        False,
        "weights in the window compute between the levels until it is shut, and scales follow the weights (progress)",
        idle={"multiplier_schedule": "lagrangian"},
    )
    soft_window_scale: float = setting(
        0.0,
        0.0,
        0.0,
        "what scales are meanwhile, as a multiple of the mean magnitude of the weights; 0: what brings the levels "
        "nearest to them (for ternary ones about 1.5)",
        most=10,
        idle={"multiplier_schedule": "lagrangian", "soft_window": False},
    )
    gradient_clip: float = setting(
        1.0, 1.0, 1.0, "bound on each component of a constrained weight's gradient, 0 for none"
    )
    clamp: float = setting(1.0, 0.0, 0.0, "bound on a latent weight, 0 for none (depthwise weights are often above 1)")
    lr_drop: float = setting(
        0.1,
        0.1,
        0.1,
        "factor on the learning rate when the window reaches 20 (lagrangian)",
        idle={"multiplier_schedule": "progress"},
    )

    def __post_init__(self) -> None:
        self.scalars = {
            "window": 1.0,
            "ascents": 0,
            "due": 0,
            "waited": 0,
            "previous": NO_PREVIOUS,
            "penalty_sum": 0.0,  # Σ λ cs over the batches of this epoch
        }

    @property
    def follows_lagrangian(self) -> bool:
        """Whether the schedule is the published one."""
        return self.multiplier_schedule == "lagrangian"

    def start(self, latent: Tensor) -> State:
        """λ and its two Adam moments, all zero. The moments rest in half the memory from one update to the next."""
        half = torch.float16 if latent.dtype == torch.float32 else latent.dtype
        moments = {name: torch.zeros_like(latent, dtype=half) for name in ("moment1", "root2")}
        return {"multiplier": torch.zeros_like(latent), **moments}

    def begin(self, slots: Iterable[Slot]) -> None:
        """One ascent step at g = 1 before the first epoch, as published: it reaches weights beyond the outer levels
        only.
        """
        if self.follows_lagrangian:
            self._ascend(slots)

    def on_levels(self) -> bool:
        """Whether no weight is between two levels."""
        return self.follows_lagrangian or not self.soft_window or self.scalars["window"] == math.inf

    def scale_fit(self) -> float | None:
        """One as long as weights are between the levels."""
        return None if self.on_levels() else self.soft_window_scale

    def constrained_weight(self, slot: Slot) -> Tensor:
        """The nearest level, or equation (2)."""
        latent, grid = slot.latent, slot.grid
        if self.on_levels():
            return grid.nearest(latent)
        lower, gap = grid.gap(latent)
        half = gap.div_(2)
        middle = lower.add_(half)
        return (latent - middle).mul_(self.scalars["window"]).clamp_(-half, half).add_(middle)

    def gradient(self, slot: Slot, gradient: Tensor, lr: float) -> Tensor:
        """∂L/∂w = ∂C/∂w + λ cs'(w), clipped by value."""
        if self.scalars["ascents"]:  # before the first one λ = 0 everywhere
            latent, grid, state, nearest = slot
            if nearest is None:
                nearest = grid.nearest(latent)
            pull = _follow(grid, latent, nearest, self.scalars["window"], state["multiplier"], gradient)
            if self.follows_lagrangian:
                self.scalars["penalty_sum"] += total((latent - nearest).mul_(pull))  # cs = cs' (w − nearest)
        return gradient.clamp_(-self.gradient_clip, self.gradient_clip) if self.gradient_clip else gradient

    def after_step(self, slot: Slot, lr: float) -> None:
        """w ← clip(w, −1, 1) as published, or not at all."""
        if self.clamp:
            slot.latent.clamp_(-self.clamp, self.clamp)

    def advance(self, progress: float, slots: Iterable[Slot]) -> Update:
        """Window and multipliers of the ``progress`` schedule."""
        if self.follows_lagrangian:
            return Update()
        between = not self.on_levels()  # the window, as it moves, changes what the network computes with
        free_share = max(0.0, 1 - progress / self.window_close) ** self.window_power
        window = 1 / free_share if free_share > SHUT else math.inf
        self.scalars["window"] = max(self.scalars["window"], window)  # it never opens again
        due = int(progress * self.multiplier_updates + 1e-9)  # 29/50 · 50 is a little less than 29
        if due <= self.scalars["due"]:
            return Update(weights_changed=between)
        self.scalars["due"] = due  # a caller that advances in large strides skips ascents, it does not owe them
        self._ascend(slots)
        return Update(multipliers_updated=True, weights_changed=between)

    def end_epoch(self, slots: Iterable[Slot], loss_sum: float | None) -> Update:
        """Window, multipliers and learning rate of the published schedule."""
        if not self.follows_lagrangian:
            return Update()
        if loss_sum is None:
            raise UsageError(
                "the published CBP schedule compares the Lagrangian of epochs: call end_epoch(loss_sum) "
                "with the epoch's loss summed over its batches, or choose preset='default'"
            )
        now = self.scalars
        lagrangian, now["penalty_sum"] = loss_sum + now["penalty_sum"], 0.0
        now["waited"] += 1
        if lagrangian < now["previous"] and now["waited"] < self.patience:
            now["previous"] = lagrangian
            return Update(lagrangian=lagrangian)
        now["window"] += 1 if now["window"] < 10 else 10
        self._ascend(slots)
        now["waited"], now["previous"] = 0, NO_PREVIOUS
        lr_factor = self.lr_drop if now["window"] == LR_DROP_AT_WINDOW else 1.0
        return Update(multipliers_updated=True, lr_factor=lr_factor, lagrangian=lagrangian)

    def _ascend(self, slots: Iterable[Slot]) -> None:
        """One Adam step uphill in λ, whose gradient is cs(w) itself. λ never shrinks, as cs ≥ 0."""
        self.scalars["ascents"] = count = self.scalars["ascents"] + 1
        for latent, grid, state, _ in slots:
            penalty = grid.penalty(latent, self.scalars["window"])
            moment1 = state["moment1"].to(penalty, copy=True).mul_(grid.scale).lerp_(penalty, 1 - BETA1)
            moment2 = (
                state["root2"].to(penalty, copy=True).mul_(grid.scale).square_().lerp_(penalty.square_(), 1 - BETA2)
            )
            _keep(state["moment1"], moment1 / grid.scale, 0)
            _keep(state["root2"], moment2.sqrt().div_(grid.scale), 1)
            denominator = (moment2 / (1 - BETA2**count)).sqrt_().add_(EPSILON)
            state["multiplier"].addcdiv_(moment1, denominator, value=self.multiplier_lr / (1 - BETA1**count))

    def penalty(self, slot: Slot) -> float:
        """Σ λ cs(w)."""
        penalty = slot.grid.penalty(slot.latent, self.scalars["window"])
        return total(slot.state["multiplier"] * penalty)

    def describe(self) -> Mapping[str, float]:
        """The window g."""
        return {"window": self.scalars["window"]}


def _keep(place: Tensor, values: Tensor, least: int) -> None:
    """Put values where they rest, as finite numbers, none of them below so many times the smallest number there is: a
    second moment that vanished before the first one would make Adam's step large.
    """
    kind = torch.finfo(place.dtype)
    place.copy_(values.clamp_(least * kind.tiny * kind.eps, kind.max))


@fused
def _follow(grid: Grid, latent: Tensor, nearest: Tensor, window: float, multiplier: Tensor, gradient: Tensor) -> Tensor:
    """λ cs'(w), which is added to the gradient."""
    pull = grid.slope(latent, window, nearest).mul_(multiplier)
    gradient.add_(pull)
    return pull
