"""Training a constrained network: ``train`` is a generator of typed events. It prints nothing and writes no file.

    run = prepare(model, loader, …)      # everything a run is made of
    for event in train(run): …           # show it; save run.state_dict() whenever you like
    finish(run)                          # of ``cbpq.settling``: every weight on its level

Whoever iterates may stop at any event: the state is complete there, and a run that loads it goes on exactly as if
nothing had happened (bit for bit on a CPU).
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cbpq import distributed
from cbpq.blocks import find_blocks
from cbpq.compensation import Start
from cbpq.constrained import Constrained, bind
from cbpq.data import Batch, TrainLoader
from cbpq.errors import TrainingError, brief
from cbpq.features import FeaturePair
from cbpq.layers import LayerChoice
from cbpq.levels import LevelSet
from cbpq.models import auxiliary_logits, logits
from cbpq.presets import Settings
from cbpq.recipe import cosine, loss_of, make_optimizer
from cbpq.tracing import batch_norms, image_format
from cbpq.views import other_views

SMALLEST_LOSS_SCALE = 2.0**-20
AUXILIARY_WEIGHT = 0.3  # of each auxiliary head's loss (Szegedy et al. 2015, GoogLeNet)
MEASURE_EVERY = 10  # steps between measurements of CFS and Lagrangian, which pass over all weights


@dataclass(frozen=True)
class Step:
    """An optimizer step was made. ``lagrangian`` and ``cfs`` are measured on some steps only."""

    epoch: int
    step: int
    steps_per_epoch: int
    progress: float
    loss: float
    lr: float
    window: float | None
    images_per_second: float
    lagrangian: float | None = None
    cfs: float | None = None


@dataclass(frozen=True)
class EpochEnd:
    """An epoch is over. ``epoch`` counts from 1; ``loss`` is its mean over batches."""

    epoch: int
    epochs: int
    loss: float
    cfs: float
    window: float | None
    lr: float
    multipliers_updated: bool
    seconds: float


Event = Step | EpochEnd


@dataclass
class Training:
    """A network that is trained, whoever changes its weights. ``epoch`` and ``step`` say what is done, ``steps`` counts
    them all.
    """

    model: nn.Module
    teacher: nn.Module | None
    optimizer: torch.optim.Optimizer
    loader: TrainLoader
    settings: Settings
    device: torch.device
    autocast: torch.dtype | None = None  # what it computes in where that is safe, if not in float32
    max_seconds: float = math.inf
    epoch: int = 0
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    images_seen: int = 0
    done: bool = False
    features: FeaturePair | None = None
    layout: torch.memory_format | None = None  # of images; the first batch tells
    averaging: nn.Module | None = None  # the network as it trains in one of several processes
    _clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    def __post_init__(self) -> None:
        # float16 loses small gradients unless the loss is scaled; a scaler that is not enabled does nothing
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)

    @property
    def progress(self) -> float:
        """Share of the budget that is used, in epochs or in time, whichever is nearer its end."""
        steps = (self.epoch * len(self.loader) + self.step) / max(self.settings.epochs * len(self.loader), 1)
        return min(1.0, max(steps, self.seconds / self.max_seconds))


@dataclass
class Run(Training):
    """Everything the training of a constrained network is made of."""

    constrained: Constrained = field(kw_only=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly from here: tensors and plain values only."""
        own, *others = distributed.gathered(
            {
                "rng": torch.get_rng_state(),
                "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            }
        )
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "constrained": self.constrained.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": {name: getattr(self, name) for name in _POSITION},
            **own,
            "rng_others": others,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.constrained.load_state_dict(state["constrained"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name, value in state["position"].items():
            setattr(self, name, value)
        random = [state, *state.get("rng_others", [])]
        if len(random) != distributed.world_size():  # it goes on with more or fewer processes
            torch.manual_seed(self.settings.seed + self.steps * len(random) + distributed.rank())
            return
        own = random[distributed.rank()]
        torch.set_rng_state(own["rng"].cpu())
        if own["rng_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(own["rng_cuda"].cpu(), self.device)


_POSITION = ("epoch", "step", "steps", "seconds", "loss_sum", "images_seen", "done")


def prepare(
    model: nn.Module,
    loader: TrainLoader,
    *,
    levels: LevelSet,
    method: str,
    settings: Settings,
    layers: LayerChoice,
    device: torch.device,
    autocast: torch.dtype | None = None,
    max_seconds: float = math.inf,
    teacher: nn.Module | None = None,
    starts: Mapping[str, Start] | None = None,
) -> Run:
    """Put a run together. ``model`` is constrained in place.

    Where the settings distil, ``teacher`` is the original network, by default ``model`` as it is. ``starts`` says where
    each weight starts, by default at what it is.
    """
    torch.manual_seed(settings.seed + distributed.rank())
    model.to(device)
    if settings.batchnorm != "frozen":
        model = distributed.with_shared_statistics(model, device)
    if not settings.distillation:
        teacher = None
    elif teacher is None:
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, settings)
    constrained = bind(model, optimizer, levels, method, settings, layers, starts)
    run = Run(model, teacher, optimizer, loader, settings, device, autocast, max_seconds, constrained=constrained)
    get_ready(run, constrained.names)
    return run


def get_ready(run: Training, names: Sequence[str]) -> None:
    """What is left to do once there is an optimizer; ``names`` are the weights that are constrained."""
    for group in run.optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    run.done = run.settings.epochs == 0
    if not run.done:
        run.averaging = distributed.averaging(run.model, run.device)
    if run.teacher is not None and run.settings.distillation_loss == "features" and not run.done:
        images = next(iter(run.loader.epoch(0))).images.to(run.device)
        run.features = FeaturePair(run.model, run.teacher, find_blocks(run.model, names, images))


def train(run: Run) -> Iterator[Event]:
    """Train until the budget is used. Yields after every step and every epoch.

    Raises:
        TrainingError: the loss is not finite.
    """
    train_mode(run)
    while not run.done:
        epoch_started, first = run._clock(), run.step
        for batch, loss in take_steps(run):
            run.constrained.advance(run.progress)
            images = len(batch.labels) * distributed.world_size()
            rate = (run.step - first) * images / max(run._clock() - epoch_started, 1e-9)
            yield _step_event(run, loss, rate)
        yield _end_epoch(run, run._clock() - epoch_started)


def train_mode(run: Training) -> None:
    """The network in training mode, but for BatchNorm layers that are to stay as they are."""
    run.model.train()
    if run.settings.batchnorm == "frozen":
        for norm in batch_norms(run.model):
            norm.eval()


def take_steps(run: Training) -> Iterator[tuple[Batch, float]]:
    """The steps that are left of an epoch. Yields after each its batch and loss.

    Raises:
        TrainingError: the loss is not finite.
    """
    started = run._clock() - run.seconds
    for batch in run.loader.epoch(run.epoch, run.step):
        if run.progress >= 1:  # the time is up
            return
        set_lr(run)
        loss = take_step(run, batch)
        run.loss_sum += loss
        run.step += 1
        run.steps += 1
        run.images_seen += len(batch.labels) * distributed.world_size()
        run.seconds = distributed.from_main(lambda: run._clock() - started)
        yield batch, loss


def take_step(run: Training, batch: Batch) -> float:
    """One optimizer step on one batch; the loss."""
    images, labels = laid_out(run, batch.images), batch.labels.to(run.device)
    run.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(run.device.type, dtype=run.autocast, enabled=run.autocast is not None):
        output = forward(run, images)
        with torch.no_grad():
            target = answer(run, run.teacher, images) if run.teacher is not None else None
        difference = None
        if run.features is not None and target is not None:
            weight = 1 - run.progress if run.settings.blocks_fade else 1.0
            difference = run.features.loss(logits(output), target, weight)
        loss = loss_of(logits(output), labels, target, run.settings, difference)
        for auxiliary in auxiliary_logits(output):
            loss = loss + AUXILIARY_WEIGHT * loss_of(auxiliary, labels, target, run.settings)
    value = float(distributed.mean(loss.detach()))
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss became {value} in epoch {run.epoch + 1}, step {run.step + 1}; "
            f"lower --lr (now {run.settings.lr:g}) or run without --amp"
        )
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.scaler.is_enabled() and run.scaler.get_scale() < SMALLEST_LOSS_SCALE:
        raise TrainingError(
            f"gradients are not finite in float16, not even of the loss times {SMALLEST_LOSS_SCALE:.0e}; use bfloat16 "
            "(--set amp_dtype=bfloat16), or run without --amp"
        )
    return value


def answer(run: Training, teacher: nn.Module, images: Tensor) -> Tensor:
    """What the original answers to a batch, logits (B, classes): their mean over ``distillation_views`` views."""
    others = other_views(images, run.loader.augmentation, run.settings.distillation_views - 1)
    answers = [logits(teacher(laid_out(run, view))) for view in others]
    # the pictures themselves come last, since ``features`` keeps what the blocks gave last
    return torch.stack([*answers, logits(teacher(images))]).mean(0)


def laid_out(run: Training, images: Tensor) -> Tensor:
    """A batch's images on the run's device, as the network takes them fastest."""
    images = images.to(run.device)
    if run.layout is None:
        run.layout = image_format(run.model, images)
    return images.contiguous(memory_format=run.layout)


def forward(run: Training, images: Tensor) -> Any:
    """What the network returns for a batch (B, C, H, W).

    Raises:
        TrainingError: BatchNorm finds the batch too small.
    """
    try:
        return (run.model if run.averaging is None else run.averaging)(images)
    except ValueError as error:
        raise TrainingError(
            f"the network cannot be trained on batches of {len(images)} ({brief(error)}); "
            "raise --batch-size, or give more training pictures"
        ) from error


def set_lr(run: Training) -> None:
    """Learning rate at this point of the budget: each group's ``initial_lr`` times warm-up and schedule."""
    settings, progress = run.settings, run.progress
    if progress < settings.warmup:
        factor = (progress + 1 / max(settings.epochs * len(run.loader), 1)) / settings.warmup
    elif settings.lr_schedule == "cosine":
        factor = cosine((progress - settings.warmup) / max(1 - settings.warmup, 1e-9))
    else:
        factor = 1.0
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * min(factor, 1.0)


def _step_event(run: Run, loss: float, rate: float) -> Step:
    measured = run.step % MEASURE_EVERY == 0 or run.step == len(run.loader)
    return Step(
        epoch=run.epoch + 1,
        step=run.step,
        steps_per_epoch=len(run.loader),
        progress=run.progress,
        loss=loss,
        lr=run.optimizer.param_groups[0]["lr"],
        window=run.constrained.method.describe().get("window"),
        images_per_second=rate,
        lagrangian=loss + run.constrained.penalty() if measured else None,
        cfs=run.constrained.cfs() if measured else None,
    )


def _end_epoch(run: Run, seconds: float) -> EpochEnd:
    update = run.constrained.end_epoch(run.loss_sum)
    loss = next_epoch(run)
    return EpochEnd(
        epoch=run.epoch,
        epochs=run.settings.epochs,
        loss=loss,
        cfs=run.constrained.cfs(),
        window=run.constrained.method.describe().get("window"),
        lr=run.optimizer.param_groups[0]["lr"],
        multipliers_updated=update.multipliers_updated,
        seconds=seconds,
    )


def next_epoch(run: Training) -> float:
    """Close an epoch; the mean of its losses."""
    loss = run.loss_sum / max(run.step, 1)
    run.done = run.progress >= 1
    run.epoch, run.step, run.loss_sum = run.epoch + 1, 0, 0.0
    return loss
