"""In which order a network uses its weights, seen in one forward pass that leaves no trace itself."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from cbpq.errors import brief
from cbpq.inputs import InputSpec

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNELS_LAST_ON = ("cpu", "cuda")
# From small to large: the order of layers does not depend on the size, only whether the network accepts it does.
_SIDES_TO_TRY = (32, 28, 64, 224, 96, 128, 256, 299, 384, 512)


def trace(
    model: nn.Module, candidates: dict[str, nn.Module], spec: InputSpec | None, example: Tensor | None
) -> tuple[list[str], str]:
    """Run forward passes in evaluation mode until one succeeds; the model is left as it was.

    Returns:
        The candidates' names by first use, but with the last one used at the end; and where there are none, why.
    """
    parameters = dict(model.named_parameters())
    weights = {id(parameters[name]): name for name in candidates}
    anchor = next(iter(parameters[name] for name in candidates))
    failure = "no forward pass was possible"
    for inputs in _inputs(unwrapped(model), candidates, spec, example):
        recorder = _UseRecorder(weights)
        try:
            with untouched(model), torch.no_grad(), recorder:
                # forward itself, so that neither torch.compile nor hooks on the whole network are set off
                unwrapped(model).forward(inputs(anchor))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a foreign forward pass raises only means: not with this input
            failure = f"its forward pass fails: {brief(error)}"
            continue
        if recorder.used:
            final = recorder.used[-1]
            return [*dict.fromkeys(name for name in recorder.used if name != final), final], ""
        failure = "its forward pass uses none of its convolution and linear weights"
    return [], failure


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``, data-parallel and averaging wrappers."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
            model = model.module
        else:
            return model


class _UseRecorder(TorchFunctionMode):
    """Notes which of some weights a forward pass hands to any torch function, in order, repeats included.

    Unlike module hooks, this also sees layers used through ``torch.nn.functional`` (timm's EVA, attention's
    ``out_proj``) and torch's fused paths for attention.
    """

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.used: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # reading an attribute such as weight.dtype is no use of the weight, but weight.T is
        if getattr(func, "__name__", "") != "__get__" or isinstance(result, Tensor):
            self.used += [self.weights[id(value)] for value in (*args, *kwargs.values()) if id(value) in self.weights]
        return result


def _inputs(
    model: nn.Module, candidates: dict[str, nn.Module], spec: InputSpec | None, example: Tensor | None
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inputs worth a try, each made beside a weight of the model (its device and type)."""
    if example is not None:
        yield lambda anchor: example.to(anchor.device)
        return
    shapes: list[tuple[int, ...]] = []
    config: Any = getattr(model, "pretrained_cfg", None)
    if spec is not None:
        shapes.append((spec.channels, spec.height, spec.width))
    elif isinstance(config, dict) and isinstance(config.get("input_size"), (tuple, list)):
        shapes.append(tuple(config["input_size"]))
    if spec is None:
        first = next((layer for layer in candidates.values() if isinstance(layer, CONVOLUTIONS)), None)
        if first is not None:
            shapes += [(first.in_channels, *(side,) * (first.weight.dim() - 2)) for side in _SIDES_TO_TRY]
        elif features := getattr(next(iter(candidates.values())), "in_features", None):
            shapes.append((features,))
            shapes += [(c, side, side) for c in (1, 3) if c * (side := math.isqrt(features // c)) ** 2 == features]
    for shape in shapes:
        yield partial(_zeros, shape)


def _zeros(shape: tuple[int, ...], anchor: Tensor) -> Tensor:
    return torch.zeros(1, *shape, device=anchor.device, dtype=anchor.dtype)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards training flags, buffers and random generators are as before."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    cuda = sorted({tensor.device.index for tensor in model.parameters() if tensor.is_cuda})
    with torch.random.fork_rng(devices=cuda):
        for module, _ in flags:
            module.training = False
        try:
            yield
        finally:
            for module, training in flags:
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


@contextlib.contextmanager
def unfused_attention() -> Iterator[None]:
    """Without torch's fast path for attention: one operator that hides what happens inside."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def image_format(model: nn.Module, images: Tensor) -> torch.memory_format:
    """How images (B, C, H, W) should lie in memory for a network: channels last, in which convolutions are faster,
    unless it has none or cannot take that, as one that calls ``view`` across channels.
    """
    if images.device.type not in _CHANNELS_LAST_ON or not any(isinstance(m, nn.Conv2d) for m in model.modules()):
        return torch.contiguous_format
    try:
        with untouched(model), torch.no_grad():
            model(images[:1].contiguous(memory_format=torch.channels_last))
    except RuntimeError:  # where it has another cause, the network's real forward pass will tell
        return torch.contiguous_format
    return torch.channels_last


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The network's BatchNorm layers, of any dimension."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
