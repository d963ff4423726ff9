"""Export to torchao's safetensors layout: int8 codes with scales, as torchao's own functions load them.

    with safetensors.safe_open("resnet18.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        state, rest = unflatten_tensor_state_dict(tensors, file.metadata())
    network.load_state_dict({**state, **rest}, assign=True)

with ``unflatten_tensor_state_dict`` of ``torchao.prototype.safetensors.safetensors_support``. Each constrained weight
is an ``IntxUnpackedToInt8Tensor``, whose type is the narrowest of torchao's integers that holds the levels: a byte for
each code, a scale (the file's, divided by the denominator) for the layer or for each output channel, zero points of 0.
Code × scale is bit for bit the constrained weight.

Such a tensor works as the weight of a linear layer or of a convolution over two axes. Weights that the network uses in
another way, as in ``nn.MultiheadAttention``, and levels beyond 8 bits stay float32. Tensors whose name has no dot are
in ``rest``, because torchao splits the names of the others there.
"""

import copy
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cbpq import container
from cbpq.atomic import atomic_write
from cbpq.errors import CbpqError, brief, require_extra
from cbpq.exports import Exported
from cbpq.exports.checks import Runs, compare_logits
from cbpq.exports.state_dict import check_equal
from cbpq.exports.translation import all_names, check_weights, exporting, quiet
from cbpq.fileformat import CbpqFile, ConstrainedTensor
from cbpq.inputs import InputSpec
from cbpq.models import logits

_LAYOUT = "torchao.prototype.safetensors.safetensors_support"
_RUNS = (functional.linear, torch.conv2d)  # what torchao's tensor can be the weight of
_NOTE = (
    "a byte for each constrained weight, on disk and in memory; not faster: torchao decodes these weights to float32 "
    "whenever they are used, which costs most for single pictures"
)
_HOW_TO_LOAD = f"load it with unflatten_tensor_state_dict of {_LAYOUT} and load_state_dict(…, assign=True)"


def export_torchao(model: nn.Module, file: CbpqFile, spec: InputSpec, out: Path, *, check: bool = True) -> Exported:
    """Write the weights of ``model`` to ``out`` in torchao's layout, as this module's text describes.

    With ``check``, torchao loads the file before it appears: every tensor has to come back bit for bit, and the network
    with them computes the same logits.

    Args:
        model: the network with the weights of ``file``; it is left as it is.
        file: gives the codes and scales.
        spec: the size of the input, and what the check's random pictures look like.
        out: the file to write.
        check: whether to have torchao load it.

    Raises:
        MissingPartError: torchao is not installed.
        CbpqError: ``model`` does not hold the weights of ``file``, its forward pass fails, torchao can compute with
            none of its constrained weights, or what torchao loads is not the network. Nothing was written.
    """
    layout, torchao = require_extra(_LAYOUT, "torchao"), require_extra("torchao", "torchao")
    network = copy.deepcopy(model).cpu().eval()
    check_weights(network, file)
    integers = _integers(network, file, spec)
    if not integers:
        raise CbpqError("torchao can compute with none of the constrained weights; export as state-dict instead")
    others = {name: tensor for name, tensor in network.state_dict().items() if name not in integers}
    data = _flattened(layout, {name: _quantized(tensor) for name, tensor in integers.items()}, others)
    facts: dict[str, Any] = {
        "integer_weights": dict(sorted(Counter(f"int{_bits(tensor)}" for tensor in integers.values()).items())),
        "float_weights": sorted(file.constrained.keys() - integers.keys()),
        "torchao": str(torchao.__version__),
    }
    if check:
        facts |= _checked(layout, data, network, spec, f"torchao {torchao.__version__}")
    atomic_write(out, data)
    return Exported("torchao", out, len(data), file.float32_bytes, facts, (_NOTE, _HOW_TO_LOAD))


def _integers(network: nn.Module, file: CbpqFile, spec: InputSpec) -> dict[str, ConstrainedTensor]:
    """The constrained weights, under all their names, that torchao can hold and compute with."""
    uses = _Uses(network)
    with exporting(f"follow the code of {type(network).__name__}"), uses:
        network(torch.zeros(1, spec.channels, spec.height, spec.width))
    runs = uses.right - uses.wrong
    return {
        alias: tensor
        for name, aliases in all_names(network).items()
        for alias in aliases
        if (tensor := file.constrained.get(name)) is not None
        and runs.issuperset(aliases)
        and "." in alias
        and _bits(tensor) <= 8
    }


class _Uses(TorchFunctionMode):
    """Notes which parameters a forward pass uses as torchao's tensors can be used, and which in any other way."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._names: dict[int, list[str]] = {}
        for name, parameter in network.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        self.right, self.wrong = set[str](), set[str]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # reading an attribute such as weight.dtype is no use of the weight, but weight.T is
        if getattr(func, "__name__", "") != "__get__" or isinstance(result, Tensor):
            for place, value in enumerate((*args, *(kwargs or {}).values())):
                right = func in _RUNS and place == 1 and not kwargs  # torchao reads them by position
                (self.right if right else self.wrong).update(self._names.get(id(value), ()))
        return result


def _bits(tensor: ConstrainedTensor) -> int:
    """Bits of the narrowest signed integer that holds every level."""
    return 1 + max((level if level >= 0 else ~level).bit_length() for level in (tensor.levels[0], tensor.levels[-1]))


def _quantized(tensor: ConstrainedTensor) -> Tensor:
    """A constrained weight as torchao's tensor."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    codes = torch.from_numpy(tensor.codes.astype(np.int8))
    scale = torch.from_numpy(np.array(tensor.scale / np.float32(tensor.denominator)))
    scale = scale.reshape(-1, *[1] * (codes.dim() - 1))
    quantized: Tensor = IntxUnpackedToInt8Tensor(
        qdata=codes,
        scale=scale,
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{_bits(tensor)}"),
        block_size=[size // blocks for size, blocks in zip(codes.shape, scale.shape, strict=True)],
        dtype=torch.float32,
        activation_quantization=None,
    )
    return quantized


def _flattened(layout: ModuleType, integers: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bytes:
    """The file: torchao's tensors and metadata, and what has no dot in its name."""
    named = {name: tensor for name, tensor in others.items() if "." in name}
    tensors, metadata = layout.flatten_tensor_state_dict(dict(sorted({**integers, **named}.items())))
    tensors |= {name: tensor for name, tensor in others.items() if name not in named}
    # separate copies, because layers may share a tensor
    plain = safetensors.torch.save({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()})
    return _with_metadata(plain, {"format": "pt", **metadata})


def _with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with its metadata in order: safetensors itself writes them in another one each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(data[8:end])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[end:]


def _checked(layout: ModuleType, data: bytes, network: nn.Module, spec: InputSpec, reader: str) -> dict[str, Any]:
    """What torchao makes of the file: every tensor of ``network`` to the bit, and its logits."""
    try:
        with quiet():
            metadata, *_ = container.read_header(io.BytesIO(data))
            state, rest = layout.unflatten_tensor_state_dict(safetensors.torch.load(data), metadata)
    except Exception as error:  # torchao and safetensors raise what they like
        raise CbpqError(f"{reader} does not load its own layout: {brief(error)}; export as state-dict") from error
    found: dict[str, Any] = {**state, **rest}
    decoded = {name: value.dequantize() if type(value) is not Tensor else value for name, value in found.items()}
    check_equal({name: tensor.numpy() for name, tensor in network.state_dict().items()}, decoded)

    def load() -> Runs:
        other = copy.deepcopy(network)
        other.load_state_dict(found, assign=True)
        return lambda images: logits(other(images))

    return compare_logits(reader, load, network, spec)
