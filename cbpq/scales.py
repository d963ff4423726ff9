"""The scale ``a`` of a weight tensor: one for the layer, or one for each output channel.

``mean-abs`` is the paper's, a = mean |w|. ``least-squares`` takes the a for which the constrained weights are closest
to the original ones, min over a of ‖w − a·q(w/a)‖². Output channels are axis 0, as in every PyTorch convolution and
linear layer.
"""

import torch
from torch import Tensor

from cbpq.levels import Grid, LevelSet

# A layer of nothing but zeros has no scale of its own. This is small enough to keep its weights zero in effect, and
# large enough to be divided by every denominator without leaving the normal float32 range.
SMALLEST_SCALE = 1e-30


def initial_scale(weight: Tensor, levels: LevelSet, rule: str, granularity: str) -> Tensor:
    """Scale by ``rule`` (``mean-abs``, ``least-squares``) for each ``layer`` or ``channel``.

    Args:
        weight: shape (C, …), any real type; must be finite.
        levels: needed by ``least-squares``.
        rule: one of RULES.
        granularity: ``layer`` or ``channel``.

    Returns:
        Positive tensor of shape () or (C, 1, …), the weight's type and device.
    """
    rows = weight.detach().reshape(weight.shape[0] if granularity == "channel" else 1, -1)
    scale = RULES[rule](rows, levels).clamp_min(SMALLEST_SCALE)
    return scale.reshape(-1, *[1] * (weight.dim() - 1)) if granularity == "channel" else scale.reshape(())


def _mean_abs(rows: Tensor, levels: LevelSet) -> Tensor:
    # In float64: a mean over millions of float32 weights should not depend on the order of summation.
    return rows.double().abs().mean(dim=1, keepdim=True).to(rows.dtype)


def _least_squares(rows: Tensor, levels: LevelSet) -> Tensor:
    """Alternate q ← nearest(w/a) and a ← ⟨w,q⟩/⟨q,q⟩ from several starts; both steps lower the error, the best start
    wins.
    """
    reach = rows.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST_SCALE)
    outermost = max(map(abs, levels.levels))
    best_error = torch.full_like(reach, float("inf"))
    best = reach
    for share in (0.15, 0.25, 0.35, 0.5, 0.7, 0.9):
        scale = reach * (share / outermost)
        for _ in range(2):
            scale = _refit(rows, scale, levels)
        error = (rows - Grid(levels, scale).nearest(rows)).square_().sum(dim=1, keepdim=True)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    for _ in range(8):
        refitted = _refit(rows, best, levels)
        if torch.equal(refitted, best):
            break
        best = refitted
    return best


def _refit(rows: Tensor, scale: Tensor, levels: LevelSet) -> Tensor:
    """a ← ⟨w,q⟩/⟨q,q⟩ for the present levels; the old a where that is no positive number (all levels zero)."""
    level = Grid(levels, scale).level(rows)
    refitted = (rows * level).sum(dim=1, keepdim=True) / level.square().sum(dim=1, keepdim=True)
    return torch.where(refitted > SMALLEST_SCALE, refitted, scale)  # NaN compares false


RULES = {"mean-abs": _mean_abs, "least-squares": _least_squares}
