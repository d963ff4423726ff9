"""Whole networks rounded without training: where their weights end, what else changes, and what it is good for."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from small_job import ALL_FOUR, ARGUMENTS, pictures, write_network
from torch import Tensor, nn
from torch.nn import functional

from cbpq import compensation
from cbpq.blocks import find_blocks
from cbpq.compensation import Rounding, Start, round_network, run_block, walk
from cbpq.layers import choose_layers
from cbpq.levels import CONSTRAINTS, Grid, level_set
from cbpq.scales import initial_scale
from cbpq.uses import watching

RULES = ("compensated", "nearest")
TWO_BIT = Rounding(CONSTRAINTS["two-bit-shift"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A small residual network after some training."""
    path = write_network(tmp_path_factory.mktemp("network") / "network.safetensors", steps=40, **ALL_FOUR)
    model: nn.Module = timm.create_model("test_resnet", **ARGUMENTS | ALL_FOUR)
    model.load_state_dict(load_file(path))
    return model.eval()


def photos(count: int = 48, seed: int = 100) -> list[Tensor]:
    """Batches of unequal size, as the trained network takes them."""
    images = (torch.from_numpy(pictures(count, seed)[0])[:, None] / 255 - 0.5) / 0.25
    return list(images.split(20))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(*shape: int) -> list[Tensor]:
    """Correlated random pictures, in two batches."""
    images = noise(*shape)
    return list((images.cumsum(-1) + 0.5).split(-(-shape[0] * 2 // 3)))


class Depthwise(nn.Module):
    """Grouped convolutions, normalized, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide, self.norm1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.deep, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 8, 3, stride=2, groups=4, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.norm1(self.wide(self.stem(x))))
        x = x + functional.relu6(self.norm2(self.deep(x)))
        scores: Tensor = self.head(self.grouped(x).relu().mean((2, 3)))
        return scores


class Attention(nn.Module):
    """Torch's own attention and encoder layer on tokens (B, T, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.encoder(x + self.attention(x, x, x, need_weights=False)[0])
        scores: Tensor = self.head(x.mean(1))
        return scores


class Multiplied(nn.Module):
    """One layer's weight is used through ``torch.matmul``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Linear(6, 8), nn.Linear(8, 8)
        self.odd, self.last, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x)).relu()
        x = torch.matmul(x, self.odd.weight.T).relu()
        scores: Tensor = self.head(self.last(x).relu())
        return scores


class Twice(nn.Module):
    """A layer that runs twice, between others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.after = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.again(self.stem(x)).relu()).relu()
        scores: Tensor = self.head(self.after(x).relu())
        return scores


def plain() -> nn.Module:
    """Biases, no normalization, in-place activations, and more layers than one block holds."""
    inner = [layer for _ in range(9) for layer in (nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True))]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Sequential(*inner), head)


def late_norm() -> nn.Module:
    """An in-place activation between convolution and normalization."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, bias=False), nn.ReLU(inplace=True), nn.BatchNorm2d(6)),
        *(nn.Conv2d(6, 6, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )


def double_norm() -> nn.Module:
    """A convolution whose output is normalized, and one that nothing can restore."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6), nn.GELU()),
        *(nn.Conv2d(6, 6, 1, bias=False), nn.GroupNorm(2, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[Tensor]]] = {
    "depthwise": (Depthwise, batches(40, 3, 6, 6)),
    "attention": (Attention, batches(60, 7, 6)),
    "multiplied": (Multiplied, batches(90, 6)),
    "twice": (Twice, batches(90, 6)),
    "plain": (plain, batches(30, 3, 7, 7)),
    "late norm": (late_norm, batches(40, 3, 7, 7)),
    "double norm": (double_norm, batches(40, 3, 7, 7)),
}
every_network = pytest.mark.parametrize("kind", NETWORKS)


def network(kind: str, seed: int = 3) -> tuple[nn.Module, list[Tensor]]:
    """A random network with the running statistics of its pictures, in evaluation mode."""
    torch.manual_seed(seed)
    make, images = NETWORKS[kind]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for batch in images:
            model(batch)
    return model.eval(), images


def constrained(model: nn.Module, images: Sequence[Tensor]) -> tuple[str, ...]:
    return choose_layers(model, example_input=images[0][:1]).constrained


def rounded(
    model: nn.Module, images: Sequence[Tensor], choices: Rounding = TWO_BIT
) -> tuple[nn.Module, dict[str, Start]]:
    """A rounded copy."""
    result = copy.deepcopy(model)
    return result, round_network(result, model, constrained(model, images), choices, images)


@torch.no_grad()
def lost(model: nn.Module, other: nn.Module, images: Sequence[Tensor]) -> float:
    """Mean squared change of the outputs."""
    changes = [(model(batch) - other(batch)).square().flatten() for batch in images]
    return float(torch.cat(changes).mean())


def check_levels(model: nn.Module, starts: dict[str, Start], choices: Rounding) -> None:
    """Every constrained weight lies exactly on its grid, and all are finite."""
    for name, start in starts.items():
        weight = model.get_parameter(name)
        grid = Grid(choices.levels, start.scale)
        assert start.latent.shape == weight.shape
        assert start.latent.dtype == start.scale.dtype == weight.dtype
        channels = (len(weight), *[1] * (weight.dim() - 1))
        assert start.scale.shape == (channels if choices.granularity == "channel" else ())
        assert (start.scale > 0).all()
        assert torch.equal(grid.nearest(start.latent), weight)
        assert torch.equal(grid.codes(start.latent) * (start.scale / choices.levels.denominator), weight)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("granularity", ["channel", "layer"])
@pytest.mark.parametrize("rule", ["nearest", "compensated"])
@every_network
def test_weights_end_on_their_levels_and_little_else_changes(kind: str, rule: str, granularity: str) -> None:
    model, images = network(kind)
    choices = Rounding(level_set("ternary"), rule, granularity=granularity)
    before = copy.deepcopy(model.state_dict())
    result, starts = rounded(model, images, choices)
    names = constrained(model, images)
    assert tuple(starts) == names
    check_levels(result, starts, choices)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for name, tensor in result.state_dict().items():
        may = name in names or (rule == "compensated" and name.endswith(("bias", "running_mean")))
        assert may or torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("name", ["one-bit-shift", "levels:-1,-0.3,0.3,1", "levels:0,1"])
def test_every_constraint_on_a_trained_network(trained: nn.Module, name: str) -> None:
    choices = Rounding(level_set(name))
    result, starts = rounded(trained, photos(), choices)
    check_levels(result, starts, choices)


@pytest.mark.parametrize("name", ["binary", "two-bit-shift"])
def test_compensation_keeps_the_outputs_of_a_trained_network(trained: nn.Module, name: str) -> None:
    compensated, _ = rounded(trained, photos(), Rounding(level_set(name)))
    nearest, _ = rounded(trained, photos(), Rounding(level_set(name), "nearest"))
    assert lost(trained, compensated, photos()) < 0.5 * lost(trained, nearest, photos())
    unseen = photos(seed=7)
    assert lost(trained, compensated, unseen) < 0.7 * lost(trained, nearest, unseen)


@every_network
def test_compensation_keeps_the_outputs_of_all_kinds_of_networks(kind: str) -> None:
    losses = dict.fromkeys(RULES, 0.0)
    for seed in range(3):
        model, images = network(kind, seed)
        for rule in RULES:
            losses[rule] += lost(model, rounded(model, images, Rounding(level_set("ternary"), rule))[0], images)
    assert losses["compensated"] < 0.8 * losses["nearest"]


@pytest.mark.parametrize("kind", ["depthwise", "attention", "plain", "double norm"])
def test_the_mean_output_of_each_layer_is_restored(kind: str) -> None:
    model, images = network(kind)
    result, _ = rounded(model, images)
    names = constrained(model, images)
    before, after = means(model, names, images), means(result, names, images)
    parameters, buffers = dict(result.named_parameters()), dict(result.named_buffers())
    unrestored = []
    for name in names:
        bias = name.removesuffix("weight") + "bias"
        norm = {"wide.weight": "norm1.running_mean", "deep.weight": "norm2.running_mean"}.get(name, "")
        norm = norm or {"double norm1.weight": "2.running_mean"}.get(kind + name, "")
        if bias in parameters:
            shift = parameters[bias] - model.get_parameter(bias)
        elif norm:
            shift = model.get_buffer(norm) - buffers[norm]
        else:
            unrestored.append(name)
            continue
        assert shift.abs().max() > 1e-4  # there was something to restore
        torch.testing.assert_close(after[name] + shift.detach(), before[name], rtol=1e-4, atol=1e-4)
    assert unrestored == (["4.weight"] if kind == "double norm" else [])


def means(model: nn.Module, names: Sequence[str], images: Sequence[Tensor]) -> dict[str, Tensor]:
    """What each weight gives on average over pictures and positions, without the bias."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.no_grad():
        with watching(model, names, lambda name, use: found[name].append(use.columns())):
            for batch in images:
                model(batch)
        result = {}
        for name, columns in found.items():
            inputs = torch.cat(columns, dim=2).double()
            weight = model.get_parameter(name).double()
            rows = weight.reshape(len(inputs), len(weight) // len(inputs), -1)
            result[name] = (rows @ inputs.mean(2, keepdim=True)).flatten().float()
    return result


def test_a_normalization_behind_an_activation_is_none_of_the_convolutions() -> None:
    model, images = network("late norm")
    result, _ = rounded(model, images)
    assert torch.equal(result.get_buffer("3.running_mean"), model.get_buffer("3.running_mean"))


def test_a_weight_that_is_multiplied_in_other_ways_is_rounded_to_nearest() -> None:
    model, images = network("multiplied")
    result, starts = rounded(model, images)
    weight = model.get_parameter("odd.weight")
    scale = initial_scale(weight, TWO_BIT.levels, "least-squares", "channel")
    assert torch.equal(starts["odd.weight"].scale, scale)
    assert torch.equal(starts["odd.weight"].latent, weight)
    assert torch.equal(result.get_parameter("odd.weight"), Grid(TWO_BIT.levels, scale).nearest(weight.detach()))
    assert torch.equal(result.get_parameter("odd.bias"), model.get_parameter("odd.bias"))
    assert not torch.equal(starts["last.weight"].latent, model.get_parameter("last.weight"))


@pytest.mark.parametrize("rule", ["mean-abs", "least-squares"])
def test_nearest_needs_no_pictures(trained: nn.Module, rule: str) -> None:
    choices = Rounding(level_set("ternary"), "nearest", rule, "layer")
    result = copy.deepcopy(trained)
    names = choose_layers(trained).constrained
    called: list[int] = []
    starts = round_network(result, trained, names, choices, on_layer=lambda: called.append(1))
    assert len(called) == len(names)
    for name in names:
        weight = trained.get_parameter(name).detach()
        assert torch.equal(starts[name].latent, weight)
        assert torch.equal(starts[name].scale, initial_scale(weight, choices.levels, rule, "layer"))
    check_levels(result, starts, choices)
    state = trained.state_dict()
    assert [n for n, tensor in result.state_dict().items() if not torch.equal(tensor, state[n])] == sorted(
        names, key=list(state).index
    )


@every_network
def test_each_layer_is_announced_once(kind: str) -> None:
    model, images = network(kind)
    names = constrained(model, images)
    called: list[int] = []
    round_network(copy.deepcopy(model), model, names, TWO_BIT, images, lambda: called.append(1))
    assert len(called) == len(names)


@pytest.mark.parametrize("kind", ["depthwise", "attention", "plain", "twice"])
def test_the_same_call_gives_the_same_bits(kind: str) -> None:
    model, images = network(kind)
    first, starts = rounded(model, images)
    torch.manual_seed(99)
    second, again = rounded(model, images)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert all(torch.equal(starts[name].latent, again[name].latent) for name in starts)


@pytest.mark.parametrize("kind", ["depthwise", "attention", "plain"])
def test_random_state_hooks_and_flags_are_as_before(kind: str) -> None:
    model, images = network(kind)
    model.train()
    next(model.modules()).training = False
    result = copy.deepcopy(model)
    flags = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    kept = [batch.clone() for batch in images]
    round_network(result, model, constrained(model, images), TWO_BIT, images)
    assert torch.equal(torch.rand(3), expected)
    for net in (model, result):
        assert [module.training for module in net.modules()] == flags
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(torch.equal(batch, before) for batch, before in zip(images, kept, strict=True))


def same(images: Sequence[Tensor], *shape: int, value: float) -> list[Tensor]:
    return [torch.full((shape[0] if shape else len(batch), *batch.shape[1:]), value) for batch in images]


@every_network
def test_a_single_picture(kind: str) -> None:
    model, images = network(kind)
    result, starts = rounded(model, [images[0][:1]])
    check_levels(result, starts, TWO_BIT)
    near(model, result)


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.0])
@every_network
def test_pictures_of_one_colour(kind: str, value: float) -> None:
    model, images = network(kind)
    result, starts = rounded(model, same(images, value=value))
    check_levels(result, starts, TWO_BIT)
    near(model, result)


def near(model: nn.Module, result: nn.Module) -> None:
    """No weight was led astray by what the pictures do not tell."""
    for (name, before), after in zip(model.named_parameters(), result.parameters(), strict=True):
        if before.dim() > 1:
            assert after.abs().max() <= 5 * before.abs().max(), name


@pytest.mark.parametrize("bias", [-1000.0, 1000.0])
def test_channels_that_are_always_zero_or_always_the_same(bias: float) -> None:
    model, images = network("plain")
    with torch.no_grad():
        model.get_parameter("0.weight")[:2] = 0  # constant channels: dead, or far from zero
        model.get_parameter("0.bias")[:2] = bias
        model.get_parameter("2.0.bias")[3:] = -1000
    result, starts = rounded(model, images)
    check_levels(result, starts, TWO_BIT)
    near(model, result)


def test_every_channel_constant() -> None:
    model, images = network("double norm")
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
        model.get_parameter("0.bias").copy_(torch.linspace(-3, 900, 6))
    result, starts = rounded(model, images)
    check_levels(result, starts, TWO_BIT)
    near(model, result)


@pytest.mark.medium
def test_fewer_pictures_where_memory_is_short(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    images = list(torch.cat(photos(24)).split(2))
    names = constrained(trained, images)
    blocks = find_blocks(trained, names, images[0])

    def used() -> list[int]:
        other = copy.deepcopy(trained)
        return [sum(map(len, before)) for _, before, after in walk(trained, other, blocks, images) if len(after)]

    assert used() == [24] * len(blocks)
    monkeypatch.setattr(compensation, "MEMORY", 1)
    monkeypatch.setattr(compensation, "FEWEST_PICTURES", 8)
    assert used() == [8] * len(blocks)
    few, starts = rounded(trained, images)
    check_levels(few, starts, TWO_BIT)
    assert not any(module._forward_pre_hooks for module in (*trained.modules(), *few.modules()))
    expected, _ = rounded(trained, images[:4])
    assert all(torch.equal(a, b) for a, b in zip(few.parameters(), expected.parameters(), strict=True))
    monkeypatch.setattr(compensation, "FEWEST_PICTURES", 5)
    assert used() == [6] * len(blocks)


@pytest.mark.medium
def test_a_bound_on_columns_takes_some_positions_of_every_picture(
    trained: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything, _ = rounded(trained, photos())
    monkeypatch.setattr(compensation, "COLUMNS", 48 * 9)
    monkeypatch.setattr(compensation, "COLUMNS_PER_INPUT", 1)
    some, starts = rounded(trained, photos())
    check_levels(some, starts, TWO_BIT)
    nearest, _ = rounded(trained, photos(), Rounding(TWO_BIT.levels, "nearest"))
    assert lost(everything, some, photos()) > 0
    assert lost(trained, some, photos()) < 0.7 * lost(trained, nearest, photos())


@every_network
def test_blocks_are_given_what_flows_through_both_networks(kind: str) -> None:
    model, images = network(kind)
    result, _ = rounded(model, images)
    blocks = find_blocks(model, constrained(model, images), images[0])
    for block, before, after in walk(model, result, blocks, images):
        for net, given in ((model, before), (result, after)):
            real: list[Tensor] = []
            module = net.get_submodule(block.path)
            handle = module.register_forward_pre_hook(lambda _, inputs, real=real: real.append(inputs[0].clone()))
            with torch.no_grad():
                for batch in images:
                    net(batch)
            handle.remove()
            assert all(torch.equal(a, b) for a, b in zip(given, real, strict=True))


def test_blocks_that_change_their_input_in_place() -> None:
    torch.manual_seed(0)
    inner = [nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)) for _ in range(9)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(*inner), nn.Flatten(), nn.Linear(16, 2)).eval()
    images = batches(9, 3, 2, 2)
    for block, before, _ in walk(model, model, find_blocks(model, constrained(model, images), images[0]), images):
        kept = [batch.clone() for batch in before]
        assert any((batch < 0).any() for batch in kept)
        for batch in before:
            run_block(model, block, batch)
        assert all(torch.equal(batch, other) for batch, other in zip(before, kept, strict=True))


def test_inputs_far_from_zero() -> None:
    model, images = network("double norm")
    with torch.no_grad():
        model.get_parameter("0.bias").add_(3000)
    compensated, nearest = (rounded(model, images, Rounding(level_set("ternary"), rule))[0] for rule in RULES)
    before, result, other = (
        torch.cat([net.get_submodule("1")(net.get_submodule("0")(batch)) for batch in images])
        for net in (model, compensated, nearest)
    )
    spread = [(part - before).std(dim=(0, 2, 3)).square().mean() for part in (result, other)]
    assert spread[0] < spread[1]


def test_pictures_in_batches_or_alone_give_the_same_levels() -> None:
    model, images = network("depthwise")
    single = list(torch.cat(images).split(1))
    starts, alone = rounded(model, images)[1], rounded(model, single)[1]
    for name in starts:
        torch.testing.assert_close(alone[name].scale, starts[name].scale, rtol=1e-3, atol=1e-4)


def test_networks_in_channels_last() -> None:
    model, images = network("depthwise")
    usual, _ = rounded(model, images)
    last, starts = rounded(model.to(memory_format=torch.channels_last), images)
    check_levels(last, starts, TWO_BIT)
    assert all(start.latent.is_contiguous() for start in starts.values())
    assert lost(model, last, images) < 1.5 * lost(model, usual, images)


def unused(*_: Any) -> None:
    raise AssertionError


def test_an_error_in_between_leaves_no_hooks() -> None:
    model, images = network("plain")
    result = copy.deepcopy(model)
    with pytest.raises(AssertionError):
        round_network(result, model, constrained(model, images), TWO_BIT, images, unused)
    for net in (model, result):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


# Layers that stay float


def fitted(model: nn.Module, images: Sequence[Tensor], *exclude: str) -> tuple[nn.Module, tuple[str, ...]]:
    """A rounded copy in which float layers were fitted, and their names."""
    choice = choose_layers(model, example_input=images[0][:1], exclude=exclude)
    result = copy.deepcopy(model)
    ternary = Rounding(level_set("ternary"))
    starts = round_network(result, model, choice.constrained, ternary, images, after=choice.after)
    assert list(starts) == list(choice.constrained)
    check_levels(result, starts, ternary)
    return result, tuple(name for name in choice.after if name not in starts)


@pytest.mark.medium
def test_the_classifier_makes_up_for_the_layers_before_it(trained: nn.Module) -> None:
    images = photos(96)
    result, names = fitted(trained, images)
    assert names == ("fc.weight",)
    assert not torch.equal(result.get_parameter("fc.weight"), trained.get_parameter("fc.weight"))
    plain = rounded(trained, images, Rounding(level_set("ternary")))[0]
    unseen = photos(96, seed=500)
    assert lost(trained, result, images) < 0.9 * lost(trained, plain, images)
    assert lost(trained, result, unseen) < 0.95 * lost(trained, plain, unseen)


def test_a_fitted_layer_is_the_ridge_solution_about_the_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    images = [noise(400, 6), noise(200, 6, seed=1)]
    result, names = fitted(model, images)
    assert names == ("4.weight",)
    with torch.no_grad():
        before, after = (torch.cat([net[:4](batch) for batch in images]).double() for net in (model, result))  # type: ignore[index]  # both are Sequential
    x, y = before - before.mean(0), after - after.mean(0)
    weight = model.get_parameter("4.weight").detach().double()
    h = y.T @ y
    damping = 0.01 * h.diagonal().mean() * torch.eye(8)
    expected = weight @ (x.T @ y + damping) @ (h + damping).inverse()
    torch.testing.assert_close(result.get_parameter("4.weight").detach().double(), expected, rtol=1e-4, atol=1e-5)
    # and on average it gives what it gave
    with torch.no_grad():
        means = [torch.cat([net(batch) for batch in images]).mean(0) for net in (model, result)]
    torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-5)


def test_few_inputs_leave_it_as_it_is(trained: nn.Module) -> None:
    result, _ = fitted(trained, photos(8))
    assert torch.equal(result.get_parameter("fc.weight"), trained.get_parameter("fc.weight"))


def test_layers_before_the_first_constrained_one_stay(trained: nn.Module) -> None:
    result, names = fitted(trained, photos(64), "conv1*", "layer1*", "layer2*", "layer3*")
    untouched_ones = {
        name for name in dict(trained.named_parameters()) if name.startswith(("conv1", "layer1", "layer2"))
    }
    assert not untouched_ones & set(names)
    for name in untouched_ones:
        assert torch.equal(result.get_parameter(name), trained.get_parameter(name))
