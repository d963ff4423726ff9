"""Data sets that timm reads: ``hfds/NAME``, ``hfids/NAME``, ``tfds/NAME``, ``wds/NAME@FOLDER``, ``torch/NAME@FOLDER``.

What stands behind ``@`` is the folder the data set lies in, or where downloaded ones are kept.
"""

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbpq.errors import DataError, MissingPartError, UsageError, brief, one_line
from cbpq.inputs import InputSpec
from cbpq.pictures import DatasetPictures

# kind of reader → the optional package it needs (as imported, as installed)
_PACKAGES = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow-datasets tensorflow"),
    "wds": ("webdataset", "webdataset"),
    "torch": ("torchvision", "torchvision"),
}
_STREAMED = ("hfids", "tfds", "wds")
VAL_SPLITS = ("validation", "val", "valid", "test")


def is_reader(path: str) -> bool:
    """Whether ``path`` names a timm reader; a folder of that name comes first."""
    return path.partition("/")[0].lower() in _PACKAGES and "/" in path and not os.path.exists(path)


@dataclass(frozen=True)
class Reader:
    """A timm reader by name, such as ``torch/cifar10`` with the folder ``root``."""

    name: str
    root: str | None

    @classmethod
    def parse(cls, path: str) -> "Reader":
        """Read ``KIND/NAME@FOLDER``.

        Raises:
            UsageError: a folder is missing.
            MissingPartError: the package this kind needs is not installed.
        """
        name, _, root = path.partition("@")
        kind = name.partition("/")[0].lower()
        package, installed_as = _PACKAGES[kind]
        # asked beforehand, since timm prints when an import fails
        if importlib.util.find_spec(package) is None:
            raise MissingPartError(f"{name} needs {package}, which is not installed; run: pip install {installed_as}")
        if kind in ("torch", "wds") and not os.path.isdir(root):
            raise UsageError(f"{name} needs the folder it lies in, and there is no {root!r}; write {name}@FOLDER")
        if name.lower() in ("torch/folder", "torch/image_folder"):
            raise UsageError(f"give the folder itself instead of {name}: --data {root}")
        return cls(name, root or None)

    @property
    def streamed(self) -> bool:
        """Whether the pictures come one after the other and cannot be picked by number."""
        return self.name.partition("/")[0].lower() in _STREAMED

    def open(self, splits: Iterable[str], spec: InputSpec) -> tuple[Any, str]:
        """The data set of the first of the splits that exists, and the name of that split.

        Raises:
            DataError: none of them can be opened.
        """
        from timm.data.dataset_factory import create_dataset

        reasons: list[str] = []
        for split in splits:
            try:
                dataset = create_dataset(
                    self.name,
                    root=self.root,
                    split=split,
                    is_training=False,  # order and augmentation are ours
                    input_img_mode="L" if spec.channels == 1 else "RGB",
                )
            except MemoryError:
                raise
            except Exception as error:  # each of these packages has exceptions of its own
                reasons.append(f"{split}: {brief(error)}")
            else:
                return dataset, split
        raise DataError(f"{one_line(self.name)} cannot be opened ({'; '.join(reasons)})")

    def pictures(self, dataset: Any, split: str) -> DatasetPictures:
        """The pictures of a data set that can be picked by number."""
        title = f"{one_line(self.name)}:{split}"
        # timm's own dataset class puts the next picture in the place of one it cannot read; its reader does not
        items = getattr(dataset, "reader", dataset)
        return DatasetPictures(items, _labels(items, title), title)


def _labels(items: Any, title: str) -> NDArray[np.int64]:
    try:
        if hasattr(items, "label_key"):  # a Hugging Face data set
            labels = np.asarray(list(items.dataset[items.label_key]))
        else:  # torchvision's; QMNIST's targets have further columns
            labels = np.asarray(items.targets)
            labels = labels[:, 0] if labels.ndim == 2 else labels
    except Exception as error:  # data sets of other people raise whatever they like
        raise DataError(f"the labels of {title} cannot be listed ({brief(error)})") from error
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise DataError(f"the labels of {title} are no list of class numbers ({labels.dtype}, shape {labels.shape})")
    return labels.astype(np.int64)
