"""Arithmetic in one pass over memory: by PyTorch's compiler where there is one, it pays and it changes no bit.

``@fused`` stands above a function of a ``Grid`` and of weights on it, each by itself. Such a function makes a pass over
memory for each of its operations; compiled, it makes one. Compiling takes tens of seconds, so it has to wait until the
plain way has taken about as long: then at most twice the time is spent that hindsight would have. The first compiled
result is compared with the plain one. Unless each bit is the same, and whenever there is no compiler or it fails,
everything goes on the plain way. ``TORCHDYNAMO_DISABLE=1`` is PyTorch's own switch against its compiler.
"""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

ENOUGH = 4 * 10**9
"""Weights that a function has been given before it is compiled: ResNet-18's in 360 steps."""

Function = TypeVar("Function", bound=Callable[..., Any])


def fused(function: Function) -> Function:
    """The function, compiled when its time has come, for each level set, type and kind of scale by itself."""
    given: dict[Any, int] = {}
    compiled: dict[Any, Callable[..., Any] | None] = {}  # None: it was tried, to no avail

    @wraps(function)
    def either(grid: Any, weight: Tensor, *others: Any) -> Any:
        if torch.compiler.is_compiling() or weight.dim() != 2:  # a piece of a weight is a matrix
            return function(grid, weight, *others)
        kind = (grid.level_set, weight.dtype, weight.device.type, grid.scale.dim(), tuple(map(type, others)))
        given[kind] = given.get(kind, 0) + weight.numel()
        if given[kind] > ENOUGH and kind not in compiled:
            compiled[kind] = _compile(function, grid, weight, others)
        if way := compiled.get(kind):
            try:
                return way(grid, weight, *_tensors(others, weight))
            except Exception:  # it compiles anew for a shape of another kind, which may fail as the first time may
                compiled[kind] = None
        return function(grid, weight, *others)

    return either  # type: ignore[return-value]  # which has the same arguments


def _compile(
    function: Callable[..., Any], grid: Any, weight: Tensor, others: tuple[Any, ...]
) -> Callable[..., Any] | None:
    """The compiled function, if there is one that makes of copies of these arguments what the plain one does."""
    ways: list[Callable[..., Any]] = [function]
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))  # what the compiler says of itself is no news of the run
    try:
        ways.append(torch.compile(function, dynamic=True))
        seen = []
        for way in ways:
            given = [weight.clone(), *_tensors(others, weight, copied=True)]
            seen.append([*_all(way(grid, *given)), *given])  # what it gives, and what it changes
    except Exception:  # whatever a compiler raises only means: not here
        return None
    finally:
        logging.disable(disabled)
    return ways[1] if all(map(torch.equal, *seen)) else None


def _tensors(others: tuple[Any, ...], weight: Tensor, copied: bool = False) -> list[Any]:
    """Numbers as tensors, since a compiler would make a program for each number; and tensors as they are, or copies."""
    numbers = [weight.new_tensor(other) if isinstance(other, float) else other for other in others]
    return [other.clone() if copied and isinstance(other, Tensor) else other for other in numbers]


def _all(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
