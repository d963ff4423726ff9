"""What a method is: four questions about a weight tensor on a grid of levels, answered by functions with explicit
state.

A method sees latent weights, gradients and a ``Grid``; never layers, optimizers or trainers. Its tensors per weight
live in a plain dictionary, its scalars in a plain dictionary too, so that saving a run is saving these.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from cbpq.levels import Grid, LevelSet

State = dict[str, Tensor]


class Slot(NamedTuple):
    """One constrained weight, or a piece of it, as a method sees it.

    Attributes:
        latent: the latent weight.
        grid: levels and scale.
        state: the method's tensors, each of the latent weight's shape.
        nearest: the nearest allowed weight where it is at hand, which saves finding it.
    """

    latent: Tensor
    grid: Grid
    state: State
    nearest: Tensor | None = None


@dataclass(frozen=True)
class Update:
    """What happened at the end of an epoch (or at a point of the budget) and what the method asks for.

    Attributes:
        multipliers_updated: the method's per-weight state took a step.
        weights_changed: ``constrained_weight`` gives something else than after the last step.
        lr_factor: the learning rate should be multiplied by this.
        lagrangian: the Lagrangian summed over the epoch's batches, None where no loss was given.
    """

    multipliers_updated: bool = False
    weights_changed: bool = False
    lr_factor: float = 1.0
    lagrangian: float | None = None


@dataclass(eq=False)
class Method(ABC):
    """How weights are led to their levels. A subclass is a dataclass too, whose fields are settings of its own, each of
    a name that no other method has: ``cbpq.settings.setting``, with the values of presets ``paper``, ``default`` and
    ``little-data``.

    What a method does to a weight must depend on that weight alone, since tensors come to it in pieces.
    """

    name: ClassVar[str]

    paper: ClassVar[Mapping[str, Any]] = {}
    """What preset ``paper`` has for this method in place of the settings of CBP's paper that all methods share."""

    scalars: dict[str, Any] = field(init=False, repr=False, default_factory=dict)
    """Everything the method remembers that is no tensor; plain numbers, so that it can be saved."""

    @classmethod  # noqa: B027  # most methods cover every level set
    def check(cls, levels: LevelSet) -> None:
        """Refuse a level set that the method does not cover.

        Raises:
            UsageError: saying what it covers, and what to choose instead.
        """

    @abstractmethod
    def start(self, latent: Tensor) -> State:
        """Tensors to keep for one weight, in its shape."""

    def on_levels(self) -> bool:
        """Whether ``constrained_weight`` is the nearest level now. A method that has one of its own says no; one that
        changes from this to that returns ``weights_changed`` as it does.
        """
        return True

    def scale_fit(self) -> float | None:
        """How each scale follows the latent weights after every step for now: as this multiple of their mean magnitude,
        or, with 0, by least squares; ``None`` where scales are learned, or stay.
        """
        return None

    def constrained_weight(self, slot: Slot) -> Tensor:
        """What the network computes with while it trains, in the latent weight's shape: the nearest level, or
        something on the way there. At the end it is the nearest level, whatever the method.
        """
        return slot.grid.nearest(slot.latent)

    @abstractmethod
    def gradient(self, slot: Slot, gradient: Tensor, lr: float) -> Tensor:
        """The gradient the optimizer is to follow at learning rate ``lr``, from the loss's gradient at the constrained
        weight (may be changed in place).
        """

    @abstractmethod
    def after_step(self, slot: Slot, lr: float) -> None:
        """Correct the latent weight in place after the optimizer moved it at learning rate ``lr`` (a clamp, a proximal
        step).
        """

    def penalty(self, slot: Slot) -> float:
        """What the method adds to the loss for this weight tensor, where it adds anything."""
        return 0.0

    def begin(self, slots: Iterable[Slot]) -> None:  # noqa: B027  # a method need not do anything here
        """Once, before the first step."""

    def advance(self, progress: float, slots: Iterable[Slot]) -> Update:
        """Called as training moves through its budget, ``progress`` from 0 to 1."""
        return Update()

    def end_epoch(self, slots: Iterable[Slot], loss_sum: float | None) -> Update:
        """Called after each epoch with the loss summed over its batches, where the caller knows it."""
        return Update()

    def describe(self) -> Mapping[str, float]:
        """Numbers worth showing while training, such as the window."""
        return {}
