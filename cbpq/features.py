"""What the blocks of a network give, beside what the original's blocks give: the loss of feature distillation.

Outputs alone say little where pictures are few, and almost nothing where the original is sure of every one, as it is of
the pictures it was trained on. What its blocks give says more (FitNets, Romero et al., ICLR 2015, arXiv 1412.6550).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cbpq import distributed
from cbpq.blocks import Block
from cbpq.recipe import energy, relative_error


class FeaturePair:
    """Keeps the blocks' outputs of a network and of its teacher in each forward pass."""

    def __init__(self, model: nn.Module, teacher: nn.Module, blocks: Sequence[Block]) -> None:
        self._paths = [block.path for block in blocks if block.path]
        self._own: dict[str, Tensor] = {}
        self._teachers: dict[str, Tensor] = {}
        self._hooks = [
            network.get_submodule(path).register_forward_hook(_keeping(kept, path))
            for network, kept in ((model, self._own), (teacher, self._teachers))
            for path in self._paths
        ]

    def remove(self) -> None:
        """Let go of both networks."""
        for hook in self._hooks:
            hook.remove()
        self._own.clear()
        self._teachers.clear()

    def loss(self, output: Tensor, target: Tensor, weight: float = 1.0) -> Tensor:
        """Relative squared difference of the outputs (logits), plus its mean over the blocks, times ``weight``."""
        pairs = [(output, target), *((self._own[path], self._teachers[path]) for path in self._paths)]
        # of all processes, so that their mean loss is that of the whole batch
        energies = distributed.mean(torch.stack([energy(target) for _, target in pairs]))
        total, *terms = (relative_error(*pair, divisor) for pair, divisor in zip(pairs, energies, strict=True))
        return total + weight * torch.stack(terms).mean() if terms else total


def _keeping(kept: dict[str, Tensor], path: str) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        kept[path] = output.clone()  # what follows may change it in place

    return hook
