"""Images in a ``.npz`` file of the MedMNIST layout.

``train_images`` is uint8 of shape (N, H, W) for grey or (N, H, W, 3) for colour pictures, ``train_labels`` are whole
numbers of shape (N,) or (N, 1); ``val_`` and ``test_`` likewise. Images without labels are pictures without labels.
Plain ``images`` and ``labels`` are the training split of a file that has no splits. Nothing is ever unpickled.
"""

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbpq.errors import DataError, brief, one_line
from cbpq.pictures import ArrayPictures, no_labels

_MOST_EXPANSION = 1032  # of deflate: more than this many bytes never come out of one (zlib's technical notes)
_LONGEST_HEADER = 2**16


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def split_names(path: Path) -> tuple[str, ...]:
    """Those of ``train``, ``val`` and ``test`` whose images the file holds; ``train`` for plain ``images``.

    Raises:
        DataError: no ``.npz`` file, or none of the splits in it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception as error:  # zipfile raises many kinds on damaged archives
        raise DataError(f"{one_line(path)} cannot be read as a .npz file ({brief(error)})") from error
    found = tuple(split for split in ("train", "val", "test") if f"{split}_images" in members)
    if not found and "images" in members:
        return ("train",)
    if not found:
        there = ", ".join(map(one_line, sorted(members)[:8])) or "nothing"
        raise DataError(
            f"{one_line(path)} holds {there}; expected train_images, train_labels, and the same for val or test, or "
            "just images"
        )
    return found


def read_split(path: Path, split: str) -> ArrayPictures:
    """Read the images of one split, and its labels if there are any; headers are checked before anything of their size
    is allocated.

    Raises:
        DataError: missing or damaged members, or shapes and types other than the module describes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            prefix = f"{split}_" if f"{split}_images.npy" in members else ""
            name, labels_name = f"{prefix}images", f"{prefix}labels"
            header = _header(archive, name)
            _check_images(path, name, header)
            labels = no_labels(header.shape[0])
            if f"{labels_name}.npy" in members:
                _check_labels(path, labels_name, _header(archive, labels_name), name, header.shape[0])
                labels = _read(archive, labels_name)
            images = _read(archive, name)
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"the images of the {split} split of {one_line(path)} do not fit into memory") from error
    except Exception as error:  # so do zlib, NumPy and the tokenizer of Python that NumPy reads headers with
        raise DataError(f"{one_line(path)} is damaged at its {split} split ({brief(error)})") from error
    labels = labels.reshape(-1)
    if labels.size and labels.max() > np.iinfo(np.int64).max:
        raise DataError(f"{one_line(path)}: label {labels.max()} in {labels_name} is not a class number")
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    return ArrayPictures(images, labels.astype(np.int64), name)


def _check_images(path: Path, name: str, images: _Header) -> None:
    where = one_line(path)
    if images.dtype != np.uint8:
        raise DataError(f"{where}: {name} is {images.dtype}, expected uint8 (0 to 255)")
    if not (len(images.shape) == 3 or (len(images.shape) == 4 and images.shape[3] in (1, 3))):
        raise DataError(f"{where}: {name} has shape {images.shape}, expected (N, H, W) or (N, H, W, 3)")
    if min(images.shape) == 0:
        raise DataError(f"{where}: {name} is empty (shape {images.shape})")


def _check_labels(path: Path, name: str, labels: _Header, images_name: str, images: int) -> None:
    where = one_line(path)
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where}: {name} is {labels.dtype}, expected whole numbers")
    if len(labels.shape) not in (1, 2) or labels.shape[1:] not in ((), (1,)):
        raise DataError(f"{where}: {name} has shape {labels.shape}, expected one label per image: (N,) or (N, 1)")
    if labels.shape[0] != images:
        raise DataError(f"{where}: {images} {images_name} but {labels.shape[0]} {name}")


def _header(archive: zipfile.ZipFile, name: str) -> _Header:
    """Shape and type of a member; ValueError if it holds objects or is not as long as it says."""
    member = archive.getinfo(f"{name}.npy")
    _check_member(archive, member)
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0) and int.from_bytes(stream.read(4), "little") <= _LONGEST_HEADER:
            stream.seek(-4, 1)
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"{name} has an unknown .npy header, version {version}")
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are never loaded")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():
            raise ValueError(f"{name} is {member.file_size} bytes long, which does not fit its shape {shape}")
    return _Header(shape, dtype)


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """ValueError if the archive cannot hold as many bytes as its directory says: nothing may be allocated for them."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is compressed as NumPy never does it")
    size = archive.fp.seek(0, 2) if archive.fp is not None else 0
    most = _MOST_EXPANSION if member.compress_type == zipfile.ZIP_DEFLATED else 1
    if member.compress_size > size or member.file_size > most * member.compress_size:
        raise ValueError(f"{member.filename} is said to hold {member.file_size} bytes, which do not fit into the file")


def _read(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        return array
