"""Every setting of every preset: in one table those that all methods share, the fields of ``Settings``; a method's own
stand in its file.

``paper`` is the published recipe of CBP (Kim & Jeong 2021, and the authors' code where the paper is silent), with its
values per model in PAPER_MODELS; for another method it is that method's, its ``paper``. ``default`` is a short
recipe for a budget of ``epochs``, ``little-data`` one for few pictures without labels, or none. Values come, the later
the stronger, from the preset, the preset's line for the model or method, a configuration file, ``CBPQ_*`` variables and
the caller (flags, keywords).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cbpq.errors import UsageError, did_you_mean
from cbpq.methods import METHODS, method_class
from cbpq.methods.base import Method
from cbpq.settings import parse_value, setting, settings_of

PRESETS = ("default", "paper", "little-data")
AUTO = "auto"
"""``default`` where training pictures have labels, ``little-data`` where not."""

COMMAND_LINE = "command line"
"""The origin of a value that the user gave there, by name, for this one run."""

OF_METHODS = {name: entry for method in METHODS.values() for name, entry in settings_of(method).items()}
"""The settings that are some method's own, by name."""


@dataclass(frozen=True)
class Settings:
    """One run's settings. Columns: value in preset ``paper``, in ``default``, in ``little-data``, and the meaning.

    ``of_methods`` has those of OF_METHODS.
    """

    # the budget and the optimizer
    epochs: int = setting(100, 10, 0, "passes over the training data (the published code has no stopping rule)")
    batch_size: int = setting(256, 128, 64, "images per step", least=1)
    optimizer: str = setting("sgd", "adamw", "adamw", "sgd (with momentum) or adamw", choices=("sgd", "adamw"))
    lr: float = setting(1e-3, 1e-3, 1e-3, "learning rate (its peak, where there is a schedule)")
    lr_schedule: str = setting("constant", "cosine", "cosine", "over the budget", choices=("constant", "cosine"))
    warmup: float = setting(0.0, 0.05, 0.05, "share of the budget in which the learning rate rises from 0", most=1)
    momentum: float = setting(0.9, 0.9, 0.9, "of SGD", most=1, idle={"optimizer": "adamw"})
    weight_decay: float = setting(
        1e-4, 1e-4, 1e-4, "on convolution and linear weights, none on biases and normalisations"
    )
    seed: int = setting(0, 0, 0, "of data order, augmentation and anything else random", most=2**63 - 1)
    epoch_images: int = setting(
        0, 0, 1024, "images in an epoch: fewer pictures are gone through several times in one (0: always once)"
    )
    # before training
    rounding: str = setting(
        "nearest",
        "compensated",
        "compensated",
        "first rounding of the weights: to the nearest level, or compensated for its own errors",
        choices=("nearest", "compensated"),
    )
    latent_weights: str = setting(
        "original",
        "compensated",
        "compensated",
        "what training takes from the rounding: the weights as they were (original), as they were just before they "
        "were placed (compensated), or as they are on their levels (snapped)",
        choices=("original", "compensated", "snapped"),
    )
    reconstruction_steps: int = setting(0, 0, 50, "steps for each block in which it learns the original's outputs")
    reconstruction_lr: float = setting(
        1e-2, 1e-2, 1e-3, "learning rate of these steps (its peak)", idle={"reconstruction_steps": 0}
    )
    reconstruction_images: int = setting(
        0,
        0,
        2048,
        "images for it at least: fewer pictures are augmented several times",
        least=0,
        idle={"reconstruction_steps": 0},
    )
    # the loss
    distillation: float = setting(
        0.0, 1.0, 1.0, "share of the loss that compares with the original network's outputs", most=1
    )
    temperature: float = setting(
        1.0,
        1.0,
        1.0,
        "of the softmax in distillation by KL divergence",
        least=1e-3,
        idle={"distillation": 0.0, "distillation_loss": "features"},
    )
    distillation_loss: str = setting(
        "kl",
        "features",
        "features",
        "what distillation compares: outputs by KL divergence (kl), or outputs and what blocks give, by relative "
        "squared difference (features)",
        choices=("kl", "features"),
        idle={"distillation": 0.0},
    )
    distillation_views: int = setting(
        1,
        1,
        1,
        "views of a picture that the original answers: the picture, then mirrored and moved ones as far as training "
        "does that too; their mean is what is learned",
        least=1,
        idle={"distillation": 0.0},
    )
    blocks_fade: bool = setting(
        False,
        True,
        False,
        "let the blocks' part of it (features) fall along the budget, linearly, to nothing",
        idle={"distillation": 0.0, "distillation_loss": "kl"},
    )
    # normalisation
    batchnorm: str = setting(
        "batch",
        "batch",
        "batch",
        "statistics that BatchNorm uses in training: each batch's, or the frozen running ones",
        choices=("batch", "frozen"),
    )
    # the grid
    scale_rule: str = setting(
        "mean-abs",
        "least-squares",
        "least-squares",
        "first scale; compensated rounding finds its own",
        choices=("mean-abs", "least-squares"),
        idle={"rounding": "compensated"},
    )
    scale_granularity: str = setting("layer", "channel", "channel", "one scale for each", choices=("layer", "channel"))
    learn_scales: bool = setting(False, True, True, "train the scales along with the weights")
    scale_lr: float = setting(
        1.0, 1.0, 1.0, "learning rate of learned scales, as a multiple of lr", idle={"learn_scales": False}
    )
    # the end, and the way there
    amp_dtype: str = setting(
        "bfloat16",
        "bfloat16",
        "bfloat16",
        "what --amp computes in; float16, with a scaled loss, is for GPUs older than bfloat16",
        choices=("bfloat16", "float16"),
        idle={"amp": False},
    )
    batchnorm_batches: int = setting(
        0, 100, 100, "training batches to re-estimate BatchNorm statistics from at the end"
    )
    evaluate_every: int = setting(
        1, 1, 1, "epochs between evaluations while training; 0: neither then nor between stages"
    )
    checkpoint_minutes: float = setting(5.0, 5.0, 5.0, "minutes between checkpoints within an epoch")

    of_methods: Mapping[str, Any] = field(
        default_factory=lambda: {name: entry.default for name, entry in OF_METHODS.items()}
    )

    def of(self, method: type[Method]) -> dict[str, Any]:
        """What a method's constructor takes."""
        return {name: self.of_methods[name] for name in settings_of(method)}

    def to_dict(self) -> dict[str, Any]:
        """All settings by name."""
        return {name: getattr(self, name) for name in SHARED} | dict(self.of_methods)


SHARED = settings_of(Settings)
SETTINGS = {**SHARED, **OF_METHODS}

# The published recipe's values per model. "cifar" is the same group's later setting for networks of that scale, and
# stands here for every input of at most 64 pixels. Shift constraints take a tenth of the learning rate on two of the
# networks.
PAPER_MODELS: dict[str, dict[str, Any]] = {
    "alexnet": {"lr": 1e-3, "batch_size": 256, "weight_decay": 5e-4, "multiplier_lr": 1e-4},
    "resnet18": {"lr": 1e-3, "batch_size": 256, "weight_decay": 1e-4, "multiplier_lr": 1e-4},
    "resnet50": {"lr": 1e-3, "batch_size": 128, "weight_decay": 1e-4, "multiplier_lr": 1e-4},
    "cifar": {"lr": 1e-2, "batch_size": 128, "weight_decay": 1e-4, "multiplier_lr": 1e-3},
}
PAPER_SHIFT_LR = {"alexnet": 1e-4, "resnet50": 1e-4}
# The finer the levels, the nearer they are to the start, and larger steps lead away from there first.
DEFAULT_LR = {"binary": 2e-3, "two-bit-shift": 5e-4}
# Above so many steps a budget is long: smaller steps, as noise carries a weight a distance that grows with lr · √steps,
# and weights that come to two levels gradually, from where they were. These end nearer to the original then, and not in
# fewer steps; fast multipliers hold some before they have found their side (examples/cifar10/TRIALS.md).
LONG_BUDGET_STEPS = 480
LONG_BUDGET_CBP = {
    "binary": {
        "soft_window": True,
        "window_close": 0.95,
        "window_power": 3.0,
        "multiplier_lr": 4e-6,
        "latent_weights": "original",
    },
}
# Little data: with fine levels rounding alone comes so close that training on a few pictures wins nothing; with two or
# three levels it does.
LITTLE_DATA_EPOCHS = {"binary": 16, "ternary": 16}
# Inputs above SMALL_INPUT pixels are expensive, and their networks large enough to learn a few pictures by heart.
LITTLE_DATA_LARGE = {"epochs": 0, "batch_size": 32, "epoch_images": 256, "reconstruction_images": 256}
SMALL_INPUT = 64


@dataclass(frozen=True)
class Resolved:
    """Settings, and where each value comes from."""

    preset: str
    settings: Settings
    origins: Mapping[str, str]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """``{name: {"value": …, "from": …}}``."""
        return {name: {"value": value, "from": self.origins[name]} for name, value in self.settings.to_dict().items()}


def resolve(
    preset: str = "default",
    *,
    architecture: str = "",
    input_size: int = 224,
    constraint: str = "",
    method: str = "cbp",
    images: int = 0,
    layers: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> Resolved:
    """Settings of a preset, overridden by ``layers``.

    Args:
        preset: one of PRESETS.
        architecture: the network's name, for the published recipe's table per model.
        input_size: the larger of height and width, in pixels, for the same.
        constraint: its name, for the same.
        method: its name: preset ``paper`` is that method's published recipe.
        images: training pictures, 0 where that is not known: preset ``default`` has values of its own for budgets of
            more than LONG_BUDGET_STEPS steps in all, above which the learning rate falls with the square root of their
            number.
        layers: (origin, values) from the weakest to the strongest; values may be strings, as environment variables are.

    Raises:
        UsageError: an unknown preset, method or setting (with the nearest names), or a value that does not fit.
    """
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}{did_you_mean(preset, PRESETS)}; known are {', '.join(PRESETS)}")
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def lay(origin: str, mapping: Mapping[str, Any]) -> None:
        for name, value in mapping.items():
            values[name] = parse_setting(name, value, origin)
            origins[name] = origin

    lay(
        f"preset {preset}",
        {name: entry.metadata["values"][preset] for name, entry in SETTINGS.items()},
    )
    if preset == "paper" and (recipe := method_class(method).paper):
        lay(f"preset paper, method {method}", recipe)
    elif preset == "paper":
        model = paper_model(architecture, input_size)
        lay(f"preset paper, model {model}", PAPER_MODELS[model])
        if model in PAPER_SHIFT_LR and "shift" in constraint:
            lay(f"preset paper, model {model}, shift constraints", {"lr": PAPER_SHIFT_LR[model]})
    if preset == "default" and constraint in DEFAULT_LR:
        lay(f"preset default, {constraint}", {"lr": DEFAULT_LR[constraint]})
    if preset == "little-data":
        if constraint in LITTLE_DATA_EPOCHS:
            lay(f"preset little-data, {constraint}", {"epochs": LITTLE_DATA_EPOCHS[constraint]})
        if input_size > SMALL_INPUT:
            lay("preset little-data, large inputs", LITTLE_DATA_LARGE)
    for origin, mapping in layers:
        lay(origin, mapping)
    steps = values["epochs"] * max(images, values["epoch_images"]) / values["batch_size"]
    if preset == "default" and steps > LONG_BUDGET_STEPS:
        long: dict[str, Any] = {"lr": float(f"{values['lr'] * math.sqrt(LONG_BUDGET_STEPS / steps):.2g}")}
        if method == "cbp":
            long |= LONG_BUDGET_CBP.get(constraint, {})
        given = {name for _, mapping in layers for name in mapping}
        lay("preset default, long budget", {name: value for name, value in long.items() if name not in given})
    own = {name: values.pop(name) for name in OF_METHODS}
    return Resolved(preset, Settings(**values, of_methods=own), origins)


def without_effect(resolved: Resolved, method: str, amp: bool = False) -> dict[str, str]:
    """Settings that the user gave on the command line, and that this run makes no use of: why, by name."""
    values = resolved.settings.to_dict() | {"amp": amp}
    own = settings_of(method_class(method))
    given = [name for name, origin in resolved.origins.items() if origin == COMMAND_LINE]
    reasons = {}
    for name in given:
        idle = SETTINGS[name].metadata["idle"]
        beside = [f"{other} is {str(value).lower()}" for other, value in idle.items() if values[other] == value]
        if name in OF_METHODS and name not in own:
            reasons[name] = f"method {method} does not have it"
        elif beside:
            reasons[name] = " and ".join(beside)
    return reasons


def paper_model(architecture: str, input_size: int) -> str:
    """The line of PAPER_MODELS for a network: its own, else by its input's size (ResNet-18's for ImageNet sizes)."""
    name = architecture.split(".")[0]
    if input_size > SMALL_INPUT:
        return name if name in PAPER_MODELS else "resnet18"
    return "cifar"


def parse_setting(name: str, value: Any, origin: str) -> Any:
    """A setting's value in its own type, from that type or from text.

    Raises:
        UsageError: no such setting, or a value out of its range; the message names ``origin``.
    """
    if name not in SETTINGS:
        raise UsageError(f"unknown setting {name!r} from {origin}{did_you_mean(name, SETTINGS)}")
    return parse_value(SETTINGS[name], value, origin)
