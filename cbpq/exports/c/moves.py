"""Operators that compute nothing: they give values another shape or order, choose among them, or put them together."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from cbpq.exports.c.calls import Call, Unsupported
from cbpq.exports.c.operations import Copy, Operation, Piece, Shape, View

MOST_LOOPS = 4  # of the kernel that copies


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _piece(source: int, offset: int, out_offset: int, shape: Shape, steps: Shape, out_steps: Shape) -> Piece:
    """A piece in as few loops as possible, but always `MOST_LOOPS`."""
    loops: list[tuple[int, int, int]] = []
    for size, step, out_step in zip(shape, steps, out_steps, strict=True):
        if size == 1:
            continue
        if loops and loops[-1][1:] == (step * size, out_step * size):
            loops[-1] = (loops[-1][0] * size, step, out_step)
        else:
            loops.append((size, step, out_step))
    if len(loops) > MOST_LOOPS:
        raise Unsupported(f"it takes more than {MOST_LOOPS} nested loops")
    loops = [(1, 0, 0)] * (MOST_LOOPS - len(loops)) + loops
    sizes, ins, outs = zip(*loops, strict=True)
    return Piece(source, offset, out_offset, sizes, ins, outs)


def _view(call: Call, view: Tensor, output: str) -> Operation:
    """``view``: what torch makes of an input that exists in name only; it shows offset and strides."""
    shape = tuple(view.shape)
    if view.is_contiguous() and view.storage_offset() == 0 and view.numel() == prod(call.shapes[call.inputs[0]]):
        return View((call.inputs[0],), output, call.where)
    piece = _piece(0, int(view.storage_offset()), 0, shape, view.stride(), _strides(shape))
    return Copy((call.inputs[0],), output, call.where, (piece,), clear=False)


def _applied(call: Call) -> Any:
    whole = torch.empty(call.shapes[call.inputs[0]], device="meta")
    return call.target(**{key: whole if part == call.inputs[0] else part for key, part in call.arguments.items()})


def strided(call: Call) -> Operation:
    """Any operator that is a view for torch: the same values under another shape, or some of them, in another order."""
    return _view(call, _applied(call), call.output)


def part(call: Call, number: int, output: str) -> Operation:
    """One part of a split."""
    return _view(call, _applied(call)[number], output)


def channel_shuffle(call: Call) -> Operation:
    """Channels of several groups, in turn one of each group."""
    shape, groups = call.shapes[call.inputs[0]], call.arguments["groups"]
    whole = torch.empty(shape, device="meta").view(shape[0], groups, shape[1] // groups, -1)
    return _view(call, whole.transpose(1, 2), call.output)


def concatenation(call: Call) -> Operation:
    """Values one after another along an axis, or along a new one."""
    names, axis = call.arguments["tensors"], call.arguments["dim"] % len(call.shape)
    if not all(isinstance(name, str) for name in names):
        raise Unsupported("a part of it is a constant")
    steps, at, pieces = _strides(call.shape), 0, []
    for source, name in enumerate(names):
        shape = call.shapes[name]
        if len(shape) < len(call.shape):  # stacked
            shape = (*shape[:axis], 1, *shape[axis:])
        pieces.append(_piece(source, 0, at * steps[axis], shape, _strides(shape), steps))
        at += shape[axis]
    return Copy(tuple(names), call.output, call.where, tuple(pieces), clear=False)


def padding(call: Call) -> Operation:
    """Zeros around; what torch calls reflecting or replicating has no kernel."""
    given = [int(number) for number in call.arguments["pad"]]
    if call.arguments.get("mode", "constant") != "constant" or call.arguments.get("value"):
        raise Unsupported("it pads with something other than zeros")
    if min(given) < 0:
        raise Unsupported("it pads by a negative number")
    shape = call.shapes[call.inputs[0]]
    before = [0] * (len(shape) - len(given) // 2) + given[-2::-2]
    steps = _strides(call.shape)
    at = sum(number * step for number, step in zip(before, steps, strict=True))
    piece = _piece(0, 0, at, shape, _strides(shape), steps)
    return Copy((call.inputs[0],), call.output, call.where, (piece,), clear=True)
