"""Export to qonnx: annotated integers that decode to the weight, and qonnx itself in an environment of its own."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from c_networks import CONSTRAINTS, SHAPES, TINY, Branches, constrained, lived, mobile, pictures, write_digits
from environments import environment, run_in
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_job import ROOT, command, one_line
from torch import Tensor, nn

from cbpq.cli.export import format_of
from cbpq.errors import CbpqError, MissingPartError, UsageError
from cbpq.exports import export, onnx_checks, onnx_graph
from cbpq.exports import qonnx as qonnx_export
from cbpq.exports.integer_layers import annotation, smallest
from cbpq.exports.qonnx import export_qonnx
from cbpq.fileformat import CbpqFile, ConstrainedTensor, read
from cbpq.inputs import InputSpec
from cbpq.model_file import load

pytestmark = pytest.mark.medium  # translates networks

KINDS = {
    "binary": ("BIPOLAR", 1),
    "ternary": ("TERNARY", 2),
    "one-bit-shift": ("INT3", 3),
    "two-bit-shift": ("INT4", 4),
    "levels:-1,-0.3,0.3,1": ("INT5", 5),
}


class Linears(nn.Module):
    """Linear layers on vectors and on tokens, with a bias and without, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(6, 8)
        self.bare = nn.Linear(8, 8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden = nn.Linear(8, 9, bias=False)
        self.head = nn.Linear(9, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bare(self.tokens(images.flatten(1, 2)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        scores: Tensor = self.head(self.hidden(x.mean(dim=1)).relu())
        return scores


def logits(path: Path, images: Tensor) -> NDArray[np.float32]:
    """What onnxruntime computes, one picture at a time."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"input": image[None].numpy()})[0] for image in images])


def check(path: Path, model: nn.Module, file: CbpqFile, spec: InputSpec) -> None:
    """Same logits; layers take annotated codes directly, and what follows makes the very weight of them."""
    images = pictures(spec, 3)
    with torch.no_grad():
        expected = torch.cat([model(image[None]) for image in images]).numpy()
    np.testing.assert_allclose(logits(path, images), expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    graph = onnx.load(path).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kinds = {entry.tensor_name: entry.quant_parameter_tensor_names for entry in graph.quantization_annotation}
    following = {name: node for node in graph.node for name in node.input}
    layers = {node.input[1]: node for node in graph.node if node.op_type in ("Conv", "MatMul")}
    assert sorted(kinds) == sorted(f"{name}.codes" for name in file.constrained)
    for name, tensor in file.constrained.items():
        [pair] = kinds[f"{name}.codes"]
        assert (pair.key, pair.value) == ("finn_datatype", KINDS[tensor.constraint][0])
        layer = layers[f"{name}.codes"]
        multiplication = following[layer.output[0]]
        codes, scale = stored[f"{name}.codes"], stored[multiplication.input[1]]
        assert multiplication.op_type == "Mul"
        assert list(layer.input)[2:] == []
        assert codes.dtype == scale.dtype == np.float32
        if layer.op_type == "MatMul":
            codes = codes.T
            assert scale.ndim <= 1
        elif scale.ndim:
            assert scale.shape == (1, len(codes), *[1] * (codes.ndim - 2))
        assert np.array_equal(codes, tensor.codes)
        product = codes * scale.reshape(-1, *[1] * (codes.ndim - 1)) if scale.ndim else codes * scale
        assert product.tobytes() == tensor.weight().tobytes(), name
        assert name not in stored


@pytest.mark.parametrize("shape", ["3x3", "flat kernel", "depthwise, multiplied", "grouped, dilated"])
def test_convolutions_of_every_kind_constraint_and_scale(tmp_path: Path, shape: str) -> None:
    torch.manual_seed(0)
    model = Branches(**SHAPES[shape]).eval()
    channels = SHAPES[shape]["in_channels"]
    spec = InputSpec(channels, 5, 6, (0.5,) * channels, (0.5,) * channels)
    file = constrained(model, *CONSTRAINTS, keep=[f"branches.{len(model.branches) - 1}.weight"])
    result = export_qonnx(model, file, spec, tmp_path / "x.onnx")
    check(tmp_path / "x.onnx", model, file, spec)
    assert result.facts["integer_weights"] == dict.fromkeys(sorted(kind for kind, _ in KINDS.values()), 2)
    size = file.constrained["branches.0.weight"].codes.size
    assert result.facts["constrained_weights"] == 10 * size
    assert result.facts["weight_bits"] == 2 * (1 + 2 + 3 + 4 + 5) * size
    assert result.facts["max_difference"] <= 1e-5 * result.facts["max_logit"]
    assert result.facts["top1_agreement"] == 1.0
    written = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", 18)]
    assert (result.facts["opset"], result.facts["ir_version"], written.ir_version) == (18, 8, 8)
    assert result.size == (tmp_path / "x.onnx").stat().st_size
    shapes = {value.name: value.type.tensor_type.shape for value in [*written.graph.value_info, *written.graph.output]}
    for node in written.graph.node:
        assert all(dimension.dim_value > 0 for name in node.output for dimension in shapes[name].dim)


def test_linear_layers_and_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Linears().eval()
    nn.init.normal_(model.attention.in_proj_bias)
    file = constrained(model, *CONSTRAINTS)
    assert "attention.in_proj_weight" in file.constrained
    result = export_qonnx(model, file, TINY, tmp_path / "x.onnx")
    check(tmp_path / "x.onnx", model, file, TINY)
    assert "activations are still float" in result.notes[1]
    assert "no smaller" in result.notes[0]


def test_batchnorm_and_residuals(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lived(mobile())
    file = constrained(model, keep=("0.weight", "9.weight"))
    spec = InputSpec(3, 24, 32)
    export_qonnx(model, file, spec, tmp_path / "x.onnx")
    check(tmp_path / "x.onnx", model, file, spec)


@pytest.mark.parametrize(
    "levels, expected",
    [
        ((-1, 1), ("BIPOLAR", 1)),
        ((-1, 0, 1), ("TERNARY", 2)),
        ((0, 1), ("TERNARY", 2)),
        ((-2, 1), ("INT2", 2)),
        ((-2, -1, 0, 1, 2), ("INT3", 3)),
        ((-4, 3), ("INT3", 3)),
        ((-4, -2, -1, 0, 1, 2, 4), ("INT4", 4)),
        ((-8, -1), ("INT4", 4)),
        ((-128, 127), ("INT8", 8)),
        ((-(2**24), 2**24), ("INT26", 26)),
    ],
)
def test_levels_decide_the_annotation(levels: tuple[int, ...], expected: tuple[str, int]) -> None:
    assert annotation(levels) == expected


@given(st.lists(st.integers(-(2**24), 2**24), min_size=2, max_size=9, unique=True))
def test_no_narrower_integer_has_all_levels(levels: list[int]) -> None:
    kind, bits = annotation(tuple(levels))
    values = np.array(levels, np.float32)
    assert onnx_checks._allows(kind, values)
    if bits > 2:
        assert kind == f"INT{bits}"
        assert not onnx_checks._allows(f"INT{bits - 1}", values)


def tensor_of(levels: tuple[int, ...], denominator: int, scale: float) -> ConstrainedTensor:
    return ConstrainedTensor(np.array([levels], np.int32), np.array([scale], np.float32), levels, denominator, "x")


def test_codes_without_a_common_divisor_take_fewer_bits() -> None:
    halves = smallest(tensor_of((-2, 0, 2), 4, 0.3))
    assert (halves.levels, halves.codes.tolist()) == ((-1, 0, 1), [[-1, 0, 1]])
    assert smallest(tensor_of((-7, 7), 10, 0.3)).levels == (-1, 1)
    assert smallest(tensor_of((-2, 3), 4, 0.3)).levels == (-2, 3)
    # 7 · 0.1 is rounded, and 3 times that again: the weight would be another
    assert smallest(tensor_of((-21, 7), 1, 0.1)).levels == (-21, 7)
    # the larger scale would not be finite
    assert smallest(tensor_of((0, 2**20), 1, 3e38)).levels == (0, 2**20)


@given(
    st.lists(st.integers(-1000, 1000), min_size=2, max_size=9, unique=True),
    st.integers(1, 60),
    st.integers(1, 1000),
    st.floats(0, 2.0**60, width=32),
)
def test_smaller_codes_are_the_same_weight(levels: list[int], factor: int, denominator: int, scale: float) -> None:
    tensor = tensor_of(tuple(sorted(level * factor for level in levels)), denominator, scale)
    found = smallest(tensor)
    assert found.weight().tobytes() == tensor.weight().tobytes()
    assert all(np.isin(found.codes, found.levels).tolist())
    assert annotation(found.levels)[1] <= annotation(tensor.levels)[1]


class Pair(nn.Module):
    """Two convolutions, and something between weight and convolution for those who override ``weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3)
        self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.aux = nn.Linear(4, 3)

    def weight(self) -> Tensor:
        return self.b.weight

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.conv2d(self.a(images).relu(), self.weight(), padding=1)
        return x.mean((2, 3))


class Standardised(Pair):
    def weight(self) -> Tensor:
        return self.b.weight - self.b.weight.mean((1, 2, 3), keepdim=True)


class Multiplied(Pair):
    def weight(self) -> Tensor:
        return self.b.weight * 2


class UsedTwice(Pair):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.b.weight.sum()


class Turned(Pair):
    """A linear weight that stands before what it multiplies."""

    def forward(self, images: Tensor) -> Tensor:
        return (self.aux.weight @ super().forward(images).T).T


class Untransposed(Pair):
    """A linear weight whose rows are inputs."""

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = super().forward(images)[:, :3] @ self.aux.weight
        return scores


class Shared(Pair):
    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.b(self.b(self.a(images)).relu())
        return x.mean((2, 3))


def pair(kind: type[Pair] = Pair) -> tuple[Pair, CbpqFile]:
    torch.manual_seed(0)
    model = kind().eval()
    return model, constrained(model)


@pytest.mark.parametrize(
    "kind, name", [(Standardised, "b"), (Multiplied, "b"), (UsedTwice, "b"), (Turned, "aux"), (Untransposed, "aux")]
)
def test_a_weight_that_cannot_stay_integer_is_refused_by_name(tmp_path: Path, kind: type[Pair], name: str) -> None:
    model, file = pair(kind)
    (tmp_path / "x.onnx").write_bytes(b"old")
    with pytest.raises(CbpqError, match=rf"^{name}\.weight cannot stay integer in qonnx, because \w+ uses it"):
        export_qonnx(model, file, TINY, tmp_path / "x.onnx")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_layer_that_is_used_twice(tmp_path: Path) -> None:
    model, file = pair(Shared)
    result = export_qonnx(model, file, TINY, tmp_path / "x.onnx")
    graph = onnx.load(tmp_path / "x.onnx").graph
    assert [node.input[1] for node in graph.node if node.op_type == "Conv"] == [
        "a.weight.codes",
        "b.weight.codes",
        "b.weight.codes",
    ]
    assert result.facts["integer_weights"] == {"INT4": 2}
    assert result.facts["unused_weights"] == ["aux.weight"]
    assert "aux.weight" in result.notes[2]


def test_a_scale_of_one_is_multiplied_with_too(tmp_path: Path) -> None:
    model, file = pair()
    for name, tensor in file.constrained.items():
        one = replace(tensor, scale=np.ones_like(tensor.scale), denominator=1)
        file.constrained[name] = one
        model.get_parameter(name).data.copy_(torch.from_numpy(one.weight()))
    del file.constrained["aux.weight"]
    export_qonnx(model, file, TINY, tmp_path / "x.onnx")
    check(tmp_path / "x.onnx", model, file, TINY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, CbpqFile, bytes]:
    """A network, its file and the bytes of its export."""
    model, file = pair()
    del file.constrained["aux.weight"]
    out = tmp_path_factory.mktemp("finished") / "x.onnx"
    export_qonnx(model, file, TINY, out)
    return model, file, out.read_bytes()


def test_equal_content_gives_equal_bytes_that_tell_nothing_of_this_machine(
    tmp_path: Path, finished: tuple[Pair, CbpqFile, bytes]
) -> None:
    model, file, data = finished
    turned = CbpqFile(dict(reversed(file.constrained.items())), dict(reversed(file.others.items())), {}, {}, {})
    export_qonnx(model, turned, TINY, tmp_path / "x.onnx", check=False)
    assert (tmp_path / "x.onnx").read_bytes() == data
    for trace in (b".py", str(Path.cwd()).encode(), b"site-packages", b"network."):
        assert trace not in data


def named(model: Any, name: str) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def change(model: Any, name: str, function: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    tensor = named(model, name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(function(onnx.numpy_helper.to_array(tensor)), name))


def half_a_code(model: Any) -> None:
    change(model, "b.weight.codes", lambda codes: codes + np.float32(0.5))


def annotate_too_narrow(model: Any) -> None:
    for entry in model.graph.quantization_annotation:
        entry.quant_parameter_tensor_names[0].value = "INT3"


def swap_codes(model: Any) -> None:
    change(model, "b.weight.codes", lambda codes: codes[::-1].copy())


def next_larger_scale(model: Any) -> None:
    change(model, "b.weight.scale", lambda scale: np.nextafter(scale, np.float32(np.inf)))


def drop_the_annotation(model: Any) -> None:
    del model.graph.quantization_annotation[:]


def fold_to_float(model: Any) -> None:
    codes, scale = (onnx.numpy_helper.to_array(named(model, f"b.weight.{part}")) for part in ("codes", "scale"))
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(codes * scale.reshape(-1, 1, 1, 1) if scale.ndim else codes * scale, "b.weight")
    )


def add_instead(model: Any) -> None:
    next(node for node in model.graph.node if node.op_type == "Mul").op_type = "Add"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (half_a_code, r"b\.weight\.codes is annotated as INT4 in the ONNX graph, but holds something else"),
        (annotate_too_narrow, r"weight\.codes is annotated as INT3"),
        (swap_codes, r"b\.weight did not become annotated integers"),
        (next_larger_scale, r"b\.weight did not become annotated integers"),
        (drop_the_annotation, r"\.weight did not become annotated integers"),
        (fold_to_float, r"b\.weight did not become annotated integers"),
        (add_instead, r"a\.weight did not become annotated integers"),
    ],
)
def test_what_is_not_as_annotated_is_not_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: tuple[Pair, CbpqFile, bytes],
    spoil: Callable[[Any], None],
    message: str,
) -> None:
    model, file, data = finished
    onnx_checks.check_annotations(onnx, data, file.constrained)
    spoilt = onnx.load_from_string(data)
    spoil(spoilt)
    monkeypatch.setattr(qonnx_export, "finish", lambda *_: spoilt.SerializeToString())
    (tmp_path / "x.onnx").write_bytes(b"old")
    with pytest.raises(CbpqError, match=message):
        export_qonnx(model, file, TINY, tmp_path / "x.onnx", check=False)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("kind, values, allowed", [
    ("BIPOLAR", [-1, 1], True), ("BIPOLAR", [-1, 0], False),
    ("TERNARY", [-1, 0, 1], True), ("TERNARY", [2], False),
    ("INT3", [-4, 3], True), ("INT3", [4], False), ("INT3", [-5], False), ("INT3", [0.5], False),
    ("INT3", [float("nan")], False),
])  # fmt: skip
def test_what_a_type_allows(kind: str, values: list[float], allowed: bool) -> None:
    assert onnx_checks._allows(kind, np.array(values, np.float32)) is allowed


@pytest.mark.parametrize("check", [True, False])
def test_what_onnxruntime_computes_otherwise_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: tuple[Pair, CbpqFile, bytes], check: bool
) -> None:
    model, file, data = finished
    spoilt = onnx.load_from_string(data)
    change(spoilt, "a.bias.reshaped", lambda bias: bias + 1)
    monkeypatch.setattr(qonnx_export, "finish", lambda *_: spoilt.SerializeToString())
    if check:
        with pytest.raises(CbpqError, match="computes other logits"):
            export_qonnx(model, file, TINY, tmp_path / "x.onnx")
        assert not list(tmp_path.iterdir())
    else:
        assert "max_difference" not in export_qonnx(model, file, TINY, tmp_path / "x.onnx", check=False).facts


def test_a_network_beyond_one_file_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = pair()
    monkeypatch.setattr(onnx_graph, "MAX_BYTES", 100)
    monkeypatch.setattr(qonnx_export, "translate", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(CbpqError, match="holds 100 bytes, the network takes"):
        export_qonnx(model, file, TINY, tmp_path / "x.onnx")


@pytest.mark.parametrize("module", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    model, file = pair()
    monkeypatch.setitem(sys.modules, module, None)  # what Python does for a module that cannot be imported
    message = rf'{module} is not installed; run: pip install "cbpq\[onnx\]"'
    with pytest.raises(MissingPartError, match=message):
        export(file, "qonnx", tmp_path / "x.onnx", model=model, spec=TINY)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path, "ternary")
    outcome = command("export", "model.safetensors", "--format", "qonnx", "-o", "x.onnx")
    assert outcome.code == 0, outcome.err
    for part in ("x.onnx: qonnx, ", "integer weights: TERNARY ", "max difference: ", "weight bits: "):
        assert part in outcome.out
    assert "activations are still float" in " ".join(outcome.err.split())
    old = Path("x.onnx").read_bytes()
    again = ("export", "model.safetensors", "--format", "qonnx")
    one_line(command(*again, "-o", "x.onnx"), 2, "x.onnx exists")
    one_line(command(*again, "-o", "x.qonnx"), 2, "files that end in .onnx")
    one_line(command(*again, "-o", "y.onnx", "--opset", 21), 2, "qonnx has no option 'opset'; it has check")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    one_line(command(*again, "-o", "x.onnx", "--overwrite"), 4, 'pip install "cbpq[onnx]"')
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "x.onnx"]
    assert Path("x.onnx").read_bytes() == old


def test_only_its_name_chooses_it() -> None:
    assert format_of(Path("x.onnx")) == "onnx"
    with pytest.raises(UsageError, match=r"qonnx \(\.onnx\)"):
        format_of(Path("x.qonnx"))


# qonnx itself


@pytest.fixture(scope="module")
def qonnx_python() -> Path:
    """The interpreter of an environment with qonnx, which cannot live beside onnx 1.23."""
    return environment("qonnx", "qonnx>=1,<2", "onnx<1.23")


def run_qonnx(python: Path, path: Path, images: Tensor, *flags: str) -> dict[str, Any]:
    """What qonnx makes of a file and of normalised pictures (N, C, H, W)."""
    np.save(path.with_suffix(".npy"), images.numpy())
    result = path.with_suffix(".json")
    script = Path(__file__).with_name("qonnx_reader.py")
    run_in(python, script, path, path.with_suffix(".npy"), result, *flags)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def compare(found: dict[str, Any], model: nn.Module, file: CbpqFile, images: Tensor) -> NDArray[np.int64]:
    """qonnx kept every annotation, counts its bits, and computes the same logits; returns its top-1."""
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}
    kinds = {name: KINDS[tensor.constraint] for name, tensor in file.constrained.items()}
    expected = [(*kinds.get(name, ("FLOAT32", 32)), weight.numel()) for name, weight in weights.items()]
    assert Counter(tuple(layer) for layer in found["layers"]) == Counter((kind, size) for kind, _, size in expected)
    counted: Counter[str] = Counter()
    for kind, _, size in expected:
        counted[f"mem_w_{kind}"] += size
    cost = found["cost"]
    assert {name: cost[name] for name in cost if name.startswith("mem_w")} == counted
    assert cost["total_mem_w_bits"] == sum(bits * size for _, bits, size in expected)
    assert {name for name in cost if name.startswith("op_mac")} == {f"op_mac_FLOAT32_{kind}" for kind, _, _ in expected}
    with torch.no_grad():
        ours = torch.cat([model(image[None]) for image in images]).numpy()
    theirs = np.array(found["logits"])
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * np.abs(ours).max())
    says: NDArray[np.int64] = theirs.argmax(axis=1)
    assert np.array_equal(says, ours.argmax(axis=1))
    return says


@pytest.mark.slow
@pytest.mark.parametrize("constraint", [name for name in KINDS if not name.startswith("levels")])
def test_qonnx_predicts_what_evaluate_says_of_the_digits(tmp_path: Path, qonnx_python: Path, constraint: str) -> None:
    """Builds an environment of about 350 MB; all pictures in one batch, whose size qonnx changes."""
    path, data = write_digits(tmp_path, constraint), ROOT / "examples" / "digits" / "digits.npz"
    outcome = command("export", path, "--format", "qonnx", "-o", tmp_path / "x.onnx")
    assert outcome.code == 0, outcome.err
    outcome = command("evaluate", path, "--data", data, "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    loaded = load(path)
    with np.load(data) as arrays:
        images, labels = arrays["val_images"], arrays["val_labels"].ravel()
    spec = loaded.info.input_spec
    inputs = (torch.from_numpy(images)[:, None].float() / 255 - spec.mean[0]) / spec.std[0]
    found = run_qonnx(qonnx_python, tmp_path / "x.onnx", inputs, "--whole-batch")
    says = compare(found, loaded.model, read(path), inputs)
    assert 100 * (says == labels).mean() == pytest.approx(outcome.document()["top1"], abs=1e-9)


@pytest.mark.slow
def test_qonnx_runs_depthwise_convolutions_and_linear_layers(tmp_path: Path, qonnx_python: Path) -> None:
    """In the same environment; the files as they are, one picture at a time."""
    torch.manual_seed(0)
    for name, model, spec in (("mobile", lived(mobile()), InputSpec(3, 24, 32)), ("linears", Linears().eval(), TINY)):
        file = constrained(model, *KINDS)
        export_qonnx(model, file, spec, tmp_path / f"{name}.onnx")
        images = pictures(spec, 3)
        found = run_qonnx(qonnx_python, tmp_path / f"{name}.onnx", images)
        if name == "linears":  # attention multiplies activations by activations, twice
            found["cost"] = {key: value for key, value in found["cost"].items() if "FLOAT32_FLOAT32" not in key}
            del found["cost"]["mem_w_FLOAT32"]
        compare(found, model, file, images)
