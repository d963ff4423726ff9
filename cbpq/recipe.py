"""Optimizer, learning rate and loss of a run, as its settings say."""

import math

import torch
from torch import Tensor, nn

from cbpq.presets import Settings


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """SGD or AdamW, with weight decay on matrices and kernels only: none on biases, norms and other vectors."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)


def cosine(progress: float) -> float:
    """Factor on a learning rate that falls from 1 to 0 (Loshchilov & Hutter 2017)."""
    return 0.5 + 0.5 * math.cos(math.pi * progress)


def loss_of(
    output: Tensor, labels: Tensor, target: Tensor | None, settings: Settings, difference: Tensor | None = None
) -> Tensor:
    """(1 − d) · cross-entropy + d · D, with d the share of distillation.

    D says how far the network is from the original: ``difference`` where it is given, else of its outputs alone,
    T² · KL(original ‖ output) (Hinton et al. 2015).
    """
    share, temperature = settings.distillation, settings.temperature
    loss = output.new_zeros((), dtype=torch.float32)
    if target is None or share < 1:
        loss = loss + (1 - share) * nn.functional.cross_entropy(output.float(), labels)
    if difference is not None:
        loss = loss + share * difference
    elif target is not None:
        divergence = nn.functional.kl_div(
            (output.float() / temperature).log_softmax(1),
            (target.float() / temperature).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        loss = loss + share * temperature**2 * divergence
    return loss


def relative_error(output: Tensor, target: Tensor, divisor: Tensor | None = None) -> Tensor:
    """Mean squared difference in units of the target's energy, so that it means the same in every layer.

    ``divisor`` is that energy where more is known of it than this batch tells.
    """
    divisor = energy(target) if divisor is None else divisor
    return nn.functional.mse_loss(output.float(), target.float()) / divisor.clamp_min(1e-12)


def energy(target: Tensor) -> Tensor:
    """Mean square."""
    return target.float().square().mean()
