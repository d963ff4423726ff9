"""Which layers a network computes with, seen in one forward pass of one picture."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from cbpq.errors import CbpqError, brief
from cbpq.exports.translation import all_names
from cbpq.fileformat import CbpqFile, ConstrainedTensor
from cbpq.inputs import InputSpec
from cbpq.models import logits
from cbpq.uses import Use, watching

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """One use of a layer: shapes for one picture, without the batch axis."""

    input: Shape
    output: Shape


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight of a convolution, a linear layer or an attention projection, and where the network uses it."""

    weight: str  #: its name in the state dict
    shape: Shape  #: output channels first
    tensor: ConstrainedTensor | None  #: None for a layer that stayed float
    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        """The module's name; for a weight that is not called ``weight``, such as ``in_proj_weight``, the weight's."""
        return self.weight.removesuffix(".weight")

    @property
    def outputs(self) -> int:
        """Values that the layer gives for one picture, all uses together."""
        return sum(prod(site.output) for site in self.sites)


@dataclass(frozen=True, eq=False)
class Traced:
    """``layers`` in the order of their first use; ``unseen`` names constrained weights that no layer multiplies with as
    they are, and ``classes`` is how many the network tells apart.
    """

    layers: tuple[Layer, ...]
    unseen: tuple[str, ...]
    classes: int


@torch.no_grad()
def traced(network: nn.Module, file: CbpqFile, spec: InputSpec) -> Traced:
    """What a network in evaluation mode does with one picture.

    Raises:
        CbpqError: the network cannot be run, or gives no logits for one picture.
    """
    parameters = dict(network.named_parameters())
    sites: dict[str, list[Site]] = {}

    def note(name: str, use: Use) -> None:
        output = use.multiply(parameters[name], None)
        sites.setdefault(name, []).append(Site(_of_one(use.input), _of_one(output)))

    picture = torch.zeros(1, spec.channels, spec.height, spec.width)
    try:
        with watching(network, list(parameters), note):
            scores = logits(network(picture))
    except Exception as error:  # whatever a foreign forward pass raises
        raise CbpqError(
            f"{type(network).__name__} cannot be run on a picture of {spec.channels}×{spec.height}×{spec.width}: "
            f"{brief(error)}"
        ) from error
    if scores.dim() != 2 or len(scores) != 1:
        raise CbpqError(f"{type(network).__name__} gives {tuple(scores.shape)} for one picture, and no row of logits")
    aliases = all_names(network)  # the file may know a shared weight by another of its names
    constrained = {name: next((alias for alias in aliases[name] if alias in file.constrained), "") for name in sites}
    layers = (
        Layer(name, tuple(parameters[name].shape), file.constrained.get(constrained[name]), tuple(found))
        for name, found in sites.items()
    )
    unseen = sorted(file.constrained.keys() - set(constrained.values()))
    return Traced(tuple(layers), tuple(unseen), scores.shape[1])


def _of_one(values: Tensor) -> Shape:
    """A shape without the batch axis; a layer that sees windows of the picture as a batch keeps their number."""
    return tuple(values.shape[1:] if len(values) == 1 else values.shape)
