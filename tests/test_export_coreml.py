"""Export to Core ML: what is refused, and in an environment with coremltools, palettes that are the level sets."""

import copy
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from c_networks import CONSTRAINTS, pictures, rounded
from environments import environment, run_in
from numpy.typing import NDArray
from small_job import ROOT, command, one_line
from torch import nn

from cbpq.errors import CbpqError, MissingPartError, UsageError
from cbpq.exports import FORMATS, coreml, export
from cbpq.exports.coreml import check_palettes, export_coreml
from cbpq.fileformat import CbpqFile, ConstrainedTensor, write
from cbpq.inputs import InputSpec
from cbpq.models import load_model

SPEC = InputSpec(1, 4, 4, (0.5,), (0.25,))
FILES = FORMATS["coreml"].files


class Linear(nn.Linear):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.flatten(1))


def linear(levels: tuple[int, ...] = (-1, 0, 1)) -> tuple[nn.Linear, CbpqFile]:
    torch.manual_seed(0)
    model = Linear(16, 12)
    codes = np.resize(np.array(levels, dtype=np.int32), (12, 16))
    tensor = ConstrainedTensor(codes, np.float32(0.5) * np.ones(12, np.float32), levels, 1, "x")
    model.weight.data.copy_(torch.from_numpy(tensor.weight()))
    return model, CbpqFile({"weight": tensor}, {"bias": model.bias.detach().numpy().copy()}, {}, {}, {})


# without coremltools


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module by the name of coremltools, for what is refused before anything is asked of it."""
    module = ModuleType("coremltools")
    module.__dict__["__version__"] = "0"
    monkeypatch.setitem(sys.modules, "coremltools", module)


def test_without_coremltools_the_command_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)  # what Python does for a module that cannot be imported
    model, file = linear()
    message = r'coremltools is not installed; run: pip install "cbpq\[coreml\]"'
    with pytest.raises(MissingPartError, match=message):
        export_coreml(model, file, SPEC, tmp_path / "x.mlpackage")
    write(tmp_path / "model.safetensors", file)
    done = command("export", tmp_path / "model.safetensors", "-o", tmp_path / "x.mlpackage")
    one_line(done, 4, 'pip install "cbpq[coreml]"')
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.usefixtures("stand_in")
def test_what_is_refused_before_any_work(tmp_path: Path) -> None:
    model, file = linear()
    with pytest.raises(UsageError, match=r"writes folders that end in \.mlpackage, not 'x'"):
        export(file, "coreml", tmp_path / "x", model=model, spec=SPEC)
    with pytest.raises(UsageError, match="has no option 'opset'; it has check"):
        export(file, "coreml", tmp_path / "x.mlpackage", model=model, spec=SPEC, opset=21)
    many = tuple(range(-128, 129))
    with pytest.raises(CbpqError, match="weight has 257 levels, a palette holds 256"):
        export(linear(many)[1], "coreml", tmp_path / "x.mlpackage", model=linear(many)[0], spec=SPEC)
    other = linear()[0]
    other.bias.data[0] += 1
    with pytest.raises(CbpqError, match="does not hold the file's bias"):
        export(file, "coreml", tmp_path / "x.mlpackage", model=other, spec=SPEC)
    # the stand-in cannot translate anything
    with pytest.raises(CbpqError, match=r"coremltools 0 cannot translate Linear: .*optimize"):
        export(file, "coreml", tmp_path / "x.mlpackage", model=model, spec=SPEC)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("stand_in")
def test_a_folder_with_anything_else_in_it_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(_tools: ModuleType, *rest: Any) -> None:
        for name in FILES:
            (rest[-1] / name).parent.mkdir(parents=True, exist_ok=True)
            (rest[-1] / name).write_text("new")

    monkeypatch.setattr(coreml, "_convert", convert)
    model, file = linear()
    out = tmp_path / "x.mlpackage"

    def write_it(**options: Any) -> Any:
        return export(file, "coreml", out, model=model, spec=SPEC, check=False, **options)

    result = write_it()
    assert result.size == sum((out / name).stat().st_size for name in FILES)
    assert "not read back" in " ".join(result.notes)
    with pytest.raises(UsageError, match="exists"):
        write_it()
    (out / FILES[2]).write_text("old")
    write_it(overwrite=True)
    assert (out / FILES[2]).read_text() == "new"
    for name in ("Data/mine.txt", "mine.txt", "Data/com.apple.CoreML/weights/mine.txt"):
        (out / name).write_text("mine")
        with pytest.raises(UsageError, match=f"holds {name}"):
            write_it(overwrite=True)
        (out / name).unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["x.mlpackage"]


Found = dict[str, tuple[NDArray[Any], NDArray[Any]]]


def unique(tensor: ConstrainedTensor, entries: int) -> Found:
    """Palettes and indices as of ``mode="unique"``: each channel's distinct values, then zeros."""
    groups = tensor.weight().reshape(tensor.scale.size, -1)
    palettes, indices = np.zeros((len(groups), entries), np.float32), []
    for palette, group in zip(palettes, groups, strict=True):
        values, index = np.unique(group, return_inverse=True)
        palette[: len(values)] = values
        indices.append(index)
    ones = [1] * (tensor.codes.ndim - 1)
    lut = palettes.reshape(len(groups), *ones, entries, 1)
    return {"p_palettized": (np.array(indices, np.uint8).reshape(tensor.codes.shape), lut)}


def some(constraint: str, per_channel: bool) -> ConstrainedTensor:
    torch.manual_seed(1)
    return rounded(nn.Parameter(torch.randn(6, 5, 3, 3)), constraint, per_channel)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_palettes_of_the_levels_pass(constraint: str, per_channel: bool) -> None:
    tensor = some(constraint, per_channel)
    entries = {2: 2, 3: 4, 4: 4, 5: 8, 7: 8}[len(tensor.levels)]
    bits = f"{entries.bit_length() - 1}-bit"
    assert check_palettes(unique(tensor, entries), {"p": tensor}, {"p": "a.weight"}) == {bits: 1}
    # equal weights may have become one, under another name
    other = {"q_palettized": unique(tensor, entries)["p_palettized"]}
    assert check_palettes(other, {"p": tensor, "r": tensor}, {"p": "a", "r": "b"}) == {bits: 2}


def test_a_channel_without_some_of_the_levels_passes() -> None:
    tensor = some("two-bit-shift", True)
    tensor.codes[2] = 4
    tensor.codes[3] = np.abs(tensor.codes[3])
    assert check_palettes(unique(tensor, 8), {"p": tensor}, {"p": "a"}) == {"3-bit": 1}
    none = replace(tensor, scale=np.zeros(6, np.float32))
    assert check_palettes(unique(none, 1), {"p": none}, {"p": "a"}) == {"0-bit": 1}


def spoilt(found: Found, change: Callable[[NDArray[Any], NDArray[Any]], tuple[NDArray[Any], NDArray[Any]]]) -> Found:
    indices, lut = found["p_palettized"]
    return {"p_palettized": change(indices.copy(), lut.copy())}


def last_bit(indices: NDArray[Any], lut: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    lut[1, ..., 0, 0] = np.nextafter(lut[1, ..., 0, 0], np.float32(9))
    return indices, lut


def unused_value(indices: NDArray[Any], lut: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    lut[..., 7, 0] = 0.123
    return indices, lut


def other_index(indices: NDArray[Any], lut: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    indices[2, 1, 0, 0] = (indices[2, 1, 0, 0] + 1) % 7
    return indices, lut


SPOIL = {
    "the last bit of a value": last_bit,
    "a value that no index names": unused_value,
    "an index": other_index,
    "16 bits": lambda indices, lut: (indices, lut.astype(np.float16)),
    "the shape": lambda indices, lut: (indices.reshape(6, 5, 9, 1), lut),
    "one palette for all": lambda indices, lut: (indices, lut[:1]),
}


@pytest.mark.parametrize("change", SPOIL)
def test_anything_else_is_refused_by_name(change: str) -> None:
    tensor = some("two-bit-shift", True)
    found = unique(tensor, 8)
    check_palettes(found, {"p": tensor}, {"p": "a.weight"})
    with pytest.raises(CbpqError, match=r"a\.weight did not become a palette of its levels"):
        check_palettes(spoilt(found, SPOIL[change]), {"p": tensor}, {"p": "a.weight"})
    with pytest.raises(CbpqError, match=r"a\.weight did not"):
        check_palettes({}, {"p": tensor}, {"p": "a.weight"})


# with coremltools

needs_coremltools = pytest.mark.skipif(find_spec("coremltools") is None, reason="no coremltools here")
BITS = {"binary": 1, "ternary": 2, "one-bit-shift": 3, "two-bit-shift": 3, "levels:-1,-0.3,0.3,1": 2}


@pytest.fixture
def reader() -> Any:
    return importlib.import_module("examples.deploy.coreml_reader")


def check(reader: Any, out: Path, model: nn.Module, file: CbpqFile, spec: InputSpec, bits: int) -> None:
    """Palettes are the distinct values of each channel, all of them levels; logits are the network's."""
    function = reader.read(out)
    found = reader.palettized(function)
    for name, tensor in file.constrained.items():
        read = found[f"p_network_{name.replace('.', '_')}_palettized"]
        assert read.weight.dtype == np.float32
        assert read.weight.tobytes() == tensor.weight().tobytes(), name
        assert read.bits == bits
        steps = np.atleast_1d(tensor.scale / np.float32(tensor.denominator))
        assert len(read.palettes) == len(steps)
        for palette, step, codes in zip(read.palettes, steps, tensor.codes.reshape(len(steps), -1), strict=True):
            levels = np.unique(codes)
            assert set(levels.tolist()) <= set(tensor.levels)
            expected = (step * levels.astype(np.float32)).tolist()
            assert palette.tolist() == expected + [0.0] * (2**bits - len(expected))
    images = pictures(spec, 4)
    with torch.no_grad():
        ours = model(images)
    torch.testing.assert_close(reader.logits(function, images), ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


@needs_coremltools
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("constraint", BITS)
def test_the_digits(tmp_path: Path, reader: Any, constraint: str, per_channel: bool) -> None:
    loaded = load_model(str(ROOT / "examples" / "digits" / "resnet.safetensors"))
    tensors = {
        name: rounded(parameter, constraint, per_channel)
        for name, parameter in loaded.model.named_parameters()
        if parameter.dim() > 1
    }
    others = {name: value.numpy().copy() for name, value in loaded.model.state_dict().items() if name not in tensors}
    file = CbpqFile(tensors, others, loaded.info.to_dict(), {}, {})
    write(tmp_path / "model.safetensors", file)
    out = tmp_path / "x.mlpackage"
    done = command("export", tmp_path / "model.safetensors", "-o", out, "--json")
    assert done.code == 0, done.err
    told = done.document()
    paths = [path for path in out.rglob("*") if path.is_file()]
    assert sorted(path.relative_to(out).as_posix() for path in paths) == sorted(FILES)
    assert told["size"] == sum(path.stat().st_size for path in paths) < told["float32_size"] / 4
    assert told["palettes"] == {f"{BITS[constraint]}-bit": len(tensors)}
    assert told["float_weights"] == told["unused_weights"] == []
    assert len(told["notes"]) == 3
    check(reader, out, loaded.model, file, loaded.info.input_spec, BITS[constraint])


class Odd(nn.Module):
    """A shared weight, one that only training uses, one too small for a palette, and equal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.aux, self.equal = (nn.Linear(16, 16) for _ in range(4))
        self.small = nn.Conv2d(1, 1, 3, padding=1)
        self.again.weight = self.first.weight

    def forward(self, images: torch.Tensor) -> Any:
        values = self.again(self.first(self.small(images).flatten(1)).relu()).relu()
        return (self.equal(values), self.aux(values)) if self.training else self.equal(values)


def odd() -> tuple[nn.Module, CbpqFile]:
    torch.manual_seed(0)
    model = Odd().eval()
    model.equal.weight.data.copy_(model.first.weight)
    tensors = {name: rounded(model.get_parameter(name), "ternary", False) for name in ("first.weight", "aux.weight")}
    tensors |= {name: rounded(model.get_parameter(name), "ternary", False) for name in ("equal.weight", "small.weight")}
    tensors["again.weight"] = tensors["first.weight"]
    others = {name: value.numpy().copy() for name, value in model.state_dict().items() if name not in tensors}
    return model, CbpqFile(tensors, others, {}, {}, {})


@needs_coremltools
def test_odd_weights_and_equal_bytes(tmp_path: Path, reader: Any, capfd: pytest.CaptureFixture[str]) -> None:
    model, file = odd()
    before = copy.deepcopy(model.state_dict())
    result = export(file, "coreml", tmp_path / "a.mlpackage", model=model, spec=SPEC)
    assert result.facts["palettes"] == {"2-bit": 2}
    assert result.facts["float_weights"] == ["small.weight"]
    assert result.facts["unused_weights"] == ["aux.weight"]
    assert [note.rsplit(": ")[-1] for note in result.notes[3:]] == ["small.weight", "aux.weight"]
    found = list(reader.palettized(reader.read(tmp_path / "a.mlpackage")).values())
    assert all(np.array_equal(one.weight, file.constrained["first.weight"].weight()) for one in found)
    assert 1 <= len(found) <= 3
    export(file, "coreml", tmp_path / "b.mlpackage", model=model, spec=SPEC, check=False)
    for name in FILES:
        content = (tmp_path / "a.mlpackage" / name).read_bytes()
        assert content == (tmp_path / "b.mlpackage" / name).read_bytes()  # of content alone
        assert str(Path.cwd()).encode() not in content
    assert tuple(capfd.readouterr()) == ("", "")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mlpackage", "b.mlpackage"]


class Choosing(Linear):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images if images.sum() > 0 else -images)


class Zeta(Linear):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = torch.special.zeta(super().forward(images), torch.ones(1))
        return values


@needs_coremltools
@pytest.mark.parametrize(
    "kind, message",
    [
        (Choosing, "torch .* cannot follow the code of Choosing: "),
        (Zeta, "coremltools 9.* cannot translate Zeta: .*zeta"),
    ],
)
def test_a_network_that_cannot_be_translated_is_one_line(tmp_path: Path, kind: type[Linear], message: str) -> None:
    model = kind(16, 12)
    same, file = linear()
    model.load_state_dict(same.state_dict())
    with pytest.raises(CbpqError, match=message) as caught:
        export(file, "coreml", tmp_path / "x.mlpackage", model=model, spec=SPEC)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@needs_coremltools
def test_what_reads_back_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = linear()
    right = coreml.read_palettes

    def changed(*arguments: Any) -> Found:
        (own, (indices, lut)), *_ = right(*arguments).items()
        return {own: last_bit(indices, lut.copy())}

    monkeypatch.setattr(coreml, "read_palettes", changed)
    with pytest.raises(CbpqError, match="weight did not become a palette"):
        export(file, "coreml", tmp_path / "x.mlpackage", model=model, spec=SPEC)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_in_an_environment_with_coremltools() -> None:
    """Every other test of this file, where none is left out."""
    python = environment("coreml", "coremltools==9.0", beside=True)
    told = run_in(python, "-m", "pytest", "-q", "-n", "0", "-rs", __file__)
    assert "passed" in told
    assert "skipped" not in told
