"""Which weights of a network are constrained, and why the others are not.

Constrained are the weights of convolutions and linear layers (subclasses too, transposed ones not) and the projections
of ``nn.MultiheadAttention``, a shared weight once. The first convolution and the classifier stay float unless asked
for: published methods keep them so, because they hold few of the parameters and most of the damage. Both are taken from
timm's configuration where the model has one that fits, else from the order in which a forward pass uses the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cbpq.errors import UsageError, did_you_mean
from cbpq.inputs import InputSpec
from cbpq.tracing import CONVOLUTIONS, trace, unwrapped

AUXILIARY = "auxiliary classifier"
"""Why the classifier of an auxiliary head stays float."""

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class LayerChoice:
    """The decision for every parameter of a network.

    ``constrained`` names parameters in execution order (those no forward pass reaches come last); ``skipped`` gives
    the reason, in plain words, for every other parameter. Together they name each parameter exactly once. ``after``
    names the weights of all convolutions and linear layers from the first constrained one on, in execution order.
    """

    constrained: tuple[str, ...]
    skipped: dict[str, str]
    after: tuple[str, ...] = ()


def choose_layers(
    model: nn.Module,
    *,
    input_spec: InputSpec | None = None,
    example_input: Tensor | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    quantize_first: bool = False,
    quantize_last: bool = False,
) -> LayerChoice:
    """Choose the weights to constrain. The model is left as it was: training flags, buffers, random state.

    Args:
        model: any classifier, on any device.
        input_spec: its input, for the traced forward pass; ``example_input`` (B, ...) goes before it. With neither,
            usual sizes are tried.
        include: shell-style globs; only weights that match one are constrained. A glob is compared with the name of
            the parameter and of every module around it, so ``layer1`` means all of layer1. The first convolution and
            the classifier need ``quantize_first`` or ``quantize_last`` even when a glob names them.
        exclude: globs of weights to leave float; stronger than ``include`` and the two flags.
        quantize_first: constrain the first convolution too.
        quantize_last: constrain the classifier, and the classifiers of auxiliary heads, too.

    Raises:
        UsageError: a glob that matches no candidate, nothing to constrain, or a network whose first and last layer
            cannot be found.
    """
    candidates = _candidates(model)
    if not candidates:
        raise UsageError(f"{type(model).__name__} has no convolution or linear weight to constrain")
    for option, globs in (("--include", include), ("--exclude", exclude)):
        for glob in globs:
            if not any(_matches(name, [glob]) for name in candidates):
                raise UsageError(f"{option} {glob!r} matches no convolution or linear weight{_near(glob, candidates)}")

    # where the trace fails but timm's configuration names both ends, the order is that of registration
    used, failure = trace(model, candidates, input_spec, example_input)
    first, last = _ends(model, candidates, used)
    if (not first and not quantize_first) or (not last and not quantize_last):
        raise UsageError(
            f"the first layer and the classifier of {type(model).__name__} cannot be told, because {failure}; pass "
            "example_input, or quantize_first and quantize_last and name what stays float with exclude"
        )
    order = list(dict.fromkeys([*used, *candidates]))
    auxiliary = _auxiliary_classifiers(candidates, used, last) if used else []

    skipped: dict[str, str] = {}
    for name in order:
        layer = candidates[name]
        if name in last and not quantize_last:
            skipped[name] = "classifier"
        elif name in first and not quantize_first:
            skipped[name] = "first convolution" if isinstance(layer, CONVOLUTIONS) else "first layer"
        elif name in auxiliary and not quantize_last:
            skipped[name] = AUXILIARY
        elif _matches(name, exclude):
            skipped[name] = "excluded by --exclude"
        elif include and not _matches(name, include):
            skipped[name] = "not matched by --include"
    constrained = tuple(name for name in order if name not in skipped)
    if not constrained:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:3])
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        raise UsageError(
            f"no weight is left to constrain: skipped are {reasons}{more}; widen --include or --exclude, "
            "or add --quantize-first or --quantize-last"
        )
    skipped |= _other_parameters(model, candidates)
    return LayerChoice(constrained, skipped, tuple(order[order.index(constrained[0]) :]))


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every weight that could be constrained, with the layer that owns it, in order of registration."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            own: tuple[str, ...] = ("weight",)
        elif isinstance(module, nn.MultiheadAttention):
            own = _ATTENTION_WEIGHTS
        else:
            continue
        for key in own:
            parameter = module._parameters.get(key)
            if is_lazy(parameter):
                raise UsageError(f"{path} has no shape yet; run one forward pass before constraining the network")
            if parameter is not None:
                found.setdefault(names[id(parameter)], module)
    return found


def end_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Weights of the first layer and of the classifier (several where it has several heads); empty if unknown."""
    candidates = _candidates(model)
    first, last = _from_timm(model, "first_conv", candidates), _from_timm(model, "classifier", candidates)
    if candidates and not (first and last):
        first, last = _ends(model, candidates, trace(model, candidates, None, None)[0])
    return first, last


def _ends(model: nn.Module, candidates: dict[str, nn.Module], used: list[str]) -> tuple[list[str], list[str]]:
    first = _from_timm(model, "first_conv", candidates) or used[:1]
    last = _from_timm(model, "classifier", candidates)
    if used and (not last or _width(candidates[used[-1]]) == _width(candidates[last[0]])):
        last = [*last, used[-1]]  # a second head that the configuration forgets, as for some of timm's LeViT
    return first, last


def _matches(name: str, globs: Sequence[str]) -> bool:
    parts = name.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatchcase(part, glob) for glob in globs for part in around)


def _near(glob: str, candidates: dict[str, nn.Module]) -> str:
    known = dict.fromkeys(part for name in candidates for part in (name, name.rpartition(".")[0]))
    return did_you_mean(glob, known) or f"; there are {', '.join(list(candidates)[:3])} ..."


def _from_timm(model: nn.Module, key: str, candidates: dict[str, nn.Module]) -> list[str]:
    """Weights of the layers that timm's configuration names under ``key``; none unless every one of them is there."""
    inner = unwrapped(model)
    config: Any = getattr(inner, "pretrained_cfg", None) or getattr(inner, "default_cfg", None)
    named = config.get(key) if isinstance(config, dict) else None
    paths = [named] if isinstance(named, str) else list(named) if isinstance(named, (tuple, list)) else []
    weights = [name for path in paths for name in candidates if _plain(name) == f"{path}.weight"]
    return weights if len(weights) == len(paths) else []


def _plain(name: str) -> str:
    while name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name


def _auxiliary_classifiers(candidates: dict[str, nn.Module], used: list[str], last: list[str]) -> list[str]:
    """The output layers of heads that only training runs (GoogLeNet, Inception): as wide as the classifier."""
    widths = {_width(candidates[name]) for name in last} - {None}
    heads: dict[str, str] = {}
    for name, layer in candidates.items():
        if name not in used and _width(layer) in widths:
            heads[name.rsplit(".", 2)[0]] = name  # of several layers in one head, the last is its output
    return list(heads.values())


def _width(layer: nn.Module) -> int | None:
    return layer.out_features if isinstance(layer, nn.Linear) else getattr(layer, "out_channels", None)


def _other_parameters(model: nn.Module, candidates: dict[str, nn.Module]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if name in candidates:
            continue
        path, _, key = name.rpartition(".")
        if key.endswith("bias"):
            reasons[name] = "bias"
        elif "Norm" in type(modules[path]).__name__:
            reasons[name] = "normalization"
        else:
            reasons[name] = "not a convolution or linear weight" if parameter.dim() >= 2 else "vector or scalar"
    return reasons
