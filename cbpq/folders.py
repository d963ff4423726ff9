"""Folders of pictures: one folder per class, or pictures without labels directly in the folder; either perhaps below
``train`` and ``val``. And the class map.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cbpq.errors import DataError, UsageError, brief, one_line
from cbpq.pictures import FolderPictures, no_labels

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class ImageFolders:
    """The splits of a data folder.

    ``train`` and ``val`` are the folders of the splits, None if there is no such split; a folder without splits is
    ``whole`` instead. Each holds class folders, or pictures without labels directly: those that do are ``flat``.
    ``classes`` maps the name of a class folder to its label.
    """

    def __init__(self, root: Path, num_classes: int, class_map: Path | None = None) -> None:
        below = {folder.name.lower(): folder for folder in _subfolders(root)}
        self.root = root
        flat_splits = _may_hold_flat_splits(root, below)
        self.train = _split(below, TRAIN_NAMES, flat_splits)
        self.val = _split(below, VAL_NAMES, flat_splits)
        self.whole = root if self.train is None and self.val is None else None
        self.notes: list[str] = []
        if self.whole and not _holds_pictures(root):
            what = "no pictures" if below else "no class folders and no pictures"
            raise DataError(f"{one_line(root)} has {what} in it; looked for {', '.join(EXTENSIONS)}")
        there = [folder for folder in (self.train, self.val, self.whole) if folder is not None]
        self.flat = [folder for folder in there if _is_flat(folder)]
        # the training folder is the complete one; a small val split may lack classes
        labelled = next((folder for folder in there if folder not in self.flat), None)
        self.classes: dict[str, int] = {}
        if labelled is None and class_map:
            raise UsageError(f"a class map names class folders, but {one_line(root)} has none; leave the class map out")
        if labelled is not None:
            self._named = [folder.name for folder in _subfolders(labelled)]
            self.classes = self._from_map(class_map, num_classes) if class_map else self._from_names(root, num_classes)

    def pictures(self, folder: Path) -> FolderPictures:
        """All pictures of a split, by class folder and then by name.

        Raises:
            DataError: a class folder without a label, or no picture at all.
        """
        if folder in self.flat:
            direct = [str((folder / name).relative_to(self.root)) for name in _pictures_in(folder)]
            return FolderPictures(self.root, direct, no_labels(len(direct)))
        files: list[str] = []
        labels: list[int] = []
        for class_folder in _subfolders(folder):
            if class_folder.name not in self.classes:
                raise DataError(
                    f"class folder {one_line(class_folder)} has no label; add it to the class map, or to the training "
                    "folder, or remove it"
                )
            found = sorted(_files(class_folder, str(class_folder.relative_to(self.root))))
            files += found
            labels += [self.classes[class_folder.name]] * len(found)
        if not files:
            raise DataError(f"no pictures below {one_line(folder)}; looked for {', '.join(EXTENSIONS)}")
        return FolderPictures(self.root, files, np.array(labels, dtype=np.int64))

    def _from_names(self, root: Path, num_classes: int) -> dict[str, int]:
        names = sorted(self._named)  # the order of torchvision's ImageFolder
        if len(names) == 1:
            raise DataError(
                f"{one_line(root)} has one class only ({one_line(names[0])}); two or more are needed; for pictures "
                "without labels give the folder that holds them directly"
            )
        if len(names) != num_classes:
            raise DataError(
                f"{one_line(root)} has {len(names)} class folders, the network tells {num_classes} classes apart; "
                "say which classes the folders are with --class-map FILE"
            )
        natural = sorted(names, key=lambda name: [int(part) if part.isdecimal() else part for part in _parts(name)])
        if natural != names:
            swapped = next(pair for pair in zip(names, natural, strict=True) if pair[0] != pair[1])
            self.notes.append(
                f"labels follow the alphabetical order of the class folders (as torchvision's do): "
                f"{one_line(swapped[0])} before {one_line(swapped[1])}; use --class-map for another order"
            )
        return {name: label for label, name in enumerate(names)}

    def _from_map(self, path: Path, num_classes: int) -> dict[str, int]:
        classes = read_class_map(path)
        name, label = max(classes.items(), key=lambda item: item[1])
        if label >= num_classes:
            raise DataError(
                f"{one_line(path)} gives class {name!r} label {label}, but the network tells {num_classes} classes "
                f"apart (labels 0 to {num_classes - 1})"
            )
        return classes


def read_class_map(path: Path) -> dict[str, int]:
    """The label of each class folder: a name per line in label order, ``name label`` lines, or JSON {name: label}.

    Raises:
        UsageError: there is no such file.
        DataError: it is none of these, or gives a name or a label twice.
    """
    if not path.is_file():
        raise UsageError(f"no such class map: {one_line(path)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class map {one_line(path)} cannot be read as text ({brief(error)})") from error
    if text.lstrip().startswith("{"):
        pairs = _json_pairs(path, text)
    else:
        pairs = list(_line_pairs([line.strip() for line in text.splitlines() if line.strip()]))
    if not pairs:
        raise DataError(f"class map {one_line(path)} is empty; give one class folder per line, in label order")
    classes: dict[str, int] = {}
    labels: dict[int, str] = {}
    for name, label in pairs:
        if name in classes:
            raise DataError(f"class map {one_line(path)} names {name!r} twice")
        if label in labels:
            raise DataError(f"class map {one_line(path)} gives label {label} to both {labels[label]!r} and {name!r}")
        classes[name], labels[label] = label, name
    return classes


def _line_pairs(lines: list[str]) -> Iterator[tuple[str, int]]:
    # A last word that is a number means a label only if every line has one; class names may contain blanks.
    words = [line.rsplit(maxsplit=1) for line in lines]
    if all(len(pair) == 2 and pair[1].isascii() and pair[1].isdecimal() for pair in words):
        # 18 digits are far beyond any network's classes, and Python refuses to read thousands of them
        yield from ((name, int(label[:18])) for name, label in words)
    else:
        yield from ((line, label) for label, line in enumerate(lines))


def _json_pairs(path: Path, text: str) -> list[tuple[str, int]]:
    def pairs(items: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        return items  # a dict would hide names that occur twice

    try:
        items = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise DataError(f"class map {one_line(path)} is not valid JSON ({brief(error)})") from error
    for name, label in items:
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise DataError(f"class map {one_line(path)} gives {name!r} no label: a whole number from 0 is expected")
    return [(name, label) for name, label in items]


def _parts(name: str) -> list[str]:
    # digits are always the odd entries, so two lists compare entry by entry without mixing types
    return re.split(r"(\d+)", name)


def _may_hold_flat_splits(root: Path, below: Mapping[str, Path]) -> bool:
    """Whether ``train`` with nothing but pictures in it is a split of ``root``: a class may well be called 'train'.

    It is one beside a split with class folders, or if there are no pictures elsewhere.
    """
    splits = [below[name] for name in (*TRAIN_NAMES, *VAL_NAMES) if name in below]
    if any(_subfolders(split) for split in splits):
        return True
    others = (folder for folder in below.values() if folder not in splits)
    return bool(splits) and not _pictures_in(root) and not any(map(_holds_pictures, others))


def _split(below: Mapping[str, Path], names: tuple[str, ...], flat: bool) -> Path | None:
    """The first folder with one of the names that itself holds folders or, if it may be ``flat``, pictures."""
    there = (below[name] for name in names if name in below)
    return next((folder for folder in there if _subfolders(folder) or (flat and _pictures_in(folder))), None)


def _is_flat(folder: Path) -> bool:
    """Whether pictures lie directly in the folder.

    Raises:
        DataError: and in folders below it as well, so that they might have labels or not.
    """
    direct = _pictures_in(folder)
    if not direct:
        return False
    mixed = next((below for below in _subfolders(folder) if _holds_pictures(below)), None)
    if mixed is not None:
        raise DataError(
            f"{one_line(folder)} has pictures directly in it ({one_line(direct[0])}) and class folders with pictures "
            f"({one_line(mixed.name)}); keep pictures with and without labels in different folders"
        )
    return True


def _holds_pictures(folder: Path) -> bool:
    """Whether there is a picture in the folder, at any depth."""
    return next(_files(folder, ""), None) is not None


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{one_line(folder)} cannot be listed ({error.strerror}); check its permissions") from error


def _files(folder: Path, prefix: str, seen: frozenset[str] = frozenset()) -> Iterator[str]:
    """Picture files at any depth, as paths that begin with ``prefix``; hidden ones (``._x.jpg``) are no pictures."""
    real = os.path.realpath(folder)
    if real in seen:  # a link that leads back to a folder above
        return
    for entry in _entries(folder):
        path = f"{prefix}{os.sep}{entry.name}"
        if os.path.isdir(entry.path):  # entry.is_dir() raises for a link to itself
            yield from _files(folder / entry.name, path, seen | {real})
        elif entry.name.lower().endswith(EXTENSIONS):
            yield path


def _pictures_in(folder: Path) -> list[str]:
    """The names of the picture files directly in the folder, in order."""
    files = (entry for entry in _entries(folder) if entry.name.lower().endswith(EXTENSIONS))
    return [entry.name for entry in files if not os.path.isdir(entry.path)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What the folder holds, by name, without what is hidden."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{one_line(folder)} cannot be listed ({error.strerror}); check its permissions") from error
    return sorted(entries, key=lambda entry: entry.name)
