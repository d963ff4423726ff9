"""Compiled or plain: when, and that it makes no difference."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cbpq
from cbpq import fused as module
from cbpq.constrained import Constrained
from cbpq.fused import fused
from cbpq.levels import CONSTRAINTS, Grid

GRID = Grid(CONSTRAINTS["ternary"], torch.tensor(0.5))
WEIGHT = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENOUGH", 2 * WEIGHT.numel())


def counted() -> tuple[Callable[..., Any], list[str]]:
    """A fused function, and which way each call of it went, with the type of its number."""
    ways: list[str] = []

    @fused
    def scaled(grid: Grid, weight: Tensor, factor: float, others: Tensor) -> tuple[Tensor, Tensor]:
        ways.append(type(factor).__name__)
        return others.add_(weight * factor), grid.scale * factor

    return scaled, ways


def compilers(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A stand-in for ``torch.compile`` whose programs give the right result, changed."""
    return lambda function, dynamic: lambda *arguments: change(function(*arguments))


def test_the_plain_way_until_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", compilers(lambda result: result))
    function, ways = counted()
    for _ in range(2):
        function(GRID, WEIGHT, 2.0, WEIGHT.clone())
    assert ways == ["float"] * 2
    function(GRID, WEIGHT.reshape(3, 2, 2), 2.0, WEIGHT.reshape(3, 2, 2).clone())  # not a piece of a weight
    function(Grid(CONSTRAINTS["binary"], torch.tensor(0.5)), WEIGHT, 2.0, WEIGHT.clone())  # counted by itself
    assert ways == ["float"] * 4
    for _ in range(3):
        others = WEIGHT.clone()
        result = function(GRID, WEIGHT, 2.0, others)
        assert result[0] is others
        assert torch.equal(others, 3 * WEIGHT)  # once, although it was tried on copies before
    assert ways == ["float"] * 4 + ["Tensor"] * 5  # both ways on copies, then three times


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("this machine has no compiler")


def changing_more(function: Any, dynamic: bool) -> Any:
    """The right result, but an argument ends up changed otherwise: what is given back is no longer the same tensor."""

    def program(grid: Grid, weight: Tensor, factor: Any, others: Tensor) -> Any:
        result = tuple(tensor.clone() for tensor in function(grid, weight, factor, others))
        others.add_(1e-7)
        return result

    return program


@pytest.mark.parametrize(
    "compiler",
    [
        changing_more,
        broken,
        lambda *_, **__: broken,
        compilers(lambda result: (result[0] + 1e-7, result[1])),
        compilers(lambda result: (result[0], result[1] * float("nan"))),
    ],
)
def test_the_plain_way_where_there_is_no_other(compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def noted(*arguments: Any, **given: Any) -> Any:
        tried.append(1)
        return compiler(*arguments, **given)

    monkeypatch.setattr(torch, "compile", noted)
    function, _ = counted()
    for _ in range(6):
        others = WEIGHT.clone()
        assert torch.equal(function(GRID, WEIGHT, 2.0, others)[0], 3 * WEIGHT)
        assert torch.equal(others, 3 * WEIGHT)
    assert len(tried) == 1


def test_a_compiler_that_fails_later(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def once(function: Any, dynamic: bool) -> Any:
        def program(*arguments: Any) -> Any:
            calls.append(1)
            return function(*arguments) if len(calls) < 3 else broken()

        return program

    monkeypatch.setattr(torch, "compile", once)
    function, _ = counted()
    for _ in range(8):
        assert torch.equal(function(GRID, WEIGHT, 2.0, WEIGHT.clone())[0], 3 * WEIGHT)
    assert len(calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("constraint", ["ternary", "two-bit-shift", "levels:-1,-0.3,0.5"])
def test_compiled_training_gives_the_same_bits(constraint: str, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real compiler: a minute or two, and nothing to see where there is none."""

    def run(model: nn.Module) -> Constrained:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        constrained = cbpq.constrain(
            model, optimizer, constraint, preset=preset, epochs=4, patience=1, example_input=images
        )
        for _ in range(4):
            for _ in range(3):
                optimizer.zero_grad()
                model(images).square().mean().backward()
                optimizer.step()
                constrained.advance(0.7)
            constrained.end_epoch(1.0)
        return constrained

    torch.manual_seed(0)
    images = torch.randn(8, 3, 6, 6)
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 16, 2), nn.Flatten(), nn.Linear(144, 4)]
    model = nn.Sequential(*layers)
    taken: list[Any] = []
    make = module._compile

    def noted(*arguments: Any) -> Any:
        taken.append(make(*arguments))
        return taken[-1]

    monkeypatch.setattr(module, "_compile", noted)
    monkeypatch.setattr(module, "ENOUGH", 10**12)
    plain = run(copy.deepcopy(model))
    assert not taken
    monkeypatch.setattr(module, "ENOUGH", 0)
    compiled = run(model)
    assert taken
    if None in taken:
        pytest.skip("there is no compiler here, or it gives other bits")
    for name in plain.names:
        assert torch.equal(plain.model.get_parameter(name), compiled.model.get_parameter(name))
        for key, tensor in plain.state_dict()["weights"][name].items():
            assert torch.equal(compiled.state_dict()["weights"][name][key], tensor), (name, key)
