"""Data sets that can only be read from front to back.

They are read by this process alone, whatever the number of workers, so that order and augmentation stay a function of
(seed, epoch, position in the stream). Training draws from a buffer of pictures, so a stream should be mixed already. To
take an epoch up in the middle, the stream is read again from its beginning.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cbpq.distributed import ALL, Turn
from cbpq.errors import DataError, brief
from cbpq.inputs import InputSpec
from cbpq.loaders import Batch, batches_per_epoch, check_divisible, check_position, slice_of
from cbpq.pictures import with_channels
from cbpq.splits import misfit
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

BUFFER = 1024  # pictures

T = TypeVar("T")
_Item = tuple[int, Tensor, int]  # position in the stream, uint8 image (C, height, width), label


class PictureStream:
    """The pictures of an iterable data set of (PIL picture, label), the first ``limit`` of them."""

    def __init__(self, dataset: Any, title: str, spec: InputSpec, num_classes: int, limit: int | None = None) -> None:
        self._dataset, self._title = dataset, title
        self._channels, self._num_classes = spec.channels, num_classes
        self.evaluation = EvalTransform(spec)
        try:
            count = len(dataset)
        except Exception as error:  # data sets of other people raise whatever they like
            raise DataError(f"{title} does not say how many pictures it has ({brief(error)})") from error
        if count < 1:
            raise DataError(f"{title} does not say how many pictures it has, or has none")
        self.images = count if limit is None else min(count, limit)

    def __iter__(self) -> Iterator[tuple[int, Image.Image, int]]:
        """Position, picture and label.

        Raises:
            DataError: a bad label, or fewer pictures than promised: readers leave out what they cannot decode.
        """
        seen = 0
        stream = self._guarded()
        for seen, (picture, label) in enumerate(itertools.islice(stream, self.images), start=1):
            name = f"{self._title}[{seen - 1}]"
            if not 0 <= label < self._num_classes:
                raise misfit(label, self._num_classes, name)
            yield seen - 1, with_channels(picture, self._channels, name), label
        if seen < self.images:
            raise DataError(
                f"{self._title} gave {seen} of its {self.images} pictures; the others are missing or cannot be read"
            )

    def _guarded(self) -> Iterator[tuple[Image.Image, int]]:
        iterator = iter(self._dataset)
        while True:
            try:
                picture, label = next(iterator)
                item = (picture, int(label))
            except StopIteration:
                return
            except MemoryError:
                raise
            except Exception as error:  # data sets of other people raise whatever they like
                raise DataError(f"{self._title} cannot be read on ({brief(error)})") from error
            yield item


class StreamTrainBatches:
    """The training loader over a stream."""

    def __init__(
        self, stream: PictureStream, spec: InputSpec, augmentation: Augmentation, *, batch_size: int, seed: int
    ) -> None:
        self._stream, self._normalize, self.augmentation = stream, Normalize(spec), augmentation
        self._crop = RandomResizedCrop(spec) if augmentation.resized_crop else None
        self._batch_size, self._seed, self._turn = batch_size, seed, ALL

    @property
    def images(self) -> int:
        """Number of training images."""
        return self._stream.images

    def __len__(self) -> int:
        return batches_per_epoch(self.images, self._batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """See `TrainLoader.epoch`."""
        check_position(number, start)
        draws = Shifts.draw(self.augmentation, self._seed, number, self.images)
        items = _mixed(self._transformed(number), epoch_generator(self._seed, number, ORDER))
        for index, items_of_batch in enumerate(_chunks(items, self._batch_size)):
            if start <= index < len(self):
                own = slice_of(np.arange(len(items_of_batch)), self._turn)
                positions, images, labels = zip(*(items_of_batch[item] for item in own), strict=True)
                shifted = self.augmentation.on_batch(torch.stack(images), draws, np.array(positions, dtype=np.int64))
                yield Batch(self._normalize(shifted), torch.tensor(labels))

    def sliced(self, turn: Turn) -> "StreamTrainBatches":
        """See `SharedTrainLoader.sliced`; every process reads the whole stream."""
        check_divisible(min(self._batch_size, self.images), turn)
        own = copy.copy(self)
        own._turn = turn
        return own

    def _transformed(self, epoch: int) -> Iterator[_Item]:
        for position, picture, label in self._stream:
            if self._crop is None:
                yield position, self._stream.evaluation(picture), label
            else:
                yield position, self._crop(picture, epoch_generator(self._seed, epoch, CROP, position)), label


class StreamEvalBatches:
    """The evaluation loader over a stream."""

    def __init__(self, stream: PictureStream, spec: InputSpec, *, batch_size: int) -> None:
        self._stream, self._normalize, self._batch_size = stream, Normalize(spec), batch_size

    @property
    def images(self) -> int:
        """Number of images."""
        return self._stream.images

    def __len__(self) -> int:
        return -(-self.images // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.dealt(ALL)

    def dealt(self, turn: Turn) -> Iterator[Batch]:
        """See `SharedEvalLoader.dealt`; every process reads the whole stream."""
        for index, items_of_batch in enumerate(_chunks(iter(self._stream), self._batch_size)):
            if index % turn.of == turn.number:
                _, pictures, labels = zip(*items_of_batch, strict=True)
                images = torch.stack([self._stream.evaluation(picture) for picture in pictures])
                yield Batch(self._normalize(images), torch.tensor(labels))


def _mixed(items: Iterator[_Item], generator: np.random.Generator) -> Iterator[_Item]:
    """The items in another order: each place in a buffer is given up at random to the next item."""
    buffer = list(itertools.islice(items, BUFFER))
    for item in items:
        place = int(generator.integers(len(buffer)))
        yield buffer[place]
        buffer[place] = item
    for place in generator.permutation(len(buffer)):
        yield buffer[place]


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk
