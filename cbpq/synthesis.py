"""Pictures made of a network alone, for quantizing it where there is no data at all.

A network with BatchNorm remembers the mean and variance that the inputs of every BatchNorm had on the pictures it was
trained with. Pictures that start as smooth noise are optimised until a batch of them has these very moments (ZeroQ, Cai
et al., CVPR 2020, arXiv 2001.00281), and until the network is sure of a class for each of them, of every class as often
as of any other (DeepInversion, Yin et al., CVPR 2020, arXiv 1912.08795). Each step sees them mirrored and rolled by a
few pixels at random, so that no detail depends on its place. They are no photographs, but the inputs of layers
correlate much as for photographs, which is what rounding and distillation need. (GDFQ, Xu et al., ECCV 2020, arXiv
2003.03603, and Genie, Jeon et al., CVPR 2023, arXiv 2212.04780, train a generator to the same end.)

A network without BatchNorm remembers nothing. It gets noise with the moments its preprocessing promises, and with the
1/f amplitudes of natural pictures (Field 1987); expect much less of that.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from cbpq.atomic import writing
from cbpq.errors import CbpqError, UsageError
from cbpq.inputs import InputSpec
from cbpq.models import logits
from cbpq.tracing import batch_norms, untouched, unwrapped

SHARED = 0.8  # share of the variance of noise that all channels have in common: photographs are mostly light and shade
GAP = 2  # pixels between the pictures of a contact sheet
CONTACT_SHEET = "contact-sheet.png"


@dataclass(frozen=True)
class SynthesisChoices:
    """How many pictures, and how they are optimised.

    Each batch of ``batch_size`` pictures takes ``steps`` steps of Adam, the learning rate falling from ``lr`` to 0
    along half a cosine; each step sees them rolled by up to ``shift`` pixels. The loss is the mismatch with BatchNorm
    plus ``label_weight`` × cross-entropy: little, since then networks are about as sure as they are of photographs,
    and more of it spoils the statistics.
    """

    count: int = 1024
    batch_size: int = 256
    steps: int = 45
    lr: float = 0.1
    label_weight: float = 0.03
    shift: int = 2

    @classmethod
    def for_input(cls, spec: InputSpec) -> "SynthesisChoices":
        """Choose by the area of the input what a CPU can do.

        32 × 32 pixels: 512 pictures in batches of 256; 224 × 224: 64 in batches of 32. Large pictures give so many
        positions to each statistic that fewer of them do. They are rolled by up to a sixteenth of their shorter side.
        """
        side = math.sqrt(spec.height * spec.width)
        count = _power_of_two(2**14 / side, 64, 512)
        batch_size = _power_of_two(2**13 / side, 32, 256)
        return cls(count=count, batch_size=batch_size, shift=min(spec.height, spec.width) // 16)


def steps_in_all(model: nn.Module, choices: SynthesisChoices) -> int:
    """How often ``synthesize`` will call ``on_step``."""
    return _batches(choices) * choices.steps if remembering(model) else 0


def remembering(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The layers that remember statistics; without any, ``synthesize`` can only make noise."""
    return [norm for norm in batch_norms(model) if norm.running_mean is not None and norm.running_var is not None]


def synthesize(
    model: nn.Module,
    spec: InputSpec,
    num_classes: int,
    choices: SynthesisChoices,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Make pictures: uint8 (count, C, H, W) on the CPU. The same seed gives the same ones, bit for bit on a CPU.

    Args:
        model: the network; left as it was.
        spec: what it is fed.
        num_classes: what it tells apart.
        choices: how.
        seed: of all randomness, which is of its own: the global generators stay as they are.
        device: where to compute.
        on_step: called after each step of the optimisation.

    Raises:
        CbpqError: the network's outputs are not finite.
    """
    if not remembering(model):
        return gaussian_pictures(choices.count, spec, seed)
    generator = torch.Generator().manual_seed(seed)
    network = copy.deepcopy(unwrapped(model)).requires_grad_(False)
    network.to(device).to(memory_format=torch.channels_last)
    labels = (torch.arange(choices.count) % num_classes)[torch.randperm(choices.count, generator=generator)]
    labels = torch.randperm(num_classes, generator=generator)[labels]
    made = []
    with untouched(network), torch.enable_grad():
        for some in labels.tensor_split(_batches(choices)):
            start = _noise(len(some), spec, generator)
            images = start.to(device, memory_format=torch.channels_last)
            _optimize(network, images, some.to(device), spec, choices, generator, on_step)
            made.append(to_bytes(images.cpu(), spec))
    return torch.cat(made)


def gaussian_pictures(count: int, spec: InputSpec, seed: int) -> Tensor:
    """Smooth noise, uint8 (count, C, H, W): each channel has the mean and deviation of ``spec``, but for clipping."""
    return to_bytes(_noise(count, spec, torch.Generator().manual_seed(seed)), spec)


def contact_sheet(images: Tensor, columns: int = 16, most: int = 128) -> Image.Image:
    """The first of uint8 (N, C, H, W) pictures side by side, a white line between them."""
    shown = functional.pad(images[:most], (0, GAP, 0, GAP), value=255)
    columns = min(columns, len(shown))
    blank = shown.new_full((-len(shown) % columns, *shown.shape[1:]), 255)
    rows = torch.cat([shown, blank]).unflatten(0, (-1, columns))  # (rows, columns, C, H, W)
    sheet = rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    return _picture(sheet[:, :-GAP, :-GAP])


def claim_folder(folder: Path, resume: bool = False) -> None:
    """Make sure that pictures may be saved in ``folder``, before any are made; with ``resume``, also over those that an
    unfinished run has saved there.

    Raises:
        UsageError: it is a file, or there is something in it already.
    """
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; name a folder for the pictures")
        if folder.exists() and not (resume and (folder / CONTACT_SHEET).exists()) and any(folder.iterdir()):
            raise UsageError(f"the folder {folder} is not empty; name a new one for the pictures")


def save_pictures(images: Tensor, folder: Path, resume: bool = False) -> None:
    """Write uint8 (N, C, H, W) pictures as ``0000.png``, ``0001.png``, … and a ``contact-sheet.png``, that one first.

    Raises:
        UsageError: ``folder`` is a file, or there is something in it already.
        CbpqError: it cannot be written to, or the pictures are neither grey nor of three colours.
    """
    claim_folder(folder, resume)
    with writing(folder):
        sheet = contact_sheet(images)
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / CONTACT_SHEET)
        for number, image in enumerate(images):
            _picture(image).save(folder / f"{number:04}.png")


def _picture(image: Tensor) -> Image.Image:
    if len(image) not in (1, 3):
        raise CbpqError(f"pictures of {len(image)} channels cannot be saved as PNG; only grey and RGB ones can")
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if len(image) == 1 else array)


def _optimize(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    spec: InputSpec,
    choices: SynthesisChoices,
    generator: torch.Generator,
    on_step: Callable[[], object],
) -> None:
    """Change normalised ``images`` in place."""
    low, high = (bound.to(images) for bound in _bounds(spec))
    images.requires_grad_(True)
    optimizer = torch.optim.Adam([images], lr=choices.lr, eps=1e-12)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, choices.steps)
    with _Mismatch(network) as mismatch:
        for _ in range(choices.steps):
            optimizer.zero_grad()
            scores = logits(network(_moved(images, spec, choices.shift, generator)))
            (mismatch.take() + choices.label_weight * functional.cross_entropy(scores, labels)).backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                images.clamp_(low, high)
            on_step()
    images.requires_grad_(False)
    if not images.isfinite().all():
        raise CbpqError(
            "the network's outputs are not finite, so no pictures can be made of it; are its weights damaged?"
        )


class _Mismatch:
    """Watches the input of every BatchNorm.

    With μ, σ the batch's and m, s the remembered mean and deviation of a channel, the mismatch of a layer is the mean
    over channels of ((μ − m) / s)² + (σ / s − 1)².
    """

    def __init__(self, network: nn.Module) -> None:
        self._norms = remembering(network)
        self._found: list[Tensor] = []

    def __enter__(self) -> "_Mismatch":
        self._handles = [norm.register_forward_pre_hook(self._look) for norm in self._norms]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, norm: nn.modules.batchnorm._BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        mean, square = _Moments.apply(inputs[0])
        true = norm.get_buffer("running_var") + norm.eps
        shift = (mean - norm.get_buffer("running_mean")).square() / true
        ratio = ((square - mean.square()).clamp(min=0) + norm.eps).div(true).sqrt()
        self._found.append((shift + (ratio - 1).square()).mean())

    def take(self) -> Tensor:
        """The sum over layers since the last call."""
        total = torch.stack(self._found).sum()
        self._found.clear()
        return total


class _Moments(torch.autograd.Function):
    """Mean and mean square (C,) of (B, C, …); a third of the time that ``torch.var_mean`` takes on a CPU."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(inputs)
        axes = [0, *range(2, inputs.dim())]
        return inputs.mean(axes), inputs.square().mean(axes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        shape = (-1, *[1] * (inputs.dim() - 2))
        mean, square = (gradient.reshape(shape) * (inputs.shape[1] / inputs.numel()) for gradient in gradients)
        return torch.addcmul(mean, inputs, 2 * square)


def _moved(images: Tensor, spec: InputSpec, shift: int, generator: torch.Generator) -> Tensor:
    """Roll all alike, and mirror half of those in colour: a mirrored digit is no digit, so grey ones are not."""
    rows, columns = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
    moved = images.roll((rows, columns), (2, 3))
    if spec.channels != 3:
        return moved
    flips = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flips.to(images.device)[:, None, None, None], moved.flip(-1), moved)


def _noise(count: int, spec: InputSpec, generator: torch.Generator) -> Tensor:
    """Normalised (count, C, H, W) of amplitudes 1/f; each channel has mean 0 and deviation 1, but for clipping."""
    size = spec.height, spec.width
    own = torch.randn(count, spec.channels, *size, generator=generator)
    shared = torch.randn(count, 1, *size, generator=generator)
    white = math.sqrt(SHARED) * shared + math.sqrt(1 - SHARED) * own
    frequency = torch.hypot(torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])[None])
    frequency[0, 0] = 1 / max(size)  # the mean of a picture varies like its coarsest waves
    smooth: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, size)
    deviation, mean = torch.std_mean(smooth, (0, 2, 3), keepdim=True)
    return ((smooth - mean) / deviation).clamp(*_bounds(spec))


def _bounds(spec: InputSpec) -> tuple[Tensor, Tensor]:
    """What black and white are after normalisation, (C, 1, 1) each."""
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    return (-mean / std).reshape(-1, 1, 1), ((1 - mean) / std).reshape(-1, 1, 1)


def to_bytes(images: Tensor, spec: InputSpec) -> Tensor:
    """Normalised images (N, C, H, W) as pictures again, uint8."""
    mean, std = torch.tensor(spec.mean).reshape(-1, 1, 1), torch.tensor(spec.std).reshape(-1, 1, 1)
    pixels = (images * std + mean).mul(255).round().clamp(0, 255)
    return pixels.to(torch.uint8, memory_format=torch.contiguous_format)


def _batches(choices: SynthesisChoices) -> int:
    return -(-choices.count // choices.batch_size)


def _power_of_two(value: float, least: int, most: int) -> int:
    return min(most, max(least, int(2 ** round(math.log2(value)))))
