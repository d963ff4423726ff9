"""Which pictures belong to which split: what there is, what is held out of it, what is left out."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cbpq import arrays
from cbpq.errors import DataError, UsageError, one_line
from cbpq.folders import ImageFolders
from cbpq.inputs import InputSpec
from cbpq.pictures import Pictures, find_unreadable, have_labels
from cbpq.readers import VAL_SPLITS, Reader

Indices = NDArray[np.int64]

HELD_OUT = 0.1  # share of the training pictures that stands in for a missing validation split
# for training pictures without labels
CALIBRATION = 1024  # how many of them are used
MOST_HELD_OUT = 1000
LEAST_TO_HOLD_OUT = 20  # of fewer pictures none is held out


@dataclass(frozen=True)
class Splits:
    """What a data set offers. ``train`` and ``val`` are read by calling them; None where there is no such split."""

    kind: str
    title: str
    train: Callable[[], Pictures] | None
    val: Callable[[], Pictures] | None
    train_name: str
    val_name: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """Some of the pictures of a split."""

    pictures: Pictures
    indices: Indices

    @property
    def labels(self) -> NDArray[np.int64]:
        """Their labels."""
        return self.pictures.labels[self.indices]

    @property
    def labelled(self) -> bool:
        """Whether they have labels."""
        return have_labels(self.labels)

    def sample(self, count: int, generator: np.random.Generator) -> "Part":
        """``count`` random ones, of every class its share; all if there are not more."""
        if count >= len(self.indices):
            return self
        return self.only(np.flatnonzero(stratified(self.labels, count, generator)))

    def only(self, positions: Indices) -> "Part":
        """Those at ``positions`` of this part."""
        return Part(self.pictures, self.indices[positions])

    def readable(self, threads: int) -> tuple["Part", list[str]]:
        """This part without the pictures that cannot be decoded, and their names."""
        bad = find_unreadable(self.pictures, self.indices, threads)
        names = [self.pictures.name(int(index)) for index in self.indices[bad]]
        return self.only(np.flatnonzero(~bad)), names


@dataclass(frozen=True)
class Chosen:
    """The parts to use; ``val_split`` says in words what ``val`` is, ``share`` how much of train it was held out of.

    ``val`` is ``train`` itself where there are too few pictures to hold some out.
    """

    train: Part | None
    val: Part
    val_split: str
    share: float | None
    skipped: tuple[str, ...] = ()
    """Names of the pictures that cannot be read."""


def open_local(path: str, num_classes: int, class_map: Path | None) -> Splits:
    """The splits of a folder or a ``.npz`` file.

    Raises:
        UsageError: there is no such thing.
        DataError: it cannot be used.
    """
    title = one_line(path)
    if os.path.isdir(path):  # os.path, unlike Path, answers for a path with a null byte or in a closed folder, too
        folders = ImageFolders(Path(path), num_classes, class_map)
        train, val = folders.train or folders.whole, folders.val
        return Splits(
            "folder",
            title,
            (lambda: folders.pictures(train)) if train else None,
            (lambda: folders.pictures(val)) if val else None,
            _name_of_whole(folders) if folders.whole else train.name if train else "",
            val.name if val else "",
            folders.notes,
        )
    if not os.path.isfile(path):
        raise UsageError(f"no such data: {title}; give a folder, a .npz file or a timm reader such as hfds/NAME")
    if not path.lower().endswith(".npz"):
        raise UsageError(f"{title} is a file, but no .npz; give a folder of pictures, a .npz file or a timm reader")
    names = arrays.split_names(Path(path))
    val_name = next((name for name in ("val", "test") if name in names), "")
    return Splits(
        "npz",
        title,
        (lambda: arrays.read_split(Path(path), "train")) if "train" in names else None,
        (lambda: arrays.read_split(Path(path), val_name)) if val_name else None,
        "train",
        val_name,
    )


def _name_of_whole(folders: ImageFolders) -> str:
    return "the pictures" if folders.whole in folders.flat else "the class folders"


def open_reader(reader: Reader, spec: InputSpec) -> Splits:
    """The splits of a timm reader whose pictures can be picked by number.

    Raises:
        DataError: its package cannot open it.
    """
    try:
        val, val_name = reader.open(VAL_SPLITS, spec)
    except DataError:  # no such split; if there is more to it, opening the training split will tell
        val, val_name = None, ""
    return Splits(
        "reader",
        one_line(reader.name),
        lambda: reader.pictures(reader.open(("train",), spec)[0], "train"),
        (lambda: reader.pictures(val, val_name)) if val is not None else None,
        "train",
        val_name,
    )


def choose(
    splits: Splits,
    num_classes: int,
    *,
    training: bool,
    val_from_train: float | None,
    limit: int | None,
    calibration: int,
    seed: int,
) -> Chosen:
    """Pick what to train on and what to validate with; the same for the same seed. Of training pictures without labels,
    ``calibration`` are picked.

    Raises:
        DataError: a split that is needed is missing, or its labels do not fit the network.
    """
    if splits.val is not None and val_from_train is None:
        share = None
        val = _checked(splits.val(), num_classes, f"{splits.title}, {splits.val_name}")
        val_split = splits.val_name
        if not training:
            return Chosen(None, val, val_split, None)
        train = _train(splits, num_classes)
    else:
        share = val_from_train or (HELD_OUT if training else None)
        train = _train(splits, num_classes)
        if share is None:
            return Chosen(None, train, f"{splits.train_name} (there is no other split)", None)
        val_split = f"{100 * share:g} % held out of {splits.train_name}"
        if val_from_train is None and not train.labelled:
            if len(train.indices) < LEAST_TO_HOLD_OUT:
                few = _fewer(train, limit, calibration, seed)
                return Chosen(few, few, "the calibration pictures themselves", None)
            if share * len(train.indices) > MOST_HELD_OUT:
                share = MOST_HELD_OUT / len(train.indices)
                val_split = f"{MOST_HELD_OUT} pictures held out of {splits.train_name}"
        kept, held_out = hold_out(train.labels, share, np.random.default_rng([seed, 1]))
        val, train = train.only(held_out), train.only(kept)
    return Chosen(_fewer(train, limit, calibration, seed) if training else None, val, val_split, share)


def _fewer(train: Part, limit: int | None, calibration: int, seed: int) -> Part:
    """The training pictures to use."""
    if limit is not None:
        train = train.sample(limit, np.random.default_rng([seed, 2]))
    return train if train.labelled else calibrating(train, calibration, seed)


def calibrating(train: Part, count: int, seed: int) -> Part:
    """``count`` of the training pictures; always the same ones for a seed."""
    return train.sample(count, np.random.default_rng([seed, 3]))


def _train(splits: Splits, num_classes: int) -> Part:
    if splits.train is None:
        raise DataError(f"{splits.title} has no training pictures, only a split called {splits.val_name}")
    return _checked(splits.train(), num_classes, f"{splits.title}, {splits.train_name}")


def _checked(pictures: Pictures, num_classes: int, where: str) -> Part:
    check_labels(pictures.labels, num_classes, where)
    return Part(pictures, np.arange(len(pictures.labels), dtype=np.int64))


def check_labels(labels: NDArray[np.int64], num_classes: int, where: str) -> None:
    """Refuse labels that the network has no output for, and sets of one class; no labels at all are right.

    Raises:
        DataError: naming the label and the number of classes.
    """
    if not have_labels(labels):
        return
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise misfit(int(outside[0]), num_classes, where)
    if len(labels) and labels.min() == labels.max():
        raise DataError(f"{where}: all pictures have label {labels[0]}; a classifier needs two classes or more")


def misfit(label: int, num_classes: int, where: str) -> DataError:
    """The error for a label that the network has no output for."""
    return DataError(
        f"{where}: label {label} does not fit the network's {num_classes} classes (labels 0 to {num_classes - 1})"
    )


def stratified(labels: NDArray[np.int64], count: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Mark ``count`` random pictures, of every class its share (to within one picture).

    With the pictures in random order within their classes, classes one after the other, every (N / count)-th is taken.
    """
    total = len(labels)
    order = generator.permutation(total)
    order = order[np.argsort(labels[order], kind="stable")]
    steps = (np.arange(total + 1, dtype=np.int64) * count + total // 2) // total
    marked = np.zeros(total, dtype=np.bool_)
    marked[order[np.diff(steps) > 0]] = True
    return marked


def hold_out(labels: NDArray[np.int64], share: float, generator: np.random.Generator) -> tuple[Indices, Indices]:
    """Divide the pictures into (kept, held out); ``share`` of them are held out, at least one.

    Raises:
        DataError: fewer than two pictures.
    """
    if len(labels) < 2:
        raise DataError(f"{len(labels)} picture is too few to hold some out for validation; give a val split")
    count = min(max(1, round(share * len(labels))), len(labels) - 1)
    held_out = stratified(labels, count, generator)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
