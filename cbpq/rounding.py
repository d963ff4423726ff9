"""Rounding that compensates its own errors: a weight matrix, put on its levels column after column.

The idea is optimal brain quantization's (Frantar & Alistarh, NeurIPS 2022, arXiv 2208.11580) in GPTQ's order (Frantar
et al., ICLR 2023, arXiv 2210.17323), on level sets instead of integers, and with targets that make up for what earlier
layers have lost (as GPTAQ does; Li et al. 2025, arXiv 2504.02692).

============  ==============  ===============================================================================
symbol        here            meaning
============  ==============  ===============================================================================
W (R, K)      ``weight``      the original weights, a row for each output channel
x, x̃ (K,)     –               an input of the layer in the original network, and in the rounded one
H (K, K)      ``moment``      second moment of the rounded network's inputs, Σ x̃ x̃ᵀ
C (K, K)      ``cross``       cross moment, Σ x x̃ᵀ; equal to H where both networks see the same
q, a          ``grid``        levels, and the scale of each row
U             ``factor``      upper Cholesky factor of H⁻¹ = Uᵀ U, (K, K)
============  ==============  ===============================================================================

Sought are levels with  Σ ‖W x − a q x̃‖²  small. Of all real matrices W* = W C H⁻¹ is best, and any other V costs
Σ_r (V − W*)_r H (V − W*)_rᵀ more. So W*, not W, is rounded: column j goes to its nearest level, and what that leaves,
e = (w_j − a q_j) / U_jj, is spread over the columns that are not placed yet, w_k ← w_k − e U_jk for k > j. For given
levels the best scale is a = (q H w*) / (q H q); levels and scale are found in turn.

The last columns have nothing left to make up for them. So, at the end, coordinate descent (as in QuantEase; Behdin et
al. 2023, arXiv 2309.01885): each weight in turn moves to the level nearest to w_j + ((W* − w) H)_j / H_jj, where it
costs least as long as all others stay, until none moves. H stands for H + δ throughout, with a little damping δ.

Grouped convolutions have G such matrices; every tensor here has that axis in front.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from cbpq.levels import Grid, LevelSet
from cbpq.scales import SMALLEST_SCALE, initial_scale

DAMPING = 0.01  # of H's mean diagonal, added to it: GPTQ's value
MOST_DAMPINGS = 6  # each ten times the one before, the last a thousand times the mean
BLOCK = 128  # columns whose corrections are carried along at once
SCALE_TRIALS = (0.75, 0.87, 1.0, 1.15, 1.3)  # start scales, relative to the least-squares one
REFINEMENTS = 4  # turns of levels and scale for each of them
SWEEPS = 20  # of coordinate descent, at most


@dataclass(frozen=True)
class Rounded:
    """Rounded weight matrices, float64 on the CPU.

    ``scale`` is (G, R, 1), or (1, 1, 1) for the whole layer. ``latent`` (G, R, K) holds each weight as it stood before
    it was placed, with the corrections for the columns before it; its nearest levels on that scale are the rounded
    weights. ``target`` (G, R, K) is W*, the best real weights.
    """

    scale: Tensor
    latent: Tensor
    target: Tensor


def round_compensated(
    weight: Tensor, moment: Tensor, levels: LevelSet, *, cross: Tensor | None = None, per_row: bool = True
) -> Rounded:
    """Put weight matrices on their levels so that the layer's outputs change little.

    Args:
        weight: (G, R, K), finite.
        moment: H, (G, K, K), symmetric; may be singular, or zero.
        levels: the level set.
        cross: C, (G, K, K), where the original network's inputs differ.
        per_row: a scale for each row, else one for the layer.
    """
    h = moment.cpu().double()
    # what weighs most is placed first, while all the others can still make up for it
    order = h.diagonal(dim1=1, dim2=2).clamp_min(0).argsort(dim=1, descending=True, stable=True)
    original, h = _columns(weight.detach().cpu().double(), order), _both(h, order)
    target, h, factor, damping = _best_real(original, h, None if cross is None else _both(cross.cpu().double(), order))
    h = h + damping * torch.eye(h.shape[1], dtype=h.dtype)  # the same cost whose least is at W*
    best = reduce(_better, _trials(target, h, factor, levels, per_row))
    _, scale, latent = _better(best, _descend(best, target, h, levels, per_row))
    back = order.argsort(dim=1)
    return Rounded(scale, _columns(latent, back), _columns(target, back))


def best_weights(weight: Tensor, moment: Tensor, cross: Tensor) -> Tensor:
    """W*, the best real weights (G, R, K) for what the rounded network gives the layer; see ``round_compensated``."""
    return _best_real(weight.detach().cpu().double(), moment.cpu().double(), cross.cpu().double())[0]


def _best_real(weight: Tensor, h: Tensor, cross: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W*, H without dead inputs, U and δ."""
    size = h.diagonal(dim1=1, dim2=2).clamp_min(0)  # roundoff may leave a little less than nothing
    # an input that is always 0: its weights have no say, and are rounded on their own
    dead = size <= 0
    h = h.masked_fill(dead.unsqueeze(1) | dead.unsqueeze(2), 0)
    h = h + torch.diag_embed(dead * size.mean(dim=1, keepdim=True).clamp_min(1e-30))
    factor, damping = _inverse_factor(h)
    if cross is None:
        return weight, h, factor, damping
    # least of Σ‖W x − V x̃‖² + δ‖V − W‖²: the damping pulls it towards W
    target = (weight @ cross + damping * weight) @ factor.mT @ factor
    return torch.where(dead.unsqueeze(1), weight, target), h, factor, damping


class _Trial(NamedTuple):
    """Levels and scale that were tried, and their error by row."""

    error: Tensor
    scale: Tensor
    latent: Tensor


def _trials(target: Tensor, h: Tensor, factor: Tensor, levels: LevelSet, per_row: bool) -> Iterator[_Trial]:
    groups, rows, _ = target.shape
    start = initial_scale(target.flatten(0, 1), levels, "least-squares", "channel" if per_row else "layer")
    scales = [(share * start).reshape(*((groups, rows) if per_row else (1, 1)), 1) for share in SCALE_TRIALS]
    energy = _sums(target @ h * target, per_row)
    for _ in range(REFINEMENTS):
        # all trials at once, as more rows: column after column is slow, and takes no longer for these
        grid = Grid(levels, torch.cat([scale.expand(groups, rows, 1) for scale in scales], dim=1))
        latents = _place(target.repeat(1, len(scales), 1), factor, grid)
        found = zip(latents.chunk(len(scales), 1), grid.level(latents).chunk(len(scales), 1), strict=True)
        for trial, (latent, level) in enumerate(found):
            scales[trial], gain = _best_scale(target, level, h, scales[trial], per_row)
            yield _Trial(energy - gain, scales[trial], into_cells(latent, level, Grid(levels, scales[trial])))


def _better(old: _Trial, new: _Trial) -> _Trial:
    """The better of two, row by row."""
    gains = new.error < old.error
    return _Trial(*(torch.where(gains, after, before) for after, before in zip(new, old, strict=True)))


def _inverse_factor(h: Tensor) -> tuple[Tensor, Tensor]:
    """U, upper triangular, with (H + δ)⁻¹ = Uᵀ U, and the δ (G, 1, 1) that was needed for it."""
    mean = h.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    identity = torch.eye(h.shape[1], dtype=h.dtype)
    damping = DAMPING * mean
    factor = torch.empty_like(h)
    for _ in range(MOST_DAMPINGS):
        lower, failed = torch.linalg.cholesky_ex(h + damping * identity)
        factor, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        bad = (failed > 0) | (failed_again > 0) | ~factor.isfinite().flatten(1).all(1)
        if not bool(bad.any()):
            break
        damping = torch.where(bad[:, None, None], 10 * damping, damping)
    # where nothing helped there is no curvature to be made use of: each column on its own
    alone = torch.diag_embed((h.diagonal(dim1=1, dim2=2) + damping[:, 0]).rsqrt())
    return torch.where(bad[:, None, None], alone, factor), damping


def _place(weight: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Each weight just before it is placed."""
    latent = weight.clone()
    for start in range(0, weight.shape[2], BLOCK):
        stop = min(start + BLOCK, weight.shape[2])
        errors = torch.empty_like(latent[:, :, start:stop])
        for column in range(start, stop):
            own = latent[:, :, column : column + 1]
            error = (own - grid.nearest(own)) / factor[:, column, column, None, None]
            errors[:, :, column - start : column - start + 1] = error
            latent[:, :, column + 1 : stop] -= error @ factor[:, column : column + 1, column + 1 : stop]
        latent[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    return latent


def _descend(start: _Trial, target: Tensor, h: Tensor, levels: LevelSet, per_row: bool) -> _Trial:
    """Levels and scale in turn, until no weight moves."""
    error, scale, latent = start
    energy = _sums(target @ h * target, per_row)
    for _ in range(SWEEPS):
        grid = Grid(levels, scale)
        before = grid.level(latent)
        latent = _sweep(grid.nearest(latent), target, h, grid)
        level = grid.level(latent)
        scale, gain = _best_scale(target, level, h, scale, per_row)
        error = energy - gain
        latent = into_cells(latent, level, Grid(levels, scale))
        if torch.equal(level, before):
            break
    return _Trial(error, scale, latent)


def _sweep(value: Tensor, target: Tensor, h: Tensor, grid: Grid) -> Tensor:
    """One turn of coordinate descent: each weight just before it is placed anew, all others being where they are."""
    latent = torch.empty_like(value)
    slope = (target - value) @ h
    size = h.diagonal(dim1=1, dim2=2)[..., None, None]
    for start in range(0, value.shape[2], BLOCK):
        block = slice(start, min(start + BLOCK, value.shape[2]))
        before = value[:, :, block].clone()
        for column in range(block.start, block.stop):
            own = slice(column, column + 1)
            latent[:, :, own] = value[:, :, own] + slope[:, :, own] / size[:, column]
            placed = grid.nearest(latent[:, :, own])
            slope[:, :, block] -= (placed - value[:, :, own]) @ h[:, own, block]
            value[:, :, own] = placed
        slope[:, :, block.stop :] -= (value[:, :, block] - before) @ h[:, block, block.stop :]
    return latent


def _best_scale(target: Tensor, level: Tensor, h: Tensor, scale: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """a = (q H w*) / (q H q), or the old one where that is no positive number; and by how much the error
    w* H w* − 2a q H w* + a² q H q is less than with no weights at all.
    """
    moved = level @ h  # the only large product
    along, under = _sums(moved * target, per_row), _sums(moved * level, per_row)
    best = along / under
    scale = torch.where((under > 0) & (best > SMALLEST_SCALE) & best.isfinite(), best, scale)
    return scale, scale * (2 * along - scale * under)


def _sums(products: Tensor, per_row: bool) -> Tensor:
    """Sum of each row (G, R, 1), or of all."""
    rows = products.sum(dim=2, keepdim=True)
    return rows if per_row else rows.sum().reshape(1, 1, 1)


def into_cells(latent: Tensor, level: Tensor, grid: Grid) -> Tensor:
    """Move weights, as little as need be, to where their nearest level is ``level``, whatever the scale became since.

    Kept a little off the midpoints, so that rounding to float32 does not carry any across; and within half a gap of
    the outer levels, so that none is out of reach of training.
    """
    q = torch.tensor(grid.level_set.levels, dtype=latent.dtype)
    half = q.diff() / 2 * 0.999
    index = torch.searchsorted(q, level.contiguous())
    lowest, highest = q - torch.cat([half[:1], half]), q + torch.cat([half, half[-1:]])
    return latent.clamp(lowest[index] * grid.scale, highest[index] * grid.scale)


def _columns(matrix: Tensor, order: Tensor) -> Tensor:
    """Columns (last axis) in the order of each group."""
    return matrix.gather(2, order.unsqueeze(1).expand_as(matrix))


def _both(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns in the order of each group."""
    return _columns(_columns(matrix, order).mT, order).mT
