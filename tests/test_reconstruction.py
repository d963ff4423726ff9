"""Reconstruction: each block of a rounded network comes nearer to the original's, and stays on its levels."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from small_job import ALL_FOUR, ARGUMENTS, pictures, write_arrays, write_network
from torch import Tensor, nn

from cbpq import pipeline
from cbpq.blocks import Block
from cbpq.compensation import Rounding, Start, round_network, run_block, walk
from cbpq.errors import TrainingError
from cbpq.layers import choose_layers
from cbpq.levels import Grid, level_set
from cbpq.pipeline import execute
from cbpq.planning import plan
from cbpq.presets import Settings, resolve
from cbpq.reconstruction import Reconstruction, reconstruct, reconstructible

TERNARY = level_set("ternary")


@dataclass(frozen=True)
class Case:
    """An original network, its rounded copy, and what it is reconstructed with."""

    original: nn.Module
    rounded: nn.Module
    starts: dict[str, Start]
    images: list[Tensor]

    @property
    def names(self) -> list[str]:
        return list(self.starts)

    def blocks(self) -> list[Block]:
        return reconstructible(self.rounded, self.names, self.images[0])

    def reconstructed(self, **changes: Any) -> tuple[nn.Module, dict[str, Start]]:
        """A reconstructed copy."""
        model = copy.deepcopy(self.rounded)
        return model, reconstruct(model, self.original, self.starts, plan_of(**changes), self.images)


def plan_of(max_seconds: float = math.inf, **changes: Any) -> Reconstruction:
    return Reconstruction(TERNARY, "cbp", settings_of(**changes), max_seconds)


def settings_of(**changes: Any) -> Settings:
    return resolve("little-data", layers=[("the test", {"reconstruction_steps": 25, **changes})]).settings


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A small trained network, rounded to nearest."""
    path = write_network(tmp_path_factory.mktemp("network") / "net.safetensors", steps=40, **ALL_FOUR)
    original: nn.Module = timm.create_model("test_resnet", **ARGUMENTS | ALL_FOUR)
    original.load_state_dict(load_file(path))
    images = (torch.from_numpy(pictures(64, 100)[0])[:, None] / 255 - 0.5) / 0.25
    return rounded(original.eval().requires_grad_(False), list(images.split(16)))


def rounded(original: nn.Module, images: list[Tensor], granularity: str = "channel") -> Case:
    model = copy.deepcopy(original).requires_grad_(True)
    names = choose_layers(model, example_input=images[0][:1]).constrained
    choices = Rounding(TERNARY, "nearest", granularity=granularity)
    return Case(original, model, round_network(model, original, names, choices), images)


def lost(case: Case, model: nn.Module, inputs_from: nn.Module) -> dict[str, float]:
    """Mean squared error of each block of ``model``: what the block gives for the inputs it has in ``inputs_from``."""
    errors = {}
    for block, before, after in walk(case.original, inputs_from, case.blocks(), case.images):
        changes = [
            (run_block(model, block, own) - run_block(case.original, block, true)).square().mean()
            for true, own in zip(before, after, strict=True)
        ]
        errors[block.path] = float(torch.stack(changes).mean())
    return errors


def check_levels(model: nn.Module, starts: dict[str, Start]) -> None:
    for name, start in starts.items():
        assert torch.equal(Grid(TERNARY, start.scale).nearest(start.latent), model.get_parameter(name)), name
        assert (start.scale > 0).all()
        assert not start.scale.requires_grad
        assert not start.latent.requires_grad
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def same(one: nn.Module, other: nn.Module, names: Sequence[str] | None = None) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], others[name]) for name in (mine if names is None else names))


@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_every_block_comes_nearer_to_the_originals(case: Case, granularity: str) -> None:
    case = rounded(case.original, case.images, granularity)
    model, starts = case.reconstructed()
    before, after = lost(case, case.rounded, model), lost(case, model, model)
    assert list(before) == ["conv1", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    for path, error in before.items():
        assert after[path] < 0.95 * error, path
    assert tuple(starts) == tuple(case.starts)
    check_levels(model, starts)
    with torch.no_grad():
        ends = [torch.cat([net(batch) for batch in case.images]) for net in (case.original, model.eval(), case.rounded)]
    assert (ends[1] - ends[0]).square().mean() < 0.95 * (ends[2] - ends[0]).square().mean()


def test_weights_end_on_other_levels_and_scales_move(case: Case) -> None:
    model, starts = case.reconstructed()
    codes = [
        (Grid(TERNARY, start.scale).codes(start.latent), Grid(TERNARY, old.scale).codes(old.latent))
        for start, old in zip(starts.values(), case.starts.values(), strict=True)
    ]
    assert sum(int((new != old).sum()) for new, old in codes) > 50
    assert all(not torch.equal(starts[name].scale, case.starts[name].scale) for name in case.names)
    assert not same(model, case.rounded)


def test_scales_that_are_not_learned_stay(case: Case) -> None:
    model, starts = case.reconstructed(learn_scales=False, reconstruction_steps=5)
    assert all(torch.equal(starts[name].scale, case.starts[name].scale) for name in case.names)
    check_levels(model, starts)


def test_it_is_the_same_bit_for_bit(case: Case) -> None:
    first, first_starts = case.reconstructed(reconstruction_steps=8)
    torch.manual_seed(99)  # the global generator has no say
    second, second_starts = case.reconstructed(reconstruction_steps=8)
    assert same(first, second)
    for name, start in first_starts.items():
        assert torch.equal(start.latent, second_starts[name].latent)
        assert torch.equal(start.scale, second_starts[name].scale)
    other, _ = case.reconstructed(reconstruction_steps=8, seed=1)
    assert not same(first, other)


def test_only_what_is_in_blocks_changes(case: Case) -> None:
    model, _ = case.reconstructed(reconstruction_steps=4)
    paths = [f"{block.path}." for block in case.blocks()]
    outside = [name for name in model.state_dict() if not name.startswith(tuple(paths))]
    assert "fc.weight" in outside
    assert same(model, case.rounded, [*outside, *dict(case.rounded.named_buffers())])
    inside = [name for name in model.state_dict() if name.startswith(tuple(paths)) and name.endswith("weight")]
    assert not any(same(model, case.rounded, [name]) for name in inside)


class Twice(nn.Module):
    """A layer that runs twice, and so belongs to no block, between others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.again, self.after = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), Branch()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.again(self.first(self.stem(x)).relu()).relu()).relu()
        scores: Tensor = self.head(self.after(x))
        return scores


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x.relu_() + self.two(self.one(x).relu_())
        return result


def test_weights_in_no_block_stay_as_they_are() -> None:
    torch.manual_seed(0)
    images = list(torch.randn(40, 6).split(20))
    case = rounded(Twice().eval().requires_grad_(False), images)
    model, starts = case.reconstructed()
    assert [block.path for block in case.blocks()] == ["first", "after"]
    assert starts["again.weight"] is case.starts["again.weight"]
    assert same(model, case.rounded, ["again.weight", "again.bias", "stem.weight", "head.weight"])
    assert not same(model, case.rounded, ["first.weight"])
    check_levels(model, starts)
    before, after = lost(case, case.rounded, model), lost(case, model, model)
    assert all(after[path] < before[path] for path in before)


def test_a_time_that_is_soon_over_still_gives_a_whole_network(case: Case) -> None:
    steps: list[int] = []
    model = copy.deepcopy(case.rounded)
    plan = plan_of(reconstruction_steps=10**6, max_seconds=1e-6)
    starts = reconstruct(model, case.original, case.starts, plan, case.images, lambda: steps.append(1))
    assert len(steps) == len(case.blocks())  # one for each
    check_levels(model, starts)


def test_every_step_is_announced(case: Case) -> None:
    steps: list[int] = []
    model = copy.deepcopy(case.rounded)
    plan = plan_of(reconstruction_steps=3)
    reconstruct(model, case.original, case.starts, plan, case.images, lambda: steps.append(1))
    assert len(steps) == 3 * len(case.blocks())


def test_a_loss_that_is_not_finite_names_the_block(case: Case) -> None:
    images = [batch.clone() for batch in case.images]
    for batch in images:
        batch[3] = math.nan
    model = copy.deepcopy(case.rounded)
    first = case.blocks()[0].path
    with pytest.raises(TrainingError, match=rf"loss of block {first} became nan in step 1; .*reconstruction_lr"):
        reconstruct(model, case.original, case.starts, plan_of(), images)


def test_the_original_and_the_flags_stay_as_they_were(case: Case) -> None:
    original = copy.deepcopy(case.original).requires_grad_(True).train()
    original.get_submodule("layer1").eval()
    original.get_parameter("fc.bias").requires_grad_(False)
    gradient = torch.ones_like(original.get_parameter("fc.weight"))
    original.get_parameter("fc.weight").grad = gradient
    model = copy.deepcopy(case.rounded).train()
    model.get_submodule("layer2").eval()
    networks = original, model
    flags = [[module.training for module in net.modules()] for net in networks]
    learning = [[parameter.requires_grad for parameter in net.parameters()] for net in networks]
    starts = {name: (start.latent.clone(), start.scale.clone()) for name, start in case.starts.items()}
    images = [batch.clone() for batch in case.images]
    state = torch.get_rng_state()

    with torch.no_grad():  # whoever calls may have switched gradients off
        reconstruct(model, original, case.starts, plan_of(reconstruction_steps=3), case.images)

    assert torch.equal(torch.get_rng_state(), state)
    assert same(original, case.original)
    assert [[module.training for module in net.modules()] for net in networks] == flags
    assert [[parameter.requires_grad for parameter in net.parameters()] for net in networks] == learning
    assert [name for name, parameter in original.named_parameters() if parameter.grad is not None] == ["fc.weight"]
    assert original.get_parameter("fc.weight").grad is gradient
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(batch, old) for batch, old in zip(case.images, images, strict=True))
    for name, (latent, scale) in starts.items():
        assert torch.equal(case.starts[name].latent, latent)
        assert torch.equal(case.starts[name].scale, scale)
    assert not any(module._forward_hooks or module._forward_pre_hooks for net in networks for module in net.modules())


def test_no_steps_are_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("called for nothing")

    monkeypatch.setattr(pipeline, "reconstruct", never)
    source = write_network(tmp_path / "net.safetensors", **ALL_FOUR)
    settings = {"reconstruction_steps": 0, "epochs": 1, "epoch_images": 0, "batch_size": 16}
    job = plan(
        str(source),
        data=str(write_arrays(tmp_path / "data.npz")),
        preset="little-data",
        settings=[("the test", settings)],
        include=["layer3*"],
        device="cpu",
    )
    report = execute(job, tmp_path / "out")
    assert [stage.name for stage in report.stages] == ["nearest rounding", "compensated rounding", "training"]
    assert "reconstruction" not in report.seconds
