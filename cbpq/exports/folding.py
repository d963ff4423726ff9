"""A state dict with each BatchNorm folded into the convolution or the linear layer before it.

A BatchNorm in evaluation mode is a factor and an offset for each output channel of the layer before it. So its factor
goes into that layer's weight and the rest into its bias; the BatchNorm's own tensors are left out. That is the state
dict of a network without the folded BatchNorm layers, whose convolutions have a bias. For networks that ``torch.fx``
can follow, ``torch.fx.experimental.optimization.fuse(network.eval())`` makes it; for any,

    from cbpq.exports.folding import find_folds, without_norms

    network = without_norms(network, find_folds(network, cbpq.load("model.safetensors").info.input_spec))
    network.load_state_dict(torch.load("folded.pth"))

Folded is a BatchNorm that alone reads what a layer gives, in torch's graph of the network, where both are used once.
Others, such as those before a convolution, stay as they are.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from cbpq.atomic import atomic_write
from cbpq.errors import CbpqError
from cbpq.exports import Exported
from cbpq.exports.checks import Runs, compare_logits
from cbpq.exports.state_dict import serialized
from cbpq.exports.translation import all_names, check_weights, exporting, own_names, program_of
from cbpq.fileformat import CbpqFile
from cbpq.inputs import InputSpec
from cbpq.models import logits
from cbpq.tracing import CONVOLUTIONS

_LAYERS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.linear")
_NOTE = (
    "float32 weights: a folded weight is a level times the scale and the BatchNorm's factor of its output channel, so "
    "there are few values in each channel, but others in every one"
)
_HOW_TO_LOAD = (
    "load it into the network without the folded BatchNorm layers and with biases in their place, as "
    "torch.fx.experimental.optimization.fuse or cbpq.exports.folding.without_norms makes it"
)
_Own = Callable[[Any], str]


@dataclass(frozen=True)
class Fold:
    """A layer and the BatchNorm behind it, both by their names in the network."""

    layer: str
    norm: str


def export_folded(model: nn.Module, file: CbpqFile, spec: InputSpec, out: Path, *, check: bool = True) -> Exported:
    """Write the state dict of ``model`` without the BatchNorm layers that this module's text calls folded.

    Names, types and shapes of what stays are the network's own; a layer without a bias gets ``<layer>.bias``. Before
    ``out`` appears it is read back, compared, and loaded into a copy of the network that computes the same logits.

    Args:
        model: the network with the weights of ``file``; it is left as it is.
        file: gives the weights.
        spec: the size of the input, and what the check's random pictures look like.
        out: the file to write, ``.pth`` or ``.safetensors``.
        check: whether to read it back and to compare logits.

    Raises:
        UsageError: another extension.
        CbpqError: ``model`` does not hold the weights of ``file``, torch cannot follow its code, a folded value is too
            large for float32, or the result does not pass its check. Nothing was written.
    """
    network = copy.deepcopy(model).cpu().eval()
    check_weights(network, file)
    folds = find_folds(network, spec)
    state = folded_state(network, folds)
    data, found = serialized({name: tensor.numpy() for name, tensor in state.items()}, out, check=check)
    gone = {fold.norm for fold in folds}
    facts: dict[str, Any] = {
        "tensors": len(state),
        "decoded": len(file.constrained),
        "folded_batch_norms": len(folds),
        "batch_norms_left": [name for name, module in network.named_modules() if _stays(module, name, gone)],
    }
    if check:

        def load() -> Runs:
            other = without_norms(network, folds)
            other.load_state_dict(found)
            return lambda images: logits(other(images))

        facts |= compare_logits(f"torch {torch.__version__}", load, network, spec)
    atomic_write(out, data)
    return Exported("state-dict", out, len(data), file.float32_bytes, facts, (_NOTE, _HOW_TO_LOAD))


def find_folds(network: nn.Module, spec: InputSpec) -> list[Fold]:
    """Which BatchNorm can be folded into which layer, in the order of use.

    Raises:
        CbpqError: torch cannot follow the code of ``network``.
    """
    with exporting(f"follow the code of {type(network).__name__}"):
        program = program_of(network, spec, free_batch=False)
    names, aliases = own_names(program), all_names(network)

    def own(node: Any) -> str:
        """The name of a tensor of the network's that is used once and under one name; empty for anything else."""
        name = names.get(node.name, "") if isinstance(node, fx.Node) and len(node.users) == 1 else ""
        return name if len(aliases.get(name, ())) == 1 else ""

    found = []
    for node in program.graph.nodes:
        if _operator(node) == "aten.batch_norm":
            layer, norm = _layer(_arguments(node)["input"], network, own), _norm(_arguments(node), network, own)
            if layer and norm:
                found.append(Fold(layer, norm))
    return found


def folded_state(network: nn.Module, folds: Iterable[Fold]) -> dict[str, Tensor]:
    """The state dict of ``network`` with ``folds`` done, and without the tensors of their BatchNorm layers.

    Raises:
        CbpqError: a folded value is too large for float32.
    """
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    for fold in folds:
        layer: Any = network.get_submodule(fold.layer)
        norm: Any = network.get_submodule(fold.norm)
        fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        parts = fuse(layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        for key, tensor in zip(("weight", "bias"), parts, strict=True):
            if not tensor.isfinite().all():
                raise CbpqError(f"{fold.norm} folded into {fold.layer}.{key} is too large for float32; export unfolded")
            state[f"{fold.layer}.{key}"] = tensor.detach()
        for key in (*norm._parameters, *norm._buffers):  # not those of an activation inside
            state.pop(f"{fold.norm}.{key}", None)
    return state


def without_norms(network: nn.Module, folds: Iterable[Fold]) -> nn.Module:
    """A copy of ``network`` that takes the folded state dict: no BatchNorm of ``folds``, and a bias (of zeros) in each
    layer before one. What a BatchNorm has inside, such as timm's activations, stays.
    """
    other = copy.deepcopy(network)
    for fold in folds:
        layer: Any = other.get_submodule(fold.layer)
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
        inside = OrderedDict(other.get_submodule(fold.norm).named_children())
        path, _, key = fold.norm.rpartition(".")
        setattr(other.get_submodule(path), key, nn.Sequential(inside))  # an empty one is the identity
    return other


def _operator(node: fx.Node) -> str:
    return str(getattr(node.target, "overloadpacket", ""))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen operator by name."""
    schema: Any = getattr(node.target, "_schema")  # noqa: B009 - torch types a target without it
    values = {part.name: part.default_value for part in schema.arguments}
    return values | dict(zip(values, node.args, strict=False)) | dict(node.kwargs)


def _layer(node: fx.Node, network: nn.Module, own: _Own) -> str:
    """The name of the layer that gives ``node``, if a BatchNorm that reads it can be folded into it."""
    if _operator(node) not in _LAYERS or len(node.users) != 1:
        return ""
    arguments = _arguments(node)
    name, _, key = own(arguments["weight"]).rpartition(".")
    layer: Any = network.get_submodule(name)
    if key != "weight" or not isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
        return ""
    # tokens and single pictures have their channels elsewhere than where BatchNorm looks for them
    channels_second = node.meta["val"].dim() == layer.weight.dim()
    bias = arguments["bias"]
    has_own_bias = layer.bias is None if bias is None else own(bias) == f"{name}.bias"
    return name if channels_second and has_own_bias else ""


def _norm(arguments: dict[str, Any], network: nn.Module, own: _Own) -> str:
    """The name of the BatchNorm that owns these arguments, if it uses what it remembers."""
    name = own(arguments["running_mean"]).rpartition(".")[0]
    norm = network.get_submodule(name)
    if arguments["training"] or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return ""
    keys = ["running_mean", "running_var", *(["weight", "bias"] if norm.affine else [])]
    mine = all(own(arguments[key]) == f"{name}.{key}" for key in keys)
    return name if mine and norm.eps == arguments["eps"] else ""


def _stays(module: nn.Module, name: str, gone: set[str]) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and name not in gone
