"""Feature distillation: what the blocks' outputs add to the loss, and that nothing of it stays behind."""

import copy
from pathlib import Path

import pytest
import torch
from small_job import ALL_FOUR, write_arrays, write_network
from torch import Tensor, nn

from cbpq.blocks import Block
from cbpq.data import load_data
from cbpq.features import FeaturePair
from cbpq.layers import choose_layers
from cbpq.levels import level_set
from cbpq.models import load_model
from cbpq.presets import resolve
from cbpq.settling import finish
from cbpq.training import Run, Step, prepare, train

SAME = torch.ones(2, 3)  # logits that agree
BLOCKS = (Block("0", ("0.weight",)), Block("", ("4.weight",)), Block("2", ("2.weight",)))


def network(seed: int, inplace: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    relu, other = nn.ReLU(inplace=inplace), nn.ReLU(inplace=inplace)
    return nn.Sequential(nn.Conv2d(1, 3, 3), relu, nn.Conv2d(3, 4, 3), other, nn.Conv2d(4, 2, 1), nn.Flatten())


def images() -> Tensor:
    return torch.randn(5, 1, 7, 7, generator=torch.Generator().manual_seed(1))


def by_hand(model: nn.Module, teacher: nn.Module, inputs: Tensor) -> float:
    """Mean over the two lone blocks, from outputs that no activation has touched."""
    total = 0.0
    with torch.no_grad():
        for last in (1, 3):
            own: Tensor = nn.Sequential(*list(model.children())[:last])(inputs.clone())
            target: Tensor = nn.Sequential(*list(teacher.children())[:last])(inputs.clone())
            total += float((own - target).square().mean() / target.square().mean()) / 2
    return total


def hooks(*networks: nn.Module) -> int:
    return sum(len(module._forward_hooks) for net in networks for module in net.modules())


@pytest.mark.parametrize("inplace", [True, False])
def test_the_loss_is_each_blocks_error_in_units_of_its_energy(inplace: bool) -> None:
    model, teacher = network(1, inplace), network(2, inplace)
    pair = FeaturePair(model, teacher, BLOCKS)
    model(images())
    teacher(images())
    assert float(pair.loss(SAME, SAME).detach()) == pytest.approx(by_hand(model, teacher, images()), rel=1e-5)
    assert by_hand(model, teacher, images()) > 0.1


def test_logits_count_like_all_blocks_together() -> None:
    model, teacher = network(1), network(2)
    pair = FeaturePair(model, teacher, BLOCKS)
    model(images())
    teacher(images())
    blocks = float(pair.loss(SAME, SAME).detach())
    assert float(pair.loss(2 * SAME, 3 * SAME).detach()) == pytest.approx(blocks + 1 / 9)
    assert float(pair.loss(2 * SAME, 3 * SAME, 0.25).detach()) == pytest.approx(blocks / 4 + 1 / 9)


def test_the_same_network_loses_nothing() -> None:
    model = network(1)
    pair = FeaturePair(model, teacher := copy.deepcopy(model), BLOCKS)
    model(images())
    teacher(images())
    assert float(pair.loss(SAME, SAME).detach()) == 0


def test_the_last_forward_pass_counts() -> None:
    model, teacher = network(1), network(2)
    pair = FeaturePair(model, teacher, BLOCKS)
    for inputs in (images() + 1, images()):
        model(inputs)
        teacher(inputs)
    assert float(pair.loss(SAME, SAME).detach()) == pytest.approx(by_hand(model, teacher, images()), rel=1e-5)


def test_the_whole_network_is_no_block_of_its_own() -> None:
    model, teacher = network(1), network(2)
    pair = FeaturePair(model, teacher, [Block("", ("0.weight",))])
    assert hooks(model, teacher) == 0
    assert float(pair.loss(SAME, SAME).detach()) == 0


def test_a_target_that_never_changes_gives_a_finite_loss() -> None:
    model, teacher = network(1), network(2)
    with torch.no_grad():
        teacher.get_parameter("0.weight").zero_()
    pair = FeaturePair(model, teacher, BLOCKS[:1])
    model(images())
    teacher(images())
    assert pair.loss(SAME, SAME).isfinite()


def test_gradients_reach_the_network_only() -> None:
    model, teacher = network(1), network(2).requires_grad_(False)
    pair = FeaturePair(model, teacher, BLOCKS)
    model(images())
    teacher(images())
    pair.loss(SAME, SAME).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for name in ("0.weight", "2.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.abs().max() > 0
    assert model.get_parameter("4.weight").grad is None  # no block looks at it

    # the slope is that of the loss, measured
    weight, step = model.get_parameter("0.weight"), 1e-2
    assert weight.grad is not None
    slope = float(weight.grad[0, 0, 1, 1])
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0, 1, 1] += sign * step
            values.append(by_hand(model, teacher, images()))
            weight[0, 0, 1, 1] -= sign * step
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.05, abs=1e-3)


def test_removed_means_that_nothing_is_left() -> None:
    model, teacher = network(1), network(2)
    pair = FeaturePair(model, teacher, BLOCKS)
    assert hooks(model, teacher) == 4
    model(images())
    pair.remove()
    assert hooks(model, teacher) == 0
    assert not pair._own
    assert not pair._teachers


# In training


def run_of(folder: Path, compared: str, **settings: object) -> Run:
    """A run on a small network, not begun."""
    path = folder / "net.safetensors"
    loaded = load_model(str(path if path.exists() else write_network(path, steps=20, **ALL_FOUR)))
    chosen = {"distillation_loss": compared, "epochs": 1, "batch_size": 16} | settings
    data = load_data(
        str(write_arrays(folder / "data.npz")), loaded.info.input_spec, loaded.num_classes, batch_size=16, seed=0
    )
    assert data.train is not None
    layers = choose_layers(loaded.model, input_spec=loaded.info.input_spec)
    return prepare(
        loaded.model,
        data.train,
        levels=level_set("ternary"),
        method="cbp",
        settings=resolve("little-data", layers=[("the test", chosen)]).settings,
        layers=layers,
        device=torch.device("cpu"),
    )


def losses(run: Run) -> list[float]:
    return [event.loss for event in train(run) if isinstance(event, Step)]


def test_training_lowers_it_and_leaves_no_hooks(tmp_path: Path) -> None:
    run = run_of(tmp_path, "features")
    assert run.teacher is not None
    assert run.features is not None
    assert hooks(run.model) == hooks(run.teacher) > 3
    with_features = losses(run)
    assert len(with_features) == 6
    without = run_of(tmp_path, "kl")
    assert without.features is None
    assert hooks(without.model) == 0
    assert losses(without)[0] != with_features[0]
    finish(run)
    assert hooks(run.model, run.teacher) == 0


def test_blocks_fade_along_the_budget(tmp_path: Path) -> None:
    run = run_of(tmp_path, "features", blocks_fade=True)
    assert run.features is not None
    whole, weights = run.features.loss, []

    def noting(output: Tensor, target: Tensor, weight: float = 1.0) -> Tensor:
        weights.append(weight)
        return whole(output, target, weight)

    run.features.loss = noting  # type: ignore[method-assign]  # to see what training asks for
    fading = losses(run)
    assert weights == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    constant = losses(run_of(tmp_path, "features"))
    assert fading[0] == constant[0]
    assert fading[-1] < constant[-1]
