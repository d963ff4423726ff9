"""One constrained weight around an optimizer's step: latent weight in, constrained weight out."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cbpq.methods.base import Method, Slot
from cbpq.scales import SMALLEST_SCALE


@dataclass
class ConstrainedWeight:
    """A constrained weight: where the network keeps it, and what is kept beside it."""

    parameter: nn.Parameter
    slot: Slot

    def kept(self) -> dict[str, Tensor]:
        """All tensors beside the parameter, by name (not copies)."""
        return {"latent": self.slot.latent, "scale": self.slot.grid.scale.detach(), **self.slot.state}

    @torch.no_grad()
    def install_latent(self, method: Method, lr: float) -> None:
        """Before the step: latent weight in, the method's gradient in, and the learned scale's gradient."""
        latent, grid, _ = self.slot
        gradient = self.parameter.grad
        if gradient is None:
            grid.scale.grad = None  # of an earlier step, where only the model's own gradients were set to zero
            return
        gradient = gradient.contiguous()  # a network may be in channels_last; mixing the two layouts is slow
        if grid.scale.requires_grad:
            grid.scale.grad = scale_gradient(gradient, grid.level(latent), grid.scale)
        self.parameter.grad = method.gradient(self.slot, gradient, lr)
        self.parameter.copy_(latent)

    @torch.no_grad()
    def install_constrained(self, method: Method, lr: float) -> None:
        """After the step: the moved latent weight out, corrected, and the constrained weight in."""
        latent, grid, _ = self.slot
        if self.parameter.grad is None:
            return
        latent.copy_(self.parameter)
        method.after_step(self.slot, lr)
        if grid.scale.requires_grad:
            grid.scale.clamp_(min=SMALLEST_SCALE)
        self.parameter.copy_(method.constrained_weight(self.slot))


def scale_gradient(gradient: Tensor, level: Tensor, scale: Tensor) -> Tensor:
    """Gradient for a learned scale, in the scale's shape: Σ grad × level / Σ level², over the weights that share the
    scale.

    The numerator is ∂C/∂a, as the constrained weight is a·q. The denominator makes a step of size η change the
    constrained weights exactly as a step of size η along their gradient would, projected on the one direction (q) that
    the scale can move them in; so weights and scales share a learning rate whatever the layer's size. Where the network
    computes with the latent weights themselves, the scale so follows its least-squares fit to them.
    """
    axes = tuple(range(1, level.dim())) if scale.dim() else tuple(range(level.dim()))
    numerator = (gradient * level).sum(dim=axes)
    return (numerator / level.square().sum(dim=axes).clamp_min(1)).reshape(scale.shape)
