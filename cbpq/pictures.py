"""Where pictures come from, one at a time: files, an array, or a data set that somebody else reads."""

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cbpq.errors import DataError, brief, one_line

GREY_MODES = ("1", "L", "LA", "La")
NO_LABEL = -1  # stands where a picture has no label; a set of pictures has labels throughout or not at all
_SKIP = "leave such pictures out with --skip-bad-images"
_REPLACE = f"replace it, or {_SKIP}"


class UnreadablePictureError(DataError):
    """One picture that cannot be decoded; it can be left out."""


class Pictures(Protocol):
    """Pictures in a fixed order. Worker processes get a copy, so it must be possible to pickle it.

    ``labels`` are all ``NO_LABEL`` for pictures without labels.
    """

    labels: NDArray[np.int64]

    def open(self, index: int) -> Image.Image:
        """The decoded picture, in whatever mode it has.

        Raises:
            UnreadablePictureError: it cannot be decoded.
        """

    def name(self, index: int) -> str:
        """What to call the picture in a message: its path below the data folder, or its number."""


class FolderPictures:
    """Picture files below a folder."""

    def __init__(self, root: Path, files: Sequence[str], labels: NDArray[np.int64]) -> None:
        self.root = root
        self.labels = labels
        # One array of bytes instead of a million str objects, whose reference counts would make every forked worker
        # process copy the memory that holds them.
        self._files = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)

    def open(self, index: int) -> Image.Image:
        """Decode the file."""
        path = self.root / os.fsdecode(self._files[index])
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
                raise UnreadablePictureError(f"{one_line(path)} is not a regular file; {_REPLACE}")
            with path.open("rb") as stream:
                return decode(stream, one_line(path))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise UnreadablePictureError(f"{one_line(path)} cannot be opened ({reason}); {_REPLACE}") from error

    def name(self, index: int) -> str:
        """The path below the folder, with forward slashes."""
        return one_line(Path(os.fsdecode(self._files[index])).as_posix())


class ArrayPictures:
    """Pictures of one size in one array (N, H, W) or (N, H, W, 3) of uint8."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], array: str) -> None:
        self.images, self.labels, self._array = images, labels, array

    @property
    def channels(self) -> int:
        """1 for grey pictures, else 3."""
        return 1 if self.images.ndim == 3 else 3

    def open(self, index: int) -> Image.Image:
        """Show row ``index`` as a picture."""
        return Image.fromarray(self.images[index])

    def name(self, index: int) -> str:
        """The array's name and the row."""
        return f"{self._array}[{index}]"


class DatasetPictures:
    """Pictures of any data set whose ``[index]`` gives a picture, or a binary stream that holds one, and a label."""

    def __init__(self, dataset: Any, labels: NDArray[np.int64], title: str) -> None:
        self._dataset, self.labels, self._title = dataset, labels, title

    def open(self, index: int) -> Image.Image:
        """Fetch the item and decode it."""
        name = self.name(index)
        try:
            # a plain int: some data sets look at the type of the index
            picture = self._dataset[int(index)][0]
        except MemoryError:
            raise
        except Exception as error:  # data sets of other people raise whatever they like
            raise UnreadablePictureError(f"{name} cannot be read ({brief(error)}); {_REPLACE}") from error
        if isinstance(picture, Image.Image):
            return picture
        with picture:
            return decode(picture, name)

    def name(self, index: int) -> str:
        """The data set and the number of the item."""
        return f"{self._title}[{index}]"


def decode(stream: BinaryIO, name: str, otherwise: str = _SKIP) -> Image.Image:
    """Decode one picture completely; ``otherwise`` is what a message says to do other than mending it.

    Raises:
        UnreadablePictureError: it cannot be decoded, or has more than 8 bits per channel.
    """
    try:
        picture: Image.Image = Image.open(stream)
        picture.load()
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadablePictureError(
            f"{name} is not a picture in a format Pillow knows; replace it, or {otherwise}"
        ) from error
    except Exception as error:  # damaged files make Pillow raise OSError, SyntaxError, ValueError, struct.error ...
        raise UnreadablePictureError(
            f"{name} cannot be read as a picture ({brief(error)}); replace it, or {otherwise}"
        ) from error
    if picture.mode.startswith(("I", "F")):
        # converting these clips every value above 255 without a word
        raise UnreadablePictureError(
            f"{name} has 16 or 32 bits per pixel (mode {picture.mode}); convert it to 8 bits, or {otherwise}"
        )
    return picture


def with_channels(picture: Image.Image, channels: int, name: str) -> Image.Image:
    """The picture as the network takes it: grey ones are repeated for three channels.

    Raises:
        DataError: a colour picture for a network of one channel.
    """
    if channels == 3:
        return picture.convert("RGB")
    if picture.mode not in GREY_MODES:
        raise DataError(
            f"{name} has 3 channels (mode {picture.mode}), the network takes 1; convert the pictures to grey first"
        )
    return picture.convert("L")


def no_labels(count: int) -> NDArray[np.int64]:
    """The labels of ``count`` pictures without labels."""
    return np.full(count, NO_LABEL, dtype=np.int64)


def have_labels(labels: NDArray[np.int64]) -> bool:
    """Whether these are labels, and not ``NO_LABEL`` throughout."""
    return bool((labels != NO_LABEL).any())


def are_grey(pictures: Pictures, indices: NDArray[np.int64], count: int = 8) -> bool:
    """Whether all of a few pictures spread over the set are grey; unreadable ones do not count."""
    modes = []
    for index in indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(np.int64)]:
        try:
            modes.append(pictures.open(int(index)).mode)
        except UnreadablePictureError:
            continue
    return bool(modes) and all(mode in GREY_MODES for mode in modes)


def find_unreadable(pictures: Pictures, indices: NDArray[np.int64], threads: int) -> NDArray[np.bool_]:
    """Decode every picture once; True where that fails. Pillow decodes without holding the interpreter's lock."""

    def fails(index: int) -> bool:
        try:
            pictures.open(index)
        except UnreadablePictureError:
            return True
        return False

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return np.fromiter(pool.map(fails, indices.tolist()), dtype=np.bool_, count=len(indices))
