"""Compensated rounding against a reference in scalars, exhaustive search, and matrices that are none."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbpq import rounding
from cbpq.levels import Grid, LevelSet, level_set
from cbpq.rounding import DAMPING, Rounded, into_cells, round_compensated
from cbpq.scales import initial_scale

NAMES = ("two-bit-shift", "ternary", "binary", "levels:-1,-0.3,0.3,1", "levels:0,1")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(groups: int, size: int, samples: int, seed: int = 0) -> Tensor:
    """Inputs (G, K, N) that share a common part, with different strengths."""
    own, common = normal(groups, size, samples, seed=seed), normal(groups, 1, samples, seed=seed + 1000)
    return (own + 2 * common) * torch.logspace(-0.5, 0.5, size, dtype=torch.float64)[:, None]


def moment(inputs: Tensor) -> Tensor:
    return inputs @ inputs.mT


def codes(rounded: Rounded, levels: LevelSet) -> Tensor:
    return Grid(levels, rounded.scale).level(rounded.latent)


def weights(rounded: Rounded, levels: LevelSet) -> Tensor:
    return Grid(levels, rounded.scale).nearest(rounded.latent)


def damped(h: Tensor) -> Tensor:
    """H + δ, which is what the cost of rounding is measured with."""
    return h + rounding._inverse_factor(h)[1] * torch.eye(h.shape[1])


def costs(difference: Tensor, h: Tensor) -> Tensor:
    """d H dᵀ of each row (G, R)."""
    return torch.einsum("grk,gkl,grl->gr", difference, h, difference)


def placed_by_elimination(
    row: NDArray[Any], h: NDArray[Any], levels: LevelSet, scale: float
) -> tuple[list[float], list[float]]:
    """Optimal brain quantization of one row in its given order: latent weights, and the levels they were put on.

    After each column the inverse of H without that column is computed anew, from the matrix itself.
    """
    remaining = row.copy()
    latent: list[float] = []
    placed: list[float] = []
    for j in range(len(row)):
        inverse = np.linalg.inv(h[j:, j:])  # of the columns that are not placed yet
        value = float(remaining[j])
        level = min((abs(value - scale * q), -q, scale * q) for q in levels.levels)[2]  # on a midpoint the upper one
        latent.append(value)
        placed.append(level)
        remaining[j:] -= (value - level) / inverse[0, 0] * inverse[0]
    return latent, placed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("groups, rows, size, samples", [(1, 2, 3, 9), (1, 2, 8, 5), (3, 2, 6, 20)])
def test_placing_is_optimal_brain_quantization_in_scalars(
    name: str, groups: int, rows: int, size: int, samples: int
) -> None:
    levels = level_set(name)
    h = moment(correlated(groups, size, samples, seed=size))
    weight = normal(groups, rows, size, seed=1)
    scale = initial_scale(weight.flatten(0, 1), levels, "least-squares", "channel").reshape(groups, rows, 1)
    factor, damping = rounding._inverse_factor(h)
    latent = rounding._place(weight, factor, Grid(levels, scale))
    placed = Grid(levels, scale).nearest(latent)
    for g, r in product(range(groups), range(rows)):
        damped = (h[g] + damping[g] * torch.eye(size)).numpy()
        expected, on = placed_by_elimination(weight[g, r].numpy(), damped, levels, scale[g, r].item())
        np.testing.assert_allclose(latent[g, r].numpy(), expected, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(placed[g, r].numpy(), on, rtol=1e-12)


@pytest.mark.parametrize("size", [rounding.BLOCK - 1, rounding.BLOCK, rounding.BLOCK + 13])
def test_blocks_of_columns_change_nothing(size: int) -> None:
    levels = level_set("ternary")
    h = moment(correlated(2, size, 2 * size))
    weight, scale = normal(2, 1, size), torch.full((2, 1, 1), 0.9, dtype=torch.float64)
    factor, damping = rounding._inverse_factor(h)
    latent = rounding._place(weight, factor, Grid(levels, scale))
    for g in range(2):
        expected, _ = placed_by_elimination(
            weight[g, 0].numpy(), (h[g] + damping[g] * torch.eye(size)).numpy(), levels, 0.9
        )
        np.testing.assert_allclose(latent[g, 0].numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_small_blocks_give_the_same_as_large_ones(name: str, per_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    levels, inputs, weight = level_set(name), correlated(2, 11, 40), normal(2, 3, 11)
    whole = round_compensated(weight, moment(inputs), levels, per_row=per_row)
    monkeypatch.setattr(rounding, "BLOCK", 4)
    blocks = round_compensated(weight, moment(inputs), levels, per_row=per_row)
    torch.testing.assert_close(blocks.latent, whole.latent)
    torch.testing.assert_close(blocks.scale, whole.scale)


@pytest.mark.parametrize("name", NAMES)
def test_groups_know_nothing_of_each_other(name: str) -> None:
    levels, weight = level_set(name), normal(3, 4, 6)
    inputs = correlated(3, 6, 30)
    inputs[1] = inputs[1].flip(0)  # so that the order of columns differs from group to group
    inputs[2, [0, 4]] *= 9
    seen = inputs + 0.2 * normal(3, 6, 30, seed=5)
    h, cross = moment(seen), inputs @ seen.mT
    together = round_compensated(weight, h, levels, cross=cross)
    for g in range(3):
        part = slice(g, g + 1)
        alone = round_compensated(weight[part], h[part], levels, cross=cross[part])
        torch.testing.assert_close(together.latent[part], alone.latent)
        torch.testing.assert_close(together.scale[part], alone.scale)
        torch.testing.assert_close(together.target[part], alone.target)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_columns_is_no_matter(name: str) -> None:
    levels, weight, h = level_set(name), normal(1, 4, 7), moment(correlated(1, 7, 30))
    shuffled = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    straight = round_compensated(weight, h, levels)
    mixed = round_compensated(weight[:, :, shuffled], h[:, shuffled][:, :, shuffled], levels)
    torch.testing.assert_close(mixed.latent, straight.latent[:, :, shuffled])
    torch.testing.assert_close(mixed.scale, straight.scale)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_latents_lie_in_the_cells_of_what_was_placed_also_in_float32(name: str, per_row: bool) -> None:
    levels = level_set(name)
    found = round_compensated(normal(2, 40, 30), moment(correlated(2, 30, 100)), levels, per_row=per_row)
    assert found.scale.shape == ((2, 40, 1) if per_row else (1, 1, 1))
    assert found.latent.shape == found.target.shape == (2, 40, 30)
    single = Rounded(found.scale.float(), found.latent.float(), found.target.float())
    assert torch.equal(codes(single, levels).double(), torch.tensor(levels.levels).double()[index(found, levels)])
    # and they are within training's reach
    reach = 1.5 * max(np.diff(levels.levels)) + max(map(abs, levels.levels))
    assert (found.latent.abs() <= reach * found.scale).all()


def index(found: Rounded, levels: LevelSet) -> Tensor:
    return Grid(levels, found.scale).index(found.latent).long()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per_row", [True, False])
def test_the_scale_is_the_best_for_its_levels(name: str, per_row: bool) -> None:
    levels, h, weight = level_set(name), moment(correlated(2, 9, 40)), normal(2, 3, 9)
    found = round_compensated(weight, h, levels, per_row=per_row)
    level = codes(found, levels)
    h = damped(h)

    def cost(share: float) -> Tensor:
        by_row = costs(weight - share * found.scale * level, h)
        return by_row if per_row else by_row.sum()

    step = 1e-3
    lower, here, upper = cost(1 - step), cost(1), cost(1 + step)
    curvature = upper - 2 * here + lower
    assert (curvature >= 0).all()
    # a parabola's slope by central differences is exact: only roundoff is left
    flat = (upper - lower).abs() <= 1e-6 * here + 1e-9 * h.abs().max()
    # with levels on one side only, a row of the other sign has no positive scale that is better than none
    aligned = torch.einsum("grk,gkl,grl->gr", level, h, weight) > 0
    assert (flat | ~aligned).all()
    assert aligned.all() or name == "levels:0,1"


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_moves_each_weight_to_where_it_costs_least(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "BLOCK", 4)  # several, and one that is shorter
    levels, h, target = level_set(name), moment(correlated(2, 10, 40)), normal(2, 3, 10)
    scale = 0.5 + 0.1 * normal(2, 3, 1, seed=5)
    grid = Grid(levels, scale)
    latent = rounding._sweep(grid.nearest(target), target, h, grid)
    for g, r in product(range(2), range(3)):
        row = grid.nearest(target)[g, r].numpy().copy()
        for j in range(10):
            rest = (target[g, r].numpy() - row) @ h[g].numpy()[:, j]
            best = row[j] + rest / h[g, j, j].item()
            np.testing.assert_allclose(latent[g, r, j].item(), best, rtol=1e-7, atol=1e-9)
            tried = []
            for level in levels.levels:
                other = row.copy()
                other[j] = scale[g, r].item() * level
                difference = target[g, r].numpy() - other
                tried.append((difference @ h[g].numpy() @ difference, other[j]))
            row[j] = min(tried)[1]
        np.testing.assert_allclose(grid.nearest(latent)[g, r].numpy(), row)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_in_the_end_no_weight_would_be_better_elsewhere(name: str, per_row: bool) -> None:
    levels, h, weight = level_set(name), moment(correlated(2, 12, 40)), normal(2, 5, 12)
    found = round_compensated(weight, h, levels, per_row=per_row)
    here = costs(weight - weights(found, levels), damped(h))
    for column, level in product(range(12), levels.levels):
        other = weights(found, levels)
        other[:, :, column] = found.scale[:, :, 0] * level
        assert (costs(weight - other, damped(h)) >= here * (1 - 1e-9)).all()


def test_the_target_is_the_ridge_solution() -> None:
    true, seen, weight = correlated(2, 6, 50), correlated(2, 6, 50) + 0.5 * normal(2, 6, 50, seed=8), normal(2, 3, 6)
    found = round_compensated(weight, moment(seen), level_set("ternary"), cross=true @ seen.mT)
    for g in range(2):
        strength = DAMPING * moment(seen)[g].diagonal().mean().item()
        # min over V of ‖V x̃ − W x‖² + δ‖V − W‖², as an ordinary least-squares problem
        left = np.concatenate([seen[g].T.numpy(), np.sqrt(strength) * np.eye(6)])
        right = np.concatenate([(weight[g] @ true[g]).T.numpy(), np.sqrt(strength) * weight[g].T.numpy()])
        expected = np.linalg.lstsq(left, right, rcond=None)[0].T
        np.testing.assert_allclose(found.target[g].numpy(), expected, rtol=1e-8, atol=1e-10)


def test_where_both_networks_see_the_same_the_target_is_the_weight() -> None:
    weight, h = normal(2, 3, 6), moment(correlated(2, 6, 50))
    without, same = (round_compensated(weight, h, level_set("ternary"), cross=cross) for cross in (None, h))
    assert torch.equal(without.target, weight)
    torch.testing.assert_close(same.target, weight)
    torch.testing.assert_close(same.latent, without.latent)


def test_targets_make_up_for_what_earlier_layers_lost() -> None:
    levels, weight = level_set("two-bit-shift"), normal(1, 6, 12)
    true = correlated(1, 12, 200)
    seen = 0.7 * true + 0.3 * correlated(1, 12, 200, seed=9)
    aware = weights(round_compensated(weight, moment(seen), levels, cross=true @ seen.mT), levels)
    blind = weights(round_compensated(weight, moment(seen), levels), levels)
    lost = [(weight @ true - rounded @ seen).square().sum() for rounded in (aware, blind)]
    assert lost[0] < 0.9 * lost[1]


@pytest.mark.parametrize("name", ["two-bit-shift", "ternary", "binary", "levels:-1,-0.3,0.3,1"])
def test_against_every_combination_of_levels_and_against_nearest(name: str) -> None:
    levels = level_set(name)
    problems = 60
    inputs, weight = correlated(problems, 3, 12, seed=3), normal(problems, 1, 3, seed=4)
    h = moment(inputs)
    ours = costs(weight - weights(round_compensated(weight, h, levels), levels), h)[:, 0]

    scale = initial_scale(weight[:, 0], levels, "least-squares", "channel")
    plain = Grid(levels, scale).nearest(weight[:, 0]).unsqueeze(1)
    nearest = costs(weight - plain, h)[:, 0]

    combinations = torch.tensor(list(product(levels.levels, repeat=3)), dtype=torch.float64)  # (M, 3)
    under = torch.einsum("mk,gkl,ml->gm", combinations, h, combinations)
    over = torch.einsum("mk,gkl,gl->gm", combinations, h, weight[:, 0])
    best_scales = (over / under).nan_to_num(0).clamp_min(0)
    candidates = best_scales.unsqueeze(2) * combinations  # (G, M, 3)
    best = costs(weight - candidates, h).amin(dim=1)

    assert (ours >= best * (1 - 1e-9)).all()  # nothing is better than the best of all
    assert (ours <= nearest * (1 + 1e-9)).float().mean() > 0.95
    whole = costs(weight, h)[:, 0]
    relative = [(part / whole).mean() for part in (ours, nearest, best)]
    assert relative[0] <= 0.5 * relative[1]
    assert relative[0] <= 4 * relative[2]


def test_uncorrelated_inputs_leave_little_to_compensate_but_do_no_harm() -> None:
    levels, weight = level_set("two-bit-shift"), normal(50, 1, 8)
    h = torch.eye(8, dtype=torch.float64).expand(50, 8, 8)
    ours = costs(weight - weights(round_compensated(weight, h, levels), levels), h)
    scale = initial_scale(weight[:, 0], levels, "least-squares", "channel")
    nearest = costs(weight - Grid(levels, scale).nearest(weight[:, 0]).unsqueeze(1), h)
    torch.testing.assert_close(ours, nearest, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("per_row", [True, False])
def test_weights_on_levels_stay_there(per_row: bool) -> None:
    levels = level_set("two-bit-shift")
    chosen = torch.randint(7, (2, 3, 20), generator=torch.Generator().manual_seed(0))
    level = torch.tensor(levels.levels).double()[chosen]
    level[:, :, 0] = 1
    weight = 0.37 * level
    found = round_compensated(weight, moment(correlated(2, 20, 50)), levels, per_row=per_row)
    torch.testing.assert_close(weights(found, levels), weight)


def finite(found: Rounded, levels: LevelSet) -> bool:
    parts = (found.scale, found.latent, found.target, weights(found, levels))
    return all(bool(part.isfinite().all()) for part in parts) and bool((found.scale > 0).all())


def degenerate(kind: str) -> tuple[Tensor, Tensor]:
    """Inputs (2, 6, N) of the rounded network and second moments that are hard to invert."""
    inputs = correlated(2, 6, 30)
    if kind == "dead columns":
        inputs[:, [0, 3]] = 0
    elif kind == "rank one":
        inputs = normal(2, 6, 1) * normal(2, 1, 30)
    elif kind == "fewer samples than columns":
        inputs = inputs[:, :, :3]
    elif kind == "constant":
        inputs = torch.full((2, 6, 30), 3.0, dtype=torch.float64)
    elif kind == "twins":
        inputs = inputs[:, :1].expand(2, 6, 30)
    elif kind == "one group without inputs":
        inputs[0] = 0
    h = moment(inputs)
    if kind == "zero":
        h = torch.zeros(2, 6, 6, dtype=torch.float64)
    elif kind == "slightly indefinite":
        values, vectors = torch.linalg.eigh(h)
        values[:, 0] = -1e-6 * values[:, -1]
        h = vectors @ torch.diag_embed(values) @ vectors.mT
    elif kind == "nothing but noise":
        h = 1e-9 * normal(2, 6, 6)
        h = h + h.mT
    elif kind == "negative noise":
        h = -1e-9 * moment(inputs)
    elif kind == "a negative diagonal element":
        h[:, 2] = h[:, :, 2] = 1e-7
        h[:, 2, 2] = -1e-7
    return inputs, (h + h.mT) / 2


KINDS = (
    *("zero", "dead columns", "rank one", "fewer samples than columns", "constant", "twins", "slightly indefinite"),
    *("one group without inputs", "nothing but noise", "negative noise", "a negative diagonal element"),
)


@pytest.mark.parametrize("name", ["two-bit-shift", "binary", "levels:1,2"])
@pytest.mark.parametrize("kind", KINDS)
def test_moments_without_an_inverse(kind: str, name: str) -> None:
    levels = level_set(name)
    inputs, h = degenerate(kind)
    weight = normal(2, 3, 6)
    true = inputs + 0.1 * correlated(2, 6, inputs.shape[2], seed=2)
    for cross in (None, h, true @ inputs.mT, torch.zeros_like(h)):
        for per_row in (True, False):
            assert finite(round_compensated(weight, h, levels, cross=cross, per_row=per_row), levels)


@pytest.mark.parametrize("kind", ["dead columns", "rank one", "constant", "twins", "slightly indefinite"])
def test_singular_moments_still_beat_nearest(kind: str) -> None:
    levels, (_, h), weight = level_set("ternary"), degenerate(kind), normal(2, 20, 6)
    ours = costs(weight - weights(round_compensated(weight, h, levels), levels), h).sum()
    scale = initial_scale(weight.flatten(0, 1), levels, "least-squares", "channel").reshape(2, 20, 1)
    assert ours < 0.7 * costs(weight - Grid(levels, scale).nearest(weight), h).sum()


def test_inputs_that_are_always_zero_are_rounded_on_their_own() -> None:
    levels, weight = level_set("ternary"), normal(1, 5, 6)
    inputs, h = degenerate("dead columns")
    true = inputs + correlated(2, 6, 30, seed=3)
    found = round_compensated(weight, h[:1], levels, cross=(true @ inputs.mT)[:1])
    dead = [0, 3]
    assert torch.equal(found.target[:, :, dead], weight[:, :, dead])
    expected = Grid(levels, found.scale).nearest(weight)[:, :, dead]
    torch.testing.assert_close(weights(found, levels)[:, :, dead], expected)


@pytest.mark.parametrize("kind", ["zero", "negative noise"])
def test_without_curvature_every_weight_is_rounded_on_its_own(kind: str) -> None:
    _, h = degenerate(kind)
    weight = normal(2, 3, 6)
    found = round_compensated(weight, h, level_set("ternary"), cross=h)
    assert torch.equal(found.target, weight)
    torch.testing.assert_close(weights(found, level_set("ternary")), on_its_own(weight, found))


def on_its_own(weight: Tensor, found: Rounded) -> Tensor:
    return Grid(level_set("ternary"), found.scale).nearest(weight)


@pytest.mark.parametrize("size", [1e-8, 1e8])
@pytest.mark.parametrize("strength", [1e-16, 1e-8, 1e8, 1e16])
def test_the_units_of_weights_and_inputs_are_no_matter(size: float, strength: float) -> None:
    levels, h, weight = level_set("two-bit-shift"), moment(correlated(2, 6, 30)), normal(2, 3, 6)
    for cross in (None, h + 0.1 * normal(2, 6, 6)):
        usual = round_compensated(weight, h, levels, cross=cross)
        scaled = None if cross is None else strength * cross
        other = round_compensated(size * weight, strength * h, levels, cross=scaled)
        assert finite(other, levels)
        torch.testing.assert_close(weights(other, levels) / size, weights(usual, levels))
        torch.testing.assert_close(other.target / size, usual.target)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_zeros(name: str, per_row: bool) -> None:
    levels, h, weight = level_set(name), moment(correlated(1, 6, 30)), normal(1, 3, 6)
    weight[:, 1] = 0
    for rows in (weight, torch.zeros_like(weight)):
        found = round_compensated(rows, h, levels, per_row=per_row)
        assert finite(found, levels)
        if per_row:
            assert weights(found, levels)[:, 1].abs().max() < 1e-25
        assert Grid(levels, found.scale.float()).nearest(found.latent.float()).isfinite().all()


def test_a_single_column_and_a_single_weight() -> None:
    for shape in ((1, 4, 1), (3, 1, 1)):
        weight = normal(*shape)
        h = torch.full((shape[0], 1, 1), 2.0, dtype=torch.float64)
        found = round_compensated(weight, h, level_set("ternary"))
        torch.testing.assert_close(weights(found, level_set("ternary")), weight)


def test_arguments_are_left_alone_and_types_are_float64() -> None:
    weight, h = normal(1, 3, 6).float().requires_grad_(), moment(correlated(1, 6, 30)).float()
    before = weight.detach().clone(), h.clone()
    with torch.no_grad():
        found = round_compensated(weight, h, level_set("ternary"), cross=h)
    assert torch.equal(weight, before[0])
    assert torch.equal(h, before[1])
    assert {found.scale.dtype, found.latent.dtype, found.target.dtype} == {torch.float64}


@pytest.mark.parametrize("name", NAMES)
def test_into_cells_moves_nothing_that_is_inside_its_cell(name: str) -> None:
    levels = level_set(name)
    grid = Grid(levels, torch.tensor([[[0.5]], [[3.0]]], dtype=torch.float64))
    q = torch.tensor(levels.levels, dtype=torch.float64)
    gap = q.diff().min() / 2 * 0.99
    inside = torch.cat([q - gap, q, q + gap]).expand(2, 1, -1) * grid.scale
    assert torch.equal(into_cells(inside, grid.level(inside), grid), inside)


@pytest.mark.parametrize("name", NAMES)
def test_into_cells_goes_no_farther_than_need_be(name: str) -> None:
    levels = level_set(name)
    grid = Grid(levels, torch.tensor(2.0, dtype=torch.float64))
    q = torch.tensor(levels.levels, dtype=torch.float64)
    latent = 8 * normal(500)
    level = q[torch.randint(len(q), (500,), generator=torch.Generator().manual_seed(1))]
    moved = into_cells(latent, level, grid)
    assert torch.equal(grid.level(moved), level)
    assert torch.equal(Grid(levels, torch.tensor(2.0)).level(moved.float()).double(), level.float().double())
    stays = grid.level(latent) == level
    edge = q.diff().max()
    assert ((moved - 2 * level).abs() <= edge + 1e-12).all()  # half a gap times the scale 2
    outer = (latent < 2 * q[0]) | (latent > 2 * q[-1])
    assert ((moved - latent).abs()[stays & ~outer] <= 0.002 * edge).all()
    # what has to move ends at the border of its cell: between it and the old place there is nothing but other cells
    away = (latent - moved).abs() > 1e-9
    further = moved + (latent - moved).sign() * 0.0011 * edge
    assert ((grid.level(further) != level) | outer | (moved / 2 < q[0]) | (moved / 2 > q[-1]))[away].all()
