"""Training: schedules, budgets, losses, interruption at any event, and the checkpoint file."""

import copy
import dataclasses
import hashlib
import io
import itertools
import math
import os
import pickle
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cbpq.atomic import atomic_write
from cbpq.checkpoint import differences, load_checkpoint, save_checkpoint
from cbpq.data import Batch
from cbpq.errors import CbpqError, TrainingError, UsageError
from cbpq.layers import choose_layers
from cbpq.levels import CONSTRAINTS
from cbpq.methods.base import Slot, Update
from cbpq.presets import Settings, resolve
from cbpq.recipe import loss_of, make_optimizer
from cbpq.settling import finish
from cbpq.training import AUXILIARY_WEIGHT, EpochEnd, Run, Step, prepare, train
from cbpq.transforms import Augmentation

CLASSES = 3


class Loader:
    """Batches that depend on epoch and position alone."""

    augmentation = Augmentation(pad=(1, 1), flip=True)

    def __init__(self, batches: int = 4, size: int = 6, each: Callable[[int, int, Batch], None] | None = None) -> None:
        self.batches, self.size, self.each = batches, size, each
        self.asked: list[tuple[int, int]] = []

    @property
    def images(self) -> int:
        return self.batches * self.size

    def __len__(self) -> int:
        return self.batches

    def batch(self, epoch: int, position: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * epoch + position)
        labels = torch.randint(CLASSES, (self.size,), generator=generator)
        images = torch.randn(self.size, CLASSES, 6, 6, generator=generator) * 0.5
        return Batch(images + nn.functional.one_hot(labels, CLASSES)[:, :, None, None], labels)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        self.asked.append((number, start))
        for position in range(start, self.batches):
            batch = self.batch(number, position)
            if self.each:
                self.each(number, position, batch)
            yield batch


class Net(nn.Module):
    """With what makes resuming hard: BatchNorm's buffers and dropout's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CLASSES, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 8, 3, bias=False)
        self.norm2 = nn.BatchNorm2d(8, momentum=0.3)
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Any:
        x = self.norm2(self.conv(self.norm(self.stem(x)).relu())).relu()
        return self.head(self.linear(self.dropout(x.mean((2, 3)))).relu())


def net(kind: type[nn.Module] = Net) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return kind().eval()  # as networks come


def start(
    loader: Loader | None = None,
    *,
    preset: str = "default",
    constraint: str = "ternary",
    model: nn.Module | None = None,
    autocast: torch.dtype | None = None,
    max_seconds: float = math.inf,
    **given: Any,
) -> Run:
    model = model or net()
    values = {"epochs": 2, "batchnorm_batches": 3, "multiplier_lr": 1e-2, "patience": 1, **given}
    return prepare(
        model,
        loader or Loader(),
        levels=CONSTRAINTS[constraint],
        method="cbp",
        settings=resolve(preset, layers=[("the test", values)]).settings,
        layers=choose_layers(model, example_input=torch.zeros(2, CLASSES, 6, 6)),
        device=torch.device("cpu"),
        autocast=autocast,
        max_seconds=max_seconds,
    )


def steps(run: Run) -> list[Step]:
    return [event for event in train(run) if isinstance(event, Step)]


def same(ours: Any, theirs: Any) -> bool:
    """Equal to the bit, through nested dictionaries and lists."""
    if isinstance(ours, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


def lasting(run: Run) -> dict[str, Any]:
    """The state without the clock."""
    state = copy.deepcopy(run.state_dict())
    del state["position"]["seconds"]
    return state


# schedules and budgets


@pytest.mark.parametrize("learn_scales", [True, False])
@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.31, 1.0])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate(schedule: str, warmup: float, learn_scales: bool) -> None:
    run = start(epochs=5, lr=0.4, lr_schedule=schedule, warmup=warmup, scale_lr=0.5, learn_scales=learn_scales)
    total = 5 * 4
    for number, event in enumerate(steps(run)):
        share = number / total
        if share < warmup:
            expected = min((number + 1) / (warmup * total), 1.0)
        elif schedule == "cosine":
            expected = (1 + math.cos(math.pi * (share - warmup) / (1 - warmup))) / 2
        else:
            expected = 1.0
        assert event.lr == pytest.approx(0.4 * expected, rel=1e-9)
        assert event.progress == pytest.approx((number + 1) / total)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates == [pytest.approx(event.lr)] * 2 + [pytest.approx(event.lr / 2)] * learn_scales
    if schedule == "cosine" and warmup < 1:
        assert event.lr < 0.4 * 0.03  # at its end, the learning rate is nearly zero


def test_events() -> None:
    run = start(Loader(batches=12), epochs=2)
    events = list(train(run))
    assert [type(event) for event in events] == 2 * ([Step] * 12 + [EpochEnd])
    seen = [event for event in events if isinstance(event, Step)]
    assert [(event.epoch, event.step) for event in seen] == [(e, s) for e in (1, 2) for s in range(1, 13)]
    assert {event.steps_per_epoch for event in seen} == {12}
    assert [event.step for event in seen if event.cfs is not None] == [10, 12, 10, 12]
    assert all((event.cfs is None) == (event.lagrangian is None) for event in seen)
    assert all(event.lagrangian >= event.loss for event in seen if event.lagrangian is not None)
    windows = [event.window for event in seen if event.window is not None]
    assert windows == sorted(windows)
    assert (len(windows), windows[-1]) == (24, math.inf)
    ends = [event for event in events if isinstance(event, EpochEnd)]
    assert [(event.epoch, event.epochs) for event in ends] == [(1, 2), (2, 2)]
    for number, event in enumerate(ends):
        losses = [step.loss for step in seen[12 * number : 12 * number + 12]]
        assert event.loss == pytest.approx(sum(losses) / 12)
        assert event.cfs > 0
    assert ends[1].loss < ends[0].loss
    assert run.images_seen == 2 * 12 * 6
    assert run.done
    assert run.progress == 1
    assert list(train(run)) == []  # nothing is left to do


def test_no_epochs_train_nothing() -> None:
    loader = Loader()
    run = start(loader, epochs=0)
    before = lasting(run)
    assert run.done
    assert list(train(run)) == []
    assert same(lasting(run), before)
    assert loader.asked == []
    latent = {name: run.constrained.latent(name).clone() for name in run.constrained.names}
    finish(run)
    for name, weight in latent.items():
        assert torch.equal(run.model.get_parameter(name), run.constrained.grid(name).nearest(weight))


class Clock:
    """Time passes only where a batch is made."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def tick(self, *_: Any) -> None:
        self.now += 1


@pytest.mark.parametrize("limit, expected", [(0.5, 1), (1, 1), (6, 6), (6.5, 7), (7.99, 8), (8, 8), (1000, 20)])
def test_time_limit(limit: float, expected: int) -> None:
    clock = Clock()
    run = start(Loader(each=clock.tick), epochs=5, max_seconds=limit, multiplier_updates=4, warmup=0.0)
    run._clock = clock
    events = list(train(run))
    seen = [event for event in events if isinstance(event, Step)]
    assert len(seen) == expected
    assert isinstance(events[-1], EpochEnd)
    assert events[-1].loss == pytest.approx(
        sum(event.loss for event in seen[-1 - (expected - 1) % 4 :]) / (1 + (expected - 1) % 4)
    )
    assert run.done
    assert run.progress == 1
    assert run.seconds == expected
    # schedules follow the clock: whatever the limit, the window is shut in the end and the learning rate has fallen
    assert run.constrained.method.describe()["window"] == math.inf
    assert seen[0].progress == min(1.0, max(1 / limit, 1 / 20))
    if 1 < expected < 20:
        assert seen[-1].lr < 0.5 * seen[0].lr


def test_time_limit_goes_on_after_an_interruption() -> None:
    clock = Clock()
    run = start(Loader(each=clock.tick), epochs=5, max_seconds=6)
    run._clock = clock
    for _ in itertools.islice(train(run), 4):
        pass
    state = copy.deepcopy(run.state_dict())
    clock.now += 10_000  # the pause does not count
    resumed = start(Loader(each=clock.tick), epochs=5, max_seconds=6)
    resumed._clock = clock
    resumed.load_state_dict(state)
    assert len(steps(resumed)) == 2
    assert resumed.seconds == 6


# interruption


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_interrupted_at_any_event(preset: str, optimizer: str, autocast: torch.dtype | None, tmp_path: Path) -> None:
    given: dict[str, Any] = {"preset": preset, "optimizer": optimizer, "constraint": "two-bit-shift"}
    given["distillation_views"] = 3  # which are moved at random

    def begin() -> Run:
        run = start(Loader(batches=3), autocast=autocast, **given)
        # a loss scale that overflows at first, and grows soon after
        run.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**22, growth_interval=2, enabled=autocast == torch.float16
        )
        return run

    def shown(event: Step | EpochEnd) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(event).items() if k not in ("seconds", "images_per_second")}

    unbroken = begin()
    events = [shown(event) for event in train(unbroken)]
    trained = lasting(unbroken)
    finish(unbroken)
    settled = lasting(unbroken)
    path = tmp_path / "state.pt"
    identity = unbroken.settings.to_dict()
    for stop in range(len(events) + 1) if autocast is None else (1, 4, 5):
        run = begin()
        seen = [shown(event) for event in itertools.islice(train(run), stop)]
        save_checkpoint(path, identity, run.state_dict())
        torch.manual_seed(99)  # another process has other random numbers
        resumed = begin()
        resumed.load_state_dict(load_checkpoint(path, identity))
        seen += [shown(event) for event in train(resumed)]
        assert seen == events
        assert same(lasting(resumed), trained)
        assert resumed.scaler.state_dict() == unbroken.scaler.state_dict()
        assert (resumed.steps, resumed.images_seen) == (unbroken.steps, unbroken.images_seen)
        finish(resumed)
        assert same(lasting(resumed), settled)


def test_saving_after_every_event_changes_nothing(tmp_path: Path) -> None:
    quiet = start()
    list(train(quiet))
    expected = lasting(quiet)
    run = start()
    for _ in train(run):
        save_checkpoint(tmp_path / "state.pt", {}, run.state_dict())
        run.constrained.cfs()
        run.constrained.penalty()
    assert same(lasting(run), expected)


def test_seeds() -> None:
    def result(seed: int) -> dict[str, Any]:
        run = start(seed=seed)
        list(train(run))
        finish(run)
        return dict(run.model.state_dict())

    assert same(result(3), result(3))
    assert not same(result(3), result(4))


# the loss


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(bad: float) -> None:
    def spoil(epoch: int, position: int, batch: Batch) -> None:
        if (epoch, position) == (1, 2):
            batch.images[0, 0, 0, 0] = bad

    run = start(Loader(each=spoil), lr=0.25)
    kept: list[dict[str, Any]] = []

    def go() -> None:
        kept.extend(lasting(run) for _ in train(run))

    with pytest.raises(TrainingError, match=r"became nan in epoch 2, step 3; lower --lr \(now 0.25\)") as caught:
        go()
    assert "\n" not in str(caught.value)
    assert len(kept) == 4 + 1 + 2
    # no step was made with it: the weights are those of the last good state
    after = lasting(run)
    assert same(after["constrained"], kept[-1]["constrained"])
    assert same(after["optimizer"]["state"], kept[-1]["optimizer"]["state"])
    assert same(after["position"], kept[-1]["position"])
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, kept[-1]["model"][name])


def log_softmax(row: list[float]) -> list[float]:
    norm = math.log(sum(math.exp(value) for value in row))
    return [value - norm for value in row]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_loss(share: float, temperature: float) -> None:
    settings = dataclasses.replace(Settings(), distillation=share, temperature=temperature)
    output, target = [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], [[2.0, 0.0, -1.0], [0.5, 0.5, 1.5]]
    labels = [2, 1]
    cross = -sum(log_softmax(row)[label] for row, label in zip(output, labels, strict=True)) / 2
    divergence = 0.0
    for ours, theirs in zip(output, target, strict=True):
        p = log_softmax([value / temperature for value in theirs])
        q = log_softmax([value / temperature for value in ours])
        divergence += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)) / 2
    expected = (1 - share) * cross + share * temperature**2 * divergence
    arguments = torch.tensor(output), torch.tensor(labels)
    assert loss_of(*arguments, torch.tensor(target), settings).item() == pytest.approx(expected, rel=1e-5)
    # half precision is widened before softmax
    half = loss_of(arguments[0].bfloat16(), arguments[1], torch.tensor(target).bfloat16(), settings)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(expected, rel=1e-5)
    if share == 0:
        assert loss_of(*arguments, None, settings).item() == pytest.approx(cross, rel=1e-5)
    # another measure of the difference in the divergence's place
    other = loss_of(*arguments, torch.tensor(target), settings, torch.tensor(7.0)).item()
    assert other == pytest.approx((1 - share) * cross + share * 7, rel=1e-5)


def test_teacher_is_the_original_and_stays_so() -> None:
    original = net().eval()
    run = start(distillation=0.5)
    assert run.teacher is not None
    before = copy.deepcopy(dict(run.teacher.state_dict()))
    assert same(before, dict(original.state_dict()))
    list(train(run))
    finish(run)
    assert same(dict(run.teacher.state_dict()), before)
    assert not any(module.training for module in run.teacher.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in run.teacher.parameters())
    images = Loader().batch(0, 0).images
    assert torch.equal(run.teacher(images), original(images))


def test_no_distillation_no_teacher() -> None:
    run = start(preset="paper")
    assert run.teacher is None
    first = next(iter(train(run)))
    assert isinstance(first, Step)
    assert first.loss == pytest.approx(math.log(CLASSES), rel=0.5)


Heads = namedtuple("Heads", "logits aux")  # what torchvision's networks with several heads return


class TwoHeads(Net):
    """An auxiliary head that only training runs, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Any:
        x = self.norm2(self.conv(self.norm(self.stem(x)).relu())).relu().mean((2, 3))
        main = self.head(self.linear(x).relu())
        return Heads(main, self.aux(x)) if self.training else main


def test_auxiliary_heads() -> None:
    run = start(model=net(TwoHeads), preset="paper")
    assert run.constrained.names == ("conv.weight", "linear.weight")  # the aux classifier is a classifier
    twin = copy.deepcopy(run.model).train()
    batch = run.loader.epoch(0)
    images, labels = dataclasses.astuple(next(iter(batch)))
    main, aux = twin(images)
    expected = nn.functional.cross_entropy(main, labels) + AUXILIARY_WEIGHT * nn.functional.cross_entropy(aux, labels)
    before = run.model.get_parameter("aux.1.weight").clone()
    first = next(iter(train(run)))
    assert isinstance(first, Step)
    assert first.loss == pytest.approx(expected.item(), rel=1e-6)
    assert not torch.equal(run.model.get_parameter("aux.1.weight"), before)


def test_batches_too_small_for_batchnorm() -> None:
    run = start(Loader(size=1), model=net(TwoHeads))
    with pytest.raises(TrainingError, match=r"cannot be trained on batches of 1 \(.*raise --batch-size") as caught:
        next(iter(train(run)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_weights_in_full_precision(dtype: torch.dtype) -> None:
    run = start(autocast=dtype)
    if dtype == torch.float16:  # from where no step overflows
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = steps(run)
    assert all(tensor.dtype != dtype for tensor in run.model.state_dict().values())
    for name in run.constrained.names:
        assert run.constrained.latent(name).dtype == torch.float32
        assert run.constrained.grid(name).scale.dtype == torch.float32
        assert run.constrained.state(name)["multiplier"].dtype == torch.float32
    plain = steps(start())
    assert seen[0].loss != plain[0].loss  # it did compute otherwise
    for ours, theirs in zip(seen, plain, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=0.05)


def test_gradients_that_overflow_in_float16_are_left_out() -> None:
    run = start(autocast=torch.float16)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: tensor.clone() for name, tensor in run.model.named_parameters()}
    next(iter(train(run)))
    assert run.scaler.get_scale() == 2.0**39
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.named_parameters())


def test_gradients_that_are_never_finite_end_the_run() -> None:
    run = start(Loader(batches=40), autocast=torch.float16)
    run.model.get_parameter("head.weight").register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"not finite in float16, .*--set amp_dtype=bfloat16"):
        steps(run)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimizer(optimizer: str) -> None:
    model = net()
    model.get_parameter("head.weight").requires_grad_(False)
    settings = dataclasses.replace(Settings(), optimizer=optimizer, lr=0.3, momentum=0.7, weight_decay=0.01)
    made = make_optimizer(model, settings)
    assert type(made) is (torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in made.param_groups)
    assert decayed == {"stem.weight", "conv.weight", "linear.weight"}
    assert plain == {"stem.bias", "norm.weight", "norm.bias", "norm2.weight", "norm2.bias", "linear.bias", "head.bias"}
    assert [group["weight_decay"] for group in made.param_groups] == [0.01, 0.0]
    assert {group["lr"] for group in made.param_groups} == {0.3}
    if optimizer == "sgd":
        assert {group["momentum"] for group in made.param_groups} == {0.7}


def test_published_schedule_gets_the_sum_of_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(Loader(batches=3), preset="paper", epochs=6, patience=20, lr=1e-9, multiplier_lr=0.0, momentum=0.0)
    sums, previous, told = [], 1e10, []
    end_epoch = run.constrained.method.end_epoch

    def spy(slots: Iterable[Slot], loss_sum: float | None) -> Update:
        told.append(loss_sum)
        return end_epoch(slots, loss_sum)

    monkeypatch.setattr(run.constrained.method, "end_epoch", spy)
    for event in train(run):
        if isinstance(event, EpochEnd):
            sums.append(3 * event.loss)  # with λ = 0 this is the Lagrangian
            assert event.multipliers_updated == (sums[-1] >= previous)
            previous = 1e10 if event.multipliers_updated else sums[-1]
    assert told == pytest.approx(sums)
    assert run.constrained.method.describe()["window"] > 1


# the end


def batch_statistics(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Plain averages over batches of mean and unbiased variance per channel."""
    columns = [value.transpose(0, 1).flatten(1) for value in values]
    means, variances = [c.mean(1) for c in columns], [c.var(1, unbiased=True) for c in columns]
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


@pytest.mark.parametrize("count, used", [(1, 1), (3, 3), (100, 4)])
def test_batchnorm_is_estimated_anew(count: int, used: int) -> None:
    loader = Loader()
    run = start(loader, batchnorm_batches=count)
    list(train(run))
    ticks: list[None] = []
    finish(run, lambda: ticks.append(None))
    assert len(ticks) == used
    assert loader.asked[-1] == (2, 0)  # an epoch that training has not seen
    assert not any(module.training for module in run.model.modules())

    model = run.model
    assert isinstance(model, Net)
    inputs = [loader.batch(2, position).images for position in range(used)]
    with torch.no_grad():
        first = [model.stem(images) for images in inputs]
        normal = [
            nn.functional.batch_norm(x, None, None, model.norm.weight, model.norm.bias, training=True) for x in first
        ]
        second = [model.conv(x.relu()) for x in normal]
    for norm, values in ((model.norm, first), (model.norm2, second)):
        mean, variance = batch_statistics(values)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-6)
        assert norm.num_batches_tracked == used
    assert (model.norm.momentum, model.norm2.momentum) == (0.1, 0.3)


def test_batchnorm_is_left_as_it_was() -> None:
    run = start(batchnorm_batches=0)
    list(train(run))
    before = copy.deepcopy({k: v for k, v in run.model.state_dict().items() if "norm" in k})
    finish(run)
    assert same({k: v for k, v in run.model.state_dict().items() if "norm" in k}, before)
    assert not run.model.training


def test_batchnorm_of_an_auxiliary_head_keeps_its_statistics() -> None:
    run = start(model=net(TwoHeads))
    list(train(run))
    before = copy.deepcopy(run.model.get_submodule("aux").state_dict())
    finish(run)
    assert before["0.num_batches_tracked"] == 8
    assert same(dict(run.model.get_submodule("aux").state_dict()), dict(before))


def test_networks_without_running_statistics() -> None:
    model = net()
    assert isinstance(model, Net)
    model.norm = nn.BatchNorm2d(4, track_running_stats=False)
    model.norm2 = nn.Identity()  # type: ignore[assignment]  # reason: another layer in its place
    run = start(model=model)
    list(train(run))
    finish(run)
    assert run.constrained.model is model


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_finished_network_is_what_the_file_will_hold(constraint: str) -> None:
    run = start(constraint=constraint)
    list(train(run))
    finish(run)
    tensors = run.constrained.tensors()
    assert set(tensors) == {"conv.weight", "linear.weight"}
    for name, tensor in tensors.items():
        assert torch.equal(torch.from_numpy(tensor.weight()), run.model.get_parameter(name))


# the checkpoint file

IDENTITY = {"epochs": 10, "lr": 0.1, "network": "resnet18", "layers": ["a", "b"], "max time": None}
STATE = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "rng": torch.get_rng_state(), "log": ["x"], "none": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.pt"


def test_checkpoint_round_trip(path: Path) -> None:
    save_checkpoint(path, IDENTITY, STATE)
    assert same(load_checkpoint(path, IDENTITY), STATE)
    save_checkpoint(path, IDENTITY, {"other": 1})
    assert load_checkpoint(path, IDENTITY) == {"other": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["state.pt"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"epochs": 20}, "epochs was 10, now 20; use --overwrite"),
        ({"epochs": 20, "lr": 0.2}, "epochs was 10, now 20; lr was 0.1, now 0.2; use --overwrite"),
        ({"network": "resnet50"}, "network was resnet18, now resnet50"),
        ({"layers": ["a"]}, r"layers was \['a', 'b'\], now \['a'\]"),
        ({"max time": 3.0}, "max time was None, now 3.0"),
        ({"device": "cuda"}, "device was None, now cuda"),
    ],
)
def test_checkpoint_of_another_run(change: dict[str, Any], message: str, path: Path) -> None:
    save_checkpoint(path, IDENTITY, STATE)
    with pytest.raises(UsageError, match=message) as caught:
        load_checkpoint(path, {**IDENTITY, **change})
    assert "\n" not in str(caught.value)


def test_differences() -> None:
    assert differences(IDENTITY, dict(IDENTITY)) == []
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == [
        "a was 1, now None",
        "b was 2, now 3",
        "c was None, now 4",
    ]


def refused(path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"state.pt is damaged and cannot be resumed from; use --overwrite"
    ) as caught:
        load_checkpoint(path, IDENTITY)
    assert "\n" not in str(caught.value)


def test_checkpoint_cut_short_anywhere(path: Path) -> None:
    save_checkpoint(path, IDENTITY, STATE)
    data = path.read_bytes()
    for length in [*range(80), *range(80, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        refused(path)


def test_checkpoint_with_a_flipped_bit_anywhere(path: Path) -> None:
    save_checkpoint(path, IDENTITY, STATE)
    data = path.read_bytes()
    for position in range(0, len(data), 23):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(bytes(damaged))
        refused(path)


def signed(content: bytes) -> bytes:
    return hashlib.sha256(content).digest() + content


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Evil:
    """A pickle that would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def test_files_that_are_no_checkpoint(path: Path) -> None:
    whole = {"version": 1, "identity": IDENTITY, "state": STATE}
    for content in (
        b"",
        b"not a checkpoint",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        saved(whole),  # without the digest
        signed(b""),
        signed(b"junk"),
        signed(saved(torch.zeros(3))),
        signed(saved([1, 2])),
        signed(saved({"version": 1})),
        signed(saved({**whole, "identity": [1]})),
        signed(saved({**whole, "identity": None})),
        signed(saved({**whole, "state": 3})),
    ):
        path.write_bytes(content)
        refused(path)
    path.unlink()
    refused(path)
    path.mkdir()
    refused(path)


def test_checkpoint_with_code_in_it(path: Path) -> None:
    target = path.parent / "made by the pickle"
    evil = {"version": 1, "identity": IDENTITY, "state": {"x": Evil(target)}}
    for content in (saved(evil), pickle.dumps(evil, protocol=2)):
        for data in (content, signed(content)):
            path.write_bytes(data)
            refused(path)
    assert not target.exists()


def test_checkpoint_of_another_version(path: Path) -> None:
    path.write_bytes(signed(saved({"version": 2, "identity": IDENTITY, "state": STATE})))
    with pytest.raises(TrainingError, match="written by another version of cbpq"):
        load_checkpoint(path, IDENTITY)


def test_checkpoint_that_cannot_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(path, IDENTITY, STATE)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CbpqError, match="No space left on device"):
            save_checkpoint(path, IDENTITY, {"other": 1})
    assert same(load_checkpoint(path, IDENTITY), STATE)
    with pytest.raises(CbpqError, match="cannot write"):
        save_checkpoint(path / "below" / "a file", IDENTITY, STATE)
    atomic_write(path, b"")
    refused(path)


class Viewed(Net):
    """Calls ``view`` across channels, which images in channels-last order would not bear."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8 * 2 * 2, CLASSES)

    def forward(self, x: Tensor) -> Any:
        x = self.norm2(self.conv(self.norm(self.stem(x)).relu())).relu()
        return self.head(x.view(len(x), -1))


@pytest.mark.parametrize("kind, layout", [(Net, torch.channels_last), (Viewed, torch.contiguous_format)])
def test_images_lie_in_memory_as_the_network_can_take_them(kind: type[nn.Module], layout: torch.memory_format) -> None:
    run = start(model=net(kind))
    seen: list[bool] = []
    run.model.get_submodule("stem").register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].is_contiguous(memory_format=layout))
    )
    list(train(run))
    finish(run)
    assert run.layout is layout
    assert all(seen[1:])  # the first asked the network
