"""The integer arithmetic of the generated code in PyTorch, for many pictures at a time: the same scores to the bit."""

from functools import singledispatch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cbpq.errors import CbpqError
from cbpq.exports.c.integers import MOST, Int8Arithmetic
from cbpq.exports.c.operations import Affine, Binary, Copy, Layer, Mean, Network, Operation, Pool, Unary, View, Window

_AT_A_TIME = 32
_MOST_SCORE = 2**31 - 1


def scores(network: Network, arithmetic: Int8Arithmetic, pixels: Tensor) -> Tensor:
    """uint8 pictures (N, C, H, W) to the scores (N, classes) of ``cbpq_run``, int64."""
    return torch.cat([_scores(network, arithmetic, some) for some in pixels.split(_AT_A_TIME)])


def _scores(network: Network, arithmetic: Int8Arithmetic, pixels: Tensor) -> Tensor:
    table = torch.from_numpy(arithmetic.pixels().astype(np.int64))
    channels = [table[channel][pixels[:, channel].long()] for channel in range(len(table))]
    values = {network.input: torch.stack(channels, 1).flatten(1)}
    last = {name: step for step, operation in enumerate(network.operations) for name in operation.inputs}
    for step, operation in enumerate(network.operations):
        inputs = [values[name] for name in operation.inputs]
        values[operation.output] = compute(operation, arithmetic, inputs, network.size(operation.output))
        for name in operation.inputs:
            if last[name] == step:
                values.pop(name, None)
    return values[network.output]


def rounded(values: Tensor, shift: Tensor | int) -> Tensor:
    """values / 2^shift, from the middle away from zero."""
    half = torch.where(torch.as_tensor(shift) > 0, torch.ones_like(values) << torch.as_tensor(shift) >> 1, 0)
    return values.sign() * ((values.abs() + half) >> shift)


@singledispatch
def compute(operation: Operation, arithmetic: Int8Arithmetic, inputs: list[Tensor], size: int) -> Tensor:
    """The output (N, size) of one operation from its inputs (N, …), all int64.

    Raises:
        CbpqError: it has no integer kernel.
    """
    raise CbpqError(f"{operation.where} has no kernel for int8 activations; export with float activations")


def _finished(sums: Tensor, operation: Layer | Affine, arithmetic: Int8Arithmetic) -> Tensor:
    """``sums`` (N, C, …)."""
    arrays = arithmetic.finishing(operation)
    shape = (-1, *[1] * (sums.dim() - 2))
    how = {name: torch.from_numpy(array.astype(np.int64)).reshape(shape) for name, array in arrays.items()}
    result = rounded(sums * how["multiplier"] + how["bias"], how["shift"])
    most = _MOST_SCORE if operation.output == arithmetic.final else MOST
    return result.clamp(-most, most).flatten(1)


@compute.register
def _(operation: Layer, arithmetic: Int8Arithmetic, inputs: list[Tensor], size: int) -> Tensor:
    geometry = operation.geometry
    weight = arithmetic.weights(operation) if operation.tensor is None else operation.weight
    images = inputs[0].reshape(len(inputs[0]), -1, *geometry.size)
    pads = []
    for axis in (1, 0):
        before = geometry.padding[axis]
        reach = (geometry.out_size[axis] - 1) * geometry.stride[axis]
        reach += (geometry.kernel[axis] - 1) * geometry.dilation[axis] + 1
        pads += [before, max(0, reach - before - geometry.size[axis])]
    # float64 holds these sums exactly
    sums = functional.conv2d(
        functional.pad(images.double(), pads),
        torch.from_numpy(weight.astype(np.float64)),
        None,
        geometry.stride,
        0,
        geometry.dilation,
        geometry.groups,
    )
    height, width = geometry.out_size
    return _finished(sums[:, :, :height, :width].long(), operation, arithmetic)


@compute.register
def _(operation: Affine, arithmetic: Int8Arithmetic, inputs: list[Tensor], size: int) -> Tensor:
    return _finished(inputs[0].reshape(len(inputs[0]), len(operation.scale), -1), operation, arithmetic)


@compute.register
def _(operation: Unary, arithmetic: Int8Arithmetic, inputs: list[Tensor], size: int) -> Tensor:
    return torch.from_numpy(arithmetic.table(operation).astype(np.int64))[inputs[0] + 128]


@compute.register
def _(operation: Binary, arithmetic: Int8Arithmetic, inputs: list[Tensor], size: int) -> Tensor:
    *multipliers, shift = arithmetic.factors(operation)
    first, second = inputs[0], inputs[1].repeat_interleave(operation.repeat, 1)
    second = second.repeat(1, operation.count // second.shape[1])
    if operation.function == "multiply":
        return rounded(first * second * multipliers[0], shift).clamp(-MOST, MOST)
    return rounded(first * multipliers[0] + second * multipliers[1], shift).clamp(-MOST, MOST)


def _average(sums: Tensor, counts: Tensor, how: tuple[int, int]) -> Tensor:
    products, divisors = sums * how[0], counts << how[1]
    quotients = torch.div(products.abs() + divisors // 2, divisors, rounding_mode="floor")
    return (products.sign() * quotients).clamp(-MOST, MOST)


@compute.register
def _(operation: Mean, arithmetic: Int8Arithmetic, inputs: list[Tensor], size: int) -> Tensor:
    parts = inputs[0].reshape(len(inputs[0]), operation.outer, operation.count, operation.inner)
    return _average(parts.sum(2), torch.tensor(operation.count), arithmetic.average(operation)).flatten(1)


@compute.register
def _(operation: Pool, arithmetic: Int8Arithmetic, inputs: list[Tensor], size: int) -> Tensor:
    images = inputs[0].reshape(len(inputs[0]), operation.channels, *operation.size)

    def reduced(row: Window, column: Window) -> Tensor:
        part = images[:, :, row.start : row.end, column.start : column.end]
        return part.amax((2, 3)) if operation.function == "max" else part.sum((2, 3))

    cells = [reduced(row, column) for row in operation.rows for column in operation.columns]
    result = torch.stack(cells, 2)
    if operation.function == "average":
        counts = torch.tensor([row.count * column.count for row in operation.rows for column in operation.columns])
        result = _average(result, counts, arithmetic.average(operation))
    return result.flatten(1)


@compute.register
def _(operation: Copy, arithmetic: Int8Arithmetic, inputs: list[Tensor], size: int) -> Tensor:
    output = inputs[0].new_zeros(len(inputs[0]), size)
    for piece in operation.pieces:
        source = inputs[piece.source]
        places = [torch.tensor(offset) for offset in (piece.offset, piece.out_offset)]
        for axis, steps in enumerate(zip(piece.steps, piece.out_steps, strict=True)):
            number = torch.arange(piece.sizes[axis])
            places = [place[..., None] + number * step for place, step in zip(places, steps, strict=True)]
        output[:, places[1].flatten()] = source[:, places[0].flatten()]
    return output


@compute.register
def _(operation: View, arithmetic: Int8Arithmetic, inputs: list[Tensor], size: int) -> Tensor:
    return inputs[0]
