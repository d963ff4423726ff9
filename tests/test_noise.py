"""How much of a layer's output signal is left, against what NumPy makes of the layers' outputs."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from small_job import command, write_arrays, write_network
from torch import Tensor, nn

from cbpq.noise import POSITIONS, signal_to_noise

NAMES = ("0.weight", "2.weight", "5.weight")


def network(seed: int = 0) -> nn.Module:
    """A convolution with a bias, one in groups, and a linear map; few enough positions that all are looked at."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 2, stride=2, groups=2, bias=False)),
        *(nn.Flatten(), nn.ReLU(), nn.Linear(36, 5)),
    ).eval()


def disturbed(model: nn.Module, share: float = 0.3) -> nn.Module:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(share * parameter.std() * torch.randn_like(parameter))
    return other


def images(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, 2, 8, 8, generator=generator).cumsum(-1) for size in sizes]


def outputs(model: nn.Module, name: str, batches: Sequence[Tensor]) -> NDArray[np.float64]:
    """What the layer gives at all positions of all pictures: (channels, N)."""
    found: list[NDArray[np.float64]] = []

    def look(module: nn.Module, inputs: object, output: Tensor) -> None:
        found.append(output.transpose(0, 1).flatten(1).double().numpy())

    handle = model.get_submodule(name.removesuffix(".weight")).register_forward_hook(look)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return np.concatenate(found, axis=1)


def expected(original: nn.Module, model: nn.Module, name: str, batches: Sequence[Tensor]) -> float:
    before, after = outputs(original, name, batches), outputs(model, name, batches)
    signal = noise = 0.0
    for x, y in zip(before, after, strict=True):
        shared = np.corrcoef(x, y)[0, 1] ** 2 if y.std() > 0 else 0.0
        signal += float(x.var())
        noise += float(x.var() * (1 - shared))
    return float(10 * np.log10(signal / noise))


@pytest.mark.parametrize("sizes", [(12,), (5, 4, 3)])
def test_the_ratio_is_that_of_the_layers_outputs(sizes: tuple[int, ...]) -> None:
    original = network()
    model, batches = disturbed(original), images(*sizes)
    assert outputs(original, NAMES[0], batches[:1]).shape[1] <= POSITIONS * sizes[0]
    found = signal_to_noise(original, model, NAMES, batches)
    assert tuple(found) == NAMES
    for name in NAMES:
        assert found[name] == pytest.approx(expected(original, model, name, batches), rel=1e-4)
    assert 0 < found[NAMES[0]] < 40


def test_some_positions_say_much_the_same_as_all() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)).eval()
    model, batches = disturbed(original), [torch.randn(16, 2, 20, 20)]
    found = signal_to_noise(original, model, ("0.weight", "2.weight"), batches)
    for name, ratio in found.items():
        assert ratio == pytest.approx(expected(original, model, name, batches), abs=0.5)


def test_a_factor_and_a_shift_of_each_channel_are_no_noise() -> None:
    original, batches = network(), images(6, 6)
    model = disturbed(original)
    before = signal_to_noise(original, model, NAMES[:1], batches)
    factors = torch.tensor([0.5, 2.0, -1.0, 30.0, 0.01, 1.0])
    layer = model.get_submodule("0")
    with torch.no_grad():
        layer.get_parameter("weight").mul_(factors[:, None, None, None])
        layer.get_parameter("bias").add_(factors)
    after = signal_to_noise(original, model, NAMES[:1], batches)
    assert after["0.weight"] == pytest.approx(before["0.weight"], rel=1e-4)


def test_channels_count_by_their_variance_in_the_original() -> None:
    original, batches = network(), images(8)
    with torch.no_grad():
        original.get_parameter("0.weight")[0] *= 1000
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.get_parameter("0.weight")[1:] = torch.randn(5, 2, 3, 3)  # the others hardly matter
    assert signal_to_noise(original, model, NAMES[:1], batches)["0.weight"] > 40


def test_nothing_lost_is_infinite_and_everything_lost_is_zero() -> None:
    original, batches = network(), images(5, 5)
    assert set(signal_to_noise(original, copy.deepcopy(original), NAMES, batches).values()) == {math.inf}
    dead = copy.deepcopy(original)
    with torch.no_grad():
        dead.get_parameter("0.weight").zero_()
    assert signal_to_noise(original, dead, NAMES[:1], batches)["0.weight"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("constant", [0.0, 0.1, 7.3])
def test_a_layer_that_says_the_same_of_everything_has_no_ratio(constant: float) -> None:
    """Also where the sums over so many pictures are off in their last digit."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.other = nn.Linear(7, 3), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.same(torch.full((len(x), 7), constant)) + self.other(x.mean((2, 3)))
            return scores

    torch.manual_seed(0)
    original = Constant()
    for pictures in range(9, 60):
        found = signal_to_noise(original, disturbed(original), ("same.weight", "other.weight"), images(pictures, 8))
        assert math.isnan(found["same.weight"])
        assert math.isfinite(found["other.weight"])


def test_a_weight_that_is_not_seen_at_work_is_left_out() -> None:
    original = network()
    original.add_module("7", nn.Identity())
    original.get_submodule("7").register_parameter("weight", nn.Parameter(torch.ones(3, 3)))
    assert set(signal_to_noise(original, disturbed(original), (*NAMES, "7.weight"), images(4))) == set(NAMES)


def test_both_networks_stay_as_they_were() -> None:
    original = network().train()
    original.insert(1, nn.BatchNorm2d(6))  # type: ignore[operator]  # a Sequential
    model = disturbed(original)
    before = [copy.deepcopy(net.state_dict()) for net in (original, model)]
    state = torch.get_rng_state()
    signal_to_noise(original, model, ("0.weight", "3.weight"), images(4))
    assert torch.equal(torch.get_rng_state(), state)
    for net, old in zip((original, model), before, strict=True):
        assert all(module.training for module in net.modules())
        assert all(torch.equal(tensor, old[name]) for name, tensor in net.state_dict().items())


def test_a_report_with_a_layer_that_has_no_ratio(tmp_path: Path) -> None:
    source = write_network(tmp_path / "net.safetensors", steps=10)
    with safe_open(source, framework="pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in ("conv1.1.weight", "conv1.1.bias"):  # the normalisation before the second convolution: all is 0
        state[name] = torch.zeros_like(state[name])
    save_file(state, source, metadata)
    data = write_arrays(tmp_path / "data.npz")
    flags = ("--epochs", 0, "--device", "cpu", "-o", tmp_path / "out", "--include", "conv1.3", "-b", 16)
    outcome = command("quantize", source, "--data", data, *flags)
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["name"]: row["snr"] for row in report["layers"]} == {"conv1.3.weight": None}
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert sum("conv1.3.weight" in line and "| – |" in line for line in lines) == 1
    assert "nan" not in outcome.out
