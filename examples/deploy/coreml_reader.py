"""What coremltools and torch make of a Core ML package, without cbpq."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coremltools
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Palettized:
    """A weight as coremltools decodes it, its palettes (1 or channels, entries), and the width of its indices."""

    weight: NDArray[np.float32]
    palettes: NDArray[np.float32]
    bits: int


def read(package: Path) -> Any:
    """The function of the package's program."""
    model = coremltools.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    load = coremltools.converters.mil.frontend.milproto.load.load
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
    return program.functions["main"]


def palettized(function: Any) -> dict[str, Palettized]:
    """The palettized weights, by their names."""
    return {
        operation.outputs[0].name: Palettized(
            operation.materialized_val_inference(),
            operation.lut.val.reshape(-1, operation.lut.shape[-2]),
            operation.indices.dtype.get_bitwidth(),
        )
        for operation in function.find_ops(op_type="constexpr_lut_to_dense")
    }


def padded(x: Tensor, pad: Any, value: float = 0.0) -> Tensor:
    """MIL gives before and after for each axis, the first axis first; torch wants the last first."""
    pairs = np.asarray(pad).reshape(-1, 2)[::-1]
    return functional.pad(x, [int(side) for pair in pairs for side in pair], value=value)


def pool(kind: str, x: Tensor, given: dict[str, Any]) -> Tensor:
    """A pooling operator by torch."""
    assert given["pad_type"] == "custom"
    pad = given["pad"].reshape(-1, 2)
    assert (pad[:, 0] == pad[:, 1]).all()
    window = (given["kernel_sizes"].tolist(), given["strides"].tolist(), pad[:, 0].tolist())
    ceil = bool(given["ceil_mode"])
    if kind == "max_pool":
        return functional.max_pool2d(x, *window, ceil_mode=ceil)
    inside = not given["exclude_padding_from_average"]
    return functional.avg_pool2d(x, *window, ceil_mode=ceil, count_include_pad=inside)


def sliced(x: Tensor, given: dict[str, Any]) -> Tensor:
    """Every so many-th element of each axis, from ``begin`` to ``end`` or, where masked, from and to its ends."""
    steps, axes = given["stride"].tolist(), range(x.dim())
    assert "squeeze_mask" not in given or not given["squeeze_mask"].any()

    def ends(name: str) -> list[int | None]:
        masked = given[f"{name}_mask"] if f"{name}_mask" in given else np.zeros(x.dim(), bool)
        return [None if masked[axis] else int(given[name][axis]) for axis in axes]

    return x[tuple(map(slice, ends("begin"), ends("end"), steps))]


def computed(kind: str, given: dict[str, Any]) -> Tensor:
    """What an operator gives for its inputs, by torch."""
    x = given.get("x")
    assert isinstance(x, Tensor)
    if kind == "conv":
        assert given["pad_type"] in ("custom", "valid")
        x = padded(x, given["pad"]) if given["pad_type"] == "custom" else x
        stride, dilation = given["strides"].tolist(), given["dilations"].tolist()
        return functional.conv2d(x, given["weight"], given.get("bias"), stride, 0, dilation, int(given["groups"]))
    if kind == "linear":
        return functional.linear(x, given["weight"], given.get("bias"))
    if kind == "batch_norm":
        statistics = (given["mean"], given["variance"], given["gamma"], given["beta"])
        return functional.batch_norm(x, *statistics, eps=float(given["epsilon"]))
    if kind == "relu":
        return x.relu()
    if kind == "add":
        return torch.add(x, given["y"])
    if kind in ("max_pool", "avg_pool"):
        return pool(kind, x, given)
    if kind == "pad":
        assert given["mode"] == "constant"
        return padded(x, given["pad"], float(given["constant_val"]))
    if kind == "slice_by_index":
        return sliced(x, given)
    if kind == "reduce_mean":
        return x.mean(given["axes"].tolist(), keepdim=bool(given["keep_dims"]))
    if kind == "reshape":
        return x.reshape(given["shape"].tolist())
    raise NotImplementedError(kind)


def value(constant: Any) -> Any:
    """A constant as torch takes it."""
    floats = isinstance(constant, np.ndarray) and constant.dtype == np.float32 and constant.ndim
    return torch.from_numpy(np.array(constant)) if floats else constant


def logits(function: Any, images: Tensor) -> Tensor:
    """For each of (B, C, H, W), by torch's operators in the order of the program."""
    with torch.no_grad():
        return torch.cat([run(function, image[None]) for image in images])


def run(function: Any, picture: Tensor) -> Tensor:
    """Logits (1, classes) of one picture (1, C, H, W)."""
    known: dict[str, Any] = dict.fromkeys(function.inputs, picture)
    for operation in function.operations:
        name = operation.outputs[0].name
        if operation.op_type == "const":
            known[name] = value(operation.outputs[0].val)
        elif operation.op_type == "constexpr_lut_to_dense":
            known[name] = value(operation.materialized_val_inference())
        else:
            given = {key: known[part.name] for key, part in operation.inputs.items() if part is not None}
            known[name] = computed(operation.op_type, given)
    (output,) = function.outputs
    assert (list(function.inputs), output.name) == (["input"], "logits")
    result: Tensor = known[output.name]
    return result
