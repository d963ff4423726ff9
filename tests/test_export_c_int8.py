"""Export to C with int8 activations: integers everywhere, and exactly those that the reference computes."""

import ctypes
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
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
    write_digits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small_job import ROOT, command, one_line
from torch import Tensor, nn

from cbpq.errors import CbpqError, UsageError
from cbpq.exports import export
from cbpq.exports.c import export_c
from cbpq.exports.c.calibration import ranges
from cbpq.exports.c.integers import Int8Arithmetic, away, factor
from cbpq.exports.c.lowering import exported_program, lower
from cbpq.exports.c.operations import Layer, Network, Unary, View
from cbpq.exports.c.reference import rounded, scores
from cbpq.exports.c.source import SourceWriter
from cbpq.fileformat import CbpqFile
from cbpq.inputs import InputSpec
from cbpq.transforms import Normalize

pytestmark = pytest.mark.medium  # compiles


def noise(spec: InputSpec, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    size = (count, spec.channels, spec.height, spec.width)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


def integers(model: nn.Module, file: CbpqFile, spec: InputSpec) -> tuple[Network, Int8Arithmetic]:
    """What the reference needs, calibrated with noise."""
    program = exported_program(model, spec)
    network = lower(program, model, file)
    arithmetic = Int8Arithmetic(network, ranges(program, noise(spec, 8), spec), spec)
    SourceWriter(network, arithmetic)  # tells it where the scores are made
    return network, arithmetic


def computed(folder: Path, pixels: Tensor, classes: int) -> Tensor:
    """What the C code makes of uint8 pictures (N, C, H, W)."""
    library = ctypes.CDLL(str(compiled(folder, *STRICT, "-shared", "-fPIC", sources=["network.c"], to="network.so")))
    values = torch.empty(pixels[0].numel(), dtype=torch.int8)
    found = torch.empty(len(pixels), classes, dtype=torch.int32)
    for picture, row in zip(pixels.permute(0, 2, 3, 1).contiguous(), found, strict=True):
        library.cbpq_normalize(ctypes.c_void_p(picture.data_ptr()), ctypes.c_void_p(values.data_ptr()))
        library.cbpq_run(ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(row.data_ptr()))
    return found.long()


def check(
    model: nn.Module, file: CbpqFile, spec: InputSpec, out: Path, monkeypatch: pytest.MonkeyPatch, sanitize: bool = True
) -> float:
    """The C code has the integers of the reference, and comes near the float network; returns the relative error."""
    network, arithmetic = integers(model, file, spec)
    monkeypatch.setattr("cbpq.exports.c.pictures", lambda *_: _Chosen(noise(spec, 8)))
    export_c(model, file, spec, out, check=False, activations="int8")
    whole = (out / "network.c").read_text()
    assert not re.search(r"\b(float|double|math\.h)\b", re.sub(r"/\*.*?\*/", "", whole, flags=re.S))
    pixels = noise(spec, 6)
    exact = scores(network, arithmetic, pixels)
    assert torch.equal(computed(out, pixels, exact.shape[1]), exact)
    for flags in (STRICT, SANITIZED) if sanitize else ():
        done = subprocess.run([compiled(out, *flags)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    with torch.no_grad():
        floats = torch.cat([model(picture) for picture in Normalize(spec)(pixels).split(1)])
    return float((exact * arithmetic.score_scale - floats).abs().max() / floats.abs().max())


class _Chosen:
    """Calibration pictures without labels."""

    validation = labels = None
    note = ""

    def __init__(self, calibration: Tensor) -> None:
        self.calibration = calibration


@needs_gcc
@pytest.mark.parametrize("shape", SHAPES)
def test_convolutions_of_every_shape_constraint_and_scale(
    tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    channels = SHAPES[shape]["in_channels"]
    model = Branches(**SHAPES[shape]).eval()
    spec = InputSpec(channels, 5, 6, (0.5,) * channels, (0.5,) * channels)
    file = constrained(model, *CONSTRAINTS, keep=[f"branches.{len(model.branches) - 1}.weight"])
    assert check(model, file, spec, tmp_path / "out", monkeypatch, sanitize=shape == "3x3") < 0.03


@needs_gcc
def test_every_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = lived(Everything(softmax=False))
    assert (
        check(model, constrained(model, "two-bit-shift", keep=("factor",)), TINY, tmp_path / "out", monkeypatch) < 0.1
    )


@needs_gcc
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_as_they_are_used(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    build, spec, keep = NETWORKS[name]
    model = lived(build())
    file = constrained(model, "two-bit-shift", "ternary", keep=keep)
    assert check(model, file, spec, tmp_path / "out", monkeypatch) < 0.2


@needs_gcc
def test_a_network_that_does_not_end_with_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 7, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    assert check(model, constrained(model), TINY, tmp_path / "out", monkeypatch) < 0.05


def test_the_reference_against_whole_numbers_and_fractions() -> None:
    """One sum after another, with Python's exact numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0)), nn.ReLU(), nn.Flatten(), nn.Linear(45, 4)).eval()
    network, arithmetic = integers(model, constrained(model, keep=("3.weight",)), TINY)
    convolution, relu, view, linear = network.operations
    assert isinstance(convolution, Layer)
    assert isinstance(relu, Unary)
    assert isinstance(view, View)
    assert isinstance(linear, Layer)
    for picture in noise(TINY, 3):
        table = arithmetic.pixels()
        values = [
            [[int(table[c][pixel]) for pixel in row] for row in plane] for c, plane in enumerate(picture.tolist())
        ]
        made = []
        for o, y, x in np.ndindex(3, 3, 5):
            total = Fraction()
            for c, v, u in np.ndindex(2, 3, 2):
                if 0 <= 2 * y + v - 1 < 5:
                    total += int(convolution.weight[o, c, v, u]) * values[c][2 * y + v - 1][x + u]
            made.append(max(0, _finished(total, convolution, arithmetic, o, 127)))
        weights = arithmetic.weights(linear).reshape(4, 45)
        sums = [sum(int(weight) * value for weight, value in zip(row, made, strict=True)) for row in weights]
        expected = [_finished(Fraction(total), linear, arithmetic, o, 2**31 - 1) for o, total in enumerate(sums)]
        assert scores(network, arithmetic, picture[None])[0].tolist() == expected


def _finished(total: Fraction, layer: Layer, arithmetic: Int8Arithmetic, channel: int, most: int) -> int:
    multiplier, shift, bias = (int(array[channel]) for array in arithmetic.finishing(layer).values())
    return max(-most, min(most, _away(Fraction(total * multiplier + bias, 2**shift))))


def _away(value: Fraction) -> int:
    size = int(abs(value) + Fraction(1, 2))
    return size if value >= 0 else -size


@settings(deadline=None)
@given(st.lists(st.integers(-(2**60), 2**60), min_size=1), st.integers(0, 58))
def test_rounding_is_to_the_nearest_and_from_the_middle_away_from_zero(values: Sequence[int], shift: int) -> None:
    found = rounded(torch.tensor(values), torch.tensor(shift)).tolist()
    assert found == [_away(Fraction(value, 2**shift)) for value in values]


@given(st.floats(1e-9, 1e9))
def test_a_factor_has_thirty_bits(value: float) -> None:
    multiplier, shift = factor(value)
    assert 0 <= shift <= 40
    assert multiplier <= 2**30
    assert abs(multiplier / 2**shift - value) <= max(value * 2**-29, 2**-41)
    assert away([-2.5, -0.5, 0.49, 0.5, 1.5]).tolist() == [-3, -1, 0, 1, 2]


def test_a_channel_of_zeros_keeps_its_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(36, 2)).eval()
    with torch.no_grad():
        model.get_parameter("1.weight")[1] = 0
        model.get_parameter("1.weight")[2] *= -1
        model.get_parameter("1.bias")[1] = 0.5
    network, arithmetic = integers(model, constrained(model), TINY)
    layer = network.operations[0]
    assert isinstance(layer, Layer)
    arrays = arithmetic.finishing(layer)
    assert arrays["multiplier"][1] == 0
    assert arrays["multiplier"][2] < 0
    step = arithmetic.scales[layer.output]
    assert arrays["bias"][1] / 2.0 ** arrays["shift"][1] * step == pytest.approx(0.5, rel=1e-3)


# from the command


@needs_gcc
def test_the_digits_with_data(tmp_path: Path) -> None:
    file, data = write_digits(tmp_path), ROOT / "examples" / "digits" / "digits.npz"
    arguments = ("export", file, "--format", "c", "--activations", "int8", "--json")
    done = command(*arguments, "-o", tmp_path / "out", "--data", data)
    assert done.code == 0, done.err
    facts = done.document()
    assert facts["exact"] is True
    assert facts["calibration_pictures"] == 256
    assert facts["calibration_agreement_percent"] > 95
    assert abs(facts["top1_int8_percent"] - facts["top1_float_percent"]) < 2
    assert facts["agreement_percent"] > 95
    again = command(*arguments, "-o", tmp_path / "again", "--data", data, "--no-check")
    assert again.code == 0, again.err
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "again")
    )
    assert first == second


def test_pictures_without_labels_and_none_at_all(tmp_path: Path) -> None:
    file = write_digits(tmp_path)
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8))
    arguments = ("export", file, "--format", "c", "--activations", "int8", "--json", "--no-check")
    done = command(*arguments, "-o", tmp_path / "a", "--data", tmp_path / "images.npz")
    assert done.code == 0, done.err
    assert "top1_int8_percent" not in done.document()
    assert 20 <= done.document()["calibration_pictures"] <= 30
    done = command(*arguments, "-o", tmp_path / "b")
    assert done.code == 0, done.err
    assert any("synthesised pictures" in note for note in done.document()["notes"])


def test_refusals_are_one_line(tmp_path: Path) -> None:
    file = write_digits(tmp_path)
    arguments = ("export", file, "--format", "c", "-o", tmp_path / "out")
    one_line(command(*arguments, "--activations", "int4"), 2, "int4", "float or int8")
    one_line(command(*arguments, "--data", tmp_path), 2, "need no pictures")
    one_line(command(*arguments, "--activations", "int8", "--data", tmp_path / "nowhere"), 2, "nowhere")
    one_line(command("export", file, "-o", tmp_path / "x.pth", "--activations", "int8"), 2, "activations")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_integers_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 3), nn.Softmax(1)).eval()
    with pytest.raises(CbpqError, match=r"2 \(aten\.softmax\) has no kernel for int8"):
        export_c(model, constrained(model), TINY, tmp_path / "out", activations="int8")
    wide = nn.Sequential(nn.Flatten(), nn.Linear(60, 3)).eval()
    network, arithmetic = integers(wide, constrained(wide), TINY)
    layer = network.operations[-1]
    assert isinstance(layer, Layer)
    layer = replace(layer, weight=layer.weight.astype(np.int64) * 2**20)
    with pytest.raises(CbpqError, match=r"sums of 1\.weight would not fit 32 bits"):
        arithmetic.finishing(layer)
    with pytest.raises(CbpqError, match="does not fit int8"):
        factor(2.0**31)
    with pytest.raises(UsageError, match="unknown activations"):
        export(constrained(wide), "c", tmp_path / "out", model=wide, spec=TINY, activations="int16")
    assert not list(tmp_path.iterdir())
