"""Functions of one value: each as an expression in C and as torch computes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Function:
    """``parameters`` are names of further arguments; ``c`` is an expression of ``x`` and them, all of them float."""

    c: str
    torch: Callable[..., Tensor]
    parameters: tuple[str, ...] = ()

    def kernel(self, name: str) -> str:
        """The text of the kernel ``name``; output and input may be in one place."""
        parameters = "".join(f", float {parameter}" for parameter in self.parameters)
        head = f"static void apply_{name}(const value *in, value *out, int count{parameters})"
        body = f"        float x = in[i];\n        out[i] = {self.c};"
        return f"{head}\n{{\n    for (int i = 0; i < count; i++) {{\n{body}\n    }}\n}}\n"


FUNCTIONS: Mapping[str, Function] = {
    "relu": Function("x > 0 ? x : 0", torch.relu),
    "clamp": Function("x < low ? low : x > high ? high : x", torch.clamp, ("low", "high")),
    "leaky_relu": Function("x > 0 ? x : slope * x", functional.leaky_relu, ("slope",)),
    "sigmoid": Function("1 / (1 + expf(-x))", torch.sigmoid),
    "tanh": Function("tanhf(x)", torch.tanh),
    "silu": Function("x / (1 + expf(-x))", functional.silu),
    "hardsigmoid": Function("x <= -3 ? 0 : x >= 3 ? 1 : (x + 3) / 6", functional.hardsigmoid),
    "hardswish": Function("x <= -3 ? 0 : x >= 3 ? x : x * (x + 3) / 6", functional.hardswish),
    "gelu": Function("0.5f * x * (1 + erff(0.70710678f * x))", functional.gelu),
    "gelu_tanh": Function(
        "0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)))",
        lambda x: functional.gelu(x, approximate="tanh"),
    ),
}
