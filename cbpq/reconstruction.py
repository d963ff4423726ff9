"""Reconstruction block by block: each block of the rounded network learns to give what the original's block gave.

The idea is BRECQ's (Li et al., ICLR 2021, arXiv 2102.05426): a block has few weights and its target is a whole tensor
of activations for every picture, so that a few hundred pictures say a great deal about it, where labels or outputs say
little. Here the block's weights are led to their levels as in training: by the method (CBP's multipliers and window),
with learned scales. A block's inputs are those of the network as it is by then, so that it also makes up for what the
blocks before it have lost; its targets are the original's.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cbpq.blocks import Block, find_blocks
from cbpq.compensation import Start, run_block, walk
from cbpq.constrained import bind
from cbpq.errors import TrainingError
from cbpq.layers import LayerChoice
from cbpq.levels import LevelSet
from cbpq.presets import Settings
from cbpq.recipe import cosine, make_optimizer, relative_error
from cbpq.tracing import untouched


@dataclass(frozen=True)
class Reconstruction:
    """What ``reconstruct`` does to every block: ``settings.reconstruction_steps`` steps of the method on its weights.

    After ``max_seconds`` for all blocks together, the steps that are left are not made; each block has its share of it.
    """

    levels: LevelSet
    method: str
    settings: Settings
    max_seconds: float = math.inf


def reconstruct(
    model: nn.Module,
    original: nn.Module,
    starts: dict[str, Start],
    plan: Reconstruction,
    images: Sequence[Tensor],
    on_step: Callable[[], object] = lambda: None,
) -> dict[str, Start]:
    """Reconstruct every block of ``model``, in execution order.

    Args:
        model: a rounded network; changed in place, and left with every constrained weight on its level.
        original: the network as it was, on the same device.
        starts: latent weight and scale of every constrained parameter, in execution order.
        plan: levels, method and settings.
        images: batches as the network takes them, on its device.
        on_step: called after every step.

    Returns:
        Latent weights and scales after it. Weights that belong to no block stay as they are.

    Raises:
        TrainingError: a loss that is not finite.
    """
    found = dict(starts)
    blocks = reconstructible(model, list(starts), images[0])
    for block, before, after in walk(original, model, blocks, images):
        targets = [run_block(original, block, batch) for batch in before]
        found |= _reconstruct_block(model, block, found, plan, plan.max_seconds / len(blocks), after, targets, on_step)
    return found


def reconstructible(model: nn.Module, names: Sequence[str], images: Tensor) -> list[Block]:
    """The blocks that are reconstructed: all but the whole network."""
    return [block for block in find_blocks(model, names, images) if block.path]


def _reconstruct_block(
    model: nn.Module,
    block: Block,
    starts: dict[str, Start],
    plan: Reconstruction,
    max_seconds: float,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    on_step: Callable[[], object],
) -> dict[str, Start]:
    module = model.get_submodule(block.path)
    local = {name.removeprefix(f"{block.path}."): name for name in block.weights}
    settings = replace(plan.settings, lr=plan.settings.reconstruction_lr)
    optimizer = make_optimizer(module, settings)
    constrained = bind(
        module,
        optimizer,
        plan.levels,
        plan.method,
        settings,
        LayerChoice(tuple(local), {}),
        starts={short: starts[name] for short, name in local.items()},
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    began, progress = time.monotonic(), 0.0
    with untouched(module), torch.enable_grad():  # evaluation mode: normalisation as the whole network will do it
        for step in range(settings.reconstruction_steps):
            if progress >= 1:  # the time is up
                break
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * cosine(progress)
            order = order or torch.randperm(len(inputs), generator=generator).tolist()
            chosen = order.pop()
            optimizer.zero_grad(set_to_none=True)
            loss = relative_error(module(inputs[chosen].clone()), targets[chosen])
            if not math.isfinite(float(loss.detach())):
                raise TrainingError(
                    f"the loss of block {block.path} became {float(loss.detach())} in step {step + 1}; lower it with "
                    f"--set reconstruction_lr=… (now {settings.reconstruction_lr:g})"
                )
            loss.backward()
            optimizer.step()
            used = (step + 1) / settings.reconstruction_steps
            progress = min(1.0, max(used, (time.monotonic() - began) / max_seconds))
            constrained.advance(progress)
            on_step()
    constrained.finish()
    optimizer.zero_grad(set_to_none=True)
    return {
        name: Start(constrained.latent(short).clone(), constrained.grid(short).scale.detach().clone())
        for short, name in local.items()
    }
