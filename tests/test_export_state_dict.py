"""Export to a state dict, and what every export has in common."""

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from cbpq import exports
from cbpq.errors import CbpqError, UsageError
from cbpq.exports import Exported, export, state_dict
from cbpq.exports.state_dict import export_state_dict
from cbpq.fileformat import CbpqFile, ConstrainedTensor, read, write

SHIFTS = (-4, -2, -1, 0, 1, 2, 4)
EXTENSIONS = (".pth", ".safetensors")


def constrained(model: nn.Module, *, per_channel: bool, seed: int = 0) -> CbpqFile:
    """Random two-bit shifts in every matrix and kernel of ``model``, which is changed to hold them."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            shape = tuple(parameter.shape)
            scale = random.uniform(0.01, 0.1, shape[:1] if per_channel else ()).astype(np.float32)
            codes = random.choice(np.array(SHIFTS, dtype=np.int8), shape)
            tensors[name] = ConstrainedTensor(codes, np.asarray(scale), SHIFTS, 4, "two-bit-shift")
            parameter.data.copy_(torch.from_numpy(tensors[name].weight()))
    others = {name: value.numpy().copy() for name, value in model.state_dict().items() if name not in tensors}
    return CbpqFile(tensors, others, {}, {}, {})


@pytest.fixture
def tiny() -> CbpqFile:
    return constrained(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), per_channel=True)


def load(path: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor]
    if path.suffix == ".pth":
        loaded = torch.load(path, weights_only=True)
        assert type(loaded) is dict
    else:
        loaded = safetensors.torch.load_file(path)
    return loaded


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_torchvision_loads_it_strictly_and_computes_the_same(tmp_path: Path, extension: str, per_channel: bool) -> None:
    model = torchvision.models.squeezenet1_1(num_classes=7).eval()
    file = constrained(model, per_channel=per_channel)
    out = tmp_path / f"squeezenet{extension}"
    result = export_state_dict(file, out)

    other = torchvision.models.squeezenet1_1(num_classes=7).eval()
    other.load_state_dict(load(out), strict=True)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), other(images))
    assert result.path == out
    assert result.size == out.stat().st_size
    assert result.float32_size == sum(4 * parameter.numel() for parameter in model.parameters())
    assert result.facts == {"tensors": len(file.constrained) + len(file.others), "decoded": len(file.constrained)}


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_timm_loads_it_strictly_and_computes_the_same(tmp_path: Path, extension: str) -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    out = tmp_path / f"resnet{extension}"
    export_state_dict(constrained(model, per_channel=True), out)
    # create_model loads a local checkpoint strictly
    other = timm.create_model("test_resnet", num_classes=4, checkpoint_path=str(out)).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), other(images))


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_names_types_shapes_and_bits_are_those_of_the_network(tmp_path: Path, extension: str) -> None:
    codes = np.array([[-4, 0, 4], [1, -2, 2]], dtype=np.int32)
    scale = np.array([0.3, 1e-3], dtype=np.float32)
    others: dict[str, np.ndarray[Any, Any]] = {
        "norm.num_batches_tracked": np.array(17, dtype=np.int64),
        "mask": np.array([True, False]),
        "half": np.array([1.5, -0.0], dtype=np.float16),
        "double": np.array([[1 / 3]], dtype=np.float64),
        "empty": np.zeros((0, 3), dtype=np.float32),
        "byte": np.array([200], dtype=np.uint8),
    }
    others["double"].flags.writeable = False
    file = CbpqFile({"fc.weight": ConstrainedTensor(codes, scale, SHIFTS, 4, "two-bit-shift")}, others, {}, {}, {})
    out = tmp_path / f"x{extension}"
    export_state_dict(file, out)

    found = load(out)
    assert found.keys() == {"fc.weight", *others}
    assert found["norm.num_batches_tracked"].shape == ()
    others["half"] = others["half"].astype(np.float32)  # a network is float32 again, whatever the file kept
    for name, array in others.items():
        assert found[name].numpy().dtype == array.dtype
        assert found[name].numpy().shape == array.shape
        assert found[name].numpy().tobytes() == array.tobytes()
    # weight = code * (scale / denominator), each operation rounded to float32
    for row in range(2):
        step = np.float32(np.float32(scale[row]) / np.float32(4))
        for column in range(3):
            assert found["fc.weight"][row, column].item() == float(np.float32(np.float32(codes[row, column]) * step))


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_equal_content_gives_equal_bytes(tmp_path: Path, extension: str, tiny: CbpqFile) -> None:
    export_state_dict(tiny, tmp_path / f"a{extension}")
    export_state_dict(tiny, tmp_path / f"b{extension}")
    assert (tmp_path / f"a{extension}").read_bytes() == (tmp_path / f"b{extension}").read_bytes()


def test_another_extension_is_refused(tmp_path: Path, tiny: CbpqFile) -> None:
    with pytest.raises(UsageError, match=r"\.pth or \.safetensors, not 'x\.ckpt'"):
        export_state_dict(tiny, tmp_path / "x.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_folder_that_is_missing_is_one_line(tmp_path: Path, extension: str, tiny: CbpqFile) -> None:
    with pytest.raises(CbpqError, match="cannot write") as caught:
        export_state_dict(tiny, tmp_path / "missing" / f"x{extension}")
    assert "\n" not in str(caught.value)


def spoil_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors["0.weight"][0, 0] += 1


def spoil_type(tensors: dict[str, torch.Tensor]) -> None:
    tensors["0.weight"] = tensors["0.weight"].double()


def spoil_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["1.num_batches_tracked"] = tensors["1.num_batches_tracked"].reshape(1)


def spoil_names(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["0.weight"]


@pytest.mark.parametrize("spoil", [spoil_value, spoil_type, spoil_shape, spoil_names])
def test_what_does_not_read_back_equal_is_not_written(
    tmp_path: Path, tiny: CbpqFile, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    def dump(tensors: dict[str, torch.Tensor]) -> bytes:
        spoil(tensors)
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        return buffer.getvalue()

    monkeypatch.setitem(state_dict._WRITERS, ".pth", (dump, state_dict._WRITERS[".pth"][1]))
    with pytest.raises(CbpqError, match=r"reads? back"):
        export_state_dict(tiny, tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


# The dispatcher.


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_export_takes_a_path_or_its_content(tmp_path: Path, extension: str, tiny: CbpqFile) -> None:
    write(tmp_path / "model.safetensors", tiny)
    result = export(tmp_path / "model.safetensors", "state-dict", tmp_path / f"a{extension}")
    export(str(tmp_path / "model.safetensors"), "state-dict", str(tmp_path / f"b{extension}"), opset=None)
    export(read(tmp_path / "model.safetensors"), "state-dict", tmp_path / f"c{extension}")
    contents = {(tmp_path / f"{name}{extension}").read_bytes() for name in "abc"}
    assert len(contents) == 1
    assert result.to_dict()["path"] == str(tmp_path / f"a{extension}")
    assert result.to_dict()["size"] == len(contents.pop())
    assert result.to_dict()["tensors"] == len(tiny.constrained) + len(tiny.others)


@pytest.mark.parametrize("name", ["state_dict", "onnxx", "torchscript", ""])
def test_an_unknown_format_lists_the_known_ones(tmp_path: Path, tiny: CbpqFile, name: str) -> None:
    with pytest.raises(UsageError, match="state-dict, onnx") as caught:
        export(tiny, name, tmp_path / "x.pth")
    assert repr(name) in str(caught.value)


def test_every_format_says_what_it_is() -> None:
    for name, target in exports.FORMATS.items():
        assert name == name.lower()
        assert target.summary
        assert "\n" not in target.summary
        assert all(extension.startswith(".") for extension in target.extensions)
        assert bool(target.extra) == bool(target.modules)


def test_the_table_of_formats_costs_no_torch() -> None:
    code = "import sys, cbpq.exports; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(exports.__file__).parents[2]).returncode == 0


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "old.pth").write_bytes(b"old")
    yield tmp_path
    assert (tmp_path / "old.pth").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pth", "old.pth"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("x.onnx", r"files that end in \.pth or \.safetensors, not 'x\.onnx'"),
        ("x", "not 'x'"),
        ("folder.pth", "is a folder"),
        ("old.pth", "exists"),
        ("missing/x.pth", "missing does not exist"),
        ("old.pth/x.pth", r"old\.pth does not exist"),
    ],
)
def test_an_impossible_output_is_refused(places: Path, tiny: CbpqFile, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export(tiny, "state-dict", places / name)


def test_an_option_of_another_format_is_refused(places: Path, tiny: CbpqFile) -> None:
    with pytest.raises(UsageError, match="state-dict has no option 'opset'; it has check"):
        export(tiny, "state-dict", places / "x.pth", opset=21)


def test_a_source_that_is_no_cbpq_file_is_refused(places: Path) -> None:
    with pytest.raises(CbpqError, match=r"old\.pth"):
        export(places / "old.pth", "state-dict", places / "x.pth")
    with pytest.raises(UsageError, match="no such file"):
        export(places / "nothing.safetensors", "state-dict", places / "x.pth")


def test_overwriting_is_possible_when_asked_for(tmp_path: Path, tiny: CbpqFile) -> None:
    out = tmp_path / "x.pth"
    out.write_bytes(b"old")
    result = export(tiny, "state-dict", out, overwrite=True)
    assert isinstance(result, Exported)
    assert load(out).keys() == {*tiny.constrained, *tiny.others}


def test_float32_size_counts_every_tensor(tiny: CbpqFile) -> None:
    # weights 15 + 10, biases 5 + 2, BatchNorm 4 × 5 floats and one int64
    assert tiny.float32_bytes == 4 * (15 + 10 + 5 + 2 + 20) + 8
