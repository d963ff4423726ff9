"""What a weight is multiplied with: the inputs of convolutions and linear maps, seen as matrices of columns.

The calls of torch's own functions are watched, not modules, so that attention's projections and layers used through
``torch.nn.functional`` count like any others.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cbpq.tracing import unfused_attention

_CONVOLUTIONS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Use:
    """One multiplication of ``input`` with a weight; ``geometry`` is None for a linear map.

    ``multiply(weight, bias)`` does it again with any weight of that shape, just as the network does; ``bias`` is what
    the network adds.
    """

    input: Tensor
    multiply: Callable[[Tensor, Tensor | None], Tensor]
    bias: Tensor | None
    geometry: "Geometry | None" = None

    def columns(self, positions: Tensor | None = None) -> Tensor:
        """The vectors x the weight's rows are multiplied with: (G, K, N), one for each output position.

        K runs over the axes of the weight behind its first, in their order. ``positions`` picks some of the output
        positions of each picture.
        """
        if self.geometry is None:
            tokens = self.input.reshape(len(self.input), -1, self.input.shape[-1])  # (B, T, K)
            chosen = tokens if positions is None else tokens[:, positions]
            return chosen.reshape(1, -1, tokens.shape[-1]).mT
        return self.geometry.columns(self.input, positions)

    @property
    def positions(self) -> int:
        """Output positions of each picture."""
        if self.geometry is None:
            return self.input[0].numel() // self.input.shape[-1]
        return self.geometry.positions(self.input)


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input; a number for each spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    def positions(self, input: Tensor) -> int:
        """Number of output positions."""
        return self._patches(input[:1, :1])[0, 0].flatten(len(self.kernel)).shape[:-1].numel()

    def columns(self, input: Tensor, chosen: Tensor | None) -> Tensor:
        """See ``Use.columns``."""
        patches = self._patches(input)  # (B, C, *out, *kernel), a view
        axes = len(self.kernel)
        out = patches.shape[2 : 2 + axes]
        if chosen is None:
            chosen = torch.arange(out.numel())
        places: Any = torch.unravel_index(chosen.to(input.device), out)
        picked = patches[(slice(None), slice(None), *places)]  # (B, C, P, *kernel)
        batch, channels, count = picked.shape[:3]
        picked = picked.reshape(batch, self.groups, channels // self.groups, count, -1)
        return picked.permute(1, 2, 4, 0, 3).reshape(self.groups, -1, batch * count)

    def _patches(self, input: Tensor) -> Tensor:
        before_and_after = [side for pair in reversed(self.padding) for side in pair]
        patches = functional.pad(input, before_and_after)
        for axis, (kernel, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            patches = patches.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        return patches


class _Watcher(TorchFunctionMode):
    def __init__(self, weights: Mapping[int, str], found: Callable[[str, Use], None]) -> None:
        super().__init__()
        self._weights, self._found = weights, found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS:
            given = dict(zip(_CONVOLUTION_ARGUMENTS, args, strict=False)) | kwargs
            if name := self._weights.get(id(given["weight"])):
                self._found(name, _convolution_use(func, given))
        elif func is functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if name := self._weights.get(id(given["weight"])):
                self._found(name, _linear_use(torch.atleast_2d(given["input"].detach()), given.get("bias")))
        elif func is functional.multi_head_attention_forward:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Do torch's attention in two steps, since nobody sees the input of its last projection otherwise."""
        names = ("embed", "heads", "in", "in_bias", "bias_k", "bias_v", "zero", "dropout", "weight", "bias")
        given = dict(zip(names, args, strict=False))
        if query is key and key is value and (name := self._weights.get(id(given["in"]))):
            self._found(name, _linear_use(_batch_first(query), given["in_bias"]))
        attend: Any = functional.multi_head_attention_forward
        mixed, attention = attend(
            query, key, value, *args[:8], torch.eye(len(given["weight"])).to(query), None, *args[10:], **kwargs
        )
        if name := self._weights.get(id(given["weight"])):
            self._found(name, _linear_use(_batch_first(mixed), given["bias"]))
        return functional.linear(mixed, given["weight"], given["bias"]), attention


def _batch_first(tokens: Tensor) -> Tensor:
    """Attention's (T, B, K) as (B, T, K); a lone (T, K) as a batch of one."""
    return tokens.detach().transpose(0, 1) if tokens.dim() == 3 else tokens.detach().unsqueeze(0)


def _linear_use(input: Tensor, bias: Tensor | None) -> Use:
    return Use(input, lambda weight, bias: functional.linear(input, weight, bias), bias)


def _convolution_use(function: Callable[..., Tensor], given: Mapping[str, Any]) -> Use:
    axes = _CONVOLUTIONS[function]

    def each(name: str, default: int) -> tuple[int, ...]:
        value = given.get(name, default)
        return (value,) * axes if isinstance(value, int) else tuple(value) * (axes // len(value))

    kernel, dilation = tuple(given["weight"].shape[2:]), each("dilation", 1)
    padding = given.get("padding", 0)
    if isinstance(padding, str):  # "same" puts the odd pixel behind, "valid" has none
        totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        pairs = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pairs = tuple((side, side) for side in each("padding", 0))
    input = given["input"].detach()
    if input.dim() == axes + 1:
        input = input.unsqueeze(0)
    geometry = Geometry(kernel, each("stride", 1), pairs, dilation, given.get("groups", 1))

    def multiply(weight: Tensor, bias: Tensor | None) -> Tensor:
        return function(**{**given, "input": input, "weight": weight, "bias": bias})

    return Use(input, multiply, given.get("bias"), geometry)


@contextlib.contextmanager
def watching(model: nn.Module, names: Sequence[str], found: Callable[[str, Use], None]) -> Iterator[None]:
    """Call ``found(name, use)`` whenever a forward pass multiplies with one of these parameters."""
    parameters = dict(model.named_parameters())
    with unfused_attention(), _Watcher({id(parameters[name]): name for name in names}, found):
        yield
