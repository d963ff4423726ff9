"""One constrained weight around an optimizer's step: latent weight in, constrained weight out.

Both have a place of their own in memory, and the parameter points to one or the other: neither is copied. All that is
computed in between goes from one piece of the weight to the next, each small enough to stay in the processor's cache
from the first pass over it to the last.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cbpq.levels import Grid
from cbpq.methods.base import Method, Slot
from cbpq.scales import SMALLEST_SCALE, initial_scale

PIECE = 2**17  # weights per thread: less and Python takes longer than the arithmetic, more and caches overflow


@dataclass
class ConstrainedWeight:
    """A constrained weight: where the network keeps it, and what is kept beside it.

    Attributes:
        parameter: the network's; it holds what the method has the network compute with, but during a step the latent
            weight.
        slot: what is kept beside it, with the latent weight in the parameter's memory layout.
        pieces: the slot in pieces along axis 0, as a method sees it, each with the rows it consists of.
    """

    parameter: nn.Parameter
    slot: Slot
    pieces: list[tuple[slice, Slot]] = field(init=False, repr=False)
    _set_aside: Tensor | None = field(default=None, init=False, repr=False)
    """The constrained weight, while the parameter points to the latent one."""

    def __post_init__(self) -> None:
        self.pieces = list(_cut(self.slot))

    def kept(self) -> dict[str, Tensor]:
        """All tensors beside the parameter, by name (not copies)."""
        return {"latent": self.slot.latent, "scale": self.slot.grid.scale.detach(), **self.slot.state}

    @torch.no_grad()
    def install_latent(self, method: Method, lr: float) -> None:
        """Before the step: latent weight in, the method's gradient in, and the learned scale's gradient."""
        latent, scale = self.slot.latent, self.slot.grid.scale
        gradient = self.parameter.grad
        if gradient is None:
            scale.grad = None  # of an earlier step, where only the model's own gradients were set to zero
            return
        gradient = _laid_out(gradient, latent)
        if self._set_aside is None:  # else an earlier step was broken off
            self._set_aside = _laid_out(self.parameter.data, latent)
        constrained, followed, sums = _matrix(self._set_aside), _matrix(gradient), []
        for rows, piece in self.pieces:
            if method.on_levels():
                piece = piece._replace(nearest=constrained[rows])
            part = followed[rows]
            if scale.requires_grad and method.scale_fit() is None:
                nearest = piece.grid.nearest(piece.latent) if piece.nearest is None else piece.nearest
                sums.append(scale_sums(part, nearest, scale))
            wanted = method.gradient(piece, part, lr)
            if wanted is not part:
                part.copy_(wanted)
        scale.grad = scale_gradient(sums, scale) if sums else None
        self.parameter.grad = gradient
        self.parameter.data = latent

    @torch.no_grad()
    def install_constrained(self, method: Method, lr: float) -> None:
        """After the step: the moved latent weight out, corrected, and the constrained weight in."""
        latent, scale = self.slot.latent, self.slot.grid.scale
        if self._set_aside is None:
            return
        if self.parameter.data_ptr() != latent.data_ptr():  # an optimizer that makes new tensors
            latent.copy_(self.parameter)
        if (multiple := method.scale_fit()) is not None:
            self._fit_scale(multiple)
        elif scale.requires_grad:
            scale.clamp_(min=SMALLEST_SCALE)

        def corrected(piece: Slot) -> Tensor:
            method.after_step(piece, lr)
            return method.constrained_weight(piece)

        self.install(corrected)

    def _fit_scale(self, multiple: float) -> None:
        """a ← ``multiple`` · mean |w|; with 0, a ← Σ w q / Σ q², which brings the constrained weights nearest to the
        latent ones on the levels q that these have now; for two levels the mean magnitude. Where all are on level 0
        the scale stays.
        """
        scale, levels = self.slot.grid.scale, self.slot.grid.level_set
        if multiple:
            granularity = "channel" if scale.dim() else "layer"
            mean = initial_scale(self.slot.latent, levels, "mean-abs", granularity)
            scale.copy_(mean.mul_(multiple)).clamp_(min=SMALLEST_SCALE)
            return
        sums = [scale_sums(piece.latent, piece.grid.nearest(piece.latent), scale) for _, piece in self.pieces]
        products, squares = _over_pieces(sums, scale)  # a Σ w q and a² Σ q²
        scale.mul_(torch.where(squares > 0, products / squares, 1.0)).clamp_(min=SMALLEST_SCALE)

    @torch.no_grad()
    def install(self, weight_of: Callable[[Slot], Tensor]) -> None:
        """Put into the network what ``weight_of`` gives for each piece."""
        if self._set_aside is not None:
            self.parameter.data, self._set_aside = self._set_aside, None
        elif self.parameter.stride() != self.slot.latent.stride():
            self.parameter.data = _laid_out(self.parameter.data, self.slot.latent)
        matrix = _matrix(self.parameter)
        for rows, piece in self.pieces:
            matrix[rows].copy_(weight_of(piece))


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The same numbers in another's memory layout: who changes a network's layout on the way has to do without."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _matrix(tensor: Tensor) -> Tensor:
    """A weight as a matrix, an output channel in each row, its weights in the order they have in memory."""
    order = sorted(range(1, tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(0, *order).flatten(1)


def _cut(slot: Slot) -> Iterator[tuple[slice, Slot]]:
    """A slot's pieces and their rows. A GPU is given the whole at once."""
    latent, scale = _matrix(slot.latent), slot.grid.scale.detach()
    state = {name: _matrix(tensor) for name, tensor in slot.state.items()}
    rows = len(latent) if latent.device.type != "cpu" else max(1, PIECE * torch.get_num_threads() // latent.shape[1])
    for start in range(0, len(latent), rows):
        own = slice(start, start + rows)
        grid = Grid(slot.grid.level_set, scale.flatten(1)[own] if scale.dim() else scale)
        yield own, Slot(latent[own], grid, {name: tensor[own] for name, tensor in state.items()})


@torch.no_grad()
def undo_loss_scale(optimizer: Optimizer) -> bool:
    """Divide gradients by the loss scale where GradScaler leaves that to the optimizer, as with ``fused=True``.

    Returns:
        Whether the step will be skipped, because a gradient is not finite.
    """
    found = getattr(optimizer, "found_inf", None)
    if found is None:  # no GradScaler, or one that does both itself
        return False
    if (loss_scale := getattr(optimizer, "grad_scale", None)) is not None:
        factor = loss_scale.double().reciprocal().float()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor.to(parameter.grad.device))
        vars(optimizer)["grad_scale"] = None
    return bool(found)


def scale_sums(gradient: Tensor, nearest: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Σ grad × nearest and Σ nearest², over the weights that share a scale: for each output channel of a piece of the
    weight, where there is a scale for each, else for the piece.
    """
    axes = tuple(range(1, nearest.dim())) if scale.dim() else tuple(range(nearest.dim()))
    return (gradient * nearest).sum(dim=axes), nearest.square().sum(dim=axes)


def scale_gradient(sums: Sequence[tuple[Tensor, Tensor]], scale: Tensor) -> Tensor:
    """Gradient for a learned scale, in the scale's shape: Σ grad × q / Σ q², from ``scale_sums`` of all pieces, where
    the nearest level q is the nearest allowed weight over the scale.

    The numerator is ∂C/∂a, as the constrained weight is a·q. The denominator makes a step of size η change the
    constrained weights exactly as a step of size η along their gradient would, projected on the one direction (q) that
    the scale can move them in; so weights and scales share a learning rate whatever the layer's size. Where the network
    computes with the latent weights themselves, the scale so follows its least-squares fit to them.
    """
    numerator, squares = _over_pieces(sums, scale)
    return numerator / scale / (squares / scale / scale).clamp_min(1)


def _over_pieces(sums: Sequence[tuple[Tensor, Tensor]], scale: Tensor) -> Iterator[Tensor]:
    """Both of ``scale_sums``, from all pieces, in the scale's shape."""
    for parts in zip(*sums, strict=True):
        yield (torch.cat(parts) if scale.dim() else torch.stack(parts).sum()).reshape(scale.shape)
