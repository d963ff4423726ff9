"""First scales: the paper's mean, and the best scale of all against a search by brute force."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cbpq import scales
from cbpq.levels import CONSTRAINTS, Grid, LevelSet, level_set
from cbpq.scales import RULES, SMALLEST_SCALE, initial_scale

NAMES = (
    *CONSTRAINTS,
    "shift:3",
    "levels:-1,-0.3,0.5",
    "levels:-3,-2,-1,0,1,2,3",
    "levels:0,1",
    "levels:-1,1/3",
    "levels:1,2",
)
GRANULARITIES = ("layer", "channel")


def weights(kind: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    normal = torch.randn(*shape, generator=generator)
    if kind == "heavy tails":
        return normal / torch.rand(*shape, generator=generator).clamp_min(0.01)
    if kind == "outlier":
        normal.reshape(shape[0], -1)[:, 0] = 50
    return normal.abs() if kind == "positive" else normal


def error(weight: Tensor, levels: LevelSet, scale: Tensor) -> Tensor:
    """‖w − a·q(w/a)‖² of each row of a matrix, in float64."""
    return (weight.double() - Grid(levels, scale.double()).nearest(weight.double())).square().sum(dim=1, keepdim=True)


def best_by_brute_force(rows: Tensor, levels: LevelSet) -> Tensor:
    """The smallest error over a dense grid of scales, four orders of magnitude up to the largest that matters."""
    midpoints = [abs(low + high) / 2 for low, high in pairwise(levels.levels) if low + high]
    reach = rows.abs().amax(dim=1, keepdim=True) / min([*midpoints, max(map(abs, levels.levels))])
    grid = reach.double() * torch.logspace(-4, 0.01, 1500, dtype=torch.float64)
    weight = rows.double().unsqueeze(1)  # (R, 1, n) beside scales (R, 1500, 1)
    errors = (weight - Grid(levels, grid.unsqueeze(2)).nearest(weight)).square().sum(dim=2)
    return errors.amin(dim=1, keepdim=True)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "outlier", "positive"])
@pytest.mark.parametrize("name", NAMES)
def test_least_squares_is_the_best_scale(name: str, kind: str, granularity: str) -> None:
    levels = level_set(name)
    for shape in ((12, 1, 3, 3), (4, 24)):
        weight = weights(kind, *shape)
        scale = initial_scale(weight, levels, "least-squares", granularity)
        rows = weight.reshape(shape[0] if granularity == "channel" else 1, -1)
        ours, best = error(rows, levels, scale.reshape(-1, 1)), best_by_brute_force(rows, levels)
        # where all levels are positive and most weights are not, no scale is better than none
        hopeless = best > 0.999 * rows.double().square().sum(dim=1, keepdim=True)
        assert ((ours <= best * (1 + 1e-4)) | hopeless).all()
        assert not hopeless.any() or min(levels.codes) > 0


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=7).filter(any), st.sampled_from(NAMES[:-1]))
@settings(max_examples=100, deadline=None)
def test_least_squares_on_a_few_weights(values: list[float], name: str) -> None:
    levels = level_set(name)
    rows = torch.tensor([values])
    scale = initial_scale(rows, levels, "least-squares", "layer")
    if not levels.codes[0] < 0 and rows.max() <= 0:
        return  # no level on the weights' side
    ours, best = error(rows, levels, scale.reshape(1, 1)), best_by_brute_force(rows, levels)
    assert ours.item() <= best.item() * (1 + 1e-4) + 1e-9


def test_a_large_layer_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = CONSTRAINTS["two-bit-shift"]
    weight = torch.randn(20, 2000, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 20).unsqueeze(1)
    exact = {granularity: initial_scale(weight, levels, "least-squares", granularity) for granularity in GRANULARITIES}
    monkeypatch.setattr(scales, "MOST_EVENTS", 7 * 2000)  # whole rows of channels, a 20th of the layer
    assert torch.equal(initial_scale(weight, levels, "least-squares", "channel"), exact["channel"])
    sampled = initial_scale(weight, levels, "least-squares", "layer")
    flat = weight.reshape(1, -1)
    assert error(flat, levels, sampled.reshape(1, 1)) <= 1.001 * error(flat, levels, exact["layer"].reshape(1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_mean_abs_is_the_mean(name: str) -> None:
    weight = torch.randn(8, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    layer = initial_scale(weight, level_set(name), "mean-abs", "layer")
    channel = initial_scale(weight, level_set(name), "mean-abs", "channel")
    assert layer == weight.double().abs().mean().float()
    assert torch.equal(channel.flatten(), weight.double().abs().mean(dim=(1, 2, 3)).float())


def test_mean_abs_of_many_small_weights() -> None:
    weight = torch.full((2**22, 1), 0.1)
    weight[0] = 1e5  # in float32, adding 0.1 to this would lose digits
    expected = (1e5 + (2**22 - 1) * 0.1) / 2**22
    assert initial_scale(weight, CONSTRAINTS["binary"], "mean-abs", "layer").item() == pytest.approx(expected, rel=1e-6)


def test_binary_least_squares_is_the_mean() -> None:
    # min over a of Σ(|w| − a)² is the mean of |w|
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    for granularity in GRANULARITIES:
        best = initial_scale(weight, CONSTRAINTS["binary"], "least-squares", granularity)
        mean = initial_scale(weight, CONSTRAINTS["binary"], "mean-abs", granularity)
        torch.testing.assert_close(best, mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 3), (4, 3, 5), (4, 1, 2, 2, 2), (4,), (1, 1)])
def test_shapes(rule: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=dtype)
    layer = initial_scale(weight, CONSTRAINTS["ternary"], rule, "layer")
    channel = initial_scale(weight, CONSTRAINTS["ternary"], rule, "channel")
    assert layer.shape == ()
    assert channel.shape == (shape[0], *[1] * (len(shape) - 1))
    assert layer.dtype == channel.dtype == dtype
    assert layer > 0
    assert (channel > 0).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_zero_weights(name: str, granularity: str, rule: str) -> None:
    weight = torch.zeros(3, 4)
    scale = initial_scale(weight, level_set(name), rule, granularity)
    assert torch.equal(scale, torch.full_like(scale, SMALLEST_SCALE))
    assert Grid(level_set(name), scale).nearest(weight).abs().max() < 1e-28
    mixed = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    assert (initial_scale(mixed, level_set(name), rule, granularity) > 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [3.0, 1e-20, 1e20])
def test_one_weight_becomes_a_level(name: str, value: float) -> None:
    weight = torch.tensor([[value]])
    scale = initial_scale(weight, level_set(name), "least-squares", "channel")
    torch.testing.assert_close(Grid(level_set(name), scale).nearest(weight), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_powers_of_two_scale_exactly(name: str, rule: str, granularity: str) -> None:
    weight = weights("heavy tails", 6, 40)
    scale = initial_scale(weight, level_set(name), rule, granularity)
    for power in (-80, -30, -1, 1, 30, 100):
        scaled = initial_scale(torch.ldexp(weight, torch.tensor(power)), level_set(name), rule, granularity)
        assert torch.equal(scaled, torch.ldexp(scale, torch.tensor(power)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_channels_know_nothing_of_each_other(name: str, rule: str) -> None:
    weight = weights("normal", 6, 40)
    before = initial_scale(weight, level_set(name), rule, "channel")
    for others in (torch.zeros(40), torch.full((40,), 1e30), torch.linspace(-1e-9, 1e-9, 40)):
        changed = weight.clone()
        changed[[0, 1, 2, 4, 5]] = others
        assert torch.equal(initial_scale(changed, level_set(name), rule, "channel")[3], before[3])


@pytest.mark.parametrize("rule", RULES)
def test_no_level_on_the_side_of_the_weights(rule: str) -> None:
    # any scale gives zeros; it must stay where a weight that changes its sign can reach it
    weight = -torch.rand(1, 20)
    scale = initial_scale(weight, level_set("levels:0,1"), rule, "channel")
    assert weight.abs().min() < scale.item() < weight.abs().max()


def test_gradients_are_none_of_its_business() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    for rule in RULES:
        assert not initial_scale(weight, CONSTRAINTS["ternary"], rule, "channel").requires_grad
