"""Constraining a model from its optimizer's side: the two-line API.

    constrained = cbpq.constrain(model, optimizer, "two-bit-shift", epochs=10)
    ...                                   # your loop, unchanged
    constrained.end_epoch()               # multipliers and window move on

The module's parameters hold what the method has the network compute with; the latent weights live here. Before an
optimizer step the latent weight and the method's gradient are put in, after it the constrained weight is put back.
There is nothing in the forward pass: the network runs at its plain speed, under autocast and torch.compile, and
gradients may accumulate over as many backward passes as you like. With ``cbp`` and ``straight-through`` that is always
a level, so that evaluating, copying or saving the network at any time shows the constrained one. The other methods, and
``cbp`` with ``soft_window=True``, come to the levels gradually: ``with constrained.projected():`` shows the constrained
network, ``finish()`` ends on it.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cbpq.compensation import Start
from cbpq.errors import UsageError
from cbpq.fileformat import ConstrainedTensor
from cbpq.layers import LayerChoice, choose_layers
from cbpq.levels import Grid, LevelSet, level_set, total
from cbpq.methods import method_class
from cbpq.methods.base import Method, Slot, State, Update
from cbpq.presets import Settings, resolve
from cbpq.scales import initial_scale
from cbpq.tracing import unwrapped
from cbpq.weights import ConstrainedWeight, undo_loss_scale


class Constrained:
    """A model whose weights are being led to their levels. Made by ``constrain``.

    Attributes:
        model: the network, its parameters holding what the method has it compute with.
        level_set: the constraint.
        method: how weights are led there.
        settings: the settings in force.
        skipped: weights left in floating point, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        levels: LevelSet,
        method: Method,
        settings: Settings,
        layers: LayerChoice,
        starts: Mapping[str, Start] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.level_set = levels
        self.method = method
        self.settings = settings
        self.skipped = dict(layers.skipped)
        self._epoch = 0
        self._overflow = False  # GradScaler has the optimizer skip this step
        parameters = dict(model.named_parameters())
        owned = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        self._weights: dict[str, ConstrainedWeight] = {}
        for name in layers.constrained:
            parameter = parameters[name]
            if id(parameter) not in owned:
                raise UsageError(
                    f"the optimizer does not hold {name}: give it all parameters that are to be constrained"
                )
            start = starts[name] if starts else None
            self._weights[name] = ConstrainedWeight(parameter, self._slot(name, parameter, start))
        if settings.learn_scales:
            self._add_scales(owned[id(parameters[layers.constrained[0]])])
        with torch.no_grad():
            method.begin(self._slots())
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._install()

    def _slot(self, name: str, parameter: nn.Parameter, start: Start | None) -> Slot:
        latent = parameter.detach().clone()  # in the parameter's memory layout
        if start:
            latent.copy_(start.latent)
        if latent.dtype not in (torch.float32, torch.float64):
            raise UsageError(f"{name} is {latent.dtype}: constrain a float32 model and train it under autocast instead")
        if not bool(latent.isfinite().all()):
            raise UsageError(f"{name} holds a value that is not finite: the checkpoint is damaged")
        if start:
            scale = start.scale.clone()
        else:
            scale = initial_scale(latent, self.level_set, self.settings.scale_rule, self.settings.scale_granularity)
        if self.settings.learn_scales:
            scale.requires_grad_()
        return Slot(latent, Grid(self.level_set, scale), self.method.start(latent))

    def _add_scales(self, beside: dict[str, Any]) -> None:
        """Let the optimizer own the learned scales, in a group with the learning rate of the weights' group and no
        decay.
        """
        group: dict[str, Any] = {
            "params": [weight.slot.grid.scale for weight in self._weights.values()],
            "lr": beside["lr"] * self.settings.scale_lr,
            "weight_decay": 0.0,
        }
        if "initial_lr" in beside:  # a scheduler is at work already
            group["initial_lr"] = beside["initial_lr"] * self.settings.scale_lr
        self.optimizer.add_param_group(group)

    def _slots(self) -> Iterator[Slot]:
        """All constrained weights, as methods see them."""
        return (slot for weight in self._weights.values() for _, slot in weight.pieces)

    def _before_step(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if any(callable(argument) for argument in (*arguments, *keywords.values())):
            raise UsageError(
                "optimizer.step(closure) would run the network on latent weights; call step() without a closure"
            )
        for name, weight in self._weights.items():
            now, then = weight.parameter, weight.slot.latent
            if (now.device, now.dtype) != (then.device, then.dtype):
                raise UsageError(f"{name} became {now.dtype} on {now.device}: move the model first, then constrain it")
        self._overflow = undo_loss_scale(optimizer)
        if self._overflow:
            return
        rates = _rates(optimizer)
        for weight in self._weights.values():
            weight.install_latent(self.method, rates.get(id(weight.parameter), 0.0))

    def _after_step(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self._overflow:
            return
        rates = _rates(optimizer)
        for weight in self._weights.values():
            weight.install_constrained(self.method, rates.get(id(weight.parameter), 0.0))

    @torch.no_grad()
    def _install(self) -> None:
        """Put into the network what the method has it compute with; after ``finish``, the levels."""
        if not self._hooks:
            self.project()
            return
        for weight in self._weights.values():
            weight.install(self.method.constrained_weight)

    @torch.no_grad()
    def advance(self, progress: float) -> Update:
        """Move the method's schedules on, such as CBP's window and multipliers, where they are tied to the budget.

        Args:
            progress: share of the training budget that is used, from 0 to 1. Call as often as you like, for example
                every step.
        """
        update = self.method.advance(min(max(progress, 0.0), 1.0), self._slots())
        if update.weights_changed:
            self._install()
        return update

    @torch.no_grad()
    def end_epoch(self, loss_sum: float | None = None) -> Update:
        """Tell the method that an epoch is over.

        Args:
            loss_sum: the loss summed over the epoch's batches. Preset ``paper`` needs it: its schedule compares the
                Lagrangian of epochs.

        Returns:
            What changed. A drop of the learning rate has already been applied to ``lr``, and where there is one to
            ``initial_lr``, of the optimizer's groups; a scheduler that computes from a copy of its own will undo it.

        Raises:
            UsageError: the schedule needs the loss and it was not given.
        """
        self._epoch += 1
        moved = self.advance(self._epoch / max(self.settings.epochs, 1))
        update = self.method.end_epoch(self._slots(), loss_sum)
        if update.weights_changed:
            self._install()
        update = replace(
            update,
            multipliers_updated=update.multipliers_updated or moved.multipliers_updated,
            weights_changed=update.weights_changed or moved.weights_changed,
        )
        if update.lr_factor != 1:
            for group in self.optimizer.param_groups:
                for key in ("lr", "initial_lr"):
                    if key in group:
                        group[key] *= update.lr_factor
        return update

    @torch.no_grad()
    def project(self, model: nn.Module | None = None) -> None:
        """Put every constrained weight on its nearest level: of this network, from its latent weights; or of ``model``,
        a copy whose weights were averaged or otherwise changed, from the values they have.

        This network is put back to what the method has it compute with by the next step; see ``projected``.
        """
        if model is None:
            for weight in self._weights.values():
                weight.install(lambda slot: slot.grid.nearest(slot.latent))
            return
        parameters = dict(unwrapped(model).named_parameters())
        for name, weight in self._weights.items():
            parameters[name].copy_(weight.slot.grid.nearest(parameters[name]))

    @contextlib.contextmanager
    def projected(self) -> Iterator[None]:
        """Every constrained weight on its nearest level, as at the end; afterwards training goes on as if it had not
        been. For measuring and saving on the way there.
        """
        self.project()
        try:
            yield
        finally:
            self._install()

    def finish(self) -> None:
        """The end: let go of the optimizer and put every weight on its level, whatever the method left it at."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.project()

    @torch.no_grad()
    def cfs(self) -> float:
        """Constraint failure score: mean of Y = 2 |w − nearest| over all constrained latent weights."""
        distance = sum(total(slot.grid.distance(slot.latent)) for slot in self._slots())
        return distance / sum(weight.slot.latent.numel() for weight in self._weights.values())

    @torch.no_grad()
    def penalty(self) -> float:
        """What the method adds to the loss at present, Σ λ cs(w): with it, the loss becomes the Lagrangian."""
        return sum(self.method.penalty(slot) for slot in self._slots())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the constrained parameters, in execution order."""
        return tuple(self._weights)

    def latent(self, name: str) -> Tensor:
        """The latent weight of a constrained parameter (not a copy)."""
        return self._weights[name].slot.latent

    def grid(self, name: str) -> Grid:
        """Levels and scale of a constrained parameter."""
        return self._weights[name].slot.grid

    def state(self, name: str) -> State:
        """What the method keeps for a constrained parameter, such as its multipliers."""
        return self._weights[name].slot.state

    @torch.no_grad()
    def tensors(self) -> dict[str, ConstrainedTensor]:
        """Codes and scales of all constrained weights, as they go into a file."""
        return {
            name: ConstrainedTensor(
                codes=grid.codes(latent).cpu().numpy(),
                scale=grid.scale.detach().float().cpu().reshape(-1 if grid.scale.dim() else ()).numpy(),
                levels=self.level_set.codes,
                denominator=self.level_set.denominator,
                constraint=self.level_set.name,
            )
            for name, (latent, grid, _, _) in ((name, weight.slot) for name, weight in self._weights.items())
        }

    def state_dict(self) -> dict[str, Any]:
        """All that is kept beside model and optimizer: save the three state dicts together to resume exactly."""
        return {
            "constraint": self.level_set.name,
            "method": self.method.name,
            "epoch": self._epoch,
            "scalars": dict(self.method.scalars),
            "weights": {name: weight.kept() for name, weight in self._weights.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave, into a model constrained in the same way.

        Raises:
            UsageError: the state is of another constraint, method or granularity of scales, or of other weights;
                nothing has been changed.
        """
        for key, own_name in (("constraint", self.level_set.name), ("method", self.method.name)):
            if state_dict.get(key) != own_name:
                raise UsageError(f"this state is of {key} {state_dict.get(key)!r}, not {own_name!r}")
        saved = state_dict["weights"]
        if set(saved) != set(self._weights):
            raise UsageError("this state is of a model in which other weights are constrained")
        own = {name: weight.kept() for name, weight in self._weights.items()}
        for name, tensors in own.items():
            if {key: t.shape for key, t in tensors.items()} != {key: t.shape for key, t in saved[name].items()}:
                raise UsageError(f"{name}: this state is of another shape or granularity of scales")
        for name, tensors in own.items():
            for key, tensor in tensors.items():
                tensor.copy_(saved[name][key])
        self._epoch = state_dict["epoch"]
        self.method.scalars.update(state_dict["scalars"])
        self._install()


def _rates(optimizer: Optimizer) -> dict[int, float]:
    """Learning rate of every parameter, by its id. Looked up at every step: loading a state replaces the groups."""
    rates = [(float(group["lr"]), group["params"]) for group in optimizer.param_groups]
    return {id(parameter): rate for rate, parameters in rates for parameter in parameters}


def constrain(
    model: nn.Module,
    optimizer: Optimizer,
    constraint: str | LevelSet = "two-bit-shift",
    method: str = "cbp",
    *,
    preset: str = "default",
    example_input: Tensor | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    quantize_first: bool = False,
    quantize_last: bool = False,
    **settings: Any,
) -> Constrained:
    """Constrain a model's weights while ``optimizer`` trains it. Put the model on its device first.

    Args:
        model: every convolution and linear weight is constrained, except the first convolution and the classifier. Also
            under torch.compile or DistributedDataParallel, not sharded by ``fully_shard``.
        optimizer: any PyTorch optimizer that holds these parameters; stepped without a closure. Learned scales become a
            parameter group of their own, so make learning rate schedulers after this call.
        constraint: ``binary``, ``ternary``, ``one-bit-shift``, ``two-bit-shift``, ``shift:K``, ``levels:…`` or a
            LevelSet.
        method: see ``cbpq.methods``.
        preset: ``default`` ties window and multipliers to the budget of ``epochs``; ``paper`` is the method's published
            recipe, of which CBP's wants the epoch's loss in ``end_epoch(loss_sum)``.
        example_input: a batch as the model takes it, to find its first and last layer if it does not say.
        include: globs of parameter or module names; only these.
        exclude: globs of parameter or module names; not these.
        quantize_first: constrain the first convolution too.
        quantize_last: constrain the classifier too.
        **settings: single settings of the preset (see ``cbpq.presets.Settings``), for example ``epochs=30``.

    Raises:
        UsageError: an unknown name or setting, a constraint that the method does not cover, no layer to constrain, or
            an optimizer without these parameters.
    """
    network = unwrapped(model)
    if any(hasattr(parameter, "device_mesh") for parameter in network.parameters()):
        raise UsageError(
            "this model's parameters are sharded over processes (fully_shard, DTensor), but constrain needs whole "
            "ones; use DistributedDataParallel"
        )
    levels = level_set(constraint)
    layers = choose_layers(
        network,
        example_input=example_input,
        include=include,
        exclude=exclude,
        quantize_first=quantize_first,
        quantize_last=quantize_last,
    )
    # without the constraint's name: what the preset has for single ones is of a whole run, with its start and its rate
    chosen = resolve(preset, method=method, layers=[("the call", settings)]).settings
    return bind(network, optimizer, levels, method, chosen, layers)


def bind(
    network: nn.Module,
    optimizer: Optimizer,
    levels: LevelSet,
    method: str,
    settings: Settings,
    layers: LayerChoice,
    starts: Mapping[str, Start] | None = None,
) -> Constrained:
    """Method × constraint × network × optimizer, with every choice made: what ``constrain`` comes down to.

    ``starts`` says where each weight starts; without it, at the network's weights and the settings' first scales.
    """
    kind = method_class(method)
    kind.check(levels)
    return Constrained(network, optimizer, levels, kind(**settings.of(kind)), settings, layers, starts)
