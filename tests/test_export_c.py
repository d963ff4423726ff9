"""Export to C: compiled, it computes what PyTorch does, without a product by a constrained weight."""

import ctypes
import itertools
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from c_networks import (
    CONSTRAINTS,
    NETWORKS,
    SANITIZED,
    SHAPES,
    STRICT,
    TINY,
    Branches,
    Everything,
    compiled,
    constrained,
    lived,
    needs_gcc,
    pictures,
    write_digits,
)
from small_job import command, one_line
from torch import Tensor, nn
from torch.nn import functional

from cbpq.atomic import atomic_write_folder
from cbpq.errors import CbpqError, UsageError
from cbpq.exports import FORMATS, export
from cbpq.exports.c import compiler, export_c, text
from cbpq.exports.c.lowering import exported_program, lower
from cbpq.exports.c.memory import plan
from cbpq.exports.c.operations import Copy, Layer, View
from cbpq.exports.c.source import SourceWriter, Written
from cbpq.fileformat import CbpqFile, ConstrainedTensor
from cbpq.inputs import InputSpec
from cbpq.models import load_model

pytestmark = pytest.mark.medium  # compiles


def computed(folder: Path, images: Tensor, classes: int) -> Tensor:
    """What ``cbpq_run`` gives for each picture."""
    run = ctypes.CDLL(
        str(compiled(folder, *STRICT, "-shared", "-fPIC", sources=["network.c"], to="network.so"))
    ).cbpq_run
    outputs = torch.empty(len(images), classes)
    for image, output in zip(images.contiguous(), outputs, strict=True):
        run(ctypes.c_void_p(image.data_ptr()), ctypes.c_void_p(output.data_ptr()))
    return outputs


def check(folder: Path, model: nn.Module, spec: InputSpec, sanitize: bool = True) -> float:
    """The generated code compiles without a warning, is clean, and agrees with torch on pictures of noise; returns the
    largest difference relative to the largest logit."""
    images = pictures(spec)
    with torch.no_grad():
        expected = torch.cat([model(image[None]) for image in images])
    found = computed(folder, images, expected.shape[1])
    largest = float(expected.abs().max())
    difference = float((found - expected).abs().max())
    assert difference <= 1e-4 * largest
    assert difference <= 1e-4 * max(1.0, largest)
    for flags in (STRICT, SANITIZED) if sanitize else (STRICT,):
        done = subprocess.run([compiled(folder, *flags)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return difference / largest


def make(model: nn.Module, file: CbpqFile, spec: InputSpec, out: Path) -> str:
    """Export without the built-in check, since the tests' own is stricter; returns the C text."""
    result = export_c(model, file, spec, out, check=False)
    assert sorted(path.name for path in out.iterdir()) == sorted(FORMATS["c"].files)
    assert result.size == sum(path.stat().st_size for path in out.iterdir())
    return (out / "network.c").read_text()


@needs_gcc
@pytest.mark.parametrize("shape", SHAPES)
def test_convolutions_of_every_shape_constraint_and_scale(tmp_path: Path, shape: str) -> None:
    torch.manual_seed(0)
    model = Branches(**SHAPES[shape]).eval()
    channels = SHAPES[shape]["in_channels"]
    spec = InputSpec(channels, 5, 6, (0.5,) * channels, (0.5,) * channels)
    file = constrained(model, *CONSTRAINTS, keep=[f"branches.{len(model.branches) - 1}.weight"])
    assert {(tensor.constraint, tensor.scale.ndim) for tensor in file.constrained.values()} == set(
        itertools.product(CONSTRAINTS, (0, 1))
    )
    make(model, file, spec, tmp_path / "out")
    check(tmp_path / "out", model, spec)


@needs_gcc
def test_every_operator(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = lived(Everything())
    file = constrained(model, *CONSTRAINTS, keep=("factor",))
    whole = make(model, file, TINY, tmp_path / "out")
    check(tmp_path / "out", model, TINY)
    assert whole.count("    affine(") >= 2  # the norm behind the ReLU, and what is multiplied with a constant


@needs_gcc
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_as_they_are_used(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    build, spec, keep = NETWORKS[name]
    model = lived(build())
    file = constrained(model, "two-bit-shift", "ternary", keep=keep)
    whole = make(model, file, spec, tmp_path / "out")
    assert "affine(" not in whole  # every BatchNorm is folded
    assert check(tmp_path / "out", model, spec) < 1e-5
    header = (tmp_path / "out" / "network.h").read_text()
    for line in (f"#define CBPQ_HEIGHT {spec.height}", "#define CBPQ_CLASSES 10", "CBPQ_MEAN", "CBPQ_STD"):
        assert line in header


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


KNOWN: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm mobilenetv2_035": (lambda: timm.create_model("mobilenetv2_035", num_classes=9), 32),
    "timm mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=9), 32),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0", num_classes=9), 32),
    "timm regnety_002": (lambda: timm.create_model("regnety_002", num_classes=9), 64),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=9), 64),
    "torchvision squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(num_classes=9), 48),
    "torchvision shufflenet_v2_x0_5": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=9), 32),
    "torchvision densenet121": (lambda: torchvision.models.densenet121(num_classes=9), 32),
}


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_known_networks(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    build, side = KNOWN[name]
    model = lived(build())
    names = [weight for weight, parameter in model.named_parameters() if parameter.dim() > 1]
    file = constrained(model, keep=(names[0], names[-1]))
    make(model, file, InputSpec(3, side, side), tmp_path / "out")
    check(tmp_path / "out", model, InputSpec(3, side, side), sanitize=False)


@needs_gcc
def test_the_digits_by_the_command(tmp_path: Path, digits: Path) -> None:
    done = command("export", digits, "--format", "c", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    facts = done.document()
    assert facts["max_difference"] <= 1e-5 * facts["max_logit"]
    assert "cc" in facts["compiler"]
    assert facts["float_layers"] >= 1
    assert facts["additions"] > facts["products"] > 0
    loaded = load_model(str(digits))
    check(tmp_path / "out", loaded.model, loaded.info.input_spec)
    one_line(command("export", digits, "--format", "c", "-o", tmp_path / "out"), 2, "exists")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = command("export", digits, "--format", "c", "-o", tmp_path / "out", "--overwrite", "--no-check")
    assert again.code == 0
    assert "--no-check" in again.err
    assert "cc -std=c99" in " ".join(again.err.split())
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before  # the same bytes twice


# no products


class Plain(nn.Sequential):
    """Constrained layers only."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4))


def plain(**options: Any) -> tuple[nn.Module, CbpqFile]:
    torch.manual_seed(0)
    model = Plain().eval()
    return model, constrained(model, *CONSTRAINTS, **options)


# numbers that know no product, and no conversion to one that does
NO_PRODUCT = """
#include <stdint.h>
struct number {
    float held;
    number(int start = 0) : held(start) {}
    number operator+(const number &other) const { number sum; sum.held = held + other.held; return sum; }
    number &operator+=(const number &other) { held += other.held; return *this; }
    number &operator-=(const number &other) { held -= other.held; return *this; }
    template <typename T> number operator*(const T &) const = delete;
};
typedef number value;
typedef number total;
typedef number weight;
struct finishing { value *out; };
static void finish(const finishing *how, int, const total *sums, int count, int at)
{
    for (int i = 0; i < count; i++)
        how->out[at + i] = sums[i];
}
#define MOST_POWERS 4
#define LONGEST_LINE 8
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize("kernel, compiles", [("constrained", True), ("ordinary", False)])
def test_the_kernel_of_constrained_layers_needs_no_product(tmp_path: Path, kernel: str, compiles: bool) -> None:
    source = NO_PRODUCT + text.kernel("convolution") + text.kernel(kernel)
    (tmp_path / "kernel.cpp").write_text(source + f"void *used = (void *){kernel}_layer;\n")
    done = subprocess.run(["g++", "-c", "kernel.cpp"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == compiles, done.stderr[:1000]
    if not compiles:
        assert "operator*" in done.stderr


@needs_gcc
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="another instruction set")
def test_the_machine_code_of_constrained_layers_multiplies_no_floats(tmp_path: Path) -> None:
    model, file = plain(keep=("3.weight",))
    make(model, file, TINY, tmp_path / "out")
    flags = ["-std=c99", "-O1", "-fno-inline", "-S"]
    listing = compiled(tmp_path / "out", *flags, sources=["network.c"], to="network.s").read_text()
    bodies = {name: listing.split(f"\n{name}:")[1].split(".size")[0] for name in _FUNCTIONS}
    product = re.compile(r"\b(v?mul[sp]s|vfn?m\w+|fn?mul|fn?madd|fn?msub|fmla)\b")
    products = {name: bool(product.search(body)) for name, body in bodies.items()}
    assert products == _FUNCTIONS


_FUNCTIONS = {  # whether a function may multiply floats
    "constrained_layer": False,
    "add_line": False,
    "next_index": False,
    "finish": True,
    "multiply_line": True,
}


# memory


@pytest.mark.parametrize("name", ["everything", "resnet20", "mobile"])
def test_no_value_is_overwritten_while_it_is_needed(name: str) -> None:
    model = lived(Everything() if name == "everything" else NETWORKS[name][0]())
    spec = TINY if name == "everything" else NETWORKS[name][1]
    network = lower(exported_program(model, spec), model, constrained(model, keep=("factor",)))
    for own_output in (False, True):
        placed = plan(network, own_output=own_output)
        owner: list[str | None] = [None] * placed.size
        same: dict[str, str] = {}
        for operation in network.operations:
            for value in operation.inputs:
                home, original = placed.home[value], same.get(value, value)
                if home in placed.offsets:
                    cells = owner[placed.offsets[home] : placed.offsets[home] + network.size(value)]
                    assert set(cells) == {original}, f"{operation.where} reads what is no longer there"
            if isinstance(operation, View):
                same[operation.output] = same.get(operation.inputs[0], operation.inputs[0])
                continue
            home = placed.home[operation.output]
            if home in placed.offsets:
                start = placed.offsets[home]
                owner[start : start + network.size(operation.output)] = [operation.output] * network.size(
                    operation.output
                )
        values = sum(network.size(operation.output) for operation in network.operations)
        assert placed.size < values / 2  # places are shared
    assert {network.input} == placed.home.keys() - {operation.output for operation in network.operations}


# what is refused


class Of(nn.Module):
    """A function in front of a constrained layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.head = nn.Linear(60, 4)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.function(images).flatten(1)[:, :60])
        return scores


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "unknown": (lambda x: x.cumsum(1), "aten.cumsum at the network itself: there is no kernel"),
    "reflection": (lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect"), "something other than zeros"),
    "padding by ones": (lambda x: functional.pad(x, (1, 1), value=1.0), "aten.pad"),
    "dilated pooling": (lambda x: functional.max_pool2d(x, 2, 1, dilation=2).repeat(1, 3, 1, 1), "aten."),
    "division by values": (lambda x: 1 / x, "aten."),
    "maximum": (lambda x: torch.maximum(x, x * 2), "aten.maximum"),
    "apart axes": (lambda x: x.mean((1, 3)).repeat(1, 12), "aten."),
    "normalisation of layers": (lambda x: functional.layer_norm(x, (6,)), "aten.layer_norm"),
    "bounds that are tensors": (lambda x: torch.clamp(x, torch.zeros(6), torch.ones(6)), "aten.clamp"),
    "another type": (lambda x: x.double().relu().float(), "it gives float64"),
    "several vectors": (lambda x: functional.linear(x, torch.ones(6, 6)), "aten.linear"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operator_without_a_kernel_is_refused_by_name(tmp_path: Path, name: str) -> None:
    function, message = REFUSED[name]
    model = Of(function).eval()
    file = constrained(model)
    with pytest.raises(CbpqError, match=re.escape(message)) as refusal:
        export_c(model, file, TINY, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_the_place_of_an_operator_is_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(60, 8), nn.LayerNorm(8)), nn.Linear(8, 3)).eval()
    with pytest.raises(CbpqError, match=r"aten\.layer_norm at 1\.1: there is no kernel"):
        export_c(model, constrained(model), TINY, tmp_path / "out")


class Standardised(nn.Conv2d):
    def forward(self, images: Tensor) -> Tensor:
        return functional.conv2d(images, self.weight - self.weight.mean((1, 2, 3), keepdim=True)).flatten(1)


def test_weights_that_the_network_changes_are_refused(tmp_path: Path) -> None:
    model = Standardised(2, 3, 3).eval()
    with pytest.raises(CbpqError, match="changes the constrained weight weight, whose levels are then lost"):
        export_c(model, constrained(model), TINY, tmp_path / "out")


def test_levels_of_too_many_powers_are_refused(tmp_path: Path) -> None:
    model, file = plain()
    big = (-(2**15), 2**15)
    codes = np.where(file.constrained["0.weight"].codes < 0, *big).astype(np.int32)
    tensor = ConstrainedTensor(codes, np.asarray(1e-6, dtype=np.float32), big, 1, "x")
    file.constrained["0.weight"] = tensor
    model.get_parameter("0.weight").data.copy_(torch.from_numpy(tensor.weight()))
    with pytest.raises(CbpqError, match=r"0\.weight has levels that are sums of more than 15 powers of two"):
        export_c(model, file, TINY, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_network_is_refused(tmp_path: Path) -> None:
    model, file = plain()
    with torch.no_grad():
        model.get_parameter("0.bias").add_(1)
    with pytest.raises(CbpqError, match=r"does not hold the file's 0\.bias"):
        export_c(model, file, TINY, tmp_path / "out")


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = Of(lambda x: x * 1e38 * 1e38).eval()
    with pytest.raises(CbpqError, match="no row of finite numbers"):
        export_c(model, constrained(model), TINY, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# names


class Hostile(nn.Module):
    """Layers by names that mean something else in C."""

    NAMES = ("int", "memory", "größe 2", "*/ #error", "a" * 200, "0", "??/", "cbpq_run")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, nn.Linear(60 if name == "int" else 6, 6))

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for layer in self.children():
            x = layer(x).relu()
        return x


@needs_gcc
def test_names_of_layers_are_no_trouble(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Hostile().eval()
    whole = make(model, constrained(model), TINY, tmp_path / "out")
    assert whole.isascii()
    check(tmp_path / "out", model, TINY)


# the built-in check, and the folder


@needs_gcc
def test_the_check_runs_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = plain()
    result = export_c(model, file, TINY, tmp_path / "out")
    assert 0 <= result.facts["max_difference"] <= 1e-5 * result.facts["max_logit"]
    assert result.notes == ()
    monkeypatch.setattr(compiler, "_NAMES", ("no such compiler",))
    without = export_c(model, file, TINY, tmp_path / "out")
    assert "compiler" not in without.facts
    assert "no C compiler was found" in without.notes[0]


@needs_gcc
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda whole: whole.replace("sums[x] -= line", "sums[x] += line"), "computes something else than torch"),
        (lambda whole: whole + "nonsense", "does not compile the C code"),
        (lambda whole: whole.replace("= 0;", "= *(volatile char *)0;"), "computes something else"),
    ],
)
def test_what_fails_the_check_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str], message: str
) -> None:
    model, file = plain()
    out = tmp_path / "out"
    export_c(model, file, TINY, out, check=False)
    before = {path: path.read_bytes() for path in out.iterdir()}
    right = SourceWriter.write

    def changed(self: SourceWriter, spec: InputSpec) -> Written:
        written = right(self, spec)
        return replace(written, text=change(written.text))

    monkeypatch.setattr(SourceWriter, "write", changed)
    with pytest.raises(CbpqError, match=message) as refusal:
        export_c(model, file, TINY, out)
    assert "\n" not in str(refusal.value)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_golden_pictures_are_torchs_own(tmp_path: Path) -> None:
    model, file = plain()
    make(model, file, TINY, tmp_path / "out")
    header = (tmp_path / "out" / "golden.h").read_text()
    rows = re.findall(r"\{\n((?: {8}.*\n)+)", header)
    numbers = [np.array(re.findall(r"[-+.\de]+", row), dtype=np.float64) for row in rows]
    pixels, logits = np.stack(numbers[:4]).reshape(4, 5, 6, 2), np.stack(numbers[4:])
    images = (torch.from_numpy(pixels).float().permute(0, 3, 1, 2) / 255 - torch.tensor([0.4, 0.5])[:, None, None]) / (
        torch.tensor([0.2, 0.3])[:, None, None]
    )
    with torch.no_grad():
        torch.testing.assert_close(model(images).double(), torch.from_numpy(logits), rtol=1e-5, atol=1e-6)
    assert len(set(pixels.ravel())) > 20


def test_the_folder_is_replaced_only_where_it_is_an_export(tmp_path: Path) -> None:
    model, file = plain()
    out = tmp_path / "out.v2"

    def write_it(**options: Any) -> Any:
        return export(file, "c", out, model=model, spec=TINY, check=False, **options)

    out.mkdir()
    write_it()  # an empty folder is nothing to lose
    first = (out / "network.c").read_bytes()
    with pytest.raises(UsageError, match="exists"):
        write_it()
    (out / "network.c").write_text("old")
    write_it(overwrite=True)
    assert (out / "network.c").read_bytes() == first
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes\.txt"):
        write_it(overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    for name in ("a\0b", "a" * 300):
        with pytest.raises(CbpqError):
            export(file, "c", tmp_path / name, model=model, spec=TINY, check=False)
    for place, message in ((tmp_path / "a" / "b", "does not exist"), (out / "notes.txt", "cannot be the output")):
        with pytest.raises(UsageError, match=message):
            export(file, "c", place, model=model, spec=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["out.v2"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    atomic_write_folder(out, {"a": b"1", "b": b"2"})
    with pytest.raises(CbpqError, match="cannot write"):
        atomic_write_folder(out, {"a": b"3", "a/b": b"4"})
    with pytest.raises(CbpqError, match="a file has this name"):
        atomic_write_folder(out / "a", {"a": b"3"})
    monkeypatch.setattr("os.rename", _failing_at(2))
    with pytest.raises(CbpqError, match="cannot write"):
        atomic_write_folder(out, {"a": b"3"})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"a": b"1", "b": b"2"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _failing_at(call: int) -> Callable[[Path, Path], None]:
    calls = itertools.count(1)
    rename = Path.rename

    def rename_or_fail(source: Path, target: Path) -> None:
        if next(calls) == call:
            raise OSError(28, "No space left on device")
        rename(source, target)

    return rename_or_fail


def test_options_belong_to_formats(tmp_path: Path) -> None:
    model, file = plain()
    with pytest.raises(UsageError, match="has no option 'opset'"):
        export(file, "c", tmp_path / "out", model=model, spec=TINY, opset=21)
    assert export(file, "state-dict", tmp_path / "x.pth", check=False).size > 0


def test_what_only_training_uses_is_left_out_and_said(tmp_path: Path) -> None:
    model = Of(lambda x: x).eval()
    model.add_module("aux", nn.Linear(3, 3))
    result = export_c(model, constrained(model), TINY, tmp_path / "out", check=False)
    assert any("aux.weight" in note for note in result.notes)


def test_layers_share_a_weight_by_any_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 60)).eval()
    model[3].weight = model[1].weight
    network = lower(exported_program(model, TINY), model, constrained(model))
    layers = [operation for operation in network.operations if isinstance(operation, Layer)]
    assert [layer.tensor is not None for layer in layers] == [True, True]


def test_a_shuffle_of_channels_is_a_copy() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ChannelShuffle(2), nn.Flatten()).eval()
    network = lower(exported_program(model, TINY), model, constrained(model))
    assert any(isinstance(operation, Copy) for operation in network.operations)
