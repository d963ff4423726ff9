"""Level sets and grids against a scalar reference, written piece by piece as the paper writes it."""

import math
import warnings
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cbpq.errors import UsageError
from cbpq.fileformat import ConstrainedTensor
from cbpq.levels import ALIASES, CONSTRAINTS, MAX_LEVELS, MAX_SHIFT, Grid, LevelSet, level_set, shift_levels, total

NAMES = (
    *CONSTRAINTS,
    "shift:3",
    f"shift:{MAX_SHIFT}",
    "levels:-1,-0.3,0.5",  # asymmetric, no zero
    "levels:-1,1/3",  # two levels, a fraction
    "levels:0,1",
    "levels:1,2,5",  # all on one side
    "levels:-3,-2,-1,0,1,2,3",
    "levels:-0.75,-1/3,0,2",
)
WINDOWS = (1.0, 1.5, 2.0, 5.0, 20.0, 1e6, math.inf)

constraints = st.sampled_from(NAMES)
windows = st.sampled_from(WINDOWS) | st.floats(1, 100)
scales = st.floats(-8, 8).map(lambda exponent: float(np.float32(10.0**exponent)))
# weights in units of scale × outermost level; most between the outer levels, some far outside
units = st.lists(
    st.floats(-1.5, 1.5) | st.floats(-100, 100) | st.sampled_from([0.0, 1.0, -1.0]), min_size=1, max_size=30
)


def levels_of(name: str, scale: float) -> list[Fraction]:
    """The allowed weights, exactly."""
    levels = level_set(name)
    return [Fraction(code, levels.denominator) * Fraction(scale) for code in levels.codes]


def reference(weight: float, q: list[Fraction], window: float) -> tuple[float, float, float]:
    """Y, cs and the slope of cs, from the paper's piecewise definition, in exact arithmetic."""
    w = Fraction(weight)
    if w < q[0]:
        return float(-2 * (w - q[0])), float(-2 * (w - q[0])), -2.0
    if w >= q[-1]:
        return float(2 * (w - q[-1])), float(2 * (w - q[-1])), 2.0
    i = max(k for k in range(len(q) - 1) if q[k] <= w)
    gap, middle = q[i + 1] - q[i], (q[i] + q[i + 1]) / 2
    y = float(gap - 2 * abs(w - middle))
    if window < math.inf and abs(w - middle) < gap / (2 * Fraction(window)):
        return y, 0.0, 0.0
    return y, y, 2.0 if w < middle else -2.0


def nearest(weight: float, q: list[Fraction]) -> int:
    """Number of the nearest level; the upper one on a midpoint."""
    distances = [abs(Fraction(weight) - level) for level in q]
    return max(i for i, distance in enumerate(distances) if distance == min(distances))


def clear_of_edges(weight: float, q: list[Fraction], window: float, slack: float) -> bool:
    """Far enough from levels, midpoints and window edges for rounding not to decide."""
    middles = [(low + high) / 2 for low, high in pairwise(q)]
    halves = [(high - low) / (2 * Fraction(window)) if window < math.inf else Fraction(0) for low, high in pairwise(q)]
    edges = [*q, *middles]
    edges += [middle + sign * half for middle, half in zip(middles, halves, strict=True) for sign in (-1, 1)]
    return all(abs(Fraction(weight) - edge) > slack for edge in edges)


def sample(name: str, scale: float, units: list[float]) -> tuple[Grid, Tensor, list[Fraction], float]:
    """A grid, float32 weights, the exact levels, and the slack within which rounding may decide."""
    levels = level_set(name)
    outermost = max(abs(level) for level in levels.levels)
    weights = torch.tensor([unit * scale * outermost for unit in units], dtype=torch.float32)
    slack = 4e-6 * outermost * scale
    return Grid(levels, torch.tensor(scale)), weights, levels_of(name, scale), slack


@given(constraints, scales, windows, units)
@settings(max_examples=100, deadline=None)
def test_agrees_with_scalar_reference(name: str, scale: float, window: float, units: list[float]) -> None:
    grid, weights, q, slack = sample(name, scale, units)
    level_values = level_set(name).levels
    index, codes, level = grid.index(weights), grid.codes(weights), grid.level(weights)
    snapped, distance = grid.nearest(weights), grid.distance(weights)
    penalty, slope = grid.penalty(weights, window), grid.slope(weights, window)
    assert torch.equal(penalty, grid.penalty(weights, window, snapped))
    assert torch.equal(slope, grid.slope(weights, window, snapped))
    for k, weight in enumerate(weights.tolist()):
        tolerance = slack + 1e-6 * abs(weight)
        y, cs, pull = reference(weight, q, window)
        assert distance[k].item() == pytest.approx(y, abs=tolerance, rel=0)
        assert snapped[k].item() == pytest.approx(float(q[int(index[k])]), rel=1e-6)
        if not clear_of_edges(weight, q, window, tolerance):
            continue
        expected = nearest(weight, q)
        assert index[k] == expected
        assert codes[k] == level_set(name).codes[expected]
        assert level[k].item() == pytest.approx(level_values[expected], rel=1e-6)
        assert penalty[k].item() == pytest.approx(cs, abs=tolerance, rel=0)
        assert slope[k].item() == pull


@given(constraints, st.floats(1e-3, 1e3), windows, units)
@settings(max_examples=60, deadline=None)
def test_slope_is_the_derivative_of_the_penalty(name: str, scale: float, window: float, units: list[float]) -> None:
    grid = Grid(level_set(name), torch.tensor(scale, dtype=torch.float64))
    outermost = max(abs(level) for level in level_set(name).levels)
    step = 1e-7 * scale * outermost
    weights = torch.tensor(units, dtype=torch.float64) * scale * outermost
    q = levels_of(name, scale)
    clear = torch.tensor([clear_of_edges(weight, q, window, 2 * step) for weight in weights.tolist()])
    difference = (grid.penalty(weights + step, window) - grid.penalty(weights - step, window)) / (2 * step)
    torch.testing.assert_close(grid.slope(weights, window)[clear], difference[clear], rtol=0, atol=1e-5)


@given(constraints, scales, units, st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_codes_decode_to_the_very_bits(name: str, scale: float, units: list[float], channels: int) -> None:
    levels = level_set(name)
    weight = torch.tensor(units * channels).mul_(scale).reshape(channels, -1, 1)
    per_channel = torch.tensor([scale * (0.3 + 0.7 * c) for c in range(channels)])
    for a in (torch.tensor(scale), per_channel.reshape(-1, 1, 1)):
        grid = Grid(levels, a)
        codes, snapped = grid.codes(weight), grid.nearest(weight)
        assert codes.dtype == torch.int32
        assert torch.equal(codes * (a / levels.denominator), snapped)
        tensor = ConstrainedTensor(
            codes=codes.numpy(),
            scale=a.reshape(-1 if a.dim() else ()).numpy(),
            levels=levels.codes,
            denominator=levels.denominator,
            constraint=name,
        )
        assert tensor.weight().dtype == np.float32
        assert np.array_equal(tensor.weight().view(np.int32), snapped.numpy().view(np.int32))
        # snapping what is snapped changes no bit
        assert torch.equal(grid.nearest(snapped), snapped)
        assert torch.equal(grid.codes(snapped), codes)
        assert not grid.distance(snapped).any()
        for window in WINDOWS:
            assert not grid.penalty(snapped, window).any()
            assert not grid.slope(snapped, window).any()


@pytest.mark.parametrize(
    "name", [*CONSTRAINTS, "shift:3", "shift:10", "levels:-3,-2,-1,0,1,2,3", "levels:-1,-0.25,0.5"]
)
@pytest.mark.parametrize("scale", [2.0**-20, 0.25, 1.0, 2.0**12])
def test_ties_go_up(name: str, scale: float) -> None:
    # with these levels and scales every midpoint is exact in float32
    grid = Grid(level_set(name), torch.tensor(scale))
    q = [float(level) for level in levels_of(name, scale)]
    midpoints = torch.tensor([(low + high) / 2 for low, high in pairwise(q)])
    assert grid.nearest(midpoints).tolist() == q[1:]
    # -1e-30, for what is nearer to 0 may vanish when it is divided by the scale
    below = torch.where(midpoints == 0, -1e-30, torch.nextafter(midpoints, torch.tensor(-math.inf)))
    assert grid.nearest(below).tolist() == q[:-1]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 0.25, 0.7, 3e7, 1e30])
@pytest.mark.parametrize("name", ["binary", "ternary", "one-bit-shift", "two-bit-shift", "shift:3", "shift:10"])
def test_bits_are_those_of_search_and_look_up(name: str, scale: float, per_channel: bool) -> None:
    """Everything in NumPy's float32: found by search, taken from tables. On edges and beside them too."""
    levels, generator = level_set(name), np.random.default_rng(0)
    a = np.float32(scale) * (generator.random((6, 1), np.float32) + np.float32(0.5) if per_channel else np.float32(1))
    unit, q = a / np.float32(levels.denominator), np.array(levels.codes, np.float32)
    edges = np.broadcast_to(unit, (6, 1)) * np.concatenate([q, (q[:-1] + q[1:]) / 2])
    outer = np.float32(scale * 1.5) * generator.standard_normal((6, 500), np.float32)
    tiny = np.broadcast_to(np.array([0.0, -0.0, 1e-38, -1e-38, 1e30, -1e30], np.float32), (6, 6))
    beside = [np.nextafter(edges, np.float32(np.copysign(np.inf, side))) for side in (-1, 1)]
    weight = np.concatenate([edges, *beside, outer, tiny], axis=1)

    with np.errstate(over="ignore"):
        ratio = weight / a
    index = np.searchsorted((q[:-1] + q[1:]) / 2 / levels.denominator, ratio, side="right")
    nearest = q[index] * unit
    gaps = np.array([np.inf, *np.diff(q), np.inf], np.float32)
    residual = weight - nearest
    half_gap = np.where(residual > 0, gaps[index + 1], gaps[index]) / np.float32(levels.denominator) * (a / 2)
    grid = Grid(levels, torch.from_numpy(np.asarray(a)))
    ours = torch.from_numpy(weight)
    assert np.array_equal(grid.nearest(ours).numpy(), nearest)
    assert np.array_equal(grid.codes(ours).numpy(), q[index])
    assert np.array_equal(grid.index(ours).numpy(), index)
    for window in (1.0, 1.5, 5.0, 20.0, math.inf):
        with np.errstate(invalid="ignore"):  # infinity / infinity
            free = np.abs(half_gap - np.abs(residual)) < half_gap / np.float32(window)
        slope = np.where(free, 0, 2 * np.sign(residual))
        for nearest in (None, grid.nearest(ours)):
            assert np.array_equal(grid.slope(ours, window, nearest).numpy(), slope)
            assert np.array_equal(grid.penalty(ours, window, nearest).numpy(), residual * slope)


@pytest.mark.parametrize("name", ["binary", "ternary", "one-bit-shift", "two-bit-shift", "shift:10"])
@pytest.mark.parametrize("scale", [1e-40, 1e-36, 0.7, 1.0, 1e30])
def test_edges_against_float64(name: str, scale: float) -> None:
    """Midpoints, window edges, denormal numbers and 1e30, with their neighbours: right, or next to an edge."""
    levels, a = level_set(name), np.float32(scale)
    q = np.array(levels.codes, np.float64) / levels.denominator * np.float64(a)
    gaps, middles = np.diff(q), (q[:-1] + q[1:]) / 2
    grid = Grid(levels, torch.tensor(a))
    for window in (1.0, 1.5, 20.0, math.inf):
        edges = np.concatenate([q, middles, middles - gaps / 2 / window, middles + gaps / 2 / window, [1e30, -1e30]])
        edges = np.concatenate([edges, [0, 1e-45, -1e-45, 1e-39, -1e-39]]).astype(np.float32)
        weight = np.stack([np.nextafter(edges, -np.float32(np.inf)), edges, np.nextafter(edges, np.float32(np.inf))])
        exact = weight.astype(np.float64)
        ours = torch.from_numpy(weight)
        # a few roundings at the size of the weight and the scale, or of the smallest numbers, scaled and unscaled
        slack = 1e-6 * np.minimum(np.abs(exact), 2 * q[-1]) + 4e-45 * (levels.denominator + np.float64(a))
        distance = np.abs(exact[..., None] - q).min(-1)
        snapped = grid.nearest(ours).numpy().astype(np.float64)
        assert (np.abs(snapped[..., None] - q).min(-1) <= slack).all()  # on a level
        assert (np.abs(exact - snapped) <= distance + slack + 1e-7 * distance).all()  # and on the nearest
        free = (np.abs(exact[..., None] - middles) < gaps / 2 / window).any(-1)
        margin = np.abs(np.abs(exact[..., None] - middles) - gaps / 2 / window).min(-1)
        sure = (margin > slack) & (distance > slack) & (np.abs(exact[..., None] - middles).min(-1) > slack)
        expected = np.where(free, 0, 2 * np.sign(exact - q[np.searchsorted(middles, exact, side="right")]))
        assert np.array_equal(grid.slope(ours, window).numpy()[sure], expected[sure])
        penalty = grid.penalty(ours, window).numpy()
        wanted = np.where(free, 0, 2 * distance)
        clear = (margin > slack) | (window == math.inf)
        assert (np.abs(penalty - wanted)[clear] <= (2 * slack + 1e-6 * wanted)[clear]).all()


def test_negative_zero_is_a_tie_too() -> None:
    grid = Grid(CONSTRAINTS["binary"], torch.tensor(0.7))
    assert torch.equal(grid.nearest(torch.tensor([0.0, -0.0])), torch.full((2,), 0.7))


@pytest.mark.parametrize("name", NAMES)
def test_midpoints_of_any_scale_land_on_a_level(name: str) -> None:
    scale = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)) * 2 + 0.01
    levels = level_set(name)
    grid = Grid(levels, scale)
    allowed = torch.tensor(levels.codes, dtype=torch.float32) * (scale / levels.denominator)
    midpoints = (allowed[:, :-1] + allowed[:, 1:]) / 2
    for _ in range(3):
        snapped = grid.nearest(midpoints)
        assert (snapped.unsqueeze(-1) == allowed.unsqueeze(1)).any(-1).all()
        # a shut window leaves no weight free, wherever rounding puts the midpoint
        penalty, slope = grid.penalty(midpoints, math.inf), grid.slope(midpoints, math.inf)
        assert (penalty > 0).all()
        assert torch.equal(slope.abs(), torch.full_like(slope, 2))
        midpoints = torch.nextafter(midpoints, torch.tensor(-math.inf))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e30])
def test_extreme_weights(name: str, scale: float) -> None:
    levels = level_set(name)
    grid = Grid(levels, torch.tensor(scale))
    weights = torch.tensor([1e30, -1e30, 1e-45, -1e-45, 1e-38, 0.0, -0.0])
    at_zero = nearest(0.0, levels_of(name, 1.0))
    index = grid.index(weights)
    if scale < 1e30:
        assert index[:2].tolist() == [len(levels.codes) - 1, 0]
        assert index[5] == index[6] == at_zero
    allowed = torch.tensor(levels.codes, dtype=torch.float32) * (torch.tensor(scale) / levels.denominator)
    assert torch.equal(grid.nearest(weights), allowed[index])
    assert grid.nearest(weights).isfinite().all()
    assert grid.distance(weights).isfinite().all()
    for window in WINDOWS:
        penalty, slope = grid.penalty(weights, window), grid.slope(weights, window)
        assert penalty.isfinite().all()
        assert (penalty >= 0).all()
        assert set(slope.abs().tolist()) <= {0.0, 2.0}
    if scale < 1e30:
        # nothing is free beyond the outer levels, not even at g = 1
        assert grid.slope(weights[:2], 1.0).tolist() == [2.0, -2.0]


@pytest.mark.parametrize("name", NAMES)
def test_windows(name: str) -> None:
    grid = Grid(level_set(name), torch.tensor(0.7))
    low, high = (float(level) for level in (levels_of(name, 0.7)[0], levels_of(name, 0.7)[-1]))
    weights = torch.linspace(2 * low - high - 1, 2 * high - low + 1, 4001)
    inside = (weights > low) & (weights < high)
    assert not grid.penalty(weights[inside], 1.0).any()
    assert (grid.penalty(weights[~inside], 1.0) > 0).all()
    free = [grid.slope(weights, window) == 0 for window in WINDOWS]
    for wider, narrower in pairwise(free):
        assert (wider | ~narrower).all()
    assert torch.equal(grid.penalty(weights, math.inf), grid.distance(weights))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-8, 0.7, 1e8])
def test_gaps_and_limits(name: str, scale: float) -> None:
    levels = level_set(name)
    grid = Grid(levels, torch.tensor(scale))
    unit = torch.tensor(scale) / levels.denominator
    q = (torch.tensor(levels.codes, dtype=torch.float32) * unit).tolist()
    weights = torch.cat([torch.tensor(q), scale * torch.linspace(-3, 3, 501)])
    assert [limit.item() for limit in grid.limits()] == [q[0], q[-1]]
    for weight, lower, width in zip(weights.tolist(), *(part.tolist() for part in grid.gap(weights)), strict=True):
        # the last level that is not above the weight, but never the last of all, nor one before the first
        index = max([k for k, level in enumerate(q[:-1]) if level <= weight], default=0)
        assert lower == q[index]
        assert width == pytest.approx(q[index + 1] - q[index], rel=1e-5)


def test_gaps_have_the_scale_of_their_channel() -> None:
    grid = Grid(CONSTRAINTS["ternary"], torch.tensor([[1.0], [0.5]]))
    lower, width = grid.gap(torch.tensor([[0.3, -5.0, 0.0], [-0.3, 0.6, 0.5]]))
    assert lower.tolist() == [[0.0, -1.0, 0.0], [-0.5, 0.0, 0.0]]
    assert width.tolist() == [[1.0] * 3, [0.5] * 3]
    assert grid.limits()[1].tolist() == [[1.0], [0.5]]


def test_scale_per_channel_is_a_scale_for_each_channel() -> None:
    levels = CONSTRAINTS["two-bit-shift"]
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.1, 0.5, 1.0, 3.0, 1e-4])
    whole = Grid(levels, scale.reshape(-1, 1, 1, 1))
    for c in range(5):
        alone = Grid(levels, scale[c])
        assert torch.equal(whole.nearest(weight)[c], alone.nearest(weight[c]))
        assert torch.equal(whole.level(weight)[c], alone.level(weight[c]))
        assert torch.equal(whole.penalty(weight, 3.0)[c], alone.penalty(weight[c], 3.0))
        assert torch.equal(whole.slope(weight, 3.0)[c], alone.slope(weight[c], 3.0))


def test_grid_follows_its_scale() -> None:
    scale = torch.tensor(1.0)
    grid = Grid(CONSTRAINTS["ternary"], scale)
    weight = torch.tensor([0.4, 0.6])
    assert grid.nearest(weight).tolist() == [0.0, 1.0]
    scale.mul_(0.5)
    assert grid.nearest(weight).tolist() == [0.5, 0.5]


def test_nothing_changes_the_weight_it_is_asked_about() -> None:
    grid = Grid(CONSTRAINTS["ternary"], torch.tensor(0.3))
    weight = torch.randn(50)
    before = weight.clone()
    grid.index(weight), grid.codes(weight), grid.level(weight), grid.nearest(weight), grid.distance(weight)
    grid.penalty(weight, 2.0), grid.slope(weight, 2.0)
    assert torch.equal(weight, before)


def test_channels_last_gives_the_same_and_no_warning() -> None:
    weight = torch.randn(4, 6, 3, 3)
    grid = Grid(CONSTRAINTS["two-bit-shift"], torch.tensor(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = weight.to(memory_format=torch.channels_last)
        assert torch.equal(grid.nearest(other), grid.nearest(weight))
        assert torch.equal(grid.codes(other), grid.codes(weight))
        assert torch.equal(grid.penalty(other, 3.0), grid.penalty(weight, 3.0))


def test_total_does_not_lose_small_weights() -> None:
    values = torch.full((2**20,), 1e-3)
    values[0] = 1e6
    assert total(values) == pytest.approx(1e6 + (2**20 - 1) * float(np.float32(1e-3)), rel=1e-12)


@pytest.mark.parametrize(
    "name, codes, denominator",
    [
        ("binary", (-1, 1), 1),
        ("bin", (-1, 1), 1),
        ("ternary", (-1, 0, 1), 1),
        ("ter", (-1, 0, 1), 1),
        ("one-bit-shift", (-2, -1, 0, 1, 2), 2),
        ("1bit", (-2, -1, 0, 1, 2), 2),
        ("two-bit-shift", (-4, -2, -1, 0, 1, 2, 4), 4),
        ("2bit", (-4, -2, -1, 0, 1, 2, 4), 4),
        ("shift:3", (-8, -4, -2, -1, 0, 1, 2, 4, 8), 8),
        ("shift:1", (-2, -1, 0, 1, 2), 2),
        ("levels:1,-1", (-1, 1), 1),
        ("levels: -1 , 0.5 ", (-2, 1), 2),
        ("levels:-1,-0.3,0.5", (-10, -3, 5), 10),
        ("levels:1/3,1,-1/2", (-3, 2, 6), 6),
        ("levels:1e-2,2.5e1", (1, 2500), 100),
        ("levels:2,4", (2, 4), 1),
    ],
)
def test_names(name: str, codes: tuple[int, ...], denominator: int) -> None:
    levels = level_set(name)
    assert (levels.codes, levels.denominator) == (codes, denominator)
    assert levels.levels == tuple(code / denominator for code in codes)
    assert levels.name == ALIASES.get(name, name)
    assert level_set(levels) is levels
    assert level_set(levels.name) == levels


def test_table_is_consistent() -> None:
    for name, levels in CONSTRAINTS.items():
        assert levels.name == name
        assert list(levels.codes) == sorted(set(levels.codes))
    assert set(ALIASES.values()) == set(CONSTRAINTS)
    assert shift_levels(2).codes == CONSTRAINTS["two-bit-shift"].codes
    most = level_set("levels:" + ",".join(map(str, range(MAX_LEVELS))))
    assert len(most.codes) == MAX_LEVELS


@pytest.mark.parametrize(
    "name, message",
    [
        ("ternery", "did you mean 'ternary'"),
        ("Binary", "did you mean 'binary'"),
        ("two-bit", "did you mean 'two-bit-shift'"),
        ("3bit", "'1bit' or '2bit'|'2bit' or '1bit'"),
        ("", "known are binary, ternary, one-bit-shift, two-bit-shift, shift:K, levels:Q,Q,…"),
        ("xyz", "unknown constraint 'xyz'; known are"),
        ("shift", "unknown constraint"),
        ("shift:", "unknown constraint"),
        ("levels:", "unknown constraint"),
        ("level:1,2", "unknown constraint"),
        ("shift:0", "whole number from 1 to 10"),
        ("shift:11", "whole number from 1 to 10"),
        ("shift:-1", "whole number from 1 to 10"),
        ("shift:1.5", "whole number from 1 to 10"),
        ("shift:two", "whole number from 1 to 10"),
        ("shift:²", "whole number from 1 to 10"),
        ("shift:" + "9" * 5000, "whole number from 1 to 10"),
        ("levels:1", "two to 256 different levels"),
        ("levels:1,1", "two to 256 different levels"),
        ("levels:0.5,1/2", "two to 256 different levels"),
        ("levels:" + ",".join(map(str, range(257))), "two to 256 different levels"),
        ("levels:a,b", "write levels as numbers with commas"),
        ("levels:1,,2", "write levels as numbers with commas"),
        ("levels:1;2", "write levels as numbers with commas"),
        ("levels:1/0,1", "write levels as numbers with commas"),
        ("levels:nan,1", "write levels as numbers with commas"),
        ("levels:inf,1", "write levels as numbers with commas"),
        ("levels:" + "9" * 5000 + ",1", "write levels as numbers with commas"),
        ("levels:0,16777216", "no common denominator below 2"),
        ("levels:0,1e-8", "no common denominator below 2"),
        ("levels:1/4099,1/4111", "no common denominator below 2"),
        ("levels:0,1e30", "no common denominator below 2"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        level_set(name)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_levels_of_ones_own() -> None:
    mine = LevelSet("mine", (-5, 0, 5), 2)
    assert mine.levels == (-2.5, 0.0, 2.5)
    assert Grid(mine, torch.tensor(2.0)).nearest(torch.tensor([-3.0, 1.0, 2.6])).tolist() == [-5.0, 0.0, 5.0]
