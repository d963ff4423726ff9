"""The two-line API in training loops as people write them."""

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import cbpq
from cbpq import weights
from cbpq.constrained import Constrained
from cbpq.errors import CbpqError, UsageError
from cbpq.fileformat import read
from cbpq.levels import CONSTRAINTS, Grid, level_set
from cbpq.methods import METHODS
from cbpq.scales import SMALLEST_SCALE
from cbpq.weights import scale_gradient, scale_sums

NAMES = (*CONSTRAINTS, "shift:3", "levels:-1,-0.3,0.5")


class Net(nn.Module):
    """Stem, one convolution, one linear layer, head: the two in the middle are constrained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3)
        self.linear = nn.Linear(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x).relu()).relu().mean((2, 3))
        out: Tensor = self.head(self.linear(x).relu())
        return out


CONSTRAINED = ("conv.weight", "linear.weight")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net()


def sgd(model: nn.Module, **given: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **given})


LABELS = torch.arange(24) % 3
IMAGES = 0.5 * torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(2))
IMAGES += nn.functional.one_hot(LABELS, 3)[:, :, None, None]


def loss_of(model: nn.Module, chosen: slice = slice(None), images: Tensor = IMAGES) -> Tensor:
    return nn.functional.cross_entropy(model(images[chosen].to(next(model.parameters()).dtype)), LABELS[chosen])


def step(model: nn.Module, optimizer: torch.optim.Optimizer, chosen: slice = slice(None)) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, chosen)
    loss.backward()
    optimizer.step()
    return loss.item()


def allowed(grid: Grid) -> Tensor:
    """All allowed weights, (C or 1, levels)."""
    codes = torch.tensor(grid.level_set.codes, dtype=grid.scale.dtype)
    return codes * (grid.scale.detach() / grid.level_set.denominator).reshape(-1, 1)


def on_levels(parameter: Tensor, grid: Grid) -> bool:
    levels = allowed(grid)
    return bool((parameter.reshape(len(levels), -1, 1) == levels.unsqueeze(1)).any(-1).all())


def holds(constrained: Constrained) -> bool:
    """Every constrained parameter holds the nearest level of its latent weight, to the bit."""
    parameters = dict(constrained.model.named_parameters())
    return all(
        torch.equal(parameters[name], constrained.grid(name).nearest(constrained.latent(name)))
        and on_levels(parameters[name], constrained.grid(name))
        for name in constrained.names
    )


def everything(constrained: Constrained) -> dict[str, Tensor]:
    """Copies of all tensors: the network's and those beside it."""
    kept = {f"network/{name}": tensor.clone() for name, tensor in constrained.model.state_dict().items()}
    for name, tensors in constrained.state_dict()["weights"].items():
        kept |= {f"{name}/{key}": tensor.clone() for key, tensor in tensors.items()}
    return kept


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "plain sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.2),
    "nesterov": lambda model: sgd(model, nesterov=True, weight_decay=1e-4),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05),
    "one at a time": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.005),
}


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_plain_loop(optimizer: str, preset: str) -> None:
    model = net()
    chosen = OPTIMIZERS[optimizer](model)
    constrained = cbpq.constrain(model, chosen, "ternary", preset=preset, epochs=5, patience=2)
    assert constrained.names == CONSTRAINED
    before = loss_of(model).item()
    for _ in range(5):
        loss_sum = sum(step(model, chosen) for _ in range(12))
        constrained.end_epoch(loss_sum)
    constrained.finish()
    assert holds(constrained)
    assert loss_of(model).item() < 0.7 * before
    assert constrained.method.describe()["window"] > 1


@pytest.mark.parametrize("learn_scales", [True, False])
@pytest.mark.parametrize("constraint", NAMES)
def test_network_holds_constrained_weights_at_every_moment(constraint: str, learn_scales: bool) -> None:
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, constraint, epochs=3, learn_scales=learn_scales)
    assert holds(constrained)
    for _ in range(3):
        for _ in range(3):
            optimizer.zero_grad()
            assert holds(constrained)
            loss = loss_of(model)
            assert holds(constrained)
            loss.backward()
            assert holds(constrained)
            optimizer.step()
            assert holds(constrained)
            constrained.advance(0.5)
            assert holds(constrained)
        constrained.end_epoch()
        assert holds(constrained)
    latent = constrained.latent("conv.weight")
    assert not torch.equal(latent, constrained.grid("conv.weight").nearest(latent))  # else this test shows nothing


@pytest.mark.parametrize("name", CONSTRAINED)
def test_gradient_is_taken_at_the_constrained_weight(name: str) -> None:
    model = net()
    optimizer = sgd(model, momentum=0)
    constrained = cbpq.constrain(model, optimizer, "ternary", learn_scales=False, gradient_clip=0.0, clamp=0.0)
    latent = constrained.latent(name).clone()
    twin = copy.deepcopy(model)
    loss_of(twin).backward()
    step(model, optimizer)
    gradient = twin.get_parameter(name).grad
    assert gradient is not None
    # straight through: the latent weight moves along it as plain SGD would
    torch.testing.assert_close(constrained.latent(name), latent - 0.1 * gradient, rtol=1e-6, atol=1e-9)
    # and everything else is plainly trained
    bias = twin.stem.bias
    assert bias is not None
    assert bias.grad is not None
    torch.testing.assert_close(model.get_parameter("stem.bias"), bias - 0.1 * bias.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("parts", [2, 4, 24])
def test_gradient_accumulation(parts: int) -> None:
    def run(parts: int) -> Constrained:
        model = net().double()
        optimizer = sgd(model)
        constrained = cbpq.constrain(model, optimizer, "two-bit-shift", epochs=2)
        for _ in range(2):
            for _ in range(3):
                optimizer.zero_grad()
                for part in range(parts):
                    size = len(LABELS) // parts
                    (loss_of(model, slice(part * size, (part + 1) * size)) / parts).backward()
                optimizer.step()
            constrained.end_epoch()
        return constrained

    whole, accumulated = everything(run(1)), everything(run(parts))
    for name, tensor in whole.items():
        torch.testing.assert_close(accumulated[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary", epochs=4)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses = []
    for _ in range(4):
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                output = model(IMAGES)
                assert output.dtype == dtype
                loss = nn.functional.cross_entropy(output.float(), LABELS)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert holds(constrained)
            losses.append(loss.item())
        constrained.end_epoch()
    assert losses[-1] < 0.8 * losses[0]
    kept = {name: tensor.dtype for name, tensor in everything(constrained).items()}
    assert {kind for name, kind in kept.items() if not name.endswith(("/moment1", "/root2"))} == {torch.float32}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend: str) -> None:
    def run(wrap: Callable[[nn.Module], Any]) -> Constrained:
        inner = net()
        model = wrap(inner)
        optimizer = sgd(model)
        constrained = cbpq.constrain(model, optimizer, "two-bit-shift", epochs=2)
        assert constrained.model is inner
        assert constrained.names == CONSTRAINED
        for _ in range(2):
            step(model, optimizer)
            step(model, optimizer)
            constrained.end_epoch()
        return constrained

    plain, compiled = everything(run(lambda model: model)), run(functools.partial(torch.compile, backend=backend))
    assert holds(compiled)
    for name, tensor in everything(compiled).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-6)


def test_constraining_a_compiled_network_compiles_nothing() -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("this machine has no compiler")

    model: Any = torch.compile(net(), backend=broken)
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary")
    assert constrained.names == CONSTRAINED
    constrained.project(model)
    constrained.finish()


def test_data_parallel_wrapper() -> None:
    inner = net()
    model = nn.DataParallel(inner)
    constrained = cbpq.constrain(model, sgd(model), "ternary")
    assert constrained.model is inner
    assert constrained.names == CONSTRAINED


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inner = net()
        model = nn.parallel.DistributedDataParallel(inner)
        optimizer = sgd(model)
        constrained = cbpq.constrain(model, optimizer, "ternary")
        alone = net()
        other = sgd(alone)
        reference = cbpq.constrain(alone, other, "ternary")
        for _ in range(3):
            assert step(model, optimizer) == step(alone, other)
        assert same(everything(constrained), everything(reference))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_sharded_models_are_refused(tmp_path: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = net()
        fully_shard(model, mesh=mesh)
        before = {name: tensor.full_tensor().clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(
            UsageError, match=r"sharded over processes \(fully_shard, DTensor\).*DistributedDataParallel"
        ):
            cbpq.constrain(model, sgd(model), "ternary")
        after = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        assert same(after, before)
    finally:
        torch.distributed.destroy_process_group()


def test_deepcopy_is_a_plain_constrained_network() -> None:
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary", epochs=2)
    step(model, optimizer)
    twin = copy.deepcopy(model)
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    assert same(dict(model.state_dict()), before)
    for _ in range(5):
        step(model, optimizer)
    assert same(dict(twin.state_dict()), before)  # the copy hangs on nothing
    assert not same(dict(model.state_dict()), before)
    step(twin, torch.optim.SGD(twin.parameters(), lr=0.01))  # and trains plainly
    assert not on_levels(twin.conv.weight, constrained.grid("conv.weight"))


def test_averaged_copies_are_projected() -> None:
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "two-bit-shift", epochs=2, learn_scales=False)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(6):
        step(model, optimizer)
        average.update_parameters(model)
    copied = average.module
    assert isinstance(copied, Net)
    grid = constrained.grid("conv.weight")
    assert not on_levels(copied.conv.weight, grid)
    expected = grid.nearest(copied.conv.weight.detach())
    stem = copied.stem.weight.clone()
    kept = everything(constrained)
    constrained.project(copied)
    assert torch.equal(copied.conv.weight, expected)
    assert on_levels(copied.linear.weight, constrained.grid("linear.weight"))
    assert torch.equal(copied.stem.weight, stem)
    assert same(everything(constrained), kept)  # the network itself is left alone
    compiled: Any = torch.compile(copied, backend="eager")
    constrained.project(compiled)
    assert torch.equal(copied.conv.weight, expected)


@pytest.mark.parametrize("method", METHODS)
def test_saving_on_the_way_writes_levels_and_changes_nothing(method: str, tmp_path: Path) -> None:
    def run(folder: Path | None) -> Constrained:
        model = net()
        optimizer = sgd(model)
        constrained = cbpq.constrain(model, optimizer, "binary", method, epochs=3)
        for epoch in range(3):
            for _ in range(4):
                step(model, optimizer)
            constrained.end_epoch()
            if folder:
                cbpq.save(folder / f"{epoch}.safetensors", constrained)
        return constrained

    saved, plain = run(tmp_path), run(None)
    assert same(everything(saved), everything(plain))
    saved.finish()
    for epoch in range(3):
        for name, tensor in read(tmp_path / f"{epoch}.safetensors").constrained.items():
            assert len(np.unique(tensor.codes)) == 2
            weight = torch.from_numpy(tensor.weight())
            assert epoch < 2 or torch.equal(weight, saved.model.get_parameter(name))


@pytest.mark.parametrize("method", METHODS)
def test_methods_in_a_plain_loop(method: str) -> None:
    """In a loop that tells the method of its epochs only."""
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "binary", method, epochs=8)
    before = loss_of(model).item()
    for _ in range(8):
        for _ in range(12):
            step(model, optimizer)
        constrained.end_epoch()
    constrained.finish()
    assert holds(constrained)
    assert loss_of(model).item() < 0.7 * before


def test_project_puts_changed_weights_back() -> None:
    model = net()
    constrained = cbpq.constrain(model, sgd(model), "ternary")
    expected = everything(constrained)
    with torch.no_grad():
        model.conv.weight.add_(0.01)
    constrained.project()
    assert same(everything(constrained), expected)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("constraint", NAMES)
def test_gradient_of_learned_scales(constraint: str, granularity: str) -> None:
    lr = 0.1
    model = net()
    optimizer = sgd(model, lr=lr, momentum=0, weight_decay=0.3)
    constrained = cbpq.constrain(model, optimizer, constraint, scale_granularity=granularity, scale_lr=2.0)
    name = "conv.weight"
    latent, scale = constrained.latent(name).clone(), constrained.grid(name).scale.detach().clone()
    level = constrained.grid(name).level(latent)

    # the same network with a·q written out
    twin = copy.deepcopy(model)
    a = scale.clone().requires_grad_()
    parameters = {key: (a * level if key == name else value) for key, value in twin.named_parameters()}
    nn.functional.cross_entropy(torch.func.functional_call(twin, parameters, (IMAGES,)), LABELS).backward()
    assert a.grad is not None
    squares = level.square().sum((1, 2, 3), keepdim=True) if granularity == "channel" else level.square().sum()
    expected = a.grad / squares.clamp_min(1)

    step(model, optimizer)
    # no weight decay on scales, and their own multiple of the learning rate
    torch.testing.assert_close(constrained.grid(name).scale.detach(), scale - 2 * lr * expected, rtol=1e-4, atol=1e-7)
    assert holds(constrained)


def test_scale_gradient_by_hand() -> None:
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    level = torch.tensor([[1.0, -0.5], [0.0, 0.5]])
    for pieces in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):

        def found(scale: Tensor, level: Tensor = level, pieces: list[slice] = pieces) -> list[Any]:
            sums = [scale_sums(gradient[rows], level[rows], scale) for rows in pieces]
            answer: list[Any] = scale_gradient(sums, scale).tolist()
            return answer

        assert found(torch.tensor(1.0)) == pytest.approx((1 - 1 + 2) / 1.5)
        assert found(torch.ones(2, 1)) == [[0.0], [2.0]]  # Σq² = 0.25 counts as 1
        assert found(torch.ones(2, 1), torch.zeros(2, 2)) == [[0.0], [0.0]]


def test_scales_move_and_stay_positive() -> None:
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary")
    before = {name: constrained.grid(name).scale.detach().clone() for name in constrained.names}
    for _ in range(3):
        step(model, optimizer)
    for name, scale in before.items():
        assert not torch.equal(constrained.grid(name).scale, scale)
    with torch.no_grad():
        constrained.grid("conv.weight").scale.mul_(1e-6)  # the next step takes some of them below zero
    for _ in range(3):
        step(model, optimizer)
        scale = constrained.grid("conv.weight").scale
        assert (scale >= SMALLEST_SCALE).all()
        assert holds(constrained)
    assert (scale == SMALLEST_SCALE).any()
    assert all(tensor.isfinite().all() for tensor in everything(constrained).values())


def test_fixed_scales_are_no_parameters() -> None:
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary", learn_scales=False)
    assert len(optimizer.param_groups) == 1
    scale = constrained.grid("conv.weight").scale.clone()
    for _ in range(3):
        step(model, optimizer)
    assert torch.equal(constrained.grid("conv.weight").scale, scale)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_learned_scales_leave_no_graph_behind(preset: str) -> None:
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary", preset=preset, learn_scales=True)
    for _ in range(2):
        constrained.end_epoch(step(model, optimizer))
    for name in constrained.names:
        assert constrained.grid(name).scale.is_leaf
        assert constrained.grid(name).scale.shape == (
            (8, 1, 1, 1) if preset == "default" and name == "conv.weight" else constrained.grid(name).scale.shape
        )
        for tensor in (constrained.latent(name), *constrained.state(name).values()):
            assert not tensor.requires_grad
    for parameter in model.parameters():
        assert parameter.is_leaf
        assert parameter.requires_grad


def test_a_step_without_gradients_changes_nothing() -> None:
    model = net()
    optimizer = sgd(model, weight_decay=0.1)
    constrained = cbpq.constrain(model, optimizer, "ternary")
    for _ in range(2):
        step(model, optimizer)
    before = everything(constrained)
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert same(everything(constrained), before)


def test_a_layer_without_gradient_is_left_alone() -> None:
    """As with stochastic depth; also where only the model's own gradients are cleared, not those of the scales."""
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary")
    for _ in range(3):
        step(model, optimizer)
    before = everything(constrained)
    model.zero_grad()
    model.head(model.linear(IMAGES.mean((2, 3)).repeat(1, 3)[:, :8]).relu()).square().mean().backward()
    optimizer.step()
    after = everything(constrained)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"linear.weight/latent", "linear.weight/scale", "network/linear.weight"} <= changed
    assert not {name for name in changed if "conv" in name or "stem" in name}
    assert holds(constrained)


def scaled_steps(fused: bool, method: str) -> list[dict[str, Tensor]]:
    """Everything after each of three steps with a loss scale, the second of which overflows."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    constrained = cbpq.constrain(model, optimizer, "ternary", method, preset="paper", multiplier_lr=0.1)
    constrained.end_epoch(1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)  # with which every gradient would be clipped
    found = [everything(constrained)]
    for overflow in (False, True, False):
        optimizer.zero_grad()
        loss = loss_of(model) * (float("inf") if overflow else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(everything(constrained))
    return found


@pytest.mark.parametrize("method", ["cbp", "proxquant", "askewsgd"])
@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler_skips_a_step(fused: bool, method: str) -> None:
    """What moves a latent weight beside the optimizer, such as a clamp, skips it too."""
    first, *others = scaled_steps(fused, method)
    before = first
    for overflow, after in zip((False, True, False), others, strict=True):
        assert same(after, before) == overflow
        before = after


@pytest.mark.parametrize("method", ["cbp", "askewsgd"])
def test_gradient_scaler_with_fused_optimizers(method: str) -> None:
    """GradScaler leaves unscaling to these; the method gets the loss's own gradients all the same."""
    for ours, theirs in zip(scaled_steps(True, method), scaled_steps(False, method), strict=True):
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


def test_frozen_layers() -> None:
    model = net()
    model.conv.requires_grad_(False)
    optimizer = sgd(model, weight_decay=0.1)
    original = model.conv.weight.clone()
    constrained = cbpq.constrain(model, optimizer, "ternary")
    grid = constrained.grid("conv.weight")
    frozen = grid.nearest(original)
    scale = grid.scale.detach().clone()
    for _ in range(3):
        step(model, optimizer)
    constrained.end_epoch()
    constrained.finish()
    assert torch.equal(model.conv.weight, frozen)
    assert torch.equal(grid.scale, scale)
    assert torch.equal(constrained.latent("conv.weight"), original)


def test_optimizer_without_the_parameters() -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([*model.stem.parameters(), *model.conv.parameters()], lr=0.1)
    with pytest.raises(UsageError, match=r"optimizer does not hold linear\.weight"):
        cbpq.constrain(model, optimizer, "ternary")
    assert same(dict(model.state_dict()), before)
    assert len(optimizer.param_groups) == 1
    # what is excluded need not be there
    assert cbpq.constrain(model, optimizer, "ternary", exclude=["linear"]).names == ("conv.weight",)


def test_closures_are_refused() -> None:
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary")
    step(model, optimizer)
    before = everything(constrained)

    def closure() -> float:
        raise AssertionError("must not be called")

    with pytest.raises(UsageError, match="without a closure"):
        optimizer.step(closure)
    with pytest.raises(UsageError, match="without a closure"):
        optimizer.step(closure=closure)
    assert same(everything(constrained), before)
    optimizer.step(None)
    optimizer.step(closure=None)


@pytest.mark.parametrize("move", [nn.Module.double, nn.Module.half, nn.Module.bfloat16])
def test_network_converted_after_constraining(move: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary")
    latent = constrained.latent("conv.weight").clone()
    move(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(UsageError, match=r"conv.weight became torch.*: move the model first, then constrain it"):
        optimizer.step()
    assert torch.equal(constrained.latent("conv.weight"), latent)


def test_network_moved_after_constraining() -> None:
    # no second device is at hand, so it is the latent weight that is elsewhere
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary", learn_scales=False)
    weight = constrained._weights["linear.weight"]
    weight.slot = weight.slot._replace(latent=weight.slot.latent.to("meta"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"linear\.weight became torch\.float32 on cpu: move the model first"):
        step(model, optimizer)
    assert same(dict(model.state_dict()), before)  # no latent weight is left in the network


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = net()
    with torch.no_grad():
        model.linear.weight[3, 2] = value
    conv = model.conv.weight.clone()
    with pytest.raises(UsageError, match=r"linear.weight holds a value that is not finite"):
        cbpq.constrain(model, sgd(model), "ternary")
    assert torch.equal(model.conv.weight, conv)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    with pytest.raises(UsageError, match=f"{dtype}: constrain a float32 model and train it under autocast"):
        cbpq.constrain(model, sgd(model), "ternary", example_input=IMAGES[:1].to(dtype))


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5),
    "multi-step": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3], 0.1),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 8),
    "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer),
    "polynomial": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 5),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
    "warm restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8),
    "sequence": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.CosineAnnealingLR(optimizer, 5)], [2]
    ),
}
# These compute each learning rate from the one before, so that a group added later comes along.
RECURRENT = ("step", "multi-step", "exponential", "cosine", "linear", "polynomial")


@pytest.mark.parametrize(
    "kind, before", [*((kind, False) for kind in SCHEDULERS), *((kind, True) for kind in RECURRENT)]
)
def test_learning_rate_schedulers(kind: str, before: bool) -> None:
    model, plain = net(), net()
    optimizer, reference = sgd(model), sgd(plain)
    scheduler = SCHEDULERS[kind](optimizer) if before else None
    constrained = cbpq.constrain(model, optimizer, "ternary", scale_lr=1.0)
    scheduler = scheduler or SCHEDULERS[kind](optimizer)
    expected = SCHEDULERS[kind](reference)
    assert len(optimizer.param_groups) == 2
    for _ in range(6):
        step(model, optimizer)
        reference.step()
        scheduler.step()
        expected.step()
        rate = reference.param_groups[0]["lr"]
        # weights and scales follow the schedule as if cbpq were not there
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, rate], rel=1e-12)
    assert holds(constrained)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_fixed_scales_go_with_any_scheduler_made_before(kind: str) -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = SCHEDULERS[kind](optimizer)
    constrained = cbpq.constrain(model, optimizer, "ternary", learn_scales=False)
    for _ in range(3):
        step(model, optimizer)
        scheduler.step()
    assert holds(constrained)


class Zoo(nn.Module):
    """Layers of every kind whose weight can be constrained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.pointwise = nn.Conv2d(8, 8, 1, bias=False)
        self.volume = nn.Conv3d(8, 8, (1, 2, 2))
        self.norm = nn.BatchNorm2d(8)
        self.line = nn.Conv1d(8, 8, 3, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(self.grouped(self.depthwise(self.stem(x))))
        x = self.norm(self.volume(x.unsqueeze(2)).squeeze(2))
        x = self.line(x.flatten(2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(self.linear(x.mean(1)).relu())
        return out


ZOO = (
    *(f"{layer}.weight" for layer in ("depthwise", "grouped", "pointwise", "volume", "line")),
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "linear.weight",
)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("constraint", NAMES)
def test_layers_of_every_kind(constraint: str, memory_format: torch.memory_format) -> None:
    model = Zoo()
    for module in (model.stem, model.depthwise, model.grouped):
        module.to(memory_format=memory_format)
    optimizer = sgd(model, lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constrained = cbpq.constrain(model, optimizer, constraint, epochs=1)
        assert constrained.names == ZOO
        for _ in range(3):
            step(model, optimizer)
        constrained.end_epoch()
        constrained.finish()
    assert holds(constrained)
    assert constrained.skipped["stem.weight"] == "first convolution"
    assert constrained.skipped["head.weight"] == "classifier"
    assert set(constrained.names) | set(constrained.skipped) == set(dict(model.named_parameters()))
    tensors = constrained.tensors()
    assert tuple(tensors) == ZOO
    levels = level_set(constraint)
    for name, tensor in tensors.items():
        parameter = model.get_parameter(name).detach()
        assert np.array_equal(tensor.weight().view(np.int32), parameter.numpy().view(np.int32))
        assert tensor.codes.shape == tuple(parameter.shape)
        assert tensor.codes.dtype == np.int32
        assert tensor.scale.shape == (len(parameter),)
        assert tensor.scale.dtype == np.float32
        assert (tensor.levels, tensor.denominator, tensor.constraint) == (levels.codes, levels.denominator, constraint)


def test_scale_of_a_layer_has_no_axes() -> None:
    model = net()
    constrained = cbpq.constrain(model, sgd(model), "ternary", preset="paper")
    tensor = constrained.tensors()["conv.weight"]
    assert tensor.scale.shape == ()
    assert np.array_equal(tensor.weight(), model.conv.weight.detach().numpy())


def test_finish_lets_go_of_the_optimizer() -> None:
    model = net()
    optimizer = sgd(model, momentum=0)
    constrained = cbpq.constrain(model, optimizer, "ternary")
    step(model, optimizer)
    constrained.finish()
    assert holds(constrained)
    latent = constrained.latent("conv.weight").clone()
    weight = model.conv.weight.detach().clone()
    step(model, optimizer)
    assert model.conv.weight.grad is not None
    torch.testing.assert_close(model.conv.weight.detach(), weight - 0.1 * model.conv.weight.grad, rtol=1e-6, atol=1e-9)
    assert torch.equal(constrained.latent("conv.weight"), latent)
    optimizer.step(lambda: 0.0)  # closures are fine again


class Fresh(torch.optim.SGD):
    """An optimizer that gives its parameters new tensors instead of changing those they have."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data = parameter.data - group["lr"] * parameter.grad


def test_optimizers_may_make_new_tensors() -> None:
    ends = []
    for kind in (torch.optim.SGD, Fresh):
        model = net()
        optimizer = kind(model.parameters(), lr=0.1)
        constrained = cbpq.constrain(model, optimizer, "ternary", learn_scales=False)
        for _ in range(4):
            step(model, optimizer)
            assert holds(constrained)
        ends.append(everything(constrained))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor)


class Broken(torch.optim.SGD):
    """An optimizer whose steps can be broken off in the middle."""

    broken = False

    def step(self, closure: Any = None) -> Any:
        super().step()
        if self.broken:
            raise KeyboardInterrupt


@pytest.mark.parametrize("go_on", [True, False])
def test_a_step_that_is_broken_off(go_on: bool) -> None:
    """As by Ctrl-C: latent weights are in the network then, and must not be taken for constrained ones."""
    model = net()
    optimizer = Broken(model.parameters(), lr=0.1)
    constrained = cbpq.constrain(model, optimizer, "ternary", learn_scales=False)
    step(model, optimizer)
    latent = constrained.latent("conv.weight")
    before = latent.clone()
    optimizer.broken = True
    with pytest.raises(KeyboardInterrupt):
        step(model, optimizer)
    moved = latent.clone()
    assert not torch.equal(moved, before)
    optimizer.broken = False
    if go_on:
        step(model, optimizer)
        assert holds(constrained)
        moved = latent.clone()
    constrained.finish()
    assert holds(constrained)
    assert torch.equal(latent, moved)


@pytest.mark.parametrize("method", METHODS)
def test_pieces_make_a_whole(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for piece in (weights.PIECE, 100, 1):  # of 576 and 128 weights
        monkeypatch.setattr(weights, "PIECE", piece)
        model = net()
        optimizer = sgd(model)
        constrained = cbpq.constrain(model, optimizer, "binary", method, epochs=2)
        pieces = [len(weight.pieces) for weight in constrained._weights.values()]
        assert pieces == {100: [8, 2], 1: [8, 16]}.get(piece, [1, 1])
        for _ in range(2):
            for _ in range(3):
                step(model, optimizer)
            constrained.end_epoch()
        ends.append(everything(constrained))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_one_scale_for_all_pieces_learns_as_for_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for piece in (weights.PIECE, 100):
        monkeypatch.setattr(weights, "PIECE", piece)
        model = net().double()
        optimizer = sgd(model)
        constrained = cbpq.constrain(model, optimizer, "ternary", scale_granularity="layer")
        for _ in range(3):
            step(model, optimizer)
        ends.append(everything(constrained))
    for name, tensor in ends[0].items():  # but for the order of summation
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-9, atol=1e-12)


def test_layout_changed_after_constraining() -> None:
    ends = []
    for change in (False, True):
        model = net()
        optimizer = sgd(model)
        constrained = cbpq.constrain(model, optimizer, "two-bit-shift")
        if change:
            model.to(memory_format=torch.channels_last)
            assert constrained.latent("conv.weight").stride() != model.conv.weight.stride()
        constrained.project()
        assert holds(constrained)
        for _ in range(3):
            step(model, optimizer)
            assert holds(constrained)
        ends.append(everything(constrained))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_weights_stay_where_they_are_in_memory() -> None:
    """Both of them: a step points from one to the other and back."""
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary")
    network, latent = model.conv.weight.data_ptr(), constrained.latent("conv.weight").data_ptr()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.conv.weight.data_ptr()))
    for _ in range(3):
        step(model, optimizer)
        assert model.conv.weight.data_ptr() == network
        assert constrained.latent("conv.weight").data_ptr() == latent
    assert seen == [latent] * 3


def test_two_networks_do_not_touch_each_other() -> None:
    first, second = net(), net()
    optimizers = sgd(first), sgd(second)
    constrained = [cbpq.constrain(m, o, "ternary") for m, o in zip((first, second), optimizers, strict=True)]
    before = everything(constrained[1])
    step(first, optimizers[0])
    assert same(everything(constrained[1]), before)
    for _ in range(2):
        step(second, optimizers[1])
    step(first, optimizers[0])
    assert same(everything(constrained[0]), everything(constrained[1]))


def test_constraining_draws_no_random_numbers() -> None:
    model = net()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    cbpq.constrain(model, sgd(model), "ternary")
    assert torch.equal(torch.rand(3), expected)


def test_scores() -> None:
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary", multiplier_lr=0.01, epochs=2)
    assert constrained.penalty() == 0
    for _ in range(3):
        step(model, optimizer)
    constrained.advance(0.7)
    assert constrained.method.describe()["window"] == pytest.approx(1 / (1 - 0.7 / 0.9))
    distances, penalties = [], []
    for name in constrained.names:
        latent, grid = constrained.latent(name), constrained.grid(name)
        nearest = (
            (latent.unsqueeze(-1) - allowed(grid).reshape(len(latent), *[1] * (latent.dim() - 1), -1)).abs().amin(-1)
        )
        distances.append(2 * nearest.flatten())
        penalties.append(
            (constrained.state(name)["multiplier"] * grid.penalty(latent, 1 / (1 - 0.7 / 0.9))).sum().item()
        )
    assert constrained.cfs() == pytest.approx(torch.cat(distances).mean().item(), rel=1e-5)
    assert constrained.penalty() == pytest.approx(sum(penalties), rel=1e-4)
    assert constrained.penalty() > 0


def test_end_of_epoch_tells_what_happened() -> None:
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary", epochs=4, multiplier_updates=2)
    updates = [constrained.end_epoch() for _ in range(5)]
    assert [update.multipliers_updated for update in updates] == [False, True, False, True, False]
    assert {update.lr_factor for update in updates} == {1.0}
    assert constrained.method.describe()["window"] == float("inf")


def test_learning_rate_drop_of_the_published_schedule() -> None:
    model = net()
    others = [*model.conv.parameters(), *model.linear.parameters(), *model.head.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": model.stem.parameters()},
        {"params": others, "lr": 0.5, "initial_lr": 0.6},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    constrained = cbpq.constrain(model, optimizer, "ternary", preset="paper", patience=1)
    rates = []
    for _ in range(12):
        constrained.end_epoch(1.0)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates == [[0.1, 0.5]] * 9 + [[pytest.approx(0.01), pytest.approx(0.05)]] * 3
    assert "initial_lr" not in optimizer.param_groups[0]
    assert optimizer.param_groups[1]["initial_lr"] == pytest.approx(0.06)
    with pytest.raises(UsageError, match=r"end_epoch\(loss_sum\)"):
        constrained.end_epoch()


def test_latent_weights_are_clamped() -> None:
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary", clamp=0.05)
    assert constrained.latent("conv.weight").abs().max() > 0.05
    step(model, optimizer)
    assert constrained.latent("conv.weight").abs().max() == torch.tensor(0.05)
    assert holds(constrained)
    assert model.stem.weight.abs().max() > 0.05


def test_scales_take_the_learning_rate_of_their_weights() -> None:
    model = net()
    groups: list[dict[str, Any]] = [
        {"params": [*model.stem.parameters(), *model.head.parameters()]},
        {"params": [*model.conv.parameters(), *model.linear.parameters()], "lr": 0.5, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    cbpq.constrain(model, optimizer, "ternary", scale_lr=0.5)
    group = optimizer.param_groups[-1]
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.25, 0.0, 2)
    assert "initial_lr" not in group
    scheduled = net()
    optimizer = sgd(scheduled)
    lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.1)
    cbpq.constrain(scheduled, optimizer, "ternary", scale_lr=0.5)
    group = optimizer.param_groups[-1]
    assert (group["lr"], group["initial_lr"]) == (pytest.approx(0.005), pytest.approx(0.05))


@pytest.mark.parametrize("setting, value", [("scale_granularity", "layer"), ("learn_scales", False)])
def test_state_of_another_configuration(setting: str, value: Any) -> None:
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary")
    step(model, optimizer)
    before = everything(constrained)
    other = net()
    state = cbpq.constrain(other, sgd(other), "ternary", **{setting: value}).state_dict()
    if setting == "learn_scales":  # only the optimizer's business
        constrained.load_state_dict(state)
        assert holds(constrained)
        return
    with pytest.raises(UsageError, match="of another shape or granularity of scales"):
        constrained.load_state_dict(state)
    assert same(everything(constrained), before)


def test_foreign_states_are_refused() -> None:
    model = net()
    optimizer = sgd(model)
    constrained = cbpq.constrain(model, optimizer, "ternary")
    step(model, optimizer)
    before, own = everything(constrained), constrained.state_dict()

    def of(constraint: str, **given: Any) -> dict[str, Any]:
        other = net()
        return cbpq.constrain(other, sgd(other), constraint, **given).state_dict()

    wider = {name: {**tensors, "latent": torch.zeros(2, 2)} for name, tensors in own["weights"].items()}
    for state, message in (
        (of("binary"), "of constraint 'binary', not 'ternary'"),
        ({**own, "method": "other"}, "of method 'other', not 'cbp'"),
        (of("ternary", exclude=["linear"]), "other weights are constrained"),
        (of("ternary", quantize_last=True), "other weights are constrained"),
        ({**own, "weights": wider}, "conv.weight: this state is of another shape"),
        (
            {**own, "weights": {**own["weights"], "linear.weight": {"latent": torch.zeros(16, 8)}}},
            "linear.weight: this",
        ),
        (dict(model.state_dict()), "of constraint None"),
        ({}, "of constraint None"),
    ):
        with pytest.raises(UsageError, match=message):
            constrained.load_state_dict(state)
        assert same(everything(constrained), before)


def test_state_goes_into_a_fresh_network() -> None:
    def start() -> tuple[Net, torch.optim.Optimizer, Constrained]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, cbpq.constrain(model, optimizer, "two-bit-shift", epochs=4)

    model, optimizer, constrained = start()
    for _ in range(2):
        for _ in range(3):
            step(model, optimizer)
        constrained.end_epoch()
    other, other_optimizer, restored = start()
    restored.load_state_dict(copy.deepcopy(constrained.state_dict()))
    # with the constrained part alone, the network already holds the right constrained weights
    assert torch.equal(other.conv.weight, model.conv.weight)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o, c in ((model, optimizer, constrained), (other, other_optimizer, restored)):
        for _ in range(2):
            for _ in range(3):
                step(m, o)
            c.end_epoch()
        c.finish()
    assert same(everything(restored), everything(constrained))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"constraint": "ternery"}, "did you mean 'ternary'"),
        ({"method": "cpb"}, "did you mean 'cbp'"),
        ({"preset": "papers"}, "did you mean 'paper'"),
        ({"epoch": 3}, "unknown setting 'epoch' from the call; did you mean 'epochs'"),
        ({"epochs": -1}, "must be at least 0"),
        ({"clamp": "wide"}, "is no number"),
        ({"include": ["conf*"]}, "matches no convolution or linear weight"),
        ({"exclude": ["conv", "linear"]}, "no weight is left to constrain"),
    ],
)
def test_bad_calls(given: dict[str, Any], message: str) -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = sgd(model)
    with pytest.raises(CbpqError, match=message) as caught:
        cbpq.constrain(model, optimizer, **given)
    assert "\n" not in str(caught.value)
    assert same(dict(model.state_dict()), before)
    assert len(optimizer.param_groups) == 1
    step(model, optimizer)  # no hook was left behind
    assert not torch.equal(model.conv.weight, before["conv.weight"])


def test_choice_of_layers_is_handed_on() -> None:
    model = net()
    constrained = cbpq.constrain(model, sgd(model), "binary", include=["conv", "head", "stem"], quantize_last=True)
    assert constrained.names == ("conv.weight", "head.weight")
    whole = net()
    constrained = cbpq.constrain(whole, sgd(whole), "binary", quantize_first=True, quantize_last=True)
    assert constrained.names == ("stem.weight", *CONSTRAINED, "head.weight")
    assert constrained.settings.learn_scales
    assert constrained.level_set is CONSTRAINTS["binary"]
