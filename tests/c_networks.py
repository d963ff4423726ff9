"""Networks for exports, constrained without training, and a C compiler for what becomes of them."""

import itertools
import runpy
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_job import ROOT
from torch import Tensor, nn
from torch.nn import functional

from cbpq.fileformat import CbpqFile, ConstrainedTensor, write
from cbpq.inputs import InputSpec
from cbpq.models import load_model

GCC = shutil.which("gcc")
needs_gcc = pytest.mark.skipif(GCC is None, reason="no gcc here")
STRICT = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-pedantic")
SANITIZED = (*STRICT[:1], "-O1", *STRICT[2:], "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CONSTRAINTS: dict[str, tuple[tuple[int, ...], int]] = {
    "binary": ((-1, 1), 1),
    "ternary": ((-1, 0, 1), 1),
    "one-bit-shift": ((-2, -1, 0, 1, 2), 2),
    "two-bit-shift": ((-4, -2, -1, 0, 1, 2, 4), 4),
    "levels:-1,-0.3,0.3,1": ((-10, -3, 3, 10), 10),  # sums of two powers: 10 = 8 + 2, 3 = 2 + 1
}
TINY = InputSpec(2, 5, 6, (0.4, 0.5), (0.2, 0.3))


def rounded(parameter: nn.Parameter, constraint: str, per_channel: bool) -> ConstrainedTensor:
    """The nearest levels to a weight on a scale of its mean magnitude; the weight is changed to them."""
    levels, denominator = CONSTRAINTS[constraint]
    values = parameter.detach().numpy()
    axes = tuple(range(1, values.ndim)) if per_channel else None
    scale: NDArray[np.float32] = np.asarray(np.abs(values).mean(axis=axes) + 1e-3, dtype=np.float32)
    ratio = values / (scale.reshape(-1, *[1] * (values.ndim - 1)) if per_channel else scale) * denominator
    table = np.array(levels)
    codes = table[np.searchsorted((table[1:] + table[:-1]) / 2, ratio)].astype(np.int8)
    tensor = ConstrainedTensor(codes, scale, levels, denominator, constraint)
    parameter.data.copy_(torch.from_numpy(tensor.weight()))
    return tensor


def constrained(model: nn.Module, *constraints: str, keep: Sequence[str] = ()) -> CbpqFile:
    """Constrain all matrices and kernels but those to ``keep``, by these constraints in turn, scales of both kinds."""
    chosen = itertools.cycle(itertools.product(constraints or ("two-bit-shift",), (True, False)))
    tensors = {
        name: rounded(parameter, *next(chosen))
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name not in keep
    }
    others = {name: value.numpy().copy() for name, value in model.state_dict().items() if name not in tensors}
    return CbpqFile(tensors, others, {}, {}, {})


def lived(model: nn.Module) -> nn.Module:
    """BatchNorms with statistics and factors such as training gives them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                assert tensor is not None
                tensor.data.normal_(0, 0.2)
            for tensor in (module.running_var, module.weight):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5)
    return model.eval()


def pictures(spec: InputSpec, count: int = 3) -> Tensor:
    return torch.randn(count, spec.channels, spec.height, spec.width, generator=torch.Generator().manual_seed(5))


def compiled(folder: Path, *flags: str, sources: Sequence[str] = ("network.c", "main.c"), to: str = "check") -> Path:
    paths = [str(folder / name) for name in sources]
    assert GCC is not None
    done = subprocess.run([GCC, *flags, *paths, "-lm", "-o", str(folder.parent / to)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    return folder.parent / to


class Branches(nn.Module):
    """One convolution per constraint and kind of scale, and one that stays float, on the same input."""

    def __init__(self, **shape: Any) -> None:
        super().__init__()
        count = 2 * len(CONSTRAINTS) + 1
        self.branches = nn.ModuleList(nn.Conv2d(bias=number % 3 != 0, **shape) for number in range(count))

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([branch(images).flatten(1) for branch in self.branches], dim=1)


SHAPES: dict[str, dict[str, Any]] = {
    "3x3": {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 1},
    "pointwise, strided": {"in_channels": 2, "out_channels": 3, "kernel_size": 1, "stride": (2, 3)},
    "flat kernel": {"in_channels": 2, "out_channels": 2, "kernel_size": (1, 4), "stride": (1, 2), "padding": (0, 3)},
    "depthwise": {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "stride": 2, "padding": 1, "groups": 4},
    "depthwise, multiplied": {"in_channels": 2, "out_channels": 6, "kernel_size": 2, "groups": 2},
    "grouped, dilated": {
        "in_channels": 4,
        "out_channels": 6,
        "kernel_size": (3, 2),
        "groups": 2,
        "dilation": (1, 3),
        "padding": (2, 1),
        "stride": (2, 1),
    },
    "dilated beyond the picture": {
        "in_channels": 1,
        "out_channels": 2,
        "kernel_size": 3,
        "padding": 4,
        "dilation": 4,
        "stride": 3,
    },
    "same, even": {"in_channels": 2, "out_channels": 2, "kernel_size": (4, 2), "padding": "same"},
    "whole picture": {"in_channels": 3, "out_channels": 2, "kernel_size": (5, 6), "padding": "valid"},
}


class Everything(nn.Module):
    """Every operator with a kernel; integers have no softmax."""

    def __init__(self, softmax: bool = True) -> None:
        super().__init__()
        self.softmax = softmax
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.alone = nn.BatchNorm2d(6)  # behind a ReLU: it cannot be folded
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.squeeze = nn.Conv2d(6, 6, 1)
        self.hidden = nn.Linear(72, 12)
        self.hidden_norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(24, 7)
        self.factor = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.alone(functional.relu(self.norm(self.stem(images)), inplace=True))
        y = functional.relu6(self.depthwise(x) * 3)
        y = y * functional.hardsigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))
        x = x + functional.hardswish(y) * self.factor - 0.25
        a, b = x.chunk(2, dim=1)
        shuffled = torch.stack([functional.silu(a), functional.gelu(b)], dim=2).flatten(1, 2)
        x = torch.cat(
            [functional.leaky_relu(x, 0.2), shuffled.tanh(), functional.pad(x[:, 1:3], (0, 0, 0, 0, 1, 3))], 1
        )
        pooled = [
            functional.max_pool2d(x, 3, 2, 1),
            functional.max_pool2d(x, 2, ceil_mode=True),
            functional.avg_pool2d(x, (2, 3), 2, (1, 1)),
            functional.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
            functional.adaptive_avg_pool2d(x, (2, 4)),
        ]
        means = torch.cat([pool.mean((2, 3)) for pool in pooled[:4]], 1)
        x = torch.sigmoid(self.hidden_norm(self.hidden(means)))
        y = functional.gelu(pooled[4].mean(1).flatten(1), approximate="tanh")[:, :8]
        parts = [x, y.softmax(1) if self.softmax else y]
        parts.append(pooled[4].permute(0, 2, 3, 1).mean((1, 2))[:, ::5][:, :4].clamp(min=0))
        x = torch.cat(parts, 1)
        scores: Tensor = self.head(x)
        return scores / 2


class Inverted(nn.Module):
    """MobileNet's block: expand, depthwise, project, and the input again."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        wide = 3 * channels
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)),
            *(
                nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU6(inplace=True),
            ),
            *(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


def mobile() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()),
        *(Inverted(8, 8, 1), Inverted(8, 12, 2), Inverted(12, 12, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 10)),
    )


def resnet20() -> nn.Module:
    network: nn.Module = runpy.run_path(str(ROOT / "examples" / "cifar10" / "resnet.py"))["resnet20"]()
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], InputSpec, Sequence[str]]] = {
    "resnet20": (resnet20, InputSpec(3, 32, 32), ("conv1.weight", "linear.weight")),
    "mobile": (mobile, InputSpec(3, 24, 32), ("0.weight", "9.weight")),
}


def write_digits(folder: Path, *constraints: str) -> Path:
    """The digits network with constrained weights, as a cbpq file."""
    loaded = load_model(str(ROOT / "examples" / "digits" / "resnet.safetensors"))
    file = constrained(loaded.model, *constraints, keep=("conv1.0.weight", "fc.weight"))
    path = folder / "model.safetensors"
    write(path, replace(file, source=loaded.info.to_dict()))
    return path
