"""Folders of pictures: one folder per class, perhaps below ``train`` and ``val``, and the class map."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cbpq.errors import DataError, UsageError
from cbpq.pictures import FolderPictures, brief, one_line

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class ImageFolders:
    """The splits of a data folder.

    ``train`` and ``val`` are the folders that hold class folders, None if there is no such split; a folder of class
    folders is ``whole`` instead. ``classes`` maps the name of a class folder to its label.
    """

    def __init__(self, root: Path, num_classes: int, class_map: Path | None = None) -> None:
        below = {folder.name.lower(): folder for folder in _subfolders(root)}
        self.root = root
        self.train = _split(below, TRAIN_NAMES)
        self.val = _split(below, VAL_NAMES)
        self.whole = root if self.train is None and self.val is None else None
        self.notes: list[str] = []
        # the training folder is the complete one; a small val split may lack classes
        self._named = [folder.name for folder in _subfolders(self.train or self.val or root)]
        if not self._named:
            raise DataError(f"{one_line(root)} has no class folders; one folder of pictures per class is expected")
        self.classes = self._from_map(class_map, num_classes) if class_map else self._from_names(root, num_classes)

    def pictures(self, folder: Path) -> FolderPictures:
        """All pictures of a split, by class folder and then by name.

        Raises:
            DataError: a class folder without a label, or no picture at all.
        """
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
            raise DataError(f"{one_line(root)} has one class only ({one_line(names[0])}); two or more are needed")
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


def _split(below: Mapping[str, Path], names: tuple[str, ...]) -> Path | None:
    """The first folder with one of the names that itself holds folders: a class may well be called 'train'."""
    return next((below[name] for name in names if name in below and _subfolders(below[name])), None)


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
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{one_line(folder)} cannot be listed ({error.strerror}); check its permissions") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = f"{prefix}{os.sep}{entry.name}"
        if os.path.isdir(entry.path):  # entry.is_dir() raises for a link to itself
            yield from _files(folder / entry.name, path, seen | {real})
        elif entry.name.lower().endswith(EXTENSIONS):
            yield path
