"""Every method but CBP against its rule in plain Python numbers, weight by weight."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cbpq.constrained import bind
from cbpq.errors import UsageError
from cbpq.layers import LayerChoice
from cbpq.levels import Grid, level_set
from cbpq.methods import METHODS
from cbpq.methods.base import Method, Slot
from cbpq.presets import resolve

NAMES = ("binary", "ternary", "two-bit-shift", "levels:-1,-0.3,0.5", "levels:1,2,4")
TWO_LEVELS = ("binary", "levels:-0.5,1", "levels:1,3")
SCALE, LR = 0.6, 0.05
every_constraint = pytest.mark.parametrize("constraint", NAMES)


def make(name: str, **given: Any) -> Any:
    """A method with its settings of preset ``paper``, but those given."""
    kind = METHODS[name]
    return kind(**resolve("paper", method=name, layers=[("the test", given)]).settings.of(kind))


def slot_of(method: Method, weights: list[float], constraint: str, scale: float = SCALE) -> Slot:
    latent = torch.tensor(weights, dtype=torch.float64)
    grid = Grid(level_set(constraint), torch.tensor(scale, dtype=torch.float64))
    return Slot(latent, grid, method.start(latent))


def levels_of(constraint: str, scale: float = SCALE) -> list[float]:
    return [scale * level for level in level_set(constraint).levels]


def nearest(w: float, q: list[float]) -> float:
    """On a midpoint, the upper level."""
    return min(reversed(q), key=lambda level: abs(w - level))


def draw(count: int, seed: int) -> list[float]:
    values: list[float] = torch.randn(
        count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).tolist()
    return values


def close(ours: Tensor, theirs: list[float]) -> None:
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-9, atol=1e-12)


# straight-through


@pytest.mark.parametrize("bounded", [True, False])
@every_constraint
def test_straight_through(constraint: str, bounded: bool) -> None:
    method = make("straight-through", straight_through_bounded=bounded)
    q, w, lr = levels_of(constraint), draw(60, 1), 1.5  # steps that reach the range from outside
    slot = slot_of(method, w, constraint)
    outside = 0
    for step in range(30):
        close(method.constrained_weight(slot), [nearest(x, q) for x in w])
        gradient = draw(60, 100 + step)
        if bounded:
            outside += sum(not q[0] <= x <= q[-1] for x in w)
            followed = [g if q[0] <= x <= q[-1] else 0.0 for g, x in zip(gradient, w, strict=True)]
            w = [min(max(x - lr * g, q[0]), q[-1]) for g, x in zip(followed, w, strict=True)]
        else:
            w = [x - lr * g for g, x in zip(gradient, w, strict=True)]
        slot.latent.sub_(lr * method.gradient(slot, torch.tensor(gradient, dtype=torch.float64), lr))
        method.after_step(slot, lr)
        close(slot.latent, w)
    assert (outside > 0) == bounded  # else the mask was not tried


# ProxQuant


@pytest.mark.parametrize("constraint", [*NAMES, "shift:5"])
def test_proxquant(constraint: str) -> None:
    strength, freeze, steps = 0.3, 0.7, 40
    method = make("proxquant", proxquant_strength=strength, proxquant_freeze=freeze)
    q, w = levels_of(constraint), draw(60, 2)
    slot = slot_of(method, w, constraint)
    pull, frozen, arrived = 0.0, False, 0
    for step in range(steps):
        close(method.constrained_weight(slot), w)  # the weight itself
        gradient = draw(60, 200 + step)
        if frozen:
            followed, w = [0.0] * 60, [nearest(x, q) for x in w]
        else:
            followed, moved = gradient, [x - LR * g for g, x in zip(gradient, w, strict=True)]
            w = []
            for x in moved:
                away = x - nearest(x, q)
                arrived += abs(away) <= LR * pull
                w.append(x - math.copysign(min(LR * pull, abs(away)), away))
        given = method.gradient(slot, torch.tensor(gradient, dtype=torch.float64), LR)
        close(given, followed)
        slot.latent.sub_(LR * given)
        if frozen:
            slot.latent.add_(0.3)  # momentum does not ask
        method.after_step(slot, LR)
        close(slot.latent, w)
        expected = pull * sum(abs(x - nearest(x, q)) for x in w)
        assert method.penalty(slot) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        progress = (step + 1) / steps
        update = method.advance(progress, [slot])
        pull = strength * progress
        assert update.weights_changed == (progress >= freeze and not frozen)
        if update.weights_changed:
            frozen, w = True, [nearest(x, q) for x in w]
    assert frozen
    assert 0 < arrived < 60 * steps * 0.7
    assert torch.equal(slot.grid.nearest(slot.latent), slot.latent)


def test_proxquant_ends_on_the_level_itself_and_never_past_it() -> None:
    method = make("proxquant", proxquant_strength=1.0)
    slot = slot_of(method, [0.59, 0.61, 0.6, 0.35, -0.1, 5.0], "binary")
    method.advance(0.5, [slot])
    method.after_step(slot, 0.1)
    close(slot.latent, [0.6, 0.6, 0.6, 0.4, -0.15, 4.95])
    assert torch.equal(slot.latent[:3], slot.grid.nearest(slot.latent[:3]))
    method.advance(0.2, [slot])  # it never weakens
    assert method.describe() == {"strength": 0.5}


def test_frozen_weights_follow_a_learned_scale() -> None:
    method = make("proxquant", proxquant_freeze=0.5)
    slot = slot_of(method, [0.7, -0.5, 0.1], "ternary")
    method.advance(0.5, [slot])
    slot.grid.scale.mul_(3)  # far enough for other levels to be the nearest
    method.after_step(slot, LR)
    close(slot.latent, [1.8, -1.8, 0.0])


# AdaSTE, in the cases of its derivation as a table, not by the one formula they have in common


def adaste_weight(t: float, mu: float, alpha: float) -> float:
    if t >= 1 - mu * alpha:
        return 1.0
    return (t + mu * (1 + alpha)) / (1 + mu)


def adaste_factor(theta: float, g: float, mu: float, alpha: float, bound: float) -> float:
    t = abs(theta)
    outward = (g > 0) != (theta >= 0)
    if mu * alpha >= 1:
        return 0.0 if outward else min(2 / t, bound)
    if t >= 1 - mu * alpha:
        return 0.0 if outward else min((1 + 2 * mu + mu * alpha) / ((1 + mu) * t), bound)
    return 1 / (1 + mu) if outward else min((t + 2 * mu * (1 + alpha)) / ((1 + mu) * t), bound)


@pytest.mark.parametrize("bound", [0.5, 1e6])
@pytest.mark.parametrize("alpha, first, full", [(0.01, 0.01, 0.27), (0.3, 0.2, 0.8)])
@pytest.mark.parametrize("constraint", TWO_LEVELS)
def test_adaste(constraint: str, alpha: float, first: float, full: float, bound: float) -> None:
    method = make("adaste", adaste_margin=alpha, adaste_coupling=first, adaste_full=full, adaste_flip_bound=bound)
    low, high = levels_of(constraint)
    centre, unit = (low + high) / 2, (high - low) / 2
    theta = draw(80, 3)
    slot = slot_of(method, [centre + unit * x for x in theta], constraint)
    for step in range(20):
        progress = step / 20
        mu = min(first * (1 / alpha / first) ** (progress / full), 1 / alpha)
        update = method.advance(progress, [slot])
        assert update.weights_changed == (0 < progress < full + 0.05 - 1e-9)
        assert method.describe()["coupling"] == pytest.approx(mu)
        if progress >= full:
            mu = 1 / alpha
            assert torch.equal(method.constrained_weight(slot), slot.grid.nearest(slot.latent))
        expected = [centre + unit * math.copysign(adaste_weight(abs(x), mu, alpha), x) for x in theta]
        close(method.constrained_weight(slot), expected)
        gradient = draw(80, 300 + step)
        followed = [g * adaste_factor(x, g, mu, alpha, bound) for g, x in zip(gradient, theta, strict=True)]
        given = method.gradient(slot, torch.tensor(gradient, dtype=torch.float64), LR)
        torch.testing.assert_close(given, torch.tensor(followed, dtype=torch.float64), rtol=1e-7, atol=1e-12)
        before = slot.latent.clone()
        method.after_step(slot, LR)
        assert torch.equal(slot.latent, before)
        theta = [x + 0.1 * d for x, d in zip(theta, draw(80, 400 + step), strict=True)]
        slot.latent.copy_(torch.tensor([centre + unit * x for x in theta], dtype=torch.float64))


@pytest.mark.parametrize("mu, alpha", [(0.01, 0.01), (0.5, 0.01), (2.0, 0.3), (50.0, 0.01)])
def test_adaste_weight_is_the_minimiser(mu: float, alpha: float) -> None:
    """By trying all of a fine row of values."""
    method = make("adaste", adaste_margin=alpha, adaste_coupling=mu)
    row = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    theta = torch.tensor([-1.7, -0.99, -0.4, -0.01, 0.02, 0.3, 0.8, 1.2], dtype=torch.float64)
    cost = (row - theta[:, None]).square() / 2 + mu / 2 * (row.abs() - 1 - alpha).square()
    slot = slot_of(method, theta.tolist(), "binary", 1.0)
    torch.testing.assert_close(method.constrained_weight(slot), row[cost.argmin(1)], rtol=0, atol=1e-4)


def test_adaste_on_the_midpoint() -> None:
    method = make("adaste")
    slot = slot_of(method, [0.0, 0.0, 0.0], "binary")
    assert (method.constrained_weight(slot) > 0).all()
    gradient = method.gradient(slot, torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64), LR)
    close(gradient, [0.5, -1 / 1.01, 0.0])


def test_adaste_moves_weights_across_the_midpoint_and_then_holds_them() -> None:
    """What the factors are for: at full attraction a weight that the loss is content with does not move."""
    method = make("adaste")
    slot = slot_of(method, [0.1, -0.1], "binary")
    method.advance(1.0, [slot])
    gradient = torch.tensor([1.0, 1.0], dtype=torch.float64)
    for _ in range(100):
        slot.latent.sub_(0.01 * method.gradient(slot, gradient.clone(), 0.01))
    assert slot.latent[0] < 0
    assert slot.latent[1] == -0.1


@pytest.mark.parametrize("constraint", ["ternary", "two-bit-shift", "levels:-1,-0.3,0.5"])
def test_adaste_is_for_two_levels(constraint: str) -> None:
    with pytest.raises(UsageError, match=r"adaste is for two levels, .* has [357].*choose constraint binary, or"):
        METHODS["adaste"].check(level_set(constraint))
    linear = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    settings = resolve(method="adaste").settings
    with pytest.raises(UsageError, match="adaste is for two levels"):
        bind(linear, optimizer, level_set(constraint), "adaste", settings, LayerChoice(("weight",), {}))


# AskewSGD


def interval(w: float, q: list[float]) -> tuple[float, float]:
    """The two levels around a weight."""
    inside = [pair for pair in pairwise(q) if pair[0] <= w < pair[1]]
    return inside[0] if inside else (q[0], q[1]) if w < q[0] else (q[-2], q[-1])


def askew_velocity(w: float, g: float, q: list[float], epsilon: float, kappa: float, lr: float) -> float:
    """In the paper's form: ε/16 − (u−a)²(u−b)², with everything in units of the levels' distance."""
    low, high = interval(w, q)
    width = high - low
    u, a, b = w / width, low / width, high / width
    psi = epsilon / 16 - (u - a) ** 2 * (u - b) ** 2
    slope = -2 * (u - a) * (u - b) * ((u - a) + (u - b)) / width  # by w
    if psi >= 0 or slope == 0:
        return -g
    k = -kappa * psi / slope
    if -g * k > k * k:
        return -g
    return min(max(k, -width / (4 * lr)), width / (4 * lr))


@pytest.mark.parametrize("lr", [1e-3, 0.05, 2.0])
@every_constraint
def test_askewsgd(constraint: str, lr: float) -> None:
    kappa, free, end = 0.7, 0.25, 1e-3
    method = make("askewsgd", askewsgd_rate=kappa, askewsgd_free=free, askewsgd_end=end)
    q = levels_of(constraint)
    followed = returning = bounded = 0
    for step in range(20):
        progress = step / 20
        epsilon = end ** (max(0.0, progress - free) / (1 - free))
        method.advance(progress, [])
        assert method.describe()["relaxation"] == pytest.approx(epsilon)
        w, gradient = [1.5 * x for x in draw(100, 500 + step)], draw(100, 600 + step)
        slot = slot_of(method, w, constraint)
        close(method.constrained_weight(slot), w)
        expected = [askew_velocity(x, g, q, epsilon, kappa, lr) for x, g in zip(w, gradient, strict=True)]
        close(-method.gradient(slot, torch.tensor(gradient, dtype=torch.float64), lr), expected)
        method.after_step(slot, lr)
        close(slot.latent, w)
        for x, g, v in zip(w, gradient, expected, strict=True):
            low, high = interval(x, q)
            followed += v == -g
            returning += v != -g
            bounded += abs(abs(v) - (high - low) / (4 * lr)) < 1e-12
    assert followed > 100
    assert returning > 100
    assert (bounded > 0) == (lr > 0.01)


def test_askewsgd_constraint_is_the_papers_for_binary() -> None:
    """ε − (u² − 1)² at ±1: where it is 0, the gradient rules inside, the return outside."""
    epsilon = 0.04
    method = make("askewsgd", askewsgd_end=epsilon)
    method.advance(1.0, [])
    edge = math.sqrt(1 - math.sqrt(epsilon))
    for u, free in ((edge + 1e-6, True), (edge - 1e-6, False), (-edge - 1e-6, True), (-edge + 1e-6, False)):
        slot = slot_of(method, [SCALE * u], "binary")
        pushed_inward = torch.tensor([u], dtype=torch.float64)  # descent leads to the midpoint
        v = -float(method.gradient(slot, pushed_inward.clone(), 1e-9))
        assert (v == -u) == free
        assert free or v * u >= 0


def test_askewsgd_brings_weights_into_their_intervals() -> None:
    method = make("askewsgd", askewsgd_end=1e-4)
    method.advance(1.0, [])
    slot = slot_of(method, [0.55, -0.2, 0.01, 1.3, -0.9], "binary")
    levels = slot.grid.nearest(slot.latent)
    for _ in range(400):
        slot.latent.sub_(0.05 * method.gradient(slot, torch.zeros(5, dtype=torch.float64), 0.05))
    u = slot.latent / SCALE
    assert ((u**2 - 1) ** 2 < 1.1e-4).all()
    assert torch.equal(slot.grid.nearest(slot.latent), levels)


def test_askewsgd_is_finite_wherever_weights_are() -> None:
    method = make("askewsgd")
    method.advance(1.0, [])
    for scale in (1e-30, 1.0):
        grid = Grid(level_set("ternary"), torch.tensor(scale))
        for unit in (scale, 1.0):
            latent = unit * torch.tensor([0.0, 0.5, 1.0, -1.0, 0.25, 1e6, -1e6])
            for gradient in (torch.zeros(7), torch.ones(7), torch.full((7,), -1e-30)):
                slot = Slot(latent, grid, method.start(latent))
                for lr in (0.0, 0.1):
                    assert method.gradient(slot, gradient.clone(), lr).isfinite().all()


# the papers' settings


@pytest.mark.parametrize(
    "method, expected",
    [
        ("straight-through", {"optimizer": "adamw", "lr": 3e-3, "batch_size": 50, "epochs": 500}),
        ("straight-through", {"straight_through_bounded": True}),
        ("proxquant", {"optimizer": "adamw", "lr": 0.01, "batch_size": 128, "epochs": 300, "weight_decay": 0.0}),
        ("adaste", {"optimizer": "sgd", "lr": 3e-4, "lr_schedule": "cosine", "momentum": 0.9, "epochs": 700}),
        ("adaste", {"adaste_margin": 0.01, "adaste_coupling": 0.01, "adaste_flip_bound": 0.5, "batch_size": 128}),
        ("askewsgd", {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "epochs": 300, "askewsgd_rate": 1.0}),
    ],
)
def test_paper_preset_of_a_method(method: str, expected: dict[str, Any]) -> None:
    resolved = resolve("paper", method=method, architecture="alexnet", constraint="one-bit-shift")
    assert resolved.settings.to_dict() | expected == resolved.settings.to_dict()
    assert resolved.origins["lr"] == f"preset paper, method {method}"  # not CBP's line for the model
    assert resolved.settings.learn_scales is False
    assert resolved.settings.distillation == 0


def test_papers_schedules_by_epoch() -> None:
    """Growth by epoch, as the papers have it, at the epochs of their presets."""
    proxquant, adaste, askewsgd = make("proxquant"), make("adaste"), make("askewsgd")
    for epoch in range(0, 200, 20):
        proxquant.advance(epoch / 300, [])
        assert proxquant.describe()["strength"] == pytest.approx(1e-4 * epoch)
        assert not proxquant.scalars["frozen"]
        adaste.advance(epoch / 700, [])
        assert adaste.describe()["coupling"] == pytest.approx(min(0.01 * 1.05**epoch, 100.0), rel=0.05)
    assert proxquant.advance(200 / 300, []).weights_changed
    for epoch in range(0, 301, 20):
        askewsgd.advance(epoch / 300, [])
        assert askewsgd.describe()["relaxation"] == pytest.approx(0.95 ** max(0, epoch - 100), rel=0.01)
