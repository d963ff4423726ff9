"""Runs ``cbpq`` on a CPU with the float16 arithmetic of a GPU, which is too slow to train with there otherwise.

    python -m examples.cifar10.float16 compare SOURCE … --amp --set amp_dtype=float16

A CPU without float16 instructions takes 17 s for a step that takes 0.5 s in float32. Here each product of float16
tensors is computed in float32 and its result rounded to float16, as a GPU's matrix units do, which round the products
and not the sums in between. All else (which operations run in float16, the scaled loss, gradients that overflow) is
PyTorch's own automatic mixed precision.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from cbpq.cli import main

aten = torch.ops.aten
PRODUCTS = {
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.linear.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
}


class SumsInFloat32(TorchDispatchMode):
    """Products of float16 tensors: sums in float32, results in float16."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func not in PRODUCTS or all(given.dtype is not torch.float16 for given in args if torch.is_tensor(given)):
            return func(*args, **named)
        result = func(*tree_map_only(torch.Tensor, torch.Tensor.float, list(args)), **named)
        return tree_map_only(torch.Tensor, torch.Tensor.half, result)


if __name__ == "__main__":
    with SumsInFloat32():  # type: ignore[no-untyped-call]  # its own __init__ has no annotations
        sys.exit(main())
