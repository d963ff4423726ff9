"""The blocks of a network: parts that take one tensor and give one, small enough to be treated one after the other.

A block is the largest module that holds some, and at most MOST_WEIGHTS, of the constrained weights, runs once in a
forward pass, and maps one tensor to one tensor: a residual block, a transformer block, a lone convolution. A Sequential
of such modules is taken apart, so that blocks stay small.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from cbpq.tracing import untouched

MOST_WEIGHTS = 8
UNKNOWN = -1


@dataclass(frozen=True)
class Block:
    """A part of a network: the path of its module, empty for the whole network, and its constrained weights.

    ``follows`` says that its input is the very tensor that the block before it gave.
    """

    path: str
    weights: tuple[str, ...]
    follows: bool = False


@dataclass
class _Calls:
    """How a module was called in one forward pass; the versions count the changes of a tensor in place."""

    count: int = 0
    plain: bool = False
    input: Tensor | None = None
    input_version: int = UNKNOWN
    output: Tensor | None = None
    output_version: int = UNKNOWN

    def gave_what_is_given_to(self, other: "_Calls") -> bool:
        """Whether the output is the other's input, and nothing has changed it in between."""
        same = self.output is not None and self.output is other.input
        return same and self.output_version == other.input_version != UNKNOWN


def find_blocks(model: nn.Module, names: Sequence[str], images: Tensor) -> list[Block]:
    """Divide the constrained weights among blocks, in execution order.

    Args:
        model: the network; left as it was.
        names: its constrained parameters in execution order.
        images: a batch it takes; one image is enough.

    Returns:
        Blocks that hold every name exactly once. Weights that belong to no block (in modules that run more than once,
        or not at all) have the whole network as their block, in as many parts as it takes to keep the order.
    """
    modules = dict(model.named_modules())
    calls = {path: _Calls() for path in modules}

    def before(call: _Calls) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[object, ...], keywords: dict[str, object]) -> None:
            given = [value for value in (*inputs, *keywords.values()) if value is not None]
            call.count += 1
            call.input = given[0] if given and isinstance(given[0], Tensor) else None
            call.input_version = version(call.input)
            call.plain = len(given) == 1 and len(inputs) > 0 and call.input is not None

        return hook

    def after(call: _Calls) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            call.output = output if isinstance(output, Tensor) else None
            call.output_version = version(call.output)

        return hook

    handles = [modules[path].register_forward_pre_hook(before(call), with_kwargs=True) for path, call in calls.items()]
    handles += [modules[path].register_forward_hook(after(call)) for path, call in calls.items()]
    try:
        with untouched(model), torch.no_grad():
            model(images[:1])
    finally:
        for handle in handles:
            handle.remove()

    def holds(path: str) -> tuple[str, ...]:
        return tuple(name for name in names if name.startswith(f"{path}.") or not path)

    def divide(path: str) -> Iterator[Block]:
        held = holds(path)
        if not held or path not in calls:  # a module of several names is known by the first of them
            return
        call = calls[path]
        composite = [
            c for c, child in modules[path].named_children() if any(child.children()) and holds(_join(path, c))
        ]
        whole = path and call.count == 1 and call.plain and call.output is not None and len(held) <= MOST_WEIGHTS
        if whole and not (isinstance(modules[path], nn.Sequential) and composite):
            yield Block(path, held)
            return
        for child, _ in modules[path].named_children():
            yield from divide(_join(path, child))

    position = {name: number for number, name in enumerate(names)}
    found = list(divide(""))
    covered = {name for block in found for name in block.weights}
    for rest, run in groupby(names, key=lambda name: name not in covered):
        found += [Block("", tuple(run))] if rest else []
    blocks: list[Block] = []
    for block in sorted(found, key=lambda block: position[block.weights[0]]):
        follows = bool(blocks) and calls[blocks[-1].path].gave_what_is_given_to(calls[block.path])
        blocks.append(Block(block.path, block.weights, follows))
    return blocks


class _ReachedError(Exception):
    """The block was reached; the rest of the forward pass is not needed."""


@torch.no_grad()
def inputs_of(model: nn.Module, block: Block, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """What the block is given for each batch of images, in evaluation mode."""
    if not block.path:
        yield from batches
        return
    caught: list[Tensor] = []

    def catch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0].detach().clone())  # what follows may change it in place
        raise _ReachedError

    for images in batches:
        handle = model.get_submodule(block.path).register_forward_pre_hook(catch)
        try:
            with contextlib.suppress(_ReachedError), untouched(model):
                model(images)
        finally:
            handle.remove()
        yield caught.pop()


def version(tensor: Tensor | None) -> int:
    """How often a tensor was changed in place."""
    return UNKNOWN if tensor is None or tensor.is_inference() else tensor._version


def _join(path: str, child: str) -> str:
    return f"{path}.{child}" if path else child
