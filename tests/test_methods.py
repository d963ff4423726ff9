"""What every method must do, over the whole table of methods; and CBP against a scalar reference."""

import copy
import io
import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from small_job import environment, report_of
from torch import Tensor, nn

import cbpq
from cbpq.cli.common import method_names
from cbpq.constrained import Constrained, bind
from cbpq.errors import UsageError
from cbpq.layers import LayerChoice
from cbpq.levels import CONSTRAINTS, Grid, level_set
from cbpq.methods import METHODS, method_class
from cbpq.methods.base import Method, Slot, Update
from cbpq.methods.cbp import CBP
from cbpq.presets import Settings, resolve

NAMES = (*CONSTRAINTS, "shift:3", "levels:-1,-0.3,0.5")
STEPS = 60
TWO_LEVELS = ("binary", "levels:-0.5,1")
COVERED = dict.fromkeys(METHODS, NAMES) | {"adaste": TWO_LEVELS}
PAIRS = [(method, constraint) for method in METHODS for constraint in COVERED[method]]
every_method = pytest.mark.parametrize("method", METHODS)
every_constraint = pytest.mark.parametrize("constraint", NAMES)
every_pair = pytest.mark.parametrize("method, constraint", PAIRS)


class Quadratic(nn.Module):
    """Two weight matrices, drawn to a target each: the loss is Σ ‖w − target‖² / 2."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("first", (5, 7)), ("second", (3, 2, 2, 2))):
            setattr(self, name, nn.Parameter(scale * 0.4 * torch.randn(shape, generator=generator)))
            self.register_buffer(f"{name}_target", scale * 0.4 * torch.randn(shape, generator=generator))
        self.unit = scale

    def forward(self) -> Tensor:
        pairs = [(self.get_parameter(name), self.get_buffer(f"{name}_target")) for name in ("first", "second")]
        # in units of the weights' scale, so that the gradient is of the weights' size whatever that is
        return torch.stack([((w - t) / self.unit).square().sum() for w, t in pairs]).sum() * (self.unit**2 / 2)


@dataclass
class Problem:
    """A quadratic that is being constrained."""

    constraint: str
    method: str
    scale: float = 1.0
    order: tuple[str, ...] = ("first", "second")
    preset: str = "default"
    given: dict[str, Any] = field(default_factory=dict)
    model: Quadratic = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    constrained: Constrained = field(init=False)

    def __post_init__(self) -> None:
        self.model = Quadratic(self.scale)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        values = {"clamp": 0.0, "gradient_clip": 0.0, "epochs": 4}
        # these two are gradients, and so of the weights' size
        values |= {"multiplier_lr": 1e-3 * self.scale, "proxquant_strength": 0.1 * self.scale, **self.given}
        settings = resolve(self.preset, method=self.method, layers=[("the test", values)]).settings
        layers = LayerChoice(self.order, {})
        self.constrained = bind(self.model, self.optimizer, level_set(self.constraint), self.method, settings, layers)

    def train(self, start: int = 0, stop: int = STEPS) -> "Problem":
        for step in range(start, stop):
            self.optimizer.zero_grad()
            loss = self.model()
            loss.backward()
            self.optimizer.step()
            self.constrained.advance((step + 1) / STEPS)
            if (step + 1) % (STEPS // 4) == 0:
                self.constrained.end_epoch(loss.item())
        return self

    def state(self) -> dict[str, Any]:
        """Everything as a checkpoint gives it back."""
        buffer = io.BytesIO()
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "constrained": self.constrained}
        torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
        buffer.seek(0)
        loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
        return loaded

    def load(self, state: dict[str, Any]) -> "Problem":
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.constrained.load_state_dict(state["constrained"])
        return self

    def on_levels(self) -> bool:
        for name, parameter in self.model.named_parameters():
            grid = self.constrained.grid(name)
            levels = torch.tensor(grid.level_set.codes) * (grid.scale / grid.level_set.denominator).reshape(-1, 1)
            rows = parameter.reshape(len(levels), -1)
            if not bool((rows.unsqueeze(-1) == levels.unsqueeze(1)).any(-1).all()):
                return False
        return True


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries and lists, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(tensors(value[key]) for key in sorted(value, key=str))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(tensors, value))


def same(ours: Any, theirs: Any) -> bool:
    pairs = list(itertools.zip_longest(tensors(ours), tensors(theirs)))
    return len(pairs) > 0 and all(torch.equal(a, b) for a, b in pairs)


EARLY, LATE = STEPS // 5, 2 * STEPS // 3  # in the middle of schedules, and at the step where ProxQuant freezes


@every_pair
@pytest.mark.parametrize("preset", ["default", "paper"])  # for a method, little-data is as default
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_conformance(method: str, constraint: str, preset: str, scale: float) -> None:
    conforms(method, constraint, preset, scale, {})


@pytest.mark.parametrize("constraint", [*NAMES, *TWO_LEVELS])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("multiple", [0, 1.1])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_conformance_with_a_soft_window(constraint: str, granularity: str, multiple: float, scale: float) -> None:
    given = {
        "soft_window": True,
        "window_close": 0.5,
        "scale_granularity": granularity,
        "soft_window_scale": multiple,
    }
    conforms("cbp", constraint, "default", scale, given)


def conforms(method: str, constraint: str, preset: str, scale: float, given: dict[str, Any]) -> None:
    problem = Problem(constraint, method, scale, preset=preset, given=given)
    before = problem.model().item()
    early = problem.train(0, EARLY).state()
    late = problem.train(EARLY, LATE).state()
    problem.train(LATE).constrained.finish()

    # led there: nearer to the target, and on levels
    assert problem.on_levels()
    assert problem.model().item() < 0.75 * before
    assert all(tensor.isfinite().all() for tensor in tensors(problem.state()))
    # what the file will hold is what the network computes with
    for name, tensor in problem.constrained.tensors().items():
        assert torch.equal(torch.from_numpy(tensor.weight()), problem.model.get_parameter(name))

    # taken up in the middle, it ends on the same bits
    for start, state in ((EARLY, early), (LATE, late)):
        resumed = Problem(constraint, method, scale, preset=preset, given=given).load(state).train(start)
        resumed.constrained.finish()
        assert same(resumed.state(), problem.state())
        assert resumed.constrained.method.scalars == problem.constrained.method.scalars

    # the order of layers does not matter
    turned = Problem(constraint, method, scale, ("second", "first"), preset, given).train()
    turned.constrained.finish()
    assert same(turned.model.state_dict(), problem.model.state_dict())
    assert same(turned.constrained.state_dict()["weights"], problem.constrained.state_dict()["weights"])


# What leads weights to their levels, switched off and on. Straight-through has no such part, and AdaSTE leads what the
# network computes with, not the latent weights.
LEADING: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "cbp": ({"multiplier_lr": 0.0}, {"multiplier_lr": 1e-2}),
    "proxquant": ({"proxquant_strength": 0.0}, {"proxquant_strength": 1.0}),
    "askewsgd": ({"askewsgd_end": 1.0}, {"askewsgd_end": 1e-3}),
}


@pytest.mark.parametrize("constraint", NAMES)
@pytest.mark.parametrize("method", LEADING)
def test_latent_weights_are_led(method: str, constraint: str) -> None:
    """A method without its constraining part is no method: the latent weights must come nearer to the levels for it."""
    given = {"learn_scales": False, "proxquant_freeze": 1.0}
    free, led = (Problem(constraint, method, given=given | part).train(0, STEPS - 1) for part in LEADING[method])
    assert led.constrained.cfs() < 0.9 * free.constrained.cfs()


@every_method
def test_what_a_method_does_not_cover_is_refused(method: str) -> None:
    for constraint in {*NAMES, *TWO_LEVELS} - set(COVERED[method]):
        if len(level_set(constraint).codes) == 2:
            continue  # not every name is tried with every method
        with pytest.raises(UsageError, match=f"method {method} is for .*: choose constraint") as refused:
            Problem(constraint, method)
        assert "\n" not in str(refused.value)


@every_pair
def test_projected_shows_the_levels_and_changes_nothing(method: str, constraint: str) -> None:
    problem = Problem(constraint, method).train(0, EARLY)
    untouched = Problem(constraint, method).train(0, EARLY)
    with problem.constrained.projected():
        assert problem.on_levels()
    assert same(problem.state(), untouched.state())
    assert same(problem.train(EARLY).state(), untouched.train(EARLY).state())
    problem.constrained.finish()
    with problem.constrained.projected():
        pass
    problem.constrained.advance(0.5)
    problem.constrained.load_state_dict(untouched.state()["constrained"])
    assert problem.on_levels()  # once finished, it stays there


@pytest.mark.parametrize("foreach", [True, False])
@every_method
def test_methods_are_told_the_learning_rate(method: str, foreach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("binary", method)
    kind, seen = METHODS[method], []
    problem.optimizer.load_state_dict(problem.optimizer.state_dict())  # which replaces the groups
    for name in ("gradient", "after_step"):
        plain = getattr(kind, name)

        def noting(self: Method, *arguments: Any, plain: Any = plain) -> Any:
            seen.append(arguments[-1])
            return plain(self, *arguments)

        monkeypatch.setattr(kind, name, noting)
    for lr in (0.05, 0.01, torch.tensor(0.25)):
        problem.optimizer.param_groups[0]["lr"] = lr
        problem.optimizer.param_groups[0]["foreach"] = foreach and isinstance(lr, float)
        problem.train(0, 1)
    assert seen == [0.05] * 4 + [0.01] * 4 + [0.25] * 4


@every_method
def test_declarations(method: str) -> None:
    kind = method_class(method)
    assert kind.name == method
    assert kind.__doc__
    assert not any(isinstance(value, Field) for value in vars(kind).values())  # of a class that is no dataclass
    bound = kind(**Settings().of(kind))
    assert json.loads(json.dumps(bound.scalars)) == bound.scalars
    assert all(isinstance(value, int | float) for value in bound.describe().values())
    weight = torch.randn(3, 2)
    for tensor in bound.start(weight).values():
        assert tensor.device == weight.device


def test_a_methods_file_has_its_name() -> None:
    assert method_names() == list(METHODS)


TENTH = '''
"""Half way to the nearest level."""

from dataclasses import dataclass
from typing import ClassVar

from cbpq.methods.base import Method
from cbpq.settings import setting


@dataclass(eq=False)
class HalfWay(Method):
    """After every step a share of the way to the nearest level."""

    name: ClassVar = "half-way"
    half_way_share: float = setting(0.5, 0.25, 0.25, "half-way: the share", most=1)

    def start(self, latent):
        return {}

    def on_levels(self):
        return False

    def constrained_weight(self, slot):
        return slot.latent

    def gradient(self, slot, gradient, lr):
        return gradient

    def after_step(self, slot, lr):
        slot.latent.lerp_(slot.grid.nearest(slot.latent), self.half_way_share)
'''


def test_a_new_method_is_one_file(small_job: Path) -> None:
    shutil.copytree(Path(cbpq.__file__).parent, small_job / "copy" / "cbpq")
    (small_job / "copy" / "cbpq" / "methods" / "half_way.py").write_text(TENTH)
    variables = environment() | {"PYTHONPATH": str(small_job / "copy"), "CBPQ_HALF_WAY_SHARE": "0.125"}
    program = (sys.executable, "-m", "cbpq", "quantize")
    text = subprocess.run((*program, "--help"), env=variables, capture_output=True, text=True, check=True).stdout
    assert "half-way" in text
    flags = ["net.safetensors", "--data", "a.npz", "--method", "half-way", "--epochs", "1", "-o", "out"]
    done = subprocess.run((*program, *flags), env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = report_of("out")
    assert report["method"] == "half-way"
    assert report["settings"]["half_way_share"] == {"value": 0.125, "from": "environment"}
    wrong = subprocess.run(
        (*program, *flags, "--overwrite", "--set", "half_way_share=2"), env=variables, capture_output=True, text=True
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "setting half_way_share: '2' from --set must be between 0 and 1" in wrong.stderr


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'cpb'; did you mean 'cbp'.*known are"):
        method_class("cpb")


def test_base_class_asks_for_nothing() -> None:
    class Plain(Method):
        name = "plain"

        def start(self, latent: Tensor) -> dict[str, Tensor]:
            return {}

        def gradient(self, slot: Slot, gradient: Tensor, lr: float) -> Tensor:
            return gradient

        def after_step(self, slot: Slot, lr: float) -> None:
            pass

    plain = Plain()
    slot = Slot(torch.tensor([0.2, 0.9]), Grid(CONSTRAINTS["ternary"], torch.tensor(1.0)), {})
    plain.begin([slot])
    assert plain.constrained_weight(slot).tolist() == [0.0, 1.0]
    assert plain.advance(0.5, [slot]) == plain.end_epoch([slot], 1.0) == Update()
    assert plain.penalty(slot) == 0
    assert plain.describe() == {}


# CBP against plain Python numbers


def cs(w: float, q: list[float], g: float) -> float:
    """The constraint function, piece by piece."""
    if w < q[0]:
        return -2 * (w - q[0])
    if w >= q[-1]:
        return 2 * (w - q[-1])
    i = max(k for k in range(len(q) - 1) if q[k] <= w)
    gap, m = q[i + 1] - q[i], (q[i] + q[i + 1]) / 2
    return 0.0 if abs(w - m) < gap / (2 * g) else gap - 2 * abs(w - m)


def cs_slope(w: float, q: list[float], g: float) -> float:
    if cs(w, q, g) == 0:
        return 0.0
    nearest = min(q, key=lambda level: abs(level - w))
    return 2.0 if w > nearest else -2.0


class ScalarCBP:
    """The published method and schedule for a few weights, in plain numbers."""

    def __init__(
        self,
        weights: list[float],
        q: list[float],
        lr: float,
        lr_multiplier: float,
        p_max: int,
        clip: float,
        clamp: float,
    ) -> None:
        self.w, self.q, self.lr, self.lr_multiplier = list(weights), q, lr, lr_multiplier
        self.p_max, self.clip, self.clamp = p_max, clip, clamp
        self.multiplier, self.m, self.v = ([0.0] * len(weights) for _ in range(3))
        self.t, self.g, self.p, self.previous, self.sum_penalty = 0, 1, 0, 1e10, 0.0
        self.ascend()

    def ascend(self) -> None:
        self.t += 1
        for i, w in enumerate(self.w):
            gradient = cs(w, self.q, self.g)
            self.m[i] = 0.9 * self.m[i] + 0.1 * gradient
            self.v[i] = 0.999 * self.v[i] + 0.001 * gradient**2
            m, v = self.m[i] / (1 - 0.9**self.t), self.v[i] / (1 - 0.999**self.t)
            self.multiplier[i] += self.lr_multiplier * m / (math.sqrt(v) + 1e-8)

    def step(self, gradients: list[float]) -> None:
        for i, (w, gradient) in enumerate(zip(list(self.w), gradients, strict=True)):
            self.sum_penalty += self.multiplier[i] * cs(w, self.q, self.g)
            gradient += self.multiplier[i] * cs_slope(w, self.q, self.g)
            gradient = min(max(gradient, -self.clip), self.clip)
            self.w[i] = min(max(w - self.lr * gradient, -self.clamp), self.clamp)

    def end_epoch(self, loss_sum: float) -> tuple[float, bool]:
        lagrangian, self.sum_penalty = loss_sum + self.sum_penalty, 0.0
        self.p += 1
        updated = lagrangian >= self.previous or self.p == self.p_max
        if updated:
            self.g += 1 if self.g < 10 else 10
            if self.g == 20:
                self.lr *= 0.1
            self.ascend()
            self.p, self.previous = 0, 1e10
        else:
            self.previous = lagrangian
        return lagrangian, updated


def cbp(**given: Any) -> CBP:
    return CBP(**resolve("paper").settings.of(CBP) | given)


# falling, a stall, an equal value (which is one too), long falls that only patience ends, noise, never a number
FALLING = [100.0 - k for k in range(9)]
SCRIPTS = {
    "stalls": [5.0, 4.0, 4.5, 4.0, 4.0, 3.0, 2.0, 2.5] * 6,
    "patience": FALLING * 6,
    "rising": [float(k) for k in range(60)],
    "noise": [math.sin(37.0 * k) for k in range(80)],
}


@every_constraint
@pytest.mark.parametrize("script", SCRIPTS)
def test_published_schedule(constraint: str, script: str) -> None:
    scale, lr = 0.6, 0.01
    levels = level_set(constraint)
    q = [scale * level for level in levels.levels]
    generator = torch.Generator().manual_seed(5)
    latent = torch.randn(40, generator=generator, dtype=torch.float64) * 0.8
    theirs = ScalarCBP(latent.tolist(), q, lr, lr_multiplier=0.02, p_max=4, clip=0.3, clamp=0.9)
    method = cbp(multiplier_lr=0.02, patience=4, gradient_clip=0.3, clamp=0.9)
    slot = Slot(latent.clone(), Grid(levels, torch.tensor(scale, dtype=torch.float64)), method.start(latent))
    method.begin([slot])
    updates = 0
    for loss_sum in SCRIPTS[script]:
        for _ in range(2):
            gradient = torch.randn(40, generator=generator, dtype=torch.float64) * 0.3
            theirs.step(gradient.tolist())
            slot.latent.sub_(lr * method.gradient(slot, gradient, lr))
            method.after_step(slot, lr)
        lagrangian, updated = theirs.end_epoch(loss_sum)
        update = method.end_epoch([slot], loss_sum)
        lr *= update.lr_factor
        updates += updated
        assert update.multipliers_updated == updated
        assert update.lagrangian == pytest.approx(lagrangian, rel=1e-9, abs=1e-9)
        assert method.describe()["window"] == theirs.g
        assert lr == theirs.lr
        for ours, expected in ((slot.latent, theirs.w), (slot.state["multiplier"], theirs.multiplier)):
            torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-11)
    assert updates >= 12  # beyond g = 20
    assert lr == pytest.approx(0.001)
    assert method.penalty(slot) == pytest.approx(
        sum(m * cs(w, q, theirs.g) for m, w in zip(theirs.multiplier, theirs.w, strict=True)), rel=1e-6
    )


@pytest.mark.parametrize("second", [1.0, 1.5, float("inf"), float("nan")])
def test_what_did_not_fall_is_a_stall(second: float) -> None:
    method = cbp()
    assert method.end_epoch([], 1.0).multipliers_updated is False
    assert method.end_epoch([], second).multipliers_updated is True


def test_windows_and_learning_rate_of_the_published_schedule() -> None:
    method = cbp(patience=1, lr_drop=0.25)
    seen = []
    for _ in range(14):
        update = method.end_epoch([], 1.0)
        seen.append((method.describe()["window"], update.lr_factor))
    assert [window for window, _ in seen] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 30, 40, 50, 60]
    assert [factor for window, factor in seen if window == 20] == [0.25]
    assert {factor for window, factor in seen if window != 20} == {1.0}


def test_published_schedule_needs_the_loss() -> None:
    with pytest.raises(UsageError, match=r"end_epoch\(loss_sum\)"):
        cbp().end_epoch([], None)


def test_first_ascent_reaches_only_weights_beyond_the_outer_levels() -> None:
    method = cbp()
    latent = torch.tensor([-1.5, -0.9, -0.2, 0.0, 0.4, 1.0, 1.2])
    slot = Slot(latent, Grid(CONSTRAINTS["ternary"], torch.tensor(1.0)), method.start(latent))
    method.begin([slot])
    assert (slot.state["multiplier"] > 0).tolist() == [True, False, False, False, False, False, True]
    # Adam's first step has the size of its learning rate, whatever the violation
    torch.testing.assert_close(slot.state["multiplier"][[0, -1]], torch.full((2,), 1e-4))


def test_multipliers_never_shrink() -> None:
    problem = Problem("two-bit-shift", "cbp")
    before = problem.constrained.state("first")["multiplier"].clone()
    for start in range(0, STEPS, 10):
        problem.train(start, start + 10)
        now = problem.constrained.state("first")["multiplier"]
        assert (now >= before).all()
        before = now.clone()
    assert (before > 0).any()


def test_clip_and_clamp_can_be_switched_off() -> None:
    latent = torch.tensor([5.0, -7.0])
    for bound, gradients, weights in ((0.0, [30.0, -40.0], [5.0, -7.0]), (2.0, [2.0, -2.0], [2.0, -2.0])):
        method = cbp(gradient_clip=bound, clamp=bound)
        slot = Slot(latent.clone(), Grid(CONSTRAINTS["binary"], torch.tensor(1.0)), method.start(latent))
        assert method.gradient(slot, torch.tensor([30.0, -40.0]), 0.1).tolist() == gradients
        method.after_step(slot, 0.1)
        assert slot.latent.tolist() == weights


def progress_run(points: list[float], **given: Any) -> tuple[list[float], list[bool], CBP]:
    """Windows and ascents while progress goes through ``points``."""
    method = cbp(multiplier_schedule="progress", **given)
    latent = torch.linspace(-1.5, 1.5, 50)
    slot = Slot(latent, Grid(CONSTRAINTS["ternary"], torch.tensor(1.0)), method.start(latent))
    method.begin([slot])
    assert method.scalars["ascents"] == 0
    windows, ascents = [], []
    for point in points:
        ascents.append(method.advance(point, [slot]).multipliers_updated)
        windows.append(method.describe()["window"])
    assert method.scalars["ascents"] == sum(ascents)
    return windows, ascents, method


@pytest.mark.parametrize("steps", [50, 100, 299, 1000])
@pytest.mark.parametrize("updates", [0, 1, 7, 50])
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_progress_schedule(steps: int, updates: int, power: float) -> None:
    points = [(k + 1) / steps for k in range(steps)]
    windows, ascents, method = progress_run(points, multiplier_updates=updates, window_close=0.8, window_power=power)
    assert sum(ascents) == updates
    taken = [point for point, ascent in zip(points, ascents, strict=True) if ascent]
    for number, point in enumerate(taken):
        assert point == pytest.approx((number + 1) / max(updates, 1), abs=1 / steps)
    for point, window in zip(points, windows, strict=True):
        if point < 0.8:
            assert window == pytest.approx((1 - point / 0.8) ** -power, rel=1e-9)
        elif point > 0.8 + 1e-9:
            assert window == math.inf
    assert windows == sorted(windows)
    # the published schedule's turn does nothing here
    assert method.end_epoch([], None) == Update()


def test_progress_in_large_strides_owes_nothing() -> None:
    windows, ascents, method = progress_run(
        [0.0, 0.5, 0.5, 0.4, 0.51, 1.0, 1.0], multiplier_updates=50, window_close=1.0
    )
    assert ascents == [False, True, False, False, False, True, False]
    assert windows[0] == 1.0
    assert windows[1] == windows[2] == windows[3] == pytest.approx(2.0)  # it never opens again
    assert windows[-1] == math.inf
    assert method.scalars["due"] == 50


def in_a_soft_window(weight: float, allowed: list[float], window: float) -> float:
    """What a weight computes as, by the definition: w in the window, stretched over its gap, else the nearest level."""
    if not allowed[0] < weight < allowed[-1]:
        return min(max(weight, allowed[0]), allowed[-1])
    above = next(number for number, level in enumerate(allowed) if level > weight)
    low, high = allowed[above - 1], allowed[above]
    middle, half = (low + high) / 2, (high - low) / 2
    if abs(weight - middle) >= half / window:
        return high if weight > middle else low
    return middle + window * (weight - middle)


@pytest.mark.parametrize("name", [*CONSTRAINTS, "levels:-1,-0.3,0.3,1", "levels:1,2"])
@pytest.mark.parametrize("scale", [1e-8, 0.05, 1e8])
def test_a_soft_window(name: str, scale: float) -> None:
    levels = level_set(name)
    method = cbp(multiplier_schedule="progress", soft_window=True, window_close=0.8, multiplier_updates=1)
    latent = scale * torch.linspace(-2.5, 2.5, 1001, dtype=torch.float64)
    grid = Grid(levels, torch.tensor(scale, dtype=torch.float64))
    slot = Slot(latent, grid, method.start(latent))
    allowed = [scale * level for level in levels.levels]
    for progress in (0.0, 0.2, 0.4, 0.79, 0.8):
        assert method.advance(progress, [slot]).weights_changed
        window = method.scalars["window"]
        assert method.on_levels() == (window == math.inf) == (method.scale_fit() is None)
        found = method.constrained_weight(slot)
        if method.on_levels():
            assert torch.equal(found, grid.nearest(latent))
            continue
        expected = [in_a_soft_window(weight, allowed, window) for weight in latent.tolist()]
        assert found.tolist() == pytest.approx(expected, abs=1e-9 * scale)
    assert method.on_levels()
    assert not method.advance(0.9, [slot]).weights_changed


@pytest.mark.parametrize("left", [1e-1, 1e-4, 1e-13, 1e-16])
def test_a_soft_window_that_is_almost_shut(left: float) -> None:
    latent = torch.tensor([-1e-30, 0.0, 1e-30, 0.5, 1e30])
    grid = Grid(level_set("binary"), torch.tensor(1.0))
    method = cbp(multiplier_schedule="progress", soft_window=True, window_close=1.0, window_power=10.0)
    slot = Slot(latent, grid, method.start(latent))
    method.advance(1 - left, [slot])
    found = method.constrained_weight(slot)
    assert found.tolist()[3:] == [1, 1]
    assert all(abs(value) <= 1 for value in found.tolist())  # and no NaN, which compares as nothing does
    assert method.on_levels() == (left < 0.1)


def test_a_window_is_soft_in_schedule_progress_alone() -> None:
    hard, published = cbp(multiplier_schedule="progress"), cbp(soft_window=True)
    for method in (hard, published):
        assert method.on_levels()
        assert method.scale_fit() is None


@pytest.mark.parametrize("learn_scales", [True, False])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("multiple", [0, 1, 1.35])
@pytest.mark.parametrize("constraint", [*NAMES, *TWO_LEVELS])
def test_scales_follow_the_weights_while_the_window_is_open(
    constraint: str, multiple: float, granularity: str, learn_scales: bool
) -> None:
    given = {
        "soft_window": True,
        "window_close": 0.5,
        "learn_scales": learn_scales,
        "scale_granularity": granularity,
        "soft_window_scale": multiple,
    }
    problem = Problem(constraint, "cbp", given=given)
    for stop in range(1, STEPS // 2 + 1):
        before = {name: problem.constrained.grid(name).scale.detach().clone() for name in problem.constrained.names}
        problem.train(stop - 1, stop)
        for name, scale in before.items():
            latent, grid = problem.constrained.latent(name), Grid(level_set(constraint), scale)
            for row, (weights, q) in enumerate(zip(latent, grid.level(latent), strict=True)):
                if granularity == "layer":
                    weights, q = latent, grid.level(latent)
                if multiple or q.square().sum() > 0:
                    fitted = multiple * weights.abs().mean() if multiple else (weights * q).sum() / q.square().sum()
                    now = problem.constrained.grid(name).scale.detach()
                    assert float(now if granularity == "layer" else now[row]) == pytest.approx(float(fitted), rel=1e-5)
    before = {name: problem.constrained.grid(name).scale.detach().clone() for name in problem.constrained.names}
    problem.train(STEPS // 2)
    moved = [not torch.equal(problem.constrained.grid(name).scale, scale) for name, scale in before.items()]
    assert all(moved) if learn_scales else not any(moved)


@pytest.mark.parametrize("scale", [1e-8, 0.05, 1e8])
def test_moments_in_half_the_memory(scale: float) -> None:
    """λ in float32 with its moments in float16, against all in float64: a long schedule, violations of all sizes."""
    levels, generator = CONSTRAINTS["two-bit-shift"], torch.Generator().manual_seed(0)
    start = scale * torch.randn(2000, generator=generator, dtype=torch.float64)
    found = []
    for kind in (torch.float64, torch.float32):
        latent = start.to(kind, copy=True)
        slot = Slot(latent, Grid(levels, torch.tensor(scale, dtype=kind)), cbp().start(latent))
        method = cbp(patience=1, multiplier_lr=1e-3)
        method.begin([slot])
        for _ in range(60):
            method.end_epoch([slot], 1.0)
            slot.latent.mul_(0.98)
        assert {name: tensor.dtype for name, tensor in slot.state.items()} == {
            "multiplier": kind,
            **dict.fromkeys(("moment1", "root2"), torch.float16 if kind == torch.float32 else kind),
        }
        found.append(slot.state["multiplier"].double())
    theirs, ours = found
    assert ((ours - theirs).abs() <= 0.02 * theirs + 1e-4).double().mean() > 0.99
    assert ours.max() < 1.2 * theirs.max()


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8])
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-7, 1.0, 1e4, 1e9])
def test_moments_have_a_range(scale: float, size: float) -> None:
    """Violations that float16 has no number for: λ's steps stay finite and of Adam's size, also when they vanish."""
    latent = torch.tensor([1.0, 1 + 1e-7, 1e3]) * size
    slot = Slot(latent, Grid(CONSTRAINTS["binary"], torch.tensor(scale)), cbp().start(latent))
    method = cbp(multiplier_lr=1.0, patience=1)
    for count in range(12):
        if count == 6:
            slot.latent.fill_(scale)
        before = slot.state["multiplier"].clone()
        method.end_epoch([slot], 1.0)
        taken = slot.state["multiplier"] - before
        assert taken.isfinite().all()
        assert (taken >= 0).all()
        assert (taken < 8).all()  # Adam's bound is (1 − β₁)/√(1 − β₂) = 3.2 before its corrections for the start


def test_states_are_copies_of_nothing() -> None:
    """Two weights must not share tensors, and a copied slot lives on its own."""
    method = cbp()
    latent = torch.randn(4)
    first, second = method.start(latent), method.start(latent)
    assert {tensor.data_ptr() for tensor in first.values()}.isdisjoint(tensor.data_ptr() for tensor in second.values())
    assert len({tensor.data_ptr() for tensor in first.values()}) == len(first)
    assert same(copy.deepcopy(first), second)
