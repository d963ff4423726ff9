"""The scale ``a`` of a weight tensor: one for the layer, or one for each output channel.

``mean-abs`` is the paper's, a = mean |w|. ``least-squares`` takes the a for which the constrained weights are closest
to the original ones, min over a of ‖w − a·q(w/a)‖². Output channels are axis 0, as in every PyTorch convolution and
linear layer.
"""

import torch
from torch import Tensor

from cbpq.levels import LevelSet

# A layer of nothing but zeros has no scale of its own. This is small enough to keep its weights zero in effect, and
# large enough to be divided by every denominator without leaving the normal float32 range.
SMALLEST_SCALE = 1e-30
MOST_EVENTS = 2**21  # bounds the memory of the search for the best scale, at about 100 bytes each


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
    if rows.device.type == "mps":  # which has no float64
        rows = rows.cpu()
    scale = RULES[rule](rows, levels).clamp_min(SMALLEST_SCALE).to(weight.device)
    return scale.reshape(-1, *[1] * (weight.dim() - 1)) if granularity == "channel" else scale.reshape(())


def _mean_abs(rows: Tensor, levels: LevelSet) -> Tensor:
    # In float64: a mean over millions of float32 weights should not depend on the order of summation.
    return rows.double().abs().mean(dim=1, keepdim=True).to(rows.dtype)


def _least_squares(rows: Tensor, levels: LevelSet) -> Tensor:
    """The best scale of all, not a local optimum: see ``_best_assignment``."""
    mean = _mean_abs(rows, levels)
    stride = -(-rows.shape[1] * len(levels.codes) // MOST_EVENTS)
    if stride > 1:  # every so many-th of the sorted weights has their distribution
        rows = rows.sort(dim=1).values[:, stride // 2 :: stride]
    chunks = rows.split(max(1, MOST_EVENTS // (rows.shape[1] * len(levels.codes))))
    best = torch.cat([_best_assignment(chunk, levels) for chunk in chunks])
    # Where no scale is better than none, all weights lie on a side without levels: keep the grid in their reach.
    return torch.where(best > 0, best, mean)


def _best_assignment(rows: Tensor, levels: LevelSet) -> Tensor:
    """argmin over a of ‖w − a·q(w/a)‖² for each row, (R, 1); no positive number where a = 0 is as good.

    As a falls from infinity to 0, a weight leaves the level nearest to 0 and passes one midpoint m after the other, at
    a = w/m. For the levels q between two such events the best a is ⟨w,q⟩/⟨q,q⟩, and it lowers the error ‖w‖² by
    ⟨w,q⟩²/⟨q,q⟩. Running sums over the sorted events give both for all q that occur.
    """
    q = torch.tensor(levels.levels, dtype=rows.dtype, device=rows.device)
    midpoints = (q[:-1] + q[1:]) / 2
    above, below = midpoints > 0, midpoints < 0
    width = max(int(above.sum()), int(below.sum()))

    def events(outward: Tensor, inward: Tensor, fill: float) -> Tensor:
        """For each weight, a number for each midpoint on its side of 0: (R, n, width)."""
        upper, lower = (
            torch.cat([side, side.new_full((width - len(side),), fill)]) for side in (outward[above], inward[below])
        )
        return torch.where(rows.unsqueeze(-1) < 0, lower, upper)

    step, square_step = q.diff(), q.square().diff()
    passed = (rows.unsqueeze(-1) / events(midpoints, midpoints, torch.inf)).flatten(1)
    order = passed.argsort(dim=1, descending=True)
    first = torch.where(rows < 0, q[below.sum()], q[(midpoints <= 0).sum()])

    def running(start: Tensor, change: Tensor) -> Tensor:
        changes = change.flatten(1).gather(1, order)
        return torch.cat([start.sum(dim=1, keepdim=True), changes], dim=1).double().cumsum(dim=1)

    product = running(rows * first, rows.unsqueeze(-1) * events(step, -step, 0))
    square = running(first.square(), events(square_step, -square_step, 0))
    gain = (product.clamp_min(0).square() / square).nan_to_num(0)  # 0/0: all levels zero
    best = gain.argmax(dim=1, keepdim=True)
    return (product.gather(1, best) / square.gather(1, best)).to(rows.dtype)


RULES = {"mean-abs": _mean_abs, "least-squares": _least_squares}
