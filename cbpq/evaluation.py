"""How good a network is on a set of images, how sure that is, and how it differs from another one on the same images.

``predict`` runs a network once; everything else is a pure function of what it returns.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from cbpq import distributed
from cbpq.data import EvalLoader
from cbpq.errors import CbpqError, DataError, UsageError
from cbpq.loaders import dealt, deaths_explained
from cbpq.models import logits
from cbpq.pictures import NO_LABEL
from cbpq.splits import misfit
from cbpq.tracing import image_format, untouched

Interval = tuple[float, float]

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile: two-sided 95 %
TOP = 5


@dataclass(frozen=True)
class Predictions:
    """What a network said of each of N images, on the CPU.

    ``labels`` and ``classes`` (N,) int64 are the true and the predicted class, ``in_top5`` (N,) bool says whether the
    true class is among the five highest outputs (None for networks of fewer than five classes), ``losses`` (N,)
    float64 are cross-entropies, ``seconds`` is the time it took, reading the images included. Of images without labels
    all ``labels`` are ``NO_LABEL``, ``in_top5`` is None and the losses are NaN.
    """

    labels: Tensor
    classes: Tensor
    in_top5: Tensor | None
    losses: Tensor
    seconds: float

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return bool((self.labels != NO_LABEL).any())

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for a checkpoint."""
        return dict(vars(self))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Predictions":
        """The predictions ``state_dict`` was taken of."""
        return cls(**state)


@dataclass(frozen=True)
class Comparison:
    """A network against the reference on the same images.

    ``agreement`` is the share of images, in percent, for which both say the same class. Of the images that exactly one
    of them has right, ``only_model_right`` and ``only_reference_right`` are the numbers, and ``mcnemar_p`` is the
    exact two-sided probability of a split at least as uneven if both were equally good. ``drop`` is the reference's
    top-1 minus the network's, in points. Of images without labels only the agreement is known.
    """

    agreement: float
    agreement_interval: Interval
    mcnemar_p: float | None
    only_model_right: int | None
    only_reference_right: int | None
    drop: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return vars(self) | {"agreement_interval": list(self.agreement_interval)}


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent and the mean cross-entropy, each with its 95 % interval.

    Accuracies have Wilson's interval, the loss the normal interval of a mean (None for a single image), cut off at 0.
    All of them are None for images without labels.
    ``top5`` is None for networks of fewer than five classes. With a reference, ``reference`` holds its own evaluation.
    """

    images: int
    top1: float | None
    top1_interval: Interval | None
    top5: float | None
    top5_interval: Interval | None
    loss: float | None
    loss_interval: Interval | None
    images_per_second: float
    predictions: Predictions = field(repr=False, compare=False)
    reference: "Evaluation | None" = None
    comparison: Comparison | None = None

    def to_dict(self, timing: bool = True) -> dict[str, Any]:
        """JSON types, without the predictions; ``timing=False`` leaves out what differs from run to run."""
        names = ["images", "top1", "top1_interval", "top5", "top5_interval", "loss", "loss_interval"]
        names += ["images_per_second"] if timing else []
        values = {name: getattr(self, name) for name in names}
        result = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        if self.reference is not None:
            result["reference"] = self.reference.to_dict(timing)
        if self.comparison is not None:
            result["comparison"] = self.comparison.to_dict()
        return result


def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    device: torch.device | str,
    *,
    reference: nn.Module | None = None,
    autocast: torch.dtype | None = None,
    on_batch: Callable[[], object] | None = None,
) -> Evaluation:
    """Measure ``model`` and, with a ``reference``, that one too and how they differ. See ``predict``."""
    predictions = predict(model, loader, device, autocast=autocast, on_batch=on_batch)
    if reference is None:
        return summarize(predictions)
    return summarize(predictions, predict(reference, loader, device, autocast=autocast, on_batch=on_batch))


def predict(
    model: nn.Module,
    loader: EvalLoader,
    device: torch.device | str,
    *,
    autocast: torch.dtype | None = None,
    on_batch: Callable[[], object] | None = None,
) -> Predictions:
    """Run ``model`` on every image once, in evaluation mode; afterwards its training flags are as before.

    Of several processes, each runs its batches, and all get everything.

    The network has to be on ``device`` already. ``autocast`` is what it computes in where that is safe, by
    default float32; ``on_batch`` is called
    after every batch.

    Raises:
        CbpqError: outputs that are not (images, classes), or not finite.
        DataError: no images, a label the network has no output for, or labels for some of the images only.
    """
    target = torch.device(device)
    labels, classes, in_top5, losses = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    labelled: bool | None = None  # the first batch tells
    layout: torch.memory_format | None = None  # this too
    turn = distributed.turn()
    started = time.perf_counter()
    # no_grad, not inference_mode: tensors a network keeps (position tables, say) must stay usable for training
    with untouched(model), torch.no_grad(), deaths_explained():
        for index, batch in enumerate(dealt(loader, turn)):
            images = batch.images.to(target)
            layout = layout or image_format(model, images)
            with torch.autocast(target.type, dtype=autocast, enabled=autocast is not None):
                output = logits(model(images.contiguous(memory_format=layout)))
            # on the CPU in float64: exact enough to sum, and the same code for devices that have no float64
            scores = output.float().cpu().double()
            if labelled is None:
                labelled = bool((batch.labels != NO_LABEL).any())
            _check(scores, batch.labels, _first(loader, turn.number + index * turn.of, len(scores)), labelled)
            labels.append(batch.labels)
            classes.append(scores.argmax(1))  # the first of equal ones
            if labelled:
                losses.append(nn.functional.cross_entropy(scores, batch.labels, reduction="none"))
            else:
                losses.append(scores.new_full((len(scores),), math.nan))
            if labelled and scores.shape[1] >= TOP:
                in_top5.append(rank(scores, batch.labels) < TOP)
            if on_batch is not None:
                on_batch()
    labels, classes, in_top5, losses = (_collected(own) for own in (labels, classes, in_top5, losses))
    if not labels:
        raise DataError("there are no images to evaluate on")
    return Predictions(
        torch.cat(labels),
        torch.cat(classes),
        torch.cat(in_top5) if in_top5 else None,
        torch.cat(losses),
        time.perf_counter() - started,
    )


def _collected(own: list[Tensor]) -> list[Tensor]:
    """One tensor for each batch, of all processes, in the loader's order."""
    rounds = zip_longest(*distributed.gathered(own))
    return [tensor for each in rounds for tensor in each if tensor is not None]


def _first(loader: EvalLoader, index: int, size: int) -> int:
    """Number of the first image of batch ``index``: all have as many as this one but the last."""
    return index * size if index < len(loader) - 1 else loader.images - size


def summarize(predictions: Predictions, reference: Predictions | None = None) -> Evaluation:
    """Turn predictions into accuracies with intervals; with a ``reference``, compare as well."""
    count = len(predictions.labels)
    images_per_second = count / max(predictions.seconds, 1e-9)
    first = None if reference is None else summarize(reference)
    comparison = None if reference is None else compare(predictions, reference)
    if not predictions.labelled:
        unknown = dict.fromkeys(("top1", "top1_interval", "top5", "top5_interval", "loss", "loss_interval"))
        return Evaluation(
            images=count,
            **unknown,
            images_per_second=images_per_second,
            predictions=predictions,
            reference=first,
            comparison=comparison,
        )
    right = int((predictions.classes == predictions.labels).sum())
    right5 = None if predictions.in_top5 is None else int(predictions.in_top5.sum())
    return Evaluation(
        images=count,
        top1=100 * right / count,
        top1_interval=wilson_interval(right, count),
        top5=None if right5 is None else 100 * right5 / count,
        top5_interval=None if right5 is None else wilson_interval(right5, count),
        loss=float(predictions.losses.mean()),
        loss_interval=mean_interval(predictions.losses),
        images_per_second=images_per_second,
        predictions=predictions,
        reference=first,
        comparison=comparison,
    )


def compare(model: Predictions, reference: Predictions) -> Comparison:
    """Compare two networks image by image.

    Raises:
        UsageError: they were not measured on the same images.
    """
    if not torch.equal(model.labels, reference.labels):
        raise UsageError("two networks can be compared only on the same images in the same order")
    count = len(model.labels)
    same = int((model.classes == reference.classes).sum())
    agreement, interval = 100 * same / count, wilson_interval(same, count)
    if not model.labelled:
        return Comparison(agreement, interval, None, None, None, None)
    model_right, reference_right = model.classes == model.labels, reference.classes == reference.labels
    only_model = int((model_right & ~reference_right).sum())
    only_reference = int((reference_right & ~model_right).sum())
    return Comparison(
        agreement=agreement,
        agreement_interval=interval,
        mcnemar_p=mcnemar(only_model, only_reference),
        only_model_right=only_model,
        only_reference_right=only_reference,
        drop=100 * (only_reference - only_model) / count,
    )


def rank(scores: Tensor, labels: Tensor) -> Tensor:
    """Place (N,) of each label in its row of ``scores`` (N, classes), from 0; of equal scores the first comes first."""
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1]) < labels[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(1)


def wilson_interval(successes: int, n: int) -> Interval:
    """Wilson's 95 % score interval of a proportion, in percent (Wilson 1927): within 0 and 100 even at the ends.

    Raises:
        DataError: not 0 ≤ ``successes`` ≤ ``n``, or ``n`` is 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise DataError(f"{successes} of {n} is no proportion")
    share = successes / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    # the bounds are exactly 0 and 1 at the ends, which rounding would miss
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return 100 * low, 100 * high


def mean_interval(values: Tensor) -> Interval | None:
    """The normal 95 % interval of the mean of values ≥ 0, mean ± z·s/√N, cut off at 0; None for a single value."""
    if len(values) < 2:
        return None
    mean, half = float(values.mean()), Z * float(values.std()) / math.sqrt(len(values))
    return max(0.0, mean - half), mean + half


def mcnemar(first_only: int, second_only: int) -> float:
    """Exact McNemar test: two-sided p of ``first_only`` against ``second_only`` discordant pairs, Binomial(n, ½).

    Twice the smaller tail, Σ_{i≤k} C(n, i) / 2ⁿ with k the smaller of the two, at most 1. The sum is over whole
    numbers, so nothing is rounded before the division.
    """
    n, k = first_only + second_only, min(first_only, second_only)
    term = total = 1
    for i in range(1, k + 1):
        term = term * (n - i + 1) // i
        total += term
    return min(1.0, 2 * total / (1 << n))


def _check(scores: Tensor, labels: Tensor, before: int, labelled: bool) -> None:
    if scores.ndim != 2 or len(scores) != len(labels):
        raise CbpqError(f"the network's output has shape {tuple(scores.shape)}, expected ({len(labels)}, classes)")
    outside = labels[(labels < 0) | (labels >= scores.shape[1])]
    if not labelled and (labels != NO_LABEL).any():
        raise DataError("some images of the evaluation have labels and some have none; evaluate them separately")
    if labelled and len(outside):
        raise misfit(int(outside[0]), scores.shape[1], "evaluation")
    bad = ~scores.isfinite().all(1)
    if bad.any():
        image = before + int(bad.nonzero()[0])
        raise CbpqError(
            f"the network's outputs for image {image} of the evaluation are not finite; its weights may be damaged, or "
            "the input specification wrong"
        )
