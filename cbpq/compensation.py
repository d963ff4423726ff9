"""Rounding a whole network layer by layer, without training: ``round_network``.

In execution order, each weight is put on its levels for the inputs that the already rounded network gives it, so that
what earlier layers have lost is made up for as far as it can be (``cbpq.rounding`` holds the mathematics). A float
layer on the way, above all the classifier, can make up for it freely. Moments are
taken about the mean where the mean of a layer's outputs can be restored exactly: in its bias, or in the running mean of
the BatchNorm behind it. Original and rounded network see the same pictures, so only what rounding changed is corrected.
That is why statistics are corrected here and not estimated anew: a network's running statistics come from pictures as
its training distorted them, which nobody knows afterwards, and statistics of other pictures can cost more than
rounding does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cbpq.blocks import Block, find_blocks, inputs_of, version
from cbpq.levels import Grid, LevelSet
from cbpq.rounding import best_weights, round_compensated
from cbpq.scales import initial_scale
from cbpq.tracing import untouched
from cbpq.uses import Use, watching

COLUMNS = 2**16  # input columns that a layer's moments are made of; more where the layer has many inputs
COLUMNS_PER_INPUT = 32
MEMORY = 2**30  # bytes of activations that are kept at a time
FEWEST_PICTURES = 32  # kept whatever they take
FITTED_FROM = 8  # columns per input of a layer that stays float: with fewer, fitting it learns the pictures by heart
ROUNDOFF = 1e-6  # an input that varies by less than this share of its mean is constant: about ten units of float32


@dataclass(frozen=True)
class Start:
    """Where the training of a weight starts: latent weight, and scale as ``cbpq.scales`` gives it."""

    latent: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Rounding:
    """Choices of ``round_network``: rule ``nearest`` or ``compensated``, and a scale per ``layer`` or ``channel``."""

    levels: LevelSet
    rule: str = "compensated"
    scale_rule: str = "least-squares"
    granularity: str = "channel"


@torch.no_grad()
def round_network(
    model: nn.Module,
    original: nn.Module,
    names: Sequence[str],
    choices: Rounding,
    images: Sequence[Tensor] = (),
    on_layer: Callable[[], object] = lambda: None,
    after: Sequence[str] = (),
) -> dict[str, Start]:
    """Put every constrained weight of ``model`` on its levels.

    Args:
        model: changed in place: its constrained weights, float ones among ``after``, and biases and running means that
            restore their layers' mean outputs. Everything else stays.
        original: the network as it was, on the same device.
        names: the constrained parameters in execution order.
        choices: how.
        images: batches as the network takes them, on its device; not needed for ``nearest``.
        on_layer: called after each constrained weight.
        after: all weights of convolutions and linear layers from the first constrained one on, in execution order;
            those that stay float, such as the classifier's, are fitted to the inputs they get now.

    Returns:
        The latent weights and scales of all of them.
    """
    if choices.rule == "nearest":
        return {name: _nearest(model, name, choices, on_layer) for name in names}
    starts: dict[str, Start] = {}
    order = after or names
    correctors = _correctors(model, order, images[0])
    for block, true_inputs, own_inputs in walk(original, model, find_blocks(model, order, images[0]), images):
        for name in block.weights:
            moments = _Moments(centred=name in correctors)
            for seed, (true, rounded) in enumerate(zip(true_inputs, own_inputs, strict=True)):
                for use, other in zip(
                    _uses(original, block, name, true), _uses(model, block, name, rounded), strict=True
                ):
                    moments.add(use, other, seed, sum(len(batch) for batch in true_inputs))
            if name in names:
                starts[name] = _compensated(model, original, name, choices, moments, correctors)
                on_layer()
            else:
                _fit(model, original, name, moments, correctors)
    return {name: starts[name] for name in names}


def walk(
    original: nn.Module, model: nn.Module, blocks: Sequence[Block], images: Sequence[Tensor]
) -> Iterator[tuple[Block, list[Tensor], list[Tensor]]]:
    """Each block with its inputs in the original network and in ``model`` as that is by then, batch by batch.

    A block that follows on the one before takes that one's outputs, else a forward pass leads to it. Where the inputs
    would take more than MEMORY, only the first batches are used.
    """
    before: list[Tensor] = []
    after: list[Tensor] = []
    done: Block | None = None
    for block in blocks:
        if block.follows and done is not None:
            before = [run_block(original, done, batch) for batch in before]
            after = [run_block(model, done, batch) for batch in after]
        else:
            before, after = [], []
            kept = 0
            for true, rounded in zip(inputs_of(original, block, images), inputs_of(model, block, images), strict=True):
                kept += 2 * true.numel() * true.element_size()
                if kept > MEMORY and sum(map(len, before)) >= FEWEST_PICTURES:
                    break
                before.append(true)
                after.append(rounded)
        yield block, before, after
        done = block


@torch.no_grad()
def run_block(model: nn.Module, block: Block, inputs: Tensor) -> Tensor:
    """The block's output in evaluation mode; ``inputs`` is left as it is."""
    module = model.get_submodule(block.path)
    with untouched(module):
        output: Tensor = module(inputs.clone())
    return output


def _uses(model: nn.Module, block: Block, name: str, inputs: Tensor) -> list[Use]:
    uses: list[Use] = []
    with watching(model, [name], lambda _, use: uses.append(use)):
        run_block(model, block, inputs)
    return uses


class _Moments:
    """H = Σ x̃ x̃ᵀ and C = Σ x x̃ᵀ over input columns, and their means; ``centred`` takes both about the means.

    For that, the means of the first batch are subtracted at once, since float32 sums of squares far from zero would
    leave little of the variance.
    """

    def __init__(self, centred: bool) -> None:
        self._centred = centred
        self.count = 0
        self._base = self._true_base = torch.zeros(())
        self._own = self._cross = self._mean = self._true_mean = torch.zeros(())

    def add(self, true: Use, rounded: Use, seed: int, pictures: int) -> None:
        """Add the columns of one batch; of ``pictures`` in all, each gives as many as are wanted."""
        rows = rounded.columns(torch.zeros(1, dtype=torch.long)).shape[1]
        wanted = -(-max(COLUMNS, COLUMNS_PER_INPUT * rows) // pictures)
        generator = torch.Generator().manual_seed(seed)  # of its own: the global one stays as it is
        chosen = torch.randperm(rounded.positions, generator=generator)[:wanted]
        x, y = true.columns(chosen), rounded.columns(chosen)  # (G, K, N)
        if self._centred and not self.seen:
            self._true_base, self._base = (part.mean(2, keepdim=True) for part in (x, y))
        x, y = x - self._true_base, y - self._base
        # to the CPU first: not every device has float64
        self._own = self._own + (y @ y.mT).cpu().double()
        self._cross = self._cross + (x @ y.mT).cpu().double()
        self._mean = self._mean + y.sum(2, keepdim=True).cpu().double()
        self._true_mean = self._true_mean + x.sum(2, keepdim=True).cpu().double()
        self.count += x.shape[2]

    @property
    def seen(self) -> bool:
        """Whether there were any columns."""
        return self.count > 0

    @property
    def unchanged(self) -> bool:
        """Whether both networks gave the same inputs."""
        return torch.equal(self._own, self._cross)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """H and C, (G, K, K)."""
        if not self._centred:
            return self._own, self._cross
        mean = self._mean.mT / self.count
        own = self._own - self._mean @ mean
        constant = own.diagonal(dim1=1, dim2=2) <= self.count * (ROUNDOFF * self._base.cpu().double()[:, :, 0]) ** 2
        return own.masked_fill(torch.diag_embed(constant), 0), self._cross - self._true_mean @ mean

    def mean_shift(self, before: Tensor, after: Tensor) -> Tensor:
        """How much more the original weight's outputs (G, R, K) are on average than the rounded weight's, (G · R,)."""
        true_mean, mean = (
            part / self.count + base.cpu().double()
            for part, base in ((self._true_mean, self._true_base), (self._mean, self._base))
        )
        return (before @ true_mean - after @ mean).flatten()


@dataclass(frozen=True)
class _Corrector:
    """What moves the mean of a layer's outputs: its bias, or the running mean of the BatchNorm behind it."""

    tensor: Tensor
    sign: int

    def restore(self, shift: Tensor) -> None:
        """Let the outputs be larger by ``shift`` (channels,)."""
        self.tensor.add_(shift.to(self.tensor), alpha=self.sign)


def _nearest(model: nn.Module, name: str, choices: Rounding, on_layer: Callable[[], object]) -> Start:
    weight = model.get_parameter(name)
    latent = weight.detach().clone(memory_format=torch.contiguous_format)
    scale = initial_scale(latent, choices.levels, choices.scale_rule, choices.granularity)
    weight.copy_(Grid(choices.levels, scale).nearest(latent))
    on_layer()
    return Start(latent, scale)


def _compensated(
    model: nn.Module,
    original: nn.Module,
    name: str,
    choices: Rounding,
    moments: _Moments,
    correctors: Mapping[str, _Corrector],
) -> Start:
    if not moments.seen:  # its layer multiplies with something made of the weight, or never runs
        return _nearest(model, name, choices, lambda: None)
    weight = model.get_parameter(name)
    h, cross = moments.matrices()
    groups = len(h)
    matrix = original.get_parameter(name).detach().cpu().double().reshape(groups, len(weight) // groups, -1)
    per_row = choices.granularity == "channel"
    found = round_compensated(matrix, h, choices.levels, cross=cross, per_row=per_row)
    shape = (-1, *[1] * (weight.dim() - 1)) if per_row else ()
    latent = found.latent.reshape(weight.shape).to(weight)
    scale = found.scale.reshape(shape).to(weight)
    weight.copy_(Grid(choices.levels, scale).nearest(latent))
    if name in correctors:
        rounded = weight.detach().cpu().double().reshape(matrix.shape)
        correctors[name].restore(moments.mean_shift(matrix, rounded))
    return Start(latent, scale)


def _fit(
    model: nn.Module, original: nn.Module, name: str, moments: _Moments, correctors: Mapping[str, _Corrector]
) -> None:
    """Let a weight that stays float make up for what the layers before it have lost."""
    if not moments.seen or moments.unchanged:
        return
    h, cross = moments.matrices()
    if moments.count < FITTED_FROM * h.shape[1]:
        return
    weight = model.get_parameter(name)
    matrix = original.get_parameter(name).detach().cpu().double().reshape(len(h), len(weight) // len(h), -1)
    weight.copy_(best_weights(matrix, h, cross).reshape(weight.shape))
    if name in correctors:
        fitted = weight.detach().cpu().double().reshape(matrix.shape)
        correctors[name].restore(moments.mean_shift(matrix, fitted))


def _correctors(model: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, _Corrector]:
    """For each weight, what restores its layer's mean output, where there is such a thing."""
    parameters = dict(model.named_parameters())
    biases = {name: name.removesuffix("weight") + "bias" for name in names}
    found = {name: _Corrector(parameters[bias], 1) for name, bias in biases.items() if bias in parameters}
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in names if name.endswith(".weight")}
    outputs: dict[int, tuple[str, Tensor, int]] = {}

    def layer_hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                # kept, so that its id is not given to another tensor
                outputs[id(output)] = (name, output, version(output))

        return hook

    def norm_hook(module: nn.Module, inputs: tuple[object, ...]) -> None:
        mean = getattr(module, "running_mean", None)
        if inputs and id(inputs[0]) in outputs and isinstance(mean, Tensor):
            name, output, changes = outputs[id(inputs[0])]
            if version(output) == changes:  # else an activation in place lies between
                found.setdefault(name, _Corrector(mean, -1))

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    handles = [layer.register_forward_hook(layer_hook(name)) for name, layer in layers.items()]
    handles += [norm.register_forward_pre_hook(norm_hook) for norm in norms]
    try:
        with untouched(model):
            model(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    return found
