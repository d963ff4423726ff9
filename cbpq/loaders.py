"""Batches for training and evaluation.

What a training batch holds is a function of (seed, epoch, position in the epoch) alone: not of the number of worker
processes, of the batch an epoch is taken up at, or of any global random state, which is left untouched.
"""

import contextlib
import copy
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cbpq.distributed import ALL, Turn
from cbpq.errors import DataError, UsageError
from cbpq.inputs import InputSpec
from cbpq.pictures import Pictures, with_channels
from cbpq.transforms import (
    CROP,
    ORDER,
    Augmentation,
    EvalTransform,
    Normalize,
    RandomResizedCrop,
    Shifts,
    epoch_generator,
)

Indices = NDArray[np.int64]
GRACE = 60  # seconds that worker processes outlive SIGTERM, time for the run to make its step and save


@dataclass
class Batch:
    """Normalised ``images`` (B, C, H, W) float32 and their ``labels`` (B,) int64, on the CPU."""

    images: Tensor
    labels: Tensor


class TrainLoader(Protocol):
    """Batches for training.

    A last batch shorter than the others is left out, because BatchNorm would give its few images more weight, unless it
    is the only one.
    """

    @property
    def images(self) -> int:
        """Number of images the loader draws from."""

    @property
    def augmentation(self) -> Augmentation:
        """What it does to them."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start + 1``, … of epoch ``number``, the same as an unbroken epoch gives them.

        Raises:
            DataError: an unreadable picture, named.
        """


class SharedTrainLoader(TrainLoader, Protocol):
    """A training loader that several processes can share."""

    def sliced(self, turn: Turn) -> TrainLoader:
        """This loader for one of the processes: each has an equal slice of every batch, in order.

        Raises:
            UsageError: the batches cannot be divided.
        """


class EvalLoader(Protocol):
    """Every image exactly once, in a fixed order; the last batch may be short."""

    @property
    def images(self) -> int:
        """Number of images."""

    def __len__(self) -> int:
        """Number of batches."""

    def __iter__(self) -> Iterator[Batch]: ...


@runtime_checkable
class SharedEvalLoader(EvalLoader, Protocol):
    """An evaluation loader that several processes can share."""

    def dealt(self, turn: Turn) -> Iterator[Batch]:
        """The batches of one of the processes, to whom they are dealt out one after the other."""


class Source(Protocol):
    """uint8 images (B, C, height, width) for any list of batches; a batch is an array of samples' numbers."""

    labels: Indices

    def batches(self, plan: Sequence[Indices], epoch: int | None) -> Iterator[Tensor]:
        """One tensor per batch; ``epoch`` is None for evaluation."""


class TensorSource:
    """Images (N, C, H, W) uint8 of the network's own size, in memory."""

    def __init__(self, images: Tensor, labels: Indices) -> None:
        self._images, self.labels = images, labels

    def batches(self, plan: Sequence[Indices], epoch: int | None) -> Iterator[Tensor]:
        """Select the rows."""
        for samples in plan:
            yield self._images[torch.from_numpy(samples)]


class PictureSource:
    """Pictures that are decoded and transformed when they are needed, by worker processes if there are any."""

    def __init__(
        self, pictures: Pictures, indices: Indices, spec: InputSpec, workers: int, seed: int, resized_crop: bool
    ) -> None:
        self.labels = pictures.labels[indices]
        self._dataset = _BatchDataset(pictures, indices, spec, seed, resized_crop)
        self._workers = workers

    def batches(self, plan: Sequence[Indices], epoch: int | None) -> Iterator[Tensor]:
        """Read ahead in the worker processes; batches come in order."""
        # The sampler holds whole batches, so batch_size is None. A generator of its own keeps DataLoader from drawing a
        # seed for its workers from the global one. New workers for every epoch hold no state that could go stale.
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=[(samples, epoch) for samples in plan],
            num_workers=min(self._workers, len(plan)),
            collate_fn=_as_it_is,
            worker_init_fn=_follow_parent,
            generator=torch.Generator(),
        )
        with deaths_explained():
            for result in loader:
                if isinstance(result, DataError):
                    raise result
                yield result


class _BatchDataset(Dataset[Tensor | DataError]):
    """Maps (samples, epoch) to a stack of transformed pictures."""

    def __init__(self, pictures: Pictures, indices: Indices, spec: InputSpec, seed: int, resized_crop: bool) -> None:
        self._pictures, self._indices = pictures, indices
        self._channels, self._seed = spec.channels, seed
        self._evaluation = EvalTransform(spec)
        self._crop = RandomResizedCrop(spec) if resized_crop else None

    def __getitem__(self, key: tuple[Indices, int | None]) -> Tensor | DataError:
        samples, epoch = key
        try:
            return torch.stack([self._image(int(sample), epoch) for sample in samples])
        except DataError as error:
            # returned, since an exception raised in a worker arrives with its whole traceback as the message
            return error

    def _image(self, sample: int, epoch: int | None) -> Tensor:
        index = int(self._indices[sample])
        picture = with_channels(self._pictures.open(index), self._channels, self._pictures.name(index))
        if self._crop is None or epoch is None:
            return self._evaluation(picture)
        return self._crop(picture, epoch_generator(self._seed, epoch, CROP, sample))


class TrainBatches:
    """The training loader over a source."""

    def __init__(
        self, source: Source, normalize: Normalize, augmentation: Augmentation, *, batch_size: int, seed: int
    ) -> None:
        self._source, self._normalize, self.augmentation = source, normalize, augmentation
        self._labels = torch.from_numpy(source.labels)
        self.batch_size, self._seed, self._turn = batch_size, seed, ALL

    @property
    def images(self) -> int:
        """Number of training images."""
        return len(self._labels)

    def __len__(self) -> int:
        return batches_per_epoch(self.images, self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """See `TrainLoader.epoch`."""
        check_position(number, start)
        order = epoch_generator(self._seed, number, ORDER).permutation(np.arange(self.images, dtype=np.int64))
        draws = Shifts.draw(self.augmentation, self._seed, number, self.images)
        plan = [order[index * self.batch_size :][: self.batch_size] for index in range(start, len(self))]
        plan = [slice_of(samples, self._turn) for samples in plan]
        for samples, images in zip(plan, self._source.batches(plan, number), strict=True):
            shifted = self.augmentation.on_batch(images, draws, samples)
            yield Batch(self._normalize(shifted), self._labels[torch.from_numpy(samples)])

    def sliced(self, turn: Turn) -> "TrainBatches":
        """See `SharedTrainLoader.sliced`."""
        check_divisible(min(self.batch_size, self.images), turn)
        own = copy.copy(self)
        own._turn = turn
        return own


class RepeatedBatches:
    """A training loader whose every epoch is ``passes`` epochs of another one, one after the other."""

    def __init__(self, inner: TrainLoader, passes: int) -> None:
        if passes < 1:
            raise UsageError(f"{passes} passes over the training pictures are too few; give 1 or more")
        self._inner, self._passes = inner, passes

    @property
    def images(self) -> int:
        """Number of images the inner loader draws from."""
        return self._inner.images

    @property
    def augmentation(self) -> Augmentation:
        """That of the inner loader."""
        return self._inner.augmentation

    def __len__(self) -> int:
        return self._passes * len(self._inner)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """See `TrainLoader.epoch`."""
        check_position(number, start)
        first, start = divmod(start, len(self._inner))
        for index in range(first, self._passes):
            yield from self._inner.epoch(number * self._passes + index, start if index == first else 0)


class EvalBatches:
    """The evaluation loader over a source; with ``mirrored``, each image's mirror image follows after all of them."""

    def __init__(self, source: Source, normalize: Normalize, *, batch_size: int, mirrored: bool = False) -> None:
        self._source, self._normalize = source, normalize
        self._halves = (False, True) if mirrored else (False,)
        self._labels = torch.from_numpy(source.labels)
        self.batch_size = batch_size

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self._halves) * len(self._labels)

    def __len__(self) -> int:
        return len(self._halves) * len(self._plan())

    def __iter__(self) -> Iterator[Batch]:
        return self.dealt(ALL)

    def dealt(self, turn: Turn) -> Iterator[Batch]:
        """See `SharedEvalLoader.dealt`."""
        plan = self._plan()
        for half, mirror in enumerate(self._halves):
            own = plan[(turn.number - half * len(plan)) % turn.of :: turn.of]
            for samples, images in zip(own, self._source.batches(own, None), strict=True):
                normalized = self._normalize(images)
                yield Batch(normalized.flip(-1) if mirror else normalized, self._labels[torch.from_numpy(samples)])

    def _plan(self) -> list[Indices]:
        everything = np.arange(len(self._labels), dtype=np.int64)
        return [everything[start:][: self.batch_size] for start in range(0, len(everything), self.batch_size)]


@contextlib.contextmanager
def deaths_explained() -> Iterator[None]:
    """Say in one line that a worker process died. torch raises that wherever this process happens to be just then, so
    this belongs around all that is done with batches, too.

    Raises:
        DataError: one died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise DataError(
            "a data-loading worker process died, most likely for lack of (shared) memory; use fewer --workers"
        ) from error


def batches_per_epoch(images: int, batch_size: int) -> int:
    """Full batches, or one short one if there are fewer images than that."""
    return max(1, images // batch_size)


def dealt(loader: EvalLoader, turn: Turn) -> Iterator[Batch]:
    """The batches of one of several processes; a loader that cannot leave out the others' reads them too."""
    if isinstance(loader, SharedEvalLoader):
        return loader.dealt(turn)
    return islice(iter(loader), turn.number, None, turn.of)


def slice_of(batch: Indices, turn: Turn) -> Indices:
    """The part of a batch that one of several processes has."""
    size = len(batch) // turn.of
    return batch[turn.number * size :][:size]


def check_divisible(batch_size: int, turn: Turn) -> None:
    """Refuse batches of which the processes would not have equal parts.

    Raises:
        UsageError: naming a batch size that can be divided.
    """
    if batch_size % turn.of:
        raise UsageError(
            f"batches of {batch_size} pictures cannot be divided evenly among {turn.of} processes; "
            f"use --batch-size {max(batch_size // turn.of, 1) * turn.of}"
        )


def check_position(number: int, start: int) -> None:
    """Refuse epochs and batches that do not exist.

    Raises:
        UsageError: a negative number.
    """
    if number < 0 or start < 0:
        raise UsageError(f"epoch {number}, batch {start}: both count from 0")


def _as_it_is(result: Any) -> Any:
    return result


def _follow_parent(worker: int) -> None:
    # Terminals send Ctrl-C and schedulers SIGTERM to all processes; readers that died of it would keep the run from
    # being saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    # torch asks for this too, but takes for the parent who started the process: a server that may live on for ever
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_later(number: int, frame: FrameType | None) -> None:
    # not never: it may come from the parent, which at its own end waits for its children
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.alarm(GRACE)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
