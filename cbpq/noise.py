"""Which layer hurts: how much of a layer's output signal is left in the constrained network."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cbpq.tracing import untouched
from cbpq.uses import Use, watching

POSITIONS = 64  # output positions looked at in each picture
ROUNDOFF = 1e-12  # a channel whose variance is a smaller share of its mean square is constant: float32 says no more


@torch.no_grad()
def signal_to_noise(
    original: nn.Module, model: nn.Module, names: Sequence[str], images: Sequence[Tensor]
) -> dict[str, float]:
    """Signal-to-noise ratio, in dB, of what each weight's layer gives in ``model``, against the original network.

    Each channel is compared up to a factor and a shift, since the normalisation behind a layer takes both away: with ρ
    the correlation of a channel in the two networks, ρ² of its variance is signal and 1 − ρ² noise. Channels count by
    their variance in the original.

    Args:
        original: the network as it was.
        model: the constrained network, on the same device.
        names: weights.
        images: batches as the networks take them.

    Returns:
        The ratio for each weight that is seen at work; infinity where nothing was lost.
    """
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(images):
        before, after = _outputs(original, names, batch, number), _outputs(model, names, batch, number)
        for name in before.keys() & after.keys():
            x, y = before[name], after[name]
            found = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y]).sum(2)
            sums[name] = sums[name] + found if name in sums else found
    return {name: _decibels(sums[name]) for name in names if name in sums}


def _outputs(model: nn.Module, names: Sequence[str], images: Tensor, seed: int) -> Mapping[str, Tensor]:
    """Outputs (channels, N) of each weight's layer without its bias, at some positions, float64 on the CPU."""
    outputs: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())

    def note(name: str, use: Use) -> None:
        generator = torch.Generator().manual_seed(seed)
        columns = use.columns(torch.randperm(use.positions, generator=generator)[:POSITIONS])
        weight = parameters[name].detach().reshape(len(columns), -1, columns.shape[1])
        found = (weight @ columns.to(weight)).flatten(0, 1).double().cpu()
        outputs[name] = torch.cat([outputs[name], found], dim=1) if name in outputs else found

    with untouched(model), watching(model, names, note):
        model(images)
    return outputs


def _decibels(sums: Tensor) -> float:
    count, x, y, xx, xy, yy = sums
    variance, other = xx / count - (x / count) ** 2, yy / count - (y / count) ** 2
    variance = variance.masked_fill(variance <= ROUNDOFF * xx / count, 0)
    shared = (xy / count - (x / count) * (y / count)) ** 2 / other.clamp_min(1e-300)
    signal, noise = float(variance.sum()), float((variance - shared).clamp_min(0).sum())
    if signal <= 0:
        return math.nan  # the layer says the same of every picture
    return 10 * math.log10(signal / noise) if noise > 1e-12 * signal else math.inf
