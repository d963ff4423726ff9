"""What each ATen operator that computes becomes: one function per row of the table in ``lowering``."""

from collections.abc import Callable, Sequence
from math import ceil, floor, inf, prod
from typing import Any

import numpy as np
from torch import Tensor

from cbpq.exports.c.calls import Call, Constrained, Unsupported, pair
from cbpq.exports.c.operations import Affine, Binary, Geometry, Layer, Mean, Operation, Pool, Softmax, Unary, Window


def _layer(call: Call, geometry: Geometry, weight: Any) -> Layer:
    channels = geometry.groups * geometry.outputs
    bias = call.constant("bias")
    if isinstance(weight, Constrained):
        tensor, name = weight.tensor, weight.name
        codes: Any = tensor.codes
        scale = np.broadcast_to(tensor.step, channels).astype(np.float64)
    else:
        tensor, name = None, call.where.partition(" ")[0]
        codes = call.constant("weight")
        scale = np.ones(channels)
    shape = (channels, geometry.inputs, *geometry.kernel)
    return Layer(
        (call.value("input"),),
        call.output,
        call.where,
        geometry=geometry,
        name=name,
        weight=codes.reshape(shape),
        tensor=tensor,
        scale=scale,
        bias=np.zeros(channels) if bias is None else bias,
    )


def convolution(call: Call) -> Operation:
    """A convolution over two axes; ``padding`` may be a word."""
    shape, weight = call.shapes[call.value("input")], call.arguments["weight"]
    size = weight.tensor.codes.shape if isinstance(weight, Constrained) else tuple(weight.shape)
    if len(shape) != 4 or shape[0] != 1:
        raise Unsupported(f"its input has the shape {shape}")
    kernel, dilation, padding = pair(size[2:]), pair(call.arguments["dilation"]), call.arguments["padding"]
    if padding == "same":  # torch puts the odd one at the end
        padding = [(step * (side - 1)) // 2 for side, step in zip(kernel, dilation, strict=True)]
    geometry = Geometry(
        groups=call.arguments["groups"],
        inputs=size[1],
        outputs=size[0] // call.arguments["groups"],
        size=pair(shape[2:]),
        out_size=pair(call.shape[2:]),
        kernel=kernel,
        stride=pair(call.arguments["stride"]),
        padding=(0, 0) if padding == "valid" else pair(padding),
        dilation=dilation,
    )
    return _layer(call, geometry, weight)


def linear(call: Call) -> Operation:
    """A linear layer on one vector."""
    shape, weight = call.shapes[call.value("input")], call.arguments["weight"]
    size = weight.tensor.codes.shape if isinstance(weight, Constrained) else tuple(weight.shape)
    if prod(shape) != shape[-1]:
        raise Unsupported(f"its input has the shape {shape}, which is more than one vector")
    return _layer(call, Geometry(1, size[1], size[0], (1, 1), (1, 1)), weight)


def _per_channel(call: Call, scale: Any, bias: Any, name: str = "input") -> Affine:
    """``scale`` and ``bias``, numbers or constants of one number or of one per channel, for the value ``name``."""
    shape = call.shapes[call.value(name)]
    if shape[:1] != (1,) or call.shape != shape:
        raise Unsupported(f"it takes the shape {shape} to {call.shape}")
    channels = shape[1] if len(shape) > 1 else 1
    arrays = []
    for values in (scale, bias):
        array = np.asarray(values, dtype=np.float64)
        if array.size not in (1, channels) or (array.size > 1 and array.shape[-len(shape) + 1 :][:1] != (channels,)):
            raise Unsupported(f"a constant of shape {array.shape} is not one number per channel of {shape}")
        arrays.append(np.broadcast_to(array.reshape(-1), channels))
    return Affine((call.value(name),), call.output, call.where, arrays[0], arrays[1], prod(shape[2:]))


def batch_norm(call: Call) -> Operation:
    """(x − mean) / √(variance + eps) · weight + bias."""
    mean, variance = call.constant("running_mean"), call.constant("running_var")
    if mean is None or variance is None:
        raise Unsupported("it has no running statistics, so each picture would depend on others")
    weight, bias = call.constant("weight"), call.constant("bias")
    scale = (1 if weight is None else weight) / np.sqrt(variance + call.arguments["eps"])
    shape = (-1, *[1] * (len(call.shape) - 2))
    return _per_channel(call, scale.reshape(shape), ((0 if bias is None else bias) - mean * scale).reshape(shape))


def unary(function: str, *numbers: str) -> Callable[[Call], Operation]:
    """The row of a function of single values whose ``numbers`` are arguments of these names."""

    def row(call: Call) -> Operation:
        given = tuple(float(call.arguments[name]) for name in numbers)
        return Unary((call.inputs[0],), call.output, call.where, function, given, call.count)

    return row


def clamp(call: Call) -> Operation:
    """Values to between two numbers: ReLU6 and Hardtanh are of this kind."""
    low = call.arguments.get("min_val", call.arguments.get("min", 0.0))
    high = call.arguments.get("max_val", call.arguments.get("max", 6.0))
    numbers = (-inf if low is None else float(low), inf if high is None else float(high))
    return Unary((call.inputs[0],), call.output, call.where, "clamp", numbers, call.count)


def gelu(call: Call) -> Operation:
    """The Gaussian error linear unit, exact or by tanh."""
    function = "gelu_tanh" if call.arguments["approximate"] == "tanh" else "gelu"
    return Unary((call.inputs[0],), call.output, call.where, function, (), call.count)


def arithmetic(call: Call) -> Operation:
    """Sums and products: of two values, or of a value and a constant of one number or one per channel."""
    kind = str(call.target.overloadpacket).removeprefix("aten.")
    first, second, alpha = (call.arguments.get(name) for name in ("self", "other", "alpha"))
    if call.arguments.get("rounding_mode") is not None:
        raise Unsupported("it rounds")
    if isinstance(first, str) and isinstance(second, str):
        return _of_two(call, kind, first, second, 1 if alpha is None else alpha)
    name = "self" if isinstance(first, str) else "other"
    other = second if name == "self" else first
    if isinstance(other, Constrained) or (name == "other" and kind == "div"):
        raise Unsupported("one of its factors is a constrained weight or a divisor that depends on the picture")
    constant: Any = other.double().numpy() if isinstance(other, Tensor) else float(other)  # type: ignore[arg-type]
    if kind in ("mul", "div"):
        return _per_channel(call, constant if kind == "mul" else 1 / constant, 0, name)
    factor = 1.0 if alpha is None else float(alpha)
    if name == "self":
        return _per_channel(call, 1, constant * (factor if kind == "add" else -factor), name)
    return _per_channel(call, factor if kind == "add" else -factor, constant, name)


def _of_two(call: Call, kind: str, first: str, second: str, alpha: float) -> Operation:
    if kind not in ("add", "mul") or alpha != 1:
        raise Unsupported("only sums and products of two values have a kernel")
    one, other = call.shapes[first], call.shapes[second]
    if one != call.shape:
        first, second, one, other = second, first, other, one
    other = (1,) * (len(one) - len(other)) + other
    used = max((axis + 1 for axis, size in enumerate(other) if size > 1), default=0)
    if one != call.shape or other[:used] != one[:used]:
        raise Unsupported(f"the shapes {one} and {other} do not fit channel by channel")
    repeat = prod(one[used:])
    function = "add" if kind == "add" else "multiply"
    return Binary((first, second), call.output, call.where, function, call.count, repeat)


def _middle(call: Call, axes: Sequence[int]) -> tuple[int, int, int]:
    """(outer, count, inner) of axes that follow one another; those of length 1 do not matter."""
    shape = call.shapes[call.inputs[0]]
    chosen = {axis % len(shape) for axis in axes}
    inside = sorted(axis for axis in chosen if shape[axis] > 1)
    if not inside:
        return call.count, 1, 1
    first, last = inside[0], inside[-1]
    if any(shape[axis] > 1 and axis not in chosen for axis in range(first, last + 1)):
        raise Unsupported(f"the axes {sorted(chosen)} of {shape} are not neighbours")
    return prod(shape[:first]), prod(shape[first : last + 1]), prod(shape[last + 1 :])


def mean(call: Call) -> Operation:
    """The mean over one axis, or several that follow one another, or all."""
    axes = call.arguments.get("dim")
    every = range(len(call.shapes[call.inputs[0]]))
    return Mean((call.inputs[0],), call.output, call.where, *_middle(call, list(axes) if axes else every))


def softmax(call: Call) -> Operation:
    """Softmax along one axis."""
    return Softmax((call.inputs[0],), call.output, call.where, *_middle(call, [call.arguments["dim"]]))


def _windows(size: int, out: int, kernel: int, stride: int, padding: int, whole: bool) -> tuple[Window, ...]:
    """``whole``: an average counts the padding too, as far as torch does."""
    windows = []
    for number in range(out):
        start = number * stride - padding
        end = min(start + kernel, size + padding)
        count = end - start
        start, end = max(start, 0), min(end, size)
        windows.append(Window(start, end, count if whole else end - start))
    return tuple(windows)


def _pool(call: Call, function: str, axes: Sequence[tuple[Window, ...]]) -> Operation:
    *outer, height, width = call.shapes[call.inputs[0]]
    return Pool((call.inputs[0],), call.output, call.where, function, prod(outer), (height, width), axes[0], axes[1])


def _sliding(call: Call, function: str, whole: bool) -> Operation:
    kernel, padding = pair(call.arguments["kernel_size"]), pair(call.arguments["padding"])
    stride = pair(call.arguments["stride"] or kernel)
    sizes = zip(call.shapes[call.inputs[0]][-2:], call.shape[-2:], kernel, stride, padding, strict=True)
    return _pool(call, function, [_windows(*axis, whole) for axis in sizes])


def max_pool(call: Call) -> Operation:
    """The maximum over windows; the padding never counts."""
    if pair(call.arguments["dilation"]) != (1, 1):
        raise Unsupported("it is dilated")
    return _sliding(call, "max", False)


def average_pool(call: Call) -> Operation:
    """The average over windows."""
    if call.arguments["divisor_override"] is not None:
        raise Unsupported("it has a divisor of its own")
    return _sliding(call, "average", bool(call.arguments["count_include_pad"]))


def adaptive_average_pool(call: Call) -> Operation:
    """The average over windows that divide the picture as evenly as they can."""
    axes = []
    for size, out in zip(call.shapes[call.inputs[0]][-2:], call.shape[-2:], strict=True):
        bounds = [(floor(size * number / out), ceil(size * (number + 1) / out)) for number in range(out)]
        axes.append(tuple(Window(start, end, end - start) for start, end in bounds))
    return _pool(call, "average", axes)
