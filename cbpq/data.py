"""What ``--data`` names, as loaders: a folder, a ``.npz`` file, or one of timm's readers."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbpq.errors import DataError, UsageError, one_line
from cbpq.inputs import InputSpec
from cbpq.loaders import (
    Batch,
    EvalBatches,
    EvalLoader,
    PictureSource,
    SharedTrainLoader,
    Source,
    TensorSource,
    TrainBatches,
    TrainLoader,
)
from cbpq.pictures import ArrayPictures, are_grey, no_labels
from cbpq.readers import VAL_SPLITS, Reader, is_reader
from cbpq.splits import (
    CALIBRATION,
    Chosen,
    Part,
    Splits,
    calibrating,
    check_labels,
    choose,
    open_local,
    open_reader,
)
from cbpq.streams import PictureStream, StreamEvalBatches, StreamTrainBatches
from cbpq.transforms import Augment, Augmentation, Normalize

__all__ = ["Augment", "Batch", "Data", "EvalLoader", "TrainLoader", "load_data"]

FEW, ENOUGH = 100, 200  # pictures without labels


@dataclass
class Data:
    """The loaders; ``train`` is None where only evaluation was asked for.

    ``describe`` holds JSON types and no absolute path: ``kind`` (folder, npz, reader, stream), ``train_split`` and
    ``val_split`` in words, ``train_images``, ``val_images``, ``train_labels`` and ``val_labels`` (whether there are
    any), ``classes`` (of the network), ``held_out_share``, ``augmentation`` in words, ``skipped_images`` (names) and
    ``notes``.

    ``calibration`` shows training pictures as they are for evaluation, in a fixed order: all of them if they have no
    labels, else a few of every class. Where training mirrors pictures, their mirror images follow. It is None without
    training pictures, and for streams.
    """

    train: SharedTrainLoader | None
    val: EvalLoader
    classes: int
    describe: dict[str, Any]
    calibration: EvalLoader | None = None

    @property
    def labelled(self) -> bool:
        """Whether the training pictures have labels; False if there are none."""
        return bool(self.describe["train_labels"])

    @property
    def val_labelled(self) -> bool:
        """Whether the validation pictures have labels."""
        return bool(self.describe["val_labels"])

    def set_batch_size(self, images: int) -> None:
        """Let all loaders give so many images at a time, but for streams, which stay as they are."""
        for loader in (self.train, self.val, self.calibration):
            if isinstance(loader, TrainBatches | EvalBatches):
                loader.batch_size = images


def load_data(
    path: str,
    spec: InputSpec,
    num_classes: int,
    *,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    training: bool = True,
    class_map: Path | None = None,
    skip_bad_images: bool = False,
    augment: Augment = "auto",
    val_from_train: float | None = None,
    limit_train: int | None = None,
    calibration: int | None = None,
) -> Data:
    """Open ``path`` for a network of ``num_classes`` outputs that takes ``spec``.

    ``path`` is a folder with ``train`` and ``val`` (or ``validation``, ``valid``, ``test``), a folder of class folders,
    a ``.npz`` file of the MedMNIST layout, or a timm reader such as ``hfds/NAME`` or ``torch/NAME@FOLDER``. Without a
    validation split, training holds a tenth of the training pictures out for it, of every class alike and always the
    same for a seed; evaluation alone takes all pictures.

    A split has labels or not: a folder with pictures directly in it has none, nor do arrays of images alone; the label
    of such pictures is ``NO_LABEL``. Training then uses ``calibration`` of them (by default 1024, or all there are),
    random ones, always the same for a seed. At most 1000 are held out, and of fewer than 20 none: they are the
    validation pictures as well.

    ``training=False`` opens only what evaluation needs. ``val_from_train`` holds out that share of the training
    pictures even where there is a validation split, which then is not touched. ``limit_train`` takes so many of the
    (remaining) training pictures, of every class its share. Of labelled pictures, ``calibration`` only says how many
    ``Data.calibration`` shows. ``skip_bad_images`` decodes every picture once in advance,
    in ``workers`` threads, and leaves out those that cannot be read.

    Raises:
        UsageError: no such file, or arguments that make no sense.
        DataError: data that cannot be used, or do not fit the network.
        MissingPartError: a reader's package is not installed.
    """
    for name, value, least in (("batch size", batch_size, 1), ("workers", workers, 0), ("seed", seed, 0)):
        if value < least:
            raise UsageError(f"{name} {value} is too small; give {least} or more")
    if val_from_train is not None and not 0 < val_from_train < 1:
        raise UsageError(f"cannot hold a share of {val_from_train} out of the training pictures; give 0.1, say")
    if limit_train is not None and limit_train < 1:
        raise UsageError(f"{limit_train} training pictures are too few; give 1 or more")
    if calibration is not None and calibration < 1:
        raise UsageError(f"{calibration} calibration pictures are too few; give 1 or more")
    if spec.channels not in (1, 3):
        raise UsageError(f"the network takes {spec.channels} channels; pictures have 1 or 3")

    local = os.path.expanduser(path)
    reader = Reader.parse(path) if is_reader(path) else None
    if class_map is not None and (reader is not None or os.path.isfile(local)):
        raise UsageError(f"a class map names class folders, but {one_line(path)} is no folder; leave the class map out")
    if reader is not None and reader.streamed:
        if skip_bad_images or val_from_train is not None:
            raise UsageError(f"{one_line(path)} is read as a stream: pictures cannot be skipped or held out")
        return _load_stream(reader, spec, num_classes, batch_size, seed, training, augment, limit_train)

    splits = open_reader(reader, spec) if reader is not None else open_local(local, num_classes, class_map)
    count = CALIBRATION if calibration is None else calibration
    chosen = choose(
        splits,
        num_classes,
        training=training,
        val_from_train=val_from_train,
        limit=limit_train,
        calibration=count,
        seed=seed,
    )
    if skip_bad_images:
        train, val = chosen.train, chosen.val
        val, skipped = _readable(val, workers, f"{splits.title}, {chosen.val_split}")
        if train is chosen.val:
            train = val
        elif train is not None:
            train, more = _readable(train, workers, f"{splits.title}, {splits.train_name}")
            skipped = sorted(skipped + more)
            check_labels(train.labels, num_classes, f"{splits.title}, {splits.train_name}")
        chosen = replace(chosen, train=train, val=val, skipped=tuple(skipped))
    return _assemble(splits, chosen, spec, num_classes, _Loading(batch_size, seed, workers, augment, count))


def synthetic_data(
    images: Tensor, spec: InputSpec, num_classes: int, *, batch_size: int, seed: int, augment: Augment = "auto"
) -> Data:
    """Synthesised pictures (N, C, H, W), uint8 and of the network's own size, as a data set without labels."""
    layout = images.squeeze(1) if images.shape[1] == 1 else images.permute(0, 2, 3, 1)
    pictures = ArrayPictures(layout.contiguous().numpy(), no_labels(len(images)), "synthetic")
    name = "the synthesised pictures"
    splits = Splits("synthetic", name, lambda: pictures, None, name, "")
    chosen = choose(
        splits, num_classes, training=True, val_from_train=None, limit=None, calibration=len(images), seed=seed
    )
    if chosen.train is chosen.val:
        chosen = replace(chosen, val_split=f"{name} themselves")
    data = _assemble(splits, chosen, spec, num_classes, _Loading(batch_size, seed, augment=augment))
    data.describe["notes"] = []  # of how many there are, nothing is to be learned
    return data


@dataclass(frozen=True)
class _Loading:
    """How pictures are read; ``calibration`` of labelled ones are shown by ``Data.calibration``."""

    batch_size: int
    seed: int
    workers: int = 0
    augment: Augment = "auto"
    calibration: int = CALIBRATION


def _assemble(splits: Splits, chosen: Chosen, spec: InputSpec, num_classes: int, how: _Loading) -> Data:
    """Loaders of the chosen pictures, and what is to be said of them."""
    train, val, seed = chosen.train, chosen.val, how.seed
    normalize = Normalize(spec)
    augmentation = Augmentation()
    train_loader: SharedTrainLoader | None = None
    calibration_loader: EvalLoader | None = None
    notes = list(splits.notes)
    if train is not None:
        augmentation = Augmentation.choose(how.augment, spec, are_grey(train.pictures, train.indices))
        train_source = _source(train, spec, how.workers, seed, augmentation)
        train_loader = TrainBatches(train_source, normalize, augmentation, batch_size=how.batch_size, seed=seed)
        calibration_source = _source(calibrating(train, how.calibration, seed), spec, how.workers, seed, Augmentation())
        calibration_loader = EvalBatches(
            calibration_source, normalize, batch_size=how.batch_size, mirrored=augmentation.flip
        )
        if not train.labelled and len(train.indices) < FEW:
            notes.append(_few(len(train.indices)))
    val_loader = EvalBatches(
        _source(val, spec, how.workers, seed, Augmentation()), normalize, batch_size=how.batch_size
    )
    describe = _describe(
        splits.kind,
        train_loader,
        val_loader,
        num_classes,
        splits.train_name,
        chosen.val_split,
        augmentation,
        notes,
    )
    describe |= {
        "train_labels": train.labelled if train is not None else None,
        "val_labels": val.labelled,
        "held_out_share": chosen.share,
        "skipped_images": list(chosen.skipped),
    }
    return Data(train_loader, val_loader, num_classes, describe, calibration_loader)


def _few(images: int) -> str:
    pictures = "1 picture" if images == 1 else f"{images} pictures"
    return f"only {pictures} without labels: expect clearly less than with {ENOUGH} or more"


def _readable(part: Part, threads: int, where: str) -> tuple[Part, list[str]]:
    good, names = part.readable(threads)
    if not len(good.indices):
        raise DataError(f"{where}: none of the {len(names)} pictures can be read; {names[0]} is the first")
    return good, names


def _source(part: Part, spec: InputSpec, workers: int, seed: int, augmentation: Augmentation) -> Source:
    pictures = part.pictures
    if isinstance(pictures, ArrayPictures):
        if pictures.channels > spec.channels:
            raise DataError(
                f"{pictures.name(0)} has {pictures.channels} channels, the network takes {spec.channels}; "
                "convert the images to grey first"
            )
        if pictures.images.shape[1:3] == (spec.height, spec.width) and not augmentation.resized_crop:
            everything = len(part.indices) == len(pictures.images)
            images = torch.from_numpy(pictures.images if everything else pictures.images[part.indices])
            images = images.unsqueeze(1) if pictures.channels == 1 else images.permute(0, 3, 1, 2).contiguous()
            return TensorSource(images, part.labels)
    return PictureSource(pictures, part.indices, spec, workers, seed, augmentation.resized_crop)


def _load_stream(
    reader: Reader,
    spec: InputSpec,
    num_classes: int,
    batch_size: int,
    seed: int,
    training: bool,
    augment: Augment,
    limit: int | None,
) -> Data:
    dataset, val_name = reader.open(VAL_SPLITS, spec)
    title = one_line(reader.name)
    val = StreamEvalBatches(
        PictureStream(dataset, f"{title}:{val_name}", spec, num_classes), spec, batch_size=batch_size
    )
    train: SharedTrainLoader | None = None
    # the pictures' colours are not known before they come, so only the network's channels tell whether they are grey
    augmentation = Augmentation.choose(augment, spec, grey=False) if training else Augmentation()
    if training:
        dataset, _ = reader.open(("train",), spec)
        stream = PictureStream(dataset, f"{title}:train", spec, num_classes, limit)
        train = StreamTrainBatches(stream, spec, augmentation, batch_size=batch_size, seed=seed)
    notes = ["read from front to back by one process; training mixes the pictures in a buffer only"]
    return Data(
        train, val, num_classes, _describe("stream", train, val, num_classes, "train", val_name, augmentation, notes)
    )


def _describe(
    kind: str,
    train: TrainLoader | None,
    val: EvalLoader,
    classes: int,
    train_split: str,
    val_split: str,
    augmentation: Augmentation,
    notes: Sequence[str],
) -> dict[str, Any]:
    return {
        "kind": kind,
        "classes": classes,
        "train_split": train_split if train is not None else None,
        "train_images": train.images if train is not None else None,
        "train_labels": True if train is not None else None,
        "val_split": val_split,
        "val_images": val.images,
        "val_labels": True,
        "held_out_share": None,
        "augmentation": str(augmentation) if train is not None else None,
        "skipped_images": [],
        "notes": list(notes),
    }
