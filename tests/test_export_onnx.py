"""Export to ONNX, run by onnxruntime: the same predictions, and weights that are integers."""

import copy
import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnxscript import ir
from torch import Tensor, nn

from cbpq.errors import CbpqError, MissingPartError, UsageError
from cbpq.exports import export, onnx_checks, onnx_graph
from cbpq.exports import onnx as onnx_export
from cbpq.exports.onnx import export_onnx
from cbpq.fileformat import CbpqFile, ConstrainedTensor, write
from cbpq.inputs import InputSpec
from cbpq.models import SourceInfo, load_model

pytestmark = pytest.mark.medium  # translates networks

CONSTRAINTS = {
    "binary": ((-1, 1), 1),
    "ternary": ((-1, 0, 1), 1),
    "one-bit-shift": ((-2, -1, 0, 1, 2), 2),
    "two-bit-shift": ((-4, -2, -1, 0, 1, 2, 4), 4),
}
WIDTHS = {"INT2": 2, "INT4": 4, "INT8": 8}
SMALL = InputSpec(3, 12, 12)


def level_tensor(
    weight: Tensor, levels: tuple[int, ...], denominator: int, per_channel: bool, name: str = "x"
) -> ConstrainedTensor:
    """The nearest codes to ``weight`` on a scale of its mean magnitude, so that a network's signal keeps its size."""
    values = weight.detach().numpy()
    axes = tuple(range(1, values.ndim)) if per_channel else None
    scale: NDArray[np.float32] = np.asarray(np.abs(values).mean(axis=axes) + 1e-3, dtype=np.float32)
    ratio = values / (scale.reshape(-1, *[1] * (values.ndim - 1)) if per_channel else scale) * denominator
    table = np.array(levels, dtype=np.float32)
    codes = table[np.searchsorted((table[1:] + table[:-1]) / 2, ratio)].astype(np.int32)
    return ConstrainedTensor(codes, scale, levels, denominator, name)


def constrained(
    model: nn.Module, constraint: str = "two-bit-shift", scales: str = "both", keep: Callable[[str], bool] | None = None
) -> CbpqFile:
    """Constrain every matrix and kernel of ``model`` in place; ``scales``: layer, channel or both in turn."""
    levels, denominator = CONSTRAINTS[constraint]
    tensors: dict[str, ConstrainedTensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and (keep is None or keep(name)):
            per_channel = scales == "channel" or (scales == "both" and len(tensors) % 2 == 0)
            tensors[name] = level_tensor(parameter, levels, denominator, per_channel, constraint)
            parameter.data.copy_(torch.from_numpy(tensors[name].weight()))
    others = {name: value.numpy().copy() for name, value in model.state_dict().items() if name not in tensors}
    return CbpqFile(tensors, others, {}, {}, {})


class Mixed(nn.Module):
    """Convolutions of every kind, a linear layer on tokens, attention, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(8, 9, 3, padding=2, dilation=2, bias=False)
        self.norm = nn.BatchNorm2d(9)
        self.depthwise = nn.Conv2d(9, 9, (3, 1), padding=(1, 0), groups=9)
        self.grouped = nn.Conv2d(9, 6, 1, groups=3)
        self.tokens = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)
        self.norm.running_mean = torch.randn(9) * 0.1
        self.norm.running_var = torch.rand(9) + 0.5

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.dilated(self.stem(images).relu())).relu()
        features = self.grouped(features + self.depthwise(features))
        tokens = self.tokens(features.flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        scores: Tensor = self.head(tokens.mean(dim=1))
        return scores


def mixed(seed: int = 0) -> Mixed:
    torch.manual_seed(seed)
    return Mixed().eval()


def pictures(spec: InputSpec, count: int) -> Tensor:
    return torch.randn(count, spec.channels, spec.height, spec.width, generator=torch.Generator().manual_seed(9))


def session(data: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(path: Path, images: Tensor, weights: list[str]) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """The logits that onnxruntime computes from the file as it is, and what its DequantizeLinear nodes give."""
    logits = session(path.read_bytes()).run(["logits"], {"input": images.numpy()})[0]
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in weights)
    for value in model.graph.output:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    values = session(model.SerializeToString()).run(weights, {"input": images.numpy()})
    return logits, dict(zip(weights, values, strict=True))


def check(path: Path, model: nn.Module, file: CbpqFile, spec: InputSpec, kinds: dict[str, str]) -> None:
    """Same logits, dequantized weights equal to the bit, initializers of the expected integer type and values."""
    images = pictures(spec, 5)
    logits, weights = run(path, images, list(kinds))
    with torch.no_grad():
        expected = model(images).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert (logits.argmax(axis=1) == expected.argmax(axis=1)).all()
    initializers = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    for name, kind in kinds.items():
        tensor = file.constrained[name]
        assert weights[name].dtype == np.float32
        assert weights[name].shape == tensor.codes.shape
        assert weights[name].tobytes() == tensor.weight().tobytes(), name
        assert name not in initializers
        stored = initializers[f"{name}.codes"]
        assert stored.data_type == onnx.TensorProto.DataType.Value(kind)
        assert list(stored.dims) == list(tensor.codes.shape)
        assert np.array_equal(onnx.numpy_helper.to_array(stored).astype(np.int32), tensor.codes)
        if tensor.codes.size < 10_000:
            assert stored.raw_data == scalar_pack(tensor.codes.ravel().tolist(), WIDTHS[kind])


def scalar_pack(codes: list[int], bits: int) -> bytes:
    """ONNX's packing, from its text: the first element in the least significant bits, the last byte filled with 0."""
    per_byte = 8 // bits
    packed = bytearray()
    for start in range(0, len(codes), per_byte):
        group = codes[start : start + per_byte]
        packed.append(sum((code % 2**bits) << (position * bits) for position, code in enumerate(group)))
    return bytes(packed)


@pytest.mark.parametrize("opset", [21, 25])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_every_constraint_is_stored_as_integers_and_computes_the_same(
    tmp_path: Path, constraint: str, opset: int
) -> None:
    model = mixed()
    file = constrained(model, constraint, "layer" if opset == 21 and constraint == "ternary" else "both")
    assert "attention.in_proj_weight" in file.constrained
    out = tmp_path / "x.onnx"
    result = export_onnx(model, file, SMALL, out, opset=opset)

    kind = "INT2" if opset == 25 and constraint in ("binary", "ternary") else "INT4"
    check(out, model, file, SMALL, dict.fromkeys(file.constrained, kind))
    written = onnx.load(out)
    onnx.checker.check_model(written, full_check=True)
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", opset)]
    assert written.ir_version == {21: 10, 25: 13}[opset]
    assert result.path == out
    assert result.size == out.stat().st_size
    assert result.float32_size == sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert result.facts["opset"] == opset
    assert result.facts["ir_version"] == written.ir_version
    assert result.facts["integer_weights"] == {kind: len(file.constrained)}
    assert result.facts["unused_weights"] == []
    assert 0 <= result.facts["max_difference"] <= 1e-4 * result.facts["max_logit"]
    assert result.facts["top1_agreement"] == 1.0
    assert "not faster" in result.notes[0]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], InputSpec, int]] = {
    "timm test_vit": (lambda: timm.create_model("test_vit", num_classes=9, img_size=32), InputSpec(3, 32, 32), 25),
    "timm test_resnet": (lambda: timm.create_model("test_resnet", num_classes=9), InputSpec(3, 64, 64), 21),
    "torchvision squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(num_classes=9), InputSpec(3, 48, 64), 21),
    "torchvision vision transformer": (
        lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=9),
        InputSpec(3, 16, 16),
        21,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_libraries(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    build, spec, opset = NETWORKS[name]
    model = build().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:  # torchvision's transformer starts with a classifier of zeros
            nn.init.normal_(parameter, std=0.1)
    file = constrained(model, "ternary", keep=lambda weight: weight.endswith("weight"))
    export_onnx(model, file, spec, tmp_path / "x.onnx", opset=opset)
    check(tmp_path / "x.onnx", model, file, spec, dict.fromkeys(file.constrained, "INT2" if opset == 25 else "INT4"))


class Linears(nn.Module):
    """Linear layers by name: quick to export."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(12, 12))

    def forward(self, images: Tensor) -> Any:
        values = images.flatten(1)
        for name, layer in self.named_children():
            if not name.startswith("aux"):
                values = layer(values).relu()
        return values - 0.1


TINY = InputSpec(3, 2, 2)


def linears(*names: str, seed: int = 0) -> Linears:
    torch.manual_seed(seed)
    return Linears(*names).eval()


def test_levels_decide_the_width_of_each_weight(tmp_path: Path) -> None:
    model = linears("a", "b", "c", "d")
    file = constrained(model)
    levels = {"a": (-2, 1), "b": (-2, 2), "c": (-8, 0, 7), "d": (-128, 127)}
    for name, row in levels.items():
        parameter = model.get_parameter(f"{name}.weight")
        # a denominator that is no power of two: the division in the scale has to be the file's own
        tensor = file.constrained[f"{name}.weight"] = level_tensor(parameter, row, 3, per_channel=True)
        parameter.data.copy_(torch.from_numpy(tensor.weight()))
    kinds = {"a.weight": "INT2", "b.weight": "INT4", "c.weight": "INT4", "d.weight": "INT8"}
    result = export_onnx(model, file, TINY, tmp_path / "x.onnx", opset=25)
    assert result.facts["integer_weights"] == {"INT2": 1, "INT4": 2, "INT8": 1}
    check(tmp_path / "x.onnx", model, file, TINY, kinds)


@pytest.mark.parametrize("levels", [(-129, 0), (0, 128), (-512, 512)])
def test_levels_beyond_eight_bits_are_refused_by_name(tmp_path: Path, levels: tuple[int, ...]) -> None:
    model = linears("a")
    file = constrained(model)
    file.constrained["a.weight"] = level_tensor(model.get_parameter("a.weight"), levels, 1, per_channel=False)
    with pytest.raises(CbpqError, match=rf"a\.weight has codes from {levels[0]} to {levels[1]}, which 8 bits cannot"):
        export_onnx(model, file, TINY, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset, message", [(20, "opset 20 has no 4-bit"), (-1, "no 4-bit"), (26, "26 is not supp")])
def test_an_opset_without_the_types_is_refused(tmp_path: Path, opset: int, message: str) -> None:
    model = linears("a")
    file = constrained(model)
    with pytest.raises(UsageError, match=message):
        export_onnx(model, file, TINY, tmp_path / "x.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset, version", [(22, 10), (23, 11), (24, 12)])
def test_the_opsets_between(tmp_path: Path, opset: int, version: int) -> None:
    model = linears("a")
    file = constrained(model, "binary")
    result = export_onnx(model, file, TINY, tmp_path / "x.onnx", opset=opset)
    assert result.facts["ir_version"] == onnx.load(tmp_path / "x.onnx").ir_version == version
    check(tmp_path / "x.onnx", model, file, TINY, {"a.weight": "INT4"})


def test_a_shared_weight_is_stored_once_whatever_its_name(tmp_path: Path) -> None:
    model = linears("a", "b", "c")
    model.get_submodule("c").weight = model.get_parameter("a.weight")
    file = constrained(model)
    assert file.others.keys() >= {"c.weight"}
    first = file.constrained["a.weight"]
    moved = CbpqFile(
        {"b.weight": file.constrained["b.weight"], "c.weight": first},
        {**{name: array for name, array in file.others.items() if name != "c.weight"}, "a.weight": first.weight()},
        {},
        {},
        {},
    )
    both = CbpqFile({**file.constrained, "c.weight": first}, {}, {}, {}, {})
    for content, kinds in ((file, ["a", "b"]), (moved, ["c", "b"]), (both, ["a", "b"])):
        export_onnx(model, content, TINY, tmp_path / "x.onnx")
        check(tmp_path / "x.onnx", model, content, TINY, {f"{name}.weight": "INT4" for name in kinds})
        assert sum(node.op_type == "DequantizeLinear" for node in onnx.load(tmp_path / "x.onnx").graph.node) == 2


def test_equal_weights_of_two_layers_are_no_trouble(tmp_path: Path) -> None:
    model = linears("a", "b", "c")
    model.get_submodule("b").load_state_dict(model.get_submodule("a").state_dict())
    file = constrained(model, scales="layer")
    assert np.array_equal(file.constrained["a.weight"].codes, file.constrained["b.weight"].codes)
    result = export_onnx(model, file, TINY, tmp_path / "x.onnx")
    assert result.facts["integer_weights"] == {"INT4": 3}
    assert not any(
        tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1
        for tensor in onnx.load(tmp_path / "x.onnx").graph.initializer
    )


def test_what_only_training_uses_is_left_out_and_said(tmp_path: Path) -> None:
    model = linears("a", "aux", "b")
    file = constrained(model)
    result = export_onnx(model, file, TINY, tmp_path / "x.onnx")
    assert result.facts["unused_weights"] == ["aux.weight"]
    assert result.facts["integer_weights"] == {"INT4": 2}
    assert "aux.weight" in result.notes[1]
    check(tmp_path / "x.onnx", model, file, TINY, {"a.weight": "INT4", "b.weight": "INT4"})


def test_a_network_with_several_outputs_gives_its_logits(tmp_path: Path) -> None:
    class Several(Linears):
        def forward(self, images: Tensor) -> Any:
            return super().forward(images), images

    torch.manual_seed(0)
    model = Several("a", "b").eval()
    file = constrained(model)
    export_onnx(model, file, TINY, tmp_path / "x.onnx")
    assert [value.name for value in onnx.load(tmp_path / "x.onnx").graph.output] == ["logits"]
    images = pictures(TINY, 4)
    logits, _ = run(tmp_path / "x.onnx", images, ["a.weight"])
    np.testing.assert_allclose(logits, model(images)[0].detach().numpy(), atol=1e-5)


def test_nothing_but_the_file_changes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = mixed().train()
    model.norm.eval()
    file = constrained(model)
    before = copy.deepcopy(model.state_dict())
    logging.disable(logging.DEBUG)
    fast_path, stream = torch.backends.mha.get_fastpath_enabled(), sys.stdout
    torch.manual_seed(5)
    state = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            export_onnx(model, file, SMALL, tmp_path / "x.onnx")
        assert logging.root.manager.disable == logging.DEBUG
    finally:
        logging.disable(logging.NOTSET)
    assert tuple(capfd.readouterr()) == ("", "")
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert sys.stdout is stream
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


def test_equal_content_gives_equal_bytes_that_tell_nothing_of_this_machine(tmp_path: Path) -> None:
    model = linears("a", "b", "c")
    file = constrained(model)
    turned = CbpqFile(dict(reversed(file.constrained.items())), dict(reversed(file.others.items())), {}, {}, {})
    export_onnx(model, file, TINY, tmp_path / "a.onnx")
    export_onnx(copy.deepcopy(model), turned, TINY, tmp_path / "b.onnx")
    data = (tmp_path / "a.onnx").read_bytes()
    assert data == (tmp_path / "b.onnx").read_bytes()
    for trace in (b".py", str(Path.cwd()).encode(), b"site-packages", b"network."):
        assert trace not in data
    written = onnx.load_from_string(data)
    assert InputSpec.from_dict(json.loads(written.metadata_props[0].value)) == TINY
    assert written.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert written.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_another_network_is_refused(tmp_path: Path) -> None:
    model = linears("a", "b")
    file = constrained(model)
    changed = copy.deepcopy(model)
    changed.get_parameter("b.weight").data[0, 0] += 1
    with pytest.raises(CbpqError, match=r"the network does not hold the file's b\.weight"):
        export_onnx(changed, file, TINY, tmp_path / "x.onnx")
    changed = copy.deepcopy(model)
    changed.get_parameter("a.bias").data[0] += 1
    with pytest.raises(CbpqError, match=r"a\.bias"):
        export_onnx(changed, file, TINY, tmp_path / "x.onnx")
    with pytest.raises(CbpqError, match=r"the file's a\."):
        export_onnx(copy.deepcopy(model).to(torch.bfloat16), file, TINY, tmp_path / "x.onnx")
    with pytest.raises(CbpqError, match=r"the file's b\."):
        export_onnx(linears("a"), constrained(linears("a", "b")), TINY, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


class Choosing(Linears):
    """Looks at its input's values, which no static graph can."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images if images.sum() > 0 else -images)


class PairsOnly(Linears):
    """Fixes its batch size."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images).reshape(2, 12)


@pytest.mark.parametrize("kind", [Choosing, PairsOnly])
def test_a_network_that_cannot_be_translated_is_one_line(
    tmp_path: Path, kind: type[Linears], capfd: pytest.CaptureFixture[str]
) -> None:
    model = kind("a").eval()
    file = constrained(model)
    with pytest.raises(CbpqError, match=f"cannot translate {kind.__name__} to ONNX: .") as caught:
        export_onnx(model, file, TINY, tmp_path / "x.onnx")
    assert "\n" not in str(caught.value)
    assert tuple(capfd.readouterr()) == ("", "")
    assert not list(tmp_path.iterdir())


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = linears("a")
    with torch.no_grad():
        model.get_parameter("a.bias").fill_(3e38)
    model.forward = lambda images: Linears.forward(model, images) * 10  # type: ignore[method-assign]  # overflows
    file = constrained(model)
    with pytest.raises(CbpqError, match="own logits for random pictures are not finite"):
        export_onnx(model, file, TINY, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Linears, CbpqFile, bytes]:
    """A network, its file and the bytes of its export."""
    model = linears("a", "b")
    file = constrained(model)
    out = tmp_path_factory.mktemp("finished") / "x.onnx"
    export_onnx(model, file, TINY, out)
    return model, file, out.read_bytes()


def named(model: Any, name: str) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def change(model: Any, name: str, function: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    tensor = named(model, name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(function(onnx.numpy_helper.to_array(tensor)), name))


def flip_a_code(model: Any) -> None:
    codes = named(model, "b.weight.codes")
    codes.raw_data = bytes([codes.raw_data[0] ^ 1, *codes.raw_data[1:]])


def next_larger_scale(model: Any) -> None:
    change(model, "b.weight.scale", lambda scale: np.nextafter(scale, np.float32(np.inf)))


def fold_to_float(model: Any) -> None:
    node = next(node for node in model.graph.node if node.name == "b.weight.dequantize")
    codes, scale = (onnx.numpy_helper.to_array(named(model, name)) for name in node.input)
    step = scale.reshape(-1, 1) if scale.ndim else scale
    model.graph.initializer.append(onnx.numpy_helper.from_array(codes.astype(np.float32) * step, "b.weight"))
    model.graph.node.remove(node)


def change_a_bias(model: Any) -> None:
    change(model, "b.bias", lambda bias: bias + np.float32(0.5))


def make_it_nan(model: Any) -> None:
    change(model, "b.bias", lambda bias: bias * np.float32(np.nan))


def write_a_newer_version(model: Any) -> None:
    model.ir_version = 99


@pytest.mark.parametrize("spoil", [flip_a_code, next_larger_scale, fold_to_float])
def test_a_weight_that_is_not_an_integer_to_the_bit_is_named(
    finished: tuple[Linears, CbpqFile, bytes], spoil: Callable[[Any], None]
) -> None:
    _, file, data = finished
    onnx_checks.check_integers(onnx, data, file.constrained)
    spoilt = onnx.load_from_string(data)
    spoil(spoilt)
    with pytest.raises(CbpqError, match=r"b\.weight did not become an integer"):
        onnx_checks.check_integers(onnx, spoilt.SerializeToString(), file.constrained)


@pytest.mark.parametrize(
    "spoil, message",
    [(change_a_bias, "other logits"), (make_it_nan, "other logits"), (write_a_newer_version, "rejects")],
)
def test_what_onnxruntime_does_not_compute_equally_is_refused(
    finished: tuple[Linears, CbpqFile, bytes], spoil: Callable[[Any], None], message: str
) -> None:
    model, _, data = finished
    facts = onnx_checks.check_logits(onnxruntime, data, model, TINY)
    assert 0 <= facts["max_difference"] <= 1e-5 * facts["max_logit"]
    assert facts["top1_agreement"] == 1.0
    spoilt = onnx.load_from_string(data)
    spoil(spoilt)
    with pytest.raises(CbpqError, match=message) as caught:
        onnx_checks.check_logits(onnxruntime, spoilt.SerializeToString(), model, TINY)
    assert "\n" not in str(caught.value)
    assert onnxruntime.__version__ in str(caught.value)


@pytest.mark.parametrize("spoil", [flip_a_code, change_a_bias])
def test_what_fails_a_check_is_not_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: tuple[Linears, CbpqFile, bytes],
    spoil: Callable[[Any], None],
) -> None:
    model, file, data = finished
    spoilt = onnx.load_from_string(data)
    spoil(spoilt)
    monkeypatch.setattr(onnx_export, "finish", lambda *_: spoilt.SerializeToString())
    (tmp_path / "x.onnx").write_bytes(b"old")
    with pytest.raises(CbpqError):
        export_onnx(model, file, TINY, tmp_path / "x.onnx")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_weight_that_the_translation_changed_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = linears("a", "b")
    file = constrained(model)
    translate = onnx_graph.translate

    def transposed(*arguments: Any) -> Any:
        translated = translate(*arguments)
        value = translated.program.model.graph.initializers["network.b.weight"]
        value.const_value = ir.tensor(value.const_value.numpy().T.copy(), name=value.name)
        return translated

    monkeypatch.setattr(onnx_export, "translate", transposed)
    with pytest.raises(CbpqError, match=r"does not hold b\.weight as it is, so it would stay float32"):
        export_onnx(model, file, TINY, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_a_network_beyond_one_file_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linears("a", "b")
    file = constrained(model)
    monkeypatch.setattr(onnx_graph, "MAX_BYTES", 2 * 144 // 2 + 2 * 12 * 4 - 1)
    monkeypatch.setattr(onnx_export, "translate", lambda *_: pytest.fail("too late"))
    with pytest.raises(CbpqError, match="the network takes 240; export as state-dict"):
        export_onnx(model, file, TINY, tmp_path / "x.onnx")


@pytest.mark.parametrize("module", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    model = linears("a")
    file = constrained(model)
    monkeypatch.setitem(sys.modules, module, None)  # what Python does for a module that cannot be imported
    message = rf'{module} is not installed; run: pip install "cbpq\[onnx\]"'
    with pytest.raises(MissingPartError, match=message):
        export_onnx(model, file, TINY, tmp_path / "x.onnx")
    with pytest.raises(MissingPartError, match=message):
        export(file, "onnx", tmp_path / "x.onnx", model=model, spec=TINY)
    assert not list(tmp_path.iterdir())


def test_the_dispatcher_passes_the_opset_on(tmp_path: Path) -> None:
    model = linears("a")
    file = constrained(model, "binary")
    result = export(file, "onnx", tmp_path / "x.onnx", model=model, spec=TINY, opset=25)
    assert result.to_dict()["integer_weights"] == {"INT2": 1}
    assert result.to_dict()["format"] == "onnx"
    with pytest.raises(UsageError, match=r"end in \.onnx, not 'x\.pth'"):
        export(file, "onnx", tmp_path / "x.pth", model=model, spec=TINY)


def test_the_network_is_rebuilt_from_the_file_alone(tmp_path: Path) -> None:
    loaded = load_model("timm:test_resnet", num_classes=4, random=True, input_overrides={"input_size": 32})
    content = constrained(loaded.model)
    write(tmp_path / "model.safetensors", replace(content, source=loaded.info.to_dict()))
    result = export(tmp_path / "model.safetensors", "onnx", tmp_path / "x.onnx")
    assert (result.facts["opset"], result.facts["ir_version"]) == (21, 10)  # the default
    check(
        tmp_path / "x.onnx", loaded.model, content, loaded.info.input_spec, dict.fromkeys(content.constrained, "INT4")
    )

    model = linears("a")  # a network of the user's own: the file states its input, the caller brings the network
    info = SourceInfo("callable", "mine:linears", {}, TINY, None)
    content = replace(constrained(model), source=info.to_dict())
    export(content, "onnx", tmp_path / "x.onnx", model=model, overwrite=True)
    check(tmp_path / "x.onnx", model, content, TINY, {"a.weight": "INT4"})
    with pytest.raises(UsageError, match="mine:linears"):
        export(content, "onnx", tmp_path / "y.onnx")


def test_without_the_check_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "check_logits", lambda *_: pytest.fail("it ran"))
    model = linears("a")
    file = constrained(model)
    result = export(file, "onnx", tmp_path / "x.onnx", model=model, spec=TINY, check=False)
    assert "max_difference" not in result.facts
    check(tmp_path / "x.onnx", model, file, TINY, {"a.weight": "INT4"})


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    model = linears("a")
    with pytest.raises(CbpqError, match="cannot write"):
        export_onnx(model, constrained(model), TINY, tmp_path / "missing" / "x.onnx")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_onnxruntime_dequantizes_any_codes_to_the_bits_of_the_weight(data: st.DataObject) -> None:
    """Odd numbers of codes, every width, one scale or many, any denominator: no network around it."""
    kind, bits = data.draw(st.sampled_from([("INT2", 2), ("INT4", 4), ("INT8", 8)]))
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    integers = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    size = int(np.prod(shape))
    codes = np.array(data.draw(st.lists(integers, min_size=size, max_size=size)), dtype=np.int32).reshape(shape)
    channels = data.draw(st.sampled_from([(), shape[:1]]))
    count = int(np.prod(channels))
    scales = data.draw(st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=count, max_size=count))
    scale = np.array(scales, dtype=np.float32).reshape(channels)
    tensor = ConstrainedTensor(codes, scale, (-128, 127), data.draw(st.integers(1, 100)), "x")

    graph = ir.Graph([], [], nodes=[], opset_imports={"": 25})
    node = onnx_graph.dequantize(onnx, ir, graph, "w", tensor, onnx_export._packed_codes(onnx, "w", tensor, kind, bits))
    graph.append(node)
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(node.outputs[0])
    graph.name = "graph"
    model = ir.to_proto(ir.Model(graph, ir_version=13))
    assert model.graph.initializer[0].raw_data == scalar_pack(codes.ravel().tolist(), bits)
    found = session(model.SerializeToString()).run(["w"], {})[0]
    assert found.shape == shape
    assert found.tobytes() == tensor.weight().tobytes()


def test_checks_compare_bits_and_not_values() -> None:
    zero, one = np.zeros(2, dtype=np.float32), np.ones(2, dtype=np.float32)
    assert onnx_checks.equal_bits(one, one.copy())
    assert onnx_checks.equal_bits(one * np.nan, one * np.nan)
    assert not onnx_checks.equal_bits(zero, -zero)
    assert not onnx_checks.equal_bits(one, one.astype(np.float64))
    assert not onnx_checks.equal_bits(one, one.reshape(1, 2))


def alexnet_with_batch_norm() -> nn.Module:
    """A BatchNorm behind each layer but the last, as the networks of the CBP paper have it."""
    model: nn.Module = torchvision.models.alexnet(num_classes=10)
    for name in ("features", "classifier"):
        layers = list(model.get_submodule(name).children())
        with_norms = list[nn.Module]()
        for layer in layers:
            with_norms.append(layer)
            if isinstance(layer, nn.Conv2d):
                with_norms.append(nn.BatchNorm2d(layer.out_channels))
            elif isinstance(layer, nn.Linear) and layer is not layers[-1]:
                with_norms.append(nn.BatchNorm1d(layer.out_features))
        setattr(model, name, nn.Sequential(*with_norms))
    return model


LARGE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{
        name: (lambda name=name: torchvision.models.get_model(name, num_classes=10), 64)  # type: ignore[misc]  # bound now
        for name in (
            "alexnet",
            "resnet18",
            "resnet50",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "mobilenet_v3_large",
            "efficientnet_b0",
            "convnext_tiny",
            "densenet121",
            "swin_t",
            "swin_v2_t",
            "squeezenet1_0",
            "regnet_y_400mf",
            "shufflenet_v2_x1_0",
        )
    },
    "alexnet with BatchNorm": (alexnet_with_batch_norm, 64),
    "googlenet": (lambda: torchvision.models.googlenet(num_classes=10, init_weights=True), 64),
    "inception_v3": (lambda: torchvision.models.inception_v3(num_classes=10, init_weights=True), 80),
    "vit_b_16": (lambda: torchvision.models.vit_b_16(num_classes=10, image_size=32), 32),
    "timm:vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64), 64),
    "timm:deit_tiny_distilled": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, img_size=64),
        64,
    ),
    "timm:swin_tiny": (lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=10), 224),
    "timm:efficientnet_b0": (lambda: timm.create_model("efficientnet_b0", num_classes=10), 64),
    "timm:convnext_atto": (lambda: timm.create_model("convnext_atto", num_classes=10), 64),
    "timm:mobilenetv3_small_100": (lambda: timm.create_model("mobilenetv3_small_100", num_classes=10), 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("opset", [21, 25])
@pytest.mark.parametrize("name", LARGE)
def test_known_networks(tmp_path: Path, name: str, opset: int) -> None:
    torch.manual_seed(0)
    build, side = LARGE[name]
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == 10:
            nn.init.normal_(module.weight, std=0.1)  # some start with a classifier of zeros
    weights = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    weights |= {name for name, _ in model.named_parameters() if name.endswith("in_proj_weight")}
    file = constrained(model, "ternary", keep=lambda parameter: parameter in weights)
    spec = InputSpec(3, side, side)
    result = export_onnx(model, file, spec, tmp_path / "x.onnx", opset=opset)
    used = [weight for weight in file.constrained if weight not in result.facts["unused_weights"]]
    assert all(weight.startswith(("aux1.", "aux2.", "AuxLogits.")) for weight in result.facts["unused_weights"])
    check(tmp_path / "x.onnx", model, file, spec, dict.fromkeys(used, "INT2" if opset == 25 else "INT4"))
