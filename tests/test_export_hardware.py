"""The hardware report against counts in plain loops, brute force, hooks on the plain network, and the export to C."""

import copy
import importlib
import io
import itertools
import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from c_networks import CONSTRAINTS, NETWORKS, SHAPES, TINY, constrained, lived, write_digits
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_job import ROOT, command, contents, one_line, refused, write_arrays
from torch import Tensor, nn
from torch.nn import functional

from cbpq.errors import CbpqError
from cbpq.exports import Exported, export
from cbpq.exports.c import export_c
from cbpq.exports.hardware import hardware_report
from cbpq.exports.hardware.energy import energy
from cbpq.exports.hardware.histogram import figure_of, histogram
from cbpq.exports.hardware.layers import Layer, Site, traced
from cbpq.exports.hardware.scales import nearest_exponents, on_powers, power_scale
from cbpq.exports.hardware.widths import accumulator_bits, integer_bits, signed_bits
from cbpq.exports.hardware.work import Work, work
from cbpq.fileformat import CbpqFile, ConstrainedTensor, read
from cbpq.inputs import InputSpec
from cbpq.model_file import load
from cbpq.transforms import Normalize

pytestmark = pytest.mark.medium  # translates networks

DATA = ROOT / "examples" / "digits" / "digits.npz"
FILES = {"hardware.json", "hardware.md", "histogram.png", "golden.npz"}


def tensor(codes: Any, levels: tuple[int, ...], scale: Any = 1.0, denominator: int = 1) -> ConstrainedTensor:
    return ConstrainedTensor(
        np.array(codes, dtype=np.int32), np.array(scale, dtype=np.float32), levels, denominator, "x"
    )


def write_pictures(path: Path, spec: InputSpec, count: int = 5) -> Path:
    """Noise as pictures without labels, which calibration also sees mirrored if they are in colour."""
    shape = (count, spec.height, spec.width, spec.channels)[: 4 if spec.channels > 1 else 3]
    images = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    np.savez(path, train_images=images, val_images=images)
    return path


def reported(
    model: nn.Module, file: CbpqFile, spec: InputSpec, out: Path, count: int = 5
) -> tuple[Exported, dict[str, Any]]:
    """The report on pictures of noise, and what its JSON says; the network stays as it is."""
    before = copy.deepcopy(model.state_dict())
    data = str(write_pictures(out.parent / "pictures.npz", spec, count)) if spec.channels != 2 else None
    result = hardware_report(model, file, spec, out, data=data)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    return result, json.loads((out / "hardware.json").read_text())


def golden_of(folder: Path) -> dict[str, Tensor]:
    with np.load(folder / "golden.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


# what a layer computes


def counted(codes: Any, positions: int, groups: int) -> dict[str, int]:
    """Counts of a convolution, output by output and input by input; its doublings by doing the sums."""
    counts: dict[str, int] = defaultdict(int)
    rng = np.random.default_rng(0)
    kernels = codes.reshape(len(codes), -1)
    powers = int(np.abs(kernels).max()).bit_length()
    for row in kernels.tolist() * positions:
        counts["outputs"] += 1
        inputs = rng.integers(-128, 128, len(row)).tolist()
        sums, own = [0] * powers, 0
        for code, value in zip(row, inputs, strict=True):
            counts["macs"] += 1
            counts["skipped_macs"] += code == 0
            for power in range(powers):
                if abs(code) // 2**power % 2:
                    counts["additions"] += 1
                    counts["shifts"] += power > 0
                    sums[power] += value if code > 0 else -value
            own += code * value
        while len(sums) > 1:
            highest = sums.pop()
            sums[-1] += highest + highest
            counts["doublings"] += 1
        assert sums == [own]
    return dict(counts) | {"zero_weights": int((kernels == 0).sum()), "weights": kernels.size}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_of_convolutions(shape: str, constraint: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(**SHAPES[shape])
    model = nn.Sequential(layer, nn.Flatten())
    file = constrained(model, constraint)
    spec = InputSpec(layer.in_channels, 5, 6, (0.5,) * layer.in_channels, (0.5,) * layer.in_channels)
    (found,) = traced(model, file, spec).layers
    output = layer(torch.zeros(1, layer.in_channels, 5, 6))
    assert found.sites == (Site((layer.in_channels, 5, 6), tuple(output.shape[1:])),)
    expected = Work(**counted(file.constrained["0.weight"].codes, output[0, 0].numel(), layer.groups))
    assert work(found) == replace(expected, products=0)


def test_a_float_layer_multiplies() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(12, 5))
    found = traced(model, constrained(model, keep=["0.weight"]), TINY)
    assert [work(layer).products for layer in found.layers] == [2 * 3 * 9 * 4, 0]
    assert work(found.layers[0]) == Work(weights=54, outputs=12, macs=216, products=216)
    assert found.classes == 5


class Twice(nn.Module):
    """A convolution used twice, at two sizes, and a linear layer that sees windows as a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(2, 2, 3, padding=1)
        self.tied = nn.Conv2d(2, 2, 3, padding=1)
        self.tied.weight = self.shared.weight
        self.windows = nn.Linear(6, 4)
        self.head = nn.Linear(40, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.shared(images), inplace=True)
        x = self.tied(functional.relu(self.shared(x)[..., :4]))  # (B, 2, 5, 4)
        x = functional.pad(x, (0, 2)).flatten(0, 1)  # (2 B, 5, 6): the windows of a picture follow one another
        scores: Tensor = self.head(functional.relu(self.windows(x)).reshape(len(images), -1))
        return scores


def test_layers_used_more_than_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    file = constrained(model)
    file.others.pop("tied.weight")  # one tensor with two names is stored once
    file = replace(file, others={**file.others, "tied.weight": file.constrained["shared.weight"].weight()})
    _, document = reported(model, file, TINY, tmp_path / "out")
    shared, windows, head = document["layers"]
    assert [layer["name"] for layer in document["layers"]] == ["shared.weight", "windows.weight", "head.weight"]
    assert [use["output"] for use in shared["uses"]] == [[2, 5, 6], [2, 5, 6], [2, 5, 4]]
    assert shared["macs"] == 36 * (30 + 30 + 20)
    assert windows["uses"] == [{"input": [2, 5, 6], "output": [2, 5, 4]}]
    assert windows["macs"] == 24 * 10
    assert head["macs"] == 120
    assert "used 3 times" in (tmp_path / "out" / "hardware.md").read_text()
    golden = golden_of(tmp_path / "out")
    assert {"outputs/shared", "outputs/shared@2", "outputs/shared@3"} <= golden.keys()
    with torch.no_grad():
        first = model.shared(golden["input"])
        assert torch.equal(golden["outputs/shared"], first)
        assert torch.equal(golden["outputs/shared@2"], model.shared(first.relu()))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_export_to_c_counts_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, spec, keep = NETWORKS[name]
    model = lived(make())
    file = constrained(model, keep=keep)
    result, document = reported(model, file, spec, tmp_path / "report")
    same = export_c(model, file, spec, tmp_path / "c", check=False).facts
    for fact in ("additions", "products", "constrained_layers", "float_layers"):
        assert result.facts[fact] == same[fact]
    if name == "resnet20":  # stem, stages of 6 layers, the two that halve the picture at half of the work, classifier
        stages = 6 * 1024 * 2304 + 2 * (1024 * 1152 + 5 * 256 * 9216)
        assert document["totals"]["all"]["macs"] == 1024 * 16 * 27 + stages + 640 == 40_551_040
    assert sum(layer["macs"] for layer in document["layers"]) == document["totals"]["all"]["macs"]


# bits


def test_signed_bits_are_the_fewest() -> None:
    for low, high in itertools.product(range(-70, 1), range(71)):
        bits = next(bits for bits in itertools.count(1) if -(2 ** (bits - 1)) <= low and high <= 2 ** (bits - 1) - 1)
        assert signed_bits(low, high) == bits


@pytest.mark.parametrize("input_bits", [1, 2, 8])
@pytest.mark.parametrize(
    "codes", [[[1, 1, 1]], [[-4, 2, 0]], [[-1, -1, -1, -1]], [[3, -10, 1], [0, 0, 0]], [[0]], [[4, 4, 4, 4]], [[-4]]]
)
def test_accumulators_hold_every_sum_and_no_bit_is_spare(codes: list[list[int]], input_bits: int) -> None:
    extremes = (-(2 ** (input_bits - 1)), 2 ** (input_bits - 1) - 1, 0)
    sums = [0]
    for row in codes:
        for inputs in itertools.product(extremes, repeat=len(row)):
            sums += itertools.accumulate(code * value for code, value in zip(row, inputs, strict=True))
    bits = next(
        bits for bits in itertools.count(1) if all(-(2 ** (bits - 1)) <= total < 2 ** (bits - 1) for total in sums)
    )
    levels = tuple(sorted({code for row in codes for code in row} | {-20, 20}))
    assert accumulator_bits(tensor(codes, levels), input_bits) == bits
    unsigned = [
        sum(code * value for code, value in zip(row, inputs, strict=True))
        for row in codes
        for inputs in itertools.product((0, 2**input_bits - 1), repeat=len(row))
    ]
    assert -(2**bits) <= min(unsigned) <= max(unsigned) < 2**bits  # one bit more


@given(st.floats(-1e6, 0, width=32), st.floats(0, 1e6, width=32))
@settings(max_examples=200, deadline=None)
def test_integer_bits_are_the_fewest(low: float, high: float) -> None:
    bits = integer_bits(low, high)
    if low == high == 0:
        assert bits == 0
    else:
        assert -math.ldexp(1, bits) <= low
        assert high < math.ldexp(1, bits)
        assert low < -math.ldexp(1, bits - 1) or high >= math.ldexp(1, bits - 1)


def test_ranges_are_those_of_the_plain_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, spec, keep = NETWORKS["mobile"]
    model = lived(make())
    file = constrained(model, keep=keep)
    _, document = reported(model, file, spec, tmp_path / "out")
    assert document["pictures"] == 10
    assert document["notes"] == []
    with np.load(tmp_path / "pictures.npz") as arrays:
        images = torch.from_numpy(arrays["train_images"]).permute(0, 3, 1, 2)
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0].clone()}))
    with torch.no_grad():
        model(Normalize(spec)(torch.cat([images, images.flip(-1)])))
    for layer in document["layers"]:
        name = layer["name"].removesuffix(".weight")
        seen = inputs[name]
        assert layer["input_min"] == pytest.approx(float(seen.min()), rel=1e-5, abs=1e-6)
        assert layer["input_max"] == pytest.approx(float(seen.max()), rel=1e-5, abs=1e-6)
        assert layer["input_integer_bits"] == integer_bits(layer["input_min"], layer["input_max"])
        if layer["constraint"] is None:
            assert layer["accumulator_bits_seen"] is None
            assert "accumulator_bits" not in layer
        else:
            assert layer["accumulator_bits_seen"] <= layer["accumulator_bits"]


def test_accumulators_seen_are_those_of_integers(tmp_path: Path) -> None:
    """Pictures of integers, as wide as 8 bits allow: nothing is rounded, and the sums are exact."""
    layer = nn.Conv2d(1, 3, 3, bias=True)
    model = nn.Sequential(layer, nn.Flatten())
    torch.manual_seed(0)
    file = constrained(model, "two-bit-shift")
    spec = InputSpec(1, 6, 6, (127 / 255,), (1 / 255,))  # pixels 0 to 254 become −127 to 127
    images = np.random.default_rng(1).integers(0, 255, (5, 6, 6), dtype=np.uint8)
    images[0, 0, 0] = 0
    np.savez(tmp_path / "images.npz", images=images)
    hardware_report(model, file, spec, tmp_path / "out", data=str(tmp_path / "images.npz"))
    (found,) = json.loads((tmp_path / "out" / "hardware.json").read_text())["layers"]
    codes = file.constrained["0.weight"].codes[:, 0].astype(int)
    values = images.astype(int) - 127
    windows = np.lib.stride_tricks.sliding_window_view(values, (3, 3), axis=(1, 2))
    most = int(np.abs(np.einsum("nyxij,cij->nyxc", windows, codes)).max())
    # the largest may be a power of two, to which float32's roundoff adds
    assert found["accumulator_bits_seen"] in (signed_bits(-most, most), signed_bits(-most - 1, most + 1))
    assert found["input_min"] == pytest.approx(-127, rel=1e-5)


# scales


@given(st.floats(2.0**-149, 2.0**127, width=32))
@settings(max_examples=200, deadline=None)
def test_the_nearest_power_of_two(value: float) -> None:
    near = math.frexp(value)[1]
    distances = {exponent: abs(math.ldexp(1, exponent) - value) for exponent in range(near - 3, near + 3)}
    assert distances[int(nearest_exponents(np.array(value)))] == min(distances.values())


def test_of_two_equally_near_powers_the_lower() -> None:
    assert nearest_exponents(np.array([0.75, 1, 1.5, 3, 1.0001, 1.4999, 1.5001])).tolist() == [-1, 0, 0, 1, 0, 0, 1]


def test_scales_on_powers_of_two() -> None:
    part = tensor([[4, -1], [2, 1], [0, 2], [1, 1]], (-1, 0, 1, 2, 4), [0.3, 8.0, 0.0, 7.0], 4)
    assert on_powers(part).scale.tolist() == [0.25, 8.0, 0.0, 8.0]
    found = power_scale(part)
    weight, near = np.array([0.3, -0.075, 4, 2, 0, 0, 1.75, 1.75]), np.array([0.25, -0.0625, 4, 2, 0, 0, 2, 2])
    assert found.power_error == pytest.approx(np.sqrt(((near - weight) ** 2).sum() / (weight**2).sum()))
    assert (found.scales, found.scale_min, found.scale_max) == (4, 0, 8)
    assert (found.exponent_min, found.exponent_max) == (-4, 1)
    # a denominator that is no power of two: sums are multiplied by scale / denominator
    decimal = tensor([[3, 10], [-10, 3]], (-10, -3, 3, 10), 1.1, 10)
    assert power_scale(decimal).exponent_min == power_scale(decimal).exponent_max == -3  # of 0.11
    assert on_powers(decimal).weight().tolist() == [[0.375, 1.25], [-1.25, 0.375]]
    nothing = power_scale(tensor([[1], [1]], (-1, 1), [0.0, 0.0]))
    assert (nothing.exponent_min, nothing.exponent_max, nothing.power_error) == (None, None, 0.0)


def test_what_powers_of_two_cost_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)).eval()
    file, spec = constrained(model), InputSpec(1, 5, 6, (0.5,), (0.25,))
    _, document = reported(model, file, spec, tmp_path / "out", count=40)
    other = copy.deepcopy(model)
    for name, part in file.constrained.items():
        steps = np.broadcast_to(part.scale / part.denominator, len(part.codes)).tolist()
        powers = [min((2.0**k for k in range(-30, 30)), key=lambda power: abs(power - step)) for step in steps]
        codes = torch.from_numpy(part.codes).float()
        other.state_dict()[name].copy_(codes * torch.tensor(powers).reshape(-1, *[1] * (codes.dim() - 1)))
    with np.load(tmp_path / "pictures.npz") as arrays, torch.no_grad():
        inputs = Normalize(spec)(torch.from_numpy(arrays["train_images"])[:, None])
        plain, changed = model(inputs), other(inputs)
    found = document["power_of_two_scales"]
    assert document["pictures"] == 40
    assert found["agreement_percent"] == 100 * (plain.argmax(1) == changed.argmax(1)).double().mean() < 100
    assert found["max_logit_difference"] == pytest.approx(float((plain - changed).abs().max()), rel=1e-5)
    assert found["max_logit"] == pytest.approx(float(plain.abs().max()), rel=1e-5)


# energy


def test_energy_by_hand() -> None:
    found = energy(Work(weights=9, outputs=10, macs=1000, products=100, additions=700, doublings=20))
    assert found.fp32_picojoules == 4600  # 3.7 and 0.9
    assert found.int8_picojoules == 300 + 31  # 0.2 and 0.1, and 3.1 per output
    assert found.shift_add_picojoules == 70 + 4 + 30 + 31
    assert energy(Work()).fp32_picojoules == 0


# golden vectors


def test_golden_vectors_are_what_the_plain_network_gives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, spec, keep = NETWORKS["mobile"]
    model = lived(make())
    file = constrained(model, keep=keep)
    reported(model, file, spec, tmp_path / "out")
    golden = golden_of(tmp_path / "out")
    network = make()
    arrays = {**file.others, **{name: part.weight() for name, part in file.constrained.items()}}
    network.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    outputs: dict[str, Tensor] = {}
    for name, module in network.eval().named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _, __, out, name=name: outputs.update({f"outputs/{name}": out.clone()}))
    with torch.no_grad():
        scores = network(golden["input"])
    assert torch.equal(golden["logits"], scores)
    assert torch.equal(golden["input"], Normalize(spec)(golden["pixels"]))
    assert golden.keys() == {"pixels", "input", "logits", *outputs}
    assert len(golden["pixels"]) == 4
    for name, output in outputs.items():
        assert torch.equal(golden[name], output), name
        assert golden[name].dtype == torch.float32
    reported(model, file, spec, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_large_networks_have_fewer_golden_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(48, 5)).eval()
    for most, count in ((2 * 53 + 52, 2), (1, 1)):
        # importlib, since the package's own name `golden` is the function
        monkeypatch.setattr(importlib.import_module("cbpq.exports.hardware.golden"), "_MOST_VALUES", most)
        hardware_report(model, constrained(model), TINY, tmp_path / str(most))
        assert len(golden_of(tmp_path / str(most))["logits"]) == count


# networks of other kinds


class Attending(nn.Module):
    """nn.MultiheadAttention on patches; tokens come second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(2, 8, 2, stride=2)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT
        scores: Tensor = self.head((x + self.attend(x, x, x, need_weights=False)[0]).mean(1))
        return scores


def test_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attending().eval()
    nn.init.normal_(model.attend.in_proj_bias)
    file = constrained(model, keep=["embed.weight"])
    spec = InputSpec(2, 4, 6, (0.4, 0.5), (0.2, 0.3))  # six tokens
    _, document = reported(model, file, spec, tmp_path / "out")
    macs = {layer["name"]: layer["macs"] for layer in document["layers"]}
    assert macs == {
        "embed.weight": 6 * 64,
        "attend.in_proj_weight": 6 * 24 * 8,
        "attend.out_proj.weight": 6 * 64,
        "head.weight": 24,
    }
    golden = golden_of(tmp_path / "out")
    with torch.no_grad():
        x = model.embed(golden["input"]).flatten(2).mT
        projected = functional.linear(x, model.attend.in_proj_weight, model.attend.in_proj_bias)
        mixed = model.attend(x, x, x)[0]
        torch.testing.assert_close(golden["outputs/attend.in_proj_weight"], projected)
        torch.testing.assert_close(golden["outputs/attend.out_proj"], mixed)
        torch.testing.assert_close(golden["logits"], model(golden["input"]))


def test_a_transformer_of_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {"img_size": 12, "patch_size": 3, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("test_vit", num_classes=4, in_chans=1, **size).eval()
    file = constrained(model, keep=["pos_embed", "cls_token", "reg_token", "patch_embed.proj.weight", "head.weight"])
    _, document = reported(model, file, InputSpec(1, 12, 12, (0.5,), (0.5,)), tmp_path / "out")
    names = [layer["name"] for layer in document["layers"]]
    assert names[0] == "patch_embed.proj.weight"
    assert names[-1] == "head.weight"
    assert {*file.constrained, names[0], names[-1]} == set(names)
    tokens = 16 + 1  # patches, and one that stands for the picture
    for layer in document["layers"][1:-1]:
        assert layer["macs"] == tokens * math.prod(layer["shape"])


class Standardised(nn.Module):
    """Multiplies with something else than the stored weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3)
        self.odd = nn.Conv2d(3, 3, 3)
        self.spare = nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return functional.conv2d(x, self.odd.weight - self.odd.weight.mean()).flatten(1)


def test_weights_that_are_not_multiplied_with_are_named(tmp_path: Path) -> None:
    model = Standardised().eval()
    result, document = reported(model, constrained(model), TINY, tmp_path / "out")
    assert [layer["name"] for layer in document["layers"]] == ["first.weight"]
    assert any("odd.weight, spare.weight" in note for note in result.notes)
    assert document["notes"] == list(result.notes)
    assert "odd.weight, spare.weight" in (tmp_path / "out" / "hardware.md").read_text()


def test_a_network_without_constrained_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 5)).eval()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    _, document = reported(model, CbpqFile({}, state, {}, {}, {}), TINY, tmp_path / "out")
    assert document["totals"]["constrained"]["layers"] == 0
    assert document["power_of_two_scales"]["agreement_percent"] == 100
    assert contents(tmp_path / "out").keys() == FILES - {"histogram.png"}


# the plot


@pytest.mark.parametrize("count", [1, 5, 20, 60])
def test_the_plot_shows_each_histogram(count: int) -> None:
    StepPatch = pytest.importorskip("matplotlib.patches").StepPatch
    rng = np.random.default_rng(0)
    levels = [(-1, 1), (-4, -2, -1, 0, 1, 2, 4), tuple(range(-100, 101))]
    layers = []
    for number in range(count):
        chosen = levels[number % 3]
        part = tensor(rng.choice(chosen, (8, 9)), chosen)
        layers.append(Layer(f"blocks.{number}.a_$rather_$long_name.weight", (8, 9), part, ()))
    figure = figure_of([Layer("stem.weight", (2, 2), None, ()), *layers])
    panels = [panel for panel in figure.axes if panel.get_visible()]
    for panel, layer in zip(panels, layers, strict=True):
        assert layer.tensor is not None
        (stairs,) = panel.patches
        assert isinstance(stairs, StepPatch)
        heights = stairs.get_data().values.tolist()
        assert heights[::2] == [100 * count / 72 for count in layer.tensor.histogram]
        assert not any(heights[1::2])
    width, height = figure.get_size_inches()
    assert width <= 14
    assert height <= 0.5 + 1.6 * -(-count // 6)


def test_the_plot_is_a_picture() -> None:
    pytest.importorskip("matplotlib")
    part = tensor([[1, -1, 1]], (-1, 1))
    with Image.open(io.BytesIO(histogram([Layer("a.weight", (1, 3), part, ())]))) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**16) or []}
    assert (0x44, 0x77, 0xAA) in colours


def test_without_matplotlib_the_plot_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    done = command("export", digits, "--hardware-report", tmp_path / "out", "--data", few(tmp_path))
    assert done.code == 0, done.err
    assert 'the plot is left out: matplotlib is not installed; run: pip install "cbpq[compare]"' in done.err
    assert contents(tmp_path / "out").keys() == FILES - {"histogram.png"}


# the command


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def few(folder: Path) -> Path:
    """Five pictures of the digits' size."""
    return write_pictures(folder / "few.npz", InputSpec(1, 8, 8, (0.5,), (0.5,)))


def test_the_command(digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("export", digits, "--hardware-report", tmp_path / "out", "--data", DATA)
    done = command(*arguments)
    assert done.code == 0, done.err
    assert "hardware-report" in done.out
    assert done.err == ""
    assert contents(tmp_path / "out").keys() == FILES
    document = json.loads((tmp_path / "out" / "hardware.json").read_text())
    file = read(digits)
    loaded = load(digits)
    assert document["pictures"] == 256
    assert document["source"] == file.source
    assert {layer["name"] for layer in document["layers"] if layer["constraint"]} == file.constrained.keys()
    for layer in document["layers"]:
        if part := file.constrained.get(layer["name"]):
            assert layer["codes"] == list(part.levels)
            assert layer["counts"] == list(part.histogram)
            assert layer["weight_bits"] == part.bits == 3
            assert layer["accumulator_bits"] == accumulator_bits(part)
    text = (tmp_path / "out" / "hardware.md").read_text()
    assert "Horowitz" in text
    assert "estimate" in text
    assert all(f"`{layer['name'].removesuffix('.weight')}`" in text for layer in document["layers"])
    golden = golden_of(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded.model(golden["input"]), golden["logits"])
    one_line(command(*arguments), 2, "out exists")
    before = contents(tmp_path / "out")
    done = command(*arguments, "--overwrite", "--json")
    assert done.document()["macs"] == document["totals"]["all"]["macs"]
    assert contents(tmp_path / "out") == before


def test_beside_another_format(digits: Path, tmp_path: Path) -> None:
    data = few(tmp_path)
    both = ("--hardware-report", tmp_path / "report", "--data", data, "-o", tmp_path / "x.pth", "--json")
    document = command("export", digits, *both).document()
    assert document["format"] == "state-dict"
    assert document["hardware_report"]["format"] == "hardware-report"
    assert contents(tmp_path).keys() >= {"x.pth", "report/golden.npz"}
    int8 = ("--format", "c", "--activations", "int8", "--no-check", "-o", tmp_path / "c", "--data", data, "--json")
    document = command("export", digits, "--hardware-report", tmp_path / "again", *int8).document()
    assert document["calibration_pictures"] == 5  # the pictures are for both
    assert document["additions"] == document["hardware_report"]["additions"]


def test_the_library_has_it_as_a_format(digits: Path, tmp_path: Path) -> None:
    """Without data: synthesised pictures."""
    result = export(digits, "hardware-report", tmp_path / "out")
    document = json.loads((tmp_path / "out" / "hardware.json").read_text())
    assert result.to_dict()["macs"] == sum(layer["macs"] for layer in document["layers"])
    assert result.size == sum(map(len, contents(tmp_path / "out").values()))
    assert document["pictures"] == 64
    assert document["notes"] == list(result.notes)
    assert "64 synthesised pictures" in document["notes"][0]


def test_bad_input_is_refused_in_one_line(digits: Path, tmp_path: Path) -> None:
    report = ("--hardware-report", tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "hardware.md").write_text("old")
    write_arrays(tmp_path / "wrong.npz")  # six classes of 8 × 8 pictures; the network knows ten
    (tmp_path / "cut.npz").write_bytes((tmp_path / "wrong.npz").read_bytes()[:200])
    before = contents(tmp_path)
    one_line(command("export", digits), 2, "--output", "--hardware-report")
    one_line(command("export", digits, "--hardware-report", tmp_path / "file"), 2, "file")
    one_line(command("export", digits, "--hardware-report", tmp_path / "no" / "out"), 2, "does not exist")
    foreign = ("--hardware-report", tmp_path / "foreign")
    one_line(command("export", digits, *foreign, "--overwrite"), 2, "thesis.tex")
    one_line(command("export", digits, *foreign, "-o", tmp_path / "x.pth"), 2, "foreign exists")
    one_line(command("export", digits, *report, "--data", tmp_path / "nowhere"), 2, "nowhere")
    old = ("--hardware-report", tmp_path / "old", "--overwrite", "-o", tmp_path / "x.pth")
    refused(command("export", digits, *old, "--data", tmp_path / "cut.npz"), 1, "cut.npz")
    for flags in (("--opset", 21), ("--no-check",), ("--format", "c"), ("--activations", "int8")):
        one_line(command("export", digits, *report, *flags), 2, str(flags[0]).replace("no-", ""), "--output")
    one_line(command("export", digits, *report, "-o", tmp_path / "out", "--format", "c"), 2, "in each other's place")
    one_line(command("export", digits, *report, "-o", tmp_path / "out" / "x.pth"), 2, "in each other's place")
    one_line(command("export", digits, *report, "-o", tmp_path / "b", "--format", "hardware-report"), 2, "the same")
    one_line(command("export", digits, *report, "-o", tmp_path / "x.pth", "--opset", 21), 2, "opset")
    one_line(command("export", tmp_path / "file", *report), 1, "file")
    one_line(command("export", tmp_path / "none", *report), 2, "no such file")
    assert contents(tmp_path) == before


def test_networks_that_cannot_be_run_are_refused(tmp_path: Path) -> None:
    class Broken(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            for layer in self:
                images = layer(images)
            return images @ torch.zeros(1, 1)

    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(48, 5)).eval()
    file = constrained(model)
    out = tmp_path / "out"
    with pytest.raises(CbpqError, match="Broken cannot be run on a picture of 2×5×6"):
        hardware_report(Broken(*model).eval(), file, TINY, out)
    with pytest.raises(CbpqError, match=r"gives \(1, 4, 3, 4\) for one picture"):
        hardware_report(model[:1], constrained(model[:1]), TINY, out)
    with pytest.raises(CbpqError, match=r"does not hold the file's 0\.bias"):
        hardware_report(nn.Sequential(nn.Conv2d(2, 4, 3)), file, TINY, out)
    huge = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(48, 5)).eval()
    with torch.no_grad():
        for part in (huge[0], huge[1]):
            part.get_parameter("weight").fill_(1e30)
    with pytest.raises(CbpqError, match="not finite"):
        hardware_report(huge, constrained(huge), TINY, out)
    assert not out.exists()


def test_pictures_of_some_of_the_classes(tmp_path: Path) -> None:
    file = write_digits(tmp_path)
    for name in ("three", "seven"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (8, 8), 40 * number).save(tmp_path / "photos" / name / f"{number}.png")
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
    asked = ("export", file, "--hardware-report", tmp_path / "report")
    photos = ("--data", tmp_path / "photos")
    refused(command(*asked, *photos), 1, "2 class folders", "10 classes", "--class-map")
    refused(command(*asked, "--class-map", tmp_path / "classes.txt"), 2, "--class-map", "--data")
    assert not (tmp_path / "report").exists()
    outcome = command(*asked, *photos, "--class-map", tmp_path / "classes.txt")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in (tmp_path / "report").iterdir()} == FILES
    refused(
        command("export", file, "--format", "c", *photos, "--activations", "int8", "-o", tmp_path / "c"),
        *(1, "2 class folders", "--class-map"),
    )
