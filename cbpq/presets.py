"""Every setting of every preset, in one table: the fields of ``Settings``.

``paper`` is the published recipe of CBP (Kim & Jeong 2021, and the authors' code where the paper is silent), with its
values per model in PAPER_MODELS; for another method it is that method's, in PAPER_METHODS. ``default`` is a short
recipe for a budget of ``epochs``, ``little-data`` one for few pictures without labels, or none. Values come, the later
the stronger, from the preset, the preset's line for the model or method, a configuration file, ``CBPQ_*`` variables and
the caller (flags, keywords).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from cbpq.errors import UsageError, did_you_mean

PRESETS = ("default", "paper", "little-data")
AUTO = "auto"
"""``default`` where training pictures have labels, ``little-data`` where not."""


def _setting(
    paper: Any,
    default: Any,
    little_data: Any,
    text: str,
    *,
    choices: Sequence[str] = (),
    least: float = 0,
    most: float = math.inf,
) -> Any:
    values = {"paper": paper, "default": default, "little-data": little_data}
    metadata = {"values": values, "help": text, "choices": tuple(choices), "least": least, "most": most}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """One run's settings. Columns: value in preset ``paper``, in ``default``, in ``little-data``, and the meaning."""

    # the budget and the optimizer
    epochs: int = _setting(100, 10, 0, "passes over the training data (the published code has no stopping rule)")
    batch_size: int = _setting(256, 128, 64, "images per step", least=1)
    optimizer: str = _setting("sgd", "adamw", "adamw", "sgd (with momentum) or adamw", choices=("sgd", "adamw"))
    lr: float = _setting(1e-3, 2e-3, 1e-3, "learning rate (its peak, where there is a schedule)")
    lr_schedule: str = _setting("constant", "cosine", "cosine", "over the budget", choices=("constant", "cosine"))
    warmup: float = _setting(0.0, 0.05, 0.05, "share of the budget in which the learning rate rises from 0", most=1)
    momentum: float = _setting(0.9, 0.9, 0.9, "of SGD", most=1)
    weight_decay: float = _setting(
        1e-4, 1e-4, 1e-4, "on convolution and linear weights, none on biases and normalisations"
    )
    seed: int = _setting(0, 0, 0, "of data order, augmentation and anything else random", most=2**63 - 1)
    epoch_images: int = _setting(
        0, 0, 1024, "images in an epoch: fewer pictures are gone through several times in one (0: always once)"
    )
    # before training
    rounding: str = _setting(
        "nearest",
        "compensated",
        "compensated",
        "first rounding of the weights: to the nearest level, or compensated for its own errors",
        choices=("nearest", "compensated"),
    )
    latent_weights: str = _setting(
        "original",
        "compensated",
        "compensated",
        "what training takes from the rounding: the weights as they were (original), as they were just before they "
        "were placed (compensated), or as they are on their levels (snapped)",
        choices=("original", "compensated", "snapped"),
    )
    reconstruction_steps: int = _setting(0, 0, 50, "steps for each block in which it learns the original's outputs")
    reconstruction_lr: float = _setting(1e-2, 1e-2, 1e-3, "learning rate of these steps (its peak)")
    reconstruction_images: int = _setting(
        0, 0, 2048, "images for it at least: fewer pictures are augmented several times", least=0
    )
    # the loss
    distillation: float = _setting(
        0.0, 1.0, 1.0, "share of the loss that compares with the original network's outputs", most=1
    )
    temperature: float = _setting(1.0, 1.0, 1.0, "of the distillation's softmax", least=1e-3)
    distillation_loss: str = _setting(
        "kl",
        "features",
        "features",
        "what distillation compares: outputs by KL divergence (kl), or outputs and what blocks give, by relative "
        "squared difference (features)",
        choices=("kl", "features"),
    )
    # normalisation
    batchnorm: str = _setting(
        "batch",
        "batch",
        "batch",
        "statistics that BatchNorm uses in training: each batch's, or the frozen running ones",
        choices=("batch", "frozen"),
    )
    # the grid
    scale_rule: str = _setting(
        "mean-abs", "least-squares", "least-squares", "first scale", choices=("mean-abs", "least-squares")
    )
    scale_granularity: str = _setting("layer", "channel", "channel", "one scale for each", choices=("layer", "channel"))
    learn_scales: bool = _setting(False, True, True, "train the scales along with the weights")
    scale_lr: float = _setting(1.0, 1.0, 1.0, "learning rate of learned scales, as a multiple of lr")
    # the method
    multiplier_lr: float = _setting(1e-4, 1e-4, 1e-4, "step size of the ascent in the multipliers")
    multiplier_schedule: str = _setting(
        "lagrangian", "progress", "progress", "when window and multipliers move", choices=("lagrangian", "progress")
    )
    patience: int = _setting(20, 20, 20, "p_max, epochs between multiplier updates (schedule lagrangian)", least=1)
    multiplier_updates: int = _setting(50, 50, 50, "multiplier updates in the whole budget (schedule progress)")
    window_close: float = _setting(
        0.9, 0.9, 0.9, "share of the budget after which the window is shut (progress)", least=1e-6
    )
    gradient_clip: float = _setting(
        1.0, 1.0, 1.0, "bound on each component of a constrained weight's gradient, 0 for none"
    )
    clamp: float = _setting(1.0, 0.0, 0.0, "bound on a latent weight, 0 for none (depthwise weights are often above 1)")
    lr_drop: float = _setting(0.1, 0.1, 0.1, "factor on the learning rate when the window reaches 20 (lagrangian)")
    straight_through_bounded: bool = _setting(
        True, False, False, "straight-through: keep latent weights between the outermost levels"
    )
    proxquant_strength: float = _setting(
        0.03, 0.03, 0.03, "proxquant: pull to the nearest level at the end of the budget, to which it grows from 0"
    )
    proxquant_freeze: float = _setting(
        2 / 3, 2 / 3, 2 / 3, "proxquant: share of the budget after which weights stay on their levels", most=1
    )
    adaste_margin: float = _setting(
        0.01, 0.01, 0.01, "adaste: α, how far beyond the levels they attract a weight", least=1e-6
    )
    adaste_coupling: float = _setting(0.01, 0.01, 0.01, "adaste: μ at first, the attraction's strength", least=1e-6)
    adaste_full: float = _setting(
        0.27, 0.27, 0.27, "adaste: share of the budget after which the attraction is full, μ = 1/α", least=1e-6
    )
    adaste_flip_bound: float = _setting(0.5, 0.5, 0.5, "adaste: bound on a gradient's factor toward the other level")
    askewsgd_rate: float = _setting(1.0, 1.0, 1.0, "askewsgd: κ, how fast a weight returns to its interval")
    askewsgd_free: float = _setting(
        1 / 3, 0.1, 0.1, "askewsgd: share of the budget in which all weights between the outer levels are free", most=1
    )
    askewsgd_end: float = _setting(
        3.5e-5, 3.5e-5, 3.5e-5, "askewsgd: ε at the end of the budget, 1 being free", least=1e-12, most=1
    )
    # the end, and the way there
    amp_dtype: str = _setting(
        "bfloat16",
        "bfloat16",
        "bfloat16",
        "what --amp computes in; float16, with a scaled loss, is for GPUs older than bfloat16",
        choices=("bfloat16", "float16"),
    )
    batchnorm_batches: int = _setting(
        0, 100, 100, "training batches to re-estimate BatchNorm statistics from at the end"
    )
    evaluate_every: int = _setting(
        1, 1, 1, "epochs between evaluations while training; 0: neither then nor between stages"
    )
    checkpoint_minutes: float = _setting(5.0, 5.0, 5.0, "minutes between checkpoints within an epoch")

    def to_dict(self) -> dict[str, Any]:
        """All settings by name."""
        return dataclasses.asdict(self)


SETTINGS = {entry.name: entry for entry in fields(Settings)}

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
# What the other methods' papers do otherwise, as far as it is known; the head of each method's file says more. Networks
# as they were published have levels of one scale per layer, which does not learn, and no teacher: as in CBP's recipe.
PAPER_METHODS: dict[str, dict[str, Any]] = {
    "straight-through": {
        "epochs": 500,
        "batch_size": 50,
        "optimizer": "adamw",
        "lr": 3e-3,
        "lr_schedule": "cosine",
        "weight_decay": 0.0,
    },
    "proxquant": {"epochs": 300, "batch_size": 128, "optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.0},
    "adaste": {"epochs": 700, "batch_size": 128, "lr": 3e-4, "lr_schedule": "cosine", "weight_decay": 0.0},
    "askewsgd": {"epochs": 300, "batch_size": 256, "lr": 0.1},
}
# Finer levels are nearer to the start, and larger steps lead away from there first.
DEFAULT_LR = {"one-bit-shift": 1e-3, "two-bit-shift": 5e-4}
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
    layers: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> Resolved:
    """Settings of a preset, overridden by ``layers``.

    Args:
        preset: one of PRESETS.
        architecture: the network's name, for the published recipe's table per model.
        input_size: the larger of height and width, in pixels, for the same.
        constraint: its name, for the same.
        method: its name: preset ``paper`` is that method's published recipe.
        layers: (origin, values) from the weakest to the strongest; values may be strings, as environment variables are.

    Raises:
        UsageError: an unknown preset or setting (with the nearest names), or a value that does not fit.
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
    if preset == "paper" and method in PAPER_METHODS:
        lay(f"preset paper, method {method}", PAPER_METHODS[method])
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
    return Resolved(preset, Settings(**values), origins)


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
    entry = SETTINGS[name]
    kind = _kind(entry)
    try:
        parsed = _convert(kind, value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"setting {name}: {value!r} from {origin} is no {_KIND_NAMES[kind]}") from error
    choices = entry.metadata["choices"]
    if choices and parsed not in choices:
        raise UsageError(f"setting {name}: {value!r} from {origin} is none of {', '.join(choices)}")
    if kind in (int, float):
        least, most = entry.metadata["least"], entry.metadata["most"]
        if not least <= parsed <= most or parsed == math.inf:
            bound = f"between {least:g} and {most:g}" if most < math.inf else f"at least {least:g}"
            raise UsageError(f"setting {name}: {value!r} from {origin} must be {bound}")
    return parsed


_KIND_NAMES = {int: "whole number", float: "number", bool: "truth value (true or false)", str: "text"}
TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _kind(entry: "dataclasses.Field[Any]") -> type:
    annotation = entry.type
    if get_args(annotation) or not isinstance(annotation, type):
        raise TypeError(f"setting {entry.name} must have a plain type")
    return annotation


def _convert(kind: type, value: Any) -> Any:
    if isinstance(value, bool) != (kind is bool) and not isinstance(value, str):
        raise TypeError
    if kind is bool and isinstance(value, str):
        if value.lower() not in TRUTH:
            raise ValueError
        return TRUTH[value.lower()]
    if kind is int and isinstance(value, float):
        if value != int(value):
            raise ValueError
        return int(value)
    if kind is str and not isinstance(value, str):
        raise TypeError
    return kind(value)
